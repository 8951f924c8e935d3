/** Queries and outputs in f32, which attention on the CPU takes. */
import { assert, assertEquals, assertLess, assertThrows } from "@std/assert";
import { Device } from "../src/device/mod.ts";
import { PackhorseError } from "../src/error.ts";
import { KvCache, parseCacheCodec } from "../src/kv/mod.ts";
import { backends } from "./backends.ts";
import { randomOf } from "./kv_cases.ts";

const SHAPE = { layers: 1, queryHeads: 4, kvHeads: 2, headDim: 64, dtype: "f16" } as const;
const LIMITS = { sequences: 1, tokens: 512, stepTokens: 300, poolBytes: 2 ** 22, residual: 8 };
const SEED = 20261125;

for (const backend of backends()) {
  if (backend === "cuda") {
    Deno.test("kv cache: cuda: f32 queries are refused", () => {
      using device = Device.open({ backend });
      const error = assertThrows(
        () => KvCache.create(device, { ...SHAPE, ...LIMITS, queryDType: "f32" }),
        PackhorseError,
      );
      assertEquals(error.code, "unsupported", error.message);
    });
    continue;
  }

  for (const codec of ["raw16", "fixed:8", "packkv", "kivi:8"]) {
    Deno.test(`kv cache: ${backend}: f32 queries and outputs are not rounded, ${codec}`, () => {
      using device = Device.open({ backend });
      using cache = KvCache.create(device, {
        ...SHAPE,
        ...LIMITS,
        queryDType: "f32",
        codec: parseCacheCodec(codec),
      });
      const random = randomOf(SEED);
      const gaussians = (length: number) =>
        Float32Array.from({ length }, () => random() + random() + random() - 1.5);
      const { queryHeads, kvHeads, headDim } = SHAPE;
      const tokens = 300;
      const sequence = cache.add();
      using keys = device.createBuffer("f16", tokens * kvHeads * headDim);
      using values = device.createBuffer("f16", tokens * kvHeads * headDim);
      keys.upload(new Float16Array(gaussians(keys.length)));
      values.upload(new Float16Array(gaussians(values.length)));

      const run = (count: number, prefill: boolean) => {
        using queries = device.createBuffer("f32", count * queryHeads * headDim);
        using out = device.createBuffer("f32", count * queryHeads * headDim);
        const q = gaussians(queries.length).map((x) => 2 * x);
        queries.upload(q);
        const step = cache.begin([{ sequence, tokens: count }]);
        const k = keys.view(0, count * kvHeads * headDim);
        const v = values.view(0, count * kvHeads * headDim);
        if (prefill) {
          step.prefill(0, { queries, keys: k, values: v, out });
        } else {
          step.append(0, k, v);
          step.attend(0, queries, out);
        }
        return { q, out: out.download(new Float32Array(out.length)) };
      };

      // Prefill of an empty sequence reads the tokens in 16 bits, whatever the codec.
      const whole = run(tokens, true);
      const exact = (
        bits: { keys: Float64Array; values: Float64Array },
        length: number,
        head: number,
        q: Float32Array,
      ) => attend(bits, { length, head: head >> 1, q: q.subarray(0, headDim) });
      const given = {
        keys: Float64Array.from(new Float16Array(keys.download().buffer)),
        values: Float64Array.from(new Float16Array(values.download().buffer)),
      };
      const error = (out: Float32Array, expected: Float64Array) =>
        Math.max(...expected.map((x, i) => Math.abs(x - out[i]!)));
      for (const [token, head] of [[0, 0], [150, 3], [299, 1]] as const) {
        const at = (token * queryHeads + head) * headDim;
        const expected = exact(given, token + 1, head, whole.q.subarray(at));
        assertLess(error(whole.out.subarray(at, at + headDim), expected), 2e-6, `seed ${SEED}`);
      }

      // A token after it sees what is packed; products with codes take queries in 16-bit fixed point.
      const next = run(1, false);
      using read = cache.read(0, sequence);
      const held = {
        keys: Float64Array.from(new Float16Array(read.keys.download().buffer)),
        values: Float64Array.from(new Float16Array(read.values.download().buffer)),
      };
      for (let head = 0; head < queryHeads; head++) {
        const at = head * headDim;
        const expected = exact(held, tokens + 1, head, next.q.subarray(at));
        const found = next.out.subarray(at, at + headDim);
        assertLess(error(found, expected), codec === "raw16" ? 2e-6 : 1e-3, `seed ${SEED}`);
      }
      assert(next.out.some((x) => Math.fround(x) !== new Float16Array([x])[0]));
    });
  }
}

/** Attention of one query over the first `length` tokens `[tokens, kvHeads, headDim]`, in double precision. */
function attend(
  { keys, values }: { keys: Float64Array; values: Float64Array },
  { length, head, q }: { length: number; head: number; q: Float32Array },
): Float64Array {
  const { kvHeads, headDim } = SHAPE;
  const row = (of: Float64Array, token: number) =>
    of.subarray((token * kvHeads + head) * headDim, (token * kvHeads + head + 1) * headDim);
  const weights = Float64Array.from(
    { length },
    (_, token) =>
      Math.exp(row(keys, token).reduce((sum, x, i) => sum + x * q[i]!, 0) / Math.sqrt(headDim)),
  );
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  const out = new Float64Array(headDim);
  weights.forEach((weight, token) =>
    row(values, token).forEach((x, i) => out[i]! += weight / total * x)
  );
  return out;
}
