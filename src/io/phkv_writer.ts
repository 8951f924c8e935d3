import { PackhorseError } from "../error.ts";
import { AtomicFile, type AtomicFileOptions } from "./atomic_file.ts";
import { checksum } from "./checksum.ts";
import {
  blockLabel,
  decodeDescription,
  encodeDescription,
  encodeHeader,
  entryCount,
  type EntryTable,
  headerByteLength,
  type PhkvDescription,
  type PhkvLayer,
  type PhkvLayout,
  recordFlaw,
  tailByteLength,
  tailLabel,
} from "./phkv_format.ts";

/** Options of {@linkcode PhkvWriter.create}. */
export interface PhkvWriterOptions extends AtomicFileOptions {
  /** How the records store blocks. */
  readonly layout: PhkvLayout;
  /** What a reader needs to decode the records; must survive JSON. */
  readonly codec: object;
  /** The layers to come, in order. */
  readonly layers: readonly PhkvLayer[];
  /** Anything else worth keeping. */
  readonly metadata?: Readonly<Record<string, string>> | undefined;
}

/**
 * Writes a `.phkv` file: for each layer in order its blocks, in one call or
 * several, then its tail. The file appears when {@linkcode commit} finds it
 * complete, and never otherwise.
 *
 * @example
 * ```ts
 * import { PhkvReader, PhkvWriter } from "@packhorse/packhorse/io";
 * import { assertEquals } from "@std/assert";
 *
 * const path = `${await Deno.makeTempDir()}/example.phkv`;
 * const record = new Uint8Array(16);
 * record[0] = record.byteLength;
 * {
 *   using writer = await PhkvWriter.create(path, {
 *     layout: "packs",
 *     codec: { quantizer: "packkv" },
 *     layers: [{
 *       layer: "layers.0",
 *       keyName: "layers.0.key",
 *       valueName: "layers.0.value",
 *       dtype: "f16",
 *       heads: 1,
 *       tokens: 65,
 *       headDim: 16,
 *       blocks: 1,
 *     }],
 *   });
 *   await writer.appendBlocks(0, record, [0, 16]);
 *   await writer.writeTail(0, new Uint8Array(2 * 16 * 2)); // keys and values of one token
 *   await writer.commit();
 * }
 * using reader = await PhkvReader.open(path);
 * assertEquals((await reader.readBlocks(0)).records, record);
 * ```
 */
export class PhkvWriter implements Disposable {
  readonly #file: AtomicFile;
  readonly #json: Uint8Array;
  readonly #description: PhkvDescription;
  readonly #table: EntryTable;
  /** Where the next entry goes: in the table, among the layers, and in the file. */
  #entry = 0;
  #layerIndex = 0;
  #block = 0;
  #position: number;

  private constructor(file: AtomicFile, json: Uint8Array, description: PhkvDescription) {
    const entries = entryCount(description.layers);
    this.#file = file;
    this.#json = json;
    this.#description = description;
    this.#table = {
      byteLengths: new Float64Array(entries),
      checksums: new Uint32Array(entries),
    };
    this.#position = headerByteLength(json.byteLength, entries);
  }

  /**
   * Opens a temporary file; nothing of it is final before {@linkcode commit}.
   *
   * Throws `invalid-argument` if the options describe no valid file, otherwise as
   * {@linkcode AtomicFile.create}.
   */
  static async create(path: string, options: PhkvWriterOptions): Promise<PhkvWriter> {
    const { layout, codec, layers, metadata = {} } = options;
    let json: Uint8Array;
    let description: PhkvDescription;
    try {
      // The reader's own checks, so that no file is written that cannot be read. They also drop what
      // the format does not have, such as the sizes in a reader's layers.
      const given = encodeDescription({ layout, codec, layers, metadata });
      description = decodeDescription(given, `Cannot write ${path}: its header`);
      json = encodeDescription(description);
      headerByteLength(json.byteLength, entryCount(description.layers));
    } catch (cause) {
      const message = cause instanceof PackhorseError
        ? cause.message
        : `Cannot write ${path}: its header does not fit into JSON: ${cause}`;
      throw new PackhorseError("invalid-argument", message, { cause });
    }
    return new PhkvWriter(await AtomicFile.create(path, options), json, description);
  }

  /** Where the file will appear. */
  get path(): string {
    return this.#file.path;
  }

  /**
   * Appends the records of a layer's next blocks. They lie one after another in
   * `records`, block `i` from `offsets[i]` to `offsets[i + 1]`, and must not change
   * until the promise settles.
   *
   * Throws `invalid-argument` if another entry is due, or if offsets or records are
   * not what the layout allows; otherwise as {@linkcode AtomicFile.write}.
   */
  async appendBlocks(
    layerIndex: number,
    records: Uint8Array,
    offsets: BigUint64Array | readonly number[],
  ): Promise<void> {
    const bounds = Array.from(offsets, Number);
    const count = bounds.length - 1;
    const layer = this.#checkDue(layerIndex);
    if (count < 0 || count > layer.blocks - this.#block) {
      this.#refuse(`${layer.layer} awaits ${layer.blocks - this.#block} blocks, not ${count}`);
    }
    if (bounds[0] !== 0 || bounds.at(-1) !== records.byteLength) {
      const range = `${bounds[0]} to ${bounds.at(-1)}`;
      this.#refuse(`offsets go from ${range}, but the records from 0 to ${records.byteLength}`);
    }
    const blocks = bounds.slice(1).map((end, i) => records.subarray(bounds[i], end));
    blocks.forEach((record, i) => {
      const flaw = bounds[i + 1]! < bounds[i]!
        ? "ends before it begins"
        : recordFlaw(this.#description.layout, record.byteLength);
      if (flaw) this.#refuse(`${blockLabel(layer, this.#block + i)} ${flaw}`);
    });
    for (const record of blocks) this.#enter(record);
    this.#block += count;
    await this.#append(records);
  }

  /**
   * Writes a layer's tail, when its blocks are complete: the remaining tokens of
   * the keys `[heads, tokens - 64 * blocks, headDim]`, then of the values. Due for
   * every layer, with no bytes if there are no such tokens.
   *
   * Throws `invalid-argument` if another entry is due or the length is wrong,
   * otherwise as {@linkcode AtomicFile.write}.
   */
  async writeTail(layerIndex: number, bytes: Uint8Array): Promise<void> {
    const layer = this.#checkDue(layerIndex);
    if (this.#block < layer.blocks) this.#refuse(`${this.#due()} comes before the tail`);
    if (bytes.byteLength !== tailByteLength(layer)) {
      this.#refuse(
        `${tailLabel(layer)} takes ${tailByteLength(layer)} bytes, got ${bytes.byteLength}`,
      );
    }
    this.#enter(bytes);
    this.#layerIndex++;
    this.#block = 0;
    await this.#append(bytes);
  }

  /**
   * Writes the header, at both ends, and gives the file its name.
   *
   * Throws `invalid-argument` if an entry is missing, otherwise as
   * {@linkcode AtomicFile.commit}.
   */
  async commit(): Promise<void> {
    const missing = this.#due();
    if (missing) this.#refuse(`${missing} was not written`);
    const header = encodeHeader(this.#json, this.#table);
    await this.#file.write(header, 0);
    await this.#file.write(header, this.#position);
    await this.#file.commit();
  }

  /** Removes the temporary file unless it was committed. */
  [Symbol.dispose](): void {
    this.#file[Symbol.dispose]();
  }

  /** Which entry comes next, or undefined after the last. */
  #due(): string | undefined {
    const layer = this.#description.layers[this.#layerIndex];
    if (!layer) return undefined;
    return this.#block < layer.blocks ? blockLabel(layer, this.#block) : tailLabel(layer);
  }

  /** The layer, if it is its turn. */
  #checkDue(layerIndex: number): PhkvLayer {
    const layer = this.#description.layers[layerIndex];
    if (!layer) this.#refuse(`there is no layer ${layerIndex}`);
    if (layerIndex !== this.#layerIndex) {
      this.#refuse(`it is not the turn of ${layer.layer}, next is ${this.#due() ?? "commit"}`);
    }
    return layer;
  }

  #enter(entry: Uint8Array): void {
    this.#table.byteLengths[this.#entry] = entry.byteLength;
    this.#table.checksums[this.#entry] = checksum(entry);
    this.#entry++;
  }

  async #append(bytes: Uint8Array): Promise<void> {
    const position = this.#position;
    this.#position += bytes.byteLength;
    await this.#file.write(bytes, position);
  }

  #refuse(reason: string): never {
    throw new PackhorseError("invalid-argument", `Cannot write ${this.path}: ${reason}`);
  }
}
