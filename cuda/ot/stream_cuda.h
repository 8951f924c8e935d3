// The streaming form of problems that do not lie on chip, or are not to.
#pragma once

#include <algorithm>

#include "ot/stream.cuh"
#include "ot/workspace_cuda.h"

namespace ph::ot {

constexpr uint32_t kMostBlocks = 8;  // a multiprocessor

constexpr uint64_t kAlignment = 256;

inline uint64_t aligned(uint64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Takes pieces of the scratch memory.
class Pieces {
 public:
  explicit Pieces(uint8_t* memory) : memory_(memory) {}
  template <typename T>
  T* take(uint64_t count) {
    T* piece = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += aligned(count * sizeof(T));
    return piece;
  }
  uint64_t used() const { return used_; }

 private:
  uint8_t* memory_;
  uint64_t used_ = 0;
};

// How a problem's costs are computed.
inline Costs costs_of(const StreamCall& call) {
  if (call.cost != nullptr) return Costs::kMatrix;
  return call.cost_kind != PH_OT_EUCLIDEAN && call.dimension <= kHalfDimension ? Costs::kHalves
                                                                               : Costs::kDifferences;
}
template <typename Run>
void dispatch_costs(Costs costs, Run run) {
  if (costs == Costs::kHalves) run(std::integral_constant<Costs, Costs::kHalves>{});
  else if (costs == Costs::kDifferences) run(std::integral_constant<Costs, Costs::kDifferences>{});
  else run(std::integral_constant<Costs, Costs::kMatrix>{});
}

template <typename Kernel, typename... Parameters>
void start_stream(const ph_device& device, Kernel kernel, uint32_t blocks, uint32_t threads,
                  uint32_t shared_bytes, bool cooperative, const Parameters&... parameters) {
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(blocks);
  launch.blockDim = dim3(threads);
  launch.dynamicSmemBytes = shared_bytes;
  launch.stream = device.stream;
  launch.attrs = &together;
  launch.numAttrs = cooperative ? 1 : 0;
  PH_CUDA_TRY(cudaLaunchKernelEx(&launch, kernel, parameters...));
}

// Thread blocks of a cooperative launch: as many as are on the GPU at once.
template <typename Kernel>
uint32_t blocks_at_once(const ph_device& device, Kernel kernel) {
  allow_shared(device, kernel, SharedMemory::kPrefer);
  int each = 0;
  PH_CUDA_TRY(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kStreamThreads, sizeof(StreamShared)));
  return std::min<uint32_t>(static_cast<uint32_t>(std::max(each, 1)), kMostBlocks) *
         static_cast<uint32_t>(device.processors);
}

// One file for each kind of costs has these.
template <Costs kCosts>
void launch_stream_sinkhorn(const ph_device& device, const StreamCall& call) {
  const auto kernel = StreamSinkhornKernel<kCosts>;
  start_stream(device, kernel, blocks_at_once(device, kernel), kStreamThreads, sizeof(StreamShared), true,
               call);
}
template <Costs kCosts>
void launch_stream_plan(const ph_device& device, const StreamCall& call, bool transposed) {
  const auto kernel = StreamPlanKernel<kCosts>;
  allow_shared(device, kernel, SharedMemory::kPrefer);
  start_stream(device, kernel, 2 * static_cast<uint32_t>(device.processors), kStreamThreads,
               sizeof(StreamShared) + sizeof(StreamShared::Product), false, call, transposed);
}
extern template void launch_stream_sinkhorn<Costs::kHalves>(const ph_device&, const StreamCall&);
extern template void launch_stream_plan<Costs::kHalves>(const ph_device&, const StreamCall&, bool);
extern template void launch_stream_sinkhorn<Costs::kDifferences>(const ph_device&, const StreamCall&);
extern template void launch_stream_plan<Costs::kDifferences>(const ph_device&, const StreamCall&, bool);
extern template void launch_stream_sinkhorn<Costs::kMatrix>(const ph_device&, const StreamCall&);
extern template void launch_stream_plan<Costs::kMatrix>(const ph_device&, const StreamCall&, bool);

// Scratch memory of a problem.
uint64_t stream_scratch_bytes(const ph_device& device, uint32_t rows, uint32_t columns, uint32_t dimension);
// The part of a call that all have, of one problem.
StreamCall stream_call(const CudaWorkspace& workspace, const Problem& problem, const LargeProblem& large);
void stream_sinkhorn(const CudaWorkspace& workspace, const StreamCall& call);
// What precedes all that is computed from the potentials in call.rows.out and call.columns.out.
void prepare_potentials(const ph_device& device, const StreamCall& call);
// The plan of the potentials in call.rows.out and call.columns.out, into call.plan, or its product.
void stream_plan(const CudaWorkspace& workspace, const StreamCall& call, bool transposed);

}  // namespace ph::ot
