import { PackhorseError } from "../error.ts";

/**
 * One view of all objects: a graph for each, one behind another. Edges lead from a source to a target; an undirected
 * edge is two of them.
 */
export interface GraphView {
  /** What the view is called: the name of its folder, for one that was read. */
  readonly name: string;
  /** Where each object's nodes begin, and at last their number: `[objects + 1]`. */
  readonly nodeOffsets: Int32Array<ArrayBuffer>;
  /** Where each object's edges begin, and at last their number: `[objects + 1]`. */
  readonly edgeOffsets: Int32Array<ArrayBuffer>;
  /** Node that each edge comes from, counted within its graph: `[edges]`. */
  readonly sources: Int32Array<ArrayBuffer>;
  /** Node that each edge leads to, counted within its graph: `[edges]`. */
  readonly targets: Int32Array<ArrayBuffer>;
  /** Attributes and labels of the nodes. */
  readonly nodes: GraphColumns;
  /** Attributes and labels of the edges. */
  readonly edges: GraphColumns;
}

/** Attributes and labels of nodes or edges, by rows. */
export interface GraphColumns {
  /** `[rows, attributeWidth]`. */
  readonly attributes: Float32Array<ArrayBuffer>;
  /** Attributes of a row; 0 if there are none. */
  readonly attributeWidth: number;
  /** `[rows, labelWidth]`; any integers. */
  readonly labels: Int32Array<ArrayBuffer>;
  /** Labels of a row; 0 if there are none. */
  readonly labelWidth: number;
}

/** Options of a {@linkcode GraphDataset}. */
export interface GraphDatasetOptions {
  /** The label of each object; any integers. */
  readonly labels: ArrayLike<number>;
  /**
   * Whether an object may lack some of the views, which then have no nodes for it; `all`: every one of them. Default:
   * false.
   */
  readonly allowMissing?: boolean | "all" | undefined;
  /**
   * Which node of the second view is which node of the first, where that is known: `[nodes of the second view]`, nodes
   * counted within their graphs; -1 for none.
   */
  readonly correspondence?: Int32Array<ArrayBuffer> | undefined;
}

/** No attributes and no labels. */
export const NO_COLUMNS: GraphColumns = {
  attributes: new Float32Array(),
  attributeWidth: 0,
  labels: new Int32Array(),
  labelWidth: 0,
};

/**
 * Objects that are seen as one graph in each of one or more views, and have a label. The views of an object have node
 * sets of their own.
 *
 * @example
 * ```ts
 * import { GraphDataset } from "@packhorse/packhorse/graph";
 * import { assertEquals } from "@std/assert";
 *
 * // Two objects in one view: an edge and a single node.
 * const dataset = GraphDataset.fromGraphs(
 *   [{
 *     name: "molecules",
 *     graphs: [
 *       { nodeAttributes: [[0.5], [1]], edges: [[0, 1], [1, 0]] },
 *       { nodeAttributes: [[2]], edges: [] },
 *     ],
 *   }],
 *   { labels: [7, 9] },
 * );
 * assertEquals(dataset.length, 2);
 * assertEquals(dataset.classes, [7, 9]);
 * assertEquals(dataset.views[0].nodeOffsets, Int32Array.of(0, 2, 3));
 * ```
 */
export class GraphDataset {
  /** The views; there is at least one. */
  readonly views: readonly [GraphView, ...GraphView[]];
  /** The class of each object: an index into {@linkcode classes}. */
  readonly labels: Int32Array<ArrayBuffer>;
  /** The labels that objects have, in ascending order. */
  readonly classes: readonly number[];
  /** Which node of the second view is which node of the first, where that is known. */
  readonly correspondence: Int32Array<ArrayBuffer> | undefined;

  /**
   * Throws `invalid-argument` if the views are not of the same objects, an object has no nodes in a view (in all views,
   * if it may lack some), arrays do not fit each other, an edge leads to a node that its graph does not have, or a
   * number is not finite.
   */
  constructor(views: readonly GraphView[], options: GraphDatasetOptions) {
    const { allowMissing = false, correspondence } = options;
    const [first] = views;
    if (first === undefined) refuse("it needs at least one view");
    const raw = Array.from(options.labels);
    for (const [object, label] of raw.entries()) {
      if (!isInteger32(label)) refuse(`the label of object ${object} is ${label}, not an integer`);
    }
    for (const view of views) checkView(view, raw.length);
    for (let object = 0; object < raw.length; object++) {
      const missing = views.filter((view) => !hasObject(view, object));
      const isAllowed = allowMissing === "all" || allowMissing && missing.length < views.length;
      if (missing.length === 0 || isAllowed) continue;
      refuse(
        `object ${object} has no nodes in ${missing.map(({ name }) => name).join(", ")}` +
          (missing.length < views.length ? "; allowMissing lets objects lack some views" : ""),
      );
    }
    if (correspondence !== undefined && correspondence.length !== views[1]?.nodeOffsets.at(-1)) {
      refuse("a correspondence must have an element for each node of the second view");
    }
    this.views = views as [GraphView, ...GraphView[]];
    this.classes = [...new Set(raw)].sort((a, b) => a - b);
    const classOf = new Map(this.classes.map((label, index) => [label, index]));
    this.labels = Int32Array.from(raw, (label) => classOf.get(label)!);
    this.correspondence = correspondence;
  }

  /**
   * A data set of graphs that are given one by one; null stands for a view that an object lacks. Throws as the
   * constructor, and `invalid-argument` for attributes or labels that some nodes (or edges) of a view have and others
   * have not.
   */
  static fromGraphs(
    views: readonly { readonly name: string; readonly graphs: readonly (Graph | null)[] }[],
    options: GraphDatasetOptions,
  ): GraphDataset {
    return new GraphDataset(views.map(({ name, graphs }) => joinGraphs(name, graphs)), options);
  }

  /** Number of objects. */
  get length(): number {
    return this.labels.length;
  }

  /** Whether an object has nodes in a view. */
  has(view: number, object: number): boolean {
    const found = this.views[view];
    return found !== undefined && hasObject(found, object);
  }

  /** The same objects in some of the views. Throws `invalid-argument` for a view that does not exist. */
  select(views: readonly number[]): GraphDataset {
    const selected = views.map((index) =>
      this.views[index] ?? refuse(`there is no view ${index}, of ${this.views.length}`)
    );
    const labels = Array.from(this.labels, (label) => this.classes[label]!);
    const keepsPairs = views.length > 1 && views[0] === 0 && views[1] === 1;
    return new GraphDataset(selected, {
      labels,
      // An object may have lost all the views that it had.
      allowMissing: "all",
      correspondence: keepsPairs ? this.correspondence : undefined,
    });
  }
}

/** A graph by itself, as {@linkcode GraphDataset.fromGraphs} takes it. */
export interface Graph {
  /** Number of nodes; needed only if they have neither attributes nor labels. */
  readonly nodes?: number | undefined;
  /** Attributes of each node. */
  readonly nodeAttributes?: readonly (readonly number[])[] | undefined;
  /** Labels of each node, any integers. */
  readonly nodeLabels?: readonly (readonly number[])[] | undefined;
  /** Source and target of each edge. */
  readonly edges: readonly (readonly number[])[];
  /** Attributes of each edge. */
  readonly edgeAttributes?: readonly (readonly number[])[] | undefined;
  /** Labels of each edge, any integers. */
  readonly edgeLabels?: readonly (readonly number[])[] | undefined;
}

/** Whether an object has nodes in a view. */
function hasObject({ nodeOffsets }: GraphView, object: number): boolean {
  return nodeOffsets[object + 1]! > nodeOffsets[object]!;
}

/** Whether a value is an integer that 32 bits hold. */
export function isInteger32(value: unknown): value is number {
  return typeof value === "number" && Number.isInteger(value) && Math.abs(value) < 2 ** 31;
}

function refuse(reason: string): never {
  throw new PackhorseError("invalid-argument", `Cannot make a graph data set: ${reason}`);
}

function checkView(view: GraphView, objects: number): void {
  const { name, nodeOffsets, edgeOffsets, sources, targets } = view;
  for (const [what, offsets] of Object.entries({ nodeOffsets, edgeOffsets })) {
    if (offsets.length !== objects + 1) {
      refuse(`${what} of view ${name} are of ${offsets.length - 1} objects, labels of ${objects}`);
    }
    if (offsets[0] !== 0 || offsets.some((offset, i) => i > 0 && offset < offsets[i - 1]!)) {
      refuse(`${what} of view ${name} must begin with 0 and never fall`);
    }
  }
  const [nodes, edges] = [nodeOffsets.at(-1)!, edgeOffsets.at(-1)!];
  if (sources.length !== edges || targets.length !== edges) {
    refuse(
      `view ${name} has ${edges} edges, but ${sources.length} sources, ${targets.length} targets`,
    );
  }
  for (let object = 0; object < objects; object++) {
    const size = nodeOffsets[object + 1]! - nodeOffsets[object]!;
    for (let edge = edgeOffsets[object]!; edge < edgeOffsets[object + 1]!; edge++) {
      const [source, target] = [sources[edge]!, targets[edge]!];
      if (source >= 0 && source < size && target >= 0 && target < size) continue;
      refuse(
        `an edge of object ${object} in view ${name} joins nodes ${source} and ${target}, ` +
          `of ${size}`,
      );
    }
  }
  checkColumns(view.nodes, nodes, `nodes of view ${name}`);
  checkColumns(view.edges, edges, `edges of view ${name}`);
}

function checkColumns(columns: GraphColumns, rows: number, what: string): void {
  const { attributes, attributeWidth, labels, labelWidth } = columns;
  const sizes = [[attributes, attributeWidth, "attributes"], [
    labels,
    labelWidth,
    "labels",
  ]] as const;
  for (const [values, width, kind] of sizes) {
    if (values.length === rows * width) continue;
    refuse(`${kind} of the ${rows} ${what} must be ${rows * width}, got ${values.length}`);
  }
  const bad = attributes.findIndex((value) => !Number.isFinite(value));
  if (bad >= 0) refuse(`attribute ${bad} of the ${what} is ${attributes[bad]}, not finite`);
}

function joinGraphs(name: string, graphs: readonly (Graph | null)[]): GraphView {
  const nodeOffsets = new Int32Array(graphs.length + 1);
  const edgeOffsets = new Int32Array(graphs.length + 1);
  for (const [object, graph] of graphs.entries()) {
    const nodes = graph === null ? 0 : graph.nodes ?? graph.nodeAttributes?.length ??
      graph.nodeLabels?.length ?? refuse(`object ${object} in view ${name} has no number of nodes`);
    nodeOffsets[object + 1] = nodeOffsets[object]! + nodes;
    edgeOffsets[object + 1] = edgeOffsets[object]! + (graph?.edges.length ?? 0);
  }
  const given = graphs.filter((graph) => graph !== null);
  const edges = given.flatMap((graph) => graph.edges);
  const odd = edges.find((edge) => edge.length !== 2 || !edge.every(isInteger32));
  if (odd) refuse(`an edge in view ${name} must be two integers, got [${odd.join(", ")}]`);
  const columns = (
    attributes: "nodeAttributes" | "edgeAttributes",
    labels: "nodeLabels" | "edgeLabels",
    rows: number,
  ): GraphColumns => {
    const [values, attributeWidth] = joinRows(given, attributes, rows, name);
    const [words, labelWidth] = joinRows(given, labels, rows, name);
    const bad = words.find((word) => !isInteger32(word));
    if (bad !== undefined) refuse(`${labels} of view ${name} must be integers, got ${bad}`);
    return {
      attributes: Float32Array.from(values),
      attributeWidth,
      labels: Int32Array.from(words),
      labelWidth,
    };
  };
  return {
    name,
    nodeOffsets,
    edgeOffsets,
    sources: Int32Array.from(edges, (edge) => edge[0]!),
    targets: Int32Array.from(edges, (edge) => edge[1]!),
    nodes: columns("nodeAttributes", "nodeLabels", nodeOffsets.at(-1)!),
    edges: columns("edgeAttributes", "edgeLabels", edgeOffsets.at(-1)!),
  };
}

/** The rows of all graphs, one behind another, and their width. */
function joinRows(
  graphs: readonly Graph[],
  what: "nodeAttributes" | "nodeLabels" | "edgeAttributes" | "edgeLabels",
  expected: number,
  name: string,
): [number[], number] {
  const rows = graphs.flatMap((graph) => graph[what] ?? []);
  const width = rows[0]?.length ?? 0;
  if (rows.length !== 0 && rows.length !== expected) {
    refuse(`view ${name} has ${what} for ${rows.length} of ${expected}`);
  }
  const odd = rows.findIndex((row) => row.length !== width);
  if (odd >= 0) {
    refuse(`row ${odd} of ${what} of view ${name} has ${rows[odd]!.length} values, not ${width}`);
  }
  return [rows.flat(), width];
}
