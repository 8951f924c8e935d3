// Attention on one kivi tile by one warp: integer tensor-core products on its codes, as in tile.cuh.
//
// With x' = (code + zero) * scale:
//   keys, a scale per channel: q . x' = sum (q * scale) * code + sum q * scale * zero: queries times scales become fixed
//   point anew for every tile, and what that rounds away once more
//   values, a scale per token and 64 channels: sum w * code + sum w * zero over tokens, w = probability * scale: weights
//   become fixed point for every such group of channels, relative to their largest
// Reads a part's scales and zero points once, 4 bytes each, and its codes once, all from shared memory.
#pragma once

#include "attention/tile_softmax.cuh"

namespace ph::attention {

// Eight 16-bit scales, as floats.
template <bool kBfloat>
__device__ __forceinline__ void load_scales(const uint8_t* source, float (&scales)[8]) {
  const uint4 words = *reinterpret_cast<const uint4*>(source);
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = to_floats<kBfloat>(pairs[i]);
    scales[2 * i] = two.x, scales[2 * i + 1] = two.y;
  }
}

// Eight 16-bit zero points, as floats in units of kZeroUnit.
__device__ __forceinline__ void load_zeros(const uint8_t* source, float (&zeros)[8]) {
  const uint4 words = *reinterpret_cast<const uint4*>(source);
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = zero_points(pairs[i]);
    zeros[2 * i] = two.x, zeros[2 * i + 1] = two.y;
  }
}

// Fixed-point numbers are relative to a largest one; where that is smaller than this, they are 0 and not missed.
constexpr float kLeastLargest = 0x1p-100f;

__device__ __forceinline__ float fixed_factor(float largest) {
  return largest > kLeastLargest ? kLargestFixed * reciprocal(largest) : 0.0f;
}

// Value groups of a head.
template <int kDim>
constexpr int kValueGroups = (kDim + static_cast<int>(kv::kGroupChannels) - 1) /
                             static_cast<int>(kv::kGroupChannels);

// A lane's nibble words (tile.h) of one digit, of 1 to 4 bits, of a group.
__device__ __forceinline__ void load_digit(const uint8_t* group, uint32_t lane, uint32_t width,
                                           uint32_t (&nibbles)[8]) {
  uint32_t words[8];
#pragma unroll
  for (uint32_t x = 0; x < 8; x += 2) {
    if (x >= 2 * width) break;
    const uint2 two = *reinterpret_cast<const uint2*>(group + kv::word_position(width, lane, x));
    words[x] = two.x;
    words[x + 1] = two.y;
  }
  if (width == 4) kv::unpack_words(4, words, nibbles);
  else if (width == 3) kv::unpack_words(3, words, nibbles);
  else if (width == 2) kv::unpack_words(2, words, nibbles);
  else kv::unpack_words(1, words, nibbles);
}

// Register (s, j) of a lane; it carries its values shifted left by 4 (j / 2).
__device__ __forceinline__ uint32_t digit_fragment(const uint32_t (&nibbles)[8], int s, int j) {
  return nibbles[2 * s + j % 2] & 0x0f0f0f0fu << 4 * (j / 2);
}

// Calls use(width, first byte of the digit in a group, what its values count) for the digits of `bits`-bit codes.
template <typename Use>
__device__ __forceinline__ void for_digits(uint32_t bits, Use use) {
#pragma unroll 1
  for (uint32_t begin = 0; begin < bits; begin += 4)
    use(min(bits - begin, 4u), begin * kv::kGroupBytes, begin == 0 ? 1.0f : 16.0f);
}

// Two 16-bit integers in a word, as floats.
__device__ __forceinline__ float2 to_integers(uint32_t pair) {
  return make_float2(static_cast<float>(static_cast<int16_t>(pair & 0xffffu)),
                     static_cast<float>(static_cast<int32_t>(pair) >> 16));
}

// Scores of the tile, times query_scale in bits: scores[tile][t] is that of token 8 * g + t. `scales` are the part's in
// the record, zero points after them; `groups` its codes, of `bits` bits.
template <int kDim, int kTiles, bool kBfloat>
__device__ __forceinline__ void kivi_scores(uint32_t lane, const uint8_t* scales, const uint8_t* groups,
                                            uint32_t bits, const SharedQueries<kDim, kTiles>& queries,
                                            float (&scores)[kTiles][8]) {
  const uint32_t g = lane / 4, i = lane % 4;
  // Two passes, the second on what rounding to 16 bits left of the first: where the scales of channels differ much, small
  // ones would lose what a peaked softmax notices.
  float rounded_factors[kTiles] = {},
        rounded_units[kTiles] = {};  // of the first pass; 0: nothing was rounded yet
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    uint32_t fixed_queries[kTiles][kDim / 16];  // B fragments
    float units[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      // Of channels 16 * x + 4 * i + 0..3.
      const auto scaled = [&](int x, float(&values)[4]) {
        const uint2 query = queries.load(lane, n, x);
        const uint2 scale = *reinterpret_cast<const uint2*>(scales + 2 * (16 * x + 4 * i));
        const float2 a = to_floats<kBfloat>(query.x), b = to_floats<kBfloat>(query.y);
        const float2 c = to_floats<kBfloat>(scale.x), d = to_floats<kBfloat>(scale.y);
        values[0] = a.x * c.x;
        values[1] = a.y * c.y;
        values[2] = b.x * d.x;
        values[3] = b.y * d.y;
      };
      const auto left = [&](float value) {
        const float rounded = __fmaf_rn(value, rounded_factors[n], kFixedMagic) - kFixedMagic;
        return __fmaf_rn(-rounded, rounded_units[n], value);
      };
      float largest = 0.0f, shift = 0.0f;
#pragma unroll
      for (int x = 0; x < kDim / 16; ++x) {
        float values[4];
        scaled(x, values);
        const uint2 zero = *reinterpret_cast<const uint2*>(scales + 2 * (kDim + 16 * x + 4 * i));
        const float2 c = to_integers(zero.x), d = to_integers(zero.y);
        const float zeros[4] = {c.x, c.y, d.x, d.y};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          largest = fmaxf(largest, fabsf(left(values[k])));
          shift = __fmaf_rn(values[k], zeros[k], shift);
        }
      }
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(kEveryLane, largest, distance));
        shift += __shfl_xor_sync(kEveryLane, shift, distance);
      }
      const float to_fixed = fixed_factor(largest), unit = largest * (1.0f / kLargestFixed);
#pragma unroll
      for (int x = 0; x < kDim / 16; ++x) {
        float values[4];
        scaled(x, values);
        uint32_t fixed[4], high, low;
#pragma unroll
        for (int k = 0; k < 4; ++k)
          fixed[k] = __float_as_uint(__fmaf_rn(left(values[k]), to_fixed, kFixedMagic));
        split_fixed(fixed, high, low);
        fixed_queries[n][x] = g % 2 == 1 ? low : high;
      }
      // From the B fragment's columns g to the C fragment's i.
      units[n] = __shfl_sync(kEveryLane, unit, 8 * i);
      const float of_column = __shfl_sync(kEveryLane, shift, 8 * i);
      if (pass == 0) {
#pragma unroll
        for (int t = 0; t < 8; ++t) scores[n][t] = of_column;
        rounded_factors[n] = to_fixed;
        rounded_units[n] = unit;
      }
    }
    for_digits(bits, [&](uint32_t width, uint32_t position, float digit_unit) {
      int sums[kTiles][4][4] = {};
#pragma unroll
      for (int group = 0; group < kDim / 32; ++group) {
        uint32_t nibbles[8];
        load_digit(groups + group * kv::kGroupBytes * bits + position, lane, width, nibbles);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const int s = 2 * (m / 2), j = 2 * (m % 2);
          const uint32_t a0 = digit_fragment(nibbles, s, j), a1 = digit_fragment(nibbles, s, j + 1),
                         a2 = digit_fragment(nibbles, s + 1, j), a3 = digit_fragment(nibbles, s + 1, j + 1);
#pragma unroll
          for (int n = 0; n < kTiles; ++n)
            multiply_add(sums[n][m], a0, a1, a2, a3, fixed_queries[n][2 * group],
                         fixed_queries[n][2 * group + 1]);
        }
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int t = 0; t < 8; ++t) {
          const int m = t / 2, row = t % 2;
          // Rows of odd m carry their values shifted left by 4.
          const float unit = units[n] * digit_unit * (m % 2 == 0 ? 1.0f : 0.0625f);
          scores[n][t] = __fmaf_rn(joined(sums[n][m][2 * row], sums[n][m][2 * row + 1]), unit, scores[n][t]);
        }
    });
  }
}

// Adds the weighted values of the tile to state.out, and to `zeros` the zero points' share of every value group, of this
// lane's tokens. `scales` and `groups` as in kivi_scores; `factors` are the columns'.
template <int kDim, int kTiles, bool kBfloat>
__device__ __forceinline__ void kivi_values(uint32_t lane, const uint8_t* scales, const uint8_t* groups,
                                            uint32_t bits, const float (&probabilities)[kTiles][8],
                                            const float (&factors)[kTiles], WarpState<kDim, kTiles>& state,
                                            float (&zeros)[kTiles][kValueGroups<kDim>]) {
  constexpr int kScaleBytes = 2 * kv::kBlockTokens;  // of a value group
  const uint32_t g = lane / 4;
#pragma unroll
  for (int of_values = 0; of_values < kValueGroups<kDim>; ++of_values) {
    float group_scales[8], group_zeros[8], units[kTiles];
    uint32_t weights[kTiles][4];
    load_scales<kBfloat>(scales + of_values * kScaleBytes + 16 * g, group_scales);
    load_zeros(scales + (kValueGroups<kDim> + of_values) * kScaleBytes + 16 * g, group_zeros);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float products[8], most = 0.0f, zero_sum = 0.0f;
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        products[t] = probabilities[n][t] * group_scales[t];
        most = fmaxf(most, products[t]);
        zero_sum = __fmaf_rn(products[t], group_zeros[t], zero_sum);
      }
#pragma unroll
      for (int distance = 4; distance < kWarpThreads; distance *= 2)
        most = fmaxf(most, __shfl_xor_sync(kEveryLane, most, distance));
      zeros[n][of_values] = __fmaf_rn(zero_sum, factors[n] * kZeroUnit, zeros[n][of_values]);
      const float to_fixed = fixed_factor(most);
      uint32_t fixed[8];
#pragma unroll
      for (int t = 0; t < 8; ++t) fixed[t] = __float_as_uint(__fmaf_rn(products[t], to_fixed, kFixedMagic));
      weight_fragments(fixed, weights[n]);
      units[n] = factors[n] * most * (1.0f / kLargestFixed);
    }
    for_digits(bits, [&](uint32_t width, uint32_t position, float digit_unit) {
#pragma unroll
      for (int group = 2 * of_values; group < 2 * of_values + 2 && group < kDim / 32; ++group) {
        uint32_t nibbles[8];
        load_digit(groups + group * kv::kGroupBytes * bits + position, lane, width, nibbles);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int sums[kTiles][4] = {};
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            const int s = 2 * step, j = 2 * half;
            const uint32_t a0 = digit_fragment(nibbles, s, j), a1 = digit_fragment(nibbles, s, j + 1),
                           a2 = digit_fragment(nibbles, s + 1, j), a3 = digit_fragment(nibbles, s + 1, j + 1);
#pragma unroll
            for (int n = 0; n < kTiles; ++n)
              multiply_add(sums[n], a0, a1, a2, a3, weights[n][2 * step], weights[n][2 * step + 1]);
          }
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            const float unit = units[n] * digit_unit * (half == 0 ? 1.0f : 0.0625f);
#pragma unroll
            for (int row = 0; row < 2; ++row) {
              float& out = state.out[n][4 * group + 2 * half + row];
              out = __fmaf_rn(joined(sums[n][2 * row], sums[n][2 * row + 1]), unit, out);
            }
          }
        }
      }
    });
  }
}

}  // namespace ph::attention
