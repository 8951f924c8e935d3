/** `packhorse demo` as a process: what it prints, and the page that it writes. */
import { assert, assertEquals, assertMatch, assertStringIncludes } from "@std/assert";
import { pageFaults } from "./browser/page_faults.ts";
import { succeed } from "./packhorse_command.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

Deno.test("demo: packs a cache within the bound, runs a model, and writes a page that is drawn", async () => {
  using folder = new TemporaryFolder();
  const { within, errors, pack, report, continuations } = JSON.parse(
    await succeed("demo", "--output", folder.path, "--json"),
  );
  assert(within);
  assertEquals(errors.length, 2 * pack.layers.length);
  for (const { ofBound } of errors) assert(ofBound > 0.5 && ofBound <= 1);
  const files = ["bits_and_error.svg", "kv.phkv", "kv.safetensors", "report.html"];
  assertEquals(folder.list(), files);

  const [raw16, packkv] = continuations;
  assertEquals([raw16.kv, raw16.kld, raw16.top1], ["raw16", 0, 1]);
  assert(packkv.cacheBytes < raw16.cacheBytes / 2 && packkv.kld > 0 && packkv.top1 > 0.5);
  for (const { text, tokensPerSecond } of continuations) {
    assert(text.length > 64 && tokensPerSecond > 0);
  }
  const fields = ["kv", "text", "cacheBytes", "bitsPerValue", "tokensPerSecond", "kld", "top1"];
  assertEquals(Object.keys(packkv), fields);

  assertEquals(report, folder.file("report.html"));
  const page = await Deno.readTextFile(report);
  // Side by side, each with its mark at the first token that is another, and what both have before it.
  const sides = [...page.matchAll(/<div class="text">(.*?)<\/div>/gs)].slice(0, 2).map(([, html]) =>
    html!.match(
      /^<span class="before">… [^<]+<\/span>(?:<span>([^<]+)<\/span>)?<mark>([^<]+)<\/mark><span class="apart">([^<]+)<\/span>$/,
    )!.slice(1)
  );
  for (const [i, [same = "", mark, apart]] of sides.entries()) {
    assertEquals(unescape(same + mark + apart), continuations[i].text);
  }
  const [[same, mark], [otherSame, otherMark]] = sides as [string[], string[]];
  assertEquals(same, otherSame);
  assert(mark !== otherMark);
  assertEquals(page.match(/class="chart"/g)!.length, 8);
  assertEquals(await pageFaults([{ path: report, patience: 20 }]), [[]]);
});

Deno.test("demo: prints texts and tables, plainly in a pipe", async () => {
  using folder = new TemporaryFolder();
  const text = await succeed("demo", "--output", folder.path);
  assertEquals([...text].filter((character) => character < " " && character !== "\n"), []);
  assertMatch(text, /^ {3}raw16:\n {3}\| \S/m);
  assertMatch(text, /^kv +cache +bits\/value +tokens\/s +KLD +same top token$/m);
  assertMatch(text, /^packkv:k=0\.1,v=0\.2 +\d+ kB +\d\.\d\d +\d+ +0\.\d+ +[\d.]+ %$/m);
  assertStringIncludes(text, `${folder.file("report.html")}: `);
});

function unescape(html: string): string {
  return html.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&quot;", '"')
    .replaceAll("&amp;", "&");
}
