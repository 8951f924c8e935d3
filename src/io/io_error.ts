import { PackhorseError } from "../error.ts";

/** Turns what the file system threw into a `PackhorseError`; `action` reads "Cannot open x.phkv". */
export function ioError(
  action: string,
  error: unknown,
  whatIsMissing: "file" | "folder" = "file",
): PackhorseError {
  if (error instanceof Error && "code" in error && error.code === "ENOENT") {
    return new PackhorseError("not-found", `${action}: no such ${whatIsMissing}`, { cause: error });
  }
  const reason = error instanceof Error ? error.message : String(error);
  return new PackhorseError("io", `${action}: ${reason}`, { cause: error });
}
