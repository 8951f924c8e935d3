import type { NativeKvCache } from "../../ffi/kv_cache.ts";
import type { NativeTensor } from "../../ffi/tensor.ts";
import type { Device } from "../device/device.ts";
import { type DeviceBuffer, regionOn } from "../device/device_buffer.ts";
import { PackhorseError } from "../error.ts";
import type { KvCacheConfig, KvCacheDType, KvQueryDType } from "./cache_options.ts";
import { captureGraph, type KvStepGraph, nativeOfGraph } from "./step_graph.ts";

/** What a step needs of its cache. */
export interface StepOwner {
  readonly device: Device;
  readonly config: KvCacheConfig;
  readonly native: NativeKvCache;
  /** The step that has begun last, unless it is over. */
  step: KvCacheStep | undefined;
}

/** Makes a step that the native cache has begun the current one of its owner. */
export let startStep: (owner: StepOwner, tokens: number) => KvCacheStep;

/**
 * New tokens for some of the sequences of a {@linkcode KvCache}, made by {@linkcode KvCache.begin}: every layer
 * appends their keys and values, then attends with their queries; or does both at once, by {@linkcode prefill}, for
 * any number of tokens.
 *
 * The tensors are row-major and hold the tokens of the step's first sequence, then those of its second, and so on.
 * Calls enqueue work and wait for nothing, so the buffers may be reused, or disposed, right away. Views must start at
 * a multiple of 16 bytes.
 *
 * Example: {@linkcode KvCache}.
 */
export class KvCacheStep {
  /** Tokens of the step, over all its sequences. */
  readonly tokens: number;
  readonly #owner: StepOwner;

  private constructor(owner: StepOwner, tokens: number) {
    this.#owner = owner;
    this.tokens = tokens;
  }

  static {
    startStep = (owner, tokens) => owner.step = new KvCacheStep(owner, tokens);
  }

  /**
   * Whether its time has passed: the next step has begun, a sequence was truncated or removed, or the cache was
   * disposed.
   */
  get isOver(): boolean {
    return this.#owner.step !== this || this.#owner.native.isClosed;
  }

  /**
   * Appends the step's tokens to a layer, once: keys (after rotary embedding) and values
   * `[tokens, kvHeads, headDim]` of the cache's dtype. Packs the blocks that are due.
   *
   * Throws `invalid-argument` for a layer that does not exist or has the tokens already, for a buffer of another
   * device, dtype, length or alignment, and once the step is over; `disposed`.
   */
  append(
    layer: number,
    keys: DeviceBuffer<KvCacheDType>,
    values: DeviceBuffer<KvCacheDType>,
  ): void {
    const { native, config } = this.#current("append");
    checkLayer(config, layer, "append");
    const tensor = (name: string, buffer: DeviceBuffer<KvCacheDType>) =>
      this.#tensor(`append: ${name}`, buffer, "kvHeads");
    native.append(layer, tensor("keys", keys), tensor("values", values));
  }

  /**
   * Attention of the step's tokens over their sequences: `out = softmax(scale * queries . keys) . values`, where a
   * token sees those before it and itself, as far as the layer's window reaches, and the sinks, and query head `h` reads kv head `floor(h * kvHeads / queryHeads)`.
   * `queries` and `out` are `[tokens, queryHeads, headDim]` of the cache's queryDType and must not overlap. A layer must
   * have been appended to before.
   *
   * Besides rounding `out` to its type, the relative error is within 1e-3 of exact attention over what packed tokens
   * are unpacked to, which is what {@linkcode KvCache.read} rounds to 16 bits. A sequence's results are the same, bit for bit, whatever else is in the step.
   *
   * Throws `unsupported` if the step has more than 8 tokens of a sequence, for which {@linkcode prefill} is; else as
   * {@linkcode append}.
   */
  attend(
    layer: number,
    queries: DeviceBuffer<KvQueryDType>,
    out: DeviceBuffer<KvQueryDType>,
    options: KvAttendOptions = {},
  ): void {
    const { native, config } = this.#current("attend");
    const { scale = 1 / Math.sqrt(config.headDim) } = options;
    checkLayer(config, layer, "attend");
    checkScale(scale, "attend");
    const from = this.#tensor("attend: queries", queries, "queryHeads");
    const to = this.#tensor("attend: out", out, "queryHeads");
    checkApart("attend", { queries: from }, to);
    native.attend(layer, from, to, scale);
  }

  /**
   * Which graphs are good for this step: those of steps whose shape is the same text. It tells how many sequences,
   * tokens, blocks to pack and pieces of attention the step has, which change slowly while sequences grow.
   *
   * Throws `invalid-argument` once the step is over, `disposed`.
   */
  get shape(): string {
    const [sequences, tokens, blocks, pieces, mostTokens, mostPieces] =
      this.#current("tell the shape").native.stepShape;
    return `${sequences} sequences of up to ${mostTokens} tokens, ${tokens} in all; ` +
      `${blocks} blocks to pack; up to ${mostPieces} pieces each, ${pieces} in all`;
  }

  /**
   * Captures what `enqueue` enqueues on the device as a CUDA graph, without running any of it: {@linkcode append},
   * {@linkcode attend} and {@linkcode prefill} of this step, {@linkcode DeviceBuffer.copyFrom},
   * {@linkcode DeviceBuffer.fill}, and whatever an engine enqueues on the device's stream. {@linkcode replay} then runs
   * it, in this step and in later ones of the same {@linkcode shape}, with one launch for all layers. New values go to
   * the same buffers before each replay.
   *
   * All other calls throw `invalid-argument` in `enqueue`, as they would wait, or allocate memory. What `enqueue` throws
   * ends the capture and is thrown again; the step goes on as if nothing had been called.
   *
   * Throws `unsupported` on the CPU and on CUDA's legacy default stream, `invalid-argument` once the step is over, while
   * an asynchronous call is in flight, and if `enqueue` is asynchronous; `disposed`; `cuda` if the work cannot be captured.
   *
   * @example
   * ```ts
   * import { Device, KvCache, type KvStepGraph } from "@packhorse/packhorse";
   *
   * using device = Device.open();
   * const shape = { layers: 2, queryHeads: 4, kvHeads: 2, headDim: 64, dtype: "f16" } as const;
   * const limits = { sequences: 1, tokens: 4096, stepTokens: 512, poolBytes: 2 ** 20 };
   * using cache = KvCache.create(device, { ...shape, ...limits });
   * const sequence = cache.add();
   * using keys = device.createBuffer("f16", 2 * 64);
   * using queries = device.createBuffer("f16", 4 * 64);
   * using out = device.createBuffer("f16", 4 * 64);
   *
   * using stack = new DisposableStack();
   * const graphs = new Map<string, KvStepGraph>();
   * for (let token = 0; token < 3; token++) {
   *   const step = cache.begin([{ sequence }]);
   *   keys.fill(token); // a model would compute these
   *   queries.fill(token);
   *   const decode = () => {
   *     for (let layer = 0; layer < shape.layers; layer++) {
   *       step.append(layer, keys, keys);
   *       step.attend(layer, queries, out);
   *     }
   *   };
   *   if (device.backend === "cpu") {
   *     decode();
   *   } else {
   *     const graph = graphs.get(step.shape) ?? stack.use(step.capture(decode));
   *     graphs.set(step.shape, graph);
   *     step.replay(graph);
   *   }
   * }
   * ```
   */
  capture(enqueue: () => void): KvStepGraph {
    const { native } = this.#current("capture");
    return captureGraph(native, this.shape, enqueue);
  }

  /**
   * Enqueues captured work for this step. The layers that it appends to have the step's tokens then.
   *
   * Throws `invalid-argument` if the step differs in its {@linkcode shape} from the captured one, for a graph of
   * another cache, if a layer has the tokens already or lacks those that are attended to, and once the step is over; then
   * nothing has changed. `disposed` if the graph, or the cache, was disposed.
   */
  replay(graph: KvStepGraph): void {
    const { native } = this.#current("replay");
    const captured = nativeOfGraph(graph);
    if (captured.device !== native.device) refuse("Cannot replay a graph of another device");
    native.replay(captured);
  }

  /**
   * Attention of any number of tokens per sequence, and their append, in one call instead of {@linkcode append} and
   * {@linkcode attend}: for prompts, or chunks of them. `keys` and `values` are as `append` takes them, `queries` and
   * `out` as `attend` does; `out` must overlap none of them.
   *
   * The tokens attend to what their sequences held before the step (sinks, recent tokens, packed blocks) and, causally,
   * to each other, both as far as the layer's window reaches, as they are in `keys` and `values`, in 16 bits whatever is packed of them afterwards. Then they are
   * appended: the cache holds the same, bit for bit, as after `append`. Errors are within those of `attend`, and a
   * sequence's results too are the same whatever else is in the step. A prompt may come in chunks of any size.
   *
   * Throws as {@linkcode append}, and `invalid-argument` for a scale that is not positive and finite.
   *
   * @example
   * ```ts
   * import { Device, KvCache } from "@packhorse/packhorse";
   * import { assert, assertEquals } from "@std/assert";
   *
   * using device = Device.open({ backend: "cpu" });
   * using cache = KvCache.create(device, {
   *   layers: 1,
   *   queryHeads: 2,
   *   kvHeads: 1,
   *   headDim: 64,
   *   dtype: "f16",
   *   sequences: 1,
   *   tokens: 1024,
   *   stepTokens: 256,
   *   poolBytes: 2 ** 20,
   * });
   * const sequence = cache.add();
   *
   * // A prompt of 512 tokens in two chunks.
   * using keys = device.createBuffer("f16", 256 * 64);
   * using values = device.createBuffer("f16", 256 * 64);
   * using queries = device.createBuffer("f16", 256 * 2 * 64);
   * using out = device.createBuffer("f16", 256 * 2 * 64);
   * queries.upload(new Float16Array(queries.length).fill(1));
   * for (const value of [1, 3]) {
   *   keys.upload(Float16Array.from({ length: keys.length }, (_, i) => Math.sin(i)));
   *   values.upload(new Float16Array(values.length).fill(value));
   *   cache.begin([{ sequence, tokens: 256 }]).prefill(0, { queries, keys, values, out });
   * }
   * // The first token of the second chunk saw the first chunk and itself, the last one all.
   * const result = out.download(new Float16Array(out.length));
   * assert(result[0]! > 1 && result[0]! < result.at(-1)! && result.at(-1)! < 3);
   * assertEquals(cache.length(sequence), 512);
   * ```
   */
  prefill(layer: number, tensors: KvPrefillTensors, options: KvAttendOptions = {}): void {
    const { native, config } = this.#current("prefill");
    const { scale = 1 / Math.sqrt(config.headDim) } = options;
    checkLayer(config, layer, "prefill");
    checkScale(scale, "prefill");
    const queries = this.#tensor("prefill: queries", tensors.queries, "queryHeads");
    const keys = this.#tensor("prefill: keys", tensors.keys, "kvHeads");
    const values = this.#tensor("prefill: values", tensors.values, "kvHeads");
    const out = this.#tensor("prefill: out", tensors.out, "queryHeads");
    checkApart("prefill", { queries, keys, values }, out);
    native.prefill(layer, { queries, keys, values, out }, scale);
  }

  #current(action: string): StepOwner {
    void this.#owner.native.handle; // throws once disposed
    if (this.isOver) {
      refuse(
        `Cannot ${action}: the step is over, as the next has begun or a sequence was truncated or removed`,
      );
    }
    return this.#owner;
  }

  #tensor(
    name: string,
    buffer: DeviceBuffer<KvQueryDType>,
    heads: "kvHeads" | "queryHeads",
  ): StepTensor {
    const { dtype, queryDType } = this.#owner.config;
    const tensor = cacheTensor(`Cannot ${name}`, buffer, {
      ...this.#owner,
      heads,
      tokens: this.tokens,
      dtype: heads === "kvHeads" ? dtype : queryDType,
    });
    return { ...tensor, byteLength: buffer.byteLength };
  }
}

/** Tensors of {@linkcode KvCacheStep.prefill}. */
export interface KvPrefillTensors {
  /** `[tokens, queryHeads, headDim]` of the cache's queryDType. */
  readonly queries: DeviceBuffer<KvQueryDType>;
  /** `[tokens, kvHeads, headDim]` of the cache's dtype, after rotary embedding. */
  readonly keys: DeviceBuffer<KvCacheDType>;
  /** `[tokens, kvHeads, headDim]` of the cache's dtype. */
  readonly values: DeviceBuffer<KvCacheDType>;
  /** Where the result goes: `[tokens, queryHeads, headDim]` of the cache's queryDType. */
  readonly out: DeviceBuffer<KvQueryDType>;
}

/** Options of {@linkcode KvCacheStep.attend}, {@linkcode KvCacheStep.prefill} and {@linkcode KvCache.score}. */
export interface KvAttendOptions {
  /** What products of queries and keys are multiplied by, a positive number. Default: `1 / sqrt(headDim)`. */
  readonly scale?: number | undefined;
}

/** Throws `invalid-argument` unless the cache has the layer. */
export function checkLayer({ layers }: KvCacheConfig, layer: number, action: string): void {
  if (Number.isInteger(layer) && layer >= 0 && layer < layers) return;
  refuse(`Cannot ${action}: layer must be an integer from 0 to ${layers - 1}, got ${layer}`);
}

/** Throws `invalid-argument` unless the scale is positive and finite as a float32. */
export function checkScale(scale: number, action: string): void {
  const single = typeof scale === "number" ? Math.fround(scale) : NaN;
  if (single > 0 && single < Infinity) return;
  refuse(`Cannot ${action}: scale must be positive and finite as a float32, got ${scale}`);
}

/** A tensor, and how many bytes it has. */
export type StepTensor = NativeTensor & { readonly byteLength: number };

/** Throws `invalid-argument` if a tensor shares bytes with the output. */
export function checkApart(
  action: string,
  read: Record<string, StepTensor>,
  out: StepTensor,
): void {
  for (const [name, tensor] of Object.entries(read)) {
    const apart = tensor.buffer !== out.buffer ||
      tensor.byteOffset + tensor.byteLength <= out.byteOffset ||
      out.byteOffset + out.byteLength <= tensor.byteOffset;
    if (apart) continue;
    refuse(
      `Cannot ${action}: ${name} and out overlap; they start at bytes ${tensor.byteOffset} and ` +
        `${out.byteOffset} of a buffer, and have ${tensor.byteLength} and ${out.byteLength}`,
    );
  }
}

/** The tensor `[tokens, heads, headDim]` that fills a buffer. Throws `invalid-argument` if it cannot, or `disposed`. */
export function cacheTensor(
  name: string,
  buffer: DeviceBuffer<KvQueryDType>,
  { device, config, heads, tokens, dtype = config.dtype }: {
    readonly device: Device;
    readonly config: KvCacheConfig;
    readonly heads: "kvHeads" | "queryHeads";
    readonly tokens: number;
    /** Default: that of keys and values. */
    readonly dtype?: KvQueryDType;
  },
): NativeTensor {
  const { headDim } = config;
  if (buffer.dtype !== dtype || buffer.length !== tokens * config[heads] * headDim) {
    refuse(
      `${name} must be [${tokens}, ${config[heads]}, ${headDim}] (tokens, ${heads}, headDim) of ` +
        `${dtype}; the buffer is ${buffer.length} elements of ${buffer.dtype}`,
    );
  }
  if (buffer.byteOffset % 16 !== 0) {
    refuse(`${name} must start at a multiple of 16 bytes, not at ${buffer.byteOffset}`);
  }
  return regionOn(buffer, device);
}

function refuse(message: string): never {
  throw new PackhorseError("invalid-argument", message);
}
