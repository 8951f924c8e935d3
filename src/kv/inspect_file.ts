import type { Device } from "../device/device.ts";
import type { PhkvReader } from "../io/phkv_reader.ts";
import { VERSION } from "../io/phkv_format.ts";
import { MalformedBlock, ResidentRecords } from "./blocks.ts";
import type { KvCacheConfig } from "./cache_options.ts";
import { type Chunk, chunksOf } from "./chunks.ts";
import { BLOCK_TOKENS, type KvCodec } from "./codec.ts";
import type { KvFileOptions } from "./file_options.ts";
import {
  fileReport,
  type KvFileReport,
  type KvSequenceFileReport,
  layerReport,
  sequenceLayerReport,
} from "./file_report.ts";
import { StatisticsSum } from "./measure.ts";
import { layoutOf, malformedBlockError, openPacked } from "./packed_file.ts";
import { ProgressCount } from "./progress.ts";
import { tensorByteLength, withTokens } from "./tensor.ts";
import { ResidentTiles } from "./tile_blocks.ts";

/**
 * Says what a `.phkv` file holds and where its bits go. All of it is read and
 * checked. The report's `layout` tells what kind of file it is: `packs` is a cache
 * that {@linkcode packKvFile} wrote, of which the errors are 0, for the originals
 * are not in the file; `tiles` a sequence that {@linkcode KvCache.save} wrote.
 *
 * Throws `not-found` or `io` if the file cannot be read, `newer-version`,
 * `truncated` or `corrupt` if it is not whole.
 *
 * @example
 * ```ts
 * import { Device, inspectKvFile, PhkvWriter } from "@packhorse/packhorse";
 * import { assert, assertEquals } from "@std/assert";
 *
 * const input = `${await Deno.makeTempDir()}/empty.phkv`;
 * {
 *   using writer = await PhkvWriter.create(input, { layout: "packs", codec: { pack: 8 }, layers: [] });
 *   await writer.commit();
 * }
 * using device = Device.open();
 * const report = await inspectKvFile(device, { input });
 * assert(report.layout === "packs");
 * assertEquals([report.codec.pack, report.layers], [8, []]);
 * ```
 */
export async function inspectKvFile(
  device: Device,
  options: KvFileOptions,
): Promise<KvFileReport | KvSequenceFileReport> {
  const start = performance.now();
  const { input } = options;
  const opened = await openPacked(input);
  using reader = opened.reader;
  const originalBytes = reader.layers.map((layer) => 2 * tensorByteLength(layoutOf(layer)));
  const total = originalBytes.reduce((sum, bytes) => sum + bytes, 0);
  const work: Work = {
    device,
    reader,
    chunkBytes: options.chunkBytes,
    progress: new ProgressCount(total, options),
  };
  const file = { input, fileBytes: reader.byteLength };
  const seconds = () => (performance.now() - start) / 1000;
  if (opened.layout === "packs") {
    const { codec, layout } = opened;
    const layers = await inspectPacks(work, codec);
    return fileReport({ ...file, codec, layout, layers, seconds: seconds() });
  }
  const { config } = opened;
  const layers = await inspectTiles(work, config);
  const sum = (name: "originalBytes" | "packedBytes" | "recentBytes") =>
    layers.reduce((total, layer) => total + layer[name], 0);
  const { tokens, blocks } = reader.layers[0]!;
  return {
    ...file,
    layout: opened.layout,
    version: VERSION,
    dtype: config.dtype,
    heads: config.kvHeads,
    headDim: config.headDim,
    tokens,
    packedTokens: blocks * BLOCK_TOKENS,
    sinks: config.sinks,
    residual: config.residual,
    originalBytes: sum("originalBytes"),
    packedBytes: sum("packedBytes"),
    recentBytes: sum("recentBytes"),
    headerBytes: 2 * reader.headerByteLength,
    seconds: seconds(),
    layers,
  };
}

interface Work {
  readonly device: Device;
  readonly reader: PhkvReader;
  readonly chunkBytes: number | undefined;
  readonly progress: ProgressCount;
}

async function inspectPacks(work: Work, codec: KvCodec) {
  const { device, reader } = work;
  const layers = [];
  for (const [index, layer] of reader.layers.entries()) {
    const statistics = new StatisticsSum();
    const layout = layoutOf(layer);
    await inspectLayer(work, index, async ({ firstBlock, blocks }) => {
      const chunk = withTokens(layout, blocks * BLOCK_TOKENS);
      using records = await ResidentRecords.upload(
        device,
        { codec, layout: chunk },
        await reader.readBlocks(index, firstBlock, blocks),
      );
      const measured = await records.measure();
      if (measured instanceof MalformedBlock) return measured;
      statistics.add(measured);
      return undefined;
    });
    layers.push(layerReport(layer, statistics, codec));
  }
  return layers;
}

async function inspectTiles(work: Work, config: KvCacheConfig) {
  const { device, reader } = work;
  const layers = [];
  for (const [index, layer] of reader.layers.entries()) {
    const codec = config.codecs[index]!;
    await inspectLayer(work, index, async ({ firstBlock, blocks }) => {
      const records = await reader.readBlocks(index, firstBlock, blocks);
      const tiles = ResidentTiles.upload(device, config, codec, records);
      if (tiles instanceof MalformedBlock) return tiles;
      tiles[Symbol.dispose]();
      return undefined;
    });
    layers.push(sequenceLayerReport(layer, codec));
  }
  return layers;
}

/** Reads all of a layer, its blocks by `inspect`, which says which of a chunk's is malformed. */
async function inspectLayer(
  { reader, chunkBytes, progress }: Work,
  index: number,
  inspect: (chunk: Chunk) => Promise<MalformedBlock | undefined>,
): Promise<void> {
  const layer = reader.layers[index]!;
  const layout = layoutOf(layer);
  for (const chunk of chunksOf(layout, layer.blocks, chunkBytes)) {
    const malformed = await inspect(chunk);
    if (malformed) {
      const block = chunk.firstBlock + malformed.block;
      throw malformedBlockError(reader, layer, { ...malformed, block });
    }
    progress.advance(2 * tensorByteLength(withTokens(layout, chunk.blocks * BLOCK_TOKENS)));
  }
  const tail = (await reader.readTail(index))!;
  progress.advance(tail.byteLength);
}
