import { KV_PART } from "../../ffi/enums.ts";
import * as native from "../../ffi/kv.ts";
import { type Device, nativeOf } from "../device/device.ts";
import type { DeviceBuffer } from "../device/device_buffer.ts";
import { BYTES_PER_ELEMENT } from "../dtype.ts";
import { PackhorseError } from "../error.ts";
import {
  malformedError,
  nonFiniteError,
  nonFinitePlace,
  NOTHING,
  ResidentRecords,
} from "./blocks.ts";
import {
  createBytes,
  downloadBytes,
  downloadStatus,
  memoryOf,
  tensorIn,
  uploadBytes,
} from "./buffers.ts";
import {
  BLOCK_TOKENS,
  type KvCodec,
  type KvCodecOptions,
  nativeCodec,
  resolveCodec,
} from "./codec.ts";
import { checkPacked, type PackedKv } from "./packed.ts";
import {
  checkedBytes,
  checkLayout,
  type KvDType,
  type KvLayout,
  type KvPair,
  type KvPart,
  type KvShape,
  type KvTensor,
  tensorByteLength,
  tensorBytes,
  withTokens,
} from "./tensor.ts";

/** The keys, or the values, of the whole blocks of a layer after quantising. */
export interface QuantizedKv {
  /** `[blocks, 64, heads, headDim]` */
  readonly codes: Uint8Array;
  /**
   * `[blocks, groups]`, in float32, each a value of the cache's type. Groups are ordered by
   * `[token]` (packkv per token), `[head][token]` (per head), `[head][channel]` (kivi, keys) or
   * `[head][token][64 channels]` (kivi, values).
   */
  readonly scales: Float32Array;
  /** Zero points, as the scales. */
  readonly zeros: Int32Array;
}

/** The codes of a layer's whole blocks, ready to be packed. */
export interface KvCodes extends KvPair<QuantizedKv> {
  /** `[blocks, 64]`: position `i` of a block takes the token `order[i]` of it. */
  readonly order: Uint8Array;
}

/**
 * Step 1 of packing: values to codes, as {@linkcode KvCodecOptions} describes.
 * `code = clamp(round(x / scale) - zero, 0, limit)` with `zero = round(min / scale)`,
 * all in float32, halves to even. Tokens after the last block are left out;
 * `residual` plays no part.
 *
 * Throws `non-finite` if a group has no scale, unless `keepNonFinite`: then the
 * codes of its block are undefined. Otherwise as {@linkcode packKv}.
 *
 * @example
 * ```ts
 * import { dequantizeKv, Device, type KvTensor, quantizeKv } from "@packhorse/packhorse";
 * import { assert, assertEquals } from "@std/assert";
 *
 * using device = Device.open();
 * const x = Float32Array.from({ length: 64 * 16 }, (_, i) => i % 16);
 * const tensor: KvTensor = { dtype: "f32", shape: [1, 64, 16], data: new Uint8Array(x.buffer) };
 * const quantized = await quantizeKv(device, tensor, "keys", { keyRel: 0.2 });
 * assertEquals(quantized.scales[0], 3); // 0.2 times a range of 15
 * assertEquals(quantized.codes.subarray(0, 6), Uint8Array.of(0, 0, 1, 1, 1, 2));
 *
 * const { data } = await dequantizeKv(device, { ...tensor, ...quantized }, "keys", { keyRel: 0.2 });
 * assert(new Float32Array(data.buffer).every((value, i) => Math.abs(value - x[i]!) <= 1.5));
 * ```
 */
export async function quantizeKv(
  device: Device,
  tensor: KvTensor,
  part: KvPart,
  options: KvCodecOptions = {},
): Promise<QuantizedKv> {
  const codec = resolveCodec(options);
  const bytes = tensorBytes(tensor);
  const sizes = stepSizes(device, codec, tensor);
  if (sizes.blocks === 0) return emptyCodes();
  using x = await uploadBytes(device, bytes);
  using codes = new CodesOnDevice(device, sizes, part);
  using status = createBytes(device, 16);
  native.quantize(nativeOf(device), sizes.codec, KV_PART[part], {
    x: tensorIn(x),
    ...codes.native,
    status: memoryOf(status),
  });
  const [nonFinite] = await downloadStatus(status);
  if (nonFinite !== NOTHING && !codec.keepNonFinite) {
    throw nonFiniteError(nonFinitePlace(nonFinite));
  }
  return await codes.download();
}

/**
 * Step 2 of packing: one order of the tokens of each block, for the keys and the
 * values of all heads; `[blocks, 64]`.
 *
 * - `none` keeps the order.
 * - `median` sorts by the lower median of a token's value codes, descending, stable.
 * - `greedy` starts every pack with the token left whose codes are most cosine-similar
 *   to the mean of those left, and adds the token that widens the pack the least,
 *   measured by the sum over channels of `ceil(log2(max - min + 1))`.
 * - `auto` takes for each block whichever needs the fewest bits.
 *
 * Throws `invalid-argument` if the codes do not have the shape's number of elements.
 *
 * @example
 * ```ts
 * import { Device, repackKv } from "@packhorse/packhorse";
 * import { assertEquals } from "@std/assert";
 *
 * using device = Device.open();
 * const codes = Uint8Array.from({ length: 64 * 16 }, (_, i) => i >> 4); // token t has codes t
 * const order = await repackKv(device, [1, 64, 16], codes, codes, { repack: "median" });
 * assertEquals(order.subarray(0, 3), Uint8Array.of(63, 62, 61));
 * ```
 */
export async function repackKv(
  device: Device,
  shape: KvShape,
  keyCodes: Uint8Array,
  valueCodes: Uint8Array,
  options: KvCodecOptions = {},
): Promise<Uint8Array> {
  // The type plays no part: codes are bytes.
  const sizes = stepSizes(device, resolveCodec(options), { dtype: "f16", shape });
  const bytes = {
    keys: checkedBytes(keyCodes, sizes.codes, "the codes of the keys"),
    values: checkedBytes(valueCodes, sizes.codes, "the codes of the values"),
  };
  if (sizes.blocks === 0) return new Uint8Array();
  using keys = await uploadBytes(device, bytes.keys);
  using values = await uploadBytes(device, bytes.values);
  using order = createBytes(device, sizes.blocks * BLOCK_TOKENS);
  native.repack(nativeOf(device), sizes.codec, {
    keyCodes: memoryOf(keys),
    valueCodes: memoryOf(values),
    order: memoryOf(order),
  });
  return await downloadBytes(order, sizes.blocks * BLOCK_TOKENS);
}

/**
 * Step 3 of packing: codes to records. Of `pack` consecutive positions of a
 * channel the minimum `m` is stored, the width `w = ceil(log2(max - m + 1))`, and
 * `pack` fields `code - m` of `w` bits.
 *
 * The result has no tail: its shape ends with the last block.
 *
 * Throws `invalid-argument` if an array has the wrong length, a scale is no finite
 * positive value of the type, or an order is no permutation.
 *
 * @example
 * ```ts
 * import { Device, packCodes, unpackCodes } from "@packhorse/packhorse";
 * import { assertEquals } from "@std/assert";
 *
 * using device = Device.open();
 * const part = {
 *   codes: Uint8Array.from({ length: 64 * 16 }, (_, i) => i % 5),
 *   scales: new Float32Array(64).fill(0.5),
 *   zeros: new Int32Array(64).fill(-2),
 * };
 * const order = Uint8Array.from({ length: 64 }, (_, i) => i);
 * const codes = { keys: part, values: part, order };
 * const packed = await packCodes(device, { dtype: "f16", shape: [1, 64, 16], ...codes });
 * assertEquals(await unpackCodes(device, packed), codes);
 * ```
 */
export async function packCodes(
  device: Device,
  codes: KvLayout & KvCodes,
  options: KvCodecOptions = {},
): Promise<PackedKv> {
  const codec = resolveCodec(options);
  const { dtype } = codes;
  const sizes = stepSizes(device, codec, codes);
  const orderBytes = checkedBytes(codes.order, sizes.blocks * BLOCK_TOKENS, "order");
  checkOrder(orderBytes);
  checkScales(codes.keys.scales, dtype, "the keys");
  checkScales(codes.values.scales, dtype, "the values");
  const { shape } = withTokens(codes, sizes.blocks * BLOCK_TOKENS);
  using keys = await CodesOnDevice.upload(device, sizes, "keys", codes.keys);
  using values = await CodesOnDevice.upload(device, sizes, "values", codes.values);
  if (sizes.blocks === 0) {
    const records = { records: new Uint8Array(), offsets: new BigUint64Array(1) };
    return { codec, dtype, shape, ...records, tail: new Uint8Array() };
  }
  using order = await uploadBytes(device, orderBytes);
  const { library } = nativeOf(device);
  using records = createBytes(device, Number(native.recordsCapacity(library, sizes.codec)));
  using offsets = createBytes(device, (sizes.blocks + 1) * 8);
  using workspace = createBytes(device, Number(native.workspaceBytes(library, sizes.codec)));
  using status = createBytes(device, 16);
  native.pack(nativeOf(device), sizes.codec, {
    keys: keys.native,
    values: values.native,
    order: memoryOf(order),
    records: memoryOf(records),
    offsets: memoryOf(offsets),
    workspace: memoryOf(workspace),
    status: memoryOf(status),
  });
  const [, recordsByteLength] = await downloadStatus(status);
  return {
    codec,
    dtype,
    shape,
    records: await downloadBytes(records, Number(recordsByteLength)),
    offsets: new BigUint64Array((await downloadBytes(offsets, (sizes.blocks + 1) * 8)).buffer),
    tail: new Uint8Array(),
  };
}

/**
 * Inverse of {@linkcode packCodes}: the codes in the original order of the tokens,
 * and the order. Blocks stored as they were have no codes: theirs and the zero
 * points are 0, the scales NaN.
 *
 * Throws as {@linkcode unpackKv}.
 *
 * @example
 * ```ts
 * import { Device, type KvTensor, packKv, unpackCodes } from "@packhorse/packhorse";
 * import { assertEquals } from "@std/assert";
 *
 * using device = Device.open();
 * const zeros: KvTensor = { dtype: "f16", shape: [1, 64, 16], data: new Uint8Array(2048) };
 * const packed = await packKv(device, { keys: zeros, values: zeros });
 * const { keys } = await unpackCodes(device, packed);
 * assertEquals([keys.codes[0], keys.scales[0], keys.zeros[0]], [0, 1, 0]);
 * ```
 */
export async function unpackCodes(device: Device, packed: PackedKv): Promise<KvCodes> {
  const { codec, layout, records } = checkPacked(packed);
  const blockLayout = withTokens(layout, (records.offsets.length - 1) * BLOCK_TOKENS);
  const sizes = stepSizes(device, codec, blockLayout);
  if (sizes.blocks === 0) {
    return { keys: emptyCodes(), values: emptyCodes(), order: new Uint8Array() };
  }
  using resident = await ResidentRecords.upload(device, { codec, layout: blockLayout }, records);
  using keys = new CodesOnDevice(device, sizes, "keys");
  using values = new CodesOnDevice(device, sizes, "values");
  using order = createBytes(device, sizes.blocks * BLOCK_TOKENS);
  using status = createBytes(device, 16);
  native.unpack(nativeOf(device), sizes.codec, {
    ...resident.native,
    keys: keys.native,
    values: values.native,
    order: memoryOf(order),
    status: memoryOf(status),
  });
  const [malformed] = await downloadStatus(status);
  if (malformed !== NOTHING) throw malformedError(Number(malformed));
  return {
    keys: await keys.download(),
    values: await values.download(),
    order: await downloadBytes(order, sizes.blocks * BLOCK_TOKENS),
  };
}

/**
 * Inverse of {@linkcode quantizeKv}: `x' = (code + zero) * scale`, rounded to the
 * type, as a tensor of the given shape; tokens after the last block are 0.
 *
 * Throws `invalid-argument` if an array has the wrong length.
 *
 * @example
 * ```ts
 * import { dequantizeKv, Device } from "@packhorse/packhorse";
 * import { assertEquals } from "@std/assert";
 *
 * using device = Device.open();
 * const quantized = {
 *   codes: new Uint8Array(64 * 16).fill(3),
 *   scales: new Float32Array(64).fill(0.5),
 *   zeros: new Int32Array(64).fill(-1),
 * };
 * const layout = { dtype: "f32", shape: [1, 64, 16] } as const;
 * const { data } = await dequantizeKv(device, { ...layout, ...quantized }, "keys");
 * assertEquals(new Float32Array(data.buffer)[0], (3 - 1) * 0.5);
 * ```
 */
export async function dequantizeKv(
  device: Device,
  quantized: KvLayout & QuantizedKv,
  part: KvPart,
  options: KvCodecOptions = {},
): Promise<KvTensor> {
  const { dtype, shape } = quantized;
  const sizes = stepSizes(device, resolveCodec(options), quantized);
  using codes = await CodesOnDevice.upload(device, sizes, part, quantized);
  const byteLength = tensorByteLength(quantized);
  if (sizes.blocks === 0) return { dtype, shape, data: new Uint8Array(byteLength) };
  using x = createBytes(device, byteLength);
  x.fill();
  native.dequantize(nativeOf(device), sizes.codec, KV_PART[part], {
    ...codes.native,
    x: tensorIn(x),
  });
  return { dtype, shape, data: await downloadBytes(x, byteLength) };
}

/** A codec for a layer, and how many elements the arrays of the steps have. */
interface StepSizes {
  readonly codec: Uint8Array<ArrayBuffer>;
  readonly blocks: number;
  readonly codes: number;
  readonly groups: KvPair<number>;
}

function stepSizes(device: Device, codec: KvCodec, { dtype, shape }: KvLayout): StepSizes {
  checkLayout({ dtype, shape });
  const [heads, tokens, headDim] = shape;
  const blocks = Math.floor(tokens / BLOCK_TOKENS);
  const bytes = nativeCodec(codec, { dtype, shape });
  const { library } = nativeOf(device);
  const groups = (part: KvPart) => blocks * Number(native.groups(library, bytes, KV_PART[part]));
  return {
    codec: bytes,
    blocks,
    codes: blocks * BLOCK_TOKENS * heads * headDim,
    groups: { keys: groups("keys"), values: groups("values") },
  };
}

function emptyCodes(): QuantizedKv {
  return { codes: new Uint8Array(), scales: new Float32Array(), zeros: new Int32Array() };
}

/** Codes, scales and zero points of one part in the memory of a device. */
class CodesOnDevice implements Disposable {
  readonly #sizes: { readonly codes: number; readonly groups: number };
  readonly #codes: DeviceBuffer<"u8">;
  readonly #scales: DeviceBuffer<"u8">;
  readonly #zeros: DeviceBuffer<"u8">;

  constructor(device: Device, { codes, groups }: StepSizes, part: KvPart) {
    this.#sizes = { codes, groups: groups[part] };
    using stack = new DisposableStack();
    this.#codes = stack.use(createBytes(device, codes));
    this.#scales = stack.use(createBytes(device, 4 * groups[part]));
    this.#zeros = stack.use(createBytes(device, 4 * groups[part]));
    stack.move();
  }

  /** Throws `invalid-argument` if an array has another length. */
  static async upload(
    device: Device,
    sizes: StepSizes,
    part: KvPart,
    { codes, scales, zeros }: QuantizedKv,
  ): Promise<CodesOnDevice> {
    const groups = sizes.groups[part];
    const arrays = [
      checkedBytes(codes, sizes.codes, `the codes of the ${part}`),
      checkedBytes(scales, 4 * groups, `the scales of the ${part}`),
      checkedBytes(zeros, 4 * groups, `the zero points of the ${part}`),
    ];
    using stack = new DisposableStack();
    const target = stack.use(new CodesOnDevice(device, sizes, part));
    const buffers = [target.#codes, target.#scales, target.#zeros];
    for (const [i, bytes] of arrays.entries()) {
      if (bytes.byteLength > 0) await buffers[i]!.view(0, bytes.byteLength).uploadAsync(bytes);
    }
    stack.move();
    return target;
  }

  get native(): native.NativeCodes {
    return {
      codes: memoryOf(this.#codes),
      scales: memoryOf(this.#scales),
      zeros: memoryOf(this.#zeros),
    };
  }

  async download(): Promise<QuantizedKv> {
    const { codes, groups } = this.#sizes;
    return {
      codes: await downloadBytes(this.#codes, codes),
      scales: new Float32Array((await downloadBytes(this.#scales, 4 * groups)).buffer),
      zeros: new Int32Array((await downloadBytes(this.#zeros, 4 * groups)).buffer),
    };
  }

  [Symbol.dispose](): void {
    for (const buffer of [this.#codes, this.#scales, this.#zeros]) buffer[Symbol.dispose]();
  }
}

function checkOrder(order: Uint8Array): void {
  for (let start = 0; start < order.length; start += BLOCK_TOKENS) {
    const tokens = new Set(order.subarray(start, start + BLOCK_TOKENS));
    if (tokens.size === BLOCK_TOKENS && Math.max(...tokens) < BLOCK_TOKENS) continue;
    const message = `Cannot pack: the order of block ${start / BLOCK_TOKENS} is no permutation ` +
      "of its 64 tokens";
    throw new PackhorseError("invalid-argument", message);
  }
}

function checkScales(scales: Float32Array, dtype: KvDType, name: string): void {
  const bits = new Uint32Array(scales.slice().buffer);
  const isStored = dtype === "f16"
    ? (scale: number) => Math.f16round(scale) === scale
    : (_: number, i: number) => BYTES_PER_ELEMENT[dtype] === 4 || (bits[i]! & 0xffff) === 0;
  const wrong = scales.findIndex((scale, i) =>
    !(scale > 0 && scale < Infinity && isStored(scale, i))
  );
  if (wrong < 0) return;
  const message = `Cannot pack: scale ${wrong} of ${name} must be a positive finite ${dtype}, ` +
    `got ${scales[wrong]}`;
  throw new PackhorseError("invalid-argument", message);
}
