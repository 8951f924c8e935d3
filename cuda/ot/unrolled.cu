// Gradients of the iterations themselves.
#include <algorithm>

#include "ot/unrolled_cuda.h"

namespace ph::ot {

namespace {

// As many problems run at once as have room in this much, but at least one.
constexpr uint64_t kMostScratch = 32ull << 20;

uint64_t block_floats(const Bucket& bucket) {
  uint64_t floats = 0;
  dispatch_layout(bucket.layout,
                  [&](auto layout) { floats = unrolled_floats<decltype(layout)>(bucket.warps); });
  return floats;
}
uint32_t at_once(const Bucket& bucket) {
  const uint64_t room = kMostScratch / (block_floats(bucket) * sizeof(float) * bucket.ranks);
  return static_cast<uint32_t>(std::clamp<uint64_t>(room, 1, bucket.count));
}

uint64_t scratch_bytes(const std::vector<Bucket>& buckets) {
  uint64_t bytes = 0;
  for (const Bucket& bucket : buckets)
    bytes = std::max(bytes, at_once(bucket) * bucket.ranks * block_floats(bucket) * sizeof(float));
  return bytes;
}

}  // namespace

void unroll(CudaWorkspace& workspace, const Iterations& iterations, const BackwardCall& gradient) {
  if (workspace.unrolled_scratch == nullptr)
    workspace.unrolled_scratch = allocate(workspace.device, scratch_bytes(workspace.buckets));
  UnrolledCall call = {};
  static_cast<BackwardCall&>(call) = gradient;
  call.limits = iterations.limits;
  call.limit = iterations.limit;
  call.warm_g = static_cast<const float*>(iterations.warm_g);
  call.relaxation = static_cast<float>(iterations.relaxation);
  call.scaling = iterations.scaling;
  call.scratch = reinterpret_cast<float*>(workspace.unrolled_scratch);
  for_buckets(workspace, call, [&](auto layout, const Bucket& bucket, UnrolledCall each) {
    each.block_floats = block_floats(bucket);
    Bucket part = bucket;
    for (uint32_t first = 0; first < bucket.count; first += part.count) {
      part.count = std::min(bucket.count - first, at_once(bucket));
      launch_unrolled<decltype(layout)>(workspace.device, part, each);
      each.batch.order += part.count;
    }
  });
}

}  // namespace ph::ot
