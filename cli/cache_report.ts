import { BLOCK_TOKENS } from "../src/kv/codec.ts";
import type { LanguageModel } from "../src/llm/mod.ts";

/** What says where a record of a block and head ends. */
const INDEX_BYTES = 4;

/** What the tokens in a cache take: records, where they end, and tokens in 16 bits. */
export function cacheReport(model: LanguageModel) {
  const { layers, kvHeads, headDim } = model.config;
  const { tokens, packedTokens, packedBytes, allocatedBytes } = model.cacheStatistics();
  const values = layers * 2 * kvHeads * headDim; // of a token
  const indexBytes = layers * kvHeads * packedTokens / BLOCK_TOKENS * INDEX_BYTES;
  const bytes = packedBytes + indexBytes + (tokens - packedTokens) * values * 2;
  return {
    tokens,
    packedTokens,
    bytes,
    raw16Bytes: tokens * values * 2,
    bitsPerValue: 8 * bytes / (tokens * values),
    allocatedBytes,
  };
}
