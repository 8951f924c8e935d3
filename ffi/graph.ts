import { call } from "./call.ts";
import type { NativeDevice } from "./device.ts";
import { type NativeTensor, place, placeIf } from "./tensor.ts";

// The functions of packhorse.h, section "graph". What tensors are and hold is for the caller to check.

type Optional = NativeTensor | undefined;

export interface MultiplyCall {
  readonly a: NativeTensor;
  readonly transposeA: boolean;
  readonly b: NativeTensor;
  readonly transposeB: boolean;
  readonly bias?: Optional;
  readonly out: NativeTensor;
  readonly rows: number;
  readonly inner: number;
  readonly columns: number;
  readonly accumulate: boolean;
}

export function multiply(device: NativeDevice, parameters: MultiplyCall): void {
  const { a, transposeA, b, transposeB, bias, out, rows, inner, columns, accumulate } = parameters;
  call(
    device.library.symbols.ph_graph_multiply,
    device.handle,
    ...place(a),
    Number(transposeA),
    ...place(b),
    Number(transposeB),
    ...placeIf(bias),
    ...place(out),
    rows,
    inner,
    columns,
    Number(accumulate),
  );
}

/** Scales of a sparse matrix. */
interface Scales {
  readonly rowScale?: Optional;
  readonly columnScale?: Optional;
}

export interface AggregateCall extends Scales {
  readonly x: NativeTensor;
  readonly offsets: Optional;
  readonly columns: Optional;
  readonly edges?: Optional;
  readonly weights?: Optional;
  readonly out: NativeTensor;
  readonly rows: number;
  readonly xRows: number;
  readonly entries: number;
  readonly weightRows?: number;
  readonly heads?: number;
  readonly width: number;
  readonly self?: number;
  readonly accumulate: boolean;
}

export function aggregate(device: NativeDevice, parameters: AggregateCall): void {
  const { x, offsets, columns, edges, weights, rowScale, columnScale, out } = parameters;
  const { rows, xRows, entries, weightRows = 0, heads = 1, width, self = 0 } = parameters;
  call(
    device.library.symbols.ph_graph_aggregate,
    device.handle,
    ...place(x),
    ...placeIf(offsets),
    ...placeIf(columns),
    ...placeIf(edges),
    ...placeIf(weights),
    ...placeIf(rowScale),
    ...placeIf(columnScale),
    ...place(out),
    rows,
    xRows,
    entries,
    weightRows,
    heads,
    width,
    self,
    Number(parameters.accumulate),
  );
}

export interface EdgeDotCall extends Scales {
  readonly y: NativeTensor;
  readonly x: NativeTensor;
  readonly offsets: NativeTensor;
  readonly columns: Optional;
  readonly out: NativeTensor;
  readonly rows: number;
  readonly xRows: number;
  readonly entries: number;
  readonly heads: number;
  readonly width: number;
  readonly accumulate: boolean;
}

export function edgeDot(device: NativeDevice, parameters: EdgeDotCall): void {
  const { y, x, offsets, columns, rowScale, columnScale, out } = parameters;
  const { rows, xRows, entries, heads, width, accumulate } = parameters;
  call(
    device.library.symbols.ph_graph_edge_dot,
    device.handle,
    ...place(y),
    ...place(x),
    ...place(offsets),
    ...placeIf(columns),
    ...placeIf(rowScale),
    ...placeIf(columnScale),
    ...place(out),
    rows,
    xRows,
    entries,
    heads,
    width,
    Number(accumulate),
  );
}

export interface FullBlocksCall {
  readonly rowOffsets: NativeTensor;
  readonly columnOffsets: NativeTensor;
  readonly entryOffsets: NativeTensor;
  readonly columns: NativeTensor;
  readonly rows: NativeTensor;
  readonly order: NativeTensor;
  readonly inverse: NativeTensor;
  readonly blocks: number;
  readonly entries: number;
}

export function fullBlocks(device: NativeDevice, parameters: FullBlocksCall): void {
  const { rowOffsets, columnOffsets, entryOffsets, columns, rows, order, inverse } = parameters;
  call(
    device.library.symbols.ph_graph_full_blocks,
    device.handle,
    ...place(rowOffsets),
    ...place(columnOffsets),
    ...place(entryOffsets),
    ...place(columns),
    ...place(rows),
    ...place(order),
    ...place(inverse),
    parameters.blocks,
    parameters.entries,
  );
}

/** Segments of x's rows. */
interface Segments {
  readonly rows: number;
  readonly xRows: number;
  readonly width: number;
}

export interface SegmentMaxCall extends Segments {
  readonly x: NativeTensor;
  readonly offsets: NativeTensor;
  readonly out: NativeTensor;
  readonly places: NativeTensor;
}

export function segmentMax(device: NativeDevice, parameters: SegmentMaxCall): void {
  const { x, offsets, out, places, rows, xRows, width } = parameters;
  call(
    device.library.symbols.ph_graph_segment_max,
    device.handle,
    ...place(x),
    ...place(offsets),
    ...place(out),
    ...place(places),
    rows,
    xRows,
    width,
  );
}

export interface SegmentMaxBackwardCall extends Segments {
  readonly dy: NativeTensor;
  readonly places: NativeTensor;
  readonly dx: NativeTensor;
  readonly accumulate: boolean;
}

export function segmentMaxBackward(device: NativeDevice, parameters: SegmentMaxBackwardCall): void {
  const { dy, places, dx, rows, xRows, width, accumulate } = parameters;
  call(
    device.library.symbols.ph_graph_segment_max_backward,
    device.handle,
    ...place(dy),
    ...place(places),
    ...place(dx),
    rows,
    xRows,
    width,
    Number(accumulate),
  );
}

export interface SegmentSoftmaxCall extends Segments {
  readonly x: NativeTensor;
  readonly offsets: NativeTensor;
  readonly out: NativeTensor;
}

export function segmentSoftmax(device: NativeDevice, parameters: SegmentSoftmaxCall): void {
  const { x, offsets, out, rows, xRows, width } = parameters;
  const { ph_graph_segment_softmax } = device.library.symbols;
  call(
    ph_graph_segment_softmax,
    device.handle,
    ...place(x),
    ...place(offsets),
    ...place(out),
    rows,
    xRows,
    width,
  );
}

export interface SegmentSoftmaxBackwardCall extends Segments {
  readonly y: NativeTensor;
  readonly dy: NativeTensor;
  readonly offsets: NativeTensor;
  readonly dx: NativeTensor;
  readonly accumulate: boolean;
}

export function segmentSoftmaxBackward(
  device: NativeDevice,
  parameters: SegmentSoftmaxBackwardCall,
): void {
  const { y, dy, offsets, dx, rows, xRows, width, accumulate } = parameters;
  call(
    device.library.symbols.ph_graph_segment_softmax_backward,
    device.handle,
    ...place(y),
    ...place(dy),
    ...place(offsets),
    ...place(dx),
    rows,
    xRows,
    width,
    Number(accumulate),
  );
}

/** Rows of heads. */
interface Heads {
  readonly rows: number;
  readonly heads: number;
  readonly width: number;
}

export interface HeadDotCall extends Heads {
  readonly x: NativeTensor;
  readonly a: NativeTensor;
  readonly out: NativeTensor;
}

export function headDot(device: NativeDevice, parameters: HeadDotCall): void {
  const { x, a, out, rows, heads, width } = parameters;
  const { ph_graph_head_dot } = device.library.symbols;
  call(
    ph_graph_head_dot,
    device.handle,
    ...place(x),
    ...place(a),
    ...place(out),
    rows,
    heads,
    width,
  );
}

export interface HeadDotBackwardCall extends Heads {
  readonly x: NativeTensor;
  readonly a: NativeTensor;
  readonly dy: NativeTensor;
  readonly dx: Optional;
  readonly accumulateDx: boolean;
  readonly da: Optional;
  readonly accumulateDa: boolean;
}

export function headDotBackward(device: NativeDevice, parameters: HeadDotBackwardCall): void {
  const { x, a, dy, dx, accumulateDx, da, accumulateDa, rows, heads, width } = parameters;
  call(
    device.library.symbols.ph_graph_head_dot_backward,
    device.handle,
    ...place(x),
    ...place(a),
    ...place(dy),
    ...placeIf(dx),
    Number(accumulateDx),
    ...placeIf(da),
    Number(accumulateDa),
    rows,
    heads,
    width,
  );
}

export interface ActivateCall {
  readonly activation: number;
  readonly slope: number;
  readonly x: NativeTensor;
  readonly out: NativeTensor;
  readonly count: number;
}

export function activate(device: NativeDevice, parameters: ActivateCall): void {
  const { activation, slope, x, out, count } = parameters;
  const { ph_graph_activate } = device.library.symbols;
  call(
    ph_graph_activate,
    device.handle,
    activation,
    slope,
    ...place(x),
    ...place(out),
    BigInt(count),
  );
}

export interface ActivateBackwardCall extends Omit<ActivateCall, "out"> {
  readonly dy: NativeTensor;
  readonly dx: NativeTensor;
  readonly accumulate: boolean;
}

export function activateBackward(device: NativeDevice, parameters: ActivateBackwardCall): void {
  const { activation, slope, x, dy, dx, count, accumulate } = parameters;
  call(
    device.library.symbols.ph_graph_activate_backward,
    device.handle,
    activation,
    slope,
    ...place(x),
    ...place(dy),
    ...place(dx),
    BigInt(count),
    Number(accumulate),
  );
}

export interface CombineCall {
  readonly alpha: number;
  readonly x: NativeTensor;
  readonly beta?: number;
  readonly y?: Optional;
  readonly out: NativeTensor;
  readonly count: number;
}

export function combine(device: NativeDevice, parameters: CombineCall): void {
  const { alpha, x, beta = 0, y, out, count } = parameters;
  call(
    device.library.symbols.ph_graph_combine,
    device.handle,
    alpha,
    ...place(x),
    beta,
    ...placeIf(y),
    ...place(out),
    BigInt(count),
  );
}

export interface ProductCall {
  readonly x: NativeTensor;
  readonly y: NativeTensor;
  readonly out: NativeTensor;
  readonly count: number;
  readonly accumulate: boolean;
}

export function product(device: NativeDevice, parameters: ProductCall): void {
  const { x, y, out, count, accumulate } = parameters;
  call(
    device.library.symbols.ph_graph_product,
    device.handle,
    ...place(x),
    ...place(y),
    ...place(out),
    BigInt(count),
    Number(accumulate),
  );
}

export interface CopyColumnsCall {
  readonly x: NativeTensor;
  readonly xStride: number;
  readonly out: NativeTensor;
  readonly outStride: number;
  readonly rows: number;
  readonly columns: number;
  readonly accumulate: boolean;
}

export function copyColumns(device: NativeDevice, parameters: CopyColumnsCall): void {
  const { x, xStride, out, outStride, rows, columns, accumulate } = parameters;
  call(
    device.library.symbols.ph_graph_copy_columns,
    device.handle,
    ...place(x),
    xStride,
    ...place(out),
    outStride,
    rows,
    columns,
    Number(accumulate),
  );
}

export interface ColumnSumCall {
  readonly x: NativeTensor;
  readonly out: NativeTensor;
  readonly rows: number;
  readonly width: number;
  readonly accumulate: boolean;
}

export function columnSum(device: NativeDevice, parameters: ColumnSumCall): void {
  const { x, out, rows, width, accumulate } = parameters;
  const { ph_graph_column_sum } = device.library.symbols;
  call(
    ph_graph_column_sum,
    device.handle,
    ...place(x),
    ...place(out),
    rows,
    width,
    Number(accumulate),
  );
}

/** What a normalisation is made of. */
interface Norm {
  readonly x: NativeTensor;
  readonly weight: NativeTensor;
  readonly saved: NativeTensor;
  readonly rows: number;
  readonly width: number;
}

export interface BatchNormCall extends Norm {
  readonly bias: NativeTensor;
  readonly runningMean: NativeTensor;
  readonly runningVariance: NativeTensor;
  readonly out: NativeTensor;
  readonly epsilon: number;
  readonly momentum: number;
  readonly training: boolean;
}

export function batchNorm(device: NativeDevice, parameters: BatchNormCall): void {
  const { x, weight, bias, runningMean, runningVariance, saved, out } = parameters;
  const { rows, width, epsilon, momentum, training } = parameters;
  call(
    device.library.symbols.ph_graph_batch_norm,
    device.handle,
    ...place(x),
    ...place(weight),
    ...place(bias),
    ...place(runningMean),
    ...place(runningVariance),
    ...place(saved),
    ...place(out),
    rows,
    width,
    epsilon,
    momentum,
    Number(training),
  );
}

export interface LayerNormCall extends Norm {
  readonly bias: NativeTensor;
  readonly out: NativeTensor;
  readonly epsilon: number;
}

export function layerNorm(device: NativeDevice, parameters: LayerNormCall): void {
  const { x, weight, bias, saved, out, rows, width, epsilon } = parameters;
  call(
    device.library.symbols.ph_graph_layer_norm,
    device.handle,
    ...place(x),
    ...place(weight),
    ...place(bias),
    ...place(saved),
    ...place(out),
    rows,
    width,
    epsilon,
  );
}

export interface NormBackwardCall extends Norm {
  readonly dy: NativeTensor;
  readonly dx: Optional;
  readonly dweight: Optional;
  readonly dbias: Optional;
  readonly accumulate: boolean;
}

export function normBackward(
  device: NativeDevice,
  kind: "batch" | "layer",
  parameters: NormBackwardCall,
): void {
  const { x, weight, saved, dy, dx, dweight, dbias, rows, width, accumulate } = parameters;
  const { ph_graph_batch_norm_backward, ph_graph_layer_norm_backward } = device.library.symbols;
  call(
    kind === "batch" ? ph_graph_batch_norm_backward : ph_graph_layer_norm_backward,
    device.handle,
    ...place(x),
    ...place(weight),
    ...place(saved),
    ...place(dy),
    ...placeIf(dx),
    ...placeIf(dweight),
    ...placeIf(dbias),
    rows,
    width,
    Number(accumulate),
  );
}

export interface DropoutCall {
  readonly x: NativeTensor;
  readonly out: NativeTensor;
  readonly count: number;
  readonly probability: number;
  readonly seed: bigint;
  readonly accumulate: boolean;
}

export function dropout(device: NativeDevice, parameters: DropoutCall): void {
  const { x, out, count, probability, seed, accumulate } = parameters;
  call(
    device.library.symbols.ph_graph_dropout,
    device.handle,
    ...place(x),
    ...place(out),
    BigInt(count),
    probability,
    seed,
    Number(accumulate),
  );
}

export interface CrossEntropyCall {
  readonly logits: NativeTensor;
  readonly labels: NativeTensor;
  readonly probabilities: NativeTensor;
  readonly loss: NativeTensor;
  readonly rowLosses?: Optional;
  readonly predictions?: Optional;
  readonly rows: number;
  readonly classes: number;
  readonly scale: number;
}

export function crossEntropy(device: NativeDevice, parameters: CrossEntropyCall): void {
  const { logits, labels, probabilities, loss, rowLosses, predictions } = parameters;
  const { rows, classes, scale } = parameters;
  call(
    device.library.symbols.ph_graph_cross_entropy,
    device.handle,
    ...place(logits),
    ...place(labels),
    ...place(probabilities),
    ...place(loss),
    ...placeIf(rowLosses),
    ...placeIf(predictions),
    rows,
    classes,
    scale,
  );
}

export interface CrossEntropyBackwardCall {
  readonly probabilities: NativeTensor;
  readonly labels: NativeTensor;
  readonly dy: NativeTensor;
  readonly dx: NativeTensor;
  readonly rows: number;
  readonly classes: number;
  readonly scale: number;
  readonly accumulate: boolean;
}

export function crossEntropyBackward(
  device: NativeDevice,
  parameters: CrossEntropyBackwardCall,
): void {
  const { probabilities, labels, dy, dx, rows, classes, scale, accumulate } = parameters;
  call(
    device.library.symbols.ph_graph_cross_entropy_backward,
    device.handle,
    ...place(probabilities),
    ...place(labels),
    ...place(dy),
    ...place(dx),
    rows,
    classes,
    scale,
    Number(accumulate),
  );
}

export function squaredNorm(
  device: NativeDevice,
  x: NativeTensor,
  out: NativeTensor,
  count: number,
): void {
  const { ph_graph_squared_norm } = device.library.symbols;
  call(ph_graph_squared_norm, device.handle, ...place(x), ...place(out), BigInt(count));
}

export interface AdamCall {
  readonly parameters: NativeTensor;
  readonly gradients: NativeTensor;
  readonly first: NativeTensor;
  readonly second: NativeTensor;
  readonly squaredNorm: Optional;
  readonly count: number;
  readonly learningRate: number;
  readonly beta1: number;
  readonly beta2: number;
  readonly epsilon: number;
  readonly weightDecay: number;
  readonly correction1: number;
  readonly correction2: number;
  readonly mostNorm: number;
  readonly decoupled: boolean;
}

export function adam(device: NativeDevice, step: AdamCall): void {
  call(
    device.library.symbols.ph_graph_adam,
    device.handle,
    ...place(step.parameters),
    ...place(step.gradients),
    ...place(step.first),
    ...place(step.second),
    ...placeIf(step.squaredNorm),
    BigInt(step.count),
    step.learningRate,
    step.beta1,
    step.beta2,
    step.epsilon,
    step.weightDecay,
    step.correction1,
    step.correction2,
    step.mostNorm,
    Number(step.decoupled),
  );
}
