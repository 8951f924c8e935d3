import { OT_STATUSES } from "../../ffi/enums.ts";
import type { NativeTransportBatch } from "../../ffi/ot.ts";
import { OT_GROMOV_REPORT } from "../../ffi/structs.ts";
import type { Device } from "../device/device.ts";
import type { DeviceBuffer } from "../device/device_buffer.ts";
import { PackhorseError } from "../error.ts";
import {
  BatchShape,
  dtypeOf,
  type Masses,
  refuse,
  Tensors,
  type TransportArray,
  type TransportDType,
} from "./problem.ts";
import { flawOf, type TransportStatus } from "./solution.ts";
import { nativeOptions } from "./solve.ts";

/** One pair of graphs or metric spaces, or several of any sizes. All arrays have one type. */
export interface GromovProblem extends Masses {
  /**
   * Distances within the first side, `[n, n]`, row-major, those of one problem after another: symmetric, to 1e-5 of the
   * largest (what is left is averaged away). Any symmetric matrix will do: shortest paths, or adjacencies.
   */
  readonly distanceX: TransportArray;
  /** Distances within the second side, `[m, m]`. */
  readonly distanceY: TransportArray;
  /** Points n of the first side of the problem, or of each. */
  readonly rows: number | readonly number[];
  /** Points m of the second side of the problem, or of each. */
  readonly columns: number | readonly number[];
  /** Costs between the sides, as of features, `[n, m]`, `Infinity` where nothing may go: the fused problem. */
  readonly cost?: TransportArray | undefined;
}

/** How {@linkcode gromovTransport} solves. */
export interface GromovOptions {
  /**
   * Weight of the distortion, from 0 (linear transport of the cost) to 1 (distances alone), for all or each. The cost weighs
   * `1 - alpha`. Default: 0.5 with a cost, and 1 without one, which can have no other.
   */
  readonly alpha?: number | readonly number[] | undefined;
  /**
   * The {@linkcode GromovReport.gap} to stop at, relative to the largest that the value could be, for all or each: times
   * `(1 - alpha) * max |C| + alpha * max(|X|, |Y|)^2`, for a total mass of 1. Default: 1e-7.
   */
  readonly tolerance?: number | readonly number[] | undefined;
  /** The most conditional gradients from a start, for all or each. Default: 1,000. */
  readonly iterations?: number | readonly number[] | undefined;
  /** Whether to look at the reports at once: see {@linkcode SinkhornOptions.check}. Default: true. */
  readonly check?: boolean | undefined;
}

/** How one problem ended. Where it is infeasible, all numbers but the iterations are NaN. */
export interface GromovReport {
  /**
   * `converged`: the gap is within the tolerance; `iteration-limit`: it is not; `infeasible`: the masses cannot go where costs
   * are finite.
   */
  readonly status: TransportStatus;
  /** Conditional gradients that led to the plan, from the start that it came from. */
  readonly iterations: number;
  /** `sum |T1 - a| + sum |T'1 - b|`: rounding. */
  readonly marginalError: number;
  /** `(1 - alpha) * cost + alpha * distortion`. */
  readonly value: number;
  /** `<T, C>`; 0 where there is no cost. */
  readonly cost: number;
  /** `sum (X_ik - Y_jl)^2 T_ij T_kl`, the squared Gromov-Wasserstein distance if T is optimal. */
  readonly distortion: number;
  /** The most that `<gradient, T - S>` is for any plan S: how far from stationary T is. */
  readonly gap: number;
  /** What the value is certainly not below, for any plan: where the value is equal, T is a global minimum. */
  readonly bound: number;
}

interface Parts {
  readonly device: Device;
  readonly shape: BatchShape;
  readonly tensors: Tensors;
  readonly batch: NativeTransportBatch;
  readonly plan: DeviceBuffer<TransportDType>;
  readonly reports: DeviceBuffer<"u8">;
}

let createSolution: (parts: Parts) => GromovSolution;

/** What {@linkcode gromovTransport} found, on the device. */
export class GromovSolution implements Disposable {
  /** The device that it is on. */
  readonly device: Device;
  /** Type of all its numbers. */
  readonly dtype: TransportDType;
  /** Points of the first side of each problem. */
  readonly rows: readonly number[];
  /** Points of the second side of each problem. */
  readonly columns: readonly number[];
  /** Where each problem's entries begin in {@linkcode plan}, and their end. */
  readonly planOffsets: readonly number[];
  /** The plans: entries of `[rows, columns]` of one problem after another, 0 where there is no answer. */
  readonly plan: DeviceBuffer<TransportDType>;
  readonly #parts: Parts;
  #reports: readonly GromovReport[] | undefined;

  private constructor(parts: Parts) {
    const { device, shape, plan } = parts;
    this.device = device;
    this.dtype = shape.dtype;
    this.rows = shape.rows;
    this.columns = shape.columns;
    this.planOffsets = shape.planOffsets;
    this.plan = plan;
    this.#parts = parts;
  }

  static {
    createSolution = (parts) => new GromovSolution(parts);
  }

  /**
   * How each problem ended. The first look waits for the device, and throws `non-finite` or `invalid-argument` if a problem
   * was ill-formed.
   */
  get reports(): readonly GromovReport[] {
    return this.#reports ??= this.#readReports();
  }

  /** Whether all problems converged. */
  get converged(): boolean {
    return this.reports.every(({ status }) => status === "converged");
  }

  /** Frees what it holds on the device. Does nothing the second time. */
  [Symbol.dispose](): void {
    this.#parts.batch.close();
    this.#parts.tensors[Symbol.dispose]();
  }

  #readReports(): readonly GromovReport[] {
    const { shape, reports } = this.#parts;
    const bytes = reports.download();
    const size = OT_GROMOV_REPORT.byteLength;
    return Array.from({ length: shape.problems }, (_, problem) => {
      const report = OT_GROMOV_REPORT.read(bytes.subarray(problem * size, (problem + 1) * size));
      const status = OT_STATUSES[report.status];
      switch (status) {
        case "converged":
        case "iteration-limit":
        case "infeasible": {
          const { iterations, value, cost, distortion, gap, bound } = report;
          const marginalError = report.marginal_error;
          return { status, iterations, marginalError, value, cost, distortion, gap, bound };
        }
        case "non-finite-distance":
        case "asymmetric-distance":
          throw distanceFlaw(status, problem, report.place, shape);
        default:
          throw flawOf(status, problem, report.place, shape);
      }
    });
  }
}

function distanceFlaw(
  status: "non-finite-distance" | "asymmetric-distance",
  problem: number,
  place: number,
  { rows, columns, problems }: BatchShape,
): PackhorseError {
  const n = rows[problem]!;
  const [name, size, index] = place < n * n
    ? ["distanceX", n, place]
    : ["distanceY", columns[problem]!, place - n * n];
  const where = `${name}${problems === 1 ? "" : ` of problem ${problem}`}`;
  const [row, column] = [Math.floor(index / size), index % size];
  return status === "non-finite-distance"
    ? new PackhorseError(
      "non-finite",
      `Cannot transport: row ${row}, column ${column} of ${where} is not finite; for points that ` +
        `no path connects, take a large distance`,
    )
    : new PackhorseError(
      "invalid-argument",
      `Cannot transport: ${where} must be symmetric, but row ${row}, column ${column} differs from ` +
        `row ${column}, column ${row}`,
    );
}

/**
 * Gromov-Wasserstein transport: matches graphs, or metric spaces, whose points cannot be compared with each other, by the
 * distances within each. With a cost between them, as of features, it is the fused problem (Vayer et al., arXiv 1805.09114);
 * for each problem, of sizes of its own,
 *
 * `min (1 - alpha) <T, C> + alpha sum (X_ik - Y_jl)^2 T_ij T_kl`, with `T1 = a` and `T'1 = b`.
 *
 * That is not convex: what is found is a local minimum, by conditional gradients with exact line search, whose steps never
 * increase the value. They start from the plan of Mémoli's third lower bound, which matches points that see the same
 * distances, and then from `ab'`; the better is kept. Whether it is a global minimum only the
 * {@linkcode GromovReport.bound} can tell. Plans are without entropy: their marginals hold to rounding. An iteration takes
 * time of the order of `n^2 m + n m^2`, and that of {@linkcode exactTransport}. For small graphs; computed in float64,
 * whatever the type of the arrays. Plans have no gradients.
 *
 * Throws `non-finite` for what is not finite, naming problem, row and column (a cost may be `Infinity`); `invalid-argument` for
 * matrices that are not symmetric, and for sizes, options or masses that are none, or whose totals differ by more than 1e-4;
 * `unsupported` on CUDA for more than 512 points of a side; `out-of-memory`; `disposed`.
 *
 * @example A graph finds itself again
 * ```ts
 * import { Device } from "@packhorse/packhorse/device";
 * import { gromovTransport } from "@packhorse/packhorse/ot";
 * import { assertAlmostEquals, assertEquals } from "@std/assert";
 *
 * using device = Device.open({ backend: "cpu" });
 * // Three points on a line, at 0, 1 and 3; and the same ones in another order: 3, 0, 1.
 * const distanceX = Float64Array.of(0, 1, 3, 1, 0, 2, 3, 2, 0);
 * const distanceY = Float64Array.of(0, 3, 2, 3, 0, 1, 2, 1, 0);
 * using solution = gromovTransport(device, { distanceX, distanceY, rows: 3, columns: 3 });
 * assertAlmostEquals(solution.reports[0]!.distortion, 0);
 * assertEquals([...solution.plan.download()].map((mass) => mass > 0), [
 *   ...[false, true, false],
 *   ...[false, false, true],
 *   ...[true, false, false],
 * ]);
 * ```
 */
export function gromovTransport(
  device: Device,
  problem: GromovProblem,
  options: GromovOptions = {},
): GromovSolution {
  const { distanceX, distanceY, cost, rows, columns } = problem;
  dtypeOf(distanceX, "distanceX");
  const shape = new BatchShape({ cost: distanceX, rows, columns });
  const { alpha = cost ? 0.5 : 1, tolerance = 1e-7, iterations = 1000, check = true } = options;
  const alphas = typeof alpha === "number" ? Array<number>(shape.problems).fill(alpha) : alpha;
  if (alphas.length !== shape.problems) {
    refuse(
      `Cannot transport: alpha must be a number, or one for each of ${shape.problems} problems, ` +
        `got ${alphas.length}`,
    );
  }
  for (const value of alphas) {
    if (!(value >= 0 && value <= 1)) {
      refuse(`Cannot transport: alpha must be from 0 to 1, got ${value}`);
    }
    if (!cost && value < 1) {
      refuse(`Cannot transport: alpha must be 1 where there is no cost, got ${value}`);
    }
  }
  using stack = new DisposableStack();
  const tensors = stack.use(new Tensors(device, shape.dtype));
  const native = nativeOptions({ cost: distanceX, rows, columns }, shape, {
    tolerance,
    iterations,
  });
  const squares = (sizes: readonly number[]) => sizes.reduce((sum, size) => sum + size ** 2, 0);
  const read = (array: TransportArray | undefined, name: string, length: number) =>
    tensors.place(array && tensors.read(array, name, length));
  const inputs = {
    x: read(distanceX, "distanceX", squares(shape.rows)),
    y: read(distanceY, "distanceY", squares(shape.columns)),
    cost: read(cost, "cost", shape.entries),
    a: read(problem.a, "a", shape.rowCount),
    b: read(problem.b, "b", shape.columnCount),
  };
  const batch = shape.createBatch(device, { streaming: false, backward: false });
  stack.defer(() => batch.close());
  const reports = tensors.createReports(shape.problems, OT_GROMOV_REPORT.byteLength);
  const plan = tensors.create(shape.entries);
  batch.set(native);
  batch.gromov(inputs, {
    alphas: Float64Array.from(alphas),
    plan: tensors.place(plan),
    reports: tensors.place(reports),
  });
  const solution = createSolution({ device, shape, tensors, batch, plan, reports });
  if (check) void solution.reports;
  stack.move(); // What it held is the solution's.
  return solution;
}
