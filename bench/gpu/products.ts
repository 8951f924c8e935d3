/**
 * The two products of attention over packed caches on a GPU, `KvCache.score` (q . K) and `KvCache.weigh` (w . V), one
 * sequence, 8 and 40 kv heads, by the GPU's own clock, beside torch.matmul of bf16 (cuBLAS) where python3 has PyTorch:
 * `deno run -A bench/gpu/products.ts`. Prints a Markdown table. `--no-torch` leaves PyTorch out. TB/s are of half the
 * packed bytes, as the cache counts keys and values together, and of the scores or weights.
 *
 * @module
 */
import { parseArgs } from "node:util";
import { Device } from "../../src/device/mod.ts";
import type { KvCacheCodec } from "../../src/kv/mod.ts";
import { type CacheCase, CacheWorkload, createTokens, PACKKV } from "../cache_workload.ts";
import { describe, medianTime, printHeadings, printRow, RUNS, runTorch } from "./measure.ts";

const HEAD_DIM = 128;
const RESIDUAL = 64;
/** What the layers of a measurement hold together, so that each is cold again when its turn comes. */
const ROTATED_BYTES = 400e6;
const TOKENS = 16_384;

const CODECS: Readonly<Record<string, KvCacheCodec>> = {
  "fixed 2": { keys: { quantizer: "fixed", bits: 2 }, values: { quantizer: "fixed", bits: 2 } },
  "fixed 3": { keys: { quantizer: "fixed", bits: 3 }, values: { quantizer: "fixed", bits: 3 } },
  "packkv 0.1/0.2": PACKKV,
};

/** Milliseconds of PyTorch's two products. */
interface TorchTimes {
  readonly score: number;
  readonly weigh: number;
}

const { values: flags } = parseArgs({
  options: { torch: { type: "boolean", default: true } },
  allowNegative: true,
});

using device = Device.open({ backend: "cuda" });
console.log(`${describe(device)}; medians of ${RUNS} runs.\n`);
printHeadings("kv heads, tokens", "codec", "product", ">µs", ">TB/s", ">bf16 matmul µs", ">× bf16");
for (const kvHeads of [8, 40]) {
  using tokens = await createTokens(device, { kvHeads, headDim: HEAD_DIM, count: TOKENS });
  for (const length of [32_768, 131_072]) {
    const torch = flags.torch
      ? await runTorch<TorchTimes>("products_torch.py", {
        heads: kvHeads,
        tokens: length,
        head_dim: HEAD_DIM,
      })
      : undefined;
    const shape = { batch: 1, kvHeads, group: 1, headDim: HEAD_DIM, lengths: [length] };
    for (const [codec, parts] of Object.entries(CODECS)) {
      // At 3 bits a value, roughly, of keys or values alone.
      const layers = Math.max(3, Math.ceil(ROTATED_BYTES / (length * kvHeads * HEAD_DIM * 3 / 8)));
      using workload = new CacheWorkload(device, shape, {
        tokens,
        codec: parts,
        layers,
        residual: RESIDUAL,
      });
      measureProducts(`${kvHeads}, ${length.toLocaleString("en")}`, codec, {
        shape,
        workload,
        torch,
      });
    }
  }
}

function measureProducts(
  title: string,
  codec: string,
  { shape: { kvHeads, headDim, lengths }, workload, torch }: {
    shape: CacheCase;
    workload: CacheWorkload;
    torch: TorchTimes | undefined;
  },
): void {
  const { cache, sequences: [sequence], layers } = workload;
  using queries = device.createBuffer("bf16", kvHeads * headDim);
  queries.upload(new Uint16Array(queries.length).fill(0x3f80)); // ones
  using weights = device.createBuffer("f32", kvHeads * lengths[0]!);
  using out = device.createBuffer("f32", kvHeads * headDim);
  // Attention of all layers a few times, from one call each, while the host enqueues the products.
  using graph = workload.capture();
  const lead = () => {
    for (let i = 0; i < 4; i++) workload.replay(graph);
  };
  const forLayers = (work: (layer: number) => void) =>
    medianTime(device, () => {
      for (let layer = 0; layer < layers; layer++) work(layer);
    }, { lead }) / layers;
  const times = {
    score: forLayers((layer) => cache.score(layer, sequence!, queries, weights)),
    weigh: forLayers((layer) => cache.weigh(layer, sequence!, weights, out)),
  };
  const bytes = workload.layerBytes / 2 + weights.byteLength;
  for (const product of ["score", "weigh"] as const) {
    const time = times[product];
    const best = torch?.[product];
    printRow(
      title,
      codec,
      product,
      (time * 1e3).toFixed(1),
      (bytes / time / 1e9).toFixed(2),
      best === undefined ? "" : (best * 1e3).toFixed(1),
      best === undefined ? "" : (best / time).toFixed(2),
    );
  }
}
