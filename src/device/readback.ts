import { NativeReadback } from "../../ffi/readback.ts";
import { BYTES_PER_ELEMENT, type DType } from "../dtype.ts";
import { PackhorseError } from "../error.ts";
import { type Device, nativeOf } from "./device.ts";
import { checkedByteLength, type DeviceBuffer, regionOn } from "./device_buffer.ts";
import { bytesOf, createHostArray, type HostArray } from "./host_array.ts";

/**
 * A way for elements from a device to the host while both go on: {@linkcode DeviceBuffer.downloadAsync} waits for all work
 * of the device, {@linkcode wait} only for what was enqueued before the copy. One copy at a time is on its way.
 */
export class Readback<T extends DType> implements Disposable {
  /** Type of the elements. */
  readonly dtype: T;
  /** How many there may be. */
  readonly length: number;
  readonly #device: Device;
  readonly #native: NativeReadback;
  /** Of the copy enqueued last. */
  #enqueued = 0;

  /** Throws `invalid-argument` for a dtype or a length that is none, `out-of-memory`, `disposed`. */
  constructor(device: Device, { dtype, length }: { readonly dtype: T; readonly length: number }) {
    const byteLength = checkedByteLength({ dtype, length }, "Cannot create a readback");
    this.dtype = dtype;
    this.length = length;
    this.#device = device;
    this.#native = new NativeReadback(nativeOf(device), byteLength);
  }

  /**
   * Enqueues a copy of a buffer; the one before is lost. Throws `invalid-argument` for a buffer of another device or type,
   * or with more elements; `disposed`.
   */
  enqueue(source: DeviceBuffer<T>): void {
    if (source.dtype !== this.dtype || source.length > this.length) {
      throw new PackhorseError(
        "invalid-argument",
        `Cannot read back ${source.length} elements of ${source.dtype}: ` +
          `this is for up to ${this.length} of ${this.dtype}`,
      );
    }
    const { buffer, byteOffset } = regionOn(source, this.#device);
    this.#native.enqueue(buffer, byteOffset, source.length * BYTES_PER_ELEMENT[this.dtype]);
    this.#enqueued = source.length;
  }

  /**
   * The elements that were enqueued last, once they are there, without blocking. Throws `invalid-argument` if none were,
   * `cuda` if work before them failed, `disposed`.
   */
  async wait(): Promise<HostArray<T>> {
    if (this.#enqueued === 0) {
      throw new PackhorseError("invalid-argument", "Cannot read back: nothing was enqueued");
    }
    const target = createHostArray(this.dtype, this.#enqueued);
    const bytes = bytesOf(
      target,
      { dtype: this.dtype, length: this.#enqueued },
      "Cannot read back",
    );
    await this.#native.wait(bytes);
    return target;
  }

  /** Frees its memory, once a copy that is on its way is there. Does nothing the second time. */
  [Symbol.dispose](): void {
    this.#native.close();
  }
}
