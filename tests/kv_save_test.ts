/**
 * Sequences of the growing cache in files, on every backend that opens here: loading restores every bit, and no file,
 * however damaged or forged, gets past the checks or changes a cache.
 */
import {
  assert,
  assertEquals,
  assertGreater,
  assertRejects,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import { Device } from "../src/device/mod.ts";
import { type ErrorCode, PackhorseError } from "../src/error.ts";
import { PhkvReader, SafetensorsReader } from "../src/io/mod.ts";
import {
  inspectKvFile,
  KvCache,
  type KvCacheOptions,
  type KvSequence,
  unpackKvFile,
} from "../src/kv/mod.ts";
import {
  phkvEntries,
  phkvJson,
  withPhkvEntry,
  withPhkvHeader,
  withPhkvJson,
} from "./forge_phkv.ts";
import { backends } from "./backends.ts";
import {
  appendAll,
  assertHolds,
  assertSameBits,
  attendLayer,
  bitsOf,
  bothParts,
  type Data,
  fixed,
  optionsOf,
  packkv,
  PARTS,
  readLayer,
  tokensOf,
} from "./kv_cache_support.ts";
import { ReferenceCache, type ReferenceSequence } from "./kv_cache_reference.ts";
import { DATA_KINDS, type DataKind, randomOf } from "./kv_cases.ts";
import { rejectsWith } from "./rejects_with.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

/** A test on every backend. */
function test(
  name: string,
  work: (device: Device, folder: TemporaryFolder) => Promise<void>,
): void {
  for (const backend of backends()) {
    Deno.test(`kv save: ${backend}: ${name}`, async () => {
      using device = Device.open({ backend });
      using folder = new TemporaryFolder();
      await work(device, folder);
    });
  }
}

interface Held {
  readonly sequence: KvSequence;
  readonly expected: ReferenceSequence;
}

/** A sequence of so many tokens, and what the model holds. */
function grow(cache: KvCache, data: Data, length: number): Held {
  const model = new ReferenceCache(cache.config);
  const [sequence, expected] = [cache.add(), model.add()];
  if (length > 0) appendTo(cache, { sequence, expected }, data, length);
  return { sequence, expected };
}

function appendTo(cache: KvCache, { sequence, expected }: Held, data: Data, count: number) {
  const tokens = tokensOf(cache.config, data, count);
  new ReferenceCache(cache.config).append(expected, tokens);
  return appendAll(cache, [{ sequence, tokens }]);
}

/** Asserts that two sequences hold the same bits. */
function assertSame(
  [cache, sequence]: readonly [KvCache, KvSequence],
  [other, expected]: readonly [KvCache, KvSequence],
): void {
  assertEquals(cache.length(sequence), other.length(expected));
  for (let layer = 0; layer < cache.config.layers; layer++) {
    const actual = readLayer(cache, layer, sequence);
    const wanted = readLayer(other, layer, expected);
    for (const part of PARTS) {
      assertSameBits(actual[part], wanted[part], `${part} of layer ${layer}`);
    }
  }
}

/** A sequence of so many tokens. */
function fill(cache: KvCache, data: Data, length: number): KvSequence {
  const sequence = cache.add();
  if (length > 0) {
    appendAll(cache, [{ sequence, tokens: tokensOf(cache.config, data, length) }]);
  }
  return sequence;
}

const mixed = [
  bothParts(packkv(0.1)),
  { keys: fixed(3), values: packkv(1 / 254) },
  { keys: packkv(0.2), values: fixed(8) },
];

test("what was loaded is what was saved, to the bit", async (device, folder) => {
  const path = folder.file("x.phkv");
  let example = 0;
  for (const headDim of [64, 96, 128, 256]) {
    const data: Data = { kind: "outlier channels", random: randomOf(headDim) };
    const options = optionsOf({
      layers: 3,
      kvHeads: 1 + headDim % 3,
      queryHeads: 1 + headDim % 3,
      headDim,
      dtype: example % 2 === 0 ? "f16" : "bf16",
      sinks: [4, 0, 70, 9][example]!,
      residual: [40, 8, 130, 64][example]!,
      codec: mixed,
    });
    example++;
    using cache = KvCache.create(device, options);
    // Another limit, other neighbours and other pages.
    using other = KvCache.create(device, { ...options, tokens: 5000, sequences: 7 });
    fill(other, data, 300);
    for (const length of [0, 1, 60, 75, 330, 650]) {
      const saved = fill(cache, data, length);
      // Fewer tokens in 16 bits than appending leaves.
      if (length === 650) cache.truncate(saved, options.sinks! + 64 * 3 + 2);
      await cache.save(saved, path);
      assertEquals(folder.list(), ["x.phkv"]);
      const before = other.statistics();
      const loaded = await other.load(path);
      assertSame([other, loaded], [cache, saved]);
      const [own, after] = [cache.statistics(), other.statistics()];
      for (const count of ["tokens", "packedTokens", "packedBytes"] as const) {
        assertEquals(after[count] - before[count], own[count], count);
      }

      // Both go on alike.
      const more = tokensOf(cache.config, data, 3);
      const queries = bitsOf(cache.config, data, { tokens: 3, heads: cache.config.queryHeads });
      const sides = [[cache, saved], [other, loaded]] as const;
      const [expected, out] = sides.map(([cache, sequence]) => {
        const step = appendAll(cache, [{ sequence, tokens: more }]);
        return [0, 1, 2].map((layer) => attendLayer(cache, step, layer, queries));
      });
      out!.forEach((bits, layer) => assertSameBits(bits, expected![layer]!, `layer ${layer}`));
      for (const count of [100, 8]) {
        const tokens = tokensOf(cache.config, data, count);
        for (const [cache, sequence] of sides) appendAll(cache, [{ sequence, tokens }]);
      }
      assertSame(sides[1], sides[0]);
      for (const [cache, sequence] of sides) cache.remove(sequence);
      assertEquals(other.statistics(), before);
    }
    assertEquals(cache.statistics().freeBytes, cache.config.poolBytes);
  }
});

test("whatever an encoder writes can be loaded", async (device, folder) => {
  const path = folder.file("x.phkv");
  for (const kind of Object.keys(DATA_KINDS) as DataKind[]) {
    for (const [headDim, dtype] of [[64, "f16"], [96, "bf16"], [256, "bf16"]] as const) {
      const codec = [...mixed, bothParts(packkv(1)), bothParts(fixed(1))];
      const options = optionsOf({ layers: 5, headDim, dtype, codec, residual: 8 });
      using cache = KvCache.create(device, options);
      const sequence = fill(cache, { kind, random: randomOf(headDim) }, 140);
      await cache.save(sequence, path);
      assertSame([cache, await cache.load(path)], [cache, sequence]);
      assertEquals(cache.statistics().packedTokens, 2 * 128);
    }
  }
});

Deno.test("kv save: all backends write the same file", async () => {
  using folder = new TemporaryFolder();
  const files = [];
  for (const backend of backends()) {
    using device = Device.open({ backend });
    using cache = KvCache.create(device, optionsOf({ layers: 3, codec: mixed, kvHeads: 2 }));
    const { sequence } = grow(cache, { kind: "gaussian", random: randomOf(1) }, 500);
    const path = folder.file(`${backend}.phkv`);
    await cache.save(sequence, path);
    files.push(await Deno.readFile(path));
    for (const name of folder.list()) {
      assertEquals(cache.length(await cache.load(folder.file(name))), 500);
    }
  }
  for (const file of files) assertEquals(file, files[0]);
});

test("pages that are shared, and pages across which records lie", async (device, folder) => {
  const options = optionsOf({
    kvHeads: 4,
    queryHeads: 4,
    headDim: 256,
    codec: bothParts(fixed(7)),
  });
  using cache = KvCache.create(device, options);
  const data: Data = { kind: "gaussian", random: randomOf(2) };
  const parent = grow(cache, data, 900);
  const { packedBytes } = cache.statistics();
  assertGreater(packedBytes, 5 * 65_536);
  const fork = {
    sequence: cache.fork(parent.sequence),
    expected: new ReferenceCache(cache.config).fork(parent.expected),
  };
  appendTo(cache, fork, data, 64);
  for (const { sequence, expected } of [parent, fork]) {
    await cache.save(sequence, folder.file("x.phkv"));
    using other = KvCache.create(device, { ...options, sequences: 1 });
    assertHolds(other, await other.load(folder.file("x.phkv")), expected);
  }
});

test(
  "another residual: packing pauses, goes on, or the file is refused",
  async (device, folder) => {
    const path = folder.file("x.phkv");
    const options = optionsOf({ residual: 64, sinks: 5 });
    const data: Data = { kind: "gaussian", random: randomOf(3) };
    using cache = KvCache.create(device, options);
    const held = grow(cache, data, 5 + 64 * 3 + 90); // 90 newest tokens in 16 bits
    await cache.save(held.sequence, path);
    for (const residual of [27, 63, 65, 90, 200]) {
      using other = KvCache.create(device, { ...options, residual });
      const sequence = await other.load(path);
      const expected = new ReferenceCache(other.config).fork(held.expected);
      assertHolds(other, sequence, expected);
      const before = other.statistics();
      for (const count of [1, 37, 64, 150]) {
        appendTo(other, { sequence, expected }, data, count);
        assertHolds(other, sequence, expected);
        if (count === 1) {
          const packs = residual === 27 ? 64 : 0;
          assertEquals(other.statistics().packedTokens - before.packedTokens, packs);
        }
      }
    }
    using small = KvCache.create(device, { ...options, residual: 26 });
    const before = small.statistics();
    await rejectsWith(
      () => small.load(path),
      "invalid-argument",
      path,
      "90",
      "27 or more",
      "is 26",
    );
    assertEquals(small.statistics(), before);
  },
);

test("a file that does not fit the cache is refused by name", async (device, folder) => {
  const path = folder.file("x.phkv");
  const options = optionsOf({ layers: 3, kvHeads: 2, codec: mixed, poolBytes: 6 * 65_536 });
  using cache = KvCache.create(device, options);
  const { sequence } = grow(cache, { kind: "gaussian", random: randomOf(4) }, 600);
  await cache.save(sequence, path);

  const refuse = async (
    changes: Partial<KvCacheOptions>,
    code: ErrorCode,
    ...fragments: string[]
  ) => {
    using other = KvCache.create(device, { ...options, ...changes });
    const before = other.statistics();
    await rejectsWith(() => other.load(path), code, "Cannot load", path, ...fragments);
    assertEquals(other.statistics(), before);
  };
  const differ = (changes: Partial<KvCacheOptions>, ...fragments: string[]) =>
    refuse(changes, "invalid-argument", ...fragments);
  await differ({ layers: 2, codec: mixed.slice(1) }, "layers is 3", "cache 2");
  await differ({ kvHeads: 1 }, "kvHeads is 2", "cache 1");
  await differ({ headDim: 128 }, "headDim is 64", "cache 128");
  await differ({ dtype: "bf16" }, "dtype is f16", "cache bf16");
  await differ({ sinks: 3 }, "sinks is 4", "cache 3");
  await differ({ tokens: 599 }, "600 tokens", "599");
  const codec = (layer: number, change: object) =>
    mixed.map((each, i) => i === layer ? { ...each, ...change } : each);
  await differ(
    { codec: codec(1, { keys: fixed(4) }) },
    "keys of layer 1 is fixed, bits 3",
    "fixed, bits 4",
  );
  await differ(
    { codec: codec(2, { values: packkv(0.2) }) },
    "values of layer 2",
    "packkv, rel 0.2",
  );
  await differ(
    { codec: codec(0, { keys: packkv(0.11) }) },
    "keys of layer 0",
    "rel 0.1,",
    "rel 0.11",
  );
  await refuse({ poolBytes: 2 * 65_536 }, "out-of-memory", "pool is full", "5 pages", "2 of 2");
  // The same as a float32.
  using same = KvCache.create(device, {
    ...options,
    codec: codec(0, { keys: packkv(Math.fround(0.1)) }),
  });
  await same.load(path);

  using one = KvCache.create(device, { ...options, sequences: 1 });
  const held = await one.load(path);
  const before = one.statistics();
  await rejectsWith(() => one.load(path), "out-of-memory", "Cannot load", path, "1 sequences");
  assertEquals(one.statistics(), before);
  one.remove(held);
  await one.load(path);

  await rejectsWith(() => cache.load(folder.file("none.phkv")), "not-found", "none.phkv");
  await Deno.writeFile(path, new Uint8Array(1000));
  await rejectsWith(() => cache.load(path), "corrupt", path);
});

test("a pool that looks full makes room for what is loaded", async (device, folder) => {
  const options = optionsOf({ codec: bothParts(packkv(1 / 254)), poolBytes: 3 * 65_536 });
  using cache = KvCache.create(device, options);
  const path = folder.file("x.phkv");
  const data: Data = { kind: "gaussian", random: randomOf(5) };
  const held = grow(cache, data, 300);
  await cache.save(held.sequence, path);
  // Zeros take one page, but might have taken both that are left.
  using zeros = device.createBuffer("f16", 900 * 64);
  zeros.fill();
  cache.begin([{ sequence: cache.add(), tokens: 900 }]).append(0, zeros, zeros);
  assertHolds(cache, await cache.load(path), held.expected);
  const before = cache.statistics();
  assertEquals(before.freeBytes, 0);
  await rejectsWith(() => cache.load(path), "out-of-memory", "pool is full");
  assertEquals(cache.statistics(), before);
});

// ---- broken files ----------------------------------------------------------------------------------

/** A cache with a sequence, a file of another, and checks that the cache stays as it is. */
async function prepare(
  device: Device,
  folder: TemporaryFolder,
  options: KvCacheOptions,
  kind: DataKind = "gaussian",
) {
  const path = folder.file("x.phkv");
  const cache = KvCache.create(device, options);
  const data: Data = { kind, random: randomOf(6) };
  const held = grow(cache, data, 200);
  const saved = grow(cache, data, 350);
  await cache.save(saved.sequence, path);
  const file = await Deno.readFile(path);
  cache.remove(saved.sequence);
  const before = cache.statistics();
  const load = async (bytes: Uint8Array) => {
    await Deno.writeFile(path, bytes);
    return await cache.load(path);
  };
  const refuse = async (bytes: Uint8Array, code: ErrorCode, ...fragments: string[]) => {
    await rejectsWith(() => load(bytes), code, path, ...fragments);
    assertEquals(cache.statistics(), before);
  };
  const assertUnchanged = () => {
    assertEquals(cache.statistics(), before);
    assertHolds(cache, held.sequence, held.expected);
  };
  return { cache, file, path, load, refuse, assertUnchanged };
}

test("every damaged byte is noticed, and every missing one", async (device, folder) => {
  const prepared = await prepare(device, folder, optionsOf({ layers: 2 }));
  using _cache = prepared.cache;
  const { file, load, assertUnchanged } = prepared;
  const random = randomOf(7);
  const places = [0, 9, 17, 30, 40, file.length - 1, file.length - 9];
  while (places.length < 150) places.push(Math.floor(random() * file.length));
  const refused = async (bytes: Uint8Array, what: string) => {
    const error = await assertRejects(() => load(bytes), PackhorseError, undefined, what);
    assert(["corrupt", "truncated", "newer-version"].includes(error.code), error.message);
  };
  for (const place of places) {
    const damaged = file.slice();
    damaged[place]! ^= 1 << Math.floor(8 * random());
    await refused(damaged, `byte ${place}`);
    if (place % 4 === 0) await refused(file.subarray(0, place), `${place} bytes`);
  }
  await refused(Uint8Array.from([...file, 0]), "a byte too many");
  assertUnchanged();
  await load(file);
});

test("records that no encoder writes are refused by name", async (device, folder) => {
  const options = optionsOf({
    layers: 2,
    kvHeads: 2,
    codec: [{ keys: packkv(0.1), values: packkv(0.2) }, {
      keys: fixed(3),
      values: packkv(1 / 254),
    }],
  });
  const prepared = await prepare(device, folder, options);
  using _cache = prepared.cache;
  const { file, load, refuse, assertUnchanged } = prepared;
  const blocks = 3;
  assertEquals(phkvEntries(file), 2 * (blocks + 1));
  /** Forges bytes of a block of a layer. */
  const forge = (layer: number, block: number, edit: (record: DataView) => Uint8Array | void) =>
    withPhkvEntry(file, layer * (blocks + 1) + block, edit);
  const set16 = (at: number, value: number) => (record: DataView) => {
    record.setUint16(at, value, true);
  };
  const head =
    (number: number, edit: (record: DataView, at: number) => void) => (record: DataView) => {
      let at = 528;
      for (let i = 0; i < number; i++) at += recordBytes(record, at);
      edit(record, at);
    };
  /** Bytes of a head's record, of layer 0: 4-bit bases of the keys and of the values. */
  const recordBytes = (record: DataView, at: number) => {
    let widths = 0;
    for (let i = 0; i < 8; i++) {
      widths += record.getUint8(at + i) % 16 + (record.getUint8(at + i) >> 4);
    }
    return 16 + 2 * 32 + 256 * widths;
  };
  const where = (layer: number, block: number, headNumber?: number) => {
    const first = 4 + 64 * block;
    const label = `layers.${layer} block ${block} (tokens ${first}-${first + 63})`;
    return headNumber === undefined ? [label] : [label, `head ${headNumber}:`];
  };

  for (const bits of [0, 0x7c00, 0x7e00, 0x8001, 0xbc00]) {
    await refuse(forge(1, 2, set16(2 * 63, bits)), "corrupt", ...where(1, 2), "scale");
    await refuse(forge(0, 0, set16(256, bits)), "corrupt", ...where(0, 0), "scale");
  }
  await refuse(forge(0, 1, set16(128 + 6, 0x8000)), "corrupt", ...where(0, 1), "zero point");
  const largest = (record: DataView) =>
    record.setFloat32(512, record.getFloat32(512, true) * 2, true);
  await refuse(forge(0, 1, largest), "corrupt", ...where(0, 1), "largest scale");
  await refuse(forge(0, 1, set16(526, 1)), "corrupt", ...where(0, 1), "padding");

  const nibble = (group: number, change: (width: number) => number) =>
    head(1, (record, at) => {
      const byte = record.getUint8(at + (group >> 1));
      const width = byte >> 4 * (group & 1) & 15;
      record.setUint8(at + (group >> 1), byte + ((change(width) - width) << 4 * (group & 1)));
    });
  await refuse(forge(0, 1, nibble(0, () => 15)), "corrupt", ...where(0, 1, 1), "wider");
  await refuse(forge(0, 1, nibble(0, () => 5)), "corrupt", ...where(0, 1, 1), "wider");
  await refuse(forge(0, 1, nibble(2, () => 1)), "corrupt", ...where(0, 1, 1), "does not have");
  await refuse(forge(0, 1, nibble(9, () => 4)), "corrupt", ...where(0, 1, 1), "wider");
  const narrower = nibble(1, (width) => width - 1);
  await refuse(forge(0, 1, narrower), "corrupt", ...where(0, 1, 1));
  const wrongWidth = head(0, (record, at) => record.setUint8(at, 0x23));
  await refuse(forge(1, 1, wrongWidth), "corrupt", ...where(1, 1, 0), "width");
  const padding = head(1, (record, at) => record.setUint8(at + 15, 1));
  await refuse(forge(0, 2, padding), "corrupt", ...where(0, 2, 1), "padding");
  const base = head(0, (record, at) => record.setUint8(at + 16, 0xff));
  await refuse(forge(0, 2, base), "corrupt", ...where(0, 2, 0), "code is larger");
  await refuse(forge(1, 2, base), "corrupt", ...where(1, 2, 0), "code is larger");
  const codes = head(1, (record, at) => {
    for (let i = 0; i < 512; i++) record.setUint8(at + 80 + i, 0xff);
  });
  await refuse(forge(0, 2, codes), "corrupt", ...where(0, 2, 1), "code is larger");

  const bytesOf = ({ buffer, byteOffset, byteLength }: DataView) =>
    new Uint8Array(buffer as ArrayBuffer, byteOffset, byteLength);
  const cut = (bytes: number) => (record: DataView) => bytesOf(record).slice(0, -bytes);
  await refuse(forge(0, 1, cut(16)), "corrupt", ...where(0, 1, 1), "cut off");
  await refuse(forge(0, 1, (record) => bytesOf(record).slice(0, 512)), "corrupt", "cut off");
  await refuse(forge(0, 1, cut(4)), "corrupt", "multiple of 16");
  const huge = (record: DataView) =>
    Uint8Array.from([...bytesOf(record), ...new Uint8Array(2 ** 17)]);
  await refuse(forge(0, 1, huge), "corrupt", "layer 0", "up to");

  assertUnchanged();
  // The forge itself changes nothing else.
  await load(forge(0, 1, () => {}));

  const narrow = await prepare(device, folder, options, "zeros");
  using _narrow = narrow.cache;
  const longer = (record: DataView) => Uint8Array.from([...bytesOf(record), ...new Uint8Array(16)]);
  await narrow.refuse(withPhkvEntry(narrow.file, 1, longer), "corrupt", ...where(0, 1), "longer");
});

test("headers that contradict themselves are refused", async (device, folder) => {
  const prepared = await prepare(device, folder, optionsOf({ layers: 2 }));
  using _cache = prepared.cache;
  const { file, load, refuse, assertUnchanged } = prepared;
  type Json = {
    layout: string;
    codec: { residual: unknown; layers: unknown };
    layers: Record<string, unknown>[];
  };
  const withJson = (change: (json: Json) => void) => {
    const json = JSON.parse(phkvJson(file)) as Json;
    change(json);
    return withPhkvJson(file, JSON.stringify(json));
  };
  const layers = (changes: object) => (json: Json) =>
    json.layers.forEach((layer) => Object.assign(layer, changes));
  for (const value of [0, 5, 351, 2 ** 31, 2 ** 40, 2 ** 53, -1, 1e300, null]) {
    await refuse(withJson(layers({ tokens: value })), "corrupt");
    await refuse(withJson(layers({ blocks: value })), "corrupt");
    await refuse(withJson(layers({ heads: value })), "corrupt");
    await refuse(withJson(({ layers: [, last] }) => last!.sinks = value), "corrupt");
  }
  await refuse(withJson(layers({ sinks: 200 })), "corrupt", "sinks");
  await refuse(withJson(layers({ sinks: 8 })), "invalid-argument", "sinks is 8");
  await refuse(withJson(layers({ sinks: 1.5 })), "corrupt", "sinks");
  await refuse(withJson(layers({ headDim: 32, heads: 2 })), "corrupt", "headDim");
  await refuse(withJson(layers({ dtype: "bf16" })), "invalid-argument", "dtype is bf16");
  await refuse(withJson(({ layers: [first] }) => first!.dtype = "bf16"), "corrupt", "dtype");
  await refuse(withJson((json) => json.layers = []), "corrupt");
  await refuse(withJson(({ layers }) => layers.pop()), "corrupt");
  for (const residual of [0, 7, 8.5, 2 ** 40, "64", null, undefined, { toString: 1 }]) {
    await refuse(withJson(({ codec }) => codec.residual = residual), "corrupt");
  }
  const part = { quantizer: "packkv", rel: 0.1 };
  const odd = [
    undefined,
    {},
    [],
    [1, 2],
    [null, null],
    [{ keys: part, values: part }],
    [{ keys: part }, { keys: part }],
    ...[
      { quantizer: "zip" },
      { quantizer: { toString: 1 } },
      { quantizer: "packkv" },
      { quantizer: "packkv", rel: 2 },
      { quantizer: "fixed", bits: 9 },
      { quantizer: "fixed", bits: "4" },
      [],
      null,
    ].map((keys) => [{ keys, values: part }, { keys: part, values: part }]),
  ];
  for (const codecs of odd) {
    await refuse(withJson(({ codec }) => codec.layers = codecs), "corrupt");
  }
  const extra = { keys: { ...part, delta: 1 }, values: { quantizer: "packkv", rel: 0.2 } };
  await refuse(
    withJson(({ codec }) => codec.layers = [extra, extra]),
    "invalid-argument",
    "keys of layer 0",
    "delta 1",
  );
  // Records of a wider codec than the header says.
  const narrow = { keys: { quantizer: "packkv", rel: 1 }, values: part };
  {
    const path = await folder.write(
      "narrow.phkv",
      withJson(({ codec }) => codec.layers = [narrow, narrow]),
    );
    using other = KvCache.create(device, optionsOf({ layers: 2, codec: narrow as never }));
    await rejectsWith(() => other.load(path), "corrupt", path, "layer 0", "up to");
    assertEquals(other.statistics().freeBytes, other.config.poolBytes);
  }
  await refuse(withPhkvHeader(file, (header) => header.setUint32(8, 2, true)), "newer-version");
  const packs = withJson((json) => {
    json.layout = "packs";
    for (const layer of json.layers) delete layer.sinks;
  });
  await refuse(packs, "unsupported", "packs", "unpack");
  assertUnchanged();
  await load(file);
});

// ---- in time ---------------------------------------------------------------------------------------

test("a sequence keeps while it is saved, and others go on", async (device, folder) => {
  const options = optionsOf({ layers: 4 });
  const data: Data = { kind: "gaussian", random: randomOf(8) };
  using cache = KvCache.create(device, options);
  const [held, other] = [grow(cache, data, 300), grow(cache, data, 150)];
  const path = folder.file("x.phkv");
  const refused = (work: () => unknown, ...fragments: string[]) => {
    const { code, message } = assertThrows(work, PackhorseError);
    assertEquals(code, "invalid-argument");
    for (const fragment of fragments) assertStringIncludes(message, fragment);
  };
  const { sequence } = held;
  let steps = 0;
  /** Begins a step whose tokens are still to come. */
  const beginOther = () => {
    steps++;
    const tokens = tokensOf(cache.config, data, 70);
    const step = cache.begin([{ sequence: other.sequence, tokens: 70 }]);
    new ReferenceCache(cache.config).append(other.expected, tokens);
    return () => {
      for (const [layer, each] of tokens.entries()) {
        const bits = (part: "keys" | "values") =>
          Uint16Array.from(each.flatMap((token) => [...token[part]]));
        using keys = device.createBuffer("f16", 70 * 64);
        using values = device.createBuffer("f16", 70 * 64);
        keys.upload(bits("keys"));
        values.upload(bits("values"));
        step.append(layer, keys, values);
      }
    };
  };
  const busy = () => {
    for (
      const [work, action] of [
        [() => cache.truncate(sequence, 1), "truncate"],
        [() => cache.remove(sequence), "remove"],
        [() => cache.begin([{ sequence }]), "begin"],
      ] as const
    ) refused(work, action, `${sequence.number}`, "being saved");
  };
  let finish: (() => void) | undefined;
  const goOn = () => {
    finish?.();
    finish = beginOther();
  };
  const onProgress = () => {
    busy();
    goOn();
  };
  await Promise.all([
    cache.save(sequence, path, { onProgress }),
    cache.save(sequence, folder.file("y.phkv")),
  ]);
  assertEquals(steps, 4);
  // A layer still lacks tokens, but none of what is saved or loaded.
  await rejectsWith(
    () => cache.save(other.sequence, folder.file("z.phkv")),
    "invalid-argument",
    "layer 0 still lacks",
  );
  await cache.save(sequence, path);
  const loaded = await cache.load(path, { onProgress: goOn });
  assertEquals(steps, 8);
  finish!();
  assertHolds(cache, loaded, held.expected);
  assertHolds(cache, other.sequence, other.expected);
  assertEquals(await Deno.readFile(path), await Deno.readFile(folder.file("y.phkv")));
  cache.truncate(sequence, 10);
  cache.remove(sequence);
  for (const wrong of [sequence, { number: 0 }]) {
    await rejectsWith(() => cache.save(wrong, path), "invalid-argument", "save", `${wrong.number}`);
  }
  assertEquals(folder.list(), ["x.phkv", "y.phkv"]);
});

test("what is not finished leaves nothing", async (device, folder) => {
  const options = optionsOf({ layers: 3 });
  const path = folder.file("x.phkv");
  using cache = KvCache.create(device, options);
  const held = grow(cache, { kind: "gaussian", random: randomOf(9) }, 300);
  await Deno.writeTextFile(path, "of old");
  const stop = new Error("enough");
  const stopAt = (share: number) => {
    const controller = new AbortController();
    const onProgress = (done: number, total: number) => {
      if (done / total >= share) controller.abort(stop);
    };
    return { signal: controller.signal, onProgress };
  };
  for (const share of [0.1, 0.6, 1]) {
    assertEquals(
      await cache.save(held.sequence, path, stopAt(share)).catch((error) => error),
      stop,
    );
    assertEquals(await Deno.readTextFile(path), "of old");
    assertEquals(folder.list(), ["x.phkv"]);
  }
  await rejectsWith(
    () => cache.save(held.sequence, folder.file("none/x.phkv")),
    "not-found",
    "none",
  );
  await cache.save(held.sequence, path, { onProgress: () => {} });
  const before = cache.statistics();
  for (const share of [0.1, 0.6, 1]) {
    assertEquals(await cache.load(path, stopAt(share)).catch((error) => error), stop);
    assertEquals(cache.statistics(), before);
  }
  const aborted = AbortSignal.abort(stop);
  for (
    const work of [
      () => cache.load(path, { signal: aborted }),
      () => cache.save(held.sequence, path, { signal: aborted }),
    ]
  ) assertEquals(await work().catch((error) => error), stop);

  const gone = KvCache.create(device, options);
  const dispose = () => gone[Symbol.dispose]();
  await rejectsWith(() => gone.load(path, { onProgress: dispose }), "disposed");
  await rejectsWith(() => gone.load(path), "disposed");
  const other = KvCache.create(device, options);
  const sequence = await other.load(path);
  const target = folder.file("y.phkv");
  const onProgress = () => other[Symbol.dispose]();
  await rejectsWith(() => other.save(sequence, target, { onProgress }), "disposed");
  await rejectsWith(() => other.save(sequence, target), "disposed");
  assertEquals(folder.list(), ["x.phkv"]);
});

// ---- other readers ---------------------------------------------------------------------------------

test("a saved sequence can be inspected and unpacked", async (device, folder) => {
  const [input, output] = [folder.file("x.phkv"), folder.file("y.safetensors")];
  const data: Data = { kind: "outlier channels", random: randomOf(10) };
  for (const [length, sinks] of [[520, 9], [40, 4], [3, 9], [64, 0], [0, 4]] as const) {
    const options = optionsOf({
      layers: 3,
      codec: mixed,
      kvHeads: 3,
      queryHeads: 3,
      sinks,
      residual: 30,
    });
    using cache = KvCache.create(device, options);
    const { sequence } = grow(cache, data, length);
    await cache.save(sequence, input);
    const counted = cache.statistics();
    for (const chunkBytes of [1, 100_000, undefined]) {
      const report = await inspectKvFile(device, { input, chunkBytes });
      assert(report.layout === "tiles");
      const { tokens, packedTokens, packedBytes, recentBytes, headerBytes, fileBytes } = report;
      assertEquals([tokens, packedTokens], [length, counted.packedTokens]);
      assertEquals(packedBytes, counted.packedBytes);
      assertEquals(recentBytes, 3 * 2 * 3 * 64 * 2 * (length - packedTokens));
      assertEquals(packedBytes + recentBytes + headerBytes, fileBytes);
      assertEquals(fileBytes, (await Deno.stat(input)).size);
      assertEquals(report.layers.map(({ codec }) => codec), mixed);
      assertEquals([report.sinks, report.residual], [sinks, 30]);

      const steps: number[] = [];
      const onProgress = (done: number, total: number) => steps.push(done / total);
      const { lost } = await unpackKvFile(device, { input, output, chunkBytes, onProgress });
      assertEquals(lost, []);
      if (length > 0) assertEquals(steps.at(-1), 1);
      using reader = await SafetensorsReader.open(output);
      for (let layer = 0; layer < 3; layer++) {
        const held = readLayer(cache, layer, sequence);
        for (const [part, name] of [["keys", "key"], ["values", "value"]] as const) {
          const tensor = `layers.${layer}.${name}`;
          assertEquals(reader.info(tensor).shape, [3, length, 64]);
          const bits = new Uint16Array((await reader.read(tensor)).buffer);
          const expected = new Uint16Array(bits.length);
          for (let i = 0; i < bits.length; i++) {
            const [head, token] = [Math.floor(i / (64 * length)), Math.floor(i / 64) % length];
            expected[i] = held[part][(token * 3 + head) * 64 + i % 64]!;
          }
          assertSameBits(bits, expected, tensor);
        }
      }
    }
  }
});

test("unpacking a broken one names the place, or recovers the rest", async (device, folder) => {
  const [input, output] = [folder.file("x.phkv"), folder.file("y.safetensors")];
  using cache = KvCache.create(device, optionsOf({ layers: 1, sinks: 4, residual: 30 }));
  const { sequence } = grow(cache, { kind: "gaussian", random: randomOf(11) }, 400);
  await cache.save(sequence, input);
  const file = await Deno.readFile(input);
  await unpackKvFile(device, { input, output });
  const [whole, first, last, end] = await (async () => {
    using reader = await PhkvReader.open(input);
    using tensors = await SafetensorsReader.open(output);
    const key = await tensors.read("layers.0.key");
    const { offsets } = await reader.readBlocks(0);
    const start = reader.headerByteLength;
    return [key, start + Number(offsets[1]), start + Number(offsets.at(-1)), file.length - start];
  })() as [Uint8Array, number, number, number];
  await Deno.remove(output);

  const zeroScale = (record: DataView) => record.setUint16(0, 0, true);
  const forged = withPhkvEntry(file, 2, zeroScale);
  await Deno.writeFile(input, forged);
  const fragments = [input, "layers.0 block 2 (tokens 132-195)", "scale"];
  await rejectsWith(() => unpackKvFile(device, { input, output }), "corrupt", ...fragments);
  await rejectsWith(() => inspectKvFile(device, { input }), "corrupt", ...fragments);
  const huge = (record: DataView) => new Uint8Array(record.byteLength + 2 ** 16);
  for (const edit of [huge, () => new Uint8Array(20)]) {
    await Deno.writeFile(input, withPhkvEntry(file, 2, edit));
    await rejectsWith(() => inspectKvFile(device, { input }), "corrupt", "block 2", "size");
  }
  await Deno.writeFile(input, forged);
  assertEquals(folder.list(), ["x.phkv"]);
  const lostToZeros = (ranges: [number, number][]) => {
    const expected = whole.slice();
    for (const [begin, end] of ranges) expected.fill(0, begin * 128, end * 128);
    return expected;
  };
  for (const chunkBytes of [1, undefined]) {
    const { lost } = await unpackKvFile(device, { input, output, recover: true, chunkBytes });
    assertEquals(lost, ["layers.0 block 2 (tokens 132-195)"]);
    using tensors = await SafetensorsReader.open(output);
    assertEquals(await tensors.read("layers.0.key"), lostToZeros([[132, 196]]));
  }
  const damaged = file.slice();
  damaged[first + 5]! ^= 1;
  damaged[last + 5]! ^= 1;
  damaged[end + 40]! ^= 1; // in the copy of the header
  await Deno.writeFile(input, damaged);
  const report = await unpackKvFile(device, { input, output, recover: true });
  assertEquals(report.lost, [
    "layers.0 block 1 (tokens 68-131)",
    "layers.0 tail (tokens 0-3 and 324-399)",
  ]);
  assertEquals(report.damage.length, 1);
  using tensors = await SafetensorsReader.open(output);
  assertEquals(
    await tensors.read("layers.0.key"),
    lostToZeros([[68, 132], [0, 4], [324, 400]]),
  );
});

Deno.test("kv save: the command line inspects and unpacks a saved sequence", async () => {
  using folder = new TemporaryFolder();
  const [input, output] = [folder.file("x.phkv"), folder.file("y.safetensors")];
  const [backend] = backends();
  using device = Device.open({ backend: backend! });
  using cache = KvCache.create(device, optionsOf({ layers: 2 }));
  await cache.save(grow(cache, { kind: "gaussian", random: randomOf(12) }, 333).sequence, input);
  const run = async (...words: string[]) => {
    const main = new URL("../cli/main.ts", import.meta.url).pathname;
    const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
      args: ["run", "--quiet", "--no-prompt", "-P=cli", main, "kv", ...words],
      env: { NO_COLOR: "1" },
      cwd: new URL("..", import.meta.url).pathname,
    }).output();
    assertEquals(code, 0, new TextDecoder().decode(stderr));
    return new TextDecoder().decode(stdout);
  };
  const text = await run("inspect", input);
  const words = ["layout tiles", "333 tokens", "192 tokens packed", "packkv 0.1", "layers.1"];
  for (const word of words) assertStringIncludes(text, word);
  const { tokens, layers, ratio } = JSON.parse(await run("inspect", input, "--json"));
  assertEquals([tokens, layers.length], [333, 2]);
  assertGreater(ratio, 1.2);
  await run("unpack", input, "-o", output);
  using reader = await SafetensorsReader.open(output);
  assertEquals([...reader.tensors.keys()].length, 4);
});
