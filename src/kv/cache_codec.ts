import { PackhorseError } from "../error.ts";
import type { KvCacheCodec, KvCachePartCodec } from "./cache_options.ts";

/** How a quantizer's parts are written: the name of the number that follows, its default and its range. */
interface Form {
  readonly example: string;
  /** The property that the number sets; none for a quantizer without settings. */
  readonly setting?: "rel" | "bits";
  readonly defaults?: { readonly k: number; readonly v: number };
}

const FORMS: Readonly<Record<string, Form>> = {
  raw16: { example: "raw16" },
  packkv: { example: "packkv:k=0.1,v=0.2", setting: "rel", defaults: { k: 0.1, v: 0.2 } },
  fixed: { example: "fixed:k=4,v=4", setting: "bits", defaults: { k: 4, v: 4 } },
  kivi: { example: "kivi:k=2,v=2", setting: "bits", defaults: { k: 4, v: 4 } },
};

/** What is worth comparing. */
export const DEFAULT_CACHE_CODECS = ["raw16", "packkv:k=0.1,v=0.2", "fixed:4"] as const;

/**
 * The codec of a cache that a text names:
 *
 * | text                 | keys and values                                                      |
 * | -------------------- | -------------------------------------------------------------------- |
 * | `raw16`              | as they are                                                          |
 * | `packkv:k=0.1,v=0.2` | scales of 0.1 and 0.2 of a token's range, as without numbers         |
 * | `fixed:k=4,v=4`      | 4 bits each, as without numbers                                      |
 * | `kivi:k=2,v=2`       | KIVI with 2 bits each; 4 without numbers                             |
 *
 * One number, as in `fixed:3`, is for both; a part that is not named has its default. Whether a cache can use the
 * codec is for {@linkcode KvCache.create} to say.
 *
 * Throws `invalid-argument` that names the bad part and lists the forms.
 *
 * @example
 * ```ts
 * import { parseCacheCodec } from "@packhorse/packhorse/kv";
 * import { assertEquals } from "@std/assert";
 *
 * assertEquals(parseCacheCodec("packkv:k=0.05"), {
 *   keys: { quantizer: "packkv", rel: 0.05 },
 *   values: { quantizer: "packkv", rel: 0.2 },
 * });
 * assertEquals(parseCacheCodec("fixed:3").values, { quantizer: "fixed", bits: 3 });
 * ```
 */
export function parseCacheCodec(text: string): KvCacheCodec {
  const refuse = (reason: string): never => {
    const forms = Object.values(FORMS).map(({ example }) => example).join(", ");
    const message = `Cannot use the codec ${JSON.stringify(text)}: ${reason}; ` +
      `forms are ${forms}, and one number for both, such as fixed:3`;
    throw new PackhorseError("invalid-argument", message);
  };
  const colon = text.indexOf(":");
  const quantizer = colon < 0 ? text : text.slice(0, colon);
  if (!Object.hasOwn(FORMS, quantizer)) refuse(`${JSON.stringify(quantizer)} is no quantizer`);
  const { setting, defaults } = FORMS[quantizer]!;
  if (setting === undefined || defaults === undefined) {
    if (colon >= 0) refuse(`${quantizer} takes no numbers`);
    return codecOf({ quantizer }, { quantizer });
  }
  const given: { k?: number; v?: number } = {};
  for (const each of colon < 0 ? [] : text.slice(colon + 1).split(",")) {
    const match = /^(?:([kv])=)?(\d+(?:\.\d*)?|\.\d+)$/.exec(each);
    if (match === null) {
      refuse(`${JSON.stringify(each)} is neither k=number, v=number nor a number`);
    }
    const value = Number(match![2]);
    if (setting === "rel" && !(value >= 1 / 254 && value <= 1)) {
      refuse(`${JSON.stringify(each)} is not from 1/254 to 1`);
    }
    if (setting === "bits" && !(Number.isInteger(value) && value >= 1 && value <= 8)) {
      refuse(`${JSON.stringify(each)} is not a whole number of bits from 1 to 8`);
    }
    for (const part of match![1] === undefined ? ["k", "v"] as const : [match![1] as "k" | "v"]) {
      if (given[part] !== undefined) refuse(`it sets ${part} twice`);
      given[part] = value;
    }
  }
  const part = (name: "k" | "v") => ({ quantizer, [setting]: given[name] ?? defaults[name] });
  return codecOf(part("k"), part("v"));
}

/** Texts name codecs that a cache may not know yet: creating one checks them. */
function codecOf(keys: { quantizer: string }, values: { quantizer: string }): KvCacheCodec {
  return { keys: keys as KvCachePartCodec, values: values as KvCachePartCodec };
}
