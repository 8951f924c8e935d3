import { assertEquals, assertInstanceOf, assertRejects, assertStringIncludes } from "@std/assert";
import { type ErrorCode, PackhorseError } from "../src/error.ts";

/** Asserts that `work` rejects with a PackhorseError of this code whose message contains each fragment. */
export async function rejectsWith(
  work: () => Promise<unknown>,
  code: ErrorCode,
  ...fragments: string[]
): Promise<void> {
  const error = await assertRejects(work);
  assertInstanceOf(error, PackhorseError);
  assertEquals(error.code, code, error.message);
  for (const fragment of fragments) assertStringIncludes(error.message, fragment);
}
