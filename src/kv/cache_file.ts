import type { Device } from "../device/device.ts";
import { PackhorseError } from "../error.ts";
import type { PhkvLayer } from "../io/phkv_format.ts";
import { SafetensorsReader } from "../io/safetensors_reader.ts";
import { ResidentBlocks } from "./blocks.ts";
import type { Chunk } from "./chunks.ts";
import { BLOCK_TOKENS, type KvCodec } from "./codec.ts";
import { packedTokens } from "./pack.ts";
import type { KvCacheFileOptions } from "./file_options.ts";
import {
  checkLayout,
  type KvDType,
  type KvLayout,
  type KvPair,
  type KvShape,
  rowByteLength,
  tensorByteLength,
  withTokens,
} from "./tensor.ts";

/** A layer of a cache in a `.safetensors` file. */
export interface CacheLayer {
  /** "layers.0" */
  readonly layer: string;
  readonly layout: KvLayout;
  /** Names of its tensors. */
  readonly names: KvPair<string>;
}

/** A `.safetensors` file that holds the keys and values of layers, and nothing else. */
export class CacheFile implements Disposable {
  readonly path: string;
  /** By number. */
  readonly layers: readonly CacheLayer[];
  readonly metadata: Readonly<Record<string, string>>;
  readonly #reader: SafetensorsReader;

  private constructor(reader: SafetensorsReader, layers: readonly CacheLayer[]) {
    this.path = reader.path;
    this.layers = layers;
    this.metadata = reader.metadata;
    this.#reader = reader;
  }

  /**
   * Finds the layers.
   *
   * Throws `not-found` if there are none, or a key lacks its value; `unsupported` if
   * tensors are not `[heads, tokens, headDim]` of a float type, or are neither keys
   * nor values; otherwise as {@linkcode SafetensorsReader.open}.
   */
  static async open(options: Omit<KvCacheFileOptions, "onProgress">): Promise<CacheFile> {
    const { input, keyPattern = "layers.<n>.key", valuePattern = "layers.<n>.value" } = options;
    using stack = new DisposableStack();
    const reader = stack.use(await SafetensorsReader.open(input));
    const layers = findLayers(reader, { keys: keyPattern, values: valuePattern });
    stack.move();
    return new CacheFile(reader, layers);
  }

  /** Bytes of all keys and values. */
  get byteLength(): number {
    return this.layers.reduce((sum, { layout }) => sum + 2 * tensorByteLength(layout), 0);
  }

  /** Keys and values of the tokens `[first, last)` of a layer. */
  async read(
    { layout, names }: CacheLayer,
    first: number,
    last: number,
  ): Promise<KvPair<Uint8Array<ArrayBuffer>>> {
    const { shape: [heads, tokens] } = layout;
    const row = rowByteLength(layout);
    const headBytes = (last - first) * row;
    const read = async (name: string) => {
      const bytes = new Uint8Array(tensorByteLength(withTokens(layout, last - first)));
      for (let head = 0; head < heads && headBytes > 0; head++) {
        const target = bytes.subarray(head * headBytes, (head + 1) * headBytes);
        await this.#reader.readInto(name, target, (head * tokens + first) * row);
      }
      return bytes;
    };
    return { keys: await read(names.keys), values: await read(names.values) };
  }

  [Symbol.dispose](): void {
    this.#reader[Symbol.dispose]();
  }
}

/** The layer as a packed file describes it. */
export function phkvLayer({ layer, names, layout }: CacheLayer, codec: KvCodec): PhkvLayer {
  const { dtype, shape: [heads, tokens, headDim] } = layout;
  return {
    layer,
    keyName: names.keys,
    valueName: names.values,
    dtype,
    heads,
    tokens,
    headDim,
    blocks: packedTokens(codec, tokens) / BLOCK_TOKENS,
  };
}

/** Keys and values of a chunk of a layer in the memory of a device. */
export async function uploadChunk(
  device: Device,
  { cache, layer }: { cache: CacheFile; layer: CacheLayer },
  { firstBlock, blocks }: Chunk,
): Promise<ResidentBlocks> {
  const first = firstBlock * BLOCK_TOKENS;
  const tokens = blocks * BLOCK_TOKENS;
  const bytes = await cache.read(layer, first, first + tokens);
  return await ResidentBlocks.upload(device, withTokens(layer.layout, tokens), bytes);
}

function findLayers(reader: SafetensorsReader, patterns: KvPair<string>): CacheLayer[] {
  const fail = (code: "not-found" | "unsupported", reason: string): never => {
    throw new PackhorseError(code, `Cannot use ${reader.path} as a cache: ${reason}`);
  };
  const [keys, values] = [patterns.keys, patterns.values].map((pattern) => {
    const expression = patternExpression(pattern);
    return new Map(
      [...reader.tensors.keys(), ...reader.unsupported.keys()].flatMap((name) => {
        const number = name.match(expression)?.[1];
        return number === undefined ? [] : [[number, name] as const];
      }),
    );
  }) as [Map<string, string>, Map<string, string>];
  if (keys.size === 0) fail("not-found", `it has no tensor named ${patterns.keys}`);
  for (const [number, name] of [...keys, ...values]) {
    const other = keys.has(number)
      ? values.has(number) ? undefined : patterns.values
      : patterns.keys;
    if (other !== undefined) {
      fail("not-found", `${name} is there, but not ${other.replace("<n>", number)}`);
    }
  }
  const known = new Set([...keys.values(), ...values.values()]);
  const stranger = [...reader.tensors.keys(), ...reader.unsupported.keys()]
    .find((name) => !known.has(name));
  if (stranger !== undefined) {
    const rule = `neither ${patterns.keys} nor ${patterns.values}; keep it in another file`;
    fail("unsupported", `its tensor ${JSON.stringify(stranger)} is ${rule}`);
  }
  return [...keys].sort(([a], [b]) => Number(a) - Number(b)).map(([number, name]) => {
    const names = { keys: name, values: values.get(number)! };
    const [key, value] = [reader.info(names.keys), reader.info(names.values)];
    const layout = { dtype: key.dtype as KvDType, shape: key.shape as unknown as KvShape };
    try {
      checkLayout(layout);
    } catch (error) {
      if (!(error instanceof PackhorseError)) throw error;
      fail("unsupported", `${name}: ${error.message}`);
    }
    if (key.dtype !== value.dtype || key.shape.join() !== value.shape.join()) {
      const [a, b] = [key, value].map(({ dtype, shape }) => `${dtype} [${shape.join(", ")}]`);
      fail("unsupported", `${names.keys} is ${a}, but ${names.values} is ${b}`);
    }
    return { layer: `layers.${number}`, layout, names };
  });
}

function patternExpression(pattern: string): RegExp {
  if (pattern.split("<n>").length !== 2) {
    const message = `Cannot find layers by ${JSON.stringify(pattern)}: ` +
      "a pattern must have <n> once, where the layer's number stands";
    throw new PackhorseError("invalid-argument", message);
  }
  const [before, after] = pattern.split("<n>").map((text) => RegExp.escape(text));
  return new RegExp(`^${before}(\\d+)${after}$`);
}
