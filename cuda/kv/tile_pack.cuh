// Packing a head's 64 tokens as a tile (tile.h) on the GPU: a thread block of kTileThreads turns the values of keys and
// of values into codes in shared memory, finds bases and widths, and writes a record from registers to the stream.
//
// Codes are bytes that are read and written 16 (of keys) and 4 and 16 (of values) at a time without bank conflicts: keys
// [head_dim / 4][64] words of four channels of a token, values [head_dim][16] words of four tokens of a channel, so that
// either word is a register of the mma fragment; 16-byte chunks are permuted (key_chunk, value_chunk).
//
// Where the values are is up to the kernel: Rows has `at(part, token)`, the head's values of a token, at a multiple of 16
// bytes, in device or shared memory.
#pragma once

#include <cuda/atomic>

#include "kv/cache.cuh"
#include "kv/pack.cuh"

namespace ph::kv {

constexpr int kTileThreads = 256;
constexpr int kTileWarps = kTileThreads / kWarpThreads;

// Which of the threads that pack a head this is.
__device__ __forceinline__ uint32_t tile_thread() { return thread_index() % kTileThreads; }

// Calls run(element, whether a part is kivi or raw16, as a constant).
template <typename Run>
void dispatch_pack_kernel(const TileShape& shape, Run run) {
  const auto with_element = [&](auto element) {
    if (is_per_token(shape.parts[0]) && is_per_token(shape.parts[1])) run(element, std::false_type{});
    else run(element, std::true_type{});
  };
  if (shape.dtype == PH_F16) with_element(F16{});
  else with_element(BF16{});
}

// Replaces values that are not finite by 0.
template <typename Element>
__device__ __forceinline__ void zero_non_finite(typename Element::Vector& vector) {
  constexpr uint32_t kExponent = std::is_same_v<Element, F16> ? 0x7c00 : 0x7f80;
  uint32_t* words = reinterpret_cast<uint32_t*>(vector.pairs);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if ((words[i] & kExponent) == kExponent) words[i] &= 0xffff0000u;
    if ((words[i] >> 16 & kExponent) == kExponent) words[i] &= 0x0000ffffu;
  }
}
// ---- append: tiles ----

// How the values of one token and part become codes.
struct alignas(16) Quantizer {
  float scale, zero;
  float reciprocal;  // 0: divide
  uint32_t zeros;    // minus the zero point in 16 bits, twice
};

// NearRounding (quantize.cuh) is exact for bfloat16 too: quotients of 8-bit significands are no closer than
// 2^-10 to a midpoint without being on it. It needs a reciprocal that neither over- nor underflows, and
// quotients below 2^9 where codes are not cut to the limit anyway.
__device__ __forceinline__ Quantizer make_quantizer(uint32_t code_limit, float scale, int32_t zero) {
  const int32_t furthest = max(-zero, zero + static_cast<int32_t>(code_limit)) + 1;
  const bool near =
      furthest < static_cast<int32_t>(NearRounding::kLimit) && scale > 0x1p-100f && scale < 0x1p100f;
  return {scale, static_cast<float>(zero), near ? Reciprocal(scale).high : 0.0f,
          (0u - static_cast<uint32_t>(zero) & 0xffff) * 0x10001u};
}

// Apart, so that what hardly ever runs neither bloats the kernel nor takes its registers.
template <typename Element>
__device__ __noinline__ uint2 divide_codes(uint4 values, float scale, float zero, uint32_t limit) {
  typename Element::Vector vector;
  vector.load(reinterpret_cast<const uint8_t*>(&values));
  return CodeMaker<Element>{{scale, zero}, limit}.codes(vector);
}

// Codes of a token's eight values.
template <typename Element>
__device__ __forceinline__ uint2 make_codes(const typename Element::Vector& vector,
                                            const Quantizer& quantizer, uint32_t limit) {
  if (quantizer.reciprocal > 0.0f) {
    return HalfCodeMaker<NearRounding>{{quantizer.reciprocal}, quantizer.zeros, limit * 0x10001u}.codes(
        vector);
  }
  return divide_codes<Element>(*reinterpret_cast<const uint4*>(vector.pairs), quantizer.scale, quantizer.zero,
                               limit);
}

// Where the quantizer of a channel of kivi's keys lies. Lanes ask for the i-th of eight channels each, one after another: so
// they meet eight different groups of four banks.
PH_HOST_DEVICE uint32_t channel_slot(uint32_t channel) { return channel ^ (channel / kVectorValues % 8); }

// The same where each of the values, of channels from `first` on, has a quantizer of its own.
template <typename Element>
__device__ __forceinline__ uint2 make_channel_codes(const typename Element::Vector& vector,
                                                    const Quantizer* quantizers, uint32_t first,
                                                    uint32_t limit) {
  uint32_t words[2] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const Quantizer quantizer = quantizers[channel_slot(first + i)];
    const uint32_t code =
        quantizer.reciprocal > 0.0f
            ? HalfCodeMaker<NearRounding>{{quantizer.reciprocal}, quantizer.zeros, limit * 0x10001u}.code(
                  vector.at(i))
            : CodeMaker<Element>{{quantizer.scale, quantizer.zero}, limit}.code(vector.at(i)) & 0xff;
    words[i / 4] |= code << 8 * (i % 4);
  }
  return make_uint2(words[0], words[1]);
}

// Where a 16-byte chunk of codes lies in shared memory. Of keys: word `row` (four channels) of tokens 4 *
// chunk to 4 * chunk + 3. Eight lanes that write share the chunk and differ in bits 1 to 3 of the row; eight
// that read differ in bits 0 and 1 of the row and bit 1 of the chunk: each time they meet eight different
// groups of four banks.
PH_HOST_DEVICE uint32_t key_chunk(uint32_t row, uint32_t chunk) {
  const uint32_t swizzle = ((row ^ row >> 3) & 1) | (row >> 2 & 1) << 1 | (row >> 1 & 1) << 2;
  return row * 4 * kBlockTokens + 16 * (chunk ^ swizzle);
}

// Of values: channel `row`, tokens 16 * chunk to 16 * chunk + 15. Lanes that write words differ in bits 3 to
// 5 of the row and in the word of the chunk; eight that read differ in bit 0 of the row and in the chunk.
PH_HOST_DEVICE uint32_t value_chunk(uint32_t row, uint32_t chunk) {
  return row / 2 * 128 + 16 * ((row % 2 * 4 + chunk) ^ (row >> 3 & 7));
}

// Byte-wise minimum of words, through the 16-bit minima that Hopper has instructions for.
struct ByteMinimum {
  static constexpr uint32_t kEven = 0x00ff00ffu;
  uint32_t even = kEven, odd = kEven;

  __device__ __forceinline__ void add(uint32_t word) {
    even = __vminu2(even, word & kEven);
    odd = __vminu2(odd, word >> 8 & kEven);
  }
  // With the lane whose number differs in bit `lanes`.
  __device__ __forceinline__ void across(int lanes) {
    even = __vminu2(even, __shfl_xor_sync(kEveryLane, even, lanes));
    odd = __vminu2(odd, __shfl_xor_sync(kEveryLane, odd, lanes));
  }
  __device__ __forceinline__ uint32_t word() const { return even | odd << 8; }
  // Least of the four bytes.
  __device__ __forceinline__ uint32_t least() const {
    const uint32_t pair = __vminu2(even, odd);
    return min(pair & 0xffff, pair >> 16);
  }
};

// What becomes of a head, in shared memory. kScales: of a part, at most.
template <bool kMixed, uint32_t kScales = kMixed ? kMostScales : kBlockTokens>
struct TileShared {
  Quantizer quantizers[kParts][kScales];               // by scale_index, of kivi's keys by channel_slot
  alignas(16) uint32_t bases[kParts][kMostBaseWords];  // a byte each, in the order of base_place
  uint32_t widths[kParts];                             // the header's words
};

// Scales and zero points of kivi, as the record has them.
template <uint32_t kScales = kMostScales>
struct GroupAffines {
  alignas(16) uint16_t halves[kParts][2 * kScales];
};
struct NoAffines {};

// A warp reads its group's codes as the registers (s, j) of its lanes, at 4 * s + j.
__device__ __forceinline__ void load_key_codes(const uint8_t* codes, uint32_t group, uint32_t lane,
                                               uint32_t (&words)[kRegisters]) {
#pragma unroll
  for (uint32_t s = 0; s < 4; ++s) {
    const uint32_t row = 8 * group + 4 * (s % 2) + lane % 4;
    const uint4 chunk = *reinterpret_cast<const uint4*>(codes + key_chunk(row, lane / 4 * 2 + s / 2));
    words[4 * s] = chunk.x;
    words[4 * s + 1] = chunk.y;
    words[4 * s + 2] = chunk.z;
    words[4 * s + 3] = chunk.w;
  }
}

__device__ __forceinline__ void load_value_codes(const uint8_t* codes, uint32_t group, uint32_t lane,
                                                 uint32_t (&words)[kRegisters]) {
#pragma unroll
  for (uint32_t j = 0; j < 4; ++j) {
    const uint32_t row = kTileChannels * group + 8 * j + lane / 4;
    const uint4 chunk = *reinterpret_cast<const uint4*>(codes + value_chunk(row, lane % 4));
    words[j] = chunk.x;
    words[4 + j] = chunk.y;
    words[8 + j] = chunk.z;
    words[12 + j] = chunk.w;
  }
}

// Subtracts the bases of a group from its codes, and notes them in `bases` at their places.
__device__ __forceinline__ void subtract_key_bases(const TileShape& shape, uint32_t group, uint32_t lane,
                                                   uint32_t (&words)[kRegisters], uint32_t* bases) {
#pragma unroll
  for (uint32_t half = 0; half < 2; ++half) {
    ByteMinimum minimum;
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
      minimum.add(words[4 * half + j]);
      minimum.add(words[4 * (half + 2) + j]);
    }
    for (int lanes = 4; lanes < kWarpThreads; lanes *= 2) minimum.across(lanes);
    const uint32_t base = minimum.word();
    // No byte borrows from the next.
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
      words[4 * half + j] -= base;
      words[4 * (half + 2) + j] -= base;
    }
    if (lane < 4) bases[lane * (shape.head_dim / 16) + 2 * group + half] = base;
  }
}

__device__ __forceinline__ void subtract_value_bases(const TileShape& shape, uint32_t group, uint32_t lane,
                                                     uint32_t (&words)[kRegisters], uint32_t* bases) {
  uint32_t least = 0;  // of this lane's four channels, a byte each
#pragma unroll
  for (uint32_t j = 0; j < 4; ++j) {
    ByteMinimum minimum;
#pragma unroll
    for (uint32_t s = 0; s < 4; ++s) minimum.add(words[4 * s + j]);
    least |= minimum.least() << 8 * j;
  }
  ByteMinimum channels;
  channels.add(least);
  channels.across(1);
  channels.across(2);
  const uint32_t base = channels.word();
#pragma unroll
  for (uint32_t j = 0; j < 4; ++j) {
    const uint32_t channel = __byte_perm(base, 0, 0x1111 * j);
#pragma unroll
    for (uint32_t s = 0; s < 4; ++s) words[4 * s + j] -= channel;
  }
  if (lane % 4 == 0) bases[lane / 4 * (shape.head_dim / kTileChannels) + group] = base;
}

// Bits of the widest of a group's residuals.
__device__ __forceinline__ uint32_t group_width(const uint32_t (&words)[kRegisters]) {
  uint32_t any = 0;
#pragma unroll
  for (uint32_t i = 0; i < kRegisters; ++i) any |= words[i];
  any = __reduce_or_sync(kEveryLane, any);
  any |= any >> 16;
  return bit_width((any | any >> 8) & 0xff);
}

// An entry carries all that its reader needs: it orders no other memory.
__device__ __forceinline__ uint32_t load_entry(uint32_t* entry) {
  return cuda::atomic_ref<uint32_t, cuda::thread_scope_device>(*entry).load(cuda::memory_order_relaxed);
}
__device__ __forceinline__ void store_entry(uint32_t* entry, uint32_t value) {
  cuda::atomic_ref<uint32_t, cuda::thread_scope_device>(*entry).store(value, cuda::memory_order_relaxed);
}

// Where a record begins whose size is known: the last end that is known plus the sizes since, 32 entries at a time. For a
// whole warp. The nearest of the `count` entries before `own`, or `start` before all of them, that is an end ends the
// search; where an entry is 0, it waits.
__device__ __forceinline__ uint32_t find_begin(uint32_t* own, uint32_t count, uint32_t start) {
  const uint32_t lane = threadIdx.x % kWarpThreads;
  uint32_t begin = 0;
  for (uint32_t passed = 0;;) {
    const uint32_t entry = passed + lane < count ? load_entry(own - 1 - (passed + lane)) : start;
    const uint32_t known = __ballot_sync(kEveryLane, entry != 0);
    const uint32_t ends = __ballot_sync(kEveryLane, entry != 0 && (entry & kSizeOnly) == 0);
    const uint32_t nearest = ends & (0u - ends);
    const uint32_t needed = 2 * nearest - 1;  // the lanes up to the nearest end; all without one
    if ((known & needed) != needed) {
      __nanosleep(32);
      continue;
    }
    begin += __reduce_add_sync(kEveryLane, (needed >> lane & 1) != 0 ? entry & ~kSizeOnly : 0);
    if (ends != 0) return begin;
    passed += kWarpThreads;
  }
}

// The stream around one record, which begins in one page and may end in the next but one.
struct RecordTarget {
  uint8_t* pages[3];
  uint32_t first_page;  // of the stream

  __device__ __forceinline__ uint8_t* unit(uint32_t unit) const {
    const uint32_t page = unit / kPageUnits - first_page;
    return (page == 0 ? pages[0] : page == 1 ? pages[1] : pages[2]) + unit % kPageUnits * kUnitBytes;
  }
};

// Writes a group of residuals below 2^kWidth from unit `begin` on.
template <uint32_t kWidth>
__device__ __forceinline__ void store_group(const uint32_t (&residuals)[kRegisters], uint32_t lane,
                                            const RecordTarget& target, uint32_t begin) {
  uint32_t nibbles[8], words[2 * kWidth];
#pragma unroll
  for (uint32_t s = 0; s < 4; ++s) {
    nibbles[2 * s] = residuals[4 * s] | residuals[4 * s + 2] << 4;
    nibbles[2 * s + 1] = residuals[4 * s + 1] | residuals[4 * s + 3] << 4;
  }
  pack_words(kWidth, nibbles, words);
#pragma unroll
  for (uint32_t x = 0; x + 4 <= 2 * kWidth; x += 4) {
    *reinterpret_cast<uint4*>(target.unit(begin + word_position(kWidth, lane, x) / kUnitBytes)) =
        make_uint4(words[x], words[x + 1], words[x + 2], words[x + 3]);
  }
  if constexpr (kWidth % 2 == 1) {
    constexpr uint32_t x = 2 * kWidth - 2;
    const uint32_t position = word_position(kWidth, lane, x);
    *reinterpret_cast<uint2*>(target.unit(begin + position / kUnitBytes) + position % kUnitBytes) =
        make_uint2(words[x], words[x + 1]);
  }
}

__device__ __forceinline__ void store_narrow_group(uint32_t width, const uint32_t (&residuals)[kRegisters],
                                                   uint32_t lane, const RecordTarget& target,
                                                   uint32_t begin) {
  if (width == 1) store_group<1>(residuals, lane, target, begin);
  else if (width == 2) store_group<2>(residuals, lane, target, begin);
  else if (width == 3) store_group<3>(residuals, lane, target, begin);
  else if (width == 4) store_group<4>(residuals, lane, target, begin);
}

__device__ __forceinline__ void store_any_group(uint32_t width, const uint32_t (&residuals)[kRegisters],
                                                uint32_t lane, const RecordTarget& target, uint32_t begin) {
  if (width <= 4) return store_narrow_group(width, residuals, lane, target, begin);
  uint32_t low[kRegisters], high[kRegisters];
#pragma unroll
  for (uint32_t i = 0; i < kRegisters; ++i) {
    low[i] = residuals[i] & 0x0f0f0f0fu;
    high[i] = residuals[i] >> 4 & 0x0f0f0f0fu;
  }
  store_group<4>(low, lane, target, begin);
  store_narrow_group(width - 4, high, lane, target, begin + 4 * kGroupBytes / kUnitBytes);
}

// The u-th unit of a record's bases, or of what stands in their place, keys' first.
template <bool kMixed, uint32_t kScales, typename Affines>
__device__ __forceinline__ uint4 base_unit(const TileShape& shape, const TileShared<kMixed, kScales>& shared,
                                           const Affines& affines, uint32_t unit) {
  const uint32_t key_units = base_bytes(shape, PH_KV_KEYS) / kUnitBytes;
  const uint32_t part = unit < key_units ? PH_KV_KEYS : PH_KV_VALUES;
  const uint32_t place = part == PH_KV_KEYS ? unit : unit - key_units;
  if constexpr (kMixed) {
    if (is_kivi(shape.parts[part])) return reinterpret_cast<const uint4*>(affines.halves[part])[place];
  }
  const uint4* bases = reinterpret_cast<const uint4*>(shared.bases[part]);
  if (shape.parts[part].base_bits == 8) return bases[place];
  const uint4 a = bases[2 * place], b = bases[2 * place + 1];
  return make_uint4(a.x | a.y << 4, a.z | a.w << 4, b.x | b.y << 4, b.z | b.w << 4);
}

// Finds the scales and zero points of a kivi part, a thread for each.
template <typename Element, typename Rows, uint32_t kScales>
__device__ __forceinline__ void make_group_quantizers(const TileShape& shape, uint32_t part, const Rows& rows,
                                                      TileShared<true, kScales>& shared,
                                                      GroupAffines<kScales>& affines) {
  using Vector = typename Element::Vector;
  const uint32_t index = tile_thread(), count = group_scales(shape, part);
  if (index >= count) return;
  float minimum = INFINITY, maximum = -INFINITY;
  if (part == PH_KV_KEYS) {
#pragma unroll 16
    for (uint32_t token = 0; token < kBlockTokens; ++token) {
      const float value = value_at<Element>(rows.at(part, token) + 2 * index);
      const float finite = value * 0.0f == 0.0f ? value : 0.0f;
      minimum = fminf(minimum, finite);
      maximum = fmaxf(maximum, finite);
    }
  } else {
    const uint32_t first = index / kBlockTokens * kGroupChannels;
    const uint32_t end = min(first + kGroupChannels, shape.head_dim);
    typename Vector::Extremes extremes;
    for (uint32_t channel = first; channel < end; channel += kVectorValues) {
      Vector held;
      held.load(rows.at(part, index % kBlockTokens) + 2 * channel);
      zero_non_finite<Element>(held);
      extremes.add(held);
    }
    extremes.finish(minimum, maximum);
  }
  const Affine affine = tile_affine(shape, part, minimum, maximum);
  const int32_t zero = static_cast<int32_t>(affine.zero);
  shared.quantizers[part][part == PH_KV_KEYS ? channel_slot(index) : index] =
      make_quantizer(shape.parts[part].code_limit, affine.scale, zero);
  affines.halves[part][index] = static_cast<uint16_t>(scale_bits(shape.dtype, affine.scale));
  affines.halves[part][count + index] = static_cast<uint16_t>(zero);
}

// Quantises the block's tokens of one head into shared memory.
template <typename Element, int kRounds, bool kMixed, uint32_t kScales, typename Rows>
__device__ __forceinline__ void quantize_head(const TileShape& shape, const Rows& rows,
                                              const TileShared<kMixed, kScales>& shared, uint64_t non_finite,
                                              uint8_t* key_codes, uint8_t* value_codes) {
  using Vector = typename Element::Vector;
  const uint32_t thread = tile_thread(), warp = thread / kWarpThreads, lane = thread % kWarpThreads;
  // A warp takes 8 vectors (whole 128-byte lines) of 4 x 4 tokens, or 4 of 8 x 4 where the head does not
  // divide by 64.
  const uint32_t vector_bits = shape.head_dim % 64 == 0 ? 3 : 2;
#pragma unroll 1
  for (uint32_t round = 0; round < kRounds; ++round) {
    const uint32_t task = warp + kTileWarps * round;
    if (task >= shape.head_dim / 16) break;
    const uint32_t vector = (task >> (vector_bits - 1) << vector_bits) + lane % (1u << vector_bits);
    const uint32_t quad = (task % (1u << (vector_bits - 1)) << (5 - vector_bits)) + (lane >> vector_bits);
#pragma unroll
    for (uint32_t part = 0; part < kParts; ++part) {
      if (kMixed && is_raw16(shape.parts[part])) continue;
      const uint32_t limit = shape.parts[part].code_limit;
      Vector held[4];
#pragma unroll
      for (uint32_t k = 0; k < 4; ++k) held[k].load(rows.at(part, 4 * quad + k) + vector * kVectorBytes);
      if ((non_finite >> 4 * quad & 15) != 0) {
#pragma unroll
        for (uint32_t k = 0; k < 4; ++k) zero_non_finite<Element>(held[k]);
      }
      uint2 codes[4];
#pragma unroll
      for (uint32_t k = 0; k < 4; ++k) {
        uint32_t index = 4 * quad + k;
        if constexpr (kMixed) {
          index = scale_index(shape, part, index, vector * kVectorValues);
          if (part == PH_KV_KEYS && is_kivi(shape.parts[part])) {
            codes[k] = make_channel_codes<Element>(held[k], shared.quantizers[part], index, limit);
            continue;
          }
        }
        codes[k] = make_codes<Element>(held[k], shared.quantizers[part][index], limit);
      }
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        uint32_t words[4], channels[4];
#pragma unroll
        for (uint32_t k = 0; k < 4; ++k) words[k] = half == 0 ? codes[k].x : codes[k].y;
        if (part == PH_KV_KEYS) {
          *reinterpret_cast<uint4*>(key_codes + key_chunk(2 * vector + half, quad)) =
              make_uint4(words[0], words[1], words[2], words[3]);
          continue;
        }
        transpose4(words, channels);
#pragma unroll
        for (uint32_t k = 0; k < 4; ++k) {
          const uint32_t channel = vector * kVectorValues + 4 * half + k;
          *reinterpret_cast<uint32_t*>(value_codes + value_chunk(channel, quad / 4) + 4 * (quad % 4)) =
              channels[k];
        }
      }
    }
  }
}

// A matrix of 8 x 8 16-bit values, two of row lane / 4 in each lane, becomes its transpose.
__device__ __forceinline__ uint32_t transpose8(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// Copies the block's values of one head and part to their fragments, from unit `begin` on; whole warps.
template <typename Rows>
__device__ __forceinline__ void store_raw(const TileShape& shape, uint32_t part, const Rows& rows,
                                          const RecordTarget& target, uint32_t begin) {
  const uint32_t thread = tile_thread(), warp = thread / kWarpThreads, lane = thread % kWarpThreads,
                 g = lane / 4, i = lane % 4;
  for (uint32_t f = warp; f < shape.head_dim / kFragmentChannels * 4; f += kTileWarps) {
    const uint32_t channel = kFragmentChannels * (f / 4);
    uint32_t words[4];
    if (part == PH_KV_KEYS) {
      const uint32_t token = 8 * g + 2 * (f % 4), position = 2 * (channel + 4 * i);
      const uint2 even = *reinterpret_cast<const uint2*>(rows.at(part, token) + position);
      const uint2 odd = *reinterpret_cast<const uint2*>(rows.at(part, token + 1) + position);
      words[0] = even.x, words[1] = odd.x, words[2] = even.y, words[3] = odd.y;
    } else {
      // Rows of tokens; two of a lane's register are 2i and 2i + 1.
      const uint32_t token = 16 * (g / 2) + 4 * (f % 4) + g % 2;
#pragma unroll
      for (uint32_t r = 0; r < 4; ++r) {
        words[r] = transpose8(*reinterpret_cast<const uint32_t*>(rows.at(part, token + 2 * (r / 2)) +
                                                                 2 * (channel + 8 * (r % 2) + 2 * i)));
      }
    }
    *reinterpret_cast<uint4*>(target.unit(begin + kLanes * f + lane)) =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// The residuals of a head, from its codes: a warp's groups, kRounds of them. Notes bases and widths.
template <int kRounds, bool kMixed, uint32_t kScales>
__device__ __forceinline__ void find_residuals(const TileShape& shape, const uint8_t* key_codes,
                                               const uint8_t* value_codes,
                                               TileShared<kMixed, kScales>& shared,
                                               uint32_t (&residuals)[kRounds][kRegisters]) {
  const uint32_t thread = tile_thread(), warp = thread / kWarpThreads, lane = thread % kWarpThreads;
  const uint32_t groups = tile_groups(shape);
#pragma unroll
  for (uint32_t round = 0; round < kRounds; ++round) {
    const uint32_t task = warp + kTileWarps * round;
    if (task >= kParts * groups) continue;
    const uint32_t part = task < groups ? PH_KV_KEYS : PH_KV_VALUES;
    const uint32_t group = task < groups ? task : task - groups;
    if (kMixed && is_raw16(shape.parts[part])) continue;
    uint32_t width = shape.parts[part].width;
    if (part == PH_KV_KEYS) {
      load_key_codes(key_codes, group, lane, residuals[round]);
      if (width == 0) subtract_key_bases(shape, group, lane, residuals[round], shared.bases[part]);
    } else {
      load_value_codes(value_codes, group, lane, residuals[round]);
      if (width == 0) subtract_value_bases(shape, group, lane, residuals[round], shared.bases[part]);
    }
    if (width == 0) width = group_width(residuals[round]);
    if (lane == 0) atomicOr(&shared.widths[part], width << 4 * group);
  }
}

// Writes a head's record, of `record_bytes`, from unit `begin` on.
template <int kRounds, bool kMixed, uint32_t kScales, typename Affines, typename Rows>
__device__ __forceinline__ void store_record(const TileShape& shape,
                                             const TileShared<kMixed, kScales>& shared,
                                             const Affines& affines, const Rows& rows,
                                             const uint32_t (&residuals)[kRounds][kRegisters],
                                             const RecordTarget& target, uint32_t begin,
                                             uint32_t record_bytes) {
  const uint32_t thread = tile_thread(), warp = thread / kWarpThreads, lane = thread % kWarpThreads;
  const uint32_t groups = tile_groups(shape);
#pragma unroll
  for (uint32_t round = 0; round < kRounds; ++round) {
    const uint32_t task = warp + kTileWarps * round;
    if (task >= kParts * groups) continue;
    const uint32_t part = task < groups ? PH_KV_KEYS : PH_KV_VALUES;
    const uint32_t group = task < groups ? task : task - groups;
    if (kMixed && is_raw16(shape.parts[part])) continue;
    store_any_group(shared.widths[part] >> 4 * group & 15, residuals[round], lane, target,
                    begin + group_unit(shape, shared.widths, part, group));
  }
  if (thread < bases_position(shape, kParts) / kUnitBytes) {
    *reinterpret_cast<uint4*>(target.unit(begin + thread)) =
        thread == 0 ? make_uint4(shared.widths[PH_KV_KEYS], shared.widths[PH_KV_VALUES], 0, 0)
                    : base_unit(shape, shared, affines, thread - 1);
  }
  if constexpr (kMixed) {
    for (uint32_t part = 0; part < kParts; ++part) {
      if (!is_raw16(shape.parts[part])) continue;
      store_raw(shape, part, rows, target, begin + raw_begin(shape, part, record_bytes) / kUnitBytes);
    }
  }
}

}  // namespace ph::kv
