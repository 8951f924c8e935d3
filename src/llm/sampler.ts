import type { DeviceBuffer } from "../device/device_buffer.ts";
import { PackhorseError } from "../error.ts";
import type { ModelParts } from "./language_model.ts";
import { argmax } from "./operations.ts";
import type { Sampling } from "./sampling.ts";

/** What a choice depends on besides logits. */
export interface SamplerRow {
  /** Which of the prompts it is for. */
  readonly prompt: number;
  /** Tokens of the prompt and its continuation so far. */
  readonly tokens: readonly number[];
  /** How many of these were chosen. */
  readonly chosen: number;
}

/** Chooses tokens on the device. */
export interface Sampler extends Disposable {
  /** The next token of each row of logits `[rows, vocabulary]`. */
  choose(logits: DeviceBuffer<"f32">, rows: readonly SamplerRow[]): Promise<readonly number[]>;
}

/** Makes a sampler for as many rows as the cache has sequences. */
export function createSampler(
  { device, config: { vocabulary }, cache }: ModelParts,
  sampling: Sampling,
): Sampler {
  if (sampling.temperature > 0 || sampling.repetitionPenalty !== 1) {
    throw new PackhorseError("unsupported", "Cannot sample yet");
  }
  const tokens = device.createBuffer("i32", cache.config.sequences);
  return {
    async choose(logits, rows) {
      const out = tokens.view(0, rows.length);
      argmax(logits, out, { rows: rows.length, vocabulary });
      const chosen = [...await out.downloadAsync()];
      const failed = chosen.indexOf(-1);
      if (failed >= 0) {
        const message = `Cannot choose a token of prompt ${
          rows[failed]!.prompt
        }: no logit is a number`;
        throw new PackhorseError("non-finite", message);
      }
      return chosen;
    },
    [Symbol.dispose]: () => tokens[Symbol.dispose](),
  };
}
