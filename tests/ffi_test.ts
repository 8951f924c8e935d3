/** The symbol tables, structs and enums of `ffi/` against the text of `packhorse.h`, both ways. */
import { assert, assertEquals, assertGreater } from "@std/assert";
import { STATUS_CODES } from "../ffi/call.ts";
import {
  DTYPE,
  GRAPH_ACTIVATION,
  KV_CACHE_QUANTIZER,
  KV_GROUPING,
  KV_PART,
  KV_QUANTIZER,
  KV_REPACK,
  OT_COST,
  OT_GRADIENT,
  OT_STATUSES,
} from "../ffi/enums.ts";
import { ABI_VERSION, loadLibrary } from "../ffi/library.ts";
import { STRUCTS } from "../ffi/structs.ts";
import { DEVICE_SYMBOLS } from "../ffi/symbols/device.ts";
import { GRAPH_SYMBOLS } from "../ffi/symbols/graph.ts";
import { KV_SYMBOLS } from "../ffi/symbols/kv.ts";
import { KV_CACHE_SYMBOLS } from "../ffi/symbols/kv_cache.ts";
import { LIBRARY_SYMBOLS } from "../ffi/symbols/library.ts";
import { LLM_SYMBOLS } from "../ffi/symbols/llm.ts";
import { OT_SYMBOLS } from "../ffi/symbols/ot.ts";

const header = Deno.readTextFileSync(new URL("../cuda/include/packhorse.h", import.meta.url))
  .replaceAll(/\/\*.*?\*\//gs, "");

/** The FFI type of a C declaration, which may end in a name. */
function ffiType(declaration: string): string {
  const type = declaration.replace(/\bconst\b/, "").replace(/\w+\s*$/, "").replaceAll(/\s/g, "");
  if (/^ph_(device|buffer|readback|kv_cache|kv_cache_graph|ot_batch)\*$/.test(type)) {
    return "pointer";
  }
  if (type.endsWith("*")) return "buffer";
  if (type === "float") return "f32";
  return type.replace(/^uint(\d+)_t$/, "u$1").replace(/^int(\d+)_t$/, "i$1");
}

const functions = Object.fromEntries(
  [...header.matchAll(/PH_API\s+([^;(]*?)(\w+)\(([^)]*)\)\s*;/g)].map(
    ([, result, name, parameters]) => [name!, {
      parameters: parameters!.trim() === "void" ? [] : parameters!.split(",").map(ffiType),
      result: ffiType(`${result} result`),
    }],
  ),
);

const symbols: Record<string, Deno.ForeignFunction> = {
  ...LIBRARY_SYMBOLS,
  ...DEVICE_SYMBOLS,
  ...KV_SYMBOLS,
  ...KV_CACHE_SYMBOLS,
  ...LLM_SYMBOLS,
  ...OT_SYMBOLS,
  ...GRAPH_SYMBOLS,
};

Deno.test("ffi: every function of the header has a symbol with its parameters, and every symbol a function", () => {
  assertGreater(Object.keys(functions).length, 20);
  const blocking = Object.entries(symbols).filter(([, { nonblocking }]) => !nonblocking);
  assertEquals(
    Object.fromEntries(
      blocking.map(([name, { parameters, result }]) => [name, { parameters, result }]),
    ),
    functions as never,
  );
});

Deno.test("ffi: nonblocking symbols are the blocking ones under another name", () => {
  const nonblocking = Object.entries(symbols).filter(([, symbol]) => symbol.nonblocking);
  assertGreater(nonblocking.length, 3);
  for (const [alias, symbol] of nonblocking) {
    assertEquals(alias, `${symbol.name}_async`);
    const { parameters, result } = symbols[symbol.name!]!;
    assertEquals(symbol.parameters, parameters);
    assertEquals(symbol.result, result);
  }
});

/** The enum's words in lower case without their prefix, in the order of their values. */
function enumOf(name: string, prefix: string): Record<string, number> {
  const [, body] = header.match(new RegExp(`enum ${name} \\{([^}]*)\\}`))!;
  return Object.fromEntries(
    [...body!.matchAll(/(\w+)\s*=\s*(\d+)/g)].map(([, word, value]) => {
      assert(word!.startsWith(prefix), word);
      return [word!.slice(prefix.length).toLowerCase(), Number(value)];
    }),
  );
}

Deno.test("ffi: the values of enums are the header's", () => {
  assertEquals(enumOf("ph_dtype", "PH_"), DTYPE);
  assertEquals(enumOf("ph_kv_quantizer", "PH_KV_"), KV_QUANTIZER);
  assertEquals(enumOf("ph_kv_grouping", "PH_KV_PER_"), KV_GROUPING);
  assertEquals(enumOf("ph_kv_repack", "PH_KV_REPACK_"), KV_REPACK);
  assertEquals(enumOf("ph_kv_part", "PH_KV_"), KV_PART);
  assertEquals(enumOf("ph_kv_cache_quantizer", "PH_KV_CACHE_"), KV_CACHE_QUANTIZER);
  assertEquals(enumOf("ph_ot_cost", "PH_OT_"), OT_COST);
  assertEquals(enumOf("ph_ot_gradient", "PH_OT_"), OT_GRADIENT);
  const statuses = Object.keys(enumOf("ph_ot_status", "PH_OT_"));
  assertEquals(statuses.map((word) => word.replaceAll("_", "-")), [...OT_STATUSES]);
  assertEquals(enumOf("ph_graph_activation", "PH_GRAPH_"), GRAPH_ACTIVATION);
  const codes = Object.entries(enumOf("ph_status", "PH_")).map(([word, value]) => {
    assertEquals(STATUS_CODES[value], word.replace(/^error_/, "").replaceAll("_", "-") as "ok");
    return value;
  });
  assertEquals(codes.length, STATUS_CODES.length);
  const [, version] = header.match(/#define PH_ABI_VERSION (\d+)u/)!;
  assertEquals(Number(version), ABI_VERSION);
});

Deno.test("ffi: structs have the header's fields, in its order", () => {
  const ids = enumOf("ph_struct", "PH_STRUCT_");
  assertEquals(STRUCTS.map(({ id }) => id), Object.values(ids));
  for (const struct of STRUCTS) {
    assertEquals(ids[struct.name.replace(/^ph_/, "")], struct.id);
    const [, body] = header.match(new RegExp(`typedef struct ${struct.name} \\{([^}]*)\\}`))!;
    const words = { char: "char", uint32_t: "u32", uint64_t: "u64", float: "f32", double: "f64" };
    const declared = [...body!.matchAll(/(\w+)\s+(\w+)(\[\d+\])?\s*;/g)].map(
      ([, type, name, size]) => [name!, words[type as keyof typeof words] + (size ?? "")],
    );
    assertEquals(Object.entries(struct.fields), declared);
  }
});

Deno.test("ffi: structs keep what was written to them", () => {
  const [, codec] = STRUCTS;
  const names = Object.keys(codec!.fields);
  const values = Object.fromEntries(names.map((name, i) => [name, i + 1]));
  assertEquals(codec!.read(codec!.write(values as never)) as unknown, values);
});

Deno.test("ffi: a library that is missing is an error that says what to run", async () => {
  const message = await messageOf("/nowhere");
  assert(message.startsWith("library-missing"), message);
  for (const fragment of ["/nowhere/libpackhorse_cpu.so", "make build", "PACKHORSE_LIB_DIR"]) {
    assert(message.includes(fragment), message);
  }
});

Deno.test("ffi: a library without the symbols is a mismatch", async () => {
  const folder = await Deno.makeTempDir();
  try {
    const compiled = await new Deno.Command("cc", {
      args: ["-shared", "-fPIC", "-x", "c", "-o", `${folder}/libpackhorse_cpu.so`, "-"],
      stdin: "piped",
    }).spawn();
    const writer = compiled.stdin.getWriter();
    await writer.write(new TextEncoder().encode(
      `unsigned ph_abi_version(void) { return ${ABI_VERSION + 1}; }
       unsigned ph_layout(unsigned which, unsigned* words, unsigned capacity) { return 0; }`,
    ));
    await writer.close();
    assert((await compiled.status).success);
    const message = await messageOf(folder);
    assert(message.startsWith("abi-mismatch"), message);
    assert(message.includes(`ABI version ${ABI_VERSION + 1}, expected ${ABI_VERSION}`), message);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});

Deno.test("ffi: a loaded library is kept", () => {
  assert(loadLibrary("cpu") === loadLibrary("cpu"));
});

/** Code and message of the error that loading the CPU library from a folder gives, in another process. */
async function messageOf(folder: string): Promise<string> {
  const library = new URL("../ffi/library.ts", import.meta.url).href;
  const { stdout } = await new Deno.Command(Deno.execPath(), {
    args: [
      "eval",
      `import { loadLibrary } from "${library}";
       try { loadLibrary("cpu"); } catch ({ code, message }) { console.log(code, message); }`,
    ],
    env: { PACKHORSE_LIB_DIR: folder },
  }).output();
  return new TextDecoder().decode(stdout);
}
