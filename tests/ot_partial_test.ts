/**
 * Entropic transport of a part of the mass, on every backend: by the conditions that prove a convex problem solved,
 * its limits, and differences of its value.
 */
import {
  assert,
  assertAlmostEquals,
  assertEquals,
  assertGreater,
  assertLess,
  assertLessOrEqual,
} from "@std/assert";
import { Device } from "../src/device/mod.ts";
import { exactTransport, partialSinkhorn, sinkhorn, type TransportDType } from "../src/ot/mod.ts";
import { randomOf } from "./kv_cases.ts";
import { arrayOf, assertClose, randoms, refuses, testOnDevices } from "./ot_support.ts";

const sum = (values: ArrayLike<number>) =>
  Array.from(values).reduce((total, value) => total + value, 0);

testOnDevices("partial: plans meet the conditions of the optimum", (device, dtypes) => {
  for (const dtype of dtypes) {
    const random = randomOf(81);
    const problems = Array.from({ length: 20 }, (_, p) => {
      const [n, m] = [1 + Math.floor(14 * random()), 1 + Math.floor(14 * random())];
      const draw = () => random() < 0.1 ? 0 : 0.1 + random();
      const a = randoms(n, draw).map((mass, i) => i === 0 ? 1 : mass);
      const b = randoms(m, draw).map((mass, j) => j === 0 ? 1 : mass);
      const cost = randoms(n * m, () => p % 3 && random() < 0.05 ? Infinity : random() - 0.2);
      const mass = (0.1 + 0.6 * random()) * Math.min(sum(a), sum(b));
      return { n, m, a, b, cost, mass, epsilon: [0.5, 0.1, 0.03][p % 3]! };
    });
    const join = (name: "a" | "b" | "cost") =>
      arrayOf(dtype, problems.flatMap((problem) => [...problem[name]]));
    using solution = partialSinkhorn(device, {
      cost: join("cost"),
      a: join("a"),
      b: join("b"),
      rows: problems.map(({ n }) => n),
      columns: problems.map(({ m }) => m),
    }, {
      mass: problems.map(({ mass }) => mass),
      epsilon: problems.map(({ epsilon }) => epsilon),
      tolerance: 1e-9,
      iterations: 100_000,
    });
    const [f, g, plan] = [solution.f, solution.g, solution.plan].map((each) => each.download());
    const slack = dtype === "f64" ? 1e-8 : 2e-5;
    let [row, column, used] = [0, 0, 0];
    problems.forEach(({ n, m, a, b, cost, mass, epsilon }, p) => {
      const what = `${dtype}, problem ${p}: ${n} x ${m}, epsilon ${epsilon}`;
      const report = solution.reports[p]!;
      assertEquals(report.status, "converged", what);
      const own = plan!.subarray(solution.planOffsets[p]!, solution.planOffsets[p + 1]!);
      assertAlmostEquals(sum(own), mass, slack, what);
      const price = f!.subarray(row, row + n);
      const prices = g!.subarray(column, column + m);
      // As not all is transported, some row is not used up, and its price is that of the total alone.
      const lambda = Math.max(...price);
      let [linear, value] = [0, 0];
      for (let i = 0; i < n; i++) {
        for (let j = 0; j < m; j++) {
          const entry = own[i * m + j]!;
          const power = (price[i]! + prices[j]! - cost[i * m + j]!) / epsilon;
          const expected = power > -Infinity ? Math.exp(power) : 0;
          assertAlmostEquals(entry, expected, slack * (1 + entry), what);
          if (entry === 0) continue;
          linear += entry * cost[i * m + j]!;
          value += entry * (cost[i * m + j]! + epsilon * (Math.log(entry) - 1));
        }
      }
      assertAlmostEquals(report.cost, linear, 10 * slack, what);
      assertAlmostEquals(report.value, value, 10 * slack, what);
      const check = (got: number, capacity: number, dual: number, side: string) => {
        assertLessOrEqual(got, capacity + slack, `${what}, ${side}`);
        assertLessOrEqual(dual, slack, `${what}, ${side}`);
        if (capacity > 0 && dual < -1e-4) {
          used++;
          assertAlmostEquals(got, capacity, slack, `${what}, ${side}`);
        }
      };
      for (let i = 0; i < n; i++) {
        check(sum(own.subarray(i * m, (i + 1) * m)), a[i]!, price[i]! - lambda, `row ${i}`);
      }
      for (let j = 0; j < m; j++) {
        check(sum(own.filter((_, k) => k % m === j)), b[j]!, prices[j]!, `column ${j}`);
      }
      row += n;
      column += m;
    });
    assertGreater(used, 20);
  }
});

testOnDevices(
  "partial: all of the mass is Sinkhorn's plan, and a small epsilon the exact one",
  (device) => {
    const dtype = device.backend === "cpu" ? "f64" : "f32";
    for (let seed = 1; seed <= 5; seed++) {
      const random = randomOf(90 + seed);
      const [n, m] = [4 + seed, 7];
      const problem = {
        cost: arrayOf(dtype, randoms(n * m, random)),
        rows: n,
        columns: m,
      };
      const options = { epsilon: 0.1, tolerance: 1e-9, iterations: 100_000 };
      using whole = partialSinkhorn(device, problem, { ...options, mass: 1 });
      // Of float32, Sinkhorn's iterations do not get that close.
      const [tolerance, slack] = dtype === "f64" ? [1e-9, 1e-6] : [1e-6, 3e-6];
      using balanced = sinkhorn(device, problem, { ...options, tolerance });
      assertClose(whole.plan.download(), balanced.plan.download(), slack, `seed ${seed}`);
      const [value, expected] = [whole.reports[0]!.value, balanced.reports[0]!.value];
      assertAlmostEquals(value, expected, slack / 10, `seed ${seed}`);

      const sharp = { epsilon: 0.002, tolerance: 1e-6, iterations: 100_000, mass: 0.4 };
      using part = partialSinkhorn(device, problem, sharp);
      using exact = exactTransport(device, problem, { mass: 0.4 });
      const [found, least] = [part.reports[0]!, exact.reports[0]!];
      assertEquals(found.status, "converged", `seed ${seed}`);
      assertLess(Math.abs(found.cost - least.cost), 0.002 * 0.4 * Math.log(n * m), `seed ${seed}`);
    }
  },
);

testOnDevices(
  "partial: ragged problems come to what they do alone on the CPU",
  (device, dtypes) => {
    const dtype = dtypes.at(-1)!;
    using cpu = Device.open({ backend: "cpu" });
    const random = randomOf(96);
    const draw = (most: number) => 1 + Math.floor(most * random());
    const dimension = 5;
    const problems = Array.from({ length: 24 }, (_, p) => {
      const most = p % 12 === 11 ? 300 : 70;
      const [n, m] = p === 0 ? [1, 65] : p === 1 ? [130, 1] : [draw(most), draw(most)];
      const weights = (count: number) => randoms(count, () => random() < 0.1 ? 0 : 0.1 + random());
      const [a, b] = [weights(n), weights(m)];
      a[0] = b[0] = 1;
      const [x, y] = [n, m].map((count) => randoms(count * dimension, random)) as [
        Float64Array<ArrayBuffer>,
        Float64Array<ArrayBuffer>,
      ];
      return { n, m, a, b, x, y, mass: (0.1 + 0.85 * random()) * Math.min(sum(a), sum(b)) };
    });
    const solved = (on: Device, type: TransportDType, some: typeof problems) => {
      const join = (name: "a" | "b" | "x" | "y") =>
        arrayOf(type, some.flatMap((problem) => [...problem[name]]));
      return partialSinkhorn(on, {
        ...{ x: join("x"), y: join("y"), a: join("a"), b: join("b"), dimension },
        rows: some.map(({ n }) => n),
        columns: some.map(({ m }) => m),
      }, { mass: some.map(({ mass }) => mass), tolerance: 1e-7 });
    };
    using all = solved(device, dtype, problems);
    const plans = all.plan.download();
    problems.forEach((problem, p) => {
      const what = `problem ${p}: ${problem.n} x ${problem.m}`;
      using one = solved(cpu, "f64", [problem]);
      const [found, expected] = [all.reports[p]!, one.reports[0]!];
      assertEquals(found.status, "converged", what);
      assertLessOrEqual(Math.abs(found.iterations - expected.iterations), 1, what);
      assertAlmostEquals(found.epsilon, expected.epsilon, 1e-12, what);
      assertAlmostEquals(found.cost, expected.cost, 1e-6, what);
      assertAlmostEquals(found.value, expected.value, 1e-6, what);
      const own = plans.subarray(all.planOffsets[p], all.planOffsets[p + 1]);
      assertClose(own, one.plan.download(), 1e-6, what);
    });
  },
);

testOnDevices("partial: the slope of the value is the envelope's", (device, dtypes) => {
  const dtype = dtypes[0]!;
  if (dtype === "f32") return partialSinkhorn(device, tiny(dtype), { mass: 0.5 })[Symbol.dispose]();
  const random = randomOf(95);
  const [n, m, dimension] = [5, 6, 2];
  const x = randoms(n * dimension, random);
  const y = arrayOf(dtype, randoms(m * dimension, random));
  const solved = (points: Float64Array<ArrayBuffer>) =>
    partialSinkhorn(device, { x: points, y, dimension }, {
      ...{ mass: 0.6, epsilon: 0.05, tolerance: 1e-12, iterations: 100_000 },
    });
  using solution = solved(x);
  const value = { value: arrayOf(dtype, [1]) };
  using gradients = solution.backward(value);
  const slopes = gradients.x!.download();
  x.forEach((_, k) => {
    const [low, high] = [-1e-4, 1e-4].map((step) => {
      using moved = solved(x.map((at, i) => i === k ? at + step : at));
      return moved.reports[0]!.value;
    }) as [number, number];
    assertAlmostEquals(slopes[k]!, (high - low) / 2e-4, 1e-6, `coordinate ${k}`);
  });
  refuses("unsupported", () => solution.backward(value, { to: ["b"] }), "masses");
  refuses("unsupported", () => solution.backward(value, { mode: "implicit" }), "implicit");
});

const tiny = (dtype: TransportDType) => ({
  cost: arrayOf(dtype, [0, 1, 1, 0]),
  rows: 2,
  columns: 2,
});

testOnDevices("partial: what cannot be is said", (device, dtypes) => {
  for (const dtype of dtypes) {
    const problem = tiny(dtype);
    using half = partialSinkhorn(device, problem, { mass: 0.5, epsilon: 0.01 });
    assertClose(half.plan.download(), [0.25, 0, 0, 0.25], 1e-5, dtype);
    using one = partialSinkhorn(device, {
      ...problem,
      cost: arrayOf(dtype, [3]),
      rows: 1,
      columns: 1,
    }, {
      mass: 0.25,
    });
    assertAlmostEquals(one.reports[0]!.cost, 0.75, 1e-5);
    for (const mass of [0, -1, NaN, Infinity, 1.1, [0.5, 0.5]]) {
      refuses("invalid-argument", () => partialSinkhorn(device, problem, { mass }), "mass");
    }
    const cost = arrayOf(dtype, [0, 1, NaN, 0]);
    refuses(
      "non-finite",
      () => partialSinkhorn(device, { ...problem, cost }, { mass: 0.5 }),
      "row 1",
    );
    const walls = { ...problem, cost: arrayOf(dtype, Array<number>(4).fill(Infinity)) };
    using none = partialSinkhorn(device, walls, { mass: 0.5, epsilon: 1 });
    assertEquals(none.reports[0]!.status, "infeasible");
    assertEquals([...none.plan.download()], [0, 0, 0, 0]);
    // Half of the mass could go at most: the limit says that it did not.
    const wall = { ...problem, cost: arrayOf(dtype, [0, Infinity, Infinity, Infinity]) };
    using stuck = partialSinkhorn(device, wall, { mass: 0.75, epsilon: 1, iterations: 50 });
    assertEquals(stuck.reports[0]!.status, "iteration-limit");
    assert(stuck.plan.download().every(Number.isFinite));
    using again = partialSinkhorn(device, problem, { mass: 0.5, epsilon: 0.01 });
    assertEquals(again.plan.download(), half.plan.download());
  }
});
