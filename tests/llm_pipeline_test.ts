/**
 * Decoding ahead, where a step is enqueued before the tokens of the one before are known to the host, against decoding one
 * step after another: the same pieces, whatever ends them, and the same cache afterwards; on every backend that opens here.
 */
import { assert, assertEquals, assertGreater, assertLess } from "@std/assert";
import { Device } from "../src/device/mod.ts";
import { Readback } from "../src/device/readback.ts";
import type { ErrorCode } from "../src/error.ts";
import { PackhorseError } from "../src/error.ts";
import { KvCache } from "../src/kv/mod.ts";
import { generateTokens, type GenerationOptions, type Prompt } from "../src/llm/generate.ts";
import { LanguageModel, type LanguageModelOptions } from "../src/llm/mod.ts";
import { type ModelParts, partsOf } from "../src/llm/language_model.ts";
import type { PromptMemory } from "../src/llm/prompt_memory.ts";
import { backends } from "./backends.ts";
import { rejectsWith } from "./rejects_with.ts";

const TINY = new URL("fixtures/tiny", import.meta.url).pathname;
const TEXT = Deno.readTextFileSync(`${TINY}/heldout.txt`);

function test(
  name: string,
  options: LanguageModelOptions,
  work: (model: LanguageModel) => Promise<void>,
): void {
  for (const backend of backends()) {
    Deno.test(`llm pipeline: ${backend}: ${name}`, async () => {
      using device = Device.open({ backend });
      using model = await LanguageModel.load(device, TINY, {
        ...{ tokens: 256, residual: 16, sinks: 4 },
        // A GPU multiplies more than 8 rows in ways that depend on how many there are.
        stepTokens: backend === "cpu" ? 64 : 8,
        ...options,
      });
      await work(model);
      assertEquals(model.cacheStatistics().sequences, 0);
    });
  }
}

/** What a generation gave, and how it ended. */
interface Outcome {
  readonly tokens: readonly number[][];
  readonly texts: readonly string[];
  readonly finishes: readonly (string | undefined)[];
  readonly error: string | undefined;
  /** Steps that were begun; not for comparison. */
  readonly steps: number;
}

interface RunOptions extends GenerationOptions {
  readonly ahead: boolean;
  /** After so many pieces the loop is left, or the signal aborted. */
  readonly leaveAfter?: number | undefined;
  readonly abortAfter?: number | undefined;
}

async function run(
  model: LanguageModel,
  prompts: readonly Prompt[],
  { ahead, leaveAfter, abortAfter, ...options }: RunOptions,
): Promise<Outcome> {
  const parts: ModelParts = { ...partsOf(model), decodesAhead: ahead };
  const before = statisticsOf(model);
  const outcome = {
    tokens: prompts.map((): number[] => []),
    texts: prompts.map(() => ""),
    finishes: prompts.map((): string | undefined => undefined),
    error: undefined as string | undefined,
    steps: 0,
  };
  const { cache } = parts;
  cache.begin = (stepParts) => {
    const step = KvCache.prototype.begin.call(cache, stepParts);
    outcome.steps++;
    return step;
  };
  const controller = new AbortController();
  let pieces = 0;
  try {
    const generation = { ...options, signal: controller.signal };
    for await (const piece of generateTokens(parts, prompts, generation)) {
      outcome.tokens[piece.prompt]!.push(...piece.tokens);
      outcome.texts[piece.prompt] += piece.text;
      outcome.finishes[piece.prompt] = piece.finish;
      if (++pieces === leaveAfter) break;
      if (pieces === abortAfter) controller.abort(new Error("aborted"));
    }
  } catch (error) {
    outcome.error = error instanceof PackhorseError ? error.code : (error as Error).message;
  } finally {
    cache.begin = KvCache.prototype.begin;
  }
  if (options.memory === undefined) assertEquals(statisticsOf(model), before);
  return outcome;
}

function statisticsOf(model: LanguageModel) {
  const { sequences, tokens, packedTokens, packedBytes, freeBytes } = model.cacheStatistics();
  return { sequences, tokens, packedTokens, packedBytes, freeBytes };
}

/** Runs both ways, which must give the same; returns it, and how many steps there were each way. */
async function runBoth(
  model: LanguageModel,
  prompts: readonly Prompt[],
  options: Omit<RunOptions, "ahead"> = {},
  message?: string,
): Promise<{ outcome: Outcome; steps: { plain: number; ahead: number } }> {
  const { steps: plain, ...expected } = await run(model, prompts, { ...options, ahead: false });
  const { steps: ahead, ...found } = await run(model, prompts, { ...options, ahead: true });
  assertEquals(found, expected, message);
  return { outcome: { ...expected, steps: plain }, steps: { plain, ahead } };
}

/** Prompts of these lengths. */
function promptsOf(model: LanguageModel, ...lengths: number[]): readonly (readonly number[])[] {
  const tokens = model.tokenizer!.encode(TEXT.slice(0, 6000));
  return lengths.map((length, i) => tokens.slice(37 * i, 37 * i + length));
}

test("a step ahead is one too many for what an end token or a stop string ends", {
  sequences: 3,
}, async (model) => {
  const prompts = promptsOf(model, 20, 61, 33);
  const free = await runBoth(model, prompts, { maxTokens: 30, endTokens: [] });
  assertEquals(free.outcome.finishes, ["length", "length", "length"]);
  // All rows have as many tokens to go, but for what the prompts' own steps have chosen.
  assertEquals(free.steps.ahead, free.steps.plain);

  // In the middle, and for one of them the first after the prompt.
  const { tokens, texts } = free.outcome;
  const ends = [tokens[0]![9]!, tokens[1]![17]!, tokens[2]![0]!];
  const ended = await runBoth(model, prompts, { maxTokens: 30, endTokens: ends });
  assert(ended.outcome.finishes.includes("end"));
  const stop = [texts[0]!.slice(30, 36), texts[1]!.slice(50, 55)];
  const stopped = await runBoth(model, prompts, { maxTokens: 30, endTokens: [], stop });
  assert(stopped.outcome.finishes.includes("stop"));

  const alone = await runBoth(model, prompts.slice(0, 1), {
    maxTokens: 30,
    endTokens: [tokens[0]!.find((token, i) => i >= 5 && tokens[0]!.indexOf(token) === i)!],
  });
  assertEquals(alone.outcome.finishes, ["end"]);
  assertEquals(alone.steps.ahead, alone.steps.plain + 1);
});

test("prompts that wait, and sequences that are full, end the steps ahead", {
  sequences: 2,
  tokens: 96,
}, async (model) => {
  // The second has room for 6 tokens more; the last two wait.
  const prompts = promptsOf(model, 11, 90, 40, 7);
  const { outcome } = await runBoth(model, prompts, { maxTokens: 25, endTokens: [] });
  assertEquals(outcome.tokens.map(({ length }) => length), [25, 6, 25, 25]);
  // What ends one while a step is ahead lets the next begin.
  const { tokens } = outcome;
  const endTokens = [tokens[0]![3]!, tokens[2]![8]!, tokens[3]![11]!];
  for (const sampling of [{}, { temperature: 1.2, seed: 5 }, { repetitionPenalty: 1.5 }]) {
    await runBoth(model, prompts, { maxTokens: 25, endTokens, ...sampling });
  }
});

test("the repetition penalty knows a token that the host does not know yet", {}, async (model) => {
  const [prompt] = promptsOf(model, 50);
  const options = { maxTokens: 40, repetitionPenalty: 1.8, endTokens: [] };
  const { outcome } = await runBoth(model, [prompt!], options);
  assertGreater(new Set(outcome.tokens[0]).size, 30); // without a penalty it repeats itself
});

test("whatever is asked, and whenever it ends", { sequences: 3, tokens: 160 }, async (model) => {
  for (let seed = 1; seed <= 16; seed++) {
    const random = randomOf(seed);
    const chance = (probability: number) => random() < probability;
    const count = 1 + Math.floor(random() * 4);
    const prompts = promptsOf(
      model,
      ...Array.from({ length: count }, () => {
        return chance(0.2) ? 150 : 1 + Math.floor(random() * 80);
      }),
    );
    const sampling = {
      maxTokens: 1 + Math.floor(random() * 24),
      endTokens: [] as number[],
      ...chance(0.5) && { temperature: 0.5 + random(), topP: 0.9, seed },
      ...chance(0.3) && { repetitionPenalty: 1.3 },
    };
    const { tokens, texts } = await run(model, prompts, { ...sampling, ahead: false });
    const any = <T>(list: readonly T[]) => list[Math.floor(random() * list.length)]!;
    const pieces = tokens.flat().length;
    const at = Math.floor(random() * 20);
    await runBoth(model, prompts, {
      ...sampling,
      endTokens: chance(0.6) ? [any(tokens.flat()), any(tokens.flat())] : [],
      stop: chance(0.4) ? [any(texts).slice(at, at + 4) || "no such text"] : undefined,
      leaveAfter: chance(0.2) ? 1 + Math.floor(random() * pieces) : undefined,
      abortAfter: chance(0.2) ? 1 + Math.floor(random() * pieces) : undefined,
    }, `seed ${seed}`);
  }
});

test("an abort, and leaving the loop, throw away the step ahead", {
  sequences: 3,
}, async (model) => {
  const prompts = promptsOf(model, 20, 61, 33);
  for (const after of [1, 3, 4, 8]) {
    const left = await runBoth(model, prompts, { leaveAfter: after });
    assertEquals(left.outcome.tokens.flat().length, after);
    const aborted = await runBoth(model, prompts, { abortAfter: after });
    assertEquals(aborted.outcome.error, "aborted");
  }
});

/** Bits of the keys and values that a memory holds for these tokens. */
function heldBits(model: LanguageModel, memory: PromptMemory): Uint8Array[] {
  const { cache, config } = partsOf(model);
  const { sequence } = memory.fork([...memory.tokens, 0])!;
  try {
    return Array.from({ length: config.layers }, (_, layer) => {
      using both = cache.read(layer, sequence);
      return [both.keys, both.values].map((each) => {
        const bytes = new Uint8Array(each.byteLength);
        each.download(bytes);
        return bytes;
      });
    }).flat();
  } finally {
    cache.remove(sequence);
  }
}

test("a memory holds what it would without a step ahead, packed blocks too", {
  codec: "packkv:k=0.2,v=0.3",
}, async (model) => {
  const all = model.tokenizer!.encode(TEXT.slice(0, 6000));
  const question = all.slice(400, 409);
  let packed = 0;
  // With 4 sinks and a residual of 16, the first block is packed when there are 84 tokens, the second at 148.
  for (const [length, stopAt] of [[70, 5], [80, 4], [80, 5], [80, 6], [81, 4], [140, 9]] as const) {
    const prompt = all.slice(0, length);
    const turn = async (ahead: boolean) => {
      using memory = model.createMemory();
      const options = { memory, ahead, endTokens: [], maxTokens: 12 };
      const first = await run(model, [prompt], { ...options, leaveAfter: stopAt });
      const { tokens } = memory;
      const bits = heldBits(model, memory);
      packed += model.cacheStatistics().packedTokens;
      // The next turn computes its prompt over what is held.
      const next = [...prompt, ...first.tokens[0]!, ...question];
      const { steps: _, ...second } = await run(model, [next], options);
      return { held: tokens.length, tokens, bits, second, last: memory.tokens };
    };
    const expected = await turn(false);
    assertEquals(expected.held, length + stopAt - 1);
    assertEquals(await turn(true), expected, `${length} tokens, left after ${stopAt}`);
  }
  assertGreater(packed, 0);
});

test("a pool that is too full for a step ahead refuses the step when it is due", {
  sequences: 2,
  tokens: 4096,
  cacheBytes: 17 * 65_536,
  codec: "raw16",
}, async (model) => {
  // Each has 3 blocks of 32 KiB in each of 4 layers, in 2 pages each; the 4th takes a page more, from 276 tokens on.
  const prompts = promptsOf(model, 250, 262);
  const { outcome } = await runBoth(model, prompts, { maxTokens: 100, endTokens: [] });
  assertEquals(outcome.error, "out-of-memory" satisfies ErrorCode);
  assertGreater(outcome.tokens[1]!.length, 10);
  assertLess(outcome.tokens[1]!.length, 16);
});

test("generations side by side do not disturb the steps ahead of each other", {
  sequences: 4,
}, async (model) => {
  const [a, b] = [promptsOf(model, 20, 61), promptsOf(model, 33, 9)];
  const both = (ahead: boolean) =>
    Promise.all([a, b].map(async (prompts, i) => {
      const parts = { ...partsOf(model), decodesAhead: ahead };
      const tokens: number[][] = [[], []];
      const options = { maxTokens: 20 + i, endTokens: [], temperature: i, seed: 3 };
      for await (const piece of generateTokens(parts, prompts, options)) {
        tokens[piece.prompt]!.push(...piece.tokens);
      }
      return tokens;
    }));
  assertEquals(await both(true), await both(false));
});

test("a model that is disposed while a step is ahead says so", {}, async () => {
  using device = Device.open({ backend: backends()[0]! });
  using model = await LanguageModel.load(device, TINY, { tokens: 64 });
  const parts = { ...partsOf(model), decodesAhead: true };
  const generator = generateTokens(parts, [[5, 6, 7]], { endTokens: [] });
  for (let i = 0; i < 3; i++) await generator.next();
  model[Symbol.dispose]();
  await rejectsWith(() => generator.next(), "disposed");
});

test("short prompts are computed in one step, and give what each gives alone", {
  sequences: 4,
  stepTokens: 8,
}, async (model) => {
  const options = { maxTokens: 6, endTokens: [], ahead: false };
  // Steps of prompts; then 5 choose the other tokens.
  for (
    const [lengths, steps] of [
      [[3, 2, 3], 1],
      [[3, 2, 4], 2],
      [[3, 2, 3, 19], 1 + 3],
      [[19, 2, 3, 1], 2 + 1 + 1],
      [[16, 1, 7], 2 + 1],
    ] as const
  ) {
    const prompts = promptsOf(model, ...lengths);
    const together = await run(model, prompts, options);
    assertEquals(together.steps, steps + 5, `${lengths}`);
    for (const [i, prompt] of prompts.entries()) {
      const alone = await run(model, [prompt], options);
      assertEquals(together.tokens[i], alone.tokens[0], `${lengths}: ${i}`);
    }
  }

  // What a memory has is not computed again, so that these are short.
  using memory = model.createMemory();
  const [long] = promptsOf(model, 60);
  await run(model, [long!], { ...options, memory });
  const questions = [[...long!, 11, 12, 13], [...long!, 21, 22], [...long!, 31]];
  const { tokens, steps } = await run(model, questions, { ...options, memory });
  assertEquals(steps, 1 + 5);
  for (const [i, prompt] of questions.entries()) {
    assertEquals(tokens[i], (await run(model, [prompt], { ...options, memory })).tokens[0]);
  }
  memory.clear();
});

test("prompts that the pool has no room for at once are computed one after another", {
  sequences: 2,
  tokens: 1024,
  stepTokens: 1280,
  cacheBytes: 12 * 65_536,
  codec: "packkv:k=0.05,v=0.05",
}, async (model) => {
  // At most, each takes 2 pages in each of 4 layers, but once it is packed, 1.
  const prompts = promptsOf(model, 410, 415);
  const { outcome } = await runBoth(model, prompts, { maxTokens: 4, endTokens: [] });
  assertEquals([outcome.error, outcome.steps], [undefined, 2 + 3]);
  assertEquals(outcome.tokens.map(({ length }) => length), [4, 4]);
});

for (const backend of backends()) {
  Deno.test(`llm pipeline: ${backend}: a readback has what was there when it was enqueued`, async () => {
    using device = Device.open({ backend });
    using buffer = device.createBuffer("i32", 4);
    using readback = new Readback(device, { dtype: "i32", length: 3 });
    await rejectsWith(() => readback.wait(), "invalid-argument", "nothing was enqueued");
    buffer.upload(Int32Array.of(1, 2, 3, 4));
    readback.enqueue(buffer.view(1, 3));
    buffer.fill(0);
    const first = readback.wait();
    assertEquals(await first, Int32Array.of(2, 3, 4));
    readback.enqueue(buffer.view(2, 1));
    assertEquals(await readback.wait(), Int32Array.of(0));
    const refuse = (work: () => void, ...parts: string[]) =>
      rejectsWith(() => Promise.resolve().then(work), "invalid-argument", ...parts);
    await refuse(() => readback.enqueue(buffer), "4 elements of i32", "up to 3 of i32");
    await refuse(() => new Readback(device, { dtype: "i32", length: 0 }), "0 elements");
    // Disposed while it is waited for, it lets that finish.
    readback.enqueue(buffer.view(0, 2));
    const last = readback.wait();
    readback[Symbol.dispose]();
    assertEquals(await last, Int32Array.of(0, 0));
    await rejectsWith(() => readback.wait(), "disposed");
  });

  Deno.test(`llm pipeline: ${backend}: steps are ahead where work runs while the host goes on`, async () => {
    using device = Device.open({ backend });
    using model = await LanguageModel.load(device, TINY, { tokens: 64 });
    assertEquals(device.isAsynchronous, backend === "cuda");
    assertEquals(partsOf(model).decodesAhead, device.isAsynchronous);
  });
}

/** Numbers from 0 to 1 that follow from a seed. */
function randomOf(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let bits = Math.imul(state ^ (state >>> 15), state | 1);
    bits ^= bits + Math.imul(bits ^ (bits >>> 7), bits | 61);
    return ((bits ^ (bits >>> 14)) >>> 0) / 2 ** 32;
  };
}
