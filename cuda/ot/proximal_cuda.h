// The launches of proximal points of small problems, one file for each layout.
#pragma once

#include "ot/proximal_tile.cuh"
#include "ot/workspace_cuda.h"

namespace ph::ot {

template <typename L>
void launch_proximal(const ph_device& device, const Bucket& bucket, const ProximalCall& call) {
  launch_bucket<L>(device, bucket, ProximalTileKernel<L>, partial_floats<L>(bucket.warps),
                   ProximalShared<L>(bucket.warps).entries, call);
}
extern template void launch_proximal<Columns64>(const ph_device&, const Bucket&, const ProximalCall&);
extern template void launch_proximal<Columns128>(const ph_device&, const Bucket&, const ProximalCall&);
extern template void launch_proximal<Columns512>(const ph_device&, const Bucket&, const ProximalCall&);

}  // namespace ph::ot
