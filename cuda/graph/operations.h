// What learning on graphs computes, forward and backward; both backends implement it. Formulas are in packhorse.h, section
// "graph". Arguments are valid but for what indices and offsets hold, which is checked as they are read; matrices are
// float32, dense, row-major and 16-byte aligned. A null pointer stands for what is optional and not given. Where
// `accumulate` is set, results are added to what the output holds. Sums are in an order that the sizes alone decide.
#pragma once

#include "device/device.h"

namespace ph::graph {

// op(a): [rows, inner]; op(b): [inner, columns]; bias: null or [columns]; out: [rows, columns]. A transposed matrix lies in
// memory as [inner, rows] or [columns, inner].
struct Multiply {
  const float *a, *b, *bias;
  float* out;
  uint32_t rows, inner, columns;
  bool transpose_a, transpose_b, accumulate;
};
void multiply(ph_device& device, const Multiply& call);

// x: [x_rows, width]; offsets: null or [rows + 1]; columns, edges: null or [entries]; weights: null or [weight_rows, heads];
// row_scale: null or [rows]; column_scale: null or [x_rows]; out: [rows, width].
struct Aggregate {
  const float* x;
  const int32_t *offsets, *columns, *edges;
  const float *weights, *row_scale, *column_scale;
  float* out;
  uint32_t rows, x_rows, entries, weight_rows, heads, width;
  float self;
  bool accumulate;
};
void aggregate(ph_device& device, const Aggregate& call);

// y: [rows, width]; x: [x_rows, width]; offsets: [rows + 1]; columns: null or [entries]; out: [entries, heads].
struct EdgeDot {
  const float *y, *x;
  const int32_t *offsets, *columns;
  const float *row_scale, *column_scale;
  float* out;
  uint32_t rows, x_rows, entries, heads, width;
  bool accumulate;
};
void edge_dot(ph_device& device, const EdgeDot& call);

// Offsets: [blocks + 1]; columns, rows, order, inverse: [entries].
struct FullBlocks {
  const int32_t *row_offsets, *column_offsets, *entry_offsets;
  int32_t *columns, *rows, *order, *inverse;
  uint32_t blocks, entries;
};
void full_blocks(ph_device& device, const FullBlocks& call);

// x: [x_rows, width]; offsets: [rows + 1]; out: [rows, width]; places: [rows, width].
struct SegmentMax {
  const float* x;
  const int32_t* offsets;
  float* out;
  int32_t* places;
  uint32_t rows, x_rows, width;
};
void segment_max(ph_device& device, const SegmentMax& call);
struct SegmentMaxBackward {
  const float* dy;
  const int32_t* places;
  float* dx;
  uint32_t rows, x_rows, width;
  bool accumulate;
};
void segment_max_backward(ph_device& device, const SegmentMaxBackward& call);

// x, out: [x_rows, width]; offsets: [rows + 1].
struct SegmentSoftmax {
  const float* x;
  const int32_t* offsets;
  float* out;
  uint32_t rows, x_rows, width;
};
void segment_softmax(ph_device& device, const SegmentSoftmax& call);
struct SegmentSoftmaxBackward {
  const float *y, *dy;
  const int32_t* offsets;
  float* dx;
  uint32_t rows, x_rows, width;
  bool accumulate;
};
void segment_softmax_backward(ph_device& device, const SegmentSoftmaxBackward& call);

// x: [rows, heads, width]; a: [heads, width]; out, dy: [rows, heads]; dx, da: null or as x and a.
struct HeadDot {
  const float *x, *a;
  float* out;
  uint32_t rows, heads, width;
};
void head_dot(ph_device& device, const HeadDot& call);
struct HeadDotBackward {
  const float *x, *a, *dy;
  float *dx, *da;
  uint32_t rows, heads, width;
  bool accumulate_dx, accumulate_da;
};
void head_dot_backward(ph_device& device, const HeadDotBackward& call);

// All: [count]. `kind` is a ph_graph_activation.
struct Activate {
  const float* x;
  float* out;
  uint64_t count;
  uint32_t kind;
  float slope;
};
void activate(ph_device& device, const Activate& call);
struct ActivateBackward {
  const float *x, *dy;
  float* dx;
  uint64_t count;
  uint32_t kind;
  float slope;
  bool accumulate;
};
void activate_backward(ph_device& device, const ActivateBackward& call);

// x, y, out: [count]; y: null where beta is 0. out may be x or y.
struct Combine {
  const float *x, *y;
  float* out;
  uint64_t count;
  float alpha, beta;
};
void combine(ph_device& device, const Combine& call);

// x, y, out: [count].
struct Product {
  const float *x, *y;
  float* out;
  uint64_t count;
  bool accumulate;
};
void product(ph_device& device, const Product& call);

// Rows of x start x_stride elements apart, those of out out_stride; 4-byte aligned.
struct CopyColumns {
  const float* x;
  float* out;
  uint32_t rows, columns, x_stride, out_stride;
  bool accumulate;
};
void copy_columns(ph_device& device, const CopyColumns& call);

// x: [rows, width]; out: [width].
struct ColumnSum {
  const float* x;
  float* out;
  uint32_t rows, width;
  bool accumulate;
};
void column_sum(ph_device& device, const ColumnSum& call);

// x, out: [rows, width]; weight, bias, running_mean, running_variance: [width]; saved: [2, width].
struct BatchNorm {
  const float *x, *weight, *bias;
  float *running_mean, *running_variance, *saved, *out;
  uint32_t rows, width;
  float epsilon, momentum;
  bool training;
};
void batch_norm(ph_device& device, const BatchNorm& call);
// saved: [2, width] of batch_norm, or [2, rows] of layer_norm; dx, dweight, dbias: null or as x, weight, bias; the last two
// are always added to what is there.
struct NormBackward {
  const float *x, *weight, *saved, *dy;
  float *dx, *dweight, *dbias;
  uint32_t rows, width;
  bool accumulate;
};
void batch_norm_backward(ph_device& device, const NormBackward& call);

// x, out: [rows, width]; weight, bias: [width]; saved: [2, rows].
struct LayerNorm {
  const float *x, *weight, *bias;
  float *saved, *out;
  uint32_t rows, width;
  float epsilon;
};
void layer_norm(ph_device& device, const LayerNorm& call);
void layer_norm_backward(ph_device& device, const NormBackward& call);

// x, out: [count].
struct Dropout {
  const float* x;
  float* out;
  uint64_t count, seed;
  float probability;
  bool accumulate;
};
void dropout(ph_device& device, const Dropout& call);
// What a random word must reach for its element to stay.
inline uint64_t dropout_threshold(float probability) {
  return static_cast<uint64_t>(static_cast<double>(probability) * 4294967296.0);
}

// logits, probabilities: [rows, classes]; labels: [rows]; loss: [1]; row_losses: null or [rows]; predictions: null or [rows].
struct CrossEntropy {
  const float* logits;
  const int32_t* labels;
  float *probabilities, *loss, *row_losses;
  int32_t* predictions;
  uint32_t rows, classes;
  float scale;
};
void cross_entropy(ph_device& device, const CrossEntropy& call);
struct CrossEntropyBackward {
  const float* probabilities;
  const int32_t* labels;
  const float* dy;
  float* dx;
  uint32_t rows, classes;
  float scale;
  bool accumulate;
};
void cross_entropy_backward(ph_device& device, const CrossEntropyBackward& call);

// x: [count]; out: [1].
void squared_norm(ph_device& device, const float* x, float* out, uint64_t count);

// parameters, gradients, first, second: [count]; squared_norm: null or [1].
struct Adam {
  float* parameters;
  const float* gradients;
  float *first, *second;
  const float* squared_norm;
  uint64_t count;
  float learning_rate, beta1, beta2, epsilon, weight_decay, correction1, correction2, most_norm;
  bool decoupled;
};
void adam(ph_device& device, const Adam& call);

}  // namespace ph::graph
