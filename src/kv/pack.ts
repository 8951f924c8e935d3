import type { Device } from "../device/device.ts";
import {
  type KvRecords,
  MalformedBlock,
  malformedError,
  nonFiniteError,
  ResidentBlocks,
  ResidentRecords,
} from "./blocks.ts";
import { BLOCK_TOKENS, type KvCodec, type KvCodecOptions, resolveCodec } from "./codec.ts";
import { checkPacked, type PackedKv } from "./packed.ts";
import {
  checkPair,
  type KvLayout,
  type KvPair,
  type KvTensor,
  placeTokens,
  sliceTokens,
  tensorByteLength,
  withTokens,
} from "./tensor.ts";

/**
 * Packs the keys and values of a layer.
 *
 * Both are `[heads, tokens, headDim]`. Every 64 tokens become a block, as
 * {@linkcode KvCodecOptions} describes; the tokens after the last block stay in
 * their own type. The tensors must not change until the promise settles.
 *
 * Throws `non-finite` if a block holds a NaN or an infinity (unless
 * `keepNonFinite`), `invalid-argument` for options or tensors outside their range,
 * `out-of-memory`, `disposed`, and `cuda` if the GPU fails.
 *
 * @example
 * ```ts
 * import { Device, type KvTensor, packKv, unpackKv } from "@packhorse/packhorse";
 * import { assert } from "@std/assert";
 *
 * using device = Device.open();
 * const x = Float16Array.from({ length: 2 * 70 * 64 }, (_, i) => Math.sin(i));
 * const tensor: KvTensor = { dtype: "f16", shape: [2, 70, 64], data: new Uint8Array(x.buffer) };
 * const packed = await packKv(device, { keys: tensor, values: tensor }, { keyRel: 0.05 });
 * assert(packed.records.byteLength < x.byteLength);
 *
 * const { keys } = await unpackKv(device, packed);
 * const restored = new Float16Array(keys.data.buffer);
 * // Half a scale, which is 0.05 times the range; and rounding to 16 bits.
 * assert(restored.every((value, i) => Math.abs(value - x[i]!) <= 0.05 * 2 / 2 + 0.001));
 * ```
 */
export async function packKv(
  device: Device,
  cache: KvPair<KvTensor>,
  options: KvCodecOptions = {},
): Promise<PackedKv> {
  const codec = resolveCodec(options);
  const { layout, bytes } = checkPair(cache);
  const { dtype, shape } = layout;
  const blockTokens = packedTokens(codec, shape[1]);
  const slice = (first: number, last: number) => ({
    keys: sliceTokens(bytes.keys, layout, first, last),
    values: sliceTokens(bytes.values, layout, first, last),
  });
  const records = blockTokens === 0
    ? { records: new Uint8Array(), offsets: new BigUint64Array(1) }
    : await packBlocks(device, codec, withTokens(layout, blockTokens), slice(0, blockTokens));
  const tail = slice(blockTokens, shape[1]);
  return { codec, dtype, shape, ...records, tail: joinTail(tail) };
}

/** How many of a layer's tokens are packed: whole blocks that leave the residual. */
export function packedTokens({ residual }: KvCodec, tokens: number): number {
  return Math.floor(Math.max(0, tokens - residual) / BLOCK_TOKENS) * BLOCK_TOKENS;
}

/** A tail as it is stored: keys, then values. */
export function joinTail({ keys, values }: KvPair<Uint8Array>): Uint8Array<ArrayBuffer> {
  const tail = new Uint8Array(keys.byteLength + values.byteLength);
  tail.set(keys);
  tail.set(values, keys.byteLength);
  return tail;
}

async function packBlocks(
  device: Device,
  codec: KvCodec,
  layout: KvLayout,
  bytes: KvPair<Uint8Array<ArrayBuffer>>,
): Promise<KvRecords> {
  using blocks = await ResidentBlocks.upload(device, layout, bytes);
  const encoded = await blocks.encode(codec);
  if (!(encoded instanceof ResidentRecords)) throw nonFiniteError(encoded);
  using records = encoded;
  return await records.download();
}

/**
 * Restores the keys and values of a packed layer, in their original order, type
 * and shape.
 *
 * The records are untrusted: those that no encoder writes are refused. (A flipped
 * bit may yet decode to other values; the checksums of a `.phkv` file find it.)
 *
 * Throws `corrupt` if a record is malformed, `invalid-argument` if the parts do
 * not fit together, `out-of-memory`, `disposed`, and `cuda` if the GPU fails.
 *
 * @example
 * ```ts
 * import { Device, type KvTensor, packKv, unpackKv } from "@packhorse/packhorse";
 * import { assertEquals } from "@std/assert";
 *
 * using device = Device.open();
 * const zeros: KvTensor = { dtype: "bf16", shape: [1, 100, 16], data: new Uint8Array(3200) };
 * const packed = await packKv(device, { keys: zeros, values: zeros });
 * assertEquals(await unpackKv(device, packed), { keys: zeros, values: zeros });
 * ```
 */
export async function unpackKv(device: Device, packed: PackedKv): Promise<KvPair<KvTensor>> {
  const { codec, layout, records, tail } = checkPacked(packed);
  const { dtype, shape } = layout;
  const blockTokens = (records.offsets.length - 1) * BLOCK_TOKENS;
  const blocks = blockTokens === 0
    ? { keys: new Uint8Array(), values: new Uint8Array() }
    : await unpackBlocks(device, codec, withTokens(layout, blockTokens), records);
  const restore = (head: Uint8Array<ArrayBuffer>, tail: Uint8Array): KvTensor => {
    if (tail.byteLength === 0) return { dtype, shape, data: head };
    const data = new Uint8Array(tensorByteLength(layout));
    placeTokens(data, layout, 0, head);
    placeTokens(data, layout, blockTokens, tail);
    return { dtype, shape, data };
  };
  const half = tail.byteLength / 2;
  return {
    keys: restore(blocks.keys, tail.subarray(0, half)),
    values: restore(blocks.values, tail.subarray(half)),
  };
}

async function unpackBlocks(
  device: Device,
  codec: KvCodec,
  layout: KvLayout,
  records: KvRecords,
): Promise<KvPair<Uint8Array<ArrayBuffer>>> {
  using resident = await ResidentRecords.upload(device, { codec, layout }, records);
  const decoded = await resident.decode();
  if (decoded instanceof MalformedBlock) throw malformedError(decoded.block);
  return decoded;
}
