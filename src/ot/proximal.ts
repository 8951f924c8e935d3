import type { Device } from "../device/device.ts";
import { refuse, type TransportProblem } from "./problem.ts";
import type { TransportSolution } from "./solution.ts";
import { solve } from "./solve.ts";

/** How {@linkcode proximalTransport} solves. */
export interface ProximalOptions {
  /** Weight of the proximity, above 0, for all or each. Default: 0.05, relative. */
  readonly epsilon?: number | readonly number[] | undefined;
  /** Whether `epsilon` is relative to the largest finite absolute cost. Default: false if `epsilon` is given. */
  readonly relativeEpsilon?: boolean | undefined;
  /**
   * The L1 error of the marginals, and what the cost may be above the least one relative to the mass times the largest
   * cost, to stop at, for all or each. Default: 1e-4.
   */
  readonly tolerance?: number | readonly number[] | undefined;
  /** The most proximal points, for all or each. Default: 2,000. */
  readonly iterations?: number | readonly number[] | undefined;
  /** Sinkhorn's iterations for each point. Default: 1. */
  readonly inner?: number | undefined;
  /** Whether to look at the reports at once: see {@linkcode SinkhornOptions.check}. Default: true. */
  readonly check?: boolean | undefined;
}

/**
 * Approaches transport without entropy by proximal points (IPOT, Xie et al., arXiv 1802.04307):
 * `T_k = argmin <T, C> + epsilon * KL(T | T_(k-1))`, each by a few of Sinkhorn's iterations. Unlike a small epsilon, it gets to
 * sharp plans with an epsilon that iterations cope with.
 *
 * A problem is `converged` if the marginal error is at most the tolerance, and the cost is certainly, by its dual, within
 * the tolerance of the least one. `iterations` of reports are points k; `epsilon` is the one divided by k, of which `f` and `g`
 * are potentials. Gradients are those of {@linkcode exactTransport}.
 *
 * Throws as {@linkcode sinkhorn}; `unsupported` on CUDA for what does not lie on chip: problems of up to 64 columns may have 2,048
 * rows there, of up to 128 columns 1,024, and of up to 512 columns 512.
 *
 * @example
 * ```ts
 * import { Device } from "@packhorse/packhorse/device";
 * import { proximalTransport } from "@packhorse/packhorse/ot";
 * import { assert, assertAlmostEquals } from "@std/assert";
 *
 * using device = Device.open({ backend: "cpu" });
 * const cost = Float64Array.of(4, 1, 3, 2, 0, 5, 3, 2, 2);
 * using solution = proximalTransport(device, { cost, rows: 3, columns: 3 });
 * assert(solution.converged);
 * assertAlmostEquals(solution.reports[0]!.cost, (1 + 2 + 2) / 3, 1e-3);
 * ```
 */
export function proximalTransport(
  device: Device,
  problem: TransportProblem,
  options: ProximalOptions = {},
): TransportSolution {
  const { inner = 1, tolerance = 1e-4, iterations = 2000, ...others } = options;
  if (!(Number.isInteger(inner) && inner >= 1 && inner < 2 ** 31)) {
    refuse(`Cannot transport: inner must be an integer of 1 or more, got ${inner}`);
  }
  return solve(device, problem, {
    options: { ...others, tolerance, iterations },
    regularised: false,
    run: (batch, solution) => batch.proximal(solution, inner),
  });
}
