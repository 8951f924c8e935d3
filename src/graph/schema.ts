import { PackhorseError } from "../error.ts";
import type { GraphColumns, GraphDataset } from "./dataset.ts";

/** How attributes and labels of nodes or edges become features: the attributes, then each label one-hot. */
export interface ColumnSchema {
  readonly attributes: number;
  /** The values that each label takes, in ascending order. */
  readonly labelValues: readonly (readonly number[])[];
}

/** How the nodes and edges of a view become features. */
export interface ViewSchema {
  readonly name: string;
  readonly nodes: ColumnSchema;
  readonly edges: ColumnSchema;
}

/** What a model was made for: views, in their order, and the labels that it tells apart. */
export interface GraphSchema {
  readonly views: readonly ViewSchema[];
  readonly classes: readonly number[];
}

/** The schema of a data set. */
export function schemaOf({ views, classes }: GraphDataset): GraphSchema {
  return {
    classes,
    views: views.map(({ name, nodes, edges }) => ({
      name,
      nodes: columnSchemaOf(nodes),
      edges: columnSchemaOf(edges),
    })),
  };
}

/** Features of a node. Nodes that have neither attributes nor labels get one that is 1. */
export function nodeWidth({ nodes }: ViewSchema): number {
  return Math.max(1, widthOf(nodes));
}

/** Features of an edge, 0 if it has none. */
export function edgeWidth({ edges }: ViewSchema): number {
  return widthOf(edges);
}

function widthOf({ attributes, labelValues }: ColumnSchema): number {
  return labelValues.reduce((sum, values) => sum + values.length, attributes);
}

function columnSchemaOf({ attributeWidth, labels, labelWidth }: GraphColumns): ColumnSchema {
  const labelValues = Array.from({ length: labelWidth }, (_, column) => {
    const values = new Set<number>();
    for (let i = column; i < labels.length; i += labelWidth) values.add(labels[i]!);
    return [...values].sort((a, b) => a - b);
  });
  return { attributes: attributeWidth, labelValues };
}

/**
 * Features `[rows, width]` of nodes or edges; `what` is for messages. Throws `invalid-argument` for columns that do not fit
 * the schema, and labels that it does not know.
 */
export function encodeColumns(
  columns: GraphColumns,
  schema: ColumnSchema,
  what: string,
): Float32Array<ArrayBuffer> {
  const { attributes, attributeWidth, labels, labelWidth } = columns;
  const refuse = (reason: string): never => {
    throw new PackhorseError("invalid-argument", `Cannot use the ${what}: ${reason}`);
  };
  const { attributes: expected, labelValues } = schema;
  if (attributeWidth !== expected) {
    refuse(`they have ${attributeWidth} attributes, the model was made for ${expected}`);
  }
  if (labelWidth !== labelValues.length) {
    refuse(`they have ${labelWidth} labels, the model was made for ${labelValues.length}`);
  }
  const width = widthOf(schema);
  const rows = attributeWidth > 0
    ? attributes.length / attributeWidth
    : labelWidth > 0
    ? labels.length / labelWidth
    : 0;
  const features = new Float32Array(rows * width);
  const places = labelValues.map((values) => new Map(values.map((value, at) => [value, at])));
  for (let row = 0; row < rows; row++) {
    const start = row * attributeWidth;
    features.set(attributes.subarray(start, start + attributeWidth), row * width);
    let column = row * width + attributeWidth;
    for (let label = 0; label < labelWidth; label++) {
      const value = labels[row * labelWidth + label]!;
      const place = places[label]!.get(value) ??
        refuse(`label ${value} of row ${row} is none of those that the model was made for`);
      features[column + place] = 1;
      column += labelValues[label]!.length;
    }
  }
  return features;
}
