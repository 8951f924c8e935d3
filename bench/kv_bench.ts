/**
 * The floor of the foreign function interface, and the codec on the CPU beside a memcpy in two
 * threads of the same run: `deno task bench`. Shares of the memcpy are printed at the end, since
 * times alone say little on a machine that others use.
 *
 * @module
 */
import { countDevices } from "../ffi/device.ts";
import { Device } from "../src/device/mod.ts";
import type { KvRepack } from "../src/kv/mod.ts";
import { createNormals, KvWorkload, median } from "./kv_workload.ts";

const TOKENS = 16_384;
// Greedy is slow, and its time per block does not depend on their number.
const GREEDY_TOKENS = 2_048;
// Source and target together are more than any cache holds.
const COPY_BYTES = 2 ** 28;

const device = Device.open({ backend: "cpu" });

Deno.bench("call: ph_device_count", { group: "call", baseline: true }, () => {
  countDevices("cpu");
});
Deno.bench("call: synchronize, blocking", { group: "call" }, () => device.synchronizeNow());
Deno.bench("call: synchronize, awaited", { group: "call" }, () => device.synchronize());

// The yardstick belongs to the C library, not to what is measured.
const { symbols: { memcpy } } = Deno.dlopen("libc.so.6", {
  memcpy: { parameters: ["buffer", "buffer", "usize"], result: "pointer", nonblocking: true },
});
const source = new Uint8Array(COPY_BYTES).fill(1);
const target = new Uint8Array(COPY_BYTES).fill(2);

/** Copies half of the memory in each of two threads. */
async function copyMemory(): Promise<void> {
  const half = COPY_BYTES / 2;
  await Promise.all(
    [0, half].map((start) =>
      memcpy(target.subarray(start, start + half), source.subarray(start), BigInt(half))
    ),
  );
}

const sourceBuffer = device.createBuffer("u8", COPY_BYTES);
const targetBuffer = device.createBuffer("u8", COPY_BYTES);
sourceBuffer.fill(1);
targetBuffer.fill(2);
const cache = { keys: createNormals(device, TOKENS, 1), values: createNormals(device, TOKENS, 2) };
const restored = {
  keys: createNormals(device, TOKENS, 3),
  values: createNormals(device, TOKENS, 4),
};

interface Run {
  /** Gigabytes a second of the case. */
  readonly speed: number;
  /** The same of the memcpy right before it. */
  readonly memcpy: number;
}
const runs = new Map<string, Run[]>();

/** Every run follows a memcpy, which empties the caches and meets the same load from others. */
function measure(name: string, bytes: number, work: () => void | Promise<void>): void {
  runs.set(name, []);
  Deno.bench(name, async (context) => {
    const memcpy = await speedOf(copyMemory, COPY_BYTES);
    context.start();
    const speed = await speedOf(work, bytes);
    context.end();
    runs.get(name)!.push({ speed, memcpy });
  });
}

async function speedOf(work: () => void | Promise<void>, bytes: number): Promise<number> {
  const start = performance.now();
  await work();
  return bytes / (performance.now() - start) / 1e6;
}

function workload(repack: KvRepack, tokens: number): KvWorkload {
  const codec = { keyRel: 0.1, valueRel: 0.2, pack: 16, repack } as const;
  return new KvWorkload(device, { cache, restored, tokens, codec });
}

const none = workload("none", TOKENS);
none.encode();
const recordsByteLength = none.recordsByteLength;
const medianOrder = workload("median", TOKENS);
const greedy = workload("greedy", GREEDY_TOKENS);

measure("memcpy", COPY_BYTES, copyMemory);
measure("device copy", COPY_BYTES, () => targetBuffer.copyFrom(sourceBuffer));
measure("encode none", none.inputBytes, () => none.encode());
measure("encode median", medianOrder.inputBytes, () => medianOrder.encode());
measure("encode greedy", greedy.inputBytes, () => greedy.encode());
measure("decode", none.inputBytes, () => none.decode(recordsByteLength));

addEventListener("unload", () => {
  const { name, instructionSet, processors } = device.info;
  console.error(`\n${name}, ${instructionSet}, ${processors} threads; medians`);
  for (const [name, measured] of runs) {
    const speed = median(measured.map(({ speed }) => speed));
    const share = median(measured.map(({ speed, memcpy }) => speed / memcpy));
    const gigabytes = speed.toFixed(3).padStart(7);
    console.error(`${name.padEnd(14)} ${gigabytes} GB/s, ${share.toFixed(4)} of memcpy`);
  }
});
