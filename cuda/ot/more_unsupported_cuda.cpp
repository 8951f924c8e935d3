// What CUDA does not do yet of ot/gromov.h and ot/partial.h: typed errors instead of a fallback.
#include "common/error.h"
#include "ot/gromov.h"
#include "ot/partial.h"

namespace ph::ot {

void gromov(ph_device&, Workspace&, const Problem&, const Iterations&, const Gromov&) {
  throw Error(PH_ERROR_UNSUPPORTED,
              "Cannot solve Gromov-Wasserstein transport on CUDA yet: open a CPU device");
}

void partial(ph_device&, Workspace&, const Problem&, const Iterations&, const double*, const Solution&) {
  throw Error(PH_ERROR_UNSUPPORTED, "Cannot transport a part of the mass on CUDA yet: open a CPU device");
}

}  // namespace ph::ot
