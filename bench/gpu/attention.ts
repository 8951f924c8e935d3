/**
 * Decode attention over packed caches on a GPU, by the GPU's own clock, beside a pure read of as many bytes and, where
 * python3 has PyTorch, its best attention over 16 bits: `deno run -A bench/gpu/attention.ts`. Prints a Markdown table.
 * `--only TEXT` measures the rows that contain the text, `--no-torch` leaves PyTorch out. Needs 20 GB of GPU memory.
 *
 * @module
 */
import { parseArgs } from "node:util";
import { Device } from "../../src/device/mod.ts";
import type { KvCacheCodec, KvCachePartCodec } from "../../src/kv/mod.ts";
import { type CacheCase, CacheWorkload, createTokens, type Tokens } from "../cache_workload.ts";
import { median } from "../kv_workload.ts";

const HEAD_DIM = 128;
const RESIDUAL = 64;
const WARM_UPS = 3;
const RUNS = 21;
/** What the layers of a measurement hold together, so that each is cold again when its turn comes. */
const ROTATED_BYTES = 400e6;
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
/** Sixteen sequences of 100 to 60,000 tokens, and a uniform batch of as many in all. */
const RAGGED = Array.from({ length: 16 }, (_, i) => Math.round(100 * 600 ** (i / 15)));

const both = (part: KvCachePartCodec): KvCacheCodec => ({ keys: part, values: part });
const CODECS: Readonly<Record<string, KvCacheCodec>> = {
  raw16: both({ quantizer: "raw16" }),
  "fixed 2": both({ quantizer: "fixed", bits: 2 }),
  "fixed 3": both({ quantizer: "fixed", bits: 3 }),
  "fixed 4": both({ quantizer: "fixed", bits: 4 }),
  "packkv 0.1/0.2": {
    keys: { quantizer: "packkv", rel: 0.1 },
    values: { quantizer: "packkv", rel: 0.2 },
  },
};

const { values: flags } = parseArgs({
  options: { torch: { type: "boolean", default: true }, only: { type: "string", default: "" } },
  allowNegative: true,
});

using device = Device.open({ backend: "cuda" });
using readSource = device.createBuffer("u8", READ_BYTES);
readSource.fill(1);

const { name, instructionSet, driverVersion, runtimeVersion } = device.info;
const bigRead = READ_BYTES / medianTime(() => readSource.read()) / 1e9;
console.log(
  `${name} (${instructionSet}), CUDA driver ${version(driverVersion)}, runtime ${
    version(runtimeVersion)
  }; ` +
    `medians of ${RUNS} runs; pure read of 2 GiB: ${bigRead.toFixed(2)} TB/s.\n`,
);

const sixteenBit = flags.torch ? await measureTorch() : new Map<string, number>();
printRow(
  "batch × kv heads × group, tokens",
  "codec",
  "bits",
  "MB",
  "µs",
  "TB/s",
  "share of pure read",
  "× best bf16",
);
printRow("---", "---", "--:", "--:", "--:", "--:", "--:", "--:");

let tokens: (Tokens & Disposable) | undefined;
for (const shape of CASES) {
  tokens = await tokensFor(shape, tokens);
  for (const [codec, parts] of Object.entries(CODECS)) {
    measureCase(label(shape), shape, codec, parts);
  }
}
const total = RAGGED.reduce((sum, length) => sum + length, 0);
const ragged = { ...uniform(RAGGED.length, 8, 4, 0), lengths: RAGGED };
const even = uniform(RAGGED.length, 8, 4, Math.round(total / RAGGED.length));
tokens = await tokensFor(ragged, tokens);
for (const codec of ["fixed 3", "packkv 0.1/0.2"]) {
  measureCase(`ragged ${RAGGED.length}×8×4, 100 to 60,000`, ragged, codec, CODECS[codec]!);
  measureCase(`uniform, as many tokens`, even, codec, CODECS[codec]!);
}
tokens?.[Symbol.dispose]();

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

function measureCase(title: string, shape: CacheCase, codec: string, parts: KvCacheCodec): void {
  if (!`${title} ${codec}`.includes(flags.only)) return;
  const values = shape.lengths.reduce((sum, length) => sum + length, 0) * shape.kvHeads *
    shape.headDim * 2;
  // At 3 bits a value, roughly.
  const layers = Math.max(2, Math.ceil(ROTATED_BYTES / (values * 3 / 8)));
  using workload = new CacheWorkload(device, shape, {
    tokens: tokens!,
    codec: parts,
    layers,
    residual: RESIDUAL,
  });
  const bytes = workload.layerBytes;
  const milliseconds = medianTime(() => workload.attend()) / layers;
  const readMilliseconds = measureRead(bytes);
  const best = sixteenBit.get(title);
  printRow(
    title,
    codec,
    workload.bitsPerValue.toFixed(2),
    (bytes / 1e6).toFixed(1),
    (milliseconds * 1e3).toFixed(1),
    (bytes / milliseconds / 1e9).toFixed(2),
    `${(100 * readMilliseconds / milliseconds).toFixed(0)} %`,
    best === undefined ? "" : (best / milliseconds).toFixed(2),
  );
}

/** Milliseconds that a pure read of as many bytes takes, cold as the cache is. */
function measureRead(bytes: number): number {
  const length = Math.floor(bytes / 16) * 16;
  const places = Math.floor(READ_BYTES / length);
  if (places === 0) return length / bigRead / 1e9;
  return medianTime(() => {
    for (let i = 0; i < places; i++) readSource.view(i * length, length).read();
  }) / places;
}

/** Milliseconds of PyTorch's best bf16 attention, by case; none without PyTorch. */
async function measureTorch(): Promise<Map<string, number>> {
  const script = new URL("attention_torch.py", import.meta.url).pathname;
  const cases = CASES.map(({ batch, kvHeads, group, headDim, lengths }) => ({
    name: label({ batch, kvHeads, group, headDim, lengths }),
    batch,
    kv_heads: kvHeads,
    group,
    head_dim: headDim,
    tokens: lengths[0],
  }));
  try {
    const { success, stdout } = await new Deno.Command("python3", {
      args: [script, JSON.stringify(cases)],
      stderr: "inherit",
    }).output();
    if (!success) return new Map();
    const found: { name: string; milliseconds: number; kernel: string }[] = JSON.parse(
      new TextDecoder().decode(stdout),
    );
    for (const { name, milliseconds, kernel } of found) {
      console.log(`PyTorch bf16, ${name}: ${(milliseconds * 1e3).toFixed(1)} µs (${kernel})`);
    }
    console.log();
    return new Map(found.map(({ name, milliseconds }) => [name, milliseconds]));
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return new Map();
    throw error;
  }
}

function medianTime(work: () => void): number {
  for (let i = 0; i < WARM_UPS; i++) work();
  return median(Array.from({ length: RUNS }, () => device.time(work)));
}

function printRow(...cells: string[]): void {
  console.log(`| ${cells.join(" | ")} |`);
}

function version(number: number): string {
  return `${Math.floor(number / 1000)}.${number % 1000 / 10}`;
}
