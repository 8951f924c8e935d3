import { CacheFile } from "./cache_file.ts";
import type { KvCacheDType } from "./cache_options.ts";
import { BLOCK_TOKENS } from "./codec.ts";
import { PackhorseError } from "../error.ts";
import { convertFloats } from "../float_conversion.ts";
import type { KvCacheFileOptions } from "./file_options.ts";
import { type KvPair, PARTS } from "./tensor.ts";

/** 16-bit values of a layer's keys and values. */
type Bits = KvPair<Uint16Array<ArrayBuffer>>;

/** A layer to take tokens from: `[heads, tokens, headDim]`. */
interface SourceLayer {
  readonly heads: number;
  readonly tokens: number;
  readonly headDim: number;
  readonly bits: Bits;
}

/** Beyond this much of it, a file has no more to tell. */
const MOST_TOKENS = 4096;
const MOST_LAYERS = 8;

/**
 * Makes caches of any size that look like a real one: every head, and every part of it as wide as the file's heads, goes
 * through the tokens of a head of the file from a place of its own, and from the last on to the first. So what happens
 * within a block, a token and a channel is real, wherever blocks begin.
 */
export class KvSampler {
  readonly #layers: readonly SourceLayer[];
  #state: number;

  private constructor(layers: readonly SourceLayer[], seed: number) {
    this.#layers = layers;
    this.#state = seed;
  }

  /**
   * Reads a cache in a `.safetensors` file, rounding its values to `dtype`.
   *
   * Throws as `CacheFile.open`, and `unsupported` if a layer has less than a block of tokens.
   */
  static async open(
    options: Omit<KvCacheFileOptions, "onProgress" | "chunkBytes">,
    { dtype, seed = 1 }: { dtype: KvCacheDType; seed?: number },
  ): Promise<KvSampler> {
    using file = await CacheFile.open(options);
    const layers: SourceLayer[] = [];
    for (const layer of file.layers.slice(0, MOST_LAYERS)) {
      const { dtype: from, shape: [heads, all, headDim] } = layer.layout;
      if (all < BLOCK_TOKENS) {
        const message =
          `Cannot sample ${layer.names.keys} of ${file.path}: it has ${all} tokens, ` +
          `and a sample takes ${BLOCK_TOKENS} or more`;
        throw new PackhorseError("unsupported", message);
      }
      const tokens = Math.min(all, MOST_TOKENS);
      const bytes = await file.read(layer, 0, tokens);
      const bits = {
        keys: bitsOf(convertFloats(bytes.keys, { from, to: dtype })),
        values: bitsOf(convertFloats(bytes.values, { from, to: dtype })),
      };
      layers.push({ heads, tokens, headDim, bits });
      options.signal?.throwIfAborted();
    }
    return new KvSampler(layers, seed);
  }

  /** How many layers of the file there are to choose from. */
  get layers(): number {
    return this.#layers.length;
  }

  /** Keys and values `[tokens, heads, headDim]` in the manner of layer `layer` of the file. */
  sample(
    layer: number,
    { tokens, heads, headDim }: { tokens: number; heads: number; headDim: number },
  ): Bits {
    const source = this.#layers[layer]!;
    const length = tokens * heads * headDim;
    const sample = { keys: new Uint16Array(length), values: new Uint16Array(length) };
    const width = Math.min(headDim, source.headDim);
    for (let head = 0, turn = 0; head < heads; head++) {
      for (let channel = 0; channel < headDim; channel += width, turn++) {
        const start = this.#below(source.tokens);
        const from = turn % source.heads * source.tokens;
        const channels = Math.min(width, headDim - channel);
        for (const part of PARTS) {
          for (let token = 0; token < tokens; token++) {
            const at = (from + (start + token) % source.tokens) * source.headDim;
            const values = source.bits[part].subarray(at, at + channels);
            sample[part].set(values, (token * heads + head) * headDim + channel);
          }
        }
      }
    }
    return sample;
  }

  /** An integer below `end`, by a 32-bit linear congruential generator's upper bits. */
  #below(end: number): number {
    this.#state = (Math.imul(this.#state, 1664525) + 1013904223) >>> 0;
    return Math.floor(this.#state / 2 ** 32 * end);
  }
}

function bitsOf({ buffer, byteOffset, byteLength }: Uint8Array<ArrayBuffer>) {
  return new Uint16Array(buffer, byteOffset, byteLength / 2);
}
