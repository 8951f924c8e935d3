/** Packing and unpacking whole files: chunks, tails, damage, and errors that name their place. */
import { assert, assertEquals, assertGreater } from "@std/assert";
import { Device } from "../src/device/mod.ts";
import {
  PhkvReader,
  PhkvWriter,
  SafetensorsReader,
  SafetensorsWriter,
  type TensorInfo,
} from "../src/io/mod.ts";
import {
  inspectKvFile,
  type KvCodecOptions,
  type KvTensor,
  measureKv,
  packKv,
  packKvFile,
  sweepKvFile,
  unpackKv,
  unpackKvFile,
} from "../src/kv/mod.ts";
import { cacheOf, codecOf } from "./kv_cases.ts";
import { rejectsWith } from "./rejects_with.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

type Layer = { keys: KvTensor; values: KvTensor };

function layerOf(tokens: number, seed: number): Layer {
  const codec = codecOf({ heads: 3, tokens, headDim: 32, dtype: "bf16" });
  const { keys, values } = cacheOf(codec, "gaussian", seed);
  const tensor = (data: Uint8Array): KvTensor => ({ dtype: "bf16", shape: [3, tokens, 32], data });
  return { keys: tensor(keys), values: tensor(values) };
}

async function writeTensors(
  path: string,
  tensors: (Pick<TensorInfo, "name" | "dtype" | "shape"> & { data: Uint8Array })[],
  metadata = {},
): Promise<string> {
  using writer = await SafetensorsWriter.create(path, { tensors, metadata });
  for (const { name, data } of tensors) await writer.writeAt(name, data);
  await writer.commit();
  return path;
}

function tensorsOf(layers: Layer[]) {
  return layers.flatMap(({ keys, values }, i) => [
    { name: `layers.${i}.key`, ...keys },
    { name: `layers.${i}.value`, ...values },
  ]);
}

/** Bytes of keys and values of a block. */
const BLOCK_BYTES = 2 * 3 * 64 * 32 * 2;

// 3 layers with: a tail and several blocks, fewer tokens than a block, no tail; and 10 after 9.
const layers = [layerOf(64 * 5 + 7, 1), layerOf(63, 2), layerOf(128, 3), layerOf(0, 4)];

Deno.test("kv files: chunks of any size give what packing whole layers gives", async () => {
  using folder = new TemporaryFolder();
  using device = Device.open();
  const metadata = { model: "test" };
  const input = await writeTensors(folder.file("x.safetensors"), tensorsOf(layers), metadata);
  const settings: KvCodecOptions[] = [{ residual: 70 }, { quantizer: "kivi", keyBits: 2 }];
  for (const codec of settings) {
    for (const chunkBytes of [1, 2 * BLOCK_BYTES, undefined]) {
      const output = folder.file("x.phkv");
      const restored = folder.file("y.safetensors");
      const steps: number[] = [];
      const onProgress = (done: number, total: number) => steps.push(done / total);
      const report = await packKvFile(device, { input, output, codec, chunkBytes, onProgress });
      await unpackKvFile(device, { input: output, output: restored, chunkBytes, onProgress });
      const inspected = await inspectKvFile(device, { input: output, chunkBytes, onProgress });
      assert(inspected.layout === "packs");
      assertEquals(steps.filter((step) => step === 1).length >= 3, true);
      assertEquals(inspected.codec, report.codec);

      using reader = await SafetensorsReader.open(restored);
      assertEquals(reader.metadata, metadata);
      for (const [i, layer] of layers.entries()) {
        const packed = await packKv(device, layer, codec);
        const { keys, values } = await unpackKv(device, packed);
        assertEquals(await reader.read(`layers.${i}.key`), keys.data);
        assertEquals(await reader.read(`layers.${i}.value`), values.data);
        assertEquals(reader.info(`layers.${i}.key`).shape, keys.shape);
        const measured = await measureKv(device, packed, layer);
        const { keys: keyReport, trueBytes, originalBytes } = report.layers[i]!;
        assertEquals([trueBytes, originalBytes], [measured.trueBytes, measured.originalBytes]);
        const { rmsError, ...exact } = measured.keys;
        const { rmsError: reported, ...reportedExact } = keyReport;
        assertEquals(reportedExact, exact);
        assert(Math.abs(reported - rmsError) <= 1e-9 * rmsError);
        assertEquals(inspected.layers[i]!.keys.widths, exact.widths);
        assertEquals(inspected.layers[i]!.trueBytes, trueBytes);
      }
      assertEquals(report.fileBytes, (await Deno.stat(output)).size);
    }
  }
});

Deno.test("kv files: a sweep measures what packing measures", async () => {
  using folder = new TemporaryFolder();
  using device = Device.open();
  const input = await writeTensors(folder.file("x.safetensors"), tensorsOf([layers[0]!]));
  const [row, ...others] = await sweepKvFile(device, {
    input,
    keyRels: [0.1],
    valueRels: [0.3],
    repacks: ["median"],
    packs: [8],
    chunkBytes: 2 * BLOCK_BYTES,
  });
  const codec = { keyRel: 0.1, valueRel: 0.3, repack: "median", pack: 8 } as const;
  const { keys, values, trueBytes, originalBytes } = await measureKv(
    device,
    await packKv(device, layers[0]!, codec),
    layers[0],
  );
  assertEquals(others, []);
  const close = (actual: number, expected: number) =>
    assert(Math.abs(actual / expected - 1) < 1e-9, `${actual} against ${expected}`);
  close(row!.keyBits, keys.bits);
  close(row!.valueBits, values.bits);
  close(row!.keyRmsError, keys.rmsError);
  close(row!.valueRmsError, values.rmsError);
  close(row!.ratio, originalBytes / trueBytes);
  close(row!.trueBitsPerValue, trueBytes * 8 / (originalBytes / 2));
});

Deno.test("kv files: a value that is not finite is named with file, layer, token and head", async () => {
  using folder = new TemporaryFolder();
  using device = Device.open();
  const layer = layerOf(64 * 4, 5);
  const data = layer.values.data.slice();
  // Head 1, token 200.
  data.set([0xc3, 0x7f], (64 * 4 + 200) * 32 * 2);
  const broken = { keys: layer.keys, values: { ...layer.values, data } };
  const input = await writeTensors(folder.file("x.safetensors"), tensorsOf([layers[0]!, broken]));
  const output = folder.file("x.phkv");
  const codec: KvCodecOptions = { grouping: "head" };
  await rejectsWith(
    () => packKvFile(device, { input, output, codec, chunkBytes: BLOCK_BYTES }),
    "non-finite",
    input,
    "layers.1",
    "values",
    "token 200",
    "head 1",
    "--keep-non-finite",
  );
  assertEquals(folder.list(), ["x.safetensors"]);
  const kept = await packKvFile(device, {
    input,
    output,
    codec: { ...codec, keepNonFinite: true },
    chunkBytes: BLOCK_BYTES,
  });
  assertEquals(kept.layers.map(({ rawBlocks }) => rawBlocks), [0, 1]);
});

Deno.test("kv files: what is no cache is refused by name", async () => {
  using folder = new TemporaryFolder();
  using device = Device.open();
  const { keys, values } = layers[2]!;
  const output = folder.file("x.phkv");
  const refuse = async (
    tensors: Parameters<typeof writeTensors>[1],
    code: "not-found" | "unsupported",
    ...fragments: string[]
  ) => {
    const input = await writeTensors(folder.file("x.safetensors"), tensors);
    await rejectsWith(() => packKvFile(device, { input, output }), code, input, ...fragments);
  };
  const [key, value] = [{ name: "layers.7.key", ...keys }, { name: "layers.7.value", ...values }];
  await refuse([], "not-found", "layers.<n>.key");
  await refuse([key], "not-found", "layers.7.value");
  await refuse([key, value, { ...value, name: "layers.8.value" }], "not-found", "layers.8.key");
  await refuse([key, value, { ...value, name: "extra" }], "unsupported", "extra");
  const flat = { shape: [3 * 128 * 32] };
  await refuse(
    [{ ...key, ...flat }, { ...value, ...flat }],
    "unsupported",
    "layers.7.key",
    "12288",
  );
  const shorter = layers[1]!.values;
  await refuse([key, { name: value.name, ...shorter }], "unsupported", "128", "63");

  const input = await writeTensors(folder.file("y.safetensors"), [
    { ...key, name: "k(10)" },
    { ...value, name: "v(10)" },
    { ...key, name: "k(9)" },
    { ...value, name: "v(9)" },
  ]);
  const patterns = { keyPattern: "k(<n>)", valuePattern: "v(<n>)" };
  const report = await packKvFile(device, { input, output, ...patterns });
  assertEquals(report.layers.map(({ layer }) => layer), ["layers.9", "layers.10"]);
  await rejectsWith(
    () => packKvFile(device, { input, output, ...patterns, keyPattern: "k" }),
    "invalid-argument",
    "<n>",
  );
});

Deno.test("kv files: recovering returns every intact block, and zeros for the others", async () => {
  using folder = new TemporaryFolder();
  using device = Device.open();
  const input = await writeTensors(folder.file("x.safetensors"), tensorsOf([layers[0]!]));
  const output = folder.file("x.phkv");
  const restored = folder.file("y.safetensors");
  await packKvFile(device, { input, output });
  await unpackKvFile(device, { input: output, output: restored });
  using intact = await SafetensorsReader.open(restored);
  const expected = await intact.read("layers.0.key");

  const offsets = async () => {
    using reader = await PhkvReader.open(output);
    return [reader.headerByteLength, ...(await reader.readBlocks(0)).offsets].map(Number);
  };
  const [start, ...ends] = await offsets();
  const bytes = await Deno.readFile(output);
  bytes[start! + ends[1]! + 20]! ^= 4; // block 1
  bytes[start! + ends[5]! + 3]! ^= 4; // the tail
  bytes[bytes.length - 20]! ^= 4; // the copy of the header
  await Deno.writeFile(output, bytes);
  for (const chunkBytes of [1, 2 * BLOCK_BYTES, undefined]) {
    const report = await unpackKvFile(device, {
      input: output,
      output: restored,
      recover: true,
      chunkBytes,
    });
    assertEquals(report.lost, [
      "layers.0 block 1 (tokens 64-127)",
      "layers.0 tail (tokens 320-326)",
    ]);
    assertEquals(report.damage.length, 1);
    using reader = await SafetensorsReader.open(restored);
    const recovered = await reader.read("layers.0.key");
    const rowBytes = 32 * 2;
    for (let row = 0; row < 3 * 327; row++) {
      const token = row % 327;
      const isLost = token >= 320 || token >= 64 && token < 128;
      const range = [row * rowBytes, (row + 1) * rowBytes] as const;
      const wanted = isLost ? new Uint8Array(rowBytes) : expected.subarray(...range);
      assertEquals(recovered.subarray(...range), wanted, `row ${row}`);
    }
  }
});

Deno.test("kv files: a record that no encoder writes is named, and recovering does without it", async () => {
  using folder = new TemporaryFolder();
  using device = Device.open();
  const { keys, values } = layers[2]!;
  const { records, offsets, codec } = await packKv(device, { keys, values });
  const forged = new Uint8Array(records);
  forged[Number(offsets[1]) + 4] = 99; // the kind of block 1
  const input = folder.file("x.phkv");
  const names = { layer: "layers.0", keyName: "k", valueName: "v" };
  const layer = { ...names, dtype: "bf16", heads: 3, tokens: 128, headDim: 32, blocks: 2 } as const;
  {
    using writer = await PhkvWriter.create(input, { layout: "packs", codec, layers: [layer] });
    await writer.appendBlocks(0, forged, offsets);
    await writer.writeTail(0, new Uint8Array());
    await writer.commit();
  }
  const output = folder.file("y.safetensors");
  const fragments = [input, "layers.0", "block 1"];
  await rejectsWith(() => unpackKvFile(device, { input, output }), "corrupt", ...fragments);
  await rejectsWith(() => inspectKvFile(device, { input }), "corrupt", ...fragments);
  assertEquals(folder.list(), ["x.phkv"]);
  const { lost } = await unpackKvFile(device, { input, output, recover: true });
  assertEquals(lost, ["layers.0 block 1 (tokens 64-127)"]);

  {
    const unknown = { layout: "packs", codec: { pack: 5 }, layers: [] } as const;
    using writer = await PhkvWriter.create(input, unknown);
    await writer.commit();
  }
  await rejectsWith(() => inspectKvFile(device, { input }), "corrupt", input, "pack");
});

Deno.test("kv files: an abort leaves no output", async () => {
  using folder = new TemporaryFolder();
  using device = Device.open();
  const input = await writeTensors(folder.file("x.safetensors"), tensorsOf(layers));
  const controller = new AbortController();
  let calls = 0;
  const error = await packKvFile(device, {
    input,
    output: folder.file("x.phkv"),
    chunkBytes: BLOCK_BYTES,
    signal: controller.signal,
    onProgress: () => {
      if (++calls === 2) controller.abort(new Error("enough"));
    },
  }).catch((error) => error);
  assertEquals(error.message, "enough");
  assertEquals(calls, 2);
  assertEquals(folder.list(), ["x.safetensors"]);
});

Deno.test("kv files: layers that compress well are much smaller", async () => {
  using folder = new TemporaryFolder();
  using device = Device.open();
  const input = await writeTensors(folder.file("x.safetensors"), tensorsOf([layers[2]!]));
  const codec = { keyRel: 0.5, valueRel: 0.5 };
  const report = await packKvFile(device, { input, output: folder.file("x.phkv"), codec });
  assertGreater(report.originalBytes / report.trueBytes, 4);
});
