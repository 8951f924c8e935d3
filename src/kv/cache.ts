import { NativeKvCache } from "../../ffi/kv_cache.ts";
import { type Device, nativeOf } from "../device/device.ts";
import type { DeviceBuffer } from "../device/device_buffer.ts";
import { PackhorseError } from "../error.ts";
import {
  type KvCacheConfig,
  type KvCacheDType,
  type KvCacheOptions,
  nativeCacheConfig,
  resolveCacheOptions,
} from "./cache_options.ts";
import {
  cacheTensor,
  checkLayer,
  type KvAttendOptions,
  type KvCacheStep,
  startStep,
  type StepOwner,
} from "./cache_step.ts";
import { scoreTokens, weighTokens } from "./cache_products.ts";
import { type KvSequenceFileOptions, loadSequence, saveSequence } from "./sequence_file.ts";
import type { KvPair } from "./tensor.ts";

/** A sequence of a {@linkcode KvCache}, made by {@linkcode KvCache.add} or {@linkcode KvCache.fork}. */
export interface KvSequence {
  /** Its number in the cache, which messages name; given again once the sequence was removed. */
  readonly number: number;
}

/** What a step does to one sequence. */
export interface KvStepPart {
  /** Whom the tokens are for. */
  readonly sequence: KvSequence;
  /** How many tokens. Default: 1. */
  readonly tokens?: number | undefined;
}

/** Options of {@linkcode KvCache.read}. */
export interface KvReadOptions {
  /** The first token. Default: 0. */
  readonly first?: number | undefined;
  /** How many tokens, at least 1. Default: all from `first` on. */
  readonly count?: number | undefined;
}

/** What {@linkcode KvCache.statistics} counts: every byte that a cache has allocated, and what is in it. */
export interface KvCacheStatistics {
  /** All bytes of device memory: the sum of the next six. */
  readonly allocatedBytes: number;
  /** Pages for packed tokens. */
  readonly poolBytes: number;
  /** Tokens in 16 bits. */
  readonly recentBytes: number;
  /** Where records of packed tokens end. */
  readonly indexBytes: number;
  /** Where pages are. */
  readonly pageTableBytes: number;
  /** The plan of a step. */
  readonly stepBytes: number;
  /** Scratch of append and attend. */
  readonly workspaceBytes: number;
  /** Pages of the pool that no sequence holds. */
  readonly freeBytes: number;
  /** Records of all sequences; shared ones count once for each, those given back not. */
  readonly packedBytes: number;
  /** Sequences that there are. */
  readonly sequences: number;
  /** Tokens of all sequences. */
  readonly tokens: number;
  /** Of these, packed, whether the windows of all layers have left them or not. */
  readonly packedTokens: number;
}

/** Frees caches that were dropped without being disposed. */
const dropped = new FinalizationRegistry<NativeKvCache>((native) => native.close());

/**
 * The keys and values of a model's layers for many sequences that grow, fork and end; packed, in device memory of
 * fixed size, and read by attention as it is.
 *
 * The first `sinks` tokens of a sequence and its newest stay as they came, in 16 bits. As soon as `residual` tokens
 * would remain after it, a block of 64 tokens is packed (see {@linkcode KvCacheOptions}); results do not depend on how
 * many tokens come at a time. Tokens come in steps, for attention is planned once for all sequences and layers of a
 * step: {@linkcode begin} says which sequences get how many tokens, then every layer calls
 * {@linkcode KvCacheStep.append} and {@linkcode KvCacheStep.attend}, or, for prompts, {@linkcode KvCacheStep.prefill}.
 *
 * Layers may have a sliding window, beyond which tokens attend to the sinks only. Packed tokens outside are not read,
 * and {@linkcode begin} gives back their pages when the pool would not do otherwise.
 *
 * A cache allocates all its memory when it is created. {@linkcode begin} and the calls of a step enqueue work and wait
 * for nothing, except that `begin` may wait for the device when the pool is nearly full. One thread at a time may use
 * a cache. Every method throws `disposed` once the cache, or its device, was disposed, and `cuda` if the GPU fails.
 *
 * @example
 * ```ts
 * import { Device, KvCache } from "@packhorse/packhorse";
 * import { assert, assertEquals } from "@std/assert";
 *
 * using device = Device.open({ backend: "cpu" });
 * using cache = KvCache.create(device, {
 *   layers: 1,
 *   queryHeads: 4,
 *   kvHeads: 2,
 *   headDim: 64,
 *   dtype: "f16",
 *   sequences: 8,
 *   tokens: 4096,
 *   stepTokens: 512,
 *   poolBytes: 2 ** 20,
 *   codec: { keys: { quantizer: "packkv", rel: 0.1 }, values: { quantizer: "fixed", bits: 4 } },
 * });
 *
 * // A prompt of 300 tokens at once.
 * const sequence = cache.add();
 * const prompt = cache.begin([{ sequence, tokens: 300 }]);
 * using keys = device.createBuffer("f16", 300 * 2 * 64);
 * keys.upload(Float16Array.from({ length: keys.length }, (_, i) => Math.sin(i)));
 * prompt.append(0, keys, keys);
 *
 * // Then a token at a time. Here every value is 1 from now on, and attention sees mostly them.
 * const step = cache.begin([{ sequence }]);
 * const token = keys.view(0, 2 * 64);
 * token.upload(new Float16Array(2 * 64).fill(1));
 * step.append(0, token, token);
 * using queries = device.createBuffer("f16", 4 * 64);
 * queries.upload(new Float16Array(4 * 64).fill(1));
 * using out = device.createBuffer("f16", 4 * 64);
 * step.attend(0, queries, out);
 * const result = out.download(new Float16Array(4 * 64));
 * assert(result.every((value) => value > 0.8 && value <= 1));
 *
 * assertEquals(cache.length(sequence), 301);
 * const { packedTokens, packedBytes } = cache.statistics();
 * assertEquals(packedTokens, 128);
 * assert(packedBytes < 128 * 2 * 2 * 64 * 2 / 2);
 * ```
 */
export class KvCache implements Disposable {
  /** The device that holds the cache. */
  readonly device: Device;
  /** What it was created with. */
  readonly config: KvCacheConfig;
  readonly #native: NativeKvCache;
  /** What steps know of the cache. */
  readonly #owner: StepOwner;
  readonly #sequences = new Set<KvSequence>();
  /** Those that are being saved, once for each time. */
  readonly #saving: KvSequence[] = [];

  private constructor(device: Device, config: KvCacheConfig) {
    const bytes = nativeCacheConfig(config);
    this.device = device;
    this.config = config;
    this.#native = new NativeKvCache(nativeOf(device), bytes.config, bytes.codecs);
    this.#owner = { device, config, native: this.#native, step: undefined };
    dropped.register(this, this.#native, this);
  }

  /**
   * Creates a cache without sequences, and allocates all its memory.
   *
   * Throws `invalid-argument` for options outside their range, `out-of-memory`, `disposed`.
   */
  static create(device: Device, options: KvCacheOptions): KvCache {
    return new KvCache(device, resolveCacheOptions(options));
  }

  /** Whether the cache, or its device, was disposed. */
  get isDisposed(): boolean {
    return this.#native.isClosed;
  }

  /** How many sequences there are. Waits for nothing. Throws `disposed`. */
  get sequenceCount(): number {
    void this.#native.handle; // throws once disposed
    return this.#sequences.size;
  }

  /** Starts an empty sequence. Throws `out-of-memory` if the cache holds as many as it was created for. */
  add(): KvSequence {
    return this.#adopt(this.#native.add());
  }

  /**
   * Starts a sequence with the tokens of another. Both share packed tokens until they are cut, so that a fork takes
   * little of the pool. Waits for the device.
   *
   * Throws `invalid-argument` if there is no such sequence or a layer still lacks the tokens of the step that has
   * begun, `out-of-memory` if the pool, or the number of sequences, is exhausted; then nothing has changed.
   */
  fork(sequence: KvSequence): KvSequence {
    return this.#adopt(this.#native.fork(this.#numberOf(sequence, "fork")));
  }

  /**
   * Keeps the first `tokens` tokens of a sequence. Tokens of a packed block that is cut go back to 16 bits, with the
   * values that they were packed to. Waits for the device. Ends the current step.
   *
   * Throws as {@linkcode fork}, and `invalid-argument` if the sequence has fewer tokens, or its next token would attend
   * to tokens that were given back because a window had left them.
   */
  truncate(sequence: KvSequence, tokens: number): void {
    const number = this.#changing(sequence, "truncate");
    if (!isCount(tokens)) {
      refuse(`Cannot truncate sequence ${number}: tokens must be a count, got ${tokens}`);
    }
    this.#native.truncate(number, tokens);
    this.#owner.step = undefined;
  }

  /**
   * Ends a sequence and gives back its memory. Ends the current step.
   *
   * Throws `invalid-argument` if there is no such sequence or a layer still lacks the tokens of the step that has
   * begun.
   */
  remove(sequence: KvSequence): void {
    this.#native.remove(this.#changing(sequence, "remove"));
    this.#sequences.delete(sequence);
    this.#owner.step = undefined;
  }

  /** Tokens of a sequence, those of the current step included. Throws `invalid-argument` if there is no such sequence. */
  length(sequence: KvSequence): number {
    return this.#native.length(this.#numberOf(sequence, "measure"));
  }

  /**
   * Begins a step, in which each of the sequences gets tokens in every layer. The step before is over, and every layer
   * must have its tokens.
   *
   * Throws `invalid-argument` if there is no such sequence, if one is named twice or would get longer than the cache
   * was created for, if the step has more tokens than the cache was created for, or if a layer lacks the tokens of the
   * step before; `out-of-memory` if the pool might be exhausted, even without what windows have left. Then nothing has
   * changed, and the step before goes on.
   */
  begin(parts: readonly KvStepPart[]): KvCacheStep {
    if (parts.length === 0) refuse("Cannot begin a step without sequences");
    const sequences = Uint32Array.from(
      parts,
      ({ sequence }) => this.#changing(sequence, "begin a step with"),
    );
    const tokens = Uint32Array.from(parts, ({ tokens = 1, sequence: { number } }) => {
      if (Number.isInteger(tokens) && tokens >= 1 && tokens < 2 ** 32) return tokens;
      return refuse(
        `Cannot begin a step: tokens of sequence ${number} must be 1 or more, got ${tokens}`,
      );
    });
    this.#native.begin({ sequences, tokens });
    return startStep(this.#owner, tokens.reduce((total, count) => total + count, 0));
  }

  /**
   * Tokens of a sequence in one layer as attention sees them, rounded to the cache's dtype: keys and values
   * `[count, kvHeads, headDim]` in new buffers, which disposing the result frees. Enqueues the work; download the
   * buffers to look at the values.
   *
   * Throws `invalid-argument` for a layer, a sequence or tokens that do not exist, or no longer as the layer's window
   * has left them, and if the layer lacks the tokens of the current step; `out-of-memory`.
   */
  read(
    layer: number,
    sequence: KvSequence,
    options: KvReadOptions = {},
  ): KvPair<DeviceBuffer<KvCacheDType>> & Disposable {
    const { device, config } = this;
    checkLayer(config, layer, "read");
    const number = this.#numberOf(sequence, "read");
    const length = this.#native.length(number);
    const { first = 0, count = length - first } = options;
    if (!isCount(first) || !isCount(count) || count === 0 || first + count > length) {
      refuse(
        `Cannot read ${count} tokens from ${first} of sequence ${number}: it has ${length}, ` +
          "and at least 1 must be read",
      );
    }
    const { dtype, kvHeads, headDim } = config;
    using stack = new DisposableStack();
    const create = () => stack.use(device.createBuffer(dtype, count * kvHeads * headDim));
    const buffers = { keys: create(), values: create() };
    const tensor = (buffer: DeviceBuffer<KvCacheDType>) =>
      cacheTensor("Cannot read: it", buffer, { device, config, heads: "kvHeads", tokens: count });
    this.#native.read(layer, number, {
      first,
      count,
      keys: tensor(buffers.keys),
      values: tensor(buffers.values),
    });
    const owner = stack.move();
    return { ...buffers, [Symbol.dispose]: () => owner.dispose() };
  }

  /**
   * Products of queries with the keys of all tokens of a sequence in one layer, straight from packed memory:
   * `out[h, t] = scale * queries[h] . keys[t]`, without a mask, where query head `h` reads kv head
   * `floor(h * kvHeads / queryHeads)`. `queries` are `[queryHeads, headDim]` of the cache's dtype, `out` is
   * `[queryHeads, length]`; they must not overlap, and start at a multiple of 16 bytes. Enqueues the work.
   *
   * The relative error is within 1e-3 (L2) of exact products with what packed tokens are unpacked to; the same bits
   * every time.
   *
   * Throws `invalid-argument` for a layer or a sequence that does not exist, for a sequence without tokens, or some of
   * which are no longer there as the layer's window has left them, if the layer lacks the tokens of the current step,
   * for a buffer of another device, dtype, length or alignment, and for a scale that is not positive and finite.
   *
   * @example
   * ```ts
   * import { Device, KvCache } from "@packhorse/packhorse";
   * import { assertAlmostEquals } from "@std/assert";
   *
   * using device = Device.open({ backend: "cpu" });
   * const shape = { layers: 1, queryHeads: 2, kvHeads: 1, headDim: 64, dtype: "f16" } as const;
   * const limits = { sequences: 1, tokens: 1024, stepTokens: 512, poolBytes: 2 ** 20 };
   * using cache = KvCache.create(device, { ...shape, ...limits });
   * const sequence = cache.add();
   * using keys = device.createBuffer("f16", 300 * 64);
   * using values = device.createBuffer("f16", 300 * 64);
   * keys.upload(new Float16Array(keys.length).fill(0.5));
   * values.upload(new Float16Array(values.length).fill(2));
   * cache.begin([{ sequence, tokens: 300 }]).append(0, keys, values);
   *
   * using queries = device.createBuffer("f16", 2 * 64);
   * queries.upload(new Float16Array(queries.length).fill(1));
   * using scores = device.createBuffer("f32", 2 * 300);
   * cache.score(0, sequence, queries, scores, { scale: 0.25 });
   * assertAlmostEquals(scores.download(new Float32Array(600))[299]!, 0.25 * 64 * 0.5, 0.01);
   *
   * // What a softmax would make of them: here, equal weights.
   * using weights = device.createBuffer("f32", 2 * 300);
   * weights.upload(new Float32Array(weights.length).fill(1 / 300));
   * using out = device.createBuffer("f32", 2 * 64);
   * cache.weigh(0, sequence, weights, out);
   * assertAlmostEquals(out.download(new Float32Array(128))[0]!, 2, 0.01);
   * ```
   */
  score(
    layer: number,
    sequence: KvSequence,
    queries: DeviceBuffer<KvCacheDType>,
    out: DeviceBuffer<"f32">,
    options: KvAttendOptions = {},
  ): void {
    checkLayer(this.config, layer, "score");
    const number = this.#numberOf(sequence, "score");
    scoreTokens(this.#owner, { layer, sequence: number }, { queries, out }, options);
  }

  /**
   * Values of all tokens of a sequence in one layer, weighted and summed, straight from packed memory:
   * `out[h]` is the sum over `t` of `weights[h, t] * values[t]`. `weights` are `[queryHeads, length]`, finite and of any
   * sign; `out` is `[queryHeads, headDim]`. Otherwise as {@linkcode score}, which has an example.
   */
  weigh(
    layer: number,
    sequence: KvSequence,
    weights: DeviceBuffer<"f32">,
    out: DeviceBuffer<"f32">,
  ): void {
    checkLayer(this.config, layer, "weigh");
    const number = this.#numberOf(sequence, "weigh");
    weighTokens(this.#owner, { layer, sequence: number }, { weights, out });
  }

  /**
   * Saves a sequence to a `.phkv` file, from which {@linkcode load} restores it, bit for bit. Its records are written as
   * they are, layer by layer, so that little more than a layer's is in host memory at once; each wait for the device is
   * for one layer. The file appears complete or not at all, in place of one that may be there.
   *
   * Meanwhile the sequence can be read and forked, but begins no step, and is neither truncated nor removed; other
   * sequences go on.
   *
   * Throws `invalid-argument` if there is no such sequence, or a layer still lacks its tokens of the step that has
   * begun; `io` if the file cannot be written; the signal's reason.
   *
   * @example
   * ```ts
   * import { Device, KvCache } from "@packhorse/packhorse";
   * import { assertEquals } from "@std/assert";
   *
   * const path = `${await Deno.makeTempDir()}/prompt.phkv`;
   * using device = Device.open({ backend: "cpu" });
   * const shape = { layers: 1, queryHeads: 2, kvHeads: 1, headDim: 64, dtype: "f16" } as const;
   * const limits = { sequences: 2, tokens: 1024, stepTokens: 512, poolBytes: 2 ** 20 };
   * {
   *   using cache = KvCache.create(device, { ...shape, ...limits });
   *   const sequence = cache.add();
   *   using keys = device.createBuffer("f16", 300 * 64);
   *   keys.upload(Float16Array.from({ length: keys.length }, (_, i) => Math.sin(i)));
   *   cache.begin([{ sequence, tokens: 300 }]).append(0, keys, keys);
   *   await cache.save(sequence, path);
   * }
   *
   * // Later, in a cache of the same shape and codec, the prompt need not be computed again.
   * using cache = KvCache.create(device, { ...shape, ...limits, tokens: 4096 });
   * const sequence = await cache.load(path);
   * assertEquals(cache.length(sequence), 300);
   * assertEquals(cache.statistics().packedTokens, 128);
   * ```
   */
  async save(
    sequence: KvSequence,
    path: string,
    options: KvSequenceFileOptions = {},
  ): Promise<void> {
    const number = this.#numberOf(sequence, "save");
    this.#saving.push(sequence);
    try {
      const { config } = this;
      await saveSequence({ native: this.#native, config }, number, path, options);
    } finally {
      this.#saving.splice(this.#saving.indexOf(sequence), 1);
    }
  }

  /**
   * Starts a sequence with what {@linkcode save} wrote: the same tokens, packed where they were packed, so that reading
   * and attention give the same bits. The cache must have the same layers, kvHeads, headDim, dtype, codecs and sinks,
   * on any backend. Its residual may differ: with a larger one, packing pauses until that many tokens are there; a
   * smaller one must leave room for the newest tokens that the file has in 16 bits, fewer than `residual + 64`, for
   * packing them would change them.
   *
   * The file is untrusted, and checked to the last byte before the sequence is there. Whatever is thrown, the cache is
   * as it was. Pages are taken from the pool at the beginning; steps can go on meanwhile.
   *
   * Throws `not-found`, `io`, `newer-version`, `truncated` or `corrupt` if the file fails; `unsupported` for a file that
   * {@linkcode packKvFile} wrote; `invalid-argument` naming what differs if the sequence does not fit the cache, or is
   * longer than the cache was created for; `out-of-memory` if the pool, or the number of sequences, is exhausted; the
   * signal's reason.
   *
   * Example: {@linkcode save}.
   */
  async load(path: string, options: KvSequenceFileOptions = {}): Promise<KvSequence> {
    const { config } = this;
    void this.#native.handle; // throws once disposed
    return this.#adopt(await loadSequence({ native: this.#native, config }, path, options));
  }

  /**
   * Waits for the device, and throws `non-finite` if a token was packed with a NaN or an infinity since the last call:
   * the message names the first. Such a value counts as 0 from then on. (`raw16` keeps it, and is no reason to throw.)
   */
  check(): void {
    this.#native.check();
  }

  /**
   * Counts the bytes of the cache. Waits for the device.
   *
   * Throws `invalid-argument` if a layer still lacks the tokens of the step that has begun.
   */
  statistics(): KvCacheStatistics {
    const found = this.#native.statistics;
    const allocated = {
      poolBytes: found.pool_bytes,
      recentBytes: found.recent_bytes,
      indexBytes: found.index_bytes,
      pageTableBytes: found.page_table_bytes,
      stepBytes: found.step_bytes,
      workspaceBytes: found.workspace_bytes,
    };
    return {
      allocatedBytes: Object.values(allocated).reduce((sum, bytes) => sum + bytes, 0),
      ...allocated,
      freeBytes: found.free_bytes,
      packedBytes: found.packed_bytes,
      sequences: found.sequences,
      tokens: found.tokens,
      packedTokens: found.packed_tokens,
    };
  }

  /** Frees the memory, once the work enqueued so far is done. Does nothing the second time. */
  [Symbol.dispose](): void {
    dropped.unregister(this);
    this.#native.close();
  }

  #adopt(number: number): KvSequence {
    const sequence = Object.freeze({ number });
    this.#sequences.add(sequence);
    return sequence;
  }

  /** The number of a sequence that is to change. */
  #changing(sequence: KvSequence, action: string): number {
    const number = this.#numberOf(sequence, action);
    if (!this.#saving.includes(sequence)) return number;
    return refuse(
      `Cannot ${action} sequence ${number}: it is being saved; wait until save is done, or fork it`,
    );
  }

  /** The number of a sequence, if it is one of this cache. */
  #numberOf(sequence: KvSequence, action: string): number {
    void this.#native.handle; // throws once disposed
    if (this.#sequences.has(sequence)) return sequence.number;
    return refuse(
      `Cannot ${action} sequence ${sequence?.number}: it was removed, or is not of this cache`,
    );
  }
}

function isCount(value: number): boolean {
  return Number.isSafeInteger(value) && value >= 0;
}

function refuse(message: string): never {
  throw new PackhorseError("invalid-argument", message);
}
