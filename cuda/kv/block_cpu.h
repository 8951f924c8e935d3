// The codec's work on one block, on one CPU core. block_cpu.cpp is compiled once per instruction set, and
// every compilation fills a table like this one; the results are the same to the bit.
#pragma once

#include "kv/operations.h"

namespace ph::kv {

struct BlockKernels {
  const char* instruction_set;

  // Quantises a part of block `block` of the tensor `x` into codes [64, channels], scales and zeros [groups].
  // Returns kNothing or the non_finite_place of its first non-finite group.
  uint64_t (*quantize)(const Codec& codec, uint32_t part, const void* x, uint64_t block, uint8_t* codes,
                       float* scales, int32_t* zeros);

  // Inverse, into the tensor.
  void (*dequantize)(const Codec& codec, uint32_t part, const uint8_t* codes, const float* scales,
                     const int32_t* zeros, uint64_t block, void* x);

  // Chooses the order of the block's tokens by codec.repack.
  void (*repack)(const Codec& codec, const uint8_t* key_codes, const uint8_t* value_codes, uint8_t* order);

  // Writes the record of a block at `record` (record_capacity bytes plus 8 of slack) and returns its size.
  uint32_t (*pack)(const Codec& codec, const uint8_t* const codes[kParts], const float* const scales[kParts],
                   const int32_t* const zeros[kParts], const uint8_t* order, uint8_t* record);

  // Reads a part of a packed record; false if its payloads do not fit it.
  bool (*unpack)(const Codec& codec, uint32_t part, const RecordView& view, uint8_t* codes, float* scales,
                 int32_t* zeros);

  // Adds what one part of a block shows to `statistics`: widths and codes, and the errors against `x` unless
  // it is null. Takes what unpack gave.
  void (*measure)(const Codec& codec, uint32_t part, const RecordView& view, const uint8_t* codes,
                  const float* scales, const int32_t* zeros, uint64_t block, const void* x,
                  ph_kv_statistics& statistics);
};

// The fastest table that this processor runs, or the one that PACKHORSE_INSTRUCTION_SET names.
const BlockKernels& block_kernels();

}  // namespace ph::kv
