import { readdir } from "node:fs/promises";
import { basename, join } from "node:path";
import { PackhorseError } from "../error.ts";
import { ioError } from "../io/io_error.ts";
import type { GraphDataset } from "./dataset.ts";
import { readTextTable, type TextTableOptions } from "./number_table.ts";
import { assembleViews, type ViewTables } from "./view_tables.ts";

/** Options of {@linkcode readTuDataset}. */
export interface TuDatasetOptions {
  /** Whether an object may have no nodes in some of the views. Default: false. */
  readonly allowMissing?: boolean | undefined;
}

/**
 * Reads a data set in the text format of the TUDatasets, from one folder for each view.
 *
 * A folder of the data set `DS` holds `DS_A.txt` (an edge a line: source, target, counted from 1 over all graphs),
 * `DS_graph_indicator.txt` (the graph of each node, in ascending order), `DS_graph_labels.txt`, and may hold
 * `DS_node_attributes.txt`, `DS_node_labels.txt`, `DS_edge_attributes.txt` and `DS_edge_labels.txt`. Any of them may be
 * compressed by gzip (`DS_A.txt.gz`). Labels must be the same in all folders.
 *
 * Throws `not-found` for a folder or file that is missing; `corrupt`, naming file and line, for an edge between graphs or
 * to a node that does not exist, a number of lines that does not fit, what is not a number, a graph without nodes, and
 * views that differ in their number of graphs or in a label; `io`.
 *
 * @example
 * ```ts
 * import { readTuDataset } from "@packhorse/packhorse/graph";
 * import { assertEquals } from "@std/assert";
 *
 * const digits = await readTuDataset([
 *   "tests/fixtures/digits/DIGITS_L",
 *   "tests/fixtures/digits/DIGITS_R",
 * ]);
 * assertEquals(digits.length, 1797);
 * assertEquals(digits.views.map(({ nodeOffsets }) => nodeOffsets.at(-1)), [36766, 38032]);
 * ```
 */
export async function readTuDataset(
  folders: readonly string[],
  options: TuDatasetOptions = {},
): Promise<GraphDataset> {
  const { allowMissing = false } = options;
  const tables = [];
  for (const folder of folders) tables.push(await readFolder(folder));
  const [first, ...others] = tables;
  if (first === undefined) {
    const message = "Cannot read a graph data set: name at least one folder";
    throw new PackhorseError("invalid-argument", message);
  }
  return assembleViews([first, ...others], allowMissing);
}

async function readFolder(folder: string): Promise<ViewTables> {
  const files = await listFiles(folder);
  const name = nameOf(folder, files);
  const find = (part: string) =>
    [`${name}_${part}.txt`, `${name}_${part}.txt.gz`].find((file) => files.has(file));
  const read = async (part: string, options: TextTableOptions) => {
    const file = find(part);
    if (file !== undefined) return await readTextTable(join(folder, file), options);
    const message = `Cannot read ${folder}: there is no ${name}_${part}.txt (or .txt.gz) in it`;
    throw new PackhorseError("not-found", message);
  };
  const readIfThere = async (part: string, kind: TextTableOptions["kind"]) =>
    find(part) === undefined ? undefined : await read(part, { kind });
  return {
    name,
    labels: await read("graph_labels", { kind: "integers", columns: 1 }),
    indicator: await read("graph_indicator", { kind: "integers", columns: 1 }),
    edges: await read("A", { kind: "integers", columns: 2 }),
    nodeAttributes: await readIfThere("node_attributes", "numbers"),
    nodeLabels: await readIfThere("node_labels", "integers"),
    edgeAttributes: await readIfThere("edge_attributes", "numbers"),
    edgeLabels: await readIfThere("edge_labels", "integers"),
  };
}

async function listFiles(folder: string): Promise<Set<string>> {
  try {
    return new Set(await readdir(folder));
  } catch (error) {
    throw ioError(`Cannot read ${folder}`, error, "folder");
  }
}

/** What the names of a folder's files begin with. */
function nameOf(folder: string, files: ReadonlySet<string>): string {
  const names = [
    ...new Set([...files].flatMap((file) => /^(.+)_A\.txt(\.gz)?$/.exec(file)?.[1] ?? [])),
  ];
  const [name] = names;
  if (name !== undefined && names.length === 1) return name;
  const own = basename(folder);
  if (names.includes(own)) return own;
  const message = name === undefined
    ? `Cannot read ${folder}: there is no ${own}_A.txt (or .txt.gz) in it`
    : `Cannot read ${folder}: it holds several data sets (${names.join(", ")})`;
  throw new PackhorseError(name === undefined ? "not-found" : "corrupt", message);
}
