// Appending to the growing kv cache on the GPU: packing a step's blocks as tiles, and keeping its newest tokens.
//
// A step that packs nothing runs CopyKernel only, which copies tokens to their places in 16 bits, a thread block each.
// A step that packs runs one kernel too, on GPUs with clusters and for up to 32 kv heads (see there):
// append_cluster.cu. Otherwise it runs three, one after another on the device's stream:
//   ParamsKernel   a thread block per block of 64 tokens, a warp per token: extremes over all heads and
//                  channels, scales and zero points. They go to the workspace; the block's index entries
//                  become "not known yet".
//   TileKernel     a thread block per (block, head): quantises and packs (tile_pack.cuh), which tells the size of its
//                  record; sums the sizes of the records before it in the index, and writes its own to the stream.
//   CopyKernel     last, as packing reads what it replaces.
//
// Tokens, records and the workspace begin at multiples of 16 bytes. Bytes moved: a packed value is read
// twice, 2 bytes each, and its width in bits (plus 1/64 base) is written once, in 16-byte words, or 8-byte
// halves of them for the odd bit of a width; a token that stays is read and written once.
//
// Kernels with kMixed serve layers of which a part is kivi or raw16. TileKernel then finds kivi's scales itself, reading
// the head's values once more, and copies raw16's from the tokens to the stream, in 16-byte words too.
//
// Deterministic, and the same bytes as on the CPU: thread blocks wait for the sizes of earlier records, and
// where a record begins does not depend on the order in which they run. Thread blocks take their records in
// ascending order, by a ticket, and make a size known before they wait, so that every wait ends.
#include <algorithm>

#include "kv/append.cuh"
#include "kv/tile_pack.cuh"

namespace ph::kv {

namespace {

constexpr int kParamsThreads = 512;
constexpr int kParamsWarps = kParamsThreads / kWarpThreads;
constexpr int kCopyThreads = 256;
static_assert(kTileThreads >= kParts * kBlockTokens && kTileThreads >= kMostScales &&
              kParamsThreads >= kParts * kBlockTokens);

// ---- params ----

// What ParamsKernel hands to TileKernel: workspace_bytes.
struct Workspace {
  uint8_t* params;       // [blocks][kParamsBytes]
  uint64_t* non_finite;  // [blocks]: a bit for each token with a value that is not finite
  uint32_t* ticket;      // records taken
};

uint64_t workspace_bytes(uint64_t blocks) {
  return blocks * (kParamsBytes + sizeof(uint64_t)) + sizeof(uint32_t);
}

Workspace workspace_of(uint8_t* memory, uint64_t blocks) {
  uint8_t* non_finite = memory + blocks * kParamsBytes;
  return {memory, reinterpret_cast<uint64_t*>(non_finite),
          reinterpret_cast<uint32_t*>(non_finite + blocks * sizeof(uint64_t))};
}

struct PackParameters {
  AppendParameters append;
  Workspace workspace;
};

struct ParamsShared {
  float minima[kParts][kBlockTokens], maxima[kParts][kBlockTokens];
  alignas(16) uint16_t affines[kLargestScalePosition / 2];  // the params record up to the largest scale
  uint32_t largest[2];                                      // value scale of half of the tokens, as bits
  uint32_t non_finite[2];                                   // a bit per token
};

template <typename Element, bool kMixed>
__global__ void __launch_bounds__(kParamsThreads, 2)
    ParamsKernel(const __grid_constant__ PackParameters parameters) {
  using Vector = typename Element::Vector;
  __shared__ ParamsShared shared;
  const auto& [cache, shape, step, tensors, layer, non_finite] = parameters.append;
  const Workspace& workspace = parameters.workspace;
  const uint32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  // The plan was there before the kernel that precedes this one in the stream.
  const StepBlock place = step.blocks[blockIdx.x];
  const StepSequence sequence = step.sequences[place.entry];
  const uint64_t start = block_start(cache, place.block);
  const uint32_t vectors = cache.heads * cache.head_dim / kVectorValues;
  uint32_t* ends = index_of(cache, layer, sequence.sequence) + place.block * cache.heads + 1;
  await_preceding();
  for (uint32_t head = threadIdx.x; head < cache.heads; head += kParamsThreads) ends[head] = 0;
  if (blockIdx.x == 0 && threadIdx.x == 0) *workspace.ticket = 0;
  if (threadIdx.x < 2) shared.non_finite[threadIdx.x] = 0;
  __syncthreads();
  // Raw values may be anything.
  const bool is_read[kParts] = {!kMixed || !is_raw16(shape.parts[0]), !kMixed || !is_raw16(shape.parts[1])};

  for (uint32_t token = warp; token < kBlockTokens; token += kParamsWarps) {
    const uint8_t* rows[kParts];
    typename Vector::Extremes extremes[kParts];
#pragma unroll
    for (uint32_t part = 0; part < kParts; ++part) {
      rows[part] = token_row(cache, layer, sequence, tensors, part, start + token);
    }
    // Keys and values together, for more loads in flight.
    for (uint32_t first = lane; first < vectors; first += kHeld * kWarpThreads) {
      Vector held[kParts][kHeld];
#pragma unroll
      for (uint32_t part = 0; part < kParts; ++part) {
#pragma unroll
        for (uint32_t i = 0; i < kHeld; ++i) {
          const uint32_t vector = first + kWarpThreads * i;
          if (vector < vectors && is_read[part]) held[part][i].load(rows[part] + vector * kVectorBytes);
        }
      }
#pragma unroll
      for (uint32_t part = 0; part < kParts; ++part) {
#pragma unroll
        for (uint32_t i = 0; i < kHeld; ++i) {
          if (first + kWarpThreads * i < vectors && is_read[part]) extremes[part].add(held[part][i]);
        }
      }
    }
#pragma unroll
    for (uint32_t part = 0; part < kParts; ++part) {
      float minimum, maximum;
      extremes[part].finish(minimum, maximum);
      reduce_warp_extremes(minimum, maximum);
      if (minimum == -INFINITY || maximum == INFINITY) {
        typename Vector::Extremes finite;
        for (uint32_t vector = lane; vector < vectors; vector += kWarpThreads) {
          Vector held;
          held.load(rows[part] + vector * kVectorBytes);
          zero_non_finite<Element>(held);
          finite.add(held);
        }
        finite.finish(minimum, maximum);
        reduce_warp_extremes(minimum, maximum);
        if (lane == 0) {
          atomicOr(&shared.non_finite[token / 32], 1u << token % 32);
          atomicMin(non_finite, static_cast<unsigned long long>(sequence.sequence) << 40 | (start + token));
        }
      }
      if (lane == 0) {
        shared.minima[part][token] = minimum;
        shared.maxima[part][token] = maximum;
      }
    }
  }
  __syncthreads();

  if (threadIdx.x < kParts * kBlockTokens) {
    const uint32_t part = threadIdx.x / kBlockTokens, token = threadIdx.x % kBlockTokens;
    const Affine affine =
        !kMixed || is_per_token(shape.parts[part])
            ? tile_affine(shape, part, shared.minima[part][token], shared.maxima[part][token])
            : Affine{0.0f, 0.0f};
    shared.affines[scale_position(part, token) / 2] =
        static_cast<uint16_t>(scale_bits(shape.dtype, affine.scale));
    shared.affines[zero_position(part, token) / 2] = static_cast<uint16_t>(static_cast<int32_t>(affine.zero));
    // Positive floats are in the order of their bits.
    const uint32_t largest = __reduce_max_sync(kEveryLane, float_bits(affine.scale));
    if (part == PH_KV_VALUES && lane == 0) shared.largest[token / kWarpThreads] = largest;
  }
  __syncthreads();
  if (threadIdx.x < kParamsUnits) {
    const uint4 unit = threadIdx.x < kLargestScalePosition / kUnitBytes
                           ? reinterpret_cast<const uint4*>(shared.affines)[threadIdx.x]
                           : make_uint4(max(shared.largest[0], shared.largest[1]), 0, 0, 0);
    reinterpret_cast<uint4*>(workspace.params +
                             static_cast<uint64_t>(blockIdx.x) * kParamsBytes)[threadIdx.x] = unit;
  }
  if (threadIdx.x == 0) {
    workspace.non_finite[blockIdx.x] =
        static_cast<uint64_t>(shared.non_finite[1]) << 32 | shared.non_finite[0];
  }
}

// ---- tiles ----

// That of a token's values, from its params.
__device__ __forceinline__ Quantizer token_quantizer(const TileShape& shape, uint32_t part,
                                                     const uint8_t* params, uint32_t token) {
  const uint16_t scale = *reinterpret_cast<const uint16_t*>(params + scale_position(part, token));
  return make_quantizer(shape.parts[part].code_limit, scale_from_bits(shape.dtype, scale),
                        *reinterpret_cast<const int16_t*>(params + zero_position(part, token)));
}

// Rows anywhere in device memory.
struct TokenRows {
  const uint8_t* const (*rows)[kBlockTokens];

  __device__ __forceinline__ const uint8_t* at(uint32_t part, uint32_t token) const {
    return rows[part][token];
  }
};

template <bool kMixed>
struct RecordShared {
  TileShared<kMixed> tile;
  alignas(16) const uint8_t* rows[kParts][kBlockTokens];  // the head's values of a token
  uint32_t ticket;
  uint32_t begin;     // of the head's record, in units
  uint8_t* pages[3];  // the page of its first unit (of the params, for head 0), and those after it
};

// Makes the size of record `record` known and returns where it begins. For a whole warp. Entry 0 is always known.
__device__ __forceinline__ uint32_t place_record(uint32_t* index, uint32_t record, uint32_t size) {
  const bool is_first = threadIdx.x % kWarpThreads == 0;
  uint32_t* own = index + record + 1;
  if (is_first) store_entry(own, kSizeOnly | size);
  const uint32_t begin = find_begin(own, record + 1, kStreamStart);
  if (is_first) store_entry(own, begin + size);
  return begin;
}

// kRounds: groups of a warp, and its shares of the codes; 2 where the head has more than 128 channels.
template <typename Element, int kRounds, bool kMixed>
__global__ void __launch_bounds__(kTileThreads, 4)
    TileKernel(const __grid_constant__ PackParameters parameters) {
  extern __shared__ uint4 dynamic_shared[];  // codes of keys, of values: 64 * head_dim bytes each
  __shared__ RecordShared<kMixed> shared;
  __shared__ std::conditional_t<kMixed, GroupAffines<>, NoAffines> affines;
  const auto& [cache, shape, step, tensors, layer, first_non_finite] = parameters.append;
  const Workspace& workspace = parameters.workspace;
  uint8_t* const key_codes = reinterpret_cast<uint8_t*>(dynamic_shared);
  uint8_t* const value_codes = key_codes + kBlockTokens * shape.head_dim;
  const uint32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  await_preceding();
  if (threadIdx.x == 0) shared.ticket = atomicAdd(workspace.ticket, 1u);
  if (threadIdx.x < kParts) shared.tile.widths[threadIdx.x] = 0;
  __syncthreads();
  const uint32_t item = shared.ticket / cache.heads, head = shared.ticket % cache.heads;
  const StepBlock place = step.blocks[item];
  const uint8_t* params = workspace.params + static_cast<uint64_t>(item) * kParamsBytes;
  if (threadIdx.x < kParts * kBlockTokens) {
    const uint32_t part = threadIdx.x / kBlockTokens, token = threadIdx.x % kBlockTokens;
    shared.rows[part][token] = token_row(cache, layer, step.sequences[place.entry], tensors, part,
                                         block_start(cache, place.block) + token) +
                               static_cast<uint64_t>(head) * cache.head_dim * 2;
    if (!kMixed || is_per_token(shape.parts[part]))
      shared.tile.quantizers[part][token] = token_quantizer(shape, part, params, token);
  }
  const TokenRows rows = {shared.rows};
  const uint64_t non_finite = workspace.non_finite[item];
  __syncthreads();
  if constexpr (kMixed) {
    for (uint32_t part = 0; part < kParts; ++part) {
      if (is_kivi(shape.parts[part])) make_group_quantizers<Element>(shape, part, rows, shared.tile, affines);
    }
    __syncthreads();
  }
  quantize_head<Element, kRounds, kMixed>(shape, rows, shared.tile, non_finite, key_codes, value_codes);
  __syncthreads();

  uint32_t residuals[kRounds][kRegisters];
  find_residuals<kRounds>(shape, key_codes, value_codes, shared.tile, residuals);
  __syncthreads();

  const uint32_t params_units = head != 0 ? 0 : kMixed ? params_bytes(shape) / kUnitBytes : kParamsUnits;
  const uint32_t record_bytes =
      head_record_bytes(shape, shared.tile.widths[PH_KV_KEYS], shared.tile.widths[PH_KV_VALUES]);
  if (warp == 0) {
    const uint32_t sequence = step.sequences[place.entry].sequence;
    const uint32_t size = params_units + record_bytes / kUnitBytes;
    const uint32_t first =
        place_record(index_of(cache, layer, sequence), place.block * cache.heads + head, size);
    if (lane < 3) {
      const uint32_t page = min(first / kPageUnits + lane, (first + size - 1) / kPageUnits);
      shared.pages[lane] = cache.pool + page_table_of(cache, layer, sequence)[page] * kPageBytes;
    }
    if (lane == 0) shared.begin = first + params_units;
  }
  __syncthreads();

  const uint32_t begin = shared.begin;
  const RecordTarget target = {{shared.pages[0], shared.pages[1], shared.pages[2]},
                               (begin - params_units) / kPageUnits};
  store_record<kRounds>(shape, shared.tile, affines, rows, residuals, target, begin, record_bytes);
  if (threadIdx.x < params_units) {
    *reinterpret_cast<uint4*>(target.unit(begin - params_units + threadIdx.x)) =
        reinterpret_cast<const uint4*>(params)[threadIdx.x];
  }
}

// ---- tokens that stay in 16 bits ----

// Thread blocks (entry, split).
__global__ void __launch_bounds__(kCopyThreads)
    CopyKernel(const __grid_constant__ AppendParameters parameters) {
  // The plan was there before the kernel that precedes this one in the stream.
  const StepSequence sequence = parameters.step.sequences[blockIdx.x];
  await_preceding();
  copy_kept<false, kCopyThreads>(parameters, sequence, blockIdx.y, gridDim.y);
}

void pack(const ph_device& device, const AppendParameters& parameters, uint8_t* memory) {
  const TileShape& shape = parameters.shape;
  const StepView& step = parameters.step;
  const PackParameters pack = {parameters, workspace_of(memory, step.block_count)};
  const auto run = [&](auto element, auto mixed) {
    using Element = decltype(element);
    constexpr bool kMixed = decltype(mixed)::value;
    launch_overlapping(device, ParamsKernel<Element, kMixed>, dim3(step.block_count), kParamsThreads, 0,
                       pack);
    const auto kernel = kParts * tile_groups(shape) <= kTileWarps ? TileKernel<Element, 1, kMixed>
                                                                  : TileKernel<Element, 2, kMixed>;
    launch_overlapping(device, kernel, dim3(step.block_count * shape.heads), kTileThreads,
                       kParts * kBlockTokens * shape.head_dim, pack);
  };
  dispatch_pack_kernel(shape, run);
}

}  // namespace

uint64_t append_workspace_bytes(const CacheView&, uint64_t blocks) {
  return std::max(workspace_bytes(blocks), cluster_workspace_bytes(blocks));
}

void append(ph_device& device, const CacheView& cache, const TileShape& shape, uint32_t layer,
            const StepView& step, StepTensors tensors, uint8_t* workspace, uint64_t* non_finite) {
  if (step.tokens == 0) return;
  const AppendParameters parameters = {cache,   shape, step,
                                       tensors, layer, reinterpret_cast<unsigned long long*>(non_finite)};
  if (step.block_count > 0) {
    if (can_pack_in_clusters(device, cache)) return append_in_clusters(device, parameters, workspace);
    pack(device, parameters, workspace);
  }
  launch_overlapping(device, CopyKernel, dim3(step.sequence_count, copy_splits(cache, step)), kCopyThreads, 0,
                     parameters);
}

}  // namespace ph::kv
