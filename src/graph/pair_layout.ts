import type { NativeTensor } from "../../ffi/tensor.ts";
import type { GraphBatch, ViewBatch } from "./batch.ts";
import type { SparsePattern } from "./operations.ts";
import type { Tape } from "./tape.ts";

/**
 * Which nodes of two views are compared: those of an object with each other. Entries are those of plans, `[rows, columns]` of
 * one object after another.
 */
export interface PairLayout {
  /** The objects that have nodes in both views: where they are in the batch. */
  readonly objects: readonly number[];
  /** Nodes of each in the first view. */
  readonly rows: readonly number[];
  /** Nodes of each in the second view. */
  readonly columns: readonly number[];
  /** Entries of all plans. */
  readonly entries: number;
  /** The nodes of each view that take part, if not all do: `[nodes that do, nodes]`. */
  readonly gathers: readonly [SparsePattern | undefined, SparsePattern | undefined];
  /** Plans as one sparse matrix `[nodes of the first view, nodes of the second]`. */
  readonly forward: SparsePattern;
  /** The transposed one, whose entries are in the order that `transpose` makes. */
  readonly backward: SparsePattern;
  /** Brings entries into the order of transposed plans: `[entries, entries]`. */
  readonly transpose: SparsePattern;
  /** The nodes of a node's object in its view, which is one over its mass: of the first view, and of the second. */
  readonly rowSizes: NativeTensor;
  readonly columnSizes: NativeTensor;
}

/** Lays out the plans between two views of a batch, and copies that to the device; undefined if no object has both. */
export function pairLayout(
  tape: Tape,
  { views, objects: all }: GraphBatch,
  [first, second]: readonly [number, number],
): PairLayout | undefined {
  const [u, v] = [views[first]!, views[second]!];
  const sizeIn = ({ nodeOffsets }: ViewBatch, i: number) => nodeOffsets[i + 1]! - nodeOffsets[i]!;
  const objects = [...all.keys()].filter((i) => sizeIn(u, i) > 0 && sizeIn(v, i) > 0);
  if (objects.length === 0) return undefined;
  const rows = objects.map((i) => sizeIn(u, i));
  const columns = objects.map((i) => sizeIn(v, i));
  const entries = rows.reduce((sum, n, p) => sum + n * columns[p]!, 0);
  const rowOffsets = new Int32Array(u.nodes + 1);
  const columnOffsets = new Int32Array(v.nodes + 1);
  const columnOf = new Int32Array(entries);
  const rowOf = new Int32Array(entries); // by transposed entries
  const order = new Int32Array(entries); // the entry of each transposed one
  const inverse = new Int32Array(entries);
  const rowSizes = new Float32Array(u.nodes);
  const columnSizes = new Float32Array(v.nodes);
  let start = 0;
  for (const [p, object] of objects.entries()) {
    const [n, m] = [rows[p]!, columns[p]!];
    const [row, column] = [u.nodeOffsets[object]!, v.nodeOffsets[object]!];
    rowSizes.fill(n, row, row + n);
    columnSizes.fill(m, column, column + m);
    for (let i = 0; i < n; i++) rowOffsets[row + i + 1] = m;
    for (let j = 0; j < m; j++) columnOffsets[column + j + 1] = n;
    for (let i = 0; i < n; i++) {
      for (let j = 0; j < m; j++) {
        const [entry, transposed] = [start + i * m + j, start + j * n + i];
        columnOf[entry] = column + j;
        rowOf[transposed] = row + i;
        order[transposed] = entry;
        inverse[entry] = transposed;
      }
    }
    start += n * m;
  }
  for (let i = 0; i < u.nodes; i++) rowOffsets[i + 1]! += rowOffsets[i]!;
  for (let j = 0; j < v.nodes; j++) columnOffsets[j + 1]! += columnOffsets[j]!;
  const [rowAt, columnAt, ofColumn, ofRow, ordered, inverted, ofRows, ofColumns] = tape.upload([
    ...[rowOffsets, columnOffsets, columnOf, rowOf, order, inverse],
    ...[rowSizes, columnSizes],
  ]);
  return {
    ...{ objects, rows, columns, entries },
    gathers: [gatherOf(tape, u, objects), gatherOf(tape, v, objects)],
    forward: {
      ...{ rows: u.nodes, xRows: v.nodes, entries },
      forward: { offsets: rowAt!, columns: ofColumn! },
      backward: { offsets: columnAt!, columns: ofRow!, edges: ordered! },
    },
    backward: {
      ...{ rows: v.nodes, xRows: u.nodes, entries },
      forward: { offsets: columnAt!, columns: ofRow! },
      backward: { offsets: rowAt!, columns: ofColumn!, edges: inverted! },
    },
    transpose: {
      ...{ rows: entries, xRows: entries, entries },
      forward: { columns: ordered! },
      backward: { columns: inverted! },
    },
    rowSizes: ofRows!,
    columnSizes: ofColumns!,
  };
}

/** Takes the nodes of some objects, undefined where these are all nodes. */
function gatherOf(
  tape: Tape,
  { nodes, nodeOffsets }: ViewBatch,
  objects: readonly number[],
): SparsePattern | undefined {
  const taken: number[] = [];
  const offsets = new Int32Array(nodes + 1);
  for (const object of objects) {
    for (let node = nodeOffsets[object]!; node < nodeOffsets[object + 1]!; node++) {
      taken.push(node);
      offsets[node + 1] = 1;
    }
  }
  if (taken.length === nodes) return undefined;
  for (let node = 0; node < nodes; node++) offsets[node + 1]! += offsets[node]!;
  const [columns, starts] = tape.upload([Int32Array.from(taken), offsets]);
  return {
    ...{ rows: taken.length, xRows: nodes, entries: taken.length },
    forward: { columns: columns! },
    backward: { offsets: starts! },
  };
}
