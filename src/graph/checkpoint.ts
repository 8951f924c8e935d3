import { PackhorseError } from "../error.ts";
import { SafetensorsReader } from "../io/safetensors_reader.ts";
import { SafetensorsWriter } from "../io/safetensors_writer.ts";
import { parseJsonObject } from "../io/untrusted_json.ts";
import type { NamedValues, ParameterValues } from "./parameters.ts";

const FORMAT = "packhorse-graph-1";

/** What a file of a model holds beside its parameters: JSON values, and tensors that are lists. */
export interface CheckpointContent {
  /** What the model is made of. */
  readonly documents: Readonly<Record<string, unknown>>;
  readonly values: ParameterValues;
  /** Lists by name. */
  readonly lists?: Readonly<Record<string, Float32Array<ArrayBuffer>>> | undefined;
}

const bytesOf = ({ buffer, byteOffset, byteLength }: Float32Array<ArrayBuffer>) =>
  new Uint8Array(buffer, byteOffset, byteLength);

/** Writes a `.safetensors` file; it appears complete or not at all. */
export async function writeCheckpoint(
  path: string,
  names: readonly NamedValues[],
  { documents, values, lists = {} }: CheckpointContent,
): Promise<void> {
  const tensors = [
    ...names.map(({ name, of, shape }) => ({ name: `${of}.${name}`, shape })),
    ...Object.entries(lists).map(([name, list]) => ({ name, shape: [list.length] })),
  ].map((tensor) => ({ ...tensor, dtype: "f32" as const }));
  const metadata = {
    format: FORMAT,
    ...Object.fromEntries(
      Object.entries(documents).map(([name, value]) => [name, JSON.stringify(value)]),
    ),
  };
  using writer = await SafetensorsWriter.create(path, { tensors, metadata });
  for (const { name, of, shape: [rows, columns], start } of names) {
    const part = values[of].subarray(start, start + rows * columns);
    await writer.writeAt(`${of}.${name}`, bytesOf(part));
  }
  for (const [name, list] of Object.entries(lists)) await writer.writeAt(name, bytesOf(list));
  await writer.commit();
}

/** A file that {@linkcode writeCheckpoint} wrote. */
export class CheckpointReader implements Disposable {
  readonly #reader: SafetensorsReader;

  private constructor(reader: SafetensorsReader) {
    this.#reader = reader;
  }

  /** Throws as files do, and `corrupt` for another kind of file. */
  static async open(path: string): Promise<CheckpointReader> {
    const reader = await SafetensorsReader.open(path);
    if (reader.metadata.format === FORMAT) return new CheckpointReader(reader);
    reader[Symbol.dispose]();
    const message = `Cannot read ${path}: it holds no graph model (${FORMAT}) of Packhorse`;
    throw new PackhorseError("corrupt", message);
  }

  /** A JSON object by name, undefined if there is none. */
  document(name: string): Record<string, unknown> | undefined {
    const text = this.#reader.metadata[name];
    if (text === undefined) return undefined;
    return parseJsonObject(
      new TextEncoder().encode(text),
      `Cannot read ${this.#reader.path}: ${name}`,
    );
  }

  /** A JSON object that must be there. Throws `corrupt`. */
  require(name: string): Record<string, unknown> {
    return this.document(name) ?? this.refuse(`it has no ${name}`);
  }

  /** Whether it has a tensor. */
  has(name: string): boolean {
    return this.#reader.tensors.has(name);
  }

  /** Throws `corrupt` if the file does not have exactly the tensors of a model whose parameters have these names. */
  check(names: readonly NamedValues[]): void {
    for (const { name, of, shape } of names) this.#require(`${of}.${name}`, shape);
    const known = new Set(names.map(({ name, of }) => `${of}.${name}`));
    for (const name of this.#reader.tensors.keys()) {
      if (/^(parameters|state)\./.test(name) && !known.has(name)) {
        this.refuse(`its model has no place for tensor ${name}`);
      }
    }
  }

  /** The parameters of a model whose parameters have these names. Throws `corrupt` if they are others. */
  async values(
    names: readonly NamedValues[],
    lengths: { parameters: number; state: number },
  ): Promise<ParameterValues> {
    const values = {
      parameters: new Float32Array(lengths.parameters),
      state: new Float32Array(lengths.state),
    };
    for (const { name, of, shape, start } of names) {
      values[of].set(await this.#read(`${of}.${name}`, shape), start);
    }
    return values;
  }

  /** A list of so many elements. Throws `corrupt` if it has another number. */
  async list(name: string, length: number): Promise<Float32Array<ArrayBuffer>> {
    return await this.#read(name, [length]);
  }

  #require(name: string, shape: readonly number[]): void {
    const info = this.#reader.tensors.get(name) ?? this.refuse(`it has no tensor ${name}`);
    if (info.dtype === "f32" && String(info.shape) === String(shape)) return;
    const found = `[${info.shape.join(", ")}] of ${info.dtype}`;
    this.refuse(`tensor ${name} is ${found}, expected [${shape.join(", ")}] of f32`);
  }

  async #read(name: string, shape: readonly number[]): Promise<Float32Array<ArrayBuffer>> {
    this.#require(name, shape);
    const values = new Float32Array((await this.#reader.read(name)).buffer);
    const bad = values.findIndex((value) => !Number.isFinite(value));
    return bad < 0 ? values : this.refuse(`element ${bad} of tensor ${name} is ${values[bad]}`);
  }

  /** Throws `corrupt`. */
  refuse(reason: string): never {
    throw new PackhorseError("corrupt", `Cannot read ${this.#reader.path}: ${reason}`);
  }

  [Symbol.dispose](): void {
    this.#reader[Symbol.dispose]();
  }
}
