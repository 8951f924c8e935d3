// cuBLAS, opened at run time: Packhorse needs neither its headers nor the library unless it multiplies many rows.
#pragma once

#include <memory>
#include <string>

#include "device/device_cuda.h"
#include "llm/operations.h"

namespace ph {

// cuBLAS on a device's stream, with scratch memory of its own: its calls may be captured.
class Blas {
 public:
  // Opens the library, unless it is open. Throws PH_ERROR_UNSUPPORTED where there is none, saying what to install.
  explicit Blas(ph_device& device);
  ~Blas();
  Blas(const Blas&) = delete;
  Blas& operator=(const Blas&) = delete;

  // out += x . transposed weight if the call accumulates, else =; without its bias. x has the weight's dtype, out is f32 or
  // has it too.
  void multiply(const llm::Linear& call);
  const std::string& name() const { return name_; }

 private:
  ph_device& device_;
  void* handle_ = nullptr;
  uint8_t* workspace_ = nullptr;
  std::string name_;
};

// The device's, made at the first call. Throws as its constructor, and PH_ERROR_UNSUPPORTED if that call is captured.
Blas& blas_of(ph_device& device);

}  // namespace ph
