import { planCache } from "../../ffi/kv_cache.ts";
import { type Device, nativeOf } from "../device/device.ts";
import { PackhorseError } from "../error.ts";
import { KvCache } from "./cache.ts";
import { CacheFile, type CacheLayer } from "./cache_file.ts";
import {
  type KvCacheCodec,
  type KvCacheDType,
  type KvCachePartCodec,
  nativeCacheConfig,
  resolveCacheOptions,
} from "./cache_options.ts";
import { BLOCK_TOKENS } from "./codec.ts";
import type { KvCacheFileOptions } from "./file_options.ts";
import { ProgressCount } from "./progress.ts";
import { type KvPair, type KvPart, PARTS, tensorByteLength } from "./tensor.ts";

/** Options of {@linkcode measureKvCacheWidths}. */
export interface MeasureKvCacheWidthsOptions extends Omit<KvCacheFileOptions, "chunkBytes"> {
  /** How tokens are packed. */
  readonly codec: KvCacheCodec;
}

/** What {@linkcode measureKvCacheWidths} finds. */
export interface KvCacheWidths extends KvPair<number> {
  /** Layers of the file. */
  readonly layers: number;
  /** Tokens of all layers that were packed. */
  readonly tokens: number;
}

const SINKS = 4;
const RESIDUAL = 8;
const STEP_TOKENS = 1024;
/** What the part that is not measured is packed to: always the same bytes. */
const PLAIN: KvCachePartCodec = { quantizer: "fixed", bits: 1 };

/**
 * Measures how many bits per value the residuals of a codec's packed blocks take on real data, beside what blocks take
 * in any case: appends every layer of a cache in a `.safetensors` file to a {@linkcode KvCache} and counts its bytes.
 * {@linkcode planKvCache} plans other models with it. 0 for a codec whose sizes don't depend on the data.
 *
 * Throws as {@linkcode packKvFile} and {@linkcode KvCache.create}; `unsupported` also for a file with f32 or too few
 * tokens to pack a block, `non-finite` if a packed value is.
 *
 * @example
 * ```ts
 * import { Device, measureKvCacheWidths, parseCacheCodec } from "@packhorse/packhorse";
 * import { assert } from "@std/assert";
 *
 * using device = Device.open();
 * const input = "tests/fixtures/tiny/kv.safetensors";
 * const widths = await measureKvCacheWidths(device, { input, codec: parseCacheCodec("packkv") });
 * assert(widths.keys > 1 && widths.keys < 4);
 * ```
 */
export async function measureKvCacheWidths(
  device: Device,
  options: MeasureKvCacheWidthsOptions,
): Promise<KvCacheWidths> {
  using file = await CacheFile.open(options);
  const progress = new ProgressCount(PARTS.length * file.byteLength, options);
  const payload = { keys: 0, values: 0 };
  const count = { keys: 0, values: 0 };
  let tokens = 0;
  for (const layer of file.layers) {
    for (const part of PARTS) {
      const codec = { keys: PLAIN, values: PLAIN, [part]: options.codec[part] };
      const found = await measureLayer(device, { file, layer, part, codec });
      payload[part] += found.payloadBits;
      count[part] += found.values;
      if (part === "keys") tokens += found.tokens;
      progress.advance(2 * tensorByteLength(layer.layout));
    }
  }
  return {
    keys: payload.keys / count.keys,
    values: payload.values / count.values,
    layers: file.layers.length,
    tokens,
  };
}

/** Bits that one part of a layer takes beyond what its blocks take in any case. */
async function measureLayer(
  device: Device,
  { file, layer, part, codec }: {
    file: CacheFile;
    layer: CacheLayer;
    part: KvPart;
    codec: KvCacheCodec;
  },
): Promise<{ payloadBits: number; values: number; tokens: number }> {
  const { dtype, shape: [kvHeads, tokens, headDim] } = layer.layout;
  const least = SINKS + RESIDUAL + BLOCK_TOKENS;
  const unsupported = dtype === "f32"
    ? "it is f32, and a cache holds f16 or bf16"
    : tokens < least
    ? `it has ${tokens} tokens, and measuring takes ${least} or more`
    : undefined;
  if (unsupported !== undefined) {
    const message = `Cannot measure ${layer.names[part]} of ${file.path}: ${unsupported}`;
    throw new PackhorseError("unsupported", message);
  }
  const shape = { layers: 1, queryHeads: kvHeads, kvHeads, headDim, dtype: dtype as KvCacheDType };
  const config = resolveCacheOptions({
    ...shape,
    sequences: 1,
    tokens,
    stepTokens: STEP_TOKENS,
    poolBytes: 2 ** 16,
    residual: RESIDUAL,
    sinks: SINKS,
    codec,
  });
  const plan = planCache(nativeOf(device).library, { ...nativeCacheConfig(config), layers: 1 });
  const block = plan.blockBytes[0]!;
  const poolBytes = block.most * Math.ceil(tokens / BLOCK_TOKENS) + 2 ** 17;
  using cache = KvCache.create(device, { ...config, poolBytes, codec });
  const sequence = cache.add();
  for (let first = 0; first < tokens; first += STEP_TOKENS) {
    const last = Math.min(first + STEP_TOKENS, tokens);
    const bytes = await file.read(layer, first, last);
    const step = cache.begin([{ sequence, tokens: last - first }]);
    using keys = uploadTokens(device, shape, bytes.keys);
    using values = uploadTokens(device, shape, bytes.values);
    step.append(0, keys, values);
  }
  cache.check();
  const { packedBytes, packedTokens } = cache.statistics();
  return {
    payloadBits: 8 * (packedBytes - packedTokens / BLOCK_TOKENS * block.least),
    values: packedTokens * kvHeads * headDim,
    tokens: packedTokens,
  };
}

/** 16-bit values `[heads, tokens, headDim]` as a buffer `[tokens, heads, headDim]`. */
function uploadTokens(
  device: Device,
  { kvHeads, headDim, dtype }: { kvHeads: number; headDim: number; dtype: KvCacheDType },
  bytes: Uint8Array<ArrayBuffer>,
) {
  const source = new Uint16Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 2);
  const tokens = source.length / (kvHeads * headDim);
  const target = new Uint16Array(source.length);
  for (let head = 0; head < kvHeads; head++) {
    for (let token = 0; token < tokens; token++) {
      const from = (head * tokens + token) * headDim;
      target.set(source.subarray(from, from + headDim), (token * kvHeads + head) * headDim);
    }
  }
  const buffer = device.createBuffer(dtype, target.length);
  buffer.upload(target);
  return buffer;
}
