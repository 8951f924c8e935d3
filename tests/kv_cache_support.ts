/** What tests of the growing cache share: small caches, random tokens, steps, and comparing with the model. */
import { assertEquals, AssertionError } from "@std/assert";
import { Device, type DeviceBuffer } from "../src/device/mod.ts";
import { PackhorseError } from "../src/error.ts";
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
  encodeBits,
  joinTokens,
  type ReferenceSequence,
  splitTokens,
  type Token,
} from "./kv_cache_reference.ts";
import { DATA_KINDS, type DataKind } from "./kv_cases.ts";

type Buffer = DeviceBuffer<KvCacheDType>;

export const PARTS = ["keys", "values"] as const;

/** The backend that PACKHORSE_BACKEND names, or without it those that open on this machine. */
export function backends(): ("cpu" | "cuda")[] {
  const named = Deno.env.get("PACKHORSE_BACKEND") ?? "auto";
  if (named === "cpu" || named === "cuda") return [named];
  return (["cpu", "cuda"] as const).filter((backend) => {
    try {
      using _device = Device.open({ backend });
      return true;
    } catch (error) {
      // A machine may have no GPU, or no CUDA library built; the CPU's must open.
      if (backend === "cuda" && error instanceof PackhorseError) return false;
      throw error;
    }
  });
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
  { tokens, heads }: { tokens: number; heads: number },
): Bits {
  const x = new Float32Array(tokens * heads * headDim);
  const valueAt = DATA_KINDS[kind];
  for (let i = 0; i < x.length; i++) {
    const row = Math.floor(i / headDim);
    const [head, token, channel] = [row % heads, Math.floor(row / heads), i % headDim];
    x[i] = valueAt({ type: dtype, random, head, token, channel });
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
): Bits {
  using queries = upload(device, dtype, bits);
  using out: Buffer = device.createBuffer(dtype, bits.length);
  step.attend(layer, queries, out);
  return out.download() as Bits;
}

/** What the cache says that a layer of a sequence is. */
export function readLayer(cache: KvCache, layer: number, sequence: KvSequence): Token {
  if (cache.length(sequence) === 0) return { keys: new Uint16Array(), values: new Uint16Array() };
  using buffers = cache.read(layer, sequence);
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
