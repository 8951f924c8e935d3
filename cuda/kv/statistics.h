// Sums of ph_kv_statistics, which both backends gather block by block.
#pragma once

#include "common/portable.h"
#include "packhorse.h"

namespace ph::kv {

PH_HOST_DEVICE void add_statistics(ph_kv_statistics& total, const ph_kv_statistics& more) {
  total.bytes += more.bytes;
  total.raw_blocks += more.raw_blocks;
  total.ordered_blocks += more.ordered_blocks;
  for (int i = 0; i < 18; ++i) total.widths[i] += more.widths[i];
  for (int i = 0; i < 16; ++i) total.code_mask[i] |= more.code_mask[i];
  for (int part = 0; part < 2; ++part) {
    total.payload_bits[part] += more.payload_bits[part];
    total.packs[part] += more.packs[part];
    total.compared[part] += more.compared[part];
    total.squared_error[part] += more.squared_error[part];
    if (more.max_error[part] > total.max_error[part]) total.max_error[part] = more.max_error[part];
    if (more.max_error_over_scale[part] > total.max_error_over_scale[part]) {
      total.max_error_over_scale[part] = more.max_error_over_scale[part];
    }
  }
}

}  // namespace ph::kv
