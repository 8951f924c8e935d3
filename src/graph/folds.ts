import { PackhorseError } from "../error.ts";
import { Random } from "./random.ts";

/** Options of {@linkcode stratifiedFolds}. */
export interface FoldOptions {
  /** Number of folds, from 2 on. */
  readonly folds: number;
  /** What the folds follow from. Default: 0. */
  readonly seed?: number | undefined;
}

/**
 * Deals objects into folds, so that each class is spread evenly: neither the sizes of folds nor a class's shares of them
 * differ by more than one. Returns the objects of each fold, in ascending order.
 *
 * Throws `invalid-argument` if there are fewer than 2 folds, or fewer objects than folds.
 *
 * @example
 * ```ts
 * import { stratifiedFolds } from "@packhorse/packhorse/graph";
 * import { assertEquals } from "@std/assert";
 *
 * const folds = stratifiedFolds([0, 0, 1, 1, 0, 1], { folds: 3, seed: 1 });
 * assertEquals(folds.flat().sort(), [0, 1, 2, 3, 4, 5]);
 * assertEquals(folds.map((fold) => fold.length), [2, 2, 2]);
 * ```
 */
export function stratifiedFolds(labels: ArrayLike<number>, options: FoldOptions): number[][] {
  const { folds, seed = 0 } = options;
  if (!(Number.isInteger(folds) && folds >= 2 && folds <= labels.length)) {
    const message = `Cannot make ${folds} folds of ${labels.length} objects: ` +
      "folds must be an integer from 2 to the number of objects";
    throw new PackhorseError("invalid-argument", message);
  }
  const dealt: number[][] = Array.from({ length: folds }, () => []);
  // Where one class ends, the next goes on, so that sizes stay even.
  let next = 0;
  for (const objects of byClass(labels)) {
    for (const object of new Random(seed, "folds", labels[objects[0]!]!).shuffled(objects)) {
      dealt[next++ % folds]!.push(object);
    }
  }
  return dealt.map((fold) => fold.sort((a, b) => a - b));
}

/** Takes a share of the objects aside, of each class alike; at least one object stays, and one goes if the share is above 0. */
export function stratifiedSplit(
  objects: readonly number[],
  labels: ArrayLike<number>,
  { share, seed = 0 }: { readonly share: number; readonly seed?: number | undefined },
): { readonly kept: number[]; readonly aside: number[] } {
  const wanted = share === 0
    ? 0
    : Math.min(objects.length - 1, Math.max(1, Math.round(share * objects.length)));
  // Every class in an order of its own; then the objects by how far they are in the order of their class.
  const places = byClass(Array.from(objects, (object) => labels[object]!)).flatMap((indices) => {
    const random = new Random(seed, "split", labels[objects[indices[0]!]!]!);
    return random.shuffled(indices).map((index, at) => ({
      object: objects[index]!,
      place: (at + random.uniform()) / indices.length,
    }));
  }).sort((a, b) => a.place - b.place);
  const ascending = (part: typeof places) => part.map(({ object }) => object).sort((a, b) => a - b);
  return { aside: ascending(places.slice(0, wanted)), kept: ascending(places.slice(wanted)) };
}

/** The indices of each label, labels in ascending order. */
function byClass(labels: ArrayLike<number>): number[][] {
  const classes = new Map<number, number[]>();
  for (let i = 0; i < labels.length; i++) {
    const label = labels[i]!;
    classes.get(label)?.push(i) ?? classes.set(label, [i]);
  }
  return [...classes].sort(([a], [b]) => a - b).map(([, indices]) => indices);
}
