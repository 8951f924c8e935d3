/**
 * Gromov-Wasserstein transport, on every backend that can: against permuted copies, all permutations, objectives that are
 * summed naively, descent in plain loops, and the linear problems that it becomes.
 */
import {
  assert,
  assertAlmostEquals,
  assertEquals,
  assertGreater,
  assertGreaterOrEqual,
  assertLessOrEqual,
} from "@std/assert";
import { exactTransport, type GromovProblem, gromovTransport } from "../src/ot/mod.ts";
import { randomOf } from "./kv_cases.ts";
import {
  arrayOf,
  assertClose,
  dot,
  masses,
  randoms,
  refuses,
  testOnDevices,
} from "./ot_support.ts";

type Random = () => number;

/** Euclidean distances of random points in the plane, rounded to float32. */
function planar(size: number, random: Random): Float64Array<ArrayBuffer> {
  const points = Array.from({ length: size }, () => [random(), random()] as const);
  return Float64Array.from({ length: size * size }, (_, k) => {
    const [p, q] = [points[Math.floor(k / size)]!, points[k % size]!];
    return Math.fround(Math.hypot(p[0] - q[0], p[1] - q[1]));
  });
}

/** A symmetric matrix of any numbers: no metric, and neither convex nor concave. */
function symmetric(size: number, random: Random): Float64Array<ArrayBuffer> {
  const matrix = randoms(size * size, () => 2 * random() - 1);
  for (let i = 0; i < size; i++) {
    for (let j = 0; j < i; j++) matrix[i * size + j] = matrix[j * size + i]!;
  }
  return matrix;
}

/** Distances along the edges of a random tree with some edges more. */
function shortestPaths(size: number, random: Random): Float64Array<ArrayBuffer> {
  const distance = new Float64Array(size * size).fill(Infinity);
  const connect = (i: number, j: number) => distance[i * size + j] = distance[j * size + i] = 1;
  for (let i = 1; i < size; i++) connect(i, Math.floor(i * random()));
  for (let k = 0; k < size / 3; k++) {
    connect(Math.floor(size * random()), Math.floor(size * random()));
  }
  for (let i = 0; i < size; i++) distance[i * size + i] = 0;
  for (let k = 0; k < size; k++) {
    for (let i = 0; i < size; i++) {
      for (let j = 0; j < size; j++) {
        const detour = distance[i * size + k]! + distance[k * size + j]!;
        if (detour < distance[i * size + j]!) distance[i * size + j] = detour;
      }
    }
  }
  return distance;
}

function permutation(size: number, random: Random): number[] {
  const order = Array.from({ length: size }, (_, i) => i);
  for (let i = size - 1; i > 0; i--) {
    const j = Math.floor((i + 1) * random());
    [order[i], order[j]] = [order[j]!, order[i]!];
  }
  return order;
}

/** The matrix whose point `order[i]` is point i. */
function permuted(matrix: Float64Array, order: readonly number[]): Float64Array<ArrayBuffer> {
  const size = order.length;
  const result = new Float64Array(size * size);
  order.forEach((p, i) => order.forEach((q, j) => result[p * size + q] = matrix[i * size + j]!));
  return result;
}

/** `sum (X_ik - Y_jl)^2 S_ij T_kl`, as it is defined. */
function distortion(
  x: ArrayLike<number>,
  y: ArrayLike<number>,
  n: number,
  m: number,
  s: ArrayLike<number>,
  t: ArrayLike<number>,
): number {
  let sum = 0;
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < m; j++) {
      if (s[i * m + j] === 0) continue;
      for (let k = 0; k < n; k++) {
        for (let l = 0; l < m; l++) {
          sum += (x[i * n + k]! - y[j * m + l]!) ** 2 * s[i * m + j]! * t[k * m + l]!;
        }
      }
    }
  }
  return sum;
}

/** Marginals of a plan. */
function marginals(plan: ArrayLike<number>, n: number, m: number) {
  const [rows, columns] = [new Float64Array(n), new Float64Array(m)];
  for (let k = 0; k < n * m; k++) {
    rows[Math.floor(k / m)]! += plan[k]!;
    columns[k % m]! += plan[k]!;
  }
  return { rows, columns };
}

testOnDevices("permuted copies are matched, many at once", (device, dtypes) => {
  for (const dtype of dtypes) {
    const random = randomOf(61);
    const graphs = [1, 2, 3, 5, 8, 13, 20, 31].map((n) => {
      const x = planar(n, random);
      const order = permutation(n, random);
      return { n, x, order, y: permuted(x, order) };
    });
    const sizes = graphs.map(({ n }) => n);
    using solution = gromovTransport(device, {
      distanceX: arrayOf(dtype, graphs.flatMap(({ x }) => [...x])),
      distanceY: arrayOf(dtype, graphs.flatMap(({ y }) => [...y])),
      rows: sizes,
      columns: sizes,
    });
    assert(solution.converged);
    const plan = solution.plan.download();
    graphs.forEach(({ n, order, y, x }, p) => {
      const report = solution.reports[p]!;
      const what = `${dtype}, ${n} points`;
      assertAlmostEquals(report.value, 0, 1e-12, what);
      assertAlmostEquals(report.bound, 0, 1e-12, what);
      assertLessOrEqual(report.marginalError, 1e-12, what);
      const own = plan.subarray(solution.planOffsets[p]!, solution.planOffsets[p + 1]!);
      assertAlmostEquals(distortion(x, y, n, n, own, own), 0, 1e-12, what);
      // Two points are each other's mirror image.
      if (n === 2) return;
      const expected = new Float64Array(n * n);
      order.forEach((to, i) => expected[i * n + to] = 1 / n);
      assertClose(own, expected, 1e-7, what);
    });
  }
});

testOnDevices("graphs by their shortest paths: isomorphic ones have value 0", (device) => {
  const random = randomOf(62);
  let solved = 0;
  const dtype = device.backend === "cpu" ? "f64" : "f32";
  for (let seed = 0; seed < 20; seed++) {
    const n = 6 + seed % 10;
    const x = shortestPaths(n, random);
    const y = permuted(x, permutation(n, random));
    using solution = gromovTransport(device, {
      distanceX: arrayOf(dtype, x),
      distanceY: arrayOf(dtype, y),
      rows: n,
      columns: n,
    });
    const [report] = solution.reports;
    assertEquals(report!.status, "converged");
    assertAlmostEquals(report!.bound, 0, 1e-12, `seed ${seed}`);
    if (report!.value < 1e-10) solved++;
  }
  // Symmetries may end in local minima; the bound of 0 is there to tell. Which ones do depends on the plan of several of
  // equal cost that a search finds first: of 300 such graphs, 253 end at 0 on the CPU, and 247 on CUDA.
  assertGreaterOrEqual(solved, device.backend === "cpu" ? 15 : 12);
});

testOnDevices(
  "values are those of the definition, and not below the bound",
  (device, dtypes) => {
    for (const dtype of dtypes) {
      for (let seed = 1; seed <= 16; seed++) {
        const random = randomOf(seed);
        const [n, m] = [1 + Math.floor(9 * random()), 1 + Math.floor(9 * random())];
        const [x, y] = seed % 2
          ? [planar(n, random), planar(m, random)]
          : [symmetric(n, random), symmetric(m, random)];
        const scale = seed % 3 ? 1 : 7;
        const [a, b] = [n, m].map((size) =>
          Float64Array.from(masses(size, random, 0.2), (mass) => Math.fround(scale * mass))
        ) as [Float64Array, Float64Array];
        const cost = randoms(n * m, random);
        const alpha = seed % 4 ? random() : 1;
        using solution = gromovTransport(device, {
          distanceX: arrayOf(dtype, x),
          distanceY: arrayOf(dtype, y),
          cost: arrayOf(dtype, cost),
          a: arrayOf(dtype, a),
          b: arrayOf(dtype, b),
          rows: n,
          columns: m,
        }, { alpha });
        const [report] = solution.reports;
        const plan = solution.plan.download();
        const what = `${dtype}, seed ${seed}: ${n} x ${m}, alpha ${alpha}`;
        const slack = (dtype === "f64" ? 1e-12 : 1e-5) * scale ** 2;
        const sum = distortion(x, y, n, m, plan, plan);
        const linear = dot(plan, cost);
        assertAlmostEquals(report!.distortion, sum, slack, what);
        assertAlmostEquals(report!.cost, linear, slack, what);
        assertAlmostEquals(report!.value, (1 - alpha) * linear + alpha * sum, slack, what);
        assertLessOrEqual(report!.bound, report!.value, what);
        assertLessOrEqual(report!.marginalError, 1e-12 * scale, what);
        assert(plan.every((mass) => mass >= 0), what);
        const { rows, columns } = marginals(plan, n, m);
        assertClose(rows, a, 1e-6 * scale, what);
        assertClose(columns, b, 1e-6 * scale, what);
        const largest = Math.max(...[...x, ...y].map(Math.abs));
        const highest = (1 - alpha) * Math.max(...cost) + alpha * scale * largest ** 2;
        assert(
          report!.status === "iteration-limit" || report!.gap <= 1.1e-7 * scale * highest,
          what,
        );
      }
    }
  },
);

testOnDevices("the bound holds for all permutations, and few are better", (device) => {
  const dtype = device.backend === "cpu" ? "f64" : "f32";
  let best = 0;
  for (let seed = 1; seed <= 12; seed++) {
    const random = randomOf(100 + seed);
    const n = 5;
    const [x, y] = [planar(n, random), planar(n, random)];
    using solution = gromovTransport(device, {
      distanceX: arrayOf(dtype, x),
      distanceY: arrayOf(dtype, y),
      rows: n,
      columns: n,
    });
    const { value, bound } = solution.reports[0]!;
    let least = Infinity;
    const visit = (chosen: number[]) => {
      if (chosen.length === n) {
        const plan = new Float64Array(n * n);
        chosen.forEach((j, i) => plan[i * n + j] = 1 / n);
        least = Math.min(least, distortion(x, y, n, n, plan, plan));
      }
      for (let j = 0; j < n; j++) if (!chosen.includes(j)) visit([...chosen, j]);
    };
    visit([]);
    assertLessOrEqual(bound, least + 1e-12, `seed ${seed}`);
    // Distances in the plane make the objective concave, so that permutations are the best plans.
    assertGreaterOrEqual(value, least - 1e-9, `seed ${seed}`);
    if (value < least + 1e-9) best++;
  }
  assertGreaterOrEqual(best, 8);
});

testOnDevices("every iteration makes the value less, until none can", (device) => {
  const dtype = device.backend === "cpu" ? "f64" : "f32";
  let steps = 0;
  for (let seed = 1; seed <= 6; seed++) {
    const random = randomOf(200 + seed);
    const [n, m] = [7, 9];
    const problem: GromovProblem = {
      distanceX: arrayOf(dtype, symmetric(n, random)),
      distanceY: arrayOf(dtype, symmetric(m, random)),
      rows: n,
      columns: m,
    };
    let before = Infinity;
    for (let iterations = 1; iterations <= 12; iterations++) {
      using solution = gromovTransport(device, problem, { iterations, tolerance: 0 });
      const { value, status, gap } = solution.reports[0]!;
      assertLessOrEqual(value, before + 1e-12, `seed ${seed}, ${iterations} iterations`);
      assert(gap === 0 ? status === "converged" : status === "iteration-limit");
      if (value < before - 1e-9) steps++;
      before = value;
    }
    // Converged: no plan of one entry moved, and no other vertex, is better to first order.
    using solution = gromovTransport(device, problem);
    const plan = Float64Array.from(solution.plan.download());
    const { distanceX: x, distanceY: y } = problem as { distanceX: Float64Array } & GromovProblem;
    for (let trial = 0; trial < 20; trial++) {
      const cost = randoms(n * m, random);
      using vertex = exactTransport(device, { cost: arrayOf(dtype, cost), rows: n, columns: m });
      const other = Float64Array.from(vertex.plan.download(), (mass, k) => mass - plan[k]!);
      const slope = 2 * distortion(x, y as Float64Array, n, m, plan, other);
      assertGreaterOrEqual(slope, -1e-5, `seed ${seed}`);
    }
  }
  assertGreater(steps, 12);
});

testOnDevices(
  "alpha of 0 is linear transport, and 1 the distances alone",
  (device, dtypes) => {
    for (const dtype of dtypes) {
      for (let seed = 1; seed <= 6; seed++) {
        const random = randomOf(300 + seed);
        const [n, m] = [6 + seed, 8];
        const cost = arrayOf(dtype, randoms(n * m, random));
        const distances = {
          distanceX: arrayOf(dtype, planar(n, random)),
          distanceY: arrayOf(dtype, planar(m, random)),
          rows: n,
          columns: m,
        };
        const at = (alpha: number) => {
          using solution = gromovTransport(device, { ...distances, cost }, { alpha });
          return { ...solution.reports[0]!, plan: Float64Array.from(solution.plan.download()) };
        };
        using exact = exactTransport(device, { cost, rows: n, columns: m });
        const linear = exact.plan.download();
        const least = exact.reports[0]!.cost;
        for (const alpha of [0, 1e-9]) {
          const { value, bound, plan } = at(alpha);
          assertAlmostEquals(value, least, 1e-8, `seed ${seed}`);
          assertAlmostEquals(bound, least, 1e-8, `seed ${seed}`);
          assertClose(plan, linear, 1e-6, `seed ${seed}`);
        }
        using alone = gromovTransport(device, distances);
        const gromov = alone.reports[0]!;
        assertAlmostEquals(at(1).value, gromov.value, 1e-12, `seed ${seed}`);
        assertClose(at(1).plan, alone.plan.download(), 0, `seed ${seed}`);
        const near = at(1 - 1e-9);
        assertAlmostEquals(near.value, gromov.value, 1e-7, `seed ${seed}`);
      }
    }
  },
);

testOnDevices("features decide between symmetries", (device) => {
  const dtype = device.backend === "cpu" ? "f64" : "f32";
  // Corners of a square, which is its own image in eight ways, of four colours.
  const side = [0, 1, 2, 1].map((_, i) =>
    [0, 1, 2, 1].map((_, j) => [0, 1, 2, 1][(j - i + 4) % 4]!)
  );
  const order = [2, 3, 0, 1];
  const cost = order.flatMap((to) => [0, 1, 2, 3].map((j) => j === to ? 0 : 1));
  using solution = gromovTransport(device, {
    distanceX: arrayOf(dtype, side.flat()),
    distanceY: arrayOf(dtype, side.flat()),
    cost: arrayOf(dtype, cost),
    rows: 4,
    columns: 4,
  });
  assertAlmostEquals(solution.reports[0]!.value, 0, 1e-12);
  assertEquals([...solution.plan.download()], cost.map((price) => price === 0 ? 0.25 : 0));
});

testOnDevices("the same bits alone, again, and beside others", (device, dtypes) => {
  for (const dtype of dtypes) {
    const random = randomOf(71);
    const sizes = Array.from({ length: 24 }, () => [1 + random() * 12, 1 + random() * 12])
      .map((pair) => pair.map(Math.floor) as [number, number]);
    const problems = sizes.map(([n, m]) => ({
      x: planar(n, random),
      y: symmetric(m, random),
      cost: randoms(n * m, random),
      alpha: random(),
      tolerance: 10 ** -(3 + 4 * random()),
      iterations: 1 + Math.floor(40 * random()),
    }));
    const join = (chosen: readonly number[]) => {
      const all = (name: "x" | "y" | "cost") =>
        arrayOf(dtype, chosen.flatMap((p) => [...problems[p]![name]]));
      const each = (name: "alpha" | "tolerance" | "iterations") =>
        chosen.map((p) => problems[p]![name]);
      using solution = gromovTransport(device, {
        distanceX: all("x"),
        distanceY: all("y"),
        cost: all("cost"),
        rows: chosen.map((p) => sizes[p]![0]),
        columns: chosen.map((p) => sizes[p]![1]),
      }, {
        alpha: each("alpha"),
        tolerance: each("tolerance"),
        iterations: each("iterations"),
      });
      const plan = solution.plan.download();
      return solution.reports.map((report, p) => ({
        report,
        plan: plan.slice(solution.planOffsets[p], solution.planOffsets[p + 1]),
      }));
    };
    const every = sizes.map((_, p) => p);
    const together = join(every);
    assertEquals(join(every), together);
    every.forEach((p) => assertEquals(join([p]), [together[p]!]));
    every.forEach((p) => {
      assertLessOrEqual(together[p]!.report.iterations, problems[p]!.iterations);
    });
  }
});

testOnDevices("what has no mass, nowhere to go, or one point", (device, dtypes) => {
  for (const dtype of dtypes) {
    const array = (...values: number[]) => arrayOf(dtype, values);
    // Without its third point, which has no mass, x is y.
    using massless = gromovTransport(device, {
      distanceX: array(0, 3, 9, 3, 1, 9, 9, 9, 9),
      distanceY: array(1, 3, 3, 0),
      a: array(0.5, 0.5, 0),
      rows: 3,
      columns: 2,
    });
    assertAlmostEquals(massless.reports[0]!.value, 0, 1e-12);
    assertEquals([...massless.plan.download()], [0, 0.5, 0.5, 0, 0, 0]);

    using point = gromovTransport(device, {
      distanceX: array(0),
      distanceY: array(0, 2, 2, 0),
      rows: 1,
      columns: 2,
    });
    assertAlmostEquals(point.reports[0]!.distortion, 2);
    assertEquals(point.reports[0]!.bound, point.reports[0]!.value);
    assertEquals([...point.plan.download()], [0.5, 0.5]);

    const blocked = {
      distanceX: array(0, 1, 1, 0),
      distanceY: array(0, 1, 1, 0),
      rows: 2,
      columns: 2,
    };
    using forced = gromovTransport(device, { ...blocked, cost: array(Infinity, 1, 1, 5) }, {
      alpha: 1,
    });
    assertEquals([...forced.plan.download()], [0, 0.5, 0.5, 0]);
    assertAlmostEquals(forced.reports[0]!.value, 0);
    assertAlmostEquals(forced.reports[0]!.cost, 1);
    using none = gromovTransport(device, {
      ...blocked,
      cost: array(Infinity, Infinity, 1, 1),
    });
    const [report] = none.reports;
    assertEquals(report!.status, "infeasible");
    assertEquals([report!.value, report!.bound, report!.cost], [NaN, NaN, NaN]);
    assertEquals([...none.plan.download()], [0, 0, 0, 0]);
    assert(!none.converged);
  }
});

testOnDevices("what is wrong is named", (device, dtypes) => {
  for (const dtype of dtypes) {
    const array = (...values: number[]) => arrayOf(dtype, values);
    const good = {
      distanceX: array(0, 1, 1, 0),
      distanceY: array(0, 2, 2, 0),
      rows: 2,
      columns: 2,
    };
    // Where there is no such transport, this says so.
    gromovTransport(device, good)[Symbol.dispose]();
    const bad = (code: "non-finite" | "invalid-argument", changes: object, ...parts: string[]) =>
      refuses(code, () => gromovTransport(device, { ...good, ...changes }), ...parts);
    bad("non-finite", { distanceX: array(0, 1, NaN, 0) }, "row 1, column 0 of distanceX");
    bad("non-finite", { distanceY: array(0, Infinity, 2, 0) }, "row 0, column 1 of distanceY");
    bad("non-finite", { cost: array(0, 1, 2, NaN) }, "row 1, column 1");
    bad("non-finite", { cost: array(-Infinity, 1, 2, 3) }, "row 0, column 0");
    bad("invalid-argument", { distanceY: array(0, 2, 1, 0) }, "distanceY must be symmetric");
    bad("invalid-argument", { a: array(0.5, -0.5) }, "element 1 of a");
    bad("invalid-argument", { a: array(0.5, 0.6) }, "equal totals");
    bad("invalid-argument", { distanceX: array(0, 1, 1) }, "distanceX", "4 elements");
    bad("invalid-argument", { cost: array(1) }, "cost", "4 elements");
    bad("invalid-argument", { rows: 0 }, "rows");
    bad("invalid-argument", { distanceX: [0, 1, 1, 0] }, "distanceX");
    const problems = { distanceX: array(1, 1, NaN), distanceY: array(1, 1, 1) };
    const three = { ...problems, rows: [1, 1, 1], columns: [1, 1, 1] };
    refuses("non-finite", () => gromovTransport(device, three), "of problem 2");
    for (
      const [options, part] of [
        [{ alpha: 0.5 }, "alpha must be 1"],
        [{ alpha: 2 }, "alpha must be from 0 to 1"],
        [{ alpha: NaN }, "alpha"],
        [{ alpha: [1, 1] }, "alpha"],
        [{ tolerance: -1 }, "tolerance"],
        [{ iterations: 0 }, "iterations"],
      ] as const
    ) {
      refuses("invalid-argument", () => gromovTransport(device, good, options), part);
    }
    // A difference of rounding is none.
    using rounded = gromovTransport(device, { ...good, distanceX: array(0, 1, 1 + 1e-6, 0) });
    assertAlmostEquals(rounded.reports[0]!.value, 0.5, 1e-5);
    using unchecked = gromovTransport(device, { ...good, distanceX: array(0, 1, 5, 0) }, {
      check: false,
    });
    refuses("invalid-argument", () => unchecked.reports, "symmetric");
    assertEquals([...unchecked.plan.download()], [0, 0, 0, 0]);
  }
});
