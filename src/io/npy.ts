import type { DType } from "../dtype.ts";
import { PackhorseError } from "../error.ts";
import { byteLengthOf } from "./byte_length.ts";
import { InputFile } from "./input_file.ts";

/** What {@linkcode readNpy} returns. */
export interface NpyArray {
  /** Type of the elements. */
  readonly dtype: DType;
  /** Sizes, outermost first; `[]` is a scalar. */
  readonly shape: readonly number[];
  /** The elements in row-major order, little-endian. */
  readonly data: Uint8Array<ArrayBuffer>;
}

type Fail = (reason: string, code?: "corrupt" | "truncated" | "unsupported") => never;

const MAGIC = Uint8Array.of(0x93, ...new TextEncoder().encode("NUMPY"));
/** NumPy's own limit is 10,000 for files of unknown origin. */
const MOST_HEADER_BYTES = 2 ** 16;
const DTYPE_OF_DESCR: ReadonlyMap<string, DType> = new Map([
  ["<f2", "f16"],
  ["<f4", "f32"],
  ["<i4", "i32"],
  ["|u1", "u8"],
  ["<f8", "f64"],
]);

/**
 * Reads an array that `numpy.save` wrote, format versions 1.0 to 3.0: row-major,
 * little-endian, of float16, float32, float64, int32 or uint8.
 *
 * Throws `not-found` or `io` if the file cannot be read, `unsupported` for other
 * element types and column-major order (the message says how to convert them),
 * `corrupt` or `truncated` if it breaks the format.
 *
 * @example
 * ```ts
 * import { readNpy } from "@packhorse/packhorse/io";
 * import { assertEquals } from "@std/assert";
 *
 * const header = "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 2), }\n";
 * const path = await Deno.makeTempFile({ suffix: ".npy" });
 * await Deno.writeFile(path, Uint8Array.of(
 *   0x93, ...new TextEncoder().encode("NUMPY"), 1, 0, header.length, 0,
 *   ...new TextEncoder().encode(header), 1, 2, 3, 4,
 * ));
 * const { dtype, shape, data } = await readNpy(path);
 * assertEquals(dtype, "u8");
 * assertEquals(shape, [2, 2]);
 * assertEquals(data, Uint8Array.of(1, 2, 3, 4));
 * ```
 */
export async function readNpy(path: string): Promise<NpyArray> {
  using file = await InputFile.open(path);
  const fail = failure(path);
  const { descr, shape, data } = await readArray(file, fail, (descr, shape) => {
    const dtype = DTYPE_OF_DESCR.get(descr) ?? unsupportedType(`'${descr}'`, fail);
    return byteLengthOf(dtype, shape);
  });
  return { dtype: DTYPE_OF_DESCR.get(descr)!, shape, data };
}

/** Any numbers of a .npy file, each as a float64. */
export interface NpyNumbers {
  /** Sizes, outermost first; `[]` is a scalar. */
  readonly shape: readonly number[];
  /** The elements in row-major order. */
  readonly values: Float64Array<ArrayBuffer>;
}

/** Where the bytes of a .npy file are. */
export interface NpySource {
  readonly size: number;
  read(position: number, length: number): Promise<Uint8Array<ArrayBuffer>>;
}

const READ_NUMBER: ReadonlyMap<string, readonly [number, (view: DataView, at: number) => number]> =
  new Map([
    ["<f2", [2, (view: DataView, at: number) => view.getFloat16(at, true)]],
    ["<f4", [4, (view: DataView, at: number) => view.getFloat32(at, true)]],
    ["<f8", [8, (view: DataView, at: number) => view.getFloat64(at, true)]],
    ["<i2", [2, (view: DataView, at: number) => view.getInt16(at, true)]],
    ["<i4", [4, (view: DataView, at: number) => view.getInt32(at, true)]],
    ["<i8", [8, (view: DataView, at: number) => Number(view.getBigInt64(at, true))]],
    ["<u2", [2, (view: DataView, at: number) => view.getUint16(at, true)]],
    ["<u4", [4, (view: DataView, at: number) => view.getUint32(at, true)]],
    ["<u8", [8, (view: DataView, at: number) => Number(view.getBigUint64(at, true))]],
    ["|i1", [1, (view: DataView, at: number) => view.getInt8(at)]],
    ["|u1", [1, (view: DataView, at: number) => view.getUint8(at)]],
    ["|b1", [1, (view: DataView, at: number) => view.getUint8(at)]],
  ]);

/** Reads numbers of any type as float64; `path` is for messages. Throws as {@linkcode readNpy}. */
export async function readNpyNumbers(source: NpySource, path: string): Promise<NpyNumbers> {
  const fail = failure(path);
  const { descr, shape, data } = await readArray(source, fail, (descr, shape) => {
    const [bytes] = READ_NUMBER.get(descr) ??
      fail(`its element type is '${descr}', which is no little-endian number`, "unsupported");
    const count = byteLengthOf("u8", shape);
    return count === undefined ? undefined : bytes * count;
  });
  const [bytes, read] = READ_NUMBER.get(descr)!;
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  const values = new Float64Array(data.byteLength / bytes);
  for (let i = 0; i < values.length; i++) values[i] = read(view, i * bytes);
  return { shape, values };
}

function failure(path: string): Fail {
  return (reason, code = "corrupt") => {
    throw new PackhorseError(code, `Cannot read ${path}: ${reason}`);
  };
}

/** Reads an array of any element type of which `byteLength` says what it takes. */
async function readArray(
  file: NpySource,
  fail: Fail,
  byteLength: (descr: string, shape: readonly number[]) => number | undefined,
): Promise<{ descr: string; shape: number[]; data: Uint8Array<ArrayBuffer> }> {
  const start = await file.read(0, Math.min(file.size, 12));
  if (!MAGIC.every((byte, i) => byte === start[i])) {
    return fail("it is not a .npy file (numpy.save writes one; an .npz must be unzipped)");
  }
  const [major, minor] = start.subarray(6);
  const headerStart = major === 1 ? 10 : 12;
  if (file.size < headerStart) {
    return fail(`it ends in its header, at byte ${file.size}`, "truncated");
  }
  if (minor !== 0 || major === undefined || major < 1 || major > 3) {
    return fail(
      `its format version is ${major}.${minor}; 1.0, 2.0 and 3.0 are known`,
      "unsupported",
    );
  }
  const view = new DataView(start.buffer);
  const headerBytes = major === 1 ? view.getUint16(8, true) : view.getUint32(8, true);
  if (headerBytes > MOST_HEADER_BYTES) {
    return fail(`its header claims ${headerBytes} bytes; at most ${MOST_HEADER_BYTES} are allowed`);
  }
  const dataStart = headerStart + headerBytes;
  if (dataStart > file.size) {
    return fail(`its header ends at byte ${dataStart}, the file has ${file.size}`, "truncated");
  }
  const header = new TextDecoder(major === 3 ? "utf-8" : "latin1")
    .decode(await file.read(headerStart, headerBytes));
  const { descr, shape } = parseHeader(header, fail);

  const sizes = `its shape [${shape.join(", ")}]`;
  const expected = byteLength(descr, shape) ?? fail(`${sizes} is too large`);
  const actual = file.size - dataStart;
  const flaw = `${sizes} takes ${expected} bytes, ${actual} follow its header`;
  if (actual < expected) return fail(flaw, "truncated");
  if (actual > expected) return fail(flaw);
  return { descr, shape, data: await file.read(dataStart, expected) };
}

/** Parses a Python dict of exactly 'descr', 'fortran_order' and 'shape', in any order. */
function parseHeader(header: string, fail: Fail): { descr: string; shape: number[] } {
  let position = 0;
  const take = (pattern: RegExp): string | undefined => {
    const sticky = new RegExp(`[ \\n]*(${pattern.source})`, "y");
    sticky.lastIndex = position;
    const match = sticky.exec(header);
    if (match) position = sticky.lastIndex;
    return match?.[1];
  };
  const expect = (pattern: RegExp, what: string): string =>
    take(pattern) ?? fail(`its header has no ${what} at character ${position}`);

  const values = new Map<string, string>();
  expect(/\{/, "{");
  while (take(/\}/) === undefined) {
    const key = expect(/'\w*'|"\w*"/, "name").slice(1, -1);
    expect(/:/, ":");
    if (values.has(key)) return fail(`its header gives ${key} twice`);
    if (key === "descr") {
      values.set(
        key,
        take(/'[^'\\]*'|"[^"\\]*"/)?.slice(1, -1) ?? unsupportedType("a structure", fail),
      );
    } else if (key === "fortran_order") {
      values.set(key, expect(/True|False/, "True or False"));
    } else if (key === "shape") {
      values.set(key, expect(/\((?: *\d+ *,)*(?: *\d+)? *\)/, "shape"));
    } else {
      return fail(`its header has the unknown entry ${key}`);
    }
    if (take(/,/) === undefined) {
      expect(/\}/, ", or }");
      break;
    }
  }
  expect(/$/, "end");

  const [descr, order, shape] = ["descr", "fortran_order", "shape"].map((key) =>
    values.get(key) ?? fail(`its header lacks ${key}`)
  ) as [string, string, string];
  if (order === "True") {
    return fail(
      "it is in column-major (Fortran) order; save np.ascontiguousarray(x) instead",
      "unsupported",
    );
  }
  return { descr, shape: (shape.match(/\d+/g) ?? []).map(Number) };
}

function unsupportedType(descr: string, fail: Fail): never {
  return fail(
    `its element type is ${descr}, supported are '<f2', '<f4', '<f8', '<i4' and '|u1'; ` +
      "save x.astype(np.float32) instead",
    "unsupported",
  );
}
