/** The entries of matrices of full blocks, as plans are, on every backend: against plain loops. */
import { assertEquals } from "@std/assert";
import { fullBlocks } from "../ffi/graph.ts";
import { Device } from "../src/device/mod.ts";
import { Random } from "../src/graph/random.ts";
import { type Indices, Tape } from "../src/graph/tape.ts";
import { backends } from "./backends.ts";

/** Block sizes: some empty, one of a single row, and one that takes many thread blocks. */
function sizesOf(random: Random): [number, number][] {
  return [
    ...Array.from({ length: 40 }, (): [number, number] => [random.below(9), random.below(9)]),
    [1, 700],
    [300, 70],
    [0, 5],
  ];
}

function download({ buffer, byteOffset, length }: Indices): number[] {
  const bytes = new Uint8Array(4 * length);
  buffer.download(bytes, byteOffset);
  return [...new Int32Array(bytes.buffer)];
}

for (const backend of backends()) {
  Deno.test(`graph full blocks: ${backend}: entries, and those of the transposed matrix`, () => {
    using device = Device.open({ backend });
    using tape = new Tape(device);
    const sizes = sizesOf(new Random(8));
    const offsetsOf = (of: (size: [number, number]) => number) =>
      Int32Array.from(
        [0, ...sizes].map((_, i) => sizes.slice(0, i).reduce((sum, size) => sum + of(size), 0)),
      );
    const rowOffsets = offsetsOf(([n]) => n);
    const columnOffsets = offsetsOf(([, m]) => m);
    const entryOffsets = offsetsOf(([n, m]) => n * m);
    const entries = entryOffsets.at(-1)!;
    const expected = {
      columns: [] as number[],
      rows: [] as number[],
      order: [] as number[],
      inverse: [] as number[],
    };
    for (const [block, [n, m]] of sizes.entries()) {
      const start = entryOffsets[block]!;
      for (let i = 0; i < n; i++) {
        for (let j = 0; j < m; j++) {
          expected.columns.push(columnOffsets[block]! + j);
          expected.inverse.push(start + j * n + i);
        }
      }
      for (let j = 0; j < m; j++) {
        for (let i = 0; i < n; i++) {
          expected.rows.push(rowOffsets[block]! + i);
          expected.order.push(start + i * m + j);
        }
      }
    }
    tape.begin();
    const empty = () => new Int32Array(entries).fill(-7);
    const on = tape.upload({
      ...{ rowOffsets, columnOffsets, entryOffsets },
      ...{ columns: empty(), rows: empty(), order: empty(), inverse: empty() },
    });
    fullBlocks(tape.native, { ...on, blocks: sizes.length, entries });
    for (const name of ["columns", "rows", "order", "inverse"] as const) {
      assertEquals(download(on[name]), expected[name], name);
    }
    // A block that the entries have no room for is left out.
    const wide = tape.upload({
      rowOffsets: Int32Array.of(0, 2, 4),
      columnOffsets: Int32Array.of(0, 2, 5),
      entryOffsets: Int32Array.of(0, 4, 9),
      ...{ columns: empty(), rows: empty(), order: empty(), inverse: empty() },
    });
    fullBlocks(tape.native, { ...wide, blocks: 2, entries: 9 });
    assertEquals(download(wide.columns).slice(0, 10), [0, 1, 0, 1, -7, -7, -7, -7, -7, -7]);
  });
}
