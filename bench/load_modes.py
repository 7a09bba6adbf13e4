"""The modes of `--mode`: their scenarios, the arrival times of requests, the end of a sweep."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from llmkit.bench.bench_metrics import STARTUP
from llmkit.bench.bench_options import AGENTIC, LoadOptions
from llmkit.bench.slo.slo_options import SLO
from llmkit.bench.workload import Lengths, Scenario
from llmkit.common.errors import InputError, UsageError
from llmkit.common.json_lines import read_json_lines
from llmkit.common.options import changed_options

MODES = ("serve", "latency", "throughput", "sweep", SLO, STARTUP, AGENTIC)
DEFAULT_CONCURRENCY = {
    "serve": (8,),
    "latency": (1, 4, 16),
    "sweep": (1, 2, 4, 8, 16, 32, 64, 128, 256),
}
# A sweep ends when throughput grows by less than the first factor and the median end-to-end
# latency by more than the second.
MIN_THROUGHPUT_GROWTH = 1.05
MAX_LATENCY_GROWTH = 1.10
# Column names of trace files. The time is in milliseconds, a date, or in seconds.
_TIME_COLUMNS = ("timestamp", "TIMESTAMP", "at_s")
_PROMPT_COLUMNS = ("input_length", "ContextTokens", "prompt_tokens")
_OUTPUT_COLUMNS = ("output_length", "GeneratedTokens", "output_tokens")


def load_scenarios(load: LoadOptions) -> tuple[Scenario, ...]:
    """The scenarios of a load, from the lowest level to the highest.

    There are none for `--mode startup`, none for `--mode agentic`, whose trace makes them, and none
    for `--mode slo`, whose search does.

    Raises UsageError for options that exclude each other.
    """
    if load.mode not in MODES:
        raise UsageError(f"no such mode: {load.mode}", f"Modes are {', '.join(MODES)}")
    if load.mode == AGENTIC:
        return ()
    for label in changed_options(load, ("history", "hash_block_tokens")):
        raise UsageError(f"{label} belongs to --mode {AGENTIC}", "A trace of sessions")
    if load.mode == STARTUP:
        for label in changed_options(load):
            raise UsageError(
                f"{label} does not go with --mode startup: a start is measured with one request",
                "--mode startup goes with --repeats alone",
            )
        return ()
    if load.mode == SLO:
        if load.concurrency or load.rates or load.trace or load.turns > 1:
            raise UsageError(
                "--mode slo chooses the loads itself",
                "No --concurrency, --rate, --trace or --turns was expected",
                "Choose what is raised with --search",
            )
        if not 0 < load.burstiness < math.inf:
            raise UsageError("burstiness is more than 0")
        return ()
    if load.trace is not None:
        if load.concurrency or load.rates or load.mode != "serve" or load.turns > 1:
            raise UsageError(
                "a trace sets the times of its requests", "--trace goes with --mode serve alone"
            )
        for label in changed_options(load, ("input_tokens", "output_tokens", "burstiness")):
            raise UsageError(
                f"{label} does not go with --trace", "A trace has its own lengths and times"
            )
        return (_trace_scenario(load, load.trace),)
    if load.rates and (load.mode in ("latency", "throughput") or load.concurrency):
        raise UsageError(f"--rate does not go with --mode {load.mode} or --concurrency")
    if load.mode == "throughput" and load.concurrency:
        raise UsageError(
            "--mode throughput sends all at once", "--requests was expected, and no --concurrency"
        )
    if load.mode == "latency" and load.requests:
        raise UsageError(
            "--mode latency sends one request a client",
            "--concurrency was expected, and no --requests",
        )
    positive = (*load.rates, *load.concurrency, load.burstiness, load.turns)
    if not all(0 < number < math.inf for number in positive):
        raise UsageError("rates, concurrencies, burstiness and turns are more than 0")
    if not load.rates:
        require_default_burstiness(load)
    if load.mode == "throughput":
        count = load.requests or 64
        return (_concurrency_scenario(load, "throughput", count, count),)
    if load.rates:
        return tuple(_rate_scenario(load, rate) for rate in sorted(set(load.rates)))
    scenarios = []
    for concurrency in sorted(set(load.concurrency)) or DEFAULT_CONCURRENCY[load.mode]:
        if load.mode == "latency":
            name = f"batch{concurrency}"
            count = concurrency
        else:
            name = f"c{concurrency}"
            count = load.requests or max(16, 4 * concurrency)
        scenarios.append(_concurrency_scenario(load, name, concurrency, count))
    return tuple(scenarios)


def require_default_burstiness(load: LoadOptions) -> None:
    """Raises UsageError for a burstiness of a load that does not draw its arrival times."""
    for label in changed_options(load, ("burstiness",)):
        raise UsageError(f"{label} needs --rate", "Clients send when they are answered")


def is_saturated(levels: Sequence[Mapping[str, float]]) -> bool:
    """Whether the last level of a sweep added latency but no throughput.

    levels: the metrics of each level, from the lowest to the highest.
    """
    if len(levels) < 2:
        return False
    best_tps = max(metrics["output_tps"] for metrics in levels[:-1])
    last = levels[-1]
    previous = levels[-2]
    return (
        last["output_tps"] < MIN_THROUGHPUT_GROWTH * best_tps
        and last["e2e_p50_ms"] > MAX_LATENCY_GROWTH * previous["e2e_p50_ms"]
    )


def gamma_arrivals(rate: float, burstiness: float) -> Callable[[Random, int], Sequence[float]]:
    """Draws arrival times in seconds from 0, with gamma distributed gaps and a mean of 1 / rate.

    burstiness: the shape of the distribution; 1 is a Poisson process, less is burstier.
    """

    def arrival_times(random: Random, count: int) -> Sequence[float]:
        gaps = [random.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(count - 1)]
        return [0.0, *accumulate(gaps)]

    return arrival_times


def read_trace(path: str) -> list[tuple[float, int, int]]:
    """Read a trace: seconds after the first request, prompt tokens and output tokens of each.

    The file has JSON lines or CSV, with the columns of Mooncake's traces (`timestamp` in
    milliseconds, `input_length`, `output_length`), of Azure's (`TIMESTAMP` as a date,
    `ContextTokens`, `GeneratedTokens`) or llmkit's own (`at_s`, `prompt_tokens`, `output_tokens`).
    The result is sorted by time. Raises InputError for any other file.
    """
    rows = read_trace_rows(path)
    start_s = rows[0].time_s
    return [(row.time_s - start_s, row.prompt_tokens, row.output_tokens) for row in rows]


class TraceRow(NamedTuple):
    """A request of a trace."""

    time_s: float  # since 1970 for dates, or since the trace's own begin
    prompt_tokens: int
    output_tokens: int
    is_dated: bool


def read_trace_rows(path: str) -> list[TraceRow]:
    """The requests of a trace with their times as the file has them; see `read_trace`.

    Dates without a time zone are in UTC.
    """
    try:
        data = Path(path).read_bytes()
        records: Sequence[Mapping[str, Any]]
        if data.lstrip().startswith(b"{"):
            records = [record for _, record in read_json_lines(data, f"trace {path}")]
        else:
            lines = data.decode("utf-8").splitlines()
            records = list(csv.DictReader(line for line in lines if line.strip()))
        rows = sorted(
            TraceRow(
                _record_time_s(record),
                int(_first_column(record, _PROMPT_COLUMNS)),
                int(_first_column(record, _OUTPUT_COLUMNS)),
                "TIMESTAMP" in record,
            )
            for record in records
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(
            f"trace {path} cannot be read ({type(error).__name__}: {error})",
            "JSON lines or CSV with timestamp, input_length and output_length were expected",
        ) from error
    if not rows or any(
        min(row.prompt_tokens, row.output_tokens) < 1 or not math.isfinite(row.time_s)
        for row in rows
    ):
        raise InputError(
            f"trace {path} is empty, or has a request without tokens or without a time"
        )
    return rows


def _first_column(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The value of the first of these columns that the record has."""
    for name in names:
        if name in record:
            return record[name]
    raise KeyError(" or ".join(names))


def _record_time_s(record: Mapping[str, Any]) -> float:
    if "TIMESTAMP" in record:
        date = datetime.fromisoformat(record["TIMESTAMP"])
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    time = float(_first_column(record, _TIME_COLUMNS))
    return time / 1000 if "timestamp" in record else time


def draw_lengths(load: LoadOptions, count: int) -> Callable[[Random], Lengths]:
    """Draws the lengths of `count` conversations, uniform between the load's bounds."""
    low, high = load.input_tokens

    def draw(random: Random) -> Lengths:
        return [
            (
                load.prefix_tokens + random.randint(low, high),
                random.randint(*load.output_tokens),
            )
            for _ in range(count)
        ]

    return draw


def _concurrency_scenario(
    load: LoadOptions, name: str, max_concurrency: int, count: int
) -> Scenario:
    """A closed loop: each client sends its next request when the last one is answered."""
    return Scenario(
        name,
        max_concurrency,
        draw_lengths(load, count),
        "load",
        load.prefix_tokens,
        load.turns,
        load_level=float(max_concurrency),
    )


def _rate_scenario(load: LoadOptions, rate: float) -> Scenario:
    """An open loop: requests are sent at a rate per second, independent of the responses."""
    count = load.requests or max(32, round(10 * rate))
    return Scenario(
        f"rate{rate:g}",
        count,
        draw_lengths(load, count),
        "load",
        load.prefix_tokens,
        load.turns,
        draw_arrivals=gamma_arrivals(rate, load.burstiness),
        load_level=rate,
    )


def _trace_scenario(load: LoadOptions, path: str) -> Scenario:
    """The requests of a trace file, at its times and with its lengths."""
    rows = read_trace(path)[: load.requests]
    lengths = [(load.prefix_tokens + prompt, output) for _, prompt, output in rows]
    times = [time_s for time_s, _, _ in rows]
    return Scenario(
        "trace",
        len(rows),
        lambda _: lengths,
        "trace",
        load.prefix_tokens,
        draw_arrivals=lambda _, count: times[:count],
    )
