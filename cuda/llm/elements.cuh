// How kernels read and write tensors whose dtype is known at run time, N (1 or 4) elements at a time, and how the threads
// of a block combine their values. Tensors begin at multiples of 16 bytes; four elements begin at multiples of four.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <initializer_list>
#include <type_traits>

#include "device/device_cuda.h"
#include "llm/operations.h"

namespace ph::llm {

constexpr uint32_t kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ __forceinline__ float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ float2 unpack_pair(uint32_t dtype, uint32_t pair) {
  if (dtype == PH_BF16) return make_float2(bf16_low(pair), bf16_high(pair));
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

__device__ __forceinline__ uint16_t round_to_16(uint32_t dtype, float value) {
  if (dtype == PH_BF16) return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  return __half_as_ushort(__float2half_rn(value));
}

template <int N>
struct Values {
  float at[N];
};

template <int N>
__device__ __forceinline__ Values<N> load(Source x, uint64_t index) {
  static_assert(N == 1 || N == 4, "elements are loaded one or four at a time");
  Values<N> values;
  if constexpr (N == 4) {
    if (x.dtype == PH_F32) {
      const float4 four = *reinterpret_cast<const float4*>(x.data + index * 4);
      values.at[0] = four.x;
      values.at[1] = four.y;
      values.at[2] = four.z;
      values.at[3] = four.w;
    } else {
      const uint2 pairs = *reinterpret_cast<const uint2*>(x.data + index * 2);
      const float2 first = unpack_pair(x.dtype, pairs.x), second = unpack_pair(x.dtype, pairs.y);
      values.at[0] = first.x;
      values.at[1] = first.y;
      values.at[2] = second.x;
      values.at[3] = second.y;
    }
  } else {
    if (x.dtype == PH_F32) values.at[0] = reinterpret_cast<const float*>(x.data)[index];
    else values.at[0] = unpack_pair(x.dtype, reinterpret_cast<const uint16_t*>(x.data)[index]).x;
  }
  return values;
}

template <int N>
__device__ __forceinline__ void store(Target out, uint64_t index, const Values<N>& values) {
  if constexpr (N == 4) {
    const float* at = values.at;
    if (out.dtype == PH_F32) {
      *reinterpret_cast<float4*>(out.data + index * 4) = make_float4(at[0], at[1], at[2], at[3]);
    } else {
      const auto pair = [&](float low, float high) {
        return round_to_16(out.dtype, low) | static_cast<uint32_t>(round_to_16(out.dtype, high)) << 16;
      };
      *reinterpret_cast<uint2*>(out.data + index * 2) = make_uint2(pair(at[0], at[1]), pair(at[2], at[3]));
    }
  } else {
    if (out.dtype == PH_F32) reinterpret_cast<float*>(out.data)[index] = values.at[0];
    else reinterpret_cast<uint16_t*>(out.data)[index] = round_to_16(out.dtype, values.at[0]);
  }
}

__device__ __forceinline__ Source as_source(Target x) { return {x.data, x.dtype}; }

// Orders floats as unsigned integers do; NaN below -infinity, and both at 0.
__device__ __forceinline__ uint32_t order_of(float value) {
  const uint32_t bits = __float_as_uint(value == value ? value + 0.0f : -INFINITY);  // one zero
  const uint32_t order = bits >> 31 ? ~bits : bits | 0x80000000u;
  return order - 0x007fffffu;
}

// The values of a block's threads combined, for all of them; always in the same order. Threads is a multiple of 32. All
// threads take part.
template <uint32_t Threads, typename T, typename Combine>
__device__ __forceinline__ T combine_block(T value, Combine combine) {
  for (uint32_t distance = kWarp / 2; distance > 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  if constexpr (Threads > kWarp) {
    constexpr uint32_t kWarps = Threads / kWarp;
    __shared__ T partials[kWarps];
    if (threadIdx.x % kWarp == 0) partials[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = partials[0];
    for (uint32_t warp = 1; warp < kWarps; ++warp) value = combine(value, partials[warp]);
    __syncthreads();  // before partials are written again
  }
  return value;
}

// Calls `run` with 4 if all of these are multiples of it, else with 1, as template arguments.
template <typename Run>
void dispatch_width(std::initializer_list<uint64_t> multiples, Run run) {
  uint64_t all = 0;
  for (const uint64_t each : multiples) all |= each;
  if (all % 4 == 0) run(std::integral_constant<int, 4>{});
  else run(std::integral_constant<int, 1>{});
}

// Thread blocks of `threads` for so many items, of which a thread may do several.
inline uint32_t grid_for(uint64_t items, uint32_t threads) {
  constexpr uint64_t kMostBlocks = 1u << 20;
  const uint64_t blocks = (items + threads - 1) / threads;
  return static_cast<uint32_t>(blocks < kMostBlocks ? blocks : kMostBlocks);
}

constexpr uint32_t kElementThreads = 256;  // of a block, of kernels that for_columns is for

// Calls use(row, column) for the first of every N columns of [rows, width].
template <int N, typename Use>
__device__ __forceinline__ void for_columns(uint32_t rows, uint64_t width, Use use) {
  const uint64_t columns = width / N, items = rows * columns;
  const uint64_t threads = static_cast<uint64_t>(gridDim.x) * kElementThreads;
  for (uint64_t item = static_cast<uint64_t>(blockIdx.x) * kElementThreads + threadIdx.x; item < items;
       item += threads) {
    // A division of 32 bits is several times as fast.
    const uint64_t row =
        items >> 32 ? item / columns : static_cast<uint32_t>(item) / static_cast<uint32_t>(columns);
    use(row, (item - row * columns) * N);
  }
}

}  // namespace ph::llm
