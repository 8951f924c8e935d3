// Sorts small problems by size, and computes the costs of their points.
#include <algorithm>
#include <functional>

#include "common/error.h"
#include "ot/small_cuda.h"

namespace ph::ot {

namespace {

// A thread block computes 32 x 32 costs of a problem, kDepth dimensions at a time; a thread has two rows of four columns.
constexpr uint32_t kTile = 32, kDepth = 16, kCostThreads = 128, kCostPitch = kTile + 1;
constexpr uint32_t kCostBytes = (2 * kDepth * kCostPitch + 2 * kTile) * sizeof(double);

struct PointCostsCall {
  Batch batch;
  double* costs;
};

// The length of a point, 1 for one at 0: scaled first, so that squares neither overflow nor vanish.
__device__ double length_of(const float* point, uint32_t dimension) {
  double largest = 0.0, squares = 0.0;
  for (uint32_t k = 0; k < dimension; ++k) largest = fmax(largest, fabs(double{point[k]}));
  if (largest == 0.0) return 1.0;
  for (uint32_t k = 0; k < dimension; ++k) {
    const double part = point[k] / largest;
    squares = fma(part, part, squares);
  }
  return largest * sqrt(squares);
}

template <bool kProduct>
__device__ __forceinline__ void accumulate_costs(const double* x, const double* y, uint32_t depth,
                                                 double (&sums)[2][4]) {
  const uint32_t row = threadIdx.x / 8, column = threadIdx.x % 8;
  for (uint32_t k = 0; k < depth; ++k) {
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      const double own = x[k * kCostPitch + row + 16 * i];
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        const double other = y[k * kCostPitch + column + 8 * j];
        if constexpr (kProduct) {
          sums[i][j] = fma(-own, other, sums[i][j]);
        } else {
          const double difference = own - other;
          sums[i][j] = fma(difference, difference, sums[i][j]);
        }
      }
    }
  }
}

// Costs of points in doubles, summed over the dimensions in order. Those of points that are not finite are NaN, all others
// finite. Reads points once a tile, writes every cost once.
__global__ void __launch_bounds__(kCostThreads)
    PointCostsKernel(const __grid_constant__ PointCostsCall call) {
  const Batch& batch = call.batch;
  begin_launch(batch);
  const SmallProblem problem(batch, blockIdx.x);
  const uint32_t across = (problem.columns + kTile - 1) / kTile, dimension = batch.dimension,
                 kind = batch.cost_kind, thread = threadIdx.x;
  const uint32_t first_row = blockIdx.y / across * kTile, first_column = blockIdx.y % across * kTile;
  if (first_row < problem.rows) {
    double* x = reinterpret_cast<double*>(dynamic_shared());
    double* y = x + kDepth * kCostPitch;
    double* lengths = y + kDepth * kCostPitch;
    const uint32_t rows = min(problem.rows - first_row, kTile),
                   columns = min(problem.columns - first_column, kTile);
    const float* x_points = batch.x + (problem.row_offset + first_row) * dimension;
    const float* y_points = batch.y + (problem.column_offset + first_column) * dimension;
    if (thread < 2 * kTile) {
      const uint32_t point = thread % kTile;
      const bool of_rows = thread < kTile, present = point < (of_rows ? rows : columns);
      lengths[thread] =
          kind == PH_OT_COSINE && present
              ? length_of((of_rows ? x_points : y_points) + static_cast<uint64_t>(point) * dimension,
                          dimension)
              : 1.0;
    }
    const auto stage = [&](double* target, const float* points, uint32_t count, const double* own_lengths,
                           uint32_t k, uint32_t depth) {
      for (uint32_t item = thread; item < kTile * kDepth; item += kCostThreads) {
        const uint32_t point = item / kDepth, at = item % kDepth;
        double value = 0.0;
        if (point < count && at < depth) value = points[static_cast<uint64_t>(point) * dimension + k + at];
        if (kind == PH_OT_COSINE) value /= own_lengths[point];
        target[at * kCostPitch + point] = value;
      }
    };
    double sums[2][4] = {};
    for (uint32_t k = 0; k < dimension; k += kDepth) {
      const uint32_t depth = min(dimension - k, kDepth);
      __syncthreads();  // lengths are there; before points are overwritten
      stage(x, x_points, rows, lengths, k, depth);
      stage(y, y_points, columns, lengths + kTile, k, depth);
      __syncthreads();
      if (kind == PH_OT_COSINE || kind == PH_OT_DOT) accumulate_costs<true>(x, y, depth, sums);
      else accumulate_costs<false>(x, y, depth, sums);
    }
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        const uint32_t row = thread / 8 + 16 * i, column = thread % 8 + 8 * j;
        if (row >= rows || column >= columns) continue;
        double cost = sums[i][j];
        if (!isfinite(cost)) cost = NAN;
        else if (kind == PH_OT_EUCLIDEAN) cost = sqrt(cost);
        else if (kind == PH_OT_COSINE) cost = fmax(cost + 1.0, 0.0);
        call.costs[problem.plan_offset + (first_row + row) * problem.columns + first_column + column] = cost;
      }
    }
  }
  if (blockIdx.y == gridDim.y - 1) end_launch(batch);
}

}  // namespace

SmallProblems::SmallProblems(CudaWorkspace& workspace, const char* what) : workspace_(workspace) {
  const std::vector<ProblemSize>& all = workspace.sizes;
  std::vector<uint32_t> order(all.size());
  const auto larger = [&](uint32_t p) { return std::max(all[p].rows, all[p].columns); };
  for (uint32_t p = 0; p < all.size(); ++p) {
    order[p] = p;
    entries_ += static_cast<uint64_t>(all[p].rows) * all[p].columns;
    if (larger(p) <= kMostSmall) continue;
    throw Error(PH_ERROR_UNSUPPORTED,
                "Cannot %s problem %u of %u x %u on CUDA, where it may have up to %u rows and columns: take "
                "Sinkhorn's iterations of all of it, or open a CPU device",
                what, p, all[p].rows, all[p].columns, kMostSmall);
  }
  std::stable_sort(order.begin(), order.end(), [&](uint32_t p, uint32_t q) {
    if (larger(p) != larger(q)) return larger(p) > larger(q);
    return std::min(all[p].rows, all[p].columns) > std::min(all[q].rows, all[q].columns);
  });
  for (uint32_t p : order) sizes_.push_back(larger(p));
  order_ = reinterpret_cast<uint32_t*>(allocate(workspace.device, order.size() * sizeof(uint32_t)));
  upload(workspace.device, reinterpret_cast<uint8_t*>(order_), order.data(), order.size() * sizeof(uint32_t));
}

SmallProblems::~SmallProblems() {
  for (void* memory : {static_cast<void*>(order_), static_cast<void*>(masses_), static_cast<void*>(costs_)})
    if (memory != nullptr) release(workspace_.device, static_cast<uint8_t*>(memory));
}

uint32_t SmallProblems::more_than(uint32_t size) const {
  return static_cast<uint32_t>(
      std::upper_bound(sizes_.begin(), sizes_.end(), size,
                       [](uint32_t limit, uint32_t other) { return other <= limit; }) -
      sizes_.begin());
}

SmallCall SmallProblems::prepare(const Problem& problem, const double* host_masses,
                                 const Solution& solution) {
  ph_device& device = workspace_.device;
  const auto doubles = [&](uint64_t count) {
    return reinterpret_cast<double*>(allocate(device, count * sizeof(double)));
  };
  SmallCall call = {};
  call.batch = batch_of(workspace_, problem);
  call.batch.order = order_;
  call.batch.first = true;
  call.f = static_cast<float*>(solution.f);
  call.g = static_cast<float*>(solution.g);
  call.plan = static_cast<float*>(solution.plan);
  call.reports = solution.reports;
  if (host_masses != nullptr) {
    if (masses_ == nullptr) masses_ = doubles(sizes_.size());
    enqueue_upload(device, reinterpret_cast<uint8_t*>(masses_), host_masses, sizes_.size() * sizeof(double));
    call.masses = masses_;
  }
  if (problem.cost == nullptr) {
    if (costs_ == nullptr) costs_ = doubles(entries_);
    call.computed = costs_;
    SmallCall launches = call;
    for (uint32_t most = kMostSmall; most >= kTile; most /= 2) {
      for_sizes(launches, most == kTile ? 0 : most / 2, most, [&](const SmallCall& each, uint32_t count) {
        launch_overlapping(device, PointCostsKernel, dim3(count, (most / kTile) * (most / kTile)),
                           kCostThreads, kCostBytes, PointCostsCall{each.batch, costs_});
      });
    }
  }
  return call;
}

SmallProblems& small_problems(CudaWorkspace& workspace, const char* what) {
  if (workspace.small == nullptr) workspace.small = std::make_shared<SmallProblems>(workspace, what);
  return *workspace.small;
}

}  // namespace ph::ot
