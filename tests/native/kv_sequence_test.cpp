// Sequences of the growing cache to host memory and back through the C ABI alone, for the sanitizers: what comes back is
// the same to the bit, and of records that were tampered with either nothing is taken, or what attention can read.
//
// kv_sequence_test [SEED [STRIDE]]: STRIDE tampers as much less often, for slow sanitizers.
#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "packhorse.h"

namespace {

ph_device* device;
std::mt19937 source_of_random;
uint32_t random_below(uint64_t end) { return static_cast<uint32_t>(source_of_random() % end); }

constexpr uint32_t kLayers = 2;

struct Buffer {
  explicit Buffer(uint64_t bytes) {
    int32_t status;
    handle = ph_buffer_create(device, bytes, &status, error, sizeof error);
    CHECK(handle != nullptr);
    // Numbers of about -1 to 1 in f16, and small ones in bf16.
    std::vector<uint16_t> bits(bytes / 2);
    for (uint16_t& word : bits)
      word = static_cast<uint16_t>(random_below(2) << 15 | (0x3000 + random_below(0xc00)));
    OK(ph_buffer_upload(device, handle, 0, bits.data(), bytes, error, sizeof error));
  }
  ~Buffer() { OK(ph_buffer_destroy(device, handle, error, sizeof error)); }
  Buffer(const Buffer&) = delete;
  ph_buffer* handle;
};

struct Layer {
  std::vector<uint8_t> records, recent;
  std::vector<uint64_t> offsets;
  bool operator==(const Layer& other) const {
    return records == other.records && recent == other.recent && offsets == other.offsets;
  }
};

struct Exported {
  uint64_t tokens;
  uint32_t blocks;
  std::vector<uint64_t> record_bytes = std::vector<uint64_t>(kLayers);
  std::vector<Layer> layers = std::vector<Layer>(kLayers);
};

struct Cache {
  Cache(const ph_kv_cache_config& config, const ph_kv_cache_codec* codecs) : config(config) {
    int32_t status;
    handle = ph_kv_cache_create(device, &config, codecs, &status, error, sizeof error);
    CHECK(handle != nullptr);
  }
  ~Cache() { OK(ph_kv_cache_destroy(device, handle, error, sizeof error)); }
  Cache(const Cache&) = delete;

  // Appends random tokens, and attends to them where they are few.
  void append(uint32_t sequence, uint32_t tokens) {
    const uint64_t bytes = 2ull * tokens * config.head_dim;
    const Buffer keys(bytes * config.kv_heads), values(bytes * config.kv_heads);
    const Buffer queries(bytes * config.query_heads), out(bytes * config.query_heads);
    OK(ph_kv_cache_begin(device, handle, &sequence, &tokens, 1, error, sizeof error));
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      OK(ph_kv_cache_append(device, handle, layer, keys.handle, 0, values.handle, 0, error, sizeof error));
      if (tokens > 8) continue;
      OK(ph_kv_cache_attend(device, handle, layer, queries.handle, 0, out.handle, 0, 0.1f, error,
                            sizeof error));
    }
    OK(ph_device_synchronize(device, error, sizeof error));
  }

  Exported export_sequence(uint32_t sequence) {
    Exported made{};
    OK(ph_kv_cache_length(device, handle, sequence, &made.tokens, error, sizeof error));
    OK(ph_kv_cache_measure(device, handle, sequence, &made.blocks, made.record_bytes.data(), error,
                           sizeof error));
    for (uint32_t i = 0; i < kLayers; ++i) {
      Layer& layer = made.layers[i];
      layer.records.resize(made.record_bytes[i]);
      layer.offsets.resize(made.blocks + 1);
      layer.recent.resize((made.tokens - 64ull * made.blocks) * config.kv_heads * config.head_dim * 4);
      OK(ph_kv_cache_export(device, handle, sequence, i, layer.records.data(), layer.records.size(),
                            layer.offsets.data(), layer.recent.data(), layer.recent.size(), error,
                            sizeof error));
    }
    return made;
  }

  // False if it is refused as corrupt; then the cache is as it was.
  bool import_sequence(const Exported& from, uint32_t& sequence) {
    const uint64_t free_bytes = statistics().free_bytes;
    int32_t status = ph_kv_cache_begin_import(device, handle, from.tokens, from.blocks,
                                              from.record_bytes.data(), &sequence, error, sizeof error);
    for (uint32_t i = 0; i < kLayers && status == PH_OK; ++i) {
      const Layer& layer = from.layers[i];
      uint64_t length, malformed;
      CHECK(ph_kv_cache_length(device, handle, sequence, &length, error, sizeof error) != PH_OK);
      status = ph_kv_cache_import(device, handle, sequence, i, layer.records.data(), layer.records.size(),
                                  layer.offsets.data(), layer.recent.data(), layer.recent.size(), &malformed,
                                  error, sizeof error);
      CHECK((malformed == UINT64_MAX) == (status == PH_OK));
      if (status == PH_OK) continue;
      CHECK(malformed < from.blocks);
      OK(ph_kv_cache_remove(device, handle, sequence, error, sizeof error));
    }
    if (status == PH_OK) return true;
    check(status == PH_ERROR_CORRUPT, error, __LINE__);
    CHECK(statistics().free_bytes == free_bytes);
    return false;
  }

  ph_kv_cache_statistics statistics() {
    ph_kv_cache_statistics found;
    OK(ph_kv_cache_get_statistics(device, handle, &found, error, sizeof error));
    return found;
  }

  ph_kv_cache_config config;
  ph_kv_cache* handle;
};

// Changes a byte or a few of a layer's records, its offsets, or how long they are.
void tamper(Exported& sequence) {
  Layer& layer = sequence.layers[random_below(kLayers)];
  const uint32_t block = random_below(sequence.blocks);
  const uint64_t begin = layer.offsets[block];
  uint8_t* const record = layer.records.data() + begin;
  const uint64_t bytes = layer.offsets[block + 1] - begin;
  switch (random_below(6)) {
    case 0:  // a bit
      record[random_below(bytes)] ^= static_cast<uint8_t>(1u << random_below(8));
      break;
    case 1:  // the header of the first head
      record[528 + random_below(16)] = static_cast<uint8_t>(random_below(256));
      break;
    case 2:  // a stretch
      for (uint64_t i = random_below(bytes), end = std::min<uint64_t>(bytes, i + 600); i < end; ++i)
        record[i] = static_cast<uint8_t>(random_below(256));
      break;
    case 3:  // where a block begins
      layer.offsets[block] = random_below(2) == 0 ? random_below(4 * layer.records.size()) : UINT64_MAX - 15;
      break;
    case 4:
      layer.offsets[block] += 16;
      break;
    default:  // a unit taken out, or put in
      if (random_below(2) == 0) {
        layer.records.erase(layer.records.end() - 16, layer.records.end());
      } else {
        layer.records.insert(layer.records.begin() + static_cast<ptrdiff_t>(random_below(bytes)), 16, 1);
      }
      layer.offsets.back() = layer.records.size();
      sequence.record_bytes[static_cast<size_t>(&layer - sequence.layers.data())] = layer.records.size();
  }
}

}  // namespace

int main(int count, char** words) {
  const uint32_t seed = count > 1 ? static_cast<uint32_t>(strtoul(words[1], nullptr, 10)) : 1;
  const uint32_t stride = count > 2 ? static_cast<uint32_t>(strtoul(words[2], nullptr, 10)) : 1;
  source_of_random.seed(seed);
  printf("seed %u\n", seed);
  int32_t status;
  device = ph_device_open(0, &status, error, sizeof error);
  CHECK(device != nullptr);
  uint32_t taken = 0, refused = 0;
  for (const uint32_t head_dim : {64u, 96u, 128u, 256u}) {
    ph_kv_cache_config config{};
    config.layers = kLayers;
    config.kv_heads = 1 + head_dim % 3;
    config.query_heads = 2 * config.kv_heads;
    config.head_dim = head_dim;
    config.dtype = config.query_dtype = head_dim % 128 == 0 ? PH_BF16 : PH_F16;
    config.sequences = 3;
    config.residual = 20;
    config.sinks = head_dim == 64 ? 0 : 5;
    config.tokens = 1024;
    config.step_tokens = 1024;
    config.pool_bytes = 64 * 65536;
    ph_kv_cache_codec codecs[kLayers] = {};
    codecs[0] = {PH_KV_CACHE_PACKKV, PH_KV_CACHE_FIXED, 0, 5, 0.1f, 0.0f, 0};
    codecs[1] = {PH_KV_CACHE_FIXED, PH_KV_CACHE_PACKKV, 4, 0, 0.0f, 1.0f / 254, 0};
    Cache cache(config, codecs);
    config.residual = 100;
    Cache other(config, codecs);
    uint32_t sequence, loaded;
    OK(ph_kv_cache_add(device, cache.handle, &sequence, error, sizeof error));
    for (const uint32_t tokens : {0u, 3u, 80u, 500u}) {
      if (tokens > 0) cache.append(sequence, tokens);
      const Exported made = cache.export_sequence(sequence);
      CHECK(other.import_sequence(made, loaded));
      const Exported again = other.export_sequence(loaded);
      CHECK(again.tokens == made.tokens && again.blocks == made.blocks && again.layers == made.layers);
      other.append(loaded, 7);
      OK(ph_kv_cache_remove(device, other.handle, loaded, error, sizeof error));
      for (uint32_t i = 0; i < 300 && made.blocks > 0; i += stride) {
        Exported forged = made;
        tamper(forged);
        const bool accepted = other.import_sequence(forged, loaded);
        ++(accepted ? taken : refused);
        if (!accepted) continue;
        other.append(loaded, 1);
        OK(ph_kv_cache_remove(device, other.handle, loaded, error, sizeof error));
      }
    }
    CHECK(other.statistics().free_bytes == config.pool_bytes);
  }
  OK(ph_device_close(device, error, sizeof error));
  printf("%u taken, %u refused\n", taken, refused);
  CHECK(taken > 20 / stride && refused > 200 / stride);
}
