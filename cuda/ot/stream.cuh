// Sinkhorn's iterations of one large problem, on all of the GPU, that never hold its n x m entries.
//
// One cooperative launch makes all iterations. A pass computes, for every row (or, with the sides exchanged, every column), a
// sum over all columns of 2^(exponent) with exponent = (f + g - C) log2(e) / epsilon: thread blocks have equal shares of the
// tiles of kTileRows rows x kTileColumns columns, in the order of the rows, so that rows are one to kMostParts blocks'. Who
// of them ends last adds what they have, in their order, and updates the potentials; then all blocks meet, once a pass, and
// add the errors of all tiles of rows, each for itself: results are the same every time. The first iteration keeps the
// largest exponent beside each sum; afterwards all exponents are relative to the potentials before, with which plans have
// columns of the right mass, so that none is above 0 and sums are at least the product of two masses.
//
// Where costs come from:
//   Halves       squared Euclidean, cosine and dot costs of up to 64 dimensions: x.y by tensor cores. A coordinate, less the
//                points' mean and scaled by a power of two, is the sum of two float16, 22 bits; three products of them lack only
//                low x low, 2^-22 of the largest. Row points stay in registers in the fragments of mma.m16n8k16, columns'
//                come through shared memory two tiles ahead, [column][hi 64, lo 64], with rows 16 bytes apart modulo 128.
//                Memory: 4 n d bytes of halves; what a pass reads comes from the second cache.
//   Differences  all other costs of points: (x - y)^2 or x y in float32
//   Matrix       costs that are given
// A warp has 32 rows; a lane has of each 16 columns four rows (32 w + 16 m + 8 h + lane / 4) and four columns (8 n + 2 (lane
// % 4) + i), as fragments of sums do.
#pragma once

#include <cuda_fp16.h>

#include "ot/tile.cuh"

namespace ph::ot {

constexpr uint32_t kStreamThreads = 128, kStreamWarps = 4;
constexpr uint32_t kTileRows = 128, kTileColumns = 64;
constexpr uint32_t kHalfDimension = 64, kHalfPitch = 2 * kHalfDimension + 8;  // of halves
// Of columns: two are on their way while one is read, and a tile takes one barrier.
constexpr uint32_t kBuffers = 3;
constexpr uint32_t kMeanParts = 128;
constexpr uint32_t kMostParts = 16;  // of a tile of rows
constexpr uint32_t kMostValues = 5;  // that all blocks add up

// How a pass is shared out: thread block b has the tiles [b T / blocks, (b + 1) T / blocks) of all T, row by row.
struct StreamShare {
  uint32_t row_tiles, column_tiles, blocks;

  __host__ __device__ StreamShare(uint32_t rows, uint32_t columns, uint32_t most_blocks)
      : row_tiles((rows + kTileRows - 1) / kTileRows),
        column_tiles((columns + kTileColumns - 1) / kTileColumns) {
    uint64_t most = uint64_t{kMostParts - 1} * row_tiles;
    most = most < tiles() ? most : tiles();
    blocks = most < most_blocks ? static_cast<uint32_t>(most) : most_blocks;
  }
  __host__ __device__ uint64_t tiles() const { return uint64_t{row_tiles} * column_tiles; }
  __device__ uint64_t first_tile(uint32_t block) const { return tiles() * block / blocks; }
  __device__ uint32_t block_of(uint64_t tile) const {
    return static_cast<uint32_t>(((tile + 1) * blocks - 1) / tiles());
  }
  // The first block of a tile of rows, and how many it is shared by.
  __device__ uint32_t first_block(uint32_t row_tile) const {
    return block_of(uint64_t{row_tile} * column_tiles);
  }
  __device__ uint32_t parts(uint32_t row_tile) const {
    return block_of(uint64_t{row_tile + 1} * column_tiles - 1) - first_block(row_tile) + 1;
  }

  // Calls run(tile of rows, first tile of columns, last) for what this block has.
  template <typename Run>
  __device__ __forceinline__ void for_own(Run run) const {
    if (blockIdx.x >= blocks) return;
    const uint64_t end = first_tile(blockIdx.x + 1);
    for (uint64_t tile = first_tile(blockIdx.x); tile < end;) {
      const uint32_t row_tile = static_cast<uint32_t>(tile / column_tiles),
                     first = static_cast<uint32_t>(tile - uint64_t{row_tile} * column_tiles);
      const uint64_t left = end - tile;
      const uint32_t count = left < column_tiles - first ? static_cast<uint32_t>(left) : column_tiles - first;
      run(row_tile, first, first + count);
      tile += count;
    }
  }
};

// What the thread blocks share; zeros but for faults, all ones.
struct StreamState {
  unsigned long long mass_fault, point_fault, cost_fault, isolated;
  double a_total, b_total;
  uint32_t largest_coordinate, largest_cost;  // bits of floats, which order as integers do
  uint32_t arrivals;
};

// One side of the problem, its rows or its columns.
struct StreamSide {
  uint32_t count;
  const float *points, *masses;  // masses: null if uniform
  float penalty;
  uint16_t* halves;  // [count][hi, lo][kHalfDimension]
  float* norms;      // what of a cost is the point's own; 0 but for Halves
  // Potentials times scale less norms times scale, now and next; -infinity up to a multiple of kTileColumns.
  float *bias, *next_bias;
  float *sums, *largest;  // [kMostParts][count]
  uint32_t* arrivals;     // [tiles of rows], 0: blocks that have added to the sums
  float* out;             // potentials, or null
};

struct StreamCall {
  StreamSide rows, columns;
  uint32_t dimension, cost_kind;
  const float* cost;  // [rows, columns], or null
  const double *epsilons, *tolerances;
  double epsilon, tolerance;
  const int32_t* limits;
  int32_t limit;
  uint32_t problem;
  bool relative_epsilon;
  const float* warm_g;
  float relaxation;
  double scaling;
  double* means;          // [kMeanParts][kHalfDimension]
  double* values;         // [2][values_pitch][kMostValues]
  uint32_t values_pitch;  // at least the tiles of rows, those of columns, and blocks
  uint8_t* rest;          // what follows norms and arrivals, which are cleared
  StreamState* state;
  ph_ot_report* reports;
  const ph_ot_report* solved;  // of earlier, for StreamPlanKernel
  float* plan;                 // or null
  // StreamPlanKernel: out [rows, width] = T matrix [columns, width]
  const float* matrix;
  float* product;
  uint32_t width;
  bool normalised;
  const float* kept;    // the plan, for products and gradients, or null: it is computed
  const float* d_plan;  // for gradients: G = d_plan + d_cost C; null: without
};

enum class Costs { kHalves, kDifferences, kMatrix };

// How exponents are used. The last three are for gradients: sums of T x over the columns, and entries or sums over the columns
// of T o (alpha 1' + 1 beta' - G / epsilon).
enum class Use { kLargestCost, kOnline, kSum, kEnergy, kWrite, kProduct, kSlope, kSlopeSum };
template <Use kUse>
constexpr bool kHasSlope = kUse == Use::kSlope || kUse == Use::kSlopeSum;
template <Use kUse>
constexpr bool kHasVector = kHasSlope<kUse> || kUse == Use::kProduct;

// What a block does of a pass.
struct StreamPart {
  float scale;                     // log2(e) / epsilon; 1 for costs
  bool transposed;                 // rows are the problem's columns
  uint32_t row_tile, first, last;  // tiles [first, last) of the columns
  uint32_t place;                  // among the parts of the tile of rows
  // For gradients: x, or beta, 0 up to a multiple of kTileColumns; alpha, less `shift`; d_cost / epsilon, 1 / epsilon.
  const float *vector = nullptr, *solved = nullptr;
  float shift = 0.0f, d_cost = 0.0f, inverse_epsilon = 0.0f;
};

struct alignas(16) StreamShared {
  union {
    uint16_t halves[kBuffers][kTileColumns][kHalfPitch];
    struct {
      float x[kTileRows][kPitch], y[kTileColumns][kPitch];
    } points;
  };
  // StreamPlanKernel alone has these.
  struct Product {
    float plan[kTileRows][kTileColumns + 4], matrix[kTileColumns][kPitch];
  };
  float bias[kBuffers][kTileColumns], vector[kBuffers][kTileColumns], norms[kBuffers][kTileColumns];
  double values[kStreamWarps][kMostValues];
  bool last;
};

// What a unit of the tensor cores' product is of the cost: C = norm + norm - unit * product.
__device__ __forceinline__ float coordinate_scale(const StreamState& state) {
  // The largest coordinate becomes 64 to 128: float16 has 11 bits of it, and its rest's down to 2^-24.
  const float largest = __uint_as_float(__ldcg(&state.largest_coordinate));
  if (!(largest > 0.0f)) return 1.0f;
  return exp2f(floorf(fminf(7.0f - log2f(largest), 100.0f)));
}

template <Costs kCosts, Use kUse>
struct StreamTile {
  const StreamCall& call;
  const StreamSide own, other;
  const float scale;
  const bool transposed;
  StreamShared& shared;
  uint32_t lane, warp, first_row;
  float unit;  // of products in exponents
  uint32_t hi[2][4][4], lo[2][4][4];
  float costs[4][2][2][4];
  // Where the lane's row of the first matrices is in shared memory: of four, columns 0..7 and k 0..7, k 8..15, columns 8..15
  // likewise.
  uint32_t fragment;
  // For gradients, of the sixteen columns at hand: costs, x or beta; and of the rows.
  const StreamPart& part;
  float given[2][2][4];
  const float* vector;
  float alpha[4], norm[4];

  __device__ __forceinline__ uint32_t row_of(int r) const {
    return first_row + warp * 32 + (r / 2) * 16 + (r % 2) * 8 + lane / 4;
  }
  // Of the four columns of sixteen; n and i.
  __device__ __forceinline__ uint32_t column_of(int n, int i) const { return n * 8 + lane % 4 * 2 + i; }

  __device__ __forceinline__ void begin(uint32_t row) {
    first_row = row;
    if constexpr (kCosts == Costs::kHalves) {
      const float coordinates = coordinate_scale(*call.state);
      unit = (call.cost_kind == PH_OT_SQEUCLIDEAN ? 2.0f : 1.0f) * scale / coordinates / coordinates;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int step = 0; step < 4; ++step) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const uint32_t each = row_of(2 * m + e % 2), k = step * 16 + e / 2 * 8 + lane % 4 * 2;
            const uint16_t* from = own.halves + static_cast<uint64_t>(each) * 2 * kHalfDimension + k;
            const bool present = each < own.count;
            hi[m][step][e] = present ? *reinterpret_cast<const uint32_t*>(from) : 0u;
            lo[m][step][e] = present ? *reinterpret_cast<const uint32_t*>(from + kHalfDimension) : 0u;
          }
        }
      }
    }
  }

  static __device__ __forceinline__ StreamTile of(const StreamCall& call, const StreamPart& part,
                                                  StreamShared& shared) {
    return {call,
            part.transposed ? call.columns : call.rows,
            part.transposed ? call.rows : call.columns,
            part.scale,
            part.transposed,
            shared,
            threadIdx.x % kWarp,
            threadIdx.x / kWarp,
            0,
            0.0f,
            {},
            {},
            {},
            hidden(shared_address(
                &shared.halves[0][threadIdx.x / 16 % 2 * 8 + threadIdx.x % 8][threadIdx.x / 8 % 2 * 8])),
            part,
            {},
            nullptr,
            {},
            {}};
  }

  // Columns [column, column + kTileColumns) on their way to a buffer.
  __device__ __forceinline__ void stage(uint32_t column, uint32_t buffer) {
    const uint32_t thread = threadIdx.x;
    if (thread < kTileColumns / 4)
      copy_ahead(&shared.bias[buffer][thread * 4], other.bias + column + thread * 4, true);
    if constexpr (kHasVector<kUse>) {
      if (thread < kTileColumns / 4)
        copy_ahead(&shared.vector[buffer][thread * 4], part.vector + column + thread * 4, true);
      // There is room for more norms than there are columns.
      if (kCosts == Costs::kHalves && thread < kTileColumns / 4)
        copy_ahead(&shared.norms[buffer][thread * 4], other.norms + column + thread * 4, true);
    }
    if constexpr (kCosts == Costs::kHalves) {
      constexpr uint32_t kPieces = 2 * kHalfDimension / 8, kRows = kStreamThreads / kPieces;
      const uint32_t at = thread / kPieces, piece = thread % kPieces * 8, left = other.count - column;
      const uint16_t* from = other.halves + static_cast<uint64_t>(column + at) * (2 * kHalfDimension) + piece;
#pragma unroll
      for (uint32_t i = 0; i < kTileColumns; i += kRows)
        copy_ahead(&shared.halves[buffer][at + i][piece], from + i * (2 * kHalfDimension), at + i < left);
    }
  }

  // Costs of the tile, where they are not made sixteen columns at a time.
  __device__ __forceinline__ void compute_costs(uint32_t column) {
    if constexpr (kCosts == Costs::kMatrix) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        for_values([&](int m, int n, int e) {
          const uint64_t row = row_of(2 * m + e / 2), at = column + q * 16 + column_of(n, e % 2);
          float cost = INFINITY;
          if (row < own.count && at < other.count)
            cost = call.cost[transposed ? at * own.count + row : row * other.count + at];
          costs[q][m][n][e] = cost;
        });
      }
    } else if constexpr (kCosts == Costs::kDifferences) {
#pragma unroll
      for (int q = 0; q < 4; ++q) for_values([&](int m, int n, int e) { costs[q][m][n][e] = 0.0f; });
      const uint32_t dimension = call.dimension;
      for (uint32_t k = 0; k < dimension; k += kChunk) {
        __syncthreads();
        const auto copy = [&](float(*to)[kPitch], const StreamSide& side, uint32_t first, uint32_t count) {
          for (uint32_t item = threadIdx.x; item < count * kChunk; item += kStreamThreads) {
            const uint32_t at = item / kChunk, i = item % kChunk;
            float value = 0.0f;
            if (first + at < side.count && k + i < dimension) {
              value = side.points[static_cast<uint64_t>(first + at) * dimension + k + i];
              if (call.cost_kind == PH_OT_COSINE) value *= side.norms[side.count + first + at];
            }
            to[at][i] = value;
          }
        };
        copy(shared.points.x, own, first_row, kTileRows);
        copy(shared.points.y, other, column, kTileColumns);
        __syncthreads();
        const bool differences = call.cost_kind != PH_OT_DOT;
#pragma unroll 1
        for (uint32_t four = 0; four < kChunk; four += 4) {
          float x[4][4];
#pragma unroll
          for (int r = 0; r < 4; ++r) read_four(&shared.points.x[row_of(r) - first_row][four], x[r]);
#pragma unroll
          for (int q = 0; q < 4; ++q) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              float y[4];
              read_four(&shared.points.y[q * 16 + column_of(c / 2, c % 2)][four], y);
#pragma unroll
              for (int r = 0; r < 4; ++r) {
                float& sum = costs[q][r / 2][c / 2][r % 2 * 2 + c % 2];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                  const float difference = x[r][i] - y[i];
                  sum = differences ? fmaf(difference, difference, sum) : fmaf(x[r][i], y[i], sum);
                }
              }
            }
          }
        }
      }
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        for_values([&](int m, int n, int e) {
          float& cost = costs[q][m][n][e];
          if (call.cost_kind == PH_OT_EUCLIDEAN) cost = sqrtf(cost);
          if (call.cost_kind == PH_OT_DOT) cost = -cost;
          if (call.cost_kind == PH_OT_COSINE) {
            const uint32_t row = row_of(2 * m + e / 2), at = column + q * 16 + column_of(n, e % 2);
            if (row < own.count && at < other.count)
              cost = own.norms[own.count + row] > 0.0f && other.norms[other.count + at] > 0.0f ? 0.5f * cost
                                                                                               : 1.0f;
          }
        });
      }
    }
  }

  // The bias of the lane's columns among the q-th sixteen.
  __device__ __forceinline__ void load_bias(int q, uint32_t buffer, float (&bias)[2][2]) const {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 two = *reinterpret_cast<const float2*>(&shared.bias[buffer][q * 16 + column_of(n, 0)]);
      bias[n][0] = two.x;
      bias[n][1] = two.y;
    }
  }
  // Adds the products of sixteen of the dimensions with sixteen columns, whose halves start at a place in shared memory.
  __device__ __forceinline__ void multiply_step(int step, uint32_t at, float (&values)[2][2][4]) const {
    uint32_t high[4], low[4];
    load_matrices(high, at + step * 32);
    load_matrices(low, at + step * 32 + kHalfDimension * 2);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        multiply_add(values[m][n], lo[m][step], high[2 * n], high[2 * n + 1]);
        multiply_add(values[m][n], hi[m][step], low[2 * n], low[2 * n + 1]);
        multiply_add(values[m][n], hi[m][step], high[2 * n], high[2 * n + 1]);
      }
    }
  }

  // Whether costs must be known, of which the exponents are made where no plan is kept.
  __device__ __forceinline__ bool needs_costs() const {
    return !kHasVector<kUse> || call.kept == nullptr || (kHasSlope<kUse> && part.d_cost != 0.0f) ||
           (kUse == Use::kSlope && (call.cost_kind == PH_OT_EUCLIDEAN || call.cost_kind == PH_OT_COSINE));
  }
  // An entry of the plan, from its exponent but for the rows' bias or as it is kept; 0 outside.
  __device__ __forceinline__ float plan_of(float exponent, int r, uint32_t at) const {
    if (call.kept == nullptr) return exp2_fast(exponent);
    return inside(r, at) ? call.kept[place_of(r, at)] : 0.0f;
  }
  __device__ __forceinline__ bool inside(int r, uint32_t at) const {
    return row_of(r) < own.count && at < other.count;
  }
  __device__ __forceinline__ uint64_t place_of(int r, uint32_t at) const {
    const uint64_t row = row_of(r);
    return transposed ? static_cast<uint64_t>(at) * own.count + row : row * other.count + at;
  }
  // T (alpha + beta - G / epsilon) of an entry.
  __device__ __forceinline__ float slope(float exponent, uint32_t column, int m, int n, int e) const {
    const int r = 2 * m + e / 2;
    const uint32_t at = column + column_of(n, e % 2);
    float h = 0.0f;
    if (call.d_plan != nullptr && inside(r, at)) h = call.d_plan[place_of(r, at)] * part.inverse_epsilon;
    if (part.d_cost != 0.0f)
      h = fabsf(given[m][n][e]) <= FLT_MAX ? fmaf(part.d_cost, given[m][n][e], h) : 0.0f;
    return plan_of(exponent, r, at) * (alpha[r] + (vector[column_of(n, e % 2)] - h));
  }
  // What gradients need of the rows; their bias is returned.
  __device__ __forceinline__ void begin_rows(float (&bias)[4]) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint32_t row = row_of(r);
      bias[r] = row < own.count ? __ldcg(own.bias + row) : -INFINITY;
      alpha[r] = part.shift + (row < own.count && part.solved != nullptr ? __ldcg(part.solved + row) : 0.0f);
      norm[r] = kCosts == Costs::kHalves && row < own.count ? own.norms[row] : 0.0f;
    }
  }

  // The exponents of the q-th sixteen columns of the tile in a buffer, less the rows' bias.
  __device__ __forceinline__ void exponents(int q, uint32_t buffer, float (&values)[2][2][4]) {
    if constexpr (kHasVector<kUse>) {
      vector = &shared.vector[buffer][q * 16];
      if (!needs_costs()) return;
    }
    float bias[2][2];
    load_bias(q, buffer, bias);
    if constexpr (kCosts == Costs::kHalves) {
      for_values([&](int m, int n, int e) { values[m][n][e] = 0.0f; });
      const uint32_t at = fragment + (buffer * kTileColumns + q * 16) * (kHalfPitch * sizeof(uint16_t));
#pragma unroll
      for (int step = 0; step < 4; ++step) multiply_step(step, at, values);
      if constexpr (kHasSlope<kUse>) {
        const float* norms = &shared.norms[buffer][q * 16];
        for_values([&](int m, int n, int e) {
          given[m][n][e] =
              norm[2 * m + e / 2] + (norms[column_of(n, e % 2)] - values[m][n][e] * (unit / scale));
        });
      }
      for_values([&](int m, int n, int e) { values[m][n][e] = fmaf(values[m][n][e], unit, bias[n][e % 2]); });
    } else {
      if constexpr (kHasSlope<kUse>)
        for_values([&](int m, int n, int e) { given[m][n][e] = costs[q][m][n][e]; });
      for_values(
          [&](int m, int n, int e) { values[m][n][e] = fmaf(-costs[q][m][n][e], scale, bias[n][e % 2]); });
    }
  }

  template <typename Do>
  static __device__ __forceinline__ void for_values(Do act) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) act(m, n, e);
      }
    }
  }

  // Calls run(tile, buffer) for tiles [first, last) of columns, each of which is there then.
  template <typename Run>
  __device__ __forceinline__ void for_tiles(uint32_t first, uint32_t last, Run run) {
    __syncthreads();  // before buffers are written again
#pragma unroll
    for (uint32_t ahead = 0; ahead < kBuffers - 1; ++ahead) stage_if(first + ahead, last, ahead);
    uint32_t buffer = 0, free = kBuffers - 1;
    for (uint32_t tile = first; tile < last; ++tile) {
      await_copies<kBuffers - 2>();
      __syncthreads();  // the tile is there, and nobody reads the one before any more
      stage_if(tile + kBuffers - 1, last, free);
      run(tile, buffer);
      free = buffer;
      buffer = buffer == kBuffers - 1 ? 0 : buffer + 1;
    }
  }

  // Goes through columns, tiles [first, last), and calls take(column of the sixteen, values) for all of them.
  template <typename Take>
  __device__ __forceinline__ void for_columns(uint32_t first, uint32_t last, Take take) {
    for_tiles(first, last, [&](uint32_t tile, uint32_t buffer) {
      if (needs_costs()) compute_costs(tile * kTileColumns);
        // Costs that are there are in registers, which have no index at run time.
#pragma unroll(kCosts == Costs::kHalves ? 1 : 4)
      for (int q = 0; q < 4; ++q) {
        float values[2][2][4];
        exponents(q, buffer, values);
        take(tile * kTileColumns + q * 16, values);
      }
    });
  }

  // Adds the powers of all exponents of a row. The powers of sixteen columns are taken between the products of the next, so
  // that tensor cores never wait for them: warps that began together would all take powers at once.
  __device__ __forceinline__ void add_powers(uint32_t first, uint32_t last, const float (&bias)[4],
                                             float (&sums)[4]) {
    float before[2][2][4], bias_before[2][2];
    for_values([&](int m, int n, int e) { before[m][n][e] = 0.0f; });
#pragma unroll
    for (int n = 0; n < 2; ++n) bias_before[n][0] = bias_before[n][1] = -INFINITY;
    const auto add = [&](int m, int n) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        sums[2 * m + e / 2] +=
            exp2_fast(fmaf(before[m][n][e], unit, bias_before[n][e % 2]) + bias[2 * m + e / 2]);
    };
    for_tiles(first, last, [&](uint32_t, uint32_t buffer) {
#pragma unroll 2
      for (int q = 0; q < 4; ++q) {
        float products[2][2][4] = {};
        const uint32_t at = fragment + (buffer * kTileColumns + q * 16) * (kHalfPitch * sizeof(uint16_t));
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          multiply_step(step, at, products);
          add(step / 2, step % 2);
        }
        for_values([&](int m, int n, int e) { before[m][n][e] = products[m][n][e]; });
        load_bias(q, buffer, bias_before);
      }
    });
#pragma unroll
    for (int step = 0; step < 4; ++step) add(step / 2, step % 2);
  }

 private:
  __device__ __forceinline__ void stage_if(uint32_t tile, uint32_t last, uint32_t buffer) {
    if (tile < last) stage(tile * kTileColumns, buffer);
    end_copies();
  }
};

__device__ __forceinline__ float combine_quad_sum(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}

// A part of a pass. Not inlined, as registers are for one use at a time.
template <Costs kCosts, Use kUse>
__device__ __noinline__ void run_part(const StreamCall& call, const StreamPart& part, StreamShared& shared) {
  using Tile = StreamTile<kCosts, kUse>;
  Tile tile = Tile::of(call, part, shared);
  const StreamSide &own = tile.own, &other = tile.other;
  const uint32_t lane = tile.lane;
  tile.begin(part.row_tile * kTileRows);
  float bias[4], sums[4], second[4];  // second: largest exponents, or energies, or the largest cost
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const uint32_t row = tile.row_of(r);
    bias[r] = -INFINITY;
    if (row < own.count) {
      if (kUse == Use::kLargestCost) bias[r] = own.norms[row];
      else if (kUse != Use::kOnline) bias[r] = __ldcg(own.bias + row);
    }
    sums[r] = 0.0f;
    second[r] = kUse == Use::kOnline ? -INFINITY : 0.0f;
  }
  if constexpr (kHasVector<kUse>) tile.begin_rows(bias);
  // Of a tile of columns in single precision, of all in double.
  [[maybe_unused]] double totals[4] = {};
  [[maybe_unused]] unsigned long long fault = kNoFault;
  if constexpr (kUse == Use::kSum && kCosts == Costs::kHalves) {
    tile.add_powers(part.first, part.last, bias, sums);
  } else {
    tile.for_columns(part.first, part.last, [&](uint32_t column, const float(&values)[2][2][4]) {
      if constexpr (kUse == Use::kSum) {
        Tile::for_values([&](int m, int n, int e) {
          const int r = 2 * m + e / 2;
          sums[r] += exp2_fast(values[m][n][e] + bias[r]);
        });
      } else if constexpr (kUse == Use::kEnergy) {
        Tile::for_values([&](int m, int n, int e) {
          const int r = 2 * m + e / 2;
          const float exponent = values[m][n][e] + bias[r], each = exp2_fast(exponent);
          sums[r] += each;
          if (each > 0.0f) second[r] = fmaf(each, exponent, second[r]);
        });
      } else if constexpr (kUse == Use::kOnline) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float(&two)[2][4] = values[r / 2];
          const int e = r % 2 * 2;
          const float largest =
              fmaxf(fmaxf(fmaxf(two[0][e], two[0][e + 1]), fmaxf(two[1][e], two[1][e + 1])), second[r]);
          if (largest == -INFINITY) continue;
          sums[r] = sums[r] * exp2_fast(second[r] - largest) + exp2_fast(two[0][e] - largest) +
                    exp2_fast(two[0][e + 1] - largest) + exp2_fast(two[1][e] - largest) +
                    exp2_fast(two[1][e + 1] - largest);
          second[r] = largest;
        }
      } else if constexpr (kUse == Use::kLargestCost) {
        Tile::for_values([&](int m, int n, int e) {
          const int r = 2 * m + e / 2;
          const uint32_t row = tile.row_of(r), at = column + tile.column_of(n, e % 2);
          if (row >= own.count || at >= other.count) return;
          const float cost = bias[r] - values[m][n][e];
          if (!(cost >= -FLT_MAX))
            fault = min(fault, static_cast<unsigned long long>(row) * other.count + at);
          else if (cost <= FLT_MAX) second[0] = fmaxf(second[0], fabsf(cost));
        });
      } else if constexpr (kHasVector<kUse> && kUse != Use::kSlope) {
        Tile::for_values([&](int m, int n, int e) {
          const int r = 2 * m + e / 2;
          const float exponent = values[m][n][e] + bias[r];
          if constexpr (kUse == Use::kProduct) {
            const uint32_t at = tile.column_of(n, e % 2);
            sums[r] = fmaf(tile.plan_of(exponent, r, column + at), tile.vector[at], sums[r]);
          } else {
            sums[r] += tile.slope(exponent, column, m, n, e);
          }
        });
        if (column % kTileColumns + 16 < kTileColumns) return;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          totals[r] += sums[r];
          sums[r] = 0.0f;
        }
      } else {
        Tile::for_values([&](int m, int n, int e) {
          const int r = 2 * m + e / 2;
          const uint64_t row = tile.row_of(r), at = column + tile.column_of(n, e % 2);
          if (row >= own.count || at >= other.count) return;
          const float exponent = values[m][n][e] + bias[r];
          __stcs(call.plan + row * other.count + at,
                 kUse == Use::kSlope ? tile.slope(exponent, column, m, n, e) : exp2_fast(exponent));
        });
      }
    });
  }
  if constexpr (kUse == Use::kLargestCost) {
    if (second[0] > 0.0f) atomicMax(&call.state->largest_cost, __float_as_uint(second[0]));
    if (fault != kNoFault) atomicMin(&call.state->cost_fault, fault);
  } else if constexpr (kHasVector<kUse> && kUse != Use::kSlope) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      totals[r] += __shfl_xor_sync(kAllLanes, totals[r], 1);
      totals[r] += __shfl_xor_sync(kAllLanes, totals[r], 2);
      const uint32_t row = tile.row_of(r);
      if (lane % 4 == 0 && row < own.count)
        own.sums[static_cast<uint64_t>(part.place) * own.count + row] = static_cast<float>(totals[r]);
    }
  } else if constexpr (kUse != Use::kWrite && kUse != Use::kSlope) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (kUse == Use::kOnline) {
        float largest = fmaxf(second[r], __shfl_xor_sync(kAllLanes, second[r], 1));
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
        sums[r] = combine_quad_sum(largest == -INFINITY ? 0.0f : sums[r] * exp2_fast(second[r] - largest));
        second[r] = largest;
      } else {
        sums[r] = combine_quad_sum(sums[r]);
        if (kUse == Use::kEnergy) second[r] = combine_quad_sum(second[r]);
      }
      const uint32_t row = tile.row_of(r);
      if (lane % 4 != 0 || row >= own.count) continue;
      const uint64_t at = static_cast<uint64_t>(part.place) * own.count + row;
      own.sums[at] = sums[r];
      if (kUse != Use::kSum) own.largest[at] = second[r];
    }
  }
}

// The block's sums of values, for all its threads, which add in the same order in every block.
template <int kCount>
__device__ __forceinline__ void sum_block(StreamShared& shared, double (&values)[kCount]) {
  static_assert(kCount <= kMostValues, "values pass through shared memory");
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  __syncthreads();  // before they are written again
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    for (uint32_t distance = kWarp / 2; distance > 0; distance /= 2)
      values[i] += __shfl_xor_sync(kAllLanes, values[i], distance);
    if (lane == 0) shared.values[warp][i] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = shared.values[0][i];
#pragma unroll
    for (uint32_t w = 1; w < kStreamWarps; ++w) values[i] += shared.values[w][i];
  }
}
// Leaves the block's sums as those of an item, and adds up those of all items once blocks have met.
template <int kCount>
__device__ __forceinline__ void leave_sums(StreamShared& shared, double* target, uint32_t item,
                                           double (&values)[kCount]) {
  sum_block(shared, values);
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (threadIdx.x == 0) target[item * kCount + i] = values[i];
}
template <int kCount>
__device__ __forceinline__ void add_sums(StreamShared& shared, const double* source, uint32_t items,
                                         double (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = 0.0;
#pragma unroll 4
  for (uint32_t item = threadIdx.x; item < items; item += kStreamThreads) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += __ldcg(source + item * kCount + i);
  }
  sum_block(shared, values);
}

// Whether the block is the last of those that share a tile of rows, and sees what they wrote.
__device__ __forceinline__ bool is_last(uint32_t* arrivals, uint32_t parts, StreamShared& shared) {
  __syncthreads();
  if (parts == 1) return true;
  if (threadIdx.x == 0) {
    shared.last = arrive(arrivals) == parts - 1;
    if (shared.last) *arrivals = 0;
  }
  __syncthreads();
  return shared.last;
}

// The problem as the iterations see it; the same in all threads.
struct StreamSetting {
  double epsilon, unit_a, unit_b;  // masses are divided by the units
  float scale;
  double scale_exact;
};

__device__ __forceinline__ double mass_of(const StreamSide& side, uint32_t i, double unit) {
  return (side.masses == nullptr ? 1.0 / side.count : double{side.masses[i]}) / unit;
}

struct StreamUpdate {
  double error;  // of the marginal before, and after where it need not hold
  double after;  // NaN: a sum left the range of floats
};

// The next potential of a row from its sums, `parts` of them; in a pass with Use::kOnline they come with their largest
// exponents. The first update of a stage is plain. `place` is that of the side's first element among faults.
__device__ __forceinline__ StreamUpdate update_row(const StreamCall& call, const StreamSide& own,
                                                   const StreamSetting& setting, double unit, uint32_t i,
                                                   uint32_t parts, bool online, float relaxation,
                                                   uint32_t place) {
  const bool holds = isinf(own.penalty);
  const double damping = holds ? 1.0 : own.penalty / (own.penalty + setting.epsilon);
  const double decay = holds ? 0.0 : setting.epsilon / own.penalty;
  const double mass = mass_of(own, i, unit), norm = own.norms[i] * setting.scale_exact;
  const float* sums = own.sums + i;
  const float* most = own.largest + i;
  const uint64_t step = own.count;
  const float bias = online ? 0.0f : __ldcg(own.bias + i);
  StreamUpdate result = {0.0, 0.0};
  if (mass == 0.0 || bias == -INFINITY) {
    own.next_bias[i] = -INFINITY;
    return result;
  }
  float largest = 0.0f;
  double sum = 0.0, old = 0.0;
  if (online) {
    largest = -INFINITY;
#pragma unroll 8
    for (uint32_t s = 0; s < parts; ++s) largest = fmaxf(largest, __ldcg(most + s * step));
#pragma unroll 8
    for (uint32_t s = 0; s < parts && largest > -INFINITY; ++s)
      sum += double{__ldcg(sums + s * step)} * exp2f(__ldcg(most + s * step) - largest);
    if (!(sum > 0.0)) {
      // No partner: infeasible, or where mass may stay behind, none.
      if (holds) atomicMin(&call.state->isolated, 0ull + place + i);
      own.next_bias[i] = -INFINITY;
      return result;
    }
  } else {
#pragma unroll 8
    for (uint32_t s = 0; s < parts; ++s) sum += __ldcg(sums + s * step);
    old = bias + norm;
    result.error = fabs(sum - mass * (holds ? 1.0 : exp2(-old * decay)));
  }
  const double exponent = largest + log2(sum) - bias;  // of the sum without the own potential
  double next = damping * (log2(mass) - exponent + norm);
  if (relaxation != 1.0f) next = old + relaxation * (next - old);
  if (relaxation != 1.0f || !holds)
    result.after = fabs(exp2(exponent + next - norm) - mass * (holds ? 1.0 : exp2(-next * decay)));
  if (!online && !(sum > 1e-30 && sum < 1e30)) result.after = NAN;
  own.next_bias[i] = static_cast<float>(next - norm);
  return result;
}

template <Costs kCosts>
__global__ void __launch_bounds__(kStreamThreads, 3)
    StreamSinkhornKernel(const __grid_constant__ StreamCall given) {
  StreamCall call = given;
  StreamShared& shared = *reinterpret_cast<StreamShared*>(dynamic_shared());
  uint32_t meetings = 0;
  StreamState& state = *call.state;
  const auto meet = [&] { grid_barrier(&state.arrivals, meetings); };
  const bool writer = blockIdx.x == 0 && threadIdx.x == 0;
  const auto nothing = [&](uint32_t status, unsigned long long place, uint32_t iterations, double epsilon) {
    for (const StreamSide* side : {&call.rows, &call.columns}) {
      for (uint32_t i = blockIdx.x * kStreamThreads + threadIdx.x; i < side->count && side->out != nullptr;
           i += gridDim.x * kStreamThreads)
        side->out[i] = 0.0f;
    }
    const uint64_t entries = static_cast<uint64_t>(call.rows.count) * call.columns.count;
    for (uint64_t i = blockIdx.x * kStreamThreads + threadIdx.x; i < entries && call.plan != nullptr;
         i += gridDim.x * kStreamThreads)
      call.plan[i] = 0.0f;
    if (writer) call.reports[call.problem] = {status, iterations, place, NAN, NAN, NAN, epsilon};
  };
  if (state.mass_fault != kNoFault) return nothing(PH_OT_INVALID_MASS, state.mass_fault, 0, 0.0);
  if (state.point_fault != kNoFault) return nothing(PH_OT_NON_FINITE_POINT, state.point_fault, 0, 0.0);

  const StreamShare row_share(call.rows.count, call.columns.count, gridDim.x),
      column_share(call.columns.count, call.rows.count, gridDim.x);
  // As other costs of a cost, and no more columns than there are.
  for (StreamSide* side : {&call.rows, &call.columns}) {
    const uint32_t padded = (side->count + kTileColumns - 1) / kTileColumns * kTileColumns;
    for (uint32_t i = blockIdx.x * kStreamThreads + threadIdx.x; i < padded;
         i += gridDim.x * kStreamThreads) {
      side->bias[i] = i < side->count ? -side->norms[i] : -INFINITY;
      side->next_bias[i] = -INFINITY;
    }
  }
  meet();
  row_share.for_own([&](uint32_t row_tile, uint32_t first, uint32_t last) {
    run_part<kCosts, Use::kLargestCost>(call, {1.0f, false, row_tile, first, last, 0}, shared);
  });
  meet();
  const unsigned long long cost_fault = __ldcg(&state.cost_fault);
  if (cost_fault != kNoFault) return nothing(PH_OT_NON_FINITE_COST, cost_fault, 0, 0.0);
  const float largest = __uint_as_float(__ldcg(&state.largest_cost));

  const double a_total = state.a_total, b_total = state.b_total;
  const bool balanced = isinf(call.rows.penalty) && isinf(call.columns.penalty);
  StreamSetting setting = {};
  setting.unit_a = balanced ? a_total : 1.0;
  setting.unit_b = balanced ? b_total : 1.0;
  double target_epsilon = call.epsilons == nullptr ? call.epsilon : call.epsilons[call.problem];
  if (call.relative_epsilon && largest > 0.0f) target_epsilon *= largest;
  const double tolerance =
      (call.tolerances == nullptr ? call.tolerance : call.tolerances[call.problem]) / setting.unit_a;
  const uint32_t limit = max(call.limits == nullptr ? call.limit : call.limits[call.problem], 1);
  const double loose = kStageTolerance * a_total / setting.unit_a;
  // A little below the tolerance: the error is measured again at the end.
  const double enough = fmax(tolerance - 1e-6, 0.5 * tolerance);
  double epsilon = call.scaling > 0.0 && limit > 1 ? fmax(target_epsilon, double{largest}) : target_epsilon;

  const auto set_epsilon = [&](double value) {
    setting.epsilon = value;
    setting.scale_exact = 1.4426950408889634 / value;
    setting.scale = static_cast<float>(setting.scale_exact);
  };
  const auto swap_bias = [](StreamSide& side) {
    float* held = side.bias;
    side.bias = side.next_bias;
    side.next_bias = held;
  };
  set_epsilon(epsilon);
  for (uint32_t j = blockIdx.x * kStreamThreads + threadIdx.x; j < call.columns.count;
       j += gridDim.x * kStreamThreads) {
    float g = call.warm_g == nullptr ? 0.0f : call.warm_g[j];
    if (!(fabsf(g) <= FLT_MAX)) g = 0.0f;
    call.columns.bias[j] = mass_of(call.columns, j, setting.unit_b) > 0.0
                               ? static_cast<float>((g - double{call.columns.norms[j]}) * setting.scale_exact)
                               : -INFINITY;
  }
  meet();

  // One side's sums and next potentials; all blocks know the error then.
  uint32_t turn = 0;  // of values, as some blocks still add them up when others leave the next
  const auto half_step = [&](bool columns, bool online, float relaxation) {
    const StreamSide& own = columns ? call.columns : call.rows;
    const StreamShare& share = columns ? column_share : row_share;
    for (bool again = false;; again = true) {
      turn ^= 1;
      double* values = call.values + turn * kMostValues * uint64_t{call.values_pitch};
      share.for_own([&](uint32_t row_tile, uint32_t first, uint32_t last) {
        const StreamPart part = {setting.scale, columns, row_tile,
                                 first,         last,    blockIdx.x - share.first_block(row_tile)};
        if (online) run_part<kCosts, Use::kOnline>(call, part, shared);
        else run_part<kCosts, Use::kSum>(call, part, shared);
        const uint32_t parts = share.parts(row_tile), i = row_tile * kTileRows + threadIdx.x;
        if (!is_last(own.arrivals + row_tile, parts, shared)) return;
        StreamUpdate update = {0.0, 0.0};
        if (i < own.count)
          update = update_row(call, own, setting, columns ? setting.unit_b : setting.unit_a, i, parts, online,
                              relaxation, columns ? call.rows.count : 0);
        double own_values[2] = {update.error, update.after};
        leave_sums(shared, values, row_tile, own_values);
      });
      meet();
      double all[2];
      add_sums(shared, values, share.row_tiles, all);
      if (online || !isnan(all[1])) return StreamUpdate{again ? INFINITY : all[0], all[1]};
      // A sum left the range of floats, which only relaxed or unbalanced iterations can: again, with largest exponents.
      online = true;
      relaxation = 1.0f;
    }
  };

  uint32_t iterations = 0;
  for (bool last = false; !last;) {
    last = epsilon <= target_epsilon;
    if (last) epsilon = target_epsilon;
    const uint32_t stage_limit = last ? limit : limit - 1;
    const double stage_enough = last ? enough : fmax(enough, loose);
    float relaxation = 1.0f, next_relaxation = 1.0f;
    double column_error = 0.0;
    for (uint32_t half = 0;; ++half) {
      const bool columns = half % 2 == 1, online = half < 2;
      const StreamUpdate update = half_step(columns, online, relaxation);
      if (!columns && !online) {
        const double error = update.error + column_error;
        if (error <= stage_enough || iterations >= stage_limit) break;
        // The columns that follow are those of this iteration.
        next_relaxation = error <= loose ? call.relaxation : 1.0f;
      }
      swap_bias(columns ? call.columns : call.rows);
      if (!columns) continue;
      column_error = update.after;
      ++iterations;
      relaxation = next_relaxation;
      if (!online) continue;
      const unsigned long long isolated = __ldcg(&state.isolated);
      if (isolated != kNoFault) return nothing(PH_OT_INFEASIBLE, isolated, iterations, target_epsilon);
    }
    if (last) break;
    const double before = setting.scale_exact;
    epsilon = iterations >= stage_limit ? target_epsilon : epsilon * call.scaling;
    set_epsilon(fmax(epsilon, target_epsilon));
    for (uint32_t j = blockIdx.x * kStreamThreads + threadIdx.x; j < call.columns.count;
         j += gridDim.x * kStreamThreads)
      call.columns.next_bias[j] =
          static_cast<float>(__ldcg(call.columns.bias + j) * (setting.scale_exact / before));
    swap_bias(call.columns);
    meet();
  }

  // Marginals, cost and value of the potentials.
  row_share.for_own([&](uint32_t row_tile, uint32_t first, uint32_t last) {
    run_part<kCosts, Use::kEnergy>(
        call, {setting.scale, false, row_tile, first, last, blockIdx.x - row_share.first_block(row_tile)},
        shared);
  });
  column_share.for_own([&](uint32_t row_tile, uint32_t first, uint32_t last) {
    run_part<kCosts, Use::kSum>(
        call, {setting.scale, true, row_tile, first, last, blockIdx.x - column_share.first_block(row_tile)},
        shared);
  });
  meet();
  double values[5] = {};  // error, value but for the total, total, energy, and what potentials add up to
  const double shift =
      balanced ? epsilon * log(setting.unit_a) : 0.0;  // of potentials, by the unit of masses
  for (const bool columns : {false, true}) {
    const StreamSide& own = columns ? call.columns : call.rows;
    const StreamShare& share = columns ? column_share : row_share;
    const double unit = columns ? setting.unit_b : setting.unit_a, plan_unit = setting.unit_a;
    for (uint32_t i = blockIdx.x * kStreamThreads + threadIdx.x; i < own.count;
         i += gridDim.x * kStreamThreads) {
      double sum = 0.0, energy = 0.0;
      for (uint32_t s = 0, parts = share.parts(i / kTileRows); s < parts; ++s) {
        const uint64_t at = static_cast<uint64_t>(s) * own.count + i;
        sum += __ldcg(own.sums + at);
        if (!columns) energy += __ldcg(own.largest + at);
      }
      sum *= plan_unit;
      const double mass = mass_of(own, i, unit) * plan_unit;
      const float bias = __ldcg(own.bias + i);
      const bool present = mass > 0.0 && bias > -INFINITY;
      double potential = present ? (bias / setting.scale_exact) + own.norms[i] : -INFINITY;
      // The cost is what potentials without the shift add up to, less what is free energy; penalties are no part of it.
      if (sum > 0.0 && present) values[4] += sum * potential;
      if (!columns && present) potential += shift;
      if (own.out != nullptr) own.out[i] = static_cast<float>(potential);
      if (present) {
        const double target = isinf(own.penalty) ? mass : mass * exp(-potential / own.penalty);
        values[0] += fabs(sum - target);
        if (sum > 0.0) values[1] += sum * potential;
      }
      if (!isinf(own.penalty) && mass > 0.0)
        values[1] += own.penalty * (mass - sum + (sum > 0.0 ? sum * log(sum / mass) : 0.0));
      if (!columns) {
        values[2] += sum;
        values[3] += energy * plan_unit;
      }
    }
  }
  turn ^= 1;
  double* all = call.values + turn * kMostValues * uint64_t{call.values_pitch};
  leave_sums(shared, all, blockIdx.x, values);
  meet();
  add_sums(shared, all, gridDim.x, values);
  const double error = values[0], value = values[1], total = values[2], energy = values[3],
               potentials = values[4];
  if (writer) {
    ph_ot_report& report = call.reports[call.problem];
    report.status = error <= tolerance * setting.unit_a ? PH_OT_CONVERGED : PH_OT_ITERATION_LIMIT;
    report.iterations = iterations;
    report.place = 0;
    report.marginal_error = error;
    report.cost = potentials - energy / setting.scale_exact;
    report.value = value - epsilon * total;
    report.epsilon = epsilon;
  }
  if (call.plan == nullptr) return;
  // Rows take the unit of masses.
  for (uint32_t i = blockIdx.x * kStreamThreads + threadIdx.x; i < call.rows.count;
       i += gridDim.x * kStreamThreads)
    call.rows.next_bias[i] = static_cast<float>(__ldcg(call.rows.bias + i) + log2(setting.unit_a));
  swap_bias(call.rows);
  meet();
  row_share.for_own([&](uint32_t row_tile, uint32_t first, uint32_t last) {
    run_part<kCosts, Use::kWrite>(call, {setting.scale, false, row_tile, first, last, 0}, shared);
  });
}

// Totals and faults of masses. One block of 1,024 threads.
template <int kUnused>
__global__ void __launch_bounds__(1024) StreamMassKernel(const __grid_constant__ StreamCall call) {
  double* shared = reinterpret_cast<double*>(dynamic_shared());
  double totals[2];
  unsigned long long fault = kNoFault;
  for (const bool columns : {false, true}) {
    const StreamSide& side = columns ? call.columns : call.rows;
    double total = 0.0;
    for (uint32_t i = threadIdx.x; i < side.count && side.masses != nullptr; i += blockDim.x) {
      const float mass = side.masses[i];
      if (!(mass >= 0.0f && mass <= FLT_MAX)) fault = min(fault, 0ull + (columns ? call.rows.count : 0) + i);
      total += mass;
    }
    for (uint32_t distance = kWarp / 2; distance > 0; distance /= 2)
      total += __shfl_xor_sync(kAllLanes, total, distance);
    __syncthreads();
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = total;
    __syncthreads();
    total = 0.0;
    for (uint32_t w = 0; w < blockDim.x / kWarp; ++w) total += shared[w];
    totals[columns] = side.masses == nullptr ? 1.0 : total;
  }
  if (fault != kNoFault) atomicMin(&call.state->mass_fault, fault);
  __syncthreads();
  if (threadIdx.x != 0) return;
  call.state->a_total = totals[0];
  call.state->b_total = totals[1];
  const bool balanced = isinf(call.rows.penalty) && isinf(call.columns.penalty);
  if (call.state->mass_fault == kNoFault &&
      (!(totals[0] > 0.0 && totals[1] > 0.0) ||
       (balanced && fabs(totals[0] - totals[1]) > 1e-4 * fmax(totals[0], totals[1]))))
    call.state->mass_fault = 0ull + call.rows.count + call.columns.count;
}

// Sums of all points' coordinates, in kMeanParts parts; a thread a dimension.
template <int kUnused>
__global__ void __launch_bounds__(kHalfDimension) StreamMeanKernel(const __grid_constant__ StreamCall call) {
  const uint32_t k = threadIdx.x, d = call.dimension;
  double sum = 0.0;
  for (const StreamSide* side : {&call.rows, &call.columns}) {
    for (uint32_t i = blockIdx.x; i < side->count && k < d; i += gridDim.x)
      sum += side->points[static_cast<uint64_t>(i) * d + k];
  }
  call.means[blockIdx.x * kHalfDimension + k] = sum;
}

// The mean where it may be taken off, else 0; kHalfDimension threads write it to shared memory.
__device__ __forceinline__ void load_mean(const StreamCall& call, float* mean) {
  if (threadIdx.x < kHalfDimension) {
    double sum = 0.0;
    for (uint32_t part = 0; part < kMeanParts && call.cost_kind == PH_OT_SQEUCLIDEAN; ++part)
      sum += call.means[part * kHalfDimension + threadIdx.x];
    mean[threadIdx.x] = static_cast<float>(sum / (static_cast<double>(call.rows.count) + call.columns.count));
  }
  __syncthreads();
}

// A warp a point: faults; for cosines 1 / |point|, at norms [count + point]; for Halves the largest coordinate.
template <Costs kCosts>
__global__ void __launch_bounds__(kStreamThreads)
    StreamMeasureKernel(const __grid_constant__ StreamCall call) {
  float* mean = reinterpret_cast<float*>(dynamic_shared());
  if constexpr (kCosts == Costs::kHalves) load_mean(call, mean);
  const uint32_t lane = threadIdx.x % kWarp, d = call.dimension;
  float largest = 0.0f;
  unsigned long long fault = kNoFault;
  for (const bool columns : {false, true}) {
    const StreamSide& side = columns ? call.columns : call.rows;
    for (uint32_t i = blockIdx.x * kStreamWarps + threadIdx.x / kWarp; i < side.count;
         i += gridDim.x * kStreamWarps) {
      const float* point = side.points + static_cast<uint64_t>(i) * d;
      float squares = 0.0f, most = 0.0f;
      for (uint32_t k = lane; k < d; k += kWarp) {
        const float value = point[k];
        if (!(fabsf(value) <= FLT_MAX))
          fault = min(fault, (columns ? static_cast<unsigned long long>(call.rows.count) * d : 0ull) +
                                 static_cast<unsigned long long>(i) * d + k);
        squares = fmaf(value, value, squares);
        if constexpr (kCosts == Costs::kHalves) most = fmaxf(most, fabsf(value - mean[k]));
      }
      for (uint32_t distance = kWarp / 2; distance > 0; distance /= 2)
        squares += __shfl_xor_sync(kAllLanes, squares, distance);
      const float inverse = squares > 0.0f ? 1.0f / sqrtf(squares) : 0.0f;
      if (call.cost_kind == PH_OT_COSINE) most *= inverse;
      largest = fmaxf(largest, most);
      if (lane == 0) {
        side.norms[i] = 0.0f;
        side.norms[side.count + i] = inverse;
      }
    }
  }
  if (largest > 0.0f && largest <= FLT_MAX)
    atomicMax(&call.state->largest_coordinate, __float_as_uint(largest));
  if (fault != kNoFault) atomicMin(&call.state->point_fault, fault);
}

// A warp a point: its halves, and what of costs is its own.
template <int kUnused>
__global__ void __launch_bounds__(kStreamThreads)
    StreamHalvesKernel(const __grid_constant__ StreamCall call) {
  float* mean = reinterpret_cast<float*>(dynamic_shared());
  load_mean(call, mean);
  const float scale = coordinate_scale(*call.state);
  const uint32_t lane = threadIdx.x % kWarp, d = call.dimension;
  for (const StreamSide* side : {&call.rows, &call.columns}) {
    for (uint32_t i = blockIdx.x * kStreamWarps + threadIdx.x / kWarp; i < side->count;
         i += gridDim.x * kStreamWarps) {
      const float* point = side->points + static_cast<uint64_t>(i) * d;
      uint16_t* halves = side->halves + static_cast<uint64_t>(i) * 2 * kHalfDimension;
      const float inverse = side->norms[side->count + i];
      double squares = 0.0;
      for (uint32_t k = lane; k < kHalfDimension; k += kWarp) {
        float value = k < d ? point[k] - mean[k] : 0.0f;
        if (call.cost_kind == PH_OT_COSINE) value *= inverse;
        const float scaled = value * scale;
        const __half high = __float2half_rn(scaled);
        const __half low = __float2half_rn(scaled - __half2float(high));
        halves[k] = __half_as_ushort(high);
        halves[kHalfDimension + k] = __half_as_ushort(low);
        // Of the sum of the halves, so that costs of points to themselves are 0.
        const double kept = (double{__half2float(high)} + __half2float(low)) / scale;
        squares += kept * kept;
      }
      for (uint32_t distance = kWarp / 2; distance > 0; distance /= 2)
        squares += __shfl_xor_sync(kAllLanes, squares, distance);
      if (lane != 0) continue;
      float norm = 0.0f;
      if (call.cost_kind == PH_OT_SQEUCLIDEAN) norm = static_cast<float>(squares);
      if (call.cost_kind == PH_OT_COSINE) norm = squares > 0.0 ? static_cast<float>(0.5 * squares) : 0.5f;
      side->norms[i] = norm;
    }
  }
}

// Sums of a tile's rows group, group + 16, ... for four columns of a matrix from `at` on.
struct MatrixSums {
  float of[8][4];
};
// Adds the product of a tile's entries and the matrix in shared memory, and sums of the entries.
__device__ __forceinline__ void add_product(const StreamShared::Product& product, uint32_t at, uint32_t group,
                                            MatrixSums& sums, float (&masses)[8]) {
#pragma unroll 1
  for (uint32_t j = 0; j < kTileColumns; j += 4) {
    float matrix[4][4];
#pragma unroll
    for (int q = 0; q < 4; ++q) read_four(&product.matrix[j + q][at], matrix[q]);
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      float plan[4];
      read_four(&product.plan[group + 16 * r][j], plan);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        masses[r] += plan[q];
#pragma unroll
        for (int i = 0; i < 4; ++i) sums.of[r][i] = fmaf(plan[q], matrix[q][i], sums.of[r][i]);
      }
    }
  }
}

// out [rows, width] = T matrix [columns, width] of a side's rows, kChunk columns of the matrix at a time; the plan is computed
// again for each. Threads take 8 rows x 4 columns.
template <Costs kCosts>
__device__ __noinline__ void run_product(const StreamCall& call, float scale, bool transposed,
                                         StreamShared& shared, StreamShared::Product& product) {
  using Tile = StreamTile<kCosts, Use::kWrite>;
  Tile tile = Tile::of(call, {scale, transposed, 0, 0, 0, 0}, shared);
  const uint32_t width = call.width;
  const StreamSide &own = tile.own, &other = tile.other;
  const uint32_t row_tiles = (own.count + kTileRows - 1) / kTileRows,
                 column_tiles = (other.count + kTileColumns - 1) / kTileColumns,
                 chunks = (width + kChunk - 1) / kChunk;
  const uint32_t at = threadIdx.x % 8 * 4, group = threadIdx.x / 8;  // rows group, group + 16, ...
  for (uint32_t item = blockIdx.x; item < row_tiles * chunks; item += gridDim.x) {
    const uint32_t k = item % chunks * kChunk, first_row = item / chunks * kTileRows;
    tile.begin(first_row);
    float bias[4], masses[8] = {};
    MatrixSums sums = {};
#pragma unroll
    for (int r = 0; r < 4; ++r) bias[r] = tile.row_of(r) < own.count ? own.bias[tile.row_of(r)] : -INFINITY;
    tile.for_columns(0, column_tiles, [&](uint32_t column, const float(&values)[2][2][4]) {
      const uint32_t in_tile = column % kTileColumns;
      Tile::for_values([&](int m, int n, int e) {
        const int r = 2 * m + e / 2;
        product.plan[tile.row_of(r) - first_row][in_tile + tile.column_of(n, e % 2)] =
            tile.plan_of(values[m][n][e] + bias[r], r, column + tile.column_of(n, e % 2));
      });
      if (in_tile + 16 < kTileColumns) return;
      const uint32_t first = column - in_tile;
      for (uint32_t each = threadIdx.x; each < kTileColumns * kChunk; each += kStreamThreads) {
        const uint32_t j = each / kChunk, i = each % kChunk;
        product.matrix[j][i] = first + j < other.count && k + i < width
                                   ? call.matrix[static_cast<uint64_t>(first + j) * width + k + i]
                                   : 0.0f;
      }
      __syncthreads();
      add_product(product, at, group, sums, masses);
      __syncthreads();
    });
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      const uint32_t row = first_row + group + 16 * r;
      if (row >= own.count) continue;
      const float factor = call.normalised ? (masses[r] > 0.0f ? 1.0f / masses[r] : 0.0f) : 1.0f;
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i)
        if (k + at + i < width)
          call.product[static_cast<uint64_t>(row) * width + k + at + i] = sums.of[r][i] * factor;
    }
  }
}

// The exponents' biases from potentials, and zeros from problems without an answer.
template <int kUnused>
__global__ void __launch_bounds__(kStreamThreads) StreamBiasKernel(const __grid_constant__ StreamCall call) {
  const ph_ot_report& report = call.solved[call.problem];
  const bool present = report.status < PH_OT_INFEASIBLE;
  const double scale = present ? 1.4426950408889634 / report.epsilon : 0.0;
  for (const StreamSide* side : {&call.rows, &call.columns}) {
    const uint32_t padded = (side->count + kTileColumns - 1) / kTileColumns * kTileColumns;
    for (uint32_t i = blockIdx.x * kStreamThreads + threadIdx.x; i < padded; i += gridDim.x * kStreamThreads)
      side->bias[i] = present && i < side->count
                          ? static_cast<float>((double{side->out[i]} - side->norms[i]) * scale)
                          : -INFINITY;
  }
}

// Writes a plan, or multiplies by it or by its transpose, from potentials (which are in `out` of the sides).
template <Costs kCosts>
__global__ void __launch_bounds__(kStreamThreads, 2)
    StreamPlanKernel(const __grid_constant__ StreamCall call, bool transposed) {
  StreamShared& shared = *reinterpret_cast<StreamShared*>(dynamic_shared());
  StreamShared::Product& product = *reinterpret_cast<StreamShared::Product*>(&shared + 1);
  const ph_ot_report& report = call.solved[call.problem];
  const float scale =
      report.status < PH_OT_INFEASIBLE ? static_cast<float>(1.4426950408889634 / report.epsilon) : 1.0f;
  if (call.plan == nullptr) return run_product<kCosts>(call, scale, transposed, shared, product);
  StreamShare(call.rows.count, call.columns.count, gridDim.x)
      .for_own([&](uint32_t row_tile, uint32_t first, uint32_t last) {
        run_part<kCosts, Use::kWrite>(call, {scale, false, row_tile, first, last, 0}, shared);
      });
}

}  // namespace ph::ot
