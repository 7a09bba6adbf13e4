"""A replica's metrics among Ray's own, which each node's agent shows to Prometheus."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families
from ray.serve.metrics import Gauge

INTERVAL_S = 5.0
_OURS = "llmkit:"


class Metrics:
    """Samples of `llmkit serve`, as ray_llmkit_… with the labels application, deployment and replica.

    All are gauges to Ray, which is given values and adds nothing up; Prometheus takes rates and quantiles of them as it
    does of counters and histograms.
    """

    def __init__(self) -> None:
        self._gauges: dict[str, Gauge] = {}

    def take(self, text: str) -> None:
        """The server's /metrics as they are now."""
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if not sample.name.startswith(_OURS) or sample.name.endswith("_created"):
                    continue
                name = sample.name.replace(":", "_")  # Ray takes no colon
                if name not in self._gauges:
                    self._gauges[name] = Gauge(name, family.documentation, tag_keys=tuple(sample.labels))
                self._gauges[name].set(sample.value, sample.labels)
