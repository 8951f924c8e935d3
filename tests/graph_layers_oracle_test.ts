/**
 * Layers and readouts on every backend that opens here, against the outputs and gradients that PyTorch Geometric computed:
 * `tests/oracles/graph_layers.py`; see "source" in the fixture for its version.
 */
import { assertEquals, assertLessOrEqual } from "@std/assert";
import { Device } from "../src/device/mod.ts";
import { type DeviceView, uploadBatch } from "../src/graph/device_batch.ts";
import {
  createGraphLayer,
  type GraphLayerKind,
  Readout,
  type ReadoutKind,
  SELF_LOOPS,
} from "../src/graph/layers.ts";
import { GraphBatches, GraphDataset } from "../src/graph/mod.ts";
import { Parameters } from "../src/graph/parameters.ts";
import { Tape, type Tensor } from "../src/graph/tape.ts";
import { backends } from "./backends.ts";
import { download, Matrix, tensorOf } from "./graph_reference.ts";

type Rows = readonly (readonly number[])[];

interface Case {
  readonly parameters: Readonly<Record<string, Rows>>;
  readonly out: Rows;
  /** The gradient of a loss with respect to `out`, and those that follow for nodes and parameters. */
  readonly dout: Rows;
  readonly dx: Rows;
  readonly gradients: Readonly<Record<string, Rows>>;
}

interface Graph {
  readonly nodeAttributes: number[][];
  readonly edges: [number, number][];
  readonly edgeAttributes: number[][];
}

interface Fixture {
  readonly source: string;
  readonly graphs: readonly (Graph | null)[];
  readonly layers: readonly (Case & { readonly kind: GraphLayerKind; readonly edges: boolean })[];
  readonly readouts: readonly (Case & { readonly kind: ReadoutKind })[];
}

const { source, graphs, layers, readouts }: Fixture = JSON.parse(
  await Deno.readTextFile(new URL("fixtures/graph_layers.json", import.meta.url)),
);

/** The graphs as a data set; the other view is for objects that lack this one. */
function datasetOf(withEdges: boolean): GraphDataset {
  const own = graphs.map((graph) =>
    graph && {
      nodeAttributes: graph.nodeAttributes,
      edges: graph.edges,
      ...(withEdges ? { edgeAttributes: graph.edgeAttributes } : {}),
    }
  );
  return GraphDataset.fromGraphs([
    { name: "v", graphs: own },
    { name: "w", graphs: graphs.map(() => ({ nodes: 1, edges: [] })) },
  ], { labels: graphs.map(() => 0), allowMissing: true });
}

const nodes = matrixOf(graphs.flatMap((graph) => graph?.nodeAttributes ?? []));

function matrixOf(rows: Rows): Matrix {
  return new Matrix(rows.length, rows[0]!.length, rows.flat());
}

/** Gives what was made of `parameters` the case's, and compares what comes out and what goes back. */
function check(
  tape: Tape,
  parameters: Parameters,
  given: Case,
  forward: (x: Tensor) => Tensor,
): void {
  const values = parameters.read();
  const names = parameters.names.map(({ name }) => name.slice("l.".length));
  assertEquals(names.toSorted(), Object.keys(given.parameters).toSorted());
  for (const [i, { shape, start }] of parameters.names.entries()) {
    const { rows, columns, values: own } = matrixOf(given.parameters[names[i]!]!);
    assertEquals([rows, columns], [...shape]);
    values.parameters.set(own, start);
  }
  parameters.write(values);
  parameters.clearGradients();
  const x = tensorOf(tape, nodes);
  const out = forward(x);
  // Relative to the largest element, or to 1: sums of terms as large as that may cancel each other.
  const near = (actual: ArrayLike<number>, expected: Rows, what: string) => {
    assertEquals(actual.length, expected.flat().length, what);
    const largest = (values: number[]) => Math.max(...values.map(Math.abs));
    const error = largest(expected.flat().map((value, i) => actual[i]! - value));
    assertLessOrEqual(error / Math.max(1, largest(expected.flat())), 1e-5, `${what}: ${source}`);
  };
  near(download(out), given.out, "out");
  tape.backward(out, tensorOf(tape, matrixOf(given.dout), false));
  near(download(x, "gradient"), given.dx, "gradient of nodes");
  const gradients = parameters.buffers.gradients.download();
  for (const [i, { shape: [rows, columns], start }] of parameters.names.entries()) {
    const name = names[i]!;
    const actual = gradients.subarray(start, start + rows * columns);
    near(actual, given.gradients[name]!, `gradient of ${name}`);
  }
}

for (const backend of backends()) {
  for (const given of layers) {
    const { kind, edges } = given;
    const name = edges ? `${kind} with edge features` : kind;
    Deno.test(`graph layers: ${backend}: ${name} is what PyTorch Geometric computes`, () => {
      using device = Device.open({ backend });
      using tape = new Tape(device);
      using parameters = new Parameters();
      const layer = createGraphLayer(kind, { parameters, name: "l" }, {
        ...{ inputs: nodes.columns, outputs: given.out[0]!.length, edgeWidth: edges ? 2 : 0 },
        ...{ heads: 2, dropout: 0, activation: "tanh", normalisation: "none" },
      });
      parameters.place(device, 0);
      tape.begin({ training: true });
      const view = uploaded(tape, edges, kind);
      check(tape, parameters, given, (x) => layer.forward(tape, x, view));
    });
  }

  for (const given of readouts) {
    Deno.test(`graph readouts: ${backend}: ${given.kind} is what PyTorch Geometric computes`, () => {
      using device = Device.open({ backend });
      using tape = new Tape(device);
      using parameters = new Parameters();
      const { kind } = given;
      const readout = new Readout({ parameters, name: "l" }, { kind, width: nodes.columns });
      parameters.place(device, 0);
      tape.begin({ training: true });
      const view = uploaded(tape, false, "gin");
      check(tape, parameters, given, (x) => readout.forward(tape, x, view));
    });
  }
}

function uploaded(tape: Tape, withEdges: boolean, kind: GraphLayerKind): DeviceView {
  const batch = new GraphBatches(datasetOf(withEdges)).collate([...graphs.keys()]);
  return uploadBatch(tape, batch, { selfLoops: SELF_LOOPS[kind] }).views[0]!;
}
