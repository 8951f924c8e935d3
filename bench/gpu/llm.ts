/**
 * Tokens per second of a language model on a GPU, one sequence, greedy, by codec of its cache:
 * `deno run -A bench/gpu/llm.ts --model DIR [--context 4096] [--tokens 256] [--kv CODEC …]`. The folder needs only a
 * `config.json`: weights are random, on which speed does not depend. Prints a Markdown table; figures are wall-clock times,
 * of decoding after its first ten tokens.
 *
 * @module
 */
import { parseArgs } from "node:util";
import { Device } from "../../src/device/mod.ts";
import { LanguageModel } from "../../src/llm/mod.ts";
import { describe, printHeadings, printRow } from "./measure.ts";

const WARM_UP_TOKENS = 10;
const STEP_TOKENS = 2048;

const { values: flags } = parseArgs({
  options: {
    model: { type: "string" },
    context: { type: "string", default: "4096" },
    tokens: { type: "string", default: "256" },
    kv: { type: "string", multiple: true, default: ["raw16", "packkv:k=0.1,v=0.2"] },
  },
});
if (flags.model === undefined) throw new Error("Say which model: --model DIR");
const context = Number(flags.context), tokens = Number(flags.tokens);

using device = Device.open({ backend: "cuda" });
console.log(`${describe(device)}; ${context} tokens of context, ${tokens} decoded.\n`);
printHeadings("codec", ">prefill, tokens/s", ">decode, tokens/s", ">packed, MB");
for (const codec of flags.kv) {
  using model = await LanguageModel.load(device, flags.model, {
    codec,
    randomWeights: true,
    tokenizer: false,
    tokens: context + tokens,
    sequences: 1,
    stepTokens: STEP_TOKENS,
  });
  const { vocabulary } = model.config;
  const prompt = Array.from({ length: context }, (_, i) => (7919 * i + 13) % vocabulary);
  const times: number[] = [performance.now()];
  for await (
    const piece of model.generate(prompt, { maxTokens: tokens, endTokens: [] })
  ) {
    for (let i = 0; i < piece.tokens.length; i++) times.push(performance.now());
  }
  const seconds = (from: number, to: number) => (times.at(to)! - times.at(from)!) / 1e3;
  const { packedBytes } = model.cacheStatistics();
  printRow(
    codec,
    (context / seconds(0, 1)).toFixed(0),
    ((tokens - WARM_UP_TOKENS) / seconds(WARM_UP_TOKENS, -1)).toFixed(1),
    (packedBytes / 1e6).toFixed(1),
  );
}
