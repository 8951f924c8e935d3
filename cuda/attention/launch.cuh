// How attention's kernels follow each other, and how their thread blocks do.
#pragma once

#include "device/device_cuda.h"

namespace ph::attention {

// A kernel launched by launch_overlapping may begin while the one before it in the stream ends. Here it waits for that one,
// with all it wrote, and lets the next one begin likewise.
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

// Launches a kernel whose first access to what kernels write, or read and then overwrite, comes after await_preceding.
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
