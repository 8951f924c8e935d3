// Reading the growing kv cache on the GPU: unpacking blocks, and copying tokens in 16 bits.
#include <algorithm>

#include "device/device_cuda.h"
#include "kv/cache.cuh"

namespace ph::kv {

namespace {

constexpr int kWarpThreads = 32;
constexpr int kTileThreads = 256;
constexpr int kTileWarps = kTileThreads / kWarpThreads;
constexpr int kCopyThreads = 256;

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
    if (shape.parts[part].base_bits == 0) {
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
