// The launches of plans, their products and gradients of small problems, one file for each layout.
#pragma once

#include "ot/backward_tile.cuh"
#include "ot/workspace_cuda.h"

namespace ph::ot {

template <typename L>
void launch_plan(const ph_device& device, const Bucket& bucket, const PlanCall& call) {
  const PlanShared<L> shared(bucket.warps);
  launch_bucket<L>(device, bucket, PlanTileKernel<L>, shared.work, shared.entries, call);
}
template <typename L>
void launch_backward(const ph_device& device, const Bucket& bucket, const BackwardCall& call) {
  const BackwardShared<L> shared(bucket.warps);
  launch_bucket<L>(device, bucket, BackwardTileKernel<L>, shared.work, shared.entries, call);
}
extern template void launch_plan<Columns64>(const ph_device&, const Bucket&, const PlanCall&);
extern template void launch_plan<Columns128>(const ph_device&, const Bucket&, const PlanCall&);
extern template void launch_plan<Columns512>(const ph_device&, const Bucket&, const PlanCall&);
extern template void launch_backward<Columns64>(const ph_device&, const Bucket&, const BackwardCall&);
extern template void launch_backward<Columns128>(const ph_device&, const Bucket&, const BackwardCall&);
extern template void launch_backward<Columns512>(const ph_device&, const Bucket&, const BackwardCall&);

}  // namespace ph::ot
