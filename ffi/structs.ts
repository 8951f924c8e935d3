/** Type of a struct's field, in the words of C: a scalar, an array of them, or text. */
export type FieldType = Scalar | `${Scalar}[${number}]` | `char[${number}]`;
type Scalar = keyof typeof SCALARS;

/** Field names in declaration order, with their types. */
type Fields = Readonly<Record<string, FieldType>>;

/** A struct's fields as a JavaScript object; u64 as numbers, exact up to 2^53. */
export type StructValue<F extends Fields> = {
  [Name in keyof F]: F[Name] extends `char[${number}]` ? string
    : F[Name] extends `${string}]` ? number[]
    : number;
};

const SCALARS = {
  u32: {
    bytes: 4,
    read: (view: DataView, at: number) => view.getUint32(at, true),
    write: (view: DataView, at: number, value: number) => view.setUint32(at, value, true),
  },
  u64: {
    bytes: 8,
    read: (view: DataView, at: number) => Number(view.getBigUint64(at, true)),
    write: (view: DataView, at: number, value: number) =>
      view.setBigUint64(at, BigInt(value), true),
  },
  f32: {
    bytes: 4,
    read: (view: DataView, at: number) => view.getFloat32(at, true),
    write: (view: DataView, at: number, value: number) => view.setFloat32(at, value, true),
  },
  f64: {
    bytes: 8,
    read: (view: DataView, at: number) => view.getFloat64(at, true),
    write: (view: DataView, at: number, value: number) => view.setFloat64(at, value, true),
  },
};

interface Field {
  readonly name: string;
  readonly type: Scalar | "char";
  readonly offset: number;
  readonly count: number;
  readonly isArray: boolean;
}

/** A C struct: where its fields lie by C's rules, and how to read and write it. */
export class Struct<F extends Fields> {
  /** The C name. */
  readonly name: string;
  /** The value of `ph_struct`. */
  readonly id: number;
  /** `sizeof`. */
  readonly byteLength: number;
  /** The types of the fields, in declaration order. */
  readonly fields: F;
  readonly #fields: readonly Field[];

  constructor(name: string, id: number, fields: F) {
    let end = 0;
    let alignment = 1;
    this.#fields = Object.entries(fields).map(([name, declaration]) => {
      const [, word, size] = declaration.match(/^(\w+)(?:\[(\d+)\])?$/)!;
      const type = word as Scalar | "char";
      const bytes = type === "char" ? 1 : SCALARS[type].bytes;
      const count = Number(size ?? 1);
      const offset = Math.ceil(end / bytes) * bytes;
      end = offset + count * bytes;
      alignment = Math.max(alignment, bytes);
      return { name, type, offset, count, isArray: size !== undefined };
    });
    this.name = name;
    this.fields = fields;
    this.id = id;
    this.byteLength = Math.ceil(end / alignment) * alignment;
  }

  /** What `ph_layout` must say: `sizeof`, then the offset of each field. */
  get layout(): number[] {
    return [this.byteLength, ...this.#fields.map(({ offset }) => offset)];
  }

  /** The fields' values in the bytes of a struct. */
  read(bytes: Uint8Array): StructValue<F> {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    const entries = this.#fields.map(({ name, type, offset, count, isArray }) => {
      if (type === "char") {
        const text = bytes.subarray(offset, offset + count);
        const end = text.indexOf(0);
        return [name, new TextDecoder().decode(text.subarray(0, end < 0 ? count : end))];
      }
      const { read, bytes: size } = SCALARS[type];
      const values = Array.from({ length: count }, (_, i) => read(view, offset + i * size));
      return [name, isArray ? values : values[0]];
    });
    return Object.fromEntries(entries);
  }

  /** The bytes of a struct of scalars. */
  write(values: { readonly [Name in keyof F]: number }): Uint8Array<ArrayBuffer> {
    const bytes = new Uint8Array(this.byteLength);
    const view = new DataView(bytes.buffer);
    for (const { name, type, offset } of this.#fields) {
      if (type !== "char") SCALARS[type].write(view, offset, values[name]!);
    }
    return bytes;
  }
}

export const DEVICE_INFO = new Struct("ph_device_info", 0, {
  name: "char[128]",
  instruction_set: "char[32]",
  total_bytes: "u64",
  free_bytes: "u64",
  processors: "u32",
  driver_version: "u32",
  runtime_version: "u32",
  is_gpu: "u32",
});

export const KV_CODEC = new Struct("ph_kv_codec", 1, {
  heads: "u32",
  head_dim: "u32",
  tokens: "u64",
  dtype: "u32",
  quantizer: "u32",
  grouping: "u32",
  key_bits: "u32",
  value_bits: "u32",
  key_rel: "f32",
  value_rel: "f32",
  repack: "u32",
  pack: "u32",
  keep_non_finite: "u32",
});

export const KV_STATISTICS = new Struct("ph_kv_statistics", 2, {
  bytes: "u64",
  payload_bits: "u64[2]",
  packs: "u64[2]",
  widths: "u64[18]",
  code_mask: "u32[16]",
  raw_blocks: "u64",
  ordered_blocks: "u64",
  max_error: "f64[2]",
  max_error_over_scale: "f64[2]",
  squared_error: "f64[2]",
  compared: "u64[2]",
});

export const KV_CACHE_CONFIG = new Struct("ph_kv_cache_config", 3, {
  layers: "u32",
  query_heads: "u32",
  kv_heads: "u32",
  head_dim: "u32",
  dtype: "u32",
  query_dtype: "u32",
  sequences: "u32",
  residual: "u32",
  sinks: "u32",
  splits: "u32",
  tokens: "u64",
  step_tokens: "u64",
  pool_bytes: "u64",
});

export const KV_CACHE_CODEC = new Struct("ph_kv_cache_codec", 4, {
  key_quantizer: "u32",
  value_quantizer: "u32",
  key_bits: "u32",
  value_bits: "u32",
  key_rel: "f32",
  value_rel: "f32",
  window: "u32",
});

export const KV_CACHE_STATISTICS = new Struct("ph_kv_cache_statistics", 5, {
  pool_bytes: "u64",
  recent_bytes: "u64",
  index_bytes: "u64",
  page_table_bytes: "u64",
  step_bytes: "u64",
  workspace_bytes: "u64",
  free_bytes: "u64",
  packed_bytes: "u64",
  sequences: "u64",
  tokens: "u64",
  packed_tokens: "u64",
});

export const LLM_SAMPLER = new Struct("ph_llm_sampler", 6, {
  seed: "u64",
  step: "u32",
  top_k: "u32",
  temperature: "f32",
  top_p: "f32",
  min_p: "f32",
  repetition_penalty: "f32",
});

export const OT_REPORT = new Struct("ph_ot_report", 7, {
  status: "u32",
  iterations: "u32",
  place: "u64",
  marginal_error: "f64",
  cost: "f64",
  value: "f64",
  epsilon: "f64",
});

export const OT_OPTIONS = new Struct("ph_ot_options", 8, {
  cost_kind: "u32",
  relative_epsilon: "u32",
  iterations: "u32",
  epsilon: "f64",
  tolerance: "f64",
  relaxation: "f64",
  scaling: "f64",
  row_penalty: "f64",
  column_penalty: "f64",
});

export const OT_GROMOV_REPORT = new Struct("ph_ot_gromov_report", 9, {
  status: "u32",
  iterations: "u32",
  place: "u64",
  marginal_error: "f64",
  value: "f64",
  cost: "f64",
  distortion: "f64",
  gap: "f64",
  bound: "f64",
});

/** All structs of the C ABI. */
export const STRUCTS = [
  DEVICE_INFO,
  KV_CODEC,
  KV_STATISTICS,
  KV_CACHE_CONFIG,
  KV_CACHE_CODEC,
  KV_CACHE_STATISTICS,
  LLM_SAMPLER,
  OT_REPORT,
  OT_OPTIONS,
  OT_GROMOV_REPORT,
];
