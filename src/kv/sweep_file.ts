import type { Device } from "../device/device.ts";
import { BYTES_PER_ELEMENT } from "../dtype.ts";
import {
  type BlockStatistics,
  nonFiniteError,
  type ResidentBlocks,
  ResidentRecords,
} from "./blocks.ts";
import { CacheFile, phkvLayer, uploadChunk } from "./cache_file.ts";
import { chunksOf } from "./chunks.ts";
import { BLOCK_TOKENS, type KvCodec, type KvPack, type KvRepack, resolveCodec } from "./codec.ts";
import type { KvCacheFileOptions } from "./file_options.ts";
import { type KvLayerReport, layerReport } from "./file_report.ts";
import { type KvPartMeasurement, statisticsOf, StatisticsSum } from "./measure.ts";
import { ProgressCount } from "./progress.ts";
import { type KvPart, tensorByteLength, withTokens } from "./tensor.ts";

/** Options of {@linkcode sweepKvFile}: the grid is every combination. */
export interface SweepKvFileOptions extends KvCacheFileOptions {
  /** Scales of the keys, 1/254 to 1. */
  readonly keyRels: readonly number[];
  /** Scales of the values, 1/254 to 1. */
  readonly valueRels: readonly number[];
  /** Orders of the tokens, as {@linkcode KvCodecOptions.repack}. */
  readonly repacks: readonly KvRepack[];
  /** Tokens that share a bit width, as {@linkcode KvCodecOptions.pack}. */
  readonly packs: readonly KvPack[];
}

/** A setting, and what it does to all layers of a cache together. */
export interface KvSweepRow {
  /** Scale of the keys as a share of a token's range. */
  readonly keyRel: number;
  /** Scale of the values likewise. */
  readonly valueRel: number;
  /** How tokens were reordered. */
  readonly repack: KvRepack;
  /** Tokens that share a bit width. */
  readonly pack: KvPack;
  /** Bits per key by the formula of {@linkcode KvPartMeasurement.bits}. */
  readonly keyBits: number;
  /** Bits per value likewise. */
  readonly valueBits: number;
  /** Bits of records and tails per key or value. */
  readonly trueBitsPerValue: number;
  /** Original bytes by those of records and tails. */
  readonly ratio: number;
  /** Root-mean-square error of the keys in packed blocks, before rounding to the cache's type. */
  readonly keyRmsError: number;
  /** That of the values. */
  readonly valueRmsError: number;
}

/**
 * Measures bits and errors of a cache in a `.safetensors` file over a grid of
 * settings, without writing a file. Every chunk is read once; blocks with a NaN or
 * an infinity are left as they are.
 *
 * Throws as {@linkcode packKvFile}.
 *
 * @example
 * ```ts
 * import { Device, SafetensorsWriter, sweepKvFile } from "@packhorse/packhorse";
 * import { assert } from "@std/assert";
 *
 * const input = `${await Deno.makeTempDir()}/cache.safetensors`;
 * {
 *   const tensors = ["layers.0.key", "layers.0.value"]
 *     .map((name) => ({ name, dtype: "f32", shape: [1, 128, 16] }) as const);
 *   using writer = await SafetensorsWriter.create(input, { tensors });
 *   const x = Float32Array.from({ length: 128 * 16 }, (_, i) => Math.sin(i));
 *   for (const { name } of tensors) await writer.writeAt(name, new Uint8Array(x.buffer));
 *   await writer.commit();
 * }
 * using device = Device.open();
 * const grid = { keyRels: [0.05, 0.2], valueRels: [0.2], repacks: ["none"], packs: [16] } as const;
 * const [fine, coarse] = await sweepKvFile(device, { input, ...grid });
 * assert(fine!.keyBits > coarse!.keyBits && fine!.keyRmsError < coarse!.keyRmsError);
 * ```
 */
export async function sweepKvFile(
  device: Device,
  options: SweepKvFileOptions,
): Promise<KvSweepRow[]> {
  const settings = options.keyRels.flatMap((keyRel) =>
    options.valueRels.flatMap((valueRel) =>
      options.repacks.flatMap((repack) =>
        options.packs.map((pack) => ({ keyRel, valueRel, repack, pack }))
      )
    )
  );
  // Blocks that are not finite count with the bytes they take as they are.
  const codecs = settings.map((setting) => resolveCodec({ ...setting, keepNonFinite: true }));
  using cache = await CacheFile.open(options);
  const progress = new ProgressCount(cache.byteLength * settings.length, options);
  const layers: KvLayerReport[][] = settings.map(() => []);
  for (const layer of cache.layers) {
    const sums = codecs.map(() => new StatisticsSum());
    const blocks = Math.floor(layer.layout.shape[1] / BLOCK_TOKENS);
    for (const chunk of chunksOf(layer.layout, blocks, options.chunkBytes)) {
      using resident = await uploadChunk(device, { cache, layer }, chunk);
      for (const [i, codec] of codecs.entries()) {
        sums[i]!.add(await encodeAndMeasure(resident, codec));
        progress.advance(2 * tensorByteLength(resident.layout));
      }
    }
    const tail = withTokens(layer.layout, layer.layout.shape[1] % BLOCK_TOKENS);
    progress.advance(2 * tensorByteLength(tail) * settings.length);
    codecs.forEach((codec, i) => {
      layers[i]!.push(layerReport(phkvLayer(layer, codec), sums[i]!, codec));
    });
  }
  return settings.map((setting, i) => ({ ...setting, ...summarize(layers[i]!) }));
}

async function encodeAndMeasure(blocks: ResidentBlocks, codec: KvCodec): Promise<BlockStatistics> {
  const encoded = await blocks.encode(codec);
  if (!(encoded instanceof ResidentRecords)) throw nonFiniteError(encoded);
  using records = encoded;
  return await statisticsOf(records, blocks);
}

type Summary = Omit<KvSweepRow, "keyRel" | "valueRel" | "repack" | "pack">;

function summarize(layers: readonly KvLayerReport[]): Summary {
  const sum = (of: (layer: KvLayerReport) => number) =>
    layers.reduce((total, layer) => total + of(layer), 0);
  /** A mean over the packed values of all layers. */
  const mean = (part: KvPart, of: (measurement: KvPartMeasurement) => number) => {
    const packs = (layer: KvLayerReport) => layer[part].widths.reduce((a, b) => a + b, 0);
    return sum((layer) => packs(layer) * of(layer[part])) / Math.max(1, sum(packs));
  };
  const rmsError = (part: KvPart) => Math.sqrt(mean(part, ({ rmsError }) => rmsError ** 2));
  const originalBytes = sum((layer) => layer.originalBytes);
  const trueBytes = sum((layer) => layer.trueBytes);
  const values = sum(({ originalBytes, dtype }) => originalBytes / BYTES_PER_ELEMENT[dtype]);
  return {
    keyBits: mean("keys", ({ bits }) => bits),
    valueBits: mean("values", ({ bits }) => bits),
    trueBitsPerValue: 8 * trueBytes / Math.max(1, values),
    ratio: originalBytes / Math.max(1, trueBytes),
    keyRmsError: rmsError("keys"),
    valueRmsError: rmsError("values"),
  };
}
