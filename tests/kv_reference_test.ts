import { assert, assertAlmostEquals, assertEquals, assertThrows } from "@std/assert";
import fc from "fast-check";
import {
  decodeFloats,
  encodeFloats,
  type FloatType,
  FORMATS,
  roundHalfEven,
  roundToNearest,
  roundUp,
  unitInLastPlace,
} from "./float16.ts";
import { oracleCases } from "./kv_oracle.ts";
import { assertSameElements, assertWithinBounds, cases, codecOf, errorBounds } from "./kv_cases.ts";
import {
  type Codec,
  decode,
  dequantize,
  encode,
  measure,
  pack,
  quantize,
  type Quantized,
  repack,
  unpack,
} from "./kv_reference.ts";

// ---- floating-point types --------------------------------------------------------------------------

const allPatterns = new Uint8Array(Uint16Array.from({ length: 65536 }, (_, i) => i).buffer);

/** Every positive finite value of a 16-bit type, ascending. */
function positives(type: "f16" | "bf16"): Float32Array {
  return decodeFloats(type, allPatterns).slice(1, 32768).filter(Number.isFinite);
}

Deno.test("float16: all patterns decode as Float16Array does", () => {
  const native = Float32Array.from(new Float16Array(allPatterns.buffer));
  assertSameElements(decodeFloats("f16", allPatterns), native, "values");
});

Deno.test("bfloat16: all patterns decode as the upper half of a float32 does", () => {
  const halves = new Uint16Array(2 * 65536);
  for (let i = 0; i < 65536; i++) halves[2 * i + 1] = i;
  assertSameElements(decodeFloats("bf16", allPatterns), new Float32Array(halves.buffer), "values");
});

for (const type of ["f16", "bf16"] as const) {
  Deno.test(`${type}: every pattern but a NaN encodes to itself`, () => {
    const values = decodeFloats(type, allPatterns);
    const encoded = encodeFloats(type, values);
    assertSameElements(decodeFloats(type, encoded), values, "values");
    const patterns = new Uint16Array(encoded.buffer);
    values.forEach((value, i) => {
      if (!Number.isNaN(value)) assertEquals(patterns[i], i);
    });
  });

  Deno.test(`${type}: rounding between every two neighbours`, () => {
    const values = positives(type);
    values.forEach((low, i) => {
      const high = values[i + 1];
      if (high === undefined) return;
      const middle = (low + high) / 2;
      const even = i % 2 === 0 ? high : low;
      const above = middle + unitInLastPlace("f32", middle);
      const below = middle - unitInLastPlace("f32", middle);
      for (const sign of [1, -1]) {
        assertEquals(roundToNearest(type, sign * middle), sign * even);
        // The middle of two bfloat16 subnormals can be the last float32 before one of them.
        assertEquals(roundToNearest(type, sign * above), sign * high);
        assertEquals(roundToNearest(type, sign * below), sign * low);
      }
      assertEquals([low, below, middle, above].map((value) => roundUp(type, value)), [
        low,
        high,
        high,
        high,
      ]);
      assertEquals(unitInLastPlace(type, low), high - low);
    });
  });
}

Deno.test("float16: rounding is Math.f16round", () => {
  fc.assert(fc.property(fc.float({ noNaN: true }), (value) => {
    assertEquals(roundToNearest("f16", value), Math.f16round(value));
  }));
});

Deno.test("float32: rounding is Math.fround", () => {
  fc.assert(fc.property(fc.double({ noNaN: true }), (value) => {
    assertEquals(roundToNearest("f32", value), Math.fround(value));
  }));
});

Deno.test("rounding past the largest value overflows from half a unit on", () => {
  for (const type of ["f16", "bf16"] as const) {
    const { largest } = FORMATS[type];
    const half = unitInLastPlace(type, largest) / 2;
    assertEquals(roundToNearest(type, largest + half * 0.99), largest);
    assertEquals(roundToNearest(type, largest + half), Infinity);
    assertEquals(roundToNearest(type, -largest - half), -Infinity);
    assertEquals(roundUp(type, largest + half / 2), Infinity);
  }
});

Deno.test("roundHalfEven", () => {
  const inputs = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49999999999999994, 7, -7.25];
  assertEquals(inputs.map(roundHalfEven).map((x) => x + 0), [0, 2, 2, 0, -2, -2, 0, 7, -7]);
});

// ---- worked examples -------------------------------------------------------------------------------

/** A cache of one head of 16 channels whose values depend on the token alone. */
function byToken(type: FloatType, value: (token: number) => number): Uint8Array<ArrayBuffer> {
  return encodeFloats(type, Array.from({ length: 64 * 16 }, (_, i) => value(Math.floor(i / 16))));
}

const small = codecOf({ heads: 1, headDim: 16, tokens: 64, pack: 32 });

Deno.test("a record of constants, worked by hand", () => {
  const cache = { keys: byToken("f16", () => 0), values: byToken("f16", () => -2.5) };
  const { records, offsets, order } = encode(small, cache);
  assertEquals([...order], Array.from({ length: 64 }, (_, token) => token));
  // Of each part: 4 bytes of sizes, a payload start, 64 scales of 2 bytes, 64 zero points of 1 byte; packs
  // of no bits.
  const part = (scale: [number, number], zero: number) => [
    ...[0, 0, 1, 0],
    ...[0, 0, 0, 0],
    ...Array.from({ length: 64 }, () => scale).flat(),
    ...new Array<number>(64).fill(zero),
    ...new Array<number>(8).fill(0),
  ];
  assertEquals([...records], [
    ...[432 & 255, 432 >> 8, 0, 0],
    ...[0, 0, 0, 0],
    ...[224, 0, 0, 0],
    ...[0, 0, 0, 0],
    ...part([0x00, 0x41], 0xff),
    ...part([0x00, 0x3c], 0),
  ]);
  assertEquals(offsets, [0, 432]);
});

Deno.test("a record with an order and codes, worked by hand", () => {
  const codes = (value: (token: number, channel: number) => number): Quantized => ({
    codes: Uint8Array.from({ length: 64 * 16 }, (_, i) => value(Math.floor(i / 16), i % 16)),
    scales: new Float32Array(64).fill(1),
    zeros: new Int32Array(64).fill(200),
    nonFinite: null,
    nonFiniteBlocks: [false],
  });
  const keys = codes(() => 7);
  const values = codes((token, channel) => channel === 1 ? 5 + Math.floor(token / 16) : 0);
  const reversed = Uint8Array.from({ length: 64 }, (_, position) => 63 - position);
  const { records } = pack(small, { keys, values, order: reversed });
  // Of the values: minima take 3 bits (7 is the largest), widths 1, so a header is half a byte. Channel 1 has
  // packs with minima 7 and 5, of fields of 1 bit; each pack starts with its higher half.
  const rowOfHeaders = (header: number) => [header << 4, 0, 0, 0, 0, 0, 0, 0];
  const valuesPart = [
    ...[3, 1, 2, 0],
    ...[0, 0, 0, 0],
    ...Array.from({ length: 64 }, () => [0x00, 0x3c]).flat(),
    ...Array.from({ length: 64 }, () => [200, 0]).flat(),
    ...rowOfHeaders(0b1111),
    ...rowOfHeaders(0b1101),
    ...[0xff, 0xff, 0, 0],
    ...[0xff, 0xff, 0, 0],
  ];
  assertEquals(valuesPart.length, 288);
  const keysPart = [
    ...[3, 0, 2, 0],
    ...[0, 0, 0, 0],
    ...Array.from({ length: 64 }, () => [0x00, 0x3c]).flat(),
    ...Array.from({ length: 64 }, () => [200, 0]).flat(),
    // Two rows of 16 minima of 3 bits, all ones, each padded to 4 bytes.
    ...[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
    ...[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
    ...new Array<number>(8).fill(0),
  ];
  const bytes = 16 + 48 + 288 + keysPart.length;
  // 63, 62, 61, 60 as fields of 6 bits: 111111, 011111, 101111, 001111 from the lowest bit up.
  assertEquals([...records.subarray(16, 19)], [0b10111111, 0b11011111, 0b11110011]);
  assertEquals([...records.subarray(0, 16)], [
    ...[bytes & 255, bytes >> 8, 0, 0],
    ...[0, 1, 0, 0],
    ...[(64 + 288) & 255, (64 + 288) >> 8, 0, 0],
    ...[0, 0, 0, 0],
  ]);
  assertEquals([...records.subarray(64, 64 + 288)], valuesPart);
  assertEquals([...records.subarray(64 + 288)], keysPart);
});

Deno.test("packkv: scale, zero point and codes of one token, worked by hand", () => {
  const codec = codecOf({ ...small, rel: { keys: 0.1, values: 0.2 } });
  const x = new Float32Array(64 * 16);
  x.set([-1, 4, 0.24, 0.26, -0.75], 0);
  const { codes, scales, zeros } = quantize(codec, "keys", x);
  // 5 * 0.1 is 0.5 in float16; -1 / 0.5 = -2; -0.75 / 0.5 = -1.5 rounds to -2.
  assertEquals([scales[0], zeros[0]], [0.5, -2]);
  assertEquals([...codes.subarray(0, 6)], [0, 10, 2, 3, 0, 2]);
  assertEquals([scales[1], zeros[1], codes[16]], [1, 0, 0]);
});

Deno.test("kivi: scales are rounded upwards, keys by channel and values by token", () => {
  const codec = codecOf({
    ...small,
    quantizer: "kivi",
    bits: { keys: 2, values: 4 },
    rel: { keys: 0, values: 0 },
  });
  const x = Float32Array.from({ length: 64 * 16 }, (_, i) => Math.floor(i / 16) % 2 + i % 16);
  const keys = quantize(codec, "keys", x);
  assertEquals(keys.scales.length, 16);
  // A third is between 0.333251953125 and 0.33349609375 in float16.
  assertEquals(new Set(keys.scales), new Set([0.33349609375]));
  assertEquals([...keys.zeros.subarray(0, 3)], [0, 3, 6]);
  const values = quantize(codec, "values", x);
  assertEquals(values.scales.length, 64);
  assertEquals(new Set(values.scales), new Set([1]));
});

Deno.test("median: descending by the lower median, stable", () => {
  const median = (token: number) => token === 5 ? 9 : token === 6 ? 0 : token % 2 + 3;
  // The lower of 16 is the eighth, so nine channels decide.
  const values = Uint8Array.from(
    { length: 64 * 16 },
    (_, i) => i % 16 < 9 ? median(Math.floor(i / 16)) : 255,
  );
  const order = repack(codecOf({ ...small, repack: "median" }), values, values);
  assertEquals([...order.subarray(0, 4), order[63]], [5, 1, 3, 7, 6]);
});

Deno.test("greedy: a seed per pack, ties to the lowest token", () => {
  // Two sorts of tokens, alternating: a pack of one sort costs nothing.
  const codes = Uint8Array.from(
    { length: 64 * 16 },
    (_, i) => (Math.floor(i / 16) % 2 === 1) === (i % 16 < 8) ? 8 : 0,
  );
  const order = repack(codecOf({ ...small, repack: "greedy", pack: 32 }), codes, codes);
  const even = Array.from({ length: 32 }, (_, i) => 2 * i);
  assertEquals([...order], [...even, ...even.map((token) => token + 1)]);
});

Deno.test("auto: ties go to none, and a stored order costs 384 bits", () => {
  const few = Uint8Array.from({ length: 64 * 16 }, (_, i) => i % 16 === 0 ? i / 16 % 2 : 0);
  const many = Uint8Array.from({ length: 64 * 16 }, (_, i) => Math.floor(i / 16) % 2);
  const codec = codecOf({ ...small, repack: "auto" });
  const identity = Array.from({ length: 64 }, (_, token) => token);
  // Sorting saves 64 bits of each such channel of keys or values.
  assertEquals([...repack(codec, few, few)], identity);
  assertEquals([...repack(codec, many, many)].slice(0, 3), [1, 3, 5]);
});

// ---- properties ------------------------------------------------------------------------------------

Deno.test("unpack is the inverse of pack", () => {
  fc.assert(
    fc.property(cases({ maxTokens: 130, maxHeads: 3, maxHeadDim: 80 }), ({ codec, cache }) => {
      const encoded = encode(codec, cache);
      const unpacked = unpack(codec, encoded);
      assertSameElements(unpacked.order, encoded.order, "order");
      for (const part of ["keys", "values"] as const) {
        for (const step of ["codes", "scales", "zeros"] as const) {
          assertSameElements(unpacked[part][step], encoded[part][step], `${step} of ${part}`);
        }
      }
    }),
    { numRuns: 30 },
  );
});

Deno.test("errors are within half a scale and two float32 ulps", () => {
  fc.assert(
    fc.property(cases({ repack: ["none"] }), ({ codec, cache }) => {
      for (const part of ["keys", "values"] as const) {
        const x = decodeFloats(codec.dtype, cache[part]);
        const quantized = quantize(codec, part, x);
        const bounds = errorBounds(codec, part, { x, scales: quantized.scales });
        assertWithinBounds(dequantize(codec, part, quantized), x, bounds);
      }
    }),
    { numRuns: 300 },
  );
});

Deno.test("whatever unpack accepts is what pack writes: every seventeenth bit flipped", () => {
  const codec: Codec = codecOf({ ...small, tokens: 128, pack: 16, repack: "greedy" });
  const x = Float32Array.from({ length: 128 * 16 }, (_, i) => Math.sin(i * i));
  const cache = { keys: encodeFloats("f16", x), values: encodeFloats("f16", x.toReversed()) };
  const encoded = encode(codec, cache);
  let rejected = 0;
  for (let bit = 0; bit < encoded.records.length * 8; bit += 17) {
    const records = encoded.records.slice();
    records[bit >> 3]! ^= 1 << (bit & 7);
    let unpacked;
    try {
      unpacked = unpack(codec, { records, offsets: encoded.offsets });
    } catch (error) {
      assert(error instanceof RangeError, String(error));
      rejected++;
      continue;
    }
    const { keys, values, order } = unpacked;
    const finite = { nonFinite: null, nonFiniteBlocks: [false, false] };
    const again = pack(codec, {
      keys: { ...keys, ...finite },
      values: { ...values, ...finite },
      order,
    });
    assertSameElements(again.records, records, `records with bit ${bit} flipped`);
  }
  assert(rejected > 100 && rejected < encoded.records.length * 8 / 17 - 100);
  assertThrows(
    () => unpack(codec, { ...encoded, records: encoded.records.subarray(0, -16) }),
    RangeError,
  );
});

Deno.test("raw blocks restore every bit", () => {
  const codec = codecOf({ ...small, tokens: 200, keepNonFinite: true });
  const keys = encodeFloats("f16", Float32Array.from({ length: 200 * 16 }, (_, i) => i));
  const values = keys.slice();
  // A NaN with a payload, in the second block.
  values.set([0x34, 0x7e], (64 * 16 + 5) * 2);
  const encoded = encode(codec, { keys, values });
  assertEquals(encoded.nonFinite, { part: "values", token: 64, head: 0 });
  const decoded = decode(codec, encoded);
  const second = [64 * 32, 128 * 32] as const;
  for (const [actual, expected] of [[decoded.keys, keys], [decoded.values, values]] as const) {
    assertSameElements(actual.subarray(...second), expected.subarray(...second), "raw block");
  }
  assertEquals(measure(codec, encoded, { keys, values }).rawBlocks, 1);
});

// ---- the oracle ------------------------------------------------------------------------------------

for (const { name, row, codec, cache } of oracleCases()) {
  Deno.test(`the reference gives the bits of ${name}`, () => {
    const { keys, values } = measure(codec, encode(codec, cache), cache);
    assertAlmostEquals(keys.formulaBits / row.k_bits, 1, 0.005);
    assertAlmostEquals(values.formulaBits / row.v_bits, 1, 0.005);
    // Errors of half a scale occur; rounding x' to float32 may add a little.
    assertAlmostEquals(keys.maxErrorOverScale, row.k_max_error_over_scale, 1e-3);
    assertAlmostEquals(values.maxErrorOverScale, row.v_max_error_over_scale, 1e-3);
  });
}
