// extern "C": what a language model computes beside attention.
#include <algorithm>
#include <cmath>

#include "abi/arguments.h"
#include "llm/operations.h"

using ph::checked;
using ph::checked_for_capture;
using ph::checked_tensor;
using ph::Error;
using ph::guard;
using ph::llm::Source;
using ph::llm::Target;

namespace {

void require_float(uint32_t dtype, const char* what) {
  if (dtype == PH_F32 || dtype == PH_F16 || dtype == PH_BF16) return;
  throw Error(PH_ERROR_INVALID_ARGUMENT, "%s must be of f32, f16 or bf16: dtype %u is none of these", what,
              dtype);
}

uint32_t positive(uint32_t size, const char* what) {
  if (size == 0) throw Error(PH_ERROR_INVALID_ARGUMENT, "%s must be at least 1", what);
  return size;
}

// Elements of [rows, width] whose rows start `stride` elements apart.
uint64_t strided(uint32_t rows, uint64_t width, uint64_t stride, const char* what) {
  if (stride < width) {
    throw Error(PH_ERROR_INVALID_ARGUMENT,
                "The row stride of %s is %llu, less than the %llu elements of a row", what,
                static_cast<unsigned long long>(stride), static_cast<unsigned long long>(width));
  }
  if (width == 0) throw Error(PH_ERROR_INVALID_ARGUMENT, "Rows of %s must have at least 1 element", what);
  return (positive(rows, "The number of rows") - 1ull) * stride + width;
}

// Tokens have numbers of 31 bits.
uint64_t checked_vocabulary(uint32_t vocabulary) {
  if (vocabulary > INT32_MAX) {
    throw Error(PH_ERROR_INVALID_ARGUMENT, "The vocabulary must have at most %d tokens: it has %u", INT32_MAX,
                vocabulary);
  }
  return positive(vocabulary, "The vocabulary");
}

// The bytes of `count` elements, or of more than any buffer holds.
uint64_t bytes_of(uint64_t count, uint32_t dtype) {
  return count > UINT64_MAX / 4 ? UINT64_MAX : count * ph::llm::element_bytes(dtype);
}

uint8_t* floats(const ph_buffer* buffer, uint64_t offset, uint32_t dtype, uint64_t count, const char* what) {
  require_float(dtype, what);
  return checked_tensor(buffer, offset, bytes_of(count, dtype), what);
}

Source source(const ph_buffer* buffer, uint64_t offset, uint32_t dtype, uint64_t count, const char* what) {
  return {floats(buffer, offset, dtype, count, what), dtype};
}

Target target(const ph_buffer* buffer, uint64_t offset, uint32_t dtype, uint64_t count) {
  return {floats(buffer, offset, dtype, count, "The output"), dtype};
}

// `count` 32-bit values.
template <typename T>
T* words(const ph_buffer* buffer, uint64_t offset, uint64_t count, const char* what) {
  static_assert(sizeof(T) == 4, "words have 32 bits");
  return reinterpret_cast<T*>(checked_tensor(buffer, offset, bytes_of(count, PH_F32), what));
}

}  // namespace

extern "C" {

int32_t ph_llm_linear(ph_device* device, const ph_buffer* x, uint64_t x_offset, uint32_t x_dtype,
                      const ph_buffer* weight, uint64_t weight_offset, uint32_t weight_dtype,
                      const ph_buffer* bias, uint64_t bias_offset, uint32_t bias_dtype, ph_buffer* out,
                      uint64_t out_offset, uint32_t out_dtype, uint32_t rows, uint32_t in_features,
                      uint32_t out_features, uint32_t accumulate, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    const uint64_t in = positive(in_features, "The number of input features"),
                   outs = positive(out_features, "The number of output features");
    positive(rows, "The number of rows");
    if (accumulate > 1)
      throw Error(PH_ERROR_INVALID_ARGUMENT, "accumulate must be 0 or 1: it is %u", accumulate);
    ph::llm::Linear call = {source(x, x_offset, x_dtype, rows * in, "The input"),
                            source(weight, weight_offset, weight_dtype, outs * in, "The weight"),
                            {nullptr, PH_F32},
                            target(out, out_offset, out_dtype, rows * outs),
                            rows,
                            in_features,
                            out_features,
                            accumulate == 1};
    if (bias != nullptr) call.bias = source(bias, bias_offset, bias_dtype, outs, "The bias");
    ph::llm::linear(checked_for_capture(device), call);
  });
}

int32_t ph_llm_prepare_linear(ph_device* device, char* name, uint32_t name_bytes, char* error,
                              uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    if (name == nullptr || name_bytes == 0)
      throw Error(PH_ERROR_INVALID_ARGUMENT, "The place for the name is null");
    ph::llm::prepare_linear(checked(device), name, name_bytes);
  });
}

int32_t ph_llm_gather(ph_device* device, const ph_buffer* x, uint64_t x_offset, uint32_t x_dtype,
                      uint32_t x_rows, const ph_buffer* indices, uint64_t indices_offset, ph_buffer* out,
                      uint64_t out_offset, uint32_t out_dtype, uint32_t rows, uint32_t width, char* error,
                      uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    const uint64_t columns = positive(width, "The width");
    positive(rows, "The number of rows");
    positive(x_rows, "The number of rows to gather from");
    ph::llm::gather(checked_for_capture(device),
                    {source(x, x_offset, x_dtype, x_rows * columns, "The input"),
                     words<const int32_t>(indices, indices_offset, rows, "the indices"),
                     target(out, out_offset, out_dtype, rows * columns), x_rows, rows, width});
  });
}

int32_t ph_llm_rms_norm(ph_device* device, const ph_buffer* x, uint64_t x_offset, uint32_t x_dtype,
                        uint32_t x_stride, const ph_buffer* weight, uint64_t weight_offset,
                        uint32_t weight_dtype, ph_buffer* out, uint64_t out_offset, uint32_t out_dtype,
                        uint32_t out_stride, uint32_t rows, uint32_t groups, uint32_t width, float epsilon,
                        char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    const uint64_t columns = static_cast<uint64_t>(groups) * width;
    if (!(epsilon >= 0 && std::isfinite(epsilon)))
      throw Error(PH_ERROR_INVALID_ARGUMENT, "epsilon must be finite and not negative: it is %g", epsilon);
    ph::llm::rms_norm(
        checked_for_capture(device),
        {source(x, x_offset, x_dtype, strided(rows, columns, x_stride, "the input"), "The input"),
         source(weight, weight_offset, weight_dtype, width, "The weight"),
         target(out, out_offset, out_dtype, strided(rows, columns, out_stride, "the output")), x_stride,
         out_stride, rows, groups, width, epsilon});
  });
}

int32_t ph_llm_rope(ph_device* device, const ph_buffer* x, uint64_t x_offset, uint32_t x_dtype,
                    uint32_t x_stride, const ph_buffer* positions, uint64_t positions_offset,
                    const ph_buffer* frequencies, uint64_t frequencies_offset, ph_buffer* out,
                    uint64_t out_offset, uint32_t out_dtype, uint32_t out_stride, uint32_t rows,
                    uint32_t heads, uint32_t head_dim, uint32_t rotary_dim, float scale, char* error,
                    uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    const uint64_t columns = static_cast<uint64_t>(heads) * head_dim;
    const uint32_t most = std::min(head_dim, ph::llm::kMostRotaryDim);
    if (rotary_dim == 0 || rotary_dim % 2 != 0 || rotary_dim > most) {
      throw Error(PH_ERROR_INVALID_ARGUMENT, "The rotary dimension must be even and from 2 to %u: it is %u",
                  most, rotary_dim);
    }
    if (!std::isfinite(scale))
      throw Error(PH_ERROR_INVALID_ARGUMENT, "scale must be finite: it is %g", scale);
    ph::llm::rope(checked_for_capture(device),
                  {source(x, x_offset, x_dtype, strided(rows, columns, x_stride, "the input"), "The input"),
                   words<const int32_t>(positions, positions_offset, rows, "the positions"),
                   words<const float>(frequencies, frequencies_offset, rotary_dim / 2, "the frequencies"),
                   target(out, out_offset, out_dtype, strided(rows, columns, out_stride, "the output")),
                   x_stride, out_stride, rows, heads, head_dim, rotary_dim, scale});
  });
}

int32_t ph_llm_swiglu(ph_device* device, const ph_buffer* gate, uint64_t gate_offset, const ph_buffer* up,
                      uint64_t up_offset, uint32_t dtype, uint32_t stride, ph_buffer* out,
                      uint64_t out_offset, uint32_t out_dtype, uint32_t rows, uint32_t width, char* error,
                      uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    const uint64_t count = strided(rows, width, stride, "the gate");
    ph::llm::swiglu(
        checked_for_capture(device),
        {source(gate, gate_offset, dtype, count, "The gate"),
         source(up, up_offset, dtype, count, "The up projection"),
         target(out, out_offset, out_dtype, static_cast<uint64_t>(rows) * width), stride, rows, width});
  });
}

int32_t ph_llm_cast(ph_device* device, const ph_buffer* x, uint64_t x_offset, uint32_t x_dtype,
                    uint32_t x_stride, ph_buffer* out, uint64_t out_offset, uint32_t out_dtype, uint32_t rows,
                    uint32_t width, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    const uint64_t count = strided(rows, width, x_stride, "the input");
    ph::llm::cast(
        checked_for_capture(device),
        {source(x, x_offset, x_dtype, count, "The input"),
         target(out, out_offset, out_dtype, static_cast<uint64_t>(rows) * width), x_stride, rows, width});
  });
}

int32_t ph_llm_add(ph_device* device, ph_buffer* x, uint64_t x_offset, uint32_t x_dtype, const ph_buffer* y,
                   uint64_t y_offset, uint32_t y_dtype, uint64_t count, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    if (count == 0) throw Error(PH_ERROR_INVALID_ARGUMENT, "The number of elements must be at least 1");
    ph::llm::add(checked_for_capture(device), target(x, x_offset, x_dtype, count),
                 source(y, y_offset, y_dtype, count, "The summand"), count);
  });
}

int32_t ph_llm_advance(ph_device* device, ph_buffer* counters, uint64_t counters_offset, uint32_t count,
                       int32_t by, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph::llm::advance(
        checked_for_capture(device),
        words<int32_t>(counters, counters_offset, positive(count, "The number of counters"), "the counters"),
        count, by);
  });
}

int32_t ph_llm_argmax(ph_device* device, const ph_buffer* logits, uint64_t logits_offset,
                      uint32_t logits_dtype, ph_buffer* out, uint64_t out_offset, uint32_t rows,
                      uint32_t vocabulary, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    const uint64_t columns = checked_vocabulary(vocabulary);
    positive(rows, "The number of rows");
    ph::llm::argmax(checked_for_capture(device),
                    source(logits, logits_offset, logits_dtype, rows * columns, "The logits"),
                    words<int32_t>(out, out_offset, rows, "the output"), rows, vocabulary);
  });
}

int32_t ph_llm_sample(ph_device* device, const ph_buffer* logits, uint64_t logits_offset,
                      uint32_t logits_dtype, ph_buffer* samplers, uint64_t samplers_offset, ph_buffer* seen,
                      uint64_t seen_offset, ph_buffer* scratch, uint64_t scratch_offset, ph_buffer* out,
                      uint64_t out_offset, uint32_t rows, uint32_t vocabulary, char* error,
                      uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    const uint64_t count = checked_vocabulary(vocabulary) * positive(rows, "The number of rows");
    ph::llm::sample(checked_for_capture(device),
                    {source(logits, logits_offset, logits_dtype, count, "The logits"),
                     reinterpret_cast<ph_llm_sampler*>(checked_tensor(
                         samplers, samplers_offset, rows * sizeof(ph_llm_sampler), "the samplers")),
                     seen == nullptr ? nullptr : checked_tensor(seen, seen_offset, count, "the seen tokens"),
                     words<float>(scratch, scratch_offset, count, "the scratch memory"),
                     words<int32_t>(out, out_offset, rows, "the output"), rows, vocabulary});
  });
}

int32_t ph_llm_mark(ph_device* device, const ph_buffer* tokens, uint64_t tokens_offset, uint32_t count,
                    ph_buffer* seen, uint64_t seen_offset, uint32_t vocabulary, char* error,
                    uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    const uint64_t marks = checked_vocabulary(vocabulary);
    ph::llm::mark(
        checked_for_capture(device),
        words<const int32_t>(tokens, tokens_offset, positive(count, "The number of tokens"), "the tokens"),
        count, checked_tensor(seen, seen_offset, marks, "the seen tokens"), vocabulary);
  });
}

int32_t ph_llm_cross_entropy(ph_device* device, const ph_buffer* logits, uint64_t logits_offset,
                             uint32_t logits_dtype, const ph_buffer* targets, uint64_t targets_offset,
                             ph_buffer* out, uint64_t out_offset, uint32_t rows, uint32_t vocabulary,
                             char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    const uint64_t count = checked_vocabulary(vocabulary) * positive(rows, "The number of rows");
    ph::llm::cross_entropy(checked_for_capture(device),
                           source(logits, logits_offset, logits_dtype, count, "The logits"),
                           words<const int32_t>(targets, targets_offset, rows, "the targets"),
                           words<float>(out, out_offset, rows, "the output"), rows, vocabulary);
  });
}

int32_t ph_llm_divergence(ph_device* device, const ph_buffer* reference, uint64_t reference_offset,
                          uint32_t reference_dtype, const ph_buffer* logits, uint64_t logits_offset,
                          uint32_t logits_dtype, ph_buffer* out, uint64_t out_offset, uint32_t rows,
                          uint32_t vocabulary, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    const uint64_t count = checked_vocabulary(vocabulary) * positive(rows, "The number of rows");
    ph::llm::divergence(checked_for_capture(device),
                        source(reference, reference_offset, reference_dtype, count, "The reference"),
                        source(logits, logits_offset, logits_dtype, count, "The logits"),
                        words<float>(out, out_offset, 2ull * rows, "the output"), rows, vocabulary);
  });
}

}  // extern "C"
