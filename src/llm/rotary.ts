import type { JsonFields } from "../io/json_fields.ts";
import { PackhorseError } from "../error.ts";

/** How a model turns queries and keys with their position, and how that is stretched for long contexts. */
export interface RotaryConfig {
  /** Channels of a head that turn, the first ones, in pairs `i` and `i + dim / 2`. */
  readonly dim: number;
  /** Base of the wavelengths. */
  readonly theta: number;
  /** How the frequencies are stretched. */
  readonly scaling: RotaryScaling;
}

/** How frequencies are stretched beyond the context that a model was first trained for. */
export type RotaryScaling =
  | { readonly type: "default" }
  | { readonly type: "linear"; readonly factor: number }
  | { readonly type: "dynamic"; readonly factor: number; readonly originalTokens: number }
  | {
    readonly type: "llama3";
    readonly factor: number;
    readonly lowFrequencyFactor: number;
    readonly highFrequencyFactor: number;
    readonly originalTokens: number;
  }
  | {
    readonly type: "yarn";
    readonly factor: number;
    readonly betaFast: number;
    readonly betaSlow: number;
    readonly attentionFactor: number;
    readonly truncate: boolean;
    readonly originalTokens: number;
  }
  | {
    readonly type: "longrope";
    readonly shortFactors: readonly number[];
    readonly longFactors: readonly number[];
    readonly attentionFactor: number;
    readonly originalTokens: number;
  };

/** Frequencies of a {@linkcode RotaryConfig}. */
export interface RotaryFrequencies {
  /** Radians per token of each pair, `[dim / 2]`. */
  readonly frequencies: Float64Array<ArrayBuffer>;
  /** What turned channels are multiplied by. */
  readonly scale: number;
}

/**
 * Frequencies for sequences of up to `tokens` tokens, in double precision.
 *
 * Two kinds of scaling change them with the length of a sequence. Keys that are in the cache cannot be turned again, so
 * that frequencies must not change while a sequence grows: `longrope` uses its long factors, and `dynamic` the base for
 * `tokens`, for all sequences if these may get longer than the model's original context.
 */
export function rotaryFrequencies(
  { dim, theta, scaling }: RotaryConfig,
  tokens: number,
): RotaryFrequencies {
  const pairs = dim / 2;
  const plain = (base: number) =>
    Float64Array.from({ length: pairs }, (_, i) => base ** (-2 * i / dim));
  const frequencies = plain(theta);
  switch (scaling.type) {
    case "default":
      return { frequencies, scale: 1 };
    case "linear":
      return { frequencies: frequencies.map((each) => each / scaling.factor), scale: 1 };
    case "dynamic": {
      const { factor, originalTokens } = scaling;
      const length = Math.max(tokens, originalTokens);
      const stretch = factor * length / originalTokens - (factor - 1);
      return { frequencies: plain(theta * stretch ** (dim / (dim - 2))), scale: 1 };
    }
    case "llama3": {
      const { factor, lowFrequencyFactor, highFrequencyFactor, originalTokens } = scaling;
      const stretch = (frequency: number) => {
        const turns = originalTokens * frequency / (2 * Math.PI);
        if (turns < lowFrequencyFactor) return frequency / factor;
        if (turns > highFrequencyFactor) return frequency;
        const smooth = (turns - lowFrequencyFactor) / (highFrequencyFactor - lowFrequencyFactor);
        return (1 - smooth) * frequency / factor + smooth * frequency;
      };
      return { frequencies: frequencies.map(stretch), scale: 1 };
    }
    case "yarn": {
      const { factor, betaFast, betaSlow, truncate, originalTokens, attentionFactor } = scaling;
      // The pair that turns so many times within the original context.
      const pairOf = (turns: number) =>
        dim * Math.log(originalTokens / (turns * 2 * Math.PI)) / (2 * Math.log(theta));
      const bounds = [pairOf(betaFast), pairOf(betaSlow)] as const;
      const low = Math.max(truncate ? Math.floor(bounds[0]) : bounds[0], 0);
      const high = Math.min(truncate ? Math.ceil(bounds[1]) : bounds[1], dim - 1);
      const span = high === low ? 0.001 : high - low;
      const stretch = (frequency: number, i: number) => {
        const ramp = Math.min(1, Math.max(0, (i - low) / span));
        return ramp * frequency / factor + (1 - ramp) * frequency;
      };
      return { frequencies: frequencies.map(stretch), scale: attentionFactor };
    }
    case "longrope": {
      const { shortFactors, longFactors, originalTokens, attentionFactor } = scaling;
      const factors = tokens > originalTokens ? longFactors : shortFactors;
      const stretch = (frequency: number, i: number) => frequency / factors[i]!;
      return { frequencies: frequencies.map(stretch), scale: attentionFactor };
    }
  }
}

/**
 * The rotary fields of a model's configuration: `rope_theta`, `rope_scaling` and `partial_rotary_factor`, or all of
 * them in `rope_parameters`, as newer files have it.
 *
 * Throws `corrupt` for fields outside their range, `unsupported` for a type that is not known.
 */
export function parseRotary(
  config: JsonFields,
  { headDim, path, fields }: {
    readonly headDim: number;
    readonly path: string;
    /** Makes a reader of the nested object, whose messages name it. */
    readonly fields: (name: string) => JsonFields | undefined;
  },
): RotaryConfig {
  const parameters = fields("rope_parameters");
  const scaling = parameters ?? fields("rope_scaling");
  const of = (name: string) => parameters?.has(name) ? parameters : config;
  const theta = of("rope_theta").positive("rope_theta", 10_000);
  const share = of("partial_rotary_factor").positive("partial_rotary_factor", 1);
  // As transformers rounds, down.
  const dim = Math.floor(headDim * share);
  if (dim < 2 || dim % 2 !== 0 || dim > headDim) {
    config.refuse(
      `partial_rotary_factor ${share} of ${headDim} channels is ${dim}, not an even number of them`,
    );
  }
  return { dim, theta, scaling: parseScaling(scaling, { config, dim, path }) };
}

function parseScaling(
  scaling: JsonFields | undefined,
  { config, dim, path }: { config: JsonFields; dim: number; path: string },
): RotaryScaling {
  if (scaling === undefined) return { type: "default" };
  const type = scaling.word("rope_type") ?? scaling.word("type") ?? "default";
  const contextLimit = () => config.count("max_position_embeddings", 2 ** 40);
  const own = (instead?: () => number) =>
    scaling.count("original_max_position_embeddings", 2 ** 40, instead);
  switch (type) {
    case "default":
      return { type };
    case "linear":
      return { type, factor: scaling.positive("factor") };
    case "dynamic":
      return {
        type,
        factor: scaling.positive("factor"),
        originalTokens: own(contextLimit),
      };
    case "llama3":
      return {
        type,
        factor: scaling.positive("factor"),
        lowFrequencyFactor: scaling.positive("low_freq_factor"),
        highFrequencyFactor: scaling.positive("high_freq_factor"),
        originalTokens: own(),
      };
    case "yarn": {
      const factor = scaling.positive("factor");
      const scaleFor = (weight: number) => factor <= 1 ? 1 : 0.1 * weight * Math.log(factor) + 1;
      const both = scaling.has("mscale") && scaling.has("mscale_all_dim");
      const attentionFactor = both
        ? scaleFor(scaling.positive("mscale")) / scaleFor(scaling.positive("mscale_all_dim"))
        : scaleFor(1);
      return {
        type,
        factor,
        betaFast: scaling.positive("beta_fast", 32),
        betaSlow: scaling.positive("beta_slow", 1),
        attentionFactor: scaling.positive("attention_factor", attentionFactor),
        truncate: scaling.flag("truncate", true),
        originalTokens: own(contextLimit),
      };
    }
    case "su":
    case "longrope": {
      const originalTokens = own(() =>
        config.count("original_max_position_embeddings", 2 ** 40, contextLimit)
      );
      const stretched = contextLimit() / originalTokens;
      const factor = stretched > 1 || !scaling.has("factor")
        ? stretched
        : scaling.positive("factor");
      const attentionFactor = factor <= 1
        ? 1
        : Math.sqrt(1 + Math.log(factor) / Math.log(originalTokens));
      return {
        type: "longrope",
        shortFactors: scaling.positives("short_factor", dim / 2),
        longFactors: scaling.positives("long_factor", dim / 2),
        attentionFactor: scaling.positive("attention_factor", attentionFactor),
        originalTokens,
      };
    }
    default:
      throw new PackhorseError(
        "unsupported",
        `Cannot run the model of ${path}: its rope_scaling is of type ${JSON.stringify(type)}, ` +
          "none of default, linear, dynamic, llama3, yarn, longrope",
      );
  }
}
