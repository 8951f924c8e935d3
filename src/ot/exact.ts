import type { Device } from "../device/device.ts";
import { refuse, type TransportProblem } from "./problem.ts";
import type { TransportSolution } from "./solution.ts";
import { solve } from "./solve.ts";

/** Masses to transport, of each problem; for this folder. */
export function massesOf(
  mass: number | readonly number[],
  problems: number,
): Float64Array<ArrayBuffer> {
  const masses = typeof mass === "number" ? Array<number>(problems).fill(mass) : mass;
  if (masses.length === problems) return Float64Array.from(masses);
  return refuse(
    `Cannot transport: mass must be a number, or one for each of ${problems} problems, ` +
      `got ${masses.length}`,
  );
}

/** How {@linkcode exactTransport} solves. */
export interface ExactOptions {
  /**
   * How much mass to transport, of all problems or of each: partial transport, with `T1 <= a` and `T'1 <= b`, whose totals
   * may differ. Above 0, and at most the lesser total. Default: all of it; the totals must be equal.
   */
  readonly mass?: number | readonly number[] | undefined;
  /** Whether to look at the reports at once: see {@linkcode SinkhornOptions.check}. Default: true. */
  readonly check?: boolean | undefined;
}

/**
 * Optimal transport without entropy: `min <T, C>` with `T1 = a` and `T'1 = b`, exactly, by shortest augmenting paths; or the
 * cheapest way to transport a part of the mass. Takes time of the order of `(n + m) n m`: on the CPU a second for n = m = 1,000
 * or so. On CUDA many problems are solved at once, each of at most 512 rows and 512 columns, in float64 like on the CPU; their
 * plans are basic solutions, of at most n + m - 1 entries, however many costs are equal.
 *
 * `f` and `g` of the solution are dual potentials: `f + g <= C`, with equality where mass goes. Its reports are `converged`,
 * or `infeasible` if the masses cannot go where costs are finite; `iterations` are augmenting paths, `value` is the cost, and
 * `epsilon` is 0. It has gradients of the cost in the modes `envelope` (the default here) and `detached`; of a part of the mass, with respect
 * to costs and points only.
 *
 * Throws as {@linkcode sinkhorn}; `unsupported` on CUDA for a problem of more than 512 rows or columns.
 *
 * @example
 * ```ts
 * import { Device } from "@packhorse/packhorse/device";
 * import { exactTransport } from "@packhorse/packhorse/ot";
 * import { assertAlmostEquals, assertEquals } from "@std/assert";
 *
 * using device = Device.open({ backend: "cpu" });
 * const cost = Float64Array.of(4, 1, 3, 2, 0, 5, 3, 2, 2);
 * using solution = exactTransport(device, { cost, rows: 3, columns: 3 });
 * assertAlmostEquals(solution.reports[0]!.cost, (1 + 2 + 2) / 3);
 * assertEquals([...solution.plan.download()].map((mass) => mass > 0), [
 *   ...[false, true, false],
 *   ...[true, false, false],
 *   ...[false, false, true],
 * ]);
 * using cheapest = exactTransport(device, { cost, rows: 3, columns: 3 }, { mass: 1 / 3 });
 * assertAlmostEquals(cheapest.reports[0]!.cost, 0); // from the second row to the second column
 * ```
 */
export function exactTransport(
  device: Device,
  problem: TransportProblem,
  options: ExactOptions = {},
): TransportSolution {
  const { mass, check } = options;
  return solve(device, problem, {
    options: { check, epsilon: 1 },
    regularised: false,
    partial: mass !== undefined,
    run: (batch, solution, { problems }) => {
      batch.exact(solution, mass === undefined ? undefined : massesOf(mass, problems));
    },
  });
}
