/**
 * Gradients of transport on every backend that opens here, against central differences: on the CPU of float64 problems, solved
 * to the last digits; elsewhere against gradients of the reference's own.
 */
import { assert, assertEquals, assertGreater, assertLess, assertLessOrEqual } from "@std/assert";
import {
  type GradientMode,
  type PointCost,
  sinkhorn,
  type SinkhornOptions,
  type SolutionGradients,
  type TransportProblem,
} from "../src/ot/mod.ts";
import { Device } from "../src/device/mod.ts";
import { backends } from "./backends.ts";
import { randomOf } from "./kv_cases.ts";
import { arrayOf, dot, gaussian, masses, randoms, refuses, testOnDevices } from "./ot_support.ts";

/** What a loss is of, and its gradients. */
interface Loss {
  readonly of: SolutionGradients;
  readonly mode?: GradientMode;
}

/** A random problem whose inputs may be perturbed. */
interface Inputs {
  readonly cost?: Float64Array<ArrayBuffer>;
  readonly x?: Float64Array<ArrayBuffer>;
  readonly y?: Float64Array<ArrayBuffer>;
  readonly a: Float64Array<ArrayBuffer>;
  readonly b: Float64Array<ArrayBuffer>;
}

const dimension = 3;
const rows = [1, 4, 9, 6];
const columns = [5, 4, 6, 13];
const count = (sizes: number[]) => sizes.reduce((sum, size) => sum + size, 0);

function problemOf(inputs: Inputs, cost: PointCost): TransportProblem {
  const { a, b } = inputs;
  return inputs.cost
    ? { cost: inputs.cost, rows, columns, a, b }
    : { x: inputs.x!, y: inputs.y!, dimension, cost, rows, columns, a, b };
}

function inputsOf(seed: number, points: boolean): Inputs {
  const random = randomOf(seed);
  const join = (sizes: number[]) =>
    Float64Array.from(sizes.flatMap((size) => [...masses(size, random)]));
  const entries = rows.reduce((sum, n, p) => sum + n * columns[p]!, 0);
  return {
    ...(points
      ? {
        x: randoms(count(rows) * dimension, () => gaussian(random)),
        y: randoms(count(columns) * dimension, () => gaussian(random)),
      }
      : { cost: randoms(entries, random) }),
    a: join(rows),
    b: join(columns),
  };
}

/** The loss of a solution, linear in each of its results. */
function lossOf(
  device: Device,
  problem: TransportProblem,
  options: SinkhornOptions,
  { of }: Loss,
): number {
  using solution = sinkhorn(device, problem, options);
  const { reports } = solution;
  const finite = (values: ArrayLike<number>) =>
    Array.from(values, (value) => Number.isFinite(value) ? value : 0);
  const weigh = (weights: unknown, values: ArrayLike<number>) =>
    weights ? dot(weights as Float64Array, values) : 0;
  return weigh(of.plan, solution.plan.download()) +
    weigh(of.f, finite(solution.f.download())) + weigh(of.g, finite(solution.g.download())) +
    weigh(of.cost, reports.map(({ cost }) => cost)) +
    weigh(of.value, reports.map(({ value }) => value));
}

/** Differences along random directions, relative to the gradient's size; masses keep their totals. */
function largestError(
  device: Device,
  inputs: Inputs,
  { kind = "sqeuclidean", options, loss, seed }: {
    kind?: PointCost;
    options: SinkhornOptions;
    loss: Loss;
    seed: number;
  },
): number {
  const random = randomOf(seed);
  using solution = sinkhorn(device, problemOf(inputs, kind), options);
  using gradients = solution.backward(loss.of, { mode: loss.mode });
  let worst = 0;
  for (const name of ["cost", "x", "y", "a", "b"] as const) {
    const values = inputs[name];
    if (!values) continue;
    const gradient = gradients[name]!.download() as Float64Array;
    assert(gradient.every(Number.isFinite), `${name}: ${gradient}`);
    for (let direction = 0; direction < 2; direction++) {
      const step = Float64Array.from(values, () => gaussian(random));
      if (name === "a" || name === "b") {
        let start = 0;
        for (const size of name === "a" ? rows : columns) {
          const part = step.subarray(start, start + size);
          const own = values.subarray(start, start + size);
          part.forEach((_, i) => part[i] = own[i] === 0 ? 0 : part[i]! * own[i]!);
          const total = part.reduce((sum, value) => sum + value, 0);
          if (options.penalty === undefined) {
            part.forEach((_, i) => part[i]! -= total * own[i]!);
          }
          start += size;
        }
      }
      const h = 1e-5;
      const [plus, minus] = [h, -h].map((size) =>
        lossOf(
          device,
          problemOf({ ...inputs, [name]: values.map((v, i) => v + size * step[i]!) }, kind),
          options,
          loss,
        )
      );
      const difference = (plus! - minus!) / (2 * h);
      const scale = Math.sqrt(dot(gradient, gradient) * dot(step, step)) / 10 + 1e-6;
      const error = Math.abs(dot(gradient, step) - difference) /
        Math.max(Math.abs(difference), scale);
      worst = Math.max(worst, error);
    }
  }
  return worst;
}

const exact = { epsilon: 0.3, tolerance: 1e-13, iterations: 20_000 };

function randomGradients(seed: number, names: readonly (keyof SolutionGradients)[]): Loss["of"] {
  const random = randomOf(seed);
  const lengths = {
    plan: rows.reduce((sum, n, p) => sum + n * columns[p]!, 0),
    f: count(rows),
    g: count(columns),
    cost: rows.length,
    value: rows.length,
  };
  const of = Object.fromEntries(
    names.map((name) => [name, randoms(lengths[name], () => gaussian(random))]),
  ) as { -readonly [Name in keyof Loss["of"]]: Float64Array<ArrayBuffer> };
  // A loss of the potentials must not change with their constants.
  if (of.f && of.g) {
    let [row, column] = [0, 0];
    rows.forEach((n, p) => {
      const m = columns[p]!;
      const f = of.f!.subarray(row, row + n);
      const g = of.g!.subarray(column, column + m);
      const sum = (values: Float64Array) => values.reduce((total, value) => total + value, 0);
      g[0]! += sum(f) - sum(g);
      row += n;
      column += m;
    });
  }
  return of;
}

// Central differences need doubles.
function testOnCpu(name: string, work: (device: Device) => void): void {
  if (!backends().includes("cpu")) return;
  Deno.test(`ot: cpu: ${name}`, () => {
    using device = Device.open({ backend: "cpu" });
    work(device);
  });
}

testOnCpu("implicit gradients are those of central differences, for any loss", (device) => {
  for (const points of [false, true]) {
    for (
      const names of [["plan"], ["cost"], ["value"], ["f", "g"], [
        "plan",
        "cost",
        "value",
        "f",
        "g",
      ]] as const
    ) {
      for (const kind of ["sqeuclidean", "euclidean", "cosine", "dot"] as const) {
        if (!points && kind !== "sqeuclidean") continue;
        const seed = 21;
        const loss = { of: randomGradients(seed, names) };
        const error = largestError(device, inputsOf(seed, points), {
          kind,
          options: exact,
          loss,
          seed,
        });
        assertLess(error, 1e-6, `seed ${seed}, ${points ? kind : "matrix"}, ${names}`);
      }
    }
  }
});

testOnCpu("the envelope is exact for the value, and wrong for the cost alone", (device) => {
  const seed = 22;
  const inputs = inputsOf(seed, true);
  const error = (name: "value" | "cost", mode: GradientMode) =>
    largestError(device, inputs, {
      options: exact,
      loss: { of: randomGradients(seed, [name]), mode },
      seed,
    });
  assertLess(error("value", "envelope"), 1e-7);
  assertLess(error("cost", "implicit"), 1e-6);
  assertGreater(error("cost", "envelope"), 0.05);
});

testOnCpu("unrolled gradients are those of the iterations that were made", (device) => {
  const seed = 23;
  for (
    const options of [
      { epsilon: 0.2, iterations: 3, tolerance: 0 },
      { epsilon: 0.02, iterations: 12, tolerance: 0, relaxation: 1.4 },
      { epsilon: 0.2, iterations: 4, tolerance: 0, penalty: 0.7 },
    ] as SinkhornOptions[]
  ) {
    for (const points of [false, true]) {
      const loss = {
        of: randomGradients(seed, ["plan", "cost", "value", "f", "g"]),
        mode: "unrolled" as const,
      };
      const error = largestError(device, inputsOf(seed, points), { options, loss, seed });
      assertLess(error, 1e-5, `${JSON.stringify(options)}, ${points}`);
    }
  }
});

testOnCpu("unrolled gradients approach the implicit ones as iterations go on", (device) => {
  const seed = 24;
  const problem = problemOf(inputsOf(seed, false), "sqeuclidean");
  const of = randomGradients(seed, ["plan"]);
  using solution = sinkhorn(device, problem, exact);
  using scaled = sinkhorn(device, problem, { ...exact, scaling: 0.5 });
  using implicit = solution.backward(of);
  using unrolled = solution.backward(of, { mode: "unrolled" });
  using through = scaled.backward(of, { mode: "unrolled" });
  const [one, ...others] = [implicit, unrolled, through].map(({ cost }) => cost!.download());
  for (const other of others) {
    assertLess(Math.max(...one!.map((value, k) => Math.abs(value - other[k]!))), 1e-9);
  }
});

testOnCpu("detached gradients take plan and potentials for constants", (device) => {
  const seed = 25;
  const problem = problemOf(inputsOf(seed, false), "sqeuclidean");
  using solution = sinkhorn(device, problem, exact);
  const plan = solution.plan.download();
  const one = Float64Array.from(rows, () => 1);
  using gradients = solution.backward(
    { cost: one, plan: new Float64Array(plan.length).fill(9) },
    { mode: "detached" },
  );
  const gradient = gradients.cost!.download();
  assertLess(Math.max(...gradient.map((value, k) => Math.abs(value - plan[k]!))), 1e-12);
  assertEquals(gradients.a!.download(), new Float64Array(count(rows)));
});

testOnCpu("gradients where rows have no mass, and pairs are forbidden", (device) => {
  const seed = 26;
  const base = inputsOf(seed, false);
  const [a, b] = [base.a.slice(), base.b.slice()];
  // Of the third problem: a row and a column.
  const move = (values: Float64Array, from: number, to: number) => {
    values[to]! += values[from]!;
    values[from] = 0;
  };
  move(a, 6, 7);
  move(b, 9, 10);
  const cost = base.cost!.slice();
  const start = 1 * 5 + 4 * 4 + 9 * 6; // of the fourth problem
  cost[start + 3] = cost[start + 20] = Infinity;
  const inputs = { a, b, cost };
  const loss = { of: randomGradients(seed, ["plan", "cost", "value"]) };
  using solution = sinkhorn(device, problemOf(inputs, "sqeuclidean"), exact);
  using gradients = solution.backward(loss.of);
  const gradient = gradients.cost!.download();
  assertEquals([gradient[start + 3], gradient[start + 20]], [0, 0]);
  assertEquals([gradients.a!.download()[6], gradients.b!.download()[9]], [0, 0]);
  assertLess(largestError(device, inputs, { options: exact, loss, seed }), 1e-6);
});

testOnCpu("gradients of unbalanced transport", (device) => {
  const seed = 27;
  for (const penalty of [{ a: 0.5, b: 0.5 }, { a: Infinity, b: 0.4 }, { a: 2, b: Infinity }]) {
    const loss = { of: randomGradients(seed, ["plan", "cost", "value"]) };
    for (const points of [false, true]) {
      const error = largestError(device, inputsOf(seed, points), {
        options: { ...exact, penalty },
        loss,
        seed,
      });
      assertLess(error, 1e-6, JSON.stringify(penalty));
    }
  }
});

testOnCpu("streaming gradients are those of central differences too", (device) => {
  const seed = 28;
  const options = { ...exact, streaming: true };
  for (const kind of ["sqeuclidean", "euclidean", "cosine", "dot"] as const) {
    const inputs = inputsOf(seed, true);
    using kept = sinkhorn(device, problemOf(inputs, kind), exact);
    using streamed = sinkhorn(device, problemOf(inputs, kind), options);
    const of = randomGradients(seed, ["cost", "value", "f", "g"]);
    using one = kept.backward(of);
    using two = streamed.backward(of);
    for (const name of ["x", "y"] as const) {
      const [x, y] = [one[name]!.download(), two[name]!.download()];
      const worst = Math.max(...x.map((value, k) => Math.abs(value - y[k]!)));
      assertLess(worst, 1e-8, `${kind}: ${name}`);
    }
    // Those of masses are known up to a constant of each problem.
    const sums = [one, two].map(({ a, b }) => {
      const [rowValues, columnValues] = [a!.download(), b!.download()];
      let [row, column] = [0, 0];
      return rows.flatMap((n, p) => {
        const m = columns[p]!;
        const own = [];
        for (let k = 0; k < n * m; k++) {
          own.push(rowValues[row + Math.floor(k / m)]! + columnValues[column + k % m]!);
        }
        row += n;
        column += m;
        return own;
      });
    });
    const worst = Math.max(...sums[0]!.map((value, k) => Math.abs(value - sums[1]![k]!)));
    assertLess(worst, 1e-7, `${kind}: masses`);
  }
  using solution = sinkhorn(device, problemOf(inputsOf(seed, true), "dot"), options);
  refuses(
    "invalid-argument",
    () => solution.backward(randomGradients(seed, ["plan"])),
    "streaming",
  );
  refuses(
    "unsupported",
    () => solution.backward(randomGradients(seed, ["value"]), { mode: "unrolled" }),
    "implicit",
  );
});

testOnCpu("small epsilons keep their digits", (device) => {
  const seed = 29;
  const loss = { of: randomGradients(seed, ["plan", "cost"]) };
  const options = { epsilon: 0.02, tolerance: 1e-12, iterations: 200_000, relaxation: 1.5 };
  const error = largestError(device, inputsOf(seed, false), { options, loss, seed });
  assertLess(error, 1e-3);
});

testOnDevices(
  "a converged problem's gradient does not depend on the iterations it took",
  (device, dtypes) => {
    const seed = 30;
    const inputs = inputsOf(seed, true);
    for (const dtype of dtypes) {
      const make = (values: Iterable<number>) => arrayOf(dtype, values);
      const problem = {
        x: make(inputs.x!),
        y: make(inputs.y!),
        a: make(inputs.a),
        b: make(inputs.b),
        rows,
        columns,
        dimension,
      };
      const of = { plan: make(randomGradients(seed, ["plan"]).plan as Float64Array) };
      const options = { epsilon: 0.5, tolerance: 1e-6 };
      using plain = sinkhorn(device, problem, options);
      using scaled = sinkhorn(device, problem, { ...options, scaling: 0.7 });
      using warm = sinkhorn(device, problem, { ...options, start: scaled });
      assert(plain.converged && scaled.converged && warm.converged);
      const used = (solution: typeof plain) =>
        solution.reports.reduce((sum, { iterations }) => sum + iterations, 0);
      assertGreater(used(plain), used(warm));
      const [first, ...others] = [plain, scaled, warm].map((solution) => {
        using gradients = solution.backward(of);
        return gradients.x!.download();
      });
      const size = Math.max(...first!.map(Math.abs));
      for (const other of others) {
        const worst = Math.max(...first!.map((value, k) => Math.abs(value - other[k]!)));
        assertLessOrEqual(worst, 1e-4 * size, dtype);
      }
    }
  },
);

testOnDevices("gradients in float32 are those of float64", (device) => {
  const seed = 31;
  const inputs = inputsOf(seed, true);
  // What a float32 problem is in doubles.
  const rounded = Object.fromEntries(
    Object.entries(inputs).map(([name, values]) => [name, values.map(Math.fround)]),
  ) as unknown as Inputs;
  using cpu = Device.open({ backend: "cpu" });
  const options = { epsilon: 0.5, tolerance: 1e-6 };
  const of = randomGradients(seed, ["plan", "cost", "value"]);
  for (const kind of ["sqeuclidean", "euclidean", "cosine", "dot"] as const) {
    using expected = sinkhorn(cpu, problemOf(rounded, kind), { ...options, tolerance: 1e-13 });
    using wide = expected.backward(of);
    const narrow = Object.fromEntries(
      Object.entries(problemOf(inputs, kind)).map(([name, value]) => [
        name,
        value instanceof Float64Array ? Float32Array.from(value) : value,
      ]),
    ) as unknown as TransportProblem;
    using solution = sinkhorn(device, narrow, options);
    using gradients = solution.backward(
      Object.fromEntries(
        Object.entries(of).map((
          [name, values],
        ) => [name, Float32Array.from(values as Float64Array)]),
      ),
    );
    for (const name of ["x", "y"] as const) {
      const [one, two] = [wide[name]!.download(), gradients[name]!.download()];
      const size = Math.max(...one.map(Math.abs));
      const worst = Math.max(...one.map((value, k) => Math.abs(value - two[k]!)));
      assertLessOrEqual(worst, 1e-4 * size, `${kind}: ${name}`);
    }
  }
});
