/** What operations check of their arguments before the native call. */
import { DTYPE } from "../../ffi/enums.ts";
import type { NativeTensor } from "../../ffi/tensor.ts";
import type { NativeFloats } from "../../ffi/llm.ts";
import { type Device, nativeOf } from "../device/device.ts";
import { type DeviceBuffer, regionOn } from "../device/device_buffer.ts";
import { BYTES_PER_ELEMENT, type DType } from "../dtype.ts";
import { PackhorseError } from "../error.ts";

/** Types of weights and activations. */
export type FloatDType = "f32" | "f16" | "bf16";

/** A tensor of any of the types. */
export type FloatBuffer = DeviceBuffer<FloatDType>;

const FLOATS: readonly DType[] = ["f32", "f16", "bf16"];

// What the C ABI takes as a size.
const MOST_SIZE = 2 ** 32 - 1;

/** A tensor's name and buffer. */
type Named = Readonly<Record<string, DeviceBuffer>>;

/** Rows that start `stride` elements apart. */
interface StridedShape {
  readonly rows: number;
  readonly columns: number;
  readonly stride: number;
}

/** Where a tensor's elements lie. */
interface Extent {
  readonly name: string;
  readonly bytes: number;
  readonly dtype: DType;
}

/** One call of an operation of {@linkcode linear}'s kind: checks its sizes, and its tensors as it asks for them. */
export class Call {
  readonly device: ReturnType<typeof nativeOf>;
  readonly #operation: string;
  readonly #device: Device;
  readonly #extents = new Map<NativeTensor, Extent>();

  constructor(operation: string, device: Device, sizes: Readonly<Record<string, number>>) {
    this.#operation = operation;
    this.#device = device;
    this.device = nativeOf(device);
    for (const [name, size] of Object.entries(sizes)) {
      if (Number.isInteger(size) && size >= 1 && size <= MOST_SIZE) continue;
      this.#refuse(`${name} must be an integer of 1 or more, got ${size}`);
    }
  }

  /** A dense tensor of floats that fills its buffer. */
  floats(named: Named, shape: readonly number[], dtypes = FLOATS): NativeFloats {
    return this.#dense(named, shape, dtypes);
  }

  /** A dense tensor of i32, or of another type, that fills its buffer. */
  integers(named: Named, shape: readonly number[], dtype: DType = "i32"): NativeTensor {
    return this.#dense(named, shape, [dtype]);
  }

  /** A tensor of floats in a buffer that may hold more. */
  strided(named: Named, shape: StridedShape, dtypes = FLOATS): NativeFloats {
    const { rows, columns, stride } = shape;
    const [[name, buffer]] = Object.entries(named) as [[string, DeviceBuffer]];
    if (stride < columns) {
      this.#refuse(`rows of ${name} must start at least ${columns} elements apart, not ${stride}`);
    }
    const count = (rows - 1) * stride + columns;
    if (!dtypes.includes(buffer.dtype) || buffer.length < count) {
      this.#refuse(
        `${name} must be at least ${count} elements of ${
          dtypes.join(", ")
        }: [${rows}, ${columns}] ` +
          `whose rows start ${stride} apart; the buffer is ${buffer.length} of ${buffer.dtype}`,
      );
    }
    return this.#tensor(name, buffer, count);
  }

  /** A tensor that is written: it may lie where `over` does, and must not overlap the others asked for before. */
  written<T extends NativeTensor>(tensor: T, over?: NativeTensor): T {
    const own = this.#extents.get(tensor)!;
    for (const [other, { name, bytes, dtype }] of this.#extents) {
      const apart = other === tensor || other.buffer !== tensor.buffer ||
        other.byteOffset + bytes <= tensor.byteOffset ||
        tensor.byteOffset + own.bytes <= other.byteOffset;
      const inPlace = other === over && other.byteOffset === tensor.byteOffset &&
        dtype === own.dtype;
      if (apart || inPlace) continue;
      this.#refuse(
        `${name} and ${own.name}, which is written, overlap; they start at bytes ` +
          `${other.byteOffset} and ${tensor.byteOffset} of a buffer, and have ${bytes} and ${own.bytes}`,
      );
    }
    return tensor;
  }

  /** A finite float32. */
  number(named: Readonly<Record<string, number>>): number {
    const [[name, value]] = Object.entries(named) as [[string, number]];
    if (Number.isFinite(Math.fround(value))) return value;
    return this.#refuse(`${name} must be finite as a float32, got ${value}`);
  }

  #dense(named: Named, shape: readonly number[], dtypes: readonly DType[]): NativeFloats {
    const [[name, buffer]] = Object.entries(named) as [[string, DeviceBuffer]];
    const count = shape.reduce((product, size) => product * size, 1);
    if (!dtypes.includes(buffer.dtype) || buffer.length !== count) {
      this.#refuse(
        `${name} must be [${shape.join(", ")}] of ${dtypes.join(", ")}; the buffer is ` +
          `${buffer.length} elements of ${buffer.dtype}`,
      );
    }
    return this.#tensor(name, buffer, count);
  }

  #tensor(name: string, buffer: DeviceBuffer, count: number): NativeFloats {
    const { dtype, byteOffset } = buffer;
    if (byteOffset % 16 !== 0) {
      this.#refuse(`${name} must start at a multiple of 16 bytes, not at ${byteOffset}`);
    }
    const tensor = { ...regionOn(buffer, this.#device), dtype: DTYPE[dtype] };
    this.#extents.set(tensor, { name, bytes: count * BYTES_PER_ELEMENT[dtype], dtype });
    return tensor;
  }

  #refuse(message: string): never {
    refuse(`Cannot compute ${this.#operation}: ${message}`);
  }
}

/** Throws `invalid-argument`. */
export function refuse(message: string): never {
  throw new PackhorseError("invalid-argument", message);
}
