// Step 1 on the GPU: one thread block quantises one part of a block of 64 tokens into codes in shared memory (or
// wherever `codes` points). packkv up to 1,024 channels and kivi values read every value once, in 16-byte accesses;
// packkv beyond that, per token, reads the rest of a token twice, and kivi keys are read twice, one element per access.
// Second reads usually hit the cache. Deterministic.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "kv/codec.h"

namespace ph::kv {

constexpr int kWarpThreads = 32;
constexpr int kEncodeThreads = 512;
constexpr int kEncodeWarps = kEncodeThreads / kWarpThreads;
constexpr uint32_t kEveryLane = 0xffffffffu;
// Vectors of a token that a lane keeps in registers: 1,024 channels; the rest is read again.
constexpr int kHeld = 4;

// threadIdx.x, read anew: what follows from it does not stay in registers from one phase of a kernel to the next.
__device__ __forceinline__ uint32_t thread_index() {
  uint32_t index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// ---- eight consecutive values ----

template <typename Pair, typename Pairs>
struct PairVector {
  Pair pairs[4];

  __device__ __forceinline__ void load(const uint8_t* source) {
    *reinterpret_cast<uint4*>(pairs) = *reinterpret_cast<const uint4*>(source);
  }
  __device__ __forceinline__ float at(int i) const {
    return i % 2 == 0 ? Pairs::low(pairs[i / 2]) : Pairs::high(pairs[i / 2]);
  }

  // The extremes of a lane's vectors; a NaN stays.
  struct Extremes {
    Pair minimum = Pairs::pair(INFINITY), maximum = Pairs::pair(-INFINITY);

    __device__ __forceinline__ void add(const PairVector& vector) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        minimum = __hmin2_nan(minimum, vector.pairs[i]);
        maximum = __hmax2_nan(maximum, vector.pairs[i]);
      }
    }
    // As floats; an infinite range where there was a NaN.
    __device__ __forceinline__ void finish(float& low, float& high) const {
      const float a = Pairs::low(minimum), b = Pairs::high(minimum);
      low = fminf(a, b);
      high = fmaxf(Pairs::low(maximum), Pairs::high(maximum));
      if (!(a == a && b == b)) high = INFINITY, low = -INFINITY;
    }
  };
};

struct HalfPairs {
  static __device__ __forceinline__ float low(__half2 pair) { return __low2float(pair); }
  static __device__ __forceinline__ float high(__half2 pair) { return __high2float(pair); }
  static __device__ __forceinline__ __half2 pair(float value) { return __float2half2_rn(value); }
};
struct BfloatPairs {
  static __device__ __forceinline__ float low(__nv_bfloat162 pair) { return __low2float(pair); }
  static __device__ __forceinline__ float high(__nv_bfloat162 pair) { return __high2float(pair); }
  static __device__ __forceinline__ __nv_bfloat162 pair(float value) { return __float2bfloat162_rn(value); }
};

struct F16 {
  static constexpr uint32_t kBytes = 2;
  static constexpr float kLargest = 65504.0f;
  using Vector = PairVector<__half2, HalfPairs>;
};
struct BF16 {
  static constexpr uint32_t kBytes = 2;
  static constexpr float kLargest = 0x1.fep127f;
  using Vector = PairVector<__nv_bfloat162, BfloatPairs>;
};
struct F32 {
  static constexpr uint32_t kBytes = 4;
  static constexpr float kLargest = 0x1.fffffep127f;
  struct Vector {
    float values[8];
    __device__ __forceinline__ void load(const uint8_t* source) {
      reinterpret_cast<float4*>(values)[0] = reinterpret_cast<const float4*>(source)[0];
      reinterpret_cast<float4*>(values)[1] = reinterpret_cast<const float4*>(source)[1];
    }
    __device__ __forceinline__ float at(int i) const { return values[i]; }
    struct Extremes {
      float minimum = INFINITY, maximum = -INFINITY;
      bool numbers = true;

      __device__ __forceinline__ void add(const Vector& vector) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          minimum = fminf(minimum, vector.values[i]);
          maximum = fmaxf(maximum, vector.values[i]);
          numbers = numbers && vector.values[i] == vector.values[i];
        }
      }
      __device__ __forceinline__ void finish(float& low, float& high) const {
        low = numbers ? minimum : -INFINITY;
        high = numbers ? maximum : INFINITY;
      }
    };
  };
};

// Division of f16 values: 1 / divisor in two floats, good to 2^-46. The quotient of two 11-bit significands is no
// closer than 2^-36 to a midpoint of float32, so it comes out correctly rounded; nothing over- or underflows.
struct Reciprocal {
  float high, low;

  __device__ __forceinline__ explicit Reciprocal(float divisor) {
    asm("rcp.approx.f32 %0, %1;" : "=f"(high) : "f"(divisor));
    low = __fmul_rn(__fmaf_rn(-high, divisor, 1.0f), high);
  }
  __device__ __forceinline__ float quotient(float x) const { return __fmaf_rn(x, high, __fmul_rn(x, low)); }
};

constexpr float kRoundingMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to even for |x| < 2^22

// group_affine with the GPU's own conversions for f16, whose rounding is the same.
template <typename Element>
__device__ __forceinline__ Affine element_affine(const Codec& codec, uint32_t part, float minimum,
                                                 float maximum) {
  if constexpr (std::is_same_v<Element, F16>) {
    if (minimum == maximum) return group_affine(codec, part, minimum, maximum);
    const bool kivi = codec.quantizer == PH_KV_KIVI;
    const float limit = static_cast<float>(codec.code_limit[part]), range = maximum - minimum;
    const __half stored =
        kivi ? __float2half_ru(__fdiv_rn(range, limit)) : __float2half_rn(range * codec.rel[part]);
    float scale = fminf(fmaxf(__half2float(stored), 0x1p-24f), F16::kLargest);
    if (limit * scale < range)
      scale = __half2float(__ushort_as_half(__half_as_ushort(__float2half_rn(scale)) + 1));
    const float zero = __fadd_rn(Reciprocal(scale).quotient(minimum), kRoundingMagic) - kRoundingMagic;
    return {scale, zero};
  } else {
    return group_affine(codec, part, minimum, maximum);
  }
}

// x / scale, rounded to an integer, as the last bits of a float. Of f16 values with a quotient below 2^9, no quotient
// is closer to a midpoint between integers than 2^-12 (2^-13 about 1/2) without being on it: on the way the product
// with the plain reciprocal, off by less than 2^-14, is rounded to multiples of 2^-13, which a midpoint is.
struct NearRounding {
  static constexpr float kLimit = 511.0f, kSnap = 1536.0f;  // 1.5 * 2^10
  float reciprocal;

  __device__ __forceinline__ int operator()(float x) const {
    return __float_as_int(__fadd_rn(__fmaf_rn(x, reciprocal, kSnap), kRoundingMagic - kSnap));
  }
};
struct FarRounding {
  Reciprocal reciprocal;

  __device__ __forceinline__ int operator()(float x) const {
    return __float_as_int(__fadd_rn(reciprocal.quotient(x), kRoundingMagic));
  }
};

// Codes of values, one byte each.
template <typename Element>
struct CodeMaker {
  Affine affine;
  uint32_t limit;

  __device__ __forceinline__ uint32_t code(float x) const {
    return static_cast<uint32_t>(quantize_value(x, affine, static_cast<float>(limit)));
  }

  template <typename Vector>
  __device__ __forceinline__ uint2 codes(const Vector& vector) const {
    uint32_t words[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t low = __byte_perm(code(vector.at(4 * half)), code(vector.at(4 * half + 1)), 0x0040);
      const uint32_t high = __byte_perm(code(vector.at(4 * half + 2)), code(vector.at(4 * half + 3)), 0x0040);
      words[half] = __byte_perm(low, high, 0x5410);
    }
    return make_uint2(words[0], words[1]);
  }
};

// Of f16, two at a time: the last 16 bits of the rounded quotients are enough.
template <typename Rounding>
struct HalfCodeMaker {
  Rounding rounding;
  uint32_t zeros, limits;  // minus the zero point and the largest code, twice

  __device__ __forceinline__ uint32_t pair(float low, float high) const {
    return __viaddmin_u16x2(__byte_perm(rounding(low), rounding(high), 0x5410), zeros, limits);
  }
  template <typename Vector>
  __device__ __forceinline__ uint2 codes(const Vector& vector) const {
    const auto word = [&](int i) {
      return __byte_perm(pair(vector.at(i), vector.at(i + 1)), pair(vector.at(i + 2), vector.at(i + 3)),
                         0x6420);
    };
    return make_uint2(word(0), word(4));
  }
  __device__ __forceinline__ uint32_t code(float x) const { return pair(x, x) & 0xff; }
};

// Calls `use` with what makes codes of a group, whose finite values lie between `minimum` and `maximum`.
template <typename Element, typename Use>
__device__ __forceinline__ void with_code_maker(Affine affine, uint32_t limit, float minimum, float maximum,
                                                Use use) {
  if constexpr (std::is_same_v<Element, F16>) {
    const Reciprocal reciprocal(affine.scale);
    const uint32_t zeros = (0u - static_cast<uint32_t>(static_cast<int>(affine.zero)) & 0xffff) * 0x10001u;
    const uint32_t limits = limit * 0x10001u;
    if (fmaxf(-minimum, maximum) * reciprocal.high < NearRounding::kLimit)
      use(HalfCodeMaker<NearRounding>{{reciprocal.high}, zeros, limits});
    else use(HalfCodeMaker<FarRounding>{{reciprocal}, zeros, limits});
  } else {
    use(CodeMaker<Element>{affine, limit});
  }
}

// Where the quantised part goes; `first_non_finite` and `zero_bytes` are shared by the thread block.
struct PartTarget {
  uint8_t* codes;  // [64, channels]
  float* scales;   // [groups]
  int32_t* zeros;  // [groups]
  unsigned long long* first_non_finite;
  int* zero_bytes;
  uint4* landing;  // [warps][kHeld][lanes], in shared memory: values on their way
};

template <typename Element>
__device__ __forceinline__ const uint8_t* value_address(const Codec& codec, const uint8_t* x, uint64_t block,
                                                        uint32_t head, uint32_t token, uint32_t channel) {
  return x +
         ((head * codec.tokens + block * kBlockTokens + token) * codec.head_dim + channel) * Element::kBytes;
}

// Floats in the order of their values, as integers; its own inverse.
__device__ __forceinline__ int ordered_bits(int bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

__device__ __forceinline__ void reduce_warp_extremes(float& minimum, float& maximum) {
  const int low = __reduce_min_sync(kEveryLane, ordered_bits(__float_as_int(minimum)));
  const int high = __reduce_max_sync(kEveryLane, ordered_bits(__float_as_int(maximum)));
  minimum = __int_as_float(ordered_bits(low));
  maximum = __int_as_float(ordered_bits(high));
}

__device__ __forceinline__ void reduce_extremes(float& minimum, float& maximum, int team) {
  for (int distance = team / 2; distance > 0; distance /= 2) {
    minimum = fminf(minimum, __shfl_xor_sync(kEveryLane, minimum, distance));
    maximum = fmaxf(maximum, __shfl_xor_sync(kEveryLane, maximum, distance));
  }
}

template <typename Element>
__device__ __forceinline__ Affine close_group(const Codec& codec, uint32_t part, float minimum,
                                              float maximum) {
  return group_finite(minimum, maximum) ? element_affine<Element>(codec, part, minimum, maximum)
                                        : Affine{1.0f, 0.0f};
}

__device__ __forceinline__ void write_group(const PartTarget& target, uint32_t group, Affine affine) {
  const int32_t zero = static_cast<int32_t>(affine.zero);
  target.scales[group] = affine.scale;
  target.zeros[group] = zero;
  const int bytes = static_cast<int>(zero_point_bytes(zero));
  if (bytes > 1) atomicMax(target.zero_bytes, bytes);
}

template <typename Element>
__device__ bool vector_finite(const typename Element::Vector& vector) {
  bool finite = true;
  for (int i = 0; i < 8; ++i) finite = finite && vector.at(i) * 0.0f == 0.0f;
  return finite;
}

// Sixteen bytes from device memory to shared memory, past the registers.
__device__ __forceinline__ void copy_async(uint4* target, const uint8_t* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(target))),
               "l"(source)
               : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// packkv, per token: a warp per token, a lane takes eight values at a time. kFull: every lane has kHeld of them.
template <typename Element, bool kFull>
__device__ void quantize_tokens(const Codec& codec, uint32_t part, const uint8_t* x, uint64_t block,
                                PartTarget target) {
  const uint32_t thread = thread_index(), warp = thread / kWarpThreads, lane = thread % kWarpThreads;
  const uint32_t vectors = codec.channels / 8, per_head = codec.head_dim / 8;
  const uint8_t* start = value_address<Element>(codec, x, block, 0, 0, 0);
  // Exact quotients, as per_head <= 32 and vectors < 2^27.
  const uint32_t reciprocal = 0xffffffffu / per_head + 1;
  // In vectors from the block's first value; below 2^32, as check_offsets sees to.
  const auto offset_of = [&](uint32_t vector) {
    const uint32_t head = __umulhi(vector, reciprocal);
    return static_cast<uint32_t>(head * codec.tokens) * per_head + vector - head * per_head;
  };
  uint32_t offsets[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) offsets[i] = offset_of(lane + kWarpThreads * i);
  const auto address = [&](uint32_t token, uint32_t offset) {
    return start + static_cast<uint64_t>(offset + token * per_head) * (8 * Element::kBytes);
  };
  const auto has = [&](int i) { return kFull || lane + kWarpThreads * i < vectors; };
  // Of 16-bit values, the next token's are on their way to shared memory while this one's are worked on. A lane copies
  // and reads only its own, so no barrier is needed.
  constexpr bool kLanding = sizeof(typename Element::Vector) == sizeof(uint4);
  uint4* landing = target.landing + warp * kHeld * kWarpThreads + lane;
  const auto land = [&](uint32_t token) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (has(i)) copy_async(landing + kWarpThreads * i, address(token, offsets[i]));
    }
    copy_commit();
  };
  if constexpr (kLanding) land(warp);
  for (uint32_t token = warp; token < kBlockTokens; token += kEncodeWarps) {
    typename Element::Vector held[kHeld], other;
    typename Element::Vector::Extremes extremes;
    float minimum, maximum;
    if constexpr (kLanding) copy_wait();
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (!has(i)) continue;
      held[i].load(kLanding ? reinterpret_cast<const uint8_t*>(landing + kWarpThreads * i)
                            : address(token, offsets[i]));
      extremes.add(held[i]);
    }
    if constexpr (kLanding) {
      if (token + kEncodeWarps < kBlockTokens) land(token + kEncodeWarps);
    }
    for (uint32_t vector = lane + kWarpThreads * kHeld; vector < vectors; vector += kWarpThreads) {
      other.load(address(token, offset_of(vector)));
      extremes.add(other);
    }
    extremes.finish(minimum, maximum);
    reduce_warp_extremes(minimum, maximum);
    if (!group_finite(minimum, maximum)) {
      uint32_t head = codec.heads;
      for (uint32_t vector = lane; vector < vectors; vector += kWarpThreads) {
        other.load(address(token, offset_of(vector)));
        if (!vector_finite<Element>(other)) head = min(head, vector / per_head);
      }
      head = __reduce_min_sync(kEveryLane, head);
      if (head == codec.heads) head = 0;  // the range alone overflows
      if (lane == 0)
        atomicMin(target.first_non_finite, non_finite_place(block * kBlockTokens + token, head, part));
    }
    const Affine affine = close_group<Element>(codec, part, minimum, maximum);
    if (lane == 0) write_group(target, token, affine);
    uint2* codes = reinterpret_cast<uint2*>(target.codes + token * codec.channels);
    with_code_maker<Element>(affine, codec.code_limit[part], minimum, maximum, [&](const auto& maker) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (has(i)) codes[lane + kWarpThreads * i] = maker.codes(held[i]);
      }
      for (uint32_t vector = lane + kWarpThreads * kHeld; vector < vectors; vector += kWarpThreads) {
        other.load(address(token, offset_of(vector)));
        codes[vector] = maker.codes(other);
      }
    });
  }
}

// Groups of up to `width` (<= 8 * 32) consecutive channels of one token and head: a team of lanes per group.
template <typename Element>
__device__ void quantize_segments(const Codec& codec, uint32_t part, const uint8_t* x, uint64_t block,
                                  uint32_t width, PartTarget target) {
  uint32_t team = 2;
  while (team * 8 < width) team *= 2;
  const uint32_t teams = kEncodeThreads / team, member = threadIdx.x % team;
  const uint32_t per_row = (codec.head_dim + width - 1) / width;
  const uint32_t segments = codec.heads * kBlockTokens * per_row;
  // Whole warps stay in the loop for the shuffles.
  for (uint32_t first = 0; first < segments; first += teams) {
    const uint32_t segment = first + threadIdx.x / team;
    const bool present = segment < segments;
    const uint32_t row = segment / per_row, begin = segment % per_row * width;
    const uint32_t head = row / kBlockTokens, token = row % kBlockTokens, channel = begin + member * 8;
    const bool active = present && member * 8 < width && channel < codec.head_dim;
    typename Element::Vector vector;
    float minimum = INFINITY, maximum = -INFINITY;
    if (active) {
      vector.load(value_address<Element>(codec, x, block, head, token, channel));
      typename Element::Vector::Extremes extremes;
      extremes.add(vector);
      extremes.finish(minimum, maximum);
    }
    reduce_extremes(minimum, maximum, static_cast<int>(team));
    if (!present) continue;
    const Affine affine = close_group<Element>(codec, part, minimum, maximum);
    if (member == 0) {
      write_group(target, group_index(codec, part, head, token, begin), affine);
      if (!group_finite(minimum, maximum)) {
        atomicMin(target.first_non_finite, non_finite_place(block * kBlockTokens + token, head, part));
      }
    }
    if (active) {
      with_code_maker<Element>(affine, codec.code_limit[part], minimum, maximum, [&](const auto& maker) {
        *reinterpret_cast<uint2*>(target.codes + token * codec.channels + head * codec.head_dim + channel) =
            maker.codes(vector);
      });
    }
  }
}

template <typename Element>
__device__ __forceinline__ float value_at(const uint8_t* address) {
  if constexpr (std::is_same_v<Element, F16>) return __half2float(*reinterpret_cast<const __half*>(address));
  else if constexpr (std::is_same_v<Element, BF16>)
    return __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(address));
  else return *reinterpret_cast<const float*>(address);
}

// kivi keys: a thread per channel, over the block's tokens.
template <typename Element>
__device__ void quantize_channels(const Codec& codec, uint32_t part, const uint8_t* x, uint64_t block,
                                  PartTarget target) {
  for (uint32_t index = threadIdx.x; index < codec.channels; index += kEncodeThreads) {
    const uint32_t head = index / codec.head_dim, channel = index % codec.head_dim;
    const auto value = [&](uint32_t token) {
      return value_at<Element>(value_address<Element>(codec, x, block, head, token, channel));
    };
    float minimum = INFINITY, maximum = -INFINITY;
    uint32_t bad_token = kBlockTokens;
#pragma unroll 16
    for (uint32_t token = 0; token < kBlockTokens; ++token) {
      const float v = value(token);
      minimum = fminf(minimum, v);
      maximum = fmaxf(maximum, v);
      if (!(v * 0.0f == 0.0f)) bad_token = min(bad_token, token);
    }
    const bool finite = bad_token == kBlockTokens && group_finite(minimum, maximum);
    const Affine affine =
        finite ? element_affine<Element>(codec, part, minimum, maximum) : Affine{1.0f, 0.0f};
    write_group(target, index, affine);
    if (!finite) {
      const uint64_t token = block * kBlockTokens + (bad_token == kBlockTokens ? 0 : bad_token);
      atomicMin(target.first_non_finite, non_finite_place(token, head, part));
    }
    with_code_maker<Element>(affine, codec.code_limit[part], minimum, maximum, [&](const auto& maker) {
#pragma unroll 16
      for (uint32_t token = 0; token < kBlockTokens; ++token) {
        target.codes[token * codec.channels + index] = static_cast<uint8_t>(maker.code(value(token)));
      }
    });
  }
}

template <typename Element>
__device__ void quantize_part(const Codec& codec, uint32_t part, const uint8_t* x, uint64_t block,
                              PartTarget target) {
  if (codec.quantizer == PH_KV_PACKKV && codec.grouping == PH_KV_PER_TOKEN) {
    if (codec.channels >= 8 * kHeld * kWarpThreads)
      quantize_tokens<Element, true>(codec, part, x, block, target);
    else quantize_tokens<Element, false>(codec, part, x, block, target);
  } else if (codec.quantizer == PH_KV_PACKKV) {
    quantize_segments<Element>(codec, part, x, block, codec.head_dim, target);
  } else if (part == PH_KV_KEYS) {
    quantize_channels<Element>(codec, part, x, block, target);
  } else {
    quantize_segments<Element>(codec, part, x, block, kGroupChannels, target);
  }
}

}  // namespace ph::kv
