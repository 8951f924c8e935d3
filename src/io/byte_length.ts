import { BYTES_PER_ELEMENT, type DType, elementCount } from "../dtype.ts";

/** Bytes of a tensor, or undefined if the shape is none or they are too many to count exactly. */
export function byteLengthOf(dtype: DType, shape: readonly number[]): number | undefined {
  try {
    return elementCount([...shape, BYTES_PER_ELEMENT[dtype]]);
  } catch {
    return undefined;
  }
}
