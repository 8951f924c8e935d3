import type { Device } from "../device/mod.ts";
import type { GraphDataset } from "./dataset.ts";
import { evaluate } from "./evaluate.ts";
import { stratifiedFolds } from "./folds.ts";
import { type EpochReport, train, type TrainingSettings } from "./train.ts";

/** Options of {@linkcode crossValidate}. */
export interface CrossValidationOptions extends Omit<TrainingSettings, "objects"> {
  /** Number of folds, from 2 on. Default: 5. */
  readonly folds?: number | undefined;
  /** Called after every epoch of every fold; folds count from 1. */
  readonly onEpoch?: ((fold: number, report: EpochReport, epochs: number) => void) | undefined;
  /** When it aborts, the signal's reason is thrown after the epoch. */
  readonly signal?: AbortSignal | undefined;
}

/** What one fold came to. */
export interface FoldResult {
  /** Counted from 1. */
  readonly fold: number;
  /** Objects of the fold, which were not trained on. */
  readonly objects: readonly number[];
  readonly accuracy: number;
  readonly loss: number;
  /** The epoch that the parameters are of. */
  readonly epoch: number;
  readonly history: readonly EpochReport[];
  readonly seconds: number;
}

/** What {@linkcode crossValidate} returns. */
export interface CrossValidation {
  readonly folds: readonly FoldResult[];
  /** Mean accuracy of the folds. */
  readonly accuracy: number;
  /** Standard deviation of the folds' accuracies, over their number. */
  readonly deviation: number;
  /** How often each true class (row) was taken for each class (column), over all folds. */
  readonly confusion: readonly (readonly number[])[];
}

/**
 * Trains once for each fold on all others, and measures on the fold ({@linkcode stratifiedFolds} of the seed). Throws as
 * {@linkcode train}.
 *
 * @example
 * ```ts
 * import { correspondenceTask, crossValidate } from "@packhorse/packhorse/graph";
 * import { Device } from "@packhorse/packhorse/device";
 * import { assertEquals } from "@std/assert";
 *
 * using device = Device.open({ backend: "cpu" });
 * const task = correspondenceTask({ objects: 40 });
 * const { folds } = await crossValidate(device, task, { folds: 2, epochs: 1, model: { width: 8 } });
 * assertEquals(folds.map(({ objects }) => objects.length), [20, 20]);
 * ```
 */
export async function crossValidate(
  device: Device,
  dataset: GraphDataset,
  options: CrossValidationOptions = {},
): Promise<CrossValidation> {
  const { folds: count = 5, onEpoch, signal, seed = 0, ...settings } = options;
  const folds: FoldResult[] = [];
  const classes = dataset.classes.length;
  const confusion = Array.from({ length: classes }, () => new Array<number>(classes).fill(0));
  for (
    const [index, objects] of stratifiedFolds(dataset.labels, { folds: count, seed }).entries()
  ) {
    const fold = index + 1;
    const start = performance.now();
    const aside = new Set(objects);
    using result = await train(device, dataset, {
      ...settings,
      ...{ seed, signal },
      objects: dataset.labels.keys().filter((object) => !aside.has(object)).toArray(),
      onEpoch: (report, epochs) => onEpoch?.(fold, report, epochs),
    });
    const measured = evaluate(result.model, dataset, { objects });
    measured.confusion.forEach((row, i) => row.forEach((times, j) => confusion[i]![j]! += times));
    const { accuracy, loss } = measured;
    const { epoch, history } = result;
    const seconds = (performance.now() - start) / 1000;
    folds.push({ fold, objects, accuracy, loss, epoch, history, seconds });
  }
  const mean = folds.reduce((sum, { accuracy }) => sum + accuracy, 0) / folds.length;
  const squares = folds.reduce((sum, { accuracy }) => sum + (accuracy - mean) ** 2, 0);
  return { folds, accuracy: mean, deviation: Math.sqrt(squares / folds.length), confusion };
}
