#include "ot/proximal_cuda.h"

namespace ph::ot {

template void launch_proximal<Columns128>(const ph_device&, const Bucket&, const ProximalCall&);

}  // namespace ph::ot
