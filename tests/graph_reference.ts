/** What graph models compute, in double precision and plain loops; and gradients by central differences. */
import { assertLessOrEqual } from "@std/assert";
import { add } from "../src/graph/operations.ts";
import { type Tape, Tensor } from "../src/graph/tape.ts";
import type { Random } from "../src/graph/random.ts";

/** A matrix in double precision. */
export class Matrix {
  readonly values: Float64Array;

  constructor(readonly rows: number, readonly columns: number, values?: ArrayLike<number>) {
    this.values = values ? Float64Array.from(values) : new Float64Array(rows * columns);
  }

  at(row: number, column: number): number {
    return this.values[row * this.columns + column]!;
  }

  /** The matrix of what `of` gives for each row and column. */
  static of(rows: number, columns: number, of: (row: number, column: number) => number): Matrix {
    const values = Array.from(
      { length: rows * columns },
      (_, i) => of(Math.floor(i / columns), i % columns),
    );
    return new Matrix(rows, columns, values);
  }

  /** Numbers that float32 holds, none nearer to 0 than a hundredth. */
  static random(rows: number, columns: number, random: Random): Matrix {
    return Matrix.of(rows, columns, () => {
      const value = random.gaussian();
      return Math.fround(value + 0.01 * Math.sign(value));
    });
  }

  times(other: Matrix): Matrix {
    return Matrix.of(this.rows, other.columns, (row, column) => {
      let sum = 0;
      for (let k = 0; k < this.columns; k++) sum += this.at(row, k) * other.at(k, column);
      return sum;
    });
  }

  map(of: (value: number) => number): Matrix {
    return new Matrix(this.rows, this.columns, this.values.map(of));
  }
}

type Inputs = Readonly<Record<string, Matrix>>;

/** Copies a tensor, or its gradient, to the host. */
export function download(tensor: Tensor, part: "value" | "gradient" = "value"): Float64Array {
  const place = part === "value" ? tensor.place : tensor.gradient!;
  const bytes = new Uint8Array(4 * tensor.count);
  if (bytes.length > 0) place.buffer.download(bytes, place.byteOffset);
  return Float64Array.from(new Float32Array(bytes.buffer));
}

/** The largest difference of two arrays, relative to the largest element of the second. */
export function relativeError(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  let [difference, magnitude] = [0, 1e-30];
  for (let i = 0; i < expected.length; i++) {
    const each = Math.abs(actual[i]! - expected[i]!);
    difference = Math.max(difference, Number.isNaN(each) ? Infinity : each);
    magnitude = Math.max(magnitude, Math.abs(expected[i]!));
  }
  return actual.length === expected.length ? difference / magnitude : Infinity;
}

/** Central differences of `loss`, with respect to every element of an input. */
export function centralDifferences(
  inputs: Inputs,
  name: string,
  loss: (inputs: Inputs) => number,
): Float64Array {
  const input = inputs[name]!;
  return input.values.map((value, i) => {
    const step = 1e-5 * Math.max(1, Math.abs(value));
    const shifted = (by: number) => {
      const moved = new Matrix(input.rows, input.columns, input.values);
      moved.values[i] = value + by;
      return loss({ ...inputs, [name]: moved });
    };
    return (shifted(step) - shifted(-step)) / (2 * step);
  });
}

/** Options of {@linkcode checkOperation}. */
export interface OperationCheck {
  readonly inputs: Inputs;
  /** Inputs that have no gradient. Default: none. */
  readonly constants?: readonly string[];
  readonly native: (tape: Tape, tensors: Readonly<Record<string, Tensor>>) => Tensor;
  readonly reference: (inputs: Inputs) => Matrix;
  readonly random: Random;
  readonly what: string;
}

/** A matrix as a tensor of the step. */
export function tensorOf(tape: Tape, matrix: Matrix, needsGradient = true): Tensor {
  const { values } = tape.upload({ values: Float32Array.from(matrix.values) });
  const { rows, columns } = matrix;
  return new Tensor(values, { rows, columns }, { needed: needsGradient });
}

/** Asserts that an operation is its reference, and that its gradients are the reference's central differences. */
export function checkOperation(tape: Tape, check: OperationCheck): void {
  const { inputs, constants = [], native, reference, random, what } = check;
  const expected = reference(inputs);
  const weights = Matrix.random(expected.rows, expected.columns, random);
  const loss = (inputs: Inputs) =>
    reference(inputs).values.reduce((sum, value, i) => sum + value * weights.values[i]!, 0);
  const gradients = Object.keys(inputs).filter((name) => !constants.includes(name))
    .map((name) => [name, centralDifferences(inputs, name, loss)] as const);
  // Used twice, an input's second gradient is added to the first.
  for (const uses of [1, 2]) {
    tape.begin({ training: true });
    const tensors = Object.fromEntries(
      Object.entries(inputs).map(([name, matrix]) => [
        name,
        tensorOf(tape, matrix, !constants.includes(name)),
      ]),
    );
    const out = native(tape, tensors);
    const error = relativeError(download(out), expected.values);
    assertLessOrEqual(error, 1e-5, `${what}: value`);
    const used = uses === 1 ? out : add(tape, out, native(tape, tensors));
    tape.backward(used, tensorOf(tape, weights, false));
    for (const [name, gradient] of gradients) {
      const actual = download(tensors[name]!, "gradient");
      const error = relativeError(actual, gradient.map((value) => uses * value));
      assertLessOrEqual(error, 1e-4, `${what}: gradient of ${name}, used ${uses} times`);
    }
  }
}
