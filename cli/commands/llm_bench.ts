import { ValidationError } from "@cliffy/command";
import { Device } from "../../src/device/mod.ts";
import { PackhorseError } from "../../src/error.ts";
import { DEFAULT_CACHE_CODECS, parseCacheCodec } from "../../src/kv/cache_codec.ts";
import type { ModelBench } from "../../src/llm/mod.ts";
import { FIXTURE, FIXTURE_PATH } from "../fixture.ts";
import { listenForInterrupt } from "../interrupt.ts";
import { loadForMeasuring } from "../model_evaluation.ts";
import {
  defined,
  type GlobalOptions,
  type NamedCacheCodec,
  type PatternOptions,
} from "../options.ts";
import {
  formatBits,
  formatBytes,
  formatPerCent,
  formatRatio,
  formatSeconds,
  print,
  printJson,
  printTable,
  withProgress,
} from "../output.ts";

/** Options of `llm bench`. */
export interface LlmBenchOptions extends PatternOptions {
  model?: string | undefined;
  config?: string | undefined;
  kv?: NamedCacheCodec[] | undefined;
  context: number;
  batch: number;
  tokens: number;
  synthetic?: true | undefined;
  dump?: string | undefined;
  bitsPerValue?: number | undefined;
  residual?: number | undefined;
  sinks?: number | undefined;
  stepTokens?: number | undefined;
}

/** What was measured of a codec, or why it was not. */
type Row = { kv: string } & (Measured | { error: string });

interface Measured extends Omit<ModelBench, "codec"> {
  /** How many times more tokens per second than over 16 bits, where that was measured. */
  speedup: number | undefined;
}

/** Measures how fast a model runs over caches of several codecs, one after another. */
export async function llmBench(options: GlobalOptions & LlmBenchOptions): Promise<void> {
  const { backend, context, batch, tokens, bitsPerValue, residual, sinks, stepTokens } = options;
  const codecs = options.kv ??
    DEFAULT_CACHE_CODECS.map((kv) => ({ kv, codec: parseCacheCodec(kv) }));
  const folder = options.model ?? options.config;
  if (folder === undefined) throw new ValidationError('Missing option "--model" or "--config".');
  const { dump, keyPattern, valuePattern } = options;
  const input = dump ?? FIXTURE_PATH;
  const fill = options.synthetic && { input, ...defined({ keyPattern, valuePattern }) };
  using device = Device.open(defined({ backend }));
  using interrupt = listenForInterrupt();
  const { signal } = interrupt;
  const randomWeights = options.config !== undefined;
  using model = await loadForMeasuring(device, folder, signal, { randomWeights, tokenizer: false });
  const measured: ({ kv: string } & (ModelBench | { error: PackhorseError }))[] = [];
  for (const { kv, codec } of codecs) {
    try {
      const bench = await withProgress(`measuring ${kv}`, (onProgress) =>
        model.bench({
          ...{ codec, context, batch, tokens, fill, bitsPerValue, residual, sinks, stepTokens },
          onProgress,
          signal,
        }));
      measured.push({ kv, ...bench });
    } catch (error) {
      // One codec may fit where another does not.
      if (!(error instanceof PackhorseError && error.code === "out-of-memory")) throw error;
      measured.push({ kv, error });
    }
  }
  const raw16 = measured.find((row) => row.kv === "raw16" && !("error" in row));
  const base = raw16 && "error" in raw16 ? undefined : raw16?.decodeTokensPerSecond;
  const rows = measured.map((row): Row => {
    if ("error" in row) return { kv: row.kv, error: row.error.message };
    const { codec: _, ...rest } = row;
    return { ...rest, speedup: base && row.decodeTokensPerSecond / base };
  });
  const filledFrom = options.synthetic ? dump ?? FIXTURE : undefined;
  if (options.json) {
    printJson({
      ...defined({ model: options.model, config: options.config }),
      backend: device.backend,
      device: device.info.name,
      ...{ parameters: model.parameters, weightBytes: model.weightBytes },
      ...{ randomWeights, context, batch, tokens },
      ...{ synthetic: options.synthetic ?? false, ...defined({ filledFrom }), rows },
    });
  } else {
    print(
      `${folder} on ${device.info.name}: ${formatBytes(model.weightBytes)} of ` +
        `${randomWeights ? "random " : ""}weights; ${batch} × ` +
        `${context.toLocaleString("en")} tokens, the last ${tokens} timed`,
    );
    printRows(rows);
    printNotes(rows, filledFrom);
  }
  const failed = measured.flatMap((row) => "error" in row ? [row.error] : []);
  if (failed.length === measured.length) throw failed[0];
}

function printRows(rows: readonly Row[]): void {
  printTable(
    [
      "kv",
      ">bits/value",
      ">cache",
      ">of 16-bit",
      ">prefill",
      ">decode",
      ">time/step",
      ">gaps",
      ">than raw16",
    ],
    rows.map((row) => {
      if ("error" in row) return [row.kv, ...Array(8).fill("")];
      return [
        row.kv,
        formatBits(row.bitsPerValue),
        formatBytes(row.cacheBytes),
        formatPerCent(row.cacheBytes / row.raw16CacheBytes),
        `${perSecond(row.prefillTokensPerSecond)}/s`,
        `${perSecond(row.decodeTokensPerSecond)}/s`,
        formatSeconds(row.stepSeconds),
        row.launchGapShare === undefined ? "" : formatPerCent(row.launchGapShare),
        row.speedup === undefined ? "" : formatRatio(row.speedup),
      ];
    }),
  );
}

function printNotes(rows: readonly Row[], filledFrom: string | undefined): void {
  for (const row of rows) {
    if ("error" in row) print(`${row.kv}: not measured: ${row.error}`);
  }
  const row = rows.find((row) => !("error" in row));
  if (row === undefined || "error" in row) return;
  if (row.isSynthetic) {
    print(
      "the cache was not computed: it was filled with synthetic keys and values, drawn from " +
        `${filledFrom}; prefill is of a prompt of ${row.prefillTokens.toLocaleString("en")} tokens`,
    );
  }
  if (row.launchGapShare !== undefined) {
    print("gaps: what a step takes longer than in a row that the GPU runs without the host");
  }
}

function perSecond(tokens: number): string {
  return tokens < 100 ? tokens.toFixed(1) : Math.round(tokens).toLocaleString("en");
}
