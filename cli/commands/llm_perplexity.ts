import { parseCacheCodec } from "../../src/kv/cache_codec.ts";
import {
  CODEC_HEADINGS,
  codecCells,
  codecReport,
  evaluateFolder,
  type EvaluationCommandOptions,
  evaluationHeading,
  raw16Cells,
} from "../model_evaluation.ts";
import type { GlobalOptions, NamedCacheCodec } from "../options.ts";
import { print, printJson, printTable } from "../output.ts";

/** Options of `llm perplexity`. */
export interface LlmPerplexityOptions extends EvaluationCommandOptions {
  kv?: NamedCacheCodec | undefined;
}

const RAW16: NamedCacheCodec = { kv: "raw16", codec: parseCacheCodec("raw16") };

/** Measures how well a model predicts a text, and what packing its cache costs. */
export async function llmPerplexity(options: GlobalOptions & LlmPerplexityOptions): Promise<void> {
  const { model, text, windows, tokens, residual } = options;
  const { kv, codec: { keys, values } } = options.kv ?? RAW16;
  const packs = keys.quantizer !== "raw16" || values.quantizer !== "raw16";
  const measured = await evaluateFolder(options, packs ? [kv] : []);
  const { evaluation, backend, device } = measured;
  const { reference, results: [packed] } = evaluation;
  if (options.json) {
    const { predictions, perplexity } = reference;
    return printJson({
      ...{ model, text, backend, device, windows, tokens, predictions, kv },
      ...(packed === undefined
        ? { perplexity }
        : { residual, raw16Perplexity: perplexity, ...codecReport(packed) }),
    });
  }
  print(evaluationHeading(options, measured));
  const rows = packed === undefined ? [] : [codecCells(kv, packed)];
  printTable(CODEC_HEADINGS, [raw16Cells(evaluation), ...rows]);
}
