// The conversation and the running request.

import { ApiError, hasKey } from "./api.js";
import { forget, isKept, load, save, setKept } from "./conversation_store.js";
import { byId, copyButton } from "./dom.js";
import { Turn } from "./turn.js";

const NUMBER_FIELDS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const KEPT_FIELDS = ["system", "schema", ...NUMBER_FIELDS];

/** The chat view. */
export class Chat {
  constructor() {
    this.turns = []; // the conversation
    this.abort = null; // the AbortController of the running request
    this.empty = byId("empty");
    this.prompt = byId("prompt");
    this.askInstead = (turn, text) => this.ask(text, this.turns.indexOf(turn));
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
    for (const example of document.querySelectorAll(".example")) {
      example.addEventListener("click", () => {
        this.prompt.value = example.textContent;
        this.prompt.focus();
      });
    }
    byId("keep").checked = isKept();
    byId("keep").addEventListener("change", (event) => {
      setKept(event.target.checked);
      this.save();
    });
    addEventListener("pagehide", () => this.save());
    this.restore();
  }

  /** Show the conversation that this browser has kept. */
  restore() {
    const kept = load();
    if (kept === null) return;
    for (const name of KEPT_FIELDS) byId(name).value = kept.settings[name] ?? "";
    for (const data of kept.turns) {
      const turn = new Turn(data, this.askInstead);
      if (!turn.data.complete) {
        turn.data.note ||= "The page was left before the answer was complete.";
      }
      turn.finish();
      this.turns.push(turn);
    }
    if (this.turns.length) this.empty.remove();
    byId("log").scrollTop = byId("log").scrollHeight;
  }

  /** Keep the conversation as it is now, if that is wanted. */
  save() {
    let isSaved = true;
    if (isKept() && this.turns.length) {
      const settings = Object.fromEntries(KEPT_FIELDS.map((name) => [name, byId(name).value]));
      isSaved = save({ turns: this.turns.map((turn) => turn.data), settings });
      if (!isSaved) forget(); // rather none than an old one
    }
    byId("keep-problem").hidden = isSaved;
  }

  clear() {
    this.abort?.abort();
    this.turns = [];
    forget();
    byId("log").replaceChildren(this.empty);
    byId("announcement").textContent = "The conversation is empty.";
    this.prompt.focus();
  }

  async send() {
    const text = this.prompt.value.trim();
    if (text) await this.ask(text, this.turns.length);
  }

  /** Have `text` answered, in the place of the turn `index` and all later ones. */
  async ask(text, index) {
    if (this.abort) return;
    const { body, problem } = this.requestBody(text, this.turns.slice(0, index));
    if (problem) {
      showProblem(problem);
      return;
    }
    this.empty.remove();
    if (index === this.turns.length) this.prompt.value = "";
    for (const replaced of this.turns.splice(index)) replaced.remove();
    const turn = new Turn({ user: text }, this.askInstead);
    this.turns.push(turn);
    this.save();
    this.setRunning(new AbortController());
    turn.answer.node.scrollIntoView({ block: "end" });
    try {
      await turn.run(body, this.abort.signal);
    } catch (error) {
      const isStopped = error.name === "AbortError";
      turn.data.note = isStopped ? "Stopped." : errorText(error);
      turn.data.failed = !isStopped;
    }
    turn.finish();
    // "New conversation" may have removed the turn meanwhile.
    if (this.turns.includes(turn)) this.save();
    this.setRunning(null);
    byId("announcement").textContent = turn.summary;
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
  requestBody(text, earlierTurns) {
    const system = byId("system").value.trim();
    const body = {
      model: byId("model").value,
      messages: [
        ...(system ? [{ role: "system", content: system }] : []),
        ...earlierTurns.flatMap((turn) => turn.messages),
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

  /** Show the API's address and a command that asks `model`, for an empty conversation. */
  showApi(model) {
    const body = { model, messages: [{ role: "user", content: "Hello" }] };
    const quoted = JSON.stringify(body).replaceAll("'", "'\\''");
    const lines = [
      `curl ${location.origin}/v1/chat/completions`,
      ...(hasKey() ? ['-H "Authorization: Bearer $API_KEY"'] : []),
      '-H "Content-Type: application/json"',
      `-d '${quoted}'`,
    ];
    const command = lines.join(" \\\n  ");
    this.empty.querySelector("#api-address").textContent = `${location.origin}/v1`;
    this.empty.querySelector("#api-command").textContent = command;
    const head = this.empty.querySelector(".code-head");
    head.replaceChildren("curl", copyButton(() => command, "Copy this command"));
    this.empty.querySelector("#api").hidden = false;
  }
}

const errorText = (error) => (error instanceof ApiError ? error.message : String(error));

/** Show what is wrong with a setting, until it changes. */
function showProblem({ field, message }) {
  field.setCustomValidity(message);
  byId("settings").open = true;
  field.reportValidity();
  field.addEventListener("input", () => field.setCustomValidity(""), { once: true });
}
