// Checks that exported functions share.
#pragma once

#include "common/error.h"
#include "device/device.h"

namespace ph {

inline ph_device& present(ph_device* device) {
  if (device == nullptr) throw Error(PH_ERROR_INVALID_ARGUMENT, "The device is null");
  return *device;
}

// For the functions that may be called while work is captured.
inline ph_device& checked_for_capture(ph_device* device) {
  enter(present(device));
  return *device;
}

// For all others: what waits for a stream, allocates, or tells the host's state would spoil a capture.
inline ph_device& checked(ph_device* device) {
  if (capturing(checked_for_capture(device))) {
    throw Error(
        PH_ERROR_INVALID_ARGUMENT,
        "Cannot do this while work on the device is captured: only append, attend, prefill, operations of "
        "language models and graphs, and copies and fills of buffers are possible until the capture ends");
  }
  return *device;
}

// The bytes [offset, offset + bytes) of a buffer.
inline uint8_t* checked_range(const ph_buffer* buffer, uint64_t offset, uint64_t bytes, const char* what) {
  if (buffer == nullptr) throw Error(PH_ERROR_INVALID_ARGUMENT, "The buffer for %s is null", what);
  if (offset > buffer->bytes || bytes > buffer->bytes - offset) {
    throw Error(PH_ERROR_INVALID_ARGUMENT,
                "The buffer for %s is too small: it holds %llu bytes, but %llu from byte %llu on are needed",
                what, static_cast<unsigned long long>(buffer->bytes), static_cast<unsigned long long>(bytes),
                static_cast<unsigned long long>(offset));
  }
  return buffer->data + offset;
}

// The same for a tensor, which must be aligned for 16-byte accesses.
inline uint8_t* checked_tensor(const ph_buffer* buffer, uint64_t offset, uint64_t bytes, const char* what) {
  if (offset % 16 != 0) {
    throw Error(PH_ERROR_INVALID_ARGUMENT, "The offset of %s must be a multiple of 16: current value is %llu",
                what, static_cast<unsigned long long>(offset));
  }
  return checked_range(buffer, offset, bytes, what);
}

}  // namespace ph
