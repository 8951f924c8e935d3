import type { Device } from "../device/device.ts";
import type { DeviceBuffer } from "../device/device_buffer.ts";
import type { KvCacheDType } from "./cache_options.ts";
import type { KvCacheStep } from "./cache_step.ts";
import type { KvSampler } from "./sample.ts";
import type { KvPair } from "./tensor.ts";

/** Shape of {@linkcode SampledTokens}. */
export interface SampledTokensShape {
  /** Layers of the cache that they are for, which take those of the sampler in turn. */
  readonly layers: number;
  /** Tokens of each layer. */
  readonly tokens: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly dtype: KvCacheDType;
}

/** Tokens drawn from a real cache, on a device, to fill other caches with. */
export class SampledTokens implements Disposable {
  readonly shape: SampledTokensShape;
  /** `[tokens, kvHeads, headDim]` for the layers in turn. */
  readonly #layers: readonly KvPair<DeviceBuffer<KvCacheDType>>[];
  readonly #stack: DisposableStack;

  constructor(device: Device, sampler: KvSampler, shape: SampledTokensShape) {
    const { layers, tokens, kvHeads, headDim, dtype } = shape;
    this.shape = shape;
    using stack = new DisposableStack();
    const upload = (bits: Uint16Array<ArrayBuffer>) => {
      const buffer = stack.use(device.createBuffer(dtype, bits.length));
      buffer.upload(bits);
      return buffer;
    };
    this.#layers = Array.from({ length: Math.min(layers, sampler.layers) }, (_, layer) => {
      const { keys, values } = sampler.sample(layer, { tokens, heads: kvHeads, headDim });
      return { keys: upload(keys), values: upload(values) };
    });
    this.#stack = stack.move();
  }

  /** How many layers differ. */
  get distinctLayers(): number {
    return this.#layers.length;
  }

  /** Appends as many tokens as the step has, from token `first` on, to each of `layers` layers. */
  append(step: KvCacheStep, first: number, layers = this.shape.layers): void {
    const { kvHeads, headDim } = this.shape;
    const token = kvHeads * headDim;
    const views = this.#layers.map(({ keys, values }) => ({
      keys: keys.view(first * token, step.tokens * token),
      values: values.view(first * token, step.tokens * token),
    }));
    for (let layer = 0; layer < layers; layer++) {
      const { keys, values } = views[layer % views.length]!;
      step.append(layer, keys, values);
    }
  }

  /** Frees them. */
  [Symbol.dispose](): void {
    this.#stack.dispose();
  }
}
