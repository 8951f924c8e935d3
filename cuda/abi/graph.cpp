// extern "C": what learning on graphs computes.
#include <cmath>

#include "abi/arguments.h"
#include "graph/operations.h"

using ph::checked_for_capture;
using ph::checked_range;
using ph::checked_tensor;
using ph::Error;
using ph::guard;

namespace {

// The bytes of rows * columns elements of 4 bytes, or more than any buffer holds.
uint64_t bytes_of(uint64_t rows, uint64_t columns) {
  if (columns != 0 && rows > UINT64_MAX / 4 / columns) return UINT64_MAX;
  return rows * columns * 4;
}

float* floats(const ph_buffer* buffer, uint64_t offset, uint64_t rows, uint64_t columns, const char* what) {
  return reinterpret_cast<float*>(checked_tensor(buffer, offset, bytes_of(rows, columns), what));
}

int32_t* integers(const ph_buffer* buffer, uint64_t offset, uint64_t rows, uint64_t columns,
                  const char* what) {
  return reinterpret_cast<int32_t*>(checked_tensor(buffer, offset, bytes_of(rows, columns), what));
}

// The same of what may be left out.
float* floats_if(const ph_buffer* buffer, uint64_t offset, uint64_t rows, uint64_t columns,
                 const char* what) {
  return buffer == nullptr ? nullptr : floats(buffer, offset, rows, columns, what);
}
int32_t* integers_if(const ph_buffer* buffer, uint64_t offset, uint64_t rows, uint64_t columns,
                     const char* what) {
  return buffer == nullptr ? nullptr : integers(buffer, offset, rows, columns, what);
}

bool flag(uint32_t value, const char* what) {
  if (value > 1) throw Error(PH_ERROR_INVALID_ARGUMENT, "%s must be 0 or 1: it is %u", what, value);
  return value == 1;
}

float finite(float value, const char* what) {
  if (!std::isfinite(value))
    throw Error(PH_ERROR_INVALID_ARGUMENT, "%s must be finite: it is %g", what, static_cast<double>(value));
  return value;
}

float positive(float value, const char* what) {
  if (!(finite(value, what) > 0))
    throw Error(PH_ERROR_INVALID_ARGUMENT, "%s must be above 0: it is %g", what, static_cast<double>(value));
  return value;
}

uint32_t at_least_1(uint32_t value, const char* what) {
  if (value == 0) throw Error(PH_ERROR_INVALID_ARGUMENT, "%s must be at least 1", what);
  return value;
}

// Rows have 31 bits, as indices do.
uint32_t rows_of(uint32_t rows, const char* what) {
  if (rows > INT32_MAX)
    throw Error(PH_ERROR_INVALID_ARGUMENT, "%s must be at most %d: it is %u", what, INT32_MAX, rows);
  return rows;
}

uint32_t heads_of(uint32_t heads, uint32_t width) {
  if (heads == 0 || width % heads != 0) {
    throw Error(PH_ERROR_INVALID_ARGUMENT,
                "The width of %u must be a multiple of the heads, of which there are %u", width, heads);
  }
  return heads;
}

uint32_t activation_of(uint32_t activation) {
  if (activation > PH_GRAPH_SOFTPLUS)
    throw Error(PH_ERROR_INVALID_ARGUMENT, "Activation %u is none of ph_graph_activation", activation);
  return activation;
}

}  // namespace

extern "C" {

int32_t ph_graph_multiply(ph_device* device, const ph_buffer* a, uint64_t a_offset, uint32_t transpose_a,
                          const ph_buffer* b, uint64_t b_offset, uint32_t transpose_b, const ph_buffer* bias,
                          uint64_t bias_offset, ph_buffer* out, uint64_t out_offset, uint32_t rows,
                          uint32_t inner, uint32_t columns, uint32_t accumulate, char* error,
                          uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph::graph::multiply(
        checked_for_capture(device),
        {floats(a, a_offset, rows, inner, "the first matrix"),
         floats(b, b_offset, inner, columns, "the second matrix"),
         floats_if(bias, bias_offset, 1, columns, "the bias"),
         floats(out, out_offset, rows, columns, "the output"), rows_of(rows, "The rows"), inner, columns,
         flag(transpose_a, "transpose_a"), flag(transpose_b, "transpose_b"), flag(accumulate, "accumulate")});
  });
}

int32_t ph_graph_aggregate(ph_device* device, const ph_buffer* x, uint64_t x_offset, const ph_buffer* offsets,
                           uint64_t offsets_offset, const ph_buffer* columns, uint64_t columns_offset,
                           const ph_buffer* edges, uint64_t edges_offset, const ph_buffer* weights,
                           uint64_t weights_offset, const ph_buffer* row_scale, uint64_t row_scale_offset,
                           const ph_buffer* column_scale, uint64_t column_scale_offset, ph_buffer* out,
                           uint64_t out_offset, uint32_t rows, uint32_t x_rows, uint32_t entries,
                           uint32_t weight_rows, uint32_t heads, uint32_t width, float self,
                           uint32_t accumulate, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    if (finite(self, "self") != 0 && rows != x_rows) {
      throw Error(PH_ERROR_INVALID_ARGUMENT, "With self, the output must have as many rows as x: %u and %u",
                  rows, x_rows);
    }
    if (offsets == nullptr && entries != rows) {
      throw Error(PH_ERROR_INVALID_ARGUMENT,
                  "Without offsets, there must be an entry for each row: %u and %u", entries, rows);
    }
    ph::graph::aggregate(checked_for_capture(device),
                         {floats(x, x_offset, x_rows, width, "x"),
                          integers_if(offsets, offsets_offset, rows + 1ull, 1, "the offsets"),
                          integers_if(columns, columns_offset, entries, 1, "the columns"),
                          integers_if(edges, edges_offset, entries, 1, "the edges"),
                          floats_if(weights, weights_offset, weight_rows, heads, "the weights"),
                          floats_if(row_scale, row_scale_offset, rows, 1, "the scales of rows"),
                          floats_if(column_scale, column_scale_offset, x_rows, 1, "the scales of columns"),
                          floats(out, out_offset, rows, width, "the output"), rows_of(rows, "The rows"),
                          rows_of(x_rows, "The rows of x"), rows_of(entries, "The entries"), weight_rows,
                          heads_of(heads, width), width, self, flag(accumulate, "accumulate")});
  });
}

int32_t ph_graph_edge_dot(ph_device* device, const ph_buffer* y, uint64_t y_offset, const ph_buffer* x,
                          uint64_t x_offset, const ph_buffer* offsets, uint64_t offsets_offset,
                          const ph_buffer* columns, uint64_t columns_offset, const ph_buffer* row_scale,
                          uint64_t row_scale_offset, const ph_buffer* column_scale,
                          uint64_t column_scale_offset, ph_buffer* out, uint64_t out_offset, uint32_t rows,
                          uint32_t x_rows, uint32_t entries, uint32_t heads, uint32_t width,
                          uint32_t accumulate, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph::graph::edge_dot(checked_for_capture(device),
                        {floats(y, y_offset, rows, width, "y"), floats(x, x_offset, x_rows, width, "x"),
                         integers(offsets, offsets_offset, rows + 1ull, 1, "the offsets"),
                         integers_if(columns, columns_offset, entries, 1, "the columns"),
                         floats_if(row_scale, row_scale_offset, rows, 1, "the scales of rows"),
                         floats_if(column_scale, column_scale_offset, x_rows, 1, "the scales of columns"),
                         floats(out, out_offset, entries, heads, "the output"), rows_of(rows, "The rows"),
                         rows_of(x_rows, "The rows of x"), rows_of(entries, "The entries"),
                         heads_of(heads, width), width, flag(accumulate, "accumulate")});
  });
}

int32_t ph_graph_full_blocks(ph_device* device, const ph_buffer* row_offsets, uint64_t row_offsets_offset,
                             const ph_buffer* column_offsets, uint64_t column_offsets_offset,
                             const ph_buffer* entry_offsets, uint64_t entry_offsets_offset,
                             ph_buffer* columns, uint64_t columns_offset, ph_buffer* rows,
                             uint64_t rows_offset, ph_buffer* order, uint64_t order_offset,
                             ph_buffer* inverse, uint64_t inverse_offset, uint32_t blocks, uint32_t entries,
                             char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph::graph::full_blocks(
        checked_for_capture(device),
        {integers(row_offsets, row_offsets_offset, blocks + 1ull, 1, "the offsets of rows"),
         integers(column_offsets, column_offsets_offset, blocks + 1ull, 1, "the offsets of columns"),
         integers(entry_offsets, entry_offsets_offset, blocks + 1ull, 1, "the offsets of entries"),
         integers(columns, columns_offset, entries, 1, "the columns"),
         integers(rows, rows_offset, entries, 1, "the rows"),
         integers(order, order_offset, entries, 1, "the order"),
         integers(inverse, inverse_offset, entries, 1, "the inverse order"), rows_of(blocks, "The blocks"),
         rows_of(entries, "The entries")});
  });
}

int32_t ph_graph_segment_max(ph_device* device, const ph_buffer* x, uint64_t x_offset,
                             const ph_buffer* offsets, uint64_t offsets_offset, ph_buffer* out,
                             uint64_t out_offset, ph_buffer* places, uint64_t places_offset, uint32_t rows,
                             uint32_t x_rows, uint32_t width, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph::graph::segment_max(checked_for_capture(device),
                           {floats(x, x_offset, x_rows, width, "x"),
                            integers(offsets, offsets_offset, rows + 1ull, 1, "the offsets"),
                            floats(out, out_offset, rows, width, "the output"),
                            integers(places, places_offset, rows, width, "the places"),
                            rows_of(rows, "The rows"), rows_of(x_rows, "The rows of x"), width});
  });
}

int32_t ph_graph_segment_max_backward(ph_device* device, const ph_buffer* dy, uint64_t dy_offset,
                                      const ph_buffer* places, uint64_t places_offset, ph_buffer* dx,
                                      uint64_t dx_offset, uint32_t rows, uint32_t x_rows, uint32_t width,
                                      uint32_t accumulate, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph::graph::segment_max_backward(
        checked_for_capture(device),
        {floats(dy, dy_offset, rows, width, "dy"), integers(places, places_offset, rows, width, "the places"),
         floats(dx, dx_offset, x_rows, width, "dx"), rows_of(rows, "The rows"),
         rows_of(x_rows, "The rows of x"), width, flag(accumulate, "accumulate")});
  });
}

int32_t ph_graph_segment_softmax(ph_device* device, const ph_buffer* x, uint64_t x_offset,
                                 const ph_buffer* offsets, uint64_t offsets_offset, ph_buffer* out,
                                 uint64_t out_offset, uint32_t rows, uint32_t x_rows, uint32_t width,
                                 char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph::graph::segment_softmax(checked_for_capture(device),
                               {floats(x, x_offset, x_rows, width, "x"),
                                integers(offsets, offsets_offset, rows + 1ull, 1, "the offsets"),
                                floats(out, out_offset, x_rows, width, "the output"),
                                rows_of(rows, "The rows"), rows_of(x_rows, "The rows of x"), width});
  });
}

int32_t ph_graph_segment_softmax_backward(ph_device* device, const ph_buffer* y, uint64_t y_offset,
                                          const ph_buffer* dy, uint64_t dy_offset, const ph_buffer* offsets,
                                          uint64_t offsets_offset, ph_buffer* dx, uint64_t dx_offset,
                                          uint32_t rows, uint32_t x_rows, uint32_t width, uint32_t accumulate,
                                          char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph::graph::segment_softmax_backward(
        checked_for_capture(device),
        {floats(y, y_offset, x_rows, width, "y"), floats(dy, dy_offset, x_rows, width, "dy"),
         integers(offsets, offsets_offset, rows + 1ull, 1, "the offsets"),
         floats(dx, dx_offset, x_rows, width, "dx"), rows_of(rows, "The rows"),
         rows_of(x_rows, "The rows of x"), width, flag(accumulate, "accumulate")});
  });
}

int32_t ph_graph_head_dot(ph_device* device, const ph_buffer* x, uint64_t x_offset, const ph_buffer* a,
                          uint64_t a_offset, ph_buffer* out, uint64_t out_offset, uint32_t rows,
                          uint32_t heads, uint32_t width, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    const uint64_t columns = static_cast<uint64_t>(heads) * width;
    ph::graph::head_dot(
        checked_for_capture(device),
        {floats(x, x_offset, rows, columns, "x"), floats(a, a_offset, heads, width, "a"),
         floats(out, out_offset, rows, heads, "the output"), rows_of(rows, "The rows"), heads, width});
  });
}

int32_t ph_graph_head_dot_backward(ph_device* device, const ph_buffer* x, uint64_t x_offset,
                                   const ph_buffer* a, uint64_t a_offset, const ph_buffer* dy,
                                   uint64_t dy_offset, ph_buffer* dx, uint64_t dx_offset,
                                   uint32_t accumulate_dx, ph_buffer* da, uint64_t da_offset,
                                   uint32_t accumulate_da, uint32_t rows, uint32_t heads, uint32_t width,
                                   char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    const uint64_t columns = static_cast<uint64_t>(heads) * width;
    if (columns > INT32_MAX)
      throw Error(PH_ERROR_INVALID_ARGUMENT, "Rows of x must have at most %d elements", INT32_MAX);
    ph::graph::head_dot_backward(
        checked_for_capture(device),
        {floats(x, x_offset, rows, columns, "x"), floats(a, a_offset, heads, width, "a"),
         floats(dy, dy_offset, rows, heads, "dy"), floats_if(dx, dx_offset, rows, columns, "dx"),
         floats_if(da, da_offset, heads, width, "da"), rows_of(rows, "The rows"), heads, width,
         flag(accumulate_dx, "accumulate_dx"), flag(accumulate_da, "accumulate_da")});
  });
}

int32_t ph_graph_activate(ph_device* device, uint32_t activation, float slope, const ph_buffer* x,
                          uint64_t x_offset, ph_buffer* out, uint64_t out_offset, uint64_t count, char* error,
                          uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph::graph::activate(checked_for_capture(device),
                        {floats(x, x_offset, count, 1, "x"), floats(out, out_offset, count, 1, "the output"),
                         count, activation_of(activation), finite(slope, "slope")});
  });
}

int32_t ph_graph_activate_backward(ph_device* device, uint32_t activation, float slope, const ph_buffer* x,
                                   uint64_t x_offset, const ph_buffer* dy, uint64_t dy_offset, ph_buffer* dx,
                                   uint64_t dx_offset, uint64_t count, uint32_t accumulate, char* error,
                                   uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph::graph::activate_backward(checked_for_capture(device),
                                 {floats(x, x_offset, count, 1, "x"), floats(dy, dy_offset, count, 1, "dy"),
                                  floats(dx, dx_offset, count, 1, "dx"), count, activation_of(activation),
                                  finite(slope, "slope"), flag(accumulate, "accumulate")});
  });
}

int32_t ph_graph_combine(ph_device* device, float alpha, const ph_buffer* x, uint64_t x_offset, float beta,
                         const ph_buffer* y, uint64_t y_offset, ph_buffer* out, uint64_t out_offset,
                         uint64_t count, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph::graph::combine(checked_for_capture(device),
                       {floats(x, x_offset, count, 1, "x"), floats_if(y, y_offset, count, 1, "y"),
                        floats(out, out_offset, count, 1, "the output"), count, finite(alpha, "alpha"),
                        finite(beta, "beta")});
  });
}

int32_t ph_graph_product(ph_device* device, const ph_buffer* x, uint64_t x_offset, const ph_buffer* y,
                         uint64_t y_offset, ph_buffer* out, uint64_t out_offset, uint64_t count,
                         uint32_t accumulate, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph::graph::product(
        checked_for_capture(device),
        {floats(x, x_offset, count, 1, "x"), floats(y, y_offset, count, 1, "y"),
         floats(out, out_offset, count, 1, "the output"), count, flag(accumulate, "accumulate")});
  });
}

int32_t ph_graph_copy_columns(ph_device* device, const ph_buffer* x, uint64_t x_offset, uint32_t x_stride,
                              ph_buffer* out, uint64_t out_offset, uint32_t out_stride, uint32_t rows,
                              uint32_t columns, uint32_t accumulate, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    const auto strided = [&](const ph_buffer* buffer, uint64_t offset, uint64_t stride, const char* what) {
      if (stride < columns) {
        throw Error(PH_ERROR_INVALID_ARGUMENT, "The row stride of %s is %llu, less than the %u columns", what,
                    static_cast<unsigned long long>(stride), columns);
      }
      if (offset % 4 != 0) {
        throw Error(PH_ERROR_INVALID_ARGUMENT, "The offset of %s must be a multiple of 4: it is %llu", what,
                    static_cast<unsigned long long>(offset));
      }
      const uint64_t count = rows == 0 ? 0 : (rows - 1ull) * stride + columns;
      return reinterpret_cast<float*>(checked_range(buffer, offset, bytes_of(count, 1), what));
    };
    ph::graph::copy_columns(
        checked_for_capture(device),
        {strided(x, x_offset, x_stride, "x"), strided(out, out_offset, out_stride, "the output"),
         rows_of(rows, "The rows"), columns, x_stride, out_stride, flag(accumulate, "accumulate")});
  });
}

int32_t ph_graph_column_sum(ph_device* device, const ph_buffer* x, uint64_t x_offset, ph_buffer* out,
                            uint64_t out_offset, uint32_t rows, uint32_t width, uint32_t accumulate,
                            char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph::graph::column_sum(
        checked_for_capture(device),
        {floats(x, x_offset, rows, width, "x"), floats(out, out_offset, 1, width, "the output"),
         rows_of(rows, "The rows"), width, flag(accumulate, "accumulate")});
  });
}

int32_t ph_graph_batch_norm(ph_device* device, const ph_buffer* x, uint64_t x_offset, const ph_buffer* weight,
                            uint64_t weight_offset, const ph_buffer* bias, uint64_t bias_offset,
                            ph_buffer* running_mean, uint64_t running_mean_offset,
                            ph_buffer* running_variance, uint64_t running_variance_offset, ph_buffer* saved,
                            uint64_t saved_offset, ph_buffer* out, uint64_t out_offset, uint32_t rows,
                            uint32_t width, float epsilon, float momentum, uint32_t training, char* error,
                            uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    if (!(momentum >= 0 && momentum <= 1)) {
      throw Error(PH_ERROR_INVALID_ARGUMENT, "momentum must be from 0 to 1: it is %g",
                  static_cast<double>(momentum));
    }
    ph::graph::batch_norm(
        checked_for_capture(device),
        {floats(x, x_offset, rows, width, "x"), floats(weight, weight_offset, 1, width, "the weight"),
         floats(bias, bias_offset, 1, width, "the bias"),
         floats(running_mean, running_mean_offset, 1, width, "the running mean"),
         floats(running_variance, running_variance_offset, 1, width, "the running variance"),
         floats(saved, saved_offset, 2, width, "what is saved"),
         floats(out, out_offset, rows, width, "the output"), rows_of(rows, "The rows"), width,
         positive(epsilon, "epsilon"), momentum, flag(training, "training")});
  });
}

int32_t ph_graph_batch_norm_backward(ph_device* device, const ph_buffer* x, uint64_t x_offset,
                                     const ph_buffer* weight, uint64_t weight_offset, const ph_buffer* saved,
                                     uint64_t saved_offset, const ph_buffer* dy, uint64_t dy_offset,
                                     ph_buffer* dx, uint64_t dx_offset, ph_buffer* dweight,
                                     uint64_t dweight_offset, ph_buffer* dbias, uint64_t dbias_offset,
                                     uint32_t rows, uint32_t width, uint32_t accumulate, char* error,
                                     uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph::graph::batch_norm_backward(
        checked_for_capture(device),
        {floats(x, x_offset, rows, width, "x"), floats(weight, weight_offset, 1, width, "the weight"),
         floats(saved, saved_offset, 2, width, "what was saved"), floats(dy, dy_offset, rows, width, "dy"),
         floats_if(dx, dx_offset, rows, width, "dx"), floats_if(dweight, dweight_offset, 1, width, "dweight"),
         floats_if(dbias, dbias_offset, 1, width, "dbias"), rows_of(rows, "The rows"), width,
         flag(accumulate, "accumulate")});
  });
}

int32_t ph_graph_layer_norm(ph_device* device, const ph_buffer* x, uint64_t x_offset, const ph_buffer* weight,
                            uint64_t weight_offset, const ph_buffer* bias, uint64_t bias_offset,
                            ph_buffer* saved, uint64_t saved_offset, ph_buffer* out, uint64_t out_offset,
                            uint32_t rows, uint32_t width, float epsilon, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph::graph::layer_norm(
        checked_for_capture(device),
        {floats(x, x_offset, rows, width, "x"), floats(weight, weight_offset, 1, width, "the weight"),
         floats(bias, bias_offset, 1, width, "the bias"),
         floats(saved, saved_offset, 2, rows, "what is saved"),
         floats(out, out_offset, rows, width, "the output"), rows_of(rows, "The rows"),
         at_least_1(width, "The width"), positive(epsilon, "epsilon")});
  });
}

int32_t ph_graph_layer_norm_backward(ph_device* device, const ph_buffer* x, uint64_t x_offset,
                                     const ph_buffer* weight, uint64_t weight_offset, const ph_buffer* saved,
                                     uint64_t saved_offset, const ph_buffer* dy, uint64_t dy_offset,
                                     ph_buffer* dx, uint64_t dx_offset, ph_buffer* dweight,
                                     uint64_t dweight_offset, ph_buffer* dbias, uint64_t dbias_offset,
                                     uint32_t rows, uint32_t width, uint32_t accumulate, char* error,
                                     uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph::graph::layer_norm_backward(
        checked_for_capture(device),
        {floats(x, x_offset, rows, width, "x"), floats(weight, weight_offset, 1, width, "the weight"),
         floats(saved, saved_offset, 2, rows, "what was saved"), floats(dy, dy_offset, rows, width, "dy"),
         floats_if(dx, dx_offset, rows, width, "dx"), floats_if(dweight, dweight_offset, 1, width, "dweight"),
         floats_if(dbias, dbias_offset, 1, width, "dbias"), rows_of(rows, "The rows"),
         at_least_1(width, "The width"), flag(accumulate, "accumulate")});
  });
}

int32_t ph_graph_dropout(ph_device* device, const ph_buffer* x, uint64_t x_offset, ph_buffer* out,
                         uint64_t out_offset, uint64_t count, float probability, uint64_t seed,
                         uint32_t accumulate, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    if (!(probability >= 0 && probability < 1)) {
      throw Error(PH_ERROR_INVALID_ARGUMENT, "The probability must be from 0 to below 1: it is %g",
                  static_cast<double>(probability));
    }
    if (count > 1ull << 34) throw Error(PH_ERROR_INVALID_ARGUMENT, "Dropout takes at most 2^34 elements");
    ph::graph::dropout(checked_for_capture(device),
                       {floats(x, x_offset, count, 1, "x"), floats(out, out_offset, count, 1, "the output"),
                        count, seed, probability, flag(accumulate, "accumulate")});
  });
}

int32_t ph_graph_cross_entropy(ph_device* device, const ph_buffer* logits, uint64_t logits_offset,
                               const ph_buffer* labels, uint64_t labels_offset, ph_buffer* probabilities,
                               uint64_t probabilities_offset, ph_buffer* loss, uint64_t loss_offset,
                               ph_buffer* row_losses, uint64_t row_losses_offset, ph_buffer* predictions,
                               uint64_t predictions_offset, uint32_t rows, uint32_t classes, float scale,
                               char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph::graph::cross_entropy(
        checked_for_capture(device),
        {floats(logits, logits_offset, rows, classes, "the logits"),
         integers(labels, labels_offset, rows, 1, "the labels"),
         floats(probabilities, probabilities_offset, rows, classes, "the probabilities"),
         floats(loss, loss_offset, 1, 1, "the loss"),
         floats_if(row_losses, row_losses_offset, rows, 1, "the losses of rows"),
         integers_if(predictions, predictions_offset, rows, 1, "the predictions"), rows_of(rows, "The rows"),
         at_least_1(classes, "The classes"), finite(scale, "scale")});
  });
}

int32_t ph_graph_cross_entropy_backward(ph_device* device, const ph_buffer* probabilities,
                                        uint64_t probabilities_offset, const ph_buffer* labels,
                                        uint64_t labels_offset, const ph_buffer* dy, uint64_t dy_offset,
                                        ph_buffer* dx, uint64_t dx_offset, uint32_t rows, uint32_t classes,
                                        float scale, uint32_t accumulate, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph::graph::cross_entropy_backward(
        checked_for_capture(device),
        {floats(probabilities, probabilities_offset, rows, classes, "the probabilities"),
         integers(labels, labels_offset, rows, 1, "the labels"), floats(dy, dy_offset, 1, 1, "dy"),
         floats(dx, dx_offset, rows, classes, "dx"), rows_of(rows, "The rows"),
         at_least_1(classes, "The classes"), finite(scale, "scale"), flag(accumulate, "accumulate")});
  });
}

int32_t ph_graph_squared_norm(ph_device* device, const ph_buffer* x, uint64_t x_offset, ph_buffer* out,
                              uint64_t out_offset, uint64_t count, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph::graph::squared_norm(checked_for_capture(device), floats(x, x_offset, count, 1, "x"),
                            floats(out, out_offset, 1, 1, "the output"), count);
  });
}

int32_t ph_graph_adam(ph_device* device, ph_buffer* parameters, uint64_t parameters_offset,
                      const ph_buffer* gradients, uint64_t gradients_offset, ph_buffer* first,
                      uint64_t first_offset, ph_buffer* second, uint64_t second_offset,
                      const ph_buffer* squared_norm, uint64_t squared_norm_offset, uint64_t count,
                      float learning_rate, float beta1, float beta2, float epsilon, float weight_decay,
                      float correction1, float correction2, float most_norm, uint32_t decoupled, char* error,
                      uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    const float* norm = floats_if(squared_norm, squared_norm_offset, 1, 1, "the squared norm");
    ph::graph::adam(
        checked_for_capture(device),
        {floats(parameters, parameters_offset, count, 1, "the parameters"),
         floats(gradients, gradients_offset, count, 1, "the gradients"),
         floats(first, first_offset, count, 1, "the first moments"),
         floats(second, second_offset, count, 1, "the second moments"), norm, count,
         finite(learning_rate, "learning_rate"), finite(beta1, "beta1"), finite(beta2, "beta2"),
         positive(epsilon, "epsilon"), finite(weight_decay, "weight_decay"),
         positive(correction1, "correction1"), positive(correction2, "correction2"),
         norm == nullptr ? 0.0f : positive(most_norm, "most_norm"), flag(decoupled, "decoupled")});
  });
}

}  // extern "C"
