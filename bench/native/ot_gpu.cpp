// Times of optimal transport on the GPU, by its own clock: the batch of 4,096 ragged problems, exact and partial transport of
// many problems, proximal points, gradients of iterations, graphs, and one large problem in streaming form. Medians; the batch's points and plans are more than the second cache holds, so that every run is cold.
// Prints Markdown. bench/gpu/ot_torch.py measures PyTorch on the same problems.
//
// ot_gpu [SEED]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "ot_reference.h"
#include "packhorse.h"

namespace {

char error[512];
ph_device* device;
constexpr int kRuns = 21;

#define END error, sizeof error
void ok(int32_t status) {
  if (status == PH_OK) return;
  fprintf(stderr, "%s\n", error);
  exit(1);
}

template <typename T>
struct Array {
  explicit Array(size_t count) : size(count) {
    int32_t status;
    handle = ph_buffer_create(device, count * sizeof(T), &status, END);
    if (handle == nullptr) ok(status);
    ok(ph_buffer_fill(device, handle, 0, 0, count * sizeof(T), END));
  }
  explicit Array(const std::vector<T>& values) : Array(values.size()) {
    ok(ph_buffer_upload(device, handle, 0, values.data(), size * sizeof(T), END));
  }
  ~Array() { ok(ph_buffer_destroy(device, handle, END)); }
  Array(const Array&) = delete;
  std::vector<T> read() const {
    std::vector<T> values(size);
    ok(ph_buffer_download(device, handle, 0, values.data(), size * sizeof(T), END));
    return values;
  }
  size_t size;
  ph_buffer* handle;
};
using Floats = Array<float>;

template <typename Work>
double median_milliseconds(int runs, Work work) {
  work();
  std::vector<float> times(runs);
  for (float& time : times) {
    ok(ph_device_timer_begin(device, END));
    work();
    ok(ph_device_timer_end(device, &time, END));
  }
  std::sort(times.begin(), times.end());
  return times[runs / 2];
}

std::vector<float> gaussian(std::mt19937& random, size_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

double relative(const std::vector<double>& expected, const float* actual) {
  double squares = 0.0, size = 0.0;
  for (size_t i = 0; i < expected.size(); ++i) {
    squares += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  return std::sqrt(squares / size);
}

void measure_batch(std::mt19937& random) {
  constexpr uint32_t kProblems = 4096, kDimension = 64;
  std::vector<uint32_t> n(kProblems), m(kProblems);
  std::vector<size_t> rows = {0}, columns = {0}, entries = {0};
  std::uniform_int_distribution<uint32_t> size(10, 100);
  for (uint32_t p = 0; p < kProblems; ++p) {
    n[p] = size(random);
    m[p] = size(random);
    rows.push_back(rows.back() + n[p]);
    columns.push_back(columns.back() + m[p]);
    entries.push_back(entries.back() + static_cast<size_t>(n[p]) * m[p]);
  }
  const std::vector<float> x_host = gaussian(random, rows.back() * kDimension),
                           y_host = gaussian(random, columns.back() * kDimension),
                           d_plan_host = gaussian(random, entries.back());
  const Floats x(x_host), y(y_host), d_plan(d_plan_host);
  Floats f(rows.back()), g(columns.back()), plan(entries.back()), grad_x(x_host.size()),
      grad_y(y_host.size());
  Array<ph_ot_report> reports(kProblems);
  int32_t status;
  ph_ot_batch* batch =
      ph_ot_batch_create(device, kProblems, n.data(), m.data(), PH_F32, kDimension, 0, 1, &status, END);
  if (batch == nullptr) ok(status);
  ok(ph_ot_batch_bind(device, batch, nullptr, 0, x.handle, 0, y.handle, 0, nullptr, 0, nullptr, 0, END));

  printf("## 4,096 problems of 10 to 100 points in 64 dimensions, tolerance 1e-5\n\n");
  printf(
      "| epsilon / max C | forward | backward | both | backward, plan from potentials | iterations: mean | "
      "least | "
      "median | 90 %% | 99 %% | most | unconverged | worst error | gradients to float64, rms, worst |\n");
  printf("|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n");
  for (const double epsilon : {0.05, 0.005}) {
    const ph_ot_options options = {PH_OT_SQEUCLIDEAN, 1, 20000, epsilon, 1e-5, 1.0, 0.0, INFINITY, INFINITY};
    ok(ph_ot_batch_set(device, batch, &options, nullptr, nullptr, nullptr, END));
    const auto forward = [&] {
      ok(ph_ot_sinkhorn(device, batch, nullptr, 0, f.handle, 0, g.handle, 0, plan.handle, 0, reports.handle,
                        0, END));
    };
    const auto backward = [&](bool kept) {
      ok(ph_ot_backward(device, batch, PH_OT_IMPLICIT, f.handle, 0, g.handle, 0, kept ? plan.handle : nullptr,
                        0, reports.handle, 0, nullptr, 0, d_plan.handle, 0, nullptr, 0, nullptr, 0, nullptr,
                        0, nullptr, 0, nullptr, 0, grad_x.handle, 0, grad_y.handle, 0, nullptr, 0, nullptr, 0,
                        END));
    };
    const double forward_time = median_milliseconds(kRuns, forward),
                 from_potentials = median_milliseconds(kRuns, [&] { backward(false); }),
                 backward_time = median_milliseconds(kRuns, [&] { backward(true); });
    const double both_time = median_milliseconds(kRuns, [&] {
      forward();
      backward(true);
    });
    const std::vector<ph_ot_report> found = reports.read();
    std::vector<uint32_t> iterations;
    double mean = 0.0, worst = 0.0;
    uint32_t unconverged = 0;
    for (const ph_ot_report& report : found) {
      iterations.push_back(report.iterations);
      mean += static_cast<double>(report.iterations) / kProblems;
      worst = std::max(worst, report.marginal_error);
      unconverged += report.status != PH_OT_CONVERGED;
    }
    std::sort(iterations.begin(), iterations.end());
    const auto quantile = [&](double part) {
      return iterations[static_cast<size_t>(part * (kProblems - 1))];
    };
    // Against float64, to convergence, for some of them.
    const std::vector<float> dx = grad_x.read(), dy = grad_y.read();
    double squares = 0.0, most = 0.0;
    int compared = 0;
    for (uint32_t p = 0; p < kProblems; p += 64) {
      reference::Problem problem = {};
      problem.rows = n[p];
      problem.columns = m[p];
      problem.dimension = kDimension;
      problem.cost_kind = PH_OT_SQEUCLIDEAN;
      problem.x.assign(x_host.begin() + rows[p] * kDimension, x_host.begin() + rows[p + 1] * kDimension);
      problem.y.assign(y_host.begin() + columns[p] * kDimension,
                       y_host.begin() + columns[p + 1] * kDimension);
      problem.prepare();
      const double own = epsilon * problem.largest();
      const reference::Solution solution =
          reference::solve(problem, own, 1e-12, epsilon > 0.01 ? 1000 : 4000);
      const reference::Gradients expected =
          reference::implicit_gradient(problem, solution.plan.data(), solution.f.data(), solution.g.data(),
                                       own, {&d_plan_host[entries[p]], nullptr, nullptr, 0.0, 0.0});
      for (const double each : {relative(expected.x, &dx[rows[p] * kDimension]),
                                relative(expected.y, &dy[columns[p] * kDimension])}) {
        squares += each * each;
        most = std::max(most, each);
        ++compared;
      }
    }
    printf(
        "| %g | %.3f ms | %.3f ms | %.3f ms | %.3f ms | %.1f | %u | %u | %u | %u | %u | %u | %.1e | %.1e, "
        "%.1e |\n",
        epsilon, forward_time, backward_time, both_time, from_potentials, mean, iterations[0], quantile(0.5),
        quantile(0.9), quantile(0.99), iterations.back(), unconverged, worst, std::sqrt(squares / compared),
        most);
    fflush(stdout);
  }
  ok(ph_ot_batch_destroy(device, batch, END));
}

// Without the solver's own tolerance: as many iterations as are asked for.
void measure_streaming(std::mt19937& random, uint32_t n) {
  constexpr uint32_t kDimension = 64;
  const Floats x(gaussian(random, static_cast<size_t>(n) * kDimension)),
      y(gaussian(random, static_cast<size_t>(n) * kDimension));
  Floats f(n), g(n), grad_x(x.size), grad_y(y.size);
  const Floats d_cost(std::vector<float>{1.0f});
  Array<ph_ot_report> reports(1);
  int32_t status;
  ph_ot_batch* batch = ph_ot_batch_create(device, 1, &n, &n, PH_F32, kDimension, 1, 1, &status, END);
  if (batch == nullptr) {
    printf("| %u | %s |\n", n, error);
    return;
  }
  ok(ph_ot_batch_bind(device, batch, nullptr, 0, x.handle, 0, y.handle, 0, nullptr, 0, nullptr, 0, END));
  for (const double tolerance : {0.0, 5e-6}) {
    const ph_ot_options options = {
        PH_OT_SQEUCLIDEAN, 1, tolerance > 0.0 ? 2000u : 100u, 0.05, tolerance, 1.0, 0.0, INFINITY, INFINITY};
    ok(ph_ot_batch_set(device, batch, &options, nullptr, nullptr, nullptr, END));
    const double time = median_milliseconds(n > 20000 ? 5 : kRuns, [&] {
      ok(ph_ot_sinkhorn(device, batch, nullptr, 0, f.handle, 0, g.handle, 0, nullptr, 0, reports.handle, 0,
                        END));
    });
    const double backward_time = median_milliseconds(5, [&] {
      ok(ph_ot_backward(device, batch, PH_OT_IMPLICIT, f.handle, 0, g.handle, 0, nullptr, 0, reports.handle,
                        0, nullptr, 0, nullptr, 0, nullptr, 0, nullptr, 0, d_cost.handle, 0, nullptr, 0,
                        nullptr, 0, grad_x.handle, 0, grad_y.handle, 0, nullptr, 0, nullptr, 0, END));
    });
    const ph_ot_report report = reports.read()[0];
    printf("| %u | %g | %.2f ms | %u | %.2e | %.9g | %.2f ms |\n", n, tolerance, time, report.iterations,
           report.marginal_error, report.value, backward_time);
    fflush(stdout);
  }
  ok(ph_ot_batch_destroy(device, batch, END));
}

struct ExactCase {
  const char* name;
  uint32_t problems, size, dimension;  // dimension 0: costs are random
  bool masses;                         // random, or uniform
  double part;                         // of the mass, with entropy; 0: all, without
};

// Plans and potentials of square problems; `paths` are augmenting paths, or iterations where there is an entropy.
void measure_exact(std::mt19937& random, const ExactCase& each) {
  const size_t points = static_cast<size_t>(each.problems) * each.size, entries = points * each.size;
  const auto uniform = [&](size_t count, float least) {
    std::uniform_real_distribution<float> draw(least, 1.0f);
    std::vector<float> values(count);
    for (float& value : values) value = draw(random);
    return values;
  };
  const auto masses = [&] {
    std::vector<float> values = uniform(points, 0.05f);
    for (size_t p = 0; p < points; p += each.size) {
      double total = 0.0;
      for (size_t i = p; i < p + each.size; ++i) total += values[i];
      for (size_t i = p; i < p + each.size; ++i) values[i] = static_cast<float>(values[i] / total);
    }
    return values;
  };
  const bool of_points = each.dimension > 0;
  const Floats cost(of_points ? std::vector<float>(1) : uniform(entries, 0.0f)),
      x(gaussian(random, of_points ? points * each.dimension : 1)),
      y(gaussian(random, of_points ? points * each.dimension : 1)), a(masses()), b(masses());
  Floats f(points), g(points), plan(entries);
  Array<ph_ot_report> reports(each.problems);
  const std::vector<uint32_t> sizes(each.problems, each.size);
  const std::vector<double> parts(each.problems, each.part);
  int32_t status;
  ph_ot_batch* batch = ph_ot_batch_create(device, each.problems, sizes.data(), sizes.data(), PH_F32,
                                          each.dimension, 0, 0, &status, END);
  if (batch == nullptr) ok(status);
  const ph_ot_options options = {PH_OT_SQEUCLIDEAN, 1, 10000, 0.05, 1e-5, 1.0, 0.0, INFINITY, INFINITY};
  ok(ph_ot_batch_set(device, batch, &options, nullptr, nullptr, nullptr, END));
  ok(ph_ot_batch_bind(device, batch, of_points ? nullptr : cost.handle, 0, of_points ? x.handle : nullptr, 0,
                      of_points ? y.handle : nullptr, 0, each.masses ? a.handle : nullptr, 0,
                      each.masses ? b.handle : nullptr, 0, END));
  const double time = median_milliseconds(each.size > 64 ? 5 : kRuns, [&] {
    if (each.part > 0.0) {
      ok(ph_ot_partial(device, batch, parts.data(), f.handle, 0, g.handle, 0, plan.handle, 0, reports.handle,
                       0, END));
    } else {
      ok(ph_ot_exact(device, batch, nullptr, f.handle, 0, g.handle, 0, plan.handle, 0, reports.handle, 0,
                     END));
    }
  });
  double mean = 0.0, worst = 0.0;
  uint32_t most = 0, others = 0;
  for (const ph_ot_report& report : reports.read()) {
    mean += static_cast<double>(report.iterations) / each.problems;
    most = std::max(most, report.iterations);
    worst = std::max(worst, report.marginal_error);
    others += report.status != PH_OT_CONVERGED;
  }
  printf("| %s | %u | %u | %.3f ms | %.1f | %u | %u | %.1e |\n", each.name, each.problems, each.size, time,
         mean, most, others, worst);
  fflush(stdout);
  ok(ph_ot_batch_destroy(device, batch, END));
}

// Proximal points, and gradients of 20 iterations, of 4,096 problems of 64 points in 64 dimensions.
void measure_points(std::mt19937& random) {
  constexpr uint32_t kProblems = 4096, kSize = 64, kDimension = 64;
  constexpr size_t kPoints = static_cast<size_t>(kProblems) * kSize, kEntries = kPoints * kSize;
  const Floats x(gaussian(random, kPoints * kDimension)), y(gaussian(random, kPoints * kDimension)),
      d_plan(gaussian(random, kEntries));
  Floats f(kPoints), g(kPoints), plan(kEntries), grad_x(x.size), grad_y(y.size);
  Array<ph_ot_report> reports(kProblems);
  const std::vector<uint32_t> sizes(kProblems, kSize);
  int32_t status;
  ph_ot_batch* batch = ph_ot_batch_create(device, kProblems, sizes.data(), sizes.data(), PH_F32, kDimension,
                                          0, 1, &status, END);
  if (batch == nullptr) ok(status);
  ok(ph_ot_batch_bind(device, batch, nullptr, 0, x.handle, 0, y.handle, 0, nullptr, 0, nullptr, 0, END));
  const auto report = [&](const char* what, double time) {
    double mean = 0.0;
    uint32_t most = 0, others = 0;
    for (const ph_ot_report& each : reports.read()) {
      mean += static_cast<double>(each.iterations) / kProblems;
      most = std::max(most, each.iterations);
      others += each.status != PH_OT_CONVERGED;
    }
    printf("| %s | %.3f ms | %.1f | %u | %u |\n", what, time, mean, most, others);
    fflush(stdout);
  };
  const auto set = [&](uint32_t iterations, double tolerance) {
    const ph_ot_options options = {PH_OT_SQEUCLIDEAN, 1,       iterations, 0.05, tolerance, 1.0, 0.0,
                                   INFINITY,          INFINITY};
    ok(ph_ot_batch_set(device, batch, &options, nullptr, nullptr, nullptr, END));
  };
  set(2000, 1e-3);
  report("proximal points, tolerance 1e-3", median_milliseconds(5, [&] {
           ok(ph_ot_proximal(device, batch, 1, f.handle, 0, g.handle, 0, plan.handle, 0, reports.handle, 0,
                             END));
         }));
  set(20, 0.0);
  report("20 iterations", median_milliseconds(kRuns, [&] {
           ok(ph_ot_sinkhorn(device, batch, nullptr, 0, f.handle, 0, g.handle, 0, plan.handle, 0,
                             reports.handle, 0, END));
         }));
  report("their gradients, unrolled", median_milliseconds(kRuns, [&] {
           ok(ph_ot_backward(device, batch, PH_OT_UNROLLED, f.handle, 0, g.handle, 0, plan.handle, 0,
                             reports.handle, 0, nullptr, 0, d_plan.handle, 0, nullptr, 0, nullptr, 0, nullptr,
                             0, nullptr, 0, nullptr, 0, grad_x.handle, 0, grad_y.handle, 0, nullptr, 0,
                             nullptr, 0, END));
         }));
  ok(ph_ot_batch_destroy(device, batch, END));
}

// Graphs of random points in the plane, by their distances.
void measure_graphs(std::mt19937& random, uint32_t problems, uint32_t size) {
  const auto distances = [&] {
    std::vector<float> values;
    for (uint32_t p = 0; p < problems; ++p) {
      const std::vector<float> points = gaussian(random, 2ull * size);
      for (uint32_t i = 0; i < size; ++i)
        for (uint32_t j = 0; j < size; ++j)
          values.push_back(std::hypot(points[2 * i] - points[2 * j], points[2 * i + 1] - points[2 * j + 1]));
    }
    return values;
  };
  const Floats x(distances()), y(distances());
  Floats plan(x.size);
  Array<ph_ot_gromov_report> reports(problems);
  const std::vector<uint32_t> sizes(problems, size);
  const std::vector<double> alphas(problems, 1.0);
  int32_t status;
  ph_ot_batch* batch =
      ph_ot_batch_create(device, problems, sizes.data(), sizes.data(), PH_F32, 0, 0, 0, &status, END);
  if (batch == nullptr) ok(status);
  const ph_ot_options options = {PH_OT_SQEUCLIDEAN, 0, 1000, 1.0, 1e-7, 1.0, 0.0, INFINITY, INFINITY};
  ok(ph_ot_batch_set(device, batch, &options, nullptr, nullptr, nullptr, END));
  const double time = median_milliseconds(5, [&] {
    ok(ph_ot_gromov(device, batch, alphas.data(), x.handle, 0, y.handle, 0, nullptr, 0, nullptr, 0, nullptr,
                    0, plan.handle, 0, reports.handle, 0, END));
  });
  double mean = 0.0, value = 0.0;
  uint32_t others = 0;
  for (const ph_ot_gromov_report& each : reports.read()) {
    mean += static_cast<double>(each.iterations) / problems;
    value += each.value / problems;
    others += each.status != PH_OT_CONVERGED;
  }
  printf("| %u | %u | %.3f ms | %.1f | %u | %.6f |\n", problems, size, time, mean, others, value);
  fflush(stdout);
  ok(ph_ot_batch_destroy(device, batch, END));
}

}  // namespace

int main(int count, char** arguments) {
  const unsigned seed = count > 1 ? static_cast<unsigned>(atoi(arguments[1])) : 1;
  std::mt19937 random(seed);
  int32_t status;
  device = ph_device_open(0, &status, END);
  if (device == nullptr) ok(status);
  ph_device_info info;
  ok(ph_device_get_info(device, &info, END));
  printf("%s, seed %u; medians of %d runs\n\n", info.name, seed, kRuns);
  measure_batch(random);
  printf(
      "\n## Exact transport, and of half of the mass with entropy (epsilon 0.05 max C, tolerance 1e-5)\n\n");
  printf(
      "| costs, masses | problems | n = m | time | paths or iterations: mean | most | unsolved | worst error "
      "|\n");
  printf("|:--|--:|--:|--:|--:|--:|--:|--:|\n");
  const ExactCase cases[] = {{"random, uniform", 4096, 64, 0, false, 0.0},
                             {"random, random", 4096, 64, 0, true, 0.0},
                             {"points in 64 dimensions, uniform", 4096, 64, 64, false, 0.0},
                             {"random, uniform", 256, 256, 0, false, 0.0},
                             {"random, random", 256, 256, 0, true, 0.0},
                             {"random, uniform", 132, 512, 0, false, 0.0},
                             {"random, random", 132, 512, 0, true, 0.0},
                             {"random, random, one problem", 1, 400, 0, true, 0.0},
                             {"random, random, half of it", 4096, 64, 0, true, 0.5}};
  for (const ExactCase& each : cases) measure_exact(random, each);
  printf("\n## 4,096 problems of 64 points in 64 dimensions, epsilon 0.05 max C\n\n");
  printf("| what | time | iterations: mean | most | unconverged |\n|:--|--:|--:|--:|--:|\n");
  measure_points(random);
  printf("\n## Gromov-Wasserstein transport of graphs by distances in the plane, tolerance 1e-7\n\n");
  printf(
      "| pairs | points | time | iterations: mean | unconverged | mean value |\n|--:|--:|--:|--:|--:|--:|\n");
  for (const auto& [problems, size] : {std::make_pair(4096u, 20u), std::make_pair(1024u, 50u),
                                       std::make_pair(256u, 128u), std::make_pair(132u, 256u)})
    measure_graphs(random, problems, size);
  printf("\n## One problem of n x n points in 64 dimensions, never storing the cost, epsilon 0.05 max C\n\n");
  printf(
      "| n | tolerance | time | iterations | marginal error | value | gradients of <T, C> to the points |\n");
  printf("|--:|--:|--:|--:|--:|--:|--:|\n");
  for (const uint32_t n : {10000u, 50000u}) measure_streaming(random, n);
  ok(ph_device_close(device, END));
}
