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
    case PH_STRUCT_KV_CACHE_CONFIG:
      return {sizeof(ph_kv_cache_config),
              FIELD(ph_kv_cache_config, layers),
              FIELD(ph_kv_cache_config, query_heads),
              FIELD(ph_kv_cache_config, kv_heads),
              FIELD(ph_kv_cache_config, head_dim),
              FIELD(ph_kv_cache_config, dtype),
              FIELD(ph_kv_cache_config, query_dtype),
              FIELD(ph_kv_cache_config, sequences),
              FIELD(ph_kv_cache_config, residual),
              FIELD(ph_kv_cache_config, sinks),
              FIELD(ph_kv_cache_config, splits),
              FIELD(ph_kv_cache_config, tokens),
              FIELD(ph_kv_cache_config, step_tokens),
              FIELD(ph_kv_cache_config, pool_bytes)};
    case PH_STRUCT_KV_CACHE_CODEC:
      return {sizeof(ph_kv_cache_codec),
              FIELD(ph_kv_cache_codec, key_quantizer),
              FIELD(ph_kv_cache_codec, value_quantizer),
              FIELD(ph_kv_cache_codec, key_bits),
              FIELD(ph_kv_cache_codec, value_bits),
              FIELD(ph_kv_cache_codec, key_rel),
              FIELD(ph_kv_cache_codec, value_rel),
              FIELD(ph_kv_cache_codec, window)};
    case PH_STRUCT_KV_CACHE_STATISTICS:
      return {sizeof(ph_kv_cache_statistics),
              FIELD(ph_kv_cache_statistics, pool_bytes),
              FIELD(ph_kv_cache_statistics, recent_bytes),
              FIELD(ph_kv_cache_statistics, index_bytes),
              FIELD(ph_kv_cache_statistics, page_table_bytes),
              FIELD(ph_kv_cache_statistics, step_bytes),
              FIELD(ph_kv_cache_statistics, workspace_bytes),
              FIELD(ph_kv_cache_statistics, free_bytes),
              FIELD(ph_kv_cache_statistics, packed_bytes),
              FIELD(ph_kv_cache_statistics, sequences),
              FIELD(ph_kv_cache_statistics, tokens),
              FIELD(ph_kv_cache_statistics, packed_tokens)};
    case PH_STRUCT_LLM_SAMPLER:
      return {sizeof(ph_llm_sampler),
              FIELD(ph_llm_sampler, seed),
              FIELD(ph_llm_sampler, step),
              FIELD(ph_llm_sampler, top_k),
              FIELD(ph_llm_sampler, temperature),
              FIELD(ph_llm_sampler, top_p),
              FIELD(ph_llm_sampler, min_p),
              FIELD(ph_llm_sampler, repetition_penalty)};
    case PH_STRUCT_OT_REPORT:
      return {
          sizeof(ph_ot_report),       FIELD(ph_ot_report, status),         FIELD(ph_ot_report, iterations),
          FIELD(ph_ot_report, place), FIELD(ph_ot_report, marginal_error), FIELD(ph_ot_report, cost),
          FIELD(ph_ot_report, value), FIELD(ph_ot_report, epsilon)};
    case PH_STRUCT_OT_OPTIONS:
      return {sizeof(ph_ot_options),
              FIELD(ph_ot_options, cost_kind),
              FIELD(ph_ot_options, relative_epsilon),
              FIELD(ph_ot_options, iterations),
              FIELD(ph_ot_options, epsilon),
              FIELD(ph_ot_options, tolerance),
              FIELD(ph_ot_options, relaxation),
              FIELD(ph_ot_options, scaling),
              FIELD(ph_ot_options, row_penalty),
              FIELD(ph_ot_options, column_penalty)};
    case PH_STRUCT_OT_GROMOV_REPORT:
      return {sizeof(ph_ot_gromov_report),
              FIELD(ph_ot_gromov_report, status),
              FIELD(ph_ot_gromov_report, iterations),
              FIELD(ph_ot_gromov_report, place),
              FIELD(ph_ot_gromov_report, marginal_error),
              FIELD(ph_ot_gromov_report, value),
              FIELD(ph_ot_gromov_report, cost),
              FIELD(ph_ot_gromov_report, distortion),
              FIELD(ph_ot_gromov_report, gap),
              FIELD(ph_ot_gromov_report, bound)};
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
