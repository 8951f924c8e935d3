#include "ot/sinkhorn_cuda.h"

namespace ph::ot {

template void launch_sinkhorn<Columns128>(const ph_device&, const Bucket&, const SinkhornCall&);

}  // namespace ph::ot
