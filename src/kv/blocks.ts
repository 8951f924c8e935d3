import * as native from "../../ffi/kv.ts";
import { KV_STATISTICS } from "../../ffi/structs.ts";
import { type Device, nativeOf } from "../device/device.ts";
import type { DeviceBuffer } from "../device/device_buffer.ts";
import { PackhorseError } from "../error.ts";
import {
  createBytes,
  downloadBytes,
  downloadStatus,
  memoryOf,
  tensorIn,
  uploadBytes,
} from "./buffers.ts";
import { BLOCK_TOKENS, type KvCodec, nativeCodec } from "./codec.ts";
import { type KvLayout, type KvPair, type KvPart, PARTS, tensorByteLength } from "./tensor.ts";

/** What measuring records finds, summed over blocks. */
export type BlockStatistics = ReturnType<typeof KV_STATISTICS.read>;

/** Where a value, or a range of values, is that no scale fits. */
export interface NonFinitePlace {
  readonly part: KvPart;
  readonly token: number;
  readonly head: number;
}

/** Records of consecutive blocks; record `i` goes from byte `offsets[i]` to `offsets[i + 1]`. */
export interface KvRecords {
  readonly records: Uint8Array<ArrayBuffer>;
  readonly offsets: BigUint64Array<ArrayBuffer>;
}

/** What a status buffer says when there is nothing to say. */
export const NOTHING = 2n ** 64n - 1n;

/** Keys and values of at least one whole block in the memory of a device. */
export class ResidentBlocks implements Disposable {
  readonly device: Device;
  /** Its tokens are a multiple of 64. */
  readonly layout: KvLayout;
  readonly buffers: KvPair<DeviceBuffer<"u8">>;

  private constructor(device: Device, layout: KvLayout, buffers: KvPair<DeviceBuffer<"u8">>) {
    this.device = device;
    this.layout = layout;
    this.buffers = buffers;
  }

  static async upload(
    device: Device,
    layout: KvLayout,
    bytes: KvPair<Uint8Array<ArrayBuffer>>,
  ): Promise<ResidentBlocks> {
    using stack = new DisposableStack();
    const keys = stack.use(await uploadBytes(device, bytes.keys));
    const values = stack.use(await uploadBytes(device, bytes.values));
    stack.move();
    return new ResidentBlocks(device, layout, { keys, values });
  }

  /** Quantises, repacks and packs the blocks; or says where they are not finite. */
  async encode(codec: KvCodec): Promise<ResidentRecords | NonFinitePlace> {
    const { device, layout, buffers } = this;
    const bytes = nativeCodec(codec, layout);
    const { library } = nativeOf(device);
    const blocks = layout.shape[1] / BLOCK_TOKENS;
    using stack = new DisposableStack();
    const records = stack.use(
      createBytes(device, Number(native.recordsCapacity(library, bytes))),
    );
    const offsets = stack.use(createBytes(device, (blocks + 1) * 8));
    using workspace = createBytes(device, Number(native.workspaceBytes(library, bytes)));
    using status = createBytes(device, 16);
    await native.encodeAsync(nativeOf(device), bytes, {
      keys: tensorIn(buffers.keys),
      values: tensorIn(buffers.values),
      records: memoryOf(records),
      offsets: memoryOf(offsets),
      workspace: memoryOf(workspace),
      status: memoryOf(status),
    });
    const [nonFinite, recordsByteLength] = await downloadStatus(status);
    if (nonFinite !== NOTHING && !codec.keepNonFinite) return nonFinitePlace(nonFinite);
    stack.move();
    const shape = { codec, layout, recordsByteLength: Number(recordsByteLength) };
    return new ResidentRecords(device, shape, { records, offsets });
  }

  [Symbol.dispose](): void {
    for (const part of PARTS) this.buffers[part][Symbol.dispose]();
  }
}

/** Records of at least one block in the memory of a device. */
export class ResidentRecords implements Disposable {
  readonly device: Device;
  readonly codec: KvCodec;
  readonly layout: KvLayout;
  readonly byteLength: number;
  readonly buffers: { readonly records: DeviceBuffer<"u8">; readonly offsets: DeviceBuffer<"u8"> };

  constructor(
    device: Device,
    { codec, layout, recordsByteLength }: {
      codec: KvCodec;
      layout: KvLayout;
      recordsByteLength: number;
    },
    buffers: ResidentRecords["buffers"],
  ) {
    this.device = device;
    this.codec = codec;
    this.layout = layout;
    this.byteLength = recordsByteLength;
    this.buffers = buffers;
  }

  static async upload(
    device: Device,
    { codec, layout }: { codec: KvCodec; layout: KvLayout },
    { records, offsets }: KvRecords,
  ): Promise<ResidentRecords> {
    using stack = new DisposableStack();
    const buffers = {
      records: stack.use(await uploadBytes(device, records)),
      offsets: stack.use(
        await uploadBytes(
          device,
          new Uint8Array(offsets.buffer, offsets.byteOffset, offsets.byteLength),
        ),
      ),
    };
    stack.move();
    const shape = { codec, layout, recordsByteLength: records.byteLength };
    return new ResidentRecords(device, shape, buffers);
  }

  async download(): Promise<KvRecords> {
    const blocks = this.layout.shape[1] / BLOCK_TOKENS;
    const offsets = await downloadBytes(this.buffers.offsets, (blocks + 1) * 8);
    return {
      records: await downloadBytes(this.buffers.records, this.byteLength),
      offsets: new BigUint64Array(offsets.buffer),
    };
  }

  /** Keys and values, or the first block whose record is not well formed. */
  async decode(): Promise<KvPair<Uint8Array<ArrayBuffer>> | MalformedBlock> {
    const { device, layout } = this;
    const byteLength = tensorByteLength(layout);
    using keys = createBytes(device, byteLength);
    using values = createBytes(device, byteLength);
    using status = createBytes(device, 16);
    await native.decodeAsync(nativeOf(device), nativeCodec(this.codec, layout), {
      ...this.native,
      keys: tensorIn(keys),
      values: tensorIn(values),
      status: memoryOf(status),
    });
    const [malformed] = await downloadStatus(status);
    if (malformed !== NOTHING) return new MalformedBlock(Number(malformed));
    return {
      keys: await downloadBytes(keys, byteLength),
      values: await downloadBytes(values, byteLength),
    };
  }

  /** Statistics, with errors if the originals are given; or the first block whose record is not well formed. */
  async measure(originals?: ResidentBlocks): Promise<BlockStatistics | MalformedBlock> {
    const { device } = this;
    const codec = nativeCodec(this.codec, this.layout);
    const { library } = nativeOf(device);
    using statistics = createBytes(device, KV_STATISTICS.byteLength);
    using workspace = createBytes(device, Number(native.workspaceBytes(library, codec)));
    using status = createBytes(device, 16);
    await native.measureAsync(nativeOf(device), codec, {
      ...this.native,
      originals: originals && {
        keys: tensorIn(originals.buffers.keys),
        values: tensorIn(originals.buffers.values),
      },
      statistics: memoryOf(statistics),
      workspace: memoryOf(workspace),
      status: memoryOf(status),
    });
    const [malformed] = await downloadStatus(status);
    if (malformed !== NOTHING) return new MalformedBlock(Number(malformed));
    return KV_STATISTICS.read(await downloadBytes(statistics, KV_STATISTICS.byteLength));
  }

  /** For the native operations. */
  get native(): native.NativeRecords {
    return {
      records: memoryOf(this.buffers.records),
      recordsByteLength: this.byteLength,
      offsets: memoryOf(this.buffers.offsets),
    };
  }

  [Symbol.dispose](): void {
    this.buffers.records[Symbol.dispose]();
    this.buffers.offsets[Symbol.dispose]();
  }
}

/** A block whose record no encoder writes. */
export class MalformedBlock {
  readonly block: number;
  /** What is wrong with it, where that is known. */
  readonly reason: string | undefined;

  constructor(block: number, reason?: string) {
    this.block = block;
    this.reason = reason;
  }
}

/** The first u64 of an encoder's status buffer, unless it says that all is finite. */
export function nonFinitePlace(key: bigint): NonFinitePlace {
  return {
    part: PARTS[Number(key & 0xffn)]!,
    head: Number((key >> 8n) & 0xffffn),
    token: Number(key >> 24n),
  };
}

/** `name` says which tensor, such as " of layers.0 of cache.safetensors". */
export function nonFiniteError({ part, token, head }: NonFinitePlace, name = ""): PackhorseError {
  return new PackhorseError(
    "non-finite",
    `Cannot pack the ${part}${name}: token ${token}, head ${head} has a NaN or an infinity, or a ` +
      "range beyond float32; with keepNonFinite (--keep-non-finite) such blocks are stored as they are",
  );
}

/** `name` says whose records they are, such as " of layers.0 of cache.phkv". */
export function malformedError(block: number, name = ""): PackhorseError {
  const token = block * BLOCK_TOKENS;
  return new PackhorseError(
    "corrupt",
    `Cannot read the records${name}: that of block ${block} ` +
      `(tokens ${token}-${token + BLOCK_TOKENS - 1}) is not well formed`,
  );
}
