// q . K and w . V over the packed tokens of one sequence and layer, on the GPU: one launch each.
//
// A thread block takes a piece of the sequence, a kv head, and up to 4 * kTiles query heads of its group, the columns of
// tile.cuh, which share one unpacking. Its four warps share the piece's packed blocks, which bulk copies bring to shared
// memory kProductStages ahead, and its runs of 16 tokens in 16 bits evenly, and each works alone.
//
// Of a block, `score` copies 256 bytes of params (the keys' scales and zeros), then the record up to the end of its key
// groups: header, bases of both parts, 256 bytes per group and bit. `weigh` copies 272 bytes of params (the values' and the
// largest scale), header and bases of both parts, then the value groups. Where widths differ, a warp first reads the
// headers of all its blocks, 8 bytes each. `score` writes, and `weigh` reads, 4 bytes per token and query head.
//
// The keys' scales, queries and scores are as in decode attention. Weights, of any sign, go in 16-bit fixed point, relative
// to the tile's and column's largest product of weight and scale. Sums of warps, then of pieces, are added in their order,
// the latter by the last thread block of a kv head: deterministic on GPUs with as many multiprocessors, by which pieces are
// cut so that they fill them once, or a few times.
#include <algorithm>

#include "attention/decode.h"
#include "attention/launch.cuh"
#include "attention/products.h"
#include "attention/queries.cuh"
#include "attention/ring.cuh"

namespace ph::attention {

namespace {

using kv::CacheView;
using kv::kBlockTokens;
using kv::kUnitBytes;

constexpr int kProductWarps = 4;
constexpr int kProductThreads = kProductWarps * kWarpThreads;
constexpr uint32_t kProductStages = 4;         // tiles ahead, unless shared memory is short
constexpr uint32_t kWarpUnits = kWarpThreads;  // of a warp, at most: a lane looks up one
constexpr uint32_t kMostPieceUnits = kProductWarps * kWarpUnits;
constexpr uint32_t kMostPieces = 128;  // unless those are too large
constexpr uint32_t kFewUnits = 2;      // of a warp, on average
constexpr uint32_t kHalfParams = 256;  // of one part's scales and zeros
static_assert(kHalfParams % kUnitBytes == 0);

// What kernels are for: parts of fixed width, of up to 4 bits, which have no bases; others of up to 4 bits; of more.
enum class Residuals { kFixed, kNarrow, kWide };

struct ProductParameters {
  CacheView cache;
  TileLayout layout;
  SequenceTokens tokens;
  uint32_t runs, pieces;
  uint32_t slot_bytes, stages;
  uint32_t record_units;   // of every head record, or 0 where they differ
  uint32_t widths;         // the part's header word where its groups have the same width in every block, or 0
  const uint8_t* queries;  // score
  const float* weights;    // weigh
  float* out;
  float scale;         // score
  uint32_t* finished;  // weigh: [heads][column groups], 0 before and after
  float* partials;     // weigh: [pieces][query_heads][kDim]
};

// What is copied of a block.
struct PartCopies {
  SpanCopy params, record;  // of keys, with the groups; of values, up to them
  SpanCopy groups;          // of values
  uint32_t widths;          // of the part's groups, as in the header

  // Where they come to lie in a slot: params from kHalfParams on if they are the values', then what precedes the groups,
  // then those of values.
  static constexpr uint32_t kRecordSector = TileCopies::kRecordSector;
  __device__ __forceinline__ uint32_t params_position() const { return params.sector_offset(); }
  __device__ __forceinline__ uint32_t record_position() const {
    return kRecordSector + record.sector_offset();
  }
  __device__ __forceinline__ uint32_t groups_position(uint32_t before) const {
    return kRecordSector + round_to_sectors(before + kSectorBytes - kUnitBytes) + groups.sector_offset();
  }
};

// A warp's part of a piece.
struct WarpUnits {
  uint32_t first_run, runs, first_block, blocks;
};

__device__ __forceinline__ WarpUnits warp_units(const ProductParameters& parameters, uint32_t warp) {
  const auto first_of = [&](uint32_t units, uint32_t of_warp) {
    const uint32_t begin = piece_unit(units, blockIdx.x, parameters.pieces),
                   end = piece_unit(units, blockIdx.x + 1, parameters.pieces);
    return begin + (end - begin) * of_warp / kProductWarps;
  };
  const uint32_t runs = parameters.runs, blocks = parameters.tokens.packed;
  const uint32_t run = first_of(runs, warp), block = first_of(blocks, warp);
  return {run, first_of(runs, warp + 1) - run, block, first_of(blocks, warp + 1) - block};
}

template <uint32_t kPart>
__device__ __forceinline__ PartCopies find_part(const ProductParameters& parameters, uint32_t block,
                                                uint32_t head) {
  const CacheView& cache = parameters.cache;
  const SequenceTokens& tokens = parameters.tokens;
  const kv::RecordSpan span =
      parameters.record_units > 0
          ? kv::record_span(cache, block, head, parameters.record_units)
          : kv::record_span(cache, kv::index_of(cache, tokens.layer, tokens.sequence), block, head);
  const uint32_t* pages = kv::page_table_of(cache, tokens.layer, tokens.sequence);
  uint32_t widths = parameters.widths;
  if (widths == 0) {
    const uint8_t* header = kv::stream_byte(cache, pages, static_cast<uint64_t>(span.begin) * kUnitBytes);
    widths = reinterpret_cast<const uint32_t*>(header)[kPart];
  }
  const auto copy_of = [&](uint32_t begin, uint32_t end) {
    return make_copy(cache.pool, make_span(pages, begin, end));
  };
  const uint32_t groups = span.begin + parameters.layout.groups / kUnitBytes;
  const uint32_t group_units = kv::kGroupBytes / kUnitBytes * kv::width_sum(widths);
  constexpr uint32_t kHalf = kHalfParams / kUnitBytes;
  if constexpr (kPart == PH_KV_KEYS) {
    return {copy_of(span.params, span.params + kHalf), copy_of(span.begin, groups + group_units), {}, widths};
  } else {
    return {copy_of(span.params + kHalf, span.params + kv::kParamsUnits), copy_of(span.begin, groups),
            group_units > 0 ? copy_of(span.end - group_units, span.end) : SpanCopy{}, widths};
  }
}

// Starts the copy of a block.
template <uint32_t kPart>
__device__ __forceinline__ void fetch_part(const Ring& ring, const ProductParameters& parameters,
                                           const PartCopies& part, uint32_t stage) {
  const uint8_t* pool = parameters.cache.pool;
  const PartCopies copies = part;
  if (kPart == PH_KV_KEYS || copies.groups.bytes == 0) {
    const uint32_t params = (kPart == PH_KV_KEYS ? 0 : kHalfParams) + copies.params_position();
    ring.copy(pool, stage, {copies.record, copies.params}, {copies.record_position(), params});
  } else {
    ring.copy(pool, stage, {copies.groups, copies.record, copies.params},
              {copies.groups_position(parameters.layout.groups), copies.record_position(),
               kHalfParams + copies.params_position()});
  }
}

// Calls use(at, tile, widths, position of the part's groups in the record) for the warp's blocks, from units.first_block on.
// The first settled ones, which were there before the step began, are on their way before the kernel that precedes this one
// has ended; then it calls prepare(). The next kernel may do the same meanwhile.
template <uint32_t kPart, typename Prepare, typename Use>
__device__ __forceinline__ void for_tiles(const ProductParameters& parameters, const WarpUnits& units,
                                          const Ring& ring, PartCopies (&copies)[kWarpUnits], float4* factors,
                                          Prepare prepare, Use use) {
  const uint32_t lane = threadIdx.x % kWarpThreads, settled_blocks = parameters.tokens.settled,
                 settled = settled_blocks > units.first_block ? settled_blocks - units.first_block : 0;
  const auto find = [&](bool wanted) {
    if (wanted && lane < units.blocks)
      copies[lane] = find_part<kPart>(parameters, units.first_block + lane, blockIdx.y);
    __syncwarp();
  };
  const auto fetch = [&](uint32_t at, uint32_t stage) {
    if (at < units.blocks) fetch_part<kPart>(ring, parameters, copies[at], stage);
    else ring.skip();
  };
  let_next_begin();
  find(lane < settled);
  ring.begin();
  const uint32_t early = min(ring.stages, settled);
  for (uint32_t ahead = 0; ahead < early; ++ahead) fetch(ahead, ahead);
  wait_for_preceding();
  find(lane >= settled);
  for (uint32_t ahead = early; ahead < ring.stages; ++ahead) fetch(ahead, ahead);
  prepare();
  uint32_t stage = 0, phase = 0;
#pragma unroll 1
  for (uint32_t at = 0; at < units.blocks; ++at) {
    ring.wait(stage, phase);
    const uint8_t* slot = ring.slots + stage * ring.slot_bytes;
    // Opaque, lest the compiler keeps every address that follows from it in a register of its own.
    uint32_t own_lane = lane;
    asm volatile("" : "+r"(own_lane));
    const PartCopies& places = copies[at];
    const Tile tile = {slot + places.params_position(), slot + places.record_position(), own_lane, factors};
    const uint32_t groups = kPart == PH_KV_KEYS
                                ? parameters.layout.groups
                                : places.groups_position(parameters.layout.groups) - places.record_position();
    // The same in every lane: a reduction tells the compiler, which then branches on scalars.
    use(at, tile, __reduce_or_sync(kEveryLane, places.widths), groups);
    __syncwarp();
    fetch(at + ring.stages, stage);
    if (++stage == ring.stages) stage = 0, phase ^= 1;
  }
}

// The head's rows of recent tokens, by slot.
template <int kDim>
struct RecentRows {
  const uint8_t* rows;
  uint64_t row_bytes;

  __device__ __forceinline__ RecentRows(const ProductParameters& parameters, uint32_t part) {
    const CacheView& cache = parameters.cache;
    const uint64_t stream = kv::stream_of(cache, parameters.tokens.layer, parameters.tokens.sequence);
    row_bytes = static_cast<uint64_t>(cache.heads) * kDim * 2;
    rows = cache.recent + (stream * kv::kParts + part) * kv::recent_part_bytes(cache) +
           blockIdx.y * (kDim * 2ull);
  }
  __device__ __forceinline__ const uint8_t* row(const CacheView& cache, uint32_t token) const {
    return rows + kv::recent_slot(cache, token) * row_bytes;
  }
};

__device__ __forceinline__ Columns columns_of(const ProductParameters& parameters, int most,
                                              uint32_t head_dim) {
  const uint32_t group = parameters.cache.query_heads / parameters.cache.heads, first = blockIdx.z * most;
  return {parameters.queries + 2ull * blockIdx.y * group * head_dim, first,
          min(static_cast<uint32_t>(most), group - first), group, 0};
}

// ---- q . K ----

// A run's keys in registers: two lanes share a token and take its chunks of 8 channels in turn.
template <int kDim>
struct RunKeys {
  uint4 chunks[kDim / 16];
  uint32_t token;
  bool present;

  __device__ __forceinline__ void load(const ProductParameters& parameters, const RecentRows<kDim>& keys,
                                       uint32_t run) {
    const SequenceTokens& tokens = parameters.tokens;
    const uint32_t lane = threadIdx.x % kWarpThreads, at = run * kv::kRunTokens + lane / 2;
    present = at < tokens.recent(parameters.cache);
    token = tokens.recent_token(parameters.cache, present ? at : 0);
    const uint8_t* row = keys.row(parameters.cache, token) + 16 * (lane % 2);
#pragma unroll
    for (int x = 0; x < kDim / 16; ++x) chunks[x] = *reinterpret_cast<const uint4*>(row + 32 * x);
  }
};

template <int kDim, int kTiles, bool kBfloat>
__device__ __forceinline__ void score_run(const ProductParameters& parameters, const RunKeys<kDim>& keys,
                                          const Columns& columns, float* out) {
  const uint32_t lane = threadIdx.x % kWarpThreads;
  float sums[4 * kTiles] = {};
#pragma unroll
  for (int x = 0; x < kDim / 16; ++x) {
    const uint32_t channel = 16 * x + 8 * (lane % 2);
    const uint4 key = keys.chunks[x];
#pragma unroll
    for (int column = 0; column < 4 * kTiles; ++column) {
      if (column >= columns.count) break;
      const uint4 query =
          *reinterpret_cast<const uint4*>(columns.queries + 2 * (columns.position(column, kDim) + channel));
      const uint32_t k[4] = {key.x, key.y, key.z, key.w}, q[4] = {query.x, query.y, query.z, query.w};
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const float2 a = to_floats<kBfloat>(k[pair]), b = to_floats<kBfloat>(q[pair]);
        sums[column] = __fmaf_rn(a.y, b.y, __fmaf_rn(a.x, b.x, sums[column]));
      }
    }
  }
#pragma unroll
  for (int column = 0; column < 4 * kTiles; ++column) {
    const float sum = sums[column] + __shfl_xor_sync(kEveryLane, sums[column], 1);
    if (keys.present && lane % 2 == 0 && column < columns.count)
      out[static_cast<uint64_t>(column) * parameters.tokens.length + keys.token] = sum * parameters.scale;
  }
}

template <int kDim, int kTiles>
struct ScoreShared {
  // Thread blocks of a multiprocessor, as registers allow.
  static constexpr uint32_t kResident = kDim <= 128 && kTiles == 1 ? 4 : 3;
  // Whether few blocks are left to half of them, so that there is room for the next kernel's.
  static constexpr bool kShares = kResident % 2 == 0;
  Queries<kDim, kTiles> queries;
  alignas(16) float found[kProductWarps][4 * kTiles][kBlockTokens + 4];  // fewer conflicts of banks
  PartCopies copies[kProductWarps][kWarpUnits];
  float4 factors[kProductWarps][kWarpThreads];  // see Tile
  uint64_t barriers[kProductWarps][kProductStages];
};

template <int kDim, int kTiles, bool kBfloat, Residuals kResiduals>
__global__ void __launch_bounds__(kProductThreads, ScoreShared<kDim, kTiles>::kResident)
    ScoreKernel(const __grid_constant__ ProductParameters parameters) {
  constexpr int kColumns = 4 * kTiles, kGroups = kDim / 32;
  constexpr bool kWide = kResiduals == Residuals::kWide, kBases = kResiduals != Residuals::kFixed;
  // The first run's keys are on their way while packed blocks are worked on, if there are registers for them.
  constexpr bool kLoadsAhead = kDim <= 128;
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ ScoreShared<kDim, kTiles> shared;
  Queries<kDim, kTiles>& queries = shared.queries;
  auto& found = shared.found;
  const uint32_t warp = warp_index(), lane = threadIdx.x % kWarpThreads, g = lane / 4, i = lane % 4;
  const uint32_t length = parameters.tokens.length;
  const Columns columns = columns_of(parameters, kColumns, kDim);
  float* out = parameters.out + static_cast<uint64_t>(blockIdx.y * columns.group + columns.first) * length;
  const WarpUnits units = warp_units(parameters, warp);
  const Ring ring = {dynamic + warp * parameters.stages * parameters.slot_bytes, parameters.slot_bytes,
                     parameters.stages, shared.barriers[warp]};
  WarpState<kDim, kTiles> state;
  const RecentRows<kDim> recent(parameters, PH_KV_KEYS);
  RunKeys<kDim> run_keys;
  for_tiles<PH_KV_KEYS>(
      parameters, units, ring, shared.copies[warp], shared.factors[warp],
      [&] {
        if (const uint32_t n = threadIdx.x / kWarpThreads; n < kTiles)
          quantize_queries<kDim, kTiles, kBfloat>(LaneQuery<kDim>(columns, n), n, parameters.scale, queries);
        __syncthreads();
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          state.query_sum[n] = queries.sum[4 * n + i];
          state.query_scale[n] = queries.scale[4 * n + i];
        }
        if (kLoadsAhead && units.runs > 0) run_keys.load(parameters, recent, units.first_run);
      },
      [&](uint32_t at, const Tile& tile, uint32_t widths, uint32_t) {
        float scores[kTiles][8];
        with_width<kGroups, kWide>(widths, [&](auto width) {
          tile_scores<kDim, kTiles, kBfloat, kWide, decltype(width)::value, kBases>(
              tile, parameters.layout, widths, queries, state, scores);
        });
    // Through shared memory, so that lanes write tokens in a row.
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          if (4 * n + i >= columns.count) continue;
          float* target = &found[warp][4 * n + i][8 * g];
          const float unit = state.query_scale[n];
          const float(&x)[8] = scores[n];
          reinterpret_cast<float4*>(target)[0] =
              make_float4(x[0] * unit, x[1] * unit, x[2] * unit, x[3] * unit);
          reinterpret_cast<float4*>(target)[1] =
              make_float4(x[4] * unit, x[5] * unit, x[6] * unit, x[7] * unit);
        }
        __syncwarp();
        float* first = out + parameters.cache.sinks + (units.first_block + at) * kBlockTokens;
        for (uint32_t column = 0; column < columns.count; ++column) {
          float* row = first + static_cast<uint64_t>(column) * length;
          row[lane] = found[warp][column][lane];
          row[lane + kWarpThreads] = found[warp][column][lane + kWarpThreads];
        }
      });
  for (uint32_t run = 0; run < units.runs; ++run) {
    if (run > 0 || !kLoadsAhead) run_keys.load(parameters, recent, units.first_run + run);
    score_run<kDim, kTiles, kBfloat>(parameters, run_keys, columns, out);
  }
}

// ---- w . V ----

// The weights of a tile's tokens, as a C fragment has them: of columns past the last, 0.
template <int kTiles>
struct TileWeights {
  float x[kTiles][8];

  __device__ __forceinline__ void load(const float* weights, uint64_t length, uint32_t columns,
                                       uint32_t first) {
    const uint32_t lane = threadIdx.x % kWarpThreads, g = lane / 4, i = lane % 4;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const bool present = 4 * n + i < columns;
      const float* row = weights + (present ? 4 * n + i : 0) * length + first + 8 * g;
#pragma unroll
      for (int t = 0; t < 8; ++t) x[n][t] = present ? __ldg(row + t) : 0.0f;
    }
  }
};

// Adds the weighted values of a run to `sums` [columns][kStride], in shared memory. A lane has pairs of channels.
template <int kDim, int kTiles, int kStride, bool kBfloat>
__device__ __forceinline__ void weigh_run(const ProductParameters& parameters, const RecentRows<kDim>& values,
                                          uint32_t run, const float* weights, uint32_t columns, float* sums) {
  constexpr int kPairs = (kDim / 2 + kWarpThreads - 1) / kWarpThreads, kTogether = 8;
  const SequenceTokens& tokens = parameters.tokens;
  const CacheView& cache = parameters.cache;
  const uint32_t lane = threadIdx.x % kWarpThreads, count = tokens.recent(cache);
  const auto pair_of = [&](int pair) { return lane + pair * kWarpThreads; };
  float own[4 * kTiles];  // a lane has the weights of a token
  {
    const uint32_t at = run * kv::kRunTokens + lane % kv::kRunTokens;
    const uint32_t token = tokens.recent_token(cache, min(at, count - 1));
#pragma unroll
    for (int column = 0; column < 4 * kTiles; ++column)
      own[column] = at < count && column < columns
                        ? weights[static_cast<uint64_t>(column) * tokens.length + token]
                        : 0.0f;
  }
  float2 found[kPairs][4 * kTiles] = {};
#pragma unroll
  for (int from = 0; from < static_cast<int>(kv::kRunTokens); from += kTogether) {
    uint32_t words[kTogether][kPairs];
#pragma unroll
    for (int t = 0; t < kTogether; ++t) {
      const uint32_t at = run * kv::kRunTokens + from + t;
      const uint8_t* row = values.row(cache, tokens.recent_token(cache, min(at, count - 1)));
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        words[t][pair] = at < count && pair_of(pair) < kDim / 2
                             ? *reinterpret_cast<const uint32_t*>(row + 4 * pair_of(pair))
                             : 0;
      }
    }
#pragma unroll
    for (int t = 0; t < kTogether; ++t) {
#pragma unroll
      for (int column = 0; column < 4 * kTiles; ++column) {
        const float weight = __shfl_sync(kEveryLane, own[column], from + t);
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
          const float2 value = to_floats<kBfloat>(words[t][pair]);
          found[pair][column].x = __fmaf_rn(weight, value.x, found[pair][column].x);
          found[pair][column].y = __fmaf_rn(weight, value.y, found[pair][column].y);
        }
      }
    }
  }
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    if (pair_of(pair) >= kDim / 2) continue;
#pragma unroll
    for (int column = 0; column < 4 * kTiles; ++column) {
      float2& sum = *reinterpret_cast<float2*>(sums + column * kStride + 2 * pair_of(pair));
      sum = make_float2(sum.x + found[pair][column].x, sum.y + found[pair][column].y);
    }
  }
}

// Floats of a column in shared memory; free of bank conflicts for the fragments' layout.
template <int kDim>
constexpr int kSumStride = kDim + 8;

struct WeighShared {
  static constexpr uint32_t kResident = 3;
  static constexpr bool kShares = false;
  PartCopies copies[kProductWarps][kWarpUnits];
  float4 factors[kProductWarps][kWarpThreads];  // see Tile
  uint64_t barriers[kProductWarps][kProductStages];
  uint32_t is_last;
};

template <int kDim, int kTiles, bool kBfloat, Residuals kResiduals>
__global__ void __launch_bounds__(kProductThreads, WeighShared::kResident)
    WeighKernel(const __grid_constant__ ProductParameters parameters) {
  constexpr int kColumns = 4 * kTiles, kGroups = kDim / 32, kStride = kSumStride<kDim>;
  constexpr bool kWide = kResiduals == Residuals::kWide, kBases = kResiduals != Residuals::kFixed;
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ WeighShared shared;
  const uint32_t warp = warp_index(), lane = threadIdx.x % kWarpThreads, g = lane / 4, i = lane % 4;
  const CacheView& cache = parameters.cache;
  const uint32_t length = parameters.tokens.length;
  const Columns columns = columns_of(parameters, kColumns, kDim);
  const uint32_t query_head = blockIdx.y * columns.group + columns.first;
  const float* weights = parameters.weights + static_cast<uint64_t>(query_head) * length;
  const WarpUnits units = warp_units(parameters, warp);
  const Ring ring = {dynamic + warp * parameters.stages * parameters.slot_bytes, parameters.slot_bytes,
                     parameters.stages, shared.barriers[warp]};
  const auto load_weights = [&](uint32_t at, TileWeights<kTiles>& tile) {
    if (at < units.blocks)
      tile.load(weights, length, columns.count, cache.sinks + (units.first_block + at) * kBlockTokens);
  };
  TileWeights<kTiles> next;

  WarpState<kDim, kTiles> state;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    state.zeros[n] = state.weights[n] = 0.0f;
#pragma unroll
    for (int o = 0; o < kDim / 8; ++o) state.out[n][o] = 0.0f;
  }
  for_tiles<PH_KV_VALUES>(
      parameters, units, ring, shared.copies[warp], shared.factors[warp], [&] { load_weights(0, next); },
      [&](uint32_t at, const Tile& tile, uint32_t widths, uint32_t groups) {
        const TileWeights<kTiles> own = next;
        load_weights(at + 1, next);
        share_factors<kBfloat>(tile, PH_KV_VALUES, {1.0f, 1.0f});
        float scales[8], shifts[8];
        load_factors(tile, scales, shifts);
        uint32_t fragments[1][kTiles][4];
        float weight_units[kTiles];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          float products[8], largest = 0.0f;
#pragma unroll
          for (int t = 0; t < 8; ++t) {
            products[t] = own.x[n][t] * scales[t];
            largest = fmaxf(largest, fabsf(products[t]));
            state.zeros[n] = __fmaf_rn(own.x[n][t], shifts[t], state.zeros[n]);
          }
          for (int distance = 4; distance < kWarpThreads; distance *= 2)
            largest = fmaxf(largest, __shfl_xor_sync(kEveryLane, largest, distance));
          // Away from where its reciprocal, times the largest fixed-point number, overflows.
          largest = fmaxf(largest, 0x1p-111f);
          const float to_fixed = kLargestFixed * reciprocal(largest);
          uint32_t fixed[8];
#pragma unroll
          for (int t = 0; t < 8; ++t)
            fixed[t] = __float_as_uint(__fmaf_rn(products[t], to_fixed, kFixedMagic));
          weight_units[n] = largest * (1.0f / kLargestFixed);
          weight_fragments(fixed, fragments[0][n]);
        }
        with_width<kGroups, kWide>(widths, [&](auto width) {
          tile_values<kDim, kTiles, kWide, decltype(width)::value, kBases>(
              {tile}, parameters.layout, groups, widths, state, fragments, weight_units);
        });
      });

  // The warp's slots are free: its sums take their place.
  const auto sums_of = [&](uint32_t of_warp) {
    return reinterpret_cast<float*>(dynamic + of_warp * parameters.stages * parameters.slot_bytes);
  };
  float* sums = sums_of(warp);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const float shift = output_shift<kDim, kTiles, kWide>(state, n);
#pragma unroll
    for (int o = 0; o < kDim / 8; ++o) sums[(4 * n + i) * kStride + 8 * o + g] = state.out[n][o] + shift;
  }
  __syncwarp();
  const RecentRows<kDim> values(parameters, PH_KV_VALUES);
  for (uint32_t run = units.first_run; run < units.first_run + units.runs; ++run)
    weigh_run<kDim, kTiles, kStride, kBfloat>(parameters, values, run, weights, columns.count, sums);
  __syncthreads();

  const auto add = [](float4& sum, const float4& x) {
    sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
  };
  // The warps' sums, in order, four channels at a time.
  const auto add_warps = [&](float* target) {
    for (uint32_t at = threadIdx.x; at < columns.count * kDim / 4; at += kProductThreads) {
      const uint32_t column = 4 * at / kDim, channel = 4 * at % kDim;
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
      for (int of_warp = 0; of_warp < kProductWarps; ++of_warp) {
        add(sum, *reinterpret_cast<const float4*>(sums_of(of_warp) + column * kStride + channel));
      }
      reinterpret_cast<float4*>(target)[at] = sum;
    }
  };
  float* out = parameters.out + static_cast<uint64_t>(query_head) * kDim;
  const uint64_t piece_values = static_cast<uint64_t>(cache.query_heads) * kDim;
  float* partials = parameters.partials + static_cast<uint64_t>(query_head) * kDim;
  if (parameters.pieces == 1) return add_warps(out);
  add_warps(partials + blockIdx.x * piece_values);

  // The last thread block of the head merges the pieces: each warp a quarter of them, then as above.
  uint32_t* finished = parameters.finished + blockIdx.y * gridDim.z + blockIdx.z;
  __syncthreads();
  if (threadIdx.x == 0) shared.is_last = is_last_arrival(finished, parameters.pieces);
  __syncthreads();
  if (!shared.is_last) return;
  const uint32_t first = parameters.pieces * warp / kProductWarps,
                 last = parameters.pieces * (warp + 1) / kProductWarps;
  constexpr uint32_t kAhead = 16;  // pieces, loaded at once
  for (uint32_t at = lane; at < columns.count * kDim / 4; at += kWarpThreads) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
    for (uint32_t piece = first; piece < last; piece += kAhead) {
      float4 values[kAhead];
#pragma unroll
      for (uint32_t ahead = 0; ahead < kAhead; ++ahead) {
        values[ahead] =
            piece + ahead < last
                ? __ldcg(reinterpret_cast<const float4*>(partials + (piece + ahead) * piece_values) + at)
                : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      }
#pragma unroll
      for (uint32_t ahead = 0; ahead < kAhead; ++ahead) add(sum, values[ahead]);
    }
    *reinterpret_cast<float4*>(sums + 4 * at / kDim * kStride + 4 * at % kDim) = sum;
  }
  __syncthreads();
  add_warps(out);
  if (threadIdx.x == 0) *finished = 0;
}

// ---- launch ----

// Of the groups of a part, at most.
uint32_t group_bytes(const kv::TileShape& shape, uint32_t part) {
  return kv::kGroupBytes * kv::tile_groups(shape) * kv::largest_width(shape.parts[part]);
}

// Shared memory of a block, at least `least`.
uint32_t slot_bytes(const kv::TileShape& shape, uint32_t part, uint32_t least) {
  const uint32_t bytes = PartCopies::kRecordSector + kv::bases_position(shape, kv::kParts) +
                         group_bytes(shape, part) + 3 * kSectorBytes;
  return (std::max(bytes, least) + 127) / 128 * 128;
}

// Shared memory of a thread block beside what the kernel has itself, how many tiles ahead it holds, and how many thread
// blocks of a multiprocessor. They take all there is, even if they need less: were there room for more of them, those of the
// next kernel, which begin early, would gather where it is.
struct Residency {
  uint32_t bytes, stages, blocks;
};

// `own_bytes` of shared memory are the kernel's own.
Residency residency_of(const ph_device& device, uint32_t slot, uint32_t own_bytes, uint32_t most_blocks) {
  constexpr uint32_t kReservedBytes = 1024, kAlignmentBytes = 512;  // of every thread block
  const uint32_t limit = static_cast<uint32_t>(device.shared_bytes), tile = kProductWarps * slot;
  for (uint32_t blocks = most_blocks; blocks > 0; --blocks) {
    const uint32_t of_block = (limit + kReservedBytes) / blocks - kReservedBytes - kAlignmentBytes;
    if (of_block < own_bytes + tile) continue;
    const uint32_t bytes = (of_block - own_bytes) / 128 * 128;
    return {bytes, std::min(kProductStages, bytes / tile), blocks};
  }
  throw Error(PH_ERROR_UNSUPPORTED,
              "Cannot multiply packed records of up to %u bytes on this GPU: that takes %u bytes of shared "
              "memory, and a thread block has %u",
              slot, tile, limit - own_bytes);
}

uint32_t least_pieces(uint32_t units) { return (units + kMostPieceUnits - 1) / kMostPieceUnits; }

// Into how many pieces so many packed blocks, or runs if they are more, are cut, where `rows` thread blocks take each and
// the GPU holds `resident` at a time: as few as fill it once, or a few times. A thread block's way to its first bytes takes
// as long as several units.
uint32_t product_pieces(uint32_t units, uint32_t rows, uint32_t resident) {
  const uint32_t least = std::max(least_pieces(units), 1u), times = (least * rows + resident - 1) / resident;
  return std::max(least, std::min({times * resident / rows, units, kMostPieces}));
}

// Calls launch(head_dim, tiles, bfloat, residuals) with the template arguments of a kernel for a part.
template <typename Launch>
void with_options(const CacheView& cache, const kv::TileShape& shape, uint32_t part, Launch launch) {
  const bool wide = std::max(kv::largest_width(shape.parts[0]), kv::largest_width(shape.parts[1])) > 4;
  const bool fixed = !wide && shape.parts[part].width > 0;
  dispatch_dim(cache.head_dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    dispatch_tiles<kDim>(cache, [&](auto tiles) {
      const auto with_type = [&](auto bfloat) {
        if (wide) launch(dim, tiles, bfloat, std::integral_constant<Residuals, Residuals::kWide>{});
        else if (fixed) launch(dim, tiles, bfloat, std::integral_constant<Residuals, Residuals::kFixed>{});
        else launch(dim, tiles, bfloat, std::integral_constant<Residuals, Residuals::kNarrow>{});
      };
      if (cache.dtype == PH_BF16) with_type(std::true_type{});
      else with_type(std::false_type{});
    });
  });
}

ProductParameters parameters_of(const CacheView& cache, const kv::TileShape& shape,
                                const SequenceTokens& tokens, uint32_t part) {
  ProductParameters parameters{};
  parameters.cache = cache;
  parameters.layout = tile_layout(shape);
  parameters.tokens = tokens;
  parameters.widths = shape.parts[part].width * (0x11111111u >> 4 * (8 - kv::tile_groups(shape)));
  if (shape.parts[PH_KV_KEYS].width > 0 && shape.parts[PH_KV_VALUES].width > 0)
    parameters.record_units = kv::largest_record_bytes(shape) / kUnitBytes;
  parameters.runs = tokens.runs(cache);
  return parameters;
}

template <typename Shared, typename Kernel>
void launch(ph_device& device, ProductParameters& parameters, Kernel kernel, uint32_t slot,
            uint32_t columns) {
  const CacheView& cache = parameters.cache;
  const Residency residency = residency_of(device, slot, sizeof(Shared), Shared::kResident);
  parameters.slot_bytes = slot;
  parameters.stages = residency.stages;
  const uint32_t group = cache.query_heads / cache.heads, column_groups = (group + columns - 1) / columns;
  const uint32_t units = std::max(parameters.runs, parameters.tokens.packed),
                 rows = cache.heads * column_groups;
  const uint32_t resident = static_cast<uint32_t>(device.processors) * residency.blocks;
  const uint64_t most_units = uint64_t{kProductWarps} * resident;  // of all warps, one each
  if (Shared::kShares && residency.blocks == Shared::kResident &&
      uint64_t{units} * rows <= kFewUnits * most_units) {
    // With so little to do that its way to the first bytes takes longest, the kernel leaves about half of the GPU to the
    // next one, which is on that way meanwhile: so much that all warps have as many blocks.
    const uint32_t of_warp = std::max<uint32_t>(2 * uint64_t{units} * rows / most_units, 1);
    parameters.pieces = (units + of_warp * kProductWarps - 1) / (of_warp * kProductWarps);
  } else {
    parameters.pieces = product_pieces(units, rows, resident);
  }
  allow_shared(device, kernel, SharedMemory::kPrefer);
  const dim3 grid(parameters.pieces, cache.heads, column_groups);
  launch_overlapping(device, kernel, grid, kProductThreads, residency.bytes, parameters);
}

}  // namespace

uint64_t products_workspace_bytes(const CacheView& cache) {
  const uint64_t pieces =
      std::max(least_pieces(static_cast<uint32_t>(most_product_units(cache))), kMostPieces);
  return decode_counter_bytes(cache) + pieces * cache.query_heads * cache.head_dim * sizeof(float);
}

void score(ph_device& device, const CacheView& cache, const kv::TileShape& shape,
           const SequenceTokens& tokens, const uint8_t* queries, float* out, float scale) {
  ProductParameters parameters = parameters_of(cache, shape, tokens, PH_KV_KEYS);
  parameters.queries = queries;
  parameters.out = out;
  parameters.scale = scale;
  with_options(cache, shape, PH_KV_KEYS, [&](auto dim, auto tiles, auto bfloat, auto residuals) {
    constexpr int kDim = decltype(dim)::value, kTiles = decltype(tiles)::value;
    launch<ScoreShared<kDim, kTiles>>(
        device, parameters, ScoreKernel<kDim, kTiles, decltype(bfloat)::value, decltype(residuals)::value>,
        slot_bytes(shape, PH_KV_KEYS, 0), 4 * kTiles);
  });
}

void weigh(ph_device& device, const CacheView& cache, const kv::TileShape& shape,
           const SequenceTokens& tokens, const float* weights, float* out, uint8_t* workspace) {
  ProductParameters parameters = parameters_of(cache, shape, tokens, PH_KV_VALUES);
  parameters.weights = weights;
  parameters.out = out;
  parameters.finished = reinterpret_cast<uint32_t*>(workspace);
  parameters.partials = reinterpret_cast<float*>(workspace + decode_counter_bytes(cache));
  with_options(cache, shape, PH_KV_VALUES, [&](auto dim, auto tiles, auto bfloat, auto residuals) {
    constexpr int kDim = decltype(dim)::value, kColumns = 4 * decltype(tiles)::value;
    // A warp's sums fit its slots, even if there is one only.
    launch<WeighShared>(
        device, parameters,
        WeighKernel<kDim, decltype(tiles)::value, decltype(bfloat)::value, decltype(residuals)::value>,
        slot_bytes(shape, PH_KV_VALUES, kColumns * kSumStride<kDim> * sizeof(float)), kColumns);
  });
}

}  // namespace ph::attention
