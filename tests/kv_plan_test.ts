/**
 * Plans of caches against the caches themselves, on every backend that opens here (PACKHORSE_BACKEND names one); codecs
 * and models as text; and the benchmark of caches.
 */
import {
  assert,
  assertAlmostEquals,
  assertEquals,
  assertLess,
  assertLessOrEqual,
  assertThrows,
} from "@std/assert";
import { Device, type DeviceBuffer } from "../src/device/mod.ts";
import { type ErrorCode, PackhorseError } from "../src/error.ts";
import { SafetensorsReader } from "../src/io/mod.ts";
import {
  benchKvCache,
  KvCache,
  type KvCacheCodec,
  type KvCacheDType,
  type KvCachePlan,
  type KvCachePlanOptions,
  measureKvCacheWidths,
  parseCacheCodec,
  planKvCache,
  readModelConfig,
} from "../src/kv/mod.ts";
import { parseModelConfig } from "../src/kv/model_config.ts";
import { KvSampler } from "../src/kv/sample.ts";
import { backends } from "./backends.ts";
import { roundToNearest } from "./float16.ts";
import { decodeBits, ReferenceCache, splitTokens } from "./kv_cache_reference.ts";
import { randomOf } from "./kv_cases.ts";
import { rejectsWith } from "./rejects_with.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

const TINY = new URL("fixtures/tiny/kv.safetensors", import.meta.url).pathname;
const LLAMA = new URL("fixtures/configs/llama-3.1-8b.json", import.meta.url).pathname;
const PACKKV = parseCacheCodec("packkv:k=0.1,v=0.2");
const FIXED = parseCacheCodec("fixed:k=3,v=2");

/** Asserts that `work` throws a PackhorseError of this code whose message contains each fragment. */
function throwsWith(work: () => unknown, code: ErrorCode, ...fragments: string[]): void {
  const error = assertThrows(work, PackhorseError);
  assertEquals(error.code, code, error.message);
  for (const fragment of fragments) assert(error.message.includes(fragment), error.message);
}

// ---- codecs as text --------------------------------------------------------------------------------

Deno.test("kv plan: codecs are read in every form", () => {
  const pair = (quantizer: string, keys: object, values: object) => ({
    keys: { quantizer, ...keys },
    values: { quantizer, ...values },
  });
  const forms: [string, unknown][] = [
    ["raw16", pair("raw16", {}, {})],
    ["packkv", pair("packkv", { rel: 0.1 }, { rel: 0.2 })],
    ["packkv:k=0.05,v=.4", pair("packkv", { rel: 0.05 }, { rel: 0.4 })],
    ["packkv:v=1", pair("packkv", { rel: 0.1 }, { rel: 1 })],
    ["packkv:0.3", pair("packkv", { rel: 0.3 }, { rel: 0.3 })],
    ["fixed", pair("fixed", { bits: 4 }, { bits: 4 })],
    ["fixed:3", pair("fixed", { bits: 3 }, { bits: 3 })],
    ["fixed:v=2,k=8", pair("fixed", { bits: 8 }, { bits: 2 })],
    ["kivi:4", pair("kivi", { bits: 4 }, { bits: 4 })],
    ["kivi:k=2,v=4", pair("kivi", { bits: 2 }, { bits: 4 })],
  ];
  for (const [text, codec] of forms) assertEquals(parseCacheCodec(text) as unknown, codec, text);
});

Deno.test("kv plan: a bad codec is refused by its bad part, with the forms", () => {
  const bad: [string, string][] = [
    ["", '"" is no quantizer'],
    ["zip", '"zip" is no quantizer'],
    ["toString", "is no quantizer"],
    ["raw16:4", "raw16 takes no numbers"],
    ["packkv:", '"" is neither'],
    ["packkv:k=0.1,", '"" is neither'],
    ["packkv:k=0.003", '"k=0.003" is not from 1/254 to 1'],
    ["packkv:1.5", '"1.5" is not from 1/254 to 1'],
    ["packkv:k=1e-1", '"k=1e-1" is neither'],
    ["packkv:q=0.1", '"q=0.1" is neither'],
    ["packkv:k=0.1,k=0.2", "sets k twice"],
    ["packkv:0.1,v=0.2", "sets v twice"],
    ["fixed:0", '"0" is not a whole number of bits from 1 to 8'],
    ["fixed:k=9", '"k=9" is not'],
    ["kivi:2.5", '"2.5" is not'],
    ["kivi: 2", '" 2" is neither'],
  ];
  for (const [text, reason] of bad) {
    throwsWith(
      () => parseCacheCodec(text),
      "invalid-argument",
      reason,
      "raw16, packkv:k=0.1,v=0.2",
    );
  }
});

// ---- models ----------------------------------------------------------------------------------------

type Fields = Record<string, unknown>;

const SMALL: Fields = {
  model_type: "llama",
  num_hidden_layers: 2,
  num_attention_heads: 4,
  hidden_size: 256,
  intermediate_size: 512,
  vocab_size: 1000,
  torch_dtype: "float16",
};

function parse(fields: unknown) {
  return parseModelConfig(new TextEncoder().encode(JSON.stringify(fields)), "config.json");
}

Deno.test("kv plan: weights are counted as published for real models", () => {
  const large = {
    hidden_size: 4096,
    num_hidden_layers: 32,
    num_attention_heads: 32,
    num_key_value_heads: 8,
    torch_dtype: "bfloat16",
  };
  // Parameters as on the models' pages.
  const models: [Fields, number][] = [
    [
      { ...large, model_type: "llama", intermediate_size: 14_336, vocab_size: 128_256 },
      8_030_261_248,
    ],
    [
      { ...large, model_type: "mistral", intermediate_size: 14_336, vocab_size: 32_000 },
      7_241_732_096,
    ],
    [{
      ...large,
      model_type: "qwen3",
      num_hidden_layers: 36,
      intermediate_size: 12_288,
      vocab_size: 151_936,
      head_dim: 128,
    }, 8_190_735_360],
    [{
      ...large,
      model_type: "qwen2",
      hidden_size: 896,
      num_hidden_layers: 24,
      num_attention_heads: 14,
      num_key_value_heads: 2,
      intermediate_size: 4864,
      vocab_size: 151_936,
      tie_word_embeddings: true,
    }, 494_032_768],
    [{
      ...large,
      model_type: "phi3",
      hidden_size: 3072,
      num_key_value_heads: undefined,
      intermediate_size: 8192,
      vocab_size: 32_064,
    }, 3_821_079_552],
    [{
      ...large,
      model_type: "gemma2",
      hidden_size: 2304,
      num_hidden_layers: 26,
      num_attention_heads: 8,
      num_key_value_heads: 4,
      head_dim: 256,
      intermediate_size: 9216,
      vocab_size: 256_000,
    }, 2_614_341_888],
  ];
  for (const [fields, parameters] of models) {
    assertEquals(parse(fields).weights, {
      parameters,
      bytesPerParameter: 2,
      bytes: 2 * parameters,
    });
  }
});

Deno.test("kv plan: a configuration's defaults, nesting and limits", () => {
  const model = parse(SMALL);
  assertEquals(
    [model.layers, model.queryHeads, model.kvHeads, model.headDim, model.dtype],
    [2, 4, 4, 64, "f16"],
  );
  assertEquals([model.contextLimit, model.slidingWindow], [undefined, undefined]);

  const { torch_dtype: _, ...text } = SMALL;
  const nested = parse({
    dtype: "float32",
    model_type: "some_vision_model",
    text_config: {
      ...text,
      num_key_value_heads: 2,
      head_dim: 128,
      max_position_embeddings: 4096,
      sliding_window: 1024,
    },
  });
  assertEquals([nested.type, nested.kvHeads, nested.headDim, nested.dtype], [
    "llama",
    2,
    128,
    "bf16",
  ]);
  assertEquals([nested.contextLimit, nested.slidingWindow], [4096, 1024]);
  assert("bytesPerParameter" in nested.weights && nested.weights.bytesPerParameter === 4);
  const unused = { ...SMALL, sliding_window: 1024, use_sliding_window: false };
  assertEquals(parse(unused).slidingWindow, undefined);
  assertEquals(parse({ ...SMALL, sliding_window: null }).slidingWindow, undefined);
});

Deno.test("kv plan: weights that the configuration does not tell are not guessed", () => {
  const unknown: [Fields, string][] = [
    [{ model_type: "mixtral" }, "model_type is mixtral"],
    [{ model_type: undefined }, "model_type is missing"],
    [{ model_type: "constructor" }, "model_type is constructor"],
    [{ vocab_size: undefined }, "no vocab_size"],
    [{ torch_dtype: "float8_e4m3fn" }, "dtype is float8_e4m3fn"],
    [{ torch_dtype: undefined }, "dtype is missing"],
    [{ quantization_config: { bits: 4 } }, "quantised"],
  ];
  for (const [fields, reason] of unknown) {
    const { weights } = parse({ ...SMALL, ...fields });
    assert("unknown" in weights && weights.unknown.includes(reason), JSON.stringify(weights));
  }
});

Deno.test("kv plan: a configuration that is none is refused by its field", async () => {
  const bad: [Fields, string][] = [
    [{ num_hidden_layers: undefined }, "it has no num_hidden_layers"],
    [{ num_hidden_layers: null }, "it has no num_hidden_layers"],
    [{ num_hidden_layers: 0 }, "num_hidden_layers must be an integer from 1 to 4096, got 0"],
    [{ num_hidden_layers: 1e9 }, "got 1000000000"],
    [{ num_hidden_layers: "32" }, 'got "32"'],
    [{ num_attention_heads: 4.5 }, "num_attention_heads must be an integer"],
    [{ num_key_value_heads: 3 }, "num_attention_heads 4 is no multiple of num_key_value_heads 3"],
    [{ num_key_value_heads: -1 }, "got -1"],
    [{ hidden_size: undefined }, "it has no hidden_size"],
    [{ hidden_size: 250 }, "hidden_size 250 is no multiple of the 4 heads"],
    [{ head_dim: {} }, "head_dim must be an integer"],
    [{ vocab_size: 1e12 }, "vocab_size must be"],
    [{ torch_dtype: 16 }, "torch_dtype must be a word, got 16"],
    [{ sliding_window: -5 }, "sliding_window must be"],
    [{ max_position_embeddings: "many" }, "max_position_embeddings must be"],
  ];
  for (const [fields, reason] of bad) {
    throwsWith(() => parse({ ...SMALL, ...fields }), "corrupt", "config.json", reason);
  }
  throwsWith(() => parse([]), "corrupt", "config.json", "not a JSON object");
  throwsWith(
    () => parse({ ...SMALL, kv_lora_rank: 512 }),
    "unsupported",
    "latents (kv_lora_rank)",
  );
  throwsWith(
    () => parse({ ...SMALL, layer_types: ["full_attention", "linear_attention"] }),
    "unsupported",
    '"linear_attention"',
  );
  throwsWith(() => parse({ ...SMALL, num_kv_shared_layers: 2 }), "unsupported", "share keys");
  await rejectsWith(() => readModelConfig("/missing"), "not-found", "/missing");
  using folder = new TemporaryFolder();
  const large = await folder.write("config.json", new Uint8Array(2 ** 24 + 1));
  await rejectsWith(() => readModelConfig(large), "corrupt", "too many");
});

// ---- plans -----------------------------------------------------------------------------------------

/** A plan's bytes of the cache in the words of its statistics. */
function plannedStatistics({ bytes }: KvCachePlan) {
  return {
    poolBytes: bytes.packedKeys + bytes.packedValues + bytes.reserve,
    recentBytes: bytes.recent,
    indexBytes: bytes.index,
    pageTableBytes: bytes.pageTables,
    stepBytes: bytes.step,
    workspaceBytes: bytes.workspace,
  };
}

function allocated(cache: KvCache) {
  const { poolBytes, recentBytes, indexBytes, pageTableBytes, stepBytes, workspaceBytes } = cache
    .statistics();
  return { poolBytes, recentBytes, indexBytes, pageTableBytes, stepBytes, workspaceBytes };
}

function total(bytes: object): number {
  return Object.values(bytes).reduce((sum, each) => sum + each, 0);
}

/** A small plan whatever the seed. */
function randomPlan(random: () => number): KvCachePlanOptions {
  const below = (end: number) => Math.floor(random() * end);
  const pick = <T>(...choices: T[]) => choices[below(choices.length)]!;
  const kvHeads = 1 + below(3);
  const batch = 1 + below(4);
  return {
    model: {
      layers: 1 + below(3),
      queryHeads: kvHeads * (1 + below(4)),
      kvHeads,
      headDim: pick(64, 96, 128, 256),
      dtype: pick("f16", "bf16"),
    },
    memoryBytes: 32_000_000 + below(32_000_000),
    weightBytes: below(1_000_000),
    batch,
    residual: pick(undefined, 8, 100),
    sinks: pick(undefined, 0, 7),
    stepTokens: pick(undefined, batch, 300),
    codec: pick(
      undefined,
      PACKKV,
      FIXED,
      parseCacheCodec("packkv:0.01"),
      parseCacheCodec("fixed:8"),
    ),
    widths: { keys: 2.5, values: 1.25 },
  };
}

for (const backend of backends()) {
  const test = (name: string, work: (device: Device) => void | Promise<void>) =>
    Deno.test(`kv plan: ${backend}: ${name}`, async () => {
      using device = Device.open({ backend });
      await work(device);
    });

  test("sizes are those that creating the cache allocates, and the longest context is that", (device) => {
    for (let seed = 1; seed <= 40; seed++) {
      const options = { ...randomPlan(randomOf(seed)), backend };
      const plan = planKvCache(options);
      const what = `seed ${seed}: ${JSON.stringify(options)}`;
      assertEquals(plan.context, plan.maxContext, what);
      assert(plan.fits && plan.bytes.free >= 0, what);
      assertEquals(total(plan.bytes), options.memoryBytes, what);
      assert(plan.bytes.reserve >= 0, what);
      using cache = KvCache.create(device, plan.options);
      assertEquals(plannedStatistics(plan), allocated(cache), what);

      const longer = planKvCache({ ...options, context: plan.maxContext + 1 });
      assert(!longer.fits && longer.bytes.free < 0, what);
      assertEquals(total(longer.bytes), options.memoryBytes, what);
      const shorter = planKvCache({ ...options, context: Math.ceil(plan.maxContext / 3) });
      assert(shorter.fits && shorter.maxContext === plan.maxContext, what);
      using small = KvCache.create(device, shorter.options);
      assertEquals(plannedStatistics(shorter), allocated(small), what);
    }
  });

  test("a planned cache holds what was planned, however the steps are cut", async (device) => {
    for (const [codec, batch] of [[PACKKV, 2], [PACKKV, 1], [FIXED, 3]] as const) {
      // With the bits that these very tokens take.
      const { model, layers } = await tinyCache();
      const roomy = { model, memoryBytes: 2 ** 26, weightBytes: 0, batch, codec, backend };
      const context = 900;
      const widths = { keys: 4, values: 4 };
      const measured = fill(device, planKvCache({ ...roomy, context, widths }), layers, 64);
      const values = 2 * model.layers * measured.packedTokens * model.kvHeads * model.headDim;
      const bitsPerValue = 8 * measured.packedBytes / values;
      for (const stepTokens of [32, 512]) {
        const plan = planKvCache({ ...roomy, context, stepTokens, bitsPerValue });
        assertAlmostEquals(
          plan.bytes.packedKeys + plan.bytes.packedValues,
          measured.packedBytes,
          2,
        );
        const found = fill(device, plan, layers, stepTokens);
        assertEquals(found.packedBytes, measured.packedBytes);
        assertEquals(found.tokens, batch * context);
        // Little is wasted: pages that streams end in, and what a step needs until its sizes are known.
        assertLessOrEqual(found.freeBytes, plan.bytes.reserve);
      }
    }
  });

  test("a pool is as small as it can be for records of constant size", async (device) => {
    const { model, layers } = await tinyCache();
    const plan = planKvCache({
      model,
      memoryBytes: 2 ** 26,
      weightBytes: 0,
      context: 1000,
      codec: FIXED,
      backend,
    });
    assertEquals(fill(device, plan, layers, 128).freeBytes, 0);
    const less = { ...plan.options, poolBytes: plan.options.poolBytes - 1 };
    const cut = { ...plan, options: less };
    throwsWith(() => fill(device, cut, layers, 128), "out-of-memory");
  });

  test("measured widths are those of the reference, part by part", async (device) => {
    const { model, layers, tokens } = await tinyCache();
    const found = await measureKvCacheWidths(device, { input: TINY, codec: PACKKV });
    const packed = Math.floor((tokens - 12) / 64) * 64;
    assertEquals([found.layers, found.tokens], [2, 2 * packed]);
    const plain = { quantizer: "fixed", bits: 1 } as const;
    for (const part of ["keys", "values"] as const) {
      const codec = { keys: plain, values: plain, [part]: PACKKV[part] };
      const reference = new ReferenceCache({
        ...model,
        queryDType: model.dtype,
        sequences: 1,
        tokens,
        stepTokens: tokens,
        poolBytes: 2 ** 20,
        splits: 1,
        residual: 8,
        sinks: 4,
        codecs: [codec, codec],
        windows: [0],
      });
      const sequence = reference.add();
      reference.append(sequence, layers.map((layer) => splitTokens(model, layer)));
      const { packedBytes } = reference.count([sequence]);
      // Parameters, then per head a header, bases of 4 bits, and the plain part of 1 bit, without any.
      const least = 528 + 2 * (16 + 64 / 2 + 64 * 64 / 8);
      const payload = 8 * (packedBytes - found.tokens / 64 * least);
      assertAlmostEquals(found[part], payload / (found.tokens * 2 * 64), 1e-12);
    }
    const constant = await measureKvCacheWidths(device, { input: TINY, codec: FIXED });
    assertEquals([constant.keys, constant.values], [0, 0]);
  });

  test("the benchmark's tokens take the bits of those that they are drawn from", async (device) => {
    const widths = await measureKvCacheWidths(device, { input: TINY, codec: PACKKV });
    const { model } = await tinyCache();
    const memory = { memoryBytes: 2 ** 30, weightBytes: 0 };
    const { packedBitsPerValue: { keys, values } } = planKvCache({
      model,
      ...memory,
      codec: PACKKV,
      widths,
      backend,
    });
    let done = 0;
    const bench = await benchKvCache(device, {
      input: TINY,
      codec: PACKKV,
      tokens: 1500,
      batch: 2,
      kvHeads: 2,
      group: 2,
      headDim: 64,
      layers: 2,
      repeat: 3,
      onProgress: (units, all) => done = units / all,
    });
    assertEquals(done, 1);
    assertAlmostEquals(bench.bitsPerValue, (keys + values) / 2, 0.03 * keys);
    assertEquals([bench.layers, bench.tokens], [2, 1628]);
    assert(bench.attendSeconds > 0 && bench.appendSeconds > 0 && bench.prefillBytesPerSecond > 0);
    const packedTokens = Math.floor((1628 - 132) / 64) * 64;
    const packed = packedTokens * 2 * 2 * 64 * bench.bitsPerValue / 8;
    const recent = (1628 - packedTokens) * 2 * 2 * 64 * 2;
    assertAlmostEquals(bench.attendBytes, 2 * (packed + recent), 1e-6);
    const small = {
      input: TINY,
      kvHeads: 1,
      headDim: 96,
      tokens: 100,
      layers: 1,
      dtype: "bf16",
    } as const;
    assertEquals((await benchKvCache(device, small)).layers, 1);
    await rejectsWith(
      () => benchKvCache(device, { ...small, repeat: 0 }),
      "invalid-argument",
      "repeat must be an integer of 1 or more, got 0",
    );
    await rejectsWith(() => benchKvCache(device, { ...small, input: "/missing" }), "not-found");
    const signal = AbortSignal.abort(new PackhorseError("internal", "stopped"));
    await rejectsWith(() => benchKvCache(device, { ...small, signal }), "internal", "stopped");
  });
}

Deno.test("kv plan: samples go through the file's tokens, rounded to their type", async () => {
  const { layers, model, tokens: all } = await tinyCache();
  const size = { tokens: all + 130, heads: 3, headDim: 96 };
  const [half, brain] = await Promise.all((["f16", "bf16"] as const).map(async (dtype) => {
    const sampler = await KvSampler.open({ input: TINY }, { dtype, seed: 5 });
    assertEquals(sampler.layers, 2);
    return sampler.sample(1, size);
  }));
  const [rounded, exact] = [decodeBits("bf16", brain!.values), decodeBits("f16", half!.values)];
  assertEquals(rounded, exact.map((value) => roundToNearest("bf16", value)));

  // Each 64 channels, or what is left of them, are those of a head, from some token on.
  const starts = new Set<number>();
  for (const part of ["keys", "values"] as const) {
    const rowOf = (token: number, head: number) =>
      layers[1]![part].subarray((token % all * model.kvHeads + head) * model.headDim);
    for (let slice = 0; slice < 2 * size.heads; slice++) {
      const channels = slice % 2 === 0 ? 64 : 32;
      const sampled = (token: number) => {
        const first = (token * size.heads + Math.floor(slice / 2)) * size.headDim + slice % 2 * 64;
        return half![part].subarray(first, first + channels);
      };
      const isAt = (token: number, at: number) =>
        sampled(token).every((bits, i) => bits === rowOf(at, slice % model.kvHeads)[i]);
      const start = Array.from({ length: all }, (_, at) => at).find((at) => isAt(0, at));
      assert(start !== undefined, `${part}, ${slice}`);
      for (let token = 0; token < size.tokens; token++) {
        assert(isAt(token, start + token), `${part}, ${slice}: token ${token} from ${start} on`);
      }
      starts.add(start);
    }
  }
  assertEquals(starts.size, 2 * size.heads);
});

/** The layers of the fixture, `[tokens, kvHeads, headDim]`, and the model that they are of. */
async function tinyCache() {
  using reader = await SafetensorsReader.open(TINY);
  const [heads, tokens, headDim] = reader.info("layers.0.key").shape as [number, number, number];
  const layers = [];
  for (const layer of [0, 2]) {
    const read = async (part: string) => {
      const bits = new Uint16Array((await reader.read(`layers.${layer}.${part}`)).buffer);
      return Uint16Array.from(bits, (_, i) => {
        const [channel, head] = [i % headDim, Math.floor(i / headDim) % heads];
        const token = Math.floor(i / headDim / heads);
        return bits[(head * tokens + token) * headDim + channel]!;
      });
    };
    layers.push({ keys: await read("key"), values: await read("value") });
  }
  const model = { layers: 2, queryHeads: 4, kvHeads: heads, headDim, dtype: "f16" as KvCacheDType };
  return { model, layers, tokens };
}

/** The last tokens of each sequence come one at a time, together with the others'. */
const LAST = 8;

/** Fills a cache as planned, most of each sequence alone. */
function fill(
  device: Device,
  { options, context }: KvCachePlan,
  layers: readonly { keys: Uint16Array; values: Uint16Array }[],
  stepTokens: number,
) {
  using cache = KvCache.create(device, options);
  const { kvHeads, headDim, dtype } = cache.config;
  const token = kvHeads * headDim;
  const inputs = layers.map(({ keys, values }) =>
    [keys, values].map((bits) => {
      const buffer = device.createBuffer(dtype, bits.length);
      buffer.upload(new Uint16Array(bits));
      return buffer;
    }) as [DeviceBuffer<KvCacheDType>, DeviceBuffer<KvCacheDType>]
  );
  const sequences = Array.from({ length: options.sequences }, () => cache.add());
  for (const sequence of sequences) {
    for (let first = 0; first < context - LAST; first += stepTokens) {
      const tokens = Math.min(stepTokens, context - LAST - first);
      const step = cache.begin([{ sequence, tokens }]);
      inputs.forEach(([keys, values], layer) =>
        step.append(
          layer,
          keys.view(first * token, tokens * token),
          values.view(first * token, tokens * token),
        )
      );
    }
  }
  for (let at = context - LAST; at < context; at++) {
    const step = cache.begin(sequences.map((sequence) => ({ sequence })));
    inputs.forEach((pair, layer) => {
      const [keys, values] = pair.map((buffer) => {
        const all = device.createBuffer(dtype, sequences.length * token);
        sequences.forEach((_, i) =>
          all.view(i * token, token).copyFrom(buffer.view(at * token, token))
        );
        return all;
      });
      step.append(layer, keys!, values!);
      for (const buffer of [keys!, values!]) buffer[Symbol.dispose]();
    });
  }
  for (const buffer of inputs.flat()) buffer[Symbol.dispose]();
  return cache.statistics();
}

Deno.test("kv plan: 16-bit tokens take 16 bits, and times follow from the bytes", async () => {
  const model = await readModelConfig(LLAMA);
  const options = { model, memoryBytes: 2 ** 34, weightBytes: 2 ** 33, bytesPerSecond: 1e12 };
  const raw16 = planKvCache({ ...options, codec: parseCacheCodec("raw16") });
  assertLess(Math.abs(raw16.packedBitsPerValue.keys - 16), 0.1);
  assert(raw16.bitsPerValue > 16 && raw16.bitsPerValue < 16.1);
  // 8 GiB at 128 KiB a token are 65,536; tables, scratch and ends of pages take little of it.
  assert(raw16.maxContext > 64_000 && raw16.maxContext <= 65_536, `${raw16.maxContext}`);
  const bytes = 2 ** 33 + raw16.maxContext * 2 ** 17;
  assertAlmostEquals(raw16.time!.raw16SecondsPerStep, bytes / 1e12, 1e-9);
  assertAlmostEquals(raw16.time!.speedup, 1, 1e-2);

  const fixed = planKvCache({ ...options, codec: FIXED, context: 65_000 });
  const packed = fixed.bytes.packedKeys + fixed.bytes.packedValues;
  // Its 136 newest tokens at most are in 16 bits.
  const least = (2 ** 33 + packed + 132 * 2 ** 17) / 1e12;
  const time = fixed.time!.secondsPerStep;
  assert(time >= least && time <= least + 64 * 2 ** 17 / 1e12, `${time} and ${least}`);
  assertEquals(
    planKvCache({ ...options, bytesPerSecond: undefined, codec: FIXED }).time,
    undefined,
  );
  // 3 bits of keys and 2 of values, and what a block has once.
  const extra = 8 * (528 + 8 * 16) / (2 * 64 * 8 * 128);
  assertAlmostEquals(fixed.packedBitsPerValue.keys, 3 + extra, 1e-9);
  assertAlmostEquals(fixed.packedBitsPerValue.values, 2 + extra, 1e-9);
});

Deno.test("kv plan: what cannot be planned is refused by its reason", async () => {
  const model = await readModelConfig(LLAMA);
  const options = { model, memoryBytes: 2 ** 34, weightBytes: 2 ** 33, codec: FIXED };
  const bad: [Partial<KvCachePlanOptions>, ErrorCode, string][] = [
    [{ memoryBytes: 2 ** 33 }, "out-of-memory", "do not hold 8589934592 of weights"],
    [{ memoryBytes: 2 ** 32 }, "out-of-memory", "4294967296 bytes of memory"],
    [{ memoryBytes: NaN }, "invalid-argument", "memoryBytes must be"],
    [{ weightBytes: -1 }, "invalid-argument", "weightBytes must be"],
    [{ memoryBytes: 2 ** 51 }, "invalid-argument", "got 2251799813685248"],
    [{ batch: 0 }, "invalid-argument", "sequences must be"],
    [{ batch: 64, stepTokens: 63 }, "invalid-argument", "at least the batch of 64, got 63"],
    [{ context: 0 }, "invalid-argument", "context must be"],
    [{ residual: 2 }, "invalid-argument", "residual must be"],
    [{ bytesPerSecond: 0 }, "invalid-argument", "bytesPerSecond must be"],
    [{ model: { ...model, headDim: 80 } }, "invalid-argument", "headDim must be"],
    [{ codec: PACKKV }, "invalid-argument", "measureKvCacheWidths"],
    [
      { codec: PACKKV, widths: { keys: 9, values: 1 } },
      "invalid-argument",
      "keys must be from 0 to 8",
    ],
    [{ codec: PACKKV, bitsPerValue: 7 }, "invalid-argument", "bitsPerValue must be from 0.1025 to"],
    [{ codec: PACKKV, bitsPerValue: 0.1 }, "invalid-argument", "got 0.1"],
  ];
  for (const [change, code, fragment] of bad) {
    throwsWith(() => planKvCache({ ...options, ...change }), code, fragment);
  }
  const most = planKvCache({ ...options, memoryBytes: 2 ** 50, codec: FIXED });
  assert(most.maxContext > 1e7 && most.fits); // as far as a cache goes
});

Deno.test("kv plan: what is no cache to measure is refused", async () => {
  using device = Device.open();
  const codec: KvCacheCodec = PACKKV;
  await rejectsWith(() => measureKvCacheWidths(device, { input: "/missing", codec }), "not-found");
  await rejectsWith(
    () => measureKvCacheWidths(device, { input: TINY, codec, keyPattern: "k<n>" }),
    "not-found",
    "k<n>",
  );
});
