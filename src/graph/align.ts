import { PackhorseError } from "../error.ts";
import { GraphBatches } from "./batch.ts";
import { type GraphClassifier, networkOf } from "./classifier.ts";
import type { GraphDataset } from "./dataset.ts";
import type { PredictionOptions } from "./evaluate.ts";
import { Tape } from "./tape.ts";

/** Which nodes of two views of an object correspond. */
export interface Alignment {
  /** Index of the object. */
  readonly object: number;
  /** The two views: indices. */
  readonly views: readonly [number, number];
  /** Nodes of the first view: rows of the plan. */
  readonly rows: number;
  /** Nodes of the second view. */
  readonly columns: number;
  /** How much of each node goes to each, `[rows, columns]`; all together 1. */
  readonly plan: Float32Array<ArrayBuffer>;
  /** `<T, C>`: 1 is what nodes matched at random cost on average. */
  readonly cost: number;
  /** Whether Sinkhorn's iterations came to their end. */
  readonly converged: boolean;
}

/** Two nodes that correspond. */
export interface Correspondence {
  /** Node of the first view, counted within the object. */
  readonly row: number;
  /** Node of the second view. */
  readonly column: number;
  /** The share of the row's mass that goes there, 0 to 1. */
  readonly share: number;
}

/**
 * Asks a model of fusion `amosl` which nodes correspond: an alignment for each pair of views that it compares, of each object
 * that has nodes in both. Throws `invalid-argument` for a model of another fusion, and as {@linkcode predict}.
 *
 * @example
 * ```ts
 * import { align, correspondenceTask, strongest, train } from "@packhorse/packhorse/graph";
 * import { Device } from "@packhorse/packhorse/device";
 * import { assertAlmostEquals, assertEquals } from "@std/assert";
 *
 * using device = Device.open({ backend: "cpu" });
 * const task = correspondenceTask({ objects: 20 });
 * const model = { fusion: "amosl", width: 8, layers: 1 } as const;
 * using result = await train(device, task, { epochs: 1, model });
 * const [alignment] = align(result.model, task, { objects: [3] });
 * assertEquals(alignment!.views, [0, 1]);
 * assertAlmostEquals(alignment!.plan.reduce((a, b) => a + b), 1, 1e-4);
 * assertEquals(strongest(alignment!).length, alignment!.rows);
 * ```
 */
export function align(
  model: GraphClassifier,
  dataset: GraphDataset,
  options: PredictionOptions = {},
): Alignment[] {
  const network = networkOf(model);
  if (network.options.fusion !== "amosl") {
    const message =
      `Cannot align views: the model's fusion is ${network.options.fusion}; train one with amosl`;
    throw new PackhorseError("invalid-argument", message);
  }
  const batches = network.batches(dataset);
  const { objects = batches.classes.keys().toArray(), batchSize = 256 } = options;
  using tape = new Tape(model.device);
  const alignments: Alignment[] = [];
  for (const some of GraphBatches.order(objects, { batchSize })) {
    tape.begin();
    const { fused } = network.forward(tape, network.upload(tape, batches.collate(some)));
    const found: Alignment[] = [];
    for (const { views, objects: places, solution } of fused.transports ?? []) {
      const plans = solution.plan.download() as Float32Array<ArrayBuffer>;
      const { reports, planOffsets, rows, columns } = solution;
      for (const [problem, place] of places.entries()) {
        const { cost, status } = reports[problem]!;
        found.push({
          object: some[place]!,
          views,
          rows: rows[problem]!,
          columns: columns[problem]!,
          plan: plans.slice(planOffsets[problem], planOffsets[problem + 1]),
          cost,
          converged: status === "converged",
        });
      }
    }
    const orderOf = new Map(some.map((object, i) => [object, i]));
    // Stable: pairs of views stay in their order.
    alignments.push(
      ...found.sort((a, b) => orderOf.get(a.object)! - orderOf.get(b.object)!),
    );
  }
  return alignments;
}

/** Where most of each node of the first view goes, the strongest first. */
export function strongest({ rows, columns, plan }: Alignment): Correspondence[] {
  return Array.from({ length: rows }, (_, row) => {
    const masses = plan.subarray(row * columns, (row + 1) * columns);
    const column = masses.indexOf(Math.max(...masses));
    return { row, column, share: Math.min(1, rows * masses[column]!) };
  }).sort((a, b) => b.share - a.share || a.row - b.row);
}
