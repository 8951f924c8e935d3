// What the operations' launchers share: run-time values into template arguments, grids, and the status.
#pragma once

#include <type_traits>

#include "device/device_cuda.h"
#include "kv/operations.h"
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

// A thread block per item; the index must fit 31 bits.
inline uint32_t grid_of(uint64_t items) {
  if (items > INT32_MAX) {
    throw Error(PH_ERROR_UNSUPPORTED, "Cannot run %llu thread blocks in one call: split the tokens",
                static_cast<unsigned long long>(items));
  }
  return static_cast<uint32_t>(items);
}

// Keys and values to read, for kernels; null where there are none.
struct Tensors {
  const uint8_t* x[kParts];
};

inline Tensors tensors_of(const void* const tensors[kParts]) {
  return {{static_cast<const uint8_t*>(tensors[0]), static_cast<const uint8_t*>(tensors[1])}};
}

inline void clear_status(ph_device& device, Status* status) {
  PH_CUDA_TRY(cudaMemsetAsync(&status->first, 0xff, sizeof status->first, device.stream));
  PH_CUDA_TRY(cudaMemsetAsync(&status->bytes, 0, sizeof status->bytes, device.stream));
}

// For atomicMin.
inline unsigned long long* first_of(Status* status) {
  return reinterpret_cast<unsigned long long*>(&status->first);
}

}  // namespace ph::kv
