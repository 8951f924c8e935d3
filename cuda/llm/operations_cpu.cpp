// The operations of operations.h on the CPU: rows and tiles are spread over the cores; linear_block_cpu.cpp and
// rows_block_cpu.cpp do the work on each.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <initializer_list>

#include "kv/block_cpu.h"
#include "llm/operations_block_cpu.h"

namespace ph::llm {

#if defined(__x86_64__)
namespace avx512vnni {
extern const LinearKernels kLinearKernels;
extern const RowKernels kRowKernels;
}  // namespace avx512vnni
namespace avx512 {
extern const LinearKernels kLinearKernels;
extern const RowKernels kRowKernels;
}  // namespace avx512
namespace avx2 {
extern const LinearKernels kLinearKernels;
extern const RowKernels kRowKernels;
}  // namespace avx2
#endif
namespace baseline {
extern const LinearKernels kLinearKernels;
extern const RowKernels kRowKernels;
}  // namespace baseline

namespace {

template <typename Kernels>
const Kernels& kernels_of(std::initializer_list<const Kernels*> tables) {
  // block_kernels does not ask for fused multiply-adds, which the wider kernels here use.
#if defined(__x86_64__)
  const char* chosen = __builtin_cpu_supports("fma") ? kv::block_kernels().instruction_set : "baseline";
#else
  const char* chosen = "baseline";
#endif
  for (const Kernels* table : tables) {
    if (strcmp(table->instruction_set, chosen) == 0) return *table;
  }
  return **(tables.end() - 1);
}

// Fewer multiplications than this are done before other threads are awake.
constexpr uint64_t kWorthwhile = 1 << 16;

Source at(Source x, uint64_t element) { return {x.data + element * element_bytes(x.dtype), x.dtype}; }
Target at(Target x, uint64_t element) { return {x.data + element * element_bytes(x.dtype), x.dtype}; }

// Calls use(row) for every row, on all cores if there is much to do.
template <typename Use>
void for_rows(uint32_t rows, uint64_t width, Use use) {
#pragma omp parallel for schedule(static) if (rows * width >= kWorthwhile)
  for (uint32_t row = 0; row < rows; ++row) use(row);
}

// Likewise use(first, count) for runs of elements.
template <typename Use>
void for_runs(uint64_t count, Use use) {
  constexpr uint64_t kRun = 1 << 14;
#pragma omp parallel for schedule(static) if (count >= kWorthwhile)
  for (uint64_t first = 0; first < count; first += kRun)
    use(first, count - first < kRun ? count - first : kRun);
}

}  // namespace

const LinearKernels& linear_kernels() {
#if defined(__x86_64__)
  static const LinearKernels& kernels = kernels_of({&avx512vnni::kLinearKernels, &avx512::kLinearKernels,
                                                    &avx2::kLinearKernels, &baseline::kLinearKernels});
#else
  static const LinearKernels& kernels = baseline::kLinearKernels;
#endif
  return kernels;
}

const RowKernels& row_kernels() {
#if defined(__x86_64__)
  static const RowKernels& kernels = kernels_of(
      {&avx512vnni::kRowKernels, &avx512::kRowKernels, &avx2::kRowKernels, &baseline::kRowKernels});
#else
  static const RowKernels& kernels = baseline::kRowKernels;
#endif
  return kernels;
}

void linear(ph_device&, const Linear& call) {
  const LinearKernels& kernels = linear_kernels();
  const uint32_t tiles = (call.out_features + kernels.tile - 1) / kernels.tile,
                 most = kernels.block_rows(call.in_features);
  // Blocks of about the same size: a thread gets tiles that follow each other, of one block after another.
  const uint32_t blocks = (call.rows - 1) / most + 1, block = (call.rows - 1) / blocks + 1;
  const uint64_t products = static_cast<uint64_t>(call.rows) * call.in_features * call.out_features;
#pragma omp parallel for schedule(static) if (products >= kWorthwhile)
  for (uint64_t item = 0; item < static_cast<uint64_t>(blocks) * tiles; ++item) {
    const uint64_t first_row = item / tiles * block,
                   last_row = std::min<uint64_t>(call.rows, first_row + block);
    const uint32_t tile = static_cast<uint32_t>(item % tiles);
    if (first_row >= last_row) continue;
    kernels.multiply(call, static_cast<uint32_t>(first_row), static_cast<uint32_t>(last_row), tile, tile + 1);
  }
}

void prepare_linear(ph_device&, char* name, uint32_t name_bytes) {
  snprintf(name, name_bytes, "Packhorse's own kernels for %s", linear_kernels().instruction_set);
}

void gather(ph_device&, const Gather& call) {
  const RowKernels& kernels = row_kernels();
  for_rows(call.rows, call.width, [&](uint32_t row) {
    const uint64_t to = static_cast<uint64_t>(row) * call.width;
    const int32_t index = call.indices[row];
    if (index >= 0 && static_cast<uint32_t>(index) < call.x_rows) {
      kernels.convert(at(call.x, static_cast<uint64_t>(index) * call.width), at(call.out, to), call.width);
    } else {  // NaN in each of the types
      memset(at(call.out, to).data, 0xff, call.width * element_bytes(call.out.dtype));
    }
  });
}

void rms_norm(ph_device&, const RmsNorm& call) {
  const RowKernels& kernels = row_kernels();
  for_rows(call.rows, static_cast<uint64_t>(call.groups) * call.width, [&](uint32_t row) {
    for (uint32_t group = 0; group < call.groups; ++group) {
      const uint64_t column = static_cast<uint64_t>(group) * call.width;
      kernels.rms_norm(at(call.x, static_cast<uint64_t>(row) * call.x_stride + column), call.weight,
                       at(call.out, static_cast<uint64_t>(row) * call.out_stride + column), call.width,
                       call.epsilon);
    }
  });
}

void rope(ph_device&, const Rope& call) {
  const RowKernels& kernels = row_kernels();
  for_rows(call.rows, static_cast<uint64_t>(call.heads) * call.head_dim, [&](uint32_t row) {
    float cosines[kMostRotaryDim / 2], sines[kMostRotaryDim / 2];
    for (uint32_t i = 0; i < call.rotary_dim / 2; ++i) {
      const float angle = static_cast<float>(call.positions[row]) * call.frequencies[i];
      cosines[i] = std::cos(angle) * call.scale;
      sines[i] = std::sin(angle) * call.scale;
    }
    for (uint32_t head = 0; head < call.heads; ++head) {
      const uint64_t column = static_cast<uint64_t>(head) * call.head_dim;
      kernels.rope(at(call.x, static_cast<uint64_t>(row) * call.x_stride + column), cosines, sines,
                   at(call.out, static_cast<uint64_t>(row) * call.out_stride + column), call.head_dim,
                   call.rotary_dim);
    }
  });
}

void swiglu(ph_device&, const Swiglu& call) {
  const RowKernels& kernels = row_kernels();
  for_rows(call.rows, call.width, [&](uint32_t row) {
    const uint64_t from = static_cast<uint64_t>(row) * call.stride;
    kernels.swiglu(at(call.gate, from), at(call.up, from),
                   at(call.out, static_cast<uint64_t>(row) * call.width), call.width);
  });
}

void cast(ph_device&, const Cast& call) {
  const RowKernels& kernels = row_kernels();
  for_rows(call.rows, call.width, [&](uint32_t row) {
    kernels.convert(at(call.x, static_cast<uint64_t>(row) * call.x_stride),
                    at(call.out, static_cast<uint64_t>(row) * call.width), call.width);
  });
}

void add(ph_device&, Target x, Source y, uint64_t count) {
  const RowKernels& kernels = row_kernels();
  for_runs(count,
           [&](uint64_t first, uint64_t several) { kernels.add(at(x, first), at(y, first), several); });
}

void advance(ph_device&, int32_t* counters, uint32_t count, int32_t by) {
  for (uint32_t i = 0; i < count; ++i) {
    counters[i] = static_cast<int32_t>(static_cast<uint32_t>(counters[i]) + static_cast<uint32_t>(by));
  }
}

void argmax(ph_device&, Source logits, int32_t* out, uint32_t rows, uint32_t vocabulary) {
  const RowKernels& kernels = row_kernels();
  for_rows(rows, vocabulary, [&](uint32_t row) {
    out[row] = kernels.argmax(at(logits, static_cast<uint64_t>(row) * vocabulary), vocabulary);
  });
}

void cross_entropy(ph_device&, Source logits, const int32_t* targets, float* out, uint32_t rows,
                   uint32_t vocabulary) {
  const RowKernels& kernels = row_kernels();
  for_rows(rows, vocabulary, [&](uint32_t row) {
    out[row] =
        kernels.cross_entropy(at(logits, static_cast<uint64_t>(row) * vocabulary), targets[row], vocabulary);
  });
}

void divergence(ph_device&, Source reference, Source logits, float* out, uint32_t rows, uint32_t vocabulary) {
  const RowKernels& kernels = row_kernels();
  for_rows(rows, vocabulary, [&](uint32_t row) {
    const Source p = at(reference, static_cast<uint64_t>(row) * vocabulary),
                 q = at(logits, static_cast<uint64_t>(row) * vocabulary);
    out[2ull * row] = kernels.divergence(p, q, vocabulary);
    out[2ull * row + 1] = kernels.argmax(p, vocabulary) == kernels.argmax(q, vocabulary) ? 1.0f : 0.0f;
  });
}

}  // namespace ph::llm
