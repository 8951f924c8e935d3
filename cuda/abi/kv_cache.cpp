// extern "C": the growing kv cache.
#include <algorithm>

#include "abi/arguments.h"
#include "kv/growing_cache.h"

using ph::checked;
using ph::checked_for_capture;
using ph::checked_tensor;
using ph::Error;
using ph::guard;

namespace {

ph_kv_cache& checked_cache(ph_kv_cache* cache) {
  if (cache == nullptr) throw Error(PH_ERROR_INVALID_ARGUMENT, "The kv cache is null");
  return *cache;
}

// The cache whose step enqueues work: it may be captured, as part of that cache's step.
ph_kv_cache& checked_step(ph_device* device, ph_kv_cache* cache) {
  ph_kv_cache& valid = checked_cache(cache);
  if (!valid.capturing()) checked(device);
  else checked_for_capture(device);
  return valid;
}

uint64_t token_bytes(const ph_kv_cache& cache, uint32_t heads) {
  return static_cast<uint64_t>(heads) * cache.config().head_dim * 2;
}

// Of the queries, or the outputs, of a step.
uint64_t query_bytes(const ph_kv_cache& cache) {
  const uint64_t bytes = cache.step_tokens() * token_bytes(cache, cache.config().query_heads);
  return cache.config().query_dtype == PH_F32 ? 2 * bytes : bytes;
}

template <typename T>
T& checked_result(T* result, const char* what) {
  if (result == nullptr) throw Error(PH_ERROR_INVALID_ARGUMENT, "The place for %s is null", what);
  return *result;
}

}  // namespace

extern "C" {

ph_kv_cache* ph_kv_cache_create(ph_device* device, const ph_kv_cache_config* config,
                                const ph_kv_cache_codec* codecs, int32_t* status, char* error,
                                uint32_t error_bytes) {
  ph_kv_cache* cache = nullptr;
  const int32_t result = guard(error, error_bytes, [&] {
    if (config == nullptr || codecs == nullptr)
      throw Error(PH_ERROR_INVALID_ARGUMENT, "The kv cache's configuration is null");
    cache = new ph_kv_cache(checked(device), *config, codecs);
  });
  if (status != nullptr) *status = result;
  return cache;
}

int32_t ph_kv_cache_plan(const ph_kv_cache_config* config, const ph_kv_cache_codec* codecs,
                         ph_kv_cache_statistics* statistics, uint64_t* block_bytes, char* error,
                         uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    if (config == nullptr || codecs == nullptr)
      throw Error(PH_ERROR_INVALID_ARGUMENT, "The kv cache's configuration is null");
    checked_result(block_bytes, "the bytes of blocks");
    checked_result(statistics, "the statistics") = ph::kv::plan_cache(*config, codecs, block_bytes);
  });
}

int32_t ph_kv_cache_destroy(ph_device* device, ph_kv_cache* cache, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    checked_for_capture(device);
    delete &checked_cache(cache);
  });
}

int32_t ph_kv_cache_add(ph_device* device, ph_kv_cache* cache, uint32_t* sequence, char* error,
                        uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    checked(device);
    checked_result(sequence, "the sequence") = checked_cache(cache).add();
  });
}

int32_t ph_kv_cache_fork(ph_device* device, ph_kv_cache* cache, uint32_t sequence, uint32_t* fork,
                         char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    checked(device);
    checked_result(fork, "the fork") = checked_cache(cache).fork(sequence);
  });
}

int32_t ph_kv_cache_truncate(ph_device* device, ph_kv_cache* cache, uint32_t sequence, uint64_t tokens,
                             char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    checked(device);
    checked_cache(cache).truncate(sequence, tokens);
  });
}

int32_t ph_kv_cache_remove(ph_device* device, ph_kv_cache* cache, uint32_t sequence, char* error,
                           uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    checked(device);
    checked_cache(cache).remove(sequence);
  });
}

int32_t ph_kv_cache_length(ph_device* device, ph_kv_cache* cache, uint32_t sequence, uint64_t* tokens,
                           char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    checked_for_capture(device);
    checked_result(tokens, "the length") = checked_cache(cache).length(sequence);
  });
}

int32_t ph_kv_cache_begin(ph_device* device, ph_kv_cache* cache, const uint32_t* sequences,
                          const uint32_t* tokens, uint32_t count, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    checked(device);
    if (count > 0 && (sequences == nullptr || tokens == nullptr))
      throw Error(PH_ERROR_INVALID_ARGUMENT, "The sequences or token counts of the step are null");
    checked_cache(cache).begin(sequences, tokens, count);
  });
}

int32_t ph_kv_cache_append(ph_device* device, ph_kv_cache* cache, uint32_t layer, const ph_buffer* keys,
                           uint64_t keys_offset, const ph_buffer* values, uint64_t values_offset, char* error,
                           uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph_kv_cache& valid = checked_step(device, cache);
    const uint64_t bytes = valid.step_tokens() * token_bytes(valid, valid.config().kv_heads);
    valid.append(layer, {{checked_tensor(keys, keys_offset, bytes, "keys"),
                          checked_tensor(values, values_offset, bytes, "values")}});
  });
}

int32_t ph_kv_cache_attend(ph_device* device, ph_kv_cache* cache, uint32_t layer, const ph_buffer* queries,
                           uint64_t queries_offset, ph_buffer* out, uint64_t out_offset, float scale,
                           char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph_kv_cache& valid = checked_step(device, cache);
    const uint64_t bytes = query_bytes(valid);
    valid.attend(layer, checked_tensor(queries, queries_offset, bytes, "queries"),
                 checked_tensor(out, out_offset, bytes, "the output"), scale);
  });
}

int32_t ph_kv_cache_prefill(ph_device* device, ph_kv_cache* cache, uint32_t layer, const ph_buffer* queries,
                            uint64_t queries_offset, const ph_buffer* keys, uint64_t keys_offset,
                            const ph_buffer* values, uint64_t values_offset, ph_buffer* out,
                            uint64_t out_offset, float scale, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph_kv_cache& valid = checked_step(device, cache);
    const uint64_t kv_bytes = valid.step_tokens() * token_bytes(valid, valid.config().kv_heads);
    const uint64_t bytes = query_bytes(valid);
    valid.prefill(layer,
                  {{checked_tensor(keys, keys_offset, kv_bytes, "keys"),
                    checked_tensor(values, values_offset, kv_bytes, "values")}},
                  checked_tensor(queries, queries_offset, bytes, "queries"),
                  checked_tensor(out, out_offset, bytes, "the output"), scale);
  });
}

int32_t ph_kv_cache_read(ph_device* device, ph_kv_cache* cache, uint32_t layer, uint32_t sequence,
                         uint64_t first, uint64_t count, ph_buffer* keys, uint64_t keys_offset,
                         ph_buffer* values, uint64_t values_offset, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    checked(device);
    ph_kv_cache& valid = checked_cache(cache);
    if (count > valid.length(sequence)) count = UINT32_MAX;  // too many: reported with the sequence's length
    const uint64_t bytes = count == UINT32_MAX ? 0 : count * token_bytes(valid, valid.config().kv_heads);
    valid.read(layer, sequence, first, count, checked_tensor(keys, keys_offset, bytes, "keys"),
               checked_tensor(values, values_offset, bytes, "values"));
  });
}

int32_t ph_kv_cache_score(ph_device* device, ph_kv_cache* cache, uint32_t layer, uint32_t sequence,
                          const ph_buffer* queries, uint64_t queries_offset, ph_buffer* out,
                          uint64_t out_offset, float scale, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    checked(device);
    ph_kv_cache& valid = checked_cache(cache);
    const uint32_t heads = valid.config().query_heads;
    const uint64_t out_bytes = valid.length(sequence) * heads * sizeof(float);
    valid.score(layer, sequence,
                checked_tensor(queries, queries_offset, token_bytes(valid, heads), "queries"),
                reinterpret_cast<float*>(checked_tensor(out, out_offset, out_bytes, "the output")), scale);
  });
}

int32_t ph_kv_cache_weigh(ph_device* device, ph_kv_cache* cache, uint32_t layer, uint32_t sequence,
                          const ph_buffer* weights, uint64_t weights_offset, ph_buffer* out,
                          uint64_t out_offset, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    checked(device);
    ph_kv_cache& valid = checked_cache(cache);
    const ph_kv_cache_config& config = valid.config();
    const uint64_t bytes = valid.length(sequence) * config.query_heads * sizeof(float);
    const uint64_t out_bytes = static_cast<uint64_t>(config.query_heads) * config.head_dim * sizeof(float);
    valid.weigh(layer, sequence,
                reinterpret_cast<const float*>(checked_tensor(weights, weights_offset, bytes, "weights")),
                reinterpret_cast<float*>(checked_tensor(out, out_offset, out_bytes, "the output")));
  });
}

int32_t ph_kv_cache_check(ph_device* device, ph_kv_cache* cache, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    checked(device);
    checked_cache(cache).check();
  });
}

int32_t ph_kv_cache_get_statistics(ph_device* device, ph_kv_cache* cache, ph_kv_cache_statistics* statistics,
                                   char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    checked(device);
    checked_result(statistics, "the statistics") = checked_cache(cache).statistics();
  });
}

// ---- graphs

int32_t ph_kv_cache_step_shape(ph_device* device, ph_kv_cache* cache, uint32_t* shape, char* error,
                               uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    const auto words = checked_step(device, cache).step_shape();
    std::copy(words.begin(), words.end(), &checked_result(shape, "the shape"));
  });
}

int32_t ph_kv_cache_capture_begin(ph_device* device, ph_kv_cache* cache, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    checked(device);
    checked_cache(cache).begin_capture();
  });
}

ph_kv_cache_graph* ph_kv_cache_capture_end(ph_device* device, ph_kv_cache* cache, int32_t* status,
                                           char* error, uint32_t error_bytes) {
  ph_kv_cache_graph* graph = nullptr;
  const int32_t result = guard(error, error_bytes, [&] {
    checked_for_capture(device);
    graph = checked_cache(cache).end_capture();
  });
  if (status != nullptr) *status = result;
  return graph;
}

int32_t ph_kv_cache_replay(ph_device* device, ph_kv_cache* cache, ph_kv_cache_graph* graph, char* error,
                           uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    checked(device);
    checked_cache(cache).replay(checked_result(graph, "the graph"));
  });
}

int32_t ph_kv_cache_graph_destroy(ph_device* device, ph_kv_cache_graph* graph, char* error,
                                  uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    checked_for_capture(device);
    delete &checked_result(graph, "the graph");
  });
}

int32_t ph_kv_cache_measure(ph_device* device, ph_kv_cache* cache, uint32_t sequence, uint32_t* blocks,
                            uint64_t* record_bytes, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    checked(device);
    checked_result(record_bytes, "the bytes of records");
    checked_result(blocks, "the blocks") = checked_cache(cache).measure(sequence, record_bytes);
  });
}

int32_t ph_kv_cache_export(ph_device* device, ph_kv_cache* cache, uint32_t sequence, uint32_t layer,
                           uint8_t* records, uint64_t record_bytes, uint64_t* offsets, uint8_t* recent,
                           uint64_t recent_bytes, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    checked(device);
    if (record_bytes > 0) checked_result(records, "the records");
    if (recent_bytes > 0) checked_result(recent, "the tokens in 16 bits");
    checked_result(offsets, "the offsets");
    checked_cache(cache).export_layer(sequence, layer,
                                      {records, record_bytes, offsets, recent, recent_bytes});
  });
}

int32_t ph_kv_cache_begin_import(ph_device* device, ph_kv_cache* cache, uint64_t tokens, uint32_t blocks,
                                 const uint64_t* record_bytes, uint32_t* sequence, char* error,
                                 uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    checked(device);
    checked_result(record_bytes, "the bytes of records");
    uint32_t& number = checked_result(sequence, "the sequence");
    number = checked_cache(cache).begin_import(tokens, blocks, record_bytes);
  });
}

int32_t ph_kv_cache_import(ph_device* device, ph_kv_cache* cache, uint32_t sequence, uint32_t layer,
                           const uint8_t* records, uint64_t record_bytes, const uint64_t* offsets,
                           const uint8_t* recent, uint64_t recent_bytes, uint64_t* malformed, char* error,
                           uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    checked(device);
    if (record_bytes > 0) checked_result(records, "the records");
    if (recent_bytes > 0) checked_result(recent, "the tokens in 16 bits");
    checked_result(offsets, "the offsets");
    uint64_t& block = checked_result(malformed, "a malformed block");
    block = UINT64_MAX;
    checked_cache(cache).import_layer(sequence, layer, {records, record_bytes, offsets, recent, recent_bytes},
                                      block);
  });
}

}  // extern "C"
