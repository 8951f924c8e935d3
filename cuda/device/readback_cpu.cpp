// Readbacks of the CPU: a copy is done when it is enqueued.
#include <vector>

#include "device/readback.h"

namespace ph {

namespace {

struct CpuReadback : Readback {
  explicit CpuReadback(uint64_t bytes) : memory(bytes) {}
  void enqueue(ph_device& device, const uint8_t* source, uint64_t bytes) override {
    download(device, memory.data(), source, bytes);
  }
  const uint8_t* wait() override { return memory.data(); }

  std::vector<uint8_t> memory;
};

}  // namespace

std::unique_ptr<Readback> make_readback(ph_device&, uint64_t bytes) {
  return std::make_unique<CpuReadback>(bytes);
}

}  // namespace ph
