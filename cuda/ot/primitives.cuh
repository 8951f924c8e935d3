// The instructions that the kernels of optimal transport use and CUDA C++ has no plain name for.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace ph::ot {

constexpr uint32_t kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

// The dynamic shared memory of the thread block.
__device__ __forceinline__ float4* dynamic_shared() {
  extern __shared__ float4 dynamic[];
  return dynamic;
}

// 2^x to 2 ulp; 0 below 2^-126.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The same value, of which the compiler does not know that: it computes anew what depends on it, instead of keeping it in
// registers from far above.
__device__ __forceinline__ uint32_t hidden(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// The launches of one call overlap: one begins as soon as all thread blocks of the one before have begun. Only the first
// waits for what precedes the call; the last thread block of each waits for the launch before, so that whatever follows the
// call follows all of it.
__device__ __forceinline__ void await_preceding() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Thread blocks of a cluster, and their shared memory.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// Where the thread block of that rank has what this one has at `own`.
template <typename T>
__device__ __forceinline__ const T* in_cluster(const T* own, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(reinterpret_cast<uint64_t>(own)), "r"(rank));
  return reinterpret_cast<const T*>(there);
#else
  (void)rank;
  return own;
#endif
}

}  // namespace ph::ot
