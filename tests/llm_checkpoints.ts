/** Checkpoints with random weights in Hugging Face's format, for tests. */
import { SafetensorsWriter } from "../src/io/mod.ts";

/** Fields of a `config.json`. */
export type ModelFields = Record<string, unknown>;

/** A model of tests/fixtures/llm_families. */
export interface FamilyCase {
  readonly name: string;
  readonly config: ModelFields;
}

const FAMILIES = new URL("fixtures/llm_families/", import.meta.url);

/** The models that tests/oracles/llm_families.py runs, and how many tokens it gives them. */
export function familyCases(): { readonly tokens: number; readonly cases: readonly FamilyCase[] } {
  return JSON.parse(Deno.readTextFileSync(new URL("cases.json", FAMILIES)));
}

/** Logits of the last tokens of each case by transformers, if tests/oracles/llm_families.py has been run. */
export function familyLogits(): Record<string, number[][]> | undefined {
  try {
    return JSON.parse(Deno.readTextFileSync(new URL("logits.json", FAMILIES))).logits;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return undefined;
    throw error;
  }
}

/** Token `i` of the texts of family cases. */
export function familyToken(i: number): number {
  return (i * 37 + 11) % 251 + 3;
}

/** Names and shapes of a checkpoint's tensors, as transformers has them. */
export function tensorShapes(config: ModelFields): Map<string, number[]> {
  const number = (name: string) => config[name] as number;
  const [hidden, intermediate] = [number("hidden_size"), number("intermediate_size")];
  const headDim = (config.head_dim ?? hidden / number("num_attention_heads")) as number;
  const queries = number("num_attention_heads") * headDim;
  const keys = number("num_key_value_heads") * headDim;
  const shapes = new Map<string, number[]>();
  shapes.set("model.embed_tokens.weight", [number("vocab_size"), hidden]);
  for (let layer = 0; layer < number("num_hidden_layers"); layer++) {
    const linear = (name: string, outputs: number, inputs: number, bias: boolean) => {
      shapes.set(`model.layers.${layer}.${name}.weight`, [outputs, inputs]);
      if (bias) shapes.set(`model.layers.${layer}.${name}.bias`, [outputs]);
    };
    const norm = (name: string, size: number) =>
      shapes.set(`model.layers.${layer}.${name}.weight`, [size]);
    const type = config.model_type;
    const bias = config.attention_bias === true;
    if (type === "phi3") {
      linear("self_attn.qkv_proj", queries + 2 * keys, hidden, false);
      linear("mlp.gate_up_proj", 2 * intermediate, hidden, false);
    } else {
      const biased = bias || type === "qwen2";
      linear("self_attn.q_proj", queries, hidden, biased);
      linear("self_attn.k_proj", keys, hidden, biased);
      linear("self_attn.v_proj", keys, hidden, biased);
      linear("mlp.gate_proj", intermediate, hidden, config.mlp_bias === true);
      linear("mlp.up_proj", intermediate, hidden, config.mlp_bias === true);
    }
    linear("self_attn.o_proj", hidden, queries, bias);
    linear("mlp.down_proj", hidden, intermediate, config.mlp_bias === true);
    if (type === "qwen3") {
      norm("self_attn.q_norm", headDim);
      norm("self_attn.k_norm", headDim);
    }
    norm("input_layernorm", hidden);
    norm("post_attention_layernorm", hidden);
  }
  shapes.set("model.norm.weight", [hidden]);
  if (config.tie_word_embeddings !== true) {
    shapes.set("lm_head.weight", [number("vocab_size"), hidden]);
  }
  return shapes;
}

/** Weights that the tensor's name determines; tests/oracles/llm_families.py computes the same. */
export function weightsOf(name: string, shape: readonly number[]): Float32Array<ArrayBuffer> {
  // FNV-1a of the name seeds mulberry32.
  let seed = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(name)) {
    seed = Math.imul(seed ^ byte, 0x01000193) >>> 0;
  }
  const [scale, offset] = name.endsWith("norm.weight")
    ? [0.5, 1]
    : name.endsWith(".bias")
    ? [0.2, 0]
    : name.includes("embed_tokens") || name.includes("lm_head")
    ? [0.04, 0]
    : [1.5 / Math.sqrt(shape[1]!), 0];
  return Float32Array.from({ length: shape.reduce((count, size) => count * size, 1) }, (_, i) => {
    const state = (seed + Math.imul(i + 1, 0x6d2b79f5)) >>> 0;
    let bits = Math.imul(state ^ (state >>> 15), state | 1);
    bits ^= bits + Math.imul(bits ^ (bits >>> 7), bits | 61);
    const uniform = ((bits ^ (bits >>> 14)) >>> 0) / 2 ** 32;
    return offset + scale * (2 * uniform - 1);
  });
}

/** Options of {@linkcode writeCheckpoint}. */
export interface CheckpointOptions {
  /** Type that weights are rounded to. Default: f32. */
  readonly dtype?: "f32" | "f16" | undefined;
  /** How many files; one without an index by default. */
  readonly shards?: number | undefined;
  /** Changes names and shapes before they are written. */
  readonly change?: ((shapes: Map<string, number[]>) => void) | undefined;
}

/** Writes `config.json` and the weights to a folder that exists. */
export async function writeCheckpoint(
  folder: string,
  config: ModelFields,
  options: CheckpointOptions = {},
): Promise<void> {
  const { dtype = "f32", shards, change } = options;
  await Deno.writeTextFile(`${folder}/config.json`, JSON.stringify(config));
  const shapes = tensorShapes(config);
  change?.(shapes);
  const files = new Map<string, [string, number[]][]>();
  let index = 0;
  for (const tensor of shapes) {
    const file = shards === undefined
      ? "model.safetensors"
      : `model-${1 + index++ % shards}-of-${shards}.safetensors`;
    files.set(file, [...files.get(file) ?? [], tensor]);
  }
  for (const [file, tensors] of files) {
    using writer = await SafetensorsWriter.create(`${folder}/${file}`, {
      tensors: tensors.map(([name, shape]) => ({ name, dtype, shape })),
    });
    for (const [name, shape] of tensors) {
      const weights = weightsOf(name, shape);
      const values = dtype === "f16" ? new Float16Array(weights) : weights;
      await writer.writeAt(name, new Uint8Array(values.buffer));
    }
    await writer.commit();
  }
  if (shards === undefined) return;
  const weight_map = Object.fromEntries(
    [...files].flatMap(([file, tensors]) => tensors.map(([name]) => [name, file])),
  );
  await Deno.writeTextFile(
    `${folder}/model.safetensors.index.json`,
    JSON.stringify({ metadata: {}, weight_map }),
  );
}
