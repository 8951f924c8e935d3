import { NativeKvCache } from "../../ffi/kv_cache.ts";
import { type Device, nativeOf } from "../device/device.ts";
import { type KvRecords, MalformedBlock } from "./blocks.ts";
import { createBytes, downloadBytes, tensorIn } from "./buffers.ts";
import { PackhorseError } from "../error.ts";
import { type KvCacheCodec, type KvCacheConfig, nativeCacheConfig } from "./cache_options.ts";
import { type KvPair, rowByteLength } from "./tensor.ts";
import { layoutOf } from "./packed_file.ts";
import { BLOCK_TOKENS } from "./codec.ts";

const PAGE_BYTES = 65_536;

/**
 * Blocks of the tiles layout, of one layer, in the memory of a device: a cache that holds nothing else. What it takes
 * has passed every check.
 */
export class ResidentTiles implements Disposable {
  readonly #device: Device;
  readonly #config: KvCacheConfig;
  readonly #cache: NativeKvCache;
  readonly #sequence: number;

  private constructor(
    device: Device,
    config: KvCacheConfig,
    cache: NativeKvCache,
    sequence: number,
  ) {
    this.#device = device;
    this.#config = config;
    this.#cache = cache;
    this.#sequence = sequence;
  }

  /** Uploads records that were saved from a layer with this codec; or says which block no encoder writes. */
  static upload(
    device: Device,
    saved: KvCacheConfig,
    codec: KvCacheCodec,
    { records, offsets }: KvRecords,
  ): ResidentTiles | MalformedBlock {
    const blocks = offsets.length - 1;
    const tokens = blocks * BLOCK_TOKENS;
    const config = {
      ...saved,
      layers: 1,
      codecs: [codec],
      sinks: 0,
      tokens,
      residual: 8,
      // A stream begins with 16 bytes of its own.
      poolBytes: PAGE_BYTES * Math.ceil((records.byteLength + 16) / PAGE_BYTES),
    };
    const bytes = nativeCacheConfig(config);
    using stack = new DisposableStack();
    const cache = new NativeKvCache(nativeOf(device), bytes.config, bytes.codecs);
    stack.defer(() => cache.close());
    let sequence;
    try {
      const recordByteLengths = [records.byteLength];
      sequence = cache.beginImport({ tokens, blocks, recordByteLengths });
    } catch (error) {
      if (!(error instanceof PackhorseError) || error.code !== "corrupt") throw error;
      return new MalformedBlock(oddestBlock(offsets), "its size is none that a block has");
    }
    const recent = new Uint8Array();
    const malformed = cache.importLayer(sequence, 0, { records, offsets, recent });
    if (malformed) return new MalformedBlock(malformed.block, malformed.reason);
    stack.move();
    return new ResidentTiles(device, config, cache, sequence);
  }

  /** Keys and values `[heads, tokens, headDim]`. */
  async decode(): Promise<KvPair<Uint8Array<ArrayBuffer>>> {
    const { kvHeads, headDim, dtype, tokens } = this.#config;
    const layout = layoutOf({ dtype, heads: kvHeads, tokens, headDim });
    const row = rowByteLength(layout);
    const byteLength = tokens * kvHeads * row;
    using keys = createBytes(this.#device, byteLength);
    using values = createBytes(this.#device, byteLength);
    this.#cache.read(0, this.#sequence, {
      first: 0,
      count: tokens,
      keys: tensorIn(keys),
      values: tensorIn(values),
    });
    /** From [tokens, heads, headDim]. */
    const headsFirst = (bytes: Uint8Array<ArrayBuffer>) => {
      if (kvHeads === 1) return bytes;
      const result = new Uint8Array(byteLength);
      for (let from = 0, token = 0; token < tokens; token++) {
        for (let head = 0; head < kvHeads; head++, from += row) {
          result.set(bytes.subarray(from, from + row), (head * tokens + token) * row);
        }
      }
      return result;
    };
    return {
      keys: headsFirst(await downloadBytes(keys, byteLength)),
      values: headsFirst(await downloadBytes(values, byteLength)),
    };
  }

  [Symbol.dispose](): void {
    this.#cache.close();
  }
}

/** Of blocks that take no multiple of 16 bytes, or more than they can: one that does. */
function oddestBlock(offsets: BigUint64Array): number {
  const lengths = Array.from(offsets.subarray(1), (end, i) => Number(end - offsets[i]!));
  const odd = lengths.findIndex((length) => length % 16 !== 0);
  return odd >= 0 ? odd : lengths.indexOf(Math.max(...lengths));
}
