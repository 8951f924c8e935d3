// Optimal transport on the CPU through the C ABI, for the sanitizers and for every instruction set: ragged batches in memory
// that ends where the tensors do, marginals of plans, and gradients that add up to what moving all costs alike must give.
//
// ot_native_test [SEED]
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

// Memory of exactly a tensor's size.
struct Tensor {
  Tensor(uint64_t count, uint32_t type) : dtype(type), size(count) {
    const uint64_t bytes = count * (type == PH_F64 ? 8 : type == PH_F32 ? 4 : 1);
    memory.reset(static_cast<uint8_t*>(malloc(bytes)));
    memset(memory.get(), 0xff, bytes);  // NaN: whatever is not written shows
    int32_t status;
    handle =
        ph_buffer_wrap(device, reinterpret_cast<uint64_t>(memory.get()), bytes, &status, error, sizeof error);
    CHECK(handle != nullptr);
  }
  ~Tensor() { OK(ph_buffer_destroy(device, handle, error, sizeof error)); }
  Tensor(const Tensor&) = delete;
  double at(uint64_t i) const {
    if (dtype == PH_F64) {
      double value;
      memcpy(&value, memory.get() + 8 * i, 8);
      return value;
    }
    float value;
    memcpy(&value, memory.get() + 4 * i, 4);
    return value;
  }
  void set(uint64_t i, double value) {
    const float narrow = static_cast<float>(value);
    if (dtype == PH_F64) memcpy(memory.get() + 8 * i, &value, 8);
    else memcpy(memory.get() + 4 * i, &narrow, 4);
  }
  void fill() {
    std::normal_distribution<double> normal;
    for (uint64_t i = 0; i < size; ++i) set(i, normal(random_numbers));
  }
  struct Free {
    void operator()(void* data) const { free(data); }
  };
  uint32_t dtype;
  uint64_t size;
  std::unique_ptr<uint8_t, Free> memory;
  ph_buffer* handle;
};

void run_batch(uint32_t round) {
  const uint32_t problems = up_to(6), dtype = round % 2 == 0 ? PH_F64 : PH_F32;
  const bool points = round % 3 != 0, streaming = points && round % 4 == 1;
  const uint32_t dimension = points ? up_to(9) : 0;
  std::vector<uint32_t> n(problems), m(problems);
  uint64_t rows = 0, columns = 0, entries = 0;
  for (uint32_t p = 0; p < problems; ++p) {
    n[p] = up_to(p == 0 ? 300 : 40);
    m[p] = up_to(p == 1 ? 600 : 40);
    rows += n[p];
    columns += m[p];
    entries += static_cast<uint64_t>(n[p]) * m[p];
  }
  int32_t status;
  ph_ot_batch* batch = ph_ot_batch_create(device, problems, n.data(), m.data(), dtype, dimension, streaming,
                                          1, &status, error, sizeof error);
  CHECK(batch != nullptr);
  const double tolerance = 1e-5;
  ph_ot_options options = {};
  options.cost_kind = round % 4;
  options.relative_epsilon = 1;
  options.iterations = 3000;
  options.epsilon = round % 5 == 4 ? 0.002 : 0.1;
  options.tolerance = tolerance;
  options.relaxation = round % 2 == 0 ? 1.0 : 1.3;
  options.scaling = round % 3 == 2 ? 0.5 : 0.0;
  options.row_penalty = options.column_penalty = INFINITY;
  OK(ph_ot_batch_set(device, batch, &options, nullptr, nullptr, nullptr, error, sizeof error));

  Tensor cost(entries, dtype), x(points ? rows * dimension : 1, dtype),
      y(points ? columns * dimension : 1, dtype);
  for (Tensor* each : {&cost, &x, &y}) each->fill();
  for (uint64_t k = 0; k < entries; ++k) cost.set(k, std::fabs(cost.at(k)));
  OK(ph_ot_batch_bind(device, batch, points ? nullptr : cost.handle, 0, points ? x.handle : nullptr, 0,
                      points ? y.handle : nullptr, 0, nullptr, 0, nullptr, 0, error, sizeof error));
  Tensor f(rows, dtype), g(columns, dtype), plan(entries, dtype),
      reports(problems * sizeof(ph_ot_report), PH_U8);
  OK(ph_ot_sinkhorn(device, batch, nullptr, 0, f.handle, 0, g.handle, 0, streaming ? nullptr : plan.handle, 0,
                    reports.handle, 0, error, sizeof error));
  if (streaming) {
    OK(ph_ot_plan(device, batch, f.handle, 0, g.handle, 0, reports.handle, 0, plan.handle, 0, error,
                  sizeof error));
  }
  const ph_ot_report* report = reinterpret_cast<const ph_ot_report*>(reports.memory.get());
  uint64_t entry = 0;
  double mass = 0.0;
  for (uint32_t p = 0; p < problems; ++p) {
    CHECK(report[p].status <= PH_OT_ITERATION_LIMIT);
    CHECK((report[p].status == PH_OT_CONVERGED) == (report[p].marginal_error <= tolerance));
    double distance = 0.0;
    std::vector<double> sums(m[p], 0.0);
    for (uint32_t i = 0; i < n[p]; ++i) {
      double sum = 0.0;
      for (uint32_t j = 0; j < m[p]; ++j, ++entry) {
        const double value = plan.at(entry);
        CHECK(value >= 0.0);
        sum += value;
        sums[j] += value;
      }
      distance += std::fabs(sum - 1.0 / n[p]);
      mass += sum;
    }
    for (uint32_t j = 0; j < m[p]; ++j) distance += std::fabs(sums[j] - 1.0 / m[p]);
    // The marginals of float32 potentials are as good as these.
    CHECK(std::fabs(distance - report[p].marginal_error) < (streaming && dtype == PH_F32 ? 1e-2 : 1e-5));
  }

  // Products with ones are the masses.
  Tensor ones(columns, dtype), product(rows, dtype);
  for (uint64_t j = 0; j < columns; ++j) ones.set(j, 1.0);
  OK(ph_ot_plan_product(device, batch, f.handle, 0, g.handle, 0, streaming ? nullptr : plan.handle, 0,
                        reports.handle, 0, ones.handle, 0, product.handle, 0, 1, 0, 0, error, sizeof error));
  double total = 0.0;
  for (uint64_t i = 0; i < rows; ++i) total += product.at(i);
  CHECK(std::fabs(total - mass) < 1e-3 * problems);

  for (uint32_t mode = 0; mode < 4; ++mode) {
    if (mode == PH_OT_UNROLLED && (streaming || round % 5 == 4)) continue;
    const bool whole = mode != PH_OT_ENVELOPE;
    Tensor d_plan(entries, dtype), d_f(rows, dtype), d_g(columns, dtype), d_cost(problems, dtype),
        d_value(problems, dtype), grad_cost(entries, dtype), grad_x(x.size, dtype), grad_y(y.size, dtype),
        grad_a(rows, dtype), grad_b(columns, dtype);
    for (Tensor* each : {&d_plan, &d_f, &d_g, &d_cost, &d_value}) each->fill();
    ph_buffer* none = nullptr;
    OK(ph_ot_backward(device, batch, mode, f.handle, 0, g.handle, 0, streaming ? none : plan.handle, 0,
                      reports.handle, 0, none, 0, whole && !streaming ? d_plan.handle : none, 0,
                      whole ? d_f.handle : none, 0, whole ? d_g.handle : none, 0, d_cost.handle, 0,
                      d_value.handle, 0, streaming ? none : grad_cost.handle, 0,
                      points ? grad_x.handle : none, 0, points ? grad_y.handle : none, 0, grad_a.handle, 0,
                      grad_b.handle, 0, error, sizeof error));
    const auto finite = [](const Tensor& tensor) {
      for (uint64_t i = 0; i < tensor.size; ++i) CHECK(std::isfinite(tensor.at(i)));
    };
    finite(grad_a);
    finite(grad_b);
    if (points) finite(grad_x), finite(grad_y);
    if (streaming) continue;
    finite(grad_cost);
    // With all costs of a problem 1 higher, <T, C> and the value are higher by the mass, and the plan is the same; losses of
    // f and g see the shift, too.
    if (mode == PH_OT_UNROLLED || mode == PH_OT_IMPLICIT) continue;
    entry = 0;
    for (uint32_t p = 0; p < problems; ++p) {
      double sum = 0.0;
      for (uint64_t k = 0; k < static_cast<uint64_t>(n[p]) * m[p]; ++k) sum += grad_cost.at(entry++);
      CHECK(std::fabs(sum - (d_cost.at(p) + d_value.at(p))) < 1e-3);
    }
  }

  if (!streaming) {
    OK(ph_ot_exact(device, batch, nullptr, f.handle, 0, g.handle, 0, plan.handle, 0, reports.handle, 0, error,
                   sizeof error));
    std::vector<double> half(problems, 0.5);
    const double whole = report[0].cost;
    CHECK(report[0].status == PH_OT_CONVERGED);
    OK(ph_ot_exact(device, batch, half.data(), f.handle, 0, g.handle, 0, plan.handle, 0, reports.handle, 0,
                   error, sizeof error));
    CHECK(report[0].cost <= 0.5 * whole + 1e-9 * std::fabs(whole));
    OK(ph_ot_partial(device, batch, half.data(), f.handle, 0, g.handle, 0, plan.handle, 0, reports.handle, 0,
                     error, sizeof error));
    CHECK(report[0].status <= PH_OT_ITERATION_LIMIT);
    double moved = 0.0;
    for (uint64_t k = 0; k < static_cast<uint64_t>(n[0]) * m[0]; ++k) moved += plan.at(k);
    CHECK(std::fabs(moved - 0.5) < 1e-4);
    options.iterations = 50;
    OK(ph_ot_batch_set(device, batch, &options, nullptr, nullptr, nullptr, error, sizeof error));
    OK(ph_ot_proximal(device, batch, 2, f.handle, 0, g.handle, 0, plan.handle, 0, reports.handle, 0, error,
                      sizeof error));
    CHECK(report[0].status <= PH_OT_ITERATION_LIMIT);
  }
  OK(ph_ot_batch_destroy(device, batch, error, sizeof error));
}

// Matrices against themselves and others, features or none: masses arrive, values are as the plan says.
void run_gromov(uint32_t round) {
  const uint32_t problems = up_to(5), dtype = round % 2 == 0 ? PH_F64 : PH_F32;
  const bool fused = round % 3 != 0;
  std::vector<uint32_t> n(problems), m(problems);
  uint64_t x_entries = 0, y_entries = 0, entries = 0;
  for (uint32_t p = 0; p < problems; ++p) {
    n[p] = up_to(20);
    m[p] = up_to(20);
    x_entries += n[p] * n[p];
    y_entries += m[p] * m[p];
    entries += n[p] * m[p];
  }
  int32_t status;
  ph_ot_batch* batch =
      ph_ot_batch_create(device, problems, n.data(), m.data(), dtype, 0, 0, 0, &status, error, sizeof error);
  CHECK(batch != nullptr);
  ph_ot_options options = {};
  options.iterations = 100;
  options.epsilon = options.relaxation = 1.0;
  options.tolerance = 1e-6;
  options.row_penalty = options.column_penalty = INFINITY;
  OK(ph_ot_batch_set(device, batch, &options, nullptr, nullptr, nullptr, error, sizeof error));
  Tensor x(x_entries, dtype), y(y_entries, dtype), cost(entries, dtype), plan(entries, dtype),
      reports(problems * sizeof(ph_ot_gromov_report), PH_U8);
  for (Tensor* each : {&x, &y, &cost}) each->fill();
  const auto make_symmetric = [&](Tensor& matrices, const std::vector<uint32_t>& sizes) {
    uint64_t first = 0;
    for (const uint32_t size : sizes) {
      for (uint32_t i = 0; i < size; ++i)
        for (uint32_t j = 0; j < i; ++j)
          matrices.set(first + i * size + j, matrices.at(first + j * size + i));
      first += size * size;
    }
  };
  make_symmetric(x, n);
  make_symmetric(y, m);
  std::vector<double> alphas(problems, 1.0);
  for (uint32_t p = 0; p < problems && fused; ++p) alphas[p] = p / 4.0;
  OK(ph_ot_gromov(device, batch, alphas.data(), x.handle, 0, y.handle, 0, fused ? cost.handle : nullptr, 0,
                  nullptr, 0, nullptr, 0, plan.handle, 0, reports.handle, 0, error, sizeof error));
  const ph_ot_gromov_report* report = reinterpret_cast<const ph_ot_gromov_report*>(reports.memory.get());
  uint64_t first_x = 0, first_y = 0, first = 0;
  for (uint32_t p = 0; p < problems; ++p) {
    CHECK(report[p].status <= PH_OT_ITERATION_LIMIT);
    CHECK(report[p].marginal_error < 1e-12);
    CHECK(report[p].bound <= report[p].value);
    double linear = 0.0, distortion = 0.0;
    for (uint32_t i = 0; i < n[p] * m[p]; ++i) {
      const double mass = plan.at(first + i);
      CHECK(mass >= 0.0);
      if (fused) linear += mass * cost.at(first + i);
      for (uint32_t k = 0; k < n[p] * m[p] && mass > 0.0; ++k) {
        const double difference =
            x.at(first_x + i / m[p] * n[p] + k / m[p]) - y.at(first_y + i % m[p] * m[p] + k % m[p]);
        distortion += mass * plan.at(first + k) * difference * difference;
      }
    }
    CHECK(std::fabs(report[p].distortion - distortion) < 1e-4);
    CHECK(std::fabs(report[p].value - (1.0 - alphas[p]) * linear - alphas[p] * distortion) < 1e-4);
    first_x += n[p] * n[p];
    first_y += m[p] * m[p];
    first += n[p] * m[p];
  }
  OK(ph_ot_batch_destroy(device, batch, error, sizeof error));
}

}  // namespace

int main(int argc, char** argv) {
  const uint32_t seed = argc > 1 ? static_cast<uint32_t>(atoi(argv[1])) : 1;
  printf("seed %u\n", seed);
  random_numbers.seed(seed);
  int32_t status;
  device = ph_device_open(0, &status, error, sizeof error);
  if (device == nullptr) {
    fprintf(stderr, "%s\n", error);
    return 1;
  }
  for (uint32_t round = 0; round < 24; ++round) run_batch(round);
  for (uint32_t round = 0; round < 12; ++round) run_gromov(round);
  OK(ph_device_close(device, error, sizeof error));
  return 0;
}
