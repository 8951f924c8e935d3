const KV_ENCODE = {
  name: "ph_kv_encode",
  parameters: [
    "pointer", // ph_device* device
    "buffer", // const ph_kv_codec* codec
    "pointer", // const ph_buffer* keys
    "u64", // uint64_t keys_offset
    "pointer", // const ph_buffer* values
    "u64", // uint64_t values_offset
    "pointer", // ph_buffer* records
    "pointer", // ph_buffer* offsets
    "pointer", // ph_buffer* workspace
    "pointer", // ph_buffer* status
    "buffer", // char* error
    "u32", // uint32_t error_bytes
  ],
  result: "i32",
} as const;

const KV_DECODE = {
  name: "ph_kv_decode",
  parameters: [
    "pointer", // ph_device* device
    "buffer", // const ph_kv_codec* codec
    "pointer", // const ph_buffer* records
    "u64", // uint64_t records_bytes
    "pointer", // const ph_buffer* offsets
    "pointer", // ph_buffer* keys
    "u64", // uint64_t keys_offset
    "pointer", // ph_buffer* values
    "u64", // uint64_t values_offset
    "pointer", // ph_buffer* status
    "buffer", // char* error
    "u32", // uint32_t error_bytes
  ],
  result: "i32",
} as const;

const KV_MEASURE = {
  name: "ph_kv_measure",
  parameters: [
    "pointer", // ph_device* device
    "buffer", // const ph_kv_codec* codec
    "pointer", // const ph_buffer* records
    "u64", // uint64_t records_bytes
    "pointer", // const ph_buffer* offsets
    "pointer", // const ph_buffer* keys
    "u64", // uint64_t keys_offset
    "pointer", // const ph_buffer* values
    "u64", // uint64_t values_offset
    "pointer", // ph_buffer* statistics
    "pointer", // ph_buffer* workspace
    "pointer", // ph_buffer* status
    "buffer", // char* error
    "u32", // uint32_t error_bytes
  ],
  result: "i32",
} as const;

/** `packhorse.h`, section "kv". Names in `_async` run on another thread and give a promise. */
export const KV_SYMBOLS = {
  ph_kv_records_capacity: {
    parameters: [
      "buffer", // const ph_kv_codec* codec
    ],
    result: "u64",
  },
  ph_kv_workspace_bytes: {
    parameters: [
      "buffer", // const ph_kv_codec* codec
    ],
    result: "u64",
  },
  ph_kv_groups: {
    parameters: [
      "buffer", // const ph_kv_codec* codec
      "u32", // uint32_t part
    ],
    result: "u64",
  },
  ph_kv_quantize: {
    parameters: [
      "pointer", // ph_device* device
      "buffer", // const ph_kv_codec* codec
      "u32", // uint32_t part
      "pointer", // const ph_buffer* x
      "u64", // uint64_t x_offset
      "pointer", // ph_buffer* codes
      "pointer", // ph_buffer* scales
      "pointer", // ph_buffer* zeros
      "pointer", // ph_buffer* status
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_repack: {
    parameters: [
      "pointer", // ph_device* device
      "buffer", // const ph_kv_codec* codec
      "pointer", // const ph_buffer* key_codes
      "pointer", // const ph_buffer* value_codes
      "pointer", // ph_buffer* order
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_pack: {
    parameters: [
      "pointer", // ph_device* device
      "buffer", // const ph_kv_codec* codec
      "pointer", // const ph_buffer* key_codes
      "pointer", // const ph_buffer* key_scales
      "pointer", // const ph_buffer* key_zeros
      "pointer", // const ph_buffer* value_codes
      "pointer", // const ph_buffer* value_scales
      "pointer", // const ph_buffer* value_zeros
      "pointer", // const ph_buffer* order
      "pointer", // ph_buffer* records
      "pointer", // ph_buffer* offsets
      "pointer", // ph_buffer* workspace
      "pointer", // ph_buffer* status
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_encode: KV_ENCODE,
  ph_kv_encode_async: { ...KV_ENCODE, nonblocking: true },
  ph_kv_unpack: {
    parameters: [
      "pointer", // ph_device* device
      "buffer", // const ph_kv_codec* codec
      "pointer", // const ph_buffer* records
      "u64", // uint64_t records_bytes
      "pointer", // const ph_buffer* offsets
      "pointer", // ph_buffer* key_codes
      "pointer", // ph_buffer* key_scales
      "pointer", // ph_buffer* key_zeros
      "pointer", // ph_buffer* value_codes
      "pointer", // ph_buffer* value_scales
      "pointer", // ph_buffer* value_zeros
      "pointer", // ph_buffer* order
      "pointer", // ph_buffer* status
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_dequantize: {
    parameters: [
      "pointer", // ph_device* device
      "buffer", // const ph_kv_codec* codec
      "u32", // uint32_t part
      "pointer", // const ph_buffer* codes
      "pointer", // const ph_buffer* scales
      "pointer", // const ph_buffer* zeros
      "pointer", // ph_buffer* x
      "u64", // uint64_t x_offset
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_decode: KV_DECODE,
  ph_kv_decode_async: { ...KV_DECODE, nonblocking: true },
  ph_kv_measure: KV_MEASURE,
  ph_kv_measure_async: { ...KV_MEASURE, nonblocking: true },
} as const satisfies Deno.ForeignLibraryInterface;
