/**
 * Long sequences in the growing cache, on every backend: what they hold, and attention over them against double
 * precision. Their tokens repeat those of a slab, whose number is prime, so that what is found in a wrong place is found
 * wrong, and the oracle has to see each only once; a few that do not repeat are what peaked queries look for.
 */
import type { Device } from "../src/device/mod.ts";
import { KvCache, type KvCacheCodec, type KvCacheDType, type KvSequence } from "../src/kv/mod.ts";
import { withWholePool } from "../src/kv/pool_bytes.ts";
import {
  attend,
  type Bits,
  decodeBits,
  encodeBits,
  joinTokens,
  ReferenceCache,
  splitTokens,
  type Token,
} from "./kv_cache_reference.ts";
import {
  assertClose,
  assertSameBits,
  attendLayer,
  bitsOf,
  type Data,
  fixed,
  optionsOf,
  packkv,
  PARTS,
  readLayer,
  testOnDevices,
  upload,
} from "./kv_cache_support.ts";
import { randomOf } from "./kv_cases.ts";

const BLOCK = 64;
const LENGTHS = [65_537, 131_135, 200_000];
/** Tokens of the slab. */
const PERIOD = 4_999;
/** Tokens of a step while sequences are filled. */
const CHUNK = 16_384;
/** Where the tokens are that no other is like. */
const SINGLES = [5, 33_333, 65_472, 199_000];
/** What the tokens of the last step ask for: everything, everything alike, or one token. */
const QUERIES = ["random", "flat", ...SINGLES] as const;

interface LongCase {
  readonly headDim: number;
  readonly group: number;
  readonly dtype: KvCacheDType;
  readonly codec: KvCacheCodec;
}

const CASES: readonly LongCase[] = [
  { headDim: 64, group: 1, dtype: "f16", codec: { keys: packkv(1 / 254), values: packkv(0.05) } },
  { headDim: 64, group: 16, dtype: "bf16", codec: { keys: fixed(4), values: fixed(3) } },
  { headDim: 128, group: 16, dtype: "f16", codec: { keys: packkv(0.1), values: packkv(0.2) } },
  { headDim: 128, group: 1, dtype: "bf16", codec: { keys: fixed(2), values: fixed(5) } },
];

testOnDevices(
  "long sequences hold their tokens, and attention over them is that of double precision",
  (device) => {
    CASES.forEach((example, seed) => attendLong(device, example, seed));
  },
);

function attendLong(
  device: Device,
  { headDim, group, dtype, codec }: LongCase,
  seed: number,
): void {
  const options = optionsOf({
    headDim,
    queryHeads: group,
    dtype,
    codec,
    sequences: LENGTHS.length,
    tokens: Math.max(...LENGTHS),
    stepTokens: CHUNK,
    residual: 100,
  });
  using cache = KvCache.create(device, withWholePool(device, options));
  const { config } = cache;
  const data: Data = { kind: "gaussian", random: randomOf(seed) };
  const tokens = (count: number): Token[] => {
    const [keys, values] = PARTS.map(() => bitsOf(config, data, { tokens: count, heads: 1 }));
    return splitTokens(config, { keys: keys!, values: values! });
  };
  const distinct = tokens(PERIOD + SINGLES.length);
  const placeOf = (position: number) => {
    const single = SINGLES.indexOf(position);
    return single < 0 ? position % PERIOD : PERIOD + single;
  };
  // A token's scales are its own here, so that what it is packed to does not depend on the others of its block.
  const model = new ReferenceCache({ ...config, sinks: 0, residual: 8 });
  const sequence = model.add();
  model.append(sequence, [[...distinct, ...distinct.slice(0, BLOCK + 8)]]);
  const packed = sequence.layers[0]!.tokens.slice(0, distinct.length);
  const what = (length: number) =>
    `${length} tokens, head_dim ${headDim}, group ${group}, ${dtype}, ${JSON.stringify(codec)}`;

  const slab = joinTokens(
    config,
    Array.from({ length: PERIOD + CHUNK }, (_, i) => distinct[i % PERIOD]!),
  );
  using keys = upload(device, dtype, slab.keys);
  using values = upload(device, dtype, slab.values);
  using singleKeys = upload(device, dtype, joinTokens(config, distinct.slice(PERIOD)).keys);
  using singleValues = upload(device, dtype, joinTokens(config, distinct.slice(PERIOD)).values);
  const fill = (sequence: KvSequence, end: number) => {
    for (let at = cache.length(sequence); at < end; at = cache.length(sequence)) {
      const single = SINGLES.indexOf(at);
      const next = SINGLES.find((position) => position > at) ?? end;
      const count = single < 0 ? Math.min(CHUNK, next - at, end - at) : 1;
      const rows = (all: typeof keys, first: number) => all.view(first * headDim, count * headDim);
      const step = cache.begin([{ sequence, tokens: count }]);
      if (single < 0) step.append(0, rows(keys, at % PERIOD), rows(values, at % PERIOD));
      else step.append(0, rows(singleKeys, single), rows(singleValues, single));
    }
  };
  // The shorter ones are forks of the longest, on its way.
  const longest = cache.add();
  const sequences = LENGTHS.map((length) => {
    fill(longest, length - QUERIES.length);
    return length === LENGTHS.at(-1) ? longest : cache.fork(longest);
  });
  const last = LENGTHS.flatMap((length) =>
    QUERIES.map((_, i) => distinct[placeOf(length - QUERIES.length + i)]!)
  );
  const step = cache.begin(sequences.map((sequence) => ({ sequence, tokens: QUERIES.length })));
  {
    const joined = joinTokens(config, last);
    using keys = upload(device, dtype, joined.keys);
    using values = upload(device, dtype, joined.values);
    step.append(0, keys, values);
  }
  cache.check();

  const queries = LENGTHS.map(() => queriesOf(config, data, distinct.slice(PERIOD)));
  const out = attendLayer(cache, step, 0, joinBits(queries));
  LENGTHS.forEach((length, i) => {
    const packedEnd = config.sinks +
      Math.floor((length - config.sinks - config.residual) / BLOCK) * BLOCK;
    const tokenAt = (position: number) =>
      (position < config.sinks || position >= packedEnd ? distinct : packed)[placeOf(position)]!;
    assertHoldsAround([0, 40_000, 65_536, packedEnd - 70, length - 65]);

    // Each token once, and how often it occurs; those of the last step in their order at the end.
    const counts = new Map<Token, number>();
    for (let position = 0; position < length - QUERIES.length; position++) {
      const token = tokenAt(position);
      counts.set(token, (counts.get(token) ?? 0) + 1);
    }
    const tail = QUERIES.map((_, i) => tokenAt(length - QUERIES.length + i));
    const expected = attend(
      config,
      [...counts.keys(), ...tail],
      queries[i]!,
      1 / Math.sqrt(headDim),
      { times: [...counts.values(), ...tail.map(() => 1)] },
    );
    // Each query token on its own, as their results differ much in size.
    const size = group * headDim;
    QUERIES.forEach((kind, query) => {
      const at = (i * QUERIES.length + query) * size;
      assertClose(
        config,
        out.slice(at, at + size),
        expected.slice(query * size, (query + 1) * size),
        `attention (${kind}) over ${what(length)}`,
      );
    });

    function assertHoldsAround(places: readonly number[]): void {
      for (const first of places) {
        const count = Math.min(130, length - first);
        const held = readLayer(cache, 0, sequences[i]!, { first, count });
        const all = Array.from({ length: count }, (_, at) => tokenAt(first + at));
        const joined = joinTokens(config, all);
        for (const part of PARTS) {
          assertSameBits(
            held[part],
            joined[part],
            `${part} from token ${first} on of ${what(length)}`,
          );
        }
      }
    }
  });
}

/** Queries of the last step's tokens: [QUERIES, group, headDim]. */
function queriesOf(
  config: KvCache["config"],
  data: Data,
  singles: readonly Token[],
): Bits {
  const { dtype, queryHeads, headDim } = config;
  return joinBits(QUERIES.map((kind) => {
    const bits = bitsOf(config, data, { tokens: 1, heads: queryHeads });
    const noise = decodeBits(dtype, bits);
    if (kind === "random") return bits;
    if (kind === "flat") return encodeBits(dtype, noise.map((value) => 0.02 * value));
    // Towards the key of one token, so that little is left for the others.
    const key = decodeBits(dtype, singles[SINGLES.indexOf(kind)]!.keys);
    return encodeBits(dtype, noise.map((value, i) => 4 * key[i % headDim]! + 0.2 * value));
  }));
}

function joinBits(parts: readonly Bits[]): Bits {
  const joined = new Uint16Array(parts.reduce((sum, { length }) => sum + length, 0));
  let at = 0;
  for (const part of parts) {
    joined.set(part, at);
    at += part.length;
  }
  return joined;
}
