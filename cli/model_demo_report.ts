import type { TopLevelSpec } from "vega-lite";
import { KLD_AXIS } from "./chart.ts";
import type { ReportChart, ReportSection, ReportText, TextSpan } from "./html_report.ts";
import {
  type CacheContinuation,
  CONTINUATION_HEADINGS,
  continuationCells,
  EVALUATION,
  type ModelDemo,
} from "./model_demo.ts";
import { formatBits, formatBytes, formatError, formatPerCent, formatRatio } from "./output.ts";

/** What the page shows of the prompt, in letters. */
const PROMPT_END = 240;
/** Positions that share a point of a line. */
const POSITIONS = 32;
/** Predictions whose divergence colours the text, and how much divergence has the fullest colour. */
const SHADED = 256;
const FULL_SHADE = 2;

/** What a page shows of a model over a 16-bit and packed caches. */
export function modelDemoSections(demo: ModelDemo): ReportSection[] {
  const { continuations } = demo;
  const [raw16, packed] = continuations as [CacheContinuation, CacheContinuation];
  const { windows, tokens } = EVALUATION;
  return [
    {
      title: `What ${packed.kv} does to the cache`,
      parts: [{
        kind: "figures",
        figures: [
          { value: formatRatio(raw16.cacheBytes / packed.cacheBytes), label: "smaller cache" },
          { value: formatBits(packed.bitsPerValue), label: "bits per value, all counted" },
          {
            value: formatRatio(packed.tokensPerSecond / raw16.tokensPerSecond),
            label: "the tokens per second of 16 bits",
          },
          { value: formatError(packed.kld), label: "nats of KLD from 16 bits" },
          { value: formatPerCent(packed.top1), label: "of likeliest tokens the same" },
        ],
      }],
    },
    {
      title: "The same text, continued over two caches",
      text: "The model takes the likeliest token each time. One token that differs changes all " +
        "that follow: the first is marked.",
      parts: [{ kind: "texts", texts: comparedTexts(demo) }],
    },
    {
      title: "What each cache takes and gives",
      text:
        `Bytes and bits are those of one continuation, its latest tokens in 16 bits; speed is ` +
        `the median of several. KLD and agreement compare ${windows} × ${tokens} predictions with those of a 16-bit ` +
        `cache, every key and value packed before it is read.`,
      parts: [
        {
          kind: "table",
          headings: CONTINUATION_HEADINGS,
          rows: continuations.map(continuationCells),
        },
        {
          kind: "charts",
          charts: [
            bars("Bytes of the cache", continuations, ({ cacheBytes }) => cacheBytes, formatBytes),
            bars("Bits per value", continuations, ({ bitsPerValue }) => bitsPerValue, formatBits),
            bars(
              "Tokens per second",
              continuations,
              ({ tokensPerSecond }) => tokensPerSecond,
              (speed) => speed.toFixed(0),
            ),
            costs(continuations),
          ],
        },
      ],
    },
    {
      title: "Where predictions change",
      text: `Means over ${POSITIONS} positions and ${windows} windows. Choose a codec in the ` +
        `legend to see it alone.`,
      parts: [
        {
          kind: "charts",
          charts: [
            positions(demo, "Divergence by position", {
              measure: "KLD, in nats",
              of: ({ divergences }) => divergences,
              scale: { type: "log", nice: false, padding: 8 },
              axis: KLD_AXIS,
              format: ".3~g",
            }),
            positions(demo, "Same likeliest token by position", {
              measure: "share of predictions",
              of: ({ agreements }) => agreements,
              scale: { zero: false },
              axis: { format: ".0%", tickCount: 5 },
              format: ".1%",
            }),
          ],
        },
        { kind: "texts", texts: [shadedText(demo)] },
      ],
    },
  ];
}

/** Two texts side by side, the first token that differs marked in both. */
function comparedTexts({ prompt, continuations, pieces }: ModelDemo): ReportText[] {
  const [left, right] = pieces as [string[], string[]];
  const found = left.findIndex((piece, i) => piece !== right[i]);
  const parts = found >= 0 || right.length > left.length;
  const same = found >= 0 ? found : left.length;
  return [left, right].map((pieces, i) => ({
    title: continuations[i]!.kv,
    note: parts
      ? `other than ${continuations[1 - i]!.kv} from token ${same + 1} of ${pieces.length} on`
      : `the same as ${continuations[1 - i]!.kv}`,
    spans: ([
      { text: `… ${prompt.slice(-PROMPT_END).replace(/^\S*\s/, "")}`, tone: "before" },
      { text: pieces.slice(0, same).join("") },
      { text: pieces[same] ?? "", tone: "mark" },
      { text: pieces.slice(same + 1).join(""), tone: "apart" },
    ] satisfies TextSpan[]).filter(({ text }) => text !== ""),
  }));
}

/** The text that is predicted, coloured by how far predictions with the packed cache are from those with 16 bits. */
function shadedText({ continuations, tokens, scores }: ModelDemo): ReportText {
  const { divergences, agreements } = scores[1]!;
  const [first = "", ...predicted] = tokens;
  return {
    title: `The first ${SHADED} predictions with ${continuations[1]!.kv}`,
    note: "The stronger the colour, the further the prediction of a token is from that with a " +
      "16-bit cache.",
    spans: [
      { text: first, tone: "before" },
      ...predicted.slice(0, SHADED).map((text, i) => ({
        text,
        shade: {
          share: Math.min(1, divergences[i]! / FULL_SHADE) * 0.75,
          hint: `KLD ${formatError(divergences[i]!)}, ` +
            `${agreements[i] === 1 ? "the same" : "another"} likeliest token`,
        },
      })),
    ],
  };
}

/** Colours that a codec has in every chart: grey, the last, is for the 16-bit cache. */
function color([raw16, ...packed]: readonly CacheContinuation[]) {
  return {
    field: "kv",
    type: "nominal",
    scale: { domain: [...packed, raw16!].map(({ kv }) => kv) },
  } as const;
}

function bars(
  title: string,
  continuations: readonly CacheContinuation[],
  of: (continuation: CacheContinuation) => number,
  format: (value: number) => string,
): ReportChart {
  const values = continuations.map((each) => ({
    kv: each.kv,
    value: of(each),
    label: format(of(each)),
  }));
  const most = Math.max(...values.map(({ value }) => value));
  const spec: TopLevelSpec = {
    width: "container",
    height: 32 * values.length,
    data: { values },
    encoding: {
      y: { field: "kv", type: "nominal", sort: null, title: null },
      x: {
        field: "value",
        type: "quantitative",
        title: null,
        axis: null,
        scale: { domain: [0, 1.5 * most], nice: false }, // with room for the labels
      },
      tooltip: [
        { field: "kv", title: "kv" },
        { field: "label", title: title.toLowerCase() },
      ],
    },
    layer: [
      { mark: "bar", encoding: { color: { ...color(continuations), legend: null } } },
      {
        mark: { type: "text", align: "left", dx: 5 },
        encoding: { text: { field: "label", type: "nominal" } },
      },
    ],
  };
  return { title, spec };
}

/** Bits against divergence. */
function costs(continuations: readonly CacheContinuation[]): ReportChart {
  // A logarithm has no place for what does not diverge.
  const values = continuations.filter(({ kld }) => kld > 0)
    .map(({ kv, bitsPerValue, kld, top1 }) => ({ kv, bitsPerValue, kld, top1 }));
  const spec: TopLevelSpec = {
    width: "container",
    height: 150,
    data: { values },
    encoding: {
      x: {
        field: "bitsPerValue",
        type: "quantitative",
        title: "bits per value",
        scale: { zero: false, padding: 16 },
      },
      y: {
        field: "kld",
        type: "quantitative",
        title: "KLD, in nats",
        axis: KLD_AXIS,
        scale: { type: "log", nice: false, padding: 16 },
      },
      color: {
        ...color(continuations),
        legend: { title: null, values: values.map(({ kv }) => kv) },
      },
      tooltip: [
        { field: "kv", title: "kv" },
        { field: "bitsPerValue", title: "bits per value", format: ".2f" },
        { field: "kld", title: "KLD", format: ".3~g" },
        { field: "top1", title: "same top token", format: ".1%" },
      ],
    },
    mark: { type: "point", size: 120 },
  };
  return { title: "Bits against divergence", spec };
}

/** A line per codec of what predictions score, by their position in the window. */
function positions(
  { continuations, scores }: ModelDemo,
  title: string,
  { measure, of, scale, axis, format }: {
    measure: string;
    of: (scores: ModelDemo["scores"][number]) => Float32Array;
    scale: { type?: "log"; nice?: boolean; padding?: number; zero?: boolean };
    axis: { format: string; values?: number[]; tickCount?: number };
    format: string;
  },
): ReportChart {
  const { windows, tokens } = EVALUATION;
  // The 16-bit cache is what others are compared with.
  const compared = continuations.map(({ kv }, i) => ({ kv, scores: of(scores[i]!) })).slice(1);
  const values = compared.flatMap(({ kv, scores }) =>
    Array.from({ length: tokens / POSITIONS }, (_, bin) => {
      let sum = 0;
      for (let window = 0; window < windows; window++) {
        for (let at = 0; at < POSITIONS; at++) {
          sum += scores[window * tokens + bin * POSITIONS + at]!;
        }
      }
      return { kv, position: (bin + 0.5) * POSITIONS, value: sum / (windows * POSITIONS) };
    })
  );
  const spec: TopLevelSpec = {
    width: "container",
    height: 240,
    data: { values },
    params: [{ name: "chosen", select: { type: "point", fields: ["kv"] }, bind: "legend" }],
    mark: { type: "line", point: { size: 40 } },
    encoding: {
      x: { field: "position", type: "quantitative", title: "position in the window, in tokens" },
      y: {
        field: "value",
        type: "quantitative",
        title: measure,
        axis,
        scale,
      },
      color: {
        ...color(continuations),
        legend: { title: null, values: compared.map(({ kv }) => kv) },
      },
      opacity: { condition: { param: "chosen", value: 1 }, value: 0.12 },
      tooltip: [
        { field: "kv", title: "kv" },
        { field: "position", title: "position" },
        { field: "value", title: measure, format },
      ],
    },
  };
  return { title, spec };
}
