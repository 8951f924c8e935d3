/** Training of graph classifiers on every backend that has their operations: the same bits, interruptions, files, errors. */
import {
  assert,
  assertEquals,
  assertGreater,
  assertLess,
  assertNotEquals,
  assertRejects,
  assertThrows,
} from "@std/assert";
import { Device } from "../src/device/mod.ts";
import { PackhorseError } from "../src/error.ts";
import {
  correspondenceTask,
  crossValidate,
  type EpochReport,
  evaluate,
  GraphClassifier,
  GraphDataset,
  predict,
  readTuDataset,
  train,
  type TrainingOptions,
} from "../src/graph/mod.ts";
import { networkOf } from "../src/graph/classifier.ts";
import { learningRateShare } from "../src/graph/schedule.ts";
import { backends } from "./backends.ts";
import { rejectsWith } from "./rejects_with.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

const DIGITS = await readTuDataset(
  ["L", "R"].map((view) => new URL(`fixtures/digits/DIGITS_${view}`, import.meta.url).pathname),
);
/** 120 of the digits, as many of each. */
const SOME = [...DIGITS.labels.entries()].filter(([object, label]) =>
  DIGITS.labels.subarray(0, object).filter((other) => other === label).length < 12
).map(([object]) => object);

const QUICK: TrainingOptions = {
  objects: SOME,
  epochs: 4,
  batchSize: 32,
  model: { width: 16, layers: 2 },
  seed: 3,
};

function test(name: string, work: (device: Device) => Promise<void>): void {
  for (const backend of backends()) {
    Deno.test(`graph training: ${backend}: ${name}`, async () => {
      using device = Device.open({ backend });
      await work(device);
    });
  }
}

/** History and parameters of a run. */
async function run(device: Device, options: TrainingOptions, dataset = DIGITS) {
  using result = await train(device, dataset, options);
  const { parameters, state } = networkOf(result.model).parameters.read();
  return { history: result.history, epoch: result.epoch, parameters, state };
}

test("the same seed gives the same bits, another does not", async (device) => {
  const dropouts = { ...QUICK, model: { ...QUICK.model, dropout: 0.1 } };
  const first = await run(device, dropouts);
  assertEquals(await run(device, dropouts), first);
  const other = await run(device, { ...dropouts, seed: 4 });
  assertNotEquals(other.history, first.history);
  assertLess(first.history.at(-1)!.loss, first.history[0]!.loss);
});

test("interrupted and resumed is the same as uninterrupted", async (device) => {
  using folder = new TemporaryFolder();
  const settings = {
    ...QUICK,
    ...{ epochs: 6, patience: 5, validationShare: 0.25 },
    model: { ...QUICK.model, dropout: 0.1 },
  };
  const whole = await run(device, settings);
  const checkpoint = folder.file("run.safetensors");
  const controller = new AbortController();
  const seen: EpochReport[] = [];
  await assertRejects(
    () =>
      train(device, DIGITS, {
        ...{ ...settings, checkpoint, signal: controller.signal },
        onEpoch: (report) => {
          seen.push(report);
          if (report.epoch === 3) controller.abort(new Error("interrupted"));
        },
      }),
    Error,
    "interrupted",
  );
  assertEquals(seen.length, 3);
  assertEquals(await run(device, { resume: checkpoint }), whole);
  // A checkpoint of other data is refused.
  const message = "on other data";
  await rejectsWith(
    () => train(device, DIGITS.select([1, 0]), { resume: checkpoint }),
    "invalid-argument",
    message,
  );
});

test("early stopping takes the best epoch's parameters", async (device) => {
  const settings = {
    ...{ ...QUICK, epochs: 40, patience: 2, validationShare: 0.3, learningRate: 0.05 },
    schedule: { kind: "constant" as const },
  };
  using result = await train(device, DIGITS, settings);
  const { history, epoch, stoppedEarly } = result;
  assert(stoppedEarly, `${history.length} epochs`);
  assertEquals(history.length, epoch + 2);
  const losses = history.map(({ validationLoss }) => validationLoss!);
  assertEquals(losses.indexOf(Math.min(...losses)) + 1, epoch);
  const until = await run(device, { ...settings, epochs: epoch });
  assertEquals(networkOf(result.model).parameters.read().parameters, until.parameters);
});

test("every layer, readout, normalisation and fusion learns", async (device) => {
  const models = [
    { layer: "gcn", readout: "mean" },
    { layer: "sage", readout: "max" },
    { layer: "gat", readout: "attention", heads: 2 },
    { layer: "gin", normalisation: "layer", activation: "gelu" },
    { layer: "gin", fusion: "early", normalisation: "none" },
    { layer: "gin", fusion: "single", view: 1, activation: "gelu" },
  ] as const;
  for (const model of models) {
    const settings = { ...QUICK, epochs: 20, learningRate: 0.01 };
    using result = await train(device, DIGITS, {
      ...settings,
      model: { width: 32, layers: 2, headDropout: 0, ...model },
    });
    const { accuracy, objects } = evaluate(result.model, DIGITS, { objects: SOME });
    assertEquals(objects, SOME.length);
    assertGreater(accuracy, 0.2, JSON.stringify(model)); // a guess has 0.1
    const [first, last] = [result.history[0]!, result.history.at(-1)!];
    assertLess(last.loss, 0.9 * first.loss, JSON.stringify(model));
  }
});

test("a single view of two is that view by itself", async (device) => {
  const model = { ...QUICK.model, fusion: "single" as const };
  const ofTwo = await run(device, { ...QUICK, model: { ...model, view: 1 } });
  const alone = await run(device, { ...QUICK, model }, DIGITS.select([1]));
  assertEquals(ofTwo, alone);
});

test("objects may lack views, whole batches too", async (device) => {
  const graph = (value: number) => ({ nodeAttributes: [[value], [1]], edges: [[0, 1], [1, 0]] });
  const graphs = Array.from({ length: 12 }, (_, i) => graph(i % 2));
  const dataset = GraphDataset.fromGraphs([
    { name: "a", graphs },
    { name: "b", graphs: graphs.map((graph, i) => i < 8 ? null : graph) },
  ], { labels: graphs.map((_, i) => i % 2), allowMissing: true });
  for (const layer of ["gin", "gat", "gcn", "sage"] as const) {
    using result = await train(device, dataset, {
      ...{ epochs: 30, batchSize: 4, learningRate: 0.02 },
      model: {
        layer,
        width: 16,
        layers: 2,
        headDropout: 0,
        normalisation: "layer",
        activation: "gelu",
      },
    });
    assertEquals(evaluate(result.model, dataset, { batchSize: 3 }).accuracy, 1, layer);
  }
});

test("a model in a file predicts what it did, and files that are none are refused", async (device) => {
  using folder = new TemporaryFolder();
  using result = await train(device, DIGITS, QUICK);
  const path = folder.file("model.safetensors");
  await result.model.save(path);
  using loaded = await GraphClassifier.load(device, path);
  assertEquals(loaded.options, result.model.options);
  assertEquals(loaded.schema, result.model.schema);
  const objects = SOME.slice(0, 50);
  const expected = predict(result.model, DIGITS, { objects });
  assertEquals(predict(loaded, DIGITS, { objects }), expected);
  // Objects one by one are as they are together.
  const alone = predict(loaded, DIGITS, { objects, batchSize: 1 });
  assertEquals(alone.classes, expected.classes);
  const { accuracy, confusion } = evaluate(loaded, DIGITS, { objects });
  const right = objects.filter((object, i) => expected.classes[i] === DIGITS.labels[object]).length;
  assertEquals(accuracy, right / 50);
  assertEquals(confusion.flat().reduce((a, b) => a + b), 50);
  await rejectsWith(() => train(device, DIGITS, { resume: path }), "corrupt", "no training");
  const bytes = await Deno.readFile(path);
  const change = async (from: string, to: string) => {
    assertEquals(from.length, to.length);
    const header = new TextDecoder("latin1").decode(bytes);
    const at = header.indexOf(from);
    assertGreater(at, 0, from);
    const changed = bytes.slice();
    changed.set(new TextEncoder().encode(to), at);
    return await folder.write("changed.safetensors", changed);
  };
  const broken: [string, string, string][] = [
    ["packhorse-graph-1", "packhorse-graph-9", "no graph model"],
    [`\\"width\\":16`, `\\"width\\":17`, "expected"],
    [`\\"layers\\":2`, `\\"layers\\":0`, "layers must be"],
    [`\\"layer\\":\\"gin\\"`, `\\"layer\\":\\"gim\\"`, "layer must be one of"],
    [`\\"attributes\\":3`, `\\"attributes\\":4`, "expected"],
    [`\\"classes\\":[0,`, `\\"classes\\":[x,`, "JSON"],
  ];
  for (const [from, to, fragment] of broken) {
    const changed = await change(from, to);
    await rejectsWith(() => GraphClassifier.load(device, changed), "corrupt", fragment);
  }
  const task = correspondenceTask({ objects: 8 });
  assertThrows(() => predict(loaded, task), PackhorseError, "attributes");
  assertThrows(() => predict(loaded, DIGITS.select([0])), PackhorseError, "made for 2");
  assertThrows(() => predict(loaded, DIGITS, { objects: [1797] }), PackhorseError, "1797");
});

test("cross-validation measures each object once, on what was not trained on it", async (device) => {
  const seen: string[] = [];
  const task = correspondenceTask({ objects: 60, parts: 3 });
  const options = {
    ...{ folds: 3, epochs: 2, seed: 5, batchSize: 16, model: { width: 8, layers: 1 } },
    onEpoch: (fold: number, { epoch }: EpochReport, epochs: number) =>
      seen.push(`${fold}:${epoch}/${epochs}`),
  };
  const result = await crossValidate(device, task, options);
  assertEquals(seen, ["1:1/2", "1:2/2", "2:1/2", "2:2/2", "3:1/2", "3:2/2"]);
  assertEquals(result.folds.flatMap(({ objects }) => objects).sort((a, b) => a - b), [
    ...Array(60).keys(),
  ]);
  assertEquals(result.confusion.flat().reduce((a, b) => a + b), 60);
  const mean = result.folds.reduce((sum, { accuracy }) => sum + accuracy, 0) / 3;
  assertEquals(result.accuracy, mean);
  const again = await crossValidate(device, task, options);
  assertEquals(again.folds.map(({ loss }) => loss), result.folds.map(({ loss }) => loss));
});

test("settings that are none are refused, and a loss that is no number is an error", async (device) => {
  const refused: [TrainingOptions, string][] = [
    [{ epochs: 0 }, "epochs must be"],
    [{ batchSize: 1.5 }, "batchSize must be"],
    [{ learningRate: 0 }, "learningRate must be"],
    [{ clipNorm: -1 }, "clipNorm must be"],
    [{ weightDecay: 2 }, "weightDecay must be"],
    [{ validationShare: 1 }, "validationShare must be"],
    [{ patience: 3, validationShare: 0 }, "patience needs"],
    [{ objects: [] }, "no object"],
    [{ objects: [-1] }, "object -1"],
    [{ schedule: { factor: 0 } }, "factor"],
    [{ model: { width: 0 } }, "width must be"],
    [{ model: { view: 2 } }, "view must be"],
    [{ model: { layer: "gat", heads: 3 } }, "multiple"],
    [{ model: { dropout: 1 } }, "dropout must be"],
    [{ model: { layer: "mlp" as "gin" } }, "layer must be one of gcn"],
  ];
  for (const [options, fragment] of refused) {
    await rejectsWith(() => train(device, DIGITS, options), "invalid-argument", fragment);
  }
  const wild = { ...QUICK, learningRate: 1e30, schedule: { kind: "constant" as const } };
  await rejectsWith(
    () => train(device, DIGITS, { ...wild, clipNorm: 1e30 }),
    "non-finite",
    "learning rate",
  );
});

Deno.test("graph training: learning rates rise and fall as scheduled", () => {
  const shares = (schedule: Parameters<typeof learningRateShare>[0]) =>
    Array.from(
      { length: 6 },
      (_, epoch) => Number(learningRateShare(schedule, epoch, 6).toFixed(4)),
    );
  assertEquals(shares({}), [1, 1, 1, 1, 1, 1]);
  assertEquals(shares({ kind: "step", every: 2, factor: 0.1 }), [1, 1, 0.1, 0.1, 0.01, 0.01]);
  assertEquals(shares({ kind: "cosine", warmup: 2 }), [0.3333, 0.6667, 1, 0.8536, 0.5, 0.1464]);
});
