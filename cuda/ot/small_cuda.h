// What the CUDA backend keeps for exact and partial transport, beside the workspace: see small.cuh.
#pragma once

#include "ot/small.cuh"
#include "ot/workspace_cuda.h"

namespace ph::ot {

// Made at the first call, as most batches never need it; grows with the first masses and the first points, and then no more.
// Memory on the device: 4 bytes a problem; 8 bytes a problem for masses; 8 bytes a pair for costs of points.
class SmallProblems {
 public:
  // Throws `unsupported` for problems of more than kMostSmall rows or columns; `what`: what cannot be done to them.
  SmallProblems(CudaWorkspace& workspace, const char* what);
  ~SmallProblems();
  SmallProblems(const SmallProblems&) = delete;

  // The part of a call that both have: uploads masses, unless they are null, and computes the costs of points.
  SmallCall prepare(const Problem& problem, const double* host_masses, const Solution& solution);

  // Calls launch(call, count) for the problems of which the larger of rows and columns is above `least` and at most `most`, if
  // there are any. Launches overlap as those of for_buckets do.
  template <typename Launch>
  void for_sizes(SmallCall& call, uint32_t least, uint32_t most, Launch launch) const {
    const uint32_t first = more_than(most), last = more_than(least);
    if (first == last) return;
    call.batch.order = order_ + first;
    launch(call, last - first);
    call.batch.first = false;
  }

 private:
  uint32_t more_than(uint32_t size) const;

  CudaWorkspace& workspace_;
  std::vector<uint32_t> sizes_;  // the larger of rows and columns, falling, as problems are in order_
  uint64_t entries_ = 0;
  uint32_t* order_ = nullptr;
  double *masses_ = nullptr, *costs_ = nullptr;
};

// Those of the workspace, made if there are none yet.
SmallProblems& small_problems(CudaWorkspace& workspace, const char* what);

}  // namespace ph::ot
