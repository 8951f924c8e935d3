import { assert, assertEquals, assertMatch, assertNotEquals } from "@std/assert";
import fc from "fast-check";
import { PackhorseError } from "../src/error.ts";
import {
  BLOCK_TOKENS,
  type PhkvLayer,
  type PhkvLayout,
  PhkvReader,
  PhkvWriter,
  type PhkvWriterOptions,
} from "../src/io/mod.ts";
import { phkvJson, withPhkvHeader, withPhkvJson } from "./forge_phkv.ts";
import { rejectsWith } from "./rejects_with.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

/** A file to write: its header, and per layer its records and its tail. */
interface Content extends PhkvWriterOptions {
  readonly records: readonly (readonly Uint8Array[])[];
  readonly tails: readonly Uint8Array[];
}

const BYTES_PER_ELEMENT = { f16: 2, bf16: 2, f32: 4 };

function layerOf(index: number, shape: Omit<PhkvLayer, "layer" | "keyName" | "valueName">) {
  const layer = `layers.${index}`;
  return { layer, keyName: `${layer}.key`, valueName: `${layer}.value`, ...shape };
}

function tailBytes({ heads, tokens, headDim, blocks, dtype }: PhkvLayer): number {
  return 2 * heads * (tokens - blocks * BLOCK_TOKENS) * headDim * BYTES_PER_ELEMENT[dtype];
}

function concatenate(parts: readonly Uint8Array[]): Uint8Array {
  return Uint8Array.from(parts.flatMap((part) => [...part]));
}

/** Where each part begins in the whole, and where the last ends. */
function boundaries(parts: readonly Uint8Array[]): number[] {
  return parts.reduce((ends, part) => [...ends, ends.at(-1)! + part.length], [0]);
}

/** Writes the content, the blocks of a layer in calls of at most `step`. */
async function writeFile(path: string, content: Content, step = Infinity): Promise<void> {
  const { records, tails, ...options } = content;
  using writer = await PhkvWriter.create(path, options);
  for (const [layer, all] of records.entries()) {
    for (let block = 0; block < all.length; block += step) {
      const some = all.slice(block, block + step);
      await writer.appendBlocks(layer, concatenate(some), boundaries(some));
    }
    await writer.writeTail(layer, tails[layer]!);
  }
  await writer.commit();
}

/** Two layers: three blocks and a tail, then two blocks and none. */
function example(layout: PhkvLayout = "packs"): Content {
  let state = 1;
  const bytes = (length: number) =>
    Uint8Array.from({ length }, () => (state = (state * 48271) % 0x7fffffff) & 0xff);
  const shape = { dtype: "f16", heads: 1, headDim: 16 } as const;
  const layers = [
    layerOf(0, { ...shape, tokens: 3 * BLOCK_TOKENS + 2, blocks: 3 }),
    layerOf(1, { ...shape, tokens: 2 * BLOCK_TOKENS, blocks: 2 }),
  ];
  return {
    layout,
    codec: { quantizer: "packkv", keyRel: 0.1 },
    layers,
    metadata: { model: "tiny" },
    records: [[bytes(32), bytes(16), bytes(48)], [bytes(16), bytes(32)]],
    tails: layers.map((layer) => bytes(tailBytes(layer))),
  };
}

/** Everything in a file: throws at the first thing that is damaged. */
async function readAll(path: string): Promise<void> {
  using reader = await PhkvReader.open(path);
  for (let layer = 0; layer < reader.layers.length; layer++) {
    await reader.readBlocks(layer);
    await reader.readTail(layer);
  }
}

/** What recovering finds: the records by "layer/block", the tails by "layer/tail". */
async function recoverAll(path: string): Promise<Map<string, Uint8Array>> {
  using reader = await PhkvReader.open(path, { recover: true });
  const found = new Map<string, Uint8Array>();
  for (const [index, layer] of reader.layers.entries()) {
    const { records, offsets, lost } = await reader.readBlocks(index);
    assertEquals(offsets.length, layer.blocks + 1);
    assertEquals(Number(offsets.at(-1)), records.length);
    for (let block = 0; block < layer.blocks; block++) {
      const record = records.slice(Number(offsets[block]), Number(offsets[block + 1]));
      assertEquals(lost.includes(block), record.length === 0);
      if (record.length > 0) found.set(`${index}/${block}`, record);
    }
    const tail = await reader.readTail(index);
    if (tail) found.set(`${index}/tail`, tail);
  }
  return found;
}

/** The same map from what was written. */
function allOf({ records, tails }: Content): Map<string, Uint8Array> {
  return new Map(records.flatMap((blocks, layer) => [
    ...blocks.map((record, block) => [`${layer}/${block}`, record] as const),
    [`${layer}/tail`, tails[layer]!] as const,
  ]));
}

for (const layout of ["packs", "tiles"] as const) {
  Deno.test(`a .phkv file of ${layout} reads back as written`, async () => {
    using folder = new TemporaryFolder();
    const path = folder.file("x.phkv");
    const content = example(layout);
    await writeFile(path, content);
    using reader = await PhkvReader.open(path);
    assertEquals(reader.layout, layout);
    assertEquals<unknown>(reader.codec, content.codec);
    assertEquals(reader.metadata, { model: "tiny" });
    assertEquals(reader.damage, []);
    assertEquals(reader.layers, [
      { ...content.layers[0]!, recordsByteLength: 96, tailByteLength: 128 },
      { ...content.layers[1]!, recordsByteLength: 48, tailByteLength: 0 },
    ]);
    assertEquals(reader.byteLength, (await Deno.stat(path)).size);
    assertEquals(reader.byteLength, 2 * reader.headerByteLength + 96 + 128 + 48);

    const { records, offsets, lost } = await reader.readBlocks(0, 1, 2);
    assertEquals(records, concatenate(content.records[0]!.slice(1)));
    assertEquals(offsets, BigUint64Array.of(0n, 16n, 64n));
    assertEquals(lost, []);
    assertEquals(await reader.readTail(0), content.tails[0]);
    assertEquals(await reader.readTail(1), new Uint8Array());
    assertEquals((await reader.readBlocks(1, 2)).offsets, BigUint64Array.of(0n));
  });
}

const randomShape = fc.record({
  dtype: fc.constantFrom("f16", "bf16", "f32"),
  heads: fc.integer({ min: 1, max: 3 }),
  headDim: fc.constantFrom(16, 32, 256),
  blocks: fc.nat(4),
  tailTokens: fc.nat(70),
});

const randomContent: fc.Arbitrary<Content> = fc.record({
  layout: fc.constantFrom<PhkvLayout>("packs", "tiles"),
  codec: fc.dictionary(fc.string(), fc.jsonValue({ maxDepth: 3, noUnicodeString: false }), {
    noNullPrototype: true,
  }),
  metadata: fc.dictionary(fc.string({ unit: "binary" }), fc.string({ unit: "binary" }), {
    noNullPrototype: true,
  }),
  shapes: fc.array(randomShape, { maxLength: 3 }),
}).chain(({ layout, codec, metadata, shapes }) => {
  const layers = shapes.map(({ tailTokens, ...shape }, i) =>
    layerOf(i, { ...shape, tokens: shape.blocks * BLOCK_TOKENS + tailTokens })
  );
  const granule = layout === "packs" ? 16 : 1;
  const record = fc.integer({ min: 1, max: 5 }).chain((granules) =>
    fc.uint8Array({ minLength: granules * granule, maxLength: granules * granule })
  );
  const records = fc.tuple(
    ...layers.map(({ blocks }) => fc.array(record, { minLength: blocks, maxLength: blocks })),
  );
  const tails = fc.tuple(
    ...layers.map((layer) =>
      fc.nat(255).map((byte) => new Uint8Array(tailBytes(layer)).fill(byte))
    ),
  );
  return fc.record({
    layout: fc.constant(layout),
    codec: fc.constant(codec),
    metadata: fc.constant(metadata),
    layers: fc.constant(layers),
    records,
    tails,
  });
});

Deno.test("a random .phkv file reads back as written, whatever the calls", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("x.phkv");
  const property = fc.asyncProperty(
    randomContent,
    fc.integer({ min: 1, max: 5 }),
    async (c, step) => {
      await writeFile(path, c, step);
      using reader = await PhkvReader.open(path);
      assertEquals<unknown>(reader.codec, JSON.parse(JSON.stringify(c.codec)));
      assertEquals(reader.metadata, c.metadata ?? {});
      for (const [index, records] of c.records.entries()) {
        for (let block = 0; block < records.length; block += step) {
          const some = records.slice(block, block + step);
          const read = await reader.readBlocks(index, block, some.length);
          assertEquals(read.records, concatenate(some));
          assertEquals(read.offsets, BigUint64Array.from(boundaries(some), BigInt));
        }
        assertEquals(await reader.readTail(index), c.tails[index]);
      }
      assertEquals(await recoverAll(path), allOf(c));
    },
  );
  await fc.assert(property, { numRuns: 60 });
});

/** Which entry of the example a byte of its file is in; undefined for the headers. */
function entryAt(
  content: Content,
  headerBytes: number,
  byte: number,
): [string, RegExp] | undefined {
  let end = headerBytes;
  for (const [name, bytes] of allOf(content)) {
    const begin = end;
    end += bytes.length;
    const [layer, part] = name.split("/");
    const label = part === "tail"
      ? new RegExp(`layers\\.${layer} tail \\(tokens 192-193\\)`)
      : new RegExp(`layers\\.${layer} block ${part} \\(tokens ${64 * Number(part)}-`);
    if (byte >= begin && byte < end) return [name, label];
  }
  return undefined;
}

Deno.test("a flipped bit is found and named wherever it is, and recovering loses only its entry", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("x.phkv");
  const content = example();
  await writeFile(path, content);
  const file = await Deno.readFile(path);
  const headerBytes = (file.length - 272) / 2;
  const expected = allOf(content);
  for (let byte = 0; byte < file.length; byte++) {
    const bit = byte % 8; // one bit a byte, each in turn
    const where = `bit ${bit} of byte ${byte}`;
    await Deno.writeFile(path, file.with(byte, file[byte]! ^ (1 << bit)));
    const error = await readAll(path).then(() => undefined, (thrown: unknown) => thrown);
    assert(error instanceof PackhorseError, `${where} was not found`);
    assert(["corrupt", "truncated", "newer-version"].includes(error.code), `${where}: ${error}`);
    assert(error.message.includes(path), `${where}: ${error}`);
    const entry = entryAt(content, headerBytes, byte);
    const place = entry?.[1] ??
      (byte < headerBytes ? /its header|not a \.phkv file/ : /copy of its header/);
    assertMatch(error.message, place, where);

    const recovered = new Map(expected);
    if (entry) recovered.delete(entry[0]);
    assertEquals(await recoverAll(path), recovered, where);
  }
});

Deno.test("a file cut anywhere is found truncated, and recovering returns what is left", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("x.phkv");
  const content = example();
  await writeFile(path, content);
  const file = await Deno.readFile(path);
  const headerBytes = (file.length - 272) / 2;
  for (let length = 0; length < file.length; length++) {
    await Deno.writeFile(path, file.subarray(0, length));
    await rejectsWith(() => readAll(path), "truncated", path, `the file has ${length}`);
    if (length < headerBytes) {
      await rejectsWith(() => recoverAll(path), "truncated", path, `the file has ${length}`);
      continue;
    }
    const ends = boundaries([...allOf(content).values()]).slice(1);
    const intact = [...allOf(content)]
      .filter(([_, bytes], i) => bytes.length === 0 || headerBytes + ends[i]! <= length);
    assertEquals(await recoverAll(path), new Map(intact), `cut at ${length}`);
  }
});

Deno.test("bytes after the end of a .phkv file are found", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("x.phkv");
  await writeFile(path, example());
  await Deno.writeFile(path, Uint8Array.of(0, 0, 0), { append: true });
  await rejectsWith(() => readAll(path), "corrupt", path, "3 are too many");
  assertEquals(await recoverAll(path), allOf(example()));
});

Deno.test("recovering says what is wrong with the headers, and fails without either", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("x.phkv");
  await writeFile(path, example());
  const file = await Deno.readFile(path);
  const frontDamaged = file.with(40, file[40]! ^ 1);
  const copyDamaged = file.with(file.length - 40, file.at(-40)! ^ 1);
  const bothDamaged = frontDamaged.with(file.length - 40, file.at(-40)! ^ 1);
  for (
    const [content, message] of [
      [frontDamaged, /its header is damaged: its checksum is 0x/],
      [copyDamaged, /copy of its header at the end of the file is damaged/],
      [file.subarray(0, -1), /truncated/],
    ] as const
  ) {
    await Deno.writeFile(path, content);
    using reader = await PhkvReader.open(path, { recover: true });
    assertEquals(reader.damage.length, 1);
    assertMatch(reader.damage[0]!, message);
  }
  await Deno.writeFile(path, bothDamaged);
  await rejectsWith(() => recoverAll(path), "corrupt", path, "not intact either");
});

Deno.test("a file of a newer version is named as one", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("x.phkv");
  await writeFile(path, example());
  const file = await Deno.readFile(path);
  const newer = withPhkvHeader(file, (header) => header.setUint32(8, 7, true));
  await Deno.writeFile(path, newer);
  for (const recover of [false, true]) {
    const open = () => PhkvReader.open(path, { recover });
    await rejectsWith(open, "newer-version", path, "version 7", "up to 1");
  }
  await Deno.writeFile(path, withPhkvHeader(file, (header) => header.setUint32(8, 0, true)));
  await rejectsWith(() => readAll(path), "corrupt", path, "version 0");
});

Deno.test("other files are not taken for .phkv files", async () => {
  using folder = new TemporaryFolder();
  const text = await folder.write("x.phkv", "This is a text of more than thirty-two bytes.");
  for (const recover of [false, true]) {
    await rejectsWith(
      () => PhkvReader.open(text, { recover }),
      "corrupt",
      text,
      "not a .phkv file",
    );
  }
  const missing = folder.file("missing.phkv");
  await rejectsWith(() => PhkvReader.open(missing), "not-found", missing);
  await rejectsWith(() => PhkvReader.open(folder.path), "io", folder.path, "a folder");
});

/** Changes to the example's JSON that its checksum vouches for all the same. */
const FORGED_JSON: [(json: Json) => unknown, string][] = [
  [(json) => ({ ...json, format: undefined }), "format"],
  [(json) => ({ ...json, layout: "rows" }), '"rows"'],
  [(json) => ({ ...json, codec: [] }), "codec"],
  [(json) => ({ ...json, blockTokens: 32 }), "32 tokens"],
  [(json) => ({ ...json, layers: {} }), "layers"],
  [(json) => ({ ...json, metadata: { a: 1 } }), "metadata"],
  [(json) => ({ ...json, layers: json.layers.slice(1) }), "7 entries"],
  [(json) => ({ ...json, layers: [null] }), "layer 0"],
  [twice("layer", "layers.0"), "layers.0 twice"],
  [twice("keyName", "layers.0.value"), '"layers.0.value" twice'],
  [(json) => withLayer(json, { layer: "\x1b[2J" }), "printable"],
  [(json) => withLayer(json, { keyName: 1 }), "keyName"],
  [(json) => withLayer(json, { dtype: "i32" }), '"i32"'],
  [(json) => withLayer(json, { heads: 0 }), "heads"],
  [(json) => withLayer(json, { heads: 4097 }), "4097"],
  [(json) => withLayer(json, { headDim: 17 }), "17"],
  [(json) => withLayer(json, { headDim: 272 }), "272"],
  [(json) => withLayer(json, { tokens: -1 }), "-1"],
  [(json) => withLayer(json, { tokens: 2 ** 52 }), "tokens"],
  [(json) => withLayer(json, { blocks: 0.5 }), "0.5"],
  [(json) => withLayer(json, { blocks: 4 }), "194 tokens"],
  [(json) => withLayer(json, { blocks: 2 }), "7 entries"],
  [(json) => withLayer(json, { tokens: 195 }), "tail"],
];

// deno-lint-ignore no-explicit-any
type Json = Record<string, any>;

function withLayer(json: Json, change: Json): Json {
  return { ...json, layers: [{ ...json.layers[0], ...change }, json.layers[1]] };
}

function twice(field: string, value: string) {
  return (json: Json) => ({
    ...json,
    layers: [json.layers[0], { ...json.layers[1], [field]: value }],
  });
}

Deno.test("a header that lies is refused even with a valid checksum", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("x.phkv");
  await writeFile(path, example());
  const file = await Deno.readFile(path);
  const json = phkvJson(file);
  const jsonEnd = 32 + new TextEncoder().encode(json).length;
  const table = Math.ceil(jsonEnd / 8) * 8;
  assertEquals(withPhkvJson(file, json), file);
  assertNotEquals(jsonEnd, table);

  const refuses = async (forged: Uint8Array, code: "corrupt" | "truncated", fragment: string) => {
    await Deno.writeFile(path, forged);
    await rejectsWith(() => PhkvReader.open(path), code, path, fragment);
  };
  for (const [change, fragment] of FORGED_JSON) {
    const forged = withPhkvJson(file, JSON.stringify(change(JSON.parse(json))));
    await refuses(forged, "corrupt", fragment);
  }
  await refuses(withPhkvJson(file, "{"), "corrupt", "not valid JSON");
  await refuses(withPhkvJson(file, '{"codec":{},"codec":{}}'), "corrupt", '"codec" twice');
  const edited = (edit: (header: DataView) => void) => withPhkvHeader(file, edit);
  await refuses(edited((header) => header.setUint8(jsonEnd, 1)), "corrupt", "padding");
  await refuses(edited((header) => header.setUint32(24, 9999, true)), "corrupt", "no room");
  await refuses(edited((header) => header.setUint32(24, 8, true)), "corrupt", "JSON");
  await refuses(edited((header) => header.setUint32(28, 1, true)), "corrupt", "contradicts");
  await refuses(edited((header) => header.setUint32(table + 12, 1, true)), "corrupt", "entry 0");
  await refuses(edited((header) => header.setUint32(table, 0, true)), "corrupt", "block 0");
  await refuses(edited((header) => header.setUint32(table, 17, true)), "corrupt", "17 bytes");
  await refuses(edited((header) => header.setUint32(table, 48, true)), "truncated", "truncated");
  const huge = edited((header) => header.setBigUint64(table, 2n ** 63n, true));
  await refuses(huge, "corrupt", "too long");
});

Deno.test("the .phkv reader refuses ranges that a layer does not have", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("x.phkv");
  await writeFile(path, example());
  const reader = await PhkvReader.open(path);
  {
    using _ = reader;
    for (const [first, count] of [[0, 4], [3, 1], [-1, 1], [4, undefined], [0.5, 1], [0, NaN]]) {
      await rejectsWith(
        () => reader.readBlocks(0, first, count),
        "invalid-argument",
        `from ${first} of layers.0`,
        path,
      );
    }
    await rejectsWith(() => reader.readBlocks(2), "invalid-argument", "layer 2", path);
    await rejectsWith(() => reader.readTail(-1), "invalid-argument", "layer -1", path);
  }
  await rejectsWith(() => reader.readTail(0), "disposed", path);
  await rejectsWith(() => reader.readTail(1), "disposed", path);
  await rejectsWith(() => reader.readBlocks(0, 0, 1), "disposed", path);
});

Deno.test("the .phkv writer wants every entry in order", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("x.phkv");
  const { records, tails, ...options } = example();
  const [first, second] = records[0]!;
  {
    using writer = await PhkvWriter.create(path, options);
    const refuses = (work: () => Promise<void>, ...fragments: string[]) =>
      rejectsWith(work, "invalid-argument", path, ...fragments);
    await refuses(() => writer.commit(), "layers.0 block 0 (tokens 0-63) was not written");
    await refuses(() => writer.appendBlocks(1, first!, [0, 32]), "turn of layers.1", "block 0");
    await refuses(() => writer.appendBlocks(2, first!, [0, 32]), "no layer 2");
    await refuses(() => writer.writeTail(0, tails[0]!), "layers.0 block 0", "before the tail");
    await refuses(() => writer.appendBlocks(0, first!, []), "3 blocks, not -1");
    await refuses(() => writer.appendBlocks(0, first!, [0, 16]), "0 to 16", "0 to 32");
    await refuses(() => writer.appendBlocks(0, first!, [16, 32]), "16 to 32");
    await refuses(() => writer.appendBlocks(0, first!, [0, 20, 32]), "block 0", "20 bytes");
    await refuses(() => writer.appendBlocks(0, first!, [0, 32, 16, 32]), "block 1", "ends before");
    await refuses(() => writer.appendBlocks(0, first!, [0, 0, 32]), "block 0", "0 bytes");
    await refuses(() => writer.appendBlocks(0, new Uint8Array(64), [0, 16, 32, 48, 64]), "not 4");
    await writer.appendBlocks(0, concatenate([first!, second!]), BigUint64Array.of(0n, 32n, 48n));
    await writer.appendBlocks(0, records[0]![2]!, [0, 48]);
    await refuses(() => writer.appendBlocks(0, first!, [0, 32]), "0 blocks, not 1");
    await refuses(
      () => writer.writeTail(0, new Uint8Array(2)),
      "layers.0 tail",
      "128 bytes, got 2",
    );
    await writer.writeTail(0, tails[0]!);
    await refuses(() => writer.writeTail(0, tails[0]!), "turn of layers.0", "layers.1 block 0");
    await writer.appendBlocks(1, concatenate(records[1]!), boundaries(records[1]!));
    await refuses(() => writer.commit(), "layers.1 tail (no tokens) was not written");
    await writer.writeTail(1, tails[1]!);
    await refuses(() => writer.writeTail(1, tails[1]!), "next is commit");
    assertEquals(folder.list().length, 1);
    await writer.commit();
    await rejectsWith(() => writer.commit(), "disposed", path);
  }
  assertEquals(folder.list(), ["x.phkv"]);
  assertEquals(await recoverAll(path), allOf(example()));
});

Deno.test("the .phkv writer refuses a header that the reader would", async () => {
  using folder = new TemporaryFolder();
  const create = (change: Partial<PhkvWriterOptions>) => () =>
    PhkvWriter.create(folder.file("x.phkv"), { ...example(), ...change });
  const [layer] = example().layers;
  const refuses = (change: Partial<PhkvWriterOptions>, fragment: string) =>
    rejectsWith(create(change), "invalid-argument", folder.file("x.phkv"), fragment);
  await refuses({ layers: [layer!, layer!] }, "layers.0 twice");
  await refuses({ layers: [{ ...layer!, headDim: 20 }] }, "headDim");
  await refuses({ layers: [{ ...layer!, tokens: NaN }] }, "tokens");
  await refuses({ codec: [] }, "codec");
  await refuses({ codec: { large: 1n } }, "does not fit into JSON");
  await refuses({ metadata: { half: "\ud800" } }, "surrogate");
  assertEquals(folder.list(), []);
});

Deno.test("a .phkv file copied from its reader's own description is the same", async () => {
  using folder = new TemporaryFolder();
  const content = example();
  await writeFile(folder.file("x.phkv"), content);
  using reader = await PhkvReader.open(folder.file("x.phkv"));
  const { layout, codec, layers, metadata } = reader;
  await writeFile(folder.file("y.phkv"), { ...content, layout, codec, layers, metadata });
  const [x, y] = [folder.file("x.phkv"), folder.file("y.phkv")].map((path) =>
    Deno.readFileSync(path)
  );
  assertEquals(x, y);
});

Deno.test("an interrupted .phkv writer leaves nothing", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("x.phkv");
  const { records, ...options } = example();
  const controller = new AbortController();
  {
    using writer = await PhkvWriter.create(path, options);
    await writer.appendBlocks(0, records[0]![0]!, [0, 32]);
  }
  assertEquals(folder.list(), []);
  using writer = await PhkvWriter.create(path, { ...options, signal: controller.signal });
  await writer.appendBlocks(0, records[0]![0]!, [0, 32]);
  controller.abort();
  assertEquals(folder.list(), []);
});
