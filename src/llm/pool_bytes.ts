import type { Device } from "../device/device.ts";
import type { KvCacheOptions } from "../kv/cache_options.ts";
import { planKvCache } from "../kv/plan_cache.ts";

/** {@linkcode KvCacheOptions} that are not about the pool. */
export type PoollessOptions = Omit<KvCacheOptions, "poolBytes">;

/** What {@linkcode poolBytesFor} assumes. */
export interface PoolBytesOptions {
  /** Tokens of each sequence. Default: the most that the cache takes. */
  readonly context?: number | undefined;
  /** Bits that a packed value of `packkv` takes, with its share of scales and tables. Default: the most that it can take. */
  readonly bitsPerValue?: number | undefined;
}

/** Bytes for the packed tokens of a cache whose sequences all have so many tokens. */
export function poolBytesFor(
  device: Device,
  options: PoollessOptions,
  { context = options.tokens, bitsPerValue }: PoolBytesOptions = {},
): number {
  const { codec, residual, sinks, stepTokens, sequences: batch } = options;
  const { layers, queryHeads, kvHeads, headDim, dtype } = options;
  const codecs = isList(codec) ? codec : [codec];
  const packed = bitsPerValue === undefined
    ? { widths: { keys: 8, values: 8 } } // the most that packkv can take
    : { bitsPerValue };
  return Math.max(...codecs.map((each) =>
    planKvCache({
      ...{ residual, sinks, stepTokens, batch, context },
      model: { layers, queryHeads, kvHeads, headDim, dtype },
      memoryBytes: 2 ** 50,
      weightBytes: 0,
      codec: each,
      ...packed,
      backend: device.backend,
    }).options.poolBytes
  ));
}

/** `Array.isArray` for lists that are readonly. */
function isList<T>(value: T | readonly T[]): value is readonly T[] {
  return Array.isArray(value);
}
