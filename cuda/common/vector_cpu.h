// Vectors as wide as the registers of the instruction set that a source is compiled for, and how tensors of 16-bit floats
// become vectors. For sources that are compiled once per instruction set, with PH_INSTRUCTION_SET set to its name: it is
// the namespace, too, so that no linker takes one compilation's functions for another's.
//
// Vectors are GCC's own. GCC 12 takes conversions between widths apart element by element, hence the intrinsics.
#pragma once

#include "common/float16.h"
#include "packhorse.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ph::PH_INSTRUCTION_SET {

#if defined(__AVX512F__)
constexpr uint32_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr uint32_t kVectorBytes = 32;
#else
constexpr uint32_t kVectorBytes = 16;
#endif
constexpr uint32_t kVectorLanes = kVectorBytes / 4;
using Floats = float __attribute__((vector_size(kVectorBytes)));
using Words = uint32_t __attribute__((vector_size(kVectorBytes)));
using Integers = int32_t __attribute__((vector_size(kVectorBytes)));

template <typename Vector>
inline Vector load(const void* source) {
  Vector vector;
  memcpy(&vector, source, sizeof vector);
  return vector;
}

template <typename Vector>
inline void store(void* target, Vector vector) {
  memcpy(target, &vector, sizeof vector);
}

inline Floats splat(float value) { return Floats{} + value; }

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

inline Floats round_lanes(Floats x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (Floats)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  for (uint32_t lane = 0; lane < kVectorLanes; ++lane) x[lane] = __builtin_rintf(x[lane]);
  return x;
#endif
}

// The lanes combined pairwise, always in the same order.
template <typename Combine>
inline float reduce(Floats x, Combine combine) {
  Integers lanes;
  for (uint32_t lane = 0; lane < kVectorLanes; ++lane) lanes[lane] = static_cast<int32_t>(lane);
#pragma GCC unroll 4
  for (int32_t half = kVectorLanes / 2; half > 0; half /= 2) {
    x = combine(x, __builtin_shuffle(x, lanes ^ half));
  }
  return x[0];
}

inline float sum(Floats x) {
  return reduce(x, [](Floats a, Floats b) { return a + b; });
}
inline float largest(Floats x) {
  return reduce(x, [](Floats a, Floats b) { return larger(a, b); });
}
inline float smallest(Floats x) {
  return reduce(x, [](Floats a, Floats b) { return smaller(a, b); });
}

// 2^x to 2e-7, for x <= 0; 0 below 2^-126.
inline Floats exp2(Floats x) {
  const Floats shifted = x + 0x1.8p23f;  // rounds x to an integer, which ends up in the low bits
  const Floats fraction = x - (shifted - 0x1.8p23f);
  Floats power = splat(1.535336188319500e-4f);
  power = power * fraction + 1.339887440266574e-3f;
  power = power * fraction + 9.618437357674640e-3f;
  power = power * fraction + 5.550332471162809e-2f;
  power = power * fraction + 2.402264791363012e-1f;
  power = power * fraction + 6.931472028550421e-1f;
  power = power * fraction + 1.0f;
  const Floats scaled = (Floats)((Words)power + ((Words)shifted << 23));
  return x < -126.0f ? Floats{} : scaled;
}

inline Words words_of_halves(const uint8_t* halves) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
#else
  Words words;
  for (uint32_t lane = 0; lane < kVectorLanes; ++lane) words[lane] = load<uint16_t>(halves + 2 * lane);
  return words;
#endif
}

// Stores integers below 2^16.
inline void store_halves(uint8_t* target, Words words) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtepi32_epi16((__m512i)words));
#elif defined(__AVX2__)
  const __m128i low = _mm256_castsi256_si128((__m256i)words),
                high = _mm256_extracti128_si256((__m256i)words, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm_packus_epi32(low, high));
#else
  for (uint32_t lane = 0; lane < kVectorLanes; ++lane) {
    store(target + 2 * lane, static_cast<uint16_t>(words[lane]));
  }
#endif
}

// Stores integers 0..255 held in floats.
inline void store_codes(uint8_t* target, Floats code) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target),
                   _mm512_cvtepi32_epi8(_mm512_cvttps_epi32((__m512)code)));
#elif defined(__AVX2__)
  const __m256i words = _mm256_cvttps_epi32((__m256)code);
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(target), _mm_packus_epi16(halves, halves));
#else
  for (uint32_t lane = 0; lane < kVectorLanes; ++lane) target[lane] = static_cast<uint8_t>(code[lane]);
#endif
}

struct F16 {
  static Floats read(const uint8_t* source) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif defined(__AVX2__)
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#else
    Floats x;
    for (uint32_t lane = 0; lane < kVectorLanes; ++lane) {
      x[lane] = f16_to_float(load<uint16_t>(source + 2 * lane));
    }
    return x;
#endif
  }
  static void write(uint8_t* target, Floats x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                        _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target),
                     _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
    for (uint32_t lane = 0; lane < kVectorLanes; ++lane) {
      store<uint16_t>(target + 2 * lane, x[lane] == x[lane] ? float_to_f16(x[lane]) : 0x7e00);
    }
#endif
  }
};

struct BF16 {
  static Floats read(const uint8_t* source) { return (Floats)(words_of_halves(source) << 16); }
  static void write(uint8_t* target, Floats x) {
    const Words bits = (Words)x;
    const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Words quiet = bits >> 16 | 0x40;
    store_halves(target, x == x ? rounded : quiet);
  }
};

// Calls `run` with the type that reads and writes `dtype`, one of the 16-bit ones.
template <typename Run>
inline auto with_element(uint32_t dtype, Run run) {
  return dtype == PH_F16 ? run(F16{}) : run(BF16{});
}

}  // namespace ph::PH_INSTRUCTION_SET
