// Unpack, dequantise, the fused decode and measure on the GPU.
//
// One thread block of four warps per (block, part, head): head_dim * 64 values. A warp takes a row (64 / P positions'
// packs), a lane four neighbouring channels: it unpacks four positions of each at a time in registers, transposes
// them, and writes four neighbouring values per position, so a warp writes whole rows of up to 128 channels. Per
// value about 0.35 bytes are read and 2 written (16-bit types). Every access to a record is checked against its
// length first. Deterministic.
#include "device/device_cuda.h"
#include "kv/launch.cuh"
#include "kv/operations.h"
#include "kv/pack.cuh"
#include "kv/statistics.h"

namespace ph::kv {

namespace {

constexpr int kDecodeThreads = 128;
constexpr int kDecodeWarps = kDecodeThreads / kWarpThreads;
constexpr uint32_t kMaximumRows = kBlockTokens / 4;                    // of a head
constexpr uint32_t kMaximumRowGroups = 256 / kGroupChannels;           // of a token and head, kivi values

struct DecodeShared {
  uint8_t order[kBlockTokens];
  uint32_t row_bytes[kMaximumRows];
  unsigned long long seen;
  int malformed;
};

// One head of one part of a record.
struct HeadView {
  const uint8_t* part;
  PartHeader header;
  PartLayout layout;
  uint32_t part_bytes;
  uint32_t head;
};

__device__ __forceinline__ float stored_scale(const Codec& codec, const HeadView& view, uint32_t group) {
  const uint8_t* source = view.part + view.layout.scales + group * codec.element_bytes;
  return scale_from_bits(codec.dtype, codec.element_bytes == 2 ? *reinterpret_cast<const uint16_t*>(source)
                                                               : *reinterpret_cast<const uint32_t*>(source));
}

__device__ __forceinline__ int32_t stored_zero(const HeadView& view, uint32_t group) {
  const uint8_t* source = view.part + view.layout.zeros + group * view.header.zero_bytes;
  if (view.header.zero_bytes == 1) return *reinterpret_cast<const int8_t*>(source);
  if (view.header.zero_bytes == 2) return *reinterpret_cast<const int16_t*>(source);
  return *reinterpret_cast<const int32_t*>(source);
}

// Field `index` of a row's pack headers: minimum | width << 8.
__device__ __forceinline__ uint32_t pack_header(const HeadView& view, const uint8_t* row, uint32_t index) {
  const uint32_t bits = view.header.minimum_bits + view.header.width_bits;
  if (bits == 0) return 0;
  const uint32_t begin = index * bits, word = begin / 32;
  const uint32_t* words = reinterpret_cast<const uint32_t*>(row);
  const uint32_t next = (begin + bits - 1) / 32 > word ? words[word + 1] : 0;
  const uint32_t field = __funnelshift_r(words[word], next, begin % 32) & ((1u << bits) - 1);
  return (field & ((1u << view.header.minimum_bits) - 1)) | field >> view.header.minimum_bits << 8;
}

// Four bytes from four fields of `width` bits.
__device__ __forceinline__ uint32_t expand4(uint32_t bits, uint32_t width) {
  const uint32_t pair_mask = (1u << 2 * width) - 1, mask = (1u << width) - 1;
  const uint32_t pairs = (bits & pair_mask) | (bits >> 2 * width & pair_mask) << 16;
  return (pairs & mask * 0x00010001u) | (pairs >> width & mask * 0x00010001u) << 8;
}

// Checks record `block` and fills the shared order; false if it is malformed. All threads call it.
__device__ bool open_record(const Codec& codec, Records records, uint64_t block, RecordView* view, DecodeShared& shared) {
  const bool formed = view_record(codec, records.bytes, records.size, records.offsets, block, view);
  if (threadIdx.x == 0) {
    shared.seen = 0;
    shared.malformed = !formed;
  }
  __syncthreads();
  if (!formed) return false;
  if (threadIdx.x < kBlockTokens) {
    const uint32_t token = view->ordered ? stored_order(view->bytes + kRecordHeaderBytes, threadIdx.x) : threadIdx.x;
    shared.order[threadIdx.x] = static_cast<uint8_t>(token);
    atomicOr(&shared.seen, 1ull << token);
  }
  __syncthreads();
  return shared.seen == ~0ull;
}

// Finds where each row of the head starts; false if they do not fit the part. All threads call it.
template <int kPack>
__device__ bool open_rows(const Codec& codec, const HeadView& view, DecodeShared& shared) {
  const uint32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  for (uint32_t index = warp; index < codec.rows_per_head; index += kDecodeWarps) {
    const uint32_t row = view.head * codec.rows_per_head + index;
    const uint8_t* headers = view.part + view.layout.pack_headers + row * view.layout.header_row_bytes;
    uint32_t widths = 0;
    for (uint32_t channel = lane; channel < codec.head_dim; channel += kWarpThreads) {
      const uint32_t width = pack_header(view, headers, channel) >> 8;
      if (width > kMaximumWidth) shared.malformed = 1;
      widths += width;
    }
    widths = __reduce_add_sync(kEveryLane, widths);
    if (lane == 0) shared.row_bytes[index] = payload_row_bytes(kPack, widths);
  }
  __syncthreads();
  uint64_t end = read_u32(view.part + view.layout.heads + 4 * view.head);
  const bool aligned = end % 4 == 0;
  for (uint32_t index = 0; index < codec.rows_per_head; ++index) end += shared.row_bytes[index];
  return aligned && !shared.malformed && view.layout.payloads + end <= view.part_bytes;
}

// Calls sink(token, channel, codes of four channels) for the values of a head.
template <int kPack, typename Sink>
__device__ void unpack_head(const Codec& codec, const HeadView& view, const DecodeShared& shared, Sink& sink) {
  const uint32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  uint32_t start = view.layout.payloads + read_u32(view.part + view.layout.heads + 4 * view.head);
  uint32_t reached = 0;
  for (uint32_t index = warp; index < codec.rows_per_head; index += kDecodeWarps) {
    for (; reached < index; ++reached) start += shared.row_bytes[reached];
    const uint32_t row = view.head * codec.rows_per_head + index;
    const uint8_t* headers = view.part + view.layout.pack_headers + row * view.layout.header_row_bytes;
    const uint32_t* payload = reinterpret_cast<const uint32_t*>(view.part + start);
    const uint32_t words = shared.row_bytes[index] / 4;
    uint32_t before = 0;  // bits of the chunks before
    for (uint32_t begin = 0; begin < codec.head_dim; begin += kChunkChannels) {
      const uint32_t channel = begin + 4 * lane;
      const bool active = channel < codec.head_dim;
      uint32_t minimum[4] = {}, width[4] = {};
      if (active) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t header = pack_header(view, headers, channel + j);
          minimum[j] = (header & 0xff) * 0x01010101u;
          width[j] = header >> 8;
        }
      }
      uint32_t total;
      uint32_t bit = before + warp_exclusive_sum(kPack * (width[0] + width[1] + width[2] + width[3]), &total);
      before += total;
      if (!active) continue;
      sink.open(channel);
      uint32_t offset[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        offset[j] = bit;
        bit += kPack * width[j];
      }
#pragma unroll
      for (int i = 0; i < kPack / 4; ++i) {
        uint32_t positions[4], channels[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t word = offset[j] / 32;
          const uint32_t low = word < words ? __ldg(payload + word) : 0;
          const uint32_t high = word + 1 < words ? __ldg(payload + word + 1) : 0;
          positions[j] = expand4(__funnelshift_r(low, high, offset[j] % 32), width[j]) + minimum[j];
          offset[j] += 4 * width[j];
        }
        transpose4(positions, channels);
#pragma unroll
        for (int k = 0; k < 4; ++k) sink(shared.order[index * kPack + 4 * i + k], channel, channels[k]);
      }
    }
  }
}

// ---- sinks ----

struct CodeSink {
  uint8_t* codes;  // of this head, token 0
  uint32_t channels;

  __device__ __forceinline__ void open(uint32_t) {}
  __device__ __forceinline__ void operator()(uint32_t token, uint32_t channel, uint32_t four) {
    *reinterpret_cast<uint32_t*>(codes + token * channels + channel) = four;
  }
};

// Scales and zero points of a head, in shared memory: by channel, or by token and channel group.
struct HeadAffines {
  float2 groups[256];  // scale, zero
};
static_assert(kBlockTokens * kMaximumRowGroups == 256);

__device__ void load_affines(const Codec& codec, uint32_t part, const HeadView& view, HeadAffines& affines) {
  const uint32_t count = per_channel(codec, part) ? codec.head_dim
                         : codec.quantizer == PH_KV_KIVI ? kBlockTokens * codec.value_groups_per_row
                                                         : kBlockTokens;
  for (uint32_t i = threadIdx.x; i < count; i += kDecodeThreads) {
    const uint32_t group = codec.quantizer == PH_KV_PACKKV && codec.grouping == PH_KV_PER_TOKEN ? i : view.head * count + i;
    affines.groups[i] = make_float2(stored_scale(codec, view, group), static_cast<float>(stored_zero(view, group)));
  }
}

// x' of four codes.
struct Restorer {
  const Codec& codec;
  const HeadAffines& affines;
  const bool by_channel;
  float2 channel_affines[4];

  __device__ Restorer(const Codec& the_codec, uint32_t part, const HeadAffines& the_affines)
      : codec(the_codec), affines(the_affines), by_channel(per_channel(the_codec, part)) {}

  __device__ __forceinline__ void open(uint32_t channel) {
    if (!by_channel) return;
#pragma unroll
    for (int j = 0; j < 4; ++j) channel_affines[j] = affines.groups[channel + j];
  }
  __device__ __forceinline__ float2 token_affine(uint32_t token, uint32_t channel) const {
    return affines.groups[codec.quantizer == PH_KV_KIVI ? token * codec.value_groups_per_row + channel / kGroupChannels : token];
  }
  __device__ __forceinline__ void restore(uint32_t token, uint32_t channel, uint32_t four, float (&x)[4],
                                          float (&scale)[4]) const {
    const float2 affine = by_channel ? float2{} : token_affine(token, channel);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 chosen = by_channel ? channel_affines[j] : affine;
      // 2^23 + code has the code in its low bits; the subtraction is exact.
      const float code = __int_as_float(0x4b000000 | (four >> 8 * j & 0xff)) - 8388608.0f;
      x[j] = __fmul_rn(__fadd_rn(code, chosen.y), chosen.x);
      scale[j] = chosen.x;
    }
  }
};

template <typename Element>
__device__ __forceinline__ void saturate(float (&x)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    // Keeps a NaN.
    x[j] = x[j] > Element::kLargest ? Element::kLargest : x[j];
    x[j] = x[j] < -Element::kLargest ? -Element::kLargest : x[j];
  }
}

template <typename Element>
__device__ __forceinline__ void store4(uint8_t* target, const float (&x)[4]) {
  if constexpr (std::is_same_v<Element, F32>) {
    *reinterpret_cast<float4*>(target) = make_float4(x[0], x[1], x[2], x[3]);
  } else if constexpr (std::is_same_v<Element, F16>) {
    const __half2 pairs[2] = {__floats2half2_rn(x[0], x[1]), __floats2half2_rn(x[2], x[3])};
    *reinterpret_cast<uint2*>(target) = *reinterpret_cast<const uint2*>(pairs);
  } else {
    const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(x[0], x[1]), __floats2bfloat162_rn(x[2], x[3])};
    *reinterpret_cast<uint2*>(target) = *reinterpret_cast<const uint2*>(pairs);
  }
}

template <typename Element>
struct ValueSink {
  Restorer restorer;
  uint8_t* head;  // the head's first value of the block

  __device__ __forceinline__ void open(uint32_t channel) { restorer.open(channel); }
  __device__ __forceinline__ void operator()(uint32_t token, uint32_t channel, uint32_t four) {
    float x[4], scale[4];
    restorer.restore(token, channel, four, x, scale);
    saturate<Element>(x);
    store4<Element>(head + (token * restorer.codec.head_dim + channel) * Element::kBytes, x);
  }
};

// Errors and codes that one thread saw.
template <typename Element>
struct MeasureSink {
  Restorer restorer;
  const uint8_t* head;  // null without originals
  uint32_t mask[8] = {};
  double max_error = 0, max_error_over_scale = 0, squared_error = 0;

  __device__ MeasureSink(Restorer the_restorer, const uint8_t* the_head) : restorer(the_restorer), head(the_head) {}
  __device__ __forceinline__ void open(uint32_t channel) { restorer.open(channel); }
  __device__ void operator()(uint32_t token, uint32_t channel, uint32_t four) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t code = four >> 8 * j & 0xff;
#pragma unroll
      for (uint32_t k = 0; k < 8; ++k) mask[k] |= code / 32 == k ? 1u << code % 32 : 0;
    }
    if (head == nullptr) return;
    float x[4], scale[4];
    restorer.restore(token, channel, four, x, scale);
    saturate<Element>(x);
    for (int j = 0; j < 4; ++j) {
      const float original = value_at<Element>(head + (token * restorer.codec.head_dim + channel + j) * Element::kBytes);
      const double error = fabs(static_cast<double>(x[j]) - static_cast<double>(original));
      max_error = error > max_error ? error : max_error;
      const double over_scale = error / static_cast<double>(scale[j]);
      max_error_over_scale = over_scale > max_error_over_scale ? over_scale : max_error_over_scale;
      squared_error += error * error;
    }
  }
};

// ---- kernels ----

// Which (block, part, head) a thread block works on.
struct Place {
  uint64_t block;
  uint32_t part, head;
};

__device__ Place place_of(const Codec& codec, uint64_t index) {
  const uint32_t within = static_cast<uint32_t>(index % (kParts * codec.heads));
  return {index / (kParts * codec.heads), within / codec.heads, within % codec.heads};
}

__device__ HeadView head_view(const Codec& codec, const RecordView& record, const Place& place) {
  return {record.part_bytes(place.part), record.part[place.part],
          part_layout(codec, place.part, record.part[place.part]),
          record.part_end[place.part] - record.part_start[place.part], place.head};
}

__device__ void report_malformed(uint64_t block, unsigned long long* first) {
  if (threadIdx.x == 0) atomicMin(first, static_cast<unsigned long long>(block));
}

__device__ __forceinline__ uint64_t head_offset(const Codec& codec, const Place& place) {
  return (place.head * codec.tokens + place.block * kBlockTokens) * codec.head_dim * codec.element_bytes;
}

struct Outputs {
  uint8_t* x[kParts];
};

template <typename Element, int kPack>
__global__ void __launch_bounds__(kDecodeThreads) DecodeKernel(Codec codec, Records records, Outputs outputs,
                                                               uint64_t places, unsigned long long* first) {
  __shared__ DecodeShared shared;
  __shared__ HeadAffines affines;
  for (uint64_t index = blockIdx.x; index < places; index += gridDim.x) {
    const Place place = place_of(codec, index);
    uint8_t* target = outputs.x[place.part] + head_offset(codec, place);
    RecordView record;
    bool formed = open_record(codec, records, place.block, &record, shared);
    if (formed && record.raw) {
      const uint32_t head_bytes = kBlockTokens * codec.head_dim * Element::kBytes;
      const uint8_t* source = record.part_bytes(place.part) + place.head * head_bytes;
      for (uint32_t i = 16 * threadIdx.x; i < head_bytes; i += 16 * kDecodeThreads) {
        *reinterpret_cast<uint4*>(target + i) = *reinterpret_cast<const uint4*>(source + i);
      }
    } else if (formed) {
      const HeadView view = head_view(codec, record, place);
      load_affines(codec, place.part, view, affines);
      formed = open_rows<kPack>(codec, view, shared);
      if (formed) {
        ValueSink<Element> sink{Restorer(codec, place.part, affines), target};
        unpack_head<kPack>(codec, view, shared, sink);
      }
    }
    if (!formed) report_malformed(place.block, first);
    __syncthreads();
  }
}

struct UnpackOutputs {
  QuantizedOutput parts[kParts];
  uint8_t* order;
};

template <int kPack>
__global__ void __launch_bounds__(kDecodeThreads) UnpackKernel(Codec codec, Records records, UnpackOutputs outputs,
                                                               uint64_t places, unsigned long long* first) {
  __shared__ DecodeShared shared;
  for (uint64_t index = blockIdx.x; index < places; index += gridDim.x) {
    const Place place = place_of(codec, index);
    const QuantizedOutput output = outputs.parts[place.part];
    uint8_t* codes = output.codes + place.block * kBlockTokens * codec.channels + place.head * codec.head_dim;
    float* scales = output.scales + place.block * codec.groups[place.part];
    int32_t* zeros = output.zeros + place.block * codec.groups[place.part];
    RecordView record;
    bool formed = open_record(codec, records, place.block, &record, shared);
    if (formed && record.raw) {
      for (uint32_t i = threadIdx.x; i < kBlockTokens * codec.head_dim / 4; i += kDecodeThreads) {
        const uint32_t token = 4 * i / codec.head_dim, channel = 4 * i % codec.head_dim;
        *reinterpret_cast<uint32_t*>(codes + token * codec.channels + channel) = 0;
      }
    } else if (formed) {
      const HeadView view = head_view(codec, record, place);
      formed = open_rows<kPack>(codec, view, shared);
      if (formed) {
        CodeSink sink{codes, codec.channels};
        unpack_head<kPack>(codec, view, shared, sink);
      }
    }
    if (!formed) report_malformed(place.block, first);
    if (formed && place.head == 0) {
      const HeadView view = record.raw ? HeadView{} : head_view(codec, record, place);
      for (uint32_t group = threadIdx.x; group < codec.groups[place.part]; group += kDecodeThreads) {
        scales[group] = record.raw ? NAN : stored_scale(codec, view, group);
        zeros[group] = record.raw ? 0 : stored_zero(view, group);
      }
      if (place.part == PH_KV_KEYS && threadIdx.x < kBlockTokens) {
        outputs.order[place.block * kBlockTokens + threadIdx.x] = shared.order[threadIdx.x];
      }
    }
    __syncthreads();
  }
}

template <typename Element>
__global__ void __launch_bounds__(kDecodeThreads) DequantizeKernel(Codec codec, uint32_t part, QuantizedInput input,
                                                                   uint8_t* x, uint64_t places) {
  __shared__ HeadAffines affines;
  for (uint64_t index = blockIdx.x; index < places; index += gridDim.x) {
    const Place place = {index / codec.heads, part, static_cast<uint32_t>(index % codec.heads)};
    const uint64_t groups = place.block * codec.groups[part];
    const uint32_t count = per_channel(codec, part) ? codec.head_dim
                           : codec.quantizer == PH_KV_KIVI ? kBlockTokens * codec.value_groups_per_row
                                                           : kBlockTokens;
    const bool shared_by_heads = codec.quantizer == PH_KV_PACKKV && codec.grouping == PH_KV_PER_TOKEN;
    for (uint32_t i = threadIdx.x; i < count; i += kDecodeThreads) {
      const uint64_t group = groups + (shared_by_heads ? i : place.head * count + i);
      affines.groups[i] = make_float2(input.scales[group], static_cast<float>(input.zeros[group]));
    }
    __syncthreads();
    const uint8_t* codes = input.codes + place.block * kBlockTokens * codec.channels + place.head * codec.head_dim;
    ValueSink<Element> sink{Restorer(codec, part, affines), x + head_offset(codec, place)};
    for (uint32_t i = 4 * threadIdx.x; i < kBlockTokens * codec.head_dim; i += 4 * kDecodeThreads) {
      const uint32_t token = i / codec.head_dim, channel = i % codec.head_dim;
      sink.open(channel);
      sink(token, channel, *reinterpret_cast<const uint32_t*>(codes + token * codec.channels + channel));
    }
    __syncthreads();
  }
}

__device__ __forceinline__ double warp_max(double value) {
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) value = fmax(value, __shfl_xor_sync(kEveryLane, value, distance));
  return value;
}
__device__ __forceinline__ double warp_sum(double value) {
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kEveryLane, value, distance);
  return value;
}

struct Inputs {
  const uint8_t* x[kParts];
};

// Statistics of each (block, part, head), summed by SumKernel in a fixed order.
template <typename Element, int kPack>
__global__ void __launch_bounds__(kDecodeThreads) MeasureKernel(Codec codec, Records records, Inputs originals,
                                                                uint64_t places, ph_kv_statistics* partial,
                                                                unsigned long long* first) {
  __shared__ DecodeShared shared;
  __shared__ HeadAffines affines;
  __shared__ unsigned long long widths[kMaximumWidth + 1];
  __shared__ uint32_t mask[8];
  __shared__ double errors[kDecodeWarps][3];
  const uint32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  for (uint64_t index = blockIdx.x; index < places; index += gridDim.x) {
    const Place place = place_of(codec, index);
    if (threadIdx.x <= kMaximumWidth) widths[threadIdx.x] = 0;
    if (threadIdx.x < 8) mask[threadIdx.x] = 0;
    RecordView record;
    bool formed = open_record(codec, records, place.block, &record, shared);
    const bool packed = formed && !record.raw;
    const uint8_t* original = originals.x[place.part];
    MeasureSink<Element> sink(Restorer(codec, place.part, affines), original == nullptr ? nullptr : original + head_offset(codec, place));
    if (packed) {
      const HeadView view = head_view(codec, record, place);
      load_affines(codec, place.part, view, affines);
      formed = open_rows<kPack>(codec, view, shared);
      if (formed) {
        for (uint32_t i = threadIdx.x; i < codec.rows_per_head * codec.head_dim; i += kDecodeThreads) {
          const uint32_t row = view.head * codec.rows_per_head + i / codec.head_dim;
          const uint8_t* headers = view.part + view.layout.pack_headers + row * view.layout.header_row_bytes;
          atomicAdd(&widths[pack_header(view, headers, i % codec.head_dim) >> 8], 1ull);
        }
        unpack_head<kPack>(codec, view, shared, sink);
      }
    }
    if (!formed) report_malformed(place.block, first);
    for (int k = 0; k < 8; ++k) {
      const uint32_t word = __reduce_or_sync(kEveryLane, sink.mask[k]);
      if (lane == 0) atomicOr(&mask[k], word);
    }
    const double sums[3] = {warp_max(sink.max_error), warp_max(sink.max_error_over_scale), warp_sum(sink.squared_error)};
    if (lane < 3) errors[warp][lane] = sums[lane];
    __syncthreads();
    if (threadIdx.x == 0) {
      ph_kv_statistics found{};
      const uint32_t part = place.part;
      if (formed && part == PH_KV_KEYS && place.head == 0) {
        found.bytes = record.size;
        found.raw_blocks = record.raw;
        found.ordered_blocks = record.ordered;
      }
      if (formed && packed) {
        for (uint32_t width = 0; width <= kMaximumWidth; ++width) {
          found.widths[9 * part + width] = widths[width];
          found.payload_bits[part] += kPack * width * widths[width];
        }
        for (int k = 0; k < 8; ++k) found.code_mask[8 * part + k] = mask[k];
        found.packs[part] = codec.rows_per_head * codec.head_dim;
        if (original != nullptr) found.compared[part] = kBlockTokens * codec.head_dim;
        for (int i = 0; i < kDecodeWarps; ++i) {
          found.max_error[part] = fmax(found.max_error[part], errors[i][0]);
          found.max_error_over_scale[part] = fmax(found.max_error_over_scale[part], errors[i][1]);
          found.squared_error[part] += errors[i][2];
        }
      }
      partial[index] = found;
    }
    __syncthreads();
  }
}

constexpr int kSumThreads = 256;

// Sums statistics, each thread a run of consecutive ones, in place. One thread block.
__global__ void __launch_bounds__(kSumThreads) SumKernel(ph_kv_statistics* partial, uint64_t count, ph_kv_statistics* total) {
  const uint64_t run = (count + kSumThreads - 1) / kSumThreads;
  const uint64_t begin = min(count, threadIdx.x * run), end = min(count, begin + run);
  for (uint64_t i = begin + 1; i < end; ++i) add_statistics(partial[begin], partial[i]);
  __syncthreads();
  if (threadIdx.x == 0) {
    ph_kv_statistics sum{};
    for (uint64_t i = 0; i < count; i += run) add_statistics(sum, partial[i]);
    *total = sum;
  }
}

void clear_status(ph_device& device, Status* status) {
  PH_CUDA_TRY(cudaMemsetAsync(&status->first, 0xff, sizeof status->first, device.stream));
  PH_CUDA_TRY(cudaMemsetAsync(&status->bytes, 0, sizeof status->bytes, device.stream));
}

unsigned long long* first_of(Status* status) { return reinterpret_cast<unsigned long long*>(&status->first); }

uint64_t places_of(const Codec& codec) { return codec.blocks * kParts * codec.heads; }

}  // namespace

uint64_t measure_workspace_bytes(const Codec& codec) { return places_of(codec) * sizeof(ph_kv_statistics); }

void unpack(ph_device& device, const Codec& codec, Records records, const QuantizedOutput parts[kParts], uint8_t* order,
            Status* status) {
  clear_status(device, status);
  if (codec.blocks == 0) return;
  dispatch_pack(codec.pack, [&](auto pack) {
    UnpackKernel<decltype(pack)::value><<<grid_of(places_of(codec)), kDecodeThreads, 0, device.stream>>>(
        codec, records, UnpackOutputs{{parts[0], parts[1]}, order}, places_of(codec), first_of(status));
  });
  PH_CUDA_TRY(cudaGetLastError());
}

void dequantize(ph_device& device, const Codec& codec, uint32_t part, QuantizedInput input, void* x) {
  if (codec.blocks == 0) return;
  const uint64_t places = codec.blocks * codec.heads;
  dispatch_dtype(codec.dtype, [&](auto element) {
    DequantizeKernel<decltype(element)><<<grid_of(places), kDecodeThreads, 0, device.stream>>>(
        codec, part, input, static_cast<uint8_t*>(x), places);
  });
  PH_CUDA_TRY(cudaGetLastError());
}

void decode(ph_device& device, const Codec& codec, Records records, void* const tensors[kParts], Status* status) {
  clear_status(device, status);
  if (codec.blocks == 0) return;
  const Outputs outputs = {{static_cast<uint8_t*>(tensors[0]), static_cast<uint8_t*>(tensors[1])}};
  dispatch_dtype(codec.dtype, [&](auto element) {
    dispatch_pack(codec.pack, [&](auto pack) {
      DecodeKernel<decltype(element), decltype(pack)::value>
          <<<grid_of(places_of(codec)), kDecodeThreads, 0, device.stream>>>(codec, records, outputs, places_of(codec),
                                                                            first_of(status));
    });
  });
  PH_CUDA_TRY(cudaGetLastError());
}

void measure(ph_device& device, const Codec& codec, Records records, const void* const tensors[kParts],
             ph_kv_statistics* statistics, uint8_t* workspace, Status* status) {
  clear_status(device, status);
  if (codec.blocks == 0) {
    PH_CUDA_TRY(cudaMemsetAsync(statistics, 0, sizeof *statistics, device.stream));
    return;
  }
  ph_kv_statistics* partial = reinterpret_cast<ph_kv_statistics*>(workspace);
  const Inputs originals = {{static_cast<const uint8_t*>(tensors[0]), static_cast<const uint8_t*>(tensors[1])}};
  dispatch_dtype(codec.dtype, [&](auto element) {
    dispatch_pack(codec.pack, [&](auto pack) {
      MeasureKernel<decltype(element), decltype(pack)::value>
          <<<grid_of(places_of(codec)), kDecodeThreads, 0, device.stream>>>(codec, records, originals, places_of(codec),
                                                                            partial, first_of(status));
    });
  });
  PH_CUDA_TRY(cudaGetLastError());
  SumKernel<<<1, kSumThreads, 0, device.stream>>>(partial, places_of(codec), statistics);
  PH_CUDA_TRY(cudaGetLastError());
}

}  // namespace ph::kv
