// Gradients of a large problem: see stream.cuh for how passes over its entries are made, and Backward in operations.h for the
// formulas. Memory is O((n + m) d), but for what the caller keeps.
//
// One cooperative launch solves for alpha and beta. The system is reduced to the columns, as in backward_tile.cuh, and solved
// by conjugate gradients preconditioned by its diagonal; a step is a pass over the rows, one over the columns, and two meetings
// of all blocks beside theirs. Vectors over the columns are in double precision; what passes multiply the plan by is rounded to
// single, and counts as what it was rounded to. Products are summed in single precision within a tile of columns and in double
// beyond. What is left of the whole system is summed over T o (H - alpha - beta), in which nothing cancels that does not in the
// result, and solved for again until nothing is.
// Gradients of points are then products of the weights W = dL/dC dC/d|x - y| with the other side's points, kChunk dimensions
// at a time, the weights computed again for each; gradients of costs are written as plans are. Sums are in an order that
// depends on the sizes and the GPU alone.
#pragma once

#include "ot/backward_tile.cuh"
#include "ot/stream.cuh"

namespace ph::ot {

struct GradientSide {
  const float* upstream;         // d_f, or null
  float *vector, *solved;        // what the plan is multiplied by; alpha. 0 up to a multiple of kTileColumns
  double* mass;                  // sums of the plan
  double* left;                  // of the system
  double *product, *correction;  // of columns
  float *grad_masses, *grad_points;  // or null
};

struct GradientCall {
  StreamCall stream;
  GradientSide rows, columns;
  uint32_t mode;
  const float *d_cost, *d_value;  // of all problems, or null
  float* grad_cost;               // of this one, or null
};

constexpr uint32_t kMostSystemSteps = 1000;

// What the loss is of, and how.
struct Upstream {
  float d_cost, d_value;
  bool implicit;       // whether there is a system to be solved
  bool with_gradient;  // whether G is not 0
};
__device__ __forceinline__ Upstream upstream_of(const GradientCall& call) {
  Upstream result = {};
  const uint32_t problem = call.stream.problem;
  if (call.d_cost != nullptr) result.d_cost = call.d_cost[problem];
  if (call.d_value != nullptr) result.d_value = call.d_value[problem];
  result.with_gradient =
      call.mode == PH_OT_IMPLICIT && (call.stream.d_plan != nullptr || call.d_cost != nullptr);
  result.implicit =
      result.with_gradient ||
      (call.mode == PH_OT_IMPLICIT && (call.rows.upstream != nullptr || call.columns.upstream != nullptr));
  return result;
}
// What passes over slopes have in common.
__device__ __forceinline__ StreamPart slope_part(const GradientCall& call, bool transposed,
                                                 const Upstream& upstream) {
  const double epsilon = call.stream.solved[call.stream.problem].epsilon;
  StreamPart part = {};
  part.scale = static_cast<float>(1.4426950408889634 / epsilon);
  part.transposed = transposed;
  part.vector = transposed ? call.rows.solved : call.columns.solved;
  part.solved = transposed ? call.columns.solved : call.rows.solved;
  part.inverse_epsilon = static_cast<float>(1.0 / epsilon);
  part.d_cost = upstream.with_gradient ? static_cast<float>(upstream.d_cost / epsilon) : 0.0f;
  return part;
}

// A pass whose sums are added by who ends a tile of rows last, which calls update(tile of rows, row, sum) then, by all threads,
// also for rows that there are not.
template <Costs kCosts, Use kUse, typename Update>
__device__ __forceinline__ void run_pass(const StreamCall& call, StreamPart part, StreamShared& shared,
                                         Update update) {
  const StreamSide& own = part.transposed ? call.columns : call.rows;
  const StreamSide& other = part.transposed ? call.rows : call.columns;
  const StreamShare share(own.count, other.count, gridDim.x);
  share.for_own([&](uint32_t row_tile, uint32_t first, uint32_t last) {
    part.row_tile = row_tile;
    part.first = first;
    part.last = last;
    part.place = blockIdx.x - share.first_block(row_tile);
    run_part<kCosts, kUse>(call, part, shared);
    const uint32_t parts = share.parts(row_tile), i = row_tile * kTileRows + threadIdx.x;
    if (!is_last(own.arrivals + row_tile, parts, shared)) return;
    double sum = 0.0;
    if (i < own.count) {
#pragma unroll 8
      for (uint32_t s = 0; s < parts; ++s) sum += __ldcg(own.sums + static_cast<uint64_t>(s) * own.count + i);
    }
    update(row_tile, i, sum);
  });
}

template <Costs kCosts>
__global__ void __launch_bounds__(kStreamThreads, kCosts == Costs::kHalves ? 3 : 2)
    StreamSystemKernel(const __grid_constant__ GradientCall call) {
  const StreamCall& stream = call.stream;
  StreamShared& shared = *reinterpret_cast<StreamShared*>(dynamic_shared());
  uint32_t meetings = 0, turn = 0;
  const auto meet = [&] { grid_barrier(&stream.state->arrivals, meetings); };
  const uint32_t thread = blockIdx.x * kStreamThreads + threadIdx.x, threads = gridDim.x * kStreamThreads;
  const uint32_t n = stream.rows.count, m = stream.columns.count;
  const ph_ot_report& report = stream.solved[stream.problem];
  if (report.status >= PH_OT_INFEASIBLE) {
    for (uint32_t i = thread; i < n && call.rows.grad_masses != nullptr; i += threads)
      call.rows.grad_masses[i] = 0.0f;
    for (uint32_t j = thread; j < m && call.columns.grad_masses != nullptr; j += threads)
      call.columns.grad_masses[j] = 0.0f;
    return;
  }
  const double epsilon = report.epsilon;
  const Upstream upstream = upstream_of(call);
  const auto next_values = [&] {
    turn ^= 1;
    return stream.values + turn * kMostValues * uint64_t{stream.values_pitch};
  };
  const auto product_part = [&](bool transposed) {
    StreamPart part = slope_part(call, transposed, upstream);
    part.vector = transposed ? call.rows.vector : call.columns.vector;
    part.solved = nullptr;
    return part;
  };
  const auto padded = [](uint32_t count) { return (count + kTileColumns - 1) / kTileColumns * kTileColumns; };

  // Sums of the plan.
  for (const bool columns : {false, true}) {
    const GradientSide& side = columns ? call.columns : call.rows;
    const uint32_t count = columns ? m : n;
    for (uint32_t i = thread; i < padded(count); i += threads) {
      side.vector[i] = i < count ? 1.0f : 0.0f;
      side.solved[i] = 0.0f;
    }
  }
  meet();
  for (const bool columns : {false, true}) {
    const GradientSide& side = columns ? call.columns : call.rows;
    run_pass<kCosts, Use::kProduct>(stream, product_part(columns), shared,
                                    [&](uint32_t, uint32_t i, double sum) {
                                      if (i < (columns ? m : n)) side.mass[i] = sum;
                                    });
  }
  meet();

  const double row_excess = isinf(stream.rows.penalty) ? 0.0 : epsilon / stream.rows.penalty,
               column_excess = isinf(stream.columns.penalty) ? 0.0 : epsilon / stream.columns.penalty;
  const bool pinned = row_excess == 0.0 && column_excess == 0.0;
  const auto inverse_row = [&](uint32_t i) {
    const double mass = __ldcg(call.rows.mass + i);
    return mass > 0.0 ? 1.0 / (mass * (1.0 + row_excess)) : 0.0;
  };
  const auto diagonal = [&](uint32_t j) { return __ldcg(call.columns.mass + j) * (1.0 + column_excess); };

  if (upstream.implicit) {
    // What d_f and d_g have along the null direction, and the mass.
    const auto upstream_at = [](const GradientSide& side, uint32_t i) {
      return side.upstream != nullptr && __ldcg(side.mass + i) > 0.0 ? double{side.upstream[i]} : 0.0;
    };
    double totals[3] = {};
    for (uint32_t i = thread; i < n; i += threads) {
      totals[0] += upstream_at(call.rows, i);
      totals[1] += __ldcg(call.rows.mass + i) > 0.0;
    }
    for (uint32_t j = thread; j < m; j += threads) {
      totals[0] -= upstream_at(call.columns, j);
      totals[1] += __ldcg(call.columns.mass + j) > 0.0;
      totals[2] += __ldcg(call.columns.mass + j);
    }
    double* values = next_values();
    leave_sums(shared, values, blockIdx.x, totals);
    meet();
    add_sums(shared, values, gridDim.x, totals);
    const double shift = pinned && totals[1] > 0.0 ? totals[0] / totals[1] : 0.0, mass = totals[2];

    double first = 0.0;
    for (int solution = 0; solution < kMostSolutions; ++solution) {
      // What is left of the system, of the rows and then, less what follows from those, of the columns.
      run_pass<kCosts, Use::kSlopeSum>(
          stream, slope_part(call, false, upstream), shared, [&](uint32_t, uint32_t i, double sum) {
            if (i >= n) return;
            const double own = __ldcg(call.rows.mass + i);
            const double left = (own > 0.0 ? upstream_at(call.rows, i) - shift : 0.0) - sum -
                                row_excess * own * __ldcg(call.rows.solved + i);
            call.rows.left[i] = left;
            call.rows.vector[i] = static_cast<float>(left * inverse_row(i));
          });
      run_pass<kCosts, Use::kSlopeSum>(
          stream, slope_part(call, true, upstream), shared, [&](uint32_t, uint32_t j, double sum) {
            if (j >= m) return;
            const double own = __ldcg(call.columns.mass + j);
            call.columns.left[j] = (own > 0.0 ? upstream_at(call.columns, j) + shift : 0.0) - sum -
                                   column_excess * own * __ldcg(call.columns.solved + j);
          });
      meet();
      values = next_values();
      run_pass<kCosts, Use::kProduct>(stream, product_part(true), shared,
                                      [&](uint32_t tile, uint32_t j, double sum) {
                                        double left[1] = {};
                                        if (j < m) {
                                          left[0] = __ldcg(call.columns.left + j) - sum;
                                          call.columns.left[j] = left[0];
                                        }
                                        leave_sums(shared, values, tile, left);
                                      });
      meet();
      double along[1];
      add_sums(shared, values, (m + kTileRows - 1) / kTileRows, along);
      along[0] = pinned ? along[0] / mass : 0.0;
      double size[1] = {};
      for (uint32_t j = thread; j < m; j += threads) {
        const double left = __ldcg(call.columns.left + j) - along[0] * __ldcg(call.columns.mass + j),
                     own = diagonal(j), scaled = own > 0.0 ? left / own : 0.0;
        call.columns.left[j] = left;
        call.columns.correction[j] = 0.0;
        call.columns.vector[j] = static_cast<float>(scaled);
        size[0] += left * scaled;
      }
      values = next_values();
      leave_sums(shared, values, blockIdx.x, size);
      meet();
      add_sums(shared, values, gridDim.x, size);
      if (solution == 0) first = size[0];
      if (!(size[0] > kNothing * first)) {
        for (uint32_t i = thread; i < n; i += threads)
          call.rows.solved[i] =
              static_cast<float>(__ldcg(call.rows.solved + i) + __ldcg(call.rows.left + i) * inverse_row(i));
        break;
      }

      const double enough = fmax(double{kSolved} * size[0], double{kNothing} * first);
      for (uint32_t step = 0; step < kMostSystemSteps && size[0] > enough; ++step) {
        run_pass<kCosts, Use::kProduct>(stream, product_part(false), shared,
                                        [&](uint32_t, uint32_t i, double sum) {
                                          if (i < n)
                                            call.rows.vector[i] = static_cast<float>(sum * inverse_row(i));
                                        });
        meet();
        values = next_values();
        run_pass<kCosts, Use::kProduct>(
            stream, product_part(true), shared, [&](uint32_t tile, uint32_t j, double sum) {
              double sums[4] = {};  // curvature, of the diagonal alone, and what is along the null direction
              if (j < m) {
                const double direction = __ldcg(call.columns.vector + j), weighted = diagonal(j) * direction,
                             product = weighted - sum;
                call.columns.product[j] = product;
                sums[0] = direction * product;
                sums[1] = direction * weighted;
                sums[2] = product;
                sums[3] = direction * __ldcg(call.columns.mass + j);
              }
              leave_sums(shared, values, tile, sums);
            });
        meet();
        double sums[4];
        add_sums(shared, values, (m + kTileRows - 1) / kTileRows, sums);
        along[0] = pinned ? sums[2] / mass : 0.0;
        const double curvature = sums[0] - along[0] * sums[3];
        if (!(curvature > double{kApart} * sums[1])) break;
        const double length = size[0] / curvature;
        double next[1] = {};
        for (uint32_t j = thread; j < m; j += threads) {
          const double product = __ldcg(call.columns.product + j) - along[0] * __ldcg(call.columns.mass + j);
          const double left = __ldcg(call.columns.left + j) - length * product, own = diagonal(j);
          call.columns.left[j] = left;
          call.columns.correction[j] += length * __ldcg(call.columns.vector + j);
          if (own > 0.0) next[0] += left * left / own;
        }
        values = next_values();
        leave_sums(shared, values, blockIdx.x, next);
        meet();
        add_sums(shared, values, gridDim.x, next);
        const double factor = next[0] / size[0];
        for (uint32_t j = thread; j < m; j += threads) {
          const double own = diagonal(j);
          if (own > 0.0)
            call.columns.vector[j] = static_cast<float>(__ldcg(call.columns.left + j) / own +
                                                        factor * __ldcg(call.columns.vector + j));
        }
        size[0] = next[0];
        meet();
      }

      // beta, and the rows' part of it.
      for (uint32_t j = thread; j < m; j += threads) {
        const float before = __ldcg(call.columns.solved + j),
                    after = static_cast<float>(before + call.columns.correction[j]);
        call.columns.solved[j] = after;
        call.columns.vector[j] = after - before;
      }
      meet();
      run_pass<kCosts, Use::kProduct>(
          stream, product_part(false), shared, [&](uint32_t, uint32_t i, double sum) {
            if (i < n)
              call.rows.solved[i] = static_cast<float>(__ldcg(call.rows.solved + i) +
                                                       (__ldcg(call.rows.left + i) - sum) * inverse_row(i));
          });
      meet();
    }
    meet();
  }

  const double value_of_masses = call.mode == PH_OT_DETACHED ? 0.0 : upstream.d_value;
  for (const bool columns : {false, true}) {
    const GradientSide& side = columns ? call.columns : call.rows;
    const StreamSide& own = columns ? stream.columns : stream.rows;
    for (uint32_t i = thread; i < own.count && side.grad_masses != nullptr; i += threads) {
      const double potential = own.out[i], solved = epsilon * __ldcg(side.solved + i);
      double gradient = value_of_masses * potential + solved;
      if (!isinf(own.penalty)) {
        const double ratio = __ldcg(side.mass + i) / mass_of(own, i, 1.0);
        gradient = value_of_masses * own.penalty * (1.0 - ratio) + solved * ratio;
      }
      side.grad_masses[i] = isfinite(potential) ? static_cast<float>(gradient) : 0.0f;
    }
  }
}

// dL/dC.
template <Costs kCosts>
__global__ void __launch_bounds__(kStreamThreads, 2)
    StreamCostGradientKernel(const __grid_constant__ GradientCall call) {
  const StreamCall& stream = call.stream;
  StreamShared& shared = *reinterpret_cast<StreamShared*>(dynamic_shared());
  const uint64_t entries = static_cast<uint64_t>(stream.rows.count) * stream.columns.count;
  if (stream.solved[stream.problem].status >= PH_OT_INFEASIBLE) {
    for (uint64_t i = blockIdx.x * kStreamThreads + threadIdx.x; i < entries; i += gridDim.x * kStreamThreads)
      call.grad_cost[i] = 0.0f;
    return;
  }
  const Upstream upstream = upstream_of(call);
  StreamPart part = slope_part(call, false, upstream);
  part.shift = upstream.d_cost + upstream.d_value;
  StreamShare(stream.rows.count, stream.columns.count, gridDim.x)
      .for_own([&](uint32_t row_tile, uint32_t first, uint32_t last) {
        part.row_tile = row_tile;
        part.first = first;
        part.last = last;
        run_part<kCosts, Use::kSlope>(stream, part, shared);
      });
}

// Gradients of a side's points. A thread block takes kTileRows points and kChunk dimensions at a time, its threads 8 points x
// 4 dimensions.
template <Costs kCosts>
__global__ void __launch_bounds__(kStreamThreads, 2)
    StreamPointGradientKernel(const __grid_constant__ GradientCall call, bool transposed) {
  using Tile = StreamTile<kCosts, Use::kSlope>;
  const StreamCall& stream = call.stream;
  StreamShared& shared = *reinterpret_cast<StreamShared*>(dynamic_shared());
  StreamShared::Product& product = *reinterpret_cast<StreamShared::Product*>(&shared + 1);
  const uint32_t kind = stream.cost_kind, width = stream.dimension;
  const bool answered = stream.solved[stream.problem].status < PH_OT_INFEASIBLE;
  const Upstream upstream = upstream_of(call);
  StreamPart part = answered ? slope_part(call, transposed, upstream) : StreamPart{};
  part.shift = upstream.d_cost + upstream.d_value;
  Tile tile = Tile::of(stream, part, shared);
  const StreamSide &own = tile.own, &other = tile.other;
  float* out = (transposed ? call.columns : call.rows).grad_points;
  // Only differences of points matter to some costs: nothing cancels then, however far from 0 they lie.
  const float* origin =
      kind == PH_OT_SQEUCLIDEAN || kind == PH_OT_EUCLIDEAN ? stream.columns.points : nullptr;
  const auto point = [&](const StreamSide& side, uint32_t i, uint32_t k) {
    const float value = side.points[static_cast<uint64_t>(i) * width + k];
    if (origin != nullptr) return value - origin[k];
    return kind == PH_OT_COSINE ? value * side.norms[side.count + i] : value;
  };
  const uint32_t row_tiles = (own.count + kTileRows - 1) / kTileRows,
                 column_tiles = (other.count + kTileColumns - 1) / kTileColumns,
                 chunks = (width + kChunk - 1) / kChunk;
  const uint32_t at = threadIdx.x % 8 * 4, group = threadIdx.x / 8;  // rows group, group + 16, ...
  for (uint32_t item = blockIdx.x; item < row_tiles * chunks; item += gridDim.x) {
    const uint32_t k = item % chunks * kChunk, first_row = item / chunks * kTileRows;
    float bias[4], coefficients[4] = {}, masses[8] = {};
    MatrixSums sums = {};
    if (answered) {
      tile.begin(first_row);
      tile.begin_rows(bias);
      tile.for_columns(0, column_tiles, [&](uint32_t column, const float(&values)[2][2][4]) {
        const uint32_t in_tile = column % kTileColumns;
        Tile::for_values([&](int m, int n, int e) {
          const int r = 2 * m + e / 2;
          const float cost = tile.given[m][n][e];
          float weight = tile.slope(values[m][n][e] + bias[r], column, m, n, e), counted = weight;
          if (kind == PH_OT_SQEUCLIDEAN) weight = counted = 2.0f * weight;
          if (kind == PH_OT_EUCLIDEAN)
            weight = counted = cost > 0.0f && cost <= FLT_MAX ? weight / cost : 0.0f;
          if (kind == PH_OT_COSINE) counted = cost <= FLT_MAX ? weight * (1.0f - cost) : 0.0f;
          coefficients[r] += kind == PH_OT_DOT ? 0.0f : counted;
          product.plan[tile.row_of(r) - first_row][in_tile + tile.column_of(n, e % 2)] = weight;
        });
        if (in_tile + 16 < kTileColumns) return;
        const uint32_t first = column - in_tile;
        for (uint32_t each = threadIdx.x; each < kTileColumns * kChunk; each += kStreamThreads) {
          const uint32_t j = each / kChunk, i = each % kChunk;
          product.matrix[j][i] =
              first + j < other.count && k + i < width ? point(other, first + j, k + i) : 0.0f;
        }
        __syncthreads();
        add_product(product, at, group, sums, masses);
        __syncthreads();
      });
      // To the threads that have the rows' sums.
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        coefficients[r] = combine_quad_sum(coefficients[r]);
        if (tile.lane % 4 == 0)
          product.matrix[(tile.row_of(r) - first_row) / kChunk][tile.row_of(r) % kChunk] = coefficients[r];
      }
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      const uint32_t in_tile = group + 16 * r, row = first_row + in_tile;
      if (row >= own.count) continue;
      const float coefficient = product.matrix[in_tile / kChunk][in_tile % kChunk];
      const float factor = kind == PH_OT_COSINE ? own.norms[own.count + row] : 1.0f;
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        if (k + at + i >= width) continue;
        out[static_cast<uint64_t>(row) * width + k + at + i] =
            answered ? factor * (coefficient * point(own, row, k + at + i) - sums.of[r][i]) : 0.0f;
      }
    }
    __syncthreads();  // before coefficients are overwritten
  }
}

}  // namespace ph::ot
