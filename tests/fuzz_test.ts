import { assertGreater } from "@std/assert";
import { fuzz } from "./fuzz/run.ts";

Deno.test("the file readers survive ten seconds of fuzzing", async () => {
  const seed = crypto.getRandomValues(new Uint32Array(1))[0]!;
  for (const [name, { read, refused }] of await fuzz({ seconds: 10, seed })) {
    assertGreater(read, 0, `No ${name} was read, from --seed ${seed}`);
    assertGreater(refused, 0, `No ${name} was refused, from --seed ${seed}`);
  }
});
