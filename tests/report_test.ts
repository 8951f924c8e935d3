/** Reports as pages: that they are drawn in a browser, whatever is in them, and that one that is not would be noticed. */
import { assertEquals, assertRejects, assertStringIncludes } from "@std/assert";
import { type HtmlReport, scriptJson, writeHtmlReport } from "../cli/html_report.ts";
import { AtomicFile } from "../src/io/mod.ts";
import { pageFaults } from "./browser/page_faults.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

/** What would end a script, a style, a tag, an attribute or a string, if nobody saw to it. */
const HOSTILE = "</script><script>throw 1</script><!-- & \" ' \\ \u2028\u2029 \ud800 </style>";

/** A page of every kind of part. */
function report(spec: object = {}): HtmlReport {
  return {
    title: HOSTILE,
    summary: HOSTILE,
    sections: [{
      title: HOSTILE,
      text: HOSTILE,
      parts: [
        { kind: "figures", figures: [{ value: HOSTILE, label: HOSTILE }] },
        { kind: "table", headings: [HOSTILE, ">number"], rows: [[HOSTILE, 1]] },
        {
          kind: "texts",
          texts: [{
            title: HOSTILE,
            spans: [
              { text: HOSTILE, tone: "before" },
              { text: HOSTILE, tone: "mark", shade: { share: 0.5, hint: HOSTILE } },
            ],
          }],
        },
        {
          kind: "charts",
          charts: [{
            title: HOSTILE,
            note: HOSTILE,
            spec: {
              width: "container",
              height: 100,
              data: { values: [{ name: HOSTILE, value: 1 }, { name: "other", value: 2 }] },
              mark: { type: "bar", tooltip: true },
              encoding: {
                x: { field: "value", type: "quantitative" },
                y: { field: "name", type: "nominal" },
              },
              ...spec,
            },
          }],
        },
      ],
    }],
  };
}

async function write(folder: TemporaryFolder, name: string, page: HtmlReport): Promise<string> {
  using file = await AtomicFile.create(folder.file(name));
  await writeHtmlReport(file, page);
  return folder.file(name);
}

Deno.test("report: JSON in a script element is the same JSON, and no end of the element", () => {
  const json = scriptJson({ [HOSTILE]: [HOSTILE, 1, null] });
  assertEquals(JSON.parse(json), { [HOSTILE]: [HOSTILE, 1, null] });
  assertEquals(/[<\u2028\u2029]/.test(json), false);
});

Deno.test("report: a page is drawn, whatever is in it", async () => {
  using folder = new TemporaryFolder();
  const path = await write(folder, "page.html", report());
  assertEquals(await pageFaults([{ path, patience: 20 }]), [[]]);
});

Deno.test("report: a page that is not drawn is noticed", async () => {
  using folder = new TemporaryFolder();
  const good = await Deno.readTextFile(await write(folder, "good.html", report()));
  const change = (from: string | RegExp, to: string) => {
    const changed = good.replace(from, to);
    assertEquals(changed !== good, true, `nothing is like ${from}`);
    return changed;
  };
  const image = '<img src="https://example.com/x.png">';
  const charts = { mark: "no such mark", data: { values: [] } };
  const [unknown, empty] = await Promise.all(
    Object.entries(charts).map(async ([key, value]) =>
      await Deno.readTextFile(await write(folder, `${key}.html`, report({ [key]: value })))
    ),
  );
  const cases: [page: string, fault: string, patience?: number][] = [
    [change(/<script>[^]*<\/script>\n<\/html>/, "</html>"), "light: chart 0 is not drawn", 1],
    [change(/<script>/, "<script>throw new Error('no');"), "uncaught: no", 1],
    [change("</html>", "<script>console.error('oh')</script></html>"), "console error: oh"],
    [change("</html>", `${image}</html>`), "Content Security Policy"],
    [
      change(/<meta http-equiv[^>]*>/, "").replace("</html>", `${image}</html>`),
      "request: https://example.com/x.png",
    ],
    [change(/<figure[^]*<\/figure>/, ""), "light: there is no chart"],
    [change(/"mark":{[^}]*}/, '"mark":"bar"'), "chart 0 has no tooltip"],
    [unknown!, "light: chart 0 is not drawn"],
    [empty!, "light: chart 0 is empty"],
    [change("</h1>", "</h1><div style='width: 600px'>wide</div>"), "on a phone: the page is 6"],
  ];
  const pages = await Promise.all(cases.map(async ([page, , patience = 20], i) => ({
    path: await folder.write(`${i}.html`, page),
    patience,
  })));
  const found = await pageFaults(pages);
  for (const [i, [, fault]] of cases.entries()) assertStringIncludes(found[i]!.join("\n"), fault);
});

Deno.test("report: without Chromium, the way to get it is told", async () => {
  await assertRejects(
    () => pageFaults([], { chromium: "/missing/chromium" }),
    Error,
    "there is no /missing/chromium; install it with: sudo apt-get install chromium",
  );
});
