import { bytesOfTokens } from "../src/llm/cache_bytes.ts";
import type { LanguageModel } from "../src/llm/mod.ts";

/** What the tokens in a model's cache take. */
export function cacheReport(model: LanguageModel) {
  const statistics = model.cacheStatistics();
  const { tokens, packedTokens, allocatedBytes } = statistics;
  const { bytes, values } = bytesOfTokens(model.config, statistics);
  return {
    tokens,
    packedTokens,
    bytes,
    raw16Bytes: 2 * values,
    bitsPerValue: 8 * bytes / values,
    allocatedBytes,
  };
}
