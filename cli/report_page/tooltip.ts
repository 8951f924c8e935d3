import type { TooltipHandler } from "vega";

/** Says what is under the pointer: marks of charts, and elements with a `data-hint`. */
export class Tooltip {
  readonly #element = document.body.appendChild(document.createElement("div"));

  constructor() {
    this.#element.className = "tooltip";
    this.#element.setAttribute("role", "status");
    this.hide();
  }

  /** Shows the tooltips of a chart. */
  readonly onChart: TooltipHandler = (_handler, event, _item, value) => {
    if (value === null || value === undefined || value === "") return this.hide();
    const { clientX, clientY } = pointOf(event);
    this.#show(describe(value), clientX, clientY);
  };

  /** Shows the hints of elements. */
  listen(): void {
    document.addEventListener("pointerover", ({ target, clientX, clientY }) => {
      const hint = target instanceof Element ? target.closest<HTMLElement>("[data-hint]") : null;
      if (hint !== null) this.#show([["", hint.dataset.hint!]], clientX, clientY);
      else if (!(target instanceof SVGElement)) this.hide(); // charts see to themselves
    });
    document.addEventListener("scroll", () => this.hide(), { passive: true });
  }

  hide(): void {
    this.#element.hidden = true;
  }

  #show(rows: [name: string, value: string][], x: number, y: number): void {
    this.#element.replaceChildren(...rows.map(([name, value]) => {
      const row = document.createElement("div");
      if (name !== "") row.appendChild(document.createElement("span")).textContent = name;
      row.append(value);
      return row;
    }));
    this.#element.hidden = false;
    const { offsetWidth, offsetHeight } = this.#element;
    const left = x + 14 + offsetWidth < innerWidth ? x + 14 : x - 14 - offsetWidth;
    const top = y + 14 + offsetHeight < innerHeight ? y + 14 : y - 14 - offsetHeight;
    this.#element.style.left = `${Math.max(4, left)}px`;
    this.#element.style.top = `${Math.max(4, top)}px`;
  }
}

function pointOf(event: MouseEvent | TouchEvent): { clientX: number; clientY: number } {
  return "touches" in event ? event.touches[0] ?? event.changedTouches[0]! : event;
}

/** Vega-Lite's tooltips are objects of formatted values. */
function describe(value: unknown): [string, string][] {
  if (typeof value !== "object" || value === null) return [["", String(value)]];
  return Object.entries(value).map(([name, each]) => [name, String(each)]);
}
