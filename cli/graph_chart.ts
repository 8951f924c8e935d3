import type { TopLevelSpec } from "vega-lite";
import type { AtomicFile } from "../src/io/mod.ts";
import {
  type Alignment,
  type Correspondence,
  type EpochReport,
  type GraphDataset,
  strongest,
} from "../src/graph/mod.ts";
import { STYLE, writeChart } from "./chart.ts";

/** Height of charts on a page. */
const HEIGHT = 320;

/** A fold's epochs, or those of a model. */
export interface TrainingCurve {
  readonly name: string;
  readonly history: readonly EpochReport[];
}

const MEASURES = {
  loss: ["loss", "validationLoss"],
  accuracy: ["accuracy", "validationAccuracy"],
  transportCost: ["transportCost"],
} as const;

/** How a measure goes over the epochs, on what is trained and what is watched. */
export function curvePanel(
  curves: readonly TrainingCurve[],
  measure: keyof typeof MEASURES,
): TopLevelSpec {
  const values = curves.flatMap(({ name, history }) =>
    history.flatMap((report) =>
      MEASURES[measure].flatMap((key, watched) => {
        const value = report[key];
        const objects = watched === 0 ? "trained on" : "watched";
        return value === undefined ? [] : [{ run: name, epoch: report.epoch, objects, value }];
      })
    )
  );
  const label = measure === "transportCost" ? "transport cost" : measure;
  return {
    ...STYLE,
    width: "container",
    height: HEIGHT,
    data: { values },
    mark: { type: "line", strokeWidth: 1.5, point: { size: 12 } },
    encoding: {
      tooltip: [
        { field: "run" },
        { field: "epoch" },
        { field: "objects" },
        { field: "value", title: label, format: measure === "accuracy" ? ".1%" : ".4f" },
      ],
      x: { field: "epoch", type: "quantitative", title: "epoch", axis: { tickMinStep: 1 } },
      y: {
        field: "value",
        type: "quantitative",
        title: label,
        ...(measure === "accuracy" ? { axis: { format: "%" }, scale: { zero: false } } : {}),
      },
      color: { field: "run", type: "nominal", title: null },
      strokeDash: {
        field: "objects",
        type: "nominal",
        title: null,
        sort: ["trained on", "watched"],
      },
    },
  };
}

/** How often each true class was taken for each. */
export function confusionPanel(
  confusion: readonly (readonly number[])[],
  classes: readonly number[],
): TopLevelSpec {
  const values = confusion.flatMap((row, i) => {
    const sum = row.reduce((a, b) => a + b, 0);
    return row.map((times, j) => ({
      truth: String(classes[i]),
      predicted: String(classes[j]),
      times,
      share: sum === 0 ? 0 : times / sum,
    }));
  });
  const sort = classes.map(String);
  return {
    ...STYLE,
    width: "container",
    height: HEIGHT,
    data: { values },
    encoding: {
      x: { field: "predicted", type: "nominal", title: "predicted", sort, axis: { labelAngle: 0 } },
      y: { field: "truth", type: "nominal", title: "true", sort },
      tooltip: [
        { field: "truth", title: "true" },
        { field: "predicted" },
        { field: "times" },
        { field: "share", title: "share of the true class", format: ".1%" },
      ],
    },
    layer: [
      {
        mark: { type: "rect" },
        encoding: {
          color: {
            field: "share",
            type: "quantitative",
            title: "share of the true class",
            scale: { scheme: "blues", domain: [0, 1] },
            legend: { format: "%" },
          },
        },
      },
      {
        mark: { type: "text" },
        transform: [{ filter: "datum.times > 0" }],
        encoding: {
          text: { field: "times", type: "quantitative" },
          color: {
            condition: { test: "datum.share > 0.5", value: "white" },
            value: "#333",
          },
        },
      },
    ],
  };
}

/** What an alignment is of. */
interface Pictured {
  readonly dataset: GraphDataset;
  readonly alignment: Alignment;
}

/** The plan between two views of an object. */
export function planPanel({ dataset, alignment }: Pictured): TopLevelSpec {
  const { rows, columns, plan, views } = alignment;
  const values = Array.from(plan, (mass, entry) => ({
    row: Math.floor(entry / columns),
    column: entry % columns,
    share: rows * mass,
  }));
  const [first, second] = views.map((view) => dataset.views[view]!.name);
  return {
    ...STYLE,
    width: "container",
    height: HEIGHT,
    data: { values },
    mark: { type: "rect" },
    encoding: {
      x: { field: "column", type: "ordinal", title: `nodes of ${second}` },
      y: { field: "row", type: "ordinal", title: `nodes of ${first}` },
      tooltip: [
        { field: "row", title: `node of ${first}` },
        { field: "column", title: `node of ${second}` },
        { field: "share", title: "share of the row", format: ".1%" },
      ],
      color: {
        field: "share",
        type: "quantitative",
        title: "share of the row",
        scale: { scheme: "blues", domainMin: 0 },
        legend: { format: "%" },
      },
    },
  };
}

/** Two views' graphs side by side, with their strongest correspondences, one for each node of the first. */
export function correspondencePanel({ dataset, alignment }: Pictured): TopLevelSpec {
  const { views, object } = alignment;
  const pairs = strongest(alignment);
  const [u, v] = views.map((view) => graphOf(dataset, view, object)) as [DrawnGraph, DrawnGraph];
  const left = place(u);
  const right = place(v, pairs.map(({ row, column }) => [column, left[row]!] as const));
  const shift = 1.6;
  const at = (side: 0 | 1, node: number) => {
    const [x, y] = (side === 0 ? left : right)[node]!;
    return { x: x + side * shift, y };
  };
  const nodes = [u, v].flatMap(({ size, name }, side) =>
    Array.from({ length: size }, (_, node) => ({ ...at(side as 0 | 1, node), view: name, node }))
  );
  const edges = [u, v].flatMap(({ edges }, side) =>
    edges.map(([a, b]) => {
      const [from, to] = [at(side as 0 | 1, a), at(side as 0 | 1, b)];
      return { x: from.x, y: from.y, x2: to.x, y2: to.y };
    })
  );
  const links = pairs.map(({ row, column, share }) => {
    const [from, to] = [at(0, row), at(1, column)];
    return { x: from.x, y: from.y, x2: to.x, y2: to.y, share, row, column };
  });
  const axis = { type: "quantitative", axis: null, scale: { zero: false, nice: false } } as const;
  const line = {
    x: { field: "x", ...axis },
    y: { field: "y", ...axis },
    x2: { field: "x2" },
    y2: { field: "y2" },
  } as const;
  return {
    ...STYLE,
    width: "container",
    height: HEIGHT,
    layer: [
      {
        data: { values: links },
        mark: { type: "rule", color: "#d55e00", strokeWidth: 1.5, tooltip: true },
        encoding: {
          ...line,
          opacity: {
            field: "share",
            type: "quantitative",
            title: "share of the node",
            scale: { domain: [0, 1], range: [0.08, 0.9] },
            legend: { format: "%" },
          },
          tooltip: [
            { field: "row", title: u.name },
            { field: "column", title: v.name },
            { field: "share", format: ".1%" },
          ],
        },
      },
      { data: { values: edges }, mark: { type: "rule", color: "#999" }, encoding: line },
      {
        data: { values: nodes },
        mark: { type: "circle", size: 70, opacity: 1 },
        encoding: {
          x: line.x,
          y: line.y,
          color: {
            field: "view",
            type: "nominal",
            title: null,
            scale: { range: ["#0072b2", "#009e73"] },
            sort: [u.name, v.name],
          },
          tooltip: [{ field: "view" }, { field: "node" }],
        },
      },
    ],
  };
}

/** Fills a file with both: the drawing, and the plan beside it. */
export async function writeAlignmentChart(file: AtomicFile, pictured: Pictured): Promise<void> {
  const { object, cost } = pictured.alignment;
  const sized = (panel: TopLevelSpec, width: number) => {
    const { background: _, padding: __, config: ___, ...rest } = panel;
    return { ...rest, width, height: HEIGHT } as never;
  };
  await writeChart(file, {
    ...STYLE,
    title: {
      text: `Object ${object}: strongest correspondences, transport cost ${cost.toFixed(3)}`,
      anchor: "middle",
      offset: 12,
    },
    hconcat: [
      sized(correspondencePanel(pictured), 1.6 * HEIGHT),
      sized(planPanel(pictured), HEIGHT),
    ],
    resolve: { scale: { color: "independent" } },
  });
}

/** "3→5 (98 %), 1→2 (75 %)" */
export function formatPairs(pairs: readonly Correspondence[]): string {
  return pairs.map(({ row, column, share }) => `${row}→${column} (${Math.round(100 * share)} %)`)
    .join(", ");
}

interface DrawnGraph {
  readonly name: string;
  readonly size: number;
  readonly edges: readonly (readonly [number, number])[];
}

function graphOf({ views }: GraphDataset, view: number, object: number): DrawnGraph {
  const { name, nodeOffsets, edgeOffsets, sources, targets } = views[view]!;
  const edges = new Map<string, [number, number]>();
  for (let edge = edgeOffsets[object]!; edge < edgeOffsets[object + 1]!; edge++) {
    const pair: [number, number] = [sources[edge]!, targets[edge]!];
    pair.sort((a, b) => a - b);
    if (pair[0] !== pair[1]) edges.set(pair.join(), pair);
  }
  const size = nodeOffsets[object + 1]! - nodeOffsets[object]!;
  return { name, size, edges: [...edges.values()] };
}

/**
 * Places for nodes, within 0 and 1, by forces (Fruchterman and Reingold, 1991): neighbours attract each other, all nodes push
 * each other away. It begins on a circle, or where partners are, and follows from the graph alone.
 */
function place(
  { size, edges }: DrawnGraph,
  partners: readonly (readonly [number, readonly [number, number]])[] = [],
): [number, number][] {
  const start = new Map(partners);
  const points = Array.from({ length: size }, (_, node): [number, number] => {
    const angle = 2 * Math.PI * node / size;
    const [x, y] = start.get(node) ?? [0.5, 0.5];
    // A little apart, so that none are on each other.
    const radius = start.has(node) ? 0.01 : 0.5;
    return [x + radius * Math.cos(angle), y + radius * Math.sin(angle)];
  });
  const ideal = 1 / Math.sqrt(Math.max(size, 1));
  const steps = partners.length > 0 ? 60 : 200;
  for (let step = 0; step < steps; step++) {
    const forces = points.map((): [number, number] => [0, 0]);
    const push = (a: number, b: number, of: (distance: number) => number) => {
      const [dx, dy] = [points[a]![0] - points[b]![0], points[a]![1] - points[b]![1]];
      const distance = Math.max(1e-6, Math.hypot(dx, dy));
      const strength = of(distance) / distance;
      forces[a]![0] += dx * strength;
      forces[a]![1] += dy * strength;
      forces[b]![0] -= dx * strength;
      forces[b]![1] -= dy * strength;
    };
    for (let a = 0; a < size; a++) {
      for (let b = 0; b < a; b++) push(a, b, (distance) => ideal ** 2 / distance);
    }
    for (const [a, b] of edges) push(a, b, (distance) => -(distance ** 2) / ideal);
    const most = (partners.length > 0 ? 0.02 : 0.1) * (1 - step / steps);
    for (const [node, [x, y]] of forces.entries()) {
      const length = Math.max(1e-9, Math.hypot(x, y));
      const share = Math.min(length, most) / length;
      points[node]![0] += x * share;
      points[node]![1] += y * share;
    }
  }
  const scaled = [0, 1].map((axis) => {
    const values = points.map((point) => point[axis]!);
    const [least, most] = [Math.min(...values), Math.max(...values)];
    return values.map((value) => most > least ? (value - least) / (most - least) : 0.5);
  });
  return points.map((_, node) => [scaled[0]![node]!, scaled[1]![node]!]);
}
