/**
 * The operations of language models on every backend that opens here (PACKHORSE_BACKEND names one), against double
 * precision in plain loops.
 */
import { assert, assertEquals, assertLessOrEqual } from "@std/assert";
import type { ErrorCode } from "../src/error.ts";
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
