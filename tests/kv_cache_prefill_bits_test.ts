/**
 * Steps of more blocks than a GPU packs at a time, and of more kv heads than a cluster has thread blocks: they leave the
 * bits that small steps leave, and the CPU's. On every backend.
 */
import { assertEquals } from "@std/assert";
import { Device } from "../src/device/mod.ts";
import { KvCache, type KvCacheCodec } from "../src/kv/mod.ts";
import { withWholePool } from "../src/kv/pool_bytes.ts";
import { backends } from "./backends.ts";
import { bothParts, fixed, kivi, optionsOf, packkv, raw16 } from "./kv_cache_support.ts";
import { randomOf } from "./kv_cases.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

/** Layers of every case. */
const CODECS: readonly KvCacheCodec[] = [
  { keys: packkv(0.1), values: packkv(0.2) },
  { keys: packkv(1 / 254), values: kivi(2) },
  bothParts(fixed(3)),
  bothParts(raw16),
];

/**
 * An H100 or H200 packs 66 blocks of 8 heads at a time, 264 of 2, 16 of 9 to 32 with up to 128 channels and 8 of 9 to 16 with
 * more. With 33 heads it takes several launches.
 */
const CASES = [
  { kvHeads: 8, headDim: 64, tokens: 9_000 },
  { kvHeads: 9, headDim: 128, tokens: 2_400 },
  { kvHeads: 10, headDim: 256, tokens: 1_100 },
  { kvHeads: 20, headDim: 64, tokens: 2_300 },
  { kvHeads: 32, headDim: 96, tokens: 1_200 },
  { kvHeads: 33, headDim: 64, tokens: 700 },
];

for (const backend of backends()) {
  for (const { kvHeads, headDim, tokens } of CASES) {
    const name = `${tokens} tokens, ${kvHeads} kv heads of ${headDim} channels`;
    Deno.test(`kv prefill: ${backend}: ${name}: one step leaves the bits of small ones`, async () => {
      const seed = tokens + kvHeads;
      const data = valuesOf({ kvHeads, headDim, tokens }, randomOf(seed));
      using device = Device.open({ backend });
      const digest = (on: Device, stepTokens: number) =>
        digestOf(on, { kvHeads, headDim, data, stepTokens });
      const atOnce = await digest(device, tokens);
      assertEquals(await digest(device, 63), atOnce, `seed ${seed}`);
      if (backend === "cpu") return;
      using cpu = Device.open({ backend: "cpu" });
      assertEquals(await digest(cpu, tokens), atOnce, `the CPU's, seed ${seed}`);
    });
  }
}

/** bf16 `[tokens, kvHeads, headDim]` from 2^-9 to 2, the largest of a group of 32 channels from 2^-5 on. */
function valuesOf(
  { kvHeads, headDim, tokens }: { kvHeads: number; headDim: number; tokens: number },
  random: () => number,
): Uint16Array<ArrayBuffer> {
  const row = kvHeads * headDim;
  const bits = new Uint16Array(tokens * row);
  for (let i = 0; i < bits.length; i++) {
    const exponent = 0x3f80 - (0x80 * (1 + (i % row >> 5) % 5));
    const word = Math.floor(2 ** 16 * random());
    bits[i] = (word & 0x8000) | (exponent - 0x80 * (word >> 7 & 3)) | (word & 0x7f);
  }
  return bits;
}

/** What the file of a sequence says that was filled in steps of so many tokens. */
async function digestOf(device: Device, { kvHeads, headDim, data, stepTokens }: {
  kvHeads: number;
  headDim: number;
  data: Uint16Array<ArrayBuffer>;
  stepTokens: number;
}): Promise<string> {
  const row = kvHeads * headDim;
  const tokens = data.length / row;
  const options = optionsOf({
    ...{ kvHeads, headDim, queryHeads: kvHeads, dtype: "bf16", tokens, stepTokens },
    ...{ layers: CODECS.length, codec: CODECS, sequences: 1, residual: 8, sinks: 3 },
  });
  using cache = KvCache.create(device, withWholePool(device, options));
  using keys = device.createBuffer("bf16", data.length);
  using values = device.createBuffer("bf16", data.length);
  keys.upload(data);
  values.upload(data.toReversed());
  const sequence = cache.add();
  for (let first = 0; first < tokens; first += stepTokens) {
    const count = Math.min(stepTokens, tokens - first);
    const step = cache.begin([{ sequence, tokens: count }]);
    for (let layer = 0; layer < CODECS.length; layer++) {
      const part = [first * row, count * row] as const;
      step.append(layer, keys.view(...part), values.view(...part));
    }
  }
  cache.check();
  using folder = new TemporaryFolder();
  const path = folder.file("sequence.phkv");
  await cache.save(sequence, path);
  const digest = await crypto.subtle.digest("SHA-256", await Deno.readFile(path));
  return new Uint8Array(digest).toHex();
}
