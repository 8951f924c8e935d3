import { existsSync } from "node:fs";
import { assert, assertEquals, assertMatch, assertStringIncludes } from "@std/assert";
import { SafetensorsWriter } from "../src/io/mod.ts";
import { denoArguments, fail, packhorse, ROOT, succeed, TINY } from "./packhorse_command.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

Deno.test("cli: help lists the commands and shows examples", async () => {
  const main = await succeed("--help");
  for (const word of ["kv", "doctor", "demo", "completions", "--backend", "--json", "Examples:"]) {
    assertStringIncludes(main, word);
  }
  assertEquals(await succeed(), main);
  const kv = await succeed("kv", "--help");
  for (const command of ["pack", "unpack", "inspect", "sweep"]) assertStringIncludes(kv, command);
  const pack = await succeed("kv", "pack", "--help");
  for (const option of ["--k-rel", "--v-rel", "--repack", "--residual", "Examples:"]) {
    assertStringIncludes(pack, option);
  }
});

Deno.test("cli: --version prints the version of deno.json", async () => {
  const { version } = JSON.parse(await Deno.readTextFile(`${ROOT}deno.json`));
  assertEquals(await succeed("--version"), `packhorse ${version}\n`);
});

Deno.test("cli: bad usage exits with 2 and one line that says what is wrong", async () => {
  const pack = ["kv", "pack", TINY, "-o", "x.phkv"];
  const cases: [string[], string][] = [
    [["pack"], 'Unknown command "pack"'],
    [["kv", "pakc"], "Did you mean"],
    [["kv", "pack"], "input"],
    [["kv", "pack", TINY], "--output"],
    [[...pack, "more"], "more"],
    [[...pack, "--k-rle", "0.1"], "Did you mean"],
    [[...pack, "--k-rel", "2"], 'from 1/254 to 1, but got "2"'],
    [[...pack, "--v-rel", "0"], 'from 1/254 to 1, but got "0"'],
    [[...pack, "--pack", "5"], 'Expected values: "4", "8", "16", "32"'],
    [[...pack, "--repack", "best"], '"median"'],
    [[...pack, "--residual", "-1"], 'but got "-1"'],
    [[...pack, "--k-bits", "2"], 'needs "--quantizer kivi"'],
    [[...pack, "--quantizer", "kivi", "--k-rel", "0.1"], 'cannot be used with "--quantizer kivi"'],
    [[...pack, "--quantizer", "kivi", "--k-bits", "5"], 'Expected values: "2", "3", "4", "8"'],
    [[...pack, "--key-pattern", "k<n>"], "--value-pattern"],
    [[...pack, "--key-pattern", "k", "--value-pattern", "v<n>"], "must have <n> once"],
    [[...pack, "--key-pattern", "k<n>", "--value-pattern", "<n>v<n>"], "must have <n> once"],
    [["kv", "sweep", TINY, "--k-rel", "0.1,big"], 'but got "big"'],
    [["doctor", "--backend", "tpu"], 'Expected values: "auto", "cpu", "cuda"'],
  ];
  for (const [args, expected] of cases) assertStringIncludes(await fail(2, ...args), expected);
});

Deno.test("cli: a missing file exits with 1, names the file and leaves nothing behind", async () => {
  using folder = new TemporaryFolder();
  const missing = folder.file("missing");
  const output = folder.file("output");
  const commands = [
    ["pack", missing, "-o", output],
    ["unpack", missing, "-o", output],
    ["unpack", missing, "-o", output, "--recover"],
    ["inspect", missing],
    ["sweep", missing],
  ];
  for (const command of commands) {
    assertStringIncludes(await fail(1, "kv", ...command, "--json"), missing);
    assertEquals(folder.list(), []);
  }
});

Deno.test("cli: PACKHORSE_DEBUG shows where an error arose", async () => {
  const env = { PACKHORSE_DEBUG: "1" };
  const { code, stderr } = await packhorse(["kv", "inspect", "/missing"], { env });
  assertEquals(code, 1);
  assertMatch(stderr, /^packhorse: /);
  assertMatch(stderr, /\n {4}at .*\.ts:\d+/);
});

Deno.test("cli: an error is one line also without access to the environment", async () => {
  const permissions = ["--allow-read", `--allow-ffi=${ROOT}build`, "--allow-env=NO_COLOR"];
  const { code, stderr } = await packhorse(["kv", "inspect", TINY], { permissions });
  assertEquals(code, 1);
  assertMatch(stderr, /^packhorse: [^\n]+\n$/);
});

Deno.test({
  name: "cli: on a terminal the progress bar is gone before the results come",
  ignore: !existsSync("/usr/bin/script"),
  fn: async () => {
    using folder = new TemporaryFolder();
    const pack = denoArguments(["kv", "pack", TINY, "-o", folder.file("x.phkv")]);
    const command = [Deno.execPath(), ...pack].map((word) => `'${word}'`).join(" ");
    const { code, stdout } = await new Deno.Command("script", {
      args: ["--quiet", "--return", "--command", command, "/dev/null"],
      stdin: "null",
    }).output();
    const screen = new TextDecoder().decode(stdout);
    assertEquals(code, 0, screen);
    assertMatch(screen, /packing .*100 %/);
    const [results] = screen.split("\x1b[2K").slice(-1); // what follows the last line cleared
    assertMatch(results!, /^layer /);
  },
});

for (const shell of ["bash", "zsh", "fish"]) {
  Deno.test(`cli: completions for ${shell} name commands, options and values`, async () => {
    const script = await succeed("completions", shell);
    for (const word of ["packhorse kv sweep", "repack", "median", "greedy"]) {
      assertStringIncludes(script, word);
    }
  });
}

Deno.test("cli: bash accepts the completions", async () => {
  const { success, stderr } = await new Deno.Command("bash", {
    args: ["-n", "-c", await succeed("completions", "bash")],
  }).output();
  assertEquals(new TextDecoder().decode(stderr), "");
  assert(success);
});

Deno.test("cli: doctor says what works", async () => {
  const { ok, versions, backends, devices } = JSON.parse(await succeed("doctor", "--json"));
  assert(ok);
  assertEquals(versions.deno, Deno.version.deno);
  assertEquals(backends.map(({ backend }: { backend: string }) => backend).sort(), ["cpu", "cuda"]);
  for (const report of backends) {
    const opened = devices.some(({ backend }: { backend: string }) => backend === report.backend);
    assertEquals(opened, report.available);
    // What does not work comes with the reason and the way to get it.
    if (!report.available) assert(report.reason && report.remedy);
  }
  for (const { copyBytesPerSecond, matrixProducts } of devices) {
    assert(copyBytesPerSecond > 1e6);
    assert(matrixProducts.available ? matrixProducts.library : matrixProducts.reason);
  }
  assertStringIncludes(await succeed("doctor"), "copy bandwidth");
});

Deno.test("cli: kv pack, inspect and unpack agree on a real cache", async () => {
  using folder = new TemporaryFolder();
  const packed = folder.file("x.phkv");
  const restored = folder.file("y.safetensors");
  const rels = ["--k-rel", "0.1", "--v-rel", "0.2"];
  const pack = JSON.parse(
    await succeed("kv", "pack", TINY, "-o", packed, ...rels, "--repack", "greedy", "--json"),
  );
  const rows: Record<string, unknown>[] = JSON.parse(
    await Deno.readTextFile(`${ROOT}tests/fixtures/packkv_bits.json`),
  );
  const oracle = rows.filter((row) =>
    row.model === "tiny" && row.k_rel === 0.1 && row.repack === "greedy" && row.pack === 16
  );
  assertEquals(pack.layers.length, oracle.length);
  for (const [index, layer] of pack.layers.entries()) {
    const { k_bits, v_bits } = oracle[index] as { k_bits: number; v_bits: number };
    assert(Math.abs(layer.kBits / k_bits - 1) < 0.005, `${layer.kBits} against ${k_bits}`);
    assert(Math.abs(layer.vBits / v_bits - 1) < 0.005, `${layer.vBits} against ${v_bits}`);
    assert(layer.kMaxErrorOverScale > 0.4 && layer.kMaxErrorOverScale < 0.501);
    assert(layer.vMaxErrorOverScale > 0.4 && layer.vMaxErrorOverScale < 0.501);
  }
  const trueBytes = pack.layers.reduce(
    (sum: number, layer: { trueBytes: number }) => sum + layer.trueBytes,
    0,
  );
  assertEquals(pack.fileBytes, (await Deno.stat(packed)).size);
  assertEquals(pack.fileBytes, trueBytes + pack.headerBytes);
  assert(pack.headerBytes > 0 && pack.headerBytes < 0.02 * pack.fileBytes, `${pack.headerBytes}`);

  const inspect = JSON.parse(await succeed("kv", "inspect", packed, "--json"));
  assertEquals(inspect.codec, pack.codec);
  for (const [index, layer] of inspect.layers.entries()) {
    const { kBits, vBits, trueBytes } = pack.layers[index];
    assertEquals([layer.kBits, layer.vBits, layer.trueBytes], [kBits, vBits, trueBytes]);
    const packs = layer.heads * layer.headDim * layer.blocks * (64 / 16);
    const total = (widths: number[]) => widths.reduce((sum, count) => sum + count, 0);
    assertEquals([total(layer.kWidths), total(layer.vWidths)], [packs, packs]);
  }
  assertMatch(await succeed("kv", "inspect", packed), /█/);

  const unpack = JSON.parse(await succeed("kv", "unpack", packed, "-o", restored, "--json"));
  assertEquals(unpack.lost, []);
  assertEquals((await Deno.stat(restored)).size > 0.9 * (await Deno.stat(TINY)).size, true);
  assertEquals(folder.list(), ["x.phkv", "y.safetensors"]);
});

Deno.test("cli: a damaged file is refused without output, and recovered with --recover", async () => {
  using folder = new TemporaryFolder();
  const packed = folder.file("x.phkv");
  const restored = folder.file("y.safetensors");
  await succeed("kv", "pack", TINY, "-o", packed);
  const bytes = await Deno.readFile(packed);
  const flipped = bytes.slice();
  flipped[flipped.length >> 1]! ^= 1;
  for (const damaged of [bytes.subarray(0, bytes.length >> 1), flipped]) {
    await Deno.writeFile(packed, damaged);
    const message = await fail(1, "kv", "unpack", packed, "-o", restored);
    assertStringIncludes(message, packed);
    assertStringIncludes(message, "--recover restores what is intact");
    assertEquals(folder.list(), ["x.phkv"]);
  }
  const recover = ["kv", "unpack", packed, "-o", restored, "--recover"];
  const { lost } = JSON.parse(await succeed(...recover, "--json"));
  assertEquals(lost.length, 1);
  assertMatch(await succeed(...recover), /^lost: /);
  assertEquals(folder.list(), ["x.phkv", "y.safetensors"]);

  // Nothing to recover from: no advice to try what was tried.
  await Deno.writeFile(packed, bytes.subarray(0, 8));
  const message = await fail(1, ...recover);
  assertEquals(message.includes("--recover"), false, message);
});

Deno.test("cli: a cache without tokens has ratios, and charts", async () => {
  using folder = new TemporaryFolder();
  const [cache, packed, svg] = ["x.safetensors", "x.phkv", "x.svg"].map((name) =>
    folder.file(name)
  ) as [string, string, string];
  const tensors = ["layers.0.key", "layers.0.value"]
    .map((name) => ({ name, dtype: "f16", shape: [1, 0, 16] }) as const);
  using writer = await SafetensorsWriter.create(cache, { tensors });
  await writer.commit();
  const { layers } = JSON.parse(await succeed("kv", "pack", cache, "-o", packed, "--json"));
  assertEquals(layers[0].ratio, 0);
  assertEquals((await succeed("kv", "inspect", packed)).includes("NaN"), false);
  assertEquals((await succeed("kv", "sweep", cache, "--svg", svg)).includes("NaN"), false);
});

Deno.test("cli: kv sweep measures the whole grid and draws a chart", async () => {
  using folder = new TemporaryFolder();
  const svg = folder.file("sweep.svg");
  const grid = [
    "--k-rel",
    "0.1,0.2",
    "--v-rel",
    "0.2",
    "--repack",
    "none,median",
    "--pack",
    "8,16",
  ];
  const { rows } = JSON.parse(await succeed("kv", "sweep", TINY, ...grid, "--svg", svg, "--json"));
  assertEquals(rows.length, 2 * 2 * 2);
  for (const { keyRel, keyBits, keyRmsError, ratio } of rows) {
    const other = rows.find((row: { keyRel: number }) => row.keyRel > keyRel);
    if (other) assert(keyBits > other.keyBits && keyRmsError < other.keyRmsError);
    assert(ratio > 2 && ratio < 16);
  }
  const chart = await Deno.readTextFile(svg);
  assertMatch(chart, /^<svg /);
  for (const text of ["bits per value", "root-mean-square error", "Keys", "Values", "median"]) {
    assertStringIncludes(chart, text);
  }
});

Deno.test("cli: a chart that cannot be written is an error before anything is measured", async () => {
  using folder = new TemporaryFolder();
  const svg = folder.file("missing/sweep.svg");
  const message = await fail(1, "kv", "sweep", folder.file("missing"), "--svg", svg);
  assertStringIncludes(message, `Cannot write ${svg}: no such folder`);
});
