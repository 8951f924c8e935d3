// @ts-types="@types/cli-progress"
import { SingleBar } from "cli-progress";
import Table from "cli-table3";
import process from "node:process";
import { readEnvironment } from "../src/environment.ts";

// The only module that prints. Results go to standard output, all else to standard error.

/** Prints a line or lines of text. */
export function print(text = ""): void {
  console.log(text);
}

/** Prints a piece of a text, without the end of a line. */
export function printPiece(text: string): void {
  const bytes = new TextEncoder().encode(text);
  for (let at = 0; at < bytes.length;) at += Deno.stdout.writeSync(bytes.subarray(at));
}

/** Prints a line on standard error where that is a terminal: what whoever reads the output need not know. */
export function printAside(text: string): void {
  if (Deno.stderr.isTerminal()) console.error(text);
}

/** Prints one JSON document. */
export function printJson(value: unknown): void {
  console.log(JSON.stringify(value, null, 2));
}

/** Prints one line that says what went wrong; with `PACKHORSE_DEBUG` set also where. */
export function printError(error: unknown): void {
  const message = error instanceof Error ? error.message : String(error);
  console.error(`packhorse: ${message.trim().replaceAll(/\s*\n\s*/g, " ")}`);
  if (readEnvironment("PACKHORSE_DEBUG")) console.error(error);
}

/** A column's heading, with ">" in front if its cells align to the right. */
export type Heading = string;

/** Prints a table. */
export function printTable(headings: Heading[], rows: (string | number)[][]): void {
  const table = new Table({
    head: headings.map((heading) => heading.replace(/^>/, "")),
    colAligns: headings.map((heading) => heading.startsWith(">") ? "right" : "left"),
    style: { head: [], border: [], compact: true, "padding-left": 0, "padding-right": 0 },
    chars: RULED,
  });
  table.push(...rows);
  print(table.toString().replaceAll(/ +$/gm, ""));
}

/** Columns two spaces apart and one rule, under the headings. */
const RULED = {
  ...Object.fromEntries(
    ["top", "bottom"].flatMap((side) =>
      ["", "-mid", "-left", "-right"].map((part) => [side + part, ""])
    ),
  ),
  left: "",
  right: "",
  middle: "  ",
  "left-mid": "",
  "right-mid": "",
  mid: "─",
  "mid-mid": "──",
};

/**
 * Does `work` under a progress bar on standard error, or without one where that is no terminal. A status stands behind the
 * bar until the next.
 */
export async function withProgress<Result>(
  label: string,
  work: (onProgress: (done: number, total: number, status?: string) => void) => Promise<Result>,
): Promise<Result> {
  if (!Deno.stderr.isTerminal()) return await work(() => {});
  const bar = new SingleBar({
    format: `${label} {bar} {percentage} %  {eta_formatted}{status}`,
    barCompleteChar: "█",
    barIncompleteChar: "░",
    clearOnComplete: true,
    hideCursor: true,
    stream: process.stderr,
  });
  bar.start(1, 0, { status: "" });
  try {
    return await work((done, total, status) => {
      bar.setTotal(total);
      bar.update(done, status === undefined ? {} : { status: `  ${status}` });
    });
  } finally {
    // Before anything else is printed: clearing goes back to where the bar is.
    bar.stop();
  }
}

const BYTE_UNITS = ["B", "kB", "MB", "GB", "TB"];

/** "1.05 MB" for 1,049,008. */
export function formatBytes(bytes: number): string {
  const power = bytes < 1 ? 0 : Math.floor(Math.log10(bytes) / 3);
  const unit = Math.min(power, BYTE_UNITS.length - 1);
  return unit === 0 ? `${bytes} B` : `${significant(bytes / 1000 ** unit)} ${BYTE_UNITS[unit]}`;
}

/** "2.75" for 2.7512. */
export function formatBits(bits: number): string {
  return bits.toFixed(2);
}

/** "4.8×" for 4.812. */
export function formatRatio(ratio: number): string {
  return `${significant(ratio)}×`;
}

/** "29 %" for 0.2901. */
export function formatPerCent(share: number): string {
  return `${significant(100 * share)} %`;
}

/** "0.0123" for 0.012345; "1.2e-7" for what is small. */
export function formatError(error: number): string {
  return error === 0 || Math.abs(error) >= 1e-4 ? significant(error) : error.toExponential(1);
}

/** "31 ms" for 0.0312, "48 µs" for 0.000048. */
export function formatSeconds(seconds: number): string {
  if (seconds < 1e-3) return `${significant(seconds * 1e6)} µs`;
  return seconds < 1 ? `${significant(seconds * 1000)} ms` : `${significant(seconds)} s`;
}

/** A bar of up to `length` characters for a share from 0 to 1. */
export function formatBar(share: number, length = 24): string {
  const eighths = Math.round(share * length * 8);
  return "█".repeat(eighths >> 3) + ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"][eighths & 7];
}

function significant(value: number): string {
  return String(Number(value.toPrecision(3)));
}
