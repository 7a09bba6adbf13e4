"""Prometheus metrics, named as vLLM names its own but under `llmkit:`.

Gauges and token counters are the engine's; latencies are measured where a client would, in the API process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llmkit.runtime.server.messages import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FINISH_REASONS = ("stop", "length", "cancelled", "error")
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_ITL_S = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1, 0.2, 0.4, 0.75, 1, 2.5, 5, 10)
_E2E_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class Metrics:
    """The server's metrics in a registry of their own."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats))
        success = Counter(
            "llmkit:request_success",
            "Requests that ended, by the reason they ended.",
            ["finished_reason"],
            registry=self._registry,
        )
        self._finished = {reason: success.labels(reason) for reason in FINISH_REASONS}
        self.time_to_first_token = Histogram(
            "llmkit:time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            registry=self._registry,
            buckets=_TTFT_S,
        )
        self.inter_token_latency = Histogram(
            "llmkit:inter_token_latency_seconds",
            "Between two tokens of a request.",
            registry=self._registry,
            buckets=_ITL_S,
        )
        self.e2e_latency = Histogram(
            "llmkit:e2e_request_latency_seconds",
            "From a request's arrival to its last token.",
            registry=self._registry,
            buckets=_E2E_S,
        )

    def finished(self, reason: str) -> None:
        """Count a request that ended for `reason`, one of FINISH_REASONS."""
        self._finished[reason].inc()

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the engine's latest figures when scraped."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        now = self._stats()
        usage = now.kv_used_blocks / now.kv_total_blocks if now.kv_total_blocks else 0.0
        yield GaugeMetricFamily("llmkit:num_requests_running", "Requests in the running batch.", now.running)
        yield GaugeMetricFamily("llmkit:num_requests_waiting", "Requests that wait to be run.", now.waiting)
        yield GaugeMetricFamily("llmkit:kv_cache_usage_perc", "KV cache in use; 1 is all of it.", usage)
        yield CounterMetricFamily("llmkit:prompt_tokens", "Prompt tokens processed.", now.prompt_tokens_total)
        yield CounterMetricFamily("llmkit:generation_tokens", "Tokens generated.", now.generation_tokens_total)
        yield CounterMetricFamily("llmkit:num_preemptions", "Requests preempted.", now.preemptions_total)
        yield CounterMetricFamily(
            "llmkit:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", now.prefix_queries_total
        )
        yield CounterMetricFamily(
            "llmkit:prefix_cache_hits", "Prompt tokens found in the prefix cache.", now.prefix_hits_total
        )
        yield CounterMetricFamily("llmkit:spec_decode_num_draft_tokens", "Tokens guessed.", now.drafted_total)
        yield CounterMetricFamily("llmkit:spec_decode_num_accepted_tokens", "Guesses confirmed.", now.accepted_total)
