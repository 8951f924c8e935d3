import { dirname, join } from "node:path";
import type { DType } from "../dtype.ts";
import { PackhorseError } from "../error.ts";
import { byteLengthOf } from "./byte_length.ts";
import { InputFile } from "./input_file.ts";
import {
  dtypeOfWord,
  LENGTH_BYTES,
  METADATA,
  MOST_HEADER_BYTES,
  type TensorInfo,
} from "./safetensors_format.ts";
import { isCount, isObject, isStringRecord, parseJsonObject } from "./untrusted_json.ts";

/** What one file holds. */
interface Contents {
  readonly tensors: Map<string, StoredTensor>;
  readonly unsupported: Map<string, string>;
  readonly metadata: Record<string, string>;
}

interface StoredTensor {
  readonly info: TensorInfo;
  readonly file: InputFile;
  /** Of its first byte in the file. */
  readonly position: number;
}

/**
 * Reads tensors, or slices of them, from a `.safetensors` file or from the
 * shards that a `.safetensors.index.json` names, without loading the files.
 *
 * The files are untrusted: every size and offset of a header is checked before
 * it is used.
 *
 * @example
 * ```ts
 * import { SafetensorsReader, SafetensorsWriter } from "@packhorse/packhorse/io";
 * import { assertEquals } from "@std/assert";
 *
 * const path = `${await Deno.makeTempDir()}/example.safetensors`;
 * {
 *   const tensors = [{ name: "layers.0.key", dtype: "u8", shape: [2, 3] }] as const;
 *   using writer = await SafetensorsWriter.create(path, { tensors });
 *   await writer.writeAt("layers.0.key", Uint8Array.of(1, 2, 3, 4, 5, 6));
 *   await writer.commit();
 * }
 * using reader = await SafetensorsReader.open(path);
 * assertEquals(reader.tensors.get("layers.0.key")?.shape, [2, 3]);
 * const secondRow = new Uint8Array(3);
 * await reader.readInto("layers.0.key", secondRow, 3);
 * assertEquals(secondRow, Uint8Array.of(4, 5, 6));
 * ```
 */
export class SafetensorsReader implements Disposable {
  /** The file opened, or the index of its shards. */
  readonly path: string;
  /** The tensors that can be read, in the order of their data. */
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  /** Tensors of types that Packhorse does not have, with the file's word for it, such as "I64". */
  readonly unsupported: ReadonlyMap<string, string>;
  /** The header's `__metadata__`; of an index its `metadata`, where a value that is no string is given as JSON. */
  readonly metadata: Readonly<Record<string, string>>;
  readonly #stored: ReadonlyMap<string, StoredTensor>;
  readonly #files: DisposableStack;

  private constructor(path: string, contents: Contents, files: DisposableStack) {
    this.path = path;
    this.tensors = new Map([...contents.tensors].map(([name, { info }]) => [name, info]));
    this.unsupported = contents.unsupported;
    this.metadata = contents.metadata;
    this.#stored = contents.tensors;
    this.#files = files;
  }

  /**
   * Reads and checks the headers. A path that ends in `.json` is an index.
   *
   * Throws `not-found` or `io` if a file cannot be opened, `truncated` if it is
   * shorter than its header says, `corrupt` if the header breaks the format.
   */
  static async open(path: string): Promise<SafetensorsReader> {
    using files = new DisposableStack();
    const file = files.use(await InputFile.open(path));
    const contents = path.endsWith(".json")
      ? await readIndex(file, files)
      : await readContents(file);
    return new SafetensorsReader(path, contents, files.move());
  }

  /** What the file says of a tensor. Throws `not-found`, or `unsupported` if its type is. */
  info(name: string): TensorInfo {
    return this.#find(name).info;
  }

  /**
   * Fills `target` with the tensor's bytes from `byteOffset` on.
   *
   * Throws as {@linkcode info}, `invalid-argument` if the range leaves the tensor,
   * `truncated` or `io` if the file changed or fails, `disposed` after disposal.
   */
  async readInto(name: string, target: Uint8Array, byteOffset = 0): Promise<void> {
    const { info, file, position } = this.#find(name);
    if (!isCount(byteOffset) || byteOffset + target.byteLength > info.byteLength) {
      const message = `Cannot read ${target.byteLength} bytes at ${byteOffset} of tensor ` +
        `${JSON.stringify(name)}, which has ${info.byteLength}`;
      throw new PackhorseError("invalid-argument", message);
    }
    await file.readInto(target, position + byteOffset);
  }

  /** The tensor's bytes. Throws as {@linkcode readInto}, or `out-of-memory`. */
  async read(name: string): Promise<Uint8Array<ArrayBuffer>> {
    const { info, file, position } = this.#find(name);
    return await file.read(position, info.byteLength);
  }

  /** Closes the files. */
  [Symbol.dispose](): void {
    this.#files.dispose();
  }

  #find(name: string): StoredTensor {
    const stored = this.#stored.get(name);
    if (stored) return stored;
    const what = `tensor ${JSON.stringify(name)} of ${this.path}`;
    const word = this.unsupported.get(name);
    if (word !== undefined) {
      const message = `Cannot read ${what}: its dtype ${JSON.stringify(word)} is not supported; ` +
        "convert it to F16, BF16, F32, I32 or U8";
      throw new PackhorseError("unsupported", message);
    }
    throw new PackhorseError("not-found", `Cannot find ${what}: the file has no such tensor`);
  }
}

async function readContents(file: InputFile): Promise<Contents> {
  const what = `Cannot read ${file.path}: its header`;
  const fail: Fail = (reason, code = "corrupt") => {
    throw new PackhorseError(code, `${what} ${reason}`);
  };
  if (file.size < LENGTH_BYTES) {
    return fail(`takes at least ${LENGTH_BYTES} bytes, the file has ${file.size}`, "truncated");
  }
  const lengthBytes = await file.read(0, LENGTH_BYTES);
  const claimed = new DataView(lengthBytes.buffer).getBigUint64(0, true);
  if (claimed > MOST_HEADER_BYTES) {
    return fail(
      `claims ${claimed} bytes, the format allows ${MOST_HEADER_BYTES}: is it a safetensors file?`,
    );
  }
  const headerBytes = Number(claimed);
  const dataStart = LENGTH_BYTES + headerBytes;
  if (dataStart > file.size) {
    return fail(`ends at byte ${dataStart}, the file has ${file.size}`, "truncated");
  }
  const header = await file.read(LENGTH_BYTES, headerBytes);
  if (header[0] !== "{".charCodeAt(0)) return fail('does not begin with "{"');
  const { [METADATA]: metadata = {}, ...entries } = parseJsonObject(header, what);
  if (!isStringRecord(metadata)) return fail(`has a ${METADATA} that is not a map of strings`);

  const ranges = Object.entries(entries)
    .map(([name, entry]) => checkEntry(name, entry, fail))
    .sort((a, b) => a.begin - b.begin || a.end - b.end);
  let end = 0;
  for (const range of ranges) {
    if (range.begin !== end) {
      const flaw = range.begin < end ? "overlaps the tensor before it" : "leaves a gap before it";
      return fail(
        `has tensor ${JSON.stringify(range.name)} at data byte ${range.begin}: it ${flaw}`,
      );
    }
    end = range.end;
  }
  if (dataStart + end > file.size) {
    const last = JSON.stringify(ranges.at(-1)?.name);
    return fail(
      `places tensor ${last} up to byte ${dataStart + end}, the file has ${file.size}`,
      "truncated",
    );
  }
  if (dataStart + end < file.size) {
    return fail(`leaves the last ${file.size - dataStart - end} bytes of the file to no tensor`);
  }

  const contents = { tensors: new Map(), unsupported: new Map(), metadata };
  for (const { name, word, dtype, shape, begin, end } of ranges) {
    if (dtype === undefined) {
      contents.unsupported.set(name, word);
    } else {
      const info: TensorInfo = { name, dtype, shape, byteLength: end - begin };
      contents.tensors.set(name, { info, file, position: dataStart + begin });
    }
  }
  return contents;
}

type Fail = (reason: string, code?: "corrupt" | "truncated") => never;

/** A header's entry, believed as far as it can be without the others. */
interface Entry {
  readonly name: string;
  readonly word: string;
  readonly dtype: DType | undefined;
  readonly shape: readonly number[];
  readonly begin: number;
  readonly end: number;
}

function checkEntry(name: string, entry: unknown, fail: Fail): Entry {
  const tensor = `tensor ${JSON.stringify(name)}`;
  if (!isObject(entry)) return fail(`describes ${tensor} by something other than an object`);
  const { dtype: word, shape, data_offsets: offsets } = entry;
  if (typeof word !== "string") return fail(`gives ${tensor} no dtype`);
  if (!Array.isArray(shape) || !shape.every(isCount)) {
    return fail(`gives ${tensor} a shape that is not a list of sizes: ${JSON.stringify(shape)}`);
  }
  if (!Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(isCount)) {
    return fail(
      `gives ${tensor} data_offsets that are not two offsets: ${JSON.stringify(offsets)}`,
    );
  }
  const [begin, end] = offsets as [number, number];
  if (end < begin) return fail(`gives ${tensor} data_offsets that run backwards: ${offsets}`);
  const dtype = dtypeOfWord(word);
  if (dtype !== undefined && end - begin !== byteLengthOf(dtype, shape)) {
    return fail(`gives ${tensor} ${end - begin} bytes, which is not ${word} [${shape.join(", ")}]`);
  }
  return { name, word, dtype, shape, begin, end };
}

async function readIndex(index: InputFile, files: DisposableStack): Promise<Contents> {
  const what = `Cannot read ${index.path}: the index`;
  const fail: Fail = (reason) => {
    throw new PackhorseError("corrupt", `${what} ${reason}`);
  };
  if (index.size > MOST_HEADER_BYTES) {
    return fail(`has ${index.size} bytes, at most ${MOST_HEADER_BYTES} are allowed`);
  }
  const json = parseJsonObject(await index.read(0, index.size), what);
  const { weight_map: fileOfTensor, metadata = {} } = json;
  if (!isStringRecord(fileOfTensor)) return fail("has no weight_map from tensors to files");
  if (!isObject(metadata)) return fail("has metadata that is not an object");

  const tensors = new Map<string, StoredTensor>();
  const unsupported = new Map<string, string>();
  for (const [shard, names] of Map.groupBy(Object.keys(fileOfTensor), (n) => fileOfTensor[n]!)) {
    if (!staysInFolder(shard)) {
      return fail(`names the file ${JSON.stringify(shard)}, which may lie outside its folder`);
    }
    const file = files.use(await InputFile.open(join(dirname(index.path), shard)));
    const contents = await readContents(file);
    for (const name of names) {
      const stored = contents.tensors.get(name);
      const word = contents.unsupported.get(name);
      if (stored) tensors.set(name, stored);
      else if (word !== undefined) unsupported.set(name, word);
      else return fail(`places tensor ${JSON.stringify(name)} in ${shard}, which lacks it`);
    }
  }
  const strings = Object.entries(metadata)
    .map(([name, value]) => [name, typeof value === "string" ? value : JSON.stringify(value)]);
  return { tensors, unsupported, metadata: Object.fromEntries(strings) };
}

/** Whether a file name of an index is relative and, links aside, leads into the index's folder. */
function staysInFolder(name: string): boolean {
  return !/[\\:\0]/.test(name) && name.split("/").every((part) => !["", ".", ".."].includes(part));
}
