import type {
  KvCachePartCodec,
  KvFileReport,
  KvLayerReport,
  KvPartMeasurement,
  KvSequenceFileReport,
} from "../src/kv/mod.ts";
import {
  formatBits,
  formatBytes,
  formatError,
  formatRatio,
  type Heading,
  print,
  printTable,
} from "./output.ts";

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

/** What a file of a saved sequence holds, as `--json` shows it. */
export function sequenceReport(report: KvSequenceFileReport) {
  return { ...report, ratio: ratio(report.originalBytes, report.fileBytes) };
}

/** Prints what a file of a saved sequence holds, and where its bytes go. */
export function printSequence(report: KvSequenceFileReport): void {
  const { input, version, layout, layers, tokens, packedTokens, heads, headDim, dtype } = report;
  print(
    `${input}: version ${version}, layout ${layout}, one sequence of ${tokens} tokens in ` +
      `${layers.length} layers of ${heads} x ${headDim} ${dtype}`,
  );
  print(
    `${packedTokens} tokens packed, ${tokens - packedTokens} in 16 bits ` +
      `(sinks ${report.sinks}, residual ${report.residual})`,
  );
  printTable(
    ["layer", "keys", "values", ">original", ">packed", ">in 16 bits", ">ratio", ">bits"],
    layers.map(({ layer, codec, originalBytes, packedBytes, recentBytes, bits }) => [
      layer,
      describePart(codec.keys),
      describePart(codec.values),
      formatBytes(originalBytes),
      formatBytes(packedBytes),
      formatBytes(recentBytes),
      formatRatio(ratio(originalBytes, packedBytes + recentBytes)),
      formatBits(bits),
    ]),
  );
  const { originalBytes, fileBytes, packedBytes, recentBytes, headerBytes } = report;
  print(
    `${formatBytes(originalBytes)} in ${formatBytes(fileBytes)}, ${
      formatRatio(ratio(originalBytes, fileBytes))
    } smaller (${formatBytes(packedBytes)} packed, ${formatBytes(recentBytes)} in 16 bits, ${
      formatBytes(headerBytes)
    } header and checksums)`,
  );
}

/** "packkv 0.1", "fixed 4" */
function describePart({ quantizer, ...options }: KvCachePartCodec): string {
  return [quantizer, ...Object.values(options)].join(" ");
}

/** A table with one row per layer: sizes, bits, and errors where `errors` says so. */
export function layerTable(
  report: KvFileReport,
  { errors }: { errors: boolean },
): { headings: Heading[]; rows: (string | number)[][] } {
  return {
    headings: [
      "layer",
      ">tokens",
      ">original",
      ">packed",
      ">ratio",
      ">key bits",
      ">value bits",
      ...(errors ? [">key error", ">of scale", ">value error", ">of scale"] : []),
    ],
    rows: report.layers.map((layer) => [
      layer.layer,
      layer.tokens,
      formatBytes(layer.originalBytes),
      formatBytes(layer.trueBytes),
      formatRatio(ratio(layer.originalBytes, layer.trueBytes)),
      formatBits(layer.keys.bits),
      formatBits(layer.values.bits),
      ...(errors ? [...errorCells(layer.keys), ...errorCells(layer.values)] : []),
    ]),
  };
}

/** Prints it. */
export function printLayers(report: KvFileReport, options: { errors: boolean }): void {
  const { headings, rows } = layerTable(report, options);
  printTable(headings, rows);
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
