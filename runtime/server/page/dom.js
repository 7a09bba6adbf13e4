// Making elements, and writing numbers, sizes and times for people.

/** The element of this page with an id. */
export const byId = (id) => document.getElementById(id);

/** Return a new element. Children are nodes or text; text is never parsed as HTML. */
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

/** Return a definition list of [term, description] pairs, without pairs that lack a description. */
export function definitions(pairs) {
  const list = make("dl", { class: "facts" });
  for (const [term, description] of pairs) {
    if (description === null || description === undefined || description === "") continue;
    list.append(make("dt", {}, term), make("dd", {}, description));
  }
  return list;
}

/** Return a button that copies the text that `getText` returns. */
export function copyButton(getText, label) {
  const button = make("button", { type: "button", class: "plain", "aria-label": label }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(getText());
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not possible here";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  return button;
}

export function count(value) {
  return Number.isFinite(value) ? Math.round(value).toLocaleString("en") : "–";
}

export function rate(value) {
  return value < 100 ? value.toFixed(1) : count(value);
}

export function percent(share) {
  if (!Number.isFinite(share)) return "–";
  return `${(share * 100).toFixed(share < 0.1 ? 1 : 0)} %`;
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; value >= 1024 && unit < units.length - 1; unit++) value /= 1024;
  return `${unit && value < 100 ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

export function seconds(value) {
  if (!Number.isFinite(value)) return "–";
  if (value < 0.0995) return `${(value * 1e3).toFixed(1)} ms`;
  if (value < 0.9995) return `${Math.round(value * 1e3)} ms`;
  return `${value.toFixed(value < 10 ? 2 : 1)} s`;
}
