// Entropic transport of a part of the mass, in doubles and logarithms, as in partial_cpu.cpp: T = exp((f + g + lambda - C) /
// epsilon) with f, g <= 0, 0 where a capacity is not used up. Iterations maximise the concave dual over f and lambda, then over
// g and lambda, exactly: rows that have no more are cut off, the others share what is left of the mass.
//
// A thread block has a problem; potentials are in shared memory. An iteration reads all costs twice, from the caches, by
// rows, a warp each, and by columns, a lane each, of as many rows at a time as there are warps for; each takes two passes, of
// maxima and of powers. What lambda is is found without sorting: from below, as those that are cut off at a lambda
// are cut off at every greater one, until no more are. All sums are in an order that depends on a problem's size alone.
#include <utility>

#include "common/error.h"
#include "ot/partial.h"
#include "ot/small_cuda.h"

namespace ph::ot {

namespace {

struct PartialCall {
  SmallCall small;
  const int32_t* limits;  // of iterations [problems], or null: limit
  int32_t limit;
  uint32_t most;  // rows or columns there is room for, a multiple of kWarp
};

constexpr uint32_t kPartialVectors = 9;  // of `most` doubles

template <int kWarps>
struct PartialTask {
  const Threads<kWarps>& threads;
  double *f, *g, *a, *b, *logs, *cuts, *shares, *largest, *totals;

  __device__ PartialTask(const Threads<kWarps>& threads_, double* memory, uint32_t most) : threads(threads_) {
    double** vectors[kPartialVectors] = {&f, &g, &a, &b, &logs, &cuts, &shares, &largest, &totals};
    for (uint32_t i = 0; i < kPartialVectors; ++i) *vectors[i] = memory + i * most;
  }

  // The potentials of one side, all <= 0, and lambda, so that sums, min(capacity, exp(lambda + log)), add up to the mass, as
  // far as capacities can. Sides without capacity keep -infinity. False if no log is finite. A thread has the elements that
  // are congruent to it, of all vectors.
  __device__ bool fill(uint32_t count, const double* capacity, double mass, double* potential, double& lambda,
                       double& total) {
    const auto present = [&](uint32_t k) {
      return potential[k] != -INFINITY && logs[k] != static_cast<double>(-INFINITY);
    };
    double top = -INFINITY, last = -INFINITY;
    for (uint32_t k = threads.thread; k < count; k += threads.kCount) {
      if (!present(k)) continue;
      cuts[k] = log(capacity[k]) - logs[k];  // the lambda that uses it up
      top = fmax(top, logs[k]);
      last = fmax(last, cuts[k]);
    }
    top = threads.combine(top, Larger{});
    last = threads.combine(last, Larger{});
    if (top == static_cast<double>(-INFINITY)) return false;
    for (uint32_t k = threads.thread; k < count; k += threads.kCount)
      if (present(k)) shares[k] = exp(logs[k] - top);
    lambda = -INFINITY;
    double before = -1.0;
    for (uint32_t round = 0; round <= count; ++round) {
      double sums[3] = {};
      auto& [used, rest, cut] = sums;
      for (uint32_t k = threads.thread; k < count; k += threads.kCount) {
        if (!present(k)) continue;
        if (cuts[k] < lambda) {
          used += capacity[k];
          cut += 1.0;
        } else {
          rest += shares[k];
        }
      }
      threads.sum_each(sums);
      if (cut == before) break;
      before = cut;
      if (!(rest > 0.0 && mass > used)) {
        lambda = last;
        break;
      }
      lambda = log((mass - used) / rest) - top;
    }
    total = 0.0;
    for (uint32_t k = threads.thread; k < count; k += threads.kCount) {
      if (!present(k)) continue;
      const double price = cuts[k] - lambda;
      potential[k] = price < 0.0 ? price : 0.0;
      total += exp(lambda + logs[k] + potential[k]);
    }
    total = threads.sum(total);
    threads.sync();  // potentials are there
    return true;
  }

  // logs of rows: log sum exp(g - C / epsilon).
  template <typename T>
  __device__ void reduce_rows(const T* costs, uint32_t n, uint32_t m, double inverse) {
    for (uint32_t row = threads.warp; row < n; row += kWarps) {
      const T* own = costs + row * m;
      double top = -INFINITY, sum = 0.0;
      for (uint32_t j = threads.lane; j < m; j += kWarp) top = fmax(top, g[j] - own[j] * inverse);
      top = threads.combine_warp(top, Larger{});
      if (top > -INFINITY) {
        for (uint32_t j = threads.lane; j < m; j += kWarp) sum += exp(g[j] - own[j] * inverse - top);
        sum = threads.combine_warp(sum, Add{});
      }
      if (threads.lane == 0) logs[row] = sum > 0.0 ? top + log(sum) : static_cast<double>(-INFINITY);
    }
    threads.sync();
  }

  // logs of columns: log sum exp(f - C / epsilon).
  template <typename T>
  __device__ void reduce_columns(const T* costs, uint32_t n, uint32_t m, double inverse) {
    // 32 columns, and a part of the rows, a warp.
    const uint32_t across = (m + kWarp - 1) / kWarp, parts = across < kWarps ? kWarps / across : 1,
                   width = across * kWarp, each = (n + parts - 1) / parts;
    for (uint32_t item = threads.warp; item < across * parts; item += kWarps) {
      const uint32_t column = item % across * kWarp + threads.lane, first = item / across * each,
                     last = min(first + each, n);
      double top = -INFINITY, sum = 0.0;
      if (column < m) {
        for (uint32_t i = first; i < last; ++i) top = fmax(top, f[i] - costs[i * m + column] * inverse);
        for (uint32_t i = first; i < last && top > -INFINITY; ++i)
          sum += exp(f[i] - costs[i * m + column] * inverse - top);
      }
      largest[item / across * width + column] = top;
      totals[item / across * width + column] = sum;
    }
    threads.sync();
    for (uint32_t j = threads.thread; j < m; j += threads.kCount) {
      double top = -INFINITY, sum = 0.0;
      for (uint32_t part = 0; part < parts; ++part) top = fmax(top, largest[part * width + j]);
      for (uint32_t part = 0; part < parts && top > -INFINITY; ++part)
        sum += totals[part * width + j] * exp(largest[part * width + j] - top);
      logs[j] = sum > 0.0 ? top + log(sum) : static_cast<double>(-INFINITY);
    }
    threads.sync();
  }
};

// How far a sum is from what a capacity and its price say.
__device__ __forceinline__ double violation(double sum, double capacity, double price) {
  const double more = sum - capacity;
  return price < 0.0 ? fabs(more) : more > 0.0 ? more : 0.0;
}

template <int kWarps, typename T>
__global__ void __launch_bounds__(kWarps* kWarp) PartialKernel(const __grid_constant__ PartialCall call) {
  const Batch& batch = call.small.batch;
  begin_launch(batch);
  unsigned long long* scratch = reinterpret_cast<unsigned long long*>(dynamic_shared());
  const Threads<kWarps> threads(scratch);
  const SmallProblem problem(batch, blockIdx.x);
  const uint32_t n = problem.rows, m = problem.columns;
  const T* costs = costs_of<T>(call.small, problem);
  PartialTask<kWarps> task(threads, reinterpret_cast<double*>(scratch + 3 * kWarps), call.most);

  ph_ot_report report = {PH_OT_CONVERGED, 0, 0, NAN, NAN, NAN, 0.0};
  const auto refuse = [&](uint32_t status, unsigned long long place) {
    report.status = status;
    report.place = place;
    write_no_answer(threads, call.small, problem, true, report);
    end_launch(batch);
  };
  double scale;
  const SmallMasses masses = read_small_masses(threads, batch, problem, false, task.a, task.b, scale);
  if (masses.fault != kNoFault) return refuse(PH_OT_INVALID_MASS, masses.fault);
  const SmallExtremes extremes = extremes_of(threads, costs, n * m);
  if (!extremes.valid) {
    unsigned long long place;
    const ph_ot_status status = find_small_fault(threads, batch, problem, costs, place);
    return refuse(status, place);
  }
  double epsilon = batch.epsilons == nullptr ? batch.epsilon : batch.epsilons[problem.problem];
  if (batch.relative_epsilon && extremes.largest > 0.0) epsilon *= extremes.largest;
  report.epsilon = epsilon;
  const double least = masses.a_total < masses.b_total ? masses.a_total : masses.b_total;
  double mass = call.small.masses[problem.problem];
  if (!(mass <= (1.0 + 1e-6) * least)) return refuse(PH_OT_INVALID_MASS, 0ull + n + m);
  mass = mass < least ? mass : least;

  const double inverse = 1.0 / epsilon,
               tolerance = batch.tolerances == nullptr ? batch.tolerance : batch.tolerances[problem.problem];
  const uint32_t limit = call.limits == nullptr ? call.limit : call.limits[problem.problem];
  // All potentials are over epsilon until the end.
  for (uint32_t i = threads.thread; i < n; i += threads.kCount)
    task.f[i] = task.a[i] > 0.0 ? 0.0 : static_cast<double>(-INFINITY);
  for (uint32_t j = threads.thread; j < m; j += threads.kCount)
    task.g[j] = task.b[j] > 0.0 ? 0.0 : static_cast<double>(-INFINITY);
  threads.sync();
  double lambda = 0.0, total = 0.0;
  report.status = PH_OT_ITERATION_LIMIT;
  for (;; ++report.iterations) {
    task.reduce_rows(costs, n, m, inverse);
    // Columns are as they must be by now.
    double error = 0.0;
    for (uint32_t i = threads.thread; i < n; i += threads.kCount) {
      if (task.f[i] != -INFINITY)
        error += violation(exp(task.f[i] + lambda + task.logs[i]), task.a[i], task.f[i]);
    }
    report.marginal_error =
        threads.sum(error) + (report.iterations == 0 ? static_cast<double>(INFINITY) : fabs(total - mass));
    if (report.marginal_error <= tolerance) report.status = PH_OT_CONVERGED;
    if (report.status == PH_OT_CONVERGED || report.iterations == limit) break;
    if (!task.fill(n, task.a, mass, task.f, lambda, total)) return refuse(PH_OT_INFEASIBLE, 0);
    task.reduce_columns(costs, n, m, inverse);
    if (!task.fill(m, task.b, mass, task.g, lambda, total)) return refuse(PH_OT_INFEASIBLE, 0);
  }

  double cost = 0.0, entropy = 0.0;
  float* plan = call.small.plan == nullptr ? nullptr : call.small.plan + problem.plan_offset;
  for (uint32_t e = threads.thread; e < n * m; e += threads.kCount) {
    const double price = costs[e], power = task.f[e / m] + lambda + task.g[e % m] - price * inverse,
                 entry = exp(power);
    if (plan != nullptr) plan[e] = static_cast<float>(entry);
    if (entry == 0.0) continue;
    cost += entry * price;
    entropy -= entry * (power - 1.0);
  }
  report.cost = threads.sum(cost);
  report.value = report.cost - epsilon * threads.sum(entropy);
  for (uint32_t i = threads.thread; i < n && call.small.f != nullptr; i += threads.kCount)
    call.small.f[problem.row_offset + i] = static_cast<float>(epsilon * (task.f[i] + lambda));
  for (uint32_t j = threads.thread; j < m && call.small.g != nullptr; j += threads.kCount)
    call.small.g[problem.column_offset + j] = static_cast<float>(epsilon * task.g[j]);
  if (threads.thread == 0) call.small.reports[problem.problem] = report;
  end_launch(batch);
}

template <typename T>
void launch_partial(const ph_device& device, const SmallProblems& problems, const PartialCall& call) {
  SmallCall small = call.small;
  const auto launch = [&](auto warps, uint32_t least, uint32_t most) {
    constexpr int kWarps = decltype(warps)::value;
    problems.for_sizes(small, least, most, [&](const SmallCall& each, uint32_t count) {
      PartialCall one = call;
      one.small = each;
      one.most = std::max(most, kWarps * kWarp);
      allow_shared(device, PartialKernel<kWarps, T>, SharedMemory::kPrefer);
      launch_overlapping(device, PartialKernel<kWarps, T>, dim3(count), kWarps * kWarp,
                         static_cast<uint32_t>((3 * kWarps + kPartialVectors * one.most) * sizeof(double)),
                         one);
    });
  };
  constexpr uint32_t kFew = 64;
  launch(std::integral_constant<int, 8>{}, kFew, kMostSmall);  // the largest begin first
  launch(std::integral_constant<int, 2>{}, 0, kFew);
}

}  // namespace

void partial(ph_device& device, Workspace& base, const Problem& problem, const Iterations& iterations,
             const double* host_masses, const Solution& solution) {
  SmallProblems& problems = small_problems(static_cast<CudaWorkspace&>(base), "transport a part of");
  PartialCall call = {};
  call.small = problems.prepare(problem, host_masses, solution);
  call.limits = iterations.limits;
  call.limit = iterations.limit;
  if (call.small.computed != nullptr) launch_partial<double>(device, problems, call);
  else launch_partial<float>(device, problems, call);
}

}  // namespace ph::ot
