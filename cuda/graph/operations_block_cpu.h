// The operations of operations.h on one CPU core, for some rows, columns or elements. matrix_block_cpu.cpp and
// rows_block_cpu.cpp are compiled once per instruction set, and every compilation fills tables like these.
#pragma once

#include "graph/operations.h"

namespace ph::graph {

struct MatrixKernels {
  const char* instruction_set;
  uint32_t tile_rows;  // that are computed together
  void (*multiply)(const Multiply& call, uint32_t first_row, uint32_t last_row);
};

// Functions of [first, last), rows or elements, but for those of columns, which count vectors of `lanes` of them.
struct RowKernels {
  const char* instruction_set;
  uint32_t lanes;
  void (*aggregate)(const Aggregate& call, uint32_t first, uint32_t last);
  void (*edge_dot)(const EdgeDot& call, uint32_t first, uint32_t last);
  void (*segment_max)(const SegmentMax& call, uint32_t first, uint32_t last);
  void (*segment_softmax)(const SegmentSoftmax& call, uint32_t first, uint32_t last);
  void (*segment_softmax_backward)(const SegmentSoftmaxBackward& call, uint32_t first, uint32_t last);
  void (*head_dot)(const HeadDot& call, uint32_t first, uint32_t last);
  void (*head_dot_dx)(const HeadDotBackward& call, uint32_t first, uint32_t last);
  void (*activate)(const Activate& call, uint64_t first, uint64_t last);
  void (*activate_backward)(const ActivateBackward& call, uint64_t first, uint64_t last);
  void (*combine)(const Combine& call, uint64_t first, uint64_t last);
  void (*product)(const Product& call, uint64_t first, uint64_t last);
  void (*dropout)(const Dropout& call, uint64_t first, uint64_t last);
  void (*layer_norm)(const LayerNorm& call, uint32_t first, uint32_t last);
  void (*layer_norm_dx)(const NormBackward& call, uint32_t first, uint32_t last);
  double (*cross_entropy)(const CrossEntropy& call);  // all rows; the sum of their losses
  void (*adam)(const Adam& call, float clip, uint64_t first, uint64_t last);
  // By columns.
  void (*head_dot_da)(const HeadDotBackward& call, uint32_t first, uint32_t last);
  void (*column_sum)(const ColumnSum& call, uint32_t first, uint32_t last);
  void (*batch_norm)(const BatchNorm& call, uint32_t first, uint32_t last);
  void (*batch_norm_backward)(const NormBackward& call, uint32_t first, uint32_t last);
  void (*layer_norm_parameters)(const NormBackward& call, uint32_t first, uint32_t last);
};

}  // namespace ph::graph
