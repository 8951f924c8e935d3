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
// The reference of exponents before any score: finite, so that it can be subtracted.
constexpr float kNoReference = -1e30f;
constexpr float kLog2E = 1.4426950408889634f;
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

// What all lanes have alike. A shuffle tells the compiler so, and what follows from it is computed once for all of them.
__device__ __forceinline__ uint32_t alike(uint32_t value) { return __shfl_sync(kEveryLane, value, 0); }

// The warp of a thread block.
__device__ __forceinline__ uint32_t warp_index() { return alike(threadIdx.x / kWarpThreads); }

// The lane, of which the compiler does not know that it could compute it anew, as it would, at 30 cycles, for every tile.
__device__ __forceinline__ uint32_t lane_index() {
  uint32_t lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
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

// The residuals of one group, or of one digit of a wide one, of 0 to 4 bits: the eight nibble words of tile.h, but for
// bits that `mask` takes away. Where every group has 2 bits (kWidth), the words as they are stored: N[2s + 1] is word s,
// shifted by 2 more.
template <int kWidth>
struct Nibbles {
  uint32_t words[8];
  uint32_t mask;  // of a byte's residual, four times

  // Bits by which the values of register (s, j) are shifted to the left: they depend on the row of the matrix alone.
  __device__ static constexpr int shift(int j) { return 4 * (j / 2) + (kWidth == 2 ? 2 * (j % 2) : 0); }
  // What undoes that after a product, exactly.
  __device__ static constexpr float unit(int j) { return 1.0f / static_cast<float>(1 << shift(j)); }

  // Register (s, j).
  __device__ __forceinline__ uint32_t fragment(int s, int j) const {
    return words[kWidth == 2 ? s : 2 * s + j % 2] & mask << shift(j);
  }
};

__device__ __forceinline__ uint32_t width_mask(uint32_t width) {
  return (1u << width) * 0x01010101u - 0x01010101u;
}

// Loads a lane's words of a group of kWidth bits, 2 to 4, from shared memory; words beyond those of the width are anything.
template <int kWidth>
__device__ __forceinline__ void load_words_of(const uint8_t* group, uint32_t lane, uint32_t (&w)[8]) {
  const uint4 low = *reinterpret_cast<const uint4*>(group + 16 * lane);
  w[0] = low.x, w[1] = low.y, w[2] = low.z, w[3] = low.w;
  if constexpr (kWidth == 4) {
    const uint4 high = *reinterpret_cast<const uint4*>(group + 512 + 16 * lane);
    w[4] = high.x, w[5] = high.y, w[6] = high.z, w[7] = high.w;
  } else if constexpr (kWidth == 3) {
    const uint2 high = *reinterpret_cast<const uint2*>(group + 512 + 8 * lane);
    w[4] = high.x, w[5] = high.y;
  }
}

// The same for `width` bits, 0 to 4: in one statement, volatile and without branches, so that the load of the next group is
// under way while this one is worked on.
__device__ __forceinline__ void load_words_of(const uint8_t* group, uint32_t lane, uint32_t width,
                                              uint32_t (&w)[8]) {
  const uint32_t address = shared_address(group), vector = address + 16 * lane, half = address + 8 * lane;
  asm volatile(
      "{\n .reg .pred one, two, three, four;\n"
      " setp.eq.u32 one, %10, 1;\n setp.ge.u32 two, %10, 2;\n"
      " setp.eq.u32 three, %10, 3;\n setp.eq.u32 four, %10, 4;\n"
      " @two ld.shared.v4.u32 {%0, %1, %2, %3}, [%8];\n"
      " @four ld.shared.v4.u32 {%4, %5, %6, %7}, [%8 + 512];\n"
      " @three ld.shared.v2.u32 {%4, %5}, [%9 + 512];\n"
      " @one ld.shared.v2.u32 {%0, %1}, [%9];\n}"
      : "=&r"(w[0]), "=&r"(w[1]), "=&r"(w[2]), "=&r"(w[3]), "=&r"(w[4]), "=&r"(w[5]), "=&r"(w[6]), "=&r"(w[7])
      : "r"(vector), "r"(half), "r"(width));
}

// The words of a group to nibble words. All lanes agree on the width.
template <int kWidth>
__device__ __forceinline__ void unpack_group(uint32_t width, Nibbles<kWidth>& nibbles) {
  uint32_t(&w)[8] = nibbles.words;
  nibbles.mask = width_mask(width);
  if (width == 4 || kWidth == 2) return;
  if (width == 3) {
    const auto choose = [](uint32_t bits, uint32_t x, uint32_t y) { return (x & bits) | (y & ~bits); };
    w[6] = choose(0x11111111u, w[0] >> 3, choose(0x22222222u, w[1] >> 2, w[2] >> 1));
    w[7] = choose(0x11111111u, w[3] >> 3, choose(0x22222222u, w[4] >> 2, w[5] >> 1));
  } else if (width == 2) {
#pragma unroll
    for (int x = 3; x >= 0; --x) {
      w[2 * x + 1] = w[x] >> 2;
      w[2 * x] = w[x];
    }
  } else if (width == 1) {
#pragma unroll
    for (int x = 7; x >= 0; --x) w[x] = w[x / 4] >> x % 4;
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

// Calls use(group, nibbles) for the groups of a part of kBatch tiles, which follow each other from groups[tile] on, and
// moves these to their end; of groups wider than 4 bits, for one digit of each. kWidth: the width of every group; or 0
// where they differ, of one tile then. Where no group is wide, two at a time, that mostly have the same width: for each
// there is code without branches that loads and unpacks them, and what they are used for is there once, as instructions
// have to be fetched too.
template <int kGroups, int kWidth, bool kWide, int kBatch, typename Use>
__device__ __forceinline__ void for_groups(const uint8_t* (&groups)[kBatch], uint32_t lane, uint32_t widths,
                                           int digit, Use use) {
  static_assert(kBatch == 1 || kWidth > 0);
  if constexpr (kWidth == 0 && !kWide && kGroups % 2 == 0) {
#pragma unroll
    for (int first = 0; first < kGroups; first += 2) {
      const uint32_t both = widths >> 4 * first & 0xff;
      Nibbles<0> nibbles[2][1];
      const auto load_same = [&](auto width) {
        constexpr int kSame = decltype(width)::value;
#pragma unroll
        for (int at = 0; at < 2; ++at)
          load_words_of<kSame>(groups[0] + at * kSame * kv::kGroupBytes, lane, nibbles[at][0].words);
#pragma unroll
        for (int at = 0; at < 2; ++at) unpack_group(kSame, nibbles[at][0]);
      };
      const uint32_t widths_of[2] = {both & 15, both >> 4};
      if (both == 0x33) load_same(std::integral_constant<int, 3>{});
      else if (both == 0x44) load_same(std::integral_constant<int, 4>{});
      else if (both == 0x22) load_same(std::integral_constant<int, 2>{});
      else {
        load_words_of(groups[0], lane, widths_of[0], nibbles[0][0].words);
        load_words_of(groups[0] + kv::kGroupBytes * widths_of[0], lane, widths_of[1], nibbles[1][0].words);
#pragma unroll
        for (int at = 0; at < 2; ++at) unpack_group(widths_of[at], nibbles[at][0]);
      }
#pragma unroll
      for (int at = 0; at < 2; ++at) use(first + at, nibbles[at]);
      groups[0] += kv::kGroupBytes * (widths_of[0] + widths_of[1]);
    }
  } else {
    const auto full_width = [&](int group) { return kWidth > 0 ? kWidth : widths >> 4 * group & 15; };
    const auto width_of = [&](int group) {
      return kWide ? digit_width(full_width(group), digit) : full_width(group);
    };
    Nibbles<kWidth> nibbles[2][kBatch];
    const auto load = [&](int group) {
#pragma unroll
      for (int tile = 0; tile < kBatch; ++tile) {
        uint32_t(&words)[8] = nibbles[group % 2][tile].words;
        if constexpr (kWidth > 0) load_words_of<kWidth>(groups[tile], lane, words);
        else load_words_of(groups[tile], lane, width_of(group), words);
        groups[tile] += kv::kGroupBytes * full_width(group);
      }
    };
    if constexpr (kWide) groups[0] += digit * 4 * kv::kGroupBytes;
    load(0);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      if (group + 1 < kGroups) load(group + 1);
#pragma unroll
      for (int tile = 0; tile < kBatch; ++tile) unpack_group(width_of(group), nibbles[group % 2][tile]);
      use(group, nibbles[group % 2]);
    }
  }
}

// Two 16-bit floats, the first from the low half.
template <bool kBfloat>
__device__ __forceinline__ float2 to_floats(uint32_t pair) {
  if constexpr (kBfloat) return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

constexpr float kInteger = 8388608.0f;          // 2^23: the low bits of its words count units
constexpr uint32_t kIntegerWord = 0x4b000000u;  // as a word

// Two 16-bit zero points, the first from the low half, as floats in units of kZeroUnit: conversions of 32-bit integers are
// faster than those of 16.
constexpr float kZeroUnit = 0x1p-16f;
__device__ __forceinline__ float2 zero_points(uint32_t pair) {
  return make_float2(static_cast<float>(static_cast<int>(pair << 16)),
                     static_cast<float>(static_cast<int>(pair & 0xffff0000u)));
}

// Bases of 4 bits become floats with this added, by a permutation of bytes alone. What it adds to the outputs is known
// from the weights' sum.
template <int kDim, bool kWide>
constexpr float kBaseBias = !kWide && kDim % 64 == 0 ? 128.0f : 0.0f;

// Byte `at` of a word of bases, plus kBaseBias; its bits are TileLayout::bias_bits.
template <int kDim, bool kWide>
__device__ __forceinline__ float base_value(uint32_t bases, uint32_t bias_bits, int at) {
  if constexpr (kBaseBias<kDim, kWide> != 0.0f) {
    return __uint_as_float(__byte_perm(bases, bias_bits, 0x7044 | at << 8));
  }
  return __uint_as_float(__byte_perm(bases, kIntegerWord, 0x7440 | at)) - kInteger;
}

// kWords words from shared memory, as wide as their number allows.
template <int kWords>
__device__ __forceinline__ void load_words(const uint8_t* source, uint32_t (&words)[kWords]) {
  constexpr int kVector = kWords % 4 == 0 ? 4 : kWords % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int at = 0; at < kWords; at += kVector) {
    if constexpr (kVector == 4) {
      const uint4 four = reinterpret_cast<const uint4*>(source)[at / 4];
      words[at] = four.x, words[at + 1] = four.y, words[at + 2] = four.z, words[at + 3] = four.w;
    } else if constexpr (kVector == 2) {
      const uint2 two = reinterpret_cast<const uint2*>(source)[at / 2];
      words[at] = two.x, words[at + 1] = two.y;
    } else {
      words[at] = reinterpret_cast<const uint32_t*>(source)[at];
    }
  }
}

// Bases in words of four, row `row` of them (base_place in tile.h). Of 4 bits, two words share one. 0 if there are none.
template <int kWords>
__device__ __forceinline__ void load_bases(const uint8_t* bases, bool exist, bool narrow, uint32_t row,
                                           uint32_t (&words)[kWords]) {
  if (!exist) {
#pragma unroll
    for (int x = 0; x < kWords; ++x) words[x] = 0;
    return;
  }
  if constexpr (kWords % 2 == 0) {
    if (narrow) {
      uint32_t pairs[kWords / 2];
      load_words<kWords / 2>(bases + row * (kWords / 2 * 4), pairs);
#pragma unroll
      for (int x = 0; x < kWords; ++x) words[x] = pairs[x / 2] >> 4 * (x % 2) & 0x0f0f0f0fu;
      return;
    }
  }
  load_words<kWords>(bases + row * (kWords * 4), words);
}

// Word `at` of such a row of `row_words`.
__device__ __forceinline__ uint32_t base_word(const uint8_t* bases, uint32_t base_bits, uint32_t row_words,
                                              uint32_t row, uint32_t at) {
  const uint32_t place = row * row_words + at;
  if (base_bits == 0) return 0;
  if (base_bits == 8) return reinterpret_cast<const uint32_t*>(bases)[place];
  return reinterpret_cast<const uint32_t*>(bases)[place / 2] >> 4 * (place % 2) & 0x0f0f0f0fu;
}

// A tile in shared memory, both parts 16-aligned.
struct Tile {
  const uint8_t* params;
  const uint8_t* record;
  uint32_t lane;
  float4* factors;  // for share_factors: [32] in shared memory, the warp's alone
};

// Positions within the records of a layer.
struct TileLayout {
  uint32_t value_bases, groups;    // bytes; the key bases follow the header
  uint32_t base_bits[kv::kParts];  // 4, 8, or 0 where there are none
  // 128.0f, which the compiler is not to know: it would load each selector of a permutation of bytes with it.
  uint32_t bias_bits = 0x43000000u;

  // Whether bases, if there are any, have 4 bits. Where no residual has more, the head's channels decide (TilePart).
  template <int kDim, bool kWide>
  __device__ __forceinline__ bool is_narrow(uint32_t part) const {
    return kWide ? base_bits[part] == 4 : kDim % 64 == 0;
  }
};

inline TileLayout tile_layout(const kv::TileShape& shape) {
  return {kv::bases_position(shape, PH_KV_VALUES),
          kv::bases_position(shape, kv::kParts),
          {shape.parts[PH_KV_KEYS].base_bits, shape.parts[PH_KV_VALUES].base_bits}};
}

// The queries of a thread block's columns in 16-bit fixed point, in shared memory.
template <int kDim, int kTiles>
struct Queries {
  alignas(16) uint32_t fragments[kDim / 32][kWarpThreads][2 * kTiles];  // B of each group, lane and tile
  float sum[4 * kTiles];                                                // of a column
  float scale[4 * kTiles];  // of its fixed-point scores, softmax scale and log2(e) included
};

// Shares a part's scales and zero points with the warp: every lane converts those of two tokens, where each would convert
// those of eight. Of a token, scale times that of `factors`, and scale times zero point.
template <bool kBfloat>
__device__ __forceinline__ void share_factors(const Tile& tile, uint32_t part, float2 factors) {
  const uint32_t token = 2 * tile.lane;
  const uint32_t scales = *reinterpret_cast<const uint32_t*>(tile.params + kv::scale_position(part, token)),
                 zeros = *reinterpret_cast<const uint32_t*>(tile.params + kv::zero_position(part, token));
  const float2 scale = to_floats<kBfloat>(scales);
  const float2 zero = zero_points(zeros);
  tile.factors[tile.lane] = make_float4(scale.x * factors.x, scale.x * (zero.x * kZeroUnit),
                                        scale.y * factors.y, scale.y * (zero.y * kZeroUnit));
}

// What share_factors made of tokens 8 * g + t.
__device__ __forceinline__ void load_factors(const Tile& tile, float (&scales)[8], float (&shifts)[8]) {
  __syncwarp();
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    const float4 two = tile.factors[tile.lane / 4 * 4 + pair];
    scales[2 * pair] = two.x, shifts[2 * pair] = two.y;
    scales[2 * pair + 1] = two.z, shifts[2 * pair + 1] = two.w;
  }
  __syncwarp();
}

// What a warp knows of its columns: lane (g, i) holds those of column 4 * tile + i.
template <int kDim, int kTiles>
struct WarpState {
  float query_scale[kTiles], query_sum[kTiles];
  float out[kTiles][kDim / 8];  // channel 8 * o + g, without `zeros`
  float reference[kTiles];      // exponents are relative to it
  float weights[kTiles];        // sum of the weights that kBaseBias is multiplied with
  // Of this lane's tokens: probabilities, and weights times zero points.
  float sum[kTiles], zeros[kTiles];
};

// What is to be added to column n's outputs in the end: the zero points' share of all lanes, without kBaseBias.
template <int kDim, int kTiles, bool kWide>
__device__ __forceinline__ float output_shift(const WarpState<kDim, kTiles>& state, int n) {
  float zeros = state.zeros[n];
  for (int distance = 4; distance < kWarpThreads; distance *= 2)
    zeros += __shfl_xor_sync(kEveryLane, zeros, distance);
  return __fmaf_rn(-kBaseBias<kDim, kWide>, state.weights[n], zeros);
}

// Scores of the tile before query_scale: scores[tile][t] is that of token 8 * g + t.
// kWidth: see for_groups. kWide: residuals may have more than 4 bits. kBases: there may be bases.
template <int kDim, int kTiles, bool kBfloat, bool kWide, int kWidth, bool kBases = true>
__device__ __forceinline__ void tile_scores(const Tile& tile, const TileLayout& layout, uint32_t widths,
                                            const Queries<kDim, kTiles>& queries,
                                            const WarpState<kDim, kTiles>& state,
                                            float (&scores)[kTiles][8]) {
  constexpr int kGroups = kDim / 32;
  const uint32_t i = tile.lane % 4;
  // Token 8 * g + t is in row t % 4 of the lane's: those of even lanes are rows 0 and 1.
  using Residuals = Nibbles<kWidth>;
  const float lane_unit = tile.lane % 2 == 0 ? 1.0f : Residuals::unit(2);
  const auto query_fragments = [&](int group, uint32_t(&b)[2 * kTiles]) {
    load_words<2 * kTiles>(reinterpret_cast<const uint8_t*>(queries.fragments[group][tile.lane]), b);
  };
  float of_bases[kTiles] = {};
  if constexpr (kBases) {
    uint32_t bases[2 * kGroups];
    load_bases<2 * kGroups>(tile.record + kv::kTileHeaderBytes, layout.base_bits[PH_KV_KEYS] > 0,
                            layout.template is_narrow<kDim, kWide>(PH_KV_KEYS), i, bases);
    // Every row of A is a row of bases: rows 0-7 those of even groups, rows 8-15 of odd ones; of each product only the
    // half that belongs to its B counts.
    int base_sums[kTiles][2][4];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      uint32_t b[2 * kTiles];
      query_fragments(group, b);
      const int even = group - group % 2, odd = even + 1 < kGroups ? even + 1 : even;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const auto product = group < 2 ? multiply : multiply_add;
        product(base_sums[n][group % 2], bases[2 * even], bases[2 * odd], bases[2 * even + 1],
                bases[2 * odd + 1], b[2 * n], b[2 * n + 1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      of_bases[n] = joined(base_sums[n][0][0] + (kGroups > 1 ? base_sums[n][1][2] : 0),
                           base_sums[n][0][1] + (kGroups > 1 ? base_sums[n][1][3] : 0));
    }
  }

#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int t = 0; t < 8; ++t) scores[n][t] = of_bases[n] / Residuals::unit(t % 4);
  }

  const int digits = kWide && any_wide(widths) ? 2 : 1;
#pragma unroll 1
  for (int digit = 0; digit < digits; ++digit) {
    int sums[kTiles][4][4];
    const uint8_t* groups[] = {tile.record + layout.groups};
    for_groups<kGroups, kWidth, kWide>(
        groups, tile.lane, widths, digit, [&](int group, const Nibbles<kWidth>(&nibbles)[1]) {
          uint32_t b[2 * kTiles];
          query_fragments(group, b);
          // Behind the first loads of residuals.
          if (group == 1 && digit == 0)
            share_factors<kBfloat>(tile, PH_KV_KEYS, {lane_unit, lane_unit * Residuals::unit(1)});
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            const int s = 2 * (m / 2), j = 2 * (m % 2);
            const uint32_t a0 = nibbles[0].fragment(s, j), a1 = nibbles[0].fragment(s, j + 1),
                           a2 = nibbles[0].fragment(s + 1, j), a3 = nibbles[0].fragment(s + 1, j + 1);
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
              const auto product = group == 0 ? multiply : multiply_add;
              product(sums[n][m], a0, a1, a2, a3, b[2 * n], b[2 * n + 1]);
            }
          }
        });
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        const int m = t / 2, row = t % 2;
        const float sum = joined(sums[n][m][2 * row], sums[n][m][2 * row + 1]);
        scores[n][t] = kBases ? __fmaf_rn(sum, digit == 0 ? 1.0f : 16.0f, scores[n][t]) : sum;
      }
  }
  float scales[8], shifts[8];
  load_factors(tile, scales, shifts);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int t = 0; t < 8; ++t)
      scores[n][t] = __fmaf_rn(scores[n][t], scales[t], shifts[t] * state.query_sum[n]);
  }
}

// An 8x8 matrix of 16-bit elements, of which lane (g, i) has row g, columns 2i and 2i + 1, transposed.
__device__ __forceinline__ uint32_t transposed(uint32_t elements) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(elements));
  return result;
}

// Weights in fixed point (see split_fixed), of tokens 8 * g + t and column i in lane (g, i), to B fragments.
__device__ __forceinline__ void weight_fragments(const uint32_t (&fixed)[8], uint32_t (&weights)[4]) {
  // Two tokens' high bytes are an element, their low ones the next. Transposed, a lane has the high or the low bytes of column
  // g / 2: those of tokens 16 * i + 0, 1 and 16 * i + 8, 9, and so on.
  uint32_t pairs[4];
#pragma unroll
  for (int p = 0; p < 4; ++p)
    pairs[p] = transposed(__byte_perm(fixed[2 * p], fixed[2 * p + 1], 0x4051) ^ 0x80800000u);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    weights[half] = __byte_perm(pairs[2 * half], pairs[2 * half + 1], 0x5410);
    weights[2 + half] = __byte_perm(pairs[2 * half], pairs[2 * half + 1], 0x7632);
  }
}

// A column's highest of scores that its lanes hold.
template <int kScores>
__device__ __forceinline__ float highest_score(const float (&scores)[kScores]) {
  // In pairs, as each waits for the ones before.
  float pairs[kScores];
#pragma unroll
  for (int t = 0; t < kScores; ++t) pairs[t] = scores[t];
#pragma unroll
  for (int distance = 1; distance < kScores; distance *= 2)
#pragma unroll
    for (int t = 0; t + distance < kScores; t += 2 * distance)
      pairs[t] = fmaxf(pairs[t], pairs[t + distance]);
  float most = pairs[0];
  for (int distance = 4; distance < kWarpThreads; distance *= 2)
    most = fmaxf(most, __shfl_xor_sync(kEveryLane, most, distance));
  return most;
}

// Whether one of the highest scores of what comes, in bits, exceeds its running reference by too much.
template <int kDim, int kTiles>
__device__ __forceinline__ bool exceeds_references(const WarpState<kDim, kTiles>& state,
                                                   const float (&highest)[kTiles]) {
  bool exceeds = false;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) exceeds |= highest[n] > state.reference[n] + kLazyRescale;
  return exceeds;
}

// The online softmax's step before its exponentials: where `highest` exceeds the references, they move, and
// rescale(n, factor) is called for what else is relative to column n's.
template <int kDim, int kTiles, typename Rescale>
__device__ __forceinline__ void move_references(WarpState<kDim, kTiles>& state,
                                                const float (&highest)[kTiles], Rescale rescale) {
  if (__any_sync(kEveryLane, exceeds_references(state, highest))) {  // the first tile, then practically never
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float next = fmaxf(state.reference[n], highest[n]),
                  factor = exponential(state.reference[n] - next);
      state.reference[n] = next;
      state.sum[n] *= factor;
      state.zeros[n] *= factor;
      state.weights[n] *= factor;
#pragma unroll
      for (int o = 0; o < kDim / 8; ++o) state.out[n][o] *= factor;
      rescale(n, factor);
    }
  }
}

// Column n's highest score, in bits; not minus infinity where a window hides all.
template <int kDim, int kTiles>
__device__ __forceinline__ float bounded_highest(const WarpState<kDim, kTiles>& state, int n, float highest) {
  return fmaxf(highest * state.query_scale[n], kNoReference);
}

// The highest scores of kBatch tiles.
template <int kDim, int kTiles, int kBatch>
__device__ __forceinline__ void tile_highest(const WarpState<kDim, kTiles>& state,
                                             const float (&scores)[kBatch][kTiles][8],
                                             float (&highest)[kTiles]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    float column[8 * kBatch];
#pragma unroll
    for (int t = 0; t < 8 * kBatch; ++t) column[t] = scores[t / 8][n][t % 8];
    highest[n] = bounded_highest(state, n, highest_score(column));
  }
}

// Scores of kBatch tiles to weights of their values: B fragments in 16-bit fixed point, and the unit of a column's weights.
template <int kDim, int kTiles, bool kBfloat, int kBatch, typename Hide>
__device__ __forceinline__ void tile_weights(const Tile (&tiles)[kBatch], WarpState<kDim, kTiles>& state,
                                             float (&scores)[kBatch][kTiles][8], bool hides, Hide hide,
                                             uint32_t (&weights)[kBatch][kTiles][4], float (&units)[kTiles]) {
  // Away from where its reciprocal, times the largest fixed-point number, overflows.
  float largest_scale = 0x1p-111f;
#pragma unroll
  for (const Tile& tile : tiles)
    largest_scale =
        fmaxf(*reinterpret_cast<const float*>(tile.params + kv::kLargestScalePosition), largest_scale);
  const float to_fixed = kLargestFixed * reciprocal(largest_scale);
#pragma unroll
  for (const Tile& tile : tiles) share_factors<kBfloat>(tile, PH_KV_VALUES, {to_fixed, to_fixed});

  float highest[kTiles];
  tile_highest(state, scores, highest);
  if (__any_sync(kEveryLane, hides || exceeds_references(state, highest))) {
    if (hides) {
      hide(scores);
      tile_highest(state, scores, highest);
    }
    move_references(state, highest, [](int, float) {});
  }

  float sums[kTiles], zero_sums[kTiles];
#pragma unroll
  for (int which = 0; which < kBatch; ++which) {
    float scales[8], shifts[8];
    load_factors(tiles[which], scales, shifts);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      uint32_t fixed[8];
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        const float probability =
            exponential(__fmaf_rn(scores[which][n][t], state.query_scale[n], -highest[n]));
        const bool is_first = which == 0 && t == 0;
        sums[n] = is_first ? probability : sums[n] + probability;
        zero_sums[n] = is_first ? probability * shifts[t] : __fmaf_rn(probability, shifts[t], zero_sums[n]);
        fixed[t] = __float_as_uint(__fmaf_rn(probability, scales[t], kFixedMagic));
      }
      weight_fragments(fixed, weights[which][n]);
    }
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const float factor = exponential(highest[n] - state.reference[n]);
    state.sum[n] = __fmaf_rn(sums[n], factor, state.sum[n]);
    state.zeros[n] = __fmaf_rn(zero_sums[n], factor, state.zeros[n]);
    units[n] = factor * largest_scale * (1.0f / kLargestFixed);
  }
}

// Adds the weighted values of kBatch tiles to state.out. kWidth, kWide, kBases: as in tile_scores; more than one tile have
// a width and no bases.
template <int kDim, int kTiles, bool kWide, int kWidth, bool kBases = true, int kBatch>
__device__ __forceinline__ void tile_values(const Tile (&tiles)[kBatch], const TileLayout& layout,
                                            uint32_t groups_position, uint32_t widths,
                                            WarpState<kDim, kTiles>& state,
                                            const uint32_t (&weights)[kBatch][kTiles][4],
                                            const float (&units)[kTiles]) {
  static_assert(kBatch == 1 || !kBases);
  const Tile& tile = tiles[0];
  constexpr int kGroups = kDim / 32;
  [[maybe_unused]] float weight_sums[kTiles];
  [[maybe_unused]] uint32_t bases[kGroups];
  if constexpr (kBases) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {  // an A of ones
      int sums[4];
      const uint32_t ones = 0x01010101u;
      multiply(sums, ones, ones, ones, ones, weights[0][n][0], weights[0][n][1]);
      multiply_add(sums, ones, ones, ones, ones, weights[0][n][2], weights[0][n][3]);
      weight_sums[n] = joined(sums[0], sums[1]) * units[n];
      if constexpr (kBaseBias<kDim, kWide> != 0.0f) state.weights[n] += weight_sums[n];
    }
    load_bases<kGroups>(tile.record + layout.value_bases, layout.base_bits[PH_KV_VALUES] > 0,
                        layout.template is_narrow<kDim, kWide>(PH_KV_VALUES), tile.lane / 4, bases);
  }
  const int digits = kWide && any_wide(widths) ? 2 : 1;
#pragma unroll 1
  for (int digit = 0; digit < digits; ++digit) {
    const float digit_unit = digit == 0 ? 1.0f : 16.0f;
    const uint8_t* groups[kBatch];
#pragma unroll
    for (int which = 0; which < kBatch; ++which) groups[which] = tiles[which].record + groups_position;
    for_groups<kGroups, kWidth, kWide>(
        groups, tile.lane, widths, digit, [&](int group, const Nibbles<kWidth>(&nibbles)[kBatch]) {
          int sums[2][kTiles][4];
#pragma unroll
          for (int step = 0; step < 2 * kBatch; ++step) {
            const int which = step / 2, s = 2 * (step % 2);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int j = 2 * half;
              const uint32_t a0 = nibbles[which].fragment(s, j), a1 = nibbles[which].fragment(s, j + 1),
                             a2 = nibbles[which].fragment(s + 1, j),
                             a3 = nibbles[which].fragment(s + 1, j + 1);
#pragma unroll
              for (int n = 0; n < kTiles; ++n) {
                const auto product = step == 0 ? multiply : multiply_add;
                product(sums[half][n], a0, a1, a2, a3, weights[which][n][s], weights[which][n][s + 1]);
              }
            }
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            [[maybe_unused]] float base;
            if constexpr (kBases) base = base_value<kDim, kWide>(bases[group], layout.bias_bits, j);
            const int half = j / 2, row = j % 2;
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
              const float unit = units[n] * (Nibbles<kWidth>::unit(j) * digit_unit);
              float& out = state.out[n][4 * group + j];
              if constexpr (kBases) {
                if (digit == 0) out = __fmaf_rn(base, weight_sums[n], out);
              }
              out = __fmaf_rn(joined(sums[half][n][2 * row], sums[half][n][2 * row + 1]), unit, out);
            }
          }
        });
  }
}

}  // namespace ph::attention
