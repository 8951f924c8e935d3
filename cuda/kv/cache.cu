// The growing kv cache on the GPU: packing a step's blocks as tiles, keeping its newest tokens, and
// unpacking.
//
// append runs up to three kernels, one after another on the device's stream:
//   ParamsKernel   a thread block per block of 64 tokens, a warp per token: extremes over all heads and
//                  channels, scales and zero points. They go to the workspace; the block's index entries
//                  become "not known yet".
//   TileKernel     a thread block per (block, head): quantises 64 tokens x head_dim of keys and of values
//                  into shared memory, finds bases and widths, and with them the size of its record; sums the
//                  sizes of the records before it in the index, and writes its own from registers to the
//                  stream.
//   RecentKernel   copies the tokens that stay in 16 bits to their places. Last, as packing reads what they
//                  replace.
// A step that packs nothing runs the last one only.
//
// Shared memory of TileKernel, bytes that are read and written 16 (of keys) and 4 and 16 (of values) at a
// time without bank conflicts: keys [head_dim / 4][64] words of four channels of a token, values
// [head_dim][16] words of four tokens of a channel, so that either word is a register of the mma fragment;
// 16-byte chunks are permuted (key_chunk, value_chunk).
//
// Tokens, records and the workspace begin at multiples of 16 bytes. Bytes moved: a packed value is read
// twice, 2 bytes each, and its width in bits (plus 1/64 base) is written once, in 16-byte words, or 8-byte
// halves of them for the odd bit of a width; a token that stays is read and written once.
//
// Kernels with kMixed serve layers of which a part is kivi or raw16. TileKernel then finds kivi's scales itself, reading
// the head's values once more, and copies raw16's from the tokens to the stream, in 16-byte words too.
//
// Deterministic, and the same bytes as on the CPU: thread blocks wait for the sizes of earlier records, and
// where a record begins does not depend on the order in which they run. Thread blocks take their records in
// ascending order, by a ticket, and make a size known before they wait, so that every wait ends.
#include <algorithm>
#include <cuda/atomic>

#include "device/device_cuda.h"
#include "kv/cache_operations.h"
#include "kv/pack.cuh"

namespace ph::kv {

namespace {

constexpr int kParamsThreads = 512;
constexpr int kParamsWarps = kParamsThreads / kWarpThreads;
constexpr int kTileThreads = 256;
constexpr int kTileWarps = kTileThreads / kWarpThreads;
constexpr int kCopyThreads = 256;
constexpr uint32_t kMostCopyBlocks = 4096;  // thread blocks of RecentKernel, about
constexpr uint32_t kVectorBytes = 16;
constexpr uint32_t kVectorValues = 8;
constexpr uint32_t kMostGroups = 8;  // of a part: a header word has no room for more
constexpr uint32_t kMostHeadDim = kMostGroups * kTileChannels;
constexpr uint32_t kMostBaseWords = kMostHeadDim / 4;
constexpr uint32_t kRegisters = 16;  // of a lane: four residuals each of a group's 64
static_assert(kUnitBytes == kVectorBytes);
static_assert(kTileThreads >= kParts * kBlockTokens && kTileThreads >= kMostScales &&
              kParamsThreads >= kParts * kBlockTokens);

template <typename Run>
void dispatch_half(uint32_t dtype, Run run) {
  if (dtype == PH_F16) run(F16{});
  else run(BF16{});
}

// ---- tokens ----

PH_HOST_DEVICE uint64_t token_bytes(const CacheView& cache) {
  return static_cast<uint64_t>(cache.heads) * cache.head_dim * 2;
}

// A part of a sequence's recent tokens, slot 0.
PH_HOST_DEVICE uint8_t* recent_part(const CacheView& cache, uint32_t layer, uint32_t sequence,
                                    uint32_t part) {
  return cache.recent + (stream_of(cache, layer, sequence) * kParts + part) * recent_part_bytes(cache);
}

// First token of a block.
PH_HOST_DEVICE uint64_t block_start(const CacheView& cache, uint32_t block) {
  return cache.sinks + static_cast<uint64_t>(kBlockTokens) * block;
}

// A token of the step's, or of before it.
__device__ __forceinline__ const uint8_t* token_row(const CacheView& cache, uint32_t layer,
                                                    const StepSequence& sequence, const StepTensors& tensors,
                                                    uint32_t part, uint64_t token) {
  if (token < sequence.before) {
    return recent_part(cache, layer, sequence.sequence, part) +
           recent_slot(cache, token) * token_bytes(cache);
  }
  return tensors.parts[part] + (sequence.input + (token - sequence.before)) * token_bytes(cache);
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

// ---- append: params ----

// What ParamsKernel hands to TileKernel.
struct Workspace {
  uint8_t* params;       // [blocks][kParamsBytes]
  uint64_t* non_finite;  // [blocks]: a bit for each token with a value that is not finite
  uint32_t* ticket;      // records taken
};

Workspace workspace_of(uint8_t* memory, uint64_t blocks) {
  uint8_t* non_finite = memory + blocks * kParamsBytes;
  return {memory, reinterpret_cast<uint64_t*>(non_finite),
          reinterpret_cast<uint32_t*>(non_finite + blocks * sizeof(uint64_t))};
}

struct ParamsShared {
  float minima[kParts][kBlockTokens], maxima[kParts][kBlockTokens];
  alignas(16) uint16_t affines[kLargestScalePosition / 2];  // the params record up to the largest scale
  uint32_t largest[2];                                      // value scale of half of the tokens, as bits
  uint32_t non_finite[2];                                   // a bit per token
};

template <typename Element, bool kMixed>
__global__ void __launch_bounds__(kParamsThreads, 2)
    ParamsKernel(const __grid_constant__ CacheView cache, const __grid_constant__ TileShape shape,
                 uint32_t layer, const __grid_constant__ StepView step,
                 const __grid_constant__ StepTensors tensors, Workspace workspace,
                 unsigned long long* non_finite) {
  using Vector = typename Element::Vector;
  __shared__ ParamsShared shared;
  const uint32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  const StepBlock place = step.blocks[blockIdx.x];
  const StepSequence sequence = step.sequences[place.entry];
  const uint64_t start = block_start(cache, place.block);
  const uint32_t vectors = cache.heads * cache.head_dim / kVectorValues;
  uint32_t* ends = index_of(cache, layer, sequence.sequence) + place.block * cache.heads + 1;
  for (uint32_t head = threadIdx.x; head < cache.heads; head += kParamsThreads) ends[head] = 0;
  if (blockIdx.x == 0 && threadIdx.x == 0) *workspace.ticket = 0;
  if (threadIdx.x < 2) shared.non_finite[threadIdx.x] = 0;
  __syncthreads();
  // Raw values may be anything.
  const bool is_read[kParts] = {!kMixed || !is_raw16(shape.parts[0]), !kMixed || !is_raw16(shape.parts[1])};

  for (uint32_t token = warp; token < kBlockTokens; token += kParamsWarps) {
    const uint8_t* rows[kParts];
    typename Vector::Extremes extremes[kParts];
#pragma unroll
    for (uint32_t part = 0; part < kParts; ++part) {
      rows[part] = token_row(cache, layer, sequence, tensors, part, start + token);
    }
    // Keys and values together, for more loads in flight.
    for (uint32_t first = lane; first < vectors; first += kHeld * kWarpThreads) {
      Vector held[kParts][kHeld];
#pragma unroll
      for (uint32_t part = 0; part < kParts; ++part) {
#pragma unroll
        for (uint32_t i = 0; i < kHeld; ++i) {
          const uint32_t vector = first + kWarpThreads * i;
          if (vector < vectors && is_read[part]) held[part][i].load(rows[part] + vector * kVectorBytes);
        }
      }
#pragma unroll
      for (uint32_t part = 0; part < kParts; ++part) {
#pragma unroll
        for (uint32_t i = 0; i < kHeld; ++i) {
          if (first + kWarpThreads * i < vectors && is_read[part]) extremes[part].add(held[part][i]);
        }
      }
    }
#pragma unroll
    for (uint32_t part = 0; part < kParts; ++part) {
      float minimum, maximum;
      extremes[part].finish(minimum, maximum);
      reduce_warp_extremes(minimum, maximum);
      if (minimum == -INFINITY || maximum == INFINITY) {
        typename Vector::Extremes finite;
        for (uint32_t vector = lane; vector < vectors; vector += kWarpThreads) {
          Vector held;
          held.load(rows[part] + vector * kVectorBytes);
          zero_non_finite<Element>(held);
          finite.add(held);
        }
        finite.finish(minimum, maximum);
        reduce_warp_extremes(minimum, maximum);
        if (lane == 0) {
          atomicOr(&shared.non_finite[token / 32], 1u << token % 32);
          atomicMin(non_finite, static_cast<unsigned long long>(sequence.sequence) << 40 | (start + token));
        }
      }
      if (lane == 0) {
        shared.minima[part][token] = minimum;
        shared.maxima[part][token] = maximum;
      }
    }
  }
  __syncthreads();

  if (threadIdx.x < kParts * kBlockTokens) {
    const uint32_t part = threadIdx.x / kBlockTokens, token = threadIdx.x % kBlockTokens;
    const Affine affine =
        !kMixed || is_per_token(shape.parts[part])
            ? tile_affine(shape, part, shared.minima[part][token], shared.maxima[part][token])
            : Affine{0.0f, 0.0f};
    shared.affines[scale_position(part, token) / 2] =
        static_cast<uint16_t>(scale_bits(shape.dtype, affine.scale));
    shared.affines[zero_position(part, token) / 2] = static_cast<uint16_t>(static_cast<int32_t>(affine.zero));
    // Positive floats are in the order of their bits.
    const uint32_t largest = __reduce_max_sync(kEveryLane, float_bits(affine.scale));
    if (part == PH_KV_VALUES && lane == 0) shared.largest[token / kWarpThreads] = largest;
  }
  __syncthreads();
  if (threadIdx.x < kParamsUnits) {
    const uint4 unit = threadIdx.x < kLargestScalePosition / kUnitBytes
                           ? reinterpret_cast<const uint4*>(shared.affines)[threadIdx.x]
                           : make_uint4(max(shared.largest[0], shared.largest[1]), 0, 0, 0);
    reinterpret_cast<uint4*>(workspace.params +
                             static_cast<uint64_t>(blockIdx.x) * kParamsBytes)[threadIdx.x] = unit;
  }
  if (threadIdx.x == 0) {
    workspace.non_finite[blockIdx.x] =
        static_cast<uint64_t>(shared.non_finite[1]) << 32 | shared.non_finite[0];
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

// That of a token's values, from its params.
__device__ __forceinline__ Quantizer token_quantizer(const TileShape& shape, uint32_t part,
                                                     const uint8_t* params, uint32_t token) {
  const uint16_t scale = *reinterpret_cast<const uint16_t*>(params + scale_position(part, token));
  return make_quantizer(shape.parts[part].code_limit, scale_from_bits(shape.dtype, scale),
                        *reinterpret_cast<const int16_t*>(params + zero_position(part, token)));
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

// The same where each of the values has a quantizer of its own.
template <typename Element>
__device__ __forceinline__ uint2 make_channel_codes(const typename Element::Vector& vector,
                                                    const Quantizer* quantizers, uint32_t limit) {
  uint32_t words[2] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const Quantizer quantizer = quantizers[i];
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

template <bool kMixed>
struct TileShared {
  Quantizer quantizers[kParts][kMixed ? kMostScales : kBlockTokens];  // by scale_index
  alignas(16) const uint8_t* rows[kParts][kBlockTokens];              // the head's values of a token
  alignas(16) uint32_t bases[kParts][kMostBaseWords];  // a byte each, in the order of base_place
  uint32_t widths[kParts];                             // the header's words
  uint32_t ticket;
  uint32_t begin;     // of the head's record, in units
  uint8_t* pages[3];  // the page of its first unit (of the params, for head 0), and those after it
};

// Scales and zero points of kivi, as the record has them.
struct GroupAffines {
  alignas(16) uint16_t halves[kParts][2 * kMostScales];
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

// Makes the size of record `record` known and returns where it begins: the last end that is known plus the
// sizes of the records since, 32 entries at a time. For a whole warp. Entry 0 is always known.
__device__ __forceinline__ uint32_t place_record(uint32_t* index, uint32_t record, uint32_t size) {
  const uint32_t lane = threadIdx.x % kWarpThreads;
  uint32_t* own = index + record + 1;
  if (lane == 0) store_entry(own, kSizeOnly | size);
  uint32_t begin = 0;
  for (uint32_t last = record;;) {
    const uint32_t entry = lane <= last ? load_entry(index + last - lane) : kStreamStart;
    const uint32_t known = __ballot_sync(kEveryLane, entry != 0);
    const uint32_t ends = __ballot_sync(kEveryLane, entry != 0 && (entry & kSizeOnly) == 0);
    const uint32_t nearest = ends & (0u - ends);
    const uint32_t needed = 2 * nearest - 1;  // the lanes up to the nearest end; all without one
    if ((known & needed) != needed) {
      __nanosleep(32);
      continue;
    }
    begin += __reduce_add_sync(kEveryLane, (needed >> lane & 1) != 0 ? entry & ~kSizeOnly : 0);
    if (ends != 0) break;
    last -= kWarpThreads;
  }
  if (lane == 0) store_entry(own, begin + size);
  return begin;
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
template <bool kMixed, typename Affines>
__device__ __forceinline__ uint4 base_unit(const TileShape& shape, const TileShared<kMixed>& shared,
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

// First unit of a group within its record, from the widths before it.
__device__ __forceinline__ uint32_t group_unit(const TileShape& shape, const uint32_t* widths, uint32_t part,
                                               uint32_t group) {
  uint32_t before = width_sum(widths[part] & (1u << 4 * group) - 1);
  if (part == PH_KV_VALUES) before += width_sum(widths[PH_KV_KEYS]);
  return (bases_position(shape, kParts) + kGroupBytes * before) / kUnitBytes;
}

// Finds the scales and zero points of a kivi part, a thread for each.
template <typename Element>
__device__ __forceinline__ void make_group_quantizers(const TileShape& shape, uint32_t part,
                                                      TileShared<true>& shared, GroupAffines& affines) {
  using Vector = typename Element::Vector;
  const uint32_t index = threadIdx.x, count = group_scales(shape, part);
  if (index >= count) return;
  float minimum = INFINITY, maximum = -INFINITY;
  if (part == PH_KV_KEYS) {
#pragma unroll 16
    for (uint32_t token = 0; token < kBlockTokens; ++token) {
      const float value = value_at<Element>(shared.rows[part][token] + 2 * index);
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
      held.load(shared.rows[part][index % kBlockTokens] + 2 * channel);
      zero_non_finite<Element>(held);
      extremes.add(held);
    }
    extremes.finish(minimum, maximum);
  }
  const Affine affine = tile_affine(shape, part, minimum, maximum);
  const int32_t zero = static_cast<int32_t>(affine.zero);
  shared.quantizers[part][index] = make_quantizer(shape.parts[part].code_limit, affine.scale, zero);
  affines.halves[part][index] = static_cast<uint16_t>(scale_bits(shape.dtype, affine.scale));
  affines.halves[part][count + index] = static_cast<uint16_t>(zero);
}

// Quantises the block's tokens of one head into shared memory.
template <typename Element, int kRounds, bool kMixed>
__device__ __forceinline__ void quantize_head(const TileShape& shape, const TileShared<kMixed>& shared,
                                              uint64_t non_finite, uint8_t* key_codes, uint8_t* value_codes) {
  using Vector = typename Element::Vector;
  const uint32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  const bool is_coded[kParts] = {!kMixed || !is_raw16(shape.parts[0]), !kMixed || !is_raw16(shape.parts[1])};
  // A warp takes 8 vectors (whole 128-byte lines) of 4 x 4 tokens, or 4 of 8 x 4 where the head does not
  // divide by 64.
  const uint32_t vector_bits = shape.head_dim % 64 == 0 ? 3 : 2;
#pragma unroll 1
  for (uint32_t round = 0; round < kRounds; ++round) {
    const uint32_t task = warp + kTileWarps * round;
    if (task >= shape.head_dim / 16) break;
    const uint32_t vector = (task >> (vector_bits - 1) << vector_bits) + lane % (1u << vector_bits);
    const uint32_t quad = (task % (1u << (vector_bits - 1)) << (5 - vector_bits)) + (lane >> vector_bits);
    Vector held[kParts][4];
#pragma unroll
    for (uint32_t part = 0; part < kParts; ++part) {
      if (!is_coded[part]) continue;
#pragma unroll
      for (uint32_t k = 0; k < 4; ++k) {
        held[part][k].load(shared.rows[part][4 * quad + k] + vector * kVectorBytes);
      }
    }
    if ((non_finite >> 4 * quad & 15) != 0) {
#pragma unroll
      for (uint32_t part = 0; part < kParts; ++part) {
        if (!is_coded[part]) continue;
#pragma unroll
        for (uint32_t k = 0; k < 4; ++k) zero_non_finite<Element>(held[part][k]);
      }
    }
    const auto codes_of = [&](uint32_t part, uint32_t k) {
      const uint32_t limit = shape.parts[part].code_limit;
      uint32_t index = 4 * quad + k;
      if constexpr (kMixed) {
        index = scale_index(shape, part, index, vector * kVectorValues);
        if (part == PH_KV_KEYS && is_kivi(shape.parts[part])) {
          return make_channel_codes<Element>(held[part][k], shared.quantizers[part] + index, limit);
        }
      }
      return make_codes<Element>(held[part][k], shared.quantizers[part][index], limit);
    };
    uint2 codes[4];
    if (is_coded[PH_KV_KEYS]) {
#pragma unroll
      for (uint32_t k = 0; k < 4; ++k) codes[k] = codes_of(PH_KV_KEYS, k);
      *reinterpret_cast<uint4*>(key_codes + key_chunk(2 * vector, quad)) =
          make_uint4(codes[0].x, codes[1].x, codes[2].x, codes[3].x);
      *reinterpret_cast<uint4*>(key_codes + key_chunk(2 * vector + 1, quad)) =
          make_uint4(codes[0].y, codes[1].y, codes[2].y, codes[3].y);
    }
    if (!is_coded[PH_KV_VALUES]) continue;
#pragma unroll
    for (uint32_t k = 0; k < 4; ++k) codes[k] = codes_of(PH_KV_VALUES, k);
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      uint32_t in[4], out[4];
#pragma unroll
      for (uint32_t k = 0; k < 4; ++k) in[k] = half == 0 ? codes[k].x : codes[k].y;
      transpose4(in, out);
#pragma unroll
      for (uint32_t k = 0; k < 4; ++k) {
        const uint32_t channel = vector * kVectorValues + 4 * half + k;
        *reinterpret_cast<uint32_t*>(value_codes + value_chunk(channel, quad / 4) + 4 * (quad % 4)) = out[k];
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
__device__ __forceinline__ void store_raw(const TileShape& shape, uint32_t part, const uint8_t* const* rows,
                                          const RecordTarget& target, uint32_t begin) {
  const uint32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads, g = lane / 4,
                 i = lane % 4;
  for (uint32_t f = warp; f < shape.head_dim / kFragmentChannels * 4; f += kTileWarps) {
    const uint32_t channel = kFragmentChannels * (f / 4);
    uint32_t words[4];
    if (part == PH_KV_KEYS) {
      const uint32_t token = 8 * g + 2 * (f % 4), position = 2 * (channel + 4 * i);
      const uint2 even = *reinterpret_cast<const uint2*>(rows[token] + position);
      const uint2 odd = *reinterpret_cast<const uint2*>(rows[token + 1] + position);
      words[0] = even.x, words[1] = odd.x, words[2] = even.y, words[3] = odd.y;
    } else {
      // Rows of tokens; two of a lane's register are 2i and 2i + 1.
      const uint32_t token = 16 * (g / 2) + 4 * (f % 4) + g % 2;
#pragma unroll
      for (uint32_t r = 0; r < 4; ++r) {
        words[r] = transpose8(*reinterpret_cast<const uint32_t*>(rows[token + 2 * (r / 2)] +
                                                                 2 * (channel + 8 * (r % 2) + 2 * i)));
      }
    }
    *reinterpret_cast<uint4*>(target.unit(begin + kLanes * f + lane)) =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// kRounds: groups of a warp, and its shares of the codes; 2 where the head has more than 128 channels.
template <typename Element, int kRounds, bool kMixed>
__global__ void __launch_bounds__(kTileThreads, 4)
    TileKernel(const __grid_constant__ CacheView cache, const __grid_constant__ TileShape shape,
               uint32_t layer, const __grid_constant__ StepView step,
               const __grid_constant__ StepTensors tensors, Workspace workspace) {
  extern __shared__ uint4 dynamic_shared[];  // codes of keys, of values: 64 * head_dim bytes each
  __shared__ TileShared<kMixed> shared;
  __shared__ std::conditional_t<kMixed, GroupAffines, NoAffines> affines;
  uint8_t* const key_codes = reinterpret_cast<uint8_t*>(dynamic_shared);
  uint8_t* const value_codes = key_codes + kBlockTokens * shape.head_dim;
  const uint32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  if (threadIdx.x == 0) shared.ticket = atomicAdd(workspace.ticket, 1u);
  if (threadIdx.x < kParts) shared.widths[threadIdx.x] = 0;
  __syncthreads();
  const uint32_t item = shared.ticket / cache.heads, head = shared.ticket % cache.heads;
  const StepBlock place = step.blocks[item];
  const uint8_t* params = workspace.params + static_cast<uint64_t>(item) * kParamsBytes;
  if (threadIdx.x < kParts * kBlockTokens) {
    const uint32_t part = threadIdx.x / kBlockTokens, token = threadIdx.x % kBlockTokens;
    shared.rows[part][token] = token_row(cache, layer, step.sequences[place.entry], tensors, part,
                                         block_start(cache, place.block) + token) +
                               static_cast<uint64_t>(head) * cache.head_dim * 2;
    if (!kMixed || is_per_token(shape.parts[part]))
      shared.quantizers[part][token] = token_quantizer(shape, part, params, token);
  }
  const uint64_t non_finite = workspace.non_finite[item];
  __syncthreads();
  if constexpr (kMixed) {
    for (uint32_t part = 0; part < kParts; ++part) {
      if (is_kivi(shape.parts[part])) make_group_quantizers<Element>(shape, part, shared, affines);
    }
    __syncthreads();
  }
  quantize_head<Element, kRounds, kMixed>(shape, shared, non_finite, key_codes, value_codes);
  __syncthreads();

  const uint32_t groups = tile_groups(shape);
  uint32_t residuals[kRounds][kRegisters];
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
    if (width == 0) {
      width = group_width(residuals[round]);
    } else if (lane < kTileChannels / 4) {
      // Of fixed width: no bases. Each group clears its share of their words, whichever those are.
      shared.bases[part][kTileChannels / 4 * group + lane] = 0;
    }
    if (lane == 0) atomicOr(&shared.widths[part], width << 4 * group);
  }
  __syncthreads();

  const uint32_t params_units = head != 0 ? 0 : kMixed ? params_bytes(shape) / kUnitBytes : kParamsUnits;
  const uint32_t record_bytes =
      head_record_bytes(shape, shared.widths[PH_KV_KEYS], shared.widths[PH_KV_VALUES]);
  if (warp == 0) {
    const uint32_t sequence = step.sequences[place.entry].sequence;
    const uint32_t size = params_units + record_bytes / kUnitBytes;
    const uint32_t first =
        place_record(index_of(cache, layer, sequence), place.block * cache.heads + head, size);
    if (lane < 3) {
      const uint32_t page = min(first / kPageUnits + lane, (first + size - 1) / kPageUnits);
      shared.pages[lane] = cache.pool + page_table_of(cache, layer, sequence)[page] * kPageBytes;
    }
    if (lane == 0) shared.begin = first + params_units;
  }
  __syncthreads();

  const uint32_t begin = shared.begin;
  const RecordTarget target = {{shared.pages[0], shared.pages[1], shared.pages[2]},
                               (begin - params_units) / kPageUnits};
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
  if (threadIdx.x < bases_position(shape, kParts) / kUnitBytes) {
    *reinterpret_cast<uint4*>(target.unit(begin + threadIdx.x)) =
        threadIdx.x == 0 ? make_uint4(shared.widths[PH_KV_KEYS], shared.widths[PH_KV_VALUES], 0, 0)
                         : base_unit<kMixed>(shape, shared, affines, threadIdx.x - 1);
  }
  if constexpr (kMixed) {
    for (uint32_t part = 0; part < kParts; ++part) {
      if (!is_raw16(shape.parts[part])) continue;
      store_raw(shape, part, shared.rows[part], target,
                begin + raw_begin(shape, part, record_bytes) / kUnitBytes);
    }
  }
  if (threadIdx.x < params_units) {
    *reinterpret_cast<uint4*>(target.unit(begin - params_units + threadIdx.x)) =
        reinterpret_cast<const uint4*>(params)[threadIdx.x];
  }
}

// ---- append: recent tokens ----

// Thread blocks (entry, split): the splits share an entry's tokens.
__global__ void __launch_bounds__(kCopyThreads)
    RecentKernel(const __grid_constant__ CacheView cache, uint32_t layer,
                 const __grid_constant__ StepView step, const __grid_constant__ StepTensors tensors) {
  const StepSequence sequence = step.sequences[blockIdx.x];
  const uint64_t end = sequence.before + sequence.tokens;
  const uint64_t sinks_end = min(end, static_cast<uint64_t>(cache.sinks));
  const uint32_t sinks = sequence.before < sinks_end ? static_cast<uint32_t>(sinks_end - sequence.before) : 0;
  const uint64_t newest = max(sequence.before + sinks, end > cache.ring ? end - cache.ring : 0);
  const uint32_t rows = sinks + static_cast<uint32_t>(end - newest);
  const uint32_t vectors = cache.heads * cache.head_dim / kVectorValues;
  for (uint32_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const uint64_t token = row < sinks ? sequence.before + row : newest + (row - sinks);
    const uint64_t source = (sequence.input + (token - sequence.before)) * vectors;
    const uint64_t target = static_cast<uint64_t>(recent_slot(cache, token)) * vectors;
    for (uint32_t i = threadIdx.x; i < kParts * vectors; i += kCopyThreads) {
      const uint32_t part = i < vectors ? PH_KV_KEYS : PH_KV_VALUES;
      const uint32_t vector = i < vectors ? i : i - vectors;
      reinterpret_cast<uint4*>(recent_part(cache, layer, sequence.sequence, part))[target + vector] =
          reinterpret_cast<const uint4*>(tensors.parts[part])[source + vector];
    }
  }
}

// ---- unpack ----

// Where unpacked tokens go: token t to row t - first, or to its slot among the recent ones.
struct UnpackTarget {
  uint8_t* parts[kParts];
  uint64_t first;
  bool slots;

  __device__ __forceinline__ uint8_t* row(const CacheView& cache, uint32_t part, uint64_t token) const {
    return parts[part] + (slots ? recent_slot(cache, token) : token - first) * token_bytes(cache);
  }
};

// Bits of dtype nearest to a value, within the finite range.
PH_HOST_DEVICE uint32_t round_value(uint32_t dtype, float value) {
  const uint32_t bits = dtype == PH_F16 ? float_to_f16(value) : float_to_bf16(value);
  const uint32_t largest = dtype == PH_F16 ? 0x7bffu : 0x7f7fu;
  return (bits & 0x7fffu) > largest ? (bits & 0x8000u) | largest : bits;
}

struct UnpackShared {
  float scales[kParts][kMostScales];  // by scale_index
  int32_t zeros[kParts][kMostScales];
  uint32_t widths[kParts];              // the header's words
  uint8_t bases[kParts][kMostHeadDim];  // by channel
};

// Adds a lane's residuals of a group of `width` 1 to 4, shifted left by `shift`, to its registers (s, j) at 4
// * s + j.
__device__ __forceinline__ void load_group(const CacheView& cache, const uint32_t* pages, uint64_t begin,
                                           uint32_t width, uint32_t shift, uint32_t lane,
                                           uint32_t (&residuals)[kRegisters]) {
  uint32_t words[8], nibbles[8];
#pragma unroll
  for (uint32_t x = 0; x < 8; x += 2) {
    if (x >= 2 * width) continue;
    const uint2 pair =
        *reinterpret_cast<const uint2*>(stream_byte(cache, pages, begin + word_position(width, lane, x)));
    words[x] = pair.x;
    words[x + 1] = pair.y;
  }
  unpack_words(width, words, nibbles);
#pragma unroll
  for (uint32_t s = 0; s < 4; ++s) {
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
      residuals[4 * s + j] |= (nibbles[2 * s + j % 2] >> 4 * (j / 2) & 0x0f0f0f0fu) << shift;
    }
  }
}

// A thread block per (block, head) from `first_block` on: codes go through shared memory, so that whole rows
// are written. Of the block's tokens those in [begin, end) are.
__global__ void __launch_bounds__(kTileThreads)
    UnpackKernel(const __grid_constant__ CacheView cache, const __grid_constant__ TileShape shape,
                 uint32_t layer, uint32_t sequence, uint32_t first_block, uint64_t begin, uint64_t end,
                 const __grid_constant__ UnpackTarget target) {
  extern __shared__ uint4 dynamic_shared[];  // codes: [keys, values][64][head_dim]
  __shared__ UnpackShared shared;
  uint8_t* const codes = reinterpret_cast<uint8_t*>(dynamic_shared);
  const uint32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  const uint32_t block = first_block + blockIdx.x / cache.heads, head = blockIdx.x % cache.heads;
  const uint32_t* pages = page_table_of(cache, layer, sequence);
  const RecordSpan span =
      record_span(cache, index_of(cache, layer, sequence), block, head, params_bytes(shape) / kUnitBytes);
  const uint64_t params = static_cast<uint64_t>(span.params) * kUnitBytes;
  const uint64_t record = static_cast<uint64_t>(span.begin) * kUnitBytes;
  if (threadIdx.x < kParts) {
    shared.widths[threadIdx.x] =
        *reinterpret_cast<const uint32_t*>(stream_byte(cache, pages, record + 4 * threadIdx.x));
  }
  for (uint32_t i = threadIdx.x; i < kParts * kMostScales; i += kTileThreads) {
    const uint32_t part = i / kMostScales, index = i % kMostScales, count = group_scales(shape, part);
    if (index >= count) continue;
    const bool is_own = is_kivi(shape.parts[part]);
    const uint64_t bases = record + bases_position(shape, part);
    const uint8_t* scale =
        stream_byte(cache, pages, is_own ? bases + 2 * index : params + scale_position(part, index));
    const uint8_t* zero =
        stream_byte(cache, pages, is_own ? bases + 2 * (count + index) : params + zero_position(part, index));
    shared.scales[part][index] = scale_from_bits(shape.dtype, *reinterpret_cast<const uint16_t*>(scale));
    shared.zeros[part][index] = *reinterpret_cast<const int16_t*>(zero);
  }
  for (uint32_t i = threadIdx.x; i < kParts * shape.head_dim; i += kTileThreads) {
    const uint32_t part = i / shape.head_dim, channel = i % shape.head_dim;
    if (!is_per_token(shape.parts[part])) {
      shared.bases[part][channel] = 0;
      continue;
    }
    const BasePlace place = base_place(shape, part, channel);
    const uint32_t byte = *stream_byte(cache, pages, record + bases_position(shape, part) + place.byte);
    shared.bases[part][channel] =
        static_cast<uint8_t>(byte >> place.shift & ((1u << shape.parts[part].base_bits) - 1));
  }
  __syncthreads();

  const uint32_t groups = tile_groups(shape);
  for (uint32_t task = warp; task < kParts * groups; task += kTileWarps) {
    const uint32_t part = task < groups ? PH_KV_KEYS : PH_KV_VALUES;
    const uint32_t group = task < groups ? task : task - groups;
    if (is_raw16(shape.parts[part])) continue;
    const uint32_t width = shared.widths[part] >> 4 * group & 15;
    const uint64_t position =
        record + static_cast<uint64_t>(group_unit(shape, shared.widths, part, group)) * kUnitBytes;
    uint32_t residuals[kRegisters] = {};
    if (width > 0) load_group(cache, pages, position, min(width, 4u), 0, lane, residuals);
    if (width > 4) load_group(cache, pages, position + 4 * kGroupBytes, width - 4, 4, lane, residuals);
#pragma unroll
    for (uint32_t i = 0; i < kRegisters; ++i) {
      const uint32_t s = i / 4, j = i % 4;
#pragma unroll
      for (uint32_t byte = 0; byte < 4; ++byte) {
        // The inverse of tile_place.
        const uint32_t token = part == PH_KV_KEYS ? 8 * (lane / 4) + 4 * (s / 2) + j
                                                  : 16 * (lane % 4) + 8 * (s / 2) + 4 * (s % 2) + byte;
        const uint32_t channel =
            kTileChannels * group +
            (part == PH_KV_KEYS ? 16 * (s % 2) + 4 * (lane % 4) + byte : 8 * j + lane / 4);
        codes[(part * kBlockTokens + token) * shape.head_dim + channel] =
            static_cast<uint8_t>(shared.bases[part][channel] + (residuals[i] >> 8 * byte & 0xff));
      }
    }
  }
  __syncthreads();

  const uint32_t vectors = shape.head_dim / kVectorValues;
  for (uint32_t i = threadIdx.x; i < kParts * kBlockTokens * vectors; i += kTileThreads) {
    const uint32_t row = i / vectors, vector = i % vectors;
    const uint32_t part = row / kBlockTokens, token = row % kBlockTokens;
    const uint64_t place = block_start(cache, block) + token;
    if (place < begin || place >= end) continue;
    const uint32_t first = vector * kVectorValues;
    uint32_t words[4] = {};
    if (is_raw16(shape.parts[part])) {
      const uint64_t raw = record + raw_begin(shape, part, (span.end - span.begin) * kUnitBytes);
#pragma unroll
      for (uint32_t n = 0; n < kVectorValues; ++n) {
        const uint8_t* value = stream_byte(cache, pages, raw + raw_position(part, token, first + n));
        words[n / 2] |= static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(value)) << 16 * (n % 2);
      }
    } else {
      const uint2 eight = *reinterpret_cast<const uint2*>(codes + row * shape.head_dim + first);
#pragma unroll
      for (uint32_t n = 0; n < kVectorValues; ++n) {
        const uint32_t index = scale_index(shape, part, token, first + n);
        const int32_t code = static_cast<int32_t>((n < 4 ? eight.x : eight.y) >> 8 * (n % 4) & 0xff) +
                             shared.zeros[part][index];
        words[n / 2] |=
            round_value(shape.dtype, multiply(static_cast<float>(code), shared.scales[part][index]))
            << 16 * (n % 2);
      }
    }
    uint8_t* head_values = target.row(cache, part, place) + static_cast<uint64_t>(head) * shape.head_dim * 2;
    reinterpret_cast<uint4*>(head_values)[vector] = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

void unpack(ph_device& device, const CacheView& cache, const TileShape& shape, uint32_t layer,
            uint32_t sequence, uint32_t first_block, uint32_t blocks, uint64_t begin, uint64_t end,
            const UnpackTarget& target) {
  UnpackKernel<<<blocks * cache.heads, kTileThreads, kParts * kBlockTokens * shape.head_dim, device.stream>>>(
      cache, shape, layer, sequence, first_block, begin, end, target);
  PH_CUDA_TRY(cudaGetLastError());
}

// Tokens [begin, end) of a sequence, all of them recent, to their rows of the target. A thread block per
// token and part.
__global__ void __launch_bounds__(kCopyThreads)
    ReadRecentKernel(const __grid_constant__ CacheView cache, uint32_t layer, uint32_t sequence,
                     uint64_t begin, const __grid_constant__ UnpackTarget target) {
  const uint32_t part = blockIdx.x % kParts;
  const uint64_t token = begin + blockIdx.x / kParts;
  const uint8_t* row =
      recent_part(cache, layer, sequence, part) + recent_slot(cache, token) * token_bytes(cache);
  uint4* target_row = reinterpret_cast<uint4*>(target.row(cache, part, token));
  const uint32_t vectors = cache.heads * cache.head_dim / kVectorValues;
  for (uint32_t i = threadIdx.x; i < vectors; i += kCopyThreads) {
    target_row[i] = reinterpret_cast<const uint4*>(row)[i];
  }
}

void read_recent(ph_device& device, const CacheView& cache, uint32_t layer, uint32_t sequence, uint64_t begin,
                 uint64_t end, const UnpackTarget& target) {
  if (begin >= end) return;
  ReadRecentKernel<<<static_cast<uint32_t>((end - begin) * kParts), kCopyThreads, 0, device.stream>>>(
      cache, layer, sequence, begin, target);
  PH_CUDA_TRY(cudaGetLastError());
}

}  // namespace

uint64_t append_workspace_bytes(const CacheView&, uint64_t blocks) {
  return blocks * (kParamsBytes + sizeof(uint64_t)) + sizeof(uint32_t);
}

void append(ph_device& device, const CacheView& cache, const TileShape& shape, uint32_t layer,
            const StepView& step, StepTensors tensors, uint8_t* workspace, uint64_t* non_finite) {
  if (step.block_count > 0) {
    const Workspace places = workspace_of(workspace, step.block_count);
    const auto pack = [&](auto element, auto mixed) {
      using Element = decltype(element);
      constexpr bool kMixed = decltype(mixed)::value;
      ParamsKernel<Element, kMixed><<<step.block_count, kParamsThreads, 0, device.stream>>>(
          cache, shape, layer, step, tensors, places, reinterpret_cast<unsigned long long*>(non_finite));
      PH_CUDA_TRY(cudaGetLastError());
      const auto kernel = kParts * tile_groups(shape) <= kTileWarps ? TileKernel<Element, 1, kMixed>
                                                                    : TileKernel<Element, 2, kMixed>;
      kernel<<<step.block_count * cache.heads, kTileThreads, kParts * kBlockTokens * shape.head_dim,
               device.stream>>>(cache, shape, layer, step, tensors, places);
      PH_CUDA_TRY(cudaGetLastError());
    };
    dispatch_half(shape.dtype, [&](auto element) {
      if (is_per_token(shape.parts[0]) && is_per_token(shape.parts[1])) pack(element, std::false_type{});
      else pack(element, std::true_type{});
    });
  }
  if (step.tokens == 0) return;
  // A thread block per token where the grid stays small.
  const uint32_t most_splits = std::max(kMostCopyBlocks / step.sequence_count, 1u);
  const uint32_t splits = std::clamp(std::min(step.most_queries, cache.sinks + cache.ring), 1u, most_splits);
  RecentKernel<<<dim3(step.sequence_count, splits), kCopyThreads, 0, device.stream>>>(cache, layer, step,
                                                                                      tensors);
  PH_CUDA_TRY(cudaGetLastError());
}

void read_tokens(ph_device& device, const CacheView& cache, const TileShape& shape, uint32_t layer,
                 uint32_t sequence, uint32_t packed, uint64_t first, uint64_t count, uint8_t* keys,
                 uint8_t* values) {
  const UnpackTarget target = {{keys, values}, first, false};
  const uint64_t end = first + count, sinks = cache.sinks, packed_end = block_start(cache, packed);
  read_recent(device, cache, layer, sequence, first, std::min(end, sinks), target);
  const uint64_t unpack_begin = std::max(first, sinks), unpack_end = std::min(end, packed_end);
  if (unpack_begin < unpack_end) {
    const uint32_t first_block = static_cast<uint32_t>((unpack_begin - sinks) / kBlockTokens);
    const uint32_t last_block = static_cast<uint32_t>((unpack_end - 1 - sinks) / kBlockTokens);
    unpack(device, cache, shape, layer, sequence, first_block, last_block - first_block + 1, unpack_begin,
           unpack_end, target);
  }
  read_recent(device, cache, layer, sequence, std::max(first, packed_end), end, target);
}

void restore_tokens(ph_device& device, const CacheView& cache, const TileShape& shape, uint32_t layer,
                    uint32_t sequence, uint32_t block, uint32_t count) {
  if (count == 0) return;
  const UnpackTarget target = {
      {recent_part(cache, layer, sequence, PH_KV_KEYS), recent_part(cache, layer, sequence, PH_KV_VALUES)},
      0,
      true};
  const uint64_t begin = block_start(cache, block);
  unpack(device, cache, shape, layer, sequence, block, 1, begin, begin + count, target);
}

}  // namespace ph::kv
