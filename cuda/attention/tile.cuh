// Attention on one packed tile by one warp: integer tensor-core products straight on the unpacked residuals.
//
// Columns of every B and C fragment come in pairs: a query as 16-bit fixed point is a high and a low signed byte, in
// columns 2c and 2c + 1, so that one n = 8 tile serves four columns (queries or heads of the group) and the lane
// (g, i) = (lane / 4, lane % 4) of a C fragment holds both halves of column i. kTiles such tiles run side by side and
// share the unpacking.
//
// With code = base + residual and x' = (code + zero) * scale of the token:
//   keys:    q . x' = scale * (sum q * residual + sum q * base + zero * sum q)
//   values:  sum w * x' over tokens, w = probability * scale: sum w * residual + base * sum w + sum w * zero
// Weights are taken relative to the tile's largest probability and scale, in 16-bit fixed point as well.
// Everything is deterministic; a warp's tiles are added up in their order.
#pragma once

#include "kv/quantize.cuh"
#include "kv/tile.h"

namespace ph::attention {

using kv::kEveryLane;
using kv::kWarpThreads;

constexpr float kLargestFixed = 32600.0f;  // below 2^15 - 128, so that the rounded high byte stays one
constexpr float kFixedMagic = 12582912.0f + 128.0f;  // 1.5 * 2^23 + 128: the float's low 16 bits hold x + 128
constexpr float kLazyRescale = 24.0f;  // the running reference moves only when a tile exceeds it by 2^24

__device__ __forceinline__ void multiply_add(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The first product of a sum.
__device__ __forceinline__ void multiply(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%10,%10,%10};"
      : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(0));
}

__device__ __forceinline__ float exponential(float x) {  // 2^x
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A sum of products with high bytes and one with low bytes: at most 240 * 128 * 256 each, so that it fits 32 bits.
__device__ __forceinline__ float joined(int high, int low) { return static_cast<float>(high * 256 + low); }

// Four fixed-point words (x + 128 in the low 16 bits) as four high bytes and four low, signed bytes.
__device__ __forceinline__ void split_fixed(const uint32_t* x, uint32_t& high, uint32_t& low) {
  const uint32_t a = __byte_perm(x[0], x[1], 0x4051), b = __byte_perm(x[2], x[3], 0x4051);
  high = __byte_perm(a, b, 0x5410);
  low = __byte_perm(a, b, 0x7632) ^ 0x80808080u;
}

// Register (s, j) of a lane from the 2 * kWidth words of a group (tile.h).
template <int kWidth>
__device__ __forceinline__ uint32_t fragment(const uint32_t* words, int s, int j) {
  const int k = 2 * s + j % 2, nibble = 4 * (j / 2);
  if constexpr (kWidth == 4) return words[k] & 0x0f0f0f0fu << nibble;
  if constexpr (kWidth == 3) {
    if (k < 6) return words[k] & 0x07070707u << nibble;
    const uint32_t* spare = words + 3 * (k - 6);
    const uint32_t bits =
        (spare[0] >> 3 & 0x11111111u) | (spare[1] >> 2 & 0x22222222u) | (spare[2] >> 1 & 0x44444444u);
    return bits & 0x07070707u << nibble;
  }
  if constexpr (kWidth == 2) return words[k / 2] >> 2 * (k % 2) & 0x03030303u << nibble;
  return words[k / 4] >> k % 4 & 0x01010101u << nibble;
}

// A lane's words of a group in shared memory.
template <int kWidth>
__device__ __forceinline__ void load_group(const uint8_t* group, uint32_t* words) {
  const uint32_t lane = threadIdx.x % kWarpThreads;
  const auto vector = [&](uint32_t at) {
    const uint4 four = *reinterpret_cast<const uint4*>(group + 512 * at + 16 * lane);
    words[4 * at] = four.x;
    words[4 * at + 1] = four.y;
    words[4 * at + 2] = four.z;
    words[4 * at + 3] = four.w;
  };
  if constexpr (kWidth >= 2) vector(0);
  if constexpr (kWidth == 4) vector(1);
  if constexpr (kWidth % 2 == 1) {
    const uint2 two = *reinterpret_cast<const uint2*>(group + 512 * (kWidth / 2) + 8 * lane);
    words[2 * kWidth - 2] = two.x;
    words[2 * kWidth - 1] = two.y;
  }
}

// Calls use(std::integral_constant<int, width>) for a width of 1 to 4 that the whole warp agrees on; none() for 0.
template <typename Use, typename None>
__device__ __forceinline__ void with_width(uint32_t width, Use use, None none) {
  switch (width) {
    case 1:
      use(std::integral_constant<int, 1>{});
      break;
    case 2:
      use(std::integral_constant<int, 2>{});
      break;
    case 3:
      use(std::integral_constant<int, 3>{});
      break;
    case 4:
      use(std::integral_constant<int, 4>{});
      break;
    default:
      none();
      break;
  }
}

// Width of the low (digit 0) or high (digit 1) part of a group.
__device__ __forceinline__ uint32_t digit_width(uint32_t width, int digit) {
  return digit == 0 ? min(width, 4u) : width > 4 ? width - 4 : 0;
}

// Whether any group of a header word is wider than 4 bits.
__device__ __forceinline__ bool any_wide(uint32_t widths) {
  return (widths + 0x33333333u & 0x88888888u) != 0;
}

// Eight 16-bit scales, as floats.
template <bool kBfloat>
__device__ __forceinline__ void load_scales(const uint8_t* source, float (&scales)[8]) {
  const uint4 words = *reinterpret_cast<const uint4*>(source);
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kBfloat) {
      scales[2 * i] = __uint_as_float(pairs[i] << 16);
      scales[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    } else {
      const float2 two = __half22float2(*reinterpret_cast<const __half2*>(&pairs[i]));
      scales[2 * i] = two.x;
      scales[2 * i + 1] = two.y;
    }
  }
}

// Eight 16-bit zero points, as floats: biased, they are the fraction of 2^23 + x.
__device__ __forceinline__ void load_zeros(const uint8_t* source, float (&zeros)[8]) {
  const uint4 words = *reinterpret_cast<const uint4*>(source);
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t biased = pairs[i] ^ 0x80008000u;
    zeros[2 * i] = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7610)) - (8388608.0f + 32768.0f);
    zeros[2 * i + 1] = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7632)) - (8388608.0f + 32768.0f);
  }
}

// A tile in shared memory, both parts 16-aligned.
struct Tile {
  const uint8_t* params;
  const uint8_t* record;
};

// Positions within the records of a layer.
struct TileLayout {
  uint32_t value_bases, groups;   // bytes; the key bases follow the header
  bool narrow_bases[kv::kParts];  // of 4 bits
};

// What a warp knows of its columns: lane (g, i) holds those of column 4 * tile + i.
template <int kDim, int kTiles>
struct WarpState {
  uint32_t queries[kTiles][kDim / 16];  // B fragments of the queries
  float query_scale[kTiles];            // of a fixed-point score, softmax scale and log2(e) included
  float query_sum[kTiles];              // of the fixed-point query
  float out[kTiles][kDim / 8];          // channel 8 * o + g, without `zeros`
  float reference[kTiles];              // exponents are relative to it
  float sum[kTiles], zeros[kTiles];     // of this lane's tokens: probabilities, and weights times zero points
};

// A word of four bases for the keys: of channels 16 * at + 4 * i + 0..3.
template <int kDim>
__device__ __forceinline__ uint32_t key_bases(const uint8_t* bases, bool narrow, int at) {
  const uint32_t i = threadIdx.x % 4;
  if (!narrow) return reinterpret_cast<const uint32_t*>(bases)[i * (kDim / 16) + at];
  const uint32_t word = reinterpret_cast<const uint32_t*>(bases)[i * (kDim / 32) + at / 2];
  return word >> 4 * (at % 2) & 0x0f0f0f0fu;
}

// For the values: of channels 32 * at + 8 * (0..3) + g.
template <int kDim>
__device__ __forceinline__ uint32_t value_bases(const uint8_t* bases, bool narrow, int at) {
  const uint32_t g = threadIdx.x % kWarpThreads / 4;
  if (!narrow) return reinterpret_cast<const uint32_t*>(bases)[g * (kDim / 32) + at];
  const uint32_t word = reinterpret_cast<const uint32_t*>(bases)[(g * (kDim / 32) + at) / 2];
  return word >> 4 * ((g * (kDim / 32) + at) % 2) & 0x0f0f0f0fu;
}

// Scores of the tile before query_scale: scores[tile][t] is that of token 8 * g + t.
// kWide: residuals may have more than 4 bits.
template <int kDim, int kTiles, bool kBfloat, bool kWide>
__device__ __forceinline__ void tile_scores(const Tile& tile, const TileLayout& layout, uint32_t widths,
                                            const WarpState<kDim, kTiles>& state,
                                            float (&scores)[kTiles][8]) {
  constexpr int kGroups = kDim / 32;
  const uint32_t g = threadIdx.x % kWarpThreads / 4;

  // Every row of A is a row of bases: rows 0-7 those of even groups, rows 8-15 of odd ones; of each product only the
  // half that belongs to its B counts.
  int base_sums[kTiles][2][4] = {};
#pragma unroll
  for (int pair = 0; pair < (kGroups + 1) / 2; ++pair) {
    uint32_t a[4];
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      const int group = 2 * pair + x % 2;
      a[x] = group < kGroups ? key_bases<kDim>(tile.record + kv::kTileHeaderBytes, layout.narrow_bases[0],
                                               2 * group + x / 2)
                             : 0;
    }
#pragma unroll
    for (int odd = 0; odd < 2 && 2 * pair + odd < kGroups; ++odd) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int at = 2 * (2 * pair + odd);
        multiply_add(base_sums[n][odd], a[0], a[1], a[2], a[3], state.queries[n][at],
                     state.queries[n][at + 1]);
      }
    }
  }

  float products[kTiles][8] = {};
  const int digits = kWide && any_wide(widths) ? 2 : 1;
#pragma unroll 1
  for (int digit = 0; digit < digits; ++digit) {
    int sums[kTiles][4][4];
    const uint8_t* groups = tile.record + layout.groups;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const uint32_t width = widths >> 4 * group & 15;
      with_width(
          kWide ? digit_width(width, digit) : width,
          [&](auto constant) {
            constexpr int kWidth = decltype(constant)::value;
            uint32_t words[2 * kWidth];
            load_group<kWidth>(groups + digit * 4 * kv::kGroupBytes, words);
#pragma unroll
            for (int m = 0; m < 4; ++m) {
              const int s = 2 * (m / 2), j = 2 * (m % 2);
              const uint32_t a0 = fragment<kWidth>(words, s, j), a1 = fragment<kWidth>(words, s, j + 1),
                             a2 = fragment<kWidth>(words, s + 1, j),
                             a3 = fragment<kWidth>(words, s + 1, j + 1);
#pragma unroll
              for (int n = 0; n < kTiles; ++n) {
                const uint32_t b0 = state.queries[n][2 * group], b1 = state.queries[n][2 * group + 1];
                if (group == 0) multiply(sums[n][m], a0, a1, a2, a3, b0, b1);
                else multiply_add(sums[n][m], a0, a1, a2, a3, b0, b1);
              }
            }
          },
          [&] {
            if (group > 0) return;
#pragma unroll
            for (int n = 0; n < kTiles; ++n)
#pragma unroll
              for (int m = 0; m < 4; ++m)
#pragma unroll
                for (int x = 0; x < 4; ++x) sums[n][m][x] = 0;
          });
      groups += kv::kGroupBytes * width;
    }
    const float unit = digit == 0 ? 1.0f : 16.0f;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        const int m = t / 2, row = t % 2;
        // Rows of odd m carry their values shifted left by 4.
        const float shifted = unit * (m % 2 == 0 ? 1.0f : 0.0625f);
        products[n][t] =
            __fmaf_rn(joined(sums[n][m][2 * row], sums[n][m][2 * row + 1]), shifted, products[n][t]);
      }
  }

  float scales[8], zeros[8];
  load_scales<kBfloat>(tile.params + kv::scale_position(PH_KV_KEYS, 8 * g), scales);
  load_zeros(tile.params + kv::zero_position(PH_KV_KEYS, 8 * g), zeros);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const float bases =
        joined(base_sums[n][0][0] + base_sums[n][1][2], base_sums[n][0][1] + base_sums[n][1][3]);
#pragma unroll
    for (int t = 0; t < 8; ++t)
      scores[n][t] = (products[n][t] + __fmaf_rn(zeros[t], state.query_sum[n], bases)) * scales[t];
  }
}

// Scores to weights of the values: B fragments in 16-bit fixed point, and the unit of a column's weights.
template <int kDim, int kTiles, bool kBfloat>
__device__ __forceinline__ void tile_weights(const Tile& tile, WarpState<kDim, kTiles>& state,
                                             const float (&scores)[kTiles][8], uint32_t (&weights)[kTiles][4],
                                             float (&units)[kTiles]) {
  const uint32_t lane = threadIdx.x % kWarpThreads, g = lane / 4, i = lane % 4;
  float scales[8], zeros[8];
  load_scales<kBfloat>(tile.params + kv::scale_position(PH_KV_VALUES, 8 * g), scales);
  load_zeros(tile.params + kv::zero_position(PH_KV_VALUES, 8 * g), zeros);
  // Away from the subnormals, which the reciprocal does not know.
  const float largest_scale =
      fmaxf(*reinterpret_cast<const float*>(tile.params + kv::kLargestScalePosition), 0x1p-120f);
  const float scale_unit = reciprocal(largest_scale);

  float highest[kTiles];
  bool exceeds = false;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    float most = scores[n][0];
#pragma unroll
    for (int t = 1; t < 8; ++t) most = fmaxf(most, scores[n][t]);
    for (int distance = 4; distance < kWarpThreads; distance *= 2)
      most = fmaxf(most, __shfl_xor_sync(kEveryLane, most, distance));
    // Not minus infinity where a window hides all of the tile.
    highest[n] = fmaxf(most * state.query_scale[n], -1e30f);
    exceeds |= highest[n] > state.reference[n] + kLazyRescale;
  }
  if (__any_sync(kEveryLane, exceeds)) {  // the first tile, then practically never
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float next = fmaxf(state.reference[n], highest[n]),
                  factor = exponential(state.reference[n] - next);
      state.reference[n] = next;
      state.sum[n] *= factor;
      state.zeros[n] *= factor;
#pragma unroll
      for (int o = 0; o < kDim / 8; ++o) state.out[n][o] *= factor;
    }
  }

  // A C fragment has 8 tokens of column i, a B fragment 16 tokens of column g: four shuffles.
  const uint32_t even_lane = 8 * i + g / 2, odd_lane = even_lane + 4;
  const bool odd = g % 2 == 1;
  const uint32_t first_lane = odd ? odd_lane : even_lane, second_lane = odd ? even_lane : odd_lane;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const float tile_factor = exponential(highest[n] - state.reference[n]);
    float sum = 0.0f, zero_sum = 0.0f;
    uint32_t fixed[8];
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      const float probability = exponential(__fmaf_rn(scores[n][t], state.query_scale[n], -highest[n]));
      const float weight = probability * (scales[t] * scale_unit);
      sum += probability;
      zero_sum = __fmaf_rn(weight, zeros[t], zero_sum);
      fixed[t] = __float_as_uint(__fmaf_rn(weight, kLargestFixed, kFixedMagic));
    }
    const float unit = tile_factor * largest_scale;
    state.sum[n] = __fmaf_rn(sum, tile_factor, state.sum[n]);
    state.zeros[n] = __fmaf_rn(zero_sum, unit, state.zeros[n]);
    units[n] = unit * (1.0f / kLargestFixed);
    uint32_t high[2], low[2];
    split_fixed(fixed, high[0], low[0]);
    split_fixed(fixed + 4, high[1], low[1]);
    const uint32_t x0 = odd ? low[0] : high[0], x1 = odd ? low[1] : high[1];
    const uint32_t y0 = odd ? high[0] : low[0], y1 = odd ? high[1] : low[1];
    const uint32_t r0 = __shfl_sync(kEveryLane, x0, first_lane), r1 = __shfl_sync(kEveryLane, x1, first_lane);
    const uint32_t r2 = __shfl_sync(kEveryLane, y0, second_lane),
                   r3 = __shfl_sync(kEveryLane, y1, second_lane);
    weights[n][0] = odd ? r2 : r0;
    weights[n][1] = odd ? r3 : r1;
    weights[n][2] = odd ? r0 : r2;
    weights[n][3] = odd ? r1 : r3;
  }
}

// Adds the weighted values of the tile to state.out.
template <int kDim, int kTiles, bool kWide>
__device__ __forceinline__ void tile_values(const Tile& tile, const TileLayout& layout,
                                            uint32_t groups_position, uint32_t widths,
                                            WarpState<kDim, kTiles>& state,
                                            const uint32_t (&weights)[kTiles][4],
                                            const float (&units)[kTiles]) {
  float weight_sums[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {  // an A of ones
    int sums[4] = {};
    const uint32_t ones = 0x01010101u;
    multiply_add(sums, ones, ones, ones, ones, weights[n][0], weights[n][1]);
    multiply_add(sums, ones, ones, ones, ones, weights[n][2], weights[n][3]);
    weight_sums[n] = joined(sums[0], sums[1]) * units[n];
  }
  const uint8_t* groups = tile.record + groups_position;
#pragma unroll
  for (int group = 0; group < kDim / 32; ++group) {
    const uint32_t width = widths >> 4 * group & 15;
    const uint32_t bases = value_bases<kDim>(tile.record + layout.value_bases, layout.narrow_bases[1], group);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float base = __uint_as_float(__byte_perm(bases, 0x4b000000u, 0x7440 | j)) - 8388608.0f;
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
        state.out[n][4 * group + j] = __fmaf_rn(base, weight_sums[n], state.out[n][4 * group + j]);
    }
    const int digits = kWide && width > 4 ? 2 : 1;
#pragma unroll 1
    for (int digit = 0; digit < digits; ++digit) {
      with_width(
          kWide ? digit_width(width, digit) : width,
          [&](auto constant) {
            constexpr int kWidth = decltype(constant)::value;
            uint32_t words[2 * kWidth];
            load_group<kWidth>(groups + digit * 4 * kv::kGroupBytes, words);
            const float digit_unit = digit == 0 ? 1.0f : 16.0f;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              int sums[kTiles][4];
#pragma unroll
              for (int step = 0; step < 2; ++step) {
                const int s = 2 * step, j = 2 * half;
                const uint32_t a0 = fragment<kWidth>(words, s, j), a1 = fragment<kWidth>(words, s, j + 1),
                               a2 = fragment<kWidth>(words, s + 1, j),
                               a3 = fragment<kWidth>(words, s + 1, j + 1);
#pragma unroll
                for (int n = 0; n < kTiles; ++n) {
                  const uint32_t b0 = weights[n][2 * step], b1 = weights[n][2 * step + 1];
                  if (step == 0) multiply(sums[n], a0, a1, a2, a3, b0, b1);
                  else multiply_add(sums[n], a0, a1, a2, a3, b0, b1);
                }
              }
#pragma unroll
              for (int n = 0; n < kTiles; ++n) {
                const float unit = units[n] * (half == 0 ? digit_unit : 0.0625f * digit_unit);
#pragma unroll
                for (int row = 0; row < 2; ++row) {
                  float& out = state.out[n][4 * group + 2 * half + row];
                  out = __fmaf_rn(joined(sums[n][2 * row], sums[n][2 * row + 1]), unit, out);
                }
              }
            }
          },
          [] {});
    }
    groups += kv::kGroupBytes * width;
  }
}

}  // namespace ph::attention
