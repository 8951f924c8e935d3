import { PackhorseError } from "../src/error.ts";
import { ioError } from "../src/io/io_error.ts";

/** A text in a file. Throws `not-found`, `io`, and `corrupt` for what is not UTF-8. */
export async function readText(path: string): Promise<string> {
  let bytes: Uint8Array;
  try {
    bytes = await Deno.readFile(path);
  } catch (error) {
    throw ioError(`Cannot read ${path}`, error);
  }
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch (cause) {
    throw new PackhorseError("corrupt", `Cannot read ${path}: it is no text in UTF-8`, { cause });
  }
}
