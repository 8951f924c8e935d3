// What CUDA does not do yet of optimal transport: typed errors instead of a fallback. Whoever writes an operation takes it out
// here.
#include "common/error.h"
#include "ot/operations.h"
#include "ot/partial.h"

namespace ph::ot {

namespace {

[[noreturn]] void refuse(const char* what) {
  throw Error(PH_ERROR_UNSUPPORTED, "Cannot %s on CUDA yet: open a CPU device", what);
}

}  // namespace

void exact(ph_device&, Workspace&, const Problem&, const double*, const Solution&) {
  refuse("solve transport problems exactly");
}
void partial(ph_device&, Workspace&, const Problem&, const Iterations&, const double*, const Solution&) {
  refuse("transport a part of the mass");
}
}  // namespace ph::ot
