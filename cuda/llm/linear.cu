// Products of rows with a weight's rows on the GPU.
//
// Up to 8 rows: MultiplyKernel, which reads the weight once, 16 bytes a lane and 512 a warp at a time, and is bound by
// that. A warp keeps the sums of kOuts outputs of every row in registers: a lane those of 8 features in 256, one after
// another. Where outputs are few, 2 or 4 warps share the features. x comes from the caches. Lanes are added pairwise, then
// warps one after another: a sum depends on nothing but its operands and the weight's shape, not on the number of rows.
// Features that are not whole vectors of 8 are read one by one.
//
// More rows: cuBLAS, in float32 sums, after BiasKernel has put the bias where they are added to.
#include <type_traits>

#include "llm/cublas.h"
#include "llm/elements.cuh"

namespace ph::llm {

namespace {

constexpr uint32_t kWarps = 4;  // of a thread block
constexpr uint32_t kThreads = kWarps * kWarp;
constexpr uint32_t kMostRows = 8;

struct F32 {
  static constexpr uint32_t kDType = PH_F32;
};
struct F16 {
  static constexpr uint32_t kDType = PH_F16;
};
struct BF16 {
  static constexpr uint32_t kDType = PH_BF16;
};

// 8 elements from a multiple of 8 on. Those that are read once are not kept in the caches.
template <typename Element, bool Once>
__device__ __forceinline__ void load_eight(const uint8_t* data, uint64_t index, float (&values)[8]) {
  const auto read = [](const uint4* source) { return Once ? __ldcs(source) : *source; };
  if constexpr (std::is_same_v<Element, F32>) {
    const uint4* source = reinterpret_cast<const uint4*>(data + index * 4);
    const uint4 low = read(source), high = read(source + 1);
    const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = __uint_as_float(words[i]);
  } else {
    const uint4 eight = read(reinterpret_cast<const uint4*>(data + index * 2));
    const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack_pair(Element::kDType, pairs[i]);
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
}

// Rows >= call.rows, of which those beyond are the last one again. `sharing` warps of a block share outputs.
template <typename X, typename W, uint32_t Rows, bool Whole>
__global__ void __launch_bounds__(kThreads) MultiplyKernel(Linear call, uint32_t sharing) {
  constexpr uint32_t kOuts = Rows <= 2 ? 2 : 4;
  constexpr uint32_t kSums = Rows * kOuts;
  const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t groups = kWarps / sharing;  // of outputs, in a block
  const uint64_t first_out = (static_cast<uint64_t>(blockIdx.x) * groups + warp / sharing) * kOuts;
  const uint64_t features = call.in_features;
  const Source x = {call.x.data, X::kDType}, weight = {call.weight.data, W::kDType};
  uint64_t weight_rows[kOuts], x_rows[Rows];  // elements before them
#pragma unroll
  for (uint32_t out = 0; out < kOuts; ++out) {
    const uint64_t last = call.out_features - 1, at = first_out + out;
    weight_rows[out] = (at < last ? at : last) * features;
  }
#pragma unroll
  for (uint32_t row = 0; row < Rows; ++row) x_rows[row] = (row < call.rows ? row : call.rows - 1) * features;

  float sums[Rows][kOuts] = {};
  constexpr uint32_t kStep = Whole ? 8 : 1;
  const uint64_t stride = static_cast<uint64_t>(sharing) * kWarp * kStep;
#pragma unroll(Rows <= 2 ? 2 : 1)
  for (uint64_t feature = (warp % sharing * kWarp + lane) * kStep; feature < features; feature += stride) {
    if constexpr (Whole) {
      float weights[kOuts][8];
#pragma unroll
      for (uint32_t out = 0; out < kOuts; ++out)
        load_eight<W, true>(weight.data, weight_rows[out] + feature, weights[out]);
#pragma unroll
      for (uint32_t row = 0; row < Rows; ++row) {
        float values[8];
        load_eight<X, false>(x.data, x_rows[row] + feature, values);
#pragma unroll
        for (uint32_t out = 0; out < kOuts; ++out) {
#pragma unroll
          for (int i = 0; i < 8; ++i) sums[row][out] = __fmaf_rn(values[i], weights[out][i], sums[row][out]);
        }
      }
    } else {
#pragma unroll
      for (uint32_t out = 0; out < kOuts; ++out) {
        const float value = load<1>(weight, weight_rows[out] + feature).at[0];
#pragma unroll
        for (uint32_t row = 0; row < Rows; ++row) {
          sums[row][out] = __fmaf_rn(load<1>(x, x_rows[row] + feature).at[0], value, sums[row][out]);
        }
      }
    }
  }

  __shared__ float partials[kWarps][kSums];
#pragma unroll
  for (uint32_t i = 0; i < kSums; ++i) {
    float sum = sums[i / kOuts][i % kOuts];
#pragma unroll
    for (uint32_t distance = kWarp / 2; distance > 0; distance /= 2)
      sum += __shfl_xor_sync(kAllLanes, sum, distance);
    if (lane == 0) partials[warp][i] = sum;
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < groups * kSums; i += kThreads) {
    const uint32_t group = i / kSums, row = i % kSums / kOuts;
    const uint64_t out = (static_cast<uint64_t>(blockIdx.x) * groups + group) * kOuts + i % kOuts;
    if (row >= call.rows || out >= call.out_features) continue;
    Values<1> total = {{0.0f}};
    for (uint32_t share = 0; share < sharing; ++share)
      total.at[0] += partials[group * sharing + share][i % kSums];
    if (call.bias.data != nullptr) total.at[0] += load<1>(call.bias, out).at[0];
    const uint64_t place = row * static_cast<uint64_t>(call.out_features) + out;
    if (call.accumulate) total.at[0] += load<1>(as_source(call.out), place).at[0];
    store(call.out, place, total);
  }
}

constexpr uint32_t kBiasThreads = 256;

// Writes the bias to every row of out, or adds it.
__global__ void __launch_bounds__(kBiasThreads) BiasKernel(Linear call) {
  const uint64_t count = static_cast<uint64_t>(call.rows) * call.out_features;
  const uint64_t threads = static_cast<uint64_t>(gridDim.x) * kBiasThreads;
  for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * kBiasThreads + threadIdx.x; i < count; i += threads) {
    Values<1> value = load<1>(call.bias, i % call.out_features);
    if (call.accumulate) value.at[0] += load<1>(as_source(call.out), i).at[0];
    store(call.out, i, value);
  }
}

// How many warps share the features: enough to fill a GPU, each with two vectors a lane at least. By the weight's shape
// alone.
uint32_t sharing_warps(uint32_t in_features, uint32_t out_features, uint32_t outs) {
  constexpr uint32_t kEnoughWarps = 4096;
  uint32_t sharing = 1;
  while (sharing < kWarps && out_features / outs * sharing < kEnoughWarps &&
         in_features >= 2 * 2 * sharing * kWarp * 8)
    sharing *= 2;
  return sharing;
}

template <typename X, typename W, uint32_t Rows, bool Whole>
void multiply(ph_device& device, const Linear& call) {
  constexpr uint32_t kOuts = Rows <= 2 ? 2 : 4;
  // As if kOuts were 2, so that it does not depend on the rows.
  const uint32_t sharing = sharing_warps(call.in_features, call.out_features, 2);
  const uint32_t outs = kWarps / sharing * kOuts;  // of a block
  MultiplyKernel<X, W, Rows, Whole>
      <<<(call.out_features - 1) / outs + 1, kThreads, 0, device.stream>>>(call, sharing);
  PH_CUDA_TRY(cudaGetLastError());
}

template <typename X, typename W>
void multiply_few(ph_device& device, const Linear& call) {
  if (call.in_features % 8 != 0) return multiply<X, W, kMostRows, false>(device, call);
  if (call.rows == 1) return multiply<X, W, 1, true>(device, call);
  if (call.rows == 2) return multiply<X, W, 2, true>(device, call);
  if (call.rows <= 4) return multiply<X, W, 4, true>(device, call);
  multiply<X, W, kMostRows, true>(device, call);
}

const char* name_of(uint32_t dtype) { return dtype == PH_F32 ? "f32" : (dtype == PH_F16 ? "f16" : "bf16"); }

}  // namespace

void linear(ph_device& device, const Linear& call) {
  const uint32_t x = call.x.dtype, weight = call.weight.dtype, out = call.out.dtype;
  if (call.rows <= kMostRows) {
    if (x == PH_F32 && weight == PH_F32) return multiply_few<F32, F32>(device, call);
    if (x == PH_F32 && weight == PH_F16) return multiply_few<F32, F16>(device, call);
    if (x == PH_F32 && weight == PH_BF16) return multiply_few<F32, BF16>(device, call);
    if (x == PH_F16 && weight == PH_F16) return multiply_few<F16, F16>(device, call);
    if (x == PH_BF16 && weight == PH_BF16) return multiply_few<BF16, BF16>(device, call);
  }
  if (x != weight) {
    throw Error(PH_ERROR_UNSUPPORTED,
                "Cannot multiply %u rows of %s with a weight of %s on a GPU: cast them to the weight's type",
                call.rows, name_of(x), name_of(weight));
  }
  if (out != PH_F32 && out != x) {
    throw Error(PH_ERROR_UNSUPPORTED, "Cannot multiply %u rows of %s to %s on a GPU: take f32 or %s",
                call.rows, name_of(x), name_of(out), name_of(x));
  }
  Blas& blas = blas_of(device);
  Linear product = call;
  if (call.bias.data != nullptr) {
    const uint64_t count = static_cast<uint64_t>(call.rows) * call.out_features;
    BiasKernel<<<grid_for(count, kBiasThreads), kBiasThreads, 0, device.stream>>>(call);
    PH_CUDA_TRY(cudaGetLastError());
    product.accumulate = true;
  }
  blas.multiply(product);
}

void prepare_linear(ph_device& device, char* name, uint32_t name_bytes) {
  snprintf(name, name_bytes, "%s", blas_of(device).name().c_str());
}

}  // namespace ph::llm
