// Setting and reading single words of device memory: page tables and the ends of streams.
#include "device/device_cuda.h"
#include "kv/cache_operations.h"

namespace ph::kv {

namespace {

constexpr uint32_t kThreads = 128;

__global__ void ScatterKernel(uint32_t* base, const WordAt* words, uint32_t count) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i < count) base[words[i].position] = words[i].value;
}

__global__ void GatherKernel(const uint32_t* base, WordAt* words, uint32_t count) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i < count) words[i].value = base[words[i].position];
}

}  // namespace

void scatter_words(ph_device& device, uint32_t* base, const WordAt* words, uint32_t count) {
  if (count == 0) return;
  ScatterKernel<<<(count + kThreads - 1) / kThreads, kThreads, 0, device.stream>>>(base, words, count);
  PH_CUDA_TRY(cudaGetLastError());
}

void gather_words(ph_device& device, const uint32_t* base, WordAt* words, uint32_t count) {
  if (count == 0) return;
  GatherKernel<<<(count + kThreads - 1) / kThreads, kThreads, 0, device.stream>>>(base, words, count);
  PH_CUDA_TRY(cudaGetLastError());
}

}  // namespace ph::kv
