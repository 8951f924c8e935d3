// Drawing tokens on the GPU: a thread block a row; see sampling.h.
//
// Likelihoods go to the scratch memory, once; a threshold of the filters is then found two bits at a time, by three sums
// over all tokens each. After six such passes, which read the row from the second cache, the tokens whose likelihood may
// still be the threshold fit shared memory, and the other nine passes read them there; else these read the row as well. Sums
// are of integers, so that their order does not matter: the result is the same every time, and on the CPU.
//
// Bytes moved: a row's logits are read and 4 bytes a token written; the rest stays in the second cache up to some 50 MB of
// scratch.
#include <algorithm>
#include <cmath>

#include "llm/elements.cuh"
#include "llm/sampling.h"

namespace ph::llm {

namespace {

using Wide = unsigned long long;

constexpr uint32_t kThreads = 1024;
constexpr uint32_t kWarps = kThreads / kWarp;
constexpr uint32_t kListed = 8192;  // likelihoods in shared memory
constexpr int kFullPasses = 6, kPasses = 15;
constexpr uint32_t kDigits = 4;

struct Sums {
  Wide below[kDigits - 1];
};

__device__ __forceinline__ Sums operator+(const Sums& a, const Sums& b) {
  return {{a.below[0] + b.below[0], a.below[1] + b.below[1], a.below[2] + b.below[2]}};
}

__device__ __forceinline__ Sums shuffle_xor(const Sums& sums, uint32_t distance) {
  Sums other;
  for (uint32_t i = 0; i < kDigits - 1; ++i)
    other.below[i] = __shfl_xor_sync(kAllLanes, sums.below[i], distance);
  return other;
}

// The sums of all threads, for each of them.
__device__ Sums sum_block(Sums sums) {
  __shared__ Sums partials[kWarps];
  for (uint32_t distance = kWarp / 2; distance > 0; distance /= 2) sums = sums + shuffle_xor(sums, distance);
  if (threadIdx.x % kWarp == 0) partials[threadIdx.x / kWarp] = sums;
  __syncthreads();
  sums = partials[threadIdx.x % kWarp];
  for (uint32_t distance = kWarp / 2; distance > 0; distance /= 2) sums = sums + shuffle_xor(sums, distance);
  __syncthreads();  // before partials are written again
  return sums;
}
static_assert(kWarps == kWarp, "a warp adds the partial sums of all");

struct CountTokens {
  __device__ Wide operator()(float) const { return 1; }
};
struct AddWeights {
  __device__ Wide operator()(float likelihood) const { return weight_of(likelihood); }
};

// Likelihoods that were found to be candidates.
struct List {
  float likelihoods[kListed];
  uint32_t count;
};

// The largest t, up to kCertain, for which the likelihoods with bits in [least, t) measure no more than `limit` together.
template <typename Measure>
__device__ uint32_t find_threshold(const float* likelihoods, uint32_t count, uint32_t least, Wide limit,
                                   List& list, Measure measure) {
  uint32_t found = 0;  // the higher digits of t
  Wide below = 0;      // the measure of what lies below them, once others are no longer read
  bool is_listed = false;
  for (int pass = 0; pass < kPasses; ++pass) {
    const int shift = 2 * (kPasses - 1 - pass);
    if (pass == kFullPasses) {
      // Those in [found, found + 4 << shift) go to the list; the others decide nothing any more.
      const uint32_t end = found + (kDigits << shift);
      if (threadIdx.x == 0) list.count = 0;
      __syncthreads();
      Sums lower = {};
      for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
        const float value = likelihoods[i];
        const uint32_t bits = float_bits(value);
        if (bits < least || bits >= end) continue;
        if (bits < found) {
          lower.below[0] += measure(value);
        } else {
          const uint32_t place = atomicAdd(&list.count, 1u);
          if (place < kListed) list.likelihoods[place] = value;
        }
      }
      lower = sum_block(lower);
      is_listed = list.count <= kListed;
      if (is_listed) below = lower.below[0];
    }
    const float* values = is_listed ? list.likelihoods : likelihoods;
    const uint32_t several = is_listed ? list.count : count;
    Sums sums = {};
    for (uint32_t i = threadIdx.x; i < several; i += kThreads) {
      const float value = values[i];
      const uint32_t bits = float_bits(value);
      if (bits < least) continue;
      const Wide amount = measure(value);
      for (uint32_t digit = 1; digit < kDigits; ++digit)
        sums.below[digit - 1] += bits < found + (digit << shift) ? amount : 0;
    }
    sums = sum_block(sums);
    uint32_t digit = 0;
    while (digit < kDigits - 1 && below + sums.below[digit] <= limit) ++digit;
    found += digit << shift;
  }
  __syncthreads();  // before the list is written again
  return found < kCertain ? found : kCertain;
}

__device__ Wide sum_weights(const float* likelihoods, uint32_t count, uint32_t least) {
  Sums sums = {};
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
    const float value = likelihoods[i];
    sums.below[0] += float_bits(value) >= least ? weight_of(value) : 0;
  }
  return sum_block(sums).below[0];
}

// The first token for which the weights up to it, its own included, are above `point`; -1 if there is none, which is so if
// the weights of all are not. Warps have runs of tokens that follow each other.
__device__ int32_t find_token(const float* likelihoods, uint32_t count, uint32_t least, Wide point) {
  __shared__ Wide totals[kWarps];
  __shared__ int32_t found;
  const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t run = (count + kThreads - 1) / kThreads * kWarp;
  const uint32_t first = min(warp * run, count), last = min(first + run, count);
  const auto weight_at = [&](uint32_t i) -> Wide {
    if (i >= last) return 0;
    const float value = likelihoods[i];
    return float_bits(value) >= least ? weight_of(value) : 0;
  };
  Wide total = 0;
  for (uint32_t i = first + lane; i < last; i += kWarp) total += weight_at(i);
  for (uint32_t distance = kWarp / 2; distance > 0; distance /= 2)
    total += __shfl_xor_sync(kAllLanes, total, distance);
  if (lane == 0) totals[warp] = total;
  if (threadIdx.x == 0) found = -1;
  __syncthreads();
  Wide before = 0;
  for (uint32_t other = 0; other < warp; ++other) before += totals[other];
  if (before <= point && point < before + total) {  // one warp, all of it
    for (uint32_t start = first; start < last; start += kWarp) {
      Wide sum = weight_at(start + lane);
      for (uint32_t distance = 1; distance < kWarp; distance *= 2) {
        const Wide other = __shfl_up_sync(kAllLanes, sum, distance);
        if (lane >= distance) sum += other;
      }
      const uint32_t above = __ballot_sync(kAllLanes, before + sum > point);
      if (above != 0) {
        if (lane == 0) found = static_cast<int32_t>(start) + __ffs(static_cast<int>(above)) - 1;
        break;
      }
      before += __shfl_sync(kAllLanes, sum, kWarp - 1);
    }
  }
  __syncthreads();
  return found;
}

__global__ void __launch_bounds__(kThreads) SampleKernel(Sample call) {
  __shared__ List list;
  __shared__ ph_llm_sampler sampler;
  const uint32_t vocabulary = call.vocabulary;
  const uint64_t first = static_cast<uint64_t>(blockIdx.x) * vocabulary;
  float* scratch = call.scratch + first;
  uint8_t* seen = call.seen == nullptr ? nullptr : call.seen + first;
  if (threadIdx.x == 0) sampler = call.samplers[blockIdx.x];
  __syncthreads();

  Wide best = 0;  // of the logits: their order, then how far from the end
  for (uint32_t i = threadIdx.x; i < vocabulary; i += kThreads) {
    const float logit =
        adjust_logit(sampler, load<1>(call.logits, first + i).at[0], seen != nullptr && seen[i] != 0);
    scratch[i] = logit;
    const Wide key = static_cast<Wide>(order_of(logit)) << 32 | (0xffffffffu - i);
    best = key > best ? key : best;
  }
  best = combine_block<kThreads>(best, [](Wide a, Wide b) { return a > b ? a : b; });
  const bool is_empty = best >> 32 == 0;
  const uint32_t likeliest = 0xffffffffu - static_cast<uint32_t>(best);
  int32_t token = is_empty ? -1 : static_cast<int32_t>(likeliest);

  if (!is_empty && sampler.temperature > 0.0f) {
    const float largest = scratch[likeliest];
    __syncthreads();  // before it is written
    for (uint32_t i = threadIdx.x; i < vocabulary; i += kThreads)
      scratch[i] = likelihood(scratch[i], largest);
    __syncthreads();
    uint32_t least = 0;
    if (const Wide limit = tokens_to_go(sampler, vocabulary); limit > 0)
      least = find_threshold(scratch, vocabulary, 0, limit, list, CountTokens{});
    if (sampler.top_p < 1.0f) {
      const Wide limit = weight_to_go(sampler, sum_weights(scratch, vocabulary, least));
      least = max(least, find_threshold(scratch, vocabulary, least, limit, list, AddWeights{}));
    }
    least = max(least, least_of_min_p(sampler));
    const Wide point =
        random_below(random_bits(sampler.seed, sampler.step), sum_weights(scratch, vocabulary, least));
    const int32_t found = find_token(scratch, vocabulary, least, point);
    if (found >= 0) token = found;
  }

  if (threadIdx.x == 0) {
    call.out[blockIdx.x] = token;
    call.samplers[blockIdx.x].step = sampler.step + 1;
    if (seen != nullptr && token >= 0) seen[token] = 1;
  }
}

constexpr uint32_t kMarkThreads = 256;

__global__ void __launch_bounds__(kMarkThreads)
    MarkKernel(const int32_t* tokens, uint32_t count, uint8_t* seen, uint32_t vocabulary) {
  const uint32_t i = blockIdx.x * kMarkThreads + threadIdx.x;
  if (i < count && static_cast<uint32_t>(tokens[i]) < vocabulary) seen[tokens[i]] = 1;
}

}  // namespace

void sample(ph_device& device, const Sample& call) {
  SampleKernel<<<call.rows, kThreads, 0, device.stream>>>(call);
  PH_CUDA_TRY(cudaGetLastError());
}

void mark(ph_device& device, const int32_t* tokens, uint32_t count, uint8_t* seen, uint32_t vocabulary) {
  MarkKernel<<<(count - 1) / kMarkThreads + 1, kMarkThreads, 0, device.stream>>>(tokens, count, seen,
                                                                                 vocabulary);
  PH_CUDA_TRY(cudaGetLastError());
}

}  // namespace ph::llm
