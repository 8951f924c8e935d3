/**
 * The growing cache a second time, as plain arrays of tokens: which tokens are packed when, and what packing makes of
 * them, from the text of `cuda/include/packhorse.h` ("kv cache") and `cuda/kv/tile.h`. The oracle of every backend.
 */
import type { KvCacheCodec, KvCacheConfig, KvCachePartCodec } from "../src/kv/mod.ts";
import { FORMATS, roundHalfEven, roundToNearest, roundUp, unitInLastPlace } from "./float16.ts";

const { fround } = Math;

const BLOCK = 64;
const PARTS = ["keys", "values"] as const;
/** Channels that share a width. */
const GROUP = 32;
const PARAMS_BYTES = 528;
const HEADER_BYTES = 16;
const LARGEST_ZERO = 32_767;
/** Channels of a value that share a scale of kivi. */
const KIVI_CHANNELS = 64;

/** 16-bit floats, bit by bit. */
export type Bits = Uint16Array<ArrayBuffer>;

type Layout = Pick<KvCacheConfig, "dtype" | "kvHeads" | "headDim">;

/** Bits of one token's keys and values, [kvHeads, headDim]. Never changed in place, so that forks may share it. */
export interface Token {
  readonly keys: Bits;
  readonly values: Bits;
  /** While it is packed: its values before they are rounded to 16 bits, which attention sees. */
  readonly exact?: Readonly<Record<"keys" | "values", Float32Array>>;
}

/** One layer of a sequence. */
interface Layer {
  tokens: Token[];
  /** Bytes of each packed block. */
  blocks: number[];
}

/** A sequence of the model. */
export interface ReferenceSequence {
  readonly layers: Layer[];
}

/** Where a value that is not finite was packed. */
export interface PackedNonFinite {
  readonly sequence: ReferenceSequence;
  readonly token: number;
}

/** A model of a cache without limits. */
export class ReferenceCache {
  readonly config: KvCacheConfig;
  /** Tokens that were packed with a value that is not finite. */
  readonly nonFinite: PackedNonFinite[] = [];

  constructor(config: KvCacheConfig) {
    this.config = config;
  }

  add(): ReferenceSequence {
    return { layers: this.config.codecs.map(() => ({ tokens: [], blocks: [] })) };
  }

  fork({ layers }: ReferenceSequence): ReferenceSequence {
    return {
      layers: layers.map(({ tokens, blocks }) => ({ tokens: [...tokens], blocks: [...blocks] })),
    };
  }

  /** Appends one step's tokens: of every layer the same number. */
  append(sequence: ReferenceSequence, tokens: readonly (readonly Token[])[]): void {
    const { residual, sinks, codecs } = this.config;
    sequence.layers.forEach((layer, i) => {
      layer.tokens.push(...tokens[i]!);
      while (layer.tokens.length >= sinks + (layer.blocks.length + 1) * BLOCK + residual) {
        const first = sinks + layer.blocks.length * BLOCK;
        const block = layer.tokens.slice(first, first + BLOCK);
        block.forEach((token, j) => {
          if (isFinite(this.config, codecs[i]!, token)) return;
          this.nonFinite.push({ sequence, token: first + j });
        });
        const packed = packBlock(this.config, codecs[i]!, block);
        layer.tokens.splice(first, BLOCK, ...packed.tokens);
        layer.blocks.push(packed.bytes);
      }
    });
  }

  truncate({ layers }: ReferenceSequence, tokens: number): void {
    const whole = Math.max(0, Math.floor((tokens - this.config.sinks) / BLOCK));
    for (const layer of layers) {
      layer.blocks.length = Math.min(layer.blocks.length, whole);
      const packed = this.config.sinks + layer.blocks.length * BLOCK;
      layer.tokens = layer.tokens.slice(0, tokens).map(({ keys, values, exact }, i) =>
        exact && i < packed ? { keys, values, exact } : { keys, values }
      );
    }
  }

  /** What statistics() counts of these sequences. */
  count(sequences: readonly ReferenceSequence[]) {
    const sum = (numbers: readonly number[]) => numbers.reduce((total, each) => total + each, 0);
    return {
      sequences: sequences.length,
      tokens: sum(sequences.map(({ layers }) => layers[0]!.tokens.length)),
      packedTokens: sum(sequences.map(({ layers }) => layers[0]!.blocks.length * BLOCK)),
      packedBytes: sum(sequences.flatMap(({ layers }) => layers.flatMap(({ blocks }) => blocks))),
    };
  }
}

/** Whether all values to be quantised are finite. */
function isFinite({ dtype }: Layout, codec: KvCacheCodec, token: Token): boolean {
  return PARTS.every((part) =>
    codec[part].quantizer === "raw16" || decodeBits(dtype, token[part]).every(Number.isFinite)
  );
}

/** What a block's tokens are packed to in one part: bits, the values before rounding, and bytes of all head records. */
interface PackedPart {
  readonly bits: readonly Bits[];
  readonly exact: readonly Float32Array<ArrayBuffer>[];
  readonly bytes: number;
}

/** A block's tokens with the values that they are packed to, and the bytes of its records. */
function packBlock(
  layout: Layout,
  codec: KvCacheCodec,
  block: readonly Token[],
): { tokens: Token[]; bytes: number } {
  const [keys, values] = PARTS.map((part) =>
    packPart(layout, codec[part], part, block.map((token) => token[part]))
  ) as [PackedPart, PackedPart];
  const isPerToken = PARTS.some((part) => ["packkv", "fixed"].includes(codec[part].quantizer));
  const bytes = keys.bytes + values.bytes + layout.kvHeads * HEADER_BYTES +
    (isPerToken ? PARAMS_BYTES : 0);
  const tokens = block.map((_, i) => ({
    keys: keys.bits[i]!,
    values: values.bits[i]!,
    exact: { keys: keys.exact[i]!, values: values.exact[i]! },
  }));
  return { tokens, bytes };
}

function packPart(
  layout: Layout,
  codec: KvCachePartCodec,
  part: "keys" | "values",
  bits: readonly Bits[],
): PackedPart {
  const { dtype, kvHeads, headDim } = layout;
  const channels = kvHeads * headDim;
  if (codec.quantizer === "raw16") {
    return {
      bits,
      exact: bits.map((each) => decodeBits(dtype, each)),
      bytes: channels * BLOCK * 2,
    };
  }
  const x = bits.map((each) =>
    decodeBits(dtype, each).map((value) => Number.isFinite(value) ? value : 0)
  );
  const codes = x.map(() => new Uint8Array(channels));
  const exact = x.map(() => new Float32Array(channels));
  const groups = groupsOf(layout, codec, part);
  for (const { tokens, first, end } of groups) {
    quantize(layout, codec, { x, codes, exact }, { tokens, first, end });
  }
  const scaleBytes = codec.quantizer === "kivi" ? groups.length * 4 : 0;
  return {
    bits: exact.map((values) => encodeBits(dtype, values)),
    exact,
    bytes: scaleBytes + codeBytes(layout, codec, codes),
  };
}

/** Values of a block that share a scale: of these tokens, channels [first, end). */
interface Group {
  readonly tokens: readonly number[];
  readonly first: number;
  readonly end: number;
}

function groupsOf(
  { kvHeads, headDim }: Layout,
  { quantizer }: KvCachePartCodec,
  part: "keys" | "values",
): Group[] {
  const all = Array.from({ length: BLOCK }, (_, token) => token);
  const channels = kvHeads * headDim;
  if (quantizer !== "kivi") {
    return all.map((token) => ({ tokens: [token], first: 0, end: channels }));
  }
  if (part === "keys") {
    return Array.from({ length: channels }, (_, first) => ({ tokens: all, first, end: first + 1 }));
  }
  const groups: Group[] = [];
  for (const token of all) {
    for (let head = 0; head < kvHeads; head++) {
      for (let at = 0; at < headDim; at += KIVI_CHANNELS) {
        const first = head * headDim + at;
        const end = first + Math.min(KIVI_CHANNELS, headDim - at);
        groups.push({ tokens: [token], first, end });
      }
    }
  }
  return groups;
}

/** Largest code. */
function codeLimit(codec: KvCachePartCodec): number {
  if (codec.quantizer === "raw16") throw new TypeError("raw16 has no codes");
  if (codec.quantizer !== "packkv") return 2 ** codec.bits - 1;
  return Math.min(255, Math.ceil(fround(1 / fround(codec.rel))) + 1);
}

/** `tile_affine` of tile.h. */
function scaleAndZero(
  { dtype }: Layout,
  codec: KvCachePartCodec,
  { min, max }: { min: number; max: number },
): { scale: number; zero: number } {
  const { smallest, largest } = FORMATS[dtype];
  if (min === max) {
    if (min === 0) return { scale: smallest, zero: 0 };
    const parts = Array.from({ length: 15 }, (_, k) => 2 ** k);
    const part = parts.findLast((each) => Math.abs(min) / each % smallest === 0)!;
    return { scale: Math.abs(min) / part, zero: Math.sign(min) * part };
  }
  const clamped = (scale: number) => Math.min(Math.max(scale, smallest), largest);
  const limit = codeLimit(codec);
  const range = fround(max - min);
  let scale = clamped(
    codec.quantizer === "packkv"
      ? roundToNearest(dtype, fround(range * fround(codec.rel)))
      : roundUp(dtype, fround(range / limit)),
  );
  if (fround(limit * scale) < range) scale = clamped(scale + unitInLastPlace(dtype, scale));
  const least = fround(Math.abs(min) / LARGEST_ZERO);
  if (scale < least) scale = clamped(roundUp(dtype, least));
  return { scale, zero: roundHalfEven(fround(min / scale)) };
}

/** Codes of a group, and the values that they stand for. Both and `x` are of the block's tokens, [channels]. */
function quantize(
  layout: Layout,
  codec: KvCachePartCodec,
  { x, codes, exact }: {
    readonly x: readonly Float32Array[];
    readonly codes: readonly Uint8Array[];
    readonly exact: readonly Float32Array[];
  },
  { tokens, first, end }: Group,
): void {
  let [min, max] = [Infinity, -Infinity];
  for (const token of tokens) {
    for (let channel = first; channel < end; channel++) {
      min = Math.min(min, x[token]![channel]!);
      max = Math.max(max, x[token]![channel]!);
    }
  }
  const { scale, zero } = scaleAndZero(layout, codec, { min, max });
  const limit = codeLimit(codec);
  const { largest } = FORMATS[layout.dtype];
  for (const token of tokens) {
    for (let channel = first; channel < end; channel++) {
      const quotient = roundHalfEven(fround(x[token]![channel]! / scale));
      const code = Math.min(Math.max(quotient - zero, 0), limit);
      codes[token]![channel] = code;
      exact[token]![channel] = Math.min(Math.max(fround((code + zero) * scale), -largest), largest);
    }
  }
}

/** Bytes of one part's codes in a block's head records, with their bases. */
function codeBytes(
  { kvHeads, headDim }: Layout,
  codec: KvCachePartCodec,
  codes: readonly Uint8Array[],
): number {
  const channels = kvHeads * headDim;
  if (codec.quantizer === "kivi" || codec.quantizer === "fixed") {
    return channels * BLOCK * codec.bits / 8;
  }
  const baseBits = codeLimit(codec) <= 15 && headDim % 64 === 0 ? 4 : 8;
  let bytes = channels * baseBits / 8;
  for (let first = 0; first < channels; first += GROUP) {
    let range = 0;
    for (let channel = first; channel < first + GROUP; channel++) {
      let [least, most] = [255, 0];
      for (const token of codes) {
        least = Math.min(least, token[channel]!);
        most = Math.max(most, token[channel]!);
      }
      range = Math.max(range, most - least);
    }
    bytes += (32 - Math.clz32(range)) * BLOCK * GROUP / 8;
  }
  return bytes;
}

/** The values of 16-bit floats. */
export function decodeBits(
  dtype: KvCacheConfig["dtype"],
  bits: Bits,
): Float32Array<ArrayBuffer> {
  if (dtype === "f16") {
    return new Float32Array(new Float16Array(bits.buffer, bits.byteOffset, bits.length));
  }
  // A bfloat16 is the upper half of a float32.
  return new Float32Array(new Uint32Array(bits).map((upper) => upper << 16).buffer);
}

/** Numbers that are not NaN, rounded to 16-bit floats, to nearest even. */
export function encodeBits(
  dtype: KvCacheConfig["dtype"],
  values: Float32Array<ArrayBuffer>,
): Bits {
  if (dtype === "f16") return new Uint16Array(new Float16Array(values).buffer);
  const words = new Uint32Array(values.buffer, values.byteOffset, values.length);
  return new Uint16Array(words.map((word) => (word + 0x7fff + (word >>> 16 & 1)) >>> 16));
}

/** Bits `[tokens, kvHeads, headDim]` as tokens. */
export function splitTokens(
  { kvHeads, headDim }: Layout,
  { keys, values }: Token,
): Token[] {
  const size = kvHeads * headDim;
  return Array.from({ length: keys.length / size }, (_, i) => ({
    keys: keys.slice(i * size, (i + 1) * size),
    values: values.slice(i * size, (i + 1) * size),
  }));
}

/** Tokens as bits `[tokens, kvHeads, headDim]`. */
export function joinTokens({ kvHeads, headDim }: Layout, tokens: readonly Token[]): Token {
  const size = kvHeads * headDim;
  const join = (part: "keys" | "values") => {
    const bits = new Uint16Array(tokens.length * size);
    tokens.forEach((token, i) => bits.set(token[part], i * size));
    return bits;
  };
  return { keys: join("keys"), values: join("values") };
}

/**
 * Attention of the last query tokens over all tokens in double precision: queries [count, queryHeads, headDim], and
 * query i of m sees all but the last m - 1 - i tokens; under a window, of those the last `window` and the first
 * `sinks`. A token may stand for several that are alike: `times` of them. Not rounded.
 */
export function attend(
  { dtype, kvHeads, queryHeads, headDim }: Layout & Pick<KvCacheConfig, "queryHeads">,
  tokens: readonly Token[],
  queries: Bits,
  scale: number,
  { window = 0, sinks = 0, times }: {
    window?: number;
    sinks?: number;
    times?: readonly number[];
  } = {},
): Float64Array {
  const size = kvHeads * headDim;
  const [keys, values] = PARTS.map((part) => {
    const x = new Float32Array(tokens.length * size);
    tokens.forEach((token, i) =>
      x.set(token.exact?.[part] ?? decodeBits(dtype, token[part]), i * size)
    );
    return x;
  });
  const q = decodeBits(dtype, queries);
  const count = queries.length / (queryHeads * headDim);
  const out = new Float64Array(queries.length);
  const weights = new Float64Array(tokens.length);
  for (let query = 0; query < count; query++) {
    const seen = tokens.length - (count - 1 - query);
    for (let head = 0; head < queryHeads; head++) {
      const at = (query * queryHeads + head) * headDim;
      const kvHead = Math.floor(head / (queryHeads / kvHeads));
      let most = -Infinity;
      for (let token = 0; token < seen; token++) {
        const from = (token * kvHeads + kvHead) * headDim;
        let product = 0;
        for (let i = 0; i < headDim; i++) product += q[at + i]! * keys![from + i]!;
        const hidden = window > 0 && token >= sinks && token < seen - window;
        weights[token] = hidden ? -Infinity : product * scale;
        most = Math.max(most, weights[token]!);
      }
      let total = 0;
      for (let token = 0; token < seen; token++) {
        weights[token] = (times?.[token] ?? 1) * Math.exp(weights[token]! - most);
        total += weights[token]!;
      }
      for (let token = 0; token < seen; token++) {
        const weight = weights[token]! / total;
        const from = (token * kvHeads + kvHead) * headDim;
        for (let i = 0; i < headDim; i++) out[at + i]! += weight * values![from + i]!;
      }
    }
  }
  return out;
}
