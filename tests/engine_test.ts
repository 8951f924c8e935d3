/**
 * What programs need that have an engine already, on every backend that opens here (PACKHORSE_BACKEND names one):
 * foreign memory, foreign streams, and steps that are captured once and replayed.
 */
import { assert, assertEquals, assertGreater, assertLess, assertThrows } from "@std/assert";
import { Device, DeviceBuffer, probeBackends } from "../src/device/mod.ts";
import type { DType } from "../src/dtype.ts";
import { type ErrorCode, PackhorseError } from "../src/error.ts";
import {
  KvCache,
  type KvCacheOptions,
  type KvCacheStep,
  type KvSequence,
  type KvStepGraph,
} from "../src/kv/mod.ts";
import { encodeBits } from "./kv_cache_reference.ts";
import { randomOf } from "./kv_cases.ts";
import { rejectsWith } from "./rejects_with.ts";

const ROOT = new URL("../", import.meta.url);

type Halves = DeviceBuffer<"f16">;

/** The backends to test: the one that PACKHORSE_BACKEND names, or all that work. */
function backends() {
  const named = Deno.env.get("PACKHORSE_BACKEND") ?? "auto";
  if (named === "cpu" || named === "cuda") return [named] as const;
  return probeBackends().filter(({ available }) => available).map(({ backend }) => backend);
}

/** A test on every backend, or on one. */
function test(
  name: string,
  work: (device: Device) => void | Promise<void>,
  only?: Device["backend"],
): void {
  for (const backend of backends()) {
    if (only !== undefined && backend !== only) continue;
    Deno.test(`engine: ${backend}: ${name}`, async () => {
      using device = Device.open({ backend });
      await work(device);
    });
  }
}

/** Asserts that `work` throws a PackhorseError of this code whose message contains each fragment. */
function throwsWith(work: () => unknown, code: ErrorCode, ...fragments: string[]): void {
  const error = assertThrows(work, PackhorseError);
  assertEquals(error.code, code, error.message);
  for (const fragment of fragments) assert(error.message.includes(fragment), error.message);
}

// ---- foreign memory --------------------------------------------------------------------------------

test("memory goes out by its address and comes in by it, in every type", (device) => {
  for (const dtype of ["f16", "bf16", "f32", "i32", "u8"] as const satisfies DType[]) {
    using owner = device.createBuffer(dtype, 64);
    owner.fill(1);
    assert(owner.address > 0n && owner.address % 256n === 0n);
    const middle = owner.view(16, 32);
    assertEquals(middle.address, owner.address + BigInt(middle.byteOffset));
    using wrapped = DeviceBuffer.fromAddress(device, middle.address, { dtype, length: 32 });
    assertEquals([wrapped.length, wrapped.dtype, wrapped.byteOffset], [32, dtype, 0]);
    assertEquals(wrapped.address, middle.address);
    wrapped.fill(2);
    wrapped.view(0, 16).fill(3);
    const bytes = new Uint8Array(owner.download().buffer);
    const size = bytes.length / 64;
    const expected = [...[16, 16, 16, 16].keys()].flatMap((quarter) =>
      Array(16 * size).fill([1, 3, 2, 1][quarter])
    );
    assertEquals([...bytes], expected);
  }
});

test("wrapping frees nothing, and outlives nothing", async (device) => {
  using owner = device.createBuffer("i32", 4);
  owner.upload(Int32Array.of(1, 2, 3, 4));
  const type = { dtype: "i32", length: 4 } as const;
  for (let i = 0; i < 3; i++) {
    const wrapped = DeviceBuffer.fromAddress(device, owner.address, type);
    assertEquals(await wrapped.downloadAsync(), Int32Array.of(1, 2, 3, 4));
    wrapped[Symbol.dispose]();
    wrapped[Symbol.dispose]();
    assert(wrapped.isDisposed);
    throwsWith(() => wrapped.address, "disposed");
    throwsWith(() => wrapped.download(), "disposed");
  }
  assertEquals(owner.download(), Int32Array.of(1, 2, 3, 4));

  const other = Device.open({ backend: device.backend });
  const orphan = DeviceBuffer.fromAddress(other, owner.address, type);
  other[Symbol.dispose]();
  assert(orphan.isDisposed);
  throwsWith(() => DeviceBuffer.fromAddress(other, owner.address, type), "disposed");
  assertEquals(owner.download(), Int32Array.of(1, 2, 3, 4));
});

test("a device takes memory that another one of the same GPU owns", (device) => {
  using engine = Device.open({ backend: device.backend });
  using tensor = engine.createBuffer("f32", 2);
  tensor.upload(Float32Array.of(1, 2));
  using wrapped = DeviceBuffer.fromAddress(device, tensor.address, { dtype: "f32", length: 2 });
  using copy = device.createBuffer("f32", 2);
  copy.copyFrom(wrapped);
  assertEquals(copy.download(), Float32Array.of(1, 2));
});

test("copies notice that two buffers wrap the same memory", (device) => {
  using owner = device.createBuffer("i32", 12);
  const [first, second, third] = [0, 4, 8].map((offset) =>
    DeviceBuffer.fromAddress(device, owner.view(offset).address, {
      dtype: "i32",
      length: offset === 0 ? 8 : 4,
    })
  );
  throwsWith(() => third!.copyFrom(first!), "invalid-argument", "8 elements");
  throwsWith(() => second!.copyFrom(first!.view(4)), "invalid-argument", "overlapping");
  owner.upload(Int32Array.from({ length: 12 }, (_, i) => i));
  third!.copyFrom(second!);
  assertEquals(owner.view(8).download(), Int32Array.of(4, 5, 6, 7));
});

test("what cannot be memory is refused", (device) => {
  using owner = device.createBuffer("u8", 256);
  const { address } = owner;
  const wrap = (address: unknown, dtype: unknown = "u8", length = 16) => () =>
    DeviceBuffer.fromAddress(device, address as bigint, { dtype: dtype as DType, length });
  const refuse = (work: () => unknown, ...fragments: string[]) =>
    throwsWith(work, "invalid-argument", ...fragments);
  refuse(wrap(0n), "null");
  for (const offset of [1n, 8n, 15n]) refuse(wrap(address + offset), "multiple of 16");
  refuse(wrap(Number(address)), "bigint");
  refuse(wrap(-16n), "-16");
  refuse(wrap(2n ** 64n), String(2n ** 64n));
  refuse(wrap(2n ** 64n - 16n), "last address");
  refuse(wrap(address, "i64"), "i64");
  for (const length of [0, -1, 1.5, 2 ** 53]) refuse(wrap(address, "u8", length), String(length));
});

test("memory that is not the GPU's is refused", (device) => {
  using host = Device.open({ backend: "cpu" });
  using foreign = host.createBuffer("u8", 4096);
  using own = device.createBuffer("u8", 4096);
  const wrap = (address: bigint, length: number) => () =>
    DeviceBuffer.fromAddress(device, address, { dtype: "u8", length });
  throwsWith(wrap(foreign.address, 16), "invalid-argument", "not memory of GPU");
  throwsWith(wrap(own.address, 2 ** 45), "invalid-argument", "not memory of GPU");
  wrap(own.address + 16n, 4080)()[Symbol.dispose]();
  assertEquals(own.length, 4096);
}, "cuda");

// ---- foreign streams -------------------------------------------------------------------------------

test("the CPU has no stream, and takes none", (device) => {
  assertEquals(device.stream, 0n);
  throwsWith(() => Device.open({ backend: "cpu", stream: 0n }), "unsupported", "0x0");
  throwsWith(() => Device.open({ backend: "cpu", stream: 0x1234n }), "unsupported", "0x1234");
}, "cpu");

test("a stream that is no number of 64 bits is refused", ({ backend }) => {
  for (const stream of [1, "1", -1n, 2n ** 64n, null]) {
    throwsWith(
      () => Device.open({ backend, stream: stream as bigint }),
      "invalid-argument",
      String(stream),
    );
  }
});

test(
  "work goes to the caller's stream, in order with theirs, and leaves it open",
  async (engine) => {
    assert(engine.stream !== 0n);
    using tensor = engine.createBuffer("u8", 2 ** 26);
    const device = Device.open({ backend: "cuda", stream: engine.stream });
    assertEquals(device.stream, engine.stream);
    const { length } = tensor;
    const wrapped = DeviceBuffer.fromAddress(device, tensor.address, { dtype: "u8", length });
    using copy = device.createBuffer("u8", length);
    // Nothing waits in between.
    for (let i = 1; i <= 20; i++) {
      tensor.fill(i);
      copy.copyFrom(wrapped);
      wrapped.fill(100 + i);
    }
    engine.synchronizeNow();
    assert(copy.download().every((value) => value === 20));
    assert(tensor.download().every((value) => value === 120));
    await device.synchronize();
    device[Symbol.dispose]();
    throwsWith(() => device.stream, "disposed");
    tensor.fill(7);
    assert(tensor.download().every((value) => value === 7));
  },
  "cuda",
);

test("a cache works on CUDA's legacy default stream as on its own", (device) => {
  const expected = decode(device);
  for (const stream of [0n, 1n]) {
    using other = Device.open({ backend: "cuda", stream });
    assertEquals(other.stream, stream);
    assertEquals(decode(other), expected);
  }
  throwsWith(() => Device.open({ backend: "cuda", stream: 2n }), "invalid-argument", "per-thread");
  using legacy = Device.open({ backend: "cuda", stream: 0n });
  using twin = new Decoder(legacy, [30]);
  const step = twin.begin();
  throwsWith(() => step.capture(() => twin.enqueue(step)), "unsupported", "legacy default stream");
  twin.enqueue(step);
}, "cuda");

/** Outputs of a few steps. */
function decode(device: Device): Uint16Array[] {
  using decoder = new Decoder(device, [90, 20]);
  return Array.from({ length: 5 }, () => {
    decoder.enqueue(decoder.begin());
    return decoder.results();
  }).flat();
}

// ---- captured steps --------------------------------------------------------------------------------

const LAYERS = 2;
const QUERY_HEADS = 4;
const KV_HEADS = 2;
const HEAD_DIM = 64;

const options: KvCacheOptions = {
  layers: LAYERS,
  queryHeads: QUERY_HEADS,
  kvHeads: KV_HEADS,
  headDim: HEAD_DIM,
  dtype: "f16",
  sequences: 4,
  tokens: 2048,
  stepTokens: 2048,
  poolBytes: 2 ** 22,
  residual: 40,
};

/** A cache with a decode loop: random tokens, the same for every decoder, through buffers that stay. */
class Decoder implements Disposable {
  readonly device: Device;
  readonly cache: KvCache;
  readonly sequences: readonly KvSequence[];
  readonly inputs: { keys: Halves; values: Halves; queries: Halves; out: Halves }[];
  /** A copy of the first layer's outputs that is part of the step. */
  readonly copied: Halves;
  readonly #random = randomOf(17);
  readonly #stack = new DisposableStack();

  constructor(
    device: Device,
    lengths: readonly number[],
    { mostTokens = 4 * 4, codec }: {
      mostTokens?: number;
      codec?: KvCacheOptions["codec"];
    } = {},
  ) {
    this.device = device;
    this.cache = this.#stack.use(KvCache.create(device, { ...options, codec }));
    const buffer = (heads: number) =>
      this.#stack.use(device.createBuffer("f16", mostTokens * heads * HEAD_DIM));
    this.inputs = Array.from({ length: LAYERS }, () => ({
      keys: buffer(KV_HEADS),
      values: buffer(KV_HEADS),
      queries: buffer(QUERY_HEADS),
      out: buffer(QUERY_HEADS),
    }));
    this.copied = buffer(QUERY_HEADS);
    this.sequences = lengths.map(() => this.cache.add());
    lengths.forEach((tokens, i) => {
      const step = this.cache.begin([{ sequence: this.sequences[i]!, tokens }]);
      using keys = device.createBuffer("f16", tokens * KV_HEADS * HEAD_DIM);
      for (let layer = 0; layer < LAYERS; layer++) {
        this.fill(keys);
        step.append(layer, keys, keys);
      }
    });
  }

  /** Uploads random values. */
  fill(buffer: Halves): void {
    const uniform = this.#random;
    const values = Float32Array.from(
      { length: buffer.length },
      () => uniform() + uniform() + uniform() + uniform() - 2,
    );
    buffer.upload(encodeBits("f16", values));
  }

  /** Begins a step of so many tokens of some sequences (by default one of each), with new inputs. */
  begin(tokens = 1, sequences = this.sequences): KvCacheStep {
    const step = this.cache.begin(sequences.map((sequence) => ({ sequence, tokens })));
    for (const layer of this.inputs) {
      for (const buffer of [layer.keys, layer.values, layer.queries]) this.fill(buffer);
      layer.out.fill(0xff);
    }
    this.copied.fill(0xff);
    return step;
  }

  /** The work of a step. */
  enqueue(step: KvCacheStep): void {
    const part = (buffer: Halves, heads: number) => buffer.view(0, step.tokens * heads * HEAD_DIM);
    this.inputs.forEach(({ keys, values, queries, out }, layer) => {
      step.append(layer, part(keys, KV_HEADS), part(values, KV_HEADS));
      step.attend(layer, part(queries, QUERY_HEADS), part(out, QUERY_HEADS));
    });
    this.copied.copyFrom(this.inputs[0]!.out);
  }

  /** The same by prefill, which takes any number of tokens. */
  enqueuePrefill(step: KvCacheStep): void {
    const part = (buffer: Halves, heads: number) => buffer.view(0, step.tokens * heads * HEAD_DIM);
    this.inputs.forEach(({ keys, values, queries, out }, layer) =>
      step.prefill(layer, {
        queries: part(queries, QUERY_HEADS),
        keys: part(keys, KV_HEADS),
        values: part(values, KV_HEADS),
        out: part(out, QUERY_HEADS),
      })
    );
    this.copied.copyFrom(this.inputs[0]!.out);
  }

  /** The step's outputs, also behind its tokens. */
  results(): Uint16Array[] {
    return [...this.inputs.map(({ out }) => out), this.copied].map(bitsOf);
  }

  /** All that the cache holds. */
  held(): Uint16Array[] {
    return this.sequences.flatMap((sequence) =>
      Array.from({ length: LAYERS }, (_, layer) => {
        using read = this.cache.read(layer, sequence);
        return [read.keys, read.values].map(bitsOf);
      }).flat()
    );
  }

  [Symbol.dispose](): void {
    this.#stack.dispose();
  }
}

function bitsOf(buffer: DeviceBuffer<"f16" | "bf16">): Uint16Array {
  return buffer.download<Uint16Array<ArrayBuffer>>();
}

function assertSame(
  actual: readonly Uint16Array[],
  expected: readonly Uint16Array[],
  what: string,
) {
  assertEquals(actual.length, expected.length);
  actual.forEach((bits, i) => {
    const difference = bits.findIndex((value, at) => value !== expected[i]![at]);
    assert(difference < 0, `${what}: ${i} differs from element ${difference} on`);
  });
}

test("steps of equal counts have one shape, others another", (device) => {
  using decoder = new Decoder(device, [100, 10]);
  const shapes = Array.from({ length: 64 }, () => {
    const step = decoder.begin();
    decoder.enqueue(step);
    assertEquals(step.shape, step.shape);
    return step.shape;
  });
  // 100 tokens: a block is packed at 108 and 172 (4 sinks, 40 residual), so from 101 to 164 once.
  const packing = shapes.map((shape) => shape.includes("1 blocks to pack"));
  assertEquals(packing.indexOf(true), 107 - 100);
  assertEquals(packing.lastIndexOf(true), 107 - 100);
  assertEquals(new Set(shapes).size, 2);
  const before = decoder.begin(1, decoder.sequences.slice(0, 1));
  assert(!shapes.includes(before.shape), before.shape);
  decoder.enqueue(before);
  const wide = decoder.begin(2);
  assert(!shapes.includes(wide.shape), wide.shape);
  throwsWith(() => before.shape, "invalid-argument", "over");
  decoder.enqueue(wide);
  decoder.cache.truncate(decoder.sequences[0]!, 50);
  throwsWith(() => wide.shape, "invalid-argument", "over");
});

test("the CPU captures nothing, and says so", (device) => {
  using decoder = new Decoder(device, [10]);
  const step = decoder.begin();
  let calls = 0;
  throwsWith(() => step.capture(() => calls++), "unsupported", "CPU", "directly");
  assertEquals(calls, 0);
  decoder.enqueue(step);
  decoder.begin();
}, "cpu");

test("replayed steps are those that were enqueued, bit for bit", (device) => {
  for (const tokens of [1, 3]) {
    const lengths = [331, 150, 43, 7];
    using direct = new Decoder(device, lengths);
    using replayed = new Decoder(device, lengths);
    using stack = new DisposableStack();
    const graphs = new Map<string, KvStepGraph>();
    const steps = 150;
    let packing = 0;
    for (let i = 0; i < steps; i++) {
      // Every seventh step is of some sequences alone.
      const some = <T>(all: readonly T[]) => i % 7 === 6 ? all.slice(1, 3) : all;
      direct.enqueue(direct.begin(tokens, some(direct.sequences)));
      const step = replayed.begin(tokens, some(replayed.sequences));
      let graph = graphs.get(step.shape);
      if (!graph) {
        graph = stack.use(step.capture(() => replayed.enqueue(step)));
        graphs.set(step.shape, graph);
        assertEquals(graph.shape, step.shape);
      }
      step.replay(graph);
      if (!step.shape.includes(" 0 blocks to pack")) packing++;
      assertSame(replayed.results(), direct.results(), `step ${i} of ${tokens} tokens`);
    }
    assertSame(replayed.held(), direct.held(), "what the caches hold");
    assertEquals(replayed.cache.statistics(), direct.cache.statistics());
    replayed.cache.check();
    assertGreater(packing, 5);
    assertLess(graphs.size, steps / 3);
  }
}, "cuda");

test("replayed prefills are those that were enqueued, bit for bit", (device) => {
  const codecs: KvCacheOptions["codec"][] = [
    { keys: { quantizer: "packkv", rel: 0.1 }, values: { quantizer: "fixed", bits: 4 } },
    [{ keys: { quantizer: "kivi", bits: 2 }, values: { quantizer: "raw16" } }, {
      keys: { quantizer: "raw16" },
      values: { quantizer: "kivi", bits: 4 },
    }],
  ];
  for (const codec of codecs) {
    // When the second step is captured there are no packed tokens yet; its replays attend to some.
    const limits = { mostTokens: 2 * 64, codec };
    using direct = new Decoder(device, [4, 4], limits);
    using replayed = new Decoder(device, [4, 4], limits);
    using stack = new DisposableStack();
    const graphs = new Map<string, KvStepGraph>();
    for (let i = 0; i < 6; i++) {
      direct.enqueuePrefill(direct.begin(64));
      const step = replayed.begin(64);
      let graph = graphs.get(step.shape);
      if (!graph) {
        graph = stack.use(step.capture(() => replayed.enqueuePrefill(step)));
        graphs.set(step.shape, graph);
      }
      step.replay(graph);
      assertSame(replayed.results(), direct.results(), `chunk ${i}`);
    }
    assertSame(replayed.held(), direct.held(), "what the caches hold");
    assertEquals(graphs.size, 2);
  }
}, "cuda");

test("a capture runs nothing, and its graph runs in parts of a step", (device) => {
  using direct = new Decoder(device, [60]);
  using captured = new Decoder(device, [60]);
  direct.enqueue(direct.begin());
  const step = captured.begin();
  const [first, second] = captured.inputs;
  const view = (buffer: Halves, heads: number) => buffer.view(0, heads * HEAD_DIM);
  const append = ({ keys, values }: typeof captured.inputs[0], layer: number) =>
    step.append(layer, view(keys, KV_HEADS), view(values, KV_HEADS));
  const attend = ({ queries, out }: typeof captured.inputs[0], layer: number) =>
    step.attend(layer, view(queries, QUERY_HEADS), view(out, QUERY_HEADS));
  using appending = step.capture(() => {
    append(first!, 0);
    attend(first!, 0);
    captured.copied.copyFrom(first!.out);
    append(second!, 1);
  });
  assert(first!.out.download().every((bits) => bits === 0xffff));
  throwsWith(() => captured.begin(), "invalid-argument", "layer 0 still lacks");
  throwsWith(() => attend(first!, 0), "invalid-argument", "lacks");
  // A layer that is appended to outside of a graph that attends to it.
  append(second!, 1);
  using attending = step.capture(() => attend(second!, 1));
  throwsWith(() => step.replay(appending), "invalid-argument", "layer 1 has the tokens");
  step.replay(attending);
  append(first!, 0);
  attend(first!, 0);
  captured.copied.copyFrom(first!.out);
  assertSame(captured.results(), direct.results(), "directly");

  direct.enqueue(direct.begin());
  const next = captured.begin();
  throwsWith(() => next.replay(attending), "invalid-argument", "layer 1 lacks");
  next.replay(appending);
  next.replay(attending);
  assertSame(captured.results(), direct.results(), "replayed");
  throwsWith(() => next.replay(appending), "invalid-argument", "layer 0 has the tokens");
  assertSame(captured.held(), direct.held(), "what the caches hold");
}, "cuda");

test("a graph is refused where it does not belong, and nothing has changed", (device) => {
  using direct = new Decoder(device, [60, 20]);
  using decoder = new Decoder(device, [60, 20]);
  const step = decoder.begin();
  using graph = step.capture(() => decoder.enqueue(step));
  using disposed = step.capture(() => {});
  disposed[Symbol.dispose]();
  disposed[Symbol.dispose]();
  assert(disposed.isDisposed && !graph.isDisposed);
  throwsWith(() => step.replay(disposed), "disposed");
  step.replay(graph);
  direct.enqueue(direct.begin());
  assertSame(decoder.results(), direct.results(), "the captured step");

  for (const [tokens, count, field] of [[1, 1, "sequences"], [2, 2, "tokens"]] as const) {
    const other = decoder.begin(tokens, decoder.sequences.slice(0, count));
    throwsWith(() => other.replay(graph), "invalid-argument", "differs in its", field);
    throwsWith(() => step.replay(graph), "invalid-argument", "over");
    decoder.enqueue(other);
    direct.enqueue(direct.begin(tokens, direct.sequences.slice(0, count)));
    assertSame(decoder.results(), direct.results(), field);
  }

  using stranger = new Decoder(device, [60, 20]);
  throwsWith(() => stranger.begin().replay(graph), "invalid-argument", "another kv cache");
  using elsewhere = Device.open({ backend: device.backend });
  using far = new Decoder(elsewhere, [60, 20]);
  throwsWith(() => far.begin().replay(graph), "invalid-argument", "another device");
  assertSame(decoder.held(), direct.held(), "what the caches hold");
}, "cuda");

test("whatever goes wrong in a capture, the step and the device go on", async (device) => {
  using direct = new Decoder(device, [60]);
  using decoder = new Decoder(device, [60]);
  using other = new Decoder(device, [30]);
  const foreign = other.begin();
  direct.enqueue(direct.begin());
  const step = decoder.begin();
  const { cache, sequences: [sequence], inputs: [first] } = decoder;
  const data = new Uint16Array(first!.keys.length);
  const mistakes: (() => unknown)[] = [
    () => first!.keys.upload(data),
    () => first!.keys.download(),
    () => device.createBuffer("u8", 16),
    () => device.synchronizeNow(),
    () => device.time(() => {}),
    () => KvCache.create(device, options),
    () => cache.add(),
    () => cache.fork(sequence!),
    () => cache.truncate(sequence!, 1),
    () => cache.remove(sequence!),
    () => cache.begin([{ sequence: sequence! }]),
    () => cache.read(0, sequence!),
    () => cache.check(),
    () => cache.statistics(),
    () => step.capture(() => {}),
    () => step.append(0, first!.keys.view(0, 128), first!.values.view(0, 128)), // twice
    () => other.enqueue(foreign),
  ];
  for (const mistake of mistakes) {
    const capture = () =>
      step.capture(() => {
        decoder.enqueue(step);
        mistake();
      });
    throwsWith(capture, "invalid-argument");
  }
  throwsWith(() => step.capture(async () => {}), "invalid-argument", "asynchronous");
  const rejections: Promise<unknown>[] = [];
  step.capture(() => {
    rejections.push(rejectsWith(() => device.synchronize(), "invalid-argument", "captured"));
    rejections.push(rejectsWith(() => first!.keys.downloadAsync(), "invalid-argument"));
  })[Symbol.dispose]();
  await Promise.all(rejections);
  const pending = device.synchronize();
  throwsWith(() => step.capture(() => {}), "invalid-argument", "in flight");
  await pending;

  const failure = new Error("of the engine");
  const thrown = assertThrows(() =>
    step.capture(() => {
      decoder.enqueue(step);
      throw failure;
    })
  );
  assert(thrown === failure);
  decoder.enqueue(step);
  other.enqueue(foreign);
  assertSame(decoder.results(), direct.results(), "directly");
  // What succeeds in a capture has its effect only when it is replayed.
  assertEquals(cache.length(sequence!), 61);
  direct.enqueue(direct.begin());
  const next = decoder.begin();
  using graph = next.capture(() => {
    assertEquals(cache.length(sequence!), 62);
    assertEquals(next.shape, next.shape);
    assert(device.stream !== 0n && first!.keys.address !== 0n);
    decoder.enqueue(next);
  });
  next.replay(graph);
  assertSame(decoder.results(), direct.results(), "replayed");
  assertSame(decoder.held(), direct.held(), "what the caches hold");
}, "cuda");

test("disposing the cache or the device in a capture ends it", (device) => {
  {
    using decoder = new Decoder(device, [60]);
    const step = decoder.begin();
    const capture = () =>
      step.capture(() => {
        decoder.enqueue(step);
        decoder.cache[Symbol.dispose]();
      });
    throwsWith(capture, "disposed");
    throwsWith(capture, "disposed");
    using failing = new Decoder(device, [60]);
    const last = failing.begin();
    assertThrows(() =>
      last.capture(() => {
        failing.enqueue(last);
        failing.cache[Symbol.dispose]();
        throw new RangeError("of the engine");
      }), RangeError);
  }
  using doomed = Device.open({ backend: device.backend });
  const decoder = new Decoder(doomed, [60]);
  const step = decoder.begin();
  throwsWith(() =>
    step.capture(() => {
      decoder.enqueue(step);
      doomed[Symbol.dispose]();
    }), "disposed");
  decoder[Symbol.dispose]();
  using alive = new Decoder(device, [60]);
  alive.enqueue(alive.begin());
  alive.cache.check();
}, "cuda");

test("a graph keeps the memory of its buffers, and a capture that of all", (device) => {
  using direct = new Decoder(device, [60]);
  using decoder = new Decoder(device, [60]);
  direct.enqueue(direct.begin());
  const step = decoder.begin();
  const size = QUERY_HEADS * HEAD_DIM;
  const queries = device.createBuffer("f16", size);
  queries.copyFrom(decoder.inputs[1]!.queries.view(0, size));
  const unrelated = device.createBuffer("u8", 2 ** 20);
  using graph = step.capture(() => {
    decoder.enqueue(step);
    step.attend(1, queries, decoder.inputs[1]!.out.view(0, size));
    queries[Symbol.dispose]();
    unrelated[Symbol.dispose]();
  });
  // Memory that was freed would be given again.
  const garbage = Array.from({ length: 64 }, () => device.createBuffer("f16", size));
  for (const buffer of garbage) buffer.fill(0x7e);
  device.synchronizeNow();
  decoder.inputs[1]!.out.fill(0xff);
  step.replay(graph);
  assertSame(decoder.results(), direct.results(), "replayed");
  for (const buffer of garbage) buffer[Symbol.dispose]();
}, "cuda");

test("capturing, replaying and disposing graphs leaks nothing", (device) => {
  using decoder = new Decoder(device, [60]);
  const cycle = () => {
    const step = decoder.begin();
    using graph = step.capture(() => decoder.enqueue(step));
    step.replay(graph);
  };
  for (let i = 0; i < 50; i++) cycle();
  device.synchronizeNow();
  const before = Deno.memoryUsage().rss;
  const { freeBytes } = device.info;
  for (let i = 0; i < 500; i++) cycle();
  device.synchronizeNow();
  assertLess(Deno.memoryUsage().rss - before, 2 ** 25);
  assertLess(freeBytes - device.info.freeBytes, 2 ** 25);
}, "cuda");

// ---- in a process of its own -----------------------------------------------------------------------

Deno.test("engine: addresses need no more than access to the folder of the libraries", async () => {
  const module = `import { Device, DeviceBuffer } from "${new URL("mod.ts", ROOT).href}";
    using device = Device.open({ backend: "cpu" });
    using buffer = device.createBuffer("u8", 16);
    using same = DeviceBuffer.fromAddress(device, buffer.address, { dtype: "u8", length: 16 });
    same.fill(3);
    console.log(device.stream, buffer.view(0, 3).download().join());`;
  const folder = Deno.env.get("PACKHORSE_LIB_DIR");
  const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: [
      "run",
      "--quiet",
      "--no-prompt",
      "--cached-only",
      `--config=${new URL("deno.json", ROOT).pathname}`,
      `--allow-ffi=${folder ?? "./build"}`,
      "--allow-read",
      ...(folder === undefined ? [] : ["--allow-env=PACKHORSE_LIB_DIR"]),
      `data:application/typescript,${encodeURIComponent(module)}`,
    ],
    cwd: ROOT.pathname,
  }).output();
  assertEquals([code, new TextDecoder().decode(stderr)], [0, ""]);
  assertEquals(new TextDecoder().decode(stdout), "0n 3,3,3\n");
});
