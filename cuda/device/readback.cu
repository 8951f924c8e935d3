// Readbacks of a GPU: page-locked memory, and an event after the copy.
#include "device/device_cuda.h"
#include "device/readback.h"

namespace ph {

namespace {

struct CudaReadback : Readback {
  CudaReadback() = default;
  CudaReadback(const CudaReadback&) = delete;
  CudaReadback& operator=(const CudaReadback&) = delete;
  ~CudaReadback() override {
    // The copy may be on its way to the memory.
    if (copied != nullptr) cudaEventSynchronize(copied);
    if (memory != nullptr) cudaFreeHost(memory);
    if (copied != nullptr) cudaEventDestroy(copied);
    cudaGetLastError();
  }
  void enqueue(ph_device& device, const uint8_t* source, uint64_t bytes) override {
    PH_CUDA_TRY(cudaMemcpyAsync(memory, source, bytes, cudaMemcpyDeviceToHost, device.stream));
    PH_CUDA_TRY(cudaEventRecord(copied, device.stream));
  }
  const uint8_t* wait() override {
    PH_CUDA_TRY(cudaEventSynchronize(copied));
    return memory;
  }

  uint8_t* memory = nullptr;
  cudaEvent_t copied = nullptr;
};

}  // namespace

std::unique_ptr<Readback> make_readback(ph_device&, uint64_t bytes) {
  auto readback = std::make_unique<CudaReadback>();
  PH_CUDA_TRY(cudaEventCreateWithFlags(&readback->copied, cudaEventDisableTiming));
  PH_CUDA_TRY(cudaMallocHost(&readback->memory, bytes));
  return readback;
}

}  // namespace ph
