import { PackhorseError } from "../error.ts";
import { type Graph, GraphDataset } from "./dataset.ts";
import { Random } from "./random.ts";

/** Options of {@linkcode correspondenceTask}. */
export interface CorrespondenceTaskOptions {
  /** Number of objects. Default: 1000. */
  readonly objects?: number | undefined;
  /** Parts of an object, and so classes. Default: 4. */
  readonly parts?: number | undefined;
  /** Fewest and most nodes of a part. Default: 4 to 6. */
  readonly partNodes?: readonly [number, number] | undefined;
  /** Attributes by which a node is known in both views. Default: 6. */
  readonly keyWidth?: number | undefined;
  /** Standard deviation of what is added to keys and values of the second view. Default: 0.05. */
  readonly noise?: number | undefined;
  /** What everything follows from. Default: 0. */
  readonly seed?: number | undefined;
}

/**
 * Makes a data set on which the label follows from the correspondence between views, and from neither view by itself.
 *
 * A node has a key of its own (`keyWidth` attributes), the number of its part (one-hot) and a value; keys and values are
 * standard normal. Parts are rings, joined in a row. The second view is a copy with noise on keys and values, whose nodes
 * are shuffled. In one part, the label, values have changed places so that no node keeps its own: keys and values taken by
 * themselves are as before. Whoever finds a node's partner sees that its value differs.
 *
 * `correspondence` of the data set holds the partner of each node of the second view.
 *
 * Throws `invalid-argument` for sizes that are none.
 *
 * @example
 * ```ts
 * import { correspondenceTask } from "@packhorse/packhorse/graph";
 * import { assertEquals } from "@std/assert";
 *
 * const task = correspondenceTask({ objects: 8, parts: 4, seed: 1 });
 * assertEquals(task.classes, [0, 1, 2, 3]);
 * assertEquals(task.correspondence?.length, task.views[1]?.nodeOffsets.at(-1));
 * ```
 */
export function correspondenceTask(options: CorrespondenceTaskOptions = {}): GraphDataset {
  const { objects = 1000, parts = 4, partNodes = [4, 6], keyWidth = 6, noise = 0.05, seed = 0 } =
    options;
  const [fewest, most] = partNodes;
  const least = { objects: [objects, 1], parts: [parts, 2], keyWidth: [keyWidth, 1] };
  for (const [name, [value, bound]] of Object.entries(least)) {
    if (!(Number.isInteger(value) && value! >= bound!)) {
      refuse(`${name} must be an integer from ${bound} on, got ${value}`);
    }
  }
  if (!(Number.isInteger(fewest) && Number.isInteger(most) && fewest >= 2 && most >= fewest)) {
    refuse(`partNodes must be two integers from 2 on, got ${fewest} to ${most}`);
  }
  if (!(noise >= 0 && Number.isFinite(noise))) refuse(`noise must be 0 or more, got ${noise}`);
  const views: [Graph[], Graph[]] = [[], []];
  const labels: number[] = [];
  const partners: number[] = [];
  for (let object = 0; object < objects; object++) {
    const random = new Random(seed, "correspondence", object);
    // As many objects of each class, or one more.
    const label = object % parts;
    const sizes = Array.from({ length: parts }, () => fewest + random.below(most - fewest + 1));
    const starts = sizes.map((_, part) => sizes.slice(0, part).reduce((a, b) => a + b, 0));
    const partOf = sizes.flatMap((size, part) => Array<number>(size).fill(part));
    const gaussians = (count: number) => Array.from({ length: count }, () => random.gaussian());
    const keys = partOf.map(() => gaussians(keyWidth));
    const values = gaussians(partOf.length);
    // A turn by some places leaves none where it was; then the part is in an order of its own.
    const altered = [...values];
    const [start, size] = [starts[label]!, sizes[label]!];
    const turned = random.shuffled(Array.from({ length: size }, (_, i) => start + i));
    for (const [i, node] of turned.entries()) altered[node] = values[turned[(i + 1) % size]!]!;
    const noisy = (value: number) => value + noise * random.gaussian();
    const rows = (keys: number[][], values: number[]) =>
      partOf.map((part, node) => [
        ...keys[node]!,
        ...sizes.map((_, other) => Number(other === part)),
        values[node]!,
      ]);
    const edges = ringsInARow(starts, sizes);
    const copy = rows(keys.map((key) => key.map(noisy)), altered.map(noisy));
    const order = random.shuffled(partOf.map((_, node) => node));
    const placeOf = new Map(order.map((node, place) => [node, place]));
    views[0].push({ nodeAttributes: rows(keys, values), edges });
    views[1].push({
      nodeAttributes: order.map((node) => copy[node]!),
      edges: edges.map((edge) => edge.map((node) => placeOf.get(node)!)),
    });
    labels.push(label);
    partners.push(...order);
  }
  return GraphDataset.fromGraphs(
    views.map((graphs, index) => ({ name: `view${index + 1}`, graphs })),
    { labels, correspondence: Int32Array.from(partners) },
  );
}

/** Edges, in both directions, of rings whose first nodes are joined in a row. */
function ringsInARow(starts: readonly number[], sizes: readonly number[]): number[][] {
  const pairs = new Map<string, [number, number]>();
  const join = (a: number, b: number) => {
    for (const pair of [[a, b], [b, a]] as [number, number][]) pairs.set(pair.join(), pair);
  };
  starts.forEach((start, part) => {
    const size = sizes[part]!;
    for (let i = 0; i < size; i++) join(start + i, start + (i + 1) % size);
    if (part > 0) join(starts[part - 1]!, start);
  });
  return [...pairs.values()];
}

function refuse(reason: string): never {
  throw new PackhorseError("invalid-argument", `Cannot make a correspondence task: ${reason}`);
}
