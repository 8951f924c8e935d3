#include "ot/stream_cuda.h"

namespace ph::ot {

template void launch_stream_sinkhorn<Costs::kMatrix>(const ph_device&, const StreamCall&);
template void launch_stream_plan<Costs::kMatrix>(const ph_device&, const StreamCall&, bool);

}  // namespace ph::ot
