// Sorts the problems of a batch into launches.
#include <algorithm>
#include <tuple>

#include "common/error.h"
#include "ot/stream_gradient_cuda.h"

namespace ph::ot {

namespace {

// How a problem lies on chip; layout kTooLarge: it does not.
struct Place {
  uint32_t layout, warps, ranks;
};
constexpr uint32_t kTooLarge = 4;

template <typename L>
uint32_t most_rows(const ph_device& device) {
  return L::kWarpRows * L::kMostWarps * (device.major >= 9 ? kMostRanks : 1);
}

// Depends on the problem's size alone, so that its results do.
template <typename L>
bool place_in(const ph_device& device, uint32_t layout, int64_t rows, int64_t columns, Place& place) {
  if (columns > L::kMostColumns || rows > most_rows<L>(device)) return false;
  const int64_t warps = (rows + L::kWarpRows - 1) / L::kWarpRows;
  uint32_t ranks = 1;
  while (ranks * L::kMostWarps < warps) ranks *= 2;
  // Few sizes of blocks, so that there are few launches.
  uint32_t each = static_cast<uint32_t>((warps + ranks - 1) / ranks);
  if (each > 4 || L::kLaneRows == 2) each = (each + 1) / 2 * 2;
  place = {layout, each, ranks};
  return true;
}

Place place_of(const ph_device& device, int64_t rows, int64_t columns) {
  Place place = {kTooLarge, 0, 0};
  place_in<Columns64>(device, 0, rows, columns, place) ||
      place_in<Columns128>(device, 1, rows, columns, place) ||

      place_in<Columns512>(device, 2, rows, columns, place);
  return place;
}

}  // namespace

CudaWorkspace::CudaWorkspace(ph_device& device_, const Shape& shape, const WorkspaceOptions& options_)
    : device(device_), options(options_), problems(shape.problems) {
  if (options.dtype != PH_F32) {
    throw Error(PH_ERROR_UNSUPPORTED,
                "Cannot solve transport problems of dtype %u on CUDA: give f32, or open a CPU device",
                options.dtype);
  }
  std::vector<Place> places(problems);
  uint64_t scratch_bytes = 0;
  for (uint32_t p = 0; p < problems; ++p) {
    sizes.push_back({static_cast<uint32_t>(shape.rows(p)), static_cast<uint32_t>(shape.columns(p))});
    places[p] = place_of(device, shape.rows(p), shape.columns(p));
    if (options.streaming) places[p].layout = kTooLarge;
    if (places[p].layout != kTooLarge) continue;
    if (std::max(shape.rows(p), shape.columns(p)) > INT32_MAX / 2) {
      throw Error(PH_ERROR_UNSUPPORTED, "Cannot solve a transport problem of %lld x %lld on CUDA",
                  static_cast<long long>(shape.rows(p)), static_cast<long long>(shape.columns(p)));
    }
    large.push_back({p, static_cast<uint32_t>(shape.rows(p)), static_cast<uint32_t>(shape.columns(p)),
                     shape.host_row_offsets[p], shape.host_column_offsets[p], shape.host_plan_offsets[p]});
    const uint32_t rows = large.back().rows, columns = large.back().columns;
    const uint64_t gradient_bytes = options.backward ? stream_gradient_scratch_bytes(rows, columns) : 0;
    scratch_bytes = std::max(scratch_bytes,
                             stream_scratch_bytes(device, rows, columns, options.dimension) + gradient_bytes);
  }
  std::vector<uint32_t> sorted;
  for (uint32_t p = 0; p < problems; ++p)
    if (places[p].layout != kTooLarge) sorted.push_back(p);
  const auto key = [&](uint32_t p) {
    return std::make_tuple(places[p].ranks, places[p].warps, places[p].layout,
                           shape.rows(p) * shape.columns(p));
  };
  std::stable_sort(sorted.begin(), sorted.end(), [&](uint32_t p, uint32_t q) { return key(p) > key(q); });
  for (uint32_t i = 0; i < sorted.size(); ++i) {
    const Place& place = places[sorted[i]];
    if (buckets.empty() || buckets.back().layout != place.layout || buckets.back().warps != place.warps ||
        buckets.back().ranks != place.ranks)
      buckets.push_back({place.layout, place.warps, place.ranks, i, 0});
    ++buckets.back().count;
  }
  const uint64_t offsets = (problems + 1ull) * sizeof(int64_t);
  memory_ = allocate(device, 3 * offsets + problems * sizeof(uint32_t));
  uint8_t* next = memory_;
  for (auto [target, source] : {std::make_pair(&row_offsets, shape.host_row_offsets),
                                std::make_pair(&column_offsets, shape.host_column_offsets),
                                std::make_pair(&plan_offsets, shape.host_plan_offsets)}) {
    *target = reinterpret_cast<const int64_t*>(next);
    upload(device, next, source, offsets);
    next += offsets;
  }
  order = reinterpret_cast<const uint32_t*>(next);
  if (!sorted.empty()) upload(device, next, sorted.data(), sorted.size() * sizeof(uint32_t));
  if (scratch_bytes > 0) scratch = allocate(device, scratch_bytes);
}

CudaWorkspace::~CudaWorkspace() {
  for (uint8_t* memory : {memory_, scratch, unrolled_scratch})
    if (memory != nullptr) release(device, memory);
}

std::unique_ptr<Workspace> create_workspace(ph_device& device, const Shape& shape,
                                            const WorkspaceOptions& options) {
  return std::make_unique<CudaWorkspace>(device, shape, options);
}

void require_on_chip(const CudaWorkspace& workspace, const char* what) {
  if (workspace.large.empty()) return;
  const LargeProblem& large = workspace.large[0];
  throw Error(PH_ERROR_UNSUPPORTED,
              "Cannot %s problem %u of %u x %u on CUDA, which does not lie on chip: up to 64 columns it may "
              "have %u rows, up to 128 %u, up to 512 %u; or open a CPU device",
              what, large.problem, large.rows, large.columns, most_rows<Columns64>(workspace.device),
              most_rows<Columns128>(workspace.device), most_rows<Columns512>(workspace.device));
}

Batch batch_of(const CudaWorkspace& workspace, const Problem& problem) {
  Batch batch = {};
  batch.cost = static_cast<const float*>(problem.cost);
  batch.x = static_cast<const float*>(problem.x);
  batch.y = static_cast<const float*>(problem.y);
  batch.a = static_cast<const float*>(problem.a);
  batch.b = static_cast<const float*>(problem.b);
  batch.epsilons = problem.epsilons;
  batch.tolerances = problem.tolerances;
  batch.epsilon = problem.epsilon;
  batch.tolerance = problem.tolerance;
  batch.row_offsets = workspace.row_offsets;
  batch.column_offsets = workspace.column_offsets;
  batch.plan_offsets = workspace.plan_offsets;
  batch.dimension = workspace.options.dimension;
  batch.cost_kind = problem.cost_kind;
  batch.row_penalty = static_cast<float>(problem.row_penalty);
  batch.column_penalty = static_cast<float>(problem.column_penalty);
  batch.relative_epsilon = problem.relative_epsilon;
  return batch;
}

}  // namespace ph::ot
