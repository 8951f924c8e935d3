// extern "C": the library itself.
#include <cstddef>
#include <vector>

#include "packhorse.h"

namespace {

std::vector<uint32_t> layout_of(uint32_t which) {
#define FIELD(type, name) static_cast<uint32_t>(offsetof(type, name))
  switch (which) {
    case PH_STRUCT_DEVICE_INFO:
      return {sizeof(ph_device_info),
              FIELD(ph_device_info, name),
              FIELD(ph_device_info, instruction_set),
              FIELD(ph_device_info, total_bytes),
              FIELD(ph_device_info, free_bytes),
              FIELD(ph_device_info, processors),
              FIELD(ph_device_info, driver_version),
              FIELD(ph_device_info, runtime_version),
              FIELD(ph_device_info, is_gpu)};
    case PH_STRUCT_KV_CODEC:
      return {
          sizeof(ph_kv_codec),          FIELD(ph_kv_codec, heads),          FIELD(ph_kv_codec, head_dim),
          FIELD(ph_kv_codec, tokens),   FIELD(ph_kv_codec, dtype),          FIELD(ph_kv_codec, quantizer),
          FIELD(ph_kv_codec, grouping), FIELD(ph_kv_codec, key_bits),       FIELD(ph_kv_codec, value_bits),
          FIELD(ph_kv_codec, key_rel),  FIELD(ph_kv_codec, value_rel),      FIELD(ph_kv_codec, repack),
          FIELD(ph_kv_codec, pack),     FIELD(ph_kv_codec, keep_non_finite)};
    case PH_STRUCT_KV_STATISTICS:
      return {sizeof(ph_kv_statistics),
              FIELD(ph_kv_statistics, bytes),
              FIELD(ph_kv_statistics, payload_bits),
              FIELD(ph_kv_statistics, packs),
              FIELD(ph_kv_statistics, widths),
              FIELD(ph_kv_statistics, code_mask),
              FIELD(ph_kv_statistics, raw_blocks),
              FIELD(ph_kv_statistics, ordered_blocks),
              FIELD(ph_kv_statistics, max_error),
              FIELD(ph_kv_statistics, max_error_over_scale),
              FIELD(ph_kv_statistics, squared_error),
              FIELD(ph_kv_statistics, compared)};
    default:
      return {};
  }
#undef FIELD
}

}  // namespace

extern "C" {

uint32_t ph_abi_version(void) { return PH_ABI_VERSION; }

uint32_t ph_layout(uint32_t which, uint32_t* words, uint32_t capacity) {
  const std::vector<uint32_t> layout = layout_of(which);
  for (uint32_t i = 0; i < layout.size() && i < capacity; ++i) words[i] = layout[i];
  return static_cast<uint32_t>(layout.size());
}

}  // extern "C"
