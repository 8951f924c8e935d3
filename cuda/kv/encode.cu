// Quantise, pack and the fused encode on the GPU.
//
// encode (none, median): one thread block per block of 64 tokens; values first, as the median order comes from their
// codes, then keys. packkv up to 1,024 channels and kivi values read every value once from device memory (more in
// quantize.cuh); codes live in shared memory where they fit (64 bytes a channel), and the record is written once, to a
// slot of its largest size in the workspace. A scan over the sizes and a copy then put the records one after another:
// per 16-bit value 2 bytes read, about 0.35 written, read and written again. greedy and auto need the codes of keys and
// values at once: the three steps run one after another there.
//
// Records do not depend on the order in which thread blocks run: deterministic, and the same bytes as on the CPU.
#include <algorithm>

#include "kv/launch.cuh"
#include "kv/order.cuh"
#include "kv/pack.cuh"

namespace ph::kv {

namespace {

constexpr uint32_t kMaximumGrid = 1056;               // thread blocks with an arena of their own
constexpr uint32_t kSmallestSharedLimit = 99 * 1024;  // of sm_86, among the architectures built for
constexpr uint32_t kFixedSharedBytes = 1024;          // static shared memory of the kernels, at most

// Memory of one thread block that grows with the channels: in shared memory where it fits.
struct Arena {
  uint32_t codes, scales, zeros, headers, row_offsets, bytes;
};

__host__ __device__ Arena arena_of(const Codec& codec) {
  const uint32_t groups = codec.groups[0] > codec.groups[1] ? codec.groups[0] : codec.groups[1];
  Arena arena;
  arena.codes = 0;
  arena.scales = kBlockTokens * codec.channels;
  arena.zeros = arena.scales + 4 * groups;
  arena.headers = arena.zeros + 4 * groups;
  arena.row_offsets = arena.headers + round_up(2 * codec.rows * codec.head_dim, 16);
  arena.bytes = round_up(arena.row_offsets + 4 * (codec.rows + 1), 256);
  return arena;
}

uint32_t staging_bytes(const Codec& codec) { return kEncodeWarps * staging_words(codec.pack) * 4; }

// The workspace: record slots, then arenas if shared memory may be too small for them, then (greedy, auto) the
// quantised layer.
struct Workspace {
  uint64_t slots, arenas, codes[kParts], scales[kParts], zeros[kParts], order, raw_blocks, bytes;
};

Workspace workspace_of(const Codec& codec) {
  Workspace workspace{};
  uint64_t end = 0;
  const auto take = [&](uint64_t bytes) {
    const uint64_t begin = end;
    end += (bytes + 255) / 256 * 256;
    return begin;
  };
  workspace.slots = take(codec.blocks * record_capacity(codec));
  const Arena arena = arena_of(codec);
  if (arena.bytes + staging_bytes(codec) + kFixedSharedBytes > kSmallestSharedLimit) {
    workspace.arenas = take(std::min<uint64_t>(codec.blocks, kMaximumGrid) * arena.bytes);
  }
  if (codec.repack >= PH_KV_REPACK_GREEDY) {
    for (uint32_t part = 0; part < kParts; ++part) {
      workspace.codes[part] = take(codec.blocks * kBlockTokens * codec.channels);
      workspace.scales[part] = take(codec.blocks * codec.groups[part] * 4);
      workspace.zeros[part] = take(codec.blocks * codec.groups[part] * 4);
    }
    workspace.order = take(codec.blocks * kBlockTokens);
    workspace.raw_blocks = take(codec.blocks);
  }
  workspace.bytes = end;
  return workspace;
}

struct QuantizedLayer {
  const uint8_t* codes[kParts];
  const float* scales[kParts];
  const int32_t* zeros[kParts];
  const uint8_t* order;
  const uint8_t* raw_blocks;  // blocks to store raw; null for none
};

// A block as it came, for one with a non-finite group.
__device__ uint32_t write_raw(const Codec& codec, Tensors tensors, uint64_t block, uint8_t* record) {
  const uint32_t part_bytes = raw_part_bytes(codec), head_bytes = part_bytes / codec.heads;
  for (uint32_t section = 0; section < kParts; ++section) {
    const uint8_t* x = tensors.x[section == 0 ? PH_KV_VALUES : PH_KV_KEYS];
    uint8_t* target = record + kRecordHeaderBytes + section * part_bytes;
    for (uint32_t i = 16 * threadIdx.x; i < part_bytes; i += 16 * blockDim.x) {
      const uint32_t head = i / head_bytes, rest = i % head_bytes;
      const uint64_t source =
          (head * codec.tokens + block * kBlockTokens) * codec.head_dim * codec.element_bytes + rest;
      *reinterpret_cast<uint4*>(target + i) = *reinterpret_cast<const uint4*>(x + source);
    }
  }
  const uint32_t keys = kRecordHeaderBytes + part_bytes, bytes = keys + part_bytes;
  if (threadIdx.x == 0) *reinterpret_cast<uint4*>(record) = make_uint4(bytes, kRaw, keys, 0);
  return bytes;
}

__device__ void write_record_header(uint32_t bytes, uint32_t keys, const uint8_t* order, bool ordered,
                                    uint8_t* record) {
  if (threadIdx.x == 0)
    *reinterpret_cast<uint4*>(record) = make_uint4(bytes, static_cast<uint32_t>(ordered) << 8, keys, 0);
  if (ordered && threadIdx.x < kOrderBytes / 4) {
    reinterpret_cast<uint32_t*>(record + kRecordHeaderBytes)[threadIdx.x] = field_word(
        threadIdx.x, 6, kBlockTokens, [&](uint32_t position) { return uint32_t{order[position]}; });
  }
}

struct EncodeShared {
  alignas(16) uint32_t token_offsets[kBlockTokens];
  uint8_t order[kBlockTokens];
  uint32_t medians[kBlockTokens];
  uint32_t used_bits[2];
  unsigned long long first_non_finite;
  int zero_bytes;
  int ordered;
};
static_assert(sizeof(EncodeShared) <= kFixedSharedBytes);

// Where a thread block of EncodeKernel or PackKernel works.
struct Places {
  Arena layout;
  uint8_t* arena;
  uint32_t* staging;
  PackMemory memory;
};

template <int kPack, bool kArenaShared>
__device__ __forceinline__ Places places_of(const Codec& codec, uint8_t* dynamic, uint8_t* arenas,
                                            EncodeShared& shared) {
  const Arena layout = arena_of(codec);
  uint32_t* staging = reinterpret_cast<uint32_t*>(dynamic);
  uint8_t* arena = kArenaShared ? dynamic + round_up(4 * kEncodeWarps * staging_words(kPack), 16)
                                : arenas + static_cast<uint64_t>(blockIdx.x) * layout.bytes;
  return {layout,
          arena,
          staging,
          {reinterpret_cast<uint16_t*>(arena + layout.headers),
           reinterpret_cast<uint32_t*>(arena + layout.row_offsets), staging, shared.used_bits}};
}

template <typename Element, int kPack, bool kArenaShared>
__global__ void __launch_bounds__(kEncodeThreads, 2)
    EncodeKernel(const __grid_constant__ Codec codec, const __grid_constant__ Tensors tensors, uint8_t* slots,
                 uint64_t capacity, uint8_t* arenas, uint64_t* sizes, unsigned long long* first_non_finite) {
  extern __shared__ __align__(16) uint8_t dynamic[];
  __shared__ EncodeShared shared;
  const auto [layout, arena, staging, memory] =
      places_of<kPack, kArenaShared>(codec, dynamic, arenas, shared);
  const PartTarget target = {arena + layout.codes,
                             reinterpret_cast<float*>(arena + layout.scales),
                             reinterpret_cast<int32_t*>(arena + layout.zeros),
                             &shared.first_non_finite,
                             &shared.zero_bytes,
                             reinterpret_cast<uint4*>(staging)};

  for (uint64_t block = blockIdx.x; block < codec.blocks; block += gridDim.x) {
    uint8_t* record = slots + block * capacity;
    uint32_t bytes = kRecordHeaderBytes, keys = 0;
    if (threadIdx.x < kBlockTokens) {
      shared.order[threadIdx.x] = static_cast<uint8_t>(threadIdx.x);
      shared.token_offsets[threadIdx.x] = threadIdx.x * codec.channels;
    }
    if (threadIdx.x == 0) {
      shared.first_non_finite = kNothing;
      shared.ordered = 0;
    }
    for (const uint32_t part : {static_cast<uint32_t>(PH_KV_VALUES), static_cast<uint32_t>(PH_KV_KEYS)}) {
      if (threadIdx.x == 0) shared.zero_bytes = 1;
      __syncthreads();
      quantize_part<Element>(codec, part, tensors.x[part], block, target);
      __syncthreads();
      if (part == PH_KV_VALUES && codec.repack == PH_KV_REPACK_MEDIAN) {
        median_order(codec, target.codes, shared.medians, shared.order);
        if (threadIdx.x < kBlockTokens) {
          if (shared.order[threadIdx.x] != threadIdx.x) shared.ordered = 1;
          shared.token_offsets[threadIdx.x] = shared.order[threadIdx.x] * codec.channels;
        }
        __syncthreads();
      }
      if (part == PH_KV_VALUES && shared.ordered) bytes += kOrderBytes;
      if (part == PH_KV_KEYS) keys = bytes;
      bytes += pack_part<kPack>(codec, part, target.codes, target.scales, target.zeros, shared.token_offsets,
                                static_cast<uint32_t>(shared.zero_bytes), memory, record + bytes);
    }
    if (shared.first_non_finite == kNothing) {
      write_record_header(bytes, keys, shared.order, shared.ordered, record);
    } else {
      bytes = write_raw(codec, tensors, block, record);
      if (threadIdx.x == 0 && !codec.keep_non_finite) atomicMin(first_non_finite, shared.first_non_finite);
    }
    if (threadIdx.x == 0) sizes[block] = bytes;
    __syncthreads();
  }
}

template <typename Element>
__global__ void __launch_bounds__(kEncodeThreads)
    QuantizeKernel(const __grid_constant__ Codec codec, uint32_t part, const uint8_t* x,
                   QuantizedOutput output, uint8_t* raw_blocks, unsigned long long* first_non_finite) {
  __shared__ uint4 landing[kEncodeWarps * kHeld * kWarpThreads];
  __shared__ unsigned long long first;
  __shared__ int zero_bytes;  // pack finds it again
  const uint64_t block = blockIdx.x;
  if (threadIdx.x == 0) first = kNothing;
  __syncthreads();
  quantize_part<Element>(
      codec, part, x, block,
      {output.codes + block * kBlockTokens * codec.channels, output.scales + block * codec.groups[part],
       output.zeros + block * codec.groups[part], &first, &zero_bytes, landing});
  __syncthreads();
  if (threadIdx.x == 0 && first != kNothing) {
    if (raw_blocks != nullptr) raw_blocks[block] = 1;
    if (raw_blocks == nullptr || !codec.keep_non_finite) atomicMin(first_non_finite, first);
  }
}

template <int kPack, bool kArenaShared>
__global__ void __launch_bounds__(kEncodeThreads)
    PackKernel(const __grid_constant__ Codec codec, QuantizedLayer layer, Tensors tensors, uint8_t* slots,
               uint64_t capacity, uint8_t* arenas, uint64_t* sizes) {
  extern __shared__ __align__(16) uint8_t dynamic[];
  __shared__ EncodeShared shared;
  const Places places = places_of<kPack, kArenaShared>(codec, dynamic, arenas, shared);

  for (uint64_t block = blockIdx.x; block < codec.blocks; block += gridDim.x) {
    uint8_t* record = slots + block * capacity;
    uint32_t bytes = kRecordHeaderBytes, keys = 0;
    if (layer.raw_blocks != nullptr && layer.raw_blocks[block]) {
      bytes = write_raw(codec, tensors, block, record);
    } else {
      if (threadIdx.x == 0) shared.ordered = 0;
      __syncthreads();
      if (threadIdx.x < kBlockTokens) {
        shared.order[threadIdx.x] = layer.order[block * kBlockTokens + threadIdx.x] % kBlockTokens;
        if (shared.order[threadIdx.x] != threadIdx.x) shared.ordered = 1;
        shared.token_offsets[threadIdx.x] = shared.order[threadIdx.x] * codec.channels;
      }
      __syncthreads();
      if (shared.ordered) bytes += kOrderBytes;
      for (const uint32_t part : {static_cast<uint32_t>(PH_KV_VALUES), static_cast<uint32_t>(PH_KV_KEYS)}) {
        const float* scales = layer.scales[part] + block * codec.groups[part];
        const int32_t* zeros = layer.zeros[part] + block * codec.groups[part];
        if (threadIdx.x == 0) shared.zero_bytes = 1;
        __syncthreads();
        for (uint32_t group = threadIdx.x; group < codec.groups[part]; group += kEncodeThreads) {
          const int needed = static_cast<int>(zero_point_bytes(zeros[group]));
          if (needed > 1) atomicMax(&shared.zero_bytes, needed);
        }
        const uint8_t* codes = layer.codes[part] + block * kBlockTokens * codec.channels;
        if constexpr (kArenaShared) {
          // pack_part reads codes twice, in the order of the tokens: better from shared memory.
          uint8_t* copy = places.arena + places.layout.codes;
          for (uint32_t i = 16 * threadIdx.x; i < kBlockTokens * codec.channels; i += 16 * kEncodeThreads) {
            *reinterpret_cast<uint4*>(copy + i) = *reinterpret_cast<const uint4*>(codes + i);
          }
          codes = copy;
        }
        __syncthreads();
        if (part == PH_KV_KEYS) keys = bytes;
        bytes += pack_part<kPack>(codec, part, codes, scales, zeros, shared.token_offsets,
                                  static_cast<uint32_t>(shared.zero_bytes), places.memory, record + bytes);
      }
      write_record_header(bytes, keys, shared.order, shared.ordered, record);
    }
    if (threadIdx.x == 0) sizes[block] = bytes;
    __syncthreads();
  }
}

constexpr int kScanThreads = 1024;

// Turns sizes into offsets in place: offsets[0] = 0, offsets[blocks] = the total. One thread block.
__global__ void __launch_bounds__(kScanThreads)
    OffsetsKernel(uint64_t blocks, uint64_t* offsets, uint64_t* total) {
  __shared__ uint64_t warp_sums[kScanThreads / kWarpThreads];
  const uint32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  uint64_t before = 0;
  // Sizes stand one place further on, where their ends will be.
  for (uint64_t begin = 1; begin <= blocks; begin += kScanThreads) {
    const uint64_t index = begin + threadIdx.x;
    uint64_t sum = index <= blocks ? offsets[index] : 0;
    for (int distance = 1; distance < kWarpThreads; distance *= 2) {
      const uint64_t below = __shfl_up_sync(kEveryLane, sum, distance);
      if (lane >= static_cast<uint32_t>(distance)) sum += below;
    }
    if (lane == kWarpThreads - 1) warp_sums[warp] = sum;
    __syncthreads();
    uint64_t chunk = 0;
    for (uint32_t i = 0; i < kScanThreads / kWarpThreads; ++i) {
      if (i < warp) sum += warp_sums[i];
      chunk += warp_sums[i];
    }
    if (index <= blocks) offsets[index] = before + sum;
    before += chunk;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    offsets[0] = 0;
    *total = before;
  }
}

constexpr int kGatherThreads = 256;

__global__ void __launch_bounds__(kGatherThreads)
    GatherKernel(const uint8_t* slots, uint64_t capacity, const uint64_t* offsets, uint8_t* records) {
  const uint64_t begin = offsets[blockIdx.x], end = offsets[blockIdx.x + 1];
  const uint4* source = reinterpret_cast<const uint4*>(slots + blockIdx.x * capacity);
  uint4* target = reinterpret_cast<uint4*>(records + begin);
  for (uint64_t i = threadIdx.x; i < (end - begin) / 16; i += kGatherThreads) target[i] = source[i];
}

void gather(ph_device& device, const Codec& codec, const uint8_t* slots, uint8_t* records, uint64_t* offsets,
            Status* status) {
  OffsetsKernel<<<1, kScanThreads, 0, device.stream>>>(codec.blocks, offsets, &status->bytes);
  PH_CUDA_TRY(cudaGetLastError());
  GatherKernel<<<grid_of(codec.blocks), kGatherThreads, 0, device.stream>>>(slots, record_capacity(codec),
                                                                            offsets, records);
  PH_CUDA_TRY(cudaGetLastError());
}

// Launches a kernel that wants an arena: `run(flag, grid, shared bytes)` with std::true_type if it is in shared memory.
template <typename Run>
void with_arena(const ph_device& device, const Codec& codec, Run run) {
  const uint32_t staging = round_up(staging_bytes(codec), 16);
  const uint32_t shared = staging + arena_of(codec).bytes;
  if (shared + kFixedSharedBytes <= static_cast<uint32_t>(device.shared_bytes)) {
    run(std::true_type{}, grid_of(codec.blocks), shared);
  } else {
    run(std::false_type{}, static_cast<uint32_t>(std::min<uint64_t>(codec.blocks, kMaximumGrid)), staging);
  }
}

// quantize_tokens counts vectors of eight values in 32 bits.
void check_offsets(const Codec& codec) {
  if (codec.channels * codec.tokens > 1ull << 35) {
    throw Error(PH_ERROR_UNSUPPORTED,
                "Cannot quantise more than 2^35 values of a tensor in one call: split the tokens");
  }
}

void launch_quantize(ph_device& device, const Codec& codec, uint32_t part, const void* x,
                     QuantizedOutput output, uint8_t* raw_blocks, Status* status) {
  dispatch_dtype(codec.dtype, [&](auto element) {
    QuantizeKernel<decltype(element)><<<grid_of(codec.blocks), kEncodeThreads, 0, device.stream>>>(
        codec, part, static_cast<const uint8_t*>(x), output, raw_blocks, first_of(status));
  });
  PH_CUDA_TRY(cudaGetLastError());
}

void launch_pack(ph_device& device, const Codec& codec, const QuantizedLayer& layer, Tensors tensors,
                 uint8_t* records, uint64_t* offsets, uint8_t* workspace, Status* status) {
  const Workspace places = workspace_of(codec);
  with_arena(device, codec, [&](auto arena_shared, uint32_t grid, uint32_t shared_bytes) {
    dispatch_pack(codec.pack, [&](auto pack) {
      const auto kernel = PackKernel<decltype(pack)::value, decltype(arena_shared)::value>;
      allow_shared(device, kernel);
      kernel<<<grid, kEncodeThreads, shared_bytes, device.stream>>>(
          codec, layer, tensors, workspace + places.slots, record_capacity(codec), workspace + places.arenas,
          offsets + 1);
    });
  });
  PH_CUDA_TRY(cudaGetLastError());
  gather(device, codec, workspace + places.slots, records, offsets, status);
}

void finish_empty(ph_device& device, uint64_t* offsets) {
  PH_CUDA_TRY(cudaMemsetAsync(offsets, 0, sizeof *offsets, device.stream));
}

}  // namespace

uint64_t workspace_bytes(const Codec& codec) {
  return std::max(workspace_of(codec).bytes, measure_workspace_bytes(codec));
}

void quantize(ph_device& device, const Codec& codec, uint32_t part, const void* x, QuantizedOutput output,
              Status* status) {
  check_offsets(codec);
  clear_status(device, status);
  if (codec.blocks > 0) launch_quantize(device, codec, part, x, output, nullptr, status);
}

void pack(ph_device& device, const Codec& codec, const QuantizedInput parts[kParts], const uint8_t* order,
          uint8_t* records, uint64_t* offsets, uint8_t* workspace, Status* status) {
  clear_status(device, status);
  if (codec.blocks == 0) return finish_empty(device, offsets);
  const QuantizedLayer layer = {{parts[0].codes, parts[1].codes},
                                {parts[0].scales, parts[1].scales},
                                {parts[0].zeros, parts[1].zeros},
                                order,
                                nullptr};
  launch_pack(device, codec, layer, {}, records, offsets, workspace, status);
}

void encode(ph_device& device, const Codec& codec, const void* const tensors[kParts], uint8_t* records,
            uint64_t* offsets, uint8_t* workspace, Status* status) {
  check_offsets(codec);
  check_repack(device, codec);
  clear_status(device, status);
  if (codec.blocks == 0) return finish_empty(device, offsets);
  const Workspace places = workspace_of(codec);
  const Tensors inputs = tensors_of(tensors);
  if (codec.repack < PH_KV_REPACK_GREEDY) {
    with_arena(device, codec, [&](auto arena_shared, uint32_t grid, uint32_t shared_bytes) {
      dispatch_dtype(codec.dtype, [&](auto element) {
        dispatch_pack(codec.pack, [&](auto pack) {
          const auto kernel =
              EncodeKernel<decltype(element), decltype(pack)::value, decltype(arena_shared)::value>;
          allow_shared(device, kernel);
          kernel<<<grid, kEncodeThreads, shared_bytes, device.stream>>>(
              codec, inputs, workspace + places.slots, record_capacity(codec), workspace + places.arenas,
              offsets + 1, first_of(status));
        });
      });
    });
    PH_CUDA_TRY(cudaGetLastError());
    return gather(device, codec, workspace + places.slots, records, offsets, status);
  }
  QuantizedLayer layer{};
  uint8_t* raw_blocks = workspace + places.raw_blocks;
  PH_CUDA_TRY(cudaMemsetAsync(raw_blocks, 0, codec.blocks, device.stream));
  for (uint32_t part = 0; part < kParts; ++part) {
    const QuantizedOutput output = {workspace + places.codes[part],
                                    reinterpret_cast<float*>(workspace + places.scales[part]),
                                    reinterpret_cast<int32_t*>(workspace + places.zeros[part])};
    launch_quantize(device, codec, part, tensors[part], output, raw_blocks, status);
    layer.codes[part] = output.codes;
    layer.scales[part] = output.scales;
    layer.zeros[part] = output.zeros;
  }
  uint8_t* order = workspace + places.order;
  repack(device, codec, layer.codes[PH_KV_KEYS], layer.codes[PH_KV_VALUES], order);
  layer.order = order;
  layer.raw_blocks = raw_blocks;
  launch_pack(device, codec, layer, inputs, records, offsets, workspace, status);
}

}  // namespace ph::kv
