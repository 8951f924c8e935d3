// Products of small dense matrices on the GPU, in float32: no tensor cores, as TF32 would keep 10 bits of a factor.
//
// A thread block has a tile of 32 x 64 outputs, a thread 4 x 4 of them in registers. Tiles of 16 columns of op(a) and 16
// rows of op(b) go through shared memory, [inner][row or column], whatever way the matrices lie in memory: neighbouring
// threads read neighbouring elements. The next tiles are on their way while these are multiplied. a is read once for every 64
// columns of the output, b once for every 32 rows.
//
// An output is the sum of its products in their order, by fused multiply-adds. Only for a transposed a, whose `inner` are the
// rows of a batch while outputs are few, is that sum cut into runs: each has its own thread blocks and leaves its sums in the
// device's partials, which a second kernel adds in their order. The cuts depend on the sizes alone.
#include <algorithm>

#include "graph/elements.cuh"

namespace ph::graph {

namespace {

constexpr uint32_t kTileRows = 32, kTileColumns = 64, kTileInner = 16;
constexpr uint32_t kTileThreads = 128;
constexpr uint32_t kThreadRows = 4, kThreadColumns = 4;
constexpr uint32_t kColumnThreads = kTileColumns / kThreadColumns;
static_assert(kTileThreads == kColumnThreads * (kTileRows / kThreadRows), "threads share the tile evenly");
// Keeps rows at multiples of 16 bytes, and those that neighbouring threads write in different banks.
constexpr uint32_t kPadding = 4;

// What is written for a sum of products.
__device__ __forceinline__ float finish(const Multiply& call, uint64_t at, uint32_t column, float sum) {
  if (call.bias != nullptr) sum += call.bias[column];
  if (call.accumulate) sum += call.out[at];
  return sum;
}

// blockIdx.y is the run of inner; partials [runs, rows, columns], or null if there is one run.
template <bool TransposeA, bool TransposeB>
__global__ void __launch_bounds__(kTileThreads) MultiplyKernel(Multiply call, uint32_t run, float* partials) {
  __shared__ __align__(16) float a_tile[kTileInner][kTileRows + kPadding];
  __shared__ __align__(16) float b_tile[kTileInner][kTileColumns + kPadding];
  const uint32_t column_tiles = (call.columns - 1) / kTileColumns + 1;
  const uint32_t first_row = blockIdx.x / column_tiles * kTileRows,
                 first_column = blockIdx.x % column_tiles * kTileColumns;
  const uint32_t rows = call.rows - first_row, columns = call.columns - first_column;
  const uint32_t begin = blockIdx.y * run, inner = min(call.inner - begin, run);

  // Where element i of what this thread copies is in a tile.
  const auto a_place = [](uint32_t i) {
    const uint32_t place = i * kTileThreads + threadIdx.x;
    return TransposeA ? make_uint2(place / kTileRows, place % kTileRows)
                      : make_uint2(place % kTileInner, place / kTileInner);
  };
  const auto b_place = [](uint32_t i) {
    const uint32_t place = i * kTileThreads + threadIdx.x;
    return TransposeB ? make_uint2(place % kTileInner, place / kTileInner)
                      : make_uint2(place / kTileColumns, place % kTileColumns);
  };
  constexpr uint32_t kACopies = kTileRows * kTileInner / kTileThreads,
                     kBCopies = kTileColumns * kTileInner / kTileThreads;
  float a_next[kACopies], b_next[kBCopies];
  const auto fetch = [&](uint32_t done) {
    const uint32_t left = inner - done;
    const uint64_t start = static_cast<uint64_t>(begin) + done;
#pragma unroll
    for (uint32_t i = 0; i < kACopies; ++i) {
      const uint2 place = a_place(i);
      const uint64_t k = start + place.x, row = static_cast<uint64_t>(first_row) + place.y;
      a_next[i] = place.x < left && place.y < rows
                      ? call.a[TransposeA ? k * call.rows + row : row * call.inner + k]
                      : 0.0f;
    }
#pragma unroll
    for (uint32_t i = 0; i < kBCopies; ++i) {
      const uint2 place = b_place(i);
      const uint64_t k = start + place.x, column = static_cast<uint64_t>(first_column) + place.y;
      b_next[i] = place.x < left && place.y < columns
                      ? call.b[TransposeB ? column * call.inner + k : k * call.columns + column]
                      : 0.0f;
    }
  };

  const uint32_t thread_row = threadIdx.x / kColumnThreads * kThreadRows,
                 thread_column = threadIdx.x % kColumnThreads * kThreadColumns;
  float sums[kThreadRows][kThreadColumns] = {};
  if (inner > 0) fetch(0);
  for (uint32_t done = 0; done < inner;) {
#pragma unroll
    for (uint32_t i = 0; i < kACopies; ++i) a_tile[a_place(i).x][a_place(i).y] = a_next[i];
#pragma unroll
    for (uint32_t i = 0; i < kBCopies; ++i) b_tile[b_place(i).x][b_place(i).y] = b_next[i];
    __syncthreads();
    const bool is_last = inner - done <= kTileInner;
    if (!is_last) fetch(done + kTileInner);
#pragma unroll
    for (uint32_t k = 0; k < kTileInner; ++k) {
      const Values<4> a = load<4>(a_tile[k], thread_row), b = load<4>(b_tile[k], thread_column);
#pragma unroll
      for (uint32_t row = 0; row < kThreadRows; ++row)
#pragma unroll
        for (uint32_t column = 0; column < kThreadColumns; ++column)
          sums[row][column] = __fmaf_rn(a.at[row], b.at[column], sums[row][column]);
    }
    __syncthreads();  // before the tiles are written again
    if (is_last) break;
    done += kTileInner;
  }

  float* out = partials == nullptr ? call.out
                                   : partials + static_cast<uint64_t>(blockIdx.y) * call.rows * call.columns;
#pragma unroll
  for (uint32_t i = 0; i < kThreadRows; ++i) {
    if (thread_row + i >= rows) break;
    const uint64_t at =
        (static_cast<uint64_t>(first_row) + thread_row + i) * call.columns + first_column + thread_column;
    Values<kThreadColumns> values;
#pragma unroll
    for (uint32_t column = 0; column < kThreadColumns; ++column) {
      values.at[column] = sums[i][column];
      if (partials == nullptr && thread_column + column < columns)
        values.at[column] =
            finish(call, at + column, first_column + thread_column + column, values.at[column]);
    }
    if (call.columns % kThreadColumns == 0) {
      if (thread_column < columns) store(out, at, values);
    } else {
#pragma unroll
      for (uint32_t column = 0; column < kThreadColumns; ++column)
        if (thread_column + column < columns) out[at + column] = values.at[column];
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    SumRunsKernel(Multiply call, uint32_t runs, const float* partials) {
  const uint32_t outputs = call.rows * call.columns;  // at most kPartials
  const uint32_t at = blockIdx.x * kThreads + threadIdx.x;
  if (at >= outputs) return;
  float sum = 0.0f;
#pragma unroll 8
  for (uint32_t run = 0; run < runs; ++run) sum += partials[static_cast<uint64_t>(run) * outputs + at];
  call.out[at] = finish(call, at, at % call.columns, sum);
}

// How much of inner a thread block sums.
uint32_t run_of(const Multiply& call) {
  constexpr uint64_t kMostRuns = 64, kLeastRun = 128;
  const uint64_t outputs = static_cast<uint64_t>(call.rows) * call.columns;
  const uint64_t runs = std::min(kMostRuns, kPartials / outputs);
  if (!call.transpose_a || call.inner <= 2 * kLeastRun || runs < 2) return call.inner;
  const uint64_t run = std::max(kLeastRun, (call.inner - 1) / runs + 1);
  return static_cast<uint32_t>(
      std::min<uint64_t>(call.inner, (run + kTileInner - 1) / kTileInner * kTileInner));
}

}  // namespace

void multiply(ph_device& device, const Multiply& call) {
  if (call.rows == 0 || call.columns == 0) return;
  const uint32_t run = run_of(call), runs = call.inner == 0 ? 1 : (call.inner - 1) / run + 1;
  const uint32_t tiles = ((call.rows - 1) / kTileRows + 1) * ((call.columns - 1) / kTileColumns + 1);
  float* partials = runs > 1 ? device.partials : nullptr;
  const auto kernel = call.transpose_a
                          ? (call.transpose_b ? MultiplyKernel<true, true> : MultiplyKernel<true, false>)
                          : (call.transpose_b ? MultiplyKernel<false, true> : MultiplyKernel<false, false>);
  kernel<<<dim3(tiles, runs), kTileThreads, 0, device.stream>>>(call, run, partials);
  PH_CUDA_TRY(cudaGetLastError());
  if (runs == 1) return;
  const uint32_t blocks = (call.rows * call.columns - 1) / kThreads + 1;
  SumRunsKernel<<<blocks, kThreads, 0, device.stream>>>(call, runs, partials);
  PH_CUDA_TRY(cudaGetLastError());
}

}  // namespace ph::graph
