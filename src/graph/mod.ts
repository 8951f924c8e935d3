/**
 * Learning on objects that are seen as one graph or several: data sets, layers, training.
 *
 * @module
 */
export {
  type BatchOrderOptions,
  type GraphBatch,
  GraphBatches,
  type GraphBatchesOptions,
  type ViewBatch,
} from "./batch.ts";
export { type FusionKind, GraphClassifier, type GraphModelOptions } from "./classifier.ts";
export { align, type Alignment, type Correspondence, strongest } from "./align.ts";
export type { TransportGradient, TransportPenalty } from "./amosl_fusion.ts";
export {
  crossValidate,
  type CrossValidation,
  type CrossValidationOptions,
  type FoldResult,
} from "./cross_validate.ts";
export {
  evaluate,
  type GraphEvaluation,
  type GraphPredictions,
  predict,
  type PredictionOptions,
} from "./evaluate.ts";
export {
  type EpochReport,
  train,
  type TrainingOptions,
  type TrainingResult,
  type TrainingSettings,
} from "./train.ts";
export type { GraphLayerKind, Normalisation, ReadoutKind } from "./layers.ts";
export type { Activation } from "./operations.ts";
export type { LearningRateSchedule } from "./schedule.ts";
export { correspondenceTask, type CorrespondenceTaskOptions } from "./correspondence_task.ts";
export {
  type Graph,
  type GraphColumns,
  GraphDataset,
  type GraphDatasetOptions,
  type GraphView,
} from "./dataset.ts";
export { type FoldOptions, stratifiedFolds } from "./folds.ts";
export { readGraphDataset } from "./import.ts";
export type { ColumnSchema, GraphSchema, ViewSchema } from "./schema.ts";
export {
  type CountRange,
  type DatasetStatistics,
  datasetStatistics,
  type ViewStatistics,
} from "./statistics.ts";
export { readTuDataset, type TuDatasetOptions } from "./tu_dataset.ts";
