import type { DType } from "./dtype.ts";

/** Types of floating-point numbers. */
export type FloatDType = Extract<DType, "f16" | "bf16" | "f32">;

/** Whether a type is one of floating-point numbers. */
export function isFloatDType(dtype: DType): dtype is FloatDType {
  return dtype === "f16" || dtype === "bf16" || dtype === "f32";
}

/**
 * Little-endian numbers in another type, rounded to the nearest, halves to even; the same bytes if the types are the
 * same. What the type cannot hold becomes infinite.
 */
export function convertFloats(
  bytes: Uint8Array<ArrayBuffer>,
  { from, to }: { readonly from: FloatDType; readonly to: FloatDType },
): Uint8Array<ArrayBuffer> {
  if (from === to) return bytes;
  return narrow(widen(bytes, from), to);
}

/** Numbers of any type as those of f32. */
export function widen(
  { buffer, byteOffset, byteLength }: Uint8Array<ArrayBuffer>,
  from: FloatDType,
): Float32Array<ArrayBuffer> {
  if (from === "f32") return new Float32Array(buffer, byteOffset, byteLength / 4);
  if (from === "f16") return new Float32Array(new Float16Array(buffer, byteOffset, byteLength / 2));
  const halves = new Uint16Array(buffer, byteOffset, byteLength / 2);
  const words = new Uint32Array(halves.length);
  for (let i = 0; i < halves.length; i++) words[i] = halves[i]! << 16;
  return new Float32Array(words.buffer);
}

function narrow(numbers: Float32Array<ArrayBuffer>, to: FloatDType): Uint8Array<ArrayBuffer> {
  if (to === "f32") return new Uint8Array(numbers.buffer, numbers.byteOffset, numbers.byteLength);
  if (to === "f16") return new Uint8Array(new Float16Array(numbers).buffer);
  const words = new Uint32Array(numbers.buffer, numbers.byteOffset, numbers.length);
  const halves = new Uint16Array(words.length);
  for (let i = 0; i < words.length; i++) {
    const word = words[i]!;
    // A NaN must not round to an infinity.
    const isNaN = (word & 0x7fff_ffff) > 0x7f80_0000;
    halves[i] = isNaN ? (word >>> 16) | 0x40 : (word + 0x7fff + ((word >>> 16) & 1)) >>> 16;
  }
  return new Uint8Array(halves.buffer);
}
