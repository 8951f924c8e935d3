import { PackhorseError } from "../error.ts";
import { InputFile } from "./input_file.ts";
import { isCount, parseJsonObject } from "./untrusted_json.ts";

/** Far above what a configuration takes. */
const MOST_BYTES = 2 ** 24;

/**
 * The bytes of a configuration file.
 *
 * Throws `not-found` and `io` as files do, and `corrupt` for one that is too large to be a configuration.
 */
export async function readConfigFile(path: string): Promise<Uint8Array<ArrayBuffer>> {
  using file = await InputFile.open(path);
  if (file.size > MOST_BYTES) {
    const message = `Cannot read ${path}: ${file.size} bytes are too many for a configuration`;
    throw new PackhorseError("corrupt", message);
  }
  return await file.read(0, file.size);
}

/** The fields of a configuration in bytes; `path` is for messages. Throws `corrupt`. */
export function parseConfig(bytes: Uint8Array, path: string): Record<string, unknown> {
  return parseJsonObject(bytes, `Cannot read ${path}: it`);
}

/** Fields of a JSON object by their kind; what is of another is `corrupt`. Null counts as not given. */
export class JsonFields {
  readonly fields: Readonly<Record<string, unknown>>;
  readonly #what: string;

  /** `what` begins messages: "Cannot use x as a model's config.json". */
  constructor(fields: Readonly<Record<string, unknown>>, what: string) {
    this.fields = fields;
    this.#what = what;
  }

  /** Whether a field is there, and not null. */
  has(name: string): boolean {
    return isGiven(this.fields[name]);
  }

  /** An integer from 1 on; where it is not given, what stands for it. */
  count(name: string, most: number, instead?: number | (() => number)): number {
    const value = this.fields[name];
    if (!isGiven(value)) {
      if (instead !== undefined) return typeof instead === "number" ? instead : instead();
      return this.refuse(`it has no ${name}`);
    }
    if (isCount(value) && value >= 1 && value <= most) return value;
    return this.refuse(`${name} must be an integer from 1 to ${most}, got ${shown(value)}`);
  }

  /** A finite number; where it is not given, `instead`. */
  number(name: string, instead?: number): number {
    const value = this.fields[name];
    if (!isGiven(value)) return instead ?? this.refuse(`it has no ${name}`);
    if (typeof value === "number" && Number.isFinite(value)) return value;
    return this.refuse(`${name} must be a finite number, got ${shown(value)}`);
  }

  /** A finite number above 0; where it is not given, `instead`. */
  positive(name: string, instead?: number): number {
    const value = this.number(name, instead);
    return value > 0 ? value : this.refuse(`${name} must be above 0, got ${value}`);
  }

  /** True or false; where it is not given, `instead`. */
  flag(name: string, instead: boolean): boolean {
    const value = this.fields[name];
    if (!isGiven(value)) return instead;
    if (typeof value === "boolean") return value;
    return this.refuse(`${name} must be true or false, got ${shown(value)}`);
  }

  /** A short text, if it is given. */
  word(name: string): string | undefined {
    const value = this.fields[name];
    if (!isGiven(value)) return undefined;
    if (typeof value === "string" && value.length <= 100) return value;
    return this.refuse(`${name} must be a word, got ${shown(value)}`);
  }

  /** `length` finite numbers above 0. */
  positives(name: string, length: number): number[] {
    const value = this.fields[name];
    const isPositive = (each: unknown) =>
      typeof each === "number" && Number.isFinite(each) && each > 0;
    if (Array.isArray(value) && value.length === length && value.every(isPositive)) return value;
    return this.refuse(
      `${name} must be a list of ${length} numbers above 0, got ` +
        (Array.isArray(value) ? `${value.length} elements` : shown(value)),
    );
  }

  /** Throws `corrupt` for a reason. */
  refuse(reason: string): never {
    throw new PackhorseError("corrupt", `${this.#what}: ${reason}`);
  }
}

/** Whether a JSON value is there at all. */
export function isGiven(value: unknown): boolean {
  return value !== undefined && value !== null;
}

function shown(value: unknown): string {
  return String(JSON.stringify(value)).slice(0, 40);
}
