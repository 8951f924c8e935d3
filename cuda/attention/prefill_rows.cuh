// The rows of a prefill tile (prefill.cu): queries as A fragments, scores and outputs of a warp, the online softmax, and
// products with 16-bit keys and values.
#pragma once

#include "attention/tile_raw16.cuh"
#include "kv/cache.h"

namespace ph::attention {

constexpr uint32_t kWarps = 4;
constexpr uint32_t kThreads = kWarps * kWarpThreads;

// Lane (g, i) has rows g and g + 8 of each band of 16.
template <int kDim, int kBands>
struct RowState {
  float out[kBands][kDim / 8][4];  // C fragments: channels 8n + 2i and the next, of row g, then of row g + 8
  float reference[kBands][2];      // exponents are relative to it
  float sum[kBands][2];            // of this lane's probabilities
  float shift[kBands][2];          // of this lane's weighted offsets: to be added to every channel
};

// What is known of a lane's rows from the start.
template <int kBands>
struct RowFacts {
  uint32_t position[kBands][2];
  float factor[kBands][2];     // makes a score of scaled queries one in bits
  float query_sum[kBands][2];  // of the scaled queries
};

// Rows of a tile. A row past the last is the last once more.
struct Tile16 {
  const uint8_t* queries;
  uint8_t* out;
  uint32_t first, rows;  // of the sequence and kv head: the tile's first, and all
  uint32_t group, query_heads, head, input;

  __device__ __forceinline__ uint32_t row(uint32_t of_tile) const { return min(first + of_tile, rows - 1); }
  __device__ __forceinline__ uint64_t place(uint32_t row) const {  // among queries and outputs, in heads
    return static_cast<uint64_t>(input + row / group) * query_heads + head * group + row % group;
  }
};

// Brings positive numbers up to `largest` to the range of float16, the largest to [2^14, 2^15) unless it is all but 0, and
// down again.
__device__ __forceinline__ void powers_of_two(float largest, float& up, float& down) {
  const int exponent = max(static_cast<int>(__float_as_uint(largest) >> 23) - 127, -100);
  up = __uint_as_float(static_cast<uint32_t>(127 + 14 - exponent) << 23);
  down = __uint_as_float(static_cast<uint32_t>(127 - 14 + exponent) << 23);
}

// Queries to A fragments in shared memory. kScaled: as float16 whatever they are, with a power of two per row.
template <int kDim, int kBands, bool kBfloat, bool kScaled>
__device__ __forceinline__ void load_queries(const Tile16& tile, uint32_t band_row, float scale,
                                             uint4* fragments, RowFacts<kBands>& facts) {
  const uint32_t lane = threadIdx.x % kWarpThreads, g = lane / 4, i = lane % 4;
#pragma unroll 1
  for (int band = 0; band < kBands; ++band) {
    uint2 pairs[2][kDim / 16];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint8_t* query = tile.queries + 2 * kDim * tile.place(tile.row(band_row + 16 * band + g + 8 * r));
#pragma unroll
      for (int x = 0; x < kDim / 16; ++x)
        pairs[r][x] = *reinterpret_cast<const uint2*>(query + 2 * (16 * x + 4 * i));
      float up = 1.0f, down = 1.0f;
      if constexpr (kBfloat && kScaled) {
        float largest = 0.0f;
#pragma unroll
        for (int x = 0; x < kDim / 16; ++x) {
          const float2 a = to_floats<true>(pairs[r][x].x), b = to_floats<true>(pairs[r][x].y);
          largest = fmaxf(largest, fmaxf(fmaxf(fabsf(a.x), fabsf(a.y)), fmaxf(fabsf(b.x), fabsf(b.y))));
        }
        largest = fmaxf(largest, __shfl_xor_sync(kEveryLane, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(kEveryLane, largest, 2));
        powers_of_two(largest, up, down);
#pragma unroll
        for (int x = 0; x < kDim / 16; ++x) {
          const float2 a = to_floats<true>(pairs[r][x].x), b = to_floats<true>(pairs[r][x].y);
          pairs[r][x] =
              make_uint2(to_halves<false>(a.x * up, a.y * up), to_halves<false>(b.x * up, b.y * up));
        }
      }
      if constexpr (kScaled) {
        float sum = 0.0f;
#pragma unroll
        for (int x = 0; x < kDim / 16; ++x) {
          const float2 a = to_floats<false>(pairs[r][x].x), b = to_floats<false>(pairs[r][x].y);
          sum += (a.x + a.y) + (b.x + b.y);
        }
        sum += __shfl_xor_sync(kEveryLane, sum, 1);
        sum += __shfl_xor_sync(kEveryLane, sum, 2);
#pragma unroll
        for (int of = 0; of < kBands; ++of) {
          if (of == band) facts.query_sum[of][r] = sum;
        }
      }
#pragma unroll
      for (int of = 0; of < kBands; ++of) {
        if (of == band) facts.factor[of][r] = scale * kLog2E * down;
      }
    }
#pragma unroll
    for (int x = 0; x < kDim / 16; ++x) {
      fragments[(band * (kDim / 16) + x) * kWarpThreads + lane] =
          make_uint4(pairs[0][x].x, pairs[1][x].x, pairs[0][x].y, pairs[1][x].y);
    }
  }
}

// A step of the online softmax. `scores` become probabilities; `rescale` is what the outputs so far are worth.
template <int kDim, int kBands>
__device__ __forceinline__ void soften(float (&scores)[kBands][8][4], const float (&factor)[kBands][2],
                                       RowState<kDim, kBands>& state, float (&rescale)[kBands][2]) {
#pragma unroll
  for (int band = 0; band < kBands; ++band) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = -INFINITY;
#pragma unroll
      for (int m = 0; m < 8; ++m)
        most = fmaxf(most, fmaxf(scores[band][m][2 * r], scores[band][m][2 * r + 1]));
      most = fmaxf(most, __shfl_xor_sync(kEveryLane, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kEveryLane, most, 2));
      const float next = fmaxf(state.reference[band][r], most * factor[band][r]);
      rescale[band][r] = exponential(state.reference[band][r] - next);
      state.reference[band][r] = next;
      float sum = 0.0f;
#pragma unroll
      for (int m = 0; m < 8; ++m) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& score = scores[band][m][2 * r + c];
          score = exponential(__fmaf_rn(score, factor[band][r], -next));
          sum += score;
        }
      }
      state.sum[band][r] = __fmaf_rn(state.sum[band][r], rescale[band][r], sum);
      state.shift[band][r] *= rescale[band][r];
    }
  }
}

template <int kDim, int kBands>
__device__ __forceinline__ void scale_out(RowState<kDim, kBands>& state, const float (&rescale)[kBands][2]) {
  bool changes = false;
#pragma unroll
  for (int band = 0; band < kBands; ++band) changes |= rescale[band][0] != 1.0f || rescale[band][1] != 1.0f;
  if (!__any_sync(kEveryLane, changes)) return;
#pragma unroll
  for (int band = 0; band < kBands; ++band) {
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      state.out[band][n][0] *= rescale[band][0];
      state.out[band][n][1] *= rescale[band][0];
      state.out[band][n][2] *= rescale[band][1];
      state.out[band][n][3] *= rescale[band][1];
    }
  }
}

// Score u of a lane's sixteen, of row g + 8 * r of a band.
template <int kBands>
__device__ __forceinline__ float score_of(const float (&scores)[kBands][8][4], int band, int r, int u) {
  return scores[band][u % 8][2 * r + u / 8];
}

// The A fragment of k step s of probabilities.
template <bool kBfloat, int kBands>
__device__ __forceinline__ uint4 weights_of(const float (&scores)[kBands][8][4], int band, int s) {
  uint32_t a[4];
#pragma unroll
  for (int x = 0; x < 4; ++x) {
    const int u = 4 * s + 2 * (x / 2);
    a[x] = to_halves<kBfloat>(score_of(scores, band, x % 2, u), score_of(scores, band, x % 2, u + 1));
  }
  return make_uint4(a[0], a[1], a[2], a[3]);
}

// ---- products in 16 bits ----

// Scores of 16-bit keys. load(x, f): of k step x, the B fragments of score fragments 2f and 2f + 1.
template <int kDim, int kBands, bool kBfloat, typename Load>
__device__ __forceinline__ void plain_scores(const uint4* queries, float (&scores)[kBands][8][4], Load load) {
  const uint32_t lane = threadIdx.x % kWarpThreads;
#pragma unroll
  for (int x = 0; x < kDim / 16; ++x) {
    uint4 a[kBands];
#pragma unroll
    for (int band = 0; band < kBands; ++band)
      a[band] = queries[(band * (kDim / 16) + x) * kWarpThreads + lane];
#pragma unroll
    for (int f = 0; f < 4; ++f) {
      const uint4 b = load(x, f);
#pragma unroll
      for (int band = 0; band < kBands; ++band) {
        multiply_fragment<kBfloat>(scores[band][2 * f], a[band], b.x, b.y);
        multiply_fragment<kBfloat>(scores[band][2 * f + 1], a[band], b.z, b.w);
      }
    }
  }
}

// Adds 16-bit values, times the probabilities in `scores`, to the outputs. load(pair, s): of k step s, the B fragments of
// channels 16 * pair + 0..7 and of the next eight.
template <int kDim, int kBands, bool kBfloat, typename Load>
__device__ __forceinline__ void plain_values(float (&scores)[kBands][8][4], RowState<kDim, kBands>& state,
                                             Load load) {
  uint4 weights[kBands][4];
  [[maybe_unused]] uint4 rest[kBands][4];  // what rounding the weights leaves
#pragma unroll
  for (int band = 0; band < kBands; ++band) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      weights[band][s] = weights_of<kBfloat>(scores, band, s);
      if constexpr (kBfloat) {
        const uint32_t pairs[4] = {weights[band][s].x, weights[band][s].y, weights[band][s].z,
                                   weights[band][s].w};
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          const float2 two = to_floats<true>(pairs[x]);
          const int u = 4 * s + 2 * (x / 2);
          scores[band][u % 8][2 * (x % 2) + u / 8] -= two.x;
          scores[band][(u + 1) % 8][2 * (x % 2) + u / 8] -= two.y;
        }
        rest[band][s] = weights_of<kBfloat>(scores, band, s);
      }
    }
  }
#pragma unroll
  for (int pair = 0; pair < kDim / 16; ++pair) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const uint4 b = load(pair, s);
#pragma unroll
      for (int band = 0; band < kBands; ++band) {
        multiply_fragment<kBfloat>(state.out[band][2 * pair], weights[band][s], b.x, b.y);
        multiply_fragment<kBfloat>(state.out[band][2 * pair + 1], weights[band][s], b.z, b.w);
        if constexpr (kBfloat) {
          multiply_fragment<kBfloat>(state.out[band][2 * pair], rest[band][s], b.x, b.y);
          multiply_fragment<kBfloat>(state.out[band][2 * pair + 1], rest[band][s], b.z, b.w);
        }
      }
    }
  }
}

}  // namespace ph::attention
