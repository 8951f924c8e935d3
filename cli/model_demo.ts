import type { Device } from "../src/device/mod.ts";
import { LanguageModel } from "../src/llm/mod.ts";
import { cacheReport } from "./cache_report.ts";
import { FIXTURE_MODEL_PATH } from "./fixture.ts";
import {
  formatBits,
  formatBytes,
  formatError,
  formatPerCent,
  print,
  printTable,
} from "./output.ts";

const CODECS = ["raw16", "packkv:k=0.1,v=0.2"];
/** Letters of the text that is continued, and tokens of the continuation. */
const PROMPT_LENGTH = 3000;
const TOKENS = 64;
/** Tokens that stay in 16 bits at the end, so that most of the prompt is packed. */
const RESIDUAL = 64;
const EVALUATION = { windows: 2, tokens: 512, residual: 0 };

/** How a model goes on with a text, over a cache of one codec. */
export interface CacheContinuation {
  kv: string;
  text: string;
  cacheBytes: number;
  bitsPerValue: number;
  tokensPerSecond: number;
  /** Mean divergence from what the 16-bit cache predicts, and how often the likeliest token is the same. */
  kld: number;
  top1: number;
}

/** Lets the model that ships with Packhorse go on with a text, over a 16-bit and a packed cache. */
export async function continueText(
  device: Device,
  { signal }: { signal: AbortSignal },
): Promise<CacheContinuation[]> {
  const text = await Deno.readTextFile(`${FIXTURE_MODEL_PATH}/heldout.txt`);
  const continuations: CacheContinuation[] = [];
  for (const kv of CODECS) {
    const options = { codec: kv, tokens: 2048, sequences: 1, residual: RESIDUAL, signal };
    using model = await LanguageModel.load(device, FIXTURE_MODEL_PATH, options);
    using memory = model.createMemory(); // keeps the sequence, whose bytes are counted
    let continuation = "";
    let tokens = 0;
    let start = 0;
    const prompt = text.slice(0, PROMPT_LENGTH);
    for await (const piece of model.generate(prompt, { maxTokens: TOKENS, memory, signal })) {
      continuation += piece.text;
      if (tokens === 0) start = performance.now(); // the prompt is done
      tokens += piece.tokens.length;
    }
    const seconds = (performance.now() - start) / 1000;
    const { bytes, bitsPerValue } = cacheReport(model);
    const { results: [measured] } = await model.evaluate(text, {
      ...EVALUATION,
      codecs: [kv],
      signal,
    });
    continuations.push({
      kv,
      text: continuation,
      cacheBytes: bytes,
      bitsPerValue,
      tokensPerSecond: (tokens - 1) / seconds,
      kld: measured!.kld,
      top1: measured!.top1,
    });
  }
  return continuations;
}

/** Prints them side by side. */
export function printContinuations(continuations: readonly CacheContinuation[]): void {
  for (const { kv, text } of continuations) {
    print(`   ${kv}:\n${text.trim().replaceAll(/^/gm, "   | ")}\n`);
  }
  printTable(
    ["kv", ">cache", ">bits/value", ">tokens/s", ">KLD", ">same top token"],
    continuations.map(({ kv, cacheBytes, bitsPerValue, tokensPerSecond, kld, top1 }) => [
      kv,
      formatBytes(cacheBytes),
      formatBits(bitsPerValue),
      tokensPerSecond.toFixed(0),
      formatError(kld),
      formatPerCent(top1),
    ]),
  );
}
