import { stat } from "node:fs/promises";
import type { Device } from "../device/device.ts";
import { PhkvWriter } from "../io/phkv_writer.ts";
import { nonFiniteError, ResidentRecords } from "./blocks.ts";
import { CacheFile, type CacheLayer, phkvLayer, uploadChunk } from "./cache_file.ts";
import { type Chunk, chunksOf } from "./chunks.ts";
import { BLOCK_TOKENS, type KvCodec, resolveCodec } from "./codec.ts";
import type { PackKvFileOptions } from "./file_options.ts";
import { fileReport, type KvFileReport, layerReport } from "./file_report.ts";
import { statisticsOf, StatisticsSum } from "./measure.ts";
import { joinTail } from "./pack.ts";
import { ProgressCount } from "./progress.ts";
import { tensorByteLength, withTokens } from "./tensor.ts";

/**
 * Packs the cache in a `.safetensors` file into a `.phkv` file, and measures it.
 *
 * The file holds the keys and values of layers, `[heads, tokens, headDim]` of f16,
 * bf16 or f32, and no other tensors. It is read chunk by chunk; the output appears
 * complete or not at all.
 *
 * Throws `not-found`, `io`, `corrupt` or `truncated` if a file fails, `unsupported`
 * for tensors that are no cache, `non-finite` naming file, layer, token and head
 * of a NaN or an infinity, otherwise as {@linkcode packKv}.
 *
 * @example
 * ```ts
 * import { Device, packKvFile, SafetensorsWriter, unpackKvFile } from "@packhorse/packhorse";
 * import { assert, assertEquals } from "@std/assert";
 *
 * const folder = await Deno.makeTempDir();
 * const [input, output] = [`${folder}/cache.safetensors`, `${folder}/cache.phkv`];
 * {
 *   const tensors = ["layers.0.key", "layers.0.value"]
 *     .map((name) => ({ name, dtype: "f16", shape: [2, 1000, 64] }) as const);
 *   using writer = await SafetensorsWriter.create(input, { tensors });
 *   const x = Float16Array.from({ length: 2 * 1000 * 64 }, (_, i) => Math.sin(i));
 *   for (const { name } of tensors) await writer.writeAt(name, new Uint8Array(x.buffer));
 *   await writer.commit();
 * }
 *
 * using device = Device.open();
 * const report = await packKvFile(device, { input, output, codec: { keyRel: 0.2 } });
 * assert(report.fileBytes < report.originalBytes / 3);
 * const { lost } = await unpackKvFile(device, { input: output, output: `${folder}/restored.safetensors` });
 * assertEquals(lost, []);
 * ```
 */
export async function packKvFile(
  device: Device,
  options: PackKvFileOptions,
): Promise<KvFileReport> {
  const start = performance.now();
  const { input, output, signal } = options;
  const codec = resolveCodec(options.codec ?? {});
  using cache = await CacheFile.open(options);
  const layers = cache.layers.map((layer) => phkvLayer(layer, codec));
  using writer = await PhkvWriter.create(output, {
    layout: "packs",
    codec,
    layers,
    metadata: cache.metadata,
    signal,
  });
  const progress = new ProgressCount(cache.byteLength, options);
  const reports = [];
  for (const [index, layer] of cache.layers.entries()) {
    const statistics = new StatisticsSum();
    const { blocks, tokens } = layers[index]!;
    for (const chunk of chunksOf(layer.layout, blocks, options.chunkBytes)) {
      await packChunk(device, { cache, layer, codec, writer, index, statistics }, chunk);
      progress.advance(2 * tensorByteLength(withTokens(layer.layout, chunk.blocks * BLOCK_TOKENS)));
    }
    const tail = joinTail(await cache.read(layer, blocks * BLOCK_TOKENS, tokens));
    await writer.writeTail(index, tail);
    progress.advance(tail.byteLength);
    reports.push(layerReport(layers[index]!, statistics, codec));
  }
  await writer.commit();
  return fileReport({
    input,
    output,
    codec,
    layout: "packs",
    fileBytes: (await stat(output)).size,
    seconds: (performance.now() - start) / 1000,
    layers: reports,
  });
}

async function packChunk(
  device: Device,
  { cache, layer, codec, writer, index, statistics }: {
    cache: CacheFile;
    layer: CacheLayer;
    codec: KvCodec;
    writer: PhkvWriter;
    index: number;
    statistics: StatisticsSum;
  },
  chunk: Chunk,
): Promise<void> {
  using resident = await uploadChunk(device, { cache, layer }, chunk);
  const encoded = await resident.encode(codec);
  if (!(encoded instanceof ResidentRecords)) {
    const place = { ...encoded, token: chunk.firstBlock * BLOCK_TOKENS + encoded.token };
    throw nonFiniteError(place, ` of ${layer.layer} of ${cache.path}`);
  }
  using records = encoded;
  statistics.add(await statisticsOf(records, resident));
  const { records: content, offsets } = await records.download();
  await writer.appendBlocks(index, content, offsets);
}
