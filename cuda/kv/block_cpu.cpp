// The codec's work on one block, on one CPU core; see block_cpu.h.
//
// Compiled once per instruction set with PH_INSTRUCTION_SET set to its name. All arithmetic is IEEE float32
// with contraction off (CMakeLists.txt), so the wider forms give the same bits.
//
// Vectors are as wide as the instruction set's registers (vector_cpu.h).
#include "kv/block_cpu.h"

#include <vector>

#include "common/vector_cpu.h"

namespace ph::kv::PH_INSTRUCTION_SET {

using namespace ph::PH_INSTRUCTION_SET;

namespace {

constexpr uint32_t kLanes = kVectorLanes;  // head_dim is a multiple of it
constexpr uint32_t kMaximumHeadDim = 256;
using Bytes = uint8_t __attribute__((vector_size(kVectorBytes)));
using Bytes16 = uint8_t __attribute__((vector_size(16)));

Floats floats_of_codes(const uint8_t* codes) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtepi32_ps(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
#else
  Floats x;
  for (uint32_t lane = 0; lane < kLanes; ++lane) x[lane] = codes[lane];
  return x;
#endif
}

// ---- elements

struct F16 : ph::PH_INSTRUCTION_SET::F16 {
  static constexpr uint32_t kBytes = 2;
  static constexpr float kLargest = 65504.0f;
};

struct BF16 : ph::PH_INSTRUCTION_SET::BF16 {
  static constexpr uint32_t kBytes = 2;
  static constexpr float kLargest = 0x1.fep127f;
};

struct F32 {
  static constexpr uint32_t kBytes = 4;
  static constexpr float kLargest = 0x1.fffffep127f;
  static Floats read(const uint8_t* source) { return load<Floats>(source); }
  static void write(uint8_t* target, Floats x) { store(target, x); }
};

template <typename Run>
auto with_element(uint32_t dtype, Run run) {
  if (dtype == PH_F16) return run(F16{});
  if (dtype == PH_BF16) return run(BF16{});
  return run(F32{});
}

uint64_t row_offset(const Codec& codec, uint64_t block, uint32_t head, uint32_t token) {
  return (head * codec.tokens + block * kBlockTokens + token) * codec.head_dim * codec.element_bytes;
}

// ---- step 1: quantise

struct Extremes {
  Floats minimum = splat(__builtin_inff());
  Floats maximum = splat(-__builtin_inff());
  Floats non_finite = {};  // stays 0 while everything is finite: x * 0 is NaN for a NaN or an infinity

  void add(Floats x) {
    minimum = x < minimum ? x : minimum;
    maximum = x > maximum ? x : maximum;
    non_finite += x * 0.0f;
  }
};

// A part of a block of a tensor of `Element`, and where its quantisation goes.
template <typename Element>
struct Quantizer {
  const Codec& codec;
  const uint32_t part;
  const uint8_t* const x;
  const uint64_t block;
  uint8_t* const codes;
  float* const scales;
  int32_t* const zeros;
  uint64_t first_non_finite = kNothing;

  const uint8_t* row(uint32_t head, uint32_t token) const {
    return x + row_offset(codec, block, head, token);
  }
  uint8_t* code_row(uint32_t head, uint32_t token) const {
    return codes + token * codec.channels + head * codec.head_dim;
  }

  static void add_row(Extremes& extremes, const uint8_t* row, uint32_t begin, uint32_t end) {
    for (uint32_t channel = begin; channel < end; channel += kLanes) {
      extremes.add(Element::read(row + channel * Element::kBytes));
    }
  }

  void quantize_row(const uint8_t* row, uint32_t begin, uint32_t end, Affine affine, uint8_t* target) const {
    const Floats scale = splat(affine.scale), zero = splat(affine.zero);
    for (uint32_t channel = begin; channel < end; channel += kLanes) {
      store_codes(target + channel, quantized(Element::read(row + channel * Element::kBytes), scale, zero));
    }
  }

  Floats quantized(Floats value, Floats scale, Floats zero) const {
    const Floats limit = splat(static_cast<float>(codec.code_limit[part]));
    Floats code = round_lanes(value / scale) - zero;
    code = code < 0.0f ? Floats{} : code;
    return code > limit ? limit : code;
  }

  static bool finite(const uint8_t* row, uint32_t channel) {
    return Element::read(row + channel / kLanes * kLanes * Element::kBytes)[channel % kLanes] * 0.0f == 0.0f;
  }

  void report(uint32_t head, uint32_t token) {
    const uint64_t place = non_finite_place(block * kBlockTokens + token, head, part);
    if (place < first_non_finite) first_non_finite = place;
  }

  // Scale and zero point of a group of whole vectors; where it is not finite, reports the group at `head` and
  // `token` and returns a harmless scale.
  Affine close_group(uint32_t group, const Extremes& extremes, uint32_t head, uint32_t token) {
    float minimum = extremes.minimum[0], maximum = extremes.maximum[0], non_finite = extremes.non_finite[0];
    for (uint32_t lane = 1; lane < kLanes; ++lane) {
      minimum = extremes.minimum[lane] < minimum ? extremes.minimum[lane] : minimum;
      maximum = extremes.maximum[lane] > maximum ? extremes.maximum[lane] : maximum;
      non_finite += extremes.non_finite[lane];
    }
    const bool usable = non_finite == 0.0f && group_finite(minimum, maximum);
    if (!usable) report(head, token);
    const Affine affine = usable ? group_affine(codec, part, minimum, maximum) : Affine{1.0f, 0.0f};
    scales[group] = affine.scale;
    zeros[group] = static_cast<int32_t>(affine.zero);
    return affine;
  }

  // packkv, per token: one group over all heads.
  void tokens() {
    for (uint32_t token = 0; token < kBlockTokens; ++token) {
      Extremes extremes;
      for (uint32_t head = 0; head < codec.heads; ++head)
        add_row(extremes, row(head, token), 0, codec.head_dim);
      const Affine affine = close_group(token, extremes, first_bad_head(extremes, token), token);
      for (uint32_t head = 0; head < codec.heads; ++head) {
        quantize_row(row(head, token), 0, codec.head_dim, affine, code_row(head, token));
      }
    }
  }

  // The lowest head of a token with a non-finite value; 0 where there is none.
  uint32_t first_bad_head(const Extremes& extremes, uint32_t token) const {
    bool any = false;
    for (uint32_t lane = 0; lane < kLanes; ++lane) any |= !(extremes.non_finite[lane] == 0.0f);
    if (!any) return 0;
    for (uint32_t head = 0; head < codec.heads; ++head) {
      for (uint32_t channel = 0; channel < codec.head_dim; ++channel) {
        if (!finite(row(head, token), channel)) return head;
      }
    }
    return 0;
  }

  // Groups of at most `width` channels of one token and head.
  void segments(uint32_t width) {
    for (uint32_t head = 0; head < codec.heads; ++head) {
      for (uint32_t token = 0; token < kBlockTokens; ++token) {
        for (uint32_t begin = 0; begin < codec.head_dim; begin += width) {
          const uint32_t end = begin + width < codec.head_dim ? begin + width : codec.head_dim;
          Extremes extremes;
          add_row(extremes, row(head, token), begin, end);
          const Affine affine =
              close_group(group_index(codec, part, head, token, begin), extremes, head, token);
          quantize_row(row(head, token), begin, end, affine, code_row(head, token));
        }
      }
    }
  }

  // kivi keys: each lane of a vector is a group over the block's tokens.
  void channels() {
    for (uint32_t head = 0; head < codec.heads; ++head) {
      for (uint32_t channel = 0; channel < codec.head_dim; channel += kLanes) {
        Extremes extremes;
        for (uint32_t token = 0; token < kBlockTokens; ++token)
          add_row(extremes, row(head, token), channel, channel + kLanes);
        Floats scale, zero;
        for (uint32_t lane = 0; lane < kLanes; ++lane) {
          Extremes one;
          one.minimum = splat(extremes.minimum[lane]);
          one.maximum = splat(extremes.maximum[lane]);
          one.non_finite = splat(extremes.non_finite[lane]);
          const Affine affine = close_group(group_index(codec, part, head, 0, channel + lane), one, head,
                                            first_bad_token(one, head, channel + lane));
          scale[lane] = affine.scale;
          zero[lane] = affine.zero;
        }
        for (uint32_t token = 0; token < kBlockTokens; ++token) {
          const Floats value = Element::read(row(head, token) + channel * Element::kBytes);
          store_codes(code_row(head, token) + channel, quantized(value, scale, zero));
        }
      }
    }
  }

  uint32_t first_bad_token(const Extremes& one, uint32_t head, uint32_t channel) const {
    if (one.non_finite[0] == 0.0f) return 0;
    for (uint32_t token = 0; token < kBlockTokens; ++token) {
      if (!finite(row(head, token), channel)) return token;
    }
    return 0;
  }

  void run() {
    if (codec.quantizer == PH_KV_PACKKV) {
      codec.grouping == PH_KV_PER_TOKEN ? tokens() : segments(codec.head_dim);
    } else {
      part == PH_KV_KEYS ? channels() : segments(kGroupChannels);
    }
  }
};

uint64_t quantize(const Codec& codec, uint32_t part, const void* x, uint64_t block, uint8_t* codes,
                  float* scales, int32_t* zeros) {
  return with_element(codec.dtype, [&](auto element) {
    Quantizer<decltype(element)> quantizer{codec,  part, static_cast<const uint8_t*>(x), block, codes,
                                           scales, zeros};
    quantizer.run();
    return quantizer.first_non_finite;
  });
}

template <typename Element>
Floats restore(const uint8_t* codes, Floats scale, Floats zero) {
  Floats x = (floats_of_codes(codes) + zero) * scale;
  x = x > Element::kLargest ? splat(Element::kLargest) : x;
  return x < -Element::kLargest ? splat(-Element::kLargest) : x;
}

template <typename Element>
void dequantize_block(const Codec& codec, uint32_t part, const uint8_t* codes, const float* scales,
                      const int32_t* zeros, uint64_t block, uint8_t* x) {
  const bool by_channel = per_channel(codec, part);
  for (uint32_t head = 0; head < codec.heads; ++head) {
    for (uint32_t token = 0; token < kBlockTokens; ++token) {
      const uint8_t* code_row = codes + token * codec.channels + head * codec.head_dim;
      uint8_t* row = x + row_offset(codec, block, head, token);
      for (uint32_t begin = 0; begin < codec.head_dim; begin += kGroupChannels) {
        const uint32_t end =
            begin + kGroupChannels < codec.head_dim ? begin + kGroupChannels : codec.head_dim;
        const uint32_t group = group_index(codec, part, head, token, begin);
        Floats scale = splat(scales[group]), zero = splat(static_cast<float>(zeros[group]));
        for (uint32_t channel = begin; channel < end; channel += kLanes) {
          if (by_channel) {
            scale = load<Floats>(scales + group + channel - begin);
            zero = __builtin_convertvector(load<Integers>(zeros + group + channel - begin), Floats);
          }
          Element::write(row + channel * Element::kBytes, restore<Element>(code_row + channel, scale, zero));
        }
      }
    }
  }
}

void dequantize(const Codec& codec, uint32_t part, const uint8_t* codes, const float* scales,
                const int32_t* zeros, uint64_t block, void* x) {
  with_element(codec.dtype, [&](auto element) {
    dequantize_block<decltype(element)>(codec, part, codes, scales, zeros, block, static_cast<uint8_t*>(x));
  });
}

// ---- step 2: repack

void identity_order(uint8_t* order) {
  for (uint32_t position = 0; position < kBlockTokens; ++position)
    order[position] = static_cast<uint8_t>(position);
}

bool is_identity(const uint8_t* order) {
  uint32_t moved = 0;
  for (uint32_t position = 0; position < kBlockTokens; ++position) moved |= order[position] ^ position;
  return moved == 0;
}

// Lower median of n codes: the smallest value that (n - 1) / 2 + 1 codes do not exceed.
uint32_t lower_median(const uint8_t* codes, uint32_t n) {
  uint32_t low = 0, high = 255;
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    uint32_t count = 0;
    for (uint32_t i = 0; i < n; ++i) count += codes[i] <= middle;
    if (count >= (n - 1) / 2 + 1) high = middle;
    else low = middle + 1;
  }
  return low;
}

void median_order(const Codec& codec, const uint8_t* value_codes, uint8_t* order) {
  uint32_t medians[kBlockTokens];
  for (uint32_t token = 0; token < kBlockTokens; ++token) {
    medians[token] = lower_median(value_codes + token * codec.channels, codec.channels);
  }
  for (uint32_t token = 0; token < kBlockTokens; ++token) {
    uint32_t rank = 0;
    for (uint32_t other = 0; other < kBlockTokens; ++other) {
      rank += medians[other] > medians[token] || (medians[other] == medians[token] && other < token);
    }
    order[rank] = static_cast<uint8_t>(token);
  }
}

// Sums of products of codes; 32-bit partial sums hold 32,768 of them.
uint64_t dot(const uint8_t* a, const uint8_t* b, uint32_t n) {
  uint64_t total = 0;
  for (uint32_t begin = 0; begin < n; begin += 32768) {
    const uint32_t end = begin + 32768 < n ? begin + 32768 : n;
    uint32_t sum = 0;
    for (uint32_t i = begin; i < end; ++i) sum += static_cast<uint32_t>(a[i] * b[i]);
    total += sum;
  }
  return total;
}

// Sum over channels of bit_width(max - min) once `candidate` joins a pack with these extremes, for n codes
// below 2^kLevels, n a multiple of kVectorBytes. The width of a range is the number of powers of two that it reaches.
template <int kLevels>
uint32_t pack_cost(const uint8_t* minimum, const uint8_t* maximum, const uint8_t* candidate, uint32_t n) {
  uint32_t total = 0;
  uint32_t begin = 0;
  while (begin < n) {
    // 31 widths of at most 8 fit a byte.
    const uint32_t end = begin + 31 * kVectorBytes < n ? begin + 31 * kVectorBytes : n;
    Bytes sums = {};
    for (; begin < end; begin += kVectorBytes) {
      const Bytes code = load<Bytes>(candidate + begin);
      const Bytes lowest = load<Bytes>(minimum + begin), highest = load<Bytes>(maximum + begin);
      const Bytes range = (highest > code ? highest : code) - (lowest < code ? lowest : code);
#pragma GCC unroll 8
      for (int level = 0; level < kLevels; ++level) {
        const uint8_t below = static_cast<uint8_t>((1 << level) - 1);
        sums -= (Bytes)(range > below);
      }
    }
    for (uint32_t lane = 0; lane < kVectorBytes; ++lane) total += sums[lane];
  }
  return total;
}

void greedy_order(const Codec& codec, const uint8_t* key_codes, const uint8_t* value_codes, uint8_t* order) {
  const uint32_t n = round_up(2 * codec.channels, kVectorBytes);  // padded with zeros, which cost nothing
  std::vector<uint8_t> scratch(static_cast<size_t>(kBlockTokens + 3) * n);
  std::vector<uint32_t> sums(n);
  uint8_t* codes = scratch.data();
  uint8_t* mean = codes + static_cast<size_t>(kBlockTokens) * n;
  uint8_t* minimum = mean + n;
  uint8_t* maximum = minimum + n;
  uint64_t norms[kBlockTokens];
  uint8_t left[kBlockTokens];
  uint32_t remaining = kBlockTokens;
  uint8_t every_code = 0;
  for (uint32_t token = 0; token < kBlockTokens; ++token) {
    uint8_t* row = codes + static_cast<size_t>(token) * n;
    memcpy(row, key_codes + token * codec.channels, codec.channels);
    memcpy(row + codec.channels, value_codes + token * codec.channels, codec.channels);
    norms[token] = dot(row, row, n);
    for (uint32_t i = 0; i < n; ++i) {
      sums[i] += row[i];
      every_code |= row[i];
    }
    left[token] = static_cast<uint8_t>(token);
  }
  const auto cost_of = every_code < 16 ? pack_cost<4> : pack_cost<8>;
  const auto take = [&](uint32_t index) {
    const uint8_t token = left[index];
    for (uint32_t i = index; i + 1 < remaining; ++i) left[i] = left[i + 1];
    --remaining;
    const uint8_t* row = codes + static_cast<size_t>(token) * n;
    for (uint32_t i = 0; i < n; ++i) sums[i] -= row[i];
    *order++ = token;
    return row;
  };
  while (remaining > 0) {
    for (uint32_t i = 0; i < n; ++i) {
      const uint32_t quotient = sums[i] / remaining, rest = 2 * (sums[i] - quotient * remaining);
      mean[i] =
          static_cast<uint8_t>(quotient + (rest > remaining || (rest == remaining && quotient % 2 == 1)));
    }
    uint32_t best = 0;
    double best_similarity = -1;
    for (uint32_t index = 0; index < remaining; ++index) {
      const uint64_t norm = norms[left[index]];
      const double product = static_cast<double>(dot(codes + static_cast<size_t>(left[index]) * n, mean, n));
      const double similarity = norm == 0 ? 0.0 : product * product / static_cast<double>(norm);
      if (similarity > best_similarity) best = index, best_similarity = similarity;
    }
    const uint8_t* seed = take(best);
    memcpy(minimum, seed, n);
    memcpy(maximum, seed, n);
    for (uint32_t position = 1; position < codec.pack; ++position) {
      uint32_t cheapest = 0, least = ~0u;
      for (uint32_t index = 0; index < remaining; ++index) {
        const uint32_t cost = cost_of(minimum, maximum, codes + static_cast<size_t>(left[index]) * n, n);
        if (cost < least) cheapest = index, least = cost;
      }
      const uint8_t* row = take(cheapest);
      for (uint32_t i = 0; i < n; ++i) {
        minimum[i] = row[i] < minimum[i] ? row[i] : minimum[i];
        maximum[i] = row[i] > maximum[i] ? row[i] : maximum[i];
      }
    }
  }
}

// ---- step 3: pack

struct PackRow {
  uint8_t minimum[kMaximumHeadDim];
  uint8_t range[kMaximumHeadDim];
};

// Extremes of the packs of one row: `order` points at its first position.
void row_extremes(const Codec& codec, const uint8_t* head_codes, const uint8_t* order, PackRow& row) {
  uint8_t maximum[kMaximumHeadDim];
  const uint32_t n = codec.head_dim;
  memcpy(row.minimum, head_codes + order[0] * codec.channels, n);
  memcpy(maximum, row.minimum, n);
  for (uint32_t position = 1; position < codec.pack; ++position) {
    const uint8_t* codes = head_codes + order[position] * codec.channels;
    for (uint32_t i = 0; i < n; ++i) {
      row.minimum[i] = codes[i] < row.minimum[i] ? codes[i] : row.minimum[i];
      maximum[i] = codes[i] > maximum[i] ? codes[i] : maximum[i];
    }
  }
  for (uint32_t i = 0; i < n; ++i) row.range[i] = static_cast<uint8_t>(maximum[i] - row.minimum[i]);
}

uint64_t payload_bits(const Codec& codec, const uint8_t* codes, const uint8_t* order) {
  uint64_t widths = 0;
  PackRow row;
  for (uint32_t head = 0; head < codec.heads; ++head) {
    for (uint32_t first = 0; first < kBlockTokens; first += codec.pack) {
      row_extremes(codec, codes + head * codec.head_dim, order + first, row);
      for (uint32_t i = 0; i < codec.head_dim; ++i) widths += bit_width(row.range[i]);
    }
  }
  return widths * codec.pack;
}

void repack(const Codec& codec, const uint8_t* key_codes, const uint8_t* value_codes, uint8_t* order) {
  identity_order(order);
  if (codec.repack == PH_KV_REPACK_MEDIAN) median_order(codec, value_codes, order);
  if (codec.repack == PH_KV_REPACK_GREEDY) greedy_order(codec, key_codes, value_codes, order);
  if (codec.repack != PH_KV_REPACK_AUTO) return;
  const auto cost = [&](const uint8_t* candidate) {
    return payload_bits(codec, key_codes, candidate) + payload_bits(codec, value_codes, candidate) +
           (is_identity(candidate) ? 0 : 8 * kOrderBytes);
  };
  uint64_t least = cost(order);
  uint8_t candidate[kBlockTokens];
  for (const bool greedy : {false, true}) {
    greedy ? greedy_order(codec, key_codes, value_codes, candidate)
           : median_order(codec, value_codes, candidate);
    const uint64_t bits = cost(candidate);
    if (bits < least) least = bits, memcpy(order, candidate, kBlockTokens);
  }
}

// Transposes 16 x 16 bytes: four rounds of interleaving the first half of the rows with the second.
void transpose16(Bytes16 rows[16]) {
  for (int round = 0; round < 4; ++round) {
    Bytes16 next[16];
    for (int i = 0; i < 8; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + 8],
                                      Bytes16{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
      next[2 * i + 1] = __builtin_shuffle(
          rows[i], rows[i + 8], Bytes16{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
    }
    memcpy(rows, next, sizeof next);
  }
}

// Codes of a head by channel, in packed order: [head_dim][64].
using HeadCodes = uint8_t[kMaximumHeadDim][kBlockTokens];

void gather_head(const Codec& codec, const uint8_t* head_codes, const uint8_t* order, HeadCodes& target) {
  for (uint32_t channel = 0; channel < codec.head_dim; channel += 16) {
    for (uint32_t first = 0; first < kBlockTokens; first += 16) {
      Bytes16 rows[16];
      for (uint32_t i = 0; i < 16; ++i)
        rows[i] = load<Bytes16>(head_codes + order[first + i] * codec.channels + channel);
      transpose16(rows);
      for (uint32_t i = 0; i < 16; ++i) store(target[channel + i] + first, rows[i]);
    }
  }
}

void scatter_head(const Codec& codec, const HeadCodes& source, const uint8_t* order, uint8_t* head_codes) {
  for (uint32_t channel = 0; channel < codec.head_dim; channel += 16) {
    for (uint32_t first = 0; first < kBlockTokens; first += 16) {
      Bytes16 rows[16];
      for (uint32_t i = 0; i < 16; ++i) rows[i] = load<Bytes16>(source[channel + i] + first);
      transpose16(rows);
      for (uint32_t i = 0; i < 16; ++i)
        store(head_codes + order[first + i] * codec.channels + channel, rows[i]);
    }
  }
}

constexpr uint64_t kEveryByte = 0x0101010101010101ull;

// The low `width` bits of each of 8 bytes, next to each other, and back.
uint64_t compress_bytes(uint64_t bytes, uint32_t width) {
#if defined(__BMI2__)
  return _pext_u64(bytes, kEveryByte * ((1u << width) - 1));
#else
  uint64_t bits = 0;
  for (uint32_t i = 0; i < 8; ++i) bits |= (bytes >> (8 * i) & 0xff) << (width * i & 63);
  return width == 0 ? 0 : bits;
#endif
}

uint64_t expand_bytes(uint64_t bits, uint32_t width) {
#if defined(__BMI2__)
  return _pdep_u64(bits, kEveryByte * ((1u << width) - 1));
#else
  uint64_t bytes = 0;
  for (uint32_t i = 0; i < 8; ++i) bytes |= (bits >> (width * i & 63) & ((1u << width) - 1)) << (8 * i);
  return bytes;
#endif
}

// Appends fields of up to 32 bits, lowest bit first. Stores whole words ahead of what is written, so the
// target needs 8 bytes of slack.
class BitWriter {
 public:
  explicit BitWriter(uint8_t* target) : target_(target) {}
  void append(uint64_t bits, uint32_t count) {
    pending_ |= bits << filled_;
    filled_ += count;
    store(target_, pending_);
    target_ += filled_ / 8;
    pending_ = filled_ / 8 == 8 ? 0 : pending_ >> (filled_ / 8 * 8);
    filled_ %= 8;
  }

 private:
  uint8_t* target_;
  uint64_t pending_ = 0;
  uint32_t filled_ = 0;
};

// A part's pack headers wait here until the widest is known.
struct PackHeaders {
  std::vector<uint8_t> minimum, width;  // [rows][head_dim]
  uint32_t minimum_bits = 0, width_bits = 0;
};

void collect_headers(const Codec& codec, const uint8_t* codes, const uint8_t* order, PackHeaders& headers) {
  const uint32_t n = codec.head_dim;
  headers.minimum.resize(static_cast<size_t>(codec.rows) * n);
  headers.width.resize(headers.minimum.size());
  uint32_t every_minimum = 0, every_range = 0;
  PackRow row;
  for (uint32_t index = 0; index < codec.rows; ++index) {
    const uint32_t head = index / codec.rows_per_head, first = index % codec.rows_per_head * codec.pack;
    row_extremes(codec, codes + head * n, order + first, row);
    uint8_t* width = headers.width.data() + static_cast<size_t>(index) * n;
    memcpy(headers.minimum.data() + static_cast<size_t>(index) * n, row.minimum, n);
    for (uint32_t i = 0; i < n; ++i) {
      width[i] = static_cast<uint8_t>(bit_width(row.range[i]));
      every_minimum |= row.minimum[i];
      every_range |= row.range[i];
    }
  }
  headers.minimum_bits = bit_width(every_minimum);
  headers.width_bits = bit_width(bit_width(every_range));
}

void pad(uint8_t* begin, uint8_t* end) {
  if (begin < end) memset(begin, 0, static_cast<size_t>(end - begin));
}

// Payloads of one row; returns its bytes. Stores 8 bytes ahead of what is written.
uint32_t write_payload_row(const Codec& codec, const HeadCodes& codes, uint32_t first, const uint8_t* minimum,
                           const uint8_t* width, uint8_t* target) {
  uint8_t* end = target;
  if (codec.pack >= 8) {  // eight fields of w bits are w bytes
    for (uint32_t channel = 0; channel < codec.head_dim; ++channel) {
      const uint64_t base = kEveryByte * minimum[channel];
      for (uint32_t position = first; position < first + codec.pack; position += 8) {
        const uint64_t residuals = load<uint64_t>(codes[channel] + position) - base;
        store(end, compress_bytes(residuals, width[channel]));
        end += width[channel];
      }
    }
  } else {
    BitWriter writer(target);
    uint32_t bits = 0;
    for (uint32_t channel = 0; channel < codec.head_dim; ++channel) {
      const uint32_t residuals = load<uint32_t>(codes[channel] + first) - 0x01010101u * minimum[channel];
      writer.append(compress_bytes(residuals, width[channel]), 4u * width[channel]);
      bits += 4u * width[channel];
    }
    end = target + (bits + 7) / 8;
  }
  const uint32_t bytes = round_up(static_cast<uint32_t>(end - target), 4);
  pad(end, target + bytes);
  return bytes;
}

void write_zero_points(const int32_t* zeros, uint32_t count, uint32_t bytes, uint8_t* target) {
  for (uint32_t i = 0; i < count; ++i) memcpy(target + i * bytes, zeros + i, bytes);  // little-endian
  const uint32_t written = count * bytes;
  pad(target + written, target + round_up(written, 4));
}

uint32_t pack_part(const Codec& codec, uint32_t part, const uint8_t* codes, const float* scales,
                   const int32_t* zeros, const uint8_t* order, uint8_t* target) {
  PackHeaders headers;
  collect_headers(codec, codes, order, headers);
  uint32_t zero_bytes = 1;
  for (uint32_t group = 0; group < codec.groups[part]; ++group) {
    const uint32_t needed = zero_point_bytes(zeros[group]);
    zero_bytes = needed > zero_bytes ? needed : zero_bytes;
  }
  const PartHeader header = {static_cast<uint8_t>(headers.minimum_bits),
                             static_cast<uint8_t>(headers.width_bits), static_cast<uint8_t>(zero_bytes), 0};
  const PartLayout layout = part_layout(codec, part, header);
  memcpy(target, &header, sizeof header);

  for (uint32_t group = 0; group < codec.groups[part]; ++group) {
    const uint32_t bits = scale_bits(codec.dtype, scales[group]);
    memcpy(target + layout.scales + group * codec.element_bytes, &bits, codec.element_bytes);
  }
  pad(target + layout.scales + codec.groups[part] * codec.element_bytes, target + layout.zeros);
  write_zero_points(zeros, codec.groups[part], zero_bytes, target + layout.zeros);

  const uint32_t field = headers.minimum_bits + headers.width_bits;
  for (uint32_t row = 0; row < codec.rows; ++row) {
    uint8_t* begin = target + layout.pack_headers + row * layout.header_row_bytes;
    const uint8_t* minimum = headers.minimum.data() + static_cast<size_t>(row) * codec.head_dim;
    const uint8_t* width = headers.width.data() + static_cast<size_t>(row) * codec.head_dim;
    BitWriter writer(begin);
    for (uint32_t channel = 0; channel < codec.head_dim; ++channel) {
      writer.append(minimum[channel] | static_cast<uint32_t>(width[channel]) << headers.minimum_bits, field);
    }
    pad(begin + codec.head_dim * field / 8, begin + layout.header_row_bytes);
  }

  HeadCodes head_codes;
  uint32_t written = 0;
  for (uint32_t head = 0; head < codec.heads; ++head) {
    memcpy(target + layout.heads + 4 * head, &written, 4);
    gather_head(codec, codes + head * codec.head_dim, order, head_codes);
    for (uint32_t index = 0; index < codec.rows_per_head; ++index) {
      const size_t row = static_cast<size_t>(head * codec.rows_per_head + index) * codec.head_dim;
      written += write_payload_row(codec, head_codes, index * codec.pack, headers.minimum.data() + row,
                                   headers.width.data() + row, target + layout.payloads + written);
    }
  }
  const uint32_t bytes = layout.payloads + written;
  pad(target + bytes, target + round_up(bytes, 16));
  return round_up(bytes, 16);
}

uint32_t pack(const Codec& codec, const uint8_t* const codes[kParts], const float* const scales[kParts],
              const int32_t* const zeros[kParts], const uint8_t* order, uint8_t* record) {
  const bool ordered = !is_identity(order);
  uint32_t bytes = kRecordHeaderBytes;
  if (ordered) {
    BitWriter writer(record + bytes);
    for (uint32_t position = 0; position < kBlockTokens; ++position) writer.append(order[position], 6);
    bytes += kOrderBytes;
  }
  const auto append = [&](uint32_t part) {
    bytes += pack_part(codec, part, codes[part], scales[part], zeros[part], order, record + bytes);
  };
  append(PH_KV_VALUES);
  const uint32_t keys = bytes;
  append(PH_KV_KEYS);
  const RecordHeader header = {bytes, kPacked, ordered, 0, keys, 0};
  memcpy(record, &header, sizeof header);
  return bytes;
}

// ---- unpack

// Reads up to 57 bits at a bit offset; stays within the record by stepping back from its end.
class BitReader {
 public:
  BitReader(const uint8_t* begin, const uint8_t* end) : begin_(begin), last_(end - 8) {}
  uint64_t read(uint32_t bit, uint32_t count) const {
    const uint8_t* source = begin_ + bit / 8;
    uint64_t word;
    uint32_t shift = bit % 8;
    if (source > last_) {
      shift += 8 * static_cast<uint32_t>(source - last_);
      if (shift > 63) return 0;
      source = last_;
    }
    memcpy(&word, source, 8);
    return word >> shift & ((1ull << count) - 1);
  }
  // Eight fields of `width` bits at a byte offset.
  uint64_t read_bytes(uint32_t byte) const {
    const uint8_t* source = begin_ + byte;
    if (source > last_) return source - last_ > 7 ? 0 : load<uint64_t>(last_) >> (8 * (source - last_));
    return load<uint64_t>(source);
  }

 private:
  const uint8_t* begin_;
  const uint8_t* last_;
};

bool unpack(const Codec& codec, uint32_t part, const RecordView& view, uint8_t* codes, float* scales,
            int32_t* zeros) {
  const PartHeader header = view.part[part];
  const PartLayout layout = part_layout(codec, part, header);
  const uint8_t* base = view.part_bytes(part);
  const uint8_t* record_end = view.bytes + view.size;
  const uint32_t payload_bytes = view.part_end[part] - view.part_start[part] - layout.payloads;
  uint8_t order[kBlockTokens];
  identity_order(order);
  if (view.ordered) {
    for (uint32_t i = 0; i < kBlockTokens; ++i) {
      order[i] = static_cast<uint8_t>(stored_order(view.bytes + kRecordHeaderBytes, i));
    }
  }
  for (uint32_t group = 0; group < codec.groups[part]; ++group) {
    uint32_t bits = 0;
    memcpy(&bits, base + layout.scales + group * codec.element_bytes, codec.element_bytes);
    scales[group] = scale_from_bits(codec.dtype, bits);
    uint32_t zero = 0;
    memcpy(&zero, base + layout.zeros + group * header.zero_bytes, header.zero_bytes);
    const uint32_t unused = 32 - 8 * header.zero_bytes;
    zeros[group] = static_cast<int32_t>(zero << unused) >> unused;
  }

  const uint32_t field = header.minimum_bits + header.width_bits;
  HeadCodes head_codes;
  for (uint32_t head = 0; head < codec.heads; ++head) {
    uint32_t position = read_u32(base + layout.heads + 4 * head);
    if (position % 4 != 0) return false;
    for (uint32_t index = 0; index < codec.rows_per_head; ++index) {
      const uint32_t row = head * codec.rows_per_head + index;
      const BitReader headers(base + layout.pack_headers + row * layout.header_row_bytes, record_end);
      uint8_t minimum[kMaximumHeadDim], width[kMaximumHeadDim];
      uint32_t width_sum = 0;
      for (uint32_t channel = 0; channel < codec.head_dim; ++channel) {
        const uint32_t bits = static_cast<uint32_t>(headers.read(channel * field, field));
        minimum[channel] = static_cast<uint8_t>(bits & ((1u << header.minimum_bits) - 1));
        const uint32_t stored = bits >> header.minimum_bits;
        if (stored > kMaximumWidth) return false;
        width[channel] = static_cast<uint8_t>(stored);
        width_sum += stored;
      }
      const uint32_t row_bytes = payload_row_bytes(codec.pack, width_sum);
      if (position > payload_bytes || row_bytes > payload_bytes - position) return false;
      const BitReader payload(base + layout.payloads + position, record_end);
      const uint32_t first = index * codec.pack;
      uint32_t offset = 0;  // in bytes, or in bits for packs of four
      for (uint32_t channel = 0; channel < codec.head_dim; ++channel) {
        const uint64_t added = kEveryByte * minimum[channel];
        if (codec.pack == 4) {
          const uint64_t residuals = expand_bytes(payload.read(offset, 4u * width[channel]), width[channel]);
          store(head_codes[channel] + first, static_cast<uint32_t>(residuals + added));
          offset += 4u * width[channel];
          continue;
        }
        for (uint32_t i = first; i < first + codec.pack; i += 8) {
          store(head_codes[channel] + i, expand_bytes(payload.read_bytes(offset), width[channel]) + added);
          offset += width[channel];
        }
      }
      position += row_bytes;
    }
    scatter_head(codec, head_codes, order, codes + head * codec.head_dim);
  }
  return true;
}

// ---- measure

template <typename Element>
void measure_errors(const Codec& codec, uint32_t part, const uint8_t* codes, const float* scales,
                    const int32_t* zeros, uint64_t block, const uint8_t* x, ph_kv_statistics& statistics) {
  for (uint32_t head = 0; head < codec.heads; ++head) {
    for (uint32_t token = 0; token < kBlockTokens; ++token) {
      const uint8_t* row = x + row_offset(codec, block, head, token);
      const uint8_t* code_row = codes + token * codec.channels + head * codec.head_dim;
      for (uint32_t channel = 0; channel < codec.head_dim; channel += kLanes) {
        const Floats original = Element::read(row + channel * Element::kBytes);
        Floats scale, zero;
        for (uint32_t lane = 0; lane < kLanes; ++lane) {
          const uint32_t group = group_index(codec, part, head, token, channel + lane);
          scale[lane] = scales[group];
          zero[lane] = static_cast<float>(zeros[group]);
        }
        const Floats restored = restore<Element>(code_row + channel, scale, zero);
        for (uint32_t lane = 0; lane < kLanes; ++lane) {
          const double error =
              __builtin_fabs(static_cast<double>(restored[lane]) - static_cast<double>(original[lane]));
          const double over_scale = error / static_cast<double>(scale[lane]);
          if (error > statistics.max_error[part]) statistics.max_error[part] = error;
          if (over_scale > statistics.max_error_over_scale[part])
            statistics.max_error_over_scale[part] = over_scale;
          statistics.squared_error[part] += error * error;
        }
      }
    }
  }
  statistics.compared[part] += static_cast<uint64_t>(codec.channels) * kBlockTokens;
}

void measure(const Codec& codec, uint32_t part, const RecordView& view, const uint8_t* codes,
             const float* scales, const int32_t* zeros, uint64_t block, const void* x,
             ph_kv_statistics& statistics) {
  const PartHeader header = view.part[part];
  const PartLayout layout = part_layout(codec, part, header);
  const uint32_t field = header.minimum_bits + header.width_bits;
  for (uint32_t row = 0; row < codec.rows; ++row) {
    const BitReader headers(view.part_bytes(part) + layout.pack_headers + row * layout.header_row_bytes,
                            view.bytes + view.size);
    for (uint32_t channel = 0; channel < codec.head_dim; ++channel) {
      const uint64_t width = headers.read(channel * field, field) >> header.minimum_bits;
      statistics.widths[part * 9 + width] += 1;
      statistics.payload_bits[part] += codec.pack * width;
    }
  }
  statistics.packs[part] += static_cast<uint64_t>(codec.rows) * codec.head_dim;
  for (uint32_t i = 0; i < codec.channels * kBlockTokens; ++i) {
    statistics.code_mask[part * 8 + codes[i] / 32] |= 1u << codes[i] % 32;
  }
  if (x == nullptr) return;
  with_element(codec.dtype, [&](auto element) {
    measure_errors<decltype(element)>(codec, part, codes, scales, zeros, block,
                                      static_cast<const uint8_t*>(x), statistics);
  });
}

}  // namespace

#define PH_TEXT_OF(x) #x
#define PH_TEXT(x) PH_TEXT_OF(x)

extern const BlockKernels kBlockKernels;
const BlockKernels kBlockKernels = {
    PH_TEXT(PH_INSTRUCTION_SET), quantize, dequantize, repack, pack, unpack, measure};

}  // namespace ph::kv::PH_INSTRUCTION_SET
