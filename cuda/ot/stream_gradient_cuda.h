// Gradients of problems that do not lie on chip, or are not to.
#pragma once

#include "ot/stream_cuda.h"
#include "ot/stream_gradient.cuh"

namespace ph::ot {

// One file for each kind of costs has this.
template <Costs kCosts>
void launch_stream_gradient(const ph_device& device, const GradientCall& call) {
  const auto system = StreamSystemKernel<kCosts>;
  start_stream(device, system, blocks_at_once(device, system), kStreamThreads, sizeof(StreamShared), true,
               call);
  const uint32_t blocks = 2 * static_cast<uint32_t>(device.processors);
  if (call.grad_cost != nullptr) {
    const auto kernel = StreamCostGradientKernel<kCosts>;
    allow_shared(device, kernel, SharedMemory::kPrefer);
    start_stream(device, kernel, blocks, kStreamThreads, sizeof(StreamShared), false, call);
  }
  for (const bool transposed : {false, true}) {
    if ((transposed ? call.columns : call.rows).grad_points == nullptr) continue;
    const auto kernel = StreamPointGradientKernel<kCosts>;
    allow_shared(device, kernel, SharedMemory::kPrefer);
    start_stream(device, kernel, blocks, kStreamThreads, sizeof(StreamShared) + sizeof(StreamShared::Product),
                 false, call, transposed);
  }
}
extern template void launch_stream_gradient<Costs::kHalves>(const ph_device&, const GradientCall&);
extern template void launch_stream_gradient<Costs::kDifferences>(const ph_device&, const GradientCall&);
extern template void launch_stream_gradient<Costs::kMatrix>(const ph_device&, const GradientCall&);

// Scratch memory of a problem's gradients, beside that of the problem.
uint64_t stream_gradient_scratch_bytes(uint32_t rows, uint32_t columns);
// Gradients of a problem, of what `gradient` gives of the whole batch.
void stream_backward(const CudaWorkspace& workspace, const Problem& problem, const Potentials& potentials,
                     const Backward& gradient, const LargeProblem& large);

}  // namespace ph::ot
