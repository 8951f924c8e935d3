/**
 * Appending to the growing cache: whatever steps tokens come in, alone or beside other sequences, each layer's records and
 * newest tokens are the same to the bit, and the CPU's. On every backend.
 */
import { assertEquals } from "@std/assert";
import { Device } from "../src/device/mod.ts";
import { KvCache, type KvCacheCodec, type KvCacheOptions, type KvSequence } from "../src/kv/mod.ts";
import { withWholePool } from "../src/kv/pool_bytes.ts";
import { backends } from "./backends.ts";
import {
  appendAll,
  bothParts,
  fixed,
  kivi,
  optionsOf,
  packkv,
  raw16,
  tokensOf,
} from "./kv_cache_support.ts";
import { type DataKind, randomOf } from "./kv_cases.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

const BLOCK = 64;
/** Of every case: one that steps leave out at times, and one that is in all of them. */
const SEQUENCES = 2;
const TOKENS = 450;

const KINDS: readonly DataKind[] = ["gaussian", "outlier channels"];

/** Layers of every case. */
const CODECS: readonly KvCacheCodec[] = [
  { keys: packkv(0.1), values: packkv(0.2) },
  bothParts(fixed(3)),
  bothParts(raw16),
  bothParts(kivi(2)),
  { keys: raw16, values: packkv(1 / 254) },
];

/** Shapes with as many kv heads as a cluster of thread blocks has, fewer, and more; short and long residuals. */
const SHAPES = [
  { kvHeads: 8, headDim: 64, dtype: "bf16", residual: 64 },
  { kvHeads: 1, headDim: 256, dtype: "f16", residual: 8, sinks: 3 },
  { kvHeads: 2, headDim: 128, dtype: "bf16", residual: 9 },
  { kvHeads: 3, headDim: 96, dtype: "f16", residual: 100, sinks: 70 },
  { kvHeads: 5, headDim: 64, dtype: "bf16", residual: 8, sinks: 0 },
  { kvHeads: 9, headDim: 64, dtype: "f16", residual: 12, sinks: 1 },
] as const satisfies readonly Partial<KvCacheOptions>[];

for (const backend of backends()) {
  for (const [i, shape] of SHAPES.entries()) {
    const { kvHeads, headDim, residual } = shape;
    const name = `${kvHeads} kv heads of ${headDim} channels, residual ${residual}`;
    Deno.test(`kv append: ${backend}: ${name}: steps of any size leave the same bits`, async () => {
      const seed = 1 + i;
      using folder = new TemporaryFolder();
      using device = Device.open({ backend });
      const options = optionsOf({
        ...shape,
        layers: CODECS.length,
        queryHeads: kvHeads,
        codec: CODECS,
        sequences: SEQUENCES,
        tokens: TOKENS,
        stepTokens: SEQUENCES * TOKENS,
      });
      const lengths = [TOKENS, TOKENS - BLOCK / 2];
      const random = randomOf(seed);
      using first = KvCache.create(device, withWholePool(device, options));
      const tokens = lengths.map((length) =>
        tokensOf(first.config, { kind: KINDS[i % KINDS.length]!, random }, length)
      );
      const atOnce = await saved(first, folder, (sequences) => {
        appendAll(first, sequences.map((sequence, i) => ({ sequence, tokens: tokens[i]! })));
      });
      using second = KvCache.create(device, withWholePool(device, options));
      const inSteps = await saved(second, folder, (sequences) => {
        const held = lengths.map(() => 0);
        while (held.some((count, i) => count < lengths[i]!)) {
          const parts = sequences.flatMap((sequence, i) => {
            const count = Math.min(stepOf(random), lengths[i]! - held[i]!);
            if (count === 0 || (i === 0 && random() < 0.3)) return [];
            const part = tokens[i]!.map((layer) => layer.slice(held[i]!, held[i]! + count));
            held[i]! += count;
            return [{ sequence, tokens: part }];
          });
          if (parts.length > 0) appendAll(second, parts);
        }
      });
      assertEquals(inSteps, atOnce, `seed ${seed}`);
      if (backend === "cpu") return;
      using cpu = Device.open({ backend: "cpu" });
      using third = KvCache.create(cpu, withWholePool(cpu, options));
      const onCpu = await saved(third, folder, (sequences) => {
        appendAll(third, sequences.map((sequence, i) => ({ sequence, tokens: tokens[i]! })));
      });
      assertEquals(onCpu, atOnce, `the CPU's, seed ${seed}`);
    });
  }
}

/** Tokens of a step: often one, at times a few, more than a block, or several blocks. */
function stepOf(random: () => number): number {
  const most = [1, 1, 8, BLOCK, 4 * BLOCK][Math.floor(5 * random())]!;
  return 1 + Math.floor(most * random());
}

/** What the files of a cache's new sequences say, once `fill` has filled them: digests, to be compared quickly. */
async function saved(
  cache: KvCache,
  folder: TemporaryFolder,
  fill: (sequences: readonly KvSequence[]) => void,
): Promise<string[]> {
  const sequences = Array.from({ length: SEQUENCES }, () => cache.add());
  fill(sequences);
  cache.check();
  const digests: string[] = [];
  for (const sequence of sequences) {
    const path = folder.file(`${crypto.randomUUID()}.phkv`);
    await cache.save(sequence, path);
    const digest = await crypto.subtle.digest("SHA-256", await Deno.readFile(path));
    digests.push(new Uint8Array(digest).toHex());
  }
  return digests;
}
