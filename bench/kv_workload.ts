import * as native from "../ffi/kv.ts";
import { type Device, nativeOf } from "../src/device/device.ts";
import type { DeviceBuffer } from "../src/device/mod.ts";
import { createBytes, memoryOf, tensorIn } from "../src/kv/buffers.ts";
import { BLOCK_TOKENS, nativeCodec, resolveCodec } from "../src/kv/codec.ts";
import type { KvCodecOptions, KvLayout, KvPair } from "../src/kv/mod.ts";

/** Heads of the caches that are measured: those of an 8-billion-parameter LLaMA. */
export const HEADS = 8;
/** Channels of a head. */
export const HEAD_DIM = 128;

// No divisor of a head's size, so that a slab put end to end gives every head other values.
const SLAB_LENGTH = 30_000_000;

/** Keys, or values, of `tokens` tokens: normally distributed, in 16 bits. */
export function createNormals(device: Device, tokens: number, seed: number): DeviceBuffer<"f16"> {
  const length = HEADS * tokens * HEAD_DIM;
  const buffer = device.createBuffer("f16", length);
  const slabLength = Math.min(SLAB_LENGTH, length);
  const slab = buffer.view(0, slabLength);
  slab.upload(normals(slabLength, seed));
  for (let start = slabLength; start < length; start += slabLength) {
    const part = Math.min(slabLength, length - start);
    buffer.view(start, part).copyFrom(buffer.view(0, part));
  }
  return buffer;
}

/** Box and Muller's method over a 32-bit linear congruential generator. */
function normals(length: number, seed: number): Float16Array {
  let state = seed;
  const uniform = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return (state + 0.5) / 2 ** 32;
  };
  const values = new Float16Array(length);
  for (let i = 0; i < length; i += 2) {
    const radius = Math.sqrt(-2 * Math.log(uniform()));
    const angle = 2 * Math.PI * uniform();
    values[i] = radius * Math.cos(angle);
    values[i + 1] = radius * Math.sin(angle);
  }
  return values;
}

/**
 * A cache, its records and the restored cache, all in device memory and allocated
 * once, so that what is measured is the codec alone.
 */
export class KvWorkload implements Disposable {
  /** Bytes of keys and values. */
  readonly inputBytes: number;
  readonly #device: Device;
  readonly #codec: Uint8Array<ArrayBuffer>;
  readonly #cache: KvPair<DeviceBuffer<"f16">>;
  readonly #restored: KvPair<DeviceBuffer<"f16">>;
  readonly #records: DeviceBuffer<"u8">;
  readonly #offsets: DeviceBuffer<"u8">;
  readonly #workspace: DeviceBuffer<"u8">;
  readonly #status: DeviceBuffer<"u8">;

  /** Works on the first `tokens * HEADS * HEAD_DIM` elements of the buffers, which stay the caller's. */
  constructor(
    device: Device,
    { cache, restored, tokens, codec }: {
      cache: KvPair<DeviceBuffer<"f16">>;
      restored: KvPair<DeviceBuffer<"f16">>;
      tokens: number;
      codec: KvCodecOptions;
    },
  ) {
    const layout: KvLayout = { dtype: "f16", shape: [HEADS, tokens, HEAD_DIM] };
    this.inputBytes = 2 * 2 * HEADS * tokens * HEAD_DIM;
    this.#device = device;
    this.#cache = cache;
    this.#restored = restored;
    this.#codec = nativeCodec(resolveCodec(codec), layout);
    const { library } = nativeOf(device);
    using stack = new DisposableStack();
    const allocate = (bytes: bigint | number) => stack.use(createBytes(device, Number(bytes)));
    this.#records = allocate(native.recordsCapacity(library, this.#codec));
    this.#offsets = allocate((tokens / BLOCK_TOKENS + 1) * 8);
    this.#workspace = allocate(native.workspaceBytes(library, this.#codec));
    this.#status = allocate(16);
    stack.move();
  }

  /** Enqueues quantising, repacking and packing the cache. */
  encode(): void {
    native.encode(nativeOf(this.#device), this.#codec, {
      keys: tensorIn(this.#cache.keys),
      values: tensorIn(this.#cache.values),
      records: memoryOf(this.#records),
      offsets: memoryOf(this.#offsets),
      workspace: memoryOf(this.#workspace),
      status: memoryOf(this.#status),
    });
  }

  /** Bytes of the records that {@linkcode encode} wrote. Waits for it. */
  get recordsByteLength(): number {
    const [, byteLength] = new BigUint64Array(this.#status.view(0, 16).download().buffer);
    return Number(byteLength);
  }

  /** Enqueues restoring the cache from `recordsByteLength` bytes of records. */
  decode(recordsByteLength: number): void {
    native.decode(nativeOf(this.#device), this.#codec, {
      records: memoryOf(this.#records),
      recordsByteLength,
      offsets: memoryOf(this.#offsets),
      keys: tensorIn(this.#restored.keys),
      values: tensorIn(this.#restored.values),
      status: memoryOf(this.#status),
    });
  }

  [Symbol.dispose](): void {
    for (const buffer of [this.#records, this.#offsets, this.#workspace, this.#status]) {
      buffer[Symbol.dispose]();
    }
  }
}

/** The middle of the times, or the upper of the two. */
export function median(times: readonly number[]): number {
  return times.toSorted((a, b) => a - b)[times.length >> 1]!;
}
