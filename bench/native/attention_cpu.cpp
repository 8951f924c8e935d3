// Decode attention on the CPU over packed tokens, beside the same over plain 32-bit and 16-bit floats: one sequence of
// 8,192 tokens, 8 kv heads. And what appending costs, beside memcpy. A table goes to standard error, JSON to standard
// output.
//
//   attention_cpu tests/fixtures/tiny/kv.safetensors [ROUNDS [CODEC]]
//
// CODEC picks those whose name begins with it.
//
// The variants take turns, in the same threads, over as many copies of their data as it takes for kColdBytes of others'
// to pass between two visits: no cache helps anybody. Times are medians; a speed-up is the median of the rounds' own.
// Plain arrays hold what the packed tokens stand for, so that outputs can be compared, and are.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "attention_baseline.h"
#include "common/error.h"
#include "common/float16.h"
#include "kv/block_cpu.h"
#include "kv/growing_cache.h"

namespace ph::bench {
namespace avx512 {
extern const BaselineKernels kBaselineKernels;
}
namespace avx2 {
extern const BaselineKernels kBaselineKernels;
}

namespace {

constexpr uint32_t kTokens = 8192, kHeads = 8, kPieceTokens = 2048, kParts = kv::kParts;
constexpr uint32_t kAppendTokens = 32768, kAppendChunk = 1024;

// As wide as what is measured.
const BaselineKernels& baseline_kernels() {
  const std::string chosen = kv::block_kernels().instruction_set;
  if (chosen.rfind("avx512", 0) == 0) return avx512::kBaselineKernels;
  if (chosen == "avx2" && __builtin_cpu_supports("fma")) return avx2::kBaselineKernels;
  throw Error(PH_ERROR_UNSUPPORTED, "Cannot compare on instruction set %s: it takes avx2 and fma, or avx512",
              chosen.c_str());
}

// ---- data

// A dump of keys and values, [heads][tokens][head_dim] f16: the tensors of two layers, in the order of the file.
struct Dump {
  static constexpr uint32_t kHeads = 2, kTokens = 1024, kHeadDim = 64, kLayers = 2;
  std::vector<uint16_t> halves;

  explicit Dump(const char* path) {
    FILE* file = fopen(path, "rb");
    uint64_t header = 0;
    halves.resize(static_cast<size_t>(kLayers) * kParts * kHeads * kTokens * kHeadDim);
    const bool read = file != nullptr && fread(&header, sizeof header, 1, file) == 1 && header < 1u << 20 &&
                      fseek(file, static_cast<long>(header), SEEK_CUR) == 0 &&
                      fread(halves.data(), 2, halves.size(), file) == halves.size();
    if (file != nullptr) fclose(file);
    if (!read) throw Error(PH_ERROR_INVALID_ARGUMENT, "Cannot read the dump %s", path);
  }

  uint16_t at(uint32_t part, uint32_t layer, uint32_t head, uint64_t token, uint32_t channel) const {
    const size_t row =
        ((static_cast<size_t>(layer) * kParts + part) * kHeads + head) * kTokens + token % kTokens;
    return halves[row * kHeadDim + channel];
  }
};

// Tokens [first, first + count) of one part, [token][head][channel]: every 64 channels are a head of the dump, from a
// token on of their own.
std::vector<uint16_t> make_tokens(const Dump& dump, uint32_t part, uint32_t head_dim, uint64_t first,
                                  uint64_t count) {
  std::vector<uint16_t> made;
  made.reserve(count * kHeads * head_dim);
  for (uint64_t token = first; token < first + count; ++token) {
    for (uint32_t channel = 0; channel < kHeads * head_dim; ++channel) {
      const uint32_t strand = channel / Dump::kHeadDim;
      made.push_back(
          dump.at(part, strand / 2 % 2, strand % 2, token + 331 * strand, channel % Dump::kHeadDim));
    }
  }
  return made;
}

// ---- timing

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

template <typename Work>
double milliseconds(Work work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

uint64_t last_level_cache() {
  uint64_t largest = 0;
  for (const int name : {_SC_LEVEL2_CACHE_SIZE, _SC_LEVEL3_CACHE_SIZE})
    largest = std::max(largest, static_cast<uint64_t>(std::max(0L, sysconf(name))));
  return largest;
}

struct Memory {
  ph_device& device;
  uint8_t* const data;
  Memory(ph_device& device, uint64_t bytes) : device(device), data(allocate(device, bytes)) {}
  ~Memory() { release(device, data); }
  Memory(const Memory&) = delete;
};

// ---- attention over plain arrays

struct Plain {
  uint32_t head_dim, copies;
  bool half;
  Memory memory;  // [copies][parts][heads][tokens][head_dim]

  Plain(ph_device& device, uint32_t head_dim, uint32_t copies, bool half)
      : head_dim(head_dim), copies(copies), half(half), memory(device, copies * copy_bytes(head_dim, half)) {}

  static uint64_t copy_bytes(uint32_t head_dim, bool half) {
    return static_cast<uint64_t>(kParts) * kHeads * kTokens * head_dim * (half ? 2 : 4);
  }
  uint64_t element(uint32_t part, uint32_t head, uint32_t token) const {
    return ((static_cast<uint64_t>(part) * kHeads + head) * kTokens + token) * head_dim;
  }
  uint64_t element_bytes() const { return half ? 2 : 4; }

  // [token][head][channel] to all copies.
  void fill(const std::vector<uint16_t> (&tokens)[kParts]) {
    for (uint32_t part = 0; part < kParts; ++part) {
      for (uint32_t head = 0; head < kHeads; ++head) {
        for (uint32_t token = 0; token < kTokens; ++token) {
          const uint16_t* source =
              tokens[part].data() + (static_cast<uint64_t>(token) * kHeads + head) * head_dim;
          uint8_t* target = memory.data + element(part, head, token) * element_bytes();
          for (uint32_t channel = 0; channel < head_dim; ++channel) {
            const float value = f16_to_float(source[channel]);
            if (half) memcpy(target + 2 * channel, source + channel, 2);
            else memcpy(target + 4 * channel, &value, 4);
          }
        }
      }
    }
    for (uint32_t copy = 1; copy < copies; ++copy)
      memcpy(memory.data + copy * copy_bytes(head_dim, half), memory.data, copy_bytes(head_dim, half));
  }

  // queries and out: [kHeads * group][head_dim].
  void attend(uint32_t copy, uint32_t group, const uint16_t* queries, uint16_t* out, float scale) const {
    constexpr uint32_t kPieces = kTokens / kPieceTokens;
    static float partials[kPieces][kHeads][kMostGroup * (kMostHeadDim + 2)];
    const BaselineKernels& kernels = baseline_kernels();
    const uint8_t* base = memory.data + copy * copy_bytes(head_dim, half);
#pragma omp parallel
    {
#pragma omp for collapse(2) schedule(dynamic)
      for (uint32_t head = 0; head < kHeads; ++head) {
        for (uint32_t piece = 0; piece < kPieces; ++piece) {
          const Piece work = {base + element(PH_KV_KEYS, head, piece * kPieceTokens) * element_bytes(),
                              base + element(PH_KV_VALUES, head, piece * kPieceTokens) * element_bytes(),
                              kPieceTokens,
                              head_dim,
                              group,
                              queries + head * group * head_dim,
                              scale,
                              partials[piece][head]};
          (half ? kernels.attend_f16 : kernels.attend_f32)(work);
        }
      }
#pragma omp for schedule(static)
      for (uint32_t query_head = 0; query_head < kHeads * group; ++query_head) {
        const auto partial = [&](uint32_t piece) {
          return partials[piece][query_head / group] + query_head % group * (head_dim + 2);
        };
        float maximum = -INFINITY, total = 0, sums[kMostHeadDim] = {};
        for (uint32_t piece = 0; piece < kPieces; ++piece)
          maximum = std::max(maximum, partial(piece)[head_dim]);
        for (uint32_t piece = 0; piece < kPieces; ++piece) {
          const float factor = std::exp2(partial(piece)[head_dim] - maximum);
          total += partial(piece)[head_dim + 1] * factor;
          for (uint32_t channel = 0; channel < head_dim; ++channel)
            sums[channel] += partial(piece)[channel] * factor;
        }
        for (uint32_t channel = 0; channel < head_dim; ++channel)
          out[query_head * head_dim + channel] = static_cast<uint16_t>(float_to_f16(sums[channel] / total));
      }
    }
  }
};

// ---- cases

struct Codec {
  const char* name;
  ph_kv_cache_codec codec;
};

Codec packkv(float key_rel, float value_rel) {
  ph_kv_cache_codec codec = {};
  codec.key_quantizer = codec.value_quantizer = PH_KV_CACHE_PACKKV;
  codec.key_rel = key_rel;
  codec.value_rel = value_rel;
  return {"packkv 0.1, 0.2", codec};
}

Codec fixed(const char* name, uint32_t bits) {
  ph_kv_cache_codec codec = {};
  codec.key_quantizer = codec.value_quantizer = PH_KV_CACHE_FIXED;
  codec.key_bits = codec.value_bits = bits;
  return {name, codec};
}

ph_kv_cache_config config_of(uint32_t head_dim, uint32_t group, uint32_t layers, uint32_t tokens,
                             uint32_t step) {
  ph_kv_cache_config config = {};
  config.layers = layers;
  config.query_heads = kHeads * group;
  config.kv_heads = kHeads;
  config.head_dim = head_dim;
  config.dtype = config.query_dtype = PH_F16;
  config.sequences = 1;
  config.residual = 128;
  config.sinks = 4;
  config.tokens = tokens;
  config.step_tokens = step;
  // Room for records of any width.
  config.pool_bytes =
      static_cast<uint64_t>(layers) * (static_cast<uint64_t>(tokens) * kHeads * head_dim * 3 + (1u << 20));
  return config;
}

// A step of all layers, whose tokens are [token][head][channel].
void append_step(ph_kv_cache& cache, const uint16_t* keys, const uint16_t* values, uint32_t tokens) {
  const uint32_t sequence = 0;
  cache.begin(&sequence, &tokens, 1);
  for (uint32_t layer = 0; layer < cache.config().layers; ++layer) {
    cache.append(layer, {{reinterpret_cast<const uint8_t*>(keys), reinterpret_cast<const uint8_t*>(values)}});
  }
}

double relative_error(const std::vector<uint16_t>& found, const std::vector<uint16_t>& expected) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    const double x = static_cast<double>(f16_to_float(found[i])),
                 y = static_cast<double>(f16_to_float(expected[i]));
    error += (x - y) * (x - y);
    norm += y * y;
  }
  return std::sqrt(error / norm);
}

const char* comma = "";

void run_attention(ph_device& device, const Dump& dump, uint32_t head_dim, uint32_t rounds,
                   const std::string& chosen) {
  const uint64_t cold_bytes = 4 * last_level_cache();
  const uint64_t bytes32 = Plain::copy_bytes(head_dim, false), bytes16 = Plain::copy_bytes(head_dim, true);
  const uint32_t copies = static_cast<uint32_t>(std::max<uint64_t>(2, cold_bytes / (bytes32 + bytes16) + 1));
  std::vector<uint16_t> tokens[kParts];
  for (uint32_t part = 0; part < kParts; ++part) tokens[part] = make_tokens(dump, part, head_dim, 0, kTokens);
  Plain plain32(device, head_dim, copies, false), plain16(device, head_dim, copies, true);
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));

  for (const Codec& codec :
       {packkv(0.1f, 0.2f), fixed("fixed 2", 2), fixed("fixed 3", 3), fixed("fixed 4", 4)}) {
    if (std::string(codec.name).rfind(chosen, 0) != 0) continue;
    for (const uint32_t group : {1u, 4u, 8u}) {
      const ph_kv_cache_config config = config_of(head_dim, group, copies, kTokens, kTokens);
      ph_kv_cache cache(device, config, std::vector<ph_kv_cache_codec>(copies, codec.codec).data());
      cache.add();
      const size_t row = static_cast<size_t>(kHeads) * head_dim;
      append_step(cache, tokens[0].data(), tokens[1].data(), kTokens - 1);
      append_step(cache, tokens[0].data() + (kTokens - 1) * row, tokens[1].data() + (kTokens - 1) * row, 1);
      cache.check();
      if (group == 1) {
        std::vector<uint16_t> restored[kParts];
        for (std::vector<uint16_t>& part : restored) part.resize(kTokens * row);
        cache.read(0, 0, 0, kTokens, reinterpret_cast<uint8_t*>(restored[0].data()),
                   reinterpret_cast<uint8_t*>(restored[1].data()));
        plain32.fill(restored);
        plain16.fill(restored);
      }
      std::mt19937 random(1);
      std::normal_distribution<float> normal;
      std::vector<uint16_t> queries(kHeads * group * head_dim), out[3];
      for (uint16_t& query : queries) query = static_cast<uint16_t>(float_to_f16(normal(random)));
      for (std::vector<uint16_t>& each : out) each.resize(queries.size());

      std::vector<double> times[3], speedups[2];
      for (uint32_t round = 0; round < rounds + 2; ++round) {
        const uint32_t copy = round % copies;
        const double took[3] = {
            milliseconds([&] {
              cache.attend(copy, reinterpret_cast<const uint8_t*>(queries.data()),
                           reinterpret_cast<uint8_t*>(out[0].data()), scale);
            }),
            milliseconds([&] { plain32.attend(copy, group, queries.data(), out[1].data(), scale); }),
            milliseconds([&] { plain16.attend(copy, group, queries.data(), out[2].data(), scale); })};
        if (round < 2) continue;  // to warm up
        for (uint32_t i = 0; i < 3; ++i) times[i].push_back(took[i]);
        for (uint32_t i = 0; i < 2; ++i) speedups[i].push_back(took[i + 1] / took[0]);
      }
      const double error = std::max(relative_error(out[0], out[1]), relative_error(out[2], out[1]));
      if (!(error <= 2e-3)) {
        throw Error(PH_ERROR_INTERNAL, "Outputs of %s, head_dim %u, group %u differ by %g", codec.name,
                    head_dim, group, error);
      }
      const ph_kv_cache_statistics statistics = cache.statistics();
      const double bytes = static_cast<double>(statistics.packed_bytes) / copies;
      const double bits = bytes * 8 / static_cast<double>(kParts * row * statistics.packed_tokens);
      const double ms[3] = {median(times[0]), median(times[1]), median(times[2])};
      const double faster[2] = {median(speedups[0]), median(speedups[1])};
      fprintf(
          stderr,
          "| %-15s | %8u | %5u | %4.2f | %10.3f | %7.3f | %7.3f | %8.2f | %8.2f | %12.1f | %4.1f | %4.1f |\n",
          codec.name, head_dim, group, bits, ms[0], ms[1], ms[2], faster[0], faster[1], bytes / ms[0] / 1e6,
          static_cast<double>(bytes32) / ms[1] / 1e6, static_cast<double>(bytes16) / ms[2] / 1e6);
      printf(
          "%s\n    {\"codec\": \"%s\", \"headDim\": %u, \"group\": %u, \"bits\": %.3f, \"packedMs\": %.4f, "
          "\"f32Ms\": "
          "%.4f, \"f16Ms\": %.4f, \"overF32\": %.3f, \"overF16\": %.3f, \"error\": %.2e}",
          comma, codec.name, head_dim, group, bits, ms[0], ms[1], ms[2], faster[0], faster[1], error);
      comma = ",";
    }
  }
}

// Appends kAppendTokens tokens, a chunk at a time, from memory that no cache holds, and copies as many bytes.
void run_append(ph_device& device, const Dump& dump, uint32_t rounds) {
  const uint32_t head_dim = 128;
  const uint64_t row_bytes = static_cast<uint64_t>(kHeads) * head_dim * 2,
                 bytes = kParts * kAppendTokens * row_bytes;
  std::vector<uint16_t> tokens[kParts];
  for (uint32_t part = 0; part < kParts; ++part)
    tokens[part] = make_tokens(dump, part, head_dim, 0, kAppendTokens);
  Memory source(device, bytes), target(device, bytes);
  for (uint32_t part = 0; part < kParts; ++part)
    memcpy(source.data + part * bytes / 2, tokens[part].data(), bytes / 2);
  memset(target.data, 1, bytes);
  const ph_kv_cache_codec codec = packkv(0.1f, 0.2f).codec;
  std::vector<double> append_times, copy_times, shares;
  for (uint32_t round = 0; round < rounds + 1; ++round) {
    const double copied = milliseconds([&] { copy(device, target.data, source.data, bytes); });
    ph_kv_cache cache(device, config_of(head_dim, 1, 1, kAppendTokens, kAppendChunk), &codec);
    cache.add();
    const auto append_all = [&] {
      for (uint32_t first = 0; first < kAppendTokens; first += kAppendChunk) {
        append_step(cache, reinterpret_cast<const uint16_t*>(source.data + first * row_bytes),
                    reinterpret_cast<const uint16_t*>(source.data + bytes / 2 + first * row_bytes),
                    kAppendChunk);
      }
    };
    append_all();  // to have the pool's pages, whose first touch is not append's to pay
    cache.truncate(0, 0);
    for (uint32_t pass = 0; pass < 2 * last_level_cache() / bytes + 1; ++pass)
      memset(target.data, static_cast<int>(round), bytes);
    const double appended = milliseconds(append_all);
    if (round == 0) continue;
    copy_times.push_back(copied);
    append_times.push_back(appended);
    shares.push_back(copied / appended);
  }
  const double gigabytes = static_cast<double>(bytes) / 1e6;
  fprintf(stderr,
          "append of %u tokens, %u at a time: %.2f GB/s of 16-bit input, %.3f of memcpy's %.2f GB/s\n",
          kAppendTokens, kAppendChunk, gigabytes / median(append_times), median(shares),
          gigabytes / median(copy_times));
  printf(
      "\n  ],\n  \"append\": {\"tokens\": %u, \"chunk\": %u, \"gigabytesPerSecond\": %.3f, "
      "\"shareOfMemcpy\": %.4f}",
      kAppendTokens, kAppendChunk, gigabytes / median(append_times), median(shares));
}

int run(int argc, char** argv) {
  if (argc < 2)
    throw Error(PH_ERROR_INVALID_ARGUMENT, "usage: attention_cpu KV.SAFETENSORS [ROUNDS [CODEC]]");
  const uint32_t rounds = argc > 2 ? static_cast<uint32_t>(atoi(argv[2])) : 31;
  ph_device* device = open_device(0);
  const Dump dump(argv[1]);
  ph_device_info info;
  device_info(*device, info);
  fprintf(
      stderr,
      "%s, %s, %u threads, last-level cache of %llu MiB; %u tokens, %u kv heads, medians of %u rounds\n\n",
      info.name, info.instruction_set, info.processors,
      static_cast<unsigned long long>(last_level_cache() >> 20), kTokens, kHeads, rounds);
  fprintf(
      stderr,
      "| codec           | head_dim | group | bits | packed, ms | f32, ms | f16, ms | over f32 | over f16 | "
      "GB/s: packed |  f32 |  f16 |\n"
      "| --------------- | -------: | ----: | ---: | ---------: | ------: | ------: | -------: | -------: | "
      "-----------: | ---: | ---: |\n");
  printf(
      "{\n  \"processor\": \"%s\", \"instructionSet\": \"%s\", \"threads\": %u, \"rounds\": %u,\n  "
      "\"attention\": [",
      info.name, info.instruction_set, info.processors, rounds);
  for (const uint32_t head_dim : {128u, 64u})
    run_attention(*device, dump, head_dim, rounds, argc > 3 ? argv[3] : "");
  run_append(*device, dump, std::max(1u, rounds / 4));
  printf("\n}\n");
  close_device(device);
  return 0;
}

}  // namespace
}  // namespace ph::bench

int main(int argc, char** argv) {
  try {
    return ph::bench::run(argc, argv);
  } catch (const ph::Error& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
