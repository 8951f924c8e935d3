import { Device } from "../../src/device/mod.ts";
import { PackhorseError } from "../../src/error.ts";
import { AtomicFile, SafetensorsReader } from "../../src/io/mod.ts";
import {
  type KvFileReport,
  type KvSweepRow,
  packKvFile,
  sweepKvFile,
  unpackKvFile,
} from "../../src/kv/mod.ts";
import { sweepPanel, writeSweepChart } from "../chart.ts";
import { FIXTURE, FIXTURE_PATH } from "../fixture.ts";
import { type ReportSection, writeHtmlReport } from "../html_report.ts";
import { listenForInterrupt } from "../interrupt.ts";
import { printModelDemo, runModel } from "../model_demo.ts";
import { modelDemoSections } from "../model_demo_report.ts";
import { defined, type GlobalOptions } from "../options.ts";
import { print, printJson } from "../output.ts";
import { layerTable, packReport, printLayers, printTotal } from "../report.ts";

const KEY_REL = 0.1;
const VALUE_REL = 0.2;

/** Packs the cache of a small model that ships with Packhorse, checks the errors, and runs the model over such a cache. */
export async function demo(options: GlobalOptions & { output: string }): Promise<void> {
  const { backend, output, json } = options;
  const input = FIXTURE_PATH;
  const packed = `${output}/kv.phkv`;
  const restored = `${output}/kv.safetensors`;
  const chart = `${output}/bits_and_error.svg`;
  const page = `${output}/report.html`;
  const say = json ? () => {} : print;
  await Deno.mkdir(output, { recursive: true });
  using device = Device.open(defined({ backend }));
  using interrupt = listenForInterrupt();
  const { signal } = interrupt;

  say(`1. Pack a model's key/value cache on ${device.info.name}, with the scales at ${KEY_REL}`);
  say(`   (keys) and ${VALUE_REL} (values) of a token's range: errors within half of that.\n`);
  const packing = await packKvFile(device, {
    input,
    output: packed,
    codec: { keyRel: KEY_REL, valueRel: VALUE_REL, repack: "greedy" },
    signal,
  });
  if (!json) {
    printLayers(packing, { errors: true });
    printTotal(packing);
  }

  say("\n2. Unpack it and compare every value with the original.\n");
  await unpackKvFile(device, { input: packed, output: restored, signal });
  const errors = await largestErrors(input, restored);
  const within = errors.every(({ ofBound }) => ofBound <= 1);
  for (const { tensor, ofBound } of errors) {
    say(`   ${tensor}: largest error ${(100 * ofBound).toFixed(1)} % of the bound`);
  }

  say("\n3. Chart bits against error over other settings.\n");
  const rows = await sweepKvFile(device, {
    input,
    keyRels: [0.05, 0.1, 0.2],
    valueRels: [0.1, 0.2, 0.4],
    repacks: ["none", "median", "greedy"],
    packs: [16],
    signal,
  });
  using file = await AtomicFile.create(chart, { signal });
  await writeSweepChart(file, rows);
  say(`   ${packed}\n   ${restored}\n   ${chart}`);

  say("\n4. Let the model go on with a text, over a 16-bit and over a packed cache.\n");
  const model = await runModel(device, { signal });
  using report = await AtomicFile.create(page, { signal });
  await writeHtmlReport(report, {
    title: "Packhorse: a model over a packed cache",
    summary: `A small model that ships with Packhorse, on ${device.info.name}.`,
    sections: [...modelDemoSections(model), fileSection(packing, rows)],
  });
  if (json) {
    const { backend } = device;
    const { continuations } = model;
    const pack = packReport(packing);
    printJson({ backend, pack, errors, within, chart, report: page, continuations });
  } else {
    printModelDemo(model);
    print(`\n   ${page}: the same with charts, for a browser`);
  }
  if (!within) throw new PackhorseError("internal", `Restored values leave the bound: ${restored}`);
}

/** What the page shows of the file. */
function fileSection(packing: KvFileReport, rows: readonly KvSweepRow[]): ReportSection {
  const note = "A line for each way to order tokens, with a point for each scale.";
  return {
    title: "A cache, packed into a file",
    text: `${FIXTURE}, with the scales at ${KEY_REL} (keys) and ${VALUE_REL} (values) of a ` +
      "token's range: no value is off by more than half of its scale.",
    parts: [
      { kind: "table", ...layerTable(packing, { errors: true }) },
      {
        kind: "charts",
        charts: [
          { title: "Keys: bits against error", note, spec: sweepPanel(rows, "Keys") },
          { title: "Values: bits against error", note, spec: sweepPanel(rows, "Values") },
        ],
      },
    ],
  };
}

interface TensorError {
  tensor: string;
  /** Largest error of a value, as a share of what its token's range allows. */
  ofBound: number;
}

async function largestErrors(original: string, restored: string): Promise<TensorError[]> {
  using before = await SafetensorsReader.open(original);
  using after = await SafetensorsReader.open(restored);
  const errors: TensorError[] = [];
  for (const [tensor, { shape }] of before.tensors) {
    const rel = tensor.endsWith(".key") ? KEY_REL : VALUE_REL;
    const read = async (reader: SafetensorsReader) =>
      new Float16Array((await reader.read(tensor)).buffer);
    errors.push({ tensor, ofBound: ofBound(await read(before), await read(after), shape, rel) });
  }
  return errors;
}

/** Tokens share their scale over all heads: half of `rel` times the range over them is allowed. */
function ofBound(
  before: Float16Array,
  after: Float16Array,
  [heads = 0, tokens = 0, headDim = 0]: readonly number[],
  rel: number,
): number {
  let largest = 0;
  for (let token = 0; token < tokens; token++) {
    let [min, max, error] = [Infinity, -Infinity, 0];
    for (let head = 0; head < heads; head++) {
      const start = (head * tokens + token) * headDim;
      for (let at = start; at < start + headDim; at++) {
        min = Math.min(min, before[at]!);
        max = Math.max(max, before[at]!);
        error = Math.max(error, Math.abs(after[at]! - before[at]!));
      }
    }
    // The scale is itself rounded to 16 bits, and so is what was restored.
    const rounding = 2 ** (Math.floor(Math.log2(Math.max(-min, max, 2 ** -14))) - 10);
    largest = Math.max(largest, error / ((max - min) * rel * (0.5 + 2 ** -12) + rounding));
  }
  return largest;
}
