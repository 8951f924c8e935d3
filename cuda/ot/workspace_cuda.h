// What the CUDA backend keeps for batches of one shape.
#pragma once

#include <memory>
#include <type_traits>
#include <vector>

#include "device/device_cuda.h"
#include "ot/tile.cuh"

namespace ph::ot {

// Problems that are launched together: a thread block of `warps` warps, or a cluster of `ranks` of them, each.
struct Bucket {
  uint32_t layout;  // of Columns64, Columns128, Columns512
  uint32_t warps, ranks;
  uint32_t first, count;  // of the order
};

// A problem in streaming form.
struct LargeProblem {
  uint32_t problem, rows, columns;
  int64_t row_offset, column_offset, plan_offset;
};

struct ProblemSize {
  uint32_t rows, columns;
};
class SmallProblems;
class GromovProblems;

struct CudaWorkspace : Workspace {
  CudaWorkspace(ph_device& device, const Shape& shape, const WorkspaceOptions& options);
  ~CudaWorkspace() override;

  ph_device& device;
  WorkspaceOptions options;
  uint32_t problems;
  const int64_t *row_offsets, *column_offsets, *plan_offsets;
  const uint32_t* order;                   // problems by falling size
  std::vector<Bucket> buckets;             // by falling size
  std::vector<LargeProblem> large;         // which are in no bucket
  uint8_t* scratch = nullptr;              // of one of those at a time
  std::vector<ProblemSize> sizes;          // of all problems
  std::shared_ptr<SmallProblems> small;    // once exact or partial transport needs them
  std::shared_ptr<GromovProblems> gromov;  // once Gromov-Wasserstein transport needs them
  uint8_t* unrolled_scratch = nullptr;     // once gradients of iterations need it

 private:
  uint8_t* memory_ = nullptr;
};

// Calls run(layout) with the layout as an object.
template <typename Run>
void dispatch_layout(uint32_t layout, Run run) {
  if (layout == 0) run(Columns64{});
  else if (layout == 1) run(Columns128{});
  else run(Columns512{});
}

// Throws for a problem that does not lie on chip: "Cannot `what` problem ...".
void require_on_chip(const CudaWorkspace& workspace, const char* what);

// The part of a call that all kernels take; `order`, `ranks` and `first` are a launch's.
Batch batch_of(const CudaWorkspace& workspace, const Problem& problem);

// Launches a kernel for the problems of a bucket.
template <typename L, typename Call>
void launch_bucket(const ph_device& device, const Bucket& bucket, void (*kernel)(Call), uint32_t work,
                   uint32_t entries, const Call& call) {
  allow_shared(device, kernel, SharedMemory::kPrefer);
  launch_overlapping(device, kernel, dim3(bucket.count * bucket.ranks), bucket.warps * kWarp,
                     shared_bytes<L>(work, entries), call, bucket.ranks > 1 ? bucket.ranks : 0);
}

// Calls launch(layout, bucket, call) for every bucket, with the call's batch set for it. The launches overlap: one begins as
// soon as all thread blocks of the one before have begun. Only the first waits for what precedes the call; the last thread
// block of each waits for the launch before, so that whatever follows the call follows all of it.
template <typename Call, typename Launch>
void for_buckets(const CudaWorkspace& workspace, Call call, Launch launch) {
  call.batch.first = true;
  for (const Bucket& bucket : workspace.buckets) {
    call.batch.order = workspace.order + bucket.first;
    call.batch.ranks = bucket.ranks;
    dispatch_layout(bucket.layout, [&](auto layout) { launch(layout, bucket, call); });
    call.batch.first = false;
  }
}

}  // namespace ph::ot
