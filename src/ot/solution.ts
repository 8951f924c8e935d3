import { OT_GRADIENT, OT_STATUSES } from "../../ffi/enums.ts";
import { type NativePotentials, type NativeTransportBatch, readReports } from "../../ffi/ot.ts";
import type { Device } from "../device/device.ts";
import type { DeviceBuffer } from "../device/device_buffer.ts";
import { PackhorseError } from "../error.ts";
import {
  type BatchShape,
  type BoundProblem,
  placesOf,
  refuse,
  Tensors,
  type TransportArray,
  type TransportDType,
} from "./problem.ts";

/**
 * How a problem ended: within its tolerance; at its limit of iterations, with a marginal error above the tolerance; or
 * without an answer, as a row or a column with mass has no partner of finite cost.
 */
export type TransportStatus = "converged" | "iteration-limit" | "infeasible";

/** How one problem ended. */
export interface TransportReport {
  /** Whether it converged. */
  readonly status: TransportStatus;
  /** Iterations that were made. */
  readonly iterations: number;
  /** `sum |T1 - a| + sum |T'1 - b|` of the potentials that were found. */
  readonly marginalError: number;
  /** `<T, C>`; NaN if infeasible. */
  readonly cost: number;
  /** `<T, C> - epsilon * H(T)`, plus penalties; NaN if infeasible. */
  readonly value: number;
  /** The epsilon that was used, absolute. */
  readonly epsilon: number;
}

/**
 * Where gradients come from.
 *
 * - `implicit`: exact where a problem converged, for every loss, whatever the iterations it took.
 * - `envelope`: the plan counts as a constant; exact for a loss of the value alone, and then the cheapest. It is not for
 *   `<T, C>`, the cost without its entropy, whose gradient it gets wrong by a tenth or more.
 * - `unrolled`: through the iterations that were made, as automatic differentiation would; for problems that did not
 *   converge. Takes time for every iteration, and on the CPU memory. On CUDA only of problems that lie on chip: see
 *   {@linkcode proximalTransport}.
 * - `detached`: plan and potentials count as constants, and masses have no gradient.
 */
export type GradientMode = "implicit" | "envelope" | "unrolled" | "detached";

/** Gradients of a loss with respect to what {@linkcode sinkhorn} found; those that are missing are 0. */
export interface SolutionGradients {
  /** With respect to the plans: their entries. */
  readonly plan?: TransportArray | undefined;
  /** With respect to `<T, C>` of each problem. */
  readonly cost?: TransportArray | undefined;
  /** With respect to the regularised value of each problem. */
  readonly value?: TransportArray | undefined;
  /** With respect to f: rows. Of a loss of f and g that a shift `f + c`, `g - c` does not change. */
  readonly f?: TransportArray | undefined;
  /** With respect to g: columns. */
  readonly g?: TransportArray | undefined;
}

/** Options of {@linkcode TransportSolution.backward}. */
export interface BackwardOptions {
  /** Default: `implicit`; of exact solutions and proximal points, which have no other, `envelope`. */
  readonly mode?: GradientMode | undefined;
  /** With respect to what. Default: points, or costs where there are none; and masses, unless a part is transported. */
  readonly to?: readonly ("cost" | "x" | "y" | "a" | "b")[] | undefined;
}

/** Gradients of a loss with respect to a problem, in the shapes of its arrays. Epsilon counts as a constant. */
export interface ProblemGradients extends Disposable {
  /** With respect to the costs of all pairs. */
  readonly cost?: DeviceBuffer<TransportDType>;
  /** With respect to the points of rows. */
  readonly x?: DeviceBuffer<TransportDType>;
  /** With respect to the points of columns. */
  readonly y?: DeviceBuffer<TransportDType>;
  /** With respect to the masses of rows, up to a constant that comes off those of columns. 0 where there is none. */
  readonly a?: DeviceBuffer<TransportDType>;
  /** With respect to the masses of columns. */
  readonly b?: DeviceBuffer<TransportDType>;
}

/** How {@linkcode TransportSolution.apply} multiplies. */
export interface ApplyOptions {
  /** Columns of the matrix. */
  readonly width: number;
  /** Whether to multiply by the transposed plan, from rows to columns. Default: false. */
  readonly transposed?: boolean | undefined;
  /** Whether to divide each row of the product by its mass in the plan, so that it is a mean. Default: false. */
  readonly normalised?: boolean | undefined;
}

/** What a solution is made of. */
interface Parts {
  readonly device: Device;
  readonly shape: BatchShape;
  readonly tensors: Tensors;
  readonly batch: NativeTransportBatch;
  readonly bound: BoundProblem;
  readonly f: DeviceBuffer<TransportDType>;
  readonly g: DeviceBuffer<TransportDType>;
  readonly plan: DeviceBuffer<TransportDType> | undefined;
  readonly reports: DeviceBuffer<"u8">;
  readonly warmG: DeviceBuffer<TransportDType> | undefined;
  readonly regularised: boolean;
  readonly partial: boolean;
}

/** Makes a solution; for this folder. */
export let createSolution: (parts: Parts) => TransportSolution;

/**
 * What {@linkcode sinkhorn} found, on the device. It uses the buffers that the problem was given in, which must stay as they
 * are as long as plans, products and gradients are asked for; arrays of the host were copied.
 */
export class TransportSolution implements Disposable {
  /** The device that it is on. */
  readonly device: Device;
  /** Type of all its numbers. */
  readonly dtype: TransportDType;
  /** Rows of each problem. */
  readonly rows: readonly number[];
  /** Columns of each problem. */
  readonly columns: readonly number[];
  /** Where each problem's entries begin in {@linkcode plan}, and their end. */
  readonly planOffsets: readonly number[];
  /** Potentials of the rows: `T = exp((f + g - C) / epsilon)`; `-Infinity` where there is no mass. */
  readonly f: DeviceBuffer<TransportDType>;
  /** Potentials of the columns. */
  readonly g: DeviceBuffer<TransportDType>;
  readonly #parts: Parts;
  #plan: DeviceBuffer<TransportDType> | undefined;
  #reports: readonly TransportReport[] | undefined;

  private constructor(parts: Parts) {
    const { shape } = parts;
    this.device = parts.device;
    this.dtype = shape.dtype;
    this.rows = shape.rows;
    this.columns = shape.columns;
    this.planOffsets = shape.planOffsets;
    this.f = parts.f;
    this.g = parts.g;
    this.#plan = parts.plan;
    this.#parts = parts;
  }

  static {
    createSolution = (parts) => new TransportSolution(parts);
  }

  /**
   * How each problem ended. The first look waits for the device, and throws `non-finite` or `invalid-argument` if a problem
   * was ill-formed.
   */
  get reports(): readonly TransportReport[] {
    return this.#reports ??= this.#readReports();
  }

  /** Whether all problems converged. */
  get converged(): boolean {
    return this.reports.every(({ status }) => status === "converged");
  }

  /**
   * The plans: entries of `[rows, columns]` of one problem after another, 0 where there is no answer. Where the problems are
   * streamed, the first look computes them, and their memory is what streaming avoids.
   */
  get plan(): DeviceBuffer<TransportDType> {
    if (this.#plan) return this.#plan;
    const { shape, tensors, batch } = this.#parts;
    const plan = tensors.create(shape.entries);
    this.#bind();
    batch.writePlan(this.#potentials(), tensors.place(plan));
    return this.#plan = plan;
  }

  /**
   * The product of each plan with a matrix: `T matrix[columns, width]`, `[rows, width]`; transposed `T' matrix[rows, width]`,
   * `[columns, width]`. The caller disposes it.
   *
   * @example Where each point goes, on average
   * ```ts
   * import { Device } from "@packhorse/packhorse/device";
   * import { sinkhorn } from "@packhorse/packhorse/ot";
   * import { assertAlmostEquals } from "@std/assert";
   *
   * using device = Device.open({ backend: "cpu" });
   * const x = Float32Array.of(0, 1);
   * const y = Float32Array.of(10, 20);
   * using solution = sinkhorn(device, { x, y, dimension: 1 }, { epsilon: 1 });
   * using image = solution.apply(y, { width: 1, normalised: true });
   * assertAlmostEquals(image.download()[0]!, 10, 1e-3);
   * ```
   */
  apply(matrix: TransportArray, options: ApplyOptions): DeviceBuffer<TransportDType> {
    const { width, transposed = false, normalised = false } = options;
    if (!(Number.isInteger(width) && width >= 1 && width < 2 ** 32)) {
      refuse(`Cannot multiply by plans: width must be an integer of 1 or more, got ${width}`);
    }
    const { shape, batch } = this.#parts;
    const [from, to] = transposed
      ? [shape.rowCount, shape.columnCount]
      : [shape.columnCount, shape.rowCount];
    using inputs = new Tensors(this.device, this.dtype);
    const source = inputs.read(matrix, "matrix", from * width);
    const out = this.device.createBuffer(this.dtype, to * width);
    try {
      this.#bind();
      batch.multiply(this.#potentials(), {
        matrix: inputs.place(source),
        out: inputs.place(out),
        width,
        transposed,
        normalised,
      });
      return out;
    } catch (error) {
      out[Symbol.dispose]();
      throw error;
    }
  }

  /**
   * The barycentric projection: where each row's point goes, the mean of the points that it goes to, `[rows, dimension]`; or
   * for columns, where they come from. Rows without mass give 0. The caller disposes it. Throws `invalid-argument` unless
   * the problem is of points.
   */
  project(side: "rows" | "columns" = "rows"): DeviceBuffer<TransportDType> {
    const { bound, shape } = this.#parts;
    const points = side === "rows" ? bound.y : bound.x;
    if (!points) refuse("Cannot project: the problem has costs, not points; use apply()");
    const transposed = side === "columns";
    return this.apply(points, { width: shape.dimension, transposed, normalised: true });
  }

  /**
   * Gradients of a loss with respect to the problem, from those with respect to the solution. Epsilon counts as a constant,
   * even where it is relative. Pairs of infinite cost and problems without an answer have gradient 0. The caller disposes
   * them.
   *
   * Throws `invalid-argument` for lengths that do not fit, for the mode `envelope` with a gradient of plan or potentials, and
   * for gradients of the plan or the costs where the problems are streamed; `unsupported` for what the backend cannot do.
   */
  backward(of: SolutionGradients, options: BackwardOptions = {}): ProblemGradients {
    const { regularised, partial } = this.#parts;
    const { mode = regularised ? "implicit" : "envelope" } = options;
    if (!Object.hasOwn(OT_GRADIENT, mode)) {
      refuse(
        `Cannot differentiate: mode must be ${Object.keys(OT_GRADIENT).join(", ")}, got ${mode}`,
      );
    }
    if (!regularised && (mode === "implicit" || mode === "unrolled")) {
      throw new PackhorseError(
        "unsupported",
        `Cannot take ${mode} gradients of a plan without entropy or of a part of the mass, which does ` +
          `not change smoothly with the costs: take the mode envelope, or solve with sinkhorn()`,
      );
    }
    const { shape, bound, tensors, batch, warmG } = this.#parts;
    const all = [
      ...(bound.x ? ["x", "y"] as const : ["cost"] as const),
      ...(partial ? [] : ["a", "b"] as const),
    ];
    const { to = all } = options;
    if (partial && to.some((name) => name === "a" || name === "b")) {
      // f and g hold the price of the whole mass, too, which cannot be told from those of its parts.
      throw new PackhorseError(
        "unsupported",
        `Cannot take gradients of partial transport with respect to masses: take those of ` +
          `${bound.x ? "x and y" : "cost"}`,
      );
    }
    const lengths = {
      cost: shape.entries,
      x: shape.rowCount * shape.dimension,
      y: shape.columnCount * shape.dimension,
      a: shape.rowCount,
      b: shape.columnCount,
    };
    using inputs = new Tensors(this.device, this.dtype);
    const read = (array: TransportArray | undefined, name: string, length: number) =>
      inputs.place(array && inputs.read(array, name, length));
    const gradients = new Tensors(this.device, this.dtype);
    try {
      const buffers = Object.fromEntries(to.map((name) => {
        if (!Object.hasOwn(lengths, name) || lengths[name] === 0) {
          refuse(`Cannot differentiate: the problem has no ${name}`);
        }
        return [name, gradients.create(lengths[name])];
      }));
      this.#bind();
      batch.backward(this.#potentials(), {
        mode: OT_GRADIENT[mode],
        warmG: tensors.place(warmG),
        of: {
          plan: read(of.plan, "the gradient of the plan", shape.entries),
          f: read(of.f, "the gradient of f", shape.rowCount),
          g: read(of.g, "the gradient of g", shape.columnCount),
          cost: read(of.cost, "the gradient of the cost", shape.problems),
          value: read(of.value, "the gradient of the value", shape.problems),
        },
        to: Object.fromEntries(
          Object.entries(buffers).map(([name, buffer]) => [name, gradients.place(buffer)]),
        ),
      });
      return { ...buffers, [Symbol.dispose]: () => gradients[Symbol.dispose]() };
    } catch (error) {
      gradients[Symbol.dispose]();
      throw error;
    }
  }

  /** Frees what it holds on the device. Does nothing the second time. */
  [Symbol.dispose](): void {
    this.#parts.batch.close();
    this.#parts.tensors[Symbol.dispose]();
  }

  #bind(): void {
    const { batch, bound, tensors } = this.#parts;
    batch.bind(placesOf(bound, tensors));
  }

  #potentials(): NativePotentials {
    const { tensors, f, g, reports } = this.#parts;
    return {
      f: tensors.place(f),
      g: tensors.place(g),
      plan: tensors.place(this.#plan),
      reports: tensors.place(reports),
    };
  }

  #readReports(): readonly TransportReport[] {
    const { shape, reports } = this.#parts;
    return readReports(reports.download()).map((report, problem) => {
      const status = OT_STATUSES[report.status];
      switch (status) {
        case "converged":
        case "iteration-limit":
        case "infeasible":
          return {
            status,
            iterations: report.iterations,
            marginalError: report.marginal_error,
            cost: report.cost,
            value: report.value,
            epsilon: report.epsilon,
          };
        default:
          throw flawOf(status, problem, report.place, shape);
      }
    });
  }
}

/** The error of a problem that is ill-formed at `place`; for this folder. */
export function flawOf(
  status: typeof OT_STATUSES[number] | undefined,
  problem: number,
  place: number,
  { rows, columns, dimension }: BatchShape,
): PackhorseError {
  const n = rows[problem]!;
  const m = columns[problem]!;
  const of = rows.length === 1 ? "" : ` of problem ${problem}`;
  switch (status) {
    case "non-finite-cost": {
      const where = dimension > 0 ? "between points" : "of the matrix";
      return new PackhorseError(
        "non-finite",
        `Cannot transport: the cost at row ${Math.floor(place / m)}, column ${place % m}${of} ` +
          `(index ${place} ${where}) is NaN or -Infinity`,
      );
    }
    case "non-finite-point": {
      const side = place < n * dimension ? "x" : "y";
      const index = side === "x" ? place : place - n * dimension;
      return new PackhorseError(
        "non-finite",
        `Cannot transport: coordinate ${index % dimension} of point ` +
          `${Math.floor(index / dimension)} of ${side}${of} (index ${index}) is not finite`,
      );
    }
    case "invalid-mass": {
      if (place >= n + m) {
        return new PackhorseError(
          "invalid-argument",
          `Cannot transport: the masses a and b${of} must have equal totals above 0, to 1e-4`,
        );
      }
      const side = place < n ? "a" : "b";
      return new PackhorseError(
        "invalid-argument",
        `Cannot transport: element ${place < n ? place : place - n} of ${side}${of} ` +
          `must be finite and not negative`,
      );
    }
    default:
      return new PackhorseError("internal", `Unknown status of problem ${problem}`);
  }
}
