// How attention's kernels are chosen and launched, and how they, and their thread blocks, follow each other.
#pragma once

#include <type_traits>

#include "device/overlap.cuh"
#include "kv/cache.h"

namespace ph::attention {

// One thread of each of `count` thread blocks calls it, after a barrier, and a barrier follows: true in the last one, which
// sees what all of them wrote before.
__device__ __forceinline__ bool is_last_arrival(uint32_t* arrivals, uint32_t count) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(arrivals) : "memory");
  return before == count - 1;
}

// Calls run(head_dim as a constant).
template <typename Run>
void dispatch_dim(uint32_t head_dim, Run run) {
  if (head_dim == 64) run(std::integral_constant<int, 64>{});
  else if (head_dim == 96) run(std::integral_constant<int, 96>{});
  else if (head_dim == 128) run(std::integral_constant<int, 128>{});
  else run(std::integral_constant<int, 256>{});
}

// Calls run(how many tiles of four columns, as a constant). By the group alone, not by a step's tokens: a sequence's
// results must not depend on the rest of the batch. One tile leaves more registers to wide heads.
template <int kDim, typename Run>
void dispatch_tiles(const kv::CacheView& cache, Run run) {
  if constexpr (kDim < 256) {
    if (cache.query_heads / cache.heads > 4) return run(std::integral_constant<int, 2>{});
  }
  run(std::integral_constant<int, 1>{});
}

}  // namespace ph::attention
