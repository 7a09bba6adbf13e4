// Markdown to nodes. Everything that is not Markdown of the kinds below is text; nothing is ever read as HTML,
// no link leads elsewhere than http, https or mailto, and images are text, so that showing an answer loads nothing.
// Work is linear in the length of the text: what looks for a closing mark gives up after a fixed number of tries.

import { copyButton, make } from "./dom.js";

const MAX_DEPTH = 8;
const MAX_TRIES = 64;
const MAX_COLUMNS = 64;
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`]{0,40})[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}(?:\*[ \t]*){3,}$|^ {0,3}(?:-[ \t]*){3,}$|^ {0,3}(?:_[ \t]*){3,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,12})([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const TABLE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const MARK = /\\[!-/:-@[-`{-~]|`+|\*\*|__|~~|\*|_|!?\[|https?:\/\/[^\s<>"`]{1,2000}|\n/g;
const LINK = /!?\[([^[\]\n]{1,1000})\]\(\s{0,9}<?([^\s()<>]{1,2000})>?(?:\s{1,9}"[^"\n]{0,300}")?\s{0,9}\)/y;
const STYLES = { "**": "strong", __: "strong", "~~": "s", "*": "em", _: "em" };

/** Shows a text that grows: of its blocks only those are made anew that changed. */
export class MarkdownView {
  constructor(parent) {
    this.parent = parent;
    this.sources = [];
  }

  show(text) {
    const lines = text.replaceAll("\r", "").replaceAll("\t", "    ").split("\n");
    let index = 0;
    for (const [start, end, build] of blocks(lines)) {
      const source = lines.slice(start, end).join("\n");
      if (this.sources[index] !== source) {
        const node = build(lines.slice(start, end), 0);
        const old = this.parent.childNodes[index];
        if (old) old.replaceWith(node);
        else this.parent.append(node);
        this.sources[index] = source;
      }
      index++;
    }
    while (this.parent.childNodes.length > index) this.parent.lastChild.remove();
    this.sources.length = index;
  }
}

/** The blocks of some lines: where each starts and ends, and what makes its node. */
function* blocks(lines) {
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const [end, build] = block(lines, at);
    yield [at, end, build];
    at = end;
  }
}

function block(lines, at) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) {
    let end = at + 1;
    while (end < lines.length && !closes(lines[end], fence[1])) end++;
    return [Math.min(end + 1, lines.length), (own) => code(own, fence)];
  }
  const heading = HEADING.exec(line);
  if (heading) return [at + 1, () => make(`h${Math.min(6, heading[1].length + 2)}`, {}, ...inline(heading[2]))];
  if (RULE.test(line)) return [at + 1, () => make("hr")];
  if (QUOTE.test(line)) {
    let end = at + 1;
    while (end < lines.length && lines[end].trim() && (QUOTE.test(lines[end]) || !starts(lines, end))) end++;
    return [end, quote];
  }
  if (ITEM.test(line)) return [listEnd(lines, at), list];
  if (isTable(lines, at)) {
    let end = at + 2;
    while (end < lines.length && lines[end].includes("|")) end++;
    return [end, table];
  }
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !starts(lines, end)) end++;
  return [end, paragraph];
}

/** Whether a line begins a block that is no paragraph. */
function starts(lines, at) {
  const line = lines[at];
  return [FENCE, HEADING, RULE, QUOTE, ITEM].some((kind) => kind.test(line)) || isTable(lines, at);
}

function isTable(lines, at) {
  return lines[at].includes("|") && (lines[at + 1] ?? "").includes("-") && TABLE.test(lines[at + 1]);
}

function closes(line, fence) {
  const text = line.trim();
  return text.length >= fence.length && text === fence[0].repeat(text.length);
}

/** Where a list ends: blank lines are part of it when an item or an indented line follows. */
function listEnd(lines, at) {
  let end = at + 1;
  let blank = false;
  let fence = null;
  for (let here = at + 1; here < lines.length; here++) {
    const line = lines[here];
    if (fence) {
      if (closes(line, fence)) fence = null;
    } else if (!line.trim()) {
      blank = true;
      continue;
    } else if (!ITEM.test(line) && !line.startsWith("  ") && (blank || starts(lines, here))) {
      break;
    } else {
      fence = FENCE.exec(line.trimStart())?.[1] ?? null;
    }
    blank = false;
    end = here + 1;
  }
  return end;
}

function nodes(lines, depth) {
  if (depth > MAX_DEPTH) return [document.createTextNode(lines.join("\n"))];
  return Array.from(blocks(lines), ([start, end, build]) => build(lines.slice(start, end), depth));
}

function paragraph(lines) {
  return make("p", {}, ...inline(lines.map((line) => line.trim()).join("\n")));
}

function quote(lines, depth) {
  return make("blockquote", {}, ...nodes(lines.map((line) => line.replace(QUOTE, "")), depth + 1));
}

function code(lines, fence) {
  const closed = lines.length > 1 && closes(lines.at(-1), fence[1]);
  const text = lines.slice(1, closed ? -1 : undefined).join("\n");
  const head = make("div", { class: "code-head" }, fence[2], copyButton(() => text, "Copy this code"));
  return make("figure", { class: "code-block" }, head, make("pre", { tabindex: "0" }, make("code", {}, text)));
}

function list(lines, depth) {
  const first = ITEM.exec(lines[0]);
  const ordered = /\d/.test(first[2]);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    const own = item && item[1].length <= first[1].length + 1 && /\d/.test(item[2]) === ordered;
    if (own) items.push({ width: Math.min(item[0].length, item[1].length + item[2].length + 4), lines: [] });
    const { width, lines: held } = items.at(-1);
    held.push(own ? line.slice(width) : line.slice(Math.min(width, line.length - line.trimStart().length)));
  }
  const node = make(ordered ? "ol" : "ul");
  if (ordered && parseInt(first[2], 10) !== 1) node.start = parseInt(first[2], 10);
  node.append(...items.map((item) => make("li", {}, ...tight(nodes(item.lines, depth + 1)))));
  return node;
}

/** An item that is one paragraph, or begins with one, needs none around its text. */
function tight(children) {
  const [first, ...rest] = children;
  return first?.nodeName === "P" ? [...first.childNodes, ...rest] : children;
}

function table(lines) {
  const [head, , ...rows] = lines.map(cells);
  const row = (kind, texts) => make("tr", {}, ...texts.map((text) => make(kind, {}, ...inline(text))));
  const body = make("tbody", {}, ...rows.map((texts) => row("td", texts)));
  const whole = make("table", {}, make("thead", {}, row("th", head)), body);
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table" }, whole);
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return inner.split("|", MAX_COLUMNS).map((text) => text.trim());
}

/** The nodes of a text within a block. */
function inline(text, depth = 0) {
  const made = [];
  const missing = new Set(); // marks that have no end from here on
  let plain = "";
  let at = 0;
  const say = (node) => {
    if (plain) made.push(document.createTextNode(plain));
    plain = "";
    made.push(node);
  };
  for (const match of text.matchAll(MARK)) {
    if (match.index < at) continue; // within what the last mark was the beginning of
    plain += text.slice(at, match.index);
    const [node, end] = meaning(text, match.index, match[0], depth, missing);
    if (typeof node === "string") plain += node;
    else say(node);
    at = end;
  }
  plain += text.slice(at);
  if (plain) made.push(document.createTextNode(plain));
  return made;
}

/** What a mark stands for, a node or text, and where the text goes on. */
function meaning(text, at, mark, depth, missing) {
  const behind = at + mark.length;
  if (mark === "\n") return [make("br"), behind];
  if (mark[0] === "\\") return [mark[1], behind];
  if (mark[0] === "`") {
    const end = missing.has(mark) ? -1 : closingTicks(text, mark, behind);
    if (end < 0) missing.add(mark);
    return end < 0 ? [mark, behind] : [make("code", {}, text.slice(behind, end).trim()), end + mark.length];
  }
  if (mark.endsWith("[")) {
    LINK.lastIndex = at;
    const found = LINK.exec(text);
    const target = found && mark === "[" ? safe(found[2]) : null;
    if (target) return [link(target, found[1]), LINK.lastIndex];
    return found ? [found[0], at + found[0].length] : [mark, behind];
  }
  if (mark.startsWith("http")) {
    const address = mark.replace(/[.,;:!?'*_~)\]]{1,20}$/, "");
    const target = safe(address);
    return target ? [link(target, address), at + address.length] : [mark, behind];
  }
  const end = depth >= MAX_DEPTH || missing.has(mark) ? -1 : closing(text, mark, at);
  if (end < 0) {
    missing.add(mark);
    return [mark, behind];
  }
  if (end === at) return [mark, behind];
  return [make(STYLES[mark], {}, ...inline(text.slice(behind, end), depth + 1)), end + mark.length];
}

function closingTicks(text, ticks, from) {
  for (let tries = 0; tries < MAX_TRIES; tries++) {
    const end = text.indexOf(ticks, from);
    if (end < 0) return -1;
    if (text[end - 1] !== "`" && text[end + ticks.length] !== "`") return end;
    from = end + 1;
    while (text[from] === "`") from++;
  }
  return -1;
}

/** Where the emphasis that begins at `at` ends; `at` itself where none can begin, -1 where none ends. */
function closing(text, mark, at) {
  const word = /[\p{L}\p{N}]/u;
  const from = at + mark.length;
  if (!text[from] || /\s/.test(text[from]) || (mark[0] === "_" && word.test(text[at - 1] ?? ""))) return at;
  let end = from;
  for (let tries = 0; tries < MAX_TRIES; tries++) {
    end = text.indexOf(mark, end + (tries ? 1 : 0));
    if (end < 0) return tries ? at : -1;
    const doubled = mark.length === 1 && (text[end + 1] === mark || text[end - 1] === mark);
    if (end === from || doubled || /\s/.test(text[end - 1])) continue;
    if (mark[0] === "_" && word.test(text[end + mark.length] ?? "")) continue;
    return end;
  }
  return at;
}

/** The address when a link may lead there. */
function safe(address) {
  try {
    const url = new URL(address);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

function link(target, text) {
  return make("a", { href: target, title: target, target: "_blank", rel: "noopener noreferrer nofollow" }, text);
}
