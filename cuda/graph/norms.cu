// Batch and layer norm on the GPU, forward and backward.
//
// Batch norm: sums over rows as in columns.cuh, then a kernel over elements; x is read three times while training, twice of
// it from the second cache where it fits. The variance comes from deviations from the mean of each run of rows, and of those
// means from the mean of all (Chan et al., 1979), so that no large squares cancel. Layer norm: a warp has a row, reads it
// three times, all but the first from the cache, and sums every 32nd element a lane.
#include <cmath>

#include "graph/columns.cuh"

namespace ph::graph {

namespace {

// Of every column of a run: its mean, and the sum of squared deviations from it; partials [runs, 2, columns].
__global__ void __launch_bounds__(kThreads)
    RunMomentsKernel(const float* x, uint32_t width, Panel panel, float* partials) {
  const uint32_t column = blockIdx.x * kWarp + threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t begin = blockIdx.y * panel.run, end = min(begin + panel.run, panel.rows);
  const bool exists = column < panel.count;
  const auto read = [&](uint32_t row) {
    return x[static_cast<uint64_t>(row) * width + panel.first + column];
  };
  float mean[1] = {}, squares[1] = {};
  if (exists) {
#pragma unroll 4
    for (uint32_t row = begin + warp; row < end; row += kWarps) mean[0] += read(row);
  }
  sum_warps(mean);
  mean[0] /= static_cast<float>(end - begin);
  if (exists) {
#pragma unroll 4
    for (uint32_t row = begin + warp; row < end; row += kWarps) {
      const float deviation = read(row) - mean[0];
      squares[0] = __fmaf_rn(deviation, deviation, squares[0]);
    }
  }
  sum_warps(squares);
  if (warp != 0 || !exists) return;
  partials[blockIdx.y * 2 * panel.count + column] = mean[0];
  partials[(blockIdx.y * 2 + 1) * panel.count + column] = squares[0];
}

// Puts the moments of the runs together.
__global__ void __launch_bounds__(kThreads)
    MomentsKernel(BatchNorm call, Panel panel, const float* partials) {
  const uint32_t column = blockIdx.x * kWarp + threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const bool exists = column < panel.count;
  const float count = static_cast<float>(panel.rows);
  const auto rows_of = [&](uint32_t run) {
    return static_cast<float>(min(panel.run, panel.rows - run * panel.run));
  };
  float mean[1] = {}, squares[1] = {};
  if (exists) {
    for (uint32_t run = warp; run < panel.runs; run += kWarps)
      mean[0] = __fmaf_rn(rows_of(run), partials[run * 2 * panel.count + column], mean[0]);
  }
  sum_warps(mean);
  mean[0] /= count;
  if (exists) {
    for (uint32_t run = warp; run < panel.runs; run += kWarps) {
      const float deviation = partials[run * 2 * panel.count + column] - mean[0];
      squares[0] += partials[(run * 2 + 1) * panel.count + column];
      squares[0] = __fmaf_rn(rows_of(run) * deviation, deviation, squares[0]);
    }
  }
  sum_warps(squares);
  if (warp != 0 || !exists) return;
  const uint32_t at = panel.first + column;
  const float variance = squares[0] / count, unbiased = panel.rows > 1 ? count / (count - 1.0f) : 1.0f;
  call.running_mean[at] = (1.0f - call.momentum) * call.running_mean[at] + call.momentum * mean[0];
  call.running_variance[at] =
      (1.0f - call.momentum) * call.running_variance[at] + call.momentum * (unbiased * variance);
  call.saved[at] = mean[0];
  call.saved[static_cast<uint64_t>(call.width) + at] = 1.0f / sqrtf(variance + call.epsilon);
}

__global__ void __launch_bounds__(kThreads) RunningMomentsKernel(BatchNorm call) {
  for_columns<1>(1, call.width, [&](uint64_t, uint64_t column) {
    call.saved[column] = call.running_mean[column];
    call.saved[call.width + column] = 1.0f / sqrtf(call.running_variance[column] + call.epsilon);
  });
}

template <int N>
__global__ void __launch_bounds__(kThreads) BatchNormKernel(BatchNorm call) {
  for_columns<N>(call.rows, call.width, [&](uint64_t row, uint64_t column) {
    Values<N> x = load<N>(call.x, row * call.width + column);
    const Values<N> mean = load<N>(call.saved, column), inverse = load<N>(call.saved, call.width + column),
                    weight = load<N>(call.weight, column), bias = load<N>(call.bias, column);
    for (int i = 0; i < N; ++i)
      x.at[i] = __fmaf_rn(x.at[i] - mean.at[i], inverse.at[i] * weight.at[i], bias.at[i]);
    store(call.out, row * call.width + column, x);
  });
}

__device__ __forceinline__ void add_to(float* target, uint32_t column, float value) {
  if (target != nullptr) target[column] += value;
}

// Sums of dy, and of dy times the normalised x.
struct BatchNormTerm {
  NormBackward call;
  __device__ __forceinline__ void operator()(uint32_t row, uint32_t column, float (&sums)[2]) const {
    const uint64_t at = static_cast<uint64_t>(row) * call.width + column;
    const float dy = call.dy[at], normal = (call.x[at] - call.saved[column]) *
                                           call.saved[static_cast<uint64_t>(call.width) + column];
    sums[0] += dy;
    sums[1] = __fmaf_rn(dy, normal, sums[1]);
  }
};

struct LayerNormTerm {
  NormBackward call;
  __device__ __forceinline__ void operator()(uint32_t row, uint32_t column, float (&sums)[2]) const {
    const uint64_t at = static_cast<uint64_t>(row) * call.width + column;
    const float dy = call.dy[at],
                normal = (call.x[at] - call.saved[row]) * call.saved[static_cast<uint64_t>(call.rows) + row];
    sums[0] += dy;
    sums[1] = __fmaf_rn(dy, normal, sums[1]);
  }
};

// Adds the totals to the gradients of the parameters; totals [2, kPanel], or null.
struct ParameterTotals {
  NormBackward call;
  float* totals;
  __device__ __forceinline__ void operator()(uint32_t column, uint32_t place, const float (&sums)[2]) const {
    add_to(call.dbias, column, sums[0]);
    add_to(call.dweight, column, sums[1]);
    if (totals == nullptr) return;
    totals[place] = sums[0];
    totals[kPanel + place] = sums[1];
  }
};

template <int N>
__global__ void __launch_bounds__(kThreads)
    BatchNormBackwardKernel(NormBackward call, Panel panel, const float* totals) {
  const float count = static_cast<float>(call.rows);
  for_columns<N>(call.rows, panel.count, [&](uint64_t row, uint64_t place) {
    const uint64_t column = panel.first + place, at = row * call.width + column;
    const Values<N> x = load<N>(call.x, at), mean = load<N>(call.saved, column),
                    inverse = load<N>(call.saved, call.width + column), weight = load<N>(call.weight, column),
                    total = load<N>(totals, place), along = load<N>(totals, kPanel + place);
    Values<N> dx = load<N>(call.dy, at);
    for (int i = 0; i < N; ++i) {
      const float normal = (x.at[i] - mean.at[i]) * inverse.at[i];
      dx.at[i] =
          weight.at[i] * inverse.at[i] * (dx.at[i] - __fmaf_rn(normal, along.at[i], total.at[i]) / count);
    }
    store(call.dx, at, dx, call.accumulate);
  });
}

// The row of this warp; a warp without one has nothing to do.
__device__ __forceinline__ uint64_t row_of_warp() {
  return static_cast<uint64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
}

// Calls use(first column) for this lane's columns of a row.
template <int N, typename Use>
__device__ __forceinline__ void for_lane(uint32_t width, Use use) {
  for (uint64_t i = threadIdx.x % kWarp * N; i < width; i += kWarp * N) use(i);
}

template <int N>
__global__ void __launch_bounds__(kThreads) LayerNormKernel(LayerNorm call) {
  const uint64_t row = row_of_warp();
  if (row >= call.rows) return;
  const float width = static_cast<float>(call.width);
  const uint64_t start = row * call.width;
  float total = 0.0f, squares = 0.0f;
  for_lane<N>(call.width, [&](uint64_t i) {
    const Values<N> x = load<N>(call.x, start + i);
    for (int k = 0; k < N; ++k) total += x.at[k];
  });
  const float mean = sum_lanes<kWarp>(total) / width;
  for_lane<N>(call.width, [&](uint64_t i) {
    const Values<N> x = load<N>(call.x, start + i);
    for (int k = 0; k < N; ++k) squares = __fmaf_rn(x.at[k] - mean, x.at[k] - mean, squares);
  });
  const float inverse = 1.0f / sqrtf(sum_lanes<kWarp>(squares) / width + call.epsilon);
  for_lane<N>(call.width, [&](uint64_t i) {
    Values<N> x = load<N>(call.x, start + i);
    const Values<N> weight = load<N>(call.weight, i), bias = load<N>(call.bias, i);
    for (int k = 0; k < N; ++k) x.at[k] = __fmaf_rn((x.at[k] - mean) * inverse, weight.at[k], bias.at[k]);
    store(call.out, start + i, x);
  });
  if (threadIdx.x % kWarp != 0) return;
  call.saved[row] = mean;
  call.saved[call.rows + row] = inverse;
}

template <int N>
__global__ void __launch_bounds__(kThreads) LayerNormBackwardKernel(NormBackward call) {
  const uint64_t row = row_of_warp();
  if (row >= call.rows) return;
  const float width = static_cast<float>(call.width);
  const float mean = call.saved[row], inverse = call.saved[call.rows + row];
  const uint64_t start = row * call.width;
  // Calls use(first column, dy times the weight, the normalised x).
  const auto for_values = [&](auto use) {
    for_lane<N>(call.width, [&](uint64_t i) {
      Values<N> x = load<N>(call.x, start + i), dy = load<N>(call.dy, start + i);
      const Values<N> weight = load<N>(call.weight, i);
      for (int k = 0; k < N; ++k) {
        dy.at[k] *= weight.at[k];
        x.at[k] = (x.at[k] - mean) * inverse;
      }
      use(i, dy, x);
    });
  };
  float total = 0.0f, along = 0.0f;
  for_values([&](uint64_t, const Values<N>& scaled, const Values<N>& normal) {
    for (int k = 0; k < N; ++k) {
      total += scaled.at[k];
      along = __fmaf_rn(scaled.at[k], normal.at[k], along);
    }
  });
  total = sum_lanes<kWarp>(total);
  along = sum_lanes<kWarp>(along);
  for_values([&](uint64_t i, const Values<N>& scaled, const Values<N>& normal) {
    Values<N> dx;
    for (int k = 0; k < N; ++k)
      dx.at[k] = inverse * (scaled.at[k] - __fmaf_rn(normal.at[k], along, total) / width);
    store(call.dx, start + i, dx, call.accumulate);
  });
}

}  // namespace

void batch_norm(ph_device& device, const BatchNorm& call) {
  if (call.rows == 0 || call.width == 0) return;
  if (call.training) {
    for_panels(call.rows, call.width, [&](const Panel& panel) {
      const uint32_t blocks = (panel.count - 1) / kWarp + 1;
      RunMomentsKernel<<<dim3(blocks, panel.runs), kThreads, 0, device.stream>>>(call.x, call.width, panel,
                                                                                 device.partials);
      PH_CUDA_TRY(cudaGetLastError());
      MomentsKernel<<<blocks, kThreads, 0, device.stream>>>(call, panel, device.partials);
      PH_CUDA_TRY(cudaGetLastError());
    });
  } else {
    RunningMomentsKernel<<<grid_for(call.width, kThreads), kThreads, 0, device.stream>>>(call);
    PH_CUDA_TRY(cudaGetLastError());
  }
  dispatch_width({call.width}, [&](auto n) {
    constexpr int N = decltype(n)::value;
    const uint32_t blocks = grid_for(static_cast<uint64_t>(call.rows) * (call.width / N), kThreads);
    BatchNormKernel<N><<<blocks, kThreads, 0, device.stream>>>(call);
  });
  PH_CUDA_TRY(cudaGetLastError());
}

void batch_norm_backward(ph_device& device, const NormBackward& call) {
  if (call.rows == 0 || call.width == 0) return;
  float* totals = device.partials + kTotalsAt;
  for_panels(call.rows, call.width, [&](const Panel& panel) {
    sum_columns<2>(device, panel, BatchNormTerm{call}, ParameterTotals{call, totals});
    if (call.dx == nullptr) return;
    dispatch_width({call.width}, [&](auto n) {
      constexpr int N = decltype(n)::value;
      const uint32_t blocks = grid_for(static_cast<uint64_t>(call.rows) * (panel.count / N), kThreads);
      BatchNormBackwardKernel<N><<<blocks, kThreads, 0, device.stream>>>(call, panel, totals);
    });
    PH_CUDA_TRY(cudaGetLastError());
  });
}

void layer_norm(ph_device& device, const LayerNorm& call) {
  if (call.rows == 0) return;
  const uint32_t blocks = (call.rows - 1) / kWarps + 1;
  dispatch_width({call.width}, [&](auto n) {
    constexpr int N = decltype(n)::value;
    LayerNormKernel<N><<<blocks, kThreads, 0, device.stream>>>(call);
  });
  PH_CUDA_TRY(cudaGetLastError());
}

void layer_norm_backward(ph_device& device, const NormBackward& call) {
  if (call.rows == 0) return;
  if (call.dx != nullptr) {
    const uint32_t blocks = (call.rows - 1) / kWarps + 1;
    dispatch_width({call.width}, [&](auto n) {
      constexpr int N = decltype(n)::value;
      LayerNormBackwardKernel<N><<<blocks, kThreads, 0, device.stream>>>(call);
    });
    PH_CUDA_TRY(cudaGetLastError());
  }
  if (call.dweight == nullptr && call.dbias == nullptr) return;
  for_panels(call.rows, call.width, [&](const Panel& panel) {
    sum_columns<2>(device, panel, LayerNormTerm{call}, ParameterTotals{call, nullptr});
  });
}

}  // namespace ph::graph
