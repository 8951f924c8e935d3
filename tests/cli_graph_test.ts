/** `graph info`, `train`, `evaluate`, `predict` and `align` as processes: what they print, and how they fail. */
import {
  assert,
  assertEquals,
  assertGreater,
  assertMatch,
  assertStringIncludes,
} from "@std/assert";
import { Device } from "../src/device/mod.ts";
import {
  correspondenceTask,
  GraphClassifier,
  predict,
  readGraphDataset,
} from "../src/graph/mod.ts";
import { backends } from "./backends.ts";
import { pageFaults } from "./browser/page_faults.ts";
import { denoArguments, fail, ROOT, succeed } from "./packhorse_command.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

const DIGITS = ["L", "R"].map((view) => `${ROOT}tests/fixtures/digits/DIGITS_${view}`);
const [BACKEND] = backends();
const ON = ["--backend", BACKEND!];

/** A small data set in two views, as a JSON file. */
async function writeTask(folder: TemporaryFolder): Promise<string> {
  const { views, labels } = correspondenceTask({ objects: 48, parts: 3, seed: 2 });
  return await folder.write(
    "task.json",
    JSON.stringify({
      labels: [...labels],
      views: views.map((view) => ({
        name: view.name,
        graphs: [...labels].map((_, object) => {
          const [node, lastNode] = [view.nodeOffsets[object]!, view.nodeOffsets[object + 1]!];
          const [edge, lastEdge] = [view.edgeOffsets[object]!, view.edgeOffsets[object + 1]!];
          const { attributes, attributeWidth } = view.nodes;
          return {
            nodeAttributes: Array.from(
              { length: lastNode - node },
              (
                _,
                i,
              ) => [
                ...attributes.subarray(
                  (node + i) * attributeWidth,
                  (node + i + 1) * attributeWidth,
                ),
              ],
            ),
            edges: Array.from(
              { length: lastEdge - edge },
              (_, i) => [view.sources[edge + i], view.targets[edge + i]],
            ),
          };
        }),
      })),
    }),
  );
}

const SMALL = ["--epochs", "4", "--width", "8", "--layers", "1", "--batch-size", "16", ...ON];

Deno.test("cli: graph info shows what a data set is made of", async () => {
  const text = await succeed("graph", "info", ...DIGITS);
  assertMatch(text, /^1,797 objects in 2 views\n/);
  assertMatch(text, /DIGITS_L +1,797 +36,766 +13–29, mean 20.5 +170,532 .*both ways/);
  assertMatch(text, /\n +9 +180 +10.0 %\n/);
  const { objects, views } = JSON.parse(await succeed("graph", "info", ...DIGITS, "--json"));
  assertEquals([objects, views.length, views[1].nodes], [1797, 2, 38032]);
});

Deno.test("cli: graph train writes a model that evaluate and predict use", async () => {
  using folder = new TemporaryFolder();
  const task = await writeTask(folder);
  const [model, log] = [folder.file("model.safetensors"), folder.file("log.json")];
  const text = await succeed("graph", "train", task, "-o", model, "--log", log, ...SMALL);
  assertMatch(
    text,
    /model.safetensors written: [\d,]+ parameters\nepoch 4: loss \d.\d{4} {2}accuracy/,
  );
  const { history, settings, epoch } = JSON.parse(await Deno.readTextFile(log));
  assertEquals([history.length, epoch, settings.epochs, settings.model.width], [4, 4, 4, 8]);
  const evaluation = JSON.parse(await succeed("graph", "evaluate", model, task, "--json", ...ON));
  assertEquals(evaluation.objects, 48);
  assertMatch(
    await succeed("graph", "evaluate", model, task, ...ON),
    /^48 objects: accuracy [\d.]+ %/,
  );
  const { predictions } = JSON.parse(
    await succeed("graph", "predict", model, task, "--json", ...ON),
  );
  using device = Device.open({ backend: BACKEND });
  using loaded = await GraphClassifier.load(device, model);
  const { classes } = predict(loaded, await readGraphDataset([task]));
  assertEquals(predictions.map(({ label }: { label: number }) => label), [...classes]);
  const lines = (await succeed("graph", "predict", model, task, ...ON)).trim().split("\n");
  assertEquals(lines.length, 50);
});

Deno.test("cli: graph train measures folds, the same every time", async () => {
  using folder = new TemporaryFolder();
  const task = await writeTask(folder);
  const args = [
    "graph",
    "train",
    task,
    "--folds",
    "3",
    "--seed",
    "4",
    "--fusion",
    "early",
    ...SMALL,
  ];
  const text = await succeed(...args);
  assertMatch(text, /\n +3 +16 +[\d.]+ %/);
  assertMatch(text, /accuracy [\d.]+ %, standard deviation [\d.]+ %/);
  const first = JSON.parse(await succeed(...args, "--json"));
  const second = JSON.parse(await succeed(...args, "--json"));
  const losses = ({ folds }: { folds: { history: { loss: number }[] }[] }) =>
    folds.map(({ history }) => history.map(({ loss }) => loss));
  assertEquals(losses(second), losses(first));
  assertEquals(first.confusion.flat().reduce((a: number, b: number) => a + b), 48);
});

Deno.test("cli: graph train --fusion amosl reports, and graph align shows what corresponds", async () => {
  using folder = new TemporaryFolder();
  const task = await writeTask(folder);
  const [model, page, log] = ["model.safetensors", "page.html", "log.json"].map((name) =>
    folder.file(name)
  ) as [string, string, string];
  const text = await succeed(
    ...["graph", "train", task, "-o", model, "--fusion", "amosl", "--epsilon", "0.1"],
    ...["--gradient", "envelope", "--penalty", "0.3", "--pairs", "star", "--cost", "cosine"],
    ...["--report", page, "--log", log, ...SMALL],
  );
  assertMatch(text, /epoch 4: loss [\d.]+ {2}accuracy [\d.]+ % {2}transport [\d.]+/);
  const { settings, history } = JSON.parse(await Deno.readTextFile(log));
  const { epsilon, gradient, penalty, pairs, cost } = settings.model;
  assertEquals([epsilon, gradient, penalty, pairs, cost], [0.1, "envelope", 0.3, "star", "cosine"]);
  assertGreater(history[0].transportCost, 0);
  const html = await Deno.readTextFile(page);
  for (const part of ["Transport cost", "Confusion", "Correspondences", "Its plan"]) {
    assertStringIncludes(html, part);
  }
  const svg = folder.file("object.svg");
  const table = await succeed(
    ...["graph", "align", model, task, "--object", "5", "--top", "2", "--svg", svg, ...ON],
  );
  assertMatch(
    table,
    /\n +5 +view1 → view2 +\d+, \d+ +[\d.]+.* \d+→\d+ \(\d+ %\), \d+→\d+ \(\d+ %\)\n/,
  );
  assertMatch(await Deno.readTextFile(svg), /^<svg .*Object 5: strongest correspondences/s);
  const { alignments } = JSON.parse(
    await succeed("graph", "align", model, task, "--json", "--top", "1", ...ON),
  );
  assertEquals(alignments.map(({ object }: { object: number }) => object), [...Array(48).keys()]);
  assertEquals(alignments[0].correspondences.length, 1);
  const folds = folder.file("folds.html");
  await succeed(
    ...["graph", "train", task, "--folds", "2", "--fusion", "amosl", "--report", folds, ...SMALL],
  );
  assertStringIncludes(await Deno.readTextFile(folds), "Cross-validation over 2 folds");
  const late = folder.file("late.html");
  await succeed(
    ...["graph", "train", task, "-o", model, "--fusion", "late", "--patience", "3"],
    ...["--report", late, ...SMALL],
  );
  const pages = [page, folds, late];
  assertEquals(await pageFaults(pages.map((path) => ({ path, patience: 20 }))), [[], [], []]);
});

Deno.test("cli: graph train that is interrupted goes on with --resume, to the same end", async () => {
  using folder = new TemporaryFolder();
  const task = await writeTask(folder);
  const part = folder.file("part.safetensors");
  const train = ["graph", "train", task, ...SMALL.with(1, "400")];
  const process = new Deno.Command(Deno.execPath(), {
    args: denoArguments([...train, "-o", part]),
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  // Its first checkpoint says that it trains.
  const start = performance.now();
  while (!folder.list().includes("part.safetensors")) {
    assert(performance.now() - start < 60_000, "no checkpoint after a minute");
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
  process.kill("SIGINT");
  const { code, stderr } = await process.output();
  assertEquals([code, new TextDecoder().decode(stderr)], [1, "packhorse: interrupted\n"]);
  const whole = folder.file("whole.safetensors");
  const uninterrupted = JSON.parse(await succeed(...train, "-o", whole, "--json"));
  const resume = ["graph", "train", task, "--resume", part, "-o", part, "--json", ...ON];
  const { history } = JSON.parse(await succeed(...resume));
  assertEquals(history, uninterrupted.history);
  assertEquals(await Deno.readFile(part), await Deno.readFile(whole));
});

Deno.test("cli: graph says what is wrong", async () => {
  using folder = new TemporaryFolder();
  const task = await writeTask(folder);
  const bad = folder.file("BAD");
  await Deno.mkdir(bad);
  for (
    const [part, text] of Object.entries({
      A: "1, 3\n",
      graph_indicator: "1\n1\n2\n",
      graph_labels: "0\n1\n",
    })
  ) {
    await Deno.writeTextFile(`${bad}/BAD_${part}.txt`, text);
  }
  const model = folder.file("model.safetensors");
  const cases: [number, string[], string][] = [
    [2, ["info"], "views"],
    [2, ["train", task], '"--output"'],
    [2, ["train", task, "-o", model, "--folds", "2"], "conflicts"],
    [2, ["train", task, "--folds", "2", "--layer", "mlp"], "gcn"],
    [2, ["train", task, "--folds", "2", "--dropout", "1"], "0.999"],
    [2, ["train", task, "--folds", "2", "--epsilon", "0.1"], '"--fusion amosl"'],
    [2, ["train", task, "--folds", "2", "--penalty", "much"], "learned, margin, or a number"],
    [1, ["info", bad], "BAD_A.txt: line 1: node 1 of graph 1 is joined to node 3 of graph 2"],
    [1, ["info", DIGITS[0]!, bad], "BAD"],
    [1, ["info", folder.file("nowhere")], "nowhere"],
    [1, ["train", task, "--folds", "100", ...ON], "100 folds of 48"],
    [
      1,
      ["train", task, "--folds", "2", "--view", "2", "--fusion", "single", ...ON],
      "view must be",
    ],
    [1, ["evaluate", task, task, ...ON], "task.json"],
  ];
  for (const [code, args, fragment] of cases) {
    assertStringIncludes(await fail(code, "graph", ...args), fragment);
  }
  assertGreater((await succeed("graph", "--help")).length, 200);
});
