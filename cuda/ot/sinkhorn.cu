// Sinkhorn's iterations.
#include "ot/sinkhorn_cuda.h"
#include "ot/stream_cuda.h"

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
  for_buckets(workspace, call, [&](auto layout, const Bucket& bucket, const SinkhornCall& each) {
    launch_sinkhorn<decltype(layout)>(workspace.device, bucket, each);
  });
  for (const LargeProblem& large : workspace.large) {
    StreamCall one = stream_call(workspace, problem, large);
    one.limits = call.limits;
    one.limit = call.limit;
    one.warm_g = call.warm_g == nullptr ? nullptr : call.warm_g + large.column_offset;
    one.relaxation = call.relaxation;
    one.scaling = call.scaling;
    one.rows.out = call.f == nullptr ? nullptr : call.f + large.row_offset;
    one.columns.out = call.g == nullptr ? nullptr : call.g + large.column_offset;
    one.plan = call.plan == nullptr ? nullptr : call.plan + large.plan_offset;
    one.reports = call.reports;
    stream_sinkhorn(workspace, one);
  }
}

}  // namespace ph::ot
