/** What is to be transported, and how it gets to a device. */
import { DTYPE } from "../../ffi/enums.ts";
import type { NativeTensor } from "../../ffi/tensor.ts";
import { NativeTransportBatch, type NativeTransportInputs } from "../../ffi/ot.ts";
import { OT_REPORT } from "../../ffi/structs.ts";
import { type Device, nativeOf } from "../device/device.ts";
import { DeviceBuffer, regionOn } from "../device/device_buffer.ts";
import { PackhorseError } from "../error.ts";

/** Element types of transport: f32, or on the CPU also f64. */
export type TransportDType = "f32" | "f64";

/** Numbers of a problem: on the host, or on the device already. Those of one problem have one type. */
export type TransportArray =
  | Float32Array<ArrayBuffer>
  | Float64Array<ArrayBuffer>
  | DeviceBuffer<TransportDType>;

/**
 * The cost of points x and y: `sqeuclidean` is `sum (x - y)^2`, not halved; `euclidean` its root; `cosine` is
 * `1 - x.y / (|x| |y|)`, 1 if either is 0; `dot` is `-x.y`.
 */
export type PointCost = "sqeuclidean" | "euclidean" | "cosine" | "dot";

/** How much of it is where; rows and columns of several problems follow each other. */
export interface Masses {
  /** Mass of each row, not negative. Default: 1 / n. */
  readonly a?: TransportArray | undefined;
  /** Mass of each column, with the same total. Default: 1 / m. */
  readonly b?: TransportArray | undefined;
}

/** One problem, or several of any sizes, whose costs are matrices. */
export interface LinearProblem extends Masses {
  /** Costs, row-major, those of one problem after another. `Infinity` where nothing may go. */
  readonly cost: TransportArray;
  /** Rows n of the problem, or of each. */
  readonly rows: number | readonly number[];
  /** Columns m of the problem, or of each. */
  readonly columns: number | readonly number[];
}

/** One problem, or several of any sizes, between points. */
export interface PointProblem extends Masses {
  /** Points of the rows: `[rows, dimension]`, those of one problem after another. */
  readonly x: TransportArray;
  /** Points of the columns: `[columns, dimension]`. */
  readonly y: TransportArray;
  /** Coordinates of a point. */
  readonly dimension: number;
  /** What it costs to go from x to y. Default: `sqeuclidean`. */
  readonly cost?: PointCost | undefined;
  /** Points x of each problem. Default: one problem of all. */
  readonly rows?: number | readonly number[] | undefined;
  /** Points y of each problem. Default: one problem of all. */
  readonly columns?: number | readonly number[] | undefined;
}

/** What {@linkcode sinkhorn} takes. */
export type TransportProblem = LinearProblem | PointProblem;

const MOST_SIZE = 2 ** 31 - 65;

/** Throws `invalid-argument`. */
export function refuse(message: string): never {
  throw new PackhorseError("invalid-argument", message);
}

/** The type of an array that transport takes. */
export function dtypeOf(array: TransportArray, name: string): TransportDType {
  if (array instanceof Float32Array) return "f32";
  if (array instanceof Float64Array) return "f64";
  if (array instanceof DeviceBuffer && (array.dtype === "f32" || array.dtype === "f64")) {
    return array.dtype;
  }
  return refuse(
    `Cannot transport: ${name} must be a Float32Array, a Float64Array, or a buffer of f32 or f64`,
  );
}

function sizesOf(sizes: number | readonly number[], name: string): readonly number[] {
  const list = typeof sizes === "number" ? [sizes] : [...sizes];
  if (list.length === 0) refuse(`Cannot transport: there must be at least one problem`);
  list.forEach((size, problem) => {
    if (Number.isInteger(size) && size >= 1 && size <= MOST_SIZE) return;
    const of = list.length === 1 ? "" : ` of problem ${problem}`;
    refuse(`Cannot transport: ${name}${of} must be an integer of 1 or more, got ${size}`);
  });
  return list;
}

const sum = (sizes: readonly number[]) => sizes.reduce((total, size) => total + size, 0);

/** Offsets of parts of these sizes, and their end. */
function offsetsOf(sizes: readonly number[]): readonly number[] {
  const offsets = [0];
  for (const size of sizes) offsets.push(offsets.at(-1)! + size);
  return offsets;
}

/** Arrays on a device: those from the host are copied there, and freed together. */
export class Tensors implements Disposable {
  readonly #device: Device;
  readonly #dtype: TransportDType;
  readonly #owned: DeviceBuffer[] = [];

  constructor(device: Device, dtype: TransportDType) {
    this.#device = device;
    this.#dtype = dtype;
  }

  /** A buffer that holds the array. */
  read(array: TransportArray, name: string, length: number): DeviceBuffer<TransportDType> {
    const dtype = dtypeOf(array, name);
    if (dtype !== this.#dtype || array.length !== length) {
      refuse(
        `Cannot transport: ${name} must be ${length} elements of ${this.#dtype}, ` +
          `got ${array.length} of ${dtype}`,
      );
    }
    if (array instanceof DeviceBuffer) {
      if (array.byteOffset % 16 !== 0) {
        refuse(
          `Cannot transport: ${name} must start at a multiple of 16 bytes, not at ${array.byteOffset}`,
        );
      }
      return array;
    }
    const buffer = this.create(length);
    buffer.upload(array);
    return buffer;
  }

  /** A new buffer. */
  create(length: number): DeviceBuffer<TransportDType> {
    const buffer = this.#device.createBuffer(this.#dtype, length);
    this.#owned.push(buffer);
    return buffer;
  }

  /** A new buffer for the reports of some problems. */
  createReports(problems: number, byteLength = OT_REPORT.byteLength): DeviceBuffer<"u8"> {
    const buffer = this.#device.createBuffer("u8", problems * byteLength);
    this.#owned.push(buffer);
    return buffer;
  }

  place(buffer: DeviceBuffer): NativeTensor;
  place(buffer: DeviceBuffer | undefined): NativeTensor | undefined;
  place(buffer: DeviceBuffer | undefined): NativeTensor | undefined {
    return buffer && regionOn(buffer, this.#device);
  }

  [Symbol.dispose](): void {
    for (const buffer of this.#owned) buffer[Symbol.dispose]();
  }
}

/** The sizes of a batch, and where its parts begin. */
export class BatchShape {
  readonly rows: readonly number[];
  readonly columns: readonly number[];
  readonly rowOffsets: readonly number[];
  readonly columnOffsets: readonly number[];
  readonly planOffsets: readonly number[];
  readonly dimension: number;
  readonly dtype: TransportDType;

  constructor(problem: TransportProblem) {
    if ("x" in problem) {
      const { x, y, dimension } = problem;
      if (!(Number.isInteger(dimension) && dimension >= 1 && dimension < 2 ** 31)) {
        refuse(`Cannot transport: dimension must be an integer of 1 or more, got ${dimension}`);
      }
      this.dtype = dtypeOf(x, "x");
      this.dimension = dimension;
      this.rows = sizesOf(problem.rows ?? x.length / dimension, "rows");
      this.columns = sizesOf(problem.columns ?? y.length / dimension, "columns");
    } else {
      this.dtype = dtypeOf(problem.cost, "cost");
      this.dimension = 0;
      this.rows = sizesOf(problem.rows, "rows");
      this.columns = sizesOf(problem.columns, "columns");
    }
    if (this.rows.length !== this.columns.length) {
      refuse(
        `Cannot transport: there are rows for ${this.rows.length} problems, ` +
          `but columns for ${this.columns.length}`,
      );
    }
    this.rowOffsets = offsetsOf(this.rows);
    this.columnOffsets = offsetsOf(this.columns);
    this.planOffsets = offsetsOf(this.rows.map((rows, p) => rows * this.columns[p]!));
    if (this.entries > Number.MAX_SAFE_INTEGER) {
      refuse(`Cannot transport: there are too many pairs`);
    }
  }

  get problems(): number {
    return this.rows.length;
  }
  get rowCount(): number {
    return sum(this.rows);
  }
  get columnCount(): number {
    return sum(this.columns);
  }
  get entries(): number {
    return this.planOffsets.at(-1)!;
  }

  createBatch(
    device: Device,
    { streaming, backward }: { readonly streaming: boolean; readonly backward: boolean },
  ): NativeTransportBatch {
    return new NativeTransportBatch(nativeOf(device), {
      rows: Uint32Array.from(this.rows),
      columns: Uint32Array.from(this.columns),
      dtype: DTYPE[this.dtype],
      dimension: this.dimension,
      streaming,
      backward,
    });
  }
}

/** The tensors of a problem on a device. */
export interface BoundProblem {
  readonly cost: DeviceBuffer<TransportDType> | undefined;
  readonly x: DeviceBuffer<TransportDType> | undefined;
  readonly y: DeviceBuffer<TransportDType> | undefined;
  readonly a: DeviceBuffer<TransportDType> | undefined;
  readonly b: DeviceBuffer<TransportDType> | undefined;
}

export function bindProblem(
  problem: TransportProblem,
  shape: BatchShape,
  tensors: Tensors,
): BoundProblem {
  const { rowCount, columnCount, entries, dimension } = shape;
  const read = (array: TransportArray | undefined, name: string, length: number) =>
    array && tensors.read(array, name, length);
  const points = "x" in problem;
  return {
    cost: points ? undefined : read(problem.cost, "cost", entries),
    x: points ? read(problem.x, "x", rowCount * dimension) : undefined,
    y: points ? read(problem.y, "y", columnCount * dimension) : undefined,
    a: read(problem.a, "a", rowCount),
    b: read(problem.b, "b", columnCount),
  };
}

export function placesOf(bound: BoundProblem, tensors: Tensors): NativeTransportInputs {
  return {
    cost: tensors.place(bound.cost),
    x: tensors.place(bound.x),
    y: tensors.place(bound.y),
    a: tensors.place(bound.a),
    b: tensors.place(bound.b),
  };
}
