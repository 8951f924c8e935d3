/**
 * The codec on a GPU, by the GPU's own clock, beside a copy within its memory of the same run.
 * Prints a Markdown table: `deno run -A bench/gpu/kv.ts`. Needs 22 GB of GPU memory.
 *
 * @module
 */
import { Device } from "../../src/device/mod.ts";
import type { KvPack, KvRepack } from "../../src/kv/mod.ts";
import { createNormals, KvWorkload, median } from "../kv_workload.ts";

// 32 layers of 32,768 tokens, as one cache. Far beyond the L2 cache, so every run starts cold.
const TOKENS = 32 * 32_768;
// One such layer: 134 MB, which is beyond L2 too.
const SLOW_TOKENS = 32_768;
const WARM_UPS = 3;
const RUNS = 21;

const CASES: { repack: KvRepack; pack: KvPack; tokens: number }[] = [
  { repack: "none", pack: 16, tokens: TOKENS },
  { repack: "none", pack: 8, tokens: TOKENS },
  { repack: "none", pack: 32, tokens: TOKENS },
  { repack: "median", pack: 16, tokens: TOKENS },
  { repack: "greedy", pack: 16, tokens: SLOW_TOKENS },
  { repack: "auto", pack: 16, tokens: SLOW_TOKENS },
];

using device = Device.open({ backend: "cuda" });
using keys = createNormals(device, TOKENS, 1);
using values = createNormals(device, TOKENS, 2);
using restoredKeys = device.createBuffer("f16", keys.length);
using restoredValues = device.createBuffer("f16", values.length);

const copyMilliseconds = medianTime(() => restoredKeys.copyFrom(keys));
const copyBandwidth = keys.byteLength / copyMilliseconds / 1e9;

const { name, instructionSet, driverVersion, runtimeVersion } = device.info;
console.log(
  `${name} (${instructionSet}), CUDA driver ${version(driverVersion)}, ` +
    `runtime ${version(runtimeVersion)}; medians of ${RUNS} runs.\n`,
);
printRow("case", "tokens", "ms", "TB/s of 16-bit values", "share of copy", "true bits per value");
printRow("---", "--:", "--:", "--:", "--:", "--:");
printSpeed("copy", TOKENS, keys.byteLength, copyMilliseconds);
for (const { repack, pack, tokens } of CASES) {
  using workload = new KvWorkload(device, {
    cache: { keys, values },
    restored: { keys: restoredKeys, values: restoredValues },
    tokens,
    codec: { keyRel: 0.1, valueRel: 0.2, repack, pack },
  });
  const encodeMilliseconds = medianTime(() => workload.encode());
  const { inputBytes, recordsByteLength } = workload;
  const bits = 16 * recordsByteLength / inputBytes;
  const decodeMilliseconds = medianTime(() => workload.decode(recordsByteLength));
  const codec = `${repack}, P = ${pack}`;
  printSpeed(`encode ${codec}`, tokens, inputBytes, encodeMilliseconds, bits);
  printSpeed(`decode ${codec}`, tokens, inputBytes, decodeMilliseconds, bits);
}

function medianTime(work: () => void): number {
  for (let i = 0; i < WARM_UPS; i++) work();
  return median(Array.from({ length: RUNS }, () => device.time(work)));
}

/** The copy's bandwidth counts its bytes once, as the codec's does. */
function printSpeed(
  name: string,
  tokens: number,
  bytes: number,
  milliseconds: number,
  bits?: number,
): void {
  const speed = bytes / milliseconds / 1e9;
  printRow(
    name,
    tokens.toLocaleString("en"),
    milliseconds.toFixed(3),
    speed.toFixed(3),
    (speed / copyBandwidth).toFixed(3),
    bits?.toFixed(3) ?? "",
  );
}

function printRow(...cells: string[]): void {
  console.log(`| ${cells.join(" | ")} |`);
}

function version(number: number): string {
  return `${Math.floor(number / 1000)}.${number % 1000 / 10}`;
}
