import type { Device } from "../src/device/mod.ts";
import { LanguageModel, type PredictionScores, type PromptMemory } from "../src/llm/mod.ts";
import { cacheReport } from "./cache_report.ts";
import { FIXTURE_MODEL_PATH } from "./fixture.ts";
import {
  formatBits,
  formatBytes,
  formatError,
  formatPerCent,
  type Heading,
  print,
  printTable,
} from "./output.ts";

/** The codecs whose texts are compared, and others. */
const CODECS = [
  ...["raw16", "packkv:k=0.1,v=0.2"],
  ...["packkv:k=0.05,v=0.1", "fixed:4", "kivi:4", "kivi:2"],
];
/** Letters of the text that is continued, to the end of a word. */
const PROMPT_LENGTH = 3000;
/** Tokens of the continuation, and how often it is timed. */
const TOKENS = 64;
const ROUNDS = 3;
/** Tokens that stay in 16 bits at the end, so that most of the prompt is packed. */
const RESIDUAL = 64;
/** Letters of the text that have the tokens for it. */
const EVALUATION_LENGTH = 8000;
/** Windows of the text that is predicted, and predictions of each. */
export const EVALUATION = { windows: 2, tokens: 512, residual: 0 };

/** What a model does over caches of several codecs. */
export interface ModelDemo {
  /** The text that is continued. */
  prompt: string;
  /** One for each codec, a 16-bit cache first. */
  continuations: CacheContinuation[];
  /** Their texts as they came, token by token. */
  pieces: string[][];
  /** The tokens of a text, of which all but the first are predicted, and how well with each codec. */
  tokens: string[];
  scores: PredictionScores[];
}

/** How a model goes on with a text, over a cache of one codec. */
export interface CacheContinuation {
  kv: string;
  text: string;
  cacheBytes: number;
  bitsPerValue: number;
  /** The median of several times. */
  tokensPerSecond: number;
  /** Mean divergence from what the 16-bit cache predicts, and how often the likeliest token is the same. */
  kld: number;
  top1: number;
}

/** Lets the model that ships with Packhorse go on with a text, and predict it, over a 16-bit and packed caches. */
export async function runModel(
  device: Device,
  { signal }: { signal: AbortSignal },
): Promise<ModelDemo> {
  const text = await Deno.readTextFile(`${FIXTURE_MODEL_PATH}/heldout.txt`);
  const prompt = text.slice(0, text.lastIndexOf(" ", PROMPT_LENGTH));
  using stack = new DisposableStack();
  // A second sequence for the prompt, which a memory keeps.
  const options = { tokens: 2048, sequences: 2, residual: RESIDUAL, signal };
  const models: LanguageModel[] = [];
  for (const codec of CODECS) {
    const model = await LanguageModel.load(device, FIXTURE_MODEL_PATH, { ...options, codec });
    models.push(stack.use(model));
  }
  const runs = [];
  for (const model of models) {
    const memory = stack.use(model.createMemory());
    const { pieces } = await continueText(model, prompt, { memory, signal });
    runs.push({ model, memory, pieces, cache: cacheReport(model), speeds: [] as number[] });
  }
  // In turns, so that what else the machine does meets them alike.
  for (let round = 0; round < ROUNDS; round++) {
    for (const { model, memory, speeds } of runs) {
      speeds.push((await continueText(model, prompt, { memory, signal })).tokensPerSecond);
    }
  }
  const evaluation = { ...EVALUATION, codecs: CODECS, scores: true, signal };
  const tokenizer = models[0]!.tokenizer!;
  const tokens = tokenizer.encode(text.slice(0, EVALUATION_LENGTH), { specialTokens: false })
    .slice(0, EVALUATION.windows * EVALUATION.tokens + 1);
  const stream = tokenizer.stream();
  const { results } = await models[0]!.evaluate(tokens, evaluation);
  return {
    prompt,
    continuations: runs.map(({ pieces, cache, speeds }, i) => ({
      kv: CODECS[i]!,
      text: pieces.join(""),
      cacheBytes: cache.bytes,
      bitsPerValue: cache.bitsPerValue,
      tokensPerSecond: speeds.sort((a, b) => a - b)[ROUNDS >> 1]!,
      kld: results[i]!.kld,
      top1: results[i]!.top1,
    })),
    pieces: runs.map(({ pieces }) => pieces),
    tokens: tokens.map((token) => stream.push(token)),
    scores: results.map(({ scores }) => scores!),
  };
}

async function continueText(
  model: LanguageModel,
  prompt: string,
  options: { memory: PromptMemory; signal: AbortSignal },
): Promise<{ pieces: string[]; tokensPerSecond: number }> {
  const pieces: string[] = [];
  let tokens = 0;
  let start = 0;
  for await (const piece of model.generate(prompt, { maxTokens: TOKENS, ...options })) {
    if (tokens === 0) start = performance.now(); // the prompt is done
    pieces.push(piece.text);
    tokens += piece.tokens.length;
  }
  return { pieces, tokensPerSecond: (tokens - 1) / ((performance.now() - start) / 1000) };
}

/** Headings of {@linkcode continuationCells}. */
export const CONTINUATION_HEADINGS: readonly Heading[] = [
  "kv",
  ">cache",
  ">bits/value",
  ">tokens/s",
  ">KLD",
  ">same top token",
];

/** What was measured with a codec, as a row of a table. */
export function continuationCells(
  { kv, cacheBytes, bitsPerValue, tokensPerSecond, kld, top1 }: CacheContinuation,
): string[] {
  return [
    kv,
    formatBytes(cacheBytes),
    formatBits(bitsPerValue),
    tokensPerSecond.toFixed(0),
    formatError(kld),
    formatPerCent(top1),
  ];
}

/** Prints the texts over a 16-bit and a packed cache, and what was measured. */
export function printModelDemo({ continuations }: ModelDemo): void {
  for (const { kv, text } of continuations.slice(0, 2)) {
    print(`   ${kv}:\n${text.trim().replaceAll(/^/gm, "   | ")}\n`);
  }
  printTable([...CONTINUATION_HEADINGS], continuations.map(continuationCells));
}
