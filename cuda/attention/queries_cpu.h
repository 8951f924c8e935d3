// Queries and outputs of attention, of the cache's 16-bit type or f32. Like vector_cpu.h, for sources that are compiled
// once per instruction set.
#pragma once

#include "common/vector_cpu.h"
#include "kv/cache.h"

namespace ph::attention::PH_INSTRUCTION_SET {

// Elements from `index` on; Element reads and writes the cache's type.
template <typename Element>
inline ph::PH_INSTRUCTION_SET::Floats read_queries(const kv::CacheView& cache, const uint8_t* queries,
                                                   uint64_t index) {
  if (cache.query_dtype == PH_F32)
    return ph::PH_INSTRUCTION_SET::load<ph::PH_INSTRUCTION_SET::Floats>(queries + index * 4);
  return Element::read(queries + index * 2);
}
template <typename Element>
inline void write_output(const kv::CacheView& cache, uint8_t* out, uint64_t index,
                         ph::PH_INSTRUCTION_SET::Floats x) {
  if (cache.query_dtype == PH_F32) ph::PH_INSTRUCTION_SET::store(out + index * 4, x);
  else Element::write(out + index * 2, x);
}

}  // namespace ph::attention::PH_INSTRUCTION_SET
