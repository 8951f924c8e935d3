import { BLOCK_TOKENS, type KvCodec } from "./codec.ts";
import type { KvMeasurement, StatisticsSum } from "./measure.ts";
import { type KvDType, tensorByteLength, withTokens } from "./tensor.ts";
import type { PhkvLayer, PhkvLayout } from "../io/phkv_format.ts";
import { VERSION } from "../io/phkv_format.ts";

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
  readonly layout: PhkvLayout;
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
