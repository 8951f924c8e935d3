/**
 * Language models over a packed cache: Hugging Face checkpoints, generation, and what a codec costs.
 *
 * @module
 */
export type { ModelBench, ModelBenchOptions } from "./bench_model.ts";
export type { WeightDType } from "./checkpoint.ts";
export {
  Conversation,
  type ConversationOptions,
  type ConversationPrompt,
  type ReplyOptions,
} from "./conversation.ts";
export type { DumpOptions, DumpReport } from "./dump.ts";
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
export type { Tuning, TuningOptions } from "./tune.ts";
