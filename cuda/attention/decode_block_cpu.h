// Decode attention on one CPU core. decode_block_cpu.cpp is compiled once per instruction set, and every compilation
// fills a table like this one. Fused multiply-adds are allowed, so results differ between instruction sets in the last
// bits of a float.
#pragma once

#include "attention/decode.h"
#include "kv/tile_cpu.h"

namespace ph::attention {

// One call of decode.
struct DecodeCall {
  const kv::CacheView& cache;
  const kv::TileShape& shape;
  const uint32_t layer;
  const kv::StepView& step;
  const uint8_t* queries;
  uint8_t* out;
  const float scale;
  float* partials;  // [pieces][most_queries][query_heads][head_dim + 2]
  const uint32_t window;

  // The first token, sinks aside, that some query token of a sequence sees.
  uint32_t seen_from(const kv::StepSequence& sequence) const {
    return kv::window_begin(window, static_cast<uint32_t>(sequence.before));
  }
};

struct DecodeKernels {
  const char* instruction_set;

  // The partial results of a piece for the query heads of one kv head.
  void (*attend)(const DecodeCall& call, uint32_t piece, uint32_t head);

  // Merges those of a sequence's pieces, of which `first` is the first, for one query head.
  void (*merge)(const DecodeCall& call, uint32_t first, uint32_t query_head);
};

}  // namespace ph::attention
