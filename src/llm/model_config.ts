import { PackhorseError } from "../error.ts";
import { isGiven, JsonFields, parseConfig, readConfigFile } from "../io/json_fields.ts";
import { isCount, isObject } from "../io/untrusted_json.ts";
import { CACHE_HEAD_DIMS, MOST_GROUP } from "../kv/cache_options.ts";
import { modelFields, parseModelConfig } from "../kv/model_config.ts";
import { parseRotary, type RotaryConfig } from "./rotary.ts";

/** Families of models that can be run. */
export type LanguageModelFamily = "llama" | "mistral" | "qwen2" | "qwen3" | "phi3";

/** What the `config.json` of a model says of its layers. */
export interface LanguageModelConfig {
  /** Whose layers they are. */
  readonly family: LanguageModelFamily;
  /** Tokens that there are. */
  readonly vocabulary: number;
  /** Channels between layers. */
  readonly hidden: number;
  /** Channels within the feed-forward part. */
  readonly intermediate: number;
  /** Layers. */
  readonly layers: number;
  /** Heads of the queries. */
  readonly queryHeads: number;
  /** Heads of the keys and values. */
  readonly kvHeads: number;
  /** Channels of a head. */
  readonly headDim: number;
  /** What norms add to the mean square. */
  readonly epsilon: number;
  /** How positions enter. */
  readonly rotary: RotaryConfig;
  /** How many tokens a token attends to in each layer, itself included; 0 for all before it. */
  readonly windows: readonly number[];
  /** Most tokens of a sequence that the model was made for. */
  readonly contextLimit: number;
  /** Whether the head is the embedding. */
  readonly tiedEmbeddings: boolean;
  /** Which projections add a bias. */
  readonly biases: {
    readonly queryKeyValue: boolean;
    readonly output: boolean;
    readonly feedForward: boolean;
  };
  /** Whether each head of queries and keys is normed before it is turned. */
  readonly queryKeyNorms: boolean;
  /** Whether the file has one matrix for queries, keys and values, and one for gate and up. */
  readonly fusedProjections: boolean;
  /** The token that texts begin with, if the model says so. */
  readonly beginToken: number | undefined;
  /** Tokens that end a text. */
  readonly endTokens: readonly number[];
  /** Type that the weights are said to be in. */
  readonly dtype: string | undefined;
}

/** What a family's configuration leaves unsaid. */
interface Family {
  readonly architecture: string;
  readonly epsilon: number;
  readonly queryKeyValueBias?: boolean;
  readonly queryKeyNorms?: boolean;
  readonly fusedProjections?: boolean;
  readonly partialRotary?: boolean;
  /** Fields that add biases, where they are true. */
  readonly biasFields?: { readonly attention?: boolean; readonly feedForward?: boolean };
  /** Whether `sliding_window` counts at all: always, or only where `use_sliding_window` says so. */
  readonly window?: "always" | "if-used";
}

const FAMILIES: Readonly<Record<LanguageModelFamily, Family>> = {
  llama: {
    architecture: "LlamaForCausalLM",
    epsilon: 1e-6,
    biasFields: { attention: true, feedForward: true },
  },
  mistral: { architecture: "MistralForCausalLM", epsilon: 1e-6, window: "always" },
  qwen2: {
    architecture: "Qwen2ForCausalLM",
    epsilon: 1e-6,
    queryKeyValueBias: true,
    window: "if-used",
  },
  qwen3: {
    architecture: "Qwen3ForCausalLM",
    epsilon: 1e-6,
    queryKeyNorms: true,
    biasFields: { attention: true },
    window: "if-used",
  },
  phi3: {
    architecture: "Phi3ForCausalLM",
    epsilon: 1e-5,
    fusedProjections: true,
    partialRotary: true,
    window: "always",
  },
};

/** What it would take to run models of other types. */
const NEEDS: Readonly<Record<string, string>> = {
  cohere: "layers whose attention and feed-forward parts run side by side, and LayerNorm",
  deepseek_v2: "latent attention and a mixture of experts",
  deepseek_v3: "latent attention and a mixture of experts",
  falcon: "LayerNorm, GELU, and layers whose parts run side by side",
  gemma: "GELU, scaled embeddings, and norms that add 1 to their weight",
  gemma2: "GELU, capped logits, four norms a layer, and norms that add 1 to their weight",
  gemma3: "four norms a layer, two rotary bases, and an image encoder",
  gemma3_text: "GELU, four norms a layer, two rotary bases, and norms that add 1 to their weight",
  gpt2: "LayerNorm, GELU and learned positions",
  gpt_neox: "LayerNorm, GELU, and layers whose parts run side by side",
  gpt_oss: "a mixture of experts, and learned sinks of attention",
  granite: "multipliers of embeddings, residuals, attention and logits",
  llama4: "a mixture of experts, layers without positions, and an image encoder",
  mamba: "state spaces instead of attention",
  mistral3: "an image encoder",
  mixtral: "a mixture of experts",
  olmo2: "norms after the attention and feed-forward parts",
  phi: "LayerNorm, GELU, and layers whose parts run side by side",
  phimoe: "a mixture of experts, and LayerNorm",
  qwen2_moe: "a mixture of experts",
  qwen2_vl: "an image encoder",
  qwen3_moe: "a mixture of experts",
  qwen3_next: "linear attention and a mixture of experts",
  smollm3: "layers without positions",
  stablelm: "LayerNorm",
  starcoder2: "LayerNorm and GELU",
};

/**
 * Reads `config.json` and, where it is there, `generation_config.json` of a model's folder.
 *
 * Throws `not-found` and `io` as files do, `corrupt` naming the field that is wrong or missing, and `unsupported` for a
 * model that is of no known family, naming what it would need.
 */
export async function readLanguageModelConfig(folder: string): Promise<LanguageModelConfig> {
  const path = `${folder}/config.json`;
  const config = parseLanguageModelConfig(await readConfigFile(path), path);
  const generationPath = `${folder}/generation_config.json`;
  const generation = await readIfThere(generationPath);
  if (generation === undefined) return config;
  const fields = parseConfig(generation, generationPath);
  const reader = new JsonFields(fields, `Cannot use ${generationPath}`);
  const endTokens = tokenList(reader, "eos_token_id", config.vocabulary);
  return { ...config, endTokens: endTokens ?? config.endTokens };
}

/** The bytes of a configuration file, if there is one. */
export async function readIfThere(path: string): Promise<Uint8Array<ArrayBuffer> | undefined> {
  try {
    return await readConfigFile(path);
  } catch (error) {
    if (error instanceof PackhorseError && error.code === "not-found") return undefined;
    throw error;
  }
}

/** {@linkcode readLanguageModelConfig} on the bytes of a `config.json`, whose `path` is for messages. */
export function parseLanguageModelConfig(bytes: Uint8Array, path: string): LanguageModelConfig {
  const fields = parseConfig(bytes, path);
  const config = modelFields(fields, path);
  const family = familyOf(config, path);
  const shape = parseModelConfig(bytes, path);
  const { layers, queryHeads, kvHeads, headDim } = shape;
  const rules = FAMILIES[family];
  const refuse = (what: string): never => refuseModel(path, what);
  if (!CACHE_HEAD_DIMS.includes(headDim)) {
    refuse(`its heads have ${headDim} channels, and the cache takes ${CACHE_HEAD_DIMS.join(", ")}`);
  }
  if (queryHeads > MOST_GROUP * kvHeads) {
    refuse(
      `${queryHeads / kvHeads} query heads share a kv head, and the cache takes ${MOST_GROUP}`,
    );
  }

  const activation = config.word("hidden_act") ?? "silu";
  if (activation !== "silu" && activation !== "swish") {
    refuse(`its feed-forward layers use ${activation} (hidden_act), and only silu is known`);
  }
  if (isGiven(fields.quantization_config)) {
    refuse("its weights are quantised (quantization_config); take the one in 16 or 32 bits");
  }
  const nested = (name: string) => {
    const value = fields[name];
    if (!isGiven(value)) return undefined;
    if (!isObject(value)) return config.refuse(`${name} must be an object`);
    return new JsonFields(value, `Cannot use ${path} as a model's config.json: in ${name}`);
  };
  const rotary = parseRotary(config, { headDim, path, fields: nested });
  if (rotary.dim !== headDim && !rules.partialRotary) {
    refuse(`it turns only part of a head's channels (partial_rotary_factor), unlike any ${family}`);
  }
  const vocabulary = config.count("vocab_size", 2 ** 31 - 1);
  const attentionBias = rules.biasFields?.attention === true &&
    config.flag("attention_bias", false);
  return {
    family,
    vocabulary,
    hidden: config.count("hidden_size", 2 ** 24),
    intermediate: config.count("intermediate_size", 2 ** 24),
    layers,
    queryHeads,
    kvHeads,
    headDim,
    epsilon: config.positive("rms_norm_eps", rules.epsilon),
    rotary,
    windows: parseWindows(config, layers, rules),
    contextLimit: config.count("max_position_embeddings", 2 ** 40),
    tiedEmbeddings: config.flag("tie_word_embeddings", false),
    biases: {
      queryKeyValue: rules.queryKeyValueBias === true || attentionBias,
      output: attentionBias,
      feedForward: rules.biasFields?.feedForward === true && config.flag("mlp_bias", false),
    },
    queryKeyNorms: rules.queryKeyNorms === true,
    fusedProjections: rules.fusedProjections === true,
    beginToken: tokenList(config, "bos_token_id", vocabulary)?.[0],
    endTokens: tokenList(config, "eos_token_id", vocabulary) ?? [],
    dtype: config.word("dtype") ?? config.word("torch_dtype"),
  };
}

function familyOf(config: JsonFields, path: string): LanguageModelFamily {
  const { fields } = config;
  const type = config.word("model_type");
  const names: unknown[] = Array.isArray(fields.architectures) ? fields.architectures : [];
  if (type !== undefined && Object.hasOwn(FAMILIES, type)) {
    const family = type as LanguageModelFamily;
    const { architecture } = FAMILIES[family];
    if (names.length === 0 || names.includes(architecture)) return family;
    return refuseModel(
      path,
      `it is a ${JSON.stringify(names[0])} (architectures), not a ${architecture}`,
    );
  }
  const known = Object.keys(FAMILIES).join(", ");
  const needs = type !== undefined && Object.hasOwn(NEEDS, type) ? NEEDS[type] : undefined;
  return refuseModel(
    path,
    type === undefined
      ? `it has no model_type; known are ${known}`
      : `its model_type ${JSON.stringify(type)} is none of ${known}` +
        (needs === undefined
          ? "; if its layers are those of one of these, name that one in config.json"
          : `: it would need ${needs}`),
  );
}

/** Sliding windows: of the layers that `layer_types` names, or those that the family's own fields do. */
function parseWindows(config: JsonFields, layers: number, { window }: Family): number[] {
  const { fields } = config;
  const types: unknown = fields.layer_types;
  const uses = window === "always" ||
    (window === "if-used" && config.flag("use_sliding_window", false));
  const size = config.has("sliding_window") ? config.count("sliding_window", 2 ** 31 - 1) : 0;
  if (isGiven(types)) {
    if (!Array.isArray(types) || types.length !== layers) {
      return config.refuse(`layer_types must be a list of ${layers}`);
    }
    return types.map((type) => {
      if (type !== "sliding_attention") return 0;
      return size > 0
        ? size
        : config.refuse("layer_types names sliding_attention without sliding_window");
    });
  }
  if (!uses || size === 0) return Array.from({ length: layers }, () => 0);
  // Of Qwen's models the first layers see everything.
  const first = window === "if-used"
    ? config.has("max_window_layers") ? countOrZero(config, "max_window_layers") : 28
    : 0;
  return Array.from({ length: layers }, (_, layer) => layer >= first ? size : 0);
}

function countOrZero(config: JsonFields, name: string): number {
  return config.fields[name] === 0 ? 0 : config.count(name, 2 ** 31 - 1);
}

/** A token, or a list of them, if there is one. */
function tokenList(config: JsonFields, name: string, vocabulary: number): number[] | undefined {
  const value = config.fields[name];
  if (!isGiven(value)) return undefined;
  const list: unknown[] = Array.isArray(value) ? value : [value];
  const isToken = (each: unknown): each is number => isCount(each) && each < vocabulary;
  if (list.every(isToken)) return list;
  return config.refuse(`${name} must be tokens below ${vocabulary}, got ${JSON.stringify(value)}`);
}

function refuseModel(path: string, what: string): never {
  throw new PackhorseError("unsupported", `Cannot run the model of ${path}: ${what}`);
}
