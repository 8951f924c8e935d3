// Capture and replay of steps: the host's side of step_graph.h.
#include "kv/step_graph.h"

#include <atomic>

#include "common/error.h"
#include "kv/growing_cache.h"

namespace ph::kv {

void require_same_shape(const StepView& captured, const StepView& step) {
  for (const ShapeField& field : kStepShape) {
    if (captured.*field.value == step.*field.value) continue;
    throw Error(PH_ERROR_INVALID_ARGUMENT,
                "Cannot replay as the step differs in its %s: it has %u, the captured one had %u; capture "
                "a graph for every shape",
                field.name, step.*field.value, captured.*field.value);
  }
}

}  // namespace ph::kv

using namespace ph;
using namespace ph::kv;

uint64_t ph_kv_cache::next_serial() {
  static std::atomic<uint64_t> next{0};
  return next++;
}

std::array<uint32_t, PH_KV_CACHE_SHAPE_WORDS> ph_kv_cache::step_shape() const {
  require_step("tell the shape");
  std::array<uint32_t, PH_KV_CACHE_SHAPE_WORDS> shape;
  for (size_t i = 0; i < shape.size(); ++i) shape[i] = step_.*kStepShape[i].value;
  return shape;
}

void ph_kv_cache::require_step(const char* what) const {
  if (planned_) return;
  throw Error(PH_ERROR_INVALID_ARGUMENT,
              "Cannot %s before a step begins; truncating or removing a sequence ends it", what);
}

void ph_kv_cache::begin_capture() {
  require_step("capture");
  ph::kv::Capture capture{appended_, std::vector<bool>(config_.layers, false)};
  ph::begin_capture(device_);
  capture_ = std::move(capture);
}

ph_kv_cache_graph* ph_kv_cache::end_capture() {
  if (!capture_)
    throw Error(PH_ERROR_INVALID_ARGUMENT, "Cannot end a capture of this kv cache: none has begun");
  // Nothing has run: the layers are as they were.
  const Capture capture = *std::move(capture_);
  std::vector<bool> appended = std::move(appended_);
  capture_.reset();
  appended_ = capture.before;
  std::unique_ptr<Graph> work = ph::end_capture(device_);
  for (uint32_t layer = 0; layer < config_.layers; ++layer)
    appended[layer] = appended[layer] && !capture.before[layer];
  return new ph_kv_cache_graph{std::move(work), serial_, step_, std::move(appended), capture.attended};
}

void ph_kv_cache::replay(ph_kv_cache_graph& graph) {
  if (graph.cache != serial_)
    throw Error(PH_ERROR_INVALID_ARGUMENT, "Cannot replay a step that was captured from another kv cache");
  require_step("replay");
  require_same_shape(graph.step, step_);
  for (uint32_t layer = 0; layer < config_.layers; ++layer) {
    if (graph.appended[layer] && appended_[layer]) {
      throw Error(PH_ERROR_INVALID_ARGUMENT,
                  "Cannot replay: layer %u has the tokens of this step already; begin the next one", layer);
    }
    if (graph.attended[layer] && !graph.appended[layer] && !appended_[layer]) {
      throw Error(
          PH_ERROR_INVALID_ARGUMENT,
          "Cannot replay: layer %u lacks the tokens of this step, and the captured work attends to it "
          "without appending them",
          layer);
    }
  }
  launch(device_, *graph.work);
  for (uint32_t layer = 0; layer < config_.layers; ++layer)
    if (graph.appended[layer]) appended_[layer] = true;
}

ph_kv_cache::~ph_kv_cache() {
  if (!capture_) return;
  try {
    ph::end_capture(device_);
  } catch (const std::exception&) {
    // The device runs its work again; of the captured work nothing is wanted.
  }
}
