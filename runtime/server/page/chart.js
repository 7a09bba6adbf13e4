// A small line chart of the last readings.

import { make } from "./dom.js";

const WIDTH = 300;
const HEIGHT = 72;
const SVG = "http://www.w3.org/2000/svg";

/** Lines over time. `names` are those of its lines; `format` writes a value; `top` is the least top of its scale. */
export class Chart {
  constructor(parent, title, names, format, top) {
    Object.assign(this, { title, names, format, top, rows: [] });
    this.value = make("span", { class: "now" }, "–");
    this.highest = make("span", { class: "quiet" });
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("role", "img");
    this.lines = names.map((_, index) => {
      const line = document.createElementNS(SVG, "polyline");
      line.setAttribute("class", `line-${index}`);
      return line;
    });
    this.svg.append(...this.lines);
    const legend = make("p", { class: "legend" });
    if (names.length > 1) {
      legend.append(...names.map((name, index) => make("span", { class: `key-${index}` }, name)));
    }
    parent.append(
      make("figure", { class: "chart" }, make("figcaption", {}, make("h2", {}, title), this.value), this.svg,
        make("div", { class: "foot" }, legend, this.highest)),
    );
  }

  /** Add a row, one value for each line; the oldest leave after `most`. */
  add(values, most) {
    this.rows.push(values);
    if (this.rows.length > most) this.rows.shift();
    const peak = Math.max(...this.rows.flat());
    const scale = Math.max(this.top, peak);
    const step = WIDTH / (most - 1);
    const first = WIDTH - step * (this.rows.length - 1);
    this.lines.forEach((line, index) => {
      const points = this.rows.map((row, at) => {
        const y = HEIGHT - 2 - (row[index] / scale) * (HEIGHT - 4);
        return `${(first + at * step).toFixed(1)},${y.toFixed(1)}`;
      });
      line.setAttribute("points", points.join(" "));
    });
    const now = values.map(this.format).join(" / ");
    this.value.textContent = now;
    this.highest.textContent = `highest ${this.format(peak)}`;
    this.svg.setAttribute("aria-label", `${this.title}: ${now} now, ${this.format(peak)} at most lately`);
  }
}
