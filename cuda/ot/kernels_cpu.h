// The work of transport on rows and columns of one problem, in doubles, on one CPU core. kernels_block_cpu.cpp is compiled once per
// instruction set, and every compilation fills a table like this one.
//
// Rows of matrices are `stride` doubles apart, a multiple of kStep, and start at multiples of 64 bytes; what lies between
// the last column and the stride is padding: costs are +infinity there, all else is 0. Counts of columns are multiples of
// kStep, padding included, unless it is said otherwise.
#pragma once

#include <cstdint>

namespace ph::ot {

constexpr uint32_t kStep = 8;

// Points of both sides: x by rows, y transposed, so that costs of a row are computed for several columns at once. Those of
// cosine are of length 1, or 0.
struct Points {
  uint32_t kind, dimension;
  const double* x;  // [rows, dimension]
  const double* y;  // [dimension, stride]
  uint64_t stride;
};

// How scalings follow from products with the kernel: how far a potential goes, and how much of it.
struct Update {
  const double* mass;  // 0 where there is none
  bool plain;          // the scaling is mass / product; else as follows, in logarithms of the scalings:
  // log u = (1 - relaxation) log u + relaxation * (damping * (log mass + shift - log product) - shift), where `shift` is the
  // potential that is in the kernel.
  const double* shift;
  double damping, relaxation;
  double decay;  // epsilon / penalty: the target of a marginal is mass * exp(-decay * potential / epsilon)
};

struct Extremes {
  double largest;  // of finite absolute values, at least 0
  bool valid;      // neither NaN nor -infinity
};

struct Kernels {
  const char* instruction_set;

  // Any count.
  void (*read)(const void* source, uint32_t dtype, int64_t first, uint64_t count, double* target);
  void (*write)(const double* source, void* target, uint32_t dtype, int64_t first, uint64_t count);

  // Costs of up to 4 rows.
  void (*costs)(const Points& points, uint32_t row, uint32_t rows, uint32_t column, uint32_t columns,
                double* cost, uint64_t stride);
  Extremes (*extremes)(const double* cost, uint64_t count);

  // power = exp(z - max z), where z = potential - cost * inverse, and their sum; 0 all if max z is -infinity.
  void (*log_row)(const double* cost, const double* potential, double inverse, uint32_t columns,
                  double* power, double* largest, double* total);
  // Likewise by columns [first, last), z = potential of the row - cost * inverse.
  void (*log_columns)(const double* cost, uint64_t stride, uint32_t rows, const double* potential,
                      double inverse, uint32_t first, uint32_t last, double* power, double* largest,
                      double* total);
  // plan = exp(row + potential - cost * inverse)
  void (*plan_row)(const double* cost, double row, const double* potential, double inverse, uint32_t columns,
                   double* plan);

  // An iteration's way over rows [first, last) of a kernel: product = kernel v, next_u from u and it, column_sums = transposed
  // kernel . next_u. Returns the distance of these rows' marginals under u and v from their targets.
  double (*iterate)(const double* kernel, uint64_t stride, uint32_t first, uint32_t last,
                    const Update& update, const double* u, const double* v, double* next_u,
                    double* column_sums);
  // plan = diag(u) kernel diag(v) in place, for rows [first, last): row sums, column sums, and <plan, cost>.
  double (*finish)(double* kernel, const double* cost, uint64_t stride, uint32_t first, uint32_t last,
                   const double* u, const double* v, double* row_sums, double* column_sums);

  double (*dot)(const double* x, const double* y, uint64_t count);
  void (*add_scaled)(double factor, const double* x, double* y, uint64_t count);  // y += factor * x
  void (*scale)(double factor, double* x, uint64_t count);                        // x *= factor
  void (*multiply)(double factor, const double* x, double* y, uint64_t count);    // y *= factor * x
  // products[i] = x . y[i], rows of y `stride` apart.
  void (*dots)(const double* x, const double* y, uint64_t stride, uint32_t rows, uint32_t columns,
               double* products);
  // sums += plan * gradient; returns the total.
  double (*weigh)(const double* plan, const double* gradient, uint32_t columns, double* sums);
  // gradient = plan * (row + potential + factor * gradient)
  void (*gradient_row)(const double* plan, double row, const double* potential, double factor,
                       uint32_t columns, double* gradient);
  // products[j][k] = sum_i factors[i] * plan[i][j] * plan[i][k] for k > j, and some others; rows `stride` apart.
  void (*gram)(const double* plan, const double* factors, uint64_t stride, uint32_t rows, uint32_t columns,
               double* products);
  // Eliminates the graph whose edges from j to k > j weigh weights[j][k]: node j goes, and what it has, right[j] and excess[j],
  // goes to the others by their shares of its weight, pivots[j] = excess[j] + its edges; 0, and nothing goes, where that is not
  // above apart[j].
  void (*eliminate)(double* weights, uint64_t stride, uint32_t nodes, const double* apart, double* right,
                    double* excess, double* pivots);
  // gradient = factor * cost + (from or 0), 0 where the cost is infinite.
  void (*add_costs)(const double* cost, double factor, const double* from, uint32_t columns,
                    double* gradient);
};

// The table of the instruction set that kv::block_kernels() chose.
const Kernels& kernels();

}  // namespace ph::ot
