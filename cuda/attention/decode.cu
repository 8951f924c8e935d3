// Decode attention over a growing cache on the GPU: what precedes the launch of a kernel (decode_kernel.cuh).
#include "attention/decode.h"
#include "attention/decode_kernel.cuh"

namespace ph::attention {

namespace {

struct WorkspaceLayout {
  uint64_t finished, sums, out, bytes;
};

WorkspaceLayout workspace_layout(const CacheView& cache, uint64_t pieces) {
  const uint64_t most_columns = static_cast<uint64_t>(cache.query_heads / cache.heads) * kMostQueries;
  const uint64_t parts = pieces * cache.heads * most_columns;
  const auto aligned = [](uint64_t bytes) { return (bytes + 255) / 256 * 256; };
  WorkspaceLayout layout{};
  layout.sums = decode_counter_bytes(cache);
  layout.out = layout.sums + aligned(parts * sizeof(PartSum));
  layout.bytes = layout.out + parts * cache.head_dim * sizeof(float);
  return layout;
}

}  // namespace

bool takes_queries(uint32_t) { return false; }

uint64_t decode_workspace_bytes(const CacheView& cache, uint64_t pieces) {
  return workspace_layout(cache, pieces).bytes;
}

void decode(ph_device& device, const CacheView& cache, const kv::TileShape& shape, uint32_t layer,
            const StepView& step, const uint8_t* queries, uint8_t* out, float scale, uint8_t* workspace,
            uint32_t window) {
  // Places of partial results depend on the largest step the workspace was made for, so any bound on pieces will do.
  const WorkspaceLayout places = workspace_layout(cache, step.piece_count);
  DecodeParameters parameters{};
  parameters.group = group_of(cache);
  const uint32_t columns = parameters.group.heads * step.most_queries;
  parameters.cache = cache;
  parameters.shape = shape;
  parameters.step = step;
  parameters.layout = tile_layout(shape);
  parameters.partials = {reinterpret_cast<uint32_t*>(workspace + places.finished),
                         reinterpret_cast<PartSum*>(workspace + places.sums),
                         reinterpret_cast<float*>(workspace + places.out), columns};
  parameters.queries = queries;
  parameters.out = out;
  parameters.layer = layer;
  parameters.scale = scale;
  parameters.window = window;
  dispatch_dim(cache.head_dim,
               [&](auto dim) { launch_decode<decltype(dim)::value>(device, parameters, columns); });
}

}  // namespace ph::attention
