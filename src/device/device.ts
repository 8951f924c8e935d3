import { countDevices, NativeDevice } from "../../ffi/device.ts";
import type { DType } from "../dtype.ts";
import { PackhorseError } from "../error.ts";
import { type Backend, chooseBackend } from "./backend.ts";
import { adoptBuffer, checkedByteLength, type DeviceBuffer, isAddress } from "./device_buffer.ts";

/** Options of {@linkcode Device.open}. */
export interface DeviceOptions {
  /**
   * Where to run: on the `cpu`, on a GPU through `cuda`, or `auto`: on a GPU if the
   * CUDA library loads and finds one, else on the CPU. Default: the environment
   * variable `PACKHORSE_BACKEND`, else `auto`.
   */
  readonly backend?: Backend | "auto" | undefined;
  /** Which of the backend's devices. Default: 0. */
  readonly ordinal?: number | undefined;
  /**
   * A CUDA stream of one's own that work is enqueued on: a `cudaStream_t` (or `CUstream`) of that GPU, or 0n for CUDA's
   * legacy default stream; not the per-thread one. It must live as long as the device, and stays open when the device
   * is disposed. Nothing tells whether it is a stream at all: any other number may crash the process. Default: the
   * device makes its own.
   */
  readonly stream?: bigint | undefined;
}

/** What a device says of itself. */
export interface DeviceInfo {
  /** "NVIDIA H200", or the CPU's model name. */
  readonly name: string;
  /** "sm_90", or "avx512vnni", "avx512", "avx2", "baseline". */
  readonly instructionSet: string;
  /** Bytes of its memory. */
  readonly totalBytes: number;
  /** Bytes of its memory that are free now. */
  readonly freeBytes: number;
  /** Streaming multiprocessors, or threads used. */
  readonly processors: number;
  /** CUDA version of the driver, 1000 · major + 10 · minor; 0 on the CPU. */
  readonly driverVersion: number;
  /** CUDA version of the runtime, likewise. */
  readonly runtimeVersion: number;
}

/** Closes devices that were dropped without being disposed. */
const dropped = new FinalizationRegistry<NativeDevice>((native) => native.close());

/** The native side of a device; for the operations on devices. */
export let nativeOf: (device: Device) => NativeDevice;

/**
 * A CPU or GPU with a queue of work: calls enqueue work, which runs in the order
 * of the calls. On the CPU it is done when the call returns.
 *
 * @example
 * ```ts
 * import { Device } from "@packhorse/packhorse/device";
 * import { assert, assertEquals } from "@std/assert";
 *
 * using device = Device.open({ backend: "cpu" });
 * assert(device.info.processors > 0);
 * using buffer = device.createBuffer("i32", 3);
 * buffer.upload(Int32Array.of(1, 2, 3));
 * assertEquals(buffer.download(), Int32Array.of(1, 2, 3));
 * ```
 */
export class Device implements Disposable {
  /** Where it runs. */
  readonly backend: Backend;
  /** The native library behind it. */
  readonly library: { readonly path: string; readonly abiVersion: number };
  readonly #native: NativeDevice;

  private constructor(native: NativeDevice) {
    const { backend, path, abiVersion } = native.library;
    this.backend = backend;
    this.library = { path, abiVersion };
    this.#native = native;
    dropped.register(this, native, this);
  }

  static {
    nativeOf = (device) => {
      void device.#native.handle; // throws once disposed
      return device.#native;
    };
  }

  /**
   * Opens a device; the first time also the native library of its backend, which
   * then stays loaded.
   *
   * Throws `library-missing` if there is no library (or no permission to load it),
   * `abi-mismatch` if it belongs to another version of Packhorse, `no-gpu` if there
   * is no GPU, `invalid-argument` for a backend or an ordinal that does not exist, and for a stream of another GPU or
   * of every thread, `unsupported` for a stream on the CPU.
   */
  static open(options: DeviceOptions = {}): Device {
    const { ordinal = 0, stream } = options;
    const backend = chooseBackend(options.backend);
    if (!(Number.isInteger(ordinal) && ordinal >= 0)) {
      const message = `Cannot open device ${ordinal}: ordinal must be an integer of 0 or more`;
      throw new PackhorseError("invalid-argument", message);
    }
    const count = countDevices(backend);
    if (count === 0) {
      const message = "Cannot open a GPU: there is none, or the NVIDIA driver is missing";
      throw new PackhorseError("no-gpu", message);
    }
    if (ordinal >= count) {
      const message = `Cannot open device ${ordinal} of ${backend}: it has ${count}`;
      throw new PackhorseError("invalid-argument", message);
    }
    if (stream !== undefined && !isAddress(stream)) {
      const message = `Cannot open a device on stream ${stream}: it must be a bigint of 64 bits`;
      throw new PackhorseError("invalid-argument", message);
    }
    return new Device(new NativeDevice(backend, ordinal, stream));
  }

  /** What the device is, and how much of its memory is free. Throws `disposed` after disposal. */
  get info(): DeviceInfo {
    const info = this.#native.info;
    return {
      name: info.name,
      instructionSet: info.instruction_set,
      totalBytes: info.total_bytes,
      freeBytes: info.free_bytes,
      processors: info.processors,
      driverVersion: info.driver_version,
      runtimeVersion: info.runtime_version,
    };
  }

  /** The CUDA stream that work is enqueued on, a `cudaStream_t`; 0n on the CPU. Throws `disposed` after disposal. */
  get stream(): bigint {
    return this.#native.stream;
  }

  /** Whether work runs while the host goes on, as on a GPU; on the CPU it is done when the call returns. */
  get isAsynchronous(): boolean {
    return this.backend !== "cpu";
  }

  /** Whether it was disposed. */
  get isDisposed(): boolean {
    return this.#native.isClosed;
  }

  /**
   * Allocates memory for `length` (at least 1) elements, whose values are undefined.
   *
   * Throws `out-of-memory`, `invalid-argument` for a dtype or a length that is none,
   * `disposed` after disposal.
   */
  createBuffer<T extends DType>(dtype: T, length: number): DeviceBuffer<T> {
    const byteLength = checkedByteLength({ dtype, length }, "Cannot create a buffer");
    return adoptBuffer(this, this.#native.createBuffer(byteLength), { dtype, length });
  }

  /** Waits, without blocking, until all enqueued work is done. Throws `cuda` if some of it failed. */
  async synchronize(): Promise<void> {
    await this.#native.synchronizeAsync();
  }

  /** As {@linkcode synchronize}, but blocks; quicker where the work is short. */
  synchronizeNow(): void {
    this.#native.synchronize();
  }

  /**
   * Milliseconds that the work takes which `enqueue` enqueues, by the device's own
   * clock. Waits for it. Regions do not nest.
   *
   * @example
   * ```ts
   * import { Device } from "@packhorse/packhorse/device";
   * import { assert } from "@std/assert";
   *
   * using device = Device.open();
   * using buffer = device.createBuffer("u8", 2 ** 20);
   * assert(device.time(() => buffer.fill(1)) >= 0);
   * ```
   */
  time(enqueue: () => void): number {
    this.#native.beginTimer();
    let milliseconds: number;
    try {
      enqueue();
    } finally {
      milliseconds = this.#native.endTimer();
    }
    return milliseconds;
  }

  /** Disposes its buffers and closes it, when calls in flight are done. Does nothing the second time. */
  [Symbol.dispose](): void {
    dropped.unregister(this);
    this.#native.close();
  }
}
