/**
 * Accuracy of late fusion and AMoSL on DIGITS_L and DIGITS_R, by cross-validation with the same budget; and whether they
 * differ, by an exact paired test: how many of all ways to swap the two within folds part their means as far.
 *
 *     deno run -P=bench bench/graph_fusions.ts [SEED...]
 *
 * Folds of a seed share objects that they are trained on, so the test is a little too sure of itself.
 */
import { crossValidate, Device, readGraphDataset } from "../mod.ts";

const FOLDS = 5;
const seeds = Deno.args.length > 0 ? Deno.args.map(Number) : [0, 1, 2];
const digits = await readGraphDataset(
  ["L", "R"].map((view) =>
    new URL(`../tests/fixtures/digits/DIGITS_${view}`, import.meta.url).pathname
  ),
);
using device = Device.open();
const differences: number[] = [];
for (const seed of seeds) {
  const accuracies: number[][] = [];
  for (const fusion of ["late", "amosl"] as const) {
    const start = performance.now();
    const { accuracy, deviation, folds } = await crossValidate(device, digits, {
      ...{ folds: FOLDS, seed, model: { fusion } },
      onEpoch: (fold, { epoch, accuracy }, epochs) => {
        if (epoch === epochs) console.error(`${fusion} fold ${fold}: trained to ${accuracy}`);
      },
    });
    accuracies.push(folds.map(({ accuracy }) => accuracy));
    const seconds = (performance.now() - start) / 1000;
    console.log(
      `seed ${seed} ${fusion}: ${percent(accuracy)} ± ${percent(deviation)} ` +
        `(${folds.map(({ accuracy }) => percent(accuracy)).join(" ")}), ${seconds.toFixed(0)} s`,
    );
  }
  const [late, amosl] = accuracies as [number[], number[]];
  differences.push(...amosl.map((accuracy, fold) => accuracy - late[fold]!));
}
const sum = (values: readonly number[]) => values.reduce((a, b) => a + b, 0);
const found = Math.abs(sum(differences));
let asFar = 0;
for (let signs = 0; signs < 2 ** differences.length; signs++) {
  const swapped = differences.map((difference, i) => signs >> i & 1 ? -difference : difference);
  asFar += Number(Math.abs(sum(swapped)) >= found - 1e-12);
}
const mean = sum(differences) / differences.length;
const p = asFar / 2 ** differences.length;
console.log(
  `amosl - late: ${percent(mean)} on average over ${differences.length} folds, p = ${p.toFixed(3)}`,
);

function percent(share: number): string {
  return (100 * share).toFixed(2);
}
