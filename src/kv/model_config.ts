import { PackhorseError } from "../error.ts";
import { isGiven, JsonFields, parseConfig, readConfigFile } from "../io/json_fields.ts";
import { isCount, isObject } from "../io/untrusted_json.ts";
import type { KvCacheDType } from "./cache_options.ts";

/** What the `config.json` of a Hugging Face model says that matters to its key/value cache. */
export interface KvModel {
  /** "llama", where the configuration says so. */
  readonly type: string | undefined;
  /** Layers, each with keys and values. */
  readonly layers: number;
  /** Heads of the queries. */
  readonly queryHeads: number;
  /** Heads of the keys and values. */
  readonly kvHeads: number;
  /** Channels of a head. */
  readonly headDim: number;
  /** Type of keys and values: `f16` for a model in float16, else `bf16`. */
  readonly dtype: KvCacheDType;
  /** Most tokens of a sequence that the model was made for. */
  readonly contextLimit: number | undefined;
  /** How many of the latest tokens its layers look at, where some look at no more. */
  readonly slidingWindow: number | undefined;
  /** The weights as far as the configuration tells them, or why it does not. */
  readonly weights: KvModelWeights | { readonly unknown: string };
}

/** The weights that a configuration describes. */
export interface KvModelWeights {
  /** How many there are. */
  readonly parameters: number;
  /** Bytes of each. */
  readonly bytesPerParameter: number;
  /** Bytes of all. */
  readonly bytes: number;
}

/** What tells the weights of an architecture from those of LLaMA, which has no biases, and two norms a layer. */
interface Architecture {
  readonly queryKeyValueBias?: boolean;
  readonly queryKeyNorms?: boolean;
  readonly norms?: number;
  readonly tiesEmbeddings?: boolean;
}

const ARCHITECTURES: Readonly<Record<string, Architecture>> = {
  llama: {},
  mistral: {},
  phi3: {},
  qwen2: { queryKeyValueBias: true },
  qwen3: { queryKeyNorms: true },
  gemma: { tiesEmbeddings: true },
  gemma2: { tiesEmbeddings: true, norms: 4 },
};

const BYTES_PER_PARAMETER: Readonly<Record<string, number>> = {
  float16: 2,
  bfloat16: 2,
  float32: 4,
};

/** Kinds of attention whose layers cache the keys and values of tokens. */
const CACHED_LAYERS: readonly unknown[] = ["full_attention", "sliding_attention"];

/**
 * Reads the `config.json` of a Hugging Face model: its own fields, or those of its `text_config`.
 *
 * Throws `not-found` and `io` as files do, `corrupt` for what is no such configuration, naming the field, and
 * `unsupported` for a model that caches something other than keys and values of every layer and token.
 *
 * @example
 * ```ts
 * import { readModelConfig } from "@packhorse/packhorse/kv";
 * import { assertEquals } from "@std/assert";
 *
 * const model = await readModelConfig("tests/fixtures/configs/llama-3.1-8b.json");
 * assertEquals([model.layers, model.kvHeads, model.headDim, model.dtype], [32, 8, 128, "bf16"]);
 * assertEquals(model.weights, { parameters: 8_030_261_248, bytesPerParameter: 2, bytes: 16_060_522_496 });
 * ```
 */
export async function readModelConfig(path: string): Promise<KvModel> {
  return parseModelConfig(await readConfigFile(path), path);
}

/** {@linkcode readModelConfig} on the bytes of a file, whose `path` is for messages. */
export function parseModelConfig(bytes: Uint8Array, path: string): KvModel {
  const outer = parseConfig(bytes, path);
  const fields = isObject(outer.text_config) ? { ...outer, ...outer.text_config } : outer;
  const config = modelFields(fields, path);
  refuseOtherCaches(fields, path);

  const layers = config.count("num_hidden_layers", 4096);
  const queryHeads = config.count("num_attention_heads", 16_384);
  const kvHeads = config.count("num_key_value_heads", 1024, queryHeads);
  const headDim = config.count("head_dim", 65_536, () => {
    const hidden = config.count("hidden_size", 2 ** 24);
    if (hidden % queryHeads === 0) return hidden / queryHeads;
    return config.refuse(`hidden_size ${hidden} is no multiple of the ${queryHeads} heads`);
  });
  if (queryHeads % kvHeads !== 0) {
    const heads = `num_attention_heads ${queryHeads}`;
    config.refuse(`${heads} is no multiple of num_key_value_heads ${kvHeads}`);
  }
  const dtype = config.word("dtype") ?? config.word("torch_dtype");
  const usesWindow = fields.use_sliding_window !== false && isGiven(fields.sliding_window);
  return {
    type: config.word("model_type"),
    layers,
    queryHeads,
    kvHeads,
    headDim,
    dtype: dtype === "float16" ? "f16" : "bf16",
    contextLimit: isGiven(fields.max_position_embeddings)
      ? config.count("max_position_embeddings", 2 ** 40)
      : undefined,
    slidingWindow: usesWindow ? config.count("sliding_window", 2 ** 40) : undefined,
    weights: countWeights(fields, path, { layers, queryHeads, kvHeads, headDim, dtype }),
  };
}

function refuseOtherCaches(fields: Record<string, unknown>, path: string): void {
  const refuse = (what: string): never => {
    const message = `Cannot plan a cache for ${path}: ${what}`;
    throw new PackhorseError("unsupported", message);
  };
  if (isGiven(fields.kv_lora_rank)) refuse("it caches latents (kv_lora_rank), not keys and values");
  const kinds: unknown[] = Array.isArray(fields.layer_types) ? fields.layer_types : [];
  const other = kinds.find((kind) => !CACHED_LAYERS.includes(kind));
  if (other !== undefined) refuse(`it has layers of ${JSON.stringify(other)} (layer_types)`);
  if (isCount(fields.num_kv_shared_layers) && fields.num_kv_shared_layers > 0) {
    refuse("its layers share keys and values (num_kv_shared_layers)");
  }
}

/** The weights, if the model is one whose weights this module can count. */
function countWeights(
  fields: Record<string, unknown>,
  path: string,
  { layers, queryHeads, kvHeads, headDim, dtype }: {
    layers: number;
    queryHeads: number;
    kvHeads: number;
    headDim: number;
    dtype: string | undefined;
  },
): KvModel["weights"] {
  const config = modelFields(fields, path);
  const type = config.word("model_type");
  if (type === undefined || !Object.hasOwn(ARCHITECTURES, type)) {
    const known = Object.keys(ARCHITECTURES).join(", ");
    return { unknown: `its model_type is ${type ?? "missing"}, none of ${known}` };
  }
  const { queryKeyValueBias, queryKeyNorms, norms = 2, tiesEmbeddings } = ARCHITECTURES[type]!;
  if (isGiven(fields.quantization_config)) return { unknown: "its weights are quantised" };
  for (const name of ["hidden_size", "intermediate_size", "vocab_size"]) {
    if (!isGiven(fields[name])) return { unknown: `it has no ${name}` };
  }
  const bytesPerParameter = BYTES_PER_PARAMETER[dtype ?? ""];
  if (bytesPerParameter === undefined) {
    return { unknown: `its dtype is ${dtype ?? "missing"}, not float16, bfloat16 or float32` };
  }
  const hidden = config.count("hidden_size", 2 ** 24);
  const intermediate = config.count("intermediate_size", 2 ** 24);
  const vocabulary = config.count("vocab_size", 2 ** 24);
  const [queries, keys] = [queryHeads * headDim, kvHeads * headDim];
  const bias = queryKeyValueBias || fields.attention_bias === true ? queries + 2 * keys : 0;
  const outputBias = fields.attention_bias === true && !queryKeyValueBias ? hidden : 0;
  const mlpBias = fields.mlp_bias === true ? 2 * intermediate + hidden : 0;
  const layer = hidden * (queries + 2 * keys) + bias + queries * hidden + outputBias +
    3 * hidden * intermediate + mlpBias + norms * hidden + (queryKeyNorms ? 2 * headDim : 0);
  const tied = fields.tie_word_embeddings ?? tiesEmbeddings ?? false;
  const parameters = layers * layer + hidden + (tied === true ? 1 : 2) * vocabulary * hidden;
  const bytes = parameters * bytesPerParameter;
  if (!Number.isSafeInteger(bytes)) config.refuse(`its sizes make ${parameters} weights`);
  return { parameters, bytesPerParameter, bytes };
}

/** Fields of a model's config.json. */
export function modelFields(fields: Readonly<Record<string, unknown>>, path: string): JsonFields {
  return new JsonFields(fields, `Cannot use ${path} as a model's config.json`);
}
