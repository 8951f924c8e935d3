import type { Random } from "./random.ts";

/** Numbers at which size checks tend to break. */
// deno-fmt-ignore
const NUMBERS = [
  0, 1, 2, 7, 8, 15, 16, 17, 63, 64, 65, 255, 256, 4096, 4097, 2 ** 16, 2 ** 24, 2 ** 28, 2 ** 31 - 1, 2 ** 31,
  2 ** 32 - 1, 2 ** 32, 2 ** 33, 2 ** 40, 2 ** 52, 2 ** 53 - 1, 2 ** 53, 2 ** 63, 2 ** 64, 1e300,
];
const STRINGS = [
  "",
  "a",
  "F16",
  "F64",
  "U8",
  "f32",
  "tiles",
  "__proto__",
  "__metadata__",
  "..",
  "é",
];

/** A damaged copy of `file`, of one to three mutations; `other` lends it parts. */
export function mutateBytes(random: Random, file: Uint8Array, other: Uint8Array): Uint8Array {
  let result = file;
  for (let times = 1 + random.below(3); times > 0; times--) {
    result = mutateOnce(random, Uint8Array.from(result), other);
  }
  return result;
}

function mutateOnce(random: Random, bytes: Uint8Array, other: Uint8Array): Uint8Array {
  const at = random.below(bytes.length + 1);
  const length = random.below(random.pick([2, 16, 64, bytes.length + 1]));
  const begin = random.below(other.length + 1);
  const join = (...parts: Uint8Array[]) => Uint8Array.from(parts.flatMap((part) => [...part]));
  switch (random.below(8)) {
    case 0: // a flipped bit
      if (at < bytes.length) bytes[at]! ^= 1 << random.below(8);
      return bytes;
    case 1: // a byte
      if (at < bytes.length) bytes[at] = random.pick([0, 0x7f, 0x80, 0xff, random.below(256)]);
      return bytes;
    case 2: // cut off
      return bytes.subarray(0, at);
    case 3: // cut out
      return join(bytes.subarray(0, at), bytes.subarray(at + length));
    case 4: // inserted
      return join(bytes.subarray(0, at), random.bytes(length), bytes.subarray(at));
    case 5: // spliced
      return join(bytes.subarray(0, at), other.subarray(begin));
    case 6: // overwritten
      bytes.set(other.subarray(begin, begin + Math.min(length, bytes.length - at)), at);
      return bytes;
    default: // a length field, most likely one of the first
      return mutateNumber(random, bytes);
  }
}

/** Overwrites an aligned u32 or u64. */
export function mutateNumber(random: Random, bytes: Uint8Array): Uint8Array {
  const size = random.pick([4, 8]);
  if (bytes.length < size) return bytes;
  const end = random.pick([32, bytes.length]);
  const at = Math.min(random.below(end) & -4, bytes.length - size);
  const value = BigInt(random.pick([...NUMBERS, bytes.length, bytes.length - 8, bytes.length + 1]));
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (size === 4) view.setUint32(at, Number(BigInt.asUintN(32, value)), true);
  else view.setBigUint64(at, BigInt.asUintN(64, value), true);
  return bytes;
}

/** Changes JSON in its structure or, sometimes, as text. */
export function mutateJson(random: Random, json: string): string {
  if (random.below(4) === 0) {
    const at = random.below(json.length + 1);
    const piece = random.pick([
      "",
      '"',
      "{",
      "}",
      "[",
      ",",
      ":",
      "\\u0061",
      "\\ud800",
      "1e9",
      "\0",
    ]);
    return json.slice(0, at) + piece + json.slice(at + random.below(4));
  }
  const root: unknown = JSON.parse(json);
  const containers: Record<string, unknown>[] = [];
  const visit = (value: unknown) => {
    if (typeof value !== "object" || value === null) return;
    containers.push(value as Record<string, unknown>);
    Object.values(value).forEach(visit);
  };
  visit(root);
  const container = random.pick(containers);
  const key = random.pick(Object.keys(container));
  if (key === undefined) return json;
  switch (random.below(4)) {
    case 0:
      delete container[key];
      break;
    case 1: // another part of the same JSON, which cannot hold this one
      container[key] = structuredClone(random.pick(Object.values(random.pick(containers))));
      break;
    case 2:
      container[random.pick(STRINGS)] = structuredClone(container[key]);
      break;
    default:
      container[key] = mutateValue(random, container[key]);
  }
  const text = JSON.stringify(root);
  // The same name twice, which no JSON.stringify writes.
  return random.below(8) === 0 ? text.replace(/("[^"]*":)/, `$1null,$1`) : text;
}

function mutateValue(random: Random, value: unknown): unknown {
  if (typeof value === "number" && random.below(2) === 0) {
    return value + random.pick([-64, -16, -1, 1, 16, 64]);
  }
  const values = [random.pick(NUMBERS), -random.pick(NUMBERS), 0.5, random.pick(STRINGS), null];
  return random.pick([...values, true, {}, [], [value, value]]);
}
