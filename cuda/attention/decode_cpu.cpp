// Decode attention on the CPU: pieces and heads are spread over the cores; decode_block_cpu.cpp does the work on each.
#include <algorithm>
#include <cstring>

#include "attention/decode_block_cpu.h"
#include "kv/block_cpu.h"

namespace ph::attention {

#if defined(__x86_64__)
namespace avx512vnni {
extern const DecodeKernels kDecodeKernels;
}
namespace avx512 {
extern const DecodeKernels kDecodeKernels;
}
namespace avx2 {
extern const DecodeKernels kDecodeKernels;
}
#endif
namespace baseline {
extern const DecodeKernels kDecodeKernels;
}

namespace {

const DecodeKernels& decode_kernels() {
#if defined(__x86_64__)
  // block_kernels does not ask for fused multiply-adds, which the wider kernels here use.
  if (__builtin_cpu_supports("fma")) {
    for (const DecodeKernels* table :
         {&avx512vnni::kDecodeKernels, &avx512::kDecodeKernels, &avx2::kDecodeKernels}) {
      if (strcmp(table->instruction_set, kv::block_kernels().instruction_set) == 0) return *table;
    }
  }
#endif
  return baseline::kDecodeKernels;
}

}  // namespace

bool takes_queries(uint32_t dtype) { return dtype == PH_F32; }

uint64_t decode_workspace_bytes(const kv::CacheView& cache, uint64_t pieces) {
  return pieces * kv::kMostQueries * cache.query_heads * (cache.head_dim + 2ull) * sizeof(float);
}

void decode(ph_device&, const kv::CacheView& cache, const kv::TileShape& shape, uint32_t layer,
            const kv::StepView& step, const uint8_t* queries, uint8_t* out, float scale, uint8_t* workspace,
            uint32_t window) {
  const DecodeKernels& kernels = decode_kernels();
  const DecodeCall call = {
      cache, shape, layer, step, queries, out, scale, reinterpret_cast<float*>(workspace), window};
#pragma omp parallel
  {
#pragma omp for collapse(2) schedule(dynamic)
    for (uint32_t piece = 0; piece < step.piece_count; ++piece) {
      for (uint32_t head = 0; head < cache.heads; ++head) kernels.attend(call, piece, head);
    }
#pragma omp for collapse(2) schedule(dynamic) nowait
    for (uint32_t piece = 0; piece < step.piece_count; ++piece) {
      for (uint32_t head = 0; head < cache.query_heads; ++head) {
        if (step.pieces[piece].place == 0) kernels.merge(call, piece, head);
      }
    }
  }
}

}  // namespace ph::attention
