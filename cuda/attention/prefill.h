// Attention of many query tokens of a sequence at a time, for prompts and chunks of them.
//
// The step's tokens are not appended yet: they attend to what their sequences held before the step, packed blocks and
// tokens in 16 bits, and to each other as they come in `tensors`, in 16 bits whatever is packed of them later. Query token
// j of a sequence's m sees the tokens before it and itself, and of those, under a window, the last `window` and the sinks.
#pragma once

#include "kv/cache_operations.h"

namespace ph::attention {

// The tokens in 16 bits that a sequence's step attends to, as a list in the order of their positions: sinks, then recent
// ones and the step's own. Positions stay below 2^31.
struct PlainTokens {
  uint32_t sinks;  // entries before `tail`: entry i is token i
  uint32_t tail;   // position of entry `sinks`; the others follow it

  PH_HOST_DEVICE uint32_t position(uint32_t entry) const {
    return entry < sinks ? entry : tail + (entry - sinks);
  }
  // Entries at positions before `end`.
  PH_HOST_DEVICE uint32_t before(uint32_t end) const {
    if (end <= sinks) return end;
    return end > tail ? sinks + (end - tail) : sinks;
  }
};

PH_HOST_DEVICE PlainTokens plain_tokens(const kv::CacheView& cache, const kv::StepSequence& entry) {
  const uint32_t length = static_cast<uint32_t>(entry.before) + entry.tokens;
  return {cache.sinks < length ? cache.sinks : length, cache.sinks + entry.first_block * kv::kBlockTokens};
}

// Rows are pairs (token of the sequence, query head of a kv head's group), the heads of a token next to each other; a tile
// takes `tile_rows` of one sequence and kv head. Numbers of an entry's tiles begin at first_tile; they do not overlap,
// though some stay unused, as ceil(n / k) <= floor((m + n) / k) - floor(m / k) + 1.
PH_HOST_DEVICE uint32_t first_tile(const kv::StepSequence& entry, uint32_t number, uint32_t group,
                                   uint32_t tile_rows) {
  return static_cast<uint32_t>(static_cast<uint64_t>(entry.input) * group / tile_rows) + number;
}
inline uint32_t tile_numbers(const kv::StepView& step, uint32_t group, uint32_t tile_rows) {
  return static_cast<uint32_t>(static_cast<uint64_t>(step.tokens) * group / tile_rows) + step.sequence_count;
}
// The entry that a tile number falls to.
PH_HOST_DEVICE uint32_t entry_of_tile(const kv::StepView& step, uint32_t tile, uint32_t group,
                                      uint32_t tile_rows) {
  uint32_t low = 0, high = step.sequence_count;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    if (first_tile(step.sequences[middle], middle, group, tile_rows) <= tile) low = middle;
    else high = middle;
  }
  return low;
}

// queries and out: [tokens, query_heads, head_dim] of the cache's dtype; query head h reads kv head
// h / (query_heads / heads). window: 0 for none. Deterministic; a sequence's results do not depend on the rest of the
// batch.
void prefill(ph_device& device, const kv::CacheView& cache, const kv::TileShape& shape, uint32_t layer,
             const kv::StepView& step, kv::StepTensors tensors, const uint8_t* queries, uint8_t* out,
             float scale, uint32_t window);

}  // namespace ph::attention
