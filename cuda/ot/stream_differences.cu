#include "ot/stream_cuda.h"

namespace ph::ot {

template void launch_stream_sinkhorn<Costs::kDifferences>(const ph_device&, const StreamCall&);
template void launch_stream_plan<Costs::kDifferences>(const ph_device&, const StreamCall&, bool);

}  // namespace ph::ot
