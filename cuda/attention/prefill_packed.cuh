// Packed blocks in prefill (prefill.cu): their records to B fragments in shared memory, and a warp's rows against these.
#pragma once

#include "attention/prefill_rows.cuh"
#include "attention/ring.cuh"

namespace ph::attention {

constexpr uint32_t kRunsHeld = 64;                     // blocks whose places are looked up at a time
constexpr int32_t kLeastZero = -512, kMostZero = 511;  // zero points that are added to codes in float16

// Where a block's params and record are.
struct TileSpans {
  Span params, record;
};

template <int kDim, bool kMixed>
struct PrefillShared {
  // Of a part of a packed block: its tokens', or kivi's.
  static constexpr uint32_t kScales =
      kMixed ? (kDim + kv::kBlockTokens - 1) / kv::kBlockTokens * kv::kBlockTokens : kv::kBlockTokens;
  static_assert(kv::kGroupChannels == kv::kBlockTokens && kScales <= kv::kMostScales);
  TileSpans spans[kRunsHeld];  // of the records, without raw values
  Span raw[kMixed ? kRunsHeld : 1][kv::kParts];
  // Scales of a token's values are relative to `unit`; offsets are what zero points of tokens exceed, or kivi's zero points.
  alignas(16) float key_scales[kScales], value_scales[kScales];
  alignas(16) float key_offsets[kScales], value_offsets[kScales];
  float unit;
};

// ---- records to fragments ----

// Starts the copy of a run of bytes.
__device__ __forceinline__ void fetch_span(const uint8_t* pool, const Span& span, uint8_t* target) {
#pragma unroll
  for (int second = 0; second < 2; ++second) {
    const SpanPiece piece = span.piece(pool, second == 1);
    for (uint32_t at = threadIdx.x * kv::kUnitBytes; at < piece.bytes; at += kThreads * kv::kUnitBytes)
      kv::copy_async(reinterpret_cast<uint4*>(target + piece.offset + at), piece.source + at);
  }
}

// Starts the copy of a block's params and record, one behind the other.
__device__ __forceinline__ void fetch_block(const uint8_t* pool, const TileSpans& spans, uint8_t* slot) {
  fetch_span(pool, spans.params, slot);
  fetch_span(pool, spans.record, slot + kv::kParamsBytes);
}

// Nibble words N (tile.h) of a lane of a group of `width` 0 to 4.
__device__ __forceinline__ void load_nibbles(const uint8_t* group, uint32_t width, uint32_t (&nibbles)[8]) {
  Nibbles<0> loaded;
  load_words_of(group, threadIdx.x % kWarpThreads, width, loaded.words);
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
        base_word(tile.record + kv::kTileHeaderBytes, layout.base_bits[PH_KV_KEYS], kDim / 16, i, 2 * group),
        base_word(tile.record + kv::kTileHeaderBytes, layout.base_bits[PH_KV_KEYS], kDim / 16, i,
                  2 * group + 1)};
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
        base_word(tile.record + layout.value_bases, layout.base_bits[PH_KV_VALUES], kDim / 32, g, group);
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
  static_assert(kThreads == kv::kParts * kv::kBlockTokens);
  const uint32_t part = threadIdx.x / kv::kBlockTokens, token = threadIdx.x % kv::kBlockTokens;
  if constexpr (kMixed) {
    if (kv::is_raw16(shape.parts[part])) return false;
    if (kv::is_kivi(shape.parts[part])) {
      const bool of_keys = part == PH_KV_KEYS;
      const uint8_t* source = tile.record + (of_keys ? kv::kTileHeaderBytes : layout.value_bases);
      const uint32_t count = kv::group_scales(shape, part);
      for (uint32_t i = token; i < count; i += kv::kBlockTokens) {
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

// ---- scores ----

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

// ---- values ----

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

// Adds kivi values, times the probabilities in `scores`, to the outputs.
template <int kDim, int kBands>
__device__ __forceinline__ void group_values(const uint4* values, const float* scales, const float* zeros,
                                             const float (&scores)[kBands][8][4],
                                             RowState<kDim, kBands>& state) {
  constexpr int kPairs = kv::kGroupChannels / 16;  // of eight channels, in a group of them
#pragma unroll
  for (int group = 0; group * kPairs < kDim / 16; ++group) {
    float scale[16], zero[16];
    load_sixteen(scales + group * kv::kBlockTokens, scale);
    load_sixteen(zeros + group * kv::kBlockTokens, zero);
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
          if (token < kv::window_begin(window, facts.position[band][c / 2])) scores[band][m][c] = -INFINITY;
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

}  // namespace ph::attention
