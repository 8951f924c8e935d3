/** Random layers and caches for property tests of the codec, and how to compare arrays. */
import { AssertionError } from "@std/assert";
import fc from "fast-check";
import { encodeFloats, type FloatType, FORMATS, unitInLastPlace } from "./float16.ts";
import {
  BLOCK,
  blockCount,
  type CacheBytes,
  type Codec,
  eachValue,
  type Part,
} from "./kv_reference.ts";

type NumericArray = Uint8Array | Float32Array | Int32Array;

/** Equal in every element, NaN and the sign of zero included; names the first difference only. */
export function assertSameElements(
  actual: NumericArray,
  expected: NumericArray,
  what: string,
): void {
  const difference = actual.findIndex((value, i) => !Object.is(value, expected[i]));
  if (difference >= 0) {
    throw new AssertionError(
      `${what}: element ${difference} of ${expected.length} is ${actual[difference]}, ` +
        `expected ${expected[difference]}`,
    );
  }
  if (actual.length !== expected.length) {
    throw new AssertionError(`${what}: ${actual.length} elements, expected ${expected.length}`);
  }
}

/** A codec with defaults for what a test does not care about. */
export function codecOf(codec: Partial<Codec> = {}): Codec {
  return {
    heads: 2,
    headDim: 64,
    tokens: 128,
    dtype: "f16",
    quantizer: "packkv",
    grouping: "token",
    bits: { keys: 0, values: 0 },
    rel: { keys: 0.1, values: 0.2 },
    repack: "none",
    pack: 16,
    keepNonFinite: false,
    ...codec,
  };
}

/** Uniform numbers in [0, 1) from a seed (mulberry32). */
export function randomOf(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let bits = Math.imul(state ^ (state >>> 15), state | 1);
    bits ^= bits + Math.imul(bits ^ (bits >>> 7), bits | 61);
    return ((bits ^ (bits >>> 14)) >>> 0) / 2 ** 32;
  };
}

function gaussian(random: () => number): number {
  return Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
}

interface Where {
  readonly type: FloatType;
  readonly random: () => number;
  readonly head: number;
  readonly token: number;
  readonly channel: number;
}

/** Kinds of data that have broken codecs, each as a value by its place. */
export const DATA_KINDS = {
  gaussian: ({ random }) => gaussian(random),
  "outlier channels": ({ random, channel }) => gaussian(random) * (channel % 16 === 3 ? 50 : 1),
  "large offset, tiny range": ({ type, random, head }) => {
    const offset = head % 2 === 0 ? 1000 : -3000;
    return offset + Math.floor(random() * 5) * unitInLastPlace(type, offset);
  },
  "constant tokens": ({ token }) => [0, -0, 1.5, -2, 3000, 0.1][token % 6]!,
  zeros: () => 0,
  subnormals: ({ type, random, token }) =>
    Math.round((random() - 0.3) * (token % 2 === 0 ? 10 : 400)) * FORMATS[type].smallest,
  "largest values": ({ type, random }) => Math.sqrt(random()) * FORMATS[type].largest,
  "largest range": ({ type, random }) =>
    (random() - 0.5) * FORMATS[type].largest * (type === "f16" ? 2 : 1),
  ramps: ({ random, token, channel }) => token * (channel % 5 - 1) + gaussian(random),
  "halves of a step": ({ random, token }) => (Math.round(random() * 40) - token % 20) / 8,
  "all magnitudes": ({ type, random }) => {
    const { smallest, largest } = FORMATS[type];
    const magnitude = smallest * Math.pow(largest / 2 ** 100 / smallest * 2 ** 100, random());
    return (random() < 0.5 ? -0.4 : 0.4) * magnitude;
  },
} satisfies Record<string, (where: Where) => number>;

export type DataKind = keyof typeof DATA_KINDS;

/** A cache of one kind of data. */
export function cacheOf(codec: Codec, kind: DataKind, seed: number): CacheBytes {
  const random = randomOf(seed);
  const { heads, tokens, headDim, dtype: type } = codec;
  const part = () => {
    const x = new Float32Array(heads * tokens * headDim);
    let i = 0;
    for (let head = 0; head < heads; head++) {
      for (let token = 0; token < tokens; token++) {
        for (let channel = 0; channel < headDim; channel++) {
          x[i++] = DATA_KINDS[kind]({ type, random, head, token, channel });
        }
      }
    }
    return encodeFloats(type, x);
  };
  return { keys: part(), values: part() };
}

/** Limits of {@linkcode cases}. */
export interface CaseLimits {
  readonly maxHeads?: number;
  readonly maxHeadDim?: number;
  readonly maxTokens?: number;
  /** Most values of a part. */
  readonly maxValues?: number;
  readonly repack?: readonly Codec["repack"][];
  readonly kinds?: readonly DataKind[];
}

export interface Case {
  readonly codec: Codec;
  readonly kind: DataKind;
  readonly seed: number;
  readonly cache: CacheBytes;
}

/** Random layers: shapes, types, quantisers, orders, packs and kinds of data. */
export function cases({
  maxHeads = 6,
  maxHeadDim = 256,
  maxTokens = 300,
  maxValues = 40_000,
  repack = ["none", "median", "greedy", "auto"],
  kinds = Object.keys(DATA_KINDS) as DataKind[],
}: CaseLimits = {}): fc.Arbitrary<Case> {
  const rel = fc.oneof(
    fc.constantFrom(1 / 254, 0.05, 0.1, 0.2, 1),
    fc.double({ min: 1 / 254, max: 1, noNaN: true }),
  );
  const quantizer = fc.oneof(
    fc.record({
      quantizer: fc.constant("packkv" as const),
      grouping: fc.constantFrom("token" as const, "head" as const),
      bits: fc.constant({ keys: 0, values: 0 }),
      rel: fc.record({ keys: rel, values: rel }),
    }),
    fc.record({
      quantizer: fc.constant("kivi" as const),
      grouping: fc.constant("token" as const),
      bits: fc.record({
        keys: fc.constantFrom(2, 3, 4, 8),
        values: fc.constantFrom(2, 3, 4, 8),
      }),
      rel: fc.constant({ keys: 0, values: 0 }),
    }),
  );
  // Shapes that hold a block, and now and then one that does not.
  const shape = fc.record({
    heads: fc.integer({ min: 1, max: maxHeads }),
    headDim: fc.integer({ min: 1, max: maxHeadDim / 16 }).map((n) => 16 * n),
  }).filter(({ heads, headDim }) => heads * headDim * BLOCK <= maxValues)
    .chain(({ heads, headDim }) => {
      const most = Math.min(maxTokens, Math.floor(maxValues / (heads * headDim)));
      const tokens = fc.oneof(
        { weight: 9, arbitrary: fc.integer({ min: BLOCK, max: most }) },
        { weight: 1, arbitrary: fc.integer({ min: 0, max: BLOCK - 1 }) },
      );
      return fc.record({ heads: fc.constant(heads), headDim: fc.constant(headDim), tokens });
    });
  const rest = fc.record({
    dtype: fc.constantFrom<FloatType[]>("f16", "bf16", "f32"),
    repack: fc.constantFrom(...repack),
    pack: fc.constantFrom(4, 8, 16, 32),
    keepNonFinite: fc.boolean(),
  });
  return fc.record({
    shape,
    quantizer,
    rest,
    kind: fc.constantFrom(...kinds),
    seed: fc.integer({ min: 0, max: 2 ** 31 }),
  }).map(({ shape, quantizer, rest, kind, seed }) => {
    const codec: Codec = { ...shape, ...quantizer, ...rest };
    return new GeneratedCase(codec, kind, seed);
  });
}

/** Prints as what it takes to make it again, not as its data. */
class GeneratedCase implements Case {
  readonly cache: CacheBytes;

  constructor(readonly codec: Codec, readonly kind: DataKind, readonly seed: number) {
    this.cache = cacheOf(codec, kind, seed);
  }

  [fc.toStringMethod](): string {
    return JSON.stringify({ codec: this.codec, kind: this.kind, seed: this.seed });
  }
}

/**
 * The most that a restored value may be off before it is rounded to its type, as the header promises: half its
 * scale plus two float32 ulps of its group's largest |x|. [heads, tokens, headDim], the tail's being zero.
 */
export function errorBounds(
  codec: Codec,
  part: Part,
  { x, scales }: { x: Float32Array; scales: Float32Array },
): Float64Array {
  const largest = new Float64Array(scales.length);
  const blocks = blockCount(codec);
  for (let block = 0; block < blocks; block++) {
    eachValue(codec, part, block, (place) => {
      largest[place.group] = Math.max(largest[place.group]!, Math.abs(x[place.x]!));
    });
  }
  const bounds = new Float64Array(x.length);
  for (let block = 0; block < blocks; block++) {
    eachValue(codec, part, block, ({ x, group }) => {
      bounds[x] = scales[group]! / 2 + 2 * unitInLastPlace("f32", largest[group]!);
    });
  }
  return bounds;
}

/** Throws unless every restored value is within its bound of the original; the values beyond the blocks are not looked at. */
export function assertWithinBounds(
  restored: Float32Array,
  x: Float32Array,
  bounds: Float64Array,
): void {
  bounds.forEach((bound, i) => {
    const error = Math.abs(restored[i]! - x[i]!);
    if (bound > 0 && !(error <= bound)) {
      throw new AssertionError(
        `Value ${i} is ${restored[i]} for ${x[i]}: off by more than ${bound}`,
      );
    }
  });
}
