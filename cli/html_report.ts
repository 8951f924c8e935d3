import type { TopLevelSpec } from "vega-lite";
import { PackhorseError } from "../src/error.ts";
import type { AtomicFile } from "../src/io/mod.ts";
import type { Heading } from "./output.ts";

/** A page that shows what was measured. */
export interface HtmlReport {
  title: string;
  /** A sentence or two under the title. */
  summary: string;
  sections: readonly ReportSection[];
}

/** A part of the page under a heading of its own. */
export interface ReportSection {
  title: string;
  /** What is to be seen. */
  text?: string;
  parts: readonly ReportPart[];
}

/** What a section shows. */
export type ReportPart =
  | { kind: "figures"; figures: readonly ReportFigure[] }
  | { kind: "table"; headings: readonly Heading[]; rows: readonly (string | number)[][] }
  | { kind: "charts"; charts: readonly ReportChart[] }
  | { kind: "texts"; texts: readonly ReportText[] };

/** A number that says much. */
export interface ReportFigure {
  value: string;
  label: string;
}

/** A chart, drawn in the browser: as wide as there is room, and in the colours of the page. */
export interface ReportChart {
  title: string;
  /** How to read it. */
  note?: string;
  /** By Vega-Lite, with its data. A `width` of "container" fits it into the page, and asks for a `height`. */
  spec: TopLevelSpec;
}

/** A text; several stand side by side. */
export interface ReportText {
  title: string;
  note?: string;
  spans: readonly TextSpan[];
}

/** A piece of a text, and how it looks. */
export interface TextSpan {
  text: string;
  /** Faint before what matters, marked, or coloured as what parts from another text. */
  tone?: "before" | "mark" | "apart";
  /** How much of a coloured background it has, 0 to 1, and what the pointer shows. */
  shade?: { share: number; hint: string };
}

/** What `tools/bundle.ts` made of `report_page/`. */
const PAGE = new URL("../build/report_page/", import.meta.url);

/**
 * Fills a file with a page that needs nothing else: no other file, no network.
 *
 * Throws `not-found` if the page's code is not built; what the file's methods throw.
 */
export async function writeHtmlReport(file: AtomicFile, report: HtmlReport): Promise<void> {
  const [script, style] = await Promise.all(["main.js", "main.css"].map(readPagePart));
  const html = page(report, { script: script!, style: style! });
  await file.write(new TextEncoder().encode(html), 0);
  await file.commit();
}

async function readPagePart(name: string): Promise<string> {
  try {
    return await Deno.readTextFile(new URL(name, PAGE));
  } catch (cause) {
    const message = `Cannot write a report: build/report_page/${name} is missing; ` +
      "run: make build";
    throw new PackhorseError("not-found", message, { cause });
  }
}

function page(
  { title, summary, sections }: HtmlReport,
  { script, style }: { script: string; style: string },
): string {
  return `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="${POLICY}">
<title>${escape(title)}</title>
<style>${style}</style>
<h1>${escape(title)}</h1>
${paragraph(summary)}
${sections.map(section).join("\n")}
<script>${script}</script>
</html>
`;
}

/** Nothing is loaded from anywhere. Vega makes functions of a chart's expressions. */
const POLICY = "default-src 'none'; style-src 'unsafe-inline'; " +
  "script-src 'unsafe-inline' 'unsafe-eval'";

function section({ title, text, parts }: ReportSection): string {
  const body = parts.map(part).join("\n");
  return `<section>\n<h2>${escape(title)}</h2>\n${paragraph(text)}\n${body}\n</section>`;
}

function part(part: ReportPart): string {
  switch (part.kind) {
    case "figures":
      return grid(part.figures.map(figure), "figures");
    case "table":
      return table(part.headings, part.rows);
    case "charts":
      return grid(part.charts.map(chart));
    case "texts":
      return grid(part.texts.map(text));
  }
}

function grid(cards: string[], kind = ""): string {
  const each = cards.map((card) => `<div class="card">${card}</div>`);
  return `<div class="grid ${kind}">\n${each.join("\n")}\n</div>`;
}

function figure({ value, label }: ReportFigure): string {
  return `<strong>${escape(value)}</strong><span>${escape(label)}</span>`;
}

function table(headings: readonly Heading[], rows: readonly (string | number)[][]): string {
  const row = (tag: string, cells: readonly (string | number)[]) => {
    const each = cells.map((cell, i) => {
      const kind = headings[i]?.startsWith(">") ? ' class="number"' : "";
      return `<${tag}${kind}>${escape(String(cell))}</${tag}>`;
    });
    return `<tr>${each.join("")}</tr>`;
  };
  const head = row("th", headings.map((heading) => heading.replace(/^>/, "")));
  const body = rows.map((cells) => row("td", cells));
  return `<div class="card table"><table><thead>${head}</thead><tbody>${
    body.join("\n")
  }</tbody></table></div>`;
}

function chart({ title, note, spec }: ReportChart): string {
  const described = { description: title, ...spec };
  return `<h3>${escape(title)}</h3>${aside(note)}<figure class="chart">` +
    `<script type="application/json">${scriptJson(described)}</script></figure>`;
}

function text({ title, note, spans }: ReportText): string {
  const pieces = spans.map(({ text, tone, shade }) => {
    const tag = tone === "mark" ? "mark" : "span";
    const kind = tone === undefined || tone === "mark" ? "" : ` class="${tone}"`;
    const shaded = shade === undefined
      ? ""
      : ` style="--shade:${shade.share.toFixed(2)}" data-hint="${escape(shade.hint)}"`;
    return `<${tag}${kind}${shaded}>${escape(text)}</${tag}>`;
  });
  return `<h3>${escape(title)}</h3>${aside(note)}<div class="text">${pieces.join("")}</div>`;
}

function paragraph(text: string | undefined): string {
  return text === undefined ? "" : `<p>${escape(text)}</p>`;
}

function aside(text: string | undefined): string {
  return text === undefined ? "" : `<p class="note">${escape(text)}</p>`;
}

const ENTITIES: Readonly<Record<string, string>> = {
  "&": "&amp;",
  "<": "&lt;",
  ">": "&gt;",
  '"': "&quot;",
};

function escape(text: string): string {
  return text.replace(/[&<>"]/g, (character) => ENTITIES[character]!);
}

/** JSON that can stand in a script element: without the "<" of "</script>", and without line separators of Unicode. */
export function scriptJson(value: unknown): string {
  return JSON.stringify(value).replace(
    /[<\u2028\u2029]/g,
    (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}
