// A captured step of a kv cache. What its kernels are launched with depends on the step only through the fields below and
// through the places of its lists in the plan, which follow from them; the plan itself is uploaded when a step begins,
// always to the same memory. So captured work does what any later step asks for in which these fields are the same.
#pragma once

#include <memory>
#include <vector>

#include "device/device.h"
#include "kv/cache.h"

namespace ph::kv {

struct ShapeField {
  const char* name;
  uint32_t StepView::*value;
};

constexpr ShapeField kStepShape[] = {
    {"sequences", &StepView::sequence_count},
    {"tokens", &StepView::tokens},
    {"blocks to pack", &StepView::block_count},
    {"pieces of attention", &StepView::piece_count},
    {"most tokens of a sequence", &StepView::most_queries},
    {"most pieces of a sequence", &StepView::most_pieces},
};
static_assert(sizeof kStepShape / sizeof kStepShape[0] == PH_KV_CACHE_SHAPE_WORDS);
static_assert(sizeof(StepView) == 3 * sizeof(void*) + sizeof(uint32_t) * PH_KV_CACHE_SHAPE_WORDS,
              "whatever else a launch depends on belongs to the shape of a step");

// Throws if a step differs in shape from the one that was captured.
void require_same_shape(const StepView& captured, const StepView& step);

// The layers of a cache's capture.
struct Capture {
  std::vector<bool> before;    // had the step's tokens when the capture began
  std::vector<bool> attended;  // are attended to
};

}  // namespace ph::kv

struct ph_kv_cache_graph {
  std::unique_ptr<ph::Graph> work;
  uint64_t cache;  // its serial number
  ph::kv::StepView step;
  std::vector<bool> appended, attended;  // layers
};
