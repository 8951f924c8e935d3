import type { Device } from "../device/device.ts";
import { PackhorseError } from "../error.ts";
import { KvCache, type KvSequence } from "../kv/cache.ts";
import { parseCacheCodec } from "../kv/cache_codec.ts";
import { type KvCacheCodec, LEAST_RESIDUAL, splitsToFill } from "../kv/cache_options.ts";
import type { KvCacheFileOptions } from "../kv/file_options.ts";
import { poolBytesFor, type PoollessOptions, withWholePool } from "../kv/pool_bytes.ts";
import { ProgressCount } from "../kv/progress.ts";
import { KvSampler } from "../kv/sample.ts";
import { SampledTokens } from "../kv/sampled_tokens.ts";
import { bytesOfTokens } from "./cache_bytes.ts";
import { DecodeGraphs } from "./decode_graphs.ts";
import { DecodePipeline, type DecodeRow } from "./decode_pipeline.ts";
import type { ModelParts } from "./language_model.ts";
import { argmax } from "./operations.ts";
import { prefill } from "./prefill.ts";
import { ModelRunner } from "./runner.ts";
import { Sampler } from "./sampler.ts";

/** Options of {@linkcode LanguageModel.bench}. */
export interface ModelBenchOptions {
  /** How the cache packs tokens, or a text that {@linkcode parseCacheCodec} reads. Default: `packkv`. */
  readonly codec?: KvCacheCodec | string | undefined;
  /** Tokens of each sequence after the last step, at most the model's own limit. Default: 4096. */
  readonly context?: number | undefined;
  /** Sequences. Default: 1. */
  readonly batch?: number | undefined;
  /** Decode steps that are timed. Default: 64, in which every sequence packs a block. */
  readonly tokens?: number | undefined;
  /**
   * Where to draw synthetic keys and values from, with the statistics of a real cache in a `.safetensors` file, to fill the
   * cache instead of computing prompts, which takes long. Default: prompts of arbitrary tokens are computed.
   */
  readonly fill?:
    | Pick<KvCacheFileOptions, "input" | "keyPattern" | "valuePattern">
    | undefined;
  /**
   * Bits that a packed value of `packkv` takes on average, with its share of scales and tables, by which the pool is sized.
   * Default: for synthetic tokens what they take, else the most that the codec can take.
   */
  readonly bitsPerValue?: number | undefined;
  /** As {@linkcode KvCacheOptions.residual}. */
  readonly residual?: number | undefined;
  /** As {@linkcode LanguageModelOptions.sinks}. */
  readonly sinks?: number | undefined;
  /** How many tokens of a prompt are computed at once. Default: 2048. */
  readonly stepTokens?: number | undefined;
  /** Called with the tokens and steps that are done, and how many there are. */
  readonly onProgress?: ((done: number, total: number) => void) | undefined;
  /** Stops the work. */
  readonly signal?: AbortSignal | undefined;
}

/** What {@linkcode LanguageModel.bench} measures, by the wall clock unless said otherwise. */
export interface ModelBench {
  /** The codec. */
  readonly codec: KvCacheCodec;
  /** Tokens of each sequence after the last step. */
  readonly context: number;
  /** Sequences. */
  readonly batch: number;
  /** Steps that were timed. */
  readonly tokens: number;
  /** Whether the cache was filled with synthetic keys and values instead of prompts that were computed. */
  readonly isSynthetic: boolean;
  /** Tokens of each sequence before the first step. */
  readonly filledTokens: number;
  /** Tokens of all prompts that were timed: those that filled the cache, or, where they were not computed, a step's. */
  readonly prefillTokens: number;
  /** Of these, per second. */
  readonly prefillTokensPerSecond: number;
  /** Tokens per second of all sequences together, over all timed steps. */
  readonly decodeTokensPerSecond: number;
  /** The median time of a step, which gives each sequence a token: from knowing one to knowing the next. */
  readonly stepSeconds: number;
  /**
   * The same where steps follow each other without the host reading any token, by the GPU's own clock: the median over
   * groups of 8. Undefined on the CPU.
   */
  readonly backToBackSeconds: number | undefined;
  /** What share of `stepSeconds` the GPU waits for the host. Undefined on the CPU. */
  readonly launchGapShare: number | undefined;
  /** Bytes that all tokens take at last: records, where they end, and tokens in 16 bits. */
  readonly cacheBytes: number;
  /** The same in 16 bits. */
  readonly raw16CacheBytes: number;
  /** Bits per key or value of these. */
  readonly bitsPerValue: number;
  /** All bytes that the cache has allocated. */
  readonly allocatedBytes: number;
}

const PACKKV = "packkv:k=0.1,v=0.2";
const STEP_TOKENS = 2048;
/** Steps before any is timed: a shape of step is captured when it comes the second time. */
const WARM_UPS = 4;
/** On a GPU, groups of steps that are enqueued at once. Blocks are packed in one of 64 steps, so in one group. */
const GROUPS = 5;
const GROUP_STEPS = 8;
/** Synthetic tokens of a layer, which repeat from there on. */
const SAMPLE_TOKENS = 8192;
/** So many of these show what they take. */
const MEASURED_TOKENS = 2048;
/** How much more a long fill may take. */
const MARGIN = 1.01;

/** {@linkcode LanguageModel.bench}. */
export async function benchModel(
  parts: ModelParts,
  options: ModelBenchOptions,
): Promise<ModelBench> {
  const { device, config } = parts;
  const { codec: asked = PACKKV, context = 4096, batch = 1, tokens = 64, fill, signal } = options;
  const codec = typeof asked === "string" ? parseCacheCodec(asked) : asked;
  const stepTokens = Math.max(options.stepTokens ?? STEP_TOKENS, batch);
  within("batch", batch, 1, 65_536);
  within("tokens", tokens, 1, 2 ** 20);
  within("stepTokens", stepTokens, 1, 2 ** 20);
  const groups = device.backend === "cpu" ? 0 : GROUPS;
  const steps = WARM_UPS + groups * (1 + GROUP_STEPS) + tokens;
  within("context, of which the steps take a part,", context, steps + 1, config.contextLimit);
  const filledTokens = context - steps;

  using stack = new DisposableStack();
  const { layers, queryHeads, kvHeads, headDim, windows: window } = config;
  const { dtype, queryDType } = parts.cache.config;
  const sinks = options.sinks ?? (window.some((each) => each > 0) ? 0 : undefined);
  const cacheOptions = {
    ...{ layers, queryHeads, kvHeads, headDim, dtype, queryDType, codec, window },
    ...{ sequences: batch, tokens: context, stepTokens, residual: options.residual, sinks },
    splits: splitsToFill({ sequences: batch, kvHeads }),
  };
  const sampled = fill === undefined ? undefined : stack.use(
    new SampledTokens(device, await KvSampler.open({ ...fill, signal }, { dtype }), {
      ...{ layers, kvHeads, headDim, dtype },
      tokens: Math.max(Math.min(filledTokens, SAMPLE_TOKENS), MEASURED_TOKENS),
    }),
  );
  const poolBytes = poolBytesFor(device, cacheOptions, {
    bitsPerValue: options.bitsPerValue ?? (sampled && bitsOf(device, sampled, cacheOptions)),
    context: sampled === undefined ? context : Math.ceil(MARGIN * context),
  });
  const cache = stack.use(KvCache.create(device, { ...cacheOptions, poolBytes }));
  const limits = { stepTokens, logitRows: batch, tokens: context, cacheDType: dtype, queryDType };
  const runner = stack.use(new ModelRunner(device, config, parts.weights, limits));
  const graphs = stack.use(new DecodeGraphs());
  const own: ModelParts = { ...parts, cache, runner, graphs };
  const sampler = stack.use(new Sampler(own, {}));
  const chunk = Math.min(stepTokens, filledTokens);
  const prompts = sampled === undefined ? 1 : 2;
  const progress = new ProgressCount(prompts * chunk + batch * filledTokens + steps, options);
  const bench: Bench = { parts: own, sampler, progress, signal };

  // A prompt to load what kernels there are.
  const first = await computePrompt(bench, 0, chunk);
  cache.remove(first.sequence);
  const rows: Row[] = [];
  let prefilled = { tokens: 0, seconds: 0 };
  if (sampled === undefined) {
    for (let sequence = 0; sequence < batch; sequence++) {
      const { seconds, ...row } = await computePrompt(bench, sequence, filledTokens);
      rows.push(row);
      prefilled = { tokens: prefilled.tokens + filledTokens, seconds: prefilled.seconds + seconds };
    }
  } else {
    const { sequence, seconds } = await computePrompt(bench, 0, chunk);
    cache.remove(sequence);
    prefilled = { tokens: chunk, seconds };
    for (let prompt = 0; prompt < batch; prompt++) {
      const sequence = await fillSequence(bench, sampled, filledTokens, prompt);
      rows.push({ prompt, sequence, tokens: [prompt % config.vocabulary], chosen: 0 });
    }
  }

  await decodeSteps(bench, rows, WARM_UPS);
  const backToBack: number[] = [];
  for (let group = 0; group < groups; group++) backToBack.push(await stepGroup(bench, rows));
  const times = await decodeSteps(bench, rows, tokens);
  cache.check();

  const stepSeconds = median(times);
  const backToBackSeconds = groups === 0 ? undefined : median(backToBack);
  const statistics = cache.statistics();
  const { bytes, values } = bytesOfTokens(config, statistics);
  return {
    ...{ codec, context, batch, tokens, filledTokens },
    isSynthetic: sampled !== undefined,
    prefillTokens: prefilled.tokens,
    prefillTokensPerSecond: prefilled.tokens / prefilled.seconds,
    decodeTokensPerSecond: batch * tokens / times.reduce((sum, time) => sum + time),
    ...{ stepSeconds, backToBackSeconds },
    launchGapShare: backToBackSeconds && 1 - backToBackSeconds / stepSeconds,
    cacheBytes: bytes,
    raw16CacheBytes: 2 * values,
    bitsPerValue: 8 * bytes / values,
    allocatedBytes: statistics.allocatedBytes,
  };
}

/** A sequence, and its latest token. */
interface Row extends DecodeRow {
  tokens: readonly number[];
}

interface Bench {
  readonly parts: ModelParts;
  readonly sampler: Sampler;
  readonly progress: ProgressCount;
  readonly signal: AbortSignal | undefined;
}

/** Starts a sequence with a prompt of arbitrary tokens, others for each `prompt`. */
async function computePrompt(
  { parts, sampler, progress, signal }: Bench,
  prompt: number,
  length: number,
): Promise<Row & { seconds: number }> {
  const { vocabulary } = parts.config;
  const tokens = Array.from({ length }, (_, i) => (7919 * i + 101 * prompt + 13) % vocabulary);
  const start = performance.now();
  const [started] = await prefill(parts, [{ prompt, tokens }], sampler, { signal });
  const seconds = secondsSince(start);
  progress.advance(length);
  const { sequence, token } = started!;
  return { prompt, sequence, tokens: [token], chosen: 1, seconds };
}

/** Starts a sequence with synthetic tokens, which begin at another place for each `prompt`. */
async function fillSequence(
  { parts: { cache, device }, progress }: Bench,
  sampled: SampledTokens,
  length: number,
  prompt: number,
): Promise<KvSequence> {
  const { stepTokens } = cache.config;
  const most = Math.min(stepTokens, sampled.shape.tokens);
  const sequence = cache.add();
  for (let first = 0; first < length; first += most) {
    const tokens = Math.min(most, length - first);
    const places = sampled.shape.tokens - tokens + 1;
    sampled.append(cache.begin([{ sequence, tokens }]), (first + 997 * prompt) % places);
    await device.synchronize(); // so that an abort is heard
    progress.advance(tokens);
  }
  return sequence;
}

/** Steps as generating does them, one after another; returns how long each takes: until its tokens are known. */
async function decodeSteps(
  { parts, sampler, progress }: Bench,
  rows: readonly Row[],
  steps: number,
): Promise<number[]> {
  const pipeline = new DecodePipeline(parts, sampler);
  const times: number[] = [];
  for (let step = 1; step <= steps; step++) {
    const start = performance.now();
    const tokens = await pipeline.next(rows, { ahead: parts.decodesAhead && step < steps });
    times.push(secondsSince(start));
    rows.forEach((row, i) => row.tokens = [tokens[i]!]);
    progress.advance(1);
  }
  return times;
}

/** Steps that do the same, but enqueued one after another; the time of each, by the device's clock. */
async function stepGroup({ parts, progress }: Bench, rows: readonly Row[]): Promise<number> {
  const { cache, runner, graphs, device, config } = parts;
  const size = { rows: rows.length, vocabulary: config.vocabulary };
  using chosen = device.createBuffer("i32", rows.length);
  const enqueue = () => {
    const step = cache.begin(rows.map(({ sequence }) => ({ sequence })));
    graphs.run(step, () => {
      runner.forward(step, { attention: "attend" });
      runner.logits(0, rows.length);
    });
    argmax(runner.logitsOut(rows.length), chosen, size);
  };
  enqueue(); // the clock starts when it ends, by when the next ones wait
  const milliseconds = device.time(() => {
    for (let i = 0; i < GROUP_STEPS; i++) enqueue();
  });
  await device.synchronize(); // so that an abort is heard
  progress.advance(1 + GROUP_STEPS);
  return milliseconds / 1000 / GROUP_STEPS;
}

/** Bits that synthetic tokens take once they are packed. */
function bitsOf(device: Device, sampled: SampledTokens, options: PoollessOptions): number {
  const layers = sampled.distinctLayers;
  const { tokens: all, kvHeads, headDim } = sampled.shape;
  const tokens = Math.min(all, MEASURED_TOKENS);
  using cache = KvCache.create(
    device,
    withWholePool(device, {
      ...{ ...options, layers, window: 0, sequences: 1, tokens, stepTokens: tokens },
      ...{ residual: LEAST_RESIDUAL, sinks: 0 },
    }),
  );
  const sequence = cache.add();
  sampled.append(cache.begin([{ sequence, tokens }]), 0, layers);
  const { packedBytes, packedTokens } = cache.statistics();
  return 8 * packedBytes / (packedTokens * layers * 2 * kvHeads * headDim);
}

function median(times: readonly number[]): number {
  return times.toSorted((a, b) => a - b)[times.length >> 1]!;
}

function secondsSince(start: number): number {
  return (performance.now() - start) / 1000;
}

function within(name: string, value: number, least: number, most: number): void {
  if (Number.isSafeInteger(value) && value >= least && value <= most) return;
  throw new PackhorseError(
    "invalid-argument",
    `Cannot measure the model: ${name} must be an integer from ${least} to ${most}, got ${value}`,
  );
}
