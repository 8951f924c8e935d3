import { assertEquals } from "@std/assert";
import { readNpy } from "../src/io/mod.ts";
import { rejectsWith } from "./rejects_with.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

const DATA = Uint8Array.of(0, 0, 0, 60, 0, 64, 0, 66, 0, 68, 0, 69); // 0 to 5 in float16

/** A .npy file; numpy pads headers with spaces so that the data is aligned to 64 bytes. */
function npy(
  header: string,
  { major = 1, minor = 0, data = DATA, headerBytes = header.length } = {},
): Uint8Array {
  const text = new TextEncoder().encode(header);
  const length = new Uint8Array(major === 1 ? 2 : 4);
  for (let i = 0; i < length.length; i++) length[i] = headerBytes >>> (8 * i);
  const magic = [0x93, ...new TextEncoder().encode("NUMPY"), major, minor];
  return Uint8Array.of(...magic, ...length, ...text, ...data);
}

const dict = (descr: string, order: string, shape: string) =>
  `{'descr': ${descr}, 'fortran_order': ${order}, 'shape': ${shape}, }`;
const HEADER = dict("'<f2'", "False", "(2, 3)");

for (const major of [1, 2, 3]) {
  Deno.test(`readNpy reads what NumPy writes in version ${major}.0`, async () => {
    using folder = new TemporaryFolder();
    const headerBytes = major === 1 ? 118 : 116;
    const content = npy(HEADER.padEnd(headerBytes - 1) + "\n", { major });
    assertEquals(content.length, 128 + DATA.length);
    const array = await readNpy(await folder.write("x.npy", content));
    assertEquals(array, { dtype: "f16", shape: [2, 3], data: DATA });
  });
}

const READABLE: [string, string, number[]][] = [
  [dict("'<f4'", "False", "(3,)"), "f32", [3]],
  [dict("'<i4'", "False", "(1, 3, 1)"), "i32", [1, 3, 1]],
  [dict("'|u1'", "False", "(12,)"), "u8", [12]],
  [dict("'<f8'", "False", "(2, 1)"), "f64", [2, 1]],
  [`{"shape":( 2 ,3, ),"fortran_order":False,"descr":"<f4"}`, "f32", [2, 3]],
];

Deno.test("readNpy reads every type, and headers in any order", async () => {
  using folder = new TemporaryFolder();
  for (const [header, dtype, shape] of READABLE) {
    const size = dtype === "f64" ? 8 : dtype === "f32" || dtype === "i32" ? 4 : 1;
    const data = new Uint8Array(shape.reduce((a, b) => a * b, size)).fill(7);
    const array = await readNpy(await folder.write("x.npy", npy(header, { data })));
    assertEquals<unknown>(array, { dtype, shape, data });
  }
  const scalar = npy(dict("'|u1'", "False", "()"), { data: Uint8Array.of(9) });
  assertEquals((await readNpy(await folder.write("x.npy", scalar))).shape, []);
});

const valid = npy(HEADER);
const BROKEN: [string, Uint8Array, "corrupt" | "truncated" | "unsupported", ...string[]][] = [
  ["an empty file", new Uint8Array(), "corrupt", "not a .npy file"],
  ["a zip file", Uint8Array.of(0x50, 0x4b, 3, 4, 0, 0, 0, 0), "corrupt", ".npz"],
  ["no version", valid.slice(0, 6), "truncated", "byte 6"],
  ["half a header length", valid.slice(0, 9), "truncated", "byte 9"],
  ["half a header", valid.slice(0, 30), "truncated", "the file has 30"],
  ["half the data", valid.slice(0, -1), "truncated", "12 bytes, 11 follow"],
  ["more data", Uint8Array.of(...valid, 1), "corrupt", "12 bytes, 13 follow"],
  ["version 4.0", npy(HEADER, { major: 4 }), "unsupported", "4.0"],
  ["version 1.1", npy(HEADER, { minor: 1 }), "unsupported", "1.1"],
  ["a huge header", npy(HEADER, { major: 2, headerBytes: 2 ** 32 - 1 }), "corrupt", "4294967295"],
  ["int64", npy(dict("'<i8'", "False", "(2,)")), "unsupported", "'<i8'", "astype(np.float32)"],
  ["big endian", npy(dict("'>f4'", "False", "(3,)")), "unsupported", "'>f4'"],
  ["a structure", npy(dict("[('a', '<f4')]", "False", "(3,)")), "unsupported", "structure"],
  ["column-major order", npy(dict("'<f2'", "True", "(2, 3)")), "unsupported", "ascontiguousarray"],
  ["a list for a shape", npy(dict("'<f2'", "False", "[2, 3]")), "corrupt", "shape"],
  ["a negative size", npy(dict("'<f2'", "False", "(-2, 3)")), "corrupt", "shape"],
  ["a huge shape", npy(dict("'<f2'", "False", "(99999999, 99999999)")), "corrupt", "too large"],
  ["an order of 0", npy(dict("'<f2'", "0", "(2, 3)")), "corrupt", "True or False"],
  ["a missing entry", npy("{'descr': '<f2', 'shape': (2, 3)}"), "corrupt", "lacks fortran_order"],
  ["an unknown entry", npy("{'descr': '<f2', 'size': 3}"), "corrupt", "size"],
  ["an entry twice", npy("{'descr': '<f2', 'descr': '<f2'}"), "corrupt", "descr twice"],
  ["code", npy("__import__('os')"), "corrupt", "no {"],
  ["no comma", npy("{'descr': '<f2' 'shape': (2, 3)}"), "corrupt", ", or }"],
  ["text after the header", npy(HEADER + " x"), "corrupt", "end"],
];

for (const [what, content, code, ...fragments] of BROKEN) {
  Deno.test(`readNpy refuses ${what}`, async () => {
    using folder = new TemporaryFolder();
    const path = await folder.write("broken.npy", content);
    await rejectsWith(() => readNpy(path), code, path, ...fragments);
  });
}

Deno.test("readNpy names a file that is missing", async () => {
  using folder = new TemporaryFolder();
  await rejectsWith(() => readNpy(folder.file("x.npy")), "not-found", folder.file("x.npy"));
});
