// Transport without entropy, of all mass or of a part.
#include "common/error.h"
#include "ot/paths.cuh"
#include "ot/small_cuda.h"

namespace ph::ot {

namespace {

// As many thread blocks as shared memory has room for, or the multiprocessor has at all: there are GPUs that have 16.
constexpr int resident(int blocks) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 800 && __CUDA_ARCH__ != 900
  return blocks < 16 ? blocks : 16;
#else
  return blocks;
#endif
}
using Paths64 = PathsLayout<64, 1, 32>;
using Paths128 = PathsLayout<128, 1, 16>;
using Paths256 = PathsLayout<256, 2, 8>;
using Paths513 = PathsLayout<kMostSmall + 1, 4, 4>;

// Of partial transport: what stays goes to a column beside the others, and what is not filled comes from such a row, at no
// cost; nothing goes from one to the other. Costs are read as often as searches reach their rows, and the plan is written once.
template <typename L, typename T>
__global__ void __launch_bounds__(L::kThreads, resident(L::kBlocks))
    ExactKernel(const __grid_constant__ SmallCall call) {
  const Batch& batch = call.batch;
  begin_launch(batch);
  PathsMemory<L>& memory = *reinterpret_cast<PathsMemory<L>*>(dynamic_shared());
  const Threads<L::kWarps> threads(memory.scratch);
  const SmallProblem problem(batch, blockIdx.x);
  const uint32_t n = problem.rows, m = problem.columns, extra = call.masses == nullptr ? 0 : 1;
  const T* costs = costs_of<T>(call, problem);
  float* plan = call.plan == nullptr ? nullptr : call.plan + problem.plan_offset;
  for (uint32_t i = threads.thread; i < n * m && plan != nullptr; i += L::kThreads) plan[i] = 0.0f;

  ph_ot_report report = {PH_OT_CONVERGED, 0, 0, NAN, NAN, NAN, 0.0};
  const auto refuse = [&](uint32_t status, unsigned long long place) {
    report.status = status;
    report.place = place;
    write_no_answer(threads, call, problem, false, report);
    end_launch(batch);
  };
  double scale;
  const SmallMasses masses =
      read_small_masses(threads, batch, problem, extra == 0, memory.supply, memory.demand, scale);
  if (masses.fault != kNoFault) return refuse(PH_OT_INVALID_MASS, masses.fault);
  if (!extremes_of(threads, costs, n * m).valid) {
    unsigned long long place;
    const ph_ot_status status = find_small_fault(threads, batch, problem, costs, place);
    return refuse(status, place);
  }
  double mass = masses.a_total;
  if (extra == 1) {
    const double least = masses.a_total < masses.b_total ? masses.a_total : masses.b_total;
    mass = call.masses[problem.problem];
    if (mass > (1.0 + 1e-6) * least) return refuse(PH_OT_INVALID_MASS, 0ull + n + m);
    mass = mass < least ? mass : least;
    if (threads.thread == 0) {
      memory.supply[n] = masses.b_total - mass;
      memory.demand[m] = masses.a_total - mass;
    }
  }
  threads.sync();

  Paths<L, PathCosts<T>> paths(threads, memory, {costs, n, m}, n + extra, m + extra);
  const PathsEnd reached = paths.solve();
  report.iterations = paths.augmentations;
  if (reached == PathsEnd::kStuck) return refuse(PH_OT_INFEASIBLE, paths.stuck);
  if (reached == PathsEnd::kLimit) report.status = PH_OT_ITERATION_LIMIT;
  paths.finish_potentials();

  double cost = 0.0, error = 0.0, moved = 0.0;
  const auto add_error = [&](double sum, double wanted) {
    const double difference = sum - wanted;
    if (extra == 0) error += fabs(difference);
    else if (difference > 0.0) error += difference;
  };
  for (uint32_t row = threads.thread; row < n; row += L::kThreads) {
    double sum = 0.0;
    for (uint16_t arc = memory.row_arcs[row]; arc != kNoArc; arc = memory.next_of_row[arc]) {
      const uint32_t column = memory.arc_column[arc];
      if (column == m) continue;
      const double flow = memory.flow[arc];
      sum += flow;
      cost += flow * costs[row * m + column];
      if (plan != nullptr) plan[row * m + column] = static_cast<float>(flow);
    }
    moved += sum;
    add_error(sum, row_mass(batch, problem, row));
    if (call.f != nullptr) call.f[problem.row_offset + row] = static_cast<float>(memory.f[row]);
  }
  for (uint32_t column = threads.thread; column < m; column += L::kThreads) {
    double sum = 0.0;
    for (uint16_t arc = memory.column_arcs[column]; arc != kNoArc; arc = memory.next_of_column[arc])
      if (memory.arc_row[arc] != n) sum += memory.flow[arc];
    add_error(sum, column_mass(batch, problem, column) * scale);
    if (call.g != nullptr) call.g[problem.column_offset + column] = static_cast<float>(memory.g[column]);
  }
  cost = threads.sum(cost);
  error = threads.sum(error);
  moved = threads.sum(moved);
  report.cost = report.value = cost;
  report.marginal_error = error + (extra == 0 ? 0.0 : fabs(moved - mass));
  if (threads.thread == 0) call.reports[problem.problem] = report;
  end_launch(batch);
}

template <typename T>
void launch_exact(const ph_device& device, const SmallProblems& problems, SmallCall call) {
  const uint32_t extra = call.masses == nullptr ? 0 : 1;
  const auto launch = [&](auto layout, uint32_t least) {
    using L = decltype(layout);
    problems.for_sizes(call, least, L::kMost - extra, [&](const SmallCall& each, uint32_t count) {
      allow_shared(device, ExactKernel<L, T>, SharedMemory::kPrefer);
      launch_overlapping(device, ExactKernel<L, T>, dim3(count), L::kThreads,
                         static_cast<uint32_t>(sizeof(PathsMemory<L>)), each);
    });
  };
  // The largest begin first.
  launch(Paths513{}, Paths256::kMost - extra);
  launch(Paths256{}, Paths128::kMost - extra);
  launch(Paths128{}, Paths64::kMost - extra);
  launch(Paths64{}, 0);
}

}  // namespace

void exact(ph_device& device, Workspace& base, const Problem& problem, const double* host_masses,
           const Solution& solution) {
  SmallProblems& problems = small_problems(static_cast<CudaWorkspace&>(base), "solve exactly");
  const SmallCall call = problems.prepare(problem, host_masses, solution);
  if (call.computed != nullptr) launch_exact<double>(device, problems, call);
  else launch_exact<float>(device, problems, call);
}

}  // namespace ph::ot
