// Elements, numbers and sizes as people read them.

/** The element of this page with an id. */
export const byId = (id) => document.getElementById(id);

/** A new element. Children are nodes or text; text is never read as HTML. */
export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (typeof value === "boolean") node.toggleAttribute(name, value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** A definition list of [term, description] pairs, without those that have no description. */
export function definitions(pairs) {
  const known = pairs.filter(([, text]) => text !== null && text !== undefined && text !== "");
  return make("dl", { class: "facts" }, ...known.flatMap(([term, text]) => [make("dt", {}, term), make("dd", {}, text)]));
}

/** A button that copies what `text()` gives. */
export function copyButton(text, label) {
  const button = make("button", { type: "button", class: "plain", "aria-label": label }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not possible here";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  return button;
}

export const count = (value) => (Number.isFinite(value) ? Math.round(value).toLocaleString("en") : "–");

export const rate = (value) => (value < 100 ? value.toFixed(1) : count(value));

export const percent = (share) => (Number.isFinite(share) ? `${(share * 100).toFixed(share < 0.1 ? 1 : 0)} %` : "–");

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; value >= 1024 && unit < units.length - 1; unit++) value /= 1024;
  return `${unit && value < 100 ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

export function seconds(value) {
  if (!Number.isFinite(value)) return "–";
  if (value < 0.0995) return `${(value * 1e3).toFixed(1)} ms`;
  return value < 0.9995 ? `${Math.round(value * 1e3)} ms` : `${value.toFixed(value < 10 ? 2 : 1)} s`;
}
