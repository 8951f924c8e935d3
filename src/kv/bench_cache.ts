import type { Device } from "../device/device.ts";
import { PackhorseError } from "../error.ts";
import { KvCache, type KvSequence } from "./cache.ts";
import { type KvCacheCodec, type KvCacheDType, splitsToFill } from "./cache_options.ts";
import type { KvCacheStep } from "./cache_step.ts";
import { BLOCK_TOKENS } from "./codec.ts";
import type { KvCacheFileOptions } from "./file_options.ts";
import { ProgressCount } from "./progress.ts";
import { KvSampler } from "./sample.ts";
import { SampledTokens } from "./sampled_tokens.ts";
import { withWholePool } from "./pool_bytes.ts";

/** Options of {@linkcode benchKvCache}. */
export interface BenchKvCacheOptions extends Omit<KvCacheFileOptions, "chunkBytes"> {
  /** How tokens are packed. Default: as {@linkcode KvCacheOptions.codec}. */
  readonly codec?: KvCacheCodec | undefined;
  /** Tokens of each sequence. Default: 8192. */
  readonly tokens?: number | undefined;
  /** Sequences. Default: 1. */
  readonly batch?: number | undefined;
  /** Heads of the keys and values. Default: 8. */
  readonly kvHeads?: number | undefined;
  /** Query heads of each of them. Default: 4. */
  readonly group?: number | undefined;
  /** Channels of a head. Default: 128. */
  readonly headDim?: number | undefined;
  /** Type of the tokens. Default: f16. */
  readonly dtype?: KvCacheDType | undefined;
  /**
   * Layers, whose turns keep a layer from being in a processor's own memory when it comes again. Default: as many as
   * take 64 MB in 3 bits per value on the CPU and 512 MB on a GPU, at most 64.
   */
  readonly layers?: number | undefined;
  /** How often attention is measured. Default: 20. */
  readonly repeat?: number | undefined;
}

/** What {@linkcode benchKvCache} measures, by the device's clock. */
export interface KvCacheBench {
  /** Layers of the cache. */
  readonly layers: number;
  /** Tokens of each sequence while attention was measured. */
  readonly tokens: number;
  /** Bits per packed key or value, with scales and tables. */
  readonly bitsPerValue: number;
  /** Bytes of 16-bit keys and values appended per second, in steps of up to 2,048 tokens. */
  readonly prefillBytesPerSecond: number;
  /** Seconds for a step of a token for each sequence, per layer: the mean over the 64 in which a block gets packed. */
  readonly appendSeconds: number;
  /** Seconds of decode attention for a token of each sequence, per layer: the median. */
  readonly attendSeconds: number;
  /** Bytes of packed records and tokens in 16 bits that this reads. */
  readonly attendBytes: number;
}

const STEP_TOKENS = 2048;
const RESIDUAL = 128;
const SINKS = 4;
/** One-token steps: 64 to warm up, 64 that count. */
const SINGLE_STEPS = 2 * BLOCK_TOKENS;

/**
 * Measures a {@linkcode KvCache} on this machine, on tokens drawn from a real cache in a `.safetensors` file: how fast
 * it fills, what one more token costs, and how fast attention reads it.
 *
 * Throws as {@linkcode KvCache.create}, and as {@linkcode measureKvCacheWidths} for the file, which may have any float
 * type here.
 *
 * @example
 * ```ts
 * import { benchKvCache, Device } from "@packhorse/packhorse";
 * import { assert } from "@std/assert";
 *
 * using device = Device.open();
 * const input = "tests/fixtures/tiny/kv.safetensors";
 * const bench = await benchKvCache(device, { input, tokens: 512, layers: 1, repeat: 3 });
 * assert(bench.attendSeconds > 0 && bench.bitsPerValue < 5);
 * ```
 */
export async function benchKvCache(
  device: Device,
  options: BenchKvCacheOptions,
): Promise<KvCacheBench> {
  const { tokens = 8192, batch = 1, group = 4, repeat = 20, codec } = options;
  const { kvHeads = 8, headDim = 128, dtype = "f16" } = options;
  if (!(Number.isInteger(repeat) && repeat >= 1)) {
    const message =
      `Cannot measure the kv cache: repeat must be an integer of 1 or more, got ${repeat}`;
    throw new PackhorseError("invalid-argument", message);
  }
  const { layers = defaultLayers(device, 2 * batch * tokens * kvHeads * headDim) } = options;
  const shape = { layers, queryHeads: group * kvHeads, kvHeads, headDim, dtype };
  const config = withWholePool(device, {
    ...shape,
    sequences: batch,
    tokens: tokens + SINGLE_STEPS,
    stepTokens: Math.max(STEP_TOKENS, batch),
    splits: splitsToFill({ sequences: batch, kvHeads }),
    residual: RESIDUAL,
    sinks: SINKS,
    codec,
  });
  const chunks = Math.ceil(tokens / STEP_TOKENS);
  const progress = new ProgressCount(2 * batch * chunks + SINGLE_STEPS + repeat, options);
  const sampler = await KvSampler.open(options, { dtype });
  using cache = KvCache.create(device, config);
  using stack = new DisposableStack();
  const size = { layers, tokens: Math.max(tokens, batch), kvHeads, headDim, dtype };
  const inputs = stack.use(new SampledTokens(device, sampler, size));
  const queries = stack.use(device.createBuffer(dtype, batch * shape.queryHeads * headDim));
  const { keys } = sampler.sample(0, { tokens: batch, heads: shape.queryHeads, headDim });
  queries.upload(keys);
  const out = stack.use(device.createBuffer(dtype, queries.length));
  const run = { cache, inputs, progress };

  // Once to touch all memory, then to measure.
  for (const sequence of (await prefill(run, tokens)).sequences) cache.remove(sequence);
  const { sequences, seconds } = await prefill(run, tokens);
  const { step, appendSeconds } = await appendSingly(run, sequences);

  const times: number[] = [];
  const attend = () => {
    for (let layer = 0; layer < layers; layer++) step.attend(layer, queries, out);
  };
  attend();
  for (let i = 0; i < repeat; i++) {
    times.push(device.time(attend) / 1000);
    await advance(run);
  }
  cache.check();
  const { packedBytes, packedTokens, tokens: allTokens } = cache.statistics();
  const tokenValues = 2 * layers * kvHeads * headDim;
  return {
    layers,
    tokens: tokens + SINGLE_STEPS,
    bitsPerValue: packedTokens === 0 ? 16 : 8 * packedBytes / (packedTokens * tokenValues),
    prefillBytesPerSecond: 2 * tokenValues * batch * tokens / seconds,
    appendSeconds,
    attendSeconds: times.sort((a, b) => a - b)[times.length >> 1]! / layers,
    attendBytes: (packedBytes + 2 * tokenValues * (allTokens - packedTokens)) / layers,
  };
}

interface Run {
  readonly cache: KvCache;
  /** The same for every sequence. */
  readonly inputs: SampledTokens;
  readonly progress: ProgressCount;
}

async function prefill(
  run: Run,
  tokens: number,
): Promise<{ sequences: KvSequence[]; seconds: number }> {
  const { cache } = run;
  const { device } = cache;
  const sequences = Array.from({ length: cache.config.sequences }, () => cache.add());
  let milliseconds = 0;
  for (const sequence of sequences) {
    for (let first = 0; first < tokens; first += STEP_TOKENS) {
      const count = Math.min(STEP_TOKENS, tokens - first);
      milliseconds += device.time(() => {
        run.inputs.append(cache.begin([{ sequence, tokens: count }]), first);
      });
      await advance(run);
    }
  }
  return { sequences, seconds: milliseconds / 1000 };
}

/** A token for each sequence at a time; the last step stays current. */
async function appendSingly(
  run: Run,
  sequences: readonly KvSequence[],
): Promise<{ step: KvCacheStep; appendSeconds: number }> {
  const { cache } = run;
  const parts = sequences.map((sequence) => ({ sequence }));
  let milliseconds = 0;
  let step: KvCacheStep | undefined;
  for (let i = 0; i < SINGLE_STEPS; i++) {
    const time = cache.device.time(() => {
      step = cache.begin(parts);
      run.inputs.append(step, 0);
    });
    if (i >= SINGLE_STEPS - BLOCK_TOKENS) milliseconds += time;
    await advance(run);
  }
  return {
    step: step!,
    appendSeconds: milliseconds / 1000 / BLOCK_TOKENS / cache.config.layers,
  };
}

/** Lets a signal and the progress bar have their turn. */
async function advance({ cache: { device }, progress }: Run): Promise<void> {
  await device.synchronize();
  progress.advance(1);
}

function defaultLayers({ backend }: Device, layerValues: number): number {
  const bytes = backend === "cpu" ? 64e6 : 512e6;
  return Math.min(64, Math.max(1, Math.ceil(bytes / (layerValues * 3 / 8))));
}
