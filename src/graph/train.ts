import type { Device } from "../device/mod.ts";
import type { DeviceBuffer } from "../device/device_buffer.ts";
import { regionOn } from "../device/device_buffer.ts";
import { PackhorseError } from "../error.ts";
import { combine } from "../../ffi/graph.ts";
import { checksum } from "../io/checksum.ts";
import { GraphBatches } from "./batch.ts";
import { CheckpointReader } from "./checkpoint.ts";
import {
  adoptNetwork,
  type GraphClassifier,
  type GraphModelOptions,
  saveNetwork,
} from "./classifier.ts";
import type { GraphDataset } from "./dataset.ts";
import { evaluateBatches } from "./evaluate.ts";
import { stratifiedSplit } from "./folds.ts";
import { GraphNetwork, totalLoss } from "./network.ts";
import { crossEntropy } from "./operations.ts";
import { Adam, type ParameterValues } from "./parameters.ts";
import { Random } from "./random.ts";
import { type LearningRateSchedule, learningRateShare } from "./schedule.ts";
import { schemaOf } from "./schema.ts";
import { Tape } from "./tape.ts";

/** How a model is trained; plain values, which a checkpoint keeps. */
export interface TrainingSettings {
  readonly model?: GraphModelOptions | undefined;
  /** Times that every object is seen. Default: 60. */
  readonly epochs?: number | undefined;
  /** Objects of a step. Default: 64. */
  readonly batchSize?: number | undefined;
  /** Default: 0.005. */
  readonly learningRate?: number | undefined;
  /** Default: cosine. */
  readonly schedule?: LearningRateSchedule | undefined;
  /** Decay of weights (AdamW). Default: 1e-4. */
  readonly weightDecay?: number | undefined;
  /** Largest norm of the gradient; longer ones are scaled down. Default: 5. */
  readonly clipNorm?: number | undefined;
  /** What all random choices follow from. Default: 0. */
  readonly seed?: number | undefined;
  /** Which objects to train on. Default: all. */
  readonly objects?: readonly number[] | undefined;
  /** Share of them that is not trained on but watched, each class alike. Default: 0, or 0.1 with `patience`. */
  readonly validationShare?: number | undefined;
  /**
   * Epochs without a lower loss of the watched objects after which training stops; the best epoch's parameters are taken.
   * Default: it does not stop early.
   */
  readonly patience?: number | undefined;
}

/** Options of {@linkcode train}. */
export interface TrainingOptions extends TrainingSettings {
  /** Called after every epoch. */
  readonly onEpoch?: ((report: EpochReport, epochs: number) => void) | undefined;
  /** When it aborts, training ends after the epoch, a checkpoint is written, and the signal's reason is thrown. */
  readonly signal?: AbortSignal | undefined;
  /** A `.safetensors` file to write along the way and at the end, from which training can go on. */
  readonly checkpoint?: string | undefined;
  /** Epochs between checkpoints. Default: 10. */
  readonly checkpointEvery?: number | undefined;
  /**
   * A checkpoint to go on from. All settings are its own then; the result is the same, bit by bit, as without the
   * interruption.
   */
  readonly resume?: string | undefined;
}

/** What an epoch came to. */
export interface EpochReport {
  /** Counted from 1. */
  readonly epoch: number;
  readonly learningRate: number;
  /** Mean cross-entropy over the epoch's steps, in nats. */
  readonly loss: number;
  /** Share of the objects that were taken for their class while training. */
  readonly accuracy: number;
  /**
   * What it cost to transport the nodes of a view to those of another, with amosl: 1 is what nodes matched at random cost on
   * average. Mean over the epoch's steps.
   */
  readonly transportCost?: number;
  /** Loss and accuracy of the watched objects, after the epoch. */
  readonly validationLoss?: number;
  readonly validationAccuracy?: number;
}

/** What {@linkcode train} returns. */
export interface TrainingResult extends Disposable {
  readonly model: GraphClassifier;
  readonly history: readonly EpochReport[];
  /** The epoch that the parameters are of: the last, or with `patience` the best. */
  readonly epoch: number;
  /** Whether it stopped before the last epoch. */
  readonly stoppedEarly: boolean;
}

type Settings =
  & {
    readonly [Name in Exclude<keyof TrainingSettings, "patience" | "objects" | "model">]-?: Exclude<
      TrainingSettings[Name],
      undefined
    >;
  }
  & Pick<TrainingSettings, "patience" | "objects" | "model">;

/**
 * Trains a {@linkcode GraphClassifier}. The same data, settings and backend give the same bits on the same machine.
 *
 * Throws `invalid-argument` for settings that are none, `non-finite` if the loss no longer is a number, and with `resume`
 * also `corrupt` for a file that is no checkpoint, and `invalid-argument` if it is of other data.
 *
 * @example
 * ```ts
 * import { Device, evaluate, readTuDataset, train } from "@packhorse/packhorse";
 * import { assert } from "@std/assert";
 *
 * const digits = await readTuDataset([
 *   "tests/fixtures/digits/DIGITS_L",
 *   "tests/fixtures/digits/DIGITS_R",
 * ]);
 * using device = Device.open({ backend: "cpu" });
 * const objects = Array.from({ length: 300 }, (_, i) => i);
 * using result = await train(device, digits, { objects, epochs: 12, model: { width: 16 } });
 * const { accuracy } = evaluate(result.model, digits, { objects });
 * assert(accuracy > 0.3);
 * ```
 */
export async function train(
  device: Device,
  dataset: GraphDataset,
  options: TrainingOptions = {},
): Promise<TrainingResult> {
  const { onEpoch, signal, checkpoint, checkpointEvery = 10, resume } = options;
  signal?.throwIfAborted();
  using trainer = resume === undefined
    ? new GraphTrainer(device, dataset, options)
    : await GraphTrainer.resume(device, dataset, resume);
  const save = async () => {
    if (checkpoint !== undefined) await trainer.save(checkpoint);
  };
  while (!trainer.isDone) {
    const report = trainer.runEpoch();
    onEpoch?.(report, trainer.epochs);
    // Lets what waits have its turn: signals, above all.
    await new Promise((resolve) => setTimeout(resolve));
    const isDue = report.epoch % checkpointEvery === 0 || trainer.isDone || signal?.aborted;
    if (isDue) await save();
    signal?.throwIfAborted();
  }
  return trainer.finish();
}

/** A training run, epoch by epoch. */
export class GraphTrainer implements Disposable {
  readonly #network: GraphNetwork;
  readonly #adam: Adam;
  readonly #tape: Tape;
  readonly #batches: GraphBatches;
  readonly #settings: Settings;
  readonly #dataChecksum: number;
  readonly #train: readonly number[];
  readonly #watched: readonly number[];
  readonly #losses: DeviceBuffer<"f32">;
  readonly #predictions: DeviceBuffer<"i32">;
  /** The transport cost of each step, 4 elements apart. */
  readonly #costs: DeviceBuffer<"f32">;
  readonly #history: EpochReport[] = [];
  #best: { epoch: number; loss: number; values: ParameterValues } | undefined;
  #isFinished = false;

  constructor(device: Device, dataset: GraphDataset, settings: TrainingSettings = {}) {
    this.#settings = resolveSettings(settings);
    const { model, seed, batchSize, validationShare } = this.#settings;
    const { objects = dataset.labels.keys().toArray(), weightDecay, clipNorm } = this.#settings;
    using created = new DisposableStack();
    this.#network = created.use(
      new GraphNetwork(schemaOf(dataset), { seed, ...model }).place(device),
    );
    this.#batches = this.#network.batches(dataset);
    this.#dataChecksum = checksumOf(dataset);
    this.#batches.collate(objects); // throws for one that does not exist
    const { kept, aside } = stratifiedSplit(objects, dataset.labels, {
      share: validationShare,
      seed,
    });
    this.#train = kept;
    this.#watched = aside;
    if (kept.length === 0) refuse("there is no object to train on");
    this.#adam = created.use(new Adam(this.#network.parameters, { weightDecay, clipNorm }));
    this.#tape = created.use(new Tape(device));
    const places = Math.ceil(kept.length / batchSize) * placesOf(batchSize);
    this.#losses = created.use(device.createBuffer("f32", places));
    this.#predictions = created.use(device.createBuffer("i32", places));
    this.#costs = created.use(device.createBuffer("f32", 4 * Math.ceil(kept.length / batchSize)));
    created.move();
  }

  /** Goes on from a checkpoint. Throws `corrupt` for a file that is none, `invalid-argument` for one of other data. */
  static async resume(device: Device, dataset: GraphDataset, path: string): Promise<GraphTrainer> {
    using file = await CheckpointReader.open(path);
    const { settings, dataChecksum, history, best, step } = file.require("training");
    const isReal = typeof settings === "object" && settings !== null && Array.isArray(history);
    if (!isReal || typeof step !== "number") return file.refuse("its training is incomplete");
    if (dataChecksum !== checksumOf(dataset)) {
      const message = `Cannot go on from ${path}: it was trained on other data than these`;
      throw new PackhorseError("invalid-argument", message);
    }
    const { model, seed } = settings as TrainingSettings;
    // Before memory is taken for them.
    file.check(new GraphNetwork(schemaOf(dataset), { seed, ...model }).parameters.names);
    const trainer = new GraphTrainer(device, dataset, settings as TrainingSettings);
    try {
      const { parameters } = trainer.#network;
      const { names } = parameters;
      const lengths = lengthsOf(parameters.read());
      const count = lengths.parameters;
      parameters.write(await file.values(names, lengths));
      trainer.#adam.write({
        step,
        first: await file.list("adam.first", count),
        second: await file.list("adam.second", count),
      });
      trainer.#history.push(...history as EpochReport[]);
      if (best !== undefined && best !== null) {
        const { epoch, loss } = best as { epoch: number; loss: number };
        const values = {
          parameters: await file.list("best.parameters", count),
          state: await file.list("best.state", lengths.state),
        };
        trainer.#best = { epoch, loss, values };
      }
      return trainer;
    } catch (error) {
      trainer[Symbol.dispose]();
      throw error;
    }
  }

  /** Epochs that it will run at most. */
  get epochs(): number {
    return this.#settings.epochs;
  }

  /** What the epochs so far came to. */
  get history(): readonly EpochReport[] {
    return this.#history;
  }

  /** Whether all epochs are done, or `patience` is at its end. */
  get isDone(): boolean {
    const { epochs } = this.#settings;
    return this.#history.length >= epochs || this.#isOutOfPatience;
  }

  get #isOutOfPatience(): boolean {
    const { patience } = this.#settings;
    return patience !== undefined && this.#best !== undefined &&
      this.#history.length - this.#best.epoch >= patience;
  }

  /** Runs the next epoch. Throws `non-finite` if its loss is no number. */
  runEpoch(): EpochReport {
    const { batchSize, learningRate: rate, schedule, epochs, seed } = this.#settings;
    const epoch = this.#history.length;
    const learningRate = rate * learningRateShare(schedule, epoch, epochs);
    const order = GraphBatches.order(this.#train, { batchSize, seed, epoch });
    order.forEach((objects, step) => this.#step(objects, { epoch, step, learningRate }));
    const report = { ...this.#summary(order, epoch + 1, learningRate), ...this.#watch() };
    this.#history.push(report);
    this.#remember(report);
    return report;
  }

  #step(
    objects: readonly number[],
    at: { readonly epoch: number; readonly step: number; readonly learningRate: number },
  ): void {
    const { seed, batchSize } = this.#settings;
    const tape = this.#tape;
    tape.begin({ training: true, seed: new Random(seed, "dropout", at.epoch, at.step).word() });
    const { parameters } = this.#network;
    parameters.clearGradients();
    const batch = this.#network.upload(tape, this.#batches.collate(objects));
    const { logits, fused } = this.#network.forward(tape, batch);
    const { penalty, transportCost } = fused;
    const place = (buffer: DeviceBuffer, start = at.step * placesOf(batchSize)) => ({
      buffer: regionOn(buffer, tape.device).buffer,
      byteOffset: 4 * start,
    });
    if (transportCost) {
      const out = place(this.#costs, 4 * at.step);
      combine(tape.native, { alpha: 1, x: transportCost.place, out, count: 1 });
    }
    const { loss } = crossEntropy(tape, logits, batch.labels, {
      labelled: batch.labelled,
      rowLosses: place(this.#losses),
      predictions: place(this.#predictions),
    });
    tape.backward(totalLoss(tape, loss, penalty));
    this.#adam.step(at.learningRate);
  }

  /** Waits for the epoch's steps, and reads what they left. */
  #summary(order: readonly (readonly number[])[], epoch: number, learningRate: number) {
    const places = placesOf(this.#settings.batchSize);
    const losses = this.#losses.download();
    const predictions = this.#predictions.download();
    let [loss, right] = [0, 0];
    order.forEach((objects, step) =>
      objects.forEach((object, i) => {
        loss += losses[step * places + i]!;
        right += Number(predictions[step * places + i] === this.#batches.classes[object]);
      })
    );
    const count = this.#train.length;
    if (!Number.isFinite(loss)) {
      const message = `The loss of epoch ${epoch} is ${loss / count}: lower the learning rate ` +
        `(${this.#settings.learningRate}), or scale the features`;
      throw new PackhorseError("non-finite", message);
    }
    const share = { epoch, learningRate, loss: loss / count, accuracy: right / count };
    if (this.#network.options.fusion !== "amosl") return share;
    const costs = this.#costs.download();
    const transportCost = order.reduce((sum, _, step) => sum + costs[4 * step]!, 0) / order.length;
    return { ...share, transportCost };
  }

  /** Measures the watched objects. */
  #watch(): { validationLoss?: number; validationAccuracy?: number } {
    if (this.#watched.length === 0) return {};
    const objects = this.#watched;
    const { loss, accuracy } = evaluateBatches(this.#network, this.#tape, this.#batches, {
      objects,
    });
    return { validationLoss: loss, validationAccuracy: accuracy };
  }

  #remember({ epoch, validationLoss: loss }: EpochReport): void {
    if (this.#settings.patience === undefined || loss === undefined) return;
    if (this.#best !== undefined && loss >= this.#best.loss) return;
    this.#best = { epoch, loss, values: this.#network.parameters.read() };
  }

  /** Writes a checkpoint, which also serves as a file of the model with its parameters so far. */
  async save(path: string): Promise<void> {
    const { step, first, second } = this.#adam.read();
    const best = this.#best;
    await saveNetwork(this.#network, path, {
      documents: {
        training: {
          settings: this.#settings,
          dataChecksum: this.#dataChecksum,
          history: this.#history,
          step,
          ...(best ? { best: { epoch: best.epoch, loss: best.loss } } : {}),
        },
      },
      lists: {
        "adam.first": first,
        "adam.second": second,
        ...(best
          ? { "best.parameters": best.values.parameters, "best.state": best.values.state }
          : {}),
      },
    });
  }

  /** Ends the run: the model, with its best parameters if they were looked for, is the caller's to dispose. */
  finish(): TrainingResult {
    if (this.#best) this.#network.parameters.write(this.#best.values);
    this.#isFinished = true;
    const model = adoptNetwork(this.#network);
    return {
      model,
      history: this.#history,
      epoch: this.#best?.epoch ?? this.#history.length,
      stoppedEarly: this.#history.length < this.epochs,
      [Symbol.dispose]: () => model[Symbol.dispose](),
    };
  }

  /** Frees what it holds on the device; the model too, unless the run was ended by {@linkcode finish}. */
  [Symbol.dispose](): void {
    for (const owned of [this.#adam, this.#tape, this.#losses, this.#predictions, this.#costs]) {
      owned[Symbol.dispose]();
    }
    if (!this.#isFinished) this.#network[Symbol.dispose]();
  }
}

/** Elements that a step's losses take: places of tensors are multiples of 16 bytes. */
const placesOf = (batchSize: number) => Math.ceil(batchSize / 4) * 4;

const lengthsOf = ({ parameters, state }: ParameterValues) => ({
  parameters: parameters.length,
  state: state.length,
});

function checksumOf({ views, labels }: GraphDataset): number {
  const arrays = views.flatMap((view) => [
    ...[view.nodeOffsets, view.edgeOffsets, view.sources, view.targets],
    ...[view.nodes.attributes, view.nodes.labels, view.edges.attributes, view.edges.labels],
  ]);
  return [labels, ...arrays].reduce(
    (sum, { buffer, byteOffset, byteLength }) =>
      checksum(new Uint8Array(buffer, byteOffset, byteLength), sum),
    0,
  );
}

function refuse(reason: string): never {
  throw new PackhorseError("invalid-argument", `Cannot train: ${reason}`);
}

function resolveSettings(settings: TrainingSettings): Settings {
  const { model, objects, patience } = settings;
  const {
    epochs = 60,
    batchSize = 64,
    learningRate = 0.005,
    schedule = { kind: "cosine" },
    weightDecay = 1e-4,
    clipNorm = 5,
    seed = 0,
    validationShare = patience === undefined ? 0 : 0.1,
  } = settings;
  const counts = { epochs, batchSize, ...(patience === undefined ? {} : { patience }) };
  for (const [name, value] of Object.entries(counts)) {
    if (!(Number.isInteger(value) && value >= 1)) {
      refuse(`${name} must be an integer from 1 on, got ${value}`);
    }
  }
  for (const [name, value] of Object.entries({ learningRate, clipNorm })) {
    if (!(value > 0 && Number.isFinite(Math.fround(value)))) {
      refuse(`${name} must be above 0, got ${value}`);
    }
  }
  if (!(weightDecay >= 0 && weightDecay <= 1)) {
    refuse(`weightDecay must be from 0 to 1, got ${weightDecay}`);
  }
  if (!(validationShare >= 0 && validationShare < 1)) {
    refuse(`validationShare must be from 0 to below 1, got ${validationShare}`);
  }
  if (patience !== undefined && validationShare === 0) {
    refuse("patience needs objects to watch: give a validationShare above 0");
  }
  if (objects !== undefined && !Array.isArray(objects)) refuse("objects must be a list");
  if (typeof schedule !== "object" || schedule === null) refuse("schedule must be an object");
  if (!Number.isSafeInteger(seed)) refuse(`seed must be an integer, got ${seed}`);
  learningRateShare(schedule, 0, epochs);
  return {
    ...{ epochs, batchSize, learningRate, schedule, weightDecay, clipNorm, seed, validationShare },
    ...{ model, objects, patience },
  };
}
