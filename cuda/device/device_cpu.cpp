// The CPU as a device: memory is the host's and work is done when a call returns.
#include <omp.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "common/error.h"
#include "device/device.h"
#include "kv/block_cpu.h"

struct ph_device {
  std::chrono::steady_clock::time_point timer;
};

namespace ph {

namespace {

void processor_name(char* name, size_t bytes) {
  snprintf(name, bytes, "CPU");
  FILE* file = fopen("/proc/cpuinfo", "r");
  if (file == nullptr) return;
  char line[256];
  while (fgets(line, sizeof line, file) != nullptr) {
    if (strncmp(line, "model name", 10) != 0) continue;
    const char* value = strchr(line, ':');
    if (value != nullptr)
      snprintf(name, bytes, "%.*s", static_cast<int>(strcspn(value + 2, "\n")), value + 2);
    break;
  }
  fclose(file);
}

}  // namespace

uint32_t device_count() { return 1; }

ph_device* open_device(uint32_t ordinal) {
  if (ordinal != 0)
    throw Error(PH_ERROR_INVALID_ARGUMENT, "Cannot open CPU device %u: there is only device 0", ordinal);
  kv::block_kernels();  // reports an unknown PACKHORSE_INSTRUCTION_SET here rather than in the first kernel
  return new ph_device{};
}

ph_device* open_device_on_stream(uint32_t, uint64_t stream) {
  throw Error(PH_ERROR_UNSUPPORTED,
              "Cannot open the CPU on stream 0x%llx: it has no streams; open it without one, or open a GPU",
              static_cast<unsigned long long>(stream));
}
uint64_t stream_handle(const ph_device&) { return 0; }

void close_device(ph_device* device) { delete device; }

void device_info(ph_device&, ph_device_info& info) {
  info = {};
  processor_name(info.name, sizeof info.name);
  snprintf(info.instruction_set, sizeof info.instruction_set, "%s", kv::block_kernels().instruction_set);
  const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  info.total_bytes = page * static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES));
  info.free_bytes = page * static_cast<uint64_t>(sysconf(_SC_AVPHYS_PAGES));
  info.processors = static_cast<uint32_t>(omp_get_max_threads());
}

void enter(ph_device&) {}
void synchronize(ph_device&) {}

// Any address may be the process's own; nothing tells cheaply which are.
void require_memory(const ph_device&, uint64_t, uint64_t) {}

uint8_t* allocate(ph_device&, uint64_t bytes) {
  // Of much memory, pages of 2 MiB: a record of a cache would cost a miss of the page tables for every 4 KiB else.
  constexpr uint64_t kHugePage = 2u << 20;
  const uint64_t alignment = bytes >= 4 * kHugePage ? kHugePage : 256;
  if (bytes > UINT64_MAX - alignment) throw std::bad_alloc();
  const uint64_t size = (bytes + alignment - 1) / alignment * alignment;
  void* data = aligned_alloc(alignment, size);
  if (data != nullptr && alignment == kHugePage)
    madvise(data, size, MADV_HUGEPAGE);  // or not, as the system likes
  if (data == nullptr) {
    throw Error(PH_ERROR_OUT_OF_MEMORY, "Cannot allocate %llu bytes of host memory",
                static_cast<unsigned long long>(bytes));
  }
  return static_cast<uint8_t*>(data);
}

void release(ph_device&, uint8_t* data) { free(data); }

namespace {

// One core does not fill the memory bus. One piece a thread, as memcpy is fastest on long ones.
void copy_parallel(uint8_t* target, const uint8_t* source, uint64_t bytes) {
  if (bytes == 0) return;
  constexpr uint64_t kWorthwhile = 4u << 20;
  const uint64_t pieces =
      std::clamp<uint64_t>(bytes / kWorthwhile, 1, static_cast<uint64_t>(omp_get_max_threads()));
#pragma omp parallel for schedule(static) if (pieces > 1)
  for (uint64_t piece = 0; piece < pieces; ++piece) {
    const uint64_t begin = bytes / pieces * piece,
                   end = piece + 1 == pieces ? bytes : bytes / pieces * (piece + 1);
    memcpy(target + begin, source + begin, end - begin);
  }
}

}  // namespace

void upload(ph_device&, uint8_t* target, const void* source, uint64_t bytes) {
  copy_parallel(target, static_cast<const uint8_t*>(source), bytes);
}
void download(ph_device&, void* target, const uint8_t* source, uint64_t bytes) {
  copy_parallel(static_cast<uint8_t*>(target), source, bytes);
}
void enqueue_upload(ph_device&, uint8_t* target, const void* source, uint64_t bytes) {
  copy_parallel(target, static_cast<const uint8_t*>(source), bytes);
}
void copy(ph_device&, uint8_t* target, const uint8_t* source, uint64_t bytes) {
  copy_parallel(target, source, bytes);
}
void fill(ph_device&, uint8_t* target, uint8_t value, uint64_t bytes) { memset(target, value, bytes); }

void read(ph_device&, const uint8_t* source, uint64_t bytes) {
  const uint64_t words = bytes / sizeof(uint64_t);
  uint64_t seen = 0;
#pragma omp parallel for schedule(static) reduction(| : seen)
  for (uint64_t i = 0; i < words; ++i) {
    uint64_t word;
    memcpy(&word, source + i * sizeof word, sizeof word);
    seen |= word;
  }
  for (uint64_t i = words * sizeof(uint64_t); i < bytes; ++i) seen |= source[i];
  asm volatile("" ::"r"(seen));  // or the loads would go
}

void timer_begin(ph_device& device) { device.timer = std::chrono::steady_clock::now(); }
float timer_end(ph_device& device) {
  return std::chrono::duration<float, std::milli>(std::chrono::steady_clock::now() - device.timer).count();
}

void begin_capture(ph_device&) {
  throw Error(
      PH_ERROR_UNSUPPORTED,
      "Cannot capture work on the CPU, where it is done when a call returns: append and attend directly");
}
std::unique_ptr<Graph> end_capture(ph_device&) {
  throw Error(PH_ERROR_INTERNAL, "Cannot end a capture on the CPU, where none begins");
}
bool capturing(const ph_device&) { return false; }
void launch(ph_device&, Graph&) {
  throw Error(PH_ERROR_INTERNAL, "Cannot replay on the CPU, where nothing is captured");
}

}  // namespace ph
