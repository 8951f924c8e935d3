// Proximal points of a small problem, all of them on chip: see tile.cuh, and sinkhorn_tile.cuh for what an iteration is.
//
// Point k is the plan of epsilon / k that Sinkhorn's iterations are on the way to, and begins where the scalings of the two
// points before lead to: g over its epsilon goes on by as much as it went last time. As epsilon / k becomes small against the
// rounding of a potential in float, those are in doubles, and a point's scalings take up what its rounded potentials lack: the
// marginals hold to the rounding of a sum, whatever k is. A point costs two passes of exponentials over the entries, as
// its first iteration is in logarithms, and four products.
//
// Whether the cost is close enough to the least one is measured where the marginals hold: paid less the dual of the rounded
// potentials, which is a bound whatever they are, summed in doubles; float leaves 1e-7 of the largest cost in it.
// Costs are read once and the plan is written once; nothing else is in global memory.
#pragma once

#include "ot/sinkhorn_tile.cuh"

namespace ph::ot {

struct ProximalCall : SinkhornCall {
  uint32_t inner;  // iterations a point
};

// g over epsilon of a column, at the last point and the one before.
struct ProximalColumn {
  double scaled, before;
};

// Shared memory of ProximalTileKernel, in floats.
template <typename L>
struct ProximalShared {
  uint32_t columns, entries;  // where those are among `entries`, and how long all are
  __host__ __device__ explicit ProximalShared(uint32_t warps) {
    const uint32_t staged = staged_floats<L>(warps), kept = entry_floats<L>(warps);
    columns = staged > kept ? staged : kept;
    entries = columns + L::kMostColumns * sizeof(ProximalColumn) / sizeof(float);
  }
};

template <typename L>
struct TileProximal {
  Tile<L>& tile;
  TileSinkhorn<L>& solver;
  ProximalColumn* columns;

  // The scaling that makes up for a potential that is less than it should be.
  __device__ __forceinline__ float scaling_of(double lacking, double epsilon) const {
    return exp2f(static_cast<float>(lacking * (kLog2E / epsilon)));
  }

  // f from where g goes on, in logarithms, and g so that the largest entry of every column of the kernel of both is 1; v makes it
  // what it was. False where a row or a column with mass has no partner of finite cost.
  __device__ __forceinline__ bool begin_point(double epsilon) {
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) {
      const double g = start_of(k, epsilon);
      solver.g[k] = solver.b[k] > 0.0f ? static_cast<float>(g) : -INFINITY;
      solver.v[k] = solver.b[k] > 0.0f ? scaling_of(g - solver.g[k], epsilon) : 0.0f;
    }
    float sums[L::kRows], f_row[L::kRows], largest[L::kOwned];
#pragma unroll
    for (int ii = 0; ii < L::kRows; ++ii) sums[ii] = 0.0f;
    const float row_best = solver.best_of_row(solver.g);
    const bool isolated = solver.a > 0.0f && row_best == -INFINITY;
    solver.f = row_best == -INFINITY ? 0.0f : -row_best;
    tile.of_rows(solver.f, f_row);
    tile.for_kept_columns([&](uint32_t owner, int k, const float(&costs)[L::kRows]) {
      const float g_column = tile.of_owner(solver.g, owner, k), v_column = tile.of_owner(solver.v, owner, k);
#pragma unroll
      for (int ii = 0; ii < L::kRows; ++ii)
        sums[ii] = fmaf(solver.power(f_row[ii], costs[ii], g_column), v_column, sums[ii]);
    });
    const float row_sum = tile.combine_row(sums, Add{});
    solver.f = solver.a > 0.0f && !isolated ? solver.f + solver.length * log2f(__fdividef(solver.a, row_sum))
                                            : -INFINITY;
    solver.u = solver.a > 0.0f ? 1.0f : 0.0f;

    const bool feasible = solver.best_of_columns(isolated, largest);
    bool partners = true;
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) {
      const bool present = solver.b[k] > 0.0f;
      if (present && largest[k] == -INFINITY) partners = false;
      solver.g[k] = present ? -largest[k] : -INFINITY;
      solver.v[k] = present ? scaling_of(start_of(k, epsilon) - solver.g[k], epsilon) : 0.0f;
    }
    return __all_sync(kAllLanes, partners) != 0 && feasible;
  }

  // Remembers a point, for the next one; others may read after a barrier.
  __device__ __forceinline__ void end_point(double epsilon) const {
    if (tile.warp != 0) return;
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) {
      if (solver.b[k] == 0.0f) continue;
      ProximalColumn& column = columns[tile.own_column(k)];
      column.before = column.scaled;
      column.scaled = solver.g[k] / epsilon + kLn2 * log2f(solver.v[k]);
    }
  }

  // What is paid above the dual, in the unit of masses.
  __device__ __forceinline__ double gap() const {
    double sum = 0.0;
    float g[L::kOwned];
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) {
      g[k] = solver.column_potential(k);
      if (tile.counts_column(k) && solver.b[k] > 0.0f) sum -= double{solver.b[k]} * g[k];
    }
    const float row_best = solver.best_of_row(g);
    if (tile.counts_row() && solver.a > 0.0f) sum += double{solver.a} * row_best;
    float v_column[L::kColumns], u_row[L::kRows], paid = 0.0f;
    tile.of_columns(solver.v, v_column);
    tile.of_rows(solver.u, u_row);
    tile.for_entries([&](int ii, int jj, float cost) {
      const float entry = solver.kernel[ii][jj] * (u_row[ii] * v_column[jj]);
      if (entry > 0.0f) paid = fmaf(entry, cost, paid);
    });
    return tile.combine_all(sum + paid, Add{});
  }

 private:
  __device__ __forceinline__ double start_of(int k, double epsilon) const {
    const ProximalColumn& column = columns[tile.own_column(k)];
    return (2.0 * column.scaled - column.before) * epsilon;
  }
};

template <typename L>
__global__ void __launch_bounds__(L::kMostWarps* kWarp, L::kBlocks)
    ProximalTileKernel(const __grid_constant__ ProximalCall call) {
  begin_launch(call.batch);
  const Batch& batch = call.batch;
  Tile<L> tile(batch, dynamic_shared(), partial_floats<L>(blockDim.x / kWarp));

  TileSinkhorn<L> solver{tile};
  TileTask task;
  if (!begin(tile, call, solver, task)) return end_launch(batch);
  const ProximalShared<L> shared(tile.warps);
  TileProximal<L> points{tile, solver, reinterpret_cast<ProximalColumn*>(tile.entries + shared.columns)};
  for (uint32_t j = tile.thread; j < L::kMostColumns; j += tile.threads) points.columns[j] = {0.0, 0.0};
  __syncthreads();

  const uint32_t limit = max(call.limits == nullptr ? call.limit : call.limits[tile.problem], 1);
  const double least_gap = task.tolerance * double{task.largest};
  Ending ending = {};
  while (!ending.converged && ending.iterations < limit) {
    ending.epsilon = task.epsilon / (ending.iterations + 1);
    solver.set_epsilon(ending.epsilon, batch);
    if (!points.begin_point(ending.epsilon)) {
      write_infeasible(tile, call, solver, ending.iterations, task.epsilon);
      return end_launch(batch);
    }
    ++ending.iterations;
    Step step = Step::kIterate;
    bool stale = true;
    for (uint32_t left = call.inner;;) {
      if (stale) solver.compute_kernel();
      const typename TileSinkhorn<L>::Outcome outcome = solver.make(step, 1.0f);
      ending.error = outcome.error;
      if (step == Step::kMeasure) break;
      stale = !outcome.good;
      if (stale) solver.absorb();
      if (--left > 0) continue;
      points.end_point(ending.epsilon);
      step = Step::kMeasure;
    }
    ending.converged = ending.error <= task.tolerance && points.gap() <= least_gap;
  }
  write_solution(tile, call, solver, task, ending);
  end_launch(batch);
}

}  // namespace ph::ot
