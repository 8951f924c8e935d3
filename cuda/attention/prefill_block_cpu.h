// Prefill attention on one CPU core. prefill_block_cpu.cpp is compiled once per instruction set, and every compilation
// fills a table like this one. Fused multiply-adds are allowed, so results differ between instruction sets in the last
// bits of a float.
#pragma once

#include "attention/prefill.h"
#include "kv/tile_cpu.h"

namespace ph::attention {

// One call of prefill.
struct PrefillCall {
  const kv::CacheView& cache;
  const kv::TileShape& shape;
  const uint32_t layer;
  const kv::StepView& step;
  const kv::StepTensors tensors;
  const uint8_t* queries;
  uint8_t* out;
  const float scale;
  const uint32_t window;

  uint32_t group() const { return cache.query_heads / cache.heads; }
};

constexpr uint32_t kPrefillRows = 64;  // of a tile

struct PrefillKernels {
  const char* instruction_set;

  // Rows [first, first + kPrefillRows), as far as there are, of a step's entry and kv head.
  void (*attend)(const PrefillCall& call, uint32_t entry, uint32_t head, uint32_t first);
};

}  // namespace ph::attention
