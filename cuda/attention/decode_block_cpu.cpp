// Decode attention on one CPU core; see decode_block_cpu.h.
//
// A piece's tokens pass by in chunks of 64, a packed block or as many of those in 16 bits. Per chunk, scores are one
// small matrix product, queries times keys, and the outputs grow by another, probabilities times values; the right-hand
// sides of both are codes, unpacked once for all rows. A key is (code + zero) * scale of its token, so the zero's share of
// a score is zero * sum(query), and the scale is applied after the sum. A value's scale goes into its probability, and
// the zeros' share of an output is sum(probability * scale * zero), the same for all channels.
#include "attention/decode_block_cpu.h"

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
constexpr uint32_t kRowsTogether = 4;  // that share the conversion of a code: their sums fill the registers
constexpr uint32_t kStripe = 2 * kVectorLanes;  // columns at a time; head_dim is a multiple of it

const float kInfinity = __builtin_inff();

Floats floats_of(Words words) { return __builtin_convertvector((Integers)words, Floats); }

// What a piece gives for one query head and token: sum of 2^(score - maximum) * value [head_dim], then the maximum of
// the scores, in bits, then the sum of 2^(score - maximum).
float* partial_of(const DecodeCall& call, uint32_t piece, uint32_t query, uint32_t query_head) {
  const uint64_t row =
      (static_cast<uint64_t>(piece) * call.step.most_queries + query) * call.cache.query_heads;
  return call.partials + (row + query_head) * (call.cache.head_dim + 2);
}

// ---- right-hand sides: matrices of `columns` columns whose rows come four at a time

struct Codes {
  const uint8_t* quads;
  uint32_t columns;

  struct Four {
    Words words;
    Floats row(uint32_t b) const { return floats_of(words >> 8 * b & 0xff); }
  };
  Four load(uint32_t quad, uint32_t column) const {
    return {ph::PH_INSTRUCTION_SET::load<Words>(quads + (quad * columns + column) * 4)};
  }
};

struct Values {
  const float* rows;
  uint32_t columns;

  struct Four {
    const float* first;
    uint32_t columns;
    Floats row(uint32_t b) const { return ph::PH_INSTRUCTION_SET::load<Floats>(first + b * columns); }
  };
  Four load(uint32_t quad, uint32_t column) const { return {rows + quad * 4 * columns + column, columns}; }
};

// In 16 bits.
template <typename Element>
struct HalfValues {
  const uint8_t* rows;
  uint32_t columns;

  struct Four {
    const uint8_t* first;
    uint32_t columns;
    Floats row(uint32_t b) const { return Element::read(first + 2 * b * columns); }
  };
  Four load(uint32_t quad, uint32_t column) const {
    return {rows + 2 * (quad * 4 * columns + column), columns};
  }
};

// Where the factor of a right-hand side's row stands. Keys: by channel.
struct ByChannel {
  uint32_t operator()(uint32_t quad, uint32_t b) const { return 4 * quad + b; }
};
// Values: by key_column of the token, as the scores.
struct ByToken {
  uint32_t operator()(uint32_t quad, uint32_t b) const { return 32 * (quad % 2) + 8 * b + quad / 2; }
};

// Adds to sums[row] the products of kRows rows of factors, `stride` apart, with a stripe of a right-hand side.
template <uint32_t kRows, typename Right, typename Place>
void multiply(const Right& right, uint32_t quads, uint32_t column, const float* factors, uint32_t stride,
              Place place, Floats (&sums)[kRows][2]) {
  for (uint32_t quad = 0; quad < quads; ++quad) {
    const auto low = right.load(quad, column), high = right.load(quad, column + kVectorLanes);
#pragma GCC unroll 4
    for (uint32_t b = 0; b < 4; ++b) {
      const Floats x = low.row(b), y = high.row(b);
      const float* factor = factors + place(quad, b);
      for (uint32_t row = 0; row < kRows; ++row) {
        sums[row][0] += x * factor[row * stride];
        sums[row][1] += y * factor[row * stride];
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

// What a chunk's tokens need beside their codes, each at the token's key_column.
struct ChunkTokens {
  alignas(64) float key_scales[kBlockTokens], key_zeros[kBlockTokens];
  alignas(64) float value_scales[kBlockTokens], value_zeros[kBlockTokens];
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
  alignas(
      64) float queries[kMostRows][kMostHeadDim];  // times the scale and log2(e), so that scores are in bits
  alignas(64) float scores[kMostRows][kBlockTokens];  // then probabilities times the values' scale
  float query_sums[kMostRows];
  float maxima[kMostRows];
  Floats totals[kMostRows];  // of probabilities, by lane
  float rescale[kMostRows];  // of the outputs so far, as the maximum has grown
  float shifts[kMostRows];   // the zeros' share of the chunk's outputs
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
        const Floats x = Element::read(call.queries + (source * head_dim + channel) * 2) * factor;
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

  void finish() const {
    for (uint32_t row = 0; row < rows; ++row) {
      out[row][head_dim] = maxima[row];
      out[row][head_dim + 1] = sum(totals[row]);
    }
  }

  template <typename Right>
  void score(const Right& keys, const ChunkTokens& tokens) {
    for_rows(rows, [&](uint32_t first, auto count) {
      for (uint32_t column = 0; column < kBlockTokens; column += kStripe) {
        Floats sums[count.value][2] = {};
        multiply(keys, head_dim / 4, column, queries[first], kMostHeadDim, ByChannel(), sums);
        for (uint32_t row = 0; row < count.value; ++row) {
          for (uint32_t half = 0; half < 2; ++half) {
            const uint32_t at = column + half * kVectorLanes;
            const Floats zero = load<Floats>(tokens.key_zeros + at),
                         scale = load<Floats>(tokens.key_scales + at);
            const Floats score = (sums[row][half] + zero * query_sums[first + row]) * scale;
            const Integers visible = load<Integers>(tokens.visible_from + at) <= query_tokens[first + row] &&
                                     load<Integers>(tokens.visible_until + at) >= query_tokens[first + row];
            store(scores[first + row] + at, visible ? score : splat(-kInfinity));
          }
        }
      }
    });
  }

  // One step of the online softmax.
  void weigh(const ChunkTokens& tokens) {
    for (uint32_t row = 0; row < rows; ++row) {
      Floats chunk = splat(-kInfinity);
      for (uint32_t at = 0; at < kBlockTokens; at += kVectorLanes)
        chunk = larger(load<Floats>(scores[row] + at), chunk);
      const float found = largest(chunk), maximum = found > maxima[row] ? found : maxima[row];
      // Where nothing is visible yet, all is 0 whatever is subtracted.
      const Floats reference = splat(maximum == -kInfinity ? 0.0f : maximum);
      const Floats factor = exp2(splat(maxima[row]) - reference);
      maxima[row] = maximum;
      rescale[row] = factor[0];
      Floats total = totals[row] * factor, shift = {};
      for (uint32_t at = 0; at < kBlockTokens; at += kVectorLanes) {
        const Floats probability = exp2(load<Floats>(scores[row] + at) - reference);
        const Floats weight = probability * load<Floats>(tokens.value_scales + at);
        total += probability;
        shift += weight * load<Floats>(tokens.value_zeros + at);
        store(scores[row] + at, weight);
      }
      totals[row] = total;
      shifts[row] = sum(shift);
    }
  }

  template <typename Right>
  void add_values(const Right& values) {
    for_rows(rows, [&](uint32_t first, auto count) {
      for (uint32_t column = 0; column < head_dim; column += kStripe) {
        Floats sums[count.value][2];
        for (uint32_t row = 0; row < count.value; ++row) {
          for (uint32_t half = 0; half < 2; ++half) {
            sums[row][half] =
                load<Floats>(out[first + row] + column + half * kVectorLanes) * rescale[first + row] +
                shifts[first + row];
          }
        }
        multiply(values, kBlockTokens / 4, column, scores[first], kBlockTokens, ByToken(), sums);
        for (uint32_t row = 0; row < count.value; ++row) {
          for (uint32_t half = 0; half < 2; ++half) {
            store(out[first + row] + column + half * kVectorLanes, sums[row][half]);
          }
        }
      }
    });
  }

  template <typename Right>
  void attend(const Right& keys, const Right& values, const ChunkTokens& tokens) {
    score(keys, tokens);
    weigh(tokens);
    add_values(values);
  }
};

// ---- packed blocks

// A part's scales and zeros, moved to their tokens' key columns.
template <typename Element>
void load_params(const uint8_t* params, uint32_t part, float* scales, float* zeros) {
  alignas(64) uint16_t halves[kBlockTokens];
  for (uint32_t token = 0; token < kBlockTokens; ++token) {
    halves[kv::key_column(token)] = load<uint16_t>(params + kv::scale_position(part, token));
    zeros[kv::key_column(token)] = load<int16_t>(params + kv::zero_position(part, token));
  }
  for (uint32_t token = 0; token < kBlockTokens; token += kVectorLanes) {
    store(scales + token, Element::read(reinterpret_cast<const uint8_t*>(halves + token)));
  }
}

// Calls use(block) for the blocks of a piece that any query sees, with who sees their tokens in `tokens`.
template <typename Use>
void for_blocks(const DecodeCall& call, const kv::StepSequence& sequence, const kv::StepPiece& piece,
                ChunkTokens& tokens, Use use) {
  for (int32_t& until : tokens.visible_until) until = INT32_MAX;
  const uint32_t sinks = call.cache.sinks, seen = call.seen_from(sequence);
  const uint32_t first_seen = seen > sinks ? (seen - sinks) / kBlockTokens : 0;
  for (uint32_t block = first_seen > piece.first_block ? first_seen : piece.first_block;
       block < piece.first_block + piece.blocks; ++block) {
    for (uint32_t token = 0; token < kBlockTokens && call.window > 0; ++token) {
      tokens.end_visibility(call, sequence, kv::key_column(token),
                            sinks + static_cast<uint64_t>(block) * kBlockTokens + token);
    }
    use(block);
  }
}

template <typename Element>
void attend_packed(const DecodeCall& call, const kv::StepSequence& sequence, const kv::StepPiece& piece,
                   uint32_t head, Rows& rows) {
  const kv::TileKernels& kernels = kv::PH_INSTRUCTION_SET::kTileKernels;
  kv::TileReader reader;
  alignas(64) uint8_t keys[kMostTileCodes], values[kMostTileCodes];
  ChunkTokens tokens = {};
  for_blocks(call, sequence, piece, tokens, [&](uint32_t block) {
    reader.read(call.cache, call.shape, call.layer, sequence.sequence, block, head);
    reader.unpack(kernels, call.shape, PH_KV_KEYS, keys);
    reader.unpack(kernels, call.shape, PH_KV_VALUES, values);
    load_params<Element>(reader.params, PH_KV_KEYS, tokens.key_scales, tokens.key_zeros);
    load_params<Element>(reader.params, PH_KV_VALUES, tokens.value_scales, tokens.value_zeros);
    rows.attend(Codes{keys, kBlockTokens}, Codes{values, call.cache.head_dim}, tokens);
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
  for (uint32_t i = 0; i < count; i += kVectorLanes) store(scales + i, Element::read(bases + 2 * i));
  for (uint32_t i = 0; i < count; ++i) zeros[i] = load<int16_t>(bases + 2 * (count + i));
  for (uint32_t row = 0; row < row_count; row += 4) {
    for (uint32_t column = 0; column < columns; column += kVectorLanes) {
      const Words words = load<Words>(quads + row * columns + 4 * column);
#pragma GCC unroll 4
      for (uint32_t b = 0; b < 4; ++b) {
        const uint32_t group = keys ? row + b : kv::scale_index(shape, part, row + b, column);
        store(rows + (row + b) * columns + column,
              (floats_of(words >> 8 * b & 0xff) + zeros[group]) * scales[group]);
      }
    }
  }
}

// A part of a block as a right-hand side: codes per token where its scales are (then `scales` and `zeros` are set), what
// codes stand for where they are the groups' own, and 16-bit values.
template <typename Element>
struct PartReader {
  const DecodeCall& call;
  const uint32_t part;
  alignas(64) uint8_t bytes[kMostTileCodes * sizeof(float)];
  alignas(64) uint8_t quads[kMostTileCodes];

  PartReader(const DecodeCall& call, uint32_t part) : call(call), part(part) {}

  template <typename Use>
  void read(const kv::TileReader& reader, float* scales, float* zeros, Use use) {
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
    load_params<Element>(reader.params, part, scales, zeros);
    use(Codes{quads, columns});
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
  for_blocks(call, sequence, piece, tokens, [&](uint32_t block) {
    reader.read(call.cache, call.shape, call.layer, sequence.sequence, block, head);
    keys.read(reader, tokens.key_scales, tokens.key_zeros,
              [&](const auto& right) { rows.score(right, tokens); });
    values.read(reader, tokens.value_scales, tokens.value_zeros, [&](const auto& right) {
      rows.weigh(tokens);
      rows.add_values(right);
    });
  });
}

// ---- tokens in 16 bits: sinks, then those after the packed blocks

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
  for (uint32_t run = piece.first_run; run < piece.first_run + piece.runs; ++run) {
    const uint64_t first = static_cast<uint64_t>(run) * kBlockTokens;
    ChunkTokens tokens = {};
    for (uint32_t i = 0; i < kBlockTokens; ++i) {
      const uint32_t column = kv::key_column(i);
      tokens.key_scales[column] = tokens.value_scales[column] = 1.0f;
      if (first + i >= count) {
        tokens.visible_from[column] = INT32_MAX;
        for (uint32_t channel = 0; channel < head_dim; ++channel)
          keys[channel * kBlockTokens + column] = 0.0f;
        memset(values + i * head_dim, 0, head_dim * sizeof(float));
        continue;
      }
      const uint64_t token = first + i < sinks ? first + i : unpacked + (first + i - sinks);
      tokens.end_visibility(call, sequence, column, token);
      if (token > sequence.before)
        tokens.visible_from[column] = static_cast<int32_t>(token - sequence.before);
      const uint8_t* rows_of[kv::kParts];
      for (uint32_t part = 0; part < kv::kParts; ++part) {
        rows_of[part] =
            kv::recent_row(cache, call.layer, sequence.sequence, part, token) + head * head_dim * 2;
      }
      for (uint32_t channel = 0; channel < head_dim; channel += kVectorLanes) {
        const Floats x = Element::read(rows_of[PH_KV_KEYS] + 2 * channel);
        for (uint32_t lane = 0; lane < kVectorLanes; ++lane)
          keys[(channel + lane) * kBlockTokens + column] = x[lane];
        store(values + i * head_dim + channel, Element::read(rows_of[PH_KV_VALUES] + 2 * channel));
      }
    }
    rows.attend(Values{keys, kBlockTokens}, Values{values, head_dim}, tokens);
  }
}

__attribute__((flatten)) void attend(const DecodeCall& call, uint32_t piece_index, uint32_t head) {
  with_element(call.cache.dtype, [&](auto element) {
    using Element = decltype(element);
    const kv::StepPiece& piece = call.step.pieces[piece_index];
    const kv::StepSequence& sequence = call.step.sequences[piece.entry];
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
    const kv::StepSequence& sequence = call.step.sequences[call.step.pieces[first].entry];
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
        Element::write(call.out + (row * head_dim + channel) * 2, load<Floats>(sums + channel) / total);
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
