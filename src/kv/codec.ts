import { DTYPE, KV_GROUPING, KV_QUANTIZER, KV_REPACK } from "../../ffi/enums.ts";
import { KV_CODEC } from "../../ffi/structs.ts";
import { PackhorseError } from "../error.ts";
import type { KvLayout } from "./tensor.ts";

export { BLOCK_TOKENS } from "../io/phkv_format.ts";

/** How values become codes; see {@linkcode KvCodecOptions}. */
export type KvQuantizer = "packkv" | "kivi";
/** What shares a scale with packkv: a token, or one head of it. */
export type KvGrouping = "token" | "head";
/** Bits of a code with kivi. */
export type KvBits = 2 | 3 | 4 | 8;
/** How the tokens of a block are reordered before packing. */
export type KvRepack = "none" | "median" | "greedy" | "auto";
/** Tokens that share a bit width. */
export type KvPack = 4 | 8 | 16 | 32;

/**
 * How a cache is packed (PackKV, arXiv 2512.24449), every 64 tokens on their own.
 *
 * 1. *Quantise.* A group of values has the scale `s` and the zero point `z = round(min / s)`; a value's code is
 *    `round(x / s) - z`, and it is restored as `(code + z) * s`, with an error of at most `s / 2`.
 * 2. *Repack.* Tokens with similar codes come together; the order is stored and undone by unpacking.
 * 3. *Pack.* Codes of one channel and `pack` consecutive tokens are stored as their minimum, and the rest in as
 *    many bits as their range needs.
 */
export interface KvCodecOptions {
  /**
   * `packkv` has one scale per token, a share of its range: `s = (max - min) * rel`. `kivi` has one scale per
   * channel of the keys and per 64 channels of a token of the values: `s = (max - min) / (2^bits - 1)`.
   * Default: `packkv`.
   */
  readonly quantizer?: KvQuantizer | undefined;
  /** packkv: scale of the keys as a share of a token's range, 1/254 to 1. Default: 0.1. */
  readonly keyRel?: number | undefined;
  /** packkv: scale of the values as a share of a token's range, 1/254 to 1. Default: 0.2. */
  readonly valueRel?: number | undefined;
  /** packkv: whether a scale serves all heads of a token, or one. Default: `token`. */
  readonly grouping?: KvGrouping | undefined;
  /** kivi: bits of a key's code. Default: 4. */
  readonly keyBits?: KvBits | undefined;
  /** kivi: bits of a value's code. Default: 4. */
  readonly valueBits?: KvBits | undefined;
  /**
   * `median` sorts the tokens of a block by the median of their value codes, `greedy` builds every pack from
   * tokens that add the fewest bits, `auto` takes the best of these and `none` for each block. Default: `auto`.
   */
  readonly repack?: KvRepack | undefined;
  /** Tokens that share a bit width: 4, 8, 16 or 32. Default: 16. */
  readonly pack?: KvPack | undefined;
  /** How many of the latest tokens at least stay as they are. Default: 0. */
  readonly residual?: number | undefined;
  /** Whether blocks with a NaN or an infinity are stored as they are, instead of refused. Default: false. */
  readonly keepNonFinite?: boolean | undefined;
}

/** {@linkcode KvCodecOptions} with every default filled in. */
export type KvCodec =
  & {
    readonly repack: KvRepack;
    readonly pack: KvPack;
    readonly residual: number;
    readonly keepNonFinite: boolean;
  }
  & (
    | {
      readonly quantizer: "packkv";
      readonly keyRel: number;
      readonly valueRel: number;
      readonly grouping: KvGrouping;
    }
    | { readonly quantizer: "kivi"; readonly keyBits: KvBits; readonly valueBits: KvBits }
  );

const ALLOWED = {
  quantizer: ["packkv", "kivi"],
  grouping: ["token", "head"],
  keyBits: [2, 3, 4, 8],
  valueBits: [2, 3, 4, 8],
  repack: ["none", "median", "greedy", "auto"],
  pack: [4, 8, 16, 32],
  keepNonFinite: [false, true],
} as const;

const OWN_OPTIONS = {
  packkv: ["keyRel", "valueRel", "grouping"],
  kivi: ["keyBits", "valueBits"],
} as const;

/** Checks options and fills in the defaults. Throws `invalid-argument`. */
export function resolveCodec(options: KvCodecOptions): KvCodec {
  const quantizer = choose(options, "quantizer", "packkv");
  const other = quantizer === "packkv" ? "kivi" : "packkv";
  const useless = OWN_OPTIONS[other].find((name) => options[name] !== undefined);
  if (useless) refuse(`${useless} needs quantizer ${other}, not ${quantizer}`);
  const { residual = 0 } = options;
  if (!(Number.isSafeInteger(residual) && residual >= 0)) {
    refuse(`residual must be a count of tokens, got ${residual}`);
  }
  const own = quantizer === "packkv"
    ? {
      quantizer,
      keyRel: relativeScale(options, "keyRel", 0.1),
      valueRel: relativeScale(options, "valueRel", 0.2),
      grouping: choose(options, "grouping", "token"),
    }
    : {
      quantizer,
      keyBits: choose(options, "keyBits", 4),
      valueBits: choose(options, "valueBits", 4),
    };
  return {
    ...own,
    repack: choose(options, "repack", "auto"),
    pack: choose(options, "pack", 16),
    residual,
    keepNonFinite: choose(options, "keepNonFinite", false),
  };
}

/** The codec as the native library takes it. */
export function nativeCodec(
  codec: KvCodec,
  { dtype, shape: [heads, tokens, headDim] }: KvLayout,
): Uint8Array<ArrayBuffer> {
  const own = codec.quantizer === "packkv"
    ? {
      grouping: KV_GROUPING[codec.grouping],
      key_bits: 0,
      value_bits: 0,
      key_rel: codec.keyRel,
      value_rel: codec.valueRel,
    }
    : {
      grouping: KV_GROUPING.token,
      key_bits: codec.keyBits,
      value_bits: codec.valueBits,
      key_rel: 0,
      value_rel: 0,
    };
  return KV_CODEC.write({
    heads,
    head_dim: headDim,
    tokens,
    dtype: DTYPE[dtype],
    quantizer: KV_QUANTIZER[codec.quantizer],
    ...own,
    repack: KV_REPACK[codec.repack],
    pack: codec.pack,
    keep_non_finite: Number(codec.keepNonFinite),
  });
}

function choose<Name extends keyof typeof ALLOWED>(
  options: KvCodecOptions,
  name: Name,
  preset: (typeof ALLOWED)[Name][number],
): (typeof ALLOWED)[Name][number] {
  const value = options[name] ?? preset;
  const allowed: readonly unknown[] = ALLOWED[name];
  if (!allowed.includes(value)) {
    refuse(`${name} must be one of ${allowed.join(", ")}, got ${value}`);
  }
  return value as (typeof ALLOWED)[Name][number];
}

function relativeScale(
  options: KvCodecOptions,
  name: "keyRel" | "valueRel",
  preset: number,
): number {
  const value = options[name] ?? preset;
  if (!(typeof value === "number" && value >= 1 / 254 && value <= 1)) {
    refuse(`${name} must be a number from 1/254 to 1, got ${value}`);
  }
  return value;
}

function refuse(reason: string): never {
  throw new PackhorseError("invalid-argument", `Cannot set up the codec: ${reason}`);
}
