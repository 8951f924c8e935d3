import { PackhorseError } from "../src/error.ts";
import { call, callAsync, create } from "./call.ts";
import type { HostBytes, NativeBuffer, NativeDevice } from "./device.ts";
import { Held } from "./held.ts";

/** A `ph_readback`, freed before its device closes. Lengths are in bytes, and for the caller to check. */
export class NativeReadback extends Held {
  readonly device: NativeDevice;
  readonly #handle: Deno.PointerObject;

  constructor(device: NativeDevice, byteLength: number) {
    const { symbols } = device.library;
    const deviceHandle = device.handle;
    const handle = create(symbols.ph_readback_create, deviceHandle, BigInt(byteLength));
    super(() => {
      device.disown(this);
      call(symbols.ph_readback_destroy, deviceHandle, handle);
    });
    this.device = device;
    this.#handle = handle;
    device.own(this);
  }

  /** The `ph_readback*`. Throws `disposed` once closed, as it is with its device. */
  get handle(): Deno.PointerObject {
    if (!this.isClosed) return this.#handle;
    const message = "Cannot read back: the memory for it, or its device, was disposed";
    throw new PackhorseError("disposed", message);
  }

  /** Enqueues a copy of the buffer's bytes. */
  enqueue(source: NativeBuffer, offset: number, byteLength: number): void {
    call(
      this.device.library.symbols.ph_readback_enqueue,
      this.device.handle,
      this.handle,
      source.handle,
      BigInt(offset),
      BigInt(byteLength),
    );
  }

  /** Waits, without blocking, until the first bytes of the copy enqueued last are in `target`. */
  async wait(target: HostBytes): Promise<void> {
    const { device, handle } = this;
    const { ph_readback_wait_async } = device.library.symbols;
    const byteLength = BigInt(target.byteLength);
    await device.during(
      () => callAsync(ph_readback_wait_async, device.handle, handle, target, byteLength),
      [this],
      target,
    );
  }
}
