// What packed attention is measured against: decode attention over plain arrays of 32-bit and 16-bit floats, as one would
// write it by hand for this processor. attention_baseline.cpp is compiled once per instruction set.
#pragma once

#include <cstdint>

namespace ph::bench {

constexpr uint32_t kMostGroup = 8;
constexpr uint32_t kMostHeadDim = 256;
constexpr uint32_t kTileTokens = 64;  // `tokens` of a piece is a multiple of it

// Some of the tokens of one kv head, and the query heads that read it.
struct Piece {
  const uint8_t* keys;  // [tokens][head_dim] of the element type
  const uint8_t* values;
  uint32_t tokens, head_dim, group;
  const uint16_t* queries;  // [group][head_dim] f16
  float scale;
  float*
      out;  // [group][head_dim + 2]: sum of 2^(score - maximum) * value, maximum, sum of 2^(score - maximum)
};

struct BaselineKernels {
  const char* instruction_set;
  void (*attend_f32)(const Piece& piece);
  void (*attend_f16)(const Piece& piece);
};

}  // namespace ph::bench
