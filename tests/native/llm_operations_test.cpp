// The operations of language models on the CPU through the C ABI, for the sanitizers and for every instruction set: tensors
// of random sizes that end where their memory does, products against double precision, and rows that must not depend on
// the others.
//
// llm_operations_test [SEED]
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "common/float16.h"
#include "packhorse.h"

namespace {

ph_device* device;
std::mt19937 random_numbers;

uint32_t up_to(uint32_t most) { return 1 + static_cast<uint32_t>(random_numbers()) % most; }
uint32_t any_dtype() { return static_cast<uint32_t>(random_numbers()) % 3; }

// Random floats in memory of exactly their size.
struct Tensor {
  Tensor(uint64_t count, uint32_t type)
      : dtype(type), bytes(count * (type == PH_F32 ? 4 : 2)), values(count) {
    memory.reset(static_cast<uint8_t*>(malloc(bytes)));
    std::normal_distribution<float> normal;
    for (uint64_t i = 0; i < count; ++i) {
      const float value = normal(random_numbers);
      const uint16_t half = type == PH_F16 ? ph::float_to_f16(value) : ph::float_to_bf16(value);
      if (type == PH_F32) memcpy(memory.get() + 4 * i, &value, 4);
      else memcpy(memory.get() + 2 * i, &half, 2);
      values[i] = at(i);
    }
    int32_t status;
    handle =
        ph_buffer_wrap(device, reinterpret_cast<uint64_t>(memory.get()), bytes, &status, error, sizeof error);
    CHECK(handle != nullptr);
  }
  ~Tensor() { OK(ph_buffer_destroy(device, handle, error, sizeof error)); }
  Tensor(const Tensor&) = delete;
  float at(uint64_t i) const {
    if (dtype == PH_F32) {
      float value;
      memcpy(&value, memory.get() + 4 * i, 4);
      return value;
    }
    uint16_t half;
    memcpy(&half, memory.get() + 2 * i, 2);
    return dtype == PH_F16 ? ph::f16_to_float(half) : ph::bf16_to_float(half);
  }
  struct Free {
    void operator()(void* data) const { free(data); }
  };
  uint32_t dtype;
  uint64_t bytes;
  std::vector<float> values;  // as they were
  std::unique_ptr<uint8_t, Free> memory;
  ph_buffer* handle;
};

// `count` times 32 bits.
struct Words : Tensor {
  explicit Words(const std::vector<int32_t>& from) : Tensor(from.size(), PH_F32) {
    memcpy(memory.get(), from.data(), bytes);
  }
};

#define IN(tensor) (tensor).handle, 0, (tensor).dtype
#define END error, sizeof error

void check_linear() {
  const uint32_t rows = up_to(40), in = up_to(up_to(4) == 1 ? 1200 : 90), outs = up_to(40);
  const bool accumulate = up_to(3) == 1, has_bias = up_to(2) == 1;
  const Tensor x(static_cast<uint64_t>(rows) * in, any_dtype()),
      weight(static_cast<uint64_t>(outs) * in, any_dtype()), bias(outs, any_dtype());
  Tensor out(static_cast<uint64_t>(rows) * outs, any_dtype());
  OK(ph_llm_linear(device, IN(x), IN(weight), has_bias ? bias.handle : nullptr, 0, bias.dtype, IN(out), rows,
                   in, outs, accumulate, END));
  const double unit = out.dtype == PH_F32 ? 0x1p-24 : (out.dtype == PH_F16 ? 0x1p-11 : 0x1p-8);
  for (uint32_t row = 0; row < rows; ++row) {
    for (uint32_t o = 0; o < outs; ++o) {
      const uint64_t at = static_cast<uint64_t>(row) * outs + o;
      double sum = (accumulate ? out.values[at] : 0.0) + (has_bias ? bias.values[o] : 0.0),
             size = std::fabs(sum);
      for (uint32_t i = 0; i < in; ++i) {
        const double term = static_cast<double>(x.values[static_cast<uint64_t>(row) * in + i]) *
                            weight.values[static_cast<uint64_t>(o) * in + i];
        sum += term;
        size += std::fabs(term);
      }
      CHECK(std::fabs(out.at(at) - sum) <= 1e-6 * size + 1.01 * unit * std::fabs(sum) + 1e-7);
    }
  }
}

void check_rows_alone() {
  const uint32_t rows = up_to(300), in = 4 * up_to(400), outs = up_to(30);
  const Tensor x(static_cast<uint64_t>(rows) * in, PH_F32),
      weight(static_cast<uint64_t>(outs) * in, any_dtype());
  const Tensor all(static_cast<uint64_t>(rows) * outs, PH_F32), one(outs, PH_F32);
  OK(ph_llm_linear(device, IN(x), IN(weight), nullptr, 0, PH_F32, IN(all), rows, in, outs, 0, END));
  for (int i = 0; i < 5; ++i) {
    const uint64_t row = up_to(rows) - 1;
    OK(ph_llm_linear(device, x.handle, row * in * 4, PH_F32, IN(weight), nullptr, 0, PH_F32, IN(one), 1, in,
                     outs, 0, END));
    CHECK(memcmp(one.memory.get(), all.memory.get() + row * outs * 4, outs * 4) == 0);
  }
}

// What the other operations read and write; their values are for tests/llm_*_test.ts.
void run_others() {
  const uint32_t rows = up_to(4), width = up_to(400), stride = width + up_to(9) - 1;
  const uint64_t strided = static_cast<uint64_t>(rows - 1) * stride + width,
                 dense = static_cast<uint64_t>(rows) * width;
  const Tensor x(strided, any_dtype()), other(strided, x.dtype), weight(width, any_dtype());
  const Tensor out(dense, any_dtype()), logits(dense, any_dtype());
  OK(ph_llm_rms_norm(device, IN(x), stride, IN(weight), IN(out), width, rows, 1, width, 1e-5f, END));
  OK(ph_llm_swiglu(device, x.handle, 0, other.handle, 0, x.dtype, stride, IN(out), rows, width, END));
  OK(ph_llm_cast(device, IN(x), stride, IN(out), rows, width, END));
  OK(ph_llm_add(device, IN(out), IN(logits), dense, END));

  const uint32_t heads = up_to(3), head_dim = 2 * up_to(70), rotary_dim = 2 * up_to(head_dim / 2);
  const Tensor turned(static_cast<uint64_t>(rows) * heads * head_dim, any_dtype()),
      result(static_cast<uint64_t>(rows) * heads * head_dim, any_dtype()),
      frequencies(rotary_dim / 2, PH_F32);
  const Words tokens(std::vector<int32_t>(rows, static_cast<int32_t>(up_to(width)) - 1));
  OK(ph_llm_rope(device, IN(turned), heads * head_dim, tokens.handle, 0, frequencies.handle, 0, IN(result),
                 heads * head_dim, rows, heads, head_dim, rotary_dim, 1.0f, END));

  const Words indices(
      {INT32_MIN, -1, 0, static_cast<int32_t>(rows) - 1, static_cast<int32_t>(rows), INT32_MAX});
  const Tensor gathered(6ull * width, any_dtype());
  OK(ph_llm_gather(device, IN(logits), rows, indices.handle, 0, IN(gathered), 6, width, END));

  const Words chosen(std::vector<int32_t>(rows, 0)), losses(std::vector<int32_t>(rows, 0)),
      divergences(std::vector<int32_t>(2 * rows, 0));
  OK(ph_llm_argmax(device, IN(logits), chosen.handle, 0, rows, width, END));
  OK(ph_llm_cross_entropy(device, IN(logits), tokens.handle, 0, losses.handle, 0, rows, width, END));
  OK(ph_llm_divergence(device, IN(logits), IN(out), divergences.handle, 0, rows, width, END));

  std::vector<int32_t> bits(8 * rows);
  for (uint32_t row = 0; row < rows; ++row) {
    const ph_llm_sampler sampler = {
        random_numbers(), row, up_to(2 * width) - 1, 0.5f + row, 0.9f, 0.01f, 1.1f};
    memcpy(&bits[8 * row], &sampler, sizeof sampler);
  }
  const Words samplers(bits), seen(std::vector<int32_t>((dense + 3) / 4, 0));
  const Tensor scratch(dense, PH_F32);
  OK(ph_llm_sample(device, IN(logits), samplers.handle, 0, seen.handle, 0, scratch.handle, 0, chosen.handle,
                   0, rows, width, END));
  for (uint32_t row = 0; row < rows; ++row) {
    int32_t token;
    memcpy(&token, chosen.memory.get() + 4 * row, sizeof token);
    CHECK(token >= 0 && token < static_cast<int32_t>(width));
    CHECK(seen.memory.get()[static_cast<uint64_t>(row) * width + token] == 1);
  }
  OK(ph_llm_mark(device, indices.handle, 0, 6, seen.handle, 0, width, END));
}

}  // namespace

int main(int count, char** arguments) {
  const unsigned seed = count > 1 ? static_cast<unsigned>(atoi(arguments[1])) : std::random_device{}();
  fprintf(stderr, "seed %u\n", seed);
  random_numbers.seed(seed);
  int32_t status;
  device = ph_device_open(0, &status, error, sizeof error);
  check(device != nullptr, error, __LINE__);
  for (int i = 0; i < 150; ++i) {
    check_linear();
    run_others();
  }
  for (int i = 0; i < 20; ++i) check_rows_alone();
  OK(ph_device_close(device, error, sizeof error));
}
