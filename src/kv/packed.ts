import { PackhorseError } from "../error.ts";
import type { KvRecords } from "./blocks.ts";
import { BLOCK_TOKENS, type KvCodec, resolveCodec } from "./codec.ts";
import {
  checkedBytes,
  checkLayout,
  type KvDType,
  type KvLayout,
  type KvShape,
  tensorByteLength,
  withTokens,
} from "./tensor.ts";
import { fixedBytes } from "../device/host_array.ts";

/** A packed layer: all that {@linkcode unpackKv} needs. A plain object, to be stored or sent as it is. */
export interface PackedKv {
  /** How it was packed. */
  readonly codec: KvCodec;
  /** Type of keys and values. */
  readonly dtype: KvDType;
  /** Shape of the keys, and of the values. */
  readonly shape: KvShape;
  /** One record per block of 64 tokens, one after another, as `packhorse.h` defines them. */
  readonly records: Uint8Array;
  /** Record `i` goes from byte `offsets[i]` to `offsets[i + 1]`. */
  readonly offsets: BigUint64Array;
  /** The tokens after the last block as they were: the keys `[heads, tokens - 64 * blocks, headDim]`, then the values. */
  readonly tail: Uint8Array;
}

/** The parts of a packed layer, once they are found to fit together. Throws `invalid-argument`. */
export function checkPacked(
  packed: PackedKv,
): { codec: KvCodec; layout: KvLayout; records: KvRecords; tail: Uint8Array<ArrayBuffer> } {
  const { dtype, shape } = packed;
  const codec = resolveCodec(packed.codec);
  const layout: KvLayout = { dtype, shape };
  checkLayout(layout);
  const blocks = packed.offsets.length - 1;
  const tailTokens = shape[1] - blocks * BLOCK_TOKENS;
  if (blocks < 0 || tailTokens < 0) {
    throw new PackhorseError(
      "invalid-argument",
      `Cannot use this packed cache: offsets has ${packed.offsets.length} elements, ` +
        `but ${shape[1]} tokens have at most ${Math.floor(shape[1] / BLOCK_TOKENS)} blocks`,
    );
  }
  const offsets = fixedBytes(packed.offsets, "Cannot use offsets");
  return {
    codec,
    layout,
    records: {
      records: fixedBytes(packed.records, "Cannot use records"),
      offsets: new BigUint64Array(offsets.buffer, offsets.byteOffset, blocks + 1),
    },
    tail: checkedBytes(packed.tail, 2 * tensorByteLength(withTokens(layout, tailTokens)), "tail"),
  };
}
