import type { Device } from "../device/device.ts";
import type { DeviceBuffer } from "../device/device_buffer.ts";
import { BYTES_PER_ELEMENT, elementCount } from "../dtype.ts";
import { convertFloats, type FloatDType } from "../float_conversion.ts";
import type { WeightSpec } from "./checkpoint.ts";

/** Elements that are drawn; larger matrices repeat them, from other places on. */
const DRAWN = 2 ** 20;
/** Places to start at are multiples of this. */
const STRIDE = 1024;

/**
 * Weights that are drawn instead of read: matrices of uniform numbers whose products keep the size of what they multiply,
 * norms of 1, biases of 0; the same every time.
 */
export class RandomWeights implements Disposable {
  readonly #device: Device;
  readonly #stack = new DisposableStack();
  /** Drawn elements by their number of inputs and type. */
  readonly #drawn = new Map<string, DeviceBuffer<FloatDType>>();
  #matrices = 0;

  constructor(device: Device) {
    this.#device = device;
  }

  /** As if they were stored in 16 bits. */
  byteLength({ shape }: WeightSpec): number {
    return elementCount(shape) * BYTES_PER_ELEMENT.bf16;
  }

  /** Fills a tensor on the device. */
  async load({ name, shape }: WeightSpec, target: DeviceBuffer<FloatDType>): Promise<void> {
    if (shape.length === 1) {
      const ones = new Float32Array(target.length).fill(name.endsWith(".bias") ? 0 : 1);
      await target.uploadAsync(floats(ones, target.dtype));
      return;
    }
    const drawn = this.#draw(shape[1]!, target.dtype);
    // So that no two matrices are the same.
    let first = (this.#matrices++ * 7919 * STRIDE) % DRAWN;
    for (let done = 0; done < target.length;) {
      const count = Math.min(DRAWN - first, target.length - done);
      target.view(done, count).copyFrom(drawn.view(first, count));
      done += count;
      first = 0;
    }
  }

  /** Frees what was drawn. */
  [Symbol.dispose](): void {
    this.#stack.dispose();
  }

  #draw(inputs: number, dtype: FloatDType): DeviceBuffer<FloatDType> {
    const key = `${inputs} ${dtype}`;
    const known = this.#drawn.get(key);
    if (known !== undefined) return known;
    // Uniform numbers up to sqrt(3 / inputs) have a variance of 1 / inputs.
    const most = Math.sqrt(3 / inputs);
    let state = inputs;
    const numbers = Float32Array.from({ length: DRAWN }, () => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      return most * (state / 2 ** 31 - 1);
    });
    const buffer: DeviceBuffer<FloatDType> = this.#stack.use(
      this.#device.createBuffer(dtype, DRAWN),
    );
    buffer.upload(floats(numbers, dtype));
    this.#drawn.set(key, buffer);
    return buffer;
  }
}

function floats(numbers: Float32Array<ArrayBuffer>, to: FloatDType): Uint8Array<ArrayBuffer> {
  return convertFloats(new Uint8Array(numbers.buffer), { from: "f32", to });
}
