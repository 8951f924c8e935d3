/**
 * Gradients of the iterations themselves on every backend that opens here, against those that a CPU takes of doubles, which
 * central differences confirm elsewhere.
 */
import { assert, assertEquals, assertLessOrEqual } from "@std/assert";
import { Device } from "../src/device/mod.ts";
import {
  type PointCost,
  sinkhorn,
  type SinkhornOptions,
  type SolutionGradients,
  type TransportDType,
  type TransportProblem,
  type TransportSolution,
} from "../src/ot/mod.ts";
import { randomOf } from "./kv_cases.ts";
import {
  arrayOf,
  assertClose,
  gaussian,
  masses,
  randoms,
  refuses,
  testOnDevices,
} from "./ot_support.ts";

const names = ["cost", "x", "y", "a", "b"] as const;
const dimension = 3;

interface Arrays {
  readonly [name: string]: Float64Array;
}

/** The same numbers in another type. */
function typed<T>(dtype: TransportDType, arrays: object): T {
  return Object.fromEntries(
    Object.entries(arrays).map(([name, values]) => [
      name,
      values instanceof Float64Array ? arrayOf(dtype, values) : values,
    ]),
  ) as T;
}

const total = (sizes: readonly number[]) => sizes.reduce((sum, size) => sum + size, 0);

/** Random problems of these sizes, and a loss of all of their results that does not change with a shift of f and g. */
function makeProblems(
  seed: number,
  sizes: readonly (readonly [number, number])[],
  cost: PointCost | "matrix",
) {
  const random = randomOf(seed);
  const [rows, columns] = [sizes.map(([n]) => n), sizes.map(([, m]) => m)];
  const entries = sizes.reduce((sum, [n, m]) => sum + n * m, 0);
  const draw = (count: number) => randoms(count, () => gaussian(random));
  const join = (side: readonly number[]) =>
    Float64Array.from(side.flatMap((size) => [...masses(size, random, 0.1).map(Math.fround)]));
  const inputs = cost === "matrix"
    ? { cost: randoms(entries, () => random() < 0.03 ? Infinity : random()) }
    : { x: draw(total(rows) * dimension), y: draw(total(columns) * dimension), dimension, cost };
  const [a, b] = [join(rows), join(columns)];
  const [f, g] = [draw(a.length), draw(b.length)];
  let [row, column] = [0, 0];
  for (const [n, m] of sizes) {
    // Massless rows and columns take no part.
    f.forEach((_, i) => f[i] = i >= row && i < row + n && a[i] === 0 ? 0 : f[i]!);
    g.forEach((_, j) => g[j] = j >= column && j < column + m && b[j] === 0 ? 0 : g[j]!);
    const first = b.findIndex((mass, j) => j >= column && mass > 0);
    const sum = (values: Float64Array) => values.reduce((all, value) => all + value, 0);
    g[first]! += sum(f.subarray(row, row + n)) - sum(g.subarray(column, column + m));
    row += n;
    column += m;
  }
  const loss = { plan: draw(entries), f, g, cost: draw(sizes.length), value: draw(sizes.length) };
  return { problem: { ...inputs, a, b, rows, columns }, loss };
}

function gradientsOf(
  solution: TransportSolution,
  of: SolutionGradients,
  mode: "unrolled" | "implicit" = "unrolled",
): Arrays {
  using gradients = solution.backward(of, { mode });
  return Object.fromEntries(
    names.flatMap((name) => {
      const gradient = gradients[name];
      return gradient ? [[name, Float64Array.from(gradient.download())]] : [];
    }),
  );
}

/** Asserts that gradients differ by no more than this part of the largest. */
function assertGradients(actual: Arrays, expected: Arrays, slack: number, what: string): void {
  assertEquals(Object.keys(actual), Object.keys(expected));
  for (const [name, values] of Object.entries(expected)) {
    const largest = values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    assert(largest > 0, `${what}: ${name}`);
    assertClose(actual[name]!, values, slack * largest, `${what}: ${name}`);
  }
}

const ragged = [[3, 5], [12, 9], [40, 33]] as const;
// More columns, all rows that a thread block of a GPU has, and more.
const wide = [[5, 70], [270, 6], [6, 140], [64, 300], [70, 130]] as const;

testOnDevices(
  "unrolled gradients are those of doubles, for as many iterations",
  (device, dtypes) => {
    using cpu = Device.open({ backend: "cpu" });
    const cases: readonly [
      SinkhornOptions & { iterations: number },
      readonly (readonly [number, number])[],
      PointCost | "matrix",
    ][] = [
      [{ epsilon: 0.3, iterations: 1 }, ragged, "matrix"],
      [{ epsilon: 0.3, iterations: 7 }, ragged, "sqeuclidean"],
      [{ epsilon: 0.3, iterations: 9 }, ragged, "euclidean"],
      [{ epsilon: 0.03, iterations: 30, relaxation: 1.4 }, ragged, "cosine"],
      [{ epsilon: 0.2, iterations: 6, penalty: 0.7 }, ragged, "matrix"],
      [
        {
          epsilon: 0.2,
          iterations: 75,
          penalty: { a: Infinity, b: 0.7 },
          relaxation: 1.2,
        },
        ragged,
        "dot",
      ],
      [{ epsilon: 0.3, iterations: 3 }, wide, "sqeuclidean"],
      [{ epsilon: 0.2, iterations: 4 }, wide, "matrix"],
      // More than a GPU's levels of states reach over.
      [{ epsilon: 0.01, iterations: 4200, relaxation: 1.1 }, [[3, 4]], "matrix"],
    ];
    cases.forEach(([given, sizes, kind], seed) => {
      const options = { ...given, tolerance: 0 };
      const { problem, loss } = makeProblems(600 + seed, sizes, kind);
      using expected = sinkhorn(cpu, problem as TransportProblem, options);
      const wanted = gradientsOf(expected, loss);
      for (const dtype of dtypes) {
        const what = `${dtype}, seed ${600 + seed}, ${kind}, ${JSON.stringify(given)}`;
        using solution = sinkhorn(device, typed<TransportProblem>(dtype, problem), options);
        const made = (of: TransportSolution) => of.reports.map(({ iterations }) => iterations);
        // In doubles the marginals may hold exactly after fewer.
        if (`${made(solution)}` !== `${made(expected)}`) {
          assertEquals(dtype, "f32");
          assertLessOrEqual(Math.max(...expected.reports.map((each) => each.marginalError)), 1e-12);
        }
        const gradients = gradientsOf(solution, typed<SolutionGradients>(dtype, loss));
        const slack = dtype === "f64" ? 1e-12 : 2e-5;
        // Of masses a constant is not known, for a's and against b's, and every iteration adds its rounding to it.
        const known = ({ a, b, ...others }: Arrays) => [others, { a: a!, b: b! }] as const;
        const [one, two] = [known(gradients), known(wanted)];
        assertGradients(one[0], two[0], slack, what);
        assertGradients(one[1], two[1], slack * (1 + given.iterations / 50), what);
      }
    });
  },
);

testOnDevices(
  "unrolled gradients of converged problems are the implicit ones",
  (device, dtypes) => {
    const { problem, loss } = makeProblems(620, ragged, "sqeuclidean");
    for (const dtype of dtypes) {
      const exact = typed<TransportProblem>(dtype, problem);
      const of = typed<SolutionGradients>(dtype, { plan: loss.plan, cost: loss.cost });
      const options = { epsilon: 0.6, tolerance: 2e-6, relaxation: 1.2 };
      using plain = sinkhorn(device, exact, options);
      using scaled = sinkhorn(device, exact, { ...options, scaling: 0.6 });
      assert(plain.converged && scaled.converged);
      const { x, y } = gradientsOf(plain, of, "implicit");
      for (const [name, solution] of Object.entries({ plain, scaled })) {
        const unrolled = gradientsOf(solution, of);
        assertGradients({ x: unrolled.x!, y: unrolled.y! }, { x: x!, y: y! }, 2e-3, name);
      }
      // From the solution itself one iteration is made, whose gradients are those of doubles.
      using cpu = Device.open({ backend: "cpu" });
      const start = Float64Array.from(scaled.g.download());
      using one = sinkhorn(cpu, problem as TransportProblem, {
        ...options,
        tolerance: 0,
        iterations: 2,
        start,
      });
      using two = sinkhorn(device, exact, {
        ...options,
        tolerance: 0,
        iterations: 2,
        start: arrayOf(dtype, start),
      });
      const [actual, wanted] = [two, one].map((solution, k) =>
        gradientsOf(solution, k === 0 ? of : { plan: loss.plan, cost: loss.cost })
      );
      assertGradients(actual!, wanted!, 2e-5, dtype);
    }
  },
);

testOnDevices(
  "unrolled gradients: the same bits alone, again, and beside others",
  (device, dtypes) => {
    const sizes = [[20, 30], [3, 5], [3, 90], [64, 64], [11, 12]] as const;
    const parts = sizes.map((size, p) => makeProblems(630 + p, [size], "sqeuclidean"));
    for (const dtype of dtypes) {
      const taken = (chosen: readonly number[]) => {
        const join = (read: (part: typeof parts[number]) => Float64Array) =>
          arrayOf(dtype, chosen.flatMap((p) => [...read(parts[p]!)]));
        const of = (name: string) => join(({ problem }) => (problem as unknown as Arrays)[name]!);
        using solution = sinkhorn(device, {
          x: of("x"),
          y: of("y"),
          a: of("a"),
          b: of("b"),
          rows: chosen.map((p) => sizes[p]![0]),
          columns: chosen.map((p) => sizes[p]![1]),
          dimension,
        }, { epsilon: 0.4, iterations: chosen.map((p) => 3 + 4 * p), tolerance: 0 });
        const { x, a } = gradientsOf(solution, {
          plan: join(({ loss }) => loss.plan),
          value: join(({ loss }) => loss.value),
        });
        let row = 0;
        return chosen.map((p) => {
          const [first, last] = [row, row += sizes[p]![0]];
          return { x: x!.slice(first * dimension, last * dimension), a: a!.slice(first, last) };
        });
      };
      const every = sizes.map((_, p) => p);
      const together = taken(every);
      assertEquals(taken(every), together);
      every.forEach((p) => assertEquals(taken([p]), [together[p]!]));
    }
  },
);

testOnDevices(
  "unrolled gradients without an answer, or of what does not lie on chip",
  (device, dtypes) => {
    for (const dtype of dtypes) {
      using none = sinkhorn(device, {
        cost: arrayOf(dtype, [1, 2, Infinity, Infinity, 3, 1, 2, 2]),
        rows: [2, 2],
        columns: [2, 2],
      }, { epsilon: 1, iterations: 2 });
      assertEquals(none.reports[0]!.status, "infeasible");
      const { cost, a } = gradientsOf(none, { plan: arrayOf(dtype, [1, 2, 3, 4, 1, -1, 2, 5]) });
      assertEquals([...cost!.subarray(0, 4), ...a!.subarray(0, 2)], [0, 0, 0, 0, 0, 0]);
      assert(cost!.subarray(4).every((value) => value !== 0));
    }
    if (device.backend === "cpu") return;
    using solution = sinkhorn(device, {
      cost: new Float32Array(2 * 600),
      rows: 2,
      columns: 600,
    }, { iterations: 1 });
    refuses(
      "unsupported",
      () => solution.backward({ value: Float32Array.of(1) }, { mode: "unrolled" }),
      "problem 0 of 2 x 600",
      "CPU device",
    );
  },
);
