import type { NativeBuffer } from "./device.ts";

/** A region of a buffer, from a byte offset on. */
export interface NativeTensor {
  readonly buffer: NativeBuffer;
  readonly byteOffset: number;
}

type Handle = NativeBuffer["handle"];

/** Handle and offset, as functions of packhorse.h take a tensor. */
export function place({ buffer, byteOffset }: NativeTensor): [Handle, bigint] {
  return [buffer.handle, BigInt(byteOffset)];
}

/** The same of a tensor that may be left out. */
export function placeIf(tensor: NativeTensor | undefined): [Handle | null, bigint] {
  return tensor ? place(tensor) : [null, 0n];
}
