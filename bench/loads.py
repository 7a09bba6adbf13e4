"""The loads of `--mode`: the scenarios they come to, when requests are sent, and when a sweep has seen enough."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

from llmkit.bench.metrics import STARTUP
from llmkit.bench.workload import Lengths, Scenario
from llmkit.checkpoint.errors import InputError, UsageError

MODES = ("serve", "latency", "throughput", "sweep", STARTUP)
SWEEP = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # clients
GROWTH, SLOWER = 1.05, 1.10  # a sweep ends when throughput grows by less and the median e2e by more
_TIMES = ("timestamp", "TIMESTAMP", "at_s")  # milliseconds, a date, seconds
_PROMPTS = ("input_length", "ContextTokens", "prompt_tokens")
_OUTPUTS = ("output_length", "GeneratedTokens", "output_tokens")


@dataclass(frozen=True)
class Load:
    """What `--mode` and its options ask for. Lengths are tokens, least and most."""

    mode: str = "serve"
    concurrency: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()  # requests a second
    burstiness: float = 1.0  # the shape of the gamma distribution of gaps: 1 is Poisson, less is burstier
    requests: int | None = None  # of each load; None: as many as make sense
    input_tokens: tuple[int, int] = (64, 512)  # a turn's own
    output_tokens: tuple[int, int] = (32, 256)
    prefix_tokens: int = 0  # that all prompts of a load begin with, in addition
    turns: int = 1
    trace: str | None = None


def load_scenarios(load: Load) -> tuple[Scenario, ...]:
    """The scenarios of a load, in rising order. Raises UsageError for what does not go together."""
    if load.mode not in MODES:
        raise UsageError(f"no such mode: {load.mode}", f"Modes are {', '.join(MODES)}")
    if load.mode == STARTUP:
        if load.concurrency or load.rates or load.trace or load.requests or load.turns > 1:
            raise UsageError("a start is measured with one request", "--mode startup goes with --repeats alone")
        return ()
    if load.trace is not None:
        if load.concurrency or load.rates or load.mode != "serve" or load.turns > 1:
            raise UsageError("a trace says itself what is sent when", "--trace goes with --mode serve alone")
        return (_trace(load, load.trace),)
    if load.rates and (load.mode in ("latency", "throughput") or load.concurrency):
        raise UsageError(f"--rate does not go with --mode {load.mode} or --concurrency")
    if load.mode == "throughput" and load.concurrency:
        raise UsageError("--mode throughput sends all at once", "--requests was expected, and no --concurrency")
    if load.mode == "latency" and load.requests:
        raise UsageError("--mode latency sends one request a client", "--concurrency was expected, and no --requests")
    if not all(0 < number < math.inf for number in (*load.rates, *load.concurrency, load.burstiness, load.turns)):
        raise UsageError("rates, concurrencies, burstiness and turns are more than 0")
    if load.mode == "throughput":
        count = load.requests or 64
        return (_closed(load, "throughput", count, count),)
    if load.rates:
        return tuple(_open(load, rate) for rate in sorted(set(load.rates)))
    levels = sorted(set(load.concurrency)) or {"sweep": SWEEP, "latency": (1, 4, 16), "serve": (8,)}[load.mode]
    if load.mode == "latency":
        return tuple(_closed(load, f"batch{clients}", clients, clients) for clients in levels)
    return tuple(_closed(load, f"c{clients}", clients, load.requests or max(16, 4 * clients)) for clients in levels)


def saturated(levels: Sequence[Mapping[str, float]]) -> bool:
    """Whether the last of some loads' figures, in rising order, brought delay and no throughput."""
    if len(levels) < 2:
        return False
    best = max(figures["output_tps"] for figures in levels[:-1])
    last, before = levels[-1], levels[-2]
    return last["output_tps"] < GROWTH * best and last["e2e_p50_ms"] > SLOWER * before["e2e_p50_ms"]


def gamma_arrivals(rate: float, burstiness: float) -> Callable[[Random, int], Sequence[float]]:
    """Times in seconds from 0 on, whose gaps are gamma distributed with a mean of 1 / rate."""

    def times(random: Random, count: int) -> Sequence[float]:
        gaps = [random.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(count - 1)]
        return [0.0, *accumulate(gaps)]

    return times


def read_trace(path: str) -> list[tuple[float, int, int]]:
    """Seconds from the first request on, prompt tokens and output tokens of each, in the order of time.

    JSON lines or CSV, with the columns of Mooncake's traces (`timestamp` in milliseconds, `input_length`,
    `output_length`), of Azure's (`TIMESTAMP` as a date, `ContextTokens`, `GeneratedTokens`) or llmkit's own (`at_s`,
    `prompt_tokens`, `output_tokens`). Raises InputError for anything else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line.strip()]
        records = [json.loads(line) for line in lines] if text.lstrip().startswith("{") else list(csv.DictReader(lines))
        rows = sorted(
            (_seconds(record), int(_field(record, _PROMPTS)), int(_field(record, _OUTPUTS))) for record in records
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(
            f"trace {path} cannot be read ({type(error).__name__}: {error})",
            "JSON lines or CSV with timestamp, input_length and output_length were expected",
        ) from error
    if not rows or any(min(prompt, output) < 1 or not math.isfinite(at_s) for at_s, prompt, output in rows):
        raise InputError(f"trace {path} is empty, or has a request without tokens or without a time")
    return [(at_s - rows[0][0], prompt, output) for at_s, prompt, output in rows]


def _field(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    found = [record[name] for name in names if name in record]
    if not found:
        raise KeyError(" or ".join(names))
    return found[0]


def _seconds(record: Mapping[str, Any]) -> float:
    if "TIMESTAMP" in record:
        return datetime.fromisoformat(record["TIMESTAMP"]).timestamp()
    return float(_field(record, _TIMES)) / (1000 if "timestamp" in record else 1)


def _lengths(load: Load, count: int) -> Callable[[Random], Lengths]:
    (low, high), output, head = load.input_tokens, load.output_tokens, load.prefix_tokens
    return lambda random: [(head + random.randint(low, high), random.randint(*output)) for _ in range(count)]


def _closed(load: Load, name: str, clients: int, count: int) -> Scenario:
    lengths = _lengths(load, count)
    return Scenario(name, clients, lengths, "load", load.prefix_tokens, load.turns, load=float(clients))


def _open(load: Load, rate: float) -> Scenario:
    count = load.requests or max(32, round(10 * rate))
    arrivals = gamma_arrivals(rate, load.burstiness)
    return Scenario(
        f"rate{rate:g}", count, _lengths(load, count), "load", load.prefix_tokens, load.turns, arrivals, rate
    )


def _trace(load: Load, path: str) -> Scenario:
    rows = read_trace(path)[: load.requests]
    lengths = [(load.prefix_tokens + prompt, output) for _, prompt, output in rows]
    times = [at_s for at_s, _, _ in rows]
    return Scenario(
        "trace", len(rows), lambda _: lengths, "trace", load.prefix_tokens, 1, lambda _, count: times[:count]
    )
