/** Growing caches to measure, filled with keys and values that are a real model's. */
import type { Device, DeviceBuffer } from "../src/device/mod.ts";
import { KvCache, type KvCacheCodec, type KvCacheStep, type KvSequence } from "../src/kv/mod.ts";
import { KvSampler } from "../src/kv/sample.ts";

const DUMP = new URL("../tests/fixtures/tiny/kv.safetensors", import.meta.url).pathname;
/** Tokens of one step while a cache is filled. */
const STEP_TOKENS = 8192;

/** Shape of the attention that is measured. */
export interface CacheCase {
  readonly batch: number;
  readonly kvHeads: number;
  /** Query heads of a kv head. */
  readonly group: number;
  readonly headDim: number;
  /** Tokens of each sequence. */
  readonly lengths: readonly number[];
}

/** Keys and values `[tokens, heads, headDim]` in bf16. */
export interface Tokens {
  readonly keys: DeviceBuffer<"bf16">;
  readonly values: DeviceBuffer<"bf16">;
  readonly count: number;
}

/** Tokens drawn from the first layer of the fixture dump. */
export async function createTokens(
  device: Device,
  { kvHeads, headDim, count }: { kvHeads: number; headDim: number; count: number },
): Promise<Tokens & Disposable> {
  const sampler = await KvSampler.open({ input: DUMP }, { dtype: "bf16" });
  const sample = sampler.sample(0, { tokens: count, heads: kvHeads, headDim });
  using stack = new DisposableStack();
  const upload = (bits: Uint16Array<ArrayBuffer>) => {
    const buffer = stack.use(device.createBuffer("bf16", bits.length));
    buffer.upload(bits);
    return buffer;
  };
  const tokens = { keys: upload(sample.keys), values: upload(sample.values), count };
  const owner = stack.move();
  return { ...tokens, [Symbol.dispose]: () => owner.dispose() };
}

/** A filled cache whose layers are all alike, in a decode step of one token per sequence. */
export class CacheWorkload implements Disposable {
  readonly cache: KvCache;
  readonly layers: number;
  readonly sequences: readonly KvSequence[];
  readonly step: KvCacheStep;
  readonly #queries: DeviceBuffer<"bf16">;
  readonly #out: DeviceBuffer<"bf16">;
  readonly #stack: DisposableStack;

  constructor(
    device: Device,
    shape: CacheCase,
    { tokens, codec, layers, residual }: {
      tokens: Tokens;
      codec: KvCacheCodec;
      layers: number;
      residual: number;
    },
  ) {
    const { kvHeads, headDim, lengths } = shape;
    const queryHeads = kvHeads * shape.group;
    const longest = Math.max(...lengths);
    const total = lengths.reduce((sum, length) => sum + length, 0);
    using stack = new DisposableStack();
    this.layers = layers;
    this.cache = stack.use(KvCache.create(device, {
      layers,
      queryHeads,
      kvHeads,
      headDim,
      dtype: "bf16",
      sequences: lengths.length,
      tokens: longest,
      stepTokens: Math.min(STEP_TOKENS, tokens.count),
      // As much as 16 bits would take: what is not needed costs nothing but memory.
      poolBytes: Math.ceil(total * kvHeads * headDim * 4.2 + lengths.length * 2 ** 17) * layers,
      residual,
      codec,
    }));
    this.sequences = lengths.map(() => this.cache.add());
    const rowLength = kvHeads * headDim;
    const append = (step: KvCacheStep, place: number) => {
      for (let layer = 0; layer < layers; layer++) {
        const first = (place + layer * 997) % (tokens.count - step.tokens + 1);
        const rows = (buffer: DeviceBuffer<"bf16">) =>
          buffer.view(first * rowLength, step.tokens * rowLength);
        step.append(layer, rows(tokens.keys), rows(tokens.values));
      }
    };
    // Each sequence in turn, but for its last token.
    this.sequences.forEach((sequence, i) => {
      let left = lengths[i]! - 1;
      while (left > 0) {
        const count = Math.min(left, STEP_TOKENS, tokens.count);
        append(this.cache.begin([{ sequence, tokens: count }]), left + 131 * i);
        left -= count;
      }
    });
    this.step = this.cache.begin(this.sequences.map((sequence) => ({ sequence })));
    append(this.step, 0);
    this.#queries = stack.use(device.createBuffer("bf16", lengths.length * queryHeads * headDim));
    this.#out = stack.use(device.createBuffer("bf16", this.#queries.length));
    const { keys } = tokens;
    for (let at = 0; at < this.#queries.length;) {
      const part = Math.min(keys.length, this.#queries.length - at);
      this.#queries.view(at, part).copyFrom(keys.view(0, part));
      at += part;
    }
    this.#stack = stack.move();
  }

  /** Bytes that attention reads of one layer: packed records and tokens in 16 bits. */
  get layerBytes(): number {
    const { packedBytes, tokens, packedTokens } = this.cache.statistics();
    const { kvHeads, headDim } = this.cache.config;
    return packedBytes / this.layers + (tokens - packedTokens) * kvHeads * headDim * 4;
  }

  /** Bits of a packed value, keys and values alike, everything counted. */
  get bitsPerValue(): number {
    const { packedBytes, packedTokens } = this.cache.statistics();
    const { kvHeads, headDim } = this.cache.config;
    return packedBytes * 8 / (packedTokens * this.layers * kvHeads * headDim * 2);
  }

  /** Enqueues attention in every layer. */
  attend(): void {
    for (let layer = 0; layer < this.layers; layer++) {
      this.step.attend(layer, this.#queries, this.#out);
    }
  }

  [Symbol.dispose](): void {
    this.#stack.dispose();
  }
}
