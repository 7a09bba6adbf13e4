// A message of the user with the model's answer: how they are shown, generated and edited.

import { stream } from "./api.js";
import { byId, copyButton, count, make, rate, seconds } from "./dom.js";
import { MarkdownView } from "./markdown.js";

const FOLLOW_PX = 80; // the log follows the answer while its end is this near
const MIN_DECODE_SECONDS = 0.01; // the speed of less is noise
const NEW_TURN = {
  answer: "",
  reasoning: "",
  isJson: false,
  figures: "", // of the answer, as text
  note: "", // why the answer is not whole
  failed: false, // the note is an error
  complete: false, // no more of the answer will come
};

/** One turn of the conversation, in the log. */
export class Turn {
  /**
   * data: what is kept of the turn: `user`, the message, and as much of NEW_TURN as there is.
   * ask: called with this turn and a message, to have it answered instead.
   */
  constructor(data, ask) {
    this.data = { ...NEW_TURN, ...data };
    this.ask = ask;
    this.question = makeArticle("user", "You");
    this.answer = makeArticle("assistant", "Model");
    byId("log").append(this.question.node, this.answer.node);
    this.content = make("div", { class: "markdown" });
    this.view = new MarkdownView(this.content);
    this.answer.body.append(this.content);
    this.figures = make("span", { class: "figures" });
    this.answer.foot.append(this.figures);
    this.frameRequested = false;
    this.numTokens = 0;
    this.usage = null; // the server's, which comes last
    this.finishReason = null;
    this.edit = make("button", { type: "button", class: "plain again" }, "Edit");
    this.edit.addEventListener("click", () => this.showEditor());
    this.question.foot.append(this.edit);
    this.showQuestion();
  }

  /** The turn as the API takes it; nothing without an answer. */
  get messages() {
    if (!this.data.answer) return [];
    const { user, answer } = this.data;
    return [
      { role: "user", content: user },
      { role: "assistant", content: answer },
    ];
  }

  remove() {
    this.question.node.remove();
    this.answer.node.remove();
  }

  /** What a screen reader says when the answer has ended. It announces an error by itself. */
  get summary() {
    const { failed, note, figures } = this.data;
    return failed ? "" : `${note} ${figures}`.trim();
  }

  /** Generate the answer. Throws what `stream` throws. */
  async run(body, signal) {
    this.data.isJson = body.response_format !== undefined;
    this.startTime = performance.now();
    this.figures.textContent = "waiting for the first token";
    for await (const event of stream("/v1/chat/completions", body, signal)) {
      this.addEvent(event);
      this.requestFrame();
    }
    if (this.finishReason === "length") {
      this.data.note = "The answer was cut: no more tokens were allowed.";
    }
  }

  addEvent(event) {
    this.usage = event.usage ?? this.usage;
    const choice = event.choices[0];
    if (!choice) return;
    this.firstTokenTime ??= performance.now();
    this.lastTokenTime = performance.now();
    this.numTokens += choice.token_ids?.length ?? 1;
    this.data.answer += choice.delta.content ?? "";
    this.data.reasoning += choice.delta.reasoning_content ?? "";
    this.finishReason = choice.finish_reason ?? this.finishReason;
  }

  /** Show the answer in the next frame. */
  requestFrame() {
    if (this.frameRequested) return;
    this.frameRequested = true;
    requestAnimationFrame(() => {
      this.frameRequested = false;
      if (!this.data.complete) follow(() => this.show());
    });
  }

  show() {
    const { answer, reasoning, isJson } = this.data;
    if (reasoning) {
      this.reasoningNode ??= this.insertReasoning();
      this.reasoningNode.textContent = reasoning;
    }
    this.view.show(isJson && answer ? `\`\`\`json\n${answer}` : answer);
    if (this.startTime !== undefined) this.data.figures = this.figureTexts().join(" · ");
    this.figures.textContent = this.data.figures;
  }

  /** Show the answer as it stays, with its note and its buttons. */
  finish() {
    this.data.complete = true;
    follow(() => this.showWhole());
  }

  showWhole() {
    this.show();
    const { note, failed, answer } = this.data;
    if (note) {
      const attributes = failed ? { class: "error", role: "alert" } : { class: "note" };
      this.answer.foot.before(make("p", attributes, note));
    }
    if (answer) this.answer.foot.append(copyButton(() => answer, "Copy this answer"));
    const again = make("button", { type: "button", class: "plain again" }, "Regenerate");
    again.addEventListener("click", () => this.ask(this, this.data.user));
    this.answer.foot.append(again);
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
      return this.data.complete ? [] : ["waiting for the first token"];
    }
    const texts = [`first token ${seconds((this.firstTokenTime - this.startTime) / 1000)}`];
    const numTokens = this.usage?.completion_tokens ?? this.numTokens;
    const decodeSeconds = (this.lastTokenTime - this.firstTokenTime) / 1000;
    if (numTokens > 1 && decodeSeconds >= MIN_DECODE_SECONDS) {
      texts.push(`${rate((numTokens - 1) / decodeSeconds)} tokens/s`);
    }
    texts.push(`${count(numTokens)} ${numTokens === 1 ? "token" : "tokens"}`);
    if (this.usage) {
      const cached = count(this.usage.prompt_tokens_details?.cached_tokens ?? 0);
      texts.push(`${cached} of ${count(this.usage.prompt_tokens)} prompt tokens cached`);
    }
    return texts;
  }

  showQuestion() {
    this.question.node.classList.remove("editing");
    this.question.body.replaceChildren(this.data.user);
  }

  /** Put a form in the message's place. Sending it removes this answer and all later turns. */
  showEditor() {
    const field = make("textarea", { rows: "3", "aria-label": "Edited text" });
    field.value = this.data.user;
    const cancel = () => {
      this.showQuestion();
      this.edit.focus();
    };
    const send = (event) => {
      event.preventDefault();
      const text = field.value.trim();
      if (text) this.ask(this, text);
    };
    const form = make(
      "form",
      { class: "editor", submit: send },
      field,
      make("p", { class: "note" }, "The answers from here on are replaced."),
      make("button", { class: "main" }, "Send again"),
      make("button", { type: "button", click: cancel }, "Cancel"),
    );
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") cancel();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
    });
    this.question.node.classList.add("editing");
    this.question.body.replaceChildren(form);
    form.scrollIntoView({ block: "nearest" });
    field.focus();
  }
}

/** Draw, and keep the end of the log in view if it is there now. */
function follow(draw) {
  const log = byId("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < FOLLOW_PX;
  draw();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function makeArticle(role, name) {
  const body = make("div", { class: "body" });
  const foot = make("footer");
  const heading = make("h2", { class: "unseen" }, name);
  const node = make("article", { class: role, "aria-label": name }, heading, body, foot);
  return { node, body, foot };
}
