import { gunzipSync } from "node:zlib";
import { PackhorseError } from "../error.ts";
import { InputFile } from "../io/input_file.ts";
import { MOST_BYTES_PER_CALL } from "../io/limits.ts";

/** Numbers by rows, and where they come from. */
export interface NumberTable {
  readonly path: string;
  /** What a row is called, which counts from `base`: "line", from 1. */
  readonly unit: string;
  readonly base: number;
  readonly rows: number;
  readonly columns: number;
  /** `[rows, columns]`. */
  readonly values: Float64Array<ArrayBuffer>;
}

/** What is expected of a file's lines. */
export interface TextTableOptions {
  readonly kind: "integers" | "numbers";
  /** Numbers of a line. Default: as many as the first line has. */
  readonly columns?: number | undefined;
}

const INTEGER = /^[+-]?\d+$/;
const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;

/**
 * Reads a text of as many numbers in each line, separated by commas; a name that ends in `.gz` is decompressed.
 *
 * Throws `not-found`, `io`, and `corrupt`, naming file and line, for a line that is not as expected.
 */
export async function readTextTable(path: string, options: TextTableOptions): Promise<NumberTable> {
  const lines = (await readText(path)).split("\n");
  if (lines.at(-1)?.trim() === "") lines.pop();
  const { kind } = options;
  const pattern = kind === "integers" ? INTEGER : NUMBER;
  const columns = options.columns ?? (lines[0] ?? "").split(",").length;
  const refuse = (line: number, reason: string) =>
    refuseRow({ path, unit: "line", base: 1 }, line, reason);
  const values = new Float64Array(lines.length * columns);
  for (let line = 0; line < lines.length; line++) {
    const fields = lines[line]!.split(",");
    if (fields.length !== columns) {
      const expected = columns === 1 ? "1 number" : `${columns} numbers`;
      refuse(line, `expected ${expected}, got ${shown(lines[line]!)}`);
    }
    for (let column = 0; column < columns; column++) {
      const field = fields[column]!.trim();
      const value = Number(field);
      const isGood = pattern.test(field) &&
        (kind === "integers" ? Math.abs(value) < 2 ** 31 : Number.isFinite(Math.fround(value)));
      if (!isGood) {
        const expected = kind === "integers" ? "an integer" : "a number";
        refuse(line, `expected ${expected}, got ${shown(field)}`);
      }
      values[line * columns + column] = value;
    }
  }
  return { path, unit: "line", base: 1, rows: lines.length, columns, values };
}

/** Throws `corrupt`, naming the file and the row, which counts from 0 here. */
export function refuseRow({ path, unit, base }: RowPlace, row: number, reason: string): never {
  throw new PackhorseError("corrupt", `Cannot read ${path}: ${unit} ${row + base}: ${reason}`);
}

type RowPlace = Pick<NumberTable, "path" | "unit" | "base">;

const shown = (text: string) => JSON.stringify(text.trim().slice(0, 40));

async function readText(path: string): Promise<string> {
  using file = await InputFile.open(path);
  const bytes = await file.read(0, file.size);
  try {
    const content = path.endsWith(".gz")
      ? gunzipSync(bytes, { maxOutputLength: MOST_BYTES_PER_CALL })
      : bytes;
    return new TextDecoder("utf-8", { fatal: true }).decode(content);
  } catch (cause) {
    const what = path.endsWith(".gz") ? "no text compressed by gzip" : "no text";
    throw new PackhorseError("corrupt", `Cannot read ${path}: it is ${what}`, { cause });
  }
}
