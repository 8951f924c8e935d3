// Problems of up to kMostSmall rows and columns that a thread block solves in doubles, their costs in global memory: what
// exact and partial transport share. Costs that are given are read as the float32 they are; those of points are computed
// once, in doubles as on the CPU, by PointCostsKernel. All sums are in an order that depends on a problem's size alone.
#pragma once

#include "ot/tile.cuh"

namespace ph::ot {

constexpr uint32_t kMostSmall = 512;

// What the kernels of small problems are called with.
struct SmallCall {
  Batch batch;
  const double* computed;  // costs of points [entries], or null: costs are the batch's
  const double* masses;    // to transport [problems], or null: all
  float *f, *g, *plan;     // null where nobody wants them
  ph_ot_report* reports;
};

struct SmallProblem {
  uint32_t problem, rows, columns;
  int64_t row_offset, column_offset, plan_offset;

  __device__ SmallProblem(const Batch& batch, uint32_t place) : problem(batch.order[place]) {
    row_offset = batch.row_offsets[problem];
    column_offset = batch.column_offsets[problem];
    plan_offset = batch.plan_offsets[problem];
    rows = static_cast<uint32_t>(batch.row_offsets[problem + 1] - row_offset);
    columns = static_cast<uint32_t>(batch.column_offsets[problem + 1] - column_offset);
  }
};

// Costs of type T: float as given, or double as computed.
template <typename T>
__device__ __forceinline__ const T* costs_of(const SmallCall& call, const SmallProblem& problem) {
  if constexpr (sizeof(T) == sizeof(double)) return call.computed + problem.plan_offset;
  else return call.batch.cost + problem.plan_offset;
}

struct Larger {
  __device__ double operator()(double a, double b) const { return a > b ? a : b; }
};

// The threads of a block of kWarps warps, and what they combine values through: shared memory [kWarps], for each of the values
// that are combined at once.
template <int kWarps>
struct Threads {
  static constexpr uint32_t kCount = kWarps * kWarp;
  unsigned long long* scratch;
  uint32_t thread, lane, warp;

  explicit __device__ __forceinline__ Threads(unsigned long long* scratch_)
      : scratch(scratch_), thread(threadIdx.x), lane(threadIdx.x % kWarp), warp(threadIdx.x / kWarp) {}

  // A barrier, after which all see what the others wrote before.
  __device__ __forceinline__ void sync() const {
    if constexpr (kWarps == 1) __syncwarp();
    else __syncthreads();
  }
  template <typename T, typename Combine>
  __device__ __forceinline__ T combine_warp(T value, Combine combine) const {
#pragma unroll
    for (uint32_t distance = kWarp / 2; distance > 0; distance /= 2)
      value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
    return value;
  }
  // The values of all threads combined, for all of them.
  template <typename T, typename Combine>
  __device__ __forceinline__ T combine(T value, Combine combine) const {
    static_assert(sizeof(T) <= sizeof *scratch, "a value passes through 8 bytes");
    value = combine_warp(value, combine);
    if constexpr (kWarps > 1) {
      __syncthreads();  // before scratch is written again
      if (lane == 0) *reinterpret_cast<T*>(scratch + warp) = value;
      __syncthreads();
      value = *reinterpret_cast<const T*>(scratch);
      for (int w = 1; w < kWarps; ++w) value = combine(value, *reinterpret_cast<const T*>(scratch + w));
    }
    return value;
  }
  __device__ __forceinline__ double sum(double value) const { return combine(value, Add{}); }
  template <int kValues>
  __device__ __forceinline__ void sum_each(double (&values)[kValues]) const {
#pragma unroll
    for (double& value : values) value = combine_warp(value, Add{});
    if constexpr (kWarps > 1) {
      double* all = reinterpret_cast<double*>(scratch);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kValues; ++i)
        if (lane == 0) all[warp * kValues + i] = values[i];
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        values[i] = all[i];
        for (int w = 1; w < kWarps; ++w) values[i] += all[w * kValues + i];
      }
    }
  }
};

// What a problem's masses say. `fault`: kNoFault, or the place of the first that is none, or rows + columns for totals.
struct SmallMasses {
  double a_total, b_total;
  unsigned long long fault;
};

__device__ __forceinline__ double row_mass(const Batch& batch, const SmallProblem& problem, uint32_t row) {
  return batch.a == nullptr ? 1.0 / problem.rows : double{batch.a[problem.row_offset + row]};
}
__device__ __forceinline__ double column_mass(const Batch& batch, const SmallProblem& problem,
                                              uint32_t column) {
  return batch.b == nullptr ? 1.0 / problem.columns : double{batch.b[problem.column_offset + column]};
}

// Reads masses to a [rows] and b [columns] in shared memory, each by the thread that it is congruent to. Where totals must
// be equal, `scale` is what b is to be multiplied by so that they are, and else 1.
template <int kWarps>
__device__ SmallMasses read_small_masses(const Threads<kWarps>& threads, const Batch& batch,
                                         const SmallProblem& problem, bool balanced, double* a, double* b,
                                         double& scale) {
  SmallMasses masses = {0.0, 0.0, kNoFault};
  for (uint32_t i = threads.thread; i < problem.rows; i += threads.kCount) {
    const double mass = row_mass(batch, problem, i);
    if (!(mass >= 0.0 && mass < INFINITY)) masses.fault = min(masses.fault, 0ull + i);
    masses.a_total += mass;
    a[i] = mass;
  }
  for (uint32_t j = threads.thread; j < problem.columns; j += threads.kCount) {
    const double mass = column_mass(batch, problem, j);
    if (!(mass >= 0.0 && mass < INFINITY)) masses.fault = min(masses.fault, 0ull + problem.rows + j);
    masses.b_total += mass;
    b[j] = mass;
  }
  masses.fault = threads.combine(masses.fault, Min{});
  masses.a_total = threads.sum(masses.a_total);
  masses.b_total = threads.sum(masses.b_total);
  scale = 1.0;
  if (masses.fault != kNoFault) return masses;
  const double most = masses.a_total > masses.b_total ? masses.a_total : masses.b_total;
  if (!(masses.a_total > 0.0 && masses.b_total > 0.0) ||
      (balanced && fabs(masses.a_total - masses.b_total) > 1e-4 * most)) {
    masses.fault = 0ull + problem.rows + problem.columns;
  } else if (balanced) {
    scale = masses.a_total / masses.b_total;
    for (uint32_t j = threads.thread; j < problem.columns; j += threads.kCount) b[j] *= scale;
  }
  return masses;
}

struct SmallExtremes {
  double largest;  // finite |cost|
  bool valid;      // neither NaN nor -infinity
};
template <typename T, int kWarps>
__device__ SmallExtremes extremes_of(const Threads<kWarps>& threads, const T* costs, uint32_t count) {
  double largest = 0.0;
  uint32_t flawed = 0;
#pragma unroll 4
  for (uint32_t i = threads.thread; i < count; i += threads.kCount) {
    const double cost = costs[i], size = fabs(cost);
    flawed |= cost > -INFINITY ? 0 : 1;
    if (size < INFINITY && size > largest) largest = size;
  }
  // A flaw counts as infinity, which no finite cost is.
  largest = threads.combine(flawed != 0 ? static_cast<double>(INFINITY) : largest, Larger{});
  return {largest, largest < INFINITY};
}

// The status and place of the first flaw of costs that are not valid: among points, where there are some. Costs of points are
// NaN where a point is not finite, and else finite.
template <typename T, int kWarps>
__device__ ph_ot_status find_small_fault(const Threads<kWarps>& threads, const Batch& batch,
                                         const SmallProblem& problem, const T* costs,
                                         unsigned long long& place) {
  place = kNoFault;
  if (batch.cost == nullptr) {
    const uint64_t x_count = static_cast<uint64_t>(problem.rows) * batch.dimension,
                   count = x_count + static_cast<uint64_t>(problem.columns) * batch.dimension;
    const float* x = batch.x + problem.row_offset * batch.dimension;
    const float* y = batch.y + problem.column_offset * batch.dimension;
    for (uint64_t i = threads.thread; i < count && place == kNoFault; i += threads.kCount)
      if (!(fabsf(i < x_count ? x[i] : y[i - x_count]) <= FLT_MAX)) place = i;
    place = threads.combine(place, Min{});
    if (place != kNoFault) return PH_OT_NON_FINITE_POINT;
  }
  for (uint32_t i = threads.thread; i < problem.rows * problem.columns && place == kNoFault;
       i += threads.kCount)
    if (!(costs[i] > static_cast<T>(-INFINITY))) place = i;
  place = threads.combine(place, Min{});
  return PH_OT_NON_FINITE_COST;
}

// A problem without an answer: potentials are 0, and so is the plan, unless it has been cleared.
template <int kWarps>
__device__ void write_no_answer(const Threads<kWarps>& threads, const SmallCall& call,
                                const SmallProblem& problem, bool clear_plan, ph_ot_report report) {
  for (uint32_t i = threads.thread; i < problem.rows && call.f != nullptr; i += threads.kCount)
    call.f[problem.row_offset + i] = 0.0f;
  for (uint32_t j = threads.thread; j < problem.columns && call.g != nullptr; j += threads.kCount)
    call.g[problem.column_offset + j] = 0.0f;
  if (clear_plan && call.plan != nullptr) {
    for (uint32_t i = threads.thread; i < problem.rows * problem.columns; i += threads.kCount)
      call.plan[problem.plan_offset + i] = 0.0f;
  }
  report.cost = report.value = NAN;
  if (threads.thread == 0) call.reports[problem.problem] = report;
}

}  // namespace ph::ot
