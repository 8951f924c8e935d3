// How a token is drawn: the arithmetic that both backends share, operation by operation, so that they draw the same one.
// Sources that include this must not fuse multiplications with additions.
//
// A row goes through these steps:
//   1. penalised logits over the temperature, and their largest value
//   2. likelihoods, exp(logit - largest), of which tokens below 2^-32 have none; ordered as their bits are
//   3. thresholds of the filters, each the largest that leaves below it no more than may go: tokens, or weight
//   4. weights, likelihoods as integers of 31 bits, whose sums are exact in any order; the token at a random point of the sum
#pragma once

#include "common/float16.h"
#include "common/philox.h"
#include "packhorse.h"

namespace ph::llm {

constexpr uint32_t kCertain = 0x3f800000u;  // the bits of the largest likelihood, 1
constexpr float kWeightOfOne = 0x1p31f;

// The logit that decides; NaN if there is none.
PH_HOST_DEVICE float adjust_logit(const ph_llm_sampler& sampler, float logit, bool seen) {
  if (seen) logit = logit < 0.0f ? logit * sampler.repetition_penalty : logit / sampler.repetition_penalty;
  return sampler.temperature > 0.0f ? logit / sampler.temperature : logit;
}

// exp(logit - largest) to 2e-7, at most 1; 0 below 2^-32 and for NaN.
PH_HOST_DEVICE float likelihood(float logit, float largest) {
  if (logit == largest) return 1.0f;
  const float exponent = (logit - largest) * 1.44269504f;
  if (!(exponent >= -32.0f)) return 0.0f;
  const float shifted = exponent + 0x1.8p23f;  // rounds to an integer, which ends up in the low bits
  const float fraction = exponent - (shifted - 0x1.8p23f);
  float power = 1.535336188319500e-4f;
  power = power * fraction + 1.339887440266574e-3f;
  power = power * fraction + 9.618437357674640e-3f;
  power = power * fraction + 5.550332471162809e-2f;
  power = power * fraction + 2.402264791363012e-1f;
  power = power * fraction + 6.931472028550421e-1f;
  power = power * fraction + 1.0f;
  return bits_float(float_bits(power) + (float_bits(shifted) << 23));
}

PH_HOST_DEVICE uint32_t weight_of(float likelihood) {
  return static_cast<uint32_t>(likelihood * kWeightOfOne + 0.5f);
}

// What top_k may leave below its threshold: all tokens but k.
PH_HOST_DEVICE uint64_t tokens_to_go(const ph_llm_sampler& sampler, uint32_t vocabulary) {
  return sampler.top_k == 0 || sampler.top_k >= vocabulary ? 0 : vocabulary - sampler.top_k;
}

// What top_p may leave below its threshold, of the weight of all.
PH_HOST_DEVICE uint64_t weight_to_go(const ph_llm_sampler& sampler, uint64_t total) {
  const double share = 1.0 - static_cast<double>(sampler.top_p);
  if (!(share > 0.0)) return 0;
  return share >= 1.0 ? total : static_cast<uint64_t>(share * static_cast<double>(total));
}

// The bits of the least likelihood that min_p lets through.
PH_HOST_DEVICE uint32_t least_of_min_p(const ph_llm_sampler& sampler) {
  if (!(sampler.min_p > 0.0f)) return 0;
  return sampler.min_p < 1.0f ? float_bits(sampler.min_p) : kCertain;
}

// The 64 random bits of a step: words 1 and 0 of Philox4x32-10.
PH_HOST_DEVICE uint64_t random_bits(uint64_t seed, uint32_t step) {
  const RandomWords random = philox(step, seed);
  return static_cast<uint64_t>(random.words[1]) << 32 | random.words[0];
}

// random / 2^64 * total, rounded down.
PH_HOST_DEVICE uint64_t random_below(uint64_t random, uint64_t total) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(random, total);
#else
  return static_cast<uint64_t>(static_cast<unsigned __int128>(random) * total >> 64);
#endif
}

}  // namespace ph::llm
