/**
 * Decode attention over packed caches on a GPU, by the GPU's own clock, beside a pure read of as many bytes and, where
 * python3 has PyTorch, its best attention over 16 bits: `deno run -A bench/gpu/attention.ts`. Prints a Markdown table,
 * and with `--svg FILE` draws a chart of it. `--only TEXT` measures the rows that contain the text, `--no-torch` leaves
 * PyTorch out. With `--forks`, the sequences of a batch are forks of one and there is one layer: what fits L2 stays there,
 * and what instructions take shows. Needs 75 GB of GPU memory.
 *
 * @module
 */
import { parseArgs } from "node:util";
import { Device } from "../../src/device/mod.ts";
import { AtomicFile } from "../../src/io/mod.ts";
import type { KvCacheCodec, KvCachePartCodec } from "../../src/kv/mod.ts";
import {
  type CacheCase,
  CacheWorkload,
  createTokens,
  PACKKV,
  type Tokens,
} from "../cache_workload.ts";
import type { AttentionBar } from "./attention_chart.ts";
import {
  announce,
  describe,
  medianTime,
  printHeadings,
  printRow,
  RUNS,
  runTorch,
} from "./measure.ts";

const HEAD_DIM = 128;
const RESIDUAL = 64;
/** Layers of a measurement, which follow each other as those of a model do: more than L2 holds. */
const LAYERS = 32;
const READ_BYTES = 2 ** 31;
const TOKENS = 16_384;

const uniform = (batch: number, kvHeads: number, group: number, tokens: number): CacheCase => ({
  batch,
  kvHeads,
  group,
  headDim: HEAD_DIM,
  lengths: Array.from({ length: batch }, () => tokens),
});

/** The cases of the design's table. */
const CASES: readonly CacheCase[] = [
  uniform(1, 8, 4, 131_072),
  uniform(8, 8, 4, 32_768),
  uniform(32, 8, 4, 8_192),
  uniform(8, 8, 8, 32_768),
  uniform(8, 32, 1, 16_384),
  uniform(64, 8, 4, 4_096),
];
/** One sequence that leaves most of a GPU to itself, unless it is cut. */
const SHORT_CASES: readonly CacheCase[] = [uniform(1, 8, 4, 32_768), uniform(1, 8, 4, 8_192)];
const ALL_CASES = [...CASES, ...SHORT_CASES];
/** Sixteen sequences of 100 to 60,000 tokens, and a uniform batch of as many in all. */
const RAGGED = Array.from({ length: 16 }, (_, i) => Math.round(100 * 600 ** (i / 15)));

const both = (part: KvCachePartCodec): KvCacheCodec => ({ keys: part, values: part });
const CODECS: Readonly<Record<string, KvCacheCodec>> = {
  raw16: both({ quantizer: "raw16" }),
  "fixed 2": both({ quantizer: "fixed", bits: 2 }),
  "fixed 3": both({ quantizer: "fixed", bits: 3 }),
  "fixed 4": both({ quantizer: "fixed", bits: 4 }),
  "packkv 0.1/0.2": PACKKV,
};

/** Shares of a pure read that are wanted on an H200: of groups of 8, of a single sequence, of the other cases. */
const WANTED_SHARES: Readonly<Record<string, readonly [number, number, number]>> = {
  "fixed 2": [0.75, 0.8, 0.82],
  "fixed 3": [0.82, 0.8, 0.85],
  "fixed 4": [0.86, 0.8, 0.92],
  "packkv 0.1/0.2": [0.75, 0.75, 0.75],
};
/** How many times faster than the best bf16 attention. */
const WANTED_SPEEDUPS: Readonly<Record<string, number>> = { "packkv 0.1/0.2": 3.5 };
/** How much longer than a uniform batch a ragged one may take. */
const WANTED_RAGGED = 1.15;

/** PyTorch's best bf16 attention. */
interface TorchTime {
  readonly name: string;
  readonly milliseconds: number;
  readonly kernel: string;
}

const { values: flags } = parseArgs({
  options: {
    torch: { type: "boolean", default: true },
    only: { type: "string", default: "" },
    forks: { type: "boolean", default: false },
    svg: { type: "string" },
  },
  allowNegative: true,
});

using device = Device.open({ backend: "cuda" });
using readSource = device.createBuffer("u8", READ_BYTES);
readSource.fill(1);

// Opened before measuring, which takes long, so that a wrong path fails at once.
using chart = flags.svg === undefined ? undefined : await AtomicFile.create(flags.svg);

const bigRead = READ_BYTES / medianTime(device, () => readSource.read()) / 1e9;
console.log(
  `${describe(device)}; medians of ${RUNS} runs; pure read of 2 GiB: ${bigRead.toFixed(2)} TB/s.\n`,
);

const sixteenBit = await measureTorch();
printHeadings(
  "batch × kv heads × group, tokens",
  "codec",
  ">bits",
  ">MB",
  ">µs",
  ">TB/s",
  ">share of pure read",
  ">wanted",
  ">× best bf16",
);
const bars: AttentionBar[] = [];
let tokens: (Tokens & Disposable) | undefined;
for (const shape of ALL_CASES) {
  tokens = await tokensFor(shape, tokens);
  for (const [codec, parts] of Object.entries(CODECS)) {
    const wanted = CASES.includes(shape) ? wantedShare(shape, codec) : undefined;
    measureCase(label(shape), shape, codec, parts, wanted);
  }
}
// Forks have one length.
if (!flags.forks) await measureRagged();
tokens?.[Symbol.dispose]();
if (chart) {
  await (await import("./attention_chart.ts")).writeAttentionChart(chart, bars, device.info.name);
}

function label({ batch, kvHeads, group, lengths }: CacheCase): string {
  return `${batch}×${kvHeads}×${group}, ${lengths[0]!.toLocaleString("en")}`;
}

async function tokensFor(
  { kvHeads, headDim }: CacheCase,
  before: (Tokens & Disposable) | undefined,
): Promise<Tokens & Disposable> {
  if (before?.keys.length === TOKENS * kvHeads * headDim) return before;
  before?.[Symbol.dispose]();
  return await createTokens(device, { kvHeads, headDim, count: TOKENS });
}

function wantedShare({ batch, group }: CacheCase, codec: string): number | undefined {
  const [groupsOf8, single, other] = WANTED_SHARES[codec] ?? [];
  return group === 8 ? groupsOf8 : batch === 1 ? single : other;
}

/** Measures, prints and notes a row, and returns its share of a pure read; undefined if it is not to be measured. */
function measureCase(
  title: string,
  shape: CacheCase,
  codec: string,
  parts: KvCacheCodec,
  wanted?: number,
): number | undefined {
  if (!`${title} ${codec}`.includes(flags.only)) return undefined;
  announce(`${title}, ${codec}`);
  using workload = new CacheWorkload(device, shape, {
    tokens: tokens!,
    codec: parts,
    layers: flags.forks ? 1 : LAYERS,
    residual: RESIDUAL,
    forked: flags.forks,
  });
  const bytes = workload.layerBytes;
  // As a step of a model runs: captured once, and replayed behind another step.
  using graph = workload.capture(LAYERS / workload.layers);
  const replay = () => workload.replay(graph);
  const milliseconds = medianTime(device, replay, { lead: replay }) / LAYERS;
  const readMilliseconds = measureRead(bytes);
  const share = readMilliseconds / milliseconds;
  const best = sixteenBit.get(title);
  const speedup = best && best / milliseconds;
  printRow(
    title,
    codec,
    workload.bitsPerValue.toFixed(2),
    (bytes / 1e6).toFixed(1),
    (milliseconds * 1e3).toFixed(1),
    (bytes / milliseconds / 1e9).toFixed(2),
    `${(100 * share).toFixed(0)} %`,
    wanted === undefined ? "" : `${(100 * wanted).toFixed(0)} %`,
    speedup?.toFixed(2) ?? "",
  );
  bars.push({
    title,
    codec,
    share,
    speedup,
    wanted: { share: wanted, speedup: WANTED_SPEEDUPS[codec] },
  });
  return share;
}

/** Measures the ragged batch beside the uniform one. */
async function measureRagged(): Promise<void> {
  const total = RAGGED.reduce((sum, length) => sum + length, 0);
  // Cut a little finer, so that no piece takes longer than the rest of the batch.
  const ragged = { ...uniform(RAGGED.length, 8, 4, 0), lengths: RAGGED, splits: 4 };
  const even = uniform(RAGGED.length, 8, 4, Math.round(total / RAGGED.length));
  tokens = await tokensFor(ragged, tokens);
  for (const codec of ["fixed 3", "packkv 0.1/0.2"]) {
    const parts = CODECS[codec]!;
    const share = measureCase("uniform, as many tokens", even, codec, parts);
    const wanted = share === undefined ? undefined : share / WANTED_RAGGED;
    measureCase(`ragged ${RAGGED.length}×8×4, 100 to 60,000`, ragged, codec, parts, wanted);
  }
}

/** Milliseconds that a pure read of as many bytes takes, cold as the cache is. */
function measureRead(bytes: number): number {
  const length = Math.floor(bytes / 16) * 16;
  const places = Math.floor(READ_BYTES / length);
  if (places === 0) return length / bigRead / 1e9;
  const read = () => {
    for (let i = 0; i < places; i++) readSource.view(i * length, length).read();
  };
  return medianTime(device, read, { lead: read }) / places;
}

/** Milliseconds of PyTorch's best bf16 attention, by case; none without PyTorch. */
async function measureTorch(): Promise<ReadonlyMap<string, number>> {
  if (!flags.torch) return new Map();
  const cases = ALL_CASES.map((shape) => ({
    name: label(shape),
    batch: shape.batch,
    kv_heads: shape.kvHeads,
    group: shape.group,
    head_dim: shape.headDim,
    tokens: shape.lengths[0],
  }));
  const found = await runTorch<TorchTime[]>("attention_torch.py", cases) ?? [];
  for (const { name, milliseconds, kernel } of found) {
    console.log(`PyTorch bf16, ${name}: ${(milliseconds * 1e3).toFixed(1)} µs (${kernel})`);
  }
  console.log();
  return new Map(found.map(({ name, milliseconds }) => [name, milliseconds]));
}
