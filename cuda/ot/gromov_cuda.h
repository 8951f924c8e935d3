// What the CUDA backend keeps for Gromov-Wasserstein transport, beside the workspace, and its launches: see gromov.cuh.
#pragma once

#include <vector>

#include "ot/gromov.cuh"
#include "ot/workspace_cuda.h"

namespace ph::ot {

// Made at the first call, as most batches never need it. Memory on the device: 28 bytes a problem, and about 10 (n^2 + m^2) + 40 n m
// bytes for each of the thread blocks that run at once, as many of those as kMostScratch has room for, but at least one.
class GromovProblems {
 public:
  static constexpr uint64_t kMostScratch = 512ull << 20;

  // Throws `unsupported` for problems of more than kMostGraph rows or columns.
  GromovProblems(ph_device& device, const std::vector<ProblemSize>& sizes);
  ~GromovProblems();
  GromovProblems(const GromovProblems&) = delete;

  void solve(GromovCall call, const double* host_alphas) const;

 private:
  // Problems of similar sizes, which are launched together.
  struct Group {
    uint32_t layout, first, count, blocks;
    uint64_t rows_squared, columns_squared, entries;  // of the largest
  };

  ph_device& device_;
  uint32_t problems_;
  std::vector<Group> groups_;
  uint8_t* memory_ = nullptr;
  double *scratch_, *alphas_;
  int64_t *x_offsets_, *y_offsets_;
  uint32_t *order_, *taken_;
};

using Gromov64 = PathsLayout<64, 2, 8>;
using Gromov128 = PathsLayout<128, 4, 4>;
using Gromov256 = PathsLayout<256, 8, 2>;
using Gromov512 = PathsLayout<kMostGraph, 8, 2>;

// One file for each layout has this.
template <typename L>
void launch_gromov(const ph_device& device, uint32_t blocks, const GromovCall& call) {
  allow_shared(device, GromovKernel<L>);
  launch_overlapping(device, GromovKernel<L>, dim3(blocks), L::kThreads,
                     static_cast<uint32_t>(sizeof(GromovMemory<L>)), call);
}
extern template void launch_gromov<Gromov64>(const ph_device&, uint32_t, const GromovCall&);
extern template void launch_gromov<Gromov128>(const ph_device&, uint32_t, const GromovCall&);
extern template void launch_gromov<Gromov256>(const ph_device&, uint32_t, const GromovCall&);
extern template void launch_gromov<Gromov512>(const ph_device&, uint32_t, const GromovCall&);

}  // namespace ph::ot
