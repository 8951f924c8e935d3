import { ValidationError } from "@cliffy/command";
import { Device } from "../../src/device/mod.ts";
import {
  crossValidate,
  type EpochReport,
  type FusionKind,
  type GraphDataset,
  type GraphLayerKind,
  type LearningRateSchedule,
  type Normalisation,
  readGraphDataset,
  type ReadoutKind,
  train,
  type TrainingSettings,
  type TransportGradient,
  type TransportPenalty,
} from "../../src/graph/mod.ts";
import { AtomicFile } from "../../src/io/mod.ts";
import { formatAccuracy, printConfusion } from "../graph_report.ts";
import { foldsReport, modelReport } from "../graph_page.ts";
import { writeHtmlReport } from "../html_report.ts";
import { listenForInterrupt } from "../interrupt.ts";
import { defined, type GlobalOptions } from "../options.ts";
import {
  formatSeconds,
  print,
  printAside,
  printJson,
  printTable,
  withProgress,
} from "../output.ts";
import type { GraphDataOptions } from "./graph_info.ts";

/** Options of `graph train`. */
export interface GraphTrainOptions extends GraphDataOptions {
  output?: string | undefined;
  folds?: number | undefined;
  fusion?: FusionKind | undefined;
  epsilon?: number | undefined;
  gradient?: TransportGradient | undefined;
  penalty?: TransportPenalty | undefined;
  pairs?: "all" | "star" | undefined;
  cost?: "sqeuclidean" | "cosine" | undefined;
  report?: string | undefined;
  view: number;
  layer: GraphLayerKind;
  layers: number;
  width: number;
  heads: number;
  readout: ReadoutKind;
  normalisation: Normalisation;
  dropout: number;
  headDropout: number;
  epochs: number;
  batchSize: number;
  learningRate: number;
  schedule: Exclude<LearningRateSchedule["kind"], undefined>;
  warmup: number;
  weightDecay: number;
  clipNorm: number;
  validation?: number | undefined;
  patience?: number | undefined;
  seed: number;
  resume?: string | undefined;
  log?: string | undefined;
}

/** Trains a classifier of graphs, or measures one by cross-validation. */
export async function graphTrain(
  options: GlobalOptions & GraphTrainOptions,
  views: string[],
): Promise<void> {
  const { output, folds, log, backend, allowMissing } = options;
  if (output === undefined && folds === undefined) {
    throw new ValidationError('Give "--output", where to write the model, or "--folds".');
  }
  checkTransport(options);
  const dataset = await readGraphDataset(views, defined({ allowMissing }));
  using reportFile = options.report === undefined
    ? undefined
    : await AtomicFile.create(options.report);
  using logFile = log === undefined ? undefined : await AtomicFile.create(log);
  using device = Device.open(defined({ backend }));
  using interrupt = listenForInterrupt();
  const run = { options, dataset, device, signal: interrupt.signal, reportFile };
  const report = folds === undefined
    ? await trainModel(run, output!)
    : await measureFolds(run, folds);
  const document = { views, backend: device.backend, device: device.info.name, ...report };
  if (logFile) {
    await logFile.write(new TextEncoder().encode(JSON.stringify(document, null, 2) + "\n"), 0);
    await logFile.commit();
  }
  if (options.json) printJson(document);
  else if (log !== undefined) print(`${log} written`);
}

interface Run {
  readonly options: GlobalOptions & GraphTrainOptions;
  readonly dataset: GraphDataset;
  readonly device: Device;
  readonly signal: AbortSignal;
  readonly reportFile: AtomicFile | undefined;
}

/** Throws a `ValidationError` for options of amosl without it. */
function checkTransport(options: GraphTrainOptions): void {
  if (options.fusion === "amosl") return;
  for (const name of ["epsilon", "gradient", "penalty", "pairs", "cost"] as const) {
    if (options[name] === undefined) continue;
    throw new ValidationError(`Option "--${name}" needs "--fusion amosl".`);
  }
}

function settingsOf(options: GraphTrainOptions): TrainingSettings {
  const { fusion, view, layer, layers, width, heads, readout, normalisation } = options;
  const { epsilon, gradient, penalty, pairs, cost } = options;
  const { dropout, headDropout, schedule: kind, warmup, validation, patience } = options;
  const { epochs, batchSize, learningRate, weightDecay, clipNorm, seed } = options;
  return {
    model: {
      ...{ view, layer, layers, width, heads, readout, normalisation, dropout, headDropout },
      ...defined({ fusion, epsilon, gradient, penalty, pairs, cost }),
    },
    ...{ epochs, batchSize, learningRate, weightDecay, clipNorm, seed },
    schedule: { kind, warmup },
    ...defined({ validationShare: validation, patience }),
  };
}

async function trainModel(run: Run, output: string) {
  const { options, dataset, device, signal, reportFile } = run;
  const { resume, json } = options;
  const settings = settingsOf(options);
  const start = performance.now();
  using result = await withProgress("training", (onProgress) =>
    train(device, dataset, {
      ...settings,
      ...{ signal, checkpoint: output, resume },
      onEpoch: (report, epochs) => onProgress(report.epoch, epochs, describe(report)),
    })).catch((error) => {
      if (signal.aborted) printAside(`${output} holds what there is: --resume ${output} goes on`);
      throw error;
    });
  const seconds = (performance.now() - start) / 1000;
  const { model, history, epoch, stoppedEarly } = result;
  if (reportFile) {
    await writeHtmlReport(reportFile, modelReport({ dataset, model, history, epoch, output }));
    if (!json) print(`${options.report} written`);
  }
  if (!json) {
    const last = history[epoch - 1]!;
    print(`${output} written: ${model.parameterCount.toLocaleString("en")} parameters`);
    print(
      `epoch ${epoch}${stoppedEarly ? `, the best of ${history.length}` : ""}: ${
        describe(last)
      }, ` +
        `after ${formatSeconds(seconds)}`,
    );
  }
  return {
    output,
    parameters: model.parameterCount,
    ...(resume === undefined ? { settings } : { resume }),
    ...{ epoch, stoppedEarly, seconds, history },
  };
}

async function measureFolds(run: Run, folds: number) {
  const { options, dataset, device, signal, reportFile } = run;
  const settings = settingsOf(options);
  const result = await withProgress("training", (onProgress) =>
    crossValidate(device, dataset, {
      ...settings,
      ...{ folds, signal },
      onEpoch: (fold, report, epochs) =>
        onProgress(
          (fold - 1) * epochs + report.epoch,
          folds * epochs,
          `fold ${fold}  ${describe(report)}`,
        ),
    }));
  const { accuracy, deviation, confusion } = result;
  if (reportFile) {
    await writeHtmlReport(reportFile, foldsReport(dataset, result));
    if (!options.json) print(`${options.report} written`);
  }
  if (!options.json) {
    printTable(
      [">fold", ">objects", ">accuracy", ">loss", ">epoch", ">time"],
      result.folds.map((fold) => [
        fold.fold,
        fold.objects.length,
        formatAccuracy(fold.accuracy),
        fold.loss.toFixed(4),
        fold.epoch,
        formatSeconds(fold.seconds),
      ]),
    );
    print(`accuracy ${formatAccuracy(accuracy)}, standard deviation ${formatAccuracy(deviation)}`);
    print();
    printConfusion(confusion, dataset.classes);
  }
  return {
    settings,
    accuracy,
    deviation,
    classes: dataset.classes,
    confusion,
    folds: result.folds,
  };
}

/** "loss 0.3120  accuracy 90.1 %", and the same of the watched objects. */
function describe(report: EpochReport): string {
  const { loss, accuracy, validationLoss, validationAccuracy, transportCost } = report;
  const transport = transportCost === undefined ? "" : `  transport ${transportCost.toFixed(4)}`;
  const watched = validationLoss === undefined || validationAccuracy === undefined
    ? ""
    : `  watched ${validationLoss.toFixed(4)}  ${formatAccuracy(validationAccuracy)}`;
  return `loss ${loss.toFixed(4)}  accuracy ${formatAccuracy(accuracy)}${watched}${transport}`;
}
