import { Device } from "../../src/device/mod.ts";
import { evaluate, GraphClassifier, readGraphDataset } from "../../src/graph/mod.ts";
import { formatAccuracy, printConfusion } from "../graph_report.ts";
import { defined, type GlobalOptions } from "../options.ts";
import { print, printJson } from "../output.ts";
import type { GraphDataOptions } from "./graph_info.ts";

/** Measures a model on a data set. */
export async function graphEvaluate(
  { allowMissing, backend, json }: GlobalOptions & GraphDataOptions,
  path: string,
  views: string[],
): Promise<void> {
  const dataset = await readGraphDataset(views, defined({ allowMissing }));
  using device = Device.open(defined({ backend }));
  using model = await GraphClassifier.load(device, path);
  const evaluation = evaluate(model, dataset);
  const { classes } = model.schema;
  if (json) {
    return printJson({ model: path, views, backend: device.backend, classes, ...evaluation });
  }
  const { objects, accuracy, loss, confusion } = evaluation;
  print(
    `${objects.toLocaleString("en")} objects: accuracy ${formatAccuracy(accuracy)}, ` +
      `loss ${loss.toFixed(4)}`,
  );
  if (objects < dataset.length) {
    print(`${dataset.length - objects} objects have labels that the model does not know`);
  }
  print();
  printConfusion(confusion, classes);
}
