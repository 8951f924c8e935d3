import { DTYPE, KV_CACHE_QUANTIZER } from "../../ffi/enums.ts";
import { KV_CACHE_CODEC, KV_CACHE_CONFIG } from "../../ffi/structs.ts";
import { PackhorseError } from "../error.ts";
import { type KvDType, type KvPair, PARTS } from "./tensor.ts";

/** Type of the tokens of a {@linkcode KvCache}. */
export type KvCacheDType = Extract<KvDType, "f16" | "bf16">;

/** Type of the queries and outputs of attention over a {@linkcode KvCache}. */
export type KvQueryDType = KvDType;

/**
 * How the keys, or the values, of packed tokens are stored: as codes, integers times a scale, or as they are.
 *
 * - `packkv` (arXiv 2512.24449): a token's scale, shared by all its heads and channels, is `rel` times its range, `rel`
 *   from 1/254 to 1. A value is off by at most half the scale, and takes the bits that its neighbours need.
 * - `fixed`: a token's scale is its range by `2^bits - 1`, `bits` from 1 to 8. Every value takes `bits` bits.
 * - `kivi` (arXiv 2402.02750): the range by `2^bits - 1`, too, but of one channel over the block's 64 tokens for keys,
 *   and of 64 channels of a token and head for values. Every value takes `bits` bits, and every scale 32.
 * - `raw16`: values stay as they are, in 16 bits, even those that are not finite.
 *
 * @example
 * ```ts
 * import { Device, KvCache, type KvCacheCodec } from "@packhorse/packhorse";
 * import { assertEquals } from "@std/assert";
 *
 * const codec: KvCacheCodec = {
 *   keys: { quantizer: "raw16" },
 *   values: { quantizer: "kivi", bits: 2 },
 * };
 * using device = Device.open({ backend: "cpu" });
 * using cache = KvCache.create(device, {
 *   layers: 1,
 *   queryHeads: 1,
 *   kvHeads: 1,
 *   headDim: 64,
 *   dtype: "f16",
 *   sequences: 1,
 *   tokens: 1024,
 *   stepTokens: 256,
 *   poolBytes: 2 ** 20,
 *   sinks: 0,
 *   codec,
 * });
 * const sequence = cache.add();
 * const step = cache.begin([{ sequence, tokens: 256 }]);
 * using tokens = device.createBuffer("f16", 256 * 64);
 * tokens.upload(Float16Array.from({ length: tokens.length }, (_, i) => Math.sin(i)));
 * step.append(0, tokens, tokens);
 *
 * using read = cache.read(0, sequence);
 * assertEquals(read.keys.download(), tokens.download());
 * // Of each value 16 and 2 bits, of each token a scale and a zero point, and 16 bytes for each block of 64.
 * const { packedTokens, packedBytes } = cache.statistics();
 * assertEquals([packedTokens, packedBytes], [128, 128 * (64 * 18 / 8 + 4) + 2 * 16]);
 * ```
 */
export type KvCachePartCodec =
  | { readonly quantizer: "packkv"; readonly rel: number }
  | { readonly quantizer: "fixed"; readonly bits: number }
  | { readonly quantizer: "kivi"; readonly bits: number }
  | { readonly quantizer: "raw16" };

/** How the packed tokens of a layer are stored. */
export type KvCacheCodec = KvPair<KvCachePartCodec>;

/** Options of {@linkcode KvCache.create}. */
export interface KvCacheOptions {
  /** Layers of the model, 1 to 4096. */
  readonly layers: number;
  /** Heads of the queries: 1 to 16 times `kvHeads`. */
  readonly queryHeads: number;
  /** Heads of the keys and values, 1 to 1024. */
  readonly kvHeads: number;
  /** Channels of a head: 64, 96, 128 or 256. */
  readonly headDim: number;
  /** Type of keys and values. */
  readonly dtype: KvCacheDType;
  /** Type of the queries and outputs of attention: that of the keys, or on the CPU `f32`. Default: `dtype`. */
  readonly queryDType?: KvQueryDType | undefined;
  /** Most sequences at once, 1 to 65,536. */
  readonly sequences: number;
  /** Most tokens of a sequence, 1 to 2^31 - 1. */
  readonly tokens: number;
  /** Most tokens of a step, over all its sequences, 1 to 2^31 - 1. Scratch memory grows with it. */
  readonly stepTokens: number;
  /**
   * Into how many pieces attention cuts a sequence at least, as far as each then has 1,024 tokens, 1 to 1024. By its
   * length alone it has a piece for 9,216 tokens, or if longer than 36,864 for 4,032, which suits batches that fill a GPU.
   * Fewer sequences are up to three times as fast with as many as {@linkcode splitsToFill} says; lengths that differ much,
   * with 4. Results depend on it by rounding, and on nothing else in the batch. Default: 1.
   */
  readonly splits?: number | undefined;
  /** Bytes for packed tokens, at least 65,536, in whole pages of that size. */
  readonly poolBytes: number;
  /** How many of the newest tokens at least stay in 16 bits, 8 to 65,536. Default: 128. */
  readonly residual?: number | undefined;
  /**
   * How many of the first tokens stay in 16 bits, 0 to 65,536. Default: 4, as models put much of their attention on
   * the very first tokens.
   */
  readonly sinks?: number | undefined;
  /**
   * How tokens are packed: one codec for all layers, or one per layer. Default: `packkv` with `rel` 0.1 for the keys
   * and 0.2 for the values.
   */
  readonly codec?: KvCacheCodec | readonly KvCacheCodec[] | undefined;
  /**
   * Sliding windows: how many tokens a token attends to, itself included, beside the sinks; 0 for all before it. One for
   * all layers, or one per layer. Tokens that a window has left make room in the pool when it runs short. Default: 0.
   */
  readonly window?: number | readonly number[] | undefined;
}

/** {@linkcode KvCacheOptions} with every default filled in. */
export interface KvCacheConfig extends Required<Omit<KvCacheOptions, "codec" | "window">> {
  /** Type of the queries and outputs of attention. */
  readonly queryDType: KvQueryDType;
  /** How many of the newest tokens at least stay in 16 bits. */
  readonly residual: number;
  /** How many of the first tokens stay in 16 bits. */
  readonly sinks: number;
  /** Into how many pieces attention cuts a sequence at least. */
  readonly splits: number;
  /** How tokens are packed, per layer. */
  readonly codecs: readonly KvCacheCodec[];
  /** How many tokens a token attends to beside the sinks, per layer; 0 for all. */
  readonly windows: readonly number[];
}

const DEFAULT_CODEC: KvCacheCodec = {
  keys: { quantizer: "packkv", rel: 0.1 },
  values: { quantizer: "packkv", rel: 0.2 },
};

const PAGE_BYTES = 65_536;
const MOST_SPLITS = 1024;
/** Pieces of all sequences and kv heads that keep a GPU busy: about two for each multiprocessor. */
const BUSY_PIECES = 256;
/** The fewest newest tokens that stay in 16 bits. */
export const LEAST_RESIDUAL = 8;
/** Most query heads that share a kv head. */
export const MOST_GROUP = 16;
/** Channels that a head may have. */
export const CACHE_HEAD_DIMS: readonly number[] = [64, 96, 128, 256];
const DTYPES: readonly unknown[] = ["f16", "bf16"];

/** Checks options and fills in the defaults. Throws `invalid-argument`. */
export function resolveCacheOptions(options: KvCacheOptions): KvCacheConfig {
  const { layers, queryHeads, kvHeads, headDim, dtype, sequences, tokens, stepTokens, poolBytes } =
    options;
  const { queryDType = dtype, residual = 128, sinks = 4, codec = DEFAULT_CODEC, window = 0 } =
    options;
  const { splits = 1 } = options;
  const within = (name: string, value: number, least: number, most: number) => {
    if (Number.isSafeInteger(value) && value >= least && value <= most) return;
    refuse(`${name} must be an integer from ${least} to ${most}, got ${value}`);
  };
  within("layers", layers, 1, 4096);
  within("kvHeads", kvHeads, 1, 1024);
  within("queryHeads", queryHeads, kvHeads, MOST_GROUP * kvHeads);
  if (queryHeads % kvHeads !== 0) {
    refuse(`queryHeads must be a multiple of the ${kvHeads} kvHeads, got ${queryHeads}`);
  }
  if (!CACHE_HEAD_DIMS.includes(headDim)) {
    refuse(`headDim must be 64, 96, 128 or 256, got ${headDim}`);
  }
  if (!DTYPES.includes(dtype)) refuse(`dtype must be f16 or bf16, got ${dtype}`);
  if (queryDType !== dtype && queryDType !== "f32") {
    refuse(`queryDType must be the dtype, ${dtype}, or f32, got ${queryDType}`);
  }
  within("sequences", sequences, 1, 65_536);
  within("tokens", tokens, 1, 2 ** 31 - 1);
  within("stepTokens", stepTokens, 1, 2 ** 31 - 1);
  within("splits", splits, 1, MOST_SPLITS);
  within("poolBytes", poolBytes, PAGE_BYTES, 2 ** 48 - PAGE_BYTES - 1);
  within("residual", residual, LEAST_RESIDUAL, 65_536);
  within("sinks", sinks, 0, 65_536);
  const codecs = isList(codec) ? [...codec] : Array.from({ length: layers }, () => codec);
  if (codecs.length !== layers) {
    refuse(`codec must be one for all layers or a list of ${layers}, got ${codecs.length}`);
  }
  const windows = isList(window) ? [...window] : Array.from({ length: layers }, () => window);
  if (windows.length !== layers) {
    refuse(`window must be one for all layers or a list of ${layers}, got ${windows.length}`);
  }
  windows.forEach((each, layer) => within(`window of layer ${layer}`, each, 0, 2 ** 31 - 1));
  codecs.forEach((each, layer) => PARTS.forEach((part) => checkPart(each[part], layer, part)));
  const shape = { layers, queryHeads, kvHeads, headDim, dtype, queryDType };
  const limits = { sequences, tokens, stepTokens, splits, poolBytes };
  return { ...shape, ...limits, residual, sinks, codecs, windows };
}

/**
 * The least {@linkcode KvCacheOptions.splits} with which attention keeps a GPU busy where a step has so many sequences.
 *
 * @example
 * ```ts
 * import { splitsToFill } from "@packhorse/packhorse";
 * import { assertEquals } from "@std/assert";
 *
 * assertEquals(splitsToFill({ sequences: 1, kvHeads: 8 }), 32);
 * assertEquals(splitsToFill({ sequences: 64, kvHeads: 8 }), 1);
 * ```
 */
export function splitsToFill(
  { sequences, kvHeads }: Pick<KvCacheOptions, "sequences" | "kvHeads">,
): number {
  return Math.min(Math.ceil(BUSY_PIECES / (sequences * kvHeads)), MOST_SPLITS);
}

/** The configuration and the codecs as the native library takes them. */
export function nativeCacheConfig(config: KvCacheConfig): {
  config: Uint8Array<ArrayBuffer>;
  codecs: Uint8Array<ArrayBuffer>;
} {
  const codecs = new Uint8Array(config.codecs.length * KV_CACHE_CODEC.byteLength);
  config.codecs.forEach((codec, layer) =>
    codecs.set(nativeCodec(codec, config.windows[layer]!), layer * KV_CACHE_CODEC.byteLength)
  );
  const bytes = KV_CACHE_CONFIG.write({
    layers: config.layers,
    query_heads: config.queryHeads,
    kv_heads: config.kvHeads,
    head_dim: config.headDim,
    dtype: DTYPE[config.dtype],
    query_dtype: DTYPE[config.queryDType],
    sequences: config.sequences,
    residual: config.residual,
    sinks: config.sinks,
    splits: config.splits,
    tokens: config.tokens,
    step_tokens: config.stepTokens,
    pool_bytes: config.poolBytes,
  });
  return { config: bytes, codecs };
}

function nativeCodec({ keys, values }: KvCacheCodec, window: number): Uint8Array {
  const bits = (part: KvCachePartCodec) =>
    part.quantizer === "fixed" || part.quantizer === "kivi" ? part.bits : 0;
  const rel = (part: KvCachePartCodec) => part.quantizer === "packkv" ? part.rel : 0;
  return KV_CACHE_CODEC.write({
    key_quantizer: KV_CACHE_QUANTIZER[keys.quantizer],
    value_quantizer: KV_CACHE_QUANTIZER[values.quantizer],
    key_bits: bits(keys),
    value_bits: bits(values),
    key_rel: rel(keys),
    value_rel: rel(values),
    window,
  });
}

function checkPart(codec: KvCachePartCodec, layer: number, part: string): void {
  const where = `of the ${part} of layer ${layer}`;
  if (codec?.quantizer === "packkv") {
    const { rel } = codec;
    if (typeof rel === "number" && rel >= 1 / 254 && rel <= 1) return;
    refuse(`rel ${where} must be a number from 1/254 to 1, got ${rel}`);
  }
  if (codec?.quantizer === "raw16") return;
  if (codec?.quantizer === "fixed" || codec?.quantizer === "kivi") {
    const { bits } = codec;
    if (Number.isInteger(bits) && bits >= 1 && bits <= 8) return;
    refuse(`bits ${where} must be an integer from 1 to 8, got ${bits}`);
  }
  const { quantizer } = (codec ?? {}) as { quantizer?: unknown };
  refuse(`quantizer ${where} must be packkv, fixed, kivi or raw16, got ${quantizer}`);
}

/** `Array.isArray` for lists that are readonly. */
function isList<T>(value: T | readonly T[]): value is readonly T[] {
  return Array.isArray(value);
}

function refuse(reason: string): never {
  throw new PackhorseError("invalid-argument", `Cannot create the kv cache: ${reason}`);
}
