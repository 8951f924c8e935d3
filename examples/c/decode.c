/*
 * A decode loop through packhorse.h alone: two sequences get a prompt, then a token at a time; every layer appends its
 * keys and values and attends. Random numbers stand for a model. At the end the last outputs are compared with a direct
 * softmax in double precision over what the cache says that it holds.
 *
 *   cc -std=c11 -Icuda/include examples/c/decode.c -o decode build/libpackhorse_cpu.so -lm -Wl,-rpath,build
 *   ./decode        exits with 1 if a call fails or the relative error exceeds 1e-3
 *
 * Link libpackhorse_cuda.so instead and it runs on a GPU: nothing else changes. An engine that has tensors and a stream of
 * its own hands them over with ph_buffer_wrap and ph_device_open_on_stream.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "packhorse.h"

enum {
  LAYERS = 2,
  QUERY_HEADS = 8,
  KV_HEADS = 2,
  HEAD_DIM = 64,
  SEQUENCES = 2,
  PROMPT = 300, /* tokens of each sequence, at once */
  STEPS = 100,  /* tokens of each sequence, one at a time */
  TOKENS = PROMPT + STEPS,
  KV_VALUES = KV_HEADS * HEAD_DIM, /* of a token */
  QUERY_VALUES = QUERY_HEADS * HEAD_DIM
};

/* Every call fills in `error`; what it returns says whether it failed. */
static char error[512];

static void require(int succeeded, const char* what) {
  if (succeeded) return;
  fprintf(stderr, "decode: %s: %s\n", what, error);
  exit(1);
}

#define TRY(call) require((call) == PH_OK, #call)

/* ---- 16-bit floats -------------------------------------------------------------------------------- */

static double value_of(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double magnitude = exponent == 0 ? ldexp(fraction, -24) : ldexp(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

/* A number from -2 to 2 that a 16-bit float can be, where most are close to 0. */
static uint16_t random_bits(uint32_t* state) {
  double sum = 0;
  int exponent;
  for (int i = 0; i < 4; ++i) {
    *state = *state * 1664525u + 1013904223u;
    sum += (double)(*state >> 8) / (1 << 24) - 0.5;
  }
  const double fraction = frexp(fabs(sum), &exponent);
  if (exponent < -13) return 0;
  return (uint16_t)((sum < 0 ? 0x8000 : 0) | ((exponent + 14) << 10) | ((int)ldexp(fraction, 11) - 1024));
}

/* ---- device memory -------------------------------------------------------------------------------- */

static ph_device* device;

static ph_buffer* create(uint64_t values) {
  int32_t status;
  ph_buffer* buffer = ph_buffer_create(device, 2 * values, &status, error, sizeof error);
  require(buffer != NULL, "ph_buffer_create");
  return buffer;
}

static void upload_random(ph_buffer* buffer, uint64_t values, uint32_t* state) {
  uint16_t* bits = malloc(2 * values);
  if (bits == NULL) exit(1);
  for (uint64_t i = 0; i < values; ++i) bits[i] = random_bits(state);
  TRY(ph_buffer_upload(device, buffer, 0, bits, 2 * values, error, sizeof error));
  free(bits);
}

static uint16_t* download(const ph_buffer* buffer, uint64_t values) {
  uint16_t* bits = malloc(2 * values);
  if (bits == NULL) exit(1);
  TRY(ph_buffer_download(device, buffer, 0, bits, 2 * values, error, sizeof error));
  return bits;
}

/* ---- the check ------------------------------------------------------------------------------------ */

/* Adds to sums[0] the squared differences between `out` and exact attention of one token, to sums[1] the squares of
 * the latter. keys and values are [TOKENS, KV_HEADS, HEAD_DIM], queries and out [QUERY_HEADS, HEAD_DIM]. */
static void compare(const uint16_t* keys, const uint16_t* values, const uint16_t* queries,
                    const uint16_t* out, double sums[2]) {
  for (int head = 0; head < QUERY_HEADS; ++head) {
    const int at = head / (QUERY_HEADS / KV_HEADS) * HEAD_DIM;
    double weights[TOKENS], most = -INFINITY, total = 0;
    for (int token = 0; token < TOKENS; ++token) {
      double product = 0;
      for (int i = 0; i < HEAD_DIM; ++i)
        product += value_of(queries[head * HEAD_DIM + i]) * value_of(keys[token * KV_VALUES + at + i]);
      weights[token] = product / sqrt(HEAD_DIM);
      most = fmax(most, weights[token]);
    }
    for (int token = 0; token < TOKENS; ++token) total += weights[token] = exp(weights[token] - most);
    for (int i = 0; i < HEAD_DIM; ++i) {
      double expected = 0;
      for (int token = 0; token < TOKENS; ++token)
        expected += weights[token] / total * value_of(values[token * KV_VALUES + at + i]);
      const double difference = value_of(out[head * HEAD_DIM + i]) - expected;
      sums[0] += difference * difference;
      sums[1] += expected * expected;
    }
  }
}

int main(void) {
  int32_t status;
  device = ph_device_open(0, &status, error, sizeof error);
  require(device != NULL, "ph_device_open");

  ph_kv_cache_config config = {0};
  config.layers = LAYERS;
  config.query_heads = QUERY_HEADS;
  config.kv_heads = KV_HEADS;
  config.head_dim = HEAD_DIM;
  config.dtype = config.query_dtype = PH_F16;
  config.sequences = SEQUENCES;
  config.residual = 64;
  config.sinks = 4;
  config.tokens = TOKENS;
  config.step_tokens = SEQUENCES * PROMPT;
  config.pool_bytes = 1 << 20;
  ph_kv_cache_codec codecs[LAYERS];
  memset(codecs, 0, sizeof codecs);
  for (int layer = 0; layer < LAYERS; ++layer) {
    codecs[layer].key_quantizer = PH_KV_CACHE_PACKKV;
    codecs[layer].key_rel = 0.1f;
    codecs[layer].value_quantizer = PH_KV_CACHE_PACKKV;
    codecs[layer].value_rel = 0.2f;
  }
  ph_kv_cache* cache = ph_kv_cache_create(device, &config, codecs, &status, error, sizeof error);
  require(cache != NULL, "ph_kv_cache_create");

  /* Errors name what is wrong, and leave everything as it was. */
  if (ph_kv_cache_truncate(device, cache, 7, 0, error, sizeof error) != PH_ERROR_INVALID_ARGUMENT) return 1;
  printf("as expected: %s\n", error);

  uint32_t sequences[SEQUENCES], counts[SEQUENCES], state = 1;
  for (int i = 0; i < SEQUENCES; ++i) TRY(ph_kv_cache_add(device, cache, &sequences[i], error, sizeof error));

  /* The prompts of all sequences in one step: the first one's tokens, then the second's. */
  ph_buffer* prompt_keys = create((uint64_t)SEQUENCES * PROMPT * KV_VALUES);
  ph_buffer* prompt_values = create((uint64_t)SEQUENCES * PROMPT * KV_VALUES);
  for (int i = 0; i < SEQUENCES; ++i) counts[i] = PROMPT;
  TRY(ph_kv_cache_begin(device, cache, sequences, counts, SEQUENCES, error, sizeof error));
  for (uint32_t layer = 0; layer < LAYERS; ++layer) {
    upload_random(prompt_keys, (uint64_t)SEQUENCES * PROMPT * KV_VALUES, &state);
    upload_random(prompt_values, (uint64_t)SEQUENCES * PROMPT * KV_VALUES, &state);
    TRY(ph_kv_cache_append(device, cache, layer, prompt_keys, 0, prompt_values, 0, error, sizeof error));
  }

  /* Then a token of each at a time. Only the uploads wait, as a stand-in for the model's own kernels. */
  ph_buffer* keys = create(SEQUENCES * KV_VALUES);
  ph_buffer* values = create(SEQUENCES * KV_VALUES);
  ph_buffer *queries[LAYERS], *out[LAYERS];
  for (int layer = 0; layer < LAYERS; ++layer) {
    queries[layer] = create(SEQUENCES * QUERY_VALUES);
    out[layer] = create(SEQUENCES * QUERY_VALUES);
  }
  for (int i = 0; i < SEQUENCES; ++i) counts[i] = 1;
  for (int step = 0; step < STEPS; ++step) {
    TRY(ph_kv_cache_begin(device, cache, sequences, counts, SEQUENCES, error, sizeof error));
    for (uint32_t layer = 0; layer < LAYERS; ++layer) {
      upload_random(keys, SEQUENCES * KV_VALUES, &state);
      upload_random(values, SEQUENCES * KV_VALUES, &state);
      upload_random(queries[layer], SEQUENCES * QUERY_VALUES, &state);
      TRY(ph_kv_cache_append(device, cache, layer, keys, 0, values, 0, error, sizeof error));
      TRY(ph_kv_cache_attend(device, cache, layer, queries[layer], 0, out[layer], 0, 1.0f / sqrtf(HEAD_DIM),
                             error, sizeof error));
    }
  }
  TRY(ph_kv_cache_check(device, cache, error, sizeof error)); /* no NaN was packed */

  ph_kv_cache_statistics statistics;
  TRY(ph_kv_cache_get_statistics(device, cache, &statistics, error, sizeof error));
  printf("%llu of %llu tokens are packed, to %.2f bits a value\n",
         (unsigned long long)statistics.packed_tokens, (unsigned long long)statistics.tokens,
         8.0 * (double)statistics.packed_bytes / ((double)statistics.packed_tokens * LAYERS * 2 * KV_VALUES));

  double sums[2] = {0, 0};
  ph_buffer* read_keys = create((uint64_t)TOKENS * KV_VALUES);
  ph_buffer* read_values = create((uint64_t)TOKENS * KV_VALUES);
  for (uint32_t layer = 0; layer < LAYERS; ++layer) {
    uint16_t* q = download(queries[layer], SEQUENCES * QUERY_VALUES);
    uint16_t* o = download(out[layer], SEQUENCES * QUERY_VALUES);
    for (int i = 0; i < SEQUENCES; ++i) {
      TRY(ph_kv_cache_read(device, cache, layer, sequences[i], 0, TOKENS, read_keys, 0, read_values, 0, error,
                           sizeof error));
      uint16_t* k = download(read_keys, (uint64_t)TOKENS * KV_VALUES);
      uint16_t* v = download(read_values, (uint64_t)TOKENS * KV_VALUES);
      compare(k, v, q + i * QUERY_VALUES, o + i * QUERY_VALUES, sums);
      free(k);
      free(v);
    }
    free(q);
    free(o);
  }
  const double relative = sqrt(sums[0] / sums[1]);
  printf("relative error of attention: %.2e\n", relative);

  ph_buffer* buffers[] = {prompt_keys, prompt_values, keys, values, read_keys, read_values};
  for (size_t i = 0; i < sizeof buffers / sizeof buffers[0]; ++i)
    TRY(ph_buffer_destroy(device, buffers[i], error, sizeof error));
  for (int layer = 0; layer < LAYERS; ++layer) {
    TRY(ph_buffer_destroy(device, queries[layer], error, sizeof error));
    TRY(ph_buffer_destroy(device, out[layer], error, sizeof error));
  }
  TRY(ph_kv_cache_destroy(device, cache, error, sizeof error));
  TRY(ph_device_close(device, error, sizeof error));
  return relative <= 1e-3 ? 0 : 1;
}
