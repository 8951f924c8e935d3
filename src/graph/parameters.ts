import * as native from "../../ffi/graph.ts";
import { type Device, nativeOf } from "../device/device.ts";
import { type DeviceBuffer, regionOn } from "../device/device_buffer.ts";
import { PackhorseError } from "../error.ts";
import { Random } from "./random.ts";
import { Tensor } from "./tape.ts";

/** How a parameter begins: a number, or uniform within a bound of 0. */
export type Initial = number | { readonly bound: number };

interface Entry {
  readonly name: string;
  readonly rows: number;
  readonly columns: number;
  readonly initial: Initial;
  /** Of its first element among all. */
  readonly start: number;
  readonly tensor: { current: Tensor | undefined };
}

/** Tensors by name, one behind another in a buffer of the device, each from a multiple of 16 bytes on. */
class TensorStore {
  readonly entries: Entry[] = [];
  length = 0;

  add(name: string, [rows, columns]: readonly [number, number], initial: Initial): () => Tensor {
    if (this.entries.some((entry) => entry.name === name)) {
      throw new PackhorseError("internal", `There are two parameters ${name}`);
    }
    const tensor: Entry["tensor"] = { current: undefined };
    this.entries.push({ name, rows, columns, initial, start: this.length, tensor });
    this.length += Math.ceil(rows * columns / 4) * 4;
    return () => {
      if (tensor.current) return tensor.current;
      throw new PackhorseError("internal", `Parameter ${name} has no place yet`);
    };
  }

  /** The first values; random ones follow from what `sourceOf` makes of a name. */
  initialise(seed: number, sourceOf: (name: string) => string): Float32Array<ArrayBuffer> {
    const values = new Float32Array(this.length);
    for (const { name, rows, columns, initial, start } of this.entries) {
      const random = new Random(seed, "parameter", sourceOf(name));
      for (let i = start; i < start + rows * columns; i++) {
        values[i] = typeof initial === "number"
          ? initial
          : initial.bound * (2 * random.uniform() - 1);
      }
    }
    return values;
  }
}

/** What a model has learned, and what it counts along the way. */
export interface ParameterValues {
  /** What gradients move. */
  readonly parameters: Float32Array<ArrayBuffer>;
  /** What is counted without gradients: running means and variances. */
  readonly state: Float32Array<ArrayBuffer>;
}

/** A part of {@linkcode ParameterValues}, for files. */
export interface NamedValues {
  readonly name: string;
  readonly shape: readonly [number, number];
  readonly of: "parameters" | "state";
  /** Of its first element. */
  readonly start: number;
}

/**
 * The parameters of a model. Layers add theirs while the model is built; then {@linkcode place} gives all a place on a
 * device, values in one buffer and gradients in another, so that an optimiser takes one call.
 */
export class Parameters implements Disposable {
  readonly #learned = new TensorStore();
  readonly #counted = new TensorStore();
  readonly #alike = new Map<string, string>();
  #device: Device | undefined;
  #values: DeviceBuffer<"f32"> | undefined;
  #gradients: DeviceBuffer<"f32"> | undefined;
  #state: DeviceBuffer<"f32"> | undefined;

  /** Adds what gradients move, and returns how to reach it once it has a place. */
  learn(name: string, shape: readonly [number, number], initial: Initial): () => Tensor {
    return this.#learned.add(name, shape, initial);
  }

  /** Adds what is counted without gradients. */
  count(name: string, shape: readonly [number, number], initial: Initial): () => Tensor {
    return this.#counted.add(name, shape, initial);
  }

  /** Lets the parameters of a part begin with the values of those of another, of the same shapes. */
  beginAlike(part: string, other: string): void {
    this.#alike.set(`${part}.`, `${other}.`);
  }

  /** Number of parameters that gradients move. */
  get size(): number {
    return this.#learned.entries.reduce((sum, { rows, columns }) => sum + rows * columns, 0);
  }

  /** Elements of the buffers, gaps included. */
  get length(): number {
    return this.#learned.length;
  }

  /** What there is by name. */
  get names(): NamedValues[] {
    const list = (store: TensorStore, of: NamedValues["of"]) =>
      store.entries.map(({ name, rows, columns, start }): NamedValues => ({
        ...{ name, of, start },
        shape: [rows, columns],
      }));
    return [...list(this.#learned, "parameters"), ...list(this.#counted, "state")];
  }

  /** Gives everything a place, with its first values, which follow from the seed and the names. */
  place(device: Device, seed: number): void {
    this.#device = device;
    const create = (store: TensorStore) => device.createBuffer("f32", Math.max(4, store.length));
    this.#values = create(this.#learned);
    this.#gradients = create(this.#learned);
    this.#state = create(this.#counted);
    const sourceOf = (name: string) => {
      for (const [part, other] of this.#alike) {
        if (name.startsWith(part)) return other + name.slice(part.length);
      }
      return name;
    };
    this.write({
      parameters: this.#learned.initialise(seed, sourceOf),
      state: this.#counted.initialise(seed, sourceOf),
    });
    const regionOf = (buffer: DeviceBuffer<"f32">, start: number) => ({
      buffer: regionOn(buffer, device).buffer,
      byteOffset: 4 * start,
    });
    for (const { rows, columns, start, tensor } of this.#learned.entries) {
      tensor.current = new Tensor(regionOf(this.#values, start), { rows, columns }, {
        needed: true,
        place: regionOf(this.#gradients, start),
      });
    }
    for (const { rows, columns, start, tensor } of this.#counted.entries) {
      tensor.current = new Tensor(regionOf(this.#state, start), { rows, columns });
    }
  }

  /** The values, and where gradients are. */
  get buffers(): { readonly values: DeviceBuffer<"f32">; readonly gradients: DeviceBuffer<"f32"> } {
    const [values, gradients] = [this.#values, this.#gradients];
    if (values && gradients) return { values, gradients };
    throw new PackhorseError("internal", "The parameters have no place yet");
  }

  /** Sets all gradients to 0: operations add to them. */
  clearGradients(): void {
    this.buffers.gradients.fill(0);
  }

  /** Waits for the device, and copies everything from it. */
  read(): ParameterValues {
    const take = (buffer: DeviceBuffer<"f32">, length: number) =>
      buffer.download().slice(0, length);
    return {
      parameters: take(this.buffers.values, this.#learned.length),
      state: take(this.#state!, this.#counted.length),
    };
  }

  /** Copies everything to the device. Throws `invalid-argument` if it is of another model. */
  write({ parameters, state }: ParameterValues): void {
    if (parameters.length !== this.#learned.length || state.length !== this.#counted.length) {
      const message = `Cannot use ${parameters.length} and ${state.length} values: ` +
        `the model has ${this.#learned.length} and ${this.#counted.length}`;
      throw new PackhorseError("invalid-argument", message);
    }
    if (parameters.length > 0) this.buffers.values.view(0, parameters.length).upload(parameters);
    if (state.length > 0) this.#state!.view(0, state.length).upload(state);
  }

  /** The device that they are on. */
  get device(): Device {
    if (this.#device) return this.#device;
    throw new PackhorseError("internal", "The parameters have no place yet");
  }

  [Symbol.dispose](): void {
    for (const buffer of [this.#values, this.#gradients, this.#state]) buffer?.[Symbol.dispose]();
  }
}

/** Options of {@linkcode Adam}. */
export interface AdamOptions {
  /** Decay of the mean and of the mean square of gradients. Default: 0.9 and 0.999. */
  readonly betas?: readonly [number, number] | undefined;
  /** Default: 1e-8. */
  readonly epsilon?: number | undefined;
  /** Default: 0. */
  readonly weightDecay?: number | undefined;
  /** Whether weights decay by themselves (AdamW) and not through the gradient. Default: true. */
  readonly decoupled?: boolean | undefined;
  /** Largest Euclidean norm of all gradients together; longer ones are scaled down to it. Default: none. */
  readonly clipNorm?: number | undefined;
}

/** Moments of gradients, and how many steps they are of. */
export interface AdamState {
  readonly step: number;
  readonly first: Float32Array<ArrayBuffer>;
  readonly second: Float32Array<ArrayBuffer>;
}

/** Adam, or AdamW, over all parameters of a model at once. */
export class Adam implements Disposable {
  readonly #parameters: Parameters;
  readonly #options: AdamOptions;
  readonly #first: DeviceBuffer<"f32">;
  readonly #second: DeviceBuffer<"f32">;
  readonly #norm: DeviceBuffer<"f32">;
  #step = 0;

  constructor(parameters: Parameters, options: AdamOptions = {}) {
    const { device } = parameters;
    this.#parameters = parameters;
    this.#options = options;
    this.#first = device.createBuffer("f32", Math.max(4, parameters.length));
    this.#second = device.createBuffer("f32", Math.max(4, parameters.length));
    this.#norm = device.createBuffer("f32", 4);
    this.#first.fill(0);
    this.#second.fill(0);
  }

  /** Moves the parameters by their gradients. */
  step(learningRate: number): void {
    const { betas = [0.9, 0.999], epsilon = 1e-8, weightDecay = 0, decoupled = true, clipNorm } =
      this.#options;
    const { device, length: count } = this.#parameters;
    const { values, gradients } = this.#parameters.buffers;
    const [beta1, beta2] = betas;
    const at = (buffer: DeviceBuffer<"f32">) => regionOn(buffer, device);
    const nativeDevice = nativeOf(device);
    this.#step++;
    if (clipNorm !== undefined) {
      native.squaredNorm(nativeDevice, at(gradients), at(this.#norm), count);
    }
    native.adam(nativeDevice, {
      ...{ parameters: at(values), gradients: at(gradients), count },
      ...{ first: at(this.#first), second: at(this.#second) },
      squaredNorm: clipNorm === undefined ? undefined : at(this.#norm),
      ...{ learningRate, beta1, beta2, epsilon, weightDecay, decoupled, mostNorm: clipNorm ?? 0 },
      correction1: 1 - beta1 ** this.#step,
      correction2: 1 - beta2 ** this.#step,
    });
  }

  /** Waits for the device, and copies the state from it. */
  read(): AdamState {
    const { length } = this.#parameters;
    const take = (buffer: DeviceBuffer<"f32">) => buffer.download().slice(0, length);
    return { step: this.#step, first: take(this.#first), second: take(this.#second) };
  }

  /** Goes on from a state. */
  write({ step, first, second }: AdamState): void {
    this.#step = step;
    if (first.length === 0) return;
    this.#first.view(0, first.length).upload(first);
    this.#second.view(0, second.length).upload(second);
  }

  [Symbol.dispose](): void {
    for (const buffer of [this.#first, this.#second, this.#norm]) buffer[Symbol.dispose]();
  }
}
