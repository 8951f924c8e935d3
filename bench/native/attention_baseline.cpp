// Decode attention over plain arrays on one core; see attention_baseline.h.
//
// One pass over keys and values in tiles of 64 tokens, with online softmax; the query heads of a group share every load
// and conversion. Registers hold kSums sums at a time: `rows` query heads x kSums / rows tokens for scores, whose lanes
// are then added up by a transposition, and as many channels for outputs. The next tile is fetched while this one is
// worked on.
#include "attention_baseline.h"

#include <utility>

#include "common/vector_cpu.h"

namespace ph::bench::PH_INSTRUCTION_SET {

using namespace ph::PH_INSTRUCTION_SET;

namespace {

constexpr uint32_t kSums = kVectorLanes == 16 ? 16 : 8;  // of 32 or 16 registers

struct F32 {
  static constexpr uint32_t kBytes = 4;
  static Floats read(const uint8_t* source) { return load<Floats>(source); }
};
struct Half {
  static constexpr uint32_t kBytes = 2;
  static Floats read(const uint8_t* source) { return F16::read(source); }
};

// Lane l of vector i joins lane l ^ kHalf of vector i + kHalf, or the other way round.
template <uint32_t kHalf, int32_t... kLane>
void join(Floats* vectors, std::integer_sequence<int32_t, kLane...>) {
  constexpr int32_t half = kHalf, lanes = kVectorLanes;
  constexpr Integers same = {(kLane & half ? kLane + lanes : kLane)...},
                     other = {(kLane & half ? (kLane ^ half) + lanes : kLane ^ half)...};
#pragma GCC unroll 8
  for (uint32_t i = 0; i < kHalf; ++i) {
    vectors[i] = __builtin_shuffle(vectors[i], vectors[i + kHalf], same) +
                 __builtin_shuffle(vectors[i], vectors[i + kHalf], other);
  }
}

// Lane i of the result is the sum of vectors[i]'s lanes.
Floats add_lanes(Floats (&vectors)[kVectorLanes]) {
  constexpr std::make_integer_sequence<int32_t, kVectorLanes> lanes;
  if constexpr (kVectorLanes == 16) join<8>(vectors, lanes);
  join<4>(vectors, lanes);
  join<2>(vectors, lanes);
  join<1>(vectors, lanes);
  return vectors[0];
}

template <uint32_t kRows>
struct Rows {
  static constexpr uint32_t kTokens = kSums / kRows;  // of a step of scores
  static constexpr uint32_t kColumns =
      kRows == 1 ? 8 : kSums / kRows;  // vectors of channels of a step of outputs

  alignas(64) float queries[kRows][kMostHeadDim];  // times scale and log2(e)
  alignas(64) float scores[kRows][kTileTokens];    // then probabilities
  alignas(64) float out[kRows][kMostHeadDim];
  float maxima[kRows], rescale[kRows];
  Floats totals[kRows];
  uint32_t head_dim;

  void start(const Piece& piece, uint32_t first) {
    head_dim = piece.head_dim;
    const Floats factor = splat(piece.scale * 1.44269504088896f);
    for (uint32_t row = 0; row < kRows; ++row) {
      const uint16_t* query = piece.queries + (first + row) * head_dim;
      for (uint32_t channel = 0; channel < head_dim; channel += kVectorLanes) {
        store(queries[row] + channel, F16::read(reinterpret_cast<const uint8_t*>(query + channel)) * factor);
        store(out[row] + channel, Floats{});
      }
      maxima[row] = -__builtin_inff();
      totals[row] = Floats{};
    }
  }

  void finish(const Piece& piece, uint32_t first) const {
    for (uint32_t row = 0; row < kRows; ++row) {
      float* target = piece.out + (first + row) * (head_dim + 2);
      memcpy(target, out[row], head_dim * sizeof(float));
      target[head_dim] = maxima[row];
      target[head_dim + 1] = sum(totals[row]);
    }
  }

  template <typename Element>
  void score(const uint8_t* keys) {
    const uint32_t stride = head_dim * Element::kBytes;
    for (uint32_t token = 0; token < kTileTokens; token += kTokens) {
      const uint8_t* first = keys + token * stride;
      Floats sums[kRows * kTokens] = {};
      for (uint32_t channel = 0; channel < head_dim; channel += kVectorLanes) {
        Floats key[kTokens];
#pragma GCC unroll 16
        for (uint32_t t = 0; t < kTokens; ++t) {
          key[t] = Element::read(first + t * stride + channel * Element::kBytes);
          if (channel * Element::kBytes % 64 == 0)
            __builtin_prefetch(first + (kTileTokens + t) * stride + channel * Element::kBytes);
        }
#pragma GCC unroll 8
        for (uint32_t row = 0; row < kRows; ++row) {
          const Floats query = load<Floats>(queries[row] + channel);
#pragma GCC unroll 16
          for (uint32_t t = 0; t < kTokens; ++t) sums[row * kTokens + t] += query * key[t];
        }
      }
      alignas(64) float dots[kRows * kTokens];
      store(dots, add_lanes(sums));
      for (uint32_t row = 0; row < kRows; ++row)
        memcpy(scores[row] + token, dots + row * kTokens, kTokens * sizeof(float));
    }
  }

  void weigh() {
    for (uint32_t row = 0; row < kRows; ++row) {
      Floats tile = load<Floats>(scores[row]);
      for (uint32_t at = kVectorLanes; at < kTileTokens; at += kVectorLanes)
        tile = larger(load<Floats>(scores[row] + at), tile);
      const float found = largest(tile), maximum = found > maxima[row] ? found : maxima[row];
      const Floats factor = exp2(splat(maxima[row] - maximum));
      maxima[row] = maximum;
      rescale[row] = factor[0];
      Floats total = totals[row] * factor;
      for (uint32_t at = 0; at < kTileTokens; at += kVectorLanes) {
        const Floats probability = exp2(load<Floats>(scores[row] + at) - maximum);
        total += probability;
        store(scores[row] + at, probability);
      }
      totals[row] = total;
    }
  }

  template <typename Element>
  void add_values(const uint8_t* values) {
    const uint32_t stride = head_dim * Element::kBytes;
    for (uint32_t channel = 0; channel < head_dim; channel += kColumns * kVectorLanes) {
      // Wide registers hold the outputs of one row of 64 channels in four.
      if (head_dim - channel < kColumns * kVectorLanes) add_columns<Element, 4>(values, stride, channel);
      else add_columns<Element, kColumns>(values, stride, channel);
    }
  }

  template <typename Element, uint32_t kCount>
  void add_columns(const uint8_t* values, uint32_t stride, uint32_t channel) {
    Floats sums[kRows][kCount];
#pragma GCC unroll 8
    for (uint32_t row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
      for (uint32_t c = 0; c < kCount; ++c)
        sums[row][c] = load<Floats>(out[row] + channel + c * kVectorLanes) * rescale[row];
    }
    for (uint32_t token = 0; token < kTileTokens; ++token) {
      const uint8_t* source = values + token * stride + channel * Element::kBytes;
      Floats value[kCount];
#pragma GCC unroll 16
      for (uint32_t c = 0; c < kCount; ++c) {
        value[c] = Element::read(source + c * kVectorLanes * Element::kBytes);
        if (c * kVectorLanes * Element::kBytes % 64 == 0)
          __builtin_prefetch(source + kTileTokens * stride + c * kVectorLanes * Element::kBytes);
      }
#pragma GCC unroll 8
      for (uint32_t row = 0; row < kRows; ++row) {
        const float probability = scores[row][token];
#pragma GCC unroll 16
        for (uint32_t c = 0; c < kCount; ++c) sums[row][c] += value[c] * probability;
      }
    }
#pragma GCC unroll 8
    for (uint32_t row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
      for (uint32_t c = 0; c < kCount; ++c) store(out[row] + channel + c * kVectorLanes, sums[row][c]);
    }
  }
};

template <typename Element, uint32_t kRows>
void attend_rows(const Piece& piece, uint32_t first) {
  Rows<kRows> rows;
  rows.start(piece, first);
  const uint32_t stride = piece.head_dim * Element::kBytes;
  for (uint32_t token = 0; token < piece.tokens; token += kTileTokens) {
    rows.template score<Element>(piece.keys + token * stride);
    rows.weigh();
    rows.template add_values<Element>(piece.values + token * stride);
  }
  rows.finish(piece, first);
}

template <typename Element>
__attribute__((flatten)) void attend(const Piece& piece) {
  if (piece.group == 8) attend_rows<Element, 8>(piece, 0);
  else if (piece.group == 4) attend_rows<Element, 4>(piece, 0);
  else attend_rows<Element, 1>(piece, 0);
}

#define PH_TEXT(name) #name
#define PH_NAME(name) PH_TEXT(name)

}  // namespace

extern const BaselineKernels kBaselineKernels;
const BaselineKernels kBaselineKernels = {PH_NAME(PH_INSTRUCTION_SET), attend<F32>, attend<Half>};

}  // namespace ph::bench::PH_INSTRUCTION_SET
