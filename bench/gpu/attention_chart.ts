import type { TopLevelSpec } from "vega-lite";
import { STYLE, writeChart } from "../../cli/chart.ts";
import type { AtomicFile } from "../../src/io/mod.ts";

/** What was measured of attention over one cache. */
export interface AttentionBar {
  /** "8×8×4, 32,768" */
  readonly title: string;
  readonly codec: string;
  /** What a pure read of as many bytes takes of its time. */
  readonly share: number;
  /** How many times faster it is than the best attention over bf16, where that was measured. */
  readonly speedup: number | undefined;
  /** At least so much is wanted. */
  readonly wanted: { readonly share?: number | undefined; readonly speedup?: number | undefined };
}

/** Fills a file with an SVG chart of shares and speed-ups by case and codec, with a tick where they are wanted to be. */
export async function writeAttentionChart(
  file: AtomicFile,
  bars: readonly AttentionBar[],
  device: string,
): Promise<void> {
  await writeChart(file, attentionChart(bars, device));
}

function attentionChart(bars: readonly AttentionBar[], device: string): TopLevelSpec {
  // The same places in both panels.
  const titles = unique(bars.map(({ title }) => title));
  const codecs = unique(bars.map(({ codec }) => codec));
  const panel = (
    { x, values, isFirst }: {
      x: string;
      values: readonly {
        title: string;
        codec: string;
        value: number;
        wanted: number | undefined;
      }[];
      isFirst: boolean;
    },
  ) => {
    const place = {
      y: {
        field: "title",
        type: "nominal" as const,
        title: isFirst ? "batch × kv heads × group, tokens" : null,
        sort: titles,
        scale: { domain: titles, paddingInner: 0.2 },
        axis: { labels: isFirst, labelLimit: 300 },
      },
      yOffset: { field: "codec", type: "nominal" as const, scale: { domain: codecs } },
    };
    return {
      data: { values: values as unknown as Record<string, unknown>[] },
      width: 340,
      height: { step: 11 },
      layer: [
        {
          mark: { type: "bar" as const },
          encoding: {
            ...place,
            x: { field: "value", type: "quantitative" as const, title: x },
            color: {
              field: "codec",
              type: "nominal" as const,
              title: "codec",
              scale: { domain: codecs },
            },
          },
        },
        {
          transform: [{ filter: "isValid(datum.wanted)" }],
          mark: { type: "tick" as const, color: "black", thickness: 2 },
          encoding: { ...place, x: { field: "wanted", type: "quantitative" as const } },
        },
      ],
    };
  };
  const compared = bars.filter(({ speedup }) => speedup !== undefined);
  return {
    ...STYLE,
    title: {
      text: `Attention over packed caches, ${device}; ticks: wanted on an H200`,
      anchor: "middle",
      offset: 12,
    },
    hconcat: [
      panel({
        x: "pure read of as many bytes, % of the time",
        values: bars.map(({ title, codec, share, wanted }) => ({
          title,
          codec,
          value: 100 * share,
          wanted: wanted.share && 100 * wanted.share,
        })),
        isFirst: true,
      }),
      ...compared.length === 0 ? [] : [panel({
        x: "times as fast as the best bf16 attention",
        values: compared.map(({ title, codec, speedup, wanted }) => ({
          title,
          codec,
          value: speedup!,
          wanted: wanted.speedup,
        })),
        isFirst: false,
      })],
    ],
  };
}

function unique(names: readonly string[]): string[] {
  return [...new Set(names)];
}
