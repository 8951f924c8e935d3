import { Device } from "../../src/device/mod.ts";
import type { DType } from "../../src/dtype.ts";
import { PackhorseError } from "../../src/error.ts";
import { isFloatDType, widen } from "../../src/float_conversion.ts";
import { AtomicFile, readNpy, writeNpy } from "../../src/io/mod.ts";
import {
  exactTransport,
  type PointCost,
  sinkhorn,
  type TransportSolution,
} from "../../src/ot/mod.ts";
import { listenForInterrupt } from "../interrupt.ts";
import { defined, type GlobalOptions } from "../options.ts";
import { print, printJson, printTable } from "../output.ts";

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

/** Numbers of a file. */
interface Numbers {
  path: string;
  dtype: DType;
  shape: readonly number[];
  values: Float32Array<ArrayBuffer> | Float64Array<ArrayBuffer> | Int32Array | Uint8Array;
}

/** Transports the points of one file to those of another. */
export async function otSolve(
  options: GlobalOptions & OtSolveOptions,
  xPath: string,
  yPath: string,
): Promise<void> {
  const { backend, cost, plan: planPath, heatmap } = options;
  const [x, y] = await Promise.all([readNumbers(xPath, 2), readNumbers(yPath, 2)]);
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
  // Float64 stays what it is where the backend can: the CPU.
  const wide = device.backend === "cpu" && [x, y, a, b].some((array) => array?.dtype === "f64");
  const convert = (numbers: Numbers | undefined) =>
    numbers && (wide ? Float64Array.from(numbers.values) : Float32Array.from(numbers.values));
  const problem = {
    x: convert(x)!,
    y: convert(y)!,
    dimension,
    cost,
    ...defined({ a: convert(a), b: convert(b) }),
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

/** JSON has no NaN. */
const finite = (value: number) => Number.isFinite(value) ? value : null;

const format = (value: number) => Number.isFinite(value) ? value.toPrecision(8) : "none";

async function readNumbers(path: string, rank: number): Promise<Numbers> {
  const { dtype, shape, data } = await readNpy(path);
  if (shape.length !== rank || shape.some((size) => size === 0)) {
    const wanted = rank === 2 ? "points [n, d]" : "masses [n]";
    throw new PackhorseError(
      "invalid-argument",
      `Cannot use ${path}: it must hold ${wanted}, but its shape is [${shape.join(", ")}]`,
    );
  }
  return { path, dtype, shape, values: numbersOf(data, dtype) };
}

function numbersOf(data: Uint8Array<ArrayBuffer>, dtype: DType): Numbers["values"] {
  const { buffer, byteOffset, byteLength } = data;
  if (dtype === "f64") return new Float64Array(buffer, byteOffset, byteLength / 8);
  if (dtype === "i32") return new Int32Array(buffer, byteOffset, byteLength / 4);
  return isFloatDType(dtype) ? widen(data, dtype) : data;
}

async function readMasses(path: string, count: number, of: string): Promise<Numbers> {
  const masses = await readNumbers(path, 1);
  if (masses.shape[0] === count) return masses;
  throw new PackhorseError(
    "invalid-argument",
    `Cannot use ${path}: it holds ${masses.shape[0]} masses, but ${of} has ${count} points`,
  );
}

async function writePlan(
  path: string,
  solution: TransportSolution,
  { n, m, signal }: { n: number; m: number; signal: AbortSignal },
): Promise<void> {
  const data = solution.plan.download(new Uint8Array(solution.plan.byteLength));
  await writeNpy(path, { dtype: solution.dtype, shape: [n, m], data }, { signal });
}
