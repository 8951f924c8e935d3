import { fixedBytes } from "../device/host_array.ts";
import { BYTES_PER_ELEMENT, type DType, elementCount } from "../dtype.ts";
import { PackhorseError } from "../error.ts";

/** Type of the elements of a key/value cache. */
export type KvDType = Extract<DType, "f16" | "bf16" | "f32">;

/** Shape of a layer's keys, and of its values: `[heads, tokens, headDim]`, `headDim` contiguous. */
export type KvShape = readonly [heads: number, tokens: number, headDim: number];

/** One of the two tensors of a layer. */
export type KvPart = "keys" | "values";

/** Something for the keys, and the same for the values. */
export interface KvPair<T> {
  /** What belongs to the keys. */
  readonly keys: T;
  /** What belongs to the values. */
  readonly values: T;
}

/** Type and shape of a layer's keys, and of its values. */
export interface KvLayout {
  /** Type of the elements. */
  readonly dtype: KvDType;
  /** 1 to 4096 heads, any number of tokens, channels of a head a multiple of 16 up to 256. */
  readonly shape: KvShape;
}

/** Keys (after rotary embedding) or values of a layer, in host memory. */
export interface KvTensor extends KvLayout {
  /** The elements, little-endian, row by row. */
  readonly data: Uint8Array;
}

/** Both parts, keys first. */
export const PARTS = ["keys", "values"] as const satisfies readonly KvPart[];

/** Bytes of one token of one head. */
export function rowByteLength({ dtype, shape }: KvLayout): number {
  return shape[2] * BYTES_PER_ELEMENT[dtype];
}

/** Bytes of one tensor. */
export function tensorByteLength({ dtype, shape }: KvLayout): number {
  return elementCount([...shape, BYTES_PER_ELEMENT[dtype]]);
}

/** The same layout with another number of tokens. */
export function withTokens(
  { dtype, shape: [heads, , headDim] }: KvLayout,
  tokens: number,
): KvLayout {
  return { dtype, shape: [heads, tokens, headDim] };
}

/** Throws `invalid-argument` unless the codec takes tensors of this type and shape. */
export function checkLayout({ dtype, shape }: KvLayout): void {
  const sizes = `shape [${[...shape].join(", ")}]`;
  const [heads, tokens, headDim] = shape;
  const isCount = (value: number) => Number.isSafeInteger(value) && value >= 0;
  if (!["f16", "bf16", "f32"].includes(dtype)) {
    refuse(`dtype must be f16, bf16 or f32, got ${dtype}`);
  }
  if (shape.length !== 3) refuse(`${sizes} is not [heads, tokens, headDim]`);
  if (!isCount(heads) || heads < 1 || heads > 4096) {
    refuse(`${sizes} has ${heads} heads; 1 to 4096 are possible`);
  }
  if (!isCount(tokens)) refuse(`${sizes} has ${tokens} tokens; it takes a count`);
  if (!isCount(headDim) || headDim % 16 !== 0 || headDim < 16 || headDim > 256) {
    refuse(`${sizes} has heads of ${headDim} channels; multiples of 16 up to 256 are possible`);
  }
  elementCount([2, ...shape, BYTES_PER_ELEMENT[dtype]]);
}

/** The bytes of a tensor, in place. Throws `invalid-argument` if they do not fit its type and shape. */
export function tensorBytes(tensor: KvTensor): Uint8Array<ArrayBuffer> {
  checkLayout(tensor);
  return checkedBytes(tensor.data, tensorByteLength(tensor), "data");
}

/** The bytes of `view`, in place. Throws `invalid-argument` unless there are `byteLength`. */
export function checkedBytes(
  view: ArrayBufferView,
  byteLength: number,
  name: string,
): Uint8Array<ArrayBuffer> {
  const bytes = fixedBytes(view, `Cannot use ${name}`);
  if (bytes.byteLength !== byteLength) {
    refuse(`${name} must have ${byteLength} bytes, got ${bytes.byteLength}`);
  }
  return bytes;
}

/** The layout that keys and values share, and their bytes. Throws `invalid-argument` if they differ. */
export function checkPair(
  { keys, values }: KvPair<KvTensor>,
): { layout: KvLayout; bytes: KvPair<Uint8Array<ArrayBuffer>> } {
  const bytes = { keys: tensorBytes(keys), values: tensorBytes(values) };
  const { dtype, shape } = keys;
  if (dtype !== values.dtype || shape.some((size, i) => size !== values.shape[i])) {
    refuse(
      `keys are ${dtype} [${shape.join(", ")}], ` +
        `but values ${values.dtype} [${values.shape.join(", ")}]`,
    );
  }
  return { layout: { dtype, shape }, bytes };
}

/** Tokens `[first, last)` of a tensor: itself if these are all, else a copy. */
export function sliceTokens(
  bytes: Uint8Array<ArrayBuffer>,
  layout: KvLayout,
  first: number,
  last: number,
): Uint8Array<ArrayBuffer> {
  const { shape: [heads, tokens] } = layout;
  if (first === 0 && last === tokens) return bytes;
  const row = rowByteLength(layout);
  const slice = new Uint8Array(heads * (last - first) * row);
  for (let head = 0; head < heads; head++) {
    const start = head * tokens;
    slice.set(
      bytes.subarray((start + first) * row, (start + last) * row),
      head * (last - first) * row,
    );
  }
  return slice;
}

/** Puts a tensor of fewer tokens in place, from token `first` on. */
export function placeTokens(
  target: Uint8Array,
  layout: KvLayout,
  first: number,
  slice: Uint8Array,
): void {
  const { shape: [heads, tokens] } = layout;
  const headBytes = slice.byteLength / heads;
  for (let head = 0; head < heads; head++) {
    target.set(
      slice.subarray(head * headBytes, (head + 1) * headBytes),
      (head * tokens + first) * rowByteLength(layout),
    );
  }
}

function refuse(reason: string): never {
  throw new PackhorseError("invalid-argument", `Cannot use this cache: ${reason}`);
}
