import { PackhorseError } from "../error.ts";
import { blockLabel, type PhkvLayer } from "../io/phkv_format.ts";
import { PhkvReader } from "../io/phkv_reader.ts";
import { isCount, isObject } from "../io/untrusted_json.ts";
import { type KvCacheCodec, type KvCacheConfig, resolveCacheOptions } from "./cache_options.ts";
import type { MalformedBlock } from "./blocks.ts";
import { type KvCodec, type KvCodecOptions, resolveCodec } from "./codec.ts";
import type { KvLayout } from "./tensor.ts";

/** An open `.phkv` file, and what decodes its records. */
export type PackedFile =
  | { readonly reader: PhkvReader; readonly layout: "packs"; readonly codec: KvCodec }
  | { readonly reader: PhkvReader; readonly layout: "tiles"; readonly config: KvCacheConfig };

/** Opens a `.phkv` file. Throws as {@linkcode PhkvReader.open}, and `corrupt` if the codec is none. */
export async function openPacked(
  path: string,
  options: { recover?: boolean | undefined } = {},
): Promise<PackedFile> {
  using stack = new DisposableStack();
  const reader = stack.use(await PhkvReader.open(path, options));
  const { layout } = reader;
  const opened = layout === "packs"
    ? { reader, layout, codec: codecOf(reader) }
    : { reader, layout, config: savedConfig(reader) };
  stack.move();
  return opened;
}

/** The layout of a layer's tensors. */
export function layoutOf(
  { dtype, heads, tokens, headDim }: Pick<PhkvLayer, "dtype" | "heads" | "tokens" | "headDim">,
): KvLayout {
  return { dtype, shape: [heads, tokens, headDim] };
}

function codecOf({ path, codec }: PhkvReader): KvCodec {
  try {
    return resolveCodec(codec as KvCodecOptions);
  } catch (cause) {
    const message = `Cannot read ${path}: ${cause instanceof Error ? cause.message : cause}`;
    throw new PackhorseError("corrupt", message, { cause });
  }
}

/** A block that no encoder writes, though its checksum is right. */
export function malformedBlockError(
  { path }: { readonly path: string },
  layer: PhkvLayer,
  { block, reason }: MalformedBlock,
): PackhorseError {
  const message = `Cannot read ${path}: ${blockLabel(layer, block)} is not well formed`;
  return new PackhorseError("corrupt", reason === undefined ? message : `${message}: ${reason}`);
}

/** What a file of layout `tiles` was saved from: a cache of one sequence, and no more. Throws `corrupt`. */
export function savedConfig({ path, layers, codec }: PhkvReader): KvCacheConfig {
  const fail = (reason: string, cause?: unknown): never => {
    throw new PackhorseError("corrupt", `Cannot read ${path}: ${reason}`, { cause });
  };
  const [first] = layers;
  if (!first) return fail("it has no layers");
  const { heads, headDim, dtype, tokens, sinks = 0 } = first;
  for (const name of ["heads", "headDim", "dtype", "tokens", "blocks", "sinks"] as const) {
    const other = layers.find((layer) => layer[name] !== first[name]);
    if (other) {
      fail(`${name} of ${other.layer} is ${other[name]}, that of ${first.layer} ${first[name]}`);
    }
  }
  const { residual, layers: codecs } = codec;
  if (!isCount(residual)) return fail(`its residual is ${JSON.stringify(residual)}, not a count`);
  if (!Array.isArray(codecs) || codecs.length !== layers.length || !codecs.every(isObject)) {
    return fail(`its codec does not describe its ${layers.length} layers`);
  }
  try {
    return resolveCacheOptions({
      layers: layers.length,
      queryHeads: heads,
      kvHeads: heads,
      headDim,
      dtype: dtype as KvCacheConfig["dtype"],
      sequences: 1,
      tokens: Math.max(1, tokens),
      stepTokens: 1,
      poolBytes: 65_536,
      residual,
      sinks,
      codec: codecs as unknown as KvCacheCodec[],
    });
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    return fail(`it describes no kv cache (${reason})`, cause);
  }
}
