/** `packhorse.h`, section "llm". */
export const LLM_SYMBOLS = {
  ph_llm_linear: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* x
      "u64", // uint64_t x_offset
      "u32", // uint32_t x_dtype
      "pointer", // const ph_buffer* weight
      "u64", // uint64_t weight_offset
      "u32", // uint32_t weight_dtype
      "pointer", // const ph_buffer* bias
      "u64", // uint64_t bias_offset
      "u32", // uint32_t bias_dtype
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "u32", // uint32_t out_dtype
      "u32", // uint32_t rows
      "u32", // uint32_t in_features
      "u32", // uint32_t out_features
      "u32", // uint32_t accumulate
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_llm_prepare_linear: {
    parameters: [
      "pointer", // ph_device* device
      "buffer", // char* name
      "u32", // uint32_t name_bytes
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_llm_gather: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* x
      "u64", // uint64_t x_offset
      "u32", // uint32_t x_dtype
      "u32", // uint32_t x_rows
      "pointer", // const ph_buffer* indices
      "u64", // uint64_t indices_offset
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "u32", // uint32_t out_dtype
      "u32", // uint32_t rows
      "u32", // uint32_t width
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_llm_rms_norm: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* x
      "u64", // uint64_t x_offset
      "u32", // uint32_t x_dtype
      "u32", // uint32_t x_stride
      "pointer", // const ph_buffer* weight
      "u64", // uint64_t weight_offset
      "u32", // uint32_t weight_dtype
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "u32", // uint32_t out_dtype
      "u32", // uint32_t out_stride
      "u32", // uint32_t rows
      "u32", // uint32_t groups
      "u32", // uint32_t width
      "f32", // float epsilon
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_llm_rope: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* x
      "u64", // uint64_t x_offset
      "u32", // uint32_t x_dtype
      "u32", // uint32_t x_stride
      "pointer", // const ph_buffer* positions
      "u64", // uint64_t positions_offset
      "pointer", // const ph_buffer* frequencies
      "u64", // uint64_t frequencies_offset
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "u32", // uint32_t out_dtype
      "u32", // uint32_t out_stride
      "u32", // uint32_t rows
      "u32", // uint32_t heads
      "u32", // uint32_t head_dim
      "u32", // uint32_t rotary_dim
      "f32", // float scale
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_llm_swiglu: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* gate
      "u64", // uint64_t gate_offset
      "pointer", // const ph_buffer* up
      "u64", // uint64_t up_offset
      "u32", // uint32_t dtype
      "u32", // uint32_t stride
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "u32", // uint32_t out_dtype
      "u32", // uint32_t rows
      "u32", // uint32_t width
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_llm_cast: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* x
      "u64", // uint64_t x_offset
      "u32", // uint32_t x_dtype
      "u32", // uint32_t x_stride
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "u32", // uint32_t out_dtype
      "u32", // uint32_t rows
      "u32", // uint32_t width
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_llm_add: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_buffer* x
      "u64", // uint64_t x_offset
      "u32", // uint32_t x_dtype
      "pointer", // const ph_buffer* y
      "u64", // uint64_t y_offset
      "u32", // uint32_t y_dtype
      "u64", // uint64_t count
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_llm_advance: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_buffer* counters
      "u64", // uint64_t counters_offset
      "u32", // uint32_t count
      "i32", // int32_t by
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_llm_argmax: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* logits
      "u64", // uint64_t logits_offset
      "u32", // uint32_t logits_dtype
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "u32", // uint32_t rows
      "u32", // uint32_t vocabulary
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_llm_sample: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* logits
      "u64", // uint64_t logits_offset
      "u32", // uint32_t logits_dtype
      "pointer", // ph_buffer* samplers
      "u64", // uint64_t samplers_offset
      "pointer", // ph_buffer* seen
      "u64", // uint64_t seen_offset
      "pointer", // ph_buffer* scratch
      "u64", // uint64_t scratch_offset
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "u32", // uint32_t rows
      "u32", // uint32_t vocabulary
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_llm_mark: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* tokens
      "u64", // uint64_t tokens_offset
      "u32", // uint32_t count
      "pointer", // ph_buffer* seen
      "u64", // uint64_t seen_offset
      "u32", // uint32_t vocabulary
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_llm_cross_entropy: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* logits
      "u64", // uint64_t logits_offset
      "u32", // uint32_t logits_dtype
      "pointer", // const ph_buffer* targets
      "u64", // uint64_t targets_offset
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "u32", // uint32_t rows
      "u32", // uint32_t vocabulary
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_llm_divergence: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* reference
      "u64", // uint64_t reference_offset
      "u32", // uint32_t reference_dtype
      "pointer", // const ph_buffer* logits
      "u64", // uint64_t logits_offset
      "u32", // uint32_t logits_dtype
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "u32", // uint32_t rows
      "u32", // uint32_t vocabulary
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
} as const satisfies Deno.ForeignLibraryInterface;
