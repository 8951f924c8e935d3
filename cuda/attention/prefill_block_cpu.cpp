// Prefill attention on one CPU core; see prefill_block_cpu.h.
//
// A tile of rows meets the tokens that it sees in chunks of 64, a packed block or as many of those in 16 bits. A chunk is
// unpacked to float32 once, keys as columns and values as rows; per chunk, scores are one matrix product, queries times
// keys, the softmax goes on from there, and the outputs grow by another, probabilities times values.
#include "attention/prefill_block_cpu.h"

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
using kv::window_begin;

namespace {

constexpr uint32_t kRowsTogether = 4;  // that share a load of the right-hand side
constexpr uint32_t kMostVectors =
    kVectorBytes == 64 ? 4 : 2;  // columns at a time: the sums fill the registers
constexpr uint32_t kChunkVectors = kBlockTokens / kVectorLanes;  // of a row of scores

const float kInfinity = __builtin_inff();

Floats floats_of(Words words) { return __builtin_convertvector((Integers)words, Floats); }

// Sixty-four tokens, in any order that keys and values share.
struct Chunk {
  alignas(64) float keys[kMostHeadDim * kBlockTokens];    // [channel][token]
  alignas(64) float values[kBlockTokens * kMostHeadDim];  // [token][channel]
  // Query tokens of the step that see the token: from..until.
  alignas(64) int32_t from[kBlockTokens], until[kBlockTokens];
  bool masked;  // whether some row of the tile does not see some token

  // Notes who sees token `i`, at `position` of its sequence. first..last: query tokens of the tile.
  void see(const PrefillCall& call, const kv::StepSequence& entry, uint32_t i, uint32_t position,
           int32_t first, int32_t last) {
    const int64_t place = static_cast<int64_t>(position) - static_cast<int64_t>(entry.before);
    const bool forever = call.window == 0 || position < call.cache.sinks;
    from[i] = place > 0 ? static_cast<int32_t>(place) : 0;
    const int64_t end = forever ? INT32_MAX : place + call.window - 1;
    until[i] = static_cast<int32_t>(end < -1 ? -1 : end > INT32_MAX ? INT32_MAX : end);
    masked |= from[i] > first || until[i] < last;
  }
  void hide(uint32_t i) {
    from[i] = INT32_MAX;
    until[i] = -1;
    masked = true;
  }
};

// The rows of a tile. Row r is query token r / group and query head r % group of the kv head's, counted from `first`.
struct Rows {
  // Times the scale and log2(e), so that scores are in bits.
  alignas(64) float queries[kPrefillRows][kMostHeadDim];
  alignas(64) float scores[kPrefillRows][kBlockTokens];  // then probabilities
  alignas(64) float out[kPrefillRows][kMostHeadDim];
  Floats totals[kPrefillRows];  // of probabilities, by lane
  float maxima[kPrefillRows];
  float rescale[kPrefillRows];  // of the outputs so far, as the maximum has grown
  int32_t tokens[kPrefillRows];
  uint32_t rows, head_dim;

  template <typename Element>
  void begin(const PrefillCall& call, const kv::StepSequence& entry, uint32_t head, uint32_t first,
             uint32_t count) {
    rows = count;
    head_dim = call.cache.head_dim;
    const Floats factor = splat(call.scale * 1.44269504088896f);
    for (uint32_t row = 0; row < rows; ++row) {
      const uint64_t query = position(call, entry, head, first + row);
      for (uint32_t channel = 0; channel < head_dim; channel += kVectorLanes)
        store(queries[row] + channel,
              read_queries<Element>(call.cache, call.queries, query + channel) * factor);
      tokens[row] = static_cast<int32_t>((first + row) / call.group());
      maxima[row] = -kInfinity;
      totals[row] = Floats{};
      memset(out[row], 0, head_dim * sizeof(float));
    }
  }

  template <typename Element>
  void finish(const PrefillCall& call, const kv::StepSequence& entry, uint32_t head, uint32_t first) const {
    for (uint32_t row = 0; row < rows; ++row) {
      const uint64_t target = position(call, entry, head, first + row);
      const float total = sum(totals[row]);
      for (uint32_t channel = 0; channel < head_dim; channel += kVectorLanes)
        write_output<Element>(call.cache, call.out, target + channel,
                              load<Floats>(out[row] + channel) / total);
    }
  }

  // Where a row's values are among the queries, and the outputs.
  static uint64_t position(const PrefillCall& call, const kv::StepSequence& entry, uint32_t head,
                           uint32_t row) {
    const uint64_t token = entry.input + row / call.group();
    return (token * call.cache.query_heads + head * call.group() + row % call.group()) * call.cache.head_dim;
  }

  void attend(const Chunk& chunk) {
    for_rows([&](uint32_t row, auto count) {
      for_columns(kBlockTokens, [&](uint32_t column, auto vectors) {
        Floats sums[count.value][vectors.value] = {};
        multiply(chunk.keys + column, kBlockTokens, queries[row], kMostHeadDim, head_dim, sums);
        put(sums, scores[row] + column, kBlockTokens);
      });
    });
    for (uint32_t row = 0; row < rows; ++row) weigh(chunk, row);
    for_rows([&](uint32_t row, auto count) {
      for_columns(head_dim, [&](uint32_t column, auto vectors) {
        Floats sums[count.value][vectors.value];
        for (uint32_t r = 0; r < count.value; ++r) {
          for (uint32_t v = 0; v < vectors.value; ++v)
            sums[r][v] = load<Floats>(out[row + r] + column + v * kVectorLanes) * rescale[row + r];
        }
        multiply(chunk.values + column, head_dim, scores[row], kBlockTokens, kBlockTokens, sums);
        put(sums, out[row] + column, kMostHeadDim);
      });
    });
  }

 private:
  // One step of the online softmax.
  void weigh(const Chunk& chunk, uint32_t row) {
    Floats found[kChunkVectors], most = splat(maxima[row]);
    for (uint32_t v = 0; v < kChunkVectors; ++v) {
      found[v] = load<Floats>(scores[row] + v * kVectorLanes);
      if (chunk.masked) {
        const Integers from = load<Integers>(chunk.from + v * kVectorLanes),
                       until = load<Integers>(chunk.until + v * kVectorLanes);
        found[v] = from <= tokens[row] && until >= tokens[row] ? found[v] : splat(-kInfinity);
      }
      most = larger(found[v], most);
    }
    const float maximum = largest(most);
    // Where nothing is visible yet, all is 0 whatever is subtracted.
    const Floats reference = splat(maximum == -kInfinity ? 0.0f : maximum);
    const Floats factor = exp2(splat(maxima[row]) - reference);
    maxima[row] = maximum;
    rescale[row] = factor[0];
    Floats total = totals[row] * factor;
    for (uint32_t v = 0; v < kChunkVectors; ++v) {
      const Floats probability = exp2(found[v] - reference);
      total += probability;
      store(scores[row] + v * kVectorLanes, probability);
    }
    totals[row] = total;
  }

  // Adds the products of rows of factors, `stride` apart, with columns of a matrix of `depth` rows.
  template <uint32_t kRows, uint32_t kVectors>
  static void multiply(const float* right, uint32_t columns, const float* factors, uint32_t stride,
                       uint32_t depth, Floats (&sums)[kRows][kVectors]) {
    for (uint32_t k = 0; k < depth; ++k) {
      Floats x[kVectors];
      for (uint32_t v = 0; v < kVectors; ++v) x[v] = load<Floats>(right + k * columns + v * kVectorLanes);
      for (uint32_t r = 0; r < kRows; ++r) {
        for (uint32_t v = 0; v < kVectors; ++v) sums[r][v] += x[v] * factors[r * stride + k];
      }
    }
  }

  template <uint32_t kRows, uint32_t kVectors>
  static void put(const Floats (&sums)[kRows][kVectors], float* target, uint32_t stride) {
    for (uint32_t r = 0; r < kRows; ++r) {
      for (uint32_t v = 0; v < kVectors; ++v) store(target + r * stride + v * kVectorLanes, sums[r][v]);
    }
  }

  // Calls `run(first row, number of rows as a constant)` until all rows are done.
  template <typename Run>
  void for_rows(Run run) {
    uint32_t row = 0;
    for (; row + kRowsTogether <= rows; row += kRowsTogether) {
      run(row, std::integral_constant<uint32_t, kRowsTogether>());
    }
    for (; row < rows; ++row) run(row, std::integral_constant<uint32_t, 1>());
  }

  // Likewise for vectors of columns, of which there are an even number.
  template <typename Run>
  static void for_columns(uint32_t columns, Run run) {
    uint32_t column = 0;
    for (; column + kMostVectors * kVectorLanes <= columns; column += kMostVectors * kVectorLanes) {
      run(column, std::integral_constant<uint32_t, kMostVectors>());
    }
    if (column < columns) run(column, std::integral_constant<uint32_t, 2>());
  }
};

// A packed block; its tokens in the order of their key columns.
template <typename Element>
void unpack_block(const PrefillCall& call, const kv::StepSequence& entry, uint32_t block, uint32_t head,
                  kv::TileReader& reader, Chunk& chunk) {
  const kv::TileKernels& kernels = kv::PH_INSTRUCTION_SET::kTileKernels;
  const kv::TileShape& shape = call.shape;
  const uint32_t head_dim = call.cache.head_dim;
  reader.read(call.cache, shape, call.layer, entry.sequence, block, head);
  for (uint32_t part = 0; part < kv::kParts; ++part) {
    const bool of_keys = part == PH_KV_KEYS;
    const uint32_t rows = of_keys ? head_dim : kBlockTokens, columns = of_keys ? kBlockTokens : head_dim;
    // Keys are [channel][column], values [token][channel] before their tokens are put in order.
    const auto target = [&](uint32_t row) {
      return of_keys ? chunk.keys + row * kBlockTokens : chunk.values + kv::key_column(row) * head_dim;
    };
    if (kv::is_raw16(shape.parts[part])) {
      alignas(64) uint8_t halves[2 * kMostTileCodes];
      kernels.unpack_raw(shape, part, reader.record + kv::raw_begin(shape, part, reader.record_bytes),
                         halves);
      for (uint32_t row = 0; row < rows; ++row) {
        for (uint32_t column = 0; column < columns; column += kVectorLanes)
          store(target(row) + column, Element::read(halves + 2 * (row * columns + column)));
      }
      continue;
    }
    const bool is_kivi = kv::is_kivi(shape.parts[part]);
    const uint8_t* bases = reader.record + kv::bases_position(shape, part);
    alignas(64) float scales[kv::kMostScales], zeros[kv::kMostScales];  // per token: in their columns' order
    for (uint32_t i = 0; i < kv::group_scales(shape, part); ++i) {
      const kv::Affine affine = is_kivi ? kv::stored_group_affine(shape, part, bases, i)
                                        : kv::stored_affine(shape, part, reader.params, i);
      const uint32_t place = of_keys && !is_kivi ? kv::key_column(i) : i;
      scales[place] = affine.scale;
      zeros[place] = affine.zero;
    }
    alignas(64) uint8_t quads[kMostTileCodes];
    reader.unpack(kernels, shape, part, quads);
    for (uint32_t row = 0; row < rows; row += 4) {
      for (uint32_t column = 0; column < columns; column += kVectorLanes) {
        const Words codes = load<Words>(quads + row * columns + 4 * column);
        for (uint32_t b = 0; b < 4; ++b) {
          Floats scale, zero;
          if (of_keys && !is_kivi) {
            scale = load<Floats>(scales + column);
            zero = load<Floats>(zeros + column);
          } else {
            // A channel of keys, or a token's group of channels.
            const uint32_t index = of_keys ? row + b : kv::scale_index(shape, part, row + b, column);
            scale = splat(scales[index]);
            zero = splat(zeros[index]);
          }
          store(target(row + b) + column, (floats_of(codes >> 8 * b & 0xff) + zero) * scale);
        }
      }
    }
  }
}

// Entries [begin, begin + 64), as far as there are `count`, of the tokens in 16 bits.
template <typename Element>
void load_plain(const PrefillCall& call, const kv::StepSequence& entry, const PlainTokens& list,
                uint32_t begin, uint32_t count, uint32_t head, Chunk& chunk) {
  const kv::CacheView& cache = call.cache;
  const uint32_t head_dim = cache.head_dim;
  const uint64_t row_bytes = static_cast<uint64_t>(cache.heads) * head_dim * 2;
  for (uint32_t i = 0; i < kBlockTokens; ++i) {
    if (begin + i >= count) {
      for (uint32_t channel = 0; channel < head_dim; ++channel) chunk.keys[channel * kBlockTokens + i] = 0.0f;
      memset(chunk.values + i * head_dim, 0, head_dim * sizeof(float));
      continue;
    }
    const uint64_t token = list.position(begin + i);
    const uint8_t* rows[kv::kParts];
    for (uint32_t part = 0; part < kv::kParts; ++part) {
      rows[part] = token < entry.before
                       ? kv::recent_row(cache, call.layer, entry.sequence, part, token)
                       : call.tensors.parts[part] + (entry.input + (token - entry.before)) * row_bytes;
      rows[part] += head * head_dim * 2;
    }
    for (uint32_t channel = 0; channel < head_dim; channel += kVectorLanes) {
      const Floats x = Element::read(rows[PH_KV_KEYS] + 2 * channel);
      for (uint32_t lane = 0; lane < kVectorLanes; ++lane)
        chunk.keys[(channel + lane) * kBlockTokens + i] = x[lane];
      store(chunk.values + i * head_dim + channel, Element::read(rows[PH_KV_VALUES] + 2 * channel));
    }
  }
}

template <typename Element>
void attend_rows(const PrefillCall& call, uint32_t number, uint32_t head, uint32_t first) {
  const kv::StepSequence& entry = call.step.sequences[number];
  const uint32_t left = entry.tokens * call.group() - first;
  const uint32_t count = left < kPrefillRows ? left : kPrefillRows, sinks = call.cache.sinks;
  const uint32_t before = static_cast<uint32_t>(entry.before);
  const int32_t first_token = static_cast<int32_t>(first / call.group()),
                last_token = static_cast<int32_t>((first + count - 1) / call.group());
  // Positions that some row sees, sinks aside.
  const uint32_t seen_begin = window_begin(call.window, before + first_token),
                 seen_end = before + last_token + 1;
  Rows rows;
  Chunk chunk;
  rows.begin<Element>(call, entry, head, first, count);

  kv::TileReader reader;
  for (uint32_t block = seen_begin > sinks ? (seen_begin - sinks) / kBlockTokens : 0;
       block < entry.first_block; ++block) {
    unpack_block<Element>(call, entry, block, head, reader, chunk);
    chunk.masked = false;
    for (uint32_t token = 0; token < kBlockTokens; ++token) {
      chunk.see(call, entry, kv::key_column(token), sinks + block * kBlockTokens + token, first_token,
                last_token);
    }
    rows.attend(chunk);
  }

  const PlainTokens list = plain_tokens(call.cache, entry);
  const uint32_t end = list.before(seen_end);
  const uint32_t skipped = list.before(seen_begin > list.sinks ? seen_begin : list.sinks);
  for (uint32_t begin = 0; begin < end; begin += kBlockTokens) {
    if (begin >= list.sinks && begin + kBlockTokens <= skipped) continue;
    load_plain<Element>(call, entry, list, begin, end, head, chunk);
    chunk.masked = false;
    for (uint32_t i = 0; i < kBlockTokens; ++i) {
      if (begin + i < end) chunk.see(call, entry, i, list.position(begin + i), first_token, last_token);
      else chunk.hide(i);
    }
    rows.attend(chunk);
  }
  rows.finish<Element>(call, entry, head, first);
}

__attribute__((flatten)) void attend(const PrefillCall& call, uint32_t entry, uint32_t head, uint32_t first) {
  with_element(call.cache.dtype,
               [&](auto element) { attend_rows<decltype(element)>(call, entry, head, first); });
}

#define PH_TEXT(name) #name
#define PH_NAME(name) PH_TEXT(name)

}  // namespace

extern const PrefillKernels kPrefillKernels;
const PrefillKernels kPrefillKernels = {PH_NAME(PH_INSTRUCTION_SET), attend};

}  // namespace ph::attention::PH_INSTRUCTION_SET
