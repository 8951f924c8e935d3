/**
 * Bytes of device memory that a training step of late fusion and AMoSL takes, by the number of objects and the size of their
 * graphs: `deno run -A bench/graph_memory.ts [--backend cuda]`. Prints a Markdown table. These are exact counts: of what the
 * step's tensors take, and of what is allocated beside them, at its peak. Parameters and their moments are not counted, nor
 * what transport holds for itself on a GPU (28 bytes an object).
 *
 * @module
 */
import { parseArgs } from "node:util";
import { type Backend, Device } from "../src/device/mod.ts";
import { nativeOf } from "../src/device/device.ts";
import { type FusionKind, type GraphBatches, GraphDataset } from "../src/graph/mod.ts";
import { GraphNetwork, totalLoss } from "../src/graph/network.ts";
import { crossEntropy } from "../src/graph/operations.ts";
import { Adam } from "../src/graph/parameters.ts";
import { schemaOf } from "../src/graph/schema.ts";
import { Tape } from "../src/graph/tape.ts";
import { printHeadings, printRow } from "./gpu/measure.ts";

/** What {@linkcode measureStep} is told. */
export interface StepOptions {
  readonly fusion: FusionKind;
  readonly objects: number;
  /** Nodes of each graph, in both views. */
  readonly nodes: number;
  /** Default: 64. */
  readonly width?: number;
}

/** Bytes of a step. */
export interface StepMemory {
  /** That its tensors take. */
  readonly tensors: number;
  /** That are allocated beside, at most. */
  readonly beside: number;
  /** That the tape holds for tensors, in the next step too. */
  readonly held: number;
}

/** Measures a training step of all objects at once. */
export function measureStep(device: Device, options: StepOptions): StepMemory {
  const { fusion, width = 64 } = options;
  const dataset = ringsOf(options);
  using network = new GraphNetwork(schemaOf(dataset), { fusion, width, seed: 1 }).place(device);
  using adam = new Adam(network.parameters);
  using tape = new Tape(device);
  const batches = network.batches(dataset);
  // The first step finds out how much there is to take.
  runStep(tape, network, batches);
  adam.step(1e-3);
  tape.begin({ training: true });
  using allocations = new Allocations(device);
  runStep(tape, network, batches);
  return { tensors: tape.usedByteLength, beside: allocations.peak, held: tape.byteLength };
}

function runStep(tape: Tape, network: GraphNetwork, batches: GraphBatches): void {
  tape.begin({ training: true });
  network.parameters.clearGradients();
  const objects = [...batches.dataset.labels.keys()];
  const batch = network.upload(tape, batches.collate(objects));
  const { logits, fused } = network.forward(tape, batch);
  const { loss } = crossEntropy(tape, logits, batch.labels, { labelled: batch.labelled });
  tape.backward(totalLoss(tape, loss, fused.penalty));
}

/** Objects whose views are rings, each node with its place on the ring. */
function ringsOf({ objects, nodes }: StepOptions): GraphDataset {
  const ring = {
    nodeAttributes: Array.from({ length: nodes }, (_, node) => {
      const angle = 2 * Math.PI * node / nodes;
      return [Math.cos(angle), Math.sin(angle)];
    }),
    edges: Array.from({ length: nodes }, (_, node) => {
      const next = (node + 1) % nodes;
      return [[node, next], [next, node]];
    }).flat(),
  };
  const graphs = Array.from({ length: objects }, () => ring);
  return GraphDataset.fromGraphs(["left", "right"].map((name) => ({ name, graphs })), {
    labels: graphs.map((_, object) => object % 2),
  });
}

/** Counts the bytes of buffers that are there at once, of those that are made while it lives. */
class Allocations implements Disposable {
  peak = 0;
  readonly #restore: () => void;

  constructor(device: Device) {
    const native = nativeOf(device);
    const create = native.createBuffer;
    let bytes = 0;
    native.createBuffer = (byteLength) => {
      const buffer = create.call(native, byteLength);
      bytes += byteLength;
      this.peak = Math.max(this.peak, bytes);
      const close = buffer.close;
      buffer.close = () => {
        if (!buffer.isClosed) bytes -= byteLength;
        close.call(buffer);
      };
      return buffer;
    };
    this.#restore = () => native.createBuffer = create;
  }

  [Symbol.dispose](): void {
    this.#restore();
  }
}

if (import.meta.main) {
  const { values: flags } = parseArgs({ options: { backend: { type: "string", default: "cpu" } } });
  using device = Device.open({ backend: flags.backend as Backend });
  const sizes = [[16, 20], [32, 20], [64, 20], [128, 20], [128, 40], [64, 80], [32, 160], [8, 320]];
  printHeadings(
    ...[">objects", ">nodes of a graph", ">nodes", ">entries of plans"],
    ...[">late fusion, MB", ">bytes a node", ">AMoSL, MB", ">bytes a node"],
  );
  for (const [objects, nodes] of sizes as [number, number][]) {
    const all = 2 * objects * nodes;
    const cells = (["late", "amosl"] as const).flatMap((fusion) => {
      const { tensors, beside } = measureStep(device, { fusion, objects, nodes });
      return [((tensors + beside) / 1e6).toFixed(2), ((tensors + beside) / all).toFixed(0)];
    });
    printRow(...[objects, nodes, all, objects * nodes ** 2].map(String), ...cells);
  }
}
