import type { GraphEvaluation } from "../src/graph/mod.ts";
import { print, printTable } from "./output.ts";

/** "89.9 %" for 0.8993. */
export function formatAccuracy(accuracy: number): string {
  return `${(100 * accuracy).toFixed(1)} %`;
}

/** Prints how often each true class was taken for each. */
export function printConfusion(
  confusion: GraphEvaluation["confusion"],
  classes: readonly number[],
): void {
  print("true labels by rows, predicted ones by columns:");
  printTable(
    ["", ...classes.map((label) => `>${label}`)],
    confusion.map((
      row,
      i,
    ) => [String(classes[i]), ...row.map((times) => times === 0 ? "·" : times)]),
  );
}
