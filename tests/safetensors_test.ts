import { assert, assertEquals } from "@std/assert";
import fc from "fast-check";
import { BYTES_PER_ELEMENT, type DType } from "../src/dtype.ts";
import { SafetensorsReader, SafetensorsWriter } from "../src/io/mod.ts";
import { rejectsWith } from "./rejects_with.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

const encoder = new TextEncoder();

/** A safetensors file with any header, given as text or as what JSON makes of it. */
function fileOf(header: unknown, dataBytes = 0, headerBytes?: bigint): Uint8Array {
  const json = encoder.encode(typeof header === "string" ? header : JSON.stringify(header));
  const file = new Uint8Array(8 + json.byteLength + dataBytes);
  new DataView(file.buffer).setBigUint64(0, headerBytes ?? BigInt(json.byteLength), true);
  file.set(json, 8);
  return file;
}

/** What the official writer, safetensors 0.8.0, makes of five tensors. */
const OFFICIAL_HEADER = '{"__metadata__":{"model":"tiny"},' +
  '"é \\"q\\"\\n\\u0001\x7f":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},' +
  '"s":{"dtype":"I32","shape":[],"data_offsets":[12,16]},' +
  '"e":{"dtype":"F16","shape":[0,3],"data_offsets":[16,16]},' +
  '"layers.0.key":{"dtype":"F16","shape":[2,2],"data_offsets":[16,24]},' +
  '"10":{"dtype":"U8","shape":[3],"data_offsets":[24,27]}}       ';
// deno-fmt-ignore
const OFFICIAL_DATA = [
  0, 0, 0, 0, 0, 0, 128, 63, 0, 0, 0, 64, 7, 0, 0, 0, 0, 0, 0, 60, 0, 64, 0, 66, 0, 1, 2,
];

Deno.test("the safetensors writer writes what the official one does", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("out.safetensors");
  const tensors = [
    { name: 'é "q"\n\x01\x7f', dtype: "f32", shape: [3] },
    { name: "s", dtype: "i32", shape: [] },
    { name: "e", dtype: "f16", shape: [0, 3] },
    { name: "layers.0.key", dtype: "f16", shape: [2, 2] },
    { name: "10", dtype: "u8", shape: [3] },
  ] as const;
  const expected = fileOf(OFFICIAL_HEADER, OFFICIAL_DATA.length);
  expected.set(OFFICIAL_DATA, expected.length - OFFICIAL_DATA.length);
  {
    using writer = await SafetensorsWriter.create(path, { tensors, metadata: { model: "tiny" } });
    await writer.writeAt("10", Uint8Array.of(0, 1, 2));
    await writer.writeAt("s", Uint8Array.of(7, 0, 0, 0));
    await writer.writeAt("layers.0.key", new Uint8Array(new Uint16Array([0, 15360]).buffer));
    await writer.writeAt("layers.0.key", new Uint8Array(new Uint16Array([16384, 16896]).buffer), 4);
    await writer.writeAt(tensors[0].name, new Uint8Array(new Float32Array([0, 1, 2]).buffer));
    await writer.commit();
  }
  assertEquals(await Deno.readFile(path), expected);

  using reader = await SafetensorsReader.open(path);
  assertEquals([...reader.tensors.keys()], tensors.map((tensor) => tensor.name));
  assertEquals(reader.tensors.get("e"), { name: "e", dtype: "f16", shape: [0, 3], byteLength: 0 });
  assertEquals(reader.metadata, { model: "tiny" });
});

Deno.test("the safetensors reader reads the fixture", async () => {
  const path = new URL("fixtures/tiny/kv.safetensors", import.meta.url).pathname;
  using reader = await SafetensorsReader.open(path);
  const [first] = reader.tensors.values();
  assert(first);
  assertEquals([first.dtype, first.shape.length], ["f16", 3]);
  const whole = await reader.read(first.name);
  const slice = new Uint8Array(100);
  await reader.readInto(first.name, slice, 1000);
  assertEquals(slice, whole.slice(1000, 1100));
});

Deno.test("safetensors written in random slices read back the same", async () => {
  using folder = new TemporaryFolder();
  const dtypes = Object.keys(BYTES_PER_ELEMENT) as DType[];
  const tensor = fc.record({
    name: fc.string({ unit: "binary" }).filter((name) => name !== "__metadata__"),
    dtype: fc.constantFrom(...dtypes),
    shape: fc.array(fc.nat(5), { maxLength: 4 }),
  });
  const property = fc.asyncProperty(
    fc.uniqueArray(tensor, { selector: (t) => t.name, maxLength: 6 }),
    fc.dictionary(fc.string({ unit: "binary" }), fc.string({ unit: "binary" }), {
      noNullPrototype: true,
    }),
    fc.infiniteStream(fc.nat()),
    async (tensors, metadata, numbers) => {
      const path = folder.file("random.safetensors");
      const next = (limit: number) => numbers.next().value % limit;
      const contents = new Map(tensors.map(({ name, dtype, shape }) => {
        const size = shape.reduce((a, b) => a * b, BYTES_PER_ELEMENT[dtype]);
        return [name, Uint8Array.from({ length: size }, () => next(256))];
      }));
      {
        using writer = await SafetensorsWriter.create(path, { tensors, metadata });
        const slices = [...contents].flatMap(([name, content]) => {
          const middle = next(content.length + 1);
          return [{ name, begin: 0, end: middle }, { name, begin: middle, end: content.length }];
        }).sort(() => next(3) - 1);
        for (const { name, begin, end } of slices) {
          await writer.writeAt(name, contents.get(name)!.subarray(begin, end), begin);
        }
        await writer.commit();
      }
      using reader = await SafetensorsReader.open(path);
      assertEquals(reader.metadata, metadata);
      assertEquals(
        [...reader.tensors.values()],
        tensors.map((t) => ({ ...t, byteLength: contents.get(t.name)!.length })),
      );
      for (const [name, content] of contents) assertEquals(await reader.read(name), content);
    },
  );
  await fc.assert(property, { numRuns: 100 });
});

Deno.test("the safetensors writer commits complete files only", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("out.safetensors");
  const shape = [3, 4];
  {
    using writer = await SafetensorsWriter.create(path, {
      tensors: [{ name: "a", dtype: "u8", shape }, { name: "b", dtype: "u8", shape }],
    });
    await writer.writeAt("a", new Uint8Array(12));
    const incomplete = (byte: number) =>
      rejectsWith(() => writer.commit(), "invalid-argument", path, '"b"', `byte ${byte} was never`);
    await incomplete(0);
    await writer.writeAt("b", new Uint8Array(4), 8);
    await incomplete(0);
    await writer.writeAt("b", new Uint8Array(5), 0);
    await incomplete(5);
    await writer.writeAt("b", new Uint8Array(3), 6);
    await incomplete(5);
  }
  assertEquals(folder.list(), []);
});

Deno.test("the safetensors writer refuses what does not fit", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("out.safetensors");
  const a = { name: "a", dtype: "f16", shape: [2] } as const;
  const create = (...tensors: { name: string; dtype: DType; shape: number[] }[]) => () =>
    SafetensorsWriter.create(path, { tensors });
  await rejectsWith(create({ ...a, shape: [] }, { ...a, shape: [1] }), "invalid-argument", '"a"');
  await rejectsWith(create({ ...a, shape: [], name: "__metadata__" }), "invalid-argument", "taken");
  await rejectsWith(create({ ...a, shape: [], name: "\ud800" }), "invalid-argument", "Unicode");
  await rejectsWith(create({ ...a, shape: [-1] }), "invalid-argument", "-1");
  await rejectsWith(create({ ...a, shape: [2 ** 40, 2 ** 40] }), "invalid-argument", `${2 ** 40}`);
  {
    using writer = await SafetensorsWriter.create(path, { tensors: [a] });
    const two = new Uint8Array(2);
    await rejectsWith(() => writer.writeAt("b", two), "not-found", '"b"', path);
    await rejectsWith(() => writer.writeAt("a", two, 3), "invalid-argument", '"a"', "at 3");
    await rejectsWith(() => writer.writeAt("a", two, -1), "invalid-argument", "at -1");
  }
  assertEquals(folder.list(), []);
});

const u8 = (shape: unknown, begin: unknown, end: unknown) => ({
  dtype: "U8",
  shape,
  data_offsets: [begin, end],
});

const BROKEN_HEADERS: [string, Uint8Array, "corrupt" | "truncated", ...string[]][] = [
  ["an empty file", new Uint8Array(), "truncated", "the file has 0"],
  ["half a length", new Uint8Array(7), "truncated", "the file has 7"],
  ["a length of zero", fileOf("", 8), "corrupt", '"{"'],
  ["an absurd length", fileOf("{}", 0, 2n ** 63n), "corrupt", "claims 9223372036854775808"],
  ["a length beyond the limit", fileOf("{}", 0, 100_000_001n), "corrupt", "100000001"],
  ["a length beyond the file", fileOf("{}", 0, 3n), "truncated", "byte 11, the file has 10"],
  ["a leading space", fileOf(" {}"), "corrupt", '"{"'],
  ["a byte order mark", fileOf("\ufeff{}"), "corrupt", '"{"'],
  ["no JSON", fileOf("{]"), "corrupt", "not valid JSON"],
  ["text after the JSON", fileOf("{}}"), "corrupt", "not valid JSON"],
  ["invalid UTF-8", fileOf("{}  ").with(10, 0xff), "corrupt", "not valid UTF-8"],
  ["deep nesting", fileOf(`{"a":${"[".repeat(9e5)}`), "corrupt", "nests deeper than 32"],
  ["half a surrogate pair", fileOf('{"\\ud800":1}'), "corrupt", "surrogate"],
  ["a name given twice", fileOf('{"a":{},"b":{},"a":{}}'), "corrupt", '"a" twice'],
  ["an escaped name given twice", fileOf('{"a":{},"\\u0061" : {}}'), "corrupt", '"a" twice'],
  ["a field given twice", fileOf('{"a":{"dtype":"U8","dtype":"U8"}}'), "corrupt", "twice"],
  ["metadata that is no map", fileOf({ __metadata__: [] }), "corrupt", "__metadata__"],
  ["metadata of numbers", fileOf({ __metadata__: { a: 1 } }), "corrupt", "__metadata__"],
  ["a tensor that is no object", fileOf({ a: [] }), "corrupt", '"a"'],
  ["a tensor without dtype", fileOf({ a: { shape: [], data_offsets: [0, 1] } }), "corrupt", '"a"'],
  ["a shape that is no list", fileOf({ a: u8(1, 0, 1) }, 1), "corrupt", '"a"', "shape"],
  ["a negative size", fileOf({ a: u8([-1], 0, 1) }, 1), "corrupt", '"a"', "[-1]"],
  ["a fractional size", fileOf({ a: u8([0.5], 0, 1) }, 1), "corrupt", '"a"', "[0.5]"],
  ["a size beyond 2^53", fileOf({ a: u8([2 ** 53], 0, 1) }, 1), "corrupt", '"a"', "[9007"],
  ["sizes that overflow", fileOf({ a: u8([2 ** 32, 2 ** 32], 0, 0) }), "corrupt", '"a"', "4294"],
  ["one offset", fileOf({ a: { ...u8([], 0, 1), data_offsets: [0] } }, 1), "corrupt", "[0]"],
  ["offsets that are strings", fileOf({ a: u8([], "0", "1") }, 1), "corrupt", '["0","1"]'],
  ["a negative offset", fileOf({ a: u8([], -1, 0) }, 1), "corrupt", "[-1,0]"],
  ["offsets that run backwards", fileOf({ a: u8([], 1, 0) }, 1), "corrupt", "backwards"],
  ["too few bytes for a shape", fileOf({ a: u8([3], 0, 2) }, 2), "corrupt", '"a"', "U8 [3]"],
  ["an overlap", fileOf({ a: u8([2], 0, 2), b: u8([2], 1, 3) }, 3), "corrupt", '"b"', "overlaps"],
  [
    "the same range twice",
    fileOf({ a: u8([1], 0, 1), b: u8([1], 0, 1) }, 1),
    "corrupt",
    "overlaps",
  ],
  ["a gap", fileOf({ a: u8([1], 0, 1), b: u8([1], 2, 3) }, 3), "corrupt", '"b"', "gap"],
  ["a gap at the start", fileOf({ a: u8([1], 1, 2) }, 2), "corrupt", '"a"', "gap"],
  ["bytes after the last tensor", fileOf({ a: u8([1], 0, 1) }, 3), "corrupt", "last 2 bytes"],
  ["too little data", fileOf({ a: u8([5], 0, 5) }, 4), "truncated", '"a"'],
];

for (const [what, content, code, ...fragments] of BROKEN_HEADERS) {
  Deno.test(`the safetensors reader refuses ${what}`, async () => {
    using folder = new TemporaryFolder();
    const path = await folder.write("broken.safetensors", content);
    await rejectsWith(() => SafetensorsReader.open(path), code, path, ...fragments);
  });
}

Deno.test("a dtype that Packhorse does not have is listed, but not read", async () => {
  using folder = new TemporaryFolder();
  const a = { dtype: "I64", shape: [2], data_offsets: [0, 16] };
  const header = { a, b: u8([2], 16, 18), c: { ...a, dtype: "F4", data_offsets: [18, 19] } };
  const path = await folder.write("mixed.safetensors", fileOf(header, 19));
  using reader = await SafetensorsReader.open(path);
  assertEquals([...reader.tensors.keys()], ["b"]);
  assertEquals([...reader.unsupported], [["a", "I64"], ["c", "F4"]]);
  assertEquals(await reader.read("b"), new Uint8Array(2));
  await rejectsWith(() => reader.read("a"), "unsupported", path, '"a"', '"I64"');
  await rejectsWith(() => reader.readInto("c", new Uint8Array(1)), "unsupported", '"c"', '"F4"');
});

Deno.test("the safetensors reader names what it cannot read", async () => {
  using folder = new TemporaryFolder();
  const missing = folder.file("missing.safetensors");
  await rejectsWith(() => SafetensorsReader.open(missing), "not-found", missing, "no such file");
  await rejectsWith(() => SafetensorsReader.open(folder.path), "io", folder.path, "a folder");

  const path = await folder.write("a.safetensors", fileOf({ a: u8([4], 0, 4) }, 4));
  const reader = await SafetensorsReader.open(path);
  {
    using _ = reader;
    const three = new Uint8Array(3);
    await rejectsWith(() => reader.read("b"), "not-found", path, '"b"');
    await rejectsWith(() => reader.readInto("a", three, 2), "invalid-argument", '"a"', "at 2");
    await rejectsWith(() => reader.readInto("a", three, -1), "invalid-argument", "at -1");
    await rejectsWith(() => reader.readInto("a", three, 0.5), "invalid-argument", "at 0.5");
    await Deno.truncate(path, 60);
    await rejectsWith(() => reader.read("a"), "truncated", path);
  }
  await rejectsWith(() => reader.read("a"), "disposed", path);
  reader[Symbol.dispose]();
});

Deno.test("shards are read through their index", async () => {
  using folder = new TemporaryFolder();
  await folder.write("one.safetensors", fileOf({ a: u8([1], 0, 1), unlisted: u8([1], 1, 2) }, 2));
  await Deno.mkdir(folder.file("more"));
  const two = fileOf({ b: { ...u8([1], 0, 8), dtype: "I64" }, c: u8([2], 8, 10) }, 10);
  await folder.write("more/two.safetensors", two.with(two.length - 1, 42));
  const index = await folder.write(
    "model.safetensors.index.json",
    JSON.stringify({
      metadata: { total_size: 12, format: "pt" },
      weight_map: { a: "one.safetensors", b: "more/two.safetensors", c: "more/two.safetensors" },
    }),
  );
  using reader = await SafetensorsReader.open(index);
  assertEquals([...reader.tensors.keys()], ["a", "c"]);
  assertEquals([...reader.unsupported], [["b", "I64"]]);
  assertEquals(reader.metadata, { total_size: "12", format: "pt" });
  assertEquals(await reader.read("c"), Uint8Array.of(0, 42));
});

Deno.test("an index cannot lead out of its folder, nor to what is not there", async () => {
  using folder = new TemporaryFolder();
  await folder.write("one.safetensors", fileOf({ a: u8([1], 0, 1) }, 1));
  const open = (index: unknown) => async () => {
    const text = typeof index === "string" ? index : JSON.stringify(index);
    return await SafetensorsReader.open(await folder.write("m.safetensors.index.json", text));
  };
  const outside = ["../x", "/etc/x", "a/../../x", "..", ".", "", "a//b", "a\\..\\x", "C:x", "a\0"];
  for (const file of outside) {
    const fragment = JSON.stringify(file);
    await rejectsWith(open({ weight_map: { a: file } }), "corrupt", fragment, "outside");
  }
  await rejectsWith(open({ weight_map: { a: "two.safetensors" } }), "not-found", "two.safetensors");
  await rejectsWith(open({ weight_map: { b: "one.safetensors" } }), "corrupt", '"b"', "lacks it");
  await rejectsWith(open({ weight_map: { a: 1 } }), "corrupt", "weight_map");
  await rejectsWith(open({}), "corrupt", "weight_map");
  await rejectsWith(open({ weight_map: {}, metadata: [] }), "corrupt", "metadata");
  await rejectsWith(open("[]"), "corrupt", "not a JSON object");
  await rejectsWith(open('{"weight_map":{"a":"x","a":"y"}}'), "corrupt", '"a" twice');
});
