// The queries of a thread block, and how they get to shared memory in the fixed point of tile.cuh.
#pragma once

#include "attention/recent.cuh"
#include "attention/tile.cuh"

namespace ph::attention {

// The query heads of a kv head.
struct Group {
  uint32_t heads, inverse;  // 2^16 / heads, rounded up

  // The query token of column `column`, below 2^16 / heads, of all query tokens' columns: column / heads, without a division.
  __device__ __forceinline__ uint32_t token(uint32_t column) const {
    // Opaque, lest the compiler keeps the result in a register that the loop over blocks needs.
    asm volatile("" : "+r"(column));
    return column * inverse >> 16;
  }
};
inline Group group_of(const kv::CacheView& cache) {
  const uint32_t heads = cache.query_heads / cache.heads;
  return {heads, ((1u << 16) + heads - 1) / heads};
}

// The columns of a thread block: query token column / group of the sequence, head column % group of the kv head's group.
struct Columns {
  const uint8_t* queries;  // of the sequence's first token in the step and the group's first head
  uint32_t first, count;   // columns of this thread block
  Group group;
  uint64_t token_stride;  // values from one token to the next

  // The query token of a column.
  __device__ __forceinline__ uint32_t token(uint32_t column) const { return group.token(first + column); }
  __device__ __forceinline__ uint64_t position(uint32_t column, uint32_t head_dim) const {
    return token(column) * token_stride + (first + column - token(column) * group.heads) * head_dim;
  }
};

// The channels of the column whose high or low part a lane has in B fragments: 16 * x + 4 * i + 0..3; 0 past the last column.
// Where they are is known before they may be loaded.
template <int kDim>
struct LaneQuery {
  const uint8_t* source;
  bool present;
  uint2 pairs[kDim / 16];

  __device__ __forceinline__ LaneQuery(const Columns& columns, uint32_t tile) {
    const uint32_t lane = threadIdx.x % kWarpThreads, column = 4 * tile + lane / 8;
    present = column < columns.count;
    source = columns.queries + 2 * (columns.position(present ? column : 0, kDim) + 4 * (lane % 4));
    asm volatile("" : "+l"(source));  // known now, not when it is needed
  }
  __device__ __forceinline__ void load() {
#pragma unroll
    for (int x = 0; x < kDim / 16; ++x)
      pairs[x] = present ? *reinterpret_cast<const uint2*>(source + 32 * x) : make_uint2(0, 0);
  }
};

// A warp puts the queries of a tile of columns into shared memory, in 16-bit fixed point. Scores are to be times `scale`.
template <int kDim, int kTiles, bool kBfloat>
__device__ __forceinline__ void quantize_queries(const LaneQuery<kDim>& query, uint32_t tile, float scale,
                                                 Queries<kDim, kTiles>& queries) {
  const uint32_t lane = threadIdx.x % kWarpThreads, g = lane / 4;
  float values[kDim / 16][4];
  float largest = 0.0f;
#pragma unroll
  for (int x = 0; x < kDim / 16; ++x) {
    const float2 a = to_floats<kBfloat>(query.pairs[x].x), b = to_floats<kBfloat>(query.pairs[x].y);
    values[x][0] = a.x, values[x][1] = a.y, values[x][2] = b.x, values[x][3] = b.y;
    largest = fmaxf(largest, fmaxf(fmaxf(fabsf(a.x), fabsf(a.y)), fmaxf(fabsf(b.x), fabsf(b.y))));
  }
  largest = fmaxf(largest, __shfl_xor_sync(kEveryLane, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(kEveryLane, largest, 2));
  const float to_fixed = largest > 0.0f ? kLargestFixed / largest : 0.0f;
  float sums[4] = {};  // exact in any order
#pragma unroll
  for (int x = 0; x < kDim / 16; ++x) {
    uint32_t fixed[4], high, low;
#pragma unroll
    for (int byte = 0; byte < 4; ++byte) {
      const float y = __fmaf_rn(values[x][byte], to_fixed, kFixedMagic);
      sums[byte] += y - kFixedMagic;
      fixed[byte] = __float_as_uint(y);
    }
    split_fixed(fixed, high, low);
    queries.fragments[x / 2][lane][2 * tile + x % 2] = g % 2 == 1 ? low : high;
  }
  float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  sum += __shfl_xor_sync(kEveryLane, sum, 1);
  sum += __shfl_xor_sync(kEveryLane, sum, 2);
  if (lane % 8 == 0) {
    const uint32_t column = 4 * tile + g / 2;
    queries.sum[column] = sum;
    // Positive, for the scores that a window makes minus infinity.
    queries.scale[column] = fmaxf(largest * (1.0f / kLargestFixed) * scale, 0x1p-126f);
  }
}

}  // namespace ph::attention
