/**
 * A language model in plain double precision, one token after another, written from the formulas of transformers'
 * modelling code and independent of `src/`: what the runner is compared with.
 */
import { join } from "node:path";
import { decodeBits } from "./kv_cache_reference.ts";

/** A tensor as doubles. */
interface Values {
  readonly shape: readonly number[];
  readonly data: Float64Array;
}

type Json = Record<string, unknown>;

/** The tensors of a `.safetensors` file, read without `src/io`. */
function readTensors(path: string, tensors: Map<string, Values>): void {
  const bytes = Deno.readFileSync(path);
  const headerBytes = Number(new DataView(bytes.buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + headerBytes)));
  for (const [name, entry] of Object.entries<Json>(header)) {
    if (name === "__metadata__") continue;
    const [begin, end] = entry.data_offsets as [number, number];
    const data = bytes.slice(8 + headerBytes + begin, 8 + headerBytes + end).buffer;
    const values = entry.dtype === "F32"
      ? Float64Array.from(new Float32Array(data))
      : entry.dtype === "F16"
      ? Float64Array.from(new Float16Array(data))
      : decodeBits("bf16", new Uint16Array(data));
    tensors.set(name, { shape: entry.shape as number[], data: Float64Array.from(values) });
  }
}

/** `ROPE_INIT_FUNCTIONS` of transformers, for sequences of up to `tokens` tokens. */
function inverseFrequencies(config: Json, headDim: number, tokens: number) {
  const scaling = { ...(config.rope_scaling as Json ?? {}), ...(config.rope_parameters as Json) };
  const type = scaling.rope_type ?? scaling.type ?? "default";
  const base = (scaling.rope_theta ?? config.rope_theta ?? 10000) as number;
  const share = (scaling.partial_rotary_factor ?? config.partial_rotary_factor ?? 1) as number;
  const dim = Math.trunc(headDim * share);
  const limit = config.max_position_embeddings as number;
  const powers = (of: number) =>
    Array.from({ length: dim / 2 }, (_, i) => Math.pow(of, (2 * i) / dim));
  const plain = powers(base).map((power) => 1 / power);
  const factor = scaling.factor as number;
  const original = (scaling.original_max_position_embeddings ??
    config.original_max_position_embeddings ?? limit) as number;
  if (type === "linear") return { dim, inverse: plain.map((f) => f / factor), attention: 1 };
  if (type === "dynamic") {
    const length = Math.max(tokens, limit);
    const stretched = base * Math.pow(factor * length / limit - (factor - 1), dim / (dim - 2));
    return { dim, inverse: powers(stretched).map((power) => 1 / power), attention: 1 };
  }
  if (type === "llama3") {
    const [low, high] = [scaling.low_freq_factor as number, scaling.high_freq_factor as number];
    const inverse = plain.map((f) => {
      const wavelength = 2 * Math.PI / f;
      if (wavelength > original / low) return f / factor;
      if (wavelength < original / high) return f;
      const smooth = (original / wavelength - low) / (high - low);
      return (1 - smooth) * f / factor + smooth * f;
    });
    return { dim, inverse, attention: 1 };
  }
  if (type === "yarn") {
    const correction = (rotations: number) =>
      dim * Math.log(original / (rotations * 2 * Math.PI)) / (2 * Math.log(base));
    const low = Math.max(Math.floor(correction((scaling.beta_fast ?? 32) as number)), 0);
    const high = Math.min(Math.ceil(correction((scaling.beta_slow ?? 1) as number)), dim - 1);
    const inverse = plain.map((f, i) => {
      const extrapolation = 1 -
        Math.max(0, Math.min(1, (i - low) / (high === low ? 0.001 : high - low)));
      return (f / factor) * (1 - extrapolation) + f * extrapolation;
    });
    return {
      dim,
      inverse,
      attention: (scaling.attention_factor ?? 0.1 * Math.log(factor) + 1) as number,
    };
  }
  if (type === "longrope" || type === "su") {
    const factors = (tokens > original ? scaling.long_factor : scaling.short_factor) as number[];
    const stretch = limit / original;
    const attention = stretch <= 1 ? 1 : Math.sqrt(1 + Math.log(stretch) / Math.log(original));
    return {
      dim,
      inverse: powers(base).map((power, i) => 1 / (factors[i]! * power)),
      attention: (scaling.attention_factor ?? attention) as number,
    };
  }
  return { dim, inverse: plain, attention: 1 };
}

/** A model of a Hugging Face folder. */
export class ReferenceModel {
  readonly #config: Json;
  readonly #tensors = new Map<string, Values>();
  readonly #tokens: number;
  readonly #store: (x: Float64Array) => Float64Array;

  /**
   * `tokens`: how long sequences may get, which some rotary embeddings depend on. `cache`: type that keys and values are
   * rounded to.
   */
  constructor(folder: string, tokens: number, cache?: "f16") {
    this.#tokens = tokens;
    this.#store = (x) => cache === undefined ? x : Float64Array.from(new Float16Array(x));
    this.#config = JSON.parse(Deno.readTextFileSync(join(folder, "config.json")));
    const files = new Set<string>(["model.safetensors"]);
    try {
      const index = JSON.parse(
        Deno.readTextFileSync(join(folder, "model.safetensors.index.json")),
      );
      files.clear();
      for (const file of Object.values<string>(index.weight_map)) files.add(file);
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) throw error;
    }
    for (const file of files) readTensors(join(folder, file), this.#tensors);
  }

  /** Logits of every token, `[tokens][vocabulary]`. */
  logits(tokens: readonly number[]): Float64Array[] {
    const config = this.#config;
    const number = (name: string, instead?: number) => (config[name] ?? instead) as number;
    const layers = number("num_hidden_layers");
    const queryHeads = number("num_attention_heads");
    const kvHeads = number("num_key_value_heads", queryHeads);
    const hidden = number("hidden_size");
    const headDim = number("head_dim", hidden / queryHeads);
    const epsilon = number("rms_norm_eps", config.model_type === "phi3" ? 1e-5 : 1e-6);
    const { dim, inverse, attention } = inverseFrequencies(config, headDim, this.#tokens);
    const rows = tokens.map((token) =>
      this.#of("model.embed_tokens.weight").data.slice(token * hidden, (token + 1) * hidden)
    );
    for (let layer = 0; layer < layers; layer++) {
      const at = (name: string) => `model.layers.${layer}.${name}`;
      const normed = rows.map((row) => this.#norm(row, at("input_layernorm.weight"), epsilon));
      const split = normed.map((row, position) => {
        const [q, k, v] = this.#tensors.has(at("self_attn.qkv_proj.weight"))
          ? cut(this.#project(row, at("self_attn.qkv_proj")), [
            queryHeads * headDim,
            kvHeads * headDim,
            kvHeads * headDim,
          ])
          : ["q", "k", "v"].map((name) => this.#project(row, at(`self_attn.${name}_proj`)));
        const turn = (all: Float64Array, norm: string) =>
          cut(all, Array(all.length / headDim).fill(headDim)).map((head) => {
            const name = at(`self_attn.${norm}.weight`);
            const x = this.#tensors.has(name) ? this.#norm(head, name, epsilon) : head;
            return rotate(x, { position, dim, inverse, attention });
          });
        return {
          queries: turn(q!, "q_norm"),
          keys: turn(k!, "k_norm").map(this.#store),
          values: cut(v!, Array(kvHeads).fill(headDim)).map(this.#store),
        };
      });
      const window = this.#window(layer);
      rows.forEach((row, position) => {
        const first = window === 0 ? 0 : Math.max(0, position - window + 1);
        const attended = new Float64Array(queryHeads * headDim);
        for (let head = 0; head < queryHeads; head++) {
          const group = Math.floor(head / (queryHeads / kvHeads));
          const scores = [];
          for (let t = first; t <= position; t++) {
            scores.push(
              dot(split[position]!.queries[head]!, split[t]!.keys[group]!) / Math.sqrt(headDim),
            );
          }
          const most = Math.max(...scores);
          const weights = scores.map((score) => Math.exp(score - most));
          const total = weights.reduce((sum, weight) => sum + weight, 0);
          weights.forEach((weight, i) => {
            const value = split[first + i]!.values[group]!;
            for (let c = 0; c < headDim; c++) {
              attended[head * headDim + c]! += weight / total * value[c]!;
            }
          });
        }
        increase(row, this.#project(attended, at("self_attn.o_proj")));
      });
      for (const row of rows) {
        const x = this.#norm(row, at("post_attention_layernorm.weight"), epsilon);
        const fused = at("mlp.gate_up_proj");
        const intermediate = number("intermediate_size");
        const [gate, up] = this.#tensors.has(`${fused}.weight`)
          ? cut(this.#project(x, fused), [intermediate, intermediate])
          : [this.#project(x, at("mlp.gate_proj")), this.#project(x, at("mlp.up_proj"))];
        const activated = gate!.map((g, i) => g / (1 + Math.exp(-g)) * up![i]!);
        increase(row, this.#project(activated, at("mlp.down_proj")));
      }
    }
    const head = config.tie_word_embeddings === true ? "model.embed_tokens" : "lm_head";
    return rows.map((row) => this.#project(this.#norm(row, "model.norm.weight", epsilon), head));
  }

  /** How many tokens a layer's tokens see, themselves included; 0 for all. */
  #window(layer: number): number {
    const { model_type: type, sliding_window: size, layer_types: types } = this.#config;
    if (typeof size !== "number") return 0;
    if (Array.isArray(types)) return types[layer] === "sliding_attention" ? size : 0;
    if (type === "mistral" || type === "phi3") return size;
    if (this.#config.use_sliding_window !== true) return 0;
    return layer >= (this.#config.max_window_layers as number) ? size : 0;
  }

  #project(x: Float64Array, name: string): Float64Array {
    const { shape: [outputs, inputs], data } = this.#of(`${name}.weight`);
    const bias = this.#tensors.get(`${name}.bias`)?.data;
    const out = new Float64Array(outputs!);
    for (let o = 0; o < outputs!; o++) {
      let sum = bias?.[o] ?? 0;
      for (let i = 0, at = o * inputs!; i < inputs!; i++) sum += x[i]! * data[at + i]!;
      out[o] = sum;
    }
    return out;
  }

  #norm(x: Float64Array, name: string, epsilon: number): Float64Array {
    const { data } = this.#of(name);
    const scale = 1 / Math.sqrt(dot(x, x) / x.length + epsilon);
    return x.map((value, i) => value * scale * data[i]!);
  }

  #of(name: string): Values {
    const values = this.#tensors.get(name);
    if (values === undefined) throw new Error(`the checkpoint has no ${name}`);
    return values;
  }
}

/** `x * cos + rotate_half(x) * sin` on the first `dim` channels. */
function rotate(
  x: Float64Array,
  { position, dim, inverse, attention }: {
    position: number;
    dim: number;
    inverse: readonly number[];
    attention: number;
  },
): Float64Array {
  const out = x.slice();
  const half = dim / 2;
  for (let i = 0; i < dim; i++) {
    const angle = position * inverse[i % half]!;
    const other = i < half ? -x[i + half]! : x[i - half]!;
    out[i] = attention * (x[i]! * Math.cos(angle) + other * Math.sin(angle));
  }
  return out;
}

function cut(x: Float64Array, sizes: readonly number[]): Float64Array[] {
  let first = 0;
  return sizes.map((size) => x.slice(first, first += size));
}

function dot(a: Float64Array, b: Float64Array): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i]! * b[i]!;
  return sum;
}

function increase(x: Float64Array, by: Float64Array): void {
  for (let i = 0; i < x.length; i++) x[i]! += by[i]!;
}
