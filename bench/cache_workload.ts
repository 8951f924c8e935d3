/** Growing caches to measure, filled with keys and values that are a real model's. */
import type { Device, DeviceBuffer } from "../src/device/mod.ts";
import {
  KvCache,
  type KvCacheCodec,
  type KvCacheStep,
  type KvSequence,
  type KvStepGraph,
  splitsToFill,
} from "../src/kv/mod.ts";
import { KvSampler } from "../src/kv/sample.ts";
import { withWholePool } from "../src/kv/pool_bytes.ts";

const DUMP = new URL("../tests/fixtures/tiny/kv.safetensors", import.meta.url).pathname;
/** The codec that is measured most. */
export const PACKKV: KvCacheCodec = {
  keys: { quantizer: "packkv", rel: 0.1 },
  values: { quantizer: "packkv", rel: 0.2 },
};
/** Tokens of one step while a cache is filled, unless said otherwise. */
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
  /** As {@linkcode KvCacheOptions.splits}. Default: those that fill a GPU. */
  readonly splits?: number;
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

/** How a {@linkcode CacheWorkload} is filled. */
export interface CacheFilling {
  readonly tokens: Tokens;
  readonly codec: KvCacheCodec;
  readonly layers: number;
  readonly residual: number;
  /** Most tokens of a step. */
  readonly stepTokens?: number;
  /** For how many more tokens each sequence has room. Default: 0. */
  readonly room?: number;
  /** Whether all sequences, which have one length, are forks of one, and share its packed records. Default: false. */
  readonly forked?: boolean;
}

/** A filled cache whose layers are all alike, in a decode step of one token per sequence. */
export class CacheWorkload implements Disposable {
  readonly cache: KvCache;
  readonly layers: number;
  readonly sequences: readonly KvSequence[];
  readonly #shape: CacheCase;
  readonly #tokens: Tokens;
  readonly #queries: DeviceBuffer<"bf16">;
  readonly #out: DeviceBuffer<"bf16">;
  readonly #stack: DisposableStack;
  #step: KvCacheStep;
  #steps = 0;

  constructor(
    device: Device,
    shape: CacheCase,
    { tokens, codec, layers, residual, stepTokens = STEP_TOKENS, room = 0, forked = false }:
      CacheFilling,
  ) {
    const { kvHeads, headDim, lengths } = shape;
    const { splits = splitsToFill({ sequences: lengths.length, kvHeads }) } = shape;
    const queryHeads = kvHeads * shape.group;
    const mostTokens = Math.min(stepTokens, tokens.count);
    using stack = new DisposableStack();
    this.layers = layers;
    this.#shape = shape;
    this.#tokens = tokens;
    const config = withWholePool(device, {
      layers,
      queryHeads,
      kvHeads,
      headDim,
      dtype: "bf16",
      sequences: lengths.length,
      tokens: Math.max(...lengths) + room,
      stepTokens: Math.max(mostTokens, lengths.length),
      splits,
      residual,
      codec,
    });
    this.cache = stack.use(KvCache.create(device, config));
    // Each sequence in turn, but for its last token.
    const fill = (length: number): KvSequence => {
      const sequence = this.cache.add();
      for (let left = length - 1; left > 0;) {
        const count = Math.min(left, mostTokens);
        this.append(this.cache.begin([{ sequence, tokens: count }]));
        left -= count;
      }
      return sequence;
    };
    if (forked) {
      const first = fill(lengths[0]!);
      this.sequences = lengths.map((_, i) => i === 0 ? first : this.cache.fork(first));
    } else {
      this.sequences = lengths.map(fill);
    }
    this.#step = this.begin();
    this.append(this.#step);
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
    return packedBytes / this.layers + (tokens - packedTokens) * this.tokenBytes;
  }

  /** Bytes of a token's keys and values in one layer, in 16 bits. */
  get tokenBytes(): number {
    return this.#shape.kvHeads * this.#shape.headDim * 4;
  }

  /** Bits of a packed value, keys and values alike, everything counted. */
  get bitsPerValue(): number {
    const { packedBytes, packedTokens } = this.cache.statistics();
    return 16 * packedBytes / (packedTokens * this.layers * this.tokenBytes);
  }

  /** Begins a step of `tokens` for every sequence, which becomes the one that is attended to. */
  begin(tokens = 1): KvCacheStep {
    return this.#step = this.cache.begin(
      this.sequences.map((sequence) => ({ sequence, tokens })),
    );
  }

  /** Enqueues appending tokens to every layer: others to each, and others than in the step before. */
  append(step: KvCacheStep): void {
    const { keys, values, count } = this.#tokens;
    const row = this.#shape.kvHeads * this.#shape.headDim;
    const turn = 7 * this.#steps++;
    for (let layer = 0; layer < this.layers; layer++) {
      const first = (turn + layer) * (step.tokens + 997) % (count - step.tokens + 1);
      const rows = (buffer: DeviceBuffer<"bf16">) => buffer.view(first * row, step.tokens * row);
      step.append(layer, rows(keys), rows(values));
    }
  }

  /** Captures {@linkcode attend}, so many times, to enqueue it as one graph by {@linkcode replay}; on a GPU only. */
  capture(times = 1): KvStepGraph {
    return this.#step.capture(() => {
      for (let i = 0; i < times; i++) this.attend();
    });
  }

  /** Enqueues captured attention. */
  replay(graph: KvStepGraph): void {
    this.#step.replay(graph);
  }

  /** Enqueues attention in every layer. */
  attend(): void {
    for (let layer = 0; layer < this.layers; layer++) {
      this.#step.attend(layer, this.#queries, this.#out);
    }
  }

  [Symbol.dispose](): void {
    this.#stack.dispose();
  }
}
