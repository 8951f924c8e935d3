import {
  align,
  type CrossValidation,
  type EpochReport,
  evaluate,
  type GraphClassifier,
  type GraphDataset,
} from "../src/graph/mod.ts";
import {
  confusionPanel,
  correspondencePanel,
  curvePanel,
  planPanel,
  type TrainingCurve,
} from "./graph_chart.ts";
import { formatAccuracy } from "./graph_report.ts";
import type { HtmlReport, ReportSection } from "./html_report.ts";

/** Objects whose correspondences are drawn. */
const DRAWN = 3;

/** A page about the training of a model. */
export function modelReport({ dataset, model, history, epoch, output }: {
  readonly dataset: GraphDataset;
  readonly model: GraphClassifier;
  readonly history: readonly EpochReport[];
  readonly epoch: number;
  readonly output: string;
}): HtmlReport {
  const { confusion, accuracy, objects } = evaluate(model, dataset);
  const last = history[epoch - 1]!;
  const watched = last.validationAccuracy;
  return {
    title: `Training of ${output}`,
    summary: `${objects.toLocaleString("en")} objects in ${dataset.views.length} views, ` +
      `fusion ${model.options.fusion}, epoch ${epoch} of ${history.length}.`,
    sections: [
      {
        title: "Result",
        parts: [{
          kind: "figures",
          figures: [
            {
              value: formatAccuracy(accuracy),
              label: "accuracy on all objects, also trained ones",
            },
            ...(watched === undefined
              ? []
              : [{ value: formatAccuracy(watched), label: "accuracy on watched objects" }]),
            ...(last.transportCost === undefined ? [] : [{
              value: last.transportCost.toFixed(3),
              label: "transport cost; 1 is nodes matched at random",
            }]),
          ],
        }],
      },
      curves([{ name: "model", history }]),
      confusionSection(confusion, model.schema.classes, "Of all objects, also those trained on."),
      ...correspondences(dataset, model),
    ],
  };
}

/** A page about a cross-validation. */
export function foldsReport(dataset: GraphDataset, result: CrossValidation): HtmlReport {
  const { folds, accuracy, deviation, confusion } = result;
  return {
    title: `Cross-validation over ${folds.length} folds`,
    summary: `${dataset.length.toLocaleString("en")} objects in ${dataset.views.length} views, ` +
      `each measured by a model that was not trained on it.`,
    sections: [
      {
        title: "Result",
        parts: [{
          kind: "figures",
          figures: [
            { value: formatAccuracy(accuracy), label: "mean accuracy" },
            { value: formatAccuracy(deviation), label: "standard deviation" },
          ],
        }],
      },
      curves(folds.map(({ fold, history }) => ({ name: `fold ${fold}`, history }))),
      confusionSection(confusion, dataset.classes, "Of all folds together."),
    ],
  };
}

function curves(of: readonly TrainingCurve[]): ReportSection {
  const transported = of.some(({ history }) =>
    history.some(({ transportCost }) => transportCost !== undefined)
  );
  return {
    title: "Training",
    parts: [{
      kind: "charts",
      charts: [
        { title: "Loss", note: "Mean cross-entropy, in nats.", spec: curvePanel(of, "loss") },
        { title: "Accuracy", spec: curvePanel(of, "accuracy") },
        ...(transported
          ? [{
            title: "Transport cost",
            note: "1 is what nodes matched at random cost on average.",
            spec: curvePanel(of, "transportCost"),
          }]
          : []),
      ],
    }],
  };
}

function confusionSection(
  confusion: readonly (readonly number[])[],
  classes: readonly number[],
  note: string,
): ReportSection {
  const charts = [{ title: "Confusion", note, spec: confusionPanel(confusion, classes) }];
  return { title: "Classes", parts: [{ kind: "charts", charts }] };
}

/** Which nodes correspond, of the first object of some classes. */
function correspondences(dataset: GraphDataset, model: GraphClassifier): ReportSection[] {
  if (model.options.fusion !== "amosl") return [];
  const objects = dataset.classes.map((_, label) => dataset.labels.indexOf(label))
    .filter((object) => object >= 0).slice(0, DRAWN);
  const alignments = align(model, dataset, { objects });
  if (alignments.length === 0) return [];
  return [{
    title: "Correspondences",
    text: "Lines join each node of the first view with the node of the second that most of it " +
      "goes to. The second graph is laid out near the partners of its nodes.",
    parts: alignments.map((alignment) => {
      const names = alignment.views.map((view) => dataset.views[view]!.name).join(" and ");
      const label = dataset.classes[dataset.labels[alignment.object]!];
      const pictured = { dataset, alignment };
      return {
        kind: "charts",
        charts: [
          {
            title: `Object ${alignment.object}, label ${label}: ${names}`,
            note: `Transport cost ${alignment.cost.toFixed(3)}` +
              (alignment.converged ? "." : "; the iterations did not converge."),
            spec: correspondencePanel(pictured),
          },
          { title: "Its plan", spec: planPanel(pictured) },
        ],
      };
    }),
  }];
}
