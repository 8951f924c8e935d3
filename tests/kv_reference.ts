/**
 * The PackKV codec a second time, from the text of `cuda/include/packhorse.h` alone and written to be read:
 * the oracle that every backend must match bit for bit. Float32 arithmetic is a double operation followed by
 * `Math.fround`, which is correctly rounded for one sum, difference, product or quotient of float32 values.
 */
import {
  decodeFloats,
  encodeFloats,
  type FloatType,
  FORMATS,
  roundHalfEven,
  roundToNearest,
  roundUp,
  unitInLastPlace,
} from "./float16.ts";

/** Tokens of a block. */
export const BLOCK = 64;

const { fround } = Math;

export type Part = "keys" | "values";
export type Repack = "none" | "median" | "greedy" | "auto";

/** Shape and codec of one layer: `ph_kv_codec` with words for numbers. */
export interface Codec {
  readonly heads: number;
  readonly headDim: number;
  readonly tokens: number;
  readonly dtype: FloatType;
  readonly quantizer: "packkv" | "kivi";
  readonly grouping: "token" | "head";
  /** Kivi's bits of keys and values. */
  readonly bits: Readonly<Record<Part, number>>;
  /** Packkv's scale as a share of the range of keys and values. */
  readonly rel: Readonly<Record<Part, number>>;
  readonly repack: Repack;
  /** Positions of a pack, P. */
  readonly pack: number;
  readonly keepNonFinite: boolean;
}

/** The place of a group that no scale fits; for groups of several tokens or heads, of their first value. */
export interface NonFinite {
  readonly part: Part;
  readonly token: number;
  readonly head: number;
}

/** One part of all blocks after step 1. */
export interface Quantized {
  /** [blocks, 64, heads, headDim]; zeros in a block with a non-finite group. */
  readonly codes: Uint8Array;
  /** [blocks, groups], each a value of the type. */
  readonly scales: Float32Array;
  /** [blocks, groups] */
  readonly zeros: Int32Array;
  /** The first non-finite group, by token, then head. */
  readonly nonFinite: NonFinite | null;
  /** [blocks], true where a group is non-finite. */
  readonly nonFiniteBlocks: readonly boolean[];
}

/** Values of both parts, [heads, tokens, headDim] little-endian. */
export interface CacheBytes {
  readonly keys: Uint8Array;
  readonly values: Uint8Array;
}

export interface Records {
  readonly records: Uint8Array;
  /** [blocks + 1], bytes. */
  readonly offsets: number[];
}

export function blockCount(codec: Codec): number {
  return Math.floor(codec.tokens / BLOCK);
}

/** Codes of one token: C. */
export function channelCount(codec: Codec): number {
  return codec.heads * codec.headDim;
}

const KIVI_CHANNELS = 64;

/** Scale groups of a part of a block. */
export function groupCount(codec: Codec, part: Part): number {
  const { heads, headDim } = codec;
  if (codec.quantizer === "packkv") return codec.grouping === "token" ? BLOCK : heads * BLOCK;
  if (part === "keys") return heads * headDim;
  return heads * BLOCK * Math.ceil(headDim / KIVI_CHANNELS);
}

/** The group of a value; `token` counts from the start of the block. */
export function groupOf(
  codec: Codec,
  part: Part,
  { token, head, channel }: { token: number; head: number; channel: number },
): number {
  const { headDim } = codec;
  if (codec.quantizer === "packkv") {
    return codec.grouping === "token" ? token : head * BLOCK + token;
  }
  if (part === "keys") return head * headDim + channel;
  const groups = Math.ceil(headDim / KIVI_CHANNELS);
  return (head * BLOCK + token) * groups + Math.floor(channel / KIVI_CHANNELS);
}

/** Indices of a value: in x [heads, tokens, headDim], in codes [blocks, 64, heads, headDim], of its group. */
export interface Place {
  x: number;
  code: number;
  group: number;
}

/** Calls `visit` for every value of a block. `place` is one object, refilled. */
export function eachValue(
  codec: Codec,
  part: Part,
  block: number,
  visit: (place: Place) => void,
): void {
  const { heads, headDim, tokens } = codec;
  const groups = groupCount(codec, part);
  const place = { x: 0, code: 0, group: 0 };
  const at = { token: 0, head: 0, channel: 0 };
  for (at.token = 0; at.token < BLOCK; at.token++) {
    for (at.head = 0; at.head < heads; at.head++) {
      for (at.channel = 0; at.channel < headDim; at.channel++) {
        const token = block * BLOCK + at.token;
        place.x = (at.head * tokens + token) * headDim + at.channel;
        place.code = (token * heads + at.head) * headDim + at.channel;
        place.group = block * groups + groupOf(codec, part, at);
        visit(place);
      }
    }
  }
}

/** Token of the block and head of a group's first value. */
function firstOfGroup(codec: Codec, part: Part, group: number): { token: number; head: number } {
  for (let token = 0; token < BLOCK; token++) {
    for (let head = 0; head < codec.heads; head++) {
      for (let channel = 0; channel < codec.headDim; channel++) {
        if (groupOf(codec, part, { token, head, channel }) === group) return { token, head };
      }
    }
  }
  throw new RangeError(`No value is in group ${group}`);
}

// ---- step 1: quantise ------------------------------------------------------------------------------

/** Largest code. */
export function codeLimit(codec: Codec, part: Part): number {
  return codec.quantizer === "packkv" ? 255 : 2 ** codec.bits[part] - 1;
}

function scaleAndZero(
  codec: Codec,
  part: Part,
  { min, max }: { min: number; max: number },
): { scale: number; zero: number } {
  const { dtype } = codec;
  const { smallest, largest } = FORMATS[dtype];
  if (min === max) return { scale: min === 0 ? 1 : Math.abs(min), zero: Math.sign(min) };
  const range = fround(max - min);
  const stored = codec.quantizer === "packkv"
    ? roundToNearest(dtype, fround(range * fround(codec.rel[part])))
    : roundUp(dtype, fround(range / codeLimit(codec, part)));
  let scale = Math.min(Math.max(stored, smallest), largest);
  // A subnormal scale, rounded down, may leave the largest codes past their limit: the next value never does.
  if (fround(codeLimit(codec, part) * scale) < range) scale += unitInLastPlace(dtype, scale);
  if (dtype === "f32") {
    scale = Math.max(scale, fround(Math.max(Math.abs(min), Math.abs(max)) * 2 ** -23));
  }
  return { scale, zero: roundHalfEven(fround(min / scale)) };
}

/** Step 1 of one part: values [heads, tokens, headDim] to codes, scales and zero points. */
export function quantize(codec: Codec, part: Part, x: Float32Array): Quantized {
  const blocks = blockCount(codec);
  const groups = groupCount(codec, part);
  const minima = new Float32Array(blocks * groups).fill(Infinity);
  const maxima = new Float32Array(blocks * groups).fill(-Infinity);
  for (let block = 0; block < blocks; block++) {
    eachValue(codec, part, block, (place) => {
      // Math.min and Math.max keep a NaN.
      minima[place.group] = Math.min(minima[place.group]!, x[place.x]!);
      maxima[place.group] = Math.max(maxima[place.group]!, x[place.x]!);
    });
  }

  const scales = new Float32Array(blocks * groups);
  const zeros = new Int32Array(blocks * groups);
  const nonFiniteBlocks = new Array<boolean>(blocks).fill(false);
  let nonFinite: NonFinite | null = null;
  for (let group = 0; group < blocks * groups; group++) {
    const min = minima[group]!;
    const max = maxima[group]!;
    if (Number.isFinite(fround(max - min))) {
      const { scale, zero } = scaleAndZero(codec, part, { min, max });
      scales[group] = scale;
      zeros[group] = zero;
      continue;
    }
    const block = Math.floor(group / groups);
    nonFiniteBlocks[block] = true;
    const first = firstOfGroup(codec, part, group % groups);
    const found = { part, token: block * BLOCK + first.token, head: first.head };
    nonFinite = firstNonFinite(nonFinite, found);
  }

  const codes = new Uint8Array(blocks * BLOCK * channelCount(codec));
  const limit = codeLimit(codec, part);
  for (let block = 0; block < blocks; block++) {
    if (nonFiniteBlocks[block]) continue;
    eachValue(codec, part, block, (place) => {
      const quotient = roundHalfEven(fround(x[place.x]! / scales[place.group]!));
      codes[place.code] = Math.min(Math.max(quotient - zeros[place.group]!, 0), limit);
    });
  }
  return { codes, scales, zeros, nonFinite, nonFiniteBlocks };
}

/** Whichever of two places comes first: by token, then head, keys before values. */
export function firstNonFinite(a: NonFinite | null, b: NonFinite | null): NonFinite | null {
  if (a === null || b === null) return a ?? b;
  const order = a.token - b.token || a.head - b.head || a.part.localeCompare(b.part);
  return order <= 0 ? a : b;
}

/**
 * Inverse of step 1, in float32 before rounding to the type: [heads, tokens, headDim], zeros in the tail and
 * in blocks that `skip` marks.
 */
export function dequantize(
  codec: Codec,
  part: Part,
  quantized: Pick<Quantized, "codes" | "scales" | "zeros">,
  skip: readonly boolean[] = [],
): Float32Array {
  const x = new Float32Array(codec.heads * codec.tokens * codec.headDim);
  const { codes, scales, zeros } = quantized;
  const { largest } = FORMATS[codec.dtype];
  for (let block = 0; block < blockCount(codec); block++) {
    if (skip[block]) continue;
    eachValue(codec, part, block, (place) => {
      const restored = (codes[place.code]! + zeros[place.group]!) * scales[place.group]!;
      x[place.x] = Math.min(Math.max(fround(restored), -largest), largest);
    });
  }
  return x;
}

// ---- step 2: repack --------------------------------------------------------------------------------

/** Bits that the codes 0..range take. */
function widthOf(range: number): number {
  return 32 - Math.clz32(range);
}

const WIDTHS = Uint8Array.from({ length: 256 }, (_, range) => widthOf(range));

/** The codes of a block: of token t from t * channels on. */
interface BlockCodes {
  readonly channels: number;
  readonly codes: Uint8Array;
}

function blockCodes(codec: Codec, codes: Uint8Array, block: number): BlockCodes {
  const channels = channelCount(codec);
  return {
    channels,
    codes: codes.subarray(block * BLOCK * channels, (block + 1) * BLOCK * channels),
  };
}

/** Codes of two parts of a block, token by token. */
function joined(keys: BlockCodes, values: BlockCodes): BlockCodes {
  const channels = keys.channels + values.channels;
  const codes = new Uint8Array(BLOCK * channels);
  for (let token = 0; token < BLOCK; token++) {
    codes.set(tokenCodes(keys, token), token * channels);
    codes.set(tokenCodes(values, token), token * channels + keys.channels);
  }
  return { channels, codes };
}

function tokenCodes({ channels, codes }: BlockCodes, token: number): Uint8Array {
  return codes.subarray(token * channels, (token + 1) * channels);
}

const identity = Array.from({ length: BLOCK }, (_, token) => token);

function medianOrder(values: BlockCodes): number[] {
  const medians = identity.map((token) =>
    tokenCodes(values, token).slice().sort()[(values.channels - 1) >> 1]!
  );
  return identity.toSorted((a, b) => medians[b]! - medians[a]!);
}

function greedyOrder(block: BlockCodes, pack: number): number[] {
  const left = [...identity];
  const order: number[] = [];
  while (left.length > 0) {
    const seed = mostSimilarToMean(block, left);
    const minima = tokenCodes(block, seed).slice();
    const maxima = minima.slice();
    take(seed);
    while (order.length % pack !== 0) {
      const token = cheapest(block, left, { minima, maxima });
      tokenCodes(block, token).forEach((code, channel) => {
        minima[channel] = Math.min(minima[channel]!, code);
        maxima[channel] = Math.max(maxima[channel]!, code);
      });
      take(token);
    }
  }
  return order;

  function take(token: number): void {
    left.splice(left.indexOf(token), 1);
    order.push(token);
  }
}

function mostSimilarToMean(block: BlockCodes, left: readonly number[]): number {
  const mean = new Float64Array(block.channels);
  for (const token of left) {
    tokenCodes(block, token).forEach((code, channel) => mean[channel]! += code);
  }
  // A sum of at most 64 codes over their count is a half exactly when its double is.
  mean.forEach((sum, channel) => mean[channel] = roundHalfEven(sum / left.length));
  let best = -1;
  let mostSimilar = -1;
  for (const token of left) {
    let dot = 0;
    let squaredNorm = 0;
    tokenCodes(block, token).forEach((code, channel) => {
      dot += code * mean[channel]!;
      squaredNorm += code * code;
    });
    const similarity = squaredNorm === 0 ? 0 : dot * dot / squaredNorm;
    if (similarity > mostSimilar) {
      mostSimilar = similarity;
      best = token;
    }
  }
  return best;
}

function cheapest(
  block: BlockCodes,
  left: readonly number[],
  { minima, maxima }: { minima: Uint8Array; maxima: Uint8Array },
): number {
  const { channels, codes } = block;
  let best = -1;
  let fewest = Infinity;
  for (const token of left) {
    let bits = 0;
    for (let channel = 0; channel < channels; channel++) {
      const code = codes[token * channels + channel]!;
      const low = minima[channel]!;
      const high = maxima[channel]!;
      bits += WIDTHS[(code > high ? code : high) - (code < low ? code : low)]!;
    }
    if (bits < fewest) {
      fewest = bits;
      best = token;
    }
  }
  return best;
}

/** Bits of a block by formula: what `auto` compares. */
function blockBits(block: BlockCodes, order: readonly number[], pack: number): number {
  let bits = isIdentity(order) ? 0 : BLOCK * 6;
  for (let position = 0; position < BLOCK; position += pack) {
    for (let channel = 0; channel < block.channels; channel++) {
      bits += pack * packOf(block, order, { position, channel, pack }).width;
    }
  }
  return bits;
}

function isIdentity(order: ArrayLike<number>): boolean {
  return identity.every((token) => order[token] === token);
}

/** Step 2: codes of keys and values to the order of each block's tokens, [blocks, 64]. */
export function repack(codec: Codec, keyCodes: Uint8Array, valueCodes: Uint8Array): Uint8Array {
  const orders = new Uint8Array(blockCount(codec) * BLOCK);
  for (let block = 0; block < blockCount(codec); block++) {
    const values = blockCodes(codec, valueCodes, block);
    const both = joined(blockCodes(codec, keyCodes, block), values);
    const candidates = {
      none: () => identity,
      median: () => medianOrder(values),
      greedy: () => greedyOrder(both, codec.pack),
    };
    let order = identity;
    if (codec.repack === "auto") {
      const all = Object.values(candidates).map((candidate) => candidate());
      const bits = all.map((candidate) => blockBits(both, candidate, codec.pack));
      order = all[bits.indexOf(Math.min(...bits))]!;
    } else {
      order = candidates[codec.repack]();
    }
    orders.set(order, block * BLOCK);
  }
  return orders;
}

// ---- step 3: pack ----------------------------------------------------------------------------------

/** Minimum and width of the pack that starts at a position. */
function packOf(
  { channels, codes }: BlockCodes,
  order: ArrayLike<number>,
  { position, channel, pack }: { position: number; channel: number; pack: number },
): { minimum: number; width: number } {
  let minimum = 255;
  let maximum = 0;
  for (let i = position; i < position + pack; i++) {
    const code = codes[order[i]! * channels + channel]!;
    minimum = Math.min(minimum, code);
    maximum = Math.max(maximum, code);
  }
  return { minimum, width: widthOf(maximum - minimum) };
}

/** Packs of one head and one position / P, in the order of their rows in a record. */
function rowsOf({ heads, headDim, pack }: Codec): { position: number; channels: number[] }[] {
  return Array.from(
    { length: heads },
    (_, head) =>
      Array.from({ length: BLOCK / pack }, (_, i) => ({
        position: i * pack,
        channels: Array.from({ length: headDim }, (_, channel) => head * headDim + channel),
      })),
  ).flat();
}

/** Bytes built from the front; fields fill from the lowest bit of the lowest byte up. */
class Writer {
  #bytes = new Uint8Array(1024);
  #bits = 0;

  get length(): number {
    return Math.ceil(this.#bits / 8);
  }

  get bytes(): Uint8Array<ArrayBuffer> {
    return this.#bytes.slice(0, this.length);
  }

  #reserve(bits: number): void {
    const needed = Math.ceil((this.#bits + bits) / 8);
    if (needed <= this.#bytes.length) return;
    const grown = new Uint8Array(2 * needed);
    grown.set(this.#bytes);
    this.#bytes = grown;
  }

  field(value: number, width: number): void {
    this.#reserve(width);
    for (let bit = 0; bit < width; bit++, this.#bits++) {
      // Division, as shifts would cut what is past 32 bits.
      this.#bytes[this.#bits >> 3]! |= (Math.floor(value / 2 ** bit) & 1) << (this.#bits & 7);
    }
  }

  append(bytes: Uint8Array): void {
    this.pad(1);
    this.#reserve(bytes.length * 8);
    this.#bytes.set(bytes, this.length);
    this.#bits += bytes.length * 8;
  }

  /** Zero bits up to a multiple of `bytes`. */
  pad(bytes: number): void {
    const bits = Math.ceil(this.length / bytes) * bytes * 8 - this.#bits;
    this.#reserve(bits);
    this.#bits += bits;
  }
}

const HEADER_BYTES = 16;
const ORDER_BYTES = 48;

function packPart(
  codec: Codec,
  block: BlockCodes,
  { order, scales, zeros }: { order: Uint8Array; scales: Float32Array; zeros: Int32Array },
): Uint8Array {
  const { pack } = codec;
  const rows = rowsOf(codec).map(({ position, channels }) =>
    channels.map((channel) => ({
      position,
      channel,
      ...packOf(block, order, { position, channel, pack }),
    }))
  );
  const packs = rows.flat();
  const minimumBits = widthOf(packs.reduce((most, { minimum }) => Math.max(most, minimum), 0));
  const widthBits = widthOf(packs.reduce((most, { width }) => Math.max(most, width), 0));
  const zeroBytes = zeroPointBytes(zeros);

  const headers = new Writer();
  const payloads = new Writer();
  const payloadStarts: number[] = [];
  rows.forEach((row, index) => {
    if (index % (BLOCK / pack) === 0) payloadStarts.push(payloads.length);
    for (const { position, channel, minimum, width } of row) {
      headers.field(minimum, minimumBits);
      headers.field(width, widthBits);
      for (let i = position; i < position + pack; i++) {
        payloads.field(block.codes[order[i]! * block.channels + channel]! - minimum, width);
      }
    }
    headers.pad(4);
    payloads.pad(4);
  });

  const part = new Writer();
  part.field(minimumBits, 8);
  part.field(widthBits, 8);
  part.field(zeroBytes, 8);
  part.field(0, 8);
  for (const start of payloadStarts) part.field(start, 32);
  part.append(encodeFloats(codec.dtype, scales));
  part.pad(4);
  for (const zero of zeros) part.field(zero, zeroBytes * 8);
  part.pad(4);
  part.append(headers.bytes);
  part.append(payloads.bytes);
  part.pad(16);
  return part.bytes;
}

/** The smallest of 1, 2 and 4 bytes whose two's complement holds every zero point. */
function zeroPointBytes(zeros: Int32Array): number {
  for (const bytes of [1, 2]) {
    const limit = 2 ** (8 * bytes - 1);
    if (zeros.every((zero) => -limit <= zero && zero < limit)) return bytes;
  }
  return 4;
}

function record(
  kind: "packed" | "raw",
  order: Uint8Array | null,
  { keys, values }: CacheBytes,
): Uint8Array {
  const keysStart = HEADER_BYTES + (order === null ? 0 : ORDER_BYTES) + values.length;
  const writer = new Writer();
  writer.field(keysStart + keys.length, 32);
  writer.field(kind === "raw" ? 1 : 0, 8);
  writer.field(order === null ? 0 : 1, 8);
  writer.field(0, 16);
  writer.field(keysStart, 32);
  writer.field(0, 32);
  if (order !== null) { for (const token of order) writer.field(token, 6); }
  writer.append(values);
  writer.append(keys);
  return writer.bytes;
}

/** The bytes [heads, 64, headDim] of a block, padded to 16. */
function rawPart(codec: Codec, bytes: Uint8Array, block: number): Uint8Array {
  const rowBytes = BLOCK * codec.headDim * FORMATS[codec.dtype].bytes;
  const headBytes = codec.tokens * codec.headDim * FORMATS[codec.dtype].bytes;
  const writer = new Writer();
  for (let head = 0; head < codec.heads; head++) {
    const start = head * headBytes + block * rowBytes;
    writer.append(bytes.subarray(start, start + rowBytes));
  }
  writer.pad(16);
  return writer.bytes;
}

function concatenated(chunks: readonly Uint8Array[]): Records {
  const offsets = [0];
  for (const chunk of chunks) offsets.push(offsets.at(-1)! + chunk.length);
  const records = new Uint8Array(offsets.at(-1)!);
  chunks.forEach((chunk, i) => records.set(chunk, offsets[i]!));
  return { records, offsets };
}

/** Step 3: both parts and the order to records. `raw` is the cache itself, for blocks that are kept raw. */
export function pack(
  codec: Codec,
  { keys, values, order }: { keys: Quantized; values: Quantized; order: Uint8Array },
  raw?: CacheBytes,
): Records {
  const chunks: Uint8Array[] = [];
  for (let block = 0; block < blockCount(codec); block++) {
    if (raw && (keys.nonFiniteBlocks[block] || values.nonFiniteBlocks[block])) {
      chunks.push(record("raw", null, {
        keys: rawPart(codec, raw.keys, block),
        values: rawPart(codec, raw.values, block),
      }));
      continue;
    }
    const blockOrder = order.subarray(block * BLOCK, (block + 1) * BLOCK);
    const part = (name: Part, quantized: Quantized) => {
      const groups = groupCount(codec, name);
      return packPart(codec, blockCodes(codec, quantized.codes, block), {
        order: blockOrder,
        scales: quantized.scales.subarray(block * groups, (block + 1) * groups),
        zeros: quantized.zeros.subarray(block * groups, (block + 1) * groups),
      });
    };
    chunks.push(record("packed", isIdentity(blockOrder) ? null : blockOrder, {
      keys: part("keys", keys),
      values: part("values", values),
    }));
  }
  return concatenated(chunks);
}

/** What {@linkcode encode} made of a cache, with every step in between. */
export interface Encoded extends Records {
  readonly keys: Quantized;
  readonly values: Quantized;
  readonly order: Uint8Array;
  readonly nonFinite: NonFinite | null;
}

/** All three steps. Blocks with a non-finite group become raw if the codec keeps them. */
export function encode(codec: Codec, cache: CacheBytes): Encoded {
  const keys = quantize(codec, "keys", decodeFloats(codec.dtype, cache.keys));
  const values = quantize(codec, "values", decodeFloats(codec.dtype, cache.values));
  const order = repack(codec, keys.codes, values.codes);
  const nonFinite = firstNonFinite(keys.nonFinite, values.nonFinite);
  const records = pack(codec, { keys, values, order }, codec.keepNonFinite ? cache : undefined);
  return { ...records, keys, values, order, nonFinite };
}

// ---- inverse ---------------------------------------------------------------------------------------

/** Reads fields as {@linkcode Writer} writes them; throws at the end. */
class Reader {
  readonly #bytes: Uint8Array;
  #bits = 0;

  constructor(bytes: Uint8Array) {
    this.#bytes = bytes;
  }

  get position(): number {
    return Math.ceil(this.#bits / 8);
  }

  field(width: number): number {
    check(this.#bits + width <= this.#bytes.length * 8, "a field ends inside its record");
    let value = 0;
    for (let bit = 0; bit < width; bit++, this.#bits++) {
      value += ((this.#bytes[this.#bits >> 3]! >> (this.#bits & 7)) & 1) * 2 ** bit;
    }
    return value;
  }

  bytes(count: number): Uint8Array {
    this.pad(1);
    const start = this.position;
    check(start + count <= this.#bytes.length, "a field ends inside its record");
    this.#bits += count * 8;
    return this.#bytes.subarray(start, start + count);
  }

  pad(bytes: number): void {
    const bits = Math.ceil(this.position / bytes) * bytes * 8 - this.#bits;
    for (let bit = 0; bit < bits; bit++) check(this.field(1) === 0, "padding is zero");
  }
}

/** Throws unless a record is as an encoder writes it. */
function check(condition: boolean, rule: string): asserts condition {
  if (!condition) throw new RangeError(`A record breaks the rule: ${rule}`);
}

/** What records hold. */
export interface Unpacked {
  readonly keys: Pick<Quantized, "codes" | "scales" | "zeros">;
  readonly values: Pick<Quantized, "codes" | "scales" | "zeros">;
  /** [blocks, 64] */
  readonly order: Uint8Array;
  /** [blocks]: the raw parts of a raw block, else null. */
  readonly raw: readonly (CacheBytes | null)[];
  /** [blocks], true where the order is stored. */
  readonly ordered: readonly boolean[];
}

function unpackPart(
  codec: Codec,
  part: Part,
  { bytes, order }: { bytes: Uint8Array; order: Uint8Array },
): Pick<Quantized, "codes" | "scales" | "zeros"> {
  const { heads, pack } = codec;
  const channels = channelCount(codec);
  const groups = groupCount(codec, part);
  const reader = new Reader(bytes);
  const minimumBits = reader.field(8);
  const widthBits = reader.field(8);
  const zeroBytes = reader.field(8);
  check(reader.field(8) === 0, "reserved bytes are zero");
  check(minimumBits <= 8 && widthBits <= 4, "fields of pack headers are at most 8 and 4 bits");
  check([1, 2, 4].includes(zeroBytes), "zero points take 1, 2 or 4 bytes");
  const starts = Array.from({ length: heads }, () => reader.field(32));
  const scales = decodeFloats(codec.dtype, reader.bytes(groups * FORMATS[codec.dtype].bytes));
  check(scales.every((scale) => scale > 0 && scale < Infinity), "scales are positive and finite");
  reader.pad(4);
  const sign = 2 ** (8 * zeroBytes - 1);
  const zeros = Int32Array.from({ length: groups }, () => {
    const field = reader.field(8 * zeroBytes);
    return field < sign ? field : field - 2 * sign;
  });
  reader.pad(4);
  check(zeroPointBytes(zeros) === zeroBytes, "zero points take the smallest size that holds them");

  const rows = rowsOf(codec);
  const headers = rows.map(({ channels }) => {
    const row = channels.map(() => ({
      minimum: reader.field(minimumBits),
      width: reader.field(widthBits),
    }));
    reader.pad(4);
    return row;
  });
  const all = headers.flat();
  const most = (key: "minimum" | "width") => all.reduce((m, header) => Math.max(m, header[key]), 0);
  check(widthOf(most("minimum")) === minimumBits, "minima take the fewest bits");
  check(widthOf(most("width")) === widthBits, "widths take the fewest bits");
  check(most("width") <= 8, "widths are at most 8");

  const codes = new Uint8Array(BLOCK * channels);
  const payloadsStart = reader.position;
  rows.forEach((row, i) => {
    const expected = starts[Math.floor(i / (BLOCK / pack))]!;
    if (i % (BLOCK / pack) === 0) {
      check(reader.position - payloadsStart === expected, "payloads follow each other");
    }
    headers[i]!.forEach(({ minimum, width }, j) => {
      const channel = row.channels[j]!;
      const fields = Array.from({ length: pack }, () => reader.field(width));
      check(fields.includes(0), "the minimum of a pack is one of its codes");
      check(widthOf(Math.max(...fields)) === width, "a pack takes the fewest bits");
      fields.forEach((field, k) => {
        check(minimum + field <= codeLimit(codec, part), "codes are within their limit");
        codes[order[row.position + k]! * channels + channel] = minimum + field;
      });
    });
    reader.pad(4);
  });
  reader.pad(16);
  check(reader.position === bytes.length, "a part ends where it says");
  return { codes, scales, zeros };
}

/**
 * Inverse of step 3, in the original order of tokens; raw blocks give codes 0, scales 1 and zeros 0.
 * Throws a RangeError for whatever no encoder writes.
 */
export function unpack(codec: Codec, { records, offsets }: Records): Unpacked {
  const blocks = blockCount(codec);
  const channels = channelCount(codec);
  const empty = (part: Part) => ({
    codes: new Uint8Array(blocks * BLOCK * channels),
    scales: new Float32Array(blocks * groupCount(codec, part)).fill(1),
    zeros: new Int32Array(blocks * groupCount(codec, part)),
  });
  const result = { keys: empty("keys"), values: empty("values") };
  const orders = new Uint8Array(blocks * BLOCK);
  const raw: (CacheBytes | null)[] = [];
  const ordered: boolean[] = [];
  for (let block = 0; block < blocks; block++) {
    const bytes = records.subarray(offsets[block]!, offsets[block + 1]!);
    const reader = new Reader(bytes);
    check(reader.field(32) === bytes.length && bytes.length % 16 === 0, "a record knows its size");
    const kind = reader.field(8);
    const orderStored = reader.field(8);
    check(kind <= 1 && orderStored <= 1 - kind, "a record is packed, packed with an order, or raw");
    check(reader.field(16) === 0, "reserved bytes are zero");
    const keysStart = reader.field(32);
    check(reader.field(32) === 0, "reserved bytes are zero");
    const order = orderStored ? identity.map(() => reader.field(6)) : identity;
    check(new Set(order).size === BLOCK, "an order holds every token");
    check(isIdentity(order) === (orderStored === 0), "the identity is not stored");
    orders.set(order, block * BLOCK);
    ordered.push(orderStored === 1);
    check(reader.position <= keysStart && keysStart <= bytes.length, "keys start in their record");
    const parts = {
      keys: bytes.subarray(keysStart),
      values: bytes.subarray(reader.position, keysStart),
    };
    if (kind === 1) {
      const partBytes = BLOCK * channels * FORMATS[codec.dtype].bytes;
      // Heads of 16 channels or more make a part a multiple of 16 without padding.
      check(
        parts.keys.length === partBytes && parts.values.length === partBytes,
        "raw parts hold the block",
      );
      raw.push(parts);
      continue;
    }
    raw.push(null);
    for (const part of ["keys", "values"] as const) {
      const blockOrder = orders.subarray(block * BLOCK, (block + 1) * BLOCK);
      const { codes, scales, zeros } = unpackPart(codec, part, {
        bytes: parts[part],
        order: blockOrder,
      });
      const groups = groupCount(codec, part);
      result[part].codes.set(codes, block * BLOCK * channels);
      result[part].scales.set(scales, block * groups);
      result[part].zeros.set(zeros, block * groups);
    }
  }
  return { ...result, order: orders, raw, ordered };
}

/** Records to the cache, its tail of tokens % 64 left zero. */
export function decode(codec: Codec, records: Records): CacheBytes {
  const unpacked = unpack(codec, records);
  const isRaw = unpacked.raw.map((raw) => raw !== null);
  const part = (name: Part) => {
    const bytes = encodeFloats(codec.dtype, dequantize(codec, name, unpacked[name], isRaw));
    const rowBytes = BLOCK * codec.headDim * FORMATS[codec.dtype].bytes;
    const headBytes = codec.tokens * codec.headDim * FORMATS[codec.dtype].bytes;
    unpacked.raw.forEach((raw, block) => {
      if (raw === null) return;
      for (let head = 0; head < codec.heads; head++) {
        const row = raw[name].subarray(head * rowBytes, (head + 1) * rowBytes);
        bytes.set(row, head * headBytes + block * rowBytes);
      }
    });
    return bytes;
  };
  return { keys: part("keys"), values: part("values") };
}

// ---- measure ---------------------------------------------------------------------------------------

/** What packed blocks of one part take, and how far they are from the originals. Raw blocks do not count. */
export interface PartStatistics {
  /** Sum of P * width over packs. */
  payloadBits: number;
  packs: number;
  /** Packs of width 0..8. */
  readonly widths: number[];
  /** Codes that occur. */
  readonly codes: Set<number>;
  /** Bits per value by the paper's formula; 0 without packed blocks. */
  formulaBits: number;
  /** Largest |x' - x|, before rounding to the type. */
  maxError: number;
  maxErrorOverScale: number;
  /** Sum of (x' - x)². */
  squaredError: number;
  /** Values that were compared. */
  compared: number;
}

export interface Statistics {
  readonly bytes: number;
  readonly keys: PartStatistics;
  readonly values: PartStatistics;
  readonly rawBlocks: number;
  readonly orderedBlocks: number;
}

/** Bits of the paper's formula: Σ P·width + packs·(b + ⌈log2(b + 1)⌉), b = ⌈log2(distinct codes)⌉. */
export function formulaBits(
  { payloadBits, packs, distinct }: { payloadBits: number; packs: number; distinct: number },
): number {
  const minimumBits = widthOf(distinct - 1);
  return payloadBits + packs * (minimumBits + widthOf(minimumBits));
}

/** Statistics of records; with the original cache also the errors. */
export function measure(codec: Codec, records: Records, originals?: CacheBytes): Statistics {
  const unpacked = unpack(codec, records);
  const isRaw = unpacked.raw.map((raw) => raw !== null);
  const part = (name: Part): PartStatistics => {
    const quantized = unpacked[name];
    const found: PartStatistics = {
      payloadBits: 0,
      packs: 0,
      widths: new Array<number>(9).fill(0),
      codes: new Set(),
      formulaBits: 0,
      maxError: 0,
      maxErrorOverScale: 0,
      squaredError: 0,
      compared: 0,
    };
    const x = originals && decodeFloats(codec.dtype, originals[name]);
    const restored = dequantize(codec, name, quantized, isRaw);
    isRaw.forEach((raw, block) => {
      if (raw) return;
      const codes = blockCodes(codec, quantized.codes, block);
      const order = unpacked.order.subarray(block * BLOCK, (block + 1) * BLOCK);
      for (let position = 0; position < BLOCK; position += codec.pack) {
        for (let channel = 0; channel < codes.channels; channel++) {
          const { width } = packOf(codes, order, { position, channel, pack: codec.pack });
          found.payloadBits += codec.pack * width;
          found.widths[width]! += 1;
          found.packs += 1;
        }
      }
      for (const code of codes.codes) found.codes.add(code);
      if (!x) return;
      eachValue(codec, name, block, (place) => {
        const error = Math.abs(restored[place.x]! - x[place.x]!);
        const scale = quantized.scales[place.group]!;
        found.maxError = Math.max(found.maxError, error);
        found.maxErrorOverScale = Math.max(found.maxErrorOverScale, error / scale);
        found.squaredError += error * error;
        found.compared += 1;
      });
    });
    if (found.packs > 0) {
      found.formulaBits = formulaBits({ ...found, distinct: found.codes.size }) /
        (found.packs * codec.pack);
    }
    return found;
  };
  return {
    bytes: records.records.length,
    keys: part("keys"),
    values: part("values"),
    rawBlocks: isRaw.filter((raw) => raw).length,
    orderedBlocks: unpacked.ordered.filter((ordered) => ordered).length,
  };
}
