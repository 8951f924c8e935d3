// What a language model computes beside attention; both backends implement it. Formulas are in packhorse.h, section
// "llm"; arguments are valid, and tensors 16-byte aligned.
#pragma once

#include "device/device.h"

namespace ph::llm {

// Tensors of PH_F32, PH_F16 or PH_BF16.
struct Source {
  const uint8_t* data;
  uint32_t dtype;
};
struct Target {
  uint8_t* data;
  uint32_t dtype;
};

constexpr uint32_t kMostRotaryDim = 1024;

inline uint64_t element_bytes(uint32_t dtype) { return dtype == PH_F32 ? 4 : 2; }

// x: [rows, in_features]; weight: [out_features, in_features]; bias.data: null or [out_features]; out: [rows, out_features].
struct Linear {
  Source x, weight, bias;
  Target out;
  uint32_t rows, in_features, out_features;
  bool accumulate;
};
void linear(ph_device& device, const Linear& call);
// Loads what linear may need, and writes its name.
void prepare_linear(ph_device& device, char* name, uint32_t name_bytes);

// x: [x_rows, width]; indices: [rows]; out: [rows, width].
struct Gather {
  Source x;
  const int32_t* indices;
  Target out;
  uint32_t x_rows, rows, width;
};
void gather(ph_device& device, const Gather& call);

// x, out: [rows, groups, width]; weight: [width].
struct RmsNorm {
  Source x, weight;
  Target out;
  uint32_t x_stride, out_stride, rows, groups, width;
  float epsilon;
};
void rms_norm(ph_device& device, const RmsNorm& call);

// x, out: [rows, heads, head_dim]; positions: [rows]; frequencies: [rotary_dim / 2].
struct Rope {
  Source x;
  const int32_t* positions;
  const float* frequencies;
  Target out;
  uint32_t x_stride, out_stride, rows, heads, head_dim, rotary_dim;
  float scale;
};
void rope(ph_device& device, const Rope& call);

// gate, up, out: [rows, width].
struct Swiglu {
  Source gate, up;
  Target out;
  uint32_t stride, rows, width;
};
void swiglu(ph_device& device, const Swiglu& call);

// x, out: [rows, width].
struct Cast {
  Source x;
  Target out;
  uint32_t x_stride, rows, width;
};
void cast(ph_device& device, const Cast& call);

void add(ph_device& device, Target x, Source y, uint64_t count);

void advance(ph_device& device, int32_t* counters, uint32_t count, int32_t by);

// logits: [rows, vocabulary]; out: [rows].
void argmax(ph_device& device, Source logits, int32_t* out, uint32_t rows, uint32_t vocabulary);

// logits: [rows, vocabulary]; samplers, out: [rows]; seen: null or [rows, vocabulary]; scratch: [rows, vocabulary].
struct Sample {
  Source logits;
  ph_llm_sampler* samplers;
  uint8_t* seen;
  float* scratch;
  int32_t* out;
  uint32_t rows, vocabulary;
};
void sample(ph_device& device, const Sample& call);

// tokens: [count]; seen: [vocabulary].
void mark(ph_device& device, const int32_t* tokens, uint32_t count, uint8_t* seen, uint32_t vocabulary);

// logits: [rows, vocabulary]; targets, out: [rows].
void cross_entropy(ph_device& device, Source logits, const int32_t* targets, float* out, uint32_t rows,
                   uint32_t vocabulary);

// reference, logits: [rows, vocabulary]; out: [rows, 2].
void divergence(ph_device& device, Source reference, Source logits, float* out, uint32_t rows,
                uint32_t vocabulary);

}  // namespace ph::llm
