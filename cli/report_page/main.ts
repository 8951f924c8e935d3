/** Draws the charts of a report, in the browser: what `tools/bundle.ts` bundles and `../html_report.ts` puts into the page. */
import "./main.css";
import { drawCharts } from "./charts.ts";
import { Tooltip } from "./tooltip.ts";

const tooltip = new Tooltip();
tooltip.listen();
drawCharts(tooltip);
