// How attention's kernels are chosen and launched, and how they, and their thread blocks, follow each other.
#pragma once

#include <type_traits>

#include "device/device_cuda.h"
#include "kv/cache.h"

namespace ph::attention {

// A kernel launched by launch_overlapping may begin while the one before it in the stream ends. Here it waits for that one,
// with all it wrote, and lets the next one begin likewise. Before, it may read only what was there before that one began:
// whoever lets the next kernel begin has itself waited.
__device__ __forceinline__ void await_preceding() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

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

// Launches a kernel all of whose thread blocks call await_preceding before they access what the kernel before may write,
// or write what it may read.
template <typename Parameters>
void launch_overlapping(const ph_device& device, void (*kernel)(Parameters), dim3 grid, uint32_t threads,
                        uint32_t shared_bytes, const Parameters& parameters) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = grid;
  launch.blockDim = dim3(threads);
  launch.dynamicSmemBytes = shared_bytes;
  launch.stream = device.stream;
  launch.attrs = &overlap;
  launch.numAttrs = device.major >= 9 ? 1 : 0;
  PH_CUDA_TRY(cudaLaunchKernelEx(&launch, kernel, parameters));
}

}  // namespace ph::attention
