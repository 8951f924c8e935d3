import type { KvFileReport, KvLayerReport, KvPartMeasurement } from "../src/kv/mod.ts";
import { formatBits, formatBytes, formatError, formatRatio, print, printTable } from "./output.ts";

/** Times that packing made something smaller; 0 for what was nothing. */
function ratio(originalBytes: number, packedBytes: number): number {
  return originalBytes / Math.max(1, packedBytes);
}

/** A layer as `--json` shows it, without errors. */
function layerSizes(layer: KvLayerReport) {
  return {
    layer: layer.layer,
    dtype: layer.dtype,
    heads: layer.heads,
    tokens: layer.tokens,
    headDim: layer.headDim,
    blocks: layer.blocks,
    tailTokens: layer.tailTokens,
    rawBlocks: layer.rawBlocks,
    orderedBlocks: layer.orderedBlocks,
    originalBytes: layer.originalBytes,
    trueBytes: layer.trueBytes,
    ratio: ratio(layer.originalBytes, layer.trueBytes),
    kBits: layer.keys.bits,
    vBits: layer.values.bits,
  };
}

function layerErrors({ keys, values }: KvLayerReport) {
  return {
    kMaxErrorOverScale: keys.maxErrorOverScale,
    vMaxErrorOverScale: values.maxErrorOverScale,
    kMaxError: keys.maxError,
    vMaxError: values.maxError,
    kRmsError: keys.rmsError,
    vRmsError: values.rmsError,
  };
}

function layerWidths({ keys, values }: KvLayerReport) {
  return {
    kDistinctCodes: keys.distinctCodes,
    vDistinctCodes: values.distinctCodes,
    kWidths: keys.widths,
    vWidths: values.widths,
  };
}

function fileSizes(report: KvFileReport) {
  return {
    codec: report.codec,
    layout: report.layout,
    version: report.version,
    fileBytes: report.fileBytes,
    headerBytes: report.fileBytes - report.trueBytes,
    originalBytes: report.originalBytes,
    trueBytes: report.trueBytes,
    ratio: ratio(report.originalBytes, report.fileBytes),
    seconds: report.seconds,
  };
}

/** What packing a file gave, as `--json` shows it. */
export function packReport(report: KvFileReport) {
  return {
    input: report.input,
    output: report.output,
    ...fileSizes(report),
    layers: report.layers.map((layer) => ({ ...layerSizes(layer), ...layerErrors(layer) })),
  };
}

/** What a packed file holds, as `--json` shows it. */
export function inspectReport(report: KvFileReport) {
  return {
    input: report.input,
    ...fileSizes(report),
    layers: report.layers.map((layer) => ({ ...layerSizes(layer), ...layerWidths(layer) })),
  };
}

/** Prints one row per layer: sizes, bits, and errors where `errors` says so. */
export function printLayers(report: KvFileReport, { errors }: { errors: boolean }): void {
  printTable(
    [
      "layer",
      ">tokens",
      ">original",
      ">packed",
      ">ratio",
      ">key bits",
      ">value bits",
      ...(errors ? [">key error", ">of scale", ">value error", ">of scale"] : []),
    ],
    report.layers.map((layer) => [
      layer.layer,
      layer.tokens,
      formatBytes(layer.originalBytes),
      formatBytes(layer.trueBytes),
      formatRatio(ratio(layer.originalBytes, layer.trueBytes)),
      formatBits(layer.keys.bits),
      formatBits(layer.values.bits),
      ...(errors ? [...errorCells(layer.keys), ...errorCells(layer.values)] : []),
    ]),
  );
}

function errorCells({ maxError, maxErrorOverScale }: KvPartMeasurement): string[] {
  return [formatError(maxError), maxErrorOverScale.toFixed(4)];
}

/** Prints what the whole file takes. */
export function printTotal(report: KvFileReport): void {
  const { originalBytes, fileBytes, trueBytes } = report;
  print(
    `${formatBytes(originalBytes)} in ${formatBytes(fileBytes)}, ${
      formatRatio(ratio(originalBytes, fileBytes))
    } smaller (${formatBytes(fileBytes - trueBytes)} of it header and checksums)`,
  );
}
