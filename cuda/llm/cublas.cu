// cuBLAS by its C interface, whose declarations are written out here; see cublas.h.
#include <dlfcn.h>
#include <library_types.h>

#include <cstdlib>
#include <vector>

#include "llm/cublas.h"

namespace ph {

namespace {

// Of cublas_api.h, the same in versions 12 and 13.
using Handle = void*;
constexpr int kSuccess = 0;
constexpr int kPlain = 0, kTransposed = 1;              // cublasOperation_t
constexpr int kComputeFloat = 68;                       // cublasComputeType_t, CUBLAS_COMPUTE_32F
constexpr int kDefaultAlgorithm = -1;                   // cublasGemmAlgo_t
constexpr int kNoReducedPrecisionReductions = 16;       // cublasMath_t, or-ed to CUBLAS_DEFAULT_MATH
constexpr uint64_t kWorkspaceBytes = 32 * 1024 * 1024;  // what NVIDIA advises for sm_90; others take less

struct Library {
  std::string file;
  int (*create)(Handle*) = nullptr;
  int (*destroy)(Handle) = nullptr;
  int (*set_stream)(Handle, cudaStream_t) = nullptr;
  int (*set_workspace)(Handle, void*, size_t) = nullptr;
  int (*set_math_mode)(Handle, int) = nullptr;
  int (*get_version)(Handle, int*) = nullptr;
  int (*gemm)(Handle, int transpose_a, int transpose_b, int m, int n, int k, const void* alpha, const void* a,
              cudaDataType a_type, int a_stride, const void* b, cudaDataType b_type, int b_stride,
              const void* beta, void* c, cudaDataType c_type, int c_stride, int compute,
              int algorithm) = nullptr;
};

template <typename Function>
void find(void* library, const std::string& file, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function != nullptr) return;
  throw Error(PH_ERROR_UNSUPPORTED, "Cannot multiply matrices: %s has no %s; Packhorse needs cuBLAS 12 or 13",
              file.c_str(), name);
}

Library open_library() {
  std::vector<std::string> files = {"libcublas.so.13", "libcublas.so.12",
                                    "/usr/local/cuda/lib64/libcublas.so.13",
                                    "/usr/local/cuda/lib64/libcublas.so.12"};
  const char* named = getenv("PACKHORSE_CUBLAS");
  if (named != nullptr && *named != 0) files = {named};
  std::string failure;
  for (const std::string& file : files) {
    void* const opened = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);  // for the process
    if (opened == nullptr) {
      if (failure.empty()) failure = dlerror();
      continue;
    }
    Library library;
    library.file = file;
    find(opened, file, "cublasCreate_v2", library.create);
    find(opened, file, "cublasDestroy_v2", library.destroy);
    find(opened, file, "cublasSetStream_v2", library.set_stream);
    find(opened, file, "cublasSetWorkspace_v2", library.set_workspace);
    find(opened, file, "cublasSetMathMode", library.set_math_mode);
    find(opened, file, "cublasGetVersion_v2", library.get_version);
    find(opened, file, "cublasGemmEx", library.gemm);
    return library;
  }
  throw Error(PH_ERROR_UNSUPPORTED,
              "Cannot multiply matrices of more than 8 rows: cuBLAS does not open (%s). Install libcublas of "
              "CUDA 12 or 13, or set PACKHORSE_CUBLAS to the path of its libcublas.so",
              failure.c_str());
}

// An attempt that fails is made again at the next call.
const Library& library() {
  static const Library opened = open_library();
  return opened;
}

void blas_check(int status, const char* what) {
  if (status == kSuccess) return;
  constexpr int kAllocationFailed = 3;
  throw Error(status == kAllocationFailed ? PH_ERROR_OUT_OF_MEMORY : PH_ERROR_CUDA,
              "cuBLAS failed with status %d in %s", status, what);
}

cudaDataType data_type(uint32_t dtype) {
  return dtype == PH_F32 ? CUDA_R_32F : (dtype == PH_F16 ? CUDA_R_16F : CUDA_R_16BF);
}

int checked_size(uint32_t size, const char* what) {
  if (size <= INT32_MAX) return static_cast<int>(size);
  throw Error(PH_ERROR_UNSUPPORTED, "Cannot multiply matrices with %u %s: cuBLAS takes up to %d", size, what,
              INT32_MAX);
}

}  // namespace

Blas::Blas(ph_device& device) : device_(device) {
  const Library& blas = library();
  blas_check(blas.create(&handle_), "cublasCreate");
  try {
    // The workspace last: setting the stream would put cuBLAS's own in its place, which a capture cannot allocate.
    blas_check(blas.set_stream(handle_, device.stream), "cublasSetStream");
    workspace_ = allocate(device, kWorkspaceBytes);
    blas_check(blas.set_workspace(handle_, workspace_, kWorkspaceBytes), "cublasSetWorkspace");
    blas_check(blas.set_math_mode(handle_, kNoReducedPrecisionReductions), "cublasSetMathMode");
    int version = 0;
    blas_check(blas.get_version(handle_, &version), "cublasGetVersion");
    name_ = "cuBLAS " + std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
            std::to_string(version % 100) + " (" + blas.file + ")";
  } catch (...) {
    blas.destroy(handle_);
    if (workspace_ != nullptr) release(device, workspace_);
    throw;
  }
}

Blas::~Blas() {
  library().destroy(handle_);
  // Errors are the device's, whose closing reports them.
  cudaFreeAsync(workspace_, device_.stream);
}

void Blas::multiply(const llm::Linear& call) {
  const int rows = checked_size(call.rows, "rows"), in = checked_size(call.in_features, "input features"),
            outs = checked_size(call.out_features, "output features");
  const float one = 1.0f, added = call.accumulate ? 1.0f : 0.0f;
  const cudaDataType type = data_type(call.weight.dtype);
  const std::lock_guard<std::mutex> lock(device_.blas_mutex);
  // Column-major, as cuBLAS sees them: out [outs, rows] = transposed weight [in, outs] . x [in, rows].
  blas_check(library().gemm(handle_, kTransposed, kPlain, outs, rows, in, &one, call.weight.data, type, in,
                            call.x.data, type, in, &added, call.out.data, data_type(call.out.dtype), outs,
                            kComputeFloat, kDefaultAlgorithm),
             "cublasGemmEx");
}

Blas& blas_of(ph_device& device) {
  const std::lock_guard<std::mutex> lock(device.blas_mutex);
  if (device.blas == nullptr) {
    if (capturing(device)) {
      throw Error(PH_ERROR_UNSUPPORTED,
                  "Cannot load cuBLAS while work is captured: multiply matrices, or prepare to, before");
    }
    device.blas = std::make_shared<Blas>(device);
  }
  return *device.blas;
}

}  // namespace ph
