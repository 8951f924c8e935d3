import type { DeviceBuffer } from "../device/device_buffer.ts";
import { PackhorseError } from "../error.ts";
import type { KvCache } from "../kv/cache.ts";
import { parseCacheCodec } from "../kv/cache_codec.ts";
import type { KvCacheCodec } from "../kv/cache_options.ts";
import { BLOCK_TOKENS } from "../kv/codec.ts";
import { encodePrompt, type Prompt } from "./generate.ts";
import type { ModelParts } from "./language_model.ts";
import { bytesOfTokens, INDEX_BYTES } from "./cache_bytes.ts";
import { RestoreCache } from "./restore_cache.ts";
import { type ForwardOptions, ModelRunner } from "./runner.ts";
import { crossEntropy, divergence } from "./score_logits.ts";
import { createWindowCache, RAW16 } from "./window_cache.ts";

/** Options of {@linkcode LanguageModel.evaluate}. */
export interface EvaluationOptions {
  /** How many windows of the text are scored. Default: 1. */
  readonly windows?: number | undefined;
  /** Predictions of a window, at most the `tokens` that the model's context takes. Default: 1024. */
  readonly tokens?: number | undefined;
  /** What to measure: codecs, or texts that {@linkcode parseCacheCodec} reads. Default: none, for perplexity alone. */
  readonly codecs?: readonly (KvCacheCodec | string)[] | undefined;
  /**
   * 0 to quantise and restore every key and value before any query reads it; 8 or more to keep that many of the newest
   * tokens in 16 bits, as generating does. Default: 0.
   */
  readonly residual?: number | undefined;
  /** How many of a window's first tokens stay in 16 bits. Default: 0. */
  readonly sinks?: number | undefined;
  /** Whether results have the scores of every prediction, not only their means. Default: false. */
  readonly scores?: boolean | undefined;
  /** Called with the windows that are done, over all codecs, and how many there are. */
  readonly onProgress?: ((done: number, total: number) => void) | undefined;
  /** Stops the work. */
  readonly signal?: AbortSignal | undefined;
}

/** How well a model predicts a text with a 16-bit cache. */
export interface ReferenceEvaluation {
  /** How many tokens were predicted. */
  readonly predictions: number;
  /** The exponential of the mean negative logarithm of the tokens' probabilities. */
  readonly perplexity: number;
}

/** Scores of every prediction with a codec, one window after the other: of shape `[windows * tokens]`. */
export interface PredictionScores {
  /** Negative logarithms of the probabilities of the tokens that came, in nats. */
  readonly losses: Float32Array;
  /** Kullback-Leibler divergences from the predictions with the 16-bit cache, in nats. */
  readonly divergences: Float32Array;
  /** 1 where the likeliest token is that of the 16-bit cache, else 0. */
  readonly agreements: Float32Array;
}

/** What a codec costs, against a 16-bit cache. */
export interface CodecEvaluation {
  /** The codec. */
  readonly codec: KvCacheCodec;
  /** The text that named it, if one did. */
  readonly name: string | undefined;
  /** As {@linkcode ReferenceEvaluation.perplexity}. */
  readonly perplexity: number;
  /** By what share perplexity is higher: 0.01 for 1 %. */
  readonly perplexityIncrease: number;
  /** Mean Kullback-Leibler divergence of the predictions from those with the 16-bit cache, in nats. */
  readonly kld: number;
  /** How often the likeliest token is the same, 0 to 1. */
  readonly top1: number;
  /** Bits per key or value of a window, every byte counted: records, where they end, and tokens in 16 bits. */
  readonly bitsPerValue: number;
  /** What the means are of, if {@linkcode EvaluationOptions.scores} asks for it. */
  readonly scores: PredictionScores | undefined;
}

/** What {@linkcode LanguageModel.evaluate} finds. */
export interface Evaluation {
  /** Windows that were scored. */
  readonly windows: number;
  /** Predictions of each. */
  readonly tokens: number;
  /** As {@linkcode EvaluationOptions.residual}. */
  readonly residual: number;
  /** With a 16-bit cache. */
  readonly reference: ReferenceEvaluation;
  /** One for each of the codecs. */
  readonly results: readonly CodecEvaluation[];
}

/** Logits that are in memory at once, twice. */
const LOGITS_AT_ONCE = 2 ** 25;
/** Scores of so many rows take 16 bytes, at multiples of which operations start. */
const ROWS_ALIGNMENT = 4;
/** Tokens of a step that attend to packed blocks: what one call of attention takes. */
const STEP_TOKENS = 8;

/** {@linkcode LanguageModel.evaluate}. */
export async function evaluateModel(
  parts: ModelParts,
  text: Prompt,
  options: EvaluationOptions,
): Promise<Evaluation> {
  const { windows = 1, tokens = 1024, residual = 0, sinks = 0, signal, onProgress } = options;
  const named = (options.codecs ?? []).map((codec) =>
    typeof codec === "string"
      ? { codec: parseCacheCodec(codec), name: codec }
      : { codec, name: undefined }
  );
  within("windows", windows, 1, 2 ** 31);
  within("tokens", tokens, 1, parts.config.contextLimit);
  within("sinks", sinks, 0, 65_536);
  if (residual !== 0) within("residual, unless it is 0,", residual, STEP_TOKENS, 65_536);
  const ids = encodePrompt(parts, text, false);
  if (ids.length < windows * tokens + 1) {
    refuse(
      `the text has ${ids.length} tokens, and ${windows} windows of ${tokens} take ` +
        `${windows * tokens + 1}`,
    );
  }
  signal?.throwIfAborted();

  using stack = new DisposableStack();
  const scorer = stack.use(new Scorer(parts, tokens));
  const candidates = named.map(({ codec }) => {
    const candidate = residual === 0
      ? new RestoredCandidate(parts, scorer, codec, { tokens, sinks })
      : new CachedCandidate(parts, scorer, codec, { tokens, residual, sinks });
    return stack.use(candidate);
  });
  let referenceLoss = 0;
  const sums = named.map(() => ({ loss: 0, divergence: 0, agreements: 0 }));
  const kept = options.scores ? named.map(() => emptyScores(windows * tokens)) : undefined;
  let done = 0;
  const advance = async () => {
    onProgress?.(++done, windows * (1 + named.length));
    await parts.turns.take(() => parts.device.synchronize()); // so that an abort is heard
    signal?.throwIfAborted();
  };
  for (let window = 0; window < windows; window++) {
    const first = window * tokens;
    scorer.begin(ids.slice(first, first + tokens), ids.slice(first + 1, first + tokens + 1));
    referenceLoss += scorer.scoreReference();
    await advance();
    for (const [i, candidate] of candidates.entries()) {
      const sum = sums[i]!;
      await candidate.run(signal);
      const { losses, divergences, agreements } = scorer.score();
      sum.loss += total(losses);
      sum.divergence += total(divergences);
      sum.agreements += total(agreements);
      const all = kept?.[i];
      all?.losses.set(losses, first);
      all?.divergences.set(divergences, first);
      all?.agreements.set(agreements, first);
      await advance();
    }
  }
  const predictions = windows * tokens;
  const perplexity = Math.exp(referenceLoss / predictions);
  return {
    windows,
    tokens,
    residual,
    reference: { predictions, perplexity },
    results: named.map(({ codec, name }, i) => {
      const { loss, divergence, agreements } = sums[i]!;
      const own = Math.exp(loss / predictions);
      return {
        codec,
        name,
        perplexity: own,
        perplexityIncrease: own / perplexity - 1,
        kld: divergence / predictions,
        top1: agreements / predictions,
        bitsPerValue: candidates[i]!.bitsPerValue,
        scores: kept?.[i],
      };
    }),
  };
}

/** A cache whose predictions are compared with the reference's. */
interface Candidate extends Disposable {
  /** Runs the model on the window that the scorer has begun. */
  run(signal: AbortSignal | undefined): Promise<void>;
  readonly bitsPerValue: number;
}

/** Runs windows with a 16-bit cache, keeps what the layers made of them, and scores predictions. */
class Scorer implements Disposable {
  readonly runner: ModelRunner;
  readonly #parts: ModelParts;
  readonly #tokens: number;
  readonly #rows: number;
  readonly #stack: DisposableStack;
  readonly #cache: KvCache;
  readonly #states: DeviceBuffer<"f32">;
  readonly #referenceLogits: DeviceBuffer<"f32">;
  readonly #targets: DeviceBuffer<"i32">;
  readonly #losses: DeviceBuffer<"f32">;
  /** A divergence and an agreement for each token. */
  readonly #divergences: DeviceBuffer<"f32">;
  #ids: readonly number[] = [];

  constructor(parts: ModelParts, tokens: number) {
    const { device, config, weights, cache } = parts;
    const { vocabulary, hidden } = config;
    this.#parts = parts;
    this.#tokens = tokens;
    const most = Math.floor(LOGITS_AT_ONCE / vocabulary / ROWS_ALIGNMENT) * ROWS_ALIGNMENT;
    this.#rows = Math.min(tokens, Math.max(ROWS_ALIGNMENT, most));
    using stack = new DisposableStack();
    const { dtype: cacheDType, queryDType } = cache.config;
    const limits = { stepTokens: tokens, logitRows: this.#rows, tokens, cacheDType, queryDType };
    this.runner = stack.use(new ModelRunner(device, config, weights, limits));
    this.#cache = stack.use(createWindowCache(parts, RAW16, { tokens, stepTokens: tokens }));
    this.#states = stack.use(device.createBuffer("f32", tokens * hidden));
    this.#referenceLogits = stack.use(device.createBuffer("f32", this.#rows * vocabulary));
    this.#targets = stack.use(device.createBuffer("i32", tokens));
    this.#losses = stack.use(device.createBuffer("f32", tokens));
    this.#divergences = stack.use(device.createBuffer("f32", 2 * tokens));
    this.#stack = stack.move();
  }

  /** Tokens of the window. */
  get ids(): readonly number[] {
    return this.#ids;
  }

  /** Begins a window: its tokens, and those that they are to predict. */
  begin(ids: readonly number[], targets: readonly number[]): void {
    this.#ids = ids;
    this.#targets.upload(Int32Array.from(targets));
  }

  /** Runs the window with a 16-bit cache; the sum of the negative log probabilities. */
  scoreReference(): number {
    this.forward();
    this.#states.copyFrom(this.runner.states(this.#tokens));
    this.#eachChunk((first, rows) => {
      const logits = this.runner.logits(first, rows);
      this.#crossEntropy(logits, first, rows);
    });
    return total(this.#losses.download());
  }

  /** Runs the window at once, on keys and values in 16 bits, or what `restore` makes of them. */
  forward(restore?: ForwardOptions["restore"]): void {
    const tokens = this.#tokens;
    const sequence = this.#cache.add();
    try {
      const step = this.#cache.begin([{ sequence, tokens }]);
      this.runner.tokens(tokens).upload(Int32Array.from(this.#ids));
      this.runner.positions(tokens).upload(Int32Array.from({ length: tokens }, (_, i) => i));
      this.runner.forward(step, { attention: "prefill", restore });
    } finally {
      this.#cache.remove(sequence);
    }
  }

  /** Scores what the runner made of the window last, against the reference. */
  score(): PredictionScores {
    const { vocabulary, hidden } = this.#parts.config;
    this.#eachChunk((first, rows) => {
      const logits = this.runner.logits(first, rows);
      this.#crossEntropy(logits, first, rows);
      // The head again, which takes less memory than to keep all logits. What the runner writes is read by then.
      const reference = this.runner.logits(0, rows, {
        states: this.#states.view(first * hidden, rows * hidden),
        out: this.#referenceLogits.view(0, rows * vocabulary),
      });
      const out = this.#divergences.view(2 * first, 2 * rows);
      divergence(reference, logits, out, { rows, vocabulary });
    });
    const pairs = this.#divergences.download(new Float32Array(2 * this.#tokens));
    return {
      losses: this.#losses.download(new Float32Array(this.#tokens)),
      divergences: pairs.filter((_, i) => i % 2 === 0),
      agreements: pairs.filter((_, i) => i % 2 === 1),
    };
  }

  [Symbol.dispose](): void {
    this.#stack.dispose();
  }

  #crossEntropy(logits: DeviceBuffer<"f32">, first: number, rows: number): void {
    const { vocabulary } = this.#parts.config;
    crossEntropy(logits, this.#targets.view(first, rows), this.#losses.view(first, rows), {
      rows,
      vocabulary,
    });
  }

  #eachChunk(work: (first: number, rows: number) => void): void {
    for (let first = 0; first < this.#tokens; first += this.#rows) {
      work(first, Math.min(this.#rows, this.#tokens - first));
    }
  }
}

/** Every key and value is quantised and restored before any query reads it. */
class RestoredCandidate implements Candidate {
  readonly #scorer: Scorer;
  readonly #parts: ModelParts;
  readonly #restore: RestoreCache;
  readonly #sinks: number;
  #bytes = 0;
  #values = 0;

  constructor(
    parts: ModelParts,
    scorer: Scorer,
    codec: KvCacheCodec,
    { tokens, sinks }: { tokens: number; sinks: number },
  ) {
    this.#parts = parts;
    this.#scorer = scorer;
    this.#sinks = Math.min(sinks, tokens);
    const { kvHeads, headDim } = parts.config;
    const { dtype } = parts.cache.config;
    this.#restore = new RestoreCache(parts.device, codec, {
      kvHeads,
      headDim,
      dtype,
      tokens,
      sinks: this.#sinks,
    });
  }

  run(): Promise<void> {
    const restore = this.#restore;
    const before = restore.packedBytes;
    this.#scorer.forward((_layer, keys, values) => restore.restore(keys, values));
    const { layers, kvHeads, headDim } = this.#parts.config;
    const blocks = Math.ceil((this.#scorer.ids.length - this.#sinks) / BLOCK_TOKENS);
    this.#bytes += restore.packedBytes - before +
      layers * (blocks * kvHeads * INDEX_BYTES + this.#sinks * restore.tokenBytes);
    this.#values += layers * 2 * (this.#sinks + blocks * BLOCK_TOKENS) * kvHeads * headDim;
    return Promise.resolve();
  }

  get bitsPerValue(): number {
    return 8 * this.#bytes / this.#values;
  }

  [Symbol.dispose](): void {
    this.#restore[Symbol.dispose]();
  }
}

/** Tokens come eight at a time to a cache that keeps the newest in 16 bits. */
class CachedCandidate implements Candidate {
  readonly #scorer: Scorer;
  readonly #parts: ModelParts;
  readonly #cache: KvCache;
  readonly #stepRunner: ModelRunner;
  readonly #stack: DisposableStack;
  #bytes = 0;
  #values = 0;

  constructor(
    parts: ModelParts,
    scorer: Scorer,
    codec: KvCacheCodec,
    { tokens, residual, sinks }: { tokens: number; residual: number; sinks: number },
  ) {
    this.#parts = parts;
    this.#scorer = scorer;
    using stack = new DisposableStack();
    const limits = { tokens, stepTokens: STEP_TOKENS, residual, sinks };
    this.#cache = stack.use(createWindowCache(parts, codec, limits));
    const { device, config, weights, cache } = parts;
    this.#stepRunner = stack.use(
      new ModelRunner(device, config, weights, {
        stepTokens: STEP_TOKENS,
        logitRows: 1,
        tokens,
        cacheDType: cache.config.dtype,
        queryDType: cache.config.queryDType,
      }),
    );
    this.#stack = stack.move();
  }

  async run(signal: AbortSignal | undefined): Promise<void> {
    const { ids, runner } = this.#scorer;
    const cache = this.#cache;
    const { device, turns, config } = this.#parts;
    const { hidden } = config;
    const states = runner.states(ids.length);
    const sequence = cache.add();
    try {
      for (let first = 0; first < ids.length; first += STEP_TOKENS) {
        const rows = Math.min(STEP_TOKENS, ids.length - first);
        const step = cache.begin([{ sequence, tokens: rows }]);
        const own = this.#stepRunner;
        own.tokens(rows).upload(Int32Array.from(ids.slice(first, first + rows)));
        own.positions(rows).upload(Int32Array.from({ length: rows }, (_, i) => first + i));
        own.forward(step, { attention: "attend" });
        states.view(first * hidden, rows * hidden).copyFrom(own.states(rows));
        if (first % (32 * STEP_TOKENS) === 0) {
          await turns.take(() => device.synchronize());
          signal?.throwIfAborted();
        }
      }
      const { bytes, values } = bytesOfTokens(this.#parts.config, cache.statistics());
      this.#bytes += bytes;
      this.#values += values;
    } finally {
      cache.remove(sequence);
    }
  }

  get bitsPerValue(): number {
    return 8 * this.#bytes / this.#values;
  }

  [Symbol.dispose](): void {
    this.#stack.dispose();
  }
}

function emptyScores(predictions: number): PredictionScores {
  const scores = () => new Float32Array(predictions);
  return { losses: scores(), divergences: scores(), agreements: scores() };
}

function total(values: Iterable<number>): number {
  let sum = 0;
  for (const value of values) sum += value;
  return sum;
}

function within(name: string, value: number, least: number, most: number): void {
  if (Number.isSafeInteger(value) && value >= least && value <= most) return;
  refuse(`${name} must be an integer from ${least} to ${most}, got ${value}`);
}

function refuse(reason: string): never {
  throw new PackhorseError("invalid-argument", `Cannot evaluate: ${reason}`);
}
