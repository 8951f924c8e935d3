/** {@linkcode KvCache.score} and {@linkcode KvCache.weigh}: what their buffers must be, then the native calls. */
import { type DeviceBuffer, regionOn } from "../device/device_buffer.ts";
import { PackhorseError } from "../error.ts";
import type { KvCacheDType } from "./cache_options.ts";
import {
  checkApart,
  checkScale,
  type KvAttendOptions,
  type StepOwner,
  type StepTensor,
} from "./cache_step.ts";

/** One layer of a sequence, by its number. */
interface Place {
  readonly layer: number;
  readonly sequence: number;
}

/** Enqueues `out = scale * queries . keys`. */
export function scoreTokens(
  owner: StepOwner,
  { layer, sequence }: Place,
  buffers: { readonly queries: DeviceBuffer<KvCacheDType>; readonly out: DeviceBuffer<"f32"> },
  { scale = 1 / Math.sqrt(owner.config.headDim) }: KvAttendOptions,
): void {
  const { native, config: { dtype, headDim } } = owner;
  checkScale(scale, "score");
  const length = lengthOf(owner, sequence, "score");
  const queries = tensorOf(owner, "score: queries", buffers.queries, {
    dtype,
    columns: { headDim },
  });
  const out = tensorOf(owner, "score: out", buffers.out, { dtype: "f32", columns: { length } });
  checkApart("score", { queries }, out);
  native.score(layer, sequence, { queries, out, scale });
}

/** Enqueues `out = weights . values`. */
export function weighTokens(
  owner: StepOwner,
  { layer, sequence }: Place,
  buffers: { readonly weights: DeviceBuffer<"f32">; readonly out: DeviceBuffer<"f32"> },
): void {
  const { native, config: { headDim } } = owner;
  const length = lengthOf(owner, sequence, "weigh");
  const dtype = "f32";
  const weights = tensorOf(owner, "weigh: weights", buffers.weights, {
    dtype,
    columns: { length },
  });
  const out = tensorOf(owner, "weigh: out", buffers.out, { dtype, columns: { headDim } });
  checkApart("weigh", { weights }, out);
  native.weigh(layer, sequence, { weights, out });
}

/** Tokens of a sequence. Throws `invalid-argument` if there are none. */
function lengthOf({ native }: StepOwner, sequence: number, action: string): number {
  return native.length(sequence) ||
    refuse(`Cannot ${action} the tokens of sequence ${sequence}: it has none`);
}

/** The tensor [queryHeads, columns] that fills a buffer. Throws `invalid-argument` if it cannot. */
function tensorOf(
  { device, config: { queryHeads } }: StepOwner,
  name: string,
  buffer: DeviceBuffer<KvCacheDType | "f32">,
  { dtype, columns }: {
    readonly dtype: KvCacheDType | "f32";
    /** How many, by what they are. */
    readonly columns: Readonly<Record<string, number>>;
  },
): StepTensor {
  const [[what, count]] = Object.entries(columns) as [[string, number]];
  if (buffer.dtype !== dtype || buffer.length !== queryHeads * count) {
    refuse(
      `Cannot ${name} must be [${queryHeads}, ${count}] (queryHeads, ${what}) of ${dtype}; the buffer is ` +
        `${buffer.length} elements of ${buffer.dtype}`,
    );
  }
  if (buffer.byteOffset % 16 !== 0) {
    refuse(`Cannot ${name} must start at a multiple of 16 bytes, not at ${buffer.byteOffset}`);
  }
  return { ...regionOn(buffer, device), byteLength: buffer.byteLength };
}

function refuse(message: string): never {
  throw new PackhorseError("invalid-argument", message);
}
