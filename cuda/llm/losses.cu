// How good logits are, on the GPU: a thread block a row, which it reads twice, the second time from the second cache.
// Exponentials are float32, their sums float64 in an order that depends on the vocabulary alone.
#include <cmath>

#include "llm/elements.cuh"

namespace ph::llm {

namespace {

constexpr uint32_t kThreads = 512;

__device__ __forceinline__ double sum_block(double value) {
  return combine_block<kThreads>(value, [](double a, double b) { return a + b; });
}

// The row's largest logit and where it comes first; NaN does not count.
struct Largest {
  float value;
  uint32_t index;
};

__device__ Largest find_largest(Source logits, uint64_t first, uint32_t vocabulary) {
  unsigned long long best = 0;
  for (uint32_t i = threadIdx.x; i < vocabulary; i += kThreads) {
    const unsigned long long order = order_of(load<1>(logits, first + i).at[0]);
    const unsigned long long key = order << 32 | (0xffffffffu - i);
    best = key > best ? key : best;
  }
  best =
      combine_block<kThreads>(best, [](unsigned long long a, unsigned long long b) { return a > b ? a : b; });
  const uint32_t index = 0xffffffffu - static_cast<uint32_t>(best);
  return {load<1>(logits, first + index).at[0], index};
}

__global__ void __launch_bounds__(kThreads)
    CrossEntropyKernel(Source logits, const int32_t* targets, float* out, uint32_t vocabulary) {
  const uint64_t first = static_cast<uint64_t>(blockIdx.x) * vocabulary;
  const float largest = find_largest(logits, first, vocabulary).value;
  double sum = 0.0;
  for (uint32_t i = threadIdx.x; i < vocabulary; i += kThreads)
    sum += expf(load<1>(logits, first + i).at[0] - largest);
  sum = sum_block(sum);
  if (threadIdx.x != 0) return;
  const int32_t target = targets[blockIdx.x];
  if (static_cast<uint32_t>(target) >= vocabulary) {
    out[blockIdx.x] = NAN;
    return;
  }
  const double logit = load<1>(logits, first + target).at[0];
  out[blockIdx.x] = static_cast<float>(log(sum) - (logit - largest));
}

__global__ void __launch_bounds__(kThreads)
    DivergenceKernel(Source reference, Source logits, float* out, uint32_t vocabulary) {
  const uint64_t first = static_cast<uint64_t>(blockIdx.x) * vocabulary;
  const Largest expected = find_largest(reference, first, vocabulary),
                actual = find_largest(logits, first, vocabulary);
  // With p and q up to their sums: sum p (log p - log q) = weighted / sum p + log(sum q / sum p).
  double weighted = 0.0, p_sum = 0.0, q_sum = 0.0;
  for (uint32_t i = threadIdx.x; i < vocabulary; i += kThreads) {
    const float a = load<1>(reference, first + i).at[0] - expected.value,
                b = load<1>(logits, first + i).at[0] - actual.value;
    const float p = expf(a);
    p_sum += p;
    q_sum += expf(b);
    if (p != 0.0f) weighted += static_cast<double>(p) * (static_cast<double>(a) - static_cast<double>(b));
  }
  weighted = sum_block(weighted);
  p_sum = sum_block(p_sum);
  q_sum = sum_block(q_sum);
  if (threadIdx.x != 0) return;
  const double divergence = weighted / p_sum + log(q_sum / p_sum);
  out[2ull * blockIdx.x] = static_cast<float>(divergence < 0.0 ? 0.0 : divergence);
  out[2ull * blockIdx.x + 1] = expected.index == actual.index ? 1.0f : 0.0f;
}

}  // namespace

void cross_entropy(ph_device& device, Source logits, const int32_t* targets, float* out, uint32_t rows,
                   uint32_t vocabulary) {
  CrossEntropyKernel<<<rows, kThreads, 0, device.stream>>>(logits, targets, out, vocabulary);
  PH_CUDA_TRY(cudaGetLastError());
}

void divergence(ph_device& device, Source reference, Source logits, float* out, uint32_t rows,
                uint32_t vocabulary) {
  DivergenceKernel<<<rows, kThreads, 0, device.stream>>>(reference, logits, out, vocabulary);
  PH_CUDA_TRY(cudaGetLastError());
}

}  // namespace ph::llm
