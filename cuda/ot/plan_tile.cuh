// The plan of a small problem on chip, and products with it: see tile.cuh.
#pragma once

#include "ot/tile.cuh"

namespace ph::ot {

// Potentials of operations.h.
struct PlanSource {
  const float *f, *g, *plan;
  const ph_ot_report* reports;
};

template <typename L>
struct PlanTile {
  Tile<L>& tile;
  float entries[L::kRows][L::kColumns];

  // From the plan where there is one, else from costs, which are in `entries`.
  __device__ __forceinline__ void fill(const PlanSource& source) {
    if (source.plan != nullptr) {
      const float* from =
          source.plan + tile.plan_offset() + static_cast<int64_t>(tile.first_row) * tile.columns;
#pragma unroll
      for (int ii = 0; ii < L::kRows; ++ii) {
        const bool in_rows = tile.row_of(ii) < tile.block_rows;
        const float* row = from + tile.row_of(ii) * tile.columns + tile.lane_column;
#pragma unroll
        for (int jj = 0; jj < L::kColumns; ++jj)
          entries[ii][jj] = in_rows && tile.column_of(jj) < tile.columns ? row[jj * L::kLaneColumns] : 0.0f;
      }
      return;
    }
    const float scale =
        fminf(static_cast<float>(1.4426950408889634 / source.reports[tile.problem].epsilon), FLT_MAX);
    const uint32_t own_row = tile.own_row();
    const float f =
        own_row < tile.block_rows ? source.f[tile.row_offset() + tile.first_row + own_row] : -INFINITY;
    float g[L::kOwned], f_row[L::kRows], g_column[L::kColumns];
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) {
      const uint32_t column = tile.own_column(k);
      g[k] = column < tile.columns ? source.g[tile.column_offset() + column] : -INFINITY;
    }
    tile.of_rows(f, f_row);
    tile.of_columns(g, g_column);
#pragma unroll
    for (int ii = 0; ii < L::kRows; ++ii) {
#pragma unroll
      for (int jj = 0; jj < L::kColumns; ++jj)
        entries[ii][jj] = exp2_fast(reduced_cost(f_row[ii], entries[ii][jj], g_column[jj]) * scale);
    }
  }

  // Sums over the own row, of entries times x of their columns.
  __device__ __forceinline__ float sum_row(const float (&x)[L::kOwned]) const {
    return tile.weighted_row(entries, x);
  }
  __device__ __forceinline__ float sum_row_of_ones() const {
    float ones[L::kOwned];
#pragma unroll
    for (int k = 0; k < L::kOwned; ++k) ones[k] = 1.0f;
    return sum_row(ones);
  }
  // Sums over the own columns, of entries times x of their rows.
  __device__ __forceinline__ void sum_columns(float x, float (&own)[L::kOwned]) const {
    tile.weighted_columns(entries, x, own, 0.0f, false);
  }
};

// Entries as a matrix in shared memory, in tile.entries: rows are 16 bytes apart modulo 32, so that four lanes that read 16
// bytes of four rows meet no bank twice.
template <typename L>
__host__ __device__ constexpr uint32_t matrix_pitch() {
  return L::kMostColumns + 4;
}
template <typename L>
__host__ __device__ constexpr uint32_t matrix_floats(uint32_t warps) {
  return warps * L::kWarpRows * matrix_pitch<L>();
}
template <typename L>
__device__ __forceinline__ void store_matrix(const Tile<L>& tile,
                                             const float (&values)[L::kRows][L::kColumns]) {
#pragma unroll
  for (int ii = 0; ii < L::kRows; ++ii) {
    float* row = tile.entries + tile.row_of(ii) * matrix_pitch<L>() + tile.lane_column;
#pragma unroll
    for (int jj = 0; jj < L::kColumns; ++jj) row[jj * L::kLaneColumns] = values[ii][jj];
  }
}

// With the block's rows of the matrix W in tile.entries, X and Y of `width` columns that are scaled, less an origin
//   rows_out    = row_factors    o (row_coefficients    o X + sign W Y)
//   columns_out = column_factors o (column_coefficients o Y + sign W' X)
// where coefficients that are null count as 0, and factors as 1. Rows count from the block's first.
struct MatrixProduct {
  uint32_t width;
  const float *rows_matrix, *columns_matrix;  // X, Y; null where nothing needs it
  const float *row_scales, *column_scales, *origin;
  const float *row_coefficients, *column_coefficients, *row_factors, *column_factors;
  float sign;
  float *rows_out, *columns_out;
};

// Threads take 4 x 4 elements of the result, four columns of which eight neighbours have next to each other. X and Y pass
// through tile.partials [staged_floats] in chunks.
template <typename L>
__device__ __forceinline__ void multiply_matrix(const Tile<L>& tile, const MatrixProduct& product) {
  constexpr uint32_t kPitchW = matrix_pitch<L>(), kFours = kChunk / 4;
  const uint32_t most_rows = tile.warps * L::kWarpRows, width = product.width;
  float* staged_x = tile.partials;
  float* staged_y = staged_x + most_rows * kPitch;
  const uint32_t columns = (tile.columns + 3) / 4 * 4;
  const auto write = [&](float* out, uint32_t at, uint32_t k, const float(&four)[4]) {
    float* target = out + static_cast<uint64_t>(at) * width + k;
    if (width % 4 == 0) {
      *reinterpret_cast<float4*>(target) = make_float4(four[0], four[1], four[2], four[3]);
      return;
    }
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i)
      if (k + i < width) target[i] = four[i];
  };
  for (uint32_t k = 0; k < width; k += kChunk) {
    __syncthreads();  // before points are overwritten, and after the matrix is complete
    if (product.rows_matrix != nullptr)
      stage_points<kChunk>(tile, staged_x, product.rows_matrix, product.row_scales, product.origin,
                           tile.block_rows, most_rows, width, k);
    if (product.columns_matrix != nullptr)
      stage_points<kChunk>(tile, staged_y, product.columns_matrix, product.column_scales, product.origin,
                           tile.columns, columns, width, k);
    if (tile.ranks > 1) cluster_sync();
    else __syncthreads();
    if (product.rows_out != nullptr) {
      const uint32_t items = (tile.block_rows + 15) / 16 * 4 * kFours;
      for (uint32_t item = tile.thread; item < items; item += tile.threads) {
        const uint32_t at = item % kFours * 4, quarter = item / kFours;
        const uint32_t row = quarter / 4 * 16 + quarter % 4;  // and 4, 8, 12 on
        if (k + at >= width) continue;
        float sums[4][4] = {};
        for (uint32_t j = 0; j < columns; j += 4) {
          float w[4][4], y[4][4];
#pragma unroll
          for (uint32_t i = 0; i < 4; ++i) {
            // Rows there is no room for count as the last.
            read_four(tile.entries + min(row + 4 * i, most_rows - 1) * kPitchW + j, w[i]);
            read_four(staged_y + (j + i) * kPitch + at, y[i]);
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int q = 0; q < 4; ++q) {
#pragma unroll
              for (int e = 0; e < 4; ++e) sums[i][e] = fmaf(w[i][q], y[q][e], sums[i][e]);
            }
          }
        }
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
          const uint32_t each = row + 4 * i;
          if (each >= tile.block_rows) continue;
          const float coefficient =
              product.row_coefficients == nullptr ? 0.0f : product.row_coefficients[each];
          const float factor = product.row_factors == nullptr ? 1.0f : product.row_factors[each];
          float out[4], x[4] = {};
          if (coefficient != 0.0f) read_four(staged_x + each * kPitch + at, x);
#pragma unroll
          for (int e = 0; e < 4; ++e) out[e] = factor * fmaf(coefficient, x[e], product.sign * sums[i][e]);
          write(product.rows_out, each, k + at, out);
        }
      }
    }
    if (product.columns_out != nullptr) {
      const uint32_t items = columns / 4 * kFours;
      for (uint32_t item = tile.rank * tile.threads + tile.thread; item < items;
           item += tile.ranks * tile.threads) {
        const uint32_t at = item % kFours * 4, column = item / kFours * 4;
        if (k + at >= width) continue;
        float sums[4][4] = {};
        for (uint32_t r = 0; r < tile.ranks; ++r) {
          const float* w_rows = tile.ranks > 1 ? in_cluster(tile.entries, r) : tile.entries;
          const float* x_rows = tile.ranks > 1 ? in_cluster(staged_x, r) : staged_x;
          const uint32_t first = min(r * most_rows, tile.rows), rows = min(tile.rows - first, most_rows);
          for (uint32_t i = 0; i < rows; ++i) {
            float w[4], x[4];
            read_four(w_rows + i * kPitchW + column, w);
            read_four(x_rows + i * kPitch + at, x);
#pragma unroll
            for (int q = 0; q < 4; ++q) {
#pragma unroll
              for (int e = 0; e < 4; ++e) sums[q][e] = fmaf(w[q], x[e], sums[q][e]);
            }
          }
        }
#pragma unroll
        for (uint32_t q = 0; q < 4; ++q) {
          const uint32_t each = column + q;
          if (each >= tile.columns) continue;
          const float coefficient =
              product.column_coefficients == nullptr ? 0.0f : product.column_coefficients[each];
          const float factor = product.column_factors == nullptr ? 1.0f : product.column_factors[each];
          float out[4], y[4] = {};
          if (coefficient != 0.0f) read_four(staged_y + each * kPitch + at, y);
#pragma unroll
          for (int e = 0; e < 4; ++e) out[e] = factor * fmaf(coefficient, y[e], product.sign * sums[q][e]);
          write(product.columns_out, each, k + at, out);
        }
      }
    }
    if (tile.ranks > 1) cluster_sync();  // before others' points are overwritten, or a block ends
  }
}

struct PlanCall {
  Batch batch;
  PlanSource source;
  float* plan;          // null, or where the plan goes; else
  const float* matrix;  // PlanProduct
  float* out;
  uint32_t width;
  bool transposed, normalised;
};

// Shared memory of PlanTileKernel, in floats.
template <typename L>
struct PlanShared {
  uint32_t work, vectors, entries;  // where vectors are among `entries`, and how long all are
  __host__ __device__ explicit PlanShared(uint32_t warps) {
    const uint32_t partial = partial_floats<L>(warps), staged = staged_floats<L>(warps);
    work = partial > staged ? partial : staged;
    vectors = matrix_floats<L>(warps);
    entries = vectors + warps * L::kWarpRows + L::kMostColumns;
  }
};

// Writes plans, or multiplies by them. The plan, or points or costs and potentials, and the matrix are read once.
template <typename L>
__global__ void __launch_bounds__(L::kMostWarps* kWarp, L::kBlocks)
    PlanTileKernel(const __grid_constant__ PlanCall call) {
  begin_launch(call.batch);
  const PlanShared<L> shared(blockDim.x / kWarp);
  Tile<L> tile(call.batch, dynamic_shared(), shared.work);
  const int64_t first_row = tile.row_offset() + tile.first_row;
  PlanTile<L> plan{tile};
  float* vectors = tile.entries + shared.vectors;
  if (call.source.reports[tile.problem].status >= PH_OT_INFEASIBLE) {
#pragma unroll
    for (int ii = 0; ii < L::kRows; ++ii) {
#pragma unroll
      for (int jj = 0; jj < L::kColumns; ++jj) plan.entries[ii][jj] = 0.0f;
    }
  } else {
    if (call.source.plan == nullptr) {
      load_costs(tile, tile.partials, vectors, plan.entries);
      __syncthreads();
    }
    plan.fill(call.source);
  }
  if (call.plan != nullptr) {
    write_entries(tile, plan.entries, call.plan);
  } else {
    MatrixProduct product = {};
    product.width = call.width;
    product.sign = 1.0f;
    const uint32_t most_rows = tile.warps * L::kWarpRows;
    if (call.normalised) {
      const float sum = plan.sum_row_of_ones();
      float sums[L::kOwned];
      plan.sum_columns(1.0f, sums);
      if (tile.lane_column % L::kRowCopies == 0) vectors[tile.own_row()] = sum > 0.0f ? 1.0f / sum : 0.0f;
      if (tile.warp == 0) {
#pragma unroll
        for (int k = 0; k < L::kOwned; ++k)
          vectors[most_rows + tile.own_column(k)] = sums[k] > 0.0f ? 1.0f / sums[k] : 0.0f;
      }
    }
    store_matrix(tile, plan.entries);
    if (call.transposed) {
      product.rows_matrix = call.matrix + first_row * call.width;
      product.columns_out = call.out + tile.column_offset() * call.width;
      product.column_factors = call.normalised ? vectors + most_rows : nullptr;
    } else {
      product.columns_matrix = call.matrix + tile.column_offset() * call.width;
      product.rows_out = call.out + first_row * call.width;
      product.row_factors = call.normalised ? vectors : nullptr;
    }
    multiply_matrix(tile, product);
  }
  end_launch(call.batch);
}

}  // namespace ph::ot
