import { Device } from "../../src/device/mod.ts";
import { AtomicFile } from "../../src/io/mod.ts";
import { DEFAULT_CACHE_CODECS, parseCacheCodec } from "../../src/kv/cache_codec.ts";
import { benchKvCache, type KvCacheBench } from "../../src/kv/mod.ts";
import { FIXTURE, FIXTURE_PATH } from "../fixture.ts";
import { listenForInterrupt } from "../interrupt.ts";
import {
  defined,
  type GlobalOptions,
  type NamedCacheCodec,
  type PatternOptions,
} from "../options.ts";
import {
  formatBits,
  formatBytes,
  formatRatio,
  formatSeconds,
  print,
  printJson,
  printTable,
  withProgress,
} from "../output.ts";

/** Options of `kv bench`. */
export interface KvBenchOptions extends PatternOptions {
  kv?: NamedCacheCodec[] | undefined;
  tokens: number;
  batch: number;
  heads: number;
  group: number;
  headDim: 64 | 96 | 128 | 256;
  dtype: "f16" | "bf16";
  layers?: number | undefined;
  repeat: number;
  dump?: string | undefined;
  svg?: string | undefined;
}

/** What was measured of a codec. */
interface Row extends KvCacheBench {
  kv: string;
  /** How many times faster attention is than over 16 bits, where that was measured. */
  speedup: number | undefined;
}

/** Measures growing caches on this machine. */
export async function kvBench(options: GlobalOptions & KvBenchOptions): Promise<void> {
  const { backend, tokens, batch, heads, group, headDim, dtype, layers, repeat } = options;
  const { dump, keyPattern, valuePattern, svg } = options;
  const codecs = options.kv ??
    DEFAULT_CACHE_CODECS.map((kv) => ({ kv, codec: parseCacheCodec(kv) }));
  using device = Device.open(defined({ backend }));
  using interrupt = listenForInterrupt();
  const { signal } = interrupt;
  using chart = svg === undefined ? undefined : await AtomicFile.create(svg, { signal });
  const measured: (KvCacheBench & { kv: string })[] = [];
  for (const { kv, codec } of codecs) {
    const bench = await withProgress(`measuring ${kv}`, (onProgress) =>
      benchKvCache(device, {
        input: dump ?? FIXTURE_PATH,
        codec,
        tokens,
        batch,
        kvHeads: heads,
        group,
        headDim,
        dtype,
        repeat,
        ...defined({ layers, keyPattern, valuePattern }),
        onProgress,
        signal,
      }));
    measured.push({ kv, ...bench });
  }
  const raw16 = measured.find(({ kv }) => kv === "raw16")?.attendSeconds;
  const rows = measured.map((row): Row => ({
    ...row,
    speedup: raw16 === undefined ? undefined : raw16 / row.attendSeconds,
  }));
  if (chart) await (await import("../chart.ts")).writeBenchChart(chart, rows);
  const { name } = device.info;
  if (options.json) {
    const shape = { batch, kvHeads: heads, queryHeads: group * heads, headDim, dtype };
    const data = dump ?? FIXTURE;
    return printJson({ backend: device.backend, device: name, data, ...shape, repeat, svg, rows });
  }
  print(
    `${name}: ${batch} × ${(rows[0]?.tokens ?? tokens).toLocaleString("en")} tokens, ` +
      `${heads} kv heads of ${headDim} with ${group} query heads each, ${dtype}`,
  );
  printRows(rows);
  print("times are for a step and a layer; data drawn from " + (dump ?? FIXTURE));
  if (svg !== undefined) print(`${svg} written`);
}

function printRows(rows: readonly Row[]): void {
  printTable(
    [
      "kv",
      ">layers",
      ">bits/value",
      ">prefill of 16-bit",
      ">append",
      ">attention",
      ">reads",
      ">than raw16",
    ],
    rows.map((row) => [
      row.kv,
      row.layers,
      formatBits(row.bitsPerValue),
      `${formatBytes(row.prefillBytesPerSecond)}/s`,
      formatSeconds(row.appendSeconds),
      formatSeconds(row.attendSeconds),
      `${formatBytes(row.attendBytes / row.attendSeconds)}/s`,
      row.speedup === undefined ? "" : formatRatio(row.speedup),
    ]),
  );
}
