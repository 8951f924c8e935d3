// The growing cache of the CPU backend below the C ABI: its records against an independent reading of the layout in
// tile.h, however tokens arrive, and decode attention against softmax attention in double precision. And how attention's
// work is dealt.
//
// kv_tile_test [SEED [STRIDE]]: STRIDE runs each n-th case only, for slow sanitizers.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "attention/decode.h"
#include "attention/products.h"
#include "check.h"
#include "kv/cache_operations.h"

namespace {

using namespace ph;
using namespace ph::kv;

ph_device* device;
std::mt19937 source_of_random;
uint32_t random_below(uint32_t end) { return source_of_random() % end; }

float float_of(uint32_t dtype, uint16_t bits) { return scale_from_bits(dtype, bits); }
uint16_t bits_of(uint32_t dtype, float value) { return static_cast<uint16_t>(scale_bits(dtype, value)); }

struct Case {
  TileShape shape;
  uint32_t sinks, residual, group;
};

constexpr uint32_t kLayers = 2, kLayer = 1;

// Tokens of one sequence: [parts][tokens][heads][head_dim].
using Tokens = std::vector<uint16_t>;

struct Sequence {
  Tokens parts[kParts];
  uint64_t tokens = 0;
  uint32_t packed = 0;
};

// A cache as the host side keeps it, without ever giving pages back.
class Cache {
 public:
  Cache(const Case& test, uint32_t members, uint64_t most_tokens) : test(test), sequences(members) {
    const TileShape& shape = test.shape;
    view.layers = kLayers;
    view.sequences = members;
    view.heads = shape.heads;
    view.head_dim = shape.head_dim;
    view.query_heads = shape.heads * test.group;
    view.dtype = shape.dtype;
    view.sinks = test.sinks;
    view.ring = test.residual + kBlockTokens;
    view.most_blocks = static_cast<uint32_t>(most_tokens / kBlockTokens);
    const uint64_t bytes =
        view.most_blocks * (kParamsBytes + static_cast<uint64_t>(shape.heads) * largest_record_bytes(shape)) +
        kStreamStart * kUnitBytes;
    view.most_pages = static_cast<uint32_t>(bytes / kPageBytes + 1);
    const size_t streams = kLayers * members, pages = streams * view.most_pages;
    // Nothing may depend on what is in fresh memory.
    pool.assign(pages * kPageBytes, 0xa5);
    recent.assign(streams * kParts * recent_part_bytes(view), 0xa5);
    index.assign(streams * (view.most_blocks * view.heads + 1), 0xa5a5a5a5u);
    for (size_t page = 0; page < pages; ++page) page_tables.push_back(static_cast<uint32_t>(page));
    std::shuffle(page_tables.begin(), page_tables.end(), source_of_random);
    view.pool = pool.data();
    view.recent = recent.data();
    view.index = index.data();
    view.page_tables = page_tables.data();
    for (uint32_t member = 0; member < members; ++member) *index_of(view, kLayer, member) = kStreamStart;
  }
  Cache(const Cache&) = delete;

  size_t row() const { return static_cast<size_t>(view.heads) * view.head_dim; }

  // Appends `counts[i]` of the tokens of sequence `members[i]`, and attends to them where `queries` are given.
  void step(const std::vector<uint32_t>& members, const std::vector<uint32_t>& counts,
            const std::vector<Sequence>& inputs, const std::vector<uint16_t>* queries, float scale,
            std::vector<uint16_t>* out) {
    std::vector<StepSequence> entries;
    std::vector<StepBlock> blocks;
    std::vector<StepPiece> pieces;
    Tokens tensors[kParts];
    StepView step{};
    for (uint32_t i = 0; i < members.size(); ++i) {
      Sequence& sequence = sequences[members[i]];
      const uint64_t length = sequence.tokens + counts[i], kept = test.sinks + test.residual;
      const uint32_t due = length < kept ? 0 : static_cast<uint32_t>((length - kept) / kBlockTokens);
      const uint32_t packed = std::max(due, sequence.packed);
      entries.push_back({members[i], counts[i], sequence.tokens, step.tokens, sequence.packed,
                         packed - sequence.packed, packed});
      for (uint32_t block = sequence.packed; block < packed; ++block) blocks.push_back({i, block});
      const uint32_t cuts = std::min(packed, 2u);
      for (uint32_t place = 0; place < cuts; ++place) {
        const uint32_t first = packed * place / cuts, end = packed * (place + 1) / cuts;
        pieces.push_back({entries[i], i, 0, 0, first, end - first, place, cuts + 1});
      }
      const uint64_t recent = length - static_cast<uint64_t>(packed) * kBlockTokens;
      const uint32_t runs = static_cast<uint32_t>((recent + kRunTokens - 1) / kRunTokens);
      pieces.push_back({entries[i], i, 0, runs, 0, 0, cuts, cuts + 1});
      step.most_pieces = std::max(step.most_pieces, cuts + 1);
      step.most_queries = std::max(step.most_queries, counts[i]);
      for (uint32_t part = 0; part < kParts; ++part) {
        const auto first =
            inputs[members[i]].parts[part].begin() + static_cast<ptrdiff_t>(sequence.tokens * row());
        tensors[part].insert(tensors[part].end(), first, first + static_cast<ptrdiff_t>(counts[i] * row()));
      }
      step.tokens += counts[i];
      sequence.tokens = length;
      sequence.packed = packed;
    }
    step.sequences = entries.data();
    step.blocks = blocks.data();
    step.pieces = pieces.data();
    step.sequence_count = static_cast<uint32_t>(entries.size());
    step.block_count = static_cast<uint32_t>(blocks.size());
    step.piece_count = static_cast<uint32_t>(pieces.size());
    std::vector<uint8_t> workspace(append_workspace_bytes(view, blocks.size()), 0xa5);
    kv::append(*device, view, test.shape, kLayer, step,
               {{reinterpret_cast<const uint8_t*>(tensors[0].data()),
                 reinterpret_cast<const uint8_t*>(tensors[1].data())}},
               workspace.data(), &non_finite);
    if (queries == nullptr) return;
    workspace.assign(attention::decode_workspace_bytes(view, pieces.size()), 0xa5);
    out->assign(queries->size(), 0xa5a5);
    attention::decode(*device, view, test.shape, kLayer, step,
                      reinterpret_cast<const uint8_t*>(queries->data()),
                      reinterpret_cast<uint8_t*>(out->data()), scale, workspace.data());
  }

  // The stream of a sequence's records, without the pages.
  std::vector<uint8_t> stream(uint32_t sequence) const {
    const uint32_t* ends = index_of(view, kLayer, sequence);
    const uint64_t bytes = static_cast<uint64_t>(ends[sequences[sequence].packed * view.heads]) * kUnitBytes;
    std::vector<uint8_t> all;
    for (uint64_t offset = 0; offset < bytes; ++offset) {
      const uint32_t page =
          page_tables[(kLayer * sequences.size() + sequence) * view.most_pages + offset / kPageBytes];
      all.push_back(pool[page * kPageBytes + offset % kPageBytes]);
    }
    return {all.begin() + static_cast<ptrdiff_t>(std::min<size_t>(kUnitBytes, all.size())), all.end()};
  }

  std::vector<uint32_t> ends(uint32_t sequence) const {
    const uint32_t* first = index_of(view, kLayer, sequence);
    return {first, first + sequences[sequence].packed * view.heads + 1};
  }

  Sequence read(uint32_t sequence, uint64_t first, uint64_t count) const {
    Sequence read;
    read.tokens = count;
    for (Tokens& part : read.parts) part.assign(count * row(), 0xa5a5);
    read_tokens(*device, view, test.shape, kLayer, sequence, sequences[sequence].packed, first, count,
                reinterpret_cast<uint8_t*>(read.parts[0].data()),
                reinterpret_cast<uint8_t*>(read.parts[1].data()));
    return read;
  }

  const Case test;
  CacheView view{};
  std::vector<Sequence> sequences;  // only their counts
  uint64_t non_finite = UINT64_MAX;

 private:
  std::vector<uint8_t> pool, recent;
  std::vector<uint32_t> index, page_tables;
};

// ---- tile.h read word by word, sharing no code with it

struct Place {
  uint32_t lane, word, bit;  // of bit 0 of the nibble in N
};

// Where the low four bits of a residual are among a group's nibble words, by the two lines of tile.h.
Place nibble_of(uint32_t part, uint32_t token, uint32_t channel) {
  for (uint32_t g = 0; g < 8; ++g) {
    for (uint32_t i = 0; i < 4; ++i) {
      for (uint32_t s = 0; s < 4; ++s) {
        for (uint32_t j = 0; j < 4; ++j) {
          for (uint32_t b = 0; b < 4; ++b) {
            const bool here = part == PH_KV_KEYS
                                  ? token == 8 * g + 4 * (s / 2) + j && channel == 16 * (s % 2) + 4 * i + b
                                  : token == 16 * i + 8 * (s / 2) + 4 * (s % 2) + b && channel == 8 * j + g;
            if (here) return {4 * g + i, 2 * s + j % 2, 8 * b + 4 * (j / 2)};
          }
        }
      }
    }
  }
  abort();
}

uint32_t read_bit(const uint8_t* group, uint32_t width, uint32_t lane, uint32_t word, uint32_t bit) {
  const bool last = width % 2 == 1 && word >= 2 * width - 2;
  const uint8_t* bytes = group + 512 * (word / 4) + (last ? 8 : 16) * lane + 4 * (word % 4);
  return bytes[bit / 8] >> bit % 8 & 1;
}

uint32_t read_narrow(const uint8_t* group, uint32_t width, Place place) {
  uint32_t value = 0;
  for (uint32_t k = 0; k < width; ++k) {
    uint32_t word = place.word, bit = place.bit + k;
    if (width == 3 && place.word >= 6) word = 3 * (place.word - 6) + k, bit = place.bit + 3;
    if (width == 2) word = place.word / 2, bit = place.bit + 2 * (place.word % 2) + k;
    if (width == 1) word = place.word / 4, bit = place.bit + place.word % 4;
    value |= read_bit(group, width, place.lane, word, bit) << k;
  }
  return value;
}

uint32_t read_residual(const uint8_t* group, uint32_t width, Place place) {
  if (width <= 4) return read_narrow(group, width, place);
  return read_narrow(group, 4, place) | read_narrow(group + 4 * 256, width - 4, place) << 4;
}

uint32_t read_base(const TileShape& shape, uint32_t part, const uint8_t* bases, uint32_t channel) {
  const uint32_t D = shape.head_dim;
  const uint32_t word = part == PH_KV_KEYS ? (channel / 4 % 4) * (D / 16) + channel / 16
                                           : (channel % 8) * (D / 32) + channel / 32;
  const uint32_t byte = part == PH_KV_KEYS ? channel % 4 : channel / 8 % 4;
  if (shape.parts[part].base_bits == 0) return 0;
  if (shape.parts[part].base_bits == 8) return bases[4 * word + byte];
  return bases[4 * (word / 2) + byte] >> (word % 2 == 0 ? 0 : 4) & 15;
}

template <typename T>
T get(const uint8_t* bytes) {
  T value;
  memcpy(&value, bytes, sizeof value);
  return value;
}

bool per_token(const TilePart& part) {
  return part.quantizer == PH_KV_CACHE_PACKKV || part.quantizer == PH_KV_CACHE_FIXED;
}

// Bytes of a part between header and groups.
uint64_t side_bytes(const TileShape& shape, uint32_t part) {
  const uint32_t D = shape.head_dim;
  if (shape.parts[part].quantizer == PH_KV_CACHE_RAW16) return 0;
  if (shape.parts[part].quantizer == PH_KV_CACHE_FIXED || shape.parts[part].quantizer == PH_KV_CACHE_PACKKV)
    return D * shape.parts[part].base_bits / 8;
  return part == PH_KV_KEYS ? 4 * D : 4 * 64 * ((D + 63) / 64);
}

std::vector<Place> places[kParts];  // [token][channel of the group]

double worst_bound = 0;  // |x' - x| / scale

// Checks a sequence's records against its tokens, bit by bit, and returns what they stand for, not rounded:
// [parts][tokens][heads][head_dim], tokens in 16 bits as they are.
std::vector<double> check_records(const Cache& cache, uint32_t member, const Sequence& input, bool extremes) {
  const TileShape& shape = cache.test.shape;
  const uint32_t D = shape.head_dim, heads = shape.heads;
  const std::vector<uint8_t> stream = cache.stream(member);
  const std::vector<uint32_t> ends = cache.ends(member);
  const size_t row = cache.row();
  const uint64_t tokens = cache.sequences[member].tokens;
  std::vector<double> exact(kParts * tokens * row);
  for (uint32_t part = 0; part < kParts; ++part) {
    for (size_t i = 0; i < tokens * row; ++i) {
      exact[part * tokens * row + i] = float_of(shape.dtype, input.parts[part][i]);
    }
  }
  CHECK(ends[0] == 1);
  uint64_t at = 0;
  for (uint32_t block = 0; block < cache.sequences[member].packed; ++block) {
    const uint8_t* params = stream.data() + at;
    const bool has_params = per_token(shape.parts[0]) || per_token(shape.parts[1]);
    if (has_params) at += 2 * 64 * 4 + 16;
    const uint64_t first = cache.test.sinks + 64 * block;
    std::vector<uint8_t> codes(kParts * 64 * row);
    std::vector<Affine> affines[kParts];  // of kivi, in the order of the groups
    float largest_scale = 0;
    for (uint32_t part = 0; part < kParts; ++part) {
      const TilePart& codec = shape.parts[part];
      if (codec.quantizer == PH_KV_CACHE_RAW16) continue;
      // Values of tokens [i, i_end) and channels [c, c_end) share a scale.
      const auto quantize = [&](uint32_t i, uint32_t i_end, size_t c, size_t c_end) {
        const auto value_at = [&](uint32_t token, size_t channel) {
          const float value = float_of(shape.dtype, input.parts[part][(first + token) * row + channel]);
          return std::isfinite(value) ? value : 0.0f;
        };
        float minimum = INFINITY, maximum = -INFINITY;
        for (uint32_t token = i; token < i_end; ++token) {
          for (size_t channel = c; channel < c_end; ++channel) {
            minimum = std::min(minimum, value_at(token, channel));
            maximum = std::max(maximum, value_at(token, channel));
          }
        }
        const Affine affine = tile_affine(shape, part, minimum, maximum);
        for (uint32_t token = i; token < i_end; ++token) {
          for (size_t channel = c; channel < c_end; ++channel) {
            const float value = value_at(token, channel);
            const float code = quantize_value(value, affine, static_cast<float>(codec.code_limit));
            codes[(part * 64 + token) * row + channel] = static_cast<uint8_t>(code);
            const double restored = (static_cast<double>(code) + affine.zero) * affine.scale;
            exact[(part * tokens + first + token) * row + channel] = restored;
            const double slack = 2e-7 * std::max(std::fabs(minimum), std::fabs(maximum));
            if (extremes) continue;  // may lie further apart than scales reach
            worst_bound = std::max(worst_bound, (std::fabs(restored - value) - slack) / affine.scale);
          }
        }
        return affine;
      };
      if (per_token(codec)) {
        for (uint32_t i = 0; i < 64; ++i) {
          const Affine affine = quantize(i, i + 1, 0, row);
          CHECK(get<uint16_t>(params + 256 * part + 2 * i) == bits_of(shape.dtype, affine.scale));
          CHECK(get<int16_t>(params + 256 * part + 128 + 2 * i) == affine.zero);
          if (part == PH_KV_VALUES) largest_scale = std::max(largest_scale, affine.scale);
        }
      } else if (part == PH_KV_KEYS) {
        for (size_t channel = 0; channel < row; ++channel)
          affines[part].push_back(quantize(0, 64, channel, channel + 1));
      } else {
        for (size_t head = 0; head < heads; ++head) {
          for (size_t begin = head * D; begin < (head + 1) * D; begin += 64) {
            for (uint32_t i = 0; i < 64; ++i)
              affines[part].push_back(quantize(i, i + 1, begin, std::min(begin + 64, (head + 1) * D)));
          }
        }
      }
    }
    if (has_params) {
      CHECK(get<float>(params + 512) == largest_scale);
      for (uint32_t i = 516; i < 528; ++i) CHECK(params[i] == 0);
      for (uint32_t part = 0; part < kParts; ++part) {
        for (uint32_t i = 0; i < 256 && !per_token(shape.parts[part]); ++i)
          CHECK(params[256 * part + i] == 0);
      }
    }

    for (uint32_t head = 0; head < heads; ++head) {
      const uint8_t* record = stream.data() + at;
      uint64_t bases = at + 16, groups = bases;
      for (uint32_t part = 0; part < kParts; ++part) groups += side_bytes(shape, part);
      CHECK(get<uint64_t>(record + 8) == 0);
      for (uint32_t part = 0; part < kParts; ++part) {
        const uint32_t widths = get<uint32_t>(record + 4 * part), fixed = shape.parts[part].width;
        const bool is_kivi = shape.parts[part].quantizer == PH_KV_CACHE_KIVI;
        if (shape.parts[part].quantizer == PH_KV_CACHE_RAW16) {
          CHECK(widths == 0);
          continue;
        }
        if (is_kivi) {
          const size_t count = affines[part].size() / heads;
          CHECK(side_bytes(shape, part) == 4 * count);
          for (size_t i = 0; i < count; ++i) {
            const Affine& affine = affines[part][head * count + i];
            CHECK(get<uint16_t>(stream.data() + bases + 2 * i) == bits_of(shape.dtype, affine.scale));
            CHECK(get<int16_t>(stream.data() + bases + 2 * (count + i)) == affine.zero);
          }
        }
        for (uint32_t group = 0; group < D / 32; ++group) {
          uint32_t widest = 0;
          const uint32_t width = widths >> 4 * group & 15;
          for (uint32_t channel = 32 * group; channel < 32 * group + 32; ++channel) {
            const uint8_t* of_channel = codes.data() + part * 64 * row + head * D + channel;
            uint32_t smallest = 255;
            for (uint32_t i = 0; i < 64; ++i) smallest = std::min<uint32_t>(smallest, of_channel[i * row]);
            const uint32_t base = fixed > 0 ? 0 : smallest;
            CHECK(is_kivi || read_base(shape, part, stream.data() + bases, channel) == base);
            for (uint32_t i = 0; i < 64; ++i) {
              const uint32_t residual =
                  read_residual(stream.data() + groups, width, places[part][i * 32 + channel % 32]);
              CHECK(base + residual == of_channel[i * row]);
              widest = std::max(widest, residual);
            }
          }
          CHECK(width == (fixed > 0 ? fixed : bit_width(widest)));
          groups += 256 * width;
        }
        CHECK(D / 32 == 8 || widths >> D / 8 == 0);
        bases += side_bytes(shape, part);
      }
      for (uint32_t part = 0; part < kParts; ++part) {
        if (shape.parts[part].quantizer != PH_KV_CACHE_RAW16) continue;
        const auto value_of = [&](uint32_t token, uint32_t channel) {
          return input.parts[part][(first + token) * row + head * D + channel];
        };
        for (uint32_t fragment = 0; fragment < D / 4; ++fragment) {
          for (uint32_t place = 0; place < 256; ++place, groups += 2) {
            const uint32_t g = place / 32, i = place / 8 % 4, r = place / 2 % 4, h = place % 2;
            const uint32_t begin = fragment / 4 * 16, f = fragment % 4;
            const uint16_t expected =
                part == PH_KV_KEYS ? value_of(8 * g + 2 * f + r % 2, begin + 4 * i + 2 * (r / 2) + h)
                                   : value_of(16 * i + 4 * f + 2 * (r / 2) + h, begin + 8 * (r % 2) + g);
            CHECK(get<uint16_t>(stream.data() + groups) == expected);
          }
        }
      }
      at = groups;
      CHECK(at % 16 == 0 && ends[block * heads + head + 1] == at / 16 + 1);
    }
  }
  CHECK(at == stream.size());
  return exact;
}

// ---- attention

struct Error {
  double raw = 0, beyond_rounding = 0;  // relative, L2
};
Error worst[2];  // by dtype

// Softmax attention of one query over the tokens that it may see; adds the squared errors of `out`.
void check_attention(const Cache& cache, const std::vector<double>& exact, uint64_t tokens,
                     uint32_t query_head, uint64_t visible, const uint16_t* query, const uint16_t* out,
                     double scale, double sums[3]) {
  const uint32_t D = cache.view.head_dim, dtype = cache.view.dtype;
  const size_t row = cache.row(), head = query_head / cache.test.group * D;
  std::vector<double> weights(visible), expected(D);
  double largest = -INFINITY, total = 0;
  for (uint64_t token = 0; token < visible; ++token) {
    double dot = 0;
    for (uint32_t channel = 0; channel < D; ++channel) {
      dot += float_of(dtype, query[channel]) * exact[token * row + head + channel];
    }
    largest = std::max(largest, weights[token] = dot * scale);
  }
  for (double& weight : weights) total += weight = std::exp(weight - largest);
  for (uint64_t token = 0; token < visible; ++token) {
    const double* value = exact.data() + (tokens + token) * row + head;
    for (uint32_t channel = 0; channel < D; ++channel)
      expected[channel] += weights[token] / total * value[channel];
  }
  for (uint32_t channel = 0; channel < D; ++channel) {
    const double error = std::fabs(float_of(dtype, out[channel]) - expected[channel]);
    CHECK(std::isfinite(error));
    const double half_step =
        std::max(std::fabs(expected[channel]) * (dtype == PH_F16 ? 0x1p-11 : 0x1p-8), 0x1p-25);
    sums[0] += error * error;
    sums[1] += std::pow(std::max(0.0, error - half_step), 2);
    sums[2] += expected[channel] * expected[channel];
  }
}

// ---- cases

// Tokens as a model's are: channels with offsets and outliers; and tokens that quantisers trip over.
Sequence random_tokens(const Case& test, uint64_t tokens) {
  Sequence made;
  made.tokens = tokens;
  const uint32_t channels = test.shape.heads * test.shape.head_dim;
  for (Tokens& part : made.parts) {
    for (uint64_t token = 0; token < tokens; ++token) {
      const uint32_t kind = random_below(50);
      for (uint32_t channel = 0; channel < channels; ++channel) {
        float value = 0;
        for (int j = 0; j < 4; ++j) value += static_cast<float>(random_below(65536)) / 32768.0f - 1.0f;
        if (channel % 37 == 3) value = value * 2 + 6;
        if (channel % 64 > 40) value *= 0.1f;
        if (kind == 0) value = 0;
        if (kind == 1) value = -2.5f;
        if (kind == 2) value *= 1e-7f;
        if (kind == 3) value = 900 + value * 0.01f;
        made.parts[&part - made.parts].push_back(bits_of(test.shape.dtype, value));
      }
    }
  }
  return made;
}

void run(const Case& test, bool extremes) {
  const uint32_t members = 2;
  const uint64_t kept = test.sinks + test.residual;
  std::vector<Sequence> inputs;
  uint64_t most = 0;
  for (uint32_t member = 0; member < members; ++member) {
    inputs.push_back(random_tokens(test, kept + 64 * (2 + random_below(3)) + random_below(64)));
    most = std::max(most, inputs[member].tokens);
  }
  uint64_t first_bad = UINT64_MAX;
  if (extremes) {
    const uint64_t bad = test.sinks + random_below(64), limit = test.shape.dtype == PH_F16 ? 0x7bff : 0x7f7f;
    const uint16_t infinity = test.shape.dtype == PH_F16 ? 0xfc00 : 0xff80;
    const size_t row = static_cast<size_t>(test.shape.heads) * test.shape.head_dim;
    const uint32_t bad_part = random_below(2);
    inputs[1].parts[bad_part][bad * row + random_below(static_cast<uint32_t>(row))] = infinity;
    inputs[1].parts[1][(bad + 2) * row] = infinity | 1;
    // raw16 keeps them.
    const auto is_raw = [&](uint32_t part) { return test.shape.parts[part].quantizer == PH_KV_CACHE_RAW16; };
    if (!is_raw(1)) first_bad = 1ull << 40 | (bad + 2);
    if (!is_raw(bad_part)) first_bad = 1ull << 40 | bad;
    inputs[0].parts[0][(test.sinks + 5) * row] = static_cast<uint16_t>(limit);
    inputs[0].parts[0][(test.sinks + 5) * row + 1] = static_cast<uint16_t>(limit | 0x8000);
  }

  // All at once, and in chunks of both sequences, the last of which attends.
  Cache once(test, members, most), chunks(test, members, most), single(test, members, most);
  for (uint32_t member = 0; member < members; ++member) {
    once.step({member}, {static_cast<uint32_t>(inputs[member].tokens)}, inputs, nullptr, 0, nullptr);
    while (single.sequences[member].tokens < inputs[member].tokens)
      single.step({member}, {1}, inputs, nullptr, 0, nullptr);
  }
  std::vector<uint16_t> queries, out;
  const uint32_t queries_of[members] = {1 + random_below(8), 1 + random_below(8)};
  const float scale =
      (random_below(8) == 0 ? 2.0f : 0.3f) / std::sqrt(static_cast<float>(test.shape.head_dim));
  while (true) {
    std::vector<uint32_t> who, counts;
    for (uint32_t member = 0; member < members; ++member) {
      const uint64_t left = inputs[member].tokens - chunks.sequences[member].tokens;
      if (left <= queries_of[member]) continue;
      who.push_back(member);
      counts.push_back(
          1 + random_below(static_cast<uint32_t>(std::min<uint64_t>(left - queries_of[member], 150))));
    }
    if (who.empty()) break;
    chunks.step(who, counts, inputs, nullptr, 0, nullptr);
  }
  const uint32_t D = test.shape.head_dim, query_heads = once.view.query_heads;
  for (uint32_t i = 0; i < (queries_of[0] + queries_of[1]) * query_heads * D; ++i) {
    queries.push_back(bits_of(test.shape.dtype, static_cast<float>(random_below(4001)) / 1000.0f - 2.0f));
  }
  chunks.step({1, 0}, {queries_of[1], queries_of[0]}, inputs, &queries, scale, &out);

  uint32_t token_in_step = 0;
  double sums[3] = {};
  for (uint32_t member : {1u, 0u}) {
    CHECK(once.sequences[member].packed >= 2);
    const std::vector<double> exact = check_records(once, member, inputs[member], extremes);
    for (const Cache* other : {&chunks, &single}) {
      CHECK(once.ends(member) == other->ends(member));
      CHECK(once.stream(member) == other->stream(member));
    }
    const uint64_t tokens = inputs[member].tokens;
    const Sequence all = once.read(member, 0, tokens);
    const float most_finite = test.shape.dtype == PH_F16 ? 65504.0f : 0x1.fep127f;
    for (uint32_t part = 0; part < kParts; ++part) {
      if (test.shape.parts[part].quantizer == PH_KV_CACHE_RAW16) {
        CHECK(all.parts[part] == inputs[member].parts[part]);
        continue;
      }
      for (size_t i = 0; i < tokens * once.row(); ++i) {
        // (code + zero) * scale has at most 27 bits; NaN and infinities stay in recent tokens only.
        const double value = exact[part * tokens * once.row() + i];
        if (!std::isfinite(value)) continue;
        const float clamped = std::clamp(static_cast<float>(value), -most_finite, most_finite);
        CHECK(all.parts[part][i] == bits_of(test.shape.dtype, clamped));
      }
    }
    const uint64_t from = random_below(static_cast<uint32_t>(tokens)),
                   count = 1 + random_below(static_cast<uint32_t>(tokens - from));
    for (const Cache* other : {&chunks, &single}) {
      const Sequence some = other->read(member, from, count);
      for (uint32_t part = 0; part < kParts; ++part) {
        CHECK(std::equal(some.parts[part].begin(), some.parts[part].end(),
                         all.parts[part].begin() + static_cast<ptrdiff_t>(from * once.row())));
      }
    }
    for (uint32_t j = 0; j < queries_of[member] && !extremes; ++j, ++token_in_step) {
      for (uint32_t head = 0; head < query_heads; ++head) {
        const size_t at = (static_cast<size_t>(token_in_step) * query_heads + head) * D;
        check_attention(chunks, exact, tokens, head, tokens - queries_of[member] + j + 1, queries.data() + at,
                        out.data() + at, scale, sums);
      }
    }
    // Restored tokens are what was read.
    const uint32_t block = single.sequences[member].packed - 1;
    restore_tokens(*device, single.view, test.shape, kLayer, member, block, 64);
    single.sequences[member].packed = block;
    const uint64_t start = test.sinks + 64 * block;
    const Sequence restored = single.read(member, start, 64);
    CHECK(std::equal(restored.parts[1].begin(), restored.parts[1].end(),
                     all.parts[1].begin() + static_cast<ptrdiff_t>(start * once.row())));
  }
  CHECK(once.non_finite == first_bad && chunks.non_finite == first_bad && single.non_finite == first_bad);
  if (extremes) return;
  Error& error = worst[test.shape.dtype];
  error.raw = std::max(error.raw, std::sqrt(sums[0] / sums[2]));
  error.beyond_rounding = std::max(error.beyond_rounding, std::sqrt(sums[1] / sums[2]));
  CHECK(std::sqrt(sums[1] / sums[2]) <= 1e-3);
  CHECK(test.shape.dtype == PH_BF16 || std::sqrt(sums[0] / sums[2]) <= 1e-3);

  // A sequence's results do not depend on the batch.
  Cache alone(test, members, most);
  alone.step({0}, {static_cast<uint32_t>(inputs[0].tokens) - queries_of[0]}, inputs, nullptr, 0, nullptr);
  const size_t begin = static_cast<size_t>(queries_of[1]) * query_heads * D;
  const std::vector<uint16_t> own(queries.begin() + static_cast<ptrdiff_t>(begin), queries.end());
  std::vector<uint16_t> own_out;
  alone.step({0}, {queries_of[0]}, inputs, &own, scale, &own_out);
  CHECK(std::equal(own_out.begin(), own_out.end(), out.begin() + static_cast<ptrdiff_t>(begin)));
}

struct Setting {
  uint32_t quantizer;
  float rel;
  uint32_t width;
};

TilePart part_of(uint32_t head_dim, const Setting& setting) {
  TilePart part{};
  part.quantizer = setting.quantizer;
  if (setting.quantizer == PH_KV_CACHE_RAW16) return part;
  part.rel = setting.rel;
  part.width = setting.width;
  part.code_limit = setting.width > 0
                        ? (1u << setting.width) - 1
                        : std::min(255u, static_cast<uint32_t>(std::ceil(1.0f / setting.rel)) + 1);
  if (setting.quantizer != PH_KV_CACHE_PACKKV) return part;
  part.base_bits = part.code_limit <= 15 && head_dim % 64 == 0 ? 4 : 8;
  return part;
}

// Shares of runs and packed blocks hold each block once and none more than they have room for. Where there is room and
// blocks enough to make up for runs, they take as long as each other.
void check_shares() {
  for (uint32_t i = 0; i < 100'000; ++i) {
    const uint32_t shares = 1 + random_below(40), batch = 1 + random_below(2),
                   room = batch * (1 + random_below(80)), blocks = random_below(shares * room + 1),
                   runs = random_below(i % 2 == 0 ? 20 : 5000),
                   round_up = random_below(2) * (shares - 1);  // the first shares get a run more, or the last
    const uint32_t work = (blocks + batch - 1) / batch * batch + kRunBlocks * runs;
    uint32_t block = 0, run = 0;
    for (uint32_t at = 0; at < shares; ++at) {
      const uint32_t run_end = (runs * (at + 1) + round_up) / shares,
                     end = share_end<uint32_t>(blocks, runs, block, run_end, at, shares, room, batch);
      CHECK(block <= end && end <= blocks && end - block <= room);
      const uint32_t own = end - block + kRunBlocks * (run_end - run);
      if (work / shares < room && blocks >= kRunBlocks * shares) {
        CHECK(own * shares <= work + (1 + batch) * shares);
        CHECK((own + 1 + batch) * shares >= work);
      }
      block = end, run = run_end;
    }
    CHECK(block == blocks);
  }
}

// The products' shares of units hold each once, and differ by one at most; so do the runs of as many units in a row.
void check_unit_shares() {
  const auto random_size = [] { return 1 + random_below(1u << random_below(26)); };
  for (uint32_t i = 0; i < 20'000; ++i) {
    const uint32_t units = random_size(),
                   runs = i % 16 == 0 ? units : random_below(std::min(units, 5000u) + 1),
                   shares = random_size();
    const attention::UnitShares dealt(units, runs, shares);
    CHECK(dealt.first_unit(0) == 0 && dealt.first_unit(shares) == units);
    CHECK(dealt.runs_before(0) == 0 && dealt.runs_before(units) == runs);
    for (uint32_t j = 0; j < 8; ++j) {
      const uint32_t share = random_below(shares),
                     own = dealt.first_unit(share + 1) - dealt.first_unit(share);
      CHECK(units / shares <= own && own <= units / shares + 1);
      const uint32_t unit = random_below(units), in_a_row = 1 + random_below(units - unit);
      const uint64_t even = uint64_t{in_a_row} * runs / units;
      const uint32_t found = dealt.runs_before(unit + in_a_row) - dealt.runs_before(unit);
      CHECK(even <= found && found <= even + 1);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const uint32_t seed = argc > 1 ? static_cast<uint32_t>(strtoul(argv[1], nullptr, 10)) : 20261124;
  const uint32_t stride = argc > 2 ? static_cast<uint32_t>(strtoul(argv[2], nullptr, 10)) : 1;
  printf("seed %u\n", seed);
  source_of_random.seed(seed);
  check_shares();
  check_unit_shares();
  device = open_device(0);
  for (uint32_t part = 0; part < kParts; ++part) {
    for (uint32_t token = 0; token < 64; ++token) {
      for (uint32_t channel = 0; channel < 32; ++channel)
        places[part].push_back(nibble_of(part, token, channel));
    }
  }
  constexpr uint32_t kPackkv = PH_KV_CACHE_PACKKV, kFixed = PH_KV_CACHE_FIXED, kKivi = PH_KV_CACHE_KIVI;
  const Setting settings[] = {{kPackkv, 0.1f, 0},
                              {kPackkv, 0.2f, 0},
                              {kPackkv, 1.0f / 254.0f, 0},
                              {kFixed, 0, 2},
                              {kFixed, 0, 3},
                              {kFixed, 0, 4},
                              {kFixed, 0, 8},
                              {kPackkv, 0.03f, 0},
                              {kFixed, 0, 1},
                              {PH_KV_CACHE_RAW16, 0, 0},
                              {kKivi, 0, 2},
                              {kKivi, 0, 4},
                              {kKivi, 0, 7},
                              {PH_KV_CACHE_RAW16, 0, 0}};
  uint32_t cases = 0, at = 0;
  for (uint32_t head_dim : {64u, 96u, 128u, 256u}) {
    for (uint32_t heads : {1u, 2u, 5u}) {
      for (uint32_t dtype : {PH_F16, PH_BF16}) {
        for (const Setting& setting : settings) {
          const Setting& other = settings[random_below(std::size(settings))];
          const Case test = {{heads, head_dim, dtype, {part_of(head_dim, setting), part_of(head_dim, other)}},
                             random_below(2) * 4,
                             random_below(2) == 0 ? 64u : 100u,
                             1 + random_below(16)};
          if (at++ % stride != 0) continue;
          run(test, false);
          if (cases++ % 8 == 0) run(test, true);
        }
      }
    }
  }
  close_device(device);
  CHECK(worst_bound <= 0.5);
  printf("%u cases; |x' - x| <= %.4f scale\n", cases, worst_bound);
  for (uint32_t dtype : {PH_F16, PH_BF16}) {
    printf("decode, %s: relative L2 error %.2e, %.2e beyond the rounding of outputs\n",
           dtype == PH_F16 ? "f16" : "bf16", worst[dtype].raw, worst[dtype].beyond_rounding);
  }
  return 0;
}
