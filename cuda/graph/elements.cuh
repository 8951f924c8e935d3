// How kernels on float32 matrices go over elements, N (1 or 4) at a time; four begin at multiples of four, which are
// multiples of 16 bytes.
#pragma once

#include "graph/operations.h"
#include "llm/elements.cuh"

namespace ph::graph {

using llm::combine_block;
using llm::dispatch_width;
using llm::for_columns;
using llm::grid_for;
using llm::kAllLanes;
using llm::kWarp;
using llm::Values;

constexpr uint32_t kThreads = llm::kElementThreads;
constexpr uint32_t kWarps = kThreads / kWarp;

template <int N>
__device__ __forceinline__ Values<N> load(const float* x, uint64_t index) {
  static_assert(N == 1 || N == 4, "elements are loaded one or four at a time");
  if constexpr (N == 4) {
    const float4 four = *reinterpret_cast<const float4*>(x + index);
    return {{four.x, four.y, four.z, four.w}};
  } else {
    return {{x[index]}};
  }
}

// Writes values, or adds them to what is there.
template <int N>
__device__ __forceinline__ void store(float* out, uint64_t index, Values<N> values, bool accumulate = false) {
  if (accumulate) {
    const Values<N> there = load<N>(out, index);
    for (int i = 0; i < N; ++i) values.at[i] += there.at[i];
  }
  if constexpr (N == 4) {
    *reinterpret_cast<float4*>(out + index) =
        make_float4(values.at[0], values.at[1], values.at[2], values.at[3]);
  } else {
    out[index] = values.at[0];
  }
}

// Calls use(n, first) for the first of every four elements with n.value 4, and for each of those left with 1.
template <typename Use>
__device__ __forceinline__ void for_elements(uint64_t count, Use use) {
  const uint64_t threads = static_cast<uint64_t>(gridDim.x) * kThreads;
  for (uint64_t i = (static_cast<uint64_t>(blockIdx.x) * kThreads + threadIdx.x) * 4; i < count;
       i += threads * 4) {
    if (count - i >= 4) {
      use(std::integral_constant<int, 4>{}, i);
    } else {
      for (uint64_t last = i; last < count; ++last) use(std::integral_constant<int, 1>{}, last);
    }
  }
}

// The blocks for what for_elements goes over.
inline uint32_t blocks_of(uint64_t count) { return grid_for((count + 3) / 4, kThreads); }

// A group of lanes takes an item; several groups make a warp, whose lanes stay together so that they may shuffle.
constexpr uint32_t kGroup = 8;

// Calls use(item, whether there is such an item, lane of the group) in all lanes of a warp alike.
template <typename Use>
__device__ __forceinline__ void for_groups(uint64_t items, Use use) {
  constexpr uint32_t kGroups = kWarp / kGroup;
  const uint64_t warps = static_cast<uint64_t>(gridDim.x) * kWarps;
  const uint32_t lane = threadIdx.x % kWarp;
  for (uint64_t warp = static_cast<uint64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
       warp * kGroups < items; warp += warps) {
    const uint64_t item = warp * kGroups + lane / kGroup;
    use(item, item < items, lane % kGroup);
  }
}

inline uint32_t blocks_of_groups(uint64_t items) { return grid_for(items, kThreads / kGroup); }

// The values of Lanes neighbouring lanes combined, for all of them. All lanes of the warp take part.
template <uint32_t Lanes, typename T, typename Combine>
__device__ __forceinline__ T combine_lanes(T value, Combine combine) {
  for (uint32_t distance = Lanes / 2; distance > 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}
template <uint32_t Lanes, typename T>
__device__ __forceinline__ T sum_lanes(T value) {
  return combine_lanes<Lanes>(value, [](T a, T b) { return a + b; });
}

}  // namespace ph::graph
