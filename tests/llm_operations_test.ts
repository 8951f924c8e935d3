/**
 * The operations of language models on every backend that opens here (PACKHORSE_BACKEND names one), against double
 * precision in plain loops.
 */
import { assert, assertEquals, assertLessOrEqual } from "@std/assert";
import { type ErrorCode, PackhorseError } from "../src/error.ts";
import { Device, type DeviceBuffer } from "../src/device/mod.ts";
import {
  add,
  advance,
  argmax,
  cast,
  type FloatBuffer,
  type FloatDType,
  gather,
  linear,
  prepareLinear,
  rmsNorm,
  rope,
  swiglu,
} from "../src/llm/operations.ts";
import { backends } from "./backends.ts";
import { decodeFloats, encodeFloats } from "./float16.ts";
import { throwsWith } from "./kv_cache_support.ts";
import { randomOf } from "./kv_cases.ts";

const DTYPES = ["f32", "f16", "bf16"] as const;
/** Half a step of each type, relative. */
const ROUNDING = { f32: 2 ** -24, f16: 2 ** -11, bf16: 2 ** -8 } as const;

function test(name: string, work: (device: Device) => void | Promise<void>): void {
  for (const backend of backends()) {
    Deno.test(`llm operations: ${backend}: ${name}`, async () => {
      using device = Device.open({ backend });
      await work(device);
    });
  }
}

/** A random tensor: on the device, and as the numbers that its type made of them. */
class Tensor implements Disposable {
  readonly buffer: FloatBuffer;
  readonly values: Float32Array;

  constructor(device: Device, dtype: FloatDType, values: ArrayLike<number>) {
    const bytes = encodeFloats(dtype, Float32Array.from(values));
    this.buffer = device.createBuffer(dtype, values.length);
    this.buffer.upload(bytes);
    this.values = decodeFloats(dtype, bytes);
  }

  [Symbol.dispose](): void {
    this.buffer[Symbol.dispose]();
  }
}

/** Roughly Gaussian numbers, one in 50 an outlier. */
function gaussians(count: number, random: () => number): Float32Array {
  return Float32Array.from({ length: count }, () => {
    const value = random() + random() + random() + random() - 2;
    return random() < 0.02 ? 30 * value : value;
  });
}

function integers(device: Device, values: readonly number[]): DeviceBuffer<"i32"> {
  const buffer = device.createBuffer("i32", values.length);
  buffer.upload(Int32Array.from(values));
  return buffer;
}

function download(buffer: FloatBuffer): Float32Array {
  return decodeFloats(buffer.dtype, buffer.download(new Uint8Array(buffer.byteLength)));
}

/** Asserts that each value is within `slack` of the expected one, beside rounding to the type. */
function assertNear(
  buffer: FloatBuffer,
  expected: ArrayLike<number>,
  { slack, what }: { slack: (index: number) => number; what: string },
): void {
  const actual = download(buffer);
  assertEquals(actual.length, expected.length, what);
  for (let i = 0; i < actual.length; i++) {
    const bound = slack(i) + ROUNDING[buffer.dtype] * 1.01 * Math.abs(expected[i]!) + 1e-7;
    assertLessOrEqual(
      Math.abs(actual[i]! - expected[i]!),
      bound,
      `${what}, element ${i}: ${actual[i]}, expected ${expected[i]}`,
    );
  }
}

const pick = <T>(random: () => number, choices: readonly T[]): T =>
  choices[Math.floor(random() * choices.length)]!;
const upTo = (random: () => number, most: number) => 1 + Math.floor(random() * most);

/** Whether more than 8 rows can be multiplied here: on a GPU, by cuBLAS. */
function multipliesMany(device: Device): boolean {
  try {
    return prepareLinear(device).length > 0;
  } catch (error) {
    assert(error instanceof PackhorseError && error.code === "unsupported", String(error));
    return false;
  }
}

interface LinearTypes {
  readonly x: FloatDType;
  readonly weight: FloatDType;
  readonly out: FloatDType;
}

/** The types that a backend multiplies. */
function linearTypes(device: Device, rows: number): LinearTypes[] {
  const all = DTYPES.flatMap((x) =>
    DTYPES.flatMap((weight) => DTYPES.map((out) => ({ x, weight, out })))
  );
  if (device.backend === "cpu") return all;
  if (rows <= 8) return all.filter(({ x, weight }) => x === weight || x === "f32");
  return all.filter(({ x, weight, out }) => x === weight && (out === "f32" || out === x));
}

test("linear multiplies with every type, bias and sum", (device) => {
  const hasMany = multipliesMany(device);
  const shapes: [number, number, number][] = [[1, 64, 96], [2, 33, 7], [8, 200, 19], [5, 1, 1]];
  if (hasMany) shapes.push([9, 48, 40], [70, 136, 50], [37, 1030, 13], [300, 16, 5]);
  shapes.forEach(([rows, inFeatures, outFeatures], shape) => {
    linearTypes(device, rows).forEach((types, at) => {
      const random = randomOf(1000 * shape + at);
      const hasBias = at % 2 === 0;
      const accumulate = at % 3 === 0;
      using x = new Tensor(device, types.x, gaussians(rows * inFeatures, random));
      using weight = new Tensor(device, types.weight, gaussians(outFeatures * inFeatures, random));
      using bias = new Tensor(device, types.weight, gaussians(outFeatures, random));
      using out = new Tensor(device, types.out, gaussians(rows * outFeatures, random));
      if (!accumulate) out.buffer.fill(0xff); // NaN
      const sizes = { rows, inFeatures, outFeatures, accumulate };
      linear(x.buffer, weight.buffer, out.buffer, {
        ...sizes,
        bias: hasBias ? bias.buffer : undefined,
      });
      const expected = new Float64Array(rows * outFeatures);
      const magnitudes = new Float64Array(rows * outFeatures);
      for (let i = 0; i < expected.length; i++) {
        const [row, column] = [Math.floor(i / outFeatures), i % outFeatures];
        const terms = [accumulate ? out.values[i]! : 0, hasBias ? bias.values[column]! : 0];
        for (let k = 0; k < inFeatures; k++) {
          terms.push(x.values[row * inFeatures + k]! * weight.values[column * inFeatures + k]!);
        }
        for (const term of terms) {
          expected[i]! += term;
          magnitudes[i]! += Math.abs(term);
        }
      }
      const what = `${JSON.stringify({ ...types, ...sizes, hasBias })}, seed ${1000 * shape + at}`;
      // cuBLAS rounds a product to out's type before it is added, and the sum once more.
      const isRoundedTwice = device.backend === "cuda" && rows > 8 && (hasBias || accumulate);
      const second = isRoundedTwice ? ROUNDING[out.buffer.dtype] : 0;
      const slack = (i: number) => (1e-6 + second) * magnitudes[i]!;
      assertNear(out.buffer, expected, { slack, what });
    });
  });
});

test("a row is multiplied the same whatever the other rows are", (device) => {
  const random = randomOf(7);
  const [inFeatures, outFeatures] = [2056, 67]; // beyond a block, and not whole vectors
  const most = device.backend === "cpu" ? 70 : 8;
  for (const dtype of DTYPES) {
    using x = new Tensor(device, dtype, gaussians(most * inFeatures, random));
    using weight = new Tensor(device, dtype, gaussians(outFeatures * inFeatures, random));
    using together = device.createBuffer("f32", most * outFeatures);
    linear(x.buffer, weight.buffer, together, { rows: most, inFeatures, outFeatures });
    const all = together.download();
    for (const [first, rows] of [[0, 1], [most - 1, 1], [2, 2], [4, 3], [0, most - 1]] as const) {
      using some = device.createBuffer("f32", rows * outFeatures);
      const part = x.buffer.view(first * inFeatures, rows * inFeatures);
      linear(part, weight.buffer, some, { rows, inFeatures, outFeatures });
      const expected = all.slice(first * outFeatures, (first + rows) * outFeatures);
      assertEquals(some.download(), expected, `${dtype}, ${rows} rows from ${first}`);
    }
  }
});

test("gather takes rows, and gives NaN for those that do not exist", (device) => {
  const random = randomOf(11);
  for (const dtype of DTYPES) {
    for (const outType of DTYPES) {
      for (const width of [8, 40, 129]) {
        const indices = [3, 0, -1, 5, 3, 6, 2 ** 31 - 1, -(2 ** 31)];
        const rows = indices.length;
        using table = new Tensor(device, dtype, gaussians(6 * width, random));
        using tokens = integers(device, indices);
        using out = device.createBuffer(outType, rows * width);
        gather(table.buffer, tokens, out, { rows, width, xRows: 6 });
        const expected = indices.flatMap((index) =>
          Array.from(
            { length: width },
            (_, i) => index >= 0 && index < 6 ? table.values[index * width + i]! : NaN,
          )
        );
        const rounded = decodeFloats(outType, encodeFloats(outType, expected));
        assertEquals(download(out), rounded, `${dtype} to ${outType}, width ${width}`);
      }
    }
  }
});

test("rmsNorm divides by the root of the mean square", (device) => {
  for (let seed = 0; seed < 40; seed++) {
    const random = randomOf(seed);
    const rows = upTo(random, 5);
    const groups = upTo(random, 3);
    const width = seed < 4 ? 2048 + 8 * seed + seed % 2 : upTo(random, 300);
    const [xType, weightType, outType] = [0, 1, 2].map(() => pick(random, DTYPES)) as [
      FloatDType,
      FloatDType,
      FloatDType,
    ];
    const inPlace = seed % 4 === 0;
    const xStride = groups * width + (seed % 3 === 0 ? 8 * upTo(random, 4) : 0);
    const outStride = inPlace ? xStride : groups * width;
    const epsilon = pick(random, [1e-5, 1e-6, 0.1]);
    using x = new Tensor(device, xType, gaussians(rows * xStride, random));
    using weight = new Tensor(device, weightType, gaussians(width, random));
    using out = inPlace ? x.buffer : device.createBuffer(outType, rows * groups * width);
    rmsNorm(x.buffer, weight.buffer, out, {
      rows,
      groups,
      width,
      epsilon,
      xStride,
      outStride,
    });
    const expected = inPlace ? Float64Array.from(x.values) : new Float64Array(out.length);
    for (let part = 0; part < rows * groups; part++) {
      const [row, group] = [Math.floor(part / groups), part % groups];
      const from = row * xStride + group * width;
      const values = x.values.subarray(from, from + width);
      const mean = values.reduce((sum, value) => sum + value * value, 0) / width;
      values.forEach((value, i) => {
        expected[row * outStride + group * width + i] = value / Math.sqrt(mean + epsilon) *
          weight.values[i]!;
      });
    }
    const what = `seed ${seed}, ${xType} to ${out.dtype}, [${rows}, ${groups}, ${width}]`;
    assertNear(out, expected, { slack: (i) => 2e-6 * Math.abs(expected[i]!), what });
  }
});

test("rope turns halves of heads by position", (device) => {
  for (let seed = 0; seed < 40; seed++) {
    const random = randomOf(100 + seed);
    const rows = upTo(random, 4);
    const heads = upTo(random, 4);
    const headDim = 2 * upTo(random, 70);
    const rotaryDim = seed % 2 ? headDim : 2 * upTo(random, headDim / 2);
    const columns = heads * headDim;
    const inPlace = seed % 3 === 0;
    const xStride = columns + (seed % 4 === 0 ? 2 * columns : 0);
    const outStride = inPlace ? xStride : columns;
    const xType = pick(random, DTYPES);
    const scale = pick(random, [1, 1.19]);
    using x = new Tensor(device, xType, gaussians(rows * xStride, random));
    const places = Array.from({ length: rows }, () => Math.floor(random() * 131072));
    using positions = integers(device, places);
    const turns = Float32Array.from(
      { length: rotaryDim / 2 },
      (_, i) => 500000 ** (-2 * i / rotaryDim),
    );
    using frequencies = device.createBuffer("f32", rotaryDim / 2);
    frequencies.upload(turns);
    using out = inPlace ? x.buffer : device.createBuffer(pick(random, DTYPES), rows * columns);
    const sizes = { rows, heads, headDim, rotaryDim, xStride, outStride };
    rope(x.buffer, out, { ...sizes, positions, frequencies, scale });
    const expected = inPlace ? Float64Array.from(x.values) : new Float64Array(out.length);
    const magnitudes = new Float64Array(out.length);
    for (let row = 0; row < rows; row++) {
      for (let head = 0; head < heads; head++) {
        const from = row * xStride + head * headDim;
        const to = row * outStride + head * headDim;
        for (let i = 0; i < rotaryDim / 2; i++) {
          // The angle is a float32, as in PyTorch.
          const angle = Math.fround(places[row]! * turns[i]!);
          const [a, b] = [x.values[from + i]!, x.values[from + i + rotaryDim / 2]!];
          expected[to + i] = scale * (a * Math.cos(angle) - b * Math.sin(angle));
          expected[to + i + rotaryDim / 2] = scale * (b * Math.cos(angle) + a * Math.sin(angle));
          magnitudes[to + i] = magnitudes[to + i + rotaryDim / 2] = Math.abs(a) + Math.abs(b);
        }
        for (let i = rotaryDim; i < headDim; i++) expected[to + i] = x.values[from + i]!;
      }
    }
    const what = `seed ${100 + seed}, ${xType} to ${out.dtype}, ${JSON.stringify(sizes)}`;
    assertNear(out, expected, { slack: (i) => 1e-6 * magnitudes[i]!, what });
  }
});

test("swiglu takes its halves from one tensor, or from two", (device) => {
  for (let seed = 0; seed < 30; seed++) {
    const random = randomOf(200 + seed);
    const rows = upTo(random, 5);
    const width = 8 * upTo(random, 40) + (seed % 2 ? 0 : seed % 5);
    const [xType, outType] = [pick(random, DTYPES), pick(random, DTYPES)];
    const isFused = width % 8 === 0;
    const stride = isFused ? 2 * width : width;
    const data = gaussians(rows * 2 * width, random).map((value) => 4 * value);
    if (xType === "f32") data.set([200, -200, 1e-30, -1e-30, 0].slice(0, width));
    using both = new Tensor(device, xType, data);
    using upper = new Tensor(device, xType, data.slice(rows * width));
    using out = device.createBuffer(outType, rows * width);
    if (isFused) swiglu(both.buffer, both.buffer.view(width), out, { rows, width, stride });
    else swiglu(both.buffer.view(0, rows * width), upper.buffer, out, { rows, width });
    const expected = Float64Array.from({ length: rows * width }, (_, i) => {
      const [row, column] = [Math.floor(i / width), i % width];
      const gate = both.values[row * stride + column]!;
      const up = isFused ? both.values[row * stride + width + column]! : upper.values[i]!;
      return gate / (1 + Math.exp(-gate)) * up;
    });
    const rounded = decodeFloats(outType, encodeFloats(outType, Float32Array.from(expected)));
    const what = `seed ${200 + seed}, ${xType} to ${outType}, [${rows}, ${width}]`;
    const slack = (i: number) => Number.isFinite(rounded[i]) ? 4e-6 * Math.abs(expected[i]!) : NaN;
    assertNear(out, expected, { slack, what });
  }
});

test("cast rounds to nearest, and takes columns of a wider tensor", (device) => {
  const random = randomOf(17);
  for (const from of DTYPES) {
    for (const to of DTYPES) {
      const [rows, width, xStride] = [3, 21, 50];
      using x = new Tensor(device, from, gaussians(rows * xStride, random));
      using out = device.createBuffer(to, rows * width);
      cast(x.buffer.view(8), out, { rows, width, xStride });
      const expected = Float32Array.from(
        { length: rows * width },
        (_, i) => x.values[8 + Math.floor(i / width) * xStride + i % width]!,
      );
      assertEquals(download(out), decodeFloats(to, encodeFloats(to, expected)), `${from} to ${to}`);
    }
  }
  // Ties, subnormals, and what overflows.
  const edges = [1 + 2 ** -11, 1 + 3 * 2 ** -11, 1 + 2 ** -8, 1 + 3 * 2 ** -8, 2 ** -24, 2 ** -25];
  const values = [...edges, 3 * 2 ** -26, 65519, 65520, 3.4e38, NaN, -0, Infinity, -Infinity];
  using x = new Tensor(device, "f32", values);
  for (const to of ["f16", "bf16"] as const) {
    using out = device.createBuffer(to, values.length);
    cast(x.buffer, out);
    assertEquals(download(out), decodeFloats(to, encodeFloats(to, values)), to);
  }
});

test("add and advance change their first argument", (device) => {
  const random = randomOf(19);
  for (const xType of DTYPES) {
    for (const yType of DTYPES) {
      const count = upTo(random, 5000);
      using x = new Tensor(device, xType, gaussians(count, random));
      using y = new Tensor(device, yType, gaussians(count, random));
      add(x.buffer, y.buffer);
      const expected = x.values.map((value, i) => value + y.values[i]!);
      const rounded = decodeFloats(xType, encodeFloats(xType, expected));
      assertEquals(download(x.buffer), rounded, `${xType} += ${yType}, ${count} elements`);
    }
  }
  using counters = integers(device, [0, 5, -7, 2 ** 31 - 1, ...new Array(300).fill(1)]);
  advance(counters);
  advance(counters, 3);
  const expected = [4, 9, -3, -(2 ** 31) + 3, ...new Array(300).fill(5)];
  assertEquals([...counters.download()], expected);
});

test("argmax is the first index of the largest", (device) => {
  const random = randomOf(23);
  for (const dtype of DTYPES) {
    for (const vocabulary of [1, 7, 100, 5000]) {
      const rows = 6;
      const data = gaussians(rows * vocabulary, random);
      data.fill(NaN, 0, vocabulary);
      data[2 * vocabulary] = Infinity;
      data.fill(3.5, 3 * vocabulary, 4 * vocabulary); // all the same
      if (vocabulary > 2) data.set([NaN, -Infinity, NaN], 4 * vocabulary);
      using logits = new Tensor(device, dtype, data);
      using out = device.createBuffer("i32", rows);
      argmax(logits.buffer, out, { rows, vocabulary });
      const expected = Array.from({ length: rows }, (_, row) => {
        const values = logits.values.subarray(row * vocabulary, (row + 1) * vocabulary);
        return values.reduce(
          (best, value, i) => value > (values[best] ?? -Infinity) ? i : best,
          -1,
        );
      });
      assertEquals([...out.download()], expected, `${dtype}, vocabulary ${vocabulary}`);
    }
  }
});

test("arguments that do not fit are refused", (device) => {
  using x = device.createBuffer("f32", 64);
  using half = device.createBuffer("f16", 64);
  using out = device.createBuffer("f32", 32);
  using indices = device.createBuffer("i32", 4);
  using codes = device.createBuffer("u8", 64);
  using frequencies = device.createBuffer("f32", 4);
  using other = Device.open({ backend: device.backend });
  using foreign = other.createBuffer("f32", 64);
  using gone = device.createBuffer("f32", 64);
  gone[Symbol.dispose]();
  const sizes = { rows: 4, inFeatures: 16, outFeatures: 8 };
  const turn = { rows: 4, heads: 2, headDim: 8, positions: indices, frequencies };
  const norm = { rows: 4, width: 16, epsilon: 1e-5 };
  const cases: [string, ErrorCode, string, () => void][] = [
    ["rows 0", "invalid-argument", "rows must be", () => {
      linear(x, x, out, { ...sizes, rows: 0 });
    }],
    ["a fraction", "invalid-argument", "got 1.5", () => {
      linear(x, x, out, { ...sizes, rows: 1.5 });
    }],
    ["a short weight", "invalid-argument", "weight must be [8, 16]", () => {
      linear(x, frequencies, out, sizes);
    }],
    ["a wrong dtype", "invalid-argument", "64 elements of u8", () => {
      linear(codes as never, x, out, sizes);
    }],
    ["a short bias", "invalid-argument", "bias must be [8]", () => {
      using weight = device.createBuffer("f32", 128);
      linear(x, weight, out, { ...sizes, bias: x });
    }],
    ["another device", "invalid-argument", "another device", () => {
      linear(foreign, x, out, { ...sizes, outFeatures: 4 });
    }],
    ["a disposed buffer", "disposed", "disposed", () => add(x, gone)],
    ["an unaligned view", "invalid-argument", "multiple of 16 bytes", () => {
      cast(x.view(1, 32), out);
    }],
    ["overlap", "invalid-argument", "overlap", () => cast(x.view(0, 32), x.view(16, 32))],
    ["overlap with itself", "invalid-argument", "overlap", () => add(x, x)],
    ["in place with another stride", "invalid-argument", "overlap", () => {
      rmsNorm(x, out.view(0, 8), x, { ...norm, width: 8, xStride: 16 });
    }],
    ["a stride below the width", "invalid-argument", "at least 16 elements apart", () => {
      rmsNorm(x, out.view(0, 16), half, { ...norm, xStride: 8 });
    }],
    ["a stride past the end", "invalid-argument", "must be at least 76", () => {
      rmsNorm(x, out.view(0, 16), half, { ...norm, xStride: 20 });
    }],
    ["a negative epsilon", "invalid-argument", "epsilon", () => {
      rmsNorm(x, out.view(0, 16), half, { ...norm, epsilon: -1 });
    }],
    ["an odd rotary dimension", "invalid-argument", "rotary dimension must be even", () => {
      rope(x, half, { ...turn, rotaryDim: 7 });
    }],
    ["a scale that is none", "invalid-argument", "scale must be finite", () => {
      rope(x, half, { ...turn, scale: Infinity });
    }],
    ["gate and up of two types", "invalid-argument", "up must be", () => {
      swiglu(x, half, out, { rows: 4, width: 8 });
    }],
    ["indices of floats", "invalid-argument", "indices must be [4] of i32", () => {
      gather(x, frequencies as never, out, { rows: 4, width: 8, xRows: 8 });
    }],
    ["a step that is no integer", "invalid-argument", "by must be", () => advance(indices, 0.5)],
    ["an argmax in floats", "invalid-argument", "out must be [4] of i32", () => {
      argmax(x, frequencies as never, { rows: 4, vocabulary: 16 });
    }],
  ];
  for (const [, code, fragment, work] of cases) throwsWith(work, code, fragment);
});
