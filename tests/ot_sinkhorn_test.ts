/**
 * Sinkhorn's iterations on every backend that opens here (PACKHORSE_BACKEND names one), against plain loops in double
 * precision, and what becomes of degenerate and broken problems.
 */
import {
  assert,
  assertAlmostEquals,
  assertEquals,
  assertGreater,
  assertLess,
  assertLessOrEqual,
} from "@std/assert";
import { sinkhorn, type SinkhornOptions, type TransportProblem } from "../src/ot/mod.ts";
import type { Device } from "../src/device/mod.ts";
import { randomOf } from "./kv_cases.ts";
import { pointCosts, referenceSinkhorn } from "./ot_reference.ts";
import {
  arrayOf,
  assertClose,
  gaussian,
  masses,
  randoms,
  refuses,
  testOnDevices,
} from "./ot_support.ts";

const SIZES = [[1, 1], [1, 7], [9, 1], [2, 2], [5, 40], [33, 17], [100, 64], [130, 129]] as const;

testOnDevices("a batch of all sizes and costs is what plain loops find", (device, dtypes) => {
  for (const dtype of dtypes) {
    for (const kind of ["sqeuclidean", "euclidean", "cosine", "dot"] as const) {
      const seed = 11;
      const random = randomOf(seed);
      const dimension = 5;
      const problems = SIZES.map(([n, m]) => ({
        x: randoms(n * dimension, () => gaussian(random)),
        y: randoms(m * dimension, () => gaussian(random) + 0.5),
        a: Float64Array.from(masses(n, random), Math.fround),
        b: Float64Array.from(masses(m, random), Math.fround),
      }));
      const join = (name: "x" | "y" | "a" | "b") =>
        arrayOf(dtype, problems.flatMap((problem) => [...problem[name]]));
      const epsilon = 0.05;
      using solution = sinkhorn(device, {
        x: join("x"),
        y: join("y"),
        a: join("a"),
        b: join("b"),
        dimension,
        cost: kind,
        rows: SIZES.map(([n]) => n),
        columns: SIZES.map(([, m]) => m),
      }, { epsilon, relativeEpsilon: true, tolerance: 1e-5 });
      const plan = solution.plan.download();
      const f = solution.f.download();
      const g = solution.g.download();
      let [rows, columns] = [0, 0];
      problems.forEach(({ x, y, a, b }, p) => {
        const [n, m] = SIZES[p]!;
        const cost = pointCosts(x, y, dimension, kind);
        const largest = cost.reduce((most, price) => Math.max(most, Math.abs(price)), 0);
        const scale = a.reduce((s, v) => s + v, 0) / b.reduce((s, v) => s + v, 0);
        const expected = referenceSinkhorn({ n, m, cost, a, b: b.map((mass) => mass * scale) }, {
          epsilon: epsilon * largest,
          tolerance: 1e-12,
          iterations: 5000,
        });
        const what = `seed ${seed}, ${dtype}, ${kind}, ${n} x ${m}`;
        const report = solution.reports[p]!;
        assertEquals(report.status, "converged", what);
        assertLessOrEqual(report.marginalError, 1e-5, what);
        assertAlmostEquals(report.epsilon / (epsilon * largest), 1, 1e-6, what);
        const start = solution.planOffsets[p]!;
        const own = plan.subarray(start, start + n * m);
        assertClose(own, expected.plan, 2e-5, `${what}: plan`);
        const loss = (array: ArrayLike<number>) => Math.max(...Array.from(array, Math.abs));
        const slack = 1e-3 * (loss(expected.f) + loss(expected.g));
        // Potentials are known up to a constant.
        const shift = f[rows]! - expected.f[0]!;
        assertClose(
          f.subarray(rows, rows + n),
          expected.f.map((v) => v + shift),
          slack,
          `${what}: f`,
        );
        assertClose(
          g.subarray(columns, columns + m),
          expected.g.map((v) => v - shift),
          slack,
          `${what}: g`,
        );
        assertAlmostEquals(report.cost, expected.cost, 1e-4 * largest, what);
        assertAlmostEquals(report.value, expected.value, 1e-4 * largest, what);
        rows += n;
        columns += m;
      });
    }
  }
});

testOnDevices("the first iterations are the reference's, one by one", (device, dtypes) => {
  const random = randomOf(3);
  const [n, m] = [13, 21];
  const cost = randoms(n * m, random);
  const [a, b] = [masses(n, random), masses(m, random)];
  for (const dtype of dtypes) {
    for (const iterations of [1, 2, 3, 10]) {
      using solution = sinkhorn(device, {
        cost: arrayOf(dtype, cost),
        a: arrayOf(dtype, a),
        b: arrayOf(dtype, b),
        rows: n,
        columns: m,
      }, { epsilon: 0.02, iterations, tolerance: 1e-9 });
      const [report] = solution.reports;
      const expected = referenceSinkhorn({ n, m, cost, a, b }, {
        epsilon: 0.02,
        iterations,
        tolerance: 1e-9,
      });
      const what = `${dtype}, ${iterations} iterations`;
      assertEquals(report!.status, "iteration-limit", what);
      assertEquals(report!.iterations, iterations, what);
      assertAlmostEquals(report!.marginalError, expected.marginalError, 1e-5, what);
      assertClose(solution.plan.download(), expected.plan, dtype === "f64" ? 1e-12 : 1e-6, what);
      if (dtype === "f64") assertClose(solution.f.download(), expected.f, 1e-12, what);
    }
  }
});

testOnDevices(
  "small epsilons: within the tolerance, or the status says so; never NaN",
  (device, dtypes) => {
    const random = randomOf(5);
    const dimension = 3;
    const sizes = [[1, 1], [3, 400], [40, 40], [64, 80], [400, 1]] as const;
    const x = sizes.map(([n]) => randoms(n * dimension, () => gaussian(random)));
    const y = sizes.map(([, m]) => randoms(m * dimension, () => gaussian(random)));
    const sizesOf = { rows: sizes.map(([n]) => n), columns: sizes.map(([, m]) => m) };
    for (const dtype of dtypes) {
      const problem = {
        x: arrayOf(dtype, x.flatMap((points) => [...points])),
        y: arrayOf(dtype, y.flatMap((points) => [...points])),
        dimension,
        ...sizesOf,
      };
      for (const epsilon of [1, 1e-1, 1e-2, 1e-3, 1e-4]) {
        for (const options of [{}, { scaling: 0.5 }, { relaxation: 1.5 }] as SinkhornOptions[]) {
          const tolerance = 1e-3;
          using solution = sinkhorn(device, problem, {
            ...options,
            epsilon,
            relativeEpsilon: true,
            tolerance,
            iterations: 3000,
          });
          const plan = solution.plan.download();
          const what = `${dtype}, epsilon ${epsilon}, ${JSON.stringify(options)}`;
          assert(plan.every((entry) => entry >= 0 && entry <= 1.01), what);
          assert(solution.f.download().every(Number.isFinite), what);
          assert(solution.g.download().every(Number.isFinite), what);
          solution.reports.forEach((report, p) => {
            const where = `${what}, problem ${p}: ${JSON.stringify(report)}`;
            assert(Number.isFinite(report.cost) && Number.isFinite(report.value), where);
            assertEquals(report.status === "converged", report.marginalError <= tolerance, where);
            if (report.status !== "converged") assertEquals(report.iterations, 3000, where);
            // What it says of the marginals is true of the plan.
            const [n, m] = sizes[p]!;
            const own = plan.subarray(solution.planOffsets[p], solution.planOffsets[p + 1]);
            let error = 0;
            for (let i = 0; i < n; i++) {
              let sum = 0;
              for (let j = 0; j < m; j++) sum += own[i * m + j]!;
              error += Math.abs(sum - 1 / n);
            }
            for (let j = 0; j < m; j++) {
              let sum = 0;
              for (let i = 0; i < n; i++) sum += own[i * m + j]!;
              error += Math.abs(sum - 1 / m);
            }
            assertAlmostEquals(report.marginalError, error, 1e-4 + 0.01 * error, where);
            if (epsilon >= 0.01) assertEquals(report.status, "converged", where);
          });
        }
      }
    }
  },
);

testOnDevices("epsilon 1e-4 of the largest cost is what plain loops find", (device, dtypes) => {
  const random = randomOf(6);
  const [n, m] = [12, 9];
  const cost = randoms(n * m, random);
  const [a, b] = [masses(n, random), masses(m, random)];
  const largest = Math.max(...cost);
  const expected = referenceSinkhorn({ n, m, cost, a, b }, {
    epsilon: 1e-4 * largest,
    tolerance: 1e-9,
    iterations: 20_000,
  });
  for (const dtype of dtypes) {
    using solution = sinkhorn(device, {
      cost: arrayOf(dtype, cost),
      a: arrayOf(dtype, a),
      b: arrayOf(dtype, b),
      rows: n,
      columns: m,
    }, { epsilon: 1e-4, relativeEpsilon: true, tolerance: 1e-6, iterations: 20_000 });
    const [report] = solution.reports;
    assertEquals(report!.status, "converged");
    assertAlmostEquals(report!.cost, expected.cost, 1e-5);
    assertClose(solution.plan.download(), expected.plan, 1e-4, dtype);
  }
});

testOnDevices(
  "scaling and over-relaxation save iterations, and find the same",
  (device, dtypes) => {
    const random = randomOf(7);
    const dimension = 2;
    const problem = (dtype: "f32" | "f64") => ({
      x: arrayOf(dtype, xs),
      y: arrayOf(dtype, ys),
      dimension,
    });
    const xs = randoms(80 * dimension, random);
    const ys = randoms(80 * dimension, random);
    for (const dtype of dtypes) {
      const options = {
        epsilon: 0.002,
        relativeEpsilon: true,
        tolerance: 1e-5,
        iterations: 50_000,
      };
      using plain = sinkhorn(device, problem(dtype), options);
      using relaxed = sinkhorn(device, problem(dtype), { ...options, relaxation: 1.7 });
      using scaled = sinkhorn(device, problem(dtype), { ...options, scaling: 0.5 });
      for (const solution of [plain, relaxed, scaled]) assert(solution.converged);
      assertLess(relaxed.reports[0]!.iterations, 0.6 * plain.reports[0]!.iterations);
      assertClose(relaxed.plan.download(), plain.plan.download(), 1e-5, "over-relaxed");
      assertClose(scaled.plan.download(), plain.plan.download(), 1e-5, "scaled");
      using again = sinkhorn(device, problem(dtype), { ...options, start: plain });
      assertLessOrEqual(again.reports[0]!.iterations, dtype === "f64" ? 1 : 200);
    }
  },
);

testOnDevices(
  "a problem's results do not depend on the others, nor on the run",
  (device, dtypes) => {
    for (const dtype of dtypes) {
      const random = randomOf(8);
      const sizes = [[30, 41], [150, 20], [7, 7]] as const;
      const costs = sizes.map(([n, m]) => arrayOf(dtype, randoms(n * m, random)));
      const all = arrayOf(dtype, costs.flatMap((cost) => [...cost]));
      const options = { epsilon: 0.01, tolerance: 1e-6 };
      const shape = { rows: sizes.map(([n]) => n), columns: sizes.map(([, m]) => m) };
      using together = sinkhorn(device, { cost: all, ...shape }, options);
      using again = sinkhorn(device, { cost: all, ...shape }, options);
      const plan = together.plan.download();
      assertEquals(again.plan.download(), plan);
      assertEquals(again.reports, together.reports);
      sizes.forEach(([rows, columns], p) => {
        using alone = sinkhorn(device, { cost: costs[p]!, rows, columns }, options);
        assertEquals(alone.reports[0], together.reports[p]);
        const own = plan.slice(together.planOffsets[p], together.planOffsets[p + 1]);
        assertEquals(alone.plan.download(), own);
      });
    }
  },
);

testOnDevices("epsilons, tolerances and limits may be a problem's own", (device, dtypes) => {
  for (const dtype of dtypes) {
    const random = randomOf(9);
    const [n, m] = [20, 25];
    const cost = randoms(n * m, random);
    const options = {
      epsilon: [0.5, 0.05, 0.05],
      tolerance: [1e-6, 1e-2, 1e-6],
      iterations: [1000, 1000, 3],
    };
    const three = { rows: [n, n, n], columns: [m, m, m] };
    using solution = sinkhorn(
      device,
      { cost: arrayOf(dtype, [...cost, ...cost, ...cost]), ...three },
      options,
    );
    const [wide, loose, short] = solution.reports;
    assertEquals([wide!.status, loose!.status], ["converged", "converged"]);
    assertEquals([short!.status, short!.iterations], ["iteration-limit", 3]);
    assertLessOrEqual(wide!.marginalError, 1e-6);
    assertLessOrEqual(loose!.marginalError, 1e-2);
    assertEquals([wide!.epsilon, loose!.epsilon, short!.epsilon], [0.5, 0.05, 0.05]);
    using alone = sinkhorn(
      device,
      { cost: arrayOf(dtype, cost), rows: n, columns: m },
      { epsilon: 0.5, tolerance: 1e-6, iterations: 1000 },
    );
    assertEquals(alone.reports[0], wide);
  }
});

testOnDevices("massless rows, single points, duplicates, equal costs", (device, dtypes) => {
  for (const dtype of dtypes) {
    const make = (values: number[]) => arrayOf(dtype, values);
    const options = { epsilon: 0.1, tolerance: 1e-6 };
    {
      using solution = sinkhorn(device, {
        cost: make([1, 2, 3, 4, 5, 6, 7, 8, 9]),
        a: make([0.5, 0, 0.5]),
        b: make([0, 0.25, 0.75]),
        rows: 3,
        columns: 3,
      }, options);
      const [report] = solution.reports;
      assertEquals(report!.status, "converged");
      const plan = solution.plan.download();
      assertClose(plan, [0, 0.125, 0.375, 0, 0, 0, 0, 0.125, 0.375], 1e-6, "massless");
      assertEquals(solution.f.download()[1], -Infinity);
      assertEquals(solution.g.download()[0], -Infinity);
      assertAlmostEquals(report!.cost, 0.125 * (2 + 8) + 0.375 * (3 + 9), 1e-5);
    }
    {
      using solution = sinkhorn(device, { x: make([1, 2]), y: make([4, 6]), dimension: 2 }, {
        epsilon: 1,
      });
      assertAlmostEquals(solution.reports[0]!.cost, 25, 1e-4);
      assertAlmostEquals(solution.plan.download()[0]!, 1, 1e-6);
      assertAlmostEquals(solution.reports[0]!.value, 25 - 1, 1e-4); // H = -1 (log 1 - 1)
    }
    {
      const x = make([1, 1, 1, 1, 2, 2]);
      using solution = sinkhorn(device, { x, y: x, dimension: 2 }, {
        ...options,
        epsilon: 0.01,
      });
      assert(solution.converged);
      const plan = solution.plan.download();
      for (const k of [0, 1, 3, 4]) assertAlmostEquals(plan[k]!, 1 / 6, 1e-5);
      assertAlmostEquals(plan[8]!, 1 / 3, 1e-5);
    }
    for (const price of [0, 3.5]) {
      using solution = sinkhorn(
        device,
        { cost: make(Array(20).fill(price)), rows: 4, columns: 5 },
        { tolerance: 1e-6 },
      );
      const [report] = solution.reports;
      assertEquals(report!.status, "converged");
      assertAlmostEquals(report!.epsilon, price === 0 ? 0.05 : 0.05 * price, 1e-7);
      assertClose(solution.plan.download(), Array(20).fill(1 / 20), 1e-7, `all ${price}`);
    }
  }
});

testOnDevices(
  "forbidden pairs: no mass there, and infeasible problems say so",
  (device, dtypes) => {
    for (const dtype of dtypes) {
      const cost = arrayOf(dtype, [1, Infinity, 2, 1, 3, 1, Infinity, 1, 1]);
      using solution = sinkhorn(device, { cost, rows: 3, columns: 3 }, {
        epsilon: 1,
        tolerance: 1e-6,
      });
      assert(solution.converged);
      const plan = solution.plan.download();
      assertEquals([plan[1], plan[6]], [0, 0]);
      assert(Number.isFinite(solution.reports[0]!.cost));
      using gradients = solution.backward({ plan: arrayOf(dtype, [1, 9, 2, 3, 4, 5, 9, 7, 8]) });
      const gradient = gradients.cost!.download();
      assertEquals([gradient[1], gradient[6]], [0, 0]);
      assert(gradient.every(Number.isFinite));
      // A row without a partner, a column without one, and a good problem beside them.
      const three = arrayOf(dtype, [
        ...[1, 2, Infinity, Infinity],
        ...[Infinity, 1, Infinity, 1],
        ...[1, 2, 3, 4],
      ]);
      using mixed = sinkhorn(device, { cost: three, rows: [2, 2, 2], columns: [2, 2, 2] }, {
        epsilon: 0.5,
      });
      assertEquals(
        mixed.reports.map(({ status }) => status),
        ["infeasible", "infeasible", "converged"],
      );
      assertEquals(mixed.plan.download().slice(0, 8), arrayOf(dtype, Array(8).fill(0)));
      assert(Number.isNaN(mixed.reports[0]!.cost));
      assertEquals(mixed.f.download()[0], 0);
      using zero = mixed.backward({ plan: arrayOf(dtype, Array(12).fill(1)) });
      assertEquals(zero.cost!.download().slice(0, 8), arrayOf(dtype, Array(8).fill(0)));
      // Every row and column has a partner, but there is no plan: what it says is true, and nothing is NaN.
      const hall = arrayOf(dtype, [1, Infinity, Infinity, 1, Infinity, Infinity, 1, 1, 1]);
      using stuck = sinkhorn(device, { cost: hall, rows: 3, columns: 3 }, {
        epsilon: 0.5,
        iterations: 2000,
      });
      assertEquals(stuck.reports[0]!.status, "iteration-limit");
      assertGreater(stuck.reports[0]!.marginalError, 0.1);
      assert(stuck.plan.download().every(Number.isFinite));
    }
  },
);

testOnDevices("what is no problem is an error that names it", (device, dtypes) => {
  const dtype = dtypes[0]!;
  const make = (values: number[]) => arrayOf(dtype, values);
  const cost = make([1, 2, 3, 4, 5, 6]);
  const square = { rows: 2, columns: 3 };
  const broken = (values: number[], at: number, value: number) => {
    const array = make(values);
    array[at] = value;
    return array;
  };
  const refused = (problem: TransportProblem, options: SinkhornOptions = {}) => () => {
    using _solution = sinkhorn(device, problem, options);
  };
  const six = [1, 2, 3, 4, 5, 6];
  refuses(
    "non-finite",
    refused({ cost: broken(six, 4, NaN), ...square }),
    "row 1, column 1",
    "index 4",
  );
  refuses("non-finite", refused({ cost: broken(six, 2, -Infinity), ...square }), "index 2");
  refuses(
    "non-finite",
    refused({ x: make(six), y: broken(six, 3, NaN), dimension: 2 }),
    "coordinate 1 of point 1 of y",
  );
  refuses(
    "non-finite",
    refused({
      x: broken(six, 4, Infinity),
      y: make(six),
      dimension: 2,
      rows: [2, 1],
      columns: [1, 2],
    }),
    "coordinate 0 of point 0 of x of problem 1",
  );
  refuses(
    "invalid-argument",
    refused({ cost, ...square, a: make([1.5, -0.5]) }),
    "element 1 of a",
  );
  refuses(
    "invalid-argument",
    refused({ cost, ...square, b: make([1, NaN, 0]) }),
    "element 1 of b",
  );
  refuses("invalid-argument", refused({ cost, ...square, a: make([1, 1]) }), "equal totals");
  refuses(
    "invalid-argument",
    refused({ cost, ...square, a: make([0, 0]), b: make([0, 0, 0]) }),
    "equal totals above 0",
  );
  refuses("invalid-argument", refused({ cost, rows: 2, columns: 2 }), "4 elements");
  refuses("invalid-argument", refused({ cost, rows: [2], columns: [3, 3] }), "2");
  refuses("invalid-argument", refused({ cost, rows: 0, columns: 3 }), "got 0");
  refuses("invalid-argument", refused({ cost, ...square }, { epsilon: 0 }), "epsilon", "0");
  refuses("invalid-argument", refused({ cost, ...square }, { epsilon: [1, 2] }), "epsilon", "2");
  refuses("invalid-argument", refused({ cost, ...square }, { tolerance: NaN }), "tolerance");
  refuses("invalid-argument", refused({ cost, ...square }, { iterations: 0 }), "iterations");
  refuses("invalid-argument", refused({ cost, ...square }, { relaxation: 2 }), "relaxation");
  refuses("invalid-argument", refused({ cost, ...square }, { scaling: 1 }), "scaling");
  refuses("invalid-argument", refused({ cost, ...square }, { penalty: 0 }), "penalty");
  refuses("invalid-argument", refused({ cost, ...square }, { streaming: true }), "points");
  using solution = sinkhorn(device, { cost, ...square });
  refuses("invalid-argument", () => solution.project(), "apply");
  refuses("invalid-argument", () => solution.apply(make([1]), { width: 1 }), "matrix", "3");
  refuses(
    "invalid-argument",
    () => solution.backward({ plan: make(six) }, { mode: "envelope" }),
    "envelope",
  );
  solution[Symbol.dispose]();
  refuses("disposed", () => solution.apply(make([1, 2, 3]), { width: 1 }), "disposed");
});

testOnDevices("products of plans, and projections", (device, dtypes) => {
  for (const dtype of dtypes) {
    const random = randomOf(12);
    const dimension = 3;
    const sizes = [[3, 5], [150, 70], [1, 500]] as const;
    const rows = sizes.map(([n]) => n);
    const columns = sizes.map(([, m]) => m);
    const count = (list: number[]) => list.reduce((sum, size) => sum + size, 0);
    const x = arrayOf(dtype, randoms(count(rows) * dimension, random));
    const y = arrayOf(dtype, randoms(count(columns) * dimension, random));
    using solution = sinkhorn(device, { x, y, dimension, rows, columns });
    const plan = solution.plan.download();
    using image = solution.apply(y, { width: dimension });
    using mean = solution.project();
    using back = solution.project("columns");
    const [images, means, backs] = [image, mean, back].map((buffer) => buffer.download());
    let [row, column] = [0, 0];
    sizes.forEach(([n, m], p) => {
      const own = plan.subarray(solution.planOffsets[p]);
      for (let i = 0; i < n; i++) {
        for (let k = 0; k < dimension; k++) {
          let [sum, mass] = [0, 0];
          for (let j = 0; j < m; j++) {
            sum += own[i * m + j]! * y[(column + j) * dimension + k]!;
            mass += own[i * m + j]!;
          }
          assertAlmostEquals(images![(row + i) * dimension + k]!, sum, 1e-6);
          assertAlmostEquals(means![(row + i) * dimension + k]!, sum / mass, 1e-5);
        }
      }
      for (let j = 0; j < m; j++) {
        let [sum, mass] = [0, 0];
        for (let i = 0; i < n; i++) {
          sum += own[i * m + j]! * x[(row + i) * dimension]!;
          mass += own[i * m + j]!;
        }
        assertAlmostEquals(backs![(column + j) * dimension]!, sum / mass, 1e-5);
      }
      row += n;
      column += m;
    });
  }
});

testOnDevices("streaming finds what keeping the matrices finds", (device, dtypes) => {
  for (const dtype of dtypes) {
    for (const cost of ["sqeuclidean", "euclidean", "cosine", "dot"] as const) {
      const random = randomOf(13);
      const dimension = 7;
      const [n, m] = [130, 530];
      const problem = {
        x: arrayOf(dtype, randoms(n * dimension, () => gaussian(random))),
        y: arrayOf(dtype, randoms(m * dimension, () => gaussian(random))),
        a: arrayOf(dtype, masses(n, random, 0.1)),
        b: arrayOf(dtype, masses(m, random, 0.1)),
        dimension,
        cost,
      };
      const options = { epsilon: 0.02, relativeEpsilon: true, tolerance: 1e-6 };
      using kept = sinkhorn(device, problem, options);
      using streamed = sinkhorn(device, problem, { ...options, streaming: true });
      assert(kept.converged && streamed.converged);
      const slack = dtype === "f64" ? 1e-9 : 1e-4;
      const size = kept.reports[0]!.epsilon / 0.02;
      assertClose(streamed.f.download(), kept.f.download(), slack * size, `${cost}: f`);
      assertClose(streamed.g.download(), kept.g.download(), slack * size, `${cost}: g`);
      assertAlmostEquals(streamed.reports[0]!.cost, kept.reports[0]!.cost, slack * size);
      assertAlmostEquals(streamed.reports[0]!.value, kept.reports[0]!.value, slack * size);
      using one = streamed.project();
      using two = kept.project();
      assertClose(one.download(), two.download(), 1e-4, `${cost}: projection`);
      assertClose(streamed.plan.download(), kept.plan.download(), 1e-6, `${cost}: plan`);
      using few = sinkhorn(device, problem, { ...options, streaming: true, iterations: 2 });
      assertEquals(few.reports[0]!.status, "iteration-limit");
      assertEquals(few.reports[0]!.iterations, 2);
    }
  }
});

testOnDevices("unbalanced transport is what plain loops find", (device, dtypes) => {
  for (const dtype of device.backend === "cpu" ? dtypes : []) {
    const random = randomOf(14);
    const [n, m] = [14, 11];
    const cost = randoms(n * m, random);
    const a = masses(n, random);
    const b = masses(m, random).map((mass) => 2.5 * mass);
    for (const penalty of [0.05, 1, 50]) {
      const expected = referenceSinkhorn({ n, m, cost, a, b }, {
        epsilon: 0.03,
        tolerance: 1e-11,
        iterations: 50_000,
        penalty,
      });
      using solution = sinkhorn(device, {
        cost: arrayOf(dtype, cost),
        a: arrayOf(dtype, a),
        b: arrayOf(dtype, b),
        rows: n,
        columns: m,
      }, { epsilon: 0.03, penalty, tolerance: 1e-9, iterations: 50_000 });
      const [report] = solution.reports;
      const what = `${dtype}, penalty ${penalty}`;
      assertEquals(report!.status, "converged", what);
      assertClose(solution.plan.download(), expected.plan, 1e-6, what);
      assertAlmostEquals(report!.value, expected.value, 1e-5, what);
    }
  }
});

testOnDevices("arrays may be on the device already", (device: Device) => {
  using x = device.createBuffer("f32", 6);
  using y = device.createBuffer("f32", 4);
  x.upload(Float32Array.of(1, 2, 3, 4, 5, 6));
  y.upload(Float32Array.of(0, 0, 9, 9));
  using there = sinkhorn(device, { x, y, dimension: 2 });
  using here = sinkhorn(device, { x: x.download(), y: y.download(), dimension: 2 });
  assertEquals(there.plan.download(), here.plan.download());
  refuses(
    "invalid-argument",
    () => sinkhorn(device, { x, y: Float64Array.of(1, 2), dimension: 2 }),
    "f32",
  );
});
