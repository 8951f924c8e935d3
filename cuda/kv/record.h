// The record of a packed block ("packs" layout of packhorse.h): where its sections lie, and the checks that
// make an untrusted record safe to read.
#pragma once

#include "kv/codec.h"

namespace ph::kv {

constexpr uint32_t kRecordHeaderBytes = 16;
constexpr uint32_t kOrderBytes = 48;
constexpr uint32_t kMaximumWidth = 8;

struct RecordHeader {
  uint32_t bytes;
  uint8_t kind;
  uint8_t ordered;
  uint16_t reserved0;
  uint32_t keys;
  uint32_t reserved1;
};
static_assert(sizeof(RecordHeader) == kRecordHeaderBytes);

enum RecordKind : uint8_t { kPacked = 0, kRaw = 1 };

struct PartHeader {
  uint8_t minimum_bits;
  uint8_t width_bits;
  uint8_t zero_bytes;
  uint8_t reserved;
};
static_assert(sizeof(PartHeader) == 4);

// Offsets in bytes from the start of a part; `payloads` is where the payloads start.
struct PartLayout {
  uint32_t heads;  // table of payload offsets
  uint32_t scales;
  uint32_t zeros;
  uint32_t pack_headers;
  uint32_t header_row_bytes;
  uint32_t payloads;
};

PH_HOST_DEVICE PartLayout part_layout(const Codec& codec, uint32_t part, PartHeader header) {
  PartLayout layout;
  layout.heads = sizeof(PartHeader);
  layout.scales = layout.heads + 4 * codec.heads;
  layout.zeros = layout.scales + round_up(codec.groups[part] * codec.element_bytes, 4);
  layout.pack_headers = layout.zeros + round_up(codec.groups[part] * header.zero_bytes, 4);
  layout.header_row_bytes = round_up(codec.head_dim * (header.minimum_bits + header.width_bits), 32) / 8;
  layout.payloads = layout.pack_headers + codec.rows * layout.header_row_bytes;
  return layout;
}

PH_HOST_DEVICE uint32_t payload_row_bytes(uint32_t pack, uint32_t width_sum) {
  return round_up(pack * width_sum, 32) / 8;
}

PH_HOST_DEVICE uint32_t raw_part_bytes(const Codec& codec) {
  return codec.channels * kBlockTokens * codec.element_bytes;  // a multiple of 16, as head_dim is
}

// Most bytes a record can take.
PH_HOST_DEVICE uint32_t record_capacity(const Codec& codec) {
  uint32_t bytes = kRecordHeaderBytes + kOrderBytes;
  for (uint32_t part = 0; part < kParts; ++part) {
    const PartLayout layout = part_layout(codec, part, {8, 4, 4, 0});
    bytes += round_up(
        layout.payloads + codec.rows * payload_row_bytes(codec.pack, codec.head_dim * kMaximumWidth), 16);
  }
  const uint32_t raw = kRecordHeaderBytes + 2 * raw_part_bytes(codec);
  return bytes > raw ? bytes : raw;
}

// A record whose structure was checked: reading it through these offsets stays inside it, but for the
// payloads, whose readers check row by row.
struct RecordView {
  const uint8_t* bytes;
  uint32_t size;
  bool raw;
  bool ordered;
  uint32_t part_start[kParts];
  uint32_t part_end[kParts];
  PartHeader part[kParts];

  PH_HOST_DEVICE const uint8_t* part_bytes(uint32_t index) const { return bytes + part_start[index]; }
};

PH_HOST_DEVICE uint32_t read_u32(const uint8_t* bytes) {
#if defined(__CUDA_ARCH__)
  return *reinterpret_cast<const uint32_t*>(bytes);  // every section is 4-aligned
#else
  uint32_t value;
  memcpy(&value, bytes, 4);
  return value;
#endif
}

PH_HOST_DEVICE bool part_well_formed(const Codec& codec, uint32_t part, PartHeader header,
                                     uint32_t available) {
  if (header.minimum_bits > 8 || header.width_bits > 4 || header.reserved != 0) return false;
  if (header.zero_bytes != 1 && header.zero_bytes != 2 && header.zero_bytes != 4) return false;
  return part_layout(codec, part, header).payloads <= available;
}

// Token at a position of a stored order.
PH_HOST_DEVICE uint32_t stored_order(const uint8_t* order, uint32_t position) {
  const uint32_t bit = 6 * position;
  const uint32_t low = order[bit / 8];
  const uint32_t high = bit % 8 > 2 ? order[bit / 8 + 1] : 0;
  return (low | high << 8) >> (bit % 8) & 63;
}

// Checks the structure of record `block` of a buffer of records, but for its order (order_well_formed).
PH_HOST_DEVICE bool view_record(const Codec& codec, const uint8_t* records, uint64_t records_bytes,
                                const uint64_t* offsets, uint64_t block, RecordView* view) {
  const uint64_t begin = offsets[block], end = offsets[block + 1];
  if (begin > end || end > records_bytes || begin % 16 != 0 || end - begin < kRecordHeaderBytes) return false;
  const uint8_t* bytes = records + begin;
  const uint64_t size = end - begin;
  if (read_u32(bytes) != size || size % 16 != 0) return false;
  view->bytes = bytes;
  view->size = static_cast<uint32_t>(size);
  const uint32_t flags = read_u32(bytes + 4);
  const uint32_t keys = read_u32(bytes + 8);
  if ((flags & ~0x0101u) != 0 || read_u32(bytes + 12) != 0 || keys % 16 != 0) return false;
  view->raw = (flags & 0xff) == kRaw;
  view->ordered = flags >> 8 != 0;
  if (view->raw && view->ordered) return false;
  const uint32_t values = kRecordHeaderBytes + (view->ordered ? kOrderBytes : 0);
  if (keys < values || keys > size) return false;
  view->part_start[PH_KV_VALUES] = values;
  view->part_end[PH_KV_VALUES] = keys;
  view->part_start[PH_KV_KEYS] = keys;
  view->part_end[PH_KV_KEYS] = view->size;
  if (view->raw) return keys - values == raw_part_bytes(codec) && size - keys == raw_part_bytes(codec);
  for (uint32_t part = 0; part < kParts; ++part) {
    const uint32_t available = view->part_end[part] - view->part_start[part];
    if (available < sizeof(PartHeader)) return false;
    const uint32_t word = read_u32(bytes + view->part_start[part]);
    const PartHeader header = {static_cast<uint8_t>(word), static_cast<uint8_t>(word >> 8),
                               static_cast<uint8_t>(word >> 16), static_cast<uint8_t>(word >> 24)};
    if (!part_well_formed(codec, part, header, available)) return false;
    view->part[part] = header;
  }
  return true;
}

// Whether a stored order names every token.
PH_HOST_DEVICE bool order_well_formed(const uint8_t* order) {
  uint64_t seen = 0;
  for (uint32_t position = 0; position < kBlockTokens; ++position)
    seen |= 1ull << stored_order(order, position);
  return seen == ~0ull;
}

}  // namespace ph::kv
