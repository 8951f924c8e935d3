#include "ot/gromov_cuda.h"

namespace ph::ot {

template void launch_gromov<Gromov512>(const ph_device&, uint32_t, const GromovCall&);

}  // namespace ph::ot
