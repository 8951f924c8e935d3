// What the kernels of the growing cache share: where tokens, streams and the groups of a record are.
#pragma once

#include "kv/cache_operations.h"

namespace ph::kv {

constexpr uint32_t kVectorBytes = 16;
constexpr uint32_t kVectorValues = 8;
constexpr uint32_t kMostGroups = 8;  // of a part: a header word has no room for more
constexpr uint32_t kMostHeadDim = kMostGroups * kTileChannels;
constexpr uint32_t kMostBaseWords = kMostHeadDim / 4;
constexpr uint32_t kRegisters = 16;  // of a lane: four residuals each of a group's 64
static_assert(kUnitBytes == kVectorBytes);

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

// First unit of a group within its record, from the widths before it.
__device__ __forceinline__ uint32_t group_unit(const TileShape& shape, const uint32_t* widths, uint32_t part,
                                               uint32_t group) {
  uint32_t before = width_sum(widths[part] & (1u << 4 * group) - 1);
  if (part == PH_KV_VALUES) before += width_sum(widths[PH_KV_KEYS]);
  return (bases_position(shape, kParts) + kGroupBytes * before) / kUnitBytes;
}

}  // namespace ph::kv
