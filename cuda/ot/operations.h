// Optimal transport on ragged batches; both backends implement it. Formulas are in packhorse.h, section "ot".
//
// A batch is `problems` problems of sizes n x m that follow each other without padding: the rows of all problems are one
// array, and so are the columns, and the entries of all n x m matrices (row-major). Offsets count elements, not bytes.
// Pointers are to device memory unless they are named host_, start at multiples of 16 bytes (a problem within an array may
// start at any element), and are valid, but their contents are not: NaN, infinities and negative masses must be found by the
// solver, and end in a status of the problem that has them. Nothing allocates but create_workspace and a workspace's first
// exact, partial or Gromov-Wasserstein transport, and its first gradients of iterations; all else is enqueued on the device's stream, waits for nothing, and gives the same bits every
// time, whatever else is in the batch.
#pragma once

#include <memory>

#include "device/device.h"

namespace ph::ot {

// The sizes of a batch, in host memory: problem p has rows host_row_offsets[p] .. host_row_offsets[p + 1], at least one,
// likewise columns, and its entries start at host_plan_offsets[p]: the sum of n * m of the problems before. [problems + 1].
struct Shape {
  uint32_t problems;
  const int64_t *host_row_offsets, *host_column_offsets, *host_plan_offsets;

  int64_t rows() const { return host_row_offsets[problems]; }
  int64_t columns() const { return host_column_offsets[problems]; }
  int64_t entries() const { return host_plan_offsets[problems]; }
  int64_t rows(uint32_t problem) const { return host_row_offsets[problem + 1] - host_row_offsets[problem]; }
  int64_t columns(uint32_t problem) const {
    return host_column_offsets[problem + 1] - host_column_offsets[problem];
  }
};

struct WorkspaceOptions {
  uint32_t dtype;      // of all tensors of the batch: PH_F32, or PH_F64, which CUDA refuses as unsupported
  uint32_t dimension;  // of points; 0: costs are given as matrices
  // Never hold n x m entries of any problem, neither as scratch memory nor on chip in whole: for few large problems of
  // points. Memory is O((n + m) * dimension).
  bool streaming;
  bool backward;  // whether backward will be called
};

// What a backend keeps for batches of one shape: the offsets on the device, the order of problems by size, scratch memory.
// Calls that use the same workspace do not overlap (they are on one stream).
class Workspace {
 public:
  virtual ~Workspace() = default;
};
// Copies what it needs of `shape`.
std::unique_ptr<Workspace> create_workspace(ph_device& device, const Shape& shape,
                                            const WorkspaceOptions& options);

// What is to be transported. Tensors have the workspace's dtype.
struct Problem {
  const void* cost;    // [entries], +infinity where nothing may go; or null, and then
  const void *x, *y;   // points [rows, dimension], [columns, dimension]
  uint32_t cost_kind;  // ph_ot_cost, of points
  const void *a,
      *b;  // masses [rows], [columns], not negative; null: 1/n, 1/m. Massless rows and columns take no
           // part: f or g is -infinity there, and gradients are 0
  const double* epsilons;    // [problems] above 0, or null: epsilon for all
  const double* tolerances;  // [problems], or null: tolerance for all. L1 error: sum |T1 - a| + sum |T'1 - b|
  double epsilon, tolerance;
  bool
      relative_epsilon;  // epsilon * the largest finite |cost| of the problem (epsilon itself where all costs are 0)
  // KL penalties: + row_penalty * KL(T1 | a) + column_penalty * KL(T'1 | b) with KL(p|q) = sum p log(p/q) - p + q; infinity:
  // the marginal holds (balanced). Where finite, T1's target is a * exp(-f / row_penalty), and the marginal error is the
  // distance from it; masses need not have equal totals.
  double row_penalty, column_penalty;
};

// How Sinkhorn's iterations go. One iteration updates f from g, then g from f (so that columns hold), from g = 0 unless
// warm_g says otherwise; massless columns start at -infinity.
struct Iterations {
  const int32_t* limits;  // [problems], or null: limit for all
  int32_t limit;
  const void* warm_g;  // null or [columns]; values that are not finite count as 0
  // omega in [1, 2): f += omega * (update - f), likewise g; 1: plain Sinkhorn. The first f is its update, and so is every one
  // while the marginal error is above kStageTolerance * total mass: far from the solution omega could diverge.
  double relaxation;
  // 0: none. In (0, 1): iterations begin at the epsilon of the largest finite |cost|, which is multiplied by this until it
  // is below the problem's epsilon; a stage ends when the marginal error is at most max(tolerance, kStageTolerance *
  // total mass). All iterations count.
  double scaling;
};
constexpr double kStageTolerance = 0.05;

// What comes out. Any pointer but `reports` may be null. T_ij = exp((f_i + g_j - C_ij) / epsilon).
struct Solution {
  void *f, *g;  // potentials [rows], [columns]
  void* plan;   // [entries]
  // [problems]: status, iterations, marginal_error of the potentials that are returned, cost <T, C> (0 * infinity = 0), value
  // <T, C> - epsilon * H(T) with H(T) = -sum T (log T - 1) (plus the KL penalties), epsilon (absolute), and place: the first
  // element of the problem that is at fault, see ph_ot_status. Potentials and plans are never NaN: where status is
  // PH_OT_INFEASIBLE or worse, they are 0, cost and value NaN.
  ph_ot_report* reports;
};
void sinkhorn(ph_device& device, Workspace& workspace, const Problem& problem, const Iterations& iterations,
              const Solution& solution);

// The least cost without entropy, of as much as host_masses [problems] says, or null: of all. See packhorse.h.
void exact(ph_device& device, Workspace& workspace, const Problem& problem, const double* host_masses,
           const Solution& solution);
// Proximal points, of `inner` iterations each. See packhorse.h. CUDA refuses problems that do not lie on chip.
void proximal(ph_device& device, Workspace& workspace, const Problem& problem, const Iterations& iterations,
              uint32_t inner, const Solution& solution);

// From potentials, and the epsilon and status of reports, as sinkhorn left them. Potentials of float32 know a plan to
// |f| / epsilon * 6e-8 relative: where epsilon is small, keep the plan that sinkhorn wrote.
struct Potentials {
  const void *f, *g;
  const void* plan;  // [entries], or null: computed from the potentials
  const ph_ot_report* reports;
};

// plan: [entries].
void write_plan(ph_device& device, Workspace& workspace, const Problem& problem, const Potentials& potentials,
                void* plan);

// out [rows, width] = T matrix [columns, width], or transposed: out [columns, width] = T' matrix [rows, width].
struct PlanProduct {
  const void* matrix;
  void* out;
  uint32_t width;
  bool transposed;
  // Whether rows of out are divided by their plan's total mass (barycentric projection); 0 where there is none.
  bool normalised;
};
void plan_product(ph_device& device, Workspace& workspace, const Problem& problem,
                  const Potentials& potentials, const PlanProduct& product);

// Gradients of a loss L, from those with respect to what came out to those with respect to what went in.
//   implicit  G = dL/dT + d_cost * C; u = d_f + (T o G) 1 / epsilon, v = d_g + (T o G)' 1 / epsilon, (u, v) without its part
//             along (1, -1); [diag T1, T; T', diag T'1] [alpha; beta] = [u; v] without massless rows and columns, the null
//             direction (1, -1) pinned. Then
//               dL/dC = (d_cost + d_value) T + T o (alpha 1' + 1 beta' - G / epsilon)
//               dL/da = d_value f + epsilon alpha, dL/db = d_value g + epsilon beta (up to a shift (c, -c))
//             With a finite penalty rho the diagonal is multiplied by 1 + epsilon / rho, and epsilon * alpha by T1 / a (dL/da
//             of the value is then rho * (1 - T1 / a)); nothing is pinned.
//   envelope  dL/dC = (d_cost + d_value) T, dL/da = d_value f, dL/db = d_value g; d_plan, d_f and d_g are null
//   detached  dL/dC = (d_cost + d_value) T, dL/da = dL/db = 0
//   unrolled  the derivative of the iterations that were made; CUDA refuses problems that do not lie on chip
// Entries of infinite cost have no part in G and gradient 0. Problems of status PH_OT_INFEASIBLE or worse: all 0.
struct Backward {
  uint32_t mode;                   // ph_ot_gradient
  const void *d_plan, *d_f, *d_g;  // [entries], [rows], [columns] or null: 0
  const void *d_cost, *d_value;    // [problems] or null: 0
  void* grad_cost;                 // [entries] or null: dL/dC
  void *grad_x, *grad_y, *grad_a,
      *grad_b;  // [rows, dimension], [columns, dimension], [rows], [columns] or null
};
// `iterations` only counts for PH_OT_UNROLLED. Euclidean and cosine costs have gradient 0 where a distance or a norm is 0.
void backward(ph_device& device, Workspace& workspace, const Problem& problem, const Potentials& potentials,
              const Iterations& iterations, const Backward& call);

}  // namespace ph::ot
