import type { Device } from "../device/device.ts";
import { massesOf } from "./exact.ts";
import type { TransportProblem } from "./problem.ts";
import type { TransportSolution } from "./solution.ts";
import { solve } from "./solve.ts";

/** How {@linkcode partialSinkhorn} solves. */
export interface PartialOptions {
  /** How much mass to transport, of all problems or of each: above 0, and at most the lesser total. */
  readonly mass: number | readonly number[];
  /** Weight of the entropy, above 0, for all or each. Default: 0.05, relative. */
  readonly epsilon?: number | readonly number[] | undefined;
  /** Whether `epsilon` is relative to the largest finite absolute cost. Default: false if `epsilon` is given. */
  readonly relativeEpsilon?: boolean | undefined;
  /**
   * The {@linkcode TransportReport.marginalError} to stop at, for all or each: here what rows and columns get above their
   * mass, and what those lack that have a price, as they are used up. Default: 1e-5.
   */
  readonly tolerance?: number | readonly number[] | undefined;
  /** The most iterations, for all or each. Default: 10,000. */
  readonly iterations?: number | readonly number[] | undefined;
  /** Whether to look at the reports at once: see {@linkcode SinkhornOptions.check}. Default: true. */
  readonly check?: boolean | undefined;
}

/**
 * Entropic transport of a part of the mass:
 *
 * `T = argmin <T, C> - epsilon * H(T)`, with `T1 <= a`, `T'1 <= b` and a total of `mass`. Totals of a and b may differ.
 *
 * `T = exp((f + g - C) / epsilon)` as {@linkcode sinkhorn}'s. What is left behind is chosen by the costs: points that have no
 * partner nearby. Gradients of the value with respect to costs and points are exact in the mode `envelope` (the default
 * here); there are none with respect to masses, and none in the mode `implicit`.
 *
 * Computes in float64 on every backend. Throws as {@linkcode sinkhorn}, and `invalid-argument` for a mass that is not there;
 * `unsupported` on CUDA for a problem of more than 512 rows or columns.
 *
 * @example An outlier stays
 * ```ts
 * import { Device } from "@packhorse/packhorse/device";
 * import { partialSinkhorn } from "@packhorse/packhorse/ot";
 * import { assertAlmostEquals } from "@std/assert";
 *
 * using device = Device.open({ backend: "cpu" });
 * const x = Float64Array.of(0, 1, 100);
 * const y = Float64Array.of(0, 1, 2);
 * using solution = partialSinkhorn(device, { x, y, dimension: 1 }, { mass: 2 / 3, epsilon: 0.01 });
 * assertAlmostEquals(solution.reports[0]!.cost, 0, 1e-6);
 * assertAlmostEquals(solution.plan.download()[0]!, 1 / 3, 1e-5);
 * ```
 */
export function partialSinkhorn(
  device: Device,
  problem: TransportProblem,
  options: PartialOptions,
): TransportSolution {
  const { mass, ...others } = options;
  return solve(device, problem, {
    options: others,
    regularised: false,
    partial: true,
    run: (batch, solution, { problems }) => batch.partial(solution, massesOf(mass, problems)),
  });
}
