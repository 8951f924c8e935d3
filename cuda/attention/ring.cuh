// Packed tiles from the pool's pages into shared memory, some ahead of the one that a warp works on: bulk copies that
// complete a barrier, or asynchronous copies of 16 bytes a lane on GPUs before sm_90. Every slot belongs to one warp.
#pragma once

#include "attention/tile.cuh"
#include "kv/cache.h"

namespace ph::attention {

constexpr uint32_t kStages = 2;  // tiles ahead, unless shared memory is short

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

  __device__ __forceinline__ bool straddles() const {
    return unit + units > static_cast<int>(kv::kPageUnits);
  }
  __device__ __forceinline__ SpanPiece piece(const uint8_t* pool, bool second) const {
    const uint32_t first = min(static_cast<uint32_t>(units), kv::kPageUnits - unit);
    return {pool + (second ? pages[1] * kv::kPageBytes : pages[0] * kv::kPageBytes + unit * kv::kUnitBytes),
            second ? first * kv::kUnitBytes : 0, (second ? units - first : first) * kv::kUnitBytes};
  }
};

// How far into a sector a span begins.
__device__ __forceinline__ uint32_t sector_offset(const Span& span) {
  return span.unit * kv::kUnitBytes % kSectorBytes;
}

__device__ __forceinline__ Span make_span(const uint32_t* page_table, uint32_t begin, uint32_t end) {
  return {static_cast<uint16_t>(begin % kv::kPageUnits),
          static_cast<uint16_t>(end - begin),
          {page_table[begin / kv::kPageUnits], page_table[(end - 1) / kv::kPageUnits]}};
}

// Where a tile's params and record are.
struct TileSpans {
  Span params, record;

  // Where they come to lie in a slot: as far from a sector's begin as in the pool.
  __device__ __forceinline__ uint32_t params_position() const { return sector_offset(params); }
  __device__ __forceinline__ uint32_t record_position() const {
    return kRecordSector + sector_offset(record);
  }
  // The sector, of a slot, in which the record begins.
  static constexpr uint32_t kRecordSector =
      round_to_sectors(kv::kParamsBytes + kSectorBytes - kv::kUnitBytes);
};

// Bytes of a slot for records of up to so many.
constexpr uint32_t tile_slot_bytes(uint32_t record_bytes) {
  return TileSpans::kRecordSector + round_to_sectors(record_bytes + kSectorBytes - kv::kUnitBytes);
}

__device__ __forceinline__ void bulk_copy(uint32_t target, const uint8_t* source, uint32_t bytes,
                                          uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
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

  // For a warp that begins its own barriers; where a thread block does it for all, a barrier follows.
  __device__ __forceinline__ void begin() const {
    if (threadIdx.x % kWarpThreads == 0) {
      for (uint32_t stage = 0; stage < stages; ++stage) begin_barrier(barriers + stage, 1);
      publish_barriers();
    }
    __syncwarp();
  }

  // Where there is no tile any more.
  __device__ __forceinline__ void skip() const {
#if __CUDA_ARCH__ < 900
    kv::copy_commit();
#endif
  }

  // Starts the copies of a tile's spans to where they belong in a slot. All lanes call it or `skip`, once per tile in turn.
  template <int kSpans>
  __device__ __forceinline__ void copy(const uint8_t* pool, uint32_t stage, const Span (&spans)[kSpans],
                                       const uint32_t (&positions)[kSpans]) const {
    uint8_t* slot = slots + stage * slot_bytes;
#if __CUDA_ARCH__ >= 900
    // By one lane: a copy takes its operands from uniform registers, and lanes would take turns in a loop.
    const uint32_t barrier = shared_address(barriers + stage);
    const auto copy_piece = [&](int which, bool second) {
      const SpanPiece piece = spans[which].piece(pool, second);
      if (piece.bytes > 0)
        bulk_copy(shared_address(slot) + positions[which] + piece.offset, piece.source, piece.bytes, barrier);
    };
    uint32_t units = 0;
    bool straddles = false;
#pragma unroll
    for (int which = 0; which < kSpans; ++which) {
      units += spans[which].units;
      straddles |= spans[which].straddles();
    }
    if (threadIdx.x % kWarpThreads == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                   "r"(units * kv::kUnitBytes)
                   : "memory");
#pragma unroll
      for (int which = 0; which < kSpans; ++which) copy_piece(which, false);
    }
    // A vote, so that this is a branch, and rare.
    if (__any_sync(kEveryLane, straddles)) {
      if (threadIdx.x % kWarpThreads == 0) {
#pragma unroll
        for (int which = 0; which < kSpans; ++which) copy_piece(which, true);
      }
      __syncwarp();
    }
#else
#pragma unroll
    for (int which = 0; which < kSpans; ++which) {
      const Span& span = spans[which];
      for (uint32_t at = threadIdx.x % kWarpThreads; at < span.units; at += kWarpThreads) {
        const SpanPiece piece = span.piece(pool, span.unit + at >= kv::kPageUnits);
        kv::copy_async(reinterpret_cast<uint4*>(slot + positions[which] + at * kv::kUnitBytes),
                       piece.source + at * kv::kUnitBytes - piece.offset);
      }
    }
    skip();
#endif
  }

  // Starts a tile's copy into a slot, or none for a null `spans`.
  __device__ __forceinline__ void fetch(const uint8_t* pool, const TileSpans* spans, uint32_t stage) const {
    if (spans == nullptr) return skip();
    copy(pool, stage, {spans->record, spans->params}, {spans->record_position(), spans->params_position()});
  }

  // After a slot was used as ordinary shared memory, and before the next fetch into it.
  __device__ __forceinline__ void reuse() const {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    __syncwarp();
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

}  // namespace ph::attention
