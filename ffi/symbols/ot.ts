/** `packhorse.h`, section "ot". */
export const OT_SYMBOLS = {
  ph_ot_batch_create: {
    parameters: [
      "pointer", // ph_device* device
      "u32", // uint32_t problems
      "buffer", // const uint32_t* rows
      "buffer", // const uint32_t* columns
      "u32", // uint32_t dtype
      "u32", // uint32_t dimension
      "u32", // uint32_t streaming
      "u32", // uint32_t backward
      "buffer", // int32_t* status
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "pointer",
  },
  ph_ot_batch_destroy: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_ot_batch* batch
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_ot_batch_set: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_ot_batch* batch
      "buffer", // const ph_ot_options* options
      "buffer", // const double* epsilons
      "buffer", // const double* tolerances
      "buffer", // const int32_t* iterations
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_ot_batch_bind: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_ot_batch* batch
      "pointer", // const ph_buffer* cost
      "u64", // uint64_t cost_offset
      "pointer", // const ph_buffer* x
      "u64", // uint64_t x_offset
      "pointer", // const ph_buffer* y
      "u64", // uint64_t y_offset
      "pointer", // const ph_buffer* a
      "u64", // uint64_t a_offset
      "pointer", // const ph_buffer* b
      "u64", // uint64_t b_offset
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_ot_sinkhorn: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_ot_batch* batch
      "pointer", // const ph_buffer* warm_g
      "u64", // uint64_t warm_g_offset
      "pointer", // ph_buffer* f
      "u64", // uint64_t f_offset
      "pointer", // ph_buffer* g
      "u64", // uint64_t g_offset
      "pointer", // ph_buffer* plan
      "u64", // uint64_t plan_offset
      "pointer", // ph_buffer* reports
      "u64", // uint64_t reports_offset
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_ot_exact: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_ot_batch* batch
      "buffer", // const double* masses
      "pointer", // ph_buffer* f
      "u64", // uint64_t f_offset
      "pointer", // ph_buffer* g
      "u64", // uint64_t g_offset
      "pointer", // ph_buffer* plan
      "u64", // uint64_t plan_offset
      "pointer", // ph_buffer* reports
      "u64", // uint64_t reports_offset
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_ot_partial: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_ot_batch* batch
      "buffer", // const double* masses
      "pointer", // ph_buffer* f
      "u64", // uint64_t f_offset
      "pointer", // ph_buffer* g
      "u64", // uint64_t g_offset
      "pointer", // ph_buffer* plan
      "u64", // uint64_t plan_offset
      "pointer", // ph_buffer* reports
      "u64", // uint64_t reports_offset
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_ot_proximal: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_ot_batch* batch
      "u32", // uint32_t inner
      "pointer", // ph_buffer* f
      "u64", // uint64_t f_offset
      "pointer", // ph_buffer* g
      "u64", // uint64_t g_offset
      "pointer", // ph_buffer* plan
      "u64", // uint64_t plan_offset
      "pointer", // ph_buffer* reports
      "u64", // uint64_t reports_offset
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_ot_gromov: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_ot_batch* batch
      "buffer", // const double* alphas
      "pointer", // const ph_buffer* x
      "u64", // uint64_t x_offset
      "pointer", // const ph_buffer* y
      "u64", // uint64_t y_offset
      "pointer", // const ph_buffer* cost
      "u64", // uint64_t cost_offset
      "pointer", // const ph_buffer* a
      "u64", // uint64_t a_offset
      "pointer", // const ph_buffer* b
      "u64", // uint64_t b_offset
      "pointer", // ph_buffer* plan
      "u64", // uint64_t plan_offset
      "pointer", // ph_buffer* reports
      "u64", // uint64_t reports_offset
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_ot_plan: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_ot_batch* batch
      "pointer", // const ph_buffer* f
      "u64", // uint64_t f_offset
      "pointer", // const ph_buffer* g
      "u64", // uint64_t g_offset
      "pointer", // const ph_buffer* reports
      "u64", // uint64_t reports_offset
      "pointer", // ph_buffer* plan
      "u64", // uint64_t plan_offset
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_ot_plan_product: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_ot_batch* batch
      "pointer", // const ph_buffer* f
      "u64", // uint64_t f_offset
      "pointer", // const ph_buffer* g
      "u64", // uint64_t g_offset
      "pointer", // const ph_buffer* plan
      "u64", // uint64_t plan_offset
      "pointer", // const ph_buffer* reports
      "u64", // uint64_t reports_offset
      "pointer", // const ph_buffer* matrix
      "u64", // uint64_t matrix_offset
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "u32", // uint32_t width
      "u32", // uint32_t transposed
      "u32", // uint32_t normalised
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_ot_backward: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_ot_batch* batch
      "u32", // uint32_t mode
      "pointer", // const ph_buffer* f
      "u64", // uint64_t f_offset
      "pointer", // const ph_buffer* g
      "u64", // uint64_t g_offset
      "pointer", // const ph_buffer* plan
      "u64", // uint64_t plan_offset
      "pointer", // const ph_buffer* reports
      "u64", // uint64_t reports_offset
      "pointer", // const ph_buffer* warm_g
      "u64", // uint64_t warm_g_offset
      "pointer", // const ph_buffer* d_plan
      "u64", // uint64_t d_plan_offset
      "pointer", // const ph_buffer* d_f
      "u64", // uint64_t d_f_offset
      "pointer", // const ph_buffer* d_g
      "u64", // uint64_t d_g_offset
      "pointer", // const ph_buffer* d_cost
      "u64", // uint64_t d_cost_offset
      "pointer", // const ph_buffer* d_value
      "u64", // uint64_t d_value_offset
      "pointer", // ph_buffer* grad_cost
      "u64", // uint64_t grad_cost_offset
      "pointer", // ph_buffer* grad_x
      "u64", // uint64_t grad_x_offset
      "pointer", // ph_buffer* grad_y
      "u64", // uint64_t grad_y_offset
      "pointer", // ph_buffer* grad_a
      "u64", // uint64_t grad_a_offset
      "pointer", // ph_buffer* grad_b
      "u64", // uint64_t grad_b_offset
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
} as const satisfies Deno.ForeignLibraryInterface;
