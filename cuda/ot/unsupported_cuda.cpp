// What CUDA does not do yet of ot/operations.h: typed errors instead of a fallback. Whoever writes an operation takes it out
// here.
#include "common/error.h"
#include "ot/operations.h"

namespace ph::ot {

namespace {

[[noreturn]] void refuse(const char* what) {
  throw Error(PH_ERROR_UNSUPPORTED, "Cannot %s on CUDA yet: open a CPU device", what);
}

}  // namespace

void write_plan(ph_device&, Workspace&, const Problem&, const Potentials&, void*) { refuse("write plans"); }
void plan_product(ph_device&, Workspace&, const Problem&, const Potentials&, const PlanProduct&) {
  refuse("multiply by plans");
}
void backward(ph_device&, Workspace&, const Problem&, const Potentials&, const Iterations&, const Backward&) {
  refuse("differentiate plans");
}

}  // namespace ph::ot
