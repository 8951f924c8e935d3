// Proximal points.
#include "common/error.h"
#include "ot/proximal_cuda.h"

namespace ph::ot {

void proximal(ph_device&, Workspace& base, const Problem& problem, const Iterations& iterations,
              uint32_t inner, const Solution& solution) {
  const CudaWorkspace& workspace = static_cast<CudaWorkspace&>(base);
  require_on_chip(workspace, "take proximal points of");
  ProximalCall call = {};
  call.batch = batch_of(workspace, problem);
  call.limits = iterations.limits;
  call.limit = iterations.limit;
  call.f = static_cast<float*>(solution.f);
  call.g = static_cast<float*>(solution.g);
  call.plan = static_cast<float*>(solution.plan);
  call.reports = solution.reports;
  call.inner = inner;
  for_buckets(workspace, call, [&](auto layout, const Bucket& bucket, const ProximalCall& each) {
    launch_proximal<decltype(layout)>(workspace.device, bucket, each);
  });
}

}  // namespace ph::ot
