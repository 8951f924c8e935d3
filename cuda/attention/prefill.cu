// Prefill attention over a growing cache on the GPU: one launch for a layer and step, whose shape follows from the step's
// (kv/step_graph.h).
//
// A thread block takes a tile of rows (prefill.h: query tokens times heads of the group) of one sequence and kv head, in
// four warps of 16 * kBands rows each, and goes through the tokens that they see, 64 at a time, with an online softmax:
// first the packed blocks, then the tokens in 16 bits. Products are mma.m16n8k16 with float32 sums.
//
// Packed blocks: while the tensor cores work on one block, the record of the next comes into shared memory by cp.async.
// The thread block unpacks a record once for all its rows, to codes plus zero points in float16, which is exact for
// integers up to 2048 (what of a zero point does not fit goes into a rank-one correction). Scales of keys are applied to
// the scores, and those of values, over the block's largest, to the probabilities, so that only these are rounded. In
// bfloat16, queries are brought to float16 by a power of two per row, exact but for what is below 2^-29 of the row's
// largest value.
// kMixed, for layers of which a part is kivi or raw16; keys and values are what they are independently of each other:
//   kivi keys      a scale per channel: queries times scales, anew for every block, as sums of bfloat16s that are exact
//                  (two of them, or three for float16), times codes; zero points, times the same, are one number per row
//   kivi values    a scale per token and 64 channels: for each of these groups, probabilities times scales become
//                  float16s relative to the row's largest, and are multiplied by codes and, in float32, by zero points
//   raw16          as tokens in 16 bits, but in the order of the record, which is that of fragments already
// Raw values come while scores are computed, the next block's raw keys while values are multiplied.
// Tokens in 16 bits: keys and values come as they are, values while scores are computed, the next keys while the values
// are multiplied. In bfloat16 probabilities are split into a high and a low part, for 8 bits would not do.
//
// The layout of records (kv/tile.h) decides which lane has what: lane (g, i) = (lane / 4, lane % 4) unpacks just what its
// B fragments need. So token 16i + u of a chunk, u in 0..15, is column 2i + u / 8 of score fragment u % 8, and
// the four of u / 4 = s are k step s of the second product; tokens in 16 bits are put to where that makes it true for
// them. Channels 16x + 4i + b, b in 0..3, are a lane's of k step x of the first product.
//
// Shared memory: queries as A fragments, each read by the lane that wrote it; a chunk's keys and values, either as B
// fragments, 16 bytes per lane (free of bank conflicts), or as rows, padded so that the fragments' loads are; the next
// record, without its raw values. Bytes moved: a tile reads the tokens it sees once, from the L2 cache mostly, and its queries once or twice, and
// writes its outputs once. All tensors and records are 16-byte aligned; records may straddle two pages of the pool.
//
// Deterministic: no atomics, and the order of sums is that of a row's tokens, whatever tile it is in.
#include <algorithm>

#include "attention/prefill.h"
#include "attention/ring.cuh"
#include "attention/tile_raw16.cuh"
#include "device/device_cuda.h"

namespace ph::attention {

namespace {

using kv::CacheView;
using kv::kBlockTokens;
using kv::kParamsBytes;
using kv::kUnitBytes;
using kv::StepSequence;
using kv::StepView;
using kv::window_begin;

constexpr uint32_t kWarps = 4;
constexpr uint32_t kThreads = kWarps * kWarpThreads;
constexpr uint32_t kRunsHeld = 64;    // blocks whose places are looked up at a time
constexpr uint32_t kKeyPadding = 32;  // bytes after a row of keys: 8-byte loads of 4 x 4 lanes meet all banks
constexpr uint32_t kValuePadding = 16;                 // after one of values: ldmatrix meets all banks
constexpr int32_t kLeastZero = -512, kMostZero = 511;  // zero points that are added to codes in float16
constexpr float kNoReference = -1e30f;
constexpr float kLog2OfE = 1.4426950408889634f;

// ---- shared memory ----

template <int kDim, bool kMixed>
struct PrefillShared {
  // Of a part of a packed block: its tokens', or kivi's.
  static constexpr uint32_t kScales =
      kMixed ? (kDim + kBlockTokens - 1) / kBlockTokens * kBlockTokens : kBlockTokens;
  static_assert(kv::kGroupChannels == kBlockTokens && kScales <= kv::kMostScales);
  TileSpans spans[kRunsHeld];  // of the records, without raw values
  Span raw[kMixed ? kRunsHeld : 1][kv::kParts];
  // Scales of a token's values are relative to `unit`; offsets are what zero points of tokens exceed, or kivi's zero points.
  alignas(16) float key_scales[kScales], value_scales[kScales];
  alignas(16) float key_offsets[kScales], value_offsets[kScales];
  float unit;
};

// Of the dynamic shared memory, in this order.
template <int kDim, int kBands>
struct Parts {
  static constexpr uint32_t kQueries = kWarps * kBands * (kDim / 16) * kWarpThreads * 16;
  static constexpr uint32_t kFragments = kBlockTokens * kDim * 2;  // of keys, of values
  static constexpr uint32_t kKeyStride = 2 * kDim + kKeyPadding, kValueStride = 2 * kDim + kValuePadding;
  static constexpr uint32_t kKeyRows = kBlockTokens * kKeyStride, kValueRows = kBlockTokens * kValueStride;
  static constexpr uint32_t kChunk =
      kKeyRows + kValueRows > 2 * kFragments ? kKeyRows + kValueRows : 2 * kFragments;
};

// ---- the state of a warp's rows ----

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
        if (of == band) facts.factor[of][r] = scale * kLog2OfE * down;
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

// ---- packed blocks ----

// Starts the copy of a run of bytes.
__device__ __forceinline__ void fetch_span(const uint8_t* pool, const Span& span, uint8_t* target) {
#pragma unroll
  for (int second = 0; second < 2; ++second) {
    const SpanPiece piece = span.piece(pool, second == 1);
    for (uint32_t at = threadIdx.x * kUnitBytes; at < piece.bytes; at += kThreads * kUnitBytes)
      kv::copy_async(reinterpret_cast<uint4*>(target + piece.offset + at), piece.source + at);
  }
}

// Starts the copy of a block's params and record, one behind the other.
__device__ __forceinline__ void fetch_block(const uint8_t* pool, const TileSpans& spans, uint8_t* slot) {
  fetch_span(pool, spans.params, slot);
  fetch_span(pool, spans.record, slot + kParamsBytes);
}

// Nibble words N (tile.h) of a lane of a group of `width` 0 to 4.
__device__ __forceinline__ void load_nibbles(const uint8_t* group, uint32_t width, uint32_t (&nibbles)[8]) {
  Nibbles loaded;
  load_group<0>(group, threadIdx.x % kWarpThreads, width, loaded);
  ph::attention::unpack_group(width, loaded);
#pragma unroll
  for (int x = 0; x < 8; ++x) nibbles[x] = loaded.words[x] & loaded.mask * 0x11u;
}

// Eight zero points, cut to what codes can be added to, minus 1024, in float16.
__device__ __forceinline__ void load_zero_pairs(const uint8_t* source, __half2 (&pairs)[4]) {
  const uint4 words = *reinterpret_cast<const uint4*>(source);
  const uint32_t zeros[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint32_t cut = __vmaxs2(__vmins2(zeros[k], 0x01ff01ffu), 0xfe00fe00u);
    const uint32_t bits = __vadd2(cut, 0x02000200u) | 0x64006400u;  // 1024 + (zero + 512)
    pairs[k] = __hsub2(*reinterpret_cast<const __half2*>(&bits), __float2half2_rn(2560.0f));
  }
}

// Two bytes of a word of codes, plus zero points: 0x6400 | code is 1024 + code.
__device__ __forceinline__ uint32_t codes_to_halves(uint32_t codes, int pair, __half2 zeros) {
  const uint32_t bits = __byte_perm(codes, 0x64646464u, pair == 0 ? 0x4140 : 0x4342);
  const __half2 sum = __hadd2(*reinterpret_cast<const __half2*>(&bits), zeros);
  return *reinterpret_cast<const uint32_t*>(&sum);
}

// Likewise without zero points, in bfloat16.
__device__ __forceinline__ uint32_t codes_to_bfloats(uint32_t codes, int pair) {
  const auto value = [&](int byte) {  // 0x4b000000 | code is 2^23 + code
    return __uint_as_float(__byte_perm(codes, 0x4b000000u, 0x7540 + byte)) - 0x1p23f;
  };
  return to_halves<true>(value(2 * pair), value(2 * pair + 1));
}

// The codes, or without bases residuals, of a lane of a group: registers (s, j) of tile.h.
__device__ __forceinline__ void load_codes(const TileLayout& layout, const Tile& tile, uint32_t part,
                                           uint32_t group, uint32_t (&codes)[4][4]) {
  const uint2 widths = *reinterpret_cast<const uint2*>(tile.record);
  const uint32_t of_part = part == PH_KV_KEYS ? widths.x : widths.y, width = of_part >> 4 * group & 15;
  uint32_t before = kv::width_sum(of_part & (1u << 4 * group) - 1);
  if (part == PH_KV_VALUES) before += kv::width_sum(widths.x);
  const uint8_t* source = tile.record + layout.groups + kv::kGroupBytes * before;
  uint32_t low[8], high[8];
  load_nibbles(source, digit_width(width, 0), low);
  load_nibbles(source + 4 * kv::kGroupBytes, digit_width(width, 1), high);

#pragma unroll
  for (int s = 0; s < 4; ++s) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int x = 2 * s + j % 2, shift = 4 * (j / 2);
      codes[s][j] = (low[x] >> shift & 0x0f0f0f0fu) | (high[x] >> shift & 0x0f0f0f0fu) << 4;
    }
  }
}

// Unpacks one group of packkv or fixed keys or values to B fragments, which are those of the lane that unpacks them.
//   keys    [group][fragment m of tokens][lane]: k steps 2 * group and 2 * group + 1
//   values  [group][j, of eight channels][half][lane]: k steps 2 * half and 2 * half + 1
template <int kDim>
__device__ __forceinline__ void unpack_group(const TileLayout& layout, const Tile& tile, uint32_t part,
                                             uint32_t group, uint4* fragments) {
  const uint32_t lane = threadIdx.x % kWarpThreads, g = lane / 4, i = lane % 4;
  uint32_t codes[4][4];
  load_codes(layout, tile, part, group, codes);
  // No byte overflows: the sums are codes.
  if (part == PH_KV_KEYS) {
    __half2 zeros[4];  // of tokens 8g + 0..7
    load_zero_pairs(tile.params + kv::zero_position(part, 8 * g), zeros);
    const uint32_t bases[2] = {
        base_word(tile.record + kv::kTileHeaderBytes, layout.narrow_bases[0], kDim / 16, i, 2 * group),
        base_word(tile.record + kv::kTileHeaderBytes, layout.narrow_bases[0], kDim / 16, i, 2 * group + 1)};
#pragma unroll
    for (int m = 0; m < 8; ++m) {
      const __half2 zero = m % 2 == 0 ? __low2half2(zeros[m / 2]) : __high2half2(zeros[m / 2]);
      const uint32_t even = codes[2 * (m / 4)][m % 4] + bases[0],
                     odd = codes[2 * (m / 4) + 1][m % 4] + bases[1];
      fragments[(group * 8 + m) * kWarpThreads + lane] =
          make_uint4(codes_to_halves(even, 0, zero), codes_to_halves(even, 1, zero),
                     codes_to_halves(odd, 0, zero), codes_to_halves(odd, 1, zero));
    }
  } else {
    __half2 zeros[2][4];  // of tokens 16i + 0..15
    load_zero_pairs(tile.params + kv::zero_position(part, 16 * i), zeros[0]);
    load_zero_pairs(tile.params + kv::zero_position(part, 16 * i + 8), zeros[1]);
    const uint32_t bases =
        base_word(tile.record + layout.value_bases, layout.narrow_bases[1], kDim / 32, g, group);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t base = __byte_perm(bases, 0, 0x1111 * j);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t even = codes[2 * half][j] + base, odd = codes[2 * half + 1][j] + base;
        fragments[((group * 4 + j) * 2 + half) * kWarpThreads + lane] =
            make_uint4(codes_to_halves(even, 0, zeros[half][0]), codes_to_halves(even, 1, zeros[half][1]),
                       codes_to_halves(odd, 0, zeros[half][2]), codes_to_halves(odd, 1, zeros[half][3]));
      }
    }
  }
}

// Unpacks one group of kivi to codes without zero points, keys in bfloat16 and values in float16, in the order of raw16.
__device__ __forceinline__ void unpack_kivi_group(const TileLayout& layout, const Tile& tile, uint32_t part,
                                                  uint32_t group, uint4* fragments) {
  const uint32_t lane = threadIdx.x % kWarpThreads;
  const __half2 none = __float2half2_rn(-1024.0f);
  uint32_t codes[4][4];
  load_codes(layout, tile, part, group, codes);
#pragma unroll
  for (int x = 0; x < 2; ++x) {  // sixteen channels
#pragma unroll
    for (int f = 0; f < 4; ++f) {
      uint4 fragment;
      if (part == PH_KV_KEYS) {  // of tokens 8g + 2f and the next
        const uint32_t even = codes[2 * (f / 2) + x][2 * (f % 2)],
                       odd = codes[2 * (f / 2) + x][2 * (f % 2) + 1];
        fragment = make_uint4(codes_to_bfloats(even, 0), codes_to_bfloats(odd, 0), codes_to_bfloats(even, 1),
                              codes_to_bfloats(odd, 1));
      } else {  // of channels g and 8 + g
        const uint32_t low = codes[f][2 * x], high = codes[f][2 * x + 1];
        fragment = make_uint4(codes_to_halves(low, 0, none), codes_to_halves(high, 0, none),
                              codes_to_halves(low, 1, none), codes_to_halves(high, 1, none));
      }
      fragments[((2 * group + x) * 4 + f) * kWarpThreads + lane] = fragment;
    }
  }
}

template <bool kBfloat>
__device__ __forceinline__ float load_scale(const uint8_t* source) {
  const uint16_t bits = *reinterpret_cast<const uint16_t*>(source);
  return kBfloat ? bf16_to_float(bits) : __half2float(__ushort_as_half(bits));
}

// Unpacks a record but for raw16, and what its values share; returns whether a zero point of a token of this thread's has
// an offset.
template <int kDim, bool kBfloat, bool kMixed>
__device__ __forceinline__ bool unpack_block(const kv::TileShape& shape, const TileLayout& layout,
                                             const Tile& tile, uint4* keys, uint4* values,
                                             PrefillShared<kDim, kMixed>& shared) {
  constexpr uint32_t kGroups = kDim / 32;
  const auto unpack = [&](uint32_t part, uint32_t group, uint4* fragments) {
    if (!kMixed || kv::is_per_token(shape.parts[part]))
      unpack_group<kDim>(layout, tile, part, group, fragments);
    else if (kv::is_kivi(shape.parts[part])) unpack_kivi_group(layout, tile, part, group, fragments);
  };
  for (uint32_t task = threadIdx.x / kWarpThreads; task < 2 * kGroups; task += kWarps) {
    if (task < kGroups) unpack(PH_KV_KEYS, task, keys);
    else unpack(PH_KV_VALUES, task - kGroups, values);
  }
  static_assert(kThreads == kv::kParts * kBlockTokens);
  const uint32_t part = threadIdx.x / kBlockTokens, token = threadIdx.x % kBlockTokens;
  if constexpr (kMixed) {
    if (kv::is_raw16(shape.parts[part])) return false;
    if (kv::is_kivi(shape.parts[part])) {
      const bool of_keys = part == PH_KV_KEYS;
      const uint8_t* source = tile.record + (of_keys ? kv::kTileHeaderBytes : layout.value_bases);
      const uint32_t count = kv::group_scales(shape, part);
      for (uint32_t i = token; i < count; i += kBlockTokens) {
        const float zero = *reinterpret_cast<const int16_t*>(source + 2 * (count + i));
        (of_keys ? shared.key_scales : shared.value_scales)[i] = load_scale<kBfloat>(source + 2 * i);
        (of_keys ? shared.key_offsets : shared.value_offsets)[i] = zero;
      }
      return false;
    }
  }
  const float scale = load_scale<kBfloat>(tile.params + kv::scale_position(part, token));
  const int32_t zero = *reinterpret_cast<const int16_t*>(tile.params + kv::zero_position(part, token));
  const int32_t offset = zero - min(max(zero, kLeastZero), kMostZero);
  if (part == PH_KV_KEYS) {
    shared.key_scales[token] = scale;
    shared.key_offsets[token] = static_cast<float>(offset);
  } else {
    // Away from the subnormals, which the reciprocal does not know.
    const float unit =
        fmaxf(*reinterpret_cast<const float*>(tile.params + kv::kLargestScalePosition), 0x1p-120f);
    shared.value_scales[token] = scale * reciprocal(unit);
    shared.value_offsets[token] = static_cast<float>(offset);
    if (token == 0) shared.unit = unit;
  }
  return offset != 0;
}

// Sixteen floats of a lane's tokens.
__device__ __forceinline__ void load_sixteen(const float* source, float (&x)[16]) {
  const uint32_t i = threadIdx.x % 4;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float4 four = *reinterpret_cast<const float4*>(source + 16 * i + 4 * k);
    x[4 * k] = four.x;
    x[4 * k + 1] = four.y;
    x[4 * k + 2] = four.z;
    x[4 * k + 3] = four.w;
  }
}

// Scores of packkv or fixed keys.
template <int kDim, int kBands>
__device__ __forceinline__ void token_scores(const uint4* queries, const uint4* keys, const float* scales,
                                             const float* zero_offsets, bool offsets,
                                             const RowFacts<kBands>& facts, float (&scores)[kBands][8][4]) {
  const uint32_t lane = threadIdx.x % kWarpThreads;
#pragma unroll
  for (int group = 0; group < kDim / 32; ++group) {
    uint4 a[kBands][2];
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd)
        a[band][odd] = queries[(band * (kDim / 16) + 2 * group + odd) * kWarpThreads + lane];
    }
#pragma unroll
    for (int m = 0; m < 8; ++m) {
      const uint4 b = keys[(group * 8 + m) * kWarpThreads + lane];
#pragma unroll
      for (int band = 0; band < kBands; ++band) {
        multiply_fragment<false>(scores[band][m], a[band][0], b.x, b.y);
        multiply_fragment<false>(scores[band][m], a[band][1], b.z, b.w);
      }
    }
  }

  float of_token[16];
  if (offsets) {
    load_sixteen(zero_offsets, of_token);
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
#pragma unroll
      for (int m = 0; m < 8; ++m) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          scores[band][m][c] =
              __fmaf_rn(of_token[m + 8 * (c % 2)], facts.query_sum[band][c / 2], scores[band][m][c]);
        }
      }
    }
  }
  load_sixteen(scales, of_token);
#pragma unroll
  for (int band = 0; band < kBands; ++band) {
#pragma unroll
    for (int m = 0; m < 8; ++m) {
#pragma unroll
      for (int c = 0; c < 4; ++c) scores[band][m][c] *= of_token[m + 8 * (c % 2)];
    }
  }
}

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

// Fragment f of sixteen channels in the order of raw16 (tile.h): the B fragments of two rows of eight tokens or channels.
__device__ __forceinline__ uint4 load_raw(const uint4* fragments, int channels, int f) {
  const uint4 pairs = fragments[(4 * channels + f) * kWarpThreads + threadIdx.x % kWarpThreads];
  return make_uint4(pairs.x, pairs.z, pairs.y, pairs.w);
}

// Scores of kivi keys.
template <int kDim, int kBands, bool kBfloat>
__device__ __forceinline__ void channel_scores(const uint4* queries, const uint4* keys, const float* scales,
                                               const float* zeros, float (&scores)[kBands][8][4]) {
  constexpr int kTerms = kBfloat ? 2 : 3;  // bfloat16s that a product of two values is exactly
  const uint32_t lane = threadIdx.x % kWarpThreads, i = lane % 4;
  float shift[kBands][2] = {};  // of the rows: this lane's channels' zero points
#pragma unroll
  for (int x = 0; x < kDim / 16; ++x) {
    const float4 scale = *reinterpret_cast<const float4*>(scales + 16 * x + 4 * i),
                 zero = *reinterpret_cast<const float4*>(zeros + 16 * x + 4 * i);
    uint4 terms[kBands][kTerms];
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
      const uint4 query = queries[(band * (kDim / 16) + x) * kWarpThreads + lane];
      const uint32_t pairs[4] = {query.x, query.y, query.z, query.w};
      uint32_t words[kTerms][4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // channels 16x + 4i + 2(k / 2) and the next, of row g + 8(k % 2)
        float2 two = to_floats<kBfloat>(pairs[k]);
        two.x *= k / 2 == 0 ? scale.x : scale.z;
        two.y *= k / 2 == 0 ? scale.y : scale.w;
        float& of_row = shift[band][k % 2];
        of_row = __fmaf_rn(two.x, k / 2 == 0 ? zero.x : zero.z, of_row);
        of_row = __fmaf_rn(two.y, k / 2 == 0 ? zero.y : zero.w, of_row);
#pragma unroll
        for (int term = 0; term < kTerms; ++term) {
          words[term][k] = to_halves<true>(two.x, two.y);
          const float2 taken = to_floats<true>(words[term][k]);
          two.x -= taken.x;
          two.y -= taken.y;
        }
      }
#pragma unroll
      for (int term = 0; term < kTerms; ++term)
        terms[band][term] = make_uint4(words[term][0], words[term][1], words[term][2], words[term][3]);
    }
#pragma unroll
    for (int f = 0; f < 4; ++f) {
      const uint4 b = load_raw(keys, x, f);
#pragma unroll
      for (int band = 0; band < kBands; ++band) {
#pragma unroll
        for (int term = 0; term < kTerms; ++term) {
          multiply_fragment<true>(scores[band][2 * f], terms[band][term], b.x, b.y);
          multiply_fragment<true>(scores[band][2 * f + 1], terms[band][term], b.z, b.w);
        }
      }
    }
  }
#pragma unroll
  for (int band = 0; band < kBands; ++band) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      shift[band][r] += __shfl_xor_sync(kEveryLane, shift[band][r], 1);
      shift[band][r] += __shfl_xor_sync(kEveryLane, shift[band][r], 2);
#pragma unroll
      for (int m = 0; m < 8; ++m) {
        scores[band][m][2 * r] += shift[band][r];
        scores[band][m][2 * r + 1] += shift[band][r];
      }
    }
  }
}

// Adds packkv or fixed values, times the probabilities in `scores`, to the outputs, which `rescale` brings to the same
// reference.
template <int kDim, int kBands>
__device__ __forceinline__ void token_values(const uint4* values, const float* scales,
                                             const float* zero_offsets, float unit, bool offsets,
                                             float (&scores)[kBands][8][4], const float (&rescale)[kBands][2],
                                             RowState<kDim, kBands>& state) {
  const uint32_t lane = threadIdx.x % kWarpThreads;
  float of_token[16];
  load_sixteen(scales, of_token);
  uint4 weights[kBands][4];
#pragma unroll
  for (int band = 0; band < kBands; ++band) {
#pragma unroll
    for (int m = 0; m < 8; ++m) {
#pragma unroll
      for (int c = 0; c < 4; ++c) scores[band][m][c] *= of_token[m + 8 * (c % 2)];
    }
#pragma unroll
    for (int s = 0; s < 4; ++s) weights[band][s] = weights_of<false>(scores, band, s);
  }
  if (offsets) {
    load_sixteen(zero_offsets, of_token);
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        // As they are multiplied by the rest of the values.
        const uint32_t pairs[4] = {weights[band][s].x, weights[band][s].y, weights[band][s].z,
                                   weights[band][s].w};
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          const float2 two = to_floats<false>(pairs[x]);
          const int u = 4 * s + 2 * (x / 2);
          float& shift = state.shift[band][x % 2];
          shift = __fmaf_rn(two.x * unit, of_token[u], shift);
          shift = __fmaf_rn(two.y * unit, of_token[u + 1], shift);
        }
      }
    }
  }
  scale_out(state, rescale);
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
    float sums[kBands][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 b = values[(n * 2 + half) * kWarpThreads + lane];
#pragma unroll
      for (int band = 0; band < kBands; ++band) {
        multiply_fragment<false>(sums[band], weights[band][2 * half], b.x, b.y);
        multiply_fragment<false>(sums[band], weights[band][2 * half + 1], b.z, b.w);
      }
    }
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
#pragma unroll
      for (int c = 0; c < 4; ++c)
        state.out[band][n][c] = __fmaf_rn(sums[band][c], unit, state.out[band][n][c]);
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

// Adds kivi values, times the probabilities in `scores`, to the outputs.
template <int kDim, int kBands>
__device__ __forceinline__ void group_values(const uint4* values, const float* scales, const float* zeros,
                                             const float (&scores)[kBands][8][4],
                                             RowState<kDim, kBands>& state) {
  constexpr int kPairs = kv::kGroupChannels / 16;  // of eight channels, in a group of them
#pragma unroll
  for (int group = 0; group * kPairs < kDim / 16; ++group) {
    float scale[16], zero[16];
    load_sixteen(scales + group * kBlockTokens, scale);
    load_sixteen(zeros + group * kBlockTokens, zero);
    uint4 weights[kBands][4];
    float units[kBands][2], shift[kBands][2] = {};
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
      float up[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float most = 0.0f;
#pragma unroll
        for (int u = 0; u < 16; ++u) most = fmaxf(most, score_of(scores, band, r, u) * scale[u]);
        most = fmaxf(most, __shfl_xor_sync(kEveryLane, most, 1));
        most = fmaxf(most, __shfl_xor_sync(kEveryLane, most, 2));
        powers_of_two(most, up[r], units[band][r]);
      }
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        uint32_t pairs[4];
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          const int u = 4 * s + 2 * (x / 2), r = x % 2;
          pairs[x] = to_halves<false>(score_of(scores, band, r, u) * scale[u] * up[r],
                                      score_of(scores, band, r, u + 1) * scale[u + 1] * up[r]);
          // As they are multiplied by the codes.
          const float2 two = to_floats<false>(pairs[x]);
          shift[band][r] = __fmaf_rn(two.x, zero[u], shift[band][r]);
          shift[band][r] = __fmaf_rn(two.y, zero[u + 1], shift[band][r]);
        }
        weights[band][s] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        shift[band][r] += __shfl_xor_sync(kEveryLane, shift[band][r], 1);
        shift[band][r] += __shfl_xor_sync(kEveryLane, shift[band][r], 2);
      }
    }
#pragma unroll
    for (int pair = group * kPairs; pair < (group + 1) * kPairs && pair < kDim / 16; ++pair) {
      float sums[kBands][2][4];
#pragma unroll
      for (int band = 0; band < kBands; ++band) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[band][0][c] = sums[band][1][c] = shift[band][c / 2];
      }
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const uint4 b = load_raw(values, pair, s);
#pragma unroll
        for (int band = 0; band < kBands; ++band) {
          multiply_fragment<false>(sums[band][0], weights[band][s], b.x, b.y);
          multiply_fragment<false>(sums[band][1], weights[band][s], b.z, b.w);
        }
      }
#pragma unroll
      for (int band = 0; band < kBands; ++band) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
#pragma unroll
          for (int odd = 0; odd < 2; ++odd) {
            float& out = state.out[band][2 * pair + odd][c];
            out = __fmaf_rn(sums[band][odd][c], units[band][c / 2], out);
          }
        }
      }
    }
  }
}

// Scores of a warp's rows and a packed block.
template <int kDim, int kBands, bool kBfloat, bool kMixed>
__device__ __forceinline__ void packed_scores(const kv::TileShape& shape, const uint4* queries,
                                              const uint4* keys, const PrefillShared<kDim, kMixed>& shared,
                                              bool offsets, const RowFacts<kBands>& facts,
                                              float (&scores)[kBands][8][4]) {
  const kv::TilePart& part = shape.parts[PH_KV_KEYS];
  if (!kMixed || kv::is_per_token(part)) {
    token_scores<kDim>(queries, keys, shared.key_scales, shared.key_offsets, offsets, facts, scores);
  } else if (kv::is_kivi(part)) {
    channel_scores<kDim, kBands, kBfloat>(queries, keys, shared.key_scales, shared.key_offsets, scores);
  } else {
    plain_scores<kDim, kBands, kBfloat>(queries, scores, [&](int x, int f) { return load_raw(keys, x, f); });
  }
}

// Adds the block's values to the rows' outputs, weighted by the scores. `start` is the block's first token; window: 0, or
// that of a layer where some row does not see all of the block.
template <int kDim, int kBands, bool kBfloat, bool kMixed>
__device__ __forceinline__ void packed_values(const kv::TileShape& shape, const uint4* values,
                                              const PrefillShared<kDim, kMixed>& shared, bool offsets,
                                              uint32_t start, uint32_t window, const RowFacts<kBands>& facts,
                                              float (&scores)[kBands][8][4], RowState<kDim, kBands>& state) {
  if (window > 0) {
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
#pragma unroll
      for (int m = 0; m < 8; ++m) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const uint32_t token = start + 16 * (threadIdx.x % 4) + m + 8 * (c % 2);
          if (token < window_begin(window, facts.position[band][c / 2])) scores[band][m][c] = -INFINITY;
        }
      }
    }
  }

  float rescale[kBands][2];
  soften(scores, facts.factor, state, rescale);
  const kv::TilePart& part = shape.parts[PH_KV_VALUES];
  if (!kMixed || kv::is_per_token(part)) {
    token_values(values, shared.value_scales, shared.value_offsets, shared.unit, offsets, scores, rescale,
                 state);
    return;
  }
  scale_out(state, rescale);
  if (kv::is_kivi(part)) {
    group_values(values, shared.value_scales, shared.value_offsets, scores, state);
  } else {
    plain_values<kDim, kBands, kBfloat>(scores, state,
                                        [&](int pair, int s) { return load_raw(values, pair, s); });
  }
}

// ---- tokens in 16 bits ----

// Where the tokens of a sequence are, of one part and head.
struct PlainSource {
  const uint8_t* recent;   // slot 0
  const uint8_t* present;  // the step's first token of the sequence
  uint64_t row_bytes;
  uint32_t before;

  __device__ __forceinline__ const uint8_t* row(const CacheView& cache, uint32_t position) const {
    return position < before ? recent + kv::recent_slot(cache, position) * row_bytes
                             : present + (position - before) * row_bytes;
  }
};

// Token of a chunk that row `slot` of its keys holds: row 8m + g is column g of score fragment m.
__device__ __forceinline__ uint32_t key_token(uint32_t slot) { return 8 * (slot % 8) + slot / 8; }
// And of its values: row 16s + 8h + 2i + b is k step s; a lane has those of its i.
__device__ __forceinline__ uint32_t value_token(uint32_t slot) {
  return 16 * (slot % 8 / 2) + 2 * (slot / 8) + slot % 2;
}

// Starts the copy of entries [begin, begin + 64) of a list to rows; past `end` the last one repeats. Two threads a row.
template <int kDim, typename Token>
__device__ __forceinline__ void fetch_rows(const CacheView& cache, const PlainSource& source,
                                           const PlainTokens& list, uint32_t begin, uint32_t end,
                                           uint8_t* rows, uint32_t stride, Token token) {
  static_assert(kThreads == 2 * kBlockTokens);
  const uint32_t slot = threadIdx.x / 2, side = threadIdx.x % 2;
  const uint8_t* row = source.row(cache, list.position(min(begin + token(slot), end - 1)));
#pragma unroll
  for (uint32_t k = 0; k < kDim / 16; ++k) {
    const uint32_t byte = 16 * (2 * k + side);
    kv::copy_async(reinterpret_cast<uint4*>(rows + slot * stride + byte), row + byte);
  }
}

// Which entries of the list a row sees: its sinks, and first..end.
struct Visible {
  uint32_t first, end;
};
__device__ __forceinline__ Visible visible(const PlainTokens& list, uint32_t window, uint32_t position) {
  return {list.before(max(window_begin(window, position), list.sinks)), list.before(position + 1)};
}

// Rows of keys and of values as plain_scores and plain_values load them.
template <int kDim, int kBands>
__device__ __forceinline__ uint4 load_keys(const uint8_t* rows, int x, int f) {
  constexpr uint32_t kStride = Parts<kDim, kBands>::kKeyStride;
  const uint32_t lane = threadIdx.x % kWarpThreads, g = lane / 4, i = lane % 4;
  const uint8_t* keys = rows + (16 * f + g) * kStride + 32 * x + 8 * i;
  const uint2 even = *reinterpret_cast<const uint2*>(keys),
              odd = *reinterpret_cast<const uint2*>(keys + 8 * kStride);
  return make_uint4(even.x, even.y, odd.x, odd.y);
}

template <int kDim, int kBands>
__device__ __forceinline__ uint4 load_values(const uint8_t* rows, int pair, int s) {
  const uint32_t lane = threadIdx.x % kWarpThreads;
  const uint8_t* values = rows + (16 * s + lane / 8 % 2 * 8 + lane % 8) * Parts<kDim, kBands>::kValueStride +
                          lane / 16 * 16 + 32 * pair;
  uint32_t b[4];
  load_transposed(shared_address(values), b);
  return make_uint4(b[0], b[1], b[2], b[3]);
}

// ---- kernel ----

struct PrefillParameters {
  CacheView cache;
  kv::TileShape shape;
  StepView step;
  TileLayout layout;
  const uint8_t* parts[kv::kParts];
  const uint8_t* queries;
  uint8_t* out;
  uint32_t layer, window;
  float scale;
};

template <int kDim, int kBands, bool kBfloat, bool kMixed>
__global__ void __launch_bounds__(kThreads, 2)
    PrefillKernel(const __grid_constant__ PrefillParameters parameters) {
  using Places = Parts<kDim, kBands>;
  constexpr uint32_t kTileRows = kWarps * 16 * kBands;
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ PrefillShared<kDim, kMixed> shared;
  uint8_t* const chunk = dynamic + Places::kQueries;
  uint8_t* const slot = chunk + Places::kChunk;

  const CacheView& cache = parameters.cache;
  const kv::TileShape& shape = parameters.shape;
  const uint32_t window = parameters.window, head = blockIdx.y, group = cache.query_heads / cache.heads;
  const uint32_t number = entry_of_tile(parameters.step, blockIdx.x, group, kTileRows);
  const StepSequence entry = parameters.step.sequences[number];
  const uint32_t all_rows = entry.tokens * group, tiles = (all_rows + kTileRows - 1) / kTileRows;
  const uint32_t turn = blockIdx.x - first_tile(entry, number, group, kTileRows);
  if (turn >= tiles) return;
  // The last tiles see the most tokens: they go first.
  const Tile16 tile = {parameters.queries,
                       parameters.out,
                       (tiles - 1 - turn) * kTileRows,
                       all_rows,
                       group,
                       cache.query_heads,
                       head,
                       entry.input};
  const uint32_t before = static_cast<uint32_t>(entry.before);
  const uint32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  const uint32_t band_row = warp * 16 * kBands;  // of the tile, the warp's first
  const bool active = tile.first + band_row < all_rows;
  const auto position_of = [&](uint32_t of_tile) { return before + tile.row(of_tile) / group; };
  // Of the first and last rows of the tile, and of the warp.
  const uint32_t tile_low = position_of(0), tile_high = position_of(kTileRows - 1);
  const uint32_t warp_low = position_of(band_row), warp_high = position_of(band_row + 16 * kBands - 1);

  uint4* const queries = reinterpret_cast<uint4*>(dynamic) + warp * kBands * (kDim / 16) * kWarpThreads;
  RowFacts<kBands> facts;
  RowState<kDim, kBands> state;
#pragma unroll
  for (int band = 0; band < kBands; ++band) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      facts.position[band][r] = position_of(band_row + 16 * band + lane / 4 + 8 * r);
      state.reference[band][r] = kNoReference;
      state.sum[band][r] = state.shift[band][r] = 0.0f;
      facts.query_sum[band][r] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) state.out[band][n][c] = 0.0f;
    }
  }
  const bool scaled = !kMixed || kv::is_per_token(shape.parts[PH_KV_KEYS]);
  if (scaled) load_queries<kDim, kBands, kBfloat, true>(tile, band_row, parameters.scale, queries, facts);
  else load_queries<kDim, kBands, kBfloat, false>(tile, band_row, parameters.scale, queries, facts);

  // Packed blocks, from the first that the tile sees on.
  const uint32_t sinks = cache.sinks, tile_begin = window_begin(window, tile_low);
  uint32_t first_block = tile_begin > sinks ? (tile_begin - sinks) / kBlockTokens : 0;
  uint4* const keys = reinterpret_cast<uint4*>(chunk);
  uint4* const values = reinterpret_cast<uint4*>(chunk + Places::kFragments);
  const uint32_t* index = kv::index_of(cache, parameters.layer, entry.sequence);
  const uint32_t* page_table = kv::page_table_of(cache, parameters.layer, entry.sequence);
  const uint32_t params_units = kMixed ? kv::params_bytes(shape) / kUnitBytes : kv::kParamsUnits;
  const uint32_t raw_units[kv::kParts] = {kMixed ? kv::raw_bytes(shape, PH_KV_KEYS) / kUnitBytes : 0,
                                          kMixed ? kv::raw_bytes(shape, PH_KV_VALUES) / kUnitBytes : 0};
#pragma unroll 1
  for (; first_block < entry.first_block; first_block += kRunsHeld) {
    const uint32_t count = min(kRunsHeld, entry.first_block - first_block);
    __syncthreads();
    if (threadIdx.x < count) {
      const kv::RecordSpan span =
          kv::record_span(cache, index, first_block + threadIdx.x, head, params_units);
      const uint32_t values_begin = span.end - raw_units[PH_KV_VALUES],
                     keys_begin = values_begin - raw_units[PH_KV_KEYS];
      shared.spans[threadIdx.x] = {make_span(page_table, span.params, span.params + params_units),
                                   make_span(page_table, span.begin, keys_begin)};
      if constexpr (kMixed) {
        if (raw_units[PH_KV_KEYS] > 0)
          shared.raw[threadIdx.x][PH_KV_KEYS] = make_span(page_table, keys_begin, values_begin);
        if (raw_units[PH_KV_VALUES] > 0)
          shared.raw[threadIdx.x][PH_KV_VALUES] = make_span(page_table, values_begin, span.end);
      }
    }
    __syncthreads();
    fetch_block(cache.pool, shared.spans[0], slot);
    if (kMixed && raw_units[PH_KV_KEYS] > 0)
      fetch_span(cache.pool, shared.raw[0][PH_KV_KEYS], reinterpret_cast<uint8_t*>(keys));
#pragma unroll 1
    for (uint32_t at = 0; at < count; ++at) {
      kv::copy_wait();
      __syncthreads();  // the record is there, raw keys too, and the fragments are free but for these
      if (kMixed && raw_units[PH_KV_VALUES] > 0)
        fetch_span(cache.pool, shared.raw[at][PH_KV_VALUES], reinterpret_cast<uint8_t*>(values));
      const bool offset = unpack_block<kDim, kBfloat>(
          shape, parameters.layout, Tile{slot, slot + kParamsBytes, lane}, keys, values, shared);
      const bool offsets = __syncthreads_or(offset);  // the fragments are there, and the record is free
      if (at + 1 < count) fetch_block(cache.pool, shared.spans[at + 1], slot);
      float scores[kBands][8][4] = {};
      if (active) packed_scores<kDim, kBands, kBfloat>(shape, queries, keys, shared, offsets, facts, scores);
      if (kMixed && raw_units[PH_KV_KEYS] + raw_units[PH_KV_VALUES] > 0) {
        kv::copy_wait();
        __syncthreads();  // raw values are there, and the place of the keys is free
        if (raw_units[PH_KV_KEYS] > 0 && at + 1 < count)
          fetch_span(cache.pool, shared.raw[at + 1][PH_KV_KEYS], reinterpret_cast<uint8_t*>(keys));
      }
      const uint32_t start = sinks + (first_block + at) * kBlockTokens;
      if (active) {
        packed_values<kDim, kBands, kBfloat>(shape, values, shared, offsets, start,
                                             start < window_begin(window, warp_high) ? window : 0, facts,
                                             scores, state);
      }
    }
  }

  // Tokens in 16 bits, up to the last that the tile sees.
  if (kBfloat && scaled)
    load_queries<kDim, kBands, kBfloat, false>(tile, band_row, parameters.scale, queries, facts);
  const PlainTokens list = plain_tokens(cache, entry);
  const uint32_t end = list.before(tile_high + 1), skipped = visible(list, window, tile_low).first;
  // The next chunk from an entry on: those between the sinks and the first that the tile sees are left out.
  const auto next_chunk = [&](uint32_t begin) {
    return begin >= list.sinks && begin < skipped ? max(begin, skipped / kBlockTokens * kBlockTokens) : begin;
  };
  const auto source_of = [&](uint32_t part) {
    const uint64_t row_bytes = static_cast<uint64_t>(cache.heads) * kDim * 2, of_head = head * kDim * 2;
    const uint8_t* recent =
        cache.recent + (kv::stream_of(cache, parameters.layer, entry.sequence) * kv::kParts + part) *
                           kv::recent_part_bytes(cache);
    return PlainSource{recent + of_head, parameters.parts[part] + entry.input * row_bytes + of_head,
                       row_bytes, before};
  };
  const PlainSource key_source = source_of(PH_KV_KEYS), value_source = source_of(PH_KV_VALUES);
  uint8_t* const key_rows = chunk;
  uint8_t* const value_rows = chunk + Places::kKeyRows;
  __syncthreads();  // the fragments are free
  uint32_t begin = next_chunk(0);
  fetch_rows<kDim>(cache, key_source, list, begin, end, key_rows, Places::kKeyStride, key_token);
#pragma unroll 1
  while (begin < end) {
    kv::copy_wait();
    __syncthreads();  // the keys are there, and the place of the values is free
    fetch_rows<kDim>(cache, value_source, list, begin, end, value_rows, Places::kValueStride, value_token);
    float scores[kBands][8][4] = {};
    if (active) {
      plain_scores<kDim, kBands, kBfloat>(
          queries, scores, [&](int x, int f) { return load_keys<kDim, kBands>(key_rows, x, f); });
    }
    kv::copy_wait();
    __syncthreads();  // the values are there, and the place of the keys is free
    const uint32_t next = next_chunk(begin + kBlockTokens);
    if (next < end)
      fetch_rows<kDim>(cache, key_source, list, next, end, key_rows, Places::kKeyStride, key_token);
    if (active) {
      const bool masked = begin + kBlockTokens > visible(list, window, warp_low).end ||
                          begin < visible(list, window, warp_high).first;
      if (masked) {
#pragma unroll
        for (int band = 0; band < kBands; ++band) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const Visible seen = visible(list, window, facts.position[band][r]);
#pragma unroll
            for (int m = 0; m < 8; ++m) {
#pragma unroll
              for (int c = 0; c < 2; ++c) {
                const uint32_t at = begin + 16 * (lane % 4) + m + 8 * c;
                if (at >= seen.end || (at >= list.sinks && at < seen.first))
                  scores[band][m][2 * r + c] = -INFINITY;
              }
            }
          }
        }
      }
      float rescale[kBands][2];
      soften(scores, facts.factor, state, rescale);
      scale_out(state, rescale);
      plain_values<kDim, kBands, kBfloat>(
          scores, state, [&](int pair, int s) { return load_values<kDim, kBands>(value_rows, pair, s); });
    }
    begin = next;
  }
  if (!active) return;

#pragma unroll
  for (int band = 0; band < kBands; ++band) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = state.sum[band][r], shift = state.shift[band][r];
      for (int distance = 1; distance < 4; distance *= 2) {
        sum += __shfl_xor_sync(kEveryLane, sum, distance);
        shift += __shfl_xor_sync(kEveryLane, shift, distance);
      }
      const uint32_t row = tile.first + band_row + 16 * band + lane / 4 + 8 * r;
      if (row >= all_rows) continue;
      uint8_t* out = tile.out + 2 * (kDim * tile.place(row) + 2 * (lane % 4));
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        *reinterpret_cast<uint32_t*>(out + 16 * n) = to_halves<kBfloat>(
            (state.out[band][n][2 * r] + shift) / sum, (state.out[band][n][2 * r + 1] + shift) / sum);
      }
    }
  }
}

// ---- launch ----

template <int kDim, int kBands, bool kMixed>
void launch(ph_device& device, const PrefillParameters& parameters) {
  using Places = Parts<kDim, kBands>;
  const kv::TileShape& shape = parameters.shape;
  const uint32_t record_bytes = kv::largest_record_bytes(shape) - kv::raw_bytes(shape);
  const uint32_t shared_bytes = Places::kQueries + Places::kChunk + kParamsBytes + record_bytes;
  const uint32_t limit = static_cast<uint32_t>(device.shared_bytes - sizeof(PrefillShared<kDim, kMixed>));
  if (shared_bytes > limit) {
    throw Error(
        PH_ERROR_UNSUPPORTED,
        "Cannot prefill with head_dim %d on this GPU: that takes %u bytes of shared memory, and a thread "
        "block has %u",
        kDim, shared_bytes, limit);
  }
  const CacheView& cache = parameters.cache;
  const auto kernel = cache.dtype == PH_BF16 ? PrefillKernel<kDim, kBands, true, kMixed>
                                             : PrefillKernel<kDim, kBands, false, kMixed>;
  allow_shared(device, kernel, SharedMemory::kPrefer);
  const uint32_t tiles = tile_numbers(parameters.step, cache.query_heads / cache.heads, kWarps * 16 * kBands);
  kernel<<<dim3(tiles, cache.heads), kThreads, shared_bytes, device.stream>>>(parameters);
  PH_CUDA_TRY(cudaGetLastError());
}

template <int kDim, int kBands>
void launch_bands(ph_device& device, const PrefillParameters& parameters) {
  const kv::TileShape& shape = parameters.shape;
  if (kv::is_per_token(shape.parts[PH_KV_KEYS]) && kv::is_per_token(shape.parts[PH_KV_VALUES]))
    launch<kDim, kBands, false>(device, parameters);
  else launch<kDim, 1, true>(device, parameters);  // two bands take too many registers
}

}  // namespace

void prefill(ph_device& device, const CacheView& cache, const kv::TileShape& shape, uint32_t layer,
             const StepView& step, kv::StepTensors tensors, const uint8_t* queries, uint8_t* out, float scale,
             uint32_t window) {
  PrefillParameters parameters{};
  parameters.cache = cache;
  parameters.shape = shape;
  parameters.step = step;
  parameters.layout = {kv::bases_position(shape, PH_KV_VALUES),
                       kv::bases_position(shape, kv::kParts),
                       {shape.parts[0].base_bits == 4, shape.parts[1].base_bits == 4}};
  for (uint32_t part = 0; part < kv::kParts; ++part) parameters.parts[part] = tensors.parts[part];
  parameters.queries = queries;
  parameters.out = out;
  parameters.layer = layer;
  parameters.window = window;
  parameters.scale = scale;
  // More rows share what a warp loads, where there are so many; a row's results are the same. Wide heads take all
  // registers with one band.
  const bool many = step.most_queries * (cache.query_heads / cache.heads) > kWarps * 16;
  if (cache.head_dim == 64)
    many ? launch_bands<64, 2>(device, parameters) : launch_bands<64, 1>(device, parameters);
  else if (cache.head_dim == 96)
    many ? launch_bands<96, 2>(device, parameters) : launch_bands<96, 1>(device, parameters);
  else if (cache.head_dim == 128)
    many ? launch_bands<128, 2>(device, parameters) : launch_bands<128, 1>(device, parameters);
  else launch_bands<256, 1>(device, parameters);
}

}  // namespace ph::attention
