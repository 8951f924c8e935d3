// What both backends know of a ph_kv_codec: its derived sizes, its groups and the arithmetic of scales.
// The maths stands in packhorse.h.
#pragma once

#include <cmath>

#include "common/float16.h"
#include "packhorse.h"

namespace ph::kv {

constexpr uint32_t kBlockTokens = 64;
constexpr uint32_t kGroupChannels = 64;  // channels of a kivi value group
constexpr uint32_t kParts = 2;

// A validated codec with derived sizes. Trivially copyable: kernels take it by value.
struct Codec : ph_kv_codec {
  uint32_t channels;        // heads * head_dim
  uint32_t rows_per_head;   // packs along the tokens: 64 / pack
  uint32_t rows;            // heads * rows_per_head
  uint32_t element_bytes;   // of dtype
  uint32_t groups[kParts];  // scale groups per block of keys, of values
  uint32_t code_limit[kParts];
  float rel[kParts];
  uint32_t value_groups_per_row;  // kivi: ceil(head_dim / 64)
  uint64_t blocks;
};

// Throws ph::Error for a value outside its range.
Codec make_codec(const ph_kv_codec& codec);

PH_HOST_DEVICE uint32_t round_up(uint32_t value, uint32_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Index of the group that a value belongs to, in the order of packhorse.h.
PH_HOST_DEVICE uint32_t group_index(const Codec& codec, uint32_t part, uint32_t head, uint32_t token,
                                    uint32_t channel) {
  if (codec.quantizer == PH_KV_PACKKV) {
    return codec.grouping == PH_KV_PER_TOKEN ? token : head * kBlockTokens + token;
  }
  if (part == PH_KV_KEYS) return head * codec.head_dim + channel;
  return (head * kBlockTokens + token) * codec.value_groups_per_row + channel / kGroupChannels;
}

PH_HOST_DEVICE bool per_channel(const Codec& codec, uint32_t part) {
  return codec.quantizer == PH_KV_KIVI && part == PH_KV_KEYS;
}

// Bits of a value: 0 for 0, 8 for 255.
PH_HOST_DEVICE uint32_t bit_width(uint32_t value) {
#if defined(__CUDA_ARCH__)
  return 32 - __clz(static_cast<int>(value));
#else
  return value == 0 ? 0 : 32 - static_cast<uint32_t>(__builtin_clz(value));
#endif
}

// A scale as stored: bits of the codec's dtype.
PH_HOST_DEVICE uint32_t scale_bits(uint32_t dtype, float scale) {
  if (dtype == PH_F16) return float_to_f16(scale);
  if (dtype == PH_BF16) return float_to_bf16(scale);
  return float_bits(scale);
}

PH_HOST_DEVICE float scale_from_bits(uint32_t dtype, uint32_t bits) {
  if (dtype == PH_F16) return f16_to_float(static_cast<uint16_t>(bits));
  if (dtype == PH_BF16) return bf16_to_float(static_cast<uint16_t>(bits));
  return bits_float(bits);
}

// Rounds a positive float to a value of dtype (`up`: never below it), within [smallest positive, largest
// finite].
PH_HOST_DEVICE float store_scale(uint32_t dtype, float scale, bool up) {
  const uint32_t largest = dtype == PH_F16 ? 0x7bffu : dtype == PH_BF16 ? 0x7f7fu : 0x7f7fffffu;
  uint32_t bits = scale_bits(dtype, scale);
  if (up && bits < largest && scale_from_bits(dtype, bits) < scale) ++bits;
  if (bits < 1) bits = 1;
  if (bits > largest) bits = largest;
  return scale_from_bits(dtype, bits);
}

struct Affine {
  float scale;
  float zero;  // an integer, exact in float32
};

#if defined(__CUDA_ARCH__)
PH_HOST_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
PH_HOST_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
PH_HOST_DEVICE float round_even(float a) { return rintf(a); }
#else
PH_HOST_DEVICE float divide(float a, float b) { return a / b; }
PH_HOST_DEVICE float multiply(float a, float b) { return a * b; }
PH_HOST_DEVICE float round_even(float a) { return __builtin_rintf(a); }
#endif

// Scale and zero point of a finite group (packhorse.h, step 1).
PH_HOST_DEVICE Affine group_affine(const Codec& codec, uint32_t part, float minimum, float maximum) {
  if (minimum == maximum) {
    if (minimum == 0.0f) return {1.0f, 0.0f};
    return {minimum < 0.0f ? -minimum : minimum, minimum < 0.0f ? -1.0f : 1.0f};
  }
  const bool kivi = codec.quantizer == PH_KV_KIVI;
  const float range = maximum - minimum;
  const float wanted =
      kivi ? divide(range, static_cast<float>(codec.code_limit[part])) : multiply(range, codec.rel[part]);
  float scale = store_scale(codec.dtype, wanted, kivi);
  if (multiply(static_cast<float>(codec.code_limit[part]), scale) < range) {
    scale = scale_from_bits(codec.dtype, scale_bits(codec.dtype, scale) + 1);
  }
  if (codec.dtype == PH_F32) {
    const float largest = -minimum > maximum ? -minimum : maximum;
    const float least = multiply(largest, 0x1p-23f);
    if (scale < least) scale = least;
  }
  return {scale, round_even(divide(minimum, scale))};
}

// Whether a group with these extremes can be quantised; NaNs must have been folded into `finite`.
PH_HOST_DEVICE bool group_finite(float minimum, float maximum) {
  return maximum - minimum <= 3.4028234663852886e38f;  // false for infinities and for an overflow
}

PH_HOST_DEVICE float quantize_value(float x, Affine affine, float limit) {
  const float code = round_even(divide(x, affine.scale)) - affine.zero;
  const float low = code < 0.0f ? 0.0f : code;
  return low > limit ? limit : low;
}

// Bytes that hold a zero point: 1, 2 or 4.
PH_HOST_DEVICE uint32_t zero_point_bytes(int32_t zero) {
  if (zero >= -128 && zero <= 127) return 1;
  if (zero >= -32768 && zero <= 32767) return 2;
  return 4;
}

// Where a non-finite group is, ordered by token, then head, then part. The head of a group over all heads is the
// lowest one that holds a non-finite value.
PH_HOST_DEVICE uint64_t non_finite_place(uint64_t token, uint32_t head, uint32_t part) {
  return token << 24 | static_cast<uint64_t>(head) << 8 | part;
}

}  // namespace ph::kv
