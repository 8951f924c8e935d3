// Decode attention over a growing cache on the GPU: one launch for a layer and step.
//
// A thread block takes a piece of a sequence (up to 32 packed blocks, or its tokens in 16 bits), a kv head, and up to
// 4 * kTiles columns: query tokens times heads of the group, which share one unpacking. Packed records come into shared
// memory by bulk copies, kStages tiles ahead for each of four warps; a warp works on its tiles alone (tile.cuh), and the
// warps' results are merged in order. With more than one piece, partial results go through the workspace and the last
// thread block of a sequence and head merges them, in the order of the pieces: deterministic, and independent of the
// rest of the batch, as pieces depend on the sequence's own length alone.
//
// Layers whose parts are both packkv or fixed, the common case, have kernels of their own, and so have those that are
// raw16 throughout: their warps take values from device memory into registers as tile_raw16.cuh says. A third flavour
// serves every other mixture.
//
// Reads every record once (its params once per kv head, from the cache), writes 4 * head_dim + 8 bytes per piece and
// column. Records and params are 16-byte aligned, and may straddle two pages of the pool.
#include <algorithm>

#include "attention/decode.h"
#include "attention/tile.cuh"
#include "attention/tile_kivi.cuh"
#include "attention/tile_raw16.cuh"
#include "device/device_cuda.h"

namespace ph::attention {

namespace {

using kv::CacheView;
using kv::kBlockTokens;
using kv::kMostQueries;
using kv::kPageUnits;
using kv::kParamsBytes;
using kv::kUnitBytes;
using kv::StepPiece;
using kv::StepSequence;
using kv::StepView;

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpThreads;
constexpr uint32_t kStages = 2;                                  // tiles ahead, unless shared memory is short
constexpr uint32_t kWarpBlocks = kv::kMostPieceBlocks / kWarps;  // packed blocks of a warp, at most
constexpr uint32_t kRecentTokens = kThreads;  // tokens in 16 bits that are worked on at a time
constexpr float kLog2E = 1.4426950408889634f;

// ---- from device memory to shared memory ----

// A run of bytes in a stream, in one or two pages.
struct Span {
  uint16_t unit;  // within the first page
  uint16_t units;
  uint32_t pages[2];
};

struct TileSpans {
  Span params, record;
};

__device__ __forceinline__ Span make_span(const uint32_t* page_table, uint32_t begin, uint32_t end) {
  return {static_cast<uint16_t>(begin % kPageUnits),
          static_cast<uint16_t>(end - begin),
          {page_table[begin / kPageUnits], page_table[(end - 1) / kPageUnits]}};
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Calls use(offset within the span, source, bytes) for the one or two pieces of a span.
template <typename Use>
__device__ __forceinline__ void for_pieces(const uint8_t* pool, const Span& span, Use use) {
  const uint32_t first = min(static_cast<uint32_t>(span.units), kPageUnits - span.unit);
  use(0u, pool + span.pages[0] * kv::kPageBytes + span.unit * kUnitBytes, first * kUnitBytes);
  if (first < span.units)
    use(first * kUnitBytes, pool + span.pages[1] * kv::kPageBytes, (span.units - first) * kUnitBytes);
}

// The slots into which a warp's tiles come.
struct Ring {
  uint8_t* slots;  // [stages][slot_bytes]: params, then record
  uint32_t slot_bytes, stages;
  uint64_t* barriers;  // [stages]

  __device__ __forceinline__ void begin() const {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x % kWarpThreads == 0) {
      for (uint32_t stage = 0; stage < stages; ++stage)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barriers + stage))
                     : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncwarp();
#endif
  }

  // Starts a tile's copy, or none for a null `spans`; all lanes call it, once per tile in turn.
  __device__ __forceinline__ void fetch(const uint8_t* pool, const TileSpans* spans, uint32_t stage) const {
    uint8_t* slot = slots + stage * slot_bytes;
#if __CUDA_ARCH__ >= 900
    if (spans == nullptr || threadIdx.x % kWarpThreads != 0) return;
    const uint32_t barrier = shared_address(barriers + stage);
    const Span params = spans->params, record = spans->record;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"((params.units + record.units) * kUnitBytes)
                 : "memory");
    const auto copy = [&](uint32_t target, const uint8_t* source, uint32_t bytes) {
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
              target),
          "l"(source), "r"(bytes), "r"(barrier)
          : "memory");
    };
    const uint32_t target = shared_address(slot);
    for_pieces(pool, record, [&](uint32_t offset, const uint8_t* source, uint32_t bytes) {
      copy(target + kParamsBytes + offset, source, bytes);
    });
    for_pieces(pool, params, [&](uint32_t offset, const uint8_t* source, uint32_t bytes) {
      copy(target + offset, source, bytes);
    });
#else
    if (spans != nullptr) {
      const auto copy = [&](uint8_t* target, const uint8_t* source, uint32_t bytes) {
        for (uint32_t at = threadIdx.x % kWarpThreads * 16; at < bytes; at += kWarpThreads * 16)
          kv::copy_async(reinterpret_cast<uint4*>(target + at), source + at);
      };
      for_pieces(pool, spans->record, [&](uint32_t offset, const uint8_t* source, uint32_t bytes) {
        copy(slot + kParamsBytes + offset, source, bytes);
      });
      for_pieces(pool, spans->params, [&](uint32_t offset, const uint8_t* source, uint32_t bytes) {
        copy(slot + offset, source, bytes);
      });
    }
    kv::copy_commit();
#endif
  }

  __device__ __forceinline__ void wait(uint32_t stage, uint32_t phase) const {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n .reg .pred done;\n"
        "again_%=:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        " @done bra.uni ready_%=;\n bra.uni again_%=;\nready_%=:\n}" ::"r"(shared_address(barriers + stage)),
        "r"(phase)
        : "memory");
#else
    if (stages == kStages) asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1) : "memory");
    else kv::copy_wait();
    __syncwarp();
#endif
  }
};

// ---- columns ----

// The columns of a thread block: query token column / group of the sequence, head column % group of the kv head's group.
struct Columns {
  const uint8_t* queries;  // of the sequence's first token in the step and the group's first head
  uint32_t first, count;   // columns of this thread block
  uint32_t group;          // query heads of a kv head
  uint64_t token_stride;   // values from one token to the next

  __device__ __forceinline__ uint64_t position(uint32_t column, uint32_t head_dim) const {
    return (first + column) / group * token_stride + (first + column) % group * head_dim;
  }
};

template <bool kBfloat>
__device__ __forceinline__ void store_value(uint8_t* out, uint64_t position, float value) {
  if constexpr (kBfloat) reinterpret_cast<__nv_bfloat16*>(out)[position] = __float2bfloat16_rn(value);
  else reinterpret_cast<__half*>(out)[position] = __float2half_rn(value);
}

// Queries as B fragments in 16-bit fixed point; columns past the last are 0.
template <int kDim, int kTiles, bool kBfloat>
__device__ __forceinline__ void begin_state(const Columns& columns, float scale,
                                            WarpState<kDim, kTiles>& state) {
  const uint32_t lane = threadIdx.x % kWarpThreads, g = lane / 4, i = lane % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const uint32_t column = 4 * n + g / 2;
    const bool present = column < columns.count;
    const uint8_t* query = columns.queries + 2 * columns.position(present ? column : 0, kDim);
    // Channels 16 * x + 4 * i + 0..3.
    const auto load = [&](int x) {
      return present ? *reinterpret_cast<const uint2*>(query + 2 * (16 * x + 4 * i)) : make_uint2(0, 0);
    };
    float largest = 0.0f;
#pragma unroll
    for (int x = 0; x < kDim / 16; ++x) {
      const uint2 pairs = load(x);
      const float2 a = to_floats<kBfloat>(pairs.x), b = to_floats<kBfloat>(pairs.y);
      largest = fmaxf(largest, fmaxf(fmaxf(fabsf(a.x), fabsf(a.y)), fmaxf(fabsf(b.x), fabsf(b.y))));
    }
    largest = fmaxf(largest, __shfl_xor_sync(kEveryLane, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kEveryLane, largest, 2));
    const float to_fixed = largest > 0.0f ? kLargestFixed / largest : 0.0f;
    float sum = 0.0f;
#pragma unroll
    for (int x = 0; x < kDim / 16; ++x) {
      const uint2 pairs = load(x);
      const float2 a = to_floats<kBfloat>(pairs.x), b = to_floats<kBfloat>(pairs.y);
      const float values[4] = {a.x, a.y, b.x, b.y};
      uint32_t fixed[4], high, low;
#pragma unroll
      for (int byte = 0; byte < 4; ++byte) {
        const float y = __fmaf_rn(values[byte], to_fixed, kFixedMagic);
        sum += y - kFixedMagic;
        fixed[byte] = __float_as_uint(y);
      }
      split_fixed(fixed, high, low);
      state.queries[n][x] = g % 2 == 1 ? low : high;
    }
    sum += __shfl_xor_sync(kEveryLane, sum, 1);
    sum += __shfl_xor_sync(kEveryLane, sum, 2);
    // From the B fragment's columns g to the C fragment's i.
    state.query_sum[n] = __shfl_sync(kEveryLane, sum, 8 * i);
    state.query_scale[n] = __shfl_sync(kEveryLane, largest * (1.0f / kLargestFixed) * scale * kLog2E, 8 * i);
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
  float out[kWarps][kColumns][kStride];
  PartSum sums[kWarps][kColumns];
};

// Leaves each warp's result in shared memory, whatever else was there.
template <int kDim, int kTiles>
__device__ __forceinline__ void leave_results(const WarpState<kDim, kTiles>& state, uint8_t* dynamic) {
  const uint32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads, g = lane / 4,
                 i = lane % 4;
  __syncthreads();
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

// The packed blocks of a piece: warps take them in turn. Leaves each warp's result in shared memory.
template <int kDim, int kTiles, bool kBfloat, bool kWide>
__device__ __forceinline__ void packed_piece(const CacheView& cache, const TileLayout& layout,
                                             uint32_t slot_bytes, uint32_t stages, const uint32_t* index,
                                             const uint32_t* page_table, const StepPiece& piece,
                                             uint32_t head, const Columns& columns, float scale,
                                             uint8_t* dynamic, TileSpans (*spans)[kWarpBlocks],
                                             uint64_t (*barriers)[kStages]) {
  const uint32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  const uint32_t count = piece.count > warp ? (piece.count - warp + kWarps - 1) / kWarps : 0;
  if (lane < count) {
    const kv::RecordSpan span = kv::record_span(cache, index, piece.first + warp + kWarps * lane, head);
    spans[warp][lane] = {make_span(page_table, span.params, span.params + kv::kParamsUnits),
                         make_span(page_table, span.begin, span.end)};
  }
  const Ring ring = {dynamic + warp * stages * slot_bytes, slot_bytes, stages, barriers[warp]};
  ring.begin();
  __syncwarp();
  for (uint32_t stage = 0; stage < stages; ++stage)
    ring.fetch(cache.pool, stage < count ? &spans[warp][stage] : nullptr, stage);

  WarpState<kDim, kTiles> state;
  begin_state<kDim, kTiles, kBfloat>(columns, scale, state);
  uint32_t stage = 0, phase = 0;
#pragma unroll 1
  for (uint32_t at = 0; at < count; ++at) {
    ring.wait(stage, phase);
    const uint8_t* slot = ring.slots + stage * slot_bytes;
    const Tile tile = {slot, slot + kParamsBytes};
    uint2 widths = *reinterpret_cast<const uint2*>(tile.record);
    // The same in every lane: the shuffle tells the compiler.
    widths.x = __shfl_sync(kEveryLane, widths.x, 0);
    widths.y = __shfl_sync(kEveryLane, widths.y, 0);
    float scores[kTiles][8], units[kTiles];
    uint32_t weights[kTiles][4];
    tile_scores<kDim, kTiles, kBfloat, kWide>(tile, layout, widths.x, state, scores);
    tile_weights<kDim, kTiles, kBfloat>(tile, state, scores, weights, units);
    tile_values<kDim, kTiles, kWide>(tile, layout, layout.groups + kv::kGroupBytes * kv::width_sum(widths.x),
                                     widths.y, state, weights, units);
    __syncwarp();
    ring.fetch(cache.pool, at + stages < count ? &spans[warp][at + stages] : nullptr, stage);
    if (++stage == stages) stage = 0, phase ^= 1;
  }

  leave_results<kDim, kTiles>(state, dynamic);
}

// What kernels are for: layers of packkv and fixed, with residuals of up to 4 bits or more; of raw16; of any mixture.
enum class Flavour { kNarrow, kWide, kRaw16, kMixed };

// For parts that take the queries in 16 bits: a state without those in fixed point.
template <int kDim, int kTiles>
__device__ __forceinline__ void begin_plain_state(float scale, WarpState<kDim, kTiles>& state) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int x = 0; x < kDim / 16; ++x) state.queries[n][x] = 0;
    state.query_sum[n] = 0.0f;
    state.query_scale[n] = scale * kLog2E;
    state.reference[n] = -1e30f;
    state.sum[n] = state.zeros[n] = 0.0f;
#pragma unroll
    for (int o = 0; o < kDim / 8; ++o) state.out[n][o] = 0.0f;
  }
}

// All threads call it; the queries are there once it returns.
template <int kDim, int kTiles>
__device__ __forceinline__ void share_queries(const Columns& columns, SharedQueries<kDim, kTiles>& queries) {
  constexpr uint32_t kPairs = kDim / 2;
  for (uint32_t at = threadIdx.x; at < SharedQueries<kDim, kTiles>::kColumns * kPairs; at += kThreads) {
    const uint32_t column = at / kPairs, channel = 2 * (at % kPairs);
    const bool present = column < columns.count;
    const uint8_t* source = columns.queries + 2 * (columns.position(present ? column : 0, kDim) + channel);
    *reinterpret_cast<uint32_t*>(&queries.values[column][channel]) =
        present ? *reinterpret_cast<const uint32_t*>(source) : 0;
  }
  __syncthreads();
}

// The packed blocks of a piece whose parts are both raw16: warps take them in turn, and fragments of the next block are
// under way before one is done. Leaves each warp's result in shared memory.
template <int kDim, int kTiles, bool kBfloat>
__device__ __forceinline__ void raw_piece(const CacheView& cache, const uint32_t* index,
                                          const uint32_t* page_table, const StepPiece& piece, uint32_t head,
                                          const Columns& columns, float scale, uint8_t* dynamic) {
  const uint32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  const uint32_t count = piece.count > warp ? (piece.count - warp + kWarps - 1) / kWarps : 0;
  RawValues found{};
  if (lane < count) {
    const uint32_t end = kv::record_span(cache, index, piece.first + warp + kWarps * lane, head, 0).end;
    found.find(page_table, end, kv::kParts * kDim * kv::kRawChannelBytes / kUnitBytes);
  }
  SharedQueries<kDim, kTiles>& queries = *reinterpret_cast<SharedQueries<kDim, kTiles>*>(dynamic);
  share_queries(columns, queries);
  WarpState<kDim, kTiles> state;
  begin_plain_state(scale, state);
  RawValues raw = found.of(0);
  uint4 held[kAhead] = {};
  if (count > 0) {
#pragma unroll
    for (int f = 0; f < kAhead; ++f) held[f] = raw.load(cache.pool, f);
  }
#pragma unroll 1
  for (uint32_t at = 0; at < count; ++at) {
    float scores[kTiles][8], factors[kTiles];
    uint32_t weights[kTiles][8];
    // The fragments of the values follow those of the keys.
    raw_scores<kDim, kTiles, kBfloat>(held, queries, scores, [&](int f) { return raw.load(cache.pool, f); });
    softmax_step(state, scores, factors, [](int, float) {});
    raw_weights<kTiles, kBfloat>(scores, weights);
    const bool is_last = at + 1 == count;
    const RawValues next = found.of(is_last ? at : at + 1);
    raw_values<kDim, kTiles, kBfloat>(held, state, weights, factors, [&](int f) {
      if (f < kPartFragments<kDim>) return raw.load(cache.pool, kPartFragments<kDim> + f);
      return is_last ? make_uint4(0, 0, 0, 0) : next.load(cache.pool, f - kPartFragments<kDim>);
    });
    raw = next;
  }
  leave_results<kDim, kTiles>(state, dynamic);
}

// The packed blocks of a piece of any other mixture. What a record has before its 16-bit values comes through the ring,
// with the block's params, if it has any.
template <int kDim, int kTiles, bool kBfloat>
__device__ __forceinline__ void mixed_piece(const CacheView& cache, const kv::TileShape& shape,
                                            const TileLayout& layout, uint32_t slot_bytes, uint32_t stages,
                                            const uint32_t* index, const uint32_t* page_table,
                                            const StepPiece& piece, uint32_t head, const Columns& columns,
                                            float scale, uint8_t* dynamic, TileSpans (*spans)[kWarpBlocks],
                                            uint64_t (*barriers)[kStages]) {
  const kv::TilePart &key_part = shape.parts[PH_KV_KEYS], &value_part = shape.parts[PH_KV_VALUES];
  const uint32_t params_units = kv::params_bytes(shape) / kUnitBytes;
  const uint32_t raw_units = kv::raw_bytes(shape) / kUnitBytes;
  const uint32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  const uint32_t count = piece.count > warp ? (piece.count - warp + kWarps - 1) / kWarps : 0;
  RawValues found{};
  if (lane < count) {
    const kv::RecordSpan record =
        kv::record_span(cache, index, piece.first + warp + kWarps * lane, head, params_units);
    // Without params, the ring has the record's header in their place: it takes no empty spans.
    const uint32_t params = params_units > 0 ? record.params : record.begin;
    spans[warp][lane] = {make_span(page_table, params, params + max(params_units, 1u)),
                         make_span(page_table, record.begin, record.end - raw_units)};
    if (raw_units > 0) found.find(page_table, record.end, raw_units);
  }
  const Ring ring = {dynamic + warp * stages * slot_bytes, slot_bytes, stages, barriers[warp]};
  ring.begin();
  __syncwarp();
  for (uint32_t stage = 0; stage < stages; ++stage)
    ring.fetch(cache.pool, stage < count ? &spans[warp][stage] : nullptr, stage);

  SharedQueries<kDim, kTiles>& queries =
      *reinterpret_cast<SharedQueries<kDim, kTiles>*>(dynamic + kWarps * stages * slot_bytes);
  share_queries(columns, queries);
  WarpState<kDim, kTiles> state;
  if (kv::is_per_token(key_part)) begin_state<kDim, kTiles, kBfloat>(columns, scale, state);
  else begin_plain_state(scale, state);
  float group_zeros[kTiles][kValueGroups<kDim>] = {};
  uint32_t stage = 0, phase = 0;
#pragma unroll 1
  for (uint32_t at = 0; at < count; ++at) {
    const RawValues raw = found.of(at);
    const auto load = [&](int f) {
      return f < kPartFragments<kDim> ? raw.load(cache.pool, f) : make_uint4(0, 0, 0, 0);
    };
    uint4 held[kAhead];
    if (raw_units > 0) {
#pragma unroll
      for (int f = 0; f < kAhead; ++f) held[f] = load(f);
    }
    ring.wait(stage, phase);
    const uint8_t* slot = ring.slots + stage * slot_bytes;
    const Tile tile = {slot, slot + kParamsBytes};
    uint2 widths = *reinterpret_cast<const uint2*>(tile.record);
    // The same in every lane: the shuffle tells the compiler.
    widths.x = __shfl_sync(kEveryLane, widths.x, 0);
    widths.y = __shfl_sync(kEveryLane, widths.y, 0);
    const uint8_t* key_groups = tile.record + layout.groups;
    const uint32_t value_groups = layout.groups + kv::kGroupBytes * kv::width_sum(widths.x);

    float scores[kTiles][8], factors[kTiles];
    if (kv::is_raw16(key_part)) {
      raw_scores<kDim, kTiles, kBfloat>(held, queries, scores, load);
    } else if (kv::is_kivi(key_part)) {
      kivi_scores<kDim, kTiles, kBfloat>(tile.record + kv::kTileHeaderBytes, key_groups, key_part.width,
                                         queries, scores);
    } else {
      tile_scores<kDim, kTiles, kBfloat, true>(tile, layout, widths.x, state, scores);
    }
    if (kv::is_per_token(value_part)) {
      uint32_t weights[kTiles][4];
      tile_weights<kDim, kTiles, kBfloat>(tile, state, scores, weights, factors);
      tile_values<kDim, kTiles, true>(tile, layout, value_groups, widths.y, state, weights, factors);
    } else {
      softmax_step(state, scores, factors, [&](int n, float factor) {
#pragma unroll
        for (int group = 0; group < kValueGroups<kDim>; ++group) group_zeros[n][group] *= factor;
      });
      if (kv::is_raw16(value_part)) {
        uint32_t weights[kTiles][8];
        raw_weights<kTiles, kBfloat>(scores, weights);
        raw_values<kDim, kTiles, kBfloat>(held, state, weights, factors, load);
      } else {
        kivi_values<kDim, kTiles, kBfloat>(tile.record + layout.value_bases, tile.record + value_groups,
                                           value_part.width, scores, factors, state, group_zeros);
      }
    }
    __syncwarp();
    ring.fetch(cache.pool, at + stages < count ? &spans[warp][at + stages] : nullptr, stage);
    if (++stage == stages) stage = 0, phase ^= 1;
  }

#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int group = 0; group < kValueGroups<kDim>; ++group) {
      for (int distance = 4; distance < kWarpThreads; distance *= 2)
        group_zeros[n][group] += __shfl_xor_sync(kEveryLane, group_zeros[n][group], distance);
    }
#pragma unroll
    for (int o = 0; o < kDim / 8; ++o)
      state.out[n][o] += group_zeros[n][o / static_cast<int>(kv::kGroupChannels / 8)];
  }
  leave_results<kDim, kTiles>(state, dynamic);
}

// The sinks and the tokens after the last packed block, kThreads at a time: a thread per token for the scores, then a
// thread per pair of channels. Leaves one result per token group in `shared`, of which there are kDim / 2 threads each.
template <int kDim, int kTiles, bool kBfloat>
struct RecentShared {
  static constexpr int kColumns = 4 * kTiles;
  float queries[kColumns][kDim];
  float probabilities[kRecentTokens][kColumns];
  float highest[kWarps][kColumns];
  uint32_t slots[kRecentTokens];  // where the tokens are among the recent ones
};

template <int kDim, int kTiles, bool kBfloat>
__device__ __forceinline__ void recent_piece(const CacheView& cache, uint32_t layer,
                                             const StepSequence& entry, uint32_t head, const Columns& columns,
                                             float scale, uint8_t* dynamic) {
  constexpr int kColumns = 4 * kTiles, kPairs = kDim / 2, kTeams = kThreads / kPairs;
  static_assert(kTeams >= 1 && kTeams <= kWarps);
  RecentShared<kDim, kTiles, kBfloat>& shared =
      *reinterpret_cast<RecentShared<kDim, kTiles, kBfloat>*>(dynamic);
  const uint32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  const uint64_t row_bytes = static_cast<uint64_t>(cache.heads) * kDim * 2;
  const uint8_t* keys =
      cache.recent + kv::stream_of(cache, layer, entry.sequence) * kv::kParts * kv::recent_part_bytes(cache) +
      static_cast<uint64_t>(head) * kDim * 2;
  const uint8_t* values = keys + kv::recent_part_bytes(cache);

  const uint64_t length = entry.before + entry.tokens;
  const uint64_t sinks = min(static_cast<uint64_t>(cache.sinks), length);
  const uint64_t tail = cache.sinks + static_cast<uint64_t>(entry.packed) * kBlockTokens;
  const uint32_t count = static_cast<uint32_t>(sinks + (length > tail ? length - tail : 0));
  const auto token_at = [&](uint32_t at) { return at < sinks ? at : tail + (at - sinks); };

  for (uint32_t at = threadIdx.x; at < kColumns * kDim; at += kThreads) {
    const uint32_t column = at / kDim, channel = at % kDim;
    float value = 0.0f;
    if (column < columns.count) {
      const uint64_t position = columns.position(column, kDim) + channel;
      const uint16_t bits = reinterpret_cast<const uint16_t*>(columns.queries)[position];
      value = kBfloat ? bf16_to_float(bits) : __half2float(__ushort_as_half(bits));
    }
    shared.queries[column][channel] = value * (scale * kLog2E);
  }
  float reference[kColumns], sum[kColumns];
  float2 out[kColumns];
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    reference[column] = -1e30f;
    sum[column] = 0.0f;
    out[column] = make_float2(0.0f, 0.0f);
  }
  const uint32_t team = threadIdx.x / kPairs, pair = threadIdx.x % kPairs;
  __syncthreads();

#pragma unroll 1
  for (uint32_t begin = 0; begin < count; begin += kRecentTokens) {
    const uint32_t at = begin + threadIdx.x;
    float scores[kColumns];
#pragma unroll
    for (int column = 0; column < kColumns; ++column) scores[column] = 0.0f;
    if (at < count) {
      const uint64_t token = token_at(at);
      const uint32_t slot = kv::recent_slot(cache, token);
      shared.slots[threadIdx.x] = slot;
      const uint8_t* key = keys + slot * row_bytes;
#pragma unroll 4
      for (int channel = 0; channel < kDim; channel += 8) {
        const uint4 words = *reinterpret_cast<const uint4*>(key + 2 * channel);
        const float2 a = to_floats<kBfloat>(words.x), b = to_floats<kBfloat>(words.y),
                     c = to_floats<kBfloat>(words.z), d = to_floats<kBfloat>(words.w);
#pragma unroll
        for (int column = 0; column < kColumns; ++column) {
          const float4 low = *reinterpret_cast<const float4*>(&shared.queries[column][channel]);
          const float4 high = *reinterpret_cast<const float4*>(&shared.queries[column][channel + 4]);
          float score = scores[column];
          score = __fmaf_rn(a.x, low.x, score);
          score = __fmaf_rn(a.y, low.y, score);
          score = __fmaf_rn(b.x, low.z, score);
          score = __fmaf_rn(b.y, low.w, score);
          score = __fmaf_rn(c.x, high.x, score);
          score = __fmaf_rn(c.y, high.y, score);
          score = __fmaf_rn(d.x, high.z, score);
          scores[column] = __fmaf_rn(d.y, high.w, score);
        }
      }
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        // A query token sees those before it, and itself.
        if (token > entry.before + (columns.first + column) / columns.group) scores[column] = -INFINITY;
      }
    } else {
#pragma unroll
      for (int column = 0; column < kColumns; ++column) scores[column] = -INFINITY;
    }
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      float most = scores[column];
      for (int distance = 1; distance < kWarpThreads; distance *= 2)
        most = fmaxf(most, __shfl_xor_sync(kEveryLane, most, distance));
      if (lane == 0) shared.highest[warp][column] = most;
    }
    __syncthreads();
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      float next = reference[column];
#pragma unroll
      for (int other = 0; other < kWarps; ++other) next = fmaxf(next, shared.highest[other][column]);
      const float factor = exponential(reference[column] - next);
      reference[column] = next;
      sum[column] *= factor;
      out[column].x *= factor;
      out[column].y *= factor;
      shared.probabilities[threadIdx.x][column] = exponential(scores[column] - next);
    }
    __syncthreads();
    const uint32_t present = min(kRecentTokens, count - begin);
    if (team < kTeams) {
#pragma unroll 8
      for (uint32_t other = team; other < present; other += kTeams) {
        const uint8_t* value = values + shared.slots[other] * row_bytes;
        const float2 v = to_floats<kBfloat>(*reinterpret_cast<const uint32_t*>(value + 4 * pair));
#pragma unroll
        for (int column = 0; column < kColumns; ++column) {
          const float probability = shared.probabilities[other][column];
          sum[column] += probability;
          out[column].x = __fmaf_rn(v.x, probability, out[column].x);
          out[column].y = __fmaf_rn(v.y, probability, out[column].y);
        }
      }
    }
    __syncthreads();
  }

  PieceShared<kDim, kTiles>& result = *reinterpret_cast<PieceShared<kDim, kTiles>*>(dynamic);
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    if (team < kTeams) {
      result.out[team][column][2 * pair] = out[column].x;
      result.out[team][column][2 * pair + 1] = out[column].y;
      if (pair == 0) result.sums[team][column] = {reference[column], sum[column]};
    }
    // Parts that no team has.
    if (threadIdx.x >= kTeams && threadIdx.x < kWarps) result.sums[threadIdx.x][column] = {-1e30f, 0.0f};
  }
  if constexpr (kTeams < kWarps) {
    for (uint32_t at = threadIdx.x; at < (kWarps - kTeams) * kColumns * kDim; at += kThreads)
      result.out[kTeams + at / (kColumns * kDim)][at / kDim % kColumns][at % kDim] = 0.0f;
  }
  __syncthreads();
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
  uint32_t layer, slot_bytes, stages;
  float scale;
};

template <int kDim, int kTiles, bool kBfloat, Flavour kFlavour>
__global__ void __launch_bounds__(kThreads, kFlavour == Flavour::kMixed ? 2
                                            : kTiles * kDim <= 128      ? 4
                                            : kTiles * kDim <= 256      ? 3
                                                                        : 2)
    DecodeKernel(const __grid_constant__ DecodeParameters parameters) {
  constexpr int kColumns = 4 * kTiles;
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ TileSpans spans[kWarps][kWarpBlocks];
  __shared__ uint64_t barriers[kWarps][kStages];
  __shared__ uint32_t is_last;
  const CacheView& cache = parameters.cache;
  const StepPiece piece = parameters.step.pieces[blockIdx.x];
  const StepSequence entry = parameters.step.sequences[piece.entry];
  const uint32_t head = blockIdx.y, group = cache.query_heads / cache.heads;
  const uint32_t first = blockIdx.z * kColumns;
  if (first >= entry.tokens * group) return;
  const uint64_t row = (static_cast<uint64_t>(entry.input) * cache.query_heads + head * group) * kDim;
  const Columns columns = {parameters.queries + 2 * row, first,
                           min(static_cast<uint32_t>(kColumns), entry.tokens * group - first), group,
                           static_cast<uint64_t>(cache.query_heads) * kDim};

  if (piece.count > 0) {
    const uint32_t* index = kv::index_of(cache, parameters.layer, entry.sequence);
    const uint32_t* page_table = kv::page_table_of(cache, parameters.layer, entry.sequence);
    if constexpr (kFlavour == Flavour::kRaw16) {
      raw_piece<kDim, kTiles, kBfloat>(cache, index, page_table, piece, head, columns, parameters.scale,
                                       dynamic);
    } else if constexpr (kFlavour == Flavour::kMixed) {
      mixed_piece<kDim, kTiles, kBfloat>(cache, parameters.shape, parameters.layout, parameters.slot_bytes,
                                         parameters.stages, index, page_table, piece, head, columns,
                                         parameters.scale, dynamic, spans, barriers);
    } else {
      packed_piece<kDim, kTiles, kBfloat, kFlavour == Flavour::kWide>(
          cache, parameters.layout, parameters.slot_bytes, parameters.stages, index, page_table, piece, head,
          columns, parameters.scale, dynamic, spans, barriers);
    }
  } else {
    recent_piece<kDim, kTiles, kBfloat>(cache, parameters.layer, entry, head, columns, parameters.scale,
                                        dynamic);
  }

  const PieceShared<kDim, kTiles>& shared = *reinterpret_cast<const PieceShared<kDim, kTiles>*>(dynamic);
  uint8_t* out = parameters.out + 2 * row;
  const Partials& partials = parameters.partials;
  for (uint32_t at = threadIdx.x; at < columns.count * kDim; at += kThreads) {
    const uint32_t column = at / kDim, channel = at % kDim;
    float most = shared.sums[0][column].reference;
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) most = fmaxf(most, shared.sums[warp][column].reference);
    float value = 0.0f, sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
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
  __threadfence();
  __syncthreads();
  uint32_t* finished =
      partials.finished + (static_cast<uint64_t>(piece.entry) * cache.heads + head) * gridDim.z + blockIdx.z;
  if (threadIdx.x == 0) is_last = atomicAdd(finished, 1u) == piece.pieces - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  const uint64_t stride = static_cast<uint64_t>(cache.heads) * partials.columns;
  const uint64_t start =
      (static_cast<uint64_t>(blockIdx.x - piece.place) * cache.heads + head) * partials.columns + first;
  for (uint32_t at = threadIdx.x; at < columns.count * kDim / 4; at += kThreads) {
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
  // Column groups of at least four.
  layout.sums = aligned(static_cast<uint64_t>(cache.sequences) * cache.heads * ((most_columns + 3) / 4) *
                        sizeof(uint32_t));
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

// Of params, and of a record up to its 16-bit values.
uint32_t slot_bytes(const kv::TileShape& shape) {
  return (kParamsBytes + kv::largest_record_bytes(shape) - kv::raw_bytes(shape) + 127) / 128 * 128;
}

// Tiles ahead that fit the shared memory of a thread block; throws if not even one does.
uint32_t stages_of(const ph_device& device, const kv::TileShape& shape) {
  constexpr uint32_t kFixedBytes = 4096;  // static shared memory of the kernels, at most
  const uint32_t limit = static_cast<uint32_t>(device.shared_bytes) - kFixedBytes;
  for (uint32_t stages = kStages; stages > 0; --stages) {
    if (kWarps * stages * slot_bytes(shape) <= limit) return stages;
  }
  throw Error(
      PH_ERROR_UNSUPPORTED,
      "Cannot attend to packed records of up to %u bytes on this GPU: that takes %u bytes of shared memory, "
      "and a thread block has %u",
      kv::largest_record_bytes(shape), kWarps * slot_bytes(shape), limit);
}

struct Launch {
  uint32_t columns;  // of a thread block
  uint32_t stages, shared_bytes;
};

// Calls use(kernel, launch) for what suits so many columns of a kv head.
template <typename Use>
void with_kernel(const ph_device& device, const CacheView& cache, const kv::TileShape& shape,
                 uint32_t columns, Use use) {
  dispatch_dim(cache.head_dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    const auto with = [&](auto tiles, auto bfloat, auto flavour) {
      constexpr int kTiles = decltype(tiles)::value;
      constexpr bool kBfloat = decltype(bfloat)::value;
      constexpr Flavour kFlavour = decltype(flavour)::value;
      const uint32_t stages = kFlavour == Flavour::kRaw16 ? 0 : stages_of(device, shape);
      uint32_t packed_bytes = kWarps * stages * slot_bytes(shape);
      if (kFlavour == Flavour::kRaw16 || kFlavour == Flavour::kMixed)
        packed_bytes += static_cast<uint32_t>(sizeof(SharedQueries<kDim, kTiles>));
      const uint32_t shared_bytes =
          std::max<uint32_t>({packed_bytes, static_cast<uint32_t>(sizeof(PieceShared<kDim, kTiles>)),
                              static_cast<uint32_t>(sizeof(RecentShared<kDim, kTiles, kBfloat>))});
      use(DecodeKernel<kDim, kTiles, kBfloat, kFlavour>, Launch{4u * kTiles, stages, shared_bytes});
    };
    const auto with_type = [&](auto tiles, auto flavour) {
      if (cache.dtype == PH_BF16) with(tiles, std::true_type{}, flavour);
      else with(tiles, std::false_type{}, flavour);
    };
    const auto with_flavour = [&](auto tiles) {
      const kv::TilePart &keys = shape.parts[0], &values = shape.parts[1];
      if (kv::is_raw16(keys) && kv::is_raw16(values)) {
        with_type(tiles, std::integral_constant<Flavour, Flavour::kRaw16>{});
      } else if (!kv::is_per_token(keys) || !kv::is_per_token(values)) {
        with_type(tiles, std::integral_constant<Flavour, Flavour::kMixed>{});
      } else if (std::max(kv::largest_width(keys), kv::largest_width(values)) > 4) {
        with_type(tiles, std::integral_constant<Flavour, Flavour::kWide>{});
      } else {
        with_type(tiles, std::integral_constant<Flavour, Flavour::kNarrow>{});
      }
    };
    // One tile of four columns leaves more registers to wide heads.
    if constexpr (kDim < 256) {
      if (columns > 4) return with_flavour(std::integral_constant<int, 2>{});
    }
    with_flavour(std::integral_constant<int, 1>{});
  });
}

}  // namespace

uint64_t decode_workspace_bytes(const CacheView& cache, uint64_t pieces) {
  return workspace_layout(cache, pieces).bytes;
}

uint32_t resident_pieces(ph_device& device, const CacheView& cache, const kv::TileShape& shape) {
  int resident = 0;
  with_kernel(device, cache, shape, cache.query_heads / cache.heads, [&](auto kernel, const Launch& launch) {
    allow_shared(device, kernel);
    PH_CUDA_TRY(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, launch.shared_bytes));
  });
  return static_cast<uint32_t>(resident);
}

void decode(ph_device& device, const CacheView& cache, const kv::TileShape& shape, uint32_t layer,
            const StepView& step, const uint8_t* queries, uint8_t* out, float scale, uint8_t* workspace) {
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
  with_kernel(device, cache, shape, columns, [&](auto kernel, const Launch& launch) {
    allow_shared(device, kernel);
    PH_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100));
    parameters.stages = launch.stages;
    const dim3 grid(step.piece_count, cache.heads, (columns + launch.columns - 1) / launch.columns);
    kernel<<<grid, kThreads, launch.shared_bytes, device.stream>>>(parameters);
  });
  PH_CUDA_TRY(cudaGetLastError());
}

}  // namespace ph::attention
