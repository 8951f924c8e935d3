/**
 * An epoch of training on the two views of the digits (`tests/fixtures/digits`) by the wall clock: late fusion and AMoSL,
 * three layers of GIN with 64 channels, batches of 128, beside the same models with PyTorch Geometric where python3 finds it:
 * `deno run -A bench/gpu/graph.ts [--epochs 23] [--no-pyg] [--no-compile] [--backend cpu]`. Prints Markdown tables. Packhorse's epoch makes its batches on the
 * host and copies them to the GPU as it goes; PyTorch's are made before and lie on the GPU.
 *
 * Both begin with the same values: a second table has the first losses of training on one batch, which must agree.
 *
 * @module
 */
import { parseArgs } from "node:util";
import { type Backend, Device } from "../../src/device/mod.ts";
import { type FusionKind, readTuDataset } from "../../src/graph/mod.ts";
import { GraphTrainer, type TrainingSettings } from "../../src/graph/train.ts";
import { median } from "../kv_workload.ts";
import { announce, describe, printHeadings, printRow, runTorch } from "./measure.ts";

const BATCH = 128;
/** Epochs before those that are measured: memory is taken, and kernels are loaded. */
const WARM_UPS = 2;
/** Steps on one batch whose losses are compared. */
const STEPS = 5;
const FOLDERS = ["L", "R"].map((view) =>
  new URL(`../../tests/fixtures/digits/DIGITS_${view}`, import.meta.url).pathname
);
const SHAPE = { layers: 3, width: 64 };

/** Models, and how PyTorch finds the gradients of plans. */
const MODELS = [
  { title: "late fusion", fusion: "late", peers: [{ title: "PyTorch Geometric" }] },
  {
    ...{ title: "AMoSL", fusion: "amosl" },
    peers: [
      { title: "PyTorch Geometric, implicit gradient", gradient: "implicit" },
      { title: "PyTorch Geometric, unrolled gradient", gradient: "unrolled" },
      { title: "the implicit one, iterations compiled", gradient: "implicit", compile: true },
    ],
  },
] as const satisfies readonly {
  readonly title: string;
  readonly fusion: FusionKind;
  readonly peers: readonly Peer[];
}[];

const isWanted = ({ compile = false }: Peer) => flags.pyg && (flags.compile || !compile);

interface Peer {
  readonly title: string;
  readonly gradient?: "implicit" | "unrolled";
  readonly compile?: boolean;
}

/** What graph_pyg.py prints. */
interface Epochs {
  readonly milliseconds: readonly number[];
  readonly losses: readonly number[];
}

/** A training run, for both. */
interface Run {
  readonly fusion: FusionKind;
  readonly epochs: number;
  readonly headDropout: number;
  /** How many objects there are to train on: the first. */
  readonly objects: number;
}

const { values: flags } = parseArgs({
  options: {
    epochs: { type: "string", default: "23" },
    pyg: { type: "boolean", default: true },
    compile: { type: "boolean", default: true },
    backend: { type: "string", default: "cuda" },
  },
  allowNegative: true,
});
const epochs = Number(flags.epochs);

using device = Device.open({ backend: flags.backend as Backend });
const dataset = await readTuDataset(FOLDERS);
const folder = await Deno.makeTempDir();
try {
  await compareTimes();
  if (flags.pyg) await compareLosses();
} finally {
  await Deno.remove(folder, { recursive: true });
}

async function compareTimes(): Promise<void> {
  console.log(
    `${describe(device)}; ${dataset.length} objects, batches of ${BATCH}, medians of ` +
      `${epochs - WARM_UPS} epochs.\n`,
  );
  printHeadings("model", "", ">ms an epoch", ">ms a step", ">loss at the end", ">× Packhorse");
  for (const { title, fusion, peers } of MODELS) {
    const run = { fusion, epochs, headDropout: 0.2, objects: dataset.length };
    const ours = await trainOurs(run);
    row(title, "Packhorse", ours, ours);
    for (const peer of peers.filter(isWanted)) {
      const theirs = await trainTheirs(run, peer);
      if (theirs) row(title, peer.title, theirs, ours);
    }
  }
}

/** Compares the first losses, without dropout, whose random numbers differ. */
async function compareLosses(): Promise<void> {
  console.log();
  const headings = Array.from({ length: STEPS }, (_, step) => `>loss of step ${step + 1}`);
  printHeadings("model", "", ...headings);
  for (const { title, fusion, peers } of MODELS) {
    const run = { fusion, epochs: STEPS, headDropout: 0, objects: BATCH };
    const show = (who: string, { losses }: Epochs) =>
      printRow(title, who, ...losses.map((loss) => loss.toFixed(4)));
    show("Packhorse", await trainOurs(run));
    for (const peer of peers.filter(isWanted)) {
      const theirs = await trainTheirs(run, peer);
      if (theirs) show(peer.title, theirs);
    }
  }
}

/** Trains, and leaves the first values in a file for PyTorch. */
async function trainOurs({ fusion, epochs, headDropout, objects }: Run): Promise<Epochs> {
  const [milliseconds, losses]: [number[], number[]] = [[], []];
  const settings: TrainingSettings = {
    ...{ epochs, batchSize: BATCH, schedule: { kind: "constant" }, seed: 1 },
    objects: Array.from({ length: objects }, (_, object) => object),
    model: { fusion, layer: "gin", headDropout, ...SHAPE },
  };
  using trainer = new GraphTrainer(device, dataset, settings);
  await trainer.save(weightsOf(fusion));
  while (!trainer.isDone) {
    announce(`epoch ${losses.length + 1} of ${epochs}`);
    const begin = performance.now();
    // Waits for the device at its end.
    const { loss } = trainer.runEpoch();
    milliseconds.push(performance.now() - begin);
    losses.push(loss);
  }
  return { milliseconds, losses };
}

/** Undefined, and an exit code of 1, if that failed. */
async function trainTheirs(run: Run, peer: Peer): Promise<Epochs | undefined> {
  const { title, gradient, compile } = peer;
  announce(title);
  const result = await runTorch<Epochs>("graph_pyg.py", {
    ...{ ...run, ...SHAPE, gradient, compile, batch: BATCH, folders: FOLDERS },
    weights: weightsOf(run.fusion),
  });
  if (result === undefined) {
    console.error(`${title}: graph_pyg.py failed; --no-pyg measures Packhorse alone`);
    Deno.exitCode = 1;
  }
  return result;
}

function weightsOf(fusion: FusionKind): string {
  return `${folder}/${fusion}.safetensors`;
}

function row(model: string, who: string, run: Epochs, ours: Epochs): void {
  const [own, epoch] = [ours, run].map(({ milliseconds }) => median(milliseconds.slice(WARM_UPS)));
  const step = epoch! / Math.ceil(dataset.length / BATCH);
  const ratio = (epoch! / own!).toFixed(1);
  const loss = run.losses.at(-1)!.toFixed(3);
  printRow(model, who, epoch!.toFixed(1), step.toFixed(2), loss, ratio);
}
