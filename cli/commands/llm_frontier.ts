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
  report?: string | undefined;
}

/** What is compared where none are named. */
const CODECS = [
  ...["packkv:k=0.025,v=0.05", "packkv:k=0.05,v=0.1", "packkv:k=0.1,v=0.2", "packkv:k=0.2,v=0.4"],
  ...["fixed:2", "fixed:3", "fixed:4", "fixed:8"],
  ...["kivi:2", "kivi:3", "kivi:4", "kivi:8"],
];

/** Measures what codecs cost a model, and which of them no other beats. */
export async function llmFrontier(options: GlobalOptions & LlmFrontierOptions): Promise<void> {
  const { model, text, windows, tokens, residual, svg, report } = options;
  const codecs = options.kv?.map(({ kv }) => kv) ?? CODECS;
  using chart = svg === undefined ? undefined : await AtomicFile.create(svg);
  using page = report === undefined ? undefined : await AtomicFile.create(report);
  const measured = await evaluateFolder(options, codecs);
  const { evaluation, backend, device } = measured;
  const { reference, results } = evaluation;
  const rows = results.map((result, i) => ({
    kv: codecs[i]!,
    quantizer: quantizerOf(result),
    result,
    frontier: isOnFrontier(result, results),
  }));
  const points = rows.map(({ result: { kld, bitsPerValue }, ...row }) => ({
    ...row,
    kld,
    bitsPerValue,
  }));
  const headings = [...CODEC_HEADINGS, "frontier"];
  const cells = [
    [...raw16Cells(evaluation), ""],
    ...rows.map(({ kv, result, frontier }) => [...codecCells(kv, result), frontier ? "✓" : ""]),
  ];
  if (chart) await (await import("../chart.ts")).writeFrontierChart(chart, points);
  if (page) {
    await (await import("../html_report.ts")).writeHtmlReport(page, {
      title: "What codecs cost a model",
      summary: evaluationHeading(options, measured),
      sections: [{
        title: "Bits per value against divergence",
        text: LEGEND,
        parts: [
          {
            kind: "charts",
            charts: [{
              title: "Codecs by quantizer",
              spec: (await import("../chart.ts")).frontierPanel(points),
            }],
          },
          { kind: "table", headings, rows: cells },
        ],
      }],
    });
  }
  if (options.json) {
    const { predictions, perplexity } = reference;
    return printJson({
      ...{ model, text, backend, device, windows, tokens, predictions, residual, svg, report },
      raw16Perplexity: perplexity,
      rows: rows.map(({ kv, result, frontier }) => ({ kv, ...codecReport(result), frontier })),
    });
  }
  print(evaluationHeading(options, measured));
  printTable(headings, cells);
  print(LEGEND);
  for (const file of [svg, report]) if (file !== undefined) print(`${file} written`);
}

const LEGEND = "✓: no other of these takes as few bits with as little divergence";
