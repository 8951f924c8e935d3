import { type GraphColumns, GraphDataset, type GraphView, NO_COLUMNS } from "./dataset.ts";
import { type NumberTable, refuseRow } from "./number_table.ts";

/** The tables that a view is read from. Nodes and graphs count from the base of the tables. */
export interface ViewTables {
  readonly name: string;
  /** Source and target of each edge, nodes of all graphs. */
  readonly edges: NumberTable;
  /** The graph of each node, in ascending order. */
  readonly indicator: NumberTable;
  /** The label of each graph. */
  readonly labels: NumberTable;
  readonly nodeAttributes?: NumberTable | undefined;
  readonly nodeLabels?: NumberTable | undefined;
  readonly edgeAttributes?: NumberTable | undefined;
  readonly edgeLabels?: NumberTable | undefined;
}

/** Makes a data set of one or more views; throws `corrupt`, naming file and row. */
export function assembleViews(
  tables: readonly [ViewTables, ...ViewTables[]],
  allowMissing: boolean,
): GraphDataset {
  const [first, ...others] = tables;
  const views = tables.map((each) => assembleView(each, allowMissing));
  for (const { labels } of others) requireSameLabels(labels, first.labels);
  for (let object = 0; object < first.labels.rows; object++) {
    if (views.some(({ nodeOffsets: at }) => at[object + 1]! > at[object]!)) continue;
    const graph = object + first.labels.base;
    refuseRow(first.labels, object, `graph ${graph} has no nodes in any view`);
  }
  return new GraphDataset(views, { labels: first.labels.values, allowMissing });
}

function assembleView(tables: ViewTables, allowMissing: boolean): GraphView {
  const { name, edges, indicator } = tables;
  const nodeOffsets = offsetsOf(tables, allowMissing);
  const { edgeOffsets, order, sources, targets } = edgesOf(tables, nodeOffsets);
  const count = (table: NumberTable | undefined, rows: number, of: string) => {
    if (table === undefined || table.rows === rows) return;
    const reason = `the file has ${table.rows} ${table.unit}s, there are ${rows} ${of}`;
    refuseRow(table, Math.min(table.rows, rows), reason);
  };
  for (const table of [tables.nodeAttributes, tables.nodeLabels]) {
    count(table, indicator.rows, "nodes");
  }
  for (const table of [tables.edgeAttributes, tables.edgeLabels]) count(table, edges.rows, "edges");
  return {
    ...{ name, nodeOffsets, edgeOffsets, sources, targets },
    nodes: columnsOf(tables.nodeAttributes, tables.nodeLabels),
    edges: columnsOf(tables.edgeAttributes, tables.edgeLabels, order),
  };
}

function requireSameLabels(labels: NumberTable, first: NumberTable): void {
  if (labels.rows !== first.rows) {
    const reason = `the view has ${labels.rows} graphs, ${first.path} has labels of ${first.rows}`;
    refuseRow(labels, Math.min(labels.rows, first.rows), reason);
  }
  const differs = labels.values.findIndex((label, i) => label !== first.values[i]);
  if (differs < 0) return;
  const [label, other] = [labels.values[differs], first.values[differs]];
  refuseRow(labels, differs, `label ${label} differs from label ${other} in ${first.path}`);
}

/** Where each graph's nodes begin. */
function offsetsOf(
  { indicator, labels }: ViewTables,
  allowMissing: boolean,
): Int32Array<ArrayBuffer> {
  const { base } = indicator;
  const graphs = labels.rows;
  const offsets = new Int32Array(graphs + 1);
  if (graphs === 0) refuseRow(labels, 0, "the file is empty, there is no graph");
  let last = base - 1;
  for (let node = 0; node < indicator.rows; node++) {
    const graph = indicator.values[node]!;
    const refuse = (reason: string) => refuseRow(indicator, node, reason);
    if (graph < base || graph >= graphs + base) {
      refuse(`graph ${graph} is none of the ${graphs} that ${labels.path} has labels of`);
    }
    if (graph < last) {
      refuse(`graph ${graph} comes after graph ${last}; nodes must be in the order of graphs`);
    }
    if (graph > last + 1 && !allowMissing) {
      refuse(`graph ${last + 1} has no nodes: the next node is of graph ${graph}`);
    }
    last = graph;
    offsets[graph - base + 1]!++;
  }
  if (last < graphs + base - 1 && !allowMissing) {
    refuseRow(indicator, indicator.rows, `the file ends, but graph ${last + 1} has no nodes`);
  }
  for (let graph = 0; graph < graphs; graph++) offsets[graph + 1]! += offsets[graph]!;
  return offsets;
}

/** The edges by graphs, else in the order of their lines; `order` says which line each comes from. */
function edgesOf({ edges, indicator }: ViewTables, nodeOffsets: Int32Array) {
  const { rows, values, base } = edges;
  const edgeOffsets = new Int32Array(nodeOffsets.length);
  for (let edge = 0; edge < rows; edge++) {
    const ends = [values[2 * edge]!, values[2 * edge + 1]!] as const;
    for (const node of ends) {
      if (node >= base && node < indicator.rows + base) continue;
      refuseRow(edges, edge, `node ${node} is none of the ${indicator.rows} in ${indicator.path}`);
    }
    const [graph, other] = ends.map((node) => indicator.values[node - base]!) as [number, number];
    if (graph !== other) {
      const reason = `node ${ends[0]} of graph ${graph} is joined to node ${
        ends[1]
      } of graph ${other}`;
      refuseRow(edges, edge, reason);
    }
    edgeOffsets[graph - base + 1]!++;
  }
  for (let graph = 1; graph < edgeOffsets.length; graph++) {
    edgeOffsets[graph]! += edgeOffsets[graph - 1]!;
  }
  const next = edgeOffsets.slice();
  const [order, sources, targets] = [0, 1, 2].map(() => new Int32Array(rows)) as [
    Int32Array<ArrayBuffer>,
    Int32Array<ArrayBuffer>,
    Int32Array<ArrayBuffer>,
  ];
  for (let line = 0; line < rows; line++) {
    const graph = indicator.values[values[2 * line]! - base]! - base;
    const edge = next[graph]!++;
    order[edge] = line;
    sources[edge] = values[2 * line]! - base - nodeOffsets[graph]!;
    targets[edge] = values[2 * line + 1]! - base - nodeOffsets[graph]!;
  }
  return { edgeOffsets, order, sources, targets };
}

function columnsOf(
  attributes: NumberTable | undefined,
  labels: NumberTable | undefined,
  order?: Int32Array,
): GraphColumns {
  const inOrder = ({ values, columns }: NumberTable) =>
    order === undefined
      ? values
      : values.map((_, i) => values[order[Math.floor(i / columns)]! * columns + i % columns]!);
  return {
    attributes: attributes ? Float32Array.from(inOrder(attributes)) : NO_COLUMNS.attributes,
    attributeWidth: attributes?.columns ?? 0,
    labels: labels ? Int32Array.from(inOrder(labels)) : NO_COLUMNS.labels,
    labelWidth: labels?.columns ?? 0,
  };
}
