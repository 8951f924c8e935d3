// Vectors of doubles, beside the floats of vector_cpu.h and by its rules, and their exponential.
#pragma once

#include "common/vector_cpu.h"

namespace ph::PH_INSTRUCTION_SET {

constexpr uint32_t kDoubleLanes = kVectorBytes / 8;
using Doubles = double __attribute__((vector_size(kVectorBytes)));
using Longs = int64_t __attribute__((vector_size(kVectorBytes)));
using LongWords = uint64_t __attribute__((vector_size(kVectorBytes)));

inline Doubles splat_double(double value) { return Doubles{} + value; }

inline Doubles larger(Doubles a, Doubles b) { return a > b ? a : b; }
inline Doubles smaller(Doubles a, Doubles b) { return a < b ? a : b; }

// The lanes combined pairwise, always in the same order.
template <typename Combine>
inline double reduce(Doubles x, Combine combine) {
  Longs lanes;
  for (uint32_t lane = 0; lane < kDoubleLanes; ++lane) lanes[lane] = static_cast<int64_t>(lane);
#pragma GCC unroll 3
  for (int64_t half = kDoubleLanes / 2; half > 0; half /= 2) {
    x = combine(x, __builtin_shuffle(x, lanes ^ half));
  }
  return x[0];
}
inline double sum(Doubles x) {
  return reduce(x, [](Doubles a, Doubles b) { return a + b; });
}
inline double largest(Doubles x) {
  return reduce(x, [](Doubles a, Doubles b) { return larger(a, b); });
}

// e^x to 2e-16 relative, of 709 for more; 0 below -708, -infinity included.
inline Doubles exp(Doubles x) {
  constexpr double kLog2E = 0x1.71547652b82fep+0, kShift = 0x1.8p52;
  constexpr double kLn2High = 0x1.62e42fefa3800p-1, kLn2Low = 0x1.ef35793c76730p-45;
  x = smaller(x, splat_double(709.0));
  const Doubles shifted = x * kLog2E + kShift;  // rounds to an integer, which ends up in the low bits
  const Doubles whole = shifted - kShift;
  const Doubles rest = x - whole * kLn2High - whole * kLn2Low;
  Doubles power = splat_double(1.0 / 6227020800.0);
  power = power * rest + 1.0 / 479001600.0;
  power = power * rest + 1.0 / 39916800.0;
  power = power * rest + 1.0 / 3628800.0;
  power = power * rest + 1.0 / 362880.0;
  power = power * rest + 1.0 / 40320.0;
  power = power * rest + 1.0 / 5040.0;
  power = power * rest + 1.0 / 720.0;
  power = power * rest + 1.0 / 120.0;
  power = power * rest + 1.0 / 24.0;
  power = power * rest + 1.0 / 6.0;
  power = power * rest + 0.5;
  power = power * rest + 1.0;
  power = power * rest + 1.0;
  const Doubles scaled = (Doubles)((LongWords)power + ((LongWords)shifted << 52));
  return x < -708.0 ? Doubles{} : scaled;
}

// kDoubleLanes floats or doubles, from and to any address.
inline Doubles read_doubles(const double* source) { return load<Doubles>(source); }
inline Doubles read_doubles(const float* source) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_cvtps_pd(_mm256_loadu_ps(source));
#elif defined(__AVX2__)
  return (Doubles)_mm256_cvtps_pd(_mm_loadu_ps(source));
#else
  Doubles x;
  for (uint32_t lane = 0; lane < kDoubleLanes; ++lane) x[lane] = source[lane];
  return x;
#endif
}
inline void write_doubles(double* target, Doubles x) { store(target, x); }
inline void write_doubles(float* target, Doubles x) {
#if defined(__AVX512F__)
  _mm256_storeu_ps(target, _mm512_cvtpd_ps((__m512d)x));
#elif defined(__AVX2__)
  _mm_storeu_ps(target, _mm256_cvtpd_ps((__m256d)x));
#else
  for (uint32_t lane = 0; lane < kDoubleLanes; ++lane) target[lane] = static_cast<float>(x[lane]);
#endif
}

}  // namespace ph::PH_INSTRUCTION_SET
