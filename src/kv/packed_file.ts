import { PackhorseError } from "../error.ts";
import type { PhkvLayer } from "../io/phkv_format.ts";
import { PhkvReader } from "../io/phkv_reader.ts";
import { type KvCodec, type KvCodecOptions, resolveCodec } from "./codec.ts";
import type { KvLayout } from "./tensor.ts";

/** Opens a `.phkv` file whose records can be decoded here. Throws as {@linkcode PhkvReader.open}, and `unsupported`. */
export async function openPacked(
  path: string,
  options: { recover?: boolean | undefined } = {},
): Promise<{ reader: PhkvReader; codec: KvCodec }> {
  using stack = new DisposableStack();
  const reader = stack.use(await PhkvReader.open(path, options));
  if (reader.layout !== "packs") {
    const message = `Cannot read ${path}: its layout is ${reader.layout}, expected packs`;
    throw new PackhorseError("unsupported", message);
  }
  const codec = codecOf(reader);
  stack.move();
  return { reader, codec };
}

/** The layout of a layer's tensors. */
export function layoutOf({ dtype, heads, tokens, headDim }: PhkvLayer): KvLayout {
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
