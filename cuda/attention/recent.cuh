// Attention on a run of 64 tokens in 16 bits by one warp, in the frame of tile.cuh: columns, scores and outputs lie in
// the lanes as for a packed tile, so that a warp takes runs and tiles in turn.
//
// mma.m16n8k16 in 16 bits. Keys: rows of A are tokens, straight from device memory, 16 bytes (8 channels) a lane; the
// query is in the even column of its pair, the odd one is 0. Values: rows of A are channels; 16 tokens at a time go
// through shared memory, from which ldmatrix transposes them; probabilities are a high and a low 16-bit float in the
// column pair. Sums are float32. Reads a token's key and value once.
#pragma once

#include "attention/tile.cuh"

namespace ph::attention {

constexpr uint32_t kStagedTokens = 16;

// Shared memory that a warp needs for a run.
constexpr uint32_t run_scratch_bytes(uint32_t head_dim) { return kStagedTokens * head_dim * 2; }

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

template <bool kBfloat>
__device__ __forceinline__ float2 to_floats(uint32_t pair) {
  if constexpr (kBfloat) return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
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

// Where the tokens of a run are: `at` counts the sequence's tokens in 16 bits, sinks first.
struct RecentTokens {
  uint32_t count;             // tokens in 16 bits
  uint32_t sinks;             // of these
  uint32_t unpacked;          // first token after the packed blocks
  uint32_t sink_slots, ring;  // CacheView::sinks, CacheView::ring

  // The token's number; at most `unpacked` beyond the last.
  __device__ __forceinline__ uint32_t token(uint32_t at) const {
    return at < sinks ? at : unpacked + (at - sinks);
  }
  // Its place among the recent ones.
  __device__ __forceinline__ uint32_t slot(uint32_t token) const {
    return token < sink_slots ? token : sink_slots + (token - sink_slots) % ring;
  }
};

// One run: tokens 64 * run and on. `keys` and `values` are the head's, of slot 0; `scale` that of the softmax, log2(e)
// included; `visible(column, token, is_sink)` whether a column sees a token. `scratch` is the warp's alone, in shared memory.
template <int kDim, int kTiles, bool kBfloat, typename Query, typename Visible>
__device__ __forceinline__ void attend_run(const RecentTokens& tokens, uint32_t run, const uint8_t* keys,
                                           const uint8_t* values, uint64_t row_bytes, float scale,
                                           Query query, Visible visible, uint8_t* scratch,
                                           WarpState<kDim, kTiles>& state) {
  constexpr int kChunks = kDim / 32;  // of 32 channels: 16 bytes of each of the four lanes of a row
  constexpr float kZero[4] = {};
  const uint32_t lane = threadIdx.x % kWarpThreads, g = lane / 4, i = lane % 4;
  const uint32_t first = run * kv::kBlockTokens;

  // All rows are under way to L2 before the first is used, as the registers hold but a few.
#pragma unroll
  for (uint32_t row = 0; row < 2; ++row) {
    const uint32_t at = first + lane + kWarpThreads * row;
    const uint64_t place = tokens.slot(tokens.token(at)) * row_bytes;
#pragma unroll
    for (uint32_t byte = 0; byte < 2 * kDim && at < tokens.count; byte += 128) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(keys + place + byte));
      asm volatile("prefetch.global.L2 [%0];" ::"l"(values + place + byte));
    }
  }

  uint32_t queries[kTiles][kChunks][4];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    // Odd columns are zero.
    const uint8_t* row = g % 2 == 0 ? query(4 * n + g / 2) : nullptr;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const uint4 words = row == nullptr ? make_uint4(0, 0, 0, 0)
                                         : *reinterpret_cast<const uint4*>(row + 2 * (32 * chunk + 8 * i));
      queries[n][chunk][0] = words.x, queries[n][chunk][1] = words.y;
      queries[n][chunk][2] = words.z, queries[n][chunk][3] = words.w;
    }
  }

  float scores[kTiles][8];
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    asm volatile("" ::: "memory");  // lest all loads come first, for which there are too few registers
    uint4 chunks[2][kChunks];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const uint32_t at = first + 8 * g + 2 * m + row;
      const uint8_t* key = keys + tokens.slot(tokens.token(at)) * row_bytes + 16 * i;
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        chunks[row][chunk] =
            at < tokens.count ? *reinterpret_cast<const uint4*>(key + 64 * chunk) : make_uint4(0, 0, 0, 0);
      }
    }
    float sums[kTiles][4] = {};
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const uint4 low = chunks[0][chunk], high = chunks[1][chunk];
      const uint32_t even[4] = {low.x, high.x, low.y, high.y}, odd[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        multiply_halves<kBfloat>(sums[n], even, queries[n][chunk][0], queries[n][chunk][1], sums[n]);
        multiply_halves<kBfloat>(sums[n], odd, queries[n][chunk][2], queries[n][chunk][3], sums[n]);
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const uint32_t at = first + 8 * g + 2 * m + row;
        const bool sees = at < tokens.count && visible(4 * n + i, tokens.token(at), at < tokens.sinks);
        scores[n][2 * m + row] = sees ? sums[n][2 * row] * scale : -INFINITY;
      }
    }
  }

  float factors[kTiles];
  uint32_t high_pairs[kTiles][4], low_pairs[kTiles][4];  // probabilities of tokens 2s and 2s + 1 of the lane
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    float highest = -1e30f;
#pragma unroll
    for (int t = 0; t < 8; ++t) highest = fmaxf(highest, scores[n][t]);
    for (int distance = 4; distance < kWarpThreads; distance *= 2)
      highest = fmaxf(highest, __shfl_xor_sync(kEveryLane, highest, distance));
    if (__any_sync(kEveryLane, highest > state.reference[n] + kLazyRescale)) {
      const float next = fmaxf(state.reference[n], highest), factor = exponential(state.reference[n] - next);
      state.reference[n] = next;
      state.sum[n] *= factor;
      state.zeros[n] *= factor;
#pragma unroll
      for (int o = 0; o < kDim / 8; ++o) state.out[n][o] *= factor;
    }
    factors[n] = exponential(highest - state.reference[n]);
    float sum = 0.0f;
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const float a = exponential(scores[n][2 * s] - highest),
                  b = exponential(scores[n][2 * s + 1] - highest);
      sum += a;
      sum += b;
      high_pairs[n][s] = to_halves<kBfloat>(a, b);
      const float2 rounded = to_floats<kBfloat>(high_pairs[n][s]);
      low_pairs[n][s] = to_halves<kBfloat>(a - rounded.x, b - rounded.y);
    }
    state.sum[n] = __fmaf_rn(sum, factors[n], state.sum[n]);
  }

  // Step s takes tokens 16 * i + 2 * s + (0, 1) and 8 more of every lane i, which the C fragments of two lanes hold.
  constexpr uint32_t kRowChunks = kDim / 8;  // of 16 bytes
  constexpr uint32_t kSwizzle = kRowChunks % 8 == 0 ? 7 : 3;
  const uint32_t shared = shared_address(scratch);
#pragma unroll 1
  for (uint32_t s = 0; s < 4; ++s) {
    __syncwarp();
#pragma unroll
    for (uint32_t x = 0; x < kStagedTokens * kRowChunks / kWarpThreads; ++x) {
      const uint32_t chunk = lane + kWarpThreads * x, row = chunk / kRowChunks, column = chunk % kRowChunks;
      const uint32_t at = first + 16 * (row % 8 / 2) + 8 * (row / 8) + 2 * s + row % 2;
      const uint8_t* value = values + tokens.slot(tokens.token(at)) * row_bytes;
      const uint4 words =
          at < tokens.count ? reinterpret_cast<const uint4*>(value)[column] : make_uint4(0, 0, 0, 0);
      reinterpret_cast<uint4*>(scratch)[row * kRowChunks + (column ^ (row & kSwizzle))] = words;
    }
    __syncwarp();
    uint32_t b[kTiles][2];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      uint32_t high = high_pairs[n][0], low = low_pairs[n][0];
#pragma unroll
      for (uint32_t other = 1; other < 4; ++other) {
        high = s == other ? high_pairs[n][other] : high;
        low = s == other ? low_pairs[n][other] : low;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t source = 8 * i + 4 * half + g / 2;
        const uint32_t of_high = __shfl_sync(kEveryLane, high, source),
                       of_low = __shfl_sync(kEveryLane, low, source);
        b[n][half] = g % 2 == 0 ? of_high : of_low;
      }
    }
    const uint32_t row = lane % 8 + lane / 16 * 8;
#pragma unroll
    for (int x = 0; x < kDim / 16; ++x) {
      uint32_t a[4];
      load_transposed(shared + 16 * (row * kRowChunks + ((2 * x + lane / 8 % 2) ^ (row & kSwizzle))), a);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        float sums[4];
        multiply_halves<kBfloat>(sums, a, b[n][0], b[n][1], kZero);
        state.out[n][2 * x] = __fmaf_rn(sums[0] + sums[1], factors[n], state.out[n][2 * x]);
        state.out[n][2 * x + 1] = __fmaf_rn(sums[2] + sums[3], factors[n], state.out[n][2 * x + 1]);
      }
    }
  }
  __syncwarp();
}

}  // namespace ph::attention
