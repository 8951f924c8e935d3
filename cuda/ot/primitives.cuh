// The instructions that the kernels of optimal transport use and CUDA C++ has no plain name for.
#pragma once

#include "device/overlap.cuh"

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

// To 1 ulp.
__device__ __forceinline__ float square_root(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The same value, of which the compiler does not know that: it computes anew what depends on it, instead of keeping it in
// registers from far above.
__device__ __forceinline__ uint32_t hidden(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
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

// Counts a thread block's arrival, of which one thread calls this after a barrier; how many came before. What those wrote is
// seen by all threads of this one after another barrier.
__device__ __forceinline__ uint32_t arrive(uint32_t* arrivals) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(arrivals) : "memory");
  return before;
}

// All thread blocks of a cooperative launch meet; `arrivals` counts on from 0, a block's `meetings` too. What a block wrote
// before is seen by all.
__device__ __forceinline__ void grid_barrier(uint32_t* arrivals, uint32_t& meetings) {
  ++meetings;
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrivals) : "memory");
    const uint32_t all = meetings * gridDim.x;
    uint32_t seen;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrivals) : "memory");
    } while (static_cast<int32_t>(seen - all) < 0);
  }
  __syncthreads();
}

// 16 bytes from global to shared memory, in the background; zeros where not `present`.
__device__ __forceinline__ void copy_ahead(void* to, const void* from, bool present) {
  const uint32_t target = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(from), "r"(present ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of copies but the last kPending.
template <int kPending>
__device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ uint32_t shared_address(const void* place) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(place));
}

// Four 8 x 8 matrices of 16-bit elements in shared memory, whose rows start where the lanes 8 i .. 8 i + 7 say for the i-th.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}
// sums [16, 8] += a [16, 16] b [16, 8] of float16, in float32.
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
      "%1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace ph::ot
