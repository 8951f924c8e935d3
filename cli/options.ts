import { type ArgumentValue, ValidationError } from "@cliffy/command";
import { PackhorseError } from "../src/error.ts";
import { parseCacheCodec } from "../src/kv/cache_codec.ts";
import type { TransportPenalty } from "../src/graph/mod.ts";
import type { KvCacheCodec } from "../src/kv/mod.ts";

/** Options that every command takes. A type, not an interface: Cliffy wants an index signature. */
export type GlobalOptions = {
  /** Where to run; without it `PACKHORSE_BACKEND` decides. */
  backend?: "auto" | "cpu" | "cuda";
  /** Whether standard output shall be one JSON document. */
  json?: true | undefined;
};

/** Options that choose how a cache is packed. */
export interface CodecOptions {
  quantizer?: "packkv" | "kivi" | undefined;
  kRel?: number | undefined;
  vRel?: number | undefined;
  grouping?: "token" | "head" | undefined;
  kBits?: 2 | 3 | 4 | 8 | undefined;
  vBits?: 2 | 3 | 4 | 8 | undefined;
  repack?: "none" | "median" | "greedy" | "auto" | undefined;
  pack?: 4 | 8 | 16 | 32 | undefined;
  residual?: number | undefined;
  keepNonFinite?: true | undefined;
}

/** Options that say which tensors of a file are keys and values. */
export interface PatternOptions {
  keyPattern?: string | undefined;
  valuePattern?: string | undefined;
}

/** Reads a scale relative to the range of values: 1/254 to 1. */
export function relativeScale({ label, name, value }: ArgumentValue): number {
  const scale = value.trim() === "" ? NaN : Number(value);
  if (!(scale >= 1 / 254 && scale <= 1)) {
    throw new ValidationError(
      `${label} "${name}" must be a number from 1/254 to 1, but got "${value}".`,
    );
  }
  return scale;
}

/** Reads a number of tokens. */
export function tokenCount({ label, name, value }: ArgumentValue): number {
  if (!/^\d{1,15}$/.test(value)) {
    throw new ValidationError(
      `${label} "${name}" must be a whole number of tokens, 0 or more, but got "${value}".`,
    );
  }
  return Number(value);
}

/** Reads a whole number from 1 on. */
export function positiveCount({ label, name, value }: ArgumentValue): number {
  if (!/^\d{1,15}$/.test(value) || Number(value) === 0) {
    throw new ValidationError(
      `${label} "${name}" must be a whole number, 1 or more, but got "${value}".`,
    );
  }
  return Number(value);
}

/** Reads numbers of a range. */
export function numberFrom(
  least: number,
  most: number,
): (argument: ArgumentValue) => number {
  return ({ label, name, value }) => {
    const number = value.trim() === "" ? NaN : Number(value);
    if (!(number >= least && number <= most)) {
      throw new ValidationError(
        `${label} "${name}" must be a number from ${least} to ${most}, but got "${value}".`,
      );
    }
    return number;
  };
}

/** Reads a number above 0. */
export function positiveNumber({ label, name, value }: ArgumentValue): number {
  const number = value.trim() === "" ? NaN : Number(value);
  if (!(number > 0 && number < Infinity)) {
    throw new ValidationError(`${label} "${name}" must be a number above 0, but got "${value}".`);
  }
  return number;
}

/** Reads "learned", "margin", or a number from 0 on. */
export function transportPenalty({ label, name, value }: ArgumentValue): TransportPenalty {
  if (value === "learned" || value === "margin") return value;
  const number = value.trim() === "" ? NaN : Number(value);
  if (!(number >= 0 && number < Infinity)) {
    throw new ValidationError(
      `${label} "${name}" must be learned, margin, or a number from 0 on, but got "${value}".`,
    );
  }
  return number;
}

/** Reads a whole number from 0 on. */
export function wholeNumber({ label, name, value }: ArgumentValue): number {
  if (!/^\d{1,15}$/.test(value)) {
    throw new ValidationError(
      `${label} "${name}" must be a whole number, 0 or more, but got "${value}".`,
    );
  }
  return Number(value);
}

const POWERS: Readonly<Record<string, number>> = { "": 0, k: 1, m: 2, g: 3, t: 4 };

/** Bytes of "24GiB", "80GB" or "512B"; undefined for what is no size. */
function parseBytes(text: string): number | undefined {
  const match = /^(\d+(?:\.\d*)?|\.\d+) ?([kmgt]?)(i?)b$/i.exec(text.trim());
  if (match === null) return undefined;
  const [, number, prefix, binary] = match;
  return Number(number) * (binary ? 1024 : 1000) ** POWERS[prefix!.toLowerCase()]!;
}

/** Reads a number of bytes, such as "24GiB". */
export function byteSize({ label, name, value }: ArgumentValue): number {
  const bytes = Math.floor(parseBytes(value) ?? NaN);
  if (!(bytes <= 2 ** 50)) {
    throw new ValidationError(
      `${label} "${name}" must be a size with its unit, such as 24GiB or 80GB, up to 1024TiB, ` +
        `but got "${value}".`,
    );
  }
  return bytes;
}

/** Reads bytes per second: "4.8TB/s", or a number of gigabytes, such as "4800". */
export function bytesPerSecond({ label, name, value }: ArgumentValue): number {
  const gigabytes = value.trim() === "" ? NaN : Number(value);
  const speed = Number.isNaN(gigabytes)
    ? parseBytes(value.replace(/\/s$/, "")) ?? NaN
    : gigabytes * 1e9;
  if (!(speed > 0 && speed <= 1e18)) {
    throw new ValidationError(
      `${label} "${name}" must be gigabytes per second, such as 4800 or 4.8TB/s, but got "${value}".`,
    );
  }
  return speed;
}

/** The codec of a cache, and how it was written. */
export interface NamedCacheCodec {
  kv: string;
  codec: KvCacheCodec;
}

/** Reads the codec of a cache, such as "packkv:k=0.1,v=0.2". */
export function cacheCodec({ label, name, value }: ArgumentValue): NamedCacheCodec {
  try {
    return { kv: value, codec: parseCacheCodec(value) };
  } catch (error) {
    if (!(error instanceof PackhorseError)) throw error;
    throw new ValidationError(`${label} "${name}": ${error.message}.`, { cause: error });
  }
}

/** Reads a tensor name with `<n>` where the layer's number stands. */
export function tensorPattern({ label, name, value }: ArgumentValue): string {
  if (value.split("<n>").length !== 2) {
    throw new ValidationError(
      `${label} "${name}" must have <n> once, where the layer's number stands, but got "${value}".`,
    );
  }
  return value;
}

/** Throws a `ValidationError` if an option is given that the chosen quantizer has no use for. */
export function checkCodec(options: CodecOptions): void {
  const kivi = options.quantizer === "kivi";
  const useless: [string, unknown][] = kivi
    ? [["k-rel", options.kRel], ["v-rel", options.vRel], ["grouping", options.grouping]]
    : [["k-bits", options.kBits], ["v-bits", options.vBits]];
  const [name] = useless.find(([, value]) => value !== undefined) ?? [];
  if (name !== undefined) {
    throw new ValidationError(
      kivi
        ? `Option "--${name}" cannot be used with "--quantizer kivi".`
        : `Option "--${name}" needs "--quantizer kivi".`,
    );
  }
}

/** `object` without the properties that are undefined. */
export function defined<T extends object>(
  object: T,
): { [Key in keyof T]?: Exclude<T[Key], undefined> } {
  return Object.fromEntries(
    Object.entries(object).filter(([, value]) => value !== undefined),
  ) as never;
}
