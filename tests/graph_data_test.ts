/** Data sets of graphs: the formats that are read, what is refused and where, folds, batches, and the task that is made. */
import { assert, assertEquals, assertLessOrEqual, assertThrows } from "@std/assert";
import { PackhorseError } from "../src/error.ts";
import {
  correspondenceTask,
  datasetStatistics,
  GraphBatches,
  GraphDataset,
  readGraphDataset,
  readTuDataset,
  stratifiedFolds,
} from "../src/graph/mod.ts";
import { stratifiedSplit } from "../src/graph/folds.ts";
import { Random } from "../src/graph/random.ts";
import { npyFile, npzFile } from "./graph_files.ts";
import { rejectsWith } from "./rejects_with.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

const DIGITS = ["L", "R"].map((view) =>
  new URL(`fixtures/digits/DIGITS_${view}`, import.meta.url).pathname
);

/** Two graphs: a path of 3 nodes whose second edge is given before the first, and 2 nodes with an edge one way. */
const SMALL = {
  A: "4, 5\n2, 3\n3, 2\n1, 2\n2, 1\n",
  graph_indicator: "1\n1\n1\n2\n2\n",
  graph_labels: "5\n-1\n",
  node_attributes: "0.5, 1\n1e-1,2\n.25, -3\n4, 5\n6, 7\n",
  node_labels: "2\n7\n2\n2\n7\n",
  edge_attributes: "10\n23\n32\n12\n21\n",
  edge_labels: "0\n1\n0\n1\n0\n",
};

type Files = { [Name in keyof typeof SMALL]?: string };

async function writeView(folder: TemporaryFolder, name: string, files: Files): Promise<string> {
  const path = folder.file(name);
  await Deno.mkdir(path);
  for (const [part, text] of Object.entries(files)) {
    await Deno.writeTextFile(`${path}/${name}_${part}.txt`, text);
  }
  return path;
}

/** A view in plain lists: nodes by graphs, and edges with their attributes. */
function plain(dataset: GraphDataset) {
  return dataset.views.map((view) => ({
    nodeOffsets: [...view.nodeOffsets],
    edgeOffsets: [...view.edgeOffsets],
    edges: [...view.sources].map((source, i) => [source, view.targets[i]]),
    nodeAttributes: [...view.nodes.attributes],
    nodeLabels: [...view.nodes.labels],
    edgeAttributes: [...view.edges.attributes],
    edgeLabels: [...view.edges.labels],
  }));
}

const SMALL_VIEW = {
  nodeOffsets: [0, 3, 5],
  edgeOffsets: [0, 4, 5],
  edges: [[1, 2], [2, 1], [0, 1], [1, 0], [0, 1]],
  nodeAttributes: [0.5, 1, Math.fround(0.1), 2, 0.25, -3, 4, 5, 6, 7],
  nodeLabels: [2, 7, 2, 2, 7],
  edgeAttributes: [23, 32, 12, 21, 10],
  edgeLabels: [1, 0, 1, 0, 0],
};

Deno.test("graph data: a TUDataset is read with attributes and labels, edges by graphs", async () => {
  using folder = new TemporaryFolder();
  const dataset = await readTuDataset([await writeView(folder, "DS", SMALL)]);
  assertEquals(dataset.classes, [-1, 5]);
  assertEquals(dataset.labels, Int32Array.of(1, 0));
  assertEquals(plain(dataset), [SMALL_VIEW]);
});

Deno.test("graph data: the digits that ship are as they were described", async () => {
  const digits = await readTuDataset(DIGITS);
  const { objects, classes, views } = datasetStatistics(digits);
  assertEquals(objects, 1797);
  assertEquals(classes.map(({ label }) => label), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
  assertEquals(views.map((view) => view.nodesPerGraph.mean.toFixed(1)), ["20.5", "21.2"]);
  assertEquals(views.map((view) => view.edges), [170532, 178244]);
  for (const view of views) {
    assertEquals([view.undirected, view.selfLoops, view.repeatedEdges, view.missing], [
      true,
      0,
      0,
      0,
    ]);
    assertEquals(view.nodeAttributes, 3);
  }
});

// What is wrong; the file and the line that the message must name, and a fragment of it.
const MALFORMED: [string, Files, string, string][] = [
  ["an edge across graphs", { A: "1, 2\n3, 4\n" }, "DS_A.txt: line 2", "graph 1"],
  ["a node that does not exist", { A: "1, 2\n2, 1\n1, 6\n" }, "DS_A.txt: line 3", "node 6"],
  ["node 0", { A: "0, 1\n" }, "DS_A.txt: line 1", "node 0"],
  ["half an edge", { A: "1, 2\n2\n" }, "DS_A.txt: line 2", "2 numbers"],
  ["a word for a node", { A: "1, 2\n2, x\n" }, "DS_A.txt: line 2", '"x"'],
  ["a fraction for a node", { A: "1, 2.5\n" }, "DS_A.txt: line 1", "2.5"],
  ["an empty line", { A: "1, 2\n\n2, 1\n" }, "DS_A.txt: line 2", "2 numbers"],
  ["a label that is no number", { graph_labels: "5\ncat\n" }, "graph_labels.txt: line 2", "cat"],
  ["a label too few", { graph_labels: "5\n" }, "graph_indicator.txt: line 4", "graph 2"],
  ["a label too many", { graph_labels: "5\n6\n7\n" }, "graph_indicator.txt: line 6", "graph 3"],
  ["no label", { graph_labels: "" }, "graph_labels.txt: line 1", "empty"],
  [
    "a graph without nodes",
    {
      graph_indicator: "1\n1\n1\n3\n3\n",
      graph_labels: "1\n2\n3\n",
    },
    "graph_indicator.txt: line 4",
    "graph 2 has no nodes",
  ],
  [
    "graphs out of order",
    { graph_indicator: "2\n2\n2\n1\n1\n" },
    "graph_indicator.txt: line 1",
    "graph 1",
  ],
  [
    "graphs that come back",
    { graph_indicator: "1\n2\n1\n2\n2\n" },
    "graph_indicator.txt: line 3",
    "order",
  ],
  [
    "too few attributes",
    { node_attributes: "1\n2\n3\n4\n" },
    "node_attributes.txt: line 5",
    "5 nodes",
  ],
  [
    "too many attributes",
    { node_attributes: "1\n".repeat(6) },
    "node_attributes.txt: line 6",
    "5 nodes",
  ],
  [
    "rows of attributes that differ",
    {
      node_attributes: "1, 2\n1, 2\n1\n1, 2\n1, 2\n",
    },
    "node_attributes.txt: line 3",
    "2 numbers",
  ],
  [
    "an attribute that is not a number",
    {
      node_attributes: "1\n2\nNaN\n4\n5\n",
    },
    "node_attributes.txt: line 3",
    "NaN",
  ],
  [
    "an attribute beyond float32",
    {
      node_attributes: "1\n2\n3\n1e39\n5\n",
    },
    "node_attributes.txt: line 4",
    "1e39",
  ],
  ["too few edge labels", { edge_labels: "1\n" }, "edge_labels.txt: line 2", "5 edges"],
  [
    "a node label that is no integer",
    {
      node_labels: "1\n2\n3\n4\n0x5\n",
    },
    "node_labels.txt: line 5",
    "0x5",
  ],
];

for (const [flaw, files, place, fragment] of MALFORMED) {
  Deno.test(`graph data: ${flaw} is refused by file and line`, async () => {
    using folder = new TemporaryFolder();
    const path = await writeView(folder, "DS", { ...SMALL, ...files });
    await rejectsWith(() => readTuDataset([path]), "corrupt", place, fragment);
  });
}

Deno.test("graph data: files that are missing are named", async () => {
  using folder = new TemporaryFolder();
  for (const part of ["A", "graph_indicator", "graph_labels"] as const) {
    const { [part]: _, ...files } = SMALL;
    const path = await writeView(folder, `no_${part}`, files);
    await rejectsWith(() => readTuDataset([path]), "not-found", path, `${part}.txt`);
  }
  await rejectsWith(() => readTuDataset([folder.file("nowhere")]), "not-found", "nowhere");
  const bad = await writeView(folder, "DS", SMALL);
  await Deno.remove(`${bad}/DS_A.txt`);
  await Deno.writeTextFile(`${bad}/DS_A.txt.gz`, "1, 2\n");
  await rejectsWith(() => readTuDataset([bad]), "corrupt", "DS_A.txt.gz", "gzip");
});

Deno.test("graph data: views must be of the same objects", async () => {
  using folder = new TemporaryFolder();
  const first = await writeView(folder, "DS", SMALL);
  const differs = await writeView(folder, "OTHER", { ...SMALL, graph_labels: "5\n3\n" });
  const where = "OTHER_graph_labels.txt: line 2";
  await rejectsWith(() => readTuDataset([first, differs]), "corrupt", where, "label 3", "label -1");
  const more = await writeView(folder, "MORE", {
    ...SMALL,
    graph_labels: "5\n-1\n4\n",
    graph_indicator: "1\n1\n1\n2\n3\n",
    A: "1, 2\n",
    edge_attributes: "1\n",
    edge_labels: "1\n",
  });
  const count = "MORE_graph_labels.txt: line 3";
  await rejectsWith(
    () => readTuDataset([first, more]),
    "corrupt",
    count,
    "3 graphs",
    "labels of 2",
  );
});

Deno.test("graph data: an object may lack a view, but not all", async () => {
  using folder = new TemporaryFolder();
  const first = await writeView(folder, "DS", SMALL);
  const lacks = await writeView(folder, "LACKS", { ...SMALL, graph_indicator: "2\n".repeat(5) });
  await rejectsWith(
    () => readTuDataset([first, lacks]),
    "corrupt",
    "line 1",
    "graph 1 has no nodes",
  );
  const dataset = await readTuDataset([first, lacks], { allowMissing: true });
  assertEquals([0, 1].map((object) => [0, 1].map((view) => dataset.has(view, object))), [
    [true, false],
    [true, true],
  ]);
  assertEquals(datasetStatistics(dataset).views.map(({ missing }) => missing), [0, 1]);
  const [, view] = new GraphBatches(dataset).collate([0, 1]).views;
  assertEquals(view!.nodeOffsets, Int32Array.of(0, 0, 5));
  const places = ["LACKS_graph_labels.txt: line 1", "no nodes in any view"];
  await rejectsWith(() => readTuDataset([lacks], { allowMissing: true }), "corrupt", ...places);
});

const ARRAYS = {
  "edges.npy": npyFile([3, 4, 1, 2, 2, 1, 0, 1, 1, 0], [5, 2], "<i8"),
  "graph_indicator.npy": npyFile([0, 0, 0, 1, 1], [5], "<i8"),
  "graph_labels.npy": npyFile([5, -1], [2], "<i8"),
  "node_attributes.npy": npyFile([0.5, 1, 0.1, 2, 0.25, -3, 4, 5, 6, 7], [5, 2], "<f8"),
  "node_labels.npy": npyFile([2, 7, 2, 2, 7], [5, 1], "<i8"),
  "edge_attributes.npy": npyFile([10, 23, 32, 12, 21], [5, 1], "<f8"),
  "edge_labels.npy": npyFile([0, 1, 0, 1, 0], [5], "<i8"),
};

Deno.test("graph data: .npz, .npy and JSON give what the text gives", async () => {
  using folder = new TemporaryFolder();
  const npz = await folder.write("view.npz", npzFile(ARRAYS));
  assertEquals(plain(await readGraphDataset([npz])), [SMALL_VIEW]);
  const arrays = folder.file("arrays");
  await Deno.mkdir(arrays);
  for (const [name, content] of Object.entries(ARRAYS)) {
    await Deno.writeFile(`${arrays}/${name}`, content);
  }
  assertEquals(plain(await readGraphDataset([arrays, npz])), [SMALL_VIEW, SMALL_VIEW]);
  const json = await folder.write(
    "set.json",
    JSON.stringify({
      labels: [5, -1],
      views: [{
        name: "v",
        graphs: [
          {
            nodeAttributes: [[0.5, 1], [0.1, 2], [0.25, -3]],
            nodeLabels: [[2], [7], [2]],
            edges: [[1, 2], [2, 1], [0, 1], [1, 0]],
            edgeAttributes: [[23], [32], [12], [21]],
            edgeLabels: [[1], [0], [1], [0]],
          },
          {
            nodeAttributes: [[4, 5], [6, 7]],
            nodeLabels: [[2], [7]],
            edges: [[0, 1]],
            edgeAttributes: [[10]],
            edgeLabels: [[0]],
          },
        ],
      }],
    }),
  );
  assertEquals(plain(await readGraphDataset([json])), [SMALL_VIEW]);
});

Deno.test("graph data: arrays that do not fit are refused by array and row", async () => {
  using folder = new TemporaryFolder();
  const cases: [Partial<typeof ARRAYS>, string, string][] = [
    [{ "edges.npy": npyFile([0, 1, 2, 3], [2, 2], "<i8") }, "array edges: row 1", "graph 0"],
    [{ "edges.npy": npyFile([0, 5], [1, 2], "<i8") }, "array edges: row 0", "node 5"],
    [{ "edges.npy": npyFile([0, 1, 2], [1, 3], "<i8") }, "array edges: row 0", "[1, 3]"],
    [{ "graph_labels.npy": npyFile([0.5, 1], [2], "<f8") }, "array graph_labels: row 0", "0.5"],
    [
      { "node_attributes.npy": npyFile([1, 2, NaN, 4, 5], [5], "<f8") },
      "node_attributes: row 2",
      "NaN",
    ],
    [
      { "graph_indicator.npy": npyFile([0, 0, 0, 0, 0], [5], "<i8") },
      "graph_indicator: row 5",
      "graph 1",
    ],
  ];
  for (const [arrays, place, fragment] of cases) {
    const path = await folder.write("bad.npz", npzFile({ ...ARRAYS, ...arrays }));
    await rejectsWith(() => readGraphDataset([path]), "corrupt", place, fragment);
  }
  const { "edges.npy": _, ...others } = ARRAYS;
  const incomplete = await folder.write("less.npz", npzFile(others));
  await rejectsWith(() => readGraphDataset([incomplete]), "not-found", "no array edges");
  const damaged = npzFile(ARRAYS);
  damaged[150]! ^= 1;
  const path = await folder.write("damaged.npz", damaged);
  await rejectsWith(() => readGraphDataset([path]), "corrupt", "checksum");
  const text = await folder.write(
    "set.json",
    `{"labels": [1], "views": [{"name": "v", "graphs": [{"edges": [[0, 1]], "nodes": 1}]}]}`,
  );
  await rejectsWith(() => readGraphDataset([text]), "corrupt", "set.json", "nodes 0 and 1, of 1");
  const tu = await writeView(folder, "DS", SMALL);
  await rejectsWith(() => readGraphDataset([tu, path]), "invalid-argument", "beside views");
});

Deno.test("graph data: what graphs are made of is checked", () => {
  const graph = { nodeAttributes: [[1], [2]], edges: [[0, 1]] };
  const cases: [Parameters<typeof GraphDataset.fromGraphs>[0], number[], string][] = [
    [[], [0], "at least one view"],
    [[{ name: "v", graphs: [graph] }], [0, 1], "labels of 2"],
    [[{ name: "v", graphs: [graph] }], [0.5], "0.5"],
    [[{ name: "v", graphs: [null] }], [0], "object 0 has no nodes"],
    [[{ name: "v", graphs: [{ ...graph, edges: [[0, 2]] }] }], [0], "nodes 0 and 2, of 2"],
    [[{ name: "v", graphs: [{ ...graph, edges: [[0]] }] }], [0], "two integers"],
    [[{ name: "v", graphs: [{ ...graph, nodeAttributes: [[1], [Infinity]] }] }], [0], "Infinity"],
    [[{ name: "v", graphs: [{ ...graph, nodeAttributes: [[1], [2, 3]] }] }], [0], "row 1"],
    [[{ name: "v", graphs: [graph, { nodes: 1, edges: [] }] }], [0, 1], "2 of 3"],
    [[{ name: "v", graphs: [{ edges: [] }] }], [0], "no number of nodes"],
  ];
  for (const [views, labels, fragment] of cases) {
    const error = assertThrows(() => GraphDataset.fromGraphs(views, { labels }), PackhorseError);
    assert(error.message.includes(fragment), `${error.message}: expected ${fragment}`);
  }
});

Deno.test("graph data: folds spread every class evenly, and follow from the seed", () => {
  for (let seed = 0; seed < 20; seed++) {
    const random = new Random(seed, "labels");
    const labels = Array.from({ length: 20 + random.below(80) }, () => random.below(4) ** 2);
    const folds = 2 + random.below(6);
    const dealt = stratifiedFolds(labels, { folds, seed });
    const what = `seed ${seed}`;
    assertEquals(dealt.flat().sort((a, b) => a - b), labels.map((_, i) => i), what);
    const spread = (counts: number[]) => Math.max(...counts) - Math.min(...counts);
    assertLessOrEqual(spread(dealt.map((fold) => fold.length)), 1, what);
    for (const label of new Set(labels)) {
      const counts = dealt.map((fold) => fold.filter((object) => labels[object] === label).length);
      assertLessOrEqual(spread(counts), 1, what);
    }
    assertEquals(stratifiedFolds(labels, { folds, seed }), dealt, what);
    assert(String(stratifiedFolds(labels, { folds, seed: seed + 100 })) !== String(dealt), what);
    const { kept, aside } = stratifiedSplit(dealt[0]!, labels, { share: 0.25, seed });
    assertEquals([...kept, ...aside].sort((a, b) => a - b), dealt[0], what);
    assertEquals(aside.length, Math.max(1, Math.round(dealt[0]!.length / 4)), what);
  }
  assertThrows(() => stratifiedFolds([0, 1], { folds: 3 }), PackhorseError, "2");
});

Deno.test("graph data: batches join graphs as they are, edges by targets and by sources", async () => {
  using folder = new TemporaryFolder();
  const dataset = await readTuDataset([await writeView(folder, "DS", SMALL)]);
  const { labels, views: [view] } = new GraphBatches(dataset).collate([1, 0, 1]);
  assertEquals(labels, Int32Array.of(0, 1, 0));
  assertEquals(view!.nodeOffsets, Int32Array.of(0, 2, 5, 7));
  assertEquals(view!.objectOfNode, Int32Array.of(0, 0, 1, 1, 1, 2, 2));
  // Attributes, then labels 2 and 7 one-hot.
  assertEquals([...view!.nodeFeatures.slice(0, 8)], [4, 5, 1, 0, 6, 7, 0, 1]);
  const edges = [...view!.targets].map((target, i) => [view!.sources[i], target]);
  assertEquals(edges, [[0, 1], [3, 2], [4, 3], [2, 3], [3, 4], [5, 6]]);
  assertEquals(view!.edgeOffsets, Int32Array.of(0, 0, 1, 2, 4, 5, 5, 6));
  // Attribute, then labels 0 and 1 one-hot.
  const rows = [[10, 1, 0], [21, 1, 0], [32, 1, 0], [12, 0, 1], [23, 0, 1], [10, 1, 0]];
  assertEquals([...view!.edgeFeatures], rows.flat());
  for (let node = 0; node < view!.nodes; node++) {
    for (let i = view!.outOffsets[node]!; i < view!.outOffsets[node + 1]!; i++) {
      const edge = view!.outEdges[i]!;
      assertEquals([view!.sources[edge], view!.targets[edge]], [node, view!.outTargets[i]]);
    }
  }
  assertEquals([...view!.outEdges].sort(), [0, 1, 2, 3, 4, 5]);
  const order = GraphBatches.order([3, 1, 4, 5, 9], { batchSize: 2, seed: 1 });
  assertEquals(order.map((batch) => batch.length), [2, 2, 1]);
  assertEquals(order.flat().sort(), [1, 3, 4, 5, 9]);
  assertEquals(GraphBatches.order([3, 1, 4, 5, 9], { batchSize: 2, seed: 1 }), order);
  const many = Array.from({ length: 50 }, (_, i) => i);
  const epochs = [0, 1].map((epoch) => GraphBatches.order(many, { batchSize: 50, seed: 1, epoch }));
  assert(String(epochs[0]) !== String(epochs[1]));
});

Deno.test("graph data: in the task that is made, partners tell the class and strangers do not", () => {
  const task = correspondenceTask({ objects: 200, seed: 3 });
  const { correspondence, views: [first, second], labels } = task;
  const width = first.nodes.attributeWidth;
  const parts = task.classes.length;
  let [found, guessed] = [0, 0];
  const random = new Random(1, "strangers");
  for (let object = 0; object < task.length; object++) {
    const start = first.nodeOffsets[object]!;
    const size = first.nodeOffsets[object + 1]! - start;
    /** The part whose nodes differ most in value from their partners. */
    const part = (partnerOf: (node: number) => number) => {
      const differences = new Float64Array(parts);
      for (let node = 0; node < size; node++) {
        const copy = second!.nodes.attributes.subarray((start + node) * width);
        const original = first.nodes.attributes.subarray((start + partnerOf(node)) * width);
        const own = original.subarray(width - 1 - parts, width - 1).indexOf(1);
        differences[own]! += Math.abs(copy[width - 1]! - original[width - 1]!);
      }
      return differences.indexOf(Math.max(...differences));
    };
    if (part((node) => correspondence![start + node]!) === labels[object]) found++;
    const strangers = random.shuffled(Array.from({ length: size }, (_, i) => i));
    if (part((node) => strangers[node]!) === labels[object]) guessed++;
  }
  assert(found >= 198, `${found} of 200 found`);
  assert(guessed < 90, `${guessed} of 200 guessed`);
  assertEquals(datasetStatistics(task).classes.map(({ objects }) => objects), [50, 50, 50, 50]);
  // The graphs are the same, but for the order of nodes.
  const batch = new GraphBatches(task).collate([0]);
  const degrees = batch.views.map(({ edgeOffsets }) =>
    edgeOffsets.subarray(1).map((end, i) => end - edgeOffsets[i]!)
  );
  const partners = correspondence!.subarray(0, degrees[0]!.length);
  assertEquals(degrees[1], partners.map((node) => degrees[0]![node]!));
});
