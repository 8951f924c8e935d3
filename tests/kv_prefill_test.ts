/**
 * Prefill attention of the growing cache on every backend that opens here (PACKHORSE_BACKEND names one): chunks of any
 * size against double precision, and what they leave in the cache against the model.
 */
import { assert, assertEquals, assertThrows } from "@std/assert";
import type { Device } from "../src/device/mod.ts";
import { PackhorseError } from "../src/error.ts";
import {
  KvCache,
  type KvCacheConfig,
  type KvCacheDType,
  type KvCacheOptions,
  type KvSequence,
} from "../src/kv/mod.ts";
import {
  assertClose,
  assertLayer,
  assertSameBits,
  bitsOf,
  bothParts,
  type Buffer,
  type Data,
  fixed,
  kivi,
  optionsOf,
  packkv,
  prefillLayer,
  raw16,
  readLayer,
  testOnDevices as test,
  throwsWith,
  tokensOf,
  upload,
} from "./kv_cache_support.ts";
import {
  attend,
  type Bits,
  joinTokens,
  ReferenceCache,
  type ReferenceSequence,
  type Token,
} from "./kv_cache_reference.ts";
import { randomOf } from "./kv_cases.ts";

/** A sequence of a cache and of its model, with what a step brings it. */
interface Part {
  readonly sequence: KvSequence;
  readonly expected: ReferenceSequence;
  readonly tokens: Token[][];
}

/** What the queries are. */
interface QueryData extends Data {
  readonly factor?: number;
}

/** Some of `count` query tokens: the first, the last, those around multiples of 64, and some more. */
function sampled(count: number, random: () => number): number[] {
  const edges = [0, 63, 64, 65, 127, 128, count - 1];
  const more = Array.from({ length: 6 }, () => Math.floor(random() * count));
  return [...new Set([...edges, ...more])].filter((token) => token < count);
}

/** How far a layer's tokens see. */
const reach = ({ windows, sinks }: KvCacheConfig, layer: number) => ({
  window: windows[layer]!,
  sinks,
});

/** Asserts that `out`, of the `tokens` newest of a sequence, is attention; looks at some of them. */
function assertAttends(
  config: KvCacheConfig,
  held: readonly Token[],
  { tokens, queries, out, scale, layer, random, what }: {
    tokens: readonly Token[];
    queries: Bits;
    out: Bits;
    scale: number;
    layer: number;
    random: () => number;
    what: string;
  },
): void {
  const size = config.queryHeads * config.headDim;
  const all = [...held, ...tokens];
  const chosen = sampled(tokens.length, random);
  const expected = new Float64Array(chosen.length * size);
  const actual = new Uint16Array(chosen.length * size);
  chosen.forEach((token, i) => {
    const own = queries.slice(token * size, (token + 1) * size);
    const seen = all.slice(0, held.length + token + 1);
    expected.set(attend(config, seen, own, scale, reach(config, layer)), i * size);
    actual.set(out.subarray(token * size, (token + 1) * size), i * size);
  });
  assertClose(config, actual, expected, `${what}, layer ${layer}: ${all.length} tokens`);
}

/** Prefills one step of every layer; asserts what comes out, and what the cache holds then. */
function prefillAll(
  cache: KvCache,
  model: ReferenceCache,
  parts: readonly Part[],
  { query, what, scale, holds = true }: {
    query: QueryData;
    what: string;
    scale?: number;
    /** Whether the cache still holds all tokens. */
    holds?: boolean;
  },
): void {
  const { config } = cache;
  const { queryHeads, headDim } = config;
  const step = cache.begin(
    parts.map(({ sequence, tokens }) => ({ sequence, tokens: tokens[0]!.length })),
  );
  for (let layer = 0; layer < config.layers; layer++) {
    const bits = bitsOf(config, query, {
      tokens: step.tokens,
      heads: queryHeads,
      factor: query.factor ?? 1,
    });
    const tokens = parts.flatMap(({ tokens }) => tokens[layer]!);
    const out = prefillLayer(cache, step, layer, { tokens, bits, scale: scale! });
    let at = 0;
    for (const { expected, tokens } of parts) {
      const end = at + tokens[layer]!.length * queryHeads * headDim;
      assertAttends(config, expected.layers[layer]!.tokens, {
        tokens: tokens[layer]!,
        queries: bits.subarray(at, end),
        out: out.subarray(at, end),
        scale: scale ?? 1 / Math.sqrt(headDim),
        random: query.random,
        layer,
        what,
      });
      at = end;
    }
  }
  for (const { expected, tokens } of parts) model.append(expected, tokens);
  if (!holds) return;
  for (const { sequence, expected } of parts) {
    expected.layers.forEach(({ tokens }, layer) => assertLayer(cache, layer, sequence, tokens));
  }
}

/** Appends and attends with a few tokens per sequence; asserts the same. */
function decodeAll(
  cache: KvCache,
  model: ReferenceCache,
  parts: readonly Part[],
  { query, what }: { query: QueryData; what: string },
): void {
  const { device, config } = cache;
  const { queryHeads, headDim, dtype } = config;
  const step = cache.begin(
    parts.map(({ sequence, tokens }) => ({ sequence, tokens: tokens[0]!.length })),
  );
  for (const { expected, tokens } of parts) model.append(expected, tokens);
  for (let layer = 0; layer < config.layers; layer++) {
    const joined = joinTokens(config, parts.flatMap(({ tokens }) => tokens[layer]!));
    const bits = bitsOf(config, query, { tokens: step.tokens, heads: queryHeads });
    using keys = upload(device, dtype, joined.keys);
    using values = upload(device, dtype, joined.values);
    using queries = upload(device, dtype, bits);
    using out: Buffer = device.createBuffer(dtype, bits.length);
    step.append(layer, keys, values);
    step.attend(layer, queries, out);
    const found = out.download() as Bits;
    let at = 0;
    for (const { expected, tokens } of parts) {
      const end = at + tokens[layer]!.length * queryHeads * headDim;
      const exact = attend(
        config,
        expected.layers[layer]!.tokens,
        bits.slice(at, end),
        1 / Math.sqrt(headDim),
        reach(config, layer),
      );
      assertClose(config, found.slice(at, end), exact, `${what}, layer ${layer}: decode`);
      at = end;
    }
  }
}

const codecs = [
  ...[1, 2, 3, 4, 5, 6, 7, 8].map(fixed),
  ...[0.1, 0.2, 1, 1 / 254].map(packkv),
];

test("prefill is attention of double precision, and leaves what append leaves", (device) => {
  let example = 0;
  for (const headDim of [64, 96, 128, 256]) {
    for (const group of [1, 4, 16]) {
      for (const dtype of ["f16", "bf16"] as const) {
        const random = randomOf(++example);
        const kvHeads = group === 1 ? 2 : 1;
        const codec = () => codecs[Math.floor(random() * codecs.length)]!;
        using cache = KvCache.create(
          device,
          optionsOf({
            layers: 1 + Number(example % 4 === 0),
            headDim,
            kvHeads,
            queryHeads: group * kvHeads,
            dtype,
            residual: [8, 64, 128, 77][example % 4]!,
            sinks: [4, 0, 9, 70, 1][example % 5]!,
            codec: [0, 1].slice(0, 1 + Number(example % 4 === 0)).map(() => ({
              keys: codec(),
              values: codec(),
            })),
          }),
        );
        const { config } = cache;
        const model = new ReferenceCache(config);
        const data: Data = { kind: "gaussian", random };
        const sequences = [0, 1, 2].map(() => ({ sequence: cache.add(), expected: model.add() }));
        const what = `headDim ${headDim}, group ${group}, ${dtype}`;
        const next = (each: typeof sequences[number], count: number): Part => ({
          ...each,
          tokens: tokensOf(config, data, count),
        });
        const chunk = () => 1 + Math.floor(random() ** 3 * 300);
        for (const factor of [1, 8, 0.02].filter((_, i) => i !== example % 3)) {
          const counts = [chunk(), chunk(), [1, 9, 64, 128][example % 4]!];
          const parts = sequences.map((each, i) => next(each, counts[i]!));
          prefillAll(cache, model, factor === 8 ? parts.slice(1) : parts, {
            query: { ...data, factor },
            what: `${what}, queries times ${factor}`,
          });
        }
        decodeAll(cache, model, sequences.map((each, i) => next(each, 1 + i)), {
          query: data,
          what,
        });
        const counted = model.count(sequences.map(({ expected }) => expected));
        const { sequences: count, tokens, packedTokens, packedBytes } = cache.statistics();
        assertEquals({ sequences: count, tokens, packedTokens, packedBytes }, counted, what);
      }
    }
  }
});

test("prefill of keys and values far from 0, and of every kind of data", (device) => {
  const kinds = [
    "large offset, tiny range",
    "outlier channels",
    "constant tokens",
    "zeros",
    "subnormals",
    "ramps",
    "halves of a step",
  ] as const;
  for (const kind of kinds) {
    for (const dtype of ["f16", "bf16"] as const) {
      const random = randomOf(kind.length);
      using cache = KvCache.create(device, optionsOf({ dtype, residual: 16 }));
      const model = new ReferenceCache(cache.config);
      const each = { sequence: cache.add(), expected: model.add() };
      for (const count of [150, 90]) {
        const tokens = tokensOf(cache.config, { kind, random }, count);
        // Scores of thousands would say more of float32 than of attention.
        const query = { kind: "gaussian", random, factor: 0.02 } as const;
        prefillAll(cache, model, [{ ...each, tokens }], { query, what: `${kind}, ${dtype}` });
      }
    }
  }
});

test("prefill in chunks of every size, with a scale of one's own", (device) => {
  const random = randomOf(3);
  const data: Data = { kind: "gaussian", random };
  using cache = KvCache.create(device, optionsOf({ tokens: 6000, kvHeads: 2, queryHeads: 6 }));
  const model = new ReferenceCache(cache.config);
  const sequence = { sequence: cache.add(), expected: model.add() };
  for (const count of [1, 2, 3, 9, 63, 64, 65, 31, 300, 1, 128, 200, 129, 17, 250]) {
    const tokens = tokensOf(cache.config, data, count);
    prefillAll(cache, model, [{ ...sequence, tokens }], {
      query: data,
      what: `chunk of ${count}`,
      scale: 0.25,
    });
  }
});

test("prefill over a past of more blocks than are looked up at a time", (device) => {
  const random = randomOf(4);
  const data: Data = { kind: "gaussian", random };
  const codec = [bothParts(packkv(0.1)), { keys: raw16, values: kivi(2) }, {
    keys: kivi(3),
    values: raw16,
  }];
  const tokens = 9000;
  using cache = KvCache.create(
    device,
    optionsOf({ layers: 3, codec, tokens, stepTokens: tokens, poolBytes: 2 ** 23 }),
  );
  const model = new ReferenceCache(cache.config);
  const sequence = { sequence: cache.add(), expected: model.add() };
  for (const count of [8700, 20]) {
    const tokens = tokensOf(cache.config, data, count);
    const what = `chunk of ${count}`;
    prefillAll(cache, model, [{ ...sequence, tokens }], { query: data, what });
  }
});

test("a sequence's prefill is the same, bit for bit, whatever else is in the batch", (device) => {
  for (
    const [headDim, dtype, codec] of [
      [64, "f16", bothParts(packkv(0.1))],
      [96, "bf16", bothParts(packkv(0.2))],
      [128, "bf16", bothParts(fixed(4))],
      [256, "f16", bothParts(packkv(0.1))],
      [64, "bf16", bothParts(raw16)],
      [96, "f16", bothParts(kivi(2))],
      [128, "f16", { keys: raw16, values: kivi(4) }],
      [256, "bf16", { keys: kivi(8), values: raw16 }],
    ] as const
  ) {
    const options = optionsOf({
      headDim,
      dtype,
      codec,
      queryHeads: 6,
      kvHeads: 2,
      sequences: 8,
      stepTokens: 3000,
    });
    using sample = KvCache.create(device, options);
    const { config } = sample;
    const data: Data = { kind: "gaussian", random: randomOf(headDim) };
    const sequences = [[500, 10], [0, 200], [333, 1], [64, 64], [190, 333]].map((
      [before, count],
    ) => ({
      before: tokensOf(config, data, before!)[0]!,
      tokens: tokensOf(config, data, count!)[0]!,
      queries: bitsOf(config, data, { tokens: count!, heads: config.queryHeads }),
    }));
    /** Prefill of some of the sequences together, in this order. */
    const together = (order: readonly number[]): Bits[] => {
      using cache = KvCache.create(device, options);
      const parts = order.map((i) => ({ sequence: cache.add(), ...sequences[i]! }));
      for (const { sequence, before } of parts) {
        if (before.length === 0) continue;
        const joined = joinTokens(config, before);
        using keys = upload(device, dtype, joined.keys);
        using values = upload(device, dtype, joined.values);
        cache.begin([{ sequence, tokens: before.length }]).append(0, keys, values);
      }
      const step = cache.begin(
        parts.map(({ sequence, tokens }) => ({ sequence, tokens: tokens.length })),
      );
      const out = prefillLayer(cache, step, 0, {
        tokens: parts.flatMap(({ tokens }) => tokens),
        bits: Uint16Array.from(parts.flatMap(({ queries }) => [...queries])),
      });
      let at = 0;
      return parts.map(({ queries }) => out.slice(at, at += queries.length));
    };
    const alone = sequences.map((_, i) => together([i])[0]!);
    for (const order of [[0, 1, 2, 3, 4], [4, 2, 0], [1, 3], [3, 0]]) {
      together(order).forEach((out, place) => {
        const i = order[place]!;
        assertSameBits(out, alone[i]!, `headDim ${headDim}: sequence ${i} in ${order}`);
      });
    }
  }
});

// ---- windows ---------------------------------------------------------------------------------------

test("windows hide all but the newest tokens and the sinks", (device) => {
  const mixed = [
    bothParts(raw16),
    bothParts(kivi(4)),
    { keys: kivi(2), values: packkv(0.2) },
    { keys: fixed(4), values: kivi(8) },
    { keys: raw16, values: kivi(3) },
    { keys: kivi(5), values: raw16 },
    { keys: raw16, values: fixed(6) },
    { keys: packkv(0.1), values: raw16 },
  ];
  let example = 0;
  for (const window of [1, 17, 64, 200]) {
    for (const sinks of [0, 4]) {
      const random = randomOf(100 + example);
      const data: Data = { kind: "gaussian", random };
      using cache = KvCache.create(
        device,
        optionsOf({
          layers: 3,
          headDim: [64, 128, 96, 256][example % 4]!,
          dtype: example % 3 === 0 ? "bf16" : "f16",
          queryHeads: [3, 4, 16][example % 3]!,
          residual: [8, 64, 150][example % 3]!,
          sinks,
          window: [window, 0, window],
          codec: [
            { keys: packkv(0.1), values: fixed(5) },
            { keys: packkv(0.1), values: fixed(5) },
            mixed[example]!,
          ],
        }),
      );
      example++;
      const { config } = cache;
      assertEquals(config.windows, [window, 0, window]);
      const model = new ReferenceCache(config);
      const sequences = [0, 1].map(() => ({ sequence: cache.add(), expected: model.add() }));
      const what = `window ${window}, ${sinks} sinks`;
      const step = (...counts: number[]): Part[] =>
        sequences.map((each, i) => ({ ...each, tokens: tokensOf(config, data, counts[i]!) }));
      for (const counts of [[3, 190], [300, 20]]) {
        prefillAll(cache, model, step(...counts), { query: data, what });
      }
      for (const counts of [[1, 8], [7, 2]]) {
        decodeAll(cache, model, step(...counts), { query: data, what });
      }
    }
  }
});

/** A cache whose pool holds far less than its sequences get. */
function tightCache(device: Device, options: Partial<KvCacheOptions> = {}): KvCache {
  return KvCache.create(
    device,
    optionsOf({
      kvHeads: 4,
      queryHeads: 4,
      headDim: 128,
      residual: 32,
      tokens: 8192,
      stepTokens: 256,
      poolBytes: 8 * 65_536,
      codec: { keys: fixed(4), values: fixed(4) },
      ...options,
    }),
  );
}

test("pages that windows have left are given back when the pool runs short", (device) => {
  using cache = tightCache(device, { window: 300 });
  const { config } = cache;
  const model = new ReferenceCache(config);
  const data: Data = { kind: "gaussian", random: randomOf(5) };
  const each = { sequence: cache.add(), expected: model.add() };
  let least = Infinity;
  const next = (count: number) => [{ ...each, tokens: tokensOf(config, data, count) }];
  for (let i = 0; i < 12; i++) {
    const what = `step ${i}`;
    prefillAll(cache, model, next(200), { query: data, what, holds: false });
    decodeAll(cache, model, next(2), { query: data, what });
    least = Math.min(least, cache.statistics().freeBytes);
  }
  assert(least < 4 * 65_536, `${least}`);
  // 2424 tokens of about 530 bytes per head: more than twice the pool.
  const length = cache.length(each.sequence);
  const { packedBytes, packedTokens } = cache.statistics();
  assertEquals(packedTokens, model.count([each.expected]).packedTokens);
  assert(packedBytes < config.poolBytes);
  assert(model.count([each.expected]).packedBytes > 2 * config.poolBytes);

  // What is held can be read; the rest is named.
  const error = assertThrows(() => cache.read(0, each.sequence), PackhorseError);
  assertEquals(error.code, "invalid-argument");
  const first = Number(error.message.match(/holds those from (\d+) on/)![1]);
  assertEquals((first - config.sinks) % 64, 0);
  assert(first > 1000 && first <= length - 300, `${first}`);
  const { tokens } = each.expected.layers[0]!;
  for (const [from, count] of [[first, length - first], [0, config.sinks], [first, 1]]) {
    const held = readLayer(cache, 0, each.sequence, { first: from!, count: count! });
    const joined = joinTokens(config, tokens.slice(from!, from! + count!));
    assertSameBits(held.keys, joined.keys, `keys from ${from}`);
    assertSameBits(held.values, joined.values, `values from ${from}`);
  }
  for (const [from, count] of [[first - 1, 1], [first - 1, 10], [config.sinks, 1], [0, 5]]) {
    throwsWith(
      () => cache.read(0, each.sequence, { first: from!, count: count! }),
      "invalid-argument",
      `${first}`,
    );
  }

  // A fork shares what is left.
  const before = cache.statistics().freeBytes;
  const fork = { sequence: cache.fork(each.sequence), expected: model.fork(each.expected) };
  assertEquals(before - cache.statistics().freeBytes, 65_536);
  // Cut to where the next token's window begins, but no further.
  const cut = first + 300 - 1;
  for (const count of [cut - 1, first, config.sinks + 1]) {
    throwsWith(
      () => cache.truncate(fork.sequence, count),
      "invalid-argument",
      `${first}`,
      `${cut}`,
    );
  }
  cache.truncate(fork.sequence, cut);
  model.truncate(fork.expected, cut);
  const both = () => [each, fork].map((one) => ({ ...one, tokens: tokensOf(config, data, 3) }));
  decodeAll(cache, model, both(), { query: data, what: "after the cut" });
  // To the sinks, and from there anew.
  cache.truncate(fork.sequence, config.sinks);
  model.truncate(fork.expected, config.sinks);
  const anew = [{ ...fork, tokens: tokensOf(config, data, 250) }];
  prefillAll(cache, model, anew, { query: data, what: "anew" });
  cache.remove(each.sequence);
  cache.remove(fork.sequence);
  assertEquals(cache.statistics().freeBytes, config.poolBytes);
});

test("pages are given back only if that makes room", (device) => {
  using cache = tightCache(device, { layers: 2, window: [100, 0], poolBytes: 16 * 65_536 });
  const { config } = cache;
  const model = new ReferenceCache(config);
  const data: Data = { kind: "gaussian", random: randomOf(6) };
  const each = { sequence: cache.add(), expected: model.add() };
  let steps = 0;
  const grow = () => {
    while (true) {
      const parts = [{ ...each, tokens: tokensOf(config, data, 200) }];
      const options = { query: data, what: `step ${steps}`, holds: false };
      prefillAll(cache, model, parts, options);
      steps++;
    }
  };
  throwsWith(grow, "out-of-memory", "pool");
  // The layer without a window fills the pool: nothing of it is gone.
  assertLayer(cache, 1, each.sequence, each.expected.layers[1]!.tokens);
  const before = cache.statistics();
  throwsWith(() => cache.begin([{ sequence: each.sequence, tokens: 256 }]), "out-of-memory");
  assertEquals(cache.statistics(), before);
  decodeAll(cache, model, [{ ...each, tokens: tokensOf(config, data, 1) }], {
    query: data,
    what: "full",
  });

  // A fork that a window does not show its pages either lets them go as well.
  using shared = tightCache(device, { window: 100 });
  const parent = shared.add();
  const fill = (sequence: KvSequence, count: number) => {
    const [tokens] = tokensOf(shared.config, data, count);
    const joined = joinTokens(shared.config, tokens!);
    using keys = upload(device, "f16", joined.keys);
    using values = upload(device, "f16", joined.values);
    shared.begin([{ sequence, tokens: count }]).append(0, keys, values);
  };
  for (let i = 0; i < 3; i++) fill(parent, 250);
  const fork = shared.fork(parent);
  for (let i = 0; i < 12; i++) {
    fill(parent, 200);
    fill(fork, 200);
  }
  assertEquals([shared.length(parent), shared.length(fork)], [3150, 3150]);
});

test("windows outside their range are named", (device) => {
  const refuse = (window: unknown, ...fragments: string[]) =>
    throwsWith(
      () => KvCache.create(device, optionsOf({ layers: 2, window: window as number })),
      "invalid-argument",
      "Cannot create the kv cache",
      ...fragments,
    );
  for (const window of [-1, 1.5, NaN, 2 ** 31, "9"]) {
    refuse(window, "window of layer 0", `got ${window}`);
    refuse([0, window], "window of layer 1", `got ${window}`);
  }
  refuse([1], "list of 2, got 1");
  refuse([1, 2, 3], "list of 2, got 3");
});

// ---- arguments -------------------------------------------------------------------------------------

/** A step of `tokens` tokens of a new sequence, with tensors for it. */
function stepOf(device: Device, options: KvCacheOptions, tokens: number) {
  const stack = new DisposableStack();
  const cache = stack.use(KvCache.create(device, options));
  const { queryHeads, kvHeads, headDim, dtype } = cache.config;
  const create = (heads: number) => {
    const buffer: Buffer = stack.use(device.createBuffer(dtype, tokens * heads * headDim));
    buffer.fill();
    return buffer;
  };
  const tensors = {
    queries: create(queryHeads),
    keys: create(kvHeads),
    values: create(kvHeads),
    out: create(queryHeads),
  };
  const sequence = cache.add();
  const step = cache.begin([{ sequence, tokens }]);
  return { cache, sequence, step, tensors, [Symbol.dispose]: () => stack.dispose() };
}

test("prefill takes the place of append, once a layer", (device) => {
  using made = stepOf(device, optionsOf({ layers: 2 }), 20);
  const { cache, sequence, step, tensors } = made;
  const refuse = (work: () => unknown, ...fragments: string[]) =>
    throwsWith(work, "invalid-argument", ...fragments);
  for (const layer of [-1, 2, 0.5, NaN]) {
    refuse(() => step.prefill(layer, tensors), "prefill", `got ${layer}`);
  }
  for (const scale of [NaN, Infinity, 1e39, 0, -1, 1e-46, "1" as never]) {
    refuse(() => step.prefill(0, tensors, { scale }), "prefill", "scale", `${scale}`);
  }
  step.prefill(0, tensors);
  refuse(() => step.prefill(0, tensors), "Layer 0");
  refuse(() => step.append(0, tensors.keys, tensors.values), "Layer 0");
  refuse(() => cache.begin([{ sequence }]), "layer 1 still lacks");
  step.append(1, tensors.keys, tensors.values);
  refuse(() => step.prefill(1, tensors), "Layer 1");
  throwsWith(
    () => step.attend(0, tensors.queries, tensors.out),
    "unsupported",
    "20",
    "8",
    "prefill",
  );
  cache.begin([{ sequence }]);
  refuse(() => step.prefill(0, tensors), "prefill", "over");
  cache[Symbol.dispose]();
  throwsWith(() => step.prefill(0, tensors), "disposed");
});

test("prefill refuses buffers that do not fit", (device) => {
  const options = optionsOf({ dtype: "bf16", kvHeads: 2, queryHeads: 2 });
  using made = stepOf(device, options, 4);
  const { step, tensors } = made;
  const refuse = (work: () => unknown, ...fragments: string[]) =>
    throwsWith(work, "invalid-argument", ...fragments);
  const length = 4 * 2 * 64;
  using half: Buffer = device.createBuffer("f16" as KvCacheDType, length);
  using large: Buffer = device.createBuffer("bf16", 4 * length);
  for (const name of ["queries", "keys", "values", "out"] as const) {
    const fails = (buffer: Buffer, ...fragments: string[]) =>
      refuse(
        () => step.prefill(0, { ...tensors, [name]: buffer }),
        `prefill: ${name}`,
        ...fragments,
      );
    fails(half, "bf16", "f16");
    fails(large, "[4, 2, 64]", `${4 * length}`);
    fails(large.view(1, length), "16 bytes", "2");
    if (name === "out") continue;
    refuse(
      () => step.prefill(0, { ...tensors, [name]: tensors.out }),
      `${name} and out overlap`,
    );
    const near = { [name]: large.view(8, length), out: large.view(length, length) };
    refuse(() => step.prefill(0, { ...tensors, ...near }), `${name} and out overlap`, "16");
  }
  const view = (i: number) => large.view(i * length, length);
  large.fill();
  step.prefill(0, { queries: view(0), keys: view(1), values: view(2), out: view(3) });
});
