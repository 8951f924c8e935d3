import type { KvCacheStatistics } from "../kv/cache.ts";
import { BLOCK_TOKENS } from "../kv/codec.ts";

/** What says where a record of a block and head ends. */
export const INDEX_BYTES = 4;

/** What the tokens in a cache take, in all layers: records, where they end, and tokens in 16 bits. */
export function bytesOfTokens(
  { layers, kvHeads, headDim }: { layers: number; kvHeads: number; headDim: number },
  { tokens, packedTokens, packedBytes }: KvCacheStatistics,
): { bytes: number; values: number } {
  const values = layers * 2 * kvHeads * headDim; // of a token
  const indexBytes = layers * kvHeads * packedTokens / BLOCK_TOKENS * INDEX_BYTES;
  return {
    bytes: packedBytes + indexBytes + (tokens - packedTokens) * values * 2,
    values: tokens * values,
  };
}
