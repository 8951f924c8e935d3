/** `llm chat`, `llm bench`, `llm dump` and `kv tune` as processes: what they print and write, and how they fail. */
import {
  assert,
  assertEquals,
  assertGreater,
  assertLess,
  assertLessOrEqual,
  assertMatch,
  assertStringIncludes,
} from "@std/assert";
import { Device } from "../src/device/mod.ts";
import { convertFloats, type FloatDType } from "../src/float_conversion.ts";
import { SafetensorsReader } from "../src/io/mod.ts";
import { type ChatMessage, LanguageModel } from "../src/llm/mod.ts";
import { denoArguments, fail, packhorse, ROOT, succeed, TINY } from "./packhorse_command.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

const MODEL = `${ROOT}tests/fixtures/tiny`;
/** Shows who says what; the tiny model has no template of its own. */
const TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n" +
  "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";

/** What `kv tune --json` prints, as far as it is looked at. */
interface TuneReport {
  maxKld: number;
  kv: string;
  kld: number;
  bitsPerValue: number;
  measuredCodecs: number;
  isCut: boolean;
  rows: { kv: string; kld: number; bitsPerValue: number; holds: boolean }[];
}

function floatsOf(bytes: Uint8Array<ArrayBuffer>, from: FloatDType): Float32Array {
  return new Float32Array(convertFloats(bytes, { from, to: "f32" }).buffer);
}

/** A folder with the tiny model and a chat template. */
async function chatFolder(): Promise<TemporaryFolder> {
  const folder = new TemporaryFolder();
  for (const name of ["config.json", "model.safetensors", "tokenizer.json"]) {
    await Deno.copyFile(`${MODEL}/${name}`, folder.file(name));
  }
  await folder.write("chat_template.jinja", TEMPLATE);
  return folder;
}

Deno.test("cli: llm chat answers a line at a time, as the template says, and remembers", async () => {
  using folder = await chatFolder();
  const questions = ["Who went up to Jerusalem?", "And what did the king say?"];
  const system = "Speak as a prophet.";
  const command = ["llm", "chat", "--model", folder.path, "--kv", "raw16", "--max-tokens", "12"];
  const input = `${questions.join("\n\n")}\n`;
  const plain = await packhorse([...command, "--system", system], { input });
  assertEquals([plain.code, plain.stderr], [0, ""]);

  using device = Device.open();
  using model = await LanguageModel.load(device, folder.path, { codec: "raw16", tokens: 512 });
  const messages: ChatMessage[] = [{ role: "system", content: system }];
  const prompts: number[] = [];
  for (const content of questions) {
    messages.push({ role: "user", content });
    const text = model.tokenizer!.chat(messages);
    assertStringIncludes(text, `[system] ${system}\n[user] ${questions[0]}\n[assistant]`);
    const prompt = model.tokenizer!.encode(text, { specialTokens: false });
    prompts.push(prompt.length);
    const answer = await model.complete(prompt, { maxTokens: 12 });
    messages.push({ role: "assistant", content: answer.text });
  }
  const answers = [messages[2]!.content, messages[4]!.content];
  // In bf16 the likeliest token may be another, where two are close: what is computed at once differs.
  if (device.backend === "cpu") assertEquals(plain.stdout, `${answers.join("\n")}\n`);

  const { code, stdout } = await packhorse([...command, "--system", system, "--json"], { input });
  assertEquals(code, 0);
  const { turns, kv } = JSON.parse(stdout);
  assertEquals(kv, "raw16");
  assertEquals(turns.map(({ user }: { user: string }) => user), questions);
  if (device.backend === "cpu") {
    assertEquals(turns.map(({ assistant }: { assistant: string }) => assistant), answers);
    assertEquals(turns.map((turn: { promptTokens: number }) => turn.promptTokens), prompts);
  }
  // The second prompt is computed from about where the first one ends: the answer may be cut into other tokens.
  assertEquals(turns[0].rememberedTokens, 0);
  assertGreater(turns[1].rememberedTokens, prompts[0]! - 4);
  assert(turns[1].cacheBytes > turns[0].cacheBytes && turns[1].bitsPerValue >= 16);
});

Deno.test("cli: llm chat starts anew at /reset and ends at /exit", async () => {
  using folder = await chatFolder();
  const command = ["llm", "chat", "--model", folder.path, "--max-tokens", "6", "--json"];
  const input = "In the beginning\n/reset\nIn the beginning\n/exit\nnot read\n";
  const { code, stdout, stderr } = await packhorse(command, { input });
  assertEquals([code, stderr], [0, ""]);
  const { turns } = JSON.parse(stdout);
  assertEquals(turns.length, 2);
  const [first, second] = turns;
  assertEquals([second.assistant, second.promptTokens], [first.assistant, first.promptTokens]);
  assertEquals(second.rememberedTokens, 0);
});

Deno.test("cli: llm chat stops an answer at Ctrl-C, and goes on", async () => {
  using folder = await chatFolder();
  // No token ends an answer, so that only an interrupt does in time.
  const { eos_token_id: _, ...config } = JSON.parse(
    await Deno.readTextFile(folder.file("config.json")),
  );
  await folder.write("config.json", JSON.stringify(config));
  const command = ["llm", "chat", "--model", folder.path, "--max-tokens", "8000", "--context"];
  const process = new Deno.Command(Deno.execPath(), {
    args: denoArguments([...command, "8192", "--temperature", "1"]),
    stdin: "piped",
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  const writer = process.stdin.getWriter();
  const reader = process.stdout.getReader();
  const decoder = new TextDecoder();
  let text = "";
  const readUntil = async (isThere: () => boolean) => {
    while (!isThere()) {
      const { done, value } = await reader.read();
      if (done) break;
      text += decoder.decode(value, { stream: true });
    }
  };
  await writer.write(new TextEncoder().encode("In the beginning\n"));
  await readUntil(() => text.length > 20);
  process.kill("SIGINT");
  await writer.write(new TextEncoder().encode("And then?\n"));
  const stopped = text.length;
  await readUntil(() => text.length > stopped + 200);
  process.kill("SIGINT");
  await writer.write(new TextEncoder().encode("/exit\n"));
  await writer.close();
  await readUntil(() => false);
  const stderr = await new Response(process.stderr).text();
  const { code } = await process.status;
  assertEquals([code, stderr], [0, ""]);
  assertMatch(text, /\n$/);
});

Deno.test("cli: llm chat refuses what cannot chat in one line", async () => {
  using folder = await chatFolder();
  const none = await fail(1, "llm", "chat", "--model", MODEL);
  assertStringIncludes(none, `Cannot chat with ${MODEL}: it has no chat template`);
  assertStringIncludes(await fail(2, "llm", "chat"), "--model");
  const long = ["llm", "chat", "--model", folder.path, "--context", "64", "--max-tokens", "4"];
  const { code, stdout, stderr } = await packhorse(long, { input: `a\n${"word ".repeat(80)}\n` });
  assertEquals(code, 1);
  assertMatch(
    stderr,
    /^packhorse: Cannot chat: with this message the conversation has \d+ tokens, .* 64, .*\n$/,
  );
  assertMatch(stdout, /^.*\n$/s); // the first answer
  assertStringIncludes(await succeed("llm", "chat", "--help"), "/reset");
});

Deno.test("cli: llm bench measures every codec, over prompts or synthetic tokens", async () => {
  const config = `${MODEL}/config.json`;
  const size = ["--context", "1024", "--batch", "2", "--tokens", "8", "--residual", "16"];
  const kv = ["--kv", "raw16", "--kv", "fixed:k=4,v=2"];
  const computed = JSON.parse(
    await succeed("llm", "bench", "--model", MODEL, ...size, ...kv, "--json"),
  );
  assertEquals([computed.synthetic, computed.randomWeights], [false, false]);
  const [raw16, fixed] = computed.rows;
  const { filledTokens } = raw16;
  assert(filledTokens > 900 && filledTokens <= 1024 - 8);
  for (const row of [raw16, fixed]) {
    assertEquals([row.prefillTokens, row.isSynthetic], [2 * filledTokens, false]);
    assert(row.prefillTokensPerSecond > 0 && row.decodeTokensPerSecond > 0 && row.stepSeconds > 0);
    assertEquals(row.raw16CacheBytes, 2 * 1024 * 4 * 2 * 2 * 64 * 2); // batch, tokens, layers, parts, heads, channels
    assert(row.allocatedBytes > row.cacheBytes);
    const onGpu = computed.backend === "cuda";
    assertEquals(
      [typeof row.launchGapShare, typeof row.backToBackSeconds],
      Array(2).fill(onGpu ? "number" : "undefined"),
    );
  }
  assertEquals(raw16.speedup, 1);
  assert(raw16.bitsPerValue >= 16 && raw16.bitsPerValue < 16.1);
  // 15 blocks of 64 tokens, at 3 bits and their tables, and 64 tokens in 16 bits.
  assert(
    fixed.bitsPerValue > (960 * 3 + 64 * 16) / 1024 && fixed.bitsPerValue < 4.3,
    `${fixed.bitsPerValue}`,
  );

  const args = ["llm", "bench", "--config", config, "--synthetic", ...size];
  const packkv = ["--kv", "packkv:k=0.1,v=0.2"];
  const filled = JSON.parse(await succeed(...args, ...packkv, "--dump", TINY, "--json"));
  assertEquals([filled.synthetic, filled.randomWeights, filled.filledFrom], [true, true, TINY]);
  const [row] = filled.rows;
  assertEquals([row.isSynthetic, row.filledTokens], [true, filledTokens]);
  assert(row.bitsPerValue > 3 && row.bitsPerValue < 4.5, `${row.bitsPerValue}`);
  const table = await succeed(...args, ...packkv);
  assertMatch(table, /^packkv:k=0.1,v=0.2 .*\/s .*\/s/m);
  assertStringIncludes(
    table,
    "filled with synthetic keys and values, drawn from tests/fixtures/tiny/kv.safetensors",
  );
});

Deno.test("cli: llm bench goes on where one codec does not fit, and refuses bad usage", async () => {
  const args = ["llm", "bench", "--config", `${MODEL}/config.json`, "--synthetic", "--tokens", "4"];
  // Too few bits for what the tokens take; the other codec's do not depend on them.
  const few = [
    ["--context", "1024", "--step-tokens", "64", "--bits-per-value", "1"],
    ["--kv", "packkv:k=0.01,v=0.01"],
  ].flat();
  const { rows } = JSON.parse(await succeed(...args, ...few, "--kv", "fixed:2", "--json"));
  assertStringIncludes(rows[0].error, "pool is full");
  assert(rows[1].decodeTokensPerSecond > 0);
  assertEquals((await packhorse([...args, ...few])).code, 1);

  const cases: [number, string[], string][] = [
    [2, ["llm", "bench"], '"--model" or "--config"'],
    [2, [...args, "--model", MODEL], "conflicts"],
    [2, ["llm", "bench", "--model", MODEL, "--dump", TINY], "depends"],
    [2, [...args, "--batch", "0"], 'but got "0"'],
    [
      1,
      [...args, "--context", "100000"],
      "context, of which the steps take a part, must be an integer from",
    ],
    [1, [...args, "--dump", "/missing"], "/missing"],
    [1, ["llm", "bench", "--config", "/missing.json"], "/missing.json"],
  ];
  for (const [code, args, expected] of cases) {
    assertStringIncludes(await fail(code, ...args), expected);
  }
});

Deno.test("cli: llm dump writes the cache that transformers computes, and kv commands read it", async () => {
  using folder = new TemporaryFolder();
  const output = folder.file("kv.safetensors");
  const args = ["llm", "dump", "--model", MODEL, "--text", `${MODEL}/heldout.txt`, "--out", output];
  const report = JSON.parse(await succeed(...args, "--layers", "0,2", "--json"));
  assertEquals([report.tokens, report.layers, report.byteLength], [1024, [0, 2], 2 ** 20]);
  {
    using expected = await SafetensorsReader.open(TINY);
    using found = await SafetensorsReader.open(output);
    assertEquals([...found.tensors.keys()].sort(), [...expected.tensors.keys()].sort());
    for (const [name, { shape, dtype }] of expected.tensors) {
      const info = found.info(name);
      assertEquals([info.shape, info.dtype], [shape, report.dtype]);
      const [a, b] = [
        floatsOf(await found.read(name), report.dtype),
        floatsOf(await expected.read(name), dtype as FloatDType),
      ];
      const largest = b.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
      const error = a.reduce((most, value, i) => Math.max(most, Math.abs(value - b[i]!)), 0);
      // A step or two of f16; on a GPU weights, keys and values are bf16.
      assertLess(error / largest, report.dtype === "f16" ? 2 ** -9 : 0.05, name);
      assertGreater(largest, 0.1);
    }
  }
  const packed = JSON.parse(
    await succeed("kv", "pack", output, "-o", folder.file("kv.phkv"), "--json"),
  );
  assertEquals(packed.layers.length, 2);
  const bench = [
    "llm",
    "bench",
    "--model",
    MODEL,
    "--synthetic",
    "--dump",
    output,
    "--tokens",
    "4",
  ];
  assertGreater(
    JSON.parse(await succeed(...bench, "--context", "512", "--kv", "packkv", "--json")).rows[0]
      .cacheBytes,
    0,
  );

  // All layers, of a text that does not end with a step.
  const all = folder.file("all.safetensors");
  const some = [...args.slice(0, -1), all, "--tokens", "600"];
  assertMatch(await succeed(...some), /all\.safetensors written .* 600 tokens of 4 layers/);
  using long = await SafetensorsReader.open(output);
  using short = await SafetensorsReader.open(all);
  assertEquals(short.tensors.size, 8);
  assertEquals(short.info("layers.3.value").shape, [2, 600, 64]);
  const head = 600 * 64 * 2;
  const [a, b] = [await short.read("layers.2.key"), await long.read("layers.2.key")];
  const prefix = report.backend === "cpu" ? head : 512 * 64 * 2; // the same steps
  assertEquals(a.subarray(0, prefix), b.subarray(0, prefix));
});

Deno.test("cli: llm dump refuses what it cannot write, and leaves nothing behind", async () => {
  using folder = new TemporaryFolder();
  const text = await folder.write("text", "In the beginning");
  const out = ["--out", folder.file("kv.safetensors")];
  const args = ["llm", "dump", "--model", MODEL, "--text", text];
  const cases: [number, string[], string][] = [
    [2, args, "--out"],
    [2, [...args, ...out, "--tokens", "0"], 'but got "0"'],
    [1, [...args, ...out], "the text has 6 tokens, fewer than 1024"],
    [1, [...args, ...out, "--tokens", "4", "--layers", "1,4"], "from 0 to 3, got 4"],
    [1, [...args, ...out, "--tokens", "4", "--layers", "1,1"], "layer 1 is given twice"],
    [1, [...args, "--tokens", "4", "--out", folder.file("missing/kv.safetensors")], "missing"],
    [1, ["llm", "dump", "--model", MODEL, "--text", "/missing", ...out], "/missing"],
  ];
  for (const [code, args, expected] of cases) {
    assertStringIncludes(await fail(code, ...args), expected);
    assertEquals(folder.list(), ["text"]);
  }
});

Deno.test("cli: kv tune finds the codec with the fewest bits that holds", async () => {
  using folder = new TemporaryFolder();
  const excerpt = (await Deno.readTextFile(`${MODEL}/heldout.txt`)).slice(0, 2000);
  const text = await folder.write("text", excerpt);
  const svg = folder.file("tune.svg");
  const args = ["kv", "tune", "--model", MODEL, "--text", text, "--windows", "2", "--tokens", "64"];
  const tune = async (maxKld: number, ...more: string[]): Promise<TuneReport> =>
    JSON.parse(await succeed(...args, "--max-kld", `${maxKld}`, "--json", ...more));
  const found = await tune(0.05, "--svg", svg);
  assertEquals([found.maxKld, found.isCut, found.rows.at(-1)!.kv], [0.05, false, "raw16"]);
  assert(found.measuredCodecs <= 40 && found.rows.length === found.measuredCodecs + 1);
  const holding = found.rows.filter(({ kld }) => kld <= 0.05);
  assertEquals(found.rows.filter(({ holds }) => holds), holding);
  const [best] = holding.sort((a, b) => a.bitsPerValue - b.bitsPerValue || a.kld - b.kld);
  assertEquals([found.kv, found.kld, found.bitsPerValue], [
    best!.kv,
    best!.kld,
    best!.bitsPerValue,
  ]);
  for (const quantizer of ["packkv", "fixed", "kivi"]) {
    assert(found.rows.some(({ kv }) => kv.startsWith(quantizer)), quantizer);
  }
  assertStringIncludes(await Deno.readTextFile(svg), found.kv);

  // It is what evaluation measures, and no worse than every number of bits that keys and values have alike.
  using device = Device.open();
  using model = await LanguageModel.load(device, MODEL, { tokens: 64 });
  const bits = Array.from({ length: 8 }, (_, i) => i + 1);
  const codecs = [found.kv, ...bits.flatMap((each) => [`fixed:${each}`, `kivi:${each}`])];
  const { results } = await model.evaluate(excerpt, { windows: 2, tokens: 64, codecs });
  const [own, ...others] = results;
  assertEquals([own!.kld, own!.bitsPerValue], [found.kld, found.bitsPerValue]);
  const cheapest = Math.min(
    ...others.filter(({ kld }) => kld <= 0.05).map(({ bitsPerValue }) => bitsPerValue),
  );
  assertLessOrEqual(found.bitsPerValue, cheapest);
  // packkv comes close to what is allowed, where it holds at all.
  const packkv = found.rows.filter(({ kv, holds }) => holds && kv.startsWith("packkv"));
  assertGreater(Math.max(...packkv.map(({ kld }) => kld)), 0.8 * 0.05);

  // More may be allowed, or nothing; and the search may be cut.
  assertLessOrEqual((await tune(0.5)).bitsPerValue, found.bitsPerValue);
  const exact = await tune(0);
  assertEquals([exact.kv, exact.kld, exact.measuredCodecs], ["raw16", 0, 0]);
  const table = await succeed(...args, "--max-kld", "0.05", "--budget", "4");
  assertMatch(table, /^raw16 +16\.00 .* ✓ +✓$/m);
  assertStringIncludes(table, "the search ended at 4 codecs");
});

Deno.test("cli: kv tune refuses bad usage, and leaves no chart when it fails", async () => {
  using folder = new TemporaryFolder();
  const text = await folder.write("text", "In the beginning");
  const args = ["kv", "tune", "--model", MODEL, "--text", text, "--svg", folder.file("tune.svg")];
  const cases: [number, string[], string][] = [
    [2, args, "--max-kld"],
    [2, [...args, "--max-kld", "-1"], 'but got "-1"'],
    [2, [...args, "--max-kld", "0.1", "--budget", "0"], 'but got "0"'],
    [1, [...args, "--max-kld", "0.1"], "the text has 6 tokens"],
    [
      1,
      ["kv", "tune", "--model", "/missing", ...args.slice(4), "--max-kld", "1"],
      "/missing/config.json",
    ],
  ];
  for (const [code, args, expected] of cases) {
    assertStringIncludes(await fail(code, ...args), expected);
    assertEquals(folder.list(), ["text"]);
  }
});
