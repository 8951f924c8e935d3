/**
 * The floating-point types of a cache, bit by bit: float16, bfloat16 and float32 values as bytes, and
 * rounding of a number to them. All three are the same format with other field sizes.
 */

/** A type that caches are stored in. */
export type FloatType = "f16" | "bf16" | "f32";

/** What there is to know of a binary floating-point type. */
export interface FloatFormat {
  /** Bytes that one value takes. */
  readonly bytes: number;
  /** Stored bits of the significand. */
  readonly mantissaBits: number;
  /** Exponent of the smallest normal value. */
  readonly minExponent: number;
  /** The smallest positive value, a subnormal. */
  readonly smallest: number;
  /** The largest finite value. */
  readonly largest: number;
}

function format(bytes: number, exponentBits: number, mantissaBits: number): FloatFormat {
  const bias = 2 ** (exponentBits - 1) - 1;
  return {
    bytes,
    mantissaBits,
    minExponent: 1 - bias,
    smallest: 2 ** (1 - bias - mantissaBits),
    largest: (2 - 2 ** -mantissaBits) * 2 ** bias,
  };
}

export const FORMATS: Readonly<Record<FloatType, FloatFormat>> = {
  f16: format(2, 5, 10),
  bf16: format(2, 8, 7),
  f32: format(4, 8, 23),
};

const bitsView = new DataView(new ArrayBuffer(8));

/** The largest integer e with 2^e <= |value|, of a finite double that is not zero or subnormal. */
function exponentOf(value: number): number {
  bitsView.setFloat64(0, value);
  return ((bitsView.getUint16(0) >> 4) & 0x7ff) - 1023;
}

/** `value` to the nearest integer, halves to the even one. */
export function roundHalfEven(value: number): number {
  const below = Math.floor(value);
  const rest = value - below;
  if (rest !== 0.5) return rest < 0.5 ? below : below + 1;
  return below % 2 === 0 ? below : below + 1;
}

/** Distance of the values of a type around a finite `value`. */
export function unitInLastPlace(type: FloatType, value: number): number {
  const { minExponent, mantissaBits } = FORMATS[type];
  // No type here reaches the subnormals of a double, so zero is the one value without an exponent.
  const exponent = value === 0 ? minExponent : Math.max(exponentOf(value), minExponent);
  return 2 ** (exponent - mantissaBits);
}

function roundWith(type: FloatType, value: number, round: (value: number) => number): number {
  if (!Number.isFinite(value) || value === 0) return value;
  const unit = unitInLastPlace(type, value);
  // Dividing by a power of two and multiplying by it are exact.
  const magnitude = round(Math.abs(value) / unit) * unit;
  return Math.sign(value) * (magnitude <= FORMATS[type].largest ? magnitude : Infinity);
}

/** A float32 or float64 number rounded to a type, to nearest, ties to even; infinite past the largest. */
export function roundToNearest(type: FloatType, value: number): number {
  return roundWith(type, value, roundHalfEven);
}

/** A positive number rounded to the smallest value of a type that is not below it. */
export function roundUp(type: FloatType, value: number): number {
  return roundWith(type, value, Math.ceil);
}

/** Values of a type, little-endian, as float32, which holds each of them exactly. */
export function decodeFloats(type: FloatType, bytes: Uint8Array): Float32Array<ArrayBuffer> {
  const size = FORMATS[type].bytes;
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const values = new Float32Array(bytes.byteLength / size);
  for (let i = 0; i < values.length; i++) {
    if (type === "f32") values[i] = view.getFloat32(i * size, true);
    else if (type === "f16") values[i] = float16FromBits(view.getUint16(i * size, true));
    else values[i] = bfloat16FromBits(view.getUint16(i * size, true));
  }
  return values;
}

/** Numbers rounded to nearest, ties to even, as little-endian values of a type. */
export function encodeFloats(
  type: FloatType,
  values: Float32Array | readonly number[],
): Uint8Array<ArrayBuffer> {
  const size = FORMATS[type].bytes;
  const bytes = new Uint8Array(values.length * size);
  const view = new DataView(bytes.buffer);
  for (let i = 0; i < values.length; i++) {
    const value = roundToNearest(type, values[i]!);
    if (type === "f32") view.setFloat32(i * size, value, true);
    else view.setUint16(i * size, type === "f16" ? float16Bits(value) : bfloat16Bits(value), true);
  }
  return bytes;
}

function float16FromBits(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const mantissa = bits & 0x3ff;
  if (exponent === 0x1f) return mantissa === 0 ? sign * Infinity : NaN;
  if (exponent === 0) return sign * mantissa * 2 ** -24;
  return sign * (0x400 + mantissa) * 2 ** (exponent - 25);
}

/** Bits of a number that float16 holds exactly. */
function float16Bits(value: number): number {
  if (Number.isNaN(value)) return 0x7e00;
  const sign = value < 0 || Object.is(value, -0) ? 0x8000 : 0;
  const magnitude = Math.abs(value);
  if (magnitude === Infinity) return sign | 0x7c00;
  if (magnitude < 2 ** -14) return sign | (magnitude * 2 ** 24);
  const exponent = exponentOf(magnitude);
  return sign | ((exponent + 15) << 10) | (magnitude * 2 ** (10 - exponent) - 0x400);
}

function bfloat16FromBits(bits: number): number {
  bitsView.setUint32(0, bits << 16);
  return bitsView.getFloat32(0);
}

/** Bits of a number that bfloat16 holds exactly: the upper half of its float32. */
function bfloat16Bits(value: number): number {
  bitsView.setFloat32(0, value);
  return bitsView.getUint16(0);
}
