// q . K and w . V over the packed tokens of one sequence and layer, on the GPU: one launch each.
//
// A thread block takes a piece of the sequence, a kv head, and up to 4 * kTiles query heads of its group, the columns of
// tile.cuh, which share one unpacking. Its four warps share the piece evenly and work alone: on runs of 16 tokens in 16 bits,
// then on packed blocks, of which bulk copies bring up to kProductStages to shared memory meanwhile.
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
constexpr uint32_t kProductStages = 4;         // blocks ahead, unless shared memory is short
constexpr uint32_t kWarpUnits = kWarpThreads;  // of a warp, at most: a lane looks up one
constexpr uint32_t kMostPieceUnits = kProductWarps * kWarpUnits;
constexpr uint32_t kMostSums = 128;  // pieces of `weigh`, whose sums are added up, unless those are too large
constexpr uint32_t kFewUnits = 2;    // of a warp, on average
constexpr uint32_t kHalfParams = 256;  // of one part's scales and zeros
static_assert(kHalfParams % kUnitBytes == 0);
constexpr uint32_t kSlotAlignment = 128;

// The header word where each of so many groups has width 1.
PH_HOST_DEVICE constexpr uint32_t widths_of_one(uint32_t groups) { return 0x11111111u >> 4 * (8 - groups); }

// What kernels are for: parts of fixed width, of up to 4 bits, which have no bases; others of up to 4 bits; of more.
enum class Residuals { kFixed, kNarrow, kWide };

// Calls use(std::integral_constant<int, width>) for the width that all groups of a header word have, or with 0. Where widths
// differ from block to block there is code for 0 only: more of it would not stay near.
template <Residuals kResiduals, int kGroups, typename Use>
__device__ __forceinline__ void with_width(uint32_t widths, Use use) {
  if constexpr (kResiduals == Residuals::kFixed) {
    constexpr uint32_t kOnes = widths_of_one(kGroups);
    if (widths == 2 * kOnes) return use(std::integral_constant<int, 2>{});
    if (widths == 3 * kOnes) return use(std::integral_constant<int, 3>{});
    if (widths == 4 * kOnes) return use(std::integral_constant<int, 4>{});
  }
  use(std::integral_constant<int, 0>{});
}

struct ProductParameters {
  CacheView cache;
  TileLayout layout;
  SequenceTokens tokens;
  Group group;
  UnitShares shares;  // of warps
  uint32_t pieces;
  uint32_t unpacked_slot;  // of the ring, where the first token after the packed blocks is
  uint32_t most_bytes;     // of shared memory, that a block may take
  uint32_t room_bytes;     // of shared memory, for a warp's blocks
  uint32_t record_units;   // of every head record, or 0 where they differ
  uint32_t widths;         // the part's header word where its groups have the same width in every block, or 0
  const uint8_t* queries;  // score
  const float* weights;    // weigh
  float* out;
  float scale;         // score
  uint32_t* finished;  // weigh: [heads][column groups], 0 before and after
  float* partials;     // weigh: [pieces][query_heads][kDim]
};

// What is copied of a block: the part's half of the params, the record up to the end of the keys' groups or the begin of
// all groups, and the values' groups.
template <uint32_t kPart>
struct PartCopies {
  static constexpr int kCopies = kPart == PH_KV_KEYS ? 2 : 3;
  enum Which { kParams, kRecord, kGroups };
  static constexpr uint32_t kParamsBegin = kPart == PH_KV_KEYS ? 0 : kHalfParams;
  // The sector, of a slot, in which the record begins.
  static constexpr uint32_t kRecordSector =
      round_to_sectors((kPart == PH_KV_KEYS ? kHalfParams : kv::kParamsBytes) + kSectorBytes - kUnitBytes);

  SpanCopy spans[kCopies];

  // Where they come to lie in a slot, if `before` bytes precede the groups.
  __device__ __forceinline__ uint32_t position(Which which, uint32_t before) const {
    const uint32_t begin =
        which == kParams
            ? kParamsBegin
            : kRecordSector + (which == kGroups ? round_to_sectors(before + kSectorBytes - kUnitBytes) : 0);
    return begin + spans[which].sector_offset();
  }
  // What they take of it.
  __device__ __forceinline__ uint32_t bytes(uint32_t before) const {
    constexpr Which kLast = static_cast<Which>(kCopies - 1);
    return position(kLast, before) + spans[kLast].bytes;
  }
};

// The blocks of a warp, one a lane.
template <uint32_t kPart>
struct WarpCopies {
  PartCopies<kPart> copies[kWarpUnits];
  uint32_t widths[kWarpUnits];    // of the part's groups, as in the header
  uint32_t position[kWarpUnits];  // in the warp's room
};

// A warp's share of the sequence.
struct WarpUnits {
  uint32_t first_run, runs, first_block, blocks;
};

// A warp with a run has a block less.
__device__ __forceinline__ WarpUnits warp_units(const ProductParameters& parameters, uint32_t warp) {
  const UnitShares& shares = parameters.shares;
  const uint32_t share = blockIdx.x * kProductWarps + warp, begin = shares.first_unit(share),
                 end = shares.first_unit(share + 1), run = shares.runs_before(begin),
                 run_end = shares.runs_before(end);
  return {run, run_end - run, begin - run, (end - run_end) - (begin - run)};
}

// What is to be copied of a block, and the widths of the part's groups.
template <uint32_t kPart>
__device__ __forceinline__ PartCopies<kPart> find_part(const ProductParameters& parameters, uint32_t block,
                                                       uint32_t head, uint32_t& widths) {
  const CacheView& cache = parameters.cache;
  const SequenceTokens& tokens = parameters.tokens;
  const kv::RecordSpan span =
      parameters.record_units > 0
          ? kv::record_span(cache, block, head, parameters.record_units)
          : kv::record_span(cache, kv::index_of(cache, tokens.layer, tokens.sequence), block, head);
  const uint32_t* pages = kv::page_table_of(cache, tokens.layer, tokens.sequence);
  widths = parameters.widths;
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
    return {{copy_of(span.params, span.params + kHalf), copy_of(span.begin, groups + group_units)}};
  } else {
    return {{copy_of(span.params + kHalf, span.params + kv::kParamsUnits), copy_of(span.begin, groups),
             group_units > 0 ? copy_of(span.end - group_units, span.end) : SpanCopy{}}};
  }
}

// Starts the copy of a block.
template <uint32_t kPart>
__device__ __forceinline__ void fetch_part(const Ring& ring, const ProductParameters& parameters,
                                           const PartCopies<kPart>& of_block, uint32_t slot, uint32_t stage) {
  const uint8_t* pool = parameters.cache.pool;
  const uint32_t before = parameters.layout.groups;
  using Copies = PartCopies<kPart>;
  const Copies copies = of_block;
  const SpanCopy(&spans)[Copies::kCopies] = copies.spans;
  const uint32_t params = slot + copies.position(Copies::kParams, before),
                 record = slot + copies.position(Copies::kRecord, before);
  if constexpr (kPart == PH_KV_VALUES) {
    if (spans[Copies::kGroups].bytes > 0)
      return ring.copy(pool, stage, {spans[Copies::kGroups], spans[Copies::kRecord], spans[Copies::kParams]},
                       {slot + copies.position(Copies::kGroups, before), record, params});
  }
  ring.copy(pool, stage, {spans[Copies::kRecord], spans[Copies::kParams]}, {record, params});
}

// Where the blocks of a warp come to lie in its room, a lane each, of so many bytes: all at once, if there are few and they
// fit, otherwise in slots for the largest. Returns how many can be on their way at a time.
__device__ __forceinline__ uint32_t place_blocks(uint32_t blocks, uint32_t bytes, uint32_t room,
                                                 uint32_t& position) {
  const uint32_t lane = threadIdx.x % kWarpThreads,
                 rounded = (bytes + kSlotAlignment - 1) / kSlotAlignment * kSlotAlignment;
  uint32_t to_end = rounded;
  for (uint32_t distance = 1; distance < kWarpThreads; distance *= 2) {
    const uint32_t before = __shfl_up_sync(kEveryLane, to_end, distance);
    if (lane >= distance) to_end += before;
  }
  position = to_end - rounded;
  if (blocks <= kProductStages && __shfl_sync(kEveryLane, to_end, kWarpThreads - 1) <= room)
    return max(blocks, 1);
  const uint32_t largest = __reduce_max_sync(kEveryLane, rounded);
  uint32_t stages = 1;
  while (stages < kProductStages && (stages + 1) * largest <= room) ++stages;
  position = lane % stages * largest;
  return stages;
}

// Calls use(at, tile, widths, position of the part's groups in the record, slot) for the warp's blocks, from
// units.first_block on. Once the tile is done with, its slot, of at least `least_bytes`, is ordinary shared memory. The first
// settled blocks, which were there before the step began, are on their way before the kernel that precedes this one has
// ended; then it calls prepare(). The next kernel may do the same meanwhile: from the begin on with keys, which are done
// soonest so; with values, whose copies would wait for its own, once the kernel has waited.
template <uint32_t kPart, typename Prepare, typename Use>
__device__ __forceinline__ void for_tiles(const ProductParameters& parameters, const WarpUnits& units,
                                          uint8_t* room, uint64_t (&barriers)[kProductStages],
                                          WarpCopies<kPart>& blocks, float4* factors, uint32_t least_bytes,
                                          Prepare prepare, Use use) {
  using Copies = PartCopies<kPart>;
  const uint32_t lane = threadIdx.x % kWarpThreads, settled_blocks = parameters.tokens.settled,
                 settled = settled_blocks > units.first_block ? settled_blocks - units.first_block : 0;
  const uint32_t before = parameters.layout.groups;
  const auto find = [&] {
    blocks.copies[lane] =
        find_part<kPart>(parameters, units.first_block + lane, blockIdx.y, blocks.widths[lane]);
  };
  if constexpr (kPart == PH_KV_KEYS) let_next_begin();
  begin_barriers(barriers);
  uint32_t bytes = 0;
  if (lane < units.blocks) {
    if (lane < settled) find();
    bytes = lane < settled ? max(blocks.copies[lane].bytes(before), least_bytes) : parameters.most_bytes;
  }
  const uint32_t stages = place_blocks(units.blocks, bytes, parameters.room_bytes, blocks.position[lane]);
  __syncwarp();
  const Ring ring = {room, 0, stages, barriers};
  const auto fetch = [&](uint32_t at, uint32_t stage) {
    if (at < units.blocks) fetch_part<kPart>(ring, parameters, blocks.copies[at], blocks.position[at], stage);
    else ring.skip();
  };
  const uint32_t early = min(stages, settled);
  for (uint32_t ahead = 0; ahead < early; ++ahead) fetch(ahead, ahead);
  wait_for_preceding();
  if constexpr (kPart == PH_KV_VALUES) let_next_begin();
  if (lane >= settled && lane < units.blocks) find();
  __syncwarp();
  for (uint32_t ahead = early; ahead < stages; ++ahead) fetch(ahead, ahead);
  prepare();
  uint32_t stage = 0, phase = 0;
#pragma unroll 1
  for (uint32_t at = 0; at < units.blocks; ++at) {
    ring.wait(stage, phase);
    uint8_t* slot = room + blocks.position[at];
    // Opaque, lest the compiler keeps every address that follows from it in a register of its own.
    uint32_t own_lane = lane;
    asm volatile("" : "+r"(own_lane));
    const Copies& copies = blocks.copies[at];
    const uint32_t record = copies.position(Copies::kRecord, before);
    const Tile tile = {slot + copies.position(Copies::kParams, before) - Copies::kParamsBegin, slot + record,
                       own_lane, factors};
    uint32_t groups = before;
    if constexpr (kPart == PH_KV_VALUES) groups = copies.position(Copies::kGroups, before) - record;
    // The same in every lane: a reduction tells the compiler, which then branches on scalars.
    use(at, tile, __reduce_or_sync(kEveryLane, blocks.widths[at]), groups, slot);
    if (at + stages < units.blocks) ring.reuse();
    fetch(at + stages, stage);
    if (++stage == stages) stage = 0, phase ^= 1;
  }
}

template <int kDim>
__device__ __forceinline__ RecentTokens recent_of(const ProductParameters& parameters) {
  const SequenceTokens& tokens = parameters.tokens;
  return recent_tokens<kDim>(parameters.cache, tokens.layer, tokens.sequence, blockIdx.y, tokens.length,
                             tokens.packed * kBlockTokens, parameters.unpacked_slot);
}

__device__ __forceinline__ Columns columns_of(const ProductParameters& parameters, int most,
                                              uint32_t head_dim) {
  const Group& group = parameters.group;
  const uint32_t first = blockIdx.z * most;
  return {parameters.queries + 2ull * blockIdx.y * group.heads * head_dim, first,
          min(static_cast<uint32_t>(most), group.heads - first), group, 0};
}

// ---- q . K ----

// A run's keys in registers: two lanes share a token and take its chunks of 8 channels in turn.
template <int kDim>
struct RunKeys {
  uint4 chunks[kDim / 16];
  uint32_t token;
  bool present;

  __device__ __forceinline__ void load(const RecentTokens& tokens, uint32_t run) {
    const uint32_t lane = threadIdx.x % kWarpThreads, at = run * kv::kRunTokens + lane / 2;
    present = at < tokens.count;
    token = tokens.token(at);
    const uint8_t* row = tokens.keys + tokens.position(at) + 16 * (lane % 2);
#pragma unroll
    for (int x = 0; x < kDim / 16; ++x) chunks[x] = *reinterpret_cast<const uint4*>(row + 32 * x);
  }
};

template <int kDim, int kTiles, bool kBfloat>
__device__ __forceinline__ void score_run(const ProductParameters& parameters, const RunKeys<kDim>& keys,
                                          const Columns& columns, float* out) {
  constexpr int kChunks = kDim / 16;
  const uint32_t lane = threadIdx.x % kWarpThreads;
#pragma unroll 1
  for (uint32_t column = 0; column < columns.count; ++column) {
    const uint8_t* query = columns.queries + 2 * (columns.position(column, kDim) + 8 * (lane % 2));
    uint4 chunks[kChunks];
#pragma unroll
    for (int x = 0; x < kChunks; ++x) chunks[x] = *reinterpret_cast<const uint4*>(query + 32 * x);
    float sum = 0.0f;
#pragma unroll
    for (int x = 0; x < kChunks; ++x) {
      const uint4 key = keys.chunks[x];
      const uint32_t k[4] = {key.x, key.y, key.z, key.w},
                     q[4] = {chunks[x].x, chunks[x].y, chunks[x].z, chunks[x].w};
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const float2 a = to_floats<kBfloat>(k[pair]), b = to_floats<kBfloat>(q[pair]);
        sum = __fmaf_rn(a.y, b.y, __fmaf_rn(a.x, b.x, sum));
      }
    }
    sum += __shfl_xor_sync(kEveryLane, sum, 1);
    if (keys.present && lane % 2 == 0)
      out[static_cast<uint64_t>(column) * parameters.tokens.length + keys.token] = sum * parameters.scale;
  }
}

// Scores of a block on their way out of a warp.
template <int kColumns>
using Found = float[kColumns][kBlockTokens + 4];  // fewer conflicts of banks

// Thread blocks of a multiprocessor, as registers allow.
template <int kDim, int kTiles>
constexpr uint32_t kResident = kDim <= 128 && kTiles == 1 ? 4 : 3;

template <int kDim, int kTiles>
struct ScoreShared {
  Queries<kDim, kTiles> queries;
  WarpCopies<PH_KV_KEYS> blocks[kProductWarps];
  float4 factors[kProductWarps][kWarpThreads];  // see Tile
  uint64_t barriers[kProductWarps][kProductStages];
};

template <int kDim, int kTiles, bool kBfloat, Residuals kResiduals>
__global__ void __launch_bounds__(kProductThreads, (kResident<kDim, kTiles>))
    ScoreKernel(const __grid_constant__ ProductParameters parameters) {
  constexpr int kColumns = 4 * kTiles, kGroups = kDim / 32;
  constexpr bool kWide = kResiduals == Residuals::kWide, kBases = kResiduals != Residuals::kFixed;
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ ScoreShared<kDim, kTiles> shared;
  Queries<kDim, kTiles>& queries = shared.queries;
  const uint32_t warp = warp_index(), lane = threadIdx.x % kWarpThreads, g = lane / 4, i = lane % 4;
  const uint32_t length = parameters.tokens.length;
  const Columns columns = columns_of(parameters, kColumns, kDim);
  float* out =
      parameters.out + static_cast<uint64_t>(blockIdx.y * columns.group.heads + columns.first) * length;
  const WarpUnits units = warp_units(parameters, warp);
  LaneQuery<kDim> query(columns, warp < kTiles ? warp : 0);
  WarpState<kDim, kTiles> state;
  float* block_scores = out + parameters.cache.sinks + units.first_block * kBlockTokens + lane;
  const RecentTokens recent = recent_of<kDim>(parameters);
  for_tiles<PH_KV_KEYS>(
      parameters, units, dynamic + warp * parameters.room_bytes, shared.barriers[warp], shared.blocks[warp],
      shared.factors[warp], sizeof(Found<kColumns>),
      [&] {
        RunKeys<kDim> keys;
        if (units.runs > 0) keys.load(recent, units.first_run);
        if (warp < kTiles) {
          query.load();
          quantize_queries<kDim, kTiles, kBfloat>(query, warp, parameters.scale, queries);
        }
        __syncthreads();
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          state.query_sum[n] = queries.sum[4 * n + i];
          state.query_scale[n] = queries.scale[4 * n + i];
        }
#pragma unroll 1
        for (uint32_t run = 0; run < units.runs; ++run) {
          if (run > 0) keys.load(recent, units.first_run + run);
          score_run<kDim, kTiles, kBfloat>(parameters, keys, columns, out);
        }
      },
      [&](uint32_t at, const Tile& tile, uint32_t widths, uint32_t, uint8_t* slot) {
        float scores[kTiles][8];
        with_width<kResiduals, kGroups>(widths, [&](auto width) {
          tile_scores<kDim, kTiles, kBfloat, kWide, decltype(width)::value, kBases>(
              tile, parameters.layout, widths, queries, state, scores);
        });
        // Through shared memory, so that lanes write tokens in a row.
        auto& found = *reinterpret_cast<Found<kColumns>*>(slot);
        __syncwarp();
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          if (4 * n + i >= columns.count) continue;
          float* target = &found[4 * n + i][8 * g];
          const float unit = state.query_scale[n];
          const float(&x)[8] = scores[n];
          reinterpret_cast<float4*>(target)[0] =
              make_float4(x[0] * unit, x[1] * unit, x[2] * unit, x[3] * unit);
          reinterpret_cast<float4*>(target)[1] =
              make_float4(x[4] * unit, x[5] * unit, x[6] * unit, x[7] * unit);
        }
        __syncwarp();
        float* row = block_scores + at * kBlockTokens;
#pragma unroll
        for (int column = 0; column < kColumns; ++column, row += length) {
          if (column >= columns.count) break;
          row[0] = found[column][lane];
          row[kWarpThreads] = found[column][lane + kWarpThreads];
        }
      });
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

// The weighted values of runs. A lane has pairs of channels of every column.
template <int kDim, int kTiles, bool kBfloat>
struct RunSums {
  static constexpr int kPairs = (kDim / 2 + kWarpThreads - 1) / kWarpThreads;
  float2 found[kPairs][4 * kTiles] = {};

  __device__ __forceinline__ static uint32_t pair_of(int pair) {
    return threadIdx.x % kWarpThreads + pair * kWarpThreads;
  }

  // Loads all of a run before it waits for any.
  __device__ __forceinline__ void add(const RecentTokens& tokens, uint32_t run, const float* weights,
                                      uint32_t length, uint32_t columns) {
    const uint32_t lane = threadIdx.x % kWarpThreads;
    // A lane knows a token.
    const uint32_t at = run * kv::kRunTokens + lane % kv::kRunTokens, slot = tokens.slot(at);
    const float* weight_of_token = weights + tokens.token(min(at, tokens.count - 1));
    const auto load_weight = [&](uint32_t column) {
      return at < tokens.count && column < columns ? weight_of_token[static_cast<uint64_t>(column) * length]
                                                   : 0.0f;
    };
    float weight = load_weight(0);
    uint32_t words[kv::kRunTokens][kPairs];
#pragma unroll
    for (int t = 0; t < static_cast<int>(kv::kRunTokens); ++t) {
      const uint8_t* row = tokens.values + __shfl_sync(kEveryLane, slot, t) * tokens.row_bytes;
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair)
        words[t][pair] =
            pair_of(pair) < kDim / 2 ? *reinterpret_cast<const uint32_t*>(row + 4 * pair_of(pair)) : 0;
    }
#pragma unroll
    for (int column = 0; column < 4 * kTiles; ++column) {
      if (column >= columns) break;
      const float own = weight;
      weight = load_weight(column + 1);
#pragma unroll
      for (int t = 0; t < static_cast<int>(kv::kRunTokens); ++t) {
        const float of_token = __shfl_sync(kEveryLane, own, t);
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
          const float2 value = to_floats<kBfloat>(words[t][pair]);
          found[pair][column].x = __fmaf_rn(of_token, value.x, found[pair][column].x);
          found[pair][column].y = __fmaf_rn(of_token, value.y, found[pair][column].y);
        }
      }
    }
  }

  // Adds them to where a warp has the sums of its tiles, by way of `scratch`: two columns at a time.
  __device__ __forceinline__ void hand_over(WarpState<kDim, kTiles>& state, uint32_t columns,
                                            float4 (&scratch)[kWarpThreads]) const {
    constexpr int kChannels = 2 * kWarpThreads;  // of all lanes' pairs
    const uint32_t lane = threadIdx.x % kWarpThreads, g = lane / 4, i = lane % 4;
    static_assert(sizeof scratch == 2 * kChannels * sizeof(float));
    float* sums = reinterpret_cast<float*>(scratch);
#pragma unroll
    for (int first = 0; first < 4 * kTiles; first += 2) {
      if (first >= columns) break;
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
        for (int column = 0; column < 2; ++column)
          reinterpret_cast<float2*>(sums + column * kChannels)[lane] = found[pair][first + column];
        __syncwarp();
        if (i / 2 == first % 4 / 2) {
#pragma unroll
          for (int at = 0; at < kChannels / 8; ++at) {
            const int o = pair * kChannels / 8 + at;
            if (o < kDim / 8) state.out[first / 4][o] += sums[i % 2 * kChannels + 8 * at + g];
          }
        }
        __syncwarp();
      }
    }
  }
};

// Floats of a column in shared memory; free of bank conflicts for the fragments' layout.
template <int kDim>
constexpr int kSumStride = kDim + 8;

struct WeighShared {
  WarpCopies<PH_KV_VALUES> blocks[kProductWarps];
  float4 factors[kProductWarps][kWarpThreads];  // see Tile
  uint64_t barriers[kProductWarps][kProductStages];
  uint32_t is_last;
};

template <int kDim, int kTiles, bool kBfloat, Residuals kResiduals>
__global__ void __launch_bounds__(kProductThreads, (kResident<kDim, kTiles>))
    WeighKernel(const __grid_constant__ ProductParameters parameters) {
  constexpr int kColumns = 4 * kTiles, kGroups = kDim / 32, kStride = kSumStride<kDim>;
  constexpr bool kWide = kResiduals == Residuals::kWide, kBases = kResiduals != Residuals::kFixed;
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ WeighShared shared;
  const uint32_t warp = warp_index(), lane = threadIdx.x % kWarpThreads, g = lane / 4, i = lane % 4;
  const CacheView& cache = parameters.cache;
  const uint32_t length = parameters.tokens.length;
  const Columns columns = columns_of(parameters, kColumns, kDim);
  const uint32_t query_head = blockIdx.y * columns.group.heads + columns.first;
  const float* weights = parameters.weights + static_cast<uint64_t>(query_head) * length;
  const WarpUnits units = warp_units(parameters, warp);
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
      parameters, units, dynamic + warp * parameters.room_bytes, shared.barriers[warp], shared.blocks[warp],
      shared.factors[warp], 0,
      [&] {
        load_weights(0, next);
        if (units.runs == 0) return;
        // While the first tiles are on their way.
        const RecentTokens recent = recent_of<kDim>(parameters);
        RunSums<kDim, kTiles, kBfloat> sums;
#pragma unroll 1
        for (uint32_t run = units.first_run; run < units.first_run + units.runs; ++run)
          sums.add(recent, run, weights, length, columns.count);
        sums.hand_over(state, columns.count, shared.factors[warp]);
      },
      [&](uint32_t at, const Tile& tile, uint32_t widths, uint32_t groups, const uint8_t*) {
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
        with_width<kResiduals, kGroups>(widths, [&](auto width) {
          tile_values<kDim, kTiles, kWide, decltype(width)::value, kBases>(
              {tile}, parameters.layout, groups, widths, state, fragments, weight_units);
        });
      });

  // The warp's slots are free: its sums take their place.
  const auto sums_of = [&](uint32_t of_warp) {
    return reinterpret_cast<float*>(dynamic + of_warp * parameters.room_bytes);
  };
  float* sums = sums_of(warp);
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const float shift = output_shift<kDim, kTiles, kWide>(state, n);
#pragma unroll
    for (int o = 0; o < kDim / 8; ++o) sums[(4 * n + i) * kStride + 8 * o + g] = state.out[n][o] + shift;
  }
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

// Shared memory that a block takes at most; at least `least`.
template <uint32_t kPart>
uint32_t slot_bytes(const kv::TileShape& shape, uint32_t least) {
  const uint32_t bytes = PartCopies<kPart>::kRecordSector + kv::bases_position(shape, kv::kParts) +
                         group_bytes(shape, kPart) + 3 * kSectorBytes;
  return (std::max(bytes, least) + kSlotAlignment - 1) / kSlotAlignment * kSlotAlignment;
}

// Shared memory of a thread block beside what the kernel has itself, and how many thread blocks of a multiprocessor. They
// take all there is, even if they need less: were there room for more of them, those of the next kernel, which begin early,
// would gather where it is.
struct Residency {
  uint32_t bytes, blocks;
};

// `own_bytes` of shared memory are the kernel's own.
Residency residency_of(const ph_device& device, uint32_t slot, uint32_t own_bytes, uint32_t most_blocks) {
  constexpr uint32_t kReservedBytes = 1024, kAlignmentBytes = 512;  // of every thread block
  const uint32_t limit = static_cast<uint32_t>(device.shared_bytes), tile = kProductWarps * slot;
  for (uint32_t blocks = most_blocks; blocks > 0; --blocks) {
    const uint32_t of_block = (limit + kReservedBytes) / blocks - kReservedBytes - kAlignmentBytes;
    if (of_block < own_bytes + tile) continue;
    constexpr uint32_t kRooms = kProductWarps * kSlotAlignment;
    return {(of_block - own_bytes) / kRooms * kRooms, blocks};
  }
  throw Error(PH_ERROR_UNSUPPORTED,
              "Cannot multiply packed records of up to %u bytes on this GPU: that takes %u bytes of shared "
              "memory, and a thread block has %u",
              slot, tile, limit - own_bytes);
}

uint32_t least_pieces(uint32_t units) { return (units + kMostPieceUnits - 1) / kMostPieceUnits; }

// Into how many pieces, `most` unless those are too large, so many units are cut, where `rows` thread blocks take each and
// the GPU holds `resident` at a time.
uint32_t product_pieces(uint32_t units, uint32_t rows, uint32_t resident, uint32_t most) {
  const uint32_t least = least_pieces(units);
  const uint64_t warps = uint64_t{kProductWarps} * resident, work = uint64_t{units} * rows;
  uint32_t pieces;
  if (work <= kFewUnits * warps) {
    // With so little to do that its way to the first bytes takes longest, the kernel leaves about a third of the GPU to the
    // next one, which is on that way meanwhile: so much that all warps have as many units.
    const uint32_t of_warp = static_cast<uint32_t>((3 * work + 2 * warps - 1) / (2 * warps)),
                   of_thread_block = kProductWarps * of_warp;
    pieces = (units + of_thread_block - 1) / of_thread_block;
  } else {
    // As few as fill the GPU once, or a few times.
    const uint32_t times = (least * rows + resident - 1) / resident;
    pieces = std::min(times * resident / rows, units);
  }
  return std::max(least, std::min(pieces, most));
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
  parameters.widths = shape.parts[part].width * widths_of_one(kv::tile_groups(shape));
  if (shape.parts[PH_KV_KEYS].width > 0 && shape.parts[PH_KV_VALUES].width > 0)
    parameters.record_units = kv::largest_record_bytes(shape) / kUnitBytes;
  parameters.group = group_of(cache);
  parameters.unpacked_slot = tokens.packed * kBlockTokens % cache.ring;
  return parameters;
}

template <typename Shared, typename Kernel>
void launch(ph_device& device, ProductParameters& parameters, Kernel kernel, uint32_t slot, uint32_t resident,
            uint32_t columns, uint32_t most_pieces = UINT32_MAX) {
  const CacheView& cache = parameters.cache;
  const Residency residency = residency_of(device, slot, sizeof(Shared), resident);
  parameters.most_bytes = slot;
  parameters.room_bytes = residency.bytes / kProductWarps;
  const uint32_t column_groups = (parameters.group.heads + columns - 1) / columns;
  const uint32_t runs = parameters.tokens.runs(cache), units = runs + parameters.tokens.packed;
  parameters.pieces =
      product_pieces(units, cache.heads * column_groups,
                     static_cast<uint32_t>(device.processors) * residency.blocks, most_pieces);
  parameters.shares = {units, runs, parameters.pieces * kProductWarps};
  allow_shared(device, kernel, SharedMemory::kPrefer);
  const dim3 grid(parameters.pieces, cache.heads, column_groups);
  launch_overlapping(device, kernel, grid, kProductThreads, residency.bytes, parameters);
}

}  // namespace

uint64_t products_workspace_bytes(const CacheView& cache) {
  const uint64_t pieces = std::max(least_pieces(static_cast<uint32_t>(most_product_units(cache))), kMostSums);
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
        slot_bytes<PH_KV_KEYS>(shape, sizeof(Found<4 * kTiles>)), kResident<kDim, kTiles>, 4 * kTiles);
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
    constexpr int kDim = decltype(dim)::value, kTiles = decltype(tiles)::value;
    // A warp's sums fit its room, even if that is for one block only.
    launch<WeighShared>(device, parameters,
                        WeighKernel<kDim, kTiles, decltype(bfloat)::value, decltype(residuals)::value>,
                        slot_bytes<PH_KV_VALUES>(shape, 4 * kTiles * kSumStride<kDim> * sizeof(float)),
                        kResident<kDim, kTiles>, 4 * kTiles, kMostSums);
  });
}

}  // namespace ph::attention
