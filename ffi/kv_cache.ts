import { PackhorseError } from "../src/error.ts";
import { call, create } from "./call.ts";
import type { HostBytes, NativeDevice } from "./device.ts";
import type { NativeTensor } from "./kv.ts";
import { KV_CACHE_STATISTICS } from "./structs.ts";

/** The sequences of a step, by their numbers, and how many tokens each gets. */
export interface NativeStep {
  readonly sequences: Uint32Array<ArrayBuffer>;
  readonly tokens: Uint32Array<ArrayBuffer>;
}

/**
 * A `ph_kv_cache`, freed before its device closes. Calls are synchronous, for a cache belongs to one thread at a
 * time. Numbers of sequences, layers and tokens must fit their types.
 */
export class NativeKvCache {
  readonly device: NativeDevice;
  readonly #deviceHandle: Deno.PointerObject;
  readonly #handle: Deno.PointerObject;
  #isClosed = false;

  /** Creates a cache from the bytes of a `ph_kv_cache_config` and of a `ph_kv_cache_codec` per layer. */
  constructor(device: NativeDevice, config: HostBytes, codecs: HostBytes) {
    this.device = device;
    this.#deviceHandle = device.handle;
    const { ph_kv_cache_create } = device.library.symbols;
    this.#handle = create(ph_kv_cache_create, this.#deviceHandle, config, codecs);
    device.own(this);
  }

  /** The `ph_kv_cache*`. Throws `disposed` once closed, as it is with its device. */
  get handle(): Deno.PointerObject {
    if (!this.#isClosed) return this.#handle;
    const message = "Cannot use the kv cache: it, or its device, was disposed";
    throw new PackhorseError("disposed", message);
  }

  get isClosed(): boolean {
    return this.#isClosed;
  }

  add(): number {
    const sequence = new Uint32Array(1);
    call(this.#symbols.ph_kv_cache_add, ...this.#handles, sequence);
    return sequence[0]!;
  }

  fork(sequence: number): number {
    const fork = new Uint32Array(1);
    call(this.#symbols.ph_kv_cache_fork, ...this.#handles, sequence, fork);
    return fork[0]!;
  }

  truncate(sequence: number, tokens: number): void {
    call(this.#symbols.ph_kv_cache_truncate, ...this.#handles, sequence, BigInt(tokens));
  }

  remove(sequence: number): void {
    call(this.#symbols.ph_kv_cache_remove, ...this.#handles, sequence);
  }

  length(sequence: number): number {
    const tokens = new BigUint64Array(1);
    call(this.#symbols.ph_kv_cache_length, ...this.#handles, sequence, tokens);
    return Number(tokens[0]);
  }

  begin({ sequences, tokens }: NativeStep): void {
    const { length } = sequences;
    call(this.#symbols.ph_kv_cache_begin, ...this.#handles, sequences, tokens, length);
  }

  append(layer: number, keys: NativeTensor, values: NativeTensor): void {
    call(
      this.#symbols.ph_kv_cache_append,
      ...this.#handles,
      layer,
      keys.buffer.handle,
      BigInt(keys.byteOffset),
      values.buffer.handle,
      BigInt(values.byteOffset),
    );
  }

  attend(layer: number, queries: NativeTensor, out: NativeTensor, scale: number): void {
    call(
      this.#symbols.ph_kv_cache_attend,
      ...this.#handles,
      layer,
      queries.buffer.handle,
      BigInt(queries.byteOffset),
      out.buffer.handle,
      BigInt(out.byteOffset),
      scale,
    );
  }

  prefill(
    layer: number,
    { queries, keys, values, out }: Record<"queries" | "keys" | "values" | "out", NativeTensor>,
    scale: number,
  ): void {
    call(
      this.#symbols.ph_kv_cache_prefill,
      ...this.#handles,
      layer,
      queries.buffer.handle,
      BigInt(queries.byteOffset),
      keys.buffer.handle,
      BigInt(keys.byteOffset),
      values.buffer.handle,
      BigInt(values.byteOffset),
      out.buffer.handle,
      BigInt(out.byteOffset),
      scale,
    );
  }

  /** Tokens `first` to `first + count` into `keys` and `values`. */
  read(
    layer: number,
    sequence: number,
    { first, count, keys, values }: {
      readonly first: number;
      readonly count: number;
      readonly keys: NativeTensor;
      readonly values: NativeTensor;
    },
  ): void {
    call(
      this.#symbols.ph_kv_cache_read,
      ...this.#handles,
      layer,
      sequence,
      BigInt(first),
      BigInt(count),
      keys.buffer.handle,
      BigInt(keys.byteOffset),
      values.buffer.handle,
      BigInt(values.byteOffset),
    );
  }

  check(): void {
    call(this.#symbols.ph_kv_cache_check, ...this.#handles);
  }

  get statistics(): ReturnType<typeof KV_CACHE_STATISTICS.read> {
    const bytes = new Uint8Array(KV_CACHE_STATISTICS.byteLength);
    call(this.#symbols.ph_kv_cache_get_statistics, ...this.#handles, bytes);
    return KV_CACHE_STATISTICS.read(bytes);
  }

  /** Frees the cache. Does nothing the second time. */
  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.device.disown(this);
    call(this.#symbols.ph_kv_cache_destroy, this.#deviceHandle, this.#handle);
  }

  get #symbols() {
    return this.device.library.symbols;
  }

  get #handles(): [Deno.PointerObject, Deno.PointerObject] {
    return [this.#deviceHandle, this.handle];
  }
}
