// Drawing tokens on the CPU: a row a core. The thresholds of sampling.h are found by histograms of the likelihoods' bits, 10
// at a time.
#include <algorithm>
#include <cmath>

#include "llm/operations_block_cpu.h"
#include "llm/sampling.h"

namespace ph::llm {

namespace {

// The largest t, up to kCertain, for which the likelihoods with bits in [least, t) measure no more than `limit` together.
template <typename Measure>
uint32_t find_threshold(const float* likelihoods, uint32_t count, uint32_t least, uint64_t limit,
                        Measure measure) {
  constexpr uint32_t kDigits = 1024, kDigitBits = 10;
  uint32_t found = 0;  // the higher digits of t
  for (int32_t shift = 20; shift >= 0; shift -= kDigitBits) {
    uint64_t sums[kDigits] = {};
    const uint64_t span = static_cast<uint64_t>(kDigits) << shift;
    for (uint32_t i = 0; i < count; ++i) {
      const uint32_t bits = float_bits(likelihoods[i]);
      if (bits < least || bits < found || bits - found >= span) continue;
      sums[(bits - found) >> shift] += measure(likelihoods[i]);
    }
    uint32_t digit = 0;
    for (; digit + 1 < kDigits && sums[digit] <= limit; ++digit) limit -= sums[digit];
    found += digit << shift;
  }
  return std::min(found, kCertain);
}

int32_t draw(const Sample& call, uint32_t row) {
  ph_llm_sampler& sampler = call.samplers[row];
  const uint32_t step = sampler.step++;
  const uint64_t first = static_cast<uint64_t>(row) * call.vocabulary;
  float* scratch = call.scratch + first;
  row_kernels().convert({call.logits.data + first * element_bytes(call.logits.dtype), call.logits.dtype},
                        {reinterpret_cast<uint8_t*>(scratch), PH_F32}, call.vocabulary);
  const uint8_t* seen = call.seen == nullptr ? nullptr : call.seen + first;
  float largest = -INFINITY;
  int32_t likeliest = -1;
  for (uint32_t i = 0; i < call.vocabulary; ++i) {
    scratch[i] = adjust_logit(sampler, scratch[i], seen != nullptr && seen[i] != 0);
    if (!(scratch[i] > largest)) continue;
    largest = scratch[i];
    likeliest = static_cast<int32_t>(i);
  }
  if (likeliest < 0 || !(sampler.temperature > 0.0f)) return likeliest;

  for (uint32_t i = 0; i < call.vocabulary; ++i) scratch[i] = likelihood(scratch[i], largest);
  uint32_t least = 0;
  const auto sum_weights = [&] {
    uint64_t total = 0;
    for (uint32_t i = 0; i < call.vocabulary; ++i)
      total += float_bits(scratch[i]) >= least ? weight_of(scratch[i]) : 0;
    return total;
  };
  if (const uint64_t limit = tokens_to_go(sampler, call.vocabulary); limit > 0)
    least = find_threshold(scratch, call.vocabulary, 0, limit, [](float) { return 1; });
  if (sampler.top_p < 1.0f) {
    const uint64_t limit = weight_to_go(sampler, sum_weights());
    least = std::max(least, find_threshold(scratch, call.vocabulary, least, limit, weight_of));
  }
  least = std::max(least, least_of_min_p(sampler));

  const uint64_t point = random_below(random_bits(sampler.seed, step), sum_weights());
  uint64_t sum = 0;
  for (uint32_t i = 0; i < call.vocabulary; ++i) {
    sum += float_bits(scratch[i]) >= least ? weight_of(scratch[i]) : 0;
    if (sum > point) return static_cast<int32_t>(i);
  }
  return likeliest;
}

}  // namespace

void sample(ph_device&, const Sample& call) {
#pragma omp parallel for schedule(static) if (call.rows > 1)
  for (uint32_t row = 0; row < call.rows; ++row) {
    const int32_t token = draw(call, row);
    call.out[row] = token;
    if (call.seen != nullptr && token >= 0)
      call.seen[static_cast<uint64_t>(row) * call.vocabulary + token] = 1;
  }
}

void mark(ph_device&, const int32_t* tokens, uint32_t count, uint8_t* seen, uint32_t vocabulary) {
  for (uint32_t i = 0; i < count; ++i)
    if (static_cast<uint32_t>(tokens[i]) < vocabulary) seen[tokens[i]] = 1;
}

}  // namespace ph::llm
