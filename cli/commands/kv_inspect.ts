import { Device } from "../../src/device/mod.ts";
import { inspectKvFile, type KvFileReport, type KvPartMeasurement } from "../../src/kv/mod.ts";
import { defined, type GlobalOptions } from "../options.ts";
import { formatBar, print, printJson, printTable, withProgress } from "../output.ts";
import {
  inspectReport,
  printLayers,
  printSequence,
  printTotal,
  sequenceReport,
} from "../report.ts";

/** Shows what a `.phkv` file holds. */
export async function kvInspect(options: GlobalOptions, input: string): Promise<void> {
  const { backend } = options;
  using device = Device.open(defined({ backend }));
  const report = await withProgress(
    "reading",
    (onProgress) => inspectKvFile(device, { input, onProgress }),
  );
  if (report.layout === "tiles") {
    return options.json ? printJson(sequenceReport(report)) : printSequence(report);
  }
  if (options.json) return printJson(inspectReport(report));
  const { codec, layout, version } = report;
  print(`${input}: version ${version}, layout ${layout}, ${describe(codec)}`);
  printLayers(report, { errors: false });
  printTotal(report);
  print("\nWidths of packs, in bits per value:");
  printWidths(report);
}

function describe(codec: KvFileReport["codec"]): string {
  const how = codec.quantizer === "kivi"
    ? `kivi with ${codec.keyBits} and ${codec.valueBits} bits`
    : `packkv per ${codec.grouping} with scales ${codec.keyRel} and ${codec.valueRel}`;
  return `${how}, repack ${codec.repack}, packs of ${codec.pack}`;
}

function printWidths({ layers }: KvFileReport): void {
  const shares = (parts: KvPartMeasurement[]) => {
    const packs = [0, 1, 2, 3, 4, 5, 6, 7, 8].map((width) =>
      parts.reduce((sum, part) => sum + (part.widths[width] ?? 0), 0)
    );
    const total = packs.reduce((sum, count) => sum + count, 0);
    return packs.map((count) => total === 0 ? 0 : count / total);
  };
  const keys = shares(layers.map(({ keys }) => keys));
  const values = shares(layers.map(({ values }) => values));
  const cell = (share: number) =>
    share === 0 ? "" : `${`${(100 * share).toFixed(1)} %`.padStart(7)} ${formatBar(share)}`;
  const used = keys.map((key, width) => ({ key, value: values[width]!, width }))
    .filter(({ key, value }) => key + value > 0);
  printTable(
    [">width", "keys", "values"],
    used.map(({ key, value, width }) => [width, cell(key), cell(value)]),
  );
}
