// What the kernels of append share: what they are launched with, and the tokens that stay in 16 bits.
#pragma once

#include "device/overlap.cuh"
#include "kv/cache.cuh"

namespace ph::kv {

struct AppendParameters {
  CacheView cache;
  TileShape shape;
  StepView step;
  StepTensors tensors;
  uint32_t layer;
  unsigned long long* non_finite;
};

// Thread blocks that share the new tokens of a sequence: one for each, where there are few.
inline uint32_t copy_splits(const CacheView& cache, const StepView& step) {
  constexpr uint32_t kMostCopyBlocks = 4096;  // of all sequences, about
  const uint32_t tokens =
      step.most_queries < cache.sinks + cache.ring ? step.most_queries : cache.sinks + cache.ring;
  const uint32_t most = kMostCopyBlocks / step.sequence_count;
  return tokens < most ? tokens : most > 0 ? most : 1;
}

// Copies 16-byte units [0, count) by kThreads threads of a thread block, some of them at once: `source` and `target` name a
// unit's places.
template <uint32_t kThreads, typename Source, typename Target>
__device__ __forceinline__ void copy_units(uint32_t count, Source source, Target target) {
  constexpr uint32_t kAtOnce = 4;
  for (uint32_t first = threadIdx.x % kThreads; first < count; first += kAtOnce * kThreads) {
    uint4 held[kAtOnce];
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i) {
      if (first + kThreads * i < count) held[i] = *source(first + kThreads * i);
    }
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i) {
      if (first + kThreads * i < count) *target(first + kThreads * i) = held[i];
    }
  }
}

// A sequence's new tokens that stay in 16 bits: its new sinks, then the newest of all.
struct KeptTokens {
  uint64_t first_newest;
  uint32_t sinks, count;

  __device__ __forceinline__ KeptTokens(const CacheView& cache, const StepSequence& sequence) {
    const uint64_t end = sequence.before + sequence.tokens;
    const uint64_t sinks_end = min(end, static_cast<uint64_t>(cache.sinks));
    sinks = sequence.before < sinks_end ? static_cast<uint32_t>(sinks_end - sequence.before) : 0;
    first_newest = max(sequence.before + sinks, end > cache.ring ? end - cache.ring : 0);
    count = sinks + static_cast<uint32_t>(end - first_newest);
  }
  __device__ __forceinline__ uint64_t token(const StepSequence& sequence, uint32_t i) const {
    return i < sinks ? sequence.before + i : first_newest + (i - sinks);
  }
};

// Whether a kept token goes to the place of one that the step packs: of a token from before the step, the newest that had
// the place, that is not packed yet. Every such one lies in a block of the step, as fewer than `ring` tokens stay unpacked.
__device__ __forceinline__ bool replaces_unpacked(const CacheView& cache, const StepSequence& sequence,
                                                  uint64_t token) {
  if (token < cache.sinks) return false;
  const uint32_t turns = static_cast<uint32_t>(token - sequence.before) / cache.ring + 1;
  return token >= block_start(cache, sequence.first_block) + static_cast<uint64_t>(turns) * cache.ring;
}

// The kept token that goes to the place of `token`, which is from before the step and not packed yet; `token` itself where
// none does.
__device__ __forceinline__ uint64_t replacement(const CacheView& cache, const StepSequence& sequence,
                                                uint64_t token) {
  const uint32_t newer = static_cast<uint32_t>(sequence.before + sequence.tokens - 1 - token);
  return token + newer / cache.ring * cache.ring;
}

// Copies a sequence's kept tokens `split`, `split + splits` and so on to their places. kPacking: but for those that
// replace_unpacked.
template <bool kPacking, uint32_t kThreads>
__device__ __forceinline__ void copy_kept(const AppendParameters& append, const StepSequence& sequence,
                                          uint32_t split, uint32_t splits) {
  const CacheView& cache = append.cache;
  const KeptTokens kept(cache, sequence);
  const uint32_t vectors = cache.heads * cache.head_dim / kVectorValues;
  for (uint32_t i = split; i < kept.count; i += splits) {
    const uint64_t token = kept.token(sequence, i);
    if (kPacking && replaces_unpacked(cache, sequence, token)) continue;
    const uint64_t from = (sequence.input + (token - sequence.before)) * vectors;
    const uint64_t to = static_cast<uint64_t>(recent_slot(cache, token)) * vectors;
    copy_units<kThreads>(
        kParts * vectors,
        [&](uint32_t unit) {
          const uint32_t part = unit < vectors ? PH_KV_KEYS : PH_KV_VALUES;
          return reinterpret_cast<const uint4*>(append.tensors.parts[part]) + from + (unit - part * vectors);
        },
        [&](uint32_t unit) {
          const uint32_t part = unit < vectors ? PH_KV_KEYS : PH_KV_VALUES;
          return reinterpret_cast<uint4*>(recent_part(cache, append.layer, sequence.sequence, part)) + to +
                 (unit - part * vectors);
        });
  }
}

// ---- append_cluster.cu ----

// Whether a cluster of thread blocks can pack a block, with all its kv heads.
bool can_pack_in_clusters(const ph_device& device, const CacheView& cache);

// Packs the step's blocks and copies its kept tokens, in one launch.
void append_in_clusters(const ph_device& device, const AppendParameters& parameters, uint8_t* workspace);

// Bytes of its workspace, which must be 0 at first and is again after every launch.
uint64_t cluster_workspace_bytes(uint64_t blocks);

}  // namespace ph::kv
