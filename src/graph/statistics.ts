import type { GraphDataset, GraphView } from "./dataset.ts";

/** Least, mean and most of a count. */
export interface CountRange {
  readonly least: number;
  readonly mean: number;
  readonly most: number;
}

/** What a view of a data set is made of. */
export interface ViewStatistics {
  readonly name: string;
  /** Objects that have nodes in the view. */
  readonly graphs: number;
  /** Objects that have none. */
  readonly missing: number;
  /** Nodes of all graphs. */
  readonly nodes: number;
  /** Edges of all graphs, each direction by itself. */
  readonly edges: number;
  readonly nodesPerGraph: CountRange;
  readonly edgesPerGraph: CountRange;
  /** Edges into a node, on average. */
  readonly meanDegree: number;
  /** Nodes without an edge. */
  readonly isolatedNodes: number;
  /** Edges from a node to itself. */
  readonly selfLoops: number;
  /** Edges whose source and target are joined by an edge before. */
  readonly repeatedEdges: number;
  /** Whether every edge has one in the opposite direction. */
  readonly undirected: boolean;
  readonly nodeAttributes: number;
  readonly nodeLabels: number;
  readonly edgeAttributes: number;
  readonly edgeLabels: number;
}

/** What a data set is made of. */
export interface DatasetStatistics {
  readonly objects: number;
  /** Objects of each label, labels in ascending order. */
  readonly classes: readonly { readonly label: number; readonly objects: number }[];
  readonly views: readonly ViewStatistics[];
}

/**
 * Counts what a data set is made of.
 *
 * @example
 * ```ts
 * import { datasetStatistics, readTuDataset } from "@packhorse/packhorse/graph";
 * import { assertEquals } from "@std/assert";
 *
 * const { views: [left] } = datasetStatistics(await readTuDataset(["tests/fixtures/digits/DIGITS_L"]));
 * assertEquals(left?.nodesPerGraph.mean.toFixed(1), "20.5");
 * assertEquals(left?.undirected, true);
 * ```
 */
export function datasetStatistics(dataset: GraphDataset): DatasetStatistics {
  const { length, classes, labels, views } = dataset;
  const counts = new Int32Array(classes.length);
  for (const label of labels) counts[label]!++;
  return {
    objects: length,
    classes: classes.map((label, index) => ({ label, objects: counts[index]! })),
    views: views.map(viewStatistics),
  };
}

function viewStatistics(view: GraphView): ViewStatistics {
  const { name, nodeOffsets, edgeOffsets, sources, targets } = view;
  const objects = nodeOffsets.length - 1;
  const [nodes, edges] = [nodeOffsets[objects]!, edgeOffsets[objects]!];
  const present = Array.from({ length: objects }, (_, i) => i)
    .filter((object) => nodeOffsets[object + 1]! > nodeOffsets[object]!);
  let [isolatedNodes, selfLoops, repeatedEdges, oneWay] = [0, 0, 0, 0];
  for (const object of present) {
    const size = nodeOffsets[object + 1]! - nodeOffsets[object]!;
    const joined = new Set<number>();
    const touched = new Set<number>();
    for (let edge = edgeOffsets[object]!; edge < edgeOffsets[object + 1]!; edge++) {
      const [source, target] = [sources[edge]!, targets[edge]!];
      if (source === target) selfLoops++;
      if (joined.has(source * size + target)) repeatedEdges++;
      joined.add(source * size + target);
      touched.add(source).add(target);
    }
    for (const pair of joined) {
      if (!joined.has(pair % size * size + Math.floor(pair / size))) oneWay++;
    }
    isolatedNodes += size - touched.size;
  }
  return {
    name,
    graphs: present.length,
    missing: objects - present.length,
    nodes,
    edges,
    nodesPerGraph: rangeOf(present, nodeOffsets),
    edgesPerGraph: rangeOf(present, edgeOffsets),
    meanDegree: edges / Math.max(nodes, 1),
    isolatedNodes,
    selfLoops,
    repeatedEdges,
    undirected: oneWay === 0,
    nodeAttributes: view.nodes.attributeWidth,
    nodeLabels: view.nodes.labelWidth,
    edgeAttributes: view.edges.attributeWidth,
    edgeLabels: view.edges.labelWidth,
  };
}

function rangeOf(objects: readonly number[], offsets: Int32Array): CountRange {
  let [least, most, sum] = [Infinity, 0, 0];
  for (const object of objects) {
    const count = offsets[object + 1]! - offsets[object]!;
    least = Math.min(least, count);
    most = Math.max(most, count);
    sum += count;
  }
  return objects.length === 0
    ? { least: 0, mean: 0, most: 0 }
    : { least, mean: sum / objects.length, most };
}
