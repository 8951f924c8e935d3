import { parseCacheCodec } from "../src/kv/cache_codec.ts";
import type { SamplingOptions } from "../src/llm/mod.ts";
import type { NamedCacheCodec } from "./options.ts";

/** Options of the commands that let a model write. */
export interface GenerationCommandOptions {
  model: string;
  maxTokens: number;
  context?: number | undefined;
  temperature: number;
  topK: number;
  topP: number;
  minP: number;
  repetitionPenalty: number;
  seed: number;
  kv?: NamedCacheCodec | undefined;
  residual: number;
}

const PACKKV = "packkv:k=0.1,v=0.2";
/** The codec unless one is given. */
export const DEFAULT_CODEC: NamedCacheCodec = { kv: PACKKV, codec: parseCacheCodec(PACKKV) };

/** How tokens are drawn. */
export function samplingOf(options: GenerationCommandOptions): SamplingOptions {
  const { temperature, topK, topP, minP, repetitionPenalty, seed } = options;
  return { temperature, topK, topP, minP, repetitionPenalty, seed };
}
