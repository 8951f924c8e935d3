import type { Device } from "../device/device.ts";
import { PackhorseError } from "../error.ts";
import {
  type BlockStatistics,
  MalformedBlock,
  malformedError,
  ResidentBlocks,
  ResidentRecords,
} from "./blocks.ts";
import { BLOCK_TOKENS, type KvPack } from "./codec.ts";
import { checkPacked, type PackedKv } from "./packed.ts";
import {
  checkPair,
  type KvPair,
  type KvTensor,
  PARTS,
  sliceTokens,
  tensorByteLength,
  withTokens,
} from "./tensor.ts";

/** What packing did to the keys, or to the values, of a layer. Only packed blocks count. */
export interface KvPartMeasurement {
  /**
   * Bits per value by the formula of PackKV: `(payloadBits + packs * (b + ceil(log2(b + 1)))) / values` with
   * `b = ceil(log2(distinctCodes))`. Scales, zero points and padding do not count. 0 without packed blocks.
   */
  readonly bits: number;
  /** Bits of the packs' fields: the sum of tokens times width over packs. */
  readonly payloadBits: number;
  /** How many different codes occur. */
  readonly distinctCodes: number;
  /** Packs of width 0 to 8 bits. */
  readonly widths: readonly number[];
  /** Largest `|x' - x|`, before `x'` is rounded to the cache's type; 0 without originals. */
  readonly maxError: number;
  /** Largest `|x' - x| / scale`, at most 1/2 but for float32 rounding; 0 without originals. */
  readonly maxErrorOverScale: number;
  /** Square root of the mean of `(x' - x)^2`; 0 without originals. */
  readonly rmsError: number;
}

/** What packing did to a layer. */
export interface KvMeasurement extends KvPair<KvPartMeasurement> {
  /** Blocks stored as they are, for a NaN or an infinity. */
  readonly rawBlocks: number;
  /** Blocks whose tokens are in another order. */
  readonly orderedBlocks: number;
  /** Bytes of keys and values. */
  readonly originalBytes: number;
  /** Bytes of the records and the tail: all that unpacking needs, but for a few of description. */
  readonly trueBytes: number;
}

/**
 * Measures a packed layer; with the original tensors also its errors.
 *
 * Throws `corrupt` if a record is malformed, `invalid-argument` if the originals
 * have another type or shape.
 *
 * @example
 * ```ts
 * import { Device, type KvTensor, measureKv, packKv } from "@packhorse/packhorse";
 * import { assert } from "@std/assert";
 *
 * using device = Device.open();
 * const data = new Uint8Array(Float16Array.from({ length: 4096 }, (_, i) => Math.sin(i)).buffer);
 * const tensor: KvTensor = { dtype: "f16", shape: [1, 64, 64], data };
 * const packed = await packKv(device, { keys: tensor, values: tensor });
 * const { keys, values } = await measureKv(device, packed, { keys: tensor, values: tensor });
 * assert(keys.bits < 5 && values.bits < keys.bits);
 * assert(keys.maxErrorOverScale <= 0.5001);
 * ```
 */
export async function measureKv(
  device: Device,
  packed: PackedKv,
  originals?: KvPair<KvTensor>,
): Promise<KvMeasurement> {
  const { codec, layout, records } = checkPacked(packed);
  const original = originals && checkPair(originals);
  if (original && describe(original.layout) !== describe(layout)) {
    throw new PackhorseError(
      "invalid-argument",
      `Cannot compare: the packed cache is ${describe(layout)}, ` +
        `the originals are ${describe(original.layout)}`,
    );
  }
  const tokens = (packed.offsets.length - 1) * BLOCK_TOKENS;
  const statistics = new StatisticsSum();
  if (tokens > 0) {
    const blockLayout = withTokens(layout, tokens);
    using resident = await ResidentRecords.upload(device, { codec, layout: blockLayout }, records);
    using blocks = original && await ResidentBlocks.upload(device, blockLayout, {
      keys: sliceTokens(original.bytes.keys, layout, 0, tokens),
      values: sliceTokens(original.bytes.values, layout, 0, tokens),
    });
    const measured = await resident.measure(blocks);
    if (measured instanceof MalformedBlock) throw malformedError(measured.block);
    statistics.add(measured);
  }
  return {
    ...statistics.measurement(codec.pack),
    originalBytes: 2 * tensorByteLength(layout),
    trueBytes: packed.records.byteLength + packed.tail.byteLength,
  };
}

/** Statistics of records that were made here. */
export async function statisticsOf(
  records: ResidentRecords,
  originals: ResidentBlocks,
): Promise<BlockStatistics> {
  const measured = await records.measure(originals);
  if (!(measured instanceof MalformedBlock)) return measured;
  const message = `The encoder wrote a record of block ${measured.block} that cannot be read`;
  throw new PackhorseError("internal", message);
}

function describe({ dtype, shape }: { dtype: string; shape: readonly number[] }): string {
  return `${dtype} [${shape.join(", ")}]`;
}

/** Statistics of blocks, added up. */
export class StatisticsSum {
  #bytes = 0;
  #rawBlocks = 0;
  #orderedBlocks = 0;
  readonly #parts = PARTS.map(() => ({
    payloadBits: 0,
    packs: 0,
    widths: new Array<number>(9).fill(0),
    codeMask: new Uint32Array(8),
    maxError: 0,
    maxErrorOverScale: 0,
    squaredError: 0,
    compared: 0,
  }));

  add(statistics: BlockStatistics): void {
    this.#bytes += statistics.bytes;
    this.#rawBlocks += statistics.raw_blocks;
    this.#orderedBlocks += statistics.ordered_blocks;
    this.#parts.forEach((sum, part) => {
      sum.payloadBits += statistics.payload_bits[part]!;
      sum.packs += statistics.packs[part]!;
      sum.widths.forEach((_, width) => sum.widths[width]! += statistics.widths[9 * part + width]!);
      sum.codeMask.forEach((_, i) => sum.codeMask[i]! |= statistics.code_mask[8 * part + i]!);
      sum.maxError = Math.max(sum.maxError, statistics.max_error[part]!);
      sum.maxErrorOverScale = Math.max(
        sum.maxErrorOverScale,
        statistics.max_error_over_scale[part]!,
      );
      sum.squaredError += statistics.squared_error[part]!;
      sum.compared += statistics.compared[part]!;
    });
  }

  /** Bytes of the records. */
  get recordsByteLength(): number {
    return this.#bytes;
  }

  /** All of it, for packs of `pack` tokens. */
  measurement(
    pack: KvPack,
  ): KvPair<KvPartMeasurement> & { rawBlocks: number; orderedBlocks: number } {
    const [keys, values] = this.#parts.map((sum): KvPartMeasurement => {
      const distinctCodes = countBits(sum.codeMask);
      const minimumBits = bitWidth(distinctCodes - 1);
      const formulaBits = sum.payloadBits + sum.packs * (minimumBits + bitWidth(minimumBits));
      return {
        bits: sum.packs === 0 ? 0 : formulaBits / (sum.packs * pack),
        payloadBits: sum.payloadBits,
        distinctCodes,
        widths: sum.widths,
        maxError: sum.maxError,
        maxErrorOverScale: sum.maxErrorOverScale,
        rmsError: sum.compared === 0 ? 0 : Math.sqrt(sum.squaredError / sum.compared),
      };
    });
    return {
      keys: keys!,
      values: values!,
      rawBlocks: this.#rawBlocks,
      orderedBlocks: this.#orderedBlocks,
    };
  }
}

/** Bits that hold 0 to `largest`: ceil(log2(largest + 1)). */
function bitWidth(largest: number): number {
  return largest <= 0 ? 0 : 32 - Math.clz32(largest);
}

function countBits(words: Uint32Array): number {
  let count = 0;
  for (let word of words) {
    for (; word !== 0; word &= word - 1) count++;
  }
  return count;
}
