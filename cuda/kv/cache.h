// A growing kv cache: sequences of tokens whose older blocks are packed as tiles (tile.h), whose first and newest tokens
// stay in 16 bits. This is the host's side, the same for both backends: which page of the pool belongs to whom, and what
// each step has to do. The kernels' side is cache_operations.h.
//
// A sequence keeps its first `sinks` tokens and its newest in 16 bits; between them, blocks of 64 are packed as soon as
// `residual` tokens or more remain after them. Token `sinks + 64 * b + i` is token i of block b. Per layer, the records of a sequence's blocks form a stream of
// bytes in pages of the pool, found through a page table; where each record ends stands in an index. Both are on the
// device, where sizes become known. The host knows an upper bound for each stream's end and asks the device for the true
// ones only when pages run out, or a sequence is forked or truncated.
#pragma once

#include <memory>
#include <vector>

#include "device/device.h"
#include "kv/tile.h"

namespace ph::kv {

constexpr uint64_t kPageBytes = 64 * 1024;
constexpr uint32_t kUnitBytes = 16;  // of offsets in a stream
constexpr uint32_t kPageUnits = kPageBytes / kUnitBytes;
constexpr uint32_t kStreamStart =
    1;  // a stream's first unit is left free: 0 in the index means "not known yet"
constexpr uint32_t kSizeOnly = 1u << 31;  // flag of an index entry: the size of the record, not yet its end

// Device memory of a cache, as kernels see it. Trivially copyable.
struct CacheView {
  uint32_t layers, sequences, heads, head_dim, query_heads, dtype;
  uint32_t query_dtype;  // of queries and outputs
  uint32_t sinks;        // tokens
  uint32_t ring;         // tokens of the ring of newest ones
  uint32_t most_blocks;  // of a sequence
  uint32_t most_pages;   // of a stream
  uint8_t* pool;         // [pages][kPageBytes]
  uint8_t* recent;       // 16-bit tokens: [layers][sequences][keys, values][sinks + ring][heads][head_dim]
  uint32_t*
      index;  // [layers][sequences][most_blocks * heads + 1]: entry 0 is kStreamStart, entry e + 1 the end
              // of record e = block * heads + head, in units
  uint32_t* page_tables;  // [layers][sequences][most_pages]
};

PH_HOST_DEVICE uint64_t stream_of(const CacheView& cache, uint32_t layer, uint32_t sequence) {
  return static_cast<uint64_t>(layer) * cache.sequences + sequence;
}
PH_HOST_DEVICE uint32_t* index_of(const CacheView& cache, uint32_t layer, uint32_t sequence) {
  return cache.index +
         stream_of(cache, layer, sequence) * (static_cast<uint64_t>(cache.most_blocks) * cache.heads + 1);
}
PH_HOST_DEVICE uint32_t* page_table_of(const CacheView& cache, uint32_t layer, uint32_t sequence) {
  return cache.page_tables + stream_of(cache, layer, sequence) * cache.most_pages;
}
PH_HOST_DEVICE uint64_t recent_part_bytes(const CacheView& cache) {
  return static_cast<uint64_t>(cache.sinks + cache.ring) * cache.heads * cache.head_dim * 2;
}
// Where token `token`, below 2^31, of a sequence is among its recent ones: a sink, or its place in the ring.
PH_HOST_DEVICE uint32_t recent_slot(const CacheView& cache, uint64_t token) {
  return token < cache.sinks ? static_cast<uint32_t>(token)
                             : cache.sinks + (static_cast<uint32_t>(token) - cache.sinks) % cache.ring;
}

// A block's params, of kParamsUnits or none, lie at the end of the record before; the head's record follows them (head 0)
// or the head before.
constexpr uint32_t kParamsUnits = kParamsBytes / kUnitBytes;
static_assert(kParamsBytes % kUnitBytes == 0);

// Units that a block takes at most.
PH_HOST_DEVICE uint64_t largest_block_units(const TileShape& shape) {
  return (params_bytes(shape) + static_cast<uint64_t>(shape.heads) * largest_record_bytes(shape)) /
         kUnitBytes;
}

struct RecordSpan {
  uint32_t params, begin, end;  // units in the stream
};
PH_HOST_DEVICE RecordSpan record_span(const CacheView& cache, const uint32_t* index, uint32_t block,
                                      uint32_t head, uint32_t params_units = kParamsUnits) {
  const uint32_t params = index[block * cache.heads], end = index[block * cache.heads + head + 1];
  return {params, head == 0 ? params + params_units : index[block * cache.heads + head], end};
}

// The same where all blocks have params, and all head records `units`: there is no need to ask the index.
PH_HOST_DEVICE RecordSpan record_span(const CacheView& cache, uint32_t block, uint32_t head, uint32_t units) {
  const uint32_t params = kStreamStart + block * (kParamsUnits + cache.heads * units),
                 begin = params + kParamsUnits + head * units;
  return {params, begin, begin + units};
}

// A byte of a stream.
PH_HOST_DEVICE uint8_t* stream_byte(const CacheView& cache, const uint32_t* pages, uint64_t offset) {
  return cache.pool + pages[offset / kPageBytes] * kPageBytes + offset % kPageBytes;
}

// The first token, sinks aside, that a query token at `position` sees; 0 without a window.
PH_HOST_DEVICE uint32_t window_begin(uint32_t window, uint32_t position) {
  return window == 0 || position < window ? 0 : position + 1 - window;
}

// One sequence's part of a step.
struct StepSequence {
  uint32_t sequence;
  uint32_t tokens;       // appended in this step
  uint64_t before;       // tokens of the sequence before the step
  uint32_t input;        // where its tokens begin among the step's
  uint32_t first_block;  // first block that the step packs
  uint32_t blocks;       // blocks that it packs
  uint32_t packed;       // packed blocks after the step
};

// A block to pack: `entry` of the step's sequences.
struct StepBlock {
  uint32_t entry, block;
};

// A piece of a sequence's tokens for one thread block of attention: runs of kRunTokens in 16 bits (counted from the first
// sink on, those after the packed blocks follow), and packed blocks. Its bounds follow from the sequence's own length and the
// cache's `splits`, so that results do not depend on what else is in the batch. The pieces of a sequence follow each other in
// their order.
struct alignas(16) StepPiece {
  StepSequence
      sequence;  // as it stands among the step's, at `entry`: one load less before a thread block can begin
  uint32_t entry;
  uint32_t first_run, runs;
  uint32_t first_block, blocks;
  uint32_t place, pieces;  // which of the sequence's pieces it is
};

// The work of one step, on the device.
struct StepView {
  const StepSequence* sequences;
  const StepBlock* blocks;
  const StepPiece* pieces;
  uint32_t sequence_count, block_count, piece_count;
  uint32_t tokens;        // of all sequences
  uint32_t most_queries;  // of a sequence
  uint32_t most_pieces;   // of a sequence
};

constexpr uint32_t kRunTokens = 16;       // of a run
constexpr uint32_t kMostPieceWork = 144;  // of a piece of attention: runs and packed blocks
constexpr uint32_t kRunBlocks = 3;        // packed blocks that take attention as long as a run
constexpr uint32_t kMostQueries = 8;      // tokens of a sequence in one attention call

// Where share `at` of `shares` ends, in packed blocks: its runs and blocks together take as long as the other shares', as far
// as it has room. It begins with block `begin`; `runs_to_end` of the `runs` belong to it and those before it. Shares are
// whole batches where room allows.
template <typename Count>
PH_HOST_DEVICE Count share_end(Count blocks, Count runs, Count begin, Count runs_to_end, Count at,
                               Count shares, Count room, Count batch = 1) {
  const Count work = (blocks + batch - 1) / batch * batch + kRunBlocks * runs;
  const Count to_end = work * (at + 1) / shares, of_runs = kRunBlocks * runs_to_end;
  const Count even = to_end > of_runs ? (to_end - of_runs + batch / 2) / batch * batch : 0;
  const Count room_behind = (shares - at - 1) * room;
  const Count least = blocks > room_behind ? blocks - room_behind : 0;
  const Count wanted = even > least ? even : least, most = begin + room < blocks ? begin + room : blocks;
  return wanted < begin ? begin : wanted < most ? wanted : most;
}

}  // namespace ph::kv
