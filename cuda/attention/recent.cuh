// Attention on a run of 16 tokens in 16 bits by one warp, in the frame of tile.cuh: columns and outputs lie in the lanes
// as for a packed tile, so that a warp takes runs and tiles in turn.
//
// mma.m16n8k16 in 16 bits. Keys: rows of A are tokens, straight from device memory, 16 bytes (8 channels) a lane; the
// query is in the even column of its pair, the odd one is 0. Values: rows of A are channels; the tokens come into shared
// memory while the keys are worked on, and ldmatrix transposes them from there; probabilities are a high and a low 16-bit
// float in the column pair. Sums are float32. Reads a token's key and value once.
#pragma once

#include "attention/tile.cuh"
#include "kv/cache.h"

namespace ph::attention {

// Shared memory that a warp needs for a run.
constexpr uint32_t run_scratch_bytes(uint32_t head_dim) { return kv::kRunTokens * head_dim * 2; }

template <bool kBfloat>
__device__ __forceinline__ void multiply_halves(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                uint32_t b1, const float (&c)[4]) {
  if constexpr (kBfloat) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),
          "f"(c[3]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),
          "f"(c[3]));
  }
}

// Two floats as 16-bit ones, the first in the low half.
template <bool kBfloat>
__device__ __forceinline__ uint32_t to_halves(float low, float high) {
  if constexpr (kBfloat) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Four 8x8 matrices of 16-bit values, each transposed; a lane gives the address of a row.
__device__ __forceinline__ void load_transposed(uint32_t address, uint32_t (&a)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address)
               : "memory");
}

// The tokens of a sequence in 16 bits, of one head. `at` counts them, sinks first.
struct RecentTokens {
  const uint8_t *keys, *values;  // of the first slot
  uint64_t row_bytes;            // from slot to slot
  uint32_t count;                // tokens
  uint32_t sinks;                // of these
  uint32_t unpacked;             // first token after the packed blocks
  uint32_t sink_slots, ring;     // CacheView::sinks, CacheView::ring
  uint32_t unpacked_slot;        // in the ring

  // The token's number; at most `unpacked` beyond the last.
  __device__ __forceinline__ uint32_t token(uint32_t at) const {
    return at < sinks ? at : unpacked + (at - sinks);
  }
  // The slot that it is in; past the last, that of the last.
  __device__ __forceinline__ uint32_t slot(uint32_t at) const {
    at = min(at, count - 1);
    const uint32_t of_ring = unpacked_slot + (at - sinks);  // the ring has room for all
    return at < sinks ? at : sink_slots + (of_ring < ring ? of_ring : of_ring - ring);
  }
  // Where that begins, from the first slot on.
  __device__ __forceinline__ uint64_t position(uint32_t at) const { return slot(at) * row_bytes; }
};

// Those of a sequence of `length` tokens, of which so many are packed; the next one's slot in the ring is `unpacked_slot`.
template <int kDim>
__device__ __forceinline__ RecentTokens recent_tokens(const kv::CacheView& cache, uint32_t layer,
                                                      uint32_t sequence, uint32_t head, uint32_t length,
                                                      uint32_t packed, uint32_t unpacked_slot) {
  const uint64_t part_bytes = kv::recent_part_bytes(cache);
  const uint8_t* keys =
      cache.recent + kv::stream_of(cache, layer, sequence) * kv::kParts * part_bytes + head * (kDim * 2ull);
  const uint32_t sinks = min(cache.sinks, length), unpacked = cache.sinks + packed,
                 past = unpacked < length ? length - unpacked : 0;
  return {keys,
          keys + part_bytes,
          static_cast<uint64_t>(cache.heads) * kDim * 2,
          sinks + past,
          sinks,
          unpacked,
          cache.sinks,
          cache.ring,
          unpacked_slot};
}

// The queries of a thread block's columns as B fragments, in a lane's registers; the odd column of a pair is 0.
template <int kDim, int kTiles>
struct RunQueries {
  uint4 chunks[kTiles][kDim / 32];  // channels 32 * chunk + 8 * i + 0..7

  // query(column): where its channels begin, or null.
  template <typename Query>
  __device__ __forceinline__ explicit RunQueries(Query query) {
    const uint32_t lane = threadIdx.x % kWarpThreads, g = lane / 4, i = lane % 4;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const uint8_t* row = g % 2 == 0 ? query(4 * n + g / 2) : nullptr;
#pragma unroll
      for (int chunk = 0; chunk < kDim / 32; ++chunk) {
        chunks[n][chunk] = row == nullptr ? make_uint4(0, 0, 0, 0)
                                          : *reinterpret_cast<const uint4*>(row + 2 * (32 * chunk + 8 * i));
      }
    }
  }
};

// One run: tokens 16 * run and on. `scale` is that of the softmax, log2(e) included; `visible(column, token, is_sink)`
// whether a column sees a token. `scratch` is the warp's alone, in shared memory. For `rescale` see move_references.
template <int kDim, int kTiles, bool kBfloat, typename Visible, typename Rescale>
__device__ __forceinline__ void attend_run(const RecentTokens& tokens, uint32_t run, float scale,
                                           const RunQueries<kDim, kTiles>& queries, Visible visible,
                                           uint8_t* scratch, WarpState<kDim, kTiles>& state,
                                           Rescale rescale) {
  constexpr int kChunks = kDim / 32;         // of 32 channels: 16 bytes of each of the four lanes of a row
  constexpr uint32_t kRowChunks = kDim / 8;  // of 16 bytes
  constexpr uint32_t kSwizzle = kRowChunks % 8 == 0 ? 7 : 3;
  const uint32_t lane = threadIdx.x % kWarpThreads, g = lane / 4, i = lane % 4;
  const uint32_t first = run * kv::kRunTokens;

  // Values of tokens past the last are those of the last, times probabilities of 0.
#pragma unroll
  for (uint32_t x = 0; x < kv::kRunTokens * kRowChunks / kWarpThreads; ++x) {
    // Rows of B are tokens in the order 0, 8, 1, 9, ..., so that the two of a register come from one lane.
    const uint32_t chunk = lane + kWarpThreads * x, order = chunk / kRowChunks, column = chunk % kRowChunks;
    kv::copy_async(reinterpret_cast<uint4*>(scratch) + order * kRowChunks + (column ^ (order & kSwizzle)),
                   tokens.values + tokens.position(first + order / 2 + order % 2 * 8) + 16 * column);
  }
  kv::copy_commit();
  __syncwarp();  // lest the compiler puts copies behind the first products, which wait for keys

  uint4 chunks[2][kChunks];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint8_t* key = tokens.keys + tokens.position(first + 8 * half + g) + 16 * i;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk)
      chunks[half][chunk] = *reinterpret_cast<const uint4*>(key + 64 * chunk);
  }
  float sums[kTiles][4] = {};
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const uint4 low = chunks[0][chunk], high = chunks[1][chunk];
    const uint32_t even[4] = {low.x, high.x, low.y, high.y}, odd[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const uint4 query = queries.chunks[n][chunk];
      multiply_halves<kBfloat>(sums[n], even, query.x, query.y, sums[n]);
      multiply_halves<kBfloat>(sums[n], odd, query.z, query.w, sums[n]);
    }
  }

  // Lane (g, i) holds scores of tokens g and g + 8 for column 4 * n + i.
  float scores[kTiles][2], highest[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t at = first + 8 * half + g;
      const bool sees = at < tokens.count && visible(4 * n + i, tokens.token(at), at < tokens.sinks);
      scores[n][half] = sees ? sums[n][2 * half] * scale : -INFINITY;
    }
    highest[n] = fmaxf(highest_score(scores[n]), kNoReference);
  }
  move_references(state, highest, rescale);

  float factors[kTiles];
  uint32_t b[kTiles][2];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    factors[n] = exponential(highest[n] - state.reference[n]);
    const float low = exponential(scores[n][0] - highest[n]), high = exponential(scores[n][1] - highest[n]);
    state.sum[n] = __fmaf_rn(low + high, factors[n], state.sum[n]);
    const uint32_t rounded = to_halves<kBfloat>(low, high);
    const float2 of_rounded = to_floats<kBfloat>(rounded);
    const uint32_t rest = to_halves<kBfloat>(low - of_rounded.x, high - of_rounded.y);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t source = 4 * (i + 4 * half) + g / 2;
      const uint32_t of_high = __shfl_sync(kEveryLane, rounded, source),
                     of_low = __shfl_sync(kEveryLane, rest, source);
      b[n][half] = g % 2 == 0 ? of_high : of_low;
    }
  }

  kv::copy_wait();
  __syncwarp();
  constexpr float kZero[4] = {};
  // The row that this lane gives the address of: matrices 0 and 1 have rows 0-7, 2 and 3 rows 8-15.
  const uint32_t order = lane % 8 + lane / 16 * 8;
  const uint32_t source = shared_address(scratch) + 16 * order * kRowChunks;
#pragma unroll
  for (int x = 0; x < kDim / 16; ++x) {
    uint32_t a[4];
    load_transposed(source + 16 * ((2 * x + lane / 8 % 2) ^ (order & kSwizzle)), a);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float products[4];
      multiply_halves<kBfloat>(products, a, b[n][0], b[n][1], kZero);
      state.out[n][2 * x] = __fmaf_rn(products[0] + products[1], factors[n], state.out[n][2 * x]);
      state.out[n][2 * x + 1] = __fmaf_rn(products[2] + products[3], factors[n], state.out[n][2 * x + 1]);
    }
  }
  __syncwarp();
}

}  // namespace ph::attention
