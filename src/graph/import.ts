import { readdir, stat } from "node:fs/promises";
import { basename, join } from "node:path";
import { PackhorseError } from "../error.ts";
import { InputFile } from "../io/input_file.ts";
import { ioError } from "../io/io_error.ts";
import { type NpyNumbers, readNpyNumbers } from "../io/npy.ts";
import { readNpz } from "../io/npz.ts";
import { isObject, parseJsonObject } from "../io/untrusted_json.ts";
import { type Graph, GraphDataset, isInteger32 } from "./dataset.ts";
import { type NumberTable, refuseRow } from "./number_table.ts";
import { readTuDataset, type TuDatasetOptions } from "./tu_dataset.ts";
import { assembleViews, type ViewTables } from "./view_tables.ts";

/**
 * Reads a data set in whichever form it is: one folder for each view, of a TUDataset ({@linkcode readTuDataset}) or of
 * `.npy` files; one `.npz` file for each view; or one `.json` file.
 *
 * Arrays of a view are `edges` `[edges, 2]`, `graph_indicator` `[nodes]`, `graph_labels` `[graphs]`, and if there are any
 * `node_attributes`, `node_labels`, `edge_attributes`, `edge_labels`; nodes and graphs count from 0, nodes over all graphs.
 *
 * A JSON file is `{ "labels": […], "views": [{ "name": …, "graphs": […] }] }`, whose graphs are those of
 * {@linkcode GraphDataset.fromGraphs}.
 *
 * Throws as {@linkcode readTuDataset}, with the row of an array, counted from 0, in place of the line.
 *
 * @example
 * ```ts
 * import { readGraphDataset } from "@packhorse/packhorse/graph";
 * import { assertEquals } from "@std/assert";
 *
 * const path = await Deno.makeTempFile({ suffix: ".json" });
 * await Deno.writeTextFile(path, JSON.stringify({
 *   labels: [0, 1],
 *   views: [{ name: "rings", graphs: [{ nodes: 1, edges: [] }, { nodes: 2, edges: [[0, 1], [1, 0]] }] }],
 * }));
 * assertEquals((await readGraphDataset([path])).length, 2);
 * ```
 */
export async function readGraphDataset(
  paths: readonly string[],
  options: TuDatasetOptions = {},
): Promise<GraphDataset> {
  const { allowMissing = false } = options;
  const [only] = paths;
  if (paths.length === 1 && only!.endsWith(".json")) return await readJson(only!, allowMissing);
  const isTu = [];
  for (const path of paths) isTu.push(await isTuFolder(path));
  if (isTu.every((is) => is)) return await readTuDataset(paths, options);
  const tables: ViewTables[] = [];
  for (const path of paths) {
    if (path.endsWith(".json") || isTu[tables.length]) {
      const message = `Cannot read ${path} beside views of another form: ` +
        "name folders of TUDatasets, or folders of .npy and .npz files, or one .json file";
      throw new PackhorseError("invalid-argument", message);
    }
    tables.push(await readArrays(path));
  }
  const [first, ...others] = tables;
  return assembleViews([first!, ...others], allowMissing);
}

/** Whether a path is that of a folder without arrays. */
async function isTuFolder(path: string): Promise<boolean> {
  try {
    if (!(await stat(path)).isDirectory()) return false;
    return !(await readdir(path)).includes("edges.npy");
  } catch (error) {
    throw ioError(`Cannot read ${path}`, error);
  }
}

const ARRAYS = {
  edges: "edges",
  indicator: "graph_indicator",
  labels: "graph_labels",
  nodeAttributes: "node_attributes",
  nodeLabels: "node_labels",
  edgeAttributes: "edge_attributes",
  edgeLabels: "edge_labels",
} as const;
const REQUIRED: readonly string[] = ["edges", "indicator", "labels"];

async function readArrays(path: string): Promise<ViewTables> {
  const read = await arraysOf(path);
  const tables: Partial<Record<keyof typeof ARRAYS, NumberTable>> = {};
  for (const [part, name] of Object.entries(ARRAYS)) {
    const array = read.get(name);
    if (array !== undefined) {
      const of = part as keyof typeof ARRAYS;
      tables[of] = tableOf(array, { path: `${path}, array ${name}`, part: of });
    } else if (REQUIRED.includes(part)) {
      throw new PackhorseError("not-found", `Cannot read ${path}: there is no array ${name} in it`);
    }
  }
  const name = basename(path).replace(/\.npz$/, "");
  return { name, ...tables } as ViewTables;
}

async function arraysOf(path: string): Promise<Map<string, NpyNumbers>> {
  if (path.endsWith(".npz")) return await readNpz(path);
  const arrays = new Map<string, NpyNumbers>();
  if (!(await stat(path)).isDirectory()) {
    const message = `Cannot read ${path} as graphs: name a folder, or a file .json or .npz`;
    throw new PackhorseError("unsupported", message);
  }
  const files = await readdir(path);
  for (const name of Object.values(ARRAYS)) {
    if (!files.includes(`${name}.npy`)) continue;
    const at = join(path, `${name}.npy`);
    using file = await InputFile.open(at);
    arrays.set(name, await readNpyNumbers(file, at));
  }
  return arrays;
}

function tableOf(
  { shape, values }: NpyNumbers,
  { path, part }: { path: string; part: keyof typeof ARRAYS },
): NumberTable {
  const rows = shape[0] ?? 1;
  const columns = shape[1] ?? 1;
  const place = { path, unit: "row", base: 0 };
  const expected = part === "edges" ? 2 : part === "indicator" || part === "labels" ? 1 : columns;
  if (shape.length < 1 || shape.length > 2 || columns !== expected) {
    refuseRow(place, 0, `its shape is [${shape.join(", ")}], expected [rows, ${expected}]`);
  }
  const isInteger = !part.endsWith("Attributes");
  const bad = values.findIndex((value) =>
    isInteger ? !isInteger32(value) : !Number.isFinite(Math.fround(value))
  );
  if (bad >= 0) {
    const what = isInteger ? "an integer" : "a finite number";
    refuseRow(place, Math.floor(bad / columns), `expected ${what}, got ${values[bad]}`);
  }
  return { ...place, rows, columns, values };
}

async function readJson(path: string, allowMissing: boolean): Promise<GraphDataset> {
  using file = await InputFile.open(path);
  const content = parseJsonObject(await file.read(0, file.size), `Cannot read ${path}: it`);
  const fail = (reason: string): never => {
    throw new PackhorseError("corrupt", `Cannot read ${path}: ${reason}`);
  };
  const { labels, views } = content;
  if (!isNumbers(labels)) return fail("labels must be a list of integers");
  if (!Array.isArray(views) || views.length === 0) {
    return fail("views must be a list of at least one");
  }
  const read = views.map((view: unknown, index) => {
    if (!isObject(view) || typeof view.name !== "string" || !Array.isArray(view.graphs)) {
      return fail(`view ${index} must have a name and a list of graphs`);
    }
    const { name } = view;
    return {
      name,
      graphs: view.graphs.map((graph: unknown, object) => {
        const flaw = flawOf(graph);
        return flaw === undefined
          ? graph as Graph | null
          : fail(`graph ${object} of view ${name}: ${flaw}`);
      }),
    };
  });
  try {
    return GraphDataset.fromGraphs(read, { labels, allowMissing });
  } catch (cause) {
    if (!(cause instanceof PackhorseError)) throw cause;
    const reason = cause.message.replace(/^Cannot make a graph data set: /, "");
    throw new PackhorseError("corrupt", `Cannot read ${path}: ${reason}`, { cause });
  }
}

const isNumbers = (value: unknown): value is number[] =>
  Array.isArray(value) && value.every((each) => typeof each === "number");

/** What keeps a JSON value from being a graph, or null for one that an object lacks. */
function flawOf(graph: unknown): string | undefined {
  if (graph === null) return undefined;
  if (!isObject(graph)) return "it must be an object, or null where an object lacks the view";
  const { nodes, edges, ...rows } = graph;
  if (nodes !== undefined && !(isInteger32(nodes) && nodes >= 1)) return "nodes must be 1 or more";
  for (const [name, value] of Object.entries({ edges, ...rows })) {
    if (!["edges", "nodeAttributes", "nodeLabels", "edgeAttributes", "edgeLabels"].includes(name)) {
      return `it has the unknown entry ${name}`;
    }
    if (!Array.isArray(value) || !value.every(isNumbers)) {
      return `${name} must be a list of lists of numbers`;
    }
  }
  for (const [of, count] of [["node", nodes], ["edge", (edges as unknown[]).length]] as const) {
    for (const name of [`${of}Attributes`, `${of}Labels`]) {
      const given = rows[name] as unknown[] | undefined;
      if (given === undefined || count === undefined || given.length === count) continue;
      return `${name} has ${given.length} rows, there are ${count} ${of}s`;
    }
  }
  return undefined;
}
