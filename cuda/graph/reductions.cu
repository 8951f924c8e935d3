// What sums over a row, over all rows or over everything, but for the norms, on the GPU.
//
// column_sum and the gradient of head_dot's vectors go as in columns.cuh. HeadDotKernel: 8 lanes have a row and head.
// CrossEntropyKernel: a warp has a row at a time, a lane every 32nd class; sums are float64, as on the CPU. The loss and the
// squared norm are sums of thread blocks' sums, which lie in the device's partials and which one block then adds; how many
// blocks there are depends on the size alone.
#include <cmath>

#include "graph/columns.cuh"

namespace ph::graph {

namespace {

struct ColumnTerm {
  ColumnSum call;
  __device__ __forceinline__ void operator()(uint32_t row, uint32_t column, float (&sums)[1]) const {
    sums[0] += call.x[static_cast<uint64_t>(row) * call.width + column];
  }
};

// Columns of all heads, [heads * width], as one row.
struct HeadDotTerm {
  HeadDotBackward call;
  __device__ __forceinline__ void operator()(uint32_t row, uint32_t column, float (&sums)[1]) const {
    const float dy = call.dy[static_cast<uint64_t>(row) * call.heads + column / call.width];
    const uint64_t width = static_cast<uint64_t>(call.heads) * call.width;
    sums[0] = __fmaf_rn(dy, call.x[row * width + column], sums[0]);
  }
};

struct WriteTotal {
  float* out;
  bool accumulate;
  __device__ __forceinline__ void operator()(uint32_t column, uint32_t, const float (&sums)[1]) const {
    store<1>(out, column, {{sums[0]}}, accumulate);
  }
};

template <int N>
__global__ void __launch_bounds__(kThreads) HeadDotKernel(HeadDot call) {
  const uint64_t items = static_cast<uint64_t>(call.rows) * call.heads;
  for_groups(items, [&](uint64_t item, bool exists, uint32_t lane) {
    float sum = 0.0f;
    if (exists) {
      const uint64_t x = item * call.width, a = item % call.heads * call.width;
      for (uint64_t i = lane * N; i < call.width; i += kGroup * N) {
        const Values<N> left = load<N>(call.x, x + i), right = load<N>(call.a, a + i);
        for (int k = 0; k < N; ++k) sum = __fmaf_rn(left.at[k], right.at[k], sum);
      }
    }
    sum = sum_lanes<kGroup>(sum);
    if (exists && lane == 0) call.out[item] = sum;
  });
}

template <int N>
__global__ void __launch_bounds__(kThreads) HeadDotBackwardKernel(HeadDotBackward call) {
  const uint32_t width = call.heads * call.width;
  for_columns<N>(call.rows, width, [&](uint64_t row, uint64_t column) {
    const float dy = call.dy[row * call.heads + static_cast<uint32_t>(column) / call.width];
    Values<N> dx = load<N>(call.a, column);
    for (float& value : dx.at) value *= dy;
    store(call.dx, row * width + column, dx, call.accumulate_dx);
  });
}

__device__ __forceinline__ double sum_block(double value) {
  return combine_block<kThreads>(value, [](double a, double b) { return a + b; });
}

constexpr uint32_t kMostParts = 512;
static_assert(kMostParts * sizeof(double) <= kPartials * sizeof(float), "sums fit in the device's partials");

// out[0] = scale * the sum of the parts.
__global__ void __launch_bounds__(kThreads)
    SumPartsKernel(const double* parts, uint32_t count, double scale, float* out) {
  double sum = 0.0;
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) sum += parts[i];
  sum = sum_block(sum);
  if (threadIdx.x == 0) *out = static_cast<float>(scale * sum);
}

__global__ void __launch_bounds__(kThreads) SquaresKernel(const float* x, uint64_t count, double* parts) {
  double sum = 0.0;
  for_elements(count, [&](auto n, uint64_t at) {
    constexpr int N = decltype(n)::value;
    const Values<N> values = load<N>(x, at);
    for (const float value : values.at) sum += static_cast<double>(value) * static_cast<double>(value);
  });
  sum = sum_block(sum);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) CrossEntropyKernel(CrossEntropy call, double* parts) {
  const uint32_t lane = threadIdx.x % kWarp;
  const uint64_t warps = static_cast<uint64_t>(gridDim.x) * kWarps;
  double losses = 0.0;
  for (uint64_t row = static_cast<uint64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; row < call.rows;
       row += warps) {
    const float* logits = call.logits + row * call.classes;
    float* probabilities = call.probabilities + row * call.classes;
    // The order of the largest logit, then how far from the end it first is.
    unsigned long long key = 0;
    for (uint64_t c = lane; c < call.classes; c += kWarp) {
      const unsigned long long each =
          static_cast<unsigned long long>(llm::order_of(logits[c])) << 32 | (0xffffffffu - c);
      key = each > key ? each : key;
    }
    key = combine_lanes<kWarp>(key, [](auto a, auto b) { return a > b ? a : b; });
    uint32_t best = 0xffffffffu - static_cast<uint32_t>(key);
    if (logits[0] != logits[0]) best = 0;  // nothing is larger than NaN
    const float most = logits[best];
    double total = 0.0;
    for (uint64_t c = lane; c < call.classes; c += kWarp) {
      probabilities[c] = expf(logits[c] - most);
      total += static_cast<double>(probabilities[c]);
    }
    total = sum_lanes<kWarp>(total);
    for (uint64_t c = lane; c < call.classes; c += kWarp)
      probabilities[c] = static_cast<float>(static_cast<double>(probabilities[c]) / total);
    if (lane != 0) continue;
    const int32_t label = call.labels[row];
    double loss = 0.0;
    if (label >= 0) {
      loss = static_cast<uint32_t>(label) < call.classes
                 ? log(total) + static_cast<double>(most) - static_cast<double>(logits[label])
                 : static_cast<double>(NAN);
    }
    losses += loss;
    if (call.row_losses != nullptr) call.row_losses[row] = static_cast<float>(loss);
    if (call.predictions != nullptr) call.predictions[row] = static_cast<int32_t>(best);
  }
  losses = sum_block(losses);
  if (threadIdx.x == 0) parts[blockIdx.x] = losses;
}

__global__ void __launch_bounds__(kThreads) CrossEntropyBackwardKernel(CrossEntropyBackward call) {
  const float scale = call.scale * *call.dy;
  for_columns<1>(call.rows, call.classes, [&](uint64_t row, uint64_t c) {
    const int32_t label = call.labels[row];
    const uint64_t at = row * call.classes + c;
    const float one = label >= 0 && static_cast<uint32_t>(label) == c ? 1.0f : 0.0f;
    store<1>(call.dx, at, {{label < 0 ? 0.0f : scale * (call.probabilities[at] - one)}}, call.accumulate);
  });
}

void sum_parts(ph_device& device, uint32_t count, double scale, float* out) {
  const double* parts = reinterpret_cast<const double*>(device.partials);
  SumPartsKernel<<<1, kThreads, 0, device.stream>>>(parts, count, scale, out);
  PH_CUDA_TRY(cudaGetLastError());
}

}  // namespace

void column_sum(ph_device& device, const ColumnSum& call) {
  for_panels(call.rows, call.width, [&](const Panel& panel) {
    sum_columns<1>(device, panel, ColumnTerm{call}, WriteTotal{call.out, call.accumulate});
  });
}

void head_dot(ph_device& device, const HeadDot& call) {
  const uint64_t items = static_cast<uint64_t>(call.rows) * call.heads;
  if (items == 0) return;
  dispatch_width({call.width}, [&](auto n) {
    constexpr int N = decltype(n)::value;
    HeadDotKernel<N><<<blocks_of_groups(items), kThreads, 0, device.stream>>>(call);
  });
  PH_CUDA_TRY(cudaGetLastError());
}

void head_dot_backward(ph_device& device, const HeadDotBackward& call) {
  const uint32_t width = call.heads * call.width;
  if (width == 0) return;
  if (call.dx != nullptr && call.rows > 0) {
    dispatch_width({call.width}, [&](auto n) {
      constexpr int N = decltype(n)::value;
      const uint32_t blocks = grid_for(static_cast<uint64_t>(call.rows) * (width / N), kThreads);
      HeadDotBackwardKernel<N><<<blocks, kThreads, 0, device.stream>>>(call);
    });
    PH_CUDA_TRY(cudaGetLastError());
  }
  if (call.da == nullptr) return;
  for_panels(call.rows, width, [&](const Panel& panel) {
    sum_columns<1>(device, panel, HeadDotTerm{call}, WriteTotal{call.da, call.accumulate_da});
  });
}

void cross_entropy(ph_device& device, const CrossEntropy& call) {
  const uint32_t blocks = std::min(kMostParts, grid_for(call.rows, kWarps));
  if (blocks > 0) {
    CrossEntropyKernel<<<blocks, kThreads, 0, device.stream>>>(call,
                                                               reinterpret_cast<double*>(device.partials));
    PH_CUDA_TRY(cudaGetLastError());
  }
  sum_parts(device, blocks, call.scale, call.loss);
}

void cross_entropy_backward(ph_device& device, const CrossEntropyBackward& call) {
  const uint64_t count = static_cast<uint64_t>(call.rows) * call.classes;
  if (count == 0) return;
  CrossEntropyBackwardKernel<<<grid_for(count, kThreads), kThreads, 0, device.stream>>>(call);
  PH_CUDA_TRY(cudaGetLastError());
}

void squared_norm(ph_device& device, const float* x, float* out, uint64_t count) {
  const uint32_t blocks = std::min(kMostParts, blocks_of(count));
  if (blocks > 0) {
    SquaresKernel<<<blocks, kThreads, 0, device.stream>>>(x, count,
                                                          reinterpret_cast<double*>(device.partials));
    PH_CUDA_TRY(cudaGetLastError());
  }
  sum_parts(device, blocks, 1.0, out);
}

}  // namespace ph::graph
