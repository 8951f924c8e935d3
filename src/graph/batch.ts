import { PackhorseError } from "../error.ts";
import type { GraphDataset, GraphView } from "./dataset.ts";
import { Random } from "./random.ts";
import { edgeWidth, encodeColumns, type GraphSchema, nodeWidth, schemaOf } from "./schema.ts";

/** One view of some objects: their graphs as one, whose parts are not joined. Nodes count over the batch. */
export interface ViewBatch {
  readonly nodes: number;
  readonly edges: number;
  readonly nodeWidth: number;
  /** 0 if edges have no features. */
  readonly edgeWidth: number;
  /** Features `[nodes, nodeWidth]`. */
  readonly nodeFeatures: Float32Array<ArrayBuffer>;
  /** Features `[edges, edgeWidth]`, in the order of `sources`. */
  readonly edgeFeatures: Float32Array<ArrayBuffer>;
  /** Where each object's nodes begin, and at last their number: `[objects + 1]`. */
  readonly nodeOffsets: Int32Array<ArrayBuffer>;
  /** The object of each node: `[nodes]`. */
  readonly objectOfNode: Int32Array<ArrayBuffer>;
  /** Where the edges into each node begin, and at last their number: `[nodes + 1]`. */
  readonly edgeOffsets: Int32Array<ArrayBuffer>;
  /** Node that each edge comes from: `[edges]`, by targets. */
  readonly sources: Int32Array<ArrayBuffer>;
  /** Node that each edge leads to: `[edges]`, ascending. */
  readonly targets: Int32Array<ArrayBuffer>;
  /** Where the edges out of each node begin: `[nodes + 1]`. */
  readonly outOffsets: Int32Array<ArrayBuffer>;
  /** The edges by the node that they come from, as indices into `sources`: `[edges]`. */
  readonly outEdges: Int32Array<ArrayBuffer>;
  /** Node that each of `outEdges` leads to: `[edges]`. */
  readonly outTargets: Int32Array<ArrayBuffer>;
}

/** Some objects of a data set. */
export interface GraphBatch {
  /** Which: indices into the data set. */
  readonly objects: readonly number[];
  /** Their classes: `[objects]`. */
  readonly labels: Int32Array<ArrayBuffer>;
  readonly views: readonly ViewBatch[];
}

/** Options of {@linkcode GraphBatches}. */
export interface GraphBatchesOptions {
  /** How columns become features. Default: the data set's own schema. */
  readonly schema?: GraphSchema | undefined;
}

/** Options of {@linkcode GraphBatches.order}. */
export interface BatchOrderOptions {
  /** Objects of a batch; the last may have fewer. */
  readonly batchSize: number;
  /** What the order follows from. Default: objects stay in theirs. */
  readonly seed?: number | undefined;
  /** Counts the orders of a seed. Default: 0. */
  readonly epoch?: number | undefined;
}

/**
 * Joins graphs of a data set into batches.
 *
 * @example
 * ```ts
 * import { GraphBatches, GraphDataset } from "@packhorse/packhorse/graph";
 * import { assertEquals } from "@std/assert";
 *
 * const path = { nodes: 2, edges: [[0, 1]] };
 * const dataset = GraphDataset.fromGraphs([{ name: "v", graphs: [path, path] }], { labels: [0, 1] });
 * const [view] = new GraphBatches(dataset).collate([1, 0]).views;
 * assertEquals(view?.nodeOffsets, Int32Array.of(0, 2, 4));
 * assertEquals(view?.sources, Int32Array.of(0, 2));
 * assertEquals(view?.targets, Int32Array.of(1, 3));
 * ```
 */
export class GraphBatches {
  readonly dataset: GraphDataset;
  readonly schema: GraphSchema;
  readonly #views: readonly SortedView[];
  readonly #classes: Int32Array;

  /** Throws `invalid-argument` if the data set does not fit the schema; labels that it does not know become class -1. */
  constructor(dataset: GraphDataset, options: GraphBatchesOptions = {}) {
    this.dataset = dataset;
    this.schema = options.schema ?? schemaOf(dataset);
    const expected = this.schema.views;
    if (expected.length !== dataset.views.length) {
      const message = `Cannot use a data set of ${dataset.views.length} views: ` +
        `the model was made for ${expected.length}`;
      throw new PackhorseError("invalid-argument", message);
    }
    this.#views = dataset.views.map((view, index) => {
      const { name, nodes, edges } = view;
      const schema = expected[index]!;
      const nodeFeatures = encodeColumns(nodes, schema.nodes, `nodes of view ${name}`);
      return {
        ...sortEdges(view),
        nodeWidth: nodeWidth(schema),
        edgeWidth: edgeWidth(schema),
        nodeFeatures: nodeFeatures.length > 0
          ? nodeFeatures
          : new Float32Array(view.nodeOffsets.at(-1)!).fill(1),
        edgeFeatures: encodeColumns(edges, schema.edges, `edges of view ${name}`),
      };
    });
    const classOf = new Map(this.schema.classes.map((label, index) => [label, index]));
    this.#classes = dataset.labels.map((label) => classOf.get(dataset.classes[label]!) ?? -1);
  }

  /** Objects by batches. Throws `invalid-argument` for a batch size that is none. */
  static order(objects: readonly number[], options: BatchOrderOptions): number[][] {
    const { batchSize, seed, epoch = 0 } = options;
    if (!(Number.isInteger(batchSize) && batchSize >= 1)) {
      const message =
        `Cannot make batches of ${batchSize} objects: it must be an integer from 1 on`;
      throw new PackhorseError("invalid-argument", message);
    }
    const order = seed === undefined
      ? objects
      : new Random(seed, "batches", epoch).shuffled(objects);
    return Array.from(
      { length: Math.ceil(order.length / batchSize) },
      (_, i) => order.slice(i * batchSize, (i + 1) * batchSize),
    );
  }

  /** The class of each object, -1 where the schema has none. */
  get classes(): Int32Array {
    return this.#classes;
  }

  /** Joins some objects, in this order. Throws `invalid-argument` for one that does not exist. */
  collate(objects: readonly number[]): GraphBatch {
    for (const object of objects) {
      if (Number.isInteger(object) && object >= 0 && object < this.dataset.length) continue;
      const message = `Cannot batch object ${object}: there are ${this.dataset.length}`;
      throw new PackhorseError("invalid-argument", message);
    }
    return {
      objects,
      labels: Int32Array.from(objects, (object) => this.#classes[object]!),
      views: this.#views.map((view) => joinView(view, objects)),
    };
  }
}

/** A view whose edges are sorted by targets, and again by sources, within each graph. */
interface SortedView {
  readonly nodeStarts: Int32Array;
  readonly edgeStarts: Int32Array;
  /** Edges into each node, one node behind another over all graphs. */
  readonly inDegrees: Int32Array;
  readonly outDegrees: Int32Array;
  /** By targets; nodes count within their graph. */
  readonly sources: Int32Array;
  readonly targets: Int32Array;
  /** By sources: which edge, by targets, within its graph. */
  readonly outEdges: Int32Array;
  /** By targets: which edge of the view. */
  readonly order: Int32Array;
  readonly nodeWidth: number;
  readonly edgeWidth: number;
  readonly nodeFeatures: Float32Array<ArrayBuffer>;
  readonly edgeFeatures: Float32Array<ArrayBuffer>;
}

function sortEdges(view: GraphView) {
  const { nodeOffsets, edgeOffsets } = view;
  const nodes = nodeOffsets.at(-1)!;
  const objectOf = new Int32Array(view.sources.length);
  for (let object = 0; object + 1 < edgeOffsets.length; object++) {
    objectOf.fill(object, edgeOffsets[object], edgeOffsets[object + 1]);
  }
  /** A stable order of edges by a node of theirs, and how many each node has. */
  const sort = (ends: Int32Array, objects: Int32Array) => {
    const degrees = new Int32Array(nodes);
    const nodeOf = ends.map((end, edge) => nodeOffsets[objects[edge]!]! + end);
    for (const node of nodeOf) degrees[node]!++;
    const next = new Int32Array(nodes);
    for (let node = 1; node < nodes; node++) next[node] = next[node - 1]! + degrees[node - 1]!;
    const order = new Int32Array(ends.length);
    for (let edge = 0; edge < ends.length; edge++) order[next[nodeOf[edge]!]!++] = edge;
    return { degrees, order };
  };
  // Edges lie by graphs, and nodes too: sorting by nodes leaves each graph's edges where they were.
  const { degrees: inDegrees, order } = sort(view.targets, objectOf);
  const sources = order.map((edge) => view.sources[edge]!);
  const { degrees: outDegrees, order: outOrder } = sort(sources, objectOf);
  return {
    nodeStarts: nodeOffsets,
    edgeStarts: edgeOffsets,
    inDegrees,
    outDegrees,
    sources,
    targets: order.map((edge) => view.targets[edge]!),
    outEdges: outOrder.map((edge) => edge - edgeOffsets[objectOf[edge]!]!),
    order,
  };
}

function joinView(view: SortedView, objects: readonly number[]): ViewBatch {
  const { nodeStarts, edgeStarts } = view;
  let [nodes, edges] = [0, 0];
  for (const object of objects) {
    nodes += nodeStarts[object + 1]! - nodeStarts[object]!;
    edges += edgeStarts[object + 1]! - edgeStarts[object]!;
  }
  const joined: ViewBatch = {
    nodes,
    edges,
    nodeWidth: view.nodeWidth,
    edgeWidth: view.edgeWidth,
    nodeFeatures: new Float32Array(nodes * view.nodeWidth),
    edgeFeatures: new Float32Array(edges * view.edgeWidth),
    nodeOffsets: new Int32Array(objects.length + 1),
    objectOfNode: new Int32Array(nodes),
    edgeOffsets: new Int32Array(nodes + 1),
    sources: new Int32Array(edges),
    targets: new Int32Array(edges),
    outOffsets: new Int32Array(nodes + 1),
    outEdges: new Int32Array(edges),
    outTargets: new Int32Array(edges),
  };
  let [node, edge] = [0, 0];
  for (const [index, object] of objects.entries()) {
    const [firstNode, firstEdge] = [nodeStarts[object]!, edgeStarts[object]!];
    const nodeCount = nodeStarts[object + 1]! - firstNode;
    const edgeCount = edgeStarts[object + 1]! - firstEdge;
    joined.nodeOffsets[index + 1] = node + nodeCount;
    joined.objectOfNode.fill(index, node, node + nodeCount);
    const { nodeWidth, edgeWidth } = view;
    joined.nodeFeatures.set(
      view.nodeFeatures.subarray(firstNode * nodeWidth, (firstNode + nodeCount) * nodeWidth),
      node * nodeWidth,
    );
    for (let i = 0; i < nodeCount; i++) {
      joined.edgeOffsets[node + i + 1] = joined.edgeOffsets[node + i]! +
        view.inDegrees[firstNode + i]!;
      joined.outOffsets[node + i + 1] = joined.outOffsets[node + i]! +
        view.outDegrees[firstNode + i]!;
    }
    for (let i = 0; i < edgeCount; i++) {
      const out = view.outEdges[firstEdge + i]!;
      joined.sources[edge + i] = node + view.sources[firstEdge + i]!;
      joined.targets[edge + i] = node + view.targets[firstEdge + i]!;
      joined.outEdges[edge + i] = edge + out;
      joined.outTargets[edge + i] = node + view.targets[firstEdge + out]!;
      for (let column = 0; column < edgeWidth; column++) {
        joined.edgeFeatures[(edge + i) * edgeWidth + column] = view
          .edgeFeatures[view.order[firstEdge + i]! * edgeWidth + column]!;
      }
    }
    node += nodeCount;
    edge += edgeCount;
  }
  return joined;
}
