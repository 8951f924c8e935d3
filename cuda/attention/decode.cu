// Decode attention over a growing cache on the GPU: one launch for a layer and step.
//
// A thread block takes a piece of a sequence (packed blocks, and runs of tokens in 16 bits), a kv head, and up to
// 4 * kTiles columns: query tokens times heads of the group, which share one unpacking. Each of its warps works alone on
// its share of the piece: first its runs (recent.cuh), then its packed blocks (tile.cuh), whose records come into shared
// memory by bulk copies, kStages blocks ahead. The warps' results are merged in order. With more than one piece, partial
// results go through the workspace and the last thread block of a sequence and head merges them, in the order of the
// pieces: deterministic, and independent of the rest of the batch, as pieces depend on the sequence's own length alone.
//
// Layers whose parts are both packkv or fixed, the common case, have kernels of their own, and so have those that are
// raw16 throughout: their warps take values from device memory into registers as tile_raw16.cuh says. A third flavour
// serves every other mixture.
//
// Reads every record once (its params once per kv head, from the cache), writes 4 * head_dim + 8 bytes per piece and
// column. Records and params are 16-byte aligned, and may straddle two pages of the pool.
#include <algorithm>

#include "attention/decode.h"
#include "attention/queries.cuh"
#include "attention/recent.cuh"
#include "attention/ring.cuh"
#include "attention/tile.cuh"
#include "attention/tile_kivi.cuh"
#include "attention/tile_raw16.cuh"
#include "device/device_cuda.h"

namespace ph::attention {

namespace {

using kv::CacheView;
using kv::kBlockTokens;
using kv::kMostQueries;
using kv::kParamsBytes;
using kv::kUnitBytes;
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

// What kernels are for: layers of packkv and fixed, with residuals of up to 4 bits or of more; of raw16; of any mixture.
enum class Flavour { kNarrow, kWide, kRaw16, kMixed };

// Where the packed blocks of the warps are.
template <Flavour kFlavour, int kWarps, uint32_t kBlocks>
struct Places {
  TileSpans spans[kFlavour == Flavour::kRaw16 ? 1 : kWarps][kFlavour == Flavour::kRaw16 ? 1 : kBlocks];
  RawValues raw[kFlavour < Flavour::kRaw16 ? 1 : kWarps][kFlavour < Flavour::kRaw16 ? 1 : kBlocks];
};

// ---- columns ----

template <bool kBfloat>
__device__ __forceinline__ void store_value(uint8_t* out, uint64_t position, float value) {
  if constexpr (kBfloat) reinterpret_cast<__nv_bfloat16*>(out)[position] = __float2bfloat16_rn(value);
  else reinterpret_cast<__half*>(out)[position] = __float2half_rn(value);
}

// All threads put queries into shared memory as they are; columns past the last are 0.
template <int kDim, int kTiles>
__device__ __forceinline__ void share_queries(const Columns& columns, SharedQueries<kDim, kTiles>& queries) {
  constexpr uint32_t kPairs = kDim / 2;
  for (uint32_t at = threadIdx.x; at < SharedQueries<kDim, kTiles>::kColumns * kPairs; at += blockDim.x) {
    const uint32_t column = at / kPairs, channel = 2 * (at % kPairs);
    const bool present = column < columns.count;
    const uint8_t* source = columns.queries + 2 * (columns.position(present ? column : 0, kDim) + channel);
    *reinterpret_cast<uint32_t*>(&queries.values[column][channel]) =
        present ? *reinterpret_cast<const uint32_t*>(source) : 0;
  }
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
  kv::TileShape shape;
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

// The queries of a thread block in shared memory, in all forms that a flavour needs.
template <int kDim, int kTiles>
struct BothQueries : Queries<kDim, kTiles> {
  SharedQueries<kDim, kTiles> plain;
};
template <int kDim, int kTiles, Flavour kFlavour>
using QueriesOf =
    std::conditional_t<(kFlavour < Flavour::kRaw16), Queries<kDim, kTiles>, BothQueries<kDim, kTiles>>;
template <int kDim, int kTiles, Flavour kFlavour>
using PlacesOf = Places<kFlavour, kWarps<kDim, kTiles>, kWarpBlocks<kDim, kTiles>>;

// A warp's packed blocks where both parts are raw16. Fragments of the next block are under way before one is done; more
// of them where there are fewer warps. Calls hide(block, scores).
template <int kDim, int kTiles, bool kBfloat, typename Hide>
__device__ __forceinline__ void attend_raw(const uint8_t* pool, const RawValues* blocks, uint32_t count,
                                           const SharedQueries<kDim, kTiles>& queries,
                                           WarpState<kDim, kTiles>& state, Hide hide) {
  constexpr int kAhead = kWarps < kDim, kTiles >> 4 ? 8 : 16;
  if (count == 0) return;
  uint4 held[kAhead];
  RawValues raw = blocks[0];
#pragma unroll
  for (int f = 0; f < kAhead; ++f) held[f] = raw.load(pool, f);
#pragma unroll 1
  for (uint32_t at = 0; at < count; ++at) {
    float scores[kTiles][8], factors[kTiles];
    uint32_t weights[kTiles][8];
    // The fragments of the values follow those of the keys.
    raw_scores<kDim, kTiles, kBfloat>(held, queries, scores, [&](int f) { return raw.load(pool, f); });
    hide(at, scores);
    softmax_step(state, scores, factors, [](int, float) {});
    raw_weights<kTiles, kBfloat>(scores, weights);
    const bool is_last = at + 1 == count;
    const RawValues next = blocks[is_last ? at : at + 1];
    raw_values<kDim, kTiles, kBfloat>(held, state, weights, factors, [&](int f) {
      if (f < kPartFragments<kDim>) return raw.load(pool, kPartFragments<kDim> + f);
      return is_last ? make_uint4(0, 0, 0, 0) : next.load(pool, f - kPartFragments<kDim>);
    });
    raw = next;
  }
}

// A packed block of any mixture. `raw` says where the part in 16 bits is, if there is one; all else is in the tile. `zeros`
// are of kivi's value groups. Calls hide(scores).
template <int kDim, int kTiles, bool kBfloat, typename Hide>
__device__ __forceinline__ void attend_mixed(const Tile& tile, const kv::TileShape& shape,
                                             const TileLayout& layout, uint2 widths,
                                             const BothQueries<kDim, kTiles>& queries, const uint8_t* pool,
                                             const RawValues& raw, WarpState<kDim, kTiles>& state,
                                             float (&zeros)[kTiles][kValueGroups<kDim>], Hide hide) {
  const kv::TilePart &keys = shape.parts[PH_KV_KEYS], &values = shape.parts[PH_KV_VALUES];
  const uint32_t value_groups = layout.groups + kv::kGroupBytes * kv::width_sum(widths.x);
  const auto load = [&](int f) {
    return f < kPartFragments<kDim> ? raw.load(pool, f) : make_uint4(0, 0, 0, 0);
  };
  uint4 held[8];
  const auto begin_raw = [&] {
#pragma unroll
    for (int f = 0; f < 8; ++f) held[f] = raw.load(pool, f);
  };
  float scores[kTiles][8], factors[kTiles];
  if (kv::is_raw16(keys)) {
    begin_raw();
    raw_scores<kDim, kTiles, kBfloat>(held, queries.plain, scores, load);
  } else if (kv::is_kivi(keys)) {
    kivi_scores<kDim, kTiles, kBfloat>(tile.lane, tile.record + kv::kTileHeaderBytes,
                                       tile.record + layout.groups, keys.width, queries.plain, scores);
  } else {
    tile_scores<kDim, kTiles, kBfloat, true, 0>(tile, layout, widths.x, queries, state, scores);
  }
  hide(scores);
  if (kv::is_per_token(values)) {
    uint32_t weights[kTiles][4];
    tile_weights<kDim, kTiles, kBfloat>(tile, state, scores, weights, factors);
    tile_values<kDim, kTiles, true, 0>(tile, layout, value_groups, widths.y, state, weights, factors);
    return;
  }
  if (kv::is_raw16(values)) begin_raw();
  softmax_step(state, scores, factors, [&](int n, float factor) {
#pragma unroll
    for (int group = 0; group < kValueGroups<kDim>; ++group) zeros[n][group] *= factor;
  });
  if (kv::is_raw16(values)) {
    uint32_t weights[kTiles][8];
    raw_weights<kTiles, kBfloat>(scores, weights);
    raw_values<kDim, kTiles, kBfloat>(held, state, weights, factors, load);
  } else {
    kivi_values<kDim, kTiles, kBfloat>(tile.lane, tile.record + layout.value_bases,
                                       tile.record + value_groups, values.width, scores, factors, state,
                                       zeros);
  }
}

// Adds the zero points' share to the outputs.
template <int kDim, int kTiles>
__device__ __forceinline__ void add_group_zeros(float (&zeros)[kTiles][kValueGroups<kDim>],
                                                WarpState<kDim, kTiles>& state) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int group = 0; group < kValueGroups<kDim>; ++group) {
      for (int distance = 4; distance < kWarpThreads; distance *= 2)
        zeros[n][group] += __shfl_xor_sync(kEveryLane, zeros[n][group], distance);
    }
#pragma unroll
    for (int o = 0; o < kDim / 8; ++o)
      state.out[n][o] += zeros[n][o / static_cast<int>(kv::kGroupChannels / 8)];
  }
}

// Leaves each warp's result in `dynamic`, as PieceShared.
template <int kDim, int kTiles, bool kBfloat, Flavour kFlavour>
__device__ __forceinline__ void attend_piece(const CacheView& cache, const DecodeParameters& parameters,
                                             const Work& work, uint8_t* dynamic,
                                             QueriesOf<kDim, kTiles, kFlavour>& queries,
                                             PlacesOf<kDim, kTiles, kFlavour>& places,
                                             uint64_t (*barriers)[kStages]) {
  constexpr int kGroups = kDim / 32;
  constexpr bool kWide = kFlavour == Flavour::kWide, kRaw = kFlavour == Flavour::kRaw16,
                 kMixed = kFlavour == Flavour::kMixed;
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
    const uint32_t* index = kv::index_of(cache, parameters.layer, work.entry.sequence);
    const uint32_t* pages = kv::page_table_of(cache, parameters.layer, work.entry.sequence);
    if constexpr (!kRaw && !kMixed) {
      const kv::RecordSpan span = kv::record_span(cache, index, share.first_block + at, head);
      places.spans[warp][at] = {make_span(pages, span.params, span.params + kv::kParamsUnits),
                                make_span(pages, span.begin, span.end)};
    } else {
      const uint32_t params_units = kv::params_bytes(parameters.shape) / kUnitBytes,
                     raw_units = kv::raw_bytes(parameters.shape) / kUnitBytes;
      const kv::RecordSpan span = kv::record_span(cache, index, share.first_block + at, head, params_units);
      if (raw_units > 0) places.raw[warp][at] = find_raw_values(pages, span.end, raw_units);
      if constexpr (kMixed) {
        places.spans[warp][at] = {make_span(pages, span.params, span.params + params_units),
                                  make_span(pages, span.begin, span.end - raw_units)};
      }
    }
  }
  const Ring ring = {dynamic + warp * stages * slot_bytes, slot_bytes, stages, barriers[warp]};
  ring.begin();
  __syncwarp();
  // The last slot serves as scratch for the runs first.
  const auto fetch = [&](uint32_t at, uint32_t stage) {
    if constexpr (!kRaw) ring.fetch(cache.pool, at < share.blocks ? &places.spans[warp][at] : nullptr, stage);
  };
  for (uint32_t stage = 0; stage + 1 < stages; ++stage) fetch(stage, stage);

  WarpState<kDim, kTiles> state;
  quantize_queries<kDim, kTiles, kBfloat>(work.columns, parameters.scale * kLog2E, queries);
  if constexpr (kRaw || kMixed) share_queries(work.columns, queries.plain);
  __syncthreads();
  begin_state(queries, state);
  if constexpr (kRaw || kMixed) {
    // Of scores of queries as they are.
    if (!kv::is_per_token(parameters.shape.parts[PH_KV_KEYS])) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) state.query_scale[n] = parameters.scale * kLog2E;
    }
  }
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

  const auto hide = [&](uint32_t at, float(&scores)[kTiles][8]) {
    const uint32_t start = cache.sinks + (share.first_block + at) * kBlockTokens;
    if (start < hidden) hide_tokens(window, work.columns, start, scores);
  };
  if constexpr (kRaw) {
    attend_raw<kDim, kTiles, kBfloat>(cache.pool, places.raw[warp], share.blocks, queries.plain, state, hide);
  } else {
    [[maybe_unused]] float group_zeros[kTiles][kValueGroups<kDim>] = {};
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
      if constexpr (kMixed) {
        attend_mixed<kDim, kTiles, kBfloat>(tile, parameters.shape, layout, widths, queries, cache.pool,
                                            places.raw[warp][at], state, group_zeros,
                                            [&](float(&scores)[kTiles][8]) { hide(at, scores); });
      } else {
        float scores[kTiles][8], units[kTiles];
        uint32_t weights[kTiles][4];
        with_width<kGroups, kWide>(widths.x, [&](auto width) {
          tile_scores<kDim, kTiles, kBfloat, kWide, decltype(width)::value>(tile, layout, widths.x, queries,
                                                                            state, scores);
        });
        hide(at, scores);
        tile_weights<kDim, kTiles, kBfloat>(tile, state, scores, weights, units);
        with_width<kGroups, kWide>(widths.y, [&](auto width) {
          tile_values<kDim, kTiles, kWide, decltype(width)::value>(
              tile, layout, layout.groups + kv::kGroupBytes * kv::width_sum(widths.x), widths.y, state,
              weights, units);
        });
      }
      __syncwarp();
      fetch(at + stages, stage);
      if (++stage == stages) stage = 0, phase ^= 1;
    }
    if constexpr (kMixed) add_group_zeros(group_zeros, state);
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

// What the last thread block needs to merge the pieces of a sequence and head.
template <int kTiles>
struct MergeShared {
  static constexpr uint32_t kParts = 64;  // pieces at a time
  float most[4 * kTiles], sum[4 * kTiles];
  float weights[4 * kTiles][kParts];
};

// Adds up the partial results of all pieces, in their order; those of column c and piece p are at start + c + p * stride.
template <int kDim, int kTiles, bool kBfloat>
__device__ __forceinline__ void merge_pieces(const Partials& partials, uint64_t start, uint64_t stride,
                                             uint32_t pieces, const Columns& columns, uint8_t* out,
                                             uint8_t* dynamic) {
  constexpr uint32_t kItems = 4 * kTiles * kDim / 4 / kThreads<kDim, kTiles> + 1;  // four channels each
  constexpr uint32_t kParts = MergeShared<kTiles>::kParts;
  MergeShared<kTiles>& shared = *reinterpret_cast<MergeShared<kTiles>*>(dynamic);
  const uint32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  const auto part_sum = [&](uint32_t column, uint32_t piece) {
    return __ldcg(reinterpret_cast<const float2*>(&partials.sums[start + column + piece * stride]));
  };
  for (uint32_t column = warp; column < columns.count; column += kWarps<kDim, kTiles>) {
    float most = -1e30f, sum = 0.0f;
    for (uint32_t piece = lane; piece < pieces; piece += kWarpThreads)
      most = fmaxf(most, part_sum(column, piece).x);
    for (int distance = 1; distance < kWarpThreads; distance *= 2)
      most = fmaxf(most, __shfl_xor_sync(kEveryLane, most, distance));
    for (uint32_t piece = lane; piece < pieces; piece += kWarpThreads) {
      const float2 part = part_sum(column, piece);
      sum = __fmaf_rn(part_weight(part.x, most), part.y, sum);
    }
    for (int distance = 1; distance < kWarpThreads; distance *= 2)
      sum += __shfl_xor_sync(kEveryLane, sum, distance);
    if (lane == 0) shared.most[column] = most, shared.sum[column] = sum;
  }
  __syncthreads();

  float4 values[kItems] = {};
  for (uint32_t begin = 0; begin < pieces; begin += kParts) {
    const uint32_t count = min(kParts, pieces - begin);
    for (uint32_t at = threadIdx.x; at < columns.count * kParts; at += kThreads<kDim, kTiles>) {
      const uint32_t column = at / kParts, piece = at % kParts;
      if (piece < count)
        shared.weights[column][piece] = part_weight(part_sum(column, begin + piece).x, shared.most[column]);
    }
    __syncthreads();
#pragma unroll
    for (uint32_t item = 0; item < kItems; ++item) {
      const uint32_t at = threadIdx.x + item * kThreads<kDim, kTiles>;
      if (at >= columns.count * kDim / 4) break;
      const uint32_t column = 4 * at / kDim, channel = 4 * at % kDim;
      const float* source = partials.out + (start + column + begin * stride) * kDim + channel;
#pragma unroll 8
      for (uint32_t piece = 0; piece < count; ++piece) {
        const float4 x = __ldcg(reinterpret_cast<const float4*>(source + piece * stride * kDim));
        const float weight = shared.weights[column][piece];
        values[item].x = __fmaf_rn(weight, x.x, values[item].x);
        values[item].y = __fmaf_rn(weight, x.y, values[item].y);
        values[item].z = __fmaf_rn(weight, x.z, values[item].z);
        values[item].w = __fmaf_rn(weight, x.w, values[item].w);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (uint32_t item = 0; item < kItems; ++item) {
    const uint32_t at = threadIdx.x + item * kThreads<kDim, kTiles>;
    if (at >= columns.count * kDim / 4) break;
    const uint32_t column = 4 * at / kDim, channel = 4 * at % kDim;
    const uint64_t position = columns.position(column, kDim) + channel;
    const float sum = shared.sum[column];
    store_value<kBfloat>(out, position, values[item].x / sum);
    store_value<kBfloat>(out, position + 1, values[item].y / sum);
    store_value<kBfloat>(out, position + 2, values[item].z / sum);
    store_value<kBfloat>(out, position + 3, values[item].w / sum);
  }
}

template <int kDim, int kTiles, bool kBfloat, Flavour kFlavour>
__global__ void __launch_bounds__(kThreads<kDim, kTiles>, 2)
    DecodeKernel(const __grid_constant__ DecodeParameters parameters) {
  constexpr int kColumns = 4 * kTiles;
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ QueriesOf<kDim, kTiles, kFlavour> queries;
  __shared__ PlacesOf<kDim, kTiles, kFlavour> places;
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
  attend_piece<kDim, kTiles, kBfloat, kFlavour>(cache, parameters, work, dynamic, queries, places, barriers);

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
  merge_pieces<kDim, kTiles, kBfloat>(partials, start, stride, piece.pieces, columns, out, dynamic);
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

bool is_raw16(const kv::TileShape& shape) {
  return kv::is_raw16(shape.parts[0]) && kv::is_raw16(shape.parts[1]);
}

// Of params and a record up to its 16-bit values, and of what runs need.
uint32_t slot_bytes(const kv::TileShape& shape) {
  const uint32_t of_tile =
      is_raw16(shape) ? 0 : kParamsBytes + kv::largest_record_bytes(shape) - kv::raw_bytes(shape);
  const uint32_t bytes = std::max(of_tile, run_scratch_bytes(shape.head_dim));
  return (bytes + 127) / 128 * 128;
}

// Tiles ahead that fit the shared memory of a thread block; throws if not even one does.
uint32_t stages_of(const ph_device& device, const kv::TileShape& shape) {
  // Static shared memory of the kernels, at most.
  const bool plain = kv::is_per_token(shape.parts[0]) && kv::is_per_token(shape.parts[1]);
  const uint32_t fixed_bytes = plain ? 8192 : 16384;
  const uint32_t limit = static_cast<uint32_t>(device.shared_bytes) - fixed_bytes;
  for (uint32_t stages = is_raw16(shape) ? 1 : kStages; stages > 0; --stages) {
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

// Calls use(kernel, launch) for what suits the layer.
template <typename Use>
void with_kernel(const ph_device& device, const CacheView& cache, const kv::TileShape& shape, Use use) {
  dispatch_dim(cache.head_dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    const auto with = [&](auto tiles, auto bfloat, auto flavour) {
      constexpr int kTiles = decltype(tiles)::value;
      constexpr bool kBfloat = decltype(bfloat)::value;
      const uint32_t stages = stages_of(device, shape);
      const uint32_t shared_bytes = std::max<uint32_t>(kWarps<kDim, kTiles> * stages * slot_bytes(shape),
                                                       sizeof(PieceShared<kDim, kTiles>));
      use(DecodeKernel<kDim, kTiles, kBfloat, decltype(flavour)::value>,
          Launch{4u * kTiles, kThreads<kDim, kTiles>, stages, shared_bytes});
    };
    const auto with_type = [&](auto tiles, auto flavour) {
      if (cache.dtype == PH_BF16) with(tiles, std::true_type{}, flavour);
      else with(tiles, std::false_type{}, flavour);
    };
    const auto with_flavour = [&](auto tiles) {
      const kv::TilePart &keys = shape.parts[0], &values = shape.parts[1];
      if (is_raw16(shape)) {
        with_type(tiles, std::integral_constant<Flavour, Flavour::kRaw16>{});
      } else if (!kv::is_per_token(keys) || !kv::is_per_token(values)) {
        with_type(tiles, std::integral_constant<Flavour, Flavour::kMixed>{});
      } else if (std::max(kv::largest_width(keys), kv::largest_width(values)) > 4) {
        with_type(tiles, std::integral_constant<Flavour, Flavour::kWide>{});
      } else {
        with_type(tiles, std::integral_constant<Flavour, Flavour::kNarrow>{});
      }
    };
    // By the group alone, not by the step's tokens: a sequence's results must not depend on the rest of the batch. One
    // tile of four columns leaves more registers to wide heads.
    if constexpr (kDim < 256) {
      if (cache.query_heads / cache.heads > 4) return with_flavour(std::integral_constant<int, 2>{});
    }
    with_flavour(std::integral_constant<int, 1>{});
  });
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
  const uint32_t columns = cache.query_heads / cache.heads * step.most_queries;
  DecodeParameters parameters{};
  parameters.cache = cache;
  parameters.shape = shape;
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
  with_kernel(device, cache, shape, [&](auto kernel, const Launch& launch) {
    allow_shared(device, kernel, SharedMemory::kPrefer);
    parameters.stages = launch.stages;
    const dim3 grid(step.piece_count, cache.heads, (columns + launch.columns - 1) / launch.columns);
    kernel<<<grid, launch.threads, launch.shared_bytes, device.stream>>>(parameters);
  });
  PH_CUDA_TRY(cudaGetLastError());
}

}  // namespace ph::attention
