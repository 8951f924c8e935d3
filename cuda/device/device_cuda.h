// What the CUDA kernels' launchers need of a device.
#pragma once

#include <cuda_runtime.h>

#include "common/error.h"
#include "device/device.h"

struct ph_device {
  int ordinal;
  cudaStream_t stream;
  cudaEvent_t timer_begin, timer_end;
  int processors;
  int shared_bytes;  // most shared memory of a thread block
};

namespace ph {

// Throws for a failed CUDA call, with the expression and its place, and clears the error.
inline void cuda_check(cudaError_t result, const char* expression, const char* file, int line) {
  if (result == cudaSuccess) return;
  cudaGetLastError();
  const int32_t status = result == cudaErrorMemoryAllocation ? PH_ERROR_OUT_OF_MEMORY : PH_ERROR_CUDA;
  throw Error(status, "%s in %s at %s:%d", cudaGetErrorString(result), expression, file, line);
}

#define PH_CUDA_TRY(expression) ::ph::cuda_check((expression), #expression, __FILE__, __LINE__)

// Lets a kernel take all the dynamic shared memory there is. The attribute belongs to the function on a GPU, not to a
// launch: it is always set to the same value, so that threads do not lower each other's, and once.
void allow_shared(const ph_device& device, const void* kernel);
template <typename... Parameters>
void allow_shared(const ph_device& device, void (*kernel)(Parameters...)) {
  allow_shared(device, reinterpret_cast<const void*>(kernel));
}

}  // namespace ph
