import type { Device } from "../device/device.ts";
import type { DeviceBuffer } from "../device/device_buffer.ts";
import {
  BatchShape,
  bindProblem,
  type PointProblem,
  refuse,
  Tensors,
  type TransportArray,
  type TransportDType,
} from "./problem.ts";
import { sinkhorn, type SinkhornOptions } from "./sinkhorn.ts";
import type { ProblemGradients, TransportReport, TransportSolution } from "./solution.ts";

/** How {@linkcode sinkhornDivergence} solves: each of its three problems by {@linkcode sinkhorn}. */
export type DivergenceOptions = Omit<SinkhornOptions, "start" | "penalty" | "check">;

/** What divergences are made of: the solutions are those of x and y, x and x, y and y. */
interface Parts {
  readonly device: Device;
  readonly shape: BatchShape;
  readonly tensors: Tensors;
  readonly solutions: readonly [TransportSolution, TransportSolution, TransportSolution];
}

let createDivergence: (parts: Parts) => SinkhornDivergence;

/** The divergences of a batch, and their gradients. */
export class SinkhornDivergence implements Disposable {
  /** `OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2` of each problem. */
  readonly values: Float64Array<ArrayBuffer>;
  /** How the problems between x and y, x and x, and y and y ended. */
  readonly reports: {
    readonly xy: readonly TransportReport[];
    readonly xx: readonly TransportReport[];
    readonly yy: readonly TransportReport[];
  };
  readonly #device: Device;
  readonly #shape: BatchShape;
  readonly #tensors: Tensors;
  readonly #solutions: readonly TransportSolution[];

  private constructor({ device, shape, tensors, solutions }: Parts) {
    const [xy, xx, yy] = solutions;
    this.#device = device;
    this.#shape = shape;
    this.#tensors = tensors;
    this.#solutions = solutions;
    this.reports = { xy: xy.reports, xx: xx.reports, yy: yy.reports };
    this.values = Float64Array.from(
      xy.reports,
      ({ value }, p) => value - (xx.reports[p]!.value + yy.reports[p]!.value) / 2,
    );
  }

  static {
    createDivergence = (parts) => new SinkhornDivergence(parts);
  }

  /** Whether all three problems converged, for every problem of the batch. */
  get converged(): boolean {
    return this.#solutions.every(({ converged }) => converged);
  }

  /**
   * Gradients of `sum weights * values` with respect to points and masses; exact, as the divergence is made of values. The
   * caller disposes them. They go over the host.
   */
  backward(
    weights: readonly number[] = Array<number>(this.values.length).fill(1),
  ): ProblemGradients {
    const { problems, rowCount, columnCount, dimension, dtype } = this.#shape;
    if (weights.length !== problems) {
      refuse(`Cannot differentiate: ${problems} weights are needed, got ${weights.length}`);
    }
    const arrayOf = (values: readonly number[]) =>
      dtype === "f64" ? Float64Array.from(values) : Float32Array.from(values);
    const sums = {
      x: new Float64Array(rowCount * dimension),
      y: new Float64Array(columnCount * dimension),
      a: new Float64Array(rowCount),
      b: new Float64Array(columnCount),
    };
    // In the problem of x and x, both sides are x; likewise y.
    const sides = [["x", "a", "y", "b"], ["x", "a", "x", "a"], ["y", "b", "y", "b"]] as const;
    this.#solutions.forEach((solution, which) => {
      const factor = which === 0 ? 1 : -0.5;
      const value = arrayOf(weights.map((weight) => factor * weight));
      using gradients = solution.backward({ value }, { mode: "envelope" });
      (["x", "a", "y", "b"] as const).forEach((name, k) => {
        const sum = sums[sides[which]![k]!];
        gradients[name]!.download().forEach((part, i) => sum[i]! += part);
      });
    });
    const gradients = new Tensors(this.#device, dtype);
    const upload = (values: Float64Array): DeviceBuffer<TransportDType> => {
      const buffer = gradients.create(values.length);
      buffer.upload(arrayOf([...values]));
      return buffer;
    };
    return {
      x: upload(sums.x),
      y: upload(sums.y),
      a: upload(sums.a),
      b: upload(sums.b),
      [Symbol.dispose]: () => gradients[Symbol.dispose](),
    };
  }

  /** Frees what it holds on the device. Does nothing the second time. */
  [Symbol.dispose](): void {
    for (const solution of this.#solutions) solution[Symbol.dispose]();
    this.#tensors[Symbol.dispose]();
  }
}

/**
 * The debiased Sinkhorn divergence between points x and y: `OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2`, where OT is the value of
 * {@linkcode sinkhorn} (Genevay et al., Feydy et al.). It is 0 for equal distributions, and for all costs of points above 0
 * otherwise; what falls below 0 is rounding, and what the tolerance leaves. A relative epsilon is that of x and y, for all
 * three.
 *
 * Defaults are a tolerance of 1e-9 in f64 and 1e-6 in f32, an over-relaxation of 1.5 and 50,000 iterations. Throws as {@linkcode sinkhorn}.
 *
 * @example
 * ```ts
 * import { Device } from "@packhorse/packhorse/device";
 * import { sinkhornDivergence } from "@packhorse/packhorse/ot";
 * import { assert, assertAlmostEquals } from "@std/assert";
 *
 * using device = Device.open({ backend: "cpu" });
 * const x = Float64Array.of(0, 1, 2);
 * using same = sinkhornDivergence(device, { x, y: Float64Array.of(2, 0, 1), dimension: 1 });
 * assertAlmostEquals(same.values[0]!, 0, 1e-9);
 * using moved = sinkhornDivergence(device, { x, y: Float64Array.of(3, 4, 5), dimension: 1 });
 * assertAlmostEquals(moved.values[0]!, 9, 1e-6); // all points move by 3
 * using gradients = moved.backward();
 * assert(gradients.x!.download().every((slope) => slope < 0));
 * ```
 */
export function sinkhornDivergence(
  device: Device,
  problem: PointProblem,
  options: DivergenceOptions = {},
): SinkhornDivergence {
  const shape = new BatchShape(problem);
  const { tolerance = shape.dtype === "f64" ? 1e-9 : 1e-6 } = options;
  // Points go to themselves, of which plain iterations convince themselves slowly.
  const { relaxation = 1.5, iterations = 50_000 } = options;
  using stack = new DisposableStack();
  const tensors = stack.use(new Tensors(device, shape.dtype));
  const { x, y, a, b } = bindProblem(problem, shape, tensors);
  const { dimension, rows, columns } = shape;
  const { cost } = problem;
  const add = (sides: PointProblem, more: SinkhornOptions) =>
    stack.use(sinkhorn(device, sides, {
      ...options,
      ...{ tolerance, relaxation, iterations },
      ...more,
    }));
  type Side = TransportArray;
  const points = { dimension, cost };
  const xy = add({ ...points, x: x as Side, y: y as Side, a, b, rows, columns }, {});
  // The same epsilon, whatever its problems' costs are.
  const epsilon = xy.reports.map((report) => report.epsilon);
  const absolute = { epsilon, relativeEpsilon: false };
  const xx = add(
    { ...points, x: x as Side, y: x as Side, a, b: a, rows, columns: rows },
    absolute,
  );
  const yy = add(
    { ...points, x: y as Side, y: y as Side, a: b, b, rows: columns, columns },
    absolute,
  );
  const divergence = createDivergence({ device, shape, tensors, solutions: [xy, xx, yy] });
  stack.move(); // What it held is the divergence's.
  return divergence;
}
