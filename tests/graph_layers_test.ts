/**
 * Layers and readouts on every backend that has them, against their formulas in double precision: values, and gradients
 * with respect to nodes and parameters against central differences.
 */
import { assertEquals, assertLessOrEqual } from "@std/assert";
import { Device } from "../src/device/mod.ts";
import { GraphBatches, GraphDataset } from "../src/graph/mod.ts";
import { uploadBatch } from "../src/graph/device_batch.ts";
import {
  createGraphLayer,
  type GraphLayerKind,
  Readout,
  type ReadoutKind,
  SELF_LOOPS,
} from "../src/graph/layers.ts";
import { Parameters } from "../src/graph/parameters.ts";
import { Random } from "../src/graph/random.ts";
import { Tape } from "../src/graph/tape.ts";
import { backends } from "./backends.ts";
import {
  centralDifferences,
  download,
  Matrix,
  relativeError,
  tensorOf,
} from "./graph_reference.ts";

type Inputs = Readonly<Record<string, Matrix>>;

/** Graphs at random, of which the second has one node, and the third none where objects may lack the view. */
function randomDataset(
  random: Random,
  { edgeWidth, mayLack }: { edgeWidth: number; mayLack: boolean },
) {
  const graphs = [5, 1, mayLack ? 0 : 3, 6].map((nodes) => {
    if (nodes === 0) return null;
    const edges = Array.from(
      { length: 2 * nodes - 2 },
      () => [random.below(nodes), random.below(nodes)],
    )
      .filter(([source, target]) => source !== target);
    return {
      nodeAttributes: Array.from(
        { length: nodes },
        () => [random.gaussian(), random.gaussian(), random.gaussian()].map(Math.fround),
      ),
      edges,
      ...(edgeWidth === 0 ? {} : {
        edgeAttributes: edges.map(() =>
          Array.from({ length: edgeWidth }, () => Math.fround(random.gaussian()))
        ),
      }),
    };
  });
  return GraphDataset.fromGraphs([
    { name: "v", graphs },
    { name: "w", graphs: graphs.map(() => ({ nodes: 1, edges: [] })) },
  ], { labels: [0, 1, 0, 1], allowMissing: mayLack }).select([0]);
}

interface Edge {
  readonly source: number;
  readonly target: number;
  readonly features: readonly number[];
}

/** The graphs of a data set as one, in plain lists. */
function plainGraph(dataset: GraphDataset) {
  const [view] = dataset.views;
  const nodes = view.nodeOffsets.at(-1)!;
  const width = view.edges.attributeWidth;
  const edges: Edge[] = [];
  for (let object = 0; object < dataset.length; object++) {
    for (let edge = view.edgeOffsets[object]!; edge < view.edgeOffsets[object + 1]!; edge++) {
      edges.push({
        source: view.nodeOffsets[object]! + view.sources[edge]!,
        target: view.nodeOffsets[object]! + view.targets[edge]!,
        features: [...view.edges.attributes.subarray(edge * width, (edge + 1) * width)],
      });
    }
  }
  const x = new Matrix(nodes, view.nodes.attributeWidth, view.nodes.attributes);
  return { nodes, edges, x, offsets: [...view.nodeOffsets] };
}

type Plain = ReturnType<typeof plainGraph>;

const plus = (x: Matrix, bias: Matrix) =>
  Matrix.of(x.rows, x.columns, (i, j) => x.at(i, j) + bias.values[j]!);
const linear = (x: Matrix, inputs: Inputs, name: string) =>
  plus(x.times(inputs[`${name}.weight`]!), inputs[`${name}.bias`]!);

/** Sums of rows over the edges into each node. */
function sumInto(
  graph: Plain,
  columns: number,
  of: (edge: Edge, column: number) => number,
): Matrix {
  const sums = new Matrix(graph.nodes, columns);
  for (const edge of graph.edges) {
    for (let c = 0; c < columns; c++) sums.values[edge.target * columns + c]! += of(edge, c);
  }
  return sums;
}

const REFERENCES: Readonly<Record<GraphLayerKind, (graph: Plain, inputs: Inputs) => Matrix>> = {
  gcn(graph, inputs) {
    const { x } = inputs as { x: Matrix };
    const degree = sumInto(graph, 1, () => 1).map((count) => count + 1).values;
    const sums = sumInto(
      graph,
      x.columns,
      ({ source, target }, c) => x.at(source, c) / Math.sqrt(degree[source]! * degree[target]!),
    );
    return linear(
      Matrix.of(x.rows, x.columns, (i, c) => sums.at(i, c) + x.at(i, c) / degree[i]!),
      inputs,
      "l",
    );
  },
  sage(graph, inputs) {
    const { x } = inputs as { x: Matrix };
    const degree = sumInto(graph, 1, () => 1).values;
    const sums = sumInto(graph, x.columns, ({ source }, c) => x.at(source, c));
    const mean = Matrix.of(x.rows, x.columns, (i, c) => sums.at(i, c) / Math.max(degree[i]!, 1));
    const own = x.times(inputs["l.self.weight"]!);
    const of = linear(mean, inputs, "l.neighbours");
    return Matrix.of(of.rows, of.columns, (i, c) => of.at(i, c) + own.at(i, c));
  },
  gin(graph, inputs) {
    const { x } = inputs as { x: Matrix };
    const weight = inputs["l.edges.weight"];
    const message = ({ source, features }: Edge, c: number) => {
      if (!weight) return x.at(source, c);
      let sum = x.at(source, c) + inputs["l.edges.bias"]!.values[c]!;
      features.forEach((value, k) => sum += value * weight.at(k, c));
      return Math.max(sum, 0);
    };
    const sums = sumInto(graph, x.columns, message);
    const hidden = linear(
      Matrix.of(x.rows, x.columns, (i, c) => x.at(i, c) + sums.at(i, c)),
      inputs,
      "l.first",
    );
    return linear(hidden.map(Math.tanh), inputs, "l.second");
  },
  gat(graph, inputs) {
    const { x } = inputs as { x: Matrix };
    const values = x.times(inputs["l.linear.weight"]!);
    const [heads, width] = [2, values.columns / 2];
    const loops = Array.from({ length: graph.nodes }, (_, node): Edge => {
      const into = graph.edges.filter(({ target }) => target === node);
      const features = (graph.edges[0]?.features ?? []).map((_, k) =>
        into.reduce((sum, edge) => sum + edge.features[k]!, 0) / Math.max(into.length, 1)
      );
      return { source: node, target: node, features };
    });
    const all = { ...graph, edges: [...graph.edges, ...loops] };
    const weight = inputs["l.edges.weight"];
    const scores = all.edges.map(({ source, target, features }) =>
      Array.from({ length: heads }, (_, h) => {
        let score = 0;
        for (let c = h * width; c < (h + 1) * width; c++) {
          score += values.at(target, c) * inputs["l.attention_target"]!.values[c]! +
            values.at(source, c) * inputs["l.attention_source"]!.values[c]!;
          features.forEach((value, k) => {
            if (weight) score += value * weight.at(k, c) * inputs["l.attention_edge"]!.values[c]!;
          });
        }
        return Math.exp(score > 0 ? score : 0.2 * score);
      })
    );
    const totals = new Matrix(graph.nodes, heads);
    all.edges.forEach(({ target }, e) =>
      scores[e]!.forEach((value, h) => totals.values[target * heads + h]! += value)
    );
    const scoreOf = new Map(all.edges.map((edge, e) => [edge, scores[e]!]));
    const out = sumInto(all, values.columns, (edge, c) => {
      const h = Math.floor(c / width);
      return scoreOf.get(edge)![h]! / totals.at(edge.target, h) * values.at(edge.source, c);
    });
    return plus(out, inputs["l.bias"]!);
  },
};

for (const backend of backends()) {
  for (const kind of Object.keys(REFERENCES) as GraphLayerKind[]) {
    for (const edgeWidth of kind === "gin" || kind === "gat" ? [0, 2] : [0]) {
      Deno.test(`graph layers: ${backend}: ${kind}${edgeWidth > 0 ? " with edge features" : ""} is its formula`, () => {
        using device = Device.open({ backend });
        using tape = new Tape(device);
        const random = new Random(4, kind, edgeWidth);
        const dataset = randomDataset(random, { edgeWidth, mayLack: false });
        const graph = plainGraph(dataset);
        using parameters = new Parameters();
        const layer = createGraphLayer(kind, { parameters, name: "l" }, {
          ...{ inputs: 3, outputs: 4, edgeWidth, heads: 2, dropout: 0 },
          ...{ activation: "tanh", normalisation: "none" },
        });
        parameters.place(device, 5);
        // Biases that begin with 0 would hide a mistake.
        const start = parameters.read();
        start.parameters.forEach((value, i) =>
          start.parameters[i] = value + 0.1 * random.gaussian()
        );
        parameters.write(start);
        const values = parameters.read().parameters;
        const inputs: Record<string, Matrix> = { x: graph.x };
        for (const { name, shape: [rows, columns], start } of parameters.names) {
          inputs[name] = new Matrix(rows, columns, values.subarray(start, start + rows * columns));
        }
        tape.begin({ training: true });
        parameters.clearGradients();
        const batches = new GraphBatches(dataset);
        const batch = uploadBatch(tape, batches.collate([0, 1, 2, 3]), {
          selfLoops: SELF_LOOPS[kind],
        });
        const x = tensorOf(tape, graph.x);
        const out = layer.forward(tape, x, batch.views[0]!);
        const reference = (inputs: Inputs) => REFERENCES[kind](graph, inputs);
        assertLessOrEqual(relativeError(download(out), reference(inputs).values), 1e-5, "value");
        const weights = Matrix.random(graph.nodes, 4, random);
        tape.backward(out, tensorOf(tape, weights, false));
        const loss = (inputs: Inputs) =>
          reference(inputs).values.reduce((sum, value, i) => sum + value * weights.values[i]!, 0);
        const gradients = parameters.buffers.gradients.download();
        for (const { name, shape: [rows, columns], start } of parameters.names) {
          const actual = gradients.subarray(start, start + rows * columns);
          const error = relativeError(actual, centralDifferences(inputs, name, loss));
          assertLessOrEqual(error, 1e-4, `gradient of ${name}`);
        }
        const dx = centralDifferences(inputs, "x", loss);
        assertLessOrEqual(relativeError(download(x, "gradient"), dx), 1e-4, "gradient of x");
      });
    }
  }

  Deno.test(`graph layers: ${backend}: readouts are what they say, and zeros of nothing`, () => {
    using device = Device.open({ backend });
    using tape = new Tape(device);
    const random = new Random(6);
    const dataset = randomDataset(random, { edgeWidth: 0, mayLack: true });
    const { offsets, nodes } = plainGraph(dataset);
    const x = Matrix.random(nodes, 5, random);
    const rowsOf = (object: number) =>
      Array.from(
        { length: offsets[object + 1]! - offsets[object]! },
        (_, i) => offsets[object]! + i,
      );
    const sum = (values: number[]) => values.reduce((a, b) => a + b, 0);
    const references: Readonly<
      Record<ReadoutKind, (inputs: Inputs, object: number, c: number) => number>
    > = {
      sum: ({ x }, object, c) => sum(rowsOf(object).map((i) => x!.at(i, c))),
      mean: ({ x }, object, c) =>
        sum(rowsOf(object).map((i) => x!.at(i, c))) / Math.max(rowsOf(object).length, 1),
      max: ({ x }, object, c) =>
        rowsOf(object).length === 0 ? 0 : Math.max(...rowsOf(object).map((i) => x!.at(i, c))),
      attention: ({ x, weight }, object, c) => {
        const scores = rowsOf(object).map((i) =>
          Math.exp(sum(Array.from({ length: 5 }, (_, k) => x!.at(i, k) * weight!.values[k]!)))
        );
        return sum(rowsOf(object).map((i, k) => scores[k]! * x!.at(i, c))) /
          Math.max(sum(scores), 1e-30);
      },
    };
    for (const [kind, of] of Object.entries(references) as [ReadoutKind, typeof references.sum][]) {
      using parameters = new Parameters();
      const readout = new Readout({ parameters, name: "r" }, { kind, width: 5 });
      parameters.place(device, 7);
      parameters.clearGradients();
      tape.begin({ training: true });
      const { views: [view] } = uploadBatch(tape, new GraphBatches(dataset).collate([0, 1, 2, 3]));
      const tensor = tensorOf(tape, x);
      const out = readout.forward(tape, tensor, view!);
      const inputs = { x, weight: new Matrix(5, 1, parameters.read().parameters.slice(0, 5)) };
      const reference = (inputs: Inputs) => Matrix.of(4, 5, (i, c) => of(inputs, i, c));
      assertLessOrEqual(relativeError(download(out), reference(inputs).values), 1e-5, kind);
      assertEquals(
        [...download(out)].slice(10, 15),
        [0, 0, 0, 0, 0],
        `${kind} of an object without nodes`,
      );
      const weights = Matrix.random(4, 5, random);
      tape.backward(out, tensorOf(tape, weights, false));
      const dx = centralDifferences(
        inputs,
        "x",
        (inputs) =>
          reference(inputs).values.reduce((sum, value, i) => sum + value * weights.values[i]!, 0),
      );
      assertLessOrEqual(relativeError(download(tensor, "gradient"), dx), 1e-4, `${kind}: gradient`);
    }
  });
}
