import type { NativeKvCache } from "../../ffi/kv_cache.ts";
import type { AtomicFileOptions } from "../io/atomic_file.ts";
import { PackhorseError } from "../error.ts";
import { blockStart, leadingTokens, type PhkvLayer } from "../io/phkv_format.ts";
import { PhkvReader } from "../io/phkv_reader.ts";
import { PhkvWriter } from "../io/phkv_writer.ts";
import type { KvCacheConfig, KvCachePartCodec } from "./cache_options.ts";
import { BLOCK_TOKENS } from "./codec.ts";
import { layoutOf, malformedBlockError, savedConfig } from "./packed_file.ts";
import { ProgressCount } from "./progress.ts";
import { PARTS, tensorByteLength, withTokens } from "./tensor.ts";

/** Options of {@linkcode KvCache.save} and {@linkcode KvCache.load}. */
export interface KvSequenceFileOptions extends AtomicFileOptions {
  /** Called with the bytes of the file that are done, and with those there are, without headers. */
  readonly onProgress?: ((done: number, total: number) => void) | undefined;
}

interface SequenceCache {
  readonly native: NativeKvCache;
  readonly config: KvCacheConfig;
}

/** Writes a sequence, which must not change meanwhile, layer by layer. */
export async function saveSequence(
  { native, config }: SequenceCache,
  sequence: number,
  path: string,
  options: KvSequenceFileOptions,
): Promise<void> {
  const { kvHeads: heads, headDim, dtype, sinks, residual, codecs } = config;
  const { blocks, recordByteLengths } = native.measure(sequence, config.layers);
  const tokens = native.length(sequence);
  const layers = codecs.map((_, i): PhkvLayer => {
    const name = `layers.${i}`;
    const names = { layer: name, keyName: `${name}.key`, valueName: `${name}.value` };
    return { ...names, dtype, heads, tokens, headDim, blocks, sinks };
  });
  const tailBytes = tensorByteLength(
    withTokens(layoutOf(layers[0]!), tokens - blocks * BLOCK_TOKENS),
  );
  using writer = await PhkvWriter.create(path, {
    layout: "tiles",
    codec: { residual, layers: codecs },
    layers,
    signal: options.signal,
  });
  const total = recordByteLengths.reduce((sum, bytes) => sum + bytes + 2 * tailBytes, 0);
  const progress = new ProgressCount(total, options);
  for (const [layer, bytes] of recordByteLengths.entries()) {
    const records = new Uint8Array(bytes);
    const offsets = new BigUint64Array(blocks + 1);
    const recent = new Uint8Array(2 * tailBytes);
    native.exportLayer(sequence, layer, { records, offsets, recent });
    await writer.appendBlocks(layer, records, offsets);
    await writer.writeTail(layer, recent);
    progress.advance(records.byteLength + recent.byteLength);
  }
  await writer.commit();
}

/** Reads a sequence layer by layer, and returns its number. Whatever is thrown leaves the cache as it was. */
export async function loadSequence(
  { native, config }: SequenceCache,
  path: string,
  options: KvSequenceFileOptions,
): Promise<number> {
  using reader = await PhkvReader.open(path);
  if (reader.layout !== "tiles") {
    const message = `Cannot load ${path}: its layout is ${reader.layout}, expected tiles; ` +
      "unpackKvFile (packhorse kv unpack) restores its keys and values";
    throw new PackhorseError("unsupported", message);
  }
  checkFit(reader, config);
  const { layers } = reader;
  const { tokens, blocks } = layers[0]!;
  const recordByteLengths = layers.map(({ recordsByteLength }) => recordsByteLength);
  const total = layers.reduce(
    (sum, { recordsByteLength, tailByteLength }) => sum + recordsByteLength + tailByteLength,
    0,
  );
  const progress = new ProgressCount(total, options);
  const sequence = explained(
    path,
    () => native.beginImport({ tokens, blocks, recordByteLengths }),
  );
  try {
    for (const [index, layer] of layers.entries()) {
      const { records, offsets } = await reader.readBlocks(index);
      const recent = (await reader.readTail(index))!;
      // Before the last layer, with which the sequence is there.
      progress.advance(records.byteLength + recent.byteLength);
      const malformed = native.importLayer(sequence, index, { records, offsets, recent });
      if (malformed) throw malformedBlockError(reader, layer, malformed);
    }
  } catch (error) {
    if (!native.isClosed) native.remove(sequence);
    throw error;
  }
  return sequence;
}

/** Throws `invalid-argument` unless a cache of this configuration can hold the sequence as it is. */
function checkFit(reader: PhkvReader, config: KvCacheConfig): void {
  const saved = savedConfig(reader);
  const refuse = (reason: string): never => {
    throw new PackhorseError("invalid-argument", `Cannot load ${reader.path}: ${reason}`);
  };
  for (const name of ["layers", "kvHeads", "headDim", "dtype", "sinks"] as const) {
    if (saved[name] !== config[name]) {
      refuse(`its ${name} is ${saved[name]}, that of the cache ${config[name]}`);
    }
  }
  for (const [layer, codec] of saved.codecs.entries()) {
    for (const part of PARTS) {
      const [theirs, ours] = [codec[part], config.codecs[layer]![part]];
      // As the native library takes them: rel is a float32 there.
      if (describeCodec(theirs, Math.fround) === describeCodec(ours, Math.fround)) continue;
      refuse(
        `the codec of the ${part} of layer ${layer} is ${describeCodec(theirs)}, ` +
          `that of the cache ${describeCodec(ours)}`,
      );
    }
  }
  const [layer] = reader.layers;
  const { tokens, blocks } = layer!;
  if (tokens > config.tokens) {
    refuse(`it has ${tokens} tokens, the cache was created for ${config.tokens} of a sequence`);
  }
  // Packing them now would change what the sequence holds.
  const newest = tokens - (blocks > 0 ? blockStart(layer!, blocks) : leadingTokens(layer!));
  const least = newest - BLOCK_TOKENS + 1;
  if (config.residual < least) {
    refuse(
      `its newest ${newest} tokens are not packed, which takes a residual of ${least} or more; ` +
        `that of the cache is ${config.residual}`,
    );
  }
}

/** "packkv, rel 0.1" */
function describeCodec(
  { quantizer, ...options }: KvCachePartCodec,
  rounded = (value: number) => value,
): string {
  const words = Object.entries(options).sort(([a], [b]) => a < b ? -1 : 1).map(([name, value]) =>
    `${name} ${typeof value === "number" ? rounded(value) : JSON.stringify(value)}`
  );
  return [quantizer, ...words].join(", ");
}

/** Runs `work`; what it throws then says which file could not be loaded. */
function explained<T>(path: string, work: () => T): T {
  try {
    return work();
  } catch (error) {
    if (!(error instanceof PackhorseError) || error.code === "disposed") throw error;
    const message = `Cannot load ${path}: ${error.message}`;
    throw new PackhorseError(error.code, message, { cause: error });
  }
}
