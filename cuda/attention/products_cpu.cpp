// The products of products.h on the CPU: pieces and heads are spread over the cores; products_block_cpu.cpp does the work
// on each.
#include <algorithm>
#include <cstring>

#include "attention/products_block_cpu.h"
#include "kv/block_cpu.h"

namespace ph::attention {

#if defined(__x86_64__)
namespace avx512vnni {
extern const ProductKernels kProductKernels;
}
namespace avx512 {
extern const ProductKernels kProductKernels;
}
namespace avx2 {
extern const ProductKernels kProductKernels;
}
#endif
namespace baseline {
extern const ProductKernels kProductKernels;
}

namespace {

const ProductKernels& product_kernels() {
#if defined(__x86_64__)
  // block_kernels does not ask for fused multiply-adds, which the wider kernels here use.
  if (__builtin_cpu_supports("fma")) {
    for (const ProductKernels* table :
         {&avx512vnni::kProductKernels, &avx512::kProductKernels, &avx2::kProductKernels}) {
      if (strcmp(table->instruction_set, kv::block_kernels().instruction_set) == 0) return *table;
    }
  }
#endif
  return baseline::kProductKernels;
}

// Into how many pieces so many units are cut: of 16 units up to 64 pieces, then of up to 32.
uint32_t product_pieces(uint32_t units) {
  return std::max({1u, std::min((units + 15) / 16, 64u), (units + 31) / 32});
}

// Calls use(piece, head, first unit, last unit) on all cores.
template <typename Use>
void for_pieces(const ProductCall& call, uint32_t pieces, Use use) {
  const uint32_t runs = call.tokens.runs(call.cache);
  const UnitShares shares(runs + call.tokens.packed, runs, pieces);
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (uint32_t piece = 0; piece < pieces; ++piece) {
    for (uint32_t head = 0; head < call.cache.heads; ++head)
      use(piece, head, shares.first_unit(piece), shares.first_unit(piece + 1));
  }
}

uint32_t pieces_of(const ProductCall& call) {
  return product_pieces(call.tokens.runs(call.cache) + call.tokens.packed);
}

}  // namespace

uint64_t products_workspace_bytes(const kv::CacheView& cache) {
  const uint64_t pieces = product_pieces(static_cast<uint32_t>(most_product_units(cache)));
  return pieces * cache.query_heads * cache.head_dim * sizeof(float);
}

void score(ph_device&, const kv::CacheView& cache, const kv::TileShape& shape, const SequenceTokens& tokens,
           const uint8_t* queries, float* out, float scale) {
  const ProductKernels& kernels = product_kernels();
  const ProductCall call = {cache, shape, tokens};
  for_pieces(call, pieces_of(call), [&](uint32_t, uint32_t head, uint32_t first, uint32_t last) {
    kernels.score(call, head, first, last, queries, out, scale);
  });
}

void weigh(ph_device&, const kv::CacheView& cache, const kv::TileShape& shape, const SequenceTokens& tokens,
           const float* weights, float* out, uint8_t* workspace) {
  const ProductKernels& kernels = product_kernels();
  const ProductCall call = {cache, shape, tokens};
  const uint32_t pieces = pieces_of(call);
  const uint64_t values = static_cast<uint64_t>(cache.query_heads) * cache.head_dim;
  float* partials = reinterpret_cast<float*>(workspace);  // [pieces][query_heads][head_dim]
  for_pieces(call, pieces, [&](uint32_t piece, uint32_t head, uint32_t first, uint32_t last) {
    kernels.weigh(call, head, first, last, weights, partials + piece * values);
  });
  std::fill(out, out + values, 0.0f);
  for (uint32_t piece = 0; piece < pieces; ++piece) {
    for (uint64_t i = 0; i < values; ++i) out[i] += partials[piece * values + i];
  }
}

}  // namespace ph::attention
