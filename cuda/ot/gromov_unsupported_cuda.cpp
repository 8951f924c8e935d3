// What CUDA does not do yet of ot/gromov.h: a typed error instead of a fallback.
#include "common/error.h"
#include "ot/gromov.h"

namespace ph::ot {

void gromov(ph_device&, Workspace&, const Problem&, const Iterations&, const Gromov&) {
  throw Error(PH_ERROR_UNSUPPORTED,
              "Cannot solve Gromov-Wasserstein transport on CUDA yet: open a CPU device");
}

}  // namespace ph::ot
