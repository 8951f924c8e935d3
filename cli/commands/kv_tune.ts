import { Device } from "../../src/device/mod.ts";
import { AtomicFile } from "../../src/io/mod.ts";
import { listenForInterrupt } from "../interrupt.ts";
import {
  CODEC_HEADINGS,
  codecCells,
  codecReport,
  type EvaluationCommandOptions,
  evaluationHeading,
  isOnFrontier,
  loadForMeasuring,
  quantizerOf,
  raw16Cells,
} from "../model_evaluation.ts";
import { defined, type GlobalOptions } from "../options.ts";
import { formatBits, formatError, print, printJson, printTable, withProgress } from "../output.ts";
import { readText } from "../text_file.ts";

/** Options of `kv tune`. */
export interface KvTuneOptions extends EvaluationCommandOptions {
  maxKld: number;
  budget: number;
  svg?: string | undefined;
}

/** Searches the codec that takes the fewest bits within a divergence. */
export async function kvTune(options: GlobalOptions & KvTuneOptions): Promise<void> {
  const { backend, model: folder, text: file, windows, tokens, residual } = options;
  const { maxKld, budget, svg } = options;
  const text = await readText(file);
  using device = Device.open(defined({ backend }));
  using interrupt = listenForInterrupt();
  const { signal } = interrupt;
  using chart = svg === undefined ? undefined : await AtomicFile.create(svg, { signal });
  using model = await loadForMeasuring(device, folder, signal);
  const tuning = await withProgress(
    "searching",
    (onProgress) =>
      model.tune(text, maxKld, { windows, tokens, residual, budget, onProgress, signal }),
  );
  const { best, measured, isCut, reference } = tuning;
  const rows = measured.map((result) => ({
    kv: result.name,
    result,
    holds: result.kld <= maxKld,
    frontier: isOnFrontier(result, measured),
  }));
  if (chart) {
    const points = rows.map(({ kv, result, frontier }) => ({
      ...{ kv, frontier, best: result === best, quantizer: quantizerOf(result) },
      ...{ bitsPerValue: result.bitsPerValue, kld: result.kld },
    }));
    await (await import("../chart.ts")).writeTuningChart(chart, points, maxKld);
  }
  const name = device.info.name;
  if (options.json) {
    return printJson({
      ...{ model: folder, text: file, backend: device.backend, device: name },
      ...{ windows, tokens, predictions: reference.predictions, residual, svg },
      ...{ maxKld, kv: best.name, ...codecReport(best), raw16Perplexity: reference.perplexity },
      ...{ measuredCodecs: measured.length - 1, budget, isCut },
      rows: rows.map(({ kv, result, holds, frontier }) => ({
        ...{ kv, ...codecReport(result), holds, frontier },
      })),
    });
  }
  print(evaluationHeading(options, { device: name }));
  printTable([...CODEC_HEADINGS, "holds", "frontier"], [
    ...rows.map(({ kv, result, holds, frontier }) => [
      ...(kv === "raw16" ? raw16Cells(tuning) : codecCells(kv, result)),
      holds ? "✓" : "",
      frontier ? "✓" : "",
    ]),
  ]);
  print(
    `${best.name} takes ${formatBits(best.bitsPerValue)} bits per value with a KLD of ` +
      `${formatError(best.kld)}, of ${formatError(maxKld)} at most`,
  );
  if (isCut) print(`the search ended at ${budget} codecs (--budget); there may be a better one`);
  if (svg !== undefined) print(`${svg} written`);
}
