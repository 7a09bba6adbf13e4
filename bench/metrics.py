"""What is measured: the metrics by name, and how a scenario's figures follow from its requests' timelines."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Literal

from llmkit.checkpoint.errors import InputError, UsageError


@dataclass(frozen=True)
class Metric:
    """How a figure is called, in which unit it is stored and which direction is better."""

    name: str  # in gates and JSON
    title: str  # in tables
    unit: str
    better: Literal["higher", "lower", "neither"]
    headline: bool = True  # shown in the table; the others are in the JSON report only


@dataclass(frozen=True)
class RequestTimeline:
    """One request as its client saw it. Times are seconds of one monotonic clock.

    `arrivals_s` has one entry for each message that brought tokens; `output_tokens` is what the server counted.
    """

    id: str
    sent_s: float
    arrivals_s: tuple[float, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None  # why it failed; None: it is complete
    late_s: float = 0.0  # how long after its time it was sent, where it had one

    @property
    def ttft_s(self) -> float:
        """Time to first token: the first arrival after sending."""
        return self.arrivals_s[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        """End-to-end latency: the last token's arrival after sending."""
        return self.arrivals_s[-1] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for a single token."""
        return tpot(self.ttft_s, self.e2e_s, self.output_tokens)

    @property
    def gaps_s(self) -> list[float]:
        """Inter-token latencies: the gaps between arrivals."""
        return [later - earlier for earlier, later in pairwise(self.arrivals_s)]


def tpot(ttft_s: float, e2e_s: float, output_tokens: int) -> float | None:
    """Seconds per output token after the first; None for a single token."""
    return (e2e_s - ttft_s) / (output_tokens - 1) if output_tokens > 1 else None


@dataclass(frozen=True)
class Run:
    """One run of a scenario as its client saw it."""

    wall_s: float
    timelines: list[RequestTimeline]  # in the order of the requests; failed ones say why
    client_s: float | None = None  # processor time of the load client; None: there was none


_STATISTICS = {"mean": None, "p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}
_LATENCIES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "gap between tokens",
    "e2e": "end-to-end latency",
}
_HEADLINE_LATENCIES = {"ttft_p50_ms", "ttft_p99_ms", "tpot_mean_ms", "itl_p99_ms", "e2e_p99_ms"}


def _latency_metrics() -> Iterator[Metric]:
    for kind, title in _LATENCIES.items():
        for statistic in _STATISTICS:
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
    Metric("mbu", "memory bandwidth used (MBU)", "share", "higher"),
    Metric("mfu", "operations used (MFU)", "share", "higher"),
    Metric("gpu_power_w", "GPU power", "W", "lower"),
    Metric("energy_per_token_j", "GPU energy of an output token", "J", "lower"),
    Metric("cost_per_million", "cost of a million output tokens", "", "lower"),
    Metric("client_us", "client's time for a token", "us", "neither", headline=False),
    Metric("client_busy", "client's share of a core", "share", "neither", headline=False),
    Metric("client_late_ms", "client behind its schedule, p99", "ms", "neither", headline=False),
    Metric("wall_s", "wall time", "s", "lower", headline=False),
    Metric("requests", "requests", "", "neither", headline=False),
    Metric("prompt_tokens", "prompt tokens", "tokens", "neither", headline=False),
    Metric("cached_tokens", "prompt tokens from the cache", "tokens", "neither", headline=False),
    Metric("output_tokens", "output tokens", "tokens", "neither", headline=False),
)
"""Measured once for each scenario; a gate may say `online.output_tps` for one scenario alone."""

QUALITY = ("mean_kl", "median_kl", "p99_kl", "p999_kl", "max_kl", "top1")  # figures against a baseline
BOUNDS = ("mean_kl_bound", "p99_kl_bound", "max_kl_bound", "top1")  # the same where one of the two is a server
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
    Metric("checkpoint_bytes", "checkpoint", "bytes", "lower"),
    Metric("load_s", "loading the model", "s", "lower"),
    Metric("ready_s", "from start to ready", "s", "lower"),
    Metric("peak_memory_bytes", "peak host memory", "bytes", "lower"),
    Metric("peak_gpu_bytes", "peak GPU memory", "bytes", "lower"),
    Metric("saturation_tps", "output throughput at saturation", "tokens/s", "higher"),
    Metric("saturation_load", "load at saturation", "", "higher"),
)
"""Measured once for each target."""

STARTUP_METRICS = _by_name(
    TARGET_METRICS["ready_s"],
    Metric("first_token_s", "from start to the first token", "s", "lower"),
    Metric("cached_share", "weights in the page cache before", "share", "neither"),
)
"""Measured at each start of `--mode startup`, beside the stages that the server tells: `stage_building_s`."""

STARTUP = "startup"  # the scenario of starts
TASK, STAGE = "task.", "stage_"  # what names of tasks' figures begin with ("task.arc_easy.acc"), and those of stages
_ERRORS = {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "ter", "brier_score"}  # less is better

CONDITIONAL = {
    "goodput", "mbu", "mfu", "gpu_power_w", "energy_per_token_j", "cost_per_million", "client_us", "client_busy",
    "client_late_ms",
}  # fmt: skip
"""Of SPEED_METRICS, those that need a wish, a GPU, measured peaks or a client."""


def metric_named(name: str) -> Metric | None:
    """The metric of a figure's full name: "perplexity", "online.output_tps", "task.arc_easy.acc"; None: no such."""
    if name.startswith(TASK):
        words = name.removeprefix(TASK).split(".")
        return Metric(name, ", ".join(words), "", "lower" if _ERRORS & set(words) else "higher") if words[1:] else None
    short = name.rpartition(".")[2]
    if short.startswith(STAGE):
        return Metric(short, f"of it: {short.removeprefix(STAGE).removesuffix('_s').replace('_', ' ')}", "s", "lower")
    return TARGET_METRICS.get(name) or SPEED_METRICS.get(short) or STARTUP_METRICS.get(short)


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile of one or more values, linearly interpolated between the two nearest ranks."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


_SLO = re.compile(r"(ttft|tpot|e2e):([0-9]+\.?[0-9]*|\.[0-9]+)(ms|s)")


def parse_slo(text: str) -> dict[str, float]:
    """Bounds in seconds of "ttft:200ms,tpot:50ms,e2e:2s". Raises UsageError for another form."""
    bounds = {}
    for part in "".join(text.split()).split(","):
        match = _SLO.fullmatch(part)
        if match is None:
            raise UsageError(
                f"--slo {text!r} is not understood at {part!r}",
                "Something like ttft:200ms,tpot:50ms,e2e:2s was expected",
            )
        bounds[match[1]] = float(match[2]) / (1000 if match[3] == "ms" else 1)
    return bounds


def summarize(
    timelines: Sequence[RequestTimeline], wall_s: float, slo: Mapping[str, float] | None = None
) -> dict[str, float]:
    """The figures of one run of a scenario that took `wall_s` seconds; SPEED_METRICS says what each is.

    slo: bounds in seconds by "ttft", "tpot" and "e2e", for goodput.

    Every request must be complete (`require_complete`). Latencies with no sample, such as the gaps of requests for
    one token, are left out.
    """
    assert timelines and all(timeline.error is None and timeline.arrivals_s for timeline in timelines)
    prompt_tokens = sum(timeline.prompt_tokens for timeline in timelines)
    output_tokens = sum(timeline.output_tokens for timeline in timelines)
    figures: dict[str, float] = {
        "output_tps": output_tokens / wall_s,
        "total_tps": (prompt_tokens + output_tokens) / wall_s,
        "request_rate": len(timelines) / wall_s,
    }
    samples: dict[str, list[float]] = {
        "ttft": [timeline.ttft_s for timeline in timelines],
        "tpot": [tpot for timeline in timelines if (tpot := timeline.tpot_s) is not None],
        "itl": [gap for timeline in timelines for gap in timeline.gaps_s],
        "e2e": [timeline.e2e_s for timeline in timelines],
    }
    for kind, seconds in samples.items():
        for statistic, percent in _STATISTICS.items() if seconds else ():
            value = fmean(seconds) if percent is None else percentile(seconds, percent)
            figures[f"{kind}_{statistic}_ms"] = 1000 * value
    if slo:
        figures["goodput"] = sum(_meets(timeline, slo) for timeline in timelines) / wall_s
    return figures | {
        "wall_s": wall_s,
        "requests": len(timelines),
        "prompt_tokens": prompt_tokens,
        "cached_tokens": sum(timeline.cached_tokens for timeline in timelines),
        "output_tokens": output_tokens,
    }


def _meets(timeline: RequestTimeline, slo: Mapping[str, float]) -> bool:
    """Whether a request keeps every bound; one token alone has no TPOT to be late with."""
    return all((getattr(timeline, f"{kind}_s") or 0.0) <= bound for kind, bound in slo.items())


def client_figures(run: Run) -> dict[str, float]:
    """What the load client took of a core, and how late it was; {} when there was none."""
    if run.client_s is None:
        return {}
    tokens = sum(timeline.output_tokens for timeline in run.timelines)
    late = [timeline.late_s for timeline in run.timelines]
    return {
        "client_us": 1e6 * run.client_s / max(1, tokens),
        "client_busy": run.client_s / run.wall_s,
        "client_late_ms": 1000 * percentile(late, 99),
    }


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each figure over rounds of the same work."""
    return {name: median(figures[name] for figures in rounds if name in figures) for name in rounds[0]}


def require_complete(timelines: Sequence[RequestTimeline], target: str, scenario: str) -> None:
    """Raises InputError with the counts when a request failed: figures of what was left would flatter the target."""
    failed = [timeline for timeline in timelines if timeline.error is not None]
    if failed:
        raise InputError(
            f"{len(failed)} of {len(timelines)} requests of scenario {scenario} failed at {target}"
            f" (the first, {failed[0].id}: {failed[0].error})",
            "Speed is only reported when all requests complete",
        )
