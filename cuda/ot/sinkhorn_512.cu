#include "ot/sinkhorn_cuda.h"

namespace ph::ot {

template void launch_sinkhorn<Columns512>(const ph_device&, const Bucket&, const SinkhornCall&);

}  // namespace ph::ot
