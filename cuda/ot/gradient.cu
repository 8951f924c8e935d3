// Plans from potentials, their products, and gradients.
#include "common/error.h"
#include "ot/gradient_cuda.h"

namespace ph::ot {

namespace {

const float* in(const void* data) { return static_cast<const float*>(data); }
float* out(void* data) { return static_cast<float*>(data); }

PlanSource source_of(const Potentials& potentials) {
  return {in(potentials.f), in(potentials.g), in(potentials.plan), potentials.reports};
}

void run_plans(const CudaWorkspace& workspace, const PlanCall& call) {
  for_buckets(workspace, call, [&](auto layout, const Bucket& bucket, const PlanCall& each) {
    launch_plan<decltype(layout)>(workspace.device, bucket, each);
  });
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
  run_plans(workspace, call);
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
  run_plans(workspace, call);
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
}

}  // namespace ph::ot
