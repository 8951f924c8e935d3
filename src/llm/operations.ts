/**
 * What a language model computes beside attention, on a device. Every function enqueues its work, waits for nothing and
 * allocates nothing, and may be called while a step is captured ({@linkcode KvCacheStep.capture}). Values are computed in
 * float32 and rounded once, to the type of the output. Results are the same bits every time.
 *
 * Shapes are row-major. A view must start at a multiple of 16 bytes. An output must not overlap an input, unless it says
 * so. All throw `invalid-argument` for a buffer of another device, type or length, and for sizes that are none; `disposed`.
 *
 * @module
 */
import * as native from "../../ffi/llm.ts";
import { type Device, nativeOf } from "../device/device.ts";
import type { DeviceBuffer } from "../device/device_buffer.ts";
import { Call, type FloatBuffer, refuse } from "./operation_call.ts";

export type { FloatBuffer, FloatDType } from "./operation_call.ts";

/** Sizes of {@linkcode linear}. */
export interface LinearOptions {
  /** Rows of `x` and `out`. */
  readonly rows: number;
  /** Columns of `x` and of the weight. */
  readonly inFeatures: number;
  /** Rows of the weight, columns of `out`. */
  readonly outFeatures: number;
  /** Added to every row: `[outFeatures]`. */
  readonly bias?: FloatBuffer | undefined;
  /** Whether the result is added to what `out` holds. Default: false. */
  readonly accumulate?: boolean | undefined;
}

/**
 * `out[rows, outFeatures] = x[rows, inFeatures] . transposed weight[outFeatures, inFeatures]`, plus the bias, plus what
 * `out` holds if it accumulates. Sums are in float32.
 *
 * On the CPU, any types; a row's result does not depend on the other rows. On CUDA the same is true of up to 8 rows; more
 * are multiplied by cuBLAS ({@linkcode prepareLinear}). There `x` must have the weight's type, or be f32 where there are
 * up to 8 rows; for more, `out` must be f32 or have that type too.
 *
 * Throws `unsupported` for other types on CUDA, if cuBLAS is not found, and if it was not prepared before a capture.
 */
export function linear(
  x: FloatBuffer,
  weight: FloatBuffer,
  out: FloatBuffer,
  options: LinearOptions,
): void {
  const { rows, inFeatures, outFeatures, bias, accumulate = false } = options;
  const call = new Call("linear", out.device, { rows, inFeatures, outFeatures });
  native.linear(call.device, {
    x: call.floats({ x }, [rows, inFeatures]),
    weight: call.floats({ weight }, [outFeatures, inFeatures]),
    bias: bias && call.floats({ bias }, [outFeatures]),
    out: call.written(call.floats({ out }, [rows, outFeatures])),
    rows,
    inFeatures,
    outFeatures,
    accumulate,
  });
}

/**
 * Loads what {@linkcode linear} needs of other libraries, if it is not loaded, and returns its name and version. On CUDA
 * that is cuBLAS: the file that `PACKHORSE_CUBLAS` names, else `libcublas.so.13` or `.12`. May wait for the device.
 *
 * Throws `unsupported` where it is missing, saying what to install; `invalid-argument` while a step is captured.
 */
export function prepareLinear(device: Device): string {
  return native.prepareLinear(nativeOf(device));
}

/** Sizes of {@linkcode gather}. */
export interface GatherOptions {
  /** Rows of `out`, and how many indices there are. */
  readonly rows: number;
  /** Columns of `x` and `out`. */
  readonly width: number;
  /** Rows of `x`. */
  readonly xRows: number;
}

/** `out[i] = x[indices[i]]`. An index that is no row of `x` gives a row of NaN. */
export function gather(
  x: FloatBuffer,
  indices: DeviceBuffer<"i32">,
  out: FloatBuffer,
  { rows, width, xRows }: GatherOptions,
): void {
  const call = new Call("gather", out.device, { rows, width, xRows });
  native.gather(call.device, {
    x: call.floats({ x }, [xRows, width]),
    xRows,
    indices: call.integers({ indices }, [rows]),
    out: call.written(call.floats({ out }, [rows, width])),
    rows,
    width,
  });
}

/** Sizes of {@linkcode rmsNorm}. */
export interface RmsNormOptions {
  /** Rows of `x` and `out`. */
  readonly rows: number;
  /** Parts of a row that are normalised on their own, such as heads. Default: 1. */
  readonly groups?: number | undefined;
  /** Columns of such a part. */
  readonly width: number;
  /** What is added to the mean of squares. */
  readonly epsilon: number;
  /** Elements between the starts of rows of `x`. Default: `groups * width`. */
  readonly xStride?: number | undefined;
  /** Elements between the starts of rows of `out`. Default: `groups * width`. */
  readonly outStride?: number | undefined;
}

/**
 * `out = x / sqrt(mean(x^2) + epsilon) * weight` over each part of `width` columns; `x` and `out` are
 * `[rows, groups, width]`, the weight is `[width]`. `out` may be `x`, with equal strides.
 */
export function rmsNorm(
  x: FloatBuffer,
  weight: FloatBuffer,
  out: FloatBuffer,
  options: RmsNormOptions,
): void {
  const { rows, groups = 1, width, epsilon } = options;
  const { xStride = groups * width, outStride = groups * width } = options;
  const call = new Call("rmsNorm", out.device, { rows, groups, width, xStride, outStride });
  const columns = groups * width;
  const from = call.strided({ x }, { rows, columns, stride: xStride });
  native.rmsNorm(call.device, {
    x: from,
    xStride,
    weight: call.floats({ weight }, [width]),
    out: call.written(
      call.strided({ out }, { rows, columns, stride: outStride }),
      xStride === outStride ? from : undefined,
    ),
    outStride,
    rows,
    groups,
    width,
    epsilon: call.number({ epsilon }),
  });
}

/** Sizes and tables of {@linkcode rope}. */
export interface RopeOptions {
  /** Rows of `x` and `out`: tokens. */
  readonly rows: number;
  /** Heads of a row. */
  readonly heads: number;
  /** Channels of a head. */
  readonly headDim: number;
  /** How many of them turn, an even number up to 1024. Default: `headDim`. */
  readonly rotaryDim?: number | undefined;
  /** Positions of the tokens: `[rows]`. */
  readonly positions: DeviceBuffer<"i32">;
  /** Radians per position: `[rotaryDim / 2]`. */
  readonly frequencies: DeviceBuffer<"f32">;
  /** What turned channels are multiplied by. Default: 1. */
  readonly scale?: number | undefined;
  /** Elements between the starts of rows of `x`. Default: `heads * headDim`. */
  readonly xStride?: number | undefined;
  /** Elements between the starts of rows of `out`. Default: `heads * headDim`. */
  readonly outStride?: number | undefined;
}

/**
 * Rotary embedding, as Hugging Face's models have it: channels `i` and `i + rotaryDim / 2` of a head are turned by the
 * angle `position * frequencies[i]`, and multiplied by `scale`; those from `rotaryDim` on are copied. `x` and `out` are
 * `[rows, heads, headDim]`. `out` may be `x`, with equal strides.
 */
export function rope(x: FloatBuffer, out: FloatBuffer, options: RopeOptions): void {
  const { rows, heads, headDim, positions, frequencies } = options;
  const { rotaryDim = headDim, scale = 1 } = options;
  const columns = heads * headDim;
  const { xStride = columns, outStride = columns } = options;
  const call = new Call("rope", out.device, {
    rows,
    heads,
    headDim,
    rotaryDim,
    xStride,
    outStride,
  });
  const from = call.strided({ x }, { rows, columns, stride: xStride });
  native.rope(call.device, {
    x: from,
    xStride,
    positions: call.integers({ positions }, [rows]),
    frequencies: call.floats({ frequencies }, [Math.ceil(rotaryDim / 2)], ["f32"]),
    out: call.written(
      call.strided({ out }, { rows, columns, stride: outStride }),
      xStride === outStride ? from : undefined,
    ),
    outStride,
    rows,
    heads,
    headDim,
    rotaryDim,
    scale: call.number({ scale }),
  });
}

/** Sizes of {@linkcode swiglu}. */
export interface SwigluOptions {
  /** Rows of `gate`, `up` and `out`. */
  readonly rows: number;
  /** Columns of each. */
  readonly width: number;
  /** Elements between the starts of rows of `gate`, and of `up`: `2 * width` where one follows the other. Default: `width`. */
  readonly stride?: number | undefined;
}

/** `out[rows, width] = gate / (1 + exp(-gate)) * up`. `gate` and `up` have the same type. */
export function swiglu(
  gate: FloatBuffer,
  up: FloatBuffer,
  out: FloatBuffer,
  { rows, width, stride = width }: SwigluOptions,
): void {
  const call = new Call("swiglu", out.device, { rows, width, stride });
  const shape = { rows, columns: width, stride };
  native.swiglu(call.device, {
    gate: call.strided({ gate }, shape),
    up: call.strided({ up }, shape, [gate.dtype]),
    stride,
    out: call.written(call.floats({ out }, [rows, width])),
    rows,
    width,
  });
}

/** Sizes of {@linkcode cast}. */
export interface CastOptions {
  /** Rows of `x` and `out`. Default: 1. */
  readonly rows?: number | undefined;
  /** Columns of each. Default: the length of `out` over `rows`. */
  readonly width?: number | undefined;
  /** Elements between the starts of rows of `x`. Default: `width`. */
  readonly xStride?: number | undefined;
}

/** `out[rows, width] = x`, rounded to the type of `out`: to nearest, ties to even. */
export function cast(x: FloatBuffer, out: FloatBuffer, options: CastOptions = {}): void {
  const { rows = 1 } = options;
  const { width = out.length / rows } = options;
  const { xStride = width } = options;
  const call = new Call("cast", out.device, { rows, width, xStride });
  native.cast(call.device, {
    x: call.strided({ x }, { rows, columns: width, stride: xStride }),
    xStride,
    out: call.written(call.floats({ out }, [rows, width])),
    rows,
    width,
  });
}

/** `x += y`, element by element. */
export function add(x: FloatBuffer, y: FloatBuffer): void {
  const call = new Call("add", x.device, {});
  const count = x.length;
  const summand = call.floats({ y }, [count]);
  native.add(call.device, call.written(call.floats({ x }, [count])), summand, count);
}

/** `counters[i] += by`, an integer, for each of them: positions of the next tokens. Default: 1. */
export function advance(counters: DeviceBuffer<"i32">, by = 1): void {
  const call = new Call("advance", counters.device, { counters: counters.length });
  if (by !== (by | 0)) {
    refuse(`Cannot advance: by must be an integer of 32 bits, got ${by}`);
  }
  const { length: count } = counters;
  native.advance(call.device, call.integers({ counters }, [count]), { count, by });
}

/** Sizes of logits. */
export interface LogitsOptions {
  /** Rows of logits: tokens to predict. */
  readonly rows: number;
  /** Columns: tokens that there are. */
  readonly vocabulary: number;
}

/**
 * `out[row]` is the first index of the largest of `logits[row]`; `logits` are `[rows, vocabulary]`, `out` is `[rows]`. NaN
 * counts as -infinity; a row of nothing else gives -1.
 */
export function argmax(
  logits: FloatBuffer,
  out: DeviceBuffer<"i32">,
  { rows, vocabulary }: LogitsOptions,
): void {
  const call = new Call("argmax", out.device, { rows, vocabulary });
  const from = { ...call.floats({ logits }, [rows, vocabulary]), rows, vocabulary };
  native.argmax(call.device, from, call.written(call.integers({ out }, [rows])));
}
