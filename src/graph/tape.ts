import type { NativeDevice } from "../../ffi/device.ts";
import * as native from "../../ffi/graph.ts";
import type { NativeTensor } from "../../ffi/tensor.ts";
import { type Device, nativeOf } from "../device/device.ts";
import { type DeviceBuffer, regionOn } from "../device/device_buffer.ts";
import { PackhorseError } from "../error.ts";
import { Random } from "./random.ts";

/** What tensors start at multiples of, in elements: 16 bytes are needed, 64 suit processors. */
const ALIGNMENT = 16;

/** Values of which {@linkcode Tape.filled} keeps runs, before it begins anew. */
const MOST_RUNS = 16;

/** Indices on the device. */
export interface Indices extends NativeTensor {
  readonly length: number;
}

/** Arrays of the host by name. */
type HostArrays = Readonly<Record<string, Int32Array | Float32Array>>;

/** The same on the device. */
type Uploaded<Arrays> = { readonly [Name in keyof Arrays]: Indices };

/** A matrix of float32 on the device, and its gradient if it has one. It lives until its tape begins the next step. */
export class Tensor {
  readonly rows: number;
  readonly columns: number;
  /** Where it is. */
  readonly place: NativeTensor;
  /** Whether gradients are computed for it. */
  readonly needsGradient: boolean;
  /** Where its gradient is, once there is one. */
  gradient: NativeTensor | undefined;
  /** Whether the gradient holds something, to which more is added. */
  hasGradient: boolean;

  constructor(
    place: NativeTensor,
    { rows, columns }: { readonly rows: number; readonly columns: number },
    gradient: { readonly needed: boolean; readonly place?: NativeTensor } = { needed: false },
  ) {
    this.rows = rows;
    this.columns = columns;
    this.place = place;
    this.needsGradient = gradient.needed;
    this.gradient = gradient.place;
    this.hasGradient = gradient.place !== undefined;
  }

  /** Number of elements. */
  get count(): number {
    return this.rows * this.columns;
  }
}

/** Where an operation writes a gradient. */
export interface GradientTarget {
  readonly place: NativeTensor;
  /** Whether it adds to what is there. */
  readonly accumulate: boolean;
}

/**
 * Device memory that is handed out piece by piece and taken back all at once. Once a step found enough, later ones
 * allocate nothing.
 */
class Arena implements Disposable {
  readonly #device: Device;
  #chunks: DeviceBuffer<"f32">[] = [];
  /** Elements in use of the last chunk, and of those before it. */
  #used = 0;
  #usedBefore = 0;

  constructor(device: Device) {
    this.#device = device;
  }

  /** Bytes that it holds. */
  get byteLength(): number {
    return this.#chunks.reduce((sum, chunk) => sum + chunk.byteLength, 0);
  }

  /** Bytes of them that were handed out. */
  get usedByteLength(): number {
    return 4 * (this.#usedBefore + this.#used);
  }

  /** Room for so many elements of 4 bytes. */
  take(count: number): NativeTensor & { readonly view: () => DeviceBuffer<"f32"> } {
    const length = Math.max(ALIGNMENT, Math.ceil(count / ALIGNMENT) * ALIGNMENT);
    let chunk = this.#chunks.at(-1);
    if (chunk === undefined || this.#used + length > chunk.length) {
      chunk = this.#device.createBuffer("f32", Math.max(length, 2 * (chunk?.length ?? 2 ** 18)));
      this.#chunks.push(chunk);
      this.#usedBefore += this.#used;
      this.#used = 0;
    }
    const start = this.#used;
    this.#used += length;
    const { buffer } = regionOn(chunk, this.#device);
    return { buffer, byteOffset: 4 * start, view: () => chunk.view(start, count) };
  }

  /** Elements that {@linkcode take} handed out, as a buffer. */
  viewOf({ buffer, byteOffset }: NativeTensor, count: number): DeviceBuffer<"f32"> {
    const chunk = this.#chunks.find((chunk) => regionOn(chunk, this.#device).buffer === buffer);
    if (chunk) return chunk.view(byteOffset / 4, count);
    throw new PackhorseError("internal", "The tensor is none of this step's");
  }

  /** Takes everything back; several chunks become one that has room for as much, and a quarter more. */
  reset(): void {
    const length = Math.ceil(1.25 * (this.#usedBefore + this.#used));
    [this.#used, this.#usedBefore] = [0, 0];
    if (this.#chunks.length <= 1) return;
    this[Symbol.dispose]();
    this.#chunks = [this.#device.createBuffer("f32", length)];
  }

  [Symbol.dispose](): void {
    for (const chunk of this.#chunks) chunk[Symbol.dispose]();
    this.#chunks = [];
  }
}

/** Options of {@linkcode Tape.begin}. */
export interface StepOptions {
  /** Whether gradients will be asked for, and normalisation and dropout behave as while training. Default: false. */
  readonly training?: boolean | undefined;
  /** What dropout follows from. Default: 0. */
  readonly seed?: number | undefined;
}

/**
 * Records what a step computes, and goes back over it for the gradients (reverse mode). Tensors stay on the device; a step
 * takes its memory from an arena, which is free again when the next one begins.
 *
 * Operations are functions of a tape and tensors: see `operations.ts`.
 */
export class Tape implements Disposable {
  readonly device: Device;
  readonly #native: NativeDevice;
  readonly #arena: Arena;
  readonly #records: { readonly out: Tensor; readonly backward: (dy: NativeTensor) => void }[] = [];
  readonly #one: DeviceBuffer<"f32">;
  readonly #kept: Disposable[] = [];
  /** Runs of one value each, which stay from step to step. */
  readonly #runs = new Map<number, DeviceBuffer<"f32">>();
  #staging = new Uint32Array(2 ** 14);
  #random = new Random(0);
  #training = false;

  constructor(device: Device) {
    this.device = device;
    this.#native = nativeOf(device);
    this.#arena = new Arena(device);
    this.#one = device.createBuffer("f32", 1);
    this.#one.upload(Float32Array.of(1));
  }

  /** Whether the step trains. */
  get training(): boolean {
    return this.#training;
  }

  /** Bytes of device memory that it holds. */
  get byteLength(): number {
    const runs = this.#runs.values().reduce((sum, run) => sum + run.byteLength, 0);
    return this.#arena.byteLength + this.#one.byteLength + runs;
  }

  /** Bytes of it that the step has taken so far. */
  get usedByteLength(): number {
    return this.#arena.usedByteLength;
  }

  /** The native side of the device, for operations. */
  get native(): NativeDevice {
    void this.#native.handle; // throws once disposed
    return this.#native;
  }

  /** Begins a step: tensors of the one before must not be used any more. */
  begin(options: StepOptions = {}): void {
    const { training = false, seed = 0 } = options;
    this.#training = training;
    this.#random = new Random(seed, "step");
    this.#records.length = 0;
    this.#release();
    this.#arena.reset();
    if (this.#runs.size > MOST_RUNS) this.#releaseRuns();
  }

  /** A number of 64 bits, another at each call of a step. */
  nextSeed(): bigint {
    return BigInt(this.#random.word()) << 32n | BigInt(this.#random.word());
  }

  /** Room for so many elements of 4 bytes, until the next step. */
  take(count: number): NativeTensor {
    return this.#arena.take(count);
  }

  /** What {@linkcode take} handed out, as a buffer, for other parts of the library. */
  viewOf(place: NativeTensor, count: number): DeviceBuffer<"f32"> {
    return this.#arena.viewOf(place, count);
  }

  /** Disposes something when the step's tensors end. */
  keep<Resource extends Disposable>(resource: Resource): Resource {
    this.#kept.push(resource);
    return resource;
  }

  #release(): void {
    for (const resource of this.#kept.splice(0)) resource[Symbol.dispose]();
  }

  #releaseRuns(): void {
    for (const run of this.#runs.values()) run[Symbol.dispose]();
    this.#runs.clear();
  }

  /** An output, not yet written, of an operation on `inputs`. */
  create(rows: number, columns: number, inputs: readonly Tensor[]): Tensor {
    const needed = this.#training && inputs.some(({ needsGradient }) => needsGradient);
    return new Tensor(this.take(rows * columns), { rows, columns }, { needed });
  }

  /** Remembers how the gradients of an operation's inputs follow from the one of its output. */
  record(out: Tensor, backward: (dy: NativeTensor) => void): void {
    if (out.needsGradient) this.#records.push({ out, backward });
  }

  /** Where to write a gradient of a tensor; undefined if it needs none. The caller writes, or adds, all of it. */
  target(tensor: Tensor): GradientTarget | undefined {
    if (!tensor.needsGradient) return undefined;
    tensor.gradient ??= this.take(tensor.count);
    const accumulate = tensor.hasGradient;
    tensor.hasGradient = true;
    return { place: tensor.gradient, accumulate };
  }

  /**
   * Computes the gradients of a loss `[1, 1]` with respect to all that it was computed from; or, for an output of any
   * shape, those of a loss whose gradient with respect to the output is given.
   */
  backward(out: Tensor, gradient?: Tensor): void {
    const { rows, columns } = gradient ?? { rows: 1, columns: 1 };
    if (out.rows !== rows || out.columns !== columns) {
      const message = `Cannot go back from a tensor [${out.rows}, ${out.columns}]: ` +
        (gradient ? `its gradient is [${rows}, ${columns}]` : "a loss has one element");
      throw new PackhorseError("invalid-argument", message);
    }
    const target = this.target(out);
    if (target === undefined) return;
    const x = gradient?.place ?? regionOn(this.#one, this.device);
    const { place, accumulate } = target;
    native.combine(this.#native, {
      ...{ alpha: 1, x, out: place, count: out.count },
      ...(accumulate ? { beta: 1, y: place } : {}),
    });
    for (const { out, backward } of this.#records.reverse()) {
      if (out.hasGradient) backward(out.gradient!);
    }
    this.#records.length = 0;
  }

  /** Copies arrays to the device, in one go. */
  upload<Arrays extends HostArrays>(arrays: Arrays): Uploaded<Arrays> {
    return this.uploadAll([arrays])[0];
  }

  /** The same of several records of arrays. */
  uploadAll<Records extends readonly HostArrays[]>(
    records: readonly [...Records],
  ): { [Index in keyof Records]: Uploaded<Records[Index]> } {
    const arrays = records.flatMap((record) => Object.values(record));
    const starts: number[] = [];
    let length = 0;
    for (const array of arrays) {
      starts.push(length);
      length += Math.ceil(array.length / ALIGNMENT) * ALIGNMENT;
    }
    if (length > this.#staging.length) this.#staging = new Uint32Array(2 * length);
    arrays.forEach((array, i) => {
      this.#staging.set(new Uint32Array(array.buffer, array.byteOffset, array.length), starts[i]);
    });
    const all = this.#arena.take(length);
    if (length > 0) all.view().upload(new Uint8Array(this.#staging.buffer, 0, 4 * length));
    let i = 0;
    const uploaded = records.map((record) =>
      Object.fromEntries(
        Object.entries(record).map(([name, { length }]): [string, Indices] => {
          const byteOffset = all.byteOffset + 4 * starts[i++]!;
          return [name, { buffer: all.buffer, byteOffset, length }];
        }),
      )
    );
    return uploaded as { [Index in keyof Records]: Uploaded<Records[Index]> };
  }

  /** A matrix of one value, which needs no gradient; it is copied to the device once, not in every step. */
  filled(rows: number, columns: number, value: number): Tensor {
    const count = Math.max(1, rows * columns);
    let run = this.#runs.get(value);
    if (run === undefined || run.length < count) {
      if (run) this.keep(run); // tensors of the step may look into it
      run = this.device.createBuffer("f32", 2 ** Math.ceil(Math.log2(count)));
      this.#runs.set(value, run);
      run.upload(new Float32Array(run.length).fill(value));
    }
    return new Tensor(regionOn(run, this.device), { rows, columns });
  }

  [Symbol.dispose](): void {
    this.#release();
    this.#releaseRuns();
    this.#arena[Symbol.dispose]();
    this.#one[Symbol.dispose]();
  }
}
