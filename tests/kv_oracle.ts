/** The figures of `fixtures/packkv_bits.json` and the dumps they were measured on. */
import type { CacheBytes, Codec } from "./kv_reference.ts";

/** Bits per value by the paper's formula, of one layer of a dump. */
export interface OracleRow {
  readonly model: "tiny" | "small";
  readonly layer: string;
  readonly k_rel: number;
  readonly v_rel: number;
  readonly repack: "none" | "median" | "greedy";
  readonly pack: number;
  readonly k_bits: number;
  readonly v_bits: number;
  readonly k_max_error_over_scale: number;
  readonly v_max_error_over_scale: number;
}

/** A figure, the layer it is about, and the codec it was measured with. */
export interface OracleCase {
  readonly name: string;
  readonly row: OracleRow;
  readonly codec: Codec;
  readonly cache: CacheBytes;
}

const fixtures = new URL("./fixtures/", import.meta.url);

/**
 * The dumps at hand: the tiny model's always, the small one's when PACKHORSE_FIXTURES names the folder of the unpacked
 * fixtures.
 */
export function dumpsAtHand(): Map<string, Dump> {
  const dumps = new Map([["tiny", readDump(new URL("tiny/kv.safetensors", fixtures))]]);
  const folder = Deno.env.get("PACKHORSE_FIXTURES");
  if (folder) dumps.set("small", readDump(`${folder}/models/small/kv.safetensors`));
  return dumps;
}

/** Every figure whose dump is at hand. */
export function oracleCases(): OracleCase[] {
  const rows: OracleRow[] = JSON.parse(
    Deno.readTextFileSync(new URL("packkv_bits.json", fixtures)),
  );
  const dumps = dumpsAtHand();
  return rows.flatMap((row) => {
    const dump = dumps.get(row.model);
    if (!dump) return [];
    const keys = dump.get(`${row.layer}.key`)!;
    const values = dump.get(`${row.layer}.value`)!;
    const [heads, tokens, headDim] = keys.shape;
    const codec: Codec = {
      heads,
      tokens,
      headDim,
      dtype: "f16",
      quantizer: "packkv",
      grouping: "token",
      bits: { keys: 0, values: 0 },
      rel: { keys: row.k_rel, values: row.v_rel },
      repack: row.repack,
      pack: row.pack,
      keepNonFinite: false,
    };
    const name = `${row.model} ${row.layer} rel ${row.k_rel}/${row.v_rel} ${row.repack}`;
    return [{ name, row, codec, cache: { keys: keys.data, values: values.data } }];
  });
}

interface Tensor {
  readonly shape: [heads: number, tokens: number, headDim: number];
  readonly data: Uint8Array<ArrayBuffer>;
}

/** The tensors of a model's cache, by name: "layers.0.key". */
export type Dump = ReadonlyMap<string, Tensor>;

/** The tensors of a trusted .safetensors file of float16. */
function readDump(path: string | URL): Dump {
  const file = Deno.readFileSync(path);
  const headerBytes = Number(new DataView(file.buffer).getBigUint64(0, true));
  const data = file.subarray(8 + headerBytes);
  const header: Record<string, { shape: Tensor["shape"]; data_offsets: [number, number] }> = JSON
    .parse(new TextDecoder().decode(file.subarray(8, 8 + headerBytes)));
  return new Map(
    Object.entries(header).filter(([name]) => name !== "__metadata__").map(
      ([name, { shape, data_offsets: [start, end] }]) => [
        name,
        { shape, data: data.slice(start, end) },
      ],
    ),
  );
}
