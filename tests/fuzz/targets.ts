import { assert, assertEquals } from "@std/assert";
import { BYTES_PER_ELEMENT } from "../../src/dtype.ts";
import {
  PhkvReader,
  PhkvWriter,
  readNpy,
  SafetensorsReader,
  SafetensorsWriter,
} from "../../src/io/mod.ts";
import { Device } from "../../src/device/mod.ts";
import {
  inspectKvFile,
  KvCache,
  type KvCacheOptions,
  type KvCacheStep,
  type KvSequence,
  readModelConfig,
} from "../../src/kv/mod.ts";
import {
  phkvEntries,
  phkvJson,
  withPhkvEntry,
  withPhkvHeader,
  withPhkvJson,
} from "../forge_phkv.ts";
import { GraphClassifier, GraphDataset, readGraphDataset, train } from "../../src/graph/mod.ts";
import { npyFile, npzFile } from "../graph_files.ts";
import { TemporaryFolder } from "../temporary_folder.ts";
import { mutateBytes, mutateJson, mutateNumber } from "./mutate.ts";
import type { Random } from "./random.ts";

/** A reader to fuzz. */
export interface Target {
  /** The name of the file it reads. */
  readonly fileName: string;
  /** Files that it reads. */
  readonly seeds: readonly Uint8Array[];
  /** A mutant that keeps to the format except in what it changes; the bytes are mutated besides. */
  readonly mutate: (random: Random, seed: Uint8Array) => Uint8Array;
  /** Reads everything; throws an assertion if the results contradict each other. */
  readonly read: (path: string) => Promise<void>;
}

/** The readers, and seeds for them; an index's shard is written to `folder`. */
export async function makeTargets(folder: TemporaryFolder, device: Device): Promise<Target[]> {
  const shard = await safetensorsSeed();
  await folder.write("shard.safetensors", shard);
  const index = { metadata: { total_size: 44 }, weight_map: { a: "shard.safetensors" } };
  const encode = (text: string) => new TextEncoder().encode(text);
  const decode = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
  return [
    {
      fileName: "fuzz.safetensors",
      seeds: [shard, encode("\x02\0\0\0\0\0\0\0{}")],
      mutate: (random, seed) => withSafetensorsJson(seed, (json) => mutateJson(random, json)),
      read: readSafetensors,
    },
    {
      fileName: "fuzz.safetensors.index.json",
      seeds: [encode(JSON.stringify(index))],
      mutate: (random, seed) => encode(mutateJson(random, decode(seed))),
      read: readSafetensors,
    },
    {
      fileName: "fuzz.phkv",
      seeds: [await phkvSeed("packs", 3), await phkvSeed("tiles", 0)],
      mutate: mutateHeader,
      read: readPhkv,
    },
    {
      fileName: "fuzz.sequence.phkv",
      seeds: [await sequenceSeed(device, 150), await sequenceSeed(device, 5)],
      mutate: mutateSequence,
      read: (path) => readSequence(device, path),
    },
    {
      fileName: "fuzz.npy",
      seeds: [
        encode(
          "\x93NUMPY\x01\0\x42\0{'descr': '<f2', 'fortran_order': False, 'shape': (2, 3), }      \n",
        ),
      ].map((seed) => Uint8Array.of(0x93, ...seed.subarray(2), ...new Uint8Array(12))),
      mutate: (random, seed) => mutateBytes(random, seed, encode("(),:'<i4|u1>f8' 0123456789{}")),
      read: readArray,
    },
    {
      fileName: "fuzz.config.json",
      seeds: [
        await Deno.readFile(new URL("../fixtures/configs/llama-3.1-8b.json", import.meta.url)),
      ],
      mutate: (random, seed) => encode(mutateJson(random, decode(seed))),
      read: readConfig,
    },
    {
      fileName: "fuzz.graphs.json",
      seeds: [encode(JSON.stringify(GRAPHS))],
      mutate: (random, seed) => encode(mutateJson(random, decode(seed))),
      read: readGraphs,
    },
    {
      fileName: "fuzz.npz",
      seeds: [npzFile({
        "edges.npy": npyFile([0, 1, 1, 0], [2, 2], "<i8"),
        "graph_indicator.npy": npyFile([0, 0, 1], [3], "<i8"),
        "graph_labels.npy": npyFile([4, 7], [2], "<i8"),
        "node_attributes.npy": npyFile([0.5, 1, 2], [3, 1], "<f8"),
      })],
      mutate: (random, seed) =>
        mutateBytes(random, seed, encode("PK\x01\x02\x03\x04\x05\x06\0\x08")),
      read: readGraphs,
    },
    {
      fileName: "fuzz.model.safetensors",
      seeds: [await modelSeed()],
      mutate: (random, seed) => withSafetensorsJson(seed, (json) => mutateJson(random, json)),
      read: async (path) => {
        using model = await GraphClassifier.load(device, path);
        assert(model.parameterCount > 0);
      },
    },
  ];
}

const GRAPHS = {
  labels: [4, 7],
  views: [{
    name: "v",
    graphs: [
      { nodeAttributes: [[0.5], [1]], edges: [[0, 1], [1, 0]], edgeLabels: [[1], [2]] },
      { nodeAttributes: [[2]], edges: [], edgeLabels: [] },
    ],
  }],
};

async function readGraphs(path: string): Promise<void> {
  const { views, labels } = await readGraphDataset([path]);
  for (const { nodeOffsets, edgeOffsets, sources, targets } of views) {
    assertEquals(nodeOffsets.length, labels.length + 1);
    assertEquals([sources.length, targets.length], [edgeOffsets.at(-1), edgeOffsets.at(-1)]);
  }
}

async function modelSeed(): Promise<Uint8Array> {
  using folder = new TemporaryFolder();
  using device = Device.open({ backend: "cpu" });
  const path = folder.file("model.safetensors");
  const dataset = GraphDataset.fromGraphs(GRAPHS.views, GRAPHS);
  const settings = { epochs: 1, model: { width: 4, layers: 1 } };
  using result = await train(device, dataset, { ...settings, checkpoint: path });
  await result.model.save(path);
  return await Deno.readFile(path);
}

async function readConfig(path: string): Promise<void> {
  const { layers, queryHeads, kvHeads, headDim, weights } = await readModelConfig(path);
  for (const size of [layers, queryHeads, kvHeads, headDim, queryHeads / kvHeads]) {
    assert(Number.isSafeInteger(size) && size >= 1, `${size}`);
  }
  if ("bytes" in weights) assert(Number.isSafeInteger(weights.bytes) && weights.bytes > 0);
}

async function safetensorsSeed(): Promise<Uint8Array> {
  using folder = new TemporaryFolder();
  const path = folder.file("seed.safetensors");
  const tensors = [
    { name: "a", dtype: "f16", shape: [2, 3, 2] },
    { name: "b", dtype: "u8", shape: [3] },
    { name: "é", dtype: "f32", shape: [] },
    { name: "d", dtype: "bf16", shape: [0, 4] },
  ] as const;
  using writer = await SafetensorsWriter.create(path, { tensors, metadata: { model: "tiny" } });
  await writer.writeAt("a", new Uint8Array(24).fill(1));
  await writer.writeAt("b", new Uint8Array(3).fill(2));
  await writer.writeAt("é", new Uint8Array(4).fill(3));
  await writer.commit();
  return await Deno.readFile(path);
}

async function phkvSeed(layout: "packs" | "tiles", blocks: number): Promise<Uint8Array> {
  using folder = new TemporaryFolder();
  const path = folder.file("seed.phkv");
  const shape = { dtype: "f16", heads: 2, headDim: 16, blocks } as const;
  const layers = [1, 0].map((tailTokens, i) => ({
    layer: `layers.${i}`,
    keyName: `layers.${i}.key`,
    valueName: `layers.${i}.value`,
    ...shape,
    tokens: 64 * blocks + tailTokens,
  }));
  using writer = await PhkvWriter.create(path, {
    layout,
    codec: { quantizer: "packkv", bits: [2, 4] },
    layers,
    metadata: { model: "tiny" },
  });
  for (const [i, layer] of layers.entries()) {
    const records = new Uint8Array(16 * blocks).fill(i + 1);
    const offsets = Array.from({ length: blocks + 1 }, (_, block) => 16 * block);
    await writer.appendBlocks(i, records, offsets);
    await writer.writeTail(i, new Uint8Array(2 * 2 * 16 * 2 * (layer.tokens - 64 * blocks)));
  }
  await writer.commit();
  return await Deno.readFile(path);
}

function mutateHeader(random: Random, seed: Uint8Array): Uint8Array {
  if (random.below(2) === 0) return withPhkvJson(seed, mutateJson(random, phkvJson(seed)));
  return withPhkvHeader(seed, ({ buffer, byteLength }) => {
    mutateNumber(random, new Uint8Array(buffer, 0, byteLength));
  });
}

const SEQUENCE_CACHE: KvCacheOptions = {
  layers: 2,
  queryHeads: 2,
  kvHeads: 2,
  headDim: 64,
  dtype: "f16",
  sequences: 2,
  tokens: 256,
  stepTokens: 256,
  poolBytes: 2 ** 18,
  residual: 8,
  codec: [
    { keys: { quantizer: "packkv", rel: 0.1 }, values: { quantizer: "packkv", rel: 1 / 254 } },
    { keys: { quantizer: "fixed", bits: 3 }, values: { quantizer: "packkv", rel: 0.2 } },
  ],
};

/** Appends tokens of every layer; the step may attend. */
function appendTokens(cache: KvCache, sequence: KvSequence, tokens: number): KvCacheStep {
  const step = cache.begin([{ sequence, tokens }]);
  using keys = cache.device.createBuffer("f16", tokens * 2 * 64);
  keys.upload(Float16Array.from({ length: keys.length }, (_, i) => Math.sin(i * i)));
  for (let layer = 0; layer < cache.config.layers; layer++) step.append(layer, keys, keys);
  return step;
}

async function sequenceSeed(device: Device, tokens: number): Promise<Uint8Array> {
  using folder = new TemporaryFolder();
  using cache = KvCache.create(device, SEQUENCE_CACHE);
  const sequence = cache.add();
  appendTokens(cache, sequence, tokens);
  await cache.save(sequence, folder.file("seed.phkv"));
  return await Deno.readFile(folder.file("seed.phkv"));
}

function mutateSequence(random: Random, seed: Uint8Array): Uint8Array {
  if (random.below(4) === 0) return mutateHeader(random, seed);
  return withPhkvEntry(seed, random.below(phkvEntries(seed)), ({ buffer }) => {
    const content = new Uint8Array(buffer);
    return random.below(3) === 0
      ? mutateBytes(random, content, seed)
      : mutateNumber(random, content);
  });
}

/** Loads, and then uses what was loaded; a file that is refused must leave the cache as it was. */
async function readSequence(device: Device, path: string): Promise<void> {
  using cache = KvCache.create(device, SEQUENCE_CACHE);
  const before = cache.statistics();
  try {
    const sequence = await cache.load(path);
    const tokens = cache.length(sequence);
    assertEquals(cache.statistics().tokens, tokens);
    for (let layer = 0; layer < cache.config.layers && tokens > 0; layer++) {
      using read = cache.read(layer, sequence);
      assertEquals(read.keys.length, tokens * 2 * 64);
    }
    if (tokens < cache.config.tokens) {
      const step = appendTokens(cache, sequence, 1);
      using queries = device.createBuffer("f16", 2 * 64);
      using out = device.createBuffer("f16", 2 * 64);
      queries.fill();
      for (let layer = 0; layer < cache.config.layers; layer++) step.attend(layer, queries, out);
    }
    cache.remove(sequence);
    const { layout } = await inspectKvFile(device, { input: path });
    assertEquals(layout, "tiles");
  } finally {
    assertEquals(cache.statistics(), before);
  }
}

function withSafetensorsJson(file: Uint8Array, change: (json: string) => string): Uint8Array {
  const headerBytes = new DataView(file.buffer).getUint32(0, true);
  const header = new TextDecoder().decode(file.subarray(8, 8 + headerBytes));
  const json = new TextEncoder().encode(change(header));
  const result = new Uint8Array(file.byteLength - headerBytes + json.byteLength);
  new DataView(result.buffer).setUint32(0, json.byteLength, true);
  result.set(json, 8);
  result.set(file.subarray(8 + headerBytes), 8 + json.byteLength);
  return result;
}

async function readSafetensors(path: string): Promise<void> {
  using reader = await SafetensorsReader.open(path);
  for (const [name, info] of reader.tensors) {
    assertEquals(info.name, name);
    assertEquals(info.byteLength, sizeOf(info.shape, BYTES_PER_ELEMENT[info.dtype]));
    const content = await reader.read(name);
    assertEquals(content.byteLength, info.byteLength);
    const half = new Uint8Array(content.byteLength >> 1);
    await reader.readInto(name, half, content.byteLength - half.byteLength);
    assertEquals(half, content.subarray(content.byteLength - half.byteLength));
  }
  for (const name of reader.unsupported.keys()) assert(!reader.tensors.has(name));
}

async function readPhkv(path: string): Promise<void> {
  const recovered = await readPhkvOnce(path, true);
  const strict = await readPhkvOnce(path, false);
  // What can be read strictly is read the same when recovering.
  assertEquals(recovered, strict);
}

async function readPhkvOnce(path: string, recover: boolean): Promise<Uint8Array[]> {
  using reader = await PhkvReader.open(path, { recover });
  let total = 2 * reader.headerByteLength;
  const contents: Uint8Array[] = [];
  for (const [i, layer] of reader.layers.entries()) {
    total += layer.recordsByteLength + layer.tailByteLength;
    const { records, offsets, lost } = await reader.readBlocks(i);
    assertEquals(offsets.length, layer.blocks + 1);
    assertEquals([offsets[0], offsets.at(-1)], [0n, BigInt(records.byteLength)]);
    const empty = Array.from({ length: layer.blocks }, (_, block) => block)
      .filter((block) => offsets[block + 1] === offsets[block]);
    assertEquals(lost, empty);
    const tail = await reader.readTail(i);
    const tailTokens = layer.tokens - 64 * layer.blocks;
    const tailShape = [2, layer.heads, tailTokens, layer.headDim];
    assertEquals(layer.tailByteLength, sizeOf(tailShape, BYTES_PER_ELEMENT[layer.dtype]));
    if (tail) assertEquals(tail.byteLength, layer.tailByteLength);
    if (!recover) assert(lost.length === 0 && tail);
    contents.push(records, tail ?? new Uint8Array());
  }
  if (!recover) assertEquals(total, reader.byteLength);
  return contents;
}

async function readArray(path: string): Promise<void> {
  const { dtype, shape, data } = await readNpy(path);
  assertEquals(data.byteLength, sizeOf(shape, BYTES_PER_ELEMENT[dtype]));
}

function sizeOf(shape: readonly number[], bytesPerElement: number): number {
  return shape.reduce((product, size) => product * size, bytesPerElement);
}
