import { PackhorseError } from "../error.ts";
import type { DeviceView, SelfLoops } from "./device_batch.ts";
import {
  activate,
  type Activation,
  add,
  addBias,
  aggregate,
  batchNorm,
  dropout,
  headDot,
  layerNorm,
  linear,
  segmentMax,
  segmentSoftmax,
} from "./operations.ts";
import type { Parameters } from "./parameters.ts";
import type { Tape, Tensor } from "./tape.ts";

/** Kinds of layers that pass messages along edges. */
export type GraphLayerKind = "gcn" | "sage" | "gin" | "gat";

/** What is normalised: columns over the batch, rows, or nothing. */
export type Normalisation = "batch" | "layer" | "none";

/** What a model's parts are built with. */
export interface LayerContext {
  readonly parameters: Parameters;
  /** What the names of its parameters begin with. */
  readonly name: string;
}

/** Sizes of a layer. */
export interface LayerShape {
  readonly inputs: number;
  readonly outputs: number;
}

/** Options of a layer that passes messages. */
export interface GraphLayerOptions extends LayerShape {
  /** Features of an edge, 0 if it has none. */
  readonly edgeWidth: number;
  readonly activation: Activation;
  readonly normalisation: Normalisation;
  /** Heads of gat. */
  readonly heads: number;
  /** Probability that gat leaves out an edge while training. */
  readonly dropout: number;
}

/** A layer that passes messages along edges: `[nodes, inputs]` to `[nodes, outputs]`. */
export interface GraphLayer {
  forward(tape: Tape, x: Tensor, view: DeviceView): Tensor;
}

const within = ({ parameters, name }: LayerContext, part: string): LayerContext => ({
  parameters,
  name: `${name}.${part}`,
});

/** `x W + b`; both begin uniform within one over the root of the inputs. */
export class Linear {
  readonly #weight: () => Tensor;
  readonly #bias: (() => Tensor) | undefined;

  constructor(
    { parameters, name }: LayerContext,
    { inputs, outputs, bias = true }: LayerShape & { readonly bias?: boolean },
  ) {
    const initial = { bound: 1 / Math.sqrt(inputs) };
    this.#weight = parameters.learn(`${name}.weight`, [inputs, outputs], initial);
    this.#bias = bias ? parameters.learn(`${name}.bias`, [1, outputs], initial) : undefined;
  }

  forward(tape: Tape, x: Tensor): Tensor {
    return linear(tape, x, this.#weight(), this.#bias?.());
  }
}

/** Edges from nodes to themselves, as a kind of layer takes them: gcn counts each node once, whatever edges there are. */
export const SELF_LOOPS: Readonly<Record<GraphLayerKind, SelfLoops>> = {
  gcn: "remove",
  sage: "keep",
  gin: "keep",
  gat: "replace",
};

/** Normalises by batch or layer, or not at all. */
export class Norm {
  readonly #forward: (tape: Tape, x: Tensor) => Tensor;

  constructor(
    { parameters, name }: LayerContext,
    { kind, width }: { readonly kind: Normalisation; readonly width: number },
  ) {
    if (kind === "none") {
      this.#forward = (_, x) => x;
      return;
    }
    const weight = parameters.learn(`${name}.weight`, [1, width], 1);
    const bias = parameters.learn(`${name}.bias`, [1, width], 0);
    if (kind === "layer") {
      this.#forward = (tape, x) => layerNorm(tape, x, { weight: weight(), bias: bias() });
      return;
    }
    const mean = parameters.count(`${name}.running_mean`, [1, width], 0);
    const variance = parameters.count(`${name}.running_variance`, [1, width], 1);
    this.#forward = (tape, x) =>
      batchNorm(tape, x, {
        ...{ weight: weight(), bias: bias() },
        ...{ runningMean: mean(), runningVariance: variance() },
      });
  }

  forward(tape: Tape, x: Tensor): Tensor {
    return this.#forward(tape, x);
  }
}

/**
 * Graph convolution (Kipf and Welling, arXiv 1609.02907): with d the edges into a node from
 * others and one more, `out_i = sum over edges from j to i, and j = i, of x_j / sqrt(d_i d_j)`, times a matrix, plus a bias.
 */
class GcnLayer implements GraphLayer {
  readonly #linear: Linear;

  constructor(context: LayerContext, shape: LayerShape) {
    this.#linear = new Linear(context, shape);
  }

  forward(tape: Tape, x: Tensor, { neighbours, inverseRootDegree }: DeviceView): Tensor {
    const scales = { rowScale: inverseRootDegree, columnScale: inverseRootDegree };
    return this.#linear.forward(tape, aggregate(tape, x, neighbours, { self: 1, ...scales }));
  }
}

/** GraphSAGE (Hamilton et al., arXiv 1706.02216): `out_i = mean of x_j over edges from j to i, times W, + x_i V + b`. */
class SageLayer implements GraphLayer {
  readonly #ofNeighbours: Linear;
  readonly #ofSelf: Linear;

  constructor(context: LayerContext, shape: LayerShape) {
    this.#ofNeighbours = new Linear(within(context, "neighbours"), shape);
    this.#ofSelf = new Linear(within(context, "self"), { ...shape, bias: false });
  }

  forward(tape: Tape, x: Tensor, { neighbours, inverseDegree }: DeviceView): Tensor {
    const mean = aggregate(tape, x, neighbours, { rowScale: inverseDegree });
    return add(tape, this.#ofNeighbours.forward(tape, mean), this.#ofSelf.forward(tape, x));
  }
}

/**
 * Graph isomorphism network (Xu et al., arXiv 1810.00826): `out_i = mlp(x_i + sum of x_j over edges from j to i)`. Edge
 * features e take part as `relu(x_j + e W + b)` in place of x_j (Hu et al., arXiv 1905.12265).
 */
class GinLayer implements GraphLayer {
  readonly #ofEdges: Linear | undefined;
  readonly #first: Linear;
  readonly #norm: Norm;
  readonly #second: Linear;
  readonly #activation: Activation;

  constructor(context: LayerContext, options: GraphLayerOptions) {
    const { inputs, outputs, edgeWidth, normalisation, activation } = options;
    this.#ofEdges = edgeWidth === 0
      ? undefined
      : new Linear(within(context, "edges"), { inputs: edgeWidth, outputs: inputs });
    this.#first = new Linear(within(context, "first"), { inputs, outputs });
    this.#norm = new Norm(within(context, "norm"), { kind: normalisation, width: outputs });
    this.#second = new Linear(within(context, "second"), { inputs: outputs, outputs });
    this.#activation = activation;
  }

  forward(tape: Tape, x: Tensor, view: DeviceView): Tensor {
    const hidden = this.#first.forward(tape, this.#sum(tape, x, view));
    const active = activate(tape, this.#norm.forward(tape, hidden), this.#activation);
    return this.#second.forward(tape, active);
  }

  #sum(tape: Tape, x: Tensor, view: DeviceView): Tensor {
    const { neighbours, sources, incoming, edgeFeatures } = view;
    if (!this.#ofEdges || !edgeFeatures) return aggregate(tape, x, neighbours, { self: 1 });
    const ofSources = aggregate(tape, x, sources);
    const messages = add(tape, ofSources, this.#ofEdges.forward(tape, edgeFeatures));
    return add(tape, x, aggregate(tape, activate(tape, messages, "relu"), incoming));
  }
}

/**
 * Graph attention (Veličković et al., arXiv 1710.10903): in each head, `out_i = sum of p_ij W x_j` over edges from j to i and
 * j = i, where p is the softmax over j of `leaky relu(a . W x_i + b . W x_j + c . V e_ij)`. Heads stand side by side.
 */
class GatLayer implements GraphLayer {
  readonly #heads: number;
  readonly #dropout: number;
  readonly #linear: Linear;
  readonly #ofEdges: Linear | undefined;
  readonly #attention: Readonly<Record<"target" | "source" | "edge", (() => Tensor) | undefined>>;
  readonly #bias: () => Tensor;

  constructor(context: LayerContext, options: GraphLayerOptions) {
    const { inputs, outputs, edgeWidth, heads, dropout } = options;
    if (outputs % heads !== 0) {
      const message =
        `Cannot make a layer of ${heads} heads: its width, ${outputs}, must be a multiple`;
      throw new PackhorseError("invalid-argument", message);
    }
    const { parameters, name } = context;
    const learn = (part: string) =>
      parameters.learn(`${name}.attention_${part}`, [1, outputs], {
        bound: Math.sqrt(6 / (heads + outputs / heads)),
      });
    this.#heads = heads;
    this.#dropout = dropout;
    this.#linear = new Linear(within(context, "linear"), { inputs, outputs, bias: false });
    this.#ofEdges = edgeWidth === 0
      ? undefined
      : new Linear(within(context, "edges"), { inputs: edgeWidth, outputs, bias: false });
    this.#attention = {
      target: learn("target"),
      source: learn("source"),
      edge: edgeWidth === 0 ? undefined : learn("edge"),
    };
    this.#bias = parameters.learn(`${name}.bias`, [1, outputs], 0);
  }

  forward(tape: Tape, x: Tensor, view: DeviceView): Tensor {
    const { neighbours, sources, targets, incomingSegments, edgeFeatures } = view;
    const { target, source, edge } = this.#attention;
    const values = this.#linear.forward(tape, x);
    const score = (of: Tensor, a: () => Tensor) => headDot(tape, of, a(), this.#heads);
    let scores = add(
      tape,
      aggregate(tape, score(values, target!), targets),
      aggregate(tape, score(values, source!), sources),
    );
    if (this.#ofEdges && edge && edgeFeatures) {
      scores = add(tape, scores, score(this.#ofEdges.forward(tape, edgeFeatures), edge));
    }
    const shares = segmentSoftmax(
      tape,
      activate(tape, scores, "leaky-relu", 0.2),
      incomingSegments,
    );
    const weights = dropout(tape, shares, this.#dropout);
    return addBias(tape, aggregate(tape, values, neighbours, { weights }), this.#bias());
  }
}

/** Makes a layer that passes messages. */
export function createGraphLayer(
  kind: GraphLayerKind,
  context: LayerContext,
  options: GraphLayerOptions,
): GraphLayer {
  switch (kind) {
    case "gcn":
      return new GcnLayer(context, options);
    case "sage":
      return new SageLayer(context, options);
    case "gin":
      return new GinLayer(context, options);
    case "gat":
      return new GatLayer(context, options);
  }
}

/** How nodes become one row for each object. */
export type ReadoutKind = "sum" | "mean" | "max" | "attention";

/** Turns `[nodes, width]` into `[objects, width]`; an object without nodes gets zeros. */
export class Readout {
  readonly #kind: ReadoutKind;
  readonly #gate: Linear | undefined;

  constructor(
    context: LayerContext,
    { kind, width }: { readonly kind: ReadoutKind; readonly width: number },
  ) {
    this.#kind = kind;
    this.#gate = kind === "attention"
      ? new Linear(within(context, "gate"), { inputs: width, outputs: 1 })
      : undefined;
  }

  forward(tape: Tape, x: Tensor, { members, memberSegments, inverseSize }: DeviceView): Tensor {
    switch (this.#kind) {
      case "sum":
        return aggregate(tape, x, members);
      case "mean":
        return aggregate(tape, x, members, { rowScale: inverseSize });
      case "max":
        return segmentMax(tape, x, memberSegments);
      case "attention": {
        // The sum over nodes, weighted by the softmax of a score.
        const weights = segmentSoftmax(tape, this.#gate!.forward(tape, x), memberSegments);
        return aggregate(tape, x, members, { weights });
      }
    }
  }
}

/** Options of a {@linkcode GraphEncoder}. */
export interface GraphEncoderOptions {
  readonly kind: GraphLayerKind;
  readonly layers: number;
  readonly width: number;
  readonly inputs: number;
  readonly edgeWidth: number;
  readonly activation: Activation;
  readonly normalisation: Normalisation;
  readonly heads: number;
  readonly dropout: number;
}

/** Layers that pass messages, each normalised and activated: `[nodes, inputs]` to `[nodes, width]`. */
export class GraphEncoder {
  readonly #layers: { readonly pass: GraphLayer; readonly norm: Norm }[];
  readonly #options: GraphEncoderOptions;

  constructor(context: LayerContext, options: GraphEncoderOptions) {
    const { kind, layers, width, inputs, normalisation } = options;
    this.#options = options;
    this.#layers = Array.from({ length: layers }, (_, i) => {
      const own = within(context, String(i));
      return {
        pass: createGraphLayer(kind, own, {
          ...options,
          inputs: i === 0 ? inputs : width,
          outputs: width,
        }),
        norm: new Norm(within(own, "norm_after"), { kind: normalisation, width }),
      };
    });
  }

  forward(tape: Tape, view: DeviceView): Tensor {
    const { activation, dropout: probability } = this.#options;
    let x = view.features;
    for (const { pass, norm } of this.#layers) {
      const active = activate(tape, norm.forward(tape, pass.forward(tape, x, view)), activation);
      x = dropout(tape, active, probability);
    }
    return x;
  }
}
