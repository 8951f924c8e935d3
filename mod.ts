/**
 * Packhorse keeps the key/value cache of a language model small: it packs the cache into a few bits
 * per value, on the CPU or the GPU, within an error bound that you set.
 *
 * Importing this module loads no native library; {@linkcode Device.open} does.
 *
 * @module
 */
export * from "./src/error.ts";
export * from "./src/dtype.ts";
export * from "./src/device/mod.ts";
export * from "./src/kv/mod.ts";
export * from "./src/io/mod.ts";
export * from "./src/llm/mod.ts";
export * from "./src/ot/mod.ts";
export * from "./src/graph/mod.ts";
