// Step 2 on the GPU: the order of each block's tokens, one thread block per block.
//
// greedy compares every token left with the pack so far: 64 steps, a warp per token, four channels a lane and word.
// Codes are read from the cache (2 bytes a channel pair and token); extremes, mean and sums of the tokens left, 10
// bytes a channel, live in shared memory. Integers, and doubles that are only multiplied and divided, so the order is
// the CPU's.
#include "kv/launch.cuh"
#include "kv/order.cuh"
#include "kv/pack.cuh"

namespace ph::kv {

namespace {

// Codes of one block: keys, then values, as words of four.
struct BlockCodes {
  const uint32_t* keys;
  const uint32_t* values;
  uint32_t part_words;  // of one token and part

  __device__ __forceinline__ uint32_t word(uint32_t token, uint32_t i) const {
    return i < part_words ? keys[token * part_words + i] : values[token * part_words + i - part_words];
  }
};

struct GreedyMemory {
  uint32_t* minimum;  // [words]
  uint32_t* maximum;
  uint32_t* mean;
  uint2* sums;  // [words]: bytes 0 and 2, bytes 1 and 3, as 16-bit pairs
};

struct RepackShared {
  alignas(16) uint32_t token_offsets[kBlockTokens];
  uint8_t order[kBlockTokens];  // the candidate
  uint8_t best_order[kBlockTokens];
  uint32_t medians[kBlockTokens];
  uint32_t norms[kBlockTokens];
  double similarities[kBlockTokens];
  unsigned long long left;
  uint32_t choice;
  unsigned long long bits;
};

__device__ __forceinline__ uint32_t round_half_even(uint32_t sum, uint32_t count) {
  const uint32_t quotient = sum / count, rest = 2 * (sum - quotient * count);
  return quotient + (rest > count || (rest == count && quotient % 2 == 1));
}

// Sum of the bit widths of four bytes: bits below the highest are filled, then all are counted.
__device__ __forceinline__ uint32_t widths_of(uint32_t bytes) {
  bytes |= bytes >> 1 & 0x7f7f7f7fu;
  bytes |= bytes >> 2 & 0x3f3f3f3fu;
  bytes |= bytes >> 4 & 0x0f0f0f0fu;
  return __popc(bytes);
}

__device__ __forceinline__ uint32_t min4(uint32_t a, uint32_t b) {
  return __vminu2(a & kEven, b & kEven) | __vminu2(a >> 8 & kEven, b >> 8 & kEven) << 8;
}
__device__ __forceinline__ uint32_t max4(uint32_t a, uint32_t b) {
  return __vmaxu2(a & kEven, b & kEven) | __vmaxu2(a >> 8 & kEven, b >> 8 & kEven) << 8;
}

// Moves a token from those left into the pack.
__device__ void take(const BlockCodes& codes, uint32_t words, uint32_t token, bool seed,
                     GreedyMemory memory) {
  for (uint32_t i = threadIdx.x; i < words; i += kEncodeThreads) {
    const uint32_t word = codes.word(token, i);
    memory.minimum[i] = seed ? word : min4(memory.minimum[i], word);
    memory.maximum[i] = seed ? word : max4(memory.maximum[i], word);
    uint2 sums = memory.sums[i];
    sums.x -= word & kEven;  // no 16-bit half borrows: the token is in its sum
    sums.y -= word >> 8 & kEven;
    memory.sums[i] = sums;
  }
}

__device__ void greedy_order(const Codec& codec, const BlockCodes& codes, RepackShared& shared,
                             GreedyMemory memory) {
  const uint32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  const uint32_t words = 2 * codes.part_words;
  for (uint32_t i = threadIdx.x; i < words; i += kEncodeThreads) {
    uint2 sums = make_uint2(0, 0);
    for (uint32_t token = 0; token < kBlockTokens; ++token) {
      const uint32_t word = codes.word(token, i);
      sums.x += word & kEven;
      sums.y += word >> 8 & kEven;
    }
    memory.sums[i] = sums;
  }
  for (uint32_t token = warp; token < kBlockTokens; token += kEncodeWarps) {
    uint32_t norm = 0;
    for (uint32_t i = lane; i < words; i += kWarpThreads) {
      const uint32_t word = codes.word(token, i);
      norm = __dp4a(word, word, norm);
    }
    norm = __reduce_add_sync(kEveryLane, norm);
    if (lane == 0) shared.norms[token] = norm;
  }
  if (threadIdx.x == 0) shared.left = ~0ull;
  __syncthreads();

  for (uint32_t position = 0; position < kBlockTokens; ++position) {
    const bool seed = position % codec.pack == 0;
    const uint64_t left = shared.left;
    if (seed) {
      const uint32_t count = kBlockTokens - position;
      for (uint32_t i = threadIdx.x; i < words; i += kEncodeThreads) {
        const uint2 sums = memory.sums[i];
        memory.mean[i] =
            round_half_even(sums.x & 0xffff, count) | round_half_even(sums.y & 0xffff, count) << 8 |
            round_half_even(sums.x >> 16, count) << 16 | round_half_even(sums.y >> 16, count) << 24;
      }
    }
    if (threadIdx.x == 0) shared.choice = ~0u;
    __syncthreads();

    for (uint32_t token = warp; token < kBlockTokens; token += kEncodeWarps) {
      if (!(left >> token & 1)) continue;
      uint32_t sum = 0;
      if (seed) {
        for (uint32_t i = lane; i < words; i += kWarpThreads)
          sum = __dp4a(codes.word(token, i), memory.mean[i], sum);
      } else {
        for (uint32_t i = lane; i < words; i += kWarpThreads) {
          const uint32_t word = codes.word(token, i);
          sum += widths_of(max4(memory.maximum[i], word) - min4(memory.minimum[i], word));
        }
      }
      sum = __reduce_add_sync(kEveryLane, sum);
      if (lane != 0) continue;
      if (seed) {
        const double product = static_cast<double>(sum);
        const uint32_t norm = shared.norms[token];
        shared.similarities[token] =
            norm == 0 ? 0.0 : __ddiv_rn(__dmul_rn(product, product), static_cast<double>(norm));
      } else {
        atomicMin(&shared.choice, sum * kBlockTokens + token);
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      uint32_t chosen = shared.choice % kBlockTokens;
      if (seed) {
        double best = -1;
        for (uint32_t token = 0; token < kBlockTokens; ++token) {
          if ((left >> token & 1) && shared.similarities[token] > best)
            best = shared.similarities[token], chosen = token;
        }
      }
      shared.choice = chosen;
      shared.order[position] = static_cast<uint8_t>(chosen);
      shared.left = left & ~(1ull << chosen);
    }
    __syncthreads();
    take(codes, words, shared.choice, seed, memory);
    __syncthreads();
  }
}

// Bits of the block in the order of `shared.order`, by the formula.
template <int kPack>
__device__ uint64_t order_bits(const Codec& codec, const uint8_t* key_codes, const uint8_t* value_codes,
                               RepackShared& shared) {
  if (threadIdx.x == 0) shared.bits = 0;
  if (threadIdx.x < kBlockTokens)
    shared.token_offsets[threadIdx.x] = shared.order[threadIdx.x] * codec.channels;
  __syncthreads();
  for (uint32_t row = threadIdx.x / kWarpThreads; row < codec.rows; row += kEncodeWarps) {
    const uint32_t widths =
        scan_row<kPack>(codec, key_codes, shared.token_offsets, row, nullptr, nullptr, nullptr) +
        scan_row<kPack>(codec, value_codes, shared.token_offsets, row, nullptr, nullptr, nullptr);
    if (threadIdx.x % kWarpThreads == 0)
      atomicAdd(&shared.bits, static_cast<unsigned long long>(kPack) * widths);
  }
  const int moved = threadIdx.x < kBlockTokens && shared.order[threadIdx.x] != threadIdx.x;
  const bool ordered = __syncthreads_or(moved);
  const uint64_t bits = shared.bits + (ordered ? 8 * kOrderBytes : 0);
  __syncthreads();
  return bits;
}

template <int kPack>
__global__ void __launch_bounds__(kEncodeThreads)
    RepackKernel(const __grid_constant__ Codec codec, const uint8_t* key_codes, const uint8_t* value_codes,
                 uint8_t* order) {
  extern __shared__ __align__(16) uint8_t dynamic[];
  __shared__ RepackShared shared;
  const uint32_t words = codec.channels / 2;
  uint32_t* state = reinterpret_cast<uint32_t*>(dynamic);
  const GreedyMemory memory = {state, state + words, state + 2 * words,
                               reinterpret_cast<uint2*>(state + 3 * words + words % 2)};

  for (uint64_t block = blockIdx.x; block < codec.blocks; block += gridDim.x) {
    const uint64_t begin = block * kBlockTokens * codec.channels;
    const BlockCodes codes = {reinterpret_cast<const uint32_t*>(key_codes + begin),
                              reinterpret_cast<const uint32_t*>(value_codes + begin), codec.channels / 4};
    if (threadIdx.x < kBlockTokens) shared.order[threadIdx.x] = static_cast<uint8_t>(threadIdx.x);
    __syncthreads();
    if (codec.repack == PH_KV_REPACK_MEDIAN)
      median_order(codec, value_codes + begin, shared.medians, shared.order);
    if (codec.repack == PH_KV_REPACK_GREEDY) greedy_order(codec, codes, shared, memory);
    if (codec.repack == PH_KV_REPACK_AUTO) {
      uint64_t least = ~0ull;
      for (const uint32_t candidate : {PH_KV_REPACK_NONE, PH_KV_REPACK_MEDIAN, PH_KV_REPACK_GREEDY}) {
        if (candidate == PH_KV_REPACK_MEDIAN)
          median_order(codec, value_codes + begin, shared.medians, shared.order);
        if (candidate == PH_KV_REPACK_GREEDY) greedy_order(codec, codes, shared, memory);
        const uint64_t bits = order_bits<kPack>(codec, key_codes + begin, value_codes + begin, shared);
        if (bits < least) {
          least = bits;
          if (threadIdx.x < kBlockTokens) shared.best_order[threadIdx.x] = shared.order[threadIdx.x];
        }
        __syncthreads();
      }
      if (threadIdx.x < kBlockTokens) shared.order[threadIdx.x] = shared.best_order[threadIdx.x];
    }
    __syncthreads();
    if (threadIdx.x < kBlockTokens) order[block * kBlockTokens + threadIdx.x] = shared.order[threadIdx.x];
    __syncthreads();
  }
}

// Dynamic shared memory: GreedyMemory, 10 bytes a channel.
uint32_t state_bytes_of(const Codec& codec) {
  return codec.repack >= PH_KV_REPACK_GREEDY ? 10 * codec.channels + 4 : 0;
}

}  // namespace

void check_repack(const ph_device& device, const Codec& codec) {
  constexpr uint32_t kStaticBytes = sizeof(RepackShared) + 64;
  if (state_bytes_of(codec) + kStaticBytes > static_cast<uint32_t>(device.shared_bytes)) {
    throw Error(PH_ERROR_UNSUPPORTED,
                "Cannot repack greedily with %u heads of %u channels: this GPU holds %u channels in all",
                codec.heads, codec.head_dim,
                (static_cast<uint32_t>(device.shared_bytes) - kStaticBytes) / 10);
  }
}

void repack(ph_device& device, const Codec& codec, const uint8_t* key_codes, const uint8_t* value_codes,
            uint8_t* order) {
  check_repack(device, codec);
  if (codec.blocks == 0) return;
  const uint32_t state_bytes = state_bytes_of(codec);
  dispatch_pack(codec.pack, [&](auto pack) {
    const auto kernel = RepackKernel<decltype(pack)::value>;
    allow_shared(device, kernel);
    kernel<<<grid_of(codec.blocks), kEncodeThreads, state_bytes, device.stream>>>(codec, key_codes,
                                                                                  value_codes, order);
  });
  PH_CUDA_TRY(cudaGetLastError());
}

}  // namespace ph::kv
