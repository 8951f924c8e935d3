// Kernels that begin while the one before them in the stream ends (programmatic dependent launch), and clusters of thread
// blocks.
#pragma once

#include "device/device_cuda.h"

namespace ph {

// A kernel launched by launch_overlapping may begin while the one before it in the stream ends. This waits for that one,
// with all it wrote.
__device__ __forceinline__ void wait_for_preceding() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel begin, once all thread blocks have called it or ended.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Both, for kernels of which one follows another. Before, a kernel may read only what was there before that one began:
// whoever lets the next kernel begin has itself waited. (But for scores alone, attention/products.cu, which let it
// begin at once: what it may read then was there before the kv cache's step began, behind whose plan, no kernel, all are
// enqueued.) Every thread block calls it, so that the next kernel, when it has waited for this one, has waited for the one
// before as well.
__device__ __forceinline__ void await_preceding() {
  wait_for_preceding();
  let_next_begin();
}

// Thread blocks of a cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
// A barrier of all their threads, after which they see what the others wrote before; in two halves or at once.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Launches a kernel whose thread blocks write nothing, and read nothing that the kernel before writes, until they have
// waited for it. Of the grid's first dimension, `cluster` thread blocks at a time form a cluster, unless it is 0: on GPUs
// from sm_90 on.
template <typename Parameters>
void launch_overlapping(const ph_device& device, void (*kernel)(Parameters), dim3 grid, uint32_t threads,
                        uint32_t shared_bytes, const Parameters& parameters, uint32_t cluster = 0) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = grid;
  launch.blockDim = dim3(threads);
  launch.dynamicSmemBytes = shared_bytes;
  launch.stream = device.stream;
  launch.attrs = attributes;
  launch.numAttrs = device.major < 9 ? 0 : cluster == 0 ? 1 : 2;
  PH_CUDA_TRY(cudaLaunchKernelEx(&launch, kernel, parameters));
}

}  // namespace ph
