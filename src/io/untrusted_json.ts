import { PackhorseError } from "../error.ts";

/** Deeper nesting than any header here has, and shallow enough to cost nothing. */
const MOST_LEVELS = 32;

/**
 * Parses UTF-8 JSON of unknown origin that must be an object.
 *
 * Beyond `JSON.parse` it refuses, with `corrupt`, invalid UTF-8, a name given
 * twice in an object (`JSON.parse` would keep the last), half surrogate pairs,
 * and deep nesting. `what` begins the messages: "Cannot read x: its header".
 */
export function parseJsonObject(bytes: Uint8Array, what: string): Record<string, unknown> {
  const corrupt = (reason: string, cause?: unknown) =>
    new PackhorseError("corrupt", `${what} ${reason}`, { cause });
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch (error) {
    throw corrupt("is not valid UTF-8", error);
  }
  let value: unknown;
  try {
    const flaw = findFlaw(text);
    if (flaw) throw corrupt(flaw);
    value = JSON.parse(text);
  } catch (error) {
    if (error instanceof SyntaxError) throw corrupt("is not valid JSON", error);
    throw error;
  }
  if (!isObject(value)) throw corrupt("is not a JSON object");
  return value;
}

/** Whether `value` is an object, and neither an array nor null. */
export function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Whether `value` is an object whose values are all strings. */
export function isStringRecord(value: unknown): value is Record<string, string> {
  return isObject(value) && Object.values(value).every((entry) => typeof entry === "string");
}

/** Whether `value` is a non-negative integer that a number holds exactly. */
export function isCount(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 0;
}

/** Finds what `JSON.parse` would let pass. Any text will do; a bad string throws SyntaxError. */
function findFlaw(text: string): string | undefined {
  const levels: Set<string>[] = []; // the names so far in each open object (or array)
  let string = "";
  for (let i = 0; i < text.length; i++) {
    const character = text[i];
    if (character === "{" || character === "[") {
      levels.push(new Set());
      if (levels.length > MOST_LEVELS) return `nests deeper than ${MOST_LEVELS} levels`;
    } else if (character === "}" || character === "]") {
      levels.pop();
    } else if (character === '"') {
      const start = i;
      for (i++; i < text.length && text[i] !== '"'; i++) {
        if (text[i] === "\\") i++;
      }
      string = JSON.parse(text.slice(start, i + 1));
      if (!string.isWellFormed()) return `holds half a surrogate pair in ${JSON.stringify(string)}`;
    } else if (character === ":") {
      const names = levels.at(-1);
      if (names?.has(string)) return `names ${JSON.stringify(string)} twice`;
      names?.add(string);
    }
  }
  return undefined;
}
