// The dashboard: what the server does now, and the data of its model.

import { getJson, request } from "./api.js";
import { Chart } from "./chart.js";
import { byId, bytes, count, definitions, make, percent, rate, seconds } from "./dom.js";
import { Reading, quantile } from "./metrics.js";

const INTERVAL_MS = 2000;
const WINDOW_MS = 5 * 60_000; // what the charts show and the latencies cover
const MAX_RATE_INTERVAL_MS = 10 * INTERVAL_MS; // an older reading gives no current rate
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

/** The dashboard view. It reads the server's metrics while it is visible. */
export class Dashboard {
  /** onResult: called after each reading, with its error or null. */
  constructor(onResult) {
    this.onResult = onResult;
    this.readings = [];
    this.info = null;
    this.timer = null;
    this.busy = false;
    const charts = byId("charts");
    const span = { windowMs: WINDOW_MS, gapMs: MAX_RATE_INTERVAL_MS };
    this.requests = new Chart(charts, "Requests", ["running", "waiting"], count, 4, span);
    this.tokens = new Chart(charts, "Tokens a second", ["generated", "prompt"], rate, 10, span);
    this.cache = new Chart(charts, "KV cache", ["in use"], percent, 1, span);
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
    this.timer = setInterval(() => this.read(), INTERVAL_MS);
    this.read();
  }

  async read() {
    if (this.busy) return;
    this.busy = true;
    try {
      // The data of one model is constant; several models are loaded and unloaded.
      if (this.info === null || this.info.models) {
        this.info = await getJson("/info");
        drawModel(this.info);
      }
      const text = await (await request("/metrics")).text();
      this.addReading(new Reading(text, performance.now()));
      this.onResult(null);
    } catch (error) {
      this.onResult(error);
    } finally {
      this.busy = false;
    }
  }

  addReading(reading) {
    const last = this.readings.at(-1);
    const earlier = last && reading.time - last.time < MAX_RATE_INTERVAL_MS ? last : null;
    this.readings.push(reading);
    while (reading.time - this.readings[0].time > WINDOW_MS) this.readings.shift();
    const tokenRate = (name) => (earlier ? reading.rate(name, earlier) : NaN);
    const value = (name) => reading.value(name) ?? 0; // no sample while no model is loaded
    const requests = [value("num_requests_running"), value("num_requests_waiting")];
    const tokens = [tokenRate("generation_tokens_total"), tokenRate("prompt_tokens_total")];
    const time = performance.timeOrigin + reading.time;
    this.requests.add(requests, time);
    this.tokens.add(tokens, time);
    this.cache.add([value("kv_cache_usage_perc")], time);
    drawTiles(reading);
    drawLatency(reading, this.readings[0]);
    drawMemory(reading, this.info.memory ?? null);
  }
}

function drawTiles(reading) {
  const finished = (reason) =>
    reading.value("request_success_total", { finished_reason: reason }) ?? 0;
  const queries = reading.value("prefix_cache_queries_total");
  const hits = reading.value("prefix_cache_hits_total");
  const tiles = [
    ["Answered", count(finished("stop") + finished("length"))],
    ["Cancelled", count(finished("cancelled"))],
    ["Failed", count(finished("error"))],
    ["Tokens generated", count(reading.value("generation_tokens_total"))],
    ["Prompt tokens", count(reading.value("prompt_tokens_total"))],
    ["Prefix cache hits", queries ? percent(hits / queries) : "–"],
    ["Preempted", count(reading.value("num_preemptions_total"))],
  ];
  const drafted = reading.value("spec_decode_num_draft_tokens_total");
  if (drafted) {
    const accepted = reading.value("spec_decode_num_accepted_tokens_total");
    tiles.push(["Draft tokens accepted", percent(accepted / drafted)]);
  }
  const nodes = tiles.map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value)),
  );
  byId("tiles").replaceChildren(...nodes);
}

function drawLatency(reading, first) {
  const rows = [];
  for (const [title, name] of LATENCIES) {
    if (reading.value(`${name}_count`) === undefined) continue;
    let buckets = reading.histogram(name, first === reading ? undefined : first);
    // No request in the last five minutes: show all since the start.
    if (!buckets.at(-1)?.[1]) buckets = reading.histogram(name);
    const cells = QUANTILES.map((share) => make("td", {}, seconds(quantile(buckets, share))));
    rows.push(make("tr", {}, make("th", { scope: "row" }, title), ...cells));
  }
  const headings = ["", "median", "90 %", "99 %"];
  const head = make("tr", {}, ...headings.map((text) => make("th", { scope: "col" }, text)));
  const captionText = "Of the last five minutes, or since the start if these had no requests.";
  const table = make(
    "table",
    {},
    make("caption", {}, captionText),
    make("thead", {}, head),
    make("tbody", {}, ...rows),
  );
  byId("latency").replaceChildren(table);
}

function drawMemory(reading, plan) {
  const pairs = [];
  if (plan !== null) {
    const hostWeights = plan.host_weight_bytes ? bytes(plan.host_weight_bytes) : null;
    pairs.push(
      ["Weights", bytes(plan.weight_bytes)],
      ["Weights in host memory", hostWeights],
      ["KV cache", `${bytes(plan.kv_cache_bytes)}, ${count(plan.kv_cache_tokens)} tokens`],
      ["KV cache per token", bytes(plan.kv_bytes_per_token)],
      ["Workspace of a step", `up to ${bytes(plan.workspace_bytes)}`],
    );
  }
  for (const { labels, value } of reading.all("process_resident_memory_bytes")) {
    const model = labels.model === undefined ? "" : ` of ${labels.model}`;
    pairs.push([`Process: ${labels.process}${model}`, bytes(value)]);
  }
  for (const { labels, value } of reading.all("gpu_memory_used_bytes")) {
    const gpu = { gpu: labels.gpu };
    const total = reading.value("gpu_memory_total_bytes", gpu);
    const busy = reading.value("gpu_utilization_perc", gpu);
    const watts = reading.value("gpu_power_watts", gpu);
    let text = `${bytes(value)} of ${bytes(total)}`;
    if (busy !== undefined) text += `, ${percent(busy)} busy`;
    if (watts !== undefined) text += `, ${count(watts)} W`;
    pairs.push([`GPU ${labels.gpu}`, text]);
  }
  byId("memory").replaceChildren(definitions(pairs));
}

function drawModel(info) {
  const server = ["Server", `llmkit ${info.version}`];
  if (info.models) {
    const rows = info.models.map((model) => [model.id, modelStateText(model)]);
    byId("card").replaceChildren(definitions([...rows, server]));
    return;
  }
  const { card, layout } = info;
  const splits = Object.entries(layout).filter(([, size]) => size > 1);
  const ranks = splits.map(([kind, size]) => `${kind.toUpperCase()} ${size}`);
  const layers = card.layers === 1 ? "layer" : "layers";
  let architecture = `${card.architecture}, ${card.layers} ${layers}`;
  if (card.experts) architecture += `, ${card.experts} experts`;
  byId("card").replaceChildren(
    definitions([
      ["Name", [info.model, ...info.adapters].join(", ")],
      ["Architecture", architecture],
      ["Parameters", parameterCount(card.parameters)],
      ["Quantization", card.quantization ?? "none"],
      ["Computes in", `${info.dtype} on ${info.device}`],
      ["KV cache in", info.memory.kv_cache_dtype],
      ["Longest request", `${count(info.max_model_len)} tokens`],
      ["Vocabulary", `${count(card.vocab)} tokens`],
      ["Ranks", ranks.join(", ") || "one"],
      ["Replicas", String(info.replicas)],
      server,
    ]),
  );
  byId("paths").parentElement.hidden = false; // stays hidden for several models
  byId("paths").replaceChildren(make("ul", {}, ...info.paths.map((line) => make("li", {}, line))));
}

function modelStateText(model) {
  if (!model.max_model_len) return model.state;
  return `${model.state}, requests of up to ${count(model.max_model_len)} tokens`;
}

function parameterCount(number) {
  if (number >= 1e9) return `${(number / 1e9).toFixed(2)} billion`;
  return `${(number / 1e6).toFixed(1)} million`;
}
