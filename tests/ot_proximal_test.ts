/**
 * Proximal points of transport on every backend that opens here: against the exact cost and the points that a CPU makes of
 * doubles, one after another as many.
 */
import { assert, assertAlmostEquals, assertEquals, assertLessOrEqual } from "@std/assert";
import { Device } from "../src/device/mod.ts";
import {
  exactTransport,
  type PointCost,
  proximalTransport,
  type TransportProblem,
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

testOnDevices("proximal points are those of doubles, of any sizes at once", (device, dtypes) => {
  using cpu = Device.open({ backend: "cpu" });
  // One, few, more than a thread block has warps for, more columns than rows, and rows that take several thread blocks.
  const sizes = [[1, 1], [1, 7], [12, 3], [30, 65], [70, 20], [9, 140], [260, 9]] as const;
  const dimension = 3;
  const count = (side: 0 | 1) => sizes.reduce((sum, size) => sum + size[side], 0);
  const [rows, columns] = [sizes.map(([n]) => n), sizes.map(([, m]) => m)];
  const kinds = ["sqeuclidean", "euclidean", "cosine", "dot"] as const;
  kinds.forEach((cost: PointCost, seed) => {
    const random = randomOf(500 + seed);
    const [x, y] = [count(0), count(1)].map((size) =>
      randoms(size * dimension, () => gaussian(random))
    );
    const [a, b] = [rows, columns].map((side) =>
      side.flatMap((size) => [...masses(size, random, 0.1).map(Math.fround)])
    );
    const problemOf = (dtype: "f32" | "f64"): TransportProblem => {
      const make = (values: Iterable<number>) => arrayOf(dtype, values);
      return { x: make(x!), y: make(y!), a: make(a!), b: make(b!), rows, columns, dimension, cost };
    };
    const options = { tolerance: 2e-3, inner: 1 + seed };
    using expected = proximalTransport(cpu, problemOf("f64"), options);
    using exact = exactTransport(cpu, problemOf("f64"));
    for (const dtype of dtypes) {
      using solution = proximalTransport(device, problemOf(dtype), options);
      solution.reports.forEach((report, p) => {
        const what = `${dtype}, seed ${500 + seed}, ${cost}, problem ${p}`;
        const one = expected.reports[p]!;
        assertEquals(report.status, "converged", what);
        assertLessOrEqual(report.marginalError, 2e-3, what);
        // Rounding may decide between two points, as it does in the last digit of the error.
        assertLessOrEqual(Math.abs(report.iterations - one.iterations), 2, what);
        const largest = one.epsilon * one.iterations / 0.05;
        assertAlmostEquals(
          report.epsilon * report.iterations,
          one.epsilon * one.iterations,
          1e-6 * largest,
        );
        assertLessOrEqual(report.cost - exact.reports[p]!.cost, 2e-3 * largest, what);
        if (report.iterations !== one.iterations) return;
        assertAlmostEquals(report.cost, one.cost, 1e-5 * largest, what);
        assertAlmostEquals(report.value, one.value, 1e-5 * largest, what);
        const [plan, other] = [solution, expected].map(({ plan, planOffsets }) =>
          plan!.download().subarray(planOffsets[p], planOffsets[p + 1])
        );
        assertClose(plan!, other!, 2e-5 * Math.max(...other!), what);
      });
      // The potentials make the same plan, as far as float32 knows it.
      const made = solution.plan!.download();
      const [f, g] = [solution.f.download(), solution.g.download()];
      assertEquals([f.some(Number.isNaN), g.some(Number.isNaN)], [false, false]);
      assert(made.every((entry) => entry >= 0 && entry <= 1));
    }
  });
});

testOnDevices("proximal points where nothing may go, or nothing is", (device, dtypes) => {
  for (const dtype of dtypes) {
    const make = (...values: number[]) => arrayOf(dtype, values);
    using forced = proximalTransport(device, {
      cost: make(1, Infinity, 0, 5),
      rows: 2,
      columns: 2,
    });
    assertEquals(forced.reports[0]!.status, "converged");
    assertClose(forced.plan!.download(), [0.5, 0, 0, 0.5], 1e-4, dtype);
    using none = proximalTransport(device, {
      cost: make(1, 2, Infinity, Infinity, 3, 4),
      a: make(0.5, 0.5, 0),
      rows: 3,
      columns: 2,
    });
    assertEquals([none.reports[0]!.status, none.reports[0]!.iterations], ["infeasible", 0]);
    assertEquals(none.plan!.download(), make(0, 0, 0, 0, 0, 0));
    using equal = proximalTransport(device, { cost: make(0, 0, 0, 0), rows: 2, columns: 2 });
    assertEquals(equal.reports[0]!.status, "converged");
    assertClose(equal.plan!.download(), [0.25, 0.25, 0.25, 0.25], 1e-6, dtype);
    using heavy = proximalTransport(device, {
      cost: make(4, 1, 3, 2, 0, 5, 3, 2, 2),
      a: make(100, 0, 200),
      b: make(150, 150, 0),
      rows: 3,
      columns: 3,
    }, { tolerance: 0.01 });
    // The mass of row 0 goes to column 1, and that of row 2 wherever there is room.
    assertAlmostEquals(heavy.reports[0]!.cost, 100 + 3 * 150 + 2 * 50, 3);
    assertEquals([3, 4, 5, 2, 8].map((k) => heavy.plan!.download()[k]), [0, 0, 0, 0, 0]);
    refuses(
      "non-finite",
      () => proximalTransport(device, { cost: make(1, NaN), rows: 1, columns: 2 }),
      "column 1",
    );
  }
});

testOnDevices(
  "proximal points: the same bits alone, again, and beside others",
  (device, dtypes) => {
    const random = randomOf(510);
    const sizes = [[20, 30], [1, 5], [3, 90], [64, 64], [64, 300], [11, 12]] as const;
    const costs = sizes.map(([n, m]) => randoms(n * m, random));
    for (const dtype of dtypes) {
      const solved = (chosen: readonly number[]) => {
        using solution = proximalTransport(device, {
          cost: arrayOf(dtype, chosen.flatMap((p) => [...costs[p]!])),
          rows: chosen.map((p) => sizes[p]![0]),
          columns: chosen.map((p) => sizes[p]![1]),
        }, { iterations: chosen.map((p) => 5 + p), inner: 2 });
        const plan = solution.plan!.download();
        return solution.reports.map((report, p) => ({
          report,
          plan: plan.slice(solution.planOffsets[p], solution.planOffsets[p + 1]),
        }));
      };
      const every = sizes.map((_, p) => p);
      const together = solved(every);
      assertEquals(solved(every), together);
      every.forEach((p) => assertEquals(solved([p]), [together[p]!]));
    }
  },
);

testOnDevices("proximal points of what does not lie on chip", (device) => {
  if (device.backend === "cpu") return;
  const cost = new Float32Array(2 * 600);
  refuses(
    "unsupported",
    () => proximalTransport(device, { cost, rows: 2, columns: 600 }),
    "problem 0 of 2 x 600",
    "CPU device",
  );
});
