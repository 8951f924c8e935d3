import { BLOCK_TOKENS, type KvCodec } from "./codec.ts";
import type { KvMeasurement, StatisticsSum } from "./measure.ts";
import { type KvDType, tensorByteLength, withTokens } from "./tensor.ts";
import type { PhkvStoredLayer } from "../io/phkv_reader.ts";
import { type PhkvLayer, VERSION } from "../io/phkv_format.ts";
import type { KvCacheCodec } from "./cache_options.ts";

/** What a layer takes in a packed file, and its errors where the originals were at hand. */
export interface KvLayerReport extends KvMeasurement {
  /** "layers.0" */
  readonly layer: string;
  /** Type of keys and values; both are `[heads, tokens, headDim]`. */
  readonly dtype: KvDType;
  /** Key/value heads. */
  readonly heads: number;
  /** Tokens, the tail included. */
  readonly tokens: number;
  /** Channels of a head. */
  readonly headDim: number;
  /** Blocks of 64 tokens. */
  readonly blocks: number;
  /** Tokens after the last block, which stay as they are. */
  readonly tailTokens: number;
}

/** What a packed file takes. */
export interface KvFileReport {
  /** The file read. */
  readonly input: string;
  /** The file written, if any. */
  readonly output?: string;
  /** How the cache was packed. */
  readonly codec: KvCodec;
  /** How the file stores blocks. */
  readonly layout: "packs";
  /** Of the file format. */
  readonly version: number;
  /** Bytes of the packed file. */
  readonly fileBytes: number;
  /** Bytes of all keys and values. */
  readonly originalBytes: number;
  /** Bytes of all records and tails; the rest of the file is headers. */
  readonly trueBytes: number;
  /** How long reading, packing, measuring and writing took together. */
  readonly seconds: number;
  /** Each layer, in the file's order. */
  readonly layers: readonly KvLayerReport[];
}

/** What a layer takes in a file of a saved sequence. */
export interface KvSequenceLayerReport {
  /** "layers.0" */
  readonly layer: string;
  /** How its tokens are packed. */
  readonly codec: KvCacheCodec;
  /** Bytes of all its keys and values in 16 bits. */
  readonly originalBytes: number;
  /** Bytes of the records of its packed tokens. */
  readonly packedBytes: number;
  /** Bytes of its tokens in 16 bits. */
  readonly recentBytes: number;
  /** Bits that a value of its packed tokens takes, everything counted; 0 if none is packed. */
  readonly bits: number;
}

/** What a file of a sequence holds that {@linkcode KvCache.save} wrote. */
export interface KvSequenceFileReport {
  /** The file read. */
  readonly input: string;
  /** How the file stores blocks. */
  readonly layout: "tiles";
  /** Of the file format. */
  readonly version: number;
  /** Type of keys and values. */
  readonly dtype: KvDType;
  /** Key/value heads of each layer. */
  readonly heads: number;
  /** Channels of a head. */
  readonly headDim: number;
  /** Tokens of the sequence. */
  readonly tokens: number;
  /** Of these, packed. */
  readonly packedTokens: number;
  /** First tokens that stay in 16 bits, as far as there are so many. */
  readonly sinks: number;
  /** Newest tokens that the cache kept in 16 bits at least. */
  readonly residual: number;
  /** Bytes of the file: those of records, of tokens in 16 bits, and of headers. */
  readonly fileBytes: number;
  /** Bytes of all keys and values in 16 bits. */
  readonly originalBytes: number;
  /** Bytes of the records of packed tokens. */
  readonly packedBytes: number;
  /** Bytes of tokens in 16 bits. */
  readonly recentBytes: number;
  /** Bytes of both headers, checksums included. */
  readonly headerBytes: number;
  /** How long reading and checking took. */
  readonly seconds: number;
  /** Each layer. */
  readonly layers: readonly KvSequenceLayerReport[];
}

/** The report on a layer of a saved sequence. */
export function sequenceLayerReport(
  { layer, dtype, heads, tokens, headDim, blocks, recordsByteLength, tailByteLength }:
    PhkvStoredLayer,
  codec: KvCacheCodec,
): KvSequenceLayerReport {
  const packedValues = 2 * heads * headDim * blocks * BLOCK_TOKENS;
  return {
    layer,
    codec,
    originalBytes: 2 * tensorByteLength({ dtype, shape: [heads, tokens, headDim] }),
    packedBytes: recordsByteLength,
    recentBytes: tailByteLength,
    bits: 8 * recordsByteLength / Math.max(1, packedValues),
  };
}

/** The report on a layer. */
export function layerReport(
  { layer, dtype, heads, tokens, headDim, blocks }: PhkvLayer,
  statistics: StatisticsSum,
  { pack }: KvCodec,
): KvLayerReport {
  const layout = { dtype, shape: [heads, tokens, headDim] } as const;
  const tailTokens = tokens - blocks * BLOCK_TOKENS;
  return {
    layer,
    dtype,
    heads,
    tokens,
    headDim,
    blocks,
    tailTokens,
    originalBytes: 2 * tensorByteLength(layout),
    trueBytes: statistics.recordsByteLength + 2 * tensorByteLength(withTokens(layout, tailTokens)),
    ...statistics.measurement(pack),
  };
}

/** The report on a file. */
export function fileReport(
  report: Omit<KvFileReport, "version" | "originalBytes" | "trueBytes">,
): KvFileReport {
  const sum = (bytes: (layer: KvLayerReport) => number) =>
    report.layers.reduce((total, layer) => total + bytes(layer), 0);
  return {
    ...report,
    version: VERSION,
    originalBytes: sum(({ originalBytes }) => originalBytes),
    trueBytes: sum(({ trueBytes }) => trueBytes),
  };
}
