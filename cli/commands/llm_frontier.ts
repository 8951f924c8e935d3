import { AtomicFile } from "../../src/io/mod.ts";
import {
  CODEC_HEADINGS,
  codecCells,
  codecReport,
  evaluateFolder,
  type EvaluationCommandOptions,
  evaluationHeading,
  isOnFrontier,
  quantizerOf,
  raw16Cells,
} from "../model_evaluation.ts";
import type { GlobalOptions, NamedCacheCodec } from "../options.ts";
import { print, printJson, printTable } from "../output.ts";

/** Options of `llm frontier`. */
export interface LlmFrontierOptions extends EvaluationCommandOptions {
  kv?: NamedCacheCodec[] | undefined;
  svg?: string | undefined;
}

/** What is compared where none are named. */
const CODECS = [
  ...["packkv:k=0.025,v=0.05", "packkv:k=0.05,v=0.1", "packkv:k=0.1,v=0.2", "packkv:k=0.2,v=0.4"],
  ...["fixed:2", "fixed:3", "fixed:4", "fixed:8"],
  ...["kivi:2", "kivi:3", "kivi:4", "kivi:8"],
];

/** Measures what codecs cost a model, and which of them no other beats. */
export async function llmFrontier(options: GlobalOptions & LlmFrontierOptions): Promise<void> {
  const { model, text, windows, tokens, residual, svg } = options;
  const codecs = options.kv?.map(({ kv }) => kv) ?? CODECS;
  using chart = svg === undefined ? undefined : await AtomicFile.create(svg);
  const measured = await evaluateFolder(options, codecs);
  const { evaluation, backend, device } = measured;
  const { reference, results } = evaluation;
  const rows = results.map((result, i) => ({
    kv: codecs[i]!,
    quantizer: quantizerOf(result),
    result,
    frontier: isOnFrontier(result, results),
  }));
  if (chart) {
    const points = rows.map(({ result: { kld, bitsPerValue }, ...row }) => ({
      ...row,
      kld,
      bitsPerValue,
    }));
    await (await import("../chart.ts")).writeFrontierChart(chart, points);
  }
  if (options.json) {
    const { predictions, perplexity } = reference;
    return printJson({
      ...{ model, text, backend, device, windows, tokens, predictions, residual, svg },
      raw16Perplexity: perplexity,
      rows: rows.map(({ kv, result, frontier }) => ({ kv, ...codecReport(result), frontier })),
    });
  }
  print(evaluationHeading(options, measured));
  printTable([...CODEC_HEADINGS, "frontier"], [
    [...raw16Cells(evaluation), ""],
    ...rows.map(({ kv, result, frontier }) => [...codecCells(kv, result), frontier ? "✓" : ""]),
  ]);
  print("✓: no other of these takes as few bits with as little divergence");
  if (svg !== undefined) print(`${svg} written`);
}
