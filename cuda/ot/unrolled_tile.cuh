// Gradients of the iterations themselves of a small problem, on chip: see tile.cuh.
//
// The iterations are made again, in logarithms, and are then gone through from the last to the first: with P = softmax over a row
// of (g - C) / epsilon, an update of f passes on what is asked of f to g and C, by -P and P, and likewise one of g to f. What is
// asked of C lies in registers, costs in shared memory. P is computed anew of costs, of the potentials that it was made of and of
// its sums; potentials are pairs of floats, a power of whose second takes up what the first lacks: no digit of a
// potential is lost, however small epsilon is.
//
// States of iterations are kept in global memory, as few as that takes: of the last kSegment iterations all, of the last
// kSegment^2 every kSegment-th, and so on for kLevels levels; from there iterations are made again. Up to kSegment^kLevels =
// 4,096 iterations that is once for every level, and more often beyond; memory does not depend on how many there were.
//
// An iteration takes two passes of exponentials over the entries whenever it is made, and two when it is gone through. Costs are
// read once, but for point gradients, and gradients are written once.
#pragma once

#include "ot/backward_tile.cuh"
#include "ot/sinkhorn_tile.cuh"

namespace ph::ot {

struct UnrolledCall : BackwardCall {
  const int32_t* limits;
  int32_t limit;
  const float* warm_g;
  float relaxation;
  double scaling;
  float* scratch;         // of all thread blocks of a launch
  uint64_t block_floats;  // of one
};

constexpr uint32_t kSegment = 8, kLevels = 4;
// The start, all of a segment with the state before it, and kSegment for every level above.
constexpr uint32_t kStates = 1 + kSegment + 1 + (kLevels - 1) * kSegment;

// How an iteration was made, and how the next one is.
struct UnrolledStep {
  double epsilon, next_epsilon;
  float relaxation, next_relaxation, column_error;
  uint32_t starts;  // whether the next one is the first of its epsilon
};

// Floats of a thread block's scratch memory: states, which are f and g in pairs and the step, and the largest and the sums of
// softmaxes of a segment's iterations.
template <typename L>
__host__ __device__ constexpr uint32_t pair_floats(uint32_t warps) {
  return 2 * (warps * L::kWarpRows + L::kMostColumns);
}
template <typename L>
__host__ __device__ constexpr uint32_t state_floats(uint32_t warps) {
  return pair_floats<L>(warps) + sizeof(UnrolledStep) / sizeof(float);
}
template <typename L>
__host__ __device__ constexpr uint64_t unrolled_floats(uint32_t warps) {
  return kStates * state_floats<L>(warps) + kSegment * pair_floats<L>(warps);
}

// Shared memory of UnrolledTileKernel, in floats: points pass through the entries first.
template <typename L>
struct UnrolledShared : BackwardShared<L> {
  __host__ __device__ explicit UnrolledShared(uint32_t warps) : BackwardShared<L>(warps) {
    const uint32_t staged = staged_floats<L>(warps), others = this->entries - this->vectors;
    if (staged > this->vectors) this->vectors = staged;
    this->entries = this->vectors + others;
  }
};

// begin() of a problem that has no answer any more.
template <typename L>
__device__ __forceinline__ void write_nothing(const Tile<L>& tile, const UnrolledCall& call, uint32_t,
                                              unsigned long long, uint32_t, double) {
  clear_gradients(tile, call);
}

// A potential that is the sum of both; or a softmax: exp((base + potential - C) / epsilon) / sum.
struct FloatPair {
  float first, second;
};
__device__ __forceinline__ FloatPair pair_of(double value) {
  const float first = static_cast<float>(value);
  return {first, fabsf(first) <= FLT_MAX ? static_cast<float>(value - first) : 0.0f};
}
__device__ __forceinline__ double sum_of(FloatPair pair) { return double{pair.first} + pair.second; }

template <typename L>
struct TileUnrolled {
  Tile<L>& tile;
  const UnrolledCall& call;
  const TileTask& task;
  TileSinkhorn<L>& solver;  // masses, and what epsilon makes
  PlanTile<L>& gradient;    // what is asked of costs
  uint32_t limit;
  float loose, enough;
  // Of the iteration that was made last: potentials, softmaxes, and how it was made.
  FloatPair f, row_softmax, g[L::kOwned], column_softmax[L::kOwned];
  UnrolledStep step;
  // What is asked of f and g, and of masses; that of b is in shared memory, where warp 0 has it.
  float f_gradient, a_gradient, g_gradient[L::kOwned];
  float* b_gradient;

  // ---- iterations, forward -----------------------------------------------------------------------------------------

  __device__ __forceinline__ void begin_iterations() {
    limit = max(call.limits == nullptr ? call.limit : call.limits[tile.problem], 1);
    loose = static_cast<float>(kStageTolerance * task.masses.a_total / task.masses.unit);
    enough = task.tolerance;
    step = {};
    step.next_epsilon =
        call.scaling > 0.0 && limit > 1 ? fmax(task.epsilon, double{task.largest}) : task.epsilon;
    step.next_relaxation = 1.0f;
    step.starts = 1;
    f = {-INFINITY, 0.0f};
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) g[k] = {solver.g[k], 0.0f};
  }

  __device__ __forceinline__ void set_epsilon() { solver.set_epsilon(step.epsilon, call.batch); }
  __device__ __forceinline__ float power_of(double exponent) const {
    return exp2f(fminf(static_cast<float>(exponent * solver.scale), kMostPower));
  }

  // Iteration `number`, which counts from 1, as SinkhornTileKernel makes it.
  __device__ __forceinline__ void iterate(uint32_t number) {
    const bool first = step.starts != 0;
    step.epsilon = step.next_epsilon;
    step.relaxation = step.next_relaxation;
    set_epsilon();
    const float row_error = tile.sum_warp(update_rows(first));
    const float before = step.column_error, error = update_columns(row_error) + before;
    step.next_relaxation = !first && error <= loose ? call.relaxation : 1.0f;
    const bool out = number >= limit - 1;  // of iterations, but for the last epsilon
    step.starts = step.epsilon > task.epsilon && (out || (!first && error <= fmaxf(enough, loose))) ? 1 : 0;
    if (step.starts == 0) return;
    step.next_epsilon = out ? task.epsilon : fmax(step.epsilon * call.scaling, task.epsilon);
    step.next_relaxation = 1.0f;
  }

  // f from g; the part of the marginal error before that this lane has.
  __device__ __forceinline__ float update_rows(bool first) {
    float potential[L::kOwned], power[L::kOwned], rows[L::kRows], base[L::kRows];
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) {
      potential[k] = g[k].first;
      power[k] = power_of(g[k].second);
    }
#pragma unroll
    for (int ii = 0; ii < L::kRows; ++ii) rows[ii] = -INFINITY;
    tile.for_kept_columns([&](uint32_t owner, int k, const float(&costs)[L::kRows]) {
      const float g_column = tile.of_owner(potential, owner, k);
#pragma unroll
      for (int ii = 0; ii < L::kRows; ++ii) rows[ii] = fmaxf(rows[ii], g_column - costs[ii]);
    });
    const float best = tile.combine_row(rows, Max{});
    if (best == -INFINITY) solver.a = 0.0f;  // where mass may stay behind
    row_softmax.first = best == -INFINITY ? 0.0f : -best;
    tile.of_rows(row_softmax.first, base);
#pragma unroll
    for (int ii = 0; ii < L::kRows; ++ii) rows[ii] = 0.0f;
    tile.for_kept_columns([&](uint32_t owner, int k, const float(&costs)[L::kRows]) {
      const float g_column = tile.of_owner(potential, owner, k), v_column = tile.of_owner(power, owner, k);
#pragma unroll
      for (int ii = 0; ii < L::kRows; ++ii)
        rows[ii] = fmaf(solver.power(base[ii], costs[ii], g_column), v_column, rows[ii]);
    });
    const float sum = tile.combine_row(rows, Add{}), a = solver.a;
    row_softmax.second = sum;
    if (!(a > 0.0f && sum > 0.0f)) {
      f = {-INFINITY, 0.0f};
      return 0.0f;
    }
    double update = row_softmax.first + step.epsilon * kLn2 * log2f(a / sum);
    if (!solver.holds_rows()) update *= call.batch.row_penalty / (call.batch.row_penalty + step.epsilon);
    float error = 0.0f;
    if (!first) {
      const double old = sum_of(f);
      const float target = solver.holds_rows() ? a : a * exp2f(static_cast<float>(-old * solver.row_decay));
      error = tile.counts_row() ? fabsf(power_of(old - row_softmax.first) * sum - target) : 0.0f;
      update = old + double{step.relaxation} * (update - old);
    }
    f = pair_of(update);
    return error;
  }

  // g from f; the rows' error of all lanes, and then its own for the next iteration.
  __device__ __forceinline__ float update_columns(float row_error) {
    float f_row[L::kRows], u_row[L::kRows], base[L::kOwned], own[L::kOwned];
    spread_rows(f_row, u_row);
    // Values of a column's rows combined over the lanes that have them, for those that have the column's element.
    const auto combine_lane_rows = [&](uint32_t owner, float value, float& to, auto combine) {
#pragma unroll
      for (int distance = kWarp / 2; distance >= L::kLaneColumns; distance /= 2)
        value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
      if (owner == tile.lane_row) to = value;
    };
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) own[k] = -INFINITY;
    tile.for_kept_columns([&](uint32_t owner, int k, const float(&costs)[L::kRows]) {
      float most = -INFINITY;
#pragma unroll
      for (int ii = 0; ii < L::kRows; ++ii) most = fmaxf(most, f_row[ii] - costs[ii]);
      combine_lane_rows(owner, most, own[k], Max{});
    });
    const float error = tile.combine_warps(own, row_error, false, Max{}).error;
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) {
      if (own[k] == -INFINITY) solver.b[k] = 0.0f;
      column_softmax[k].first = base[k] = own[k] == -INFINITY ? 0.0f : -own[k];
      own[k] = 0.0f;
    }
    tile.for_kept_columns([&](uint32_t owner, int k, const float(&costs)[L::kRows]) {
      const float base_column = tile.of_owner(base, owner, k);
      float sum = 0.0f;
#pragma unroll
      for (int ii = 0; ii < L::kRows; ++ii)
        sum = fmaf(solver.power(f_row[ii], costs[ii], base_column), u_row[ii], sum);
      combine_lane_rows(owner, sum, own[k], Add{});
    });
    tile.combine_warps(own, 0.0f, false, Add{});
    const double length = step.epsilon * kLn2,
                 damping = call.batch.column_penalty / (call.batch.column_penalty + step.epsilon);
    float left = 0.0f;
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) {
      const float b = solver.b[k], sum = own[k];
      column_softmax[k].second = sum;
      const bool present = b > 0.0f && sum > 0.0f;
      double update = column_softmax[k].first + length * log2f(b / sum);
      if (!solver.holds_columns()) update *= damping;
      if (step.relaxation != 1.0f) {
        const double old = sum_of(g[k]);
        update = old + double{step.relaxation} * (update - old);
      }
      g[k] = present ? pair_of(update) : FloatPair{-INFINITY, 0.0f};
      if (!present || (step.relaxation == 1.0f && solver.holds_columns())) continue;
      const float target =
          solver.holds_columns() ? b : b * exp2f(static_cast<float>(-update * solver.column_decay));
      left += fabsf(power_of(update - column_softmax[k].first) * sum - target);
    }
    step.column_error = tile.sum_warp(left);
    return error;
  }

  // Potentials of all entries' rows or columns, and the powers of what those lack.
  __device__ __forceinline__ void spread_rows(float (&potential)[L::kRows], float (&power)[L::kRows]) const {
    tile.of_rows(f.first, potential);
    tile.of_rows(power_of(f.second), power);
  }
  __device__ __forceinline__ void spread_columns(float (&potential)[L::kColumns],
                                                 float (&power)[L::kColumns]) const {
    float own[L::kOwned];
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) own[k] = g[k].first;
    tile.of_columns(own, potential);
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) own[k] = power_of(g[k].second);
    tile.of_columns(own, power);
  }

  // ---- states ------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ float* state(uint32_t index) const {
    return call.scratch + blockIdx.x * call.block_floats + index * state_floats<L>(tile.warps);
  }
  __device__ __forceinline__ float* softmaxes(uint32_t index) const {
    return state(kStates) + index * pair_floats<L>(tile.warps);
  }
  __device__ __forceinline__ FloatPair& row_pair(float* at) const {
    return reinterpret_cast<FloatPair*>(at)[tile.own_row()];
  }
  __device__ __forceinline__ FloatPair& column_pair(float* at, int k) const {
    return reinterpret_cast<FloatPair*>(at)[tile.warps * L::kWarpRows + tile.own_column(k)];
  }
  __device__ __forceinline__ UnrolledStep& step_of(float* at) const {
    return *reinterpret_cast<UnrolledStep*>(at + pair_floats<L>(tile.warps));
  }

  // Others may read what is kept after a barrier.
  __device__ __forceinline__ void keep_pairs(float* at, FloatPair row,
                                             const FloatPair (&columns)[L::kOwned]) const {
    if (tile.lane_column % L::kRowCopies == 0) row_pair(at) = row;
    if (tile.warp != 0) return;
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) column_pair(at, k) = columns[k];
  }
  __device__ __forceinline__ void keep_state(uint32_t index) const {
    keep_pairs(state(index), f, g);
    if (tile.thread == 0) step_of(state(index)) = step;
  }
  __device__ __forceinline__ void take_rows(uint32_t index) { f = row_pair(state(index)); }
  __device__ __forceinline__ void take_columns(uint32_t index) {
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) g[k] = column_pair(state(index), k);
  }

  // ---- backward ----------------------------------------------------------------------------------------------------

  // What a loss of the plan, <T, C>, the value and the last potentials asks of costs and of those potentials.
  __device__ __forceinline__ void begin_gradients() {
    const Batch& batch = call.batch;
    const ph_ot_report& report = call.reports[tile.problem];
    const float inverse_epsilon = static_cast<float>(1.0 / report.epsilon);
    const float d_cost = call.d_cost == nullptr ? 0.0f : call.d_cost[tile.problem];
    const float d_value = call.d_value == nullptr ? 0.0f : call.d_value[tile.problem];
    const uint32_t row = tile.own_row();
    const int64_t first_row = tile.row_offset() + tile.first_row;
    if (call.plan == nullptr)
      tile.for_entries([&](int ii, int jj, float cost) { gradient.entries[ii][jj] = cost; });
    gradient.fill({call.f, call.g, call.plan, call.reports});

    // The value's own derivative by T is f + g, and by a penalty's logarithm.
    const auto finite = [](float value) { return fabsf(value) <= FLT_MAX; };
    float of_row = row < tile.block_rows ? call.f[first_row + row] : -INFINITY, of_column[L::kOwned];
    f_gradient = call.d_f != nullptr && finite(of_row) ? call.d_f[first_row + row] : 0.0f;
    of_row = finite(of_row) ? of_row : 0.0f;
    a_gradient = 0.0f;
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) {
      const int64_t at = tile.column_offset() + tile.own_column(k);
      of_column[k] = tile.own_column(k) < tile.columns ? call.g[at] : -INFINITY;
      g_gradient[k] = call.d_g != nullptr && finite(of_column[k]) ? call.d_g[at] : 0.0f;
      of_column[k] = finite(of_column[k]) ? of_column[k] : 0.0f;
      if (tile.warp == 0) b_gradient[tile.own_column(k)] = 0.0f;
    }
    if (d_value != 0.0f && !solver.holds_rows()) {
      const float sum = gradient.sum_row_of_ones(), mass = static_cast<float>(task.row_mass(tile));
      if (mass > 0.0f) {
        if (sum > 0.0f) of_row += batch.row_penalty * logf(sum / mass);
        a_gradient = d_value * batch.row_penalty * (1.0f - sum / mass);
      }
    }
    if (d_value != 0.0f && !solver.holds_columns()) {
      float sums[L::kOwned];
      gradient.sum_columns(1.0f, sums);
#pragma unroll
      for (int k = 0; k < L::kOwned; ++k) {
        const float mass = static_cast<float>(task.column_mass(tile, k));
        if (!(mass > 0.0f)) continue;
        if (sums[k] > 0.0f) of_column[k] += batch.column_penalty * logf(sums[k] / mass);
        if (tile.warp == 0)
          b_gradient[tile.own_column(k)] = d_value * batch.column_penalty * (1.0f - sums[k] / mass);
      }
    }

    float f_row[L::kRows], g_column[L::kColumns], rows[L::kRows], columns[L::kColumns], own[L::kOwned];
    tile.of_rows(of_row, f_row);
    tile.of_columns(of_column, g_column);
#pragma unroll
    for (int ii = 0; ii < L::kRows; ++ii) rows[ii] = 0.0f;
#pragma unroll
    for (int jj = 0; jj < L::kColumns; ++jj) columns[jj] = 0.0f;
    const float* d_plan = call.d_plan == nullptr ? nullptr
                                                 : call.d_plan + tile.plan_offset() +
                                                       static_cast<int64_t>(tile.first_row) * tile.columns;
    tile.for_entries([&](int ii, int jj, float cost) {
      float& entry = gradient.entries[ii][jj];
      const uint32_t i = tile.row_of(ii), j = tile.column_of(jj);
      float asked = 0.0f;
      if (d_plan != nullptr && i < tile.block_rows && j < tile.columns) asked = d_plan[i * tile.columns + j];
      asked = fabsf(cost) <= FLT_MAX ? asked + d_cost * cost + d_value * (f_row[ii] + g_column[jj]) : 0.0f;
      asked *= entry * inverse_epsilon;
      rows[ii] += asked;
      columns[jj] += asked;
      entry = entry * (d_cost + d_value) - asked;
    });
    f_gradient += tile.combine_row(rows, Add{});
    tile.combine_columns(columns, own, 0.0f, false, Add{});
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) g_gradient[k] += own[k];
  }

  // Through the update of g from f, with its softmax.
  __device__ __forceinline__ void go_through_columns() {
    float f_row[L::kRows], u_row[L::kRows], base[L::kColumns], weight_column[L::kColumns], rows[L::kRows];
    float own[L::kOwned];
    spread_rows(f_row, u_row);
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) own[k] = column_softmax[k].first;
    tile.of_columns(own, base);
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) {
      const float asked = g_gradient[k] * step.relaxation * solver.column_damping;
      g_gradient[k] *= 1.0f - step.relaxation;
      const bool present = solver.b[k] > 0.0f && column_softmax[k].second > 0.0f;
      own[k] = present ? asked / column_softmax[k].second : 0.0f;
      if (tile.warp == 0 && present)
        b_gradient[tile.own_column(k)] +=
            asked * static_cast<float>(step.epsilon / (solver.b[k] * task.masses.unit));
    }
    tile.of_columns(own, weight_column);
#pragma unroll
    for (int ii = 0; ii < L::kRows; ++ii) rows[ii] = 0.0f;
    tile.for_entries([&](int ii, int jj, float cost) {
      const float flow = solver.power(f_row[ii], cost, base[jj]) * (u_row[ii] * weight_column[jj]);
      gradient.entries[ii][jj] += flow;
      rows[ii] += flow;
    });
    f_gradient -= tile.combine_row(rows, Add{});
  }

  // Through the update of f from g, with its softmax.
  __device__ __forceinline__ void go_through_rows() {
    float g_column[L::kColumns], v_column[L::kColumns], base[L::kRows], weight_row[L::kRows];
    float columns[L::kColumns], own[L::kOwned];
    spread_columns(g_column, v_column);
    tile.of_rows(row_softmax.first, base);
    const float asked = f_gradient * step.relaxation * solver.row_damping;
    f_gradient *= 1.0f - step.relaxation;
    const bool present = solver.a > 0.0f && row_softmax.second > 0.0f;
    if (present) a_gradient += asked * static_cast<float>(step.epsilon / (solver.a * task.masses.unit));
    tile.of_rows(present ? asked / row_softmax.second : 0.0f, weight_row);
#pragma unroll
    for (int jj = 0; jj < L::kColumns; ++jj) columns[jj] = 0.0f;
    tile.for_entries([&](int ii, int jj, float cost) {
      const float flow = solver.power(base[ii], cost, g_column[jj]) * (v_column[jj] * weight_row[ii]);
      gradient.entries[ii][jj] += flow;
      columns[jj] += flow;
    });
    tile.combine_columns(columns, own, 0.0f, false, Add{});
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) g_gradient[k] -= own[k];
  }

  // All iterations, from the last one on. begin_iterations and begin_gradients come before.
  __device__ __forceinline__ void go_back() {
    // The start; the state that is i iterations from the beginning of the segment; every kSegment^level-th state.
    constexpr uint32_t kStart = 0, kInSegment = 1, kAbove = kInSegment + kSegment + 1;
    keep_state(kStart);
    uint32_t held[kLevels];  // where the states of a level begin
#pragma unroll
    for (uint32_t level = 1; level < kLevels; ++level) held[level] = ~0u;
    const auto below = [](uint32_t place, uint32_t stride) { return place / stride * stride; };
    const auto index_of = [&](uint32_t level, uint32_t stride, uint32_t place) {
      return kAbove + (level - 1) * kSegment + place / stride % kSegment;
    };
#pragma unroll 1
    for (uint32_t to = call.reports[tile.problem].iterations; to > 0; to = below(to - 1, kSegment)) {
      const uint32_t from = below(to - 1, kSegment);
      // The latest state before that is there.
      uint32_t place = 0, source = kStart, fill = 0;  // `fill`: levels that it does not come from
      bool found = false;
#pragma unroll
      for (uint32_t level = 1, stride = kSegment; level < kLevels; ++level, stride *= kSegment) {
        if (found) continue;
        if (held[level] == below(to - 1, stride * kSegment)) {
          found = true;
          place = below(to - 1, stride);
          source = index_of(level, stride, place);
        } else {
          held[level] = below(to - 1, stride * kSegment);
          fill = level;
        }
      }
      __syncthreads();  // the state has been written
      take_rows(source);
      take_columns(source);
      step = step_of(state(source));
      __syncthreads();  // and read by all, before others take its place
#pragma unroll 1
      while (true) {
#pragma unroll
        for (uint32_t level = 1, stride = kSegment; level < kLevels; ++level, stride *= kSegment)
          if (level <= fill && place >= held[level] && place % stride == 0)
            keep_state(index_of(level, stride, place));
        if (place >= from) keep_state(kInSegment + place - from);
        if (place == to) break;
        ++place;
        iterate(place);
        if (place > from) keep_pairs(softmaxes(place - from - 1), row_softmax, column_softmax);
      }
      __syncthreads();  // states have been written
#pragma unroll 1
      for (uint32_t i = to - from; i > 0; --i) {
        step = step_of(state(kInSegment + i));
        set_epsilon();
        float* softmax = softmaxes(i - 1);
        take_rows(kInSegment + i);
#pragma unroll
        for (int k = 0; k < L::kOwned; ++k) column_softmax[k] = column_pair(softmax, k);
        go_through_columns();
        take_columns(kInSegment + i - 1);
        row_softmax = row_pair(softmax);
        go_through_rows();
      }
    }
  }
};

template <typename L>
__global__ void __launch_bounds__(L::kMostWarps* kWarp, L::kBlocks)
    UnrolledTileKernel(const __grid_constant__ UnrolledCall call) {
  // The next kernel may have the same scratch memory: it does not begin before this one ends.
  wait_for_preceding();
  const UnrolledShared<L> shared(blockDim.x / kWarp);
  Tile<L> tile(call.batch, dynamic_shared(), shared.work);
  const auto end = [&] {
    if (tile.ranks > 1) cluster_sync();  // a block ends when nobody reads its memory any more
  };
  if (call.reports[tile.problem].status >= PH_OT_INFEASIBLE) {
    clear_gradients(tile, call);
    return end();
  }
  TileSinkhorn<L> solver{tile};
  TileTask task;
  if (!begin(tile, call, solver, task)) return end();
  PlanTile<L> gradient{tile};
  float* norms = tile.entries + shared.vectors;
  float* coefficients = norms + tile.warps * L::kWarpRows + L::kMostColumns;
  TileUnrolled<L> pass{tile, call, task, solver, gradient};
  pass.b_gradient = coefficients;
  pass.begin_iterations();
  pass.begin_gradients();
  pass.go_back();

  const int64_t first_row = tile.row_offset() + tile.first_row;
  if (call.grad_a != nullptr && tile.counts_row()) call.grad_a[first_row + tile.own_row()] = pass.a_gradient;
#pragma unroll
  for (int k = 0; k < L::kOwned; ++k) {
    if (call.grad_b != nullptr && tile.counts_column(k))
      call.grad_b[tile.column_offset() + tile.own_column(k)] = pass.b_gradient[tile.own_column(k)];
  }
  __syncthreads();  // before the coefficients are overwritten
  write_gradients(tile, call, gradient, norms, coefficients);
  end();
}

}  // namespace ph::ot
