// Entropic transport of a part of the mass; see packhorse.h, ph_ot_partial. What ot/operations.h says of tensors holds.
#pragma once

#include "ot/operations.h"

namespace ph::ot {

// `workspace` keeps entries. Of `iterations` only limits count, and no penalties of `problem` do. host_masses: [problems],
// above 0.
void partial(ph_device& device, Workspace& workspace, const Problem& problem, const Iterations& iterations,
             const double* host_masses, const Solution& solution);

}  // namespace ph::ot
