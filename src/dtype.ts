import { PackhorseError } from "./error.ts";

/** Element type of a tensor or a device buffer. */
export type DType = "f16" | "bf16" | "f32" | "i32" | "u8" | "f64";

/** Bytes that one element of each {@linkcode DType} takes. */
export const BYTES_PER_ELEMENT: Readonly<Record<DType, number>> = {
  f16: 2,
  bf16: 2,
  f32: 4,
  i32: 4,
  u8: 1,
  f64: 8,
};

/** Number of elements of a shape; throws `invalid-argument` unless each size is a non-negative safe integer and so is their product. */
export function elementCount(shape: readonly number[]): number {
  let count = 1;
  for (const size of shape) {
    count *= size;
    if (!Number.isSafeInteger(size) || size < 0 || !Number.isSafeInteger(count)) {
      throw new PackhorseError(
        "invalid-argument",
        `Cannot count the elements of shape [${shape.join(", ")}]`,
      );
    }
  }
  return count;
}
