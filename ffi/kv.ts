import { call, callAsync } from "./call.ts";
import type { HostBytes, NativeBuffer, NativeDevice } from "./device.ts";
import { type NativeTensor, place, placeIf } from "./tensor.ts";
import type { Library } from "./library.ts";

// The functions of packhorse.h, section "kv". Codecs are the bytes of a ph_kv_codec; buffers are used from
// their start, tensors from the byte offset that comes with them.

/** Codes, scales and zero points of one part. */
export interface NativeCodes {
  readonly codes: NativeBuffer;
  readonly scales: NativeBuffer;
  readonly zeros: NativeBuffer;
}

export interface NativeRecords {
  readonly records: NativeBuffer;
  readonly recordsByteLength: number;
  readonly offsets: NativeBuffer;
}

export interface EncodeBuffers {
  readonly keys: NativeTensor;
  readonly values: NativeTensor;
  readonly records: NativeBuffer;
  readonly offsets: NativeBuffer;
  readonly workspace: NativeBuffer;
  readonly status: NativeBuffer;
}

export interface DecodeBuffers extends NativeRecords {
  readonly keys: NativeTensor;
  readonly values: NativeTensor;
  readonly status: NativeBuffer;
}

export interface MeasureBuffers extends NativeRecords {
  readonly originals: { readonly keys: NativeTensor; readonly values: NativeTensor } | undefined;
  readonly statistics: NativeBuffer;
  readonly workspace: NativeBuffer;
  readonly status: NativeBuffer;
}

export function recordsCapacity({ symbols }: Library, codec: HostBytes): bigint {
  return symbols.ph_kv_records_capacity(codec);
}

export function workspaceBytes({ symbols }: Library, codec: HostBytes): bigint {
  return symbols.ph_kv_workspace_bytes(codec);
}

export function groups({ symbols }: Library, codec: HostBytes, part: number): bigint {
  return symbols.ph_kv_groups(codec, part);
}

export function encode(device: NativeDevice, codec: HostBytes, buffers: EncodeBuffers): void {
  call(device.library.symbols.ph_kv_encode, ...encodeArguments(device, codec, buffers));
}

export async function encodeAsync(
  device: NativeDevice,
  codec: HostBytes,
  buffers: EncodeBuffers,
): Promise<void> {
  const parameters = encodeArguments(device, codec, buffers);
  await device.during(
    () => callAsync(device.library.symbols.ph_kv_encode_async, ...parameters),
    buffersOf(buffers),
    codec,
  );
}

export function decode(device: NativeDevice, codec: HostBytes, buffers: DecodeBuffers): void {
  call(device.library.symbols.ph_kv_decode, ...decodeArguments(device, codec, buffers));
}

export async function decodeAsync(
  device: NativeDevice,
  codec: HostBytes,
  buffers: DecodeBuffers,
): Promise<void> {
  const parameters = decodeArguments(device, codec, buffers);
  await device.during(
    () => callAsync(device.library.symbols.ph_kv_decode_async, ...parameters),
    buffersOf(buffers),
    codec,
  );
}

export async function measureAsync(
  device: NativeDevice,
  codec: HostBytes,
  buffers: MeasureBuffers,
): Promise<void> {
  const parameters = measureArguments(device, codec, buffers);
  const { originals } = buffers;
  await device.during(
    () => callAsync(device.library.symbols.ph_kv_measure_async, ...parameters),
    [...buffersOf(buffers), ...(originals ? buffersOf(originals) : [])],
    codec,
  );
}

export function quantize(
  device: NativeDevice,
  codec: HostBytes,
  part: number,
  { x, codes, scales, zeros, status }: NativeCodes & {
    readonly x: NativeTensor;
    readonly status: NativeBuffer;
  },
): void {
  call(
    device.library.symbols.ph_kv_quantize,
    device.handle,
    codec,
    part,
    ...place(x),
    codes.handle,
    scales.handle,
    zeros.handle,
    status.handle,
  );
}

export function repack(
  device: NativeDevice,
  codec: HostBytes,
  { keyCodes, valueCodes, order }: {
    readonly keyCodes: NativeBuffer;
    readonly valueCodes: NativeBuffer;
    readonly order: NativeBuffer;
  },
): void {
  call(
    device.library.symbols.ph_kv_repack,
    device.handle,
    codec,
    keyCodes.handle,
    valueCodes.handle,
    order.handle,
  );
}

export function pack(
  device: NativeDevice,
  codec: HostBytes,
  { keys, values, order, records, offsets, workspace, status }: {
    readonly keys: NativeCodes;
    readonly values: NativeCodes;
    readonly order: NativeBuffer;
    readonly records: NativeBuffer;
    readonly offsets: NativeBuffer;
    readonly workspace: NativeBuffer;
    readonly status: NativeBuffer;
  },
): void {
  call(
    device.library.symbols.ph_kv_pack,
    device.handle,
    codec,
    ...codesArguments(keys),
    ...codesArguments(values),
    order.handle,
    records.handle,
    offsets.handle,
    workspace.handle,
    status.handle,
  );
}

export function unpack(
  device: NativeDevice,
  codec: HostBytes,
  { records, recordsByteLength, offsets, keys, values, order, status }: NativeRecords & {
    readonly keys: NativeCodes;
    readonly values: NativeCodes;
    readonly order: NativeBuffer;
    readonly status: NativeBuffer;
  },
): void {
  call(
    device.library.symbols.ph_kv_unpack,
    device.handle,
    codec,
    records.handle,
    BigInt(recordsByteLength),
    offsets.handle,
    ...codesArguments(keys),
    ...codesArguments(values),
    order.handle,
    status.handle,
  );
}

export function dequantize(
  device: NativeDevice,
  codec: HostBytes,
  part: number,
  { codes, scales, zeros, x }: NativeCodes & { readonly x: NativeTensor },
): void {
  call(
    device.library.symbols.ph_kv_dequantize,
    device.handle,
    codec,
    part,
    codes.handle,
    scales.handle,
    zeros.handle,
    ...place(x),
  );
}

function encodeArguments(
  device: NativeDevice,
  codec: HostBytes,
  { keys, values, records, offsets, workspace, status }: EncodeBuffers,
) {
  return [
    device.handle,
    codec,
    ...place(keys),
    ...place(values),
    records.handle,
    offsets.handle,
    workspace.handle,
    status.handle,
  ] as const;
}

function decodeArguments(
  device: NativeDevice,
  codec: HostBytes,
  { records, recordsByteLength, offsets, keys, values, status }: DecodeBuffers,
) {
  return [
    device.handle,
    codec,
    records.handle,
    BigInt(recordsByteLength),
    offsets.handle,
    ...place(keys),
    ...place(values),
    status.handle,
  ] as const;
}

function measureArguments(
  device: NativeDevice,
  codec: HostBytes,
  { records, recordsByteLength, offsets, originals, statistics, workspace, status }: MeasureBuffers,
) {
  return [
    device.handle,
    codec,
    records.handle,
    BigInt(recordsByteLength),
    offsets.handle,
    ...placeIf(originals?.keys),
    ...placeIf(originals?.values),
    statistics.handle,
    workspace.handle,
    status.handle,
  ] as const;
}

function codesArguments({ codes, scales, zeros }: NativeCodes) {
  return [codes.handle, scales.handle, zeros.handle] as const;
}

/** Every buffer among the members of an object. */
function buffersOf(members: object): NativeBuffer[] {
  return Object.values(members).flatMap((member) => {
    if (typeof member !== "object" || member === null) return [];
    if ("buffer" in member) return [member.buffer as NativeBuffer];
    return "hold" in member ? [member as NativeBuffer] : [];
  });
}
