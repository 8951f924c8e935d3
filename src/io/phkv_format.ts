/*
 * The .phkv container, version 1: a packed key/value cache. Numbers are little-endian, checksums CRC-32
 * (of zip and PNG).
 *
 *   file = header, entries, the header again
 *
 *   header
 *      0  8 bytes  magic: 89 50 48 4B 56 0D 0A 1A ("PHKV" between bytes that text transfers damage)
 *      8  u32      version
 *     12  u32      checksum of the header with this field zero
 *     16  u64      bytes of the header, a multiple of 8
 *     24  u32      bytes of the JSON
 *     28  u32      zero
 *     32  JSON, UTF-8, zero-padded to a multiple of 8
 *         table, 16 bytes an entry: u64 bytes, u32 checksum, u32 zero
 *         u64      bytes of the header again, and the magic again, so that the copy is found from the file's end
 *
 *   JSON
 *      "format": "phkv"
 *      "layout": "packs" (records as packhorse.h defines them) or "tiles"
 *      "codec": object, the parameters that decode the records
 *      "blockTokens": 64
 *      "layers": [{"layer", "keyName", "valueName": strings, "dtype": "f16" | "bf16" | "f32",
 *                  "heads", "tokens", "headDim", "blocks": numbers, "sinks": number}]
 *      "metadata": {string: string}
 *
 *   entries, without gaps, layer by layer: one record a block, then the layer's tail
 *      record: opaque here; in "packs" a multiple of 16 bytes, of which the first u32 is its length
 *      tail:   the tokens outside the blocks in their own type: keys [heads, tokens - 64 * blocks, headDim],
 *              then values likewise; an entry of 0 bytes if there are none
 *
 *   In "packs" the blocks begin with token 0. "tiles" is one sequence of a growing cache: its blocks begin with
 *   token "sinks" (0 if missing), so that the tail is the tokens before and after them, in order. A record is the
 *   block's parameters and a record per kv head, as cuda/kv/tile.h defines them; the codec is {"residual": number,
 *   "layers": [{"keys": codec, "values": codec}]} as KvCache.create takes them.
 *
 * Every byte is checked: the header by its checksum, its copy against it, each entry by its own checksum, and
 * header, entries and copy must fill the file exactly. Either header and any intact entry can be read without
 * the rest. The magic, the version and their places stay the same in later versions.
 */
import { BYTES_PER_ELEMENT, type DType, elementCount } from "../dtype.ts";
import { PackhorseError } from "../error.ts";
import { checksum } from "./checksum.ts";
import { isCount, isObject, isStringRecord, parseJsonObject } from "./untrusted_json.ts";

/** Tokens of a block. */
export const BLOCK_TOKENS = 64;

/** How the records of a file store a block: `packs` is compact, `tiles` serves attention kernels. */
export type PhkvLayout = "packs" | "tiles";

/** A layer of a `.phkv` file: what its tensors were, and how many of their tokens are in blocks. */
export interface PhkvLayer {
  /** Unique name, such as "layers.0". */
  readonly layer: string;
  /** Name of the tensor of keys. */
  readonly keyName: string;
  /** Name of the tensor of values. */
  readonly valueName: string;
  /** Type of both tensors. */
  readonly dtype: Extract<DType, "f16" | "bf16" | "f32">;
  /** Key/value heads, 1 to 4096. Both tensors are `[heads, tokens, headDim]`. */
  readonly heads: number;
  /** Tokens, those in blocks included. */
  readonly tokens: number;
  /** Channels of a head: a multiple of 16, up to 256. */
  readonly headDim: number;
  /** Blocks of 64 tokens, from the first token (or those of `sinks`) on; all other tokens are the tail. */
  readonly blocks: number;
  /** Layout `tiles` only: tokens before the first block, as far as there are so many. 0 if missing. */
  readonly sinks?: number;
}

/** What a header's JSON says. */
export interface PhkvDescription {
  /** How the records store blocks. */
  readonly layout: PhkvLayout;
  /** What decodes the records; opaque here. */
  readonly codec: Readonly<Record<string, unknown>>;
  /** The layers, in the order of their entries. */
  readonly layers: readonly PhkvLayer[];
  /** Whatever else the writer wanted to keep. */
  readonly metadata: Readonly<Record<string, string>>;
}

/** The table of a header: an element per entry. */
export interface EntryTable {
  readonly byteLengths: Float64Array;
  readonly checksums: Uint32Array;
}

export const VERSION = 1;
export const MAGIC = Uint8Array.of(0x89, 0x50, 0x48, 0x4b, 0x56, 0x0d, 0x0a, 0x1a);
/** Bytes before the JSON. */
export const PREFIX_BYTES = 32;
/** Bytes after the table. */
export const SUFFIX_BYTES = 16;
const ENTRY_BYTES = 16;
const MOST_JSON_BYTES = 2 ** 24;
/** Room for 15 million blocks. */
const MOST_HEADER_BYTES = 2 ** 28;

/** Entries of a file, and so of its table. */
export function entryCount(layers: readonly PhkvLayer[]): number {
  return layers.reduce((count, layer) => count + layer.blocks + 1, 0);
}

/** Bytes of a layer's tail, keys and values together. */
export function tailByteLength(layer: PhkvLayer): number {
  const tokens = layer.tokens - layer.blocks * BLOCK_TOKENS;
  return elementCount([2, layer.heads, tokens, layer.headDim, BYTES_PER_ELEMENT[layer.dtype]]);
}

/** The first token of a block; of the block after the last one, the first token after the blocks. */
export function blockStart({ sinks = 0 }: PhkvLayer, block: number): number {
  return sinks + block * BLOCK_TOKENS;
}

/** Tokens of the tail that come before the blocks. */
export function leadingTokens({ sinks = 0, tokens }: PhkvLayer): number {
  return Math.min(sinks, tokens);
}

/** How messages call a block: "layers.2 block 5 (tokens 320-383)". */
export function blockLabel(layer: PhkvLayer, block: number): string {
  const token = blockStart(layer, block);
  return `${layer.layer} block ${block} (tokens ${token}-${token + BLOCK_TOKENS - 1})`;
}

/** How messages call a tail: "layers.2 tail (tokens 384-400)". */
export function tailLabel(layer: PhkvLayer): string {
  const ranges = [
    [0, leadingTokens(layer)],
    [Math.min(blockStart(layer, layer.blocks), layer.tokens), layer.tokens],
  ].filter(([first, end]) => first! < end!).map(([first, end]) => `${first}-${end! - 1}`);
  return ranges.length === 0
    ? `${layer.layer} tail (no tokens)`
    : `${layer.layer} tail (tokens ${ranges.join(" and ")})`;
}

/** Why a record cannot have `bytes` bytes, or undefined if it can. */
export function recordFlaw(layout: PhkvLayout, bytes: number): string | undefined {
  const fits = layout === "packs" ? bytes >= 16 && bytes % 16 === 0 : bytes >= 1;
  const rule = layout === "packs" ? "a multiple of 16 bytes, at least 16" : "at least 1 byte";
  return fits ? undefined : `takes ${bytes} bytes; a record of layout ${layout} takes ${rule}`;
}

/** The JSON of a header. */
export function encodeDescription(
  description: Omit<PhkvDescription, "codec"> & { readonly codec: object },
): Uint8Array {
  const { layout, codec, layers, metadata } = description;
  const json = { format: "phkv", layout, codec, blockTokens: BLOCK_TOKENS, layers, metadata };
  return new TextEncoder().encode(JSON.stringify(json));
}

/** Parses and checks a header's JSON. Throws `corrupt`; `what` begins the message. */
export function decodeDescription(json: Uint8Array, what: string): PhkvDescription {
  const fail: Fail = (reason) => {
    throw new PackhorseError("corrupt", `${what} ${reason}`);
  };
  if (json.byteLength > MOST_JSON_BYTES) {
    return fail(`holds ${json.byteLength} bytes of JSON, at most ${MOST_JSON_BYTES} are allowed`);
  }
  const { format, layout, codec, blockTokens, layers, metadata } = parseJsonObject(json, what);
  if (format !== "phkv") return fail(`has format ${JSON.stringify(format)}, expected "phkv"`);
  if (layout !== "packs" && layout !== "tiles") {
    return fail(`has layout ${JSON.stringify(layout)}, expected "packs" or "tiles"`);
  }
  if (!isObject(codec)) return fail("has a codec that is not an object");
  if (blockTokens !== BLOCK_TOKENS) {
    return fail(`has blocks of ${JSON.stringify(blockTokens)} tokens, expected ${BLOCK_TOKENS}`);
  }
  if (!Array.isArray(layers)) return fail("has no list of layers");
  if (!isStringRecord(metadata)) return fail("has metadata that is not a map of strings");

  const layerNames = new Set<string>();
  const tensorNames = new Set<string>();
  const checkedLayers = layers.map((value, i) => {
    const layer = checkLayer(
      value,
      layout,
      (reason) => fail(`describes layer ${i} wrongly: ${reason}`),
    );
    if (layerNames.has(layer.layer)) return fail(`names the layer ${layer.layer} twice`);
    layerNames.add(layer.layer);
    for (const name of [layer.keyName, layer.valueName]) {
      if (tensorNames.has(name)) return fail(`names the tensor ${JSON.stringify(name)} twice`);
      tensorNames.add(name);
    }
    return layer;
  });
  return { layout, codec, layers: checkedLayers, metadata };
}

type Fail = (reason: string) => never;

function checkLayer(value: unknown, layout: PhkvLayout, fail: Fail): PhkvLayer {
  if (!isObject(value)) return fail("it is not an object");
  const { layer, keyName, valueName, dtype, heads, tokens, headDim, blocks } = value;
  // Layer names go to terminals as they are.
  // deno-lint-ignore no-control-regex
  if (typeof layer !== "string" || layer === "" || /[\x00-\x1f\x7f-\x9f]/.test(layer)) {
    return fail(`layer must be a printable name, is ${JSON.stringify(layer)}`);
  }
  if (typeof keyName !== "string" || typeof valueName !== "string") {
    return fail("keyName and valueName must be strings");
  }
  if (dtype !== "f16" && dtype !== "bf16" && dtype !== "f32") {
    return fail(`dtype must be f16, bf16 or f32, is ${JSON.stringify(dtype)}`);
  }
  if (!isCount(heads) || heads < 1 || heads > 4096) {
    return fail(`heads must be 1 to 4096, is ${JSON.stringify(heads)}`);
  }
  if (!isCount(headDim) || headDim % 16 !== 0 || headDim < 16 || headDim > 256) {
    return fail(`headDim must be a multiple of 16 in 16 to 256, is ${JSON.stringify(headDim)}`);
  }
  // Bounds the bytes of the tensors, tail included, by a safe integer.
  const mostTokens = Number.MAX_SAFE_INTEGER / (2 * heads * headDim * BYTES_PER_ELEMENT[dtype]);
  if (!isCount(tokens) || tokens > mostTokens) {
    return fail(`tokens must be a count, at most ${mostTokens}, is ${JSON.stringify(tokens)}`);
  }
  if (!isCount(blocks) || blocks * BLOCK_TOKENS > tokens) {
    return fail(
      `blocks must be a count of 64 of its ${tokens} tokens, is ${JSON.stringify(blocks)}`,
    );
  }
  const checked: PhkvLayer = { layer, keyName, valueName, dtype, heads, tokens, headDim, blocks };
  const { sinks } = value;
  if (sinks === undefined) return checked;
  if (layout !== "tiles") return fail(`layers of layout ${layout} have no sinks`);
  if (!isCount(sinks) || (blocks > 0 && sinks > tokens - blocks * BLOCK_TOKENS)) {
    return fail(`sinks must be a count of tokens before the blocks, is ${JSON.stringify(sinks)}`);
  }
  return { ...checked, sinks };
}

/** Bytes of the header with this much JSON and this many entries; throws `invalid-argument` beyond the limit. */
export function headerByteLength(jsonBytes: number, entries: number): number {
  const bytes = tableStart(jsonBytes) + entries * ENTRY_BYTES + SUFFIX_BYTES;
  if (bytes > MOST_HEADER_BYTES) {
    const message =
      `Cannot write a header of ${bytes} bytes, at most ${MOST_HEADER_BYTES}: use fewer blocks`;
    throw new PackhorseError("invalid-argument", message);
  }
  return bytes;
}

/** The whole header. */
export function encodeHeader(json: Uint8Array, table: EntryTable): Uint8Array<ArrayBuffer> {
  const entries = table.checksums.length;
  const header = new Uint8Array(headerByteLength(json.byteLength, entries));
  const view = new DataView(header.buffer);
  header.set(MAGIC, 0);
  view.setUint32(8, VERSION, true);
  view.setBigUint64(16, BigInt(header.byteLength), true);
  view.setUint32(24, json.byteLength, true);
  header.set(json, PREFIX_BYTES);
  for (let i = 0, at = tableStart(json.byteLength); i < entries; i++, at += ENTRY_BYTES) {
    view.setBigUint64(at, BigInt(table.byteLengths[i]!), true);
    view.setUint32(at + 8, table.checksums[i]!, true);
  }
  view.setBigUint64(header.byteLength - 16, BigInt(header.byteLength), true);
  header.set(MAGIC, header.byteLength - 8);
  view.setUint32(12, headerChecksum(header), true);
  return header;
}

/** A header that passed every check. */
export interface Header {
  readonly bytes: Uint8Array;
  readonly description: PhkvDescription;
  readonly table: EntryTable;
}

/** The header length that a file's first 32 bytes claim. Throws `corrupt` or `newer-version`. */
export function decodePrefix(prefix: Uint8Array, what: string): number {
  const view = new DataView(prefix.buffer, prefix.byteOffset, PREFIX_BYTES);
  const version = view.getUint32(8, true);
  if (version > VERSION) {
    const message =
      `${what} has format version ${version}, this Packhorse reads up to ${VERSION}: ` +
      "update Packhorse (or, if the file is not newer, this field is damaged)";
    throw new PackhorseError("newer-version", message);
  }
  return checkHeaderLength(view.getBigUint64(16, true), what);
}

/** The header length that a file's last 16 bytes claim. Throws `corrupt`. */
export function decodeSuffix(suffix: Uint8Array, what: string): number {
  if (!startsWith(suffix.subarray(8), MAGIC)) {
    throw new PackhorseError("corrupt", `${what} does not end in the format's magic bytes`);
  }
  const view = new DataView(suffix.buffer, suffix.byteOffset, SUFFIX_BYTES);
  return checkHeaderLength(view.getBigUint64(0, true), what);
}

/** Checks all of a header. Throws `corrupt` or `newer-version`; `what` begins the message. */
export function decodeHeader(bytes: Uint8Array, what: string): Header {
  const fail: Fail = (reason) => {
    throw new PackhorseError("corrupt", `${what} ${reason}`);
  };
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (!startsWith(bytes, MAGIC)) return fail("does not begin with the format's magic bytes");
  const lengths = [decodePrefix(bytes, what), decodeSuffix(bytes.subarray(-SUFFIX_BYTES), what)];
  const [expected, actual] = [view.getUint32(12, true), headerChecksum(bytes)];
  if (actual !== expected) {
    return fail(`is damaged: its checksum is ${hex(actual)}, expected ${hex(expected)}`);
  }
  if (view.getUint32(8, true) !== VERSION) {
    return fail("has format version 0, which does not exist");
  }
  if (lengths.some((length) => length !== bytes.byteLength) || view.getUint32(28, true) !== 0) {
    return fail("contradicts itself about its length");
  }

  const jsonBytes = view.getUint32(24, true);
  const jsonEnd = PREFIX_BYTES + jsonBytes;
  const tableEnd = bytes.byteLength - SUFFIX_BYTES;
  if (tableStart(jsonBytes) > tableEnd) {
    return fail(`has no room for its ${jsonBytes} bytes of JSON`);
  }
  const description = decodeDescription(bytes.subarray(PREFIX_BYTES, jsonEnd), what);
  if (bytes.subarray(jsonEnd, tableStart(jsonBytes)).some((byte) => byte !== 0)) {
    return fail("has padding that is not zero");
  }
  const entries = (tableEnd - tableStart(jsonBytes)) / ENTRY_BYTES;
  if (entries !== entryCount(description.layers)) {
    return fail(`has ${entries} entries, its layers take ${entryCount(description.layers)}`);
  }

  const table = { byteLengths: new Float64Array(entries), checksums: new Uint32Array(entries) };
  for (let i = 0, at = tableStart(jsonBytes); i < entries; i++, at += ENTRY_BYTES) {
    table.byteLengths[i] = Number(view.getBigUint64(at, true));
    table.checksums[i] = view.getUint32(at + 8, true);
    if (view.getUint32(at + 12, true) !== 0) return fail(`has an unknown field in entry ${i}`);
  }
  checkLengths(description, table.byteLengths, fail);
  return { bytes, description, table };
}

/** Whether `bytes` begins with `start`, as far as both go. */
export function startsWith(bytes: Uint8Array, start: Uint8Array): boolean {
  return start.every((byte, i) => i >= bytes.byteLength || bytes[i] === byte);
}

/** A checksum as messages show it. */
export function hex(value: number): string {
  return `0x${value.toString(16).padStart(8, "0")}`;
}

function checkLengths(description: PhkvDescription, byteLengths: Float64Array, fail: Fail): void {
  let entry = 0;
  let total = 0;
  const next = () => {
    const bytes = byteLengths[entry++]!;
    total += bytes;
    if (!Number.isSafeInteger(total)) return fail("has entries too long to address");
    return bytes;
  };
  for (const layer of description.layers) {
    for (let block = 0; block < layer.blocks; block++) {
      const flaw = recordFlaw(description.layout, next());
      if (flaw) return fail(`is wrong about ${blockLabel(layer, block)}: it ${flaw}`);
    }
    const bytes = next();
    if (bytes !== tailByteLength(layer)) {
      return fail(
        `gives ${tailLabel(layer)} ${bytes} bytes, its shape takes ${tailByteLength(layer)}`,
      );
    }
  }
}

function checkHeaderLength(claimed: bigint, what: string): number {
  const bytes = Number(claimed);
  if (bytes % 8 !== 0 || bytes < PREFIX_BYTES + SUFFIX_BYTES || bytes > MOST_HEADER_BYTES) {
    throw new PackhorseError("corrupt", `${what} claims ${claimed} bytes, which no header has`);
  }
  return bytes;
}

function headerChecksum(header: Uint8Array): number {
  const zeroField = new Uint8Array(4);
  return checksum(header.subarray(16), checksum(zeroField, checksum(header.subarray(0, 12))));
}

function tableStart(jsonBytes: number): number {
  return PREFIX_BYTES + Math.ceil(jsonBytes / 8) * 8;
}
