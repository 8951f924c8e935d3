/**
 * Gromov-Wasserstein transport of graphs of all sizes that a backend has other ways for, against a CPU's, in one batch; and
 * what is too large.
 */
import { assertAlmostEquals, assertEquals } from "@std/assert";
import { Device } from "../src/device/mod.ts";
import { type GromovProblem, gromovTransport, type TransportDType } from "../src/ot/mod.ts";
import { randomOf } from "./kv_cases.ts";
import { arrayOf, assertClose, masses, randoms, refuses, testOnDevices } from "./ot_support.ts";

/** Euclidean distances of random points in the plane. */
function planar(size: number, random: () => number): Float64Array {
  const points = Array.from({ length: size }, () => [random(), random()] as const);
  return Float64Array.from({ length: size * size }, (_, k) => {
    const [p, q] = [points[Math.floor(k / size)]!, points[k % size]!];
    return Math.fround(Math.hypot(p[0] - q[0], p[1] - q[1]));
  });
}

testOnDevices(
  "gromov: graphs of all sizes at once, fused, as a CPU matches them",
  (device, dtypes) => {
    using cpu = Device.open({ backend: "cpu" });
    const seed = 81;
    const random = randomOf(seed);
    const sizes = [[1, 1], [3, 70], [33, 64], [65, 40], [128, 100], [20, 257], [150, 129], [1, 9]];
    const [rows, columns] = [sizes.map(([n]) => n!), sizes.map(([, m]) => m!)];
    const all = {
      distanceX: rows.flatMap((n) => [...planar(n, random)]),
      distanceY: columns.flatMap((m) => [...planar(m, random)]),
      cost: sizes.flatMap((
        [n, m],
      ) => [...randoms(n! * m!, () => random() < 0.05 && n! > 20 ? Infinity : random())]),
      a: rows.flatMap((n) => [...masses(n, random, 0.1).map(Math.fround)]),
      b: columns.flatMap((m) => [...masses(m, random, 0.1).map(Math.fround)]),
    };
    const problemOf = (dtype: TransportDType): GromovProblem => {
      const make = (values: number[]) => arrayOf(dtype, values);
      const { distanceX, distanceY, cost, a, b } = all;
      return {
        distanceX: make(distanceX),
        distanceY: make(distanceY),
        cost: make(cost),
        a: make(a),
        b: make(b),
        rows,
        columns,
      };
    };
    const options = { alpha: sizes.map((_, p) => p / sizes.length), iterations: 4 };
    using expected = gromovTransport(cpu, problemOf("f64"), options);
    const wanted = expected.plan.download();
    for (const dtype of dtypes) {
      using solution = gromovTransport(device, problemOf(dtype), options);
      const plan = solution.plan.download();
      solution.reports.forEach((report, p) => {
        const what = `${dtype}, seed ${seed}, ${sizes[p]}`;
        const one = expected.reports[p]!;
        assertEquals([report.status, report.iterations], [one.status, one.iterations], what);
        for (const name of ["value", "cost", "distortion", "bound"] as const) {
          assertAlmostEquals(report[name], one[name], 1e-12, `${name}, ${what}`);
        }
        assertAlmostEquals(report.gap, one.gap, 1e-12, what);
        assertAlmostEquals(report.marginalError, 0, 1e-12, what);
        const [first, last] = [solution.planOffsets[p]!, solution.planOffsets[p + 1]!];
        assertClose(plan.subarray(first, last), wanted.subarray(first, last), 1e-7, what);
      });
    }
  },
);

testOnDevices("gromov: graphs that are too large for a GPU", (device) => {
  if (device.backend === "cpu") return;
  const problem = {
    distanceX: new Float32Array(1 + 513 * 513),
    distanceY: new Float32Array(2),
    rows: [1, 513],
    columns: [1, 1],
  };
  refuses(
    "unsupported",
    () => gromovTransport(device, problem),
    "problem 1 of 513 x 1",
    "512",
    "CPU device",
  );
});
