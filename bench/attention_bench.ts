/**
 * Decode attention over a packed {@linkcode KvCache} of 8,192 tokens on the CPU, through the public API:
 * `deno task bench`. What it is compared with, the same over plain 32-bit and 16-bit floats in the same threads, is
 * native code of the bench's own, which takes turns with it: bench/native/attention_cpu.cpp. Its table is printed at the
 * end.
 *
 * @module
 */
import { Device } from "../src/device/mod.ts";
import { KvCache } from "../src/kv/mod.ts";
import { createNormals, HEAD_DIM, HEADS } from "./kv_workload.ts";

const TOKENS = 8_192;
// Enough that a layer's records have left the caches of the cores when its turn comes again.
const LAYERS = 8;

const device = Device.open({ backend: "cpu" });
const keys = createNormals(device, TOKENS, 1);
const values = createNormals(device, TOKENS, 2);

for (const group of [1, 4, 8]) {
  const cache = KvCache.create(device, {
    layers: LAYERS,
    queryHeads: HEADS * group,
    kvHeads: HEADS,
    headDim: HEAD_DIM,
    dtype: "f16",
    sequences: 1,
    tokens: TOKENS,
    stepTokens: TOKENS - 1,
    poolBytes: LAYERS * TOKENS * HEADS * HEAD_DIM * 2,
    codec: { keys: { quantizer: "packkv", rel: 0.1 }, values: { quantizer: "packkv", rel: 0.2 } },
  });
  const sequence = cache.add();
  const token = HEADS * HEAD_DIM;
  const append = (first: number, count: number) => {
    const step = cache.begin([{ sequence, tokens: count }]);
    for (let layer = 0; layer < LAYERS; layer++) {
      const view = (buffer: typeof keys) => buffer.view(first * token, count * token);
      step.append(layer, view(keys), view(values));
    }
    return step;
  };
  append(0, TOKENS - 1);
  const step = append(TOKENS - 1, 1);
  const queries = createNormals(device, group, 3);
  const out = device.createBuffer("f16", queries.length);
  let layer = 0;
  Deno.bench(`attend: 8,192 packed tokens, groups of ${group}`, { group: "attend" }, () => {
    step.attend(layer, queries, out);
    layer = (layer + 1) % LAYERS;
  });
}

addEventListener("unload", () => {
  const executable = new URL("../build/bench/attention_cpu", import.meta.url).pathname;
  const dump = new URL("../tests/fixtures/tiny/kv.safetensors", import.meta.url).pathname;
  console.error();
  try {
    new Deno.Command(executable, { args: [dump], stdout: "null", stderr: "inherit" }).outputSync();
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
    console.error(`No comparison with plain floats: ${executable} is only built for x86-64`);
  }
});
