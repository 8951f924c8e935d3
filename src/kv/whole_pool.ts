import { planCache } from "../../ffi/kv_cache.ts";
import { type Device, nativeOf } from "../device/device.ts";
import { type KvCacheOptions, nativeCacheConfig, resolveCacheOptions } from "./cache_options.ts";
import { BLOCK_TOKENS } from "./codec.ts";

const PAGE_BYTES = 2 ** 16;

/** Options with a pool that holds all `tokens` of every sequence, whatever their values. Throws as {@linkcode KvCache.create}. */
export function withWholePool(
  device: Device,
  options: Omit<KvCacheOptions, "poolBytes">,
): KvCacheOptions {
  const config = resolveCacheOptions({ ...options, poolBytes: PAGE_BYTES });
  const { layers, sequences, tokens } = config;
  const { blockBytes } = planCache(nativeOf(device).library, {
    ...nativeCacheConfig(config),
    layers,
  });
  const blocks = Math.ceil(tokens / BLOCK_TOKENS);
  // A page more for where the last one is not full, and one for the unit that a stream leaves free.
  const poolBytes = blockBytes.reduce(
    (sum, { most }) => sum + sequences * (blocks * most + 2 * PAGE_BYTES),
    0,
  );
  return { ...options, poolBytes };
}
