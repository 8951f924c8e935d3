import { Device } from "../../src/device/mod.ts";
import { parseCacheCodec } from "../../src/kv/cache_codec.ts";
import { LanguageModel } from "../../src/llm/mod.ts";
import { listenForInterrupt } from "../interrupt.ts";
import { defined, type GlobalOptions } from "../options.ts";
import {
  formatBits,
  formatError,
  formatPerCent,
  print,
  printJson,
  printTable,
  withProgress,
} from "../output.ts";
import { readText } from "../text_file.ts";

/** Options of `llm perplexity`. */
export interface LlmPerplexityOptions {
  model: string;
  text: string;
  windows: number;
  tokens: number;
  kv?: string | undefined;
  residual: number;
}

/** Measures how well a model predicts a text, and what packing its cache costs. */
export async function llmPerplexity(options: GlobalOptions & LlmPerplexityOptions): Promise<void> {
  const { backend, json, windows, tokens, kv = "raw16", residual } = options;
  const { keys, values } = parseCacheCodec(kv);
  const packs = keys.quantizer !== "raw16" || values.quantizer !== "raw16";
  const text = await readText(options.text);
  using device = Device.open(defined({ backend }));
  using interrupt = listenForInterrupt();
  const { signal } = interrupt;
  // Evaluation has caches of its own; the model's is as small as can be.
  const cache = { codec: "raw16", sequences: 1, tokens: 64, stepTokens: 64 };
  using model = await withProgress(
    "loading",
    (onProgress) => LanguageModel.load(device, options.model, { ...cache, onProgress, signal }),
  );
  const { reference, results: [packed] } = await withProgress(
    "measuring",
    (onProgress) => {
      const codecs = packs ? [kv] : [];
      return model.evaluate(text, { windows, tokens, codecs, residual, onProgress, signal });
    },
  );
  if (json) {
    return printJson({
      model: options.model,
      text: options.text,
      backend: device.backend,
      device: device.info.name,
      windows,
      tokens,
      predictions: reference.predictions,
      kv,
      ...(packed === undefined ? { perplexity: reference.perplexity } : {
        residual,
        perplexity: packed.perplexity,
        raw16Perplexity: reference.perplexity,
        perplexityIncrease: packed.perplexityIncrease,
        kld: packed.kld,
        top1: packed.top1,
        bitsPerValue: packed.bitsPerValue,
      }),
    });
  }
  print(
    `${options.model} on ${device.info.name}: ${windows} × ${tokens.toLocaleString("en")} ` +
      `predictions of ${options.text}`,
  );
  printTable(
    ["kv", ">bits/value", ">perplexity", ">more", ">KLD", ">same top token"],
    [
      ["raw16", formatBits(16), reference.perplexity.toFixed(3), "", "", ""],
      ...(packed === undefined ? [] : [[
        kv,
        formatBits(packed.bitsPerValue),
        packed.perplexity.toFixed(3),
        formatPerCent(packed.perplexityIncrease),
        formatError(packed.kld),
        formatPerCent(packed.top1),
      ]]),
    ],
  );
}
