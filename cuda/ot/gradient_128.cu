#include "ot/gradient_cuda.h"

namespace ph::ot {

template void launch_plan<Columns128>(const ph_device&, const Bucket&, const PlanCall&);
template void launch_backward<Columns128>(const ph_device&, const Bucket&, const BackwardCall&);

}  // namespace ph::ot
