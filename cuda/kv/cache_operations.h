// What each backend implements under the growing cache (cache.h). Pointers are device memory; work is enqueued.
#pragma once

#include "kv/cache.h"

namespace ph::kv {

// The tokens of a step, [tokens, heads, head_dim] of the cache's dtype.
struct StepTensors {
  const uint8_t* parts[kParts];  // keys, values
};

// Scratch memory of append, for steps of up to `blocks` packed blocks. A GPU's must be 0 before the first append.
uint64_t append_workspace_bytes(const CacheView& cache, uint64_t blocks);

// Packs the step's blocks (their tokens lie among the recent ones or in the step's own), each record after the one
// before it, and notes where they end; then moves the step's newest tokens among the recent ones. A token whose values
// are not all finite is packed as if those were 0, and `*non_finite` becomes the least of itself and
// sequence << 40 | token for it.
void append(ph_device& device, const CacheView& cache, const TileShape& shape, uint32_t layer,
            const StepView& step, StepTensors tensors, uint8_t* workspace, uint64_t* non_finite);

// Unpacks tokens [first, first + count) of a sequence, rounded to dtype: keys and values [count, heads, head_dim].
// Sinks and recent tokens are copied as they are. `packed` blocks are packed.
void read_tokens(ph_device& device, const CacheView& cache, const TileShape& shape, uint32_t layer,
                 uint32_t sequence, uint32_t packed, uint64_t first, uint64_t count, uint8_t* keys,
                 uint8_t* values);

// The same for the tokens of block `block` from its first on, back to their places among the recent ones.
void restore_tokens(ph_device& device, const CacheView& cache, const TileShape& shape, uint32_t layer,
                    uint32_t sequence, uint32_t block, uint32_t count);

// A word of device memory to be set: `position` in words from the base.
struct WordAt {
  uint64_t position;
  uint32_t value, unused;
};

void scatter_words(ph_device& device, uint32_t* base, const WordAt* words, uint32_t count);
// Sets each `value` to the word at its position.
void gather_words(ph_device& device, const uint32_t* base, WordAt* words, uint32_t count);

}  // namespace ph::kv
