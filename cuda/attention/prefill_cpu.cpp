// Prefill attention on the CPU: tiles of rows and heads are spread over the cores; prefill_block_cpu.cpp does the work on
// each.
#include <cstring>

#include "attention/prefill_block_cpu.h"
#include "kv/block_cpu.h"

namespace ph::attention {

#if defined(__x86_64__)
namespace avx512vnni {
extern const PrefillKernels kPrefillKernels;
}
namespace avx512 {
extern const PrefillKernels kPrefillKernels;
}
namespace avx2 {
extern const PrefillKernels kPrefillKernels;
}
#endif
namespace baseline {
extern const PrefillKernels kPrefillKernels;
}

namespace {

const PrefillKernels& prefill_kernels() {
#if defined(__x86_64__)
  // block_kernels does not ask for fused multiply-adds, which the wider kernels here use.
  if (__builtin_cpu_supports("fma")) {
    for (const PrefillKernels* table :
         {&avx512vnni::kPrefillKernels, &avx512::kPrefillKernels, &avx2::kPrefillKernels}) {
      if (strcmp(table->instruction_set, kv::block_kernels().instruction_set) == 0) return *table;
    }
  }
#endif
  return baseline::kPrefillKernels;
}

}  // namespace

void prefill(ph_device&, const kv::CacheView& cache, const kv::TileShape& shape, uint32_t layer,
             const kv::StepView& step, kv::StepTensors tensors, const uint8_t* queries, uint8_t* out,
             float scale, uint32_t window) {
  const PrefillKernels& kernels = prefill_kernels();
  const PrefillCall call = {cache, shape, layer, step, tensors, queries, out, scale, window};
  const uint32_t group = call.group(), tiles = tile_numbers(step, group, kPrefillRows);
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (uint32_t head = 0; head < cache.heads; ++head) {
    for (uint32_t after = 0; after < tiles; ++after) {
      // The last tiles of a sequence see the most tokens: they go first.
      const uint32_t tile = tiles - 1 - after;
      const uint32_t number = entry_of_tile(step, tile, group, kPrefillRows);
      const kv::StepSequence& entry = step.sequences[number];
      const uint32_t first = (tile - first_tile(entry, number, group, kPrefillRows)) * kPrefillRows;
      if (first < entry.tokens * group) kernels.attend(call, number, head, first);
    }
  }
}

}  // namespace ph::attention
