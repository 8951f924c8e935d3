import { PackhorseError } from "../src/error.ts";
import { call, callAsync, create } from "./call.ts";
import { Held } from "./held.ts";
import { type Library, loadLibrary, type NativeBackend } from "./library.ts";
import { DEVICE_INFO } from "./structs.ts";

/** Host memory that the native library reads or writes. */
export type HostBytes = Uint8Array<ArrayBuffer>;

/** Number of devices that a backend can open. Throws as {@linkcode loadLibrary}. */
export function countDevices(backend: NativeBackend): number {
  return loadLibrary(backend).symbols.ph_device_count();
}

/** Host memory lent to asynchronous calls, so that it is not collected before they return. */
const lent = new Set<object>();

/** What lives on a device, and is closed before it. */
export interface NativeResource {
  close(): void;
}

/**
 * A `ph_device`. What is closed while an asynchronous call is in flight is freed
 * when the call returns.
 */
export class NativeDevice {
  readonly library: Library;
  readonly #handle: Deno.PointerObject;
  readonly #resources = new Set<NativeResource>();
  #callsInFlight = 0;
  #isClosed = false;
  /** While work is captured, the buffers that it uses. */
  captured: HeldBuffers | undefined;

  /**
   * Opens a device, on a stream of its own or of the caller's. Throws as {@linkcode loadLibrary}, and what the library
   * reports.
   */
  constructor(backend: NativeBackend, ordinal: number, stream?: bigint) {
    this.library = loadLibrary(backend);
    const { ph_device_open, ph_device_open_on_stream } = this.library.symbols;
    this.#handle = stream === undefined
      ? create(ph_device_open, ordinal)
      : create(ph_device_open_on_stream, ordinal, stream);
  }

  /** The `ph_device*`. Throws `disposed` once closed. */
  get handle(): Deno.PointerObject {
    if (!this.#isClosed) return this.#handle;
    throw new PackhorseError("disposed", "Cannot use the device: it was disposed");
  }

  get isClosed(): boolean {
    return this.#isClosed;
  }

  get info(): ReturnType<typeof DEVICE_INFO.read> {
    const bytes = new Uint8Array(DEVICE_INFO.byteLength);
    call(this.library.symbols.ph_device_get_info, this.handle, bytes);
    return DEVICE_INFO.read(bytes);
  }

  /** The device's stream, 0 where there is none. */
  get stream(): bigint {
    const stream = new BigUint64Array(1);
    call(this.library.symbols.ph_device_stream, this.handle, stream);
    return stream[0]!;
  }

  createBuffer(byteLength: number): NativeBuffer {
    const { ph_buffer_create } = this.library.symbols;
    return this.#adoptBuffer(create(ph_buffer_create, this.handle, BigInt(byteLength)));
  }

  /** A buffer over memory that is not freed with it. */
  wrapBuffer(address: bigint, byteLength: number): NativeBuffer {
    const { ph_buffer_wrap } = this.library.symbols;
    return this.#adoptBuffer(create(ph_buffer_wrap, this.handle, address, BigInt(byteLength)));
  }

  #adoptBuffer(handle: Deno.PointerObject): NativeBuffer {
    const { symbols } = this.library;
    const buffer = new NativeBuffer(this, handle, () => {
      this.disown(buffer);
      call(symbols.ph_buffer_destroy, this.#handle, handle);
    });
    this.own(buffer);
    return buffer;
  }

  /** From now on `resource` is closed before the device. */
  own(resource: NativeResource): void {
    this.#resources.add(resource);
  }

  /** `resource` is closed, and the device may forget it. */
  disown(resource: NativeResource): void {
    this.#resources.delete(resource);
  }

  synchronize(): void {
    call(this.library.symbols.ph_device_synchronize, this.handle);
  }

  async synchronizeAsync(): Promise<void> {
    const { handle } = this;
    await this.during(
      () => callAsync(this.library.symbols.ph_device_synchronize_async, handle),
    );
  }

  beginTimer(): void {
    call(this.library.symbols.ph_device_timer_begin, this.handle);
  }

  /** Milliseconds of device work since {@linkcode beginTimer}; waits for it. */
  endTimer(): number {
    const milliseconds = new Float32Array(1);
    call(this.library.symbols.ph_device_timer_end, this.handle, milliseconds);
    return milliseconds[0]!;
  }

  /** Runs an asynchronous call; until it is over, the device, what is held and the host memory stay. */
  async during(
    work: () => Promise<void>,
    held: readonly Held[] = [],
    memory?: HostBytes,
  ): Promise<void> {
    if (this.captured) {
      const message = "Cannot make an asynchronous call while a step is captured";
      throw new PackhorseError("invalid-argument", message);
    }
    // An object of its own, for the same memory may be lent twice.
    const loan = { memory };
    lent.add(loan);
    this.#callsInFlight++;
    for (const each of held) each.hold();
    try {
      await work();
    } finally {
      for (const each of held) each.release();
      this.#callsInFlight--;
      lent.delete(loan);
      if (this.#isClosed) this.#closeWhenIdle();
    }
  }

  /** Throws `invalid-argument` while an asynchronous call is in flight. */
  requireNoCalls(action: string): void {
    if (this.#callsInFlight === 0) return;
    const message =
      `Cannot ${action} while an asynchronous call of the device is in flight: await it`;
    throw new PackhorseError("invalid-argument", message);
  }

  /** Closes the device and what lives on it. Does nothing the second time. */
  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.captured?.release();
    for (const resource of this.#resources) resource.close();
    this.#closeWhenIdle();
  }

  #closeWhenIdle(): void {
    if (this.#callsInFlight > 0) return;
    call(this.library.symbols.ph_device_close, this.#handle);
  }
}

/** A `ph_buffer`. Offsets and lengths are in bytes, and for the caller to check. */
export class NativeBuffer extends Held {
  readonly device: NativeDevice;
  readonly #handle: Deno.PointerObject;

  constructor(device: NativeDevice, handle: Deno.PointerObject, destroy: () => void) {
    super(destroy);
    this.device = device;
    this.#handle = handle;
  }

  /** The `ph_buffer*`. Throws `disposed` once closed. */
  get handle(): Deno.PointerObject {
    if (!this.isClosed) {
      this.device.captured?.add(this);
      return this.#handle;
    }
    throw new PackhorseError("disposed", "Cannot use the buffer: it, or its device, was disposed");
  }

  /** Where the memory is. */
  get address(): bigint {
    const { symbols } = this.device.library;
    const address = new BigUint64Array(1);
    call(symbols.ph_buffer_address, this.device.handle, this.handle, address);
    return address[0]!;
  }

  upload(source: HostBytes, offset: number): void {
    const { symbols } = this.device.library;
    call(symbols.ph_buffer_upload, ...this.#copyArguments(source, offset));
  }

  async uploadAsync(source: HostBytes, offset: number): Promise<void> {
    const { symbols } = this.device.library;
    const parameters = this.#copyArguments(source, offset);
    await this.device.during(
      () => callAsync(symbols.ph_buffer_upload_async, ...parameters),
      [this],
      source,
    );
  }

  download(target: HostBytes, offset: number): void {
    const { symbols } = this.device.library;
    call(symbols.ph_buffer_download, ...this.#copyArguments(target, offset));
  }

  async downloadAsync(target: HostBytes, offset: number): Promise<void> {
    const { symbols } = this.device.library;
    const parameters = this.#copyArguments(target, offset);
    await this.device.during(
      () => callAsync(symbols.ph_buffer_download_async, ...parameters),
      [this],
      target,
    );
  }

  copyFrom(source: NativeBuffer, offset: number, sourceOffset: number, byteLength: number): void {
    call(
      this.device.library.symbols.ph_buffer_copy,
      this.device.handle,
      this.handle,
      BigInt(offset),
      source.handle,
      BigInt(sourceOffset),
      BigInt(byteLength),
    );
  }

  fill(byte: number, offset: number, byteLength: number): void {
    call(
      this.device.library.symbols.ph_buffer_fill,
      this.device.handle,
      this.handle,
      BigInt(offset),
      byte,
      BigInt(byteLength),
    );
  }

  read(offset: number, byteLength: number): void {
    call(
      this.device.library.symbols.ph_buffer_read,
      this.device.handle,
      this.handle,
      BigInt(offset),
      BigInt(byteLength),
    );
  }

  #copyArguments(memory: HostBytes, offset: number) {
    return [
      this.device.handle,
      this.handle,
      BigInt(offset),
      memory,
      BigInt(memory.byteLength),
    ] as const;
  }
}

/** Buffers that keep their memory until they are released together. */
export class HeldBuffers {
  readonly #buffers = new Set<NativeBuffer>();

  add(buffer: NativeBuffer): void {
    if (this.#buffers.has(buffer)) return;
    this.#buffers.add(buffer);
    buffer.hold();
  }

  release(): void {
    for (const buffer of this.#buffers) buffer.release();
    this.#buffers.clear();
  }
}
