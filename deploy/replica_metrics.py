"""A server's metrics as metrics of Ray, which Prometheus reads from each node's agent."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families
from ray.serve.metrics import Gauge

INTERVAL_S = 5.0
_PREFIX = "llmkit:"


class RayMetrics:
    """The samples of `llmkit serve`, named ray_llmkit_….

    Their labels are application, deployment and replica. All are gauges for Ray, because the server
    has summed them up already. Prometheus computes rates and quantiles from them as from counters
    and histograms.
    """

    def __init__(self) -> None:
        self._gauges: dict[str, Gauge] = {}

    def update(self, text: str) -> None:
        """Set the gauges from the text of the server's /metrics."""
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if not sample.name.startswith(_PREFIX) or sample.name.endswith("_created"):
                    continue
                name = sample.name.replace(":", "_")  # Ray allows no colon
                if name not in self._gauges:
                    self._gauges[name] = Gauge(
                        name, family.documentation, tag_keys=tuple(sample.labels)
                    )
                self._gauges[name].set(sample.value, sample.labels)
