// Decode attention over a growing cache on the GPU: one launch for a layer and step.
//
// A thread block takes a piece of a sequence (packed blocks, and runs of tokens in 16 bits), a kv head, and up to
// 4 * kTiles columns: query tokens times heads of the group, which share one unpacking. Each of its warps works alone on
// its share of the piece: first its runs (recent.cuh), then its packed blocks (tile.cuh), whose records come into shared
// memory by bulk copies, kStages blocks ahead. The warps' results are merged in order. With more than one piece, partial
// results go through the workspace and the last thread block of a sequence and head merges them, in the order of the
// pieces: deterministic, and independent of the rest of the batch, as pieces depend on the sequence's own length alone.
//
// Reads every record once (its params once per kv head, from the cache), writes 4 * head_dim + 8 bytes per piece and
// column. Records and params are 16-byte aligned, and may straddle two pages of the pool.
#include <algorithm>

#include "attention/decode.h"
#include "attention/queries.cuh"
#include "attention/recent.cuh"
#include "attention/ring.cuh"
#include "attention/tile.cuh"
#include "device/device_cuda.h"

namespace ph::attention {

namespace {

using kv::CacheView;
using kv::kBlockTokens;
using kv::kMostQueries;
using kv::kParamsBytes;
using kv::StepPiece;
using kv::StepSequence;
using kv::StepView;

// Warps of a thread block. Two thread blocks share a multiprocessor, and three warps a quarter of it, with 168 registers a
// thread, or two with 255.
template <int kDim, int kTiles>
constexpr int kWarps = kDim* kTiles <= 192 ? 6 : 4;
template <int kDim, int kTiles>
constexpr int kThreads = kWarps<kDim, kTiles>* kWarpThreads;
constexpr int kMostWarps = 6;
template <int kDim, int kTiles>  // packed blocks of a warp, at most
constexpr uint32_t kWarpBlocks = kv::kMostPieceWork / kWarps<kDim, kTiles> + 1 + kv::kRunBlocks;
constexpr float kLog2E = 1.4426950408889634f;

// ---- columns ----

template <bool kBfloat>
__device__ __forceinline__ void store_value(uint8_t* out, uint64_t position, float value) {
  if constexpr (kBfloat) reinterpret_cast<__nv_bfloat16*>(out)[position] = __float2bfloat16_rn(value);
  else reinterpret_cast<__half*>(out)[position] = __float2half_rn(value);
}

template <int kDim, int kTiles>
__device__ __forceinline__ void begin_state(const Queries<kDim, kTiles>& queries,
                                            WarpState<kDim, kTiles>& state) {
  const uint32_t i = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    state.query_sum[n] = queries.sum[4 * n + i];
    state.query_scale[n] = queries.scale[4 * n + i];
    state.reference[n] = -1e30f;
    state.sum[n] = state.zeros[n] = 0.0f;
#pragma unroll
    for (int o = 0; o < kDim / 8; ++o) state.out[n][o] = 0.0f;
  }
}

// ---- pieces ----

// What one piece says of one column: exponents are base 2 and relative to `reference`.
struct PartSum {
  float reference, sum;
};

// The sum of parts with their weights, for merging.
__device__ __forceinline__ float part_weight(float reference, float most) {
  return exponential(reference - most);
}

template <int kDim, int kTiles>
struct PieceShared {
  static constexpr int kColumns = 4 * kTiles;
  static constexpr int kStride =
      kDim + 8;  // floats of a column; free of bank conflicts for the fragments' layout
  float out[kWarps<kDim, kTiles>][kColumns][kStride];
  PartSum sums[kWarps<kDim, kTiles>][kColumns];
};

// The window of a layer, for the columns of a thread block.
struct Window {
  uint32_t tokens, before;  // its length, or 0 for none; tokens of the sequence before the step

  // The first token, sinks aside, that query token `token` of the step sees.
  __device__ __forceinline__ uint32_t begin(uint32_t token) const {
    return kv::window_begin(tokens, before + token);
  }
  // The first packed block that query token 0 sees.
  __device__ __forceinline__ uint32_t first_block(uint32_t sinks) const {
    return begin(0) > sinks ? (begin(0) - sinks) / kBlockTokens : 0;
  }
};

// Hides the tokens of a tile, the first of them at `start`, that columns do not see.
template <int kTiles>
__device__ __forceinline__ void hide_tokens(const Window& window, const Columns& columns, uint32_t start,
                                            float (&scores)[kTiles][8]) {
  const uint32_t lane = threadIdx.x % kWarpThreads, g = lane / 4, i = lane % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const uint32_t begin = window.begin((columns.first + 4 * n + i) / columns.group);
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      if (start + 8 * g + t < begin) scores[n][t] = -INFINITY;
    }
  }
}

// Partial results in the workspace: of piece p, kv head h and column c, at ((p * heads) + h) * columns + c.
struct Partials {
  uint32_t* finished;  // [entries][heads][column groups], 0 before and after
  PartSum* sums;
  float* out;  // [..][kDim]
  uint32_t columns;
};

struct DecodeParameters {
  CacheView cache;
  StepView step;
  TileLayout layout;
  Partials partials;
  const uint8_t* queries;
  uint8_t* out;
  uint32_t layer, slot_bytes, stages, window;
  float scale;
};

// A warp's share of a piece.
struct Share {
  uint32_t first_run, runs, first_block, blocks;
};

// Runs go to the warps evenly; then every warp gets as many packed blocks as make its share as long as the others'.
template <int kWarps>
__device__ __forceinline__ Share warp_share(const StepPiece& piece, uint32_t warp) {
  const auto runs_before = [&](uint32_t w) { return (piece.runs * w + kWarps - 1) / kWarps; };
  const uint32_t work = piece.blocks + piece.runs * kv::kRunBlocks;
  uint32_t begin = 0, end = 0;  // blocks before the warp, and with it
#pragma unroll
  for (uint32_t w = 1; w <= kWarps; ++w) {
    if (w > warp + 1) break;
    begin = end;
    const uint32_t before = work * w / kWarps, of_runs = runs_before(w) * kv::kRunBlocks;
    end = max(end, before > of_runs ? before - of_runs : 0);
  }
  return {piece.first_run + runs_before(warp), runs_before(warp + 1) - runs_before(warp),
          piece.first_block + begin, end - begin};
}

// What a thread block works on.
struct Work {
  StepPiece piece;
  StepSequence entry;
  Columns columns;
  uint64_t row;  // of the first column in queries and out, in values
};

// Leaves each warp's result in `dynamic`, as PieceShared.
template <int kDim, int kTiles, bool kBfloat, bool kWide>
__device__ __forceinline__ void attend_piece(const CacheView& cache, const DecodeParameters& parameters,
                                             const Work& work, uint8_t* dynamic,
                                             Queries<kDim, kTiles>& queries,
                                             TileSpans (*spans)[kWarpBlocks<kDim, kTiles>],
                                             uint64_t (*barriers)[kStages]) {
  constexpr int kGroups = kDim / 32;
  const uint32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads, g = lane / 4,
                 i = lane % 4;
  const uint32_t head = blockIdx.y, stages = parameters.stages, slot_bytes = parameters.slot_bytes;
  const TileLayout& layout = parameters.layout;
  const Window window = {parameters.window, static_cast<uint32_t>(work.entry.before)};
  StepPiece piece = work.piece;
  const uint32_t skipped = max(piece.first_block, window.first_block(cache.sinks)) - piece.first_block;
  piece.first_block += skipped;
  piece.blocks -= min(piece.blocks, skipped);
  const Share share = warp_share<kWarps<kDim, kTiles>>(piece, warp);
  // Blocks that some column does not see all of come first.
  const uint32_t hidden = window.begin(kMostQueries - 1);
  for (uint32_t at = lane; at < share.blocks; at += kWarpThreads) {
    const kv::RecordSpan span = kv::record_span(
        cache, kv::index_of(cache, parameters.layer, work.entry.sequence), share.first_block + at, head);
    const uint32_t* pages = kv::page_table_of(cache, parameters.layer, work.entry.sequence);
    spans[warp][at] = {make_span(pages, span.params, span.params + kv::kParamsUnits),
                       make_span(pages, span.begin, span.end)};
  }
  const Ring ring = {dynamic + warp * stages * slot_bytes, slot_bytes, stages, barriers[warp]};
  ring.begin();
  __syncwarp();
  // The last slot serves as scratch for the runs first.
  const auto fetch = [&](uint32_t at, uint32_t stage) {
    ring.fetch(cache.pool, at < share.blocks ? &spans[warp][at] : nullptr, stage);
  };
  for (uint32_t stage = 0; stage + 1 < stages; ++stage) fetch(stage, stage);

  WarpState<kDim, kTiles> state;
  quantize_queries<kDim, kTiles, kBfloat>(work.columns, parameters.scale * kLog2E, queries);
  __syncthreads();
  begin_state(queries, state);
  if (share.runs > 0) {
    const StepSequence& entry = work.entry;
    const uint64_t row_bytes = static_cast<uint64_t>(cache.heads) * kDim * 2;
    const uint8_t* keys = cache.recent +
                          kv::stream_of(cache, parameters.layer, work.entry.sequence) * kv::kParts *
                              kv::recent_part_bytes(cache) +
                          head * (kDim * 2ull);
    const uint32_t length = static_cast<uint32_t>(entry.before) + entry.tokens;
    const uint32_t sinks = min(cache.sinks, length);
    const uint32_t unpacked = cache.sinks + entry.packed * kBlockTokens;
    const RecentTokens tokens = {sinks + (unpacked < length ? length - unpacked : 0), sinks, unpacked,
                                 cache.sinks, cache.ring};
    const Columns& columns = work.columns;
    for (uint32_t run = share.first_run; run < share.first_run + share.runs; ++run) {
      attend_run<kDim, kTiles, kBfloat>(
          tokens, run, keys, keys + kv::recent_part_bytes(cache), row_bytes, parameters.scale * kLog2E,
          [&](uint32_t column) {
            return column < columns.count ? columns.queries + 2 * columns.position(column, kDim) : nullptr;
          },
          // A query token sees those before it, and itself, as far as the window reaches.
          [&](uint32_t column, uint32_t token, bool is_sink) {
            const uint32_t query = (columns.first + column) / columns.group;
            return token <= window.before + query && (is_sink || token >= window.begin(query));
          },
          ring.slots + (stages - 1) * slot_bytes, state);
    }
    ring.reuse();
  }
  fetch(stages - 1, stages - 1);

  uint32_t stage = 0, phase = 0;
#pragma unroll 1
  for (uint32_t at = 0; at < share.blocks; ++at) {
    ring.wait(stage, phase);
    const uint8_t* slot = ring.slots + stage * slot_bytes;
    // Opaque, lest the compiler keeps every address that follows from it in a register of its own.
    uint32_t own_lane = lane;
    asm volatile("" : "+r"(own_lane));
    const Tile tile = {slot, slot + kParamsBytes, own_lane};
    uint2 widths = *reinterpret_cast<const uint2*>(tile.record);
    // The same in every lane: a reduction tells the compiler, which then branches on scalars.
    widths.x = __reduce_or_sync(kEveryLane, widths.x);
    widths.y = __reduce_or_sync(kEveryLane, widths.y);
    float scores[kTiles][8], units[kTiles];
    uint32_t weights[kTiles][4];
    with_width<kGroups, kWide>(widths.x, [&](auto width) {
      tile_scores<kDim, kTiles, kBfloat, kWide, decltype(width)::value>(tile, layout, widths.x, queries,
                                                                        state, scores);
    });
    const uint32_t start = cache.sinks + (share.first_block + at) * kBlockTokens;
    if (start < hidden) hide_tokens(window, work.columns, start, scores);
    tile_weights<kDim, kTiles, kBfloat>(tile, state, scores, weights, units);
    with_width<kGroups, kWide>(widths.y, [&](auto width) {
      tile_values<kDim, kTiles, kWide, decltype(width)::value>(
          tile, layout, layout.groups + kv::kGroupBytes * kv::width_sum(widths.x), widths.y, state, weights,
          units);
    });
    __syncwarp();
    fetch(at + stages, stage);
    if (++stage == stages) stage = 0, phase ^= 1;
  }

  __syncthreads();  // the slots are free: results take their place
  PieceShared<kDim, kTiles>& shared = *reinterpret_cast<PieceShared<kDim, kTiles>*>(dynamic);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    float sum = state.sum[n], zeros = state.zeros[n];
    for (int distance = 4; distance < kWarpThreads; distance *= 2) {
      sum += __shfl_xor_sync(kEveryLane, sum, distance);
      zeros += __shfl_xor_sync(kEveryLane, zeros, distance);
    }
#pragma unroll
    for (int o = 0; o < kDim / 8; ++o) shared.out[warp][4 * n + i][8 * o + g] = state.out[n][o] + zeros;
    if (g == 0) shared.sums[warp][4 * n + i] = {state.reference[n], sum};
  }
  __syncthreads();
}

template <int kDim, int kTiles, bool kBfloat, bool kWide>
__global__ void __launch_bounds__(kThreads<kDim, kTiles>, 2)
    DecodeKernel(const __grid_constant__ DecodeParameters parameters) {
  constexpr int kColumns = 4 * kTiles;
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ Queries<kDim, kTiles> queries;
  __shared__ TileSpans spans[kWarps<kDim, kTiles>][kWarpBlocks<kDim, kTiles>];
  __shared__ uint64_t barriers[kWarps<kDim, kTiles>][kStages];
  __shared__ uint32_t is_last;
  __shared__ Work work;  // here rather than in registers, of which the loop over blocks needs all
  const CacheView& cache = parameters.cache;
  const uint32_t first = blockIdx.z * kColumns;
  if (threadIdx.x == 0) {
    work.piece = parameters.step.pieces[blockIdx.x];
    work.entry = parameters.step.sequences[work.piece.entry];
    const uint32_t group = cache.query_heads / cache.heads, count = work.entry.tokens * group;
    const uint64_t row =
        (static_cast<uint64_t>(work.entry.input) * cache.query_heads + blockIdx.y * group) * kDim;
    work.row = row;
    work.columns = {parameters.queries + 2 * row, first,
                    first < count ? min(static_cast<uint32_t>(kColumns), count - first) : 0, group,
                    static_cast<uint64_t>(cache.query_heads) * kDim};
  }
  __syncthreads();
  if (work.columns.count == 0) return;
  attend_piece<kDim, kTiles, kBfloat, kWide>(cache, parameters, work, dynamic, queries, spans, barriers);

  const StepPiece piece = work.piece;
  const Columns columns = work.columns;
  const uint32_t head = blockIdx.y;
  const PieceShared<kDim, kTiles>& shared = *reinterpret_cast<const PieceShared<kDim, kTiles>*>(dynamic);
  uint8_t* out = parameters.out + 2 * work.row;
  const Partials& partials = parameters.partials;
  for (uint32_t at = threadIdx.x; at < columns.count * kDim; at += kThreads<kDim, kTiles>) {
    const uint32_t column = at / kDim, channel = at % kDim;
    float most = shared.sums[0][column].reference;
#pragma unroll
    for (int warp = 1; warp < kWarps<kDim, kTiles>; ++warp)
      most = fmaxf(most, shared.sums[warp][column].reference);
    float value = 0.0f, sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps<kDim, kTiles>; ++warp) {
      const float weight = part_weight(shared.sums[warp][column].reference, most);
      value = __fmaf_rn(weight, shared.out[warp][column][channel], value);
      sum = __fmaf_rn(weight, shared.sums[warp][column].sum, sum);
    }
    if (piece.pieces == 1) {
      store_value<kBfloat>(out, columns.position(column, kDim) + channel, value / sum);
    } else {
      const uint64_t part =
          (static_cast<uint64_t>(blockIdx.x) * cache.heads + head) * partials.columns + first + column;
      partials.out[part * kDim + channel] = value;
      if (channel == 0) partials.sums[part] = {most, sum};
    }
  }
  if (piece.pieces == 1) return;

  // The last thread block of the sequence and head merges the pieces.
  uint32_t* finished =
      partials.finished + (static_cast<uint64_t>(piece.entry) * cache.heads + head) * gridDim.z + blockIdx.z;
  __syncthreads();
  if (threadIdx.x == 0) {
    // One fence for all: the barrier orders the other threads' writes before it.
    __threadfence();
    is_last = atomicAdd(finished, 1u) == piece.pieces - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  const uint64_t stride = static_cast<uint64_t>(cache.heads) * partials.columns;
  const uint64_t start =
      (static_cast<uint64_t>(blockIdx.x - piece.place) * cache.heads + head) * partials.columns + first;
  for (uint32_t at = threadIdx.x; at < columns.count * kDim / 4; at += kThreads<kDim, kTiles>) {
    const uint32_t column = 4 * at / kDim, channel = 4 * at % kDim;
    const PartSum* sums = partials.sums + start + column;
    float most = -1e30f;
    for (uint32_t part = 0; part < piece.pieces; ++part)
      most = fmaxf(most, __ldcg(&sums[part * stride].reference));
    float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float sum = 0.0f;
#pragma unroll 4
    for (uint32_t part = 0; part < piece.pieces; ++part) {
      const float2 of_part = __ldcg(reinterpret_cast<const float2*>(&sums[part * stride]));
      const float4 x = __ldcg(
          reinterpret_cast<const float4*>(partials.out + (start + column + part * stride) * kDim + channel));
      const float weight = part_weight(of_part.x, most);
      sum = __fmaf_rn(weight, of_part.y, sum);
      value.x = __fmaf_rn(weight, x.x, value.x);
      value.y = __fmaf_rn(weight, x.y, value.y);
      value.z = __fmaf_rn(weight, x.z, value.z);
      value.w = __fmaf_rn(weight, x.w, value.w);
    }
    const uint64_t position = columns.position(column, kDim) + channel;
    store_value<kBfloat>(out, position, value.x / sum);
    store_value<kBfloat>(out, position + 1, value.y / sum);
    store_value<kBfloat>(out, position + 2, value.z / sum);
    store_value<kBfloat>(out, position + 3, value.w / sum);
  }
  if (threadIdx.x == 0) *finished = 0;
}

// ---- launch ----

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

template <typename Run>
void dispatch_dim(uint32_t head_dim, Run run) {
  if (head_dim == 64) run(std::integral_constant<int, 64>{});
  else if (head_dim == 96) run(std::integral_constant<int, 96>{});
  else if (head_dim == 128) run(std::integral_constant<int, 128>{});
  else run(std::integral_constant<int, 256>{});
}

uint32_t slot_bytes(const kv::TileShape& shape) {
  const uint32_t bytes =
      std::max(kParamsBytes + kv::largest_record_bytes(shape), run_scratch_bytes(shape.head_dim));
  return (bytes + 127) / 128 * 128;
}

// Tiles ahead that fit the shared memory of a thread block; throws if not even one does.
uint32_t stages_of(const ph_device& device, const kv::TileShape& shape) {
  constexpr uint32_t kFixedBytes = 8192;  // static shared memory of the kernels, at most
  const uint32_t limit = static_cast<uint32_t>(device.shared_bytes) - kFixedBytes;
  for (uint32_t stages = kStages; stages > 0; --stages) {
    if (kMostWarps * stages * slot_bytes(shape) <= limit) return stages;
  }
  throw Error(
      PH_ERROR_UNSUPPORTED,
      "Cannot attend to packed records of up to %u bytes on this GPU: that takes %u bytes of shared memory, "
      "and a thread block has %u",
      kv::largest_record_bytes(shape), kMostWarps * slot_bytes(shape), limit);
}

struct Launch {
  uint32_t columns, threads;  // of a thread block
  uint32_t stages, shared_bytes;
};

// Calls use(kernel, launch) for what suits so many columns of a kv head.
template <typename Use>
void with_kernel(const ph_device& device, const CacheView& cache, const kv::TileShape& shape,
                 uint32_t columns, Use use) {
  dispatch_dim(cache.head_dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    const auto with = [&](auto tiles, auto bfloat, auto wide) {
      constexpr int kTiles = decltype(tiles)::value;
      constexpr bool kBfloat = decltype(bfloat)::value;
      const uint32_t stages = stages_of(device, shape);
      const uint32_t shared_bytes = std::max<uint32_t>(kWarps<kDim, kTiles> * stages * slot_bytes(shape),
                                                       sizeof(PieceShared<kDim, kTiles>));
      use(DecodeKernel<kDim, kTiles, kBfloat, decltype(wide)::value>,
          Launch{4u * kTiles, kThreads<kDim, kTiles>, stages, shared_bytes});
    };
    const auto with_type = [&](auto tiles, auto wide) {
      if (cache.dtype == PH_BF16) with(tiles, std::true_type{}, wide);
      else with(tiles, std::false_type{}, wide);
    };
    const auto with_width = [&](auto tiles) {
      if (std::max(kv::largest_width(shape.parts[0]), kv::largest_width(shape.parts[1])) > 4)
        with_type(tiles, std::true_type{});
      else with_type(tiles, std::false_type{});
    };
    // One tile of four columns leaves more registers to wide heads.
    if constexpr (kDim < 256) {
      if (columns > 4) return with_width(std::integral_constant<int, 2>{});
    }
    with_width(std::integral_constant<int, 1>{});
  });
}

}  // namespace

uint64_t decode_workspace_bytes(const CacheView& cache, uint64_t pieces) {
  return workspace_layout(cache, pieces).bytes;
}

void decode(ph_device& device, const CacheView& cache, const kv::TileShape& shape, uint32_t layer,
            const StepView& step, const uint8_t* queries, uint8_t* out, float scale, uint8_t* workspace,
            uint32_t window) {
  // Places of partial results depend on the largest step the workspace was made for, so any bound on pieces will do.
  const WorkspaceLayout places = workspace_layout(cache, step.piece_count);
  const uint32_t columns = cache.query_heads / cache.heads * step.most_queries;
  DecodeParameters parameters{};
  parameters.cache = cache;
  parameters.step = step;
  parameters.layout = {kv::bases_position(shape, PH_KV_VALUES),
                       kv::bases_position(shape, kv::kParts),
                       {shape.parts[0].base_bits == 4, shape.parts[1].base_bits == 4}};
  parameters.partials = {reinterpret_cast<uint32_t*>(workspace + places.finished),
                         reinterpret_cast<PartSum*>(workspace + places.sums),
                         reinterpret_cast<float*>(workspace + places.out), columns};
  parameters.queries = queries;
  parameters.out = out;
  parameters.layer = layer;
  parameters.scale = scale;
  parameters.slot_bytes = slot_bytes(shape);
  parameters.window = window;
  with_kernel(device, cache, shape, columns, [&](auto kernel, const Launch& launch) {
    allow_shared(device, kernel);
    parameters.stages = launch.stages;
    const dim3 grid(step.piece_count, cache.heads, (columns + launch.columns - 1) / launch.columns);
    kernel<<<grid, launch.threads, launch.shared_bytes, device.stream>>>(parameters);
  });
  PH_CUDA_TRY(cudaGetLastError());
}

}  // namespace ph::attention
