/**
 * The growing cache on every backend that opens here (PACKHORSE_BACKEND names one): what it holds against a model of
 * plain arrays, what attention makes of it against double precision, and what it refuses.
 */
import { assert, assertEquals, assertLess } from "@std/assert";
import fc from "fast-check";
import { Device } from "../src/device/mod.ts";
import {
  KvCache,
  type KvCacheConfig,
  type KvCacheDType,
  type KvCacheOptions,
  type KvCachePartCodec,
  type KvCacheStep,
  type KvSequence,
} from "../src/kv/mod.ts";
import {
  attend,
  type Bits,
  decodeBits,
  encodeBits,
  joinTokens,
  ReferenceCache,
  type ReferenceSequence,
  type Token,
} from "./kv_cache_reference.ts";
import {
  appendAll,
  assertClose,
  assertHolds,
  assertSameBits,
  attendLayer,
  bitsOf,
  bothParts,
  type Buffer,
  type Data,
  fixed,
  optionsOf,
  packkv,
  PARTS,
  testOnDevices as test,
  throwsWith,
  tokensOf,
} from "./kv_cache_support.ts";
import { DATA_KINDS, type DataKind, randomOf } from "./kv_cases.ts";

const kivi = (bits: number): KvCachePartCodec => ({ quantizer: "kivi", bits });
const raw16: KvCachePartCodec = { quantizer: "raw16" };

// ---- attention -------------------------------------------------------------------------------------

/** Asserts that `out`, of one sequence, is attention over its tokens, besides rounding to its type. */
function assertAttends(
  config: KvCacheConfig,
  tokens: readonly Token[],
  { queries, out, scale }: { queries: Bits; out: Bits; scale: number },
): void {
  const expected = attend(config, tokens, queries, scale);
  assertClose(config, out, expected, `attention over ${tokens.length} tokens`);
}

/** Attends in every layer of a step and compares; gives the number of comparisons. */
function attendToAll(
  cache: KvCache,
  step: KvCacheStep,
  parts: readonly { expected: ReferenceSequence; tokens: readonly (readonly Token[])[] }[],
  data: Data,
  scale = 1 / Math.sqrt(cache.config.headDim),
): number {
  const { config } = cache;
  const { queryHeads, headDim } = config;
  const gaussian: Data = { ...data, kind: "gaussian" };
  for (let layer = 0; layer < config.layers; layer++) {
    const bits = bitsOf(config, gaussian, { tokens: step.tokens, heads: queryHeads });
    const out = attendLayer(cache, step, layer, bits, { scale });
    let at = 0;
    for (const { expected, tokens } of parts) {
      const end = at + tokens[0]!.length * queryHeads * headDim;
      assertAttends(config, expected.layers[layer]!.tokens, {
        queries: bits.slice(at, end),
        out: out.slice(at, end),
        scale,
      });
      at = end;
    }
  }
  return config.layers * parts.length;
}

/** A step of `last` tokens for sequences of so many, that are added: its attention is that of double precision. */
function assertAttendsAfter(
  cache: KvCache,
  data: Data,
  { lengths, last, scales }: {
    lengths: readonly number[];
    last: number;
    scales: readonly number[];
  },
): void {
  const { config } = cache;
  const model = new ReferenceCache(config);
  const parts = lengths.map((length) => {
    const [sequence, expected] = [cache.add(), model.add()];
    const tokens = tokensOf(config, data, length);
    appendAll(cache, [{ sequence, tokens }]);
    model.append(expected, tokens);
    return { sequence, expected, tokens: tokensOf(config, data, last) };
  });
  const step = appendAll(cache, parts);
  for (const { expected, tokens } of parts) model.append(expected, tokens);
  for (const scale of scales) attendToAll(cache, step, parts, data, scale);
}

// ---- against the model -----------------------------------------------------------------------------

const kinds = Object.keys(DATA_KINDS) as DataKind[];

const partCodecs = fc.oneof(
  fc.constantFrom(0.1, 0.2, 1, 1 / 254).map(packkv),
  fc.double({ min: 1 / 254, max: 1, noNaN: true }).map(packkv),
  fc.integer({ min: 1, max: 8 }).map(fixed),
  fc.integer({ min: 1, max: 8 }).map(kivi),
  fc.constant(raw16),
);

/** Small caches of every shape. */
const caches = fc.record({
  layers: fc.integer({ min: 1, max: 2 }),
  kvHeads: fc.integer({ min: 1, max: 3 }),
  group: fc.integer({ min: 1, max: 4 }),
  headDim: fc.constantFrom(64, 64, 96, 128, 256),
  dtype: fc.constantFrom<KvCacheDType[]>("f16", "bf16"),
  residual: fc.constantFrom(8, 9, 40, 64, 130),
  sinks: fc.constantFrom(0, 1, 4, 70),
  codec: fc.array(fc.record({ keys: partCodecs, values: partCodecs }), {
    minLength: 2,
    maxLength: 2,
  }),
}).map(({ layers, kvHeads, group, codec, ...rest }) =>
  optionsOf({
    layers,
    kvHeads,
    queryHeads: group * kvHeads,
    codec: codec.slice(0, layers),
    tokens: 500,
    stepTokens: 600,
    ...rest,
  })
);

/** Operations as numbers, which mean something in every state. */
const operations = fc.array(
  fc.record({
    what: fc.constantFrom("add", "append", "append", "step", "step", "fork", "truncate", "remove"),
    /** Picks sequences, one bit each, or one. */
    which: fc.nat(255),
    amounts: fc.array(fc.oneof(fc.integer({ min: 1, max: 8 }), fc.integer({ min: 1, max: 250 })), {
      minLength: 4,
      maxLength: 4,
    }),
  }),
  { minLength: 1, maxLength: 12, size: "max" },
);

test("it holds what the model holds after any operations, and gives every page back", (device) => {
  let packed = 0;
  let attended = 0;
  fc.assert(
    fc.property(
      caches,
      operations,
      fc.oneof(fc.constant<DataKind>("gaussian"), fc.constantFrom(...kinds)),
      fc.nat(),
      (options, operations, kind, seed) => {
        using cache = KvCache.create(device, options);
        const { config } = cache;
        const model = new ReferenceCache(config);
        const alive: { sequence: KvSequence; expected: ReferenceSequence }[] = [];
        const data = { kind, random: randomOf(seed) };
        const { freeBytes } = cache.statistics();
        assertEquals(freeBytes, config.poolBytes);

        const run = ({ what, which, amounts }: typeof operations[number]) => {
          const one = alive[which % Math.max(1, alive.length)];
          const length = one ? cache.length(one.sequence) : 0;
          if (what === "add" && alive.length < config.sequences) {
            alive.push({ sequence: cache.add(), expected: model.add() });
          } else if (what === "fork" && one && alive.length < config.sequences) {
            alive.push({
              sequence: cache.fork(one.sequence),
              expected: model.fork(one.expected),
            });
          } else if (what === "remove" && one) {
            cache.remove(one.sequence);
            alive.splice(alive.indexOf(one), 1);
          } else if (what === "truncate" && one) {
            const tokens = Math.max(0, length - amounts[0]!);
            cache.truncate(one.sequence, tokens);
            model.truncate(one.expected, tokens);
          } else if (what === "append" || what === "step") {
            let left = config.stepTokens;
            const most = what === "step" ? 8 : left;
            const parts = alive.flatMap((each, i) => {
              const room = Math.min(left, config.tokens - cache.length(each.sequence));
              const count = Math.min(room, which >> i & 1 ? 1 + amounts[i]! % most : 0);
              left -= count;
              return count === 0 ? [] : [{ ...each, tokens: tokensOf(config, data, count) }];
            });
            if (parts.length === 0) return;
            const step = appendAll(cache, parts);
            for (const { expected, tokens } of parts) model.append(expected, tokens);
            if (what === "step" && kind === "gaussian") {
              attended += attendToAll(cache, step, parts, data);
            }
          }
        };
        alive.push({ sequence: cache.add(), expected: model.add() });
        for (const operation of operations) {
          run(operation);
          for (const { sequence, expected } of alive) assertHolds(cache, sequence, expected);
          const counted = model.count(alive.map(({ expected }) => expected));
          const { sequences, tokens, packedTokens, packedBytes } = cache.statistics();
          assertEquals({ sequences, tokens, packedTokens, packedBytes }, counted);
          packed += packedTokens;
        }
        cache.check();
        for (const { sequence } of alive) cache.remove(sequence);
        assertEquals(cache.statistics().freeBytes, freeBytes);
      },
    ),
    { numRuns: 200 },
  );
  assert(packed > 3_000 && attended > 20, `${packed} ${attended}`);
});

test("it holds the same however the tokens came", (device) => {
  const codec = [
    bothParts(packkv(0.1)),
    { keys: fixed(3), values: packkv(0.2) },
    { keys: packkv(1 / 254), values: fixed(5) },
    { keys: kivi(2), values: raw16 },
    { keys: raw16, values: kivi(4) },
  ];
  for (const [headDim, dtype] of [[64, "f16"], [96, "bf16"], [256, "f16"]] as const) {
    const length = 340;
    const options = optionsOf({
      layers: codec.length,
      kvHeads: 2,
      headDim,
      dtype,
      codec,
      residual: 77,
    });
    const random = randomOf(headDim);
    using cache = KvCache.create(device, options);
    const { config } = cache;
    const tokens = tokensOf(config, { kind: "outlier channels", random }, length);
    const chunkOf = {
      "one at a time": () => 1,
      "in chunks": () => 1 + Math.floor(random() * 150),
      "at once": () => length,
    };
    const model = new ReferenceCache(config);
    const expected = model.add();
    model.append(expected, tokens);
    let packedBytes = 0;
    for (const [how, chunk] of Object.entries(chunkOf)) {
      const sequence = cache.add();
      for (let first = 0; first < length;) {
        const count = Math.min(chunk(), length - first);
        const slice = tokens.map((layer) => layer.slice(first, first + count));
        appendAll(cache, [{ sequence, tokens: slice }]);
        first += count;
      }
      assertHolds(cache, sequence, expected);
      const bytes = cache.statistics().packedBytes;
      if (how === "one at a time") packedBytes = bytes;
      assertEquals(bytes, packedBytes, how);
      cache.remove(sequence);
    }
    assertEquals(packedBytes, model.count([expected]).packedBytes);
  }
});

test("tokens can be read from anywhere", (device) => {
  using cache = KvCache.create(device, optionsOf({ kvHeads: 2, sinks: 5, residual: 20 }));
  const { config } = cache;
  const model = new ReferenceCache(config);
  const expected = model.add();
  const sequence = cache.add();
  const tokens = tokensOf(config, { kind: "gaussian", random: randomOf(1) }, 300);
  appendAll(cache, [{ sequence, tokens }]);
  model.append(expected, tokens);
  for (const [first, count] of [[0, 1], [4, 2], [5, 64], [68, 3], [60, 200], [299, 1], [0, 300]]) {
    using read = cache.read(0, sequence, { first, count });
    const slice = expected.layers[0]!.tokens.slice(first, first! + count!);
    const joined = joinTokens(config, slice);
    for (const part of PARTS) {
      assertSameBits(read[part].download() as Bits, joined[part], `${part} from ${first}`);
    }
  }
  using rest = cache.read(0, sequence, { first: 290 });
  assertEquals(rest.keys.length, 10 * 2 * 64);
});

test("values that are not finite are packed as zeros and reported once", (device) => {
  for (const dtype of ["f16", "bf16"] as const) {
    using cache = KvCache.create(device, optionsOf({ layers: 2, dtype, residual: 8, sinks: 2 }));
    const { config } = cache;
    const model = new ReferenceCache(config);
    const data: Data = { kind: "gaussian", random: randomOf(3) };
    const [first, second] = [0, 1].map(() => ({ sequence: cache.add(), expected: model.add() }));
    const append = (to: typeof first, tokens: Token[][]) => {
      appendAll(cache, [{ sequence: to!.sequence, tokens }]);
      model.append(to!.expected, tokens);
    };
    const special = { f16: [0x7c00, 0xfc00, 0x7e01], bf16: [0x7f80, 0xff80, 0x7fc1] }[dtype];
    append(first, tokensOf(config, data, 200));
    const tokens = tokensOf(config, data, 140);
    tokens[1]![70]!.values[3] = special[0]!;
    tokens[0]![20]!.keys[63] = special[1]!;
    tokens[0]![130]!.keys[0] = special[2]!; // stays in 16 bits for now
    tokens[0]![20]!.keys[62] = special[2]!;
    tokens[0]![21]!.keys.fill(special[2]!);
    append(second, tokens);
    assertHolds(cache, second!.sequence, second!.expected);
    throwsWith(
      () => cache.check(),
      "non-finite",
      `Token 20 of sequence ${second!.sequence.number}`,
    );
    cache.check();
    assertEquals(model.nonFinite.map(({ token }) => token).toSorted(), [20, 21, 70]);
    append(second, tokensOf(config, data, 70));
    assertHolds(cache, second!.sequence, second!.expected);
    throwsWith(() => cache.check(), "non-finite", "Token 130");
    cache.check();
    assertHolds(cache, first!.sequence, first!.expected);
  }
});

// ---- attention -------------------------------------------------------------------------------------

const codecs = [
  ...[1, 2, 3, 4, 5, 6, 7, 8].map(fixed),
  ...[0.1, 0.2, 1, 1 / 254].map(packkv),
];

/** What queries are multiplied by. */
const sharpness = { random: 1, peaked: 8, flat: 0.02 };

test("attention is that of double precision", (device) => {
  const groups = [1, 2, 4, 7, 16, 3, 8];
  let example = 0;
  for (const headDim of [64, 96, 128, 256]) {
    for (const [i, keys] of codecs.entries()) {
      const group = groups[example % groups.length]!;
      const kvHeads = group > 4 ? 1 : 2;
      const dtype = example % 3 === 2 ? "bf16" : "f16";
      const queryTokens = 1 + example % 8;
      const lengths = [queryTokens, 9, 64 + example % 150, 330];
      using cache = KvCache.create(
        device,
        optionsOf({
          headDim,
          kvHeads,
          queryHeads: group * kvHeads,
          dtype,
          sequences: lengths.length,
          residual: [8, 64, 128][example % 3],
          sinks: [4, 0, 9, 64][example % 4],
          codec: { keys, values: codecs[(i * 5 + example) % codecs.length]! },
        }),
      );
      const { config } = cache;
      const model = new ReferenceCache(config);
      const data: Data = { kind: "gaussian", random: randomOf(example) };
      const parts = lengths.map((length) => {
        const [tokens] = tokensOf(config, data, length);
        const last = Math.min(length, queryTokens);
        const expected = model.add();
        model.append(expected, [tokens!]);
        return {
          sequence: cache.add(),
          expected,
          before: tokens!.slice(0, length - last),
          tokens: tokens!.slice(length - last),
        };
      });
      const older = parts.filter(({ before }) => before.length > 0);
      appendAll(cache, older.map(({ sequence, before }) => ({ sequence, tokens: [before] })));
      const step = appendAll(
        cache,
        parts.map(({ sequence, tokens }) => ({ sequence, tokens: [tokens] })),
      );
      for (const factor of Object.values(sharpness)) {
        const { queryHeads } = config;
        const bits = bitsOf(config, data, { tokens: step.tokens, heads: queryHeads });
        const values = decodeBits(dtype, bits).map((value) => value * factor);
        const queries = encodeBits(dtype, values);
        const out = attendLayer(cache, step, 0, queries);
        let at = 0;
        for (const { expected, tokens } of parts) {
          const end = at + tokens.length * queryHeads * headDim;
          assertAttends(config, expected.layers[0]!.tokens, {
            queries: queries.slice(at, end),
            out: out.slice(at, end),
            scale: 1 / Math.sqrt(headDim),
          });
          at = end;
        }
      }
      example++;
    }
  }
});

test("attention over blocks of one width, and over few blocks and many tokens in 16 bits", (device) => {
  const groups = [8, 4, 16, 1];
  const shapes = [
    ...[2, 3, 4].flatMap((bits) =>
      [128, 64, 96].map((headDim) => ({ bits, headDim, residual: 8 }))
    ),
    { bits: 2, headDim: 128, residual: 2416 },
    { bits: 4, headDim: 64, residual: 3000 },
  ];
  for (const [example, { bits, headDim, residual }] of shapes.entries()) {
    const queryHeads = groups[example % groups.length]!;
    // One block, fewer than warps, and some for every warp.
    const lengths = [90, 330, 2600].map((length) => residual + length);
    using cache = KvCache.create(
      device,
      optionsOf({
        headDim,
        queryHeads,
        dtype: example % 2 === 0 ? "bf16" : "f16",
        sequences: lengths.length,
        tokens: Math.max(...lengths) + 1,
        stepTokens: Math.max(...lengths),
        poolBytes: 2 ** 25,
        residual,
        codec: { keys: fixed(bits), values: fixed(bits) },
      }),
    );
    assertAttendsAfter(cache, { kind: "gaussian", random: randomOf(example) }, {
      lengths,
      last: 1,
      scales: [1 / Math.sqrt(headDim)],
    });
  }
});

test("attention over many pieces, with a scale of one's own", (device) => {
  for (const splits of [1, 3, 1024]) {
    using cache = KvCache.create(
      device,
      optionsOf({ queryHeads: 4, tokens: 9000, stepTokens: 9000, sequences: 3, splits }),
    );
    assertAttendsAfter(cache, { kind: "gaussian", random: randomOf(5) }, {
      lengths: [8700, 2300, 150],
      last: 2,
      scales: [0.125, 0.01, 1],
    });
  }
});

test("attention over more pieces than are merged at once", (device) => {
  const total = 27_500;
  for (
    const [headDim, queryHeads, codec] of [
      [64, 4, fixed(2)],
      [128, 4, fixed(3)],
      [128, 8, fixed(2)],
      [128, 8, packkv(0.2)],
    ] as const
  ) {
    using cache = KvCache.create(
      device,
      optionsOf({
        headDim,
        queryHeads,
        codec: bothParts(codec),
        sequences: 1,
        tokens: total,
        stepTokens: total,
        poolBytes: 2 ** 24,
        splits: 1024,
      }),
    );
    assertAttendsAfter(cache, { kind: "gaussian", random: randomOf(headDim + queryHeads) }, {
      lengths: [total - 1],
      last: 1,
      scales: [1 / Math.sqrt(headDim)],
    });
  }
});

test("a sequence's attention is the same, bit for bit, whatever else is in the batch", (device) => {
  for (
    const [headDim, dtype, splits] of [
      [64, "f16", 1],
      [96, "bf16", 2],
      [128, "bf16", 1024],
      [256, "f16", 1],
    ] as const
  ) {
    const options = optionsOf({
      headDim,
      dtype,
      splits,
      queryHeads: 6,
      kvHeads: 2,
      tokens: 3000,
      stepTokens: 6000,
      sequences: 8,
      poolBytes: 2 ** 24,
    });
    using sample = KvCache.create(device, options);
    const { config } = sample;
    const data: Data = { kind: "gaussian", random: randomOf(headDim) };
    const lengths = [2400, 1, 333, 64, 190];
    const sequences = lengths.map((length, i) => ({
      before: tokensOf(config, data, length),
      tokens: tokensOf(config, data, 1 + i * 3 % 5),
    }));
    const queries = sequences.map(({ tokens }) =>
      bitsOf(config, data, { tokens: tokens[0]!.length, heads: config.queryHeads })
    );
    /** Attention of some of the sequences together, in this order. */
    const together = (order: readonly number[]): Bits[] => {
      using cache = KvCache.create(device, options);
      const parts = order.map((i) => ({ sequence: cache.add(), ...sequences[i]! }));
      for (const { sequence, before } of parts) appendAll(cache, [{ sequence, tokens: before }]);
      const step = appendAll(cache, parts);
      const bits = Uint16Array.from(order.flatMap((i) => [...queries[i]!]));
      const out = attendLayer(cache, step, 0, bits);
      let at = 0;
      return order.map((i) => out.slice(at, at += queries[i]!.length));
    };
    const alone = lengths.map((_, i) => together([i])[0]!);
    for (const order of [[0, 1, 2, 3, 4], [4, 2, 0], [1, 3], [3, 0]]) {
      together(order).forEach((out, place) => {
        const i = order[place]!;
        assertSameBits(out, alone[i]!, `sequence of ${lengths[i]} tokens in ${order}`);
      });
    }
  }
});

// ---- memory ----------------------------------------------------------------------------------------

test("a full pool is an error that changes nothing, and removing a sequence makes room", (device) => {
  using cache = KvCache.create(
    device,
    optionsOf({ layers: 2, kvHeads: 2, headDim: 128, poolBytes: 10 * 65_536, tokens: 2048 }),
  );
  const { config } = cache;
  const model = new ReferenceCache(config);
  const data: Data = { kind: "gaussian", random: randomOf(7) };
  const [one, other] = [0, 1].map(() => ({ sequence: cache.add(), expected: model.add() }));
  const append = ({ sequence, expected }: NonNullable<typeof one>, count: number) => {
    const tokens = tokensOf(config, data, count);
    const step = appendAll(cache, [{ sequence, tokens }]);
    model.append(expected, tokens);
    return step;
  };
  append(one!, 500);
  let step = append(other!, 4);
  const grow = () => {
    while (true) step = append(other!, 100);
  };
  throwsWith(grow, "out-of-memory", "pool");
  const before = cache.statistics();
  assert(before.packedTokens > 500, `${before.packedTokens}`);
  throwsWith(() => cache.begin([{ sequence: other!.sequence, tokens: 500 }]), "out-of-memory");
  assertEquals(cache.statistics(), before);
  for (const { sequence, expected } of [one!, other!]) assertHolds(cache, sequence, expected);
  // The step before goes on.
  assertEquals(step.isOver, false);
  assertEquals(cache.length(other!.sequence), other!.expected.layers[0]!.tokens.length);

  cache.remove(one!.sequence);
  append(other!, 100);
  assertHolds(cache, other!.sequence, other!.expected);
  cache.remove(other!.sequence);
  assertEquals(cache.statistics().freeBytes, config.poolBytes);
});

test("forks share pages, and need some of their own to be cut", (device) => {
  using cache = KvCache.create(
    device,
    optionsOf({
      kvHeads: 4,
      queryHeads: 4,
      headDim: 256,
      poolBytes: 16 * 65_536,
    }),
  );
  const { config } = cache;
  const model = new ReferenceCache(config);
  const data: Data = { kind: "gaussian", random: randomOf(8) };
  const parent = { sequence: cache.add(), expected: model.add() };
  const tokens = tokensOf(config, data, 700);
  appendAll(cache, [{ sequence: parent.sequence, tokens }]);
  model.append(parent.expected, tokens);
  const alone = cache.statistics();
  const held = (alone.poolBytes - alone.freeBytes) / 65_536;
  assert(held >= 4, `${held}`);
  const forks = [0, 1, 2].map(() => ({
    sequence: cache.fork(parent.sequence),
    expected: model.fork(parent.expected),
  }));
  // All pages but the last are shared.
  assertEquals(alone.freeBytes - cache.statistics().freeBytes, 3 * 65_536);
  assertEquals(cache.statistics().packedBytes, 4 * alone.packedBytes);
  // Writing to one leaves the others.
  const family = [parent, ...forks];
  family.forEach(({ sequence, expected }, i) => {
    if (i === 0) return;
    const cut = 700 - 170 * i;
    cache.truncate(sequence, cut);
    model.truncate(expected, cut);
    const more = tokensOf(config, data, 130);
    appendAll(cache, [{ sequence, tokens: more }]);
    model.append(expected, more);
    for (const each of family) assertHolds(cache, each.sequence, each.expected);
  });
  cache.remove(parent.sequence);
  for (const { sequence, expected } of forks) {
    assertHolds(cache, sequence, expected);
    cache.remove(sequence);
  }
  assertEquals(cache.statistics().freeBytes, config.poolBytes);
});

test("every allocated byte is counted", (device) => {
  const options = optionsOf({ layers: 3, kvHeads: 2, sinks: 4, residual: 100, poolBytes: 200_000 });
  using cache = KvCache.create(device, options);
  const found = cache.statistics();
  assertEquals(found.poolBytes, 3 * 65_536);
  assertEquals(found.recentBytes, 3 * 4 * 2 * (4 + 100 + 64) * 2 * 64 * 2);
  assertEquals(
    found.allocatedBytes,
    found.poolBytes + found.recentBytes + found.indexBytes + found.pageTableBytes +
      found.stepBytes + found.workspaceBytes,
  );
  for (const [name, bytes] of Object.entries(found)) {
    const isEmpty = ["packedBytes", "sequences", "tokens", "packedTokens"].includes(name);
    assertEquals(bytes === 0, isEmpty, name);
  }
});

test("creating and disposing caches leaks nothing", (device) => {
  const tokens = 1024;
  using bits: Buffer = device.createBuffer("f16", tokens * 64);
  bits.fill();
  const cycle = () => {
    using cache = KvCache.create(device, optionsOf({ tokens, residual: tokens }));
    cache.begin([{ sequence: cache.add(), tokens }]).append(0, bits, bits);
  };
  for (let i = 0; i < 100; i++) cycle();
  const before = Deno.memoryUsage().rss;
  for (let i = 0; i < 1000; i++) cycle();
  // Each writes 256 KiB: leaking all would be 256 MiB.
  assertLess(Deno.memoryUsage().rss - before, 2 ** 26);
});

// ---- arguments -------------------------------------------------------------------------------------

test("options outside their range are named", (device) => {
  const refuse = (options: Record<string, unknown>, ...fragments: string[]) =>
    throwsWith(
      () => KvCache.create(device, optionsOf(options as Partial<KvCacheOptions>)),
      "invalid-argument",
      "Cannot create the kv cache",
      ...fragments,
    );
  const ranges = {
    layers: [1, 4096],
    kvHeads: [1, 1024],
    queryHeads: [1, 16],
    sequences: [1, 65_536],
    tokens: [1, 2 ** 31 - 1],
    stepTokens: [1, 2 ** 31 - 1],
    poolBytes: [65_536, 2 ** 48],
    residual: [8, 65_536],
    sinks: [0, 65_536],
    splits: [1, 1024],
  };
  for (const [name, [least, most]] of Object.entries(ranges)) {
    for (const value of [least! - 1, most! + 1, 10.5, NaN, -Infinity, 2 ** 53, "9", null]) {
      refuse({ [name]: value }, name, `got ${value}`);
    }
  }
  refuse({ queryHeads: 7, kvHeads: 3 }, "queryHeads", "multiple", "3", "7");
  for (const headDim of [0, 32, 80, 160, 512, 64.5]) refuse({ headDim }, "headDim", `${headDim}`);
  for (const dtype of ["f32", "u8", undefined]) refuse({ dtype }, "dtype", `${dtype}`);
  refuse({ codec: [], layers: 2 }, "list of 2, got 0");
  refuse({ codec: [bothParts(fixed(4))], layers: 2 }, "list of 2, got 1");
  for (const rel of [0, 1 / 255, 1.01, -1, NaN, "1"]) {
    refuse({ codec: { keys: packkv(rel as number), values: fixed(4) } }, "rel", "keys", `${rel}`);
  }
  for (const bits of [0, 9, 2.5, NaN]) {
    const codec = [bothParts(fixed(4)), { keys: fixed(4), values: fixed(bits) }];
    refuse({ codec, layers: 2 }, "bits of the values of layer 1", `got ${bits}`);
  }
  for (const bits of [undefined, 0, 9, "4"]) {
    refuse(
      { codec: bothParts(kivi(bits as number)) },
      "bits of the keys of layer 0",
      `got ${bits}`,
    );
  }
  for (const codec of [{}, { keys: fixed(4) }, bothParts({ quantizer: "raw" } as never)]) {
    refuse({ codec }, "quantizer", "packkv, fixed, kivi or raw16");
  }
  throwsWith(
    () => KvCache.create(device, optionsOf({ layers: 4096, sequences: 65_536, residual: 65_536 })),
    "out-of-memory",
  );
});

test("defaults are filled in", (device) => {
  using cache = KvCache.create(device, optionsOf({ layers: 2 }));
  const codec = { keys: packkv(0.1), values: packkv(0.2) };
  const { residual, sinks, splits, codecs } = cache.config;
  assertEquals({ residual, sinks, splits }, { residual: 128, sinks: 4, splits: 1 });
  assertEquals(codecs, [codec, codec]);
});

test("sequences, tokens and layers that are not there are named", (device) => {
  using cache = KvCache.create(device, optionsOf({ layers: 2, tokens: 100, stepTokens: 120 }));
  const refuse = (work: () => unknown, ...fragments: string[]) =>
    throwsWith(work, "invalid-argument", ...fragments);
  const { config } = cache;
  const data: Data = { kind: "gaussian", random: randomOf(9) };
  const sequence = cache.add();
  const other = cache.add();
  const removed = cache.add();
  cache.remove(removed);
  using elsewhere = KvCache.create(device, optionsOf());
  for (const wrong of [removed, elsewhere.add(), { number: 0 }, undefined as never]) {
    const number = `${wrong?.number}`;
    refuse(() => cache.fork(wrong), "fork", number);
    refuse(() => cache.truncate(wrong, 0), "truncate", number);
    refuse(() => cache.remove(wrong), "remove", number);
    refuse(() => cache.length(wrong), number);
    refuse(() => cache.read(0, wrong), "read", number);
    refuse(() => cache.begin([{ sequence }, { sequence: wrong }]), "begin", number);
  }
  refuse(() => cache.begin([]), "without sequences");
  refuse(() => cache.begin([{ sequence }, { sequence }]), "twice");
  for (const tokens of [0, -1, 1.5, NaN, 2 ** 32]) {
    refuse(() => cache.begin([{ sequence, tokens }]), `got ${tokens}`);
  }
  refuse(() => cache.begin([{ sequence, tokens: 101 }]), "101", "100");
  refuse(() => cache.begin([{ sequence, tokens: 100 }, { sequence: other, tokens: 21 }]), "120");

  appendAll(cache, [{ sequence, tokens: tokensOf(config, data, 50) }]);
  refuse(() => cache.begin([{ sequence, tokens: 51 }]), "51", "50", "100");
  for (const tokens of [-1, 0.5, NaN]) refuse(() => cache.truncate(sequence, tokens), `${tokens}`);
  refuse(() => cache.truncate(sequence, 51), "51", "50");
  for (const layer of [-1, 2, 0.5, NaN]) refuse(() => cache.read(layer, sequence), `got ${layer}`);
  for (const [first, count] of [[0, 51], [50, 1], [0, 0], [-1, 2], [0.5, 1], [0, NaN]] as const) {
    refuse(() => cache.read(0, sequence, { first, count }), `${first}`, `${count}`, "50");
  }
  refuse(() => cache.read(0, sequence, { first: 50 }), "0 tokens from 50");
  refuse(() => cache.read(0, other), "it has 0");
  for (let i = 0; i < 2; i++) cache.add();
  throwsWith(() => cache.add(), "out-of-memory", "4");
  throwsWith(() => cache.fork(sequence), "out-of-memory", "4");
  assertEquals([cache.length(sequence), cache.length(other)], [50, 0]);
});

test("a step takes its own tokens, once a layer, until it is over", (device) => {
  using cache = KvCache.create(device, optionsOf({ layers: 2 }));
  const refuse = (work: () => unknown, ...fragments: string[]) =>
    throwsWith(work, "invalid-argument", ...fragments);
  const sequence = cache.add();
  using token: Buffer = device.createBuffer("f16", 64);
  using queries: Buffer = device.createBuffer("f16", 2 * 64);
  using out: Buffer = device.createBuffer("f16", 2 * 64);
  for (const buffer of [token, queries]) buffer.fill();

  const step = cache.begin([{ sequence }]);
  assertEquals([step.tokens, step.isOver, cache.length(sequence)], [1, false, 1]);
  refuse(() => step.attend(0, queries, out), "Layer 0", "append");
  refuse(() => cache.read(0, sequence), "Layer 0");
  for (
    const work of [
      () => cache.begin([{ sequence }]),
      () => cache.fork(sequence),
      () => cache.truncate(sequence, 0),
      () => cache.remove(sequence),
      () => cache.statistics(),
    ]
  ) refuse(work, "layer 0 still lacks");
  step.append(0, token, token);
  refuse(() => step.append(0, token, token), "Layer 0");
  step.attend(0, queries, out);
  refuse(() => cache.begin([{ sequence }]), "layer 1 still lacks");
  for (const layer of [-1, 2, 0.5, NaN]) {
    refuse(() => step.append(layer, token, token), "append", `got ${layer}`);
    refuse(() => step.attend(layer, queries, out), "attend", `got ${layer}`);
  }
  step.append(1, token, token);
  cache.fork(sequence);
  for (const scale of [NaN, Infinity, 1e39, 0, -1, 1e-46, "1" as never]) {
    refuse(() => step.attend(1, queries, out, { scale }), "scale", `${scale}`);
  }
  step.attend(1, queries, out, { scale: 2 });

  const over = (step: KvCacheStep) => {
    assert(step.isOver);
    refuse(() => step.append(0, token, token), "append", "over");
    refuse(() => step.attend(0, queries, out), "attend", "over");
  };
  const next = cache.begin([{ sequence }]);
  over(step);
  next.append(0, token, token);
  next.append(1, token, token);
  cache.truncate(sequence, 1);
  over(next);
  const last = cache.begin([{ sequence }]);
  for (const layer of [0, 1]) last.append(layer, token, token);
  cache.remove(sequence);
  over(last);

  const long = cache.add();
  const nine = cache.begin([{ sequence: long, tokens: 9 }]);
  using tokens: Buffer = device.createBuffer("f16", 9 * 64);
  using nineQueries: Buffer = device.createBuffer("f16", 9 * 2 * 64);
  using nineOut: Buffer = device.createBuffer("f16", 9 * 2 * 64);
  tokens.fill();
  nine.append(0, tokens, tokens);
  throwsWith(() => nine.attend(0, nineQueries, nineOut), "unsupported", "9", "8");
});

test("buffers that do not fit are refused", (device) => {
  using cache = KvCache.create(device, optionsOf({ dtype: "bf16", kvHeads: 2, queryHeads: 4 }));
  const refuse = (work: () => unknown, ...fragments: string[]) =>
    throwsWith(work, "invalid-argument", ...fragments);
  const step = cache.begin([{ sequence: cache.add(), tokens: 2 }]);
  const length = 2 * 2 * 64;
  using good: Buffer = device.createBuffer("bf16", length);
  using half: Buffer = device.createBuffer("f16", length);
  using large: Buffer = device.createBuffer("bf16", 4 * length);
  using other = Device.open({ backend: device.backend });
  using foreign: Buffer = other.createBuffer("bf16", length);
  large.fill();
  for (
    const [wrong, ...fragments] of [
      [half, "bf16", "f16"],
      [large, "[2, 2, 64]", `${4 * length}`],
      [large.view(0, length - 1), `${length - 1}`],
      [large.view(1, length), "16 bytes", "2"],
      [foreign, "another device"],
    ] as const
  ) {
    refuse(() => step.append(0, wrong, good), ...fragments);
    refuse(() => step.append(0, good, wrong), ...fragments);
  }
  refuse(() => step.append(0, half, good), "append: keys");
  refuse(() => step.append(0, good, half), "append: values");
  step.append(0, large.view(8, length), large.view(length, length));
  const queries = large.view(0, 2 * length);
  const out = large.view(2 * length, 2 * length);
  refuse(() => step.attend(0, good, out), "attend: queries", "[2, 4, 64]");
  refuse(() => step.attend(0, queries, good), "attend: out", "[2, 4, 64]");
  refuse(() => step.attend(0, queries, queries), "overlap");
  refuse(() => step.attend(0, queries, large.view(8, 2 * length)), "overlap", "16");
  step.attend(0, queries, out);

  const gone: Buffer = device.createBuffer("bf16", 2 * length);
  gone[Symbol.dispose]();
  throwsWith(() => step.attend(0, gone, out), "disposed");
});

test("after disposal everything throws, and disposing again does nothing", (device) => {
  using token: Buffer = device.createBuffer("f16", 64);
  using queries: Buffer = device.createBuffer("f16", 128);
  using out: Buffer = device.createBuffer("f16", 128);
  token.fill();
  const refuse = (cache: KvCache, sequence: KvSequence, step: KvCacheStep) => {
    assert(cache.isDisposed && step.isOver);
    for (
      const work of [
        () => cache.add(),
        () => cache.fork(sequence),
        () => cache.truncate(sequence, 0),
        () => cache.remove(sequence),
        () => cache.length(sequence),
        () => cache.begin([{ sequence }]),
        () => cache.read(0, sequence),
        () => cache.check(),
        () => cache.statistics(),
        () => step.append(0, token, token),
        () => step.attend(0, queries, out),
      ]
    ) throwsWith(work, "disposed");
  };
  const cache = KvCache.create(device, optionsOf());
  const sequence = cache.add();
  const step = cache.begin([{ sequence }]);
  step.append(0, token, token);
  cache[Symbol.dispose]();
  cache[Symbol.dispose]();
  refuse(cache, sequence, step);

  const closed = Device.open({ backend: device.backend });
  const orphan = KvCache.create(closed, optionsOf());
  const last = orphan.add();
  const lastStep = orphan.begin([{ sequence: last }]);
  closed[Symbol.dispose]();
  refuse(orphan, last, lastStep);
  orphan[Symbol.dispose]();
  throwsWith(() => KvCache.create(closed, optionsOf()), "disposed");
});
