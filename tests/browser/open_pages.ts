/**
 * Opens pages in Chromium, as `page_faults.ts` has it do, and prints what is wrong with each as JSON.
 *
 * It is a process of its own because Playwright reads files that Deno gives nobody without --allow-all.
 *
 * @module
 */
import { chromium, type Page } from "playwright-core";
import { pathToFileURL } from "node:url";
import type { PageToOpen } from "./page_faults.ts";

const FLAGS = [
  ...["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"],
  ...["--disable-background-networking", "--disable-component-update", "--disable-sync"],
];
const DESKTOP = { width: 1200, height: 900 };
const PHONE = { width: 375, height: 800 };

const [executablePath, json] = Deno.args;
const browser = await chromium.launch({ executablePath: executablePath!, args: FLAGS });
try {
  const pages: PageToOpen[] = JSON.parse(json!);
  console.log(JSON.stringify(await Promise.all(pages.map(faultsOf))));
} finally {
  await browser.close();
}

async function faultsOf({ path, patience }: PageToOpen): Promise<string[]> {
  const faults: string[] = [];
  const page = await browser.newPage({ viewport: DESKTOP, colorScheme: "light" });
  const { href } = pathToFileURL(path);
  page.on("console", (message) => faults.push(`console ${message.type()}: ${message.text()}`));
  page.on("pageerror", (error) => faults.push(`uncaught: ${error.message}`));
  page.on("request", (request) => {
    if (request.url() !== href) faults.push(`request: ${request.url()}`);
  });
  await page.goto(href);
  const look = async (how: string) => {
    faults.push(...(await drawingFaults(page, patience)).map((fault) => `${how}: ${fault}`));
  };
  await look("light");
  faults.push(...await tooltipFaults(page));
  if (faults.length === 0) {
    await page.setViewportSize(PHONE);
    await look("on a phone");
    await page.emulateMedia({ colorScheme: "dark" });
    await look("dark");
  }
  await page.close();
  return faults;
}

/** What is wrong with the charts that stand on the page. */
async function drawingFaults(page: Page, patience: number): Promise<string[]> {
  const states = () =>
    page.locator(".chart").evaluateAll((charts) => charts.map((chart) => chart.dataset.state));
  const end = performance.now() + 1000 * patience;
  while ((await states()).includes(undefined) && performance.now() < end) {
    await page.waitForTimeout(50);
  }
  await page.waitForTimeout(100); // a chart follows the width of the page
  const faults = await page.locator(".chart").evaluateAll((charts) =>
    charts.flatMap((chart, i) => {
      const name = `chart ${i}`;
      if (chart.dataset.state !== "drawn") return [`${name} is not drawn`];
      const svg = chart.querySelector("svg");
      if (svg === null) return [`${name} has no SVG`];
      const { width, height } = svg.getBoundingClientRect();
      if (width < 100 || height < 50) return [`${name} is ${width} x ${height} pixels`];
      const marks = [
        ...svg.querySelectorAll<SVGGraphicsElement>(".role-mark > *, .role-mark path"),
      ];
      const visible = marks.some((mark) => {
        const { width, height } = mark.getBBox();
        return width > 0 || height > 0;
      });
      return visible ? [] : [`${name} is empty`];
    })
  );
  if (await page.locator(".chart").count() === 0) faults.push("there is no chart");
  const [wide, window] = await page.evaluate(() => [
    document.documentElement.scrollWidth,
    innerWidth,
  ]);
  if (wide! > window!) faults.push(`the page is ${wide} pixels wide, the window ${window}`);
  return faults;
}

/** Points at a mark of every chart, for up to three seconds: a busy machine draws tooltips late. */
async function tooltipFaults(page: Page): Promise<string[]> {
  const faults: string[] = [];
  const tooltip = page.locator(".tooltip");
  for (const [i, chart] of (await page.locator(".chart").all()).entries()) {
    const mark = chart.locator(".role-mark path").last();
    if (await mark.count() === 0) continue; // is a fault already
    const end = performance.now() + 3000;
    let isShown = false;
    while (!isShown && performance.now() < end) {
      await page.mouse.move(0, 0); // so that the mark is entered again
      await mark.hover({ force: true });
      await page.waitForTimeout(50);
      isShown = await tooltip.isVisible() && await tooltip.textContent() !== "";
    }
    if (!isShown) faults.push(`chart ${i} has no tooltip`);
  }
  return faults;
}
