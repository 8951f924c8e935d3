import { PackhorseError } from "../error.ts";

/** How the next token is chosen. Without `temperature`, or with 0, it is the likeliest one. */
export interface SamplingOptions {
  /** What logits are divided by; 0 for the likeliest token, whatever else is given. Default: 0. */
  readonly temperature?: number | undefined;
  /** Only so many of the likeliest tokens are chosen from; 0 for all. Default: 0. */
  readonly topK?: number | undefined;
  /** Only the likeliest tokens whose probabilities add up to this are chosen from, above 0 to 1. Default: 1. */
  readonly topP?: number | undefined;
  /** Only tokens at least this share as likely as the likeliest are chosen from, 0 to 1. Default: 0. */
  readonly minP?: number | undefined;
  /**
   * Logits of tokens that the sequence has already are divided by this if above 0, else multiplied, above 0. Default: 1.
   */
  readonly repetitionPenalty?: number | undefined;
  /** What random choices follow from: the same for the same seed, prompt and options. Default: 0. */
  readonly seed?: number | undefined;
}

/** {@linkcode SamplingOptions} with every default filled in. */
export type Sampling = Required<{ [Name in keyof SamplingOptions]: number }>;

/** Checks options and fills in the defaults. Throws `invalid-argument`. */
export function resolveSampling(options: SamplingOptions): Sampling {
  const { temperature = 0, topK = 0, topP = 1, minP = 0, repetitionPenalty = 1, seed = 0 } =
    options;
  const within = (name: string, value: number, holds: boolean, range: string) => {
    if (typeof value === "number" && Number.isFinite(value) && holds) return;
    const message = `Cannot generate: ${name} must be ${range}, got ${value}`;
    throw new PackhorseError("invalid-argument", message);
  };
  within("temperature", temperature, temperature >= 0, "0 or more");
  within("topK", topK, Number.isSafeInteger(topK) && topK >= 0, "a count of tokens, 0 for all");
  within("topP", topP, topP > 0 && topP <= 1, "above 0 to 1");
  within("minP", minP, minP >= 0 && minP <= 1, "0 to 1");
  within("repetitionPenalty", repetitionPenalty, repetitionPenalty > 0, "above 0");
  within("seed", seed, Number.isSafeInteger(seed) && seed >= 0, "an integer of 0 or more");
  return { temperature, topK, topP, minP, repetitionPenalty, seed };
}
