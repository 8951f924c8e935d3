// Packed tiles from the pool's pages into shared memory, some ahead of the one that a warp works on: bulk copies that
// complete a barrier, or asynchronous copies of 16 bytes a lane on GPUs before sm_90. Every slot belongs to one warp.
#pragma once

#include "attention/tile.cuh"
#include "kv/cache.h"

namespace ph::attention {

constexpr uint32_t kStages = 2;  // tiles ahead, unless shared memory is short

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

struct TileSpans {
  Span params, record;
};

__device__ __forceinline__ Span make_span(const uint32_t* page_table, uint32_t begin, uint32_t end) {
  return {static_cast<uint16_t>(begin % kv::kPageUnits),
          static_cast<uint16_t>(end - begin),
          {page_table[begin / kv::kPageUnits], page_table[(end - 1) / kv::kPageUnits]}};
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

  // Starts the copies of a tile into a slot, `total` bytes in all: each of the first kCopies lanes looks after one, of its
  // own `bytes`, a multiple of 16 or 0. All lanes call it or `skip`, once per tile in turn.
  template <int kCopies>
  __device__ __forceinline__ void copy(uint32_t stage, const uint8_t* source, uint8_t* target, uint32_t bytes,
                                       uint32_t total) const {
    const uint32_t lane = threadIdx.x % kWarpThreads;
#if __CUDA_ARCH__ >= 900
    const uint32_t barrier = shared_address(barriers + stage);
    if (lane == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(total)
                   : "memory");
    }
    __syncwarp();
    if (lane < kCopies && bytes > 0) {
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
              shared_address(target)),
          "l"(source), "r"(bytes), "r"(barrier)
          : "memory");
    }
#else
    for (int piece = 0; piece < kCopies; ++piece) {
      const uint32_t piece_bytes = __shfl_sync(kEveryLane, bytes, piece);
      const uint64_t from = __shfl_sync(kEveryLane, reinterpret_cast<uint64_t>(source), piece);
      const uint64_t to = __shfl_sync(kEveryLane, reinterpret_cast<uint64_t>(target), piece);
      for (uint32_t at = lane * 16; at < piece_bytes; at += kWarpThreads * 16)
        kv::copy_async(reinterpret_cast<uint4*>(to + at), reinterpret_cast<const uint8_t*>(from) + at);
    }
#endif
    skip();
  }

  // Where there is no tile any more.
  __device__ __forceinline__ void skip() const {
#if __CUDA_ARCH__ < 900
    kv::copy_commit();
#endif
  }

  // Starts a tile's copy, or none for a null `spans`. Lanes 0 and 1 look after the record's one or two pieces, lanes 2 and
  // 3 after those of the params.
  __device__ __forceinline__ void fetch(const uint8_t* pool, const TileSpans* spans, uint32_t stage) const {
    if (spans == nullptr) return skip();
    const uint32_t lane = threadIdx.x % kWarpThreads;
    const Span span = lane < 2 ? spans->record : spans->params;
    const SpanPiece piece = span.piece(pool, lane % 2 == 1);
    copy<4>(stage, piece.source,
            slots + stage * slot_bytes + (lane < 2 ? kv::kParamsBytes : 0) + piece.offset, piece.bytes,
            (spans->params.units + spans->record.units) * kv::kUnitBytes);
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
