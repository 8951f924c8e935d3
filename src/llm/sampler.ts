import type { DeviceBuffer } from "../device/device_buffer.ts";
import { Readback } from "../device/readback.ts";
import { PackhorseError } from "../error.ts";
import type { ModelParts } from "./language_model.ts";
import { argmax } from "./operations.ts";
import {
  encodeSamplers,
  markTokens,
  sample,
  SAMPLER_BYTES,
  type SamplerOptions,
} from "./sample_logits.ts";

/** How the next token is chosen. Without a `temperature`, or with 0, it is the likeliest one. */
export interface SamplingOptions {
  /** What logits are divided by; 0 for the likeliest token. Default: 0. */
  readonly temperature?: number | undefined;
  /** Only so many of the likeliest tokens are drawn; 0 for all. Default: 0. */
  readonly topK?: number | undefined;
  /** Only the likeliest tokens are drawn that reach this probability together, above 0 to 1. Default: 1, all. */
  readonly topP?: number | undefined;
  /** Only tokens are drawn that have this share of the likeliest token's probability, 0 to 1. Default: 0, all. */
  readonly minP?: number | undefined;
  /**
   * What the logits of tokens are divided by that the prompt or the continuation has already, or multiplied where they
   * are negative; above 0. Default: 1.
   */
  readonly repetitionPenalty?: number | undefined;
  /**
   * What random choices follow from, an integer of 0 or more: the same seed and options give the same continuation. Of
   * several prompts, prompt `i` has the seed `seed + i`. Default: 0.
   */
  readonly seed?: number | undefined;
}

/** What a choice depends on besides logits. */
export interface SamplerRow {
  /** Which of the prompts it is for. */
  readonly prompt: number;
  /** Tokens of the prompt and its continuation so far. */
  readonly tokens: readonly number[];
  /** How many of these were chosen. */
  readonly chosen: number;
}

/** Tokens that are being chosen. */
export interface Choice {
  /** Where they are on the device, until the next choice. */
  readonly tokens: DeviceBuffer<"i32">;
  /**
   * Those of some of the rows, in their order, once they are there: waits for no work that was enqueued after it. To be
   * called before the next choice but one.
   *
   * Throws `non-finite` if none of such a row's logits is a number.
   */
  read(rows: readonly SamplerRow[]): Promise<readonly number[]>;
}

/** Which tokens each row has. */
interface SeenTokens {
  /** `[rows, vocabulary]`. */
  readonly all: DeviceBuffer<"u8">;
  /** `[vocabulary]`, to fill a row, which may start at any byte. */
  readonly one: DeviceBuffer<"u8">;
  /** Where a row's tokens are uploaded. */
  readonly tokens: DeviceBuffer<"i32">;
}

/** Chooses the next tokens of sequences, on the device. */
export class Sampler implements Disposable {
  readonly #vocabulary: number;
  readonly #options: SamplerOptions;
  readonly #out: DeviceBuffer<"i32">;
  /** Of this choice and the one before, in turn. */
  readonly #readbacks: [Readback<"i32">, Readback<"i32">];
  /** What drawing takes; without it, the likeliest token is chosen. */
  readonly #drawing: {
    readonly samplers: DeviceBuffer<"u8">;
    readonly scratch: DeviceBuffer<"f32">;
    readonly seen: SeenTokens | undefined;
  } | undefined;
  readonly #stack: DisposableStack;
  /** Whom the device's samplers are for. */
  #rows: readonly SamplerRow[] = [];

  /** For as many rows as the cache has sequences. Throws `invalid-argument` for options outside their range. */
  constructor({ device, config, cache }: ModelParts, options: SamplingOptions) {
    const { temperature = 0, repetitionPenalty = 1, topK, topP, minP, seed } = options;
    this.#options = { temperature, repetitionPenalty, topK, topP, minP, seed };
    encodeSamplers([this.#options]); // checks them
    const { vocabulary } = config;
    const { sequences, tokens } = cache.config;
    this.#vocabulary = vocabulary;
    using stack = new DisposableStack();
    const chosen = { dtype: "i32", length: sequences } as const;
    this.#out = stack.use(device.createBuffer("i32", sequences));
    this.#readbacks = [
      stack.use(new Readback(device, chosen)),
      stack.use(new Readback(device, chosen)),
    ];
    if (temperature > 0 || repetitionPenalty !== 1) {
      this.#drawing = {
        samplers: stack.use(device.createBuffer("u8", sequences * SAMPLER_BYTES)),
        scratch: stack.use(device.createBuffer("f32", sequences * vocabulary)),
        seen: repetitionPenalty === 1 ? undefined : {
          all: stack.use(device.createBuffer("u8", sequences * vocabulary)),
          one: stack.use(device.createBuffer("u8", vocabulary)),
          tokens: stack.use(device.createBuffer("i32", tokens)),
        },
      };
    }
    this.#stack = stack.move();
  }

  /**
   * Enqueues choosing the next token of each row of logits `[rows, vocabulary]`. Rows that are those of the choice before
   * go on from it, whether their latest tokens are known yet or not.
   */
  choose(logits: DeviceBuffer<"f32">, rows: readonly SamplerRow[]): Choice {
    const size = { rows: rows.length, vocabulary: this.#vocabulary };
    const out = this.#out.view(0, rows.length);
    if (this.#drawing === undefined) {
      argmax(logits, out, size);
    } else {
      this.#prepare(rows);
      const { samplers, scratch, seen } = this.#drawing;
      sample(logits, samplers.view(0, rows.length * SAMPLER_BYTES), out, {
        ...size,
        scratch: scratch.view(0, rows.length * this.#vocabulary),
        seen: seen?.all.view(0, rows.length * this.#vocabulary),
      });
    }
    this.#readbacks.reverse();
    const [readback] = this.#readbacks;
    readback.enqueue(out);
    return {
      tokens: out,
      read: async (some) => {
        const tokens = await readback.wait();
        let at = 0;
        return some.map((row) => {
          at = rows.indexOf(row, at);
          return requireToken(tokens[at]!, row);
        });
      },
    };
  }

  /** Frees its memory. */
  [Symbol.dispose](): void {
    this.#stack.dispose();
  }

  /** Brings the device's samplers in line with the rows, unless they are: they count on by themselves. */
  #prepare(rows: readonly SamplerRow[]): void {
    const known = this.#rows;
    if (rows.length === known.length && rows.every((row, i) => row === known[i])) return;
    this.#rows = [...rows];
    const { samplers, seen } = this.#drawing!;
    const { seed = 0 } = this.#options;
    samplers.view(0, rows.length * SAMPLER_BYTES).upload(encodeSamplers(
      rows.map(({ prompt, chosen }) => ({
        ...this.#options,
        seed: seed + prompt,
        step: chosen,
      })),
    ));
    if (seen === undefined) return;
    rows.forEach((row, i) => {
      const tokens = seen.tokens.view(0, row.tokens.length);
      tokens.upload(Int32Array.from(row.tokens));
      seen.one.fill(0);
      markTokens(tokens, seen.one);
      seen.all.view(i * this.#vocabulary, this.#vocabulary).copyFrom(seen.one);
    });
  }
}

function requireToken(token: number, { prompt }: SamplerRow): number {
  if (token >= 0) return token;
  throw new PackhorseError(
    "non-finite",
    `Cannot choose a token after prompt ${prompt}: the model computes no number for any; ` +
      "are its weights, or its keys and values, beyond what their type holds?",
  );
}
