import type { Device } from "../device/device.ts";
import type { TransportArray, TransportProblem } from "./problem.ts";
import type { TransportSolution } from "./solution.ts";
import { solve } from "./solve.ts";

/** How {@linkcode sinkhorn} solves. Where it says so, a number for all problems, or one for each. */
export interface SinkhornOptions {
  /** Weight of the entropy, above 0, for all or each. Default: 0.05, relative. */
  readonly epsilon?: number | readonly number[] | undefined;
  /**
   * Whether `epsilon` is relative to the largest finite absolute cost of a problem (1 where all costs are 0). Default:
   * false if `epsilon` is given.
   */
  readonly relativeEpsilon?: boolean | undefined;
  /** The L1 error of the marginals, `sum |T1 - a| + sum |T'1 - b|`, to stop at, for all or each. Default: 1e-5. */
  readonly tolerance?: number | readonly number[] | undefined;
  /** The most iterations, for all or each; one updates both potentials. Default: 10,000. */
  readonly iterations?: number | readonly number[] | undefined;
  /**
   * Over-relaxation, from 1 (none) to less than 2, once the marginal error is below 5 % of the mass: fewer iterations
   * where epsilon is small. Default: 1.
   */
  readonly relaxation?: number | undefined;
  /**
   * Epsilon scaling: the factor, between 0 and 1, by which epsilon goes from the largest cost to its value. Fewer
   * iterations where epsilon is small. Default: none.
   */
  readonly scaling?: number | undefined;
  /**
   * Unbalanced transport: `penalty * KL(T1 | a)` instead of `T1 = a`, and likewise for columns; a number for both sides,
   * or one for each. Masses of rows and columns may then differ. Default: `Infinity`, balanced.
   */
  readonly penalty?: number | { readonly a: number; readonly b: number } | undefined;
  /** Where g starts: values, or an earlier solution of problems of the same sizes. Default: 0. */
  readonly start?: TransportArray | TransportSolution | undefined;
  /**
   * Whether to never hold the matrices of costs and plans, for large problems of points: memory is that of the points,
   * and costs are computed again in every iteration. Default: false.
   */
  readonly streaming?: boolean | undefined;
  /**
   * Whether to look at the reports at once, and throw if a problem is ill-formed. Waits for the device; else the first look at
   * {@linkcode TransportSolution.reports} does. Default: true.
   */
  readonly check?: boolean | undefined;
}

/**
 * Entropic optimal transport by Sinkhorn's iterations: for each problem, of sizes of its own,
 *
 * `T = argmin <T, C> - epsilon * H(T)`, `H(T) = -sum T (log T - 1)`, with `T1 = a` and `T'1 = b`.
 *
 * Each problem stops by itself, and says how it ended ({@linkcode TransportSolution.reports}): `converged`,
 * `iteration-limit`, or `infeasible`, if a row or a column with mass has no partner of finite cost. Potentials and plans are
 * never NaN. On the CPU all is computed in float64, whatever the type of the arrays. Rows and columns without mass take no
 * part: their potential is `-Infinity`.
 *
 * Throws `non-finite` for a NaN, or an infinity that is no cost of `Infinity`, naming problem and index;
 * `invalid-argument` for sizes, options or masses that are none, and for masses whose totals differ by more than 1e-4
 * (smaller differences: b is scaled); `unsupported` for what the backend cannot do (CUDA: f64); `out-of-memory`;
 * `disposed`.
 *
 * @example Two problems of different sizes
 * ```ts
 * import { Device } from "@packhorse/packhorse/device";
 * import { sinkhorn } from "@packhorse/packhorse/ot";
 * import { assert, assertAlmostEquals } from "@std/assert";
 *
 * using device = Device.open({ backend: "cpu" });
 * const x = Float32Array.of(0, 0, 1, 0, 5, 5); // two points, and one
 * const y = Float32Array.of(0, 1, 1, 1, 5, 6, 6, 6); // two points, and two
 * using solution = sinkhorn(device, { x, y, dimension: 2, rows: [2, 1], columns: [2, 2] }, {
 *   epsilon: 0.1,
 * });
 * assert(solution.reports.every(({ status }) => status === "converged"));
 * assertAlmostEquals(solution.reports[1]!.cost, 1.5);
 * const plan = solution.plan.download(); // [2, 2], then [1, 2]
 * assertAlmostEquals(plan[4]! + plan[5]!, 1, 1e-5);
 * ```
 *
 * @example The gradient of the value with respect to the points
 * ```ts
 * import { Device } from "@packhorse/packhorse/device";
 * import { sinkhorn } from "@packhorse/packhorse/ot";
 * import { assertAlmostEquals } from "@std/assert";
 *
 * using device = Device.open({ backend: "cpu" });
 * const x = Float64Array.of(0);
 * const y = Float64Array.of(3);
 * using solution = sinkhorn(device, { x, y, dimension: 1 }, { epsilon: 1 });
 * using gradients = solution.backward({ value: Float64Array.of(1) });
 * assertAlmostEquals(gradients.x!.download()[0]!, -6); // of (x - y)^2
 * ```
 */
export function sinkhorn(
  device: Device,
  problem: TransportProblem,
  options: SinkhornOptions = {},
): TransportSolution {
  return solve(device, problem, {
    options,
    regularised: true,
    run: (batch, solution) => batch.sinkhorn(solution),
  });
}
