import { PackhorseError } from "../src/error.ts";
import { call, create } from "./call.ts";
import type { HostBytes, NativeDevice } from "./device.ts";
import { type NativeTensor, place } from "./tensor.ts";
import type { NativeKvCacheGraph } from "./kv_cache_graph.ts";
import type { Library } from "./library.ts";
import { KV_CACHE_STATISTICS } from "./structs.ts";

/** `PH_KV_CACHE_SHAPE_WORDS` */
const SHAPE_WORDS = 6;

/** The sequences of a step, by their numbers, and how many tokens each gets. */
export interface NativeStep {
  readonly sequences: Uint32Array<ArrayBuffer>;
  readonly tokens: Uint32Array<ArrayBuffer>;
}

/** One layer of a sequence in host memory, as `ph_kv_cache_export` writes it. */
export interface NativeSequenceLayer {
  readonly records: HostBytes;
  /** An element more than there are blocks. */
  readonly offsets: BigUint64Array<ArrayBuffer>;
  readonly recent: HostBytes;
}

/** A block that no encoder writes, and why not. */
export interface NativeMalformedBlock {
  readonly block: number;
  readonly reason: string;
}

/** What creating a cache would allocate, in the words of `ph_kv_cache_statistics`, and what its blocks can take. */
export interface NativeCachePlan {
  readonly statistics: ReturnType<typeof KV_CACHE_STATISTICS.read>;
  /** Per layer, the least and the most bytes of a packed block. */
  readonly blockBytes: readonly { readonly least: number; readonly most: number }[];
}

/** Plans a cache from the bytes of a `ph_kv_cache_config` and of a `ph_kv_cache_codec` per layer. Needs no device. */
export function planCache(
  { symbols }: Library,
  { config, codecs, layers }: { config: HostBytes; codecs: HostBytes; layers: number },
): NativeCachePlan {
  const statistics = new Uint8Array(KV_CACHE_STATISTICS.byteLength);
  const bytes = new BigUint64Array(2 * layers);
  call(symbols.ph_kv_cache_plan, config, codecs, statistics, bytes);
  const blockBytes = Array.from({ length: layers }, (_, layer) => ({
    least: Number(bytes[2 * layer]),
    most: Number(bytes[2 * layer + 1]),
  }));
  return { statistics: KV_CACHE_STATISTICS.read(statistics), blockBytes };
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
      ...place(keys),
      ...place(values),
    );
  }

  attend(layer: number, queries: NativeTensor, out: NativeTensor, scale: number): void {
    call(
      this.#symbols.ph_kv_cache_attend,
      ...this.#handles,
      layer,
      ...place(queries),
      ...place(out),
      scale,
    );
  }

  /** The words of the current step's shape. */
  get stepShape(): Uint32Array<ArrayBuffer> {
    const shape = new Uint32Array(SHAPE_WORDS);
    call(this.#symbols.ph_kv_cache_step_shape, ...this.#handles, shape);
    return shape;
  }

  replay(graph: NativeKvCacheGraph): void {
    call(this.#symbols.ph_kv_cache_replay, ...this.#handles, graph.handle);
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
      ...place(queries),
      ...place(keys),
      ...place(values),
      ...place(out),
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
      ...place(keys),
      ...place(values),
    );
  }

  /** `scale * q . k` of all tokens into `out`. */
  score(
    layer: number,
    sequence: number,
    { queries, out, scale }: {
      readonly queries: NativeTensor;
      readonly out: NativeTensor;
      readonly scale: number;
    },
  ): void {
    call(
      this.#symbols.ph_kv_cache_score,
      ...this.#handles,
      layer,
      sequence,
      ...place(queries),
      ...place(out),
      scale,
    );
  }

  /** The weighted sum of all tokens' values into `out`. */
  weigh(
    layer: number,
    sequence: number,
    { weights, out }: { readonly weights: NativeTensor; readonly out: NativeTensor },
  ): void {
    call(
      this.#symbols.ph_kv_cache_weigh,
      ...this.#handles,
      layer,
      sequence,
      ...place(weights),
      ...place(out),
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

  /** Packed blocks of a sequence, and the bytes of their records in each of `layers` layers. */
  measure(sequence: number, layers: number): { blocks: number; recordByteLengths: number[] } {
    const blocks = new Uint32Array(1);
    const bytes = new BigUint64Array(layers);
    call(this.#symbols.ph_kv_cache_measure, ...this.#handles, sequence, blocks, bytes);
    return { blocks: blocks[0]!, recordByteLengths: Array.from(bytes, Number) };
  }

  /** Fills `target`, whose arrays have the lengths that {@linkcode measure} says. */
  exportLayer(sequence: number, layer: number, target: NativeSequenceLayer): void {
    const memory = this.#layerMemory(target);
    call(this.#symbols.ph_kv_cache_export, ...this.#handles, sequence, layer, ...memory);
  }

  /** Takes room for a sequence, which is there once all its layers were imported. */
  beginImport(
    { tokens, blocks, recordByteLengths }: {
      readonly tokens: number;
      readonly blocks: number;
      /** Of each layer. */
      readonly recordByteLengths: readonly number[];
    },
  ): number {
    const sequence = new Uint32Array(1);
    const bytes = BigUint64Array.from(recordByteLengths, BigInt);
    call(
      this.#symbols.ph_kv_cache_begin_import,
      ...this.#handles,
      BigInt(tokens),
      blocks,
      bytes,
      sequence,
    );
    return sequence[0]!;
  }

  /** Imports a layer, unless a block is malformed. */
  importLayer(
    sequence: number,
    layer: number,
    source: NativeSequenceLayer,
  ): NativeMalformedBlock | undefined {
    const memory = this.#layerMemory(source);
    const malformed = new BigUint64Array(1);
    const symbol = this.#symbols.ph_kv_cache_import;
    try {
      call(symbol, ...this.#handles, sequence, layer, ...memory, malformed);
    } catch (error) {
      if (!(error instanceof PackhorseError) || error.code !== "corrupt") throw error;
      return { block: Number(malformed[0]), reason: error.message };
    }
    return undefined;
  }

  #layerMemory({ records, offsets, recent }: NativeSequenceLayer) {
    const recordBytes = BigInt(records.byteLength);
    return [records, recordBytes, offsets, recent, BigInt(recent.byteLength)] as const;
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
