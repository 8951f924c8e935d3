// Launches of gradients of problems in streaming form, one after another.
#include "ot/stream_gradient_cuda.h"

namespace ph::ot {

namespace {

uint64_t lay_out(GradientCall& call, uint8_t* memory) {
  Pieces pieces(memory);
  for (const bool columns : {false, true}) {
    const uint32_t count = (columns ? call.stream.columns : call.stream.rows).count;
    const uint32_t padded = (count + kTileColumns - 1) / kTileColumns * kTileColumns;
    GradientSide& side = columns ? call.columns : call.rows;
    side.vector = pieces.take<float>(padded);
    side.solved = pieces.take<float>(padded);
    side.mass = pieces.take<double>(count);
    side.left = pieces.take<double>(count);
    side.product = pieces.take<double>(columns ? count : 0);
    side.correction = pieces.take<double>(columns ? count : 0);
  }
  return pieces.used();
}

}  // namespace

uint64_t stream_gradient_scratch_bytes(uint32_t rows, uint32_t columns) {
  GradientCall call = {};
  call.stream.rows.count = rows;
  call.stream.columns.count = columns;
  return lay_out(call, nullptr);
}

void stream_backward(const CudaWorkspace& workspace, const Problem& problem, const Potentials& potentials,
                     const Backward& gradient, const LargeProblem& large) {
  const auto in = [](const void* data, int64_t first) {
    return data == nullptr ? nullptr : static_cast<const float*>(data) + first;
  };
  const auto out = [](void* data, int64_t first) {
    return data == nullptr ? nullptr : static_cast<float*>(data) + first;
  };
  const int64_t dimension = workspace.options.dimension;
  GradientCall call = {};
  StreamCall& stream = call.stream;
  stream = stream_call(workspace, problem, large);
  lay_out(call, workspace.scratch + stream_scratch_bytes(workspace.device, large.rows, large.columns,
                                                         workspace.options.dimension));
  // Only read.
  stream.rows.out = const_cast<float*>(in(potentials.f, large.row_offset));
  stream.columns.out = const_cast<float*>(in(potentials.g, large.column_offset));
  stream.solved = potentials.reports;
  stream.kept = in(potentials.plan, large.plan_offset);
  const bool implicit = gradient.mode == PH_OT_IMPLICIT;
  stream.d_plan = implicit ? in(gradient.d_plan, large.plan_offset) : nullptr;
  call.mode = gradient.mode;
  call.rows.upstream = in(gradient.d_f, large.row_offset);
  call.columns.upstream = in(gradient.d_g, large.column_offset);
  call.d_cost = in(gradient.d_cost, 0);
  call.d_value = in(gradient.d_value, 0);
  call.grad_cost = stream.plan = out(gradient.grad_cost, large.plan_offset);
  call.rows.grad_masses = out(gradient.grad_a, large.row_offset);
  call.columns.grad_masses = out(gradient.grad_b, large.column_offset);
  call.rows.grad_points = out(gradient.grad_x, large.row_offset * dimension);
  call.columns.grad_points = out(gradient.grad_y, large.column_offset * dimension);
  prepare_potentials(workspace.device, stream);
  dispatch_costs(costs_of(stream),
                 [&](auto costs) { launch_stream_gradient<decltype(costs)::value>(workspace.device, call); });
}

}  // namespace ph::ot
