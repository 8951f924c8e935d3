// What the CUDA backend keeps for batches of one shape.
#pragma once

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

struct CudaWorkspace : Workspace {
  CudaWorkspace(ph_device& device, const Shape& shape, const WorkspaceOptions& options);
  ~CudaWorkspace() override;

  ph_device& device;
  WorkspaceOptions options;
  uint32_t problems;
  const int64_t *row_offsets, *column_offsets, *plan_offsets;
  const uint32_t* order;        // problems by falling size
  std::vector<Bucket> buckets;  // by falling size

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

// The part of a call that all kernels take; `order`, `ranks` and `first` are a launch's.
Batch batch_of(const CudaWorkspace& workspace, const Problem& problem);

// Launches a kernel for the problems of every bucket; they overlap. call.batch is set for each. `kernel_of(layout)` and
// `entry_floats(layout, warps)` are the kernel and what it has in Tile::entries.
template <typename Call, typename KernelOf, typename EntryFloats>
void launch_buckets(const CudaWorkspace& workspace, Call call, KernelOf kernel_of, EntryFloats entry_floats) {
  const ph_device& device = workspace.device;
  call.batch.first = true;
  for (const Bucket& bucket : workspace.buckets) {
    call.batch.order = workspace.order + bucket.first;
    call.batch.ranks = bucket.ranks;
    dispatch_layout(bucket.layout, [&](auto layout) {
      const auto kernel = kernel_of(layout);
      allow_shared(device, kernel, SharedMemory::kPrefer);
      cudaLaunchAttribute attributes[2] = {};
      attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[0].val.programmaticStreamSerializationAllowed = 1;
      attributes[1].id = cudaLaunchAttributeClusterDimension;
      attributes[1].val.clusterDim = {bucket.ranks, 1, 1};
      cudaLaunchConfig_t launch{};
      launch.gridDim = dim3(bucket.count * bucket.ranks);
      launch.blockDim = dim3(bucket.warps * kWarp);
      launch.dynamicSmemBytes =
          (partial_floats<decltype(layout)>(bucket.warps) + entry_floats(layout, bucket.warps)) *
          sizeof(float);
      launch.stream = device.stream;
      launch.attrs = attributes;
      launch.numAttrs = device.major < 9 ? 0 : (bucket.ranks > 1 ? 2 : 1);
      PH_CUDA_TRY(cudaLaunchKernelEx(&launch, kernel, call));
    });
    call.batch.first = false;
  }
}

}  // namespace ph::ot
