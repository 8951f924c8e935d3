#include "ot/stream_gradient_cuda.h"

namespace ph::ot {

template void launch_stream_gradient<Costs::kDifferences>(const ph_device&, const GradientCall&);

}  // namespace ph::ot
