// What tiles whose values are kivi or raw16 have in common: queries in 16 bits, and the softmax apart from the weights.
// As in tile.cuh, a warp works on a tile, and lane (g, i) holds scores of tokens 8 * g + 0..7 for column 4 * tile + i.
#pragma once

#include "attention/recent.cuh"
#include "attention/tile.cuh"

namespace ph::attention {

// The queries of a thread block in shared memory; columns past the last are 0.
template <int kDim, int kTiles>
struct SharedQueries {
  static constexpr int kColumns = 4 * kTiles;
  static constexpr int kStride = kDim + 16;  // a warp's loads meet every bank
  alignas(16) uint16_t values[kColumns][kStride];

  // Channels 16 * x + 4 * i + 0..3 of the column whose high or low part the lane has in B fragments: 4 * n + g / 2.
  __device__ __forceinline__ uint2 load(uint32_t lane, int n, int x) const {
    return *reinterpret_cast<const uint2*>(&values[4 * n + lane / 8][16 * x + 4 * (lane % 4)]);
  }
};

// One step of the online softmax. Scores, times query_scale in bits, become probabilities relative to the tile's highest
// score; `factors` are those of the highest scores to the running references. Calls rescale(n, factor) where column n's
// reference grows.
template <int kDim, int kTiles, typename Rescale>
__device__ __forceinline__ void softmax_step(WarpState<kDim, kTiles>& state, float (&scores)[kTiles][8],
                                             float (&factors)[kTiles], Rescale rescale) {
  float highest[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) highest[n] = bounded_highest(state, n, highest_score(scores[n]));
  move_references(state, highest, rescale);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    float sum = 0.0f;
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      scores[n][t] = exponential(__fmaf_rn(scores[n][t], state.query_scale[n], -highest[n]));
      sum += scores[n][t];
    }
    factors[n] = exponential(highest[n] - state.reference[n]);
    state.sum[n] = __fmaf_rn(sum, factors[n], state.sum[n]);
  }
}

}  // namespace ph::attention
