"""Alert rules for Prometheus whose bounds come from the repetitions of a benchmark.

A bound is the edge of a prediction interval: where one further repetition, of a server that works
as it did, would lie with 97.5 % (Student's t over the repetitions). The server's own metrics are
compared with it over windows that have as many requests as a repetition had.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from llmkit.bench.bench_report import TargetReport
from llmkit.bench.confidence_intervals import t_quantile
from llmkit.common.errors import InputError, UsageError
from llmkit.runtime.server.server_metrics import ITL_BUCKETS_S, TTFT_BUCKETS_S

# The interval of fewer repetitions is too wide to notice anything: with 3 its half is 5 deviations.
MIN_ROUNDS = 5
MIN_WINDOW_MINUTES = 5
# The smallest figures of a bound, so that rounding does not alert.
BOUND_DIGITS = 3
CONFIDENCE = 0.95  # of the bound of a share of failures when none failed


@dataclass(frozen=True)
class AlertRule:
    """A rule, and what its bound was made from."""

    name: str
    expression: str
    bound: float
    summary: str
    metric: str  # of the report
    rounds: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "alert": self.name,
            "metric": self.metric,
            "bound": self.bound,
            "rounds": list(self.rounds),
            "expression": self.expression,
        }


@dataclass(frozen=True)
class AlertRules:
    """The rules of one load of a report, and why others are missing."""

    load: str
    window_minutes: int
    rules: list[AlertRule]
    missing: dict[str, str]  # reasons, by the alert's name

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "load": self.load,
            "window_minutes": self.window_minutes,
            "rules": [rule.to_json() for rule in self.rules],
            "missing": self.missing,
        }

    def document(self, job: str) -> dict[str, Any]:
        """The file of rules, as Prometheus reads it."""
        rules = []
        for rule in self.rules:
            description = (
                f"The bound is the edge of the 95 % prediction interval over"
                f" {len(rule.rounds)} repetitions of {rule.metric} under the load {self.load}."
            )
            if rule.metric == "requests":
                description = (
                    f"None of {sum(rule.rounds):,.0f} requests of the benchmark failed: a larger"
                    f" share than this contradicts it at {CONFIDENCE:.0%}."
                )
            rules.append(
                {
                    "alert": rule.name,
                    "expr": rule.expression,
                    "for": f"{self.window_minutes}m",
                    "labels": {"severity": "warning"},
                    "annotations": {"summary": rule.summary, "description": description},
                }
            )
        return {"groups": [{"name": f"llmkit-bench-{job}", "rules": rules}]}


def prediction_interval(values: Sequence[float]) -> tuple[float, float]:
    """Where one further repetition lies with 95 %, for two or more."""
    half = t_quantile(len(values) - 1) * stdev(values) * math.sqrt(1 + 1 / len(values))
    return fmean(values) - half, fmean(values) + half


def choose_load(target: TargetReport, load: str | None) -> str:
    """The load whose rounds make the bounds: the named one, or the only one. Raises UsageError."""
    names = [name for name, rounds in target.rounds.items() if rounds and "requests" in rounds[0]]
    if load is None and len(names) == 1:
        return names[0]
    if load not in names:
        found = ", ".join(names) or "no load"
        problem = f"the report has several loads ({found})" if load is None else f"no load {load!r}"
        raise UsageError(
            problem if names else "the report has no load",
            f"One of {found}" if names else "A report of `llmkit bench` with speed",
            "Name the load that your users send with --load",
        )
    return load


def make_alert_rules(target: TargetReport, load: str, job: str) -> AlertRules:
    """The rules of a server that works as it did in the rounds of a load.

    job: the label of the server's metrics in Prometheus. Raises InputError for too few rounds.
    """
    rounds = target.rounds[load]
    if len(rounds) < MIN_ROUNDS:
        raise InputError(
            f"the load {load} was measured {len(rounds)} times",
            f"At least {MIN_ROUNDS} repetitions, for intervals that are worth an alert",
            f"Measure with `llmkit bench ... --repeats {2 * MIN_ROUNDS}`",
        )
    longest_s = max(values["wall_s"] for values in rounds)
    window = max(MIN_WINDOW_MINUTES, math.ceil(longest_s / 60))
    return _Maker(rounds, load, window, f'{{job="{job}"}}').make()


class _Maker:
    """Makes the rules of one load."""

    def __init__(
        self, rounds: Sequence[dict[str, float]], load: str, window: int, labels: str
    ) -> None:
        self._rounds = rounds
        self._labels = labels
        self._range = f"{labels}[{window}m]"
        self._result = AlertRules(load, window, [], {})

    def make(self) -> AlertRules:
        """All rules that the rounds have metrics for."""
        self._latency("LlmkitTtftAboveBench", "ttft", "time_to_first_token_seconds", TTFT_BUCKETS_S)
        self._latency(
            "LlmkitTpotAboveBench", "tpot", "request_time_per_output_token_seconds", ITL_BUCKETS_S
        )
        queue = "llmkit:request_queue_time_seconds"
        self._upper(
            "LlmkitQueueAboveBench",
            "queue_mean_ms",
            1e-3,
            f"{self._rate(f'{queue}_sum')} / {self._rate(f'{queue}_count')}",
            "Requests wait {{ $value | humanizeDuration }} on average in the queue",
            edges=TTFT_BUCKETS_S,
        )
        self._upper(
            "LlmkitKvCacheAboveBench",
            "kv_cache_usage_max",
            1.0,
            f"max by (job, instance) (llmkit:kv_cache_usage_perc{self._labels})",
            "{{ $value | humanizePercentage }} of the KV cache is in use",
            largest=1.0,
        )
        self._errors()
        self._lower(
            "LlmkitPrefixHitsBelowBench",
            "cache_hit_rate",
            f"{self._rate('llmkit:prefix_cache_hits_total')}"
            f" / {self._rate('llmkit:prefix_cache_queries_total')}",
            "{{ $value | humanizePercentage }} of the prompt tokens come from the prefix cache",
        )
        self._lower(
            "LlmkitAcceptanceBelowBench",
            "acceptance",
            f"{self._rate('llmkit:spec_decode_num_accepted_tokens_total')}"
            f" / {self._rate('llmkit:spec_decode_num_draft_tokens_total')}",
            "{{ $value | humanizePercentage }} of the draft tokens are accepted",
        )
        return self._result

    def _rate(self, metric: str) -> str:
        return f"sum by (job, instance) (rate({metric}{self._range}))"

    def _values(self, name: str, metric: str) -> tuple[float, ...] | None:
        """The metric of all rounds; None, with a reason, where one has none."""
        values = tuple(values[metric] for values in self._rounds if metric in values)
        if len(values) < len(self._rounds):
            self._result.missing[name] = f"{metric} was not measured in all repetitions"
            return None
        return values

    def _latency(self, name: str, latency: str, histogram: str, buckets: Sequence[float]) -> None:
        """A rule for the highest percentile that a repetition has enough requests for.

        A quantile of a histogram is interpolated within a bucket. The bound is therefore the next
        bucket's upper edge: the quantile passes it only when requests do.
        """
        fewest = min(values["requests"] for values in self._rounds)
        percent = next((p for p in (99, 95, 90) if fewest * (100 - p) >= 100), 50)
        metric = f"{latency}_p{percent}_ms"
        values = self._values(name, metric)
        if values is None:
            return
        bound_s = prediction_interval(values)[1] / 1000
        edge_s = next((float(edge) for edge in buckets if edge >= bound_s), None)
        if edge_s is None:
            self._result.missing[name] = (
                f"its bound, {bound_s:.3g} s, is above the last bucket of llmkit:{histogram}"
            )
            return
        rate = f"sum by (job, instance, le) (rate(llmkit:{histogram}_bucket{self._range}))"
        expression = f"histogram_quantile({percent / 100:g}, {rate}) > {edge_s:g}"
        summary = (
            f"The {percent}th percentile of {latency.upper()} on {{{{ $labels.instance }}}} is"
            " {{ $value | humanizeDuration }}"
        )
        self._add(name, expression, edge_s, summary, metric, values)

    def _upper(
        self,
        name: str,
        metric: str,
        scale: float,
        expression: str,
        summary: str,
        largest: float = math.inf,
        edges: Sequence[float] = (),
    ) -> None:
        """A rule for a figure that may not rise.

        scale: of the report's unit. edges: to which a bound below them is rounded up.
        """
        values = self._values(name, metric)
        if values is None:
            return
        bound = _rounded(prediction_interval(values)[1] * scale, math.ceil)
        bound = next((float(edge) for edge in edges if edge >= bound), bound)
        if bound >= largest:
            self._result.missing[name] = f"its bound, {bound:g}, is never passed"
            return
        self._add(name, f"{expression} > {bound:g}", bound, _on(summary), metric, values)

    def _lower(self, name: str, metric: str, expression: str, summary: str) -> None:
        """A rule for a share that may not fall."""
        values = self._values(name, metric)
        if values is None:
            return
        bound = _rounded(prediction_interval(values)[0], math.floor)
        if bound <= 0:
            self._result.missing[name] = f"its bound, {bound:g}, is never passed"
            return
        self._add(name, f"{expression} < {bound:g}", bound, _on(summary), metric, values)

    def _errors(self) -> None:
        """A rule for the share of failures: a report has none, as it would have been refused."""
        counts = tuple(values["requests"] for values in self._rounds)
        # The largest share of failures with which no request fails with 5 %.
        bound = _rounded(1 - (1 - CONFIDENCE) ** (1 / sum(counts)), math.ceil)
        failed = self._labels.replace("}", ', finished_reason="error"}')
        window = self._result.window_minutes
        metric = "llmkit:request_success_total"
        expression = (
            f"sum by (job, instance) (rate({metric}{failed}[{window}m])) / {self._rate(metric)}"
        )
        summary = _on("{{ $value | humanizePercentage }} of the requests fail")
        self._add(
            "LlmkitErrorsAboveBench",
            f"{expression} > {bound:g}",
            bound,
            summary,
            "requests",
            counts,
        )

    def _add(
        self,
        name: str,
        expression: str,
        bound: float,
        summary: str,
        metric: str,
        values: tuple[float, ...],
    ) -> None:
        self._result.rules.append(AlertRule(name, expression, bound, summary, metric, values))


def _on(summary: str) -> str:
    return f"{summary} on {{{{ $labels.instance }}}}"


def _rounded(value: float, round_to: Any) -> float:
    """The value with BOUND_DIGITS digits, rounded by floor or ceil."""
    if value == 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(abs(value))) + 1 - BOUND_DIGITS)
    return float(f"{round_to(value / unit) * unit:.12g}")
