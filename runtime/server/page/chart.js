// A small line chart of the last readings.

import { make } from "./dom.js";

const WIDTH = 300;
const HEIGHT = 72;
const MARGIN = 2; // above and below the lines
const SVG = "http://www.w3.org/2000/svg";

/** Lines over time. */
export class Chart {
  /**
   * names: of the lines. format: turns a value into text. minTop: the scale's top is at least this.
   */
  constructor(parent, title, names, format, minTop) {
    Object.assign(this, { title, names, format, minTop, rows: [] });
    this.current = make("span", { class: "now" }, "–");
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
    const caption = make("figcaption", {}, make("h2", {}, title), this.current);
    const foot = make("div", { class: "foot" }, legend, this.highest);
    parent.append(make("figure", { class: "chart" }, caption, this.svg, foot));
  }

  /** Add a row with one value per line. Only the last `maxRows` rows are kept. */
  add(values, maxRows) {
    this.rows.push(values);
    if (this.rows.length > maxRows) this.rows.shift();
    const peak = Math.max(...this.rows.flat());
    const top = Math.max(this.minTop, peak);
    const step = WIDTH / (maxRows - 1);
    const left = WIDTH - step * (this.rows.length - 1);
    this.lines.forEach((line, lineIndex) => {
      const points = this.rows.map((row, rowIndex) => {
        const x = left + rowIndex * step;
        const y = HEIGHT - MARGIN - (row[lineIndex] / top) * (HEIGHT - 2 * MARGIN);
        return `${x.toFixed(1)},${y.toFixed(1)}`;
      });
      line.setAttribute("points", points.join(" "));
    });
    const current = values.map(this.format).join(" / ");
    const highest = this.format(peak);
    this.current.textContent = current;
    this.highest.textContent = `highest ${highest}`;
    const label = `${this.title}: ${current} now, ${highest} at most lately`;
    this.svg.setAttribute("aria-label", label);
  }
}
