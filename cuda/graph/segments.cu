// Sparse matrices and segments on the GPU: each output has threads of its own, which go over its entries, so that no two
// threads add to the same place. A row's sums are in an order that its own entries decide, whatever other rows there are.
//
// AggregateKernel: a thread has 1 or 4 columns of a row, and reads 4 entries at a time, so that it waits for memory once for
// all of them: it adds every fourth entry up, and then the four sums. x is read once an entry, 16 bytes a thread, coalesced
// over a row. EdgeDotKernel and those of softmax: 8 lanes have an entry and head, or a segment and column, and each adds every
// eighth product or entry up. SegmentMaxKernel: a thread has a column of a segment.
#include <cmath>

#include "graph/elements.cuh"

namespace ph::graph {

namespace {

struct Range {
  uint32_t begin, end;
};

// A row's entries, of which there are `entries` in all, whatever the offsets say.
__device__ __forceinline__ Range entries_of(const int32_t* offsets, uint64_t row, uint32_t entries) {
  if (offsets == nullptr) return {static_cast<uint32_t>(row), static_cast<uint32_t>(row) + 1};
  const uint32_t begin = min(static_cast<uint32_t>(max(offsets[row], 0)), entries),
                 end = min(static_cast<uint32_t>(max(offsets[row + 1], 0)), entries);
  return {begin, max(begin, end)};
}

constexpr int32_t kInvalid = -1;

// Entry `at` of indices, which may be null: the entry itself; kInvalid for what is none of `count`.
__device__ __forceinline__ int32_t index_at(const int32_t* indices, uint32_t at, uint32_t count) {
  const int32_t index = indices == nullptr ? static_cast<int32_t>(at) : indices[at];
  return static_cast<uint32_t>(index) < count ? index : kInvalid;
}

template <int N>
__device__ __forceinline__ void add_scaled(Values<N>& sums, float factor, const Values<N>& x) {
  for (int i = 0; i < N; ++i) sums.at[i] = __fmaf_rn(factor, x.at[i], sums.at[i]);
}

template <int N>
__global__ void __launch_bounds__(kThreads) AggregateKernel(Aggregate call) {
  constexpr uint32_t kTogether = 4;
  const uint32_t head_width = call.width / call.heads;
  for_columns<N>(call.rows, call.width, [&](uint64_t row, uint64_t column) {
    const uint32_t head = static_cast<uint32_t>(column) / head_width;
    const Range range = entries_of(call.offsets, row, call.entries);
    const auto scale_of = [&](uint64_t source) {
      return call.column_scale == nullptr ? 1.0f : call.column_scale[source];
    };
    Values<N> sums[kTogether] = {};
    if (call.self != 0.0f)
      add_scaled(sums[0], call.self * scale_of(row), load<N>(call.x, row * call.width + column));
    for (uint32_t start = range.begin; start < range.end; start += kTogether) {
      int32_t sources[kTogether], edges[kTogether];
#pragma unroll
      for (uint32_t i = 0; i < kTogether; ++i) {
        sources[i] = edges[i] = 0;
        if (i >= range.end - start) continue;
        sources[i] = index_at(call.columns, start + i, call.x_rows);
        if (call.weights != nullptr) edges[i] = index_at(call.edges, start + i, call.weight_rows);
      }
      Values<N> x[kTogether] = {};
      float factors[kTogether];
#pragma unroll
      for (uint32_t i = 0; i < kTogether; ++i) {
        factors[i] = 0.0f;
        if (i >= range.end - start) continue;
        if (sources[i] == kInvalid || edges[i] == kInvalid) {
          factors[i] = NAN;
          continue;
        }
        const uint64_t source = sources[i];
        x[i] = load<N>(call.x, source * call.width + column);
        factors[i] = scale_of(source);
        if (call.weights != nullptr)
          factors[i] *= call.weights[static_cast<uint64_t>(edges[i]) * call.heads + head];
      }
#pragma unroll
      for (uint32_t i = 0; i < kTogether; ++i) add_scaled(sums[i], factors[i], x[i]);
    }
    const float row_scale = call.row_scale == nullptr ? 1.0f : call.row_scale[row];
    Values<N> out;
    for (int i = 0; i < N; ++i)
      out.at[i] = row_scale * ((sums[0].at[i] + sums[1].at[i]) + (sums[2].at[i] + sums[3].at[i]));
    store(call.out, row * call.width + column, out, call.accumulate);
  });
}

// A warp has a row; its groups of lanes, the row's entries and heads in turn.
template <int N>
__global__ void __launch_bounds__(kThreads) EdgeDotKernel(EdgeDot call) {
  constexpr uint32_t kGroups = kWarp / kGroup;
  const uint32_t head_width = call.width / call.heads;
  const uint32_t group = threadIdx.x % kWarp / kGroup, lane = threadIdx.x % kGroup;
  const uint64_t warps = static_cast<uint64_t>(gridDim.x) * kWarps;
  for (uint64_t row = static_cast<uint64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; row < call.rows;
       row += warps) {
    const Range range = entries_of(call.offsets, row, call.entries);
    const uint64_t items = static_cast<uint64_t>(range.end - range.begin) * call.heads;
    for (uint64_t start = 0; start < items; start += kGroups) {
      const uint64_t item = start + group;
      const uint32_t entry = range.begin + static_cast<uint32_t>(item / call.heads),
                     head = static_cast<uint32_t>(item % call.heads);
      const int32_t source = item < items ? index_at(call.columns, entry, call.x_rows) : kInvalid;
      float sum = 0.0f;
      if (source != kInvalid) {
        const uint64_t y = row * call.width + static_cast<uint64_t>(head) * head_width,
                       x = static_cast<uint64_t>(source) * call.width +
                           static_cast<uint64_t>(head) * head_width;
        for (uint32_t i = lane * N; i < head_width; i += kGroup * N) {
          const Values<N> a = load<N>(call.y, y + i), b = load<N>(call.x, x + i);
          for (int k = 0; k < N; ++k) sum = __fmaf_rn(a.at[k], b.at[k], sum);
        }
      }
      sum = sum_lanes<kGroup>(sum);
      if (item >= items || lane != 0) continue;
      if (source == kInvalid) {
        sum = NAN;
      } else {
        if (call.row_scale != nullptr) sum *= call.row_scale[row];
        if (call.column_scale != nullptr) sum *= call.column_scale[source];
      }
      store<1>(call.out, static_cast<uint64_t>(entry) * call.heads + head, {{sum}}, call.accumulate);
    }
  }
}

__global__ void __launch_bounds__(kThreads) SegmentMaxKernel(SegmentMax call) {
  for_columns<1>(call.rows, call.width, [&](uint64_t row, uint64_t column) {
    const Range range = entries_of(call.offsets, row, call.x_rows);
    float most = 0.0f;
    int32_t place = -1;
#pragma unroll 4
    for (uint32_t entry = range.begin; entry < range.end; ++entry) {
      const float x = call.x[static_cast<uint64_t>(entry) * call.width + column];
      // The first of several; a NaN is larger than all.
      if (place < 0 || x > most || (x != x && most == most)) {
        most = x;
        place = static_cast<int32_t>(entry);
      }
    }
    const uint64_t at = row * call.width + column;
    call.out[at] = most;
    call.places[at] = place;
  });
}

// A place belongs to one row alone.
__global__ void __launch_bounds__(kThreads) SegmentMaxBackwardKernel(SegmentMaxBackward call) {
  for_columns<1>(call.rows, call.width, [&](uint64_t row, uint64_t column) {
    const uint64_t at = row * call.width + column;
    const uint32_t place = static_cast<uint32_t>(call.places[at]);
    if (place < call.x_rows) call.dx[static_cast<uint64_t>(place) * call.width + column] += call.dy[at];
  });
}

// Calls use(range, column, lane of the group) for every segment and column, in all lanes of a warp alike: those that have
// none get an empty range.
template <typename Use>
__device__ __forceinline__ void for_segments(const int32_t* offsets, uint32_t rows, uint32_t x_rows,
                                             uint32_t width, Use use) {
  for_groups(static_cast<uint64_t>(rows) * width, [&](uint64_t item, bool exists, uint32_t lane) {
    const uint64_t row = item / width;
    use(exists ? entries_of(offsets, row, x_rows) : Range{0, 0}, item - row * width, lane);
  });
}

__global__ void __launch_bounds__(kThreads) SegmentSoftmaxKernel(SegmentSoftmax call) {
  for_segments(
      call.offsets, call.rows, call.x_rows, call.width, [&](Range range, uint64_t column, uint32_t lane) {
        const auto place = [&](uint32_t entry) { return static_cast<uint64_t>(entry) * call.width + column; };
        float most = -INFINITY, total = 0.0f;
        for (uint32_t entry = range.begin + lane; entry < range.end; entry += kGroup) {
          const float x = call.x[place(entry)];
          most = x > most ? x : most;
        }
        most = combine_lanes<kGroup>(most, [](float a, float b) { return a > b ? a : b; });
        for (uint32_t entry = range.begin + lane; entry < range.end; entry += kGroup) {
          const float weight = expf(call.x[place(entry)] - most);
          call.out[place(entry)] = weight;
          total += weight;
        }
        total = sum_lanes<kGroup>(total);
        for (uint32_t entry = range.begin + lane; entry < range.end; entry += kGroup)
          call.out[place(entry)] /= total;
      });
}

__global__ void __launch_bounds__(kThreads) SegmentSoftmaxBackwardKernel(SegmentSoftmaxBackward call) {
  for_segments(
      call.offsets, call.rows, call.x_rows, call.width, [&](Range range, uint64_t column, uint32_t lane) {
        const auto place = [&](uint32_t entry) { return static_cast<uint64_t>(entry) * call.width + column; };
        float mean = 0.0f;
        for (uint32_t entry = range.begin + lane; entry < range.end; entry += kGroup)
          mean = __fmaf_rn(call.y[place(entry)], call.dy[place(entry)], mean);
        mean = sum_lanes<kGroup>(mean);
        for (uint32_t entry = range.begin + lane; entry < range.end; entry += kGroup) {
          const uint64_t at = place(entry);
          store<1>(call.dx, at, {{call.y[at] * (call.dy[at] - mean)}}, call.accumulate);
        }
      });
}

}  // namespace

void aggregate(ph_device& device, const Aggregate& call) {
  if (call.rows == 0 || call.width == 0) return;
  dispatch_width({call.width / call.heads}, [&](auto n) {
    constexpr int N = decltype(n)::value;
    const uint32_t blocks = grid_for(static_cast<uint64_t>(call.rows) * (call.width / N), kThreads);
    AggregateKernel<N><<<blocks, kThreads, 0, device.stream>>>(call);
  });
  PH_CUDA_TRY(cudaGetLastError());
}

void edge_dot(ph_device& device, const EdgeDot& call) {
  if (call.rows == 0 || call.entries == 0) return;
  const uint32_t blocks = grid_for(call.rows, kWarps);
  dispatch_width({call.width / call.heads}, [&](auto n) {
    constexpr int N = decltype(n)::value;
    EdgeDotKernel<N><<<blocks, kThreads, 0, device.stream>>>(call);
  });
  PH_CUDA_TRY(cudaGetLastError());
}

void segment_max(ph_device& device, const SegmentMax& call) {
  const uint64_t outputs = static_cast<uint64_t>(call.rows) * call.width;
  if (outputs == 0) return;
  SegmentMaxKernel<<<grid_for(outputs, kThreads), kThreads, 0, device.stream>>>(call);
  PH_CUDA_TRY(cudaGetLastError());
}

void segment_max_backward(ph_device& device, const SegmentMaxBackward& call) {
  const uint64_t inputs = static_cast<uint64_t>(call.x_rows) * call.width,
                 outputs = static_cast<uint64_t>(call.rows) * call.width;
  if (inputs == 0) return;
  if (!call.accumulate) PH_CUDA_TRY(cudaMemsetAsync(call.dx, 0, inputs * sizeof(float), device.stream));
  if (outputs == 0) return;
  SegmentMaxBackwardKernel<<<grid_for(outputs, kThreads), kThreads, 0, device.stream>>>(call);
  PH_CUDA_TRY(cudaGetLastError());
}

void segment_softmax(ph_device& device, const SegmentSoftmax& call) {
  const uint64_t items = static_cast<uint64_t>(call.rows) * call.width;
  if (items == 0) return;
  SegmentSoftmaxKernel<<<blocks_of_groups(items), kThreads, 0, device.stream>>>(call);
  PH_CUDA_TRY(cudaGetLastError());
}

void segment_softmax_backward(ph_device& device, const SegmentSoftmaxBackward& call) {
  const uint64_t items = static_cast<uint64_t>(call.rows) * call.width;
  if (items == 0) return;
  SegmentSoftmaxBackwardKernel<<<blocks_of_groups(items), kThreads, 0, device.stream>>>(call);
  PH_CUDA_TRY(cudaGetLastError());
}

}  // namespace ph::graph
