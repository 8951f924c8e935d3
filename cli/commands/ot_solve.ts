import { Device } from "../../src/device/mod.ts";
import { PackhorseError } from "../../src/error.ts";
import { AtomicFile } from "../../src/io/mod.ts";
import { exactTransport, type PointCost, sinkhorn } from "../../src/ot/mod.ts";
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

/** Options of `ot solve`. */
export interface OtSolveOptions {
  cost: PointCost;
  epsilon?: number | undefined;
  relativeEpsilon?: true | undefined;
  tolerance?: number | undefined;
  iterations?: number | undefined;
  relaxation?: number | undefined;
  scaling?: number | undefined;
  exact?: true | undefined;
  a?: string | undefined;
  b?: string | undefined;
  plan?: string | undefined;
  heatmap?: string | undefined;
}

/** Transports the points of one file to those of another. */
export async function otSolve(
  options: GlobalOptions & OtSolveOptions,
  xPath: string,
  yPath: string,
): Promise<void> {
  const { backend, cost, plan: planPath, heatmap } = options;
  const [x, y] = await Promise.all([
    readMatrix(xPath, "points [n, d]"),
    readMatrix(yPath, "points [n, d]"),
  ]);
  const [n, dimension] = x.shape as [number, number];
  const [m, other] = y.shape as [number, number];
  if (dimension !== other) {
    throw new PackhorseError(
      "invalid-argument",
      `Cannot transport points of ${dimension} coordinates (${xPath}) to points of ${other} (${yPath})`,
    );
  }
  const a = options.a === undefined ? undefined : await readMasses(options.a, n, xPath);
  const b = options.b === undefined ? undefined : await readMasses(options.b, m, yPath);
  using device = Device.open(defined({ backend }));
  using interrupt = listenForInterrupt();
  const { signal } = interrupt;
  using chart = heatmap === undefined ? undefined : await AtomicFile.create(heatmap, { signal });
  const convert = converter(device, [x, y, a, b]);
  const problem = {
    x: convert(x),
    y: convert(y),
    dimension,
    cost,
    ...defined({ a: a && convert(a), b: b && convert(b) }),
  };
  const { epsilon, relativeEpsilon, tolerance, iterations, relaxation, scaling } = options;
  using solution = options.exact ? exactTransport(device, problem) : sinkhorn(
    device,
    problem,
    defined({ epsilon, relativeEpsilon, tolerance, iterations, relaxation, scaling }),
  );
  if (planPath !== undefined) await writePlan(planPath, solution, { n, m, signal });
  if (chart) {
    const { writeTransportChart } = await import("../transport_chart.ts");
    await writeTransportChart(chart, solution.plan.download(), { rows: n, columns: m });
  }
  const [report] = solution.reports;
  const { status, marginalError, value } = report!;
  if (options.json) {
    return printJson({
      ...{ x: xPath, y: yPath, backend: device.backend, dtype: solution.dtype, n, m, dimension },
      costKind: cost,
      method: options.exact ? "exact" : "sinkhorn",
      ...{ status, converged: status === "converged", iterations: report!.iterations },
      ...{ marginalError, cost: finite(report!.cost), value: finite(value) },
      epsilon: report!.epsilon,
      ...defined({ tolerance: options.exact ? undefined : tolerance ?? 1e-5 }),
      ...defined({ plan: planPath, heatmap }),
    });
  }
  print(`${n} x ${m} points of ${dimension} coordinates, ${cost}, ${device.backend}`);
  printTable(["", ">"], [
    ["status", status],
    [options.exact ? "augmenting paths" : "iterations", report!.iterations],
    ["marginal error (L1)", marginalError.toExponential(2)],
    ["cost <T, C>", format(report!.cost)],
    ...(options.exact
      ? []
      : [["value with entropy", format(value)], ["epsilon", format(report!.epsilon)]]),
  ]);
  for (const path of [planPath, heatmap]) if (path !== undefined) print(`${path} written`);
}
