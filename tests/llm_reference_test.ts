/** The reference model against what transformers computed in float32 for the tiny model. */
import { assertAlmostEquals, assertEquals } from "@std/assert";
import { ReferenceModel } from "./llm_reference.ts";

const TINY = new URL("fixtures/tiny", import.meta.url).pathname;

Deno.test("llm reference: it computes what transformers does", () => {
  const oracle = JSON.parse(Deno.readTextFileSync(`${TINY}/oracle.json`));
  const logits = new ReferenceModel(TINY, 8192).logits(oracle.greedy.prompt_ids).at(-1)!;
  const { ids, values } = oracle.last_logits_top16;
  ids.forEach((id: number, i: number) => assertAlmostEquals(logits[id]!, values[i], 2e-5));
  assertEquals(logits.indexOf(Math.max(...logits)), oracle.greedy.new_ids[0]);
});
