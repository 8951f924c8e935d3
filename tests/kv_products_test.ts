/**
 * `KvCache.score` and `KvCache.weigh` on every backend that opens here (PACKHORSE_BACKEND names one), against double
 * precision over what `KvCache.read` says.
 */
import { assertEquals, assertLessOrEqual } from "@std/assert";
import type { Device, DeviceBuffer } from "../src/device/mod.ts";
import { KvCache, type KvCacheOptions, type KvSequence } from "../src/kv/mod.ts";
import {
  bitsOf,
  bothParts,
  type Buffer,
  type Data,
  fixed,
  optionsOf,
  packkv,
  readLayer,
  testOnDevices as test,
  throwsWith,
  tokensOf,
  upload,
} from "./kv_cache_support.ts";
import { type Bits, decodeBits, joinTokens } from "./kv_cache_reference.ts";
import { randomOf } from "./kv_cases.ts";

/** Half a step of each dtype, relative: what `read` rounds away of packed tokens at most. */
const ROUNDING = { f16: 2 ** -11, bf16: 2 ** -9 } as const;

/** Appends tokens to a sequence, in every layer. */
function append(cache: KvCache, sequence: KvSequence, data: Data, count: number): void {
  const { device, config } = cache;
  const step = cache.begin([{ sequence, tokens: count }]);
  tokensOf(config, data, count).forEach((tokens, layer) => {
    const joined = joinTokens(config, tokens);
    using keys = upload(device, config.dtype, joined.keys);
    using values = upload(device, config.dtype, joined.values);
    step.append(layer, keys, values);
  });
}

function uploadFloats(device: Device, values: Float32Array<ArrayBuffer>): DeviceBuffer<"f32"> {
  const buffer = device.createBuffer("f32", values.length);
  buffer.upload(values);
  return buffer;
}

function score(
  { device, config }: KvCache,
  work: (queries: Buffer, out: DeviceBuffer<"f32">) => void,
  { bits, length }: { bits: Bits; length: number },
): Float32Array {
  using queries = upload(device, config.dtype, bits);
  using out = device.createBuffer("f32", config.queryHeads * length);
  out.fill(0xff); // NaN
  work(queries, out);
  return out.download(new Float32Array(out.length));
}

function weigh(
  { device, config: { queryHeads, headDim } }: KvCache,
  work: (weights: DeviceBuffer<"f32">, out: DeviceBuffer<"f32">) => void,
  values: Float32Array<ArrayBuffer>,
): Float32Array {
  using weights = uploadFloats(device, values);
  using out = device.createBuffer("f32", queryHeads * headDim);
  out.fill(0xff); // NaN
  work(weights, out);
  return out.download(new Float32Array(out.length));
}

/** Sums of squares tell whether each head's row is within 1e-3, besides what rounding by `read` explains. */
function assertRowsClose(
  actual: Float32Array,
  expected: Float64Array,
  { columns, slack, what }: { columns: number; slack: Float64Array; what: string },
): void {
  assertEquals(actual.length, expected.length, what);
  for (let row = 0; row < expected.length / columns; row++) {
    let [difference, total] = [0, 0];
    for (let i = row * columns; i < (row + 1) * columns; i++) {
      difference += (actual[i]! - expected[i]!) ** 2;
      total += expected[i]! ** 2;
    }
    const bound = 1e-3 * Math.sqrt(total) + slack[row]!;
    assertLessOrEqual(Math.sqrt(difference), bound, `${what}, head ${row}`);
  }
}

/** Both products of a sequence in a layer, twice, against double precision. */
function assertProducts(
  cache: KvCache,
  layer: number,
  sequence: KvSequence,
  { random, what, scale = 1 / Math.sqrt(cache.config.headDim) }: {
    random: () => number;
    what: string;
    scale?: number;
  },
): void {
  const { config } = cache;
  const { queryHeads, kvHeads, headDim, dtype } = config;
  const length = cache.length(sequence);
  const held = readLayer(cache, layer, sequence);
  const keys = decodeBits(dtype, held.keys);
  const values = decodeBits(dtype, held.values);
  const bits = bitsOf(config, { kind: "gaussian", random }, { tokens: 1, heads: queryHeads });
  const queries = decodeBits(dtype, bits);
  // Of either sign, and over many powers of ten.
  const weights = Float32Array.from(
    { length: queryHeads * length },
    () => (random() - 0.4) * 10 ** (6 * (random() - 0.5)),
  );

  const scores = new Float64Array(queryHeads * length);
  const sums = new Float64Array(queryHeads * headDim);
  const scoreSlack = new Float64Array(queryHeads);
  const sumSlack = new Float64Array(queryHeads);
  for (let head = 0; head < queryHeads; head++) {
    const kvHead = Math.floor(head * kvHeads / queryHeads);
    for (let token = 0; token < length; token++) {
      const row = (token * kvHeads + kvHead) * headDim;
      const weight = weights[head * length + token]!;
      for (let channel = 0; channel < headDim; channel++) {
        const product = queries[head * headDim + channel]! * keys[row + channel]! * scale;
        scores[head * length + token]! += product;
        scoreSlack[head]! += product ** 2;
        sums[head * headDim + channel]! += weight * values[row + channel]!;
        sumSlack[head]! += (weight * values[row + channel]!) ** 2;
      }
    }
    // Roundings are independent, at most half a step each: their squares add up.
    scoreSlack[head] = ROUNDING[dtype] * Math.sqrt(scoreSlack[head]!);
    sumSlack[head] = ROUNDING[dtype] * Math.sqrt(sumSlack[head]!);
  }

  const score1 = () =>
    score(cache, (queries, out) => cache.score(layer, sequence, queries, out, { scale }), {
      bits,
      length,
    });
  const weigh1 = () =>
    weigh(cache, (from, out) => cache.weigh(layer, sequence, from, out), weights);
  const foundScores = score1();
  const foundSums = weigh1();
  assertRowsClose(foundScores, scores, {
    columns: length,
    slack: scoreSlack,
    what: `${what}: scores`,
  });
  assertRowsClose(foundSums, sums, { columns: headDim, slack: sumSlack, what: `${what}: sums` });
  assertEquals(score1(), foundScores, `${what}: scores, again`);
  assertEquals(weigh1(), foundSums, `${what}: sums, again`);
}

const codecs = [...[1, 2, 3, 4, 5, 8].map(fixed), ...[0.1, 0.2, 1, 1 / 254].map(packkv)];

test("score and weigh are products of double precision", (device) => {
  let example = 0;
  for (const headDim of [64, 96, 128, 256]) {
    for (const group of [1, 4, 14]) {
      for (const dtype of ["f16", "bf16"] as const) {
        const random = randomOf(500 + ++example);
        const codec = () => codecs[Math.floor(random() * codecs.length)]!;
        const kvHeads = group === 1 ? 3 : 1;
        using cache = KvCache.create(
          device,
          optionsOf({
            headDim,
            kvHeads,
            queryHeads: group * kvHeads,
            dtype,
            residual: [8, 64, 128, 77][example % 4]!,
            sinks: [4, 0, 9, 70, 1][example % 5]!,
            codec: { keys: codec(), values: codec() },
          }),
        );
        const data: Data = { kind: "gaussian", random };
        const sequence = cache.add();
        const what = `example ${example}: headDim ${headDim}, group ${group}, ${dtype}`;
        for (
          const count of [1, 2 + Math.floor(random() * 60), 100 + Math.floor(random() * 150)]
        ) {
          append(cache, sequence, data, count);
          const length = cache.length(sequence);
          assertProducts(cache, 0, sequence, { random, what: `${what}, ${length} tokens` });
        }
      }
    }
  }
});

test("score and weigh over many pieces, beside other sequences and layers", (device) => {
  for (const [dtype, total] of [["f16", 3003], ["bf16", 5000]] as const) {
    const random = randomOf(total);
    const data: Data = { kind: "gaussian", random };
    const options: KvCacheOptions = {
      layers: 2,
      kvHeads: 2,
      queryHeads: 2,
      dtype,
      tokens: 6000,
      stepTokens: 6000,
      poolBytes: 2 ** 24,
      headDim: 64,
      sequences: 4,
      sinks: 4,
      codec: [{ keys: packkv(0.1), values: packkv(0.2) }, { keys: fixed(3), values: fixed(2) }],
    };
    using cache = KvCache.create(device, options);
    const others = [cache.add(), cache.add()];
    const sequence = cache.add();
    append(cache, others[1]!, data, 300);
    append(cache, sequence, data, total - 3);
    append(cache, sequence, data, 3);
    for (const layer of [0, 1]) {
      const what = `${total} tokens, layer ${layer}`;
      assertProducts(cache, layer, sequence, { random, what, scale: 0.5 });
    }
    // Decode attention shares the scratch memory, whose counters must be as it left them.
    append(cache, others[0]!, data, 70);
    const step = cache.begin([{ sequence }]);
    using token = device.createBuffer(dtype, 2 * 64);
    token.upload(bitsOf(cache.config, data, { tokens: 1, heads: 2 }));
    using before = device.createBuffer(dtype, 2 * 64);
    using after = device.createBuffer(dtype, 2 * 64);
    for (const layer of [0, 1]) step.append(layer, token, token);
    step.attend(0, token, before);
    assertProducts(cache, 0, sequence, { random, what: `${total + 1} tokens` });
    step.attend(0, token, after);
    assertEquals(after.download(), before.download());
  }
});

test("score and weigh where a warp of a GPU has several blocks", (device) => {
  const total = 9_700;
  // Narrow records find room in shared memory all at once, wide ones take turns.
  for (const codec of [fixed(2), packkv(1 / 254)]) {
    const random = randomOf(total);
    const data: Data = { kind: "gaussian", random };
    using cache = KvCache.create(
      device,
      optionsOf({
        kvHeads: 16,
        queryHeads: 80,
        sequences: 1,
        tokens: total,
        stepTokens: total,
        poolBytes: 2 ** 26,
        codec: bothParts(codec),
      }),
    );
    const sequence = cache.add();
    append(cache, sequence, data, total - 300);
    append(cache, sequence, data, 300);
    const what = JSON.stringify(codec);
    assertProducts(cache, 0, sequence, { random, what });
  }
});

test("score and weigh of data far from 0, and of every kind", (device) => {
  const kinds = [
    "large offset, tiny range",
    "outlier channels",
    "constant tokens",
    "zeros",
    "ramps",
  ];
  for (const kind of kinds as Data["kind"][]) {
    for (const dtype of ["f16", "bf16"] as const) {
      const random = randomOf(kind.length);
      using cache = KvCache.create(
        device,
        optionsOf({ dtype, residual: 16, codec: bothParts(packkv(0.1)) }),
      );
      const sequence = cache.add();
      append(cache, sequence, { kind, random }, 300);
      assertProducts(cache, 0, sequence, { random, what: `${kind}, ${dtype}` });
    }
  }
});

test("score and weigh refuse what they cannot do", (device) => {
  const data: Data = { kind: "gaussian", random: randomOf(7) };
  using cache = KvCache.create(device, optionsOf({ layers: 2 }));
  const sequence = cache.add();
  using queries: Buffer = device.createBuffer("f16", 2 * 64);
  queries.fill(0);
  using out = device.createBuffer("f32", 2 * 100 + 4);
  using sums = device.createBuffer("f32", 2 * 64);
  const scores = out.view(0, 2 * 100);
  const score = (layer = 0, to = scores, scale = 1) =>
    cache.score(layer, sequence, queries, to, { scale });
  const weigh = (layer = 0, weights = scores, to: DeviceBuffer<"f32"> = sums) =>
    cache.weigh(layer, sequence, weights, to);

  throwsWith(score, "invalid-argument", "score", "none");
  throwsWith(weigh, "invalid-argument", "weigh", "none");
  append(cache, sequence, data, 100);
  score();
  weigh();
  throwsWith(() => score(2), "invalid-argument", "layer");
  throwsWith(() => weigh(2), "invalid-argument", "layer");
  throwsWith(() => score(0, out), "invalid-argument", "out", "[2, 100]", "204");
  throwsWith(() => score(0, out.view(1, 200)), "invalid-argument", "16 bytes");
  throwsWith(() => weigh(0, out), "invalid-argument", "weights", "[2, 100]", "204");
  throwsWith(() => weigh(0, scores, scores), "invalid-argument", "out", "[2, 64]");
  throwsWith(() => weigh(0, scores, out.view(0, 128)), "invalid-argument", "overlap");
  for (const scale of [0, -1, NaN, Infinity]) {
    throwsWith(() => score(0, scores, scale), "invalid-argument", "scale");
  }
  using wrong: Buffer = device.createBuffer("bf16", 2 * 64);
  throwsWith(() => cache.score(0, sequence, wrong, scores), "invalid-argument", "queries", "bf16");

  const step = cache.begin([{ sequence }]);
  using token: Buffer = device.createBuffer("f16", 64);
  token.fill(0);
  using more = device.createBuffer("f32", 2 * 101);
  step.append(0, token, token);
  score(0, more);
  throwsWith(() => score(1, more), "invalid-argument", "Layer 1 lacks");
  throwsWith(() => weigh(1, more), "invalid-argument", "Layer 1 lacks");
  step.append(1, token, token);
  weigh(1, more);
  cache.remove(sequence);
  throwsWith(() => score(0, more), "invalid-argument", "removed");
});

test("score and weigh refuse a sequence that has given blocks back", (device) => {
  const data: Data = { kind: "gaussian", random: randomOf(8) };
  using cache = KvCache.create(
    device,
    optionsOf({
      kvHeads: 2,
      headDim: 128,
      window: 64,
      sequences: 1,
      tokens: 20_000,
      poolBytes: 2 ** 19,
      codec: bothParts(fixed(4)),
    }),
  );
  const sequence = cache.add();
  for (let chunk = 0; chunk < 12; chunk++) append(cache, sequence, data, 500);
  using queries: Buffer = device.createBuffer("f16", 2 * 128);
  using scores = device.createBuffer("f32", 2 * 6000);
  using out = device.createBuffer("f32", 2 * 128);
  const score = () => cache.score(0, sequence, queries, scores);
  throwsWith(score, "invalid-argument", "score", "holds those from", "window");
  const weigh = () => cache.weigh(0, sequence, scores, out);
  throwsWith(weigh, "invalid-argument", "weigh", "holds those from", "window");
});
