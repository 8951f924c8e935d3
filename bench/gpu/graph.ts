/**
 * An epoch of training on the two views of the digits (`tests/fixtures/digits`) on a GPU, late fusion of three layers of GIN
 * with 64 channels, batches of 128, by the wall clock, beside the same model in plain PyTorch where python3 has it:
 * `deno run -A bench/gpu/graph.ts [--epochs 23] [--no-torch]`. Prints a Markdown table. Packhorse's epoch makes its batches
 * on the host and copies them to the GPU as it goes; PyTorch's are made before and lie on the GPU.
 *
 * @module
 */
import { parseArgs } from "node:util";
import { Device } from "../../src/device/mod.ts";
import { readTuDataset } from "../../src/graph/mod.ts";
import { GraphTrainer } from "../../src/graph/train.ts";
import { median } from "../kv_workload.ts";
import { announce, describe, printHeadings, printRow, runTorch } from "./measure.ts";

const BATCH = 128;
/** Epochs before those that are measured: memory is taken, and kernels are loaded. */
const WARM_UPS = 2;
const FOLDERS = ["L", "R"].map((view) =>
  new URL(`../../tests/fixtures/digits/DIGITS_${view}`, import.meta.url).pathname
);

/** What graph_torch.py prints. */
interface TorchEpochs {
  readonly milliseconds: readonly number[];
  readonly losses: readonly number[];
}

const { values: flags } = parseArgs({
  options: {
    epochs: { type: "string", default: "23" },
    torch: { type: "boolean", default: true },
  },
  allowNegative: true,
});
const epochs = Number(flags.epochs);
const settings = { layers: 3, width: 64, headDropout: 0.2 };

using device = Device.open({ backend: "cuda" });
const dataset = await readTuDataset(FOLDERS);
console.log(
  `${describe(device)}; ${dataset.length} objects, batches of ${BATCH}, medians of ` +
    `${epochs - WARM_UPS} epochs.\n`,
);
printHeadings("model", ">ms an epoch", ">ms a step", ">loss at the end");
const ours = measure();
row("late fusion, GIN 3 × 64", ours);
if (flags.torch) {
  announce("PyTorch");
  const input = { ...settings, folders: FOLDERS, batch: BATCH, epochs };
  const torch = await runTorch<TorchEpochs>("graph_torch.py", input);
  if (torch !== undefined) {
    row("the same in PyTorch", torch);
    const ratio = medianOf(torch) / medianOf(ours);
    console.log(`\nPyTorch takes ${ratio.toFixed(1)} times as long.`);
  }
}

/** The epochs of a training run. */
function measure(): TorchEpochs {
  const [milliseconds, losses]: [number[], number[]] = [[], []];
  using trainer = new GraphTrainer(device, dataset, {
    ...{ epochs, batchSize: BATCH, schedule: { kind: "constant" }, seed: 1 },
    model: { fusion: "late", layer: "gin", ...settings },
  });
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

function medianOf({ milliseconds }: TorchEpochs): number {
  return median(milliseconds.slice(WARM_UPS));
}

function row(title: string, run: TorchEpochs): void {
  const epoch = medianOf(run);
  const step = epoch / Math.ceil(dataset.length / BATCH);
  printRow(title, epoch.toFixed(1), step.toFixed(2), run.losses.at(-1)!.toFixed(3));
}
