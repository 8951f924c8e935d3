// Run-time values into template arguments, and grids.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kv/quantize.cuh"

namespace ph::kv {

template <typename Run>
void dispatch_dtype(uint32_t dtype, Run run) {
  if (dtype == PH_F16) run(F16{});
  else if (dtype == PH_BF16) run(BF16{});
  else run(F32{});
}

template <typename Run>
void dispatch_pack(uint32_t pack, Run run) {
  if (pack == 4) run(std::integral_constant<int, 4>{});
  else if (pack == 8) run(std::integral_constant<int, 8>{});
  else if (pack == 16) run(std::integral_constant<int, 16>{});
  else run(std::integral_constant<int, 32>{});
}

// A thread block per item; kernels step by gridDim.x over the rest.
inline uint32_t grid_of(uint64_t items) { return static_cast<uint32_t>(std::min<uint64_t>(items, 1u << 30)); }

// Scratch memory of measure (decode.cu).
uint64_t measure_workspace_bytes(const Codec& codec);

}  // namespace ph::kv
