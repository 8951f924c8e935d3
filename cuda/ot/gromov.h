// Gromov-Wasserstein transport on ragged batches; see packhorse.h, ph_ot_gromov. What ot/operations.h says of tensors holds.
#pragma once

#include "ot/operations.h"

namespace ph::ot {

// How far distances may be from symmetric, relative to the largest: what rounding in float32 leaves.
constexpr double kAsymmetry = 1e-5;

// What is compared, and where the answer goes. Cost (or null), masses and tolerances are those of the Problem beside it, which
// is balanced; the limit that of the Iterations.
struct Gromov {
  // Distances within each side: the symmetric [n, n] matrices of one problem after another, and the [m, m] ones.
  const void *x, *y;
  const double*
      host_alphas;  // [problems], in [0, 1]: the weight of the distortion, that of the cost is the rest
  void* plan;       // [entries] or null; 0 where there is no answer
  ph_ot_gromov_report* reports;  // [problems]
};
// `workspace` is of costs, not points, and keeps entries; CUDA takes up to 512 rows and columns.
void gromov(ph_device& device, Workspace& workspace, const Problem& problem, const Iterations& iterations,
            const Gromov& call);

}  // namespace ph::ot
