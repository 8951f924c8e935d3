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

int32_t argmax(Source logits, uint32_t vocabulary) {
  const Floats lowest = splat(-INFINITY);
  return with_float(logits.dtype, [&](auto from) -> int32_t {
    using From = decltype(from);
    const auto comparable = [&](uint32_t i) {
      Floats x = read_at<From>(logits.data, i, vocabulary);
      for (uint32_t lane = vocabulary - i; lane < kVectorLanes; ++lane) x[lane] = -INFINITY;
      return x == x ? x : lowest;
    };
    Floats best = lowest;
    for (uint32_t i = 0; i < vocabulary; i += kVectorLanes) best = larger(comparable(i), best);
    const float most = largest(best);
    if (most == -INFINITY) return -1;
    for (uint32_t i = 0; i < vocabulary; i += kVectorLanes) {
      const Floats x = comparable(i);
      if (largest(x) != most) continue;
      for (uint32_t lane = 0; lane < kVectorLanes; ++lane)
        if (x[lane] == most) return static_cast<int32_t>(i + lane);
    }
    return -1;
  });
}

}  // namespace

extern const RowKernels kRowKernels;
const RowKernels kRowKernels = {PH_STRING(PH_INSTRUCTION_SET), convert, add, rms_norm, rope, swiglu, argmax};

}  // namespace ph::llm::PH_INSTRUCTION_SET
