"""The metrics of shadows, beside those of the models."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# fmt: off
_LATENCY_BUCKETS_S = (
    0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 5, 7.5, 10, 15, 20, 30, 40, 60, 120, 240, 480,
)
_KL_BUCKETS = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
# fmt: on


class ShadowMetrics:
    """Counters in a registry of their own. All labels are names of the operator's."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter(
            "shadow_requests",
            "Requests that were chosen for the shadow: answered, failed (the shadow gave no "
            "answer), dropped (too many wait) or skipped (nothing can be compared).",
            "outcome",
        )
        self._same = self._counter(
            "shadow_same_answers", "Answers of the shadow that are equal to the model's."
        )
        self._tokens = self._counter(
            "shadow_compared_tokens",
            "Tokens of the model's answers whose predictions were compared.",
        )
        self._same_top_tokens = self._counter(
            "shadow_same_top_tokens",
            "Compared tokens for which both models have the same most probable token.",
        )
        self._kl_sum = self._counter(
            "shadow_kl_nats",
            "Sum over the compared tokens of the lower bound of the KL divergence.",
        )
        self._kl = Histogram(
            "llmkit:shadow_answer_kl",
            "Mean lower bound of the KL divergence from the model to the shadow in an answer.",
            ["model", "shadow"],
            buckets=_KL_BUCKETS,
            registry=self._registry,
        )
        self._incomparable = self._counter(
            "shadow_incomparable", "Answers without a KL divergence, by the reason.", "reason"
        )
        self._verdicts = self._counter(
            "shadow_verdicts",
            "Comparisons by the judge: model or shadow is better, equal, unclear or failed.",
            "verdict",
        )
        self._latency = Histogram(
            "llmkit:shadow_latency_seconds",
            "From a request to the end of its answer, of the model and of its shadow.",
            ["model", "shadow", "side"],
            buckets=_LATENCY_BUCKETS_S,
            registry=self._registry,
        )
        self._waiting = Gauge(
            "llmkit:shadow_requests_waiting",
            "Requests that wait for the shadow.",
            ["model", "shadow"],
            registry=self._registry,
        )

    def record_outcome(self, model: str, shadow: str, outcome: str) -> None:
        """A chosen request has ended so."""
        self._requests.labels(model, shadow, outcome).inc()

    def record_latency(self, model: str, shadow: str, model_s: float, shadow_s: float) -> None:
        """Both have answered a request."""
        self._latency.labels(model, shadow, "model").observe(model_s)
        self._latency.labels(model, shadow, "shadow").observe(shadow_s)

    def record_same(self, model: str, shadow: str, is_same: bool) -> None:
        """Whether both answers are equal."""
        self._same.labels(model, shadow).inc(int(is_same))

    def record_divergences(
        self, model: str, shadow: str, kl_sum: float, num_tokens: int, num_same_top: int
    ) -> None:
        """The predictions for the tokens of an answer were compared."""
        self._tokens.labels(model, shadow).inc(num_tokens)
        self._same_top_tokens.labels(model, shadow).inc(num_same_top)
        self._kl_sum.labels(model, shadow).inc(kl_sum)
        self._kl.labels(model, shadow).observe(kl_sum / num_tokens)

    def record_incomparable(self, model: str, shadow: str, reason: str) -> None:
        """An answer has no KL divergence."""
        self._incomparable.labels(model, shadow, reason).inc()

    def record_verdict(self, model: str, shadow: str, verdict: str) -> None:
        """The judge has compared two answers."""
        self._verdicts.labels(model, shadow, verdict).inc()

    def set_waiting(self, model: str, shadow: str, count: int) -> None:
        """So many requests wait."""
        self._waiting.labels(model, shadow).set(count)

    def render(self) -> bytes:
        """The Prometheus text."""
        return generate_latest(self._registry)

    def _counter(self, name: str, help_text: str, *more_labels: str) -> Counter:
        return Counter(
            f"llmkit:{name}", help_text, ["model", "shadow", *more_labels], registry=self._registry
        )
