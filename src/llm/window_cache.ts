import { KvCache } from "../kv/cache.ts";
import type { KvCacheCodec, KvCacheOptions } from "../kv/cache_options.ts";
import { poolBytesFor } from "../kv/pool_bytes.ts";
import type { ModelParts } from "./language_model.ts";

/** Keys and values as they are. */
export const RAW16: KvCacheCodec = {
  keys: { quantizer: "raw16" },
  values: { quantizer: "raw16" },
};

/** A cache for one sequence of a model, beside the model's own. */
export function createWindowCache(
  { device, config, cache }: ModelParts,
  codec: KvCacheCodec,
  limits: Pick<KvCacheOptions, "tokens" | "stepTokens" | "residual" | "sinks">,
): KvCache {
  const { layers, queryHeads, kvHeads, headDim, windows: window } = config;
  const { dtype, queryDType } = cache.config;
  const { tokens, stepTokens, residual, sinks = 0 } = limits;
  const options = {
    ...{ layers, queryHeads, kvHeads, headDim, dtype, queryDType, window, codec },
    ...{ sequences: 1, tokens, stepTokens, residual, sinks },
  };
  return KvCache.create(device, { ...options, poolBytes: poolBytesFor(device, options) });
}
