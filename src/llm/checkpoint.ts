import { stat } from "node:fs/promises";
import type { Device } from "../device/device.ts";
import type { DeviceBuffer } from "../device/device_buffer.ts";
import { BYTES_PER_ELEMENT, type DType, elementCount } from "../dtype.ts";
import { PackhorseError } from "../error.ts";
import { SafetensorsReader } from "../io/safetensors_reader.ts";
import { convertFloats, type FloatDType, isFloatDType } from "../float_conversion.ts";

/** Type of the weights of a {@linkcode LanguageModel}. */
export type WeightDType = FloatDType;

/** How much of a tensor is in host memory at a time. */
const CHUNK_ELEMENTS = 2 ** 24;

const ONE_FILE = "model.safetensors";
const INDEX = "model.safetensors.index.json";

/** A matrix or a vector that a model needs, by its name in the checkpoint. */
export interface WeightSpec {
  readonly name: string;
  readonly shape: readonly number[];
}

/** The weights of a Hugging Face folder: `model.safetensors`, or the shards that its index names. */
export class Checkpoint implements Disposable {
  readonly folder: string;
  readonly #reader: SafetensorsReader;

  private constructor(folder: string, reader: SafetensorsReader) {
    this.folder = folder;
    this.#reader = reader;
  }

  /**
   * Opens the files and checks their headers. No other file of the folder is looked at.
   *
   * Throws `not-found` if there is neither a file nor an index, or a shard is missing; else as
   * {@linkcode SafetensorsReader.open}.
   */
  static async open(folder: string): Promise<Checkpoint> {
    for (const name of [ONE_FILE, INDEX]) {
      const path = `${folder}/${name}`;
      if (await isThere(path)) return new Checkpoint(folder, await SafetensorsReader.open(path));
    }
    throw new PackhorseError(
      "not-found",
      `Cannot load the model in ${folder}: it has neither ${ONE_FILE} nor ${INDEX}; ` +
        "convert weights of another format to safetensors",
    );
  }

  /**
   * Checks that the tensors of `specs` are all there, in their shape and a type that can be used, and no others, except
   * those that `isKnown` says may be there unused.
   *
   * Throws `corrupt` naming the tensor that is missing or has another shape, `unsupported` naming one that the model
   * has no place for, or of a type that is not F32, F16 or BF16.
   */
  check(specs: readonly WeightSpec[], isKnown: (name: string) => boolean): void {
    const { tensors, unsupported, path } = this.#reader;
    for (const { name, shape } of specs) {
      const info = tensors.get(name);
      const tensor = `tensor ${JSON.stringify(name)}`;
      if (info === undefined) {
        const word = unsupported.get(name);
        if (word !== undefined) refuseType(path, tensor, word);
        throw new PackhorseError("corrupt", `Cannot load ${path}: it has no ${tensor}`);
      }
      if (!isFloatDType(info.dtype)) refuseType(path, tensor, info.dtype.toUpperCase());
      if (info.shape.length !== shape.length || info.shape.some((size, i) => size !== shape[i])) {
        throw new PackhorseError(
          "corrupt",
          `Cannot load ${path}: ${tensor} is [${
            info.shape.join(", ")
          }], but config.json makes it ` +
            `[${shape.join(", ")}]`,
        );
      }
    }
    const wanted = new Set(specs.map(({ name }) => name));
    for (const name of [...tensors.keys(), ...unsupported.keys()]) {
      if (wanted.has(name) || isKnown(name)) continue;
      throw new PackhorseError(
        "unsupported",
        `Cannot load ${path}: a model as config.json describes it has no place for tensor ` +
          JSON.stringify(name),
      );
    }
  }

  /** The type that a tensor has in its file. */
  dtypeOf(name: string): FloatDType {
    return this.#reader.info(name).dtype as FloatDType;
  }

  /**
   * Copies a tensor to `target`, which has as many elements, converting them to its type on the way; at most 64 MiB of
   * it are in host memory at once.
   *
   * Throws as {@linkcode SafetensorsReader.readInto}, and the signal's reason.
   */
  async load(
    name: string,
    target: DeviceBuffer<FloatDType>,
    signal?: AbortSignal,
  ): Promise<void> {
    const { shape } = this.#reader.info(name);
    const dtype = this.dtypeOf(name);
    const elements = elementCount(shape);
    const bytesPerElement = BYTES_PER_ELEMENT[dtype];
    const bytes = new Uint8Array(Math.min(elements, CHUNK_ELEMENTS) * bytesPerElement);
    for (let first = 0; first < elements; first += CHUNK_ELEMENTS) {
      signal?.throwIfAborted();
      const count = Math.min(elements - first, CHUNK_ELEMENTS);
      const chunk = bytes.subarray(0, count * bytesPerElement);
      await this.#reader.readInto(name, chunk, first * bytesPerElement);
      const converted = convertFloats(chunk, { from: dtype, to: target.dtype });
      await target.view(first, count).uploadAsync(converted);
    }
  }

  /** Closes the files. */
  [Symbol.dispose](): void {
    this.#reader[Symbol.dispose]();
  }
}

/** What a weight becomes on a device: on the CPU f32; on a GPU as it is, or bf16 for f32, unless another type is asked for. */
export function weightDType(
  device: Device,
  stored: FloatDType,
  asked: WeightDType | undefined,
): FloatDType {
  if (asked !== undefined) return asked;
  if (device.backend === "cpu") return "f32";
  return stored === "f32" ? "bf16" : stored;
}

async function isThere(path: string): Promise<boolean> {
  try {
    await stat(path);
    return true;
  } catch (error) {
    if (error instanceof Error && "code" in error && error.code === "ENOENT") return false;
    return true; // opening it says what is wrong
  }
}

function refuseType(path: string, tensor: string, word: DType | string): never {
  throw new PackhorseError(
    "unsupported",
    `Cannot load ${path}: ${tensor} is of type ${word}; weights must be F32, F16 or BF16`,
  );
}
