// The entries of a sparse matrix of full blocks. Thread blocks of a column of the grid share a block of the matrix; a thread
// writes entries a stride apart, in the order of the matrix and in that of the transposed one, so that all writes of a warp
// are next to each other. Moves 16 bytes an entry. No result depends on how entries are spread.
#include <algorithm>

#include "graph/elements.cuh"
#include "graph/full_blocks.h"

namespace ph::graph {

namespace {

// Entries of a thread where blocks are of the same size.
constexpr uint64_t kThreadEntries = 4;
constexpr uint64_t kMostShares = 256;

__global__ void __launch_bounds__(kThreads) FullBlocksKernel(FullBlocks call) {
  const Block at = block_at(call, blockIdx.x);
  const uint32_t entries = at.rows * at.columns;
  for (uint32_t k = blockIdx.y * kThreads + threadIdx.x; k < entries; k += gridDim.y * kThreads) {
    const uint32_t i = k / at.columns, j = k - i * at.columns;
    call.columns[at.entry + k] = at.column + static_cast<int32_t>(j);
    call.inverse[at.entry + k] = static_cast<int32_t>(at.entry + j * at.rows + i);
    const uint32_t column = k / at.rows, row = k - column * at.rows;
    call.rows[at.entry + k] = at.row + static_cast<int32_t>(row);
    call.order[at.entry + k] = static_cast<int32_t>(at.entry + row * at.columns + column);
  }
}

}  // namespace

void full_blocks(ph_device& device, const FullBlocks& call) {
  if (call.blocks == 0 || call.entries == 0) return;
  const uint64_t share = call.blocks * kThreadEntries * kThreads;
  const dim3 grid(call.blocks, static_cast<uint32_t>(
                                   std::clamp<uint64_t>((call.entries + share - 1) / share, 1, kMostShares)));
  FullBlocksKernel<<<grid, kThreads, 0, device.stream>>>(call);
  PH_CUDA_TRY(cudaGetLastError());
}

}  // namespace ph::graph
