/**
 * The operations of graph models where sums are long, matrices wide or nothing at all, on every backend that opens here:
 * against double precision, and rows against themselves in a larger batch.
 */
import { assertEquals, assertLessOrEqual } from "@std/assert";
import { Device } from "../src/device/mod.ts";
import {
  activate,
  addBias,
  aggregate,
  batchNorm,
  crossEntropy,
  headDot,
  layerNorm,
  linear,
  segmentMax,
  segmentSoftmax,
} from "../src/graph/operations.ts";
import { Random } from "../src/graph/random.ts";
import { type Indices, Tape, type Tensor } from "../src/graph/tape.ts";
import { backends } from "./backends.ts";
import { download, Matrix, relativeError, tensorOf } from "./graph_reference.ts";

function test(name: string, work: (tape: Tape) => void): void {
  for (const backend of backends()) {
    Deno.test(`graph operations, large: ${backend}: ${name}`, () => {
      using device = Device.open({ backend });
      using tape = new Tape(device);
      work(tape);
    });
  }
}

/** Sums of what `of` gives for every row, by columns. */
function sumRows(rows: number, columns: number, of: (row: number, column: number) => number) {
  const sums = new Float64Array(columns);
  for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++) sums[j]! += of(i, j);
  return sums;
}

/** A bound on the error of sums of this size, relative to the largest of them. */
const TOLERANCE = 1e-5;

function assertNear(
  actual: ArrayLike<number>,
  expected: ArrayLike<number>,
  what: string,
  tolerance = TOLERANCE,
): void {
  assertLessOrEqual(relativeError(actual, expected), tolerance, what);
}

const offsetsOf = (tape: Tape, offsets: readonly number[]): Indices =>
  tape.upload({ offsets: Int32Array.from(offsets) }).offsets;

for (const [rows, width] of [[8300, 8], [65, 33], [66, 2100], [1, 4]] as const) {
  test(`norms and sums of the columns of [${rows}, ${width}]`, (tape) => {
    const random = new Random(rows);
    // Far from 0, where sums of squares would cancel.
    const x = Matrix.random(rows, width, random).map((value) => Math.fround(value + 30));
    const dy = Matrix.random(rows, width, random);
    const weight = Matrix.random(1, width, random);
    const bias = Matrix.random(1, width, random);
    const normalised = (mean: (i: number, j: number) => number, squares: Float64Array) => ({
      at: (i: number, j: number, k: number) => (x.at(i, j) - mean(i, j)) / Math.sqrt(squares[k]!),
    });

    const mean = sumRows(rows, width, (i, j) => x.at(i, j) / rows);
    const variance = sumRows(rows, width, (i, j) => (x.at(i, j) - mean[j]!) ** 2 / rows);
    const byColumn = normalised((_, j) => mean[j]!, variance.map((value) => value + 1e-5));
    const rowMean = Float64Array.from(
      { length: rows },
      (_, i) => x.values.subarray(i * width, (i + 1) * width).reduce((a, b) => a + b) / width,
    );
    const rowVariance = rowMean.map((center, i) =>
      x.values.subarray(i * width, (i + 1) * width).reduce((a, b) => a + (b - center) ** 2, 0) /
      width
    );
    const byRow = normalised((i) => rowMean[i]!, rowVariance.map((value) => value + 1e-5));

    for (const kind of ["batch", "layer"] as const) {
      tape.begin({ training: true });
      const tensors = [x, weight, bias].map((each) => tensorOf(tape, each)) as [
        Tensor,
        Tensor,
        Tensor,
      ];
      const parameters = { weight: tensors[1], bias: tensors[2] };
      const running = () => tensorOf(tape, new Matrix(1, width), false);
      const out = kind === "batch"
        ? batchNorm(tape, tensors[0], {
          ...{ ...parameters, runningMean: running(), runningVariance: running() },
        })
        : layerNorm(tape, tensors[0], parameters);
      const normal = (i: number, j: number) =>
        kind === "batch" ? byColumn.at(i, j, j) : byRow.at(i, j, i);
      const expected = Matrix.of(
        rows,
        width,
        (i, j) => normal(i, j) * weight.values[j]! + bias.values[j]!,
      );
      // x itself is rounded to a millionth of its distance from 0, which is 30 deviations.
      assertNear(download(out), expected.values, kind, 3e-5);
      tape.backward(out, tensorOf(tape, dy, false));
      const dbias = sumRows(rows, width, (i, j) => dy.at(i, j));
      const dweight = sumRows(rows, width, (i, j) => dy.at(i, j) * normal(i, j));
      assertNear(download(tensors[2], "gradient"), dbias, `${kind}: bias`);
      assertNear(download(tensors[1], "gradient"), dweight, `${kind}: weight`, 3e-5);
      const dx = kind === "batch"
        ? Matrix.of(rows, width, (i, j) =>
          weight.values[j]! / Math.sqrt(variance[j]! + 1e-5) *
          (dy.at(i, j) - (dbias[j]! + normal(i, j) * dweight[j]!) / rows))
        : (() => {
          const [total, along] = [new Float64Array(rows), new Float64Array(rows)];
          for (let i = 0; i < rows; i++) {
            for (let j = 0; j < width; j++) {
              total[i]! += dy.at(i, j) * weight.values[j]!;
              along[i]! += dy.at(i, j) * weight.values[j]! * normal(i, j);
            }
          }
          return Matrix.of(
            rows,
            width,
            (i, j) =>
              (dy.at(i, j) * weight.values[j]! - (total[i]! + normal(i, j) * along[i]!) / width) /
              Math.sqrt(rowVariance[i]! + 1e-5),
          );
        })();
      assertLessOrEqual(
        relativeError(download(tensors[0], "gradient"), dx.values),
        rows === 1 && kind === "batch" ? Infinity : 1e-4, // all of it cancels
        `${kind}: x`,
      );
    }

    tape.begin({ training: true });
    const [tensor, shift] = [tensorOf(tape, x), tensorOf(tape, bias)];
    tape.backward(addBias(tape, tensor, shift), tensorOf(tape, dy, false));
    assertNear(
      download(shift, "gradient"),
      sumRows(rows, width, (i, j) => dy.at(i, j)),
      "bias of all rows",
    );
  });
}

test("vectors of heads gather the gradients of many rows", (tape) => {
  const random = new Random(2);
  const [rows, heads, width] = [3000, 3, 8];
  const [x, a] = [Matrix.random(rows, heads * width, random), Matrix.random(1, 24, random)];
  const dy = Matrix.random(rows, heads, random);
  tape.begin({ training: true });
  const [tensor, vector] = [tensorOf(tape, x), tensorOf(tape, a)];
  tape.backward(headDot(tape, tensor, vector, heads), tensorOf(tape, dy, false));
  assertNear(
    download(vector, "gradient"),
    sumRows(rows, 24, (i, j) => dy.at(i, Math.floor(j / width)) * x.at(i, j)),
    "a",
  );
});

test("segments of many entries", (tape) => {
  const random = new Random(3);
  const offsets = [0, 3, 1003, 1003, 1004, 1200];
  for (const width of [1, 4, 6]) {
    const x = Matrix.random(1200, width, random);
    tape.begin();
    const tensor = tensorOf(tape, x, false);
    const segments = { rows: 5, offsets: offsetsOf(tape, offsets) };
    const reduce = (of: (entries: number[]) => number) =>
      Matrix.of(5, width, (i, c) => {
        const length = offsets[i + 1]! - offsets[i]!;
        return of(Array.from({ length }, (_, k) => x.at(offsets[i]! + k, c)));
      });
    const sums = aggregate(tape, tensor, {
      ...{ rows: 5, xRows: 1200, entries: 1200 },
      ...{ forward: { offsets: segments.offsets }, backward: {} },
    });
    const total = (values: number[]) => values.reduce((a, b) => a + b, 0);
    assertNear(download(sums), reduce(total).values, `sums, width ${width}`);
    assertNear(
      download(segmentMax(tape, tensor, segments)),
      reduce((values) => values.length > 0 ? Math.max(...values) : 0).values,
      `largest, width ${width}`,
    );
    const totals = reduce((values) => total(values.map(Math.exp)));
    assertNear(
      download(segmentSoftmax(tape, tensor, segments)),
      Matrix.of(
        1200,
        width,
        (i, c) => Math.exp(x.at(i, c)) / totals.at(offsets.findIndex((end) => i < end) - 1, c),
      ).values,
      `softmax, width ${width}`,
    );
  }
});

test("a row is the same bits whatever else is in the batch", (tape) => {
  const random = new Random(4);
  const [rows, few, inner, columns] = [700, 5, 90, 33];
  const all = Matrix.random(rows, inner, random);
  const weight = Matrix.random(inner, columns, random);
  const offsets = Array.from({ length: rows + 1 }, (_, i) => Math.min(3 * i, rows));
  const run = (rows: number, entries: number) => {
    tape.begin();
    const x = tensorOf(tape, new Matrix(rows, inner, all.values.subarray(0, rows * inner)));
    const y = linear(tape, x, tensorOf(tape, weight));
    const ones = Matrix.of(1, columns, () => 1);
    const norm = layerNorm(tape, y, { weight: tensorOf(tape, ones), bias: tensorOf(tape, ones) });
    const segments = { rows, offsets: offsetsOf(tape, offsets.slice(0, rows + 1)) };
    const sums = aggregate(tape, norm, {
      ...{ rows, xRows: rows, entries },
      ...{ forward: { offsets: segments.offsets }, backward: {} },
    });
    return [y, norm, activate(tape, sums, "gelu"), segmentMax(tape, norm, segments)].map((each) =>
      download(each)
    );
  };
  // Of the sums and maxima, the first row alone has all its entries in the small batch.
  const [large, small] = [run(rows, rows), run(few, few)];
  large.forEach((values, i) => {
    const length = (i < 2 ? few : 1) * columns;
    assertEquals(small[i]!.subarray(0, length), values.subarray(0, length), `output ${i}`);
  });
});

test("of nothing, sums are 0 and nothing is written", (tape) => {
  const none = (rows: number, columns: number) => tensorOf(tape, new Matrix(rows, columns));
  const some = (rows: number, columns: number) => tensorOf(tape, Matrix.of(rows, columns, () => 1));
  tape.begin({ training: true });
  const [weight, bias] = [some(3, 5), some(1, 5)];
  const hidden = linear(tape, none(0, 3), weight, bias);
  assertEquals(download(hidden).length, 0);
  const labels = offsetsOf(tape, []);
  const { loss } = crossEntropy(tape, hidden, labels, { labelled: 1 });
  assertEquals([...download(loss)], [0]);
  tape.backward(loss);
  assertEquals([...download(weight, "gradient")], new Array(15).fill(0));
  assertEquals([...download(bias, "gradient")], new Array(5).fill(0));
  assertEquals([...download(linear(tape, none(2, 0), none(0, 5), bias))], new Array(10).fill(1));
  const offsets = offsetsOf(tape, [0, 0, 0]);
  const shape = { rows: 2, xRows: 0, entries: 0, forward: { offsets }, backward: {} };
  assertEquals([...download(aggregate(tape, none(0, 3), shape))], new Array(6).fill(0));
  assertEquals([...download(segmentMax(tape, none(0, 2), { rows: 2, offsets }))], [0, 0, 0, 0]);
  assertEquals(download(segmentSoftmax(tape, none(0, 2), { rows: 2, offsets })).length, 0);
});
