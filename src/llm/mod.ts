/**
 * Language models over a packed cache: Hugging Face checkpoints, generation, and what a codec costs.
 *
 * @module
 */
export type { WeightDType } from "./checkpoint.ts";
export type {
  CodecEvaluation,
  Evaluation,
  EvaluationOptions,
  PredictionScores,
  ReferenceEvaluation,
} from "./evaluate.ts";
export type {
  Completion,
  FinishReason,
  GeneratedPiece,
  GenerationOptions,
  Prompt,
} from "./generate.ts";
export { LanguageModel, type LanguageModelOptions } from "./language_model.ts";
export {
  type LanguageModelConfig,
  type LanguageModelFamily,
  readLanguageModelConfig,
} from "./model_config.ts";
export { PromptMemory } from "./prompt_memory.ts";
export type { RotaryConfig, RotaryScaling } from "./rotary.ts";
export type { SamplingOptions } from "./sampler.ts";
export {
  type ChatMessage,
  type ChatOptions,
  type DecodeOptions,
  type EncodeOptions,
  Tokenizer,
  TokenStream,
} from "./tokenizer.ts";
