// Gradients of a small problem, on chip: see tile.cuh, and Backward in operations.h for the formulas.
//
// The plan T lies in registers, read, or computed from points and potentials, and H = G / epsilon in shared memory. The system
// for (alpha, beta) is reduced to the columns: (diag D_c - T' diag(1 / D_r) T) beta = right, and solved by conjugate
// gradients preconditioned by D_c, an iteration of which is two multiply-adds an entry and a barrier, as one of Sinkhorn's.
// As the sums of T are the diagonals, the residual of the whole system is the sums of T o (H - alpha - beta), in which nothing
// cancels that does not in the result: solving for what is left of it until nothing is makes single precision suffice.
// Gradients of points are products of the weights W = dL/dC dC/d|x - y| with the other side's points, taken from shared
// memory, a chunk of dimensions at a time. Points, the plan and its gradient are read once (points again where costs
// have to be known), gradients are written once; nothing else is in global memory.
#pragma once

#include "ot/plan_tile.cuh"

namespace ph::ot {

struct BackwardCall {
  Batch batch;
  uint32_t mode;
  const float *f, *g, *plan;
  const ph_ot_report* reports;
  const float *d_plan, *d_f, *d_g, *d_cost, *d_value;
  float *grad_cost, *grad_x, *grad_y, *grad_a, *grad_b;
};

constexpr int kMostSolutions = 3;  // of what is left
constexpr int kMostSteps = 300;    // of conjugate gradients each
// Squared, relative to the first residual: what one solution leaves, and what is as good as nothing.
constexpr float kSolved = 1e-11f, kNothing = 1e-14f;
// Parts of the problem joined by less than this, relative to their mass, are as good as apart: the residual between them is
// rounding, and so is what little flows there. Only gradients of potentials (d_f, d_g) can ask for more to flow than that, from
// a part into another; float32 cannot follow them there.
constexpr float kApart = 4e-6f;

template <typename L>
struct TileSystem {
  Tile<L>& tile;
  PlanTile<L>& plan;
  bool has_gradient;  // of the plan: else H is 0
  float row_excess, column_excess, row_sum, inverse_row, row_extra, alpha;
  float column_sum[L::kOwned], diagonal[L::kOwned], column_extra[L::kOwned], beta[L::kOwned];

  // The same in all warps.
  __device__ __forceinline__ float dot(const float (&x)[L::kOwned], const float (&y)[L::kOwned]) const {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) sum = fmaf(x[k], y[k], sum);
    return tile.sum_warp(sum);
  }
  __device__ __forceinline__ bool pinned() const { return row_excess == 0.0f && column_excess == 0.0f; }

  // Takes out of a residual over the columns what rounding puts along the null direction.
  __device__ __forceinline__ void pin(float (&residual)[L::kOwned], float mass) const {
    if (!pinned()) return;
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) sum += residual[k];
    const float shift = tile.sum_warp(sum) / mass;
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) residual[k] = fmaf(-shift, column_sum[k], residual[k]);
  }

  // Sums of T o (H - alpha - beta) over rows and columns, with what else is on the right-hand side.
  __device__ __forceinline__ void residuals(float& of_row, float (&of_columns)[L::kOwned]) {
    float rows[L::kRows], columns[L::kColumns], alpha_row[L::kRows], beta_column[L::kColumns];
    tile.of_rows(alpha, alpha_row);
    tile.of_columns(beta, beta_column);
#pragma unroll
    for (int ii = 0; ii < L::kRows; ++ii) rows[ii] = 0.0f;
#pragma unroll
    for (int jj = 0; jj < L::kColumns; ++jj) columns[jj] = 0.0f;
    const auto add = [&](int ii, int jj, float h) {
      const float left = plan.entries[ii][jj] * (h - alpha_row[ii] - beta_column[jj]);
      rows[ii] += left;
      columns[jj] += left;
    };
    if (has_gradient) {
      tile.for_entries(add);
    } else {
#pragma unroll
      for (int ii = 0; ii < L::kRows; ++ii) {
#pragma unroll
        for (int jj = 0; jj < L::kColumns; ++jj) add(ii, jj, 0.0f);
      }
    }
    of_row = tile.combine_row(rows, Add{}) + row_extra - row_excess * row_sum * alpha;
    tile.combine_columns(columns, of_columns, 0.0f, false, Add{});
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k)
      of_columns[k] += column_extra[k] - column_excess * column_sum[k] * beta[k];
  }

  __device__ void solve() {
    float mass = 0.0f;
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) mass += column_sum[k];
    mass = tile.sum_warp(mass);
    alpha = 0.0f;
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) beta[k] = 0.0f;
    float first = 0.0f;
#pragma unroll 1
    for (int solution = 0; solution < kMostSolutions; ++solution) {
      float left_row, left[L::kOwned], correction[L::kOwned], direction[L::kOwned], own[L::kOwned];
      residuals(left_row, left);
      plan.sum_columns(left_row * inverse_row, own);
#pragma unroll
      for (int k = 0; k < L::kOwned; ++k) {
        left[k] -= own[k];
        correction[k] = 0.0f;
      }
      pin(left, mass);
      float size = precondition(left, own);
      if (solution == 0) first = size;
      if (!(size > kNothing * first)) {
        alpha += left_row * inverse_row;
        break;
      }
      const float enough = fmaxf(kSolved * size, kNothing * first);
#pragma unroll
      for (int k = 0; k < L::kOwned; ++k) direction[k] = own[k];
#pragma unroll 1
      for (int step = 0; step < kMostSteps && size > enough; ++step) {
        plan.sum_columns(plan.sum_row(direction) * inverse_row, own);
#pragma unroll
        for (int k = 0; k < L::kOwned; ++k) own[k] = fmaf(diagonal[k], direction[k], -own[k]);
        float weighted[L::kOwned];
#pragma unroll
        for (int k = 0; k < L::kOwned; ++k) weighted[k] = diagonal[k] * direction[k];
        const float curvature = dot(direction, own);
        if (!(curvature > kApart * dot(direction, weighted))) break;
        const float length = size / curvature;
#pragma unroll
        for (int k = 0; k < L::kOwned; ++k) {
          correction[k] = fmaf(length, direction[k], correction[k]);
          left[k] = fmaf(-length, own[k], left[k]);
        }
        pin(left, mass);
        const float next = precondition(left, own), factor = next / size;
#pragma unroll
        for (int k = 0; k < L::kOwned; ++k) direction[k] = fmaf(factor, direction[k], own[k]);
        size = next;
      }
      alpha += (left_row - plan.sum_row(correction)) * inverse_row;
#pragma unroll
      for (int k = 0; k < L::kOwned; ++k) beta[k] += correction[k];
    }
  }

 private:
  // scaled = residual / diagonal; their product.
  __device__ __forceinline__ float precondition(const float (&residual)[L::kOwned],
                                                float (&scaled)[L::kOwned]) const {
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) scaled[k] = diagonal[k] > 0.0f ? residual[k] / diagonal[k] : 0.0f;
    return dot(residual, scaled);
  }
};

// Of a problem without an answer.
template <typename L>
__device__ __forceinline__ void clear_gradients(const Tile<L>& tile, const BackwardCall& call) {
  const uint32_t dimension = call.batch.dimension;
  const int64_t first_row = tile.row_offset() + tile.first_row;
  const auto clear = [&](float* target, int64_t first, int64_t count) {
    for (int64_t i = tile.thread; i < count && target != nullptr; i += tile.threads) target[first + i] = 0.0f;
  };
  clear(call.grad_cost, tile.plan_offset() + static_cast<int64_t>(tile.first_row) * tile.columns,
        static_cast<int64_t>(tile.block_rows) * tile.columns);
  clear(call.grad_x, first_row * dimension, static_cast<int64_t>(tile.block_rows) * dimension);
  clear(call.grad_a, first_row, tile.block_rows);
  if (tile.rank != 0) return;
  clear(call.grad_y, tile.column_offset() * dimension, static_cast<int64_t>(tile.columns) * dimension);
  clear(call.grad_b, tile.column_offset(), tile.columns);
}

// Writes the gradients of costs, which are in `plan.entries`, and those of points. `norms` and `coefficients` have a float for
// every row and column there is room for.
template <typename L>
__device__ __forceinline__ void write_gradients(Tile<L>& tile, const BackwardCall& call, PlanTile<L>& plan,
                                                float* norms, float* coefficients) {
  const Batch& batch = call.batch;
  const uint32_t most_rows = tile.warps * L::kWarpRows, dimension = batch.dimension;
  const int64_t first_row = tile.row_offset() + tile.first_row;
  if (call.grad_cost != nullptr) {
    __syncthreads();  // before what is kept is overwritten
    write_entries(tile, plan.entries, call.grad_cost);
  }
  if (call.grad_x != nullptr || call.grad_y != nullptr) {
    __syncthreads();
    const uint32_t kind = batch.cost_kind;
    // Sums of weights; of cosine costs times cosines.
    float rows[L::kRows], columns[L::kColumns], own_columns[L::kOwned];
#pragma unroll
    for (int ii = 0; ii < L::kRows; ++ii) rows[ii] = 0.0f;
#pragma unroll
    for (int jj = 0; jj < L::kColumns; ++jj) columns[jj] = 0.0f;
    const auto add = [&](int ii, int jj, float weight) {
      rows[ii] += weight;
      columns[jj] += weight;
    };
    if (kind == PH_OT_EUCLIDEAN || kind == PH_OT_COSINE) {
      // Costs, again, while their gradients wait.
      tile.keep_entries(plan.entries);
      load_costs(tile, tile.partials, norms, plan.entries);
      __syncthreads();
      tile.for_entries([&](int ii, int jj, float gradient) {
        float& entry = plan.entries[ii][jj];
        const float cost = entry;
        if (kind == PH_OT_EUCLIDEAN) {
          entry = cost > 0.0f && cost <= FLT_MAX ? gradient / cost : 0.0f;
          add(ii, jj, entry);
        } else {
          entry = cost <= FLT_MAX ? gradient : 0.0f;
          add(ii, jj, cost <= FLT_MAX ? gradient * (1.0f - cost) : 0.0f);
        }
      });
    } else {
      const float factor = kind == PH_OT_SQEUCLIDEAN ? 2.0f : 1.0f;
#pragma unroll
      for (int ii = 0; ii < L::kRows; ++ii) {
#pragma unroll
        for (int jj = 0; jj < L::kColumns; ++jj) {
          plan.entries[ii][jj] *= factor;
          add(ii, jj, kind == PH_OT_DOT ? 0.0f : plan.entries[ii][jj]);
        }
      }
    }
    const float own_row = tile.combine_row(rows, Add{});
    tile.combine_columns(columns, own_columns, 0.0f, false, Add{});
    if (tile.lane_column % L::kRowCopies == 0) coefficients[tile.own_row()] = own_row;
    if (tile.warp == 0) {
#pragma unroll
      for (int k = 0; k < L::kOwned; ++k) coefficients[most_rows + tile.own_column(k)] = own_columns[k];
    }
    __syncthreads();  // before what was kept is overwritten, and partial sums
    store_matrix(tile, plan.entries);
    const bool from_origin = kind == PH_OT_SQEUCLIDEAN || kind == PH_OT_EUCLIDEAN;
    const float* y = batch.y + tile.column_offset() * dimension;
    const float* scales = kind == PH_OT_COSINE ? norms : nullptr;
    MatrixProduct product = {};
    product.width = dimension;
    product.rows_matrix = batch.x + first_row * dimension;
    product.columns_matrix = y;
    product.row_scales = scales;
    product.column_scales = scales == nullptr ? nullptr : scales + most_rows;
    // Only differences of points matter then: nothing cancels, however far from 0 they lie.
    product.origin = from_origin ? y : nullptr;
    product.row_coefficients = coefficients;
    product.column_coefficients = coefficients + most_rows;
    product.row_factors = product.row_scales;
    product.column_factors = product.column_scales;
    product.sign = -1.0f;
    product.rows_out = call.grad_x == nullptr ? nullptr : call.grad_x + first_row * dimension;
    product.columns_out = call.grad_y == nullptr ? nullptr : call.grad_y + tile.column_offset() * dimension;
    multiply_matrix(tile, product);
  }
}

// Shared memory of BackwardTileKernel, in floats.
template <typename L>
struct BackwardShared {
  uint32_t work, vectors, entries;  // where vectors are among `entries`, and how long all are
  __host__ __device__ explicit BackwardShared(uint32_t warps) {
    const uint32_t partial = partial_floats<L>(warps), staged = staged_floats<L>(warps);
    work = partial > staged ? partial : staged;
    const uint32_t kept = entry_floats<L>(warps), matrix = matrix_floats<L>(warps);
    vectors = kept > matrix ? kept : matrix;
    entries = vectors + 2 * (warps * L::kWarpRows + L::kMostColumns);
  }
};

template <typename L>
__global__ void __launch_bounds__(L::kMostWarps* kWarp, L::kBlocks)
    BackwardTileKernel(const __grid_constant__ BackwardCall call) {
  begin_launch(call.batch);
  const BackwardShared<L> shared(blockDim.x / kWarp);
  Tile<L> tile(call.batch, dynamic_shared(), shared.work);
  const Batch& batch = call.batch;
  const auto end = [&] {
    if (tile.ranks > 1) cluster_sync();  // a block ends when nobody reads its memory any more
    end_launch(batch);
  };
  const uint32_t most_rows = tile.warps * L::kWarpRows;
  const int64_t first_row = tile.row_offset() + tile.first_row;
  const ph_ot_report& report = call.reports[tile.problem];
  if (report.status >= PH_OT_INFEASIBLE) {
    clear_gradients(tile, call);
    return end();
  }

  // Points pass through the room of partial sums: a barrier is between.
  float* norms = tile.entries + shared.vectors;
  float* coefficients = norms + most_rows + L::kMostColumns;
  const float inverse_epsilon = static_cast<float>(1.0 / report.epsilon);
  const float d_cost = call.d_cost == nullptr ? 0.0f : call.d_cost[tile.problem];
  const float d_value = call.d_value == nullptr ? 0.0f : call.d_value[tile.problem];
  const bool implicit = call.mode == PH_OT_IMPLICIT && (call.d_plan != nullptr || call.d_f != nullptr ||
                                                        call.d_g != nullptr || call.d_cost != nullptr);
  const bool with_gradient = implicit && (call.d_plan != nullptr || call.d_cost != nullptr);
  const bool with_costs = call.plan == nullptr || (implicit && call.d_cost != nullptr);

  PlanTile<L> plan{tile};
  if (with_costs) {
    load_costs(tile, tile.partials, norms, plan.entries);
    __syncthreads();
  }
  if (with_gradient) {
    // H, through the registers where the costs stay: read four at a time.
    const float* d_plan = call.d_plan == nullptr ? nullptr
                                                 : call.d_plan + tile.plan_offset() +
                                                       static_cast<int64_t>(tile.first_row) * tile.columns;
#pragma unroll
    for (int jj = 0; jj < L::kColumns; ++jj) {
      const uint32_t column = tile.column_of(jj);
#pragma unroll
      for (int first = 0; first < L::kRows; first += 4) {
        float h[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t row = tile.row_of(first + i);
          h[i] = 0.0f;
          if (row < tile.block_rows && column < tile.columns && d_plan != nullptr)
            h[i] = d_plan[row * tile.columns + column];
          if (with_costs) {
            const float cost = plan.entries[first + i][jj];
            h[i] = fabsf(cost) <= FLT_MAX ? fmaf(d_cost, cost, h[i]) : 0.0f;
          }
          h[i] *= inverse_epsilon;
        }
        tile.kept()[(jj * L::kRows + first) / 4] = make_float4(h[0], h[1], h[2], h[3]);
      }
    }
  }
  plan.fill({call.f, call.g, call.plan, call.reports});

  TileSystem<L> system{tile, plan};
  system.has_gradient = with_gradient;
  system.row_sum = plan.sum_row_of_ones();
  plan.sum_columns(1.0f, system.column_sum);
  const uint32_t row = tile.own_row();
  if (implicit) {
    system.row_excess =
        isinf(batch.row_penalty) ? 0.0f : static_cast<float>(report.epsilon / batch.row_penalty);
    system.column_excess =
        isinf(batch.column_penalty) ? 0.0f : static_cast<float>(report.epsilon / batch.column_penalty);
    system.inverse_row = system.row_sum > 0.0f ? 1.0f / (system.row_sum * (1.0f + system.row_excess)) : 0.0f;
    system.row_extra = call.d_f == nullptr || !(system.row_sum > 0.0f) ? 0.0f : call.d_f[first_row + row];
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) {
      system.diagonal[k] = system.column_sum[k] * (1.0f + system.column_excess);
      system.column_extra[k] = call.d_g == nullptr || !(system.column_sum[k] > 0.0f)
                                   ? 0.0f
                                   : call.d_g[tile.column_offset() + tile.own_column(k)];
    }
    if (system.pinned() && (call.d_f != nullptr || call.d_g != nullptr)) {
      // Sums of T o H over rows and over columns are the same: only the others can lie along the null direction.
      double difference = 0.0, count = 0.0;
      if (tile.counts_row() && system.row_sum > 0.0f) {
        difference += system.row_extra;
        count += 1.0;
      }
#pragma unroll
      for (int k = 0; k < L::kOwned; ++k) {
        if (!tile.counts_column(k) || !(system.column_sum[k] > 0.0f)) continue;
        difference -= system.column_extra[k];
        count += 1.0;
      }
      difference = tile.combine_all(difference, Add{});
      count = tile.combine_all(count, Add{});
      const float shift = static_cast<float>(difference / count);
      if (system.row_sum > 0.0f) system.row_extra -= shift;
#pragma unroll
      for (int k = 0; k < L::kOwned; ++k)
        if (system.column_sum[k] > 0.0f) system.column_extra[k] += shift;
    }
    system.solve();
  } else {
    system.alpha = 0.0f;
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) system.beta[k] = 0.0f;
  }

  const float epsilon = static_cast<float>(report.epsilon),
              value_of_masses = call.mode == PH_OT_DETACHED ? 0.0f : d_value;
  const auto mass_gradient = [&](float potential, float solved, float sum, const float* masses, int64_t at,
                                 uint32_t count, float penalty) {
    // No mass: of exact solutions potentials are finite all the same.
    if (!(fabsf(potential) <= FLT_MAX) || (masses != nullptr && !(masses[at] > 0.0f))) return 0.0f;
    if (isinf(penalty)) return fmaf(value_of_masses, potential, epsilon * solved);
    const float ratio = sum / (masses == nullptr ? 1.0f / count : masses[at]);
    return value_of_masses * penalty * (1.0f - ratio) + epsilon * solved * ratio;
  };
  if (call.grad_a != nullptr && tile.counts_row()) {
    call.grad_a[first_row + row] = mass_gradient(call.f[first_row + row], system.alpha, system.row_sum,
                                                 batch.a, first_row + row, tile.rows, batch.row_penalty);
  }
#pragma unroll
  for (int k = 0; k < L::kOwned; ++k) {
    if (call.grad_b == nullptr || !tile.counts_column(k)) continue;
    const int64_t at = tile.column_offset() + tile.own_column(k);
    call.grad_b[at] = mass_gradient(call.g[at], system.beta[k], system.column_sum[k], batch.b, at,
                                    tile.columns, batch.column_penalty);
  }
  if (call.grad_cost == nullptr && call.grad_x == nullptr && call.grad_y == nullptr) return end();

  // dL/dC takes the place of the plan.
  float alpha_row[L::kRows], beta_column[L::kColumns];
  tile.of_rows(system.alpha + d_cost + d_value, alpha_row);
  tile.of_columns(system.beta, beta_column);
  if (with_gradient) {
    tile.for_entries(
        [&](int ii, int jj, float h) { plan.entries[ii][jj] *= alpha_row[ii] + (beta_column[jj] - h); });
  } else {
#pragma unroll
    for (int ii = 0; ii < L::kRows; ++ii) {
#pragma unroll
      for (int jj = 0; jj < L::kColumns; ++jj) plan.entries[ii][jj] *= alpha_row[ii] + beta_column[jj];
    }
  }
  write_gradients(tile, call, plan, norms, coefficients);
  end();
}

}  // namespace ph::ot
