"""The metrics of routes, beside those of the models."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

# fmt: off
_HELD_BUCKETS_S = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
)
# fmt: on


class RouteMetrics:
    """Counters in a registry of their own. All labels are names of the operator's."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter(
            "route_requests", "Requests of a route, by the tier that answered.", "reason"
        )
        self._escalations = self._counter(
            "route_escalations", "Answers that a tier began and that were given up."
        )
        self._abandoned_tokens = self._counter(
            "route_abandoned_tokens", "Completion tokens of answers that were given up."
        )
        self._failures = self._counter(
            "route_failures", "Requests that a tier could not answer, because it was down."
        )
        self._held = Histogram(
            "llmkit:route_held_seconds",
            "From a request until a tier was chosen, where an answer's uncertainty decided.",
            ["route"],
            buckets=_HELD_BUCKETS_S,
            registry=self._registry,
        )

    def record_answer(self, route: str, tier: str, reason: str) -> None:
        """A tier's answer is forwarded."""
        self._requests.labels(route, tier, reason).inc()

    def record_escalation(self, route: str, tier: str, tokens: int) -> None:
        """A tier's answer of so many tokens was given up."""
        self._escalations.labels(route, tier).inc()
        self._abandoned_tokens.labels(route, tier).inc(tokens)

    def record_failure(self, route: str, tier: str) -> None:
        """A tier was down."""
        self._failures.labels(route, tier).inc()

    def record_held(self, route: str, seconds: float) -> None:
        """An answer was held back for so long."""
        self._held.labels(route).observe(seconds)

    def render(self) -> bytes:
        """The Prometheus text."""
        return generate_latest(self._registry)

    def _counter(self, name: str, help_text: str, *more_labels: str) -> Counter:
        return Counter(
            f"llmkit:{name}", help_text, ["route", "tier", *more_labels], registry=self._registry
        )
