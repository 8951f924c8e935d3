/**
 * Layers on every backend that opens here, against the outputs that `tests/oracles/graph_layers.py` computed: see "source" in
 * the fixture for what with.
 */
import { assertEquals, assertLessOrEqual } from "@std/assert";
import { Device } from "../src/device/mod.ts";
import { uploadBatch } from "../src/graph/device_batch.ts";
import { createGraphLayer, type GraphLayerKind } from "../src/graph/layers.ts";
import { GraphBatches, GraphDataset } from "../src/graph/mod.ts";
import { Parameters } from "../src/graph/parameters.ts";
import { Tape } from "../src/graph/tape.ts";
import { backends } from "./backends.ts";
import { download, Matrix, relativeError, tensorOf } from "./graph_reference.ts";

interface Fixture {
  readonly source: string;
  readonly edges: [number, number][];
  readonly x: number[][];
  readonly layers: Readonly<
    Record<GraphLayerKind, { parameters: Record<string, number[][]>; out: number[][] }>
  >;
}

const { source, edges, x, layers }: Fixture = JSON.parse(
  await Deno.readTextFile(new URL("fixtures/graph_layers.json", import.meta.url)),
);
const OUTPUTS = 8;

for (const backend of backends()) {
  for (const [kind, { parameters: given, out: expected }] of Object.entries(layers)) {
    Deno.test(`graph layers: ${backend}: ${kind} is what the oracle computes`, () => {
      using device = Device.open({ backend });
      using tape = new Tape(device);
      using parameters = new Parameters();
      const layer = createGraphLayer(kind as GraphLayerKind, { parameters, name: "l" }, {
        ...{ inputs: x[0]!.length, outputs: OUTPUTS, edgeWidth: 0, heads: 2, dropout: 0 },
        ...{ activation: "tanh", normalisation: "none" },
      });
      parameters.place(device, 0);
      const values = parameters.read();
      assertEquals(
        parameters.names.map(({ name }) => name).toSorted(),
        Object.keys(given).map((name) => `l.${name}`).toSorted(),
      );
      for (const { name, shape, start } of parameters.names) {
        const matrix = given[name.slice("l.".length)]!;
        assertEquals([matrix.length, matrix[0]!.length], [...shape]);
        values.parameters.set(matrix.flat(), start);
      }
      parameters.write(values);
      const graph = { nodes: x.length, nodeAttributes: x, edges };
      const dataset = GraphDataset.fromGraphs([{ name: "v", graphs: [graph] }], { labels: [0] });
      tape.begin();
      const batch = uploadBatch(tape, new GraphBatches(dataset).collate([0]), {
        selfLoops: kind === "gat",
      });
      const nodes = tensorOf(tape, new Matrix(x.length, x[0]!.length, x.flat()));
      const out = download(layer.forward(tape, nodes, batch.views[0]!));
      assertLessOrEqual(relativeError(out, expected.flat()), 1e-5, source);
    });
  }
}
