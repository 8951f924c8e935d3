/**
 * Gradients of problems that do not lie on a GPU's multiprocessors, and of streaming ones, on every backend that opens here:
 * float32 against float64 on the CPU, which solves its linear system by elimination.
 */
import { assert, assertEquals, assertLessOrEqual } from "@std/assert";
import {
  type GradientMode,
  type PointCost,
  sinkhorn,
  type SinkhornOptions,
  type SolutionGradients,
  type TransportProblem,
} from "../src/ot/mod.ts";
import { Device } from "../src/device/mod.ts";
import { randomOf } from "./kv_cases.ts";
import { gaussian, masses, randoms, testOnDevices } from "./ot_support.ts";

/** Two problems after one another: the second is large. */
const sizes = { rows: [7, 530], columns: [12, 520] };
const count = (values: readonly number[]) => values.reduce((sum, value) => sum + value, 0);
const rows = count(sizes.rows);
const columns = count(sizes.columns);
const entries = sizes.rows.reduce((sum, n, p) => sum + n * sizes.columns[p]!, 0);
const dimension = 5;

function problemOf(seed: number, kind: PointCost | "matrix"): TransportProblem {
  const random = randomOf(seed);
  const join = (all: readonly number[]) =>
    Float64Array.from(all.flatMap((size) => [...masses(size, random, 0.05)])).map(Math.fround);
  const given = { ...sizes, a: join(sizes.rows), b: join(sizes.columns) };
  if (kind === "matrix") return { ...given, cost: randoms(entries, random) };
  return {
    ...given,
    x: randoms(rows * dimension, () => gaussian(random)),
    y: randoms(columns * dimension, () => gaussian(random) + 0.3),
    dimension,
    cost: kind,
  };
}

const narrow = <T extends object>(values: T): T =>
  Object.fromEntries(
    Object.entries(values).map(([name, value]) => [
      name,
      value instanceof Float64Array ? Float32Array.from(value) : value,
    ]),
  ) as T;

function lossOf(seed: number, names: readonly (keyof SolutionGradients)[]): SolutionGradients {
  const random = randomOf(seed + 1);
  const lengths = { plan: entries, f: rows, g: columns, cost: 2, value: 2 };
  return Object.fromEntries(
    names.map((name) => {
      // Losses of potentials are small beside the others, of which there are more terms.
      const size = name === "plan" ? 5 : 1;
      return [name, randoms(lengths[name], () => size * gaussian(random))];
    }),
  ) as SolutionGradients;
}

/** What gradients of masses say: they are known up to a constant of each problem, and 0 where there is no mass. */
function sumsOfMasses(
  given: { a: ArrayLike<number>; b: ArrayLike<number> },
  a: ArrayLike<number>,
  b: ArrayLike<number>,
): number[] {
  let [row, column] = [0, 0];
  return sizes.rows.flatMap((n, p) => {
    const m = sizes.columns[p]!;
    const own = Array.from({ length: n + m }, (_, k) => {
      const [i, j] = [row + k % n, column + k % m];
      return given.a[i] === 0 || given.b[j] === 0 ? 0 : a[i]! + b[j]!;
    });
    row += n;
    column += m;
    return own;
  });
}

/** The largest difference of float32's gradients on a device from float64's, relative to the largest of them. */
function compare(
  device: Device,
  seed: number,
  { kind, names, mode, options }: {
    kind: PointCost | "matrix";
    names: readonly (keyof SolutionGradients)[];
    mode?: GradientMode;
    options?: SinkhornOptions;
  },
): void {
  const epsilon = kind === "matrix" ? 0.05 : kind === "cosine" ? 0.2 : 1;
  const problem = problemOf(seed, kind);
  const of = lossOf(seed, names);
  using cpu = Device.open({ backend: "cpu" });
  using wide = sinkhorn(cpu, problem, { epsilon, tolerance: 1e-12, iterations: 5000 });
  using solution = sinkhorn(device, narrow(problem), { epsilon, tolerance: 1e-6, ...options });
  assert(wide.converged && solution.converged, `seed ${seed}, ${kind}`);
  using expected = wide.backward(of, { mode });
  using actual = solution.backward(narrow(of), { mode });
  const check = (what: string, one: ArrayLike<number>, two: ArrayLike<number>) => {
    const size = Array.from(one).reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    assertEquals(two.length, one.length);
    let worst = 0;
    for (let k = 0; k < one.length; k++) {
      assert(Number.isFinite(two[k]), `seed ${seed}, ${kind}, ${names}: ${what}[${k}] = ${two[k]}`);
      worst = Math.max(worst, Math.abs(one[k]! - two[k]!));
    }
    assertLessOrEqual(worst, 1e-4 * size, `seed ${seed}, ${kind}, ${names}, ${mode}: ${what}`);
  };
  for (const name of ["cost", "x", "y"] as const) {
    if (!expected[name] || !actual[name]) continue;
    check(name, expected[name].download(), actual[name].download());
  }
  const masses = [expected, actual].map(({ a, b }) =>
    sumsOfMasses(problem as { a: Float64Array; b: Float64Array }, a!.download(), b!.download())
  );
  check("masses", masses[0]!, masses[1]!);
}

testOnDevices("gradients of large problems in float32 are those of float64", (device) => {
  for (const kind of ["matrix", "sqeuclidean", "euclidean", "cosine", "dot"] as const) {
    compare(device, 41, { kind, names: ["plan", "cost", "value", "f", "g"] });
  }
  compare(device, 42, { kind: "matrix", names: ["plan"] });
  compare(device, 43, { kind: "sqeuclidean", names: ["value"], mode: "envelope" });
  compare(device, 44, { kind: "euclidean", names: ["cost", "value"], mode: "detached" });
});

testOnDevices("streaming gradients in float32 are those of float64", (device) => {
  const options = { streaming: true };
  for (const kind of ["sqeuclidean", "euclidean", "cosine", "dot"] as const) {
    compare(device, 45, { kind, names: ["cost", "value", "f", "g"], options });
  }
  compare(device, 46, { kind: "dot", names: ["value"], mode: "envelope", options });
});

testOnDevices("gradients of large problems are the same every time", (device) => {
  const problem = narrow(problemOf(47, "sqeuclidean"));
  const of = narrow(lossOf(47, ["cost", "f"]));
  for (const streaming of [false, true]) {
    using solution = sinkhorn(device, problem, { epsilon: 1, tolerance: 1e-5, streaming });
    const [first, second] = [0, 1].map(() => {
      using gradients = solution.backward(of);
      return [gradients.x!, gradients.y!, gradients.a!, gradients.b!].map((each) =>
        each.download()
      );
    });
    assertEquals(first, second);
  }
});
