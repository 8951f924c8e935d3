#include "kv/codec.h"

#include "common/error.h"

namespace ph::kv {

namespace {

void require(bool condition, const char* field, double value, const char* range) {
  if (!condition) {
    throw Error(PH_ERROR_INVALID_ARGUMENT, "Cannot use the kv codec as %s must be %s: current value is %g",
                field, range, value);
  }
}

bool valid_bits(uint32_t bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 8; }

// 1/254 as a float32 may come out of a caller's double a little low.
bool valid_rel(float rel) { return rel >= 1.0f / 254.0f && rel <= 1.0f; }

}  // namespace

Codec make_codec(const ph_kv_codec& raw) {
  require(raw.heads >= 1 && raw.heads <= 4096, "heads", raw.heads, "1 to 4096");
  require(raw.head_dim >= 16 && raw.head_dim <= 256 && raw.head_dim % 16 == 0, "head_dim", raw.head_dim,
          "a multiple of 16 up to 256");
  require(raw.tokens < 1ull << 40, "tokens", static_cast<double>(raw.tokens), "below 2^40");
  require(raw.dtype <= PH_F32, "dtype", raw.dtype, "f16, bf16 or f32");
  require(raw.quantizer <= PH_KV_KIVI, "quantizer", raw.quantizer, "packkv or kivi");
  require(raw.grouping <= PH_KV_PER_HEAD, "grouping", raw.grouping, "token or head");
  require(raw.repack <= PH_KV_REPACK_AUTO, "repack", raw.repack, "none, median, greedy or auto");
  require(raw.pack == 4 || raw.pack == 8 || raw.pack == 16 || raw.pack == 32, "pack", raw.pack,
          "4, 8, 16 or 32");
  require(raw.keep_non_finite <= 1, "keep_non_finite", raw.keep_non_finite, "0 or 1");

  Codec codec{};
  static_cast<ph_kv_codec&>(codec) = raw;
  codec.channels = raw.heads * raw.head_dim;
  codec.rows_per_head = kBlockTokens / raw.pack;
  codec.rows = raw.heads * codec.rows_per_head;
  codec.element_bytes = raw.dtype == PH_F32 ? 4 : 2;
  codec.value_groups_per_row = (raw.head_dim + kGroupChannels - 1) / kGroupChannels;
  codec.blocks = raw.tokens / kBlockTokens;
  if (raw.quantizer == PH_KV_PACKKV) {
    require(valid_rel(raw.key_rel), "key_rel", raw.key_rel, "1/254 to 1");
    require(valid_rel(raw.value_rel), "value_rel", raw.value_rel, "1/254 to 1");
    for (uint32_t part = 0; part < kParts; ++part) {
      codec.groups[part] = raw.grouping == PH_KV_PER_TOKEN ? kBlockTokens : kBlockTokens * raw.heads;
      codec.code_limit[part] = 255;
    }
    codec.rel[PH_KV_KEYS] = raw.key_rel;
    codec.rel[PH_KV_VALUES] = raw.value_rel;
  } else {
    require(raw.grouping == PH_KV_PER_TOKEN, "grouping", raw.grouping,
            "token for kivi, whose groups are fixed");
    require(valid_bits(raw.key_bits), "key_bits", raw.key_bits, "2, 3, 4 or 8");
    require(valid_bits(raw.value_bits), "value_bits", raw.value_bits, "2, 3, 4 or 8");
    codec.groups[PH_KV_KEYS] = codec.channels;
    codec.groups[PH_KV_VALUES] = raw.heads * kBlockTokens * codec.value_groups_per_row;
    codec.code_limit[PH_KV_KEYS] = (1u << raw.key_bits) - 1;
    codec.code_limit[PH_KV_VALUES] = (1u << raw.value_bits) - 1;
  }
  return codec;
}

}  // namespace ph::kv
