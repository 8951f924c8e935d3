// Products of codes, a byte each, with factors in fixed point, a query's channels or a chunk's probabilities: four at a
// time per 32-bit lane, exact in 32 bits. For sources that are compiled once per instruction set, like vector_cpu.h.
//
// A factor is an integer of at most kLargestFactor, which leaves 16-bit rounding as the only error. Four of them, for the
// four codes of a quad, are a pair of words, in one of two forms:
//   with vpdpbusd:  their high bytes, then their low ones; both signed: factor = 256 * high + low
//   else:           the first and the third as 16-bit halves, then the second and the fourth
// Eight pairs in a row are stored as the first words of all, then the second ones: see factor_place.
#pragma once

#include "common/vector_cpu.h"

namespace ph::PH_INSTRUCTION_SET {

// 127 * 256 + 127; and 255 * 256 channels times it stay below 2^31.
constexpr int32_t kLargestFactor = 32639;

constexpr uint32_t kFactorRun = 8;
// Where the first word of pair `pair` is; the second one is kFactorRun further.
constexpr uint32_t factor_place(uint32_t pair) {
  return pair / kFactorRun * 2 * kFactorRun + pair % kFactorRun;
}

using WordRun = uint32_t __attribute__((vector_size(4 * kFactorRun)));

// Stores eight pairs, given the first and third factors as halves of `even`, the others of `odd`.
inline void store_factors(uint32_t* target, WordRun even, WordRun odd) {
#if defined(__AVX512VNNI__)
  using HalfRun = uint16_t __attribute__((vector_size(sizeof(WordRun))));
  constexpr uint32_t kLow = 0x00ff00ff, kHigh = 0xff00ff00;
  const WordRun even_high = (WordRun)((HalfRun)even + 128), odd_high = (WordRun)((HalfRun)odd + 128);
  store(target, (even_high >> 8 & kLow) | (odd_high & kHigh));
  store(target + kFactorRun, (even & kLow) | (odd << 8 & kHigh));
#else
  store(target, even);
  store(target + kFactorRun, odd);
#endif
}

// The nearest integers to floats of a magnitude up to 2^22.
inline Integers fixed_point(Floats x) {
  const Floats shifted = x + 0x1.8p23f;  // the integer ends up in the low bits
  return (Integers)shifted - (Integers)splat(0x1.8p23f);
}

// The codes of a quad in each lane, as the products take them.
struct Quads {
#if defined(__AVX512VNNI__)
  Words bytes;
  explicit Quads(Words codes) : bytes(codes) {}
#else
  Words even, odd;
  explicit Quads(Words codes) : even(codes & 0x00ff00ff), odd(codes >> 8 & 0x00ff00ff) {}
#endif
};

inline Words multiply_halves(Words a, Words b) {
#if defined(__AVX512BW__)
  return (Words)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Words)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Words)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  const auto low = [](Words x) { return (Integers)(x << 16) >> 16; };
  return (Words)(low(a) * low(b) + ((Integers)a >> 16) * ((Integers)b >> 16));
#endif
}

// Sums of products, one per lane.
struct Sums {
#if defined(__AVX512VNNI__)
  Words high = {}, low = {};
  void add(const Quads& quads, const uint32_t* pair) {
    high = (Words)_mm512_dpbusd_epi32((__m512i)high, (__m512i)quads.bytes,
                                      _mm512_set1_epi32(static_cast<int32_t>(pair[0])));
    low = (Words)_mm512_dpbusd_epi32((__m512i)low, (__m512i)quads.bytes,
                                     _mm512_set1_epi32(static_cast<int32_t>(pair[kFactorRun])));
  }
  Integers value() const { return (Integers)((high << 8) + low); }
#else
  Words sum = {};
  void add(const Quads& quads, const uint32_t* pair) {
    sum += multiply_halves(quads.even, Words{} + pair[0]) +
           multiply_halves(quads.odd, Words{} + pair[kFactorRun]);
  }
  Integers value() const { return (Integers)sum; }
#endif
};

}  // namespace ph::PH_INSTRUCTION_SET
