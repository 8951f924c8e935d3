// (Fused) Gromov-Wasserstein transport by conditional gradients, as in gromov_cpu.cpp, which says what they are: in doubles, and
// with the same statuses.
//
// A thread block takes a problem after another, and makes all of its iterations: the gradient by products of matrices, its
// linear transport by shortest augmenting paths (paths.cuh), and the line search. Vectors and what paths need are in shared
// memory, seven matrices in the block's own scratch memory, which a multiprocessor's cache holds where graphs are small, and
// the second cache else. As vertices of the polytope of plans are forests of n + m - 1 pairs at most, only the plan's own
// products take n m (n + m) multiply-adds, a vertex' n^2 m, and their other half the pairs alone.
//
// Distances are read three times, costs once an iteration, and plans are written once for each start that was better. All sums
// are in an order that the sizes of a problem decide.
#pragma once

#include "ot/gromov.h"
#include "ot/paths.cuh"

namespace ph::ot {

constexpr uint32_t kMostGraph = 512;  // rows and columns

struct GromovCall {
  Batch batch;
  const float *x, *y;
  const int64_t *x_offsets, *y_offsets;  // of problems, in elements
  const double* alphas;
  const int32_t* limits;  // of iterations [problems], or null: limit
  int32_t limit;
  float* plan;
  ph_ot_gromov_report* reports;
  uint32_t count;                                   // problems of the launch
  uint32_t* taken;                                  // how many of them blocks have taken
  double* scratch;                                  // of all blocks
  uint64_t rows_squared, columns_squared, entries;  // there is room for in a block's
};

// Doubles of a block's scratch memory: distances of both sides, five matrices [n, m], and orders of points.
__host__ __device__ constexpr uint64_t gromov_scratch(uint64_t rows_squared, uint64_t columns_squared,
                                                      uint64_t entries) {
  return rows_squared + columns_squared + 5 * entries + (rows_squared + columns_squared + 3) / 4;
}

// What a block of kWarps warps multiplies at a time: tiles of kTileRows x kTileColumns, 4 x 4 a thread.
template <typename L>
struct ProductLayout {
  static constexpr uint32_t kDepth = 16, kThreadColumns = L::kThreads >= 256 ? 16 : 8,
                            kTileRows = L::kThreads / kThreadColumns * 4, kTileColumns = kThreadColumns * 4,
                            kRowPitch = kTileRows + 2, kColumnPitch = kTileColumns + 2;
};

template <typename L>
struct alignas(16) GromovMemory {
  using P = ProductLayout<L>;
  double left[P::kDepth * P::kRowPitch], right[P::kDepth * P::kColumnPitch];
  PathsMemory<L> paths;
  double a[L::kMost], b[L::kMost], row_moments[L::kMost], column_moments[L::kMost];
  uint16_t row_points[L::kMost], column_points[L::kMost];  // with mass
  uint32_t place;
};

template <typename L>
struct GromovBlock {
  using P = ProductLayout<L>;
  struct Descent {
    bool converged;
    uint32_t iterations;
    double value, cost, distortion, gap;
  };

  const GromovCall& call;
  GromovMemory<L>& memory;
  const Threads<L::kWarps>& threads;
  const SmallProblem& problem;
  uint32_t n, m;
  double alpha, total;
  const float* costs;                                                 // or null
  double *x, *y, *plan, *product, *vertex_product, *step, *gradient;  // `step`: the plan less the vertex
  uint16_t *row_order, *column_order;                                 // points by their distances from each

  __device__ __forceinline__ GromovBlock(const GromovCall& call_, GromovMemory<L>& memory_,
                                         const Threads<L::kWarps>& threads_, const SmallProblem& problem_)
      : call(call_), memory(memory_), threads(threads_), problem(problem_) {
    n = problem.rows;
    m = problem.columns;
    alpha = call.alphas[problem.problem];
    costs = call.batch.cost == nullptr ? nullptr : call.batch.cost + problem.plan_offset;
    double* next =
        call.scratch + blockIdx.x * gromov_scratch(call.rows_squared, call.columns_squared, call.entries);
    x = next;
    y = next += call.rows_squared;
    next += call.columns_squared;
    for (double** matrix : {&plan, &product, &vertex_product, &step, &gradient}) {
      *matrix = next;
      next += call.entries;
    }
    row_order = reinterpret_cast<uint16_t*>(next);
    column_order = row_order + call.rows_squared;
  }

  __device__ void solve() {
    ph_ot_gromov_report report = {PH_OT_CONVERGED, 0, 0, NAN, NAN, NAN, NAN, NAN, NAN};
    const auto refuse = [&](uint32_t status, unsigned long long place) {
      report.status = status;
      report.place = place;
      for (uint32_t k = threads.thread; k < n * m && call.plan != nullptr; k += L::kThreads)
        call.plan[problem.plan_offset + k] = 0.0f;
      if (threads.thread == 0) call.reports[problem.problem] = report;
    };
    double scale, largest_x, largest_y, largest_cost = 0.0;
    const SmallMasses masses =
        read_small_masses(threads, call.batch, problem, true, memory.a, memory.b, scale);
    if (masses.fault != kNoFault) return refuse(PH_OT_INVALID_MASS, masses.fault);
    total = masses.a_total;
    unsigned long long place = 0;
    ph_ot_status status = read_distances(call.x + call.x_offsets[problem.problem], n, x, largest_x, place);
    if (status != PH_OT_CONVERGED) return refuse(status, place);
    status = read_distances(call.y + call.y_offsets[problem.problem], m, y, largest_y, place);
    if (status != PH_OT_CONVERGED) return refuse(status, 0ull + n * n + place);
    if (costs != nullptr) {
      const SmallExtremes extremes = extremes_of(threads, costs, n * m);
      if (!extremes.valid) {
        status = find_small_fault(threads, call.batch, problem, costs, place);
        return refuse(status, place);
      }
      largest_cost = extremes.largest;
    }
    threads.sync();
    find_moments(x, memory.a, n, memory.row_moments);
    find_moments(y, memory.b, m, memory.column_moments);

    const double largest = largest_x > largest_y ? largest_x : largest_y;
    const double tolerance =
        call.batch.tolerances == nullptr ? call.batch.tolerance : call.batch.tolerances[problem.problem];
    const double least_gap =
        tolerance * total * ((1.0 - alpha) * largest_cost + alpha * total * largest * largest);
    const uint32_t limit = max(call.limits == nullptr ? call.limit : call.limits[problem.problem], 1);
    uint32_t stuck;
    if (!find_bound(report.bound, stuck)) {
      report.bound = NAN;
      return refuse(PH_OT_INFEASIBLE, stuck);
    }
    const Descent first = descend(limit, least_gap);
    finish(first, report);
    if (first.value > report.bound + least_gap && take_product_plan()) {
      const Descent second = descend(limit, least_gap);
      if (second.value < first.value) finish(second, report);
    }
    if (report.value < report.bound) report.bound = report.value;  // by rounding
    if (threads.thread == 0) call.reports[problem.problem] = report;
  }

 private:
  // Calls use(row, column) for all elements of a matrix, columns of a row in neighbouring lanes.
  template <typename Use>
  __device__ __forceinline__ void for_elements(uint32_t rows, uint32_t columns, Use use) const {
    for (uint32_t i = threads.warp; i < rows; i += L::kWarps)
      for (uint32_t j = threads.lane; j < columns; j += kWarp) use(i, j);
  }

  // Distances, made symmetric; `place` is that of what is wrong with them.
  __device__ ph_ot_status read_distances(const float* source, uint32_t size, double* out, double& largest,
                                         unsigned long long& place) const {
    unsigned long long fault = kNoFault;
    double most = 0.0;
    for_elements(size, size, [&](uint32_t i, uint32_t j) {
      const double distance = fabs(double{source[i * size + j]});
      if (!(distance < static_cast<double>(INFINITY))) fault = min(fault, 0ull + i * size + j);
      else if (distance > most) most = distance;
    });
    place = threads.combine(fault, Min{});
    if (place != kNoFault) return PH_OT_NON_FINITE_DISTANCE;
    largest = threads.combine(most, Larger{});
    for_elements(size, size, [&](uint32_t i, uint32_t j) {
      const double own = source[i * size + j], mirrored = source[j * size + i];
      const double upper = i < j ? own : mirrored, lower = i < j ? mirrored : own;
      if (i < j && fabs(upper - lower) > kAsymmetry * largest) fault = min(fault, 0ull + i * size + j);
      out[i * size + j] = upper + (lower - upper) / 2.0;
    });
    place = threads.combine(fault, Min{});
    return place == kNoFault ? PH_OT_CONVERGED : PH_OT_ASYMMETRIC_DISTANCE;
  }

  __device__ void find_moments(const double* matrix, const double* mass, uint32_t size, double* out) const {
    for (uint32_t i = threads.warp; i < size; i += L::kWarps) {
      double sum = 0.0;
      for (uint32_t k = threads.lane; k < size; k += kWarp) {
        const double distance = matrix[i * size + k];
        sum = fma(mass[k], distance * distance, sum);
      }
      sum = threads.combine_warp(sum, Add{});
      if (threads.lane == 0) out[i] = sum;
    }
  }

  // What it costs to go from i to j, apart from distances.
  __device__ __forceinline__ double linear(uint32_t k) const {
    if (costs == nullptr) return 0.0;
    const double cost = costs[k];
    return cost == static_cast<double>(INFINITY) ? cost : cost * (1.0 - alpha);
  }

  // The vertex of least <gradient, vertex>, as arcs of paths.
  __device__ PathsEnd find_vertex(uint32_t& stuck) const {
    threads.sync();  // before arcs are overwritten, and after the gradient is complete
    for (uint32_t i = threads.thread; i < n; i += L::kThreads) memory.paths.supply[i] = memory.a[i];
    for (uint32_t j = threads.thread; j < m; j += L::kThreads) memory.paths.demand[j] = memory.b[j];
    threads.sync();
    Paths<L, PathCosts<double>> paths(threads, memory.paths, {gradient, n, m}, n, m);
    const PathsEnd end = paths.solve();
    stuck = paths.stuck;
    return end;
  }
  // Calls use(k, mass) for a vertex' pairs, each in one thread.
  template <typename Use>
  __device__ __forceinline__ void for_arcs(Use use) const {
    const PathsMemory<L>& paths = memory.paths;
    for (uint32_t i = threads.thread; i < n; i += L::kThreads) {
      for (uint16_t arc = paths.row_arcs[i]; arc != kNoArc; arc = paths.next_of_row[arc])
        use(i * m + paths.arc_column[arc], paths.flow[arc]);
    }
  }
  __device__ __forceinline__ void take_vertex() const {
    for (uint32_t k = threads.thread; k < n * m; k += L::kThreads) plan[k] = 0.0;
    threads.sync();
    for_arcs([&](uint32_t k, double mass) { plan[k] = mass; });
    threads.sync();
  }

  // Points with mass; their number.
  __device__ static uint32_t find_points(const double* mass, uint32_t size, uint16_t* points) {
    uint32_t count = 0;
    for (uint32_t i = 0; i < size; ++i)
      if (mass[i] > 0.0) points[count++] = static_cast<uint16_t>(i);
    return count;
  }
  // For every point those with mass by their distance from it.
  __device__ void sort_points(const double* matrix, uint32_t size, const uint16_t* points, uint32_t count,
                              uint16_t* order) const {
    for_elements(size, count, [&](uint32_t i, uint32_t k) {
      const double* row = matrix + i * size;
      const double own = row[points[k]];
      uint32_t rank = 0;
#pragma unroll 4
      for (uint32_t l = 0; l < count; ++l) {
        const double other = row[points[l]];
        rank += other < own || (other == own && l < k) ? 1 : 0;
      }
      order[i * size + rank] = points[k];
    });
  }
  // The least sum of squared differences between what point i of one side and point j of the other see.
  __device__ double view_cost(uint32_t i, uint32_t j, uint32_t rows, uint32_t columns) const {
    const double *u = x + i * n, *v = y + j * m;
    const uint16_t *p = row_order + i * n, *q = column_order + j * m;
    uint32_t k = 0, l = 0, row = p[0], column = q[0];
    double sum = 0.0, left = memory.a[row], room = memory.b[column];
    while (k < rows && l < columns) {
      const double amount = left < room ? left : room, difference = u[row] - v[column];
      sum = fma(amount, difference * difference, sum);
      left -= amount;
      room -= amount;
      if (left <= 0.0 && ++k < rows) {
        row = p[k];
        left = memory.a[row];
      }
      if (room <= 0.0 && ++l < columns) {
        column = q[l];
        room = memory.b[column];
      }
    }
    return sum;
  }

  // The plan of the third lower bound, and the bound. False if no plan of finite cost exists: of row `stuck`.
  __device__ bool find_bound(double& least, uint32_t& stuck) const {
    const uint32_t rows = threads.combine(
                       threads.thread == 0 ? find_points(memory.a, n, memory.row_points) : 0u, Most{}),
                   columns = threads.combine(
                       threads.thread == 0 ? find_points(memory.b, m, memory.column_points) : 0u, Most{});
    threads.sync();
    if (alpha > 0.0) {
      sort_points(x, n, memory.row_points, rows, row_order);
      sort_points(y, m, memory.column_points, columns, column_order);
      threads.sync();
    }
    for_elements(n, m, [&](uint32_t i, uint32_t j) {
      gradient[i * m + j] = linear(i * m + j) + (alpha > 0.0 ? alpha * view_cost(i, j, rows, columns) : 0.0);
    });
    if (find_vertex(stuck) == PathsEnd::kStuck) return false;
    double sum = 0.0;
    for_arcs([&](uint32_t k, double mass) { sum += gradient[k] * mass; });
    least = threads.sum(sum);
    take_vertex();
    return true;
  }

  // a b', if that is of finite cost.
  __device__ bool take_product_plan() const {
    uint32_t forbidden = 0;
    for_elements(n, m, [&](uint32_t i, uint32_t j) {
      const uint32_t k = i * m + j;
      const double mass = memory.a[i] * (memory.b[j] / total);
      if (mass > 0.0 && costs != nullptr && costs[k] == INFINITY) forbidden = 1;
      plan[k] = mass;
    });
    return threads.combine(forbidden, Most{}) == 0;
  }

  // Improves the plan until <gradient, T - S> is at most `least_gap` for every plan S.
  __device__ Descent descend(uint32_t limit, double least_gap) {
    Descent descent = {};
    multiply_plan();
    while (true) {
      for_elements(n, m, [&](uint32_t i, uint32_t j) {
        const uint32_t k = i * m + j;
        const double constant = memory.row_moments[i] + memory.column_moments[j];
        gradient[k] = linear(k) + 2.0 * alpha * (constant - 2.0 * product[k]);
        step[k] = plan[k];
      });
      uint32_t stuck;
      if (find_vertex(stuck) != PathsEnd::kAll) {  // which rounding alone can cause, as there was one before
        descent.gap = INFINITY;
        break;
      }
      for_arcs([&](uint32_t k, double mass) { step[k] -= mass; });
      threads.sync();
      double gap = 0.0;
      for (uint32_t k = threads.thread; k < n * m; k += L::kThreads)
        if (step[k] != 0.0) gap = fma(gradient[k], step[k], gap);
      gap = threads.sum(gap);
      descent.gap = gap > 0.0 ? gap : 0.0;
      descent.converged = descent.gap <= least_gap;
      if (descent.converged || descent.iterations == limit) break;
      multiply_vertex();
      // Along T + t (S - T) the value is a parabola: -gap t + curvature t^2, as S - T has no marginals.
      double curvature = 0.0;
      for (uint32_t k = threads.thread; k < n * m; k += L::kThreads)
        curvature = fma(step[k], vertex_product[k] - product[k], curvature);
      curvature = 2.0 * alpha * threads.sum(curvature);
      const double length = curvature > 0.0 && gap < 2.0 * curvature ? gap / (2.0 * curvature) : 1.0;
      if (length == 1.0) {
        take_vertex();
        double* taken = product;
        product = vertex_product;
        vertex_product = taken;
      } else {
        for (uint32_t k = threads.thread; k < n * m; k += L::kThreads) {
          plan[k] -= length * step[k];
          product[k] += length * (vertex_product[k] - product[k]);
        }
        threads.sync();
      }
      ++descent.iterations;
    }
    multiply_plan();
    double cost = 0.0, distortion = 0.0;
    for_elements(n, m, [&](uint32_t i, uint32_t j) {
      const uint32_t k = i * m + j;
      const double mass = plan[k], constant = memory.row_moments[i] + memory.column_moments[j];
      if (mass != 0.0) cost = fma(linear(k), mass, cost);
      distortion = fma(mass, constant - 2.0 * product[k], distortion);
    });
    descent.cost = threads.sum(cost);
    distortion = threads.sum(distortion);
    descent.distortion = distortion > 0.0 ? distortion : 0.0;  // a sum of squares but for rounding
    descent.value = descent.cost + alpha * descent.distortion;
    return descent;
  }

  // Writes the plan, and what the report says of it.
  __device__ void finish(const Descent& descent, ph_ot_gromov_report& report) const {
    report.status = descent.converged ? PH_OT_CONVERGED : PH_OT_ITERATION_LIMIT;
    report.iterations = descent.iterations;
    report.value = descent.value;
    report.distortion = descent.distortion;
    report.gap = descent.gap;
    double cost = 0.0, error = 0.0;
    for (uint32_t i = threads.warp; i < n; i += L::kWarps) {
      double sum = 0.0;
      for (uint32_t j = threads.lane; j < m; j += kWarp) {
        const uint32_t k = i * m + j;
        const double mass = plan[k];
        sum += mass;
        // The costs as they are, also where their weight is 0.
        if (costs != nullptr && mass != 0.0) cost = fma(double{costs[k]}, mass, cost);
        if (call.plan != nullptr) call.plan[problem.plan_offset + k] = static_cast<float>(mass);
      }
      sum = threads.combine_warp(sum, Add{});
      if (threads.lane == 0) error += fabs(sum - memory.a[i]);
    }
    for (uint32_t j = threads.thread; j < m; j += L::kThreads) {
      double sum = 0.0;
#pragma unroll 4
      for (uint32_t i = 0; i < n; ++i) sum += plan[i * m + j];
      error += fabs(sum - memory.b[j]);
    }
    report.cost = threads.sum(cost);
    report.marginal_error = threads.sum(error);
  }

  // product = X plan Y
  __device__ void multiply_plan() const {
    threads.sync();
    multiply(plan, y, gradient, n, m, m);
    multiply(x, gradient, product, n, n, m);
  }
  // vertex_product = X vertex Y
  __device__ void multiply_vertex() const {
    threads.sync();  // before the gradient is overwritten
    const PathsMemory<L>& paths = memory.paths;
    for_elements(n, m, [&](uint32_t i, uint32_t j) {
      double sum = 0.0;
      for (uint16_t arc = paths.row_arcs[i]; arc != kNoArc; arc = paths.next_of_row[arc])
        sum = fma(paths.flow[arc], y[paths.arc_column[arc] * m + j], sum);
      gradient[i * m + j] = sum;
    });
    threads.sync();
    multiply(x, gradient, vertex_product, n, n, m);
  }

  // out [rows, columns] = left [rows, inner] right [inner, columns]. Sums are in the order of `inner`.
  __device__ void multiply(const double* left, const double* right, double* out, uint32_t rows,
                           uint32_t inner, uint32_t columns) const {
    const uint32_t own_row = threads.thread / P::kThreadColumns * 4,
                   own_column = threads.thread % P::kThreadColumns * 4;
    for (uint32_t first_row = 0; first_row < rows; first_row += P::kTileRows) {
      for (uint32_t first_column = 0; first_column < columns; first_column += P::kTileColumns) {
        double sums[4][4] = {};
        for (uint32_t first = 0; first < inner; first += P::kDepth) {
          __syncthreads();  // before what was staged is overwritten
          for (uint32_t item = threads.thread; item < P::kTileRows * P::kDepth; item += L::kThreads) {
            const uint32_t row = item / P::kDepth, k = item % P::kDepth;
            memory.left[k * P::kRowPitch + row] = first_row + row < rows && first + k < inner
                                                      ? left[(first_row + row) * inner + first + k]
                                                      : 0.0;
          }
          for (uint32_t item = threads.thread; item < P::kTileColumns * P::kDepth; item += L::kThreads) {
            const uint32_t k = item / P::kTileColumns, column = item % P::kTileColumns;
            memory.right[k * P::kColumnPitch + column] =
                first + k < inner && first_column + column < columns
                    ? right[(first + k) * columns + first_column + column]
                    : 0.0;
          }
          __syncthreads();
#pragma unroll 4
          for (uint32_t k = 0; k < P::kDepth; ++k) {
            const double2* staged_rows =
                reinterpret_cast<const double2*>(memory.left + k * P::kRowPitch + own_row);
            const double2* staged_columns =
                reinterpret_cast<const double2*>(memory.right + k * P::kColumnPitch + own_column);
            const double2 r01 = staged_rows[0], r23 = staged_rows[1], c01 = staged_columns[0],
                          c23 = staged_columns[1];
            const double r[4] = {r01.x, r01.y, r23.x, r23.y}, c[4] = {c01.x, c01.y, c23.x, c23.y};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
              for (int j = 0; j < 4; ++j) sums[i][j] = fma(r[i], c[j], sums[i][j]);
            }
          }
        }
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
#pragma unroll
          for (uint32_t j = 0; j < 4; ++j) {
            const uint32_t row = first_row + own_row + i, column = first_column + own_column + j;
            if (row < rows && column < columns) out[row * columns + column] = sums[i][j];
          }
        }
      }
    }
    __syncthreads();
  }

  struct Most {
    __device__ uint32_t operator()(uint32_t a, uint32_t b) const { return a > b ? a : b; }
  };
};

template <typename L>
__global__ void __launch_bounds__(L::kThreads, L::kBlocks)
    GromovKernel(const __grid_constant__ GromovCall call) {
  static_assert(L::kWarps > 1, "a barrier of Threads is one of the block");
  wait_for_preceding();
  GromovMemory<L>& memory = *reinterpret_cast<GromovMemory<L>*>(dynamic_shared());
  const Threads<L::kWarps> threads(memory.paths.scratch);
  while (true) {
    __syncthreads();  // before anything of the problem before is overwritten
    if (threads.thread == 0) memory.place = atomicAdd(call.taken, 1);
    __syncthreads();
    if (memory.place >= call.count) break;
    const SmallProblem problem(call.batch, memory.place);
    GromovBlock<L>(call, memory, threads, problem).solve();
  }
}

}  // namespace ph::ot
