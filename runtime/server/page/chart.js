// A small line chart of the last minutes.

import { make } from "./dom.js";

const WIDTH = 300;
const HEIGHT = 72;
const MARGIN = 2; // above and below the lines
const EDGE_PERCENT = 8; // a time nearer than this to an edge has no room centred at its tick
const MINUTE_MS = 60_000;
const SVG = "http://www.w3.org/2000/svg";

/** Lines over time. The time axis fills from the left; when it is full, it moves with the time. */
export class Chart {
  /**
   * names: of the lines. format: turns a value into text. minTop: the scale's top is at least this.
   * span: { windowMs: the length of the time axis, gapMs: a line breaks where nothing was read for
   * so long }.
   */
  constructor(parent, title, names, format, minTop, span) {
    Object.assign(this, { title, names, format, minTop, span, rows: [] });
    this.highest = make("span", { class: "quiet" });
    this.top = make("span");
    this.svg = svgNode("svg", { role: "img", class: "plot" });
    this.axis = svgNode("g", { class: "axis" });
    // The lines are stretched to the width of the plot. Its text is not.
    const area = { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", height: HEIGHT };
    this.lines = names.map((_, index) => svgNode("path", { class: `line-${index}` }));
    this.svg.append(this.axis, svgNode("svg", { ...area, width: "100%" }, ...this.lines));
    this.values = names.map(() => make("b", {}, "–"));
    const keys = names.map((name, index) =>
      make("span", { class: `key-${index}` }, `${name} `, this.values[index]),
    );
    const caption = make("figcaption", {}, make("h2", {}, title), this.highest);
    const bottom = make("span", {}, "0");
    const scale = make("div", { class: "scale", "aria-hidden": "true" }, this.top, bottom);
    const plot = make("div", { class: "plot-row" }, scale, this.svg);
    parent.append(
      make("figure", { class: "chart" }, caption, plot, make("p", { class: "legend" }, ...keys)),
    );
  }

  /** Add a reading: one value per line, NaN where there is none. time: milliseconds since 1970. */
  add(values, time) {
    this.rows.push({ values, time });
    const windowStart = time - this.span.windowMs;
    // One row before the window stays, from which the lines enter it.
    while (this.rows.length > 1 && this.rows[1].time <= windowStart) this.rows.shift();
    const start = Math.max(this.rows[0].time, windowStart);
    const peak = Math.max(0, ...this.rows.flatMap((row) => row.values).filter(Number.isFinite));
    const top = Math.max(this.minTop, peak);
    this.lines.forEach((line, index) => line.setAttribute("d", this.path(index, start, top)));
    this.drawTimes(start);
    const texts = values.map(this.format);
    texts.forEach((text, index) => (this.values[index].textContent = text));
    this.top.textContent = this.format(top);
    const highest = this.format(peak);
    this.highest.textContent = `highest ${highest}`;
    const current = this.names.map((name, index) => `${texts[index]} ${name}`).join(", ");
    const minutes = this.span.windowMs / MINUTE_MS;
    const lately = `at most ${highest} in the last ${minutes} minutes`;
    this.svg.setAttribute("aria-label", `${this.title}: ${current} now; ${lately}`);
  }

  /** Return the path of one line: a part for each run of readings without a gap. */
  path(index, start, top) {
    const commands = [];
    let previous = null; // the time of the last point
    for (const { values, time } of this.rows) {
      if (!Number.isFinite(values[index])) continue;
      const x = (((time - start) / this.span.windowMs) * WIDTH).toFixed(1);
      const y = (HEIGHT - MARGIN - (values[index] / top) * (HEIGHT - 2 * MARGIN)).toFixed(1);
      const connected = previous !== null && time - previous < this.span.gapMs;
      commands.push(connected ? `L${x},${y}` : `M${x},${y}h0`); // h0: a single reading is a dot
      previous = time;
    }
    return commands.join("");
  }

  /** Draw a line and the time of day at each full minute. */
  drawTimes(start) {
    const nodes = [];
    const end = start + this.span.windowMs;
    for (let time = Math.ceil(start / MINUTE_MS) * MINUTE_MS; time <= end; time += MINUTE_MS) {
      const percent = ((time - start) / this.span.windowMs) * 100;
      const x = `${percent.toFixed(2)}%`;
      nodes.push(svgNode("line", { x1: x, x2: x, y1: 0, y2: HEIGHT + 3 }));
      if (percent > 100 - EDGE_PERCENT) continue;
      const anchor = percent < EDGE_PERCENT ? "start" : "middle";
      const label = { x, y: HEIGHT + 16, "text-anchor": anchor };
      nodes.push(svgNode("text", label, timeOfDay(time)));
    }
    this.axis.replaceChildren(...nodes);
  }
}

function svgNode(tag, attributes, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function timeOfDay(time) {
  const date = new Date(time);
  const parts = [date.getHours(), date.getMinutes()];
  return parts.map((part) => String(part).padStart(2, "0")).join(":");
}
