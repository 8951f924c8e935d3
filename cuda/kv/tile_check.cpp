#include "kv/tile_check.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace ph::kv {

namespace {

constexpr uint32_t kMostGroups = 8;  // of a part: a header word has no room for more

bool all_zero(const uint8_t* bytes, uint32_t count) {
  return std::all_of(bytes, bytes + count, [](uint8_t byte) { return byte == 0; });
}

uint32_t read_word(const uint8_t* bytes) {
  uint32_t word;
  memcpy(&word, bytes, sizeof word);
  return word;
}

// A scale and its zero point.
const char* affine_flaw(const TileShape& shape, const uint8_t* scale, const uint8_t* zero, float& value) {
  uint16_t bits;
  int16_t point;
  memcpy(&bits, scale, sizeof bits);
  memcpy(&point, zero, sizeof point);
  value = scale_from_bits(shape.dtype, bits);
  if (!(value > 0.0f && std::isfinite(value))) return "a scale is not positive and finite";
  return point < -kLargestZero ? "a zero point is out of range" : nullptr;
}

const char* params_flaw(const TileShape& shape, const uint8_t* params) {
  float largest = 0.0f;
  for (uint32_t part = 0; part < kParts; ++part) {
    if (!is_per_token(shape.parts[part])) {
      if (!all_zero(params + scale_position(part, 0), scale_position(1, 0)))
        return "it has scales of tokens that its codec has not";
      continue;
    }
    for (uint32_t token = 0; token < kBlockTokens; ++token) {
      float scale;
      const char* flaw = affine_flaw(shape, params + scale_position(part, token),
                                     params + zero_position(part, token), scale);
      if (flaw != nullptr) return flaw;
      if (part == PH_KV_VALUES) largest = std::max(largest, scale);
    }
  }
  if (read_word(params + kLargestScalePosition) != float_bits(largest))
    return "its largest scale is not that of its tokens";
  constexpr uint32_t kEnd = kLargestScalePosition + sizeof(float);
  return all_zero(params + kEnd, kParamsBytes - kEnd) ? nullptr : "the padding of its parameters is not zero";
}

// The scales and zero points of a kivi part; its codes can be any.
const char* groups_flaw(const TileShape& shape, uint32_t part, const uint8_t* bases) {
  const uint32_t count = group_scales(shape, part);
  for (uint32_t i = 0; i < count; ++i) {
    float scale;
    const char* flaw = affine_flaw(shape, bases + 2 * i, bases + 2 * (count + i), scale);
    if (flaw != nullptr) return flaw;
  }
  return nullptr;
}

// The widths in a header word of a part.
const char* widths_flaw(const TileShape& shape, uint32_t part, uint32_t widths) {
  const TilePart& codec = shape.parts[part];
  for (uint32_t group = 0; group < kMostGroups; ++group) {
    const uint32_t width = widths >> 4 * group & 15;
    if (group >= tile_groups(shape)) {
      if (width != 0) return "it gives a width to a group that it does not have";
    } else if (width > largest_width(codec)) {
      return "a group is wider than the codec allows";
    } else if (codec.width > 0 && width != codec.width) {
      return "a group has not the codec's width";
    }
  }
  return nullptr;
}

using Words = uint32_t __attribute__((vector_size(16)));  // of the lanes 4 * g to 4 * g + 3
using Bytes = uint8_t __attribute__((vector_size(16)));

// The nibble words N of four lanes of a group of width 1 to 4.
void unpack_lanes(uint32_t width, const uint8_t* source, uint32_t g, Words nibbles[8]) {
  Words words[8];
  for (uint32_t x = 0; x < 2 * width; ++x) {
    for (uint32_t i = 0; i < 4; ++i) words[x][i] = read_word(source + word_position(width, 4 * g + i, x));
  }
  unpack_words(width, words, nibbles);
}

// The largest residual of each channel of a group of width 1 to 8.
void largest_residuals(uint32_t part, uint32_t width, const uint8_t* source, uint8_t* largest) {
  const auto raise = [](Bytes& most, Words residuals) {
    const Bytes bytes = reinterpret_cast<Bytes>(residuals);
    most = bytes > most ? bytes : most;
  };
  Bytes of_keys[2] = {};  // of channels 16 * h + byte
  for (uint32_t g = 0; g < 8; ++g) {
    Words low[8], high[8] = {};
    unpack_lanes(std::min(width, 4u), source, g, low);
    if (width > 4) unpack_lanes(width - 4, source + kGroupBytes * 4, g, high);
    Bytes of_values[4] = {};  // of channel 8 * j + g, in every byte
    for (uint32_t n = 0; n < 8; ++n) {
      for (uint32_t half = 0; half < 2; ++half) {
        const Words residuals = (low[n] >> 4 * half & 0x0f0f0f0fu) | (high[n] >> 4 * half & 0x0f0f0f0fu) << 4;
        raise(part == PH_KV_KEYS ? of_keys[n / 2 % 2] : of_values[n % 2 + 2 * half], residuals);
      }
    }
    for (uint32_t j = 0; j < 4 && part == PH_KV_VALUES; ++j) {
      for (uint32_t byte = 0; byte < 16; ++byte)
        largest[8 * j + g] = std::max<uint8_t>(largest[8 * j + g], of_values[j][byte]);
    }
  }
  if (part == PH_KV_KEYS) memcpy(largest, of_keys, sizeof of_keys);
}

// The codes of a part whose bases and groups lie at these places.
const char* codes_flaw(const TileShape& shape, uint32_t part, uint32_t widths, const uint8_t* bases,
                       const uint8_t* groups) {
  const TilePart& codec = shape.parts[part];
  for (uint32_t group = 0; group < tile_groups(shape); ++group) {
    const uint32_t width = widths >> 4 * group & 15;
    uint8_t largest[kTileChannels] = {};
    if (width > 0) largest_residuals(part, width, groups, largest);
    groups += kGroupBytes * width;
    for (uint32_t channel = 0; channel < kTileChannels; ++channel) {
      uint32_t base = 0;
      if (codec.base_bits > 0) {
        const BasePlace place = base_place(shape, part, kTileChannels * group + channel);
        base = bases[place.byte] >> place.shift & ((1u << codec.base_bits) - 1);
      }
      if (base + largest[channel] > codec.code_limit) return "a code is larger than the codec's largest";
    }
  }
  return nullptr;
}

// A head's record, of which `available` bytes are there; its size goes to `bytes`.
const char* record_flaw(const TileShape& shape, const uint8_t* record, uint64_t available, uint32_t& bytes) {
  if (available < bases_position(shape, kParts)) return "its record is cut off";
  uint32_t widths[kParts];
  memcpy(widths, record, sizeof widths);
  for (uint32_t part = 0; part < kParts; ++part) {
    if (const char* flaw = widths_flaw(shape, part, widths[part])) return flaw;
  }
  if (!all_zero(record + sizeof widths, kTileHeaderBytes - sizeof widths))
    return "the padding of its header is not zero";
  bytes = head_record_bytes(shape, widths[PH_KV_KEYS], widths[PH_KV_VALUES]);
  if (available < bytes) return "its record is cut off";
  uint32_t groups = bases_position(shape, kParts);
  for (uint32_t part = 0; part < kParts; ++part) {
    if (is_raw16(shape.parts[part])) continue;  // any bits are values
    const uint8_t* bases = record + bases_position(shape, part);
    const char* flaw = is_kivi(shape.parts[part])
                           ? groups_flaw(shape, part, bases)
                           : codes_flaw(shape, part, widths[part], bases, record + groups);
    if (flaw != nullptr) return flaw;
    groups += kGroupBytes * width_sum(widths[part]);
  }
  return nullptr;
}

}  // namespace

BlockFlaw check_block(const TileShape& shape, const uint8_t* block, uint64_t bytes, uint32_t* record_ends) {
  uint32_t position = params_bytes(shape);
  if (bytes < position) return {"it is cut off", kNoHead};
  if (position > 0) {
    if (const char* flaw = params_flaw(shape, block)) return {flaw, kNoHead};
  }
  for (uint32_t head = 0; head < shape.heads; ++head) {
    uint32_t record_bytes = 0;
    if (const char* flaw = record_flaw(shape, block + position, bytes - position, record_bytes))
      return {flaw, head};
    record_ends[head] = position += record_bytes;
  }
  if (position != bytes) return {"it is longer than its records", kNoHead};
  return {nullptr, kNoHead};
}

}  // namespace ph::kv
