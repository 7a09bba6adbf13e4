// Markdown to DOM nodes. markdown-it parses the text into tokens; this file makes the nodes.
//
// No HTML string is ever made or parsed: the tags below are the only ones, and everything else is
// text. Links lead to http, https and mailto only. Images are shown as their source text. So
// showing an answer loads nothing.

import { copyButton, make } from "./dom.js";
import MarkdownIt from "./vendor/markdown-it.esm.min.mjs";

const MAX_LEVEL = 16; // quotes count as one level, lists as two; deeper Markdown is shown as text
const MAX_LANGUAGE_CHARS = 40;
const LINK_PROTOCOLS = ["http:", "https:", "mailto:"];
const TAGS = {
  paragraph_open: "p",
  blockquote_open: "blockquote",
  bullet_list_open: "ul",
  list_item_open: "li",
  thead_open: "thead",
  tbody_open: "tbody",
  tr_open: "tr",
  th_open: "th",
  td_open: "td",
  strong_open: "strong",
  em_open: "em",
  s_open: "s",
};

const parser = new MarkdownIt({ html: false, linkify: true, breaks: true });
parser.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
parser.validateLink = (address) => allowedAddress(address) !== null;
// `&lt;` stays `&lt;`. Definitions of link references stay in the text, where they were written.
parser.disable(["entity", "reference"]);
parser.block.ruler.before("table", "too_deep", tooDeep);

/** Shows a text that grows. Only the blocks that changed get new nodes. */
export class MarkdownView {
  constructor(parent) {
    this.parent = parent;
    this.clear();
  }

  clear() {
    this.settled = ""; // the text of the blocks that more text cannot change
    this.numSettled = 0; // how many nodes these blocks have
    this.sources = []; // the text of each later block
    this.parent.replaceChildren();
  }

  show(text) {
    const normalized = text.replaceAll("\r", "").replaceAll("\0", "\uFFFD");
    if (!normalized.startsWith(this.settled)) this.clear();
    const rest = normalized.slice(this.settled.length);
    const lines = rest.split("\n");
    const blocks = topLevelBlocks(parser.parse(rest, {}));
    const sources = blocks.map(
      ({ tokens, start, end }) => `${tokens[0].type} ${lines.slice(start, end).join("\n")}`,
    );
    blocks.forEach(({ tokens }, index) => {
      if (this.sources[index] === sources[index]) return;
      const fragment = document.createDocumentFragment();
      appendNodes(tokens, fragment);
      const old = this.parent.childNodes[this.numSettled + index];
      if (old) old.replaceWith(fragment);
      else this.parent.append(fragment);
    });
    this.sources = sources;
    const numNodes = this.numSettled + blocks.length;
    while (this.parent.childNodes.length > numNodes) this.parent.lastChild.remove();
    this.settle(blocks, lines);
  }

  /** More text can change the last block, and by that the block before it. The others settle. */
  settle(blocks, lines) {
    const numSettled = blocks.length - 2;
    if (numSettled <= 0) return;
    const start = blocks[numSettled].start;
    this.settled += lines.slice(0, start).map((line) => `${line}\n`).join("");
    this.numSettled += numSettled;
    this.sources.splice(0, numSettled);
  }
}

/** The blocks at the top level, each with its tokens and its lines. Each becomes one node. */
function topLevelBlocks(tokens) {
  const blocks = [];
  let depth = 0;
  for (const token of tokens) {
    if (depth === 0) blocks.push({ tokens: [], start: token.map[0], end: token.map[1] });
    blocks.at(-1).tokens.push(token);
    depth += token.nesting;
  }
  return blocks;
}

/** A rule for markdown-it: below MAX_LEVEL, the rest of the container is one paragraph. */
function tooDeep(state, startLine, endLine, silent) {
  if (state.level < MAX_LEVEL) return false;
  if (silent) return true;
  let line = startLine + 1;
  while (line < endLine && (state.isEmpty(line) || state.sCount[line] >= state.blkIndent)) line++;
  state.push("paragraph_open", "p", 1);
  const inline = state.push("inline", "", 0);
  inline.content = state.getLines(startLine, line, state.blkIndent, false).trim();
  inline.children = [];
  state.push("paragraph_close", "p", -1);
  state.line = line;
  return true;
}

/** Append the nodes of some tokens to `parent`. */
function appendNodes(tokens, parent) {
  const open = [parent];
  for (const token of tokens) {
    if (token.hidden) continue; // the paragraph of a list item whose items are not apart
    if (token.nesting < 0) {
      open.pop();
    } else if (token.nesting > 0) {
      const { node, content = node } = container(token);
      open.at(-1).append(node);
      open.push(content);
    } else {
      appendLeaf(token, open.at(-1));
    }
  }
}

/** The node of an opening token. Its content is appended to `content`, if given. */
function container(token) {
  switch (token.type) {
    case "heading_open":
      return { node: make(`h${Math.min(6, Number(token.tag.slice(1)) + 2)}`) };
    case "ordered_list_open": {
      const start = token.attrGet("start");
      return { node: start === null ? make("ol") : make("ol", { start }) };
    }
    case "table_open": {
      const content = make("table");
      const attributes = { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table" };
      return { node: make("div", attributes, content), content };
    }
    case "link_open": {
      const target = allowedAddress(token.attrGet("href"));
      if (target === null) return { node: make("span") };
      const rel = "noopener noreferrer nofollow";
      return { node: make("a", { href: target, title: target, target: "_blank", rel }) };
    }
    default:
      return { node: make(TAGS[token.type] ?? "span") };
  }
}

/** Append the nodes of a token that neither opens nor closes. */
function appendLeaf(token, parent) {
  switch (token.type) {
    case "inline":
      appendNodes(token.children, parent);
      break;
    case "fence":
    case "code_block":
      parent.append(codeBlock(token.content.replace(/\n$/, ""), token.info.trim().split(/\s/)[0]));
      break;
    case "code_inline":
      parent.append(make("code", {}, token.content));
      break;
    case "hr":
      parent.append(make("hr"));
      break;
    case "softbreak":
    case "hardbreak":
      parent.append(make("br"));
      break;
    case "image": {
      const title = token.attrGet("title");
      const titlePart = title === null ? "" : ` "${title}"`;
      parent.append(`![${token.content}](${token.attrGet("src")}${titlePart})`);
      break;
    }
    default:
      parent.append(token.content);
  }
}

function codeBlock(text, language) {
  const copy = copyButton(() => text, "Copy this code");
  const head = make("div", { class: "code-head" }, language.slice(0, MAX_LANGUAGE_CHARS), copy);
  const code = make("pre", { tabindex: "0" }, make("code", {}, text));
  return make("figure", { class: "code-block" }, head, code);
}

/** The complete address of a link, or null when a link must not lead there. */
function allowedAddress(address) {
  try {
    const url = new URL(address);
    return LINK_PROTOCOLS.includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}
