/**
 * The codec on every backend that opens here (PACKHORSE_BACKEND names one) against the reference: bytes, bounds,
 * figures of the oracle, broken input.
 */
import { assert, assertAlmostEquals, assertEquals, assertGreater } from "@std/assert";
import fc from "fast-check";
import { Device } from "../src/device/mod.ts";
import { PackhorseError } from "../src/error.ts";
import {
  dequantizeKv,
  type KvCodecOptions,
  type KvTensor,
  measureKv,
  packCodes,
  type PackedKv,
  packKv,
  quantizeKv,
  repackKv,
  unpackCodes,
  unpackKv,
} from "../src/kv/mod.ts";
import { decodeFloats, encodeFloats, type FloatType, unitInLastPlace } from "./float16.ts";
import {
  assertSameElements,
  assertWithinBounds,
  cacheOf,
  cases,
  codecOf,
  errorBounds,
  randomOf,
} from "./kv_cases.ts";
import { oracleCases } from "./kv_oracle.ts";
import * as reference from "./kv_reference.ts";
import { BLOCK, type CacheBytes, type Codec } from "./kv_reference.ts";
import { rejectsWith } from "./rejects_with.ts";

const PARTS = ["keys", "values"] as const;
const STEPS = ["codes", "scales", "zeros"] as const;

/** Every kind of scale group. */
const quantizers = [
  codecOf(),
  codecOf({ grouping: "head" }),
  codecOf({ quantizer: "kivi", bits: { keys: 2, values: 2 }, rel: { keys: 0, values: 0 } }),
];

/** The backend that PACKHORSE_BACKEND names, or without it those that open on this machine. */
function backends(): ("cpu" | "cuda")[] {
  const named = Deno.env.get("PACKHORSE_BACKEND") ?? "auto";
  if (named === "cpu" || named === "cuda") return [named];
  return (["cpu", "cuda"] as const).filter((backend) => {
    try {
      using _device = Device.open({ backend });
      return true;
    } catch (error) {
      // A machine may have no GPU, or no CUDA library built; the CPU's must open.
      if (backend === "cuda" && error instanceof PackhorseError) return false;
      throw error;
    }
  });
}

/** A test on every backend. */
function test(name: string, work: (device: Device) => Promise<void>): void {
  for (const backend of backends()) {
    Deno.test(`${backend}: ${name}`, async () => {
      using device = Device.open({ backend });
      await work(device);
    });
  }
}

function optionsOf({ quantizer, grouping, bits, rel, repack, pack, keepNonFinite }: Codec) {
  const own = quantizer === "packkv"
    ? { grouping, keyRel: rel.keys, valueRel: rel.values }
    : { keyBits: bits.keys, valueBits: bits.values };
  return { quantizer, ...own, repack, pack, keepNonFinite } as KvCodecOptions;
}

function tensorOf({ dtype, heads, tokens, headDim }: Codec, data: Uint8Array): KvTensor {
  return { dtype, shape: [heads, tokens, headDim], data };
}

function tensorsOf(codec: Codec, { keys, values }: CacheBytes) {
  return { keys: tensorOf(codec, keys), values: tensorOf(codec, values) };
}

function packCase(device: Device, codec: Codec, cache: CacheBytes): Promise<PackedKv> {
  return packKv(device, tensorsOf(codec, cache), optionsOf(codec));
}

/** The reference's bytes with the original tail in place of zeros. */
function withTail(codec: Codec, decoded: Uint8Array, original: Uint8Array): Uint8Array {
  const restored = original.slice();
  const headBytes = original.length / codec.heads;
  const blockBytes = headBytes / codec.tokens * BLOCK * reference.blockCount(codec);
  for (let head = 0; head < codec.heads && blockBytes > 0; head++) {
    const start = head * headBytes;
    restored.set(decoded.subarray(start, start + blockBytes), start);
  }
  return restored;
}

function assertSameRecords(packed: PackedKv, expected: reference.Records): void {
  assertEquals([...packed.offsets].map(Number), expected.offsets);
  assertSameElements(packed.records, expected.records, "records");
}

// ---- against the reference -------------------------------------------------------------------------

test("records are the reference's, bit for bit", async (device) => {
  await fc.assert(
    fc.asyncProperty(cases(), async ({ codec, cache }) => {
      const packed = await packCase(device, codec, cache);
      assertSameRecords(packed, reference.encode(codec, cache));
    }),
    { numRuns: 150 },
  );
});

test("records of large layers are the reference's", async (device) => {
  const largest = { heads: 6, headDim: 256, tokens: 300 };
  for (
    const codec of [
      codecOf({ ...largest, repack: "auto" }),
      codecOf({ ...largest, grouping: "head", repack: "greedy", dtype: "bf16", pack: 4 }),
      codecOf({
        ...largest,
        quantizer: "kivi",
        bits: { keys: 2, values: 4 },
        rel: { keys: 0, values: 0 },
        repack: "median",
        dtype: "f32",
        pack: 32,
      }),
      codecOf({ heads: 130, headDim: 16, tokens: 64, repack: "greedy" }),
      codecOf({ heads: 16, headDim: 256, tokens: 64, repack: "median" }),
      codecOf({ heads: 1, headDim: 16, tokens: 64 * 200 + 1, repack: "median", pack: 8 }),
    ]
  ) {
    const cache = cacheOf(codec, "outlier channels", 1);
    assertSameRecords(await packCase(device, codec, cache), reference.encode(codec, cache));
  }
});

test("unpacked caches are the reference's, the tail untouched", async (device) => {
  await fc.assert(
    fc.asyncProperty(cases(), async ({ codec, cache }) => {
      const unpacked = await unpackKv(device, await packCase(device, codec, cache));
      const expected = reference.decode(codec, reference.encode(codec, cache));
      for (const part of PARTS) {
        const { dtype, shape, data } = unpacked[part];
        assertEquals({ dtype, shape: [...shape] }, {
          dtype: codec.dtype,
          shape: [codec.heads, codec.tokens, codec.headDim],
        });
        assertSameElements(data, withTail(codec, expected[part], cache[part]), part);
      }
    }),
    { numRuns: 100 },
  );
});

test("each step is the reference's, and steps compose to the whole", async (device) => {
  await fc.assert(
    fc.asyncProperty(cases({ maxTokens: 200, maxValues: 20_000 }), async ({ codec, cache }) => {
      const options = optionsOf(codec);
      const { keys, values } = tensorsOf(codec, cache);
      const expected = reference.encode(codec, cache);
      const quantized = {
        keys: await quantizeKv(device, keys, "keys", options),
        values: await quantizeKv(device, values, "values", options),
      };
      for (const part of PARTS) {
        for (const step of STEPS) {
          const what = `${step} of ${part}`;
          assertSameElements(quantized[part][step], expected[part][step], what);
        }
      }
      const { shape, dtype } = keys;
      const order = await repackKv(
        device,
        shape,
        quantized.keys.codes,
        quantized.values.codes,
        options,
      );
      assertSameElements(order, expected.order, "order");
      const packed = await packCodes(device, { dtype, shape, ...quantized, order }, options);
      assertSameRecords(packed, expected);
    }),
    { numRuns: 60 },
  );
});

test("inverse steps are the reference's, restore the order and compose to the whole", async (device) => {
  await fc.assert(
    fc.asyncProperty(cases({ maxTokens: 200, maxValues: 20_000 }), async ({ codec, cache }) => {
      const options = optionsOf(codec);
      const packed = await packCase(device, codec, cache);
      const expected = reference.encode(codec, cache);
      const unpacked = await unpackCodes(device, packed);
      assertSameElements(unpacked.order, expected.order, "order");
      const whole = await unpackKv(device, packed);
      const { dtype, shape } = whole.keys;
      for (const part of PARTS) {
        for (const step of STEPS) {
          const what = `${step} of ${part}`;
          assertSameElements(unpacked[part][step], expected[part][step], what);
        }
        const { data } = await dequantizeKv(
          device,
          { dtype, shape, ...unpacked[part] },
          part,
          options,
        );
        const restored = withTail(codec, data, cache[part]);
        assertSameElements(restored, whole[part].data, part);
      }
    }),
    { numRuns: 60 },
  );
});

test("measurements are the reference's", async (device) => {
  await fc.assert(
    fc.asyncProperty(cases({ maxValues: 20_000 }), async ({ codec, cache }) => {
      const packed = await packCase(device, codec, cache);
      const measured = await measureKv(device, packed, tensorsOf(codec, cache));
      const withoutErrors = await measureKv(device, packed);
      const expected = reference.measure(codec, reference.encode(codec, cache), cache);
      assertEquals(measured.rawBlocks, expected.rawBlocks);
      assertEquals(measured.orderedBlocks, expected.orderedBlocks);
      for (const part of PARTS) {
        const { bits, payloadBits, distinctCodes, widths, ...errors } = measured[part];
        const { maxError, maxErrorOverScale, squaredError, compared } = expected[part];
        assertEquals({ payloadBits, distinctCodes, widths: [...widths] }, {
          payloadBits: expected[part].payloadBits,
          distinctCodes: expected[part].codes.size,
          widths: expected[part].widths,
        });
        assertAlmostEquals(bits, expected[part].formulaBits, 1e-12);
        // The header leaves open in which precision x' - x is taken.
        const close = (actual: number, wanted: number) =>
          assertAlmostEquals(actual, wanted, Math.abs(wanted) * 1e-6);
        close(errors.maxError, maxError);
        close(errors.maxErrorOverScale, maxErrorOverScale);
        close(errors.rmsError, compared === 0 ? 0 : Math.sqrt(squaredError / compared));
        assertEquals(withoutErrors[part].widths, measured[part].widths);
        assertEquals(withoutErrors[part].maxError, 0);
      }
    }),
    { numRuns: 80 },
  );
});

test("two caches at once do not disturb each other", async (device) => {
  const layers = [1, 2, 3, 4].map((seed) => {
    const codec = codecOf({ heads: seed, repack: "greedy" });
    return { codec, cache: cacheOf(codec, "gaussian", seed) };
  });
  const packed = await Promise.all(
    layers.map(({ codec, cache }) => packCase(device, codec, cache)),
  );
  layers.forEach(({ codec, cache }, i) => {
    assertSameRecords(packed[i]!, reference.encode(codec, cache));
  });
});

// ---- what is promised to users ---------------------------------------------------------------------

test("errors are within half a scale, before and after rounding", async (device) => {
  await fc.assert(
    fc.asyncProperty(cases({ repack: ["none", "median"] }), async ({ codec, cache }) => {
      const packed = await packCase(device, codec, cache);
      const codes = await unpackCodes(device, packed);
      const restored = await unpackKv(device, packed);
      for (const part of PARTS) {
        const x = decodeFloats(codec.dtype, cache[part]);
        const bounds = errorBounds(codec, part, { x, scales: codes[part].scales });
        const unrounded = reference.dequantize(codec, part, codes[part]);
        assertWithinBounds(unrounded, x, bounds);
        // Rounding to the type adds half an ulp of it.
        const rounded = decodeFloats(codec.dtype, restored[part].data);
        rounded.forEach((value, i) => bounds[i]! += unitInLastPlace(codec.dtype, value) / 2);
        assertWithinBounds(rounded, x, bounds);
      }
    }),
    { numRuns: 100 },
  );
});

test("constant groups are exact", async (device) => {
  for (const dtype of ["f16", "bf16", "f32"] as const) {
    for (const kind of ["constant tokens", "zeros"] as const) {
      for (const quantizer of quantizers) {
        const codec = codecOf({ ...quantizer, heads: 3, headDim: 48, tokens: 150, dtype });
        const cache = cacheOf(codec, kind, 0);
        const restored = await unpackKv(device, await packCase(device, codec, cache));
        // Kivi's groups of keys span tokens, so a constant token is not a constant group of them.
        const exact = quantizer.quantizer === "kivi" && kind !== "zeros" ? ["values"] : PARTS;
        for (const part of exact as typeof PARTS) {
          // Adding 0 forgets the sign of a zero, which a constant group may lose.
          const [actual, expected] = [restored[part].data, cache[part]].map((bytes) =>
            decodeFloats(dtype, bytes).map((value) => value + 0)
          );
          assertSameElements(actual!, expected!, part);
        }
      }
    }
  }
});

for (const { name, row, codec, cache } of oracleCases()) {
  test(`bits and errors of ${name} are the oracle's`, async (device) => {
    const packed = await packCase(device, codec, cache);
    const { keys, values } = await measureKv(device, packed, tensorsOf(codec, cache));
    assertAlmostEquals(keys.bits / row.k_bits, 1, 0.005);
    assertAlmostEquals(values.bits / row.v_bits, 1, 0.005);
    assertAlmostEquals(keys.maxErrorOverScale, row.k_max_error_over_scale, 1e-3);
    assertAlmostEquals(values.maxErrorOverScale, row.v_max_error_over_scale, 1e-3);
  });
}

// ---- not-a-numbers and infinities ------------------------------------------------------------------

/** Bytes of special values, NaNs with a payload among them. */
const SPECIAL: Record<FloatType, readonly number[][]> = {
  f16: [[0x34, 0x7e], [0x01, 0x7c], [0x00, 0x7c], [0x00, 0xfc], [0xff, 0xff]],
  bf16: [[0xc3, 0x7f], [0x81, 0x7f], [0x80, 0x7f], [0x80, 0xff], [0xff, 0xff]],
  f32: [
    [0x78, 0x56, 0xc4, 0x7f],
    [0x01, 0x00, 0x80, 0x7f],
    [0x00, 0x00, 0x80, 0x7f],
    [0x00, 0x00, 0x80, 0xff],
    [0xff, 0xff, 0xff, 0xff],
  ],
};

test("a value that is not finite is an error that names its place", async (device) => {
  for (const dtype of ["f16", "bf16", "f32"] as const) {
    for (const quantizer of quantizers) {
      for (const part of PARTS) {
        for (const special of SPECIAL[dtype]) {
          const codec = { ...quantizer, heads: 3, headDim: 32, tokens: 200, dtype };
          const cache = cacheOf(codec, "gaussian", 1);
          // Token 64 is the first of its block, and head 0 the first: so whichever value a group of several
          // tokens or heads is named after, it is this one.
          cache[part].set(special, 64 * 32 * special.length);
          const work = () => packCase(device, codec, cache);
          await rejectsWith(work, "non-finite", part.slice(0, -1), "token 64", "head 0");
        }
      }
    }
  }
});

test("the first token that is not finite is named, and the head where groups have one", async (device) => {
  const codec = codecOf({ heads: 4, headDim: 16, tokens: 200, grouping: "head" });
  const cache = cacheOf(codec, "gaussian", 1);
  const infinity = (head: number, token: number) =>
    cache.values.set([0x00, 0x7c], ((head * 200 + token) * 16 + 5) * 2);
  infinity(1, 150);
  infinity(3, 77);
  infinity(2, 77);
  await rejectsWith(() => packCase(device, codec, cache), "non-finite", "token 77", "head 2");
  const byToken = codecOf({ ...codec, grouping: "token" });
  await rejectsWith(() => packCase(device, byToken, cache), "non-finite", "token 77");
});

test("a range past the largest float32 is not finite", async (device) => {
  for (const dtype of ["bf16", "f32"] as const) {
    const codec = codecOf({ dtype, heads: 1, headDim: 16, tokens: 64 });
    const x = new Float32Array(64 * 16);
    x.set([3e38, -3e38], 5 * 16);
    const bytes = encodeFloats(dtype, x);
    const work = (values: Uint8Array) => packCase(device, codec, { keys: bytes, values });
    await rejectsWith(() => work(bytes), "non-finite", "token 5");
  }
});

test("values after the last block need not be finite", async (device) => {
  const codec = codecOf({ tokens: 70 });
  const cache = cacheOf(codec, "gaussian", 1);
  cache.keys.set([0x34, 0x7e], 64 * 64 * 2);
  const { keys } = await unpackKv(device, await packCase(device, codec, cache));
  assertSameElements(
    keys.data.subarray(64 * 64 * 2, 70 * 64 * 2),
    cache.keys.subarray(64 * 64 * 2, 70 * 64 * 2),
    "tail",
  );
});

test("blocks kept raw restore every bit, and the others are packed", async (device) => {
  await fc.assert(
    fc.asyncProperty(
      cases({ maxTokens: 260, maxValues: 20_000 }),
      fc.array(fc.tuple(fc.boolean(), fc.nat(), fc.nat()), { minLength: 1, maxLength: 4 }),
      async (generated, places) => {
        const codec = { ...generated.codec, keepNonFinite: true };
        const { keys, values } = generated.cache;
        const cache = { keys: keys.slice(), values: values.slice() };
        for (const [inKeys, at, which] of places) {
          const special = SPECIAL[codec.dtype][which % 5]!;
          const bytes = inKeys ? cache.keys : cache.values;
          if (bytes.length > 0) bytes.set(special, at * special.length % bytes.length);
        }
        const packed = await packCase(device, codec, cache);
        const expected = reference.encode(codec, cache);
        assertSameRecords(packed, expected);
        const restored = await unpackKv(device, packed);
        const decoded = reference.decode(codec, expected);
        for (const part of PARTS) {
          const whole = withTail(codec, decoded[part], cache[part]);
          assertSameElements(restored[part].data, whole, part);
        }
        const { rawBlocks } = await measureKv(device, packed, tensorsOf(codec, cache));
        assertEquals(rawBlocks, reference.measure(codec, expected, cache).rawBlocks);
      },
    ),
    { numRuns: 60 },
  );
});

// ---- broken records --------------------------------------------------------------------------------

test("broken records give an error or data, never a crash", async (device) => {
  let rejected = 0;
  await fc.assert(
    fc.asyncProperty(
      cases({ maxTokens: 130, maxValues: 4_000 }),
      fc.constantFrom("bits", "bytes", "header", "cut", "offsets"),
      fc.nat(),
      async ({ codec, cache }, damage, seed) => {
        const whole = await packCase(device, codec, cache);
        if (whole.records.length === 0) return;
        const random = randomOf(seed);
        const below = (limit: number) => Math.floor(random() * limit);
        let records = whole.records.slice();
        const offsets = whole.offsets.slice();
        const times = 1 + below(20);
        if (damage === "cut") records = records.slice(0, below(records.length));
        for (let i = 0; i < times; i++) {
          const block = below(offsets.length - 1);
          if (damage === "bits") records[below(records.length)]! ^= 1 << below(8);
          if (damage === "bytes") records[below(records.length)] = below(256);
          // Where sizes, starts and widths are.
          if (damage === "header") records[Number(offsets[block]) + below(96)]! ^= 1 << below(8);
          if (damage === "offsets") {
            offsets[below(offsets.length)] = BigInt(below(2 ** 32)) << BigInt(below(33));
          }
        }
        const broken: PackedKv = { ...whole, records, offsets };
        for (const read of [unpackKv, unpackCodes, measureKv]) {
          try {
            await read(device, broken);
          } catch (error) {
            assert(error instanceof PackhorseError, String(error));
            assertEquals(error.code, "corrupt");
            rejected++;
          }
        }
      },
    ),
    { numRuns: 300 },
  );
  assertGreater(rejected, 300);
});

// ---- arguments -------------------------------------------------------------------------------------

test("arguments outside their range are named", async (device) => {
  const codec = codecOf();
  const { keys, values } = tensorsOf(codec, cacheOf(codec, "gaussian", 1));
  const options = (overrides: Record<string, unknown>, ...fragments: string[]) =>
    rejectsWith(
      () => packKv(device, { keys, values }, overrides as KvCodecOptions),
      "invalid-argument",
      ...fragments,
    );
  await options({ pack: 5 }, "5");
  await options({ pack: 0 }, "0");
  for (const rel of [0, 2, -0.1, 1 / 255, NaN, Infinity]) {
    await options({ keyRel: rel }, String(rel));
    await options({ valueRel: rel }, String(rel));
  }
  for (const bits of [0, 1, 5, 16, 2.5]) {
    await options({ quantizer: "kivi", keyBits: bits }, String(bits));
    await options({ quantizer: "kivi", valueBits: bits }, String(bits));
  }
  await options({ quantizer: "turbo" }, "turbo");
  await options({ repack: "best" }, "best");
  await options({ grouping: "channel" }, "channel");

  const tensors = (cache: { keys: KvTensor; values: KvTensor }, ...fragments: string[]) =>
    rejectsWith(() => packKv(device, cache, {}), "invalid-argument", ...fragments);
  const zeros = (shape: [number, number, number], dtype: KvTensor["dtype"] = "f16"): KvTensor => ({
    dtype,
    shape,
    data: new Uint8Array(shape.reduce((count, size) => count * size, dtype === "f32" ? 4 : 2)),
  });
  const both = (tensor: KvTensor) => ({ keys: tensor, values: tensor });
  await tensors(both(zeros([2, 64, 24])), "24");
  await tensors(both(zeros([2, 64, 272])), "272");
  await tensors(both(zeros([0, 64, 64])), "0");
  await tensors(both(zeros([4097, 0, 64])), "4097");
  await tensors({ keys, values: zeros([2, 64, 64]) }, "64");
  await tensors({ keys, values: zeros([2, 128, 64], "f32") }, "f32");
  await tensors(both({ ...keys, dtype: "u8" as "f16" }), "u8");
  await tensors(both({ ...keys, data: keys.data.subarray(1) }), String(keys.data.length - 1));
  await tensors(both({ ...keys, shape: [2, 64] as unknown as KvTensor["shape"] }), "2, 64");
  await tensors(both({ ...keys, shape: [2, 64.5, 64] }), "64.5");
  await tensors(both({ ...keys, shape: [2, -64, 64] }), "-64");
});

test("buffers that could move or are gone are refused", async (device) => {
  const shape: [number, number, number] = [1, 64, 16];
  const bytes = 64 * 16 * 2;
  const pack = (data: Uint8Array) => {
    const tensor: KvTensor = { dtype: "f16", shape, data };
    return packKv(device, { keys: tensor, values: tensor }, {});
  };
  const detached = new Uint8Array(bytes);
  structuredClone(detached, { transfer: [detached.buffer] });
  await rejectsWith(() => pack(detached), "invalid-argument");
  const resizable = new Uint8Array(new ArrayBuffer(bytes, { maxByteLength: 2 * bytes }));
  await rejectsWith(() => pack(resizable), "invalid-argument", "resizable");
});

test("a view that starts inside its buffer is read from where it starts", async (device) => {
  const codec = codecOf({ heads: 1, headDim: 16, tokens: 64 });
  const cache = cacheOf(codec, "gaussian", 3);
  const shifted = (bytes: Uint8Array) => {
    const buffer = new Uint8Array(bytes.length + 3);
    buffer.set(bytes, 1);
    return buffer.subarray(1, bytes.length + 1);
  };
  const packed = await packCase(device, codec, {
    keys: shifted(cache.keys),
    values: shifted(cache.values),
  });
  assertSameRecords(packed, reference.encode(codec, cache));
});
