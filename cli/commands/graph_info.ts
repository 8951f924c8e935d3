import {
  type CountRange,
  type DatasetStatistics,
  datasetStatistics,
  readGraphDataset,
} from "../../src/graph/mod.ts";
import { defined, type GlobalOptions } from "../options.ts";
import { print, printJson, printTable } from "../output.ts";

/** Options of the commands that read a data set of graphs. */
export interface GraphDataOptions {
  allowMissing?: true | undefined;
}

/** Checks a data set, and shows what it is made of. */
export async function graphInfo(
  { allowMissing, json }: GlobalOptions & GraphDataOptions,
  views: string[],
): Promise<void> {
  const dataset = await readGraphDataset(views, defined({ allowMissing }));
  const statistics = datasetStatistics(dataset);
  if (json) return printJson({ paths: views, ...statistics });
  printStatistics(statistics);
}

const count = (value: number) => value.toLocaleString("en");

function printStatistics({ objects, classes, views }: DatasetStatistics): void {
  print(`${count(objects)} objects in ${views.length} ${views.length === 1 ? "view" : "views"}`);
  print();
  printTable(
    [
      ...["view", ">graphs", ">nodes", ">per graph", ">edges", ">per graph", ">degree"],
      ...["edges go", ">isolated", ">node columns", ">edge columns"],
    ],
    views.map((view) => [
      view.name,
      view.missing === 0
        ? count(view.graphs)
        : `${count(view.graphs)} (${count(view.missing)} missing)`,
      count(view.nodes),
      formatRange(view.nodesPerGraph),
      count(view.edges),
      formatRange(view.edgesPerGraph),
      view.meanDegree.toFixed(1),
      view.undirected ? "both ways" : "one way",
      count(view.isolatedNodes),
      formatColumns(view.nodeAttributes, view.nodeLabels),
      formatColumns(view.edgeAttributes, view.edgeLabels),
    ]),
  );
  print();
  printTable(
    [">label", ">objects", ">share"],
    classes.map((each) => [
      each.label,
      count(each.objects),
      `${(100 * each.objects / objects).toFixed(1)} %`,
    ]),
  );
}

const formatRange = ({ least, mean, most }: CountRange) =>
  `${least}–${most}, mean ${mean.toFixed(1)}`;

function formatColumns(attributes: number, labels: number): string {
  const parts = [
    ...(attributes > 0 ? [`${attributes} numbers`] : []),
    ...(labels > 0 ? [`${labels} ${labels === 1 ? "label" : "labels"}`] : []),
  ];
  return parts.join(", ") || "none";
}
