import type { NativeTensor } from "../../ffi/tensor.ts";
import type { GraphBatch, ViewBatch } from "./batch.ts";
import type { Segments, SparsePattern } from "./operations.ts";
import { type Indices, type Tape, Tensor } from "./tape.ts";

/** One view of a batch on the device. */
export interface DeviceView {
  readonly nodes: number;
  readonly edges: number;
  /** `[nodes, width]`. */
  readonly features: Tensor;
  /** `[edges, width]`, if edges have features. */
  readonly edgeFeatures: Tensor | undefined;
  /** `[nodes, nodes]`: the nodes that edges into a node come from. */
  readonly neighbours: SparsePattern;
  /** `[edges, nodes]`: the node that each edge comes from. */
  readonly sources: SparsePattern;
  /** `[edges, nodes]`: the node that each edge leads to. */
  readonly targets: SparsePattern;
  /** `[nodes, edges]`: the edges into each node. */
  readonly incoming: SparsePattern;
  /** The same as runs of edges. */
  readonly incomingSegments: Segments;
  /** `[objects, nodes]`: the nodes of each object. */
  readonly members: SparsePattern;
  /** The same as runs of nodes. */
  readonly memberSegments: Segments;
  /** One over the edges into each node, 0 without any: `[nodes]`. */
  readonly inverseDegree: NativeTensor;
  /** One over the root of a node's edges into it and one more: `[nodes]`. */
  readonly inverseRootDegree: NativeTensor;
  /** One over the nodes of each object, 0 without any: `[objects]`. */
  readonly inverseSize: NativeTensor;
}

/** A batch on the device, until the next step of its tape. */
export interface DeviceBatch {
  /** The same on the host, with the edges from nodes to themselves that the objects have. */
  readonly host: GraphBatch;
  readonly objects: number;
  /** `[objects]`. */
  readonly labels: Indices;
  /** Objects that have a label. */
  readonly labelled: number;
  readonly views: readonly DeviceView[];
}

/** What edges from nodes to themselves become: they stay as they are, all go, or each node gets one in place of its own. */
export type SelfLoops = "keep" | "remove" | "replace";

/** Copies a batch to the device. */
export function uploadBatch(
  tape: Tape,
  batch: GraphBatch,
  { selfLoops = "keep" }: { readonly selfLoops?: SelfLoops } = {},
): DeviceBatch {
  const objects = batch.objects.length;
  const views = batch.views.map((view) => withSelfLoops(view, selfLoops));
  const [{ labels }, ...places] = tape.uploadAll([
    { labels: batch.labels },
    ...views.map(arraysOf),
  ]);
  return {
    host: batch,
    objects,
    labels,
    labelled: batch.labels.reduce((count, label) => count + Number(label >= 0), 0),
    views: views.map((view, i) => deviceView(view, objects, places[i]!)),
  };
}

/** What of a view goes to the device. */
function arraysOf(view: ViewBatch) {
  return {
    features: view.nodeFeatures,
    edgeFeatures: view.edgeFeatures,
    nodeOffsets: view.nodeOffsets,
    objectOfNode: view.objectOfNode,
    edgeOffsets: view.edgeOffsets,
    sources: view.sources,
    targets: view.targets,
    outOffsets: view.outOffsets,
    outEdges: view.outEdges,
    outTargets: view.outTargets,
    inverseDegree: inverses(view.edgeOffsets),
    inverseRootDegree: inverseRoots(view.edgeOffsets),
    inverseSize: inverses(view.nodeOffsets),
  };
}

/** One over the length of each run, 0 for an empty one. */
function inverses(offsets: Int32Array): Float32Array {
  const values = new Float32Array(offsets.length - 1);
  for (let i = 0; i < values.length; i++) {
    const count = offsets[i + 1]! - offsets[i]!;
    if (count > 0) values[i] = 1 / count;
  }
  return values;
}

/** One over the root of the length of each run and 1 more. */
function inverseRoots(offsets: Int32Array): Float32Array {
  const values = new Float32Array(offsets.length - 1);
  for (let i = 0; i < values.length; i++) {
    values[i] = 1 / Math.sqrt(offsets[i + 1]! - offsets[i]! + 1);
  }
  return values;
}

function deviceView(
  { nodes, edges, nodeWidth, edgeWidth }: ViewBatch,
  objects: number,
  on: Readonly<Record<keyof ReturnType<typeof arraysOf>, Indices>>,
): DeviceView {
  const { nodeOffsets, objectOfNode, edgeOffsets, sources, targets } = on;
  const { outOffsets, outEdges, outTargets } = on;
  return {
    nodes,
    edges,
    features: new Tensor(on.features, { rows: nodes, columns: nodeWidth }),
    edgeFeatures: edgeWidth === 0
      ? undefined
      : new Tensor(on.edgeFeatures, { rows: edges, columns: edgeWidth }),
    neighbours: {
      ...{ rows: nodes, xRows: nodes, entries: edges },
      forward: { offsets: edgeOffsets, columns: sources },
      backward: { offsets: outOffsets, columns: outTargets, edges: outEdges },
    },
    sources: {
      ...{ rows: edges, xRows: nodes, entries: edges },
      forward: { columns: sources },
      backward: { offsets: outOffsets, columns: outEdges },
    },
    targets: {
      ...{ rows: edges, xRows: nodes, entries: edges },
      forward: { columns: targets },
      backward: { offsets: edgeOffsets },
    },
    incoming: {
      ...{ rows: nodes, xRows: edges, entries: edges },
      forward: { offsets: edgeOffsets },
      backward: { columns: targets },
    },
    incomingSegments: { rows: nodes, offsets: edgeOffsets },
    members: {
      ...{ rows: objects, xRows: nodes, entries: nodes },
      forward: { offsets: nodeOffsets },
      backward: { columns: objectOfNode },
    },
    memberSegments: { rows: objects, offsets: nodeOffsets },
    inverseDegree: on.inverseDegree,
    inverseRootDegree: on.inverseRootDegree,
    inverseSize: on.inverseSize,
  };
}

/**
 * The view with edges from nodes to themselves as they are wanted. One that is put in place of others is in front of the
 * edges into the node, and its features are the mean of theirs.
 */
function withSelfLoops(view: ViewBatch, selfLoops: SelfLoops): ViewBatch {
  const { nodes, edgeWidth: width } = view;
  const isLoop = (source: number, edge: number) => source === view.targets[edge];
  if (selfLoops === "keep" || (selfLoops === "remove" && !view.sources.some(isLoop))) return view;
  const replace = selfLoops === "replace";
  const [sources, targets]: [number[], number[]] = [[], []];
  const edgeOffsets = new Int32Array(nodes + 1);
  const features: number[] = [];
  for (let node = 0; node < nodes; node++) {
    const others: number[] = [];
    for (let edge = view.edgeOffsets[node]!; edge < view.edgeOffsets[node + 1]!; edge++) {
      if (view.sources[edge] !== node) others.push(edge);
    }
    if (replace) sources.push(node);
    sources.push(...others.map((edge) => view.sources[edge]!));
    while (targets.length < sources.length) targets.push(node);
    edgeOffsets[node + 1] = sources.length;
    const rows = others.map((edge) => view.edgeFeatures.subarray(edge * width, (edge + 1) * width));
    for (let column = 0; replace && column < width; column++) {
      const sum = rows.reduce((total, row) => total + row[column]!, 0);
      features.push(sum / Math.max(rows.length, 1));
    }
    for (const row of rows) features.push(...row);
  }
  const outOffsets = new Int32Array(nodes + 1);
  for (const source of sources) outOffsets[source + 1]!++;
  for (let node = 0; node < nodes; node++) outOffsets[node + 1]! += outOffsets[node]!;
  const next = outOffsets.slice();
  const outEdges = new Int32Array(sources.length);
  sources.forEach((source, edge) => outEdges[next[source]!++] = edge);
  return {
    ...view,
    edges: sources.length,
    edgeFeatures: Float32Array.from(features),
    edgeOffsets,
    sources: Int32Array.from(sources),
    targets: Int32Array.from(targets),
    outOffsets,
    outEdges,
    outTargets: outEdges.map((edge) => targets[edge]!),
  };
}
