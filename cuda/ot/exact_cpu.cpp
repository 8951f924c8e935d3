// Transport without entropy, of all mass or of a part.
#include <algorithm>
#include <cmath>
#include <vector>

#include "ot/paths_cpu.h"
#include "ot/sinkhorn_cpu.h"

namespace ph::ot {

void exact(ph_device&, Workspace& base, const Problem& given, const double* host_masses,
           const Solution& solution) {
  CpuWorkspace& workspace = static_cast<CpuWorkspace&>(base);
  const Shape shape = workspace.shape();
  Problem problem = given;
  // Partial transport's masses need not have equal totals, as if they had penalties.
  problem.row_penalty = problem.column_penalty = host_masses == nullptr ? INFINITY : 1.0;
  for_problems(workspace, [&](uint32_t index, Arena& arena, bool parallel) {
    const uint32_t n = static_cast<uint32_t>(shape.rows(index)),
                   m = static_cast<uint32_t>(shape.columns(index));
    // Partial transport: what stays goes to a column beside the others, and what is not filled comes from such a row, at no
    // cost; nothing goes from one to the other.
    const uint32_t extra = host_masses == nullptr ? 0 : 1;
    const uint64_t stride = round_up(m, kStep), wide = round_up(m + extra, kStep);
    double *cost = arena.doubles(n * stride), *flow = arena.doubles((n + extra) * wide);
    double *f = arena.doubles(n + extra), *g = arena.doubles(wide);
    ph_ot_report& report = solution.reports[index];
    Task task;
    bool solved = read_task(workspace, problem, index, Purpose::kSolve, arena, parallel, cost, task, report);
    report.epsilon = 0.0;
    double mass = task.total;
    if (solved && extra == 1) {
      double b_total = 0.0;
      for (uint32_t j = 0; j < m; ++j) b_total += task.b[j];
      mass = host_masses[index];
      if (mass > (1.0 + 1e-6) * std::min(task.total, b_total)) {
        report.status = PH_OT_INVALID_MASS;
        report.place = static_cast<uint64_t>(n) + m;
        solved = false;
      } else {
        mass = std::min({mass, task.total, b_total});
        double *extended = arena.doubles((n + 1) * wide), *a = arena.doubles(n + 1), *b = arena.doubles(wide);
        for (uint32_t i = 0; i <= n; ++i) {
          double* row = extended + i * wide;
          std::fill(row, row + wide, 0.0);
          if (i < n) std::copy(cost + i * stride, cost + i * stride + m, row);
          else row[m] = INFINITY;
        }
        std::copy(task.a, task.a + n, a);
        std::copy(task.b, task.b + m, b);
        a[n] = b_total - mass;
        b[m] = task.total - mass;
        cost = extended;
        task.a = a;
        task.b = b;
      }
    }
    if (solved) {
      Paths paths(n + extra, m + extra, wide, cost, task.a, task.b, flow, f, g);
      solved = paths.solve();
      report.iterations = paths.augmentations;
      if (!solved) {
        report.status = PH_OT_INFEASIBLE;
        report.place = paths.stuck;
      }
    }
    if (solved) {
      double error = 0.0, moved = 0.0;
      report.cost = 0.0;
      std::vector<double> columns(m, 0.0);
      for (uint32_t i = 0; i < n; ++i) {
        double sum = 0.0;
        for (uint32_t j = 0; j < m; ++j) {
          const double entry = flow[i * wide + j];
          sum += entry;
          columns[j] += entry;
          if (entry > 0.0) report.cost += entry * cost[i * wide + j];
        }
        error += extra == 0 ? std::fabs(sum - task.a[i]) : std::max(0.0, sum - task.a[i]);
        moved += sum;
      }
      for (uint32_t j = 0; j < m; ++j)
        error += extra == 0 ? std::fabs(columns[j] - task.b[j]) : std::max(0.0, columns[j] - task.b[j]);
      report.marginal_error = error + (extra == 0 ? 0.0 : std::fabs(moved - mass));
      report.value = report.cost;
      report.status = PH_OT_CONVERGED;
      for (uint32_t i = 0; i < n && wide != stride; ++i)
        std::copy(flow + i * wide, flow + i * wide + stride, flow + i * stride);
    }
    write_solution(workspace, index, solved, parallel, f, g, flow, solution);
  });
}

}  // namespace ph::ot
