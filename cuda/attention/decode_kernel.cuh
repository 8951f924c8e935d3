// Decode attention over a growing cache on the GPU: one launch for a layer and step.
//
// A thread block takes a piece of a sequence (packed blocks, and runs of tokens in 16 bits), a kv head, and up to
// 4 * kTiles columns: query tokens times heads of the group, which share one unpacking. Each of its warps works alone on
// its share of the piece: its packed blocks (tile.cuh), one or two at a time, whose records come into shared memory by bulk
// copies, kStages times as many ahead, and between them, every warp at another time, its runs (recent.cuh). The warps'
// results are merged in order. With more than one piece, partial results go through the workspace and the last thread block
// of a sequence and head merges them, in an order that depends on their number alone: deterministic, and independent of the
// rest of the batch, as pieces depend on the sequence's own length, and on what the cache was created with.
//
// Layers whose parts are both packkv or fixed, the common case, have kernels of their own, where all widths are 2, 3 or 4
// one for each, whose code has no branches on them; so have layers that are raw16 throughout: their warps take values from
// device memory into registers as tile_raw16.cuh says. A last flavour serves every other mixture.
//
// Reads every record once (its params once per kv head, from the cache), writes 4 * head_dim + 8 bytes per piece and
// column. Records and params are 16-byte aligned, and may straddle two pages of the pool.
#pragma once

#include <algorithm>

#include "attention/decode.h"
#include "attention/launch.cuh"
#include "attention/queries.cuh"
#include "attention/recent.cuh"
#include "attention/ring.cuh"
#include "attention/tile.cuh"
#include "attention/tile_kivi.cuh"
#include "attention/tile_raw16.cuh"

namespace ph::attention {

using kv::CacheView;
using kv::kBlockTokens;
using kv::kMostQueries;
using kv::kUnitBytes;
using kv::StepPiece;
using kv::StepSequence;
using kv::StepView;

// What kernels are for: layers of fixed with 2, 3 or 4 bits throughout, which have no bases; of packkv and fixed, with
// residuals of up to 4 bits, or of more; of raw16; of any mixture.
enum class Flavour { kFixed2, kFixed3, kFixed4, kNarrow, kWide, kRaw16, kMixed };

// The width of every group, or 0.
__host__ __device__ constexpr int width_of(Flavour flavour) {
  return flavour < Flavour::kNarrow ? static_cast<int>(flavour) - static_cast<int>(Flavour::kFixed2) + 2 : 0;
}

// Warps of a thread block. Two thread blocks share a multiprocessor, and four warps a quarter of it, with 128 registers a
// thread, three with 168, or two with 255. Four are for records of 2 bits, which leave memory the least time.
template <int kDim, int kTiles, Flavour kFlavour>
constexpr int kWarps = kDim* kTiles <= 128 && kFlavour == Flavour::kFixed2 ? 8
                       : kDim* kTiles <= 192                               ? 6
                                                                           : 4;
// Packed blocks that a warp takes at a time. Two are one step of the softmax, and their values one sum: an eighth less time
// for instructions, twice the shared memory and 40 registers. That is for what instructions limit most, records of 2 bits that
// eight columns share.
template <int kDim, int kTiles, Flavour kFlavour>
constexpr int kBatch =
    kTiles == 2 && kFlavour == Flavour::kFixed2&& kWarps<kDim, kTiles, kFlavour> == 4 ? 2 : 1;
template <int kDim, int kTiles, Flavour kFlavour>
constexpr int kThreads = kWarps<kDim, kTiles, kFlavour>* kWarpThreads;
template <int kWarps>  // packed blocks of a warp, at most
constexpr uint32_t kWarpBlocks = (kv::kMostPieceWork + kWarps - 1) / kWarps;

// Where the packed blocks of the warps are.
template <Flavour kFlavour, int kWarps>
struct Places {
  static constexpr bool kHasTiles = kFlavour != Flavour::kRaw16, kHasRaw = kFlavour >= Flavour::kRaw16;
  TileCopies tiles[kHasTiles ? kWarps : 1][kHasTiles ? kWarpBlocks<kWarps> : 1];
  RawValues raw[kHasRaw ? kWarps : 1][kHasRaw ? kWarpBlocks<kWarps> : 1];
};

// ---- columns ----

// Four values over `sum`, as 16-bit floats.
template <bool kBfloat>
__device__ __forceinline__ void store_quotients(uint8_t* out, uint64_t position, const float4& values,
                                                float sum) {
  *reinterpret_cast<uint2*>(out + 2 * position) = {to_halves<kBfloat>(values.x / sum, values.y / sum),
                                                   to_halves<kBfloat>(values.z / sum, values.w / sum)};
}

__device__ __forceinline__ void add_weighted(float4& sum, float weight, const float4& x) {
  sum.x = __fmaf_rn(weight, x.x, sum.x);
  sum.y = __fmaf_rn(weight, x.y, sum.y);
  sum.z = __fmaf_rn(weight, x.z, sum.z);
  sum.w = __fmaf_rn(weight, x.w, sum.w);
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
  }
}

template <int kDim, int kTiles>
__device__ __forceinline__ void clear_state(WarpState<kDim, kTiles>& state) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    state.reference[n] = kNoReference;
    state.sum[n] = state.zeros[n] = state.weights[n] = 0.0f;
#pragma unroll
    for (int o = 0; o < kDim / 8; ++o) state.out[n][o] = 0.0f;
  }
}

// ---- pieces ----

// What one piece says of one column: exponents are base 2 and relative to `reference`.
struct PartSum {
  float reference, sum;
};

// What a part counts in a sum that is relative to `most`.
__device__ __forceinline__ float part_weight(float reference, float most) {
  return exponential(reference - most);
}

// What a warp says of a piece, where its ring was.
template <int kDim, int kTiles>
struct WarpResult {
  static constexpr int kColumns = 4 * kTiles;
  static constexpr int kStride =
      kDim + 8;  // floats of a column; free of bank conflicts for the fragments' layout
  float out[kColumns][kStride];
  PartSum sums[kColumns];
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
    const uint32_t begin = window.begin(columns.token(4 * n + i));
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
  Group group;
  const uint8_t* queries;
  uint8_t* out;
  uint32_t layer, slot_bytes, stages, window;
  uint32_t record_units;  // of a head record where all have the same width
  float scale;
};

// A warp's share of a piece.
struct Share {
  uint32_t first_run, runs, first_block, blocks;
};

// Runs are dealt to the warps evenly, packed blocks by what they leave.
template <int kWarps, int kBatch>
__device__ __forceinline__ Share warp_share(const StepPiece& piece, uint32_t warp) {
  const auto runs_before = [&](uint32_t w) { return (piece.runs * w + kWarps - 1) / kWarps; };
  uint32_t begin = 0, end = 0, at = 0;  // of the warp's packed blocks, and where a warp's begin
  // Without branches, as a warp waits for it before its first copies.
#pragma unroll
  for (uint32_t w = 0; w < kWarps; ++w) {
    const uint32_t next = kv::share_end<uint32_t>(piece.blocks, piece.runs, at, runs_before(w + 1), w, kWarps,
                                                  kWarpBlocks<kWarps>, kBatch);
    if (w == warp) begin = at, end = next;
    at = next;
  }
  begin = alike(begin), end = alike(end);
  return {piece.first_run + runs_before(warp), runs_before(warp + 1) - runs_before(warp),
          piece.first_block + begin, end - begin};
}

// What a thread block works on: a piece of a sequence, and a kv head; the heads of a piece, which share its params, follow
// each other.
struct Work {
  StepPiece piece;  // without what no query token of the sequence sees
  uint32_t index, head;
  Columns columns;
  uint64_t row;  // of the first column in queries and out, in values
  Window window;

  __device__ __forceinline__ Work(const DecodeParameters& parameters, const StepPiece& piece_,
                                  uint32_t index_, uint32_t columns_at_once)
      : piece(piece_), index(index_), head(blockIdx.x - index_ * parameters.cache.heads) {
    const CacheView& cache = parameters.cache;
    const Group& group = parameters.group;
    const uint32_t first = blockIdx.y * columns_at_once, count = piece.sequence.tokens * group.heads;
    row = (static_cast<uint64_t>(piece.sequence.input) * cache.query_heads + head * group.heads) *
          cache.head_dim;
    columns = {parameters.queries + 2 * row, first, first < count ? min(columns_at_once, count - first) : 0,
               group, static_cast<uint64_t>(cache.query_heads) * cache.head_dim};
    window = {parameters.window, static_cast<uint32_t>(piece.sequence.before)};
    const uint32_t skipped = max(piece.first_block, window.first_block(cache.sinks)) - piece.first_block;
    piece.first_block += skipped;
    piece.blocks -= min(piece.blocks, skipped);
  }

  // How many of `count` packed blocks from `first` on were packed in earlier steps.
  __device__ __forceinline__ uint32_t settled_blocks(uint32_t first, uint32_t count) const {
    const uint32_t before = piece.sequence.packed - piece.sequence.blocks;
    return before > first ? min(count, before - first) : 0;
  }
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
using PlacesOf = Places<kFlavour, kWarps<kDim, kTiles, kFlavour>>;

// A warp's packed blocks where both parts are raw16. Fragments of the next block are under way before one is done; more
// of them where there are fewer warps. Calls hide(block, scores).
template <int kDim, int kTiles, bool kBfloat, typename Hide>
__device__ __forceinline__ void attend_raw(const uint8_t* pool, const RawValues* blocks, uint32_t count,
                                           const SharedQueries<kDim, kTiles>& queries,
                                           WarpState<kDim, kTiles>& state, Hide hide) {
  constexpr int kAhead = kWarps < kDim, kTiles, Flavour::kRaw16 >> 4 ? 8 : 16;
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
// are of kivi's value groups. Calls hide(scores) if it `hides` some.
template <int kDim, int kTiles, bool kBfloat, typename Hide>
__device__ __forceinline__ void attend_mixed(const Tile (&tiles)[1], const kv::TileShape& shape,
                                             const TileLayout& layout, uint2 widths,
                                             const BothQueries<kDim, kTiles>& queries, const uint8_t* pool,
                                             const RawValues& raw, WarpState<kDim, kTiles>& state,
                                             float (&zeros)[kTiles][kValueGroups<kDim>], bool hides,
                                             Hide hide) {
  const Tile& tile = tiles[0];
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
  float scores[1][kTiles][8], factors[kTiles];
  if (kv::is_raw16(keys)) {
    begin_raw();
    raw_scores<kDim, kTiles, kBfloat>(held, queries.plain, scores[0], load);
  } else if (kv::is_kivi(keys)) {
    kivi_scores<kDim, kTiles, kBfloat>(tile.lane, tile.record + kv::kTileHeaderBytes,
                                       tile.record + layout.groups, keys.width, queries.plain, scores[0]);
  } else {
    tile_scores<kDim, kTiles, kBfloat, true, 0>(tile, layout, widths.x, queries, state, scores[0]);
  }
  if (kv::is_per_token(values)) {
    uint32_t weights[1][kTiles][4];
    tile_weights<kDim, kTiles, kBfloat>(tiles, state, scores, hides, hide, weights, factors);
    tile_values<kDim, kTiles, true, 0>(tiles, layout, value_groups, widths.y, state, weights, factors);
    return;
  }
  if (hides) hide(scores);
  if (kv::is_raw16(values)) begin_raw();
  softmax_step(state, scores[0], factors, [&](int n, float factor) {
#pragma unroll
    for (int group = 0; group < kValueGroups<kDim>; ++group) zeros[n][group] *= factor;
  });
  if (kv::is_raw16(values)) {
    uint32_t weights[kTiles][8];
    raw_weights<kTiles, kBfloat>(scores[0], weights);
    raw_values<kDim, kTiles, kBfloat>(held, state, weights, factors, load);
  } else {
    kivi_values<kDim, kTiles, kBfloat>(tile.lane, tile.record + layout.value_bases,
                                       tile.record + value_groups, values.width, scores[0], factors, state,
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

// How the last thread block merges the pieces of a sequence and head, and what it needs where its rings were. A team of threads
// takes a stretch of the pieces, a thread of it four channels of a column at a time. Each time that pieces are loaded is a way
// to memory, and the next launch waits for it: where there are many, as many at once as registers hold.
template <int kDim, int kTiles, int kWarps, bool kMany>
struct Merge {
  static constexpr uint32_t kColumns = 4 * kTiles, kTeamThreads = kMany && kWarps == 8 ? 128 : 64;
  static constexpr uint32_t kTeams = kWarps * kWarpThreads / kTeamThreads;
  static constexpr uint32_t kItems = (kColumns * kDim / 4 + kTeamThreads - 1) / kTeamThreads;  // of a thread
  static constexpr uint32_t kLoads = !kMany ? 12 : kWarps == 8 ? 17 : kWarps == 6 ? 22 : 36;
  static constexpr uint32_t kAhead = kLoads / kItems;  // pieces of an item, loaded at once
  float4 values[kTeams][kColumns * kDim / 4];
  PartSum sums[kTeams][kColumns];
  PartSum parts[kTeams][kMany ? kAhead : 1][kColumns];
};

// A sum of parts that may each be relative to another reference.
struct WeightedSum {
  float4 value = {};
  PartSum part = {kNoReference, 0.0f};

  // The parts are `stride` apart.
  template <uint32_t kParts>
  __device__ __forceinline__ void add(const float4 (&values)[kParts], const PartSum* parts, uint32_t stride) {
    float most = part.reference;
#pragma unroll
    for (uint32_t at = 0; at < kParts; ++at) most = fmaxf(most, parts[at * stride].reference);
    const float own = part_weight(part.reference, most);
    value = {value.x * own, value.y * own, value.z * own, value.w * own};
    part = {most, part.sum * own};
#pragma unroll
    for (uint32_t at = 0; at < kParts; ++at) {
      const float weight = part_weight(parts[at * stride].reference, most);
      add_weighted(value, weight, values[at]);
      part.sum = __fmaf_rn(weight, parts[at * stride].sum, part.sum);
    }
  }
};

// Adds up the partial results of all pieces, in a fixed order; those of column c and piece p are at start + c + p * stride.
template <int kDim, int kTiles, bool kBfloat, int kWarps, bool kMany>
__device__ __forceinline__ void merge_pieces(const Partials& partials, uint64_t start, uint64_t stride,
                                             uint32_t pieces, const Columns& columns, uint8_t* out,
                                             Merge<kDim, kTiles, kWarps, kMany>& shared) {
  using M = Merge<kDim, kTiles, kWarps, kMany>;
  const uint32_t team = threadIdx.x / M::kTeamThreads, items = columns.count * kDim / 4;
  const auto item_of = [&](uint32_t k) { return threadIdx.x % M::kTeamThreads + k * M::kTeamThreads; };
  const auto load_sum = [&](uint64_t part) -> PartSum {
    const float2 sum = __ldcg(reinterpret_cast<const float2*>(partials.sums + part));
    return {sum.x, sum.y};
  };
  const uint32_t begin = pieces * team / M::kTeams, last = pieces * (team + 1) / M::kTeams,
                 most = (pieces + M::kTeams - 1) / M::kTeams;  // of a team
  WeightedSum sums[M::kItems];
#pragma unroll 1
  for (uint32_t done = 0; done < most; done += M::kAhead) {
    const uint32_t first = begin + done;
    float4 values[M::kItems][M::kAhead];
    [[maybe_unused]] PartSum parts[M::kItems][M::kAhead];
#pragma unroll
    for (uint32_t k = 0; k < M::kItems; ++k) {
#pragma unroll
      for (uint32_t at = 0; at < M::kAhead; ++at) {
        values[k][at] = {};
        if constexpr (!kMany) parts[k][at] = {kNoReference, 0.0f};
        if (first + at >= last || item_of(k) >= items) continue;
        const uint64_t part = start + 4 * item_of(k) / kDim + (first + at) * stride;
        values[k][at] =
            __ldcg(reinterpret_cast<const float4*>(partials.out + part * kDim) + item_of(k) % (kDim / 4));
        if constexpr (!kMany) parts[k][at] = load_sum(part);
      }
    }
    if constexpr (kMany) {
      // Threads that take the same column share what there is of it.
      if (done > 0) __syncthreads();
      PartSum* sums_of_team = &shared.parts[team][0][0];
      for (uint32_t at = threadIdx.x % M::kTeamThreads; at < M::kAhead * M::kColumns; at += M::kTeamThreads) {
        const uint32_t piece = first + at / M::kColumns, column = at % M::kColumns;
        const bool present = piece < last && column < columns.count;
        sums_of_team[at] = present ? load_sum(start + column + piece * stride) : PartSum{kNoReference, 0.0f};
      }
      __syncthreads();
#pragma unroll
      for (uint32_t k = 0; k < M::kItems; ++k)
        sums[k].add(values[k], sums_of_team + min(4 * item_of(k) / kDim, M::kColumns - 1), M::kColumns);
    } else {
#pragma unroll
      for (uint32_t k = 0; k < M::kItems; ++k) sums[k].add(values[k], parts[k], 1);
    }
  }
#pragma unroll
  for (uint32_t k = 0; k < M::kItems; ++k) {
    const uint32_t item = item_of(k);
    if (item >= items) break;
    shared.values[team][item] = sums[k].value;
    if (item % (kDim / 4) == 0) shared.sums[team][4 * item / kDim] = sums[k].part;
  }
  __syncthreads();
  for (uint32_t item = threadIdx.x; item < items; item += kWarps * kWarpThreads) {
    const uint32_t column = 4 * item / kDim;
    float4 values[M::kTeams];
    PartSum parts[M::kTeams];
#pragma unroll
    for (uint32_t of_team = 0; of_team < M::kTeams; ++of_team) {
      values[of_team] = shared.values[of_team][item];
      parts[of_team] = shared.sums[of_team][column];
    }
    WeightedSum all;
    all.add(values, parts, 1);
    store_quotients<kBfloat>(out, columns.position(column, kDim) + 4 * item % kDim, all.value, all.part.sum);
  }
}

// The shared memory of a thread block beside its rings.
template <int kDim, int kTiles, Flavour kFlavour>
struct DecodeShared {
  QueriesOf<kDim, kTiles, kFlavour> queries;
  PlacesOf<kDim, kTiles, kFlavour> places;
  float4 factors[kFlavour == Flavour::kRaw16 ? 1 : kWarps<kDim, kTiles, kFlavour>]
                [kBatch<kDim, kTiles, kFlavour>][kWarpThreads];  // see Tile
  uint64_t barriers[kWarps<kDim, kTiles, kFlavour>][kStages * kBatch<kDim, kTiles, kFlavour>];
  uint64_t queries_ready;
  uint32_t is_last;
};

// A warp of a thread block.
template <int kDim, int kTiles, bool kBfloat, Flavour kFlavour>
struct DecodeWarp {
  static constexpr int kGroups = kDim / 32, kWidth = width_of(kFlavour);
  static constexpr uint32_t kOwnBatch = kBatch<kDim, kTiles, kFlavour>;
  // Tiles that are on their way before the queries: of 2 bits, one batch, as more would hold the queries up.
  static constexpr uint32_t kEarly = kFlavour == Flavour::kFixed2 ? kOwnBatch : kStages;
  static constexpr bool kWide = kFlavour == Flavour::kWide, kRaw = kFlavour == Flavour::kRaw16,
                        kMixed = kFlavour == Flavour::kMixed;

  const DecodeParameters& parameters;
  const Work& work;
  DecodeShared<kDim, kTiles, kFlavour>& shared;
  uint32_t warp, lane;
  Share share;
  Ring ring;

  __device__ __forceinline__ DecodeWarp(const DecodeParameters& parameters_, const Work& work_,
                                        DecodeShared<kDim, kTiles, kFlavour>& shared_, uint8_t* dynamic)
      : parameters(parameters_),
        work(work_),
        shared(shared_),
        warp(warp_index()),
        lane(lane_index()),
        share(warp_share<kWarps<kDim, kTiles, kFlavour>, kBatch<kDim, kTiles, kFlavour>>(work.piece, warp)),
        ring{dynamic + warp * parameters.stages * parameters.slot_bytes, parameters.slot_bytes,
             parameters.stages, shared.barriers[warp]} {}

  // Batches of packed blocks that the warp takes at a time; of the last, some may be missing.
  __device__ __forceinline__ uint32_t batches() const { return (share.blocks + kOwnBatch - 1) / kOwnBatch; }

  // Looks up where the warp's packed blocks `from` to `to` are.
  __device__ __forceinline__ void find_blocks(uint32_t from, uint32_t to) const {
    const CacheView& cache = parameters.cache;
    const uint32_t* index = kv::index_of(cache, parameters.layer, work.piece.sequence.sequence);
    const uint32_t* pages = kv::page_table_of(cache, parameters.layer, work.piece.sequence.sequence);
    for (uint32_t at = from + lane; at < to; at += kWarpThreads) {
      const uint32_t block = share.first_block + at;
      if constexpr (!kRaw && !kMixed) {
        const kv::RecordSpan span = kWidth > 0
                                        ? kv::record_span(cache, block, work.head, parameters.record_units)
                                        : kv::record_span(cache, index, block, work.head);
        shared.places.tiles[warp][at] = {
            make_copy(cache.pool, make_span(pages, span.params, span.params + kv::kParamsUnits)),
            make_copy(cache.pool, make_span(pages, span.begin, span.end))};
      } else {
        const uint32_t params_units = kv::params_bytes(parameters.shape) / kUnitBytes,
                       raw_units = kv::raw_bytes(parameters.shape) / kUnitBytes;
        const kv::RecordSpan span = kv::record_span(cache, index, block, work.head, params_units);
        if (raw_units > 0) shared.places.raw[warp][at] = find_raw_values(pages, span.end, raw_units);
        if constexpr (kMixed) {
          shared.places.tiles[warp][at] = {
              make_copy(cache.pool, make_span(pages, span.params, span.params + params_units)),
              make_copy(cache.pool, make_span(pages, span.begin, span.end - raw_units))};
        }
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ void fetch(uint32_t at, uint32_t stage) const {
    if constexpr (!kRaw) {
      if (at >= share.blocks) return ring.skip();
      fetch(shared.places.tiles[warp][at], stage);
    }
  }
  __device__ __forceinline__ void fetch(const TileCopies& copies, uint32_t stage) const {
    ring.copy(parameters.cache.pool, stage, {copies.record, copies.params},
              {copies.record_position(), copies.params_position()});
  }

  // `scratch`: a slot of the ring into which no copy is on its way. For `rescale` see move_references.
  template <typename Rescale>
  __device__ __forceinline__ void attend_runs(uint8_t* scratch, WarpState<kDim, kTiles>& state,
                                              Rescale rescale) const {
    const CacheView& cache = parameters.cache;
    const StepSequence& sequence = work.piece.sequence;
    const Columns& columns = work.columns;
    const uint32_t packed = sequence.packed * kBlockTokens;
    const RecentTokens tokens = recent_tokens<kDim>(cache, parameters.layer, sequence.sequence, work.head,
                                                    static_cast<uint32_t>(sequence.before) + sequence.tokens,
                                                    packed, packed % cache.ring);
    const RunQueries<kDim, kTiles> queries([&](uint32_t column) {
      return column < columns.count ? columns.queries + 2 * columns.position(column, kDim) : nullptr;
    });
#pragma unroll 1
    for (uint32_t run = share.first_run; run < share.first_run + share.runs; ++run) {
      attend_run<kDim, kTiles, kBfloat>(
          tokens, run, parameters.scale * kLog2E, queries,
          // A query token sees those before it, and itself, as far as the window reaches.
          [&](uint32_t column, uint32_t token, bool is_sink) {
            const uint32_t query = columns.token(column);
            return token <= work.window.before + query && (is_sink || token >= work.window.begin(query));
          },
          scratch, state, rescale);
    }
    ring.reuse();
  }

  // Before which of its packed blocks, the first of a batch, a warp works on its runs, if it has any. They are loaded as they
  // are needed: warps that did so at the same time, before their first block or after their last, would leave the memory idle
  // meanwhile.
  __device__ __forceinline__ uint32_t turn_of_runs() const {
    if (share.runs == 0) return UINT32_MAX;
    constexpr uint32_t kParts = kWarps<kDim, kTiles, kFlavour> + 1;
    return kOwnBatch * min(max(batches() * (warp + 1) / kParts, 1), batches());
  }

  // Works on the warp's share and leaves its result where its ring was.
  __device__ __forceinline__ void attend() const {
    const CacheView& cache = parameters.cache;
    const TileLayout& layout = parameters.layout;
    QueriesOf<kDim, kTiles, kFlavour>& queries = shared.queries;
    const uint32_t blocks = share.blocks, stages = ring.stages;
    // Blocks of earlier steps are on their way before the kernel that precedes this one, which may pack others, has ended.
    const uint32_t settled = work.settled_blocks(share.first_block, blocks);
    find_blocks(0, settled);
    // Before the runs' turn, one slot is left free for them.
    const uint32_t turn = turn_of_runs(), filled = turn == 0 ? stages - 1 : stages;
    const uint32_t early = min(min(filled, settled), kEarly);
    for (uint32_t stage = 0; stage < early; ++stage) fetch(stage, stage);
    __syncthreads();  // the queries' barrier has begun
    LaneQuery<kDim> query(work.columns, warp < kTiles ? warp : 0);
    wait_for_preceding();
    // The next launch may begin when every thread block has a warp with a quarter of its tiles to go: its first copies would
    // take their time from those of a ragged batch's last thread blocks, which it waits for.
    const uint32_t begins_next = kOwnBatch * (batches() * 3 / 4);
    if (kRaw || blocks == 0) let_next_begin();
    query.load();
    if (settled < blocks) find_blocks(settled, blocks);
    for (uint32_t stage = early; stage < filled; ++stage) fetch(stage, stage);
    if (warp < kTiles)
      quantize_queries<kDim, kTiles, kBfloat>(query, warp, parameters.scale * kLog2E, queries);
    if constexpr (kRaw || kMixed) share_queries(work.columns, queries.plain);
    arrive(&shared.queries_ready);
    WarpState<kDim, kTiles> state;
    clear_state(state);
    await(&shared.queries_ready);
    begin_state(queries, state);
    if constexpr (kRaw || kMixed) {
      // Of scores of queries as they are.
      if (!kv::is_per_token(parameters.shape.parts[PH_KV_KEYS])) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) state.query_scale[n] = parameters.scale * kLog2E;
      }
    }

    const uint32_t first_token = cache.sinks + share.first_block * kBlockTokens;
    // Blocks that some column does not see all of come first.
    const uint32_t hidden = work.window.begin(kMostQueries - 1);
    uint32_t hidden_blocks = hidden > first_token ? (hidden - first_token - 1) / kBlockTokens + 1 : 0;
    asm volatile("" : "+r"(hidden_blocks));  // lest the compiler computes it for every block
    const auto hide = [&](uint32_t block, float(&scores)[kTiles][8]) {
      hide_tokens(work.window, work.columns, first_token + block * kBlockTokens, scores);
    };
    if constexpr (kRaw) {
      if (share.runs > 0) attend_runs(ring.slots, state, [](int, float) {});
      attend_raw<kDim, kTiles, kBfloat>(cache.pool, shared.places.raw[warp], blocks, queries.plain, state,
                                        [&](uint32_t at, float(&scores)[kTiles][8]) {
                                          if (at < hidden_blocks) hide(at, scores);
                                        });
    } else {
      [[maybe_unused]] float group_zeros[kTiles][kValueGroups<kDim>] = {};
      uint32_t stage = 0, phase = 0, ready = 0;
      // The first tile that is not next, as it is the runs' turn or the end; tiles to be fetched until then.
      uint32_t stop = min(turn, kOwnBatch * batches()),
               fetched = turn < blocks ? min(turn + stages - 1, blocks) : blocks;
      uint32_t at = 0;
      for (;;) {
#pragma unroll 1
        for (; at != stop; at += kOwnBatch) {
          if (at == begins_next) let_next_begin();
          // Of a batch's tiles, the last may be missing.
          const bool whole = kOwnBatch == 1 || at + 1 < blocks;
          ring.wait<kOwnBatch>(stage, phase, ready);
          if (kOwnBatch == 2 && whole) ring.wait<kOwnBatch>(stage + 1, phase);
          // Opaque, lest the compiler keeps every address that follows from it in a register of its own.
          uint32_t own_lane = lane;
          asm volatile("" : "+r"(own_lane));
          Tile tiles[kOwnBatch];
#pragma unroll
          for (uint32_t which = 0; which < kOwnBatch; ++which) {
            // In place of one that is missing the first again, all of it hidden.
            const uint32_t there = whole ? which : 0;
            const uint8_t* slot = ring.slots + (stage + there) * ring.slot_bytes;
            const TileCopies& copies = shared.places.tiles[warp][at + there];
            tiles[which] = {slot + copies.params_position(), slot + copies.record_position(), own_lane,
                            shared.factors[warp][which]};
          }
          uint2 widths = {};
          if constexpr (kWidth == 0) {
            widths = *reinterpret_cast<const uint2*>(tiles[0].record);
            // The same in every lane: a reduction tells the compiler, which then branches on scalars.
            widths.x = __reduce_or_sync(kEveryLane, widths.x);
            widths.y = __reduce_or_sync(kEveryLane, widths.y);
          }
          const bool hides = at < hidden_blocks || !whole;
          const auto hide_some = [&](float(&scores)[kOwnBatch][kTiles][8]) {
#pragma unroll
            for (uint32_t which = 0; which < kOwnBatch; ++which) {
              if (at + which < hidden_blocks) hide(at + which, scores[which]);
              if (which == 0 || whole) continue;
#pragma unroll
              for (float(&column)[8] : scores[which])
#pragma unroll
                for (float& score : column) score = -INFINITY;
            }
          };
          // What takes a while to be known is asked for before it is needed.
          bool refills[kOwnBatch];
#pragma unroll
          for (uint32_t which = 0; which < kOwnBatch; ++which) refills[which] = at + which + stages < fetched;
          const uint32_t next_stage = stage + kOwnBatch == stages ? 0 : stage + kOwnBatch,
                         next_phase = next_stage == 0 ? phase ^ 1 : phase;
          TileCopies following[kOwnBatch];
          const auto look_ahead = [&] {
#pragma unroll
            for (uint32_t which = 0; which < kOwnBatch; ++which)
              following[which] = shared.places.tiles[warp][refills[which] ? at + which + stages : at];
            ready = ring.is_ready(next_stage, next_phase);
          };
          if constexpr (kMixed) {
            attend_mixed<kDim, kTiles, kBfloat>(tiles, parameters.shape, layout, widths, queries, cache.pool,
                                                shared.places.raw[warp][at], state, group_zeros, hides,
                                                hide_some);
            look_ahead();
          } else {
            const uint32_t key_bits = kWidth > 0 ? kWidth * kGroups : kv::width_sum(widths.x);
            float scores[kOwnBatch][kTiles][8], units[kTiles];
            uint32_t weights[kOwnBatch][kTiles][4];
#pragma unroll
            for (uint32_t which = 0; which < kOwnBatch; ++which)
              tile_scores<kDim, kTiles, kBfloat, kWide, kWidth, kWidth == 0>(tiles[which], layout, widths.x,
                                                                             queries, state, scores[which]);
            tile_weights<kDim, kTiles, kBfloat>(tiles, state, scores, hides, hide_some, weights, units);
            look_ahead();
            tile_values<kDim, kTiles, kWide, kWidth, kWidth == 0>(
                tiles, layout, layout.groups + kv::kGroupBytes * key_bits, widths.y, state, weights, units);
          }
          __syncwarp();
#pragma unroll
          for (uint32_t which = 0; which < kOwnBatch; ++which) {
            if (refills[which]) fetch(following[which], stage + which);
            else ring.skip();
          }
          stage = next_stage, phase = next_phase;
        }
        if (at != turn) break;
        stop = kOwnBatch * batches(), fetched = blocks;
        const uint32_t free = (stage == 0 ? stages : stage) - 1;
        attend_runs(ring.slots + free * ring.slot_bytes, state, [&](int n, float factor) {
          if constexpr (kMixed) {
#pragma unroll
            for (int group = 0; group < kValueGroups<kDim>; ++group) group_zeros[n][group] *= factor;
          }
        });
        fetch(at + stages - 1, free);
        if (at == stop) break;
      }
      if constexpr (kMixed) add_group_zeros(group_zeros, state);
    }

    const uint32_t g = lane / 4, i = lane % 4;
    WarpResult<kDim, kTiles>& result = *reinterpret_cast<WarpResult<kDim, kTiles>*>(ring.slots);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float sum = state.sum[n];
      for (int distance = 4; distance < kWarpThreads; distance *= 2)
        sum += __shfl_xor_sync(kEveryLane, sum, distance);
      const float shift = output_shift<kDim, kTiles, (kFlavour > Flavour::kNarrow)>(state, n);
#pragma unroll
      for (int o = 0; o < kDim / 8; ++o) result.out[4 * n + i][8 * o + g] = state.out[n][o] + shift;
      if (g == 0) result.sums[4 * n + i] = {state.reference[n], sum};
    }
  }
};

template <int kDim, int kTiles, bool kBfloat, Flavour kFlavour>
__global__ void __launch_bounds__(kThreads<kDim, kTiles, kFlavour>, 2)
    DecodeKernel(const __grid_constant__ DecodeParameters parameters) {
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ DecodeShared<kDim, kTiles, kFlavour> shared;
  const CacheView& cache = parameters.cache;
  // The step's pieces were there before the kernel that precedes this one in the stream.
  const uint32_t index = blockIdx.x / cache.heads;
  const StepPiece listed = parameters.step.pieces[index];
  // While the piece is on its way.
  if (threadIdx.x == 0) begin_barrier(&shared.queries_ready, kThreads<kDim, kTiles, kFlavour>);
  begin_barriers(shared.barriers[warp_index()]);
  const Work work(parameters, listed, index, 4 * kTiles);
  if (work.columns.count == 0) return await_preceding();
  DecodeWarp<kDim, kTiles, kBfloat, kFlavour>(parameters, work, shared, dynamic).attend();
  __syncthreads();

  const auto result = [&](int warp) -> const WarpResult<kDim, kTiles>& {
    return *reinterpret_cast<const WarpResult<kDim, kTiles>*>(dynamic + warp * parameters.stages *
                                                                            parameters.slot_bytes);
  };
  const StepPiece& piece = work.piece;
  const Columns& columns = work.columns;
  const Partials& partials = parameters.partials;
  uint8_t* out = parameters.out + 2 * work.row;
  constexpr int kOwnWarps = kWarps<kDim, kTiles, kFlavour>;
  // A thread takes four channels of a column at a time.
  for (uint32_t at = threadIdx.x; at < columns.count * kDim / 4; at += kThreads<kDim, kTiles, kFlavour>) {
    const uint32_t column = 4 * at / kDim, channel = 4 * at % kDim;
    float4 values[kOwnWarps];
    PartSum parts[kOwnWarps];
#pragma unroll
    for (int warp = 0; warp < kOwnWarps; ++warp) {
      values[warp] = *reinterpret_cast<const float4*>(&result(warp).out[column][channel]);
      parts[warp] = result(warp).sums[column];
    }
    WeightedSum all;
    all.add(values, parts, 1);
    if (piece.pieces == 1) {
      store_quotients<kBfloat>(out, columns.position(column, kDim) + channel, all.value, all.part.sum);
    } else {
      const uint64_t part = (static_cast<uint64_t>(work.index) * cache.heads + work.head) * partials.columns +
                            columns.first + column;
      *reinterpret_cast<float4*>(partials.out + part * kDim + channel) = all.value;
      if (channel == 0) partials.sums[part] = all.part;
    }
  }
  if (piece.pieces == 1) return;

  // The last thread block of the sequence and head merges the pieces.
  uint32_t* finished = partials.finished +
                       (static_cast<uint64_t>(piece.entry) * cache.heads + work.head) * gridDim.y +
                       blockIdx.y;
  __syncthreads();
  if (threadIdx.x == 0) shared.is_last = is_last_arrival(finished, piece.pieces);
  __syncthreads();
  if (!shared.is_last) return;
  const uint64_t stride = static_cast<uint64_t>(cache.heads) * partials.columns;
  const uint64_t start =
      (static_cast<uint64_t>(work.index - piece.place) * cache.heads + work.head) * partials.columns +
      columns.first;
  const auto merge = [&](auto many) {
    using M = Merge<kDim, kTiles, kOwnWarps, decltype(many)::value>;
    merge_pieces<kDim, kTiles, kBfloat>(partials, start, stride, piece.pieces, columns, out,
                                        *reinterpret_cast<M*>(dynamic));
  };
  using Few = Merge<kDim, kTiles, kOwnWarps, false>;
  if (piece.pieces > Few::kTeams * Few::kAhead) merge(std::true_type{});
  else merge(std::false_type{});
  if (threadIdx.x == 0) *finished = 0;
}

// ---- launch ----

inline bool is_raw16(const kv::TileShape& shape) {
  return kv::is_raw16(shape.parts[0]) && kv::is_raw16(shape.parts[1]);
}

// Calls use(flavour as a constant) for what suits a layer.
template <typename Use>
void with_flavour(const kv::TileShape& shape, Use use) {
  const kv::TilePart &keys = shape.parts[0], &values = shape.parts[1];
  const uint32_t width = keys.width == values.width ? keys.width : 0;
  if (is_raw16(shape)) use(std::integral_constant<Flavour, Flavour::kRaw16>{});
  else if (!kv::is_per_token(keys) || !kv::is_per_token(values))
    use(std::integral_constant<Flavour, Flavour::kMixed>{});
  else if (std::max(kv::largest_width(keys), kv::largest_width(values)) > 4)
    use(std::integral_constant<Flavour, Flavour::kWide>{});
  else if (width == 2) use(std::integral_constant<Flavour, Flavour::kFixed2>{});
  else if (width == 3) use(std::integral_constant<Flavour, Flavour::kFixed3>{});
  else if (width == 4) use(std::integral_constant<Flavour, Flavour::kFixed4>{});
  else use(std::integral_constant<Flavour, Flavour::kNarrow>{});
}

template <int kDim, int kTiles, bool kBfloat, Flavour kFlavour>
void launch_kernel(const ph_device& device, DecodeParameters parameters, uint32_t columns) {
  const kv::TileShape& shape = parameters.shape;
  constexpr uint32_t kOwnBytes = sizeof(DecodeShared<kDim, kTiles, kFlavour>);
  constexpr int kOwnWarps = kWarps<kDim, kTiles, kFlavour>;
  // Of params and a record up to its 16-bit values, of what runs need, and of a result.
  const uint32_t record_bytes = kv::largest_record_bytes(shape) - kv::raw_bytes(shape);
  const uint32_t slot_bytes =
      std::max({is_raw16(shape) ? 0 : tile_slot_bytes(record_bytes), run_scratch_bytes(kDim),
                static_cast<uint32_t>(sizeof(WarpResult<kDim, kTiles>))});
  static_assert(sizeof(Merge<kDim, kTiles, kOwnWarps, false>) <=
                    kOwnWarps * sizeof(WarpResult<kDim, kTiles>) &&
                sizeof(Merge<kDim, kTiles, kOwnWarps, true>) <= kOwnWarps * sizeof(WarpResult<kDim, kTiles>));
  parameters.slot_bytes = round_to_sectors(slot_bytes);
  parameters.record_units = record_bytes / kUnitBytes;
  // As many tiles ahead as fit the shared memory of a thread block.
  const uint32_t warps_bytes = kOwnWarps * parameters.slot_bytes,
                 limit = static_cast<uint32_t>(device.shared_bytes) - kOwnBytes;
  constexpr uint32_t kOwnBatch = kBatch<kDim, kTiles, kFlavour>;
  parameters.stages =
      is_raw16(shape) ? 1 : std::min(kStages * kOwnBatch, limit / warps_bytes / kOwnBatch * kOwnBatch);
  if (parameters.stages == 0) {
    throw Error(PH_ERROR_UNSUPPORTED,
                "Cannot attend to packed records of up to %u bytes on this GPU: that takes %u bytes of "
                "shared memory, and a thread block has %u",
                record_bytes, warps_bytes, limit);
  }
  const auto kernel = DecodeKernel<kDim, kTiles, kBfloat, kFlavour>;
  allow_shared(device, kernel, SharedMemory::kPrefer);
  const dim3 grid(parameters.step.piece_count * parameters.cache.heads,
                  (columns + 4 * kTiles - 1) / (4 * kTiles));
  launch_overlapping(device, kernel, grid, kThreads<kDim, kTiles, kFlavour>, parameters.stages * warps_bytes,
                     parameters);
}

template <int kDim>
void launch_decode(const ph_device& device, const DecodeParameters& parameters, uint32_t columns) {
  const CacheView& cache = parameters.cache;
  with_flavour(parameters.shape, [&](auto flavour) {
    constexpr Flavour kFlavour = decltype(flavour)::value;
    dispatch_tiles<kDim>(cache, [&](auto tiles) {
      constexpr int kTiles = decltype(tiles)::value;
      if (cache.dtype == PH_BF16) launch_kernel<kDim, kTiles, true, kFlavour>(device, parameters, columns);
      else launch_kernel<kDim, kTiles, false, kFlavour>(device, parameters, columns);
    });
  });
}

// decode_<head_dim>.cu
extern template void launch_decode<64>(const ph_device&, const DecodeParameters&, uint32_t);
extern template void launch_decode<96>(const ph_device&, const DecodeParameters&, uint32_t);
extern template void launch_decode<128>(const ph_device&, const DecodeParameters&, uint32_t);
extern template void launch_decode<256>(const ph_device&, const DecodeParameters&, uint32_t);

}  // namespace ph::attention
