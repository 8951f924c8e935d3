// The launches of Sinkhorn's iterations of small problems, one file for each layout.
#pragma once

#include "ot/sinkhorn_tile.cuh"
#include "ot/workspace_cuda.h"

namespace ph::ot {

template <typename L>
void launch_sinkhorn(const ph_device& device, const Bucket& bucket, const SinkhornCall& call) {
  const uint32_t staged = staged_floats<L>(bucket.warps), kept = entry_floats<L>(bucket.warps);
  launch_bucket<L>(device, bucket, SinkhornTileKernel<L>, partial_floats<L>(bucket.warps),
                   staged > kept ? staged : kept, call);
}
extern template void launch_sinkhorn<Columns64>(const ph_device&, const Bucket&, const SinkhornCall&);
extern template void launch_sinkhorn<Columns128>(const ph_device&, const Bucket&, const SinkhornCall&);
extern template void launch_sinkhorn<Columns512>(const ph_device&, const Bucket&, const SinkhornCall&);

}  // namespace ph::ot
