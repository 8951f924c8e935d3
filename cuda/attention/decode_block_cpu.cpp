// Decode attention on one CPU core; see decode_block_cpu.h.
//
// A piece's tokens pass by in chunks of 64, a packed block or as many of those in 16 bits. Per chunk, scores are one
// small matrix product, queries times keys, and the outputs grow by another, probabilities times values. Codes are
// unpacked once for all rows and multiplied as integers (fixed_point_cpu.h). A key is (code + zero) * scale of its token,
// so the zero's share of a score is zero * sum(query), and the scale is applied after the sum. A value's scale goes into
// its probability, and the zeros' share of an output is sum(probability * scale * zero), the same for all channels.
// Codes meet queries and probabilities in fixed point, each row in units of its largest / 32639; zeros, which may be far
// larger, meet unrounded ones. What comes in 16 bits is multiplied as floats.
//
// Bytes read: a block's params and a head's record, once per 32 rows; the next record is fetched while one is worked on.
#include "attention/decode_block_cpu.h"

#include <utility>

#include "attention/fixed_point_cpu.h"
#include "attention/queries_cpu.h"
#include "common/vector_cpu.h"

namespace ph::kv::PH_INSTRUCTION_SET {
extern const TileKernels kTileKernels;
}

namespace ph::attention::PH_INSTRUCTION_SET {

using namespace ph::PH_INSTRUCTION_SET;
using kv::kBlockTokens;
using kv::kMostHeadDim;
using kv::kMostTileCodes;

namespace {

constexpr uint32_t kMostRows = 32;     // query heads and tokens at a time; a piece is read again for more
constexpr uint32_t kRowsTogether = 4;  // that share the load of a code: their sums fill the registers
constexpr uint32_t kStripe = 2 * kVectorLanes;  // columns at a time; head_dim is a multiple of it
constexpr uint32_t kChunkVectors = kBlockTokens / kVectorLanes;

const float kInfinity = __builtin_inff();

Floats floats_of(Integers integers) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps((__m512i)integers);
#else
  return __builtin_convertvector(integers, Floats);
#endif
}

// What a piece gives for one query head and token: sum of 2^(score - maximum) * value [head_dim], then the maximum of
// the scores, in bits, then the sum of 2^(score - maximum).
float* partial_of(const DecodeCall& call, uint32_t piece, uint32_t query, uint32_t query_head) {
  const uint64_t row =
      (static_cast<uint64_t>(piece) * call.step.most_queries + query) * call.cache.query_heads;
  return call.partials + (row + query_head) * (call.cache.head_dim + 2);
}

Integers signed_halves(const uint8_t* halves) { return (Integers)(words_of_halves(halves) << 16) >> 16; }

// ---- right-hand sides: matrices of `columns` columns whose rows come four at a time

struct Codes {
  const uint8_t* quads;
  uint32_t columns;
};

struct Values {
  const float* rows;
  uint32_t columns;

  Floats read(uint32_t row, uint32_t column) const {
    return ph::PH_INSTRUCTION_SET::load<Floats>(rows + row * columns + column);
  }
};

// In 16 bits.
template <typename Element>
struct HalfValues {
  const uint8_t* rows;
  uint32_t columns;

  Floats read(uint32_t row, uint32_t column) const {
    return Element::read(rows + 2 * (row * columns + column));
  }
};

// Where the factors of a right-hand side's rows stand, and which quads pair i of a run of pairs is for. Keys: by channel.
struct ByChannel {
  uint32_t operator()(uint32_t quad, uint32_t b) const { return 4 * quad + b; }
  uint32_t quad(uint32_t run, uint32_t i) const { return kFactorRun * run + i; }
};
// Values: by key_column of the token, as the scores.
struct ByToken {
  uint32_t operator()(uint32_t quad, uint32_t b) const { return 32 * (quad % 2) + 8 * b + quad / 2; }
  uint32_t quad(uint32_t run, uint32_t i) const { return 2 * i + run; }
};

// Adds to sums[row] the products of kRows rows of factors, `stride` apart, with columns of a right-hand side.
template <uint32_t kRows, uint32_t kVectors, typename Right, typename Place>
void multiply(const Right& right, uint32_t quads, uint32_t column, const float* factors, uint32_t stride,
              Place place, Floats (&sums)[kRows][kVectors]) {
  for (uint32_t quad = 0; quad < quads; ++quad) {
#pragma GCC unroll 4
    for (uint32_t b = 0; b < 4; ++b) {
      const float* factor = factors + place(quad, b);
#pragma GCC unroll 4
      for (uint32_t v = 0; v < kVectors; ++v) {
        const Floats x = right.read(4 * quad + b, column + v * kVectorLanes);
#pragma GCC unroll 4
        for (uint32_t row = 0; row < kRows; ++row) sums[row][v] += x * factor[row * stride];
      }
    }
  }
}

template <uint32_t kRows, uint32_t kVectors, typename Place>
void multiply(const Codes& right, uint32_t quads, uint32_t column, const uint32_t* factors, uint32_t stride,
              Place place, Sums (&sums)[kRows][kVectors]) {
  for (uint32_t run = 0; run < quads / kFactorRun; ++run) {
    const uint32_t* pair = factors + factor_place(kFactorRun * run);
    const uint8_t* source = right.quads + (place.quad(run, 0) * right.columns + column) * 4;
    const size_t step = (place.quad(run, 1) - place.quad(run, 0)) * right.columns * size_t{4};
#pragma GCC unroll 2
    for (uint32_t i = 0; i < kFactorRun; ++i, ++pair, source += step) {
#pragma GCC unroll 4
      for (uint32_t v = 0; v < kVectors; ++v) {
        const Quads codes(load<Words>(source + v * kVectorBytes));
#pragma GCC unroll 4
        for (uint32_t row = 0; row < kRows; ++row) sums[row][v].add(codes, pair + row * stride);
      }
    }
  }
}

// Calls `run(first row, number of rows as a constant)` until all rows are done.
template <typename Run>
void for_rows(uint32_t rows, Run run) {
  uint32_t row = 0;
  for (; row + kRowsTogether <= rows; row += kRowsTogether) {
    run(row, std::integral_constant<uint32_t, kRowsTogether>());
  }
  const uint32_t left = rows - row;
  if (left == 3) run(row, std::integral_constant<uint32_t, 3>());
  if (left == 2) run(row, std::integral_constant<uint32_t, 2>());
  if (left == 1) run(row, std::integral_constant<uint32_t, 1>());
}

// Calls `run(first column, number of vectors as a constant)` until all columns, a multiple of kStripe, are done. Few rows
// take more vectors at a time, to have as many sums under way.
template <uint32_t kRows, typename Run>
void for_columns(uint32_t columns, Run run) {
  uint32_t column = 0;
  if (kRows <= 2) {
    for (; column + 2 * kStripe <= columns; column += 2 * kStripe)
      run(column, std::integral_constant<uint32_t, 4>());
  }
  for (; column < columns; column += kStripe) run(column, std::integral_constant<uint32_t, 2>());
}

// What a chunk's tokens need beside their codes, each at the token's key_column.
struct ChunkTokens {
  alignas(64) float key_scales[kBlockTokens], key_zeros[kBlockTokens];
  // A value is code * scale * value_unit + offset.
  alignas(64) float value_scales[kBlockTokens], value_offsets[kBlockTokens];
  float value_unit;
  // Visible to query tokens from one on (0 for packed ones) until another.
  alignas(64) int32_t visible_from[kBlockTokens];
  alignas(64) int32_t visible_until[kBlockTokens];

  // Ends the visibility of the token at `position` by the window, unless it is a sink.
  void end_visibility(const DecodeCall& call, const kv::StepSequence& sequence, uint32_t column,
                      uint64_t position) {
    const int64_t until =
        static_cast<int64_t>(position) - static_cast<int64_t>(sequence.before) + call.window - 1;
    const bool forever = call.window == 0 || position < call.cache.sinks || until > INT32_MAX;
    visible_until[column] = forever ? INT32_MAX : static_cast<int32_t>(until < -1 ? -1 : until);
  }
};

// The rows of one kv head's queries against a piece. Row r is query token r / group and query head r % group of the kv
// head's, both counted from the call's first row.
struct Rows {
  // Times the scale and log2(e), so that scores are in bits; and in fixed point.
  alignas(64) float queries[kMostRows][kMostHeadDim];
  alignas(64) uint32_t query_factors[kMostRows][kMostHeadDim / 2];
  float query_sums[kMostRows];
  float query_units[kMostRows];  // a query is a unit times its factors
  // Scores, then probabilities times the values' scale: as they are, or factors and their unit.
  alignas(64) float scores[kMostRows][kBlockTokens];
  alignas(64) uint32_t weight_factors[kMostRows][kBlockTokens / 2];
  float weight_units[kMostRows];
  float maxima[kMostRows];
  Floats totals[kMostRows];  // of probabilities, by lane
  float rescale[kMostRows];  // of the outputs so far, as the maximum has grown
  float shifts[kMostRows];   // the offsets' share of the chunk's outputs
  float* out[kMostRows];
  int32_t query_tokens[kMostRows];
  uint32_t rows, head_dim;

  template <typename Element>
  void start(const DecodeCall& call, const kv::StepSequence& sequence, uint32_t piece, uint32_t head,
             uint32_t first, uint32_t count) {
    rows = count;
    head_dim = call.cache.head_dim;
    const uint32_t group = call.cache.query_heads / call.cache.heads;
    const Floats factor = splat(call.scale * 1.44269504088896f);
    for (uint32_t row = 0; row < rows; ++row) {
      const uint32_t token = (first + row) / group, query_head = head * group + (first + row) % group;
      const uint64_t source =
          static_cast<uint64_t>(sequence.input + token) * call.cache.query_heads + query_head;
      Floats query_sum = {};
      for (uint32_t channel = 0; channel < head_dim; channel += kVectorLanes) {
        const Floats x =
            read_queries<Element>(call.cache, call.queries, source * head_dim + channel) * factor;
        store(queries[row] + channel, x);
        query_sum += x;
      }
      query_sums[row] = sum(query_sum);
      query_tokens[row] = static_cast<int32_t>(token);
      maxima[row] = -kInfinity;
      totals[row] = Floats{};
      out[row] = partial_of(call, piece, token, query_head);
      memset(out[row], 0, head_dim * sizeof(float));
    }
  }

  // Queries in fixed point, for products with codes.
  void quantize_queries() {
    for (uint32_t row = 0; row < rows; ++row) {
      Floats most = {};
      for (uint32_t channel = 0; channel < head_dim; channel += kVectorLanes) {
        const Floats x = load<Floats>(queries[row] + channel);
        most = larger(larger(x, -x), most);
      }
      const float magnitude = largest(most);
      query_units[row] = magnitude / kLargestFactor;
      // Too small for a reciprocal, it would not tell scores apart either.
      const Floats inverse = splat(magnitude > 1e-30f ? kLargestFactor / magnitude : 0.0f);
      alignas(64) int32_t factors[kMostHeadDim];
      for (uint32_t channel = 0; channel < head_dim; channel += kVectorLanes)
        store(factors + channel, fixed_point(load<Floats>(queries[row] + channel) * inverse));
      for (uint32_t quad = 0; quad < head_dim / 4; quad += kFactorRun) {
        WordRun even, odd;
        for (uint32_t i = 0; i < kFactorRun; ++i) {
          const int32_t* four = factors + 4 * (quad + i);
          even[i] = (four[0] & 0xffffu) | static_cast<uint32_t>(four[2]) << 16;
          odd[i] = (four[1] & 0xffffu) | static_cast<uint32_t>(four[3]) << 16;
        }
        store_factors(query_factors[row] + factor_place(quad), even, odd);
      }
    }
  }

  void finish() const {
    for (uint32_t row = 0; row < rows; ++row) {
      out[row][head_dim] = maxima[row];
      out[row][head_dim + 1] = sum(totals[row]);
    }
  }

  template <typename Right>
  void score(const Right& keys, const ChunkTokens& tokens) {
    for_rows(rows, [&](uint32_t first, auto count) {
      for_columns<count.value>(kBlockTokens, [&](uint32_t column, auto vectors) {
        Floats sums[count.value][vectors.value] = {};
        multiply(keys, head_dim / 4, column, queries[first], kMostHeadDim, ByChannel(), sums);
        for (uint32_t row = 0; row < count.value; ++row) {
          for (uint32_t v = 0; v < vectors.value; ++v) {
            const uint32_t at = column + v * kVectorLanes;
            const Floats zero = load<Floats>(tokens.key_zeros + at),
                         scale = load<Floats>(tokens.key_scales + at);
            const Floats score = (sums[row][v] + zero * query_sums[first + row]) * scale;
            const Integers visible = load<Integers>(tokens.visible_from + at) <= query_tokens[first + row] &&
                                     load<Integers>(tokens.visible_until + at) >= query_tokens[first + row];
            store(scores[first + row] + at, visible ? score : splat(-kInfinity));
          }
        }
      });
    });
  }

  // Of packed tokens, which all queries see.
  void score(const Codes& keys, const ChunkTokens& tokens) {
    for_rows(rows, [&](uint32_t first, auto count) {
      for_columns<count.value>(kBlockTokens, [&](uint32_t column, auto vectors) {
        Sums sums[count.value][vectors.value];
        multiply(keys, head_dim / 4, column, query_factors[first], kMostHeadDim / 2, ByChannel(), sums);
        for (uint32_t row = 0; row < count.value; ++row) {
          for (uint32_t v = 0; v < vectors.value; ++v) {
            const uint32_t at = column + v * kVectorLanes;
            const Floats zero = load<Floats>(tokens.key_zeros + at),
                         scale = load<Floats>(tokens.key_scales + at);
            const Floats product = floats_of(sums[row][v].value()) * query_units[first + row];
            const Floats score = (product + zero * query_sums[first + row]) * scale;
            const Integers visible = load<Integers>(tokens.visible_until + at) >= query_tokens[first + row];
            store(scores[first + row] + at, visible ? score : splat(-kInfinity));
          }
        }
      });
    });
  }

  // One step of the online softmax: calls `put(row, weights, vector by vector)` with probabilities times scales. The
  // offsets' share of the outputs is left in shifts.
  template <typename Put>
  void put_weights(const ChunkTokens& tokens, Put put) {
    for (uint32_t row = 0; row < rows; ++row) {
      Floats vectors[kChunkVectors], chunk = splat(-kInfinity);
#pragma GCC unroll 16
      for (uint32_t v = 0; v < kChunkVectors; ++v) {
        vectors[v] = load<Floats>(scores[row] + v * kVectorLanes);
        chunk = larger(vectors[v], chunk);
      }
      const float found = largest(chunk), maximum = found > maxima[row] ? found : maxima[row];
      // Where nothing is visible yet, all is 0 whatever is subtracted.
      const Floats reference = splat(maximum == -kInfinity ? 0.0f : maximum);
      const Floats factor = exp2(splat(maxima[row]) - reference);
      maxima[row] = maximum;
      rescale[row] = factor[0];
      Floats total = totals[row] * factor, shift = {};
#pragma GCC unroll 16
      for (uint32_t v = 0; v < kChunkVectors; ++v) {
        const Floats probability = exp2(vectors[v] - reference);
        total += probability;
        shift += probability * load<Floats>(tokens.value_offsets + v * kVectorLanes);
        vectors[v] = probability * load<Floats>(tokens.value_scales + v * kVectorLanes);
      }
      totals[row] = total;
      shifts[row] = sum(shift);
      put(row, vectors);
    }
  }

  template <typename Right>
  void weigh(const Right&, const ChunkTokens& tokens) {
    put_weights(tokens, [&](uint32_t row, const Floats(&weights)[kChunkVectors]) {
      for (uint32_t v = 0; v < kChunkVectors; ++v) store(scores[row] + v * kVectorLanes, weights[v]);
    });
  }

  void weigh(const Codes&, const ChunkTokens& tokens) {
    put_weights(tokens, [&](uint32_t row, const Floats(&weights)[kChunkVectors]) {
      Floats most = {};
#pragma GCC unroll 16
      for (uint32_t v = 0; v < kChunkVectors; ++v) most = larger(weights[v], most);
      const float heaviest = largest(most);
      // What is too small for a reciprocal is nothing beside the probability of 1 that there is.
      const bool counts = heaviest > 1e-30f;
      const Floats inverse = splat(counts ? kLargestFactor / heaviest : 0.0f);
      weight_units[row] = heaviest / kLargestFactor * tokens.value_unit;
      alignas(64) Integers factors[kChunkVectors];
#pragma GCC unroll 16
      for (uint32_t v = 0; v < kChunkVectors; ++v) factors[v] = fixed_point(weights[v] * inverse);
      // Columns are [token % 8][token / 8], and so a run of eight is the same token of eight quads, every second one.
      const uint32_t* columns = reinterpret_cast<const uint32_t*>(factors);
      const auto run = [&](uint32_t token) { return load<WordRun>(columns + kFactorRun * token); };
      for (uint32_t half = 0; half < 2; ++half) {
        store_factors(weight_factors[row] + factor_place(kFactorRun * half),
                      run(4 * half) | run(4 * half + 2) << 16, run(4 * half + 1) | run(4 * half + 3) << 16);
      }
    });
  }

  template <typename Right>
  void add_values(const Right& values) {
    for_rows(rows, [&](uint32_t first, auto count) {
      for_columns<count.value>(head_dim, [&](uint32_t column, auto vectors) {
        Floats sums[count.value][vectors.value];
        for (uint32_t row = 0; row < count.value; ++row) {
          for (uint32_t v = 0; v < vectors.value; ++v) {
            sums[row][v] = load<Floats>(out[first + row] + column + v * kVectorLanes) * rescale[first + row] +
                           shifts[first + row];
          }
        }
        multiply(values, kBlockTokens / 4, column, scores[first], kBlockTokens, ByToken(), sums);
        for (uint32_t row = 0; row < count.value; ++row) {
          for (uint32_t v = 0; v < vectors.value; ++v)
            store(out[first + row] + column + v * kVectorLanes, sums[row][v]);
        }
      });
    });
  }

  void add_values(const Codes& values) {
    for_rows(rows, [&](uint32_t first, auto count) {
      for_columns<count.value>(head_dim, [&](uint32_t column, auto vectors) {
        Sums sums[count.value][vectors.value];
        multiply(values, kBlockTokens / 4, column, weight_factors[first], kBlockTokens / 2, ByToken(), sums);
        for (uint32_t row = 0; row < count.value; ++row) {
          for (uint32_t v = 0; v < vectors.value; ++v) {
            float* target = out[first + row] + column + v * kVectorLanes;
            const Floats product = floats_of(sums[row][v].value()) * weight_units[first + row];
            store(target, load<Floats>(target) * rescale[first + row] + (product + shifts[first + row]));
          }
        }
      });
    });
  }

  // Calls `between` after each of the three steps.
  template <typename Keys, typename RightValues, typename Between>
  void attend(const Keys& keys, const RightValues& values, const ChunkTokens& tokens, Between between) {
    score(keys, tokens);
    between();
    weigh(values, tokens);
    between();
    add_values(values);
    between();
  }
};

// ---- packed blocks

// 16 bits per token, moved to the tokens' key columns, which are [token % 8][token / 8]: eight rows of eight become columns.
struct TokenHalves {
  alignas(64) uint16_t columns[kBlockTokens];
  const uint8_t* at(uint32_t column) const { return reinterpret_cast<const uint8_t*>(columns + column); }

#if defined(__AVX512BW__)
  explicit TokenHalves(const uint8_t* source) {
    const __m512i low = _mm512_loadu_si512(source), high = _mm512_loadu_si512(source + 64);
    for (uint32_t column = 0; column < kBlockTokens; column += 32) {
      const __m512i tokens = _mm512_load_si512(kTokenOf.columns + column);
      _mm512_store_si512(columns + column, _mm512_permutex2var_epi16(low, tokens, high));
    }
  }

 private:
  constexpr TokenHalves() : columns() {
    for (uint32_t column = 0; column < kBlockTokens; ++column)
      columns[column] = static_cast<uint16_t>(column % 8 * 8 + column / 8);
  }
  static const TokenHalves kTokenOf;
#else
  using Row = uint16_t __attribute__((vector_size(16)));

  // Rows i and i + 4 interleaved, three times over.
  explicit TokenHalves(const uint8_t* source) {
    constexpr Row low = {0, 8, 1, 9, 2, 10, 3, 11}, high = {4, 12, 5, 13, 6, 14, 7, 15};
    Row rows[8];
    for (uint32_t i = 0; i < 8; ++i) rows[i] = load<Row>(source + 16 * i);
#pragma GCC unroll 3
    for (uint32_t round = 0; round < 3; ++round) {
      Row next[8];
#pragma GCC unroll 4
      for (uint32_t i = 0; i < 4; ++i) {
        next[2 * i] = __builtin_shuffle(rows[i], rows[i + 4], low);
        next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + 4], high);
      }
#pragma GCC unroll 8
      for (uint32_t i = 0; i < 8; ++i) rows[i] = next[i];
    }
    for (uint32_t i = 0; i < 8; ++i) store(columns + 8 * i, rows[i]);
  }
#endif
};
#if defined(__AVX512BW__)
constexpr TokenHalves TokenHalves::kTokenOf;
#endif

template <typename Element>
void load_key_params(const uint8_t* params, ChunkTokens& tokens) {
  const TokenHalves scales(params + kv::scale_position(PH_KV_KEYS, 0)),
      zeros(params + kv::zero_position(PH_KV_KEYS, 0));
  for (uint32_t column = 0; column < kBlockTokens; column += kVectorLanes) {
    store(tokens.key_scales + column, Element::read(scales.at(column)));
    store(tokens.key_zeros + column, floats_of(signed_halves(zeros.at(column))));
  }
}

template <typename Element>
void load_value_params(const uint8_t* params, ChunkTokens& tokens) {
  const TokenHalves scales(params + kv::scale_position(PH_KV_VALUES, 0)),
      zeros(params + kv::zero_position(PH_KV_VALUES, 0));
  const float unit = tokens.value_unit = load<float>(params + kv::kLargestScalePosition);
  for (uint32_t column = 0; column < kBlockTokens; column += kVectorLanes) {
    const Floats scale = Element::read(scales.at(column));
    store(tokens.value_scales + column, scale / unit);
    store(tokens.value_offsets + column, scale * floats_of(signed_halves(zeros.at(column))));
  }
}

// Calls use(block, whether another follows) for the blocks of a piece that any query sees, with who sees their tokens in
// `tokens`.
template <typename Use>
void for_blocks(const DecodeCall& call, const kv::StepSequence& sequence, const kv::StepPiece& piece,
                ChunkTokens& tokens, Use use) {
  for (int32_t& until : tokens.visible_until) until = INT32_MAX;
  const uint32_t sinks = call.cache.sinks, seen = call.seen_from(sequence);
  const uint32_t first_seen = seen > sinks ? (seen - sinks) / kBlockTokens : 0;
  const uint32_t end = piece.first_block + piece.blocks;
  for (uint32_t block = first_seen > piece.first_block ? first_seen : piece.first_block; block < end;
       ++block) {
    for (uint32_t token = 0; token < kBlockTokens && call.window > 0; ++token) {
      tokens.end_visibility(call, sequence, kv::key_column(token),
                            sinks + static_cast<uint64_t>(block) * kBlockTokens + token);
    }
    use(block, block + 1 < end);
  }
}

template <typename Element>
void attend_packed(const DecodeCall& call, const kv::StepSequence& sequence, const kv::StepPiece& piece,
                   uint32_t head, Rows& rows) {
  const kv::TileKernels& kernels = kv::PH_INSTRUCTION_SET::kTileKernels;
  kv::TileReader reader;
  alignas(64) uint8_t keys[kMostTileCodes], values[kMostTileCodes];
  kv::TilePrefetch next;
  ChunkTokens tokens;
  rows.quantize_queries();
  for_blocks(call, sequence, piece, tokens, [&](uint32_t block, bool another) {
    reader.read(call.cache, call.shape, call.layer, sequence.sequence, block, head);
    if (another) next.start(call.cache, call.layer, sequence.sequence, block + 1, head);
    reader.unpack(kernels, call.shape, PH_KV_KEYS, keys);
    next.fetch();
    reader.unpack(kernels, call.shape, PH_KV_VALUES, values);
    next.fetch();
    const Codes key_codes = {keys, kBlockTokens}, value_codes = {values, call.cache.head_dim};
    load_key_params<Element>(reader.params, tokens);
    load_value_params<Element>(reader.params, tokens);
    next.fetch();
    rows.attend(key_codes, value_codes, tokens, [&] { next.fetch(); });
  });
}

// ---- packed blocks of which a part is kivi or raw16

// What kivi codes stand for: (code + zero) * scale, in the form of Values.
template <typename Element>
void dequantize_groups(const kv::TileShape& shape, uint32_t part, const uint8_t* bases, const uint8_t* quads,
                       float* rows) {
  const bool keys = part == PH_KV_KEYS;
  const uint32_t columns = keys ? kBlockTokens : shape.head_dim, count = kv::group_scales(shape, part);
  const uint32_t row_count = keys ? shape.head_dim : kBlockTokens;
  alignas(64) float scales[kv::kMostScales], zeros[kv::kMostScales];
  for (uint32_t i = 0; i < count; i += kVectorLanes) {
    store(scales + i, Element::read(bases + 2 * i));
    store(zeros + i, floats_of(signed_halves(bases + 2 * (count + i))));
  }
  for (uint32_t row = 0; row < row_count; row += 4) {
    for (uint32_t column = 0; column < columns; column += kVectorLanes) {
      const Words codes = load<Words>(quads + row * columns + 4 * column);
#pragma GCC unroll 4
      for (uint32_t b = 0; b < 4; ++b) {
        const uint32_t group = keys ? row + b : kv::scale_index(shape, part, row + b, column);
        store(rows + (row + b) * columns + column,
              (floats_of((Integers)(codes >> 8 * b & 0xff)) + zeros[group]) * scales[group]);
      }
    }
  }
}

// A part of a block as a right-hand side: codes where scales are its tokens', which then go to `tokens`; what codes stand
// for where scales are the groups' own; and 16-bit values.
template <typename Element>
struct PartReader {
  const DecodeCall& call;
  const uint32_t part;
  alignas(64) uint8_t bytes[kMostTileCodes * sizeof(float)];
  alignas(64) uint8_t quads[kMostTileCodes];

  PartReader(const DecodeCall& call, uint32_t part) : call(call), part(part) {}

  template <typename Use>
  void read(const kv::TileReader& reader, ChunkTokens& tokens, Use use) {
    const kv::TileKernels& kernels = kv::PH_INSTRUCTION_SET::kTileKernels;
    const kv::TileShape& shape = call.shape;
    const uint32_t columns = part == PH_KV_KEYS ? kBlockTokens : shape.head_dim;
    if (kv::is_raw16(shape.parts[part])) {
      kernels.unpack_raw(shape, part, reader.record + kv::raw_begin(shape, part, reader.record_bytes), bytes);
      return use(HalfValues<Element>{bytes, columns});
    }
    reader.unpack(kernels, shape, part, quads);
    if (kv::is_kivi(shape.parts[part])) {
      float* rows = reinterpret_cast<float*>(bytes);
      dequantize_groups<Element>(shape, part, reader.record + kv::bases_position(shape, part), quads, rows);
      return use(Values{rows, columns});
    }
    const Codes codes = {quads, columns};
    if (part == PH_KV_KEYS) load_key_params<Element>(reader.params, tokens);
    else load_value_params<Element>(reader.params, tokens);
    use(codes);
  }
};

template <typename Element>
void attend_mixed(const DecodeCall& call, const kv::StepSequence& sequence, const kv::StepPiece& piece,
                  uint32_t head, Rows& rows) {
  kv::TileReader reader;
  PartReader<Element> keys(call, PH_KV_KEYS), values(call, PH_KV_VALUES);
  ChunkTokens tokens = {};
  for (uint32_t token = 0; token < kBlockTokens; ++token)
    tokens.key_scales[token] = tokens.value_scales[token] = 1.0f;
  if (kv::is_per_token(call.shape.parts[PH_KV_KEYS])) rows.quantize_queries();
  for_blocks(call, sequence, piece, tokens, [&](uint32_t block, bool) {
    reader.read(call.cache, call.shape, call.layer, sequence.sequence, block, head);
    keys.read(reader, tokens, [&](const auto& right) { rows.score(right, tokens); });
    values.read(reader, tokens, [&](const auto& right) {
      rows.weigh(right, tokens);
      rows.add_values(right);
    });
  });
}

// ---- tokens in 16 bits: sinks, then those after the packed blocks

// Rows of as many as a vector has lanes become columns: rows i and i + half interleaved, over and over.
template <int32_t... kLane>
void transpose(Floats rows[kVectorLanes], std::integer_sequence<int32_t, kLane...>) {
  constexpr int32_t half = kVectorLanes / 2;
  constexpr Integers low = {(kLane / 2 + kLane % 2 * 2 * half)...}, high = low + half;
#pragma GCC unroll 4
  for (uint32_t distance = 1; distance < kVectorLanes; distance *= 2) {
    Floats next[kVectorLanes];
#pragma GCC unroll 8
    for (uint32_t i = 0; i < kVectorLanes / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + half], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + half], high);
    }
#pragma GCC unroll 16
    for (uint32_t i = 0; i < kVectorLanes; ++i) rows[i] = next[i];
  }
}

// The 64 tokens of a chunk as floats, from rows of 16-bit values; 0 where there is no row: keys [channel][key_column],
// values [token][channel].
template <typename Element>
void load_chunk(const uint8_t* const (&rows_of)[kv::kParts][kBlockTokens], uint32_t head_dim, float* keys,
                float* values) {
  for (uint32_t column = 0; column < kBlockTokens; column += kVectorLanes) {
    for (uint32_t channel = 0; channel < head_dim; channel += kVectorLanes) {
      Floats square[kVectorLanes];
#pragma GCC unroll 16
      for (uint32_t lane = 0; lane < kVectorLanes; ++lane) {
        const uint8_t* row = rows_of[PH_KV_KEYS][kv::key_column(column + lane)];  // its own inverse
        square[lane] = row == nullptr ? Floats{} : Element::read(row + 2 * channel);
      }
      transpose(square, std::make_integer_sequence<int32_t, kVectorLanes>());
#pragma GCC unroll 16
      for (uint32_t lane = 0; lane < kVectorLanes; ++lane)
        store(keys + (channel + lane) * kBlockTokens + column, square[lane]);
    }
  }
  for (uint32_t token = 0; token < kBlockTokens; ++token) {
    const uint8_t* row = rows_of[PH_KV_VALUES][token];
    for (uint32_t channel = 0; channel < head_dim; channel += kVectorLanes)
      store(values + token * head_dim + channel,
            row == nullptr ? Floats{} : Element::read(row + 2 * channel));
  }
}

template <typename Element>
void attend_recent(const DecodeCall& call, const kv::StepSequence& sequence, const kv::StepPiece& piece,
                   uint32_t head, Rows& rows) {
  const kv::CacheView& cache = call.cache;
  const uint32_t head_dim = cache.head_dim;
  const uint64_t length = sequence.before + sequence.tokens;
  const uint64_t sinks = cache.sinks < length ? cache.sinks : length;
  const uint64_t packed_end = cache.sinks + static_cast<uint64_t>(sequence.packed) * kBlockTokens;
  const uint64_t unpacked = packed_end > call.seen_from(sequence) ? packed_end : call.seen_from(sequence);
  const uint64_t count = sinks + (unpacked < length ? length - unpacked : 0);
  alignas(64) float keys[kMostHeadDim * kBlockTokens], values[kBlockTokens * kMostHeadDim];
  const uint64_t of_piece = static_cast<uint64_t>(piece.first_run + piece.runs) * kv::kRunTokens;
  const uint64_t end = of_piece < count ? of_piece : count;
  for (uint64_t first = piece.first_run * uint64_t{kv::kRunTokens}; first < end; first += kBlockTokens) {
    ChunkTokens tokens = {};
    const uint8_t* rows_of[kv::kParts][kBlockTokens] = {};
    for (uint32_t i = 0; i < kBlockTokens; ++i) {
      const uint32_t column = kv::key_column(i);
      tokens.key_scales[column] = tokens.value_scales[column] = 1.0f;
      if (first + i >= end) {
        tokens.visible_from[column] = INT32_MAX;
        continue;
      }
      const uint64_t token = first + i < sinks ? first + i : unpacked + (first + i - sinks);
      tokens.end_visibility(call, sequence, column, token);
      if (token > sequence.before)
        tokens.visible_from[column] = static_cast<int32_t>(token - sequence.before);
      for (uint32_t part = 0; part < kv::kParts; ++part) {
        rows_of[part][i] =
            kv::recent_row(cache, call.layer, sequence.sequence, part, token) + head * head_dim * 2;
        for (uint32_t byte = 0; byte < 2 * head_dim; byte += 64) __builtin_prefetch(rows_of[part][i] + byte);
      }
    }
    load_chunk<Element>(rows_of, head_dim, keys, values);
    rows.attend(Values{keys, kBlockTokens}, Values{values, head_dim}, tokens, [] {});
  }
}

__attribute__((flatten)) void attend(const DecodeCall& call, uint32_t piece_index, uint32_t head) {
  with_element(call.cache.dtype, [&](auto element) {
    using Element = decltype(element);
    const kv::StepPiece& piece = call.step.pieces[piece_index];
    const kv::StepSequence& sequence = piece.sequence;
    const uint32_t all_rows = sequence.tokens * (call.cache.query_heads / call.cache.heads);
    for (uint32_t first = 0; first < all_rows; first += kMostRows) {
      const uint32_t count = all_rows - first < kMostRows ? all_rows - first : kMostRows;
      Rows rows;
      rows.start<Element>(call, sequence, piece_index, head, first, count);
      if (piece.runs > 0) attend_recent<Element>(call, sequence, piece, head, rows);
      if (piece.blocks > 0) {
        if (kv::is_per_token(call.shape.parts[0]) && kv::is_per_token(call.shape.parts[1]))
          attend_packed<Element>(call, sequence, piece, head, rows);
        else attend_mixed<Element>(call, sequence, piece, head, rows);
      }
      rows.finish();
    }
  });
}

void merge(const DecodeCall& call, uint32_t first, uint32_t query_head) {
  with_element(call.cache.dtype, [&](auto element) {
    using Element = decltype(element);
    const uint32_t head_dim = call.cache.head_dim, pieces = call.step.pieces[first].pieces;
    const kv::StepSequence& sequence = call.step.pieces[first].sequence;
    for (uint32_t token = 0; token < sequence.tokens; ++token) {
      float maximum = -kInfinity, total = 0.0f;
      for (uint32_t piece = first; piece < first + pieces; ++piece) {
        const float found = partial_of(call, piece, token, query_head)[head_dim];
        maximum = found > maximum ? found : maximum;
      }
      alignas(64) float sums[kMostHeadDim] = {};
      for (uint32_t piece = first; piece < first + pieces; ++piece) {
        const float* partial = partial_of(call, piece, token, query_head);
        const Floats factor = exp2(splat(partial[head_dim] - maximum));
        total += partial[head_dim + 1] * factor[0];
        for (uint32_t channel = 0; channel < head_dim; channel += kVectorLanes) {
          store(sums + channel, load<Floats>(sums + channel) + load<Floats>(partial + channel) * factor);
        }
      }
      const uint64_t row =
          static_cast<uint64_t>(sequence.input + token) * call.cache.query_heads + query_head;
      for (uint32_t channel = 0; channel < head_dim; channel += kVectorLanes) {
        write_output<Element>(call.cache, call.out, row * head_dim + channel,
                              load<Floats>(sums + channel) / total);
      }
    }
  });
}

#define PH_TEXT(name) #name
#define PH_NAME(name) PH_TEXT(name)

}  // namespace

extern const DecodeKernels kDecodeKernels;
const DecodeKernels kDecodeKernels = {PH_NAME(PH_INSTRUCTION_SET), attend, merge};

}  // namespace ph::attention::PH_INSTRUCTION_SET
