import { GraphDataset, NO_COLUMNS } from "./dataset.ts";
import {
  edgeWidth,
  encodeColumns,
  type GraphSchema,
  nodeWidth,
  type ViewSchema,
} from "./schema.ts";

/** The schema of {@linkcode joinViews}: the features of all views side by side, and which view a node is of. */
export function joinedSchema(views: readonly ViewSchema[]): ViewSchema {
  const sum = (widthOf: (view: ViewSchema) => number) =>
    views.reduce((total, view) => total + widthOf(view), 0);
  return {
    name: views.map(({ name }) => name).join("+"),
    nodes: { attributes: sum(nodeWidth) + views.length, labelValues: [] },
    edges: { attributes: sum(edgeWidth), labelValues: [] },
  };
}

/** One view of all: an object's graphs as one, whose parts are not joined. Features of other views are 0. */
export function joinViews(dataset: GraphDataset, schema: GraphSchema): GraphDataset {
  const { views, length, labels, classes } = dataset;
  const joined = joinedSchema(schema.views);
  const nodeColumns = joined.nodes.attributes;
  const edgeColumns = joined.edges.attributes;
  const nodeCount = views.reduce((sum, view) => sum + view.nodeOffsets.at(-1)!, 0);
  const edgeCount = views.reduce((sum, view) => sum + view.edgeOffsets.at(-1)!, 0);
  const nodeOffsets = new Int32Array(length + 1);
  const edgeOffsets = new Int32Array(length + 1);
  const [sources, targets] = [new Int32Array(edgeCount), new Int32Array(edgeCount)];
  const nodes = new Float32Array(nodeCount * nodeColumns);
  const edges = new Float32Array(edgeCount * edgeColumns);
  let [nodeStart, edgeStart] = [0, 0];
  const parts = views.map((view, i) => {
    const of = schema.views[i]!;
    const part = {
      view,
      nodeStart,
      edgeStart,
      nodeWidth: nodeWidth(of),
      edgeWidth: edgeWidth(of),
      nodeFeatures: encodeColumns(view.nodes, of.nodes, `nodes of view ${view.name}`),
      edgeFeatures: encodeColumns(view.edges, of.edges, `edges of view ${view.name}`),
    };
    nodeStart += part.nodeWidth;
    edgeStart += part.edgeWidth;
    return part;
  });
  let [node, edge] = [0, 0];
  for (let object = 0; object < length; object++) {
    const first = node;
    for (const [index, part] of parts.entries()) {
      const { view, nodeFeatures, edgeFeatures, nodeWidth, edgeWidth } = part;
      const ofPart = node - first;
      for (let i = view.edgeOffsets[object]!; i < view.edgeOffsets[object + 1]!; i++, edge++) {
        sources[edge] = ofPart + view.sources[i]!;
        targets[edge] = ofPart + view.targets[i]!;
        const row = edgeFeatures.subarray(i * edgeWidth, (i + 1) * edgeWidth);
        edges.set(row, edge * edgeColumns + part.edgeStart);
      }
      for (let i = view.nodeOffsets[object]!; i < view.nodeOffsets[object + 1]!; i++, node++) {
        const start = node * nodeColumns;
        // Nodes without features have one that is 1.
        if (nodeFeatures.length === 0) nodes[start + part.nodeStart] = 1;
        else {
          const row = nodeFeatures.subarray(i * nodeWidth, (i + 1) * nodeWidth);
          nodes.set(row, start + part.nodeStart);
        }
        nodes[start + nodeStart + index] = 1;
      }
    }
    nodeOffsets[object + 1] = node;
    edgeOffsets[object + 1] = edge;
  }
  return new GraphDataset([{
    ...{ name: joined.name, nodeOffsets, edgeOffsets, sources, targets },
    nodes: { ...NO_COLUMNS, attributes: nodes, attributeWidth: nodeColumns },
    edges: { ...NO_COLUMNS, attributes: edges, attributeWidth: edgeColumns },
  }], { labels: labels.map((label) => classes[label]!), allowMissing: "all" });
}
