/**
 * The operations of graph models on every backend that opens here, against double precision: values, and gradients
 * against central differences.
 */
import { assert, assertEquals, assertLessOrEqual, assertThrows } from "@std/assert";
import { Device } from "../src/device/mod.ts";
import { PackhorseError } from "../src/error.ts";
import {
  activate,
  type Activation,
  addBias,
  aggregate,
  batchNorm,
  combine,
  concatenate,
  crossEntropy,
  dropout,
  headDot,
  layerNorm,
  linear,
  product,
  scale,
  segmentMax,
  segmentSoftmax,
  type SparsePattern,
} from "../src/graph/operations.ts";
import { Adam, Parameters } from "../src/graph/parameters.ts";
import { Random } from "../src/graph/random.ts";
import { type Indices, Tape } from "../src/graph/tape.ts";
import { backends } from "./backends.ts";
import { checkOperation, download, Matrix, relativeError, tensorOf } from "./graph_reference.ts";

function test(name: string, work: (tape: Tape) => void): void {
  for (const backend of backends()) {
    Deno.test(`graph operations: ${backend}: ${name}`, () => {
      using device = Device.open({ backend });
      using tape = new Tape(device);
      work(tape);
    });
  }
}

/** A sparse matrix at random: the column of each entry, by rows. */
function randomSparse(rows: number, xRows: number, random: Random): number[][] {
  return Array.from(
    { length: rows },
    () => Array.from({ length: random.below(5) }, () => random.below(xRows)),
  );
}

interface HostPattern {
  readonly offsets: number[];
  readonly columns: number[];
  readonly outOffsets: number[];
  readonly outColumns: number[];
  readonly outEdges: number[];
}

function hostPattern(sparse: readonly (readonly number[])[], xRows: number): HostPattern {
  const entries = sparse.flatMap((columns, row) => columns.map((column) => ({ row, column })));
  const byColumn = entries.map(({ row, column }, edge) => ({ row, column, edge }))
    .sort((a, b) => a.column - b.column || a.edge - b.edge);
  const offsets = (
    counts: number[],
  ) => [0, ...counts.map((_, i) => counts.slice(0, i + 1).reduce((a, b) => a + b))];
  return {
    offsets: offsets(sparse.map((columns) => columns.length)),
    columns: entries.map(({ column }) => column),
    outOffsets: offsets(
      Array.from(
        { length: xRows },
        (_, column) => entries.filter((entry) => entry.column === column).length,
      ),
    ),
    outColumns: byColumn.map(({ row }) => row),
    outEdges: byColumn.map(({ edge }) => edge),
  };
}

/** Indices on the device. */
function upload(tape: Tape, ...arrays: (readonly number[])[]): Indices[] {
  return arrays.map((array) => tape.upload({ array: Int32Array.from(array) }).array);
}

/** The pattern of a sparse matrix on the device. */
function pattern(tape: Tape, host: HostPattern): SparsePattern {
  const [offsets, columns, outOffsets, outColumns, outEdges] = upload(
    tape,
    host.offsets,
    host.columns,
    host.outOffsets,
    host.outColumns,
    host.outEdges,
  ) as [Indices, Indices, Indices, Indices, Indices];
  return {
    rows: host.offsets.length - 1,
    xRows: host.outOffsets.length - 1,
    entries: host.columns.length,
    forward: { offsets, columns },
    backward: { offsets: outOffsets, columns: outColumns, edges: outEdges },
  };
}

test("linear multiplies matrices of any size", (tape) => {
  const sizes = [[1, 1, 1], [3, 5, 2], [7, 64, 33], [70, 3, 64], [20, 200, 17], [9, 16, 32], [
    8,
    31,
    65,
  ]];
  sizes.forEach(([rows, inner, columns], seed) => {
    const random = new Random(seed);
    const inputs = {
      x: Matrix.random(rows!, inner!, random),
      weight: Matrix.random(inner!, columns!, random),
      bias: Matrix.random(1, columns!, random),
    };
    // Central differences of large matrices take long; small ones have every branch of the small sizes.
    const isLarge = rows! * inner! * columns! > 4000;
    const reference = ({ x, weight, bias }: Readonly<Record<string, Matrix>>) => {
      const out = x!.times(weight!);
      return Matrix.of(rows!, columns!, (i, j) => out.at(i, j) + bias!.values[j]!);
    };
    const what = `[${rows}, ${inner}] times [${inner}, ${columns}], seed ${seed}`;
    if (!isLarge) {
      checkOperation(tape, {
        ...{ inputs, reference, random, what },
        native: (tape, { x, weight, bias }) => linear(tape, x!, weight!, bias),
      });
      return;
    }
    tape.begin({ training: true });
    const [x, weight, bias] = [inputs.x, inputs.weight, inputs.bias].map((each) =>
      tensorOf(tape, each)
    );
    const out = linear(tape, x!, weight!, bias);
    assertLessOrEqual(relativeError(download(out), reference(inputs).values), 1e-5, what);
    const dy = Matrix.random(rows!, columns!, random);
    tape.backward(out, tensorOf(tape, dy, false));
    const transposed = ({ rows, columns, at }: Matrix, of: Matrix) =>
      Matrix.of(columns, rows, (i, j) => at.call(of, j, i));
    const dx = dy.times(transposed(inputs.weight, inputs.weight));
    assertLessOrEqual(relativeError(download(x!, "gradient"), dx.values), 1e-5, what);
    const dw = transposed(inputs.x, inputs.x).times(dy);
    assertLessOrEqual(relativeError(download(weight!, "gradient"), dw.values), 1e-5, what);
    const db = Matrix.of(
      1,
      columns!,
      (_, j) => Array.from({ length: rows! }, (_, i) => dy.at(i, j)).reduce((a, b) => a + b),
    );
    assertLessOrEqual(relativeError(download(bias!, "gradient"), db.values), 1e-5, what);
  });
});

test("linear sums many rows, and over blocks, to float32", (tape) => {
  const random = new Random(5);
  const [rows, inner, columns] = [1500, 40, 24];
  const x = Matrix.random(rows, inner, random);
  const weight = Matrix.random(inner, columns, random);
  const dy = Matrix.random(rows, columns, random);
  tape.begin({ training: true });
  const tensors = [tensorOf(tape, x), tensorOf(tape, weight)] as const;
  tape.backward(linear(tape, ...tensors), tensorOf(tape, dy, false));
  const dw = Matrix.of(inner, columns, (i, j) => {
    let sum = 0;
    for (let row = 0; row < rows; row++) sum += x.at(row, i) * dy.at(row, j);
    return sum;
  });
  assertLessOrEqual(relativeError(download(tensors[1], "gradient"), dw.values), 1e-5);
});

test("addBias adds a row to all", (tape) => {
  const random = new Random(1);
  checkOperation(tape, {
    inputs: { x: Matrix.random(5, 7, random), bias: Matrix.random(1, 7, random) },
    native: (tape, { x, bias }) => addBias(tape, x!, bias!),
    reference: ({ x, bias }) => Matrix.of(5, 7, (i, j) => x!.at(i, j) + bias!.values[j]!),
    ...{ random, what: "addBias" },
  });
});

test("aggregate is a sparse matrix times a dense one, with weights by heads and scales", (tape) => {
  for (let seed = 0; seed < 8; seed++) {
    const random = new Random(seed);
    const heads = [1, 1, 2, 3][seed % 4]!;
    const width = heads * [1, 5, 16, 70][(seed >> 1) % 4]!;
    const isSquare = seed % 2 === 0;
    const rows = 9;
    const xRows = isSquare ? rows : 6;
    const sparse = randomSparse(rows, xRows, random);
    const host = hostPattern(sparse, xRows);
    const self = isSquare ? 1.25 : 0;
    const isScaled = seed % 3 !== 0;
    const [rowScale, columnScale] = [
      Matrix.random(rows, 1, random),
      Matrix.random(xRows, 1, random),
    ];
    const isWeighted = seed > 1;
    const inputs = {
      x: Matrix.random(xRows, width, random),
      ...(isWeighted ? { weights: Matrix.random(host.columns.length, heads, random) } : {}),
    };
    checkOperation(tape, {
      inputs,
      native: (tape, { x, weights }) => {
        const scales = isScaled
          ? {
            rowScale: tensorOf(tape, rowScale).place,
            columnScale: tensorOf(tape, columnScale).place,
          }
          : {};
        return aggregate(tape, x!, pattern(tape, host), { self, weights, ...scales });
      },
      reference: ({ x, weights }) =>
        Matrix.of(rows, width, (i, c) => {
          const scaleOf = (j: number) => isScaled ? columnScale.values[j]! : 1;
          const head = Math.floor(c / (width / (isWeighted ? heads : 1)));
          let sum = self === 0 ? 0 : self * scaleOf(i) * x!.at(i, c);
          for (let p = host.offsets[i]!; p < host.offsets[i + 1]!; p++) {
            const j = host.columns[p]!;
            sum += (weights ? weights.at(p, head) : 1) * scaleOf(j) * x!.at(j, c);
          }
          return (isScaled ? rowScale.values[i]! : 1) * sum;
        }),
      ...{ random, what: `aggregate, seed ${seed}` },
    });
  }
});

test("aggregate gathers rows, and sums and averages segments", (tape) => {
  const random = new Random(3);
  const indices = [3, 0, 3, 1, 1];
  const host = hostPattern(indices.map((index) => [index]), 4);
  const segments = [0, 2, 2, 5];
  const ofRow = [0, 0, 2, 2, 2];
  checkOperation(tape, {
    inputs: { x: Matrix.random(4, 6, random) },
    native: (tape, { x }) => {
      const [columns, outOffsets, outEdges] = upload(tape, indices, host.outOffsets, host.outEdges);
      return aggregate(tape, x!, {
        ...{ rows: 5, xRows: 4, entries: 5, forward: { columns: columns! } },
        backward: { offsets: outOffsets!, columns: outEdges! },
      });
    },
    reference: ({ x }) => Matrix.of(5, 6, (i, c) => x!.at(indices[i]!, c)),
    ...{ random, what: "gather" },
  });
  const means = [0.5, 0, 1 / 3];
  checkOperation(tape, {
    inputs: { x: Matrix.random(5, 3, random) },
    native: (tape, { x }) => {
      const [offsets, columns] = upload(tape, segments, ofRow);
      const rowScale = tensorOf(tape, new Matrix(3, 1, means)).place;
      const parts = { forward: { offsets: offsets! }, backward: { columns: columns! } };
      return aggregate(tape, x!, { rows: 3, xRows: 5, entries: 5, ...parts }, { rowScale });
    },
    reference: ({ x }) =>
      Matrix.of(3, 3, (i, c) => {
        let sum = 0;
        for (let p = segments[i]!; p < segments[i + 1]!; p++) sum += x!.at(p, c);
        return means[i]! * sum;
      }),
    ...{ random, what: "mean of segments" },
  });
});

test("aggregate gives NaN for rows that do not exist, and reads nothing beyond its entries", (tape) => {
  tape.begin();
  const x = tensorOf(tape, Matrix.of(2, 3, (i) => i + 1), false);
  const [offsets, columns] = upload(tape, [0, 1, 2, 9], [1, 2]);
  const shape = { rows: 3, xRows: 2, entries: 2, backward: {} };
  const out = aggregate(tape, x, { ...shape, forward: { offsets: offsets!, columns: columns! } });
  assertEquals([...download(out)], [2, 2, 2, NaN, NaN, NaN, 0, 0, 0]);
});

const SEGMENTS = [0, 3, 3, 4, 9];

test("segmentMax takes the largest, 0 of nothing", (tape) => {
  const random = new Random(4);
  for (const width of [1, 5, 40]) {
    checkOperation(tape, {
      inputs: { x: Matrix.random(9, width, random) },
      native: (tape, { x }) => {
        const [offsets] = upload(tape, SEGMENTS);
        return segmentMax(tape, x!, { rows: 4, offsets: offsets! });
      },
      reference: ({ x }) =>
        Matrix.of(4, width, (i, c) => {
          const values = Array.from({ length: SEGMENTS[i + 1]! - SEGMENTS[i]! }, (_, k) =>
            x!.at(SEGMENTS[i]! + k, c));
          return values.length === 0 ? 0 : Math.max(...values);
        }),
      ...{ random, what: `segmentMax, width ${width}` },
    });
  }
});

test("segmentSoftmax sums to 1 over each segment", (tape) => {
  const random = new Random(5);
  for (const shift of [0, 100]) {
    checkOperation(tape, {
      inputs: { x: Matrix.random(9, 3, random).map((value) => value + shift) },
      native: (tape, { x }) => {
        const [offsets] = upload(tape, SEGMENTS);
        return segmentSoftmax(tape, x!, { rows: 4, offsets: offsets! });
      },
      reference: ({ x }) =>
        Matrix.of(9, 3, (i, c) => {
          const segment = SEGMENTS.findIndex((end, k) => k > 0 && i < end);
          let total = 0;
          for (let p = SEGMENTS[segment - 1]!; p < SEGMENTS[segment]!; p++) {
            total += Math.exp(x!.at(p, c) - x!.at(i, c));
          }
          return 1 / total;
        }),
      ...{ random, what: `segmentSoftmax around ${shift}` },
    });
  }
});

test("headDot multiplies each head with its part", (tape) => {
  for (const [heads, width] of [[1, 7], [3, 5], [2, 40], [4, 16]] as const) {
    const random = new Random(heads);
    checkOperation(tape, {
      inputs: {
        x: Matrix.random(6, heads * width, random),
        a: Matrix.random(1, heads * width, random),
      },
      native: (tape, { x, a }) => headDot(tape, x!, a!, heads),
      reference: ({ x, a }) =>
        Matrix.of(6, heads, (i, h) => {
          let sum = 0;
          for (let c = h * width; c < (h + 1) * width; c++) sum += x!.at(i, c) * a!.values[c]!;
          return sum;
        }),
      ...{ random, what: `headDot, ${heads} heads of ${width}` },
    });
  }
});

/** The error function by its series, to double precision for arguments of this size. */
function erf(x: number): number {
  let [term, sum] = [x, x];
  for (let n = 1; n < 100; n++) {
    term *= -x * x / n;
    sum += term / (2 * n + 1);
  }
  return 2 / Math.sqrt(Math.PI) * sum;
}

const FUNCTIONS: Readonly<Record<Activation, (x: number) => number>> = {
  relu: (x) => Math.max(x, 0),
  "leaky-relu": (x) => x > 0 ? x : 0.2 * x,
  gelu: (x) => x * (1 + erf(x / Math.SQRT2)) / 2,
  tanh: Math.tanh,
  sigmoid: (x) => 1 / (1 + Math.exp(-x)),
  softplus: (x) => Math.log1p(Math.exp(x)),
};

test("activations and their derivatives", (tape) => {
  for (
    const [kind, reference] of Object.entries(FUNCTIONS) as [Activation, (x: number) => number][]
  ) {
    const random = new Random(6);
    checkOperation(tape, {
      inputs: { x: Matrix.random(7, 11, random) },
      native: (tape, { x }) => activate(tape, x!, kind, 0.2),
      reference: ({ x }) => x!.map(reference),
      ...{ random, what: kind },
    });
  }
  tape.begin();
  const extreme = tensorOf(tape, new Matrix(1, 4, [-200, 200, -1000, 1000]), false);
  assertEquals([...download(activate(tape, extreme, "softplus"))], [0, 200, 0, 1000]);
  assertEquals([...download(activate(tape, extreme, "sigmoid"))], [0, 1, 0, 1]);
});

test("combine, scale, product and concatenate", (tape) => {
  const random = new Random(7);
  const inputs = { x: Matrix.random(5, 6, random), y: Matrix.random(5, 6, random) };
  checkOperation(tape, {
    native: (tape, { x, y }) => combine(tape, 2, x!, -0.5, y!),
    reference: ({ x, y }) => Matrix.of(5, 6, (i, j) => 2 * x!.at(i, j) - y!.at(i, j) / 2),
    ...{ inputs, random, what: "combine" },
  });
  checkOperation(tape, {
    native: (tape, { x, y }) => product(tape, scale(tape, x!, 3), y!),
    reference: ({ x, y }) => Matrix.of(5, 6, (i, j) => 3 * x!.at(i, j) * y!.at(i, j)),
    ...{ inputs, random, what: "product" },
  });
  checkOperation(tape, {
    native: (tape, { x }) => product(tape, x!, x!),
    reference: ({ x }) => x!.map((value) => value * value),
    ...{ inputs: { x: inputs.x }, random, what: "square" },
  });
  checkOperation(tape, {
    inputs: { ...inputs, z: Matrix.random(5, 3, random) },
    native: (tape, { x, y, z }) => concatenate(tape, [x!, z!, y!]),
    reference: ({ x, y, z }) =>
      Matrix.of(5, 15, (i, j) => j < 6 ? x!.at(i, j) : j < 9 ? z!.at(i, j - 6) : y!.at(i, j - 9)),
    ...{ random, what: "concatenate" },
  });
});

/** Columns, or rows, with mean 0 and variance 1. */
function normalised(x: Matrix, over: "rows" | "columns"): Matrix {
  const count = over === "rows" ? x.rows : x.columns;
  const at = (group: number, k: number) => over === "rows" ? x.at(k, group) : x.at(group, k);
  const moments = Array.from({ length: over === "rows" ? x.columns : x.rows }, (_, group) => {
    let [mean, variance] = [0, 0];
    for (let k = 0; k < count; k++) mean += at(group, k) / count;
    for (let k = 0; k < count; k++) variance += (at(group, k) - mean) ** 2 / count;
    return [mean, variance] as const;
  });
  return Matrix.of(x.rows, x.columns, (i, j) => {
    const [mean, variance] = moments[over === "rows" ? j : i]!;
    return (x.at(i, j) - mean) / Math.sqrt(variance + 1e-5);
  });
}

test("batchNorm and layerNorm", (tape) => {
  for (const [rows, width] of [[6, 5], [70, 3], [9, 40]] as const) {
    const random = new Random(rows);
    const inputs = {
      x: Matrix.random(rows, width, random),
      weight: Matrix.random(1, width, random),
      bias: Matrix.random(1, width, random),
    };
    for (const over of ["rows", "columns"] as const) {
      checkOperation(tape, {
        native: (tape, { x, weight, bias }) => {
          const [runningMean, runningVariance] = [0, 1].map((value) =>
            tensorOf(tape, Matrix.of(1, width, () => value), false)
          );
          const parameters = { weight: weight!, bias: bias! };
          return over === "columns" ? layerNorm(tape, x!, parameters) : batchNorm(tape, x!, {
            ...parameters,
            runningMean: runningMean!,
            runningVariance: runningVariance!,
          });
        },
        reference: ({ x, weight, bias }) => {
          const normal = normalised(x!, over);
          return Matrix.of(
            rows,
            width,
            (i, j) => normal.at(i, j) * weight!.values[j]! + bias!.values[j]!,
          );
        },
        ...{ inputs, random, what: `norm over ${over} of [${rows}, ${width}]` },
      });
    }
  }
});

test("batchNorm keeps running values, and uses them when it does not train", (tape) => {
  const random = new Random(9);
  const x = Matrix.random(20, 3, random);
  tape.begin({ training: true });
  const make = (value: number) => tensorOf(tape, Matrix.of(1, 3, () => value), false);
  const options = {
    ...{ weight: make(1), bias: make(0), runningMean: make(0.5), runningVariance: make(2) },
  };
  batchNorm(tape, tensorOf(tape, x), options);
  const mean = Array.from(
    { length: 3 },
    (_, j) => x.values.filter((_, i) => i % 3 === j).reduce((a, b) => a + b) / 20,
  );
  const variance = mean.map((m, j) =>
    x.values.filter((_, i) => i % 3 === j).reduce((a, b) => a + (b - m) ** 2, 0) / 19
  );
  const expectedMean = mean.map((value) => 0.45 + 0.1 * value);
  const expectedVariance = variance.map((value) => 1.8 + 0.1 * value);
  assertLessOrEqual(relativeError(download(options.runningMean), expectedMean), 1e-6);
  assertLessOrEqual(relativeError(download(options.runningVariance), expectedVariance), 1e-6);
  tape.begin();
  const again = {
    runningMean: make(0.5),
    runningVariance: make(2),
    weight: make(1),
    bias: make(0),
  };
  const out = download(batchNorm(tape, tensorOf(tape, x), again));
  assertLessOrEqual(
    relativeError(out, x.values.map((value) => (value - 0.5) / Math.sqrt(2 + 1e-5))),
    1e-6,
  );
  assertEquals([...download(again.runningMean)], [0.5, 0.5, 0.5]);
});

/** Word `index` of Philox4x32-10 for a counter and a key. */
function philoxWord(counter: number, key: bigint, index: number): number {
  let words = [BigInt(counter), 0n, 0n, 0n];
  let [low, high] = [key & 0xffffffffn, key >> 32n];
  for (let round = 0; round < 10; round++) {
    const [first, second] = [0xd2511f53n * words[0]!, 0xcd9e8d57n * words[2]!];
    words = [
      (second >> 32n) ^ words[1]! ^ low,
      second & 0xffffffffn,
      (first >> 32n) ^ words[3]! ^ high,
      first & 0xffffffffn,
    ];
    low = (low + 0x9e3779b9n) & 0xffffffffn;
    high = (high + 0xbb67ae85n) & 0xffffffffn;
  }
  return Number(words[index]);
}

test("dropout follows from the seed by Philox, and lets gradients pass where it let values", (tape) => {
  const random = new Random(10);
  const x = Matrix.random(33, 7, random);
  tape.begin({ training: true, seed: 77 });
  const seed = new Tape(tape.device);
  seed.begin({ seed: 77 });
  const key = seed.nextSeed();
  seed[Symbol.dispose]();
  const tensor = tensorOf(tape, x);
  const out = dropout(tape, tensor, 0.3);
  const kept = x.values.map((_, i) =>
    Number(philoxWord(i >> 2, key, i & 3) >= Math.floor(Math.fround(0.3) * 2 ** 32))
  );
  const factor = 1 / (1 - 0.3);
  assertLessOrEqual(
    relativeError(download(out), x.values.map((value, i) => kept[i]! * factor * value)),
    1e-6,
  );
  const share = kept.reduce((a, b) => a + b) / kept.length;
  assert(share > 0.6 && share < 0.8, `${share} kept`);
  tape.backward(out, tensorOf(tape, x, false));
  assertLessOrEqual(relativeError(download(tensor, "gradient"), download(out)), 1e-6);
  tape.begin();
  const same = tensorOf(tape, x);
  assert(dropout(tape, same, 0.3) === same);
});

test("crossEntropy leaves out rows without a label", (tape) => {
  for (const classes of [1, 2, 10]) {
    const random = new Random(classes);
    const labels = [0, classes - 1, -1, Math.floor(classes / 2), 0];
    checkOperation(tape, {
      inputs: { logits: Matrix.random(5, classes, random).map((value) => 3 * value) },
      native: (tape, { logits }) => {
        const [place] = upload(tape, labels);
        return crossEntropy(tape, logits!, place!, { labelled: 4 }).loss;
      },
      reference: ({ logits }) => {
        let loss = 0;
        labels.forEach((label, i) => {
          if (label < 0) return;
          let total = 0;
          for (let c = 0; c < classes; c++) {
            total += Math.exp(logits!.at(i, c) - logits!.at(i, label));
          }
          loss += Math.log(total) / 4;
        });
        // Differences of what is always 0 have no relative error.
        return new Matrix(1, 1, [loss]);
      },
      ...{ constants: classes === 1 ? ["logits"] : [], random, what: `${classes} classes` },
    });
  }
  tape.begin();
  const logits = tensorOf(tape, new Matrix(3, 3, [1000, 0, -1000, 1, 2, 2, 0, 0, 5]), false);
  const [labels] = upload(tape, [0, 1, 0]);
  const [rowLosses, predictions] = [tape.take(3), tape.take(3)];
  const { loss } = crossEntropy(tape, logits, labels!, { labelled: 3, rowLosses, predictions });
  const losses = new Float32Array(3);
  rowLosses.buffer.download(new Uint8Array(losses.buffer), rowLosses.byteOffset);
  const expected = [0, Math.log(2 + Math.exp(-1)), 5 + Math.log(1 + 2 * Math.exp(-5))];
  assertLessOrEqual(relativeError(losses, expected), 1e-6);
  assertLessOrEqual(relativeError(download(loss), [expected.reduce((a, b) => a + b) / 3]), 1e-6);
  const words = new Int32Array(3);
  predictions.buffer.download(new Uint8Array(words.buffer), predictions.byteOffset);
  assertEquals([...words], [0, 1, 2]);
});

test("Adam and AdamW step as they are written, clipped or not", (tape) => {
  for (const [decoupled, clipNorm] of [[true, undefined], [false, 0.5], [true, 100]] as const) {
    using parameters = new Parameters();
    const weight = parameters.learn("w", [3, 5], { bound: 1 });
    parameters.learn("b", [1, 3], 0.5);
    parameters.place(tape.device, 3);
    assertEquals(weight().count, 15);
    using adam = new Adam(parameters, {
      ...{ decoupled, betas: [0.8, 0.9], weightDecay: 0.1, epsilon: 1e-6 },
      ...(clipNorm === undefined ? {} : { clipNorm }),
    });
    const random = new Random(11);
    const expected = Float64Array.from(parameters.read().parameters);
    const [first, second] = [expected.map(() => 0), expected.map(() => 0)];
    for (let step = 1; step <= 4; step++) {
      const gradient = Float32Array.from(expected, () => random.gaussian());
      parameters.buffers.gradients.upload(gradient);
      adam.step(0.05);
      const norm = Math.hypot(...gradient);
      const clip = clipNorm !== undefined && norm > clipNorm ? clipNorm / norm : 1;
      for (let i = 0; i < expected.length; i++) {
        let g = clip * gradient[i]!;
        if (decoupled) expected[i]! -= 0.05 * 0.1 * expected[i]!;
        else g += 0.1 * expected[i]!;
        first[i] = 0.8 * first[i]! + 0.2 * g;
        second[i] = 0.9 * second[i]! + 0.1 * g * g;
        const corrected = Math.sqrt(second[i]! / (1 - 0.9 ** step)) + 1e-6;
        expected[i]! -= 0.05 * (first[i]! / (1 - 0.8 ** step)) / corrected;
      }
    }
    const { parameters: actual } = parameters.read();
    assertLessOrEqual(
      relativeError(actual, expected),
      1e-5,
      `decoupled ${decoupled}, clip ${clipNorm}`,
    );
    const { step, first: moments } = adam.read();
    assertEquals(step, 4);
    assertLessOrEqual(relativeError(moments, first), 1e-5);
  }
});

test("a step allocates nothing once one as large has been, and is the same bits", (tape) => {
  const random = new Random(12);
  const x = Matrix.random(300, 40, random);
  const weight = Matrix.random(40, 50, random);
  const step = () => {
    tape.begin({ training: true, seed: 1 });
    const [a, b] = [tensorOf(tape, x), tensorOf(tape, weight)];
    const out = activate(tape, dropout(tape, linear(tape, a, b), 0.5), "gelu");
    tape.backward(out, out);
    return [download(out), download(a, "gradient"), download(b, "gradient")];
  };
  const first = step();
  step();
  const bytes = tape.byteLength;
  for (let i = 0; i < 3; i++) assertEquals(step(), first);
  assertEquals(tape.byteLength, bytes);
});

test("shapes that do not fit are refused", (tape) => {
  tape.begin();
  const x = tensorOf(tape, new Matrix(2, 3), false);
  const refused: [() => unknown, string][] = [
    [() => linear(tape, x, x), "weight must be [3, 3]"],
    [() => combine(tape, 1, x, 1, tensorOf(tape, new Matrix(3, 2))), "y must be [2, 3]"],
    [() => tape.backward(x), "a loss has one element"],
    [() => headDot(tape, x, tensorOf(tape, new Matrix(1, 2)), 1), "a must be [1, 3]"],
  ];
  for (const [work, fragment] of refused) {
    const { message } = assertThrows(work, PackhorseError);
    assert(message.includes(fragment), message);
  }
});
