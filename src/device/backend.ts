import { countDevices } from "../../ffi/device.ts";
import type { NativeBackend } from "../../ffi/library.ts";
import { readEnvironment } from "../environment.ts";
import { PackhorseError } from "../error.ts";

/** Where native code runs. */
export type Backend = NativeBackend;

/** The backends there are, by preference. */
export const BACKENDS: readonly Backend[] = ["cuda", "cpu"];

/** The backend to use where `wanted`, or else `PACKHORSE_BACKEND`, is asked for. */
export function chooseBackend(wanted: string | undefined): Backend {
  const name = wanted ?? readEnvironment("PACKHORSE_BACKEND") ?? "auto";
  if (name === "cpu" || name === "cuda") return name;
  if (name === "auto") return hasGpu() ? "cuda" : "cpu";
  const source = wanted === undefined ? "PACKHORSE_BACKEND" : "backend";
  const message = `Cannot open a device: ${source} must be auto, cpu or cuda, got "${name}"`;
  throw new PackhorseError("invalid-argument", message);
}

function hasGpu(): boolean {
  try {
    return countDevices("cuda") > 0;
  } catch (error) {
    // Auto means the CPU where the CUDA library does not load; one of another version is an error.
    if (error instanceof PackhorseError && error.code === "library-missing") return false;
    throw error;
  }
}
