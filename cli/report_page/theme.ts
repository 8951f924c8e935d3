import type { Config } from "vega-lite";

/** How charts look on the page. Colours are Okabe and Ito's, which colour-blind people tell apart; lighter on dark, and grey last. */
export function theme(dark: boolean): Config {
  const [text, faint, line] = dark
    ? ["#d7dbe0", "#9aa3ad", "#343b44"]
    : ["#22272e", "#5b6570", "#dfe3e8"];
  return {
    font: "system-ui, sans-serif",
    padding: 2,
    view: { stroke: null },
    range: {
      category: dark
        ? ["#ff8c42", "#2fc79a", "#5fb4f0", "#e39ac4", "#f2c14e", "#9aa3ad"]
        : ["#d55e00", "#009e73", "#0072b2", "#cc79a7", "#d99a00", "#7a838d"],
      heatmap: { scheme: dark ? "viridis" : "yellowgreenblue" },
    },
    axis: {
      labelColor: faint,
      titleColor: faint,
      domainColor: line,
      tickColor: line,
      gridColor: line,
      labelFontSize: 12,
      titleFontSize: 12,
      titleFontWeight: "normal",
      titlePadding: 8,
      labelLimit: 220,
      labelOverlap: true,
      labelSeparation: 6,
    },
    axisX: { tickCount: { signal: "ceil(width / 70)" } },
    legend: {
      labelColor: text,
      titleColor: faint,
      labelFontSize: 12,
      titleFontSize: 12,
      titleFontWeight: "normal",
      labelLimit: 220,
      orient: "top",
      direction: "horizontal",
      columns: { signal: "width < 320 ? 1 : width < 640 ? 2 : 6" },
    },
    text: { color: text, fontSize: 12 },
    rule: { color: faint },
    bar: { cornerRadiusEnd: 3 },
    line: { strokeWidth: 2 },
    point: { filled: true, size: 60, opacity: 1 },
  };
}
