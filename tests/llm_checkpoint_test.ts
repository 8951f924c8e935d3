/** Configurations and checkpoints of language models: what they say, and what of them is refused. */
import { assert, assertAlmostEquals, assertEquals, assertThrows } from "@std/assert";
import { Device } from "../src/device/mod.ts";
import { type ErrorCode, PackhorseError } from "../src/error.ts";
import { readModelConfig } from "../src/kv/mod.ts";
import { LanguageModel, readLanguageModelConfig } from "../src/llm/mod.ts";
import { parseLanguageModelConfig } from "../src/llm/model_config.ts";
import { rotaryFrequencies } from "../src/llm/rotary.ts";
import { backends } from "./backends.ts";
import {
  type CheckpointOptions,
  familyCases,
  type ModelFields,
  tensorShapes,
  writeCheckpoint,
} from "./llm_checkpoints.ts";
import { rejectsWith } from "./rejects_with.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

const FIXTURES = new URL("fixtures/", import.meta.url).pathname;
const LLAMA: ModelFields = familyCases().cases[0]!.config;

function parse(fields: ModelFields) {
  return parseLanguageModelConfig(new TextEncoder().encode(JSON.stringify(fields)), "config.json");
}

/** Asserts that a configuration is refused with this code and a message that contains each fragment. */
function refuses(fields: ModelFields, code: ErrorCode, ...fragments: string[]): void {
  const error = assertThrows(() => parse({ ...LLAMA, ...fields }), PackhorseError);
  assertEquals(error.code, code, error.message);
  for (const fragment of fragments) assert(error.message.includes(fragment), error.message);
}

// ---- configurations --------------------------------------------------------------------------------

Deno.test("llm config: Llama 3.1 8B, as Meta has it", () => {
  const config = parseLanguageModelConfig(
    Deno.readFileSync(`${FIXTURES}/configs/llama-3.1-8b.json`),
    "config.json",
  );
  assertEquals(config.family, "llama");
  assertEquals([config.layers, config.hidden, config.intermediate], [32, 4096, 14_336]);
  assertEquals([config.queryHeads, config.kvHeads, config.headDim], [32, 8, 128]);
  assertEquals(config.rotary.theta, 500_000);
  assertEquals(config.rotary.scaling.type, "llama3");
  assertEquals(config.tiedEmbeddings, false);
  assertEquals(new Set(config.windows), new Set([0]));
});

Deno.test("llm config: the weights of every family are those that kv plan counts", async () => {
  for (const { name, config } of familyCases().cases) {
    using folder = new TemporaryFolder();
    const path = await folder.write("config.json", JSON.stringify(config));
    const { weights } = await readModelConfig(path);
    const count = [...tensorShapes(config).values()]
      .reduce((sum, shape) => sum + shape.reduce((product, size) => product * size, 1), 0);
    assertEquals("parameters" in weights && weights.parameters, count, name);
  }
});

Deno.test("llm config: sliding windows are those of the layers that have one", () => {
  const windows = (fields: ModelFields) =>
    parse({ ...LLAMA, num_hidden_layers: 4, ...fields }).windows;
  const mistral = { model_type: "mistral", architectures: ["MistralForCausalLM"] };
  const qwen = { model_type: "qwen2", architectures: ["Qwen2ForCausalLM"], sliding_window: 32 };
  assertEquals(windows({ ...mistral, sliding_window: 32 }), [32, 32, 32, 32]);
  assertEquals(windows({ ...mistral, sliding_window: null }), [0, 0, 0, 0]);
  assertEquals(windows(qwen), [0, 0, 0, 0]);
  assertEquals(windows({ ...qwen, use_sliding_window: true }), [0, 0, 0, 0]);
  const used = { ...qwen, use_sliding_window: true, max_window_layers: 3 };
  assertEquals(windows(used), [0, 0, 0, 32]);
  const [full, sliding] = ["full_attention", "sliding_attention"];
  assertEquals(windows({ ...used, layer_types: [sliding, full, full, sliding] }), [32, 0, 0, 32]);
  refuses({ layer_types: [full] }, "corrupt", "layer_types", "2");
  refuses({ layer_types: [sliding, full] }, "corrupt", "sliding_window");
});

Deno.test("llm config: tokens that end texts are those of generation_config.json", async () => {
  using folder = new TemporaryFolder();
  await folder.write("config.json", JSON.stringify({ ...LLAMA, eos_token_id: [2, 7] }));
  assertEquals((await readLanguageModelConfig(folder.path)).endTokens, [2, 7]);
  await folder.write("generation_config.json", JSON.stringify({ eos_token_id: [3, 4] }));
  assertEquals((await readLanguageModelConfig(folder.path)).endTokens, [3, 4]);
  await folder.write("generation_config.json", JSON.stringify({ eos_token_id: 5 }));
  assertEquals((await readLanguageModelConfig(folder.path)).endTokens, [5]);
  await folder.write("generation_config.json", JSON.stringify({ eos_token_id: 999 }));
  await rejectsWith(() => readLanguageModelConfig(folder.path), "corrupt", "eos_token_id", "999");
});

Deno.test("llm config: another model is refused, naming what it would need", () => {
  refuses(
    { model_type: "mixtral" },
    "unsupported",
    '"mixtral"',
    "llama, mistral",
    "mixture of experts",
  );
  refuses({ model_type: "gemma2" }, "unsupported", "GELU");
  refuses({ model_type: "toString" }, "unsupported", '"toString"');
  refuses({ model_type: undefined }, "unsupported", "no model_type");
  refuses({ architectures: ["LlamaForSequenceClassification"] }, "unsupported", "Classification");
  refuses({ hidden_act: "gelu" }, "unsupported", "gelu");
  refuses({ quantization_config: { bits: 4 } }, "unsupported", "quantised");
  refuses({ head_dim: 80 }, "unsupported", "80", "64, 96, 128, 256");
  refuses({ num_attention_heads: 68 }, "unsupported", "17", "16");
  refuses({ partial_rotary_factor: 0.5 }, "unsupported", "partial_rotary_factor");
  refuses({ rope_scaling: { rope_type: "spiral" } }, "unsupported", "spiral");
  refuses({ kv_lora_rank: 512 }, "unsupported", "latents");
});

Deno.test("llm config: a broken configuration is refused, naming the field", () => {
  refuses({ vocab_size: undefined }, "corrupt", "vocab_size");
  refuses({ intermediate_size: -1 }, "corrupt", "intermediate_size", "-1");
  refuses({ rms_norm_eps: "small" }, "corrupt", "rms_norm_eps", "small");
  refuses({ rope_theta: 0 }, "corrupt", "rope_theta");
  refuses({ tie_word_embeddings: 1 }, "corrupt", "tie_word_embeddings");
  refuses({ rope_scaling: [] }, "corrupt", "rope_scaling");
  refuses({ rope_scaling: { type: "linear" } }, "corrupt", "rope_scaling", "factor");
  refuses({ rope_scaling: { type: "llama3", factor: 8 } }, "corrupt", "low_freq_factor");
  refuses({ bos_token_id: 256 }, "corrupt", "bos_token_id", "256");
  const phi = { model_type: "phi3", architectures: ["Phi3ForCausalLM"] };
  const longrope = { type: "longrope", short_factor: [1], long_factor: [1] };
  refuses({ ...phi, rope_scaling: longrope }, "corrupt", "short_factor", "32");
  refuses({ ...phi, partial_rotary_factor: 0.01 }, "corrupt", "partial_rotary_factor");
});

// ---- rotary frequencies ----------------------------------------------------------------------------

/** Frequencies of a configuration with 64 channels in a head. */
function frequencies(fields: ModelFields, tokens = 48) {
  return rotaryFrequencies(parse({ ...LLAMA, ...fields }).rotary, tokens);
}

Deno.test("llm rotary: frequencies are those of the formulas", () => {
  const plain = Array.from({ length: 32 }, (_, i) => 10_000 ** (-i / 32));
  const close = (
    found: { frequencies: Float64Array; scale: number },
    expected: number[],
    scale = 1,
  ) => {
    assertEquals(found.frequencies.length, expected.length);
    expected.forEach((each, i) => assertAlmostEquals(found.frequencies[i]! / each, 1, 1e-12));
    assertAlmostEquals(found.scale, scale, 1e-12);
  };
  close(frequencies({}), plain);
  close(frequencies({ rope_scaling: { type: "linear", factor: 4 } }), plain.map((f) => f / 4));
  // Newer files have all of it in one place.
  const parameters = { rope_type: "linear", factor: 2, rope_theta: 500 };
  close(frequencies({ rope_parameters: parameters }), plain.map((_, i) => 500 ** (-i / 32) / 2));

  // Made for 256 tokens, and stretched for the sequences that there will be.
  const dynamic = { rope_scaling: { type: "dynamic", factor: 2 } };
  close(frequencies(dynamic, 256), plain);
  const base = 10_000 * (2 * 1024 / 256 - 1) ** (64 / 62);
  close(frequencies(dynamic, 1024), plain.map((_, i) => base ** (-i / 32)));

  // Long waves are stretched 8 times, short ones not, between them smoothly.
  const llama3 = {
    rope_type: "llama3",
    factor: 8,
    low_freq_factor: 1,
    high_freq_factor: 4,
    original_max_position_embeddings: 64,
  };
  close(
    frequencies({ rope_scaling: llama3 }),
    plain.map((f) => {
      const wave = 2 * Math.PI / f;
      if (wave < 16) return f;
      if (wave > 64) return f / 8;
      const smooth = (64 / wave - 1) / 3;
      return (1 - smooth) * f / 8 + smooth * f;
    }),
  );

  const yarn = { type: "yarn", factor: 4, original_max_position_embeddings: 64 };
  const stretched = frequencies({ rope_scaling: yarn });
  // 32 turns within 64 tokens come before the first pair; one turn after pair 8.06 of 32.
  const last = Math.ceil(64 * Math.log(64 / (2 * Math.PI)) / (2 * Math.log(10_000)));
  assertEquals(last, 9);
  close(
    stretched,
    plain.map((f, i) => {
      const ramp = Math.min(1, i / 9);
      return ramp * f / 4 + (1 - ramp) * f;
    }),
    0.1 * Math.log(4) + 1,
  );
  const weighted = frequencies({ rope_scaling: { ...yarn, mscale: 2, mscale_all_dim: 1 } });
  assertAlmostEquals(weighted.scale, (0.2 * Math.log(4) + 1) / (0.1 * Math.log(4) + 1), 1e-12);
});

Deno.test("llm rotary: longrope has long factors for long sequences, and turns part of a head", () => {
  const [short, long] = [1, 3].map((step) => Array.from({ length: 24 }, (_, i) => 1 + step * i));
  const phi = {
    model_type: "phi3",
    architectures: ["Phi3ForCausalLM"],
    partial_rotary_factor: 0.75,
    original_max_position_embeddings: 64,
    rope_scaling: { type: "longrope", short_factor: short, long_factor: long },
  };
  const { rotary } = parse({ ...LLAMA, ...phi });
  assertEquals(rotary.dim, 48);
  for (const [tokens, factors] of [[64, short!], [65, long!]] as const) {
    const { frequencies, scale } = rotaryFrequencies(rotary, tokens);
    frequencies.forEach((found, i) =>
      assertAlmostEquals(found * factors[i]! * 10_000 ** (i / 24), 1, 1e-12)
    );
    assertAlmostEquals(scale, Math.sqrt(1 + Math.log(4) / Math.log(64)), 1e-12);
  }
});

// ---- checkpoints -----------------------------------------------------------------------------------

for (const backend of backends()) {
  const load = async (folder: string, options = {}) => {
    using device = Device.open({ backend });
    using model = await LanguageModel.load(device, folder, {
      tokenizer: false,
      tokens: 64,
      stepTokens: 32,
      ...options,
    });
    return await model.complete([5, 6, 7], { maxTokens: 8, endTokens: [] });
  };
  const test = (name: string, work: (folder: TemporaryFolder) => Promise<void>) =>
    Deno.test(`llm checkpoint: ${backend}: ${name}`, async () => {
      using folder = new TemporaryFolder();
      await work(folder);
    });
  const broken = (
    name: string,
    options: CheckpointOptions & { config?: ModelFields },
    damage: (folder: TemporaryFolder) => Promise<void> | void,
    code: ErrorCode,
    ...fragments: string[]
  ) =>
    test(`${name} is refused`, async (folder) => {
      await writeCheckpoint(folder.path, { ...LLAMA, ...options.config }, options);
      await damage(folder);
      await rejectsWith(() => load(folder.path), code, ...fragments);
    });

  test("shards give what one file gives, whatever else lies there", async (folder) => {
    await writeCheckpoint(folder.path, LLAMA);
    const whole = await load(folder.path);
    using other = new TemporaryFolder();
    await writeCheckpoint(other.path, LLAMA, { shards: 3 });
    await other.write("model-4-of-3.safetensors", "none of the index");
    await other.write("pytorch_model.bin", "not looked at");
    assertEquals(await load(other.path), whole);
  });

  test("weights in f16, and asked for in another type, are converted", async (folder) => {
    await writeCheckpoint(folder.path, LLAMA, { dtype: "f16" });
    const found = await load(folder.path);
    assertEquals(found.tokens.length, 8);
    assertEquals((await load(folder.path, { dtype: "bf16" })).tokens.length, 8);
  });

  test("a model can do without weights, to measure speed", async (folder) => {
    await folder.write("config.json", JSON.stringify(LLAMA));
    const options = { randomWeights: true };
    const found = await load(folder.path, options);
    assertEquals(found.tokens.length, 8);
    assertEquals(await load(folder.path, options), found);
    await rejectsWith(() => load(folder.path), "not-found", "model.safetensors");
  });

  test("weights are loaded one after another, and can be aborted", async (folder) => {
    await writeCheckpoint(folder.path, LLAMA);
    const controller = new AbortController();
    const steps: [number, number][] = [];
    const onProgress = (done: number, total: number) => {
      steps.push([done, total]);
      if (steps.length === 5) controller.abort(new Error("enough"));
    };
    const { signal } = controller;
    let message = "";
    try {
      await load(folder.path, { onProgress, signal });
    } catch (error) {
      message = (error as Error).message;
    }
    assertEquals([message, steps.length], ["enough", 5]);
    assert(steps.every(([done, total], i) => done <= total && done > (steps[i - 1]?.[0] ?? 0)));
  });

  const nothing = () => {};
  broken(
    "a missing tensor",
    { change: (shapes) => shapes.delete("model.layers.1.mlp.up_proj.weight") },
    nothing,
    "corrupt",
    "model.safetensors",
    '"model.layers.1.mlp.up_proj.weight"',
  );
  broken(
    "a tensor of another shape",
    { change: (shapes) => shapes.set("model.layers.0.self_attn.q_proj.weight", [128, 128]) },
    nothing,
    "corrupt",
    '"model.layers.0.self_attn.q_proj.weight"',
    "[128, 128]",
    "[256, 128]",
  );
  broken(
    "a tensor that has no place",
    { change: (shapes) => shapes.set("model.layers.0.self_attn.q_proj.bias", [256]) },
    nothing,
    "unsupported",
    "no place",
    '"model.layers.0.self_attn.q_proj.bias"',
  );
  broken(
    "a checkpoint without its head",
    { config: { tie_word_embeddings: true } },
    (folder) => folder.write("config.json", JSON.stringify(LLAMA)).then(() => {}),
    "corrupt",
    '"lm_head.weight"',
  );
  broken(
    "a shard that is cut",
    { shards: 2 },
    (folder) => {
      const path = folder.file("model-2-of-2.safetensors");
      Deno.truncateSync(path, Deno.statSync(path).size - 100);
    },
    "truncated",
    "model-2-of-2.safetensors",
  );
  broken(
    "a missing shard",
    { shards: 2 },
    (folder) => Deno.removeSync(folder.file("model-1-of-2.safetensors")),
    "not-found",
    "model-1-of-2.safetensors",
  );
  broken(
    "an index that leads out of the folder",
    { shards: 2 },
    async (folder) => {
      const path = folder.file("model.safetensors.index.json");
      const index = await Deno.readTextFile(path);
      await Deno.writeTextFile(path, index.replaceAll("model-1-of-2", "../model-1-of-2"));
    },
    "corrupt",
    "../model-1-of-2.safetensors",
  );
  broken(
    "a folder without weights",
    {},
    async (folder) => {
      await Deno.rename(folder.file("model.safetensors"), folder.file("pytorch_model.bin"));
    },
    "not-found",
    "model.safetensors",
    "convert",
  );
  broken(
    "a folder without a configuration",
    {},
    (folder) => Deno.removeSync(folder.file("config.json")),
    "not-found",
    "config.json",
  );

  test("a folder without a tokenizer, and one whose tokens the model lacks, are refused", async (folder) => {
    await writeCheckpoint(folder.path, LLAMA);
    const options = { tokenizer: true };
    await rejectsWith(() => load(folder.path, options), "not-found", "tokenizer.json");
    await folder.write("tokenizer.json", "{}");
    await rejectsWith(() => load(folder.path, options), "corrupt", "tokenizer.json");
    await Deno.copyFile(`${FIXTURES}/tiny/tokenizer.json`, folder.file("tokenizer.json"));
    await rejectsWith(() => load(folder.path, options), "corrupt", "2048", "256");
  });

  test("options outside their range are refused before weights are read", async (folder) => {
    await writeCheckpoint(folder.path, LLAMA);
    const onProgress = () => {
      throw new Error("weights were read");
    };
    const refuse = (options: object, ...fragments: string[]) =>
      rejectsWith(
        () => load(folder.path, { ...options, onProgress }),
        "invalid-argument",
        ...fragments,
      );
    await refuse({ tokens: 0 }, "tokens");
    await refuse({ codec: "zip" }, "zip");
    await refuse({ sequences: 0 });
    await refuse({ residual: 3 }, "residual");
    await refuse({ cacheBytes: 5 }, "poolBytes");
  });
}
