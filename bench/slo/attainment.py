"""Whether a load keeps an SLO, decided from runs of it.

Requests that are sent one after the other are not independent: a queue lets many of them miss a
bound together. Counts are therefore divided by the integrated autocorrelation time before they
enter a test. The test is a confidence sequence: it may be asked again after every run, and is wrong
with at most ALPHA over all of these times together (H. Robbins 1970, "Statistical methods related
to the law of the iterated logarithm", section 6: the mixture of likelihood ratios).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy

from llmkit.bench.bench_metrics import RequestTimeline, RunResult

Verdict = Literal["kept", "missed", "grows", "undecided"]

ALPHA = 0.01  # of each load
# Shares of a run by the times of sending. In the first, queue and batch build up; in the last, the
# requests run in an emptying batch.
WARMUP_SHARE = 0.25
COOLDOWN_SHARE = 0.05
# The autocorrelation is that of being among the worst requests, so that it is known even when no
# request has missed a bound.
_WORST_SHARE = 0.1
# The integrated autocorrelation time is summed up to this many times itself (A. Sokal 1989).
_SUM_LIMIT = 5.0
_ERRORS_ADDED = 1.0
_GROWTH_Z = 3.0  # standard errors of the slope
_MIN_GROWTH = 0.005  # seconds of waiting in a second; less is no queue that matters
_MIN_TREND_REQUESTS = 16


@dataclass(frozen=True)
class LoadRun:
    """One run of a load: what the SLO makes of the requests in its middle."""

    sent: int  # requests, of all parts of the run
    counted: int  # requests of the middle
    kept: int  # of these: within every bound
    failed: int  # of these: without a complete answer, which is no kept bound
    correlation: float  # 1 for independent requests; n requests count as n / correlation
    # Seconds that the time to first token grows in a second, and the standard error.
    growth: float
    growth_error: float

    @property
    def grows(self) -> bool:
        """Whether the queue grows: more requests arrive than are answered."""
        return self.growth - _GROWTH_Z * self.growth_error > _MIN_GROWTH


def slo_score(timeline: RequestTimeline, slo: Mapping[str, float]) -> float:
    """The largest of a request's latencies, as a multiple of its bound; infinite for a failure."""
    if timeline.error is not None or not timeline.arrivals_s:
        return math.inf
    latencies = {name: getattr(timeline, f"{name}_s") for name in slo}
    return max(
        (seconds / slo[name] for name, seconds in latencies.items() if seconds is not None),
        default=0.0,
    )


def judge_run(run: RunResult, slo: Mapping[str, float], is_open_loop: bool) -> LoadRun:
    """Count a run's requests. A closed loop has no queue that grows."""
    middle = middle_requests(run)
    scores = numpy.array([slo_score(timeline, slo) for timeline in middle])
    complete = [timeline for timeline in middle if timeline.error is None]
    growth = (0.0, 0.0)
    if is_open_loop and len(complete) >= _MIN_TREND_REQUESTS:
        growth = _slope([t.sent_s for t in complete], [t.ttft_s for t in complete])
    return LoadRun(
        len(run.timelines),
        len(middle),
        int((scores <= 1).sum()),
        len(middle) - len(complete),
        _miss_correlation(scores),
        *growth,
    )


def middle_requests(run: RunResult) -> list[RequestTimeline]:
    """The requests of a run without its beginning and its end, in the order of sending."""
    ordered = sorted(run.timelines, key=lambda timeline: timeline.sent_s)
    first_s = ordered[0].sent_s
    span_s = ordered[-1].sent_s - first_s
    begin_s = first_s + WARMUP_SHARE * span_s
    end_s = first_s + (1 - COOLDOWN_SHARE) * span_s
    return [timeline for timeline in ordered if begin_s <= timeline.sent_s <= end_s]


def _miss_correlation(scores: numpy.ndarray) -> float:
    """The integrated autocorrelation time of being among the worst requests."""
    if len(scores) < 2:
        return 1.0
    threshold = min(1.0, float(numpy.quantile(scores, 1 - _WORST_SHARE, method="lower")))
    return autocorrelation_time((scores > threshold).astype(float))


def autocorrelation_time(values: numpy.ndarray) -> float:
    """1 + 2 * the sum of the autocorrelations, at least 1; 1 for constant values.

    Short runs give estimates that are too low: an error of the estimate is added (N. Madras and
    A. Sokal 1988, appendix C).
    """
    centered = values - values.mean()
    variance = float(centered @ centered)
    if variance <= 1e-12 * max(1.0, float(numpy.abs(values).max())) ** 2:
        return 1.0
    size = 2 * len(values)
    spectrum = numpy.abs(numpy.fft.rfft(centered, size)) ** 2
    correlations = numpy.fft.irfft(spectrum, size)[: len(values)] / variance
    sums = 2 * numpy.cumsum(correlations) - 1
    lags = numpy.arange(len(values))
    enough = numpy.flatnonzero(lags >= _SUM_LIMIT * sums)
    last = int(enough[0]) if len(enough) else len(values) - 1
    estimate = max(1.0, float(sums[last]))
    error = math.sqrt(4 * _SUM_LIMIT * estimate / len(values))
    return estimate * (1 + _ERRORS_ADDED * error)


def _slope(times_s: Sequence[float], values_s: Sequence[float]) -> tuple[float, float]:
    """The slope of a line through the values, and its standard error."""
    times = numpy.array(times_s) - numpy.mean(times_s)
    values = numpy.array(values_s) - numpy.mean(values_s)
    spread = float(times @ times)
    if spread <= 0:
        return 0.0, 0.0
    slope = float(times @ values) / spread
    residuals = values - slope * times
    correlation = autocorrelation_time(residuals)
    variance = float(residuals @ residuals) / max(1, len(values) - 2)
    return slope, math.sqrt(correlation * variance / spread)


def mean_correlation(runs: Sequence[LoadRun]) -> float:
    """The mean of the runs' correlations over their requests."""
    counted = sum(run.counted for run in runs)
    return max(1.0, sum(run.counted * run.correlation for run in runs) / max(1, counted))


@dataclass(frozen=True)
class Attainment:
    """The share of requests within every bound, of all runs of a load."""

    kept: float  # requests, as if they were independent
    counted: float

    @staticmethod
    def of(runs: Sequence[LoadRun]) -> Attainment:
        """The attainment of all runs together.

        They share one correlation. With its own, a run without a crowd would count for more than
        one with a crowd, and the attainment would seem higher than it is.
        """
        correlation = mean_correlation(runs)
        return Attainment(
            sum(run.kept for run in runs) / correlation,
            sum(run.counted for run in runs) / correlation,
        )

    @property
    def share(self) -> float:
        """The estimate; 0 without requests."""
        return self.kept / self.counted if self.counted else 0.0

    def evidence(self, share: float, wanted: float) -> float:
        """The log of the likelihood ratio against the true attainment being `share`.

        The ratio is that of a mixture, centred at `wanted`, of all attainments. Under a true
        attainment of `share` it is a martingale, so that it ever exceeds 1 / ALPHA with at most
        ALPHA (J. Ville's inequality).
        """
        prior_missed = 1.0
        prior_kept = wanted / (1 - wanted)
        missed = self.counted - self.kept
        mixture = _log_beta(prior_kept + self.kept, prior_missed + missed)
        mixture -= _log_beta(prior_kept, prior_missed)
        return mixture - _scaled_log(self.kept, share) - _scaled_log(missed, 1 - share)

    def decides(self, wanted: float) -> bool | None:
        """Whether the true attainment is above `wanted`; None: not known yet."""
        if self.evidence(wanted, wanted) < math.log(1 / ALPHA):
            return None
        return self.share > wanted

    def interval(self, wanted: float) -> tuple[float, float]:
        """The attainments that the runs do not exclude."""
        limit = math.log(1 / ALPHA)

        def end(outside: float) -> float:
            inside = self.share
            for _ in range(60):
                middle = (inside + outside) / 2
                if self.evidence(middle, wanted) < limit:
                    inside = middle
                else:
                    outside = middle
            return inside

        return end(0.0), end(1.0)


def requests_to_decide(wanted: float) -> int:
    """The independent requests, all within the bounds, that show an attainment above `wanted`."""
    count = 1
    while not Attainment(count, count).decides(wanted):
        count = count + max(1, count // 50)
    return count


def judge_load(runs: Sequence[LoadRun], wanted: float, max_growth: float) -> Verdict:
    """What all runs of a load say so far. The last run is the longest.

    max_growth: a load is kept only if the queue has been shown not to grow faster.
    """
    decision = Attainment.of(runs).decides(wanted)
    last = runs[-1]
    if decision is False:
        return "missed"
    if last.grows:
        return "grows"
    growth_at_most = last.growth + 2 * last.growth_error
    if decision and growth_at_most <= max_growth:
        return "kept"
    return "undecided"


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _scaled_log(count: float, share: float) -> float:
    """count * log(share), where nothing of a share of 0 is 0."""
    if count <= 0:
        return 0.0
    return count * math.log(share) if share > 0 else -math.inf
