// The conversation and the request that is under way.

import { ApiError, stream } from "./api.js";
import { byId, copyButton, count, make, rate, seconds } from "./dom.js";
import { MarkdownView } from "./markdown.js";

const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];

/** The chat view. */
export class Chat {
  constructor() {
    this.messages = [];
    this.abort = null; // of the request under way
    this.empty = byId("empty");
    this.prompt = byId("prompt");
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    byId("options").addEventListener("submit", (event) => event.preventDefault());
    byId("stop").addEventListener("click", () => this.abort?.abort());
    byId("clear").addEventListener("click", () => this.clear());
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    byId("chat").addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.abort?.abort();
    });
  }

  clear() {
    this.abort?.abort();
    this.messages = [];
    byId("log").replaceChildren(this.empty);
    byId("said").textContent = "The conversation is empty.";
    this.prompt.focus();
  }

  async send() {
    const text = this.prompt.value.trim();
    if (!text || this.abort) return;
    const { body, problem } = this.body(text);
    if (problem) {
      problem.field.setCustomValidity(problem.message);
      byId("settings").open = true;
      problem.field.reportValidity();
      problem.field.addEventListener("input", () => problem.field.setCustomValidity(""), { once: true });
      return;
    }
    this.empty.remove();
    const asked = turn("user", "You");
    asked.body.textContent = text;
    const answer = new Answer();
    this.prompt.value = "";
    this.working(new AbortController());
    answer.node.scrollIntoView({ block: "end" });
    try {
      await answer.run(body, this.abort.signal);
      this.messages.push({ role: "user", content: text }, { role: "assistant", content: answer.text });
    } catch (error) {
      if (error.name === "AbortError") {
        answer.note("Stopped.");
        if (answer.text) this.messages.push({ role: "user", content: text }, { role: "assistant", content: answer.text });
      } else {
        answer.fail(error instanceof ApiError ? error.message : String(error));
      }
      if (!answer.text) this.prompt.value ||= text; // to be sent again
    } finally {
      this.working(null);
      byId("said").textContent = answer.summary;
    }
  }

  working(abort) {
    this.abort = abort;
    byId("send").hidden = abort !== null;
    byId("stop").hidden = abort === null;
    byId("log").setAttribute("aria-busy", String(abort !== null));
    if (abort !== null) byId("said").textContent = "The model answers.";
    else this.prompt.focus({ preventScroll: true });
  }

  /** The request for an answer to `text`, or the setting that is wrong. */
  body(text) {
    const system = byId("system").value.trim();
    const body = {
      model: byId("model").value,
      messages: [
        ...(system ? [{ role: "system", content: system }] : []),
        ...this.messages,
        { role: "user", content: text },
      ],
      stream: true,
      stream_options: { include_usage: true },
      return_token_ids: true,
    };
    for (const name of NUMBERS) {
      const field = byId(name);
      if (!field.validity.valid) return { problem: { field, message: field.validationMessage } };
      if (field.value !== "") body[name] = Number(field.value);
    }
    const schema = byId("schema");
    if (schema.value.trim()) {
      try {
        const format = { name: "answer", schema: JSON.parse(schema.value), strict: true };
        body.response_format = { type: "json_schema", json_schema: format };
      } catch (error) {
        return { problem: { field: schema, message: `This is not JSON: ${error.message}` } };
      }
    }
    return { body };
  }
}

/** One answer as it grows, with its figures. */
class Answer {
  constructor() {
    const { node, body, foot } = turn("assistant", "Model");
    Object.assign(this, { node, foot, text: "", thought: "", tokens: 0, usage: null, reason: null, summary: "" });
    this.content = make("div", { class: "markdown" });
    this.view = new MarkdownView(this.content);
    body.append(this.content);
    this.figures = make("span", { class: "figures" }, "waiting for the first token");
    this.foot.append(this.figures);
    this.drawing = false;
  }

  async run(body, signal) {
    this.isJson = body.response_format !== undefined;
    this.began = performance.now();
    try {
      for await (const event of stream("/v1/chat/completions", body, signal)) {
        this.take(event);
        this.draw();
      }
    } finally {
      this.ended = performance.now();
      this.show();
      if (this.text) this.foot.append(copyButton(() => this.text, "Copy this answer"));
    }
    if (this.reason === "length") this.note("The answer was cut: no more tokens were allowed.");
  }

  take(event) {
    this.usage = event.usage ?? this.usage;
    const choice = event.choices[0];
    if (!choice) return;
    this.first ??= performance.now();
    this.last = performance.now();
    this.tokens += choice.token_ids?.length ?? 1;
    this.text += choice.delta.content ?? "";
    this.thought += choice.delta.reasoning_content ?? "";
    this.reason = choice.finish_reason ?? this.reason;
  }

  /** Show what there is at the next frame. */
  draw() {
    if (this.drawing) return;
    this.drawing = true;
    requestAnimationFrame(() => {
      this.drawing = false;
      this.show();
    });
  }

  show() {
    const log = byId("log");
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    if (this.thought) {
      this.thinking ??= this.thoughts();
      this.thinking.textContent = this.thought;
    }
    this.view.show(this.isJson && this.text ? `\`\`\`json\n${this.text}` : this.text);
    this.figures.textContent = this.summary = this.told().join(" · ");
    if (follows) log.scrollTop = log.scrollHeight;
  }

  thoughts() {
    const text = make("p");
    this.content.before(make("details", { class: "thought" }, make("summary", {}, "Thought"), text));
    return text;
  }

  /** The figures: first token, speed, tokens, cached tokens. */
  told() {
    if (this.first === undefined) return this.ended ? [] : ["waiting for the first token"];
    const tokens = this.usage?.completion_tokens ?? this.tokens;
    const spent = (this.last - this.first) / 1000;
    const cached = this.usage?.prompt_tokens_details?.cached_tokens;
    return [
      `first token ${seconds((this.first - this.began) / 1000)}`,
      ...(tokens > 1 && spent > 0 ? [`${rate((tokens - 1) / spent)} tokens/s`] : []),
      `${count(tokens)} ${tokens === 1 ? "token" : "tokens"}`,
      ...(this.usage ? [`${count(cached ?? 0)} of ${count(this.usage.prompt_tokens)} prompt tokens cached`] : []),
    ];
  }

  note(text) {
    this.foot.before(make("p", { class: "note" }, text));
    this.summary = `${text} ${this.summary}`;
  }

  fail(text) {
    this.foot.before(make("p", { class: "error", role: "alert" }, text));
    this.summary = ""; // an alert is read out by itself
  }
}

function turn(role, name) {
  const body = make("div", { class: "body" });
  const foot = make("footer");
  const node = make("article", { class: role, "aria-label": name }, make("h2", { class: "unseen" }, name), body, foot);
  byId("log").append(node);
  return { node, body, foot };
}
