// The operations of operations.h on elements, on the GPU. A thread has four elements, 16 bytes of each matrix, and the last
// of a count one by one; matrices are read once and written once, and read before if results are added to them.
#include <cmath>

#include "common/philox.h"
#include "graph/elements.cuh"

namespace ph::graph {

namespace {

// The distribution function of the standard normal distribution has no cheap exact form; normcdff is good to 5 ulp.
constexpr float kRootTwoPi = 0.39894228f;  // 1 / sqrt(2 pi)

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <uint32_t Kind>
__device__ __forceinline__ float value_at(float x, float slope) {
  switch (Kind) {
    case PH_GRAPH_RELU:
      return x > 0.0f ? x : 0.0f;
    case PH_GRAPH_LEAKY_RELU:
      return x > 0.0f ? x : slope * x;
    case PH_GRAPH_GELU:
      return x * normcdff(x);
    case PH_GRAPH_TANH:
      return tanhf(x);
    case PH_GRAPH_SIGMOID:
      return sigmoid(x);
    default:
      return (x > 0.0f ? x : 0.0f) + log1pf(expf(-fabsf(x)));  // PH_GRAPH_SOFTPLUS
  }
}

template <uint32_t Kind>
__device__ __forceinline__ float derivative_at(float x, float slope) {
  switch (Kind) {
    case PH_GRAPH_RELU:
      return x > 0.0f ? 1.0f : 0.0f;
    case PH_GRAPH_LEAKY_RELU:
      return x > 0.0f ? 1.0f : slope;
    case PH_GRAPH_GELU:
      return normcdff(x) + x * kRootTwoPi * expf(-0.5f * x * x);
    case PH_GRAPH_TANH: {
      const float y = tanhf(x);
      return 1.0f - y * y;
    }
    case PH_GRAPH_SIGMOID: {
      const float y = sigmoid(x);
      return y * (1.0f - y);
    }
    default:
      return sigmoid(x);  // PH_GRAPH_SOFTPLUS
  }
}

template <uint32_t Kind>
__global__ void __launch_bounds__(kThreads) ActivateKernel(Activate call) {
  for_elements(call.count, [&](auto n, uint64_t at) {
    constexpr int N = decltype(n)::value;
    Values<N> x = load<N>(call.x, at);
    for (float& value : x.at) value = value_at<Kind>(value, call.slope);
    store(call.out, at, x);
  });
}

template <uint32_t Kind>
__global__ void __launch_bounds__(kThreads) ActivateBackwardKernel(ActivateBackward call) {
  for_elements(call.count, [&](auto n, uint64_t at) {
    constexpr int N = decltype(n)::value;
    const Values<N> x = load<N>(call.x, at);
    Values<N> dy = load<N>(call.dy, at);
    for (int i = 0; i < N; ++i) dy.at[i] *= derivative_at<Kind>(x.at[i], call.slope);
    store(call.dx, at, dy, call.accumulate);
  });
}

// Calls `run` with an activation as a template argument.
template <typename Run>
void dispatch_activation(uint32_t kind, Run run) {
  switch (kind) {
    case PH_GRAPH_RELU:
      return run(std::integral_constant<uint32_t, PH_GRAPH_RELU>{});
    case PH_GRAPH_LEAKY_RELU:
      return run(std::integral_constant<uint32_t, PH_GRAPH_LEAKY_RELU>{});
    case PH_GRAPH_GELU:
      return run(std::integral_constant<uint32_t, PH_GRAPH_GELU>{});
    case PH_GRAPH_TANH:
      return run(std::integral_constant<uint32_t, PH_GRAPH_TANH>{});
    case PH_GRAPH_SIGMOID:
      return run(std::integral_constant<uint32_t, PH_GRAPH_SIGMOID>{});
    default:
      return run(std::integral_constant<uint32_t, PH_GRAPH_SOFTPLUS>{});
  }
}

__global__ void __launch_bounds__(kThreads) CombineKernel(Combine call) {
  for_elements(call.count, [&](auto n, uint64_t at) {
    constexpr int N = decltype(n)::value;
    Values<N> values = load<N>(call.x, at);
    for (float& value : values.at) value *= call.alpha;
    if (call.y != nullptr) {
      const Values<N> y = load<N>(call.y, at);
      for (int i = 0; i < N; ++i) values.at[i] = __fmaf_rn(call.beta, y.at[i], values.at[i]);
    }
    store(call.out, at, values);
  });
}

__global__ void __launch_bounds__(kThreads) ProductKernel(Product call) {
  for_elements(call.count, [&](auto n, uint64_t at) {
    constexpr int N = decltype(n)::value;
    Values<N> values = load<N>(call.x, at);
    const Values<N> y = load<N>(call.y, at);
    for (int i = 0; i < N; ++i) values.at[i] *= y.at[i];
    store(call.out, at, values, call.accumulate);
  });
}

template <int N>
__global__ void __launch_bounds__(kThreads) CopyColumnsKernel(CopyColumns call) {
  for_columns<N>(call.rows, call.columns, [&](uint64_t row, uint64_t column) {
    store(call.out, row * call.out_stride + column, load<N>(call.x, row * call.x_stride + column),
          call.accumulate);
  });
}

// Element i has word i % 4 of the counter i / 4.
__global__ void __launch_bounds__(kThreads) DropoutKernel(Dropout call, uint64_t threshold, float scale) {
  for_elements(call.count, [&](auto n, uint64_t at) {
    constexpr int N = decltype(n)::value;
    const RandomWords random = philox(static_cast<uint32_t>(at / 4), call.seed);
    Values<N> x = load<N>(call.x, at);
    if constexpr (N == 4) {
      for (int i = 0; i < N; ++i) x.at[i] = random.words[i] >= threshold ? scale * x.at[i] : 0.0f;
    } else {
      x.at[0] = random.words[at % 4] >= threshold ? scale * x.at[0] : 0.0f;
    }
    store(call.out, at, x, call.accumulate);
  });
}

__global__ void __launch_bounds__(kThreads) AdamKernel(Adam call) {
  float clip = 1.0f;
  if (call.squared_norm != nullptr) {
    const float norm = sqrtf(*call.squared_norm);
    if (!(norm <= call.most_norm)) clip = call.most_norm / norm;
  }
  for_elements(call.count, [&](auto n, uint64_t at) {
    constexpr int N = decltype(n)::value;
    Values<N> parameters = load<N>(call.parameters, at), gradients = load<N>(call.gradients, at),
              first = load<N>(call.first, at), second = load<N>(call.second, at);
    for (int i = 0; i < N; ++i) {
      float parameter = parameters.at[i], gradient = clip * gradients.at[i];
      if (call.decoupled) parameter -= call.learning_rate * call.weight_decay * parameter;
      else gradient += call.weight_decay * parameter;
      first.at[i] = call.beta1 * first.at[i] + (1.0f - call.beta1) * gradient;
      second.at[i] = call.beta2 * second.at[i] + (1.0f - call.beta2) * gradient * gradient;
      parameters.at[i] = parameter - call.learning_rate * (first.at[i] / call.correction1) /
                                         (sqrtf(second.at[i] / call.correction2) + call.epsilon);
    }
    store(call.parameters, at, parameters);
    store(call.first, at, first);
    store(call.second, at, second);
  });
}

}  // namespace

void activate(ph_device& device, const Activate& call) {
  if (call.count == 0) return;
  dispatch_activation(call.kind, [&](auto kind) {
    constexpr uint32_t kKind = decltype(kind)::value;
    ActivateKernel<kKind><<<blocks_of(call.count), kThreads, 0, device.stream>>>(call);
  });
  PH_CUDA_TRY(cudaGetLastError());
}

void activate_backward(ph_device& device, const ActivateBackward& call) {
  if (call.count == 0) return;
  dispatch_activation(call.kind, [&](auto kind) {
    constexpr uint32_t kKind = decltype(kind)::value;
    ActivateBackwardKernel<kKind><<<blocks_of(call.count), kThreads, 0, device.stream>>>(call);
  });
  PH_CUDA_TRY(cudaGetLastError());
}

void combine(ph_device& device, const Combine& call) {
  if (call.count == 0) return;
  CombineKernel<<<blocks_of(call.count), kThreads, 0, device.stream>>>(call);
  PH_CUDA_TRY(cudaGetLastError());
}

void product(ph_device& device, const Product& call) {
  if (call.count == 0) return;
  ProductKernel<<<blocks_of(call.count), kThreads, 0, device.stream>>>(call);
  PH_CUDA_TRY(cudaGetLastError());
}

void copy_columns(ph_device& device, const CopyColumns& call) {
  if (call.rows == 0 || call.columns == 0) return;
  // These matrices may begin at any element.
  const uint64_t x_start = reinterpret_cast<uintptr_t>(call.x) / sizeof(float),
                 out_start = reinterpret_cast<uintptr_t>(call.out) / sizeof(float);
  dispatch_width({call.columns, call.x_stride, call.out_stride, x_start, out_start}, [&](auto n) {
    constexpr int N = decltype(n)::value;
    const uint32_t blocks = grid_for(static_cast<uint64_t>(call.rows) * (call.columns / N), kThreads);
    CopyColumnsKernel<N><<<blocks, kThreads, 0, device.stream>>>(call);
  });
  PH_CUDA_TRY(cudaGetLastError());
}

void dropout(ph_device& device, const Dropout& call) {
  if (call.count == 0) return;
  const uint64_t threshold = dropout_threshold(call.probability);
  const float scale = 1.0f / (1.0f - call.probability);
  DropoutKernel<<<blocks_of(call.count), kThreads, 0, device.stream>>>(call, threshold, scale);
  PH_CUDA_TRY(cudaGetLastError());
}

void adam(ph_device& device, const Adam& call) {
  if (call.count == 0) return;
  AdamKernel<<<blocks_of(call.count), kThreads, 0, device.stream>>>(call);
  PH_CUDA_TRY(cudaGetLastError());
}

}  // namespace ph::graph
