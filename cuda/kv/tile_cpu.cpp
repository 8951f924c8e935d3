// The work on tiles on one CPU core; see tile_cpu.h.
//
// Compiled once per instruction set. All arithmetic is IEEE float32 with contraction off (CMakeLists.txt), so the wider
// forms give the same bits.
#include "kv/tile_cpu.h"

#include "common/vector_cpu.h"

namespace ph::kv::PH_INSTRUCTION_SET {

using namespace ph::PH_INSTRUCTION_SET;

namespace {

// ---- quantise

// 0 in place of what is not finite: x * 0 is NaN for those, and 0 for all others.
Floats finite_or_zero(Floats x) { return x * 0.0f == 0.0f ? x : Floats{}; }

TokenExtremes extremes(uint32_t dtype, const uint8_t* x, uint32_t values) {
  return with_element(dtype, [&](auto element) {
    using Element = decltype(element);
    Floats minimum = splat(__builtin_inff()), maximum = splat(-__builtin_inff()), poison = {};
    for (uint32_t i = 0; i < values; i += kVectorLanes) {
      const Floats raw = Element::read(x + 2 * i), value = finite_or_zero(raw);
      minimum = smaller(value, minimum);
      maximum = larger(value, maximum);
      poison += raw * 0.0f;
    }
    return TokenExtremes{smallest(minimum), largest(maximum), sum(poison) == 0.0f};
  });
}

void group_affines(const TileShape& shape, uint32_t part, const uint8_t* const* rows, Affine* affines) {
  if (part == PH_KV_VALUES) {
    for (uint32_t token = 0; token < kBlockTokens; ++token) {
      for (uint32_t first = 0; first < shape.head_dim; first += kGroupChannels) {
        const uint32_t left = shape.head_dim - first;
        const TokenExtremes found =
            extremes(shape.dtype, rows[token] + 2 * first, left < kGroupChannels ? left : kGroupChannels);
        affines[scale_index(shape, part, token, first)] =
            tile_affine(shape, part, found.minimum, found.maximum);
      }
    }
    return;
  }
  with_element(shape.dtype, [&](auto element) {
    using Element = decltype(element);
    for (uint32_t first = 0; first < shape.head_dim; first += kVectorLanes) {
      Floats minimum = splat(__builtin_inff()), maximum = splat(-__builtin_inff());
      for (uint32_t token = 0; token < kBlockTokens; ++token) {
        const Floats value = finite_or_zero(Element::read(rows[token] + 2 * first));
        minimum = smaller(value, minimum);
        maximum = larger(value, maximum);
      }
      for (uint32_t lane = 0; lane < kVectorLanes; ++lane)
        affines[first + lane] = tile_affine(shape, part, minimum[lane], maximum[lane]);
    }
  });
}

void quantize(const TileShape& shape, uint32_t part, const uint8_t* const* rows, const Affine* affines,
              uint8_t* codes) {
  const Floats limit = splat(static_cast<float>(shape.parts[part].code_limit));
  const bool by_channel = is_kivi(shape.parts[part]) && part == PH_KV_KEYS;
  alignas(64) float scales[kMostHeadDim], zeros[kMostHeadDim];  // by channel
  for (uint32_t channel = 0; by_channel && channel < shape.head_dim; ++channel) {
    scales[channel] = affines[channel].scale;
    zeros[channel] = affines[channel].zero;
  }
  with_element(shape.dtype, [&](auto element) {
    using Element = decltype(element);
    for (uint32_t token = 0; token < kBlockTokens; ++token) {
      uint8_t* target = codes + token * shape.head_dim;
      for (uint32_t first = 0; first < shape.head_dim; first += kTileChannels) {
        const Affine& affine = affines[scale_index(shape, part, token, first)];
        Floats scale = splat(affine.scale), zero = splat(affine.zero);
        for (uint32_t channel = first; channel < first + kTileChannels; channel += kVectorLanes) {
          if (by_channel) {
            scale = load<Floats>(scales + channel);
            zero = load<Floats>(zeros + channel);
          }
          const Floats x = finite_or_zero(Element::read(rows[token] + 2 * channel));
          const Floats code = round_lanes(x / scale) - zero;  // as quantize_value
          store_codes(target + channel, smaller(larger(code, Floats{}), limit));
        }
      }
    }
  });
}

// Calls `run` with the width of a group as a constant.
template <typename Run>
void with_width(uint32_t width, Run run) {
  switch (width) {
    case 1:
      return run(std::integral_constant<uint32_t, 1>());
    case 2:
      return run(std::integral_constant<uint32_t, 2>());
    case 3:
      return run(std::integral_constant<uint32_t, 3>());
    case 4:
      return run(std::integral_constant<uint32_t, 4>());
    case 5:
      return run(std::integral_constant<uint32_t, 5>());
    case 6:
      return run(std::integral_constant<uint32_t, 6>());
    case 7:
      return run(std::integral_constant<uint32_t, 7>());
    case 8:
      return run(std::integral_constant<uint32_t, 8>());
    default:
      return run(std::integral_constant<uint32_t, 0>());
  }
}

// ---- pack

// A group's register (s, j) of lane 4 * g + i: four residuals, the first lowest. `residuals` are [64, head_dim] for keys
// and quads for values.
uint32_t fragment_register(const TileShape& shape, uint32_t part, const uint8_t* residuals, uint32_t group,
                           uint32_t g, uint32_t i, uint32_t s, uint32_t j) {
  if (part == PH_KV_KEYS) {
    const uint32_t token = 8 * g + 4 * (s / 2) + j, channel = kTileChannels * group + 16 * (s % 2) + 4 * i;
    return load<uint32_t>(residuals + token * shape.head_dim + channel);
  }
  const uint32_t token = 16 * i + 8 * (s / 2) + 4 * (s % 2), channel = kTileChannels * group + 8 * j + g;
  return load<uint32_t>(residuals + token * shape.head_dim + channel * 4);
}

// One group of width 1 to 4, or half of a wide one, whose bits lie `shift` up in the residuals. Nothing for width 0.
template <uint32_t kWidth>
void pack_group(const TileShape& shape, uint32_t part, const uint8_t* residuals, uint32_t group,
                uint32_t shift, uint8_t* target) {
  if constexpr (kWidth == 0) return;
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    uint32_t nibbles[8], words[8];
    for (uint32_t s = 0; s < 4; ++s) {
      for (uint32_t j = 0; j < 2; ++j) {
        const uint32_t low = fragment_register(shape, part, residuals, group, lane / 4, lane % 4, s, j),
                       high = fragment_register(shape, part, residuals, group, lane / 4, lane % 4, s, j + 2);
        nibbles[2 * s + j] = (low >> shift & 0x0f0f0f0fu) | (high >> shift & 0x0f0f0f0fu) << 4;
      }
    }
    pack_words(kWidth, nibbles, words);
    for (uint32_t x = 0; x < 2 * kWidth; ++x) store(target + word_position(kWidth, lane, x), words[x]);
  }
}

// Takes the bases of a part away from its codes, writes them, and gives the largest residual of each channel.
void subtract_bases(const TileShape& shape, uint32_t part, uint8_t* codes, uint8_t* bases, uint8_t* largest) {
  const uint32_t head_dim = shape.head_dim;
  uint8_t smallest[kMostHeadDim];
  memcpy(smallest, codes, head_dim);
  memcpy(largest, codes, head_dim);
  for (uint32_t token = 1; token < kBlockTokens; ++token) {
    const uint8_t* row = codes + token * head_dim;
    for (uint32_t channel = 0; channel < head_dim; ++channel) {
      smallest[channel] = row[channel] < smallest[channel] ? row[channel] : smallest[channel];
      largest[channel] = row[channel] > largest[channel] ? row[channel] : largest[channel];
    }
  }
  memset(bases, 0, base_bytes(shape, part));
  for (uint32_t channel = 0; channel < head_dim; ++channel) {
    const BasePlace place = base_place(shape, part, channel);
    bases[place.byte] = static_cast<uint8_t>(bases[place.byte] | smallest[channel] << place.shift);
    largest[channel] -= smallest[channel];
  }
  for (uint32_t token = 0; token < kBlockTokens; ++token) {
    uint8_t* row = codes + token * head_dim;
    for (uint32_t channel = 0; channel < head_dim; ++channel) row[channel] -= smallest[channel];
  }
}

// Flattened, as are the other functions that take some from shared headers: what is not inlined would be one function
// for all instruction sets.
__attribute__((flatten)) uint32_t pack(const TileShape& shape, uint32_t part, uint8_t* codes, uint8_t* bases,
                                       uint8_t* groups) {
  const uint32_t head_dim = shape.head_dim;
  const uint32_t fixed = shape.parts[part].width;
  uint8_t largest[kMostHeadDim];  // residuals, unless all groups have one width
  if (fixed == 0) subtract_bases(shape, part, codes, bases, largest);
  alignas(64) uint8_t quads[kMostTileCodes];
  const uint8_t* residuals = codes;
  if (part == PH_KV_VALUES) {
    for (uint32_t token = 0; token < kBlockTokens; token += 4) {
      const uint8_t* row = codes + token * head_dim;
      for (uint32_t channel = 0; channel < head_dim; ++channel) {
        uint8_t* quad = quads + token * head_dim + 4 * channel;
        for (uint32_t b = 0; b < 4; ++b) quad[b] = row[b * head_dim + channel];
      }
    }
    residuals = quads;
  }

  uint32_t widths = 0;
  for (uint32_t group = 0; group < tile_groups(shape); ++group) {
    uint32_t width = fixed;
    if (fixed == 0) {
      uint8_t residual = 0;
      for (uint32_t channel = kTileChannels * group; channel < kTileChannels * (group + 1); ++channel)
        residual = largest[channel] > residual ? largest[channel] : residual;
      width = bit_width(residual);
    }
    widths |= width << 4 * group;
    with_width(width, [&](auto constant) {
      constexpr uint32_t kWidth = constant.value, kLow = kWidth > 4 ? 4 : kWidth;
      pack_group<kLow>(shape, part, residuals, group, 0, groups);
      pack_group<kWidth - kLow>(shape, part, residuals, group, 4, groups + kGroupBytes * 4);
    });
    groups += kGroupBytes * width;
  }
  return widths;
}

// ---- unpack

// Four bases from word `word` of a part's.
uint32_t base_word(const TileShape& shape, uint32_t part, const uint8_t* bases, uint32_t word) {
  if (shape.parts[part].base_bits == 8) return load<uint32_t>(bases + 4 * word);
  return load<uint32_t>(bases + 4 * (word / 2)) >> 4 * (word % 2) & 0x0f0f0f0fu;
}

#if defined(__AVX512F__)

constexpr uint32_t kColumnLanes = 8;  // all g at once

// A vector holds the words of register pairs (s, j % 2) of the lanes 4 * g + i, [j % 2][g]: its low nibbles are those of
// 16 codes in a row, of j = 0 and 1, its high ones of j = 2 and 3. Permutations take a source's words there in steps.
struct Index {
  alignas(64) uint32_t lanes[16];
};
template <typename Source>
constexpr Index make_index(Source source) {
  Index index{};
  for (uint32_t lane = 0; lane < 16; ++lane) index.lanes[lane] = source(lane);
  return index;
}
Words select(Words a, Words b, const Index& index) {
  return (Words)_mm512_permutex2var_epi32((__m512i)a, _mm512_load_si512(index.lanes), (__m512i)b);
}

// [i][x] of two g, to [i % 2][x][g % 2]. Here as below, the words of the second operand count from 16.
constexpr Index kTwo[2] = {make_index([](uint32_t lane) { return lane % 2 * 16 + lane / 2; }),
                           make_index([](uint32_t lane) { return lane % 2 * 16 + 8 + lane / 2; })};
// Two of those, to [x][g % 4] of one i % 2.
constexpr Index kFour[2] = {
    make_index([](uint32_t lane) { return lane % 4 / 2 * 16 + lane / 4 * 2 + lane % 2; }),
    make_index([](uint32_t lane) { return lane % 4 / 2 * 16 + 8 + lane / 4 * 2 + lane % 2; })};
// Two of those, to [x % 2][g] of one x / 2, or to [twice][g] of one x.
constexpr Index make_eight(uint32_t first, uint32_t second) {
  return make_index(
      [=](uint32_t lane) { return lane % 8 / 4 * 16 + (lane < 8 ? first : second) * 4 + lane % 4; });
}
constexpr Index kEight[2] = {make_eight(0, 1), make_eight(2, 3)};
constexpr Index kEightTwice[4] = {make_eight(0, 0), make_eight(1, 1), make_eight(2, 2), make_eight(3, 3)};

// Of lanes with two words each, [g % 2][i][x] of four g, to [i % 2][x][g % 4].
constexpr Index make_narrow(uint32_t pair) {
  return make_index([=](uint32_t lane) {
    return lane % 4 / 2 * 16 + lane % 2 * 8 + (2 * pair + lane / 8) * 2 + lane / 4 % 2;
  });
}
constexpr Index kNarrowFour[2] = {make_narrow(0), make_narrow(1)};
// Two of those, to [x][g] of one i % 2, or to [twice][g] of one x.
constexpr Index kNarrowEight[2] = {make_eight(0, 1), make_eight(2, 3)};
constexpr Index kNarrowTwice[2][2] = {{make_eight(0, 0), make_eight(1, 1)},
                                      {make_eight(2, 2), make_eight(3, 3)}};

// Words 0 to 3 of a chunk, of all lanes: words[i][n] by indices[n].
template <uint32_t kCount>
void load_chunk(const uint8_t* source, const Index (&indices)[kCount], Words words[4][kCount]) {
  Words two[4][2], four[2][4];
#pragma GCC unroll 4
  for (uint32_t k = 0; k < 4; ++k) {
    const Words even = load<Words>(source + 128 * k), odd = load<Words>(source + 128 * k + 64);
    for (uint32_t pair = 0; pair < 2; ++pair) two[k][pair] = select(even, odd, kTwo[pair]);
  }
#pragma GCC unroll 2
  for (uint32_t m = 0; m < 2; ++m) {
#pragma GCC unroll 4
    for (uint32_t i = 0; i < 4; ++i)
      four[m][i] = select(two[2 * m][i / 2], two[2 * m + 1][i / 2], kFour[i % 2]);
  }
#pragma GCC unroll 4
  for (uint32_t i = 0; i < 4; ++i) {
#pragma GCC unroll 4
    for (uint32_t n = 0; n < kCount; ++n) words[i][n] = select(four[0][i], four[1][i], indices[n]);
  }
}

// The two words of the lanes' last chunk, of odd widths.
template <uint32_t kCount>
void load_narrow_chunk(const uint8_t* source, const Index (&indices)[2][kCount], Words words[4][kCount]) {
  Words four[2][2];
  for (uint32_t m = 0; m < 2; ++m) {
    const Words low = load<Words>(source + 128 * m), high = load<Words>(source + 128 * m + 64);
    for (uint32_t pair = 0; pair < 2; ++pair) four[m][pair] = select(low, high, kNarrowFour[pair]);
  }
#pragma GCC unroll 4
  for (uint32_t i = 0; i < 4; ++i) {
#pragma GCC unroll 2
    for (uint32_t n = 0; n < kCount; ++n)
      words[i][n] = select(four[0][i / 2], four[1][i / 2], indices[i % 2][n]);
  }
}

// Shifts right by `first` where j % 2 is 0, else by `second`.
Words shift_halves(Words words, uint32_t first, uint32_t second) {
  const Words shifts = {first,  first,  first,  first,  first,  first,  first,  first,
                        second, second, second, second, second, second, second, second};
  return words >> shifts;
}

// The nibble words N[2 * s + j % 2] of a group of width 1 to 4, or half of a wide one: nibbles[i][s].
template <uint32_t kWidth>
void load_nibbles(const uint8_t* source, Words nibbles[4][4]) {
  if constexpr (kWidth == 4) {
    for (uint32_t chunk = 0; chunk < 2; ++chunk) {
      Words words[4][2];
      load_chunk(source + 512 * chunk, kEight, words);
      for (uint32_t i = 0; i < 4; ++i) {
        for (uint32_t n = 0; n < 2; ++n) nibbles[i][2 * chunk + n] = words[i][n];
      }
    }
  } else if constexpr (kWidth == 3) {
    Words words[4][2], last[4][1];
    constexpr Index kLast[2][1] = {{kNarrowEight[0]}, {kNarrowEight[1]}};
    load_chunk(source, kEight, words);
    load_narrow_chunk(source + 512, kLast, last);
    constexpr Index kEnds = make_index([](uint32_t lane) { return lane < 8 ? lane : lane + 16; }),
                    kInner = make_index([](uint32_t lane) { return lane + 8; });
    for (uint32_t i = 0; i < 4; ++i) {
      const Words w01 = words[i][0], w23 = words[i][1], w45 = last[i][0];
      nibbles[i][0] = w01 & 0x77777777u;
      nibbles[i][1] = w23 & 0x77777777u;
      nibbles[i][2] = w45 & 0x77777777u;
      nibbles[i][3] = (select(w01, w23, kEnds) >> 3 & 0x11111111u) |
                      (select(w01, w45, kInner) >> 2 & 0x22222222u) |
                      (select(w23, w45, kEnds) >> 1 & 0x44444444u);
    }
  } else if constexpr (kWidth == 2) {
    Words words[4][4];
    load_chunk(source, kEightTwice, words);
    for (uint32_t i = 0; i < 4; ++i) {
      for (uint32_t s = 0; s < 4; ++s) nibbles[i][s] = shift_halves(words[i][s], 0, 2) & 0x33333333u;
    }
  } else {
    Words words[4][2];
    load_narrow_chunk(source, kNarrowTwice, words);
    for (uint32_t i = 0; i < 4; ++i) {
      for (uint32_t s = 0; s < 4; ++s)
        nibbles[i][s] = shift_halves(words[i][s / 2], s % 2 * 2, s % 2 * 2 + 1) & 0x11111111u;
    }
  }
}

// Where the codes of registers (s, j) and (s, j + 1) of the lanes 4 * g + i go, and the bases that turn residuals into
// codes.
struct KeyTarget {
  uint8_t* const quads;
  const uint32_t group;
  uint32_t bases[4][2];  // [i][s % 2]: of four channels

  KeyTarget(uint8_t* quads, const TileShape& shape, const uint8_t* packed_bases, uint32_t group, uint32_t)
      : quads(quads), group(group) {
    for (uint32_t i = 0; i < 4; ++i) {
      for (uint32_t half = 0; half < 2; ++half) {
        bases[i][half] =
            base_word(shape, PH_KV_KEYS, packed_bases, i * (shape.head_dim / 16) + 2 * group + half);
      }
    }
  }

  void put(uint32_t i, uint32_t s, uint32_t j, Words residuals) const {
    const uint32_t quad = 8 * group + 4 * (s % 2) + i, column = 8 * (4 * (s / 2) + j);
    store(quads + (quad * kBlockTokens + column) * 4, residuals + bases[i][s % 2]);
  }
};

struct ValueTarget {
  uint8_t* const quads;
  const uint32_t group, head_dim;
  Words bases[2];  // [j / 2]: of a channel, in every byte

  ValueTarget(uint8_t* quads, const TileShape& shape, const uint8_t* packed_bases, uint32_t group, uint32_t)
      : quads(quads), group(group), head_dim(shape.head_dim) {
    const bool halves = shape.parts[PH_KV_VALUES].base_bits == 4;
    const __m256i place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    // As base_word, of words g * groups + group: groups are even where bases have 4 bits.
    const uint32_t groups = tile_groups(shape), shift = halves ? 1 : 0;
    const __m256i indices =
        _mm256_add_epi32(_mm256_mullo_epi32(place, _mm256_set1_epi32(static_cast<int32_t>(groups >> shift))),
                         _mm256_set1_epi32(static_cast<int32_t>(group >> shift)));
    const __m256i of_g = _mm256_i32gather_epi32(reinterpret_cast<const int*>(packed_bases), indices, 4);
    Words words = (Words)_mm512_broadcast_i64x4(of_g);
    if (halves) words = words >> 4 * (group % 2) & 0x0f0f0f0fu;
    for (uint32_t half = 0; half < 2; ++half) {
      const Words one = shift_halves(words, 16 * half, 16 * half + 8) & 0xff, two = one | one << 8;
      bases[half] = two | two << 16;
    }
  }

  void put(uint32_t i, uint32_t s, uint32_t j, Words residuals) const {
    const uint32_t quad = 4 * i + s, column = kTileChannels * group + 8 * j;
    store(quads + (quad * head_dim + column) * 4, residuals + bases[j / 2]);
  }
};

// Widths above 4 are two groups, of 4 bits and of the rest.
template <uint32_t kWidth, typename Target>
void unpack_group(const uint8_t* source, uint32_t, const Target& target) {
  constexpr uint32_t kLow = kWidth > 4 ? 4 : kWidth;
  Words low[4][4], high[4][4];
  if constexpr (kLow > 0) load_nibbles<kLow>(source, low);
  if constexpr (kWidth > 4) load_nibbles<kWidth - kLow>(source + kGroupBytes * 4, high);
#pragma GCC unroll 4
  for (uint32_t i = 0; i < 4; ++i) {
#pragma GCC unroll 4
    for (uint32_t s = 0; s < 4; ++s) {
      Words even = {}, odd = {};
      if constexpr (kLow > 0) even = low[i][s] & 0x0f0f0f0fu, odd = low[i][s] >> 4 & 0x0f0f0f0fu;
      if constexpr (kWidth > 4) {
        even |= (high[i][s] & 0x0f0f0f0fu) << 4;
        odd |= high[i][s] & 0xf0f0f0f0u;
      }
      target.put(i, s, 0, even);
      target.put(i, s, 2, odd);
    }
  }
}

#else

// Words of the lanes 4 * g + i for consecutive g, half of the eight where registers are narrow.
constexpr uint32_t kColumnLanes = kVectorBytes == 16 ? 4 : 8;
using Column = uint32_t __attribute__((vector_size(4 * kColumnLanes)));
using Quarter = uint32_t __attribute__((vector_size(16)));

// Four rows of four words, or for eight lanes two such squares beside each other, become columns.
void transpose(Column rows[4]) {
#if defined(__AVX2__)
  constexpr Column low = {0, 8, 1, 9, 4, 12, 5, 13}, high = {2, 10, 3, 11, 6, 14, 7, 15};
  constexpr Column even = {0, 1, 8, 9, 4, 5, 12, 13}, odd = {2, 3, 10, 11, 6, 7, 14, 15};
#else
  constexpr Column low = {0, 4, 1, 5}, high = {2, 6, 3, 7};
  constexpr Column even = {0, 1, 4, 5}, odd = {2, 3, 6, 7};
#endif
  const Column a = __builtin_shuffle(rows[0], rows[1], low), b = __builtin_shuffle(rows[2], rows[3], low);
  const Column c = __builtin_shuffle(rows[0], rows[1], high), d = __builtin_shuffle(rows[2], rows[3], high);
  rows[0] = __builtin_shuffle(a, b, even);
  rows[1] = __builtin_shuffle(a, b, odd);
  rows[2] = __builtin_shuffle(c, d, even);
  rows[3] = __builtin_shuffle(c, d, odd);
}

// Row r of a square, and r + 4 beside it: four words each, `stride` bytes from one row to the next.
Column load_rows(const uint8_t* source, uint32_t stride, uint32_t r) {
  const Quarter row = load<Quarter>(source + r * stride);
#if defined(__AVX2__)
  const Quarter beside = load<Quarter>(source + (r + 4) * stride);
  return (Column)_mm256_inserti128_si256(_mm256_castsi128_si256((__m128i)row), (__m128i)beside, 1);
#else
  return row;
#endif
}

// The words x of lanes 4 * g + 2 * pair + i, i in 0..1, g from `first` on: columns[i][x].
template <uint32_t kWidth>
void load_columns(const uint8_t* source, uint32_t first, uint32_t pair, Column columns[2][8]) {
  constexpr uint32_t kWhole = kWidth / 2;
  const auto load_square = [&](const uint8_t* square, uint32_t stride, Column rows[4]) {
    for (uint32_t r = 0; r < 4; ++r) rows[r] = load_rows(square + stride * first, stride, r);
    transpose(rows);
  };
  for (uint32_t chunk = 0; chunk < kWhole; ++chunk) {
    for (uint32_t i = 0; i < 2; ++i)
      load_square(source + 512 * chunk + 16 * (2 * pair + i), 64, columns[i] + 4 * chunk);
  }
  if (kWidth % 2 == 1) {
    Column rows[4];
    load_square(source + 512 * kWhole + 16 * pair, 32, rows);
    for (uint32_t x = 0; x < 4; ++x) columns[x / 2][4 * kWhole + x % 2] = rows[x];
  }
}

// The nibble words N of the same lanes.
template <uint32_t kWidth>
void load_nibbles(const uint8_t* source, uint32_t first, uint32_t pair, Column nibbles[2][8]) {
  if constexpr (kWidth == 0) {
    memset(nibbles, 0, sizeof(Column[2][8]));
  } else {
    Column words[2][8];
    load_columns<kWidth>(source, first, pair, words);
    for (uint32_t i = 0; i < 2; ++i) unpack_words(kWidth, words[i], nibbles[i]);
  }
}

// Where the codes of register (s, j) of lanes 4 * g + i go, and the bases that turn residuals into codes.
struct KeyTarget {
  uint8_t* const quads;
  const uint32_t group, first;
  uint32_t bases[4][2];  // [i][s % 2]: of four channels

  KeyTarget(uint8_t* quads, const TileShape& shape, const uint8_t* packed_bases, uint32_t group,
            uint32_t first)
      : quads(quads), group(group), first(first) {
    for (uint32_t i = 0; i < 4; ++i) {
      for (uint32_t half = 0; half < 2; ++half) {
        bases[i][half] =
            base_word(shape, PH_KV_KEYS, packed_bases, i * (shape.head_dim / 16) + 2 * group + half);
      }
    }
  }

  void put(uint32_t i, uint32_t s, uint32_t j, Column residuals) const {
    const uint32_t quad = 8 * group + 4 * (s % 2) + i, column = 8 * (4 * (s / 2) + j) + first;
    store(quads + (quad * kBlockTokens + column) * 4, residuals + bases[i][s % 2]);
  }
};

struct ValueTarget {
  uint8_t* const quads;
  const uint32_t group, first, head_dim;
  Column bases[4];  // [j]: of a channel, in every byte

  ValueTarget(uint8_t* quads, const TileShape& shape, const uint8_t* packed_bases, uint32_t group,
              uint32_t first)
      : quads(quads), group(group), first(first), head_dim(shape.head_dim) {
    Column words;
    for (uint32_t lane = 0; lane < kColumnLanes; ++lane) {
      words[lane] = base_word(shape, PH_KV_VALUES, packed_bases, (first + lane) * tile_groups(shape) + group);
    }
    for (uint32_t j = 0; j < 4; ++j) {
      const Column one = words >> 8 * j & 0xff, two = one | one << 8;
      bases[j] = two | two << 16;
    }
  }

  void put(uint32_t i, uint32_t s, uint32_t j, Column residuals) const {
    const uint32_t quad = 4 * i + 2 * (s / 2) + s % 2, column = kTileChannels * group + 8 * j + first;
    store(quads + (quad * head_dim + column) * 4, residuals + bases[j]);
  }
};

// Widths above 4 are two groups, of 4 bits and of the rest.
template <uint32_t kWidth, typename Target>
void unpack_group(const uint8_t* source, uint32_t first, const Target& target) {
  constexpr uint32_t kLow = kWidth > 4 ? 4 : kWidth;
  for (uint32_t pair = 0; pair < 2; ++pair) {
    Column low[2][8], high[2][8];
    load_nibbles<kLow>(source, first, pair, low);
    if (kWidth > 4) load_nibbles<kWidth - kLow>(source + kGroupBytes * 4, first, pair, high);
    for (uint32_t i = 0; i < 2; ++i) {
#pragma GCC unroll 8
      for (uint32_t x = 0; x < 8; ++x) {
        Column even = low[i][x] & 0x0f0f0f0fu, odd = low[i][x] >> 4 & 0x0f0f0f0fu;
        if (kWidth > 4) {
          even |= (high[i][x] & 0x0f0f0f0fu) << 4;
          odd |= high[i][x] & 0xf0f0f0f0u;
        }
        target.put(2 * pair + i, x / 2, x % 2, even);
        target.put(2 * pair + i, x / 2, x % 2 + 2, odd);
      }
    }
  }
}

#endif

template <typename Target>
void unpack_part(const TileShape& shape, uint32_t widths, const uint8_t* bases, const uint8_t* source,
                 uint8_t* quads) {
  for (uint32_t group = 0; group < tile_groups(shape); ++group) {
    const uint32_t width = widths >> 4 * group & 15;
    for (uint32_t first = 0; first < 8; first += kColumnLanes) {
      const Target target(quads, shape, bases, group, first);
      with_width(width, [&](auto constant) { unpack_group<constant.value>(source, first, target); });
    }
    source += kGroupBytes * width;
  }
}

alignas(64) constexpr uint8_t kNoBases[kMostHeadDim] = {};

__attribute__((flatten)) void unpack(const TileShape& shape, uint32_t part, uint32_t widths,
                                     const uint8_t* bases, const uint8_t* groups, uint8_t* quads) {
  if (shape.parts[part].base_bits == 0) bases = kNoBases;
  if (part == PH_KV_KEYS) unpack_part<KeyTarget>(shape, widths, bases, groups, quads);
  else unpack_part<ValueTarget>(shape, widths, bases, groups, quads);
}

// ---- 16-bit values

// Vectors of fragments: a vector holds the 16 bytes of lanes 4 * g + i for one g and as many i as fit.
using Halves = uint16_t __attribute__((vector_size(kVectorBytes)));
constexpr uint32_t kFragmentLanes = kVectorBytes / 16;

// How far ahead of its use a record is asked for: it is read once, so never there already.
constexpr uint32_t kPrefetchBytes = 2048;

// In each 16 bytes: the lower, or upper, halves of both, a value of each in turn.
Halves interleave(Halves a, Halves b, bool upper) {
#if defined(__AVX512BW__)
  return (Halves)(upper ? _mm512_unpackhi_epi16((__m512i)a, (__m512i)b)
                        : _mm512_unpacklo_epi16((__m512i)a, (__m512i)b));
#elif defined(__AVX2__)
  return (Halves)(upper ? _mm256_unpackhi_epi16((__m256i)a, (__m256i)b)
                        : _mm256_unpacklo_epi16((__m256i)a, (__m256i)b));
#else
  constexpr Halves low = {0, 8, 1, 9, 2, 10, 3, 11}, high = {4, 12, 5, 13, 6, 14, 7, 15};
  return upper ? __builtin_shuffle(a, b, high) : __builtin_shuffle(a, b, low);
#endif
}

// In each 16 bytes: eight rows of eight become columns. Rows i and i + 4 interleaved, three times over.
void transpose_halves(Halves rows[8]) {
#pragma GCC unroll 3
  for (uint32_t round = 0; round < 3; ++round) {
    Halves next[8];
#pragma GCC unroll 4
    for (uint32_t i = 0; i < 4; ++i) {
      next[2 * i] = interleave(rows[i], rows[i + 4], false);
      next[2 * i + 1] = interleave(rows[i], rows[i + 4], true);
    }
#pragma GCC unroll 8
    for (uint32_t i = 0; i < 8; ++i) rows[i] = next[i];
  }
}

// Calls use(fragment's first byte, fragment, first lane i).
template <typename Use>
void for_fragments(const TileShape& shape, Use use) {
  for (uint32_t f = 0; f < shape.head_dim / kFragmentChannels * 4; ++f) {
    for (uint32_t i = 0; i < 4; i += kFragmentLanes) use(kFragmentBytes * f + 16 * i, f, i);
  }
}

// The token and channel of value x, 0 to 7, of a lane 4 * g + i of a fragment, where g runs along the other of the two.
struct RawPlace {
  uint32_t token, channel;  // for g = 0
};
RawPlace raw_place(uint32_t part, uint32_t fragment, uint32_t i, uint32_t x) {
  const uint32_t first = kFragmentChannels * (fragment / 4), f = fragment % 4, r = x / 2, h = x % 2;
  if (part == PH_KV_KEYS) return {2 * f + r % 2, first + 4 * i + 2 * (r / 2) + h};
  return {16 * i + 4 * f + 2 * (r / 2) + h, first + 8 * (r % 2)};
}

__attribute__((flatten)) void pack_raw(const TileShape& shape, uint32_t part, const uint8_t* const* rows,
                                       uint8_t* raw) {
  // Keys: eight values of a lane are four channels of two tokens.
  if (part == PH_KV_KEYS) {
    for (uint32_t f = 0; f < shape.head_dim / kFragmentChannels * 4; ++f) {
      for (uint32_t lane = 0; lane < kLanes; ++lane) {
        const RawPlace place = raw_place(part, f, lane % 4, 0);
        const uint32_t token = 8 * (lane / 4) + place.token;
        const uint64_t even = load<uint64_t>(rows[token] + 2 * place.channel),
                       odd = load<uint64_t>(rows[token + 1] + 2 * place.channel);
        store(raw + kFragmentBytes * f + 16 * lane, even << 32 >> 32 | odd << 32);
        store(raw + kFragmentBytes * f + 16 * lane + 8, even >> 32 | odd >> 32 << 32);
      }
    }
    return;
  }
  for_fragments(shape, [&](uint32_t position, uint32_t f, uint32_t i) {
    Halves values[8];
    for (uint32_t x = 0; x < 8; ++x) {
      alignas(kVectorBytes) uint8_t bytes[kVectorBytes];
      for (uint32_t lane = 0; lane < kFragmentLanes; ++lane) {
        const RawPlace place = raw_place(part, f, i + lane, x);
        memcpy(bytes + 16 * lane, rows[place.token] + 2 * place.channel, 16);
      }
      values[x] = load<Halves>(bytes);
    }
    transpose_halves(values);
    for (uint32_t g = 0; g < 8; ++g) store(raw + position + 64 * g, values[g]);
  });
}

__attribute__((flatten)) void unpack_raw(const TileShape& shape, uint32_t part, const uint8_t* raw,
                                         uint8_t* target) {
  for_fragments(shape, [&](uint32_t position, uint32_t f, uint32_t i) {
    Halves values[8];
    for (uint32_t g = 0; g < 8; ++g) {
      __builtin_prefetch(raw + position + kPrefetchBytes + 64 * g);
      values[g] = load<Halves>(raw + position + 64 * g);
    }
    transpose_halves(values);
    for (uint32_t x = 0; x < 8; ++x) {
      alignas(kVectorBytes) uint8_t bytes[kVectorBytes];
      store(bytes, values[x]);
      for (uint32_t lane = 0; lane < kFragmentLanes; ++lane) {
        const RawPlace place = raw_place(part, f, i + lane, x);
        const uint32_t at = part == PH_KV_KEYS ? place.channel * kBlockTokens + key_column(place.token)
                                               : place.token * shape.head_dim + place.channel;
        memcpy(target + 2 * at, bytes + 16 * lane, 16);
      }
    }
  });
}

#define PH_TEXT(name) #name
#define PH_NAME(name) PH_TEXT(name)

}  // namespace

extern const TileKernels kTileKernels;
const TileKernels kTileKernels = {
    PH_NAME(PH_INSTRUCTION_SET), extremes, group_affines, quantize, pack, unpack, pack_raw, unpack_raw};

}  // namespace ph::kv::PH_INSTRUCTION_SET
