import type { Device } from "../device/device.ts";
import { PackhorseError } from "../error.ts";
import { type GraphBatch, GraphBatches } from "./batch.ts";
import type { GraphModelOptions } from "./classifier.ts";
import type { GraphDataset } from "./dataset.ts";
import { type DeviceBatch, uploadBatch } from "./device_batch.ts";
import { AmoslFusion } from "./amosl_fusion.ts";
import { type FusedViews, type Fusion, LateFusion } from "./fusion.ts";
import { joinedSchema, joinViews } from "./join_views.ts";
import { GraphEncoder, Linear, SELF_LOOPS } from "./layers.ts";
import { activate, add, dropout } from "./operations.ts";
import { Parameters } from "./parameters.ts";
import { edgeWidth, type GraphSchema, nodeWidth, type ViewSchema } from "./schema.ts";
import type { Tape, Tensor } from "./tape.ts";

/** Options with nothing left open. */
export type ResolvedModelOptions = {
  readonly [Name in keyof GraphModelOptions]-?: Exclude<GraphModelOptions[Name], undefined>;
};

/** What {@linkcode GraphNetwork.forward} returns. */
export interface NetworkOutput {
  /** `[objects, classes]`. */
  readonly logits: Tensor;
  /** What the fusion made of the views. */
  readonly fused: FusedViews;
}

/** Tells classes of objects apart that are seen as graphs: encoders of views, a fusion, and two linear layers. */
export class GraphNetwork implements Disposable {
  readonly schema: GraphSchema;
  readonly options: ResolvedModelOptions;
  readonly parameters = new Parameters();
  readonly #encoders: readonly GraphEncoder[];
  readonly #fusion: Fusion;
  readonly #hidden: Linear;
  readonly #last: Linear;

  /** Its parameters have no place yet, see {@linkcode place}. Throws `invalid-argument` for options that are none. */
  constructor(schema: GraphSchema, options: GraphModelOptions = {}) {
    this.schema = schema;
    this.options = resolveOptions(schema, options);
    const { width, layer: kind, readout } = this.options;
    const { parameters } = this;
    const views = encodedViews(schema, this.options);
    this.#encoders = views.map((view, i) =>
      new GraphEncoder({ parameters, name: `encoders.${i}` }, {
        ...this.options,
        kind,
        inputs: nodeWidth(view),
        edgeWidth: edgeWidth(view),
      })
    );
    const context = { parameters, name: "fusion" };
    const shape = { views: views.length, width, readout };
    this.#fusion = this.options.fusion === "amosl"
      ? new AmoslFusion(context, { ...this.options, inputs: views.map(nodeWidth) })
      : new LateFusion(context, shape);
    if (this.options.fusion === "amosl") {
      // Where views have the same features, nodes that look alike begin alike, so that correspondences begin well.
      for (const [i, view] of views.entries()) {
        if (i === 0 || nodeWidth(view) !== nodeWidth(views[0]!)) continue;
        if (edgeWidth(view) !== edgeWidth(views[0]!)) continue;
        parameters.beginAlike(`encoders.${i}`, "encoders.0");
        parameters.beginAlike(`fusion.projections.${i}`, "fusion.projections.0");
      }
    }
    const { width: fused } = this.#fusion;
    this.#hidden = new Linear({ parameters, name: "head.0" }, { inputs: fused, outputs: width });
    const outputs = schema.classes.length;
    this.#last = new Linear({ parameters, name: "head.1" }, { inputs: width, outputs });
  }

  /** Gives the parameters a place on a device, and their first values. */
  place(device: Device): this {
    this.parameters.place(device, this.options.seed);
    return this;
  }

  /** The device that the parameters are on. */
  get device(): Device {
    return this.parameters.device;
  }

  /** A data set as the model takes it in batches. Throws `invalid-argument` if it is not of the model's kind. */
  batches(dataset: GraphDataset): GraphBatches {
    const { fusion, view } = this.options;
    const { schema } = this;
    // Of all views, so that a data set that does not fit is refused whatever the model uses of it.
    const all = new GraphBatches(dataset, { schema });
    if (fusion === "single" && dataset.views.length > 1) {
      const views = encodedViews(schema, this.options);
      return new GraphBatches(dataset.select([view]), { schema: { ...schema, views } });
    }
    if (fusion !== "early") return all;
    const views = encodedViews(schema, this.options);
    return new GraphBatches(joinViews(dataset, schema), { schema: { ...schema, views } });
  }

  /** Copies a batch of {@linkcode batches} to the device, for {@linkcode forward}. */
  upload(tape: Tape, batch: GraphBatch): DeviceBatch {
    return uploadBatch(tape, batch, { selfLoops: SELF_LOOPS[this.options.layer] });
  }

  /** Computes the logits of a batch. */
  forward(tape: Tape, batch: DeviceBatch): NetworkOutput {
    const encoded = batch.views.map((view, i) => ({
      view,
      nodes: this.#encoders[i]!.forward(tape, view),
    }));
    const fused = this.#fusion.fuse(tape, encoded, batch);
    const { activation, headDropout } = this.options;
    const hidden = activate(tape, this.#hidden.forward(tape, fused.embedding), activation);
    return { logits: this.#last.forward(tape, dropout(tape, hidden, headDropout)), fused };
  }

  /** Frees the memory of the parameters. */
  [Symbol.dispose](): void {
    this.parameters[Symbol.dispose]();
  }
}

/** The loss and what the fusion adds to it. */
export function totalLoss(tape: Tape, loss: Tensor, penalty: Tensor | undefined): Tensor {
  return penalty === undefined ? loss : add(tape, loss, penalty);
}

/** The schemas of what encoders see. */
function encodedViews(
  { views }: GraphSchema,
  { fusion, view }: Pick<ResolvedModelOptions, "fusion" | "view">,
): readonly ViewSchema[] {
  if (fusion === "single") return [views[view]!];
  return fusion === "early" ? [joinedSchema(views)] : views;
}

function resolveOptions(schema: GraphSchema, options: GraphModelOptions): ResolvedModelOptions {
  const views = schema.views.length;
  const {
    fusion = views === 1 ? "single" : "late",
    view = 0,
    layer = "gin",
    layers = 3,
    width = 64,
    readout = "sum",
    epsilon = 0.05,
    gradient = "implicit",
    penalty = "learned",
    pairs = "all",
    cost = "sqeuclidean",
    activation = "relu",
    normalisation = "batch",
    heads = 4,
    dropout = 0,
    headDropout = 0.2,
    seed = 0,
  } = options;
  const refuse = (reason: string): never => {
    throw new PackhorseError("invalid-argument", `Cannot make a graph model: ${reason}`);
  };
  const choices = {
    fusion: [fusion, ["single", "early", "late", "amosl"]],
    gradient: [gradient, ["implicit", "envelope", "unrolled", "detached", "exact"]],
    pairs: [pairs, ["all", "star"]],
    cost: [cost, ["sqeuclidean", "cosine"]],
    layer: [layer, ["gcn", "sage", "gin", "gat"]],
    readout: [readout, ["sum", "mean", "max", "attention"]],
    normalisation: [normalisation, ["batch", "layer", "none"]],
    activation: [activation, ["relu", "leaky-relu", "gelu", "tanh", "sigmoid", "softplus"]],
  } as const;
  for (const [name, [value, allowed]] of Object.entries(choices)) {
    if ((allowed as readonly string[]).includes(value)) continue;
    refuse(`${name} must be one of ${allowed.join(", ")}, got ${value}`);
  }
  for (const [name, value] of Object.entries({ layers, width, heads })) {
    const most = name === "layers" ? 256 : 65536;
    if (!(Number.isInteger(value) && value >= 1 && value <= most)) {
      refuse(`${name} must be an integer from 1 to ${most}, got ${value}`);
    }
  }
  for (const [name, value] of Object.entries({ dropout, headDropout })) {
    if (!(value >= 0 && value < 1)) refuse(`${name} must be from 0 to below 1, got ${value}`);
  }
  if (!(Number.isInteger(view) && view >= 0 && view < views)) {
    refuse(`view must be an integer from 0 to ${views - 1}, got ${view}`);
  }
  if (fusion === "amosl" && views < 2) refuse("fusion amosl needs two views or more, there is one");
  if (!(epsilon > 0 && epsilon < Infinity)) refuse(`epsilon must be above 0, got ${epsilon}`);
  const isWeight = typeof penalty === "number" && penalty >= 0 && penalty < Infinity;
  if (!isWeight && penalty !== "learned" && penalty !== "margin") {
    refuse(`penalty must be learned, margin, or a number that is not negative, got ${penalty}`);
  }
  if (!Number.isSafeInteger(seed)) refuse(`seed must be an integer, got ${seed}`);
  return {
    ...{ fusion, view, layer, layers, width, readout, activation, normalisation, heads },
    ...{ dropout, headDropout, seed, epsilon, gradient, penalty, pairs, cost },
  };
}
