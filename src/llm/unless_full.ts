import { PackhorseError } from "../error.ts";

/** What `work` returns; undefined if it throws `out-of-memory`, as the cache does where it has no room. */
export function unlessFull<T>(work: () => T): T | undefined {
  try {
    return work();
  } catch (error) {
    if (error instanceof PackhorseError && error.code === "out-of-memory") return undefined;
    throw error;
  }
}
