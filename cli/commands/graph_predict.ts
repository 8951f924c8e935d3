import { Device } from "../../src/device/mod.ts";
import { GraphClassifier, predict, readGraphDataset } from "../../src/graph/mod.ts";
import { formatAccuracy } from "../graph_report.ts";
import { defined, type GlobalOptions } from "../options.ts";
import { printJson, printTable } from "../output.ts";
import type { GraphDataOptions } from "./graph_info.ts";

/** Shows the likeliest class of every object. */
export async function graphPredict(
  { allowMissing, backend, json }: GlobalOptions & GraphDataOptions,
  path: string,
  views: string[],
): Promise<void> {
  const dataset = await readGraphDataset(views, defined({ allowMissing }));
  using device = Device.open(defined({ backend }));
  using model = await GraphClassifier.load(device, path);
  const { classes } = model.schema;
  const { objects, classes: likeliest, probabilities } = predict(model, dataset);
  const predictions = objects.map((object, i) => ({
    object,
    label: classes[likeliest[i]!]!,
    probability: probabilities[i * classes.length + likeliest[i]!]!,
    probabilities: [...probabilities.subarray(i * classes.length, (i + 1) * classes.length)],
  }));
  if (json) return printJson({ model: path, views, backend: device.backend, classes, predictions });
  printTable(
    [">object", ">label", ">probability"],
    predictions.map(({ object, label, probability }) => [
      object,
      label,
      formatAccuracy(probability),
    ]),
  );
}
