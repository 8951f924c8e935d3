/** `packhorse.h`, section "library". */
export const LIBRARY_SYMBOLS = {
  ph_abi_version: { parameters: [], result: "u32" },
  ph_layout: {
    parameters: [
      "u32", // uint32_t which
      "buffer", // uint32_t* words
      "u32", // uint32_t capacity
    ],
    result: "u32",
  },
} as const satisfies Deno.ForeignLibraryInterface;
