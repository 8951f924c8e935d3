// One problem of a batch on the CPU, in doubles, and the memory that solvers work in.
#pragma once

#include <algorithm>
#include <exception>
#include <memory>
#include <vector>

#include "ot/kernels_cpu.h"
#include "ot/operations.h"

namespace ph::ot {

// Memory that is taken piece by piece and given back at once. It grows at the first use of a size, and then no more.
class Arena {
 public:
  // 64-byte aligned, contents undefined.
  double* doubles(uint64_t count);
  void reset();

 private:
  struct Free {
    void operator()(void* data) const;
  };
  struct Chunk {
    std::unique_ptr<uint8_t, Free> data;
    uint64_t bytes, used;
  };
  std::vector<Chunk> chunks_;
};

// Problems of at least so many entries are solved one after another, each on all cores; the others each on one core.
constexpr uint64_t kLargeProblem = 1u << 21;
// Rows whose contributions to columns are summed before those of other rows: what fixes the order of sums.
constexpr uint32_t kChunkRows = 128;
// Columns that are worked on at once where a problem's entries are not kept.
constexpr uint32_t kTileColumns = 512;

inline uint64_t round_up(uint64_t count, uint64_t step) { return (count + step - 1) / step * step; }

struct CpuWorkspace : Workspace {
  std::vector<int64_t> row_offsets, column_offsets, plan_offsets;
  WorkspaceOptions options;
  std::vector<uint32_t> order;  // problems by falling size
  uint32_t large;               // how many of those are large
  std::vector<Arena> arenas;    // of threads

  Shape shape() const {
    return {static_cast<uint32_t>(order.size()), row_offsets.data(), column_offsets.data(),
            plan_offsets.data()};
  }
};

uint32_t thread_number();

// Runs use(problem, arena, parallel) for every problem. Throws what one of them throws.
template <typename Use>
void for_problems(CpuWorkspace& workspace, Use use) {
  const uint32_t count = static_cast<uint32_t>(workspace.order.size());
  for (uint32_t i = 0; i < workspace.large; ++i) {
    workspace.arenas[0].reset();
    use(workspace.order[i], workspace.arenas[0], true);
  }
  std::exception_ptr failure;
#pragma omp parallel if (count - workspace.large > 1)
  {
    Arena& arena = workspace.arenas[thread_number()];
#pragma omp for schedule(dynamic, 4)
    for (uint32_t i = workspace.large; i < count; ++i) {
      try {
        arena.reset();
        use(workspace.order[i], arena, false);
      } catch (...) {
#pragma omp critical(packhorse_ot)
        if (!failure) failure = std::current_exception();
      }
    }
  }
  if (failure) std::rethrow_exception(failure);
}

// Calls use(first, last) for pieces of 0..count.
template <typename Use>
void for_pieces(uint64_t count, uint64_t piece, bool parallel, Use use) {
  const uint64_t pieces = (count + piece - 1) / piece;
  if (!parallel || pieces < 2) {
    for (uint64_t i = 0; i < pieces; ++i) use(i * piece, std::min(count, (i + 1) * piece));
    return;
  }
#pragma omp parallel for schedule(dynamic)
  for (uint64_t i = 0; i < pieces; ++i) use(i * piece, std::min(count, (i + 1) * piece));
}

// A problem as the solvers see it.
struct Task {
  uint32_t rows, columns;
  uint64_t stride;  // columns, padded
  bool parallel;
  const double *a, *b;  // [rows], [stride]: b has a's total where marginals hold
  double total;         // of a
  Points points;        // if dimension is above 0, else
  const void* matrix;   // costs from element `first` on
  uint32_t dtype;
  int64_t first;
  double largest;  // finite |cost|
  double epsilon, tolerance;
  double row_penalty, column_penalty;

  bool balanced() const;
  // Costs of up to 4 rows, columns [column, column + columns), padding included.
  void costs(uint32_t row, uint32_t rows, uint32_t column, uint32_t columns, double* cost,
             uint64_t stride) const;
  // All of them, [rows, stride].
  void costs(double* cost) const;
};

enum class Purpose {
  kSolve,  // finds what is wrong with the problem, and its epsilon
  kReuse   // of a problem that was solved
};

// Reads the sizes and masses of a problem, as read_task does, and nothing else.
bool read_masses(CpuWorkspace& workspace, const Problem& problem, uint32_t index, Arena& arena, Task& task,
                 ph_ot_report& report);
// Reads a problem. False if something is wrong with it: `report` says what, if the purpose is to solve it.
// `cost`: null, or where all costs go.
bool read_task(CpuWorkspace& workspace, const Problem& problem, uint32_t index, Purpose purpose, Arena& arena,
               bool parallel, double* cost, Task& task, ph_ot_report& report);

// The same problem with rows and columns exchanged. Its costs must be of points.
Task transposed(const Task& task, Arena& arena);

// The potentials of a problem over its epsilon: [rows], [stride], -infinity in the padding.
struct ScaledPotentials {
  double *row, *column;
};
ScaledPotentials read_potentials(CpuWorkspace& workspace, const Potentials& potentials, uint32_t index,
                                 const Task& task, Arena& arena);

}  // namespace ph::ot
