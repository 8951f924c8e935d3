/** `ot solve` as a process: what it prints and writes, and how it fails. */
import {
  assert,
  assertAlmostEquals,
  assertEquals,
  assertLessOrEqual,
  assertMatch,
  assertStringIncludes,
} from "@std/assert";
import { Device } from "../src/device/mod.ts";
import { readNpy, writeNpy } from "../src/io/mod.ts";
import { sinkhorn } from "../src/ot/mod.ts";
import { backends } from "./backends.ts";
import { randomOf } from "./kv_cases.ts";
import { fail, succeed } from "./packhorse_command.ts";
import { randoms } from "./ot_support.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

const [n, m, dimension] = [7, 12, 3];
const random = randomOf(51);
const x = randoms(n * dimension, random);
const y = randoms(m * dimension, random);

/** Writes float64 or float32 numbers. */
async function write(path: string, values: Float64Array, shape: number[], wide: boolean) {
  const array = wide ? values : Float32Array.from(values);
  const data = new Uint8Array(array.buffer as ArrayBuffer);
  await writeNpy(path, { dtype: wide ? "f64" : "f32", shape, data });
}

async function withPoints<Result>(
  wide: boolean,
  work: (x: string, y: string, folder: TemporaryFolder) => Promise<Result>,
): Promise<Result> {
  using folder = new TemporaryFolder();
  const paths = [`${folder.path}/x.npy`, `${folder.path}/y.npy`] as const;
  await write(paths[0], x, [n, dimension], wide);
  await write(paths[1], y, [m, dimension], wide);
  return await work(...paths, folder);
}

Deno.test("cli: ot solve explains itself", async () => {
  const ot = await succeed("ot", "--help");
  assertStringIncludes(ot, "solve");
  assertEquals(await succeed("ot"), ot);
  const help = await succeed("ot", "solve", "--help");
  for (const option of ["--cost", "--epsilon", "--relative-epsilon", "--plan", "--heatmap"]) {
    assertStringIncludes(help, option);
  }
});

Deno.test("cli: ot solve writes the module's plan, draws it, and reports it", async () => {
  for (const wide of [true, false]) {
    await withPoints(wide, async (xPath, yPath, folder) => {
      const plan = `${folder.path}/plan.npy`;
      const heatmap = `${folder.path}/plan.svg`;
      const args = ["--epsilon", "0.02", "--relative-epsilon", "--tolerance", "1e-6"];
      const report = JSON.parse(
        await succeed(
          ...["ot", "solve", xPath, yPath, ...args, "--plan", plan, "--heatmap", heatmap, "--json"],
        ),
      );
      using device = Device.open();
      const types = device.backend === "cpu" && wide ? Float64Array : Float32Array;
      using solution = sinkhorn(
        device,
        { x: types.from(x), y: types.from(y), dimension },
        { epsilon: 0.02, relativeEpsilon: true, tolerance: 1e-6 },
      );
      const [expected] = solution.reports;
      assertEquals(report.status, "converged");
      assertEquals([report.n, report.m, report.dimension], [n, m, dimension]);
      assertEquals(report.costKind, "sqeuclidean");
      assertEquals(report.iterations, expected!.iterations);
      assertAlmostEquals(report.cost, expected!.cost, 1e-12);
      assertAlmostEquals(report.value, expected!.value, 1e-12);
      assertLessOrEqual(report.marginalError, 1e-6);
      const written = await readNpy(plan);
      assertEquals([written.dtype, written.shape], [solution.dtype, [n, m]]);
      const bytes = new Uint8Array(solution.plan.byteLength);
      assertEquals(written.data, solution.plan.download(bytes));
      const svg = await Deno.readTextFile(heatmap);
      assertMatch(svg, /^<svg/);
      assertStringIncludes(svg, "points y");
    });
  }
});

Deno.test("cli: ot solve without convergence says so, writes the plan and exits with 0", async () => {
  await withPoints(true, async (xPath, yPath, folder) => {
    const plan = `${folder.path}/plan.npy`;
    const text = await succeed(
      ...["ot", "solve", xPath, yPath, "--epsilon", "0.001", "--tolerance", "1e-9"],
      ...["--iterations", "2", "--plan", plan],
    );
    assertStringIncludes(text, "iteration-limit");
    assertStringIncludes(text, `${plan} written`);
    assertEquals((await readNpy(plan)).shape, [n, m]);
  });
});

Deno.test("cli: ot solve --exact, on every backend", async () => {
  await withPoints(true, async (xPath, yPath) => {
    for (const backend of backends()) {
      const args = ["ot", "solve", xPath, yPath, "--json", "--backend", backend];
      const exact = JSON.parse(await succeed(...args, "--exact"));
      assertEquals(exact.method, "exact");
      assertEquals(exact.epsilon, 0);
      const entropic = JSON.parse(await succeed(...args));
      assert(entropic.cost > exact.cost && exact.cost > 0.5 * entropic.cost);
    }
  });
});

Deno.test("cli: ot solve takes masses, and refuses what does not fit", async () => {
  await withPoints(true, async (xPath, yPath, folder) => {
    const a = `${folder.path}/a.npy`;
    const masses = new Float64Array(n).fill(0);
    masses[2] = 1;
    await write(a, masses, [n], true);
    const plan = `${folder.path}/plan.npy`;
    await succeed("ot", "solve", xPath, yPath, "--a", a, "--plan", plan, "--backend", "cpu");
    const { data } = await readNpy(plan);
    const entries = new Float64Array(data.buffer, data.byteOffset, n * m);
    assertAlmostEquals(entries[2 * m + 4]!, 1 / m, 1e-6);
    assertEquals(entries[0], 0);
    assertStringIncludes(await fail(1, "ot", "solve", xPath, yPath, "--b", a), "7 masses");
    assertStringIncludes(await fail(1, "ot", "solve", xPath, a), "[7]");
    const flat = `${folder.path}/flat.npy`;
    await write(flat, x, [n * dimension, 1], true);
    assertStringIncludes(await fail(1, "ot", "solve", xPath, flat), "1 (");
    const broken = x.slice();
    broken[4] = NaN;
    await write(flat, broken, [n, dimension], true);
    assertStringIncludes(await fail(1, "ot", "solve", flat, yPath), "point 1 of x");
    assertStringIncludes(
      await fail(2, "ot", "solve", xPath, yPath, "--epsilon", "0"),
      "above 0",
    );
    assertStringIncludes(
      await fail(2, "ot", "solve", xPath, yPath, "--exact", "--epsilon", "1"),
      "exact",
    );
  });
});
