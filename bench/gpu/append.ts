/**
 * What appending to packed caches of 32 layers costs on a GPU, by the GPU's own clock: `deno run -A bench/gpu/append.ts`.
 * Prints two Markdown tables. The first is of decode steps: beginning a step, appending a token of every sequence to
 * every layer and packing the blocks that are due, over rounds of 64 steps, in which every sequence packs one block in
 * each layer; beside it the attention of the same steps, and a decode step of Llama 3.1 8B, which has such a cache: that
 * attention, appending, and reading the weights once. What a step takes on average is the mean of the medians of both
 * kinds of steps, each as often as it comes; the longest step shows what the host's pauses add. The second is of filling one
 * sequence in chunks. Before each time is taken the GPU is given work to do, so that it does not wait for the calls that
 * enqueue, and finds nothing in its L2 cache. Needs 14 GB of GPU memory.
 *
 * @module
 */
import { Device } from "../../src/device/mod.ts";
import type { KvCacheCodec } from "../../src/kv/mod.ts";
import { BLOCK_TOKENS } from "../../src/kv/codec.ts";
import { type CacheCase, CacheWorkload, createTokens, PACKKV } from "../cache_workload.ts";
import { median } from "../kv_workload.ts";
import { announce, describe, medianTime, printHeadings, printRow, queuedTime } from "./measure.ts";

const LAYERS = 32;
const KV_HEADS = 8;
const GROUP = 4;
const HEAD_DIM = 128;
const CONTEXT = 32_768;
const RESIDUAL = 64;
/** Of BLOCK_TOKENS steps each, in which every sequence packs a block, after one to warm up. */
const ROUNDS = 3;
/** Bytes of the weights of Llama 3.1 8B in bf16. */
const WEIGHT_BYTES = 2 * 8.03e9;
/** How often the second table fills a sequence, after once to warm up. */
const PREFILL_RUNS = 5;
/** Far more than what the steps of a fill take at once, so that each layer's input is cold. */
const TOKENS = 65_536;
/** Work of some milliseconds, which is longer than it takes to enqueue what is measured. */
const LEAD_BYTES = 2 ** 32;
const LEAD_READS = 2;

const CODECS: Readonly<Record<string, KvCacheCodec>> = {
  "packkv 0.1/0.2": PACKKV,
  "fixed 3": { keys: { quantizer: "fixed", bits: 3 }, values: { quantizer: "fixed", bits: 3 } },
  raw16: { keys: { quantizer: "raw16" }, values: { quantizer: "raw16" } },
  "kivi 2": { keys: { quantizer: "kivi", bits: 2 }, values: { quantizer: "kivi", bits: 2 } },
};

const shapeOf = (lengths: readonly number[]): CacheCase => ({
  batch: lengths.length,
  kvHeads: KV_HEADS,
  group: GROUP,
  headDim: HEAD_DIM,
  lengths,
});

using device = Device.open({ backend: "cuda" });
using lead = device.createBuffer("u8", LEAD_BYTES);
lead.fill(1);
using tokens = await createTokens(device, { kvHeads: KV_HEADS, headDim: HEAD_DIM, count: TOKENS });
const weights = medianTime(device, () => lead.read()) * WEIGHT_BYTES / LEAD_BYTES;
console.log(
  `${describe(device)}; decode: medians of ${ROUNDS} rounds of ${BLOCK_TOKENS} steps, ` +
    `prefill: medians of ${PREFILL_RUNS} runs. Reading ${WEIGHT_BYTES / 1e9} GB of weights: ` +
    `${weights.toFixed(2)} ms.\n`,
);

printHeadings(
  "sequences",
  ">append of a layer, nothing to pack, µs",
  ">append of a layer, blocks to pack, µs",
  ">steps that pack, of 64",
  ">append of a step, µs",
  ">longest, µs",
  ">attention of a step, µs",
  ">append / attention",
  ">append / decode step",
  ">wanted",
);
measureDecode("1 × 32,768", [CONTEXT]);
measureDecode("8 × 32,768, all pack in one step", Array(8).fill(CONTEXT));
measureDecode(
  "8 × 32,768, 8 tokens apart",
  Array.from({ length: 8 }, (_, i) => CONTEXT - BLOCK_TOKENS / 8 * i),
);

console.log();
printHeadings("codec", ">tokens of a chunk", ">ms", ">TB/s of 16-bit input", ">wanted");
for (const [codec, parts] of Object.entries(CODECS)) measurePrefill(codec, parts);

function measureDecode(title: string, lengths: readonly number[]): void {
  announce(title);
  const steps = (1 + ROUNDS) * BLOCK_TOKENS;
  using workload = new CacheWorkload(device, shapeOf(lengths), {
    tokens,
    codec: PACKKV,
    layers: LAYERS,
    residual: RESIDUAL,
    room: steps,
  });
  const times = Array.from({ length: steps }, () => ({
    append: busyTime(() => workload.append(workload.begin())),
    attention: busyTime(() => workload.attend()),
    packs: packs(workload),
  }));
  const measured = times.slice(BLOCK_TOKENS);
  const appends = measured.map(({ append }) => append);
  const medianOf = (packing: boolean) =>
    median(appends.filter((_, i) => measured[i]!.packs === packing));
  const [copying, packing] = [medianOf(false), medianOf(true)];
  const share = measured.filter(({ packs }) => packs).length / measured.length;
  const append = share * packing + (1 - share) * copying;
  const attention = median(measured.map(({ attention }) => attention));
  printRow(
    title,
    micro(copying / LAYERS),
    micro(packing / LAYERS),
    String(share * BLOCK_TOKENS),
    micro(append),
    micro(Math.max(...appends)),
    micro(attention),
    percent(append / attention),
    percent(append / (weights + attention + append)),
    "5 % of a step",
  );
}

/** Whether a sequence has packed a block in the step that has just begun, of one token each. */
function packs({ cache, sequences }: CacheWorkload): boolean {
  const { sinks, residual } = cache.config;
  return sequences.some((sequence) =>
    (cache.length(sequence) - sinks - residual) % BLOCK_TOKENS === 0
  );
}

function measurePrefill(codec: string, parts: KvCacheCodec): void {
  using workload = new CacheWorkload(device, shapeOf([1]), {
    tokens,
    codec: parts,
    layers: LAYERS,
    residual: RESIDUAL,
    stepTokens: CONTEXT,
    room: CONTEXT,
  });
  for (const chunk of [2_048, 8_192, 32_768]) {
    announce(`${codec}, chunks of ${chunk}`);
    const times = Array.from({ length: 1 + PREFILL_RUNS }, () => {
      workload.cache.truncate(workload.sequences[0]!, 1);
      let milliseconds = 0;
      for (let first = 0; first < CONTEXT; first += chunk) {
        milliseconds += busyTime(() => workload.append(workload.begin(chunk)));
      }
      return milliseconds;
    });
    const milliseconds = median(times.slice(1));
    printRow(
      codec,
      chunk.toLocaleString("en"),
      milliseconds.toFixed(2),
      (CONTEXT * LAYERS * workload.tokenBytes / milliseconds / 1e9).toFixed(2),
      "1",
    );
  }
}

/** Milliseconds of the GPU's own time that what `work` enqueues takes, with the GPU at work when it comes. */
function busyTime(work: () => void): number {
  return queuedTime(device, () => {
    for (let i = 0; i < LEAD_READS; i++) lead.read();
  }, work);
}

function micro(milliseconds: number): string {
  return (milliseconds * 1e3).toFixed(1);
}

function percent(share: number): string {
  return `${(100 * share).toFixed(1)} %`;
}
