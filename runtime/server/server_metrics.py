"""Prometheus metrics, named as vLLM names its own, but under `llmkit:`.

Gauges and token counters are the engine's. Latencies are measured in the API process, where a
client would measure them, except for the queue time, which the engine process sends with a
request's first output. The metrics of the server's state are in `state_metrics.py`.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from llmkit.runtime.engine.engine_outputs import EngineStats
from llmkit.runtime.server.process_usage import GPU_METRICS, GpuUsageReader, memory_bytes
from llmkit.runtime.server.request_times import RequestTimes

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FINISH_REASONS = ("stop", "length", "cancelled", "error")
# Histogram buckets, in seconds. One value a line would take a page.
# fmt: off
TTFT_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20,
    40, 80, 160,
)
ITL_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1, 0.2, 0.4, 0.75, 1,
    2.5, 5, 10,
)
_E2E_BUCKETS_S = (
    0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960,
)
# fmt: on
_STEP_TOKENS_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class ServerMetrics:
    """The server's metrics, in their own registry. `gpus`: report on GPUs, if there are any."""

    def __init__(self, stats: Callable[[], EngineStats], gpus: bool = True) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats))
        self._registry.register(_UsageCollector(GpuUsageReader() if gpus else None))
        success = Counter(
            "llmkit:request_success",
            "Requests that ended, by the reason they ended.",
            ["finished_reason"],
            registry=self._registry,
        )
        self._finished = {reason: success.labels(reason) for reason in FINISH_REASONS}
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "From arrival to first token.", TTFT_BUCKETS_S
        )
        self._itl = PlainHistogram(
            "llmkit:inter_token_latency_seconds", "Between two tokens of a request.", ITL_BUCKETS_S
        )
        self._registry.register(self._itl)
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds",
            "A request's mean time between two tokens.",
            ITL_BUCKETS_S,
        )
        self._e2e = self._histogram(
            "e2e_request_latency_seconds", "From arrival to last token.", _E2E_BUCKETS_S
        )
        self._queue = self._histogram(
            "request_queue_time_seconds",
            "From the engine's queue to the first step.",
            TTFT_BUCKETS_S,
        )
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "From first step to first token.", TTFT_BUCKETS_S
        )
        self._decode = self._histogram(
            "request_decode_time_seconds", "From first to last token.", _E2E_BUCKETS_S
        )
        self._step_tokens = PlainHistogram(
            "llmkit:iteration_tokens_total",
            "Tokens of an engine step; a prompt counts in the step that completes it.",
            _STEP_TOKENS_BUCKETS,
        )
        self._registry.register(self._step_tokens)
        self._last_finished = 0.0  # Unix time of the last request that ended

    def record_tokens(self, times: RequestTimes, num_tokens: int) -> None:
        """New tokens of a request have arrived; updates `times`."""
        now = time.perf_counter()
        times.num_tokens += num_tokens
        if times.first_token:
            if num_tokens:
                self._itl.observe((now - times.last_token) / num_tokens, num_tokens)
        else:
            times.first_token = now
            self._ttft.observe(times.ttft_s)
            self._queue.observe(times.queue_s)
            self._prefill.observe(times.prefill_s)
        times.last_token = now

    def record_finished(self, reason: str, times: RequestTimes | None = None) -> None:
        """Count a request that ended for `reason`, one of FINISH_REASONS.

        `times` are those of an answer that was computed; None for one that failed or was cached.
        """
        self._finished[reason].inc()
        self._last_finished = time.time()
        if times is not None:
            self._e2e.observe(times.last_token - times.arrived)
            self._decode.observe(times.decode_s)
            if times.num_tokens > 1:
                self._tpot.observe(times.decode_s / (times.num_tokens - 1))

    def statistics(self, cache_hits: int) -> dict[str, Any]:
        """The figures of Triton's statistics extension, in the form of its ModelStatistics.

        cache_hits: answers from the response cache. An execution is an engine step with new tokens.
        Times that are not measured are 0.
        """
        finished = {reason: int(_total(count)) for reason, count in self._finished.items()}
        num_answers = finished["stop"] + finished["length"]
        num_computed = int(_total(self._e2e, "_count"))

        def duration(count: int, *histograms: Histogram) -> dict[str, int]:
            seconds = sum(_total(histogram, "_sum") for histogram in histograms)
            return {"count": count, "ns": round(seconds * 1e9)}

        return {
            "last_inference": round(self._last_finished * 1e3),
            "inference_count": num_answers,
            "execution_count": int(_total(self._step_tokens, "_count")),
            "inference_stats": {
                "success": duration(num_answers, self._e2e),
                "fail": duration(finished["cancelled"] + finished["error"]),
                "queue": duration(int(_total(self._queue, "_count")), self._queue),
                "compute_input": duration(0),
                "compute_infer": duration(num_computed, self._prefill, self._decode),
                "compute_output": duration(0),
                "cache_hit": duration(cache_hits),
                "cache_miss": duration(0),
            },
            "response_stats": {},
            "batch_stats": [],
            "memory_usage": [],
        }

    def record_step(self, before: EngineStats, after: EngineStats) -> None:
        """Count the tokens of an engine step from the statistics before and after it."""
        tokens = after.prompt_tokens_total - before.prompt_tokens_total
        tokens += after.generation_tokens_total - before.generation_tokens_total
        if tokens > 0:
            self._step_tokens.observe(tokens)

    def register(self, collector: Collector) -> None:
        """Add the metrics of `collector`, which is called whenever metrics are scraped."""
        self._registry.register(collector)

    def render(self) -> bytes:
        """Return the exposition text. Takes some ms: it queries processes and GPUs."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"llmkit:{name}", text, registry=self._registry, buckets=buckets)


def _total(metric: Collector, suffix: str = "_total") -> float:
    """The sum of a metric's samples whose names end in `suffix`."""
    return sum(
        sample.value
        for family in metric.collect()
        for sample in family.samples
        if sample.name.endswith(suffix)
    )


class PlainHistogram(Collector):
    """A histogram without labels that is cheap to observe: for values of every token or step.

    It reports what prometheus_client's own Histogram does, whose locks cost more than a bucket.
    Values are observed in one thread; another one may collect.
    """

    def __init__(self, name: str, text: str, buckets: Sequence[float]) -> None:
        """buckets: their upper bounds, which belong to them, in ascending order."""
        self._name = name
        self._text = text
        self._bounds = buckets
        self._counts = [0] * (len(buckets) + 1)  # the last one is of values above all bounds
        self._sum = 0.0
        self._created = time.time()

    def observe(self, value: float, count: int = 1) -> None:
        """Count `value`, `count` times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterable[Metric]:
        total = self._sum
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        family = HistogramMetricFamily(
            self._name,
            self._text,
            list(zip(bounds, accumulate(self._counts), strict=True)),
            total,
        )
        family.add_sample(f"{self._name}_created", {}, self._created)
        yield family


class _EngineCollector(Collector):
    """Reports the engine's latest statistics when scraped."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        usage = stats.kv_used_blocks / stats.kv_total_blocks if stats.kv_total_blocks else 0.0
        yield GaugeMetricFamily(
            "llmkit:num_requests_running", "Requests in the running batch.", stats.running
        )
        yield GaugeMetricFamily(
            "llmkit:num_requests_waiting", "Requests in the waiting queue.", stats.waiting
        )
        yield GaugeMetricFamily(
            "llmkit:kv_cache_usage_perc", "KV cache in use; 1 is all of it.", usage
        )
        yield GaugeMetricFamily(
            "llmkit:prefix_cache_blocks",
            "Cached blocks that no request uses.",
            stats.kv_cached_blocks,
        )
        yield CounterMetricFamily(
            "llmkit:prompt_tokens", "Prompt tokens processed.", stats.prompt_tokens_total
        )
        yield CounterMetricFamily(
            "llmkit:generation_tokens", "Tokens generated.", stats.generation_tokens_total
        )
        yield CounterMetricFamily(
            "llmkit:num_preemptions", "Requests preempted.", stats.preemptions_total
        )
        yield CounterMetricFamily(
            "llmkit:prefix_cache_queries",
            "Prompt tokens looked up in the prefix cache.",
            stats.prefix_queries_total,
        )
        yield CounterMetricFamily(
            "llmkit:prefix_cache_hits",
            "Prompt tokens found in the prefix cache.",
            stats.prefix_hits_total,
        )
        yield GaugeMetricFamily(
            "llmkit:kv_offload_blocks",
            "Blocks and recurrent states in host memory (--kv-offload).",
            stats.host_used_blocks,
        )
        yield GaugeMetricFamily(
            "llmkit:kv_offload_max_blocks",
            "The most blocks and recurrent states that host memory can have.",
            stats.host_total_blocks,
        )
        yield CounterMetricFamily(
            "llmkit:kv_offload_hits",
            "Prompt tokens found in host memory; llmkit:prefix_cache_hits counts them, too.",
            stats.host_hits_total,
        )
        copied_blocks = CounterMetricFamily(
            "llmkit:kv_offload_blocks_copied",
            "Blocks and recurrent states copied to host memory (save) and back (load).",
            labels=["direction"],
        )
        copied_blocks.add_metric(["save"], stats.host_saves_total)
        copied_blocks.add_metric(["load"], stats.host_loads_total)
        yield copied_blocks
        copied_bytes = CounterMetricFamily(
            "llmkit:kv_offload_bytes",
            "Bytes copied to host memory (save) and back (load) by the first rank.",
            labels=["direction"],
        )
        copied_bytes.add_metric(["save"], stats.host_saved_bytes_total)
        copied_bytes.add_metric(["load"], stats.host_loaded_bytes_total)
        yield copied_bytes
        yield CounterMetricFamily(
            "llmkit:prefix_cache_without_state",
            "Prompt tokens with cached keys and values that were computed, because no recurrent "
            "state was kept after them.",
            stats.prefix_stateless_total,
        )
        yield GaugeMetricFamily(
            "llmkit:state_cache_checkpoints",
            "Recurrent states kept at the ends of cached prefixes.",
            stats.state_snapshots,
        )
        yield GaugeMetricFamily(
            "llmkit:state_cache_max_checkpoints",
            "The most recurrent states that can be kept.",
            stats.state_total_snapshots,
        )
        yield GaugeMetricFamily(
            "llmkit:state_cache_bytes",
            "Memory of the recurrent states kept at the ends of cached prefixes.",
            stats.state_snapshot_bytes,
        )
        yield CounterMetricFamily(
            "llmkit:external_prefix_cache_queries",
            "Prompt tokens looked up in the prefix cache on disk, those that memory did not have.",
            stats.store_queries_total,
        )
        yield CounterMetricFamily(
            "llmkit:external_prefix_cache_hits",
            "Prompt tokens found there and read.",
            stats.store_hits_total,
        )
        yield CounterMetricFamily(
            "llmkit:prefix_store_damaged",
            "Files of the prefix cache on disk that were damaged.",
            stats.store_damaged_total,
        )
        yield CounterMetricFamily(
            "llmkit:spec_decode_num_drafts",
            "Steps of a request that verified draft tokens.",
            stats.drafts_total,
        )
        yield CounterMetricFamily(
            "llmkit:spec_decode_num_draft_tokens", "Draft tokens proposed.", stats.drafted_total
        )
        yield CounterMetricFamily(
            "llmkit:spec_decode_num_accepted_tokens", "Draft tokens accepted.", stats.accepted_total
        )
        per_pos = CounterMetricFamily(
            "llmkit:spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens accepted, by their place in the draft.",
            labels=["position"],
        )
        for position, count in enumerate(stats.accepted_per_pos_total):
            per_pos.add_metric([str(position)], count)
        yield per_pos


class _UsageCollector(Collector):
    """Queries the system about processes and GPUs when scraped."""

    def __init__(self, gpus: GpuUsageReader | None) -> None:
        self._gpus = gpus

    def collect(self) -> Iterable[Metric]:
        memory = GaugeMetricFamily(
            "llmkit:process_resident_memory_bytes",
            "Resident memory of the API process, and of the engine's processes together.",
            labels=["process"],
        )
        for process, size in memory_bytes().items():
            memory.add_metric([process], size)
        yield memory
        readings = self._gpus.read() if self._gpus else {}
        for name, text in GPU_METRICS.items():
            metric = GaugeMetricFamily(f"llmkit:{name}", text, labels=["gpu"])
            for gpu, reading in readings.items():
                if name in reading:
                    metric.add_metric([gpu], reading[name])
            yield metric
