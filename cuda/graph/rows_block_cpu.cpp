// What is computed by rows, elements or columns on one CPU core; see operations_block_cpu.h.
//
// Rows are taken in chunks of up to 4 vectors, whose sums stay in registers. Sums of a column go over 64 rows at a time and
// then over those sums, so that rounding does not grow with the number of rows.
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>

#include "common/philox.h"
#include "common/vector_cpu.h"
#include "graph/operations_block_cpu.h"

#define PH_STRING_OF(name) #name
#define PH_STRING(name) PH_STRING_OF(name)

namespace ph::graph::PH_INSTRUCTION_SET {

using namespace ph::PH_INSTRUCTION_SET;

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Vectors of a row; the last of a row may have fewer lanes.
template <uint32_t Vectors, bool IsPart>
struct Chunk {
  static constexpr uint32_t kVectors = Vectors;
  uint32_t count;  // of elements

  Floats read(const float* row, uint32_t vector) const {
    if constexpr (!IsPart) return load<Floats>(row + vector * kVectorLanes);
    float elements[kVectorLanes] = {};
    memcpy(elements, row, count * sizeof(float));
    return load<Floats>(elements);
  }
  void write(float* row, uint32_t vector, Floats x) const {
    if constexpr (!IsPart) store(row + vector * kVectorLanes, x);
    else memcpy(row, &x, count * sizeof(float));
  }
};

// Calls use(chunk, first element) for the chunks of a row.
template <typename Use>
void in_chunks(uint32_t width, Use use) {
  uint32_t at = 0;
  for (; width - at >= 4 * kVectorLanes; at += 4 * kVectorLanes) use(Chunk<4, false>{4 * kVectorLanes}, at);
  for (; width - at >= kVectorLanes; at += kVectorLanes) use(Chunk<1, false>{kVectorLanes}, at);
  if (at < width) use(Chunk<1, true>{width - at}, at);
}

// The same of one vector's width, `index` vectors from the first column on.
template <typename Use>
void in_vector(uint32_t width, uint32_t index, Use use) {
  const uint32_t at = index * kVectorLanes;
  if (width - at >= kVectorLanes) use(Chunk<1, false>{kVectorLanes}, at);
  else use(Chunk<1, true>{width - at}, at);
}

struct Range {
  uint32_t begin, end;
};

// A row's entries, of which there are `entries` in all, whatever the offsets say.
Range entries_of(const int32_t* offsets, uint32_t row, uint32_t entries) {
  if (offsets == nullptr) return {row, row + 1};
  const auto clamp = [&](int32_t offset) {
    return offset < 0 ? 0u
                      : (static_cast<uint32_t>(offset) > entries ? entries : static_cast<uint32_t>(offset));
  };
  const Range range = {clamp(offsets[row]), clamp(offsets[row + 1])};
  return range.end < range.begin ? Range{range.begin, range.begin} : range;
}

// Entry `at` of indices, which may be null: the entry itself; -1 for what is none of `count`.
int64_t index_at(const int32_t* indices, uint32_t at, uint32_t count) {
  const int64_t index = indices == nullptr ? at : indices[at];
  return index >= 0 && index < count ? index : -1;
}

void aggregate(const Aggregate& call, uint32_t first, uint32_t last) {
  const uint32_t head_width = call.width / call.heads;
  for (uint32_t row = first; row < last; ++row) {
    const Range range = entries_of(call.offsets, row, call.entries);
    const float row_scale = call.row_scale == nullptr ? 1.0f : call.row_scale[row];
    for (uint32_t head = 0; head < call.heads; ++head) {
      in_chunks(head_width, [&](auto chunk, uint32_t at) {
        constexpr uint32_t kVectors = decltype(chunk)::kVectors;
        const size_t column = static_cast<size_t>(head) * head_width + at;
        Floats sums[kVectors] = {};
        const auto add = [&](int64_t source, float factor) {
          if (call.column_scale != nullptr) factor *= call.column_scale[source];
          const float* x = call.x + static_cast<size_t>(source) * call.width + column;
#pragma GCC unroll 4
          for (uint32_t v = 0; v < kVectors; ++v) sums[v] += splat(factor) * chunk.read(x, v);
        };
        if (call.self != 0.0f) add(row, call.self);
        for (uint32_t entry = range.begin; entry < range.end; ++entry) {
          const int64_t source = index_at(call.columns, entry, call.x_rows);
          const int64_t edge = call.weights == nullptr ? 0 : index_at(call.edges, entry, call.weight_rows);
          if (source < 0 || edge < 0) {
            for (uint32_t v = 0; v < kVectors; ++v) sums[v] += splat(kNaN);
          } else {
            add(source,
                call.weights == nullptr ? 1.0f : call.weights[static_cast<size_t>(edge) * call.heads + head]);
          }
        }
        float* out = call.out + static_cast<size_t>(row) * call.width + column;
        for (uint32_t v = 0; v < kVectors; ++v) {
          const Floats sum = splat(row_scale) * sums[v];
          chunk.write(out, v, call.accumulate ? chunk.read(out, v) + sum : sum);
        }
      });
    }
  }
}

float dot(const float* x, const float* y, uint32_t width) {
  Floats sums = {};
  in_chunks(width, [&](auto chunk, uint32_t at) {
    for (uint32_t v = 0; v < decltype(chunk)::kVectors; ++v)
      sums += chunk.read(x + at, v) * chunk.read(y + at, v);
  });
  return sum(sums);
}

void edge_dot(const EdgeDot& call, uint32_t first, uint32_t last) {
  const uint32_t head_width = call.width / call.heads;
  for (uint32_t row = first; row < last; ++row) {
    const Range range = entries_of(call.offsets, row, call.entries);
    for (uint32_t entry = range.begin; entry < range.end; ++entry) {
      const int64_t source = index_at(call.columns, entry, call.x_rows);
      for (uint32_t head = 0; head < call.heads; ++head) {
        float value = kNaN;
        if (source >= 0) {
          const size_t column = static_cast<size_t>(head) * head_width;
          value = dot(call.y + static_cast<size_t>(row) * call.width + column,
                      call.x + static_cast<size_t>(source) * call.width + column, head_width);
          if (call.row_scale != nullptr) value *= call.row_scale[row];
          if (call.column_scale != nullptr) value *= call.column_scale[source];
        }
        float& out = call.out[static_cast<size_t>(entry) * call.heads + head];
        out = call.accumulate ? out + value : value;
      }
    }
  }
}

void segment_max(const SegmentMax& call, uint32_t first, uint32_t last) {
  for (uint32_t row = first; row < last; ++row) {
    const Range range = entries_of(call.offsets, row, call.x_rows);
    float* out = call.out + static_cast<size_t>(row) * call.width;
    int32_t* places = call.places + static_cast<size_t>(row) * call.width;
    for (uint32_t column = 0; column < call.width; ++column) {
      out[column] = 0.0f;
      places[column] = -1;
    }
    for (uint32_t entry = range.begin; entry < range.end; ++entry) {
      const float* x = call.x + static_cast<size_t>(entry) * call.width;
      for (uint32_t column = 0; column < call.width; ++column) {
        // The first of several; a NaN is larger than all.
        if (places[column] >= 0 &&
            !(x[column] > out[column] || (x[column] != x[column] && out[column] == out[column])))
          continue;
        out[column] = x[column];
        places[column] = static_cast<int32_t>(entry);
      }
    }
  }
}

void segment_softmax(const SegmentSoftmax& call, uint32_t first, uint32_t last) {
  const size_t width = call.width;
  for (uint32_t row = first; row < last; ++row) {
    const Range range = entries_of(call.offsets, row, call.x_rows);
    for (size_t column = 0; column < width; ++column) {
      float most = -std::numeric_limits<float>::infinity();
      for (uint32_t entry = range.begin; entry < range.end; ++entry) {
        const float x = call.x[entry * width + column];
        most = x > most ? x : most;
      }
      float total = 0.0f;
      for (uint32_t entry = range.begin; entry < range.end; ++entry) {
        const float weight = std::exp(call.x[entry * width + column] - most);
        call.out[entry * width + column] = weight;
        total += weight;
      }
      for (uint32_t entry = range.begin; entry < range.end; ++entry)
        call.out[entry * width + column] /= total;
    }
  }
}

void segment_softmax_backward(const SegmentSoftmaxBackward& call, uint32_t first, uint32_t last) {
  const size_t width = call.width;
  for (uint32_t row = first; row < last; ++row) {
    const Range range = entries_of(call.offsets, row, call.x_rows);
    for (size_t column = 0; column < width; ++column) {
      float mean = 0.0f;
      for (uint32_t entry = range.begin; entry < range.end; ++entry)
        mean += call.y[entry * width + column] * call.dy[entry * width + column];
      for (uint32_t entry = range.begin; entry < range.end; ++entry) {
        const size_t at = entry * width + column;
        const float dx = call.y[at] * (call.dy[at] - mean);
        call.dx[at] = call.accumulate ? call.dx[at] + dx : dx;
      }
    }
  }
}

void head_dot(const HeadDot& call, uint32_t first, uint32_t last) {
  for (uint32_t row = first; row < last; ++row) {
    for (uint32_t head = 0; head < call.heads; ++head) {
      const size_t at = static_cast<size_t>(row) * call.heads + head;
      call.out[at] =
          dot(call.x + at * call.width, call.a + static_cast<size_t>(head) * call.width, call.width);
    }
  }
}

void head_dot_dx(const HeadDotBackward& call, uint32_t first, uint32_t last) {
  for (uint32_t row = first; row < last; ++row) {
    for (uint32_t head = 0; head < call.heads; ++head) {
      const size_t at = static_cast<size_t>(row) * call.heads + head;
      const float dy = call.dy[at];
      float* dx = call.dx + at * call.width;
      const float* a = call.a + static_cast<size_t>(head) * call.width;
      for (uint32_t i = 0; i < call.width; ++i) dx[i] = (call.accumulate_dx ? dx[i] : 0.0f) + dy * a[i];
    }
  }
}

// The sums over all rows of what `term` gives for one of them: `Terms` vectors.
template <uint32_t Terms, typename Term>
void sum_rows(uint32_t rows, Floats (&totals)[Terms], Term term) {
  constexpr uint32_t kRun = 64;
  for (uint32_t i = 0; i < Terms; ++i) totals[i] = Floats{};
  for (uint32_t start = 0; start < rows; start += kRun) {
    const uint32_t end = rows - start < kRun ? rows : start + kRun;
    Floats run[Terms] = {};
    for (uint32_t row = start; row < end; ++row) term(row, run);
    for (uint32_t i = 0; i < Terms; ++i) totals[i] += run[i];
  }
}

void column_sum(const ColumnSum& call, uint32_t first, uint32_t last) {
  for (uint32_t index = first; index < last; ++index) {
    in_vector(call.width, index, [&](auto chunk, uint32_t at) {
      Floats totals[1];
      sum_rows(call.rows, totals, [&](uint32_t row, Floats* run) {
        run[0] += chunk.read(call.x + static_cast<size_t>(row) * call.width + at, 0);
      });
      float* out = call.out + at;
      chunk.write(out, 0, call.accumulate ? chunk.read(out, 0) + totals[0] : totals[0]);
    });
  }
}

// Columns of all heads, [heads * width], as one row.
void head_dot_da(const HeadDotBackward& call, uint32_t first, uint32_t last) {
  const uint32_t width = call.heads * call.width;
  for (uint32_t index = first; index < last; ++index) {
    in_vector(width, index, [&](auto chunk, uint32_t at) {
      uint32_t heads[kVectorLanes];
      for (uint32_t lane = 0; lane < kVectorLanes; ++lane)
        heads[lane] = lane < chunk.count ? (at + lane) / call.width : 0;
      Floats totals[1];
      sum_rows(call.rows, totals, [&](uint32_t row, Floats* run) {
        Floats dy;
        const float* of_row = call.dy + static_cast<size_t>(row) * call.heads;
        for (uint32_t lane = 0; lane < kVectorLanes; ++lane) dy[lane] = of_row[heads[lane]];
        run[0] += dy * chunk.read(call.x + static_cast<size_t>(row) * width + at, 0);
      });
      float* out = call.da + at;
      chunk.write(out, 0, call.accumulate_da ? chunk.read(out, 0) + totals[0] : totals[0]);
    });
  }
}

Floats root(Floats x) {
  for (uint32_t lane = 0; lane < kVectorLanes; ++lane) x[lane] = std::sqrt(x[lane]);
  return x;
}

void batch_norm(const BatchNorm& call, uint32_t first, uint32_t last) {
  const float count = static_cast<float>(call.rows);
  for (uint32_t index = first; index < last; ++index) {
    in_vector(call.width, index, [&](auto chunk, uint32_t at) {
      const auto x = [&](uint32_t row) {
        return chunk.read(call.x + static_cast<size_t>(row) * call.width + at, 0);
      };
      Floats mean = chunk.read(call.running_mean + at, 0),
             variance = chunk.read(call.running_variance + at, 0);
      if (call.training) {
        Floats totals[1];
        sum_rows(call.rows, totals, [&](uint32_t row, Floats* run) { run[0] += x(row); });
        mean = totals[0] / count;
        sum_rows(call.rows, totals, [&](uint32_t row, Floats* run) {
          const Floats difference = x(row) - mean;
          run[0] += difference * difference;
        });
        variance = totals[0] / count;
        const float unbiased = call.rows > 1 ? count / (count - 1.0f) : 1.0f;
        const auto blend = [&](float* running, Floats value) {
          chunk.write(running, 0, (1.0f - call.momentum) * chunk.read(running, 0) + call.momentum * value);
        };
        blend(call.running_mean + at, mean);
        blend(call.running_variance + at, unbiased * variance);
      }
      const Floats inverse = 1.0f / root(variance + call.epsilon);
      chunk.write(call.saved + at, 0, mean);
      chunk.write(call.saved + call.width + at, 0, inverse);
      const Floats factor = inverse * chunk.read(call.weight + at, 0), bias = chunk.read(call.bias + at, 0);
      for (uint32_t row = 0; row < call.rows; ++row)
        chunk.write(call.out + static_cast<size_t>(row) * call.width + at, 0,
                    (x(row) - mean) * factor + bias);
    });
  }
}

void batch_norm_backward(const NormBackward& call, uint32_t first, uint32_t last) {
  const float count = static_cast<float>(call.rows);
  for (uint32_t index = first; index < last; ++index) {
    in_vector(call.width, index, [&](auto chunk, uint32_t at) {
      const Floats mean = chunk.read(call.saved + at, 0),
                   inverse = chunk.read(call.saved + call.width + at, 0);
      const auto normal = [&](size_t place) { return (chunk.read(call.x + place, 0) - mean) * inverse; };
      Floats totals[2];
      sum_rows(call.rows, totals, [&](uint32_t row, Floats* run) {
        const size_t place = static_cast<size_t>(row) * call.width + at;
        const Floats dy = chunk.read(call.dy + place, 0);
        run[0] += dy;
        run[1] += dy * normal(place);
      });
      const auto add = [&](float* target, Floats value) {
        if (target != nullptr) chunk.write(target + at, 0, chunk.read(target + at, 0) + value);
      };
      add(call.dbias, totals[0]);
      add(call.dweight, totals[1]);
      if (call.dx == nullptr) return;
      const Floats factor = chunk.read(call.weight + at, 0) * inverse;
      for (uint32_t row = 0; row < call.rows; ++row) {
        const size_t place = static_cast<size_t>(row) * call.width + at;
        const Floats dx =
            factor * (chunk.read(call.dy + place, 0) - (totals[0] + normal(place) * totals[1]) / count);
        chunk.write(call.dx + place, 0, call.accumulate ? chunk.read(call.dx + place, 0) + dx : dx);
      }
    });
  }
}

void layer_norm(const LayerNorm& call, uint32_t first, uint32_t last) {
  const float width = static_cast<float>(call.width);
  for (uint32_t row = first; row < last; ++row) {
    const float* x = call.x + static_cast<size_t>(row) * call.width;
    float* out = call.out + static_cast<size_t>(row) * call.width;
    float total = 0.0f, squares = 0.0f;
    for (uint32_t i = 0; i < call.width; ++i) total += x[i];
    const float mean = total / width;
    for (uint32_t i = 0; i < call.width; ++i) squares += (x[i] - mean) * (x[i] - mean);
    const float inverse = 1.0f / std::sqrt(squares / width + call.epsilon);
    for (uint32_t i = 0; i < call.width; ++i)
      out[i] = (x[i] - mean) * inverse * call.weight[i] + call.bias[i];
    call.saved[row] = mean;
    call.saved[call.rows + row] = inverse;
  }
}

void layer_norm_dx(const NormBackward& call, uint32_t first, uint32_t last) {
  const float width = static_cast<float>(call.width);
  for (uint32_t row = first; row < last; ++row) {
    const size_t start = static_cast<size_t>(row) * call.width;
    const float *x = call.x + start, *dy = call.dy + start, mean = call.saved[row],
                inverse = call.saved[call.rows + row];
    float* dx = call.dx + start;
    float total = 0.0f, along = 0.0f;
    for (uint32_t i = 0; i < call.width; ++i) {
      const float scaled = dy[i] * call.weight[i];
      total += scaled;
      along += scaled * (x[i] - mean) * inverse;
    }
    for (uint32_t i = 0; i < call.width; ++i) {
      const float value =
          inverse * (dy[i] * call.weight[i] - (total + (x[i] - mean) * inverse * along) / width);
      dx[i] = call.accumulate ? dx[i] + value : value;
    }
  }
}

void layer_norm_parameters(const NormBackward& call, uint32_t first, uint32_t last) {
  for (uint32_t index = first; index < last; ++index) {
    in_vector(call.width, index, [&](auto chunk, uint32_t at) {
      Floats totals[2];
      sum_rows(call.rows, totals, [&](uint32_t row, Floats* run) {
        const size_t place = static_cast<size_t>(row) * call.width + at;
        const Floats dy = chunk.read(call.dy + place, 0);
        run[0] += dy;
        run[1] += dy * (chunk.read(call.x + place, 0) - call.saved[row]) * call.saved[call.rows + row];
      });
      const auto add = [&](float* target, Floats value) {
        if (target != nullptr) chunk.write(target + at, 0, chunk.read(target + at, 0) + value);
      };
      add(call.dbias, totals[0]);
      add(call.dweight, totals[1]);
    });
  }
}

// The distribution function of the standard normal distribution, and its density: by exp(-x^2 / 2) and a polynomial
// (Abramowitz and Stegun, 7.1.26), to 2e-7.
struct Normal {
  Floats share, density;
};
Normal normal_at(Floats x) {
  constexpr float kLogE = 1.44269504f, kRootHalf = 0.70710678f, kRootTwoPi = 0.39894228f;
  const Floats power = exp2(-0.5f * kLogE * x * x);
  const Floats t = 1.0f / (1.0f + 0.3275911f * kRootHalf * larger(x, -x));
  const Floats tail =
      0.5f * power * t *
      (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  return {x > 0.0f ? 1.0f - tail : tail, kRootTwoPi * power};
}

// Calls use(chunk, first element) for the vectors of [first, last).
template <typename Use>
void in_vectors(uint64_t first, uint64_t last, Use use) {
  for (; last - first >= kVectorLanes; first += kVectorLanes) use(Chunk<1, false>{kVectorLanes}, first);
  if (first < last) use(Chunk<1, true>{static_cast<uint32_t>(last - first)}, first);
}

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// Calls use(value, slope) with what an activation, but for GELU, and its derivative are at x.
template <typename Use>
void with_activation(uint32_t kind, float slope, Use use) {
  switch (kind) {
    case PH_GRAPH_RELU:
      return use([](float x) { return x > 0.0f ? x : 0.0f; }, [](float x) { return x > 0.0f ? 1.0f : 0.0f; });
    case PH_GRAPH_LEAKY_RELU:
      return use([=](float x) { return x > 0.0f ? x : slope * x; },
                 [=](float x) { return x > 0.0f ? 1.0f : slope; });
    case PH_GRAPH_TANH:
      return use([](float x) { return std::tanh(x); },
                 [](float x) {
                   const float y = std::tanh(x);
                   return 1.0f - y * y;
                 });
    case PH_GRAPH_SIGMOID:
      return use([](float x) { return sigmoid(x); },
                 [](float x) {
                   const float y = sigmoid(x);
                   return y * (1.0f - y);
                 });
    default:  // PH_GRAPH_SOFTPLUS
      return use([](float x) { return (x > 0.0f ? x : 0.0f) + std::log1p(std::exp(-std::fabs(x))); },
                 [](float x) { return sigmoid(x); });
  }
}

void activate(const Activate& call, uint64_t first, uint64_t last) {
  if (call.kind == PH_GRAPH_GELU) {
    return in_vectors(first, last, [&](auto chunk, uint64_t at) {
      const Floats x = chunk.read(call.x + at, 0);
      chunk.write(call.out + at, 0, x * normal_at(x).share);
    });
  }
  with_activation(call.kind, call.slope, [&](auto value, auto) {
    const float* x = call.x;
    float* out = call.out;
    for (uint64_t i = first; i < last; ++i) out[i] = value(x[i]);
  });
}

void activate_backward(const ActivateBackward& call, uint64_t first, uint64_t last) {
  if (call.kind == PH_GRAPH_GELU) {
    return in_vectors(first, last, [&](auto chunk, uint64_t at) {
      const Floats x = chunk.read(call.x + at, 0);
      const Normal normal = normal_at(x);
      const Floats dx = chunk.read(call.dy + at, 0) * (normal.share + x * normal.density);
      chunk.write(call.dx + at, 0, call.accumulate ? chunk.read(call.dx + at, 0) + dx : dx);
    });
  }
  with_activation(call.kind, call.slope, [&](auto, auto slope) {
    const float *x = call.x, *dy = call.dy;
    float* dx = call.dx;
    if (call.accumulate) {
      for (uint64_t i = first; i < last; ++i) dx[i] += dy[i] * slope(x[i]);
    } else {
      for (uint64_t i = first; i < last; ++i) dx[i] = dy[i] * slope(x[i]);
    }
  });
}

void combine(const Combine& call, uint64_t first, uint64_t last) {
  const float *x = call.x, *y = call.y, alpha = call.alpha, beta = call.beta;
  float* out = call.out;
  if (y == nullptr) {
    for (uint64_t i = first; i < last; ++i) out[i] = alpha * x[i];
  } else {
    for (uint64_t i = first; i < last; ++i) out[i] = alpha * x[i] + beta * y[i];
  }
}

void product(const Product& call, uint64_t first, uint64_t last) {
  const float *x = call.x, *y = call.y;
  float* out = call.out;
  if (call.accumulate) {
    for (uint64_t i = first; i < last; ++i) out[i] += x[i] * y[i];
  } else {
    for (uint64_t i = first; i < last; ++i) out[i] = x[i] * y[i];
  }
}

// Element i has word i % 4 of the counter i / 4. `first` is a multiple of 4.
void dropout(const Dropout& call, uint64_t first, uint64_t last) {
  const uint64_t threshold = dropout_threshold(call.probability);
  const float scale = 1.0f / (1.0f - call.probability);
  for (uint64_t start = first; start < last; start += 4) {
    const RandomWords random = philox(static_cast<uint32_t>(start / 4), call.seed);
    for (uint64_t i = start; i < last && i < start + 4; ++i) {
      const float x = random.words[i - start] >= threshold ? scale * call.x[i] : 0.0f;
      call.out[i] = call.accumulate ? call.out[i] + x : x;
    }
  }
}

double cross_entropy(const CrossEntropy& call) {
  double sum = 0.0;
  for (uint32_t row = 0; row < call.rows; ++row) {
    const float* logits = call.logits + static_cast<size_t>(row) * call.classes;
    float* probabilities = call.probabilities + static_cast<size_t>(row) * call.classes;
    uint32_t best = 0;
    for (uint32_t c = 1; c < call.classes; ++c)
      if (logits[c] > logits[best]) best = c;
    double total = 0.0;
    for (uint32_t c = 0; c < call.classes; ++c) {
      probabilities[c] = std::exp(logits[c] - logits[best]);
      total += static_cast<double>(probabilities[c]);
    }
    for (uint32_t c = 0; c < call.classes; ++c)
      probabilities[c] = static_cast<float>(static_cast<double>(probabilities[c]) / total);
    const int32_t label = call.labels[row];
    double loss = 0.0;
    if (label >= 0) {
      loss = static_cast<uint32_t>(label) < call.classes
                 ? std::log(total) + static_cast<double>(logits[best]) - static_cast<double>(logits[label])
                 : std::numeric_limits<double>::quiet_NaN();
    }
    sum += loss;
    if (call.row_losses != nullptr) call.row_losses[row] = static_cast<float>(loss);
    if (call.predictions != nullptr) call.predictions[row] = static_cast<int32_t>(best);
  }
  return sum;
}

void adam(const Adam& call, float clip, uint64_t first, uint64_t last) {
  for (uint64_t i = first; i < last; ++i) {
    float parameter = call.parameters[i], gradient = clip * call.gradients[i];
    if (call.decoupled) parameter -= call.learning_rate * call.weight_decay * parameter;
    else gradient += call.weight_decay * parameter;
    const float mean = call.beta1 * call.first[i] + (1.0f - call.beta1) * gradient;
    const float square = call.beta2 * call.second[i] + (1.0f - call.beta2) * gradient * gradient;
    call.first[i] = mean;
    call.second[i] = square;
    call.parameters[i] = parameter - call.learning_rate * (mean / call.correction1) /
                                         (std::sqrt(square / call.correction2) + call.epsilon);
  }
}

}  // namespace

extern const RowKernels kRowKernels;
const RowKernels kRowKernels = {PH_STRING(PH_INSTRUCTION_SET),
                                kVectorLanes,
                                aggregate,
                                edge_dot,
                                segment_max,
                                segment_softmax,
                                segment_softmax_backward,
                                head_dot,
                                head_dot_dx,
                                activate,
                                activate_backward,
                                combine,
                                product,
                                dropout,
                                layer_norm,
                                layer_norm_dx,
                                cross_entropy,
                                adam,
                                head_dot_da,
                                column_sum,
                                batch_norm,
                                batch_norm_backward,
                                layer_norm_parameters};

}  // namespace ph::graph::PH_INSTRUCTION_SET
