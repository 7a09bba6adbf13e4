"""Writes docs/gpu.md from the figures of `make gpu`: each beside its floor and its baseline.

`make gpu-page RESULTS=DIR` runs it. Without figures the page says "not measured" everywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import torch

from llmkit.bench.gpu.baselines import ENGINES_FOR, MODELS, PROMPT_TOKENS
from llmkit.bench.gpu.baselines import OUTPUT_TOKENS as BASELINE_OUTPUT_TOKENS
from llmkit.bench.gpu.ceilings import PRODUCTS
from llmkit.bench.gpu.decode_steps import (
    CONTEXT,
    PREFILL_TOKENS,
    SAMPLERS,
    STEP_MODELS,
    StepModel,
)
from llmkit.bench.gpu.figure_log import FILE_NAME, Record, latest
from llmkit.bench.gpu.floors import H200, Ceilings, step_cost
from llmkit.bench.gpu.graph_profile import HOST_BATCHES, HOST_MODEL, REPLAYED
from llmkit.bench.gpu.graph_steps import GRAPH_MODELS, GRAPH_STEPS, QUERY_LEN
from llmkit.bench.gpu.kernel_times import LLMKIT, KernelCase, Setting, kernel_cases
from llmkit.bench.gpu.model_shapes import MODEL_CONFIGS
from llmkit.bench.gpu.quantized_baselines import COUNTS, WEIGHTS
from llmkit.bench.gpu.quantized_baselines import ENGINES as QUANTIZED_ENGINES
from llmkit.bench.gpu.quantized_baselines import MODEL as QUANTIZED_MODEL
from llmkit.bench.gpu.run_parts import PARTS
from llmkit.bench.gpu.saturation import OUTPUT_TOKENS, REQUESTS, SATURATED
from llmkit.bench.gpu.saturation import PROMPT_TOKENS as SATURATED_PROMPT_TOKENS
from llmkit.bench.gpu.serving_times import SERVED, Arrival, loads
from llmkit.bench.gpu.tune_kernels import TUNED_FILE
from llmkit.kernels import tuned_configs
from llmkit.model.families import model_spec

NOT_MEASURED = "not measured"
GENERATED = "<!-- Written by `make gpu-page` from the figures of `make gpu`. -->"
# Output tokens per second that others have published, on an H200; their setups differ.
PUBLISHED = {
    "Llama-3.1-8B fp8, fp8 KV": "26,221 (TensorRT-LLM 1.0, FP8, 128 tokens in, 2,048 out)",
}
# What the parts measure, for the table on the page.
CONTENTS = {
    "ceilings": "copy and read bandwidth, matrix products, the cost of a launch; smoke tests",
    "steps": "decode steps and prefills, greedy and with top-k and top-p",
    "profile": "the host's time of an engine step; the kernels of a graph replay",
    "kernels": "single kernels beside other implementations",
    "saturate": "256 requests at once",
    "graphs": "steps that verify drafts, have prompts beside decodes, or adapters",
    "serving": "TTFT and ITL: one request, arrivals during decode, one long context among short",
    "tests": "the GPU tests, with a process for each core",
    "tune": "configurations of Triton kernels, from shapes alone",
    "rivals": "transformers with a static cache and torch.compile, its continuous batching, vLLM",
    "quantized": "decoding with FP8 and INT4 weights beside vLLM, whose INT4 kernels are Marlin",
    "quantize": "GPTQ of a model of 8B shape",
}
# Which parts run in which call, where a GPU is lent for LOAN_S in calls of at most CALL_S: figures
# of llmkit first, then what only other engines need. Starting a machine takes the rest.
LOAN_S = 1800
CALL_S = 600
LOANS = (
    (
        ("ceilings", "steps", "profile", "kernels", "saturate"),
        ("graphs", "tests"),
        ("serving", "tune"),
    ),
    (("quantized",), ("rivals",), ("quantize",)),
)


class Figures:
    """The figures of a results folder; without one, none."""

    def __init__(self, results: Path | None) -> None:
        self.parts: dict[str, dict[tuple[str, str], Record]] = {
            part: {} if results is None else latest(results / FILE_NAME, part) for part in PARTS
        }

    def get(self, part: str, figure: str, name: str) -> Record | None:
        """A measured figure; None: it was not measured."""
        record = self.parts[part].get((figure, name))
        return record if record is not None and record["status"] == "measured" else None

    def number(self, part: str, figure: str, name: str, value: str) -> float | None:
        """One value of a figure."""
        record = self.get(part, figure, name)
        return None if record is None or record.get(value) is None else float(record[value])

    def reason(self, part: str, figure: str, name: str) -> str:
        """Why a figure has no value."""
        record = self.parts[part].get((figure, name))
        if record is None or record["status"] in ("begun", "not measured", "measured"):
            return NOT_MEASURED
        return "not installed" if record["status"] == "skipped" else "failed"

    @cached_property
    def ceilings(self) -> Ceilings | None:
        """The measured ceilings of the machine."""
        bandwidth = self.number("ceilings", "bandwidth", "copy", "bytes_per_s")
        if bandwidth is None:
            return None
        rates = {name: self.number("ceilings", "product", name, "flops_per_s") for name in PRODUCTS}
        rates["fp8"] = max(rates["fp8"] or 0, rates["fp8, scales by rows"] or 0) or None
        machine = self.get("ceilings", "machine", "machine") or {"device": "this machine"}
        known = {name: rate for name, rate in rates.items() if rate is not None}
        return Ceilings(str(machine["device"]), bandwidth, known)

    def floors_ms(self, num_bytes: float, flops: dict[str, float]) -> tuple[float | None, float]:
        """The floor with the measured ceilings, if they are known, and that of an H200."""
        here = None if self.ceilings is None else self.ceilings.seconds(num_bytes, flops) * 1e3
        return here, H200.seconds(num_bytes, flops) * 1e3


def make_page(figures: Figures) -> str:
    """The whole page, in Markdown."""
    sections = [
        GENERATED,
        "# On a GPU",
        _introduction(figures),
        "## A machine for half an hour",
        _plan(),
        "## Ceilings",
        _ceilings(figures),
        "## Steps",
        f"Decode steps have {CONTEXT:,} tokens of context each; a replay of the engine's graph goes"
        " from token ids to sampled ids. Prefill is one request to an idle engine, from its prompt"
        f" of {PREFILL_TOKENS:,} tokens to its first token on the host. top-k is 50, top-p 0.95.",
        _steps(figures),
        "## Steps with drafts, prompts and adapters",
        f"A step that verifies drafts has {QUERY_LEN} tokens of each sequence. All are graphs, with"
        f" {CONTEXT:,} tokens of context; without a graph, the same kernels are launched one by one"
        " and the time is the host's or the device's, whichever is longer. top-k is 50, top-p 0.95."
        " What adapters read and compute is not in the floor.",
        _graph_steps(figures),
        "## Host",
        "Milliseconds of an engine step, and the host's own part of it: all but the wait for the"
        " device. A floor is the decode step's: above it the host is what a step waits for.",
        _host(figures),
        "## Kernels of a replay",
        _replays(figures),
        "## Kernels",
        "Each launch finds its weights outside the L2 cache. The share is of the floor here, or of"
        " the H200's where the ceilings were not measured.",
        _kernels(figures),
        "## Throughput",
        _saturated(figures),
        "## Graphs at the start",
        _starts(figures),
        "## Latencies",
        "Milliseconds, in an engine without its HTTP server. The floors are those of a lone prefill"
        " of a mean prompt, and of a decode step of one request; the long context is read once more"
        " in each step.",
        _latencies(figures),
        "## Baselines",
        f"Output tokens per second in bf16, greedy: {PROMPT_TOKENS} tokens in,"
        f" {BASELINE_OUTPUT_TOKENS} out, all requests at once.",
        _baselines(figures),
        "## Quantized baselines",
        f"Output tokens per second of {QUANTIZED_MODEL}, greedy: {PROMPT_TOKENS} tokens in,"
        f" {BASELINE_OUTPUT_TOKENS} out, all requests at once. Weights and inputs of fp8 have a"
        " scale for each output and each token; int4 has groups of 128, in vLLM as GPTQ with Marlin"
        " kernels.",
        _quantized_baselines(figures),
        "## Tuned configurations",
        _tuned(figures),
        "## Tests and quantizing",
        _tests(figures),
        "## What is missing",
        _missing(figures),
    ]
    return "\n\n".join(sections) + "\n"


def _introduction(figures: Figures) -> str:
    measured = figures.get("ceilings", "machine", "machine")
    machine = "**Nothing on this page has been measured yet.**"
    if measured is not None:
        versions = f"torch {measured['torch']}, Triton {measured['triton']}"
        machine = f"Measured on {measured['device']}, {versions}, llmkit {measured['llmkit']}."
    rows = [
        (name, f"{part.budget_s:.0f} s", CONTENTS[name], _part_status(figures, name))
        for name, part in PARTS.items()
    ]
    lines = [
        "    make gpu RESULTS=DIR                # measures, part by part",
        '    make gpu RESULTS=DIR PART="steps"   # only these parts',
        "    make gpu-page RESULTS=DIR           # writes this page and kernels/tuned.json",
        "",
        machine,
        "",
        "Every figure is written to `DIR/figures.jsonl` as soon as it is measured. A part has a"
        " limited time; it stops with what it has, and says what is missing. A part that fails or"
        " hangs does not stop the next one. Run the command again with the same DIR: parts that"
        " ended well are left out, the others measure what is missing. DIR has all that the next"
        " run needs, so it may be copied to another machine of the same kind."
        " The models have random"
        " weights; nothing is downloaded, and llmkit need not be installed. `--tiny` of `python -m"
        " llmkit.bench.gpu.run_parts` tries the programs on a CPU (`--device cpu`).",
        "",
        _table(("part", "time", "what it measures", "here"), rows),
        "",
        "A floor is the larger of two times: bytes over bandwidth, and operations over the rate of"
        " a large matrix product. It is given with the ceilings measured here, and for an H200 with"
        " 4.3 TB/s and 790 TFLOP/s in bf16 (twice that in 8 bits).",
    ]
    return "\n".join(lines)


def _plan() -> str:
    lines = [
        f"Where a GPU is lent for {LOAN_S:,} s, in calls of at most {CALL_S} s, these calls leave"
        " time for the start of the machine. Times are those that parts may take. A call that is"
        " cut off loses only the figure that was being measured.",
        "",
    ]
    rows = []
    for number, loan in enumerate(LOANS, start=1):
        for call, parts in enumerate(loan, start=1):
            seconds = sum(PARTS[part].budget_s for part in parts)
            command = f'`make gpu RESULTS=DIR PART="{" ".join(parts)}"`'
            rows.append((f"loan {number}, call {call}", command, f"{seconds:.0f} s"))
    return "\n".join([*lines, _table(("", "command", "time"), rows)])


def _part_status(figures: Figures, part: str) -> str:
    ended = figures.parts[part].get(("part", part))
    return NOT_MEASURED if ended is None else str(ended["how"])


def _ceilings(figures: Figures) -> str:
    rows: list[Sequence[str]] = []
    for name in ("copy", "read"):
        rate = figures.number("ceilings", "bandwidth", name, "bytes_per_s")
        expected = f"{H200.bytes_per_s / 1e12:.1f} TB/s"
        rows.append((f"memory, {name}", _scaled(rate, 1e12, " TB/s"), expected))
    for name in PRODUCTS:
        rate = figures.number("ceilings", "product", name, "flops_per_s")
        expected_rate = H200.flops_per_s[name.partition(",")[0]]
        expected = f"{expected_rate / 1e12:,.0f} TFLOP/s"
        rows.append((f"matrix product, {name}", _scaled(rate, 1e12, " TFLOP/s", 0), expected))
    launch = figures.number("ceilings", "launch", "kernel in a graph", "us")
    rows.append(("an empty kernel in a graph", _scaled(launch, 1, " us"), ""))
    smoke = figures.get("ceilings", "smoke", "pytest")
    reason = figures.reason("ceilings", "smoke", "pytest")
    rows.append(("smoke tests", f"{smoke.get('passed', 0)} passed" if smoke else reason, ""))
    return _table(("", "here", "H200"), rows)


def _steps(figures: Figures) -> str:
    rows = []
    for step_model in STEP_MODELS:
        steps = [*step_model.batches, *([None] if step_model.has_prefill else [])]
        rows += [_step_row(figures, step_model, batch) for batch in steps]
    header = ("step", "greedy, ms", "top-k top-p, ms", "floor here, ms", "share", "floor H200, ms")
    return _table((*header, "tokens/s", "best baseline, tokens/s"), rows)


def _step_row(figures: Figures, step_model: StepModel, batch: int | None) -> Sequence[str]:
    """batch: of a decode step; None: the prefill."""
    spec = model_spec(MODEL_CONFIGS[step_model.model])
    kv_bytes = 1 if step_model.kv_cache_dtype else 2
    if batch is None:
        label = f"{step_model.label}, prefill"
        cost = step_cost(spec, step_model.weights, 1, PREFILL_TOKENS, PREFILL_TOKENS, kv_bytes)
        names = {s: ("prefill", f"{step_model.label}, {s}") for s in SAMPLERS}
        tokens = PREFILL_TOKENS
    else:
        label = f"{step_model.label}, batch {batch}"
        cost = step_cost(spec, step_model.weights, batch, 1, CONTEXT, kv_bytes)
        names = {s: ("decode", f"{step_model.label}, batch {batch}, {s}") for s in SAMPLERS}
        tokens = batch
    times = {s: figures.number("steps", *names[s], "step_ms") for s in SAMPLERS}
    here, h200 = figures.floors_ms(cost.bytes, cost.flops)
    cells = [
        _number(times[s]) if times[s] is not None else figures.reason("steps", *names[s])
        for s in SAMPLERS
    ]
    greedy = times["greedy"]
    rate = NOT_MEASURED if greedy is None else f"{tokens / greedy * 1e3:,.0f}"
    is_bf16 = step_model.weights == "bf16" and batch is not None
    baseline = _best_baseline(figures, step_model.model, batch) if is_bf16 else ""
    return (label, *cells, _number(here), _share(here, greedy), _number(h200), rate, baseline)


def _graph_steps(figures: Figures) -> str:
    rows = []
    for step_model in GRAPH_MODELS:
        spec = model_spec(MODEL_CONFIGS[step_model.model])
        for step in GRAPH_STEPS:
            name = f"{step_model.label}, {step.label}"
            cost = step.cost(spec, step_model.weights, CONTEXT)
            here, h200 = figures.floors_ms(cost.bytes, cost.flops)
            graph_ms = figures.number("graphs", "graph", name, "step_ms")
            eager_ms = figures.number("graphs", "graph", name, "eager_ms")
            reason = figures.reason("graphs", "graph", name)
            cells = [reason if ms is None else _number(ms) for ms in (graph_ms, eager_ms)]
            rows.append((name, *cells, _number(here), _share(here, graph_ms), _number(h200)))
    header = ("step", "graph, ms", "without, ms", "floor here, ms", "share", "floor H200, ms")
    return _table(header, rows)


def _best_baseline(figures: Figures, model: str, requests: int | None) -> str:
    best = None
    for engine in ENGINES_FOR.get(requests or 0, ()):
        name = f"{model}, {requests} requests; {engine}"
        rate = figures.number("rivals", "throughput", name, "output_tps")
        if engine != LLMKIT and rate is not None and (best is None or rate > best[0]):
            best = (rate, engine)
    return NOT_MEASURED if best is None else f"{best[0]:,.0f} ({best[1]})"


def _host(figures: Figures) -> str:
    rows = []
    spec = model_spec(MODEL_CONFIGS[HOST_MODEL.model])
    for batch in HOST_BATCHES:
        cost = step_cost(spec, HOST_MODEL.weights, batch, 1, 64)
        here, h200 = figures.floors_ms(cost.bytes, cost.flops)
        for sampler in SAMPLERS:
            name = f"{HOST_MODEL.label}, batch {batch}, {sampler}"
            record = figures.get("profile", "host", name) or {}
            columns = ("step_ms", "host_ms", "schedule_ms", "launch_ms", "update_ms", "wait_ms")
            cells = [_number(record.get(column)) for column in columns]
            rows.append((name, *cells, _number(here), _number(h200)))
    header = ("engine", "step", "host", "schedule", "launch", "update", "wait")
    return _table((*header, "floor here", "floor H200"), rows)


def _replays(figures: Figures) -> str:
    parts = []
    for step_model, batch in REPLAYED:
        name = f"{step_model.label}, batch {batch}, top-k top-p"
        record = figures.get("profile", "kernels", name)
        if record is None:
            parts.append(f"{name}: {figures.reason('profile', 'kernels', name)}.")
            continue
        rows = [
            (f"`{one['kernel']}`", str(one["count"]), f"{one['us']:,.1f}")
            for one in record["table"]
        ]
        title = (
            f"{name}: {record['launches']} kernels take {_number(record['busy_ms'])} ms of the"
            f" replay's {_number(record['step_ms'])} ms."
        )
        parts.append(title + "\n\n" + _table(("kernel", "launches", "us"), rows))
    return "\n\n".join(parts)


def _kernels(figures: Figures) -> str:
    by_figure: dict[str, dict[str, list[KernelCase]]] = {}
    for case in kernel_cases(Setting(torch.device("cpu"))):
        by_figure.setdefault(case.figure, {}).setdefault(case.case, []).append(case)
    sections = []
    for figure, cases in by_figure.items():
        rows = [_kernel_row(figures, figure, name, cases[name]) for name in cases]
        header = (figure, "llmkit, us", "floor here, us", "floor H200, us", "share", "others, us")
        sections.append(_table(header, rows))
    return "\n\n".join(sections)


def _kernel_row(
    figures: Figures, figure: str, name: str, cases: Sequence[KernelCase]
) -> Sequence[str]:
    own = cases[0]
    here, h200 = figures.floors_ms(own.bytes, own.flops)
    ms = figures.number("kernels", figure, own.name, "ms")
    others = []
    for case in cases[1:]:
        other_ms = figures.number("kernels", figure, case.name, "ms")
        reason = figures.reason("kernels", figure, case.name)
        others.append(f"{case.implementation}: {_us(other_ms) if other_ms else reason}")
    own_us = _us(ms) if ms is not None else figures.reason("kernels", figure, own.name)
    share = _share(h200 if here is None else here, ms)
    return (name, own_us, _us(here), _us(h200), share, "; ".join(others))


def _saturated(figures: Figures) -> str:
    rows = []
    for step_model, sampler in SATURATED:
        name = f"{step_model.label}, {REQUESTS} requests, {sampler}"
        spec = model_spec(MODEL_CONFIGS[step_model.model])
        mean_context = SATURATED_PROMPT_TOKENS + OUTPUT_TOKENS // 2
        kv_bytes = 1 if step_model.kv_cache_dtype else 2
        cost = step_cost(spec, step_model.weights, REQUESTS, 1, mean_context, kv_bytes)
        here, h200 = figures.floors_ms(cost.bytes, cost.flops)
        rate = figures.number("saturate", "saturated", name, "output_tps")
        measured = f"{rate:,.0f}" if rate else figures.reason("saturate", "saturated", name)
        bounds = [_number(None if ms is None else REQUESTS / ms * 1e3, 0) for ms in (here, h200)]
        rows.append((name, measured, *bounds, PUBLISHED.get(step_model.label, "")))
    title = (
        f"{SATURATED_PROMPT_TOKENS} tokens in, {OUTPUT_TOKENS:,} out. The bound is that of decode"
        " steps at the mean context."
    )
    header = ("engine", "output tokens/s", "bound here", "bound H200", "published for an H200")
    return title + "\n\n" + _table(header, rows)


def _starts(figures: Figures) -> str:
    rows = []
    for step_model in SERVED:
        record = figures.get("serving", "start", step_model.label) or {}
        cells = [_number(record.get(name), 0) for name in ("max_num_seqs", "graphs")]
        rows.append((step_model.label, *cells, _number(record.get("capture_s"))))
    header = ("engine", "sequences at most", "graphs", "seconds to capture them")
    return _table(header, rows)


def _latencies(figures: Figures) -> str:
    rows = []
    for step_model in SERVED:
        for load, arrivals in loads(is_tiny=False).items():
            name = f"{step_model.label}, {load}"
            record = figures.get("serving", "latency", name) or {}
            columns = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")
            cells = [_number(record.get(column)) for column in columns]
            floors = [_pair(pair) for pair in _latency_floors(figures, step_model, arrivals)]
            rows.append((name, *cells, *floors, _number(record.get("output_tps"), 0)))
    header = ("load", "TTFT p50", "p99", "ITL p50", "p99", "TTFT floor, here / H200")
    return _table((*header, "ITL floor, here / H200", "tokens/s"), rows)


def _latency_floors(
    figures: Figures, step_model: StepModel, arrivals: Sequence[Arrival]
) -> tuple[tuple[float | None, float], tuple[float | None, float]]:
    spec = model_spec(MODEL_CONFIGS[step_model.model])
    prompt = sum(one.prompt_tokens for one in arrivals) // len(arrivals)
    prefill = step_cost(spec, step_model.weights, 1, prompt, prompt)
    decode = step_cost(spec, step_model.weights, 1, 1, max(one.prompt_tokens for one in arrivals))
    return (
        figures.floors_ms(prefill.bytes, prefill.flops),
        figures.floors_ms(decode.bytes, decode.flops),
    )


def _baselines(figures: Figures) -> str:
    rows = []
    for model in MODELS:
        spec = model_spec(MODEL_CONFIGS[model])
        for requests, engines in ENGINES_FOR.items():
            cells = []
            for engine in ("llmkit", "transformers_static", "transformers", "vllm"):
                name = f"{model}, {requests} requests; {engine}"
                rate = figures.number("rivals", "throughput", name, "output_tps")
                reason = figures.reason("rivals", "throughput", name) if engine in engines else ""
                cells.append(f"{rate:,.0f}" if rate else reason)
            mean_context = PROMPT_TOKENS + BASELINE_OUTPUT_TOKENS // 2
            cost = step_cost(spec, "bf16", requests, 1, mean_context)
            floors = figures.floors_ms(cost.bytes, cost.flops)
            bounds = [_number(None if ms is None else requests / ms * 1e3, 0) for ms in floors]
            rows.append((f"{model}, {requests} requests", *cells, *bounds))
    header = ("", "llmkit", "transformers, static cache", "transformers, continuous", "vLLM")
    return _table((*header, "bound here", "bound H200"), rows)


def _quantized_baselines(figures: Figures) -> str:
    rows = []
    spec = model_spec(MODEL_CONFIGS[QUANTIZED_MODEL])
    for weights in WEIGHTS:
        for count in COUNTS:
            cells = []
            for engine in QUANTIZED_ENGINES:
                name = f"{QUANTIZED_MODEL} {weights}; {engine}"
                rate = figures.number("quantized", "throughput", name, f"output_tps_{count}")
                reason = figures.reason("quantized", "throughput", name)
                cells.append(f"{rate:,.0f}" if rate else reason)
            mean_context = PROMPT_TOKENS + BASELINE_OUTPUT_TOKENS // 2
            cost = step_cost(spec, weights, count, 1, mean_context)
            floors = figures.floors_ms(cost.bytes, cost.flops)
            bounds = [_number(None if ms is None else count / ms * 1e3, 0) for ms in floors]
            rows.append((f"{QUANTIZED_MODEL} {weights}, {count} requests", *cells, *bounds))
    return _table(("", "llmkit", "vLLM", "bound here", "bound H200"), rows)


def _tuned(figures: Figures) -> str:
    rows = []
    for (figure, _), record in figures.parts["tune"].items():
        for entry in record.get("entries", ()) if figure == "tuned" else ():
            kernel = str(entry["name"]).partition("; ")[2].partition("; ")[2]
            config = " ".join(map(str, entry["config"]))
            rows.append((kernel, config, _number(entry["ms"]), _number(entry["safe_ms"])))
    if not rows:
        return f"The fastest configurations of `kernels/tuned.json`: {NOT_MEASURED}."
    return _table(("kernel and shape", "configuration", "ms", "default, ms"), rows)


def _tests(figures: Figures) -> str:
    record = figures.get("tests", "tests", "pytest")
    tests = figures.reason("tests", "tests", "pytest")
    if record is not None:
        tests = f"{record.get('passed', 0)} passed, {record.get('skipped', 0)} skipped"
    rows = [("GPU tests", tests, "")]
    for (figure, name), one in figures.parts["quantize"].items():
        if figure == "gptq" and one["status"] == "measured":
            rows.append((f"GPTQ, {name}", f"{one['seconds']:.0f} s", f"{one['bound_s']:.0f} s"))
    if len(rows) == 1:
        rows.append(("GPTQ of an 8B model", NOT_MEASURED, "300 s"))
    return _table(("", "here", "bound"), rows)


def _missing(figures: Figures) -> str:
    lines = []
    for part, records in figures.parts.items():
        if not records:
            lines.append(f"- `{part}`: {NOT_MEASURED}.")
        for (figure, name), record in records.items():
            if figure != "part" and record["status"] in ("failed", "begun", "not measured"):
                reason = str(record.get("reason", "the process ended")).replace("\n", " ")
                lines.append(f"- `{part}`, {figure}, {name}: {record['status']} ({reason})")
    return "\n".join(lines) or "Nothing."


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(one) for one in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _number(value: float | None, digits: int | None = None) -> str:
    if value is None:
        return NOT_MEASURED
    if digits is not None:
        return f"{value:,.{digits}f}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _us(ms: float | None) -> str:
    return _number(None if ms is None else ms * 1e3)


def _pair(values: tuple[float | None, float]) -> str:
    return f"{'?' if values[0] is None else _number(values[0])} / {_number(values[1])}"


def _scaled(value: float | None, unit: float, suffix: str, digits: int = 2) -> str:
    return NOT_MEASURED if value is None else f"{value / unit:,.{digits}f}{suffix}"


def _share(floor_ms: float | None, ms: float | None) -> str:
    return NOT_MEASURED if floor_ms is None or ms is None else f"{floor_ms / ms:.0%}"


def merge_tuned(results: Path, path: Path) -> int:
    """Add the tuned configurations of a results folder to a table. Returns their number."""
    found = tuned_configs.read_configs(results / TUNED_FILE)
    if found:
        tuned = dict(sorted((tuned_configs.read_configs(path) | found).items()))
        content = json.dumps({"format": tuned_configs.FORMAT, "tuned": tuned}, indent=1)
        path.write_text(content + "\n", encoding="utf-8")
    return len(found)


def main(words: Sequence[str] | None = None) -> int:
    """Write the page, and add the tuned configurations to the package's table."""
    parser = argparse.ArgumentParser(
        prog="python -m llmkit.bench.gpu.gpu_page", description=main.__doc__
    )
    parser.add_argument("--results", type=Path, metavar="DIR", help="default: no figures")
    parser.add_argument("--page", type=Path, default=Path("docs/gpu.md"))
    parser.add_argument("--tuned", type=Path, metavar="FILE", help="default: none is changed")
    arguments = parser.parse_args(words)
    arguments.page.write_text(make_page(Figures(arguments.results)), encoding="utf-8")
    if arguments.results is not None and arguments.tuned is not None:
        number = merge_tuned(arguments.results, arguments.tuned)
        sys.stderr.write(f"{number} tuned configurations\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
