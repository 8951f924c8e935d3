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
  AssertionError,
  assertLessOrEqual,
} from "@std/assert";
import { Device } from "../src/device/mod.ts";
import {
  exactTransport,
  proximalTransport,
  sinkhorn,
  sinkhornDivergence,
  type TransportDType,
  type TransportSolution,
} from "../src/ot/mod.ts";
import { randomOf } from "./kv_cases.ts";
import { pointCosts, referenceLeastCost } from "./ot_reference.ts";
import {
  arrayOf,
  assertClose,
  dot,
  gaussian,
  masses,
  randoms,
  refuses,
  testOnDevices,
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

testOnDevices("exact: assignments are the best of all permutations", (device, dtypes) => {
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

testOnDevices("exact: integer masses cost what another algorithm says", (device, dtypes) => {
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

/** One problem, whose costs are known in doubles; masses of float32, or uniform. */
interface Known {
  readonly n: number;
  readonly m: number;
  readonly cost: ArrayLike<number>;
  readonly a?: ArrayLike<number>;
  readonly b?: ArrayLike<number>;
}

/**
 * Proves by duality that plans of all mass are optimal: marginals hold, f + g is nowhere above the costs, and equals them where
 * mass goes. All to `slack`, relative to the largest cost and the total.
 */
function assertOptimal(
  solution: TransportSolution,
  problems: readonly Known[],
  slack: number,
  what: string,
): void {
  const [plan, f, g] = [solution.plan, solution.f, solution.g].map((each) => each.download());
  let [row, column] = [0, 0];
  problems.forEach(({ n, m, cost, a, b }, p) => {
    const name = `${what}, problem ${p}: ${n} x ${m}`;
    const report = solution.reports[p]!;
    assertEquals(report.status, "converged", name);
    assertEquals(report.epsilon, 0, name);
    assertEquals(report.value, report.cost, name);
    const sum = (values: ArrayLike<number>) => Array.from(values).reduce((s, v) => s + v, 0);
    const total = a ? sum(a) : 1;
    const scale = total / (b ? sum(b) : 1);
    const own = plan!.subarray(solution.planOffsets[p], solution.planOffsets[p + 1]);
    let most = 1e-30;
    for (let k = 0; k < n * m; k++) {
      if (cost[k]! < Infinity) most = Math.max(most, Math.abs(cost[k]!));
    }
    const [rows, columns] = [new Float64Array(n), new Float64Array(m)];
    let [least, used, dual, linear, support] = [Infinity, -Infinity, 0, 0, 0];
    for (let i = 0; i < n; i++) {
      for (let j = 0; j < m; j++) {
        const left = cost[i * m + j]! - f![row + i]! - g![column + j]!;
        least = Math.min(least, left);
        const entry = own[i * m + j]!;
        if (!(entry >= 0)) throw new AssertionError(`${name}: an entry is ${entry}`);
        if (entry === 0) continue;
        support++;
        used = Math.max(used, left);
        linear += entry * cost[i * m + j]!;
        rows[i]! += entry;
        columns[j]! += entry;
      }
    }
    const rounding = slack * most;
    assertGreaterOrEqual(least, -rounding, name);
    assertLessOrEqual(used, rounding, name);
    const mass = (masses: ArrayLike<number> | undefined, k: number, count: number) =>
      masses ? masses[k]! : 1 / count;
    for (let i = 0; i < n; i++) {
      assertAlmostEquals(rows[i]!, mass(a, i, n), slack * total, `${name}, row ${i}`);
      dual += f![row + i]! * mass(a, i, n);
    }
    for (let j = 0; j < m; j++) {
      assertAlmostEquals(columns[j]!, mass(b, j, m) * scale, slack * total, `${name}, column ${j}`);
      dual += g![column + j]! * mass(b, j, m) * scale;
    }
    assertAlmostEquals(report.cost, dual, rounding * total, name);
    assertAlmostEquals(report.cost, linear, rounding * total, name);
    assertLessOrEqual(report.marginalError, 1e-12 * total, name);
    // The CPU's plans may have more where costs are equal.
    if (solution.device.backend === "cuda") assertLessOrEqual(support, n + m - 1, name);
    row += n;
    column += m;
  });
}

/** Joins what problems have of a name, or undefined if they have none. */
function joined(dtype: TransportDType, parts: readonly (ArrayLike<number> | undefined)[]) {
  return parts[0] && arrayOf(dtype, parts.flatMap((part) => Array.from(part!)));
}

testOnDevices("exact: the potentials prove that the cost is the least", (device, dtypes) => {
  for (const dtype of dtypes) {
    for (const kind of ["sqeuclidean", "euclidean", "cosine", "dot"] as const) {
      const random = randomOf(41);
      const dimension = 3;
      const sizes = kind === "sqeuclidean"
        ? [[1, 1], [1, 9], [40, 3], [100, 80], [400, 400]] as const
        : [[5, 6], [70, 33]] as const;
      const problems = sizes.map(([n, m]) => {
        const x = randoms(n * dimension, () => gaussian(random));
        const y = randoms(m * dimension, () => gaussian(random));
        return {
          n,
          m,
          x,
          y,
          cost: pointCosts(x, y, dimension, kind),
          a: Float64Array.from(masses(n, random, 0.1), Math.fround),
          b: Float64Array.from(masses(m, random, 0.1), Math.fround),
        };
      });
      const join = (name: "x" | "y" | "a" | "b") =>
        joined(dtype, problems.map((problem) => problem[name]))!;
      using solution = exactTransport(device, {
        x: join("x"),
        y: join("y"),
        a: join("a"),
        b: join("b"),
        dimension,
        cost: kind,
        rows: sizes.map(([n]) => n),
        columns: sizes.map(([, m]) => m),
      });
      assertOptimal(solution, problems, dtype === "f64" ? 1e-12 : 2e-6, `${dtype}, ${kind}`);
    }
  }
});

testOnDevices("exact: ragged problems of up to 512 cost what the CPU says", (device, dtypes) => {
  const dtype = dtypes.at(-1)!;
  using cpu = Device.open({ backend: "cpu" });
  for (const given of [false, true]) {
    const seed = given ? 47 : 46;
    const random = randomOf(seed);
    const draw = (most: number) => 1 + Math.floor(most * random());
    const problems = Array.from({ length: 100 }, (_, p) => {
      const most = p % 25 === 24 ? 512 : p % 10 === 9 ? 130 : 60;
      const [n, m] = p === 24 ? [512, 512] : p === 0 ? [1, 512] : [draw(most), draw(most)];
      // Of few different costs, many are equal.
      const few = p % 3 === 0;
      const cost = randoms(n * m, () => few ? Math.floor(4 * random()) : random() - 0.3);
      if (!given) return { n, m, cost };
      // All of the first row and column is open and has half of the mass, so that there is an answer.
      for (let k = m; k < n * m; k++) if (k % m > 0 && random() < 0.2) cost[k] = Infinity;
      const fill = (count: number) =>
        count === 1
          ? [6]
          : [3, ...Array.from(masses(count - 1, random, 0.1), (mass) => Math.fround(3 * mass))];
      const [a, b] = [fill(n), fill(m)];
      return { n, m, cost, a, b };
    });
    const problem = (order: readonly Known[], type: TransportDType) => ({
      cost: joined(type, order.map(({ cost }) => cost))!,
      a: joined(type, order.map(({ a }) => a)),
      b: joined(type, order.map(({ b }) => b)),
      rows: order.map(({ n }) => n),
      columns: order.map(({ m }) => m),
    });
    using solution = exactTransport(device, problem(problems, dtype));
    assertOptimal(solution, problems, 2e-6, `seed ${seed}`);
    using expected = exactTransport(cpu, problem(problems.toReversed(), "f64"));
    solution.reports.forEach(({ cost }, p) => {
      const other = expected.reports[99 - p]!.cost;
      assertAlmostEquals(cost, other, 1e-11, `seed ${seed}, problem ${p}`);
    });
    using again = exactTransport(device, problem(problems, dtype));
    assertEquals(again.plan.download(), solution.plan.download());
    assertEquals(again.reports, solution.reports);
  }
});

testOnDevices("exact: equal costs, duplicate points and masses that are 0", (device, dtypes) => {
  for (const dtype of dtypes) {
    const random = randomOf(48);
    const sizes = [[1, 1], [1, 70], [90, 1], [40, 40], [65, 130], [200, 190]] as const;
    const problems = sizes.map(([n, m]) => {
      // Three places in all, and a mass of 0 wherever the place is the third.
      const places = (count: number) =>
        Float64Array.from({ length: count }, (_, i) => Math.floor((i ? 3 : 2) * random()));
      const [x, y] = [places(n), places(m)];
      const weights = (at: Float64Array) => at.map((place) => place === 2 ? 0 : 1);
      const scaled = (values: Float64Array) => {
        const sum = values.reduce((total, value) => total + value, 0);
        return values.map((value) => Math.fround(value / sum));
      };
      const cost = pointCosts(x, y, 1, "sqeuclidean");
      return { n, m, x, y, cost, a: scaled(weights(x)), b: scaled(weights(y)) };
    });
    const rows = sizes.map(([n]) => n);
    const columns = sizes.map(([, m]) => m);
    const join = (name: "x" | "y" | "a" | "b") =>
      joined(dtype, problems.map((problem) => problem[name]))!;
    const [a, b] = [join("a"), join("b")];
    using solution = exactTransport(device, {
      ...{ x: join("x"), y: join("y"), a, b, dimension: 1, rows, columns },
    });
    assertOptimal(solution, problems, 2e-6, `${dtype}, three places`);
    const flat = problems.map(({ n, m, a, b }) => ({ n, m, a, b, cost: randoms(n * m, () => -2) }));
    using level = exactTransport(device, {
      ...{ cost: joined(dtype, flat.map(({ cost }) => cost))!, a, b, rows, columns },
    });
    assertOptimal(level, flat, 2e-6, `${dtype}, equal costs`);

    // The value's gradient with respect to masses is their potentials, and 0 where there is none.
    using gradients = solution.backward({ value: arrayOf(dtype, sizes.map(() => 2)) }, {
      to: ["a", "b"],
    });
    const check = (masses: ArrayLike<number>, got: ArrayLike<number>, dual: ArrayLike<number>) =>
      assertClose(
        got,
        Array.from(masses, (mass, k) => mass > 0 ? 2 * dual[k]! : 0),
        1e-5,
        dtype,
      );
    check(a, gradients.a!.download(), solution.f.download());
    check(b, gradients.b!.download(), solution.g.download());
  }
});

testOnDevices("exact: what is wrong with a problem is said, whatever else is there", (device) => {
  const dtype = device.backend === "cpu" ? "f64" : "f32";
  const ones = (count: number) => Array<number>(count).fill(1);
  const problem = (change: (cost: number[], a: number[], b: number[]) => void) => {
    const [cost, a, b] = [ones(4 + 70 * 80 + 9), ones(2 + 70 + 3), ones(2 + 80 + 3)];
    a.fill(8, 2, 72);
    b.fill(7, 2, 82);
    change(cost, a, b);
    return {
      ...{ cost: arrayOf(dtype, cost), a: arrayOf(dtype, a), b: arrayOf(dtype, b) },
      ...{ rows: [2, 70, 3], columns: [2, 80, 3] },
    };
  };
  const solved = (change: (cost: number[], a: number[], b: number[]) => void, mass?: number[]) =>
    exactTransport(device, problem(change), { mass });
  refuses("non-finite", () => solved((cost) => cost[4 + 80 * 7 + 3] = NaN), "row 7", "column 3");
  refuses("non-finite", () => solved((cost) => cost[4] = -Infinity), "row 0", "column 0");
  refuses("invalid-argument", () => solved((_, a) => a[2 + 69] = -1), "element 69 of a");
  refuses("invalid-argument", () => solved((_, __, b) => b[2 + 79] = NaN), "element 79 of b");
  refuses("invalid-argument", () => solved((_, a) => a.fill(9, 2, 72)), "problem 1", "totals");
  refuses("invalid-argument", () => solved(() => {}, [1, 561, 1]), "problem 1");
  // A row without a partner, and three rows with one between them.
  using stuck = solved((cost) => {
    cost.fill(Infinity, 4 + 80 * 69, 4 + 80 * 70);
    cost.fill(Infinity, 4 + 70 * 80);
    for (const k of [0, 3, 6]) cost[4 + 70 * 80 + k] = 1;
  });
  assertEquals(stuck.reports.map(({ status }) => status), [
    "converged",
    "infeasible",
    "infeasible",
  ]);
  assertEquals(stuck.reports[1]!.cost, NaN);
  assert(stuck.plan.download().subarray(4).every((entry) => entry === 0));
  assert(stuck.f.download().subarray(2).every((value) => value === 0));
  // But a part can go: all but the last row's, and one row's.
  const walls = (cost: number[]) => {
    cost.fill(Infinity, 4 + 80 * 69, 4 + 80 * 70);
    cost.fill(Infinity, 4 + 70 * 80 + 1, 4 + 70 * 80 + 9);
  };
  using part = solved(walls, [2, 8 * 69, 1]);
  assert(part.converged);
  [2, 8 * 69, 1].forEach((mass, p) => assertAlmostEquals(part.reports[p]!.cost, mass, 1e-9));
  using more = solved(walls, [2, 8 * 69 + 1, 2]);
  assertEquals(more.reports.map(({ status }) => status), ["converged", "infeasible", "infeasible"]);
  const points = { x: arrayOf(dtype, [0, 1, NaN]), y: arrayOf(dtype, [3]), dimension: 1 };
  refuses("non-finite", () => exactTransport(device, points), "point 2 of x");
  const large = { cost: arrayOf(dtype, ones(513)), rows: 513, columns: 1 };
  if (device.backend === "cuda") {
    refuses("unsupported", () => exactTransport(device, large), "513 x 1", "512");
  } else {
    using solution = exactTransport(device, large);
    assertAlmostEquals(solution.reports[0]!.cost, 1);
  }
});

testOnDevices("exact: forbidden pairs, infeasible problems, gradients", (device, dtypes) => {
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

testOnDevices("the slope of partial transport is that of the costs", (device) => {
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

testOnDevices(
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

testOnDevices("proximal points approach the exact cost, and prove it", (device, dtypes) => {
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
