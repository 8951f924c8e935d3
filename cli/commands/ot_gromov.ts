import { Device } from "../../src/device/mod.ts";
import { PackhorseError } from "../../src/error.ts";
import { AtomicFile } from "../../src/io/mod.ts";
import { gromovTransport } from "../../src/ot/mod.ts";
import { listenForInterrupt } from "../interrupt.ts";
import { defined, type GlobalOptions } from "../options.ts";
import { print, printJson, printTable } from "../output.ts";
import {
  converter,
  finite,
  format,
  readMasses,
  readMatrix,
  writePlan,
} from "../transport_arrays.ts";

/** Options of `ot gromov`. */
export interface OtGromovOptions {
  cost?: string | undefined;
  alpha?: number | undefined;
  tolerance?: number | undefined;
  iterations?: number | undefined;
  a?: string | undefined;
  b?: string | undefined;
  plan?: string | undefined;
  heatmap?: string | undefined;
}

/** Matches the graphs of two files by the distances within each. */
export async function otGromov(
  options: GlobalOptions & OtGromovOptions,
  xPath: string,
  yPath: string,
): Promise<void> {
  const { backend, plan: planPath, heatmap } = options;
  const [x, y] = await Promise.all([readDistances(xPath), readDistances(yPath)]);
  const [n, m] = [x.shape[0]!, y.shape[0]!];
  const cost = options.cost === undefined ? undefined : await readCosts(options.cost, n, m);
  const a = options.a === undefined ? undefined : await readMasses(options.a, n, xPath);
  const b = options.b === undefined ? undefined : await readMasses(options.b, m, yPath);
  using device = Device.open(defined({ backend }));
  using interrupt = listenForInterrupt();
  const { signal } = interrupt;
  using chart = heatmap === undefined ? undefined : await AtomicFile.create(heatmap, { signal });
  const convert = converter(device, [x, y, cost, a, b]);
  const { alpha, tolerance, iterations } = options;
  using solution = gromovTransport(device, {
    distanceX: convert(x),
    distanceY: convert(y),
    rows: n,
    columns: m,
    ...defined({ cost: cost && convert(cost), a: a && convert(a), b: b && convert(b) }),
  }, defined({ alpha, tolerance, iterations }));
  if (planPath !== undefined) await writePlan(planPath, solution, { n, m, signal });
  if (chart) {
    const { writeTransportChart } = await import("../transport_chart.ts");
    await writeTransportChart(chart, solution.plan.download(), { rows: n, columns: m });
  }
  const report = solution.reports[0]!;
  const { status, marginalError, value, distortion, gap, bound } = report;
  if (options.json) {
    return printJson({
      ...{ x: xPath, y: yPath, backend: device.backend, dtype: solution.dtype, n, m },
      alpha: cost ? alpha ?? 0.5 : 1,
      ...{ status, converged: status === "converged", iterations: report.iterations },
      ...{ marginalError: finite(marginalError), value: finite(value), cost: finite(report.cost) },
      ...{ distortion: finite(distortion), gap: finite(gap), bound: finite(bound) },
      ...defined({ plan: planPath, heatmap }),
    });
  }
  print(`${n} x ${m} points by the distances within each, ${device.backend}`);
  printTable(["", ">"], [
    ["status", status],
    ["iterations", report.iterations],
    ["value", format(value)],
    ["value is certainly not below", format(bound)],
    ["distortion", format(distortion)],
    ...(cost ? [["cost <T, C>", format(report.cost)]] : []),
    ["gap", Number.isFinite(gap) ? gap.toExponential(2) : "none"],
  ]);
  for (const path of [planPath, heatmap]) if (path !== undefined) print(`${path} written`);
}

async function readDistances(path: string) {
  const matrix = await readMatrix(path, "distances [n, n]");
  const [rows, columns] = matrix.shape;
  if (rows === columns) return matrix;
  throw new PackhorseError(
    "invalid-argument",
    `Cannot use ${path}: it must hold distances [n, n], but its shape is [${rows}, ${columns}]`,
  );
}

async function readCosts(path: string, n: number, m: number) {
  const costs = await readMatrix(path, "costs [n, m]");
  const [rows, columns] = costs.shape;
  if (rows === n && columns === m) return costs;
  throw new PackhorseError(
    "invalid-argument",
    `Cannot use ${path}: its shape is [${rows}, ${columns}], but costs of ${n} x ${m} are needed`,
  );
}
