// Whether records from outside are ones that an encoder may have written (tile.h). The kernels trust what is in the
// pool: whatever enters it other than through an encoder passes here first.
#pragma once

#include "kv/tile.h"

namespace ph::kv {

constexpr uint32_t kNoHead = UINT32_MAX;

// What is wrong with a block.
struct BlockFlaw {
  const char* what;  // a clause, or null if nothing is wrong
  uint32_t head;     // whose record it is, or kNoHead for the params and the block as a whole
};

// Checks the params and head records of a block, which must fill `bytes` bytes of host memory, and writes where the record
// of each head ends, in bytes from the block's beginning. Every code is checked, so that a block without a flaw is
// attended to the same on all backends.
BlockFlaw check_block(const TileShape& shape, const uint8_t* block, uint64_t bytes, uint32_t* record_ends);

}  // namespace ph::kv
