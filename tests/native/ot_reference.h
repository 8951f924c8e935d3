// Optimal transport in double precision, as plainly as it can be written: what solvers are compared with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "packhorse.h"

namespace reference {

struct Problem {
  uint32_t rows, columns, dimension;  // dimension 0: costs are given
  uint32_t cost_kind;
  std::vector<float> x, y, a, b;  // a, b: empty if uniform
  std::vector<float> given_cost;
  std::vector<double> cost;  // [rows, columns]
  double row_penalty = INFINITY, column_penalty = INFINITY;

  double mass_a(uint32_t i) const { return a.empty() ? 1.0 / rows : a[i]; }
  // With a's total where marginals hold.
  double mass_b(uint32_t j) const { return (b.empty() ? 1.0 / columns : b[j]) * b_scale; }
  double b_scale = 1.0;

  void prepare() {
    cost.assign(given_cost.begin(), given_cost.end());
    if (dimension > 0) {
      cost.resize(static_cast<size_t>(rows) * columns);
      for (uint32_t i = 0; i < rows; ++i)
        for (uint32_t j = 0; j < columns; ++j) cost[static_cast<size_t>(i) * columns + j] = of_points(i, j);
    }
    if (std::isfinite(row_penalty) || std::isfinite(column_penalty)) return;
    double total_a = 0.0, total_b = 0.0;
    for (uint32_t i = 0; i < rows; ++i) total_a += mass_a(i);
    for (uint32_t j = 0; j < columns; ++j) total_b += mass_b(j);
    b_scale = total_a / total_b;
  }
  double of_points(uint32_t i, uint32_t j) const {
    const float *p = &x[static_cast<size_t>(i) * dimension], *q = &y[static_cast<size_t>(j) * dimension];
    double squares = 0.0, dot = 0.0, p_squares = 0.0, q_squares = 0.0;
    for (uint32_t k = 0; k < dimension; ++k) {
      const double u = p[k], v = q[k];
      squares += (u - v) * (u - v);
      dot += u * v;
      p_squares += u * u;
      q_squares += v * v;
    }
    if (cost_kind == PH_OT_SQEUCLIDEAN) return squares;
    if (cost_kind == PH_OT_EUCLIDEAN) return std::sqrt(squares);
    if (cost_kind == PH_OT_DOT) return -dot;
    return p_squares == 0.0 || q_squares == 0.0 ? 1.0 : 1.0 - dot / std::sqrt(p_squares * q_squares);
  }
  double largest() const {
    double most = 0.0;
    for (const double c : cost)
      if (std::isfinite(c)) most = std::max(most, std::fabs(c));
    return most;
  }
};

struct Solution {
  std::vector<double> f, g, plan;
  double error;
};

// Sinkhorn's iterations in logarithms, until the error is at most the tolerance.
inline Solution solve(const Problem& p, double epsilon, double tolerance, uint32_t limit) {
  const uint32_t n = p.rows, m = p.columns;
  Solution s = {std::vector<double>(n, 0.0), std::vector<double>(m, 0.0),
                std::vector<double>(static_cast<size_t>(n) * m), 0.0};
  for (uint32_t j = 0; j < m; ++j)
    if (p.mass_b(j) == 0.0) s.g[j] = -INFINITY;
  const auto update = [&](bool rows, uint32_t at) -> double {
    const uint32_t count = rows ? m : n;
    const double mass = rows ? p.mass_a(at) : p.mass_b(at), penalty = rows ? p.row_penalty : p.column_penalty;
    double most = -INFINITY, sum = 0.0;
    const auto power = [&](uint32_t k) {
      return rows ? (s.g[k] - p.cost[static_cast<size_t>(at) * m + k]) / epsilon
                  : (s.f[k] - p.cost[static_cast<size_t>(k) * m + at]) / epsilon;
    };
    for (uint32_t k = 0; k < count; ++k) most = std::max(most, power(k));
    if (mass == 0.0 || most == -INFINITY) return -INFINITY;
    for (uint32_t k = 0; k < count; ++k) sum += std::exp(power(k) - most);
    const double damping = std::isinf(penalty) ? 1.0 : penalty / (penalty + epsilon);
    return damping * epsilon * (std::log(mass) - most - std::log(sum));
  };
  for (uint32_t iteration = 1;; ++iteration) {
    for (uint32_t i = 0; i < n; ++i) s.f[i] = update(true, i);
    for (uint32_t j = 0; j < m; ++j) s.g[j] = update(false, j);
    s.error = 0.0;
    for (uint32_t i = 0; i < n; ++i) {
      double sum = 0.0;
      for (uint32_t j = 0; j < m; ++j) {
        const size_t at = static_cast<size_t>(i) * m + j;
        const double power = (s.f[i] + s.g[j] - p.cost[at]) / epsilon;
        s.plan[at] = std::isnan(power) ? 0.0 : std::exp(power);
        sum += s.plan[at];
      }
      const double target = std::isinf(p.row_penalty) || s.f[i] == -INFINITY
                                ? p.mass_a(i)
                                : p.mass_a(i) * std::exp(-s.f[i] / p.row_penalty);
      s.error += std::fabs(sum - target);
    }
    if (s.error <= tolerance || iteration >= limit) return s;
  }
}

// A x = b by elimination with pivots.
inline std::vector<double> solve_dense(std::vector<double> matrix, std::vector<double> right) {
  const size_t n = right.size();
  for (size_t c = 0; c < n; ++c) {
    size_t pivot = c;
    for (size_t r = c; r < n; ++r)
      if (std::fabs(matrix[r * n + c]) > std::fabs(matrix[pivot * n + c])) pivot = r;
    for (size_t k = 0; k < n; ++k) std::swap(matrix[c * n + k], matrix[pivot * n + k]);
    std::swap(right[c], right[pivot]);
    for (size_t r = c + 1; r < n; ++r) {
      const double factor = matrix[r * n + c] / matrix[c * n + c];
      if (factor == 0.0) continue;
      for (size_t k = c; k < n; ++k) matrix[r * n + k] -= factor * matrix[c * n + k];
      right[r] -= factor * right[c];
    }
  }
  for (size_t c = n; c-- > 0;) {
    for (size_t k = c + 1; k < n; ++k) right[c] -= matrix[c * n + k] * right[k];
    right[c] /= matrix[c * n + c];
  }
  return right;
}

// Gradients with respect to what comes out; null: 0.
struct Upstream {
  const float *plan, *f, *g;
  double cost, value;
};
struct Gradients {
  std::vector<double> cost, x, y, a, b;
};

// The implicit gradient at a plan and its potentials, by the formulas of packhorse.h and a dense system; `fixed`: as if
// alpha and beta were 0. `terms`: the same sums over absolute values, of which rounding is a part.
inline Gradients implicit_gradient(const Problem& p, const double* plan, const double* f, const double* g,
                                   double epsilon, const Upstream& upstream, bool fixed = false,
                                   Gradients* terms = nullptr) {
  const uint32_t n = p.rows, m = p.columns, both = n + m;
  std::vector<double> sums(both, 0.0), h(static_cast<size_t>(n) * m, 0.0), right(both, 0.0),
      matrix(static_cast<size_t>(both) * both, 0.0);
  for (uint32_t i = 0; i < n; ++i) {
    for (uint32_t j = 0; j < m; ++j) {
      const size_t at = static_cast<size_t>(i) * m + j;
      sums[i] += plan[at];
      sums[n + j] += plan[at];
      if (std::isfinite(p.cost[at]))
        h[at] = ((upstream.plan == nullptr ? 0.0 : upstream.plan[at]) + upstream.cost * p.cost[at]) / epsilon;
    }
  }
  double difference = 0.0, present = 0.0;
  for (uint32_t k = 0; k < both; ++k) {
    if (sums[k] <= 0.0) continue;
    const float* given = k < n ? upstream.f : upstream.g;
    if (given != nullptr) right[k] = given[k < n ? k : k - n];
    difference += k < n ? right[k] : -right[k];
    ++present;
  }
  const double row_excess = std::isinf(p.row_penalty) ? 0.0 : epsilon / p.row_penalty,
               column_excess = std::isinf(p.column_penalty) ? 0.0 : epsilon / p.column_penalty;
  const bool pinned = row_excess == 0.0 && column_excess == 0.0;
  for (uint32_t k = 0; k < both; ++k) {
    double* row = &matrix[static_cast<size_t>(k) * both];
    if (sums[k] <= 0.0) {
      row[k] = 1.0;
      continue;
    }
    if (pinned) right[k] += (k < n ? -difference : difference) / present;
    row[k] = sums[k] * (1.0 + (k < n ? row_excess : column_excess));
    for (uint32_t l = 0; l < (k < n ? m : n); ++l) {
      const size_t at = k < n ? static_cast<size_t>(k) * m + l : static_cast<size_t>(l) * m + (k - n);
      row[k < n ? n + l : l] = plan[at];
      right[k] += plan[at] * h[at];
    }
    // The null direction (1, -1) gets an eigenvalue of its own.
    for (uint32_t l = 0; l < both && pinned; ++l)
      if (sums[l] > 0.0) row[l] += ((k < n) == (l < n) ? 1.0 : -1.0) / both / both;
  }
  const std::vector<double> solved = fixed ? std::vector<double>(both, 0.0) : solve_dense(matrix, right);
  Gradients out, unused;
  Gradients& all = terms == nullptr ? unused : *terms;
  all = {};
  out.cost.resize(h.size());
  all.cost.resize(h.size());
  for (uint32_t i = 0; i < n; ++i) {
    for (uint32_t j = 0; j < m; ++j) {
      const size_t at = static_cast<size_t>(i) * m + j;
      out.cost[at] = plan[at] == 0.0
                         ? 0.0
                         : plan[at] * (solved[i] + solved[n + j] - h[at] + upstream.cost + upstream.value);
      all.cost[at] = plan[at] * (std::fabs(solved[i]) + std::fabs(solved[n + j]) + std::fabs(h[at]) +
                                 std::fabs(upstream.cost) + std::fabs(upstream.value));
    }
  }
  for (uint32_t k = 0; k < both; ++k) {
    const double penalty = k < n ? p.row_penalty : p.column_penalty,
                 mass = k < n ? p.mass_a(k) : p.mass_b(k - n), potential = k < n ? f[k] : g[k - n];
    double gradient = 0.0;
    if (sums[k] > 0.0) {
      gradient = std::isinf(penalty) ? upstream.value * potential + epsilon * solved[k]
                                     : upstream.value * penalty * (1.0 - sums[k] / mass) +
                                           epsilon * solved[k] * sums[k] / mass;
    }
    (k < n ? out.a : out.b).push_back(gradient);
    double size = 0.0;
    if (sums[k] > 0.0) {
      size = std::isinf(penalty) ? std::fabs(upstream.value * potential) + epsilon * std::fabs(solved[k])
                                 : std::fabs(upstream.value) * penalty * (1.0 + sums[k] / mass) +
                                       epsilon * std::fabs(solved[k]) * sums[k] / mass;
    }
    (k < n ? all.a : all.b).push_back(size);
  }
  if (p.dimension == 0) return out;
  const uint32_t d = p.dimension;
  out.x.assign(static_cast<size_t>(n) * d, 0.0);
  out.y.assign(static_cast<size_t>(m) * d, 0.0);
  all.x.assign(static_cast<size_t>(n) * d, 0.0);
  all.y.assign(static_cast<size_t>(m) * d, 0.0);
  for (uint32_t i = 0; i < n; ++i) {
    for (uint32_t j = 0; j < m; ++j) {
      const float *u = &p.x[static_cast<size_t>(i) * d], *v = &p.y[static_cast<size_t>(j) * d];
      const double weight = out.cost[static_cast<size_t>(i) * m + j],
                   cost = p.cost[static_cast<size_t>(i) * m + j];
      double u_norm = 0.0, v_norm = 0.0, dot = 0.0;
      for (uint32_t k = 0; k < d; ++k) {
        u_norm += static_cast<double>(u[k]) * u[k];
        v_norm += static_cast<double>(v[k]) * v[k];
        dot += static_cast<double>(u[k]) * v[k];
      }
      u_norm = std::sqrt(u_norm);
      v_norm = std::sqrt(v_norm);
      for (uint32_t k = 0; k < d; ++k) {
        const double a = u[k], b = v[k];
        double by_a = 0.0, by_b = 0.0;
        // Differences may be formed after sums, of points less one of them.
        double sizes = std::fabs(a - p.y[k]) + std::fabs(b - p.y[k]);
        if (p.cost_kind == PH_OT_SQEUCLIDEAN) by_a = 2.0 * (a - b), by_b = -by_a;
        if (p.cost_kind == PH_OT_EUCLIDEAN && cost > 0.0) by_a = (a - b) / cost, by_b = -by_a;
        if (p.cost_kind == PH_OT_DOT) by_a = -b, by_b = -a;
        if (p.cost_kind == PH_OT_COSINE && u_norm > 0.0 && v_norm > 0.0) {
          by_a = -(b / v_norm - a / u_norm * dot / (u_norm * v_norm)) / u_norm;
          by_b = -(a / u_norm - b / v_norm * dot / (u_norm * v_norm)) / v_norm;
        }
        double size_a = 2.0 * sizes, size_b = size_a;
        if (p.cost_kind == PH_OT_EUCLIDEAN) size_a = size_b = cost > 0.0 ? sizes / cost : 0.0;
        if (p.cost_kind == PH_OT_DOT) size_a = std::fabs(b), size_b = std::fabs(a);
        if (p.cost_kind == PH_OT_COSINE) {
          const bool defined = u_norm > 0.0 && v_norm > 0.0;
          sizes = defined ? std::fabs(a / u_norm) + std::fabs(b / v_norm) : 0.0;
          size_a = defined ? sizes / u_norm : 0.0;
          size_b = defined ? sizes / v_norm : 0.0;
        }
        all.x[static_cast<size_t>(i) * d + k] += all.cost[static_cast<size_t>(i) * m + j] * size_a;
        all.y[static_cast<size_t>(j) * d + k] += all.cost[static_cast<size_t>(i) * m + j] * size_b;
        out.x[static_cast<size_t>(i) * d + k] += weight * by_a;
        out.y[static_cast<size_t>(j) * d + k] += weight * by_b;
      }
    }
  }
  return out;
}

}  // namespace reference
