// Prefill attention over a growing cache on the GPU: one launch for a layer and step, whose shape follows from the step's
// (kv/step_graph.h).
//
// A thread block takes a tile of rows (prefill.h: query tokens times heads of the group) of one sequence and kv head, in
// four warps of 16 * kBands rows each, and goes through the tokens that they see, 64 at a time, with an online softmax:
// first the packed blocks, then the tokens in 16 bits. Products are mma.m16n8k16 with float32 sums.
//
// Packed blocks: while the tensor cores work on one block, the record of the next comes into shared memory by cp.async.
// The thread block unpacks a record once for all its rows, to codes plus zero points in float16, which is exact for
// integers up to 2048 (what of a zero point does not fit goes into a rank-one correction). Scales of keys are applied to
// the scores, and those of values, over the block's largest, to the probabilities, so that only these are rounded. In
// bfloat16, queries are brought to float16 by a power of two per row, exact but for what is below 2^-29 of the row's
// largest value.
// kMixed, for layers of which a part is kivi or raw16; keys and values are what they are independently of each other:
//   kivi keys      a scale per channel: queries times scales, anew for every block, as sums of bfloat16s that are exact
//                  (two of them, or three for float16), times codes; zero points, times the same, are one number per row
//   kivi values    a scale per token and 64 channels: for each of these groups, probabilities times scales become
//                  float16s relative to the row's largest, and are multiplied by codes and, in float32, by zero points
//   raw16          as tokens in 16 bits, but in the order of the record, which is that of fragments already
// Raw values come while scores are computed, the next block's raw keys while values are multiplied.
// Tokens in 16 bits: keys and values come as they are, values while scores are computed, the next keys while the values
// are multiplied. In bfloat16 probabilities are split into a high and a low part, for 8 bits would not do.
//
// The layout of records (kv/tile.h) decides which lane has what: lane (g, i) = (lane / 4, lane % 4) unpacks just what its
// B fragments need. So token 16i + u of a chunk, u in 0..15, is column 2i + u / 8 of score fragment u % 8, and
// the four of u / 4 = s are k step s of the second product; tokens in 16 bits are put to where that makes it true for
// them. Channels 16x + 4i + b, b in 0..3, are a lane's of k step x of the first product.
//
// Shared memory: queries as A fragments, each read by the lane that wrote it; a chunk's keys and values, either as B
// fragments, 16 bytes per lane (free of bank conflicts), or as rows, padded so that the fragments' loads are; the next
// record, without its raw values. Bytes moved: a tile reads the tokens it sees once, from the L2 cache mostly, and its
// queries once or twice, and writes its outputs once. All tensors and records are 16-byte aligned; records may straddle two pages of the pool.
//
// Deterministic: no atomics, and the order of sums is that of a row's tokens, whatever tile it is in.
#include <algorithm>

#include "attention/launch.cuh"
#include "attention/prefill.h"
#include "attention/prefill_packed.cuh"
#include "device/device_cuda.h"

namespace ph::attention {

namespace {

using kv::CacheView;
using kv::kBlockTokens;
using kv::kParamsBytes;
using kv::kUnitBytes;
using kv::StepSequence;
using kv::StepView;
using kv::window_begin;

constexpr uint32_t kKeyPadding = 32;  // bytes after a row of keys: 8-byte loads of 4 x 4 lanes meet all banks
constexpr uint32_t kValuePadding = 16;  // after one of values: ldmatrix meets all banks

// ---- shared memory ----

// Of the dynamic shared memory, in this order.
template <int kDim, int kBands>
struct Parts {
  static constexpr uint32_t kQueries = kWarps * kBands * (kDim / 16) * kWarpThreads * 16;
  static constexpr uint32_t kFragments = kBlockTokens * kDim * 2;  // of keys, of values
  static constexpr uint32_t kKeyStride = 2 * kDim + kKeyPadding, kValueStride = 2 * kDim + kValuePadding;
  static constexpr uint32_t kKeyRows = kBlockTokens * kKeyStride, kValueRows = kBlockTokens * kValueStride;
  static constexpr uint32_t kChunk =
      kKeyRows + kValueRows > 2 * kFragments ? kKeyRows + kValueRows : 2 * kFragments;
};

// ---- tokens in 16 bits ----

// Where the tokens of a sequence are, of one part and head.
struct PlainSource {
  const uint8_t* recent;   // slot 0
  const uint8_t* present;  // the step's first token of the sequence
  uint64_t row_bytes;
  uint32_t before;

  __device__ __forceinline__ const uint8_t* row(const CacheView& cache, uint32_t position) const {
    return position < before ? recent + kv::recent_slot(cache, position) * row_bytes
                             : present + (position - before) * row_bytes;
  }
};

// Token of a chunk that row `slot` of its keys holds: row 8m + g is column g of score fragment m.
__device__ __forceinline__ uint32_t key_token(uint32_t slot) { return 8 * (slot % 8) + slot / 8; }
// And of its values: row 16s + 8h + 2i + b is k step s; a lane has those of its i.
__device__ __forceinline__ uint32_t value_token(uint32_t slot) {
  return 16 * (slot % 8 / 2) + 2 * (slot / 8) + slot % 2;
}

// Starts the copy of entries [begin, begin + 64) of a list to rows; past `end` the last one repeats. Two threads a row.
template <int kDim, typename Token>
__device__ __forceinline__ void fetch_rows(const CacheView& cache, const PlainSource& source,
                                           const PlainTokens& list, uint32_t begin, uint32_t end,
                                           uint8_t* rows, uint32_t stride, Token token) {
  static_assert(kThreads == 2 * kBlockTokens);
  const uint32_t slot = threadIdx.x / 2, side = threadIdx.x % 2;
  const uint8_t* row = source.row(cache, list.position(min(begin + token(slot), end - 1)));
#pragma unroll
  for (uint32_t k = 0; k < kDim / 16; ++k) {
    const uint32_t byte = 16 * (2 * k + side);
    kv::copy_async(reinterpret_cast<uint4*>(rows + slot * stride + byte), row + byte);
  }
}

// Which entries of the list a row sees: its sinks, and first..end.
struct Visible {
  uint32_t first, end;
};
__device__ __forceinline__ Visible visible(const PlainTokens& list, uint32_t window, uint32_t position) {
  return {list.before(max(window_begin(window, position), list.sinks)), list.before(position + 1)};
}

// Rows of keys and of values as plain_scores and plain_values load them.
template <int kDim, int kBands>
__device__ __forceinline__ uint4 load_keys(const uint8_t* rows, int x, int f) {
  constexpr uint32_t kStride = Parts<kDim, kBands>::kKeyStride;
  const uint32_t lane = threadIdx.x % kWarpThreads, g = lane / 4, i = lane % 4;
  const uint8_t* keys = rows + (16 * f + g) * kStride + 32 * x + 8 * i;
  const uint2 even = *reinterpret_cast<const uint2*>(keys),
              odd = *reinterpret_cast<const uint2*>(keys + 8 * kStride);
  return make_uint4(even.x, even.y, odd.x, odd.y);
}

template <int kDim, int kBands>
__device__ __forceinline__ uint4 load_values(const uint8_t* rows, int pair, int s) {
  const uint32_t lane = threadIdx.x % kWarpThreads;
  const uint8_t* values = rows + (16 * s + lane / 8 % 2 * 8 + lane % 8) * Parts<kDim, kBands>::kValueStride +
                          lane / 16 * 16 + 32 * pair;
  uint32_t b[4];
  load_transposed(shared_address(values), b);
  return make_uint4(b[0], b[1], b[2], b[3]);
}

// ---- kernel ----

struct PrefillParameters {
  CacheView cache;
  kv::TileShape shape;
  StepView step;
  TileLayout layout;
  const uint8_t* parts[kv::kParts];
  const uint8_t* queries;
  uint8_t* out;
  uint32_t layer, window;
  float scale;
};

template <int kDim, int kBands, bool kBfloat, bool kMixed>
__global__ void __launch_bounds__(kThreads, 2)
    PrefillKernel(const __grid_constant__ PrefillParameters parameters) {
  using Places = Parts<kDim, kBands>;
  constexpr uint32_t kTileRows = kWarps * 16 * kBands;
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ PrefillShared<kDim, kMixed> shared;
  uint8_t* const chunk = dynamic + Places::kQueries;
  uint8_t* const slot = chunk + Places::kChunk;

  const CacheView& cache = parameters.cache;
  const kv::TileShape& shape = parameters.shape;
  const uint32_t window = parameters.window, head = blockIdx.y, group = cache.query_heads / cache.heads;
  const uint32_t number = entry_of_tile(parameters.step, blockIdx.x, group, kTileRows);
  const StepSequence entry = parameters.step.sequences[number];
  const uint32_t all_rows = entry.tokens * group, tiles = (all_rows + kTileRows - 1) / kTileRows;
  const uint32_t turn = blockIdx.x - first_tile(entry, number, group, kTileRows);
  if (turn >= tiles) return;
  // The last tiles see the most tokens: they go first.
  const Tile16 tile = {parameters.queries,
                       parameters.out,
                       (tiles - 1 - turn) * kTileRows,
                       all_rows,
                       group,
                       cache.query_heads,
                       head,
                       entry.input};
  const uint32_t before = static_cast<uint32_t>(entry.before);
  const uint32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  const uint32_t band_row = warp * 16 * kBands;  // of the tile, the warp's first
  const bool active = tile.first + band_row < all_rows;
  const auto position_of = [&](uint32_t of_tile) { return before + tile.row(of_tile) / group; };
  // Of the first and last rows of the tile, and of the warp.
  const uint32_t tile_low = position_of(0), tile_high = position_of(kTileRows - 1);
  const uint32_t warp_low = position_of(band_row), warp_high = position_of(band_row + 16 * kBands - 1);

  uint4* const queries = reinterpret_cast<uint4*>(dynamic) + warp * kBands * (kDim / 16) * kWarpThreads;
  RowFacts<kBands> facts;
  RowState<kDim, kBands> state;
#pragma unroll
  for (int band = 0; band < kBands; ++band) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      facts.position[band][r] = position_of(band_row + 16 * band + lane / 4 + 8 * r);
      state.reference[band][r] = kNoReference;
      state.sum[band][r] = state.shift[band][r] = 0.0f;
      facts.query_sum[band][r] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) state.out[band][n][c] = 0.0f;
    }
  }
  const bool scaled = !kMixed || kv::is_per_token(shape.parts[PH_KV_KEYS]);
  if (scaled) load_queries<kDim, kBands, kBfloat, true>(tile, band_row, parameters.scale, queries, facts);
  else load_queries<kDim, kBands, kBfloat, false>(tile, band_row, parameters.scale, queries, facts);

  // Packed blocks, from the first that the tile sees on.
  const uint32_t sinks = cache.sinks, tile_begin = window_begin(window, tile_low);
  uint32_t first_block = tile_begin > sinks ? (tile_begin - sinks) / kBlockTokens : 0;
  uint4* const keys = reinterpret_cast<uint4*>(chunk);
  uint4* const values = reinterpret_cast<uint4*>(chunk + Places::kFragments);
  const uint32_t* index = kv::index_of(cache, parameters.layer, entry.sequence);
  const uint32_t* page_table = kv::page_table_of(cache, parameters.layer, entry.sequence);
  const uint32_t params_units = kMixed ? kv::params_bytes(shape) / kUnitBytes : kv::kParamsUnits;
  const uint32_t raw_units[kv::kParts] = {kMixed ? kv::raw_bytes(shape, PH_KV_KEYS) / kUnitBytes : 0,
                                          kMixed ? kv::raw_bytes(shape, PH_KV_VALUES) / kUnitBytes : 0};
#pragma unroll 1
  for (; first_block < entry.first_block; first_block += kRunsHeld) {
    const uint32_t count = min(kRunsHeld, entry.first_block - first_block);
    __syncthreads();
    if (threadIdx.x < count) {
      const kv::RecordSpan span =
          kv::record_span(cache, index, first_block + threadIdx.x, head, params_units);
      const uint32_t values_begin = span.end - raw_units[PH_KV_VALUES],
                     keys_begin = values_begin - raw_units[PH_KV_KEYS];
      shared.spans[threadIdx.x] = {make_span(page_table, span.params, span.params + params_units),
                                   make_span(page_table, span.begin, keys_begin)};
      if constexpr (kMixed) {
        if (raw_units[PH_KV_KEYS] > 0)
          shared.raw[threadIdx.x][PH_KV_KEYS] = make_span(page_table, keys_begin, values_begin);
        if (raw_units[PH_KV_VALUES] > 0)
          shared.raw[threadIdx.x][PH_KV_VALUES] = make_span(page_table, values_begin, span.end);
      }
    }
    __syncthreads();
    fetch_block(cache.pool, shared.spans[0], slot);
    if (kMixed && raw_units[PH_KV_KEYS] > 0)
      fetch_span(cache.pool, shared.raw[0][PH_KV_KEYS], reinterpret_cast<uint8_t*>(keys));
#pragma unroll 1
    for (uint32_t at = 0; at < count; ++at) {
      kv::copy_wait();
      __syncthreads();  // the record is there, raw keys too, and the fragments are free but for these
      if (kMixed && raw_units[PH_KV_VALUES] > 0)
        fetch_span(cache.pool, shared.raw[at][PH_KV_VALUES], reinterpret_cast<uint8_t*>(values));
      const bool offset = unpack_block<kDim, kBfloat>(
          shape, parameters.layout, Tile{slot, slot + kParamsBytes, lane}, keys, values, shared);
      const bool offsets = __syncthreads_or(offset);  // the fragments are there, and the record is free
      if (at + 1 < count) fetch_block(cache.pool, shared.spans[at + 1], slot);
      float scores[kBands][8][4] = {};
      if (active) packed_scores<kDim, kBands, kBfloat>(shape, queries, keys, shared, offsets, facts, scores);
      if (kMixed && raw_units[PH_KV_KEYS] + raw_units[PH_KV_VALUES] > 0) {
        kv::copy_wait();
        __syncthreads();  // raw values are there, and the place of the keys is free
        if (raw_units[PH_KV_KEYS] > 0 && at + 1 < count)
          fetch_span(cache.pool, shared.raw[at + 1][PH_KV_KEYS], reinterpret_cast<uint8_t*>(keys));
      }
      const uint32_t start = sinks + (first_block + at) * kBlockTokens;
      if (active) {
        packed_values<kDim, kBands, kBfloat>(shape, values, shared, offsets, start,
                                             start < window_begin(window, warp_high) ? window : 0, facts,
                                             scores, state);
      }
    }
  }

  // Tokens in 16 bits, up to the last that the tile sees.
  if (kBfloat && scaled)
    load_queries<kDim, kBands, kBfloat, false>(tile, band_row, parameters.scale, queries, facts);
  const PlainTokens list = plain_tokens(cache, entry);
  const uint32_t end = list.before(tile_high + 1), skipped = visible(list, window, tile_low).first;
  // The next chunk from an entry on: those between the sinks and the first that the tile sees are left out.
  const auto next_chunk = [&](uint32_t begin) {
    return begin >= list.sinks && begin < skipped ? max(begin, skipped / kBlockTokens * kBlockTokens) : begin;
  };
  const auto source_of = [&](uint32_t part) {
    const uint64_t row_bytes = static_cast<uint64_t>(cache.heads) * kDim * 2, of_head = head * kDim * 2;
    const uint8_t* recent =
        cache.recent + (kv::stream_of(cache, parameters.layer, entry.sequence) * kv::kParts + part) *
                           kv::recent_part_bytes(cache);
    return PlainSource{recent + of_head, parameters.parts[part] + entry.input * row_bytes + of_head,
                       row_bytes, before};
  };
  const PlainSource key_source = source_of(PH_KV_KEYS), value_source = source_of(PH_KV_VALUES);
  uint8_t* const key_rows = chunk;
  uint8_t* const value_rows = chunk + Places::kKeyRows;
  __syncthreads();  // the fragments are free
  uint32_t begin = next_chunk(0);
  fetch_rows<kDim>(cache, key_source, list, begin, end, key_rows, Places::kKeyStride, key_token);
#pragma unroll 1
  while (begin < end) {
    kv::copy_wait();
    __syncthreads();  // the keys are there, and the place of the values is free
    fetch_rows<kDim>(cache, value_source, list, begin, end, value_rows, Places::kValueStride, value_token);
    float scores[kBands][8][4] = {};
    if (active) {
      plain_scores<kDim, kBands, kBfloat>(
          queries, scores, [&](int x, int f) { return load_keys<kDim, kBands>(key_rows, x, f); });
    }
    kv::copy_wait();
    __syncthreads();  // the values are there, and the place of the keys is free
    const uint32_t next = next_chunk(begin + kBlockTokens);
    if (next < end)
      fetch_rows<kDim>(cache, key_source, list, next, end, key_rows, Places::kKeyStride, key_token);
    if (active) {
      const bool masked = begin + kBlockTokens > visible(list, window, warp_low).end ||
                          begin < visible(list, window, warp_high).first;
      if (masked) {
#pragma unroll
        for (int band = 0; band < kBands; ++band) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const Visible seen = visible(list, window, facts.position[band][r]);
#pragma unroll
            for (int m = 0; m < 8; ++m) {
#pragma unroll
              for (int c = 0; c < 2; ++c) {
                const uint32_t at = begin + 16 * (lane % 4) + m + 8 * c;
                if (at >= seen.end || (at >= list.sinks && at < seen.first))
                  scores[band][m][2 * r + c] = -INFINITY;
              }
            }
          }
        }
      }
      float rescale[kBands][2];
      soften(scores, facts.factor, state, rescale);
      scale_out(state, rescale);
      plain_values<kDim, kBands, kBfloat>(
          scores, state, [&](int pair, int s) { return load_values<kDim, kBands>(value_rows, pair, s); });
    }
    begin = next;
  }
  if (!active) return;

#pragma unroll
  for (int band = 0; band < kBands; ++band) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = state.sum[band][r], shift = state.shift[band][r];
      for (int distance = 1; distance < 4; distance *= 2) {
        sum += __shfl_xor_sync(kEveryLane, sum, distance);
        shift += __shfl_xor_sync(kEveryLane, shift, distance);
      }
      const uint32_t row = tile.first + band_row + 16 * band + lane / 4 + 8 * r;
      if (row >= all_rows) continue;
      uint8_t* out = tile.out + 2 * (kDim * tile.place(row) + 2 * (lane % 4));
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        *reinterpret_cast<uint32_t*>(out + 16 * n) = to_halves<kBfloat>(
            (state.out[band][n][2 * r] + shift) / sum, (state.out[band][n][2 * r + 1] + shift) / sum);
      }
    }
  }
}

// ---- launch ----

template <int kDim, int kBands, bool kMixed>
void launch(ph_device& device, const PrefillParameters& parameters) {
  using Places = Parts<kDim, kBands>;
  const kv::TileShape& shape = parameters.shape;
  const uint32_t record_bytes = kv::largest_record_bytes(shape) - kv::raw_bytes(shape);
  const uint32_t shared_bytes = Places::kQueries + Places::kChunk + kParamsBytes + record_bytes;
  const uint32_t limit = static_cast<uint32_t>(device.shared_bytes - sizeof(PrefillShared<kDim, kMixed>));
  if (shared_bytes > limit) {
    throw Error(
        PH_ERROR_UNSUPPORTED,
        "Cannot prefill with head_dim %d on this GPU: that takes %u bytes of shared memory, and a thread "
        "block has %u",
        kDim, shared_bytes, limit);
  }
  const CacheView& cache = parameters.cache;
  const auto kernel = cache.dtype == PH_BF16 ? PrefillKernel<kDim, kBands, true, kMixed>
                                             : PrefillKernel<kDim, kBands, false, kMixed>;
  allow_shared(device, kernel, SharedMemory::kPrefer);
  const uint32_t tiles = tile_numbers(parameters.step, cache.query_heads / cache.heads, kWarps * 16 * kBands);
  kernel<<<dim3(tiles, cache.heads), kThreads, shared_bytes, device.stream>>>(parameters);
  PH_CUDA_TRY(cudaGetLastError());
}

template <int kDim, int kBands>
void launch_bands(ph_device& device, const PrefillParameters& parameters) {
  const kv::TileShape& shape = parameters.shape;
  if (kv::is_per_token(shape.parts[PH_KV_KEYS]) && kv::is_per_token(shape.parts[PH_KV_VALUES]))
    launch<kDim, kBands, false>(device, parameters);
  else launch<kDim, 1, true>(device, parameters);  // two bands take too many registers
}

}  // namespace

void prefill(ph_device& device, const CacheView& cache, const kv::TileShape& shape, uint32_t layer,
             const StepView& step, kv::StepTensors tensors, const uint8_t* queries, uint8_t* out, float scale,
             uint32_t window) {
  PrefillParameters parameters{};
  parameters.cache = cache;
  parameters.shape = shape;
  parameters.step = step;
  parameters.layout = tile_layout(shape);
  for (uint32_t part = 0; part < kv::kParts; ++part) parameters.parts[part] = tensors.parts[part];
  parameters.queries = queries;
  parameters.out = out;
  parameters.layer = layer;
  parameters.window = window;
  parameters.scale = scale;
  // More rows share what a warp loads, where there are so many; a row's results are the same. Wide heads take all
  // registers with one band.
  const bool many = step.most_queries * (cache.query_heads / cache.heads) > kWarps * 16;
  dispatch_dim(cache.head_dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    if constexpr (kDim < 256) {
      if (many) return launch_bands<kDim, 2>(device, parameters);
    }
    launch_bands<kDim, 1>(device, parameters);
  });
}

}  // namespace ph::attention
