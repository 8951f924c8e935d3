import type { KvCodecOptions } from "./codec.ts";

/** Options of everything that works through a file. */
export interface KvFileOptions {
  /** The file to read. */
  readonly input: string;
  /** Called with the bytes of keys and values that are done, and with those there are. */
  readonly onProgress?: ((done: number, total: number) => void) | undefined;
  /** When it aborts, work stops at the next chunk, no output is left, and its reason is thrown. */
  readonly signal?: AbortSignal | undefined;
  /** Most bytes of keys and values that are in memory at once, though at least a block. Default: 256 MiB. */
  readonly chunkBytes?: number | undefined;
}

/** Options of what reads a cache from a `.safetensors` file. */
export interface KvCacheFileOptions extends KvFileOptions {
  /** Names of the tensors of keys, with `<n>` for the layer's number. Default: `layers.<n>.key`. */
  readonly keyPattern?: string | undefined;
  /** Names of the tensors of values, likewise. Default: `layers.<n>.value`. */
  readonly valuePattern?: string | undefined;
}

/** Options of {@linkcode packKvFile}. */
export interface PackKvFileOptions extends KvCacheFileOptions {
  /** The `.phkv` file to write. */
  readonly output: string;
  /** How to pack. */
  readonly codec?: KvCodecOptions | undefined;
}

/** Options of {@linkcode unpackKvFile}. */
export interface UnpackKvFileOptions extends KvFileOptions {
  /** The `.safetensors` file to write. */
  readonly output: string;
  /** Whether to restore what is intact of a damaged file, with zeros for the rest. Default: false. */
  readonly recover?: boolean | undefined;
}
