import type { Device } from "../device/device.ts";
import { MalformedBlock, malformedError, ResidentRecords } from "./blocks.ts";
import { chunksOf } from "./chunks.ts";
import { BLOCK_TOKENS } from "./codec.ts";
import type { KvFileOptions } from "./file_options.ts";
import { fileReport, type KvFileReport, layerReport } from "./file_report.ts";
import { StatisticsSum } from "./measure.ts";
import { layoutOf, openPacked } from "./packed_file.ts";
import { ProgressCount } from "./progress.ts";
import { tensorByteLength, withTokens } from "./tensor.ts";

/**
 * Says what a `.phkv` file holds and where its bits go. All of it is read and
 * checked; the errors are 0, for the originals are not in the file.
 *
 * Throws `not-found` or `io` if the file cannot be read, `newer-version`,
 * `truncated` or `corrupt` if it is not whole, `unsupported` for another layout.
 *
 * @example
 * ```ts
 * import { Device, inspectKvFile, PhkvWriter } from "@packhorse/packhorse";
 * import { assertEquals } from "@std/assert";
 *
 * const input = `${await Deno.makeTempDir()}/empty.phkv`;
 * {
 *   using writer = await PhkvWriter.create(input, { layout: "packs", codec: { pack: 8 }, layers: [] });
 *   await writer.commit();
 * }
 * using device = Device.open();
 * const { codec, layers } = await inspectKvFile(device, { input });
 * assertEquals([codec.pack, layers], [8, []]);
 * ```
 */
export async function inspectKvFile(
  device: Device,
  options: KvFileOptions,
): Promise<KvFileReport> {
  const start = performance.now();
  const { input } = options;
  const opened = await openPacked(input);
  const { codec } = opened;
  using reader = opened.reader;
  const originalBytes = reader.layers.map((layer) => 2 * tensorByteLength(layoutOf(layer)));
  const total = originalBytes.reduce((sum, bytes) => sum + bytes, 0);
  const progress = new ProgressCount(total, options);
  const layers = [];
  for (const [index, layer] of reader.layers.entries()) {
    const statistics = new StatisticsSum();
    const layout = layoutOf(layer);
    for (const { firstBlock, blocks } of chunksOf(layout, layer.blocks, options.chunkBytes)) {
      const chunk = withTokens(layout, blocks * BLOCK_TOKENS);
      using records = await ResidentRecords.upload(
        device,
        { codec, layout: chunk },
        await reader.readBlocks(index, firstBlock, blocks),
      );
      const measured = await records.measure();
      if (measured instanceof MalformedBlock) {
        throw malformedError(firstBlock + measured.block, ` of ${layer.layer} of ${input}`);
      }
      statistics.add(measured);
      progress.advance(2 * tensorByteLength(chunk));
    }
    const tail = (await reader.readTail(index))!;
    progress.advance(tail.byteLength);
    layers.push(layerReport(layer, statistics, codec));
  }
  return fileReport({
    input,
    codec,
    layout: reader.layout,
    fileBytes: reader.byteLength,
    seconds: (performance.now() - start) / 1000,
    layers,
  });
}
