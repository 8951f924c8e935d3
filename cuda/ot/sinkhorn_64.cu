#include "ot/sinkhorn_cuda.h"

namespace ph::ot {

template void launch_sinkhorn<Columns64>(const ph_device&, const Bucket&, const SinkhornCall&);

}  // namespace ph::ot
