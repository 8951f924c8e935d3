/**
 * The key/value cache: packing, unpacking and measuring layers and files, and a cache that grows and is read by
 * attention as it is.
 *
 * @module
 */
export { benchKvCache, type BenchKvCacheOptions, type KvCacheBench } from "./bench_cache.ts";
export {
  KvCache,
  type KvCacheStatistics,
  type KvReadOptions,
  type KvSequence,
  type KvStepPart,
} from "./cache.ts";
export { parseCacheCodec } from "./cache_codec.ts";
export {
  type KvCacheCodec,
  type KvCacheConfig,
  type KvCacheDType,
  type KvCacheOptions,
  type KvCachePartCodec,
  type KvQueryDType,
  splitsToFill,
} from "./cache_options.ts";
export type { KvAttendOptions, KvCacheStep, KvPrefillTensors } from "./cache_step.ts";
export type { KvStepGraph } from "./step_graph.ts";
export {
  type KvBits,
  type KvCodec,
  type KvCodecOptions,
  type KvGrouping,
  type KvPack,
  type KvQuantizer,
  type KvRepack,
} from "./codec.ts";
export {
  checkDecodeStatus,
  createKvBuffers,
  decodeKv,
  encodeKv,
  type KvPlan,
  type KvRecordBuffers,
  type KvTensorBuffers,
  planKv,
  readEncodeStatus,
} from "./device_steps.ts";
export type {
  KvCacheFileOptions,
  KvFileOptions,
  PackKvFileOptions,
  UnpackKvFileOptions,
} from "./file_options.ts";
export type {
  KvFileReport,
  KvLayerReport,
  KvSequenceFileReport,
  KvSequenceLayerReport,
} from "./file_report.ts";
export { inspectKvFile } from "./inspect_file.ts";
export {
  type KvCacheWidths,
  measureKvCacheWidths,
  type MeasureKvCacheWidthsOptions,
} from "./measure_widths.ts";
export { type KvModel, type KvModelWeights, readModelConfig } from "./model_config.ts";
export {
  type KvCachePlan,
  type KvCachePlanBytes,
  type KvCachePlanOptions,
  type KvCachePlanTime,
  planKvCache,
} from "./plan_cache.ts";
export { type KvMeasurement, type KvPartMeasurement, measureKv } from "./measure.ts";
export { packKv, unpackKv } from "./pack.ts";
export { packKvFile } from "./pack_file.ts";
export type { PackedKv } from "./packed.ts";
export {
  dequantizeKv,
  type KvCodes,
  packCodes,
  type QuantizedKv,
  quantizeKv,
  repackKv,
  unpackCodes,
} from "./steps.ts";
export type { KvSequenceFileOptions } from "./sequence_file.ts";
export { type KvSweepRow, sweepKvFile, type SweepKvFileOptions } from "./sweep_file.ts";
export type { KvDType, KvLayout, KvPair, KvPart, KvShape, KvTensor } from "./tensor.ts";
export { unpackKvFile, type UnpackKvFileReport } from "./unpack_file.ts";
