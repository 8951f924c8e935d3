// Rows and columns of transport problems on one CPU core; see kernels_cpu.h.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/doubles_cpu.h"
#include "ot/kernels_cpu.h"

#define PH_STRING_OF(name) #name
#define PH_STRING(name) PH_STRING_OF(name)

namespace ph::ot::PH_INSTRUCTION_SET {

using ph::PH_INSTRUCTION_SET::Doubles;
using ph::PH_INSTRUCTION_SET::exp;
using ph::PH_INSTRUCTION_SET::kDoubleLanes;
using ph::PH_INSTRUCTION_SET::larger;
using ph::PH_INSTRUCTION_SET::largest;
using ph::PH_INSTRUCTION_SET::load;
using ph::PH_INSTRUCTION_SET::read_doubles;
using ph::PH_INSTRUCTION_SET::splat_double;
using ph::PH_INSTRUCTION_SET::store;
using ph::PH_INSTRUCTION_SET::sum;
using ph::PH_INSTRUCTION_SET::write_doubles;

namespace {

static_assert(kStep % kDoubleLanes == 0, "rows are whole vectors");

template <typename Element>
void read_of(const Element* source, uint64_t count, double* target) {
  uint64_t i = 0;
  for (; i + kDoubleLanes <= count; i += kDoubleLanes) store(target + i, read_doubles(source + i));
  for (; i < count; ++i) target[i] = static_cast<double>(source[i]);
}
void read(const void* source, uint32_t dtype, int64_t first, uint64_t count, double* target) {
  if (dtype == PH_F64) {
    memcpy(target, static_cast<const double*>(source) + first, count * sizeof(double));
  } else {
    read_of(static_cast<const float*>(source) + first, count, target);
  }
}

template <typename Element>
void write_of(const double* source, Element* target, uint64_t count) {
  uint64_t i = 0;
  for (; i + kDoubleLanes <= count; i += kDoubleLanes) write_doubles(target + i, load<Doubles>(source + i));
  for (; i < count; ++i) target[i] = static_cast<Element>(source[i]);
}
void write(const double* source, void* target, uint32_t dtype, int64_t first, uint64_t count) {
  if (dtype == PH_F64) {
    memcpy(static_cast<double*>(target) + first, source, count * sizeof(double));
  } else {
    write_of(source, static_cast<float*>(target) + first, count);
  }
}

Doubles square_root(Doubles x) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
  return (Doubles)_mm256_sqrt_pd((__m256d)x);
#else
  for (uint32_t lane = 0; lane < kDoubleLanes; ++lane) x[lane] = std::sqrt(x[lane]);
  return x;
#endif
}

// kRows rows times kVectors vectors of columns stay in registers while the dimension is summed over.
template <bool kProduct, uint32_t kRows, uint32_t kVectors>
void costs_of(const Points& points, const double* x, const double* y, double* cost, uint64_t stride) {
  Doubles sums[kRows][kVectors] = {};
  const uint32_t dimension = points.dimension;
  for (uint32_t k = 0; k < dimension; ++k) {
    Doubles column[kVectors];
    for (uint32_t vector = 0; vector < kVectors; ++vector)
      column[vector] = load<Doubles>(y + k * points.stride + vector * kDoubleLanes);
    for (uint32_t row = 0; row < kRows; ++row) {
      const Doubles own = splat_double(x[static_cast<uint64_t>(row) * dimension + k]);
      for (uint32_t vector = 0; vector < kVectors; ++vector) {
        if (kProduct) {
          sums[row][vector] -= own * column[vector];
        } else {
          const Doubles difference = own - column[vector];
          sums[row][vector] += difference * difference;
        }
      }
    }
  }
  for (uint32_t row = 0; row < kRows; ++row) {
    for (uint32_t vector = 0; vector < kVectors; ++vector) {
      Doubles value = sums[row][vector];
      if (points.kind == PH_OT_EUCLIDEAN) value = square_root(value);
      if (points.kind == PH_OT_COSINE) value = larger(value + 1.0, Doubles{});
      store(cost + row * stride + vector * kDoubleLanes, value);
    }
  }
}

template <bool kProduct>
void costs_by_kind(const Points& points, uint32_t row, uint32_t rows, uint32_t column, uint32_t columns,
                   double* cost, uint64_t stride) {
  constexpr uint32_t kVectors = kDoubleLanes == 8 ? 1 : 2, kWide = 2;
  for (uint32_t done = 0; done < rows;) {
    const double* x = points.x + static_cast<uint64_t>(row + done) * points.dimension;
    double* out = cost + done * stride;
    const bool four = rows - done >= 4;
    uint32_t j = 0;
    if (four) {
      for (; j + kWide * kDoubleLanes <= columns; j += kWide * kDoubleLanes)
        costs_of<kProduct, 4, kWide>(points, x, points.y + column + j, out + j, stride);
    }
    for (; j < columns; j += kVectors * kDoubleLanes) {
      const double* y = points.y + column + j;
      if (four) costs_of<kProduct, 4, kVectors>(points, x, y, out + j, stride);
      else costs_of<kProduct, 1, kVectors>(points, x, y, out + j, stride);
    }
    done += four ? 4 : 1;
  }
}
void costs(const Points& points, uint32_t row, uint32_t rows, uint32_t column, uint32_t columns, double* cost,
           uint64_t stride) {
  const bool product = points.kind == PH_OT_COSINE || points.kind == PH_OT_DOT;
  const auto run = product ? costs_by_kind<true> : costs_by_kind<false>;
  run(points, row, rows, column, columns, cost, stride);
}

Extremes extremes(const double* cost, uint64_t count) {
  Doubles most = {}, flaws = {};
  const Doubles infinite = splat_double(INFINITY);
  for (uint64_t i = 0; i < count; i += kDoubleLanes) {
    const Doubles value = load<Doubles>(cost + i), size = value < 0.0 ? -value : value;
    most = (size < infinite) & (size > most) ? size : most;
    flaws = value > -infinite ? flaws : splat_double(1.0);
  }
  return {largest(most), largest(flaws) == 0.0};
}

void log_row(const double* cost, const double* potential, double inverse, uint32_t columns, double* power,
             double* most, double* total) {
  Doubles highest = splat_double(-INFINITY);
  for (uint32_t j = 0; j < columns; j += kDoubleLanes) {
    const Doubles z = load<Doubles>(potential + j) - load<Doubles>(cost + j) * inverse;
    store(power + j, z);
    highest = larger(highest, z);
  }
  const double top = largest(highest);
  *most = top;
  *total = 0.0;
  if (top == -INFINITY) {
    memset(power, 0, columns * sizeof(double));
    return;
  }
  Doubles sums = {};
  for (uint32_t j = 0; j < columns; j += kDoubleLanes) {
    const Doubles value = exp(load<Doubles>(power + j) - top);
    store(power + j, value);
    sums += value;
  }
  *total = sum(sums);
}

void log_columns(const double* cost, uint64_t stride, uint32_t rows, const double* potential, double inverse,
                 uint32_t first, uint32_t last, double* power, double* most, double* total) {
  for (uint32_t j = first; j < last; j += kDoubleLanes) store(most + j, splat_double(-INFINITY));
  for (uint32_t i = 0; i < rows; ++i) {
    const double* row = cost + i * stride;
    for (uint32_t j = first; j < last; j += kDoubleLanes) {
      const Doubles z = potential[i] - load<Doubles>(row + j) * inverse;
      store(most + j, larger(load<Doubles>(most + j), z));
    }
  }
  for (uint32_t j = first; j < last; j += kDoubleLanes) store(total + j, Doubles{});
  for (uint32_t i = 0; i < rows; ++i) {
    const double* row = cost + i * stride;
    for (uint32_t j = first; j < last; j += kDoubleLanes) {
      const Doubles top = load<Doubles>(most + j);
      const Doubles z = potential[i] - load<Doubles>(row + j) * inverse;
      const Doubles value = exp(top == -INFINITY ? top : z - top);
      store(power + i * stride + j, value);
      store(total + j, load<Doubles>(total + j) + value);
    }
  }
}

void plan_row(const double* cost, double row, const double* potential, double inverse, uint32_t columns,
              double* plan) {
  if (row == -INFINITY) {
    memset(plan, 0, columns * sizeof(double));
    return;
  }
  for (uint32_t j = 0; j < columns; j += kDoubleLanes)
    store(plan + j, exp(row + load<Doubles>(potential + j) - load<Doubles>(cost + j) * inverse));
}

double scaling(const Update& update, uint32_t i, double product, double old, double& error) {
  const double mass = update.mass[i];
  if (mass == 0.0) return 0.0;
  if (update.plain) {
    error += std::fabs(old * product - mass);
    return mass / product;
  }
  const double shift = update.shift[i], log_old = std::log(old);
  error += std::fabs(old * product - mass * std::exp(-update.decay * (shift + log_old)));
  const double target = update.damping * (std::log(mass) + shift - std::log(product)) - shift;
  return std::exp(log_old + update.relaxation * (target - log_old));
}

double iterate(const double* kernel, uint64_t stride, uint32_t first, uint32_t last, const Update& update,
               const double* u, const double* v, double* next_u, double* column_sums) {
  const uint32_t columns = static_cast<uint32_t>(stride);
  memset(column_sums, 0, columns * sizeof(double));
  double error = 0.0;
  uint32_t i = first;
  for (; i + 4 <= last; i += 4) {
    const double* row = kernel + i * stride;
    Doubles sums[4] = {};
    for (uint32_t j = 0; j < columns; j += kDoubleLanes) {
      const Doubles scale = load<Doubles>(v + j);
      for (uint32_t r = 0; r < 4; ++r) sums[r] += load<Doubles>(row + r * stride + j) * scale;
    }
    for (uint32_t r = 0; r < 4; ++r) next_u[i + r] = scaling(update, i + r, sum(sums[r]), u[i + r], error);
    for (uint32_t j = 0; j < columns; j += kDoubleLanes) {
      Doubles total = load<Doubles>(column_sums + j);
      for (uint32_t r = 0; r < 4; ++r) total += load<Doubles>(row + r * stride + j) * next_u[i + r];
      store(column_sums + j, total);
    }
  }
  for (; i < last; ++i) {
    const double* row = kernel + i * stride;
    Doubles sums = {};
    for (uint32_t j = 0; j < columns; j += kDoubleLanes)
      sums += load<Doubles>(row + j) * load<Doubles>(v + j);
    next_u[i] = scaling(update, i, sum(sums), u[i], error);
    for (uint32_t j = 0; j < columns; j += kDoubleLanes)
      store(column_sums + j, load<Doubles>(column_sums + j) + load<Doubles>(row + j) * next_u[i]);
  }
  return error;
}

double finish(double* kernel, const double* cost, uint64_t stride, uint32_t first, uint32_t last,
              const double* u, const double* v, double* row_sums, double* column_sums) {
  const uint32_t columns = static_cast<uint32_t>(stride);
  const Doubles infinite = splat_double(INFINITY);
  memset(column_sums, 0, columns * sizeof(double));
  Doubles costs = {};
  for (uint32_t i = first; i < last; ++i) {
    double* row = kernel + i * stride;
    Doubles sums = {};
    for (uint32_t j = 0; j < columns; j += kDoubleLanes) {
      const Doubles price = load<Doubles>(cost + i * stride + j);
      const Doubles value = load<Doubles>(row + j) * u[i] * load<Doubles>(v + j);
      store(row + j, value);
      sums += value;
      costs += value * (price < infinite ? price : Doubles{});
      store(column_sums + j, load<Doubles>(column_sums + j) + value);
    }
    row_sums[i] = sum(sums);
  }
  return sum(costs);
}

double dot(const double* x, const double* y, uint64_t count) {
  Doubles sums = {};
  uint64_t i = 0;
  for (; i + kDoubleLanes <= count; i += kDoubleLanes) sums += load<Doubles>(x + i) * load<Doubles>(y + i);
  double total = sum(sums);
  for (; i < count; ++i) total += x[i] * y[i];
  return total;
}
void add_scaled(double factor, const double* x, double* y, uint64_t count) {
  uint64_t i = 0;
  for (; i + kDoubleLanes <= count; i += kDoubleLanes)
    store(y + i, load<Doubles>(y + i) + load<Doubles>(x + i) * factor);
  for (; i < count; ++i) y[i] += factor * x[i];
}
void scale(double factor, double* x, uint64_t count) {
  uint64_t i = 0;
  for (; i + kDoubleLanes <= count; i += kDoubleLanes) store(x + i, load<Doubles>(x + i) * factor);
  for (; i < count; ++i) x[i] *= factor;
}
void multiply(double factor, const double* x, double* y, uint64_t count) {
  uint64_t i = 0;
  for (; i + kDoubleLanes <= count; i += kDoubleLanes)
    store(y + i, load<Doubles>(y + i) * (load<Doubles>(x + i) * factor));
  for (; i < count; ++i) y[i] *= factor * x[i];
}

void dots(const double* x, const double* y, uint64_t stride, uint32_t rows, uint32_t columns,
          double* products) {
  uint32_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    Doubles sums[4] = {};
    for (uint32_t j = 0; j < columns; j += kDoubleLanes) {
      const Doubles value = load<Doubles>(x + j);
      for (uint32_t r = 0; r < 4; ++r) sums[r] += value * load<Doubles>(y + (i + r) * stride + j);
    }
    for (uint32_t r = 0; r < 4; ++r) products[i + r] = sum(sums[r]);
  }
  for (; i < rows; ++i) products[i] = dot(x, y + i * stride, columns);
}

double weigh(const double* plan, const double* gradient, uint32_t columns, double* sums) {
  Doubles total = {};
  for (uint32_t j = 0; j < columns; j += kDoubleLanes) {
    const Doubles value = load<Doubles>(plan + j) * load<Doubles>(gradient + j);
    total += value;
    store(sums + j, load<Doubles>(sums + j) + value);
  }
  return sum(total);
}

void gradient_row(const double* plan, double row, const double* potential, double factor, uint32_t columns,
                  double* gradient) {
  for (uint32_t j = 0; j < columns; j += kDoubleLanes) {
    const Doubles value = row + load<Doubles>(potential + j) + load<Doubles>(gradient + j) * factor;
    store(gradient + j, load<Doubles>(plan + j) * value);
  }
}

void add_costs(const double* cost, double factor, const double* from, uint32_t columns, double* gradient) {
  const Doubles infinite = splat_double(INFINITY);
  for (uint32_t j = 0; j < columns; j += kDoubleLanes) {
    const Doubles price = load<Doubles>(cost + j);
    Doubles value = price * factor;
    if (from != nullptr) value += load<Doubles>(from + j);
    store(gradient + j, price < infinite ? value : Doubles{});
  }
}

void gram(const double* plan, const double* factors, uint64_t stride, uint32_t rows, uint32_t columns,
          double* products) {
  constexpr uint32_t kWide = 2 * kDoubleLanes > kStep ? kStep : 2 * kDoubleLanes,
                     kVectors = kWide / kDoubleLanes;
  for (uint32_t j = 0; j < columns; j += 4) {
    for (uint32_t k = j / kWide * kWide; k < stride; k += kWide) {
      Doubles sums[4][kVectors] = {};
      for (uint32_t i = 0; i < rows; ++i) {
        const double* row = plan + i * stride;
        Doubles values[kVectors];
        for (uint32_t vector = 0; vector < kVectors; ++vector)
          values[vector] = load<Doubles>(row + k + vector * kDoubleLanes) * factors[i];
        for (uint32_t r = 0; r < 4; ++r)
          for (uint32_t vector = 0; vector < kVectors; ++vector)
            sums[r][vector] += values[vector] * row[j + r];
      }
      for (uint32_t r = 0; r < 4 && j + r < columns; ++r)
        for (uint32_t vector = 0; vector < kVectors; ++vector)
          store(products + (j + r) * stride + k + vector * kDoubleLanes, sums[r][vector]);
    }
  }
}

void eliminate(double* weights, uint64_t stride, uint32_t nodes, const double* apart, double* right,
               double* excess, double* pivots) {
  for (uint32_t i = 0; i < nodes; ++i) {
    const double* own = weights + i * stride;
    double pivot = excess[i];
    for (uint32_t j = i + 1; j < nodes; ++j) pivot += own[j];
    pivots[i] = pivot > apart[i] ? pivot : 0.0;
    if (pivots[i] == 0.0) continue;
    for (uint32_t j = i + 1; j < nodes; ++j) {
      const double factor = own[j] / pivot;
      right[j] += factor * right[i];
      excess[j] += factor * excess[i];
      double* other = weights + j * stride;
      for (uint64_t k = j / kStep * kStep; k < stride; k += kDoubleLanes)
        store(other + k, load<Doubles>(other + k) + load<Doubles>(own + k) * factor);
    }
  }
}

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {PH_STRING(PH_INSTRUCTION_SET),
                          read,
                          write,
                          costs,
                          extremes,
                          log_row,
                          log_columns,
                          plan_row,
                          iterate,
                          finish,
                          dot,
                          add_scaled,
                          scale,
                          multiply,
                          dots,
                          weigh,
                          gradient_row,
                          gram,
                          eliminate,
                          add_costs};

}  // namespace ph::ot::PH_INSTRUCTION_SET
