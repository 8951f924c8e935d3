// What each backend implements under the device part of the C ABI.
#pragma once

#include <memory>

#include "packhorse.h"

// A region of device memory; foreign memory is not `owned`.
struct ph_buffer {
  uint8_t* data;
  uint64_t bytes;
  bool owned;
};

namespace ph {

uint32_t device_count();
ph_device* open_device(uint32_t ordinal);
// A device whose work goes to the caller's stream, which closing leaves open.
ph_device* open_device_on_stream(uint32_t ordinal, uint64_t stream);
// The device's stream, 0 where there is none.
uint64_t stream_handle(const ph_device& device);
// Frees the device even if it cannot be entered any more, or waiting for its work fails; throws then.
void close_device(ph_device* device);
void device_info(ph_device& device, ph_device_info& info);

// Makes the device current for the calling thread; every exported function but the one that closes starts with it.
void enter(ph_device& device);
void synchronize(ph_device& device);

// Throws unless these bytes, at least 1, may be memory of the device.
void require_memory(const ph_device& device, uint64_t address, uint64_t bytes);

uint8_t* allocate(ph_device& device, uint64_t bytes);
void release(ph_device& device, uint8_t* data);

// Copies in stream order; upload and download wait until the host memory is free or filled.
void upload(ph_device& device, uint8_t* target, const void* source, uint64_t bytes);
void download(ph_device& device, void* target, const uint8_t* source, uint64_t bytes);
// Copies host memory in stream order without waiting for the stream; `source` may be reused when it returns.
void enqueue_upload(ph_device& device, uint8_t* target, const void* source, uint64_t bytes);
void copy(ph_device& device, uint8_t* target, const uint8_t* source, uint64_t bytes);
void fill(ph_device& device, uint8_t* target, uint8_t value, uint64_t bytes);
// Reads bytes, from a multiple of 16 on, and does nothing with them.
void read(ph_device& device, const uint8_t* source, uint64_t bytes);

void timer_begin(ph_device& device);
float timer_end(ph_device& device);

// Captured work, which can run again and again. It may be destroyed while it runs.
class Graph {
 public:
  virtual ~Graph() = default;
};

// From begin to end, work is captured instead of run; what waits, allocates, or comes from host memory must not be called.
void begin_capture(ph_device& device);
// Whatever it throws, the device runs its work again afterwards.
std::unique_ptr<Graph> end_capture(ph_device& device);
bool capturing(const ph_device& device);
void launch(ph_device& device, Graph& graph);

}  // namespace ph
