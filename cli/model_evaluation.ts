import { Device } from "../src/device/mod.ts";
import {
  type CodecEvaluation,
  type Evaluation,
  LanguageModel,
  type LanguageModelOptions,
} from "../src/llm/mod.ts";
import { listenForInterrupt } from "./interrupt.ts";
import { defined, type GlobalOptions } from "./options.ts";
import { formatBits, formatError, formatPerCent, withProgress } from "./output.ts";
import { readText } from "./text_file.ts";

/** Options of the commands that measure what codecs cost a model. */
export interface EvaluationCommandOptions {
  model: string;
  text: string;
  windows: number;
  tokens: number;
  residual: number;
}

/** What was measured, and on which device. */
export interface ModelEvaluation {
  evaluation: Evaluation;
  backend: string;
  device: string;
}

/** Loads a model for what has caches of its own: the model's is as small as can be. */
export function loadForMeasuring(
  device: Device,
  folder: string,
  signal: AbortSignal,
  options: LanguageModelOptions = {},
): Promise<LanguageModel> {
  const cache = { codec: "raw16", sequences: 1, tokens: 64, stepTokens: 64 };
  return withProgress(
    "loading",
    (onProgress) =>
      LanguageModel.load(device, folder, { ...cache, ...options, onProgress, signal }),
  );
}

/** Measures what codecs cost the model in a folder on the text in a file. */
export async function evaluateFolder(
  options: GlobalOptions & EvaluationCommandOptions,
  codecs: readonly string[],
): Promise<ModelEvaluation> {
  const { backend, windows, tokens, residual } = options;
  const text = await readText(options.text);
  using device = Device.open(defined({ backend }));
  using interrupt = listenForInterrupt();
  const { signal } = interrupt;
  using model = await loadForMeasuring(device, options.model, signal);
  const evaluation = await withProgress(
    "measuring",
    (onProgress) => model.evaluate(text, { windows, tokens, codecs, residual, onProgress, signal }),
  );
  return { evaluation, backend: device.backend, device: device.info.name };
}

/** What was measured of a codec, as `--json` shows it. */
export function codecReport(
  { perplexity, perplexityIncrease, kld, top1, bitsPerValue }: CodecEvaluation,
) {
  return { perplexity, perplexityIncrease, kld, top1, bitsPerValue };
}

/** Headings of {@linkcode codecCells}. */
export const CODEC_HEADINGS = [
  "kv",
  ">bits/value",
  ">perplexity",
  ">more",
  ">KLD",
  ">same top token",
];

/** What was measured of a codec, as a row of a table. */
export function codecCells(kv: string, result: CodecEvaluation): string[] {
  return [
    kv,
    formatBits(result.bitsPerValue),
    result.perplexity.toFixed(3),
    formatPerCent(result.perplexityIncrease),
    formatError(result.kld),
    formatPerCent(result.top1),
  ];
}

/** The 16-bit cache that codecs are compared with, as a row of a table. */
export function raw16Cells({ reference }: Pick<Evaluation, "reference">): string[] {
  return ["raw16", formatBits(16), reference.perplexity.toFixed(3), "", "", ""];
}

/** "tests/fixtures/tiny on a CPU: 4 × 1,024 predictions of a file". */
export function evaluationHeading(
  { model, text, windows, tokens }: EvaluationCommandOptions,
  { device }: Pick<ModelEvaluation, "device">,
): string {
  return `${model} on ${device}: ${windows} × ${
    tokens.toLocaleString("en")
  } predictions of ${text}`;
}

/** Whether none of the others is nowhere worse and somewhere better. */
export function isOnFrontier(one: CodecEvaluation, all: readonly CodecEvaluation[]): boolean {
  return !all.some((other) =>
    other.bitsPerValue <= one.bitsPerValue && other.kld <= one.kld &&
    (other.bitsPerValue < one.bitsPerValue || other.kld < one.kld)
  );
}

/** "packkv", or "fixed, kivi" where keys and values differ. */
export function quantizerOf({ codec: { keys, values } }: CodecEvaluation): string {
  return keys.quantizer === values.quantizer
    ? keys.quantizer
    : `${keys.quantizer}, ${values.quantizer}`;
}
