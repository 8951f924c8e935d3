#include "ot/problem_cpu.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>

#include "common/error.h"
#include "kv/block_cpu.h"

namespace ph::ot {

#if defined(__x86_64__)
namespace avx512vnni {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
#endif
namespace baseline {
extern const Kernels kKernels;
}

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#if defined(__x86_64__)
    // block_kernels does not ask for fused multiply-adds, which the wider kernels here use.
    if (__builtin_cpu_supports("fma")) {
      for (const Kernels* table : {&avx512vnni::kKernels, &avx512::kKernels, &avx2::kKernels}) {
        if (strcmp(table->instruction_set, kv::block_kernels().instruction_set) == 0) return *table;
      }
    }
#endif
    return baseline::kKernels;
  }();
  return chosen;
}

void Arena::Free::operator()(void* data) const { free(data); }

double* Arena::doubles(uint64_t count) {
  if (count > std::numeric_limits<uint64_t>::max() / 16) throw std::bad_alloc();
  const uint64_t bytes = round_up(std::max<uint64_t>(count, 1) * sizeof(double), 64);
  if (chunks_.empty() || chunks_.back().bytes - chunks_.back().used < bytes) {
    const uint64_t size = round_up(std::max<uint64_t>(bytes, 1u << 16), 64);
    void* data = aligned_alloc(64, size);
    if (data == nullptr) {
      throw Error(PH_ERROR_OUT_OF_MEMORY, "Cannot allocate %llu bytes of host memory to solve a problem in",
                  static_cast<unsigned long long>(size));
    }
    chunks_.push_back({std::unique_ptr<uint8_t, Free>(static_cast<uint8_t*>(data)), size, 0});
  }
  Chunk& chunk = chunks_.back();
  double* taken = reinterpret_cast<double*>(chunk.data.get() + chunk.used);
  chunk.used += bytes;
  return taken;
}

void Arena::reset() {
  if (chunks_.size() > 1) {  // one piece next time
    uint64_t bytes = 0;
    for (const Chunk& chunk : chunks_) bytes += chunk.bytes;
    chunks_.clear();
    doubles(bytes / sizeof(double));
  }
  if (!chunks_.empty()) chunks_[0].used = 0;
}

uint32_t thread_number() { return static_cast<uint32_t>(omp_get_thread_num()); }

std::unique_ptr<Workspace> create_workspace(ph_device&, const Shape& shape, const WorkspaceOptions& options) {
  auto workspace = std::make_unique<CpuWorkspace>();
  const uint64_t offsets = shape.problems + 1ull;
  workspace->row_offsets.assign(shape.host_row_offsets, shape.host_row_offsets + offsets);
  workspace->column_offsets.assign(shape.host_column_offsets, shape.host_column_offsets + offsets);
  workspace->plan_offsets.assign(shape.host_plan_offsets, shape.host_plan_offsets + offsets);
  workspace->options = options;
  workspace->order.resize(shape.problems);
  std::iota(workspace->order.begin(), workspace->order.end(), 0u);
  const auto size = [&](uint32_t p) { return shape.host_plan_offsets[p + 1] - shape.host_plan_offsets[p]; };
  std::stable_sort(workspace->order.begin(), workspace->order.end(),
                   [&](uint32_t a, uint32_t b) { return size(a) > size(b); });
  workspace->large =
      static_cast<uint32_t>(std::count_if(workspace->order.begin(), workspace->order.end(), [&](uint32_t p) {
        return static_cast<uint64_t>(size(p)) >= kLargeProblem;
      }));
  workspace->arenas.resize(static_cast<size_t>(std::max(1, omp_get_max_threads())));
  return workspace;
}

bool Task::balanced() const { return std::isinf(row_penalty) && std::isinf(column_penalty); }

void Task::costs(uint32_t row, uint32_t count, uint32_t column, uint32_t wide, double* cost,
                 uint64_t out_stride) const {
  const Kernels& k = kernels();
  const uint32_t real = column >= columns ? 0 : std::min(wide, columns - column);
  if (points.dimension > 0) {
    k.costs(points, row, count, column, wide, cost, out_stride);
  } else {
    for (uint32_t i = 0; i < count; ++i)
      k.read(matrix, dtype, first + static_cast<int64_t>(row + i) * columns + column, real,
             cost + i * out_stride);
  }
  for (uint32_t i = 0; i < count && real < wide; ++i)
    std::fill(cost + i * out_stride + real, cost + i * out_stride + wide, INFINITY);
}

void Task::costs(double* cost) const {
  for_pieces(rows, kChunkRows, parallel, [&](uint64_t begin, uint64_t end) {
    for (uint64_t i = begin; i < end; i += 4) {
      costs(static_cast<uint32_t>(i), static_cast<uint32_t>(std::min<uint64_t>(4, end - i)), 0,
            static_cast<uint32_t>(stride), cost + i * stride, stride);
    }
  });
}

namespace {

// Reads masses of one side, or makes them uniform. Returns the place of the first that is none, or `count`.
uint32_t read_side(const void* masses, uint32_t dtype, int64_t first, uint32_t count, double uniform,
                   double* out, uint64_t padded) {
  if (masses == nullptr) std::fill(out, out + count, uniform);
  else kernels().read(masses, dtype, first, count, out);
  std::fill(out + count, out + padded, 0.0);
  for (uint32_t i = 0; i < count; ++i)
    if (!(out[i] >= 0.0 && out[i] < INFINITY)) return i;
  return count;
}

uint64_t first_non_finite(const double* values, uint64_t count) {
  for (uint64_t i = 0; i < count; ++i)
    if (!std::isfinite(values[i])) return i;
  return count;
}

// To length 1, but for points at 0.
void normalise(double* points, uint64_t count, uint32_t dimension) {
  for (uint64_t i = 0; i < count; ++i) {
    double* point = points + i * dimension;
    // Scaled first, so that squares neither overflow nor vanish.
    double largest = 0.0, squares = 0.0;
    for (uint32_t k = 0; k < dimension; ++k) largest = std::max(largest, std::fabs(point[k]));
    if (largest == 0.0) continue;
    for (uint32_t k = 0; k < dimension; ++k) squares += point[k] / largest * (point[k] / largest);
    const double norm = largest * std::sqrt(squares);
    for (uint32_t k = 0; k < dimension; ++k) point[k] /= norm;
  }
}

const double* transpose(const double* points, uint32_t count, uint32_t dimension, uint64_t stride,
                        Arena& arena) {
  double* columns = arena.doubles(dimension * stride);
  for (uint32_t k = 0; k < dimension; ++k) {
    double* column = columns + k * stride;
    for (uint32_t j = 0; j < count; ++j) column[j] = points[static_cast<uint64_t>(j) * dimension + k];
    std::fill(column + count, column + stride, 0.0);
  }
  return columns;
}

// The place of the first flaw among costs: the first that is NaN or -infinity.
uint64_t first_flaw(const Task& task, Arena& arena) {
  double* row = arena.doubles(task.stride);
  for (uint32_t i = 0; i < task.rows; ++i) {
    task.costs(i, 1, 0, static_cast<uint32_t>(task.stride), row, task.stride);
    for (uint32_t j = 0; j < task.columns; ++j)
      if (!(row[j] > -INFINITY)) return static_cast<uint64_t>(i) * task.columns + j;
  }
  return 0;
}

Extremes extremes_of(const Task& task, const double* cost, Arena& arena) {
  const uint64_t chunks = (task.rows + kChunkRows - 1) / kChunkRows;
  double* largest = arena.doubles(chunks);
  double* valid = arena.doubles(chunks);
  double* tiles = cost == nullptr ? arena.doubles(chunks * 4 * kTileColumns) : nullptr;
  for_pieces(task.rows, kChunkRows, task.parallel, [&](uint64_t begin, uint64_t end) {
    const uint64_t chunk = begin / kChunkRows;
    Extremes found = {0.0, true};
    const auto add = [&](const double* values, uint64_t count) {
      const Extremes some = kernels().extremes(values, count);
      found = {std::max(found.largest, some.largest), found.valid && some.valid};
    };
    if (cost != nullptr) {
      add(cost + begin * task.stride, (end - begin) * task.stride);
    } else {
      double* tile = tiles + chunk * 4 * kTileColumns;
      for (uint64_t i = begin; i < end; i += 4) {
        const uint32_t count = static_cast<uint32_t>(std::min<uint64_t>(4, end - i));
        for (uint64_t j = 0; j < task.stride; j += kTileColumns) {
          const uint32_t wide = static_cast<uint32_t>(std::min<uint64_t>(kTileColumns, task.stride - j));
          task.costs(static_cast<uint32_t>(i), count, static_cast<uint32_t>(j), wide, tile, wide);
          add(tile, static_cast<uint64_t>(count) * wide);
        }
      }
    }
    largest[chunk] = found.largest;
    valid[chunk] = found.valid ? 1.0 : 0.0;
  });
  Extremes all = {0.0, true};
  for (uint64_t chunk = 0; chunk < chunks; ++chunk)
    all = {std::max(all.largest, largest[chunk]), all.valid && valid[chunk] > 0.0};
  return all;
}

}  // namespace

bool read_masses(CpuWorkspace& workspace, const Problem& problem, uint32_t index, Arena& arena, Task& task,
                 ph_ot_report& report) {
  const Shape shape = workspace.shape();
  const WorkspaceOptions& options = workspace.options;
  task = {};
  task.rows = static_cast<uint32_t>(shape.rows(index));
  task.columns = static_cast<uint32_t>(shape.columns(index));
  task.stride = round_up(task.columns, kStep);
  task.dtype = options.dtype;
  task.row_penalty = problem.row_penalty;
  task.column_penalty = problem.column_penalty;
  task.tolerance = problem.tolerances == nullptr ? problem.tolerance : problem.tolerances[index];
  task.matrix = problem.cost;
  task.first = shape.host_plan_offsets[index];
  const auto refuse = [&](uint64_t place) {
    report.status = PH_OT_INVALID_MASS;
    report.place = place;
    return false;
  };
  double *a = arena.doubles(task.rows), *b = arena.doubles(task.stride);
  const uint32_t bad_row = read_side(problem.a, options.dtype, shape.host_row_offsets[index], task.rows,
                                     1.0 / task.rows, a, task.rows);
  const uint32_t bad_column = read_side(problem.b, options.dtype, shape.host_column_offsets[index],
                                        task.columns, 1.0 / task.columns, b, task.stride);
  if (bad_row < task.rows) return refuse(bad_row);
  if (bad_column < task.columns) return refuse(task.rows + bad_column);
  double a_total = 0.0, b_total = 0.0;
  for (uint32_t i = 0; i < task.rows; ++i) a_total += a[i];
  for (uint32_t j = 0; j < task.columns; ++j) b_total += b[j];
  const bool differ = std::fabs(a_total - b_total) > 1e-4 * std::max(a_total, b_total);
  if (!(a_total > 0.0 && b_total > 0.0 && a_total < INFINITY && b_total < INFINITY) ||
      (task.balanced() && differ))
    return refuse(static_cast<uint64_t>(task.rows) + task.columns);
  if (task.balanced()) {
    for (uint32_t j = 0; j < task.columns; ++j) b[j] *= a_total / b_total;
  }
  task.a = a;
  task.b = b;
  task.total = a_total;
  return true;
}

bool read_task(CpuWorkspace& workspace, const Problem& problem, uint32_t index, Purpose purpose, Arena& arena,
               bool parallel, double* cost, Task& task, ph_ot_report& report) {
  const Shape shape = workspace.shape();
  const WorkspaceOptions& options = workspace.options;
  const int64_t row = shape.host_row_offsets[index], column = shape.host_column_offsets[index];
  const bool solve = purpose == Purpose::kSolve;
  const double none = std::numeric_limits<double>::quiet_NaN();
  if (solve) report = {PH_OT_CONVERGED, 0, 0, none, none, none, 0.0};
  const auto refuse = [&](uint32_t status, uint64_t place) {
    report.status = status;
    report.place = place;
    return false;
  };
  const bool failed = !solve && report.status >= PH_OT_INFEASIBLE;
  if (!read_masses(workspace, problem, index, arena, task, report) || failed) return false;
  task.parallel = parallel;

  if (problem.cost == nullptr) {
    const uint64_t d = options.dimension;
    double *x = arena.doubles(task.rows * d), *y = arena.doubles(task.columns * d);
    kernels().read(problem.x, options.dtype, row * static_cast<int64_t>(d), task.rows * d, x);
    kernels().read(problem.y, options.dtype, column * static_cast<int64_t>(d), task.columns * d, y);
    if (solve) {
      const uint64_t bad_x = first_non_finite(x, task.rows * d),
                     bad_y = first_non_finite(y, task.columns * d);
      if (bad_x < task.rows * d) return refuse(PH_OT_NON_FINITE_POINT, bad_x);
      if (bad_y < task.columns * d) return refuse(PH_OT_NON_FINITE_POINT, task.rows * d + bad_y);
    }
    if (problem.cost_kind == PH_OT_COSINE) {
      normalise(x, task.rows, options.dimension);
      normalise(y, task.columns, options.dimension);
    }
    task.points = {problem.cost_kind, options.dimension, x,
                   transpose(y, task.columns, options.dimension, task.stride, arena), task.stride};
  }
  if (cost != nullptr) task.costs(cost);
  if (!solve) {
    // Of an exact solution, whose epsilon is 0, only the plan that was kept is used, and potentials as they are.
    task.epsilon = report.epsilon > 0.0 ? report.epsilon : 1.0;
    return true;
  }
  const Extremes extremes = extremes_of(task, cost, arena);
  if (!extremes.valid) return refuse(PH_OT_NON_FINITE_COST, first_flaw(task, arena));
  task.largest = extremes.largest;
  const double epsilon = problem.epsilons == nullptr ? problem.epsilon : problem.epsilons[index];
  task.epsilon = problem.relative_epsilon && task.largest > 0.0 ? epsilon * task.largest : epsilon;
  report.epsilon = task.epsilon;
  return true;
}

Task transposed(const Task& task, Arena& arena) {
  Task other = task;
  other.rows = task.columns;
  other.columns = task.rows;
  other.stride = round_up(other.columns, kStep);
  const uint32_t d = task.points.dimension;
  double* rows = arena.doubles(static_cast<uint64_t>(other.rows) * d);
  for (uint32_t j = 0; j < other.rows; ++j)
    for (uint32_t k = 0; k < d; ++k)
      rows[static_cast<uint64_t>(j) * d + k] = task.points.y[k * task.points.stride + j];
  double* masses = arena.doubles(other.stride);
  std::copy(task.a, task.a + task.rows, masses);
  std::fill(masses + task.rows, masses + other.stride, 0.0);
  other.a = task.b;
  other.b = masses;
  std::swap(other.row_penalty, other.column_penalty);
  other.points.x = rows;
  other.points.y = transpose(task.points.x, task.rows, d, other.stride, arena);
  other.points.stride = other.stride;
  return other;
}

ScaledPotentials read_potentials(CpuWorkspace& workspace, const Potentials& potentials, uint32_t index,
                                 const Task& task, Arena& arena) {
  const Shape shape = workspace.shape();
  const ScaledPotentials scaled = {arena.doubles(round_up(task.rows, kStep)), arena.doubles(task.stride)};
  kernels().read(potentials.f, task.dtype, shape.host_row_offsets[index], task.rows, scaled.row);
  kernels().read(potentials.g, task.dtype, shape.host_column_offsets[index], task.columns, scaled.column);
  for (uint32_t i = 0; i < task.rows; ++i)
    scaled.row[i] = task.a[i] > 0.0 ? scaled.row[i] / task.epsilon : -INFINITY;
  std::fill(scaled.row + task.rows, scaled.row + round_up(task.rows, kStep), -INFINITY);
  for (uint32_t j = 0; j < task.columns; ++j)
    scaled.column[j] = task.b[j] > 0.0 ? scaled.column[j] / task.epsilon : -INFINITY;
  std::fill(scaled.column + task.columns, scaled.column + task.stride, -INFINITY);
  return scaled;
}

}  // namespace ph::ot
