/**
 * Random operations on the growing cache, files included, against the model of plain arrays, on every backend that opens
 * here: what it holds, what it counts, and that nothing leaks.
 */
import { assertEquals, assertGreater, assertLess } from "@std/assert";
import fc from "fast-check";
import { Device } from "../src/device/mod.ts";
import { PackhorseError } from "../src/error.ts";
import {
  KvCache,
  type KvCacheConfig,
  type KvCacheOptions,
  type KvSequence,
} from "../src/kv/mod.ts";
import { ReferenceCache, type ReferenceSequence, type Token } from "./kv_cache_reference.ts";
import { backends } from "./backends.ts";
import {
  appendAll,
  assertHolds,
  type Data,
  fixed,
  optionsOf,
  packkv,
  tokensOf,
} from "./kv_cache_support.ts";
import { DATA_KINDS, type DataKind, randomOf } from "./kv_cases.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

/** An operation in numbers, which mean something in every state. */
interface Operation {
  readonly what: "add" | "append" | "fork" | "truncate" | "remove" | "save" | "load";
  /** Picks a sequence or a file. */
  readonly which: number;
  /** Of tokens. */
  readonly amount: number;
}

interface Held {
  readonly sequence: KvSequence;
  readonly expected: ReferenceSequence;
}

/** Most files at once. */
const FILES = 3;

/** So many tokens for every layer. */
type NewTokens = (config: KvCacheConfig, count: number) => Token[][];

/** A cache beside its model. Where the cache is full, neither changes. */
class Pair implements Disposable {
  readonly cache: KvCache;
  readonly model: ReferenceCache;
  readonly held: Held[] = [];
  /** By file name. */
  readonly saved = new Map<string, ReferenceSequence>();
  /** How often each operation was done, and how often the cache was full. */
  readonly done: Record<Operation["what"] | "full", number>;
  readonly #folder = new TemporaryFolder();
  readonly #newTokens: NewTokens;

  constructor(device: Device, options: KvCacheOptions, newTokens: NewTokens) {
    this.cache = KvCache.create(device, options);
    this.model = new ReferenceCache(this.cache.config);
    this.#newTokens = newTokens;
    this.done = { add: 0, append: 0, fork: 0, truncate: 0, remove: 0, save: 0, load: 0, full: 0 };
  }

  /** Operations that were possible. */
  get operations(): number {
    return Object.values(this.done).reduce((sum, count) => sum + count, 0) - this.done.full;
  }

  /** Does an operation, if it is possible. */
  async run(operation: Operation): Promise<void> {
    try {
      await this.#run(operation);
    } catch (error) {
      if (!(error instanceof PackhorseError) || error.code !== "out-of-memory") throw error;
      this.done.full++;
    }
  }

  async #run({ what, which, amount }: Operation): Promise<void> {
    const { cache, model, held, saved } = this;
    const one = held[which % Math.max(1, held.length)];
    const file = this.#folder.file(`${which % FILES}.phkv`);
    if (what === "add") {
      held.push({ sequence: cache.add(), expected: model.add() });
    } else if (what === "load") {
      const expected = saved.get(file);
      if (!expected) return;
      held.push({ sequence: await cache.load(file), expected: model.fork(expected) });
    } else if (!one) {
      return;
    } else if (what === "append") {
      const count = Math.min(amount, cache.config.tokens - cache.length(one.sequence));
      if (count === 0) return;
      const tokens = this.#newTokens(cache.config, count);
      appendAll(cache, [{ sequence: one.sequence, tokens }]);
      model.append(one.expected, tokens);
    } else if (what === "fork") {
      held.push({ sequence: cache.fork(one.sequence), expected: model.fork(one.expected) });
    } else if (what === "truncate") {
      const tokens = Math.max(0, cache.length(one.sequence) - amount);
      cache.truncate(one.sequence, tokens);
      model.truncate(one.expected, tokens);
    } else if (what === "remove") {
      cache.remove(one.sequence);
      held.splice(held.indexOf(one), 1);
    } else {
      await cache.save(one.sequence, file);
      saved.set(file, model.fork(one.expected));
    }
    this.done[what]++;
  }

  assertCounts(): void {
    const { sequences, tokens, packedTokens, packedBytes } = this.cache.statistics();
    assertEquals(
      { sequences, tokens, packedTokens, packedBytes },
      this.model.count(this.held.map(({ expected }) => expected)),
    );
  }

  assertHolds(): void {
    for (const { sequence, expected } of this.held) assertHolds(this.cache, sequence, expected);
  }

  [Symbol.dispose](): void {
    this.cache[Symbol.dispose]();
    this.#folder[Symbol.dispose]();
  }
}

/** Bytes of the process without those of JavaScript, which come and go as its collector likes. */
function memoryOutsideHeap(): number {
  const { rss, heapTotal, external } = Deno.memoryUsage();
  return rss - heapTotal - external;
}

const partCodecs = fc.oneof(
  fc.double({ min: 1 / 254, max: 1, noNaN: true }).map(packkv),
  fc.integer({ min: 1, max: 8 }).map(fixed),
);

/** Small caches of every shape. */
const caches = fc.record({
  kvHeads: fc.integer({ min: 1, max: 3 }),
  headDim: fc.constantFrom(64, 64, 96, 128),
  dtype: fc.constantFrom("f16", "bf16"),
  residual: fc.constantFrom(8, 40, 70),
  sinks: fc.constantFrom(0, 4, 70),
  codec: fc.array(fc.record({ keys: partCodecs, values: partCodecs }), {
    minLength: 1,
    maxLength: 2,
  }),
}).map(({ kvHeads, codec, ...rest }) =>
  optionsOf({ layers: codec.length, kvHeads, queryHeads: kvHeads, codec, tokens: 500, ...rest })
);

const operations: fc.Arbitrary<Operation[]> = fc.array(
  fc.record({
    what: fc.constantFrom(
      ...["add", "append", "append", "fork", "truncate", "remove", "save", "load"] as const,
    ),
    which: fc.nat(60),
    amount: fc.oneof(fc.integer({ min: 1, max: 8 }), fc.integer({ min: 1, max: 250 })),
  }),
  { minLength: 6, maxLength: 12, size: "max" },
);

const kinds = Object.keys(DATA_KINDS) as DataKind[];

for (const backend of backends()) {
  const name = (what: string) => `kv cache against its model: ${backend}: ${what}`;

  Deno.test(name("any operations, files included"), async () => {
    using device = Device.open({ backend });
    const done: Pair["done"][] = [];
    await fc.assert(
      fc.asyncProperty(
        caches,
        operations,
        fc.constantFrom(...kinds),
        fc.nat(),
        async (options, operations, kind, seed) => {
          const data: Data = { kind, random: randomOf(seed) };
          using pair = new Pair(device, options, (config, count) => tokensOf(config, data, count));
          const start = pair.cache.statistics();
          const begin = ["add", "append", "save"] as const;
          for (
            const operation of [
              ...begin.map((what) => ({ what, which: 0, amount: 200 })),
              ...operations,
            ]
          ) {
            await pair.run(operation);
            pair.assertCounts();
            pair.assertHolds();
          }
          for (const { sequence } of pair.held) pair.cache.remove(sequence);
          assertEquals(pair.cache.statistics(), start);
          done.push(pair.done);
        },
      ),
      { numRuns: 30 },
    );
    for (const what of ["append", "fork", "truncate", "remove", "save", "load"] as const) {
      assertGreater(done.reduce((sum, each) => sum + each[what], 0), 3, what);
    }
  });

  Deno.test(name("nothing leaks in 10,000 operations"), async () => {
    const seed = crypto.getRandomValues(new Uint32Array(1))[0]!;
    const random = randomOf(seed);
    const below = (end: number) => Math.floor(random() * end);
    using device = Device.open({ backend });
    const options = optionsOf({
      layers: 2,
      sequences: 6,
      tokens: 400,
      residual: 20,
      codec: [
        { keys: packkv(0.1), values: packkv(0.2) },
        { keys: fixed(3), values: packkv(1 / 254) },
      ],
      poolBytes: 10 * 65_536, // six sequences may need more
    });
    let stock: Token[][] | undefined;
    using pair = new Pair(device, options, (config, count) => {
      stock ??= tokensOf(config, { kind: "gaussian", random }, 1000);
      return stock.map((tokens) => Array.from({ length: count }, () => tokens[below(1000)]!));
    });
    const start = pair.cache.statistics();
    // In percent.
    const shares = { append: 48, truncate: 12, fork: 12, remove: 11, add: 9, load: 5, save: 3 };
    const deck = Object.entries(shares).flatMap(([what, share]) =>
      Array.from({ length: share }, () => what as Operation["what"])
    );
    let early = 0;
    for (let i = 0; pair.operations < 10_000; i++) {
      const amount = 1 + below(random() < 0.1 ? 120 : 8);
      const operation = { what: deck[below(deck.length)]!, which: below(60), amount };
      try {
        await pair.run(operation);
        pair.assertCounts();
        if (i % 50 === 0) pair.assertHolds();
      } catch (cause) {
        const where = `operation ${i} from seed ${seed}: ${JSON.stringify(operation)}`;
        throw new Error(`${backend}: ${where}`, { cause });
      }
      if (i === 3000) early = memoryOutsideHeap();
    }
    pair.assertHolds();
    for (const [what, share] of Object.entries(shares)) {
      assertGreater(pair.done[what as Operation["what"]], 30 * share, what);
    }
    assertGreater(pair.done.full, 100);
    for (const { sequence } of pair.held) pair.cache.remove(sequence);
    assertEquals(pair.cache.statistics(), start, `seed ${seed}`);
    assertLess(memoryOutsideHeap() - early, 2 ** 26);
  });
}
