// Run with --v8-flags=--expose-gc: drops devices, buffers and kv caches without disposing them, and prints how
// much the memory of the process grew.
import { Device } from "../../src/device/mod.ts";
import { KvCache } from "../../src/kv/mod.ts";

declare const gc: () => void;

const BYTES = 2 ** 22;

function dropOne(): void {
  const device = Device.open({ backend: "cpu" });
  // Written to, so that the memory is really taken.
  device.createBuffer("u8", BYTES).fill(1);
}

using kept = Device.open({ backend: "cpu" });
const TOKENS = 4096;
const HEAD_DIM = 256;
using tokens = kept.createBuffer("f16", TOKENS * HEAD_DIM);
tokens.fill();

function dropCache(): void {
  const shape = { layers: 1, queryHeads: 1, kvHeads: 1, headDim: HEAD_DIM, dtype: "f16" } as const;
  const limits = { sequences: 1, tokens: TOKENS, stepTokens: TOKENS, residual: TOKENS };
  const cache = KvCache.create(kept, { ...shape, ...limits, poolBytes: BYTES });
  // BYTES of keys and values that stay in 16 bits.
  cache.begin([{ sequence: cache.add(), tokens: TOKENS }]).append(0, tokens, tokens);
}

async function collect(): Promise<void> {
  gc();
  // Finalizers run in a task of their own.
  await new Promise((resolve) => setTimeout(resolve, 0));
}

dropOne();
dropCache();
await collect();
const before = Deno.memoryUsage().rss;
for (let i = 0; i < 200; i++) {
  dropOne();
  dropCache();
  if (i % 10 === 0) await collect();
}
await collect();
console.log((Deno.memoryUsage().rss - before) / BYTES);
