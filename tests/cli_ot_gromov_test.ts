/** `ot gromov` as a process: what it prints and writes, and how it fails. */
import { assertAlmostEquals, assertEquals, assertMatch, assertStringIncludes } from "@std/assert";
import { readNpy, writeNpy } from "../src/io/mod.ts";
import { fail, succeed } from "./packhorse_command.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

/** Points on a line, at 0, 1 and 3; and the same ones in another order: 3, 0, 1. */
const x = [0, 1, 3, 1, 0, 2, 3, 2, 0];
const y = [0, 3, 2, 3, 0, 1, 2, 1, 0];

async function write(path: string, values: readonly number[], shape: number[]) {
  const data = new Uint8Array(Float64Array.from(values).buffer);
  await writeNpy(path, { dtype: "f64", shape, data });
}

Deno.test("cli: ot gromov matches, writes, draws and reports", async () => {
  using folder = new TemporaryFolder();
  const path = (name: string) => `${folder.path}/${name}`;
  await write(path("x.npy"), x, [3, 3]);
  await write(path("y.npy"), y, [3, 3]);
  const args = ["ot", "gromov", path("x.npy"), path("y.npy"), "--backend", "cpu"];
  const files = ["--plan", path("plan.npy"), "--heatmap", path("plan.svg")];
  const report = JSON.parse(await succeed(...args, ...files, "--json"));
  assertEquals([report.status, report.converged, report.alpha], ["converged", true, 1]);
  assertEquals([report.n, report.m, report.dtype], [3, 3, "f64"]);
  assertAlmostEquals(report.value, 0);
  assertAlmostEquals(report.bound, 0);
  const { data, shape } = await readNpy(path("plan.npy"));
  assertEquals(shape, [3, 3]);
  const plan = new Float64Array(data.buffer, data.byteOffset, 9);
  assertEquals([...plan].map((mass) => mass > 0 ? 1 : 0), [0, 1, 0, 0, 0, 1, 1, 0, 0]);
  assertMatch(await Deno.readTextFile(path("plan.svg")), /^<svg/);

  // Features that want the identity, alone.
  await write(path("cost.npy"), [0, 1, 1, 1, 0, 1, 1, 1, 0], [3, 3]);
  const fused = JSON.parse(
    await succeed(...args, "--cost", path("cost.npy"), "--alpha", "0", "--json"),
  );
  assertEquals([fused.alpha, fused.cost, fused.value], [0, 0, 0]);
  assertAlmostEquals(fused.distortion, (2 * 4 + 2 * 1 + 2 * 1) / 9);
  const text = await succeed(...args);
  for (const part of ["3 x 3 points", "converged", "certainly not below"]) {
    assertStringIncludes(text, part);
  }
});

Deno.test("cli: ot gromov refuses what does not fit", async () => {
  using folder = new TemporaryFolder();
  const path = (name: string) => `${folder.path}/${name}`;
  await write(path("x.npy"), x, [3, 3]);
  await write(path("flat.npy"), x, [9, 1]);
  await write(path("skew.npy"), [0, 1, 2, 0], [2, 2]);
  const gromov = (...rest: string[]) => ["ot", "gromov", path("x.npy"), ...rest];
  const on = ["--backend", "cpu"];
  assertStringIncludes(await fail(1, ...gromov(path("flat.npy"))), "[9, 1]");
  assertStringIncludes(await fail(1, ...gromov(path("skew.npy"), ...on)), "symmetric");
  const cost = ["--cost", path("skew.npy")];
  assertStringIncludes(await fail(1, ...gromov(path("x.npy"), ...cost)), "3 x 3");
  assertStringIncludes(await fail(2, ...gromov(path("x.npy"), "--alpha", "0.5")), "cost");
});
