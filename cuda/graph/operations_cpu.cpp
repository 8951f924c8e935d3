// The operations of operations.h on the CPU: rows, columns or elements are spread over the cores; matrix_block_cpu.cpp and
// rows_block_cpu.cpp do the work on each. No result depends on how they are spread.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "graph/full_blocks.h"
#include "graph/operations_block_cpu.h"
#include "kv/block_cpu.h"

namespace ph::graph {

#define PH_TABLES(name)                      \
  namespace name {                           \
  extern const MatrixKernels kMatrixKernels; \
  extern const RowKernels kRowKernels;       \
  }
#if defined(__x86_64__)
PH_TABLES(avx512)
PH_TABLES(avx2)
#endif
PH_TABLES(baseline)

namespace {

// The widest of the tables, which begin with the widest, that what the library runs by does not exceed.
template <typename Kernels>
const Kernels& kernels_of(std::initializer_list<const Kernels*> tables) {
  const char* chosen = "baseline";
#if defined(__x86_64__)
  // block_kernels does not ask for fused multiply-adds, which the wider kernels here use.
  if (__builtin_cpu_supports("fma")) chosen = kv::block_kernels().instruction_set;
#endif
  for (const Kernels* table : tables) {
    if (strncmp(chosen, table->instruction_set, strlen(table->instruction_set)) == 0) return *table;
  }
  return **(tables.end() - 1);
}

const MatrixKernels& matrix_kernels() {
#if defined(__x86_64__)
  static const MatrixKernels& kernels =
      kernels_of({&avx512::kMatrixKernels, &avx2::kMatrixKernels, &baseline::kMatrixKernels});
#else
  static const MatrixKernels& kernels = baseline::kMatrixKernels;
#endif
  return kernels;
}

const RowKernels& row_kernels() {
#if defined(__x86_64__)
  static const RowKernels& kernels =
      kernels_of({&avx512::kRowKernels, &avx2::kRowKernels, &baseline::kRowKernels});
#else
  static const RowKernels& kernels = baseline::kRowKernels;
#endif
  return kernels;
}

// Fewer elements than this are done before other threads are awake.
constexpr uint64_t kWorthwhile = 1 << 15;

// Calls use(first, last) for runs of `count` things, each of so many elements, on all cores if there is much to do.
template <typename Count, typename Use>
void spread(Count count, uint64_t elements, Count run, Use use) {
  const int64_t runs = static_cast<int64_t>((count + run - 1) / run);
#pragma omp parallel for schedule(static) if (count * elements >= kWorthwhile)
  for (int64_t i = 0; i < runs; ++i) {
    const Count first = static_cast<Count>(i) * run;
    use(first, std::min<Count>(count, first + run));
  }
}

// Rows of so many elements.
template <typename Use>
void by_rows(uint32_t rows, uint64_t elements, Use use) {
  spread<uint32_t>(rows, elements, 32, use);
}

template <typename Use>
void by_elements(uint64_t count, Use use) {
  spread<uint64_t>(count, 1, 1 << 12, use);
}

// Vectors of columns, each of so many rows.
template <typename Use>
void by_columns(uint32_t width, uint64_t rows, Use use) {
  const uint32_t lanes = row_kernels().lanes;
  spread<uint32_t>((width + lanes - 1) / lanes, rows * lanes, 1, use);
}

}  // namespace

void multiply(ph_device&, const Multiply& call) {
  const MatrixKernels& kernels = matrix_kernels();
  // Long runs, as each packs all of b; but enough of them for a few threads.
  const uint32_t tile = kernels.tile_rows, tiles = (call.rows + tile - 1) / tile,
                 run = tile * std::clamp<uint32_t>(tiles / 8, 1, 32);
  const uint64_t products = static_cast<uint64_t>(call.inner) * call.columns;
  spread<uint32_t>(call.rows, products, run,
                   [&](uint32_t first, uint32_t last) { kernels.multiply(call, first, last); });
}

void aggregate(ph_device&, const Aggregate& call) {
  const uint64_t entries = call.offsets == nullptr || call.rows == 0 ? 1 : call.entries / call.rows + 1;
  by_rows(call.rows, entries * call.width,
          [&](uint32_t first, uint32_t last) { row_kernels().aggregate(call, first, last); });
}

void edge_dot(ph_device&, const EdgeDot& call) {
  if (call.rows == 0) return;
  by_rows(call.rows, (call.entries / call.rows + 1ull) * call.width,
          [&](uint32_t first, uint32_t last) { row_kernels().edge_dot(call, first, last); });
}

void full_blocks(ph_device&, const FullBlocks& call) {
  spread<uint32_t>(
      call.blocks, call.entries / std::max(call.blocks, 1u), 4, [&](uint32_t first, uint32_t last) {
        for (uint32_t block = first; block < last; ++block) {
          const Block at = block_at(call, block);
          for (uint32_t i = 0; i < at.rows; ++i) {
            for (uint32_t j = 0; j < at.columns; ++j) {
              const uint32_t entry = at.entry + i * at.columns + j, transposed = at.entry + j * at.rows + i;
              call.columns[entry] = at.column + static_cast<int32_t>(j);
              call.inverse[entry] = static_cast<int32_t>(transposed);
              call.rows[transposed] = at.row + static_cast<int32_t>(i);
              call.order[transposed] = static_cast<int32_t>(entry);
            }
          }
        }
      });
}

void segment_max(ph_device&, const SegmentMax& call) {
  if (call.rows == 0) return;
  by_rows(call.rows, (call.x_rows / call.rows + 1ull) * call.width,
          [&](uint32_t first, uint32_t last) { row_kernels().segment_max(call, first, last); });
}

void segment_max_backward(ph_device&, const SegmentMaxBackward& call) {
  const uint64_t width = call.width;
  if (!call.accumulate) memset(call.dx, 0, call.x_rows * width * sizeof(float));
  // A place belongs to one row alone.
  by_rows(call.rows, width, [&](uint32_t first, uint32_t last) {
    for (uint64_t i = first * width; i < last * width; ++i) {
      const int32_t place = call.places[i];
      if (place >= 0 && static_cast<uint32_t>(place) < call.x_rows)
        call.dx[static_cast<uint64_t>(place) * width + i % width] += call.dy[i];
    }
  });
}

void segment_softmax(ph_device&, const SegmentSoftmax& call) {
  if (call.rows == 0) return;
  by_rows(call.rows, 16 * (call.x_rows / call.rows + 1ull) * call.width,
          [&](uint32_t first, uint32_t last) { row_kernels().segment_softmax(call, first, last); });
}

void segment_softmax_backward(ph_device&, const SegmentSoftmaxBackward& call) {
  if (call.rows == 0) return;
  by_rows(call.rows, 2 * (call.x_rows / call.rows + 1ull) * call.width,
          [&](uint32_t first, uint32_t last) { row_kernels().segment_softmax_backward(call, first, last); });
}

void head_dot(ph_device&, const HeadDot& call) {
  by_rows(call.rows, static_cast<uint64_t>(call.heads) * call.width,
          [&](uint32_t first, uint32_t last) { row_kernels().head_dot(call, first, last); });
}

void head_dot_backward(ph_device&, const HeadDotBackward& call) {
  const uint32_t width = call.heads * call.width;
  if (call.dx != nullptr) {
    by_rows(call.rows, width,
            [&](uint32_t first, uint32_t last) { row_kernels().head_dot_dx(call, first, last); });
  }
  if (call.da != nullptr) {
    by_columns(width, call.rows,
               [&](uint32_t first, uint32_t last) { row_kernels().head_dot_da(call, first, last); });
  }
}

void activate(ph_device&, const Activate& call) {
  by_elements(call.count, [&](uint64_t first, uint64_t last) { row_kernels().activate(call, first, last); });
}

void activate_backward(ph_device&, const ActivateBackward& call) {
  by_elements(call.count,
              [&](uint64_t first, uint64_t last) { row_kernels().activate_backward(call, first, last); });
}

void combine(ph_device&, const Combine& call) {
  by_elements(call.count, [&](uint64_t first, uint64_t last) { row_kernels().combine(call, first, last); });
}

void product(ph_device&, const Product& call) {
  by_elements(call.count, [&](uint64_t first, uint64_t last) { row_kernels().product(call, first, last); });
}

void copy_columns(ph_device&, const CopyColumns& call) {
  by_rows(call.rows, call.columns, [&](uint32_t first, uint32_t last) {
    for (uint32_t row = first; row < last; ++row) {
      const float* x = call.x + static_cast<uint64_t>(row) * call.x_stride;
      float* out = call.out + static_cast<uint64_t>(row) * call.out_stride;
      if (call.accumulate) {
        for (uint32_t column = 0; column < call.columns; ++column) out[column] += x[column];
      } else {
        memcpy(out, x, call.columns * sizeof(float));
      }
    }
  });
}

void column_sum(ph_device&, const ColumnSum& call) {
  by_columns(call.width, call.rows,
             [&](uint32_t first, uint32_t last) { row_kernels().column_sum(call, first, last); });
}

void batch_norm(ph_device&, const BatchNorm& call) {
  if (call.rows == 0) return;
  by_columns(call.width, 3ull * call.rows,
             [&](uint32_t first, uint32_t last) { row_kernels().batch_norm(call, first, last); });
}

void batch_norm_backward(ph_device&, const NormBackward& call) {
  if (call.rows == 0) return;
  by_columns(call.width, 3ull * call.rows,
             [&](uint32_t first, uint32_t last) { row_kernels().batch_norm_backward(call, first, last); });
}

void layer_norm(ph_device&, const LayerNorm& call) {
  by_rows(call.rows, call.width,
          [&](uint32_t first, uint32_t last) { row_kernels().layer_norm(call, first, last); });
}

void layer_norm_backward(ph_device&, const NormBackward& call) {
  if (call.dx != nullptr) {
    by_rows(call.rows, call.width,
            [&](uint32_t first, uint32_t last) { row_kernels().layer_norm_dx(call, first, last); });
  }
  by_columns(call.width, call.rows,
             [&](uint32_t first, uint32_t last) { row_kernels().layer_norm_parameters(call, first, last); });
}

void dropout(ph_device&, const Dropout& call) {
  by_elements(call.count, [&](uint64_t first, uint64_t last) { row_kernels().dropout(call, first, last); });
}

void cross_entropy(ph_device&, const CrossEntropy& call) {
  *call.loss = static_cast<float>(static_cast<double>(call.scale) * row_kernels().cross_entropy(call));
}

void cross_entropy_backward(ph_device&, const CrossEntropyBackward& call) {
  const float scale = call.scale * *call.dy;
  for (uint32_t row = 0; row < call.rows; ++row) {
    const int32_t label = call.labels[row];
    for (uint32_t c = 0; c < call.classes; ++c) {
      const uint64_t at = static_cast<uint64_t>(row) * call.classes + c;
      const float one = label >= 0 && static_cast<uint32_t>(label) == c ? 1.0f : 0.0f;
      const float dx = label < 0 ? 0.0f : scale * (call.probabilities[at] - one);
      call.dx[at] = call.accumulate ? call.dx[at] + dx : dx;
    }
  }
}

void squared_norm(ph_device&, const float* x, float* out, uint64_t count) {
  double sum = 0.0;
  for (uint64_t i = 0; i < count; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  *out = static_cast<float>(sum);
}

void adam(ph_device&, const Adam& call) {
  float clip = 1.0f;
  if (call.squared_norm != nullptr) {
    const float norm = std::sqrt(*call.squared_norm);
    if (!(norm <= call.most_norm)) clip = call.most_norm / norm;
  }
  by_elements(call.count,
              [&](uint64_t first, uint64_t last) { row_kernels().adam(call, clip, first, last); });
}

}  // namespace ph::graph
