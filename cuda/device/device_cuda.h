// What the CUDA kernels' launchers need of a device.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "common/error.h"
#include "device/device.h"

namespace ph {

// Pinned host memory that uploads pass through. A copy from pageable memory may wait for all earlier work of the stream,
// as the driver has to stage it likewise; here one waits only when every slot is on its way, 2 MiB ahead of the GPU.
struct Staging {
  static constexpr uint64_t kSlotBytes = 64 * 1024;
  static constexpr uint32_t kSlots = 32;

  uint8_t* memory = nullptr;          // [kSlots][kSlotBytes]
  cudaEvent_t departed[kSlots] = {};  // after the last copy from the slot
  uint32_t next = 0;
  std::mutex mutex;
};

class Blas;

// Floats that a device has for sums which several thread blocks share: what one kernel leaves there, the next reads, in
// stream order. Made when the device is opened, as nothing may be allocated while work is captured.
constexpr uint64_t kPartials = 1 << 20;

}  // namespace ph

struct ph_device {
  int ordinal = 0;
  cudaStream_t stream = nullptr;
  bool owns_stream = false;
  cudaEvent_t timer_begin = nullptr, timer_end = nullptr;
  int processors = 0;
  int major = 0;         // compute capability
  int shared_bytes = 0;  // most shared memory of a thread block
  ph::Staging staging;
  float* partials = nullptr;           // [kPartials]
  std::atomic<bool> capturing{false};  // read by any thread
  std::vector<void*> released;         // memory to be freed once nothing is captured
  std::shared_ptr<ph::Blas> blas;      // once it is needed
  std::mutex blas_mutex;
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
// launch: it is always set to the same value, so that threads do not lower each other's, and once. kPrefer asks for it
// rather than for a cache, so that more thread blocks fit a multiprocessor.
enum class SharedMemory { kAllow, kPrefer };
void allow_shared(const ph_device& device, const void* kernel, SharedMemory use);
template <typename... Parameters>
void allow_shared(const ph_device& device, void (*kernel)(Parameters...),
                  SharedMemory use = SharedMemory::kAllow) {
  allow_shared(device, reinterpret_cast<const void*>(kernel), use);
}

}  // namespace ph
