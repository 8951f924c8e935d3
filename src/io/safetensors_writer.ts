import { PackhorseError } from "../error.ts";
import { AtomicFile, type AtomicFileOptions } from "./atomic_file.ts";
import { byteLengthOf } from "./byte_length.ts";
import {
  dtypeWord,
  LENGTH_BYTES,
  METADATA,
  MOST_HEADER_BYTES,
  type TensorInfo,
} from "./safetensors_format.ts";
import { isCount } from "./untrusted_json.ts";

/** Options of {@linkcode SafetensorsWriter.create}. */
export interface SafetensorsWriterOptions extends AtomicFileOptions {
  /** The tensors to come, in the order of their data in the file. */
  readonly tensors: readonly Pick<TensorInfo, "name" | "dtype" | "shape">[];
  /** Goes into the header as `__metadata__`. */
  readonly metadata?: Readonly<Record<string, string>> | undefined;
}

interface PlannedTensor {
  readonly byteLength: number;
  /** Of its first byte in the file. */
  readonly position: number;
  readonly written: WrittenRanges;
}

/**
 * Writes a `.safetensors` file in slices, in any order. The file appears when
 * {@linkcode commit} finds it complete, and never otherwise.
 *
 * Tensors follow each other without padding, in the order given: put those of
 * wide types first if readers map the file.
 *
 * @example
 * ```ts
 * import { SafetensorsReader, SafetensorsWriter } from "@packhorse/packhorse/io";
 * import { assertEquals } from "@std/assert";
 *
 * const path = `${await Deno.makeTempDir()}/example.safetensors`;
 * {
 *   using writer = await SafetensorsWriter.create(path, {
 *     tensors: [{ name: "x", dtype: "u8", shape: [4] }],
 *     metadata: { model: "example" },
 *   });
 *   await writer.writeAt("x", Uint8Array.of(3, 4), 2);
 *   await writer.writeAt("x", Uint8Array.of(1, 2));
 *   await writer.commit();
 * }
 * using reader = await SafetensorsReader.open(path);
 * assertEquals(await reader.read("x"), Uint8Array.of(1, 2, 3, 4));
 * assertEquals(reader.metadata, { model: "example" });
 * ```
 */
export class SafetensorsWriter implements Disposable {
  readonly #file: AtomicFile;
  readonly #tensors: ReadonlyMap<string, PlannedTensor>;

  private constructor(file: AtomicFile, tensors: ReadonlyMap<string, PlannedTensor>) {
    this.#file = file;
    this.#tensors = tensors;
  }

  /**
   * Writes the header to a temporary file.
   *
   * Throws `invalid-argument` if two tensors share a name, a shape is not one, a
   * text is not Unicode, or the header exceeds 100 MB; otherwise as {@linkcode AtomicFile.create}.
   */
  static async create(path: string, options: SafetensorsWriterOptions): Promise<SafetensorsWriter> {
    const { header, tensors } = plan(path, options);
    const file = await AtomicFile.create(path, options);
    try {
      await file.write(header, 0);
    } catch (error) {
      file[Symbol.dispose]();
      throw error;
    }
    return new SafetensorsWriter(file, tensors);
  }

  /** Where the file will appear. */
  get path(): string {
    return this.#file.path;
  }

  /**
   * Writes `bytes` into a tensor, at `byteOffset`; they must not change until the
   * promise settles.
   *
   * Throws `not-found` if there is no such tensor, `invalid-argument` if the range
   * leaves it, otherwise as {@linkcode AtomicFile.write}.
   */
  async writeAt(name: string, bytes: Uint8Array, byteOffset = 0): Promise<void> {
    const tensor = this.#tensors.get(name);
    const what = `tensor ${JSON.stringify(name)} of ${this.path}`;
    if (!tensor) {
      throw new PackhorseError("not-found", `Cannot write ${what}: it was not given to create`);
    }
    const end = byteOffset + bytes.byteLength;
    if (!isCount(byteOffset) || end > tensor.byteLength) {
      const message = `Cannot write ${bytes.byteLength} bytes at ${byteOffset} of ${what}, ` +
        `which has ${tensor.byteLength}`;
      throw new PackhorseError("invalid-argument", message);
    }
    tensor.written.add(byteOffset, end);
    await this.#file.write(bytes, tensor.position + byteOffset);
  }

  /**
   * Gives the file its name.
   *
   * Throws `invalid-argument` if a byte of a tensor was never written, otherwise
   * as {@linkcode AtomicFile.commit}.
   */
  async commit(): Promise<void> {
    for (const [name, { written, byteLength }] of this.#tensors) {
      const end = written.endOfFirst();
      if (end < byteLength) {
        const message = `Cannot finish ${this.path}: tensor ${JSON.stringify(name)} has ` +
          `${byteLength} bytes, byte ${end} was never written`;
        throw new PackhorseError("invalid-argument", message);
      }
    }
    await this.#file.commit();
  }

  /** Removes the temporary file unless it was committed. */
  [Symbol.dispose](): void {
    this.#file[Symbol.dispose]();
  }
}

function plan(
  path: string,
  options: SafetensorsWriterOptions,
): { header: Uint8Array; tensors: Map<string, PlannedTensor> } {
  const fail = (reason: string): never => {
    throw new PackhorseError("invalid-argument", `Cannot write ${path}: ${reason}`);
  };
  // Member by member, since an object would move names like "0" to the front.
  const members: string[] = [];
  const add = (name: string, value: unknown) => {
    members.push(`${JSON.stringify(name)}:${JSON.stringify(value)}`);
  };
  const { metadata = {} } = options;
  for (const text of [...Object.entries(metadata).flat(), ...options.tensors.map((t) => t.name)]) {
    if (!text.isWellFormed()) fail(`${JSON.stringify(text)} is not Unicode text`);
  }
  if (options.metadata) add(METADATA, metadata);
  const ranges = new Map<string, { begin: number; end: number }>();
  let dataBytes = 0;
  for (const { name, dtype, shape } of options.tensors) {
    if (name === METADATA || ranges.has(name)) fail(`the name ${JSON.stringify(name)} is taken`);
    const byteLength = byteLengthOf(dtype, shape) ??
      fail(`tensor ${JSON.stringify(name)} cannot have the shape [${shape.join(", ")}]`);
    const range = { begin: dataBytes, end: dataBytes + byteLength };
    ranges.set(name, range);
    dataBytes = range.end;
    add(name, { dtype: dtypeWord(dtype), shape, data_offsets: [range.begin, range.end] });
  }
  if (!Number.isSafeInteger(dataBytes)) fail(`${dataBytes} bytes are too many`);

  const json = new TextEncoder().encode(`{${members.join(",")}}`);
  const header = new Uint8Array(Math.ceil((LENGTH_BYTES + json.byteLength) / 8) * 8);
  const headerBytes = header.byteLength - LENGTH_BYTES;
  if (headerBytes > MOST_HEADER_BYTES) {
    fail(`its header takes ${headerBytes} bytes, the format allows ${MOST_HEADER_BYTES}`);
  }
  new DataView(header.buffer).setBigUint64(0, BigInt(headerBytes), true);
  header.set(json, LENGTH_BYTES);
  header.fill(" ".charCodeAt(0), LENGTH_BYTES + json.byteLength);

  const tensors = new Map<string, PlannedTensor>();
  for (const [name, { begin, end }] of ranges) {
    const position = header.byteLength + begin;
    tensors.set(name, { byteLength: end - begin, position, written: new WrittenRanges() });
  }
  return { header, tensors };
}

/** A set of bytes, as sorted ranges that neither touch nor overlap. */
class WrittenRanges {
  #ranges: { begin: number; end: number }[] = [];

  add(begin: number, end: number): void {
    if (begin === end) return;
    // Ranges [first, last) touch the new one and melt into it.
    const reached = this.#ranges.findIndex((range) => range.end >= begin);
    const first = reached < 0 ? this.#ranges.length : reached;
    let last = first;
    while (last < this.#ranges.length && this.#ranges[last]!.begin <= end) last++;
    const touched = this.#ranges.slice(first, last);
    this.#ranges.splice(first, last - first, {
      begin: Math.min(begin, touched[0]?.begin ?? begin),
      end: Math.max(end, touched.at(-1)?.end ?? end),
    });
  }

  /** How far the bytes are complete from 0 on. */
  endOfFirst(): number {
    const range = this.#ranges[0];
    return range?.begin === 0 ? range.end : 0;
  }
}
