"""The metrics of `llmkit bench` by name, and their calculation from the timelines of requests."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median
from typing import Literal

from llmkit.bench.draft_counts import POSITION_PREFIX, DraftCounts
from llmkit.bench.server_samples import QueueCounts
from llmkit.bench.tool_accuracy.tool_results import category_of_metric
from llmkit.common.errors import InputError, UsageError


@dataclass(frozen=True)
class Metric:
    """A metric's name, title, unit and which direction is better."""

    name: str  # in gates and JSON
    title: str  # in tables
    unit: str  # of the stored value
    better: Literal["higher", "lower", "neither"]
    headline: bool = True  # shown in the table; other metrics are in the JSON report only


@dataclass(frozen=True)
class RequestTimeline:
    """The times and token counts of one request, measured by the client.

    Times are seconds of one monotonic clock. `arrivals_s` has one entry for each stream event that
    carried tokens. `output_tokens` is the server's count.
    """

    id: str
    sent_s: float
    arrivals_s: tuple[float, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None  # why the request failed; None: it is complete
    schedule_lag_s: float = 0.0  # from its scheduled time to its sending; 0 without a schedule
    # Arrival of the first token that is no reasoning; None: there was none, or it is not known.
    first_output_s: float | None = None

    @property
    def ttft_s(self) -> float:
        """Time to first token: from sending to the first arrival."""
        return self.arrivals_s[0] - self.sent_s

    @property
    def ttfo_s(self) -> float | None:
        """Time to first output token, which is no reasoning; None: there was none."""
        return None if self.first_output_s is None else self.first_output_s - self.sent_s

    @property
    def e2e_s(self) -> float:
        """End-to-end latency: from sending to the last arrival."""
        return self.arrivals_s[-1] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for a single token."""
        return tpot(self.ttft_s, self.e2e_s, self.output_tokens)

    @property
    def itl_s(self) -> list[float]:
        """Inter-token latencies: the gaps between arrivals."""
        return [later - earlier for earlier, later in pairwise(self.arrivals_s)]


def tpot(ttft_s: float, e2e_s: float, output_tokens: int) -> float | None:
    """Seconds per output token after the first; None for a single token."""
    if output_tokens < 2:
        return None
    return (e2e_s - ttft_s) / (output_tokens - 1)


@dataclass(frozen=True)
class RunResult:
    """One run of a scenario, measured by the client."""

    wall_s: float
    timelines: list[RequestTimeline]  # in the order of the requests, failed ones included
    client_cpu_s: float | None = None  # processor time of the load client; None: no client
    draft_counts: DraftCounts | None = None  # of speculative decoding; None: not known
    queue_counts: QueueCounts | None = None  # of the server's queue; None: not known
    # The AGENT_METRICS and what to know about them; empty when no sessions were played.
    session_metrics: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


_LATENCY_STATISTICS = {"mean": None, "p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}
_LATENCIES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "gap between tokens",
    "e2e": "end-to-end latency",
}
_HEADLINE_LATENCIES = {"ttft_p50_ms", "ttft_p99_ms", "tpot_mean_ms", "itl_p99_ms", "e2e_p99_ms"}


def _latency_metrics() -> Iterator[Metric]:
    for kind, title in _LATENCIES.items():
        for statistic in _LATENCY_STATISTICS:
            name = f"{kind}_{statistic}_ms"
            yield Metric(name, f"{title}, {statistic}", "ms", "lower", name in _HEADLINE_LATENCIES)


def _by_name(*metrics: Metric) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


SPEED_METRICS = _by_name(
    Metric("output_tps", "output throughput", "tokens/s", "higher"),
    Metric("total_tps", "prompt and output throughput", "tokens/s", "higher", headline=False),
    Metric("request_rate", "request rate", "1/s", "higher"),
    *_latency_metrics(),
    Metric("goodput", "goodput", "1/s", "higher"),
    Metric("acceptance", "draft tokens accepted", "share", "higher"),
    Metric("acceptance_length", "tokens of a step with drafts", "tokens", "higher"),
    Metric("drafts", "steps with drafts", "", "neither", headline=False),
    Metric("mbu", "memory bandwidth used (MBU)", "share", "higher"),
    Metric("mfu", "operations used (MFU)", "share", "higher"),
    Metric("gpu_power_w", "GPU power", "W", "lower"),
    Metric("energy_per_token_j", "GPU energy of an output token", "J", "lower"),
    Metric("cpu_power_w", "CPU power", "W", "lower"),
    Metric("cpu_energy_per_token_j", "CPU energy of an output token", "J", "lower"),
    Metric("kwh_per_million", "energy of a million output tokens", "kWh", "lower"),
    Metric("cost_per_million", "all cost, of a million output tokens", "", "lower"),
    Metric("cost_per_million_total", "all cost, of a million tokens", "", "lower"),
    Metric("cost_per_million_input", "prefill's cost, of a million prompt tokens", "", "lower"),
    Metric("cost_per_million_output", "decode's cost, of a million output tokens", "", "lower"),
    Metric("input_cost_share", "prefill's share of the cost", "share", "neither", headline=False),
    Metric("queue_mean_ms", "wait in the server's queue, mean", "ms", "lower", headline=False),
    Metric("kv_cache_usage_max", "KV cache in use, at most", "share", "lower", headline=False),
    Metric("requests_waiting_max", "requests waiting, at most", "", "lower", headline=False),
    Metric("client_us", "client's time for a token", "us", "neither", headline=False),
    Metric("client_busy", "client's share of a core", "share", "neither", headline=False),
    Metric("client_late_ms", "client behind its schedule, p99", "ms", "neither", headline=False),
    Metric("wall_s", "wall time", "s", "lower", headline=False),
    Metric("requests", "requests", "", "neither", headline=False),
    Metric("prompt_tokens", "prompt tokens", "tokens", "neither", headline=False),
    Metric("cached_tokens", "prompt tokens from the cache", "tokens", "neither", headline=False),
    Metric("cache_hit_rate", "prompt tokens from the cache", "share", "higher"),
    Metric("output_tokens", "output tokens", "tokens", "neither", headline=False),
)
"""Measured once for each scenario. In a gate, `online.output_tps` selects one scenario."""

QUALITY_METRICS = ("mean_kl", "median_kl", "p99_kl", "p999_kl", "max_kl", "top1")
"""Measured against a baseline, when target and baseline are both checkpoints."""

QUALITY_BOUND_METRICS = ("mean_kl_bound", "p99_kl_bound", "max_kl_bound", "top1")
"""Measured against a baseline, when target or baseline is a server."""

_KL = "KL divergence from baseline"
TARGET_METRICS = _by_name(
    Metric("perplexity", "perplexity", "", "lower"),
    Metric("mean_kl", f"{_KL}, mean", "nats/token", "lower"),
    Metric("median_kl", f"{_KL}, median", "nats/token", "lower"),
    Metric("p99_kl", f"{_KL}, p99", "nats/token", "lower"),
    Metric("p999_kl", f"{_KL}, p99.9", "nats/token", "lower"),
    Metric("max_kl", f"{_KL}, largest", "nats/token", "lower"),
    Metric("top1", "same token as baseline", "share", "higher"),
    Metric("mean_kl_bound", f"{_KL}, mean, at least", "nats/token", "lower"),
    Metric("p99_kl_bound", f"{_KL}, p99, at least", "nats/token", "lower"),
    Metric("max_kl_bound", f"{_KL}, largest, at least", "nats/token", "lower"),
    Metric("tool_accuracy", "tool cases answered right", "share", "higher"),
    Metric("tool_well_formed", "tool answers well formed", "share", "higher"),
    Metric("tool_name", "calls of offered tools", "share", "higher"),
    Metric("tool_schema", "calls that keep the schema", "share", "higher"),
    Metric("tool_equal", "calls equal to the reference", "share", "higher"),
    Metric("tool_no_call", "no call where none is right", "share", "higher"),
    Metric("checkpoint_bytes", "checkpoint", "bytes", "lower"),
    Metric("load_s", "loading the model", "s", "lower"),
    Metric("ready_s", "from start to ready", "s", "lower"),
    Metric("peak_memory_bytes", "peak host memory", "bytes", "lower"),
    Metric("peak_gpu_bytes", "peak GPU memory", "bytes", "lower"),
    Metric("saturation_tps", "output throughput at saturation", "tokens/s", "higher"),
    Metric("saturation_load", "load at saturation", "", "higher"),
    Metric("slo_rate", "most requests under the SLO", "1/s", "higher"),
    Metric("slo_concurrency", "most clients under the SLO", "", "higher"),
    Metric("slo_output_tps", "output throughput under the SLO", "tokens/s", "higher"),
    Metric("knee_load", "load at the knee of latency", "", "higher"),
)
"""Measured once for each target."""

AGENT_METRICS = _by_name(
    *(
        Metric(
            f"ttfo_{statistic}_ms",
            f"time to first output token, {statistic}",
            "ms",
            "lower",
            headline=statistic in ("p50", "p99"),
        )
        for statistic in _LATENCY_STATISTICS
    ),
    Metric("ttfo_share", "requests with output, not reasoning alone", "share", "higher"),
    *(
        Metric(
            f"session_{statistic}_s",
            f"session latency, {statistic}",
            "s",
            "lower",
            headline=statistic in ("p50", "p99"),
        )
        for statistic in _LATENCY_STATISTICS
    ),
    Metric("session_rate", "session rate", "1/s", "higher"),
    Metric("sessions", "sessions", "", "neither", headline=False),
    Metric("client_turn_ms", "client's own work of a turn", "ms", "neither", headline=False),
    Metric("client_lag_mean_ms", "client's event loop late, mean", "ms", "neither", headline=False),
    Metric("client_lag_p99_ms", "client's event loop late, p99", "ms", "neither", headline=False),
    Metric("ideal_cached_tokens", "ideal prefix hits", "tokens", "neither", headline=False),
    Metric("ideal_hit_rate", "prompt tokens that an infinite cache has", "share", "higher"),
    Metric("prefix_hits_of_ideal", "prefix hits, of those possible", "share", "higher"),
)
"""Measured for each load of `--mode agentic`, beside the SPEED_METRICS."""

STARTUP_METRICS = _by_name(
    TARGET_METRICS["ready_s"],
    Metric("first_token_s", "from start to the first token", "s", "lower"),
    Metric("cached_share", "weights in the page cache before", "share", "neither"),
)
"""Measured at each start of `--mode startup`, with one `stage_*_s` for each stage of the start."""

ROUTE_METRICS = _by_name(
    Metric("route_gap", "gap kept, first tokens", "share", "higher"),
    Metric("route_gap_whole", "gap kept, whole answer", "share", "higher"),
    Metric("route_gap_learned", "gap kept, learned router", "share", "higher"),
    Metric("route_large", "large calls", "share", "lower"),
    Metric("route_quality", "quality of the route", "", "higher"),
    Metric("route_cost", "cost of the route", "share", "lower"),
    Metric("route_auc", "good answers surer than bad ones", "share", "higher"),
    Metric("small_quality", "quality of the small tier", "", "higher"),
    Metric("large_quality", "quality of the large tier", "", "higher"),
)
"""Measured by `llmkit bench route`."""

STARTUP = "startup"  # the mode, and the scenario's name in the report
TASK_PREFIX = "task."  # of metrics of evaluation tasks: "task.arc_easy.acc"
STAGE_PREFIX = "stage_"  # of metrics of startup stages: "stage_building_s"
# The metrics of evaluation tasks that are better when lower; all others are better when higher.
_LOWER_IS_BETTER = {
    "perplexity",
    "word_perplexity",
    "byte_perplexity",
    "bits_per_byte",
    "ter",
    "brier_score",
}

CONDITIONAL_SPEED_METRICS = {
    "goodput",
    "acceptance",
    "acceptance_length",
    "drafts",
    "mbu",
    "mfu",
    "gpu_power_w",
    "energy_per_token_j",
    "cpu_power_w",
    "cpu_energy_per_token_j",
    "kwh_per_million",
    "cost_per_million",
    "cost_per_million_total",
    "cost_per_million_input",
    "cost_per_million_output",
    "input_cost_share",
    "queue_mean_ms",
    "kv_cache_usage_max",
    "requests_waiting_max",
    "client_us",
    "client_busy",
    "client_late_ms",
}
"""The metrics of SPEED_METRICS that need an option, a GPU, measured peaks, a client or drafts."""


def find_metric(name: str) -> Metric | None:
    """The metric with a full name; None for an unknown name.

    Full names are "perplexity", "online.output_tps", "task.arc_easy.acc" or
    "tool.parallel.accuracy".
    """
    if name.startswith(TASK_PREFIX):
        words = name.removeprefix(TASK_PREFIX).split(".")
        if len(words) < 2:
            return None
        lower = bool(_LOWER_IS_BETTER & set(words))
        return Metric(name, ", ".join(words), "", "lower" if lower else "higher")
    category = category_of_metric(name)
    if category is not None:
        title = f"tool cases answered right: {category}"
        return Metric(name, title, "share", "higher")
    short_name = name.rpartition(".")[2]
    if short_name.startswith(STAGE_PREFIX):
        stage = short_name.removeprefix(STAGE_PREFIX).removesuffix("_s").replace("_", " ")
        return Metric(short_name, f"of it: {stage}", "s", "lower")
    if short_name.startswith(POSITION_PREFIX):
        place = short_name.removeprefix(POSITION_PREFIX)
        if not place.isdecimal():
            return None
        title = f"drafts accepted up to place {place}"
        return Metric(short_name, title, "share", "higher", headline=False)
    return (
        TARGET_METRICS.get(name)
        or SPEED_METRICS.get(short_name)
        or AGENT_METRICS.get(short_name)
        or STARTUP_METRICS.get(short_name)
        or ROUTE_METRICS.get(name)
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile of one or more values, linearly interpolated between the two nearest ranks."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


_SLO = re.compile(r"(ttft|tpot|e2e):([0-9]+\.?[0-9]*|\.[0-9]+)(ms|s)")


def parse_slo(text: str) -> dict[str, float]:
    """Parse "ttft:200ms,tpot:50ms,e2e:2s" to bounds in seconds. Raises UsageError."""
    bounds = {}
    without_blanks = "".join(text.split())
    for part in without_blanks.split(","):
        match = _SLO.fullmatch(part)
        if match is None:
            raise UsageError(
                f"--slo {text!r} is not understood at {part!r}",
                "Something like ttft:200ms,tpot:50ms,e2e:2s was expected",
            )
        bounds[match[1]] = float(match[2]) / (1000 if match[3] == "ms" else 1)
    return bounds


def calculate_metrics(
    timelines: Sequence[RequestTimeline], wall_s: float, slo: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Calculate the SPEED_METRICS of one run that took `wall_s` seconds.

    slo: upper bounds in seconds for "ttft", "tpot" and "e2e", used for goodput.

    Every request must be complete (see `require_complete`). Latencies without a sample are left
    out: requests for one token have no ITL.
    """
    assert timelines and all(
        timeline.error is None and timeline.arrivals_s for timeline in timelines
    )
    prompt_tokens = sum(timeline.prompt_tokens for timeline in timelines)
    cached_tokens = sum(timeline.cached_tokens for timeline in timelines)
    output_tokens = sum(timeline.output_tokens for timeline in timelines)
    metrics: dict[str, float] = {
        "output_tps": output_tokens / wall_s,
        "total_tps": (prompt_tokens + output_tokens) / wall_s,
        "request_rate": len(timelines) / wall_s,
    }
    tpots_s = [timeline.tpot_s for timeline in timelines]
    samples: dict[str, list[float]] = {
        "ttft": [timeline.ttft_s for timeline in timelines],
        "tpot": [tpot_s for tpot_s in tpots_s if tpot_s is not None],
        "itl": [gap for timeline in timelines for gap in timeline.itl_s],
        "e2e": [timeline.e2e_s for timeline in timelines],
    }
    for latency, seconds in samples.items():
        metrics |= latency_statistics(latency, seconds)
    if slo:
        good_requests = sum(_meets_slo(timeline, slo) for timeline in timelines)
        metrics["goodput"] = good_requests / wall_s
    return metrics | {
        "wall_s": wall_s,
        "requests": len(timelines),
        "prompt_tokens": prompt_tokens,
        "cached_tokens": cached_tokens,
        "cache_hit_rate": cached_tokens / max(1, prompt_tokens),
        "output_tokens": output_tokens,
    }


def latency_statistics(latency: str, seconds: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles of a latency in milliseconds, by metric name; {} without a sample."""
    metrics = {}
    for statistic, percent in _LATENCY_STATISTICS.items() if seconds else ():
        value = fmean(seconds) if percent is None else percentile(seconds, percent)
        metrics[f"{latency}_{statistic}_ms"] = 1000 * value
    return metrics


def _meets_slo(timeline: RequestTimeline, slo: Mapping[str, float]) -> bool:
    """Whether a request stays within every bound. A request for one token has no TPOT."""
    for latency, bound in slo.items():
        seconds = getattr(timeline, f"{latency}_s")
        if seconds is not None and seconds > bound:
            return False
    return True


def calculate_client_metrics(run: RunResult) -> dict[str, float]:
    """The processor time and the schedule lag of the load client; {} without one."""
    if run.client_cpu_s is None:
        return {}
    output_tokens = sum(timeline.output_tokens for timeline in run.timelines)
    lags_s = [timeline.schedule_lag_s for timeline in run.timelines]
    return {
        "client_us": 1e6 * run.client_cpu_s / max(1, output_tokens),
        "client_busy": run.client_cpu_s / run.wall_s,
        "client_late_ms": 1000 * percentile(lags_s, 99),
    }


def median_metrics(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each metric over rounds of the same workload."""
    return {
        name: median(metrics[name] for metrics in rounds if name in metrics) for name in rounds[0]
    }


def require_complete(timelines: Sequence[RequestTimeline], target: str, scenario: str) -> None:
    """Raises InputError when a request failed: the metrics of the rest would look too good."""
    failed = [timeline for timeline in timelines if timeline.error is not None]
    if failed:
        raise InputError(
            f"{len(failed)} of {len(timelines)} requests of scenario {scenario} failed at {target}"
            f" (the first, {failed[0].id}: {failed[0].error})",
            "Speed is only reported when all requests complete",
        )
