// The conversation and the running request.

import { ApiError, stream } from "./api.js";
import { byId, copyButton, count, make, rate, seconds } from "./dom.js";
import { MarkdownView } from "./markdown.js";

const NUMBER_FIELDS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const FOLLOW_PX = 80; // the log follows the answer while its end is this near

/** The chat view. */
export class Chat {
  constructor() {
    this.messages = []; // the conversation, as the API takes it
    this.abort = null; // the AbortController of the running request
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
    byId("announcement").textContent = "The conversation is empty.";
    this.prompt.focus();
  }

  async send() {
    const text = this.prompt.value.trim();
    if (!text || this.abort) return;
    const { body, problem } = this.requestBody(text);
    if (problem) {
      showProblem(problem);
      return;
    }
    this.empty.remove();
    appendArticle("user", "You").body.textContent = text;
    const answer = new Answer();
    this.prompt.value = "";
    this.setRunning(new AbortController());
    answer.node.scrollIntoView({ block: "end" });
    try {
      await answer.run(body, this.abort.signal);
      this.keep(text, answer.text);
    } catch (error) {
      if (error.name === "AbortError") {
        answer.note("Stopped.");
        if (answer.text) this.keep(text, answer.text);
      } else {
        answer.fail(error instanceof ApiError ? error.message : String(error));
      }
      if (!answer.text) this.prompt.value ||= text; // the user can send it again
    } finally {
      this.setRunning(null);
      byId("announcement").textContent = answer.summary;
    }
  }

  /** Add a message and its answer to the conversation. */
  keep(text, answer) {
    const user = { role: "user", content: text };
    this.messages.push(user, { role: "assistant", content: answer });
  }

  setRunning(abort) {
    this.abort = abort;
    const running = abort !== null;
    byId("send").hidden = running;
    byId("stop").hidden = !running;
    byId("log").setAttribute("aria-busy", String(running));
    if (running) byId("announcement").textContent = "The model answers.";
    else this.prompt.focus({ preventScroll: true });
  }

  /** Return the body of a request for an answer to `text`, or the first wrong setting. */
  requestBody(text) {
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
    for (const name of NUMBER_FIELDS) {
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

/** Show what is wrong with a setting, until it changes. */
function showProblem({ field, message }) {
  field.setCustomValidity(message);
  byId("settings").open = true;
  field.reportValidity();
  field.addEventListener("input", () => field.setCustomValidity(""), { once: true });
}

/** One answer while it is generated, with its figures. */
class Answer {
  constructor() {
    const { node, body, foot } = appendArticle("assistant", "Model");
    this.node = node;
    this.foot = foot;
    this.text = "";
    this.reasoning = "";
    this.numTokens = 0;
    this.usage = null; // the server's, which comes last
    this.finishReason = null;
    this.summary = ""; // for screen readers
    this.content = make("div", { class: "markdown" });
    this.view = new MarkdownView(this.content);
    body.append(this.content);
    this.figures = make("span", { class: "figures" }, "waiting for the first token");
    this.foot.append(this.figures);
    this.frameRequested = false;
  }

  async run(body, signal) {
    this.isJson = body.response_format !== undefined;
    this.startTime = performance.now();
    try {
      for await (const event of stream("/v1/chat/completions", body, signal)) {
        this.addEvent(event);
        this.requestFrame();
      }
    } finally {
      this.ended = true;
      this.show();
      if (this.text) this.foot.append(copyButton(() => this.text, "Copy this answer"));
    }
    if (this.finishReason === "length") {
      this.note("The answer was cut: no more tokens were allowed.");
    }
  }

  addEvent(event) {
    this.usage = event.usage ?? this.usage;
    const choice = event.choices[0];
    if (!choice) return;
    this.firstTokenTime ??= performance.now();
    this.lastTokenTime = performance.now();
    this.numTokens += choice.token_ids?.length ?? 1;
    this.text += choice.delta.content ?? "";
    this.reasoning += choice.delta.reasoning_content ?? "";
    this.finishReason = choice.finish_reason ?? this.finishReason;
  }

  /** Show the answer in the next frame. */
  requestFrame() {
    if (this.frameRequested) return;
    this.frameRequested = true;
    requestAnimationFrame(() => {
      this.frameRequested = false;
      this.show();
    });
  }

  show() {
    const log = byId("log");
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < FOLLOW_PX;
    if (this.reasoning) {
      this.reasoningNode ??= this.insertReasoning();
      this.reasoningNode.textContent = this.reasoning;
    }
    this.view.show(this.isJson && this.text ? `\`\`\`json\n${this.text}` : this.text);
    this.summary = this.figureTexts().join(" · ");
    this.figures.textContent = this.summary;
    if (atEnd) log.scrollTop = log.scrollHeight;
  }

  insertReasoning() {
    const text = make("p");
    const summary = make("summary", {}, "Thought");
    this.content.before(make("details", { class: "thought" }, summary, text));
    return text;
  }

  /** Return the time to the first token, the speed, and the numbers of tokens. */
  figureTexts() {
    if (this.firstTokenTime === undefined) {
      return this.ended ? [] : ["waiting for the first token"];
    }
    const texts = [`first token ${seconds((this.firstTokenTime - this.startTime) / 1000)}`];
    const numTokens = this.usage?.completion_tokens ?? this.numTokens;
    const decodeSeconds = (this.lastTokenTime - this.firstTokenTime) / 1000;
    if (numTokens > 1 && decodeSeconds > 0) {
      texts.push(`${rate((numTokens - 1) / decodeSeconds)} tokens/s`);
    }
    texts.push(`${count(numTokens)} ${numTokens === 1 ? "token" : "tokens"}`);
    if (this.usage) {
      const cached = count(this.usage.prompt_tokens_details?.cached_tokens ?? 0);
      texts.push(`${cached} of ${count(this.usage.prompt_tokens)} prompt tokens cached`);
    }
    return texts;
  }

  note(text) {
    this.foot.before(make("p", { class: "note" }, text));
    this.summary = `${text} ${this.summary}`;
  }

  fail(text) {
    this.foot.before(make("p", { class: "error", role: "alert" }, text));
    this.summary = ""; // screen readers announce an alert by themselves
  }
}

function appendArticle(role, name) {
  const body = make("div", { class: "body" });
  const foot = make("footer");
  const heading = make("h2", { class: "unseen" }, name);
  const node = make("article", { class: role, "aria-label": name }, heading, body, foot);
  byId("log").append(node);
  return { node, body, foot };
}
