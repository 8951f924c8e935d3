import { countDevices } from "../../ffi/device.ts";
import { libraryPath, libraryRemedy, loadFailure, loadLibrary } from "../../ffi/library.ts";
import { type Backend, BACKENDS } from "./backend.ts";

/** Whether a backend works on this machine, and if not, why. */
export interface BackendReport {
  /** Which backend this is about. */
  readonly backend: Backend;
  /** Whether a device of it can be opened. */
  readonly available: boolean;
  /** Where its library is. */
  readonly path?: string;
  /** The library's version of the C ABI. */
  readonly abiVersion?: number;
  /** What is missing. */
  readonly reason?: string;
  /** How to get it. */
  readonly remedy?: string;
}

/**
 * What works on this machine, one report per backend. Loads the libraries that are
 * there. Never throws.
 *
 * @example
 * ```ts
 * import { probeBackends } from "@packhorse/packhorse/device";
 * import { assertEquals } from "@std/assert";
 *
 * const backends = probeBackends().map(({ backend }) => backend);
 * assertEquals(backends.toSorted(), ["cpu", "cuda"]);
 * ```
 */
export function probeBackends(): BackendReport[] {
  return BACKENDS.toReversed().map(probe);
}

function probe(backend: Backend): BackendReport {
  try {
    const { path, abiVersion } = loadLibrary(backend);
    if (countDevices(backend) > 0) return { backend, available: true, path, abiVersion };
    const reason = "The library is there, but no GPU, or no NVIDIA driver";
    const remedy = "Install the NVIDIA driver, and check that nvidia-smi lists a GPU";
    return { backend, available: false, path, abiVersion, reason, remedy };
  } catch (error) {
    const cause = error instanceof Error && error.cause instanceof Error ? error.cause : error;
    const remedy = cause instanceof Deno.errors.NotCapable
      ? `Run with --allow-ffi=${libraryPath(backend)}`
      : libraryRemedy(backend);
    return { backend, available: false, reason: loadFailure(cause), remedy };
  }
}
