/** What the benches draw. */
import { assertEquals, assertStringIncludes } from "@std/assert";
import { type AttentionBar, writeAttentionChart } from "../bench/gpu/attention_chart.ts";
import { AtomicFile } from "../src/io/mod.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

Deno.test("bench: the chart of attention has a bar for every figure, and a tick where one is wanted", async () => {
  using folder = new TemporaryFolder();
  const bars: AttentionBar[] = [
    { title: "8×8×4, 32,768", codec: "raw16", share: 0.9, speedup: 0.97, wanted: {} },
    { title: "8×8×4, 32,768", codec: "fixed 2", share: 0.7, speedup: 4.5, wanted: { share: 0.82 } },
    {
      title: "ragged",
      codec: "fixed 2",
      share: 0.6,
      speedup: undefined,
      wanted: { share: 0.65, speedup: 3.5 },
    },
  ];
  const draw = async (name: string, drawn: readonly AttentionBar[]) => {
    using file = await AtomicFile.create(folder.file(name));
    await writeAttentionChart(file, drawn, "NVIDIA H200");
    return await Deno.readTextFile(folder.file(name));
  };
  // Vega's accessible names of marks tell their kind and what they stand for.
  const count = (svg: string, kind: string) =>
    [...svg.matchAll(new RegExp(`aria-roledescription="${kind}"`, "g"))].length;

  const both = await draw("both.svg", bars);
  for (const text of ["8×8×4, 32,768", "ragged", "raw16", "fixed 2", "NVIDIA H200", "bf16"]) {
    assertStringIncludes(both, text);
  }
  assertEquals([count(both, "bar"), count(both, "tick")], [5, 2]);
  const shares = await draw("shares.svg", bars.map((bar) => ({ ...bar, speedup: undefined })));
  assertEquals([count(shares, "bar"), count(shares, "tick")], [3, 2]);
  assertEquals(shares.includes("bf16"), false);
});
