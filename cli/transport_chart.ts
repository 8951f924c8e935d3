import type { TopLevelSpec } from "vega-lite";
import type { AtomicFile } from "../src/io/mod.ts";
import { STYLE, writeChart } from "./chart.ts";

/** Cells of a side at most: more are no longer seen, and make files that no viewer opens. */
const MOST_CELLS = 100;
/** Points of a side. */
const SIZE = 480;

/** Fills a file with an SVG chart of a plan [rows, columns]; of a large one, sums over blocks. */
export async function writeTransportChart(
  file: AtomicFile,
  plan: ArrayLike<number>,
  { rows, columns }: { rows: number; columns: number },
): Promise<void> {
  const [height, width] = [rows, columns].map((size) => Math.ceil(size / MOST_CELLS));
  const cells = new Map<string, { row: number; column: number; mass: number }>();
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++) {
      const mass = plan[i * columns + j]!;
      if (mass === 0) continue;
      const [row, column] = [Math.floor(i / height!) * height!, Math.floor(j / width!) * width!];
      const key = `${row},${column}`;
      const cell = cells.get(key);
      if (cell) cell.mass += mass;
      else cells.set(key, { row, column, mass });
    }
  }
  const values = [...cells.values()].map(({ row, column, mass }) => ({
    row,
    column,
    mass,
    bottom: Math.min(rows, row + height!),
    right: Math.min(columns, column + width!),
  }));
  const axis = { grid: false, tickMinStep: 1, format: "d" } as const;
  const spec: TopLevelSpec = {
    ...STYLE,
    width: Math.max(60, Math.round(SIZE * Math.min(1, columns / rows))),
    height: Math.max(60, Math.round(SIZE * Math.min(1, rows / columns))),
    title: { text: `Transport plan, ${rows} x ${columns}`, anchor: "middle", offset: 12 },
    data: { values },
    mark: { type: "rect" },
    encoding: {
      x: {
        field: "column",
        type: "quantitative",
        title: "points y",
        scale: { domain: [0, columns], nice: false },
        axis,
      },
      x2: { field: "right" },
      y: {
        field: "row",
        type: "quantitative",
        title: "points x",
        scale: { domain: [0, rows], nice: false, reverse: true },
        axis,
      },
      y2: { field: "bottom" },
      color: {
        field: "mass",
        type: "quantitative",
        title: "mass",
        scale: { scheme: "blues", domainMin: 0 },
        legend: { format: ".1e" },
      },
    },
  };
  await writeChart(file, spec);
}
