/**
 * The growing cache with raw16 and kivi, alone and beside other codecs, on every backend: what they keep, how many bytes
 * they take, and attention over them against double precision.
 */
import { assert, assertEquals, assertLessOrEqual, assertRejects, assertThrows } from "@std/assert";
import { Device } from "../src/device/mod.ts";
import { PackhorseError } from "../src/error.ts";
import {
  KvCache,
  type KvCacheCodec,
  type KvCacheConfig,
  type KvCachePartCodec,
} from "../src/kv/mod.ts";
import {
  attend,
  type Bits,
  decodeBits,
  encodeBits,
  ReferenceCache,
  type Token,
} from "./kv_cache_reference.ts";
import { backends } from "./backends.ts";
import {
  appendAll,
  assertHolds,
  assertSameBits,
  attendLayer,
  bitsOf,
  bothParts,
  type Data,
  fixed,
  kivi,
  optionsOf,
  packkv,
  prefillLayer,
  raw16,
  readLayer,
  tokensOf,
} from "./kv_cache_support.ts";
import { withPhkvEntry } from "./forge_phkv.ts";
import { type DataKind, randomOf } from "./kv_cases.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

/** A test on every backend. */
function test(name: string, work: (device: Device) => void | Promise<void>): void {
  for (const backend of backends()) {
    Deno.test(`kv cache codecs: ${backend}: ${name}`, async () => {
      using device = Device.open({ backend });
      await work(device);
    });
  }
}

/** Square root of the sum of squares of the differences, over that of `expected`. */
function relativeError(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  let difference = 0;
  let total = 0;
  for (let i = 0; i < expected.length; i++) {
    difference += (actual[i]! - expected[i]!) ** 2;
    total += expected[i]! ** 2;
  }
  return total === 0 ? Math.sqrt(difference) : Math.sqrt(difference / total);
}

/** Asserts that `out` is attention over a sequence's tokens, besides rounding to its type. */
function assertAttends(
  config: KvCacheConfig,
  tokens: readonly Token[],
  { queries, out, what }: { queries: Bits; out: Bits; what: string },
): void {
  const expected = attend(config, tokens, queries, 1 / Math.sqrt(config.headDim));
  const rounded = decodeBits(config.dtype, encodeBits(config.dtype, Float32Array.from(expected)));
  const error = relativeError(decodeBits(config.dtype, out), expected);
  const bound = 1e-3 + relativeError(rounded, expected);
  assertLessOrEqual(error, bound, `${what} over ${tokens.length} tokens is off by ${error}`);
}

const parts = [raw16, kivi(2), kivi(4), kivi(8), packkv(0.1), fixed(6), kivi(1), kivi(5)];
const isNew = ({ quantizer }: KvCachePartCodec) => quantizer === "raw16" || quantizer === "kivi";
const pairs: readonly KvCacheCodec[] = parts.flatMap((keys) =>
  parts.flatMap((values) => isNew(keys) || isNew(values) ? [{ keys, values }] : [])
);

/** What queries are multiplied by. */
const sharpness = { random: 1, peaked: 8, flat: 0.02 };

test("attention over any two codecs is that of double precision", (device) => {
  const kinds: DataKind[] = [
    "gaussian",
    "outlier channels",
    "gaussian",
    "constant tokens",
    "ramps",
  ];
  const groups = [1, 4, 2, 7, 3, 16, 8];
  pairs.forEach((codec, example) => {
    const group = groups[example % groups.length]!;
    const queryTokens = 1 + example % 3;
    const dtype = example % 3 === 2 ? "bf16" : "f16";
    const kind = kinds[example % kinds.length]!;
    using cache = KvCache.create(
      device,
      optionsOf({
        headDim: [64, 96, 128, 256][example % 4]!,
        kvHeads: group > 4 ? 1 : 2,
        queryHeads: group > 4 ? group : 2 * group,
        dtype,
        residual: [8, 64][example % 2]!,
        sinks: [0, 4, 9][example % 3]!,
        codec,
      }),
    );
    const { config } = cache;
    const { queryHeads, headDim } = config;
    const data: Data = { kind, random: randomOf(example) };
    const model = new ReferenceCache(config);
    const members = [140, 330].map((length) => {
      const [tokens] = tokensOf(config, data, length);
      const expected = model.add();
      model.append(expected, [tokens!]);
      const sequence = cache.add();
      return { sequence, expected, tokens: tokens! };
    });
    appendAll(
      cache,
      members.map(({ sequence, tokens }) => ({
        sequence,
        tokens: [tokens.slice(0, -queryTokens)],
      })),
    );
    const step = appendAll(
      cache,
      members.map(({ sequence, tokens }) => ({ sequence, tokens: [tokens.slice(-queryTokens)] })),
    );
    for (const { sequence, expected } of members) assertHolds(cache, sequence, expected);
    for (const [name, factor] of Object.entries(sharpness)) {
      const gaussian: Data = { ...data, kind: "gaussian" };
      const bits = bitsOf(config, gaussian, { tokens: step.tokens, heads: queryHeads });
      const queries = encodeBits(dtype, decodeBits(dtype, bits).map((value) => value * factor));
      const out = attendLayer(cache, step, 0, queries);
      members.forEach(({ expected }, i) => {
        const size = queryTokens * queryHeads * headDim;
        assertAttends(config, expected.layers[0]!.tokens, {
          queries: queries.slice(i * size, (i + 1) * size),
          out: out.slice(i * size, (i + 1) * size),
          what: `${name} attention of ${kind} with ${
            JSON.stringify({ codec, headDim, dtype, group })
          }`,
        });
      });
    }
  });
});

test("raw16 keeps every bit, packed, shared, cut and restored", (device) => {
  for (const dtype of ["f16", "bf16"] as const) {
    for (const headDim of [64, 96, 256]) {
      const codec = [bothParts(raw16), { keys: packkv(0.1), values: raw16 }, {
        keys: raw16,
        values: kivi(3),
      }];
      using cache = KvCache.create(
        device,
        optionsOf({ layers: 3, headDim, kvHeads: 2, dtype, codec, residual: 8, sinks: 3 }),
      );
      const { config } = cache;
      const random = randomOf(headDim);
      const tokens = tokensOf(config, { kind: "gaussian", random }, 300);
      // Any bits at all: zeros of either sign, infinities, NaNs with payloads.
      const scramble = (bits: Bits) =>
        bits.forEach((_, i) => bits[i] = Math.floor(random() * 65_536));
      for (const layer of [0, 1, 2]) {
        for (const token of tokens[layer]!) {
          if (layer < 2) scramble(token.values);
          if (layer !== 1) scramble(token.keys);
        }
      }
      const kept = (layer: number, part: "keys" | "values", first: number, end: number) =>
        Uint16Array.from(tokens[layer]!.slice(first, end).flatMap((token) => [...token[part]]));
      const assertKeeps = (sequence: ReturnType<typeof cache.add>, length: number) => {
        for (
          const [layer, part] of [[0, "keys"], [0, "values"], [1, "values"], [2, "keys"]] as const
        ) {
          const held = readLayer(cache, layer, sequence)[part];
          assertSameBits(held, kept(layer, part, 0, length), `${part} of layer ${layer}`);
        }
      };
      const sequence = cache.add();
      appendAll(cache, [{ sequence, tokens }]);
      assertEquals(cache.statistics().packedTokens, 256);
      cache.check();
      assertKeeps(sequence, 300);
      const fork = cache.fork(sequence);
      for (const length of [250, 131, 129, 3 + 64]) {
        cache.truncate(fork, length);
        assertKeeps(fork, length);
      }
      const rest = tokens.map((layer) => layer.slice(3 + 64));
      appendAll(cache, [{ sequence: fork, tokens: rest }]);
      assertKeeps(fork, 300);
      assertKeeps(sequence, 300);
      cache.check();
    }
  }
});

test("only what is quantised must be finite", (device) => {
  for (const keys of [packkv(0.1), kivi(4)]) {
    using cache = KvCache.create(
      device,
      optionsOf({ codec: { keys, values: raw16 }, residual: 8, sinks: 0 }),
    );
    const model = new ReferenceCache(cache.config);
    const [sequence, expected] = [cache.add(), model.add()];
    const tokens = tokensOf(cache.config, { kind: "gaussian", random: randomOf(3) }, 150);
    tokens[0]![20]!.values.fill(0x7e01);
    tokens[0]![31]!.keys[5] = 0xfc00;
    tokens[0]![90]!.keys.fill(0x7c01);
    appendAll(cache, [{ sequence, tokens }]);
    model.append(expected, tokens);
    assertHolds(cache, sequence, expected);
    const error = assertThrows(() => cache.check(), PackhorseError, "Token 31 of sequence 0");
    assertEquals(error.code, "non-finite");
    cache.check();
  }
});

test("kivi has a scale for each channel of keys, and for 64 channels of each token's values", (device) => {
  for (const headDim of [64, 96, 128, 256]) {
    for (const dtype of ["f16", "bf16"] as const) {
      const heads = 3;
      const codec = [bothParts(kivi(1)), bothParts(kivi(2)), bothParts(fixed(2))];
      using cache = KvCache.create(
        device,
        optionsOf({
          layers: 3,
          kvHeads: heads,
          queryHeads: heads,
          headDim,
          dtype,
          codec,
          residual: 8,
          sinks: 0,
        }),
      );
      const random = randomOf(headDim);
      // Levels of a scale that only they share, with a zero point of one or minus one: exact in few bits.
      const channels = heads * headDim;
      const tokens = (levels: number): Token[] =>
        Array.from({ length: 140 }, (_, token) => {
          const keys = new Float32Array(channels);
          const values = new Float32Array(channels);
          for (let channel = 0; channel < channels; channel++) {
            const group = Math.floor(channel / headDim) * 4 + Math.floor(channel % headDim / 64);
            // The least and the greatest level are in every group.
            const level = (at: number) =>
              at % 64 < 2 ? at % 2 * (levels - 1) : Math.floor(random() * levels);
            keys[channel] = (level(token) + 1) * 2 ** (channel % 11 - 5) *
              (channel % 3 === 0 ? -1 : 1);
            values[channel] = (level(channel % headDim) + 1) * 2 ** ((token + group) % 9 - 4);
          }
          return { keys: encodeBits(dtype, keys), values: encodeBits(dtype, values) };
        });
      const layers = [tokens(2), tokens(4), tokens(4)];
      const sequence = cache.add();
      appendAll(cache, [{ sequence, tokens: layers }]);
      const differences = layers.map((layer, i) => {
        const held = readLayer(cache, i, sequence);
        return (["keys", "values"] as const).map((part) => {
          const expected = layer.flatMap((token) => [...token[part]]);
          return held[part].filter((bits, at) => bits !== expected[at]).length;
        });
      });
      assertEquals(differences.slice(0, 2), [[0, 0], [0, 0]]);
      assert(differences[2]!.every((count) => count > 1000), `${differences[2]}`);
    }
  }
});

test("records take the bytes of their values and scales, and no more", (device) => {
  for (const headDim of [64, 96, 128, 256]) {
    const [heads, blocks] = [2, 3];
    const scales = { keys: 4 * headDim, values: 4 * 64 * Math.ceil(headDim / 64) };
    const bytesOf = (codec: KvCachePartCodec, part: "keys" | "values") =>
      codec.quantizer === "kivi" ? scales[part] + 8 * headDim * codec.bits : 128 * headDim;
    for (const keys of [raw16, kivi(2), kivi(7)]) {
      for (const values of [raw16, kivi(4), kivi(8)]) {
        using cache = KvCache.create(
          device,
          optionsOf({ kvHeads: heads, headDim, codec: { keys, values }, residual: 8, sinks: 0 }),
        );
        const data: Data = { kind: "zeros", random: randomOf(1) };
        const tokens = tokensOf(cache.config, data, 64 * blocks + 8);
        appendAll(cache, [{ sequence: cache.add(), tokens }]);
        const record = 16 + bytesOf(keys, "keys") + bytesOf(values, "values");
        assertEquals(cache.statistics().packedBytes, blocks * heads * record);
      }
    }
  }
});

test("the largest records lie across pages, however tokens come", (device) => {
  const codecs = [bothParts(raw16), { keys: raw16, values: kivi(8) }, {
    keys: fixed(8),
    values: raw16,
  }];
  for (const [i, codec] of codecs.entries()) {
    const dtype = i === 1 ? "bf16" : "f16";
    using cache = KvCache.create(
      device,
      optionsOf({
        headDim: 256,
        kvHeads: 3,
        queryHeads: 3,
        dtype,
        codec,
        residual: 8,
        poolBytes: 2 ** 24,
      }),
    );
    const { config } = cache;
    const model = new ReferenceCache(config);
    const random = randomOf(i);
    const data: Data = { kind: "gaussian", random };
    const members = [0, 1].map(() => ({ sequence: cache.add(), expected: model.add() }));
    while (cache.length(members[0]!.sequence) < 600) {
      const parts = members.map((member) => ({
        ...member,
        tokens: tokensOf(config, data, 1 + Math.floor(random() * 120)),
      }));
      appendAll(cache, parts);
      for (const { expected, tokens } of parts) model.append(expected, tokens);
    }
    const last = members.map((member) => ({ ...member, tokens: tokensOf(config, data, 1) }));
    const step = appendAll(cache, last);
    const queries = bitsOf(config, data, { tokens: step.tokens, heads: config.queryHeads });
    const out = attendLayer(cache, step, 0, queries);
    last.forEach(({ sequence, expected, tokens }, at) => {
      model.append(expected, tokens);
      assertHolds(cache, sequence, expected);
      const slice = (bits: Bits) => bits.slice(at * 3 * 256, (at + 1) * 3 * 256);
      assertAttends(config, expected.layers[0]!.tokens, {
        queries: slice(queries),
        out: slice(out),
        what: JSON.stringify(codec),
      });
    });
  }
});

test("a sequence's attention is the same, bit for bit, whatever else is in the batch", (device) => {
  const codecs = [bothParts(raw16), bothParts(kivi(2)), { keys: kivi(6), values: raw16 }];
  for (const [i, codec] of codecs.entries()) {
    const headDim = [128, 96, 256][i]!;
    const options = optionsOf({
      headDim,
      dtype: i === 1 ? "bf16" : "f16",
      kvHeads: 1,
      queryHeads: 6,
      tokens: 3000,
      stepTokens: 4000,
      poolBytes: 2 ** 24,
      codec,
    });
    using sample = KvCache.create(device, options);
    const { config } = sample;
    const data: Data = { kind: "gaussian", random: randomOf(i) };
    const sequences = [2100, 190, 700].map((length, at) => ({
      before: tokensOf(config, data, length),
      tokens: tokensOf(config, data, 1 + at % 2),
    }));
    const queries = sequences.map(({ tokens }) =>
      bitsOf(config, data, { tokens: tokens[0]!.length, heads: config.queryHeads })
    );
    /** Attention of some of the sequences together, in this order. */
    const together = (order: readonly number[]): Bits[] => {
      using cache = KvCache.create(device, options);
      const parts = order.map((at) => ({ sequence: cache.add(), ...sequences[at]! }));
      for (const { sequence, before } of parts) appendAll(cache, [{ sequence, tokens: before }]);
      const step = appendAll(cache, parts);
      const out = attendLayer(
        cache,
        step,
        0,
        Uint16Array.from(order.flatMap((at) => [...queries[at]!])),
      );
      let begin = 0;
      return order.map((at) => out.slice(begin, begin += queries[at]!.length));
    };
    const alone = sequences.map((_, at) => together([at])[0]!);
    for (const order of [[0, 1, 2], [2, 0]]) {
      together(order).forEach((out, place) => {
        const at = order[place]!;
        assertSameBits(out, alone[at]!, `sequence ${at} in ${order} with ${JSON.stringify(codec)}`);
      });
    }
  }
});

test("constant channels and tokens of zeros do not blur small values", (device) => {
  for (const [example, part] of [...parts, fixed(8), fixed(2), packkv(0.02)].entries()) {
    const dtype = example % 2 === 0 ? "f16" : "bf16";
    using cache = KvCache.create(
      device,
      optionsOf({
        headDim: [64, 128, 96, 256][example % 4]!,
        dtype,
        residual: 8,
        sinks: 0,
        codec: bothParts(part),
      }),
    );
    const { config } = cache;
    const { headDim, queryHeads } = config;
    const data: Data = { kind: "gaussian", random: randomOf(example) };
    const [tokens] = tokensOf(config, data, 330);
    tokens!.forEach(({ keys, values }, i) => {
      const bits = (value: number) => encodeBits(dtype, Float32Array.of(value))[0]!;
      keys[5] = bits(20);
      keys[9] = bits(0);
      const scaled = decodeBits(dtype, values).map((value) => i % 7 === 1 ? 0 : value * 0.01);
      values.set(encodeBits(dtype, scaled));
    });
    const model = new ReferenceCache(config);
    const [sequence, expected] = [cache.add(), model.add()];
    const step = (count: number, first: number) =>
      appendAll(cache, [{ sequence, tokens: [tokens!.slice(first, first + count)] }]);
    step(329, 0);
    const last = step(1, 329);
    model.append(expected, [tokens!]);
    assertHolds(cache, sequence, expected);
    const queries = bitsOf(config, data, { tokens: 1, heads: queryHeads });
    const out = attendLayer(cache, last, 0, queries);
    const what = `${JSON.stringify(part)}, ${headDim}, ${dtype}`;
    assertAttends(config, expected.layers[0]!.tokens, { queries, out, what });
  }
});

test("prefill over any two codecs is attention of double precision", (device) => {
  const kinds: DataKind[] = [
    "outlier channels",
    "gaussian",
    "ramps",
    "gaussian",
    "constant tokens",
    "halves of a step",
  ];
  pairs.forEach((codec, example) => {
    const group = [4, 1, 16, 3, 7][example % 5]!;
    const dtype = example % 3 === 1 ? "bf16" : "f16";
    const kind = kinds[example % kinds.length]!;
    using cache = KvCache.create(
      device,
      optionsOf({
        headDim: [64, 96, 128, 256][(example + Math.floor(example / 8)) % 4]!,
        kvHeads: group > 4 ? 1 : 2,
        queryHeads: group > 4 ? group : 2 * group,
        dtype,
        residual: [64, 8][example % 2]!,
        sinks: [4, 0, 9][example % 3]!,
        codec,
      }),
    );
    const { config } = cache;
    const { queryHeads, headDim } = config;
    const data: Data = { kind, random: randomOf(1000 + example) };
    const model = new ReferenceCache(config);
    // A sequence for each sharpness: some tokens before, some in the step.
    const members = Object.entries(sharpness).map(([name, factor], i) => {
      const [before] = tokensOf(config, data, [140, 205, 90][i]!);
      const expected = model.add();
      model.append(expected, [before!]);
      const [tokens] = tokensOf(config, data, [12, 9, 25][(example + i) % 3]!);
      const queries = bitsOf(config, { ...data, kind: "gaussian" }, {
        tokens: tokens!.length,
        heads: queryHeads,
        factor,
      });
      return { name, sequence: cache.add(), expected, before: before!, tokens: tokens!, queries };
    });
    appendAll(cache, members.map(({ sequence, before }) => ({ sequence, tokens: [before] })));
    const step = cache.begin(
      members.map(({ sequence, tokens }) => ({ sequence, tokens: tokens.length })),
    );
    const out = prefillLayer(cache, step, 0, {
      tokens: members.flatMap(({ tokens }) => tokens),
      bits: Uint16Array.from(members.flatMap(({ queries }) => [...queries])),
    });
    let at = 0;
    for (const { name, sequence, expected, tokens, queries } of members) {
      // What comes with the step counts as it is, even if it is packed at once.
      assertAttends(config, [...expected.layers[0]!.tokens, ...tokens], {
        queries,
        out: out.slice(at, at += queries.length),
        what: `${name} prefill of ${kind} with ${JSON.stringify({ codec, headDim, dtype, group })}`,
      });
      model.append(expected, [tokens]);
      assertHolds(cache, sequence, expected);
    }
  });
});

test("prefill over the largest records, which lie across pages", (device) => {
  for (
    const [example, codec] of [bothParts(raw16), bothParts(kivi(8)), {
      keys: raw16,
      values: fixed(8),
    }, { keys: fixed(8), values: raw16 }].entries()
  ) {
    using cache = KvCache.create(
      device,
      optionsOf({
        headDim: 256,
        kvHeads: 3,
        queryHeads: 3,
        dtype: example % 2 === 0 ? "f16" : "bf16",
        residual: 8,
        codec,
        poolBytes: 2 ** 24,
      }),
    );
    const { config } = cache;
    const data: Data = { kind: "gaussian", random: randomOf(example) };
    const model = new ReferenceCache(config);
    const [sequence, expected] = [cache.add(), model.add()];
    for (const count of [450, 20]) {
      const [tokens] = tokensOf(config, data, count);
      const queries = bitsOf(config, data, { tokens: count, heads: config.queryHeads });
      const step = cache.begin([{ sequence, tokens: count }]);
      const out = prefillLayer(cache, step, 0, { tokens: tokens!, bits: queries });
      assertAttends(config, [...expected.layers[0]!.tokens, ...tokens!], {
        queries,
        out,
        what: `prefill of ${count} tokens with ${JSON.stringify(codec)}`,
      });
      model.append(expected, [tokens!]);
      assertHolds(cache, sequence, expected);
    }
  }
});

test("saved sequences come back as they were, and a scale that no encoder writes is refused", async (device) => {
  using folder = new TemporaryFolder();
  const codecs = [bothParts(raw16), bothParts(kivi(3)), { keys: kivi(8), values: packkv(0.2) }];
  for (const [i, codec] of codecs.entries()) {
    const options = optionsOf({
      headDim: [256, 96, 128][i]!,
      kvHeads: 2,
      residual: 8,
      sinks: 0,
      codec,
    });
    using cache = KvCache.create(device, options);
    const model = new ReferenceCache(cache.config);
    const [sequence, expected] = [cache.add(), model.add()];
    const tokens = tokensOf(cache.config, { kind: "gaussian", random: randomOf(i) }, 300);
    appendAll(cache, [{ sequence, tokens }]);
    model.append(expected, tokens);
    const path = folder.file(`${i}.phkv`);
    await cache.save(sequence, path);
    assertHolds(cache, await cache.load(path), expected);
    if (codec.keys.quantizer !== "kivi") continue;
    // Of the first record of the first block, after its params and header.
    const first = (codec.values.quantizer === "packkv" ? 528 : 0) + 16;
    const forged = withPhkvEntry(await Deno.readFile(path), 0, (block) => {
      block.setUint16(first, 0x7c00, true);
    });
    await Deno.writeFile(path, forged);
    const error = await assertRejects(() => cache.load(path), PackhorseError);
    assertEquals(error.code, "corrupt", error.message);
    assert(error.message.includes("a scale is not positive and finite"), error.message);
  }
});
