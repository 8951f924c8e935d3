// Products of rows with a weight's rows on one CPU core; see operations_block_cpu.h.
//
// Both operands are contiguous along the features that are summed, so nothing is transposed: a lane of a vector sums every
// kVectorLanes-th product, one after another, and the lanes are added at the end. Whatever the number of rows, the split
// into blocks or the thread, an output is this sum, in this order. A micro-kernel keeps kRows x kTile such vectors in
// registers. For more rows than that, a tile's weights are first converted to float32 and interleaved, kBlock features at a
// time, in the first cache; for fewer, they are converted as they come from memory, which bounds that case.
#include <cstddef>
#include <type_traits>

#include "llm/elements_cpu.h"
#include "llm/operations_block_cpu.h"

namespace ph::llm::PH_INSTRUCTION_SET {

using ph::PH_INSTRUCTION_SET::Integers;

namespace {

#if defined(__AVX512F__)
constexpr uint32_t kRows = 3, kTile = 8;  // of 32 registers
#elif defined(__AVX2__)
constexpr uint32_t kRows = 3, kTile = 4;  // of 16
#else
constexpr uint32_t kRows = 2, kTile = 4;
#endif
constexpr uint32_t kBlock = 512;                 // features
constexpr uint64_t kSecondCacheBytes = 1 << 20;  // what may be used of it
constexpr uint32_t kMostRows = 256;

using Sums = Floats[kTile];  // of one row

uint32_t block_rows(uint32_t in_features) {
  const uint64_t rows = kSecondCacheBytes / (4ull * in_features);
  return static_cast<uint32_t>(rows < 4 * kRows ? 4 * kRows : (rows > kMostRows ? kMostRows : rows)) / kRows *
         kRows;
}

inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// Weights of a tile as they are in memory.
template <typename Element>
struct TileRows {
  const uint8_t* rows[kTile];
  Floats read(uint32_t out, size_t, size_t feature) const {
    return Element::read(rows[out] + feature * kBytes<Element>);
  }
  Floats read_end(uint32_t out, size_t, size_t feature, uint32_t count) const {
    return PH_INSTRUCTION_SET::read_end<Element>(rows[out] + feature * kBytes<Element>, count);
  }
};

// Weights of a tile converted, [features / lanes][kTile] vectors of which the last are filled with zeros.
struct ConvertedTile {
  const Floats* vectors;
  Floats read(uint32_t out, size_t vector, size_t) const { return vectors[vector * kTile + out]; }
  Floats read_end(uint32_t out, size_t vector, size_t, uint32_t) const {
    return vectors[vector * kTile + out];
  }
};

// The lanes of a and b added in pairs that differ in the bit `Bit`: a's where the bit is 0, b's where it is 1.
template <int32_t Bit>
inline Floats add_lanes(Floats a, Floats b) {
  constexpr int32_t kLanes = kVectorLanes;
  Integers own, other;
  for (int32_t lane = 0; lane < kLanes; ++lane) {
    own[lane] = lane & Bit ? kLanes + lane : lane;
    other[lane] = own[lane] ^ Bit;
  }
  return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
}

// The lanes of each of a tile's vectors added: sum i in lane i.
inline Floats add_all_lanes(const Sums& sums) {
  Floats pairs[kTile / 2], fours[kTile / 4];
  for (uint32_t i = 0; i < kTile / 2; ++i) pairs[i] = add_lanes<1>(sums[2 * i], sums[2 * i + 1]);
  for (uint32_t i = 0; i < kTile / 4; ++i) fours[i] = add_lanes<2>(pairs[2 * i], pairs[2 * i + 1]);
  Floats total = fours[0];
  if constexpr (kTile == 8) total = add_lanes<4>(fours[0], fours[1]);
  if constexpr (kTile == 4 && kVectorLanes == 8) total = add_lanes<4>(total, total);
  if constexpr (kVectorLanes == 16) total = add_lanes<8>(total, total);
  return total;
}

// A row's sums, as they grow from block to block: vectors whose lanes are not added yet.
struct RowSums {
  Sums* sums;
  bool continues;  // they hold what earlier blocks added
  Floats* totals;  // of the last block: where the added lanes go; else null
};

// lanes of x[row] . weights[out] over `features`, for each row.
template <uint32_t Rows, typename X, typename Weights>
void micro_kernel(const uint8_t* const* x, const Weights& weights, uint32_t features, const RowSums& to) {
  Floats totals[Rows][kTile];
  for (uint32_t row = 0; row < Rows; ++row)
    for (uint32_t out = 0; out < kTile; ++out) totals[row][out] = to.continues ? to.sums[row][out] : Floats{};
  size_t feature = 0, vector = 0;  // as wide as addresses, which are then counted on in place of these
  for (; feature + kVectorLanes <= features; feature += kVectorLanes, ++vector) {
    Floats values[Rows];
#pragma GCC unroll 8
    for (uint32_t row = 0; row < Rows; ++row) values[row] = X::read(x[row] + feature * kBytes<X>);
#pragma GCC unroll 8
    for (uint32_t out = 0; out < kTile; ++out) {
      const Floats weight = weights.read(out, vector, feature);
#pragma GCC unroll 8
      for (uint32_t row = 0; row < Rows; ++row)
        totals[row][out] = multiply_add(values[row], weight, totals[row][out]);
    }
  }
  if (const uint32_t rest = static_cast<uint32_t>(features - feature); rest > 0) {
    for (uint32_t row = 0; row < Rows; ++row) {
      const Floats value = read_end<X>(x[row] + feature * kBytes<X>, rest);
      for (uint32_t out = 0; out < kTile; ++out) {
        totals[row][out] =
            multiply_add(value, weights.read_end(out, vector, feature, rest), totals[row][out]);
      }
    }
  }
  if (to.totals != nullptr) {
    for (uint32_t row = 0; row < Rows; ++row) to.totals[row] = add_all_lanes(totals[row]);
  } else {
    for (uint32_t row = 0; row < Rows; ++row)
      for (uint32_t out = 0; out < kTile; ++out) to.sums[row][out] = totals[row][out];
  }
}

// The micro-kernel for 1 to kRows rows.
template <typename X, typename Weights, uint32_t Rows = kRows>
void multiply_rows(uint32_t rows, const uint8_t* const* x, const Weights& weights, uint32_t features,
                   const RowSums& to) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return multiply_rows<X, Weights, Rows - 1>(rows, x, weights, features, to);
  }
  micro_kernel<Rows, X>(x, weights, features, to);
}

template <typename Element>
void convert_tile(const TileRows<Element>& tile, uint32_t first, uint32_t features, Floats* vectors) {
  for (uint32_t feature = 0; feature < features; feature += kVectorLanes) {
    for (uint32_t out = 0; out < kTile; ++out)
      *vectors++ = read_at<Element>(tile.rows[out] + first * kBytes<Element>, feature, features);
  }
}

struct Place {
  uint32_t first_row, rows, first_out, outs;
};

// Adds the bias, and what is there, to each row's totals, and stores the outputs.
void finish(const Linear& call, const Place& place, const Floats* totals) {
  Floats bias = {};
  if (call.bias.data != nullptr) {
    bias = with_float(call.bias.dtype, [&](auto element) {
      using Bias = decltype(element);
      return read_end<Bias>(call.bias.data + place.first_out * kBytes<Bias>, place.outs);
    });
  }
  with_float(call.out.dtype, [&](auto element) {
    using Out = decltype(element);
    uint8_t* const first =
        call.out.data +
        (static_cast<uint64_t>(place.first_row) * call.out_features + place.first_out) * kBytes<Out>;
    const auto store_rows = [&](auto outs) {
      for (uint32_t row = 0; row < place.rows; ++row) {
        uint8_t* target = first + row * static_cast<uint64_t>(call.out_features) * kBytes<Out>;
        Floats total = totals[row] + bias;
        if (call.accumulate) total += read_end<Out>(target, outs);
        write_end<Out>(target, total, outs);
      }
    };
    // A constant number of bytes is copied by a register.
    if (place.outs == kTile) store_rows(std::integral_constant<uint32_t, kTile>{});
    else store_rows(place.outs);
  });
}

template <typename X, typename W>
void multiply_tiles(const Linear& call, uint32_t first_row, uint32_t last_row, uint32_t first,
                    uint32_t last) {
  static_assert(kTile <= kVectorLanes, "a tile's sums are finished as one vector");
  const uint32_t rows = last_row - first_row, features = call.in_features;
  const uint64_t x_bytes = features * kBytes<X>, weight_bytes = features * kBytes<W>;
  const uint8_t* x[kMostRows];
  for (uint32_t row = 0; row < rows; ++row) x[row] = call.x.data + (first_row + row) * x_bytes;
  alignas(64) Sums sums[kMostRows];
  alignas(64) Floats totals[kRows];
  alignas(64) Floats converted[kBlock / kVectorLanes * kTile];
  for (uint32_t tile = first; tile < last; ++tile) {
    const uint32_t first_out = tile * kTile,
                   last_out = first_out + kTile < call.out_features ? first_out + kTile : call.out_features;
    TileRows<W> weights;
    // A last tile that is not full has its last output in the place of those that do not exist.
    for (uint32_t out = 0; out < kTile; ++out) {
      const uint64_t at = first_out + out < last_out ? first_out + out : last_out - 1;
      weights.rows[out] = call.weight.data + at * weight_bytes;
    }
    const uint32_t outs = last_out - first_out;
    if (rows <= kRows) {
      multiply_rows<X>(rows, x, weights, features, {sums, false, totals});
      finish(call, {first_row, rows, first_out, outs}, totals);
    } else {
      for (uint32_t feature = 0; feature < features; feature += kBlock) {
        const uint32_t count = features - feature < kBlock ? features - feature : kBlock;
        convert_tile(weights, feature, count, converted);
        for (uint32_t row = 0; row < rows; row += kRows) {
          const uint8_t* from[kRows];
          const uint32_t several = rows - row < kRows ? rows - row : kRows;
          for (uint32_t i = 0; i < several; ++i) from[i] = x[row + i] + feature * kBytes<X>;
          const bool is_last = feature + count == features;
          multiply_rows<X>(several, from, ConvertedTile{converted}, count,
                           {sums + row, feature > 0, is_last ? totals : nullptr});
          if (is_last) finish(call, {first_row + row, several, first_out, outs}, totals);
        }
      }
    }
  }
}

void multiply(const Linear& call, uint32_t first_row, uint32_t last_row, uint32_t first, uint32_t last) {
  with_float(call.x.dtype, [&](auto x) {
    with_float(call.weight.dtype, [&](auto weight) {
      multiply_tiles<decltype(x), decltype(weight)>(call, first_row, last_row, first, last);
    });
  });
}

}  // namespace

extern const LinearKernels kLinearKernels;
const LinearKernels kLinearKernels = {PH_STRING(PH_INSTRUCTION_SET), kTile, block_rows, multiply};

}  // namespace ph::llm::PH_INSTRUCTION_SET
