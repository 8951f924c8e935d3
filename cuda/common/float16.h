// Conversions between float32 and the 16-bit formats that round the same way on every backend and compiler.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/portable.h"

namespace ph {

PH_HOST_DEVICE uint32_t float_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
#endif
}

PH_HOST_DEVICE float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, 4);
  return value;
#endif
}

PH_HOST_DEVICE float f16_to_float(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  // Scaling by 2^112 moves the exponent's bias and normalises subnormals; it is exact.
  const float scaled = bits_float(magnitude << 13) * bits_float(0x77800000u);
  const uint32_t bits = magnitude >= 0x7c00u ? (0x7f800000u | (magnitude << 13)) : float_bits(scaled);
  return bits_float(sign | bits);
}

PH_HOST_DEVICE float bf16_to_float(uint16_t value) { return bits_float(static_cast<uint32_t>(value) << 16); }

// Rounds a finite float to nearest even; overflows to infinity.
PH_HOST_DEVICE uint16_t float_to_f16(float value) {
  const uint32_t bits = float_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is subnormal: adding 0.5 rounds at 2^-24, and the fraction is the half's.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const uint32_t half = magnitude < 0x38800000u ? subnormal : (magnitude >= 0x477ff000u ? 0x7c00u : normal);
  return static_cast<uint16_t>(sign | half);
}

// Rounds a finite float to nearest even.
PH_HOST_DEVICE uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace ph
