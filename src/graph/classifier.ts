import type { Device } from "../device/device.ts";
import { PackhorseError } from "../error.ts";
import { isObject } from "../io/untrusted_json.ts";
import { type CheckpointContent, CheckpointReader, writeCheckpoint } from "./checkpoint.ts";
import { isInteger32 } from "./dataset.ts";
import type { GraphLayerKind, Normalisation, ReadoutKind } from "./layers.ts";
import { GraphNetwork } from "./network.ts";
import type { TransportGradient, TransportPenalty } from "./amosl_fusion.ts";
import type { Activation } from "./operations.ts";
import type { GraphSchema } from "./schema.ts";

/** How the views of an object come together. */
export type FusionKind = "single" | "early" | "late" | "amosl";

/** Options of a {@linkcode GraphClassifier}. */
export interface GraphModelOptions {
  /**
   * How views come together: `single` uses one of them; `early` makes one graph of them all, whose parts are not joined,
   * with one encoder; `late` gives each an encoder, and puts the results side by side; `amosl` also finds which nodes of
   * the views correspond, by optimal transport that is learned along, and tells them of each other. Default: `late`, or
   * `single` where there is one view.
   */
  readonly fusion?: FusionKind | undefined;
  /** Which view `single` uses. Default: 0. */
  readonly view?: number | undefined;
  /** Kind of the layers. Default: gin. */
  readonly layer?: GraphLayerKind | undefined;
  /** Layers of an encoder. Default: 3. */
  readonly layers?: number | undefined;
  /** Columns of a node's embedding. Default: 64. */
  readonly width?: number | undefined;
  /** How nodes become one row for each object. Default: sum. */
  readonly readout?: ReadoutKind | undefined;
  /** Default: relu. */
  readonly activation?: Activation | undefined;
  /** Default: batch. */
  readonly normalisation?: Normalisation | undefined;
  /** Heads of gat. Default: 4. */
  readonly heads?: number | undefined;
  /** Probability with which an element is left out while training: after each layer. Default: 0. */
  readonly dropout?: number | undefined;
  /** The same, before the last linear layer. Default: 0.2. */
  readonly headDropout?: number | undefined;
  /**
   * Of amosl: the weight of the entropy of a plan, in units of what it costs on average to match two nodes at random. Default:
   * 0.05.
   */
  readonly epsilon?: number | undefined;
  /** Of amosl: how the loss reaches the embeddings through the plans. Default: implicit. */
  readonly gradient?: TransportGradient | undefined;
  /** Of amosl: what is added to the loss so that the views agree. Default: learned. */
  readonly penalty?: TransportPenalty | undefined;
  /** Of amosl: which views are compared: all with each other, or the first with each. Default: all. */
  readonly pairs?: "all" | "star" | undefined;
  /**
   * Of amosl: what it costs to match two nodes: the squared distance of their projections, or 1 less the cosine of the angle
   * between them. Default: sqeuclidean.
   */
  readonly cost?: "sqeuclidean" | "cosine" | undefined;
  /** What the first values of parameters follow from. Default: 0. */
  readonly seed?: number | undefined;
}

/** The network of a classifier, for this folder. */
export let networkOf: (model: GraphClassifier) => GraphNetwork;

/** The classifier that owns a network, for this folder. */
export let adoptNetwork: (network: GraphNetwork) => GraphClassifier;

/** Tells apart classes of objects that are seen as graphs; {@linkcode train} makes one, {@linkcode predict} asks it. */
export class GraphClassifier implements Disposable {
  readonly #network: GraphNetwork;

  private constructor(network: GraphNetwork) {
    this.#network = network;
  }

  static {
    networkOf = (model) => model.#network;
    adoptNetwork = (network) => new GraphClassifier(network);
  }

  /** The device that it is on. */
  get device(): Device {
    return this.#network.device;
  }

  /** What it was made for. */
  get schema(): GraphSchema {
    return this.#network.schema;
  }

  /** What it is made of; nothing is left open. */
  get options(): Required<GraphModelOptions> {
    return this.#network.options;
  }

  /** Number of its parameters. */
  get parameterCount(): number {
    return this.#network.parameters.size;
  }

  /** Writes the model to a `.safetensors` file, which appears complete or not at all. Throws as files do. */
  async save(path: string): Promise<void> {
    await saveNetwork(this.#network, path);
  }

  /**
   * Reads a model from a file that {@linkcode save} wrote, or {@linkcode train}; a checkpoint of a training run that
   * looks for its best epoch gives the best one's parameters. Throws as files do, and `corrupt` for another kind of file.
   */
  static async load(device: Device, path: string): Promise<GraphClassifier> {
    using file = await CheckpointReader.open(path);
    const schema = parseSchema(file);
    const network = makeNetwork(file, schema, file.require("model"));
    file.check(network.parameters.names); // before memory is taken for them
    network.place(device);
    try {
      const { parameters, state } = network.parameters.read();
      const lengths = { parameters: parameters.length, state: state.length };
      const isBest = file.has("best.parameters");
      network.parameters.write(
        isBest
          ? {
            parameters: await file.list("best.parameters", lengths.parameters),
            state: await file.list("best.state", lengths.state),
          }
          : await file.values(network.parameters.names, lengths),
      );
      return new GraphClassifier(network);
    } catch (error) {
      network[Symbol.dispose]();
      throw error;
    }
  }

  /** Frees the memory of the parameters. */
  [Symbol.dispose](): void {
    this.#network[Symbol.dispose]();
  }
}

/** The network that a file describes; what is wrong with the options is the file's fault. */
function makeNetwork(
  file: CheckpointReader,
  schema: GraphSchema,
  options: GraphModelOptions,
): GraphNetwork {
  try {
    return new GraphNetwork(schema, options);
  } catch (error) {
    if (!(error instanceof PackhorseError) || error.code !== "invalid-argument") throw error;
    return file.refuse(error.message);
  }
}

/** Writes a network, and what else a checkpoint holds. */
export async function saveNetwork(
  { schema, options, parameters }: GraphNetwork,
  path: string,
  more: Partial<Omit<CheckpointContent, "values">> = {},
): Promise<void> {
  await writeCheckpoint(path, parameters.names, {
    documents: { schema, model: options, ...more.documents },
    values: parameters.read(),
    lists: more.lists,
  });
}

/** The schema in a file; it is untrusted. */
function parseSchema(file: CheckpointReader): GraphSchema {
  const { views, classes } = file.require("schema");
  const isCount = (value: unknown) => isInteger32(value) && value >= 0 && value <= 2 ** 20;
  const isColumns = (value: unknown) =>
    isObject(value) && isCount(value.attributes) && Array.isArray(value.labelValues) &&
    value.labelValues.every((values) => Array.isArray(values) && values.every(isInteger32));
  const isView = (value: unknown) =>
    isObject(value) && typeof value.name === "string" && isColumns(value.nodes) &&
    isColumns(value.edges);
  const isGood = Array.isArray(views) && views.length > 0 && views.every(isView) &&
    Array.isArray(classes) && classes.length > 0 && classes.every(isInteger32);
  return isGood
    ? { views: views as GraphSchema["views"], classes }
    : file.refuse("its schema is none of a graph model");
}
