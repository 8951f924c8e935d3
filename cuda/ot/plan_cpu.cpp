// Plans from potentials, whole or multiplied, a tile at a time.
#include <algorithm>
#include <cmath>

#include "ot/problem_cpu.h"

namespace ph::ot {

namespace {

// Rows [row, row + count) and columns [column, column + wide) of a plan, from one that was kept or from potentials.
class Plan {
 public:
  static constexpr uint64_t kScratch = 4 * kTileColumns;

  Plan(CpuWorkspace& workspace, const Problem& problem, const Potentials& potentials, uint32_t index,
       Arena& arena, bool parallel)
      : kept_(potentials.plan) {
    ph_ot_report report = potentials.reports[index];
    present_ = read_task(workspace, problem, index, Purpose::kReuse, arena, parallel, nullptr, task_, report);
    if (present_ && kept_ == nullptr) scaled_ = read_potentials(workspace, potentials, index, task_, arena);
  }
  // Whether there is one at all: else all is 0.
  bool present() const { return present_; }

  void rows(uint64_t row, uint32_t count, uint64_t column, uint32_t wide, double* cost, double* out) const {
    if (kept_ != nullptr) {
      const uint32_t real = static_cast<uint32_t>(std::min<uint64_t>(wide, task_.columns - column));
      for (uint32_t r = 0; r < count; ++r) {
        kernels().read(kept_, task_.dtype,
                       task_.first + static_cast<int64_t>((row + r) * task_.columns + column), real,
                       out + r * wide);
        std::fill(out + r * wide + real, out + (r + 1) * wide, 0.0);
      }
      return;
    }
    task_.costs(static_cast<uint32_t>(row), count, static_cast<uint32_t>(column), wide, cost, wide);
    for (uint32_t r = 0; r < count; ++r)
      kernels().plan_row(cost + r * wide, scaled_.row[row + r], scaled_.column + column, 1.0 / task_.epsilon,
                         wide, out + r * wide);
  }

  // Calls use(row, column, wide, plan of that row) for all tiles of these rows and columns.
  template <typename Use>
  void tiles(uint64_t first_row, uint64_t last_row, uint64_t first_column, uint64_t last_column,
             double* scratch, Use use) const {
    double* plan = scratch + kScratch;
    for (uint64_t i = first_row; i < last_row; i += 4) {
      const uint32_t count = static_cast<uint32_t>(std::min<uint64_t>(4, last_row - i));
      for (uint64_t j = first_column; j < last_column; j += kTileColumns) {
        const uint32_t wide = static_cast<uint32_t>(std::min<uint64_t>(kTileColumns, last_column - j));
        rows(i, count, j, wide, scratch, plan);
        for (uint32_t r = 0; r < count; ++r) use(i + r, j, wide, plan + r * wide);
      }
    }
  }

 private:
  const void* kept_;
  bool present_;
  Task task_;
  ScaledPotentials scaled_;
};

constexpr uint64_t kPieceRows = 32;

}  // namespace

void write_plan(ph_device&, Workspace& base, const Problem& problem, const Potentials& potentials,
                void* out) {
  CpuWorkspace& workspace = static_cast<CpuWorkspace&>(base);
  const Shape shape = workspace.shape();
  for_problems(workspace, [&](uint32_t index, Arena& arena, bool parallel) {
    const uint64_t n = static_cast<uint64_t>(shape.rows(index)),
                   m = static_cast<uint64_t>(shape.columns(index)), stride = round_up(m, kStep);
    const Plan plan(workspace, problem, potentials, index, arena, parallel);
    double* scratch = arena.doubles((n / kPieceRows + 1) * 2 * Plan::kScratch);
    double* zeros = arena.doubles(stride);
    std::fill(zeros, zeros + stride, 0.0);
    const auto write = [&](const double* source, uint64_t i, uint64_t j, uint64_t count) {
      kernels().write(source, out, workspace.options.dtype,
                      shape.host_plan_offsets[index] + static_cast<int64_t>(i * m + j), count);
    };
    for_pieces(n, kPieceRows, parallel, [&](uint64_t first, uint64_t last) {
      if (!plan.present()) {
        for (uint64_t i = first; i < last; ++i) write(zeros, i, 0, m);
        return;
      }
      plan.tiles(first, last, 0, stride, scratch + first / kPieceRows * 2 * Plan::kScratch,
                 [&](uint64_t i, uint64_t j, uint32_t wide, const double* row) {
                   write(row, i, j, std::min<uint64_t>(wide, m - j));
                 });
    });
  });
}

void plan_product(ph_device&, Workspace& base, const Problem& problem, const Potentials& potentials,
                  const PlanProduct& product) {
  CpuWorkspace& workspace = static_cast<CpuWorkspace&>(base);
  const Shape shape = workspace.shape();
  const uint32_t dtype = workspace.options.dtype;
  const uint64_t width = product.width;
  for_problems(workspace, [&](uint32_t index, Arena& arena, bool parallel) {
    const uint64_t n = static_cast<uint64_t>(shape.rows(index)),
                   m = static_cast<uint64_t>(shape.columns(index)), stride = round_up(m, kStep);
    const int64_t row = shape.host_row_offsets[index], column = shape.host_column_offsets[index];
    const Plan plan(workspace, problem, potentials, index, arena, parallel);
    const Kernels& k = kernels();
    if (!product.transposed) {
      double* matrix = arena.doubles(m * width);
      double* columns = arena.doubles(width * stride);  // of the matrix
      k.read(product.matrix, dtype, column * static_cast<int64_t>(width), m * width, matrix);
      for (uint64_t w = 0; w < width; ++w) {
        for (uint64_t j = 0; j < m; ++j) columns[w * stride + j] = matrix[j * width + w];
        std::fill(columns + w * stride + m, columns + (w + 1) * stride, 0.0);
      }
      const uint64_t piece_doubles = 2 * Plan::kScratch + (kPieceRows + 1) * width;
      double* ones = arena.doubles(stride);
      std::fill(ones, ones + stride, 1.0);
      double* scratch = arena.doubles((n / kPieceRows + 1) * piece_doubles);
      for_pieces(n, kPieceRows, parallel, [&](uint64_t first, uint64_t last) {
        double *own = scratch + first / kPieceRows * piece_doubles, *sums = own + 2 * Plan::kScratch,
               *some = sums + kPieceRows * width;
        double masses[kPieceRows] = {};
        std::fill(sums, some, 0.0);
        if (plan.present()) {
          plan.tiles(first, last, 0, stride, own,
                     [&](uint64_t i, uint64_t j, uint32_t wide, const double* t) {
                       k.dots(t, columns + j, stride, static_cast<uint32_t>(width), wide, some);
                       for (uint64_t w = 0; w < width; ++w) sums[(i - first) * width + w] += some[w];
                       if (product.normalised) masses[i - first] += k.dot(t, ones, wide);
                     });
        }
        for (uint64_t i = first; i < last && product.normalised; ++i)
          if (masses[i - first] > 0.0) k.scale(1.0 / masses[i - first], sums + (i - first) * width, width);
        k.write(sums, product.out, dtype, (row + static_cast<int64_t>(first)) * static_cast<int64_t>(width),
                (last - first) * width);
      });
      return;
    }
    double* matrix = arena.doubles(n * width);
    k.read(product.matrix, dtype, row * static_cast<int64_t>(width), n * width, matrix);
    const uint64_t piece_doubles = 2 * Plan::kScratch + (2 * width + 1) * kTileColumns;
    double* scratch = arena.doubles((stride / kTileColumns + 1) * piece_doubles);
    for_pieces(stride, kTileColumns, parallel, [&](uint64_t first, uint64_t last) {
      double *own = scratch + first / kTileColumns * piece_doubles, *sums = own + 2 * Plan::kScratch,
             *masses = sums + kTileColumns * width, *out = masses + kTileColumns;
      std::fill(sums, out, 0.0);
      if (plan.present()) {
        plan.tiles(0, n, first, last, own, [&](uint64_t i, uint64_t, uint32_t wide, const double* t) {
          for (uint64_t w = 0; w < width; ++w)
            k.add_scaled(matrix[i * width + w], t, sums + w * kTileColumns, wide);
          if (product.normalised) k.add_scaled(1.0, t, masses, wide);
        });
      }
      const uint64_t count = std::min(last, m) - first;
      for (uint64_t j = 0; j < count; ++j) {
        const double factor = product.normalised && masses[j] > 0.0 ? 1.0 / masses[j] : 1.0;
        for (uint64_t w = 0; w < width; ++w) out[j * width + w] = sums[w * kTileColumns + j] * factor;
      }
      k.write(out, product.out, dtype, (column + static_cast<int64_t>(first)) * static_cast<int64_t>(width),
              count * width);
    });
  });
}

}  // namespace ph::ot
