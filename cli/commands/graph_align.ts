import { Device } from "../../src/device/mod.ts";
import { align, GraphClassifier, readGraphDataset, strongest } from "../../src/graph/mod.ts";
import { AtomicFile } from "../../src/io/mod.ts";
import { PackhorseError } from "../../src/error.ts";
import { formatPairs, writeAlignmentChart } from "../graph_chart.ts";
import { defined, type GlobalOptions } from "../options.ts";
import { print, printJson, printTable } from "../output.ts";
import type { GraphDataOptions } from "./graph_info.ts";

/** Options of `graph align`. */
export interface GraphAlignOptions extends GraphDataOptions {
  object?: number | undefined;
  top: number;
  svg?: string | undefined;
}

/** Shows which nodes of an object's views correspond. */
export async function graphAlign(
  options: GlobalOptions & GraphAlignOptions,
  path: string,
  views: string[],
): Promise<void> {
  const { allowMissing, backend, json, object, top, svg } = options;
  const dataset = await readGraphDataset(views, defined({ allowMissing }));
  using file = svg === undefined ? undefined : await AtomicFile.create(svg);
  using device = Device.open(defined({ backend }));
  using model = await GraphClassifier.load(device, path);
  const alignments = align(model, dataset, object === undefined ? {} : { objects: [object] });
  if (file) {
    const [alignment] = alignments;
    if (alignment === undefined) {
      const message = "Cannot draw correspondences: there is no object with nodes in both views";
      throw new PackhorseError("invalid-argument", message);
    }
    await writeAlignmentChart(file, { dataset, alignment });
  }
  const found = alignments.map((alignment) => {
    const { object, views: [first, second], rows, columns, cost, converged } = alignment;
    return {
      object,
      views: [dataset.views[first]!.name, dataset.views[second]!.name],
      nodes: [rows, columns],
      ...{ cost, converged },
      correspondences: strongest(alignment).slice(0, top),
    };
  });
  if (json) {
    return printJson({ model: path, views, backend: device.backend, alignments: found });
  }
  printTable(
    [">object", "views", ">nodes", ">cost", "strongest correspondences"],
    found.map(({ object, views, nodes, cost, converged, correspondences }) => [
      object,
      views.join(" → "),
      nodes.join(", "),
      converged ? cost.toFixed(3) : `${cost.toFixed(3)} (not converged)`,
      formatPairs(correspondences),
    ]),
  );
  if (svg !== undefined) print(`${svg} written`);
}
