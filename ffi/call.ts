import { type ErrorCode, PackhorseError } from "../src/error.ts";

/** The C ABI's `ph_status`, in the order of its values. */
export const STATUS_CODES = [
  "ok",
  "invalid-argument",
  "unsupported",
  "out-of-memory",
  "corrupt",
  "no-gpu",
  "cuda",
  "internal",
  "non-finite",
] as const satisfies readonly (ErrorCode | "ok")[];

const ERROR_BYTES = 1024;

// A synchronous call is over before the next begins, so they share one buffer; asynchronous calls get their own.
const sharedError = new Uint8Array(ERROR_BYTES);
const sharedStatus = new Int32Array(1);

type Status<Arguments extends unknown[], Result> = (
  ...parameters: [...Arguments, error: BufferSource | null, errorBytes: number]
) => Result;

/** Calls a function that returns a status; throws what it reports. */
export function call<Arguments extends unknown[]>(
  symbol: Status<Arguments, number>,
  ...parameters: Arguments
): void {
  check(symbol(...parameters, sharedError, ERROR_BYTES), sharedError);
}

/** Calls a nonblocking function that returns a status; rejects with what it reports. */
export async function callAsync<Arguments extends unknown[]>(
  symbol: Status<Arguments, Promise<number>>,
  ...parameters: Arguments
): Promise<void> {
  const error = new Uint8Array(ERROR_BYTES);
  check(await symbol(...parameters, error, ERROR_BYTES), error);
}

/** Calls a function that creates a handle; throws what it reports instead of one. */
export function create<Arguments extends unknown[]>(
  symbol: (
    ...parameters: [
      ...Arguments,
      status: BufferSource | null,
      error: BufferSource | null,
      errorBytes: number,
    ]
  ) => Deno.PointerValue,
  ...parameters: Arguments
): Deno.PointerObject {
  sharedStatus[0] = 0;
  const handle = symbol(...parameters, sharedStatus, sharedError, ERROR_BYTES);
  if (handle !== null) return handle;
  check(sharedStatus[0], sharedError);
  throw new PackhorseError("internal", "The native library gave neither a handle nor an error");
}

function check(status: number, error: Uint8Array): void {
  if (status === 0) return;
  const code = STATUS_CODES[status];
  const text = new TextDecoder().decode(error.subarray(0, error.indexOf(0)));
  if (code === undefined || code === "ok") {
    throw new PackhorseError("internal", `Unknown status ${status} of the native library: ${text}`);
  }
  throw new PackhorseError(code, text);
}
