/**
 * Random-weight models of every family against the reference in double precision, on every backend that opens here, and
 * against what transformers computes, where tests/oracles/llm_families.py has been run.
 */
import { assert, assertLess } from "@std/assert";
import { Device } from "../src/device/mod.ts";
import { KvCache, parseCacheCodec } from "../src/kv/mod.ts";
import { Checkpoint } from "../src/llm/checkpoint.ts";
import { readLanguageModelConfig } from "../src/llm/mod.ts";
import { ModelRunner } from "../src/llm/runner.ts";
import { planWeights } from "../src/llm/weights.ts";
import { backends } from "./backends.ts";
import { familyCases, familyLogits, familyToken, writeCheckpoint } from "./llm_checkpoints.ts";
import { ReferenceModel } from "./llm_reference.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

const { tokens, cases } = familyCases();
const oracle = familyLogits();
const IDS = Array.from({ length: tokens }, (_, i) => familyToken(i));

/** Logits of all tokens: a prompt first, then the rest as they are decoded. */
async function run(device: Device, folder: string): Promise<Float32Array[]> {
  const config = await readLanguageModelConfig(folder);
  using checkpoint = await Checkpoint.open(folder);
  using weights = await planWeights(device, checkpoint, config).load();
  const { layers, queryHeads, kvHeads, headDim, vocabulary, windows } = config;
  const dtype = device.backend === "cpu" ? "f16" : "bf16";
  const queryDType = device.backend === "cpu" ? "f32" : dtype;
  const limits = { tokens, stepTokens: tokens };
  using cache = KvCache.create(device, {
    ...{ layers, queryHeads, kvHeads, headDim, dtype, queryDType },
    ...limits,
    ...{ sequences: 1, poolBytes: 2 ** 22, sinks: 0 },
    window: windows,
    codec: parseCacheCodec("raw16"),
  });
  using runner = new ModelRunner(device, config, weights, {
    ...{ queryDType, cacheDType: dtype, logitRows: tokens },
    ...limits,
  });
  const sequence = cache.add();
  const logits: Float32Array[] = [];
  for (const rows of [tokens - 8, 4, 1, 1, 1, 1]) {
    const first = logits.length;
    const step = cache.begin([{ sequence, tokens: rows }]);
    runner.tokens(rows).upload(Int32Array.from(IDS.slice(first, first + rows)));
    runner.positions(rows).upload(Int32Array.from({ length: rows }, (_, i) => first + i));
    runner.forward(step, { attention: rows > 8 ? "prefill" : "attend" });
    const found = runner.logits(0, rows).download(new Float32Array(rows * vocabulary));
    for (let row = 0; row < rows; row++) {
      logits.push(found.slice(row * vocabulary, (row + 1) * vocabulary));
    }
  }
  return logits;
}

for (const { name, config } of cases) {
  for (const backend of backends()) {
    Deno.test(`llm families: ${backend}: ${name}`, async () => {
      using device = Device.open({ backend });
      using folder = new TemporaryFolder();
      await writeCheckpoint(folder.path, config);
      const logits = await run(device, folder.path);
      const expected = new ReferenceModel(folder.path, tokens).logits(IDS);
      const [error, spread] = distance(logits, expected);
      assert(spread > 0.8, `logits of ${name} that say something: ${spread}`);
      assertLess(error, backend === "cpu" ? 1e-3 : 0.1, `${name}: off by ${error} of ${spread}`);
      if (backend === "cuda") return;
      // Nearly all of which comes from keys and values in 16 bits.
      const rounded = new ReferenceModel(folder.path, tokens, "f16").logits(IDS);
      const [rest] = distance(logits, rounded);
      assertLess(rest, 3e-4, `${name}: off by ${rest}`);
    });
  }

  Deno.test({
    name: `llm families: the reference is transformers', ${name}`,
    ignore: oracle === undefined,
    async fn() {
      using folder = new TemporaryFolder();
      await writeCheckpoint(folder.path, config);
      const rows = oracle![name];
      assert(rows !== undefined, `logits.json has no "${name}": run tests/oracles/llm_families.py`);
      const expected = new ReferenceModel(folder.path, tokens).logits(IDS).slice(-rows.length);
      const [error] = distance(rows, expected);
      assertLess(error, 1e-4, name);
    },
  });
}

/** The largest difference, and the largest magnitude. */
function distance(
  found: readonly ArrayLike<number>[],
  expected: readonly Float64Array[],
): [number, number] {
  let [error, spread] = [0, 0];
  expected.forEach((row, token) =>
    row.forEach((value, i) => {
      error = Math.max(error, Math.abs(value - found[token]![i]!));
      spread = Math.max(spread, Math.abs(value));
    })
  );
  return [error, spread];
}
