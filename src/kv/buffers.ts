import type { NativeTensor } from "../../ffi/tensor.ts";
import type { Device } from "../device/device.ts";
import { type DeviceBuffer, regionOn } from "../device/device_buffer.ts";
import type { DType } from "../dtype.ts";

// Native operations take buffers of at least one byte, and status buffers of 16.
const LEAST_BYTES = 16;

/** Memory for `byteLength` bytes, which may be 0. */
export function createBytes(device: Device, byteLength: number): DeviceBuffer<"u8"> {
  return device.createBuffer("u8", Math.max(LEAST_BYTES, byteLength));
}

/** A buffer that holds `bytes`, which may be none. */
export async function uploadBytes(
  device: Device,
  bytes: Uint8Array<ArrayBuffer>,
): Promise<DeviceBuffer<"u8">> {
  using stack = new DisposableStack();
  const buffer = stack.use(createBytes(device, bytes.byteLength));
  if (bytes.byteLength > 0) await buffer.view(0, bytes.byteLength).uploadAsync(bytes);
  stack.move();
  return buffer;
}

/** The first bytes of a buffer. */
export async function downloadBytes(
  buffer: DeviceBuffer<"u8">,
  byteLength: number,
): Promise<Uint8Array<ArrayBuffer>> {
  if (byteLength === 0) return new Uint8Array();
  return await buffer.view(0, byteLength).downloadAsync();
}

/** The two numbers of a status buffer. */
export async function downloadStatus(buffer: DeviceBuffer<"u8">): Promise<[bigint, bigint]> {
  const [first, second] = new BigUint64Array((await downloadBytes(buffer, 16)).buffer);
  return [first!, second!];
}

/** The tensor that a buffer begins with, for the native operations. */
export function tensorIn(buffer: DeviceBuffer<DType>): NativeTensor {
  return regionOn(buffer, buffer.device);
}

/** The memory of a buffer that is no view, for the native operations. */
export function memoryOf(buffer: DeviceBuffer<DType>): NativeTensor["buffer"] {
  return regionOn(buffer, buffer.device).buffer;
}
