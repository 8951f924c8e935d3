// The one exception type of the native code, and its translation at the ABI.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <exception>
#include <new>

#include "packhorse.h"

namespace ph {

class Error : public std::exception {
 public:
  __attribute__((format(printf, 3, 4))) Error(int32_t status, const char* format, ...) : status_(status) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message_, sizeof message_, format, arguments);
    va_end(arguments);
  }
  int32_t status() const { return status_; }
  const char* what() const noexcept override { return message_; }

 private:
  int32_t status_;
  char message_[512];
};

inline void write_message(char* error, uint32_t error_bytes, const char* message) {
  if (error != nullptr && error_bytes > 0) snprintf(error, error_bytes, "%s", message);
}

// Runs `body` and turns what it throws into a status and a message.
template <typename Body>
int32_t guard(char* error, uint32_t error_bytes, Body body) noexcept {
  try {
    body();
    return PH_OK;
  } catch (const Error& caught) {
    write_message(error, error_bytes, caught.what());
    return caught.status();
  } catch (const std::bad_alloc&) {
    write_message(error, error_bytes, "Out of host memory");
    return PH_ERROR_OUT_OF_MEMORY;
  } catch (const std::exception& caught) {
    write_message(error, error_bytes, caught.what());
    return PH_ERROR_INTERNAL;
  }
}

}  // namespace ph
