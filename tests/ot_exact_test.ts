/**
 * Transport without entropy, in part, by proximal points and debiased, on every backend that can: against all permutations,
 * another algorithm, and proofs by duality.
 */
import {
  assert,
  assertAlmostEquals,
  assertEquals,
  assertGreater,
  assertGreaterOrEqual,
  assertLessOrEqual,
} from "@std/assert";
import { exactTransport, proximalTransport, sinkhorn, sinkhornDivergence } from "../src/ot/mod.ts";
import { randomOf } from "./kv_cases.ts";
import { pointCosts, referenceLeastCost } from "./ot_reference.ts";
import {
  arrayOf,
  dot,
  gaussian,
  masses,
  randoms,
  refuses,
  testOnDevices,
  testWhereSupported,
} from "./ot_support.ts";

/** The least cost of all assignments. */
function bestAssignment(n: number, cost: ArrayLike<number>): number {
  let best = Infinity;
  const used = new Array(n).fill(false);
  const visit = (row: number, sum: number) => {
    if (row === n) best = Math.min(best, sum);
    for (let j = 0; j < n && row < n; j++) {
      if (used[j]) continue;
      used[j] = true;
      visit(row + 1, sum + cost[row * n + j]!);
      used[j] = false;
    }
  };
  visit(0, 0);
  return best;
}

testWhereSupported("exact: assignments are the best of all permutations", (device, dtypes) => {
  for (const dtype of dtypes) {
    for (let seed = 1; seed <= 20; seed++) {
      const random = randomOf(seed);
      const n = 1 + seed % 7;
      // Ties, as of small integers, are where searches go wrong.
      const cost = randoms(n * n, () => seed % 2 ? random() : Math.floor(4 * random()));
      using solution = exactTransport(device, { cost: arrayOf(dtype, cost), rows: n, columns: n });
      assertAlmostEquals(
        solution.reports[0]!.cost,
        bestAssignment(n, cost) / n,
        1e-6,
        `seed ${seed}`,
      );
    }
  }
});

testWhereSupported("exact: integer masses cost what another algorithm says", (device, dtypes) => {
  for (const dtype of dtypes) {
    for (let seed = 1; seed <= 12; seed++) {
      const random = randomOf(seed);
      const [n, m] = [1 + Math.floor(12 * random()), 1 + Math.floor(12 * random())];
      const a = Array.from({ length: n }, () => Math.floor(5 * random()));
      const b = Array<number>(m).fill(0);
      a[0]!++;
      const total = a.reduce((sum, value) => sum + value, 0);
      for (let k = 0; k < total; k++) b[Math.floor(m * random())]!++;
      const cost = randoms(n * m, () => seed % 2 ? gaussian(random) : Math.floor(5 * random()));
      using solution = exactTransport(device, {
        cost: arrayOf(dtype, cost),
        a: arrayOf(dtype, a),
        b: arrayOf(dtype, b),
        rows: n,
        columns: m,
      });
      const what = `seed ${seed}, ${n} x ${m}`;
      const expected = referenceLeastCost(n, m, cost, a, b);
      assertAlmostEquals(solution.reports[0]!.cost, expected, 1e-5, what);
      assertLessOrEqual(solution.reports[0]!.marginalError, 1e-12, what);
    }
  }
});

testWhereSupported("exact: the potentials prove that the cost is the least", (device, dtypes) => {
  for (const dtype of dtypes) {
    const random = randomOf(41);
    const dimension = 3;
    const sizes = [[1, 1], [1, 9], [40, 3], [100, 80], [400, 400]] as const;
    const problems = sizes.map(([n, m]) => ({
      x: randoms(n * dimension, () => gaussian(random)),
      y: randoms(m * dimension, () => gaussian(random)),
      a: Float64Array.from(masses(n, random, 0.1), Math.fround),
      b: Float64Array.from(masses(m, random, 0.1), Math.fround),
    }));
    const join = (name: "x" | "y" | "a" | "b") =>
      arrayOf(dtype, problems.flatMap((problem) => [...problem[name]]));
    using solution = exactTransport(device, {
      x: join("x"),
      y: join("y"),
      a: join("a"),
      b: join("b"),
      dimension,
      rows: sizes.map(([n]) => n),
      columns: sizes.map(([, m]) => m),
    });
    const [plan, f, g] = [solution.plan, solution.f, solution.g].map((each) => each.download());
    let [row, column] = [0, 0];
    problems.forEach(({ x, y, a, b }, p) => {
      const [n, m] = sizes[p]!;
      const what = `${dtype}, ${n} x ${m}`;
      const cost = pointCosts(x, y, dimension, "sqeuclidean");
      const own = plan!.subarray(solution.planOffsets[p], solution.planOffsets[p + 1]);
      const [rows, columns] = [new Float64Array(n), new Float64Array(m)];
      for (let i = 0; i < n; i++) {
        for (let j = 0; j < m; j++) {
          const slack = cost[i * m + j]! - f![row + i]! - g![column + j]!;
          assertGreaterOrEqual(slack, -1e-4, what);
          const entry = own[i * m + j]!;
          assertGreaterOrEqual(entry, 0);
          if (entry > 0) assertLessOrEqual(slack, 1e-4, what);
          rows[i]! += entry;
          columns[j]! += entry;
        }
      }
      const scale = a.reduce((s, v) => s + v, 0) / b.reduce((s, v) => s + v, 0);
      rows.forEach((sum, i) => assertAlmostEquals(sum, a[i]!, 1e-6, what));
      columns.forEach((sum, j) => assertAlmostEquals(sum, b[j]! * scale, 1e-6, what));
      const dual = dot(a, f!.subarray(row, row + n)) +
        dot(b, g!.subarray(column, column + m)) * scale;
      assertAlmostEquals(solution.reports[p]!.cost, dual, 1e-4, what);
      assertAlmostEquals(solution.reports[p]!.cost, dot(own, cost), 1e-4, what);
      assertEquals(solution.reports[p]!.epsilon, 0);
      row += n;
      column += m;
    });
  }
});

testWhereSupported("exact: forbidden pairs, infeasible problems, gradients", (device, dtypes) => {
  for (const dtype of dtypes) {
    // All rows have partners, but the first two only one between them: Hall's condition.
    const cost = arrayOf(dtype, [1, Infinity, Infinity, 1, Infinity, Infinity, 1, 1, 1]);
    using stuck = exactTransport(device, { cost, rows: 3, columns: 3 });
    assertEquals(stuck.reports[0]!.status, "infeasible");
    assertEquals(stuck.plan.download(), arrayOf(dtype, Array(9).fill(0)));
    using solution = exactTransport(device, {
      cost: arrayOf(dtype, [1, Infinity, 0, 5]),
      rows: 2,
      columns: 2,
    });
    assertAlmostEquals(solution.reports[0]!.cost, 3);
    using gradients = solution.backward({ cost: arrayOf(dtype, [2]) });
    assertEquals(gradients.cost!.download(), arrayOf(dtype, [1, 0, 0, 1]));
    refuses(
      "unsupported",
      () => solution.backward({ cost: arrayOf(dtype, [1]) }, { mode: "implicit" }),
      "envelope",
    );
    refuses(
      "non-finite",
      () => exactTransport(device, { cost: arrayOf(dtype, [NaN]), rows: 1, columns: 1 }),
      "index 0",
    );
  }
});

testWhereSupported("the slope of partial transport is that of the costs", (device) => {
  const dtype = device.backend === "cpu" ? "f64" : "f32";
  const costs = [1, 4, 3, 2, 7, 5, 3, 2, 6];
  const solved = (cost: readonly number[]) =>
    exactTransport(device, {
      cost: arrayOf(dtype, cost),
      a: arrayOf(dtype, [0.3, 0.25, 0.45]),
      b: arrayOf(dtype, [0.31, 0.36, 0.33]),
      rows: 3,
      columns: 3,
    }, { mass: 0.7 });
  using solution = solved(costs);
  const value = { value: arrayOf(dtype, [1]) };
  using gradients = solution.backward(value);
  assertEquals(Object.keys(gradients), ["cost"]);
  const slopes = gradients.cost!.download();
  costs.forEach((_, k) => {
    const [low, high] = [-0.125, 0.125].map((step) => {
      using moved = solved(costs.map((cost, i) => i === k ? cost + step : cost));
      return moved.reports[0]!.cost;
    }) as [number, number];
    assertAlmostEquals(slopes[k]!, (high - low) / 0.25, 1e-6, `cost ${k}`);
  });
  // Potentials know masses up to a constant, which counts here.
  refuses("unsupported", () => solution.backward(value, { to: ["a"] }), "masses");
});

testWhereSupported(
  "partial transport moves the mass asked for, at the least cost",
  (device, dtypes) => {
    for (const dtype of dtypes) {
      for (let seed = 1; seed <= 6; seed++) {
        const random = randomOf(seed);
        const [n, m] = [2 + seed % 5, 7 - seed % 3];
        const a = Array.from({ length: n }, () => 1 + Math.floor(4 * random()));
        const b = Array.from({ length: m }, () => 1 + Math.floor(4 * random()));
        const sum = (values: number[]) => values.reduce((total, value) => total + value, 0);
        const mass = Math.ceil(0.6 * Math.min(sum(a), sum(b)));
        const cost = randoms(n * m, random);
        const problem = {
          cost: arrayOf(dtype, cost),
          a: arrayOf(dtype, a),
          b: arrayOf(dtype, b),
          rows: n,
          columns: m,
        };
        using solution = exactTransport(device, problem, { mass });
        // The same with what is left behind, at a price so high that as little as can be goes from one to the other.
        const wide = new Float64Array((n + 1) * (m + 1));
        for (let i = 0; i < n; i++) {
          for (let j = 0; j < m; j++) wide[i * (m + 1) + j] = cost[i * m + j]!;
        }
        wide[wide.length - 1] = 1e6;
        const expected = referenceLeastCost(n + 1, m + 1, wide, [...a, sum(b) - mass], [
          ...b,
          sum(a) - mass,
        ]);
        assertAlmostEquals(solution.reports[0]!.cost, expected, 1e-5, `seed ${seed}`);
        const plan = Float64Array.from(solution.plan.download());
        assertAlmostEquals(plan.reduce((total, entry) => total + entry, 0), mass, 1e-5);
        for (let i = 0; i < n; i++) {
          const row = plan.subarray(i * m, (i + 1) * m);
          assertLessOrEqual(row.reduce((total, entry) => total + entry, 0), a[i]! + 1e-6);
        }
        refuses("invalid-argument", () => exactTransport(device, problem, { mass: 1000 }), "mass");
        refuses("invalid-argument", () => exactTransport(device, problem, { mass: 0 }), "0");
      }
    }
  },
);

testWhereSupported("proximal points approach the exact cost, and prove it", (device, dtypes) => {
  for (const dtype of dtypes) {
    const random = randomOf(43);
    const dimension = 2;
    const sizes = [[1, 1], [10, 10], [30, 45], [60, 60]] as const;
    const count = (side: 0 | 1) => sizes.reduce((sum, size) => sum + size[side], 0);
    const problem = {
      x: arrayOf(dtype, randoms(count(0) * dimension, random)),
      y: arrayOf(dtype, randoms(count(1) * dimension, random)),
      dimension,
      rows: sizes.map(([n]) => n),
      columns: sizes.map(([, m]) => m),
    };
    const tolerance = 1e-3;
    using exact = exactTransport(device, problem);
    using proximal = proximalTransport(device, problem, { tolerance });
    using entropic = sinkhorn(device, problem);
    proximal.reports.forEach((report, p) => {
      assertEquals(report.status, "converged");
      const least = exact.reports[p]!.cost;
      // The largest squared distance in the unit square is below 2.
      assertLessOrEqual(Math.abs(report.cost - least), 2 * tolerance);
      if (p > 0) assertGreater(entropic.reports[p]!.cost - least, report.cost - least);
    });
    assert(proximal.plan.download().every((entry) => entry >= 0));
    using short = proximalTransport(device, problem, { tolerance: 1e-9, iterations: 3 });
    assertEquals(short.reports[3]!.status, "iteration-limit");
    assertEquals(short.reports[3]!.iterations, 3);
  }
});

testOnDevices("divergences are 0 for equal points, and never below", (device, dtypes) => {
  for (const dtype of dtypes) {
    for (const cost of ["sqeuclidean", "euclidean", "cosine", "dot"] as const) {
      const random = randomOf(44);
      const dimension = 3;
      const sizes = [[1, 1], [8, 8], [20, 31]] as const;
      const rows = sizes.map(([n]) => n);
      const columns = sizes.map(([, m]) => m);
      const total = (list: readonly number[]) => list.reduce((sum, size) => sum + size, 0);
      const xs = randoms(total(rows) * dimension, () => gaussian(random));
      const ys = randoms(total(columns) * dimension, () => gaussian(random) + 0.1);
      const x = arrayOf(dtype, xs);
      const options = { epsilon: 0.1, relativeEpsilon: true };
      const rounding = dtype === "f64" ? 1e-8 : 2e-4;
      using same = sinkhornDivergence(device, {
        x,
        y: x,
        dimension,
        cost,
        rows,
        columns: rows,
      }, options);
      assert(same.converged);
      same.values.forEach((value) => assertAlmostEquals(value, 0, rounding, cost));
      using other = sinkhornDivergence(device, {
        x,
        y: arrayOf(dtype, ys),
        dimension,
        cost,
        rows,
        columns,
      }, options);
      assert(other.converged);
      other.values.forEach((value) => assertGreaterOrEqual(value, -rounding, cost));
      assertGreater(other.values[2]!, 1e-4);
      if (dtype === "f32") continue;
      const weights = [0.5, 2, -1];
      using gradients = other.backward(weights);
      const gradient = gradients.x!.download();
      const step = Float64Array.from(xs, () => gaussian(random));
      const absolute = {
        epsilon: other.reports.xy.map(({ epsilon }) => epsilon),
        tolerance: 1e-13,
      };
      const [plus, minus] = [1e-5, -1e-5].map((h) => {
        using moved = sinkhornDivergence(device, {
          x: xs.map((value, k) => value + h * step[k]!),
          y: arrayOf(dtype, ys),
          dimension,
          cost,
          rows,
          columns,
        }, absolute);
        return dot(moved.values, weights);
      });
      const size = Math.sqrt(dot(gradient, gradient));
      assertAlmostEquals(dot(gradient, step), (plus! - minus!) / 2e-5, 1e-4 * size, cost);
    }
  }
});
