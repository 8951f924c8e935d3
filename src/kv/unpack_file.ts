import type { Device } from "../device/device.ts";
import { blockLabel, tailLabel } from "../io/phkv_format.ts";
import type { PhkvReader, PhkvStoredLayer } from "../io/phkv_reader.ts";
import { SafetensorsWriter } from "../io/safetensors_writer.ts";
import { type KvRecords, MalformedBlock, malformedError, ResidentRecords } from "./blocks.ts";
import { type Chunk, chunksOf } from "./chunks.ts";
import { BLOCK_TOKENS, type KvCodec } from "./codec.ts";
import type { UnpackKvFileOptions } from "./file_options.ts";
import { layoutOf, openPacked } from "./packed_file.ts";
import { ProgressCount } from "./progress.ts";
import {
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
 * their names and the metadata. The output appears complete or not at all.
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
  const { codec } = opened;
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
      const unpacked = await unpackChunk(device, { reader, codec, index, recover }, chunk);
      lost.push(...unpacked.lost.map((block) => blockLabel(layer, block)));
      await writeTokens(writer, layer, chunk.firstBlock * BLOCK_TOKENS, unpacked);
      progress.advance(unpacked.keys.byteLength + unpacked.values.byteLength);
    }
    const stored = await reader.readTail(index);
    if (!stored) lost.push(tailLabel(layer));
    const tail = stored ?? new Uint8Array(layer.tailByteLength);
    const half = tail.byteLength / 2;
    const parts = { keys: tail.subarray(0, half), values: tail.subarray(half) };
    await writeTokens(writer, layer, layer.blocks * BLOCK_TOKENS, parts);
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
  { reader, codec, index, recover }: {
    reader: PhkvReader;
    codec: KvCodec;
    index: number;
    recover: boolean;
  },
  { firstBlock, blocks }: Chunk,
): Promise<KvPair<Uint8Array<ArrayBuffer>> & { lost: number[] }> {
  const layer = reader.layers[index]!;
  const stored = await reader.readBlocks(index, firstBlock, blocks);
  const lost = new Set(stored.lost);
  for (;;) {
    const kept = Array.from({ length: blocks }, (_, i) => i)
      .filter((block) => !lost.has(firstBlock + block));
    const layout = withTokens(layoutOf(layer), kept.length * BLOCK_TOKENS);
    const decoded = kept.length === 0
      ? { keys: new Uint8Array(), values: new Uint8Array() }
      : await decode(device, { codec, layout }, selectBlocks(stored, kept));
    if (decoded instanceof MalformedBlock) {
      // Its checksum is right: whoever made the file wrote what no encoder writes.
      const block = firstBlock + kept[decoded.block]!;
      if (!recover) throw malformedError(block, ` of ${layer.layer} of ${reader.path}`);
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
  description: { codec: KvCodec; layout: ReturnType<typeof layoutOf> },
  records: KvRecords,
) {
  using resident = await ResidentRecords.upload(device, description, records);
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
