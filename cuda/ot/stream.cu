// Launches of the streaming form: problems one after another, each on the whole GPU.
#include <algorithm>

#include "ot/stream_cuda.h"

namespace ph::ot {

namespace {

uint32_t row_tiles(const StreamSide& side) { return (side.count + kTileRows - 1) / kTileRows; }

uint64_t lay_out(const ph_device& device, StreamCall& call, uint8_t* memory) {
  Pieces pieces(memory);
  call.state = pieces.take<StreamState>(1);
  call.values_pitch = std::max({row_tiles(call.rows), row_tiles(call.columns),
                                kMostBlocks * static_cast<uint32_t>(device.processors)});
  call.values = pieces.take<double>(2ull * kMostValues * call.values_pitch);
  call.means = pieces.take<double>(kMeanParts * kHalfDimension);
  // What is cleared comes first: norms and arrivals.
  for (StreamSide* side : {&call.rows, &call.columns}) {
    side->norms = pieces.take<float>(2ull * side->count);
    side->arrivals = pieces.take<uint32_t>(row_tiles(*side));
  }
  call.rest = pieces.take<uint8_t>(0);
  for (StreamSide* side : {&call.rows, &call.columns}) {
    const uint32_t padded = (side->count + kTileColumns - 1) / kTileColumns * kTileColumns;
    side->bias = pieces.take<float>(padded);
    side->next_bias = pieces.take<float>(padded);
    side->sums = pieces.take<float>(uint64_t{kMostParts} * side->count);
    side->largest = pieces.take<float>(uint64_t{kMostParts} * side->count);
    side->halves = pieces.take<uint16_t>(
        call.dimension > 0 && call.dimension <= kHalfDimension ? 2ull * kHalfDimension * side->count : 0);
  }
  return pieces.used();
}

// What precedes all else: faults and totals of masses, norms and halves of points.
void prepare(const ph_device& device, const StreamCall& call) {
  constexpr uint32_t kFaultBytes = 4 * sizeof(unsigned long long);
  PH_CUDA_TRY(cudaMemsetAsync(call.state, 0, sizeof(StreamState), device.stream));
  PH_CUDA_TRY(cudaMemsetAsync(call.state, 0xff, kFaultBytes, device.stream));
  const uint8_t* cleared = reinterpret_cast<const uint8_t*>(call.rows.norms);
  PH_CUDA_TRY(cudaMemsetAsync(call.rows.norms, 0, static_cast<size_t>(call.rest - cleared), device.stream));
  start_stream(device, StreamMassKernel<0>, 1, 1024, 32 * sizeof(double), false, call);
  const Costs costs = costs_of(call);
  if (costs == Costs::kMatrix) return;
  const uint32_t points = call.rows.count + call.columns.count,
                 blocks = std::min((points + kStreamWarps - 1) / kStreamWarps, 8u * device.processors);
  constexpr uint32_t kMeanBytes = kHalfDimension * sizeof(float);
  if (costs == Costs::kHalves) {
    if (call.cost_kind == PH_OT_SQEUCLIDEAN)
      start_stream(device, StreamMeanKernel<0>, kMeanParts, kHalfDimension, 0, false, call);
    start_stream(device, StreamMeasureKernel<Costs::kHalves>, blocks, kStreamThreads, kMeanBytes, false,
                 call);
    start_stream(device, StreamHalvesKernel<0>, blocks, kStreamThreads, kMeanBytes, false, call);
  } else {
    start_stream(device, StreamMeasureKernel<Costs::kDifferences>, blocks, kStreamThreads, kMeanBytes, false,
                 call);
  }
}

}  // namespace

uint64_t stream_scratch_bytes(const ph_device& device, uint32_t rows, uint32_t columns, uint32_t dimension) {
  StreamCall call = {};
  call.rows.count = rows;
  call.columns.count = columns;
  call.dimension = dimension;
  return lay_out(device, call, nullptr);
}

StreamCall stream_call(const CudaWorkspace& workspace, const Problem& problem, const LargeProblem& large) {
  StreamCall call = {};
  const auto floats = [](const void* data, int64_t first) {
    return data == nullptr ? nullptr : static_cast<const float*>(data) + first;
  };
  const int64_t dimension = workspace.options.dimension;
  call.rows.count = large.rows;
  call.columns.count = large.columns;
  call.rows.points = floats(problem.x, large.row_offset * dimension);
  call.columns.points = floats(problem.y, large.column_offset * dimension);
  call.rows.masses = floats(problem.a, large.row_offset);
  call.columns.masses = floats(problem.b, large.column_offset);
  call.rows.penalty = static_cast<float>(problem.row_penalty);
  call.columns.penalty = static_cast<float>(problem.column_penalty);
  call.dimension = workspace.options.dimension;
  call.cost_kind = problem.cost_kind;
  call.cost = floats(problem.cost, large.plan_offset);
  call.epsilons = problem.epsilons;
  call.tolerances = problem.tolerances;
  call.epsilon = problem.epsilon;
  call.tolerance = problem.tolerance;
  call.problem = large.problem;
  call.relative_epsilon = problem.relative_epsilon;
  lay_out(workspace.device, call, workspace.scratch);
  return call;
}

void stream_sinkhorn(const CudaWorkspace& workspace, const StreamCall& call) {
  const ph_device& device = workspace.device;
  prepare(device, call);
  dispatch_costs(costs_of(call),
                 [&](auto costs) { launch_stream_sinkhorn<decltype(costs)::value>(device, call); });
}

void prepare_potentials(const ph_device& device, const StreamCall& call) {
  prepare(device, call);
  const uint32_t points = std::max(call.rows.count, call.columns.count);
  start_stream(device, StreamBiasKernel<0>, (points + kStreamThreads - 1) / kStreamThreads, kStreamThreads, 0,
               false, call);
}

void stream_plan(const CudaWorkspace& workspace, const StreamCall& call, bool transposed) {
  const ph_device& device = workspace.device;
  prepare_potentials(device, call);
  dispatch_costs(costs_of(call),
                 [&](auto costs) { launch_stream_plan<decltype(costs)::value>(device, call, transposed); });
}

}  // namespace ph::ot
