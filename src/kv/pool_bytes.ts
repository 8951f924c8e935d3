import { planCache } from "../../ffi/kv_cache.ts";
import { type Device, nativeOf } from "../device/device.ts";
import { type KvCacheOptions, nativeCacheConfig, resolveCacheOptions } from "./cache_options.ts";
import { BLOCK_TOKENS } from "./codec.ts";
import { planKvCache } from "./plan_cache.ts";

/** {@linkcode KvCacheOptions} that are not about the pool. */
export type PoollessOptions = Omit<KvCacheOptions, "poolBytes">;

/** What {@linkcode poolBytesFor} assumes. */
export interface PoolBytesOptions {
  /** Tokens of each sequence. Default: the most that the cache takes. */
  readonly context?: number | undefined;
  /** Bits that a packed value of `packkv` takes, with its share of scales and tables. Default: the most that it can take. */
  readonly bitsPerValue?: number | undefined;
}

const PAGE_BYTES = 2 ** 16;

/** Bytes of a pool for the packed tokens of a cache whose sequences all have so many. Throws as {@linkcode KvCache.create}. */
export function poolBytesFor(
  device: Device,
  options: PoollessOptions,
  { context = options.tokens, bitsPerValue }: PoolBytesOptions = {},
): number {
  if (bitsPerValue !== undefined) return expectedBytes(device, options, context, bitsPerValue);
  const config = resolveCacheOptions({ ...options, poolBytes: PAGE_BYTES });
  const { layers, sequences } = config;
  const { blockBytes } = planCache(nativeOf(device).library, {
    ...nativeCacheConfig(config),
    layers,
  });
  const blocks = Math.ceil(context / BLOCK_TOKENS);
  // A page more for where the last one is not full, and one for the unit that a stream leaves free.
  return blockBytes.reduce(
    (sum, { most }) => sum + sequences * (blocks * most + 2 * PAGE_BYTES),
    0,
  );
}

/** Options with a pool that holds all `tokens` of every sequence, whatever their values. Throws as {@linkcode KvCache.create}. */
export function withWholePool(device: Device, options: PoollessOptions): KvCacheOptions {
  return { ...options, poolBytes: poolBytesFor(device, options) };
}

/** For values of `packkv` that take so many bits: as much as the codec that needs the most needs in every layer. */
function expectedBytes(
  device: Device,
  options: PoollessOptions,
  context: number,
  bitsPerValue: number,
): number {
  const { codec, residual, sinks, stepTokens, sequences: batch } = options;
  const { layers, queryHeads, kvHeads, headDim, dtype } = options;
  const codecs = isList(codec) ? codec : [codec];
  return Math.max(...codecs.map((each) =>
    planKvCache({
      ...{ residual, sinks, stepTokens, batch, context, bitsPerValue },
      model: { layers, queryHeads, kvHeads, headDim, dtype },
      memoryBytes: 2 ** 50,
      weightBytes: 0,
      codec: each,
      backend: device.backend,
    }).options.poolBytes
  ));
}

/** `Array.isArray` for lists that are readonly. */
function isList<T>(value: T | readonly T[]): value is readonly T[] {
  return Array.isArray(value);
}
