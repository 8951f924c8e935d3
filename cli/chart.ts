import { parse, View } from "vega";
import { compile, type TopLevelSpec } from "vega-lite";
import type { AtomicFile } from "../src/io/mod.ts";
import type { KvSweepRow } from "../src/kv/mod.ts";

const REPACKS = ["none", "median", "greedy", "auto"];

/** A point of the chart: one part at one setting, over all settings of the other part. */
interface Point {
  part: "Keys" | "Values";
  rel: number;
  repack: string;
  pack: number;
  bits: number;
  error: number;
}

/** Fills a file with an SVG chart of bits per value against error, keys and values side by side. */
export async function writeSweepChart(
  file: AtomicFile,
  rows: readonly KvSweepRow[],
): Promise<void> {
  await writeChart(file, sweepChart(sweepPoints(rows)));
}

/** Bits per value against error, of keys or of values, for a page. */
export function sweepPanel(rows: readonly KvSweepRow[], part: "Keys" | "Values"): TopLevelSpec {
  const points = sweepPoints(rows).filter((point) => point.part === part);
  return {
    ...SWEEP,
    width: "container",
    data: { values: points.map((point) => ({ ...point })) },
    encoding: {
      ...SWEEP.encoding,
      shape: { ...SWEEP.encoding.shape, legend: null },
      strokeDash: { ...SWEEP.encoding.strokeDash, legend: null },
      tooltip: [
        { field: "rel", title: "scale" },
        { field: "repack", title: "repack" },
        { field: "bits", title: "bits per value", format: ".2f" },
        { field: "error", title: "error", format: ".3~g" },
      ],
    },
  };
}

function sweepPoints(rows: readonly KvSweepRow[]): Point[] {
  return means([
    ...rows.map((row): Point => ({
      ...point(row),
      part: "Keys",
      rel: row.keyRel,
      bits: row.keyBits,
      error: row.keyRmsError,
    })),
    ...rows.map((row): Point => ({
      ...point(row),
      part: "Values",
      rel: row.valueRel,
      bits: row.valueBits,
      error: row.valueRmsError,
    })),
  ]);
}

/** How long a context fits into a memory with a codec. */
export interface PlanPoint {
  kv: string;
  memoryBytes: number;
  /** 0 if none fits. */
  maxContext: number;
}

/** Fills a file with an SVG chart of the longest context against memory, a line per codec. */
export async function writePlanChart(
  file: AtomicFile,
  points: readonly PlanPoint[],
  memoryBytes: number,
): Promise<void> {
  await writeChart(file, planChart(points, memoryBytes));
}

/** What a benchmark measured of a codec. */
export interface BenchBar {
  kv: string;
  bitsPerValue: number;
  prefillBytesPerSecond: number;
  appendSeconds: number;
  attendSeconds: number;
}

/** Fills a file with an SVG chart of what was measured, side by side. */
export async function writeBenchChart(file: AtomicFile, bars: readonly BenchBar[]): Promise<void> {
  await writeChart(file, benchChart(bars));
}

/** What a codec costs a model. */
export interface FrontierPoint {
  kv: string;
  quantizer: string;
  bitsPerValue: number;
  kld: number;
  /** Whether no other is as good. */
  frontier: boolean;
}

/** Fills a file with an SVG chart of bits per value against divergence, a line per quantizer. */
export async function writeFrontierChart(
  file: AtomicFile,
  points: readonly FrontierPoint[],
): Promise<void> {
  await writeChart(file, frontierChart(diverging(points)));
}

/** Where the axes of pages have ticks of divergence, which is on a logarithm. */
export const KLD_AXIS = {
  format: ".3~g",
  values: [-5, -4, -3, -2, -1, 0].flatMap((power) => [10 ** power, 3 * 10 ** power]),
};

/** Bits per value against divergence, for a page. */
export function frontierPanel(points: readonly FrontierPoint[]): TopLevelSpec {
  const { x, y, ...encoding } = frontierEncoding(diverging(points));
  return {
    width: "container",
    height: 320,
    data: { values: diverging(points).map((point) => ({ ...point })) },
    layer: [...FRONTIER_LAYERS],
    encoding: {
      ...encoding,
      x: { ...x, scale: { zero: false, padding: 16 } },
      y: { ...y, axis: KLD_AXIS },
      tooltip: [
        { field: "kv", title: "kv" },
        { field: "bitsPerValue", title: "bits per value", format: ".2f" },
        { field: "kld", title: "KLD", format: ".3~g" },
        { field: "frontier", title: "frontier" },
      ],
    },
  };
}

/** A logarithm has no place for what does not diverge. */
function diverging(points: readonly FrontierPoint[]): FrontierPoint[] {
  return points.filter(({ kld }) => kld > 0);
}

/** What was measured in a search for the best codec. */
export interface TuningPoint extends FrontierPoint {
  /** Whether it is the one that was found. */
  best: boolean;
}

/** Fills a file with an SVG chart of bits per value against divergence, and how much of it is allowed. */
export async function writeTuningChart(
  file: AtomicFile,
  points: readonly TuningPoint[],
  maxKld: number,
): Promise<void> {
  await writeChart(file, tuningChart(points.filter(({ kld }) => kld > 0), maxKld));
}

/** Fills a file with a chart as SVG. */
export async function writeChart(file: AtomicFile, chart: TopLevelSpec): Promise<void> {
  const { spec } = compile(chart);
  const svg = await new View(parse(spec), { renderer: "none" }).toSVG();
  await file.write(new TextEncoder().encode(svg), 0);
  await file.commit();
}

function point({ repack, pack }: KvSweepRow) {
  return { repack, pack };
}

/** One point per setting of its own part: what the other part does to it is averaged. */
function means(points: Point[]): Point[] {
  const groups = Map.groupBy(
    points,
    ({ part, rel, repack, pack }) => [part, rel, repack, pack].join(),
  );
  return [...groups.values()].map((group) => {
    const mean = (value: (point: Point) => number) =>
      group.reduce((sum, point) => sum + value(point), 0) / group.length;
    return { ...group[0]!, bits: mean(({ bits }) => bits), error: mean(({ error }) => error) };
  });
}

/** What all charts look like. */
export const STYLE = {
  background: "white",
  padding: 16,
  config: {
    font: "sans-serif",
    header: { labelFontSize: 13, labelFontWeight: "bold" },
    axis: { labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal" },
    legend: { labelFontSize: 11, titleFontSize: 12, labelLimit: 400 },
    range: { category: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"] },
  },
} as const satisfies Partial<TopLevelSpec>;

function planChart(points: readonly PlanPoint[], memoryBytes: number): TopLevelSpec {
  const memory = { field: "memory", type: "quantitative" } as const;
  return {
    ...STYLE,
    width: 480,
    height: 300,
    title: { text: "Longest context against memory", anchor: "middle", offset: 12 },
    layer: [
      {
        data: {
          values: points.map(({ kv, memoryBytes, maxContext }) => ({
            kv,
            memory: memoryBytes / 1e9,
            context: maxContext,
          })),
        },
        mark: { type: "line", strokeWidth: 2 },
        encoding: {
          x: {
            ...memory,
            title: "memory of weights and cache, in GB",
            scale: { zero: false, nice: false },
          },
          y: {
            field: "context",
            type: "quantitative",
            title: "tokens of a sequence",
            axis: { format: "~s" },
          },
          color: {
            field: "kv",
            type: "nominal",
            title: "kv",
            sort: [...new Set(points.map(({ kv }) => kv))],
          },
        },
      },
      {
        data: { values: [{ memory: memoryBytes / 1e9 }] },
        mark: { type: "rule", strokeDash: [4, 4], color: "#666" },
        encoding: { x: memory },
      },
    ],
  };
}

const FRONTIER_LAYERS = [
  { mark: { type: "line", strokeWidth: 2 } },
  { mark: { type: "point", filled: true, size: 55, opacity: 1 } },
] as const;

function frontierEncoding(points: readonly FrontierPoint[]) {
  return {
    x: {
      field: "bitsPerValue",
      type: "quantitative",
      title: "bits per value",
      scale: { zero: false, padding: 110 }, // as long as a name
    },
    y: {
      field: "kld",
      type: "quantitative",
      title: "mean KLD from 16 bits, in nats",
      scale: { type: "log", nice: false, padding: 16 },
    },
    color: {
      field: "quantizer",
      type: "nominal",
      title: "quantizer",
      sort: [...new Set(points.map(({ quantizer }) => quantizer))],
    },
  } as const;
}

function frontierChart(points: readonly FrontierPoint[]): TopLevelSpec {
  return {
    ...STYLE,
    width: 640,
    height: 360,
    title: { text: "Bits per value against divergence", anchor: "middle", offset: 12 },
    data: { values: points.map((point) => ({ ...point })) },
    layer: [
      ...FRONTIER_LAYERS,
      // Names stand on the side of the frontier where no other points are.
      {
        transform: [{ filter: "datum.frontier" }],
        mark: { type: "text", align: "right", dx: -6, dy: 8, fontSize: 10 },
        encoding: { text: { field: "kv", type: "nominal" } },
      },
      {
        transform: [{ filter: "!datum.frontier" }],
        mark: { type: "text", align: "left", dx: 6, dy: -8, fontSize: 10 },
        encoding: { text: { field: "kv", type: "nominal" } },
      },
    ],
    encoding: frontierEncoding(points),
  };
}

function tuningChart(points: readonly TuningPoint[], maxKld: number): TopLevelSpec {
  const x = {
    field: "bitsPerValue",
    type: "quantitative",
    title: "bits per value",
    scale: { zero: false, padding: 110 }, // as long as a name
  } as const;
  const y = {
    field: "kld",
    type: "quantitative",
    title: "mean KLD from 16 bits, in nats",
    scale: { type: "log", nice: false, padding: 16 },
  } as const;
  const frontier = points.filter((point) => point.frontier);
  return {
    ...STYLE,
    width: 640,
    height: 360,
    title: { text: "The fewest bits within a divergence", anchor: "middle", offset: 12 },
    layer: [
      {
        data: { values: frontier.map((point) => ({ ...point })) },
        mark: { type: "line", color: "#bbb", interpolate: "step-after" },
        encoding: { x, y },
      },
      {
        data: { values: points.map((point) => ({ ...point })) },
        mark: { type: "point", filled: true, opacity: 1 },
        encoding: {
          x,
          y,
          color: {
            field: "quantizer",
            type: "nominal",
            title: "quantizer",
            sort: [...new Set(points.map(({ quantizer }) => quantizer))],
          },
          size: { condition: { test: "datum.best", value: 160 }, value: 40 },
        },
      },
      {
        data: { values: points.filter(({ best }) => best).map((point) => ({ ...point })) },
        mark: { type: "text", align: "right", dx: -10, dy: 10, fontSize: 11, fontWeight: "bold" },
        encoding: { x, y, text: { field: "kv", type: "nominal" } },
      },
      {
        data: { values: maxKld > 0 ? [{ kld: maxKld }] : [] },
        mark: { type: "rule", strokeDash: [4, 4], color: "#666" },
        encoding: { y },
      },
    ],
  };
}

function benchChart(bars: readonly BenchBar[]): TopLevelSpec {
  const measures: [string, (bar: BenchBar) => number][] = [
    ["attention, µs a layer", ({ attendSeconds }) => 1e6 * attendSeconds],
    ["append, µs a layer", ({ appendSeconds }) => 1e6 * appendSeconds],
    ["prefill, GB/s", ({ prefillBytesPerSecond }) => prefillBytesPerSecond / 1e9],
    ["bits per value", ({ bitsPerValue }) => bitsPerValue],
  ];
  const kv = { field: "kv", type: "nominal", sort: bars.map(({ kv }) => kv) } as const;
  return {
    ...STYLE,
    data: {
      values: measures.flatMap(([measure, of]) =>
        bars.map((bar) => ({ kv: bar.kv, measure, value: of(bar) }))
      ),
    },
    facet: {
      column: {
        field: "measure",
        type: "nominal",
        title: null,
        sort: measures.map(([measure]) => measure),
      },
    },
    spec: {
      width: 170,
      height: { step: 26 },
      mark: { type: "bar" },
      encoding: {
        y: { ...kv, title: null, axis: { labelLimit: 300 } },
        x: { field: "value", type: "quantitative", title: null, axis: { tickCount: 4 } },
        color: { ...kv, legend: null },
      },
    },
    resolve: { scale: { x: "independent" } },
    title: { text: "Growing caches", anchor: "middle", offset: 12 },
  };
}

const SWEEP = {
  width: 340,
  height: 280,
  layer: [
    { mark: { type: "line" } },
    { mark: { type: "point", filled: true, size: 55, opacity: 1 } },
  ],
  encoding: {
    x: {
      field: "bits",
      type: "quantitative",
      title: "bits per value",
      scale: { zero: false, padding: 16 },
    },
    y: {
      field: "error",
      type: "quantitative",
      title: "root-mean-square error",
      scale: { type: "log", nice: false, padding: 16 },
    },
    order: { field: "rel", type: "quantitative" },
    color: { field: "repack", type: "nominal", title: "repack", sort: REPACKS },
    shape: { field: "pack", type: "nominal", title: "tokens per pack" },
    strokeDash: { field: "pack", type: "nominal", title: "tokens per pack" },
  },
} as const satisfies Partial<TopLevelSpec>;

function sweepChart(points: Point[]): TopLevelSpec {
  return {
    ...STYLE,
    data: { values: points as unknown as Record<string, unknown>[] },
    facet: { column: { field: "part", type: "nominal", title: null } },
    spec: SWEEP,
    resolve: { scale: { x: "independent", y: "independent" } },
    title: { text: "Bits per value against error", anchor: "middle", offset: 12 },
  };
}
