// Optimal transport in float32 through the C ABI against double precision: batches of random problems of all kinds, their
// plans, potentials, reports, products and gradients; without entropy, by duality; the same bits from run to run and whatever
// else is in the batch; problems without an answer.
//
// ot_oracle_test [SEED [ROUNDS [MOST]]]   of up to MOST rows and columns
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "ot_reference.h"

namespace {

ph_device* device;
// The CPU computes in double precision: what it returns differs by the rounding of results to float32 alone. A GPU computes in
// float32, whose every step rounds: costs, potentials in units of epsilon, their sums, powers (2 ulp), and sums of those.
bool in_single = false;
// What rounding to nearest changes, at most, relatively.
constexpr double kUnit = 1.0 / (1 << 24);
std::mt19937 random_numbers;

uint32_t up_to(uint32_t most) { return 1 + static_cast<uint32_t>(random_numbers()) % most; }
double uniform() { return std::uniform_real_distribution<double>()(random_numbers); }
double normal() { return std::normal_distribution<double>()(random_numbers); }

#define END error, sizeof error

// Device memory, of at least one element.
template <typename T>
struct Array {
  explicit Array(size_t count) : size(count) {
    int32_t status;
    handle = ph_buffer_create(device, std::max<size_t>(count, 1) * sizeof(T), &status, END);
    check(handle != nullptr, error, __LINE__);
    // NaN: whatever is not written shows.
    OK(ph_buffer_fill(device, handle, 0, 0xff, std::max<size_t>(count, 1) * sizeof(T), END));
  }
  explicit Array(const std::vector<T>& values) : Array(values.size()) {
    if (size > 0) OK(ph_buffer_upload(device, handle, 0, values.data(), size * sizeof(T), END));
  }
  ~Array() { OK(ph_buffer_destroy(device, handle, END)); }
  Array(const Array&) = delete;
  std::vector<T> read() const {
    std::vector<T> values(size);
    if (size > 0) OK(ph_buffer_download(device, handle, 0, values.data(), size * sizeof(T), END));
    return values;
  }
  size_t size;
  ph_buffer* handle;
};
using Floats = Array<float>;

struct Kind {
  uint32_t dimension, cost_kind;
  bool masses, penalties;
  double epsilon, relaxation, scaling;  // epsilon is relative
  uint32_t iterations;
  float offset;    // of all points
  bool streaming;  // no plan then but that of the potentials
};

reference::Problem random_problem(const Kind& kind, uint32_t rows, uint32_t columns) {
  reference::Problem p = {};
  p.rows = rows;
  p.columns = columns;
  p.dimension = kind.dimension;
  p.cost_kind = kind.cost_kind;
  for (uint32_t i = 0; i < rows * kind.dimension; ++i)
    p.x.push_back(static_cast<float>(normal() + kind.offset));
  for (uint32_t i = 0; i < columns * kind.dimension; ++i)
    p.y.push_back(static_cast<float>(normal() + 0.3 + kind.offset));
  if (kind.dimension == 0) {
    // The first column has all its partners, so that there is an answer.
    for (uint32_t i = 0; i < rows * columns; ++i)
      p.given_cost.push_back(i % columns != 0 && i >= columns && uniform() < 0.1
                                 ? INFINITY
                                 : static_cast<float>(3.0 * uniform() - 0.5));
  } else if (columns > 1 && rows > 1) {  // a point to itself
    for (uint32_t k = 0; k < kind.dimension; ++k) p.y[k] = p.x[k];
  }
  if (kind.masses) {
    const auto fill = [&](std::vector<float>& masses, uint32_t count, double total) {
      double sum = 0.0;
      for (uint32_t i = 0; i < count; ++i) {
        masses.push_back(static_cast<float>(i > 0 && uniform() < 0.1 ? 0.0 : 0.05 + uniform()));
        sum += masses.back();
      }
      for (float& mass : masses) mass = static_cast<float>(mass * total / sum);
    };
    fill(p.a, rows, 2.5);
    fill(p.b, columns, kind.penalties ? 3.5 : 2.5);
  }
  return p;
}

struct Batch {
  explicit Batch(const std::vector<reference::Problem>& problems_, const Kind& kind_)
      : problems(problems_), kind(kind_) {
    rows = columns = plan = {0};
    std::vector<uint32_t> n, m;
    std::vector<float> x_all, y_all, a_all, b_all, cost_all;
    const auto append = [](std::vector<float>& all, const std::vector<float>& some) {
      all.insert(all.end(), some.begin(), some.end());
    };
    for (const reference::Problem& p : problems) {
      n.push_back(p.rows);
      m.push_back(p.columns);
      rows.push_back(rows.back() + p.rows);
      columns.push_back(columns.back() + p.columns);
      plan.push_back(plan.back() + static_cast<size_t>(p.rows) * p.columns);
      append(x_all, p.x);
      append(y_all, p.y);
      append(a_all, p.a);
      append(b_all, p.b);
      append(cost_all, p.given_cost);
    }
    x = std::make_unique<Floats>(x_all);
    y = std::make_unique<Floats>(y_all);
    a = std::make_unique<Floats>(a_all);
    b = std::make_unique<Floats>(b_all);
    cost = std::make_unique<Floats>(cost_all);
    int32_t status;
    handle = ph_ot_batch_create(device, static_cast<uint32_t>(problems.size()), n.data(), m.data(), PH_F32,
                                kind.dimension, kind.streaming, 1, &status, END);
    check(handle != nullptr, error, __LINE__);
    const ph_ot_options options = {kind.cost_kind,
                                   1,
                                   kind.iterations,
                                   kind.epsilon,
                                   tolerance,
                                   kind.relaxation,
                                   kind.scaling,
                                   problems[0].row_penalty,
                                   problems[0].column_penalty};
    OK(ph_ot_batch_set(device, handle, &options, nullptr, nullptr, nullptr, END));
    const bool points = kind.dimension > 0;
    OK(ph_ot_batch_bind(device, handle, points ? nullptr : cost->handle, 0, points ? x->handle : nullptr, 0,
                        points ? y->handle : nullptr, 0, kind.masses ? a->handle : nullptr, 0,
                        kind.masses ? b->handle : nullptr, 0, END));
  }
  ~Batch() { OK(ph_ot_batch_destroy(device, handle, END)); }
  Batch(const Batch&) = delete;

  static constexpr double tolerance = 1e-5;
  std::vector<reference::Problem> problems;
  Kind kind;
  std::vector<size_t> rows, columns, plan;  // offsets
  std::unique_ptr<Floats> x, y, a, b, cost;
  ph_ot_batch* handle;
};

struct Results {
  explicit Results(const Batch& batch)
      : f(batch.rows.back()),
        g(batch.columns.back()),
        plan(batch.plan.back()),
        reports(batch.problems.size()) {
    OK(ph_ot_sinkhorn(device, batch.handle, nullptr, 0, f.handle, 0, g.handle, 0,
                      batch.kind.streaming ? nullptr : plan.handle, 0, reports.handle, 0, END));
  }
  Floats f, g, plan;
  Array<ph_ot_report> reports;
};

// The plans, of the potentials where there are no others.
std::vector<float> plans_of(const Batch& batch, const Results& results) {
  std::vector<float> plan = results.plan.read();
  if (!batch.kind.streaming) return plan;
  const std::vector<float> f = results.f.read(), g = results.g.read();
  const std::vector<ph_ot_report> reports = results.reports.read();
  for (size_t q = 0; q < batch.problems.size(); ++q) {
    const reference::Problem& p = batch.problems[q];
    for (uint32_t i = 0; i < p.rows; ++i) {
      for (uint32_t j = 0; j < p.columns; ++j) {
        const size_t at = static_cast<size_t>(i) * p.columns + j;
        const double power =
            (static_cast<double>(f[batch.rows[q] + i]) + g[batch.columns[q] + j] - p.cost[at]) /
            reports[q].epsilon;
        plan[batch.plan[q] + at] = std::isnan(power) ? 0.0f : static_cast<float>(std::exp(power));
      }
    }
  }
  return plan;
}

// Of sums and of results: one rounding of each; in single precision also those of sums of some hundred terms, where signs
// differ, and of powers.
double arithmetic() { return (in_single ? 96.0 : 3.0) * kUnit; }
// What rounding f and g to float32 once does to a plan, relatively and at most, as an exponent is (f + g - C) / epsilon; in
// single precision C too, and eight times over: parts of potentials are multiplied by 1 / epsilon and added. Of points, C is
// the sum of squares as large as the largest cost, also where it is 0 itself.
double rounding_of(const reference::Problem& p, const float* t, const float* f, const float* g,
                   double epsilon) {
  const double largest = p.largest();
  double sum = 0.0, total = 0.0;
  for (uint32_t i = 0; i < p.rows; ++i) {
    for (uint32_t j = 0; j < p.columns; ++j) {
      const size_t at = static_cast<size_t>(i) * p.columns + j;
      if (!(t[at] > 0.0f)) continue;
      total += t[at];
      const double cost = p.dimension > 0 ? largest : std::fabs(p.cost[at]);
      sum += t[at] * (std::fabs(f[i]) + std::fabs(g[j]) + (in_single ? cost : 0.0));
    }
  }
  return total > 0.0 ? (in_single ? 8.0 : 1.0) * kUnit * sum / total / epsilon : 0.0;
}

template <typename T>
bool same(const std::vector<T>& x, const std::vector<T>& y) {
  return x.size() == y.size() && memcmp(x.data(), y.data(), x.size() * sizeof(T)) == 0;
}

// `size`: squared, at least what differences are relative to.
double distance(const std::vector<double>& expected, const float* actual, double shift = 0.0,
                double size = 0.0) {
  double squares = 0.0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = actual[i] - expected[i] - (expected[i] == 0.0 ? 0.0 : shift);
    CHECK(difference == difference);
    squares += difference * difference;
    size += expected[i] * expected[i];
  }
  return std::sqrt(squares / (size + 1e-12));
}

// What of the tolerances was used, at most.
std::map<std::string, double> used;

void expect(double value, double most, const char* what, const reference::Problem& p, const Kind& kind) {
  used[what] = std::max(used[what], value / most);
  if (value <= most) return;
  fprintf(stderr, "%s: %g, at most %g expected; %u x %u, dimension %u, cost %u, epsilon %g\n", what, value,
          most, p.rows, p.columns, kind.dimension, kind.cost_kind, kind.epsilon);
  exit(1);
}

void check_solution(const Batch& batch, const Results& results) {
  const std::vector<float> f = results.f.read(), g = results.g.read(), plan = plans_of(batch, results);
  const std::vector<ph_ot_report> reports = results.reports.read();
  for (size_t q = 0; q < batch.problems.size(); ++q) {
    const reference::Problem& p = batch.problems[q];
    const ph_ot_report& report = reports[q];
    const double largest = p.largest(), epsilon = batch.kind.epsilon * (largest > 0.0 ? largest : 1.0);
    CHECK(report.status <= PH_OT_ITERATION_LIMIT);
    expect(std::fabs(report.epsilon - epsilon) / epsilon, arithmetic(), "epsilon", p, batch.kind);
    std::vector<double> sums(p.rows + p.columns, 0.0);
    double cost = 0.0, value = 0.0, total = 0.0, apart = 0.0;
    for (uint32_t i = 0; i < p.rows; ++i) {
      for (uint32_t j = 0; j < p.columns; ++j) {
        const size_t at = static_cast<size_t>(i) * p.columns + j;
        const double t = plan[batch.plan[q] + at];
        CHECK(t >= 0.0 && t < INFINITY);
        sums[i] += t;
        sums[p.rows + j] += t;
        total += t;
        const double power =
            (static_cast<double>(f[batch.rows[q] + i]) + g[batch.columns[q] + j] - p.cost[at]) / epsilon;
        apart += std::fabs(t - (std::isnan(power) ? 0.0 : std::exp(power)));
        if (t > 0.0) cost += t * p.cost[at];
        if (t > 0.0) value += t * p.cost[at] + epsilon * t * (std::log(t) - 1.0);
      }
    }
    // Of a plan that is computed from the potentials.
    const double rounding =
        rounding_of(p, &plan[batch.plan[q]], &f[batch.rows[q]], &g[batch.columns[q]], epsilon);
    double marginal_error = 0.0, of_targets = 0.0;  // what rounding of potentials does to targets
    double of_penalties = 0.0;                      // the terms of penalties, without their signs
    for (uint32_t k = 0; k < p.rows + p.columns; ++k) {
      const bool of_row = k < p.rows;
      const double mass = of_row ? p.mass_a(k) : p.mass_b(k - p.rows),
                   penalty = of_row ? p.row_penalty : p.column_penalty,
                   potential = of_row ? f[batch.rows[q] + k] : g[batch.columns[q] + (k - p.rows)];
      if (mass == 0.0) {
        CHECK(potential == -INFINITY && sums[k] == 0.0);
        continue;
      }
      CHECK(std::isfinite(potential));
      marginal_error +=
          std::fabs(sums[k] - (std::isinf(penalty) ? mass : mass * std::exp(-potential / penalty)));
      if (std::isfinite(penalty))
        of_targets += kUnit * mass * std::exp(-potential / penalty) * std::fabs(potential) / penalty;
      if (std::isfinite(penalty)) {
        value += penalty * (sums[k] * std::log(sums[k] / mass) - sums[k] + mass);
        of_penalties += penalty * (sums[k] * std::fabs(std::log(sums[k] / mass)) + sums[k] + mass);
      }
    }
    expect(apart / total, arithmetic() + rounding, "plan of the potentials", p, batch.kind);
    // Streaming, the plan at hand is that of rounded potentials; and one that is too large for a GPU's multiprocessors is
    // written from potentials, where what is reported is summed from others.
    const double slack = batch.kind.streaming || in_single ? rounding : 0.0;
    expect(std::fabs(marginal_error - report.marginal_error) / total,
           2.0 * (arithmetic() + slack) + of_targets / total, "marginal error", p, batch.kind);
    if (report.status == PH_OT_CONVERGED) CHECK(report.marginal_error <= Batch::tolerance);
    else if (report.iterations < batch.kind.iterations)
      // Ended by an error of sums that was within the tolerance, where that of the result, by rounding, is not.
      expect(report.marginal_error - Batch::tolerance,
             in_single ? 2.0 * (arithmetic() + rounding) * total : 0.0, "error above the tolerance", p,
             batch.kind);
    expect(std::fabs(cost - report.cost), (arithmetic() + slack) * total * largest, "cost", p, batch.kind);
    expect(std::fabs(value - report.value),
           (arithmetic() + slack) * total * (largest + epsilon) + arithmetic() * of_penalties, "value", p,
           batch.kind);
    if (report.status != PH_OT_CONVERGED || batch.kind.epsilon < 0.04 || p.rows * p.columns > 10000) continue;
    const reference::Solution expected = reference::solve(p, epsilon, 1e-9, 1000);
    if (expected.error > 1e-9) continue;
    // An iteration multiplies the error by less than 1, after all of them by 1e-5: what is left to go is about the error
    // times a tenth of the iterations.
    double left = 0.0;
    for (size_t k = 0; k < expected.plan.size(); ++k)
      left += std::fabs(expected.plan[k] - plan[batch.plan[q] + k]);
    expect(left / total, arithmetic() + rounding + Batch::tolerance * (1.0 + 0.3 * report.iterations) / total,
           "plan", p, batch.kind);
  }
}

void check_products(const Batch& batch, const Results& results) {
  const uint32_t width = up_to(70);
  const std::vector<float> f = results.f.read(), g = results.g.read(), plan = plans_of(batch, results);
  const std::vector<ph_ot_report> reports = results.reports.read();
  Floats again(batch.plan.back());
  if (!batch.kind.streaming)
    OK(ph_ot_plan(device, batch.handle, results.f.handle, 0, results.g.handle, 0, results.reports.handle, 0,
                  again.handle, 0, END));
  const std::vector<float> from_potentials = batch.kind.streaming ? plan : again.read();
  for (const bool transposed : {false, true}) {
    const std::vector<size_t>&from = transposed ? batch.rows : batch.columns,
          &to = transposed ? batch.columns : batch.rows;
    std::vector<float> values(from.back() * width);
    for (float& each : values) each = static_cast<float>(normal());
    const Floats matrix(values);
    for (const bool normalised : {false, true}) {
      for (const bool kept : {false, true}) {
        if (kept && batch.kind.streaming) continue;
        Floats out(to.back() * width);
        OK(ph_ot_plan_product(device, batch.handle, results.f.handle, 0, results.g.handle, 0,
                              kept ? results.plan.handle : nullptr, 0, results.reports.handle, 0,
                              matrix.handle, 0, out.handle, 0, width, transposed, normalised, END));
        const std::vector<float> actual = out.read();
        for (size_t q = 0; q < batch.problems.size(); ++q) {
          const reference::Problem& p = batch.problems[q];
          const float* t = (kept ? plan.data() : from_potentials.data()) + batch.plan[q];
          const uint32_t count = transposed ? p.columns : p.rows, inner = transposed ? p.rows : p.columns;
          std::vector<double> expected(static_cast<size_t>(count) * width, 0.0);
          double squares = 0.0;  // of what is added up
          for (uint32_t i = 0; i < count; ++i) {
            double sum = 0.0, row_squares = 0.0;
            for (uint32_t j = 0; j < inner; ++j) {
              const double weight = t[transposed ? static_cast<size_t>(j) * p.columns + i
                                                 : static_cast<size_t>(i) * p.columns + j];
              sum += weight;
              for (uint32_t w = 0; w < width; ++w) {
                const double term = weight * values[(from[q] + j) * width + w];
                expected[static_cast<size_t>(i) * width + w] += term;
                row_squares += term * term;
              }
            }
            const bool divided = normalised && sum > 0.0;
            for (uint32_t w = 0; w < width && divided; ++w)
              expected[static_cast<size_t>(i) * width + w] /= sum;
            squares += divided ? row_squares / sum / sum : row_squares;
          }
          // Signs of what is multiplied differ, so that sums and roundings add up as random steps do.
          const double rounding =
              rounding_of(p, t, &f[batch.rows[q]], &g[batch.columns[q]], reports[q].epsilon);
          expect(distance(expected, &actual[to[q] * width], 0.0, squares),
                 arithmetic() + (kept ? 0.0 : rounding), "product", p, batch.kind);
        }
      }
    }
  }
}

void check_gradients(const Batch& batch, const Results& results) {
  const std::vector<float> f = results.f.read(), g = results.g.read(), plan = plans_of(batch, results);
  const std::vector<ph_ot_report> reports = results.reports.read();
  const uint32_t d = batch.kind.dimension;
  const auto draw = [](size_t count, double size) {
    std::vector<float> values(count);
    for (float& each : values) each = static_cast<float>(size * normal());
    return values;
  };
  const size_t problems = batch.problems.size();
  const std::vector<float> d_plan = draw(plan.size(), 3.0), d_f = draw(f.size(), 0.1),
                           d_g = draw(g.size(), 0.1), d_cost = draw(problems, 0.3),
                           d_value = draw(problems, 1.0);
  const Floats plan_in(d_plan), f_in(d_f), g_in(d_g), cost_in(d_cost), value_in(d_value);
  Floats cost(plan.size()), x(f.size() * d), y(g.size() * d), a(f.size()), b(g.size());
  const bool streaming = batch.kind.streaming;
  for (const bool all : {true, false}) {
    const bool points = d > 0, kept = !streaming && uniform() < 0.5;
    const bool costs = !streaming && (all || !points), of_cost = all || streaming;
    // Potentials of parts that hardly anything joins move freely, beyond what float32 can follow.
    const bool potentials = all && batch.kind.epsilon > 0.04;
    OK(ph_ot_backward(device, batch.handle, PH_OT_IMPLICIT, results.f.handle, 0, results.g.handle, 0,
                      kept ? results.plan.handle : nullptr, 0, results.reports.handle, 0, nullptr, 0,
                      streaming ? nullptr : plan_in.handle, 0, potentials ? f_in.handle : nullptr, 0,
                      potentials ? g_in.handle : nullptr, 0, of_cost ? cost_in.handle : nullptr, 0,
                      all ? value_in.handle : nullptr, 0, costs ? cost.handle : nullptr, 0,
                      points ? x.handle : nullptr, 0, points ? y.handle : nullptr, 0,
                      all ? a.handle : nullptr, 0, all ? b.handle : nullptr, 0, END));
    const std::vector<float> grad_cost = cost.read(), grad_x = x.read(), grad_y = y.read(), grad_a = a.read(),
                             grad_b = b.read();
    for (size_t q = 0; q < problems; ++q) {
      const reference::Problem& p = batch.problems[q];
      if (p.rows + p.columns > (q == 0 ? 800 : 200)) continue;  // the reference takes their cube
      std::vector<double> t(plan.begin() + batch.plan[q], plan.begin() + batch.plan[q + 1]),
          f_own(f.begin() + batch.rows[q], f.begin() + batch.rows[q + 1]),
          g_own(g.begin() + batch.columns[q], g.begin() + batch.columns[q + 1]);
      const reference::Upstream upstream = {
          streaming ? nullptr : &d_plan[batch.plan[q]], potentials ? &d_f[batch.rows[q]] : nullptr,
          potentials ? &d_g[batch.columns[q]] : nullptr, of_cost ? d_cost[q] : 0.0, all ? d_value[q] : 0.0};
      reference::Gradients terms;
      const reference::Gradients expected = reference::implicit_gradient(
          p, t.data(), f_own.data(), g_own.data(), reports[q].epsilon, upstream, false, &terms);
      // What rounding of the plan, or of what is computed with it, may change: the reference shows with a plan that is off.
      const double off = arithmetic() + (kept ? 0.0
                                              : rounding_of(p, &plan[batch.plan[q]], &f[batch.rows[q]],
                                                            &g[batch.columns[q]], reports[q].epsilon));
      std::vector<double> t_off = t;
      for (double& each : t_off) each *= 1.0 + off * (2.0 * uniform() - 1.0);
      const reference::Gradients moved = reference::implicit_gradient(
          p, t_off.data(), f_own.data(), g_own.data(), reports[q].epsilon, upstream);
      const auto compare = [&](const char* what, std::vector<double> reference::Gradients::*member,
                               const float* actual, bool pinned = false, bool negative = false) {
        const std::vector<double>& own = expected.*member;
        // Gradients of masses are known up to a constant of each problem.
        double shift = 0.0, present = 0.0, squares = 0.0, moves = 0.0, sizes = 0.0, largest = 0.0;
        for (size_t i = 0; i < expected.a.size() && pinned; ++i) {
          if (expected.a[i] == 0.0) continue;
          shift += grad_a[batch.rows[q] + i] - expected.a[i];
          largest = std::max(largest, std::fabs(double{grad_a[batch.rows[q] + i]}));
          ++present;
        }
        shift = present > 0.0 ? (negative ? -shift : shift) / present : 0.0;
        for (size_t i = 0; i < own.size(); ++i) {
          const double difference = actual[i] - own[i] - (own[i] == 0.0 ? 0.0 : shift),
                       move = (moved.*member)[i] - own[i], term = (terms.*member)[i] + largest;
          CHECK(difference == difference);
          squares += difference * difference;
          moves += move * move;
          sizes += term * term;
        }
        expect(std::sqrt(squares), 10.0 * std::sqrt(moves) + off * std::sqrt(sizes) + 1e-12, what, p,
               batch.kind);
      };
      using G = reference::Gradients;
      const bool pinned = std::isinf(p.row_penalty) && std::isinf(p.column_penalty);
      if (costs) compare("gradient of costs", &G::cost, &grad_cost[batch.plan[q]]);
      if (points) {
        compare("gradient of x", &G::x, &grad_x[batch.rows[q] * d]);
        compare("gradient of y", &G::y, &grad_y[batch.columns[q] * d]);
      }
      if (!potentials) continue;  // masses move them
      compare("gradient of a", &G::a, &grad_a[batch.rows[q]], pinned);
      compare("gradient of b", &G::b, &grad_b[batch.columns[q]], pinned, true);
    }
  }
}

// Gradients that nothing has to be solved for.
void check_other_modes(const Batch& batch, const Results& results) {
  const std::vector<float> f = results.f.read(), g = results.g.read(), plan = plans_of(batch, results);
  const std::vector<ph_ot_report> reports = results.reports.read();
  const uint32_t d = batch.kind.dimension;
  const size_t problems = batch.problems.size();
  std::vector<float> d_cost(problems), d_value(problems);
  for (float& each : d_cost) each = static_cast<float>(normal());
  for (float& each : d_value) each = static_cast<float>(normal());
  const Floats cost_in(d_cost), value_in(d_value);
  Floats x(f.size() * d), y(g.size() * d), a(f.size()), b(g.size());
  for (const uint32_t mode : {PH_OT_ENVELOPE, PH_OT_DETACHED}) {
    OK(ph_ot_backward(device, batch.handle, mode, results.f.handle, 0, results.g.handle, 0, nullptr, 0,
                      results.reports.handle, 0, nullptr, 0, nullptr, 0, nullptr, 0, nullptr, 0,
                      cost_in.handle, 0, value_in.handle, 0, nullptr, 0, d > 0 ? x.handle : nullptr, 0,
                      d > 0 ? y.handle : nullptr, 0, a.handle, 0, b.handle, 0, END));
    const std::vector<float> grad_x = x.read(), grad_y = y.read(), grad_a = a.read(), grad_b = b.read();
    for (size_t q = 0; q < problems; ++q) {
      const reference::Problem& p = batch.problems[q];
      const std::vector<double> t(plan.begin() + batch.plan[q], plan.begin() + batch.plan[q + 1]),
          f_own(f.begin() + batch.rows[q], f.begin() + batch.rows[q + 1]),
          g_own(g.begin() + batch.columns[q], g.begin() + batch.columns[q + 1]);
      reference::Gradients terms_of_points, terms_of_masses;
      const auto expected = [&](double value, reference::Gradients& terms) {
        const reference::Upstream upstream = {nullptr, nullptr, nullptr, 0.0, value};
        return reference::implicit_gradient(p, t.data(), f_own.data(), g_own.data(), reports[q].epsilon,
                                            upstream, true, &terms);
      };
      const reference::Gradients of_points = expected(double{d_cost[q]} + d_value[q], terms_of_points),
                                 of_masses =
                                     expected(mode == PH_OT_DETACHED ? 0.0 : d_value[q], terms_of_masses);
      const double off = arithmetic() + rounding_of(p, &plan[batch.plan[q]], &f[batch.rows[q]],
                                                    &g[batch.columns[q]], reports[q].epsilon);
      const auto compare = [&](const char* what, const std::vector<double>& own,
                               const std::vector<double>& terms, const float* actual) {
        double squares = 0.0, sizes = 0.0;
        for (size_t i = 0; i < own.size(); ++i) {
          squares += (actual[i] - own[i]) * (actual[i] - own[i]);
          sizes += terms[i] * terms[i];
        }
        CHECK(squares == squares);
        expect(std::sqrt(squares), off * std::sqrt(sizes) + 1e-12, what, p, batch.kind);
      };
      if (d > 0) {
        compare("plain gradient of x", of_points.x, terms_of_points.x, &grad_x[batch.rows[q] * d]);
        compare("plain gradient of y", of_points.y, terms_of_points.y, &grad_y[batch.columns[q] * d]);
      }
      compare("plain gradient of a", of_masses.a, terms_of_masses.a, &grad_a[batch.rows[q]]);
      compare("plain gradient of b", of_masses.b, terms_of_masses.b, &grad_b[batch.columns[q]]);
    }
  }
}

void check_same_bits(const Batch& batch, const Results& results) {
  const Results again(batch);
  CHECK(same(results.plan.read(), again.plan.read()) && same(results.f.read(), again.f.read()) &&
        same(results.g.read(), again.g.read()));
  const size_t q = random_numbers() % batch.problems.size();
  const Batch alone({batch.problems[q]}, batch.kind);
  const Results one(alone);
  const std::vector<float> all = results.plan.read(), own = one.plan.read();
  CHECK(memcmp(own.data(), &all[batch.plan[q]], own.size() * sizeof(float)) == 0);
}

// What must be reported, and where.
void check_faults() {
  const Kind kind = {0, 0, true, false, 0.1, 1.0, 0.0, 100, 0.0f, false};
  for (int i = 0; i < 12; ++i) {
    const uint32_t n = 1 + up_to(100), m = 1 + up_to(140);
    std::vector<reference::Problem> problems = {random_problem(kind, n, m), random_problem(kind, n, m)};
    reference::Problem& p = problems[1];
    const uint32_t row = up_to(n) - 1, column = up_to(m) - 1;
    uint32_t status = PH_OT_NON_FINITE_COST;
    uint64_t place = static_cast<uint64_t>(row) * m + column;
    if (i % 6 == 0) p.given_cost[place] = NAN;
    if (i % 6 == 1) p.given_cost[place] = -INFINITY;
    if (i % 6 == 2) {
      status = PH_OT_INFEASIBLE;
      p.a[row] = std::max(p.a[row], 0.5f);
      double total = 0.0;
      for (const float mass : p.a) total += mass;
      for (float& mass : p.a) mass = static_cast<float>(mass * 2.5 / total);
      for (uint32_t j = 0; j < m; ++j) p.given_cost[static_cast<size_t>(row) * m + j] = INFINITY;
      place = row;
    }
    if (i % 6 == 3) {
      status = PH_OT_INVALID_MASS;
      p.a[row] = -1.0f;
      place = row;
    }
    if (i % 6 == 4) {
      status = PH_OT_INVALID_MASS;
      p.b[column] = NAN;
      place = n + column;
    }
    if (i % 6 == 5) {
      status = PH_OT_INVALID_MASS;
      for (float& mass : p.a) mass *= 1.1f;
      place = n + m;
    }
    const Batch batch(problems, kind);
    const Results results(batch);
    const std::vector<ph_ot_report> reports = results.reports.read();
    CHECK(reports[0].status <= PH_OT_ITERATION_LIMIT);
    CHECK(reports[1].status == status && reports[1].place == place);
    CHECK(std::isnan(reports[1].cost) && std::isnan(reports[1].value));
    const std::vector<float> f = results.f.read(), g = results.g.read(), plan = results.plan.read();
    for (size_t k = batch.plan[1]; k < batch.plan[2]; ++k) CHECK(plan[k] == 0.0f);
    for (size_t k = batch.rows[1]; k < batch.rows[2]; ++k) CHECK(f[k] == 0.0f);
    for (size_t k = batch.columns[1]; k < batch.columns[2]; ++k) CHECK(g[k] == 0.0f);
  }
  Kind points = kind;
  points.dimension = 1 + up_to(70);
  std::vector<reference::Problem> problems = {random_problem(points, 20, 30), random_problem(points, 40, 70)};
  const uint32_t bad = up_to(70 * points.dimension) - 1;
  problems[1].y[bad] = NAN;
  const Batch batch(problems, points);
  const Results results(batch);
  const std::vector<ph_ot_report> reports = results.reports.read();
  CHECK(reports[0].status <= PH_OT_ITERATION_LIMIT);
  CHECK(reports[1].status == PH_OT_NON_FINITE_POINT && reports[1].place == 40ull * points.dimension + bad);
}

// Transport without entropy, which the potentials prove to be the least: f + g is nowhere above the costs, and equals them
// where mass goes. Of a part of the mass, besides: all potentials of a side are the price of the whole where some of
// its mass stays, and no other is above it.
void check_exact(const Batch& batch, bool part) {
  std::vector<double> masses;
  for (const reference::Problem& p : batch.problems) {
    double total = 0.0;
    for (uint32_t i = 0; i < p.rows; ++i) total += p.mass_a(i);
    masses.push_back(part ? (0.05 + 0.9 * uniform()) * total : total);
  }
  const size_t count = batch.problems.size();
  const Floats f_out(batch.rows.back()), g_out(batch.columns.back()), plan_out(batch.plan.back());
  const Array<ph_ot_report> reports_out(count);
  const auto solve = [&] {
    OK(ph_ot_exact(device, batch.handle, part ? masses.data() : nullptr, f_out.handle, 0, g_out.handle, 0,
                   plan_out.handle, 0, reports_out.handle, 0, END));
  };
  solve();
  const std::vector<float> f = f_out.read(), g = g_out.read(), plan = plan_out.read();
  const std::vector<ph_ot_report> reports = reports_out.read();
  solve();
  CHECK(same(plan, plan_out.read()) && same(f, f_out.read()) && same(g, g_out.read()));
  for (size_t q = 0; q < count; ++q) {
    const reference::Problem& p = batch.problems[q];
    const ph_ot_report& report = reports[q];
    if (report.status == PH_OT_INFEASIBLE) {  // of costs that are given
      CHECK(p.dimension == 0 && report.place < p.rows);
      continue;
    }
    CHECK(report.status == PH_OT_CONVERGED && report.epsilon == 0.0 && report.value == report.cost);
    const double scale = std::max(p.largest(), 1e-30), total = masses[q];
    double least = INFINITY, used = -INFINITY, cost = 0.0, dual = 0.0, moved = 0.0;
    std::vector<double> sums(p.rows + p.columns, 0.0);
    for (uint32_t i = 0; i < p.rows; ++i) {
      for (uint32_t j = 0; j < p.columns; ++j) {
        const size_t at = static_cast<size_t>(i) * p.columns + j;
        const double t = plan[batch.plan[q] + at];
        const double left = p.cost[at] - static_cast<double>(f[batch.rows[q] + i]) - g[batch.columns[q] + j];
        CHECK(t >= 0.0 && t < INFINITY);
        least = std::min(least, left);
        if (t > 0.0) used = std::max(used, left);
        if (t > 0.0) cost += t * p.cost[at];
        sums[i] += t;
        sums[p.rows + j] += t;
        moved += t;
      }
    }
    // Potentials are float32, and may be larger than costs where walls are between them.
    double most = scale;
    for (uint32_t i = 0; i < p.rows; ++i) most = std::max(most, std::fabs(double{f[batch.rows[q] + i]}));
    expect(-least, 1e-6 * most, "dual feasibility", p, batch.kind);
    expect(used, 1e-6 * most, "complementary slackness", p, batch.kind);
    expect(std::fabs(moved - total), 1e-6 * total, "mass", p, batch.kind);
    expect(std::fabs(cost - report.cost), 2e-7 * total * scale, "exact cost", p, batch.kind);
    expect(report.marginal_error, 1e-12 * total, "exact error", p, batch.kind);
    double f_price = -INFINITY, g_price = -INFINITY;
    for (uint32_t k = 0; k < p.rows + p.columns; ++k) {
      const bool of_row = k < p.rows;
      const double mass = of_row ? p.mass_a(k) : p.mass_b(k - p.rows);
      double& price = of_row ? f_price : g_price;
      price = std::max(price, double{of_row ? f[batch.rows[q] + k] : g[batch.columns[q] + (k - p.rows)]});
      expect(part ? sums[k] - mass : std::fabs(sums[k] - mass), 1e-6 * total, "exact marginal", p,
             batch.kind);
    }
    for (uint32_t k = 0; k < p.rows + p.columns; ++k) {
      const bool of_row = k < p.rows;
      const double mass = of_row ? p.mass_a(k) : p.mass_b(k - p.rows), price = of_row ? f_price : g_price,
                   own = of_row ? f[batch.rows[q] + k] : g[batch.columns[q] + (k - p.rows)];
      if (mass == 0.0) continue;
      dual += (part ? own - price : own) * mass;
      if (part && sums[k] < mass - 1e-6 * total)
        expect(price - own, 1e-6 * most, "price of what stays", p, batch.kind);
    }
    if (part) dual += (f_price + g_price) * total;
    expect(std::fabs(dual - report.cost), 2e-6 * total * most, "duality gap", p, batch.kind);
  }
}

}  // namespace

int main(int count, char** arguments) {
  const unsigned seed = count > 1 ? static_cast<unsigned>(atoi(arguments[1])) : std::random_device{}();
  const int rounds = count > 2 ? atoi(arguments[2]) : 40;
  const uint32_t most = count > 3 ? static_cast<uint32_t>(atoi(arguments[3])) : 130;
  fprintf(stderr, "seed %u\n", seed);
  random_numbers.seed(seed);
  int32_t opened;
  device = ph_device_open(0, &opened, END);
  check(device != nullptr, error, __LINE__);
  ph_device_info info;
  OK(ph_device_get_info(device, &info, END));
  in_single = info.is_gpu == 1;
  for (int round = 0; round < rounds; ++round) {
    Kind kind = {};
    const uint32_t what = round % 5;
    kind.cost_kind = what == 4 ? 0 : what;
    kind.dimension = what == 4 ? 0 : (up_to(3) == 1 ? 64 : up_to(70));
    kind.masses = up_to(2) == 1;
    // Products may be far below 0: then it pays to transport more than floats can tell.
    kind.penalties = kind.masses && kind.cost_kind != PH_OT_DOT && up_to(4) == 1;
    kind.epsilon = up_to(3) == 1 ? 0.01 : (up_to(2) == 1 ? 1.0 : 0.05);
    kind.relaxation = up_to(4) == 1 ? 1.5 : 1.0;
    kind.scaling = up_to(4) == 1 ? 0.5 : 0.0;
    kind.iterations = up_to(6) == 1 ? up_to(4) : 3000;
    // Far from 0, cosines of float32 points hardly differ.
    kind.offset = kind.cost_kind != PH_OT_COSINE && up_to(4) == 1 ? 50.0f : 0.0f;
    // Too large to lie on a GPU's multiprocessors, or as if it were.
    const bool large = up_to(4) == 1;
    kind.streaming = !large && kind.dimension > 0 && up_to(3) == 1;
    std::vector<reference::Problem> problems;
    const double row_penalty = kind.penalties ? 1.5 : INFINITY,
                 column_penalty = up_to(2) == 1 ? INFINITY : 0.8;
    for (uint32_t i = 0, total = up_to(large ? 2 : 12); i < total; ++i) {
      const uint32_t limit = up_to(2) == 1 ? most : std::min(most, 40u);
      problems.push_back(random_problem(kind, up_to(limit), large ? 512 + up_to(most) : up_to(limit)));
      if (kind.penalties) {
        problems.back().row_penalty = row_penalty;
        problems.back().column_penalty = column_penalty;
      }
      problems.back().prepare();
    }
    const Batch batch(problems, kind);
    const Results results(batch);
    check_solution(batch, results);
    check_products(batch, results);
    check_gradients(batch, results);
    check_other_modes(batch, results);
    check_same_bits(batch, results);
    // Only masses whose totals are equal can all go.
    if (kind.streaming || large || kind.penalties) continue;
    check_exact(batch, false);
    check_exact(batch, true);
  }
  check_faults();
  for (const auto& [what, share] : used) fprintf(stderr, "%s: %.2f of what may be\n", what.c_str(), share);
  OK(ph_device_close(device, END));
}
