// How rows of f32, f16 and bf16 become vectors, their ends included. Like vector_cpu.h, for sources that are compiled once
// per instruction set.
#pragma once

#include "common/vector_cpu.h"
#include "llm/operations.h"

namespace ph::llm::PH_INSTRUCTION_SET {

using ph::PH_INSTRUCTION_SET::BF16;
using ph::PH_INSTRUCTION_SET::F16;
using ph::PH_INSTRUCTION_SET::Floats;
using ph::PH_INSTRUCTION_SET::kVectorLanes;

struct F32 {
  static Floats read(const uint8_t* source) { return ph::PH_INSTRUCTION_SET::load<Floats>(source); }
  static void write(uint8_t* target, Floats x) { ph::PH_INSTRUCTION_SET::store(target, x); }
};

template <typename Element>
constexpr uint64_t kBytes = std::is_same_v<Element, F32> ? 4 : 2;

// The first `count` elements, fewer than a vector's; the other lanes are zero.
template <typename Element>
inline Floats read_end(const uint8_t* source, uint32_t count) {
  uint8_t bytes[kVectorLanes * kBytes<Element>] = {};
  memcpy(bytes, source, count * kBytes<Element>);
  return Element::read(bytes);
}
template <typename Element>
inline void write_end(uint8_t* target, Floats x, uint32_t count) {
  uint8_t bytes[kVectorLanes * kBytes<Element>];
  Element::write(bytes, x);
  memcpy(target, bytes, count * kBytes<Element>);
}

// Element i and those after it, as far as there are any.
template <typename Element>
inline Floats read_at(const uint8_t* row, uint64_t i, uint64_t count) {
  const uint8_t* source = row + i * kBytes<Element>;
  return count - i >= kVectorLanes ? Element::read(source)
                                   : read_end<Element>(source, static_cast<uint32_t>(count - i));
}
template <typename Element>
inline void write_at(uint8_t* row, uint64_t i, uint64_t count, Floats x) {
  uint8_t* target = row + i * kBytes<Element>;
  if (count - i >= kVectorLanes) Element::write(target, x);
  else write_end<Element>(target, x, static_cast<uint32_t>(count - i));
}

// Calls `run` with the type that reads and writes `dtype`.
template <typename Run>
inline auto with_float(uint32_t dtype, Run run) {
  if (dtype == PH_F32) return run(F32{});
  return dtype == PH_F16 ? run(F16{}) : run(BF16{});
}

}  // namespace ph::llm::PH_INSTRUCTION_SET

#define PH_STRING_OF(name) #name
#define PH_STRING(name) PH_STRING_OF(name)
