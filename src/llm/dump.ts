import { PackhorseError } from "../error.ts";
import { SafetensorsWriter } from "../io/safetensors_writer.ts";
import type { KvCacheDType } from "../kv/cache_options.ts";
import { ProgressCount } from "../kv/progress.ts";
import { type KvPart, PARTS } from "../kv/tensor.ts";
import { encodePrompt, type Prompt } from "./generate.ts";
import type { ModelParts } from "./language_model.ts";
import { ModelRunner } from "./runner.ts";
import { createWindowCache, RAW16 } from "./window_cache.ts";

/** Options of {@linkcode LanguageModel.dump}. */
export interface DumpOptions {
  /** How many tokens from the beginning of the text. Default: all. */
  readonly tokens?: number | undefined;
  /** Numbers of the layers to write. Default: all. */
  readonly layers?: readonly number[] | undefined;
  /** Whether the text gets the tokens that the model's texts begin with. Default: false, as in evaluation. */
  readonly specialTokens?: boolean | undefined;
  /** Called with the tokens that are done, and how many there are. */
  readonly onProgress?: ((done: number, total: number) => void) | undefined;
  /** Stops the work; then there is no file. */
  readonly signal?: AbortSignal | undefined;
}

/** What {@linkcode LanguageModel.dump} wrote. */
export interface DumpReport {
  /** Tokens of each layer. */
  readonly tokens: number;
  /** Numbers of the layers. */
  readonly layers: readonly number[];
  /** Heads of the keys and values. */
  readonly kvHeads: number;
  /** Channels of a head. */
  readonly headDim: number;
  /** Type of the tensors. */
  readonly dtype: KvCacheDType;
  /** Bytes of all keys and values. */
  readonly byteLength: number;
}

/** Tokens that are computed at once. */
const STEP_TOKENS = 512;
const NAMES = { keys: "key", values: "value" } as const;
/** Bits that are all set in what is no finite number. */
const EXPONENT = { f16: 0x7c00, bf16: 0x7f80 } as const;

/** {@linkcode LanguageModel.dump}. */
export async function dumpCache(
  parts: ModelParts,
  { text, output }: { readonly text: Prompt; readonly output: string },
  options: DumpOptions,
): Promise<DumpReport> {
  const { device, config, weights, turns } = parts;
  const { kvHeads, headDim } = config;
  const { dtype, queryDType } = parts.cache.config;
  const ids = encodePrompt(parts, text, options.specialTokens ?? false);
  const { tokens = ids.length, signal } = options;
  const { layers = Array.from({ length: config.layers }, (_, layer) => layer) } = options;
  if (!(Number.isSafeInteger(tokens) && tokens >= 1 && tokens <= config.contextLimit)) {
    refuse(`tokens must be from 1 to the model's ${config.contextLimit}, got ${tokens}`);
  }
  if (ids.length < tokens) refuse(`the text has ${ids.length} tokens, fewer than ${tokens}`);
  if (layers.length === 0) refuse("there is no layer to write");
  layers.forEach((layer, i) => {
    if (!(Number.isInteger(layer) && layer >= 0 && layer < config.layers)) {
      refuse(`layers must be from 0 to ${config.layers - 1}, got ${layer}`);
    }
    if (layers.indexOf(layer) !== i) refuse(`layer ${layer} is given twice`);
  });
  const progress = new ProgressCount(tokens, options);
  const rowBytes = 2 * headDim;
  const layerBytes = tokens * kvHeads * rowBytes;

  using stack = new DisposableStack();
  const nameOf = (layer: number, part: KvPart) => `layers.${layer}.${NAMES[part]}`;
  const writer = stack.use(
    await SafetensorsWriter.create(output, {
      tensors: layers.flatMap((layer) =>
        PARTS.map((part) => ({
          name: nameOf(layer, part),
          dtype,
          shape: [kvHeads, tokens, headDim],
        }))
      ),
      metadata: {
        tokens: String(tokens),
        layout: "[kv_heads, tokens, head_dim], keys after RoPE",
      },
      signal,
    }),
  );
  const stepTokens = Math.min(STEP_TOKENS, tokens);
  const cache = stack.use(createWindowCache(parts, RAW16, { tokens, stepTokens }));
  const limits = { stepTokens, logitRows: 1, tokens, cacheDType: dtype, queryDType };
  const runner = stack.use(new ModelRunner(device, config, weights, limits));
  const sequence = cache.add();
  for (let first = 0; first < tokens; first += stepTokens) {
    const rows = Math.min(stepTokens, tokens - first);
    const slices: { layer: number; part: KvPart; bytes: Uint8Array }[] = [];
    await turns.take(async () => {
      const step = cache.begin([{ sequence, tokens: rows }]);
      runner.tokens(rows).upload(Int32Array.from(ids.slice(first, first + rows)));
      runner.positions(rows).upload(Int32Array.from({ length: rows }, (_, i) => first + i));
      runner.forward(step, {
        attention: "prefill",
        restore(layer, keys, values) { // sees what the cache gets, and leaves it
          if (!layers.includes(layer)) return;
          for (const [part, buffer] of [["keys", keys], ["values", values]] as const) {
            slices.push({ layer, part, bytes: buffer.download(new Uint8Array(buffer.byteLength)) });
          }
        },
      });
      await device.synchronize(); // so that an abort is heard
    });
    for (const { layer, part, bytes } of slices) {
      checkFinite(bytes, { dtype, what: `a ${NAMES[part]} of layer ${layer}` });
      for (let head = 0; head < kvHeads; head++) {
        const slice = headOf(bytes, { head, rows, rowBytes, heads: kvHeads });
        await writer.writeAt(nameOf(layer, part), slice, (head * tokens + first) * rowBytes);
      }
    }
    progress.advance(rows);
  }
  await writer.commit();
  return { tokens, layers, kvHeads, headDim, dtype, byteLength: 2 * layers.length * layerBytes };
}

/** Rows of one head of `[rows, heads, …]`. */
function headOf(
  bytes: Uint8Array,
  { head, rows, rowBytes, heads }: { head: number; rows: number; rowBytes: number; heads: number },
): Uint8Array {
  const slice = new Uint8Array(rows * rowBytes);
  for (let row = 0; row < rows; row++) {
    const from = (row * heads + head) * rowBytes;
    slice.set(bytes.subarray(from, from + rowBytes), row * rowBytes);
  }
  return slice;
}

function checkFinite(
  bytes: Uint8Array<ArrayBufferLike>,
  { dtype, what }: { dtype: KvCacheDType; what: string },
): void {
  const mask = EXPONENT[dtype];
  const bits = new Uint16Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 2);
  if (!bits.some((each) => (each & mask) === mask)) return;
  const message = `Cannot dump the cache: ${what} is not finite; is it beyond what ${dtype} holds?`;
  throw new PackhorseError("non-finite", message);
}

function refuse(reason: string): never {
  throw new PackhorseError("invalid-argument", `Cannot dump the cache: ${reason}`);
}
