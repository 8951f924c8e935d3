/**
 * Files: `.safetensors` and `.npy` tensors, and the `.phkv` container of packed
 * key/value caches. Readers treat files as untrusted and read ranges of them;
 * writers leave a complete file or none.
 *
 * @module
 */
export { AtomicFile, type AtomicFileOptions } from "./atomic_file.ts";
export { type NpyArray, type NpyNumbers, readNpy } from "./npy.ts";
export { writeNpy, type WriteNpyOptions } from "./npy_writer.ts";
export { readNpz } from "./npz.ts";
export {
  BLOCK_TOKENS,
  type PhkvDescription,
  type PhkvLayer,
  type PhkvLayout,
} from "./phkv_format.ts";
export {
  type PhkvBlocks,
  PhkvReader,
  type PhkvReaderOptions,
  type PhkvStoredLayer,
} from "./phkv_reader.ts";
export { PhkvWriter, type PhkvWriterOptions } from "./phkv_writer.ts";
export type { TensorInfo } from "./safetensors_format.ts";
export { SafetensorsReader } from "./safetensors_reader.ts";
export { SafetensorsWriter, type SafetensorsWriterOptions } from "./safetensors_writer.ts";
