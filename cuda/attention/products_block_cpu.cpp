// The products of products.h on one CPU core; see products_block_cpu.h. Plain loops over unpacked codes, which compilers
// turn into vectors: over the tokens of a block for scores, over channels for values.
#include "attention/products_block_cpu.h"

#include "common/float16.h"

namespace ph::kv::PH_INSTRUCTION_SET {
extern const TileKernels kTileKernels;
}

namespace ph::attention::PH_INSTRUCTION_SET {

using kv::kBlockTokens;
using kv::kMostHeadDim;
using kv::kMostTileCodes;
using kv::PH_INSTRUCTION_SET::kTileKernels;

namespace {

// 16-bit values to floats.
void load_row(uint32_t dtype, const uint8_t* source, uint32_t count, float* row) {
  for (uint32_t i = 0; i < count; ++i) {
    uint16_t bits;
    memcpy(&bits, source + 2 * i, sizeof bits);
    row[i] = kv::scale_from_bits(dtype, bits);
  }
}

// Calls use(token, row) for the tokens of a run, with the head's values of a part.
template <typename Use>
void for_run(const ProductCall& call, uint32_t part, uint32_t head, uint32_t run, Use use) {
  const uint32_t count = call.tokens.recent(call.cache), dim = call.cache.head_dim;
  for (uint32_t at = run * kv::kRunTokens; at < std::min(count, (run + 1) * kv::kRunTokens); ++at) {
    const uint32_t token = call.tokens.recent_token(call.cache, at);
    const uint8_t* source =
        kv::recent_row(call.cache, call.tokens.layer, call.tokens.sequence, part, token) + head * dim * 2ull;
    float row[kMostHeadDim];
    load_row(call.cache.dtype, source, dim, row);
    use(token, row);
  }
}

// Calls use(first token, quads, affines) for a block's codes.
template <typename Use>
void for_block(const ProductCall& call, uint32_t part, uint32_t head, uint32_t block, Use use) {
  kv::TileReader reader;
  alignas(64) uint8_t quads[kMostTileCodes];
  reader.read(call.cache, call.shape, call.tokens.layer, call.tokens.sequence, block, head);
  reader.unpack(kTileKernels, call.shape, part, quads);
  kv::Affine affines[kBlockTokens];
  for (uint32_t token = 0; token < kBlockTokens; ++token)
    affines[token] = kv::stored_affine(call.shape, part, reader.params, token);
  use(call.cache.sinks + block * kBlockTokens, quads, affines);
}

// The four codes of a quad as a word, the first lowest.
uint32_t load_quad(const uint8_t* quads, uint32_t at) {
  uint32_t word;
  memcpy(&word, quads + 4 * at, sizeof word);
  return word;
}

float code_of(uint32_t quad, int at) {
  return static_cast<float>(static_cast<int32_t>(quad >> 8 * at & 255));
}

void score(const ProductCall& call, uint32_t head, uint32_t first, uint32_t last, const uint8_t* queries,
           float* out, float scale) {
  const uint32_t group = call.group(), dim = call.cache.head_dim, runs = call.tokens.runs(call.cache);
  const uint64_t length = call.tokens.length;
  float query[kMostGroup][kMostHeadDim], sums[kMostGroup];
  for (uint32_t member = 0; member < group; ++member) {
    load_row(call.cache.dtype, queries + 2ull * (head * group + member) * dim, dim, query[member]);
    sums[member] = 0.0f;
    for (uint32_t channel = 0; channel < dim; ++channel) sums[member] += query[member][channel];
  }
  float* own = out + head * group * length;
  for (uint32_t run = first; run < std::min(last, runs); ++run) {
    for_run(call, PH_KV_KEYS, head, run, [&](uint32_t token, const float* key) {
      for (uint32_t member = 0; member < group; ++member) {
        float sum = 0.0f;
        for (uint32_t channel = 0; channel < dim; ++channel) sum += query[member][channel] * key[channel];
        own[member * length + token] = sum * scale;
      }
    });
  }
  for (uint32_t unit = std::max(first, runs); unit < last; ++unit) {
    for_block(call, PH_KV_KEYS, head, unit - runs,
              [&](uint32_t start, const uint8_t* quads, const kv::Affine* affines) {
                for (uint32_t member = 0; member < group; ++member) {
                  float found[kBlockTokens] = {};  // by key_column
                  for (uint32_t channel = 0; channel < dim; channel += 4) {
                    const float* q = query[member] + channel;
                    for (uint32_t column = 0; column < kBlockTokens; ++column) {
                      const uint32_t quad = load_quad(quads, channel / 4 * kBlockTokens + column);
                      found[column] += q[0] * code_of(quad, 0) + q[1] * code_of(quad, 1) +
                                       q[2] * code_of(quad, 2) + q[3] * code_of(quad, 3);
                    }
                  }
                  for (uint32_t token = 0; token < kBlockTokens; ++token) {
                    const kv::Affine& affine = affines[token];
                    own[member * length + start + token] =
                        (found[kv::key_column(token)] + affine.zero * sums[member]) * affine.scale * scale;
                  }
                }
              });
  }
}

void weigh(const ProductCall& call, uint32_t head, uint32_t first, uint32_t last, const float* weights,
           float* sums) {
  const uint32_t group = call.group(), dim = call.cache.head_dim, runs = call.tokens.runs(call.cache);
  const uint64_t length = call.tokens.length;
  const float* own = weights + head * group * length;
  float found[kMostGroup][kMostHeadDim] = {}, zeros[kMostGroup] = {};
  for (uint32_t run = first; run < std::min(last, runs); ++run) {
    for_run(call, PH_KV_VALUES, head, run, [&](uint32_t token, const float* value) {
      for (uint32_t member = 0; member < group; ++member) {
        const float weight = own[member * length + token];
        for (uint32_t channel = 0; channel < dim; ++channel)
          found[member][channel] += weight * value[channel];
      }
    });
  }
  for (uint32_t unit = std::max(first, runs); unit < last; ++unit) {
    for_block(call, PH_KV_VALUES, head, unit - runs,
              [&](uint32_t start, const uint8_t* quads, const kv::Affine* affines) {
                for (uint32_t member = 0; member < group; ++member) {
                  float products[kBlockTokens];
                  for (uint32_t token = 0; token < kBlockTokens; ++token) {
                    products[token] = own[member * length + start + token] * affines[token].scale;
                    zeros[member] += products[token] * affines[token].zero;
                  }
                  for (uint32_t token = 0; token < kBlockTokens; token += 4) {
                    const float* w = products + token;
                    for (uint32_t channel = 0; channel < dim; ++channel) {
                      const uint32_t quad = load_quad(quads, token / 4 * dim + channel);
                      found[member][channel] += w[0] * code_of(quad, 0) + w[1] * code_of(quad, 1) +
                                                w[2] * code_of(quad, 2) + w[3] * code_of(quad, 3);
                    }
                  }
                }
              });
  }
  for (uint32_t member = 0; member < group; ++member) {
    float* target = sums + static_cast<uint64_t>(head * group + member) * dim;
    for (uint32_t channel = 0; channel < dim; ++channel)
      target[channel] = found[member][channel] + zeros[member];
  }
}

}  // namespace

#define PH_STRING_OF(name) #name
#define PH_STRING(name) PH_STRING_OF(name)
extern const ProductKernels kProductKernels;
const ProductKernels kProductKernels = {PH_STRING(PH_INSTRUCTION_SET), score, weigh};

}  // namespace ph::attention::PH_INSTRUCTION_SET
