// Gromov-Wasserstein transport.
#include <algorithm>
#include <tuple>

#include "common/error.h"
#include "ot/gromov_cuda.h"

namespace ph::ot {

namespace {

template <typename Run>
void dispatch_gromov(uint32_t layout, Run run) {
  if (layout == 0) run(Gromov64{});
  else if (layout == 1) run(Gromov128{});
  else if (layout == 2) run(Gromov256{});
  else run(Gromov512{});
}

uint32_t layout_of(uint64_t size) { return size <= 64 ? 0 : size <= 128 ? 1 : size <= 256 ? 2 : 3; }

}  // namespace

GromovProblems::GromovProblems(ph_device& device, const std::vector<ProblemSize>& sizes)
    : device_(device), problems_(static_cast<uint32_t>(sizes.size())) {
  std::vector<int64_t> offsets(2 * problems_);
  std::vector<uint32_t> order(problems_);
  int64_t first_x = 0, first_y = 0;
  for (uint32_t p = 0; p < problems_; ++p) {
    const uint64_t n = sizes[p].rows, m = sizes[p].columns;
    if (std::max(n, m) > kMostGraph) {
      throw Error(PH_ERROR_UNSUPPORTED,
                  "Cannot match the graphs of problem %u of %u x %u on CUDA, where each may have up to %u "
                  "points: open a CPU device",
                  p, sizes[p].rows, sizes[p].columns, kMostGraph);
    }
    order[p] = p;
    offsets[p] = first_x;
    offsets[problems_ + p] = first_y;
    first_x += n * n;
    first_y += m * m;
  }
  // The largest begin first.
  const auto key = [&](uint32_t p) {
    const uint64_t n = sizes[p].rows, m = sizes[p].columns;
    return std::make_tuple(layout_of(std::max(n, m)), n * m * (n + m));
  };
  std::stable_sort(order.begin(), order.end(), [&](uint32_t p, uint32_t q) { return key(p) > key(q); });
  uint64_t scratch = 0;
  for (uint32_t i = 0; i < problems_;) {
    Group group = {std::get<0>(key(order[i])), i, 0, 0, 0, 0, 0};
    for (; i < problems_ && std::get<0>(key(order[i])) == group.layout; ++i) {
      const uint64_t n = sizes[order[i]].rows, m = sizes[order[i]].columns;
      group.rows_squared = std::max(group.rows_squared, n * n);
      group.columns_squared = std::max(group.columns_squared, m * m);
      group.entries = std::max(group.entries, n * m);
      ++group.count;
    }
    const uint64_t each = gromov_scratch(group.rows_squared, group.columns_squared, group.entries);
    uint64_t most = 0;
    dispatch_gromov(group.layout, [&](auto layout) {
      most = static_cast<uint64_t>(device.processors) * decltype(layout)::kBlocks;
    });
    most = std::min<uint64_t>({most, group.count, kMostScratch / sizeof(double) / each});
    group.blocks = static_cast<uint32_t>(std::max<uint64_t>(most, 1));
    scratch = std::max(scratch, group.blocks * each);
    groups_.push_back(group);
  }
  memory_ = allocate(device, (scratch + 3ull * problems_) * sizeof(double) + (problems_ + 1ull) * 4);
  scratch_ = reinterpret_cast<double*>(memory_);
  alphas_ = scratch_ + scratch;
  x_offsets_ = reinterpret_cast<int64_t*>(alphas_ + problems_);
  y_offsets_ = x_offsets_ + problems_;
  order_ = reinterpret_cast<uint32_t*>(y_offsets_ + problems_);
  taken_ = order_ + problems_;
  upload(device, reinterpret_cast<uint8_t*>(x_offsets_), offsets.data(), offsets.size() * sizeof(int64_t));
  upload(device, reinterpret_cast<uint8_t*>(order_), order.data(), order.size() * sizeof(uint32_t));
}

GromovProblems::~GromovProblems() { release(device_, memory_); }

void GromovProblems::solve(GromovCall call, const double* host_alphas) const {
  enqueue_upload(device_, reinterpret_cast<uint8_t*>(alphas_), host_alphas, problems_ * sizeof(double));
  call.alphas = alphas_;
  call.x_offsets = x_offsets_;
  call.y_offsets = y_offsets_;
  call.scratch = scratch_;
  call.taken = taken_;
  for (const Group& group : groups_) {
    call.batch.order = order_ + group.first;
    call.count = group.count;
    call.rows_squared = group.rows_squared;
    call.columns_squared = group.columns_squared;
    call.entries = group.entries;
    fill(device_, reinterpret_cast<uint8_t*>(taken_), 0, sizeof *taken_);
    dispatch_gromov(group.layout,
                    [&](auto layout) { launch_gromov<decltype(layout)>(device_, group.blocks, call); });
  }
}

void gromov(ph_device&, Workspace& base, const Problem& problem, const Iterations& iterations,
            const Gromov& given) {
  CudaWorkspace& workspace = static_cast<CudaWorkspace&>(base);
  if (workspace.gromov == nullptr)
    workspace.gromov = std::make_shared<GromovProblems>(workspace.device, workspace.sizes);
  GromovCall call = {};
  call.batch = batch_of(workspace, problem);
  call.x = static_cast<const float*>(given.x);
  call.y = static_cast<const float*>(given.y);
  call.limits = iterations.limits;
  call.limit = iterations.limit;
  call.plan = static_cast<float*>(given.plan);
  call.reports = given.reports;
  workspace.gromov->solve(call, given.host_alphas);
}

}  // namespace ph::ot
