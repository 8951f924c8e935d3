import { assertEquals } from "@std/assert";

Deno.test("mod: importing it loads no library and needs no permission", async () => {
  const { code, stderr } = await new Deno.Command(Deno.execPath(), {
    args: ["run", "--quiet", "--no-prompt", new URL("../mod.ts", import.meta.url).href],
  }).output();
  assertEquals({ code, stderr: new TextDecoder().decode(stderr) }, { code: 0, stderr: "" });
});
