// What CUDA does not do yet of optimal transport: typed errors instead of a fallback. Whoever writes an operation takes it out
// here.
#include "common/error.h"
#include "ot/gromov.h"
#include "ot/operations.h"

namespace ph::ot {

namespace {

[[noreturn]] void refuse(const char* what) {
  throw Error(PH_ERROR_UNSUPPORTED, "Cannot %s on CUDA yet: open a CPU device", what);
}

}  // namespace

void proximal(ph_device&, Workspace&, const Problem&, const Iterations&, uint32_t, const Solution&) {
  refuse("solve transport problems by proximal points");
}
void gromov(ph_device&, Workspace&, const Problem&, const Iterations&, const Gromov&) {
  refuse("solve Gromov-Wasserstein transport");
}

}  // namespace ph::ot
