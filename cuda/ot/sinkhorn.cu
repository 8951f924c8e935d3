// Launches Sinkhorn's iterations.
#include <algorithm>

#include "ot/sinkhorn_tile.cuh"
#include "ot/workspace_cuda.h"

namespace ph::ot {

void sinkhorn(ph_device&, Workspace& base, const Problem& problem, const Iterations& iterations,
              const Solution& solution) {
  const CudaWorkspace& workspace = static_cast<CudaWorkspace&>(base);
  SinkhornCall call = {};
  call.batch = batch_of(workspace, problem);
  call.limits = iterations.limits;
  call.limit = iterations.limit;
  call.warm_g = static_cast<const float*>(iterations.warm_g);
  call.relaxation = static_cast<float>(iterations.relaxation);
  call.scaling = iterations.scaling;
  call.f = static_cast<float*>(solution.f);
  call.g = static_cast<float*>(solution.g);
  call.plan = static_cast<float*>(solution.plan);
  call.reports = solution.reports;
  launch_buckets(
      workspace, call, [](auto layout) { return SinkhornTileKernel<decltype(layout)>; },
      [](auto layout, uint32_t warps) {
        using L = decltype(layout);
        return std::max(staged_floats<L>(warps), entry_floats<L>(warps));
      });
}

}  // namespace ph::ot
