// (Fused) Gromov-Wasserstein transport by conditional gradients with exact line search (Vayer et al., arXiv 1805.09114), in
// doubles. With the marginals fixed, the distortion is <K - 2 X T Y, T> with K_ij = (X o X a)_i + (Y o Y b)_j (Peyre, Cuturi and
// Solomon 2016), so an iteration takes n^2 m + n m^2 operations, and one exact linear transport for its direction. The same
// transport proves how far the plan is from being stationary: that is what stops.
//
// A conditional gradient finds a local minimum. It starts from the plan of Memoli's third lower bound, which transports each
// point by the distribution of distances that it sees: it gives a bound on the least value, and often isomorphisms at once;
// then, unless the bound is reached, from the product a b'. The better plan is kept.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "ot/gromov.h"
#include "ot/paths_cpu.h"
#include "ot/sinkhorn_cpu.h"

namespace ph::ot {

namespace {

// Reads a matrix [size, size] to rows `stride` apart. False if something is wrong with it: the report says what, at a place
// that counts from `base`.
bool read_distances(const void* source, uint32_t dtype, int64_t first, uint32_t size, uint64_t stride,
                    uint64_t base, double* out, double& largest, ph_ot_gromov_report& report) {
  const auto refuse = [&](uint32_t status, uint64_t row, uint64_t column) {
    report.status = status;
    report.place = base + row * size + column;
    return false;
  };
  largest = 0.0;
  for (uint64_t i = 0; i < size; ++i) {
    double* row = out + i * stride;
    kernels().read(source, dtype, first + static_cast<int64_t>(i * size), size, row);
    std::fill(row + size, row + stride, 0.0);
    for (uint64_t j = 0; j < size; ++j) {
      if (!std::isfinite(row[j])) return refuse(PH_OT_NON_FINITE_DISTANCE, i, j);
      largest = std::max(largest, std::fabs(row[j]));
    }
  }
  for (uint64_t i = 0; i < size; ++i) {
    for (uint64_t j = i + 1; j < size; ++j) {
      double &upper = out[i * stride + j], &lower = out[j * stride + i];
      if (std::fabs(upper - lower) > kAsymmetry * largest) return refuse(PH_OT_ASYMMETRIC_DISTANCE, i, j);
      upper = lower = upper + (lower - upper) / 2.0;
    }
  }
  return true;
}

// What the points of one side see: distances with mass, sorted, and those masses. [size, count]
struct Views {
  uint64_t count;
  std::vector<double> distances, masses;

  Views(const double* matrix, uint32_t size, uint64_t stride, const double* mass) : count(0) {
    std::vector<uint32_t> order;
    for (uint32_t i = 0; i < size; ++i)
      if (mass[i] > 0.0) order.push_back(i);
    count = order.size();
    for (uint32_t i = 0; i < size; ++i) {
      const double* row = matrix + i * stride;
      std::sort(order.begin(), order.end(),
                [&](uint32_t p, uint32_t q) { return row[p] != row[q] ? row[p] < row[q] : p < q; });
      for (uint32_t k : order) {
        distances.push_back(row[k]);
        masses.push_back(mass[k]);
      }
    }
  }
};

// The least sum of squared differences between what point i of one side and point j of the other see.
double view_cost(const Views& x, uint64_t i, const Views& y, uint64_t j) {
  const double *u = &x.distances[i * x.count], *p = &x.masses[i * x.count];
  const double *v = &y.distances[j * y.count], *q = &y.masses[j * y.count];
  double sum = 0.0, left = p[0], room = q[0];
  for (uint64_t k = 0, l = 0; k < x.count && l < y.count;) {
    const double amount = std::min(left, room), difference = u[k] - v[l];
    sum += amount * difference * difference;
    left -= amount;
    room -= amount;
    if (left <= 0.0 && ++k < x.count) left = p[k];
    if (room <= 0.0 && ++l < y.count) room = q[l];
  }
  return sum;
}

struct Descent {
  bool converged;
  uint32_t iterations;
  double value, cost, distortion, gap;
};

// One problem: minimises <L, T> + alpha * distortion(T). Matrices are [n, stride], padding 0.
class Objective {
 public:
  Objective(const Task& task, Arena& arena, const double* x, uint64_t x_stride, const double* y,
            const double* linear, double alpha)
      : task_(task), x_(x), x_stride_(x_stride), y_(y), linear_(linear), alpha_(alpha) {
    const uint64_t n = task.rows, stride = task.stride;
    size_ = n * stride;
    for (double** matrix : {&constant_, &gradient_, &half_, &product_, &vertex_, &vertex_product_})
      *matrix = arena.doubles(size_);
    f_ = arena.doubles(n);
    g_ = arena.doubles(stride);
    double* columns = arena.doubles(stride);
    for (uint32_t j = 0; j < task.columns; ++j)
      columns[j] = second_moment(y + j * stride, task.b, task.columns);
    for (uint64_t i = 0; i < n; ++i) {
      const double row = second_moment(x + i * x_stride, task.a, task.rows);
      double* out = constant_ + i * stride;
      for (uint32_t j = 0; j < task.columns; ++j) out[j] = row + columns[j];
      std::fill(out + task.columns, out + stride, 0.0);
    }
  }

  // The plan of the third lower bound, and the bound. False if no plan of finite cost exists: of row `stuck`.
  bool bound(double* plan, double& least, uint32_t& stuck) {
    const Views x(x_, task_.rows, x_stride_, task_.a), y(y_, task_.columns, task_.stride, task_.b);
    for_pieces(task_.rows, 16, task_.parallel, [&](uint64_t first, uint64_t last) {
      for (uint64_t i = first; i < last; ++i) {
        double* row = gradient_ + i * task_.stride;
        for (uint64_t j = 0; j < task_.columns; ++j)
          row[j] = linear_[i * task_.stride + j] + (alpha_ > 0.0 ? alpha_ * view_cost(x, i, y, j) : 0.0);
      }
    });
    Paths paths(task_.rows, task_.columns, task_.stride, gradient_, task_.a, task_.b, plan, f_, g_);
    if (!paths.solve()) {
      stuck = paths.stuck;
      return false;
    }
    least = inner(gradient_, plan);
    return true;
  }

  // a b', if that is of finite cost.
  bool product_plan(double* plan) const {
    for (uint64_t i = 0; i < task_.rows; ++i) {
      for (uint64_t j = 0; j < task_.stride; ++j) {
        const double mass = task_.a[i] * (task_.b[j] / task_.total);
        if (mass > 0.0 && linear_[i * task_.stride + j] == INFINITY) return false;
        plan[i * task_.stride + j] = mass;
      }
    }
    return true;
  }

  // Improves a plan until <gradient, T - S> is at most `least_gap` for every plan S.
  Descent descend(double* plan, uint32_t limit, double least_gap) {
    Descent descent = {};
    multiply(plan, product_);
    while (true) {
      for (uint64_t k = 0; k < size_; ++k)
        gradient_[k] = linear_[k] + 2.0 * alpha_ * (constant_[k] - 2.0 * product_[k]);
      Paths paths(task_.rows, task_.columns, task_.stride, gradient_, task_.a, task_.b, vertex_, f_, g_);
      paths.solve();  // as bound() found that it can be
      double gap = 0.0;
      for (uint64_t k = 0; k < size_; ++k)
        if (plan[k] != vertex_[k]) gap += gradient_[k] * (plan[k] - vertex_[k]);
      descent.gap = std::max(0.0, gap);
      descent.converged = descent.gap <= least_gap;
      if (descent.converged || descent.iterations == limit) break;
      multiply(vertex_, vertex_product_);
      // Along T + t (S - T) the value is a parabola: -gap t + curvature t^2, as S - T has no marginals.
      double curvature = 0.0;
      for (uint64_t k = 0; k < size_; ++k)
        curvature -= 2.0 * alpha_ * (vertex_[k] - plan[k]) * (vertex_product_[k] - product_[k]);
      const double step = curvature > 0.0 ? std::min(1.0, gap / (2.0 * curvature)) : 1.0;
      if (step == 1.0) {
        std::copy(vertex_, vertex_ + size_, plan);
        std::swap(product_, vertex_product_);
      } else {
        for (uint64_t k = 0; k < size_; ++k) {
          plan[k] += step * (vertex_[k] - plan[k]);
          product_[k] += step * (vertex_product_[k] - product_[k]);
        }
      }
      ++descent.iterations;
    }
    multiply(plan, product_);
    descent.cost = inner(linear_, plan);
    double distortion = 0.0;
    for (uint64_t k = 0; k < size_; ++k) distortion += plan[k] * (constant_[k] - 2.0 * product_[k]);
    descent.distortion = std::max(0.0, distortion);  // a sum of squares but for rounding
    descent.value = descent.cost + alpha_ * descent.distortion;
    return descent;
  }

  // <matrix, plan>, where infinity * 0 is 0.
  double inner(const double* matrix, const double* plan) const {
    double sum = 0.0;
    for (uint64_t i = 0; i < task_.rows; ++i)
      for (uint64_t k = i * task_.stride, end = k + task_.columns; k < end; ++k)
        if (plan[k] != 0.0) sum += matrix[k] * plan[k];
    return sum;
  }

 private:
  static double second_moment(const double* row, const double* mass, uint32_t count) {
    double sum = 0.0;
    for (uint32_t k = 0; k < count; ++k) sum += mass[k] * (row[k] * row[k]);
    return sum;
  }

  // out = X plan Y
  void multiply(const double* plan, double* out) const {
    const Kernels& k = kernels();
    const auto rows = [&](const double* left, uint64_t left_stride, uint32_t inner, const double* right,
                          double* target) {
      for_pieces(task_.rows, 16, task_.parallel, [&](uint64_t first, uint64_t last) {
        for (uint64_t i = first; i < last; ++i) {
          double* row = target + i * task_.stride;
          std::fill(row, row + task_.stride, 0.0);
          for (uint64_t l = 0; l < inner; ++l) {
            const double factor = left[i * left_stride + l];
            if (factor != 0.0) k.add_scaled(factor, right + l * task_.stride, row, task_.stride);
          }
        }
      });
    };
    rows(plan, task_.stride, task_.columns, y_, half_);
    rows(x_, x_stride_, task_.rows, half_, out);
  }

  const Task& task_;
  const double* x_;
  const uint64_t x_stride_;
  const double *y_, *linear_;
  const double alpha_;
  uint64_t size_;
  double *constant_, *gradient_, *half_, *product_, *vertex_, *vertex_product_, *f_, *g_;
};

// Solves problem `index` to `plan` [n, stride]. False if there is no answer: the report says why.
bool solve_gromov(CpuWorkspace& workspace, const Problem& problem, const Gromov& call, uint32_t index,
                  uint32_t limit, int64_t first_x, int64_t first_y, Arena& arena, bool parallel, double* plan,
                  ph_ot_gromov_report& report) {
  const double none = std::numeric_limits<double>::quiet_NaN();
  report = {PH_OT_CONVERGED, 0, 0, none, none, none, none, none, none};
  Task task;
  ph_ot_report flaw = {};
  if (!read_masses(workspace, problem, index, arena, task, flaw)) {
    report.status = flaw.status;
    report.place = flaw.place;
    return false;
  }
  task.parallel = parallel;
  const uint64_t n = task.rows, m = task.columns, stride = task.stride, x_stride = round_up(n, kStep);
  double *x = arena.doubles(n * x_stride), *y = arena.doubles(m * stride);
  double largest_x, largest_y, largest_cost = 0.0;
  if (!read_distances(call.x, task.dtype, first_x, task.rows, x_stride, 0, x, largest_x, report) ||
      !read_distances(call.y, task.dtype, first_y, task.columns, stride, n * n, y, largest_y, report))
    return false;
  const double alpha = call.host_alphas[index];
  double* linear = arena.doubles(n * stride);
  std::fill(linear, linear + n * stride, 0.0);
  for (uint64_t i = 0; i < n && problem.cost != nullptr; ++i) {
    double* row = linear + i * stride;
    kernels().read(problem.cost, task.dtype, task.first + static_cast<int64_t>(i * m), m, row);
    for (uint64_t j = 0; j < m; ++j) {
      if (!(row[j] > -INFINITY)) {
        report.status = PH_OT_NON_FINITE_COST;
        report.place = i * m + j;
        return false;
      }
      if (row[j] == INFINITY) continue;
      largest_cost = std::max(largest_cost, std::fabs(row[j]));
      row[j] *= 1.0 - alpha;
    }
  }

  const double largest = std::max(largest_x, largest_y);
  const double least_gap =
      task.tolerance * task.total * ((1.0 - alpha) * largest_cost + alpha * task.total * largest * largest);
  Objective objective(task, arena, x, x_stride, y, linear, alpha);
  uint32_t stuck;
  if (!objective.bound(plan, report.bound, stuck)) {
    report.status = PH_OT_INFEASIBLE;
    report.place = stuck;
    report.bound = none;
    return false;
  }
  Descent best = objective.descend(plan, limit, least_gap);
  double* other = arena.doubles(n * stride);
  if (best.value > report.bound + least_gap && objective.product_plan(other)) {
    const Descent second = objective.descend(other, limit, least_gap);
    if (second.value < best.value) {
      best = second;
      std::copy(other, other + n * stride, plan);
    }
  }
  report.status = best.converged ? PH_OT_CONVERGED : PH_OT_ITERATION_LIMIT;
  report.iterations = best.iterations;
  report.value = best.value;
  report.distortion = best.distortion;
  report.gap = best.gap;
  report.bound = std::min(report.bound, best.value);  // rounding may put it above
  report.cost = 0.0;
  report.marginal_error = 0.0;
  std::vector<double> columns(m, 0.0);
  for (uint64_t i = 0; i < n; ++i) {
    double sum = 0.0;
    for (uint64_t j = 0; j < m; ++j) {
      const double mass = plan[i * stride + j];
      sum += mass;
      columns[j] += mass;
    }
    report.marginal_error += std::fabs(sum - task.a[i]);
  }
  for (uint64_t j = 0; j < m; ++j) report.marginal_error += std::fabs(columns[j] - task.b[j]);
  if (problem.cost != nullptr) {
    for (uint64_t i = 0; i < n; ++i) {
      double* row = linear + i * stride;  // the costs as they are, also where their weight is 0
      kernels().read(problem.cost, task.dtype, task.first + static_cast<int64_t>(i * m), m, row);
    }
    report.cost = objective.inner(linear, plan);
  }
  return true;
}

}  // namespace

void gromov(ph_device&, Workspace& base, const Problem& problem, const Iterations& iterations,
            const Gromov& call) {
  CpuWorkspace& workspace = static_cast<CpuWorkspace&>(base);
  const Shape shape = workspace.shape();
  std::vector<int64_t> first_x = {0}, first_y = {0};
  for (uint32_t p = 0; p < shape.problems; ++p) {
    first_x.push_back(first_x.back() + shape.rows(p) * shape.rows(p));
    first_y.push_back(first_y.back() + shape.columns(p) * shape.columns(p));
  }
  for_problems(workspace, [&](uint32_t index, Arena& arena, bool parallel) {
    const uint64_t n = static_cast<uint64_t>(shape.rows(index)),
                   m = static_cast<uint64_t>(shape.columns(index)), stride = round_up(m, kStep);
    double* plan = arena.doubles(n * stride);
    const bool solved =
        solve_gromov(workspace, problem, call, index, settings_of(iterations, index).limit, first_x[index],
                     first_y[index], arena, parallel, plan, call.reports[index]);
    if (!solved) std::fill(plan, plan + n * stride, 0.0);
    if (call.plan == nullptr) return;
    for (uint64_t i = 0; i < n; ++i) {
      kernels().write(plan + i * stride, call.plan, workspace.options.dtype,
                      shape.host_plan_offsets[index] + static_cast<int64_t>(i * m), m);
    }
  });
}

}  // namespace ph::ot
