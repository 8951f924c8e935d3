// The launches of gradients of iterations of small problems, one file for each layout.
#pragma once

#include "ot/unrolled_tile.cuh"
#include "ot/workspace_cuda.h"

namespace ph::ot {

template <typename L>
void launch_unrolled(const ph_device& device, const Bucket& bucket, const UnrolledCall& call) {
  const UnrolledShared<L> shared(bucket.warps);
  launch_bucket<L>(device, bucket, UnrolledTileKernel<L>, shared.work, shared.entries, call);
}
extern template void launch_unrolled<Columns64>(const ph_device&, const Bucket&, const UnrolledCall&);
extern template void launch_unrolled<Columns128>(const ph_device&, const Bucket&, const UnrolledCall&);
extern template void launch_unrolled<Columns512>(const ph_device&, const Bucket&, const UnrolledCall&);

// The gradients of `gradient`, of problems that all lie on chip. The first call allocates scratch memory of the workspace.
void unroll(CudaWorkspace& workspace, const Iterations& iterations, const BackwardCall& gradient);

}  // namespace ph::ot
