// extern "C": devices and buffers.
#include <cstring>

#include "abi/arguments.h"
#include "device/readback.h"

using ph::checked;
using ph::checked_for_capture;
using ph::checked_range;
using ph::guard;

namespace {

ph_readback& checked_readback(ph_readback* readback) {
  if (readback == nullptr) throw ph::Error(PH_ERROR_INVALID_ARGUMENT, "The readback is null");
  return *readback;
}

}  // namespace

extern "C" {

uint32_t ph_device_count(void) { return ph::device_count(); }

ph_device* ph_device_open(uint32_t ordinal, int32_t* status, char* error, uint32_t error_bytes) {
  ph_device* device = nullptr;
  *status = guard(error, error_bytes, [&] { device = ph::open_device(ordinal); });
  return device;
}

ph_device* ph_device_open_on_stream(uint32_t ordinal, uint64_t stream, int32_t* status, char* error,
                                    uint32_t error_bytes) {
  ph_device* device = nullptr;
  *status = guard(error, error_bytes, [&] { device = ph::open_device_on_stream(ordinal, stream); });
  return device;
}

int32_t ph_device_stream(ph_device* device, uint64_t* stream, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] { *stream = ph::stream_handle(ph::present(device)); });
}

int32_t ph_device_close(ph_device* device, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] { ph::close_device(&ph::present(device)); });
}

int32_t ph_device_get_info(ph_device* device, ph_device_info* info, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] { ph::device_info(checked(device), *info); });
}

int32_t ph_device_synchronize(ph_device* device, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] { ph::synchronize(checked(device)); });
}

ph_buffer* ph_buffer_create(ph_device* device, uint64_t bytes, int32_t* status, char* error,
                            uint32_t error_bytes) {
  ph_buffer* buffer = nullptr;
  *status = guard(error, error_bytes, [&] {
    if (bytes == 0) throw ph::Error(PH_ERROR_INVALID_ARGUMENT, "Cannot create a buffer of 0 bytes");
    buffer = new ph_buffer{nullptr, bytes, true};
    try {
      buffer->data = ph::allocate(checked(device), bytes);
    } catch (...) {
      delete buffer;
      buffer = nullptr;
      throw;
    }
  });
  return buffer;
}

ph_buffer* ph_buffer_wrap(ph_device* device, uint64_t address, uint64_t bytes, int32_t* status, char* error,
                          uint32_t error_bytes) {
  ph_buffer* buffer = nullptr;
  *status = guard(error, error_bytes, [&] {
    const auto refuse = [&](const char* reason) {
      throw ph::Error(PH_ERROR_INVALID_ARGUMENT, "Cannot wrap %llu bytes at 0x%llx: %s",
                      static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(address),
                      reason);
    };
    if (address == 0) refuse("the address is null");
    if (address % 16 != 0) refuse("the address must be a multiple of 16");
    if (bytes == 0) refuse("there must be at least 1");
    if (bytes > UINT64_MAX - address) refuse("they end beyond the last address");
    ph::require_memory(checked_for_capture(device), address, bytes);
    buffer = new ph_buffer{reinterpret_cast<uint8_t*>(address), bytes, false};
  });
  return buffer;
}

int32_t ph_buffer_address(ph_device* device, const ph_buffer* buffer, uint64_t* address, char* error,
                          uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph::present(device);
    *address = reinterpret_cast<uint64_t>(checked_range(buffer, 0, 0, "its address"));
  });
}

int32_t ph_buffer_destroy(ph_device* device, ph_buffer* buffer, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    uint8_t* data = checked_range(buffer, 0, 0, "destroy");
    if (buffer->owned) ph::release(checked_for_capture(device), data);
    delete buffer;
  });
}

int32_t ph_buffer_upload(ph_device* device, ph_buffer* buffer, uint64_t offset, const void* source,
                         uint64_t bytes, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph::upload(checked(device), checked_range(buffer, offset, bytes, "an upload"), source, bytes);
  });
}

int32_t ph_buffer_download(ph_device* device, const ph_buffer* buffer, uint64_t offset, void* target,
                           uint64_t bytes, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph::download(checked(device), target, checked_range(buffer, offset, bytes, "a download"), bytes);
  });
}

ph_readback* ph_readback_create(ph_device* device, uint64_t bytes, int32_t* status, char* error,
                                uint32_t error_bytes) {
  ph_readback* readback = nullptr;
  *status = guard(error, error_bytes, [&] {
    if (bytes == 0) throw ph::Error(PH_ERROR_INVALID_ARGUMENT, "Cannot create a readback of 0 bytes");
    readback = new ph_readback{ph::make_readback(checked(device), bytes), bytes};
  });
  return readback;
}

int32_t ph_readback_destroy(ph_device* device, ph_readback* readback, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    checked_for_capture(device);
    delete &checked_readback(readback);
  });
}

int32_t ph_readback_enqueue(ph_device* device, ph_readback* readback, const ph_buffer* buffer,
                            uint64_t offset, uint64_t bytes, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph_readback& valid = checked_readback(readback);
    if (bytes == 0 || bytes > valid.bytes) {
      throw ph::Error(PH_ERROR_INVALID_ARGUMENT,
                      "Cannot read back %llu bytes: it was created for up to %llu, and takes at least 1",
                      static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(valid.bytes));
    }
    const uint8_t* source = checked_range(buffer, offset, bytes, "reading back");
    valid.memory->enqueue(checked(device), source, bytes);
    valid.enqueued = bytes;
  });
}

int32_t ph_readback_wait(ph_device* device, ph_readback* readback, void* target, uint64_t bytes, char* error,
                         uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    const ph_readback& valid = checked_readback(readback);
    if (bytes > valid.enqueued) {
      throw ph::Error(PH_ERROR_INVALID_ARGUMENT, "Cannot read back %llu bytes: %llu were enqueued",
                      static_cast<unsigned long long>(bytes),
                      static_cast<unsigned long long>(valid.enqueued));
    }
    checked(device);
    memcpy(target, valid.memory->wait(), bytes);
  });
}

int32_t ph_buffer_copy(ph_device* device, ph_buffer* target, uint64_t target_offset, const ph_buffer* source,
                       uint64_t source_offset, uint64_t bytes, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    uint8_t* to = checked_range(target, target_offset, bytes, "the target of a copy");
    const uint8_t* from = checked_range(source, source_offset, bytes, "the source of a copy");
    if (to < from + bytes && from < to + bytes)
      throw ph::Error(PH_ERROR_INVALID_ARGUMENT, "Cannot copy between overlapping ranges of memory");
    ph::copy(checked_for_capture(device), to, from, bytes);
  });
}

int32_t ph_buffer_fill(ph_device* device, ph_buffer* buffer, uint64_t offset, uint32_t value, uint64_t bytes,
                       char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    if (value > 255)
      throw ph::Error(PH_ERROR_INVALID_ARGUMENT, "Cannot fill with %u: a byte is 0 to 255", value);
    ph::fill(checked_for_capture(device), checked_range(buffer, offset, bytes, "a fill"),
             static_cast<uint8_t>(value), bytes);
  });
}

int32_t ph_buffer_read(ph_device* device, const ph_buffer* buffer, uint64_t offset, uint64_t bytes,
                       char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    const uint8_t* source = checked_range(buffer, offset, bytes, "a read");
    if (offset % 16 != 0)
      throw ph::Error(PH_ERROR_INVALID_ARGUMENT, "Cannot read from byte %llu: it must be a multiple of 16",
                      static_cast<unsigned long long>(offset));
    ph::read(checked(device), source, bytes);
  });
}

int32_t ph_device_timer_begin(ph_device* device, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] { ph::timer_begin(checked(device)); });
}

int32_t ph_device_timer_end(ph_device* device, float* milliseconds, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] { *milliseconds = ph::timer_end(checked(device)); });
}

}  // extern "C"
