/**
 * Drawing tokens from logits, and scoring them, on every backend that opens here (PACKHORSE_BACKEND names one): against
 * double precision in plain loops.
 */
import { assert, assertEquals, assertLess, assertLessOrEqual } from "@std/assert";
import { Device, type DeviceBuffer } from "../src/device/mod.ts";
import {
  encodeSamplers,
  markTokens,
  sample,
  SAMPLER_BYTES,
  type SamplerOptions,
} from "../src/llm/sample_logits.ts";
import { crossEntropy, divergence } from "../src/llm/score_logits.ts";
import { backends } from "./backends.ts";
import { decodeFloats, encodeFloats, type FloatType } from "./float16.ts";
import { throwsWith } from "./kv_cache_support.ts";
import { randomOf } from "./kv_cases.ts";

const DTYPES = ["f32", "f16", "bf16"] as const;

function test(name: string, work: (device: Device) => void): void {
  for (const backend of backends()) {
    Deno.test(`llm logits: ${backend}: ${name}`, () => {
      using device = Device.open({ backend });
      work(device);
    });
  }
}

function upload(device: Device, dtype: FloatType, values: Float32Array) {
  const bytes = encodeFloats(dtype, values);
  const buffer = device.createBuffer(dtype, values.length);
  buffer.upload(bytes);
  return {
    buffer,
    values: decodeFloats(dtype, bytes),
    [Symbol.dispose]: () => buffer[Symbol.dispose](),
  };
}

function integers(device: Device, values: readonly number[]): DeviceBuffer<"i32"> {
  const buffer = device.createBuffer("i32", values.length);
  buffer.upload(Int32Array.from(values));
  return buffer;
}

/** Logits of a few likely tokens among many others, as language models give them. */
function randomLogits(count: number, random: () => number): Float32Array {
  const spread = 1 + 6 * random();
  return Float32Array.from(
    { length: count },
    () => spread * (random() + random() + random() - 1.5) + (random() < 0.01 ? 8 * random() : 0),
  );
}

const pick = <T>(random: () => number, choices: readonly T[]): T =>
  choices[Math.floor(random() * choices.length)]!;

/** Philox4x32-10 in integers of any size. */
function philox(counter: bigint[], key: bigint[]): bigint[] {
  const word = 0xffffffffn;
  let [a, b, c, d] = counter as [bigint, bigint, bigint, bigint];
  let [first, second] = key as [bigint, bigint];
  for (let round = 0; round < 10; round++) {
    const [x, y] = [0xd2511f53n * a, 0xcd9e8d57n * c];
    [a, b, c, d] = [(y >> 32n) ^ b ^ first, y & word, (x >> 32n) ^ d ^ second, x & word];
    first = (first + 0x9e3779b9n) & word;
    second = (second + 0xbb67ae85n) & word;
  }
  return [a, b, c, d];
}

Deno.test("llm logits: the tests' Philox gives the numbers that its authors publish", () => {
  assertEquals(philox([0n, 0n, 0n, 0n], [0n, 0n]), [
    0x6627e8d5n,
    0xe169c58dn,
    0xbc57ac4cn,
    0x9b00dbd8n,
  ]);
  const ones = 0xffffffffn;
  const expected = [0x408f276dn, 0x41c83b0en, 0xa20bc7c6n, 0x6d5451fdn];
  assertEquals(philox([ones, ones, ones, ones], [ones, ones]), expected);
});

/** The random fraction of a seed and a step. */
function fraction(seed: number, step: number): number {
  const bits = BigInt(seed);
  const [low, high] = philox([BigInt(step), 0n, 0n, 0n], [bits & 0xffffffffn, bits >> 32n]);
  return Number(high) / 2 ** 32 + Number(low) / 2 ** 64;
}

/**
 * The token that Hugging Face's processors and a random fraction choose, in double precision, and how far from another
 * choice that was, as a probability.
 */
function chooseToken(
  logits: Float32Array,
  options: { readonly [Name in keyof SamplerOptions]-?: number },
  seen: Uint8Array,
): { token: number; margin: number } {
  const { temperature, topK, topP, minP, repetitionPenalty } = options;
  const [divisor, penalty] = [Math.fround(temperature), Math.fround(repetitionPenalty)];
  const scores = Array.from(logits, (logit, i) => {
    if (Number.isNaN(logit)) return -Infinity;
    const penalised = !seen[i] ? logit : logit < 0 ? logit * penalty : logit / penalty;
    return divisor > 0 ? penalised / divisor : penalised;
  });
  const largest = scores.reduce((a, b) => Math.max(a, b));
  if (largest === -Infinity) return { token: -1, margin: 1 };
  if (temperature === 0) {
    const rivals = scores.filter((score) => score < largest && score > largest - 1e-5).length;
    return { token: scores.indexOf(largest), margin: rivals > 0 ? 0 : 1 };
  }
  let likelihoods = scores.map((score) => score === largest ? 1 : Math.exp(score - largest));
  let margin = 1;
  if (topK > 0 && topK < logits.length) {
    const sorted = likelihoods.toSorted((a, b) => b - a);
    const least = sorted[topK - 1]!;
    margin = Math.min(margin, (least - sorted[topK]!) / least || 1); // the same: both stay
    likelihoods = likelihoods.map((value) => value >= least ? value : 0);
  }
  if (topP < 1) {
    const total = likelihoods.reduce((a, b) => a + b);
    let below = 0;
    const groups = new Map<number, number>();
    for (const value of likelihoods) groups.set(value, (groups.get(value) ?? 0) + value);
    const gone = new Set<number>();
    for (const [value, mass] of [...groups].toSorted(([a], [b]) => a - b)) {
      below += mass;
      margin = Math.min(margin, Math.abs(below / total - (1 - Math.fround(topP))));
      if (below / total <= 1 - Math.fround(topP) && value < 1) gone.add(value);
    }
    likelihoods = likelihoods.map((value) => gone.has(value) ? 0 : value);
  }
  if (minP > 0) {
    const least = Math.fround(minP);
    for (const value of likelihoods) {
      if (value < 1) margin = Math.min(margin, Math.abs(value - least) / least);
    }
    likelihoods = likelihoods.map((value) => value >= least ? value : 0);
  }
  const total = likelihoods.reduce((a, b) => a + b);
  const point = fraction(options.seed, options.step) * total;
  let sum = 0;
  for (const [token, value] of likelihoods.entries()) {
    const before = sum;
    sum += value;
    if (sum > point) {
      const nearest = Math.min(point - before, sum - point) / total;
      return { token, margin: Math.min(margin, nearest) };
    }
  }
  throw new Error("no token is left");
}

test("sample chooses as Hugging Face's processors and Philox do", (device) => {
  let [close, drawn] = [0, 0];
  for (let seed = 0; seed < 150; seed++) {
    const random = randomOf(seed);
    const rows = pick(random, [1, 2, 5]);
    const vocabulary = seed < 3 ? 33000 : pick(random, [1, 2, 31, 64, 1000, 2049]);
    const dtype = pick(random, DTYPES);
    const samplers = Array.from({ length: rows }, () => ({
      temperature: pick(random, [0, 0.3, 1, 1, 1.7]),
      topK: pick(random, [0, 0, 1, 5, 50, 1e6]),
      topP: pick(random, [1, 1, 0.95, 0.5, 1e-3]),
      minP: pick(random, [0, 0, 0.05, 1]),
      repetitionPenalty: pick(random, [1, 1.3, 0.8]),
      seed: Math.floor(random() * 2 ** 53),
      step: Math.floor(random() * 2 ** 32),
    }));
    const data = randomLogits(rows * vocabulary, random);
    if (seed % 10 === 0) data.fill(-Infinity, 0, vocabulary).set([NaN]);
    if (seed % 10 === 1) data.set([NaN, Infinity, -Infinity].slice(0, vocabulary));
    using logits = upload(device, dtype, data);
    const marks = Uint8Array.from({ length: data.length }, () => random() < 0.1 ? 1 : 0);
    using seen = device.createBuffer("u8", marks.length);
    seen.upload(marks);
    using states = device.createBuffer("u8", rows * SAMPLER_BYTES);
    states.upload(encodeSamplers(samplers));
    using scratch = device.createBuffer("f32", data.length);
    using out = device.createBuffer("i32", rows);
    const sizes = { rows, vocabulary, scratch };
    sample(logits.buffer, states, out, seed % 3 ? { ...sizes, seen } : sizes);
    const tokens = out.download();
    tokens.forEach((token, row) => {
      const own = [row * vocabulary, (row + 1) * vocabulary] as const;
      const expected = chooseToken(
        logits.values.slice(...own),
        samplers[row]!,
        seed % 3 ? marks.subarray(...own) : new Uint8Array(vocabulary),
      );
      drawn++;
      if (expected.margin < 1e-6) close++;
      else assertEquals(token, expected.token, `seed ${seed}, row ${row} of ${vocabulary}`);
      if (seed % 3 && token >= 0) marks[own[0] + token] = 1;
    });
    assertEquals(seen.download(), marks, `seed ${seed}: tokens are marked`);
    const next = samplers.map((sampler) => ({ ...sampler, step: (sampler.step + 1) % 2 ** 32 }));
    assertEquals(states.download(), encodeSamplers(next), `seed ${seed}: steps are counted`);
  }
  assertLess(close, 0.05 * drawn);
});

test("what is drawn is as frequent as it is likely", (device) => {
  const vocabulary = 40;
  const rows = 2000;
  const row = randomLogits(vocabulary, randomOf(5)).map((value) => value / 2);
  const data = Float32Array.from({ length: rows * vocabulary }, (_, i) => row[i % vocabulary]!);
  using logits = upload(device, "f32", data);
  using states = device.createBuffer("u8", rows * SAMPLER_BYTES);
  states.upload(encodeSamplers(Array.from({ length: rows }, (_, seed) => ({ seed }))));
  using scratch = device.createBuffer("f32", data.length);
  using out = device.createBuffer("i32", rows);
  const counts = new Float64Array(vocabulary);
  const times = 10;
  for (let i = 0; i < times; i++) {
    sample(logits.buffer, states, out, { rows, vocabulary, scratch });
    for (const token of out.download()) counts[token]!++;
  }
  const likelihoods = row.map((value) => Math.exp(value));
  const total = likelihoods.reduce((a, b) => a + b);
  let chiSquare = 0;
  likelihoods.forEach((likelihood, token) => {
    const expected = rows * times * likelihood / total;
    chiSquare += (counts[token]! - expected) ** 2 / expected;
  });
  // 39 degrees of freedom: above 90 once in 10^5 seeds, and these are fixed.
  assertLess(chiSquare, 90);
  assert(chiSquare > 10, `${chiSquare}: no chance in it`);
});

test("marks are set for tokens of the vocabulary alone", (device) => {
  using tokens = integers(device, [3, 0, -1, 50, 49, 3, 2 ** 31 - 1, -(2 ** 31)]);
  using seen = device.createBuffer("u8", 64);
  seen.fill();
  markTokens(tokens, seen.view(0, 50));
  const expected = new Uint8Array(64);
  for (const token of [0, 3, 49]) expected[token] = 1;
  assertEquals(seen.download(), expected);
});

/** Logarithms of the probabilities of a row, in double precision. */
function logProbabilities(logits: Float32Array): Float64Array {
  const largest = logits.reduce((a, b) => Math.max(a, b));
  const sum = logits.reduce((total, logit) => total + Math.exp(logit - largest), 0);
  return Float64Array.from(logits, (logit) => logit - largest - Math.log(sum));
}

test("crossEntropy is the surprise of the target", (device) => {
  for (let seed = 0; seed < 30; seed++) {
    const random = randomOf(300 + seed);
    const [rows, vocabulary] = [pick(random, [1, 3, 8]), pick(random, [1, 5, 64, 777, 20000])];
    const dtype = pick(random, DTYPES);
    using logits = upload(device, dtype, randomLogits(rows * vocabulary, random));
    const tokens = Array.from({ length: rows }, () => Math.floor(random() * vocabulary));
    if (seed % 5 === 0) tokens[0] = pick(random, [-1, vocabulary, -(2 ** 31)]);
    using targets = integers(device, tokens);
    using out = device.createBuffer("f32", rows);
    crossEntropy(logits.buffer, targets, out, { rows, vocabulary });
    out.download().forEach((actual, row) => {
      const what = `seed ${300 + seed}, row ${row} of ${vocabulary} ${dtype}`;
      const target = tokens[row]!;
      if (target < 0 || target >= vocabulary) return assert(Number.isNaN(actual), what);
      const values = logits.values.slice(row * vocabulary, (row + 1) * vocabulary);
      const expected = -logProbabilities(values)[target]!;
      assertLessOrEqual(Math.abs(actual - expected), 5e-7 + 1e-7 * expected, what);
    });
  }
});

test("divergence is that of Kullback and Leibler, however small, and tells of the likeliest", (device) => {
  for (let seed = 0; seed < 40; seed++) {
    const random = randomOf(400 + seed);
    const [rows, vocabulary] = [pick(random, [1, 3, 8]), pick(random, [2, 5, 64, 777, 20000])];
    const noise = pick(random, [0, 1e-3, 1e-2, 1]);
    const [first, second] = [pick(random, DTYPES), pick(random, DTYPES)];
    const data = randomLogits(rows * vocabulary, random);
    const shift = 10 * random(); // of all logits, which changes nothing
    using reference = upload(device, first, data);
    const changed = data.map((value) => value + shift + noise * (random() - 0.5));
    using logits = upload(device, second, changed);
    using out = device.createBuffer("f32", rows * 2);
    divergence(reference.buffer, logits.buffer, out, { rows, vocabulary });
    const results = out.download();
    for (let row = 0; row < rows; row++) {
      const own = [row * vocabulary, (row + 1) * vocabulary] as const;
      const [p, q] = [reference.values.slice(...own), logits.values.slice(...own)];
      const [pLogs, qLogs] = [logProbabilities(p), logProbabilities(q)];
      const expected = pLogs.reduce((sum, log, i) => sum + Math.exp(log) * (log - qLogs[i]!), 0);
      const what = `seed ${400 + seed}, row ${row} of ${vocabulary}, noise ${noise}`;
      const actual = results[2 * row]!;
      assert(actual >= 0, what);
      assertLessOrEqual(Math.abs(actual - expected), 5e-7 + 1e-5 * expected, what);
      const likeliest = (values: Float32Array) =>
        values.indexOf(values.reduce((a, b) => Math.max(a, b)));
      assertEquals(results[2 * row + 1], likeliest(p) === likeliest(q) ? 1 : 0, what);
    }
  }
});

test("divergence of a token that the other holds impossible is infinite, but not the other way", (device) => {
  using reference = upload(device, "f32", Float32Array.of(0, 1, -Infinity, 2, 0, 1, 3, 2));
  using logits = upload(device, "f32", Float32Array.of(0, 1, 3, 2, 0, 1, -Infinity, 2));
  using out = device.createBuffer("f32", 4);
  divergence(reference.buffer, logits.buffer, out, { rows: 2, vocabulary: 4 });
  const [finite, differs, infinite, differsToo] = out.download();
  assert(Number.isFinite(finite) && finite! > 1);
  assertEquals([differs, infinite, differsToo], [0, Infinity, 0]);
});

test("options and buffers that do not fit are refused", (device) => {
  using logits = device.createBuffer("f32", 64);
  using scratch = device.createBuffer("f32", 64);
  using samplers = device.createBuffer("u8", 2 * SAMPLER_BYTES);
  using out = device.createBuffer("i32", 2);
  using seen = device.createBuffer("u8", 60);
  using losses = device.createBuffer("f32", 2);
  const sizes = { rows: 2, vocabulary: 32 };
  const cases: [string, () => void][] = [
    ["temperature must be 0 or more", () => encodeSamplers([{ temperature: -1 }])],
    ["temperature must be", () => encodeSamplers([{ temperature: NaN }])],
    ["topK must be", () => encodeSamplers([{ topK: 1.5 }])],
    ["topP must be above 0", () => encodeSamplers([{}, { topP: 0 }])],
    ["topP must be", () => encodeSamplers([{ topP: 1.5 }])],
    ["minP must be", () => encodeSamplers([{ minP: 2 }])],
    ["repetitionPenalty must be", () => encodeSamplers([{ repetitionPenalty: 0 }])],
    ["seed must be", () => encodeSamplers([{ seed: 2 ** 53 }])],
    ["step must be", () => encodeSamplers([{ step: -1 }])],
    ["samplers must be [2, 32] of u8", () => {
      sample(logits, samplers.view(0, 32), out, { ...sizes, scratch });
    }],
    [
      "seen must be [2, 32] of u8",
      () => sample(logits, samplers, out, { ...sizes, scratch, seen }),
    ],
    ["overlap", () => sample(logits, samplers, out, { ...sizes, scratch: logits })],
    [
      "vocabulary must be",
      () => sample(logits, samplers, out, { rows: 2, vocabulary: 0, scratch }),
    ],
    ["targets must be [2] of i32", () => crossEntropy(logits, losses as never, losses, sizes)],
    ["out must be [2, 2] of f32", () => divergence(logits, scratch, losses, sizes)],
  ];
  for (const [fragment, work] of cases) throwsWith(work, "invalid-argument", fragment);
});
