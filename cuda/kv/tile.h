// The "tiles" layout: a block of 64 tokens as the attention kernels read it, unpacked in registers.
//
// A block is one params record, shared by the kv heads, and one record per kv head, all multiples of 16 bytes. How its
// keys and its values are packed are independent of each other: packkv and fixed share a scale among the values of a
// token, over all kv heads; kivi has scales of its own in every head's record; raw16 keeps the 16-bit values.
//
// Params (kParamsBytes), unless neither part is packkv or fixed: per part, keys then values: scale[64], a value of the
// cache's dtype, and zero[64], int16; zeros for a part that is kivi or raw16. Then the largest of the value scales as
// f32, and zeros. x' = (code + zero) * scale, scale and zero of its token.
//
// Head record:
//      0  u32 key widths     4 bits per group of 32 channels, the first group lowest; 0 for raw16
//      4  u32 value widths
//      8  u64 zero
//     16  key bases          packkv: per channel the smallest code of the block, base_bits (4 or 8) each, see
//                            base_place. kivi: scale[n] as in params, then zero[n]; n is group_scales: of keys, one per
//                            channel; of values, [head_dim / 64 rounded up][64 tokens]. fixed, raw16: nothing
//         value bases
//         key groups         kGroupBytes * width bytes each, in order; nothing for raw16
//         value groups
//         raw keys           raw16: kRawChannelBytes * head_dim, see raw_position
//         raw values
// code = base + residual, or fixed, kivi: code = residual; the residuals of a group of 32 channels x 64 tokens have the
// group's width, 0 to 8 bits.
//
// A group's residuals are in the order of the A fragments of mma.m16n8k32 (PTX ISA, "Matrix Fragments for mma.m16n8k32"
// for .u8): a lane holds 64 of them, as sixteen registers of four bytes. Register (s, j), s and j in 0..3, byte b of lane
// 4 * g + i is
//      keys:    token 8g + 4(s / 2) + j,                     channel 16(s % 2) + 4i + b of the group
//      values:  token 16i + 8(s / 2) + 4(s % 2) + b,         channel 8j + g of the group
// Two registers share a word N[2s + j % 2]: in each byte the low nibble is that of j / 2 = 0, the high one of j / 2 = 1.
// So a register is one AND away from its word, and carries its value shifted left by 4 (j / 2), which depends on the row
// of the matrix alone and is undone exactly by a factor of the row after the product. Widths up to 4 are 2 * width words
// of each lane:
//      4:  words 0..7 are N[0..7]
//      3:  words 0..5 are N[0..5]; the free bits 3 and 7 of words 0..2 are bits 0..2 of N[6]'s nibbles, of 3..5 N[7]'s
//      2:  word x is N[2x] | N[2x + 1] << 2
//      1:  word x is N[4x] | N[4x + 1] << 1 | N[4x + 2] << 2 | N[4x + 3] << 3
// Widths above 4 are a group of width 4 with the low nibbles, then one of width - 4 with the rest.
// The words of a lane lie at 512 * (x / 4) + 16 * lane + 4 * (x % 4), the last two of widths 1 and 3 at
// 512 * (x / 4) + 8 * lane + 4 * (x % 4).
//
// Raw values are in the order of the A fragments of mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16 with
// floating point type"), four for every 16 channels, one after another: 16 bytes of each lane, registers r in 0..3 of two
// values. Value h of register r of fragment f, lane 4 * g + i, is
//      keys:    token 8g + 2f + r % 2,                 channel 4i + 2(r / 2) + h of the 16
//      values:  token 16i + 4f + 2(r / 2) + h,         channel 8(r % 2) + g
#pragma once

#include "kv/codec.h"

namespace ph::kv {

constexpr uint32_t kTileChannels = 32;                              // channels of a group
constexpr uint32_t kGroupBytes = kBlockTokens * kTileChannels / 8;  // of a group, per bit of width
constexpr uint32_t kLanes = 32;
constexpr uint32_t kParamsBytes = 2 * kBlockTokens * (2 + 2) + 16;
constexpr uint32_t kTileHeaderBytes = 16;
constexpr int32_t kLargestZero = 32767;  // zero points are 16-bit here: see tile_affine
constexpr uint32_t kMostHalvings = 14;   // of the scale of equal values: see tile_affine

// Where a token's parameters lie in a params record.
PH_HOST_DEVICE uint32_t scale_position(uint32_t part, uint32_t token) { return 256 * part + 2 * token; }
PH_HOST_DEVICE uint32_t zero_position(uint32_t part, uint32_t token) { return 256 * part + 128 + 2 * token; }
constexpr uint32_t kLargestScalePosition = 512;

// How a part of a layer is packed. Of raw16, all but the quantizer is 0.
struct TilePart {
  uint32_t code_limit;  // largest code
  uint32_t base_bits;   // packkv: 4 where code_limit <= 15 and head_dim % 64 == 0, else 8. 0: no bases
  uint32_t width;       // of every group; 0: each group's own
  float rel;            // scale = range * rel, or 0: scale = range / code_limit, rounded up
  uint32_t quantizer;   // ph_kv_cache_quantizer
};

PH_HOST_DEVICE bool is_raw16(const TilePart& part) { return part.quantizer == PH_KV_CACHE_RAW16; }
PH_HOST_DEVICE bool is_kivi(const TilePart& part) { return part.quantizer == PH_KV_CACHE_KIVI; }
// Whether its scales are its tokens', in params.
PH_HOST_DEVICE bool is_per_token(const TilePart& part) { return !is_raw16(part) && !is_kivi(part); }

// The shape of a layer's records.
struct TileShape {
  uint32_t heads;     // kv heads
  uint32_t head_dim;  // a multiple of 32
  uint32_t dtype;     // PH_F16 or PH_BF16
  TilePart parts[kParts];
};

PH_HOST_DEVICE uint32_t tile_groups(const TileShape& shape) { return shape.head_dim / kTileChannels; }

// Scales of a part: a block's, or kivi: a head record's.
PH_HOST_DEVICE uint32_t group_scales(const TileShape& shape, uint32_t part) {
  if (is_raw16(shape.parts[part])) return 0;
  if (!is_kivi(shape.parts[part])) return kBlockTokens;
  return part == PH_KV_KEYS ? shape.head_dim
                            : round_up(shape.head_dim, kGroupChannels) / kGroupChannels * kBlockTokens;
}

// Which of them is a value's.
PH_HOST_DEVICE uint32_t scale_index(const TileShape& shape, uint32_t part, uint32_t token, uint32_t channel) {
  if (!is_kivi(shape.parts[part])) return token;
  return part == PH_KV_KEYS ? channel : channel / kGroupChannels * kBlockTokens + token;
}

constexpr uint32_t kMostScales = 256;  // of a part, whatever its shape

// Bytes of a block's params.
PH_HOST_DEVICE uint32_t params_bytes(const TileShape& shape) {
  return is_per_token(shape.parts[0]) || is_per_token(shape.parts[1]) ? kParamsBytes : 0;
}

// Bytes of a part's bases, or of what stands in their place.
PH_HOST_DEVICE uint32_t base_bytes(const TileShape& shape, uint32_t part) {
  if (is_kivi(shape.parts[part])) return 4 * group_scales(shape, part);
  return shape.head_dim * shape.parts[part].base_bits / 8;
}

// First byte of a part's bases in a head record, and of the key groups (part 2).
PH_HOST_DEVICE uint32_t bases_position(const TileShape& shape, uint32_t part) {
  uint32_t position = kTileHeaderBytes;
  for (uint32_t before = 0; before < part; ++before) position += base_bytes(shape, before);
  return position;
}

// Sum of the widths in a header word.
PH_HOST_DEVICE uint32_t width_sum(uint32_t widths) {
  const uint32_t pairs = (widths & 0x0f0f0f0fu) + (widths >> 4 & 0x0f0f0f0fu);
  return pairs * 0x01010101u >> 24;
}

// Bytes of a part's 16-bit values.
constexpr uint32_t kRawChannelBytes = 2 * kBlockTokens;
PH_HOST_DEVICE uint32_t raw_bytes(const TileShape& shape, uint32_t part) {
  return is_raw16(shape.parts[part]) ? kRawChannelBytes * shape.head_dim : 0;
}
PH_HOST_DEVICE uint32_t raw_bytes(const TileShape& shape) {
  return raw_bytes(shape, PH_KV_KEYS) + raw_bytes(shape, PH_KV_VALUES);
}

PH_HOST_DEVICE uint32_t head_record_bytes(const TileShape& shape, uint32_t key_widths,
                                          uint32_t value_widths) {
  return bases_position(shape, kParts) + kGroupBytes * (width_sum(key_widths) + width_sum(value_widths)) +
         raw_bytes(shape);
}

// First byte of a part's 16-bit values in a head record of `record_bytes`.
PH_HOST_DEVICE uint32_t raw_begin(const TileShape& shape, uint32_t part, uint32_t record_bytes) {
  return record_bytes - raw_bytes(shape, PH_KV_VALUES) -
         (part == PH_KV_KEYS ? raw_bytes(shape, PH_KV_KEYS) : 0);
}

// Where a value lies among those of its part. Fragments begin at kFragmentBytes each.
constexpr uint32_t kFragmentBytes = 16 * kLanes;
constexpr uint32_t kFragmentChannels = 16;  // of four fragments
PH_HOST_DEVICE uint32_t raw_position(uint32_t part, uint32_t token, uint32_t channel) {
  const uint32_t four = channel / kFragmentChannels, c = channel % kFragmentChannels;
  const bool keys = part == PH_KV_KEYS;
  const uint32_t fragment = keys ? token % 8 / 2 : token % 16 / 4;
  const uint32_t lane = keys ? 4 * (token / 8) + c / 4 : 4 * (c % 8) + token / 16;
  const uint32_t reg = keys ? token % 2 + 2 * (c % 4 / 2) : c / 8 + 2 * (token % 4 / 2);
  const uint32_t half = keys ? c % 2 : token % 2;
  return kFragmentBytes * (4 * four + fragment) + 16 * lane + 4 * reg + 2 * half;
}

// The widest residual that a part can have.
PH_HOST_DEVICE uint32_t largest_width(const TilePart& part) {
  return part.width > 0 ? part.width : bit_width(part.code_limit);
}

PH_HOST_DEVICE uint32_t largest_record_bytes(const TileShape& shape) {
  return bases_position(shape, kParts) +
         kGroupBytes * tile_groups(shape) * (largest_width(shape.parts[0]) + largest_width(shape.parts[1])) +
         raw_bytes(shape);
}

// Where a channel's base lies among those of its part, which has some. Bases form words of four, in the order in which the
// kernels' lanes read them: keys [i][channel / 16], i = channel / 4 % 4, byte channel % 4; values [g][channel / 32],
// g = channel % 8, byte channel / 8 % 4. Of 4 bits, two words share one: the even in the low nibbles, the odd in the high
// ones.
struct BasePlace {
  uint32_t byte, shift;
};

PH_HOST_DEVICE BasePlace base_place(const TileShape& shape, uint32_t part, uint32_t channel) {
  const uint32_t word = part == PH_KV_KEYS ? channel / 4 % 4 * (shape.head_dim / 16) + channel / 16
                                           : channel % 8 * (shape.head_dim / 32) + channel / 32;
  const uint32_t byte = part == PH_KV_KEYS ? channel % 4 : channel / 8 % 4;
  if (shape.parts[part].base_bits == 8) return {4 * word + byte, 0};
  return {4 * (word / 2) + byte, 4 * (word % 2)};
}

// Lane, register (4 * s + j) and byte of a residual within its group.
struct TilePlace {
  uint32_t lane, s, j, byte;
};

PH_HOST_DEVICE TilePlace tile_place(uint32_t part, uint32_t token, uint32_t channel) {
  if (part == PH_KV_KEYS) {
    return {4 * (token / 8) + channel / 4 % 4, 2 * (token / 4 % 2) + channel / 16, token % 4, channel % 4};
  }
  return {4 * (channel % 8) + token / 16, 2 * (token / 8 % 2) + token / 4 % 2, channel / 8, token % 4};
}

// Byte of word x of a lane within a group (or half of a wide group) of `width` 1 to 4.
PH_HOST_DEVICE uint32_t word_position(uint32_t width, uint32_t lane, uint32_t x) {
  const bool narrow = width % 2 == 1 && x / 4 == width / 2;
  return 512 * (x / 4) + (narrow ? 8 : 16) * lane + 4 * (x % 4);
}

// The 2 * width words of a lane, from its eight nibble words N. width 1 to 4.
PH_HOST_DEVICE void pack_words(uint32_t width, const uint32_t* nibbles, uint32_t* words) {
  if (width == 4) {
    for (int x = 0; x < 8; ++x) words[x] = nibbles[x];
  } else if (width == 3) {
    for (int x = 0; x < 6; ++x) {
      words[x] = nibbles[x] | (nibbles[6 + x / 3] >> x % 3 & 0x11111111u) << 3;
    }
  } else if (width == 2) {
    for (int x = 0; x < 4; ++x) words[x] = nibbles[2 * x] | nibbles[2 * x + 1] << 2;
  } else {
    for (int x = 0; x < 2; ++x) {
      words[x] = nibbles[4 * x] | nibbles[4 * x + 1] << 1 | nibbles[4 * x + 2] << 2 | nibbles[4 * x + 3] << 3;
    }
  }
}

// And back. Word: uint32_t, or a vector of them, of several lanes.
template <typename Word>
PH_HOST_DEVICE void unpack_words(uint32_t width, const Word* words, Word* nibbles) {
  if (width == 4) {
    for (int x = 0; x < 8; ++x) nibbles[x] = words[x];
  } else if (width == 3) {
    for (int x = 0; x < 6; ++x) nibbles[x] = words[x] & 0x77777777u;
    for (int x = 0; x < 2; ++x) {
      nibbles[6 + x] = (words[3 * x] >> 3 & 0x11111111u) | (words[3 * x + 1] >> 2 & 0x22222222u) |
                       (words[3 * x + 2] >> 1 & 0x44444444u);
    }
  } else if (width == 2) {
    for (int x = 0; x < 8; ++x) nibbles[x] = words[x / 2] >> 2 * (x % 2) & 0x33333333u;
  } else {
    for (int x = 0; x < 8; ++x) nibbles[x] = words[x / 4] >> x % 4 & 0x11111111u;
  }
}

// Scale and zero point of the values that share them: of a token and part, all heads and channels; or kivi's. As
// group_affine (packhorse.h, step 1), but for two things.
// Zero points have 16 bits here: a scale that is too small for its own is raised until it fits. That happens only where
// the scale is below 2^-15 of the values, far below their own rounding.
// Equal values, whose codes are 0, get the smallest scale that is exact. Attention's fixed-point numbers are relative to
// the largest product with a scale, which should be one whose codes count.
PH_HOST_DEVICE Affine tile_affine(const TileShape& shape, uint32_t part, float minimum, float maximum) {
  if (minimum == maximum) {
    if (minimum == 0.0f) return {store_scale(shape.dtype, 0.0f, false), 0.0f};
    Affine equal = {minimum < 0.0f ? -minimum : minimum, minimum < 0.0f ? -1.0f : 1.0f};
    for (uint32_t halvings = 0; halvings < kMostHalvings; ++halvings) {
      const float half = multiply(equal.scale, 0.5f);
      if (scale_from_bits(shape.dtype, scale_bits(shape.dtype, half)) != half) break;
      equal = {half, multiply(equal.zero, 2.0f)};
    }
    return equal;
  }
  const TilePart& codec = shape.parts[part];
  const float range = maximum - minimum;
  const float limit = static_cast<float>(codec.code_limit);
  const bool exact_limit = codec.rel == 0.0f;
  float scale =
      store_scale(shape.dtype, exact_limit ? divide(range, limit) : multiply(range, codec.rel), exact_limit);
  const float magnitude = minimum < 0.0f ? -minimum : minimum;
  if (multiply(limit, scale) < range) {
    // Of one bit, the next value may be infinite: store_scale takes it back to the largest.
    scale = store_scale(shape.dtype, scale_from_bits(shape.dtype, scale_bits(shape.dtype, scale) + 1), false);
  }
  const float least = divide(magnitude, static_cast<float>(kLargestZero));
  if (scale < least) scale = store_scale(shape.dtype, least, true);
  return {scale, round_even(divide(minimum, scale))};
}

}  // namespace ph::kv
