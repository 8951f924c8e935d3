/** The checked options of a problem, and how it is solved: shared by all solvers. */
import { OT_COST } from "../../ffi/enums.ts";
import type { NativeSolution, NativeTransportBatch, NativeTransportOptions } from "../../ffi/ot.ts";
import type { Device } from "../device/device.ts";
import {
  BatchShape,
  bindProblem,
  placesOf,
  refuse,
  Tensors,
  type TransportArray,
  type TransportProblem,
} from "./problem.ts";
import { createSolution, type TransportSolution } from "./solution.ts";

/** What all solvers may be told. */
export interface CommonOptions {
  readonly epsilon?: number | readonly number[] | undefined;
  readonly relativeEpsilon?: boolean | undefined;
  readonly tolerance?: number | readonly number[] | undefined;
  readonly iterations?: number | readonly number[] | undefined;
  readonly relaxation?: number | undefined;
  readonly scaling?: number | undefined;
  readonly penalty?: number | { readonly a: number; readonly b: number } | undefined;
  readonly start?: TransportArray | TransportSolution | undefined;
  readonly streaming?: boolean | undefined;
  readonly check?: boolean | undefined;
}

/** Puts a problem on the device, and lets `run` solve it there. */
export function solve(
  device: Device,
  problem: TransportProblem,
  { options, regularised, partial = false, run }: {
    options: CommonOptions;
    /** Whether the plan depends on the costs smoothly, by an entropy. */
    regularised: boolean;
    /** Whether only a part of the masses is transported. */
    partial?: boolean;
    run: (batch: NativeTransportBatch, solution: NativeSolution, shape: BatchShape) => void;
  },
): TransportSolution {
  const shape = new BatchShape(problem);
  using stack = new DisposableStack();
  const tensors = stack.use(new Tensors(device, shape.dtype));
  const { streaming = false, check = true, start } = options;
  const native = nativeOptions(problem, shape, options);
  const bound = bindProblem(problem, shape, tensors);
  const warmG = start && tensors.read(
    "reports" in start ? start.g : start,
    "start",
    shape.columnCount,
  );
  const batch = shape.createBatch(device, { streaming, backward: true });
  stack.defer(() => batch.close());
  const reports = tensors.createReports(shape.problems);
  const f = tensors.create(shape.rowCount);
  const g = tensors.create(shape.columnCount);
  const plan = streaming ? undefined : tensors.create(shape.entries);
  batch.set(native);
  batch.bind(placesOf(bound, tensors));
  run(batch, {
    warmG: tensors.place(warmG),
    f: tensors.place(f),
    g: tensors.place(g),
    plan: tensors.place(plan),
    reports: tensors.place(reports),
  }, shape);
  const solution = createSolution({
    device,
    shape,
    tensors,
    batch,
    bound,
    f,
    g,
    plan,
    reports,
    warmG,
    regularised,
    partial,
  });
  if (check) void solution.reports;
  stack.move(); // What it held is the solution's.
  return solution;
}

/** The options as the native library takes them, checked. */
export function nativeOptions(
  problem: TransportProblem,
  { problems }: BatchShape,
  options: CommonOptions,
): NativeTransportOptions {
  const { epsilon = 0.05, tolerance = 1e-5, iterations = 10_000 } = options;
  const { relativeEpsilon = options.epsilon === undefined } = options;
  const { relaxation = 1, scaling = 0, penalty = Infinity } = options;
  const penalties = typeof penalty === "number" ? { a: penalty, b: penalty } : penalty;
  const kind = "x" in problem ? problem.cost ?? "sqeuclidean" : "sqeuclidean";
  if (!Object.hasOwn(OT_COST, kind)) {
    refuse(`Cannot transport: cost must be ${Object.keys(OT_COST).join(", ")}, got ${kind}`);
  }
  const own = (values: number | readonly number[], name: string) => {
    if (typeof values === "number") return undefined;
    if (values.length === problems) return values;
    return refuse(
      `Cannot transport: ${name} must be a number, or one for each of ${problems} problems, ` +
        `got ${values.length}`,
    );
  };
  const each = (
    values: number | readonly number[],
    name: string,
    allowed: (value: number) => boolean,
    what: string,
  ) => {
    for (const value of typeof values === "number" ? [values] : values) {
      if (!allowed(value)) refuse(`Cannot transport: ${name} must be ${what}, got ${value}`);
    }
    return own(values, name);
  };
  const epsilons = each(
    epsilon,
    "epsilon",
    (value) => value > 0 && value < Infinity,
    "above 0 and finite",
  );
  const tolerances = each(
    tolerance,
    "tolerance",
    (value) => value >= 0 && value < Infinity,
    "finite and not negative",
  );
  const limits = each(
    iterations,
    "iterations",
    (value) => Number.isInteger(value) && value >= 1 && value < 2 ** 31,
    "an integer of 1 or more",
  );
  const scalar = (values: number | readonly number[]) => typeof values === "number" ? values : 1;
  if (options.scaling !== undefined && !(scaling > 0 && scaling < 1)) {
    refuse(`Cannot transport: scaling must be between 0 and 1, got ${scaling}`);
  }
  return {
    values: {
      cost_kind: OT_COST[kind],
      relative_epsilon: relativeEpsilon ? 1 : 0,
      iterations: scalar(iterations),
      epsilon: scalar(epsilon),
      tolerance: scalar(tolerance),
      relaxation,
      scaling,
      row_penalty: penalties.a,
      column_penalty: penalties.b,
    },
    epsilons: epsilons && Float64Array.from(epsilons),
    tolerances: tolerances && Float64Array.from(tolerances),
    iterations: limits && Int32Array.from(limits),
  };
}
