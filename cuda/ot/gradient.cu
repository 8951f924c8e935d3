// Plans from potentials, their products, and gradients.
#include "common/error.h"
#include "ot/gradient_cuda.h"
#include "ot/stream_gradient_cuda.h"

namespace ph::ot {

namespace {

const float* in(const void* data) { return static_cast<const float*>(data); }
float* out(void* data) { return static_cast<float*>(data); }

PlanSource source_of(const Potentials& potentials) {
  return {in(potentials.f), in(potentials.g), in(potentials.plan), potentials.reports};
}

void run_plans(const CudaWorkspace& workspace, const Problem& problem, const PlanCall& call) {
  for_buckets(workspace, call, [&](auto layout, const Bucket& bucket, const PlanCall& each) {
    launch_plan<decltype(layout)>(workspace.device, bucket, each);
  });
  for (const LargeProblem& large : workspace.large) {
    StreamCall one = stream_call(workspace, problem, large);
    // Only read.
    one.rows.out = const_cast<float*>(call.source.f + large.row_offset);
    one.columns.out = const_cast<float*>(call.source.g + large.column_offset);
    one.solved = call.source.reports;
    one.plan = call.plan == nullptr ? nullptr : call.plan + large.plan_offset;
    one.kept = call.source.plan == nullptr ? nullptr : call.source.plan + large.plan_offset;
    const int64_t from = call.transposed ? large.row_offset : large.column_offset,
                  to = call.transposed ? large.column_offset : large.row_offset;
    one.matrix = call.matrix == nullptr ? nullptr : call.matrix + from * call.width;
    one.product = call.out == nullptr ? nullptr : call.out + to * call.width;
    one.width = call.width;
    one.normalised = call.normalised;
    stream_plan(workspace, one, call.transposed);
  }
}

}  // namespace

void write_plan(ph_device&, Workspace& base, const Problem& problem, const Potentials& potentials,
                void* plan) {
  const CudaWorkspace& workspace = static_cast<CudaWorkspace&>(base);
  PlanCall call = {};
  call.batch = batch_of(workspace, problem);
  call.source = source_of(potentials);
  call.source.plan = nullptr;
  call.plan = out(plan);
  run_plans(workspace, problem, call);
}

void plan_product(ph_device&, Workspace& base, const Problem& problem, const Potentials& potentials,
                  const PlanProduct& product) {
  const CudaWorkspace& workspace = static_cast<CudaWorkspace&>(base);
  PlanCall call = {};
  call.batch = batch_of(workspace, problem);
  call.source = source_of(potentials);
  call.matrix = in(product.matrix);
  call.out = out(product.out);
  call.width = product.width;
  call.transposed = product.transposed;
  call.normalised = product.normalised;
  run_plans(workspace, problem, call);
}

void backward(ph_device&, Workspace& base, const Problem& problem, const Potentials& potentials,
              const Iterations&, const Backward& gradient) {
  const CudaWorkspace& workspace = static_cast<CudaWorkspace&>(base);
  if (gradient.mode == PH_OT_UNROLLED) {
    throw Error(PH_ERROR_UNSUPPORTED,
                "Cannot differentiate the iterations themselves on CUDA: take the implicit gradient, or a "
                "CPU device");
  }
  BackwardCall call = {};
  call.batch = batch_of(workspace, problem);
  call.mode = gradient.mode;
  call.f = in(potentials.f);
  call.g = in(potentials.g);
  call.plan = in(potentials.plan);
  call.reports = potentials.reports;
  call.d_plan = in(gradient.d_plan);
  call.d_f = in(gradient.d_f);
  call.d_g = in(gradient.d_g);
  call.d_cost = in(gradient.d_cost);
  call.d_value = in(gradient.d_value);
  call.grad_cost = out(gradient.grad_cost);
  call.grad_x = out(gradient.grad_x);
  call.grad_y = out(gradient.grad_y);
  call.grad_a = out(gradient.grad_a);
  call.grad_b = out(gradient.grad_b);
  for_buckets(workspace, call, [&](auto layout, const Bucket& bucket, const BackwardCall& each) {
    launch_backward<decltype(layout)>(workspace.device, bucket, each);
  });
  for (const LargeProblem& large : workspace.large)
    stream_backward(workspace, problem, potentials, gradient, large);
}

}  // namespace ph::ot
