/** What tests of optimal transport share: random problems, and comparing. */
import { assert, assertEquals, AssertionError, assertThrows } from "@std/assert";
import { type ErrorCode, PackhorseError } from "../src/error.ts";
import { Device } from "../src/device/mod.ts";
import type { TransportDType } from "../src/ot/mod.ts";
import { backends } from "./backends.ts";

/** A test on every backend. */
export function testOnDevices(
  name: string,
  work: (device: Device, dtypes: readonly TransportDType[]) => void,
): void {
  for (const backend of backends()) {
    Deno.test(`ot: ${backend}: ${name}`, () => {
      using device = Device.open({ backend });
      work(device, backend === "cpu" ? ["f64", "f32"] : ["f32"]);
    });
  }
}

export function arrayOf(dtype: TransportDType, values: Iterable<number>) {
  return dtype === "f64" ? Float64Array.from(values) : Float32Array.from(values);
}

export function gaussian(random: () => number): number {
  return Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
}

/** `count` numbers of a distribution, rounded to float32 so that both types hold them. */
export function randoms(count: number, draw: () => number): Float64Array<ArrayBuffer> {
  return Float64Array.from({ length: count }, () => Math.fround(draw()));
}

/** Masses of total 1, some of them 0. */
export function masses(count: number, random: () => number, zeros = 0): Float64Array {
  const values = Float64Array.from({ length: count }, () => random() < zeros ? 0 : 0.1 + random());
  if (values.every((value) => value === 0)) values[0] = 1;
  const total = values.reduce((sum, value) => sum + value, 0);
  return values.map((value) => value / total);
}

/** Asserts that each value is within `slack` of the expected one, NaN of nothing. */
export function assertClose(
  actual: ArrayLike<number>,
  expected: ArrayLike<number>,
  slack: number,
  what: string,
): void {
  if (actual.length !== expected.length) {
    throw new AssertionError(`${what}: ${actual.length} elements, expected ${expected.length}`);
  }
  for (let i = 0; i < expected.length; i++) {
    if (actual[i] === expected[i] || Math.abs(actual[i]! - expected[i]!) <= slack) continue;
    throw new AssertionError(
      `${what}: element ${i} is ${actual[i]}, expected ${expected[i]} within ${slack}`,
    );
  }
}

export function dot(x: ArrayLike<number>, y: ArrayLike<number>): number {
  let sum = 0;
  for (let i = 0; i < x.length; i++) sum += x[i]! * y[i]!;
  return sum;
}

/** Asserts that `work` throws a PackhorseError of this code, whose message has all of the fragments. */
export function refuses(code: ErrorCode, work: () => unknown, ...fragments: string[]): void {
  const error = assertThrows(work, PackhorseError);
  assertEquals(error.code, code, error.message);
  for (const fragment of fragments) assert(error.message.includes(fragment), error.message);
}
