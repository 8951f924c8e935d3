// The work on tiles (tile.h) on one CPU core. tile_cpu.cpp is compiled once per instruction set, and every compilation
// fills a table like this one; the results are the same to the bit.
#pragma once

#include "kv/cache.h"

namespace ph::kv {

constexpr uint32_t kMostHeadDim = 256;
constexpr uint32_t kMostTileCodes = kBlockTokens * kMostHeadDim;
// Of a head record, whatever its shape.
constexpr uint32_t kMostRecordBytes = kTileHeaderBytes + kParts * kRawChannelBytes * kMostHeadDim;

// Extremes of a token's values of one part, with 0 in place of those that are not finite.
struct TokenExtremes {
  float minimum, maximum;
  bool finite;
};

// Unpacked codes are quads, so that a vector holds four codes in a row of what a product sums over for each of its lanes:
//   keys    [channel / 4][key_column(token)][channel % 4]
//   values  [token / 4][channel][token % 4]
// The keys' tokens are in the order in which the fragments' lanes have them.
PH_HOST_DEVICE uint32_t key_column(uint32_t token) { return 8 * (token % 8) + token / 8; }

PH_HOST_DEVICE uint32_t quad_position(const TileShape& shape, uint32_t part, uint32_t token,
                                      uint32_t channel) {
  if (part == PH_KV_KEYS) return (channel / 4 * kBlockTokens + key_column(token)) * 4 + channel % 4;
  return (token / 4 * shape.head_dim + channel) * 4 + token % 4;
}

struct TileKernels {
  const char* instruction_set;

  // `values` is a multiple of 32.
  TokenExtremes (*extremes)(uint32_t dtype, const uint8_t* x, uint32_t values);

  // Of kivi: scales and zero points of one head of a block's tokens, whose values are at rows[token], by scale_index.
  void (*group_affines)(const TileShape& shape, uint32_t part, const uint8_t* const* rows, Affine* affines);

  // Codes [64, head_dim], from scales and zero points by scale_index.
  void (*quantize)(const TileShape& shape, uint32_t part, const uint8_t* const* rows, const Affine* affines,
                   uint8_t* codes);

  // Writes the bases and groups of a part and returns its widths. Spoils the codes [64, head_dim].
  uint32_t (*pack)(const TileShape& shape, uint32_t part, uint8_t* codes, uint8_t* bases, uint8_t* groups);

  // Writes a part's codes (not residuals) as quads.
  void (*unpack)(const TileShape& shape, uint32_t part, uint32_t widths, const uint8_t* bases,
                 const uint8_t* groups, uint8_t* quads);

  // Of raw16: between a record's values and 16-bit values of tokens at rows[token].
  void (*pack_raw)(const TileShape& shape, uint32_t part, const uint8_t* const* rows, uint8_t* raw);
  // Writes keys as [head_dim][key_column(token)], values as [64][head_dim].
  void (*unpack_raw)(const TileShape& shape, uint32_t part, const uint8_t* raw, uint8_t* target);
};

// That of the instruction set that block_kernels chose.
const TileKernels& tile_kernels();

// Scale and zero point of a token, from its block's params.
inline Affine stored_affine(const TileShape& shape, uint32_t part, const uint8_t* params, uint32_t token) {
  uint16_t scale;
  int16_t zero;
  memcpy(&scale, params + scale_position(part, token), sizeof scale);
  memcpy(&zero, params + zero_position(part, token), sizeof zero);
  return {scale_from_bits(shape.dtype, scale), static_cast<float>(zero)};
}

// The same of kivi, from a head's record: `bases` are the part's, `index` is a scale_index.
inline Affine stored_group_affine(const TileShape& shape, uint32_t part, const uint8_t* bases,
                                  uint32_t index) {
  uint16_t scale;
  int16_t zero;
  memcpy(&scale, bases + 2 * index, sizeof scale);
  memcpy(&zero, bases + 2 * (group_scales(shape, part) + index), sizeof zero);
  return {scale_from_bits(shape.dtype, scale), static_cast<float>(zero)};
}

// A head's record and its block's params, as they are or, where they straddle pages, copied here.
struct TileReader {
  alignas(64) uint8_t params_copy[kParamsBytes];
  alignas(64) uint8_t record_copy[kMostRecordBytes];
  const uint8_t* params;
  const uint8_t* record;
  uint32_t record_bytes;

  void read(const CacheView& cache, const TileShape& shape, uint32_t layer, uint32_t sequence, uint32_t block,
            uint32_t head);

  // Unpacks a part by `kernels` into `quads`.
  void unpack(const TileKernels& kernels, const TileShape& shape, uint32_t part, uint8_t* quads) const;
};

// Fetches a head's record and its block's params into the cache, some lines at a time, before they are read.
class TilePrefetch {
 public:
  // Of nothing, until it is told of what.
  void start(const CacheView& cache, uint32_t layer, uint32_t sequence, uint32_t block, uint32_t head);

  // The next sixth of the lines.
  void fetch() {
    for (uint32_t left = (lines_ + 5) / 6; left > 0 && at_ < count_; --left) {
      __builtin_prefetch(stretches_[at_].first);
      stretches_[at_].first += kLine;
      if (stretches_[at_].first >= stretches_[at_].end) ++at_;
    }
  }

 private:
  static constexpr uint32_t kLine = 64;
  struct Stretch {
    const uint8_t *first, *end;
  };
  Stretch stretches_[4];  // params and record, each of which may straddle pages
  uint32_t count_ = 0, at_ = 0, lines_ = 0;
};

// The 16-bit values of a recent token, [heads][head_dim].
inline uint8_t* recent_row(const CacheView& cache, uint32_t layer, uint32_t sequence, uint32_t part,
                           uint64_t token) {
  const uint64_t row_bytes = static_cast<uint64_t>(cache.heads) * cache.head_dim * 2;
  return cache.recent + (stream_of(cache, layer, sequence) * kParts + part) * recent_part_bytes(cache) +
         recent_slot(cache, token) * row_bytes;
}

}  // namespace ph::kv
