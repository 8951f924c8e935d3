/**
 * `@std/assert` from npm's mirror of the standard library, for machines that cannot reach JSR. The
 * mirror has no types: `assert.d.ts` declares the functions that the tests use.
 *
 * @module
 */
// @ts-types="./assert.d.ts"
export * from "deno-std/assert/mod.js";
