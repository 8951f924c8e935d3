import type { Device } from "../device/device.ts";
import type { DeviceBuffer } from "../device/device_buffer.ts";
import { KvCache } from "../kv/cache.ts";
import { type KvCacheCodec, type KvCacheDType, LEAST_RESIDUAL } from "../kv/cache_options.ts";
import { BLOCK_TOKENS } from "../kv/codec.ts";
import { poolBytesFor } from "../kv/pool_bytes.ts";
import { gather } from "./operations.ts";

/** Shape of the keys, and of the values, of one layer and some tokens. */
export interface RestoreShape {
  readonly kvHeads: number;
  readonly headDim: number;
  readonly dtype: KvCacheDType;
  /** Tokens. */
  readonly tokens: number;
  /** How many of the first tokens stay as they are. */
  readonly sinks: number;
}

/**
 * Quantises keys and values and restores them in place: what a cache of the codec makes of tokens once they are packed,
 * all of them in blocks of 64, but for the sinks. The last block is filled up with copies of the last token.
 */
export class RestoreCache implements Disposable {
  /** Bytes of all records so far. */
  packedBytes = 0;
  readonly #shape: RestoreShape;
  readonly #cache: KvCache;
  readonly #stack: DisposableStack;
  readonly #rows: number;
  readonly #indices: DeviceBuffer<"i32">;
  readonly #keys: DeviceBuffer<KvCacheDType>;
  readonly #values: DeviceBuffer<KvCacheDType>;

  constructor(device: Device, codec: KvCacheCodec, shape: RestoreShape) {
    const { kvHeads, headDim, dtype, tokens, sinks } = shape;
    this.#shape = shape;
    const blocks = Math.ceil(Math.max(0, tokens - sinks) / BLOCK_TOKENS);
    const rows = sinks + blocks * BLOCK_TOKENS + LEAST_RESIDUAL;
    this.#rows = rows;
    using stack = new DisposableStack();
    const cache = {
      ...{ layers: 1, queryHeads: kvHeads, kvHeads, headDim, dtype, codec },
      ...{ sequences: 1, tokens: rows, stepTokens: rows, residual: LEAST_RESIDUAL, sinks },
    };
    const poolBytes = poolBytesFor(device, cache);
    this.#cache = stack.use(KvCache.create(device, { ...cache, poolBytes }));
    this.#indices = stack.use(device.createBuffer("i32", rows));
    this.#indices.upload(Int32Array.from({ length: rows }, (_, i) => Math.min(i, tokens - 1)));
    const create = () => stack.use(device.createBuffer(dtype, rows * kvHeads * headDim));
    this.#keys = create();
    this.#values = create();
    this.#stack = stack.move();
  }

  /** Bytes of a token's keys and values in 16 bits. */
  get tokenBytes(): number {
    return 2 * 2 * this.#shape.kvHeads * this.#shape.headDim;
  }

  /** Quantises and restores keys and values `[tokens, kvHeads, headDim]`. Waits for the device. */
  restore(keys: DeviceBuffer<KvCacheDType>, values: DeviceBuffer<KvCacheDType>): void {
    const { kvHeads, headDim, tokens } = this.#shape;
    const cache = this.#cache;
    const size = { rows: this.#rows, width: kvHeads * headDim, xRows: tokens };
    gather(keys, this.#indices, this.#keys, size);
    gather(values, this.#indices, this.#values, size);
    const sequence = cache.add();
    cache.begin([{ sequence, tokens: this.#rows }]).append(0, this.#keys, this.#values);
    {
      using restored = cache.read(0, sequence, { count: tokens });
      keys.copyFrom(restored.keys);
      values.copyFrom(restored.values);
    }
    this.packedBytes += cache.statistics().packedBytes;
    cache.check();
    cache.remove(sequence);
  }

  /** Frees its memory. */
  [Symbol.dispose](): void {
    this.#stack.dispose();
  }
}
