/** Files of points, distances, masses and plans of the `ot` commands. */
import type { Device, DeviceBuffer } from "../src/device/mod.ts";
import type { DType } from "../src/dtype.ts";
import { PackhorseError } from "../src/error.ts";
import { isFloatDType, widen } from "../src/float_conversion.ts";
import { readNpy, writeNpy } from "../src/io/mod.ts";
import type { TransportDType } from "../src/ot/mod.ts";

/** Numbers of a file. */
export interface Numbers {
  path: string;
  dtype: DType;
  shape: readonly number[];
  values: Float32Array<ArrayBuffer> | Float64Array<ArrayBuffer> | Int32Array | Uint8Array;
}

/** Reads a matrix; `wanted` says of what, and in which shape. */
export function readMatrix(path: string, wanted: string): Promise<Numbers> {
  return readNumbers(path, 2, wanted);
}

async function readNumbers(path: string, rank: number, wanted: string): Promise<Numbers> {
  const { dtype, shape, data } = await readNpy(path);
  if (shape.length !== rank || shape.some((size) => size === 0)) {
    throw new PackhorseError(
      "invalid-argument",
      `Cannot use ${path}: it must hold ${wanted}, but its shape is [${shape.join(", ")}]`,
    );
  }
  return { path, dtype, shape, values: numbersOf(data, dtype) };
}

function numbersOf(data: Uint8Array<ArrayBuffer>, dtype: DType): Numbers["values"] {
  const { buffer, byteOffset, byteLength } = data;
  if (dtype === "f64") return new Float64Array(buffer, byteOffset, byteLength / 8);
  if (dtype === "i32") return new Int32Array(buffer, byteOffset, byteLength / 4);
  return isFloatDType(dtype) ? widen(data, dtype) : data;
}

/** Reads the masses of `count` points, which the file `of` has. */
export async function readMasses(path: string, count: number, of: string): Promise<Numbers> {
  const masses = await readNumbers(path, 1, "masses [n]");
  if (masses.shape[0] === count) return masses;
  throw new PackhorseError(
    "invalid-argument",
    `Cannot use ${path}: it holds ${masses.shape[0]} masses, but ${of} has ${count} points`,
  );
}

/**
 * What makes arrays of files' numbers: in float64 if one of the files is, and the backend can, which is the CPU; else in
 * float32.
 */
export function converter(
  device: Device,
  files: readonly (Numbers | undefined)[],
): (numbers: Numbers) => Float32Array<ArrayBuffer> | Float64Array<ArrayBuffer> {
  const wide = device.backend === "cpu" && files.some((file) => file?.dtype === "f64");
  return ({ values }) => wide ? Float64Array.from(values) : Float32Array.from(values);
}

/** Writes the plan of one problem. */
export async function writePlan(
  path: string,
  solution: { readonly dtype: TransportDType; readonly plan: DeviceBuffer<TransportDType> },
  { n, m, signal }: { n: number; m: number; signal: AbortSignal },
): Promise<void> {
  const data = solution.plan.download(new Uint8Array(solution.plan.byteLength));
  await writeNpy(path, { dtype: solution.dtype, shape: [n, m], data }, { signal });
}

/** JSON has no NaN. */
export const finite = (value: number) => Number.isFinite(value) ? value : null;

/** Eight digits of a number. */
export const format = (value: number) => Number.isFinite(value) ? value.toPrecision(8) : "none";
