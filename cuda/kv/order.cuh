// The median order of a block, by one thread block.
#pragma once

#include "kv/quantize.cuh"

namespace ph::kv {

// Counts the bytes of a word that do not exceed those of `limits`.
__device__ __forceinline__ uint32_t count_at_most(uint32_t word, uint32_t limits) {
  return __popc(__vcmpleu4(word, limits)) / 8;
}

// order[i] for the lower medians of the tokens' value codes, descending, stable. A warp finds a token's median by
// bisection on its value: at most eight passes over the token's codes. Synchronises before it returns.
__device__ inline void median_order(const Codec& codec, const uint8_t* value_codes, uint32_t* medians,
                                    uint8_t* order) {
  const uint32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  const uint32_t words = codec.channels / 4, wanted = (codec.channels - 1) / 2 + 1;
  for (uint32_t token = warp; token < kBlockTokens; token += blockDim.x / kWarpThreads) {
    const uint32_t* codes = reinterpret_cast<const uint32_t*>(value_codes + token * codec.channels);
    uint32_t every = 0;
    for (uint32_t i = lane; i < words; i += kWarpThreads) every |= codes[i];
    every = __reduce_or_sync(kEveryLane, every);
    uint32_t low = 0, high = (1u << bit_width((every | every >> 8 | every >> 16 | every >> 24) & 0xff)) - 1;
    while (low < high) {
      const uint32_t middle = (low + high) / 2, limits = middle * 0x01010101u;
      uint32_t count = 0;
      for (uint32_t i = lane; i < words; i += kWarpThreads) count += count_at_most(codes[i], limits);
      count = __reduce_add_sync(kEveryLane, count);
      if (count >= wanted) high = middle;
      else low = middle + 1;
    }
    if (lane == 0) medians[token] = low;
  }
  __syncthreads();
  if (threadIdx.x < kBlockTokens) {
    const uint32_t token = threadIdx.x, median = medians[token];
    uint32_t rank = 0;
    for (uint32_t other = 0; other < kBlockTokens; ++other) {
      rank += medians[other] > median || (medians[other] == median && other < token);
    }
    order[rank] = static_cast<uint8_t>(token);
  }
  __syncthreads();
}

}  // namespace ph::kv
