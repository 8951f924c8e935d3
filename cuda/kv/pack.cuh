// Step 3 on the GPU: one thread block turns the codes of one part of a block into its bytes in a record.
//
// A warp works on a row (the packs of one head over P consecutive positions), a lane on four neighbouring channels: it
// loads a 32-bit word of four codes per position, so neighbouring lanes load neighbouring words. Minima and widths
// wait in `headers` until the part's widest is known; payloads are assembled in a staging area of the warp and leave
// it in whole words. Integer arithmetic only: deterministic.
#pragma once

#include "kv/quantize.cuh"
#include "kv/record.h"

namespace ph::kv {

constexpr uint32_t kChunkChannels = 4 * kWarpThreads;  // channels that a warp packs at a time
constexpr uint32_t kEven = 0x00ff00ffu;                // the even bytes of a word

// Staging words of a warp: a chunk of full width, what the chunk before left of a word, and one past the end; at least
// what the landing area of quantize_tokens needs, which shares the memory.
PH_HOST_DEVICE uint32_t staging_words(uint32_t pack) {
  const uint32_t words = kChunkChannels * pack / 4 + 4, landing = kHeld * kWarpThreads * 4;
  return words > landing ? words : landing;
}

// Memory of the thread block, in shared memory unless it is too large for it.
struct PackMemory {
  uint16_t* headers;      // [rows][head_dim]: minimum | width << 8
  uint32_t* row_offsets;  // [rows + 1]: payload bytes of the rows before
  uint32_t* staging;      // [warps][staging_words], in shared memory
  uint32_t* used_bits;    // [2]: of any minimum, of any range; in shared memory
};

struct PackExtremes {
  uint32_t minimum, range;  // four channels, a byte each
};

template <int kPack>
__device__ __forceinline__ void load_words(const uint8_t* codes, const uint32_t* token_offsets,
                                           uint32_t (&words)[kPack]) {
#pragma unroll
  for (int i = 0; i < kPack; i += 4) {
    const uint4 offsets = *reinterpret_cast<const uint4*>(token_offsets + i);
    words[i] = *reinterpret_cast<const uint32_t*>(codes + offsets.x);
    words[i + 1] = *reinterpret_cast<const uint32_t*>(codes + offsets.y);
    words[i + 2] = *reinterpret_cast<const uint32_t*>(codes + offsets.z);
    words[i + 3] = *reinterpret_cast<const uint32_t*>(codes + offsets.w);
  }
}

// Byte-wise extremes, through the 16-bit minima and maxima that Hopper has instructions for.
template <int kPack>
__device__ __forceinline__ PackExtremes word_extremes(const uint32_t (&words)[kPack]) {
  uint32_t even_low = words[0] & kEven, odd_low = words[0] >> 8 & kEven;
  uint32_t even_high = even_low, odd_high = odd_low;
#pragma unroll
  for (int i = 1; i < kPack; i += 2) {
    const uint32_t a = words[i], b = words[i + 1 < kPack ? i + 1 : i];
    even_low = __vimin3_u16x2(even_low, a & kEven, b & kEven);
    odd_low = __vimin3_u16x2(odd_low, a >> 8 & kEven, b >> 8 & kEven);
    even_high = __vimax3_u16x2(even_high, a & kEven, b & kEven);
    odd_high = __vimax3_u16x2(odd_high, a >> 8 & kEven, b >> 8 & kEven);
  }
  return {even_low | odd_low << 8, even_high - even_low | (odd_high - odd_low) << 8};
}

// Transposes four words of four bytes.
__device__ __forceinline__ void transpose4(const uint32_t* in, uint32_t (&out)[4]) {
  const uint32_t a = __byte_perm(in[0], in[1], 0x5140), b = __byte_perm(in[2], in[3], 0x5140);
  const uint32_t c = __byte_perm(in[0], in[1], 0x7362), d = __byte_perm(in[2], in[3], 0x7362);
  out[0] = __byte_perm(a, b, 0x5410);
  out[1] = __byte_perm(a, b, 0x7632);
  out[2] = __byte_perm(c, d, 0x5410);
  out[3] = __byte_perm(c, d, 0x7632);
}

// Four bytes below 2^width, next to each other.
__device__ __forceinline__ uint32_t compress4(uint32_t bytes, uint32_t width) {
  const uint32_t pairs = (bytes & kEven) | (bytes >> 8 & kEven) << width;
  return (pairs & 0xffffu) | (pairs >> 16) << 2 * width;
}

__device__ __forceinline__ uint32_t warp_exclusive_sum(uint32_t value, uint32_t* total) {
  const uint32_t lane = thread_index() % kWarpThreads;
  uint32_t sum = value;
#pragma unroll
  for (int distance = 1; distance < kWarpThreads; distance *= 2) {
    const uint32_t below = __shfl_up_sync(kEveryLane, sum, distance);
    if (lane >= static_cast<uint32_t>(distance)) sum += below;
  }
  *total = __shfl_sync(kEveryLane, sum, kWarpThreads - 1);
  return sum - value;
}

// Word `index` of a stream of fields of `bits` bits (1..32), field(i) for i < count.
template <typename Field>
__device__ __forceinline__ uint32_t field_word(uint32_t index, uint32_t bits, uint32_t count, Field field) {
  const uint32_t begin = 32 * index;
  uint32_t i = begin / bits;
  uint32_t word = field(i) >> (begin - i * bits);
  for (uint32_t at = ++i * bits - begin; at < 32 && i < count; ++i, at += bits) word |= field(i) << at;
  return word;
}

// Sum of the widths of a row's packs; with `headers`, notes them too.
template <int kPack>
__device__ uint32_t scan_row(const Codec& codec, const uint8_t* codes, const uint32_t* token_offsets,
                             uint32_t row, uint16_t* headers, uint32_t* every_minimum,
                             uint32_t* every_range) {
  const uint32_t lane = thread_index() % kWarpThreads;
  const uint32_t head = row / codec.rows_per_head, first = row % codec.rows_per_head * kPack;
  uint32_t widths = 0;
  for (uint32_t channel = 4 * lane; channel < codec.head_dim; channel += kChunkChannels) {
    uint32_t words[kPack];
    load_words<kPack>(codes + head * codec.head_dim + channel, token_offsets + first, words);
    const PackExtremes extremes = word_extremes<kPack>(words);
    uint32_t entries[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t width = bit_width(extremes.range >> 8 * i & 0xff);
      widths += width;
      entries[i] = (extremes.minimum >> 8 * i & 0xff) | width << 8;
    }
    if (headers != nullptr) {
      *reinterpret_cast<uint2*>(headers + row * codec.head_dim + channel) =
          make_uint2(entries[0] | entries[1] << 16, entries[2] | entries[3] << 16);
      *every_minimum |= extremes.minimum;
      *every_range |= extremes.range;
    }
  }
  return __reduce_add_sync(kEveryLane, widths);
}

// Puts up to 32 bits into a zeroed stream in shared memory that other lanes write too. Two unconditional operations
// are cheaper than finding out whether one will do.
__device__ __forceinline__ void stage(uint32_t* staging, uint32_t bit, uint32_t bits) {
  uint32_t* word = staging + bit / 32;
  atomicOr(word, bits << bit % 32);
  atomicOr(word + 1, __funnelshift_l(bits, 0, bit % 32));
}

// The same for up to 64 bits.
__device__ __forceinline__ void stage(uint32_t* staging, uint32_t bit, uint32_t low, uint32_t high) {
  uint32_t* word = staging + bit / 32;
  atomicOr(word, low << bit % 32);
  atomicOr(word + 1, __funnelshift_l(low, high, bit % 32));
  atomicOr(word + 2, __funnelshift_l(high, 0, bit % 32));
}

// Copies words of the staging area to `target` and clears them.
__device__ __forceinline__ void flush(uint32_t* staging, uint32_t words, uint32_t* target) {
  __syncwarp();
  for (uint32_t i = threadIdx.x % kWarpThreads; i < words; i += kWarpThreads) {
    target[i] = staging[i];
    staging[i] = 0;
  }
  __syncwarp();
}

// What a chunk leaves in the last, partly filled word moves to the front.
__device__ __forceinline__ void carry(uint32_t* staging, uint32_t words) {
  if (words > 0 && threadIdx.x % kWarpThreads == 0) {
    staging[0] = staging[words];
    staging[words] = 0;
  }
  __syncwarp();
}

// The pack headers of one row, through the warp's staging area (all zero before and after).
__device__ inline void write_header_row(const Codec& codec, PartHeader header, const uint16_t* row_headers,
                                        uint32_t row_words, uint32_t* staging, uint32_t* target) {
  const uint32_t field = header.minimum_bits + header.width_bits;
  const auto merged = [&](uint32_t two) {  // two entries, minimum | width << 8 each
    const uint32_t low = (two & 0xff) | (two >> 8 & 0xff) << header.minimum_bits;
    const uint32_t high = (two >> 16 & 0xff) | (two >> 24) << header.minimum_bits;
    return low | high << field;
  };
  uint32_t written = 0;
  for (uint32_t begin = 0; begin < codec.head_dim; begin += kChunkChannels) {
    const uint32_t channel = begin + 4 * (threadIdx.x % kWarpThreads);
    if (channel < codec.head_dim) {
      const uint2 entries = *reinterpret_cast<const uint2*>(row_headers + channel);
      const uint32_t bit = channel * field - 32 * written;
      stage(staging, bit, merged(entries.x));
      stage(staging, bit + 2 * field, merged(entries.y));
    }
    const bool last = begin + kChunkChannels >= codec.head_dim;
    const uint32_t words = (last ? row_words : (begin + kChunkChannels) * field / 32) - written;
    flush(staging, words, target + written);
    if (!last) carry(staging, words);
    written += words;
  }
}

// The payload of one row, likewise, to 4-aligned `target`.
template <int kPack>
__device__ void write_payload_row(const Codec& codec, const uint8_t* codes, const uint32_t* token_offsets,
                                  uint32_t row, const uint16_t* headers, uint32_t* staging,
                                  uint32_t* target) {
  const uint32_t lane = thread_index() % kWarpThreads;
  const uint32_t head = row / codec.rows_per_head, first = row % codec.rows_per_head * kPack;
  uint32_t pending = 0;  // bits in the staging area's first word
  for (uint32_t begin = 0; begin < codec.head_dim; begin += kChunkChannels) {
    const uint32_t channel = begin + 4 * lane;
    const bool active = channel < codec.head_dim;
    uint2 entries = make_uint2(0, 0);
    if (active) entries = *reinterpret_cast<const uint2*>(headers + row * codec.head_dim + channel);
    const uint32_t width[4] = {entries.x >> 8 & 0xff, entries.x >> 24, entries.y >> 8 & 0xff,
                               entries.y >> 24};
    const uint32_t minimum = __byte_perm(entries.x, entries.y, 0x6420);
    uint32_t total;
    uint32_t bit = warp_exclusive_sum(kPack * (width[0] + width[1] + width[2] + width[3]), &total) + pending;
    const bool narrow = __all_sync(kEveryLane, max(max(width[0], width[1]), max(width[2], width[3])) <= 4);
    if (active) {
      uint32_t words[kPack];
      load_words<kPack>(codes + head * codec.head_dim + channel, token_offsets + first, words);
#pragma unroll
      for (int i = 0; i < kPack; ++i) words[i] -= minimum;  // no byte borrows: each is at least its minimum
      if constexpr (kPack == 4) {
        uint32_t fields[4];
        transpose4(words, fields);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          stage(staging, bit, compress4(fields[j], width[j]));
          bit += 4 * width[j];
        }
      } else {
        // Sixteen positions at a time, or all eight; even positions of a channel and odd ones, so that a byte of both
        // joined has two neighbouring fields.
        constexpr int kRun = kPack < 16 ? kPack : 16;
#pragma unroll
        for (int run = 0; run < kPack; run += kRun) {
          uint32_t even[kRun / 8][4], odd[kRun / 8][4];
#pragma unroll
          for (int i = 0; i < kRun / 8; ++i) {
            const uint32_t* eight = words + run + 8 * i;
            const uint32_t even_words[4] = {eight[0], eight[2], eight[4], eight[6]};
            const uint32_t odd_words[4] = {eight[1], eight[3], eight[5], eight[7]};
            transpose4(even_words, even[i]);
            transpose4(odd_words, odd[i]);
          }
          uint32_t at = bit;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const uint32_t offset = at + run * width[j];
            if (narrow) {
              const auto eight_fields = [&](int i) {
                return compress4(even[i][j] | odd[i][j] << width[j], 2 * width[j]);
              };
              if constexpr (kRun == 8) {
                stage(staging, offset, eight_fields(0));
              } else {
                const uint32_t high = eight_fields(1);  // shifts of 32 are cut off
                stage(staging, offset, eight_fields(0) | __funnelshift_lc(0, high, 8 * width[j]),
                      __funnelshift_lc(high, 0, 8 * width[j]));
              }
            } else {
#pragma unroll
              for (int half = 0; half < kRun / 4; ++half) {
                const uint32_t selector = half % 2 == 0 ? 0x4140 : 0x4342;
                const uint32_t pairs = __byte_perm(even[half / 2][j], 0, selector) |
                                       __byte_perm(odd[half / 2][j], 0, selector) << width[j];
                stage(staging, offset + half * 4 * width[j],
                      (pairs & 0xffffu) | (pairs >> 16) << 2 * width[j]);
              }
            }
            at += kPack * width[j];
          }
        }
      }
    }
    const bool last = begin + kChunkChannels >= codec.head_dim;
    const uint32_t end = pending + total;
    const uint32_t whole = last ? (end + 31) / 32 : end / 32;
    flush(staging, whole, target);
    if (!last) carry(staging, whole);
    target += whole;
    pending = end % 32;
  }
}

// Writes one part at `target` and returns its bytes, a multiple of 16. All threads call it. `token_offsets` [64],
// 16-aligned, says where in `codes` the token of each position starts; `zero_bytes` is the size of a stored zero point.
template <int kPack>
__device__ uint32_t pack_part(const Codec& codec, uint32_t part, const uint8_t* codes, const float* scales,
                              const int32_t* zeros, const uint32_t* token_offsets, uint32_t zero_bytes,
                              PackMemory memory, uint8_t* target) {
  const uint32_t thread = thread_index(), warp = thread / kWarpThreads, lane = thread % kWarpThreads;
  uint32_t* staging = memory.staging + warp * staging_words(kPack);
  for (uint32_t i = lane; i < staging_words(kPack) / 4; i += kWarpThreads)
    reinterpret_cast<uint4*>(staging)[i] = uint4{};
  if (threadIdx.x < 2) memory.used_bits[threadIdx.x] = 0;
  __syncthreads();

  uint32_t every_minimum = 0, every_range = 0;
  for (uint32_t row = warp; row < codec.rows; row += kEncodeWarps) {
    const uint32_t widths =
        scan_row<kPack>(codec, codes, token_offsets, row, memory.headers, &every_minimum, &every_range);
    if (lane == 0) memory.row_offsets[row] = payload_row_bytes(kPack, widths);
  }
  every_minimum = __reduce_or_sync(kEveryLane, every_minimum);
  every_range = __reduce_or_sync(kEveryLane, every_range);
  if (lane == 0) {
    atomicOr(memory.used_bits, every_minimum);
    atomicOr(memory.used_bits + 1, every_range);
  }
  __syncthreads();

  if (warp == 0) {
    uint32_t before = 0;
    for (uint32_t begin = 0; begin < codec.rows; begin += kWarpThreads) {
      const uint32_t row = begin + lane;
      uint32_t total;
      const uint32_t offset = warp_exclusive_sum(row < codec.rows ? memory.row_offsets[row] : 0, &total);
      if (row < codec.rows) memory.row_offsets[row] = before + offset;
      before += total;
    }
    if (lane == 0) memory.row_offsets[codec.rows] = before;
  }
  __syncthreads();

  const auto widest = [](uint32_t bytes) {
    return bit_width((bytes | bytes >> 8 | bytes >> 16 | bytes >> 24) & 0xff);
  };
  const PartHeader header = {static_cast<uint8_t>(widest(memory.used_bits[0])),
                             static_cast<uint8_t>(bit_width(widest(memory.used_bits[1]))),
                             static_cast<uint8_t>(zero_bytes), 0};
  const PartLayout layout = part_layout(codec, part, header);

  if (threadIdx.x == 0) {
    *reinterpret_cast<uint32_t*>(target) =
        header.minimum_bits | static_cast<uint32_t>(header.width_bits) << 8 | zero_bytes << 16;
  }
  for (uint32_t head = threadIdx.x; head < codec.heads; head += kEncodeThreads) {
    reinterpret_cast<uint32_t*>(target + layout.heads)[head] = memory.row_offsets[head * codec.rows_per_head];
  }
  for (uint32_t group = threadIdx.x; group < codec.groups[part]; group += kEncodeThreads) {
    // The groups of a part are a multiple of 16, so neither section needs padding.
    const uint32_t bits = scale_bits(codec.dtype, scales[group]);
    if (codec.element_bytes == 2)
      reinterpret_cast<uint16_t*>(target + layout.scales)[group] = static_cast<uint16_t>(bits);
    else reinterpret_cast<uint32_t*>(target + layout.scales)[group] = bits;
    const int32_t zero = zeros[group];
    uint8_t* stored = target + layout.zeros + group * zero_bytes;
    if (zero_bytes == 1) *stored = static_cast<uint8_t>(zero);
    else if (zero_bytes == 2) *reinterpret_cast<int16_t*>(stored) = static_cast<int16_t>(zero);
    else *reinterpret_cast<int32_t*>(stored) = zero;
  }

  for (uint32_t row = warp; row < codec.rows; row += kEncodeWarps) {
    write_header_row(
        codec, header, memory.headers + row * codec.head_dim, layout.header_row_bytes / 4, staging,
        reinterpret_cast<uint32_t*>(target + layout.pack_headers + row * layout.header_row_bytes));
    write_payload_row<kPack>(codec, codes, token_offsets, row, memory.headers, staging,
                             reinterpret_cast<uint32_t*>(target + layout.payloads + memory.row_offsets[row]));
  }

  const uint32_t bytes = layout.payloads + memory.row_offsets[codec.rows], padded = round_up(bytes, 16);
  if (threadIdx.x < (padded - bytes) / 4) reinterpret_cast<uint32_t*>(target + bytes)[threadIdx.x] = 0;
  __syncthreads();
  return padded;
}

}  // namespace ph::kv
