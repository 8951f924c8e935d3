// The operations of operations.h on one CPU core, by rows and tiles. linear_block_cpu.cpp and rows_block_cpu.cpp are
// compiled once per instruction set, and every compilation fills tables like these.
#pragma once

#include "llm/operations.h"

namespace ph::llm {

struct LinearKernels {
  const char* instruction_set;
  uint32_t tile;  // output features that are computed together
  // Rows that are multiplied while a tile's weights, converted, stay in the first cache, given that x's rows have so many
  // features: as many as the second cache holds.
  uint32_t (*block_rows)(uint32_t in_features);
  // Tiles [first, last) of the output of rows [first_row, last_row), of which there are at most block_rows.
  void (*multiply)(const Linear& call, uint32_t first_row, uint32_t last_row, uint32_t first, uint32_t last);
};

struct RowKernels {
  const char* instruction_set;
  void (*convert)(Source x, Target out, uint64_t count);
  void (*add)(Target x, Source y, uint64_t count);
  void (*rms_norm)(Source x, Source weight, Target out, uint32_t width, float epsilon);
  // One head, by the cosines and sines of its rotary_dim / 2 angles.
  void (*rope)(Source x, const float* cosines, const float* sines, Target out, uint32_t head_dim,
               uint32_t rotary_dim);
  void (*swiglu)(Source gate, Source up, Target out, uint32_t width);
  int32_t (*argmax)(Source logits, uint32_t vocabulary);
  float (*cross_entropy)(Source logits, int32_t target, uint32_t vocabulary);
  float (*divergence)(Source reference, Source logits, uint32_t vocabulary);
};

// The tables of the instruction set that kv::block_kernels() chose.
const LinearKernels& linear_kernels();
const RowKernels& row_kernels();

}  // namespace ph::llm
