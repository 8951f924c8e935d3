import { Device } from "../../src/device/mod.ts";
import { AtomicFile } from "../../src/io/mod.ts";
import { type KvSweepRow, sweepKvFile } from "../../src/kv/mod.ts";
import { listenForInterrupt } from "../interrupt.ts";
import { type CodecOptions, defined, type GlobalOptions, type PatternOptions } from "../options.ts";
import {
  formatBits,
  formatError,
  formatRatio,
  print,
  printJson,
  printTable,
  withProgress,
} from "../output.ts";

/** Measures bits and errors over a grid of settings. */
export async function kvSweep(
  options: GlobalOptions & PatternOptions & {
    kRel: readonly number[];
    vRel: readonly number[];
    repack: readonly NonNullable<CodecOptions["repack"]>[];
    pack: readonly NonNullable<CodecOptions["pack"]>[];
    svg?: string | undefined;
  },
  input: string,
): Promise<void> {
  const { backend, keyPattern, valuePattern, svg } = options;
  using device = Device.open(defined({ backend }));
  using interrupt = listenForInterrupt();
  const { signal } = interrupt;
  // Opened before measuring, which may take long, so that a wrong path fails at once.
  using chart = svg === undefined ? undefined : await AtomicFile.create(svg, { signal });
  const rows = await withProgress("measuring", (onProgress) =>
    sweepKvFile(device, {
      input,
      keyRels: options.kRel,
      valueRels: options.vRel,
      repacks: options.repack,
      packs: options.pack,
      ...defined({ keyPattern, valuePattern }),
      onProgress,
      signal,
    }));
  if (chart) await (await import("../chart.ts")).writeSweepChart(chart, rows);
  if (options.json) return printJson({ input, backend: device.backend, svg, rows });
  printRows(rows);
  if (svg !== undefined) print(`${svg} written`);
}

function printRows(rows: KvSweepRow[]): void {
  printTable(
    [
      ">k-rel",
      ">v-rel",
      "repack",
      ">pack",
      ">key bits",
      ">value bits",
      ">true bits",
      ">ratio",
      ">key RMS error",
      ">value RMS error",
    ],
    rows.map((row) => [
      row.keyRel,
      row.valueRel,
      row.repack,
      row.pack,
      formatBits(row.keyBits),
      formatBits(row.valueBits),
      formatBits(row.trueBitsPerValue),
      formatRatio(row.ratio),
      formatError(row.keyRmsError),
      formatError(row.valueRmsError),
    ]),
  );
}
