import { inflateRawSync } from "node:zlib";
import { PackhorseError } from "../error.ts";
import { checksum as checksumOf } from "./checksum.ts";
import { InputFile } from "./input_file.ts";
import { MOST_BYTES_PER_CALL } from "./limits.ts";
import { type NpyNumbers, readNpyNumbers } from "./npy.ts";

const END = 0x06054b50; // of the central directory, and of the file but for a comment
const END_BYTES = 22;
const MOST_COMMENT_BYTES = 2 ** 16 - 1;
const ENTRY = 0x02014b50;
const ENTRY_BYTES = 46;
const MEMBER = 0x04034b50;
const MEMBER_BYTES = 30;

/**
 * Reads the arrays that `numpy.savez` or `numpy.savez_compressed` wrote, by their names, each number as a float64. Any
 * little-endian integers, floats and booleans in row-major order will do.
 *
 * Throws `not-found` or `io` if the file cannot be read; `corrupt` or `truncated` if it is no zip file, or an array in it
 * breaks the format or its checksum; `unsupported` for zip files above 4 GiB, arrays above 1 GiB, and other elements.
 *
 * @example
 * ```ts
 * import { readNpz } from "@packhorse/packhorse/io";
 * import { assertRejects } from "@std/assert";
 *
 * await assertRejects(() => readNpz("README.md"), Error, "no .npz file");
 * ```
 */
export async function readNpz(path: string): Promise<Map<string, NpyNumbers>> {
  using file = await InputFile.open(path);
  const fail = (reason: string, code: "corrupt" | "unsupported" = "corrupt"): never => {
    throw new PackhorseError(code, `Cannot read ${path}: ${reason}`);
  };
  const tailBytes = Math.min(file.size, END_BYTES + MOST_COMMENT_BYTES);
  const tail = viewOf(await file.read(file.size - tailBytes, tailBytes));
  let end = tailBytes - END_BYTES;
  while (end >= 0 && tail.getUint32(end, true) !== END) end--;
  if (end < 0) return fail("it is no .npz file (numpy.savez writes one)");
  const members = tail.getUint16(end + 10, true);
  const directoryBytes = tail.getUint32(end + 12, true);
  const directoryStart = tail.getUint32(end + 16, true);
  if (members === 0xffff || directoryStart === 0xffffffff) {
    return fail("it is a zip file of the 64-bit kind", "unsupported");
  }
  const directory = viewOf(await file.read(directoryStart, directoryBytes));
  const arrays = new Map<string, NpyNumbers>();
  for (let at = 0, member = 0; member < members; member++) {
    if (at + ENTRY_BYTES > directoryBytes || directory.getUint32(at, true) !== ENTRY) {
      return fail(`its directory breaks off at member ${member} of ${members}`);
    }
    const method = directory.getUint16(at + 10, true);
    const checksum = directory.getUint32(at + 16, true);
    const packedBytes = directory.getUint32(at + 20, true);
    const bytes = directory.getUint32(at + 24, true);
    const nameBytes = directory.getUint16(at + 28, true);
    const next = at + ENTRY_BYTES + nameBytes + directory.getUint16(at + 30, true) +
      directory.getUint16(at + 32, true);
    const start = directory.getUint32(at + 42, true);
    if (next > directoryBytes) {
      return fail(`its directory breaks off at member ${member} of ${members}`);
    }
    const name = new TextDecoder().decode(
      new Uint8Array(directory.buffer, directory.byteOffset + at + ENTRY_BYTES, nameBytes),
    );
    at = next;
    const where = `${path}, array ${JSON.stringify(name)}`;
    if (bytes > MOST_BYTES_PER_CALL || packedBytes > MOST_BYTES_PER_CALL) {
      return fail(`${name} is above 1 GiB`, "unsupported");
    }
    const head = viewOf(await file.read(start, MEMBER_BYTES));
    if (head.getUint32(0, true) !== MEMBER) return fail(`${name} is not where the directory says`);
    const dataStart = start + MEMBER_BYTES + head.getUint16(26, true) + head.getUint16(28, true);
    const packed = await file.read(dataStart, packedBytes);
    const data = unpack(packed, { method, bytes }) ??
      fail(`${name} is compressed in a way that is not known, or not to ${bytes} bytes`);
    if (checksumOf(data) !== checksum) return fail(`the checksum of ${name} is wrong`);
    const source = {
      size: data.byteLength,
      read: (position: number, length: number) =>
        Promise.resolve(data.slice(position, position + length)),
    };
    arrays.set(name.replace(/\.npy$/, ""), await readNpyNumbers(source, where));
  }
  return arrays;
}

const viewOf = ({ buffer, byteOffset, byteLength }: Uint8Array<ArrayBuffer>) =>
  new DataView(buffer, byteOffset, byteLength);

/** A member's bytes; undefined if it is packed in another way than stored or deflated, or to another length. */
function unpack(
  packed: Uint8Array<ArrayBuffer>,
  { method, bytes }: { method: number; bytes: number },
): Uint8Array<ArrayBuffer> | undefined {
  if (method === 0) return packed.byteLength === bytes ? packed : undefined;
  if (method !== 8) return undefined;
  try {
    const data = new Uint8Array(inflateRawSync(packed, { maxOutputLength: Math.max(bytes, 1) }));
    return data.byteLength === bytes ? data : undefined;
  } catch {
    return undefined;
  }
}
