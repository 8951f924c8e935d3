// Packed tiles from the pool's pages into shared memory, some ahead of the one that a warp works on: bulk copies that
// complete a barrier, or asynchronous copies of 16 bytes a lane on GPUs before sm_90. Every slot belongs to one warp.
#pragma once

#include "attention/tile.cuh"
#include "kv/cache.h"

namespace ph::attention {

constexpr uint32_t kStages = 2;  // tiles ahead, or batches of tiles, unless shared memory is short

// Bulk copies are fastest where source and target are as far from the begin of a sector.
constexpr uint32_t kSectorBytes = 32;
PH_HOST_DEVICE constexpr uint32_t round_to_sectors(uint32_t bytes) {
  return (bytes + kSectorBytes - 1) / kSectorBytes * kSectorBytes;
}

// What lies in one page of a run of bytes.
struct SpanPiece {
  const uint8_t* source;
  uint32_t offset, bytes;  // `offset` within the run
};

// A run of bytes in a stream, in one or two pages.
struct Span {
  uint16_t unit;  // within the first page
  uint16_t units;
  uint32_t pages[2];

  __device__ __forceinline__ SpanPiece piece(const uint8_t* pool, bool second) const {
    const uint32_t first = min(static_cast<uint32_t>(units), kv::kPageUnits - unit);
    return {pool + (second ? pages[1] * kv::kPageBytes : pages[0] * kv::kPageBytes + unit * kv::kUnitBytes),
            second ? first * kv::kUnitBytes : 0, (second ? units - first : first) * kv::kUnitBytes};
  }
};

__device__ __forceinline__ Span make_span(const uint32_t* page_table, uint32_t begin, uint32_t end) {
  return {static_cast<uint16_t>(begin % kv::kPageUnits),
          static_cast<uint16_t>(end - begin),
          {page_table[begin / kv::kPageUnits], page_table[(end - 1) / kv::kPageUnits]}};
}

// A span's way into a slot, where it comes to lie as far from a sector's begin as in the pool. Not of 0 bytes.
struct alignas(16) SpanCopy {
  const uint8_t* source;
  uint16_t first_bytes, bytes;  // in its first page, and in all
  uint32_t second_page;

  __device__ __forceinline__ uint32_t sector_offset() const {
    return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(source)) % kSectorBytes;
  }
  __device__ __forceinline__ bool straddles() const { return first_bytes < bytes; }
};
static_assert(kv::kPageBytes % kSectorBytes == 0);

__device__ __forceinline__ SpanCopy make_copy(const uint8_t* pool, const Span& span) {
  const SpanPiece first = span.piece(pool, false);
  return {first.source, static_cast<uint16_t>(first.bytes),
          static_cast<uint16_t>(span.units * kv::kUnitBytes), span.pages[1]};
}

// The copies of a tile.
struct TileCopies {
  SpanCopy params, record;

  // The sector, of a slot, in which the record begins.
  static constexpr uint32_t kRecordSector =
      round_to_sectors(kv::kParamsBytes + kSectorBytes - kv::kUnitBytes);

  // Where they come to lie in a slot.
  __device__ __forceinline__ uint32_t params_position() const { return params.sector_offset(); }
  __device__ __forceinline__ uint32_t record_position() const {
    return kRecordSector + record.sector_offset();
  }
};

// Bytes of a slot for records of up to so many.
constexpr uint32_t tile_slot_bytes(uint32_t record_bytes) {
  return TileCopies::kRecordSector + round_to_sectors(record_bytes + kSectorBytes - kv::kUnitBytes);
}

// What L2 does with what is copied: nothing special, or drops it first. These are createpolicy's evict_unchanged, which is as
// fast as no policy, and evict_first.
enum class Reads : uint64_t { kAgain = 0x10f0000000000000, kOnce = 0x12f0000000000000 };

__device__ __forceinline__ void bulk_copy(uint32_t target, const uint8_t* source, uint32_t bytes,
                                          uint32_t barrier, Reads reads) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(target),
      "l"(source), "r"(bytes), "r"(barrier), "l"(static_cast<uint64_t>(reads))
      : "memory");
#endif
}

// True in one lane of a warp, all of which call it.
__device__ __forceinline__ bool is_elected() {
#if __CUDA_ARCH__ >= 900
  uint32_t elected;
  asm volatile("{\n .reg .pred p;\n elect.sync _|p, 0xffffffff;\n selp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected != 0;
#else
  return threadIdx.x % kWarpThreads == 0;
#endif
}

// Barriers in shared memory (mbarrier): one thread begins and publishes them.
__device__ __forceinline__ void begin_barrier(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}
__device__ __forceinline__ void publish_barriers() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// A warp's own, for one arrival each.
template <uint32_t kCount>
__device__ __forceinline__ void begin_barriers(uint64_t (&barriers)[kCount]) {
  if (threadIdx.x % kWarpThreads == 0) {
#pragma unroll
    for (uint64_t& barrier : barriers) begin_barrier(&barrier, 1);
    publish_barriers();
  }
  __syncwarp();
}
// For barriers of one phase.
__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile(
      "{\n .reg .b64 state;\n mbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(shared_address(barrier))
      : "memory");
}
__device__ __forceinline__ void await(uint64_t* barrier) {
  asm volatile(
      "{\n .reg .pred done;\n"
      "again_%=:\n mbarrier.test_wait.parity.shared::cta.b64 done, [%0], 0;\n"
      " @!done bra again_%=;\n}" ::"r"(shared_address(barrier))
      : "memory");
}

// The slots into which a warp's tiles come.
struct Ring {
  uint8_t* slots;  // [stages][slot_bytes]: params, then record
  uint32_t slot_bytes, stages;
  uint64_t* barriers;  // [stages]

  // Where there is no tile any more.
  __device__ __forceinline__ void skip() const {
#if __CUDA_ARCH__ < 900
    kv::copy_commit();
#endif
  }

  // Starts the copies of a tile to where they belong in a slot. All lanes call it, with the same, or `skip`, once per tile in
  // turn. The last copy is of params, which the other heads read as well; all else is read once, and would only take the
  // place in L2 of what is read again, or of what was written and need not go to memory yet.
  template <int kCopies>
  __device__ __forceinline__ void copy(const uint8_t* pool, uint32_t stage, const SpanCopy (&copies)[kCopies],
                                       const uint32_t (&positions)[kCopies]) const {
    uint8_t* slot = slots + stage * slot_bytes;
#if __CUDA_ARCH__ >= 900
    const uint32_t barrier = shared_address(barriers + stage), target = shared_address(slot);
    const auto reads = [](int which) { return which + 1 < kCopies ? Reads::kOnce : Reads::kAgain; };
    uint32_t bytes = 0;
    bool straddles = false;
#pragma unroll
    for (int which = 0; which < kCopies; ++which) {
      bytes += copies[which].bytes;
      straddles |= copies[which].straddles();
    }
    // Of an elected lane, the compiler knows that it is one: a copy takes its operands from uniform registers, and lanes
    // would take turns in a loop.
    if (is_elected()) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                   : "memory");
#pragma unroll
      for (int which = 0; which < kCopies; ++which)
        bulk_copy(target + positions[which], copies[which].source, copies[which].first_bytes, barrier,
                  reads(which));
    }
    // A vote, so that this is a branch, and rare.
    if (__any_sync(kEveryLane, straddles)) {
#pragma unroll
      for (int which = 0; which < kCopies; ++which) {
        const SpanCopy& copy = copies[which];
        if (copy.straddles() && is_elected())
          bulk_copy(target + positions[which] + copy.first_bytes, pool + copy.second_page * kv::kPageBytes,
                    copy.bytes - copy.first_bytes, barrier, reads(which));
      }
    }
#else
#pragma unroll
    for (int which = 0; which < kCopies; ++which) {
      const SpanCopy& copy = copies[which];
      for (uint32_t at = threadIdx.x % kWarpThreads * kv::kUnitBytes; at < copy.bytes;
           at += kWarpThreads * kv::kUnitBytes) {
        const uint8_t* source = at < copy.first_bytes
                                    ? copy.source + at
                                    : pool + copy.second_page * kv::kPageBytes + (at - copy.first_bytes);
        kv::copy_async(reinterpret_cast<uint4*>(slot + positions[which] + at), source);
      }
    }
    skip();
#endif
  }

  // After a slot was used as ordinary shared memory, and before the next fetch into it.
  __device__ __forceinline__ void reuse() const {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    __syncwarp();
  }

  // Whether a tile is there, which `wait` then need not ask: the answer takes its time.
  __device__ __forceinline__ uint32_t is_ready(uint32_t stage, uint32_t phase) const {
    uint32_t ready = 0;
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n .reg .pred done;\n mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        " selp.u32 %0, 1, 0, done;\n}"
        : "=r"(ready)
        : "r"(shared_address(barriers + stage)), "r"(phase)
        : "memory");
#endif
    return ready;
  }

  // Of tiles that are taken kBatch at a time, each is waited for.
  template <uint32_t kBatch = 1>
  __device__ __forceinline__ void wait(uint32_t stage, uint32_t phase, uint32_t ready = 0) const {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n .reg .pred done;\n setp.ne.u32 done, %2, 0;\n @done bra.uni ready_%=;\n"
        "again_%=:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        " @done bra.uni ready_%=;\n bra.uni again_%=;\nready_%=:\n}" ::"r"(shared_address(barriers + stage)),
        "r"(phase), "r"(ready)
        : "memory");
#else
    constexpr uint32_t kBehind = kBatch * (kStages - 1);  // tiles that may still be on their way
    if (stages == kBatch * kStages) asm volatile("cp.async.wait_group %0;" ::"n"(kBehind) : "memory");
    else kv::copy_wait();
    __syncwarp();
#endif
  }
};

}  // namespace ph::attention
