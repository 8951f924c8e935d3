// The kernels' side of the growing cache on the CPU: blocks and heads are spread over the cores; tile_cpu.cpp does the
// work on each.
#include <algorithm>
#include <cstring>

#include "kv/block_cpu.h"
#include "kv/cache_operations.h"
#include "kv/tile_cpu.h"

namespace ph::kv {

#if defined(__x86_64__)
namespace avx512vnni {
extern const TileKernels kTileKernels;
}
namespace avx512 {
extern const TileKernels kTileKernels;
}
namespace avx2 {
extern const TileKernels kTileKernels;
}
#endif
namespace baseline {
extern const TileKernels kTileKernels;
}

const TileKernels& tile_kernels() {
#if defined(__x86_64__)
  for (const TileKernels* table : {&avx512vnni::kTileKernels, &avx512::kTileKernels, &avx2::kTileKernels}) {
    if (strcmp(table->instruction_set, block_kernels().instruction_set) == 0) return *table;
  }
#endif
  return baseline::kTileKernels;
}

namespace {

uint64_t bytes_of(uint32_t units) { return static_cast<uint64_t>(units) * kUnitBytes; }

// Calls `body(bytes, done, count)` for each of the pieces into which page ends cut a stretch of a stream.
template <typename Body>
void for_each_stretch(const CacheView& cache, const uint32_t* pages, uint64_t offset, uint64_t bytes,
                      Body body) {
  for (uint64_t done = 0; done < bytes;) {
    const uint64_t count = std::min(bytes - done, kPageBytes - (offset + done) % kPageBytes);
    body(stream_byte(cache, pages, offset + done), done, count);
    done += count;
  }
}

void write_stream(const CacheView& cache, const uint32_t* pages, uint64_t offset, const uint8_t* source,
                  uint64_t bytes) {
  for_each_stretch(cache, pages, offset, bytes, [&](uint8_t* stretch, uint64_t done, uint64_t count) {
    memcpy(stretch, source + done, count);
  });
}

// A stretch of a stream, copied to `copy` where it straddles pages.
const uint8_t* read_stream(const CacheView& cache, const uint32_t* pages, uint64_t offset, uint64_t bytes,
                           uint8_t* copy) {
  if (offset % kPageBytes + bytes <= kPageBytes) return stream_byte(cache, pages, offset);
  for_each_stretch(cache, pages, offset, bytes, [&](const uint8_t* stretch, uint64_t done, uint64_t count) {
    memcpy(copy + done, stretch, count);
  });
  return copy;
}

}  // namespace

void TileReader::read(const CacheView& cache, const TileShape& shape, uint32_t layer, uint32_t sequence,
                      uint32_t block, uint32_t head) {
  const uint32_t params_size = params_bytes(shape);
  const RecordSpan span =
      record_span(cache, index_of(cache, layer, sequence), block, head, params_size / kUnitBytes);
  const uint32_t* pages = page_table_of(cache, layer, sequence);
  params =
      params_size == 0 ? nullptr : read_stream(cache, pages, bytes_of(span.params), params_size, params_copy);
  record_bytes = static_cast<uint32_t>(bytes_of(span.end - span.begin));
  record = read_stream(cache, pages, bytes_of(span.begin), record_bytes, record_copy);
}

void TileReader::unpack(const TileKernels& kernels, const TileShape& shape, uint32_t part,
                        uint8_t* quads) const {
  uint32_t widths[kParts];
  memcpy(widths, record, sizeof widths);
  uint32_t groups = bases_position(shape, kParts);
  if (part == PH_KV_VALUES) groups += kGroupBytes * width_sum(widths[PH_KV_KEYS]);
  kernels.unpack(shape, part, widths[part], record + bases_position(shape, part), record + groups, quads);
}

void TilePrefetch::start(const CacheView& cache, uint32_t layer, uint32_t sequence, uint32_t block,
                         uint32_t head) {
  const RecordSpan span = record_span(cache, index_of(cache, layer, sequence), block, head);
  const uint32_t* pages = page_table_of(cache, layer, sequence);
  count_ = at_ = lines_ = 0;
  const auto add = [&](const uint8_t* stretch, uint64_t, uint64_t bytes) {
    stretches_[count_++] = {stretch, stretch + bytes};
    lines_ += static_cast<uint32_t>(bytes / kLine) + 1;
  };
  for_each_stretch(cache, pages, bytes_of(span.params), kParamsBytes, add);
  for_each_stretch(cache, pages, bytes_of(span.begin), bytes_of(span.end - span.begin), add);
}

namespace {

uint64_t row_bytes(const CacheView& cache) { return static_cast<uint64_t>(cache.heads) * cache.head_dim * 2; }

// ---- append

// Blocks whose records wait in the workspace at a time: enough to keep every core busy, few enough to stay in its cache.
constexpr uint64_t kStagedBlocks = 32;

// Where a block's records wait until it is known where in the stream they go.
struct StagedBlock {
  uint8_t* params;
  uint8_t* records;  // [heads][record_capacity]
  uint32_t* units;   // [heads]: sizes of the records
};

// Of a head record of any codec: raw16 has the largest.
uint64_t record_capacity(const CacheView& cache) {
  return kTileHeaderBytes + kParts * static_cast<uint64_t>(cache.head_dim) * kRawChannelBytes;
}

uint64_t staged_bytes(const CacheView& cache) {
  const uint64_t units_bytes = round_up(cache.heads * sizeof(uint32_t), kUnitBytes);
  return kParamsBytes + cache.heads * record_capacity(cache) + units_bytes;
}

StagedBlock staged_block(const CacheView& cache, uint8_t* workspace, uint64_t place) {
  uint8_t* params = workspace + place * staged_bytes(cache);
  uint8_t* records = params + kParamsBytes;
  return {params, records, reinterpret_cast<uint32_t*>(records + cache.heads * record_capacity(cache))};
}

// One append to one layer.
struct Append {
  const CacheView& cache;
  const TileShape& shape;
  const uint32_t layer;
  const StepView& step;
  const StepTensors tensors;
  const TileKernels& kernels;

  // Token `token` of a sequence, [heads][head_dim], wherever it is.
  const uint8_t* row(const StepSequence& sequence, uint32_t part, uint64_t token) const {
    if (token < sequence.before) return recent_row(cache, layer, sequence.sequence, part, token);
    return tensors.parts[part] + (sequence.input + (token - sequence.before)) * row_bytes(cache);
  }
  uint64_t token_of(const StepBlock& block, uint32_t i) const {
    return cache.sinks + static_cast<uint64_t>(block.block) * kBlockTokens + i;
  }

  // Writes the parameters of token i of a block; false if not all of the values to be quantised are finite.
  bool write_params(const StepBlock& block, uint32_t i, uint8_t* params) const {
    bool finite = true;
    for (uint32_t part = 0; part < kParts; ++part) {
      uint16_t scale = 0;
      int16_t zero = 0;
      if (!is_raw16(shape.parts[part])) {
        const TokenExtremes extremes =
            kernels.extremes(shape.dtype, row(step.sequences[block.entry], part, token_of(block, i)),
                             cache.heads * cache.head_dim);
        finite &= extremes.finite;
        if (is_per_token(shape.parts[part])) {
          const Affine affine = tile_affine(shape, part, extremes.minimum, extremes.maximum);
          scale = static_cast<uint16_t>(scale_bits(shape.dtype, affine.scale));
          zero = static_cast<int16_t>(affine.zero);
        }
      }
      memcpy(params + scale_position(part, i), &scale, sizeof scale);
      memcpy(params + zero_position(part, i), &zero, sizeof zero);
    }
    return finite;
  }

  static void finish_params(const TileShape& shape, uint8_t* params) {
    float largest = 0.0f;
    for (uint32_t token = 0; token < kBlockTokens; ++token) {
      largest = std::max(largest, stored_affine(shape, PH_KV_VALUES, params, token).scale);
    }
    memset(params + kLargestScalePosition, 0, kParamsBytes - kLargestScalePosition);
    memcpy(params + kLargestScalePosition, &largest, sizeof largest);
  }

  // Writes a head's record and returns its size in units.
  uint32_t write_record(const StepBlock& block, uint32_t head, const uint8_t* params, uint8_t* record) const {
    uint32_t widths[kParts] = {}, position = bases_position(shape, kParts);
    const uint8_t* rows[kParts][kBlockTokens];
    memset(record, 0, kTileHeaderBytes);
    for (uint32_t part = 0; part < kParts; ++part) {
      for (uint32_t i = 0; i < kBlockTokens; ++i) {
        rows[part][i] =
            row(step.sequences[block.entry], part, token_of(block, i)) + head * cache.head_dim * 2;
      }
      if (is_raw16(shape.parts[part])) continue;
      uint8_t* bases = record + bases_position(shape, part);
      Affine affines[kMostScales];
      if (is_kivi(shape.parts[part])) {
        kernels.group_affines(shape, part, rows[part], affines);
        write_group_affines(part, affines, bases);
      } else {
        for (uint32_t i = 0; i < kBlockTokens; ++i) affines[i] = stored_affine(shape, part, params, i);
      }
      alignas(64) uint8_t codes[kMostTileCodes];
      kernels.quantize(shape, part, rows[part], affines, codes);
      widths[part] = kernels.pack(shape, part, codes, bases, record + position);
      position += kGroupBytes * width_sum(widths[part]);
    }
    for (uint32_t part = 0; part < kParts; ++part) {
      if (!is_raw16(shape.parts[part])) continue;
      kernels.pack_raw(shape, part, rows[part], record + position);
      position += raw_bytes(shape, part);
    }
    memcpy(record, widths, sizeof widths);
    return position / kUnitBytes;
  }

  void write_group_affines(uint32_t part, const Affine* affines, uint8_t* target) const {
    const uint32_t count = group_scales(shape, part);
    for (uint32_t i = 0; i < count; ++i) {
      const uint16_t scale = static_cast<uint16_t>(scale_bits(shape.dtype, affines[i].scale));
      const int16_t zero = static_cast<int16_t>(affines[i].zero);
      memcpy(target + 2 * i, &scale, sizeof scale);
      memcpy(target + 2 * (count + i), &zero, sizeof zero);
    }
  }

  // Notes in the index where the records of a block end.
  void place(const StepBlock& block, const uint32_t* units) const {
    uint32_t* ends = index_of(cache, layer, step.sequences[block.entry].sequence) + block.block * cache.heads;
    for (uint32_t head = 0; head < cache.heads; ++head) {
      ends[head + 1] = ends[head] + (head == 0 ? params_bytes(shape) / kUnitBytes : 0) + units[head];
    }
  }

  // Moves a head's record, and with the first one the block's parameters, to where the index says.
  void publish(const StepBlock& block, uint32_t head, const StagedBlock& staged) const {
    const uint32_t sequence = step.sequences[block.entry].sequence;
    const uint32_t* pages = page_table_of(cache, layer, sequence);
    const uint32_t params_size = params_bytes(shape);
    const RecordSpan span =
        record_span(cache, index_of(cache, layer, sequence), block.block, head, params_size / kUnitBytes);
    if (head == 0) write_stream(cache, pages, bytes_of(span.params), staged.params, params_size);
    write_stream(cache, pages, bytes_of(span.begin), staged.records + head * record_capacity(cache),
                 bytes_of(span.end - span.begin));
  }

  // Copies a sequence's new tokens that stay in 16 bits: sinks, and what the ring holds.
  void keep_recent(const StepSequence& sequence) const {
    const uint64_t skipped = sequence.tokens - std::min(sequence.tokens, cache.ring);
    for (uint64_t i = 0; i < sequence.tokens; ++i) {
      const uint64_t token = sequence.before + i;
      if (token >= cache.sinks && i < skipped) continue;
      for (uint32_t part = 0; part < kParts; ++part) {
        memcpy(recent_row(cache, layer, sequence.sequence, part, token), row(sequence, part, token),
               row_bytes(cache));
      }
    }
  }
};

// ---- read

// Unpacks tokens [first, first + count) of a block, one head, to where `target(part, i)` says that token i's head is.
template <typename Target>
void dequantize(const CacheView& cache, const TileShape& shape, uint32_t layer, uint32_t sequence,
                uint32_t block, uint32_t head, uint32_t first, uint32_t count, Target target) {
  TileReader reader;
  reader.read(cache, shape, layer, sequence, block, head);
  const float most = shape.dtype == PH_F16 ? 65504.0f : 0x1.fep127f;
  for (uint32_t part = 0; part < kParts; ++part) {
    if (is_raw16(shape.parts[part])) {
      const uint8_t* raw = reader.record + raw_begin(shape, part, reader.record_bytes);
      for (uint32_t i = first; i < first + count; ++i) {
        uint8_t* row = target(part, i);
        for (uint32_t channel = 0; channel < shape.head_dim; ++channel)
          memcpy(row + 2 * channel, raw + raw_position(part, i, channel), 2);
      }
      continue;
    }
    const uint8_t* bases = reader.record + bases_position(shape, part);
    Affine affines[kMostScales];
    for (uint32_t i = 0; i < group_scales(shape, part); ++i) {
      affines[i] = is_kivi(shape.parts[part]) ? stored_group_affine(shape, part, bases, i)
                                              : stored_affine(shape, part, reader.params, i);
    }
    alignas(64) uint8_t quads[kMostTileCodes];
    reader.unpack(tile_kernels(), shape, part, quads);
    for (uint32_t i = first; i < first + count; ++i) {
      uint8_t* row = target(part, i);
      for (uint32_t channel = 0; channel < shape.head_dim; ++channel) {
        const Affine& affine = affines[scale_index(shape, part, i, channel)];
        const float code = quads[quad_position(shape, part, i, channel)];
        const float x = std::clamp((code + affine.zero) * affine.scale, -most, most);
        const uint16_t bits = shape.dtype == PH_F16 ? float_to_f16(x) : float_to_bf16(x);
        memcpy(row + 2 * channel, &bits, sizeof bits);
      }
    }
  }
}

}  // namespace

uint64_t append_workspace_bytes(const CacheView& cache, uint64_t blocks) {
  return std::min(blocks, kStagedBlocks) * staged_bytes(cache);
}

void append(ph_device&, const CacheView& cache, const TileShape& shape, uint32_t layer, const StepView& step,
            StepTensors tensors, uint8_t* workspace, uint64_t* non_finite) {
  const Append work = {cache, shape, layer, step, tensors, tile_kernels()};
  for (uint64_t first = 0; first < step.block_count; first += kStagedBlocks) {
    const StepBlock* blocks = step.blocks + first;
    const uint64_t count = std::min(step.block_count - first, kStagedBlocks);
#pragma omp parallel
    {
#pragma omp for collapse(2) schedule(static)
      for (uint64_t place = 0; place < count; ++place) {
        for (uint32_t i = 0; i < kBlockTokens; ++i) {
          if (work.write_params(blocks[place], i, staged_block(cache, workspace, place).params)) continue;
          const uint64_t sequence = step.sequences[blocks[place].entry].sequence;
          const uint64_t key = sequence << 40 | work.token_of(blocks[place], i);
#pragma omp critical
          *non_finite = std::min(*non_finite, key);
        }
      }
#pragma omp for collapse(2) schedule(static)
      for (uint64_t place = 0; place < count; ++place) {
        for (uint32_t head = 0; head < cache.heads; ++head) {
          const StagedBlock staged = staged_block(cache, workspace, place);
          staged.units[head] = work.write_record(blocks[place], head, staged.params,
                                                 staged.records + head * record_capacity(cache));
        }
      }
#pragma omp single
      for (uint64_t place = 0; place < count; ++place) {
        const StagedBlock staged = staged_block(cache, workspace, place);
        Append::finish_params(shape, staged.params);
        work.place(blocks[place], staged.units);
      }
#pragma omp for collapse(2) schedule(static) nowait
      for (uint64_t place = 0; place < count; ++place) {
        for (uint32_t head = 0; head < cache.heads; ++head) {
          work.publish(blocks[place], head, staged_block(cache, workspace, place));
        }
      }
    }
  }
#pragma omp parallel for schedule(dynamic) if (step.sequence_count > 1)
  for (uint32_t entry = 0; entry < step.sequence_count; ++entry) work.keep_recent(step.sequences[entry]);
}

void read_tokens(ph_device&, const CacheView& cache, const TileShape& shape, uint32_t layer,
                 uint32_t sequence, uint32_t packed, uint64_t first, uint64_t count, uint8_t* keys,
                 uint8_t* values) {
  uint8_t* const parts[kParts] = {keys, values};
  const uint64_t end = first + count;
  const uint64_t packed_end = cache.sinks + static_cast<uint64_t>(packed) * kBlockTokens;
  for (uint64_t token = first; token < end; ++token) {
    if (token >= cache.sinks && token < packed_end) continue;
    for (uint32_t part = 0; part < kParts; ++part) {
      memcpy(parts[part] + (token - first) * row_bytes(cache),
             recent_row(cache, layer, sequence, part, token), row_bytes(cache));
    }
  }
  const uint64_t packed_first = std::max<uint64_t>(first, cache.sinks),
                 packed_last = std::min(end, packed_end);
  if (packed_first >= packed_last) return;
  const uint64_t first_block = (packed_first - cache.sinks) / kBlockTokens,
                 end_block = (packed_last - cache.sinks + kBlockTokens - 1) / kBlockTokens;
#pragma omp parallel for collapse(2) schedule(static)
  for (uint64_t block = first_block; block < end_block; ++block) {
    for (uint32_t head = 0; head < cache.heads; ++head) {
      const uint64_t start = cache.sinks + block * kBlockTokens;
      const uint64_t from = std::max(packed_first, start), to = std::min(packed_last, start + kBlockTokens);
      dequantize(cache, shape, layer, sequence, static_cast<uint32_t>(block), head,
                 static_cast<uint32_t>(from - start), static_cast<uint32_t>(to - from),
                 [&](uint32_t part, uint32_t i) {
                   return parts[part] + (start + i - first) * row_bytes(cache) + head * cache.head_dim * 2;
                 });
    }
  }
}

void restore_tokens(ph_device&, const CacheView& cache, const TileShape& shape, uint32_t layer,
                    uint32_t sequence, uint32_t block, uint32_t count) {
  const uint64_t start = cache.sinks + static_cast<uint64_t>(block) * kBlockTokens;
#pragma omp parallel for schedule(static)
  for (uint32_t head = 0; head < cache.heads; ++head) {
    dequantize(cache, shape, layer, sequence, block, head, 0, count, [&](uint32_t part, uint32_t i) {
      return recent_row(cache, layer, sequence, part, start + i) + head * cache.head_dim * 2;
    });
  }
}

void scatter_words(ph_device&, uint32_t* base, const WordAt* words, uint32_t count) {
  for (uint32_t i = 0; i < count; ++i) base[words[i].position] = words[i].value;
}

void gather_words(ph_device&, const uint32_t* base, WordAt* words, uint32_t count) {
  for (uint32_t i = 0; i < count; ++i) words[i].value = base[words[i].position];
}

}  // namespace ph::kv
