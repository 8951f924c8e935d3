/**
 * Drawing tokens from logits, on a device. As the functions of `operations.ts`, these only enqueue, allocate nothing and
 * may be captured; they throw `invalid-argument` for a buffer of another device, type or length, and `disposed`.
 *
 * @module
 */
import * as native from "../../ffi/llm.ts";
import { LLM_SAMPLER } from "../../ffi/structs.ts";
import type { DeviceBuffer } from "../device/device_buffer.ts";
import { Call, type FloatBuffer, refuse } from "./operation_call.ts";
import type { LogitsOptions } from "./operations.ts";

/** How the tokens of a sequence are drawn. */
export interface SamplerOptions {
  /** What logits are divided by; 0 always takes the likeliest token. Default: 1. */
  readonly temperature?: number | undefined;
  /** Only so many of the likeliest tokens are drawn; 0: all. Default: 0. */
  readonly topK?: number | undefined;
  /** Only the likeliest tokens are drawn that reach this probability, above 0, together. Default: 1, all. */
  readonly topP?: number | undefined;
  /** Only tokens are drawn that have this share of the likeliest token's probability. Default: 0, all. */
  readonly minP?: number | undefined;
  /** What the logits of tokens that were seen are divided by, or multiplied where negative. Default: 1. */
  readonly repetitionPenalty?: number | undefined;
  /** Of the random numbers: an integer from 0 to 2^53 - 1. Default: 0. */
  readonly seed?: number | undefined;
  /** Which random number is next; {@linkcode sample} counts on. Default: 0. */
  readonly step?: number | undefined;
}

/** Bytes of a sampler on the device. */
export const SAMPLER_BYTES = LLM_SAMPLER.byteLength;

/**
 * Samplers as {@linkcode sample} takes them: {@linkcode SAMPLER_BYTES} each, to upload to a buffer of u8. Throws
 * `invalid-argument` for an option outside its range.
 */
export function encodeSamplers(samplers: readonly SamplerOptions[]): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(samplers.length * SAMPLER_BYTES);
  samplers.forEach((sampler, row) => bytes.set(encodeSampler(sampler), row * SAMPLER_BYTES));
  return bytes;
}

function encodeSampler(options: SamplerOptions): Uint8Array {
  const { temperature = 1, topK = 0, topP = 1, minP = 0, repetitionPenalty = 1 } = options;
  const { seed = 0, step = 0 } = options;
  const check = (name: string, isValid: boolean, range: string, value: number) => {
    if (!isValid) refuse(`Cannot sample: ${name} must be ${range}, got ${value}`);
  };
  const isCount = (value: number, most: number) =>
    Number.isSafeInteger(value) && value >= 0 && value <= most;
  const isFinite = (value: number) => Number.isFinite(Math.fround(value));
  const isPositive = (value: number) => isFinite(value) && Math.fround(value) > 0;
  check("temperature", isFinite(temperature) && temperature >= 0, "0 or more", temperature);
  check("topK", isCount(topK, 2 ** 32 - 1), "an integer of 0 or more", topK);
  check("topP", isPositive(topP) && topP <= 1, "above 0 and at most 1", topP);
  check("minP", minP >= 0 && minP <= 1, "from 0 to 1", minP);
  check("repetitionPenalty", isPositive(repetitionPenalty), "above 0", repetitionPenalty);
  check("seed", isCount(seed, Number.MAX_SAFE_INTEGER), "an integer from 0 to 2^53 - 1", seed);
  check("step", isCount(step, 2 ** 32 - 1), "an integer from 0 to 2^32 - 1", step);
  return LLM_SAMPLER.write({
    seed,
    step,
    top_k: topK,
    temperature,
    top_p: topP,
    min_p: minP,
    repetition_penalty: repetitionPenalty,
  });
}

/** Sizes and memory of {@linkcode sample}. */
export interface SampleOptions extends LogitsOptions {
  /** Which tokens a row has seen, not 0 for those: u8 `[rows, vocabulary]`. Default: none were, and none are marked. */
  readonly seen?: DeviceBuffer<"u8"> | undefined;
  /** Memory that is written over: `[rows, vocabulary]`. */
  readonly scratch: DeviceBuffer<"f32">;
}

/**
 * `out[row]` is a token drawn from `logits[row]` as the row's sampler ({@linkcode encodeSamplers}) says: its probability is
 * that of Hugging Face's processors in this order: repetition penalty, temperature, top-k, top-p, min-p. Tokens that are
 * equally likely stay or go together, and one that is 2^32 times less likely than the likeliest is never drawn.
 *
 * Random numbers are those of Philox4x32-10 for the sampler's seed and step; `packhorse.h` says how they choose a token,
 * which is the same on every backend for the same logits. The sampler's step is then counted on, and the token marked in
 * `seen`. NaN counts as -infinity; a row of nothing else gives -1.
 */
export function sample(
  logits: FloatBuffer,
  samplers: DeviceBuffer<"u8">,
  out: DeviceBuffer<"i32">,
  { rows, vocabulary, seen, scratch }: SampleOptions,
): void {
  const call = new Call("sample", logits.device, { rows, vocabulary });
  const shape = [rows, vocabulary];
  native.sample(call.device, {
    logits: { ...call.floats({ logits }, shape), rows, vocabulary },
    samplers: call.written(call.integers({ samplers }, [rows, SAMPLER_BYTES], "u8")),
    seen: seen && call.written(call.integers({ seen }, shape, "u8")),
    scratch: call.written(call.floats({ scratch }, shape, ["f32"])),
    out: call.written(call.integers({ out }, [rows])),
  });
}

/**
 * Marks tokens as seen in a row of {@linkcode SampleOptions.seen}, `[vocabulary]`: those of a prompt. Numbers that are no
 * token are left out.
 */
export function markTokens(tokens: DeviceBuffer<"i32">, seen: DeviceBuffer<"u8">): void {
  const [count, vocabulary] = [tokens.length, seen.length];
  const call = new Call("markTokens", tokens.device, { count, vocabulary });
  native.mark(call.device, {
    tokens: call.integers({ tokens }, [count]),
    count,
    seen: call.written(call.integers({ seen }, [vocabulary], "u8")),
    vocabulary,
  });
}
