// The kv operations that each backend implements under the C ABI; packhorse.h has the maths and the layout.
// Pointers are device memory, sized by the ABI layer. Work is enqueued.
#pragma once

#include "device/device.h"
#include "kv/record.h"

namespace ph::kv {

constexpr uint64_t kNothing = ~0ull;

// What encode, unpack and the like leave in the caller's status buffer.
struct Status {
  uint64_t first;  // non_finite_place or malformed block; kNothing if there is none
  uint64_t bytes;  // of all records, where they are written
};
static_assert(sizeof(Status) == 16);

template <typename Codes, typename Scales, typename Zeros>
struct QuantizedPart {
  Codes* codes;
  Scales* scales;
  Zeros* zeros;
};
using QuantizedInput = QuantizedPart<const uint8_t, const float, const int32_t>;
using QuantizedOutput = QuantizedPart<uint8_t, float, int32_t>;

struct Records {
  const uint8_t* bytes;
  uint64_t size;
  const uint64_t* offsets;
};

// Bytes of scratch memory that encode, pack and measure need.
uint64_t workspace_bytes(const Codec& codec);

void quantize(ph_device& device, const Codec& codec, uint32_t part, const void* x, QuantizedOutput output,
              Status* status);
void repack(ph_device& device, const Codec& codec, const uint8_t* key_codes, const uint8_t* value_codes,
            uint8_t* order);
void pack(ph_device& device, const Codec& codec, const QuantizedInput parts[kParts], const uint8_t* order,
          uint8_t* records, uint64_t* offsets, uint8_t* workspace, Status* status);
void encode(ph_device& device, const Codec& codec, const void* const tensors[kParts], uint8_t* records,
            uint64_t* offsets, uint8_t* workspace, Status* status);
void unpack(ph_device& device, const Codec& codec, Records records, const QuantizedOutput parts[kParts],
            uint8_t* order, Status* status);
void dequantize(ph_device& device, const Codec& codec, uint32_t part, QuantizedInput input, void* x);
void decode(ph_device& device, const Codec& codec, Records records, void* const tensors[kParts],
            Status* status);
// Without originals both tensors are null.
void measure(ph_device& device, const Codec& codec, Records records, const void* const tensors[kParts],
             ph_kv_statistics* statistics, uint8_t* workspace, Status* status);

// ---- CUDA alone ----

// The part of workspace_bytes that measure needs.
uint64_t measure_workspace_bytes(const Codec& codec);
// Throws if the codec's repacking needs more shared memory than a thread block has.
void check_repack(const ph_device& device, const Codec& codec);

}  // namespace ph::kv
