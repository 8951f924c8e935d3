/** `packhorse.h`, section "graph". */
export const GRAPH_SYMBOLS = {
  ph_graph_multiply: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* a
      "u64", // uint64_t a_offset
      "u32", // uint32_t transpose_a
      "pointer", // const ph_buffer* b
      "u64", // uint64_t b_offset
      "u32", // uint32_t transpose_b
      "pointer", // const ph_buffer* bias
      "u64", // uint64_t bias_offset
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "u32", // uint32_t rows
      "u32", // uint32_t inner
      "u32", // uint32_t columns
      "u32", // uint32_t accumulate
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_graph_aggregate: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* x
      "u64", // uint64_t x_offset
      "pointer", // const ph_buffer* offsets
      "u64", // uint64_t offsets_offset
      "pointer", // const ph_buffer* columns
      "u64", // uint64_t columns_offset
      "pointer", // const ph_buffer* edges
      "u64", // uint64_t edges_offset
      "pointer", // const ph_buffer* weights
      "u64", // uint64_t weights_offset
      "pointer", // const ph_buffer* row_scale
      "u64", // uint64_t row_scale_offset
      "pointer", // const ph_buffer* column_scale
      "u64", // uint64_t column_scale_offset
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "u32", // uint32_t rows
      "u32", // uint32_t x_rows
      "u32", // uint32_t entries
      "u32", // uint32_t weight_rows
      "u32", // uint32_t heads
      "u32", // uint32_t width
      "f32", // float self
      "u32", // uint32_t accumulate
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_graph_edge_dot: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* y
      "u64", // uint64_t y_offset
      "pointer", // const ph_buffer* x
      "u64", // uint64_t x_offset
      "pointer", // const ph_buffer* offsets
      "u64", // uint64_t offsets_offset
      "pointer", // const ph_buffer* columns
      "u64", // uint64_t columns_offset
      "pointer", // const ph_buffer* row_scale
      "u64", // uint64_t row_scale_offset
      "pointer", // const ph_buffer* column_scale
      "u64", // uint64_t column_scale_offset
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "u32", // uint32_t rows
      "u32", // uint32_t x_rows
      "u32", // uint32_t entries
      "u32", // uint32_t heads
      "u32", // uint32_t width
      "u32", // uint32_t accumulate
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_graph_full_blocks: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* row_offsets
      "u64", // uint64_t row_offsets_offset
      "pointer", // const ph_buffer* column_offsets
      "u64", // uint64_t column_offsets_offset
      "pointer", // const ph_buffer* entry_offsets
      "u64", // uint64_t entry_offsets_offset
      "pointer", // ph_buffer* columns
      "u64", // uint64_t columns_offset
      "pointer", // ph_buffer* rows
      "u64", // uint64_t rows_offset
      "pointer", // ph_buffer* order
      "u64", // uint64_t order_offset
      "pointer", // ph_buffer* inverse
      "u64", // uint64_t inverse_offset
      "u32", // uint32_t blocks
      "u32", // uint32_t entries
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_graph_segment_max: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* x
      "u64", // uint64_t x_offset
      "pointer", // const ph_buffer* offsets
      "u64", // uint64_t offsets_offset
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "pointer", // ph_buffer* places
      "u64", // uint64_t places_offset
      "u32", // uint32_t rows
      "u32", // uint32_t x_rows
      "u32", // uint32_t width
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_graph_segment_max_backward: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* dy
      "u64", // uint64_t dy_offset
      "pointer", // const ph_buffer* places
      "u64", // uint64_t places_offset
      "pointer", // ph_buffer* dx
      "u64", // uint64_t dx_offset
      "u32", // uint32_t rows
      "u32", // uint32_t x_rows
      "u32", // uint32_t width
      "u32", // uint32_t accumulate
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_graph_segment_softmax: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* x
      "u64", // uint64_t x_offset
      "pointer", // const ph_buffer* offsets
      "u64", // uint64_t offsets_offset
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "u32", // uint32_t rows
      "u32", // uint32_t x_rows
      "u32", // uint32_t width
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_graph_segment_softmax_backward: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* y
      "u64", // uint64_t y_offset
      "pointer", // const ph_buffer* dy
      "u64", // uint64_t dy_offset
      "pointer", // const ph_buffer* offsets
      "u64", // uint64_t offsets_offset
      "pointer", // ph_buffer* dx
      "u64", // uint64_t dx_offset
      "u32", // uint32_t rows
      "u32", // uint32_t x_rows
      "u32", // uint32_t width
      "u32", // uint32_t accumulate
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_graph_head_dot: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* x
      "u64", // uint64_t x_offset
      "pointer", // const ph_buffer* a
      "u64", // uint64_t a_offset
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "u32", // uint32_t rows
      "u32", // uint32_t heads
      "u32", // uint32_t width
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_graph_head_dot_backward: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* x
      "u64", // uint64_t x_offset
      "pointer", // const ph_buffer* a
      "u64", // uint64_t a_offset
      "pointer", // const ph_buffer* dy
      "u64", // uint64_t dy_offset
      "pointer", // ph_buffer* dx
      "u64", // uint64_t dx_offset
      "u32", // uint32_t accumulate_dx
      "pointer", // ph_buffer* da
      "u64", // uint64_t da_offset
      "u32", // uint32_t accumulate_da
      "u32", // uint32_t rows
      "u32", // uint32_t heads
      "u32", // uint32_t width
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_graph_activate: {
    parameters: [
      "pointer", // ph_device* device
      "u32", // uint32_t activation
      "f32", // float slope
      "pointer", // const ph_buffer* x
      "u64", // uint64_t x_offset
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "u64", // uint64_t count
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_graph_activate_backward: {
    parameters: [
      "pointer", // ph_device* device
      "u32", // uint32_t activation
      "f32", // float slope
      "pointer", // const ph_buffer* x
      "u64", // uint64_t x_offset
      "pointer", // const ph_buffer* dy
      "u64", // uint64_t dy_offset
      "pointer", // ph_buffer* dx
      "u64", // uint64_t dx_offset
      "u64", // uint64_t count
      "u32", // uint32_t accumulate
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_graph_combine: {
    parameters: [
      "pointer", // ph_device* device
      "f32", // float alpha
      "pointer", // const ph_buffer* x
      "u64", // uint64_t x_offset
      "f32", // float beta
      "pointer", // const ph_buffer* y
      "u64", // uint64_t y_offset
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "u64", // uint64_t count
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_graph_product: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* x
      "u64", // uint64_t x_offset
      "pointer", // const ph_buffer* y
      "u64", // uint64_t y_offset
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "u64", // uint64_t count
      "u32", // uint32_t accumulate
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_graph_copy_columns: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* x
      "u64", // uint64_t x_offset
      "u32", // uint32_t x_stride
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "u32", // uint32_t out_stride
      "u32", // uint32_t rows
      "u32", // uint32_t columns
      "u32", // uint32_t accumulate
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_graph_column_sum: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* x
      "u64", // uint64_t x_offset
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "u32", // uint32_t rows
      "u32", // uint32_t width
      "u32", // uint32_t accumulate
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_graph_batch_norm: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* x
      "u64", // uint64_t x_offset
      "pointer", // const ph_buffer* weight
      "u64", // uint64_t weight_offset
      "pointer", // const ph_buffer* bias
      "u64", // uint64_t bias_offset
      "pointer", // ph_buffer* running_mean
      "u64", // uint64_t running_mean_offset
      "pointer", // ph_buffer* running_variance
      "u64", // uint64_t running_variance_offset
      "pointer", // ph_buffer* saved
      "u64", // uint64_t saved_offset
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "u32", // uint32_t rows
      "u32", // uint32_t width
      "f32", // float epsilon
      "f32", // float momentum
      "u32", // uint32_t training
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_graph_batch_norm_backward: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* x
      "u64", // uint64_t x_offset
      "pointer", // const ph_buffer* weight
      "u64", // uint64_t weight_offset
      "pointer", // const ph_buffer* saved
      "u64", // uint64_t saved_offset
      "pointer", // const ph_buffer* dy
      "u64", // uint64_t dy_offset
      "pointer", // ph_buffer* dx
      "u64", // uint64_t dx_offset
      "pointer", // ph_buffer* dweight
      "u64", // uint64_t dweight_offset
      "pointer", // ph_buffer* dbias
      "u64", // uint64_t dbias_offset
      "u32", // uint32_t rows
      "u32", // uint32_t width
      "u32", // uint32_t accumulate
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_graph_layer_norm: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* x
      "u64", // uint64_t x_offset
      "pointer", // const ph_buffer* weight
      "u64", // uint64_t weight_offset
      "pointer", // const ph_buffer* bias
      "u64", // uint64_t bias_offset
      "pointer", // ph_buffer* saved
      "u64", // uint64_t saved_offset
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "u32", // uint32_t rows
      "u32", // uint32_t width
      "f32", // float epsilon
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_graph_layer_norm_backward: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* x
      "u64", // uint64_t x_offset
      "pointer", // const ph_buffer* weight
      "u64", // uint64_t weight_offset
      "pointer", // const ph_buffer* saved
      "u64", // uint64_t saved_offset
      "pointer", // const ph_buffer* dy
      "u64", // uint64_t dy_offset
      "pointer", // ph_buffer* dx
      "u64", // uint64_t dx_offset
      "pointer", // ph_buffer* dweight
      "u64", // uint64_t dweight_offset
      "pointer", // ph_buffer* dbias
      "u64", // uint64_t dbias_offset
      "u32", // uint32_t rows
      "u32", // uint32_t width
      "u32", // uint32_t accumulate
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_graph_dropout: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* x
      "u64", // uint64_t x_offset
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "u64", // uint64_t count
      "f32", // float probability
      "u64", // uint64_t seed
      "u32", // uint32_t accumulate
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_graph_cross_entropy: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* logits
      "u64", // uint64_t logits_offset
      "pointer", // const ph_buffer* labels
      "u64", // uint64_t labels_offset
      "pointer", // ph_buffer* probabilities
      "u64", // uint64_t probabilities_offset
      "pointer", // ph_buffer* loss
      "u64", // uint64_t loss_offset
      "pointer", // ph_buffer* row_losses
      "u64", // uint64_t row_losses_offset
      "pointer", // ph_buffer* predictions
      "u64", // uint64_t predictions_offset
      "u32", // uint32_t rows
      "u32", // uint32_t classes
      "f32", // float scale
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_graph_cross_entropy_backward: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* probabilities
      "u64", // uint64_t probabilities_offset
      "pointer", // const ph_buffer* labels
      "u64", // uint64_t labels_offset
      "pointer", // const ph_buffer* dy
      "u64", // uint64_t dy_offset
      "pointer", // ph_buffer* dx
      "u64", // uint64_t dx_offset
      "u32", // uint32_t rows
      "u32", // uint32_t classes
      "f32", // float scale
      "u32", // uint32_t accumulate
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_graph_squared_norm: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* x
      "u64", // uint64_t x_offset
      "pointer", // ph_buffer* out
      "u64", // uint64_t out_offset
      "u64", // uint64_t count
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_graph_adam: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_buffer* parameters
      "u64", // uint64_t parameters_offset
      "pointer", // const ph_buffer* gradients
      "u64", // uint64_t gradients_offset
      "pointer", // ph_buffer* first
      "u64", // uint64_t first_offset
      "pointer", // ph_buffer* second
      "u64", // uint64_t second_offset
      "pointer", // const ph_buffer* squared_norm
      "u64", // uint64_t squared_norm_offset
      "u64", // uint64_t count
      "f32", // float learning_rate
      "f32", // float beta1
      "f32", // float beta2
      "f32", // float epsilon
      "f32", // float weight_decay
      "f32", // float correction1
      "f32", // float correction2
      "f32", // float most_norm
      "u32", // uint32_t decoupled
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
} as const satisfies Deno.ForeignLibraryInterface;
