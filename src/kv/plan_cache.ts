import { planCache } from "../../ffi/kv_cache.ts";
import { type Library, loadLibrary } from "../../ffi/library.ts";
import { type Backend, chooseBackend } from "../device/backend.ts";
import { PackhorseError } from "../error.ts";
import {
  type KvCacheCodec,
  type KvCacheConfig,
  type KvCacheOptions,
  nativeCacheConfig,
  resolveCacheOptions,
  splitsToFill,
} from "./cache_options.ts";
import { BLOCK_TOKENS } from "./codec.ts";
import type { KvModel } from "./model_config.ts";
import type { KvPair } from "./tensor.ts";

/** Options of {@linkcode planKvCache}. */
export interface KvCachePlanOptions {
  /** The model's layers, heads and type, as {@linkcode readModelConfig} reads them. */
  readonly model: Pick<KvModel, "layers" | "queryHeads" | "kvHeads" | "headDim" | "dtype">;
  /** Bytes of device memory for weights and cache. What else needs memory, as activations and the driver do, is not of it. */
  readonly memoryBytes: number;
  /** Bytes that the weights take of it. */
  readonly weightBytes: number;
  /** Sequences at once. Default: 1. */
  readonly batch?: number | undefined;
  /** Tokens of each sequence to plan for. Default: as many as fit. */
  readonly context?: number | undefined;
  /** As {@linkcode KvCacheOptions.residual}. */
  readonly residual?: number | undefined;
  /** As {@linkcode KvCacheOptions.sinks}. */
  readonly sinks?: number | undefined;
  /** As {@linkcode KvCacheOptions.stepTokens}; at least `batch`. Default: 2048, or `batch` if that is more. */
  readonly stepTokens?: number | undefined;
  /** How tokens are packed. Default: as {@linkcode KvCacheOptions.codec}. */
  readonly codec?: KvCacheCodec | undefined;
  /**
   * Mean widths of what `packkv` packs, which depend on the data: {@linkcode measureKvCacheWidths} measures them. Not
   * used for other codecs.
   */
  readonly widths?: KvPair<number> | undefined;
  /** Instead of `widths`: bits that a packed key or value takes on average, with its share of scales and tables. */
  readonly bitsPerValue?: number | undefined;
  /** Bytes that the device reads per second, to predict times. */
  readonly bytesPerSecond?: number | undefined;
  /** Whose scratch memory to count, as {@linkcode DeviceOptions.backend}. Needs its library, but no GPU. */
  readonly backend?: Backend | "auto" | undefined;
}

/** Where the memory goes: the sum of all is what was given. */
export interface KvCachePlanBytes {
  /** The model's weights. */
  readonly weights: number;
  /** Packed keys, with their share of scales and tables. */
  readonly packedKeys: number;
  /** Packed values likewise. */
  readonly packedValues: number;
  /** Pages of the pool beyond that: ends of pages, and what a step may need until its true sizes are known. */
  readonly reserve: number;
  /** Tokens in 16 bits: the first and the newest of each sequence. */
  readonly recent: number;
  /** Where records of packed tokens end. */
  readonly index: number;
  /** Where pages are. */
  readonly pageTables: number;
  /** The plan of a step. */
  readonly step: number;
  /** Scratch of append and attend. */
  readonly workspace: number;
  /** What is left; below zero what is missing, for a context that does not fit. */
  readonly free: number;
}

/** How long a token takes at least, as every byte that a step reads comes from memory once. */
export interface KvCachePlanTime {
  /** Seconds for a step, which gives every sequence a token: weights, packed records and tokens in 16 bits. */
  readonly secondsPerStep: number;
  /** The same with all tokens in 16 bits, as if they fitted. */
  readonly raw16SecondsPerStep: number;
  /** How many times faster than in 16 bits. */
  readonly speedup: number;
}

/** What {@linkcode planKvCache} finds. */
export interface KvCachePlan {
  /** Most tokens of each sequence that fit. */
  readonly maxContext: number;
  /** Tokens of each sequence that the rest is about. */
  readonly context: number;
  /** Whether that many fit. */
  readonly fits: boolean;
  /** For {@linkcode KvCache.create}: the cache that was planned. */
  readonly options: KvCacheOptions;
  /** Whose scratch memory was counted. */
  readonly backend: Backend;
  /** Where the memory goes. */
  readonly bytes: KvCachePlanBytes;
  /** Bits per key or value of all tokens, every byte of the cache counted. */
  readonly bitsPerValue: number;
  /** Bits per packed key and value, with their share of scales and tables. */
  readonly packedBitsPerValue: KvPair<number>;
  /** How long a token takes, if `bytesPerSecond` was given. */
  readonly time: KvCachePlanTime | undefined;
}

const PAGE_BYTES = 65_536;
/** The unit of offsets in a stream of records; its first is left free. */
const UNIT_BYTES = 16;
const MOST_UNITS = 2 ** 31;
const MOST_TOKENS = 2 ** 31 - 1;
const MOST_MEMORY = 2 ** 50;

/** A codec of constant size, beside which the parts of another can be told apart. */
const PLAIN = { quantizer: "fixed", bits: 1 } as const;

/**
 * Plans a cache for a memory: the longest context that fits, where the bytes go, and how long a token takes. Allocates
 * nothing and needs no GPU. Sizes are those that {@linkcode KvCache.create} allocates for `options` of the result.
 *
 * A cache with that configuration holds `batch` sequences of `context` tokens; with `packkv` only if packed tokens
 * take no more bits than was assumed.
 *
 * Throws `invalid-argument` for options outside their range, or without `widths` and `bitsPerValue` for a codec that
 * needs one of them; `out-of-memory` if not even one token fits; `library-missing`.
 *
 * @example
 * ```ts
 * import { planKvCache, readModelConfig } from "@packhorse/packhorse/kv";
 * import { assert, assertEquals } from "@std/assert";
 *
 * const model = await readModelConfig("tests/fixtures/configs/llama-3.1-8b.json");
 * const plan = planKvCache({
 *   model,
 *   memoryBytes: 24 * 2 ** 30,
 *   weightBytes: 16 * 2 ** 30,
 *   codec: { keys: { quantizer: "fixed", bits: 4 }, values: { quantizer: "fixed", bits: 4 } },
 *   bytesPerSecond: 4e12,
 *   backend: "cpu",
 * });
 * assert(plan.maxContext > 200_000); // in 16 bits it would be 65,536
 * assert(plan.bitsPerValue > 4 && plan.bitsPerValue < 4.3);
 * assert(plan.time!.speedup > 1);
 * assertEquals(Object.values(plan.bytes).reduce((sum, bytes) => sum + bytes), 24 * 2 ** 30);
 * ```
 */
export function planKvCache(options: KvCachePlanOptions): KvCachePlan {
  const planner = new Planner(options);
  const maxContext = planner.findMaxContext();
  const { context = maxContext } = options;
  if (!(Number.isInteger(context) && context >= 1)) {
    refuse(`context must be an integer of 1 or more, got ${context}`);
  }
  return { maxContext, fits: context <= maxContext, ...planner.planFor(context) };
}

class Planner {
  readonly #options: KvCachePlanOptions;
  readonly #batch: number;
  readonly #stepTokens: number;
  readonly #backend: Backend;
  readonly #library: Library;
  /** Bytes of a packed block, over all kv heads: as expected of each part, and at most. */
  readonly #block: { readonly keys: number; readonly values: number; readonly most: number };

  constructor(options: KvCachePlanOptions) {
    const { batch = 1 } = options;
    const { stepTokens = Math.max(2048, batch), bytesPerSecond = 1 } = options;
    this.#options = options;
    this.#batch = batch;
    this.#stepTokens = stepTokens;
    for (const name of ["memoryBytes", "weightBytes"] as const) {
      const bytes = options[name];
      if (Number.isInteger(bytes) && bytes >= 0 && bytes <= MOST_MEMORY) continue;
      refuse(`${name} must be an integer from 0 to 2^50, got ${bytes}`);
    }
    if (stepTokens < batch) {
      refuse(`stepTokens must be at least the batch of ${batch}, got ${stepTokens}`);
    }
    if (!(bytesPerSecond > 0 && bytesPerSecond < Infinity)) {
      refuse(`bytesPerSecond must be a positive number, got ${bytesPerSecond}`);
    }
    this.#backend = chooseBackend(options.backend);
    this.#library = loadLibrary(this.#backend);
    this.#block = this.#expectBlock();
  }

  /** The most tokens that fit. Memory grows with them, so bisection finds it. */
  findMaxContext(): number {
    const mostBlocks = Math.floor((MOST_UNITS - 2) / (this.#block.most / UNIT_BYTES));
    let [fitting, failing] = [0, Math.min(MOST_TOKENS, (mostBlocks + 1) * BLOCK_TOKENS - 1) + 1];
    while (failing - fitting > 1) {
      const middle = Math.floor((fitting + failing) / 2);
      if (this.#fits(middle)) fitting = middle;
      else failing = middle;
    }
    if (fitting > 0) return fitting;
    const { memoryBytes, weightBytes } = this.#options;
    const cache = this.#sizesFor(1).total;
    throw new PackhorseError(
      "out-of-memory",
      `Cannot plan the kv cache: ${memoryBytes} bytes of memory do not hold ${weightBytes} of weights and ` +
        `at least ${cache} of a cache for ${this.#batch} sequences and steps of ${this.#stepTokens} tokens`,
    );
  }

  planFor(context: number): Omit<KvCachePlan, "maxContext" | "fits"> {
    const { memoryBytes, weightBytes, bytesPerSecond, model } = this.#options;
    const { config, native, blocks, poolBytes, total } = this.#sizesFor(context);
    const streams = config.layers * this.#batch;
    const { keys, values } = this.#block;
    const packed = {
      keys: Math.round(streams * blocks * keys),
      values: Math.round(streams * blocks * values),
    };
    const values16 = 2 * streams * config.kvHeads * config.headDim; // of a token of each sequence
    const { statistics } = native;
    const partValues = BLOCK_TOKENS * config.kvHeads * config.headDim;
    const seconds = (cacheBytes: number) => (weightBytes + cacheBytes) / (bytesPerSecond ?? 1);
    const secondsPerStep = seconds(
      packed.keys + packed.values + 2 * values16 * (context - blocks * BLOCK_TOKENS),
    );
    const raw16SecondsPerStep = seconds(2 * values16 * context);
    const { codec } = this.#options;
    return {
      context,
      options: {
        layers: model.layers,
        queryHeads: model.queryHeads,
        kvHeads: model.kvHeads,
        headDim: model.headDim,
        dtype: model.dtype,
        sequences: this.#batch,
        tokens: context,
        stepTokens: this.#stepTokens,
        splits: config.splits,
        poolBytes,
        residual: config.residual,
        sinks: config.sinks,
        ...(codec === undefined ? {} : { codec }),
      },
      backend: this.#backend,
      bytes: {
        weights: weightBytes,
        packedKeys: packed.keys,
        packedValues: packed.values,
        reserve: poolBytes - packed.keys - packed.values,
        recent: statistics.recent_bytes,
        index: statistics.index_bytes,
        pageTables: statistics.page_table_bytes,
        step: statistics.step_bytes,
        workspace: statistics.workspace_bytes,
        free: memoryBytes - weightBytes - total,
      },
      bitsPerValue: 8 * total / (values16 * context),
      packedBitsPerValue: { keys: 8 * keys / partValues, values: 8 * values / partValues },
      time: bytesPerSecond === undefined ? undefined : {
        secondsPerStep,
        raw16SecondsPerStep,
        speedup: raw16SecondsPerStep / secondsPerStep,
      },
    };
  }

  #fits(tokens: number): boolean {
    const { memoryBytes, weightBytes } = this.#options;
    try {
      return this.#sizesFor(tokens).total <= memoryBytes - weightBytes;
    } catch (error) {
      // A part of it would take more bytes than can be counted.
      if (error instanceof PackhorseError && error.code === "out-of-memory") return false;
      throw error;
    }
  }

  /** What a cache for so many tokens of each sequence allocates. */
  #sizesFor(tokens: number) {
    const { config, native } = this.#nativePlan(tokens, this.#options.codec);
    const kept = config.sinks + config.residual;
    const blocks = tokens <= kept ? 0 : Math.floor((tokens - kept) / BLOCK_TOKENS);
    const poolBytes = PAGE_BYTES * Math.max(1, this.#poolPages(config, blocks));
    const { statistics } = native;
    const total = poolBytes + statistics.recent_bytes + statistics.index_bytes +
      statistics.page_table_bytes + statistics.step_bytes + statistics.workspace_bytes;
    return { config, native, blocks, poolBytes, total };
  }

  /**
   * Pages that hold `blocks` blocks of every sequence and layer, however the steps were cut. Until a step is over its
   * records count with the most that they can take, which matters where they take less.
   */
  #poolPages({ layers }: KvCacheConfig, blocks: number): number {
    if (blocks === 0) return 0;
    const { keys, values, most } = this.#block;
    const expected = keys + values;
    const streamPages = Math.ceil((UNIT_BYTES + blocks * expected) / PAGE_BYTES);
    const pages = layers * this.#batch * streamPages;
    if (expected >= most) return pages;
    const stepBlocks = Math.floor(this.#stepTokens / BLOCK_TOKENS) + this.#batch;
    const surplus = Math.min(stepBlocks, blocks * this.#batch) * (most - expected);
    return pages + layers * (Math.ceil(surplus / PAGE_BYTES) + this.#batch);
  }

  /** Expected bytes of a block: what it takes in any case, and what the widths of its values add. */
  #expectBlock(): { keys: number; values: number; most: number } {
    const { model, codec, widths, bitsPerValue } = this.#options;
    const { least, most } = this.#blockBytes(codec);
    const partValues = BLOCK_TOKENS * model.kvHeads * model.headDim;
    const leastKeys = least * this.#shareOfKeys(codec);
    if (least === most) return { keys: leastKeys, values: least - leastKeys, most };
    const bits = (bytes: number) => 8 * bytes / (2 * partValues);
    if (bitsPerValue !== undefined) {
      if (!(bitsPerValue >= bits(least) && bitsPerValue <= bits(most))) {
        refuse(
          `bitsPerValue must be from ${bits(least).toFixed(4)} to ${bits(most).toFixed(4)}, ` +
            `which is what the codec can take here, got ${bitsPerValue}`,
        );
      }
      const half = bitsPerValue * partValues / 8;
      return { keys: half, values: half, most };
    }
    if (widths === undefined) {
      return refuse(
        "packkv takes the bits that the data needs: give widths, as measureKvCacheWidths finds them, " +
          "or bitsPerValue",
      );
    }
    const payload = (width: number, part: string) => {
      if (width >= 0 && width <= 8) return width * partValues / 8;
      return refuse(`widths of the ${part} must be from 0 to 8, got ${width}`);
    };
    const keys = leastKeys + payload(widths.keys, "keys");
    const values = least - leastKeys + payload(widths.values, "values");
    return { keys, values, most: Math.max(most, keys + values) };
  }

  /** What share of a block is the keys', without widths that depend on the data. */
  #shareOfKeys(codec: KvCacheCodec | undefined): number {
    if (codec === undefined) return 1 / 2;
    // Beside a plain part, of which two are alike. What parts share may not add up.
    const plain = this.#blockBytes({ keys: PLAIN, values: PLAIN }).least / 2;
    const keys = this.#blockBytes({ keys: codec.keys, values: PLAIN }).least - plain;
    const values = this.#blockBytes({ keys: PLAIN, values: codec.values }).least - plain;
    return keys / (keys + values);
  }

  #blockBytes(codec: KvCacheCodec | undefined): { least: number; most: number } {
    return this.#nativePlan(1, codec).native.blockBytes[0]!;
  }

  #nativePlan(tokens: number, codec: KvCacheCodec | undefined) {
    const { model, residual, sinks } = this.#options;
    const config = resolveCacheOptions({
      layers: model.layers,
      queryHeads: model.queryHeads,
      kvHeads: model.kvHeads,
      headDim: model.headDim,
      dtype: model.dtype,
      sequences: this.#batch,
      tokens,
      stepTokens: this.#stepTokens,
      splits: splitsToFill({ sequences: this.#batch, kvHeads: model.kvHeads }),
      poolBytes: PAGE_BYTES,
      residual,
      sinks,
      codec,
    });
    const native = planCache(this.#library, {
      ...nativeCacheConfig(config),
      layers: config.layers,
    });
    return { config, native };
  }
}

function refuse(reason: string): never {
  throw new PackhorseError("invalid-argument", `Cannot plan the kv cache: ${reason}`);
}
