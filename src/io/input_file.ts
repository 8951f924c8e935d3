import * as fs from "node:fs";
import { promisify } from "node:util";
import { PackhorseError } from "../error.ts";
import { ioError } from "./io_error.ts";
import { MOST_BYTES_PER_CALL } from "./limits.ts";

// node:fs, because Deno.FsFile has no positional read: a seek and a read of two callers would mix.
const stat = promisify(fs.stat);
const open = promisify(fs.open);
const read = promisify(fs.read);

/** A file to read ranges of. Nothing is read, or allocated, beyond its size at opening. */
export class InputFile implements Disposable {
  readonly path: string;
  /** Bytes in the file when it was opened. */
  readonly size: number;
  #descriptor: number | undefined;

  private constructor(path: string, size: number, descriptor: number) {
    this.path = path;
    this.size = size;
    this.#descriptor = descriptor;
  }

  /** Throws `not-found`, or `io` if the file is not a regular one or may not be read. */
  static async open(path: string): Promise<InputFile> {
    const action = `Cannot open ${path}`;
    // Before opening it, since opening a named pipe would wait for a writer.
    const information = await stat(path).catch((error) => {
      throw ioError(action, error);
    });
    if (!information.isFile()) {
      const kind = information.isDirectory() ? "a folder" : "not a regular file";
      throw new PackhorseError("io", `${action}: it is ${kind}`);
    }
    const descriptor = await open(path, "r").catch((error) => {
      throw ioError(action, error);
    });
    return new InputFile(path, information.size, descriptor);
  }

  /** Fills `target` from byte `position` on. Throws `truncated` if the file ends before. */
  async readInto(target: Uint8Array, position: number): Promise<void> {
    this.#checkRange(position, target.byteLength);
    for (let done = 0; done < target.byteLength;) {
      const length = Math.min(target.byteLength - done, MOST_BYTES_PER_CALL);
      const { bytesRead } = await read(this.#open(), target, done, length, position + done)
        .catch((error) => {
          throw ioError(`Cannot read ${this.path}`, error);
        });
      if (bytesRead === 0) throw this.#truncated(position + done, position + target.byteLength);
      done += bytesRead;
    }
  }

  /** The `length` bytes from byte `position` on. Throws as `readInto`, or `out-of-memory`. */
  async read(position: number, length: number): Promise<Uint8Array<ArrayBuffer>> {
    this.#checkRange(position, length);
    let target;
    try {
      target = new Uint8Array(length);
    } catch (cause) {
      const message = `Cannot read ${length} bytes of ${this.path} at once: out of memory`;
      throw new PackhorseError("out-of-memory", message, { cause });
    }
    await this.readInto(target, position);
    return target;
  }

  [Symbol.dispose](): void {
    if (this.#descriptor !== undefined) fs.closeSync(this.#descriptor);
    this.#descriptor = undefined;
  }

  #open(): number {
    if (this.#descriptor !== undefined) return this.#descriptor;
    throw new PackhorseError("disposed", `Cannot read ${this.path}: its reader is disposed`);
  }

  #checkRange(position: number, length: number): void {
    this.#open();
    if (position + length > this.size) throw this.#truncated(this.size, position + length);
  }

  #truncated(size: number, expected: number): PackhorseError {
    const message = `Cannot read ${this.path}: it ends at byte ${size}, expected ${expected} bytes`;
    return new PackhorseError("truncated", message);
  }
}
