import * as fs from "node:fs";
import { dirname, join } from "node:path";
import { promisify } from "node:util";
import { PackhorseError } from "../error.ts";
import { ioError } from "./io_error.ts";
import { MOST_BYTES_PER_CALL } from "./limits.ts";
import { isCount } from "./untrusted_json.ts";

const stat = promisify(fs.stat);
const realpath = promisify(fs.realpath);
const open = promisify(fs.open);
const write = promisify(fs.write);
const fsync = promisify(fs.fsync);

/** Options of {@linkcode AtomicFile.create}. */
export interface AtomicFileOptions {
  /** When it aborts, the temporary file is removed and later calls throw the signal's reason. */
  readonly signal?: AbortSignal | undefined;
}

/**
 * A file that appears under its name complete or not at all.
 *
 * Writes go to a temporary file beside the target (`.packhorse-….partial`),
 * which {@linkcode commit} renames; disposing without a commit, or an abort,
 * removes it. The process needs permission to read and write the folder.
 *
 * @example
 * ```ts
 * import { AtomicFile } from "@packhorse/packhorse/io";
 * import { assertEquals } from "@std/assert";
 *
 * const path = `${await Deno.makeTempDir()}/greeting.txt`;
 * {
 *   using file = await AtomicFile.create(path);
 *   await file.write(new TextEncoder().encode("there"), 6);
 *   await file.write(new TextEncoder().encode("Hello "), 0);
 *   await file.commit();
 * }
 * assertEquals(await Deno.readTextFile(path), "Hello there");
 * ```
 */
export class AtomicFile implements Disposable {
  /** Where the file will appear. */
  readonly path: string;
  readonly #target: string;
  readonly #temporary: string;
  readonly #signal: AbortSignal | undefined;
  readonly #onAbort = () => this[Symbol.dispose]();
  #descriptor: number | undefined;
  // Writes run one after another: one that fails also fails those behind it, and the commit.
  #writes: Promise<void> = Promise.resolve();

  private constructor(
    path: string,
    target: string,
    temporary: string,
    descriptor: number,
    signal: AbortSignal | undefined,
  ) {
    this.path = path;
    this.#target = target;
    this.#temporary = temporary;
    this.#descriptor = descriptor;
    this.#signal = signal;
    signal?.addEventListener("abort", this.#onAbort, { once: true });
  }

  /**
   * Opens the temporary file. An existing target stays as it is until the commit;
   * if it is a symbolic link, the file it leads to will be replaced.
   *
   * Throws `not-found` if the folder does not exist, and `io` if the target is a
   * folder or a device, or may not be written.
   */
  static async create(path: string, options: AtomicFileOptions = {}): Promise<AtomicFile> {
    const { signal } = options;
    signal?.throwIfAborted();
    const action = `Cannot write ${path}`;
    const existing = await stat(path).catch((error) => {
      if (error.code === "ENOENT") return undefined;
      throw ioError(action, error);
    });
    if (existing?.isDirectory() || /(^|\/)$/.test(path)) {
      throw new PackhorseError("io", `${action}: it is a folder; name a file in it`);
    }
    if (existing && !existing.isFile()) {
      throw new PackhorseError("io", `${action}: it is not a regular file`);
    }
    try {
      const target = existing ? await realpath(path) : path;
      const temporary = join(dirname(target), `.packhorse-${crypto.randomUUID()}.partial`);
      const descriptor = await open(temporary, "wx");
      const file = new AtomicFile(path, target, temporary, descriptor, signal);
      if (signal?.aborted) file[Symbol.dispose]();
      return file;
    } catch (error) {
      throw ioError(action, error, "folder");
    }
  }

  /**
   * Writes `bytes` at byte `offset`; what is never written reads as zero. `bytes`
   * must not change until the promise settles.
   *
   * Throws `io` if the disk refuses, `invalid-argument` if the offset is none,
   * `disposed` after a commit or disposal.
   */
  async write(bytes: Uint8Array, offset: number): Promise<void> {
    // node:fs would take a negative offset for "where the last write ended".
    if (!isCount(offset)) {
      const message = `Cannot write ${this.path} at offset ${offset}: it must be a count of bytes`;
      throw new PackhorseError("invalid-argument", message);
    }
    const { byteLength } = bytes; // as of now: one that is detached later must not pass for empty
    this.#writes = this.#writes.then(() => this.#write(bytes, byteLength, offset));
    await this.#writes;
  }

  /** Waits for the writes, flushes them to the disk and gives the file its name. Throws as `write`. */
  async commit(): Promise<void> {
    await this.#writes;
    try {
      await fsync(this.#open());
      fs.closeSync(this.#open());
      this.#descriptor = undefined;
      fs.renameSync(this.#temporary, this.#target);
    } catch (error) {
      throw this.#failure(error);
    } finally {
      this[Symbol.dispose]();
    }
  }

  /** Removes the temporary file unless it was committed. */
  [Symbol.dispose](): void {
    this.#signal?.removeEventListener("abort", this.#onAbort);
    if (this.#descriptor !== undefined) fs.closeSync(this.#descriptor);
    this.#descriptor = undefined;
    fs.rmSync(this.#temporary, { force: true });
  }

  async #write(bytes: Uint8Array, byteLength: number, offset: number): Promise<void> {
    this.#open();
    try {
      for (let done = 0; done < byteLength;) {
        const length = Math.min(byteLength - done, MOST_BYTES_PER_CALL);
        const { bytesWritten } = await write(this.#open(), bytes, done, length, offset + done);
        done += bytesWritten;
      }
    } catch (error) {
      throw this.#failure(error);
    }
  }

  #open(): number {
    if (this.#descriptor !== undefined) return this.#descriptor;
    this.#signal?.throwIfAborted();
    throw new PackhorseError("disposed", `Cannot write ${this.path}: it was closed`);
  }

  #failure(error: unknown): unknown {
    if (this.#signal?.aborted) return this.#signal.reason;
    if (error instanceof PackhorseError) return error;
    return ioError(`Cannot write ${this.path}`, error);
  }
}
