/**
 * Fusion of views by optimal transport (AMoSL): its loss and gradients against a reference in double precision, the same
 * bits, interruptions, missing views, more than two views, and that it finds correspondences which carry the label.
 */
import {
  assert,
  assertAlmostEquals,
  assertEquals,
  assertGreater,
  assertGreaterOrEqual,
  assertLess,
  assertLessOrEqual,
  assertNotEquals,
  assertRejects,
  assertThrows,
} from "@std/assert";
import { Device } from "../src/device/mod.ts";
import { PackhorseError } from "../src/error.ts";
import { AmoslFusion } from "../src/graph/amosl_fusion.ts";
import { networkOf } from "../src/graph/classifier.ts";
import { uploadBatch } from "../src/graph/device_batch.ts";
import {
  align,
  correspondenceTask,
  evaluate,
  type Graph,
  GraphBatches,
  GraphClassifier,
  GraphDataset,
  type GraphModelOptions,
  strongest,
  train,
  type TrainingOptions,
  type TransportGradient,
  type TransportPenalty,
} from "../src/graph/mod.ts";
import { totalLoss } from "../src/graph/network.ts";
import { linear } from "../src/graph/operations.ts";
import { Parameters } from "../src/graph/parameters.ts";
import { Random } from "../src/graph/random.ts";
import { Tape, Tensor } from "../src/graph/tape.ts";
import {
  centralDifferences,
  download,
  Matrix,
  relativeError,
  tensorOf,
} from "./graph_reference.ts";
import { backends } from "./backends.ts";
import { rejectsWith } from "./rejects_with.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

function test(name: string, work: (device: Device) => Promise<void> | void): void {
  for (const backend of backends()) {
    Deno.test(`graph amosl: ${backend}: ${name}`, async () => {
      using device = Device.open({ backend });
      await work(device);
    });
  }
}

type Inputs = Readonly<Record<string, Matrix>>;

/** Nodes of each object in each view; some lack some. */
const SIZES = [[3, 4, 2], [2, 0, 3], [0, 2, 1], [4, 3, 2]] as const;
const WIDTH = 3;
const EPSILON = 0.3;
const STRENGTH = 0.1;
const MARGIN_WEIGHT = 0.2;

/** A data set of these sizes, whose nodes have two attributes. */
function sizedDataset(random: Random, views: number): GraphDataset {
  return GraphDataset.fromGraphs(
    Array.from({ length: views }, (_, view) => ({
      name: `v${view}`,
      graphs: SIZES.map((sizes): Graph | null =>
        sizes[view] === 0 ? null : {
          nodeAttributes: Array.from(
            { length: sizes[view]! },
            () => [Math.fround(random.gaussian()), Math.fround(random.gaussian())],
          ),
          edges: [],
        }
      ),
    })),
    { labels: SIZES.map((_, i) => i % 2), allowMissing: true },
  );
}

interface Setting {
  readonly views: number;
  readonly pairs: "all" | "star";
  readonly cost: "sqeuclidean" | "cosine";
  readonly penalty: TransportPenalty;
}

/** Sums of columns less their mean, over their deviation. */
function standardised(x: Matrix): Matrix {
  const out = new Matrix(x.rows, x.columns);
  for (let column = 0; column < x.columns; column++) {
    let [mean, variance] = [0, 0];
    for (let row = 0; row < x.rows; row++) mean += x.at(row, column) / x.rows;
    for (let row = 0; row < x.rows; row++) variance += (x.at(row, column) - mean) ** 2 / x.rows;
    for (let row = 0; row < x.rows; row++) {
      out.values[row * x.columns + column] = (x.at(row, column) - mean) /
        Math.sqrt(variance + 1e-5);
    }
  }
  return out;
}

function transposed(x: Matrix): Matrix {
  return Matrix.of(x.columns, x.rows, (row, column) => x.at(column, row));
}

/** Rows less their mean, of length root of `columns`. */
function rowsStandardised(x: Matrix): Matrix {
  return Matrix.of(x.rows, x.columns, (row, column) => {
    const values = Array.from({ length: x.columns }, (_, i) => x.at(row, i));
    const mean = values.reduce((a, b) => a + b) / x.columns;
    const variance = values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / x.columns;
    return (values[column]! - mean) / Math.sqrt(variance + 1e-8);
  });
}

/** A plan in double precision, by Sinkhorn's iterations until nothing changes. */
function planOf(cost: Matrix): Matrix {
  const { rows: n, columns: m } = cost;
  const kernel = cost.map((value) => Math.exp(-value / EPSILON));
  const [u, v] = [new Float64Array(n).fill(1), new Float64Array(m).fill(1)];
  for (let iteration = 0; iteration < 400; iteration++) {
    for (let i = 0; i < n; i++) {
      let sum = 0;
      for (let j = 0; j < m; j++) sum += kernel.at(i, j) * v[j]!;
      u[i] = 1 / n / sum;
    }
    for (let j = 0; j < m; j++) {
      let sum = 0;
      for (let i = 0; i < n; i++) sum += kernel.at(i, j) * u[i]!;
      v[j] = 1 / m / sum;
    }
  }
  return Matrix.of(n, m, (i, j) => u[i]! * kernel.at(i, j) * v[j]!);
}

/** The rows from `start` on. */
const part = (x: Matrix, start: number, rows: number) =>
  Matrix.of(rows, x.columns, (row, column) => x.at(start + row, column));

/** Embedding and penalty in double precision; `fixed` are plans that do not follow from the inputs. */
function reference(
  inputs: Inputs,
  features: readonly Matrix[],
  { views, pairs, cost, penalty }: Setting,
  plans?: { readonly fixed?: readonly Matrix[]; readonly seen?: Matrix[] },
): { embedding: Matrix; penalty: number; cost: number } {
  const nodes = features.map((_, view) => inputs[`nodes.${view}`]!);
  const starts = nodes.map((_, view) =>
    SIZES.map((__, object) => SIZES.slice(0, object).reduce((sum, sizes) => sum + sizes[view]!, 0))
  );
  const sideBySide = (parts: readonly Matrix[]) =>
    Matrix.of(
      parts[0]!.rows,
      parts.reduce((sum, { columns }) => sum + columns, 0),
      (row, column) => {
        let rest = column;
        for (const part of parts) {
          if (rest < part.columns) return part.at(row, rest);
          rest -= part.columns;
        }
        return NaN;
      },
    );
  const projected = nodes.map((z, view) => {
    const all = sideBySide([features[view]!, z]);
    const standard = standardised(all.times(inputs[`fusion.projections.${view}.weight`]!));
    const scaled = standard.map((value) => value / Math.sqrt(2 * WIDTH));
    return cost === "cosine"
      ? rowsStandardised(scaled).map((value) => value / Math.sqrt(2 * WIDTH))
      : scaled;
  });
  const messages: Matrix[][] = nodes.map(() => []);
  const distances: number[][] = [];
  for (let u = 0; u < views; u++) {
    for (let v = u + 1; v < views; v++) {
      if (pairs === "star" && u > 0) continue;
      const [toU, toV] = [new Matrix(nodes[u]!.rows, WIDTH), new Matrix(nodes[v]!.rows, WIDTH)];
      const each: number[] = [];
      for (const [object, sizes] of SIZES.entries()) {
        const [n, m] = [sizes[u]!, sizes[v]!];
        if (n === 0 || m === 0) continue;
        const [startU, startV] = [starts[u]![object]!, starts[v]![object]!];
        const [x, y] = [part(projected[u]!, startU, n), part(projected[v]!, startV, m)];
        const costs = Matrix.of(n, m, (i, j) => {
          let sum = 0;
          for (let c = 0; c < WIDTH; c++) sum += (x.at(i, c) - y.at(j, c)) ** 2;
          return sum;
        });
        const plan = plans?.fixed?.[plans.seen!.length] ?? planOf(costs);
        plans?.seen?.push(plan);
        each.push(plan.values.reduce((sum, mass, i) => sum + mass * costs.values[i]!, 0));
        const [zu, zv] = [part(nodes[u]!, startU, n), part(nodes[v]!, startV, m)];
        toU.values.set(plan.times(zv).map((value) => n * value).values, startU * WIDTH);
        toV.values.set(transposed(plan).times(zu).map((value) => m * value).values, startV * WIDTH);
      }
      messages[u]!.push(toU);
      messages[v]!.push(toV);
      distances.push(each);
    }
  }
  const readouts = nodes.map((z, view) => {
    const own = `fusion.combinations.${view}`;
    const [weight, bias] = [inputs[`${own}.weight`]!, inputs[`${own}.bias`]!];
    const differences = messages[view]!.map((message) =>
      Matrix.of(z.rows, WIDTH, (row, column) => (z.at(row, column) - message.at(row, column)) ** 2)
    );
    const change = sideBySide([z, ...messages[view]!, ...differences]).times(weight);
    const combined = Matrix.of(
      z.rows,
      WIDTH,
      (row, column) => z.at(row, column) + Math.tanh(change.at(row, column) + bias.at(0, column)),
    );
    return Matrix.of(SIZES.length, WIDTH, (object, column) => {
      let sum = 0;
      for (let i = 0; i < SIZES[object]![view]!; i++) {
        sum += combined.at(starts[view]![object]! + i, column);
      }
      return sum;
    });
  });
  const mean = (values: readonly number[]) => values.reduce((a, b) => a + b, 0) / values.length;
  const total = mean(distances.map(mean));
  const softplus = (x: number) => Math.log1p(Math.exp(x));
  const added = () => {
    if (typeof penalty === "number") return penalty * total;
    if (penalty === "learned") {
      const learned = inputs["fusion.weight"]!.at(0, 0);
      return total / (1 + Math.exp(-learned)) + STRENGTH * softplus(-learned);
    }
    const margin = softplus(inputs["fusion.margin"]!.at(0, 0));
    const beyond = distances.map((each) => mean(each.map((d) => Math.max(0, d - margin))));
    return MARGIN_WEIGHT * (mean(beyond) + 0.5 * margin);
  };
  return { embedding: sideBySide(readouts), penalty: added(), cost: total };
}

/** The fused loss on the device, and by the reference: their values, and gradients of nodes and parameters. */
function checkFusion(
  device: Device,
  setting: Setting,
  gradient: TransportGradient,
  seed: number,
): void {
  const random = new Random(seed, "amosl");
  const what = JSON.stringify({ ...setting, gradient, seed });
  const dataset = sizedDataset(random, setting.views);
  using parameters = new Parameters();
  const fusion = new AmoslFusion({ parameters, name: "fusion" }, {
    ...{ ...setting, gradient, epsilon: EPSILON, tolerance: 1e-8, width: WIDTH, readout: "sum" },
    ...{ activation: "tanh", normalisation: "none" },
    inputs: dataset.views.map(() => 2),
  });
  parameters.place(device, seed);
  const batches = new GraphBatches(dataset);
  const host = batches.collate([0, 1, 2, 3]);
  const features = host.views.map((view) => new Matrix(view.nodes, 2, view.nodeFeatures));
  const inputs: Record<string, Matrix> = {};
  for (const [view, { nodes }] of host.views.entries()) {
    inputs[`nodes.${view}`] = Matrix.random(nodes, WIDTH, random);
  }
  const { parameters: values } = parameters.read();
  for (const { name, of, shape: [rows, columns], start } of parameters.names) {
    if (of !== "parameters") continue;
    inputs[name] = new Matrix(rows, columns, values.subarray(start, start + rows * columns));
  }
  // A margin between the objects' costs, so that some are beyond it.
  if (setting.penalty === "margin") {
    inputs["fusion.margin"] = new Matrix(1, 1, [Math.fround(Math.log(Math.expm1(0.35)))]);
    const place = parameters.names.find(({ name }) => name === "fusion.margin")!.start;
    values[place] = inputs["fusion.margin"].at(0, 0);
    parameters.write({ parameters: values, state: parameters.read().state });
  }
  const seen: Matrix[] = [];
  const expected = reference(inputs, features, setting, { seen });
  const { rows, columns } = expected.embedding;
  const weights = Matrix.random(rows, columns, random);
  const constant = gradient === "envelope" || gradient === "detached";
  const lossOf = (name: string) => (moved: Inputs) => {
    const plans = constant ? { fixed: seen, seen: [] } : undefined;
    const now = reference(moved, features, setting, plans);
    const { embedding } = now;
    // Detached, the penalty has a gradient for its own weight alone.
    const isCut = gradient === "detached" && name !== "fusion.weight";
    const penalty = isCut ? expected.penalty : now.penalty;
    return embedding.values.reduce((sum, value, i) => sum + value * weights.values[i]!, penalty);
  };
  using tape = new Tape(device);
  tape.begin({ training: true });
  parameters.clearGradients();
  const batch = uploadBatch(tape, host);
  const tensors = batch.views.map((_, view) => tensorOf(tape, inputs[`nodes.${view}`]!));
  const fused = fusion.fuse(
    tape,
    batch.views.map((view, i) => ({ view, nodes: tensors[i]! })),
    batch,
  );
  assertLessOrEqual(
    relativeError(download(fused.embedding), expected.embedding.values),
    1e-5,
    what,
  );
  assertAlmostEquals(download(fused.transportCost!)[0]!, expected.cost, 1e-5, what);
  const penalty = fused.penalty ? download(fused.penalty)[0]! : 0;
  assertAlmostEquals(penalty, expected.penalty, 1e-5, what);
  // The sum of all elements, weighted: a row times a column.
  const flat = (matrix: Matrix) => new Matrix(1, matrix.rows * matrix.columns, matrix.values);
  const row = tensorOf(tape, flat(weights), false);
  const { embedding } = fused;
  const column = new Tensor(embedding.place, { rows: embedding.count, columns: 1 }, {
    needed: true,
  });
  // The same elements as a column: its gradient is the embedding's.
  tape.record(column, (dy) => {
    embedding.gradient = dy;
    embedding.hasGradient = true;
  });
  tape.backward(totalLoss(tape, linear(tape, row, column), fused.penalty));
  const buffer = parameters.buffers.gradients.download();
  for (const name of Object.keys(inputs)) {
    const differences = centralDifferences(inputs, name, lossOf(name));
    const place = parameters.names.find((each) => each.name === name);
    const actual = place
      ? Float64Array.from(buffer.subarray(place.start, place.start + differences.length))
      : download(tensors[Number(name.split(".")[1])]!, "gradient");
    const error = relativeError(actual, differences);
    assertLessOrEqual(error, 1e-4, `${what}: gradient of ${name}`);
  }
}

test("loss and gradients are those of a reference in double precision", (device) => {
  const plain = { views: 2, pairs: "all", cost: "sqeuclidean", penalty: "learned" } as const;
  checkFusion(device, plain, "implicit", 1);
  if (device.backend === "cpu") checkFusion(device, { ...plain, penalty: 0.7 }, "unrolled", 2);
  checkFusion(device, { ...plain, penalty: 0.7 }, "envelope", 3);
  checkFusion(device, plain, "detached", 4);
  checkFusion(device, { ...plain, views: 3, penalty: "margin" }, "implicit", 5);
  checkFusion(device, { ...plain, views: 3, pairs: "star", cost: "cosine" }, "implicit", 6);
});

const TASK = correspondenceTask({ objects: 48, parts: 3, partNodes: [3, 4], seed: 2 });
const AMOSL = { fusion: "amosl", width: 8, layers: 1 } as const satisfies GraphModelOptions;
const QUICK: TrainingOptions = { epochs: 3, batchSize: 16, seed: 3, model: AMOSL };

/** History and parameters of a run. */
async function run(device: Device, options: TrainingOptions, dataset = TASK) {
  using result = await train(device, dataset, options);
  const { parameters, state } = networkOf(result.model).parameters.read();
  return { history: result.history, parameters, state };
}

test("the same seed gives the same bits, and every option counts", async (device) => {
  const first = await run(device, QUICK);
  assertEquals(await run(device, QUICK), first);
  const others: GraphModelOptions[] = [
    ...(["envelope", "unrolled", "detached", "exact"] as const).map((gradient) => ({ gradient })),
    ...(["margin", 0, 0.5] as const).map((penalty) => ({ penalty })),
    ...[{ epsilon: 0.1 }, { cost: "cosine" as const }],
  ];
  for (const options of others) {
    const { history } = await run(device, { ...QUICK, model: { ...AMOSL, ...options } });
    const [before, after] = [history, first.history].map((each) => each.map(({ loss }) => loss));
    assertNotEquals(before, after, JSON.stringify(options));
    assert(history.every(({ loss }) => Number.isFinite(loss)), JSON.stringify(options));
  }
});

test("interrupted and resumed is the same as uninterrupted", async (device) => {
  using folder = new TemporaryFolder();
  const settings = { ...QUICK, epochs: 4, model: { ...AMOSL, dropout: 0.1 } };
  const whole = await run(device, settings);
  const checkpoint = folder.file("run.safetensors");
  const controller = new AbortController();
  await assertRejects(
    () =>
      train(device, TASK, {
        ...{ ...settings, checkpoint, signal: controller.signal },
        onEpoch: ({ epoch }) => {
          if (epoch === 2) controller.abort(new Error("interrupted"));
        },
      }),
    Error,
    "interrupted",
  );
  assertEquals(await run(device, { resume: checkpoint }), whole);
  using loaded = await GraphClassifier.load(device, checkpoint);
  assertEquals(loaded.options.fusion, "amosl");
  assertEquals(align(loaded, TASK, { objects: [1] })[0]!.views, [0, 1]);
});

test("three views, of which objects may lack some, and whole batches too", async (device) => {
  const graph = (value: number, nodes: number): Graph => ({
    nodeAttributes: Array.from({ length: nodes }, (_, i) => [value, i]),
    edges: Array.from({ length: nodes }, (_, i) => [i, (i + 1) % nodes]),
  });
  const lacks = [[], [0], [1], [2], [0, 1], [0, 2], [1, 2], [1, 2]];
  const dataset = GraphDataset.fromGraphs(
    [0, 1, 2].map((view) => ({
      name: `v${view}`,
      graphs: Array.from(
        { length: 16 },
        (_, i) => lacks[i % 8]!.includes(view) ? null : graph(i < 8 ? -1 : 1, 2 + (i + view) % 3),
      ),
    })),
    { labels: Array.from({ length: 16 }, (_, i) => Number(i < 8)), allowMissing: true },
  );
  for (const pairs of ["all", "star"] as const) {
    using result = await train(device, dataset, {
      ...{ epochs: 20, batchSize: 3, learningRate: 0.02, seed: 1 },
      model: { ...AMOSL, pairs, normalisation: "layer", activation: "gelu", headDropout: 0 },
    });
    assertEquals(evaluate(result.model, dataset).accuracy, 1, pairs);
    const found = align(result.model, dataset);
    // Of 8 objects: all three views; two views, by which one they lack.
    const compared = pairs === "all"
      ? ["0:0,1", "0:0,2", "0:1,2", "1:1,2", "2:0,2", "3:0,1"]
      : ["0:0,1", "0:0,2", "2:0,2", "3:0,1"];
    const keys = found.filter(({ object }) => object < 8)
      .map(({ object, views }) => `${object}:${views}`);
    assertEquals(keys, compared);
    for (const { plan, rows, columns, object } of found) {
      for (let i = 0; i < rows; i++) {
        const mass = plan.subarray(i * columns, (i + 1) * columns).reduce((a, b) => a + b, 0);
        assertAlmostEquals(mass, 1 / rows, 1e-3, `row ${i} of object ${object}`);
      }
    }
    // An object by itself is aligned as among others, and one without a pair is not.
    const [alone] = align(result.model, dataset, { objects: [3] });
    const among = found.find(({ object }) => object === 3)!;
    assertLess(relativeError(alone!.plan, among.plan), 1e-4);
    assertEquals(align(result.model, dataset, { objects: [4, 6] }), []);
  }
});

test("finds correspondences that carry the label, where late fusion is lost", async (device) => {
  const [trained, tested] = [1000, 300];
  const task = correspondenceTask({
    ...{ objects: trained + tested, parts: 3, partNodes: [3, 4], seed: 0 },
  });
  const objects = task.labels.keys().toArray();
  const accuracies: Record<string, number> = {};
  for (const fusion of ["late", "amosl"] as const) {
    using result = await train(device, task, {
      ...{ objects: objects.slice(0, trained), epochs: 12, batchSize: 32, learningRate: 0.005 },
      model: {
        ...{ ...AMOSL, fusion, width: 32, epsilon: 0.02, headDropout: 0 },
        ...{ readout: "mean", activation: "gelu" },
      },
    });
    const aside = { objects: objects.slice(trained) };
    accuracies[fusion] = evaluate(result.model, task, aside).accuracy;
    if (fusion === "late") continue;
    let [right, all] = [0, 0];
    for (const alignment of align(result.model, task, aside)) {
      const start = task.views[1]!.nodeOffsets[alignment.object]!;
      for (const { row, column } of strongest(alignment)) {
        all++;
        right += Number(task.correspondence![start + column] === row);
      }
    }
    assertGreaterOrEqual(right / all, 0.9, "true partners");
    const { history } = result;
    assertLess(history.at(-1)!.transportCost!, history[0]!.transportCost!);
  }
  assertGreater(accuracies.amosl!, accuracies.late! + 0.1, JSON.stringify(accuracies));
});

test("options that are none, and models that have no plans, are refused", async (device) => {
  const refused: [GraphModelOptions, string][] = [
    [{ epsilon: 0 }, "epsilon must be above 0"],
    [{ penalty: -1 }, "penalty must be"],
    [{ penalty: "much" as "learned" }, "penalty must be"],
    [{ gradient: "none" as "implicit" }, "gradient must be one of"],
    [{ pairs: "some" as "all" }, "pairs must be one of"],
    [{ cost: "dot" as "cosine" }, "cost must be one of"],
  ];
  for (const [options, fragment] of refused) {
    await rejectsWith(
      () => train(device, TASK, { ...QUICK, model: { ...AMOSL, ...options } }),
      "invalid-argument",
      fragment,
    );
  }
  await rejectsWith(
    () => train(device, TASK.select([0]), QUICK),
    "invalid-argument",
    "two views or more",
  );
  using late = await train(device, TASK, { ...QUICK, epochs: 1, model: { width: 8 } });
  assertThrows(() => align(late.model, TASK), PackhorseError, "fusion is late");
});
