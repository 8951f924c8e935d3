// The operations of operations.h where they do not exist yet: on CUDA.
#include "common/error.h"
#include "graph/operations.h"

namespace ph::graph {

namespace {

[[noreturn]] void unsupported() {
  throw Error(PH_ERROR_UNSUPPORTED,
              "Cannot learn on graphs on a GPU yet: open the device of the backend cpu");
}

}  // namespace

void multiply(ph_device&, const Multiply&) { unsupported(); }
void aggregate(ph_device&, const Aggregate&) { unsupported(); }
void edge_dot(ph_device&, const EdgeDot&) { unsupported(); }
void segment_max(ph_device&, const SegmentMax&) { unsupported(); }
void segment_max_backward(ph_device&, const SegmentMaxBackward&) { unsupported(); }
void segment_softmax(ph_device&, const SegmentSoftmax&) { unsupported(); }
void segment_softmax_backward(ph_device&, const SegmentSoftmaxBackward&) { unsupported(); }
void head_dot(ph_device&, const HeadDot&) { unsupported(); }
void head_dot_backward(ph_device&, const HeadDotBackward&) { unsupported(); }
void activate(ph_device&, const Activate&) { unsupported(); }
void activate_backward(ph_device&, const ActivateBackward&) { unsupported(); }
void combine(ph_device&, const Combine&) { unsupported(); }
void product(ph_device&, const Product&) { unsupported(); }
void copy_columns(ph_device&, const CopyColumns&) { unsupported(); }
void column_sum(ph_device&, const ColumnSum&) { unsupported(); }
void batch_norm(ph_device&, const BatchNorm&) { unsupported(); }
void batch_norm_backward(ph_device&, const NormBackward&) { unsupported(); }
void layer_norm(ph_device&, const LayerNorm&) { unsupported(); }
void layer_norm_backward(ph_device&, const NormBackward&) { unsupported(); }
void dropout(ph_device&, const Dropout&) { unsupported(); }
void cross_entropy(ph_device&, const CrossEntropy&) { unsupported(); }
void cross_entropy_backward(ph_device&, const CrossEntropyBackward&) { unsupported(); }
void squared_norm(ph_device&, const float*, float*, uint64_t) { unsupported(); }
void adam(ph_device&, const Adam&) { unsupported(); }

}  // namespace ph::graph
