// Gradients of what transport gives, in doubles. The linear system of the implicit gradient is reduced to the smaller side of the
// problem, where its matrix is the Laplacian of a graph: off the diagonal nothing is positive, and rows add up to 0. Its
// elimination then needs no subtraction (Grassmann, Taksar and Heyman), and loses no digits where epsilon is small and the
// graph nearly falls apart. Where the side is too large for that, and where entries are not kept, conjugate gradients.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/error.h"
#include "ot/sinkhorn_cpu.h"

namespace ph::ot {

namespace {

constexpr uint32_t kMostEliminated = 1024;
// Parts of a graph joined by less than this, relative to their mass, are as good as apart: what flows between them is below
// the rounding of what flows within.
constexpr double kApart = 1e-14;

// [diag r (1 + row_excess), T; T', diag c (1 + column_excess)] [alpha; beta] = [u; v].
struct System {
  uint32_t rows, columns;
  const double *r, *c;
  double row_excess, column_excess;
  double *u, *v;  // changed
  double *alpha, *beta;

  bool pinned() const { return row_excess == 0.0 && column_excess == 0.0; }
};

// Takes out what u and v have along the null direction (1, -1).
void make_consistent(const System& system) {
  if (!system.pinned()) return;
  double difference = 0.0, count = 0.0;
  for (uint32_t i = 0; i < system.rows; ++i)
    if (system.r[i] > 0.0) difference += system.u[i], ++count;
  for (uint32_t j = 0; j < system.columns; ++j)
    if (system.c[j] > 0.0) difference -= system.v[j], ++count;
  const double shift = difference / count;
  for (uint32_t i = 0; i < system.rows; ++i) system.u[i] -= system.r[i] > 0.0 ? shift : 0.0;
  for (uint32_t j = 0; j < system.columns; ++j) system.v[j] += system.c[j] > 0.0 ? shift : 0.0;
}

// Solves for beta, columns being the smaller side, then for alpha.
void eliminate(const System& system, const double* plan, uint64_t stride, Arena& arena) {
  const Kernels& k = kernels();
  const uint32_t n = system.rows, m = system.columns;
  double* weights = arena.doubles(m * stride);  // above the diagonal: minus the matrix
  double *right = arena.doubles(stride), *excess = arena.doubles(stride), *pivots = arena.doubles(stride),
         *apart = arena.doubles(stride), *inverses = arena.doubles(n);
  const double row_factor = 1.0 / (1.0 + system.row_excess);
  for (uint32_t j = 0; j < m; ++j) {
    right[j] = system.v[j];
    apart[j] = kApart * system.c[j];
    excess[j] = system.c[j] * (1.0 + system.column_excess - row_factor);
  }
  if (system.pinned()) std::fill(excess, excess + m, 0.0);
  for (uint32_t i = 0; i < n; ++i) {
    inverses[i] = system.r[i] > 0.0 ? row_factor / system.r[i] : 0.0;
    k.add_scaled(-system.u[i] * inverses[i], plan + i * stride, right, m);
  }
  k.gram(plan, inverses, stride, n, m, weights);
  k.eliminate(weights, stride, m, apart, right, excess, pivots);
  for (uint32_t i = m; i-- > 0;) {
    system.beta[i] = 0.0;
    if (pivots[i] == 0.0) continue;
    system.beta[i] =
        (right[i] + k.dot(weights + i * stride + i + 1, system.beta + i + 1, m - i - 1)) / pivots[i];
  }
  for (uint32_t i = 0; i < n; ++i) {
    system.alpha[i] = 0.0;
    if (system.r[i] > 0.0)
      system.alpha[i] = (system.u[i] - k.dot(plan + i * stride, system.beta, m)) * row_factor / system.r[i];
  }
}

// multiply(x, out): out = T x; multiply_transposed likewise.
template <typename Multiply, typename MultiplyTransposed>
void conjugate_gradients(const System& system, Arena& arena, Multiply multiply,
                         MultiplyTransposed multiply_transposed) {
  const Kernels& k = kernels();
  const uint32_t n = system.rows, m = system.columns;
  double* rows = arena.doubles(n);
  double *residual = arena.doubles(m), *direction = arena.doubles(m), *product = arena.doubles(m),
         *scaled = arena.doubles(m);
  const double row_factor = 1.0 / (1.0 + system.row_excess);
  const auto divide = [&](double* x) {
    for (uint32_t i = 0; i < n; ++i) x[i] = system.r[i] > 0.0 ? x[i] * row_factor / system.r[i] : 0.0;
  };
  const auto apply = [&](const double* x, double* out) {
    multiply(x, rows);
    divide(rows);
    multiply_transposed(rows, out);
    for (uint32_t j = 0; j < m; ++j) out[j] = system.c[j] * (1.0 + system.column_excess) * x[j] - out[j];
  };
  const auto precondition = [&] {
    double total = 0.0, mass = 0.0;
    for (uint32_t j = 0; j < m; ++j) total += residual[j], mass += system.c[j];
    for (uint32_t j = 0; j < m; ++j) {
      if (system.pinned())
        residual[j] -= total / mass * system.c[j];  // what rounding puts along the null direction
      scaled[j] = system.c[j] > 0.0 ? residual[j] / system.c[j] : 0.0;
    }
  };
  std::copy(system.u, system.u + n, rows);
  divide(rows);
  multiply_transposed(rows, residual);
  for (uint32_t j = 0; j < m; ++j) {
    residual[j] = system.v[j] - residual[j];
    system.beta[j] = 0.0;
  }
  precondition();
  std::copy(scaled, scaled + m, direction);
  double size = k.dot(residual, scaled, m);
  const double enough = 1e-26 * size;
  const uint32_t limit = 10 * std::min(n, m) + 100;
  for (uint32_t i = 0; i < limit && size > enough; ++i) {
    apply(direction, product);
    const double curvature = k.dot(direction, product, m);
    if (!(curvature > 0.0)) break;
    k.add_scaled(size / curvature, direction, system.beta, m);
    k.add_scaled(-size / curvature, product, residual, m);
    precondition();
    const double next = k.dot(residual, scaled, m);
    for (uint32_t j = 0; j < m; ++j) direction[j] = scaled[j] + next / size * direction[j];
    size = next;
  }
  multiply(system.beta, rows);
  for (uint32_t i = 0; i < n; ++i) system.alpha[i] = system.u[i] - rows[i];
  divide(system.alpha);
}

// A plan whose entries are kept.
struct KeptPlan {
  const double* entries;
  uint32_t rows, columns;
  uint64_t stride;
  bool parallel;

  void multiply(const double* x, double* out) const {
    for_pieces(rows, kChunkRows, parallel, [&](uint64_t first, uint64_t last) {
      for (uint64_t i = first; i < last; ++i) out[i] = kernels().dot(entries + i * stride, x, columns);
    });
  }
  void multiply_transposed(const double* x, double* out) const {
    for_pieces(columns, kTileColumns, parallel, [&](uint64_t first, uint64_t last) {
      std::fill(out + first, out + last, 0.0);
      for (uint32_t i = 0; i < rows; ++i)
        kernels().add_scaled(x[i], entries + i * stride + first, out + first, last - first);
    });
  }
};

const double* transposed_plan(const double* plan, uint32_t n, uint32_t m, uint64_t stride,
                              uint64_t out_stride, Arena& arena) {
  double* out = arena.doubles(m * out_stride);
  for (uint32_t j = 0; j < m; ++j) {
    for (uint32_t i = 0; i < n; ++i) out[j * out_stride + i] = plan[i * stride + j];
    std::fill(out + j * out_stride + n, out + (j + 1) * out_stride, 0.0);
  }
  return out;
}

void solve_system(const System& system, const KeptPlan& plan, Arena& arena) {
  make_consistent(system);
  if (std::min(system.rows, system.columns) > kMostEliminated) {
    conjugate_gradients(
        system, arena, [&](const double* x, double* out) { plan.multiply(x, out); },
        [&](const double* x, double* out) { plan.multiply_transposed(x, out); });
  } else if (system.columns <= system.rows) {
    eliminate(system, plan.entries, plan.stride, arena);
  } else {
    const System other = {system.columns,    system.rows, system.c, system.r,    system.column_excess,
                          system.row_excess, system.v,    system.u, system.beta, system.alpha};
    const uint64_t stride = round_up(system.rows, kStep);
    eliminate(other, transposed_plan(plan.entries, system.rows, system.columns, plan.stride, stride, arena),
              stride, arena);
  }
}

// What comes with the points of one side.
struct PointSide {
  const void* source;  // as they were given
  int64_t first;
  uint32_t count;
};

// From sums over the other side to the gradient of a point. `weights`: sum of the weights, `sums` [dimension]: sum of
// weight * the other point, which becomes the gradient.
void finish_point(const Task& task, const PointSide& side, const double* point, uint64_t step, uint32_t index,
                  double weights, double* sums) {
  const uint32_t d = task.points.dimension;
  if (task.points.kind == PH_OT_SQEUCLIDEAN || task.points.kind == PH_OT_EUCLIDEAN) {
    for (uint32_t k = 0; k < d; ++k) sums[k] = weights * point[k * step] - sums[k];
    return;
  }
  for (uint32_t k = 0; k < d; ++k) sums[k] = -sums[k];
  if (task.points.kind == PH_OT_DOT) return;
  // Through x / |x|: what is along the point goes.
  double along = 0.0, norm = 0.0;
  for (uint32_t k = 0; k < d; ++k) {
    double own;
    kernels().read(side.source, task.dtype, (side.first + index) * static_cast<int64_t>(d) + k, 1, &own);
    norm = std::hypot(norm, own);
    along += sums[k] * point[k * step];
  }
  for (uint32_t k = 0; k < d; ++k) sums[k] = norm > 0.0 ? (sums[k] - along * point[k * step]) / norm : 0.0;
}

// From the gradients of costs to the weights that finish_point takes.
void weigh_costs(const Task& task, const double* cost, uint64_t count, double* gradient) {
  if (task.points.kind == PH_OT_SQEUCLIDEAN) kernels().scale(2.0, gradient, count);
  if (task.points.kind != PH_OT_EUCLIDEAN) return;
  for (uint64_t i = 0; i < count; ++i)
    gradient[i] = cost[i] > 0.0 && cost[i] < INFINITY ? gradient[i] / cost[i] : 0.0;
}

struct Output {
  void* target;
  int64_t first;
  uint64_t count;
};

// One problem's backward pass.
class Pass {
 public:
  Pass(CpuWorkspace& workspace, const Problem& problem, const Potentials& potentials,
       const Iterations& iterations, const Backward& call, uint32_t index, Arena& arena, bool parallel)
      : workspace_(workspace),
        problem_(problem),
        potentials_(potentials),
        iterations_(iterations),
        call_(call),
        index_(index),
        arena_(arena),
        parallel_(parallel),
        shape_(workspace.shape()) {}

  void run() {
    ph_ot_report report = potentials_.reports[index_];
    const uint64_t n = static_cast<uint64_t>(shape_.rows(index_)), stride = round_up(columns(), kStep);
    const bool streaming = workspace_.options.streaming;
    if (!streaming) cost_ = arena_.doubles(n * stride);
    if (!read_task(workspace_, problem_, index_, Purpose::kReuse, arena_, parallel_, cost_, task_, report)) {
      zero();
      return;
    }
    scaled_ = read_potentials(workspace_, potentials_, index_, task_, arena_);
    d_cost_ = upstream(call_.d_cost);
    d_value_ = upstream(call_.d_value);
    for (double** each : {&row_, &r_, &u_, &grad_a_}) *each = arena_.doubles(round_up(n, kStep));
    for (double** each : {&column_, &c_, &v_, &grad_b_}) *each = arena_.doubles(stride);
    std::fill(row_, row_ + n, 0.0);
    std::fill(column_, column_ + stride, 0.0);
    std::fill(grad_a_, grad_a_ + n, 0.0);
    std::fill(grad_b_, grad_b_ + stride, 0.0);
    if (streaming) stream();
    else keep();
    write(grad_a_, {call_.grad_a, shape_.host_row_offsets[index_], n});
    write(grad_b_, {call_.grad_b, shape_.host_column_offsets[index_], columns()});
  }

 private:
  uint64_t columns() const { return static_cast<uint64_t>(shape_.columns(index_)); }

  double upstream(const void* gradients) const {
    double value = 0.0;
    if (gradients != nullptr) kernels().read(gradients, workspace_.options.dtype, index_, 1, &value);
    return value;
  }
  void write(const double* values, const Output& output) const {
    if (output.target != nullptr)
      kernels().write(values, output.target, workspace_.options.dtype, output.first, output.count);
  }

  void zero() {
    const uint64_t n = static_cast<uint64_t>(shape_.rows(index_)), m = columns(),
                   d = workspace_.options.dimension;
    double* zeros = arena_.doubles(std::max({n * m, n * d, m * d}));
    std::fill(zeros, zeros + std::max({n * m, n * d, m * d}), 0.0);
    const int64_t row = shape_.host_row_offsets[index_], column = shape_.host_column_offsets[index_];
    write(zeros, {call_.grad_cost, shape_.host_plan_offsets[index_], n * m});
    write(zeros, {call_.grad_x, row * static_cast<int64_t>(d), n * d});
    write(zeros, {call_.grad_y, column * static_cast<int64_t>(d), m * d});
    write(zeros, {call_.grad_a, row, n});
    write(zeros, {call_.grad_b, column, m});
  }

  // What the value's gradient with respect to masses is without a detour, and for finite penalties.
  void add_value_to_masses() {
    const auto add = [&](const double* mass, const double* potential, const double* sums, uint32_t count,
                         double penalty, double* gradient) {
      for (uint32_t i = 0; i < count; ++i) {
        if (mass[i] == 0.0) continue;
        if (std::isinf(penalty)) {
          if (std::isfinite(potential[i])) gradient[i] += d_value_ * potential[i] * task_.epsilon;
        } else {
          gradient[i] += d_value_ * penalty * (1.0 - sums[i] / mass[i]);
        }
      }
    };
    add(task_.a, scaled_.row, r_, task_.rows, task_.row_penalty, grad_a_);
    add(task_.b, scaled_.column, c_, task_.columns, task_.column_penalty, grad_b_);
  }

  // u and v begin as the potentials' own gradients.
  void read_upstream() {
    const uint32_t n = task_.rows, m = task_.columns;
    std::fill(u_, u_ + n, 0.0);
    std::fill(v_, v_ + task_.stride, 0.0);
    if (call_.d_f != nullptr) kernels().read(call_.d_f, task_.dtype, shape_.host_row_offsets[index_], n, u_);
    if (call_.d_g != nullptr)
      kernels().read(call_.d_g, task_.dtype, shape_.host_column_offsets[index_], m, v_);
    for (uint32_t i = 0; i < n; ++i)
      if (scaled_.row[i] == -INFINITY) u_[i] = 0.0;
    for (uint32_t j = 0; j < m; ++j)
      if (scaled_.column[j] == -INFINITY) v_[j] = 0.0;
  }

  System system() {
    return {task_.rows,
            task_.columns,
            r_,
            c_,
            std::isinf(task_.row_penalty) ? 0.0 : task_.epsilon / task_.row_penalty,
            std::isinf(task_.column_penalty) ? 0.0 : task_.epsilon / task_.column_penalty,
            u_,
            v_,
            row_,
            column_};
  }

  void add_solution_to_masses() {
    const auto add = [&](const double* mass, const double* sums, uint32_t count, double penalty,
                         const double* solution, double* gradient) {
      for (uint32_t i = 0; i < count; ++i) {
        if (mass[i] == 0.0) continue;
        gradient[i] += task_.epsilon * solution[i] * (std::isinf(penalty) ? 1.0 : sums[i] / mass[i]);
      }
    };
    add(task_.a, r_, task_.rows, task_.row_penalty, row_, grad_a_);
    add(task_.b, c_, task_.columns, task_.column_penalty, column_, grad_b_);
  }

  // ---- entries that are kept ---------------------------------------------------------------------------------

  void keep() {
    const uint32_t n = task_.rows;
    const uint64_t stride = task_.stride;
    plan_ = arena_.doubles(n * stride);
    gradient_ = arena_.doubles(n * stride);
    for_rows([&](uint64_t i) {
      double* row = plan_ + i * stride;
      if (potentials_.plan != nullptr) {
        kernels().read(potentials_.plan, task_.dtype, task_.first + static_cast<int64_t>(i) * task_.columns,
                       task_.columns, row);
        std::fill(row + task_.columns, row + stride, 0.0);
      } else {
        kernels().plan_row(cost_ + i * stride, scaled_.row[i], scaled_.column, 1.0 / task_.epsilon,
                           static_cast<uint32_t>(stride), row);
      }
      r_[i] = 0.0;
      for (uint64_t j = 0; j < task_.columns; ++j) r_[i] += row[j];
    });
    std::fill(c_, c_ + stride, 0.0);
    for (uint32_t i = 0; i < n; ++i) kernels().add_scaled(1.0, plan_ + i * stride, c_, stride);

    double explicit_part = d_cost_ + d_value_, factor = 0.0;
    const bool through = call_.mode == PH_OT_IMPLICIT || call_.mode == PH_OT_UNROLLED;
    if (!through || (call_.mode == PH_OT_IMPLICIT && call_.d_plan == nullptr && call_.d_f == nullptr &&
                     call_.d_g == nullptr && d_cost_ == 0.0)) {
      memset(gradient_, 0, n * stride * sizeof(double));
      if (call_.mode != PH_OT_DETACHED) add_value_to_masses();
    } else {
      factor = -1.0 / task_.epsilon;
      read_upstream();
      read_plan_gradient();
      if (call_.mode == PH_OT_UNROLLED) add_value_to_plan();
      else add_value_to_masses();
      for_rows_and_columns();
      if (call_.mode == PH_OT_IMPLICIT) {
        solve_system(system(), {plan_, n, task_.columns, stride, parallel_}, arena_);
        add_solution_to_masses();
      }
    }
    for_rows([&](uint64_t i) {
      kernels().gradient_row(plan_ + i * stride, row_[i] + explicit_part, column_, factor,
                             static_cast<uint32_t>(stride), gradient_ + i * stride);
    });
    if (call_.mode == PH_OT_UNROLLED) unroll();
    if (call_.grad_cost != nullptr) {
      for_rows([&](uint64_t i) {
        write(gradient_ + i * stride,
              {call_.grad_cost, task_.first + static_cast<int64_t>(i) * task_.columns, task_.columns});
      });
    }
    if (call_.grad_x != nullptr || call_.grad_y != nullptr) write_point_gradients();
  }

  template <typename Use>
  void for_rows(Use use) const {
    for_pieces(task_.rows, kChunkRows, parallel_, [&](uint64_t first, uint64_t last) {
      for (uint64_t i = first; i < last; ++i) use(i);
    });
  }

  // G, 0 where the cost is infinite.
  void read_plan_gradient() {
    const uint64_t stride = task_.stride;
    for_rows([&](uint64_t i) {
      double* row = gradient_ + i * stride;
      const double* from = nullptr;
      if (call_.d_plan != nullptr) {
        kernels().read(call_.d_plan, task_.dtype, task_.first + static_cast<int64_t>(i) * task_.columns,
                       task_.columns, row);
        std::fill(row + task_.columns, row + stride, 0.0);
        from = row;
      }
      kernels().add_costs(cost_ + i * stride, d_cost_, from, static_cast<uint32_t>(stride), row);
    });
  }

  // The value as a function of the plan: <T, C> + epsilon sum T (log T - 1), whose derivative is f + g where T is above 0.
  void add_value_to_plan() {
    const auto extra = [&](const double* mass, const double* sums, const double* potential, uint32_t count,
                           double penalty, double* gradient, double* out) {
      for (uint32_t i = 0; i < count; ++i) {
        out[i] = std::isfinite(potential[i]) ? potential[i] * task_.epsilon : 0.0;
        if (std::isinf(penalty) || mass[i] == 0.0) continue;
        if (sums[i] > 0.0) out[i] += penalty * std::log(sums[i] / mass[i]);
        gradient[i] += d_value_ * penalty * (1.0 - sums[i] / mass[i]);
      }
    };
    if (d_value_ == 0.0) return;
    double *rows = arena_.doubles(task_.rows), *columns = arena_.doubles(task_.stride);
    std::fill(columns, columns + task_.stride, 0.0);
    extra(task_.a, r_, scaled_.row, task_.rows, task_.row_penalty, grad_a_, rows);
    extra(task_.b, c_, scaled_.column, task_.columns, task_.column_penalty, grad_b_, columns);
    for_rows([&](uint64_t i) {
      double* row = gradient_ + i * task_.stride;
      for (uint64_t j = 0; j < task_.columns; ++j)
        if (cost_[i * task_.stride + j] < INFINITY) row[j] += d_value_ * (rows[i] + columns[j]);
    });
  }

  // u += (T o G) 1 / epsilon, v likewise.
  void for_rows_and_columns() {
    double* sums = arena_.doubles(task_.stride);
    std::fill(sums, sums + task_.stride, 0.0);
    for (uint32_t i = 0; i < task_.rows; ++i) {
      u_[i] += kernels().weigh(plan_ + i * task_.stride, gradient_ + i * task_.stride,
                               static_cast<uint32_t>(task_.stride), sums) /
               task_.epsilon;
    }
    kernels().add_scaled(1.0 / task_.epsilon, sums, v_, task_.stride);
  }

  void write_point_gradients() {
    const uint32_t n = task_.rows, m = task_.columns, d = task_.points.dimension;
    const uint64_t stride = task_.stride;
    const int64_t row = shape_.host_row_offsets[index_], column = shape_.host_column_offsets[index_];
    double* row_weights = arena_.doubles(n);
    double* column_weights = arena_.doubles(stride);
    double* sums = arena_.doubles(static_cast<uint64_t>(n) * d);
    for_rows([&](uint64_t i) {
      double* weights = gradient_ + i * stride;
      weigh_costs(task_, cost_ + i * stride, stride, weights);
      row_weights[i] = 0.0;
      for (uint32_t j = 0; j < m; ++j) row_weights[i] += weights[j];
      if (call_.grad_x == nullptr) return;
      kernels().dots(weights, task_.points.y, stride, d, static_cast<uint32_t>(stride), sums + i * d);
      finish_point(task_, {problem_.x, row, n}, task_.points.x + i * d, 1, static_cast<uint32_t>(i),
                   row_weights[i], sums + i * d);
      write(sums + i * d, {call_.grad_x, (row + static_cast<int64_t>(i)) * d, d});
    });
    if (call_.grad_y == nullptr) return;
    double* transposed_sums = arena_.doubles(d * stride);
    double* gradients = arena_.doubles(static_cast<uint64_t>(m) * d);
    std::fill(transposed_sums, transposed_sums + d * stride, 0.0);
    std::fill(column_weights, column_weights + stride, 0.0);
    for_pieces(stride, kTileColumns, parallel_, [&](uint64_t first, uint64_t last) {
      for (uint32_t i = 0; i < n; ++i) {
        const double* weights = gradient_ + i * stride + first;
        kernels().add_scaled(1.0, weights, column_weights + first, last - first);
        for (uint32_t k = 0; k < d; ++k)
          kernels().add_scaled(task_.points.x[static_cast<uint64_t>(i) * d + k], weights,
                               transposed_sums + k * stride + first, last - first);
      }
      for (uint64_t j = first; j < std::min<uint64_t>(last, m); ++j) {
        double* own = gradients + j * d;
        for (uint32_t k = 0; k < d; ++k) own[k] = transposed_sums[k * stride + j];
        finish_point(task_, {problem_.y, column, m}, task_.points.y + j, stride, static_cast<uint32_t>(j),
                     column_weights[j], own);
        write(own, {call_.grad_y, (column + static_cast<int64_t>(j)) * d, d});
      }
    });
  }

  // ---- through the iterations --------------------------------------------------------------------------------

  // gradient_ holds what is explicit; u_ and v_ are the gradients of the last potentials.
  void unroll() {
    const Kernels& k = kernels();
    const uint32_t n = task_.rows;
    const uint64_t stride = task_.stride;
    double *start = arena_.doubles(stride), *g = arena_.doubles(stride), *f = arena_.doubles(n),
           *scratch = arena_.doubles(n * stride);
    read_start(task_, iterations_.warm_g, shape_.host_column_offsets[index_], start);
    std::copy(start, start + stride, g);
    std::vector<HalfStep> history;
    ph_ot_report report = potentials_.reports[index_];
    Task again = task_;
    double largest = 0.0;
    for (uint64_t i = 0; i < n; ++i)
      largest = std::max(largest, k.extremes(cost_ + i * stride, stride).largest);
    again.largest = largest;
    solve(again, settings_of(iterations_, index_), arena_, cost_, scratch, f, g, report, &history);
    double *rows = arena_.doubles(n), *columns = arena_.doubles(stride), *most = arena_.doubles(stride),
           *totals = arena_.doubles(stride);
    for (size_t step = history.size(); step-- > 0;) {
      const HalfStep& made = history[step];
      const double epsilon = made.epsilon, inverse = 1.0 / epsilon;
      const Task& task = task_;
      if (made.rows) {
        const double damping =
            std::isinf(task.row_penalty) ? 1.0 : task.row_penalty / (task.row_penalty + epsilon);
        const double* before = step > 0 ? history[step - 1].potential.data() : start;
        std::fill(columns, columns + stride, -INFINITY);
        for (uint32_t j = 0; j < task.columns; ++j)
          if (task.b[j] > 0.0) columns[j] = before[j] * inverse;
        for (uint32_t i = 0; i < n; ++i) {
          const double own = u_[i] * made.relaxation * damping;
          u_[i] *= 1.0 - made.relaxation;
          if (task.a[i] == 0.0 || own == 0.0) continue;
          double top, total;
          k.log_row(cost_ + i * stride, columns, inverse, static_cast<uint32_t>(stride), scratch, &top,
                    &total);
          if (total == 0.0) continue;
          k.add_scaled(own / total, scratch, gradient_ + i * stride, stride);
          k.add_scaled(-own / total, scratch, v_, stride);
          grad_a_[i] += own * epsilon / task.a[i];
        }
      } else {
        const double damping =
            std::isinf(task.column_penalty) ? 1.0 : task.column_penalty / (task.column_penalty + epsilon);
        const double* before = history[step - 1].potential.data();
        for (uint32_t i = 0; i < n; ++i) rows[i] = task.a[i] > 0.0 ? before[i] * inverse : -INFINITY;
        k.log_columns(cost_, stride, n, rows, inverse, 0, static_cast<uint32_t>(stride), scratch, most,
                      totals);
        std::fill(columns, columns + stride, 0.0);
        for (uint32_t j = 0; j < task.columns; ++j) {
          const double own = v_[j] * made.relaxation * damping;
          v_[j] *= 1.0 - made.relaxation;
          if (task.b[j] == 0.0 || totals[j] == 0.0) continue;
          columns[j] = own / totals[j];
          grad_b_[j] += own * epsilon / task.b[j];
        }
        for (uint32_t i = 0; i < n; ++i) {
          u_[i] -= k.dot(scratch + i * stride, columns, stride);
          k.multiply(1.0, columns, scratch + i * stride, stride);
          k.add_scaled(1.0, scratch + i * stride, gradient_ + i * stride, stride);
        }
      }
    }
  }

  // ---- entries that are not kept -----------------------------------------------------------------------------

  static constexpr uint64_t kPiece = 16;
  static constexpr uint64_t kTile = 6 * kTileColumns;

  // Calls use(row, column, wide, costs, plan) for all tiles; costs and plan may be overwritten.
  template <typename Use>
  void tiles(const Task& task, const double* row, const double* column, uint64_t first, uint64_t last,
             Use use) {
    double *cost = tiles_ + first / kPiece * kTile, *plan = cost + 4 * kTileColumns;
    for (uint64_t i = first; i < last; i += 4) {
      const uint32_t count = static_cast<uint32_t>(std::min<uint64_t>(4, last - i));
      for (uint64_t j = 0; j < task.stride; j += kTileColumns) {
        const uint32_t wide = static_cast<uint32_t>(std::min<uint64_t>(kTileColumns, task.stride - j));
        task.costs(static_cast<uint32_t>(i), count, static_cast<uint32_t>(j), wide, cost, wide);
        for (uint32_t r = 0; r < count; ++r) {
          kernels().plan_row(cost + r * wide, row[i + r], column + j, 1.0 / task.epsilon, wide, plan);
          use(i + r, j, wide, cost + r * wide, plan);
        }
      }
    }
  }

  void stream() {
    const uint32_t n = task_.rows, m = task_.columns;
    const Task other = transposed(task_, arena_);
    tiles_ = arena_.doubles((std::max(n, m) / kPiece + 1) * kTile);
    const uint64_t padded = std::max(task_.stride, other.stride);
    double *x = arena_.doubles(padded), *ones = arena_.doubles(padded);
    std::fill(ones, ones + padded, 1.0);
    // out = T x, or T' x; or of T o C.
    const auto multiply = [&](bool flip, bool costs, const double* from, double* out) {
      const Task& task = flip ? other : task_;
      std::fill(x, x + padded, 0.0);
      std::copy(from, from + task.columns, x);
      for_pieces(task.rows, kPiece, parallel_, [&](uint64_t first, uint64_t last) {
        std::fill(out + first, out + last, 0.0);
        tiles(task, flip ? scaled_.column : scaled_.row, flip ? scaled_.row : scaled_.column, first, last,
              [&](uint64_t i, uint64_t j, uint32_t wide, double* cost, double* plan) {
                if (costs) {
                  kernels().add_costs(cost, 1.0, nullptr, wide, cost);
                  kernels().multiply(1.0, cost, plan, wide);
                }
                out[i] += kernels().dot(plan, x + j, wide);
              });
      });
    };
    multiply(false, false, ones, r_);
    multiply(true, false, ones, c_);
    double factor = 0.0;
    if (call_.mode == PH_OT_IMPLICIT && (call_.d_f != nullptr || call_.d_g != nullptr || d_cost_ != 0.0)) {
      factor = -d_cost_ / task_.epsilon;
      read_upstream();
      double* weighted = arena_.doubles(padded);
      multiply(false, true, ones, weighted);
      kernels().add_scaled(-factor, weighted, u_, n);
      multiply(true, true, ones, weighted);
      kernels().add_scaled(-factor, weighted, v_, m);
      make_consistent(system());
      conjugate_gradients(
          system(), arena_, [&](const double* from, double* out) { multiply(false, false, from, out); },
          [&](const double* from, double* out) { multiply(true, false, from, out); });
      add_solution_to_masses();
    }
    if (call_.mode != PH_OT_DETACHED) add_value_to_masses();
    const auto point_gradient = [&](bool flip, void* target, const PointSide& side) {
      if (target == nullptr) return;
      const Task& task = flip ? other : task_;
      const double *own = flip ? column_ : row_, *against = flip ? row_ : column_;
      const uint32_t d = task.points.dimension;
      std::fill(x, x + padded, 0.0);
      std::copy(against, against + task.columns, x);
      double* sums = arena_.doubles(static_cast<uint64_t>(task.rows) * d);
      double* some = arena_.doubles((task.rows / kPiece + 1) * d);
      for_pieces(task.rows, kPiece, parallel_, [&](uint64_t first, uint64_t last) {
        double weights[kPiece] = {};
        double* product = some + first / kPiece * d;
        std::fill(sums + first * d, sums + last * d, 0.0);
        tiles(task, flip ? scaled_.column : scaled_.row, flip ? scaled_.row : scaled_.column, first, last,
              [&](uint64_t i, uint64_t j, uint32_t wide, double* cost, double* plan) {
                double* gradient = plan + kTileColumns;
                kernels().add_costs(cost, 1.0, nullptr, wide, gradient);
                kernels().gradient_row(plan, own[i] + d_cost_ + d_value_, x + j, factor, wide, gradient);
                weigh_costs(task, cost, wide, gradient);
                kernels().dots(gradient, task.points.y + j, task.points.stride, d, wide, product);
                for (uint32_t k = 0; k < d; ++k) sums[i * d + k] += product[k];
                for (uint32_t c = 0; c < wide; ++c) weights[i - first] += gradient[c];
              });
        for (uint64_t i = first; i < last; ++i) {
          finish_point(task, side, task.points.x + i * d, 1, static_cast<uint32_t>(i), weights[i - first],
                       sums + i * d);
          write(sums + i * d, {target, (side.first + static_cast<int64_t>(i)) * d, d});
        }
      });
    };
    point_gradient(false, call_.grad_x, {problem_.x, shape_.host_row_offsets[index_], n});
    point_gradient(true, call_.grad_y, {problem_.y, shape_.host_column_offsets[index_], m});
  }

  CpuWorkspace& workspace_;
  const Problem& problem_;
  const Potentials& potentials_;
  const Iterations& iterations_;
  const Backward& call_;
  const uint32_t index_;
  Arena& arena_;
  const bool parallel_;
  const Shape shape_;
  Task task_ = {};
  ScaledPotentials scaled_ = {};
  double d_cost_ = 0.0, d_value_ = 0.0;
  double *cost_ = nullptr, *plan_ = nullptr, *gradient_ = nullptr, *tiles_ = nullptr;
  double *row_, *column_;  // alpha and beta, 0 where nothing is solved
  double *r_, *c_;         // marginals of the plan
  double *u_, *v_;
  double *grad_a_, *grad_b_;
};

}  // namespace

void backward(ph_device&, Workspace& base, const Problem& problem, const Potentials& potentials,
              const Iterations& iterations, const Backward& call) {
  CpuWorkspace& workspace = static_cast<CpuWorkspace&>(base);
  for_problems(workspace, [&](uint32_t index, Arena& arena, bool parallel) {
    Pass(workspace, problem, potentials, iterations, call, index, arena, parallel).run();
  });
}

}  // namespace ph::ot
