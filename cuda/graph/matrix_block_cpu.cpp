// Products of small dense matrices on one CPU core; see operations_block_cpu.h.
//
// b goes through a panel of kInner x kTile elements in the first cache, transposed or not; a is read where it is. A
// micro-kernel keeps kRows x kTile sums in registers. An output is the sum of its products in their order, kInner at a
// time, whatever the rows that a call covers: results do not depend on the number of threads.
#include <cstddef>
#include <cstring>

#include "common/vector_cpu.h"
#include "graph/operations_block_cpu.h"

#define PH_STRING_OF(name) #name
#define PH_STRING(name) PH_STRING_OF(name)

namespace ph::graph::PH_INSTRUCTION_SET {

using namespace ph::PH_INSTRUCTION_SET;

namespace {

#if defined(__AVX512F__)
constexpr uint32_t kRows = 8;  // with 2 vectors each: of 32 registers
#else
constexpr uint32_t kRows = 6;  // of 16
#endif
constexpr uint32_t kTile = 2 * kVectorLanes;
constexpr uint32_t kInner = 192;

// Where an element of op(a) or op(b) is: data[row * row_stride + column * column_stride].
struct Strided {
  const float* data;
  size_t row_stride, column_stride;
};

// The panel's first `inner` rows of `columns` of b, the rest of a row zero.
void pack(const Strided& b, uint32_t inner, uint32_t columns, float* panel) {
  for (uint32_t k = 0; k < inner; ++k, panel += kTile) {
    const float* source = b.data + k * b.row_stride;
    if (b.column_stride == 1 && columns == kTile) {
      memcpy(panel, source, kTile * sizeof(float));
      continue;
    }
    for (uint32_t column = 0; column < kTile; ++column)
      panel[column] = column < columns ? source[column * b.column_stride] : 0.0f;
  }
}

template <uint32_t Rows>
void micro_kernel(const Strided& a, const float* panel, uint32_t inner, Floats (*sums)[2]) {
  Floats totals[Rows][2];
  for (uint32_t row = 0; row < Rows; ++row)
    for (uint32_t half = 0; half < 2; ++half) totals[row][half] = sums[row][half];
  const float* values = a.data;
  for (uint32_t k = 0; k < inner; ++k, panel += kTile, values += a.column_stride) {
    const Floats left = load<Floats>(panel), right = load<Floats>(panel + kVectorLanes);
#pragma GCC unroll 8
    for (uint32_t row = 0; row < Rows; ++row) {
      const Floats value = splat(values[row * a.row_stride]);
      totals[row][0] += value * left;
      totals[row][1] += value * right;
    }
  }
  for (uint32_t row = 0; row < Rows; ++row)
    for (uint32_t half = 0; half < 2; ++half) sums[row][half] = totals[row][half];
}

// The micro-kernel for 1 to kRows rows.
template <uint32_t Rows = kRows>
void multiply_rows(uint32_t rows, const Strided& a, const float* panel, uint32_t inner, Floats (*sums)[2]) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return multiply_rows<Rows - 1>(rows, a, panel, inner, sums);
  }
  micro_kernel<Rows>(a, panel, inner, sums);
}

void multiply(const Multiply& call, uint32_t first_row, uint32_t last_row) {
  const Strided a = call.transpose_a ? Strided{call.a, 1, call.rows} : Strided{call.a, call.inner, 1},
                b = call.transpose_b ? Strided{call.b, 1, call.inner} : Strided{call.b, call.columns, 1};
  alignas(64) float panel[kInner * kTile];
  for (uint32_t column = 0; column < call.columns; column += kTile) {
    const uint32_t columns = call.columns - column < kTile ? call.columns - column : kTile;
    uint32_t k = 0;
    do {  // once even where there is nothing to sum
      const uint32_t inner = call.inner - k < kInner ? call.inner - k : kInner;
      pack({b.data + k * b.row_stride + column * b.column_stride, b.row_stride, b.column_stride}, inner,
           columns, panel);
      for (uint32_t row = first_row; row < last_row; row += kRows) {
        const uint32_t rows = last_row - row < kRows ? last_row - row : kRows;
        alignas(64) float start[kRows][kTile];
        for (uint32_t i = 0; i < rows; ++i) {
          float* target = start[i];
          const float* out = call.out + static_cast<size_t>(row + i) * call.columns + column;
          if (k > 0 || call.accumulate) memcpy(target, out, columns * sizeof(float));
          else memset(target, 0, columns * sizeof(float));
          if (k == 0 && call.bias != nullptr)
            for (uint32_t c = 0; c < columns; ++c) target[c] += call.bias[column + c];
          for (uint32_t c = columns; c < kTile; ++c) target[c] = 0.0f;
        }
        Floats sums[kRows][2];
        for (uint32_t i = 0; i < rows; ++i)
          for (uint32_t half = 0; half < 2; ++half)
            sums[i][half] = load<Floats>(start[i] + half * kVectorLanes);
        multiply_rows(rows,
                      {a.data + row * a.row_stride + k * a.column_stride, a.row_stride, a.column_stride},
                      panel, inner, sums);
        for (uint32_t i = 0; i < rows; ++i)
          memcpy(call.out + static_cast<size_t>(row + i) * call.columns + column, sums[i],
                 columns * sizeof(float));
      }
      k += inner;
    } while (k < call.inner);
  }
}

}  // namespace

extern const MatrixKernels kMatrixKernels;
const MatrixKernels kMatrixKernels = {PH_STRING(PH_INSTRUCTION_SET), kRows, multiply};

}  // namespace ph::graph::PH_INSTRUCTION_SET
