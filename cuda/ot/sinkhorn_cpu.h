// Sinkhorn's iterations for one problem, and what they leave.
#pragma once

#include "ot/problem_cpu.h"

namespace ph::ot {

// Half an iteration that was made: f or g became (1 - relaxation) of what it was plus `relaxation` of its update at `epsilon`.
struct HalfStep {
  bool rows;
  double epsilon, relaxation;
  std::vector<double> potential;
};

struct IterationSettings {
  uint32_t limit;
  double relaxation, scaling;
};
IterationSettings settings_of(const Iterations& iterations, uint32_t index);

// `g` holds what to start from, and then the result, like f; massless ones are -infinity. `plan` is null where the entries are
// not kept; else [rows, stride], and `cost` holds the costs. Fills the report. False if there is no answer.
bool solve(const Task& task, const IterationSettings& settings, Arena& arena, const double* cost,
           double* plan, double* f, double* g, ph_ot_report& report, std::vector<HalfStep>* history);

// Writes what was found of a problem, or 0 where nothing was. `plan` [rows, stride] is null where entries are not kept.
void write_solution(const CpuWorkspace& workspace, uint32_t index, bool solved, bool parallel, double* f,
                    double* g, double* plan, const Solution& solution);

// Where the iterations start.
void read_start(const Task& task, const void* warm_g, int64_t first, double* g);

}  // namespace ph::ot
