// A transport problem held on chip: what the kernels of small problems share.
//
// A thread block, or a cluster of up to eight, has a problem. Its n x m matrix lies in registers. A warp's lanes form
// kLaneRows x kLaneColumns, each lane has kRows x kColumns entries, and the warps of all thread blocks follow each other
// along the rows, so that sums of rows stay in a warp and need no barrier, and sums of columns take one. Lane (lr, lc) of warp
// w of a block has in entry [ii][jj]
//   row    first row of the block + w * kWarpRows + ii * kLaneRows + lr
//   column jj * kLaneColumns + lc
// A vector over the rows has one element a lane, the row ii = lc / (kLaneColumns / kRows) ("own"), and one over the columns
// kOwned a lane, those of jj = lr * kOwned + k, the same in all warps and blocks. All sums are in an order that depends on
// the sizes of a problem alone. Entries outside of the matrix have infinite cost.
#pragma once

#include <cfloat>
#include <cmath>

#include "ot/operations.h"
#include "ot/primitives.cuh"

namespace ph::ot {

template <int kLaneRows_, int kRows_, int kColumns_, int kMostWarps_, int kBlocks_>
struct Layout {
  static constexpr int kLaneRows = kLaneRows_, kRows = kRows_, kColumns = kColumns_;
  static constexpr int kLaneColumns = kWarp / kLaneRows;
  static constexpr int kOwned = kColumns / kLaneRows;      // columns of which a lane has a vector's elements
  static constexpr int kRowCopies = kLaneColumns / kRows;  // lanes that have the same row's
  static constexpr int kWarpRows = kLaneRows * kRows;      // rows of a warp
  static constexpr int kMostColumns = kLaneColumns * kColumns;
  static constexpr int kMostWarps = kMostWarps_;
  static constexpr int kBlocks = kBlocks_;  // thread blocks a multiprocessor that registers must suffice for
  // What a thread keeps of its entries in shared memory: eight lanes that read 16 bytes each meet no bank twice.
  static constexpr int kThreadFloats = kRows * kColumns + 4;
};
using Columns64 = Layout<4, 8, 8, 8, 2>;
using Columns128 = Layout<2, 8, 8, 8, 2>;
using Columns512 = Layout<1, 4, 16, 16, 1>;
constexpr uint32_t kMostRanks = 8;

// Points pass through shared memory in chunks of dimensions; rows are 16 bytes apart modulo 128, so that eight lanes that
// read 16 bytes of eight rows meet no bank twice.
constexpr uint32_t kChunk = 32;
constexpr uint32_t kPitch = kChunk + 4;
// For costs, chunks are shorter, and there is room for two, unless columns are many: one is on its way while the other is
// computed with.
constexpr uint32_t kCostChunk = 16;
constexpr uint32_t kCostPitch = kCostChunk + 4;

// A batch for a launch: Problem and the workspace's sizes.
struct Batch {
  const float *cost, *x, *y, *a, *b;
  const double *epsilons, *tolerances;
  double epsilon, tolerance;
  const int64_t *row_offsets, *column_offsets, *plan_offsets;
  const uint32_t* order;  // the problems of the launch
  uint32_t ranks;         // thread blocks a problem
  uint32_t dimension, cost_kind;
  float row_penalty, column_penalty;
  bool relative_epsilon;
  bool first;  // of a call's launches
};

// A call's launches overlap, see for_buckets: the first waits for what precedes the call, before it reads anything, and the
// last thread block of every other, at its end, for the launch before.
__device__ __forceinline__ void begin_launch(const Batch& batch) {
  if (batch.first) wait_for_preceding();
  let_next_begin();
}
__device__ __forceinline__ void end_launch(const Batch& batch) {
  if (!batch.first && blockIdx.x == gridDim.x - 1) wait_for_preceding();
}

// At the beginning of a thread block's shared memory, where addresses are constants.
template <typename L>
struct alignas(16) Control {
  float errors[2][L::kMostWarps];
  uint32_t flags[2][L::kMostWarps];
  float block_error[2];
  uint32_t block_flag[2];
  unsigned long long scratch[L::kMostWarps], block_scratch;
  float block_columns[2][L::kMostColumns];  // in a cluster
};

// Then comes room for partial sums of columns of every warp, twice, which a kernel may use for more at other times, and last
// what it puts in `entries`. All sizes are in floats, and multiples of four.
template <typename L>
__host__ __device__ constexpr uint32_t partial_floats(uint32_t warps) {
  return 2 * warps * L::kMostColumns;
}
template <typename L>
__host__ __device__ constexpr uint32_t shared_bytes(uint32_t work, uint32_t entries) {
  return static_cast<uint32_t>(sizeof(Control<L>) + (work + entries) * sizeof(float));
}

// A fault is its place; one of a cost comes after all of points.
constexpr unsigned long long kNoFault = ~0ull, kCostFault = 1ull << 62;

// Room for points of all rows of a block and all columns: a chunk of kChunk dimensions, or one or two of kCostChunk.
template <typename L>
constexpr bool kLoadsAhead = L::kMostColumns <= 128;
template <typename L>
__host__ __device__ constexpr uint32_t staged_floats(uint32_t warps) {
  return (warps * L::kWarpRows + L::kMostColumns) * (kLoadsAhead<L> ? 2 * kCostPitch : kPitch);
}
template <typename L>
__host__ __device__ constexpr uint32_t entry_floats(uint32_t warps) {
  return warps * kWarp * L::kThreadFloats;
}

struct Add {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Min {
  __device__ unsigned long long operator()(unsigned long long a, unsigned long long b) const {
    return a < b ? a : b;
  }
};

// Combines values[0 .. kCount) over lanes that differ in the bits kDistance, kDistance / 2, ... kLast, and leaves each lane
// the ones of its place, kCount / (number of lanes) of them but at least one.
template <int kCount, int kDistance, int kLast, typename Combine, int kSize>
__device__ __forceinline__ void combine_lanes(float (&values)[kSize], uint32_t lane, Combine combine) {
  if constexpr (kDistance >= kLast) {
    if constexpr (kCount > 1) {
      constexpr int kHalf = kCount / 2;
      const bool upper = (lane & kDistance) != 0;
#pragma unroll
      for (int k = 0; k < kHalf; ++k) {
        const float sent = upper ? values[k] : values[k + kHalf];
        const float kept = upper ? values[k + kHalf] : values[k];
        values[k] = combine(kept, __shfl_xor_sync(kAllLanes, sent, kDistance));
      }
      combine_lanes<kHalf, kDistance / 2, kLast>(values, lane, combine);
    } else {
      values[0] = combine(values[0], __shfl_xor_sync(kAllLanes, values[0], kDistance));
      combine_lanes<1, kDistance / 2, kLast>(values, lane, combine);
    }
  }
}

// f - C + g without the rounding of the first difference and of the sum, as potentials may be 10^4 times epsilon;
// infinite if either potential is, or the cost.
__device__ __forceinline__ float reduced_cost(float f, float c, float g) {
  const float difference = f - c, back = difference - f;
  const float lost = (f - (difference - back)) - (c + back);
  const float sum = difference + g, back_g = sum - difference;
  const float lost_g = (difference - (sum - back_g)) + (g - back_g);
  return fabsf(sum) <= FLT_MAX ? sum + (lost + lost_g) : -INFINITY;
}

template <typename L>
struct Tile {
  const Batch& batch;
  Control<L>& control;
  uint32_t thread, threads, lane, warp, warps, lane_row, lane_column;
  uint32_t rank, ranks;
  uint32_t problem, rows, columns;  // of the problem
  uint32_t first_row, block_rows;   // of this block
  uint32_t groups;                  // of kLaneColumns columns that hold some
  float* partials;
  float* entries;  // what threads keep for themselves, or a kernel puts here
  uint32_t turn = 0;

  __device__ __forceinline__ Tile(const Batch& batch_, float4* shared, uint32_t work)
      : batch(batch_), control(*reinterpret_cast<Control<L>*>(shared)) {
    thread = threadIdx.x;
    threads = blockDim.x;
    lane = thread % kWarp;
    warp = thread / kWarp;
    warps = threads / kWarp;
    lane_row = lane / L::kLaneColumns;
    lane_column = lane % L::kLaneColumns;
    ranks = batch.ranks;
    rank = ranks > 1 ? cluster_rank() : 0;
    problem = batch.order[blockIdx.x / ranks];
    rows = static_cast<uint32_t>(batch.row_offsets[problem + 1] - row_offset());
    columns = static_cast<uint32_t>(batch.column_offsets[problem + 1] - column_offset());
    const uint32_t most = warps * L::kWarpRows;
    first_row = min(rank * most, rows);
    block_rows = min(rows - first_row, most);
    groups = (columns + L::kLaneColumns - 1) / L::kLaneColumns;
    partials = reinterpret_cast<float*>(&control + 1);
    entries = partials + work;
  }

  // Of the problem's first row, column and entry.
  __device__ __forceinline__ int64_t row_offset() const { return batch.row_offsets[problem]; }
  __device__ __forceinline__ int64_t column_offset() const { return batch.column_offsets[problem]; }
  __device__ __forceinline__ int64_t plan_offset() const { return batch.plan_offsets[problem]; }

  // A row among those of the block, and a column.
  __device__ __forceinline__ uint32_t row_of(int ii) const {
    return warp * L::kWarpRows + ii * L::kLaneRows + lane_row;
  }
  __device__ __forceinline__ uint32_t column_of(int jj) const { return jj * L::kLaneColumns + lane_column; }
  __device__ __forceinline__ uint32_t own_row() const { return row_of(lane_column / L::kRowCopies); }
  __device__ __forceinline__ uint32_t own_column(int k) const { return column_of(lane_row * L::kOwned + k); }
  // Of the lanes that have the same row's element, and the warps and blocks that have the same column's, those that count.
  __device__ __forceinline__ bool counts_row() const {
    return lane_column % L::kRowCopies == 0 && own_row() < block_rows;
  }
  __device__ __forceinline__ bool counts_column(int k) const {
    return warp == 0 && rank == 0 && own_column(k) < columns;
  }

  // Entries that a thread keeps for itself, column by column, kThreadFloats a thread.
  __device__ __forceinline__ float4* kept() const {
    return reinterpret_cast<float4*>(entries + thread * L::kThreadFloats);
  }
  __device__ __forceinline__ void keep_entries(const float (&values)[L::kRows][L::kColumns]) const {
#pragma unroll
    for (int jj = 0; jj < L::kColumns; ++jj) {
#pragma unroll
      for (int ii = 0; ii < L::kRows; ii += 4)
        kept()[(jj * L::kRows + ii) / 4] =
            make_float4(values[ii][jj], values[ii + 1][jj], values[ii + 2][jj], values[ii + 3][jj]);
    }
  }
  __device__ __forceinline__ void read_kept(uint32_t jj, float (&column)[L::kRows]) const {
#pragma unroll
    for (int ii = 0; ii < L::kRows; ii += 4) {
      const float4 four = kept()[(jj * L::kRows + ii) / 4];
      column[ii] = four.x;
      column[ii + 1] = four.y;
      column[ii + 2] = four.z;
      column[ii + 3] = four.w;
    }
  }
  // Calls use(ii, jj, value) for all of them, with constant ii and jj.
  template <typename Use>
  __device__ __forceinline__ void for_entries(Use use) const {
#pragma unroll
    for (int jj = 0; jj < L::kColumns; ++jj) {
      float column[L::kRows];
      read_kept(jj, column);
#pragma unroll
      for (int ii = 0; ii < L::kRows; ++ii) use(ii, jj, column[ii]);
    }
  }
  // Calls use(owner, k, values) for all columns, as a loop over owners (the lane row that has their vectors' elements) of
  // little code: instructions are fetched more slowly than they are carried out.
  template <typename Use>
  __device__ __forceinline__ void for_kept_columns(Use use) const {
#pragma unroll 1
    for (uint32_t owner = 0; owner * L::kOwned < groups; ++owner) {
#pragma unroll
      for (int k = 0; k < L::kOwned; ++k) {
        float column[L::kRows];
        read_kept(owner * L::kOwned + k, column);
        use(owner, k, column);
      }
    }
  }
  // The element of a vector for column k of an owner.
  __device__ __forceinline__ float of_owner(const float (&own)[L::kOwned], uint32_t owner, int k) const {
    if constexpr (L::kLaneRows == 1) return own[k];
    return __shfl_sync(kAllLanes, own[k], owner * L::kLaneColumns + lane_column);
  }

  // The element of a vector for entry row ii, or column jj, from the lane that has it.
  __device__ __forceinline__ float of_row(float own, int ii) const {
    return __shfl_sync(kAllLanes, own, lane_row * L::kLaneColumns + ii * L::kRowCopies);
  }
  __device__ __forceinline__ void of_rows(float own, float (&all)[L::kRows]) const {
#pragma unroll
    for (int ii = 0; ii < L::kRows; ++ii) all[ii] = of_row(own, ii);
  }
  __device__ __forceinline__ void of_columns(const float (&own)[L::kOwned], float (&all)[L::kColumns]) const {
#pragma unroll
    for (int jj = 0; jj < L::kColumns; ++jj) all[jj] = of_column(own, jj);
  }
  __device__ __forceinline__ float of_column(const float (&own)[L::kOwned], int jj) const {
    if constexpr (L::kLaneRows == 1) return own[jj];
    return __shfl_sync(kAllLanes, own[jj % L::kOwned], jj / L::kOwned * L::kLaneColumns + lane_column);
  }

  // From values of every entry row to the own row's.
  template <typename Combine>
  __device__ __forceinline__ float combine_row(float (&values)[L::kRows], Combine combine) const {
    combine_lanes<L::kRows, L::kLaneColumns / 2, 1>(values, lane, combine);
    return values[0];
  }

  struct Sums {
    float error;
    bool flag;
  };
  // From values of every entry column to those of the own columns, of all rows of the problem; beside it the sum of
  // all warps' `error`, and whether any has `flag`, both the same in the lanes of a warp. One barrier.
  template <typename Combine>
  __device__ __forceinline__ Sums combine_columns(float (&values)[L::kColumns], float (&own)[L::kOwned],
                                                  float error, bool flag, Combine combine) {
    combine_lanes<L::kColumns, kWarp / 2, L::kLaneColumns>(values, lane, combine);
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) own[k] = values[k];
    return combine_warps(own, error, flag, combine);
  }
  // The same from values of the own columns, of the rows of the warp.
  template <typename Combine>
  __device__ __forceinline__ Sums combine_warps(float (&own)[L::kOwned], float error, bool flag,
                                                Combine combine) {
    // Two buffers: who writes one again has passed the barrier that follows the last reads of it.
    turn ^= 1;
    float* mine = partials + (turn * warps + warp) * L::kMostColumns;
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) mine[own_column(k)] = own[k];
    if (lane == 0) {
      control.errors[turn][warp] = error;
      control.flags[turn][warp] = flag;
    }
    __syncthreads();
    const float* all = partials + turn * warps * L::kMostColumns;
    Sums sums = {0.0f, false};
    for (uint32_t w = 0; w < warps; ++w) {
      sums.error += control.errors[turn][w];
      sums.flag |= control.flags[turn][w] != 0;
    }
    if (ranks == 1) {
#pragma unroll
      for (int k = 0; k < L::kOwned; ++k) own[k] = all[own_column(k)];
      for (uint32_t w = 1; w < warps; ++w) {
#pragma unroll
        for (int k = 0; k < L::kOwned; ++k)
          own[k] = combine(own[k], all[w * L::kMostColumns + own_column(k)]);
      }
      return sums;
    }
    float* block = control.block_columns[turn];
    for (uint32_t column = thread; column < L::kMostColumns; column += threads) {
      float value = all[column];
      for (uint32_t w = 1; w < warps; ++w) value = combine(value, all[w * L::kMostColumns + column]);
      block[column] = value;
    }
    if (thread == 0) {
      control.block_error[turn] = sums.error;
      control.block_flag[turn] = sums.flag;
    }
    cluster_sync();
    sums = {0.0f, false};
    for (uint32_t r = 0; r < ranks; ++r) {
      const float* there = in_cluster(block, r);
#pragma unroll
      for (int k = 0; k < L::kOwned; ++k) {
        const float value = there[own_column(k)];
        own[k] = r == 0 ? value : combine(own[k], value);
      }
      sums.error += in_cluster(control.block_error, r)[turn];
      sums.flag |= in_cluster(control.block_flag, r)[turn] != 0;
    }
    return sums;
  }

  // Sums over the own row, of entries times x of their columns.
  __device__ __forceinline__ float weighted_row(const float (&entries)[L::kRows][L::kColumns],
                                                const float (&x)[L::kOwned]) const {
    float sums[L::kRows];
#pragma unroll
    for (int ii = 0; ii < L::kRows; ++ii) sums[ii] = 0.0f;
#pragma unroll
    for (int jj = 0; jj < L::kColumns; ++jj) {
      const float each = of_column(x, jj);
      if (jj >= static_cast<int>(groups)) continue;
#pragma unroll
      for (int ii = 0; ii < L::kRows; ++ii) sums[ii] = fmaf(entries[ii][jj], each, sums[ii]);
    }
    return combine_row(sums, Add{});
  }
  // Sums over the own columns, of entries times x of their rows; for `error` and `flag` see combine_columns.
  __device__ __forceinline__ Sums weighted_columns(const float (&entries)[L::kRows][L::kColumns], float x,
                                                   float (&own)[L::kOwned], float error, bool flag) {
    float sums[L::kColumns], x_row[L::kRows];
    of_rows(x, x_row);
#pragma unroll
    for (int jj = 0; jj < L::kColumns; ++jj) sums[jj] = 0.0f;
#pragma unroll
    for (int pair = 0; pair < L::kColumns; pair += 2) {
      if (pair >= static_cast<int>(groups)) continue;
#pragma unroll
      for (int ii = 0; ii < L::kRows; ++ii) {
        sums[pair] = fmaf(entries[ii][pair], x_row[ii], sums[pair]);
        sums[pair + 1] = fmaf(entries[ii][pair + 1], x_row[ii], sums[pair + 1]);
      }
    }
    return combine_columns(sums, own, error, flag, Add{});
  }

  // The value of all threads of the block, or of the cluster, combined, for all of them.
  template <typename T, typename Combine>
  __device__ __forceinline__ T combine_block(T value, Combine combine) {
    static_assert(sizeof(T) <= sizeof control.scratch[0], "a value passes through 8 bytes");
    for (uint32_t distance = kWarp / 2; distance > 0; distance /= 2)
      value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
    __syncthreads();  // before scratch is written again
    if (lane == 0) *reinterpret_cast<T*>(control.scratch + warp) = value;
    __syncthreads();
    value = *reinterpret_cast<const T*>(control.scratch);
    for (uint32_t w = 1; w < warps; ++w)
      value = combine(value, *reinterpret_cast<const T*>(control.scratch + w));
    return value;
  }
  template <typename T, typename Combine>
  __device__ __forceinline__ T combine_all(T value, Combine combine) {
    value = combine_block(value, combine);
    if (ranks == 1) return value;
    if (thread == 0) *reinterpret_cast<T*>(&control.block_scratch) = value;
    cluster_sync();
    value = *reinterpret_cast<const T*>(in_cluster(&control.block_scratch, 0));
    for (uint32_t r = 1; r < ranks; ++r)
      value = combine(value, *reinterpret_cast<const T*>(in_cluster(&control.block_scratch, r)));
    cluster_sync();  // before it is written again, or the block ends
    return value;
  }
  __device__ __forceinline__ float sum_warp(float value) const {
    for (uint32_t distance = kWarp / 2; distance > 0; distance /= 2)
      value += __shfl_xor_sync(kAllLanes, value, distance);
    return value;
  }
};

// Copies dimensions [k, k + kLength) of `count` points to target [capacity][kLength + 4], 0 where there are none; scaled where
// `scales` is not null, and less `origin` where that is not null. Whether all values are finite.
template <uint32_t kLength, typename L>
__device__ __forceinline__ bool stage_points(const Tile<L>& tile, float* target, const float* points,
                                             const float* scales, const float* origin, uint32_t count,
                                             uint32_t capacity, uint32_t dimension, uint32_t k) {
  constexpr uint32_t kFours = kLength / 4;
  constexpr int kBatch = 4;  // are on their way at once
  float probe = 0.0f;        // NaN if any is not finite
#pragma unroll 1
  for (uint32_t first = tile.thread; first < capacity * kFours; first += kBatch * tile.threads) {
    float fours[kBatch][4];
#pragma unroll
    for (int each = 0; each < kBatch; ++each) {
      const uint32_t item = first + each * tile.threads, point = item / kFours, at = k + item % kFours * 4;
      const float* from = points + static_cast<uint64_t>(point) * dimension + at;
      if (dimension % 4 == 0) {
        float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (point < count && at < dimension) four = *reinterpret_cast<const float4*>(from);
        fours[each][0] = four.x;
        fours[each][1] = four.y;
        fours[each][2] = four.z;
        fours[each][3] = four.w;
      } else {
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i)
          fours[each][i] = point < count && at + i < dimension ? from[i] : 0.0f;
      }
    }
#pragma unroll
    for (int each = 0; each < kBatch; ++each) {
      const uint32_t item = first + each * tile.threads, point = item / kFours, at = item % kFours * 4;
      if (item >= capacity * kFours) break;
      float(&four)[4] = fours[each];
      const float scale = scales != nullptr && point < count ? scales[point] : 1.0f;
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        probe = fmaf(0.0f, four[i], probe);
        four[i] *= scale;
        if (origin != nullptr && point < count && k + at + i < dimension) four[i] -= origin[k + at + i];
      }
      *reinterpret_cast<float4*>(target + point * (kLength + 4) + at) =
          make_float4(four[0], four[1], four[2], four[3]);
    }
  }
  return probe == 0.0f;
}

// The same of whole fours, in the background, neither scaled nor looked at.
template <uint32_t kLength, typename L>
__device__ __forceinline__ void copy_points(const Tile<L>& tile, float* target, const float* points,
                                            uint32_t count, uint32_t capacity, uint32_t dimension,
                                            uint32_t k) {
  constexpr uint32_t kFours = kLength / 4;
#pragma unroll 1
  for (uint32_t item = tile.thread; item < capacity * kFours; item += tile.threads) {
    const uint32_t point = item / kFours, at = item % kFours * 4;
    const bool present = point < count && k + at < dimension;
    copy_ahead(target + point * (kLength + 4) + at,
               present ? points + static_cast<uint64_t>(point) * dimension + k + at : points, present);
  }
}
// Whether what the thread copied so is finite.
template <uint32_t kLength, typename L>
__device__ __forceinline__ bool probe_points(const Tile<L>& tile, const float* target, uint32_t capacity) {
  constexpr uint32_t kFours = kLength / 4;
  float probe = 0.0f;  // NaN if any is not finite
#pragma unroll 1
  for (uint32_t item = tile.thread; item < capacity * kFours; item += tile.threads) {
    const float4 four =
        *reinterpret_cast<const float4*>(target + item / kFours * (kLength + 4) + item % kFours * 4);
    probe = fmaf(0.0f, four.x, fmaf(0.0f, four.y, fmaf(0.0f, four.z, fmaf(0.0f, four.w, probe))));
  }
  return probe == 0.0f;
}

// 1 / |point| of every point, or 0 where that is 0; a warp a point. Points from `capacity` on count as 0.
template <typename L>
__device__ __forceinline__ void inverse_norms(const Tile<L>& tile, float* target, const float* points,
                                              uint32_t count) {
  const uint32_t dimension = tile.batch.dimension;
  for (uint32_t point = tile.warp; point < count; point += tile.warps) {
    float squares = 0.0f;
    for (uint32_t k = tile.lane; k < dimension; k += kWarp) {
      const float value = points[static_cast<unsigned long long>(point) * dimension + k];
      squares = fmaf(value, value, squares);
    }
    squares = tile.sum_warp(squares);
    if (tile.lane == 0) target[point] = squares > 0.0f ? 1.0f / sqrtf(squares) : 0.0f;
  }
}

__device__ __forceinline__ void read_four(const float* from, float (&to)[4]) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  to[0] = four.x;
  to[1] = four.y;
  to[2] = four.z;
  to[3] = four.w;
}

// Adds (x - y)^2, or x y, of 4 * fours dimensions of staged points.
template <bool kDifferences, typename L>
__device__ __forceinline__ void accumulate(const Tile<L>& tile, const float* staged_x, const float* staged_y,
                                           uint32_t fours, float (&sums)[L::kRows][L::kColumns]) {
#pragma unroll 1
  for (uint32_t four = 0; four < fours; ++four) {
    // Four rows at once, as all of their points would take too many registers.
#pragma unroll
    for (int first = 0; first < L::kRows; first += 4) {
      float x[4][4];
#pragma unroll
      for (int ii = 0; ii < 4; ++ii)
        read_four(staged_x + tile.row_of(first + ii) * kCostPitch + four * 4, x[ii]);
#pragma unroll
      for (int jj = 0; jj < L::kColumns; ++jj) {
        if (jj >= static_cast<int>(tile.groups)) break;
        float y[4];
        read_four(staged_y + tile.column_of(jj) * kCostPitch + four * 4, y);
#pragma unroll
        for (int ii = 0; ii < 4; ++ii) {
          float& sum = sums[first + ii][jj];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float difference = x[ii][i] - y[i];
            sum = kDifferences ? fmaf(difference, difference, sum) : fmaf(x[ii][i], y[i], sum);
          }
        }
      }
    }
  }
}

// Costs of the block's entries, infinite outside of the matrix, and whether this thread saw nothing that is wrong: a NaN
// among costs stays one. Points pass through `staged` [staged_floats]; `norms` [a float for every row and column there is
// room for] is filled with 1 / |point| for cosine costs.
// Differences of points are formed before they are squared: nothing cancels, however far from 0 the points lie.
template <typename L>
__device__ __forceinline__ bool load_costs(Tile<L>& tile, float* staged, float* norms,
                                           float (&costs)[L::kRows][L::kColumns]) {
  const Batch& batch = tile.batch;
  bool good = true;
  if (batch.cost != nullptr) {
    const float* matrix =
        batch.cost + tile.plan_offset() + static_cast<int64_t>(tile.first_row) * tile.columns;
#pragma unroll
    for (int ii = 0; ii < L::kRows; ++ii) {
      const bool in_rows = tile.row_of(ii) < tile.block_rows;
      const float* row = matrix + tile.row_of(ii) * tile.columns + tile.lane_column;
#pragma unroll
      for (int jj = 0; jj < L::kColumns; ++jj) {
        float cost = INFINITY;
        if (in_rows && tile.column_of(jj) < tile.columns) cost = row[jj * L::kLaneColumns];
        good &= cost >= -FLT_MAX;  // not NaN, nor -infinity
        costs[ii][jj] = cost;
      }
    }
    return good;
  }
  const uint32_t most_rows = tile.warps * L::kWarpRows, dimension = batch.dimension, kind = batch.cost_kind;
  const float* x = batch.x + (tile.row_offset() + tile.first_row) * dimension;
  const float* y = batch.y + tile.column_offset() * dimension;
  const float *x_scales = nullptr, *y_scales = nullptr;
  if (kind == PH_OT_COSINE) {
    x_scales = norms;
    y_scales = norms + most_rows;
    inverse_norms(tile, norms, x, tile.block_rows);
    inverse_norms(tile, norms + most_rows, y, tile.columns);
    __syncthreads();
  }
#pragma unroll
  for (int ii = 0; ii < L::kRows; ++ii) {
#pragma unroll
    for (int jj = 0; jj < L::kColumns; ++jj) costs[ii][jj] = 0.0f;
  }
  const bool in_background = dimension % 4 == 0 && x_scales == nullptr;
  const uint32_t most_columns = tile.groups * L::kLaneColumns,
                 turn = (most_rows + L::kMostColumns) * kCostPitch, y_at = most_rows * kCostPitch;
  const auto stage = [&](float* target, uint32_t k) {
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      const bool of_x = side == 0;
      float* to = of_x ? target : target + y_at;
      const float* points = of_x ? x : y;
      const uint32_t count = of_x ? tile.block_rows : tile.columns,
                     capacity = of_x ? most_rows : most_columns;
      if (in_background) copy_points<kCostChunk>(tile, to, points, count, capacity, dimension, k);
      else
        good &= stage_points<kCostChunk>(tile, to, points, of_x ? x_scales : y_scales, nullptr, count,
                                         capacity, dimension, k);
    }
    end_copies();
  };
  stage(staged, 0);
  for (uint32_t k = 0, now = 0; k < dimension; k += kCostChunk, now ^= kLoadsAhead<L>) {
    float* staged_x = staged + now * turn;
    if (!kLoadsAhead<L> && k > 0) stage(staged, k);
    if (kLoadsAhead<L> && k + kCostChunk < dimension) {
      stage(staged + (now ^ 1) * turn, k + kCostChunk);
      await_copies<1>();
    } else {
      await_copies<0>();
    }
    if (in_background) {
      good &= probe_points<kCostChunk>(tile, staged_x, most_rows);
      good &= probe_points<kCostChunk>(tile, staged_x + y_at, most_columns);
    }
    __syncthreads();
    const uint32_t fours = (min(dimension - k, kCostChunk) + 3) / 4;
    if (kind != PH_OT_DOT) accumulate<true>(tile, staged_x, staged_x + y_at, fours, costs);
    else accumulate<false>(tile, staged_x, staged_x + y_at, fours, costs);
    __syncthreads();  // before points are overwritten
  }
  const auto change = [&](auto changed) {
#pragma unroll
    for (int ii = 0; ii < L::kRows; ++ii) {
#pragma unroll
      for (int jj = 0; jj < L::kColumns; ++jj) costs[ii][jj] = changed(ii, jj, costs[ii][jj]);
    }
  };
  if (kind == PH_OT_EUCLIDEAN) {
    change([](int, int, float cost) { return square_root(cost); });
  } else if (kind == PH_OT_DOT) {
    change([](int, int, float cost) { return -cost; });
  } else if (kind == PH_OT_COSINE) {
    // 1 - x.y = |x - y|^2 / 2 of points of length 1, and 1 where a point is at 0.
    bool x_at_0[L::kRows], y_at_0[L::kColumns];
#pragma unroll
    for (int ii = 0; ii < L::kRows; ++ii) x_at_0[ii] = norms[tile.row_of(ii)] == 0.0f;
#pragma unroll
    for (int jj = 0; jj < L::kColumns; ++jj) y_at_0[jj] = norms[most_rows + tile.column_of(jj)] == 0.0f;
    change([&](int ii, int jj, float cost) { return x_at_0[ii] || y_at_0[jj] ? 1.0f : 0.5f * cost; });
  }
  change([&](int ii, int jj, float cost) {
    if (tile.row_of(ii) >= tile.block_rows || tile.column_of(jj) >= tile.columns) cost = INFINITY;
    good &= cost >= -FLT_MAX;
    return cost;
  });
  return good;
}

// The first fault of costs that threads have kept, or of the points. All threads of the cluster call it.
template <typename L>
__device__ __forceinline__ unsigned long long find_fault(Tile<L>& tile) {
  const Batch& batch = tile.batch;
  unsigned long long fault = kNoFault;
  const float* own = tile.entries + tile.thread * L::kThreadFloats;
#pragma unroll 1
  for (int e = 0; e < L::kRows * L::kColumns; ++e) {
    if (own[e] >= -FLT_MAX) continue;
    const unsigned long long row = tile.first_row + tile.row_of(e % L::kRows);
    fault = min(fault, kCostFault | (row * tile.columns + tile.column_of(e / L::kRows)));
  }
  if (batch.cost == nullptr) {
    const uint64_t x_count = static_cast<uint64_t>(tile.rows) * batch.dimension,
                   count = x_count + static_cast<uint64_t>(tile.columns) * batch.dimension;
    const float* x = batch.x + tile.row_offset() * batch.dimension;
    const float* y = batch.y + tile.column_offset() * batch.dimension;
#pragma unroll 1
    for (uint64_t i = tile.thread; i < count; i += tile.threads) {
      if (fabsf(i < x_count ? x[i] : y[i - x_count]) <= FLT_MAX) continue;
      fault = i;
      break;
    }
  }
  return tile.combine_all(fault, Min{});
}

// Writes the block's entries, through tile.entries, which nobody reads any more.
template <typename L>
__device__ __forceinline__ void write_entries(const Tile<L>& tile,
                                              const float (&values)[L::kRows][L::kColumns], float* out) {
  const uint32_t columns = hidden(tile.columns), rows = hidden(tile.block_rows);
#pragma unroll
  for (int ii = 0; ii < L::kRows; ++ii) {
    const bool in_rows = tile.row_of(ii) < rows;
    float* row = tile.entries + tile.row_of(ii) * columns + tile.lane_column;
#pragma unroll
    for (int jj = 0; jj < L::kColumns; ++jj)
      if (in_rows && tile.column_of(jj) < columns) row[jj * L::kLaneColumns] = values[ii][jj];
  }
  __syncthreads();
  float* target = out + tile.plan_offset() + static_cast<int64_t>(tile.first_row) * columns;
  const uint32_t count = rows * columns;
  for (uint32_t i = tile.thread; i < count; i += tile.threads) __stcs(target + i, tile.entries[i]);
}

}  // namespace ph::ot
