import { parse, View, Warn } from "vega";
import { compile, type TopLevelSpec } from "vega-lite";
import { theme } from "./theme.ts";
import type { Tooltip } from "./tooltip.ts";

const dark = matchMedia("(prefers-color-scheme: dark)");

/** Draws every chart of the page, and again when the colours of the page change. */
export async function drawCharts(tooltip: Tooltip): Promise<void> {
  const charts = [...document.querySelectorAll<HTMLElement>(".chart")].map((element) => ({
    element,
    spec: JSON.parse(element.querySelector("script")!.textContent) as TopLevelSpec,
    canvas: element.appendChild(document.createElement("div")),
  }));
  let views: View[] = [];
  const draw = async () => {
    for (const view of views) view.finalize();
    views = [];
    for (const { element } of charts) delete element.dataset.state;
    for (const { element, spec, canvas } of charts) {
      try {
        views.push(await drawChart(spec, canvas, tooltip));
        element.dataset.state = "drawn";
      } catch (error) {
        element.dataset.state = "failed";
        canvas.textContent = `This chart cannot be drawn: ${error}`;
        console.error(error);
      }
    }
  };
  dark.addEventListener("change", draw);
  await draw();
}

async function drawChart(spec: TopLevelSpec, canvas: HTMLElement, tooltip: Tooltip): Promise<View> {
  const fitted = {
    autosize: { type: "fit-x", contains: "padding" },
    background: "transparent",
    ...spec,
  } as const;
  const compiled = compile(fitted, { config: theme(dark.matches) });
  const view = new View(parse(compiled.spec), { container: canvas, renderer: "svg", hover: true });
  view.logLevel(Warn).tooltip(tooltip.onChart);
  return await view.runAsync();
}
