import type { Device } from "../device/device.ts";
import { PackhorseError } from "../error.ts";
import { readConfigFile } from "../io/json_fields.ts";
import { KvCache, type KvCacheStatistics } from "../kv/cache.ts";
import { parseCacheCodec } from "../kv/cache_codec.ts";
import {
  type KvCacheCodec,
  type KvCacheDType,
  type KvQueryDType,
  resolveCacheOptions,
  splitsToFill,
} from "../kv/cache_options.ts";
import { poolBytesFor } from "../kv/pool_bytes.ts";
import { benchModel, type ModelBench, type ModelBenchOptions } from "./bench_model.ts";
import { Checkpoint, type WeightDType } from "./checkpoint.ts";
import { Conversation, type ConversationOptions } from "./conversation.ts";
import { DecodeGraphs } from "./decode_graphs.ts";
import { dumpCache, type DumpOptions, type DumpReport } from "./dump.ts";
import { evaluateModel, type Evaluation, type EvaluationOptions } from "./evaluate.ts";
import {
  type Completion,
  type GeneratedPiece,
  generateTokens,
  type GenerationOptions,
  type Prompt,
} from "./generate.ts";
import {
  type LanguageModelConfig,
  parseLanguageModelConfig,
  readLanguageModelConfig,
} from "./model_config.ts";
import { prepareLinear } from "./operations.ts";
import { PromptMemory } from "./prompt_memory.ts";
import { ModelRunner } from "./runner.ts";
import { Tokenizer } from "./tokenizer.ts";
import { Turns } from "./turns.ts";
import { tuneCodec, type Tuning, type TuningOptions } from "./tune.ts";
import { type ModelWeights, planRandomWeights, planWeights } from "./weights.ts";

/** Options of {@linkcode LanguageModel.load}. */
export interface LanguageModelOptions {
  /**
   * How the cache packs tokens: a codec, one per layer, or a text that {@linkcode parseCacheCodec} reads. Default:
   * `packkv` with `rel` 0.1 for the keys and 0.2 for the values.
   */
  readonly codec?: KvCacheCodec | readonly KvCacheCodec[] | string | undefined;
  /** Most tokens of a sequence. Default: 4096, or the model's own limit if that is less. */
  readonly tokens?: number | undefined;
  /** Most sequences at once, among them prompts that are remembered. Default: 4. */
  readonly sequences?: number | undefined;
  /**
   * How many tokens, over all sequences, the cache must hold packed, even if they need as many bits as the codec can
   * take. Default: `tokens` times `sequences`.
   */
  readonly cacheTokens?: number | undefined;
  /** Instead of `cacheTokens`: bytes for packed tokens. */
  readonly cacheBytes?: number | undefined;
  /** As {@linkcode KvCacheOptions.residual}. */
  readonly residual?: number | undefined;
  /**
   * As {@linkcode KvCacheOptions.sinks}. Default: 4, but 0 for a model with sliding windows, for its tokens must not
   * attend to what their window has left.
   */
  readonly sinks?: number | undefined;
  /** How many tokens of a prompt are computed at once. Default: 512. */
  readonly stepTokens?: number | undefined;
  /**
   * Type of the weights. Default: on the CPU f32; on a GPU as they are in the files, but bf16 for f32. Activations and
   * sums are f32.
   */
  readonly dtype?: WeightDType | undefined;
  /** Type of cached keys and values. Default: that of the weights, or f16 if they are f32. */
  readonly cacheDType?: KvCacheDType | undefined;
  /**
   * Whether weights are random numbers instead of those of a checkpoint: to measure speed, which does not depend on them.
   * The folder needs only a `config.json`, which may be named in its place, and there is no tokenizer unless one is given.
   * Default: false.
   */
  readonly randomWeights?: boolean | undefined;
  /** The tokenizer, or whether to load the folder's; without one, prompts and results are tokens. Default: true. */
  readonly tokenizer?: Tokenizer | boolean | undefined;
  /** Called with the bytes of weights that are loaded, and how many there are. */
  readonly onProgress?: ((done: number, total: number) => void) | undefined;
  /** Stops loading. */
  readonly signal?: AbortSignal | undefined;
}

/** What a {@linkcode LanguageModel} is made of; for this folder. */
export interface ModelParts {
  readonly device: Device;
  readonly config: LanguageModelConfig;
  readonly tokenizer: Tokenizer | undefined;
  readonly weights: ModelWeights;
  readonly cache: KvCache;
  readonly runner: ModelRunner;
  readonly graphs: DecodeGraphs;
  /** Whose turn it is, where several generate at a time. */
  readonly turns: Turns;
  /** Whether decode steps are enqueued before the tokens of those before are known: see {@linkcode DecodePipeline}. */
  readonly decodesAhead: boolean;
}

/** What a model is made of; for tests. */
export let partsOf: (model: LanguageModel) => ModelParts;

/**
 * A language model of a Hugging Face folder, with a packed cache.
 *
 * Families: Llama 2, 3 and 3.1, Mistral, Qwen 2, 2.5 and 3, Phi 3 and 4, with weights in F32, F16 or BF16.
 *
 * @example
 * ```ts
 * import { Device, LanguageModel } from "@packhorse/packhorse";
 * import { assert, assertEquals } from "@std/assert";
 *
 * using device = Device.open();
 * using model = await LanguageModel.load(device, "tests/fixtures/tiny", {
 *   codec: "packkv:k=0.1,v=0.2",
 *   tokens: 1024,
 * });
 * let text = "";
 * for await (const piece of model.generate("And the LORD spake unto", { maxTokens: 8 })) {
 *   text += piece.text;
 * }
 * assert(text.length > 0);
 * assertEquals((await model.complete("And the LORD spake unto", { maxTokens: 8 })).text, text);
 * ```
 */
export class LanguageModel implements Disposable {
  /** What its `config.json` says. */
  readonly config: LanguageModelConfig;
  /** Texts to tokens and back. */
  readonly tokenizer: Tokenizer | undefined;
  /** The device that holds it. */
  readonly device: Device;
  /** Bytes of its weights on the device. */
  readonly weightBytes: number;
  /** How many weights it has. */
  readonly parameters: number;
  readonly #parts: ModelParts;
  readonly #stack: DisposableStack;

  static {
    partsOf = (model) => model.#parts;
  }

  private constructor(parts: ModelParts, stack: DisposableStack) {
    this.#parts = parts;
    this.#stack = stack;
    this.config = parts.config;
    this.tokenizer = parts.tokenizer;
    this.device = parts.device;
    this.weightBytes = parts.weights.byteLength;
    this.parameters = parts.weights.parameters;
  }

  /**
   * Loads a model: `config.json`, `generation_config.json`, `tokenizer.json`, and the weights in `model.safetensors` or
   * in the files that `model.safetensors.index.json` names; no other file. Weights go to the device one after another,
   * so that little of them is in host memory at once.
   *
   * Throws `not-found` naming the file that is missing, `unsupported` for a model of no known family, naming what it
   * would need, and for types of weights that cannot be used, `corrupt` naming the field or the tensor that is missing or
   * wrong, `truncated` for a file that is cut, `invalid-argument` for options outside their range, `out-of-memory`,
   * `io`, `disposed`, the signal's reason.
   */
  static async load(
    device: Device,
    folder: string,
    options: LanguageModelOptions = {},
  ): Promise<LanguageModel> {
    const { randomWeights = false, tokenizer: asked = !randomWeights } = options;
    const config = randomWeights && folder.endsWith(".json")
      ? parseLanguageModelConfig(await readConfigFile(folder), folder)
      : await readLanguageModelConfig(folder);
    const tokenizer = asked === true ? await Tokenizer.load(folder) : asked || undefined;
    if (tokenizer !== undefined && tokenizer.vocabulary > config.vocabulary) {
      const message = `Cannot load the model in ${folder}: its tokenizer has ` +
        `${tokenizer.vocabulary} tokens, but config.json has a vocab_size of ${config.vocabulary}`;
      throw new PackhorseError("corrupt", message);
    }
    using stack = new DisposableStack();
    using files = new DisposableStack();
    const planned = randomWeights
      ? planRandomWeights(device, config, options.dtype)
      : planWeights(device, files.use(await Checkpoint.open(folder)), config, options.dtype);
    // Before the weights, which take long, for it may be refused.
    const cache = stack.use(createCache(device, config, planned.dtype, options));
    const weights = stack.use(await planned.load(options));
    const { tokens, stepTokens, sequences, dtype: cacheDType, queryDType } = cache.config;
    const limits = { stepTokens, logitRows: sequences, tokens, cacheDType, queryDType };
    const runner = stack.use(new ModelRunner(device, config, weights, limits));
    const graphs = stack.use(new DecodeGraphs());
    prepareLinear(device);
    const turns = new Turns();
    const made = { device, config, tokenizer, weights, cache, runner, graphs, turns };
    // Where work is done when a call returns, a step that may be one too many gains nothing.
    const parts = { ...made, decodesAhead: device.isAsynchronous };
    return new LanguageModel(parts, stack.move());
  }

  /** The cache's codecs, sizes and limits. */
  get cacheConfig(): KvCache["config"] {
    return this.#parts.cache.config;
  }

  /** Counts the bytes of the cache, as {@linkcode KvCache.statistics}. */
  cacheStatistics(): KvCacheStatistics {
    return this.#parts.cache.statistics();
  }

  /** Whether it, or its device, was disposed. */
  get isDisposed(): boolean {
    return this.#stack.disposed || this.device.isDisposed;
  }

  /**
   * Continues a prompt, or several at once: pieces of text as they come, those of a prompt in their order. Iterating
   * starts the work, and leaving the loop ends it.
   *
   * A prompt is a text, or tokens. Every prompt gives the same tokens whatever else is generated with it; on a GPU as far
   * as roundings allow, for it multiplies more than 8 rows in ways that depend on how many there are: tokens of prompts, and
   * sequences. More prompts than the cache has room for wait for their turn.
   *
   * On a GPU ({@linkcode Device.isAsynchronous}), the next tokens are being computed while the caller has a piece.
   *
   * Throws `invalid-argument` for options outside their range, a prompt without tokens, or one longer than the model was
   * loaded for; `unsupported` for a text, or stop strings, without a tokenizer; `out-of-memory` if the cache is
   * exhausted; `non-finite` if the model computes what is no number, or keys and values that the cache's type cannot
   * hold; `disposed`; the signal's reason.
   *
   * @example
   * ```ts
   * import { Device, LanguageModel } from "@packhorse/packhorse";
   * import { assertEquals } from "@std/assert";
   *
   * using device = Device.open();
   * using model = await LanguageModel.load(device, "tests/fixtures/tiny", { tokens: 512 });
   * const texts = ["", ""];
   * const prompts = ["In the beginning", "And the king said unto"];
   * for await (const piece of model.generate(prompts, { maxTokens: 5, signal: AbortSignal.timeout(60_000) })) {
   *   texts[piece.prompt] += piece.text;
   * }
   * const alone = await model.complete(prompts[1]!, { maxTokens: 5 });
   * assertEquals(texts[1], alone.text);
   * ```
   */
  generate(
    prompt: Prompt | readonly Prompt[],
    options: GenerationOptions = {},
  ): AsyncGenerator<GeneratedPiece, void> {
    return generateTokens(this.#parts, isPrompt(prompt) ? [prompt] : prompt, options);
  }

  /** Continues a prompt as {@linkcode generate} does, and returns the whole continuation. */
  complete(prompt: Prompt, options?: GenerationOptions): Promise<Completion>;
  /** Continues several prompts at once. */
  complete(prompts: readonly Prompt[], options?: GenerationOptions): Promise<Completion[]>;
  async complete(
    prompt: Prompt | readonly Prompt[],
    options: GenerationOptions = {},
  ): Promise<Completion | Completion[]> {
    const prompts = isPrompt(prompt) ? [prompt] : prompt;
    const completions = prompts.map((): {
      -readonly [Name in keyof Completion]: Completion[Name];
    } => ({
      text: "",
      tokens: [],
      finish: "length",
    }));
    for await (const piece of generateTokens(this.#parts, prompts, options)) {
      const completion = completions[piece.prompt]!;
      completion.text += piece.text;
      completion.tokens = [...completion.tokens, ...piece.tokens];
      completion.finish = piece.finish ?? completion.finish;
    }
    return isPrompt(prompt) ? completions[0]! : completions;
  }

  /**
   * Room for the keys and values of a text that prompts begin with, to compute them once: see {@linkcode PromptMemory}.
   * It takes one of the model's `sequences` while it is not empty.
   */
  createMemory(): PromptMemory {
    return new PromptMemory(this.#parts.cache);
  }

  /**
   * Begins a conversation through the model's chat template: see {@linkcode Conversation}.
   *
   * Throws `unsupported` for a model without a chat template, or loaded without a tokenizer.
   */
  createConversation(options: ConversationOptions = {}): Conversation {
    return new Conversation(this, options);
  }

  /**
   * Measures what codecs cost on a text: perplexity, and how far predictions are from those with a 16-bit cache.
   *
   * The first `windows` windows of `tokens` predictions are scored, each on its own: window `i` predicts tokens
   * `i * tokens + 1` to `(i + 1) * tokens` of the text from the one before each and those before it in the window. No
   * token is added at the beginning.
   *
   * With `residual` 0, the default, keys and values are quantised and restored before any query reads them, the
   * query's own included, by the cache's own codec in blocks of 64 tokens; only the first `sinks` stay in 16 bits.
   * That is the codec at its worst, and what figures of papers are. With a `residual` of 8 or more, tokens come 8 at a
   * time to a cache as {@linkcode generate} uses it, in which the newest tokens stay in 16 bits.
   *
   * Throws `invalid-argument` for options outside their range and a text that is too short, `unsupported` for a text
   * without a tokenizer, `out-of-memory`, `disposed`, the signal's reason.
   *
   * @example
   * ```ts
   * import { Device, LanguageModel } from "@packhorse/packhorse";
   * import { assert, assertEquals } from "@std/assert";
   *
   * using device = Device.open();
   * using model = await LanguageModel.load(device, "tests/fixtures/tiny", { tokens: 512 });
   * const text = await Deno.readTextFile("tests/fixtures/tiny/heldout.txt");
   * const { reference, results } = await model.evaluate(text.slice(0, 4000), {
   *   tokens: 256,
   *   windows: 2,
   *   codecs: ["packkv:k=0.1,v=0.2", "fixed:8"],
   * });
   * assertEquals(reference.predictions, 512);
   * const [packkv, fixed] = results;
   * assert(packkv!.kld > fixed!.kld && packkv!.bitsPerValue < fixed!.bitsPerValue);
   * ```
   */
  async evaluate(
    text: Prompt,
    options: EvaluationOptions = {},
  ): Promise<Evaluation> {
    return await evaluateModel(this.#parts, text, options);
  }

  /**
   * Searches the codec with the fewest bits per value whose divergence from a 16-bit cache, as {@linkcode evaluate}
   * measures it, is at most `maxKld` nats: scales of `packkv`, bits of `fixed` and `kivi`, for keys and values apart, and
   * `raw16`, which always holds. What holds on this text may not on another: take one like what the model will see.
   *
   * Throws `invalid-argument` also for a `maxKld` below 0; else as {@linkcode evaluate}.
   *
   * @example
   * ```ts
   * import { Device, LanguageModel } from "@packhorse/packhorse";
   * import { assert, assertEquals } from "@std/assert";
   *
   * using device = Device.open();
   * using model = await LanguageModel.load(device, "tests/fixtures/tiny", { tokens: 64 });
   * const text = await Deno.readTextFile("tests/fixtures/tiny/heldout.txt");
   * const { best, measured } = await model.tune(text.slice(0, 2000), 0.1, { tokens: 256 });
   * assert(best.kld <= 0.1 && best.bitsPerValue < 6);
   * assertEquals(measured.at(-1)!.name, "raw16");
   * ```
   */
  async tune(text: Prompt, maxKld: number, options: TuningOptions = {}): Promise<Tuning> {
    return await tuneCodec(this.#parts, { text, maxKld }, options);
  }

  /**
   * Writes the keys (after rotary embedding) and values that a text leaves to a `.safetensors` file: of each layer
   * `layers.<n>.key` and `layers.<n>.value`, `[kvHeads, tokens, headDim]` of the cache's type, computed without packing any.
   * {@linkcode packKvFile}, {@linkcode measureKvCacheWidths} and others read such files.
   *
   * Throws `invalid-argument` for options outside their range and a text that is too short, `unsupported` for a text
   * without a tokenizer, `non-finite` for what the cache's type cannot hold, `io`, `out-of-memory`, `disposed`, the
   * signal's reason; then no file is left.
   *
   * @example
   * ```ts
   * import { Device, LanguageModel, measureKvCacheWidths, parseCacheCodec } from "@packhorse/packhorse";
   * import { assert, assertEquals } from "@std/assert";
   *
   * using device = Device.open();
   * using model = await LanguageModel.load(device, "tests/fixtures/tiny", { tokens: 64 });
   * const text = await Deno.readTextFile("tests/fixtures/tiny/heldout.txt");
   * const input = `${await Deno.makeTempDir()}/kv.safetensors`;
   * const report = await model.dump(text.slice(0, 4000), input, { tokens: 512 });
   * assertEquals([report.tokens, report.layers.length], [512, model.config.layers]);
   * const widths = await measureKvCacheWidths(device, { input, codec: parseCacheCodec("packkv") });
   * assert(widths.keys < 4);
   * ```
   */
  async dump(text: Prompt, output: string, options: DumpOptions = {}): Promise<DumpReport> {
    return await dumpCache(this.#parts, { text, output }, options);
  }

  /**
   * Measures how fast the model runs over a cache of its own, of any codec and size: prompts, and decode steps of a batch
   * whose sequences all have `context` tokens. The cache is freed again.
   *
   * Throws `invalid-argument` for options outside their range, `out-of-memory` if the cache does not fit the device, or
   * packed tokens take more bits than assumed, `disposed`, the signal's reason; as {@linkcode measureKvCacheWidths} for
   * the file that the cache is filled from.
   *
   * @example
   * ```ts
   * import { Device, LanguageModel } from "@packhorse/packhorse";
   * import { assert } from "@std/assert";
   *
   * using device = Device.open();
   * using model = await LanguageModel.load(device, "tests/fixtures/tiny/config.json", {
   *   randomWeights: true,
   *   tokens: 64,
   * });
   * const size = { context: 1024, batch: 2, tokens: 8 };
   * const computed = await model.bench({ ...size, codec: "fixed:4" });
   * assert(computed.prefillTokens === 2 * computed.filledTokens && computed.bitsPerValue < 8);
   *
   * // As if prompts of a real model had filled it, in a pool that is just large enough.
   * const fill = { input: "tests/fixtures/tiny/kv.safetensors" };
   * const filled = await model.bench({ ...size, codec: "packkv", fill });
   * assert(filled.isSynthetic && filled.decodeTokensPerSecond > 0);
   * ```
   */
  async bench(options: ModelBenchOptions = {}): Promise<ModelBench> {
    return await benchModel(this.#parts, options);
  }

  /** Frees its memory, once the work enqueued so far is done. Does nothing the second time. */
  [Symbol.dispose](): void {
    this.#stack.dispose();
  }
}

/** The least that a cache takes. */
const LEAST_POOL_BYTES = 65_536;

function isPrompt(prompt: Prompt | readonly Prompt[]): prompt is Prompt {
  return typeof prompt === "string" || typeof prompt[0] === "number";
}

function createCache(
  device: Device,
  config: LanguageModelConfig,
  weights: WeightDType,
  options: LanguageModelOptions,
): KvCache {
  const { layers, queryHeads, kvHeads, headDim, windows } = config;
  const { sequences = 4, residual, cacheBytes } = options;
  const { tokens = Math.min(4096, config.contextLimit), stepTokens = 512 } = options;
  const { cacheTokens = tokens * sequences } = options;
  const dtype = options.cacheDType ?? (weights === "f32" ? "f16" : weights);
  const sinks = options.sinks ?? (windows.some((window) => window > 0) ? 0 : undefined);
  const codec = typeof options.codec === "string" ? parseCacheCodec(options.codec) : options.codec;
  // On the CPU, queries and outputs are as exact as the rest.
  const queryDType: KvQueryDType = device.backend === "cpu" ? "f32" : dtype;
  const shape = { layers, queryHeads, kvHeads, headDim, dtype, queryDType };
  const limits = { residual, sinks, stepTokens: Math.max(stepTokens, sequences) };
  const splits = splitsToFill({ sequences, kvHeads });
  const cache = { ...shape, ...limits, sequences, tokens, splits, codec, window: windows };
  // Here its own messages name what is wrong.
  resolveCacheOptions({ ...cache, poolBytes: cacheBytes ?? LEAST_POOL_BYTES });
  const poolBytes = cacheBytes ??
    poolBytesFor(device, cache, { context: Math.ceil(cacheTokens / sequences) });
  return KvCache.create(device, { ...cache, poolBytes });
}
