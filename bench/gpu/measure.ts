/** What the benches of a GPU share: its clock, the rows of their Markdown tables, and PyTorch beside. */
import type { Device } from "../../src/device/mod.ts";
import { median } from "../kv_workload.ts";

const WARM_UPS = 3;
/** How often each time is taken. */
export const RUNS = 21;

/**
 * Milliseconds by the device's own clock that what `work` enqueues takes, behind other work of some milliseconds, `lead`: the
 * host enqueues it all before the device begins, so that it is the time of short kernels, not that of their calls.
 */
export function queuedTime(device: Device, lead: () => void, work: () => void): number {
  lead();
  return device.time(work);
}

/** The median of {@linkcode queuedTime}; without `lead`, of the time from the first call on. */
export function medianTime(
  device: Device,
  work: () => void,
  { lead = () => {} }: { lead?: () => void } = {},
): number {
  for (let i = 0; i < WARM_UPS; i++) work();
  return median(Array.from({ length: RUNS }, () => queuedTime(device, lead, work)));
}

/** "NVIDIA H200 (sm_90), CUDA driver 13.0, runtime 13.0" */
export function describe({ info }: Device): string {
  const { name, instructionSet, driverVersion, runtimeVersion } = info;
  return `${name} (${instructionSet}), CUDA driver ${version(driverVersion)}, ` +
    `runtime ${version(runtimeVersion)}`;
}

/** Says on a terminal what is being measured, until the next row is printed; nothing in a pipe. */
export function announce(what: string): void {
  if (Deno.stderr.isTerminal()) Deno.stderr.writeSync(new TextEncoder().encode(`\r\x1b[K${what}`));
}

/** Prints a row. */
export function printRow(...cells: readonly string[]): void {
  announce("");
  console.log(`| ${cells.join(" | ")} |`);
}

/** Prints the headings of a table, of columns with ">" in front of those that align to the right. */
export function printHeadings(...headings: readonly string[]): void {
  printRow(...headings.map((heading) => heading.replace(/^>/, "")));
  printRow(...headings.map((heading) => heading.startsWith(">") ? "--:" : "---"));
}

/** What a script beside this file prints as JSON, given `input` as JSON; undefined without python3 or PyTorch. */
export async function runTorch<Result>(
  script: string,
  input: unknown,
): Promise<Result | undefined> {
  try {
    const { success, stdout } = await new Deno.Command("python3", {
      args: [new URL(script, import.meta.url).pathname, JSON.stringify(input)],
      stderr: "inherit",
    }).output();
    return success ? JSON.parse(new TextDecoder().decode(stdout)) : undefined;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return undefined;
    throw error;
  }
}

function version(number: number): string {
  return `${Math.floor(number / 1000)}.${number % 1000 / 10}`;
}
