// The products of products.h on one CPU core. products_block_cpu.cpp is compiled once per instruction set, and every
// compilation fills a table like this one.
#pragma once

#include "attention/products.h"
#include "kv/tile_cpu.h"

namespace ph::attention {

// One call of score or weigh.
struct ProductCall {
  const kv::CacheView& cache;
  const kv::TileShape& shape;
  const SequenceTokens& tokens;

  uint32_t group() const { return cache.query_heads / cache.heads; }
};

struct ProductKernels {
  const char* instruction_set;

  // Scores of units [first, last) for the query heads of one kv head.
  void (*score)(const ProductCall& call, uint32_t head, uint32_t first, uint32_t last, const uint8_t* queries,
                float* out, float scale);

  // Sums of weighted values of those units, [query_heads, head_dim] of which the kv head's are written.
  void (*weigh)(const ProductCall& call, uint32_t head, uint32_t first, uint32_t last, const float* weights,
                float* sums);
};

}  // namespace ph::attention
