/** What tests of the growing cache share: small caches, random tokens, steps, and comparing with the model. */
import { assert, assertEquals, AssertionError, assertLessOrEqual, assertThrows } from "@std/assert";
import { Device, type DeviceBuffer } from "../src/device/mod.ts";
import { type ErrorCode, PackhorseError } from "../src/error.ts";
import type {
  KvCache,
  KvCacheCodec,
  KvCacheConfig,
  KvCacheDType,
  KvCacheOptions,
  KvCachePartCodec,
  KvCacheStep,
  KvSequence,
} from "../src/kv/mod.ts";
import {
  type Bits,
  decodeBits,
  encodeBits,
  joinTokens,
  type ReferenceSequence,
  splitTokens,
  type Token,
} from "./kv_cache_reference.ts";
import { backends } from "./backends.ts";
import { DATA_KINDS, type DataKind } from "./kv_cases.ts";

/** Tokens, queries or outputs on a device. */
export type Buffer = DeviceBuffer<KvCacheDType>;

export const PARTS = ["keys", "values"] as const;

/** A test on every backend. */
export function testOnDevices(name: string, work: (device: Device) => void): void {
  for (const backend of backends()) {
    Deno.test(`kv cache: ${backend}: ${name}`, () => {
      using device = Device.open({ backend });
      work(device);
    });
  }
}

/** Asserts that `work` throws a PackhorseError of this code whose message contains each fragment. */
export function throwsWith(work: () => unknown, code: ErrorCode, ...fragments: string[]): void {
  const error = assertThrows(work, PackhorseError);
  assertEquals(error.code, code, error.message);
  for (const fragment of fragments) assert(error.message.includes(fragment), error.message);
}

/** Options with defaults for what a test does not care about. */
export function optionsOf(options: Partial<KvCacheOptions> = {}): KvCacheOptions {
  return {
    layers: 1,
    queryHeads: 2,
    kvHeads: 1,
    headDim: 64,
    dtype: "f16",
    sequences: 4,
    tokens: 1024,
    stepTokens: 1024,
    poolBytes: 2 ** 22,
    ...options,
  };
}

export const packkv = (rel: number): KvCachePartCodec => ({ quantizer: "packkv", rel });
export const fixed = (bits: number): KvCachePartCodec => ({ quantizer: "fixed", bits });
export const raw16: KvCachePartCodec = { quantizer: "raw16" };
export const kivi = (bits: number): KvCachePartCodec => ({ quantizer: "kivi", bits });
export const bothParts = (codec: KvCachePartCodec): KvCacheCodec => ({
  keys: codec,
  values: codec,
});

export interface Data {
  readonly kind: DataKind;
  readonly random: () => number;
}

/** Values [tokens, heads, headDim] of one kind. */
export function bitsOf(
  { dtype, headDim }: KvCacheConfig,
  { kind, random }: Data,
  { tokens, heads, factor = 1 }: { tokens: number; heads: number; factor?: number },
): Bits {
  const x = new Float32Array(tokens * heads * headDim);
  const valueAt = DATA_KINDS[kind];
  for (let i = 0; i < x.length; i++) {
    const row = Math.floor(i / headDim);
    const [head, token, channel] = [row % heads, Math.floor(row / heads), i % headDim];
    x[i] = factor * valueAt({ type: dtype, random, head, token, channel });
  }
  return encodeBits(dtype, x);
}

/** New tokens for a sequence, of every layer. */
export function tokensOf(config: KvCacheConfig, data: Data, tokens: number): Token[][] {
  const bits = () => bitsOf(config, data, { tokens, heads: config.kvHeads });
  return config.codecs.map(() => splitTokens(config, { keys: bits(), values: bits() }));
}

export function upload(device: Device, dtype: KvCacheDType, bits: Bits): Buffer {
  const buffer: Buffer = device.createBuffer(dtype, bits.length);
  buffer.upload(bits);
  return buffer;
}

/** New tokens for one sequence, of every layer. */
export interface Part {
  readonly sequence: KvSequence;
  readonly tokens: readonly (readonly Token[])[];
}

/** One step of appends to every layer. */
export function appendAll(cache: KvCache, parts: readonly Part[]): KvCacheStep {
  const { device, config } = cache;
  const step = cache.begin(
    parts.map(({ sequence, tokens }) => ({ sequence, tokens: tokens[0]!.length })),
  );
  for (let layer = 0; layer < config.layers; layer++) {
    const joined = joinTokens(config, parts.flatMap(({ tokens }) => tokens[layer]!));
    using keys = upload(device, config.dtype, joined.keys);
    using values = upload(device, config.dtype, joined.values);
    step.append(layer, keys, values);
  }
  return step;
}

/** A layer's attention: bits [tokens, queryHeads, headDim]. */
export function attendLayer(
  { device, config: { dtype } }: KvCache,
  step: KvCacheStep,
  layer: number,
  bits: Bits,
  options: { scale?: number } = {},
): Bits {
  using queries = upload(device, dtype, bits);
  using out: Buffer = device.createBuffer(dtype, bits.length);
  step.attend(layer, queries, out, options);
  return out.download() as Bits;
}

/** One layer's prefill: bits [tokens, queryHeads, headDim]. */
export function prefillLayer(
  { device, config }: KvCache,
  step: KvCacheStep,
  layer: number,
  { tokens, bits, scale }: { tokens: readonly Token[]; bits: Bits; scale?: number },
): Bits {
  const joined = joinTokens(config, tokens);
  using queries = upload(device, config.dtype, bits);
  using keys = upload(device, config.dtype, joined.keys);
  using values = upload(device, config.dtype, joined.values);
  using out: Buffer = device.createBuffer(config.dtype, bits.length);
  step.prefill(layer, { queries, keys, values, out }, { scale });
  return out.download() as Bits;
}

/** What the cache says that tokens of a sequence are in a layer. */
export function readLayer(
  cache: KvCache,
  layer: number,
  sequence: KvSequence,
  range: { first?: number; count?: number } = {},
): Token {
  if (cache.length(sequence) === 0) return { keys: new Uint16Array(), values: new Uint16Array() };
  using buffers = cache.read(layer, sequence, range);
  const [keys, values] = PARTS.map((part) => buffers[part].download() as Bits);
  return { keys: keys!, values: values! };
}

export function assertSameBits(actual: Bits, expected: Bits, what: string): void {
  const difference = actual.findIndex((bits, i) => bits !== expected[i]);
  if (difference < 0 && actual.length === expected.length) return;
  const hex = (bits: number | undefined) => bits?.toString(16);
  throw new AssertionError(
    `${what}: element ${difference} of ${expected.length} is ${hex(actual[difference])}, ` +
      `expected ${hex(expected[difference])}; there are ${actual.length}`,
  );
}

export function assertHolds(
  cache: KvCache,
  sequence: KvSequence,
  expected: ReferenceSequence,
): void {
  assertEquals(cache.length(sequence), expected.layers[0]!.tokens.length);
  expected.layers.forEach(({ tokens }, layer) => {
    const held = readLayer(cache, layer, sequence);
    const joined = joinTokens(cache.config, tokens);
    for (const part of PARTS) {
      const what = `${part} of sequence ${sequence.number} in layer ${layer}`;
      assertSameBits(held[part], joined[part], what);
    }
  });
}

/** Asserts that a layer of a sequence holds these tokens. */
export function assertLayer(
  cache: KvCache,
  layer: number,
  sequence: KvSequence,
  tokens: readonly Token[],
): void {
  const held = readLayer(cache, layer, sequence);
  const joined = joinTokens(cache.config, tokens);
  for (const part of PARTS) {
    const what = `${part} of sequence ${sequence.number} in layer ${layer}`;
    assertSameBits(held[part], joined[part], what);
  }
}

/** Square root of the sum of squares of the differences, over that of `expected`. */
export function relativeError(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  let difference = 0;
  let total = 0;
  for (let i = 0; i < expected.length; i++) {
    difference += (actual[i]! - expected[i]!) ** 2;
    total += expected[i]! ** 2;
  }
  return total === 0 ? Math.sqrt(difference) : Math.sqrt(difference / total);
}

/** Asserts that bits are within 1e-3 of exact values, besides rounding to their type. */
export function assertClose(
  { dtype }: KvCacheConfig,
  bits: Bits,
  expected: Float64Array,
  what: string,
): void {
  const rounded = decodeBits(dtype, encodeBits(dtype, Float32Array.from(expected)));
  const error = relativeError(decodeBits(dtype, bits), expected);
  const bound = 1e-3 + relativeError(rounded, expected);
  assertLessOrEqual(error, bound, `${what} is off by ${error}`);
}
