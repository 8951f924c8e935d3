// Unpack, dequantise, the fused decode and measure on the GPU.
//
// One thread block of four warps per (block, part, head): head_dim * 64 values. A warp takes a row (the packs of P
// positions, 64 / P rows a head), a lane four neighbouring channels: it unpacks eight positions of each at a time (four
// where P is 4) in registers, transposes them, and writes four neighbouring values per position, so a warp writes whole
// rows of up to 128 channels. Per value about 0.35 bytes are read and 2 written (16-bit types). Every access to a
// record is checked against its length first. Deterministic.
#include "kv/launch.cuh"
#include "kv/pack.cuh"
#include "kv/statistics.h"

namespace ph::kv {

namespace {

constexpr int kDecodeThreads = 128;
constexpr int kDecodeWarps = kDecodeThreads / kWarpThreads;
constexpr uint32_t kMaximumRows = kBlockTokens / 4;           // of a head
constexpr uint32_t kMaximumRowGroups = 256 / kGroupChannels;  // of a token and head, kivi values

// Which (block, part, head) a thread block works on.
struct Place {
  uint64_t block;
  uint32_t part, head;
};

__device__ __forceinline__ Place place_of(const Codec& codec, uint32_t index) {
  const uint32_t per_block = kParts * codec.heads, within = index % per_block;
  return {index / per_block, within / codec.heads, within % codec.heads};
}

// One head of one part of a record, and what its thread block shares.
struct HeadView {
  bool formed, raw, ordered;
  uint32_t head, record_bytes, part_bytes;
  const uint8_t* part;
  const uint8_t* order;  // stored order
  PartHeader header;
  PartLayout layout;
};

struct DecodeShared {
  HeadView view;
  uint32_t row_bytes[kMaximumRows];
  unsigned long long seen;
  int malformed;
  uint8_t order[kBlockTokens];
};

// Pack headers of a head: minimum | width << 8, [rows_per_head][head_dim]. Read four at a time: to be 8-aligned.
template <int kPack>
using HeadHeaders = uint16_t[kBlockTokens / kPack * 256];

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
__device__ __forceinline__ uint32_t pack_header(PartHeader header, const uint32_t* row, uint32_t index) {
  const uint32_t bits = header.minimum_bits + header.width_bits;
  const uint32_t begin = index * bits, word = begin / 32;
  const uint32_t low = bits == 0 ? 0 : row[word];
  const uint32_t high = begin % 32 + bits > 32 ? row[word + 1] : 0;
  const uint32_t field = __funnelshift_r(low, high, begin % 32) & ((1u << bits) - 1);
  return (field & ((1u << header.minimum_bits) - 1)) | field >> header.minimum_bits << 8;
}

// What unpacking four fields of `width` bits at once needs of the width.
struct Expansion {
  uint32_t pair_shift, byte_shift, mask;
};

__device__ __forceinline__ Expansion expansion_of(uint32_t width) {
  return {16 - 2 * width, 8 - width, ((1u << width) - 1) * 0x01010101u};
}

// Four bytes from four fields: halves apart, then bytes apart, then what does not belong is cut off.
__device__ __forceinline__ uint32_t expand4(uint32_t bits, Expansion expansion) {
  const uint32_t pairs = __byte_perm(bits, bits << expansion.pair_shift, 0x7610);
  const uint32_t bytes = (pairs & kEven) | (pairs << expansion.byte_shift & ~kEven);
  return bytes & expansion.mask;
}

// Checks the record of a place and what of it this thread block reads; afterwards `shared.view.formed` tells whether
// it is well formed, and for a packed record rows, headers and the order are ready. All threads call it.
template <int kPack>
__device__ void open_head(const Codec& codec, Records records, const Place& place, DecodeShared& shared,
                          HeadHeaders<kPack>& headers) {
  const uint32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  if (threadIdx.x == 0) {
    RecordView record;
    HeadView& view = shared.view;
    view.formed = view_record(codec, records.bytes, records.size, records.offsets, place.block, &record);
    if (view.formed) {
      view.raw = record.raw;
      view.ordered = record.ordered;
      view.head = place.head;
      view.record_bytes = record.size;
      view.part = record.part_bytes(place.part);
      view.part_bytes = record.part_end[place.part] - record.part_start[place.part];
      view.order = record.bytes + kRecordHeaderBytes;
      view.header = record.part[place.part];
      if (!record.raw) view.layout = part_layout(codec, place.part, view.header);
    }
    shared.seen = 0;
    shared.malformed = 0;
  }
  __syncthreads();
  const HeadView& view = shared.view;
  const bool readable = view.formed && !view.raw;
  if (threadIdx.x < kBlockTokens) {
    const uint32_t token = readable && view.ordered ? stored_order(view.order, threadIdx.x) : threadIdx.x;
    shared.order[threadIdx.x] = static_cast<uint8_t>(token);
    if (readable && view.ordered) atomicOr(&shared.seen, 1ull << token);
  }
  if (readable) {
    for (uint32_t index = warp; index < codec.rows_per_head; index += kDecodeWarps) {
      const uint32_t row = view.head * codec.rows_per_head + index;
      const uint32_t* words = reinterpret_cast<const uint32_t*>(view.part + view.layout.pack_headers +
                                                                row * view.layout.header_row_bytes);
      uint32_t widths = 0;
      for (uint32_t channel = lane; channel < codec.head_dim; channel += kWarpThreads) {
        const uint32_t header = pack_header(view.header, words, channel);
        headers[index * codec.head_dim + channel] = static_cast<uint16_t>(header);
        if (header >> 8 > kMaximumWidth) shared.malformed = 1;
        widths += header >> 8;
      }
      widths = __reduce_add_sync(kEveryLane, widths);
      if (lane == 0) shared.row_bytes[index] = payload_row_bytes(kPack, widths);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0 && readable) {
    uint64_t end = read_u32(view.part + view.layout.heads + 4 * view.head);
    const bool aligned = end % 4 == 0;
    for (uint32_t index = 0; index < codec.rows_per_head; ++index) end += shared.row_bytes[index];
    shared.view.formed = aligned && !shared.malformed && view.layout.payloads + end <= view.part_bytes &&
                         (!view.ordered || shared.seen == ~0ull);
  }
  __syncthreads();
}

// Calls sink(position, channel, codes of four channels) for the values of a head.
template <int kPack, typename Sink>
__device__ void unpack_head(const Codec& codec, const DecodeShared& shared, const HeadHeaders<kPack>& headers,
                            Sink& sink) {
  const HeadView& view = shared.view;
  const uint32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  uint32_t start = view.layout.payloads + read_u32(view.part + view.layout.heads + 4 * view.head);
  uint32_t reached = 0;
  for (uint32_t index = warp; index < codec.rows_per_head; index += kDecodeWarps) {
    for (; reached < index; ++reached) start += shared.row_bytes[reached];
    const uint32_t* payload = reinterpret_cast<const uint32_t*>(view.part + start);
    uint32_t before = 0;  // bits of the chunks before
    for (uint32_t begin = 0; begin < codec.head_dim; begin += kChunkChannels) {
      const uint32_t channel = begin + 4 * lane;
      const bool active = channel < codec.head_dim;
      uint2 entries = make_uint2(0, 0);
      if (active) entries = *reinterpret_cast<const uint2*>(headers + index * codec.head_dim + channel);
      const uint32_t width[4] = {entries.x >> 8 & 0xff, entries.x >> 24, entries.y >> 8 & 0xff,
                                 entries.y >> 24};
      const uint32_t minimum = __byte_perm(entries.x, entries.y, 0x6420);
      uint32_t total;
      uint32_t bit = before + warp_exclusive_sum(kPack * (width[0] + width[1] + width[2] + width[3]), &total);
      before += total;
      if (!active) continue;
      sink.open(channel);
      uint32_t base[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        base[j] = bit;
        bit += kPack * width[j];
      }
      // Eight positions of a channel at a time: their bits fit two words after alignment.
      constexpr int kRun = kPack < 8 ? kPack : 8;
#pragma unroll
      for (int run = 0; run < kPack; run += kRun) {
        uint32_t codes[4][kRun / 4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Expansion expansion = expansion_of(width[j]);
          const uint32_t offset = base[j] + run * width[j], shift = offset % 32,
                         end = shift + kRun * width[j];
          const uint32_t* source = payload + offset / 32;
          // A word is read only if bits of the row are in it, so the reads stay within what open_head checked.
          const uint32_t first = width[j] > 0 ? __ldg(source) : 0;
          const uint32_t second = end > 32 ? __ldg(source + 1) : 0;
          const uint32_t low = __funnelshift_r(first, second, shift);
          codes[j][0] = expand4(low, expansion);
          if constexpr (kRun == 8) {
            const uint32_t third = end > 64 ? __ldg(source + 2) : 0;
            const uint32_t high = __funnelshift_r(second, third, shift);
            codes[j][1] = expand4(__funnelshift_rc(low, high, 4 * width[j]), expansion);
          }
        }
#pragma unroll
        for (int i = 0; i < kRun / 4; ++i) {
          const uint32_t positions[4] = {codes[0][i], codes[1][i], codes[2][i], codes[3][i]};
          uint32_t channels[4];
          transpose4(positions, channels);
#pragma unroll
          for (int k = 0; k < 4; ++k) sink(index * kPack + run + 4 * i + k, channel, channels[k] + minimum);
        }
      }
    }
  }
}

// ---- sinks ----

struct CodeSink {
  const uint8_t* order;
  uint8_t* codes;  // of this head, token 0
  uint32_t channels;

  __device__ __forceinline__ void open(uint32_t) {}
  __device__ __forceinline__ void operator()(uint32_t position, uint32_t channel, uint32_t four) {
    *reinterpret_cast<uint32_t*>(codes + order[position] * channels + channel) = four;
  }
};

// What turns codes into values, in shared memory.
struct HeadAffines {
  // By position (packkv): scale, zero point, and the token's offset in values as bits of a float.
  float4 positions[kBlockTokens];
  // kivi: scale and zero point by channel (keys), or by token and channel group (values).
  float2 groups[kBlockTokens * kMaximumRowGroups];
};

// `affine(group)` is the scale and zero point of a group of the head's block, `order` the token of each position.
template <typename AffineOf>
__device__ void load_affines(const Codec& codec, uint32_t part, uint32_t head, const uint8_t* order,
                             HeadAffines& affines, AffineOf affine_of) {
  if (codec.quantizer == PH_KV_KIVI) {
    const uint32_t count = part == PH_KV_KEYS ? codec.head_dim : kBlockTokens * codec.value_groups_per_row;
    for (uint32_t i = threadIdx.x; i < count; i += kDecodeThreads)
      affines.groups[i] = affine_of(head * count + i);
  }
  if (threadIdx.x < kBlockTokens) {
    const uint32_t token = order[threadIdx.x];
    float2 affine = make_float2(1.0f, 0.0f);
    if (codec.quantizer == PH_KV_PACKKV) {
      affine = affine_of(codec.grouping == PH_KV_PER_TOKEN ? token : head * kBlockTokens + token);
    }
    affines.positions[threadIdx.x] =
        make_float4(affine.x, affine.y, __uint_as_float(token * codec.head_dim), 0.0f);
  }
}

// x' of four codes.
struct Restorer {
  const Codec& codec;
  const uint32_t part;
  const HeadAffines& affines;
  float2 channel_affines[4];

  __device__ Restorer(const Codec& the_codec, uint32_t the_part, const HeadAffines& the_affines)
      : codec(the_codec), part(the_part), affines(the_affines) {}

  __device__ __forceinline__ void open(uint32_t channel) {
    if (!per_channel(codec, part)) return;
#pragma unroll
    for (int j = 0; j < 4; ++j) channel_affines[j] = affines.groups[channel + j];
  }

  // Returns the offset of the first of the four values, in values from the head's first.
  __device__ __forceinline__ uint32_t restore(uint32_t position, uint32_t channel, uint32_t four,
                                              float (&x)[4], float (&scale)[4]) const {
    const float4 place = affines.positions[position];
    const uint32_t row = __float_as_uint(place.z);
    float2 affine = make_float2(place.x, place.y);
    if (codec.quantizer == PH_KV_KIVI && part == PH_KV_VALUES) {
      affine = affines.groups[row / codec.head_dim * codec.value_groups_per_row + channel / kGroupChannels];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 chosen = per_channel(codec, part) ? channel_affines[j] : affine;
      // 2^23 + code has the code in its low bits; the subtraction is exact.
      const float code = __uint_as_float(__byte_perm(four, 0x4b000000u, 0x7540 + j)) - 8388608.0f;
      x[j] = __fmul_rn(__fadd_rn(code, chosen.y), chosen.x);
      scale[j] = chosen.x;
    }
    return row + channel;
  }
};

template <typename Element>
__device__ __forceinline__ float saturate(float x) {
  const float low = x > Element::kLargest ? Element::kLargest : x;  // keeps a NaN
  return low < -Element::kLargest ? -Element::kLargest : low;
}

// Rounds and stores; a 16-bit value past the largest finite one rounds to infinity and is then cut back to it.
template <typename Element>
__device__ __forceinline__ void store4(uint8_t* target, const float (&x)[4]) {
  if constexpr (std::is_same_v<Element, F32>) {
    *reinterpret_cast<float4*>(target) =
        make_float4(saturate<F32>(x[0]), saturate<F32>(x[1]), saturate<F32>(x[2]), saturate<F32>(x[3]));
  } else if constexpr (std::is_same_v<Element, F16>) {
    const __half2 high = __half2half2(__ushort_as_half(0x7bff)), low = __half2half2(__ushort_as_half(0xfbff));
    __half2 pairs[2] = {__floats2half2_rn(x[0], x[1]), __floats2half2_rn(x[2], x[3])};
    for (__half2& pair : pairs) pair = __hmax2_nan(__hmin2_nan(pair, high), low);
    *reinterpret_cast<uint2*>(target) = *reinterpret_cast<const uint2*>(pairs);
  } else {
    const __nv_bfloat162 high = __bfloat162bfloat162(__ushort_as_bfloat16(0x7f7f));
    const __nv_bfloat162 low = __bfloat162bfloat162(__ushort_as_bfloat16(0xff7f));
    __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(x[0], x[1]), __floats2bfloat162_rn(x[2], x[3])};
    for (__nv_bfloat162& pair : pairs) pair = __hmax2_nan(__hmin2_nan(pair, high), low);
    *reinterpret_cast<uint2*>(target) = *reinterpret_cast<const uint2*>(pairs);
  }
}

template <typename Element>
struct ValueSink {
  Restorer restorer;
  uint8_t* head;  // the head's first value of the block

  __device__ __forceinline__ void open(uint32_t channel) { restorer.open(channel); }
  __device__ __forceinline__ void operator()(uint32_t position, uint32_t channel, uint32_t four) {
    float x[4], scale[4];
    const uint32_t offset = restorer.restore(position, channel, four, x, scale);
    store4<Element>(head + offset * Element::kBytes, x);
  }
};

// Errors and codes that one thread saw.
template <typename Element>
struct MeasureSink {
  Restorer restorer;
  const uint8_t* head;  // null without originals
  uint32_t mask[8] = {};
  double max_error = 0, max_error_over_scale = 0, squared_error = 0;

  __device__ MeasureSink(Restorer the_restorer, const uint8_t* the_head)
      : restorer(the_restorer), head(the_head) {}
  __device__ __forceinline__ void open(uint32_t channel) { restorer.open(channel); }
  __device__ void operator()(uint32_t position, uint32_t channel, uint32_t four) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t code = four >> 8 * j & 0xff;
#pragma unroll
      for (uint32_t k = 0; k < 8; ++k) mask[k] |= code / 32 == k ? 1u << code % 32 : 0;
    }
    if (head == nullptr) return;
    float x[4], scale[4];
    const uint32_t offset = restorer.restore(position, channel, four, x, scale);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float original = value_at<Element>(head + (offset + j) * Element::kBytes);
      const double error = fabs(static_cast<double>(saturate<Element>(x[j])) - static_cast<double>(original));
      max_error = error > max_error ? error : max_error;
      const double over_scale = error / static_cast<double>(scale[j]);
      max_error_over_scale = over_scale > max_error_over_scale ? over_scale : max_error_over_scale;
      squared_error += error * error;
    }
  }
};

// ---- kernels ----

__device__ void report_malformed(uint64_t block, unsigned long long* first) {
  if (threadIdx.x == 0) atomicMin(first, static_cast<unsigned long long>(block));
}

__device__ __forceinline__ uint64_t head_offset(const Codec& codec, const Place& place) {
  return (place.head * codec.tokens + place.block * kBlockTokens) * codec.head_dim * codec.element_bytes;
}

struct Outputs {
  uint8_t* x[kParts];
};

__device__ void load_stored_affines(const Codec& codec, uint32_t part, const DecodeShared& shared,
                                    HeadAffines& affines) {
  load_affines(codec, part, shared.view.head, shared.order, affines, [&](uint32_t group) {
    return make_float2(stored_scale(codec, shared.view, group),
                       static_cast<float>(stored_zero(shared.view, group)));
  });
  __syncthreads();
}

template <typename Element, int kPack>
__global__ void __launch_bounds__(kDecodeThreads, 8)
    DecodeKernel(const __grid_constant__ Codec codec, Records records, Outputs outputs,
                 unsigned long long* first) {
  __shared__ DecodeShared shared;
  __shared__ __align__(8) HeadHeaders<kPack> headers;
  __shared__ HeadAffines affines;
  const Place place = place_of(codec, blockIdx.x);
  uint8_t* target = outputs.x[place.part] + head_offset(codec, place);
  open_head<kPack>(codec, records, place, shared, headers);
  if (!shared.view.formed) return report_malformed(place.block, first);
  if (shared.view.raw) {
    const uint32_t head_bytes = kBlockTokens * codec.head_dim * Element::kBytes;
    const uint8_t* source = shared.view.part + place.head * head_bytes;
    for (uint32_t i = 16 * threadIdx.x; i < head_bytes; i += 16 * kDecodeThreads) {
      *reinterpret_cast<uint4*>(target + i) = *reinterpret_cast<const uint4*>(source + i);
    }
    return;
  }
  load_stored_affines(codec, place.part, shared, affines);
  ValueSink<Element> sink{Restorer(codec, place.part, affines), target};
  unpack_head<kPack>(codec, shared, headers, sink);
}

struct UnpackOutputs {
  QuantizedOutput parts[kParts];
  uint8_t* order;
};

template <int kPack>
__global__ void __launch_bounds__(kDecodeThreads)
    UnpackKernel(const __grid_constant__ Codec codec, Records records, UnpackOutputs outputs,
                 unsigned long long* first) {
  __shared__ DecodeShared shared;
  __shared__ __align__(8) HeadHeaders<kPack> headers;
  const Place place = place_of(codec, blockIdx.x);
  open_head<kPack>(codec, records, place, shared, headers);
  if (!shared.view.formed) return report_malformed(place.block, first);
  const QuantizedOutput output = outputs.parts[place.part];
  uint8_t* codes = output.codes + place.block * kBlockTokens * codec.channels + place.head * codec.head_dim;
  if (shared.view.raw) {
    for (uint32_t i = 4 * threadIdx.x; i < kBlockTokens * codec.head_dim; i += 4 * kDecodeThreads) {
      *reinterpret_cast<uint32_t*>(codes + i / codec.head_dim * codec.channels + i % codec.head_dim) = 0;
    }
  } else {
    CodeSink sink{shared.order, codes, codec.channels};
    unpack_head<kPack>(codec, shared, headers, sink);
  }
  if (place.head != 0) return;
  float* scales = output.scales + place.block * codec.groups[place.part];
  int32_t* zeros = output.zeros + place.block * codec.groups[place.part];
  for (uint32_t group = threadIdx.x; group < codec.groups[place.part]; group += kDecodeThreads) {
    scales[group] = shared.view.raw ? NAN : stored_scale(codec, shared.view, group);
    zeros[group] = shared.view.raw ? 0 : stored_zero(shared.view, group);
  }
  if (place.part == PH_KV_KEYS && threadIdx.x < kBlockTokens) {
    outputs.order[place.block * kBlockTokens + threadIdx.x] = shared.order[threadIdx.x];
  }
}

template <typename Element>
__global__ void __launch_bounds__(kDecodeThreads)
    DequantizeKernel(const __grid_constant__ Codec codec, uint32_t part, QuantizedInput input, uint8_t* x) {
  __shared__ uint8_t order[kBlockTokens];
  __shared__ HeadAffines affines;
  const Place place = {blockIdx.x / codec.heads, part, blockIdx.x % codec.heads};
  const uint64_t groups = place.block * codec.groups[part];
  if (threadIdx.x < kBlockTokens) order[threadIdx.x] = static_cast<uint8_t>(threadIdx.x);
  __syncthreads();
  load_affines(codec, part, place.head, order, affines, [&](uint32_t group) {
    return make_float2(input.scales[groups + group], static_cast<float>(input.zeros[groups + group]));
  });
  __syncthreads();
  const uint8_t* codes =
      input.codes + place.block * kBlockTokens * codec.channels + place.head * codec.head_dim;
  ValueSink<Element> sink{Restorer(codec, part, affines), x + head_offset(codec, place)};
  for (uint32_t i = 4 * threadIdx.x; i < kBlockTokens * codec.head_dim; i += 4 * kDecodeThreads) {
    const uint32_t token = i / codec.head_dim, channel = i % codec.head_dim;
    sink.open(channel);
    sink(token, channel, *reinterpret_cast<const uint32_t*>(codes + token * codec.channels + channel));
  }
}

__device__ __forceinline__ double warp_max(double value) {
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2)
    value = fmax(value, __shfl_xor_sync(kEveryLane, value, distance));
  return value;
}
__device__ __forceinline__ double warp_sum(double value) {
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(kEveryLane, value, distance);
  return value;
}

// Statistics of each (block, part, head), summed by SumKernel in a fixed order.
template <typename Element, int kPack>
__global__ void __launch_bounds__(kDecodeThreads)
    MeasureKernel(const __grid_constant__ Codec codec, Records records, Tensors originals,
                  ph_kv_statistics* partial, unsigned long long* first) {
  __shared__ DecodeShared shared;
  __shared__ __align__(8) HeadHeaders<kPack> headers;
  __shared__ HeadAffines affines;
  __shared__ uint32_t widths[kMaximumWidth + 1];
  __shared__ uint32_t mask[8];
  __shared__ double errors[kDecodeWarps][3];
  const uint32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  const Place place = place_of(codec, blockIdx.x);
  const uint8_t* original = originals.x[place.part];
  if (threadIdx.x <= kMaximumWidth) widths[threadIdx.x] = 0;
  if (threadIdx.x < 8) mask[threadIdx.x] = 0;
  open_head<kPack>(codec, records, place, shared, headers);
  const bool formed = shared.view.formed, packed = formed && !shared.view.raw;
  if (!formed) report_malformed(place.block, first);
  MeasureSink<Element> sink(Restorer(codec, place.part, affines),
                            original == nullptr ? nullptr : original + head_offset(codec, place));
  if (packed) {
    load_stored_affines(codec, place.part, shared, affines);
    for (uint32_t i = threadIdx.x; i < codec.rows_per_head * codec.head_dim; i += kDecodeThreads) {
      atomicAdd(&widths[headers[i] >> 8], 1u);
    }
    unpack_head<kPack>(codec, shared, headers, sink);
  }
  __syncthreads();
  for (int k = 0; k < 8; ++k) {
    const uint32_t word = __reduce_or_sync(kEveryLane, sink.mask[k]);
    if (lane == 0) atomicOr(&mask[k], word);
  }
  const double sums[3] = {warp_max(sink.max_error), warp_max(sink.max_error_over_scale),
                          warp_sum(sink.squared_error)};
  if (lane == 0) {
    for (int i = 0; i < 3; ++i) errors[warp][i] = sums[i];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  ph_kv_statistics found{};
  const uint32_t part = place.part;
  if (formed && part == PH_KV_KEYS && place.head == 0) {
    found.bytes = shared.view.record_bytes;
    found.raw_blocks = shared.view.raw;
    found.ordered_blocks = shared.view.ordered;
  }
  if (packed) {
    for (uint32_t width = 0; width <= kMaximumWidth; ++width) {
      found.widths[9 * part + width] = widths[width];
      found.payload_bits[part] += static_cast<uint64_t>(kPack) * width * widths[width];
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
  partial[blockIdx.x] = found;
}

constexpr int kSumThreads = 256;

// Sums statistics, each thread a run of consecutive ones, in place. One thread block.
__global__ void __launch_bounds__(kSumThreads)
    SumKernel(ph_kv_statistics* partial, uint64_t count, ph_kv_statistics* total) {
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

uint64_t places_of(const Codec& codec) { return codec.blocks * kParts * codec.heads; }

}  // namespace

uint64_t measure_workspace_bytes(const Codec& codec) { return places_of(codec) * sizeof(ph_kv_statistics); }

void unpack(ph_device& device, const Codec& codec, Records records, const QuantizedOutput parts[kParts],
            uint8_t* order, Status* status) {
  clear_status(device, status);
  if (codec.blocks == 0) return;
  dispatch_pack(codec.pack, [&](auto pack) {
    UnpackKernel<decltype(pack)::value><<<grid_of(places_of(codec)), kDecodeThreads, 0, device.stream>>>(
        codec, records, UnpackOutputs{{parts[0], parts[1]}, order}, first_of(status));
  });
  PH_CUDA_TRY(cudaGetLastError());
}

void dequantize(ph_device& device, const Codec& codec, uint32_t part, QuantizedInput input, void* x) {
  if (codec.blocks == 0) return;
  dispatch_dtype(codec.dtype, [&](auto element) {
    DequantizeKernel<decltype(element)>
        <<<grid_of(codec.blocks * codec.heads), kDecodeThreads, 0, device.stream>>>(codec, part, input,
                                                                                    static_cast<uint8_t*>(x));
  });
  PH_CUDA_TRY(cudaGetLastError());
}

void decode(ph_device& device, const Codec& codec, Records records, void* const tensors[kParts],
            Status* status) {
  clear_status(device, status);
  if (codec.blocks == 0) return;
  const Outputs outputs = {{static_cast<uint8_t*>(tensors[0]), static_cast<uint8_t*>(tensors[1])}};
  dispatch_dtype(codec.dtype, [&](auto element) {
    dispatch_pack(codec.pack, [&](auto pack) {
      DecodeKernel<decltype(element), decltype(pack)::value>
          <<<grid_of(places_of(codec)), kDecodeThreads, 0, device.stream>>>(codec, records, outputs,
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
  const Tensors originals = tensors_of(tensors);
  dispatch_dtype(codec.dtype, [&](auto element) {
    dispatch_pack(codec.pack, [&](auto pack) {
      MeasureKernel<decltype(element), decltype(pack)::value>
          <<<grid_of(places_of(codec)), kDecodeThreads, 0, device.stream>>>(codec, records, originals,
                                                                            partial, first_of(status));
    });
  });
  PH_CUDA_TRY(cudaGetLastError());
  SumKernel<<<1, kSumThreads, 0, device.stream>>>(partial, places_of(codec), statistics);
  PH_CUDA_TRY(cudaGetLastError());
}

}  // namespace ph::kv
