import type { Device } from "../device/device.ts";
import type { DeviceBuffer } from "../device/device_buffer.ts";
import { BYTES_PER_ELEMENT, elementCount } from "../dtype.ts";
import type { FloatDType } from "../float_conversion.ts";
import { type Checkpoint, type WeightDType, weightDType, type WeightSpec } from "./checkpoint.ts";
import type { LanguageModelConfig } from "./model_config.ts";
import { RandomWeights } from "./random_weights.ts";

/** A matrix `[outputs, inputs]`, row by row. */
export type Matrix = DeviceBuffer<FloatDType>;
/** Weights of a norm, or a bias. */
export type Vector = DeviceBuffer<"f32">;

/** The weights of one layer. */
export interface LayerWeights {
  /** Of the norm before attention, `[hidden]`. */
  readonly attentionNorm: Vector;
  /** Queries, then keys, then values: `[(queryHeads + 2 * kvHeads) * headDim, hidden]`. */
  readonly queryKeyValue: Matrix;
  readonly queryKeyValueBias: Vector | undefined;
  /** Of the norms of each head of queries and keys, `[headDim]`. */
  readonly queryNorm: Vector | undefined;
  readonly keyNorm: Vector | undefined;
  /** `[hidden, queryHeads * headDim]`. */
  readonly output: Matrix;
  readonly outputBias: Vector | undefined;
  /** Of the norm before the feed-forward part, `[hidden]`. */
  readonly feedForwardNorm: Vector;
  /** Gate, then up: `[2 * intermediate, hidden]`. */
  readonly gateUp: Matrix;
  readonly gateUpBias: Vector | undefined;
  /** `[hidden, intermediate]`. */
  readonly down: Matrix;
  readonly downBias: Vector | undefined;
}

/** The weights outside the layers. */
interface OuterWeights {
  /** `[vocabulary, hidden]`. */
  readonly embedding: Matrix;
  /** Of the last norm, `[hidden]`. */
  readonly norm: Vector;
  /** `[vocabulary, hidden]`; the embedding itself, if they are tied. */
  readonly head: Matrix;
}

/** All weights of a model, on a device. */
export interface ModelWeights extends OuterWeights {
  readonly layers: readonly LayerWeights[];
  /** Type of the matrices; norms and biases are f32. */
  readonly dtype: FloatDType;
  /** Bytes that they take. */
  readonly byteLength: number;
  /** How many there are. */
  readonly parameters: number;
}

/** Tensors of the checkpoint that become one on the device, one after another. */
interface Slot {
  readonly kind: "matrix" | "vector";
  readonly parts: readonly WeightSpec[];
}

type Slots<Weights> = { readonly [Name in keyof Weights]: Slot | undefined };

/** Options of {@linkcode PlannedWeights.load}. */
export interface LoadWeightsOptions {
  /** Called with the bytes that are loaded, and how many there are. */
  readonly onProgress?: ((done: number, total: number) => void) | undefined;
  /** Stops the work. */
  readonly signal?: AbortSignal | undefined;
}

/** Weights that are known to be there, in the shapes that a model needs. */
export interface PlannedWeights {
  /** What the matrices become on the device. */
  readonly dtype: FloatDType;
  /**
   * Loads them, tensor by tensor.
   *
   * Throws as {@linkcode Checkpoint.load}, `out-of-memory`, the signal's reason; then nothing is left on the device.
   */
  load(options?: LoadWeightsOptions): Promise<ModelWeights & Disposable>;
}

/** Finds the weights of a model in a checkpoint. Throws as {@linkcode Checkpoint.check}. */
export function planWeights(
  device: Device,
  checkpoint: Checkpoint,
  config: LanguageModelConfig,
  asked?: WeightDType,
): PlannedWeights {
  const slots = modelSlots(config);
  checkpoint.check(slots.specs, (name) => isSpare(name, config));
  // One type for all: what a GPU multiplies must have the same.
  const projection = slots.layers[0]!.queryKeyValue!.parts[0]!.name;
  const dtype = weightDType(device, checkpoint.dtypeOf(projection), asked);
  return {
    dtype,
    load(options = {}) {
      const { signal } = options;
      const source: WeightSource = {
        byteLength: ({ name, shape }) =>
          elementCount(shape) * BYTES_PER_ELEMENT[checkpoint.dtypeOf(name)],
        load: ({ name }, target) => checkpoint.load(name, target, signal),
      };
      return loadModel(device, slots, { dtype, source, options });
    },
  };
}

/** Random weights for a model, which compute numbers of ordinary size: to measure speed. */
export function planRandomWeights(
  device: Device,
  config: LanguageModelConfig,
  asked?: WeightDType,
): PlannedWeights {
  const slots = modelSlots(config);
  const dtype = weightDType(device, "bf16", asked);
  return {
    dtype,
    async load(options = {}) {
      using source = new RandomWeights(device);
      return await loadModel(device, slots, { dtype, source, options });
    },
  };
}

/** Where weights come from. */
interface WeightSource {
  /** Bytes that a tensor takes there. */
  byteLength(spec: WeightSpec): number;
  /** Copies it to the device. */
  load(spec: WeightSpec, target: Matrix): Promise<void>;
}

/** All slots of a model. */
interface ModelSlots {
  readonly outer: ReturnType<typeof outerSlots>;
  readonly layers: readonly Slots<LayerWeights>[];
  /** The tensors of all. */
  readonly specs: readonly WeightSpec[];
}

function modelSlots(config: LanguageModelConfig): ModelSlots {
  const outer = outerSlots(config);
  const layers = Array.from({ length: config.layers }, (_, layer) => layerSlots(config, layer));
  const specs = [outer, ...layers].flatMap((slots) =>
    Object.values(slots).flatMap((slot: Slot | undefined) => slot?.parts ?? [])
  );
  return { outer, layers, specs };
}

async function loadModel(
  device: Device,
  { outer, layers, specs }: ModelSlots,
  { dtype, source, options: { onProgress } }: {
    dtype: FloatDType;
    source: WeightSource;
    options: LoadWeightsOptions;
  },
): Promise<ModelWeights & Disposable> {
  using stack = new DisposableStack();
  const total = sum(specs, (spec) => source.byteLength(spec));
  let [done, byteLength, parameters] = [0, 0, 0];
  const loadSlot = async ({ kind, parts }: Slot): Promise<Matrix> => {
    const elements = sum(parts, ({ shape }) => elementCount(shape));
    const buffer: Matrix = stack.use(
      device.createBuffer(kind === "vector" ? "f32" : dtype, elements),
    );
    let first = 0;
    for (const spec of parts) {
      const count = elementCount(spec.shape);
      await source.load(spec, buffer.view(first, count));
      first += count;
      done += source.byteLength(spec);
      onProgress?.(done, total);
    }
    byteLength += buffer.byteLength;
    parameters += elements;
    return buffer;
  };
  const load = async <Weights>(slots: Slots<Weights>): Promise<Weights> => {
    const loaded: Record<string, Matrix | undefined> = {};
    for (const [name, slot] of Object.entries<Slot | undefined>(slots)) {
      loaded[name] = slot === undefined ? undefined : await loadSlot(slot);
    }
    return loaded as Weights;
  };
  const { embedding, norm, head } = await load(outer);
  const loadedLayers: LayerWeights[] = [];
  for (const slots of layers) loadedLayers.push(await load(slots));
  const owner = stack.move();
  return {
    ...{ embedding, norm, head: head ?? embedding, layers: loadedLayers },
    ...{ dtype, byteLength, parameters },
    [Symbol.dispose]: () => owner.dispose(),
  };
}

function outerSlots(
  { vocabulary, hidden, tiedEmbeddings }: LanguageModelConfig,
): Slots<Omit<OuterWeights, "head"> & { readonly head: Matrix | undefined }> {
  return {
    embedding: matrix(["model.embed_tokens.weight", vocabulary, hidden]),
    norm: vector(["model.norm.weight", hidden]),
    head: tiedEmbeddings ? undefined : matrix(["lm_head.weight", vocabulary, hidden]),
  };
}

function layerSlots(config: LanguageModelConfig, layer: number): Slots<LayerWeights> {
  const { hidden, intermediate, queryHeads, kvHeads, headDim, biases } = config;
  const [queries, keys] = [queryHeads * headDim, kvHeads * headDim];
  const at = (name: string) => `model.layers.${layer}.${name}`;
  const queryKeyValue: [string, number][] = config.fusedProjections
    ? [[at("self_attn.qkv_proj"), queries + 2 * keys]]
    : [
      [at("self_attn.q_proj"), queries],
      [at("self_attn.k_proj"), keys],
      [at("self_attn.v_proj"), keys],
    ];
  const gateUp: [string, number][] = config.fusedProjections
    ? [[at("mlp.gate_up_proj"), 2 * intermediate]]
    : [[at("mlp.gate_proj"), intermediate], [at("mlp.up_proj"), intermediate]];
  const weights = (projections: [string, number][], inputs: number) =>
    matrix(...projections.map(([name, outputs]): Named => [`${name}.weight`, outputs, inputs]));
  const biasesOf = (projections: [string, number][], has: boolean) =>
    has ? vector(...projections.map(([name, size]): Named => [`${name}.bias`, size])) : undefined;
  const headNorm = (name: string) =>
    config.queryKeyNorms ? vector([at(`self_attn.${name}.weight`), headDim]) : undefined;
  const output: [string, number][] = [[at("self_attn.o_proj"), hidden]];
  const down: [string, number][] = [[at("mlp.down_proj"), hidden]];
  return {
    attentionNorm: vector([at("input_layernorm.weight"), hidden]),
    queryKeyValue: weights(queryKeyValue, hidden),
    queryKeyValueBias: biasesOf(queryKeyValue, biases.queryKeyValue),
    queryNorm: headNorm("q_norm"),
    keyNorm: headNorm("k_norm"),
    output: weights(output, queries),
    outputBias: biasesOf(output, biases.output),
    feedForwardNorm: vector([at("post_attention_layernorm.weight"), hidden]),
    gateUp: weights(gateUp, hidden),
    gateUpBias: biasesOf(gateUp, biases.feedForward),
    down: weights(down, intermediate),
    downBias: biasesOf(down, biases.feedForward),
  };
}

/** Whether a checkpoint may have a tensor that is not used: what is computed anyway, or the copy of a tied embedding. */
function isSpare(name: string, { tiedEmbeddings }: LanguageModelConfig): boolean {
  return name.endsWith(".rotary_emb.inv_freq") || (tiedEmbeddings && name === "lm_head.weight");
}

type Named = [name: string, ...shape: number[]];

function matrix(...tensors: Named[]): Slot {
  return { kind: "matrix", parts: tensors.map(([name, ...shape]) => ({ name, shape })) };
}

function vector(...tensors: Named[]): Slot {
  return { kind: "vector", parts: tensors.map(([name, ...shape]) => ({ name, shape })) };
}

function sum<T>(list: readonly T[], of: (each: T) => number): number {
  return list.reduce((total, each) => total + of(each), 0);
}
