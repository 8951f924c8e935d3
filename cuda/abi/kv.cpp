// extern "C": the kv codec. Validates, finds the memory, and hands over to the backend.
#include "abi/arguments.h"
#include "kv/operations.h"

using ph::checked;
using ph::checked_range;
using ph::checked_tensor;
using ph::Error;
using ph::guard;
using namespace ph::kv;

namespace {

Codec checked_codec(const ph_kv_codec* codec) {
  if (codec == nullptr) throw Error(PH_ERROR_INVALID_ARGUMENT, "The codec is null");
  return make_codec(*codec);
}

uint32_t checked_part(uint32_t part) {
  if (part >= kParts)
    throw Error(PH_ERROR_INVALID_ARGUMENT, "The part must be keys (0) or values (1): current value is %u",
                part);
  return part;
}

uint64_t tensor_bytes(const Codec& codec) { return codec.channels * codec.tokens * codec.element_bytes; }
uint64_t codes_bytes(const Codec& codec) { return codec.blocks * kBlockTokens * codec.channels; }

template <typename T>
T* typed(const ph_buffer* buffer, uint64_t count, const char* what) {
  return reinterpret_cast<T*>(checked_range(buffer, 0, count * sizeof(T), what));
}

QuantizedOutput checked_quantized(const Codec& codec, uint32_t part, const ph_buffer* codes,
                                  const ph_buffer* scales, const ph_buffer* zeros) {
  const uint64_t groups = codec.blocks * codec.groups[part];
  return {typed<uint8_t>(codes, codes_bytes(codec), "codes"), typed<float>(scales, groups, "scales"),
          typed<int32_t>(zeros, groups, "zero points")};
}

QuantizedInput input(const QuantizedOutput& part) { return {part.codes, part.scales, part.zeros}; }

Status* checked_status(const ph_buffer* status) { return typed<Status>(status, 1, "the status"); }

Records checked_records(const Codec& codec, const ph_buffer* records, uint64_t bytes,
                        const ph_buffer* offsets) {
  return {checked_range(records, 0, bytes, "records"), bytes,
          typed<uint64_t>(offsets, codec.blocks + 1, "offsets")};
}

uint8_t* checked_capacity(const Codec& codec, const ph_buffer* records) {
  return checked_range(records, 0, codec.blocks * record_capacity(codec), "records");
}

uint8_t* checked_workspace(const Codec& codec, const ph_buffer* workspace) {
  const uint64_t bytes = workspace_bytes(codec);
  return bytes == 0 ? nullptr : checked_range(workspace, 0, bytes, "the workspace");
}

// A size of a codec, or UINT64_MAX for an invalid one.
template <typename Size>
uint64_t size_of(const ph_kv_codec* codec, Size size) noexcept {
  uint64_t bytes = UINT64_MAX;
  guard(nullptr, 0, [&] { bytes = size(checked_codec(codec)); });
  return bytes;
}

}  // namespace

extern "C" {

uint64_t ph_kv_records_capacity(const ph_kv_codec* codec) {
  return size_of(codec, [](const Codec& valid) { return valid.blocks * record_capacity(valid); });
}

uint64_t ph_kv_workspace_bytes(const ph_kv_codec* codec) {
  return size_of(codec, [](const Codec& valid) { return workspace_bytes(valid); });
}

uint64_t ph_kv_groups(const ph_kv_codec* codec, uint32_t part) {
  return size_of(codec, [&](const Codec& valid) -> uint64_t { return valid.groups[checked_part(part)]; });
}

int32_t ph_kv_quantize(ph_device* device, const ph_kv_codec* codec, uint32_t part, const ph_buffer* x,
                       uint64_t x_offset, ph_buffer* codes, ph_buffer* scales, ph_buffer* zeros,
                       ph_buffer* status, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    const Codec valid = checked_codec(codec);
    quantize(checked(device), valid, checked_part(part),
             checked_tensor(x, x_offset, tensor_bytes(valid), "x"),
             checked_quantized(valid, part, codes, scales, zeros), checked_status(status));
  });
}

int32_t ph_kv_repack(ph_device* device, const ph_kv_codec* codec, const ph_buffer* key_codes,
                     const ph_buffer* value_codes, ph_buffer* order, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    const Codec valid = checked_codec(codec);
    repack(checked(device), valid, typed<uint8_t>(key_codes, codes_bytes(valid), "key codes"),
           typed<uint8_t>(value_codes, codes_bytes(valid), "value codes"),
           typed<uint8_t>(order, valid.blocks * kBlockTokens, "the order"));
  });
}

int32_t ph_kv_pack(ph_device* device, const ph_kv_codec* codec, const ph_buffer* key_codes,
                   const ph_buffer* key_scales, const ph_buffer* key_zeros, const ph_buffer* value_codes,
                   const ph_buffer* value_scales, const ph_buffer* value_zeros, const ph_buffer* order,
                   ph_buffer* records, ph_buffer* offsets, ph_buffer* workspace, ph_buffer* status,
                   char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    const Codec valid = checked_codec(codec);
    const QuantizedInput parts[kParts] = {
        input(checked_quantized(valid, PH_KV_KEYS, key_codes, key_scales, key_zeros)),
        input(checked_quantized(valid, PH_KV_VALUES, value_codes, value_scales, value_zeros))};
    pack(checked(device), valid, parts, typed<uint8_t>(order, valid.blocks * kBlockTokens, "the order"),
         checked_capacity(valid, records), typed<uint64_t>(offsets, valid.blocks + 1, "offsets"),
         checked_workspace(valid, workspace), checked_status(status));
  });
}

int32_t ph_kv_encode(ph_device* device, const ph_kv_codec* codec, const ph_buffer* keys, uint64_t keys_offset,
                     const ph_buffer* values, uint64_t values_offset, ph_buffer* records, ph_buffer* offsets,
                     ph_buffer* workspace, ph_buffer* status, char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    const Codec valid = checked_codec(codec);
    const void* const tensors[kParts] = {
        checked_tensor(keys, keys_offset, tensor_bytes(valid), "keys"),
        checked_tensor(values, values_offset, tensor_bytes(valid), "values")};
    encode(checked(device), valid, tensors, checked_capacity(valid, records),
           typed<uint64_t>(offsets, valid.blocks + 1, "offsets"), checked_workspace(valid, workspace),
           checked_status(status));
  });
}

int32_t ph_kv_unpack(ph_device* device, const ph_kv_codec* codec, const ph_buffer* records,
                     uint64_t records_bytes, const ph_buffer* offsets, ph_buffer* key_codes,
                     ph_buffer* key_scales, ph_buffer* key_zeros, ph_buffer* value_codes,
                     ph_buffer* value_scales, ph_buffer* value_zeros, ph_buffer* order, ph_buffer* status,
                     char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    const Codec valid = checked_codec(codec);
    const QuantizedOutput parts[kParts] = {
        checked_quantized(valid, PH_KV_KEYS, key_codes, key_scales, key_zeros),
        checked_quantized(valid, PH_KV_VALUES, value_codes, value_scales, value_zeros)};
    unpack(checked(device), valid, checked_records(valid, records, records_bytes, offsets), parts,
           typed<uint8_t>(order, valid.blocks * kBlockTokens, "the order"), checked_status(status));
  });
}

int32_t ph_kv_dequantize(ph_device* device, const ph_kv_codec* codec, uint32_t part, const ph_buffer* codes,
                         const ph_buffer* scales, const ph_buffer* zeros, ph_buffer* x, uint64_t x_offset,
                         char* error, uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    const Codec valid = checked_codec(codec);
    dequantize(checked(device), valid, checked_part(part),
               input(checked_quantized(valid, part, codes, scales, zeros)),
               checked_tensor(x, x_offset, tensor_bytes(valid), "x"));
  });
}

int32_t ph_kv_decode(ph_device* device, const ph_kv_codec* codec, const ph_buffer* records,
                     uint64_t records_bytes, const ph_buffer* offsets, ph_buffer* keys, uint64_t keys_offset,
                     ph_buffer* values, uint64_t values_offset, ph_buffer* status, char* error,
                     uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    const Codec valid = checked_codec(codec);
    void* const tensors[kParts] = {checked_tensor(keys, keys_offset, tensor_bytes(valid), "keys"),
                                   checked_tensor(values, values_offset, tensor_bytes(valid), "values")};
    decode(checked(device), valid, checked_records(valid, records, records_bytes, offsets), tensors,
           checked_status(status));
  });
}

int32_t ph_kv_measure(ph_device* device, const ph_kv_codec* codec, const ph_buffer* records,
                      uint64_t records_bytes, const ph_buffer* offsets, const ph_buffer* keys,
                      uint64_t keys_offset, const ph_buffer* values, uint64_t values_offset,
                      ph_buffer* statistics, ph_buffer* workspace, ph_buffer* status, char* error,
                      uint32_t error_bytes) {
  return guard(error, error_bytes, [&] {
    const Codec valid = checked_codec(codec);
    if ((keys == nullptr) != (values == nullptr)) {
      throw Error(PH_ERROR_INVALID_ARGUMENT,
                  "Cannot measure errors of keys or values alone: give both or neither");
    }
    const void* tensors[kParts] = {nullptr, nullptr};
    if (keys != nullptr) {
      tensors[PH_KV_KEYS] = checked_tensor(keys, keys_offset, tensor_bytes(valid), "keys");
      tensors[PH_KV_VALUES] = checked_tensor(values, values_offset, tensor_bytes(valid), "values");
    }
    measure(checked(device), valid, checked_records(valid, records, records_bytes, offsets), tensors,
            typed<ph_kv_statistics>(statistics, 1, "statistics"), checked_workspace(valid, workspace),
            checked_status(status));
  });
}

}  // extern "C"
