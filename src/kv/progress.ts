import type { KvFileOptions } from "./file_options.ts";

/** Counts bytes that are done, and stops the work where the signal aborts. */
export class ProgressCount {
  readonly #total: number;
  readonly #options: Pick<KvFileOptions, "onProgress" | "signal">;
  #done = 0;

  constructor(total: number, options: Pick<KvFileOptions, "onProgress" | "signal">) {
    this.#total = total;
    this.#options = options;
    options.signal?.throwIfAborted();
  }

  advance(bytes: number): void {
    this.#done += bytes;
    this.#options.onProgress?.(this.#done, this.#total);
    this.#options.signal?.throwIfAborted();
  }
}
