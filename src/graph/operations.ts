/**
 * What models of graphs compute, on a {@linkcode Tape}: every function enqueues its work, returns a tensor of the step, and
 * remembers how to go back. Shapes are `[rows, columns]`. Formulas stand in `packhorse.h`, section "graph".
 *
 * All throw `invalid-argument` for shapes that do not fit each other.
 */
import { GRAPH_ACTIVATION } from "../../ffi/enums.ts";
import * as native from "../../ffi/graph.ts";
import type { NativeTensor } from "../../ffi/tensor.ts";
import { PackhorseError } from "../error.ts";
import type { Indices, Tape, Tensor } from "./tape.ts";

/** Function that is applied to each element. */
export type Activation = "relu" | "leaky-relu" | "gelu" | "tanh" | "sigmoid" | "softplus";

const ACTIVATIONS: Readonly<Record<Activation, number>> = {
  relu: GRAPH_ACTIVATION.relu,
  "leaky-relu": GRAPH_ACTIVATION.leaky_relu,
  gelu: GRAPH_ACTIVATION.gelu,
  tanh: GRAPH_ACTIVATION.tanh,
  sigmoid: GRAPH_ACTIVATION.sigmoid,
  softplus: GRAPH_ACTIVATION.softplus,
};

function requireShape(
  operation: string,
  named: Readonly<Record<string, Tensor>>,
  rows: number,
  columns: number,
): void {
  for (const [name, tensor] of Object.entries(named)) {
    if (tensor.rows === rows && tensor.columns === columns) continue;
    const message = `Cannot compute ${operation}: ${name} must be [${rows}, ${columns}], ` +
      `it is [${tensor.rows}, ${tensor.columns}]`;
    throw new PackhorseError("invalid-argument", message);
  }
}

/** `x . weight + bias`: x `[rows, in]`, weight `[in, out]`, bias `[1, out]`. */
export function linear(tape: Tape, x: Tensor, weight: Tensor, bias?: Tensor): Tensor {
  const { rows, columns: inner } = x;
  const { columns } = weight;
  requireShape("linear", { weight }, inner, columns);
  if (bias) requireShape("linear", { bias }, 1, columns);
  const out = tape.create(rows, columns, bias ? [x, weight, bias] : [x, weight]);
  native.multiply(tape.native, {
    ...{ a: x.place, transposeA: false, b: weight.place, transposeB: false, bias: bias?.place },
    ...{ out: out.place, rows, inner, columns, accumulate: false },
  });
  tape.record(out, (dy) => {
    multiplyBackward(tape, x, weight, dy);
    addColumnSum(tape, bias, dy, rows);
  });
  return out;
}

/** The gradients of a product of matrices. */
function multiplyBackward(tape: Tape, a: Tensor, b: Tensor, dy: NativeTensor): void {
  const da = tape.target(a);
  if (da) {
    native.multiply(tape.native, {
      ...{ a: dy, transposeA: false, b: b.place, transposeB: true, out: da.place },
      ...{ rows: a.rows, inner: b.columns, columns: a.columns, accumulate: da.accumulate },
    });
  }
  const db = tape.target(b);
  if (db) {
    native.multiply(tape.native, {
      ...{ a: a.place, transposeA: true, b: dy, transposeB: false, out: db.place },
      ...{ rows: b.rows, inner: a.rows, columns: b.columns, accumulate: db.accumulate },
    });
  }
}

function addColumnSum(tape: Tape, bias: Tensor | undefined, dy: NativeTensor, rows: number): void {
  const db = bias && tape.target(bias);
  if (!db) return;
  const { place: out, accumulate } = db;
  native.columnSum(tape.native, { x: dy, out, rows, width: bias.columns, accumulate });
}

/** `x + bias`, the bias `[1, columns]` on every row. */
export function addBias(tape: Tape, x: Tensor, bias: Tensor): Tensor {
  const { rows, columns, place, count } = x;
  requireShape("addBias", { bias }, 1, columns);
  const out = tape.create(rows, columns, [x, bias]);
  native.combine(tape.native, { alpha: 1, x: place, out: out.place, count });
  // A product of nothing, and the bias.
  native.multiply(tape.native, {
    ...{ a: place, transposeA: false, b: place, transposeB: false, bias: bias.place },
    ...{ out: out.place, rows, inner: 0, columns, accumulate: true },
  });
  tape.record(out, (dy) => {
    addScaled(tape, x, dy, 1);
    addColumnSum(tape, bias, dy, rows);
  });
  return out;
}

/** A sparse matrix `[rows, xRows]` by its entries, and what reads it by its columns. */
export interface SparsePattern {
  readonly rows: number;
  readonly xRows: number;
  readonly entries: number;
  /** Row i has the entries from `offsets[i]` to `offsets[i + 1]`, or entry i alone; their columns, or the entry itself. */
  readonly forward: { readonly offsets?: Indices; readonly columns?: Indices };
  /** The same of the transposed matrix; `edges` says which entries these are, if they are in another order. */
  readonly backward: {
    readonly offsets?: Indices;
    readonly columns?: Indices;
    readonly edges?: Indices;
  };
}

/** Options of {@linkcode aggregate}. */
export interface AggregateOptions {
  /** What a row's own element counts; needs a square matrix. Default: 0. */
  readonly self?: number | undefined;
  /** Weight of each entry for each head, `[entries, heads]`. Default: 1. */
  readonly weights?: Tensor | undefined;
  /** `[rows]`. Default: 1. */
  readonly rowScale?: NativeTensor | undefined;
  /** `[xRows]`. Default: 1. */
  readonly columnScale?: NativeTensor | undefined;
}

/**
 * A sparse matrix times `x` `[xRows, columns]`: sums over neighbours, or over the nodes of each object, or gathers rows.
 * Weights go by heads, each of which has an equal share of the columns.
 */
export function aggregate(
  tape: Tape,
  x: Tensor,
  pattern: SparsePattern,
  options: AggregateOptions = {},
): Tensor {
  const { rows, xRows, entries, forward, backward } = pattern;
  const { self = 0, weights, rowScale, columnScale } = options;
  const { columns: width } = x;
  requireShape("aggregate", { x }, xRows, width);
  const heads = weights?.columns ?? 1;
  if (weights) requireShape("aggregate", { weights }, entries, heads);
  const out = tape.create(rows, width, weights ? [x, weights] : [x]);
  const shared = { entries, weights: weights?.place, weightRows: weights ? entries : 0, heads };
  native.aggregate(tape.native, {
    ...{ x: x.place, offsets: forward.offsets, columns: forward.columns, ...shared },
    ...{ rowScale, columnScale, out: out.place, rows, xRows, width, self, accumulate: false },
  });
  tape.record(out, (dy) => {
    const dx = tape.target(x);
    if (dx) {
      native.aggregate(tape.native, {
        ...{ x: dy, offsets: backward.offsets, columns: backward.columns, edges: backward.edges },
        ...{ ...shared, rowScale: columnScale, columnScale: rowScale, out: dx.place },
        ...{ rows: xRows, xRows: rows, width, self, accumulate: dx.accumulate },
      });
    }
    const dw = weights && tape.target(weights);
    if (dw) {
      if (forward.offsets === undefined) {
        throw new PackhorseError(
          "invalid-argument",
          "Weights of rows that are gathered have no gradient",
        );
      }
      native.edgeDot(tape.native, {
        ...{ y: dy, x: x.place, offsets: forward.offsets, columns: forward.columns },
        ...{ rowScale, columnScale, out: dw.place, rows, xRows, entries, heads, width },
        accumulate: dw.accumulate,
      });
    }
  });
  return out;
}

/** Runs of rows: row i of the output stands for rows `offsets[i]` to `offsets[i + 1]`, which together are all. */
export interface Segments {
  readonly rows: number;
  readonly offsets: Indices;
}

/** The largest element of each column over each segment; 0 for an empty one. */
export function segmentMax(tape: Tape, x: Tensor, { rows, offsets }: Segments): Tensor {
  const { rows: xRows, columns: width } = x;
  const out = tape.create(rows, width, [x]);
  const places = tape.take(rows * width);
  native.segmentMax(tape.native, {
    ...{ x: x.place, offsets, out: out.place, places, rows, xRows, width },
  });
  tape.record(out, (dy) => {
    const dx = tape.target(x);
    if (!dx) return;
    const { place, accumulate } = dx;
    native.segmentMaxBackward(tape.native, {
      dy,
      places,
      dx: place,
      rows,
      xRows,
      width,
      accumulate,
    });
  });
  return out;
}

/** The softmax of each column over each segment. */
export function segmentSoftmax(tape: Tape, x: Tensor, { rows, offsets }: Segments): Tensor {
  const { rows: xRows, columns: width } = x;
  const out = tape.create(xRows, width, [x]);
  native.segmentSoftmax(tape.native, { x: x.place, offsets, out: out.place, rows, xRows, width });
  tape.record(out, (dy) => {
    const dx = tape.target(x);
    if (!dx) return;
    native.segmentSoftmaxBackward(tape.native, {
      ...{ y: out.place, dy, offsets, dx: dx.place, rows, xRows, width, accumulate: dx.accumulate },
    });
  });
  return out;
}

/** The product of each head's columns of `x` with its share of `a` `[1, columns]`: `[rows, heads]`. */
export function headDot(tape: Tape, x: Tensor, a: Tensor, heads: number): Tensor {
  const { rows, columns } = x;
  requireShape("headDot", { a }, 1, columns);
  const width = columns / heads;
  const out = tape.create(rows, heads, [x, a]);
  native.headDot(tape.native, { x: x.place, a: a.place, out: out.place, rows, heads, width });
  tape.record(out, (dy) => {
    const dx = tape.target(x);
    const da = tape.target(a);
    native.headDotBackward(tape.native, {
      ...{ x: x.place, a: a.place, dy, rows, heads, width },
      ...{ dx: dx?.place, accumulateDx: dx?.accumulate ?? false },
      ...{ da: da?.place, accumulateDa: da?.accumulate ?? false },
    });
  });
  return out;
}

/** Applies a function to each element; `slope` is leaky-relu's. */
export function activate(tape: Tape, x: Tensor, kind: Activation, slope = 0.01): Tensor {
  const { rows, columns, count } = x;
  const out = tape.create(rows, columns, [x]);
  const activation = ACTIVATIONS[kind];
  native.activate(tape.native, { activation, slope, x: x.place, out: out.place, count });
  tape.record(out, (dy) => {
    const dx = tape.target(x);
    if (!dx) return;
    native.activateBackward(tape.native, {
      ...{ activation, slope, x: x.place, dy, dx: dx.place, count, accumulate: dx.accumulate },
    });
  });
  return out;
}

/** `alpha x + beta y`. */
export function combine(tape: Tape, alpha: number, x: Tensor, beta: number, y: Tensor): Tensor {
  const { rows, columns, count } = x;
  requireShape("combine", { y }, rows, columns);
  const out = tape.create(rows, columns, [x, y]);
  native.combine(tape.native, { alpha, x: x.place, beta, y: y.place, out: out.place, count });
  tape.record(out, (dy) => {
    addScaled(tape, x, dy, alpha);
    addScaled(tape, y, dy, beta);
  });
  return out;
}

/** `x + y`. */
export function add(tape: Tape, x: Tensor, y: Tensor): Tensor {
  return combine(tape, 1, x, 1, y);
}

/** `factor x`. */
export function scale(tape: Tape, x: Tensor, factor: number): Tensor {
  const { rows, columns, count } = x;
  const out = tape.create(rows, columns, [x]);
  native.combine(tape.native, { alpha: factor, x: x.place, out: out.place, count });
  tape.record(out, (dy) => addScaled(tape, x, dy, factor));
  return out;
}

/** Adds `factor dy` to a gradient. */
function addScaled(tape: Tape, x: Tensor, dy: NativeTensor, factor: number): void {
  const dx = tape.target(x);
  if (!dx) return;
  native.combine(tape.native, {
    ...{ alpha: factor, x: dy, out: dx.place, count: x.count },
    ...(dx.accumulate ? { beta: 1, y: dx.place } : {}),
  });
}

/** `x y`, element by element. */
export function product(tape: Tape, x: Tensor, y: Tensor): Tensor {
  const { rows, columns, count } = x;
  requireShape("product", { y }, rows, columns);
  const out = tape.create(rows, columns, [x, y]);
  native.product(tape.native, { x: x.place, y: y.place, out: out.place, count, accumulate: false });
  tape.record(out, (dy) => {
    for (const [own, other] of [[x, y], [y, x]] as const) {
      const target = tape.target(own);
      if (!target) continue;
      const { place, accumulate } = target;
      native.product(tape.native, { x: dy, y: other.place, out: place, count, accumulate });
    }
  });
  return out;
}

/** Tensors side by side. */
export function concatenate(tape: Tape, tensors: readonly [Tensor, ...Tensor[]]): Tensor {
  const [{ rows }] = tensors;
  const columns = tensors.reduce((sum, tensor) => sum + tensor.columns, 0);
  const out = tape.create(rows, columns, tensors);
  const at = (place: NativeTensor, column: number) => ({
    buffer: place.buffer,
    byteOffset: place.byteOffset + 4 * column,
  });
  let column = 0;
  const starts = tensors.map((tensor) => (column += tensor.columns) - tensor.columns);
  tensors.forEach((tensor, i) => {
    requireShape("concatenate", { tensor }, rows, tensor.columns);
    native.copyColumns(tape.native, {
      ...{ x: tensor.place, xStride: tensor.columns, out: at(out.place, starts[i]!) },
      ...{ outStride: columns, rows, columns: tensor.columns, accumulate: false },
    });
  });
  tape.record(out, (dy) => {
    tensors.forEach((tensor, i) => {
      const dx = tape.target(tensor);
      if (!dx) return;
      native.copyColumns(tape.native, {
        ...{ x: at(dy, starts[i]!), xStride: columns, out: dx.place, outStride: tensor.columns },
        ...{ rows, columns: tensor.columns, accumulate: dx.accumulate },
      });
    });
  });
  return out;
}

/** What a normalisation has learned, `[1, columns]` each. */
export interface NormParameters {
  readonly weight: Tensor;
  readonly bias: Tensor;
}

/** Options of {@linkcode batchNorm}. */
export interface BatchNormOptions extends NormParameters {
  /** Mean of what was seen while training, `[1, columns]`; updated while the tape trains. */
  readonly runningMean: Tensor;
  /** Likewise the variance. */
  readonly runningVariance: Tensor;
  /** Default: 1e-5. */
  readonly epsilon?: number | undefined;
  /** Share of a step in the running values. Default: 0.1. */
  readonly momentum?: number | undefined;
}

/** Normalises columns: over the rows while the tape trains, else by the running mean and variance. */
export function batchNorm(tape: Tape, x: Tensor, options: BatchNormOptions): Tensor {
  const { weight, bias, runningMean, runningVariance, epsilon = 1e-5, momentum = 0.1 } = options;
  const { rows, columns: width } = x;
  requireShape("batchNorm", { weight, bias, runningMean, runningVariance }, 1, width);
  const out = tape.create(rows, width, [x, weight, bias]);
  const saved = tape.take(2 * width);
  native.batchNorm(tape.native, {
    ...{ x: x.place, weight: weight.place, bias: bias.place, saved, out: out.place, rows, width },
    ...{ runningMean: runningMean.place, runningVariance: runningVariance.place },
    ...{ epsilon, momentum, training: tape.training },
  });
  tape.record(out, (dy) => normBackward(tape, "batch", { x, weight, bias }, saved, dy));
  return out;
}

/** Normalises rows; epsilon is 1e-5 unless given. */
export function layerNorm(
  tape: Tape,
  x: Tensor,
  { weight, bias, epsilon = 1e-5 }: NormParameters & { readonly epsilon?: number | undefined },
): Tensor {
  const { rows, columns: width } = x;
  requireShape("layerNorm", { weight, bias }, 1, width);
  const out = tape.create(rows, width, [x, weight, bias]);
  const saved = tape.take(2 * rows);
  native.layerNorm(tape.native, {
    ...{ x: x.place, weight: weight.place, bias: bias.place, saved, out: out.place },
    ...{ rows, width, epsilon },
  });
  tape.record(out, (dy) => normBackward(tape, "layer", { x, weight, bias }, saved, dy));
  return out;
}

function normBackward(
  tape: Tape,
  kind: "batch" | "layer",
  { x, weight, bias }: NormParameters & { readonly x: Tensor },
  saved: NativeTensor,
  dy: NativeTensor,
): void {
  const dx = tape.target(x);
  /** The operation adds to these, so a gradient that is new starts at zero. */
  const added = (tensor: Tensor) => {
    const target = tape.target(tensor);
    if (target && !target.accumulate) {
      const { place, count } = tensor;
      native.combine(tape.native, { alpha: 0, x: place, out: target.place, count });
    }
    return target?.place;
  };
  native.normBackward(tape.native, kind, {
    ...{ x: x.place, weight: weight.place, saved, dy, rows: x.rows, width: x.columns },
    ...{ dx: dx?.place, accumulate: dx?.accumulate ?? false },
    ...{ dweight: added(weight), dbias: added(bias) },
  });
}

/** While the tape trains, sets elements to 0 with a probability and scales the others up; else `x` itself. */
export function dropout(tape: Tape, x: Tensor, probability: number): Tensor {
  if (!tape.training || probability === 0) return x;
  const { rows, columns, count } = x;
  const out = tape.create(rows, columns, [x]);
  const seed = tape.nextSeed();
  native.dropout(tape.native, {
    ...{ x: x.place, out: out.place, count, probability, seed, accumulate: false },
  });
  tape.record(out, (dy) => {
    const dx = tape.target(x);
    if (!dx) return;
    const { place, accumulate } = dx;
    native.dropout(tape.native, { x: dy, out: place, count, probability, seed, accumulate });
  });
  return out;
}

/** Options of {@linkcode crossEntropy}. */
export interface CrossEntropyOptions {
  /** Rows with a label: what the sum of losses is divided by. */
  readonly labelled: number;
  /** Where each row's loss goes: `[rows]`. */
  readonly rowLosses?: NativeTensor | undefined;
  /** Where each row's likeliest class goes: `[rows]`. */
  readonly predictions?: NativeTensor | undefined;
}

/** What {@linkcode crossEntropy} returns. */
export interface CrossEntropyResult {
  /** `[1, 1]`. */
  readonly loss: Tensor;
  /** The softmax of the logits: `[rows, classes]`. */
  readonly probabilities: Tensor;
}

/** The mean cross-entropy of logits `[rows, classes]` and labels `[rows]`, in nats; a negative label counts for nothing. */
export function crossEntropy(
  tape: Tape,
  logits: Tensor,
  labels: Indices,
  { labelled, rowLosses, predictions }: CrossEntropyOptions,
): CrossEntropyResult {
  const { rows, columns: classes } = logits;
  const loss = tape.create(1, 1, [logits]);
  const probabilities = tape.create(rows, classes, []);
  const shared = { labels, probabilities: probabilities.place, rows, classes };
  const scaled = { ...shared, scale: labelled > 0 ? 1 / labelled : 0 };
  native.crossEntropy(tape.native, {
    ...{ ...scaled, logits: logits.place, loss: loss.place, rowLosses, predictions },
  });
  tape.record(loss, (dy) => {
    const dx = tape.target(logits);
    if (!dx) return;
    const { place, accumulate } = dx;
    native.crossEntropyBackward(tape.native, { ...scaled, dy, dx: place, accumulate });
  });
  return { loss, probabilities };
}
