import type { Device } from "../device/device.ts";
import type { DeviceBuffer } from "../device/device_buffer.ts";
import type { DType } from "../dtype.ts";
import type { FloatDType } from "../float_conversion.ts";
import type { KvCacheDType, KvQueryDType } from "../kv/cache_options.ts";
import type { KvCacheStep } from "../kv/cache_step.ts";
import type { LanguageModelConfig } from "./model_config.ts";
import { cast, gather, linear, rmsNorm, rope, swiglu } from "./operations.ts";
import { rotaryFrequencies } from "./rotary.ts";
import type { LayerWeights, ModelWeights } from "./weights.ts";

/** Sizes of what a {@linkcode ModelRunner} works on. */
export interface RunnerOptions {
  /** Most tokens of a step, over all its sequences. */
  readonly stepTokens: number;
  /** Most tokens whose logits are computed at once. */
  readonly logitRows: number;
  /** Most tokens of a sequence. */
  readonly tokens: number;
  /** Type of the cache's keys and values. */
  readonly cacheDType: KvCacheDType;
  /** Type of attention's queries and outputs. */
  readonly queryDType: KvQueryDType;
}

/** What happens to a layer's keys and values between their projection and attention; for evaluation. */
export type RestoreKeyValues = (
  layer: number,
  keys: DeviceBuffer<KvCacheDType>,
  values: DeviceBuffer<KvCacheDType>,
) => void;

/** Options of {@linkcode ModelRunner.forward}. */
export interface ForwardOptions {
  /** Whether the step's tokens are appended and attend ({@linkcode KvCacheStep.attend}), or all at once ({@linkcode KvCacheStep.prefill}). */
  readonly attention: "attend" | "prefill";
  /** Called for each layer, before its attention. */
  readonly restore?: RestoreKeyValues | undefined;
}

/** Views of the activations for some number of tokens. */
interface Activations {
  readonly tokens: DeviceBuffer<"i32">;
  readonly positions: DeviceBuffer<"i32">;
  readonly x: DeviceBuffer<"f32">;
  readonly normed: DeviceBuffer<FloatDType>;
  readonly projected: DeviceBuffer<"f32">;
  readonly queries: DeviceBuffer<KvQueryDType>;
  readonly keys: DeviceBuffer<KvCacheDType>;
  readonly values: DeviceBuffer<KvCacheDType>;
  readonly attended: DeviceBuffer<KvQueryDType>;
  readonly toOutput: DeviceBuffer<FloatDType>;
  readonly gateUp: DeviceBuffer<"f32">;
  readonly activated: DeviceBuffer<FloatDType>;
}

/**
 * The forward pass of a model: embedding, layers whose attention is a step of a cache, norm and head. Enqueues work and
 * waits for nothing; allocates nothing once it is made.
 *
 * The residual stream and all sums are f32. What matrices multiply is rounded to their type, on the CPU f32; keys and
 * values are of the cache's type, and on a GPU queries and what attention gives, too.
 */
export class ModelRunner implements Disposable {
  readonly device: Device;
  readonly config: LanguageModelConfig;
  readonly options: RunnerOptions;
  readonly #weights: ModelWeights;
  readonly #stack: DisposableStack;
  readonly #frequencies: DeviceBuffer<"f32">;
  readonly #rotaryScale: number;
  readonly #all: Activations;
  readonly #views = new Map<number, Activations>();
  readonly #logits: DeviceBuffer<"f32">;
  readonly #lastNormed: DeviceBuffer<FloatDType>;
  /** Tokens, which need not follow each other, and what the layers made of them. */
  readonly #picked: { readonly rows: DeviceBuffer<"i32">; readonly states: DeviceBuffer<"f32"> };

  constructor(
    device: Device,
    config: LanguageModelConfig,
    weights: ModelWeights,
    options: RunnerOptions,
  ) {
    this.device = device;
    this.config = config;
    this.options = options;
    this.#weights = weights;
    using stack = new DisposableStack();
    const { stepTokens: rows, logitRows, cacheDType, queryDType, tokens } = options;
    const { hidden, intermediate, queryHeads, kvHeads, headDim, vocabulary } = config;
    const create = <T extends DType>(dtype: T, length: number) =>
      stack.use(device.createBuffer(dtype, length));
    const attended = create(queryDType, rows * queryHeads * headDim);
    // A GPU multiplies what has the type of the weights; the CPU, anything.
    const sameType = device.backend === "cpu" || weights.dtype === queryDType;
    this.#all = {
      tokens: create("i32", rows),
      positions: create("i32", rows),
      x: create("f32", rows * hidden),
      normed: create(weights.dtype, rows * hidden),
      projected: create("f32", rows * (queryHeads + 2 * kvHeads) * headDim),
      queries: create(queryDType, rows * queryHeads * headDim),
      keys: create(cacheDType, rows * kvHeads * headDim),
      values: create(cacheDType, rows * kvHeads * headDim),
      attended,
      toOutput: sameType ? attended : create(weights.dtype, rows * queryHeads * headDim),
      gateUp: create("f32", rows * 2 * intermediate),
      activated: create(weights.dtype, rows * intermediate),
    };
    this.#logits = create("f32", logitRows * vocabulary);
    this.#lastNormed = create(weights.dtype, logitRows * hidden);
    this.#picked = {
      rows: create("i32", logitRows),
      states: create("f32", logitRows * hidden),
    };
    const { frequencies, scale } = rotaryFrequencies(config.rotary, tokens);
    this.#frequencies = create("f32", frequencies.length);
    this.#frequencies.upload(Float32Array.from(frequencies));
    this.#rotaryScale = scale;
    this.#stack = stack.move();
  }

  /** Where the tokens of a step go: i32 `[rows]`. */
  tokens(rows: number): DeviceBuffer<"i32"> {
    return this.#view(rows).tokens;
  }

  /** Where their positions in their sequences go: i32 `[rows]`. */
  positions(rows: number): DeviceBuffer<"i32"> {
    return this.#view(rows).positions;
  }

  /** Runs the layers for a step whose {@linkcode tokens} and {@linkcode positions} are there. */
  forward(step: KvCacheStep, options: ForwardOptions): void {
    const rows = step.tokens;
    const { vocabulary, hidden } = this.config;
    const view = this.#view(rows);
    gather(this.#weights.embedding, view.tokens, view.x, {
      rows,
      width: hidden,
      xRows: vocabulary,
    });
    this.#weights.layers.forEach((layer, number) => {
      this.#attention(step, { layer, number, view, ...options });
      this.#feedForward(rows, layer, view);
    });
  }

  /** What the layers made of the last step's tokens: `[rows, hidden]`. */
  states(rows: number): DeviceBuffer<"f32"> {
    return this.#view(rows).x;
  }

  /** Where {@linkcode logits} of so many tokens are, until the next call. */
  logitsOut(count: number): DeviceBuffer<"f32"> {
    return this.#logits.view(0, count * this.config.vocabulary);
  }

  /**
   * Computes logits `[count, vocabulary]` of tokens `first` on of the last step, or of other states `[count, hidden]`.
   * Returns `out`.
   */
  logits(
    first: number,
    count: number,
    { states, out = this.logitsOut(count) }: {
      readonly states?: DeviceBuffer<"f32">;
      readonly out?: DeviceBuffer<"f32">;
    } = {},
  ): DeviceBuffer<"f32"> {
    const { hidden, vocabulary, epsilon } = this.config;
    const x = states ?? this.#all.x.view(first * hidden, count * hidden);
    const normed = this.#lastNormed.view(0, count * hidden);
    rmsNorm(x, this.#weights.norm, normed, { rows: count, width: hidden, epsilon });
    linear(normed, this.#weights.head, out, {
      rows: count,
      inFeatures: hidden,
      outFeatures: vocabulary,
    });
    return out;
  }

  /** Computes logits of these tokens of the last step: `[rows.length, vocabulary]`. */
  logitsOf(rows: readonly number[]): DeviceBuffer<"f32"> {
    const { hidden } = this.config;
    const [count, total] = [rows.length, Math.max(...rows) + 1];
    if (count === 1) return this.logits(rows[0]!, 1);
    const indices = this.#picked.rows.view(0, count);
    const states = this.#picked.states.view(0, count * hidden);
    indices.upload(Int32Array.from(rows));
    gather(this.states(total), indices, states, { rows: count, width: hidden, xRows: total });
    return this.logits(0, count, { states });
  }

  /** Frees the activations; the weights are not its own. */
  [Symbol.dispose](): void {
    this.#stack.dispose();
  }

  #attention(
    step: KvCacheStep,
    { layer, number, view, attention, restore }: ForwardOptions & {
      layer: LayerWeights;
      number: number;
      view: Activations;
    },
  ): void {
    const { hidden, queryHeads, kvHeads, headDim, epsilon } = this.config;
    const rows = step.tokens;
    const { x, normed, projected, queries, keys, values, attended, toOutput } = view;
    const [queryWidth, keyWidth] = [queryHeads * headDim, kvHeads * headDim];
    const stride = queryWidth + 2 * keyWidth;
    rmsNorm(x, layer.attentionNorm, normed, { rows, width: hidden, epsilon });
    linear(normed, layer.queryKeyValue, projected, {
      rows,
      inFeatures: hidden,
      outFeatures: stride,
      bias: layer.queryKeyValueBias,
    });
    const parts = {
      queries: { first: 0, heads: queryHeads, norm: layer.queryNorm, out: queries },
      keys: { first: queryWidth, heads: kvHeads, norm: layer.keyNorm, out: keys },
    };
    for (const { first, heads, norm, out } of Object.values(parts)) {
      const part = projected.view(first);
      if (norm !== undefined) {
        const groups = { rows, groups: heads, width: headDim, epsilon };
        rmsNorm(part, norm, part, { ...groups, xStride: stride, outStride: stride });
      }
      this.#turn(part, out, { rows, heads, stride, positions: view.positions });
    }
    cast(projected.view(queryWidth + keyWidth), values, { rows, width: keyWidth, xStride: stride });
    restore?.(number, keys, values);
    if (attention === "prefill") {
      step.prefill(number, { queries, keys, values, out: attended });
    } else {
      step.append(number, keys, values);
      step.attend(number, queries, attended);
    }
    if (toOutput !== attended) cast(attended, toOutput, { rows, width: queryWidth });
    linear(toOutput, layer.output, x, {
      rows,
      inFeatures: queryWidth,
      outFeatures: hidden,
      bias: layer.outputBias,
      accumulate: true,
    });
  }

  /** Turns heads of queries or keys by their position, and rounds them to the cache's type. */
  #turn(
    part: DeviceBuffer<"f32">,
    out: DeviceBuffer<KvQueryDType>,
    { rows, heads, stride, positions }: {
      rows: number;
      heads: number;
      stride: number;
      positions: DeviceBuffer<"i32">;
    },
  ): void {
    const { headDim, rotary } = this.config;
    rope(part, out, {
      rows,
      heads,
      headDim,
      rotaryDim: rotary.dim,
      positions,
      frequencies: this.#frequencies,
      scale: this.#rotaryScale,
      xStride: stride,
    });
  }

  #feedForward(rows: number, layer: LayerWeights, view: Activations): void {
    const { hidden, intermediate, epsilon } = this.config;
    const { x, normed, gateUp, activated } = view;
    rmsNorm(x, layer.feedForwardNorm, normed, { rows, width: hidden, epsilon });
    linear(normed, layer.gateUp, gateUp, {
      rows,
      inFeatures: hidden,
      outFeatures: 2 * intermediate,
      bias: layer.gateUpBias,
    });
    const up = gateUp.view(intermediate);
    swiglu(gateUp, up, activated, { rows, width: intermediate, stride: 2 * intermediate });
    linear(activated, layer.down, x, {
      rows,
      inFeatures: intermediate,
      outFeatures: hidden,
      bias: layer.downBias,
      accumulate: true,
    });
  }

  /** The activations of the first `rows` tokens. */
  #view(rows: number): Activations {
    const known = this.#views.get(rows);
    if (known !== undefined) return known;
    const share = <T extends DType>(buffer: DeviceBuffer<T>) =>
      buffer.view(0, rows * buffer.length / this.options.stepTokens);
    const { attended, toOutput } = this.#all;
    const sharedAttended = share(attended);
    const view: Activations = {
      tokens: share(this.#all.tokens),
      positions: share(this.#all.positions),
      x: share(this.#all.x),
      normed: share(this.#all.normed),
      projected: share(this.#all.projected),
      queries: share(this.#all.queries),
      keys: share(this.#all.keys),
      values: share(this.#all.values),
      attended: sharedAttended,
      toOutput: toOutput === attended ? sharedAttended : share(toOutput),
      gateUp: share(this.#all.gateUp),
      activated: share(this.#all.activated),
    };
    this.#views.set(rows, view);
    return view;
  }
}
