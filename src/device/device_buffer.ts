import type { NativeBuffer } from "../../ffi/device.ts";
import { BYTES_PER_ELEMENT, type DType, elementCount } from "../dtype.ts";
import { PackhorseError } from "../error.ts";
import { type Device, nativeOf } from "./device.ts";
import { bytesOf, createHostArray, type HostArray } from "./host_array.ts";

/** Frees the memory of buffers that were dropped without being disposed. */
const dropped = new FinalizationRegistry<NativeBuffer>((native) => native.close());

/** The bytes of some elements. Throws `invalid-argument` for a dtype or a length that is none. */
export function checkedByteLength(
  { dtype, length }: { dtype: DType; length: number },
  action: string,
): number {
  if (!Object.hasOwn(BYTES_PER_ELEMENT, dtype)) {
    const dtypes = Object.keys(BYTES_PER_ELEMENT).join(", ");
    const message = `${action} of ${dtype}: dtype must be one of ${dtypes}`;
    throw new PackhorseError("invalid-argument", message);
  }
  if (!(Number.isSafeInteger(length) && length > 0)) {
    const message = `${action} of ${length} elements: it needs at least 1`;
    throw new PackhorseError("invalid-argument", message);
  }
  return elementCount([length, BYTES_PER_ELEMENT[dtype]]);
}

/** Whether `value` is a bigint that 64 bits hold. */
export function isAddress(value: unknown): value is bigint {
  return typeof value === "bigint" && value === BigInt.asUintN(64, value);
}

/** What a buffer is made of; for this folder and the operations on buffers. */
export interface BufferRegion {
  readonly buffer: NativeBuffer;
  readonly byteOffset: number;
}

/** The region of a buffer, if it lies on `device`. Throws `invalid-argument` or `disposed`. */
export let regionOn: (buffer: DeviceBuffer, device: Device) => BufferRegion;

/** Makes the buffer that owns `native`. */
export let adoptBuffer: <T extends DType>(
  device: Device,
  native: NativeBuffer,
  type: { dtype: T; length: number },
) => DeviceBuffer<T>;

/**
 * Elements of one type in the memory of a {@linkcode Device}, made by
 * {@linkcode Device.createBuffer}, or over memory that is there already by
 * {@linkcode DeviceBuffer.fromAddress}.
 *
 * Copies to and from host memory are bit by bit. Work on a device happens in the
 * order of the calls, so a buffer may be reused, or disposed, without waiting.
 *
 * @example
 * ```ts
 * import { Device } from "@packhorse/packhorse/device";
 * import { assertEquals } from "@std/assert";
 *
 * using device = Device.open();
 * using buffer = device.createBuffer("f32", 8);
 * buffer.fill(0);
 * buffer.view(4, 2).upload(Float32Array.of(1, 2));
 * assertEquals(buffer.download(), Float32Array.of(0, 0, 0, 0, 1, 2, 0, 0));
 * ```
 */
export class DeviceBuffer<T extends DType = DType> implements Disposable {
  /** The device that holds the buffer. */
  readonly device: Device;
  /** Type of the elements. */
  readonly dtype: T;
  /** Number of elements. */
  readonly length: number;
  readonly #native: NativeBuffer;
  readonly #byteOffset: number;
  /** What a view looks into: it must live as long as the view. */
  readonly #owner: DeviceBuffer | undefined;

  private constructor(
    device: Device,
    type: { dtype: T; length: number },
    { buffer, byteOffset }: BufferRegion,
    owner?: DeviceBuffer,
  ) {
    this.device = device;
    this.dtype = type.dtype;
    this.length = type.length;
    this.#native = buffer;
    this.#byteOffset = byteOffset;
    this.#owner = owner;
    if (!owner) dropped.register(this, buffer, this);
  }

  static {
    regionOn = (buffer, device) => {
      if (buffer.device !== device) {
        throw new PackhorseError(
          "invalid-argument",
          "Cannot use a buffer of another device: download it there and upload it here",
        );
      }
      void buffer.#native.handle; // throws once disposed
      return { buffer: buffer.#native, byteOffset: buffer.#byteOffset };
    };
    adoptBuffer = (device, buffer, type) =>
      new DeviceBuffer(device, type, { buffer, byteOffset: 0 });
  }

  /**
   * A buffer over memory that belongs to someone else, such as a tensor of the engine that Packhorse works beside: at
   * `address`, `length` elements of a `dtype`. Nothing is copied, and disposing the buffer frees nothing; the memory
   * must stay until the buffer, and the work enqueued with it, are done.
   *
   * On a GPU the address is one of that GPU's memory (as `cudaMalloc` gives; not managed memory); on the CPU it is one
   * of this process, and nothing tells whether it is: a wrong one crashes the process or reads what it should not. It
   * must be a multiple of 16. Work on other streams has to be over before: see {@linkcode DeviceOptions.stream}.
   *
   * Throws `invalid-argument` for a dtype, a length or an address that is none, and on a GPU if the first or the last
   * byte is not in its memory; `disposed`.
   *
   * @example
   * ```ts
   * import { Device, DeviceBuffer } from "@packhorse/packhorse/device";
   * import { assertEquals } from "@std/assert";
   *
   * using device = Device.open();
   * using tensor = device.createBuffer("f32", 4); // stands for another library's
   * using buffer = DeviceBuffer.fromAddress(device, tensor.address, { dtype: "f32", length: 4 });
   * buffer.upload(Float32Array.of(1, 2, 3, 4));
   * assertEquals(tensor.download(), Float32Array.of(1, 2, 3, 4));
   * ```
   */
  static fromAddress<T extends DType>(
    device: Device,
    address: bigint,
    { dtype, length }: { readonly dtype: T; readonly length: number },
  ): DeviceBuffer<T> {
    const byteLength = checkedByteLength({ dtype, length }, "Cannot wrap a buffer");
    if (!isAddress(address)) {
      const message = `Cannot wrap memory at ${address}: the address must be a bigint of 64 bits`;
      throw new PackhorseError("invalid-argument", message);
    }
    return adoptBuffer(device, nativeOf(device).wrapBuffer(address, byteLength), { dtype, length });
  }

  /**
   * Where the elements are: a device pointer of the GPU, or on the CPU one of this process, for others to use until
   * the buffer is disposed. Work on other streams must wait for the device's ({@linkcode Device.stream}). Throws
   * `disposed`.
   */
  get address(): bigint {
    return this.#native.address + BigInt(this.#byteOffset);
  }

  /** Bytes of the elements. */
  get byteLength(): number {
    return this.length * BYTES_PER_ELEMENT[this.dtype];
  }

  /** Where it starts in the memory it shares, in bytes; 0 unless it is a view. */
  get byteOffset(): number {
    return this.#byteOffset;
  }

  /** Whether the buffer, what it is a view of, or its device was disposed. */
  get isDisposed(): boolean {
    return this.#native.isClosed;
  }

  /**
   * Copies `source` to the device, and waits until that is done.
   *
   * It must have exactly the buffer's length, as the typed array of its dtype
   * ({@linkcode HostArrays}; f16 also takes a `Float16Array`) or as raw bytes.
   *
   * Throws `invalid-argument` for another type or length, and for a resizable,
   * shared or detached `ArrayBuffer`; `disposed` after disposal; `cuda` if the GPU
   * fails.
   */
  upload(source: HostArray<T> | Float16Array | Uint8Array): void {
    this.#native.upload(bytesOf(source, this, "Cannot upload"), this.#byteOffset);
  }

  /** As {@linkcode upload}, without blocking. `source` must stay as it is until the promise settles. */
  async uploadAsync(source: HostArray<T> | Float16Array | Uint8Array): Promise<void> {
    await this.#native.uploadAsync(bytesOf(source, this, "Cannot upload"), this.#byteOffset);
  }

  /**
   * Waits for the work on the device, and copies the elements into `target`, or a
   * new typed array. Throws as {@linkcode upload}.
   */
  download<A extends HostArray<T> | Float16Array | Uint8Array = HostArray<T>>(target?: A): A {
    const array = target ?? createHostArray(this.dtype, this.length) as A;
    this.#native.download(bytesOf(array, this, "Cannot download"), this.#byteOffset);
    return array;
  }

  /** As {@linkcode download}, without blocking. `target` must be left alone until the promise settles. */
  async downloadAsync<A extends HostArray<T> | Float16Array | Uint8Array = HostArray<T>>(
    target?: A,
  ): Promise<A> {
    const array = target ?? createHostArray(this.dtype, this.length) as A;
    await this.#native.downloadAsync(bytesOf(array, this, "Cannot download"), this.#byteOffset);
    return array;
  }

  /**
   * Enqueues copying the elements of `source`, of the same device, type and length.
   *
   * Throws `invalid-argument` if it differs in one of these or shares memory with
   * this buffer, `disposed` after disposal of either.
   */
  copyFrom(source: DeviceBuffer<T>): void {
    if (source.dtype !== this.dtype || source.length !== this.length) {
      throw new PackhorseError(
        "invalid-argument",
        `Cannot copy ${source.length} elements of ${source.dtype} ` +
          `to ${this.length} of ${this.dtype}`,
      );
    }
    const { buffer, byteOffset } = regionOn(source, this.device);
    if (
      buffer === this.#native && Math.abs(byteOffset - this.#byteOffset) < this.byteLength
    ) {
      throw new PackhorseError(
        "invalid-argument",
        `Cannot copy between ranges that overlap: they start at bytes ${byteOffset} ` +
          `and ${this.#byteOffset}, and have ${this.byteLength}`,
      );
    }
    this.#native.copyFrom(buffer, this.#byteOffset, byteOffset, this.byteLength);
  }

  /** Enqueues setting every byte to `byte`, 0 unless given. Throws `invalid-argument` unless it is 0 to 255. */
  fill(byte = 0): void {
    if (!(Number.isInteger(byte) && byte >= 0 && byte <= 255)) {
      throw new PackhorseError(
        "invalid-argument",
        `Cannot fill: byte must be 0 to 255, got ${byte}`,
      );
    }
    this.#native.fill(byte, this.#byteOffset, this.byteLength);
  }

  /**
   * Enqueues reading every byte and doing nothing with it, as fast as the device can: what work that is bound by
   * memory is measured against. A view must start at a multiple of 16 bytes.
   */
  read(): void {
    this.#native.read(this.#byteOffset, this.byteLength);
  }

  /**
   * Elements `offset` to `offset + length` (by default all from `offset` on) of the
   * same memory. Disposing a view does nothing. Operations on tensors need views
   * that start at a multiple of 16 bytes.
   *
   * Throws `invalid-argument` if there are no such elements, `disposed` after disposal.
   */
  view(offset: number, length: number = this.length - offset): DeviceBuffer<T> {
    void this.#native.handle; // throws once disposed
    const isCount = (value: number) => Number.isSafeInteger(value) && value >= 0;
    if (!isCount(offset) || !isCount(length) || length === 0 || offset + length > this.length) {
      throw new PackhorseError(
        "invalid-argument",
        `Cannot view ${length} elements from ${offset} of a buffer of ${this.length}`,
      );
    }
    const byteOffset = this.#byteOffset + offset * BYTES_PER_ELEMENT[this.dtype];
    const region = { buffer: this.#native, byteOffset };
    return new DeviceBuffer(this.device, { dtype: this.dtype, length }, region, this);
  }

  /** Frees the memory, when copies in flight are done. Does nothing the second time, or for a view. */
  [Symbol.dispose](): void {
    if (this.#owner) return;
    dropped.unregister(this);
    this.#native.close();
  }
}
