// A CUDA GPU as a device: one stream, memory from the stream-ordered pool.
#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <set>
#include <utility>

#include "device/device_cuda.h"

namespace ph {

namespace {

// Stream capture has no node that frees memory allocated outside of it.
void free_released(ph_device& device) {
  while (!device.released.empty()) {
    void* data = device.released.back();
    device.released.pop_back();
    PH_CUDA_TRY(cudaFreeAsync(data, device.stream));
  }
}

// Frees what was created of a device, also after an error that no later call gets past.
struct CloseDevice {
  void operator()(ph_device* device) const {
    device->blas.reset();  // while its stream is there
    for (void* data : device->released) cudaFreeAsync(data, device->stream);
    for (const cudaEvent_t event : device->staging.departed)
      if (event != nullptr) cudaEventDestroy(event);
    if (device->staging.memory != nullptr) cudaFreeHost(device->staging.memory);
    if (device->partials != nullptr) cudaFree(device->partials);
    if (device->timer_begin != nullptr) cudaEventDestroy(device->timer_begin);
    if (device->timer_end != nullptr) cudaEventDestroy(device->timer_end);
    if (device->owns_stream) cudaStreamDestroy(device->stream);
    cudaGetLastError();
    delete device;
  }
};
using OwnedDevice = std::unique_ptr<ph_device, CloseDevice>;

// A device without a stream.
OwnedDevice find_device(uint32_t ordinal) {
  int count = 0;
  const cudaError_t found = cudaGetDeviceCount(&count);
  if (found != cudaSuccess || count == 0) {
    cudaGetLastError();
    throw Error(PH_ERROR_NO_GPU, "Cannot open a GPU: %s",
                found == cudaSuccess ? "none is present" : cudaGetErrorString(found));
  }
  if (ordinal >= static_cast<uint32_t>(count)) {
    throw Error(PH_ERROR_INVALID_ARGUMENT, "Cannot open GPU %u: there are %d, numbered from 0", ordinal,
                count);
  }
  const int index = static_cast<int>(ordinal);
  OwnedDevice device(new ph_device);
  device->ordinal = index;
  enter(*device);
  PH_CUDA_TRY(cudaDeviceGetAttribute(&device->processors, cudaDevAttrMultiProcessorCount, index));
  PH_CUDA_TRY(cudaDeviceGetAttribute(&device->major, cudaDevAttrComputeCapabilityMajor, index));
  PH_CUDA_TRY(cudaDeviceGetAttribute(&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  PH_CUDA_TRY(cudaEventCreate(&device->timer_begin));
  PH_CUDA_TRY(cudaEventCreate(&device->timer_end));
  Staging& staging = device->staging;
  PH_CUDA_TRY(cudaMallocHost(&staging.memory, Staging::kSlots * Staging::kSlotBytes));
  for (cudaEvent_t& event : staging.departed)
    PH_CUDA_TRY(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  PH_CUDA_TRY(cudaMalloc(&device->partials, kPartials * sizeof(float)));
  return device;
}

struct CudaGraph : Graph {
  ~CudaGraph() override {
    // One in flight is freed on completion.
    if (executable != nullptr) cudaGraphExecDestroy(executable);
    cudaGetLastError();
  }
  cudaGraphExec_t executable = nullptr;
};

}  // namespace

void allow_shared(const ph_device& device, const void* kernel, SharedMemory use) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({device.ordinal, kernel}) != 0) return;
  cudaFuncAttributes attributes;
  PH_CUDA_TRY(cudaFuncGetAttributes(&attributes, kernel));
  PH_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   device.shared_bytes - static_cast<int>(attributes.sharedSizeBytes)));
  if (use == SharedMemory::kPrefer) {
    PH_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                     cudaSharedmemCarveoutMaxShared));
  }
  allowed.insert({device.ordinal, kernel});
}

uint32_t device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return static_cast<uint32_t>(count);
}

ph_device* open_device(uint32_t ordinal) {
  OwnedDevice device = find_device(ordinal);
  PH_CUDA_TRY(cudaStreamCreateWithFlags(&device->stream, cudaStreamNonBlocking));
  device->owns_stream = true;
  return device.release();
}

ph_device* open_device_on_stream(uint32_t ordinal, uint64_t stream) {
  OwnedDevice device = find_device(ordinal);
  device->stream = reinterpret_cast<cudaStream_t>(stream);
  if (device->stream == cudaStreamPerThread) {
    throw Error(
        PH_ERROR_INVALID_ARGUMENT,
        "Cannot open GPU %u on CUDA's per-thread default stream, which is another one in every thread: give "
        "a stream of cudaStreamCreate",
        ordinal);
  }
#if CUDART_VERSION >= 13000
  // The legacy default stream is every GPU's.
  int owner = device->ordinal;
  if (device->stream != nullptr && device->stream != cudaStreamLegacy)
    PH_CUDA_TRY(cudaStreamGetDevice(device->stream, &owner));
  if (owner != device->ordinal) {
    throw Error(PH_ERROR_INVALID_ARGUMENT, "Cannot open GPU %u on stream 0x%llx, which is one of GPU %d",
                ordinal, static_cast<unsigned long long>(stream), owner);
  }
#endif
  return device.release();
}

uint64_t stream_handle(const ph_device& device) { return reinterpret_cast<uint64_t>(device.stream); }

void close_device(ph_device* device) {
  const OwnedDevice owned(device);
  enter(*device);
  synchronize(*device);
}

void device_info(ph_device& device, ph_device_info& info) {
  info = {};
  cudaDeviceProp properties;
  PH_CUDA_TRY(cudaGetDeviceProperties(&properties, device.ordinal));
  snprintf(info.name, sizeof info.name, "%.*s", static_cast<int>(sizeof info.name) - 1, properties.name);
  snprintf(info.instruction_set, sizeof info.instruction_set, "sm_%d%d", properties.major, properties.minor);
  size_t free_bytes = 0, total_bytes = 0;
  PH_CUDA_TRY(cudaMemGetInfo(&free_bytes, &total_bytes));
  info.total_bytes = total_bytes;
  info.free_bytes = free_bytes;
  info.processors = static_cast<uint32_t>(device.processors);
  int version = 0;
  PH_CUDA_TRY(cudaDriverGetVersion(&version));
  info.driver_version = static_cast<uint32_t>(version);
  PH_CUDA_TRY(cudaRuntimeGetVersion(&version));
  info.runtime_version = static_cast<uint32_t>(version);
  info.is_gpu = 1;
}

void enter(ph_device& device) { PH_CUDA_TRY(cudaSetDevice(device.ordinal)); }

void synchronize(ph_device& device) { PH_CUDA_TRY(cudaStreamSynchronize(device.stream)); }

uint8_t* allocate(ph_device& device, uint64_t bytes) {
  void* data = nullptr;
  const cudaError_t result = cudaMallocAsync(&data, bytes, device.stream);
  if (result == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    size_t free_bytes = 0, total_bytes = 0;
    PH_CUDA_TRY(cudaMemGetInfo(&free_bytes, &total_bytes));
    throw Error(PH_ERROR_OUT_OF_MEMORY, "Cannot allocate %llu bytes of GPU memory: %llu of %llu are free",
                static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(free_bytes),
                static_cast<unsigned long long>(total_bytes));
  }
  cuda_check(result, "cudaMallocAsync", __FILE__, __LINE__);
  return static_cast<uint8_t*>(data);
}

void release(ph_device& device, uint8_t* data) {
  device.released.push_back(data);
  if (!capturing(device)) free_released(device);
}

void require_memory(const ph_device& device, uint64_t address, uint64_t bytes) {
  for (const uint64_t at : {address, address + bytes - 1}) {
    cudaPointerAttributes found{};
    if (cudaPointerGetAttributes(&found, reinterpret_cast<const void*>(at)) != cudaSuccess) {
      cudaGetLastError();
      found.type = cudaMemoryTypeUnregistered;
    }
    if (found.type == cudaMemoryTypeDevice && found.device == device.ordinal) continue;
    char what[64] = "memory that CUDA does not know";
    if (found.type == cudaMemoryTypeDevice) snprintf(what, sizeof what, "memory of GPU %d", found.device);
    if (found.type == cudaMemoryTypeManaged) snprintf(what, sizeof what, "managed memory");
    if (found.type == cudaMemoryTypeHost) snprintf(what, sizeof what, "host memory");
    throw Error(PH_ERROR_INVALID_ARGUMENT,
                "Cannot wrap %llu bytes at 0x%llx: 0x%llx is %s, not memory of GPU %d",
                static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(address),
                static_cast<unsigned long long>(at), what, device.ordinal);
  }
}

void download(ph_device& device, void* target, const uint8_t* source, uint64_t bytes) {
  PH_CUDA_TRY(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDeviceToHost, device.stream));
  synchronize(device);
}

void enqueue_upload(ph_device& device, uint8_t* target, const void* source, uint64_t bytes) {
  Staging& staging = device.staging;
  const std::lock_guard<std::mutex> lock(staging.mutex);
  for (uint64_t done = 0; done < bytes;) {
    const uint64_t count = std::min(bytes - done, Staging::kSlotBytes);
    uint8_t* slot = staging.memory + staging.next * Staging::kSlotBytes;
    const cudaEvent_t departed = staging.departed[staging.next];
    staging.next = (staging.next + 1) % Staging::kSlots;
    PH_CUDA_TRY(cudaEventSynchronize(departed));
    memcpy(slot, static_cast<const uint8_t*>(source) + done, count);
    PH_CUDA_TRY(cudaMemcpyAsync(target + done, slot, count, cudaMemcpyHostToDevice, device.stream));
    PH_CUDA_TRY(cudaEventRecord(departed, device.stream));
    done += count;
  }
}

void upload(ph_device& device, uint8_t* target, const void* source, uint64_t bytes) {
  // Half of what is staged: the stream keeps its work while a batch follows another.
  constexpr uint64_t kMostStaged = Staging::kSlots / 2 * Staging::kSlotBytes;
  if (bytes <= kMostStaged) return enqueue_upload(device, target, source, bytes);
  PH_CUDA_TRY(cudaMemcpyAsync(target, source, bytes, cudaMemcpyHostToDevice, device.stream));
  synchronize(device);
}

void copy(ph_device& device, uint8_t* target, const uint8_t* source, uint64_t bytes) {
  PH_CUDA_TRY(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDeviceToDevice, device.stream));
}

void fill(ph_device& device, uint8_t* target, uint8_t value, uint64_t bytes) {
  PH_CUDA_TRY(cudaMemsetAsync(target, value, bytes, device.stream));
}

namespace {

constexpr uint32_t kReadThreads = 256;
constexpr uint32_t kReadAhead = 8;  // 16-byte loads in flight a thread
// Of a multiprocessor: those that it holds at a time. With more, others follow them at another place, and take turns with
// what is left of the first: 3.9 instead of 4.5 TB/s on an H200, sometimes.
constexpr uint32_t kReadBlocks = 4;

__device__ uint32_t read_sink;

// Every thread block reads runs of kReadThreads * kReadAhead units in turn.
__global__ void __launch_bounds__(kReadThreads, kReadBlocks)
    ReadKernel(const uint4* source, uint64_t units, const uint8_t* rest, uint32_t rest_bytes) {
  constexpr uint64_t kRun = kReadThreads * kReadAhead;
  uint32_t seen = 0;
  for (uint64_t run = blockIdx.x * kRun; run < units; run += gridDim.x * kRun) {
    uint4 held[kReadAhead];
#pragma unroll
    for (uint32_t i = 0; i < kReadAhead; ++i) {
      const uint64_t unit = run + i * kReadThreads + threadIdx.x;
      held[i] = unit < units ? __ldcs(source + unit) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (uint32_t i = 0; i < kReadAhead; ++i) seen |= held[i].x ^ held[i].y ^ held[i].z ^ held[i].w;
  }
  if (blockIdx.x == 0 && threadIdx.x < rest_bytes) seen |= rest[threadIdx.x];
  // Never so, which the compiler cannot know: otherwise it would drop the loads.
  if (gridDim.y > 1) atomicOr(&read_sink, seen);
}

}  // namespace

void read(ph_device& device, const uint8_t* source, uint64_t bytes) {
  if (bytes == 0) return;
  const uint64_t units = bytes / sizeof(uint4), runs = units / (kReadThreads * kReadAhead) + 1;
  const uint32_t blocks =
      static_cast<uint32_t>(std::min<uint64_t>(runs, static_cast<uint64_t>(kReadBlocks) * device.processors));
  ReadKernel<<<blocks, kReadThreads, 0, device.stream>>>(reinterpret_cast<const uint4*>(source), units,
                                                         source + units * sizeof(uint4),
                                                         static_cast<uint32_t>(bytes % sizeof(uint4)));
  PH_CUDA_TRY(cudaGetLastError());
}

void timer_begin(ph_device& device) { PH_CUDA_TRY(cudaEventRecord(device.timer_begin, device.stream)); }

float timer_end(ph_device& device) {
  float milliseconds = 0;
  PH_CUDA_TRY(cudaEventRecord(device.timer_end, device.stream));
  PH_CUDA_TRY(cudaEventSynchronize(device.timer_end));
  PH_CUDA_TRY(cudaEventElapsedTime(&milliseconds, device.timer_begin, device.timer_end));
  return milliseconds;
}

// Relaxed: another mode would forbid the calling thread what it is free to do besides, such as an allocation by the
// caller's engine or by the driver when it loads a kernel; what the stream itself could not take, the ABI refuses.
void begin_capture(ph_device& device) {
  if (device.stream == nullptr || device.stream == cudaStreamLegacy) {
    throw Error(
        PH_ERROR_UNSUPPORTED,
        "Cannot capture work on CUDA's legacy default stream: open the device on another stream, or on "
        "its own");
  }
  PH_CUDA_TRY(cudaStreamBeginCapture(device.stream, cudaStreamCaptureModeRelaxed));
  device.capturing = true;
}

std::unique_ptr<Graph> end_capture(ph_device& device) {
  cudaGraph_t recorded = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(device.stream, &recorded);
  device.capturing = false;
  const std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, decltype(&cudaGraphDestroy)> owned(
      recorded, cudaGraphDestroy);
  cuda_check(ended, "cudaStreamEndCapture", __FILE__, __LINE__);
  free_released(device);
  auto graph = std::make_unique<CudaGraph>();
  PH_CUDA_TRY(cudaGraphInstantiateWithFlags(&graph->executable, recorded, 0));
  return graph;
}

bool capturing(const ph_device& device) {
  if (device.capturing || device.owns_stream) return device.capturing;
  // The caller may be capturing a stream of their own.
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  PH_CUDA_TRY(cudaStreamIsCapturing(device.stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

void launch(ph_device& device, Graph& graph) {
  PH_CUDA_TRY(cudaGraphLaunch(static_cast<CudaGraph&>(graph).executable, device.stream));
}

}  // namespace ph
