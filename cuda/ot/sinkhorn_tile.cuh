// Sinkhorn's iterations of a small problem, all of them on chip: see tile.cuh.
//
// The kernel K = exp((f + g - C) / epsilon) lies in registers, and an iteration multiplies it by scalings: u = a / (K v), v =
// b / (K' u), two multiply-adds an entry and a barrier. The plan is u K v. A problem begins, and every epsilon of scaling,
// with an iteration in logarithms, after which no row or column of K can vanish; a scaling that leaves 2^-32 .. 2^32 moves
// all of them into the potentials, and K is computed again. What K loses to underflow is thus below 2^-60 of a sum, and what
// potentials lose when they are rounded to float is in the scalings, as K is computed from the rounded ones to the last bit
// (reduced_cost). The marginal error of an iterate is known when the next one's rows have been summed; where it is small
// enough, that next iterate, whose error is smaller, is the result, and its error is measured again.
//
// Costs are read once and the plan is written once, through shared memory and coalesced; nothing else is in global memory.
#pragma once

#include "ot/tile.cuh"

namespace ph::ot {

struct SinkhornCall {
  Batch batch;
  const int32_t* limits;
  int32_t limit;
  const float* warm_g;
  float relaxation;
  double scaling;
  float *f, *g, *plan;
  ph_ot_report* reports;
};

constexpr float kLeastScaling = 0x1p-32f, kMostScaling = 0x1p32f;
constexpr float kLeastFactor = 0x1p-100f, kMostFactor = 0x1p100f;  // of a step
constexpr float kMostPower = 100.0f;
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// What is known of a problem's masses. `unit`: the total of a and of the plan where marginals hold; else 1.
struct Masses {
  double a_total, b_total, unit;
  unsigned long long fault;
};

template <typename L>
__device__ __forceinline__ Masses read_masses(Tile<L>& tile, const Batch& batch) {
  Masses masses = {1.0, 1.0, 1.0, kNoFault};
  const auto add = [&](const float* values, uint32_t count, uint32_t place) {
    if (values == nullptr) return 1.0;
    double total = 0.0;
    for (uint32_t i = tile.thread; i < count; i += tile.threads) {
      const float mass = values[i];
      if (!(mass >= 0.0f && mass <= FLT_MAX)) masses.fault = min(masses.fault, 0ull + place + i);
      total += mass;
    }
    return tile.combine_block(total, Add{});
  };
  masses.a_total = add(batch.a == nullptr ? nullptr : batch.a + tile.row_offset(), tile.rows, 0);
  masses.b_total =
      add(batch.b == nullptr ? nullptr : batch.b + tile.column_offset(), tile.columns, tile.rows);
  if (batch.a == nullptr && batch.b == nullptr) return masses;
  masses.fault = tile.combine_block(masses.fault, Min{});
  if (masses.fault != kNoFault) return masses;
  const bool balanced = isinf(batch.row_penalty) && isinf(batch.column_penalty);
  const double most = fmax(masses.a_total, masses.b_total);
  if (!(masses.a_total > 0.0 && masses.b_total > 0.0) ||
      (balanced && fabs(masses.a_total - masses.b_total) > 1e-4 * most))
    masses.fault = 0ull + tile.rows + tile.columns;
  if (balanced) masses.unit = masses.a_total;
  return masses;
}

// A problem without an answer: everything 0.
template <typename L>
__device__ __forceinline__ void write_nothing(const Tile<L>& tile, const SinkhornCall& call, uint32_t status,
                                              unsigned long long place, uint32_t iterations, double epsilon) {
  for (uint32_t i = tile.thread; i < tile.block_rows && call.f != nullptr; i += tile.threads)
    call.f[tile.row_offset() + tile.first_row + i] = 0.0f;
  for (uint32_t j = tile.thread; j < tile.columns && call.g != nullptr && tile.rank == 0; j += tile.threads)
    call.g[tile.column_offset() + j] = 0.0f;
  const unsigned long long first = static_cast<unsigned long long>(tile.first_row) * tile.columns,
                           count = static_cast<unsigned long long>(tile.block_rows) * tile.columns;
  for (unsigned long long i = tile.thread; i < count && call.plan != nullptr; i += tile.threads)
    call.plan[tile.plan_offset() + first + i] = 0.0f;
  if (tile.thread == 0 && tile.rank == 0)
    call.reports[tile.problem] = {status, iterations, place, NAN, NAN, NAN, epsilon};
}

// Of an iteration: all, only g from f, or neither, and just the marginal error.
enum class Step { kIterate, kColumns, kMeasure };

template <typename L>
struct TileSinkhorn {
  Tile<L>& tile;
  float kernel[L::kRows][L::kColumns];
  // Own elements; masses are in units of Masses::unit. Potentials are those in the kernel.
  float a, f, u;
  float b[L::kOwned], g[L::kOwned], v[L::kOwned];
  float scale, length;                    // log2(e) / epsilon, and epsilon * ln(2)
  float row_damping, column_damping;      // 1 where marginals hold
  float row_decay, column_decay;          // log2(e) / penalty
  float column_error = 0.0f;              // of the columns when they were last updated
  float row_sum, column_sums[L::kOwned];  // of K v and K' u, as they were last needed

  __device__ __forceinline__ bool holds_rows() const { return row_decay == 0.0f; }
  __device__ __forceinline__ bool holds_columns() const { return column_decay == 0.0f; }

  __device__ __forceinline__ void set_epsilon(double epsilon, const Batch& batch) {
    scale = fminf(static_cast<float>(kLog2E / epsilon), FLT_MAX);
    length = static_cast<float>(epsilon * kLn2);
    row_damping = holds_rows() ? 1.0f : static_cast<float>(batch.row_penalty / (batch.row_penalty + epsilon));
    column_damping =
        holds_columns() ? 1.0f : static_cast<float>(batch.column_penalty / (batch.column_penalty + epsilon));
  }

  __device__ __forceinline__ float row_potential() const {
    return a > 0.0f ? f + length * log2f(u) : -INFINITY;
  }
  __device__ __forceinline__ float column_potential(int k) const {
    return b[k] > 0.0f ? g[k] + length * log2f(v[k]) : -INFINITY;
  }

  __device__ __forceinline__ float power(float f_row, float cost, float g_column) const {
    return exp2_fast(fminf(reduced_cost(f_row, cost, g_column) * scale, kMostPower));
  }

  // K of the potentials.
  __device__ __forceinline__ void compute_kernel() {
    float f_row[L::kRows], g_column[L::kColumns];
    tile.of_rows(f, f_row);
    tile.of_columns(g, g_column);
#pragma unroll
    for (int jj = 0; jj < L::kColumns; ++jj) {
      if (jj >= static_cast<int>(tile.groups)) {
#pragma unroll
        for (int ii = 0; ii < L::kRows; ++ii) kernel[ii][jj] = 0.0f;
        continue;
      }
      float costs[L::kRows];
      tile.read_kept(jj, costs);
#pragma unroll
      for (int ii = 0; ii < L::kRows; ++ii) kernel[ii][jj] = power(f_row[ii], costs[ii], g_column[jj]);
    }
  }

  // Moves u and v into the potentials, of which the kernel has to be computed anew.
  __device__ __forceinline__ void absorb() {
    f = row_potential();
    u = a > 0.0f ? 1.0f : 0.0f;
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) {
      g[k] = column_potential(k);
      v[k] = b[k] > 0.0f ? 1.0f : 0.0f;
    }
  }

  // The scaling that makes the sum what it has to be, or with relaxation goes further. `potential` is the one in the kernel.
  __device__ __forceinline__ float next_scaling(float mass, float sum, float old, float potential,
                                                float damping, float relaxation) const {
    if (mass == 0.0f) return 0.0f;
    float next = __fdividef(mass, sum);
    if (damping != 1.0f) next = exp2f(damping * log2f(next) + (damping - 1.0f) * potential * scale);
    if (relaxation != 1.0f) next = old * exp2f(relaxation * log2f(__fdividef(next, old)));
    return fminf(fmaxf(next, kLeastFactor), kMostFactor);
  }
  static __device__ __forceinline__ bool within(float mass, float scaling) {
    return mass == 0.0f || (scaling >= kLeastScaling && scaling <= kMostScaling);
  }
  // What the marginal should be.
  __device__ __forceinline__ float row_target(float scaling) const {
    if (holds_rows() || a == 0.0f) return a;
    return a * exp2f(-(f + length * log2f(scaling)) * row_decay);
  }
  __device__ __forceinline__ float column_target(int k) const {
    return holds_columns() || b[k] == 0.0f ? b[k] : b[k] * exp2f(-column_potential(k) * column_decay);
  }
  __device__ __forceinline__ float error_of_columns(const float (&sums)[L::kOwned]) const {
    float error = 0.0f;
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) error += fabsf(fmaf(v[k], sums[k], -column_target(k)));
    return tile.sum_warp(error);
  }

  // v from sums of K' u, and whether it stayed within its range; the same in all warps.
  __device__ __forceinline__ bool update_columns(const float (&sums)[L::kOwned], float relaxation) {
    bool good = true;
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) {
      v[k] = next_scaling(b[k], sums[k], v[k], g[k], column_damping, relaxation);
      good &= within(b[k], v[k]);
    }
    column_error = relaxation != 1.0f || !holds_columns() ? error_of_columns(sums) : 0.0f;
    return __all_sync(kAllLanes, good);
  }

  // The largest potential of a column less its cost, for the thread's row.
  __device__ __forceinline__ float best_of_row(const float (&potentials)[L::kOwned]) const {
    float best[L::kRows];
#pragma unroll
    for (int ii = 0; ii < L::kRows; ++ii) best[ii] = -INFINITY;
    tile.for_kept_columns([&](uint32_t owner, int k, const float(&costs)[L::kRows]) {
      const float potential = tile.of_owner(potentials, owner, k);
#pragma unroll
      for (int ii = 0; ii < L::kRows; ++ii) best[ii] = fmaxf(best[ii], potential - costs[ii]);
    });
    return tile.combine_row(best, Max{});
  }
  // The largest f of a row less its cost, for the thread's columns. False where a row is `isolated`.
  __device__ __forceinline__ bool best_of_columns(bool isolated, float (&best)[L::kOwned]) const {
    float f_row[L::kRows];
    tile.of_rows(f, f_row);
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) best[k] = -INFINITY;
    tile.for_kept_columns([&](uint32_t owner, int k, const float(&costs)[L::kRows]) {
      float most = -INFINITY;
#pragma unroll
      for (int ii = 0; ii < L::kRows; ++ii) most = fmaxf(most, f_row[ii] - costs[ii]);
#pragma unroll
      for (int distance = kWarp / 2; distance >= L::kLaneColumns; distance /= 2)
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, distance));
      if (owner == tile.lane_row) best[k] = most;
    });
    return !tile.combine_warps(best, 0.0f, __any_sync(kAllLanes, isolated), Max{}).flag;
  }

  // f from g in logarithms, and g so that the largest entry of every column of the kernel of both is 1. False where a row or
  // a column with mass has no partner of finite cost.
  __device__ __forceinline__ bool begin_in_logarithms() {
    float sums[L::kRows], f_row[L::kRows], largest[L::kOwned];
#pragma unroll
    for (int ii = 0; ii < L::kRows; ++ii) sums[ii] = 0.0f;
    const float row_best = best_of_row(g);
    bool isolated = a > 0.0f && row_best == -INFINITY;
    if (isolated && !holds_rows()) {
      isolated = false;
      a = 0.0f;
    }
    f = row_best == -INFINITY ? 0.0f : -row_best;
    tile.of_rows(f, f_row);
    tile.for_kept_columns([&](uint32_t owner, int k, const float(&costs)[L::kRows]) {
      const float g_column = tile.of_owner(g, owner, k);
#pragma unroll
      for (int ii = 0; ii < L::kRows; ++ii) sums[ii] += power(f_row[ii], costs[ii], g_column);
    });
    const float row_sum = tile.combine_row(sums, Add{});
    f = a > 0.0f && !isolated ? row_damping * (f + length * log2f(__fdividef(a, row_sum))) : -INFINITY;
    u = a > 0.0f ? 1.0f : 0.0f;

    const bool feasible = best_of_columns(isolated, largest);
    bool partners = true;
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) {
      if (largest[k] == -INFINITY && b[k] > 0.0f) {
        if (holds_columns()) partners = false;
        else b[k] = 0.0f;
      }
      g[k] = b[k] > 0.0f ? -largest[k] : -INFINITY;
      v[k] = b[k] > 0.0f ? 1.0f : 0.0f;
    }
    return __all_sync(kAllLanes, partners) != 0 && feasible;
  }

  struct Outcome {
    float error;  // of the iterate before, or the one that is measured
    bool good;    // scalings are in their range
  };
  // One copy of what every step needs: instructions are fetched more slowly than they are carried out.
  __device__ __forceinline__ Outcome make(Step step, float relaxation) {
    float error = 0.0f;
    bool left = false;
    if (step != Step::kColumns) {
      row_sum = tile.weighted_row(kernel, v);
      error = tile.sum_warp(tile.counts_row() ? fabsf(fmaf(u, row_sum, -row_target(u))) : 0.0f);
      if (step == Step::kIterate) {
        u = next_scaling(a, row_sum, u, f, row_damping, relaxation);
        left = __any_sync(kAllLanes, !within(a, u)) != 0;
      }
    }
    const typename Tile<L>::Sums sums = tile.weighted_columns(kernel, u, column_sums, error, left);
    if (step == Step::kMeasure) return {sums.error + error_of_columns(column_sums), true};
    const float before = column_error;
    const bool good = update_columns(column_sums, relaxation);
    return {sums.error + before, good && !sums.flag};
  }
};

// A problem that can be solved.
struct TileTask {
  Masses masses;
  float largest;    // finite |cost|
  double epsilon;   // absolute
  float tolerance;  // in the unit of masses

  template <typename L>
  __device__ __forceinline__ double row_mass(const Tile<L>& tile) const {
    const uint32_t row = tile.own_row();
    if (row >= tile.block_rows) return 0.0;
    const float* a = tile.batch.a;
    return a == nullptr ? 1.0 / tile.rows : double{a[tile.row_offset() + tile.first_row + row]};
  }
  template <typename L>
  __device__ __forceinline__ double column_mass(const Tile<L>& tile, int k) const {
    const uint32_t column = tile.own_column(k);
    if (column >= tile.columns) return 0.0;
    const float* b = tile.batch.b;
    return b == nullptr ? 1.0 / tile.columns : double{b[tile.column_offset() + column]};
  }
};

// Reads masses and costs, which the threads keep. False where there is no answer: that is written then, by write_nothing.
template <typename L, typename Call>
__device__ __forceinline__ bool begin(Tile<L>& tile, const Call& call, TileSinkhorn<L>& solver,
                                      TileTask& task) {
  const Batch& batch = call.batch;
  task.masses = read_masses(tile, batch);
  if (task.masses.fault != kNoFault) {
    write_nothing(tile, call, PH_OT_INVALID_MASS, task.masses.fault, 0, 0.0);
    return false;
  }
  const bool good = load_costs(tile, tile.entries, tile.partials, solver.kernel);
  float largest = 0.0f;
#pragma unroll
  for (int ii = 0; ii < L::kRows; ++ii) {
#pragma unroll
    for (int jj = 0; jj < L::kColumns; ++jj) {
      const float cost = fabsf(solver.kernel[ii][jj]);
      largest = fmaxf(largest, cost <= FLT_MAX ? cost : 0.0f);
    }
  }
  // Also the barrier after which points are not needed any more.
  largest = tile.combine_all(largest, Max{});
  tile.keep_entries(solver.kernel);
  const bool all_good =
      tile.ranks > 1 ? tile.combine_all(good ? 0.0f : 1.0f, Max{}) == 0.0f : __syncthreads_and(good) != 0;
  if (!all_good) {
    const unsigned long long fault = find_fault(tile);
    write_nothing(tile, call, (fault & kCostFault) != 0 ? PH_OT_NON_FINITE_COST : PH_OT_NON_FINITE_POINT,
                  fault & ~kCostFault, 0, 0.0);
    return false;
  }

  task.largest = largest;
  solver.row_decay = isinf(batch.row_penalty) ? 0.0f : static_cast<float>(kLog2E / batch.row_penalty);
  solver.column_decay =
      isinf(batch.column_penalty) ? 0.0f : static_cast<float>(kLog2E / batch.column_penalty);
  const bool balanced = solver.holds_rows() && solver.holds_columns();
  const double unit = task.masses.unit, b_unit = balanced ? task.masses.b_total : 1.0;
  solver.a = static_cast<float>(task.row_mass(tile) / unit);
#pragma unroll
  for (int k = 0; k < L::kOwned; ++k) {
    const uint32_t column = tile.own_column(k);
    solver.b[k] = static_cast<float>(task.column_mass(tile, k) / b_unit);
    float g =
        call.warm_g == nullptr || column >= tile.columns ? 0.0f : call.warm_g[tile.column_offset() + column];
    if (!(fabsf(g) <= FLT_MAX)) g = 0.0f;
    solver.g[k] = solver.b[k] > 0.0f ? g : -INFINITY;
    solver.v[k] = 1.0f;
  }

  task.epsilon = batch.epsilons == nullptr ? batch.epsilon : batch.epsilons[tile.problem];
  if (batch.relative_epsilon && largest > 0.0f) task.epsilon *= largest;
  const double tolerance = batch.tolerances == nullptr ? batch.tolerance : batch.tolerances[tile.problem];
  task.tolerance = static_cast<float>(tolerance / unit);
  return true;
}

// The end of a problem where potentials find no partner.
template <typename L>
__device__ __forceinline__ void write_infeasible(Tile<L>& tile, const SinkhornCall& call,
                                                 const TileSinkhorn<L>& solver, uint32_t iterations,
                                                 double epsilon) {
  unsigned long long place = kNoFault;
  if (tile.counts_row() && solver.a > 0.0f && solver.f == -INFINITY) place = tile.first_row + tile.own_row();
#pragma unroll
  for (int k = 0; k < L::kOwned; ++k) {
    if (tile.counts_column(k) && solver.b[k] > 0.0f && solver.g[k] == INFINITY)
      place = min(place, 0ull + tile.rows + tile.own_column(k));
  }
  place = tile.combine_all(place, Min{});
  write_nothing(tile, call, PH_OT_INFEASIBLE, place, iterations, epsilon);
}

// How the iterations ended.
struct Ending {
  bool converged;
  uint32_t iterations;
  float error;  // in the unit of masses
  double epsilon;
};

// What comes out, in the caller's unit. The solver's sums are those of its scalings.
template <typename L>
__device__ __forceinline__ void write_solution(Tile<L>& tile, const SinkhornCall& call,
                                               TileSinkhorn<L>& solver, const TileTask& task,
                                               const Ending& ending) {
  const Batch& batch = call.batch;
  const double unit = task.masses.unit, epsilon = ending.epsilon;
  double value = 0.0, cost = 0.0;
  const float f =
      solver.a > 0.0f ? solver.row_potential() + static_cast<float>(epsilon * log(unit)) : -INFINITY;
  if (tile.counts_row()) {
    const double sum = unit * solver.u * solver.row_sum, mass = task.row_mass(tile);
    if (sum > 0.0) value += sum * (f - epsilon);
    if (!solver.holds_rows() && mass > 0.0)
      value += batch.row_penalty * (mass - sum + (sum > 0.0 ? sum * log(sum / mass) : 0.0));
    if (call.f != nullptr) call.f[tile.row_offset() + tile.first_row + tile.own_row()] = f;
  }
#pragma unroll
  for (int k = 0; k < L::kOwned; ++k) {
    if (!tile.counts_column(k)) continue;
    const float g = solver.column_potential(k);
    const double sum = unit * solver.v[k] * solver.column_sums[k], mass = task.column_mass(tile, k);
    if (sum > 0.0) value += sum * g;
    if (!solver.holds_columns() && mass > 0.0)
      value += batch.column_penalty * (mass - sum + (sum > 0.0 ? sum * log(sum / mass) : 0.0));
    if (call.g != nullptr) call.g[tile.column_offset() + tile.own_column(k)] = g;
  }
  float own_cost = 0.0f;
  float u_row[L::kRows];
  tile.of_rows(static_cast<float>(unit * solver.u), u_row);
  float v_column[L::kColumns];
  tile.of_columns(solver.v, v_column);
  tile.for_entries([&](int ii, int jj, float each) {
    float& entry = solver.kernel[ii][jj];
    entry *= u_row[ii] * v_column[jj];
    if (entry > 0.0f) own_cost = fmaf(entry, each, own_cost);
  });
  cost = tile.combine_all(double{own_cost}, Add{});  // also the barrier before costs are overwritten
  value = tile.combine_all(value, Add{});
  if (tile.thread == 0 && tile.rank == 0) {
    ph_ot_report& report = call.reports[tile.problem];
    report.status = ending.converged ? PH_OT_CONVERGED : PH_OT_ITERATION_LIMIT;
    report.iterations = ending.iterations;
    report.place = 0;
    report.marginal_error = ending.error * unit;
    report.cost = cost;
    report.value = value;
    report.epsilon = epsilon;
  }
  if (call.plan != nullptr) write_entries(tile, solver.kernel, call.plan);
}

template <typename L>
__global__ void __launch_bounds__(L::kMostWarps* kWarp, L::kBlocks)
    SinkhornTileKernel(const __grid_constant__ SinkhornCall call) {
  begin_launch(call.batch);
  const Batch& batch = call.batch;
  Tile<L> tile(batch, dynamic_shared(), partial_floats<L>(blockDim.x / kWarp));

  TileSinkhorn<L> solver{tile};
  TileTask task;
  if (!begin(tile, call, solver, task)) return end_launch(batch);
  const uint32_t limit = max(call.limits == nullptr ? call.limit : call.limits[tile.problem], 1);
  // Errors are in the unit of masses here; stages end with kStageTolerance of a's total.
  const float enough = task.tolerance;
  const float loose = static_cast<float>(kStageTolerance * task.masses.a_total / task.masses.unit);

  const double target_epsilon = task.epsilon;
  double epsilon =
      call.scaling > 0.0 && limit > 1 ? fmax(target_epsilon, double{task.largest}) : target_epsilon;
  uint32_t iterations = 0;
  float error = 0.0f;
  for (;;) {
    const bool last = epsilon <= target_epsilon;
    if (last) epsilon = target_epsilon;
    const uint32_t stage_limit = last ? limit : limit - 1;
    const float stage_enough = last ? enough : fmaxf(enough, loose);
    solver.set_epsilon(epsilon, batch);
    if (!solver.begin_in_logarithms()) {
      write_infeasible(tile, call, solver, iterations + 1, target_epsilon);
      return end_launch(batch);
    }
    Step step = Step::kColumns;
    bool stale = true;
    float relaxation = 1.0f;
    for (;;) {
      if (stale) solver.compute_kernel();
      const typename TileSinkhorn<L>::Outcome outcome = solver.make(step, relaxation);
      error = outcome.error;
      if (step == Step::kMeasure) {
        if (error <= enough || iterations >= limit) break;
        stale = false;
        step = Step::kIterate;
        continue;
      }
      ++iterations;
      stale = !outcome.good;
      if (stale) solver.absorb();
      bool done = iterations >= stage_limit;
      if (step == Step::kIterate) {
        relaxation = error <= loose ? call.relaxation : 1.0f;
        done |= error <= stage_enough;
      }
      if (done && !last) break;
      step = done ? Step::kMeasure : Step::kIterate;
    }
    if (last) break;
    // Out of iterations but for one: the last one is for the problem's own epsilon.
    epsilon = iterations >= stage_limit ? target_epsilon : epsilon * call.scaling;
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) {
      const float g = solver.column_potential(k);
      solver.g[k] = solver.b[k] == 0.0f ? -INFINITY : (fabsf(g) <= FLT_MAX ? g : 0.0f);
    }
  }

  write_solution(tile, call, solver, task, {error <= enough, iterations, error, epsilon});
  end_launch(batch);
}

}  // namespace ph::ot
