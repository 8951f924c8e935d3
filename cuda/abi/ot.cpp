// extern "C": optimal transport on ragged batches.
#include <cmath>
#include <vector>

#include "abi/arguments.h"
#include "ot/gromov.h"
#include "ot/operations.h"
#include "ot/partial.h"

using ph::checked;
using ph::checked_tensor;
using ph::Error;
using ph::guard;

struct ph_ot_batch {
  std::vector<int64_t> row_offsets = {0}, column_offsets = {0}, plan_offsets = {0};
  ph::ot::WorkspaceOptions options;
  std::unique_ptr<ph::ot::Workspace> workspace;
  ph::ot::Problem problem = {};
  ph::ot::Iterations iterations = {};
  uint8_t* own_options = nullptr;  // epsilons, tolerances and limits of problems, on the device
  bool is_set = false, is_bound = false;

  ph::ot::Shape shape() const {
    return {static_cast<uint32_t>(row_offsets.size() - 1), row_offsets.data(), column_offsets.data(),
            plan_offsets.data()};
  }
};

namespace {

using unsigned_long = unsigned long long;

void require_flag(uint32_t flag, const char* what) {
  if (flag > 1) throw Error(PH_ERROR_INVALID_ARGUMENT, "%s must be 0 or 1: it is %u", what, flag);
}

ph_ot_batch& present(ph_ot_batch* batch) {
  if (batch == nullptr) throw Error(PH_ERROR_INVALID_ARGUMENT, "The batch is null");
  return *batch;
}
ph_ot_batch& ready(ph_ot_batch* batch) {
  if (!present(batch).is_set || !batch->is_bound) {
    throw Error(PH_ERROR_INVALID_ARGUMENT, "The batch has no %s: call ph_ot_batch_%s first",
                batch->is_set ? "inputs" : "options", batch->is_set ? "bind" : "set");
  }
  return *batch;
}

// The tensors of a batch.
class Tensors {
 public:
  explicit Tensors(const ph_ot_batch& batch)
      : shape_(batch.shape()),
        element_(batch.options.dtype == PH_F64 ? 8 : 4),
        dimension_(batch.options.dimension) {}

  // null if the buffer is.
  void* optional(const ph_buffer* buffer, uint64_t offset, uint64_t count, const char* what) const {
    return buffer == nullptr ? nullptr : needed(buffer, offset, count, what);
  }
  void* needed(const ph_buffer* buffer, uint64_t offset, uint64_t count, const char* what) const {
    return checked_tensor(buffer, offset, count > UINT64_MAX / 8 ? UINT64_MAX : count * element_, what);
  }
  ph_ot_report* reports(const ph_buffer* buffer, uint64_t offset) const {
    return reinterpret_cast<ph_ot_report*>(
        checked_tensor(buffer, offset, shape_.problems * sizeof(ph_ot_report), "the reports"));
  }
  uint64_t rows() const { return static_cast<uint64_t>(shape_.rows()); }
  uint64_t columns() const { return static_cast<uint64_t>(shape_.columns()); }
  uint64_t entries() const { return static_cast<uint64_t>(shape_.entries()); }
  uint64_t problems() const { return shape_.problems; }
  uint64_t dimension() const { return dimension_; }

 private:
  const ph::ot::Shape shape_;
  const uint64_t element_, dimension_;
};

ph_ot_options checked_options(const ph_ot_options* given, const ph_ot_batch& batch) {
  if (given == nullptr) throw Error(PH_ERROR_INVALID_ARGUMENT, "The options are null");
  const ph_ot_options& options = *given;
  require_flag(options.relative_epsilon, "relative_epsilon");
  if (batch.options.dimension > 0 && options.cost_kind > PH_OT_DOT)
    throw Error(PH_ERROR_INVALID_ARGUMENT, "There is no cost %u", options.cost_kind);
  if (options.iterations == 0 || options.iterations > INT32_MAX) {
    throw Error(PH_ERROR_INVALID_ARGUMENT, "There must be 1 to %d iterations: %u are", INT32_MAX,
                options.iterations);
  }
  if (!(options.relaxation >= 1.0 && options.relaxation < 2.0)) {
    throw Error(PH_ERROR_INVALID_ARGUMENT, "The relaxation must be at least 1 and below 2: it is %g",
                options.relaxation);
  }
  if (!(options.scaling >= 0.0 && options.scaling < 1.0)) {
    throw Error(PH_ERROR_INVALID_ARGUMENT,
                "The scaling of epsilon must be 0, for none, or between 0 and 1: it is %g", options.scaling);
  }
  for (const double penalty : {options.row_penalty, options.column_penalty}) {
    if (!(penalty > 0.0)) {
      throw Error(PH_ERROR_INVALID_ARGUMENT,
                  "A penalty must be above 0, infinity if the marginal holds: it is %g", penalty);
    }
  }
  return options;
}

void require_epsilon(double epsilon) {
  if (!(epsilon > 0.0 && epsilon < INFINITY))
    throw Error(PH_ERROR_INVALID_ARGUMENT, "epsilon must be above 0 and finite: it is %g", epsilon);
}
void require_tolerance(double tolerance) {
  if (!(tolerance >= 0.0 && tolerance < INFINITY))
    throw Error(PH_ERROR_INVALID_ARGUMENT, "The tolerance must be finite and not negative: it is %g",
                tolerance);
}

// Those to transport; null: all.
void require_masses(const double* masses, uint64_t problems) {
  for (uint64_t p = 0; masses != nullptr && p < problems; ++p) {
    if (masses[p] > 0.0 && masses[p] < INFINITY) continue;
    throw Error(PH_ERROR_INVALID_ARGUMENT, "The mass to transport of problem %llu must be above 0: it is %g",
                static_cast<unsigned_long>(p), masses[p]);
  }
}

ph::ot::Potentials potentials_of(const Tensors& tensors, const ph_buffer* f, uint64_t f_offset,
                                 const ph_buffer* g, uint64_t g_offset, const ph_buffer* plan,
                                 uint64_t plan_offset, const ph_buffer* reports, uint64_t reports_offset) {
  return {tensors.needed(f, f_offset, tensors.rows(), "f"),
          tensors.needed(g, g_offset, tensors.columns(), "g"),
          tensors.optional(plan, plan_offset, tensors.entries(), "the plan"),
          tensors.reports(reports, reports_offset)};
}

ph::ot::Solution solution_of(const Tensors& tensors, const ph_buffer* f, uint64_t f_offset,
                             const ph_buffer* g, uint64_t g_offset, const ph_buffer* plan,
                             uint64_t plan_offset, const ph_buffer* reports, uint64_t reports_offset) {
  return {tensors.optional(f, f_offset, tensors.rows(), "f"),
          tensors.optional(g, g_offset, tensors.columns(), "g"),
          tensors.optional(plan, plan_offset, tensors.entries(), "the plan"),
          tensors.reports(reports, reports_offset)};
}

// For what needs the entries of all problems.
void require_kept(const ph_ot_batch& batch, const char* what) {
  if (!batch.options.streaming) return;
  throw Error(PH_ERROR_UNSUPPORTED,
              "Cannot %s where problems are streamed: create the batch without streaming", what);
}

}  // namespace

extern "C" {

ph_ot_batch* ph_ot_batch_create(ph_device* device, uint32_t problems, const uint32_t* rows,
                                const uint32_t* columns, uint32_t dtype, uint32_t dimension,
                                uint32_t streaming, uint32_t backward, int32_t* status, char* error,
                                uint32_t error_bytes) {
  std::unique_ptr<ph_ot_batch> batch;
  const int32_t code = guard(error, error_bytes, [&] {
    ph_device& opened = checked(device);
    if (problems == 0 || problems > INT32_MAX) {
      throw Error(PH_ERROR_INVALID_ARGUMENT, "A batch must have 1 to %d problems: it has %u", INT32_MAX,
                  problems);
    }
    if (rows == nullptr || columns == nullptr)
      throw Error(PH_ERROR_INVALID_ARGUMENT, "The sizes of the problems are null");
    if (dtype != PH_F32 && dtype != PH_F64)
      throw Error(PH_ERROR_INVALID_ARGUMENT, "Transport is of f32 or f64: dtype %u is neither", dtype);
    require_flag(streaming, "streaming");
    require_flag(backward, "backward");
    if (streaming == 1 && dimension == 0) {
      throw Error(PH_ERROR_INVALID_ARGUMENT,
                  "Only costs of points can be streamed: costs that are matrices are there already");
    }
    auto created = std::make_unique<ph_ot_batch>();
    created->options = {dtype, dimension, streaming == 1, backward == 1};
    uint64_t entries = 0;
    for (uint32_t p = 0; p < problems; ++p) {
      if (rows[p] == 0 || columns[p] == 0 || rows[p] > INT32_MAX - 64 || columns[p] > INT32_MAX - 64) {
        throw Error(
            PH_ERROR_INVALID_ARGUMENT,
            "Problem %u is %u x %u: it must have at least one row and one column, and fewer than 2^31", p,
            rows[p], columns[p]);
      }
      entries += static_cast<uint64_t>(rows[p]) * columns[p];
      if (entries > INT64_MAX / 16)
        throw Error(PH_ERROR_INVALID_ARGUMENT, "The batch has too many entries from problem %u on", p);
      created->row_offsets.push_back(created->row_offsets.back() + rows[p]);
      created->column_offsets.push_back(created->column_offsets.back() + columns[p]);
      created->plan_offsets.push_back(static_cast<int64_t>(entries));
    }
    created->workspace = ph::ot::create_workspace(opened, created->shape(), created->options);
    batch = std::move(created);
  });
  if (status != nullptr) *status = code;
  return batch.release();
}

int32_t ph_ot_batch_destroy(ph_device* device, ph_ot_batch* batch, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph_device& opened = checked(device);
    const std::unique_ptr<ph_ot_batch> destroyed(&present(batch));
    if (destroyed->own_options != nullptr) ph::release(opened, destroyed->own_options);
  });
}

int32_t ph_ot_batch_set(ph_device* device, ph_ot_batch* batch, const ph_ot_options* options,
                        const double* epsilons, const double* tolerances, const int32_t* iterations,
                        char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph_device& opened = checked(device);
    ph_ot_batch& own = present(batch);
    const ph_ot_options given = checked_options(options, own);
    const uint64_t problems = own.shape().problems;
    if (epsilons == nullptr) require_epsilon(given.epsilon);
    if (tolerances == nullptr) require_tolerance(given.tolerance);
    for (uint64_t p = 0; p < problems; ++p) {
      if (epsilons != nullptr) require_epsilon(epsilons[p]);
      if (tolerances != nullptr) require_tolerance(tolerances[p]);
      if (iterations != nullptr && iterations[p] < 1) {
        throw Error(PH_ERROR_INVALID_ARGUMENT, "Problem %llu may make %d iterations: it must be at least 1",
                    static_cast<unsigned_long>(p), iterations[p]);
      }
    }
    if (own.own_options == nullptr && (epsilons != nullptr || tolerances != nullptr || iterations != nullptr))
      own.own_options = ph::allocate(opened, problems * (2 * sizeof(double) + sizeof(int32_t)));
    uint64_t place = 0;
    const auto place_of = [&](const void* values, uint64_t bytes) -> const uint8_t* {
      uint8_t* target = own.own_options == nullptr ? nullptr : own.own_options + place;
      place += bytes;
      if (values == nullptr) return nullptr;
      ph::upload(opened, target, values, bytes);
      return target;
    };
    const uint8_t* own_epsilons = place_of(epsilons, problems * sizeof(double));
    const uint8_t* own_tolerances = place_of(tolerances, problems * sizeof(double));
    const uint8_t* own_limits = place_of(iterations, problems * sizeof(int32_t));
    ph::ot::Problem& problem = own.problem;
    problem.cost_kind = given.cost_kind;
    problem.epsilons = reinterpret_cast<const double*>(own_epsilons);
    problem.tolerances = reinterpret_cast<const double*>(own_tolerances);
    problem.epsilon = given.epsilon;
    problem.tolerance = given.tolerance;
    problem.relative_epsilon = given.relative_epsilon == 1;
    problem.row_penalty = given.row_penalty;
    problem.column_penalty = given.column_penalty;
    own.iterations = {reinterpret_cast<const int32_t*>(own_limits), static_cast<int32_t>(given.iterations),
                      nullptr, given.relaxation, given.scaling};
    own.is_set = true;
  });
}

int32_t ph_ot_batch_bind(ph_device* device, ph_ot_batch* batch, const ph_buffer* cost, uint64_t cost_offset,
                         const ph_buffer* x, uint64_t x_offset, const ph_buffer* y, uint64_t y_offset,
                         const ph_buffer* a, uint64_t a_offset, const ph_buffer* b, uint64_t b_offset,
                         char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    checked(device);
    ph_ot_batch& own = present(batch);
    const Tensors tensors(own);
    ph::ot::Problem bound = own.problem;
    const bool points = own.options.dimension > 0;
    if (points ? cost != nullptr : x != nullptr || y != nullptr) {
      throw Error(PH_ERROR_INVALID_ARGUMENT, "The batch is of %s: bind no %s", points ? "points" : "costs",
                  points ? "costs" : "points");
    }
    bound.cost = points ? nullptr : tensors.needed(cost, cost_offset, tensors.entries(), "the costs");
    bound.x =
        points ? tensors.needed(x, x_offset, tensors.rows() * tensors.dimension(), "the points x") : nullptr;
    bound.y = points ? tensors.needed(y, y_offset, tensors.columns() * tensors.dimension(), "the points y")
                     : nullptr;
    bound.a = tensors.optional(a, a_offset, tensors.rows(), "the masses a");
    bound.b = tensors.optional(b, b_offset, tensors.columns(), "the masses b");
    own.problem = bound;
    own.is_bound = true;
  });
}

int32_t ph_ot_sinkhorn(ph_device* device, ph_ot_batch* batch, const ph_buffer* warm_g, uint64_t warm_g_offset,
                       ph_buffer* f, uint64_t f_offset, ph_buffer* g, uint64_t g_offset, ph_buffer* plan,
                       uint64_t plan_offset, ph_buffer* reports, uint64_t reports_offset, char* error,
                       uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph_device& opened = checked(device);
    ph_ot_batch& own = ready(batch);
    const Tensors tensors(own);
    if (own.options.streaming && plan != nullptr) {
      throw Error(
          PH_ERROR_INVALID_ARGUMENT,
          "A streaming batch does not write plans as it solves: multiply by them, or call ph_ot_plan");
    }
    ph::ot::Iterations iterations = own.iterations;
    iterations.warm_g = tensors.optional(warm_g, warm_g_offset, tensors.columns(), "the start of g");
    ph::ot::sinkhorn(
        opened, *own.workspace, own.problem, iterations,
        solution_of(tensors, f, f_offset, g, g_offset, plan, plan_offset, reports, reports_offset));
  });
}

int32_t ph_ot_exact(ph_device* device, ph_ot_batch* batch, const double* masses, ph_buffer* f,
                    uint64_t f_offset, ph_buffer* g, uint64_t g_offset, ph_buffer* plan, uint64_t plan_offset,
                    ph_buffer* reports, uint64_t reports_offset, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph_device& opened = checked(device);
    ph_ot_batch& own = ready(batch);
    const Tensors tensors(own);
    require_kept(own, "solve exactly");
    require_masses(masses, tensors.problems());
    ph::ot::exact(opened, *own.workspace, own.problem, masses,
                  solution_of(tensors, f, f_offset, g, g_offset, plan, plan_offset, reports, reports_offset));
  });
}

int32_t ph_ot_partial(ph_device* device, ph_ot_batch* batch, const double* masses, ph_buffer* f,
                      uint64_t f_offset, ph_buffer* g, uint64_t g_offset, ph_buffer* plan,
                      uint64_t plan_offset, ph_buffer* reports, uint64_t reports_offset, char* error,
                      uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph_device& opened = checked(device);
    ph_ot_batch& own = ready(batch);
    const Tensors tensors(own);
    require_kept(own, "transport a part of the mass");
    if (masses == nullptr) throw Error(PH_ERROR_INVALID_ARGUMENT, "The masses to transport are null");
    require_masses(masses, tensors.problems());
    ph::ot::partial(
        opened, *own.workspace, own.problem, own.iterations, masses,
        solution_of(tensors, f, f_offset, g, g_offset, plan, plan_offset, reports, reports_offset));
  });
}

int32_t ph_ot_proximal(ph_device* device, ph_ot_batch* batch, uint32_t inner, ph_buffer* f, uint64_t f_offset,
                       ph_buffer* g, uint64_t g_offset, ph_buffer* plan, uint64_t plan_offset,
                       ph_buffer* reports, uint64_t reports_offset, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph_device& opened = checked(device);
    ph_ot_batch& own = ready(batch);
    const Tensors tensors(own);
    require_kept(own, "take proximal points");
    if (inner == 0)
      throw Error(PH_ERROR_INVALID_ARGUMENT, "A proximal point takes at least 1 iteration: 0 are given");
    if (!std::isinf(own.problem.row_penalty) || !std::isinf(own.problem.column_penalty)) {
      throw Error(PH_ERROR_UNSUPPORTED,
                  "Cannot take proximal points of unbalanced transport: set the penalties to infinity");
    }
    ph::ot::proximal(
        opened, *own.workspace, own.problem, own.iterations, inner,
        solution_of(tensors, f, f_offset, g, g_offset, plan, plan_offset, reports, reports_offset));
  });
}

int32_t ph_ot_gromov(ph_device* device, ph_ot_batch* batch, const double* alphas, const ph_buffer* x,
                     uint64_t x_offset, const ph_buffer* y, uint64_t y_offset, const ph_buffer* cost,
                     uint64_t cost_offset, const ph_buffer* a, uint64_t a_offset, const ph_buffer* b,
                     uint64_t b_offset, ph_buffer* plan, uint64_t plan_offset, ph_buffer* reports,
                     uint64_t reports_offset, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph_device& opened = checked(device);
    ph_ot_batch& own = present(batch);
    if (!own.is_set)
      throw Error(PH_ERROR_INVALID_ARGUMENT, "The batch has no options: call ph_ot_batch_set first");
    if (own.options.dimension > 0) {
      throw Error(PH_ERROR_INVALID_ARGUMENT,
                  "Gromov-Wasserstein transport is of matrices: the batch is of points");
    }
    if (alphas == nullptr) throw Error(PH_ERROR_INVALID_ARGUMENT, "The alphas are null");
    const Tensors tensors(own);
    const ph::ot::Shape shape = own.shape();
    uint64_t x_entries = 0, y_entries = 0;
    for (uint32_t p = 0; p < shape.problems; ++p) {
      if (!(alphas[p] >= 0.0 && alphas[p] <= 1.0)) {
        throw Error(PH_ERROR_INVALID_ARGUMENT, "alpha of problem %u must be from 0 to 1: it is %g", p,
                    alphas[p]);
      }
      if (cost == nullptr && alphas[p] < 1.0) {
        throw Error(PH_ERROR_INVALID_ARGUMENT,
                    "alpha of problem %u is %g, which needs costs: bind some, or set it to 1", p, alphas[p]);
      }
      const uint64_t n = static_cast<uint64_t>(shape.rows(p)), m = static_cast<uint64_t>(shape.columns(p));
      x_entries += n * n;
      y_entries += m * m;
      if (x_entries > INT64_MAX / 16 || y_entries > INT64_MAX / 16)
        throw Error(PH_ERROR_INVALID_ARGUMENT, "There are too many distances from problem %u on", p);
    }
    ph::ot::Problem problem = own.problem;
    problem.cost = tensors.optional(cost, cost_offset, tensors.entries(), "the costs");
    problem.a = tensors.optional(a, a_offset, tensors.rows(), "the masses a");
    problem.b = tensors.optional(b, b_offset, tensors.columns(), "the masses b");
    problem.row_penalty = problem.column_penalty = INFINITY;
    ph::ot::gromov(
        opened, *own.workspace, problem, own.iterations,
        {tensors.needed(x, x_offset, x_entries, "the distances x"),
         tensors.needed(y, y_offset, y_entries, "the distances y"), alphas,
         tensors.optional(plan, plan_offset, tensors.entries(), "the plan"),
         reinterpret_cast<ph_ot_gromov_report*>(checked_tensor(
             reports, reports_offset, tensors.problems() * sizeof(ph_ot_gromov_report), "the reports"))});
  });
}

int32_t ph_ot_plan(ph_device* device, ph_ot_batch* batch, const ph_buffer* f, uint64_t f_offset,
                   const ph_buffer* g, uint64_t g_offset, const ph_buffer* reports, uint64_t reports_offset,
                   ph_buffer* plan, uint64_t plan_offset, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph_device& opened = checked(device);
    ph_ot_batch& own = ready(batch);
    const Tensors tensors(own);
    ph::ot::write_plan(opened, *own.workspace, own.problem,
                       potentials_of(tensors, f, f_offset, g, g_offset, nullptr, 0, reports, reports_offset),
                       tensors.needed(plan, plan_offset, tensors.entries(), "the plan"));
  });
}

int32_t ph_ot_plan_product(ph_device* device, ph_ot_batch* batch, const ph_buffer* f, uint64_t f_offset,
                           const ph_buffer* g, uint64_t g_offset, const ph_buffer* plan, uint64_t plan_offset,
                           const ph_buffer* reports, uint64_t reports_offset, const ph_buffer* matrix,
                           uint64_t matrix_offset, ph_buffer* out, uint64_t out_offset, uint32_t width,
                           uint32_t transposed, uint32_t normalised, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph_device& opened = checked(device);
    ph_ot_batch& own = ready(batch);
    const Tensors tensors(own);
    require_flag(transposed, "transposed");
    require_flag(normalised, "normalised");
    if (width == 0) throw Error(PH_ERROR_INVALID_ARGUMENT, "The matrix must have at least one column");
    const uint64_t in = transposed == 1 ? tensors.rows() : tensors.columns(),
                   outs = transposed == 1 ? tensors.columns() : tensors.rows();
    ph::ot::plan_product(
        opened, *own.workspace, own.problem,
        potentials_of(tensors, f, f_offset, g, g_offset, plan, plan_offset, reports, reports_offset),
        {tensors.needed(matrix, matrix_offset, in * width, "the matrix"),
         tensors.needed(out, out_offset, outs * width, "the product"), width, transposed == 1,
         normalised == 1});
  });
}

int32_t ph_ot_backward(ph_device* device, ph_ot_batch* batch, uint32_t mode, const ph_buffer* f,
                       uint64_t f_offset, const ph_buffer* g, uint64_t g_offset, const ph_buffer* plan,
                       uint64_t plan_offset, const ph_buffer* reports, uint64_t reports_offset,
                       const ph_buffer* warm_g, uint64_t warm_g_offset, const ph_buffer* d_plan,
                       uint64_t d_plan_offset, const ph_buffer* d_f, uint64_t d_f_offset,
                       const ph_buffer* d_g, uint64_t d_g_offset, const ph_buffer* d_cost,
                       uint64_t d_cost_offset, const ph_buffer* d_value, uint64_t d_value_offset,
                       ph_buffer* grad_cost, uint64_t grad_cost_offset, ph_buffer* grad_x,
                       uint64_t grad_x_offset, ph_buffer* grad_y, uint64_t grad_y_offset, ph_buffer* grad_a,
                       uint64_t grad_a_offset, ph_buffer* grad_b, uint64_t grad_b_offset, char* error,
                       uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    ph_device& opened = checked(device);
    ph_ot_batch& own = ready(batch);
    const Tensors tensors(own);
    const uint64_t rows = tensors.rows(), columns = tensors.columns(), entries = tensors.entries(),
                   dimension = tensors.dimension();
    if (!own.options.backward)
      throw Error(PH_ERROR_INVALID_ARGUMENT, "The batch was not created for gradients: set `backward`");
    if (mode > PH_OT_DETACHED)
      throw Error(PH_ERROR_INVALID_ARGUMENT, "There is no mode of gradients %u", mode);
    if (mode == PH_OT_ENVELOPE && (d_plan != nullptr || d_f != nullptr || d_g != nullptr)) {
      throw Error(PH_ERROR_INVALID_ARGUMENT,
                  "The envelope theorem says nothing of losses of the plan or the potentials: take implicit "
                  "gradients");
    }
    if (own.options.streaming) {
      if (d_plan != nullptr || grad_cost != nullptr) {
        throw Error(PH_ERROR_INVALID_ARGUMENT,
                    "A streaming batch has no gradients of its %s, which would be as large as the plan",
                    d_plan != nullptr ? "plan" : "costs");
      }
      if (mode == PH_OT_UNROLLED) {
        throw Error(PH_ERROR_UNSUPPORTED,
                    "Cannot unroll the iterations of a streaming batch: take implicit gradients");
      }
    }
    if (dimension == 0 && (grad_x != nullptr || grad_y != nullptr))
      throw Error(PH_ERROR_INVALID_ARGUMENT, "The batch is of costs: it has no points");
    ph::ot::Iterations iterations = own.iterations;
    iterations.warm_g = tensors.optional(warm_g, warm_g_offset, columns, "the start of g");
    const ph::ot::Backward call = {
        mode,
        tensors.optional(d_plan, d_plan_offset, entries, "the gradient of the plan"),
        tensors.optional(d_f, d_f_offset, rows, "the gradient of f"),
        tensors.optional(d_g, d_g_offset, columns, "the gradient of g"),
        tensors.optional(d_cost, d_cost_offset, tensors.problems(), "the gradient of <T, C>"),
        tensors.optional(d_value, d_value_offset, tensors.problems(), "the gradient of the value"),
        tensors.optional(grad_cost, grad_cost_offset, entries, "the costs' gradient"),
        tensors.optional(grad_x, grad_x_offset, rows * dimension, "the gradient of x"),
        tensors.optional(grad_y, grad_y_offset, columns * dimension, "the gradient of y"),
        tensors.optional(grad_a, grad_a_offset, rows, "the gradient of a"),
        tensors.optional(grad_b, grad_b_offset, columns, "the gradient of b")};
    ph::ot::backward(
        opened, *own.workspace, own.problem,
        potentials_of(tensors, f, f_offset, g, g_offset, plan, plan_offset, reports, reports_offset),
        iterations, call);
  });
}

}  // extern "C"
