import { readEnvironment } from "../src/environment.ts";
import { PackhorseError } from "../src/error.ts";
import { STRUCTS } from "./structs.ts";
import { DEVICE_SYMBOLS } from "./symbols/device.ts";
import { GRAPH_SYMBOLS } from "./symbols/graph.ts";
import { KV_SYMBOLS } from "./symbols/kv.ts";
import { KV_CACHE_SYMBOLS } from "./symbols/kv_cache.ts";
import { LIBRARY_SYMBOLS } from "./symbols/library.ts";
import { LLM_SYMBOLS } from "./symbols/llm.ts";
import { OT_SYMBOLS } from "./symbols/ot.ts";

/** `PH_ABI_VERSION` of the header that this code was written to. */
export const ABI_VERSION = 3;

/** Where native code can run; each has its own library. */
export type NativeBackend = "cpu" | "cuda";

const SYMBOLS = {
  ...DEVICE_SYMBOLS,
  ...KV_SYMBOLS,
  ...KV_CACHE_SYMBOLS,
  ...LLM_SYMBOLS,
  ...OT_SYMBOLS,
  ...GRAPH_SYMBOLS,
};

/** A loaded library. It stays loaded for the process, since a call may be in flight at any time. */
export interface Library {
  readonly backend: NativeBackend;
  readonly path: string;
  readonly abiVersion: number;
  readonly symbols: Deno.DynamicLibrary<typeof SYMBOLS>["symbols"];
}

const loaded = new Map<NativeBackend, Library>();

/**
 * The library of a backend, loaded at the first call.
 *
 * Throws `library-missing` if it cannot be opened, `abi-mismatch` if it is of
 * another version than this code.
 */
export function loadLibrary(backend: NativeBackend): Library {
  const known = loaded.get(backend);
  if (known) return known;
  const path = libraryPath(backend);
  const { ph_abi_version, ph_layout } = open(path, LIBRARY_SYMBOLS, backend);
  const abiVersion = ph_abi_version();
  if (abiVersion !== ABI_VERSION) {
    throw mismatch(path, backend, `it has ABI version ${abiVersion}, expected ${ABI_VERSION}`);
  }
  for (const { name, id, layout } of STRUCTS) {
    const words = new Uint32Array(layout.length);
    const count = ph_layout(id, words, words.length);
    if (count !== layout.length || words.some((word, i) => word !== layout[i])) {
      throw mismatch(path, backend, `its struct ${name} is laid out differently`);
    }
  }
  const library = { backend, path, abiVersion, symbols: open(path, SYMBOLS, backend) };
  loaded.set(backend, library);
  return library;
}

/** Where the library of a backend is looked for: in `PACKHORSE_LIB_DIR`, else in `build/` beside the module. */
export function libraryPath(backend: NativeBackend): string {
  const file = `libpackhorse_${backend}.so`;
  const folder = readEnvironment("PACKHORSE_LIB_DIR");
  if (folder !== undefined) return `${folder.replace(/\/+$/, "")}/${file}`;
  return decodeURIComponent(new URL(`../build/${file}`, import.meta.url).pathname);
}

/** How to get the library of a backend. */
export function libraryRemedy(backend: NativeBackend): string {
  const build = backend === "cpu"
    ? "Run `make build`"
    : "Run `make cuda` (it needs the CUDA toolkit)";
  return `${build}, or set PACKHORSE_LIB_DIR to the folder that holds libpackhorse_${backend}.so`;
}

/** Why a library did not load, in the loader's words alone; Deno says twice before them that it did not. */
export function loadFailure(error: unknown): string {
  const reason = error instanceof Error ? error.message : String(error);
  return reason.replace(/^(Could not open library: )+/, "");
}

function open<Symbols extends Deno.ForeignLibraryInterface>(
  path: string,
  symbols: Symbols,
  backend: NativeBackend,
): Deno.DynamicLibrary<Symbols>["symbols"] {
  try {
    return Deno.dlopen(path, symbols).symbols;
  } catch (cause) {
    const reason = loadFailure(cause);
    if (cause instanceof Deno.errors.NotCapable) {
      const message = `Cannot load ${path}: run with --allow-ffi=${path} (${reason})`;
      throw new PackhorseError("library-missing", message, { cause });
    }
    if (/^Failed to register symbol/.test(reason)) throw mismatch(path, backend, reason, { cause });
    const message = `Cannot load ${path}: ${reason}. ${libraryRemedy(backend)}`;
    throw new PackhorseError("library-missing", message, { cause });
  }
}

function mismatch(
  path: string,
  backend: NativeBackend,
  reason: string,
  options?: ErrorOptions,
): PackhorseError {
  const message =
    `Cannot use ${path}, which was built for another version of Packhorse: ${reason}. ` +
    libraryRemedy(backend);
  return new PackhorseError("abi-mismatch", message, options);
}
