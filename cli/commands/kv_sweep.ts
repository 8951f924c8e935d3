import { Device } from "../../src/device/mod.ts";
import { type KvSweepRow, sweepKvFile } from "../../src/kv/mod.ts";
import { type CodecOptions, defined, type GlobalOptions, type PatternOptions } from "../options.ts";
import {
  formatBits,
  formatError,
  formatRatio,
  print,
  printJson,
  printTable,
  showProgress,
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
  using progress = showProgress("measuring");
  const rows = await sweepKvFile(device, {
    input,
    keyRels: [...options.kRel],
    valueRels: [...options.vRel],
    repacks: [...options.repack],
    packs: [...options.pack],
    ...defined({ keyPattern, valuePattern }),
    onProgress: progress.update,
  });
  if (svg !== undefined) {
    const { sweepChart } = await import("../chart.ts");
    await Deno.writeTextFile(svg, await sweepChart(rows));
  }
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
