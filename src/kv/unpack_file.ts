import type { Device } from "../device/device.ts";
import { blockLabel, blockStart, leadingTokens, tailLabel } from "../io/phkv_format.ts";
import type { PhkvStoredLayer } from "../io/phkv_reader.ts";
import { SafetensorsWriter } from "../io/safetensors_writer.ts";
import { type KvRecords, MalformedBlock, ResidentRecords } from "./blocks.ts";
import { type Chunk, chunksOf } from "./chunks.ts";
import { BLOCK_TOKENS } from "./codec.ts";
import type { UnpackKvFileOptions } from "./file_options.ts";
import { layoutOf, malformedBlockError, openPacked, type PackedFile } from "./packed_file.ts";
import { ProgressCount } from "./progress.ts";
import { ResidentTiles } from "./tile_blocks.ts";
import {
  type KvLayout,
  type KvPair,
  placeTokens,
  rowByteLength,
  sliceTokens,
  tensorByteLength,
  withTokens,
} from "./tensor.ts";

/** What {@linkcode unpackKvFile} wrote. */
export interface UnpackKvFileReport {
  /** The file read. */
  readonly input: string;
  /** The file written. */
  readonly output: string;
  /** Names of the layers, such as "layers.0". */
  readonly layers: readonly string[];
  /** Blocks and tails whose tokens are zeros, since they are damaged. Empty unless recovering. */
  readonly lost: readonly string[];
  /** What else is damaged, as sentences. Empty unless recovering. */
  readonly damage: readonly string[];
  /** How long it took. */
  readonly seconds: number;
}

/**
 * Restores the `.safetensors` file from a `.phkv` file, chunk by chunk: tensors,
 * their names and the metadata. The output appears complete or not at all. Of a
 * sequence that {@linkcode KvCache.save} wrote, the tensors are `layers.<n>.key`
 * and `layers.<n>.value`, with the values that attention sees, rounded to 16 bits.
 *
 * Throws `not-found` or `io` if a file fails, `newer-version`, `truncated` or
 * `corrupt` if the input is not whole. With `recover`, one intact header suffices:
 * tokens of damaged blocks and tails become zeros, and are listed.
 *
 * @example
 * ```ts
 * import { Device, PhkvWriter, SafetensorsReader, unpackKvFile } from "@packhorse/packhorse";
 * import { assertEquals } from "@std/assert";
 *
 * const folder = await Deno.makeTempDir();
 * const [input, output] = [`${folder}/cache.phkv`, `${folder}/cache.safetensors`];
 * {
 *   const names = { layer: "layers.0", keyName: "k", valueName: "v" };
 *   const shape = { dtype: "f16", heads: 1, tokens: 1, headDim: 16, blocks: 0 } as const;
 *   const layers = [{ ...names, ...shape }];
 *   using writer = await PhkvWriter.create(input, { layout: "packs", codec: {}, layers });
 *   await writer.writeTail(0, new Uint8Array(64).fill(1)); // 16 keys and 16 values
 *   await writer.commit();
 * }
 * using device = Device.open();
 * await unpackKvFile(device, { input, output });
 * using reader = await SafetensorsReader.open(output);
 * assertEquals(await reader.read("k"), new Uint8Array(32).fill(1));
 * ```
 */
export async function unpackKvFile(
  device: Device,
  options: UnpackKvFileOptions,
): Promise<UnpackKvFileReport> {
  const start = performance.now();
  const { input, output, recover = false, signal } = options;
  const opened = await openPacked(input, { recover });
  using reader = opened.reader;
  const { layers, metadata } = reader;
  using writer = await SafetensorsWriter.create(output, {
    tensors: layers.flatMap((layer) =>
      [layer.keyName, layer.valueName].map((name) => ({ name, ...layoutOf(layer) }))
    ),
    ...(Object.keys(metadata).length > 0 ? { metadata } : {}),
    signal,
  });
  const total = layers.reduce((sum, layer) => sum + 2 * tensorByteLength(layoutOf(layer)), 0);
  const progress = new ProgressCount(total, options);
  const lost: string[] = [];
  for (const [index, layer] of layers.entries()) {
    const layout = layoutOf(layer);
    for (const chunk of chunksOf(layout, layer.blocks, options.chunkBytes)) {
      const unpacked = await unpackChunk(device, { opened, index, recover }, chunk);
      lost.push(...unpacked.lost.map((block) => blockLabel(layer, block)));
      await writeTokens(writer, layer, blockStart(layer, chunk.firstBlock), unpacked);
      progress.advance(unpacked.keys.byteLength + unpacked.values.byteLength);
    }
    const stored = await reader.readTail(index);
    if (!stored) lost.push(tailLabel(layer));
    const tail = stored ?? new Uint8Array(layer.tailByteLength);
    const half = tail.byteLength / 2;
    const [leading, tokens] = [leadingTokens(layer), layer.tokens - layer.blocks * BLOCK_TOKENS];
    for (
      const [first, end, at] of [[0, leading, 0], [
        leading,
        tokens,
        blockStart(layer, layer.blocks),
      ]] as const
    ) {
      const slice = (part: Uint8Array<ArrayBuffer>) =>
        sliceTokens(part, withTokens(layout, tokens), first, end);
      const parts = { keys: slice(tail.subarray(0, half)), values: slice(tail.subarray(half)) };
      await writeTokens(writer, layer, at, parts);
    }
    progress.advance(tail.byteLength);
  }
  await writer.commit();
  return {
    input,
    output,
    layers: layers.map(({ layer }) => layer),
    lost,
    damage: reader.damage,
    seconds: (performance.now() - start) / 1000,
  };
}

async function unpackChunk(
  device: Device,
  { opened, index, recover }: {
    opened: PackedFile;
    index: number;
    recover: boolean;
  },
  { firstBlock, blocks }: Chunk,
): Promise<KvPair<Uint8Array<ArrayBuffer>> & { lost: number[] }> {
  const { reader } = opened;
  const layer = reader.layers[index]!;
  const stored = await reader.readBlocks(index, firstBlock, blocks);
  const lost = new Set(stored.lost);
  for (;;) {
    const kept = Array.from({ length: blocks }, (_, i) => i)
      .filter((block) => !lost.has(firstBlock + block));
    const layout = withTokens(layoutOf(layer), kept.length * BLOCK_TOKENS);
    const decoded = kept.length === 0
      ? { keys: new Uint8Array(), values: new Uint8Array() }
      : await decode(device, { opened, index, layout }, selectBlocks(stored, kept));
    if (decoded instanceof MalformedBlock) {
      // Its checksum is right: whoever made the file wrote what no encoder writes.
      const block = firstBlock + kept[decoded.block]!;
      if (!recover) throw malformedBlockError(reader, layer, { ...decoded, block });
      lost.add(block);
      continue;
    }
    const spread = (bytes: Uint8Array<ArrayBuffer>) => spreadBlocks(bytes, layout, kept, blocks);
    return {
      keys: spread(decoded.keys),
      values: spread(decoded.values),
      lost: [...lost].sort((a, b) => a - b),
    };
  }
}

async function decode(
  device: Device,
  { opened, index, layout }: { opened: PackedFile; index: number; layout: KvLayout },
  records: KvRecords,
): Promise<KvPair<Uint8Array<ArrayBuffer>> | MalformedBlock> {
  if (opened.layout === "tiles") {
    const { config } = opened;
    const tiles = ResidentTiles.upload(device, config, config.codecs[index]!, records);
    if (tiles instanceof MalformedBlock) return tiles;
    using resident = tiles;
    return await resident.decode();
  }
  const { codec } = opened;
  using resident = await ResidentRecords.upload(device, { codec, layout }, records);
  return await resident.decode();
}

/** The records of some of the blocks. */
function selectBlocks({ records, offsets }: KvRecords, kept: readonly number[]): KvRecords {
  if (kept.length === offsets.length - 1) return { records, offsets };
  const parts = kept.map((block) =>
    records.subarray(Number(offsets[block]), Number(offsets[block + 1]))
  );
  const selected = new Uint8Array(parts.reduce((sum, part) => sum + part.byteLength, 0));
  const ends = new BigUint64Array(kept.length + 1);
  let end = 0;
  parts.forEach((part, i) => {
    selected.set(part, end);
    end += part.byteLength;
    ends[i + 1] = BigInt(end);
  });
  return { records: selected, offsets: ends };
}

/** A tensor of the `kept` blocks among `blocks`, with zeros for the others. */
function spreadBlocks(
  bytes: Uint8Array<ArrayBuffer>,
  layout: ReturnType<typeof layoutOf>,
  kept: readonly number[],
  blocks: number,
): Uint8Array<ArrayBuffer> {
  if (kept.length === blocks) return bytes;
  const whole = withTokens(layout, blocks * BLOCK_TOKENS);
  const result = new Uint8Array(tensorByteLength(whole));
  kept.forEach((block, i) => {
    const slice = sliceTokens(bytes, layout, i * BLOCK_TOKENS, (i + 1) * BLOCK_TOKENS);
    placeTokens(result, whole, block * BLOCK_TOKENS, slice);
  });
  return result;
}

/** Writes keys and values of consecutive tokens of a layer. */
async function writeTokens(
  writer: SafetensorsWriter,
  layer: PhkvStoredLayer,
  first: number,
  { keys, values }: KvPair<Uint8Array>,
): Promise<void> {
  const row = rowByteLength(layoutOf(layer));
  const headBytes = keys.byteLength / layer.heads;
  for (const [name, bytes] of [[layer.keyName, keys], [layer.valueName, values]] as const) {
    for (let head = 0; head < layer.heads && headBytes > 0; head++) {
      const slice = bytes.subarray(head * headBytes, (head + 1) * headBytes);
      await writer.writeAt(name, slice, (head * layer.tokens + first) * row);
    }
  }
}
