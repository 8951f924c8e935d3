// The streaming form of problems that do not lie on chip, or are not to.
#pragma once

#include <algorithm>

#include "ot/stream.cuh"
#include "ot/workspace_cuda.h"

namespace ph::ot {

constexpr uint32_t kMostBlocks = 8;  // a multiprocessor

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

// One file for each kind of costs has these.
template <Costs kCosts>
void launch_stream_sinkhorn(const ph_device& device, const StreamCall& call) {
  const auto kernel = StreamSinkhornKernel<kCosts>;
  allow_shared(device, kernel, SharedMemory::kPrefer);
  int each = 0;
  PH_CUDA_TRY(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kStreamThreads, sizeof(StreamShared)));
  const uint32_t blocks = std::min<uint32_t>(static_cast<uint32_t>(std::max(each, 1)), kMostBlocks) *
                          static_cast<uint32_t>(device.processors);
  start_stream(device, kernel, blocks, kStreamThreads, sizeof(StreamShared), true, call);
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
// The plan of the potentials in call.rows.out and call.columns.out, into call.plan, or its product.
void stream_plan(const CudaWorkspace& workspace, const StreamCall& call, bool transposed);

}  // namespace ph::ot
