import type { Device } from "../device/device.ts";
import type { KvCacheOptions } from "../kv/cache_options.ts";
import { planKvCache } from "../kv/plan_cache.ts";

/** {@linkcode KvCacheOptions} that are not about the pool. */
export type PoollessOptions = Omit<KvCacheOptions, "poolBytes">;

/**
 * Bytes for the packed tokens of a cache whose sequences all have `context` tokens, even if these need as many bits as the
 * codec can take.
 */
export function poolBytesFor(
  device: Device,
  options: PoollessOptions,
  context = options.tokens,
): number {
  const { codec, residual, sinks, stepTokens, sequences: batch } = options;
  const { layers, queryHeads, kvHeads, headDim, dtype } = options;
  const codecs = isList(codec) ? codec : [codec];
  return Math.max(...codecs.map((each) =>
    planKvCache({
      ...{ residual, sinks, stepTokens, batch, context },
      model: { layers, queryHeads, kvHeads, headDim, dtype },
      memoryBytes: 2 ** 50,
      weightBytes: 0,
      codec: each,
      widths: { keys: 8, values: 8 }, // the most that packkv can take
      backend: device.backend,
    }).options.poolBytes
  ));
}

/** `Array.isArray` for lists that are readonly. */
function isList<T>(value: T | readonly T[]): value is readonly T[] {
  return Array.isArray(value);
}
