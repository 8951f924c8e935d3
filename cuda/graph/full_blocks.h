// Where the blocks of FullBlocks lie, for both backends.
#pragma once

#include "common/portable.h"
#include "graph/operations.h"

namespace ph::graph {

// A block's first row, column and entry, and its size; without rows and columns if its entries have no room for it.
struct Block {
  int32_t row, column;
  uint32_t entry, rows, columns;
};

PH_HOST_DEVICE Block block_at(const FullBlocks& call, uint32_t block) {
  const int32_t row = call.row_offsets[block], column = call.column_offsets[block],
                entry = call.entry_offsets[block];
  const int64_t rows = static_cast<int64_t>(call.row_offsets[block + 1]) - row,
                columns = static_cast<int64_t>(call.column_offsets[block + 1]) - column,
                room = entry < 0 ? 0 : static_cast<int64_t>(call.entries) - entry;
  // Both factors are below 2^32, so that the product of those that are positive does not wrap as an unsigned one.
  const bool fits =
      rows > 0 && columns > 0 && room > 0 &&
      static_cast<uint64_t>(rows) * static_cast<uint64_t>(columns) <= static_cast<uint64_t>(room);
  return {row, column, static_cast<uint32_t>(entry), fits ? static_cast<uint32_t>(rows) : 0,
          fits ? static_cast<uint32_t>(columns) : 0};
}

}  // namespace ph::graph
