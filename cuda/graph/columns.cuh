// Sums over the rows of a matrix on the GPU, in float32, two kernels each.
//
// ColumnPartsKernel: a thread block has 32 columns of a run of at least 64 rows. Each of its 8 warps adds every eighth row up,
// a lane a column, coalesced; then the warps' sums are added in their order. TotalsKernel adds the runs' sums up in the same
// way, and hands them on. Runs depend on the number of rows alone; at most 128 of them lie in the device's partials,
// [runs, terms, columns], so wide matrices are done kPanel columns at a time.
#pragma once

#include <algorithm>

#include "graph/elements.cuh"

namespace ph::graph {

constexpr uint32_t kPanel = 2048, kMostRuns = 128, kLeastRun = 64, kMostTerms = 2;
// Then come the totals, [terms, columns], for those who need them in a third kernel.
constexpr uint64_t kTotalsAt = static_cast<uint64_t>(kMostRuns) * kMostTerms * kPanel;
static_assert(kTotalsAt + kMostTerms * kPanel <= kPartials, "sums fit in the device's partials");

// Columns [first, first + count) of a matrix, whose rows are cut into runs.
struct Panel {
  uint32_t first, count, rows, run, runs;
};

// Calls use(panel) for all columns.
template <typename Use>
void for_panels(uint32_t rows, uint32_t width, Use use) {
  const uint32_t run = std::max(kLeastRun, (rows + kMostRuns - 1) / kMostRuns);
  for (uint64_t first = 0; first < width; first += kPanel) {
    const uint32_t start = static_cast<uint32_t>(first);
    use(Panel{start, std::min(kPanel, width - start), rows, run, (rows + run - 1) / run});
  }
}

// The sums of a thread block's warps, lane by lane, for all of them. All threads take part.
template <uint32_t Terms>
__device__ __forceinline__ void sum_warps(float (&sums)[Terms]) {
  __shared__ float parts[kWarps][Terms][kWarp];
  const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (uint32_t i = 0; i < Terms; ++i) parts[warp][i][lane] = sums[i];
  __syncthreads();
  for (uint32_t i = 0; i < Terms; ++i) {
    sums[i] = parts[0][i][lane];
    for (uint32_t other = 1; other < kWarps; ++other) sums[i] += parts[other][i][lane];
  }
  __syncthreads();  // before parts are written again
}

// term(row, column, sums) adds what a row has to the sums of a column.
template <uint32_t Terms, typename Term>
__global__ void __launch_bounds__(kThreads) ColumnPartsKernel(Term term, Panel panel, float* partials) {
  const uint32_t column = blockIdx.x * kWarp + threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t begin = blockIdx.y * panel.run, end = min(begin + panel.run, panel.rows);
  float sums[Terms] = {};
  if (column < panel.count) {
#pragma unroll 4
    for (uint32_t row = begin + warp; row < end; row += kWarps) term(row, panel.first + column, sums);
  }
  sum_warps(sums);
  if (warp != 0 || column >= panel.count) return;
  for (uint32_t i = 0; i < Terms; ++i) partials[(blockIdx.y * Terms + i) * panel.count + column] = sums[i];
}

// use(column, column of the panel, totals) does what is to be done with them.
template <uint32_t Terms, typename Use>
__global__ void __launch_bounds__(kThreads) TotalsKernel(Use use, Panel panel, const float* partials) {
  const uint32_t column = blockIdx.x * kWarp + threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float sums[Terms] = {};
  if (column < panel.count) {
#pragma unroll 4
    for (uint32_t run = warp; run < panel.runs; run += kWarps)
      for (uint32_t i = 0; i < Terms; ++i) sums[i] += partials[(run * Terms + i) * panel.count + column];
  }
  sum_warps(sums);
  if (warp == 0 && column < panel.count) use(panel.first + column, column, sums);
}

template <uint32_t Terms, typename Term, typename Use>
void sum_columns(ph_device& device, const Panel& panel, Term term, Use use) {
  static_assert(Terms <= kMostTerms, "sums fit in the device's partials");
  const uint32_t blocks = (panel.count - 1) / kWarp + 1;
  if (panel.runs > 0) {
    ColumnPartsKernel<Terms>
        <<<dim3(blocks, panel.runs), kThreads, 0, device.stream>>>(term, panel, device.partials);
    PH_CUDA_TRY(cudaGetLastError());
  }
  TotalsKernel<Terms><<<blocks, kThreads, 0, device.stream>>>(use, panel, device.partials);
  PH_CUDA_TRY(cudaGetLastError());
}

}  // namespace ph::graph
