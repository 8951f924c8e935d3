// The operations of operations.h on the GPU, but for linear.
//
// Those on elements give a thread four of them where sizes and strides are multiples of four, else one; tensors are read
// once and written once, 8 or 16 bytes a thread and coalesced. RmsNormKernel has a warp per part of up to 256 columns,
// and a thread block per larger part, which reads it twice, the second time from the cache. ArgmaxKernel has a thread block
// per row. All sums are in an order that depends on the sizes of a row alone, so that results are the same every time.
#include <cmath>
#include <initializer_list>
#include <type_traits>

#include "llm/elements.cuh"

namespace ph::llm {

namespace {

constexpr uint32_t kThreads = kElementThreads;

template <int N>
__global__ void __launch_bounds__(kThreads) GatherKernel(Gather call) {
  for_columns<N>(call.rows, call.width, [&](uint64_t row, uint64_t column) {
    const int32_t index = call.indices[row];
    Values<N> values;
    if (index >= 0 && static_cast<uint32_t>(index) < call.x_rows) {
      values = load<N>(call.x, static_cast<uint64_t>(index) * call.width + column);
    } else {
      for (float& value : values.at) value = NAN;
    }
    store(call.out, row * call.width + column, values);
  });
}

template <int N>
__global__ void __launch_bounds__(kThreads) CastKernel(Cast call) {
  for_columns<N>(call.rows, call.width, [&](uint64_t row, uint64_t column) {
    store(call.out, row * call.width + column, load<N>(call.x, row * call.x_stride + column));
  });
}

template <int N>
__global__ void __launch_bounds__(kThreads) SwigluKernel(Swiglu call) {
  for_columns<N>(call.rows, call.width, [&](uint64_t row, uint64_t column) {
    const Values<N> gate = load<N>(call.gate, row * call.stride + column);
    Values<N> values = load<N>(call.up, row * call.stride + column);
    // exp overflows to infinity for a gate far below zero, and the quotient is zero as it should be.
    for (int i = 0; i < N; ++i) values.at[i] *= gate.at[i] / (1.0f + expf(-gate.at[i]));
    store(call.out, row * call.width + column, values);
  });
}

template <int N>
__global__ void __launch_bounds__(kThreads) AddKernel(Target x, Source y, uint64_t count) {
  const uint64_t threads = static_cast<uint64_t>(gridDim.x) * kThreads;
  for (uint64_t i = (static_cast<uint64_t>(blockIdx.x) * kThreads + threadIdx.x) * N; i < count;
       i += threads * N) {
    Values<N> values = load<N>(as_source(x), i);
    const Values<N> summands = load<N>(y, i);
    for (int k = 0; k < N; ++k) values.at[k] += summands.at[k];
    store(x, i, values);
  }
}

__global__ void __launch_bounds__(kThreads) AdvanceKernel(int32_t* counters, uint32_t count, int32_t by) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i < count)
    counters[i] = static_cast<int32_t>(static_cast<uint32_t>(counters[i]) + static_cast<uint32_t>(by));
}

// A head has half / N items that turn N pairs of channels, then those that copy N channels each, unless they stay.
template <int N>
__global__ void __launch_bounds__(kThreads) RopeKernel(Rope call, uint32_t copied) {
  const uint32_t half = call.rotary_dim / 2, items = half + copied;
  for_columns<N>(call.rows, call.heads * items, [&](uint64_t row, uint64_t column) {
    const uint64_t head = column / items, item = column % items;
    const uint64_t from = row * call.x_stride + head * call.head_dim,
                   to = row * call.out_stride + head * call.head_dim;
    if (item >= half) {
      const uint64_t channel = call.rotary_dim + (item - half);
      store(call.out, to + channel, load<N>(call.x, from + channel));
      return;
    }
    const float position = static_cast<float>(call.positions[row]);
    const Values<N> a = load<N>(call.x, from + item), b = load<N>(call.x, from + half + item);
    Values<N> first, second;
    for (int i = 0; i < N; ++i) {
      float sine, cosine;
      sincosf(position * call.frequencies[item + i], &sine, &cosine);
      sine *= call.scale;
      cosine *= call.scale;
      first.at[i] = a.at[i] * cosine - b.at[i] * sine;
      second.at[i] = b.at[i] * cosine + a.at[i] * sine;
    }
    store(call.out, to + item, first);
    store(call.out, to + half + item, second);
  });
}

// Threads threads to a part of a row: a warp of a block, or all of it.
template <int N, uint32_t Threads>
__global__ void __launch_bounds__(kThreads) RmsNormKernel(RmsNorm call) {
  const uint64_t parts = static_cast<uint64_t>(call.rows) * call.groups;
  const uint64_t part = blockIdx.x * static_cast<uint64_t>(kThreads / Threads) + threadIdx.x / Threads;
  if (part >= parts) return;  // a whole warp, or the whole block
  const uint32_t thread = threadIdx.x % Threads;
  const uint64_t row = part / call.groups, column = part % call.groups * call.width;
  const uint64_t from = row * call.x_stride + column, to = row * call.out_stride + column;
  float squares = 0.0f;
  for (uint32_t i = thread * N; i < call.width; i += Threads * N) {
    const Values<N> x = load<N>(call.x, from + i);
    for (int k = 0; k < N; ++k) squares = __fmaf_rn(x.at[k], x.at[k], squares);
  }
  squares = combine_block<Threads>(squares, [](float a, float b) { return a + b; });
  const float factor = 1.0f / sqrtf(squares / static_cast<float>(call.width) + call.epsilon);
  for (uint32_t i = thread * N; i < call.width; i += Threads * N) {
    Values<N> x = load<N>(call.x, from + i);
    const Values<N> weight = load<N>(call.weight, i);
    for (int k = 0; k < N; ++k) x.at[k] = x.at[k] * factor * weight.at[k];
    store(call.out, to + i, x);
  }
}

constexpr uint32_t kArgmaxThreads = 1024;

template <int N>
__global__ void __launch_bounds__(kArgmaxThreads)
    ArgmaxKernel(Source logits, int32_t* out, uint32_t vocabulary) {
  const uint64_t row = static_cast<uint64_t>(blockIdx.x) * vocabulary;
  unsigned long long best = 0;  // order, then how far from the end
  for (uint32_t i = threadIdx.x * N; i < vocabulary; i += kArgmaxThreads * N) {
    const Values<N> values = load<N>(logits, row + i);
    for (int k = 0; k < N; ++k) {
      const unsigned long long key =
          static_cast<unsigned long long>(order_of(values.at[k])) << 32 | (0xffffffffu - (i + k));
      best = key > best ? key : best;
    }
  }
  best = combine_block<kArgmaxThreads>(
      best, [](unsigned long long a, unsigned long long b) { return a > b ? a : b; });
  if (threadIdx.x == 0)
    out[blockIdx.x] = best >> 32 == 0 ? -1 : static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(best));
}

}  // namespace

void gather(ph_device& device, const Gather& call) {
  dispatch_width({call.width}, [&](auto n) {
    constexpr int N = decltype(n)::value;
    const uint32_t blocks = grid_for(static_cast<uint64_t>(call.rows) * (call.width / N), kThreads);
    GatherKernel<N><<<blocks, kThreads, 0, device.stream>>>(call);
  });
  PH_CUDA_TRY(cudaGetLastError());
}

void cast(ph_device& device, const Cast& call) {
  dispatch_width({call.width, call.x_stride}, [&](auto n) {
    constexpr int N = decltype(n)::value;
    const uint32_t blocks = grid_for(static_cast<uint64_t>(call.rows) * (call.width / N), kThreads);
    CastKernel<N><<<blocks, kThreads, 0, device.stream>>>(call);
  });
  PH_CUDA_TRY(cudaGetLastError());
}

void swiglu(ph_device& device, const Swiglu& call) {
  dispatch_width({call.width, call.stride}, [&](auto n) {
    constexpr int N = decltype(n)::value;
    const uint32_t blocks = grid_for(static_cast<uint64_t>(call.rows) * (call.width / N), kThreads);
    SwigluKernel<N><<<blocks, kThreads, 0, device.stream>>>(call);
  });
  PH_CUDA_TRY(cudaGetLastError());
}

void add(ph_device& device, Target x, Source y, uint64_t count) {
  dispatch_width({count}, [&](auto n) {
    constexpr int N = decltype(n)::value;
    AddKernel<N><<<grid_for(count / N, kThreads), kThreads, 0, device.stream>>>(x, y, count);
  });
  PH_CUDA_TRY(cudaGetLastError());
}

void advance(ph_device& device, int32_t* counters, uint32_t count, int32_t by) {
  const uint32_t blocks = (count - 1) / kThreads + 1;
  AdvanceKernel<<<blocks, kThreads, 0, device.stream>>>(counters, count, by);
  PH_CUDA_TRY(cudaGetLastError());
}

void rope(ph_device& device, const Rope& call) {
  const uint32_t half = call.rotary_dim / 2,
                 copied = call.x.data == call.out.data ? 0 : call.head_dim - call.rotary_dim;
  dispatch_width({half, call.head_dim, call.x_stride, call.out_stride}, [&](auto n) {
    constexpr int N = decltype(n)::value;
    const uint64_t items = static_cast<uint64_t>(call.rows) * call.heads * ((half + copied) / N);
    RopeKernel<N><<<grid_for(items, kThreads), kThreads, 0, device.stream>>>(call, copied);
  });
  PH_CUDA_TRY(cudaGetLastError());
}

void rms_norm(ph_device& device, const RmsNorm& call) {
  constexpr uint32_t kMostWarpWidth = 256;
  const uint64_t parts = static_cast<uint64_t>(call.rows) * call.groups;
  dispatch_width({call.width, call.x_stride, call.out_stride}, [&](auto n) {
    constexpr int N = decltype(n)::value;
    if (call.width <= kMostWarpWidth) {
      constexpr uint32_t kParts = kThreads / kWarp;
      const uint32_t blocks = static_cast<uint32_t>((parts + kParts - 1) / kParts);
      RmsNormKernel<N, kWarp><<<blocks, kThreads, 0, device.stream>>>(call);
    } else {
      RmsNormKernel<N, kThreads><<<static_cast<uint32_t>(parts), kThreads, 0, device.stream>>>(call);
    }
  });
  PH_CUDA_TRY(cudaGetLastError());
}

void argmax(ph_device& device, Source logits, int32_t* out, uint32_t rows, uint32_t vocabulary) {
  dispatch_width({vocabulary}, [&](auto n) {
    constexpr int N = decltype(n)::value;
    ArgmaxKernel<N><<<rows, kArgmaxThreads, 0, device.stream>>>(logits, out, vocabulary);
  });
  PH_CUDA_TRY(cudaGetLastError());
}

}  // namespace ph::llm
