// The kv operations on the CPU: blocks are spread over the cores; block_cpu.cpp does the work on each.
#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/error.h"
#include "kv/block_cpu.h"
#include "kv/operations.h"
#include "kv/statistics.h"

namespace ph::kv {

#if defined(__x86_64__)
namespace avx512vnni {
extern const BlockKernels kBlockKernels;
}
namespace avx512 {
extern const BlockKernels kBlockKernels;
}
namespace avx2 {
extern const BlockKernels kBlockKernels;
}
#endif
namespace baseline {
extern const BlockKernels kBlockKernels;
}

namespace {

std::vector<const BlockKernels*> supported_kernels() {
  std::vector<const BlockKernels*> tables;
#if defined(__x86_64__)
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512vnni")) tables.push_back(&avx512vnni::kBlockKernels);
    tables.push_back(&avx512::kBlockKernels);
  }
  if (avx2) tables.push_back(&avx2::kBlockKernels);
#endif
  tables.push_back(&baseline::kBlockKernels);
  return tables;
}

const BlockKernels& choose_kernels() {
  const std::vector<const BlockKernels*> tables = supported_kernels();
  const char* wanted = getenv("PACKHORSE_INSTRUCTION_SET");
  if (wanted == nullptr || *wanted == 0) return *tables.front();
  for (const BlockKernels* table : tables) {
    if (strcmp(table->instruction_set, wanted) == 0) return *table;
  }
  throw Error(PH_ERROR_UNSUPPORTED,
              "Cannot use instruction set \"%s\" of PACKHORSE_INSTRUCTION_SET: this processor's best is %s",
              wanted, tables.front()->instruction_set);
}

struct Range {
  uint64_t begin, end;
};

// Consecutive blocks for each thread, so that what a thread appends stays in order.
Range blocks_of_thread(uint64_t blocks) {
  const uint64_t thread = static_cast<uint64_t>(omp_get_thread_num());
  const uint64_t threads = static_cast<uint64_t>(omp_get_num_threads());
  return {blocks * thread / threads, blocks * (thread + 1) / threads};
}

// One block's quantised parts.
struct Scratch {
  explicit Scratch(const Codec& codec) {
    for (uint32_t part = 0; part < kParts; ++part) {
      codes[part].resize(static_cast<size_t>(codec.channels) * kBlockTokens);
      scales[part].resize(codec.groups[part]);
      zeros[part].resize(codec.groups[part]);
    }
  }
  std::vector<uint8_t> codes[kParts];
  std::vector<float> scales[kParts];
  std::vector<int32_t> zeros[kParts];
};

// Runs `body(range, scratch)` on every thread; exceptions (of memory) leave the parallel region first.
template <typename Body>
void for_each_thread(const Codec& codec, Body body) {
  std::exception_ptr failure;
#pragma omp parallel
  {
    try {
      Scratch scratch(codec);
      body(blocks_of_thread(codec.blocks), scratch);
    } catch (...) {
#pragma omp critical
      failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

void lower(uint64_t& shared, uint64_t value) {
#pragma omp critical
  shared = std::min(shared, value);
}

uint32_t write_raw(const Codec& codec, const void* const tensors[kParts], uint64_t block, uint8_t* record) {
  const uint32_t part_bytes = raw_part_bytes(codec), head_bytes = part_bytes / codec.heads;
  const uint32_t keys = kRecordHeaderBytes + part_bytes;
  const RecordHeader header = {keys + part_bytes, kRaw, 0, 0, keys, 0};
  memcpy(record, &header, sizeof header);
  for (uint32_t head = 0; head < codec.heads; ++head) {
    const uint64_t source =
        (head * codec.tokens + block * kBlockTokens) * codec.head_dim * codec.element_bytes;
    memcpy(record + kRecordHeaderBytes + head * head_bytes,
           static_cast<const uint8_t*>(tensors[PH_KV_VALUES]) + source, head_bytes);
    memcpy(record + keys + head * head_bytes, static_cast<const uint8_t*>(tensors[PH_KV_KEYS]) + source,
           head_bytes);
  }
  return header.bytes;
}

void read_raw(const Codec& codec, const RecordView& view, uint64_t block, void* const tensors[kParts]) {
  const uint32_t head_bytes = raw_part_bytes(codec) / codec.heads;
  for (uint32_t part = 0; part < kParts; ++part) {
    for (uint32_t head = 0; head < codec.heads; ++head) {
      const uint64_t target =
          (head * codec.tokens + block * kBlockTokens) * codec.head_dim * codec.element_bytes;
      memcpy(static_cast<uint8_t*>(tensors[part]) + target, view.part_bytes(part) + head * head_bytes,
             head_bytes);
    }
  }
}

// Lets every thread write the records of its blocks back to back, then closes the gaps between threads.
// `write_block(block, scratch, record)` returns a record's size. `records` holds capacity for every block.
template <typename WriteBlock>
void write_records(const Codec& codec, uint8_t* records, uint64_t* offsets, Status* status,
                   WriteBlock write_block) {
  const uint64_t capacity = record_capacity(codec);
  std::vector<Range> written(static_cast<size_t>(omp_get_max_threads()), Range{0, 0});
  for_each_thread(codec, [&](Range blocks, Scratch& scratch) {
    // Records are made elsewhere and moved, as making one may write a little past its end.
    std::vector<uint8_t> record(capacity + 8);
    uint8_t* target = records + blocks.begin * capacity;
    for (uint64_t block = blocks.begin; block < blocks.end; ++block) {
      const uint32_t bytes = write_block(block, scratch, record.data());
      memcpy(target, record.data(), bytes);
      offsets[block + 1] = bytes;
      target += bytes;
    }
    written[static_cast<size_t>(omp_get_thread_num())] = {blocks.begin * capacity,
                                                          static_cast<uint64_t>(target - records)};
  });
  uint64_t end = 0;
  for (const Range& range : written) {
    if (range.begin != end) memmove(records + end, records + range.begin, range.end - range.begin);
    end += range.end - range.begin;
  }
  offsets[0] = 0;
  for (uint64_t block = 0; block < codec.blocks; ++block) offsets[block + 1] += offsets[block];
  status->bytes = end;
}

// Calls `body(block, view, scratch)` for every well-formed record; the first other one goes to the status.
template <typename Body>
void read_records(const Codec& codec, Records records, Status* status, Body body) {
  status->first = kNothing;
  status->bytes = 0;
  for_each_thread(codec, [&](Range blocks, Scratch& scratch) {
    for (uint64_t block = blocks.begin; block < blocks.end; ++block) {
      RecordView view;
      const bool formed = view_record(codec, records.bytes, records.size, records.offsets, block, &view) &&
                          (!view.ordered || order_well_formed(view.bytes + kRecordHeaderBytes));
      if (!formed || !body(block, view, scratch)) lower(status->first, block);
    }
  });
}

bool unpack_parts(const Codec& codec, const RecordView& view, Scratch& scratch) {
  for (uint32_t part = 0; part < kParts; ++part) {
    if (!block_kernels().unpack(codec, part, view, scratch.codes[part].data(), scratch.scales[part].data(),
                                scratch.zeros[part].data())) {
      return false;
    }
  }
  return true;
}

}  // namespace

const BlockKernels& block_kernels() {
  static const BlockKernels& chosen = choose_kernels();
  return chosen;
}

uint64_t workspace_bytes(const Codec&) { return 0; }

void quantize(ph_device&, const Codec& codec, uint32_t part, const void* x, QuantizedOutput output,
              Status* status) {
  uint64_t first = kNothing;
#pragma omp parallel for schedule(static) reduction(min : first)
  for (uint64_t block = 0; block < codec.blocks; ++block) {
    const uint64_t place = block_kernels().quantize(
        codec, part, x, block, output.codes + block * codec.channels * kBlockTokens,
        output.scales + block * codec.groups[part], output.zeros + block * codec.groups[part]);
    first = std::min(first, place);
  }
  *status = {first, 0};
}

void dequantize(ph_device&, const Codec& codec, uint32_t part, QuantizedInput input, void* x) {
#pragma omp parallel for schedule(static)
  for (uint64_t block = 0; block < codec.blocks; ++block) {
    block_kernels().dequantize(codec, part, input.codes + block * codec.channels * kBlockTokens,
                               input.scales + block * codec.groups[part],
                               input.zeros + block * codec.groups[part], block, x);
  }
}

void repack(ph_device&, const Codec& codec, const uint8_t* key_codes, const uint8_t* value_codes,
            uint8_t* order) {
  for_each_thread(codec, [&](Range blocks, Scratch&) {
    for (uint64_t block = blocks.begin; block < blocks.end; ++block) {
      const uint64_t codes = block * codec.channels * kBlockTokens;
      block_kernels().repack(codec, key_codes + codes, value_codes + codes, order + block * kBlockTokens);
    }
  });
}

void pack(ph_device&, const Codec& codec, const QuantizedInput parts[kParts], const uint8_t* order,
          uint8_t* records, uint64_t* offsets, uint8_t*, Status* status) {
  write_records(codec, records, offsets, status, [&](uint64_t block, Scratch&, uint8_t* record) {
    const uint8_t* codes[kParts];
    const float* scales[kParts];
    const int32_t* zeros[kParts];
    for (uint32_t part = 0; part < kParts; ++part) {
      codes[part] = parts[part].codes + block * codec.channels * kBlockTokens;
      scales[part] = parts[part].scales + block * codec.groups[part];
      zeros[part] = parts[part].zeros + block * codec.groups[part];
    }
    uint8_t tokens[kBlockTokens];  // the caller's order, within the block whatever it is
    for (uint32_t position = 0; position < kBlockTokens; ++position) {
      tokens[position] = order[block * kBlockTokens + position] % kBlockTokens;
    }
    return block_kernels().pack(codec, codes, scales, zeros, tokens, record);
  });
  status->first = kNothing;
}

void encode(ph_device&, const Codec& codec, const void* const tensors[kParts], uint8_t* records,
            uint64_t* offsets, uint8_t*, Status* status) {
  uint64_t first = kNothing;
  const BlockKernels& kernels = block_kernels();
  write_records(codec, records, offsets, status, [&](uint64_t block, Scratch& scratch, uint8_t* record) {
    uint64_t place = kNothing;
    for (uint32_t part = 0; part < kParts; ++part) {
      place = std::min(place, kernels.quantize(codec, part, tensors[part], block, scratch.codes[part].data(),
                                               scratch.scales[part].data(), scratch.zeros[part].data()));
    }
    if (place != kNothing) {
      lower(first, place);
      return write_raw(codec, tensors, block, record);
    }
    uint8_t order[kBlockTokens];
    kernels.repack(codec, scratch.codes[PH_KV_KEYS].data(), scratch.codes[PH_KV_VALUES].data(), order);
    const uint8_t* codes[kParts] = {scratch.codes[0].data(), scratch.codes[1].data()};
    const float* scales[kParts] = {scratch.scales[0].data(), scratch.scales[1].data()};
    const int32_t* zeros[kParts] = {scratch.zeros[0].data(), scratch.zeros[1].data()};
    return kernels.pack(codec, codes, scales, zeros, order, record);
  });
  status->first = codec.keep_non_finite ? kNothing : first;
}

void unpack(ph_device&, const Codec& codec, Records records, const QuantizedOutput parts[kParts],
            uint8_t* order, Status* status) {
  read_records(codec, records, status, [&](uint64_t block, const RecordView& view, Scratch&) {
    for (uint32_t part = 0; part < kParts; ++part) {
      uint8_t* codes = parts[part].codes + block * codec.channels * kBlockTokens;
      float* scales = parts[part].scales + block * codec.groups[part];
      int32_t* zeros = parts[part].zeros + block * codec.groups[part];
      if (view.raw) {
        memset(codes, 0, static_cast<size_t>(codec.channels) * kBlockTokens);
        std::fill_n(scales, codec.groups[part], __builtin_nanf(""));
        std::fill_n(zeros, codec.groups[part], 0);
      } else if (!block_kernels().unpack(codec, part, view, codes, scales, zeros)) {
        return false;
      }
    }
    for (uint32_t position = 0; position < kBlockTokens; ++position) {
      const uint32_t token =
          view.ordered ? stored_order(view.bytes + kRecordHeaderBytes, position) : position;
      order[block * kBlockTokens + position] = static_cast<uint8_t>(token);
    }
    return true;
  });
}

void decode(ph_device&, const Codec& codec, Records records, void* const tensors[kParts], Status* status) {
  read_records(codec, records, status, [&](uint64_t block, const RecordView& view, Scratch& scratch) {
    if (view.raw) {
      read_raw(codec, view, block, tensors);
      return true;
    }
    if (!unpack_parts(codec, view, scratch)) return false;
    for (uint32_t part = 0; part < kParts; ++part) {
      block_kernels().dequantize(codec, part, scratch.codes[part].data(), scratch.scales[part].data(),
                                 scratch.zeros[part].data(), block, tensors[part]);
    }
    return true;
  });
}

void measure(ph_device&, const Codec& codec, Records records, const void* const tensors[kParts],
             ph_kv_statistics* statistics, uint8_t*, Status* status) {
  // One sum per block, added in order, so that the result does not depend on the number of threads.
  std::vector<ph_kv_statistics> blocks(codec.blocks);
  read_records(codec, records, status, [&](uint64_t block, const RecordView& view, Scratch& scratch) {
    if (!view.raw && !unpack_parts(codec, view, scratch)) return false;
    ph_kv_statistics& found = blocks[block];
    found.bytes = view.size;
    found.raw_blocks = view.raw;
    found.ordered_blocks = view.ordered;
    for (uint32_t part = 0; part < kParts && !view.raw; ++part) {
      block_kernels().measure(codec, part, view, scratch.codes[part].data(), scratch.scales[part].data(),
                              scratch.zeros[part].data(), block, tensors[part], found);
    }
    return true;
  });
  *statistics = {};
  for (const ph_kv_statistics& found : blocks) add_statistics(*statistics, found);
}

}  // namespace ph::kv
