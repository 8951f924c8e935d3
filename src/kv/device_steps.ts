import * as native from "../../ffi/kv.ts";
import type { NativeTensor } from "../../ffi/tensor.ts";
import { type Device, nativeOf } from "../device/device.ts";
import { type DeviceBuffer, regionOn } from "../device/device_buffer.ts";
import { elementCount } from "../dtype.ts";
import { PackhorseError } from "../error.ts";
import { malformedError, nonFiniteError, nonFinitePlace, NOTHING } from "./blocks.ts";
import {
  BLOCK_TOKENS,
  type KvCodec,
  type KvCodecOptions,
  nativeCodec,
  resolveCodec,
} from "./codec.ts";
import { checkLayout, type KvDType, type KvLayout, type KvPair } from "./tensor.ts";

/** A codec for layers of one type and shape on a device, and the memory that its work takes. */
export interface KvPlan extends KvLayout {
  /** The options with every default filled in. */
  readonly codec: KvCodec;
  /** Whole blocks of 64 tokens; the tokens after them are neither read nor written. */
  readonly blocks: number;
  /** Bytes of each buffer of {@linkcode KvRecordBuffers}. */
  readonly byteLengths: Readonly<Record<keyof KvRecordBuffers, number>>;
}

/** Keys and values in the memory of a device; views must start at a multiple of 16 bytes. */
export type KvTensorBuffers = KvPair<DeviceBuffer<KvDType>>;

/** Records in the memory of a device, and what encoding and decoding need besides. No views with an offset. */
export interface KvRecordBuffers {
  /** The records, one after another. */
  readonly records: DeviceBuffer<"u8">;
  /** u64 `[blocks + 1]`: record `i` goes from byte `offsets[i]` to `offsets[i + 1]`. */
  readonly offsets: DeviceBuffer<"u8">;
  /** Scratch of the encoder. */
  readonly workspace: DeviceBuffer<"u8">;
  /** What {@linkcode readEncodeStatus} or {@linkcode checkDecodeStatus} reads. */
  readonly status: DeviceBuffer<"u8">;
}

/**
 * Prepares packing layers that stay on a device.
 *
 * Throws `invalid-argument` for options or a layout outside their range, or without
 * a whole block.
 *
 * @example
 * ```ts
 * import * as packhorse from "@packhorse/packhorse";
 * import { assert } from "@std/assert";
 *
 * using device = packhorse.Device.open();
 * const plan = packhorse.planKv(device, { dtype: "f32", shape: [1, 64, 16] }, { keyRel: 0.1 });
 * using keys = device.createBuffer("f32", 64 * 16);
 * using values = device.createBuffer("f32", 64 * 16);
 * keys.upload(Float32Array.from({ length: 64 * 16 }, (_, i) => i % 16));
 * values.fill(0);
 * using buffers = packhorse.createKvBuffers(device, plan);
 * packhorse.encodeKv(plan, { keys, values }, buffers);
 * const encoded = packhorse.readEncodeStatus(plan, await buffers.status.downloadAsync());
 * assert(encoded.recordsByteLength < 2 * 64 * 16 * 4);
 *
 * packhorse.decodeKv(plan, buffers, { keys, values });
 * packhorse.checkDecodeStatus(await buffers.status.downloadAsync());
 * assert(Math.abs(keys.download()[7]! - 7) <= 0.1 * 15 / 2);
 * ```
 */
export function planKv(device: Device, layout: KvLayout, options: KvCodecOptions = {}): KvPlan {
  const codec = resolveCodec(options);
  checkLayout(layout);
  const { dtype, shape } = layout;
  const blocks = Math.floor(shape[1] / BLOCK_TOKENS);
  if (blocks === 0) {
    const message = `Cannot plan for ${shape[1]} tokens: a block takes ${BLOCK_TOKENS}`;
    throw new PackhorseError("invalid-argument", message);
  }
  const { library } = nativeOf(device);
  const bytes = nativeCodec(codec, layout);
  const byteLengths = {
    records: Number(native.recordsCapacity(library, bytes)),
    offsets: 8 * (blocks + 1),
    workspace: Math.max(16, Number(native.workspaceBytes(library, bytes))),
    status: 16,
  };
  return { codec, dtype, shape, blocks, byteLengths };
}

/**
 * Allocates the buffers of a plan; disposing the result frees them all.
 *
 * Throws `out-of-memory`. Example: {@linkcode planKv}.
 */
export function createKvBuffers(device: Device, plan: KvPlan): KvRecordBuffers & Disposable {
  using stack = new DisposableStack();
  const create = (name: keyof KvRecordBuffers) =>
    stack.use(device.createBuffer("u8", plan.byteLengths[name]));
  const buffers = {
    records: create("records"),
    offsets: create("offsets"),
    workspace: create("workspace"),
    status: create("status"),
  };
  const owner = stack.move();
  return { ...buffers, [Symbol.dispose]: () => owner.dispose() };
}

/**
 * Enqueues packing keys and values `[heads, tokens, headDim]` into records.
 *
 * Throws `invalid-argument` if a buffer is of another device or type, too small, or
 * placed wrongly; `disposed`. Example: {@linkcode planKv}.
 */
export function encodeKv(plan: KvPlan, tensors: KvTensorBuffers, target: KvRecordBuffers): void {
  const { device } = tensors.keys;
  native.encode(nativeOf(device), nativeCodec(plan.codec, plan), {
    keys: checkedTensor(device, plan, "keys", tensors.keys),
    values: checkedTensor(device, plan, "values", tensors.values),
    records: checkedMemory(device, plan, "records", target, plan.byteLengths.records),
    offsets: checkedMemory(device, plan, "offsets", target),
    workspace: checkedMemory(device, plan, "workspace", target),
    status: checkedMemory(device, plan, "status", target),
  });
}

/**
 * Enqueues restoring the whole blocks of keys and values from records, which are
 * untrusted.
 *
 * Throws as {@linkcode encodeKv}. Example: {@linkcode planKv}.
 */
export function decodeKv(
  plan: KvPlan,
  source: Omit<KvRecordBuffers, "workspace">,
  target: KvTensorBuffers,
): void {
  const { device } = target.keys;
  const records = checkedMemory(device, plan, "records", source);
  native.decode(nativeOf(device), nativeCodec(plan.codec, plan), {
    records,
    recordsByteLength: source.records.byteLength,
    offsets: checkedMemory(device, plan, "offsets", source),
    keys: checkedTensor(device, plan, "keys", target.keys),
    values: checkedTensor(device, plan, "values", target.values),
    status: checkedMemory(device, plan, "status", source),
  });
}

/**
 * What {@linkcode encodeKv} left in the status buffer: the bytes of all records.
 *
 * Throws `non-finite` if a block holds a NaN or an infinity, unless the codec keeps
 * such blocks. Example: {@linkcode planKv}.
 */
export function readEncodeStatus(
  plan: KvPlan,
  status: Uint8Array<ArrayBuffer>,
): { recordsByteLength: number } {
  const [nonFinite, recordsByteLength] = statusWords(status);
  if (nonFinite !== NOTHING && !plan.codec.keepNonFinite) {
    throw nonFiniteError(nonFinitePlace(nonFinite));
  }
  return { recordsByteLength: Number(recordsByteLength) };
}

/**
 * Looks at what {@linkcode decodeKv} left in the status buffer.
 *
 * Throws `corrupt` if a record was malformed; what its block then holds is undefined.
 *
 * @example
 * ```ts
 * import { checkDecodeStatus, type PackhorseError } from "@packhorse/packhorse";
 * import { assertStringIncludes, assertThrows } from "@std/assert";
 *
 * const status = new Uint8Array(new BigUint64Array([3n, 0n]).buffer);
 * const error = assertThrows(() => checkDecodeStatus(status)) as PackhorseError;
 * assertStringIncludes(error.message, "block 3");
 * ```
 */
export function checkDecodeStatus(status: Uint8Array<ArrayBuffer>): void {
  const [malformed] = statusWords(status);
  if (malformed !== NOTHING) throw malformedError(Number(malformed));
}

function statusWords(status: Uint8Array<ArrayBuffer>): [bigint, bigint] {
  const view = new DataView(status.buffer, status.byteOffset, status.byteLength);
  return [view.getBigUint64(0, true), view.getBigUint64(8, true)];
}

function checkedTensor(
  device: Device,
  plan: KvPlan,
  name: keyof KvTensorBuffers,
  buffer: DeviceBuffer<KvDType>,
): NativeTensor {
  const length = elementCount(plan.shape);
  if (buffer.dtype !== plan.dtype || buffer.length !== length) {
    refuse(`${name} must be ${length} elements of ${plan.dtype}`, buffer);
  }
  if (buffer.byteOffset % 16 !== 0) {
    refuse(`${name} must start at a multiple of 16 bytes, not at ${buffer.byteOffset}`, buffer);
  }
  return regionOn(buffer, device);
}

function checkedMemory<Name extends keyof KvRecordBuffers>(
  device: Device,
  plan: KvPlan,
  name: Name,
  buffers: Pick<KvRecordBuffers, Name>,
  // Records to decode may be shorter than the most that there can be.
  least = name === "records" ? 1 : plan.byteLengths[name],
): NativeTensor["buffer"] {
  const buffer: DeviceBuffer = buffers[name];
  if (buffer.dtype !== "u8" || buffer.byteLength < least) {
    refuse(`${name} must be at least ${least} bytes (u8)`, buffer);
  }
  if (buffer.byteOffset !== 0) {
    refuse(`${name} must start where its memory starts, not at byte ${buffer.byteOffset}`, buffer);
  }
  return regionOn(buffer, device).buffer;
}

function refuse(rule: string, { dtype, length }: DeviceBuffer): never {
  const message = `Cannot use this buffer: ${rule}; it is ${length} elements of ${dtype}`;
  throw new PackhorseError("invalid-argument", message);
}
