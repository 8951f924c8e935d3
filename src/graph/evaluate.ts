import { PackhorseError } from "../error.ts";
import { GraphBatches } from "./batch.ts";
import { type GraphClassifier, networkOf } from "./classifier.ts";
import type { GraphNetwork } from "./network.ts";
import type { GraphDataset } from "./dataset.ts";
import { crossEntropy } from "./operations.ts";
import { Tape, type Tensor } from "./tape.ts";

/** Options of {@linkcode predict} and {@linkcode evaluate}. */
export interface PredictionOptions {
  /** Which objects. Default: all. */
  readonly objects?: readonly number[] | undefined;
  /** Objects at once. Default: 256. */
  readonly batchSize?: number | undefined;
}

/** What a model says of some objects. */
export interface GraphPredictions {
  /** Which objects. */
  readonly objects: readonly number[];
  /** The likeliest class of each: an index into the classes of the model's schema. */
  readonly classes: Int32Array<ArrayBuffer>;
  /** The probability of each class: `[objects, classes]`. */
  readonly probabilities: Float32Array<ArrayBuffer>;
}

/** How well a model tells classes apart. */
export interface GraphEvaluation {
  /** Objects whose label is a class of the model. */
  readonly objects: number;
  /** Mean cross-entropy, in nats. */
  readonly loss: number;
  /** Share of objects whose likeliest class is the true one. */
  readonly accuracy: number;
  /** How often each true class (row) was taken for each class (column). */
  readonly confusion: readonly (readonly number[])[];
}

/**
 * Asks a model for the classes of objects. Labels are not looked at. Throws `invalid-argument` if the data set does not fit
 * the model, or an object does not exist.
 */
export function predict(
  model: GraphClassifier,
  dataset: GraphDataset,
  options: PredictionOptions = {},
): GraphPredictions {
  using tape = new Tape(model.device);
  const network = networkOf(model);
  return run(network, tape, network.batches(dataset), options).predictions;
}

/**
 * Measures a model on objects. Objects whose label is none of the model's classes are left out. Throws as
 * {@linkcode predict}.
 */
export function evaluate(
  model: GraphClassifier,
  dataset: GraphDataset,
  options: PredictionOptions = {},
): GraphEvaluation {
  using tape = new Tape(model.device);
  const network = networkOf(model);
  return evaluateBatches(network, tape, network.batches(dataset), options);
}

/** The same of a data set that was made ready before. */
export function evaluateBatches(
  network: GraphNetwork,
  tape: Tape,
  batches: GraphBatches,
  options: PredictionOptions,
): GraphEvaluation {
  const { predictions, losses } = run(network, tape, batches, options);
  const classes = network.schema.classes.length;
  const confusion = Array.from({ length: classes }, () => new Array<number>(classes).fill(0));
  let [objects, right, loss] = [0, 0, 0];
  predictions.objects.forEach((object, i) => {
    const label = batches.classes[object]!;
    if (label < 0) return;
    const predicted = predictions.classes[i]!;
    objects++;
    loss += losses[i]!;
    if (predicted === label) right++;
    confusion[label]![predicted]!++;
  });
  const count = Math.max(objects, 1);
  return { objects, loss: loss / count, accuracy: right / count, confusion };
}

function run(
  network: GraphNetwork,
  tape: Tape,
  batches: GraphBatches,
  options: PredictionOptions,
): { predictions: GraphPredictions; losses: Float32Array } {
  const { objects = batches.classes.keys().toArray(), batchSize = 256 } = options;
  const columns = network.schema.classes.length;
  const classes = new Int32Array(objects.length);
  const probabilities = new Float32Array(objects.length * columns);
  const losses = new Float32Array(objects.length);
  let start = 0;
  for (const some of GraphBatches.order(objects, { batchSize })) {
    tape.begin();
    const batch = network.upload(tape, batches.collate(some));
    const { logits } = network.forward(tape, batch);
    const [rowLosses, likeliest] = [tape.take(some.length), tape.take(some.length)];
    const { labelled, labels } = batch;
    const result = crossEntropy(tape, logits, labels, {
      labelled,
      rowLosses,
      predictions: likeliest,
    });
    const end = start + some.length;
    const read = (
      place: Tensor["place"],
      target: Int32Array<ArrayBuffer> | Float32Array<ArrayBuffer>,
    ) =>
      place.buffer.download(
        new Uint8Array(target.buffer, target.byteOffset, target.byteLength),
        place.byteOffset,
      );
    read(result.probabilities.place, probabilities.subarray(start * columns, end * columns));
    read(likeliest, classes.subarray(start, end));
    read(rowLosses, losses.subarray(start, end));
    start = end;
  }
  if (probabilities.some((value) => Number.isNaN(value))) {
    throw new PackhorseError(
      "non-finite",
      "The model gave NaN: its parameters, or the features, are too large",
    );
  }
  return { predictions: { objects, classes, probabilities }, losses };
}
