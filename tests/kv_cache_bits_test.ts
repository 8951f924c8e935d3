/**
 * True bits per value of the growing cache on dumps of real models, every byte of packed blocks counted: scales, bases and
 * headers too. On every backend.
 */
import { assertEquals, assertLessOrEqual } from "@std/assert";
import type { Device } from "../src/device/mod.ts";
import { KvCache, type KvCacheCodec } from "../src/kv/mod.ts";
import { withWholePool } from "../src/kv/pool_bytes.ts";
import { ReferenceCache, splitTokens, type Token } from "./kv_cache_reference.ts";
import { appendAll, fixed, optionsOf, packkv, testOnDevices } from "./kv_cache_support.ts";
import { type Dump, dumpsAtHand } from "./kv_oracle.ts";

const CODEC: KvCacheCodec = { keys: packkv(0.1), values: packkv(0.2) };
const BLOCK = 64;
/** Of a block, in tile.h: scale and zero point of 64 tokens, of keys and of values, and the largest scale; padded. */
const PARAMS_BYTES = 2 * 64 * (2 + 2) + 16;
/** Of a head's record. */
const HEADER_BYTES = 16;

/** A layer of a dump. */
interface Layer {
  readonly name: string;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly tokens: readonly Token[];
}

/** Bits per value of a layer: of both parts together, and of each with half of what they share. */
interface LayerBits {
  readonly both: number;
  readonly keys: number;
  readonly values: number;
}

/** What the tiny model's layers took on 2026-11-25. */
const MEASURED: Readonly<Record<string, LayerBits>> = {
  "layers.0": { both: 3.759, keys: 4.182, values: 3.336 },
  "layers.2": { both: 3.346, keys: 3.355, values: 3.336 },
};

testOnDevices(
  "a real model's blocks take no more bits per value than they did, everything counted",
  (device) => {
    const layers = layersOf(dumpsAtHand().get("tiny")!);
    assertEquals(layers.map(({ name }) => name), Object.keys(MEASURED));
    for (const layer of layers) {
      const bits = measure(device, layer);
      for (const [part, most] of Object.entries(MEASURED[layer.name]!)) {
        assertLessOrEqual(bits[part as keyof LayerBits], 1.01 * most, `${part} of ${layer.name}`);
      }
    }
  },
);

// It does not ship: see kv_oracle.ts.
const small = dumpsAtHand().get("small");
if (small !== undefined) {
  testOnDevices("keys and values of the small model take at most 3.3 bits each", (device) => {
    const bits = layersOf(small).map((layer) => measure(device, layer));
    for (const part of ["keys", "values"] as const) {
      const mean = bits.reduce((sum, each) => sum + each[part], 0) / bits.length;
      assertLessOrEqual(mean, 3.3, `${part}, mean over the layers`);
    }
  });
}

/** Fills caches with a layer and counts what the cache says, which must be what the layout says. */
function measure(device: Device, layer: Layer): LayerBits {
  const { kvHeads, headDim } = layer;
  const both = packedBlock(device, layer, CODEC);
  // Beside a part of one bit, whose bytes are known: a bit for a value.
  const plain = kvHeads * headDim * BLOCK / 8;
  const shared = PARAMS_BYTES + kvHeads * HEADER_BYTES;
  const keys = packedBlock(device, layer, { ...CODEC, values: fixed(1) }) - plain - shared / 2;
  const values = packedBlock(device, layer, { ...CODEC, keys: fixed(1) }) - plain - shared / 2;
  assertEquals(keys + values, both);
  const bits = (bytes: number) => 8 * bytes / (kvHeads * headDim * BLOCK);
  return { both: bits(both) / 2, keys: bits(keys), values: bits(values) };
}

/** Bytes of a packed block of a layer, the mean over its blocks. */
function packedBlock(device: Device, layer: Layer, codec: KvCacheCodec): number {
  const { kvHeads, headDim, tokens } = layer;
  const options = optionsOf({
    queryHeads: kvHeads,
    kvHeads,
    headDim,
    tokens: tokens.length,
    stepTokens: tokens.length,
    sequences: 1,
    codec,
  });
  using cache = KvCache.create(device, withWholePool(device, options));
  const model = new ReferenceCache(cache.config);
  const [sequence, expected] = [cache.add(), model.add()];
  appendAll(cache, [{ sequence, tokens: [tokens] }]);
  model.append(expected, [tokens]);
  cache.check();
  const { packedTokens, packedBytes } = cache.statistics();
  const { residual, sinks } = cache.config;
  const blocks = Math.floor((tokens.length - sinks - residual) / BLOCK);
  assertEquals(packedTokens, blocks * BLOCK);
  assertEquals(packedBytes, model.count([expected]).packedBytes, layer.name);
  return packedBytes / blocks;
}

function layersOf(dump: Dump): Layer[] {
  const names = [...dump.keys()].filter((name) => name.endsWith(".key"))
    .map((name) => name.slice(0, -".key".length));
  return names.toSorted().map((name) => {
    const part = (part: string) => {
      const { shape: [kvHeads, tokens, headDim], data } = dump.get(`${name}.${part}`)!;
      const bits = new Uint16Array(data.buffer);
      const rows = new Uint16Array(bits.length);
      for (let head = 0; head < kvHeads; head++) {
        for (let token = 0; token < tokens; token++) {
          const row = bits.subarray((head * tokens + token) * headDim).subarray(0, headDim);
          rows.set(row, (token * kvHeads + head) * headDim);
        }
      }
      return rows;
    };
    const [kvHeads, , headDim] = dump.get(`${name}.key`)!.shape;
    const layout = { dtype: "f16", kvHeads, headDim } as const;
    const tokens = splitTokens(layout, { keys: part("key"), values: part("value") });
    return { name, kvHeads, headDim, tokens };
  });
}
