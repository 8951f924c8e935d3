/** `kv plan` and `kv bench` as processes: what they print, and how they fail. */
import { assert, assertEquals, assertMatch, assertStringIncludes } from "@std/assert";
import { fail, packhorse, ROOT, succeed, TINY } from "./packhorse_command.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

const CONFIG = `${ROOT}tests/fixtures/configs/llama-3.1-8b.json`;
const PLAN = ["kv", "plan", "--config", CONFIG, "--memory", "24GiB"];
/** A benchmark of a moment. */
const BENCH = [
  ["kv", "bench", "--tokens", "200", "--heads", "1", "--group", "1", "--head-dim", "64"],
  ["--layers", "1", "--repeat", "1"],
].flat();

Deno.test("cli: kv plan and kv bench explain themselves", async () => {
  const kv = await succeed("kv", "--help");
  for (const command of ["plan", "bench"]) assertStringIncludes(kv, command);
  const plan = await succeed("kv", "plan", "--help");
  for (const option of ["--memory", "--kv", "--bits-per-value", "--svg", "raw16", "Examples:"]) {
    assertStringIncludes(plan, option);
  }
  const bench = await succeed("kv", "bench", "--help");
  for (const option of ["--tokens", "--group", "--repeat"]) assertStringIncludes(bench, option);
});

Deno.test("cli: kv plan and kv bench refuse bad usage with exit code 2", async () => {
  const cases: [string[], string][] = [
    [["kv", "plan", "--memory", "24GiB"], "--config"],
    [["kv", "plan", "--config", CONFIG], "--memory"],
    [[...PLAN.slice(0, 4), "--memory", "24"], 'such as 24GiB or 80GB, up to 1024TiB, but got "24"'],
    [[...PLAN.slice(0, 4), "--memory", "lots"], 'but got "lots"'],
    [[...PLAN.slice(0, 4), "--memory", "2000TiB"], 'but got "2000TiB"'],
    [[...PLAN, "--weights", "-1GB"], 'but got "-1GB"'],
    [[...PLAN, "--kv", "zip"], '"zip" is no quantizer; forms are raw16,'],
    [[...PLAN, "--kv", "fixed:9"], '"9" is not a whole number of bits'],
    [[...PLAN, "--batch", "0"], '1 or more, but got "0"'],
    [[...PLAN, "--context", "1e5"], 'but got "1e5"'],
    [[...PLAN, "--batch", "9", "--step-tokens", "8"], "at least the batch of 9"],
    [[...PLAN, "--bandwidth", "fast"], 'such as 4800 or 4.8TB/s, but got "fast"'],
    [[...PLAN, "--kv", "fixed:4", "--dump", TINY], 'needs "--kv packkv"'],
    [[...PLAN, "--kv", "raw16", "--bits-per-value", "3"], 'needs "--kv packkv"'],
    [[...PLAN, "--dump", TINY, "--bits-per-value", "3"], "conflicts"],
    [[...BENCH, "--kv", "packkv:2"], "is not from 1/254 to 1"],
    [["kv", "bench", "--head-dim", "80"], 'Expected values: "64", "96", "128", "256"'],
    [["kv", "bench", "--repeat", "0"], '1 or more, but got "0"'],
  ];
  for (const [args, expected] of cases) assertStringIncludes(await fail(2, ...args), expected);
});

Deno.test("cli: kv plan and kv bench fail with exit code 1 and the reason, leaving nothing behind", async () => {
  using folder = new TemporaryFolder();
  const unknown = await folder.write(
    "unknown.json",
    JSON.stringify({ num_hidden_layers: 2, num_attention_heads: 2, head_dim: 64 }),
  );
  const broken = await folder.write("broken.json", "{");
  const files = folder.list();
  const svg = ["--svg", folder.file("chart.svg")];
  const of = (config: string) => ["kv", "plan", "--config", config, "--memory", "1GB", ...svg];
  const cases: [string[], string][] = [
    [of("/missing.json"), "/missing.json"],
    [of(broken), "not valid JSON"],
    [of(unknown), "give --weights"],
    [of(CONFIG), "1000000000 bytes of memory do not hold 16060522496 of weights"],
    [[...PLAN, "--dump", "/missing", ...svg], "/missing"],
    [[...PLAN, "--bits-per-value", "12", ...svg], "bitsPerValue must be from 0.1025 to 3.6025"],
    [[...PLAN, "--svg", folder.file("missing/x.svg")], "no such folder"],
    [[...BENCH, "--dump", "/missing", ...svg], "/missing"],
  ];
  for (const [args, expected] of cases) {
    assertStringIncludes(await fail(1, ...args, "--json"), expected);
    assertEquals(folder.list(), files);
  }
});

Deno.test("cli: kv plan of one codec has its context and bytes at the top", async () => {
  const args = ["--kv", "packkv:k=0.1,v=0.2", "--weights", "16GiB", "--bandwidth", "4.8TB/s"];
  const plan = JSON.parse(await succeed(...PLAN, ...args, "--json"));
  assert(plan.maxContext > 250_000 && plan.maxContext < 400_000, `${plan.maxContext}`);
  assertEquals(plan.plans, undefined);
  assertEquals(plan.memoryBytes, 24 * 2 ** 30);
  assertEquals(plan.weights, { bytes: 2 ** 34, source: "option" });
  assertEquals(plan.bandwidth, { bytesPerSecond: 4.8e12, source: "option" });
  const bytes = Object.values<number>(plan.bytes);
  assertEquals(bytes.reduce((sum, each) => sum + each), plan.memoryBytes);
  assertEquals(plan.packedBits.source, "measured");
  assertEquals(plan.packedBits.dump, "tests/fixtures/tiny/kv.safetensors");
  assert(plan.bitsPerValue > 3 && plan.bitsPerValue < 4);
  assert(plan.time.speedup > 1);
  assertEquals(plan.cache.tokens, plan.maxContext);

  // By a dump of one's own, and by a number.
  const dumped = JSON.parse(await succeed(...PLAN, ...args, "--dump", TINY, "--json"));
  assertEquals([dumped.maxContext, dumped.packedBits.dump], [plan.maxContext, TINY]);
  const given = JSON.parse(await succeed(...PLAN, ...args, "--bits-per-value", "3", "--json"));
  assertEquals(given.packedBits, { source: "option", bitsPerValue: 3 });
  assertEquals(given.packedBitsPerValue, { keys: 3, values: 3 });
});

Deno.test("cli: kv plan compares codecs, in a table, as JSON and as a chart", async () => {
  using folder = new TemporaryFolder();
  const svg = folder.file("plan.svg");
  const kv = ["--kv", "raw16", "--kv", "packkv", "--kv", "fixed:k=4,v=2"];
  const report = JSON.parse(await succeed(...PLAN, ...kv, "--svg", svg, "--json"));
  assertEquals(report.plans.map(({ kv }: { kv: string }) => kv), [
    "raw16",
    "packkv",
    "fixed:k=4,v=2",
  ]);
  assertEquals(report.weights, {
    bytes: 16_060_522_496,
    source: "config",
    parameters: 8_030_261_248,
  });
  assertEquals(report.model.contextLimit, 131_072);
  const [raw16, packkv, fixed] = report.plans;
  assertEquals(raw16.maxContext, raw16.raw16MaxContext);
  assert(packkv.maxContext > 4 * raw16.maxContext && fixed.maxContext > 4 * raw16.maxContext);
  assertEquals([raw16.packedBits, fixed.packedBits], Array(2).fill({ source: "constant" }));
  const chart = await Deno.readTextFile(svg);
  assertMatch(chart, /^<svg /);
  for (const text of ["raw16", "fixed:k=4,v=2", "memory of weights and cache"]) {
    assertStringIncludes(chart, text);
  }

  const text = await succeed(...PLAN, ...kv, "--svg", svg);
  for (const { kv, maxContext } of report.plans) {
    assertMatch(
      text,
      new RegExp(`^${RegExp.escape(kv)} +${maxContext.toLocaleString("en")} `, "m"),
    );
  }
  assertMatch(text, /holds [\d,]+ tokens of a sequence, [\d.]+× the [\d,]+ of 16 bits/);
  assertMatch(text, /measured on 1,920 tokens of tests\/fixtures\/tiny/);
  assertStringIncludes(text, `${svg} written`);
});

Deno.test("cli: kv plan says what a context lacks, and fails if no codec holds it", async () => {
  const args = [...PLAN, "--context", "200000", "--json"];
  const { plans } = JSON.parse(await succeed(...args, "--kv", "raw16", "--kv", "fixed:4"));
  const [raw16, fixed] = plans;
  assertEquals([raw16.fits, raw16.context, fixed.fits], [false, 200_000, true]);
  assert(raw16.bytes.free < -1e10 && fixed.bytes.free > 1e9);
  const { code, stdout, stderr } = await packhorse([...args, "--kv", "raw16"]);
  assertEquals(code, 1);
  assertEquals(JSON.parse(stdout).bytes, raw16.bytes);
  assertEquals(
    stderr,
    `packhorse: A context of 200000 tokens does not fit; the longest that does is ${raw16.maxContext}\n`,
  );
});

Deno.test("cli: kv bench measures, quietly in a pipe", async () => {
  using folder = new TemporaryFolder();
  const svg = folder.file("bench.svg");
  const kv = ["--kv", "packkv:k=0.1,v=0.2", "--kv", "fixed:2"];
  const report = JSON.parse(await succeed(...BENCH, ...kv, "--svg", svg, "--json"));
  const { rows } = report;
  assertEquals([report.kvHeads, report.headDim, report.dtype], [1, 64, "f16"]);
  assertEquals(rows.map(({ kv }: { kv: string }) => kv), ["packkv:k=0.1,v=0.2", "fixed:2"]);
  for (const row of rows) {
    assert(row.attendSeconds > 0 && row.appendSeconds > 0 && row.prefillBytesPerSecond > 0);
    assertEquals(row.tokens, 328);
  }
  assert(rows[0].bitsPerValue > rows[1].bitsPerValue);
  assertStringIncludes(await Deno.readTextFile(svg), "bits per value");
  assertMatch(await succeed(...BENCH, ...kv, "--dump", TINY), /^fixed:2 +1 +2\.\d\d /m);
});
