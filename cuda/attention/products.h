// The two products of attention alone, for one sequence and layer of a growing cache: scores q . K, and weighted values
// w . V. Packed blocks are unpacked in registers.
//
// Both cut the sequence's tokens into units: runs of 16 tokens in 16 bits, sinks first, and the packed blocks; runs come
// before blocks on the CPU, and lie between them on a GPU. Pieces of units are what cores, or thread blocks, work on. How many
// there are follows from the sequence, the cache's shape and the machine, and sums of pieces are added in their order, so that
// results are the same bits every time.
#pragma once

#include "kv/cache.h"

namespace ph::attention {

constexpr uint32_t kMostGroup = 16;  // query heads of a kv head, as the cache allows

// The tokens of a sequence in one layer.
struct SequenceTokens {
  uint32_t layer, sequence;
  uint32_t length, packed;  // tokens; packed blocks
  uint32_t settled;         // of the packed blocks, how many were there before the last step began

  // Of the sinks there may be fewer than the cache has room for.
  PH_HOST_DEVICE uint32_t sinks(const kv::CacheView& cache) const {
    return cache.sinks < length ? cache.sinks : length;
  }
  // The first token after the packed blocks.
  PH_HOST_DEVICE uint32_t unpacked(const kv::CacheView& cache) const {
    return cache.sinks + packed * kv::kBlockTokens;
  }
  // Tokens in 16 bits.
  PH_HOST_DEVICE uint32_t recent(const kv::CacheView& cache) const {
    const uint32_t first = unpacked(cache);
    return sinks(cache) + (first < length ? length - first : 0);
  }
  // Which token is the `at`-th of those.
  PH_HOST_DEVICE uint32_t recent_token(const kv::CacheView& cache, uint32_t at) const {
    const uint32_t first = sinks(cache);
    return at < first ? at : unpacked(cache) + (at - first);
  }
  PH_HOST_DEVICE uint32_t runs(const kv::CacheView& cache) const {
    return (recent(cache) + kv::kRunTokens - 1) / kv::kRunTokens;
  }
};

// How a sequence's units are dealt to equal shares, and its runs are as far apart among them as can be. Without divisions,
// which a warp of a GPU would wait for before it can ask for anything.
struct UnitShares {
  uint64_t of_share, runs_of_unit;  // units and runs, on average, times 2^32; rounded up, and down

  UnitShares() = default;
  UnitShares(uint32_t units, uint32_t runs, uint32_t shares)
      : of_share(((uint64_t{units} << 32) + shares - 1) / shares),
        runs_of_unit((uint64_t{runs} << 32) / units) {}

  PH_HOST_DEVICE uint32_t first_unit(uint32_t share) const {
    return static_cast<uint32_t>(share * of_share >> 32);
  }
  PH_HOST_DEVICE uint32_t runs_before(uint32_t unit) const {
    return static_cast<uint32_t>((unit * runs_of_unit + UINT32_MAX) >> 32);
  }
};

inline uint64_t most_product_units(const kv::CacheView& cache) {
  const uint64_t recent = static_cast<uint64_t>(cache.sinks) + cache.ring;
  return (recent + kv::kRunTokens - 1) / kv::kRunTokens + cache.most_blocks;
}

// Scratch memory of `weigh`. It may be that of `decode`, whose counters are left as they were.
uint64_t products_workspace_bytes(const kv::CacheView& cache);

// queries: [query_heads, head_dim] of the cache's dtype; out: [query_heads, length] f32 = scale * q . k of every token.
void score(ph_device& device, const kv::CacheView& cache, const kv::TileShape& shape,
           const SequenceTokens& tokens, const uint8_t* queries, float* out, float scale);

// weights: [query_heads, length] f32; out: [query_heads, head_dim] f32 = the sum of every token's weight * value.
void weigh(ph_device& device, const kv::CacheView& cache, const kv::TileShape& shape,
           const SequenceTokens& tokens, const float* weights, float* out, uint8_t* workspace);

}  // namespace ph::attention
