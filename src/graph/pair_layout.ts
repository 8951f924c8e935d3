import type { NativeTensor } from "../../ffi/tensor.ts";
import { fullBlocks } from "../../ffi/graph.ts";
import type { ViewBatch } from "./batch.ts";
import type { DeviceBatch } from "./device_batch.ts";
import type { SparsePattern } from "./operations.ts";
import type { Indices, Tape } from "./tape.ts";

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

/** Lays out the plans between two views of a batch on the device; undefined if no object has both. */
export function pairLayout(
  tape: Tape,
  { host: { views: hosts, objects: all }, views }: DeviceBatch,
  [first, second]: readonly [number, number],
): PairLayout | undefined {
  const [u, v] = [hosts[first]!, hosts[second]!];
  const sizeIn = ({ nodeOffsets }: ViewBatch, i: number) => nodeOffsets[i + 1]! - nodeOffsets[i]!;
  const objects = [...all.keys()].filter((i) => sizeIn(u, i) > 0 && sizeIn(v, i) > 0);
  if (objects.length === 0) return undefined;
  const rows = objects.map((i) => sizeIn(u, i));
  const columns = objects.map((i) => sizeIn(v, i));
  const entryOffsets = new Int32Array(all.length + 1);
  const rowOffsets = new Int32Array(u.nodes + 1);
  const columnOffsets = new Int32Array(v.nodes + 1);
  const rowSizes = new Float32Array(u.nodes);
  const columnSizes = new Float32Array(v.nodes);
  for (let i = 0; i < all.length; i++) {
    const [n, m] = [sizeIn(u, i), sizeIn(v, i)];
    const [row, column] = [u.nodeOffsets[i]!, v.nodeOffsets[i]!];
    const start = entryOffsets[i]!;
    entryOffsets[i + 1] = start + n * m;
    for (let k = 0; k < n; k++) rowOffsets[row + k + 1] = start + (k + 1) * m;
    for (let k = 0; k < m; k++) columnOffsets[column + k + 1] = start + (k + 1) * n;
    if (n * m === 0) continue;
    rowSizes.fill(n, row, row + n);
    columnSizes.fill(m, column, column + m);
  }
  const entries = entryOffsets[all.length]!;
  const on = tape.upload({ rowOffsets, columnOffsets, entryOffsets, rowSizes, columnSizes });
  const [ofColumn, ofRow, ordered, inverted] = Array.from({ length: 4 }, (): Indices => ({
    ...tape.take(entries),
    length: entries,
  })) as [Indices, Indices, Indices, Indices];
  fullBlocks(tape.native, {
    rowOffsets: views[first]!.memberSegments.offsets,
    columnOffsets: views[second]!.memberSegments.offsets,
    entryOffsets: on.entryOffsets,
    ...{ columns: ofColumn, rows: ofRow, order: ordered, inverse: inverted },
    ...{ blocks: all.length, entries },
  });
  return {
    ...{ objects, rows, columns, entries },
    gathers: [gatherOf(tape, u, objects), gatherOf(tape, v, objects)],
    forward: {
      ...{ rows: u.nodes, xRows: v.nodes, entries },
      forward: { offsets: on.rowOffsets, columns: ofColumn },
      backward: { offsets: on.columnOffsets, columns: ofRow, edges: ordered },
    },
    backward: {
      ...{ rows: v.nodes, xRows: u.nodes, entries },
      forward: { offsets: on.columnOffsets, columns: ofRow },
      backward: { offsets: on.rowOffsets, columns: ofColumn, edges: inverted },
    },
    transpose: {
      ...{ rows: entries, xRows: entries, entries },
      forward: { columns: ordered },
      backward: { columns: inverted },
    },
    rowSizes: on.rowSizes,
    columnSizes: on.columnSizes,
  };
}

/** Takes the nodes of some objects, undefined where these are all nodes. */
function gatherOf(
  tape: Tape,
  { nodes, nodeOffsets }: ViewBatch,
  objects: readonly number[],
): SparsePattern | undefined {
  const count = objects.reduce((sum, i) => sum + nodeOffsets[i + 1]! - nodeOffsets[i]!, 0);
  if (count === nodes) return undefined;
  const taken: number[] = [];
  const offsets = new Int32Array(nodes + 1);
  for (const object of objects) {
    for (let node = nodeOffsets[object]!; node < nodeOffsets[object + 1]!; node++) {
      taken.push(node);
      offsets[node + 1] = 1;
    }
  }
  for (let node = 0; node < nodes; node++) offsets[node + 1]! += offsets[node]!;
  const on = tape.upload({ taken: Int32Array.from(taken), offsets });
  return {
    ...{ rows: taken.length, xRows: nodes, entries: taken.length },
    forward: { columns: on.taken },
    backward: { offsets: on.offsets },
  };
}
