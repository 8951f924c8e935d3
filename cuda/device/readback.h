// Host memory that a device copies to while the host goes on.
#pragma once

#include <memory>

#include "device/device.h"

namespace ph {

// Destroying it waits for a copy that is on its way.
class Readback {
 public:
  virtual ~Readback() = default;
  virtual void enqueue(ph_device& device, const uint8_t* source, uint64_t bytes) = 0;
  // The memory, once the copy enqueued last is there.
  virtual const uint8_t* wait() = 0;
};

std::unique_ptr<Readback> make_readback(ph_device& device, uint64_t bytes);

}  // namespace ph

struct ph_readback {
  std::unique_ptr<ph::Readback> memory;
  uint64_t bytes;         // of the memory
  uint64_t enqueued = 0;  // of the copy enqueued last
};
