// The kv codec through the C ABI alone, for the sanitizers and for every instruction set: round trips within
// the bound, the steps against the fused operations, damaged records and orders.
//
// kv_native_test [SEED [STRIDE]]: STRIDE runs each n-th case only, for slow sanitizers.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "common/float16.h"
#include "packhorse.h"

namespace {

ph_device* device;

struct Buffer {
  explicit Buffer(uint64_t bytes) : size(bytes) {
    int32_t status;
    handle = ph_buffer_create(device, bytes > 0 ? bytes : 16, &status, error, sizeof error);
    CHECK(handle != nullptr);
    OK(ph_buffer_fill(device, handle, 0, 0xa5, bytes, error, sizeof error));
  }
  ~Buffer() { OK(ph_buffer_destroy(device, handle, error, sizeof error)); }
  Buffer(const Buffer&) = delete;
  template <typename T>
  void upload(const std::vector<T>& data) const {
    OK(ph_buffer_upload(device, handle, 0, data.data(), data.size() * sizeof(T), error, sizeof error));
  }
  template <typename T>
  std::vector<T> download() const {
    std::vector<T> data(size / sizeof(T));
    OK(ph_buffer_download(device, handle, 0, data.data(), data.size() * sizeof(T), error, sizeof error));
    return data;
  }
  uint64_t size;
  ph_buffer* handle;
};

struct Quantized {
  Quantized(const ph_kv_codec& codec, uint32_t part)
      : codes(codec.tokens / 64 * 64 * codec.heads * codec.head_dim),
        scales(codec.tokens / 64 * ph_kv_groups(&codec, part) * 4),
        zeros(scales.size) {}
  Buffer codes, scales, zeros;
};

uint32_t element_bytes(const ph_kv_codec& codec) { return codec.dtype == PH_F32 ? 4 : 2; }

// A tensor with an outlier channel and, for one head, a constant token.
std::vector<uint8_t> random_tensor(const ph_kv_codec& codec, std::mt19937& random) {
  const uint32_t bytes = element_bytes(codec);
  std::vector<uint8_t> x(static_cast<size_t>(codec.heads) * codec.tokens * codec.head_dim * bytes);
  for (size_t i = 0; i < x.size() / bytes; ++i) {
    // The sum of four uniform values: unlike std::normal_distribution it is the same with every C++ library.
    float value = 0;
    for (int j = 0; j < 4; ++j) value += static_cast<float>(random() % 65536) / 32768.0f - 1.0f;
    if (i % codec.head_dim == 3) value *= 40.0f;
    if (codec.heads == 1 && i < codec.head_dim) value = 2.5f;
    const uint32_t bits = codec.dtype == PH_F16    ? ph::float_to_f16(value)
                          : codec.dtype == PH_BF16 ? ph::float_to_bf16(value)
                                                   : ph::float_bits(value);
    memcpy(x.data() + i * bytes, &bits, bytes);
  }
  return x;
}

// FNV-1a of all records: the same for every backend and instruction set.
uint64_t checksum = 0xcbf29ce484222325;

bool same(const Buffer& a, const Buffer& b) { return a.download<uint8_t>() == b.download<uint8_t>(); }

void round_trip(ph_kv_codec codec, std::mt19937& random) {
  const uint64_t tensor_bytes =
      static_cast<uint64_t>(codec.heads) * codec.tokens * codec.head_dim * element_bytes(codec);
  const uint64_t blocks = codec.tokens / 64;
  Buffer keys(tensor_bytes), values(tensor_bytes), records(ph_kv_records_capacity(&codec)),
      offsets(8 * (blocks + 1)), workspace(ph_kv_workspace_bytes(&codec)), status(16),
      restored_keys(tensor_bytes), restored_values(tensor_bytes), statistics(sizeof(ph_kv_statistics));
  keys.upload(random_tensor(codec, random));
  values.upload(random_tensor(codec, random));
  OK(ph_kv_encode(device, &codec, keys.handle, 0, values.handle, 0, records.handle, offsets.handle,
                  workspace.handle, status.handle, error, sizeof error));
  std::vector<uint64_t> found = status.download<uint64_t>();
  CHECK(found[0] == UINT64_MAX);
  const uint64_t bytes = found[1];
  const std::vector<uint64_t> ends = offsets.download<uint64_t>();
  CHECK(ends.front() == 0 && ends.back() == bytes);

  // The steps give the same records.
  Quantized key_part(codec, PH_KV_KEYS), value_part(codec, PH_KV_VALUES);
  Buffer order(64 * blocks), step_records(records.size), step_offsets(offsets.size);
  OK(ph_kv_quantize(device, &codec, PH_KV_KEYS, keys.handle, 0, key_part.codes.handle, key_part.scales.handle,
                    key_part.zeros.handle, status.handle, error, sizeof error));
  OK(ph_kv_quantize(device, &codec, PH_KV_VALUES, values.handle, 0, value_part.codes.handle,
                    value_part.scales.handle, value_part.zeros.handle, status.handle, error, sizeof error));
  OK(ph_kv_repack(device, &codec, key_part.codes.handle, value_part.codes.handle, order.handle, error,
                  sizeof error));
  OK(ph_kv_pack(device, &codec, key_part.codes.handle, key_part.scales.handle, key_part.zeros.handle,
                value_part.codes.handle, value_part.scales.handle, value_part.zeros.handle, order.handle,
                step_records.handle, step_offsets.handle, workspace.handle, status.handle, error,
                sizeof error));
  CHECK(same(offsets, step_offsets));
  std::vector<uint8_t> packed = records.download<uint8_t>(), step_packed = step_records.download<uint8_t>();
  CHECK(bytes == 0 || memcmp(packed.data(), step_packed.data(), bytes) == 0);

  for (uint64_t i = 0; i < bytes; ++i) checksum = (checksum ^ packed[i]) * 0x100000001b3;

  // Both ways back agree, and stay within the bound.
  Quantized key_back(codec, PH_KV_KEYS), value_back(codec, PH_KV_VALUES);
  Buffer order_back(order.size);
  OK(ph_kv_unpack(device, &codec, records.handle, bytes, offsets.handle, key_back.codes.handle,
                  key_back.scales.handle, key_back.zeros.handle, value_back.codes.handle,
                  value_back.scales.handle, value_back.zeros.handle, order_back.handle, status.handle, error,
                  sizeof error));
  CHECK(status.download<uint64_t>()[0] == UINT64_MAX);
  CHECK(same(key_part.codes, key_back.codes) && same(key_part.scales, key_back.scales));
  CHECK(same(value_part.zeros, value_back.zeros) && same(order, order_back));
  OK(ph_kv_decode(device, &codec, records.handle, bytes, offsets.handle, restored_keys.handle, 0,
                  restored_values.handle, 0, status.handle, error, sizeof error));
  Buffer step_keys(tensor_bytes);
  OK(ph_kv_dequantize(device, &codec, PH_KV_KEYS, key_back.codes.handle, key_back.scales.handle,
                      key_back.zeros.handle, step_keys.handle, 0, error, sizeof error));
  CHECK(same(restored_keys, step_keys));
  OK(ph_kv_measure(device, &codec, records.handle, bytes, offsets.handle, keys.handle, 0, values.handle, 0,
                   statistics.handle, workspace.handle, status.handle, error, sizeof error));
  const ph_kv_statistics measured = statistics.download<ph_kv_statistics>()[0];
  CHECK(measured.bytes == bytes && measured.raw_blocks == 0);
  for (int part = 0; part < 2; ++part) {
    CHECK(measured.max_error_over_scale[part] <= 0.5001);
    CHECK(measured.compared[part] == blocks * 64 * codec.heads * codec.head_dim);
  }

  // Damage is survived: an error or other data, never an access out of bounds.
  for (int trial = 0; trial < 24 && bytes > 0; ++trial) {
    std::vector<uint8_t> damaged = packed;
    std::vector<uint64_t> damaged_offsets = ends;
    for (int flip = 0; flip <= trial % 4; ++flip)
      damaged[random() % bytes] ^= static_cast<uint8_t>(1 << random() % 8);
    if (trial % 5 == 0) damaged_offsets[random() % damaged_offsets.size()] = random() % (2 * bytes);
    if (trial % 7 == 0) damaged_offsets[random() % damaged_offsets.size()] = ~0ull - random() % 64;
    const uint64_t length = trial % 6 == 0 ? random() % (bytes + 1) : bytes;
    Buffer cut(length);  // exactly as long as claimed, so that the sanitizer sees every step past the end
    cut.upload(std::vector<uint8_t>(damaged.begin(), damaged.begin() + static_cast<long>(length)));
    step_offsets.upload(damaged_offsets);
    OK(ph_kv_decode(device, &codec, cut.handle, length, step_offsets.handle, restored_keys.handle, 0,
                    restored_values.handle, 0, status.handle, error, sizeof error));
    OK(ph_kv_measure(device, &codec, cut.handle, length, step_offsets.handle, nullptr, 0, nullptr, 0,
                     statistics.handle, workspace.handle, status.handle, error, sizeof error));
  }
}

uint64_t first_malformed(const ph_kv_codec& codec, const Buffer& records, uint64_t bytes,
                         const Buffer& offsets) {
  const uint64_t tensor_bytes = codec.tokens * codec.heads * codec.head_dim * element_bytes(codec);
  Buffer keys(tensor_bytes), values(tensor_bytes), status(16);
  OK(ph_kv_decode(device, &codec, records.handle, bytes, offsets.handle, keys.handle, 0, values.handle, 0,
                  status.handle, error, sizeof error));
  return status.download<uint64_t>()[0];
}

// Two blocks of codes; an order that is none, and a payload at an odd place, make the record malformed.
void malformed_records() {
  ph_kv_codec codec{};
  codec.heads = 2;
  codec.head_dim = 64;
  codec.tokens = 128;
  codec.key_rel = codec.value_rel = 0.1f;
  codec.pack = 16;
  Quantized key_part(codec, PH_KV_KEYS), value_part(codec, PH_KV_VALUES);
  std::vector<uint8_t> codes(key_part.codes.size);
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(i * i >> 8);
  for (const Quantized* part : {&key_part, &value_part}) {
    part->codes.upload(codes);
    part->scales.upload(std::vector<float>(part->scales.size / 4, 1.0f));
    part->zeros.upload(std::vector<int32_t>(part->zeros.size / 4, 0));
  }
  const uint64_t workspace_bytes = ph_kv_workspace_bytes(&codec);
  Buffer order(codec.tokens), records(ph_kv_records_capacity(&codec)), offsets(24), status(16),
      workspace(workspace_bytes);
  const auto pack = [&](const std::vector<uint8_t>& tokens) {
    order.upload(tokens);
    OK(ph_kv_pack(device, &codec, key_part.codes.handle, key_part.scales.handle, key_part.zeros.handle,
                  value_part.codes.handle, value_part.scales.handle, value_part.zeros.handle, order.handle,
                  records.handle, offsets.handle, workspace_bytes > 0 ? workspace.handle : nullptr,
                  status.handle, error, sizeof error));
    return status.download<uint64_t>()[1];
  };
  std::vector<uint8_t> tokens(codec.tokens);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = i % 64;
  uint64_t bytes = pack(tokens);
  CHECK(first_malformed(codec, records, bytes, offsets) == UINT64_MAX);

  std::vector<uint8_t> damaged = records.download<uint8_t>();
  damaged[offsets.download<uint64_t>()[1] + 16 + 4] += 2;  // the first payload of the second block's values
  records.upload(damaged);
  CHECK(first_malformed(codec, records, bytes, offsets) == 1);

  bytes = pack(std::vector<uint8_t>(codec.tokens, 255));
  CHECK(first_malformed(codec, records, bytes, offsets) == 0);
}

}  // namespace

int main(int count, char** arguments) {
  const unsigned seed = count > 1 ? static_cast<unsigned>(atoi(arguments[1])) : std::random_device{}();
  const int stride = count > 2 ? atoi(arguments[2]) : 1;
  fprintf(stderr, "seed %u\n", seed);
  std::mt19937 random(seed);
  int32_t status;
  device = ph_device_open(0, &status, error, sizeof error);
  CHECK(device != nullptr);
  ph_device_info info;
  OK(ph_device_get_info(device, &info, error, sizeof error));
  fprintf(stderr, "%s, %s\n", info.name, info.instruction_set);
  // The last two need more than the registers and the shared memory that a GPU has for a block.
  const uint32_t shapes[][3] = {{1, 16, 64},   {2, 64, 200}, {3, 80, 129},  {2, 256, 64},
                                {5, 128, 320}, {1, 48, 10},  {9, 128, 128}, {16, 256, 64}};
  int cases = 0, runs = 0;
  for (const auto& shape : shapes) {
    for (uint32_t quantizer = 0; quantizer < 2; ++quantizer) {
      for (uint32_t grouping = 0; grouping < 2 - quantizer; ++grouping) {
        for (uint32_t repack = 0; repack < 4; ++repack) {
          for (uint32_t pack = 4; pack <= 32; pack *= 2) {
            ph_kv_codec codec{};
            codec.heads = shape[0];
            codec.head_dim = shape[1];
            codec.tokens = shape[2];
            codec.dtype = static_cast<uint32_t>(cases % 3);
            codec.quantizer = quantizer;
            codec.grouping = grouping;
            if (quantizer == PH_KV_KIVI) {
              codec.key_bits = pack == 4 ? 2 : pack == 8 ? 3 : 4;
              codec.value_bits = 8;
            } else {
              codec.key_rel = repack == 0 ? 1.0f / 254.0f : 0.1f;
              codec.value_rel = 0.2f;
            }
            codec.repack = repack;
            codec.pack = pack;
            if (cases++ % stride != 0) continue;
            round_trip(codec, random);
            ++runs;
          }
        }
      }
    }
  }
  malformed_records();
  OK(ph_device_close(device, error, sizeof error));
  fprintf(stderr, "%d cases, checksum %016llx\n", runs, static_cast<unsigned long long>(checksum));
  return 0;
}
