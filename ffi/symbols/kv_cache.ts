/** `packhorse.h`, section "kv cache". */
export const KV_CACHE_SYMBOLS = {
  ph_kv_cache_create: {
    parameters: [
      "pointer", // ph_device* device
      "buffer", // const ph_kv_cache_config* config
      "buffer", // const ph_kv_cache_codec* codecs
      "buffer", // int32_t* status
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "pointer", // ph_kv_cache*
  },
  ph_kv_cache_plan: {
    parameters: [
      "buffer", // const ph_kv_cache_config* config
      "buffer", // const ph_kv_cache_codec* codecs
      "buffer", // ph_kv_cache_statistics* statistics
      "buffer", // uint64_t* block_bytes
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_cache_destroy: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_kv_cache* cache
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_cache_add: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_kv_cache* cache
      "buffer", // uint32_t* sequence
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_cache_fork: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_kv_cache* cache
      "u32", // uint32_t sequence
      "buffer", // uint32_t* fork
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_cache_truncate: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_kv_cache* cache
      "u32", // uint32_t sequence
      "u64", // uint64_t tokens
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_cache_remove: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_kv_cache* cache
      "u32", // uint32_t sequence
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_cache_length: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_kv_cache* cache
      "u32", // uint32_t sequence
      "buffer", // uint64_t* tokens
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_cache_begin: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_kv_cache* cache
      "buffer", // const uint32_t* sequences
      "buffer", // const uint32_t* tokens
      "u32", // uint32_t count
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_cache_append: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_kv_cache* cache
      "u32", // uint32_t layer
      "pointer", // const ph_buffer* keys
      "u64", // uint64_t keys_offset
      "pointer", // const ph_buffer* values
      "u64", // uint64_t values_offset
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_cache_attend: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_kv_cache* cache
      "u32", // uint32_t layer
      "pointer", // const ph_buffer* queries
      "u64", // uint64_t queries_offset
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "f32", // float scale
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_cache_prefill: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_kv_cache* cache
      "u32", // uint32_t layer
      "pointer", // const ph_buffer* queries
      "u64", // uint64_t queries_offset
      "pointer", // const ph_buffer* keys
      "u64", // uint64_t keys_offset
      "pointer", // const ph_buffer* values
      "u64", // uint64_t values_offset
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "f32", // float scale
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_cache_read: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_kv_cache* cache
      "u32", // uint32_t layer
      "u32", // uint32_t sequence
      "u64", // uint64_t first
      "u64", // uint64_t count
      "pointer", // ph_buffer* keys
      "u64", // uint64_t keys_offset
      "pointer", // ph_buffer* values
      "u64", // uint64_t values_offset
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_cache_score: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_kv_cache* cache
      "u32", // uint32_t layer
      "u32", // uint32_t sequence
      "pointer", // const ph_buffer* queries
      "u64", // uint64_t queries_offset
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "f32", // float scale
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_cache_weigh: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_kv_cache* cache
      "u32", // uint32_t layer
      "u32", // uint32_t sequence
      "pointer", // const ph_buffer* weights
      "u64", // uint64_t weights_offset
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_cache_check: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_kv_cache* cache
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_cache_get_statistics: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_kv_cache* cache
      "buffer", // ph_kv_cache_statistics* statistics
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_cache_step_shape: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_kv_cache* cache
      "buffer", // uint32_t* shape
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_cache_measure: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_kv_cache* cache
      "u32", // uint32_t sequence
      "buffer", // uint32_t* blocks
      "buffer", // uint64_t* record_bytes
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_cache_capture_begin: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_kv_cache* cache
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_cache_export: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_kv_cache* cache
      "u32", // uint32_t sequence
      "u32", // uint32_t layer
      "buffer", // uint8_t* records
      "u64", // uint64_t record_bytes
      "buffer", // uint64_t* offsets
      "buffer", // uint8_t* recent
      "u64", // uint64_t recent_bytes
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_cache_capture_end: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_kv_cache* cache
      "buffer", // int32_t* status
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "pointer", // ph_kv_cache_graph*
  },
  ph_kv_cache_replay: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_kv_cache* cache
      "pointer", // ph_kv_cache_graph* graph
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_cache_begin_import: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_kv_cache* cache
      "u64", // uint64_t tokens
      "u32", // uint32_t blocks
      "buffer", // const uint64_t* record_bytes
      "buffer", // uint32_t* sequence
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_cache_graph_destroy: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_kv_cache_graph* graph
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_kv_cache_import: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_kv_cache* cache
      "u32", // uint32_t sequence
      "u32", // uint32_t layer
      "buffer", // const uint8_t* records
      "u64", // uint64_t record_bytes
      "buffer", // const uint64_t* offsets
      "buffer", // const uint8_t* recent
      "u64", // uint64_t recent_bytes
      "buffer", // uint64_t* malformed
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
} as const satisfies Deno.ForeignLibraryInterface;
