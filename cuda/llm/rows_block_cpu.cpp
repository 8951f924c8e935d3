// Rows of the operations of operations.h, but for linear, on one CPU core; see operations_block_cpu.h.
#include <cmath>
#include <type_traits>

#include "llm/elements_cpu.h"
#include "llm/operations_block_cpu.h"

namespace ph::llm::PH_INSTRUCTION_SET {

using ph::PH_INSTRUCTION_SET::exp2;
using ph::PH_INSTRUCTION_SET::larger;
using ph::PH_INSTRUCTION_SET::largest;
using ph::PH_INSTRUCTION_SET::splat;
using ph::PH_INSTRUCTION_SET::sum;

namespace {

constexpr float kLog2E = 1.44269504f;

void convert(Source x, Target out, uint64_t count) {
  with_float(x.dtype, [&](auto from) {
    with_float(out.dtype, [&](auto to) {
      for (uint64_t i = 0; i < count; i += kVectorLanes)
        write_at<decltype(to)>(out.data, i, count, read_at<decltype(from)>(x.data, i, count));
    });
  });
}

void add(Target x, Source y, uint64_t count) {
  with_float(x.dtype, [&](auto own) {
    with_float(y.dtype, [&](auto other) {
      using Own = decltype(own);
      for (uint64_t i = 0; i < count; i += kVectorLanes) {
        const Floats total = read_at<Own>(x.data, i, count) + read_at<decltype(other)>(y.data, i, count);
        write_at<Own>(x.data, i, count, total);
      }
    });
  });
}

void rms_norm(Source x, Source weight, Target out, uint32_t width, float epsilon) {
  Floats squares = {};
  with_float(x.dtype, [&](auto from) {
    for (uint32_t i = 0; i < width; i += kVectorLanes) {
      const Floats value = read_at<decltype(from)>(x.data, i, width);
      squares += value * value;
    }
  });
  const float factor = 1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + epsilon);
  with_float(x.dtype, [&](auto from) {
    with_float(weight.dtype, [&](auto weights) {
      with_float(out.dtype, [&](auto to) {
        for (uint32_t i = 0; i < width; i += kVectorLanes) {
          const Floats value = read_at<decltype(from)>(x.data, i, width) * splat(factor) *
                               read_at<decltype(weights)>(weight.data, i, width);
          write_at<decltype(to)>(out.data, i, width, value);
        }
      });
    });
  });
}

void rope(Source x, const float* cosines, const float* sines, Target out, uint32_t head_dim,
          uint32_t rotary_dim) {
  const uint32_t half = rotary_dim / 2;
  with_float(x.dtype, [&](auto from) {
    with_float(out.dtype, [&](auto to) {
      using From = decltype(from);
      using To = decltype(to);
      const uint8_t* second = x.data + half * kBytes<From>;
      for (uint32_t i = 0; i < half; i += kVectorLanes) {
        const Floats a = read_at<From>(x.data, i, half), b = read_at<From>(second, i, half);
        const Floats cosine = read_at<F32>(reinterpret_cast<const uint8_t*>(cosines), i, half);
        const Floats sine = read_at<F32>(reinterpret_cast<const uint8_t*>(sines), i, half);
        write_at<To>(out.data, i, half, a * cosine - b * sine);
        write_at<To>(out.data + half * kBytes<To>, i, half, b * cosine + a * sine);
      }
      if (x.data == out.data) return;
      for (uint32_t i = rotary_dim; i < head_dim; i += kVectorLanes)
        write_at<To>(out.data, i, head_dim, read_at<From>(x.data, i, head_dim));
    });
  });
}

// gate / (1 + exp(-gate)) without overflow: exp of what is never positive, on either side of 0.
Floats silu(Floats gate) {
  const Floats power = exp2((gate < 0.0f ? gate : -gate) * kLog2E);
  return gate * (gate < 0.0f ? power : splat(1.0f)) / (power + 1.0f);
}

void swiglu(Source gate, Source up, Target out, uint32_t width) {
  with_float(gate.dtype, [&](auto from) {
    with_float(out.dtype, [&](auto to) {
      using From = decltype(from);
      for (uint32_t i = 0; i < width; i += kVectorLanes) {
        const Floats value = silu(read_at<From>(gate.data, i, width)) * read_at<From>(up.data, i, width);
        write_at<decltype(to)>(out.data, i, width, value);
      }
    });
  });
}

// Logits from i on, where NaN, and what is beyond the last one, are -infinity.
template <typename From>
Floats comparable_at(Source logits, uint32_t i, uint32_t vocabulary) {
  const Floats lowest = splat(-INFINITY);
  Floats x = read_at<From>(logits.data, i, vocabulary);
  for (uint32_t lane = vocabulary - i; lane < kVectorLanes; ++lane) x[lane] = -INFINITY;
  return x == x ? x : lowest;
}

template <typename From>
float largest_logit(Source logits, uint32_t vocabulary) {
  Floats best = splat(-INFINITY);
  for (uint32_t i = 0; i < vocabulary; i += kVectorLanes)
    best = larger(comparable_at<From>(logits, i, vocabulary), best);
  return largest(best);
}

int32_t argmax(Source logits, uint32_t vocabulary) {
  return with_float(logits.dtype, [&](auto from) -> int32_t {
    using From = decltype(from);
    const float most = largest_logit<From>(logits, vocabulary);
    if (most == -INFINITY) return -1;
    for (uint32_t i = 0; i < vocabulary; i += kVectorLanes) {
      const Floats x = comparable_at<From>(logits, i, vocabulary);
      if (largest(x) != most) continue;
      for (uint32_t lane = 0; lane < kVectorLanes; ++lane)
        if (x[lane] == most) return static_cast<int32_t>(i + lane);
    }
    return -1;
  });
}

// exp(x - largest); 0 beyond the last logit, NaN for NaN.
Floats exponential(Floats x, float largest, uint32_t rest) {
  const Floats difference = x - splat(largest);
  Floats power = exp2(difference * kLog2E);
  power = difference == difference ? power : difference;
  for (uint32_t lane = rest; lane < kVectorLanes; ++lane) power[lane] = 0.0f;
  return power;
}

// Vectors that are added in float32 before they are in float64.
constexpr uint32_t kRun = 16 * kVectorLanes;

float cross_entropy(Source logits, int32_t target, uint32_t vocabulary) {
  if (static_cast<uint32_t>(target) >= vocabulary) return NAN;
  return with_float(logits.dtype, [&](auto from) {
    using From = decltype(from);
    const float most = largest_logit<From>(logits, vocabulary);
    double total = 0.0;
    for (uint32_t run = 0; run < vocabulary; run += kRun) {
      Floats some = {};
      for (uint32_t i = run; i < vocabulary && i < run + kRun; i += kVectorLanes)
        some += exponential(read_at<From>(logits.data, i, vocabulary), most, vocabulary - i);
      total += sum(some);
    }
    const double logit = read_end<From>(logits.data + static_cast<uint64_t>(target) * kBytes<From>, 1)[0];
    return static_cast<float>(std::log(total) - (logit - most));
  });
}

// With p and q up to their sums: sum p (log p - log q) = weighted / sum p + log(sum q / sum p).
float divergence(Source reference, Source logits, uint32_t vocabulary) {
  return with_float(reference.dtype, [&](auto first) {
    return with_float(logits.dtype, [&](auto second) {
      using First = decltype(first);
      using Second = decltype(second);
      const float expected = largest_logit<First>(reference, vocabulary),
                  actual = largest_logit<Second>(logits, vocabulary);
      double weighted = 0.0, p_sum = 0.0, q_sum = 0.0;
      for (uint32_t run = 0; run < vocabulary; run += kRun) {
        Floats some_weighted = {}, some_p = {}, some_q = {};
        for (uint32_t i = run; i < vocabulary && i < run + kRun; i += kVectorLanes) {
          const Floats a = read_at<First>(reference.data, i, vocabulary),
                       b = read_at<Second>(logits.data, i, vocabulary);
          const Floats p = exponential(a, expected, vocabulary - i);
          const Floats product = p * ((a - splat(expected)) - (b - splat(actual)));
          some_p += p;
          some_q += exponential(b, actual, vocabulary - i);
          some_weighted += p == 0.0f ? Floats{} : product;
        }
        weighted += sum(some_weighted);
        p_sum += sum(some_p);
        q_sum += sum(some_q);
      }
      const double found = weighted / p_sum + std::log(q_sum / p_sum);
      return static_cast<float>(found < 0.0 ? 0.0 : found);
    });
  });
}

}  // namespace

extern const RowKernels kRowKernels;
const RowKernels kRowKernels = {
    PH_STRING(PH_INSTRUCTION_SET), convert, add, rms_norm, rope, swiglu, argmax, cross_entropy, divergence};

}  // namespace ph::llm::PH_INSTRUCTION_SET
