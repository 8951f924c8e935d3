#include "ot/unrolled_cuda.h"

namespace ph::ot {

template void launch_unrolled<Columns64>(const ph_device&, const Bucket&, const UnrolledCall&);

}  // namespace ph::ot
