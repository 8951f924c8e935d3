// Decode attention over a growing cache: softmax(scale * q . K) . V in one kernel, keys and values unpacked in registers.
//
// The step's tokens are appended already. Query token j of a sequence's m attends to the tokens before it and itself.
#pragma once

#include "kv/cache.h"

namespace ph::attention {

// Scratch memory for the steps of a cache: partial results of every piece. It must be zero before the first step, and is
// decode's own from then on.
uint64_t decode_workspace_bytes(const kv::CacheView& cache, uint64_t pieces);

// On a GPU it begins with so many bytes of counters: [sequences][heads][groups of four columns or more], 0 between calls.
inline uint64_t decode_counter_bytes(const kv::CacheView& cache) {
  const uint64_t columns = static_cast<uint64_t>(cache.query_heads / cache.heads) * kv::kMostQueries;
  const uint64_t counters = static_cast<uint64_t>(cache.sequences) * cache.heads * ((columns + 3) / 4);
  return (counters * sizeof(uint32_t) + 255) / 256 * 256;
}

// Whether attention of this backend takes queries, and gives outputs, of a dtype beside that of the cache.
bool takes_queries(uint32_t dtype);

// queries and out: [tokens, query_heads, head_dim] of the cache's query_dtype. Query head h reads kv head
// h / (query_heads / heads). window: how many tokens a token sees, itself included, beside the sinks; 0: all that are
// before it. Deterministic; a sequence's results do not depend on the rest of the batch.
void decode(ph_device& device, const kv::CacheView& cache, const kv::TileShape& shape, uint32_t layer,
            const kv::StepView& step, const uint8_t* queries, uint8_t* out, float scale, uint8_t* workspace,
            uint32_t window = 0);

}  // namespace ph::attention
