import { Device } from "../../src/device/mod.ts";
import { listenForInterrupt } from "../interrupt.ts";
import { loadForMeasuring } from "../model_evaluation.ts";
import { defined, type GlobalOptions } from "../options.ts";
import { formatBytes, formatSeconds, print, printJson, withProgress } from "../output.ts";
import { readText } from "../text_file.ts";

/** Options of `llm dump`. */
export interface LlmDumpOptions {
  model: string;
  text: string;
  out: string;
  tokens: number;
  layers?: number[] | undefined;
}

/** Writes the cache that a text leaves. */
export async function llmDump(options: GlobalOptions & LlmDumpOptions): Promise<void> {
  const { backend, json, model: folder, text: file, out: output, tokens, layers } = options;
  const text = await readText(file);
  using device = Device.open(defined({ backend }));
  using interrupt = listenForInterrupt();
  const { signal } = interrupt;
  using model = await loadForMeasuring(device, folder, signal);
  const start = performance.now();
  const report = await withProgress(
    "computing",
    (onProgress) => model.dump(text, output, { tokens, layers, onProgress, signal }),
  );
  const seconds = (performance.now() - start) / 1000;
  if (json) {
    const where = { backend: device.backend, device: device.info.name };
    return printJson({ model: folder, text: file, output, ...where, ...report, seconds });
  }
  const count = report.layers.length;
  print(
    `${output} written in ${formatSeconds(seconds)} on ${device.info.name}: ` +
      `${tokens.toLocaleString("en")} tokens of ${count} ${count === 1 ? "layer" : "layers"}, ` +
      `${formatBytes(report.byteLength)} in ${report.dtype}`,
  );
}
