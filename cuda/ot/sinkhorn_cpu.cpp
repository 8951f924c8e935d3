// Sinkhorn's iterations in doubles. Where a problem's entries are kept, the kernel K = exp((f + g - C) / epsilon) is computed
// seldom and scaled by u and v in between: an iteration is two products with K, and not one exponential an entry. A scaling
// that leaves kSmallest .. kLargest is moved into the potentials, by an update in logarithms; what K loses
// to underflow until then is less than 1e-200 of any sum.
#include "ot/sinkhorn_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace ph::ot {

namespace {

constexpr double kSmallest = 1e-50, kLargest = 1e50;

// What potentials' updates are made of, on one side: see Update in kernels_cpu.h.
struct Side {
  double* mass;
  uint32_t count;
  double penalty;

  double damping(double epsilon) const { return std::isinf(penalty) ? 1.0 : penalty / (penalty + epsilon); }
  double target(uint32_t i, double potential, double epsilon) const {
    return std::isinf(penalty) ? mass[i] : mass[i] * std::exp(-potential * epsilon / penalty);
  }
};

double relaxed(double old, double update, double relaxation) {
  return relaxation == 1.0 ? update : old + relaxation * (update - old);
}

// Both engines have, in units of epsilon, the potentials of a state whose columns were updated last.
//   start(g)            f from g, then g from f, plainly
//   measure(relaxation) the marginal error, and the next f
//   advance(relaxation) takes it, and updates g
//   potentials(g)       what another start may begin with
//   finish(...)         potentials, and marginals and cost of the plan
// start and advance are false where a row or a column with mass has no partner: `place` says which.
class Engine {
 public:
  Engine(const Task& task, Arena& arena, std::vector<HalfStep>* history)
      : task_(task), arena_(arena), history_(history) {
    rows_ = {arena.doubles(task.rows), task.rows, task.row_penalty};
    columns_ = {arena.doubles(task.stride), task.columns, task.column_penalty};
    std::copy(task.a, task.a + task.rows, rows_.mass);
    std::copy(task.b, task.b + task.stride, columns_.mass);
  }

  uint64_t place = 0;

 protected:
  // A row or column without a partner: an error, or where mass may stay behind, without mass from now on.
  bool isolated(Side& side, uint32_t i) {
    if (std::isinf(side.penalty)) {
      place = &side == &rows_ ? i : task_.rows + i;
      return false;
    }
    side.mass[i] = 0.0;
    return true;
  }
  // From f or g of one side to what is written, and back.
  void record(bool rows, const double* potential, double relaxation) {
    if (history_ == nullptr) return;
    const uint32_t count = rows ? task_.rows : task_.columns;
    HalfStep step = {rows, epsilon_, relaxation, std::vector<double>(potential, potential + count)};
    for (double& value : step.potential) value *= epsilon_;
    history_->push_back(std::move(step));
  }

  const Task& task_;
  Arena& arena_;
  std::vector<HalfStep>* history_;
  Side rows_, columns_;
  double epsilon_ = 0.0;
  double column_error_ = 0.0;
};

class KeptEngine : public Engine {
 public:
  KeptEngine(const Task& task, Arena& arena, const double* cost, double* kernel,
             std::vector<HalfStep>* history)
      : Engine(task, arena, history), cost_(cost), kernel_(kernel) {
    const uint64_t n = task.rows, stride = task.stride;
    chunks_ = (n + kChunkRows - 1) / kChunkRows;
    for (double** each : {&f_, &u_, &next_u_, &row_scratch_}) *each = arena.doubles(n);
    for (double** each : {&g_, &v_, &sums_, &largest_, &factors_}) *each = arena.doubles(stride);
    partial_ = chunks_ > 1 ? arena.doubles(chunks_ * stride) : sums_;
    errors_ = arena.doubles(chunks_);
  }

  bool start(const double* g, double epsilon) {
    epsilon_ = epsilon;
    for (uint32_t j = 0; j < task_.stride; ++j) g_[j] = columns_.mass[j] > 0.0 ? g[j] / epsilon : -INFINITY;
    std::fill(u_, u_ + task_.rows, 1.0);
    for (uint32_t j = 0; j < task_.stride; ++j) v_[j] = columns_.mass[j] > 0.0 ? 1.0 : 0.0;
    if (!rows_by_logarithms(1.0, true)) return false;
    return update_columns(1.0);
  }

  double measure(double relaxation) {
    const Update update = {rows_.mass, std::isinf(rows_.penalty) && relaxation == 1.0,
                           f_,         rows_.damping(epsilon_),
                           relaxation, std::isinf(rows_.penalty) ? 0.0 : epsilon_ / rows_.penalty};
    for_pieces(task_.rows, kChunkRows, task_.parallel, [&](uint64_t first, uint64_t last) {
      const uint64_t chunk = first / kChunkRows;
      errors_[chunk] =
          kernels().iterate(kernel_, task_.stride, static_cast<uint32_t>(first), static_cast<uint32_t>(last),
                            update, u_, v_, next_u_, partial_ + chunk * task_.stride);
    });
    double error = column_error_;
    for (uint64_t chunk = 0; chunk < chunks_; ++chunk) error += errors_[chunk];
    return error;
  }

  bool advance(double relaxation) {
    if (within(next_u_, rows_)) {
      std::swap(u_, next_u_);
      sum_chunks();
      if (history_ != nullptr) {
        for (uint32_t i = 0; i < task_.rows; ++i) row_scratch_[i] = row_potential(i);
        record(true, row_scratch_, relaxation);
      }
    } else {
      absorb_columns();
      if (!rows_by_logarithms(relaxation, false)) return false;
    }
    return update_columns(relaxation);
  }

  // What start takes.
  void potentials(double* g) const {
    for (uint32_t j = 0; j < task_.columns; ++j) g[j] = epsilon_ * column_potential(j);
  }

  // <plan, cost>
  double cost() const {
    double total = 0.0;
    for (uint32_t i = 0; i < task_.rows; ++i) {
      for (uint32_t j = 0; j < task_.columns; ++j) {
        const double entry = kernel_[i * task_.stride + j] * v_[j];
        if (entry > 0.0) total += u_[i] * entry * cost_[i * task_.stride + j];
      }
    }
    return total;
  }

  // Leaves the plan where the kernel was. Returns <plan, cost>.
  double finish(double* f, double* g, double* row_sums, double* column_sums) {
    for_pieces(task_.rows, kChunkRows, task_.parallel, [&](uint64_t first, uint64_t last) {
      const uint64_t chunk = first / kChunkRows;
      errors_[chunk] =
          kernels().finish(kernel_, cost_, task_.stride, static_cast<uint32_t>(first),
                           static_cast<uint32_t>(last), u_, v_, row_sums, partial_ + chunk * task_.stride);
    });
    sum_chunks();
    std::copy(sums_, sums_ + task_.columns, column_sums);
    for (uint32_t i = 0; i < task_.rows; ++i) f[i] = row_potential(i);
    for (uint32_t j = 0; j < task_.columns; ++j) g[j] = column_potential(j);
    double total = 0.0;
    for (uint64_t chunk = 0; chunk < chunks_; ++chunk) total += errors_[chunk];
    return total;
  }

 private:
  double row_potential(uint32_t i) const { return rows_.mass[i] > 0.0 ? f_[i] + std::log(u_[i]) : -INFINITY; }
  double column_potential(uint32_t j) const {
    return columns_.mass[j] > 0.0 ? g_[j] + std::log(v_[j]) : -INFINITY;
  }
  static bool within(const double* scaling, const Side& side) {
    bool good = true;
    for (uint32_t i = 0; i < side.count; ++i)
      good &= side.mass[i] == 0.0 || (scaling[i] >= kSmallest && scaling[i] <= kLargest);
    return good;
  }

  void sum_chunks() {
    if (chunks_ == 1) return;
    memset(sums_, 0, task_.stride * sizeof(double));
    for (uint64_t chunk = 0; chunk < chunks_; ++chunk)
      kernels().add_scaled(1.0, partial_ + chunk * task_.stride, sums_, task_.stride);
  }
  void absorb_columns() {
    for (uint32_t j = 0; j < task_.columns; ++j) g_[j] = column_potential(j);
  }

  // f from g, which holds all of the columns' potentials; u, v = 1, K is the plan, and sums_ those of its columns.
  bool rows_by_logarithms(double relaxation, bool first_time) {
    const double damping = rows_.damping(epsilon_), inverse = 1.0 / epsilon_;
    for (uint64_t chunk = 0; chunk < chunks_; ++chunk) errors_[chunk] = -1.0;
    for_pieces(task_.rows, kChunkRows, task_.parallel, [&](uint64_t first, uint64_t last) {
      double* sums = partial_ + first / kChunkRows * task_.stride;
      memset(sums, 0, task_.stride * sizeof(double));
      for (uint64_t i = first; i < last; ++i) {
        double* row = kernel_ + i * task_.stride;
        double largest, total;
        const bool present = rows_.mass[i] > 0.0;
        if (present) {
          kernels().log_row(cost_ + i * task_.stride, g_, inverse, static_cast<uint32_t>(task_.stride), row,
                            &largest, &total);
          if (total == 0.0 && errors_[first / kChunkRows] < 0.0)
            errors_[first / kChunkRows] = static_cast<double>(i);
        }
        if (!present || total == 0.0) {
          memset(row, 0, task_.stride * sizeof(double));
          row_scratch_[i] = -INFINITY;
          if (present && std::isfinite(rows_.penalty)) rows_.mass[i] = 0.0;
          continue;
        }
        const double update = damping * (std::log(rows_.mass[i]) - largest - std::log(total));
        const double old = first_time ? update : row_potential(static_cast<uint32_t>(i));
        row_scratch_[i] = relaxed(old, update, relaxation);
        const double factor = std::exp(row_scratch_[i] + largest);
        kernels().scale(factor, row, task_.stride);
        kernels().add_scaled(1.0, row, sums, task_.stride);
      }
    });
    for (uint64_t chunk = 0; chunk < chunks_; ++chunk) {
      if (errors_[chunk] >= 0.0 && !isolated(rows_, static_cast<uint32_t>(errors_[chunk]))) return false;
    }
    for (uint32_t i = 0; i < task_.rows; ++i) {
      f_[i] = row_scratch_[i];
      u_[i] = rows_.mass[i] > 0.0 ? 1.0 : 0.0;
    }
    for (uint32_t j = 0; j < task_.columns; ++j) v_[j] = columns_.mass[j] > 0.0 ? 1.0 : 0.0;
    sum_chunks();
    record(true, f_, relaxation);
    return true;
  }

  // g from sums_, the columns' products with u.
  bool update_columns(double relaxation) {
    const double damping = columns_.damping(epsilon_);
    const bool plain = std::isinf(columns_.penalty) && relaxation == 1.0;
    column_error_ = 0.0;
    bool good = true;
    double* next = factors_;
    for (uint32_t j = 0; j < task_.columns; ++j) {
      const double mass = columns_.mass[j];
      if (mass == 0.0) {
        next[j] = 0.0;
        continue;
      }
      if (plain) {
        next[j] = mass / sums_[j];
      } else {
        const double old = std::log(v_[j]),
                     update = damping * (std::log(mass) + g_[j] - std::log(sums_[j])) - g_[j];
        const double scaling = relaxed(old, update, relaxation);
        next[j] = std::exp(scaling);
        column_error_ += std::fabs(next[j] * sums_[j] - columns_.target(j, g_[j] + scaling, epsilon_));
      }
      good &= next[j] >= kSmallest && next[j] <= kLargest;
    }
    if (!good) return columns_by_logarithms(relaxation);
    std::copy(next, next + task_.columns, v_);
    if (history_ != nullptr) {
      for (uint32_t j = 0; j < task_.columns; ++j) next[j] = column_potential(j);
      record(false, next, relaxation);
    }
    return true;
  }

  // g from f, with u moved into it; u, v = 1 and K is the plan.
  bool columns_by_logarithms(double relaxation) {
    const double damping = columns_.damping(epsilon_), inverse = 1.0 / epsilon_;
    for (uint32_t i = 0; i < task_.rows; ++i) f_[i] = row_potential(i);
    for_pieces(task_.stride, 64, task_.parallel, [&](uint64_t first, uint64_t last) {
      kernels().log_columns(cost_, task_.stride, task_.rows, f_, inverse, static_cast<uint32_t>(first),
                            static_cast<uint32_t>(last), kernel_, largest_, sums_);
    });
    column_error_ = 0.0;
    for (uint32_t j = 0; j < task_.stride; ++j) {
      factors_[j] = 0.0;
      if (j >= task_.columns || columns_.mass[j] == 0.0) continue;
      if (sums_[j] == 0.0) {
        if (!isolated(columns_, j)) return false;
        g_[j] = -INFINITY;
        continue;
      }
      const double update = damping * (std::log(columns_.mass[j]) - largest_[j] - std::log(sums_[j]));
      g_[j] = relaxed(column_potential(j), update, relaxation);
      factors_[j] = std::exp(g_[j] + largest_[j]);
      column_error_ += std::fabs(factors_[j] * sums_[j] - columns_.target(j, g_[j], epsilon_));
    }
    for_pieces(task_.rows, kChunkRows, task_.parallel, [&](uint64_t first, uint64_t last) {
      for (uint64_t i = first; i < last; ++i)
        kernels().multiply(1.0, factors_, kernel_ + i * task_.stride, task_.stride);
    });
    for (uint32_t i = 0; i < task_.rows; ++i) u_[i] = rows_.mass[i] > 0.0 ? 1.0 : 0.0;
    for (uint32_t j = 0; j < task_.columns; ++j) v_[j] = columns_.mass[j] > 0.0 ? 1.0 : 0.0;
    record(false, g_, relaxation);
    return true;
  }

  const double* cost_;
  double* kernel_;
  uint64_t chunks_;
  double *f_, *g_;            // potentials in the kernel, over epsilon
  double *u_, *next_u_, *v_;  // scalings
  double *row_scratch_, *sums_, *largest_, *factors_;
  double *partial_, *errors_;  // of chunks
};

// Keeps no entries: all updates are in logarithms, and costs are computed again for each.
class StreamingEngine : public Engine {
 public:
  StreamingEngine(const Task& task, Arena& arena, std::vector<HalfStep>* history)
      : Engine(task, arena, history), other_(transposed(task, arena)) {
    const uint64_t padded = round_up(task.rows, kStep);
    for (double** each : {&f_, &next_f_}) *each = arena.doubles(padded);
    g_ = arena.doubles(task.stride);
    sums_ = arena.doubles(std::max(padded, task.stride));
    std::fill(f_, f_ + padded, -INFINITY);
    std::fill(next_f_, next_f_ + padded, -INFINITY);
    std::fill(g_, g_ + task.stride, -INFINITY);
    const uint64_t pieces = (std::max(task.rows, task.columns) + kPiece - 1) / kPiece;
    tiles_ = arena.doubles(pieces * kTile);
  }

  bool start(const double* g, double epsilon) {
    epsilon_ = epsilon;
    for (uint32_t j = 0; j < task_.columns; ++j) g_[j] = columns_.mass[j] > 0.0 ? g[j] / epsilon : -INFINITY;
    measure(1.0, true);
    return advance(1.0);
  }

  double measure(double relaxation, bool first_time = false) {
    logarithms(task_, g_);
    double error = column_error_;
    for (uint32_t i = 0; i < task_.rows; ++i) {
      next_f_[i] = -INFINITY;
      if (rows_.mass[i] == 0.0) continue;
      isolated_row_ |= sums_[i] == -INFINITY;
      const double update = rows_.damping(epsilon_) * (std::log(rows_.mass[i]) - sums_[i]);
      next_f_[i] = first_time ? update : relaxed(f_[i], update, relaxation);
      if (!first_time) error += std::fabs(std::exp(f_[i] + sums_[i]) - rows_.target(i, f_[i], epsilon_));
    }
    return error;
  }

  bool advance(double relaxation) {
    for (uint32_t i = 0; i < task_.rows && isolated_row_; ++i) {
      if (next_f_[i] != INFINITY) continue;
      if (!isolated(rows_, i)) return false;
      next_f_[i] = -INFINITY;
    }
    isolated_row_ = false;
    std::swap(f_, next_f_);
    record(true, f_, relaxation);
    logarithms(other_, f_);
    column_error_ = 0.0;
    for (uint32_t j = 0; j < task_.columns; ++j) {
      if (columns_.mass[j] == 0.0) continue;
      if (sums_[j] == -INFINITY) {
        if (!isolated(columns_, j)) return false;
        g_[j] = -INFINITY;
        continue;
      }
      const double update = columns_.damping(epsilon_) * (std::log(columns_.mass[j]) - sums_[j]);
      g_[j] = relaxed(g_[j], update, relaxation);
      column_error_ += std::fabs(std::exp(g_[j] + sums_[j]) - columns_.target(j, g_[j], epsilon_));
    }
    record(false, g_, relaxation);
    return true;
  }

  void potentials(double* g) const {
    for (uint32_t j = 0; j < task_.columns; ++j) g[j] = epsilon_ * g_[j];
  }

  double finish(double* f, double* g, double* row_sums, double* column_sums) {
    const double inverse = 1.0 / epsilon_;
    double* costs = arena_.doubles(task_.rows);
    for_pieces(task_.rows, kPiece, task_.parallel, [&](uint64_t first, uint64_t last) {
      double *tile = tiles_ + first / kPiece * kTile, *plan = tile + 4 * kTileColumns;
      for (uint64_t i = first; i < last; ++i) row_sums[i] = costs[i] = 0.0;
      for_tiles(task_, first, last, tile, [&](uint64_t i, uint64_t j, uint32_t wide, const double* cost) {
        kernels().plan_row(cost, f_[i], g_ + j, inverse, wide, plan);
        double* ignored = plan + kTileColumns;
        double one = 1.0, sum;
        costs[i] += kernels().finish(plan, cost, wide, 0, 1, &one, ones(), &sum, ignored);
        row_sums[i] += sum;
      });
    });
    logarithms(other_, f_);
    for (uint32_t j = 0; j < task_.columns; ++j)
      column_sums[j] = columns_.mass[j] > 0.0 ? std::exp(g_[j] + sums_[j]) : 0.0;
    double total = 0.0;
    for (uint32_t i = 0; i < task_.rows; ++i) total += costs[i];
    std::copy(f_, f_ + task_.rows, f);
    std::copy(g_, g_ + task_.columns, g);
    return total;
  }

 private:
  static constexpr uint64_t kPiece = 16;
  static constexpr uint64_t kTile = 6 * kTileColumns;

  static const double* ones() {
    static const std::vector<double> values(kTileColumns, 1.0);
    return values.data();
  }

  template <typename Use>
  static void for_tiles(const Task& task, uint64_t first, uint64_t last, double* tile, Use use) {
    for (uint64_t i = first; i < last; i += 4) {
      const uint32_t count = static_cast<uint32_t>(std::min<uint64_t>(4, last - i));
      for (uint64_t j = 0; j < task.stride; j += kTileColumns) {
        const uint32_t wide = static_cast<uint32_t>(std::min<uint64_t>(kTileColumns, task.stride - j));
        task.costs(static_cast<uint32_t>(i), count, static_cast<uint32_t>(j), wide, tile, wide);
        for (uint32_t r = 0; r < count; ++r) use(i + r, j, wide, tile + r * wide);
      }
    }
  }

  // sums_[i] = log sum_j exp(potential_j - cost_ij / epsilon)
  void logarithms(const Task& task, const double* potential) {
    const double inverse = 1.0 / epsilon_;
    for_pieces(task.rows, kPiece, task.parallel, [&](uint64_t first, uint64_t last) {
      double *tile = tiles_ + first / kPiece * kTile, *power = tile + 4 * kTileColumns;
      double largest[kPiece], total[kPiece];
      std::fill(largest, largest + kPiece, -INFINITY);
      std::fill(total, total + kPiece, 0.0);
      for_tiles(task, first, last, tile, [&](uint64_t i, uint64_t j, uint32_t wide, const double* cost) {
        double top, sum;
        kernels().log_row(cost, potential + j, inverse, wide, power, &top, &sum);
        double &own_top = largest[i - first], &own = total[i - first];
        if (top == -INFINITY) return;
        if (top > own_top) {
          own = own * std::exp(own_top - top) + sum;
          own_top = top;
        } else {
          own += sum * std::exp(top - own_top);
        }
      });
      for (uint64_t i = first; i < last; ++i) sums_[i] = largest[i - first] + std::log(total[i - first]);
    });
  }

  const Task other_;
  double *f_, *next_f_, *g_, *sums_, *tiles_;
  bool isolated_row_ = false;
};

// KL(p | q) of what was transported from the masses.
double divergence(const double* sums, const double* masses, uint32_t count) {
  double total = 0.0;
  for (uint32_t i = 0; i < count; ++i) {
    total += masses[i] - sums[i];
    if (sums[i] > 0.0) total += sums[i] * std::log(sums[i] / masses[i]);
  }
  return total;
}

// Potentials and what a report says of the plan.
template <typename Solver>
void finish(Solver& solver, const Task& task, double epsilon, Arena& arena, double* f, double* g,
            ph_ot_report& report) {
  double* row_sums = arena.doubles(task.rows);
  double* column_sums = arena.doubles(task.stride);
  report.cost = solver.finish(f, g, row_sums, column_sums);
  double total = 0.0, value = 0.0, error = 0.0;
  const auto add_side = [&](const double* sums, const double* masses, double* potentials, uint32_t count,
                            double penalty) {
    for (uint32_t i = 0; i < count; ++i) {
      potentials[i] *= epsilon;
      if (masses[i] == 0.0 || potentials[i] == -INFINITY) continue;
      const double target = std::isinf(penalty) ? masses[i] : masses[i] * std::exp(-potentials[i] / penalty);
      error += std::fabs(sums[i] - target);
      if (sums[i] > 0.0) value += sums[i] * potentials[i];
    }
    if (std::isfinite(penalty)) value += penalty * divergence(sums, masses, count);
  };
  add_side(row_sums, task.a, f, task.rows, task.row_penalty);
  add_side(column_sums, task.b, g, task.columns, task.column_penalty);
  for (uint32_t i = 0; i < task.rows; ++i) total += row_sums[i];
  report.marginal_error = error;
  report.value = value - epsilon * total;
}

template <typename Solver>
bool run(Solver& solver, const Task& task, const IterationSettings& settings, Arena& arena, double* f,
         double* g, ph_ot_report& report) {
  const double loose = kStageTolerance * task.total;
  // A little below the tolerance: the error is measured again at the end, in another order.
  const double tolerance = std::max(task.tolerance - 1e-14 * task.total, 0.5 * task.tolerance);
  double epsilon = settings.scaling > 0.0 ? std::max(task.epsilon, task.largest) : task.epsilon;
  if (settings.limit < 2) epsilon = task.epsilon;
  uint32_t iterations = 0;
  bool converged = false;
  for (bool last = false; !last;) {
    last = epsilon <= task.epsilon;
    if (last) epsilon = task.epsilon;
    const double enough = last ? tolerance : std::max(tolerance, loose);
    const uint32_t limit = last ? settings.limit : settings.limit - 1;
    double relaxation = 1.0;
    bool feasible = solver.start(g, epsilon);
    ++iterations;
    for (; feasible; ++iterations) {
      const double error = solver.measure(relaxation);
      converged = error <= enough;
      if (converged || iterations >= limit) break;
      feasible = solver.advance(relaxation);
      relaxation = error <= loose ? settings.relaxation : 1.0;
    }
    if (!feasible) {
      report.status = PH_OT_INFEASIBLE;
      report.place = solver.place;
      report.iterations = iterations;
      return false;
    }
    if (last) break;
    // Out of iterations but for one: the last one is for the problem's own epsilon.
    epsilon = iterations >= limit ? task.epsilon : epsilon * settings.scaling;
    solver.potentials(g);
    for (uint32_t j = 0; j < task.stride; ++j) g[j] = std::isfinite(g[j]) ? g[j] : 0.0;
  }
  finish(solver, task, epsilon, arena, f, g, report);
  report.iterations = iterations;
  report.status =
      converged && report.marginal_error <= task.tolerance ? PH_OT_CONVERGED : PH_OT_ITERATION_LIMIT;
  return true;
}

// Proximal points: T_k = exp((f + g - C) / (epsilon / k)). Every one starts from the scalings of the one before, on top of its
// plan: g over its epsilon goes on by as much as it went last time.
bool run_proximal(KeptEngine& solver, const Task& task, const IterationSettings& settings, uint32_t inner,
                  Arena& arena, const double* cost, double* f, double* g, ph_ot_report& report) {
  const double tolerance = std::max(task.tolerance - 1e-14 * task.total, 0.5 * task.tolerance);
  double* before = arena.doubles(task.stride);
  std::fill(before, before + task.stride, 0.0);
  double epsilon = task.epsilon;
  uint32_t made = 0;
  bool converged = false;
  while (!converged && made < settings.limit) {
    epsilon = task.epsilon / (made + 1);
    for (uint32_t j = 0; j < task.columns && made > 0; ++j) {
      if (!std::isfinite(g[j])) continue;  // without mass
      const double scaled = g[j] * made / task.epsilon;
      g[j] = (2.0 * scaled - before[j]) * epsilon;
      before[j] = scaled;
    }
    if (!solver.start(g, epsilon)) {
      report.status = PH_OT_INFEASIBLE;
      report.place = solver.place;
      report.iterations = made;
      return false;
    }
    for (uint32_t iteration = 1; iteration < inner; ++iteration) {
      solver.measure(1.0);
      if (!solver.advance(1.0)) break;
    }
    ++made;
    solver.potentials(g);
    if (solver.measure(1.0) > tolerance) continue;
    // The most that any potentials f can add to these g is a bound from below on the least cost.
    double bound = 0.0;
    for (uint32_t j = 0; j < task.columns; ++j)
      if (task.b[j] > 0.0) bound += task.b[j] * g[j];
    double paid = solver.cost();
    for (uint32_t i = 0; i < task.rows; ++i) {
      if (task.a[i] == 0.0) continue;
      double least = INFINITY;
      for (uint32_t j = 0; j < task.columns; ++j)
        if (task.b[j] > 0.0) least = std::min(least, cost[i * task.stride + j] - g[j]);
      bound += task.a[i] * least;
    }
    converged = paid - bound <= task.tolerance * task.total * task.largest;
  }
  finish(solver, task, epsilon, arena, f, g, report);
  report.epsilon = epsilon;
  report.iterations = made;
  report.status =
      converged && report.marginal_error <= task.tolerance ? PH_OT_CONVERGED : PH_OT_ITERATION_LIMIT;
  return true;
}

}  // namespace

IterationSettings settings_of(const Iterations& iterations, uint32_t index) {
  const int32_t limit = iterations.limits == nullptr ? iterations.limit : iterations.limits[index];
  return {static_cast<uint32_t>(std::max(limit, 1)), iterations.relaxation, iterations.scaling};
}

bool solve(const Task& task, const IterationSettings& settings, Arena& arena, const double* cost,
           double* plan, double* f, double* g, ph_ot_report& report, std::vector<HalfStep>* history) {
  if (plan == nullptr) {
    StreamingEngine solver(task, arena, history);
    return run(solver, task, settings, arena, f, g, report);
  }
  KeptEngine solver(task, arena, cost, plan, history);
  return run(solver, task, settings, arena, f, g, report);
}

void read_start(const Task& task, const void* warm_g, int64_t first, double* g) {
  std::fill(g, g + task.stride, 0.0);
  if (warm_g == nullptr) return;
  kernels().read(warm_g, task.dtype, first, task.columns, g);
  for (uint32_t j = 0; j < task.columns; ++j)
    if (!std::isfinite(g[j])) g[j] = 0.0;
}

void write_solution(const CpuWorkspace& workspace, uint32_t index, bool solved, bool parallel, double* f,
                    double* g, double* plan, const Solution& solution) {
  const Shape shape = workspace.shape();
  const uint64_t n = static_cast<uint64_t>(shape.rows(index)),
                 m = static_cast<uint64_t>(shape.columns(index)), stride = round_up(m, kStep);
  if (!solved) {
    std::fill(f, f + n, 0.0);
    std::fill(g, g + m, 0.0);
    if (plan != nullptr) std::fill(plan, plan + n * stride, 0.0);
  }
  const Kernels& k = kernels();
  const uint32_t dtype = workspace.options.dtype;
  if (solution.f != nullptr) k.write(f, solution.f, dtype, shape.host_row_offsets[index], n);
  if (solution.g != nullptr) k.write(g, solution.g, dtype, shape.host_column_offsets[index], m);
  if (solution.plan == nullptr) return;
  for_pieces(n, kChunkRows, parallel, [&](uint64_t first, uint64_t last) {
    for (uint64_t i = first; i < last; ++i) {
      k.write(plan + i * stride, solution.plan, dtype,
              shape.host_plan_offsets[index] + static_cast<int64_t>(i * m), m);
    }
  });
}

void sinkhorn(ph_device&, Workspace& base, const Problem& problem, const Iterations& iterations,
              const Solution& solution) {
  CpuWorkspace& workspace = static_cast<CpuWorkspace&>(base);
  const Shape shape = workspace.shape();
  for_problems(workspace, [&](uint32_t index, Arena& arena, bool parallel) {
    const uint32_t n = static_cast<uint32_t>(shape.rows(index)),
                   m = static_cast<uint32_t>(shape.columns(index));
    const uint64_t stride = round_up(m, kStep);
    double *cost = nullptr, *plan = nullptr;
    if (!workspace.options.streaming) {
      cost = arena.doubles(n * stride);
      plan = arena.doubles(n * stride);
    }
    double *f = arena.doubles(n), *g = arena.doubles(stride);
    ph_ot_report& report = solution.reports[index];
    Task task;
    bool solved = read_task(workspace, problem, index, Purpose::kSolve, arena, parallel, cost, task, report);
    if (solved) {
      read_start(task, iterations.warm_g, shape.host_column_offsets[index], g);
      solved = solve(task, settings_of(iterations, index), arena, cost, plan, f, g, report, nullptr);
    }
    write_solution(workspace, index, solved, parallel, f, g, plan, solution);
  });
}

void proximal(ph_device&, Workspace& base, const Problem& problem, const Iterations& iterations,
              uint32_t inner, const Solution& solution) {
  CpuWorkspace& workspace = static_cast<CpuWorkspace&>(base);
  const Shape shape = workspace.shape();
  for_problems(workspace, [&](uint32_t index, Arena& arena, bool parallel) {
    const uint64_t n = static_cast<uint64_t>(shape.rows(index)),
                   stride = round_up(static_cast<uint64_t>(shape.columns(index)), kStep);
    double *cost = arena.doubles(n * stride), *plan = arena.doubles(n * stride);
    double *f = arena.doubles(n), *g = arena.doubles(stride);
    ph_ot_report& report = solution.reports[index];
    Task task;
    bool solved = read_task(workspace, problem, index, Purpose::kSolve, arena, parallel, cost, task, report);
    if (solved) {
      read_start(task, nullptr, 0, g);
      KeptEngine solver(task, arena, cost, plan, nullptr);
      solved = run_proximal(solver, task, settings_of(iterations, index), inner, arena, cost, f, g, report);
    }
    write_solution(workspace, index, solved, parallel, f, g, plan, solution);
  });
}

}  // namespace ph::ot
