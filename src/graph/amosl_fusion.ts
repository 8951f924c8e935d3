import type { NativeTensor } from "../../ffi/tensor.ts";
import * as native from "../../ffi/graph.ts";
import type { DeviceBuffer } from "../device/device_buffer.ts";
import { regionOn } from "../device/device_buffer.ts";
import { exactTransport, sinkhorn, type TransportSolution } from "../ot/mod.ts";
import type { DeviceBatch } from "./device_batch.ts";
import type { EncodedView, FusedViews, Fusion, ViewTransport } from "./fusion.ts";
import {
  type LayerContext,
  Linear,
  Norm,
  type Normalisation,
  Readout,
  type ReadoutKind,
} from "./layers.ts";
import {
  activate,
  type Activation,
  add,
  aggregate,
  batchNorm,
  combine,
  concatenate,
  layerNorm,
  linear,
  product,
  scale,
  type SparsePattern,
} from "./operations.ts";
import { type PairLayout, pairLayout } from "./pair_layout.ts";
import { type Tape, Tensor } from "./tape.ts";

/**
 * How a loss reaches embeddings through transport plans.
 *
 * - `implicit`: exactly, by the conditions that a plan fulfils.
 * - `unrolled`: through the iterations that found it.
 * - `envelope`: plans count as constants; the costs in the penalty have gradients. This is the gradient of the penalty
 *   whose entropy is added, and none of what is fused.
 * - `detached`: nothing goes back through transport: projections stay as they began, and the penalty moves its own weight
 *   alone.
 * - `exact`: as `envelope`, by plans without entropy.
 */
export type TransportGradient = "implicit" | "envelope" | "unrolled" | "detached" | "exact";

/**
 * What transport adds to the loss, for the mean D over objects of what it costs:
 *
 * - `learned`: `w D - s log w`, w between 0 and 1 and learned. Without the logarithm w would go to 0, as D is never
 *   negative; with it, w strives to s / D: views that are near each other already weigh more.
 * - `margin`: the mean of `max(0, D - m)`, and half of m, which is learned: it strives to the median of the objects' D. Only
 *   objects whose views are further apart than that are drawn together, and none is once it is within.
 * - a number: that times D.
 */
export type TransportPenalty = "learned" | "margin" | number;

/** Options of {@linkcode AmoslFusion}. */
export interface AmoslFusionOptions {
  /** Features of a node in each view. */
  readonly inputs: readonly number[];
  /** Columns of nodes' embeddings, and of what is fused. */
  readonly width: number;
  readonly readout: ReadoutKind;
  readonly activation: Activation;
  readonly normalisation: Normalisation;
  readonly epsilon: number;
  readonly gradient: TransportGradient;
  readonly penalty: TransportPenalty;
  readonly pairs: "all" | "star";
  readonly cost: "sqeuclidean" | "cosine";
  /** The error of masses at which Sinkhorn's iterations stop. Default: 1e-4. */
  readonly tolerance?: number | undefined;
}

/** What keeps a learned weight from 0. */
const STRENGTH = 0.1;
/** The weight of the margin form. */
const MARGIN_WEIGHT = 0.2;

/**
 * Fusion of views whose nodes do not correspond one to one, by optimal transport between their embeddings; after the abstract
 * of AMoSL (arXiv 2406.02348), an independent implementation.
 *
 * For embeddings `Z_v [nodes, width]` of each view, and each pair of views u, v, object by object:
 *
 * - projections `P_v = norm(Z_v A_v) / sqrt(2 width)`, whose columns have variance 1 over the nodes of a batch before they
 *   are divided. So they cannot shrink, nor all become one point, and two nodes taken at random cost 1 on average: epsilon
 *   and costs mean the same all along;
 * - costs `C_ij = |P_u,i - P_v,j|^2`, or of rows normalised to length 1 as well, which is one less their cosine;
 * - the plan `T = argmin <T, C> - epsilon H(T)` between uniform masses, each node of view u as much as the others;
 * - messages `M_u = diag(1/a) T Z_v` and `M_v = diag(1/b) T' Z_u`: what corresponds to a node, on average;
 * - `H_u = Z_u + activation(norm([Z_u, M_u, ...] W_u + c_u))`, with the messages of all views that u is compared with.
 *
 * Then views are read out, and put side by side. An object that lacks one of two views has no plan for them: its messages
 * are 0.
 */
export class AmoslFusion implements Fusion {
  readonly width: number;
  readonly #options: AmoslFusionOptions;
  readonly #projections: readonly Projection[];
  readonly #pairs: readonly (readonly [number, number])[];
  readonly #combinations: readonly { readonly linear: Linear; readonly norm: Norm }[];
  readonly #readouts: readonly Readout[];
  /** What the weight or the margins follow from. */
  readonly #learned: (() => Tensor) | undefined;

  constructor({ parameters, name }: LayerContext, options: AmoslFusionOptions) {
    const { inputs, width, readout: kind, normalisation, pairs, cost, penalty } = options;
    this.#options = options;
    const views = inputs.length;
    this.width = views * width;
    const all = Array.from({ length: views }, (_, view) => view);
    this.#pairs = all.flatMap((first) =>
      all.slice(first + 1).map((second) => [first, second] as const)
    ).filter(([first]) => pairs === "all" || first === 0);
    const part = (what: string, view: number) => ({ parameters, name: `${name}.${what}.${view}` });
    this.#projections = all.map((view) =>
      new Projection(part("projections", view), { inputs: inputs[view]! + width, width, cost })
    );
    this.#combinations = all.map((view) => {
      const partners = this.#pairs.filter((pair) => pair.includes(view)).length;
      const own = part("combinations", view);
      return {
        linear: new Linear(own, { inputs: (1 + 2 * partners) * width, outputs: width }),
        norm: new Norm({ parameters, name: `${own.name}.norm` }, { kind: normalisation, width }),
      };
    });
    this.#readouts = all.map((view) => new Readout(part("readouts", view), { kind, width }));
    if (penalty === "learned") this.#learned = parameters.learn(`${name}.weight`, [1, 1], 0);
    if (penalty === "margin") this.#learned = parameters.learn(`${name}.margin`, [1, 1], 0);
  }

  fuse(tape: Tape, views: readonly EncodedView[], batch: DeviceBatch): FusedViews {
    const { activation, penalty } = this.#options;
    const projected = views.map(({ nodes, view: { features } }, view) =>
      this.#projections[view]!.forward(tape, concatenate(tape, [features, nodes]))
    );
    const messages: Tensor[][] = views.map(() => []);
    const transports: ViewTransport[] = [];
    const distances: { readonly perObject: Tensor; readonly objects: number }[] = [];
    for (const pair of this.#pairs) {
      const [first, second] = pair;
      const layout = pairLayout(tape, batch, pair);
      if (layout === undefined) {
        for (const view of pair) {
          const { rows, columns } = views[view]!.nodes;
          messages[view]!.push(tape.filled(rows, columns, 0));
        }
        continue;
      }
      const { solution, plan } = this.#transport(tape, layout, [
        projected[first]!,
        projected[second]!,
      ]);
      const transposed = aggregate(tape, plan, layout.transpose);
      const { nodes: ofFirst, view } = views[first]!;
      const { nodes: ofSecond } = views[second]!;
      const { forward, backward, rowSizes: rowScale, columnSizes } = layout;
      messages[first]!.push(aggregate(tape, ofSecond, forward, { weights: plan, rowScale }));
      messages[second]!.push(
        aggregate(tape, ofFirst, backward, { weights: transposed, rowScale: columnSizes }),
      );
      const points = [projected[first]!, projected[second]!].map((points) =>
        this.#options.gradient === "detached" ? new Tensor(points.place, points) : points
      ) as [Tensor, Tensor];
      const ofNodes = transportCosts(tape, points, forward, plan);
      const perObject = aggregate(tape, ofNodes, view.members);
      distances.push({ perObject, objects: layout.objects.length });
      transports.push({ views: pair, objects: layout.objects, solution });
    }
    const readouts = views.map(({ nodes, view }, i) => {
      const { linear, norm } = this.#combinations[i]!;
      const differences = messages[i]!.map((message) => {
        const difference = combine(tape, 1, nodes, -1, message);
        return product(tape, difference, difference);
      });
      const all = concatenate(tape, [nodes, ...messages[i]!, ...differences]);
      const change = activate(tape, norm.forward(tape, linear.forward(tape, all)), activation);
      return this.#readouts[i]!.forward(tape, add(tape, nodes, change), view);
    }) as [Tensor, ...Tensor[]];
    const embedding = concatenate(tape, readouts);
    const means = distances.map(({ perObject, objects }) => meanOf(tape, perObject, objects));
    const transportCost = average(tape, means);
    if (transportCost === undefined) return { embedding, transports };
    const rest = { embedding, transports, transportCost };
    if (typeof penalty === "number") {
      return penalty === 0 ? rest : { ...rest, penalty: scale(tape, transportCost, penalty) };
    }
    const learned = this.#learned!();
    if (penalty === "learned") {
      const weighted = product(tape, activate(tape, learned, "sigmoid"), transportCost);
      const minusLog = activate(tape, scale(tape, learned, -1), "softplus");
      return { ...rest, penalty: add(tape, weighted, scale(tape, minusLog, STRENGTH)) };
    }
    const margin = activate(tape, learned, "softplus");
    const beyond = distances.map(({ perObject, objects }) => {
      // An object without the pair costs 0, which is within any margin.
      const spread = linear(tape, tape.filled(perObject.rows, 1, 1), scale(tape, margin, -1));
      return meanOf(tape, activate(tape, add(tape, perObject, spread), "relu"), objects);
    });
    const sum = add(tape, average(tape, beyond)!, scale(tape, margin, 0.5));
    return { ...rest, penalty: scale(tape, sum, MARGIN_WEIGHT) };
  }

  /** Solves the problems of a pair; the plans are a tensor of the step, `[entries, 1]`. */
  #transport(
    tape: Tape,
    layout: PairLayout,
    projected: readonly [Tensor, Tensor],
  ): { readonly solution: TransportSolution; readonly plan: Tensor } {
    const { epsilon, gradient, tolerance = 1e-4 } = this.#options;
    const [x, y] = projected.map((points, side) => {
      const gather = layout.gathers[side];
      return gather ? aggregate(tape, points, gather) : points;
    }) as [Tensor, Tensor];
    const problem = {
      x: tape.viewOf(x.place, x.count),
      y: tape.viewOf(y.place, y.count),
      dimension: x.columns,
      rows: layout.rows,
      columns: layout.columns,
    };
    // Not looked at here, which would wait for the device: what is not finite shows in the loss.
    const solution = tape.keep(
      gradient === "exact"
        ? exactTransport(tape.device, problem, { check: false })
        : sinkhorn(tape.device, problem, { epsilon, tolerance, ...ITERATION, check: false }),
    );
    const mode = gradient === "implicit" || gradient === "unrolled" ? gradient : undefined;
    const shape = { rows: layout.entries, columns: 1 };
    const needed = tape.training && mode !== undefined && (x.needsGradient || y.needsGradient);
    const plan = new Tensor(placeOf(solution.plan), shape, { needed });
    tape.record(plan, (dy) => {
      const given = { plan: tape.viewOf(dy, layout.entries) };
      using gradients = solution.backward(given, { mode, to: ["x", "y"] });
      addGradient(tape, x, gradients.x!);
      addGradient(tape, y, gradients.y!);
    });
    return { solution, plan };
  }
}

/** How Sinkhorn iterates. */
const ITERATION = { iterations: 500, relaxation: 1.5 } as const;

/** Into the space where nodes of views are compared. */
class Projection {
  readonly #linear: Linear;
  readonly #mean: () => Tensor;
  readonly #variance: () => Tensor;
  readonly #cost: AmoslFusionOptions["cost"];
  readonly #width: number;

  constructor(
    context: LayerContext,
    options: {
      readonly inputs: number;
      readonly width: number;
      readonly cost: AmoslFusionOptions["cost"];
    },
  ) {
    const { inputs, width, cost } = options;
    const { parameters, name } = context;
    this.#linear = new Linear(context, { inputs, outputs: width, bias: false });
    this.#mean = parameters.count(`${name}.running_mean`, [1, width], 0);
    this.#variance = parameters.count(`${name}.running_variance`, [1, width], 1);
    this.#cost = cost;
    this.#width = width;
  }

  forward(tape: Tape, nodes: Tensor): Tensor {
    const width = this.#width;
    const weight = tape.filled(1, width, 1 / Math.sqrt(2 * width));
    const bias = tape.filled(1, width, 0);
    const standard = batchNorm(tape, this.#linear.forward(tape, nodes), {
      ...{ weight, bias, runningMean: this.#mean(), runningVariance: this.#variance() },
    });
    // Rows less their mean, of squared length 1/2: the squared distance is 1 less the cosine.
    return this.#cost === "cosine"
      ? layerNorm(tape, standard, { weight, bias, epsilon: 1e-8 })
      : standard;
  }
}

/**
 * `sum over j of T_ij |x_i - y_j|^2` for each row: `[rows, 1]`. As the product of `[-2 x_i, 1, |x_i|^2]` with the mean of
 * `[y_j, |y_j|^2, 1]`, of which the gradient with respect to each entry of T is its cost.
 */
function transportCosts(
  tape: Tape,
  [x, y]: readonly [Tensor, Tensor],
  pattern: SparsePattern,
  plan: Tensor,
): Tensor {
  const ones = (rows: number, columns = 1) => tape.filled(rows, columns, 1);
  const squares = (points: Tensor) =>
    linear(tape, product(tape, points, points), ones(points.columns));
  const ofY = aggregate(tape, concatenate(tape, [y, squares(y), ones(y.rows)]), pattern, {
    weights: plan,
  });
  const ofX = concatenate(tape, [scale(tape, x, -2), ones(x.rows), squares(x)]);
  return linear(tape, product(tape, ofX, ofY), ones(ofX.columns));
}

/** The sum of a column over `count`: `[1, 1]`. */
function meanOf(tape: Tape, column: Tensor, count: number): Tensor {
  return linear(tape, tape.filled(1, column.rows, 1 / count), column);
}

function average(tape: Tape, values: readonly Tensor[]): Tensor | undefined {
  const [first, ...others] = values;
  if (first === undefined || others.length === 0) return first;
  const sum = others.reduce((sum, value) => add(tape, sum, value), first);
  return scale(tape, sum, 1 / values.length);
}

function placeOf(buffer: DeviceBuffer<"f32" | "f64">): NativeTensor {
  const { buffer: native, byteOffset } = regionOn(buffer, buffer.device);
  return { buffer: native, byteOffset };
}

function addGradient(tape: Tape, tensor: Tensor, gradient: DeviceBuffer<"f32" | "f64">): void {
  const target = tape.target(tensor);
  if (!target) return;
  const { place: out, accumulate } = target;
  native.combine(tape.native, {
    ...{ alpha: 1, x: placeOf(gradient), out, count: tensor.count },
    ...(accumulate ? { beta: 1, y: out } : {}),
  });
}
