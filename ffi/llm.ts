import { call } from "./call.ts";
import type { NativeBuffer, NativeDevice } from "./device.ts";
import { type NativeTensor, place, placeIf } from "./tensor.ts";

// The functions of packhorse.h, section "llm". What tensors are and hold is for the caller to check.

/** A tensor of a `ph_dtype`. */
export interface NativeFloats extends NativeTensor {
  readonly dtype: number;
}

type Handle = NativeBuffer["handle"];

/** Handle, offset and dtype. */
const floats = (tensor: NativeFloats): [Handle, bigint, number] => [...place(tensor), tensor.dtype];

export interface LinearCall {
  readonly x: NativeFloats;
  readonly weight: NativeFloats;
  readonly bias: NativeFloats | undefined;
  readonly out: NativeFloats;
  readonly rows: number;
  readonly inFeatures: number;
  readonly outFeatures: number;
  readonly accumulate: boolean;
}

export function linear(device: NativeDevice, parameters: LinearCall): void {
  const { x, weight, bias, out, rows, inFeatures, outFeatures, accumulate } = parameters;
  const [biasHandle, biasOffset, biasDtype] = bias ? floats(bias) : [null, 0n, weight.dtype];
  call(
    device.library.symbols.ph_llm_linear,
    device.handle,
    ...floats(x),
    ...floats(weight),
    biasHandle,
    biasOffset,
    biasDtype,
    ...floats(out),
    rows,
    inFeatures,
    outFeatures,
    accumulate ? 1 : 0,
  );
}

/** Loads what {@linkcode linear} needs; its name. */
export function prepareLinear(device: NativeDevice): string {
  const name = new Uint8Array(512);
  const { ph_llm_prepare_linear } = device.library.symbols;
  call(ph_llm_prepare_linear, device.handle, name, name.length);
  return new TextDecoder().decode(name.subarray(0, name.indexOf(0)));
}

export interface GatherCall {
  readonly x: NativeFloats;
  readonly xRows: number;
  readonly indices: NativeTensor;
  readonly out: NativeFloats;
  readonly rows: number;
  readonly width: number;
}

export function gather(device: NativeDevice, parameters: GatherCall): void {
  const { x, xRows, indices, out, rows, width } = parameters;
  call(
    device.library.symbols.ph_llm_gather,
    device.handle,
    ...floats(x),
    xRows,
    ...place(indices),
    ...floats(out),
    rows,
    width,
  );
}

export interface RmsNormCall {
  readonly x: NativeFloats;
  readonly xStride: number;
  readonly weight: NativeFloats;
  readonly out: NativeFloats;
  readonly outStride: number;
  readonly rows: number;
  readonly groups: number;
  readonly width: number;
  readonly epsilon: number;
}

export function rmsNorm(device: NativeDevice, parameters: RmsNormCall): void {
  const { x, xStride, weight, out, outStride, rows, groups, width, epsilon } = parameters;
  call(
    device.library.symbols.ph_llm_rms_norm,
    device.handle,
    ...floats(x),
    xStride,
    ...floats(weight),
    ...floats(out),
    outStride,
    rows,
    groups,
    width,
    epsilon,
  );
}

export interface RopeCall {
  readonly x: NativeFloats;
  readonly xStride: number;
  readonly positions: NativeTensor;
  readonly frequencies: NativeTensor;
  readonly out: NativeFloats;
  readonly outStride: number;
  readonly rows: number;
  readonly heads: number;
  readonly headDim: number;
  readonly rotaryDim: number;
  readonly scale: number;
}

export function rope(device: NativeDevice, parameters: RopeCall): void {
  const { x, xStride, positions, frequencies, out, outStride } = parameters;
  const { rows, heads, headDim, rotaryDim, scale } = parameters;
  call(
    device.library.symbols.ph_llm_rope,
    device.handle,
    ...floats(x),
    xStride,
    ...place(positions),
    ...place(frequencies),
    ...floats(out),
    outStride,
    rows,
    heads,
    headDim,
    rotaryDim,
    scale,
  );
}

export interface SwigluCall {
  readonly gate: NativeFloats;
  readonly up: NativeTensor;
  readonly stride: number;
  readonly out: NativeFloats;
  readonly rows: number;
  readonly width: number;
}

export function swiglu(device: NativeDevice, parameters: SwigluCall): void {
  const { gate, up, stride, out, rows, width } = parameters;
  call(
    device.library.symbols.ph_llm_swiglu,
    device.handle,
    ...place(gate),
    ...place(up),
    gate.dtype,
    stride,
    ...floats(out),
    rows,
    width,
  );
}

export interface CastCall {
  readonly x: NativeFloats;
  readonly xStride: number;
  readonly out: NativeFloats;
  readonly rows: number;
  readonly width: number;
}

export function cast(device: NativeDevice, { x, xStride, out, rows, width }: CastCall): void {
  const { ph_llm_cast } = device.library.symbols;
  call(ph_llm_cast, device.handle, ...floats(x), xStride, ...floats(out), rows, width);
}

export function add(device: NativeDevice, x: NativeFloats, y: NativeFloats, count: number): void {
  const { ph_llm_add } = device.library.symbols;
  call(ph_llm_add, device.handle, ...floats(x), ...floats(y), BigInt(count));
}

export function advance(
  device: NativeDevice,
  counters: NativeTensor,
  { count, by }: { readonly count: number; readonly by: number },
): void {
  call(device.library.symbols.ph_llm_advance, device.handle, ...place(counters), count, by);
}

/** Logits [rows, vocabulary]. */
export interface NativeLogits extends NativeFloats {
  readonly rows: number;
  readonly vocabulary: number;
}

export function argmax(device: NativeDevice, logits: NativeLogits, out: NativeTensor): void {
  const { rows, vocabulary } = logits;
  const { ph_llm_argmax } = device.library.symbols;
  call(ph_llm_argmax, device.handle, ...floats(logits), ...place(out), rows, vocabulary);
}

export interface SampleCall {
  readonly logits: NativeLogits;
  readonly samplers: NativeTensor;
  readonly seen: NativeTensor | undefined;
  readonly scratch: NativeTensor;
  readonly out: NativeTensor;
}

export function sample(device: NativeDevice, parameters: SampleCall): void {
  const { logits, samplers, seen, scratch, out } = parameters;
  call(
    device.library.symbols.ph_llm_sample,
    device.handle,
    ...floats(logits),
    ...place(samplers),
    ...placeIf(seen),
    ...place(scratch),
    ...place(out),
    logits.rows,
    logits.vocabulary,
  );
}

export interface MarkCall {
  readonly tokens: NativeTensor;
  readonly count: number;
  readonly seen: NativeTensor;
  readonly vocabulary: number;
}

export function mark(device: NativeDevice, parameters: MarkCall): void {
  const { tokens, count, seen, vocabulary } = parameters;
  const { ph_llm_mark } = device.library.symbols;
  call(ph_llm_mark, device.handle, ...place(tokens), count, ...place(seen), vocabulary);
}

export interface CrossEntropyCall {
  readonly logits: NativeLogits;
  readonly targets: NativeTensor;
  readonly out: NativeTensor;
}

export function crossEntropy(device: NativeDevice, parameters: CrossEntropyCall): void {
  const { logits, targets, out } = parameters;
  call(
    device.library.symbols.ph_llm_cross_entropy,
    device.handle,
    ...floats(logits),
    ...place(targets),
    ...place(out),
    logits.rows,
    logits.vocabulary,
  );
}

export interface DivergenceCall {
  readonly reference: NativeLogits;
  readonly logits: NativeFloats;
  readonly out: NativeTensor;
}

export function divergence(device: NativeDevice, parameters: DivergenceCall): void {
  const { reference, logits, out } = parameters;
  call(
    device.library.symbols.ph_llm_divergence,
    device.handle,
    ...floats(reference),
    ...floats(logits),
    ...place(out),
    reference.rows,
    reference.vocabulary,
  );
}
