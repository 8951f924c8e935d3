// The operations of graph models on the CPU through the C ABI, for the sanitizers and for every instruction set: matrices of
// random sizes that end where their memory does, indices and offsets that lead nowhere, the same bits from one thread and
// from three; products against double precision.
//
// graph_operations_test [SEED]
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "packhorse.h"

namespace {

ph_device* device;
std::mt19937 random_numbers;

uint32_t up_to(uint32_t most) { return 1 + static_cast<uint32_t>(random_numbers()) % most; }
bool coin() { return random_numbers() % 2 == 0; }

// Words of 4 bytes in memory of exactly their size.
struct Words {
  explicit Words(uint64_t words) : count(words) {
    memory.reset(static_cast<uint8_t*>(malloc(4 * (count > 0 ? count : 1))));
    int32_t status;
    handle = ph_buffer_wrap(device, reinterpret_cast<uint64_t>(memory.get()), 4 * (count > 0 ? count : 1),
                            &status, error, sizeof error);
    CHECK(handle != nullptr);
  }
  ~Words() { OK(ph_buffer_destroy(device, handle, error, sizeof error)); }
  Words(const Words&) = delete;
  float* floats() const { return reinterpret_cast<float*>(memory.get()); }
  int32_t* integers() const { return reinterpret_cast<int32_t*>(memory.get()); }
  struct Free {
    void operator()(void* data) const { free(data); }
  };
  uint64_t count;
  std::unique_ptr<uint8_t, Free> memory;
  ph_buffer* handle;
};

struct Floats : Words {
  explicit Floats(uint64_t count) : Words(count) {
    std::normal_distribution<float> normal;
    for (uint64_t i = 0; i < count; ++i) floats()[i] = normal(random_numbers);
  }
};

// Indices of [0, bound), and now and then one that is none.
struct Indices : Words {
  Indices(uint64_t count, uint32_t bound) : Words(count) {
    for (uint64_t i = 0; i < count; ++i) {
      const uint32_t odd = static_cast<uint32_t>(random_numbers()) % 64;
      integers()[i] = odd == 0   ? -1
                      : odd == 1 ? INT32_MAX
                                 : static_cast<int32_t>(random_numbers() % (bound > 0 ? bound : 1));
    }
  }
};

// Offsets of `rows` runs that cover `entries`.
struct Offsets : Words {
  Offsets(uint32_t rows, uint32_t entries) : Words(rows + 1ull) {
    for (uint32_t i = 0; i <= rows; ++i)
      integers()[i] = static_cast<int32_t>(random_numbers() % (entries + 1));
    std::sort(integers(), integers() + rows + 1);
    integers()[0] = 0;
    integers()[rows] = static_cast<int32_t>(entries);
  }
};

// Runs `work` on one thread and on three, from the same outputs, and compares what they leave there.
template <typename Work>
void same_bits(std::initializer_list<const Words*> outputs, int line, Work work) {
  std::vector<std::vector<uint8_t>> before, after;
  for (const Words* each : outputs)
    before.emplace_back(each->memory.get(), each->memory.get() + 4 * each->count);
  omp_set_num_threads(1);
  check(work() == PH_OK, error, line);
  for (const Words* each : outputs)
    after.emplace_back(each->memory.get(), each->memory.get() + 4 * each->count);
  size_t i = 0;
  for (const Words* each : outputs) {
    std::copy(before[i].begin(), before[i].end(), each->memory.get());
    ++i;
  }
  omp_set_num_threads(3);
  check(work() == PH_OK, error, line);
  i = 0;
  for (const Words* each : outputs) {
    check(std::equal(after[i].begin(), after[i].end(), each->memory.get()),
          "one thread and three give other bits", line);
    ++i;
  }
}
void multiply() {
  const uint32_t rows = up_to(200), inner = coin() ? up_to(40) : up_to(500), columns = up_to(70);
  const bool transpose_a = coin(), transpose_b = coin(), has_bias = coin(), accumulate = coin();
  const Floats a(static_cast<uint64_t>(rows) * inner), b(static_cast<uint64_t>(inner) * columns),
      bias(columns), out(static_cast<uint64_t>(rows) * columns);
  const std::vector<float> before(out.floats(), out.floats() + out.count);
  same_bits({&out}, __LINE__, [&] {
    return ph_graph_multiply(device, a.handle, 0, transpose_a, b.handle, 0, transpose_b,
                             has_bias ? bias.handle : nullptr, 0, out.handle, 0, rows, inner, columns,
                             accumulate, error, sizeof error);
  });
  for (uint32_t i = 0; i < rows; ++i) {
    for (uint32_t j = 0; j < columns; ++j) {
      double sum = accumulate ? before[i * columns + j] : 0.0, size = std::fabs(sum);
      if (has_bias) sum += bias.floats()[j];
      for (uint32_t k = 0; k < inner; ++k) {
        const double product = static_cast<double>(a.floats()[transpose_a ? k * rows + i : i * inner + k]) *
                               static_cast<double>(b.floats()[transpose_b ? j * inner + k : k * columns + j]);
        sum += product;
        size += std::fabs(product);
      }
      CHECK(std::fabs(static_cast<double>(out.floats()[i * columns + j]) - sum) <= 1e-5 * size + 1e-5);
    }
  }
}

void sparse() {
  const uint32_t heads = up_to(3), width = heads * up_to(coin() ? 5 : 80), rows = up_to(300),
                 x_rows = up_to(300), entries = static_cast<uint32_t>(random_numbers()) % 900;
  const Floats x(static_cast<uint64_t>(x_rows) * width), weights(static_cast<uint64_t>(entries) * heads),
      row_scale(rows), column_scale(x_rows), out(static_cast<uint64_t>(rows) * width),
      dots(static_cast<uint64_t>(entries) * heads);
  const Indices columns(entries, x_rows), edges(entries, entries);
  const Offsets offsets(rows, entries), wrong(rows, entries);
  if (coin()) wrong.integers()[up_to(rows)] = coin() ? INT32_MAX : INT32_MIN;
  const bool weighs = coin(), scales = coin(), reorders = coin(), accumulate = coin();
  const float self = rows == x_rows ? 0.5f : 0.0f;
  same_bits({&out}, __LINE__, [&] {
    return ph_graph_aggregate(device, x.handle, 0, wrong.handle, 0, columns.handle, 0,
                              reorders ? edges.handle : nullptr, 0, weighs ? weights.handle : nullptr, 0,
                              scales ? row_scale.handle : nullptr, 0, scales ? column_scale.handle : nullptr,
                              0, out.handle, 0, rows, x_rows, entries, entries, weighs ? heads : 1, width,
                              self, accumulate, error, sizeof error);
  });
  same_bits({&dots}, __LINE__, [&] {
    return ph_graph_edge_dot(device, out.handle, 0, x.handle, 0, offsets.handle, 0, columns.handle, 0,
                             scales ? row_scale.handle : nullptr, 0, scales ? column_scale.handle : nullptr,
                             0, dots.handle, 0, rows, x_rows, entries, heads, width, accumulate, error,
                             sizeof error);
  });
  const Indices gathered(rows, x_rows);
  same_bits({&out}, __LINE__, [&] {
    return ph_graph_aggregate(device, x.handle, 0, nullptr, 0, gathered.handle, 0, nullptr, 0, nullptr, 0,
                              nullptr, 0, nullptr, 0, out.handle, 0, rows, x_rows, rows, 0, 1, width, 0.0f,
                              accumulate, error, sizeof error);
  });
}

void full_blocks() {
  const uint32_t blocks = up_to(30);
  const Words rows(blocks + 1ull), columns(blocks + 1ull), entries(blocks + 1ull);
  for (const Words* each : {&rows, &columns, &entries}) each->integers()[0] = 0;
  for (uint32_t i = 0; i < blocks; ++i) {
    const int32_t n = static_cast<int32_t>(up_to(20)) - 1, m = static_cast<int32_t>(up_to(20)) - 1;
    rows.integers()[i + 1] = rows.integers()[i] + n;
    columns.integers()[i + 1] = columns.integers()[i] + m;
    entries.integers()[i + 1] = entries.integers()[i] + n * m;
  }
  const uint32_t count = static_cast<uint32_t>(entries.integers()[blocks]);
  const Words of_column(count), of_row(count), order(count), inverse(count);
  for (const Words* each : {&of_column, &of_row, &order, &inverse})
    memset(each->memory.get(), 0, 4 * each->count);
  const auto run = [&](const Words& row_offsets) {
    return ph_graph_full_blocks(device, row_offsets.handle, 0, columns.handle, 0, entries.handle, 0,
                                of_column.handle, 0, of_row.handle, 0, order.handle, 0, inverse.handle, 0,
                                blocks, count, error, sizeof error);
  };
  same_bits({&of_column, &of_row, &order, &inverse}, __LINE__, [&] { return run(rows); });
  for (uint32_t q = 0; q < count; ++q) {
    CHECK(inverse.integers()[order.integers()[q]] == static_cast<int32_t>(q));
    const auto block =
        std::upper_bound(entries.integers(), entries.integers() + blocks + 1, static_cast<int32_t>(q)) -
        entries.integers() - 1;
    const int32_t n = rows.integers()[block + 1] - rows.integers()[block],
                  m = columns.integers()[block + 1] - columns.integers()[block],
                  k = static_cast<int32_t>(q) - entries.integers()[block];
    CHECK(of_column.integers()[q] == columns.integers()[block] + k % m);
    CHECK(of_row.integers()[q] == rows.integers()[block] + k % n);
    CHECK(order.integers()[q] == entries.integers()[block] + k % n * m + k / n);
  }
  // Offsets of blocks that the entries have no room for write nothing outside.
  const Indices wrong(blocks + 1, count + 50);
  omp_set_num_threads(1);
  check(run(wrong) == PH_OK, error, __LINE__);
}

void segments() {
  const uint32_t rows = up_to(200), x_rows = static_cast<uint32_t>(random_numbers()) % 700, width = up_to(70);
  const Floats x(static_cast<uint64_t>(x_rows) * width), dy(static_cast<uint64_t>(x_rows) * width),
      out(static_cast<uint64_t>(rows) * width), dx(static_cast<uint64_t>(x_rows) * width), y(dy.count);
  const Words places(static_cast<uint64_t>(rows) * width);
  memset(places.memory.get(), 0, 4 * places.count);
  const Offsets offsets(rows, x_rows);
  const bool accumulate = coin();
  same_bits({&out, &places}, __LINE__, [&] {
    return ph_graph_segment_max(device, x.handle, 0, offsets.handle, 0, out.handle, 0, places.handle, 0, rows,
                                x_rows, width, error, sizeof error);
  });
  same_bits({&dx}, __LINE__, [&] {
    return ph_graph_segment_max_backward(device, out.handle, 0, places.handle, 0, dx.handle, 0, rows, x_rows,
                                         width, accumulate, error, sizeof error);
  });
  same_bits({&y}, __LINE__, [&] {
    return ph_graph_segment_softmax(device, x.handle, 0, offsets.handle, 0, y.handle, 0, rows, x_rows, width,
                                    error, sizeof error);
  });
  same_bits({&dx}, __LINE__, [&] {
    return ph_graph_segment_softmax_backward(device, y.handle, 0, dy.handle, 0, offsets.handle, 0, dx.handle,
                                             0, rows, x_rows, width, accumulate, error, sizeof error);
  });
}

void by_rows_and_columns() {
  const uint32_t heads = up_to(4), width = up_to(40), rows = static_cast<uint32_t>(random_numbers()) % 500;
  const uint32_t columns = heads * width;
  const uint64_t count = static_cast<uint64_t>(rows) * columns;
  const bool accumulate = coin();
  const Floats x(count), dy(count), out(count), dx(count), a(columns), da(columns), scores(rows * heads),
      weight(columns), bias(columns), mean(columns), variance(columns), saved(2ull * columns),
      row_saved(2ull * rows);
  for (uint32_t i = 0; i < columns; ++i) variance.floats()[i] = std::fabs(variance.floats()[i]);
  same_bits({&scores}, __LINE__, [&] {
    return ph_graph_head_dot(device, x.handle, 0, a.handle, 0, scores.handle, 0, rows, heads, width, error,
                             sizeof error);
  });
  same_bits({&dx, &da}, __LINE__, [&] {
    return ph_graph_head_dot_backward(device, x.handle, 0, a.handle, 0, scores.handle, 0, dx.handle, 0,
                                      accumulate, da.handle, 0, accumulate, rows, heads, width, error,
                                      sizeof error);
  });
  same_bits({&da}, __LINE__, [&] {
    return ph_graph_column_sum(device, x.handle, 0, da.handle, 0, rows, columns, accumulate, error,
                               sizeof error);
  });
  same_bits({&out, &saved, &mean, &variance}, __LINE__, [&] {
    return ph_graph_batch_norm(device, x.handle, 0, weight.handle, 0, bias.handle, 0, mean.handle, 0,
                               variance.handle, 0, saved.handle, 0, out.handle, 0, rows, columns, 1e-5f, 0.1f,
                               accumulate, error, sizeof error);
  });
  same_bits({&dx, &weight, &bias}, __LINE__, [&] {
    return ph_graph_batch_norm_backward(device, x.handle, 0, a.handle, 0, saved.handle, 0, dy.handle, 0,
                                        dx.handle, 0, weight.handle, 0, bias.handle, 0, rows, columns,
                                        accumulate, error, sizeof error);
  });
  same_bits({&out, &row_saved}, __LINE__, [&] {
    return ph_graph_layer_norm(device, x.handle, 0, weight.handle, 0, bias.handle, 0, row_saved.handle, 0,
                               out.handle, 0, rows, columns, 1e-5f, error, sizeof error);
  });
  same_bits({&dx, &weight, &bias}, __LINE__, [&] {
    return ph_graph_layer_norm_backward(device, x.handle, 0, a.handle, 0, row_saved.handle, 0, dy.handle, 0,
                                        dx.handle, 0, weight.handle, 0, bias.handle, 0, rows, columns,
                                        accumulate, error, sizeof error);
  });
  const uint32_t stride = columns + up_to(5);
  const Floats wide(static_cast<uint64_t>(rows) * stride);
  same_bits({&wide}, __LINE__, [&] {
    return rows == 0 ? PH_OK
                     : ph_graph_copy_columns(device, x.handle, 0, columns, wide.handle, 4, stride, rows,
                                             columns, accumulate, error, sizeof error);
  });
}

void elements() {
  const uint64_t count = random_numbers() % 50000;
  const Floats x(count), y(count), out(count);
  const bool accumulate = coin();
  const bool has_y = coin();
  const uint32_t kind = static_cast<uint32_t>(random_numbers()) % 6;
  same_bits({&out}, __LINE__, [&] {
    return ph_graph_activate(device, kind, 0.2f, x.handle, 0, out.handle, 0, count, error, sizeof error);
  });
  same_bits({&out}, __LINE__, [&] {
    return ph_graph_activate_backward(device, kind, 0.2f, x.handle, 0, y.handle, 0, out.handle, 0, count,
                                      accumulate, error, sizeof error);
  });
  same_bits({&out}, __LINE__, [&] {
    return ph_graph_combine(device, 2.0f, x.handle, 0, 0.5f, has_y ? y.handle : nullptr, 0, out.handle, 0,
                            count, error, sizeof error);
  });
}

void steps() {
  const uint64_t count = random_numbers() % 50000;
  const Floats x(count), y(count), out(count), first(count), second(count), norm(1);
  const bool accumulate = coin();
  for (uint64_t i = 0; i < count; ++i) second.floats()[i] = std::fabs(second.floats()[i]);
  same_bits({&out}, __LINE__, [&] {
    return ph_graph_product(device, x.handle, 0, y.handle, 0, out.handle, 0, count, accumulate, error,
                            sizeof error);
  });
  same_bits({&out}, __LINE__, [&] {
    return ph_graph_dropout(device, x.handle, 0, out.handle, 0, count, 0.4f, 1234567891011ull, accumulate,
                            error, sizeof error);
  });
  same_bits({&norm}, __LINE__, [&] {
    return ph_graph_squared_norm(device, y.handle, 0, norm.handle, 0, count, error, sizeof error);
  });
  same_bits({&x, &first, &second}, __LINE__, [&] {
    return ph_graph_adam(device, x.handle, 0, y.handle, 0, first.handle, 0, second.handle, 0, norm.handle, 0,
                         count, 0.01f, 0.9f, 0.999f, 1e-8f, 0.01f, 0.1f, 0.001f, 5.0f, accumulate, error,
                         sizeof error);
  });
  const uint32_t rows = static_cast<uint32_t>(random_numbers()) % 200, classes = up_to(20);
  const Floats logits(static_cast<uint64_t>(rows) * classes), probabilities(logits.count), loss(1),
      losses(rows), dx(logits.count);
  const Indices labels(rows, classes);
  const Words predictions(rows);
  memset(predictions.memory.get(), 0, 4 * predictions.count);
  same_bits({&probabilities, &loss, &losses, &predictions}, __LINE__, [&] {
    return ph_graph_cross_entropy(device, logits.handle, 0, labels.handle, 0, probabilities.handle, 0,
                                  loss.handle, 0, losses.handle, 0, predictions.handle, 0, rows, classes,
                                  0.5f, error, sizeof error);
  });
  same_bits({&dx}, __LINE__, [&] {
    return ph_graph_cross_entropy_backward(device, probabilities.handle, 0, labels.handle, 0, loss.handle, 0,
                                           dx.handle, 0, rows, classes, 0.5f, accumulate, error,
                                           sizeof error);
  });
}

// What does not fit is refused before anything is read.
void refusals() {
  const Floats x(12), out(12);
  CHECK(ph_graph_multiply(device, x.handle, 0, 0, x.handle, 0, 0, nullptr, 0, out.handle, 0, 4, 3, 5, 0,
                          error, sizeof error) == PH_ERROR_INVALID_ARGUMENT);
  CHECK(ph_graph_multiply(device, x.handle, 4, 0, x.handle, 0, 0, nullptr, 0, out.handle, 0, 2, 2, 2, 0,
                          error, sizeof error) == PH_ERROR_INVALID_ARGUMENT);
  CHECK(ph_graph_multiply(device, x.handle, 0, 2, x.handle, 0, 0, nullptr, 0, out.handle, 0, 2, 2, 2, 0,
                          error, sizeof error) == PH_ERROR_INVALID_ARGUMENT);
  CHECK(ph_graph_multiply(device, x.handle, 0, 0, x.handle, 0, 0, nullptr, 0, out.handle, 0, 0xffffffffu,
                          0xffffffffu, 1, 0, error, sizeof error) == PH_ERROR_INVALID_ARGUMENT);
  CHECK(ph_graph_aggregate(device, x.handle, 0, nullptr, 0, nullptr, 0, nullptr, 0, nullptr, 0, nullptr, 0,
                           nullptr, 0, out.handle, 0, 3, 3, 2, 0, 1, 4, 0.0f, 0, error,
                           sizeof error) == PH_ERROR_INVALID_ARGUMENT);
  CHECK(ph_graph_aggregate(device, x.handle, 0, nullptr, 0, nullptr, 0, nullptr, 0, nullptr, 0, nullptr, 0,
                           nullptr, 0, out.handle, 0, 3, 3, 3, 0, 3, 4, 0.0f, 0, error,
                           sizeof error) == PH_ERROR_INVALID_ARGUMENT);
  CHECK(ph_graph_activate(device, 6, 0.0f, x.handle, 0, out.handle, 0, 12, error, sizeof error) ==
        PH_ERROR_INVALID_ARGUMENT);
  CHECK(ph_graph_dropout(device, x.handle, 0, out.handle, 0, 12, 1.0f, 0, 0, error, sizeof error) ==
        PH_ERROR_INVALID_ARGUMENT);
  CHECK(ph_graph_activate(device, 0, 0.0f, x.handle, 0, nullptr, 0, 12, error, sizeof error) ==
        PH_ERROR_INVALID_ARGUMENT);
}

}  // namespace

int main(int argc, char** argv) {
  const uint32_t seed = argc > 1 ? static_cast<uint32_t>(strtoul(argv[1], nullptr, 10)) : 1;
  random_numbers.seed(seed);
  int32_t status;
  device = ph_device_open(0, &status, error, sizeof error);
  if (device == nullptr) {
    fprintf(stderr, "%s\n", error);
    return 1;
  }
  refusals();
  for (int i = 0; i < 25; ++i) {
    multiply();
    sparse();
    segments();
    full_blocks();
    by_rows_and_columns();
    elements();
    steps();
  }
  OK(ph_device_close(device, error, sizeof error));
  printf("graph operations hold, seed %u\n", seed);
}
