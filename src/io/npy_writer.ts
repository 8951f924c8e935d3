import type { DType } from "../dtype.ts";
import { BYTES_PER_ELEMENT, elementCount } from "../dtype.ts";
import { PackhorseError } from "../error.ts";
import { AtomicFile } from "./atomic_file.ts";
import type { NpyArray } from "./npy.ts";

/** Options of {@linkcode writeNpy}. */
export interface WriteNpyOptions {
  /** When it aborts, no file is left. */
  readonly signal?: AbortSignal | undefined;
}

const DESCR: Readonly<Partial<Record<DType, string>>> = {
  f16: "<f2",
  f32: "<f4",
  f64: "<f8",
  i32: "<i4",
  u8: "|u1",
};

/**
 * Writes an array that `numpy.load` reads, format version 1.0, to a file that appears complete or not at all.
 *
 * Throws `unsupported` for bf16, which NumPy does not know; `invalid-argument` unless the data are as many bytes as the shape
 * says; `not-found` or `io` if the file cannot be written.
 *
 * @example
 * ```ts
 * import { readNpy, writeNpy } from "@packhorse/packhorse/io";
 * import { assertEquals } from "@std/assert";
 *
 * const path = await Deno.makeTempFile({ suffix: ".npy" });
 * const array = { dtype: "u8", shape: [2, 2], data: Uint8Array.of(1, 2, 3, 4) } as const;
 * await writeNpy(path, array);
 * assertEquals(await readNpy(path), { ...array, shape: [2, 2] });
 * ```
 */
export async function writeNpy(
  path: string,
  { dtype, shape, data }: NpyArray,
  { signal }: WriteNpyOptions = {},
): Promise<void> {
  const descr = DESCR[dtype];
  if (descr === undefined) {
    throw new PackhorseError("unsupported", `Cannot write ${path}: NumPy has no ${dtype}`);
  }
  const expected = elementCount([...shape, BYTES_PER_ELEMENT[dtype]]);
  if (data.byteLength !== expected) {
    throw new PackhorseError(
      "invalid-argument",
      `Cannot write ${path}: the shape [${
        shape.join(", ")
      }] of ${dtype} takes ${expected} bytes, ` +
        `got ${data.byteLength}`,
    );
  }
  // A tuple of one has a comma.
  const sizes = shape.length === 1 ? `${shape[0]},` : shape.join(", ");
  const text = `{'descr': '${descr}', 'fortran_order': False, 'shape': (${sizes}), }`;
  // The data begin at a multiple of 64 bytes.
  const length = Math.ceil((10 + text.length + 1) / 64) * 64 - 10;
  const header = new TextEncoder().encode(`${text.padEnd(length - 1)}\n`);
  using file = await AtomicFile.create(path, { signal });
  await file.write(
    Uint8Array.of(0x93, ...new TextEncoder().encode("NUMPY"), 1, 0, length % 256, length >> 8),
    0,
  );
  await file.write(header, 10);
  await file.write(data, 10 + length);
  await file.commit();
}
