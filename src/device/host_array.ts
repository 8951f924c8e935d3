import { BYTES_PER_ELEMENT, type DType } from "../dtype.ts";
import { PackhorseError } from "../error.ts";

/**
 * The typed array that holds each {@linkcode DType} bit by bit. Elements of 16-bit
 * floats are their bits; `new Float16Array(array.buffer)` reads those of f16.
 */
export interface HostArrays {
  /** The bits of half-precision floats. */
  f16: Uint16Array<ArrayBuffer>;
  /** The bits of bfloat16, the upper halves of f32. */
  bf16: Uint16Array<ArrayBuffer>;
  /** Single-precision floats. */
  f32: Float32Array<ArrayBuffer>;
  /** Signed 32-bit integers. */
  i32: Int32Array<ArrayBuffer>;
  /** Bytes. */
  u8: Uint8Array<ArrayBuffer>;
  /** Double-precision floats. */
  f64: Float64Array<ArrayBuffer>;
}

/** The typed array of one dtype. */
export type HostArray<T extends DType = DType> = HostArrays[T];

const CONSTRUCTORS = {
  f16: Uint16Array,
  bf16: Uint16Array,
  f32: Float32Array,
  i32: Int32Array,
  u8: Uint8Array,
  f64: Float64Array,
};

/** An array of zeros. */
export function createHostArray<T extends DType>(dtype: T, length: number): HostArray<T> {
  return new CONSTRUCTORS[dtype](length) as HostArray<T>;
}

/**
 * The bytes of a typed array that fits a dtype and a length, in place. Throws
 * `invalid-argument` if it does not fit, or as {@linkcode fixedBytes}.
 */
export function bytesOf(
  array: ArrayBufferView,
  { dtype, length }: { dtype: DType; length: number },
  action: string,
): Uint8Array<ArrayBuffer> {
  const kinds = [CONSTRUCTORS[dtype], Uint8Array, ...(dtype === "f16" ? [Float16Array] : [])];
  if (!kinds.some((kind) => array instanceof kind)) {
    const names = [...new Set(kinds.map(({ name }) => name))].join(" or ");
    throw new PackhorseError(
      "invalid-argument",
      `${action}: ${dtype} takes a ${names}, got ${array?.constructor?.name ?? array}`,
    );
  }
  const bytes = fixedBytes(array, action);
  const expected = length * BYTES_PER_ELEMENT[dtype];
  if (bytes.byteLength !== expected) {
    throw new PackhorseError(
      "invalid-argument",
      `${action}: ${length} elements of ${dtype} take ${expected} bytes, got ${bytes.byteLength}`,
    );
  }
  return bytes;
}

/** The bytes of a view, in place. Throws `invalid-argument` if they could move, or are gone. */
export function fixedBytes(view: ArrayBufferView, action: string): Uint8Array<ArrayBuffer> {
  const { buffer, byteOffset, byteLength } = view;
  const refuse = (flaw: string): never => {
    throw new PackhorseError("invalid-argument", `${action}: its ArrayBuffer ${flaw}`);
  };
  if (!(buffer instanceof ArrayBuffer)) return refuse("is shared; copy it into one that is not");
  if (buffer.detached) return refuse("is detached: it was transferred elsewhere");
  if (buffer.resizable) return refuse("is resizable; copy it into one of fixed length");
  return new Uint8Array(buffer, byteOffset, byteLength);
}
