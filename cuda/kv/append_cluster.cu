// Packing a step's blocks, and keeping its newest tokens, in one launch. A cluster of thread blocks packs a block of 64
// tokens, a team of kTileThreads threads each kv head of it. Of up to 8 heads, the team is a thread block; of more, up to 32
// (16 with more than 128 channels), it shares one with others, and has shared memory and barriers of its own. It
//   1. copies the head's keys and values to shared memory, all at once: the only time that they are read;
//   2. finds each token's extremes, and with those of the cluster's other heads its scale and zero point (params);
//   3. quantises and packs (tile_pack.cuh), which tells the size of the head's record;
//   4. with the sizes of the other heads knows where in the block its record begins, and writes it, the first head the
//      params too, to the stream.
// Where the block begins: at the end of the stream, if it is the sequence's first of the step, as in every decode step. In a
// step of more tokens it follows from how many blocks are before it if all have one size (as of fixed widths, raw16 and
// kivi); otherwise from the sizes of the blocks before it, which their clusters leave in the workspace.
//
// Tokens that stay in 16 bits are copied by clusters that do not pack, or do no more, by a team each, but for tokens that
// take the place of one to be packed: they are copied by the team that has packed it, head by head. So no team writes what
// another reads.
//
// Shared memory, of all teams one after another: PackShared; values [keys, values][64][head_dim] in 16 bits; the codes of
// tile_pack.cuh. Tokens, records and the
// workspace begin at multiples of 16 bytes. Bytes moved: a packed value is read once, 2 bytes, and its width in bits (plus
// 1/64 base) written once; a token that stays is read and written once.
//
// Deterministic, and the same bytes as on the CPU: no place depends on the order in which clusters run. Clusters that
// wait for others take their blocks in ascending order, by a ticket, and make a size known before they wait, so that every
// wait ends; within a cluster, thread blocks run at the same time.
//
// There are no more clusters than run at a time: of a step with more blocks they take one after another. As soon as a
// block's values have become codes, those of the next are on their way to shared memory, while the first finds its place.
#include <algorithm>

#include "kv/append.cuh"
#include "kv/tile_pack.cuh"

namespace ph::kv {

namespace {

constexpr uint32_t kMostRanks = 8;  // thread blocks of a cluster: more are not to be had on every GPU
// Channels of a head, at most, of which a warp has so many groups.
constexpr uint32_t round_channels(int rounds) { return rounds * kTileWarps / kParts * kTileChannels; }
// Teams of a thread block, at most, each of which packs a head: as registers and shared memory allow.
constexpr int most_teams(int rounds) { return rounds == 1 ? 4 : 2; }
constexpr uint32_t most_heads(int rounds) { return kMostRanks * most_teams(rounds); }
// Pages that a block, of params and a record of each head, can touch; a record touches three.
constexpr uint32_t most_pages(int rounds) {
  const uint32_t record = kTileHeaderBytes + kParts * kRawChannelBytes * round_channels(rounds);
  return (kParamsBytes + most_heads(rounds) * record) / kPageBytes + 2 + 2;
}
constexpr uint32_t kBlockPages = 20;
static_assert(most_pages(1) <= kBlockPages && most_pages(2) <= kBlockPages);
static_assert(kBlockPages <= kWarpThreads && most_heads(1) <= kWarpThreads && most_heads(2) <= kWarpThreads);
static_assert(kTileThreads == 4 * kBlockTokens && kTileThreads >= kMostScales &&
              kTileThreads >= kParamsUnits);

// All 0 before a launch and after it.
struct ClusterWorkspace {
  uint32_t* ticket;   // blocks that are taken
  uint32_t* arrived;  // teams that need the workspace no more
  uint32_t* places;   // [blocks]: of each its size, then its end, as in an index
};

struct ClusterParameters {
  AppendParameters append;
  ClusterWorkspace workspace;
  uint32_t most_units;  // of a block, params included
  bool has_one_size;    // every block has so many
  uint32_t splits;      // teams that copy a sequence's kept tokens
  uint32_t copies;      // clusters' worth of them, of all sequences
  bool is_chained;      // blocks wait for the sizes of others
  // Clusters take blocks by tickets; otherwise there is a cluster for each, and for each of `copies`.
  bool has_tickets;
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

// The block at work, the next, which is loaded, and the next but one, which is taken.
constexpr uint32_t kItemSlots = 3;

// A block of the step, and whose it is.
struct PackItem {
  StepSequence sequence;
  uint32_t block;
  uint32_t item;  // which of the step's blocks; at least as many as there are: none
};
constexpr uint32_t kItemWords = sizeof(PackItem) / sizeof(uint32_t);
constexpr uint32_t kSequenceWords = sizeof(StepSequence) / sizeof(uint32_t);
static_assert(kItemWords == kSequenceWords + 2 && kItemWords <= kWarpThreads);

// Of a thread block, in shared memory.
struct BlockShared {
  PackItem items[kItemSlots];
  uint32_t sizes[kWarpThreads];  // of the heads' records, in units
};

// Of a team.
template <int kRounds, bool kMixed>
struct PackShared {
  // A scale for each channel; of values fewer.
  static constexpr uint32_t kScales = kMixed ? round_channels(kRounds) : kBlockTokens;
  TileShared<kMixed, kScales> tile;
  std::conditional_t<kMixed, GroupAffines<kScales>, NoAffines> affines;
  alignas(16) const uint8_t* rows[kParts][kBlockTokens];   // values of a token to be copied, in device memory
  alignas(16) float2 extremes[kParts][kBlockTokens];       // of the head's values of a token, finite
  alignas(16) uint16_t params[kLargestScalePosition / 2];  // the params record up to the largest scale
  uint32_t largest[2];                                     // value scale of half of the tokens, as bits
  uint32_t non_finite[2];                                  // a bit per token
  uint32_t begin;                                          // of the head's record, in units
  uint32_t first_page;                                     // of the stream, in which the block begins
  uint8_t* pages[kBlockPages];                             // from that one on
};

// A barrier of a team's threads.
template <int kTeams>
__device__ __forceinline__ void sync_team(uint32_t team) {
  if constexpr (kTeams == 1) __syncthreads();
  else asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(kTileThreads) : "memory");
}

// Values in shared memory.
struct SharedRows {
  const uint8_t* values;
  uint32_t row_bytes;

  __device__ __forceinline__ const uint8_t* at(uint32_t part, uint32_t token) const {
    return values + (part * kBlockTokens + token) * row_bytes;
  }
};

// Notes where the head's values of a block are. For a thread per token and part, of kParts * kBlockTokens: `row`.
template <typename Shared>
__device__ __forceinline__ void note_row(const AppendParameters& append, const PackItem& item, uint32_t head,
                                         uint32_t row, Shared& shared) {
  const CacheView& cache = append.cache;
  const uint32_t part = row / kBlockTokens, token = row % kBlockTokens;
  shared.rows[part][token] = token_row(cache, append.layer, item.sequence, append.tensors, part,
                                       block_start(cache, item.block) + token) +
                             static_cast<uint64_t>(head) * cache.head_dim * 2;
}

// Begins to copy the head's values to shared memory, row after row; a thread takes the same vector of some rows.
__device__ __forceinline__ void begin_load(const uint8_t* const (&rows)[kParts][kBlockTokens],
                                           uint32_t vectors, uint8_t* values) {
  const uint32_t at_once = kTileThreads / vectors;
  const uint32_t vector = tile_thread() % vectors, first = tile_thread() / vectors;
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
template <typename Element, bool kMixed, typename Shared>
__device__ __forceinline__ void find_extremes(const TileShape& shape, const SharedRows& rows, Shared& shared,
                                              unsigned long long first, unsigned long long* non_finite) {
  const uint32_t token = tile_thread() / 4, vectors = shape.head_dim / kVectorValues;
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
template <int kTeams, int kRounds, bool kMixed>
__device__ __forceinline__ void make_token_quantizer(const TileShape& shape, uint32_t team,
                                                     PackShared<kRounds, kMixed>* teams) {
  PackShared<kRounds, kMixed>& shared = teams[team];
  const uint32_t part = tile_thread() / kBlockTokens, token = tile_thread() % kBlockTokens;
  const bool is_own = !kMixed || is_per_token(shape.parts[part]);
  Affine affine = {0.0f, 0.0f};
  if (is_own) {
    float2 all = {INFINITY, -INFINITY};
#pragma unroll
    for (uint32_t head = 0; head < kMostRanks * kTeams; ++head) {
      if (head >= shape.heads) continue;
      const float2 found = load_peer(&teams[head % kTeams].extremes[part][token], head / kTeams);
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

// The page of a sequence's stream in which a block that begins at unit `begin` lies, for lane 0, and those after it, for
// the next lanes, up to where it may end, which there are pages for.
__device__ __forceinline__ uint32_t find_page(const CacheView& cache, uint32_t layer, uint32_t sequence,
                                              uint32_t begin, uint32_t most_units) {
  const uint32_t last = (begin + most_units - 1) / kPageUnits;
  return page_table_of(cache, layer, sequence)[min(begin / kPageUnits + threadIdx.x % kWarpThreads, last)];
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
// that ended at `stream_end`. For a whole warp of each of the cluster's teams that pack; one of them is to tell others.
__device__ __forceinline__ uint32_t place_block(uint32_t* places, uint32_t item, uint32_t before,
                                                uint32_t stream_end, uint32_t units, bool tells) {
  uint32_t* own = places + item;
  const bool is_first = tells && threadIdx.x % kWarpThreads == 0;
  if (is_first) store_entry(own, kSizeOnly | units);
  const uint32_t begin = find_begin(own, before, stream_end);
  if (is_first) store_entry(own, begin + units);
  return begin;
}

// The last of all `teams` leaves the workspace as it was. For a whole warp.
__device__ __forceinline__ void leave_workspace(const ClusterWorkspace& workspace, uint32_t block_count,
                                                uint32_t teams) {
  const uint32_t lane = threadIdx.x % kWarpThreads;
  __syncwarp();
  bool is_last = false;
  if (lane == 0) is_last = is_last_of(workspace.arrived, teams);
  if (__shfl_sync(kEveryLane, static_cast<int>(is_last), 0) == 0) return;
  for (uint32_t i = lane; i < block_count; i += kWarpThreads) store_entry(workspace.places + i, 0);
  if (lane == 0) store_entry(workspace.ticket, 0);
}

// ---- blocks ----

// Word `lane` of what is noted of the step's block `item`.
__device__ __forceinline__ uint32_t item_word(const StepView& step, uint32_t item, uint32_t lane) {
  if (lane == kSequenceWords + 1) return item;
  if (item >= step.block_count) return 0;
  const StepBlock place = step.blocks[item];
  return lane == kSequenceWords ? place.block
                                : reinterpret_cast<const uint32_t*>(step.sequences + place.entry)[lane];
}

// A cluster's next block, known in lane 0 of the warp that takes it.
__device__ __forceinline__ uint32_t take_ticket(const ClusterWorkspace& workspace) {
  return threadIdx.x % kWarpThreads == 0 ? atomicAdd(workspace.ticket, 1u) : 0;
}

// Notes it in `own` of all thread blocks of the cluster, which see that after a barrier of theirs. For the same warp.
__device__ __forceinline__ void tell_item(const ClusterParameters& parameters, uint32_t ticket,
                                          uint32_t ranks, PackItem& own) {
  const uint32_t lane = threadIdx.x % kWarpThreads, item = __shfl_sync(kEveryLane, ticket, 0);
  if (lane >= kItemWords) return;
  const uint32_t word = item_word(parameters.append.step, item, lane);
  for (uint32_t rank = 0; rank < ranks; ++rank)
    store_peer(reinterpret_cast<const uint32_t*>(&own) + lane, rank, word);
}

// Copies the head's part of kept tokens that take the place of a token of the block, which has been read.
__device__ __forceinline__ void copy_replacements(const AppendParameters& append,
                                                  const StepSequence& sequence, uint64_t start,
                                                  uint32_t head) {
  const CacheView& cache = append.cache;
  if (sequence.before + sequence.tokens <= start + cache.ring) return;
  const uint32_t vectors = cache.head_dim / kVectorValues;
  const uint32_t vector = tile_thread() % vectors, at_once = kTileThreads / vectors;
  if (tile_thread() / vectors >= at_once) return;
  for (uint32_t row = tile_thread() / vectors; row < kParts * kBlockTokens; row += at_once) {
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
template <typename Element, int kRounds, bool kMixed, int kTeams>
__global__ void __launch_bounds__(kTeams* kTileThreads, most_teams(kRounds) / kTeams)
    PackKernel(const __grid_constant__ ClusterParameters parameters) {
#if __CUDA_ARCH__ >= 900
  using Shared = PackShared<kRounds, kMixed>;
  extern __shared__ uint4 dynamic_shared[];
  __shared__ BlockShared common;
  const AppendParameters& append = parameters.append;
  const CacheView& cache = append.cache;
  const TileShape& shape = append.shape;
  const StepView& step = append.step;
  const uint32_t team = kTeams == 1 ? 0 : threadIdx.x / kTileThreads, thread = threadIdx.x % kTileThreads;
  const uint32_t warp = thread / kWarpThreads, lane = thread % kWarpThreads;
  const uint32_t ranks = cluster_ranks(), rank = cluster_rank();
  uint32_t head = rank * kTeams + team;
  const bool has_tickets = parameters.has_tickets;
  // A cluster may have more teams than there are heads.
  const bool packs = head < shape.heads;
  // The warp that takes blocks for the cluster.
  const bool takes = has_tickets && rank == 0 && team == kTeams - 1 && warp == kTileWarps - 1;

  // The cluster's heads share their tokens' extremes, if there are params, and sizes, unless all are the same.
  const uint32_t params_units = kMixed ? params_bytes(shape) / kUnitBytes : kParamsUnits;
  const bool shares_extremes = params_units > 0, shares_sizes = !parameters.has_one_size;
  // Raw values are needed until they are in the record.
  const bool keeps_values = kMixed && (is_raw16(shape.parts[0]) || is_raw16(shape.parts[1]));
  const uint32_t vectors = shape.head_dim / kVectorValues;
  Shared* const teams = reinterpret_cast<Shared*>(dynamic_shared);
  Shared& shared = teams[team];
  const uint32_t code_bytes = kBlockTokens * shape.head_dim;
  uint8_t* const values = reinterpret_cast<uint8_t*>(teams + kTeams) + team * (2 * kParts * code_bytes);
  uint8_t* const key_codes =
      reinterpret_cast<uint8_t*>(teams + kTeams) + (2 * kTeams + team) * (kParts * code_bytes);
  uint8_t* const value_codes = key_codes + code_bytes;
  const SharedRows rows = {values, shape.head_dim * 2};

  if (has_tickets) {
    cluster_arrive();
    await_preceding();
    cluster_wait();
    if (takes) tell_item(parameters, take_ticket(parameters.workspace), ranks, common.items[0]);
    cluster_sync();
  } else {
    // The plan was there before the kernel that precedes this one in the stream.
    if (threadIdx.x < kItemWords)
      reinterpret_cast<uint32_t*>(&common.items[0])[threadIdx.x] =
          item_word(step, cluster_index(), threadIdx.x);
    if (threadIdx.x == 0) common.items[1].item = step.block_count;
    __syncthreads();
  }
  if (packs && common.items[0].item < step.block_count && thread < kParts * kBlockTokens)
    note_row(append, common.items[0], head, thread, shared);
  if (thread < 2) shared.non_finite[thread] = 0;
  if (!has_tickets) await_preceding();
  sync_team<kTeams>(team);
  if (packs && common.items[0].item < step.block_count) begin_load(shared.rows, vectors, values);
  if (takes && common.items[0].item < step.block_count)
    tell_item(parameters, take_ticket(parameters.workspace), ranks, common.items[1]);

  for (uint32_t slot = 0, next_slot; common.items[slot].item < step.block_count; slot = next_slot) {
    next_slot = slot < kItemSlots - 1 ? slot + 1 : 0;
    // Opaque, lest the compiler computes all that follows from it before the loop, and has no registers for it.
    asm volatile("" : "+r"(head));
    const PackItem &own = common.items[slot], &next = common.items[next_slot];
    if (!packs) {
      if (shares_extremes || has_tickets) cluster_sync();
      if (shares_extremes) cluster_sync();
      continue;
    }
    copy_wait();
    sync_team<kTeams>(team);
    const StepSequence& sequence = own.sequence;
    // Where the stream ended before the step.
    uint32_t stream_end = 0, block_begin = 0, page = 0;
    if (warp == 0) {
      if (lane < kParts) shared.tile.widths[lane] = 0;
      stream_end = index_of(cache, append.layer, sequence.sequence)[sequence.first_block * shape.heads];
    }
    const unsigned long long first_token =
        static_cast<unsigned long long>(sequence.sequence) << 40 | block_start(cache, own.block);
    find_extremes<Element, kMixed>(shape, rows, shared, first_token, append.non_finite);
    if (shares_extremes || has_tickets) cluster_sync();
    else sync_team<kTeams>(team);
    if (thread < kParts * kBlockTokens) {
      if (shares_extremes) make_token_quantizer<kTeams>(shape, team, teams);
    } else if (next.item < step.block_count) {
      note_row(append, next, head, thread - kParts * kBlockTokens, shared);
    }
    if (shares_extremes && !shares_sizes) cluster_arrive();
    if constexpr (kMixed) {
      for (uint32_t part = 0; part < kParts; ++part) {
        if (is_kivi(shape.parts[part]))
          make_group_quantizers<Element>(shape, part, rows, shared.tile, shared.affines);
      }
    }
    sync_team<kTeams>(team);
    quantize_head<Element, kRounds, kMixed>(
        shape, rows, shared.tile, static_cast<uint64_t>(shared.non_finite[1]) << 32 | shared.non_finite[0],
        key_codes, value_codes);
    sync_team<kTeams>(team);
    if (!keeps_values && next.item < step.block_count) begin_load(shared.rows, vectors, values);
    if (thread < 2) shared.non_finite[thread] = 0;
    uint32_t ticket = 0;
    if (takes && next.item < step.block_count) ticket = take_ticket(parameters.workspace);
    if (warp == 0 && !parameters.is_chained) {
      block_begin = stream_end + (own.block - sequence.first_block) * parameters.most_units;
      page = find_page(cache, append.layer, sequence.sequence, block_begin, parameters.most_units);
    }
    uint32_t residuals[kRounds][kRegisters];
    find_residuals<kRounds>(shape, key_codes, value_codes, shared.tile, residuals);
    sync_team<kTeams>(team);

    const uint32_t record_bytes =
        head_record_bytes(shape, shared.tile.widths[PH_KV_KEYS], shared.tile.widths[PH_KV_VALUES]);
    // Units of the records of the heads before, and of the block.
    uint32_t earlier = head * (record_bytes / kUnitBytes), all = 0;
    if (shares_sizes) {
      if (thread < ranks) store_peer(&common.sizes[head], thread, record_bytes / kUnitBytes);
      cluster_sync();
      if (warp == 0) {
        const uint32_t units = lane < shape.heads ? common.sizes[lane] : 0;
        earlier = __reduce_add_sync(kEveryLane, lane < head ? units : 0);
        all = params_units + __reduce_add_sync(kEveryLane, units);
      }
    }
    if (warp == 0) {
      if (parameters.is_chained) {
        block_begin = place_block(parameters.workspace.places, own.item, own.block - sequence.first_block,
                                  stream_end, all, head == shape.heads - 1);
        page = find_page(cache, append.layer, sequence.sequence, block_begin, parameters.most_units);
      }
      if (lane < kBlockPages) shared.pages[lane] = cache.pool + page * kPageBytes;
      if (lane == 0) {
        const uint32_t begin = block_begin + params_units + earlier;
        shared.first_page = block_begin / kPageUnits;
        shared.begin = begin;
        index_of(cache, append.layer, sequence.sequence)[own.block * shape.heads + head + 1] =
            begin + record_bytes / kUnitBytes;
      }
    }
    if (takes && next.item < step.block_count)
      tell_item(parameters, ticket, ranks, common.items[next_slot < kItemSlots - 1 ? next_slot + 1 : 0]);
    sync_team<kTeams>(team);

    const uint32_t own_params = head == 0 ? params_units : 0, begin = shared.begin;
    const uint32_t first_page = (begin - own_params) / kPageUnits, nth = first_page - shared.first_page;
    const RecordTarget target = {{shared.pages[nth], shared.pages[nth + 1], shared.pages[nth + 2]},
                                 first_page};
    store_record<kRounds>(shape, shared.tile, shared.affines, rows, residuals, target, begin, record_bytes);
    if (thread < own_params) {
      *reinterpret_cast<uint4*>(target.unit(begin - own_params + thread)) =
          thread < kLargestScalePosition / kUnitBytes
              ? reinterpret_cast<const uint4*>(shared.params)[thread]
              : make_uint4(max(shared.largest[0], shared.largest[1]), 0, 0, 0);
    }
    copy_replacements(append, sequence, block_start(cache, own.block), head);
    if (keeps_values && next.item < step.block_count) {
      sync_team<kTeams>(team);
      begin_load(shared.rows, vectors, values);
    }
    // A team keeps the extremes of its tokens until no other needs them.
    if (shares_extremes && !shares_sizes) cluster_wait();
  }
  if (has_tickets && warp == 0) leave_workspace(parameters.workspace, step.block_count, gridDim.x * kTeams);

  // The last clusters copy, so that others pack meanwhile.
  const uint32_t clusters = gridDim.x / ranks;
  for (uint32_t copy = clusters - 1 - cluster_index(); copy < parameters.copies; copy += clusters) {
    const uint32_t share = (copy * ranks + rank) * kTeams + team, entry = share / parameters.splits;
    if (entry < step.sequence_count)
      copy_kept<true, kTileThreads>(append, step.sequences[entry], share % parameters.splits,
                                    parameters.splits);
  }
#endif
}

// Whether all blocks of a layer take the same bytes, whatever its values.
bool has_one_size(const TileShape& shape) {
  for (const TilePart& part : shape.parts) {
    if (part.width == 0 && !is_raw16(part)) return false;
  }
  return true;
}

// How a block's heads are shared out.
struct Sharing {
  int rounds;  // kRounds
  uint32_t teams, ranks;
};

Sharing sharing_of(uint32_t heads, uint32_t head_dim) {
  Sharing sharing = {head_dim <= round_channels(1) ? 1 : 2, 1, 1};
  if (heads > kMostRanks) sharing.teams = most_teams(sharing.rounds);
  while (sharing.teams * sharing.ranks < heads) sharing.ranks *= 2;
  return sharing;
}

// Shared memory of a thread block, but for what is the same for all. Of raw16 alone there are no codes.
template <int kRounds, bool kMixed>
uint32_t pack_bytes(const Sharing& sharing, uint32_t head_dim, bool is_raw) {
  return sharing.teams *
         (sizeof(PackShared<kRounds, kMixed>) + kParts * kBlockTokens * head_dim * (is_raw ? 2 : 3));
}

}  // namespace

bool can_pack_in_clusters(const ph_device& device, const CacheView& cache) {
  const Sharing sharing = sharing_of(cache.heads, cache.head_dim);
  const uint32_t bytes = sharing.rounds == 1 ? pack_bytes<1, true>(sharing, cache.head_dim, false)
                                             : pack_bytes<2, true>(sharing, cache.head_dim, false);
  return device.major >= 9 && sharing.ranks <= kMostRanks &&
         bytes + sizeof(BlockShared) <= static_cast<uint32_t>(device.shared_bytes);
}

uint64_t cluster_workspace_bytes(uint64_t blocks) { return (2 + blocks) * sizeof(uint32_t); }

void append_in_clusters(const ph_device& device, const AppendParameters& append, uint8_t* workspace) {
  const TileShape& shape = append.shape;
  const StepView& step = append.step;
  uint32_t* const words = reinterpret_cast<uint32_t*>(workspace);
  const Sharing sharing = sharing_of(shape.heads, shape.head_dim);
  const uint32_t ranks = sharing.ranks, members = ranks * sharing.teams;
  const uint32_t splits = copy_splits(append.cache, step);
  ClusterParameters parameters{};
  parameters.append = append;
  parameters.workspace = {words, words + 1, words + 2};
  parameters.most_units = static_cast<uint32_t>(largest_block_units(shape));
  parameters.has_one_size = has_one_size(shape);
  parameters.splits = splits;
  parameters.copies = (step.sequence_count * splits + members - 1) / members;
  // Fewer tokens than a block has make one block due at most.
  parameters.is_chained = !parameters.has_one_size && step.most_queries >= kBlockTokens;
  const bool is_raw = is_raw16(shape.parts[0]) && is_raw16(shape.parts[1]);
  const auto launch = [&](auto kernel, uint32_t shared_bytes) {
    const uint32_t items = step.block_count + parameters.copies;
    const uint32_t most =
        static_cast<uint32_t>(device.processors * most_teams(sharing.rounds)) / (sharing.teams * ranks);
    // Of raw16 alone nothing is computed that the next block's copies could pass the time of.
    const uint32_t clusters = is_raw ? items : std::min(items, std::max(most, 1u));
    parameters.has_tickets = parameters.is_chained || clusters < items;
    allow_shared(device, kernel, SharedMemory::kPrefer);
    launch_overlapping(device, kernel, dim3(clusters * ranks), sharing.teams * kTileThreads, shared_bytes,
                       parameters, ranks);
  };
  dispatch_pack_kernel(shape, [&](auto element, auto mixed) {
    using Element = decltype(element);
    constexpr bool kMixed = decltype(mixed)::value;
    const auto with_rounds = [&](auto rounds) {
      constexpr int kRounds = decltype(rounds)::value, kTeams = most_teams(kRounds);
      launch(sharing.teams == 1 ? PackKernel<Element, kRounds, kMixed, 1>
                                : PackKernel<Element, kRounds, kMixed, kTeams>,
             pack_bytes<kRounds, kMixed>(sharing, shape.head_dim, is_raw));
    };
    if (sharing.rounds == 1) with_rounds(std::integral_constant<int, 1>{});
    else with_rounds(std::integral_constant<int, 2>{});
  });
}

}  // namespace ph::kv
