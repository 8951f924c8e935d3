// Entropic transport of a part of the mass, in doubles and logarithms: T = exp((f + g + lambda - C) / epsilon) with f, g <= 0, 0
// where a capacity is not used up. Iterations maximise the concave dual over f and lambda, then over g and lambda, exactly:
// rows that have no more are cut off, the others share what is left of the mass.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "ot/partial.h"
#include "ot/sinkhorn_cpu.h"

namespace ph::ot {

namespace {

// How far a sum is from what a capacity and its price say.
double violation(double sum, double capacity, double price) {
  return price < 0.0 ? std::fabs(sum - capacity) : std::max(0.0, sum - capacity);
}

// The potentials p <= 0 of one side and lambda so that sums, min(capacity, exp(lambda + log)), add up to the mass, as far as
// capacities can. Sides without capacity keep -infinity. False if no log is finite.
class Filling {
 public:
  explicit Filling(uint64_t most) : rest_(most + 1) { order_.reserve(most); }

  bool fill(uint32_t count, const double* capacity, const double* logs, double mass, double* potential,
            double& lambda, double& total) {
    order_.clear();
    double largest = -INFINITY;
    for (uint32_t k = 0; k < count; ++k) {
      if (potential[k] == -INFINITY || logs[k] == -INFINITY) continue;
      order_.push_back({std::log(capacity[k]) - logs[k], k});  // the lambda that uses it up
      largest = std::max(largest, logs[k]);
    }
    if (order_.empty()) return false;
    std::sort(order_.begin(), order_.end());
    const size_t present = order_.size();
    rest_[present] = 0.0;
    for (size_t i = present; i-- > 0;) rest_[i] = rest_[i + 1] + std::exp(logs[order_[i].second] - largest);
    double used = 0.0;
    lambda = order_.back().first;
    for (size_t i = 0; i < present && mass > used; ++i) {
      const double candidate = std::log((mass - used) / rest_[i]) - largest;
      if (candidate <= order_[i].first) {
        lambda = candidate;
        break;
      }
      used += capacity[order_[i].second];
    }
    total = 0.0;
    for (const auto& [limit, k] : order_) {
      potential[k] = std::min(0.0, limit - lambda);
      total += std::exp(lambda + logs[k] + potential[k]);
    }
    return true;
  }

 private:
  std::vector<std::pair<double, uint32_t>> order_;
  std::vector<double> rest_;
};

// f [n], g [stride] and the plan [n, stride] of a task, and its report. False if nothing can go anywhere.
bool solve_partial(const Task& task, double mass, uint32_t limit, Arena& arena, const double* cost,
                   double* plan, double* f, double* g, ph_ot_report& report) {
  const uint32_t n = task.rows, m = task.columns;
  const uint64_t stride = task.stride;
  const double inverse = 1.0 / task.epsilon;
  double* row_logs = arena.doubles(n);
  double *largest = arena.doubles(stride), *totals = arena.doubles(stride);
  // All potentials are over epsilon until the end.
  for (uint32_t i = 0; i < n; ++i) f[i] = task.a[i] > 0.0 ? 0.0 : -INFINITY;
  for (uint64_t j = 0; j < stride; ++j) g[j] = j < m && task.b[j] > 0.0 ? 0.0 : -INFINITY;
  Filling filling(std::max(n, m));
  double lambda = 0.0, total = 0.0;
  report.status = PH_OT_ITERATION_LIMIT;
  for (report.iterations = 0;; ++report.iterations) {
    for_pieces(n, kChunkRows, task.parallel, [&](uint64_t first, uint64_t last) {
      for (uint64_t i = first; i < last; ++i) {
        double top, sum;
        kernels().log_row(cost + i * stride, g, inverse, static_cast<uint32_t>(stride), plan + i * stride,
                          &top, &sum);
        row_logs[i] = sum > 0.0 ? top + std::log(sum) : -INFINITY;
      }
    });
    // Columns are as they must be by now.
    report.marginal_error = report.iterations == 0 ? INFINITY : std::fabs(total - mass);
    for (uint32_t i = 0; i < n; ++i) {
      if (f[i] != -INFINITY)
        report.marginal_error += violation(std::exp(f[i] + lambda + row_logs[i]), task.a[i], f[i]);
    }
    if (report.marginal_error <= task.tolerance) report.status = PH_OT_CONVERGED;
    if (report.status == PH_OT_CONVERGED || report.iterations == limit) break;
    bool any = filling.fill(n, task.a, row_logs, mass, f, lambda, total);
    if (any) {
      for_pieces(stride, 64, task.parallel, [&](uint64_t first, uint64_t last) {
        kernels().log_columns(cost, stride, n, f, inverse, static_cast<uint32_t>(first),
                              static_cast<uint32_t>(last), plan, largest, totals);
      });
      for (uint32_t j = 0; j < m; ++j)
        totals[j] = totals[j] > 0.0 ? largest[j] + std::log(totals[j]) : -INFINITY;
      any = filling.fill(m, task.b, totals, mass, g, lambda, total);
    }
    if (!any) {
      report.status = PH_OT_INFEASIBLE;
      report.place = 0;
      return false;
    }
  }
  report.cost = 0.0;
  double entropy = 0.0;
  for (uint32_t i = 0; i < n; ++i) {
    double* row = plan + i * stride;
    kernels().plan_row(cost + i * stride, f[i] + lambda, g, inverse, static_cast<uint32_t>(stride), row);
    for (uint32_t j = 0; j < m; ++j) {
      if (row[j] == 0.0) continue;
      const double price = cost[i * stride + j];
      report.cost += row[j] * price;
      entropy -= row[j] * (f[i] + lambda + g[j] - price * inverse - 1.0);
    }
  }
  report.value = report.cost - task.epsilon * entropy;
  for (uint32_t i = 0; i < n; ++i) f[i] = task.epsilon * (f[i] + lambda);
  for (uint32_t j = 0; j < m; ++j) g[j] *= task.epsilon;
  return true;
}

}  // namespace

void partial(ph_device&, Workspace& base, const Problem& given, const Iterations& iterations,
             const double* host_masses, const Solution& solution) {
  CpuWorkspace& workspace = static_cast<CpuWorkspace&>(base);
  const Shape shape = workspace.shape();
  Problem problem = given;
  problem.row_penalty = problem.column_penalty = 1.0;  // totals may differ, as if there were penalties
  for_problems(workspace, [&](uint32_t index, Arena& arena, bool parallel) {
    const uint64_t n = static_cast<uint64_t>(shape.rows(index)),
                   m = static_cast<uint64_t>(shape.columns(index)), stride = round_up(m, kStep);
    double *cost = arena.doubles(n * stride), *plan = arena.doubles(n * stride);
    double *f = arena.doubles(n), *g = arena.doubles(stride);
    ph_ot_report& report = solution.reports[index];
    Task task;
    bool solved = read_task(workspace, problem, index, Purpose::kSolve, arena, parallel, cost, task, report);
    if (solved) {
      double b_total = 0.0;
      for (uint64_t j = 0; j < m; ++j) b_total += task.b[j];
      const double most = std::min(task.total, b_total);
      solved = host_masses[index] <= (1.0 + 1e-6) * most;
      if (solved) {
        solved = solve_partial(task, std::min(host_masses[index], most), settings_of(iterations, index).limit,
                               arena, cost, plan, f, g, report);
      } else {
        report.status = PH_OT_INVALID_MASS;
        report.place = n + m;
      }
    }
    write_solution(workspace, index, solved, parallel, f, g, plan, solution);
  });
}

}  // namespace ph::ot
