import { PackhorseError } from "../error.ts";
import { checksum } from "./checksum.ts";
import { InputFile } from "./input_file.ts";
import {
  blockLabel,
  decodeHeader,
  decodePrefix,
  decodeSuffix,
  type Header,
  hex,
  MAGIC,
  type PhkvLayer,
  type PhkvLayout,
  PREFIX_BYTES,
  startsWith,
  SUFFIX_BYTES,
  tailLabel,
} from "./phkv_format.ts";
import { isCount } from "./untrusted_json.ts";

/** Options of {@linkcode PhkvReader.open}. */
export interface PhkvReaderOptions {
  /** Read what is intact of a damaged file instead of refusing it. Default: false. */
  readonly recover?: boolean | undefined;
}

/** A layer of a `.phkv` file, and the room it takes there. */
export interface PhkvStoredLayer extends PhkvLayer {
  /** Bytes of the records of all its blocks. */
  readonly recordsByteLength: number;
  /** Bytes of its tail. */
  readonly tailByteLength: number;
}

/** Records of consecutive blocks. */
export interface PhkvBlocks {
  /** The records, one after another. */
  readonly records: Uint8Array<ArrayBuffer>;
  /** Record `i` goes from `offsets[i]` to `offsets[i + 1]`; a lost one has no bytes. */
  readonly offsets: BigUint64Array<ArrayBuffer>;
  /** Numbers, within the layer, of the blocks that are damaged. Empty unless recovering. */
  readonly lost: readonly number[];
}

/**
 * Reads a `.phkv` file block by block, without loading it, and checks every
 * checksum on the way. The file is untrusted: its header is validated before
 * anything in it is used.
 *
 * @example
 * ```ts
 * import { PhkvReader, PhkvWriter } from "@packhorse/packhorse/io";
 * import { assertEquals } from "@std/assert";
 *
 * const path = `${await Deno.makeTempDir()}/example.phkv`;
 * const shape = { dtype: "f16", heads: 1, tokens: 128, headDim: 16, blocks: 2 } as const;
 * {
 *   using writer = await PhkvWriter.create(path, {
 *     layout: "packs",
 *     codec: {},
 *     layers: [{ layer: "layers.0", keyName: "k", valueName: "v", ...shape }],
 *   });
 *   await writer.appendBlocks(0, new Uint8Array(48), [0, 16, 48]);
 *   await writer.writeTail(0, new Uint8Array());
 *   await writer.commit();
 * }
 *
 * // Damage the first block, and get the other back.
 * const bytes = await Deno.readFile(path);
 * using intact = await PhkvReader.open(path);
 * bytes[intact.headerByteLength]! ^= 1;
 * await Deno.writeFile(path, bytes);
 * using reader = await PhkvReader.open(path, { recover: true });
 * const { offsets, lost } = await reader.readBlocks(0);
 * assertEquals(offsets, BigUint64Array.of(0n, 0n, 32n));
 * assertEquals(lost, [0]);
 * ```
 */
export class PhkvReader implements Disposable {
  /** The file. */
  readonly path: string;
  /** Bytes of the file. */
  readonly byteLength: number;
  /** Bytes of its header, of which it holds two copies. */
  readonly headerByteLength: number;
  /** How the records store blocks. */
  readonly layout: PhkvLayout;
  /** What decodes the records, as the writer got it. Not checked here. */
  readonly codec: Readonly<Record<string, unknown>>;
  /** The layers, in the order of their data. */
  readonly layers: readonly PhkvStoredLayer[];
  /** As the writer got it. */
  readonly metadata: Readonly<Record<string, string>>;
  /** What recovering found wrong with the header, its copy and the length, as sentences. */
  readonly damage: readonly string[];
  readonly #file: InputFile;
  readonly #recover: boolean;
  readonly #checksums: Uint32Array;
  /** Where each entry begins in the file, and where the last ends. */
  readonly #positions: Float64Array;
  /** Of each layer, its first block's entry. */
  readonly #firstEntry: readonly number[];

  private constructor(
    file: InputFile,
    { bytes, description, table }: Header,
    damage: readonly string[],
    recover: boolean,
  ) {
    this.path = file.path;
    this.byteLength = file.size;
    this.headerByteLength = bytes.byteLength;
    this.layout = description.layout;
    this.codec = description.codec;
    this.metadata = description.metadata;
    this.damage = damage;
    this.#file = file;
    this.#recover = recover;
    this.#checksums = table.checksums;
    this.#positions = entryPositions(bytes.byteLength, table.byteLengths);

    const firstEntry: number[] = [];
    let entry = 0;
    this.layers = description.layers.map((layer) => {
      const [first, tail] = [entry, entry + layer.blocks];
      firstEntry.push(first);
      entry = tail + 1;
      return {
        ...layer,
        recordsByteLength: this.#positions[tail]! - this.#positions[first]!,
        tailByteLength: table.byteLengths[tail]!,
      };
    });
    this.#firstEntry = firstEntry;
  }

  /**
   * Reads and checks the header, its copy and the file's length.
   *
   * When recovering, one intact header suffices and the file may be too short;
   * {@linkcode damage} says what is wrong.
   *
   * Throws `not-found` or `io` if the file cannot be opened, `newer-version` if a
   * later version of the format wrote it, `truncated` if it is too short, `corrupt`
   * if it is damaged otherwise.
   */
  static async open(path: string, options: PhkvReaderOptions = {}): Promise<PhkvReader> {
    const { recover = false } = options;
    using stack = new DisposableStack();
    const file = stack.use(await InputFile.open(path));
    const damage: string[] = [];
    const header = recover ? await recoverHeader(file, damage) : await readHeader(file);
    const flaw = await findDamage(file, header);
    if (flaw && !recover) throw flaw;
    if (flaw) damage.push(flaw.message);
    stack.move();
    return new PhkvReader(file, header, damage, recover);
  }

  /**
   * Reads the records of `count` blocks of a layer; by default of all from `firstBlock` on.
   *
   * Throws `invalid-argument` if there are no such blocks, `corrupt` for a damaged
   * one (unless recovering: then it is listed as lost), `io` or `truncated` if the
   * file fails, `out-of-memory`, `disposed` after disposal.
   */
  async readBlocks(layerIndex: number, firstBlock = 0, count?: number): Promise<PhkvBlocks> {
    const layer = this.#layer(layerIndex);
    count ??= layer.blocks - firstBlock;
    if (!isCount(firstBlock) || !isCount(count) || firstBlock + count > layer.blocks) {
      const message = `Cannot read ${count} blocks from ${firstBlock} of ${layer.layer} of ` +
        `${this.path}, which has ${layer.blocks}`;
      throw new PackhorseError("invalid-argument", message);
    }
    const first = this.#firstEntry[layerIndex]! + firstBlock;
    const bytes = await this.#readEntries(first, first + count);
    const offsets = new BigUint64Array(count + 1);
    const lost: number[] = [];
    let kept = 0;
    for (let i = 0; i < count; i++) {
      const begin = this.#positions[first + i]! - this.#positions[first]!;
      const end = this.#positions[first + i + 1]! - this.#positions[first]!;
      const record = bytes.subarray(begin, end);
      if (this.#isIntact(record, first + i, () => blockLabel(layer, firstBlock + i))) {
        if (kept !== begin) bytes.copyWithin(kept, begin, end);
        kept += record.byteLength;
      } else {
        lost.push(firstBlock + i);
      }
      offsets[i + 1] = BigInt(kept);
    }
    return { records: bytes.subarray(0, kept), offsets, lost };
  }

  /**
   * Reads a layer's tail: the tokens after its blocks, of the keys
   * `[heads, tokens - 64 * blocks, headDim]`, then of the values likewise.
   *
   * Returns null if it is damaged and the reader recovers. Throws as
   * {@linkcode readBlocks}.
   */
  async readTail(layerIndex: number): Promise<Uint8Array<ArrayBuffer> | null> {
    const layer = this.#layer(layerIndex);
    const entry = this.#firstEntry[layerIndex]! + layer.blocks;
    const bytes = await this.#readEntries(entry, entry + 1);
    return this.#isIntact(bytes, entry, () => tailLabel(layer)) ? bytes : null;
  }

  /** Closes the file. */
  [Symbol.dispose](): void {
    this.#file[Symbol.dispose]();
  }

  #layer(layerIndex: number): PhkvStoredLayer {
    const layer = this.layers[layerIndex];
    if (layer) return layer;
    const message =
      `Cannot read layer ${layerIndex} of ${this.path}, which has ${this.layers.length}`;
    throw new PackhorseError("invalid-argument", message);
  }

  /** The bytes of entries [first, last), as far as the file goes. */
  async #readEntries(first: number, last: number): Promise<Uint8Array<ArrayBuffer>> {
    const begin = Math.min(this.#positions[first]!, this.#file.size);
    const end = Math.min(this.#positions[last]!, this.#file.size);
    return await this.#file.read(begin, end - begin);
  }

  /** Whether an entry is what was written; throws if not, unless recovering. */
  #isIntact(content: Uint8Array, entry: number, label: () => string): boolean {
    const byteLength = this.#positions[entry + 1]! - this.#positions[entry]!;
    const [actual, expected] = [checksum(content), this.#checksums[entry]!];
    if (content.byteLength === byteLength && actual === expected) return true;
    if (this.#recover) return false;
    const message = `Cannot read ${this.path}: ${label()} is damaged: its checksum is ` +
      `${hex(actual)}, expected ${hex(expected)}`;
    throw new PackhorseError("corrupt", message);
  }
}

function entryPositions(start: number, byteLengths: Float64Array): Float64Array {
  const positions = new Float64Array(byteLengths.length + 1);
  positions[0] = start;
  byteLengths.forEach((bytes, i) => positions[i + 1] = positions[i]! + bytes);
  return positions;
}

/** The header at the start of the file. */
async function readHeader(file: InputFile): Promise<Header> {
  const what = `Cannot read ${file.path}: its header`;
  const prefix = await file.read(0, Math.min(file.size, PREFIX_BYTES));
  if (!startsWith(prefix, MAGIC)) {
    const message =
      `Cannot read ${file.path}: it is not a .phkv file, or its first bytes are damaged`;
    throw new PackhorseError("corrupt", message);
  }
  const bytes = prefix.byteLength < PREFIX_BYTES ? PREFIX_BYTES : decodePrefix(prefix, what);
  if (bytes > file.size) {
    const message = `${what} takes ${bytes} bytes, the file has ${file.size}: it is truncated`;
    throw new PackhorseError("truncated", message);
  }
  return decodeHeader(await file.read(0, bytes), what);
}

/** The copy of the header at the end of the file. */
async function readHeaderCopy(file: InputFile): Promise<Header> {
  const what = `Cannot read ${file.path}: the copy of its header`;
  const suffix = await file.read(
    Math.max(0, file.size - SUFFIX_BYTES),
    Math.min(file.size, SUFFIX_BYTES),
  );
  const bytes = suffix.byteLength < SUFFIX_BYTES ? SUFFIX_BYTES : decodeSuffix(suffix, what);
  if (bytes > file.size) {
    const message = `${what} takes ${bytes} bytes, the file has ${file.size}: it is truncated`;
    throw new PackhorseError("truncated", message);
  }
  return decodeHeader(await file.read(file.size - bytes, bytes), what);
}

/** Whichever header is intact; if it is the copy, `damage` gets what is wrong with the first. */
async function recoverHeader(file: InputFile, damage: string[]): Promise<Header> {
  try {
    return await readHeader(file);
  } catch (error) {
    if (!(error instanceof PackhorseError)) throw error;
    damage.push(error.message);
    return await readHeaderCopy(file).catch((copyError) => {
      if (error.code === "newer-version") throw error;
      const message = `${error.message}; the copy of its header at its end is not intact either`;
      throw new PackhorseError(error.code, message, { cause: copyError });
    });
  }
}

/** What is wrong with the file's length, or with the copy of the header. */
async function findDamage(
  file: InputFile,
  { bytes: header, table }: Header,
): Promise<PackhorseError | undefined> {
  const dataEnd = entryPositions(header.byteLength, table.byteLengths).at(-1)!;
  const expected = dataEnd + header.byteLength;
  if (file.size !== expected) {
    const [code, flaw] = file.size < expected
      ? ["truncated", "it is truncated"] as const
      : ["corrupt", `${file.size - expected} are too many`] as const;
    const message =
      `Cannot read ${file.path}: it takes ${expected} bytes, the file has ${file.size}: ${flaw}`;
    return new PackhorseError(code, message);
  }
  const copy = await file.read(dataEnd, header.byteLength);
  const difference = copy.findIndex((byte, i) => byte !== header[i]);
  if (difference < 0) return undefined;
  const message =
    `Cannot read ${file.path}: the copy of its header at the end of the file is damaged ` +
    `(byte ${dataEnd + difference} of the file)`;
  return new PackhorseError("corrupt", message);
}
