/**
 * The codec on a GPU, by the GPU's own clock, beside a copy within its memory of the same run.
 * Prints a Markdown table: `deno run -A bench/gpu/kv.ts`. Needs 22 GB of GPU memory.
 *
 * @module
 */
import { Device } from "../../src/device/mod.ts";
import type { KvPack, KvRepack } from "../../src/kv/mod.ts";
import { createNormals, KvWorkload } from "../kv_workload.ts";
import { describe, medianTime, printHeadings, printRow, RUNS } from "./measure.ts";

// 32 layers of 32,768 tokens, as one cache. Far beyond the L2 cache, so every run starts cold.
const TOKENS = 32 * 32_768;
// One such layer: 134 MB, which is beyond L2 too.
const SLOW_TOKENS = 32_768;

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

const copyMilliseconds = medianTime(device, () => restoredKeys.copyFrom(keys));
const copyBandwidth = keys.byteLength / copyMilliseconds / 1e9;

console.log(`${describe(device)}; medians of ${RUNS} runs.\n`);
printHeadings(
  "case",
  ">tokens",
  ">ms",
  ">TB/s of 16-bit values",
  ">share of copy",
  ">true bits per value",
);
printSpeed("copy", TOKENS, keys.byteLength, copyMilliseconds);
for (const { repack, pack, tokens } of CASES) {
  using workload = new KvWorkload(device, {
    cache: { keys, values },
    restored: { keys: restoredKeys, values: restoredValues },
    tokens,
    codec: { keyRel: 0.1, valueRel: 0.2, repack, pack },
  });
  const encodeMilliseconds = medianTime(device, () => workload.encode());
  const { inputBytes, recordsByteLength } = workload;
  const bits = 16 * recordsByteLength / inputBytes;
  const decodeMilliseconds = medianTime(device, () => workload.decode(recordsByteLength));
  const codec = `${repack}, P = ${pack}`;
  printSpeed(`encode ${codec}`, tokens, inputBytes, encodeMilliseconds, bits);
  printSpeed(`decode ${codec}`, tokens, inputBytes, decodeMilliseconds, bits);
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
