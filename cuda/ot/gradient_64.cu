#include "ot/gradient_cuda.h"

namespace ph::ot {

template void launch_plan<Columns64>(const ph_device&, const Bucket&, const PlanCall&);
template void launch_backward<Columns64>(const ph_device&, const Bucket&, const BackwardCall&);

}  // namespace ph::ot
