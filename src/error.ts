/**
 * What went wrong, as a word a program can branch on.
 *
 * The first group mirrors the status codes of the C ABI (`packhorse.h`); the
 * second arises in TypeScript.
 */
export type ErrorCode =
  | "invalid-argument"
  | "unsupported"
  | "out-of-memory"
  | "non-finite"
  | "corrupt"
  | "cuda"
  | "internal"
  | "no-gpu"
  | "truncated"
  | "newer-version"
  | "disposed"
  | "library-missing"
  | "abi-mismatch"
  | "not-found"
  | "io";

/**
 * The one error type that Packhorse throws on purpose. `code` says what kind of
 * failure it is; `message` names the offending value and what to do about it.
 *
 * @example
 * ```ts
 * import { PackhorseError } from "@packhorse/packhorse";
 * import { assertEquals } from "@std/assert";
 *
 * const error = new PackhorseError("invalid-argument", "Cannot pack: pack must be 4, 8, 16 or 32, got 5");
 * assertEquals(error.code, "invalid-argument");
 * ```
 */
export class PackhorseError extends Error {
  /** Always "PackhorseError". */
  override readonly name = "PackhorseError";
  /** What kind of failure this is. */
  readonly code: ErrorCode;

  /** `options.cause` is the error behind this one. */
  constructor(code: ErrorCode, message: string, options?: ErrorOptions) {
    super(message, options);
    this.code = code;
  }
}
