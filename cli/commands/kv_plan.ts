import { ValidationError } from "@cliffy/command";
import { Device, measureCopyBandwidth } from "../../src/device/mod.ts";
import { PackhorseError } from "../../src/error.ts";
import { AtomicFile } from "../../src/io/mod.ts";
import {
  type KvCacheCodec,
  type KvCachePlan,
  type KvCachePlanOptions,
  type KvCacheWidths,
  type KvModel,
  measureKvCacheWidths,
  parseCacheCodec,
  planKvCache,
  readModelConfig,
} from "../../src/kv/mod.ts";
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

/** Options of `kv plan`. */
export interface KvPlanOptions extends PatternOptions {
  config: string;
  memory: number;
  weights?: number | undefined;
  kv?: NamedCacheCodec[] | undefined;
  batch: number;
  context?: number | undefined;
  residual?: number | undefined;
  sinks?: number | undefined;
  stepTokens?: number | undefined;
  bandwidth?: number | undefined;
  bitsPerValue?: number | undefined;
  dump?: string | undefined;
  svg?: string | undefined;
}

/** About what an H200 reads per second. */
const ASSUMED_BANDWIDTH = 4e12;

/** A codec's plan, and where the width of its values comes from. */
interface NamedPlan extends NamedCacheCodec {
  plan: KvCachePlan;
  options: KvCachePlanOptions;
  widths: KvCacheWidths | undefined;
}

/** Says how long a context fits into a memory. */
export async function kvPlan(options: GlobalOptions & KvPlanOptions): Promise<void> {
  const { backend, config, memory, batch, bitsPerValue, svg } = options;
  const codecs = options.kv ?? [{ kv: "packkv", codec: parseCacheCodec("packkv") }];
  checkUseless(options, codecs);
  const model = await readModelConfig(config);
  const weights = weightsOf(model, options);
  using device = openDevice(options);
  using interrupt = listenForInterrupt();
  const { signal } = interrupt;
  using chart = svg === undefined ? undefined : await AtomicFile.create(svg, { signal });
  const bandwidth = await bandwidthOf(device, options);
  const { context, residual, sinks, stepTokens } = options;
  const common = {
    model,
    memoryBytes: memory,
    weightBytes: weights.bytes,
    batch,
    bytesPerSecond: bandwidth.bytesPerSecond,
    ...defined({ residual, sinks, stepTokens, backend, bitsPerValue }),
  };
  const plans: NamedPlan[] = [];
  for (const { kv, codec } of codecs) {
    const measures = bitsPerValue === undefined && dependsOnData(codec);
    const widths = measures ? await measure(device, { ...options, kv, codec, signal }) : undefined;
    const each = { ...common, codec, ...defined({ widths }) };
    plans.push({
      kv,
      codec,
      plan: planKvCache({ ...each, ...defined({ context }) }),
      options: each,
      widths,
    });
  }
  const raw16 = planKvCache({ ...common, codec: parseCacheCodec("raw16") });
  if (chart) await writeChart(chart, plans, memory);
  const { dump = FIXTURE } = options;
  if (options.json) {
    const reports = plans.map((plan) => planReport(plan, { raw16, dump, bitsPerValue }));
    printJson({
      config,
      backend: raw16.backend,
      measuredOn: device.backend,
      model: modelReport(model),
      memoryBytes: memory,
      weights,
      bandwidth,
      batch,
      ...defined({ svg }),
      ...(reports.length === 1 ? reports[0] : { plans: reports }),
    });
  } else {
    printModel(model, { memory, weights });
    printPlans(plans);
    printSummary(plans, raw16, { batch, model });
    printSources(plans, { dump, bitsPerValue, bandwidth });
    if (raw16.backend !== device.backend) {
      print(
        `sizes are those of the ${raw16.backend} library; there is no GPU, so the CPU measured`,
      );
    }
    if (svg !== undefined) print(`${svg} written`);
  }
  if (plans.every(({ plan }) => !plan.fits)) {
    const longest = Math.max(...plans.map(({ plan }) => plan.maxContext));
    const message =
      `A context of ${context} tokens does not fit; the longest that does is ${longest}`;
    throw new PackhorseError("out-of-memory", message);
  }
}

function dependsOnData({ keys, values }: KvCacheCodec): boolean {
  return keys.quantizer === "packkv" || values.quantizer === "packkv";
}

function checkUseless(
  { bitsPerValue, dump, batch, stepTokens }: KvPlanOptions,
  codecs: NamedCacheCodec[],
): void {
  const given = bitsPerValue !== undefined ? "--bits-per-value" : dump && "--dump";
  if (given && !codecs.some(({ codec }) => dependsOnData(codec))) {
    throw new ValidationError(`Option "${given}" needs "--kv packkv".`);
  }
  if (stepTokens !== undefined && stepTokens < batch) {
    throw new ValidationError(
      `Option "--step-tokens" must be at least the batch of ${batch}, but got "${stepTokens}".`,
    );
  }
}

/** The device that was asked for; the CPU where that is a GPU that is not here: planning for it needs none. */
function openDevice({ backend }: GlobalOptions): Device {
  try {
    return Device.open(defined({ backend }));
  } catch (error) {
    if (!(error instanceof PackhorseError) || error.code !== "no-gpu") throw error;
    return Device.open({ backend: "cpu" });
  }
}

interface Weights {
  bytes: number;
  source: "option" | "config";
  parameters?: number;
}

function weightsOf(model: KvModel, { weights, config }: KvPlanOptions): Weights {
  if (weights !== undefined) return { bytes: weights, source: "option" };
  if ("unknown" in model.weights) {
    const message = `Cannot count the weights of ${config}, as ${model.weights.unknown}; ` +
      "give --weights";
    throw new PackhorseError("unsupported", message);
  }
  const { bytes, parameters } = model.weights;
  return { bytes, source: "config", parameters };
}

interface Bandwidth {
  bytesPerSecond: number;
  source: "option" | "measured" | "assumed";
}

async function bandwidthOf(device: Device, { bandwidth }: KvPlanOptions): Promise<Bandwidth> {
  if (bandwidth !== undefined) return { bytesPerSecond: bandwidth, source: "option" };
  if (device.backend === "cpu") return { bytesPerSecond: ASSUMED_BANDWIDTH, source: "assumed" };
  // A copy reads and writes every byte.
  return { bytesPerSecond: 2 * await measureCopyBandwidth(device), source: "measured" };
}

async function measure(
  device: Device,
  { kv, codec, dump, keyPattern, valuePattern, signal }:
    & Omit<KvPlanOptions, "kv">
    & NamedCacheCodec
    & { signal: AbortSignal },
): Promise<KvCacheWidths> {
  return await withProgress(`measuring ${kv}`, (onProgress) =>
    measureKvCacheWidths(device, {
      input: dump ?? FIXTURE_PATH,
      codec,
      ...defined({ keyPattern, valuePattern }),
      onProgress,
      signal,
    }));
}

/** How long a context fits into memories from half to one and a half times of this. */
async function writeChart(
  chart: AtomicFile,
  plans: readonly NamedPlan[],
  memory: number,
): Promise<void> {
  const points = plans.flatMap(({ kv, options }) =>
    Array.from({ length: 33 }, (_, i) => {
      const memoryBytes = Math.floor(memory * (0.5 + i / 32));
      return { kv, memoryBytes, maxContext: maxContext({ ...options, memoryBytes }) };
    })
  );
  await (await import("../chart.ts")).writePlanChart(chart, points, memory);
}

function maxContext(options: KvCachePlanOptions): number {
  try {
    return planKvCache(options).maxContext;
  } catch (error) {
    if (error instanceof PackhorseError && error.code === "out-of-memory") return 0;
    throw error;
  }
}

function modelReport({ weights: _, ...model }: KvModel) {
  return model;
}

/** A plan as `--json` shows it. */
function planReport(
  { kv, codec, plan, widths }: NamedPlan,
  { raw16, dump, bitsPerValue }: {
    raw16: KvCachePlan;
    dump: string;
    bitsPerValue: number | undefined;
  },
) {
  const { maxContext, context, fits, bytes, bitsPerValue: allBits, packedBitsPerValue, time } =
    plan;
  const source = !dependsOnData(codec)
    ? { source: "constant" }
    : widths === undefined
    ? { source: "option", bitsPerValue }
    : { source: "measured", dump, ...widths };
  return {
    kv,
    maxContext,
    raw16MaxContext: raw16.maxContext,
    context,
    fits,
    bytes,
    bitsPerValue: allBits,
    packedBitsPerValue,
    packedBits: source,
    time,
    cache: plan.options,
  };
}

const count = (value: number) => value.toLocaleString("en");

function printModel(
  { type, layers, queryHeads, kvHeads, headDim }: KvModel,
  { memory, weights }: { memory: number; weights: Weights },
): void {
  const from = weights.parameters === undefined
    ? "--weights"
    : `${count(weights.parameters)} of them, by the config`;
  print(
    `${
      type ?? "model"
    }: ${layers} layers, ${queryHeads} query and ${kvHeads} kv heads of ${headDim}; ` +
      `${formatBytes(weights.bytes)} of weights (${from}) in ${formatBytes(memory)}`,
  );
}

function printPlans(plans: readonly NamedPlan[]): void {
  const shorter = plans.some(({ plan: { context, maxContext } }) => context !== maxContext);
  printTable(
    [
      "kv",
      ">longest",
      ...(shorter ? [">planned"] : []),
      ">bits/value",
      ">keys",
      ">values",
      ">16-bit",
      ">tables",
      ">scratch",
      ">reserve",
      ">free",
      ">time/step",
      ">in 16 bits",
      ">ratio",
    ],
    plans.map(({ kv, plan: { maxContext, context, bytes, bitsPerValue, time } }) => [
      kv,
      count(maxContext),
      ...(shorter ? [count(context)] : []),
      formatBits(bitsPerValue),
      formatBytes(bytes.packedKeys),
      formatBytes(bytes.packedValues),
      formatBytes(bytes.recent),
      formatBytes(bytes.index + bytes.pageTables),
      formatBytes(bytes.step + bytes.workspace),
      formatBytes(bytes.reserve),
      bytes.free < 0 ? `-${formatBytes(-bytes.free)}` : formatBytes(bytes.free),
      formatSeconds(time!.secondsPerStep),
      formatSeconds(time!.raw16SecondsPerStep),
      formatRatio(time!.speedup),
    ]),
  );
}

function printSummary(
  plans: readonly NamedPlan[],
  raw16: KvCachePlan,
  { batch, model: { contextLimit, slidingWindow } }: { batch: number; model: KvModel },
): void {
  const best = plans.reduce((a, b) => b.plan.maxContext > a.plan.maxContext ? b : a);
  const { maxContext } = best.plan;
  const sequences = batch === 1 ? "a sequence" : `each of ${batch} sequences`;
  const times = formatRatio(maxContext / raw16.maxContext);
  print(
    `${best.kv} holds ${count(maxContext)} tokens of ${sequences}, ` +
      `${times} the ${count(raw16.maxContext)} of 16 bits`,
  );
  if (contextLimit !== undefined) {
    print(`the model is made for ${count(contextLimit)} tokens (max_position_embeddings)`);
  }
  if (slidingWindow !== undefined) {
    print(
      `layers look at the last ${count(slidingWindow)} tokens (sliding_window); all are kept here`,
    );
  }
}

function printSources(
  plans: readonly NamedPlan[],
  { dump, bitsPerValue, bandwidth: { bytesPerSecond, source } }: {
    dump: string;
    bitsPerValue: number | undefined;
    bandwidth: Bandwidth;
  },
): void {
  for (const { kv, codec, widths, plan } of plans) {
    const { keys, values } = plan.packedBitsPerValue;
    const bits = `${formatBits(keys)} bits per packed key, ${formatBits(values)} per value`;
    if (widths !== undefined) {
      print(`${kv}: ${bits}, measured on ${count(widths.tokens)} tokens of ${dump}`);
    } else if (bitsPerValue !== undefined && dependsOnData(codec)) {
      print(`${kv}: ${bits}, by --bits-per-value`);
    }
  }
  const where = {
    option: "by --bandwidth",
    measured: "twice the copy bandwidth of this GPU",
    assumed: "assumed; --bandwidth sets it",
  }[source];
  print(`times: weights and cache read at ${formatBytes(bytesPerSecond)}/s (${where})`);
}
