// Packing a step's blocks, and keeping its newest tokens, in one launch. A cluster of thread blocks packs a block of 64
// tokens, each of them one kv head of it:
//   1. copies the head's keys and values to shared memory, all at once: the only time that they are read;
//   2. finds each token's extremes, and with those of the cluster's other heads its scale and zero point (params);
//   3. quantises and packs (tile_pack.cuh), which tells the size of the head's record;
//   4. with the sizes of the other heads knows where in the block its record begins, and writes it, the first head the
//      params too, to the stream.
// Where the block begins: at the end of the stream, if it is the sequence's first of the step, as in every decode step. In a
// step of more tokens it follows from how many blocks are before it if all have one size (as of fixed widths, raw16 and
// kivi); otherwise from the sizes of the blocks before it, which their clusters leave in the workspace.
//
// Tokens that stay in 16 bits are copied by clusters after those that pack, a thread block each, but for tokens that take
// the place of one to be packed: they are copied by the thread block that has packed it, head by head. So no thread block
// writes what another reads.
//
// Shared memory: values [keys, values][64][head_dim] in 16 bits, then the codes of tile_pack.cuh. Tokens, records and the
// workspace begin at multiples of 16 bytes. Bytes moved: a packed value is read once, 2 bytes, and its width in bits (plus
// 1/64 base) written once; a token that stays is read and written once.
//
// Deterministic, and the same bytes as on the CPU: no place depends on the order in which thread blocks run. Clusters that
// wait for others take their blocks in ascending order, by a ticket, and make a size known before they wait, so that every
// wait ends; within a cluster, thread blocks run at the same time.
#include "kv/append.cuh"
#include "kv/tile_pack.cuh"

namespace ph::kv {

namespace {

constexpr uint32_t kMostRanks = 8;  // thread blocks of a cluster: more are not to be had on every GPU
// Pages that a block, of params and a record of each head, can touch; a record touches three.
constexpr uint32_t kMostRecordBytes = kTileHeaderBytes + kParts * kRawChannelBytes * kMostHeadDim;
constexpr uint32_t kBlockPages = 12;
static_assert((kParamsBytes + kMostRanks * kMostRecordBytes) / kPageBytes + 2 + 2 <= kBlockPages);
static_assert(kBlockPages <= kWarpThreads && kMostRanks <= kWarpThreads);
static_assert(kTileThreads == 4 * kBlockTokens && kTileThreads >= kMostScales &&
              kTileThreads >= kParamsUnits);

// All 0 before a launch and after it.
struct ClusterWorkspace {
  uint32_t* ticket;   // clusters that have begun
  uint32_t* arrived;  // thread blocks that know where their block begins
  uint32_t* places;   // [blocks]: of each its size, then its end, as in an index
};

struct ClusterParameters {
  AppendParameters append;
  ClusterWorkspace workspace;
  uint32_t most_units;  // of a block, params included
  bool has_one_size;    // every block has so many
  uint32_t splits;      // thread blocks that copy a sequence's kept tokens
  bool is_chained;      // blocks wait for the sizes of others
};

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

// ---- clusters ----

__device__ __forceinline__ uint32_t cluster_index() {
  uint32_t index;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return index;
}
__device__ __forceinline__ uint32_t cluster_ranks() {
  uint32_t ranks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(ranks));
  return ranks;
}

// Address of what `own` is, in the shared memory of the cluster's thread block `rank`.
__device__ __forceinline__ uint32_t peer_address(const void* own, uint32_t rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(own))), "r"(rank));
  return address;
}
__device__ __forceinline__ uint32_t load_peer(const uint32_t* own, uint32_t rank) {
  uint32_t value;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(peer_address(own, rank)) : "memory");
  return value;
}
__device__ __forceinline__ float2 load_peer(const float2* own, uint32_t rank) {
  float2 value;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
               : "=f"(value.x), "=f"(value.y)
               : "r"(peer_address(own, rank))
               : "memory");
  return value;
}
__device__ __forceinline__ void store_peer(const uint32_t* own, uint32_t rank, uint32_t value) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(peer_address(own, rank)), "r"(value) : "memory");
}

// ---- values ----

template <bool kMixed>
struct PackShared {
  TileShared<kMixed> tile;
  alignas(16) const uint8_t* rows[kParts][kBlockTokens];   // the head's values of a token, in device memory
  alignas(16) float2 extremes[kParts][kBlockTokens];       // of them, finite
  alignas(16) uint16_t params[kLargestScalePosition / 2];  // the params record up to the largest scale
  uint32_t largest[2];                                     // value scale of half of the tokens, as bits
  uint32_t non_finite[2];                                  // a bit per token
  uint32_t sizes[kMostRanks];                              // of the heads' records, in units
  StepSequence sequence;                                   // whose block it is
  uint32_t block;
  uint32_t item;                // which of the step's blocks, or of what comes after them
  uint32_t begin;               // of the head's record, in units
  uint32_t first_page;          // of the stream, in which the block begins
  uint8_t* pages[kBlockPages];  // from that one on
};

// Values in shared memory.
struct SharedRows {
  const uint8_t* values;
  uint32_t row_bytes;

  __device__ __forceinline__ const uint8_t* at(uint32_t part, uint32_t token) const {
    return values + (part * kBlockTokens + token) * row_bytes;
  }
};

// Begins to copy the head's values to shared memory, row after row; a thread takes the same vector of some rows.
__device__ __forceinline__ void begin_load(const uint8_t* const (&rows)[kParts][kBlockTokens],
                                           uint32_t vectors, uint8_t* values) {
  const uint32_t at_once = kTileThreads / vectors;
  const uint32_t vector = threadIdx.x % vectors, first = threadIdx.x / vectors;
  if (first < at_once) {
    for (uint32_t row = first; row < kParts * kBlockTokens; row += at_once) {
      copy_async(reinterpret_cast<uint4*>(values) + row * vectors + vector,
                 rows[row / kBlockTokens][row % kBlockTokens] + vector * kVectorBytes);
    }
  }
  copy_commit();
}

template <typename Pair>
__device__ __forceinline__ Pair shuffle_pair(Pair pair, int lanes) {
  static_assert(sizeof(Pair) == sizeof(uint32_t));
  uint32_t word = __shfl_xor_sync(kEveryLane, *reinterpret_cast<uint32_t*>(&pair), lanes);
  return *reinterpret_cast<Pair*>(&word);
}

// Extremes of a row of `vectors`, a multiple of 4, by the four lanes that share `row`; each gets them. kFinite: of what is
// not finite as 0; otherwise such a row's range is infinite.
template <typename Element, bool kFinite>
__device__ __forceinline__ float2 row_extremes(const uint8_t* row, uint32_t vectors, uint32_t token) {
  using Vector = typename Element::Vector;
  const uint32_t lane = threadIdx.x % 4, rounds = vectors / 4;
  // Every other token begins with the second 64 bytes of its 128, so that lanes of two rows meet different banks.
  const uint32_t turn = rounds % 2 == 0 ? token % 2 : 0;
  typename Vector::Extremes extremes;
#pragma unroll 2
  for (uint32_t round = 0; round < rounds; ++round) {
    Vector held;
    held.load(row + (lane + 4 * (round ^ turn)) * kVectorBytes);
    if (kFinite) zero_non_finite<Element>(held);
    extremes.add(held);
  }
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) {
    extremes.minimum = __hmin2_nan(extremes.minimum, shuffle_pair(extremes.minimum, lanes));
    extremes.maximum = __hmax2_nan(extremes.maximum, shuffle_pair(extremes.maximum, lanes));
  }
  float2 found;
  extremes.finish(found.x, found.y);
  return found;
}

// Finds the extremes of every token of the head, of the parts that are quantised, and notes tokens with values that are
// not finite, also in `*non_finite` as append has it, of which `first` is what the block's first token would be.
template <typename Element, bool kMixed>
__device__ __forceinline__ void find_extremes(const TileShape& shape, const SharedRows& rows,
                                              PackShared<kMixed>& shared, unsigned long long first,
                                              unsigned long long* non_finite) {
  const uint32_t token = threadIdx.x / 4, vectors = shape.head_dim / kVectorValues;
#pragma unroll
  for (uint32_t part = 0; part < kParts; ++part) {
    if (kMixed && is_raw16(shape.parts[part])) continue;  // they may be anything
    float2 found = row_extremes<Element, false>(rows.at(part, token), vectors, token);
    const bool is_finite = found.x != -INFINITY && found.y != INFINITY;
    if (!__all_sync(kEveryLane, is_finite)) {
      found = row_extremes<Element, true>(rows.at(part, token), vectors, token);
      if (!is_finite && threadIdx.x % 4 == 0) {
        atomicOr(&shared.non_finite[token / 32], 1u << token % 32);
        atomicMin(non_finite, first + token);
      }
    }
    if (threadIdx.x % 4 == 0) shared.extremes[part][token] = found;
  }
}

// A token's scale and zero point, from the extremes of all heads: params, and the head's quantizers. For a thread per token
// and part.
template <bool kMixed>
__device__ __forceinline__ void make_token_quantizer(const TileShape& shape, PackShared<kMixed>& shared) {
  const uint32_t part = threadIdx.x / kBlockTokens, token = threadIdx.x % kBlockTokens;
  const bool is_own = !kMixed || is_per_token(shape.parts[part]);
  Affine affine = {0.0f, 0.0f};
  if (is_own) {
    float2 all = {INFINITY, -INFINITY};
#pragma unroll
    for (uint32_t head = 0; head < kMostRanks; ++head) {
      if (head >= shape.heads) continue;
      const float2 found = load_peer(&shared.extremes[part][token], head);
      all = {fminf(all.x, found.x), fmaxf(all.y, found.y)};
    }
    affine = tile_affine(shape, part, all.x, all.y);
  }
  const uint32_t scale = scale_bits(shape.dtype, affine.scale);
  const int32_t zero = static_cast<int32_t>(affine.zero);
  shared.params[scale_position(part, token) / 2] = static_cast<uint16_t>(scale);
  shared.params[zero_position(part, token) / 2] = static_cast<uint16_t>(zero);
  if (is_own) {
    shared.tile.quantizers[part][token] =
        make_quantizer(shape.parts[part].code_limit, scale_from_bits(shape.dtype, scale), zero);
  }
  // Positive floats are in the order of their bits.
  const uint32_t largest = __reduce_max_sync(kEveryLane, float_bits(affine.scale));
  if (part == PH_KV_VALUES && token % kWarpThreads == 0) shared.largest[token / kWarpThreads] = largest;
}

// ---- places ----

// Notes the pages of a block that begins at unit `begin` of shared.sequence's stream. For a whole warp.
template <bool kMixed>
__device__ __forceinline__ void find_pages(const CacheView& cache, uint32_t layer, uint32_t begin,
                                           uint32_t most_units, PackShared<kMixed>& shared) {
  const uint32_t lane = threadIdx.x % kWarpThreads, first = begin / kPageUnits;
  if (lane == 0) shared.first_page = first;
  // Up to where it may end, which there are pages for.
  if (lane < kBlockPages) {
    const uint32_t page = min(first + lane, (begin + most_units - 1) / kPageUnits);
    shared.pages[lane] =
        cache.pool + page_table_of(cache, layer, shared.sequence.sequence)[page] * kPageBytes;
  }
}

// Counts one of `count` arrivals, from 0 again after the last one: true for that. It sees what the others did before.
__device__ __forceinline__ bool is_last_of(uint32_t* arrived, uint32_t count) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(arrived), "r"(count - 1)
               : "memory");
  return before == count - 1;
}

// Where block `item` of the step begins, of `units`, with `before` blocks of the same sequence right before it, in a stream
// that ended at `stream_end`. For a whole warp of each of the cluster's thread blocks that pack; one of them is to tell
// others. The last that asks leaves the workspace as it was.
__device__ __forceinline__ uint32_t place_block(const ClusterWorkspace& workspace, uint32_t item,
                                                uint32_t before, uint32_t stream_end, uint32_t units,
                                                bool tells, uint32_t block_count, uint32_t heads) {
  const uint32_t lane = threadIdx.x % kWarpThreads;
  uint32_t* own = workspace.places + item;
  if (tells && lane == 0) store_entry(own, kSizeOnly | units);
  const uint32_t begin = find_begin(own, before, stream_end);
  if (tells && lane == 0) store_entry(own, begin + units);
  __syncwarp();
  bool is_last = false;
  if (lane == 0) is_last = is_last_of(workspace.arrived, block_count * heads);
  if (__shfl_sync(kEveryLane, static_cast<int>(is_last), 0) != 0) {
    for (uint32_t i = lane; i < block_count; i += kWarpThreads) store_entry(workspace.places + i, 0);
  }
  return begin;
}

// Copies the head's part of kept tokens that take the place of a token of the block, which has been read.
__device__ __forceinline__ void copy_replacements(const AppendParameters& append,
                                                  const StepSequence& sequence, uint64_t start,
                                                  uint32_t head) {
  const CacheView& cache = append.cache;
  if (sequence.before + sequence.tokens <= start + cache.ring) return;
  const uint32_t vectors = cache.head_dim / kVectorValues;
  const uint32_t vector = threadIdx.x % vectors, at_once = kTileThreads / vectors;
  if (threadIdx.x / vectors >= at_once) return;
  for (uint32_t row = threadIdx.x / vectors; row < kParts * kBlockTokens; row += at_once) {
    const uint32_t part = row / kBlockTokens;
    const uint64_t token = start + row % kBlockTokens;
    if (token >= sequence.before) continue;
    const uint64_t kept = replacement(cache, sequence, token);
    if (kept == token) continue;
    const uint32_t place = head * vectors + vector;
    const uint8_t* source =
        append.tensors.parts[part] + (sequence.input + (kept - sequence.before)) * token_bytes(cache);
    uint8_t* target = recent_part(cache, append.layer, sequence.sequence, part) +
                      recent_slot(cache, kept) * token_bytes(cache);
    reinterpret_cast<uint4*>(target)[place] = reinterpret_cast<const uint4*>(source)[place];
  }
}

#endif

// kRounds: groups of a warp, and its shares of the codes; 2 where the head has more than 128 channels.
template <typename Element, int kRounds, bool kMixed>
__global__ void __launch_bounds__(kTileThreads, kRounds == 1 ? 4 : 2)
    PackKernel(const __grid_constant__ ClusterParameters parameters) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ uint4 dynamic_shared[];
  __shared__ PackShared<kMixed> shared;
  __shared__ std::conditional_t<kMixed, GroupAffines, NoAffines> affines;
  const AppendParameters& append = parameters.append;
  const CacheView& cache = append.cache;
  const TileShape& shape = append.shape;
  const StepView& step = append.step;
  const uint32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  const uint32_t ranks = cluster_ranks(), head = cluster_rank();
  uint32_t item = cluster_index();
  if (parameters.is_chained) {
    await_preceding();
    if (head == 0 && threadIdx.x == 0)
      shared.item = atomicInc(parameters.workspace.ticket, gridDim.x / ranks - 1);
    cluster_sync();
    item = load_peer(&shared.item, 0);
  }

  if (item >= step.block_count) {
    const uint32_t share = (item - step.block_count) * ranks + head;
    const uint32_t entry = share / parameters.splits;
    StepSequence sequence{};
    if (entry < step.sequence_count) sequence = step.sequences[entry];
    await_preceding();
    if (entry < step.sequence_count)
      copy_kept<true, kTileThreads>(append, sequence, share % parameters.splits, parameters.splits);
    cluster_sync();  // the first thread block is there until the others have its ticket
    return;
  }

  // The plan was there before the kernel that precedes this one in the stream.
  {
    const StepBlock place = step.blocks[item];
    const StepSequence sequence = step.sequences[place.entry];
    if (threadIdx.x == 0) {
      shared.sequence = sequence;
      shared.block = place.block;
    }
    if (head < shape.heads && threadIdx.x < kParts * kBlockTokens) {
      const uint32_t part = threadIdx.x / kBlockTokens, token = threadIdx.x % kBlockTokens;
      shared.rows[part][token] = token_row(cache, append.layer, sequence, append.tensors, part,
                                           block_start(cache, place.block) + token) +
                                 static_cast<uint64_t>(head) * shape.head_dim * 2;
    }
  }
  if (threadIdx.x < kParts) shared.tile.widths[threadIdx.x] = 0;
  if (threadIdx.x < 2) shared.non_finite[threadIdx.x] = 0;
  await_preceding();
  // The cluster's heads share their tokens' extremes, if there are params, and sizes, unless all are the same. A thread
  // block is there until no other needs its shared memory.
  const uint32_t params_units = kMixed ? params_bytes(shape) / kUnitBytes : kParamsUnits;
  const bool shares_extremes = params_units > 0, shares_sizes = !parameters.has_one_size;
  if (head >= shape.heads) {  // a cluster has more thread blocks than there are heads
    if (shares_extremes) cluster_sync();
    if (shares_extremes || shares_sizes) cluster_sync();
    return;
  }
  __syncthreads();

  const uint32_t vectors = shape.head_dim / kVectorValues;
  uint8_t* const values = reinterpret_cast<uint8_t*>(dynamic_shared);
  uint8_t* const key_codes = values + kParts * kBlockTokens * shape.head_dim * 2;
  uint8_t* const value_codes = key_codes + kBlockTokens * shape.head_dim;
  const SharedRows rows = {values, shape.head_dim * 2};
  begin_load(shared.rows, vectors, values);
  // Meanwhile, where the stream ended before the step.
  const StepSequence& sequence = shared.sequence;
  uint32_t stream_end = 0, block_begin = 0;
  if (warp == 0) {
    stream_end = index_of(cache, append.layer, sequence.sequence)[sequence.first_block * shape.heads];
    block_begin = stream_end + (shared.block - sequence.first_block) * parameters.most_units;
    if (!parameters.is_chained) find_pages(cache, append.layer, block_begin, parameters.most_units, shared);
  }
  copy_wait();
  __syncthreads();

  const unsigned long long first_token =
      static_cast<unsigned long long>(sequence.sequence) << 40 | block_start(cache, shared.block);
  find_extremes<Element>(shape, rows, shared, first_token, append.non_finite);
  if (shares_extremes) {
    cluster_sync();
    if (threadIdx.x < kParts * kBlockTokens) make_token_quantizer(shape, shared);
    if (!shares_sizes) cluster_arrive();
  } else {
    __syncthreads();
  }
  if constexpr (kMixed) {
    for (uint32_t part = 0; part < kParts; ++part) {
      if (is_kivi(shape.parts[part])) make_group_quantizers<Element>(shape, part, rows, shared.tile, affines);
    }
  }
  __syncthreads();
  quantize_head<Element, kRounds, kMixed>(
      shape, rows, shared.tile, static_cast<uint64_t>(shared.non_finite[1]) << 32 | shared.non_finite[0],
      key_codes, value_codes);
  __syncthreads();
  uint32_t residuals[kRounds][kRegisters];
  find_residuals<kRounds>(shape, key_codes, value_codes, shared.tile, residuals);
  __syncthreads();

  const uint32_t record_bytes =
      head_record_bytes(shape, shared.tile.widths[PH_KV_KEYS], shared.tile.widths[PH_KV_VALUES]);
  // Units of the records of the heads before, and of the block.
  uint32_t earlier = head * (record_bytes / kUnitBytes), all = 0;
  if (shares_sizes) {
    if (threadIdx.x < ranks) store_peer(&shared.sizes[head], threadIdx.x, record_bytes / kUnitBytes);
    cluster_sync();
    if (warp == 0) {
      const uint32_t units = lane < shape.heads ? shared.sizes[lane] : 0;
      earlier = __reduce_add_sync(kEveryLane, lane < head ? units : 0);
      all = params_units + __reduce_add_sync(kEveryLane, units);
    }
  }
  if (warp == 0) {
    if (parameters.is_chained) {
      block_begin = place_block(parameters.workspace, item, shared.block - sequence.first_block, stream_end,
                                all, head == shape.heads - 1, step.block_count, shape.heads);
      find_pages(cache, append.layer, block_begin, parameters.most_units, shared);
    }
    if (lane == 0) {
      const uint32_t begin = block_begin + params_units + earlier;
      shared.begin = begin;
      index_of(cache, append.layer, sequence.sequence)[shared.block * shape.heads + head + 1] =
          begin + record_bytes / kUnitBytes;
    }
  }
  __syncthreads();

  const uint32_t own_params = head == 0 ? params_units : 0, begin = shared.begin;
  const uint32_t page = (begin - own_params) / kPageUnits, nth = page - shared.first_page;
  const RecordTarget target = {{shared.pages[nth], shared.pages[nth + 1], shared.pages[nth + 2]}, page};
  store_record<kRounds>(shape, shared.tile, affines, rows, residuals, target, begin, record_bytes);
  if (threadIdx.x < own_params) {
    *reinterpret_cast<uint4*>(target.unit(begin - own_params + threadIdx.x)) =
        threadIdx.x < kLargestScalePosition / kUnitBytes
            ? reinterpret_cast<const uint4*>(shared.params)[threadIdx.x]
            : make_uint4(max(shared.largest[0], shared.largest[1]), 0, 0, 0);
  }
  copy_replacements(append, sequence, block_start(cache, shared.block), head);
  if (shares_extremes && !shares_sizes) cluster_wait();
#endif
}

// Whether all blocks of a layer take the same bytes, whatever its values.
bool has_one_size(const TileShape& shape) {
  for (const TilePart& part : shape.parts) {
    if (part.width == 0 && !is_raw16(part)) return false;
  }
  return true;
}

uint32_t ranks_of(uint32_t heads) {
  uint32_t ranks = 1;
  while (ranks < heads) ranks *= 2;
  return ranks;
}

}  // namespace

bool can_pack_in_clusters(const ph_device& device, const CacheView& cache) {
  return device.major >= 9 && cache.heads <= kMostRanks;
}

uint64_t cluster_workspace_bytes(uint64_t blocks) { return (2 + blocks) * sizeof(uint32_t); }

void append_in_clusters(const ph_device& device, const AppendParameters& append, uint8_t* workspace) {
  const TileShape& shape = append.shape;
  const StepView& step = append.step;
  uint32_t* const words = reinterpret_cast<uint32_t*>(workspace);
  ClusterParameters parameters = {append,
                                  {words, words + 1, words + 2},
                                  static_cast<uint32_t>(largest_block_units(shape)),
                                  has_one_size(shape),
                                  copy_splits(append.cache, step),
                                  false};
  // Fewer tokens than a block has make one block due at most.
  parameters.is_chained = !parameters.has_one_size && step.most_queries >= kBlockTokens;
  const uint32_t ranks = ranks_of(shape.heads);
  const uint32_t copies = (step.sequence_count * parameters.splits + ranks - 1) / ranks;
  const bool is_raw = is_raw16(shape.parts[0]) && is_raw16(shape.parts[1]);
  const uint32_t shared_bytes = kParts * kBlockTokens * shape.head_dim * (is_raw ? 2 : 3);
  dispatch_pack_kernel(shape, [&](auto element, auto mixed) {
    using Element = decltype(element);
    constexpr bool kMixed = decltype(mixed)::value;
    const auto kernel = kParts * tile_groups(shape) <= kTileWarps ? PackKernel<Element, 1, kMixed>
                                                                  : PackKernel<Element, 2, kMixed>;
    allow_shared(device, kernel, SharedMemory::kPrefer);
    launch_overlapping(device, kernel, dim3((step.block_count + copies) * ranks), kTileThreads, shared_bytes,
                       parameters, ranks);
  });
}

}  // namespace ph::kv
