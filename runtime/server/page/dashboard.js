// What the server does at the moment, and the facts of the model.

import { getJson, request } from "./api.js";
import { Chart } from "./chart.js";
import { byId, bytes, count, definitions, make, percent, rate, seconds } from "./dom.js";
import { Reading, quantile } from "./metrics.js";

const EVERY_MS = 2000;
const KEPT = 150; // readings: five minutes
const LATENCIES = [
  ["First token", "time_to_first_token_seconds"],
  ["Between tokens", "inter_token_latency_seconds"],
  ["Time per token, mean", "request_time_per_output_token_seconds"],
  ["Waiting", "request_queue_time_seconds"],
  ["Prompt", "request_prefill_time_seconds"],
  ["Answer", "request_decode_time_seconds"],
  ["Whole request", "e2e_request_latency_seconds"],
];
const QUANTILES = [0.5, 0.9, 0.99];

/** The dashboard; it reads the server while it is shown. `onError` is told of what went wrong, null when nothing. */
export class Dashboard {
  constructor(onError) {
    this.onError = onError;
    this.readings = [];
    this.info = null;
    this.timer = null;
    this.busy = false;
    const charts = byId("charts");
    this.requests = new Chart(charts, "Requests", ["running", "waiting"], count, 4);
    this.tokens = new Chart(charts, "Tokens a second", ["generated", "prompt"], rate, 10);
    this.cache = new Chart(charts, "KV cache in use", ["used"], percent, 1);
    document.addEventListener("visibilitychange", () => this.schedule());
  }

  show(shown) {
    this.shown = shown;
    this.schedule();
  }

  schedule() {
    clearInterval(this.timer);
    this.timer = null;
    if (!this.shown || document.hidden) return;
    this.timer = setInterval(() => this.read(), EVERY_MS);
    this.read();
  }

  async read() {
    if (this.busy) return;
    this.busy = true;
    try {
      if (this.info === null || this.info.models) { // several models come and go
        this.info = await getJson("/info");
        drawFacts(this.info);
      }
      const text = await (await request("/metrics")).text();
      this.take(new Reading(text, performance.now()));
      this.onError(null);
    } catch (error) {
      this.onError(error);
    } finally {
      this.busy = false;
    }
  }

  take(now) {
    const before = this.readings.at(-1);
    const steady = before && now.time - before.time < 10 * EVERY_MS ? before : null;
    this.readings.push(now);
    if (this.readings.length > KEPT) this.readings.shift();
    const generated = steady ? now.rate("generation_tokens_total", steady) : 0;
    const prompt = steady ? now.rate("prompt_tokens_total", steady) : 0;
    const found = (name) => now.value(name) ?? 0; // there are none while no model is loaded
    this.requests.add([found("num_requests_running"), found("num_requests_waiting")], KEPT);
    this.tokens.add([generated, prompt], KEPT);
    this.cache.add([found("kv_cache_usage_perc")], KEPT);
    drawTiles(now);
    drawLatency(now, this.readings[0]);
    drawMemory(now, this.info.memory ?? null);
  }
}

function drawTiles(now) {
  const looked = now.value("prefix_cache_queries_total");
  const drafted = now.value("spec_decode_num_draft_tokens_total");
  const done = (reason) => now.value("request_success_total", { finished_reason: reason }) ?? 0;
  const tiles = [
    ["Answered", count(done("stop") + done("length"))],
    ["Cancelled", count(done("cancelled"))],
    ["Failed", count(done("error"))],
    ["Tokens generated", count(now.value("generation_tokens_total"))],
    ["Prompt tokens", count(now.value("prompt_tokens_total"))],
    ["Prefix cache hits", looked ? percent(now.value("prefix_cache_hits_total") / looked) : "–"],
    ["Preempted", count(now.value("num_preemptions_total"))],
  ];
  if (drafted) tiles.push(["Guesses confirmed", percent(now.value("spec_decode_num_accepted_tokens_total") / drafted)]);
  byId("tiles").replaceChildren(
    ...tiles.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))),
  );
}

function drawLatency(now, first) {
  const rows = [];
  for (const [title, name] of LATENCIES) {
    if (now.value(`${name}_count`) === undefined) continue;
    let buckets = now.histogram(name, first === now ? undefined : first);
    if (!buckets.at(-1)?.[1]) buckets = now.histogram(name); // nothing lately: since the start
    const texts = QUANTILES.map((share) => seconds(quantile(buckets, share)));
    rows.push(make("tr", {}, make("th", { scope: "row" }, title), ...texts.map((text) => make("td", {}, text))));
  }
  const heads = ["", "median", "90 %", "99 %"].map((text) => make("th", { scope: "col" }, text));
  const caption = make("caption", {}, "Of the last five minutes, where there were requests, else since the start.");
  const table = make("table", {}, caption, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows));
  byId("latency").replaceChildren(table);
}

function drawMemory(now, plan) {
  const processes = now.all("process_resident_memory_bytes");
  const gpus = now.all("gpu_memory_used_bytes").map(({ labels, value }) => {
    const of = now.value("gpu_memory_total_bytes", { gpu: labels.gpu });
    const use = now.value("gpu_utilization_perc", { gpu: labels.gpu });
    const watts = now.value("gpu_power_watts", { gpu: labels.gpu });
    const more = [use === undefined ? "" : `, ${percent(use)} busy`, watts === undefined ? "" : `, ${count(watts)} W`];
    return [`GPU ${labels.gpu}`, `${bytes(value)} of ${bytes(of)}${more.join("")}`];
  });
  const planned = plan === null ? [] : [
    ["Weights", bytes(plan.weight_bytes)],
    ["Weights in host memory", plan.host_weight_bytes ? bytes(plan.host_weight_bytes) : null],
    ["KV cache", `${bytes(plan.kv_cache_bytes)}, ${count(plan.kv_cache_tokens)} tokens`],
    ["A token in it", bytes(plan.kv_bytes_per_token)],
    ["Workspace of a step", `up to ${bytes(plan.workspace_bytes)}`],
  ];
  const names = processes.map(({ labels, value }) => {
    const of = labels.model === undefined ? "" : ` of ${labels.model}`;
    return [`Process: ${labels.process}${of}`, bytes(value)];
  });
  const facts = definitions([...planned, ...names, ...gpus]);
  byId("memory").replaceChildren(facts);
}

function drawFacts(info) {
  if (info.models) {
    const length = (model) => (model.max_model_len ? `, requests of up to ${count(model.max_model_len)} tokens` : "");
    const rows = info.models.map((model) => [model.id, `${model.state}${length(model)}`]);
    byId("card").replaceChildren(definitions([...rows, ["Server", `llmkit ${info.version}`]]));
    return;
  }
  const { card, layout } = info;
  const ranks = Object.entries(layout).filter(([, size]) => size > 1).map(([kind, size]) => `${kind.toUpperCase()} ${size}`);
  byId("card").replaceChildren(
    definitions([
      ["Name", [info.model, ...info.adapters].join(", ")],
      ["Architecture", `${card.architecture}, ${card.layers} ${card.layers === 1 ? "layer" : "layers"}${card.experts ? `, ${card.experts} experts` : ""}`],
      ["Parameters", millions(card.parameters)],
      ["Quantization", card.quantization ?? "none"],
      ["Computes in", `${info.dtype} on ${info.device}`],
      ["KV cache in", info.memory.kv_cache_dtype],
      ["Longest request", `${count(info.max_model_len)} tokens`],
      ["Vocabulary", `${count(card.vocab)} tokens`],
      ["Ranks", ranks.join(", ") || "one"],
      ["Replicas", String(info.replicas)],
      ["Server", `llmkit ${info.version}`],
    ]),
  );
  byId("paths").parentElement.hidden = false; // there are none for several models
  byId("paths").replaceChildren(make("ul", {}, ...info.paths.map((line) => make("li", {}, line))));
}

function millions(number) {
  return number >= 1e9 ? `${(number / 1e9).toFixed(2)} billion` : `${(number / 1e6).toFixed(1)} million`;
}
