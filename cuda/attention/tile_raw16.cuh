// Attention on one tile of 16-bit values by one warp: 16-bit tensor-core products, summed in float32.
//
// A record's values are in the order of the A fragments of mma.m16n8k16 (tile.h), so that a lane takes 16 bytes of device
// memory a fragment, coalesced, straight into registers; some fragments (kAhead) are under way at any time. Columns of B and C
// come in pairs, as in tile.cuh. Keys: the even column has the query, exact, the odd one zeros. Values: the columns have
// the high and the low part of probabilities, two 16-bit floats whose sum is off by 2^-17 at most.
#pragma once

#include "attention/tile_softmax.cuh"
#include "kv/cache.h"

namespace ph::attention {

template <int kDim>
constexpr int kPartFragments = kDim / static_cast<int>(kv::kFragmentChannels) * 4;

// Probabilities are at most 1. Of f16, what is added to them is a normal number for a wider range this way; of bf16 it
// is anyway, and values may be as large as floats.
template <bool kBfloat>
constexpr float kProbabilityUnit = kBfloat ? 1.0f : 32768.0f;

template <bool kBfloat>
__device__ __forceinline__ void multiply_fragment(float (&c)[4], const uint4& fragment, uint32_t b0,
                                                  uint32_t b1) {
  const uint32_t a[4] = {fragment.x, fragment.y, fragment.z, fragment.w};
  multiply_halves<kBfloat>(c, a, b0, b1, c);
}

// Where a record's 16-bit values are: in one page of the pool or in two, as they take a page at most.
struct RawValues {
  uint32_t unit;  // where they begin in the first page
  uint32_t pages[2];

  // A lane's registers of a fragment. Volatile: it is asked for long before it is needed.
  __device__ __forceinline__ uint4 load(const uint8_t* pool, int fragment) const {
    const uint32_t at = unit + fragment * (kv::kFragmentBytes / kv::kUnitBytes) + threadIdx.x % kWarpThreads;
    const uint64_t page = at < kv::kPageUnits ? pages[0] : pages[1];
    const uint8_t* source = pool + (page * kv::kPageUnits + at % kv::kPageUnits) * kv::kUnitBytes;
    uint4 words;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "l"(source));
    return words;
  }
};

// Those of a record, its last `units` units before `end`.
__device__ __forceinline__ RawValues find_raw_values(const uint32_t* page_table, uint32_t end,
                                                     uint32_t units) {
  const uint32_t begin = end - units;
  return {begin % kv::kPageUnits,
          {page_table[begin / kv::kPageUnits], page_table[(end - 1) / kv::kPageUnits]}};
}

// Scores of the tile before query_scale: scores[tile][t] is that of token 8 * g + t. `held` has the part's first kAhead
// fragments; load(f) is called for each f from kAhead on, up to kAhead beyond the part's last, and replaces them.
template <int kDim, int kTiles, bool kBfloat, int kAhead, typename Load>
__device__ __forceinline__ void raw_scores(uint4 (&held)[kAhead], const SharedQueries<kDim, kTiles>& queries,
                                           float (&scores)[kTiles][8], Load load) {
  const uint32_t lane = threadIdx.x % kWarpThreads;
  const bool is_low = lane / 4 % 2 == 1;
  float sums[kTiles][4][4] = {};
  static_assert(kAhead % 4 == 0 && kPartFragments<kDim> % kAhead == 0);
#pragma unroll 1
  for (int first = 0; first < kPartFragments<kDim>; first += kAhead) {
#pragma unroll
    for (int four = 0; four < kAhead / 4; ++four) {
      uint2 b[kTiles];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        b[n] = queries.load(lane, n, first / 4 + four);
        if (is_low) b[n] = make_uint2(0, 0);
      }
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
          multiply_fragment<kBfloat>(sums[n][m], held[4 * four + m], b[n].x, b[n].y);
        held[4 * four + m] = load(first + 4 * four + m + kAhead);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int t = 0; t < 8; ++t) scores[n][t] = sums[n][t / 2][2 * (t % 2)];
}

// Probabilities to B fragments of the values: words [2 * s + 0..1] of fragments s.
template <int kTiles, bool kBfloat>
__device__ __forceinline__ void raw_weights(const float (&probabilities)[kTiles][8],
                                            uint32_t (&weights)[kTiles][8]) {
  const uint32_t lane = threadIdx.x % kWarpThreads, g = lane / 4, i = lane % 4;
  // A C fragment has 8 tokens of column i, a B fragment 16 tokens of column g.
  const uint32_t even_lane = 8 * i + g / 2, odd_lane = even_lane + 4;
  const bool odd = g % 2 == 1;
  const uint32_t first_lane = odd ? odd_lane : even_lane, second_lane = odd ? even_lane : odd_lane;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float a = probabilities[n][2 * j] * kProbabilityUnit<kBfloat>,
                  b = probabilities[n][2 * j + 1] * kProbabilityUnit<kBfloat>;
      const uint32_t high = to_halves<kBfloat>(a, b);
      const float2 of_high = to_floats<kBfloat>(high);
      const uint32_t low = to_halves<kBfloat>(a - of_high.x, b - of_high.y);
      const uint32_t first = __shfl_sync(kEveryLane, odd ? low : high, first_lane);
      const uint32_t second = __shfl_sync(kEveryLane, odd ? high : low, second_lane);
      weights[n][j] = odd ? second : first;
      weights[n][4 + j] = odd ? first : second;
    }
  }
}

// Adds the weighted values of the tile to state.out; `held` and `load` as in raw_scores. `factors` are the columns'.
template <int kDim, int kTiles, bool kBfloat, int kAhead, typename Load>
__device__ __forceinline__ void raw_values(uint4 (&held)[kAhead], WarpState<kDim, kTiles>& state,
                                           const uint32_t (&weights)[kTiles][8],
                                           const float (&factors)[kTiles], Load load) {
#pragma unroll
  for (int channels = 0; channels < kPartFragments<kDim> / 4; ++channels) {
    float sums[kTiles][4] = {};
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int fragment = 4 * channels + s;
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
        multiply_fragment<kBfloat>(sums[n], held[fragment % kAhead], weights[n][2 * s],
                                   weights[n][2 * s + 1]);
      held[fragment % kAhead] = load(fragment + kAhead);
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float unit = factors[n] * (1.0f / kProbabilityUnit<kBfloat>);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float& out = state.out[n][2 * channels + row];
        out = __fmaf_rn(sums[n][2 * row] + sums[n][2 * row + 1], unit, out);
      }
    }
  }
}

}  // namespace ph::attention
