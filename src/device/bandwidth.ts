import type { Device } from "./device.ts";

const COPIES = 10;

/**
 * Bytes that the device copies within its memory per second: the best of ten
 * copies of 64 MiB on the CPU, of 256 MiB on a GPU. Reading and writing count once.
 *
 * Throws `out-of-memory` if twice that does not fit.
 *
 * @example
 * ```ts
 * import { Device, measureCopyBandwidth } from "@packhorse/packhorse/device";
 * import { assert } from "@std/assert";
 *
 * using device = Device.open();
 * assert(await measureCopyBandwidth(device) > 1e6);
 * ```
 */
export async function measureCopyBandwidth(device: Device): Promise<number> {
  const byteLength = 2 ** (device.backend === "cpu" ? 26 : 28);
  using source = device.createBuffer("u8", byteLength);
  using target = device.createBuffer("u8", byteLength);
  source.fill();
  target.fill();
  await device.synchronize();
  let shortest = Infinity;
  for (let i = 0; i < COPIES; i++) {
    shortest = Math.min(shortest, device.time(() => target.copyFrom(source)));
  }
  return byteLength / (shortest / 1000);
}
