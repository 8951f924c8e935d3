import { ValidationError } from "@cliffy/command";
import { Device } from "../../src/device/mod.ts";
import { LanguageModel } from "../../src/llm/mod.ts";
import { cacheReport } from "../cache_report.ts";
import { listenForInterrupt } from "../interrupt.ts";
import { DEFAULT_CODEC, type GenerationCommandOptions, samplingOf } from "../model_generation.ts";
import { defined, type GlobalOptions } from "../options.ts";
import {
  formatBits,
  formatBytes,
  formatSeconds,
  printAside,
  printJson,
  printPiece,
  withProgress,
} from "../output.ts";
import { readText } from "../text_file.ts";

/** Options of `llm generate`. */
export interface LlmGenerateOptions extends GenerationCommandOptions {
  prompt?: string | undefined;
  file?: string | undefined;
  stop?: string[] | undefined;
}

/** Continues a prompt: prints the text as it comes, or all about it as JSON. */
export async function llmGenerate(options: GlobalOptions & LlmGenerateOptions): Promise<void> {
  const { backend, json, context, residual } = options;
  const { kv, codec } = options.kv ?? DEFAULT_CODEC;
  const { maxTokens, stop } = options;
  const prompt = await promptOf(options);
  using device = Device.open(defined({ backend }));
  using interrupt = listenForInterrupt();
  const { signal } = interrupt;
  using model = await withProgress(
    "loading",
    (onProgress) =>
      LanguageModel.load(device, options.model, {
        codec,
        sequences: 1,
        residual,
        ...defined({ tokens: context }),
        onProgress,
        signal,
      }),
  );
  // Keeps the sequence, whose bytes are to be counted.
  using memory = model.createMemory();
  const tokens: number[] = [];
  let text = "";
  let finish: string | undefined;
  const start = performance.now();
  try {
    const generation = { ...samplingOf(options), maxTokens, stop, memory, signal };
    for await (const piece of model.generate(prompt, generation)) {
      tokens.push(...piece.tokens);
      text += piece.text;
      finish = piece.finish;
      if (!json) printPiece(piece.text);
    }
  } finally {
    // Also before the message of what went wrong half way.
    if (!json && tokens.length > 0) printPiece("\n");
  }
  const seconds = (performance.now() - start) / 1000;
  const cache = cacheReport(model);
  if (json) {
    return printJson({
      model: options.model,
      backend: device.backend,
      device: device.info.name,
      kv,
      residual,
      promptTokens: cache.tokens - tokens.length + 1, // the last was chosen, but not computed
      text,
      tokens,
      tokenCount: tokens.length,
      finish,
      seconds,
      tokensPerSecond: tokens.length / seconds,
      cacheBytes: cache.bytes,
      raw16CacheBytes: cache.raw16Bytes,
      bitsPerValue: cache.bitsPerValue,
      packedTokens: cache.packedTokens,
      allocatedBytes: cache.allocatedBytes,
    });
  }
  printAside(
    `${tokens.length} tokens in ${formatSeconds(seconds)}; cache of ` +
      `${cache.tokens.toLocaleString("en")} tokens in ${formatBytes(cache.bytes)}, ` +
      `${formatBits(cache.bitsPerValue)} bits per value`,
  );
}

async function promptOf({ prompt, file }: LlmGenerateOptions): Promise<string> {
  if (prompt !== undefined) return prompt;
  if (file === undefined) throw new ValidationError('Missing option "--prompt" or "--file".');
  return await readText(file);
}
